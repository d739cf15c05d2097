"""Filled polygons drawn with sub-pixel accuracy: the shapes whose corners are known exactly."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw

from .geometry import warp_points

#: Drawn so many times larger and averaged, in each direction.
OVERSAMPLING = 6


def render_outlines(
    outlines: list[tuple[np.ndarray, int]], background: int, H: np.ndarray, size: int
) -> np.ndarray:
    """Filled outlines mapped by H, on a plain ground: (size,size) float32."""
    large = Image.new("L", (size * OVERSAMPLING, size * OVERSAMPLING), background)
    draw = ImageDraw.Draw(large)
    mapped = warp_points(
        torch.from_numpy(np.concatenate([outline for outline, _ in outlines])), torch.from_numpy(H)
    ).numpy()
    # pixel i of the view covers i - 0.5 .. i + 0.5; Pillow's integers are centres of its pixels
    points = ((mapped + 0.5) * OVERSAMPLING - 0.5).round().clip(-1e6, 1e6).astype(int)
    start = 0
    for outline, gray in outlines:
        draw.polygon([tuple(p) for p in points[start : start + len(outline)].tolist()], fill=gray)
        start += len(outline)
    return np.asarray(large.reduce(OVERSAMPLING), dtype=np.float32)
