"""Weights of the conversion from color to gray; imports no other module of the package."""

from __future__ import annotations

from typing import Any

import numpy as np

# ITU-R BT.601 luma, what OpenCV and Pillow use.
LUMA = (0.299, 0.587, 0.114)
#: Luma weights of OpenCV's conversion to gray in units of 2^-15.
OPENCV_LUMA = np.array((9798, 19235, 3735), np.int32)


def luma(red: Any, green: Any, blue: Any) -> Any:
    """Gray values of three arrays or tensors of colors."""
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
