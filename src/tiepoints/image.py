"""Load images as gray tensors (1,1,H,W) float32 in [0,1].

8 and 16 bit, gray, color, alpha and palette images are scaled to [0,1] by the range of their type,
not by their own maximum; float arrays must already lie in [0,1]. Pixels are read as stored: EXIF
orientation is ignored, so keypoints are in pixels of the stored image, as in COLMAP. Alpha is
dropped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import DataError
from .filters import to_gray

ImageLike: TypeAlias = str | os.PathLike | Image.Image | np.ndarray | Tensor


#: Images with more pixels than this raise a ``DataError``: extraction would need about 8 GiB.
MAX_PIXELS = 120_000_000


def load_image(source: ImageLike, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Load a gray image (1,1,H,W) float32 in [0,1] from a path, PIL image, array or tensor.

    Arrays are (H,W), (H,W,1), (H,W,3) RGB or (H,W,4); tensors (H,W), (C,H,W) or (1,C,H,W) with C =
    1, 3 or 4. Unsigned integers are divided by the largest value of their type, bool becomes 0 and
    1, floats must lie in [0,1].

    Raises:
        FileNotFoundError: no file at the path.
        DataError: the file cannot be decoded, is empty, or has more than ``max_pixels``.
        ValueError: an array or tensor of another shape, type or range.
    """
    if isinstance(source, str | os.PathLike):
        return _from_file(Path(source), max_pixels)
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Tensor):
        return _from_tensor(source)
    raise ValueError(
        "an image must be a path, PIL image, numpy array or torch tensor, got "
        f"{type(source).__name__}"
    )


#: Luma weights of OpenCV's conversion to gray in units of 2^-15 (``filters.LUMA``).
_OPENCV_LUMA = (9798, 19235, 3735)
#: Pillow's modes of 8-bit color.
_COLOR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")


def load_gray_levels(source: ImageLike) -> Tensor:
    """As ``load_image``, but 8-bit color becomes whole gray levels, as OpenCV and so the published
    code converts it; up to half a level from the gray values of ``load_image``.
    """
    if isinstance(source, str | os.PathLike):
        image = load_image(source)  # raises for files that cannot be used
        with Image.open(source) as photo:
            eight_bit_color = photo.mode in _COLOR_MODES
        if not eight_bit_color:
            return image
    elif isinstance(source, Image.Image):
        if source.mode not in _COLOR_MODES:
            return load_image(source)
    elif isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] not in (3, 4) or source.dtype != np.uint8:
            return load_image(source)
    else:
        return load_image(source)
    rgb = np.asarray(to_rgb(source)).astype(np.int32)
    red, green, blue = (rgb[..., i] * weight for i, weight in enumerate(_OPENCV_LUMA))
    return load_image(((red + green + blue + (1 << 14)) >> 15).astype(np.uint8))


def to_rgb(source: ImageLike) -> Image.Image:
    """RGB image of any source for visualization; arguments and errors as ``load_image``."""
    if isinstance(source, str | os.PathLike):
        with Image.open(source) as photo:
            return to_rgb(photo.copy())
    if isinstance(source, Image.Image) and not source.mode.startswith(("I", "F")):
        return source.convert("RGB")
    if isinstance(source, np.ndarray) and source.ndim == 3 and source.shape[2] in (3, 4):
        source = torch.from_numpy(np.ascontiguousarray(source[..., :3])).permute(2, 0, 1)
    if isinstance(source, Tensor) and source.ndim >= 3 and source.shape[-3] in (3, 4):
        color = source.reshape(source.shape[-3:])[:3]
        channels = torch.cat([load_image(channel)[0] for channel in color])
        return Image.fromarray(_as_bytes(channels.permute(1, 2, 0)))
    return Image.fromarray(_as_bytes(load_image(source)[0, 0])).convert("RGB")


def _as_bytes(values: Tensor) -> np.ndarray:
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def load_alpha(path: str | os.PathLike) -> Tensor:
    """(H,W) bool, true where an image file is not fully transparent.

    Raises:
        DataError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as photo:
            alpha = np.asarray(photo.convert("RGBA").getchannel("A"))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an image ({error})") from error
    return torch.from_numpy(alpha.copy()) > 0


def _from_file(path: Path, max_pixels: int) -> Tensor:
    if not path.exists():
        raise FileNotFoundError(f"no image at {path}")
    if path.is_dir():
        raise DataError(f"{path} is a folder, not an image")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    try:
        # The limit here is checked before decoding; Pillow's only warns up to twice its value.
        with Image.open(path) as photo:
            width, height = photo.size
            if width * height > max_pixels:
                raise DataError(
                    f"{path}: {width} x {height} is over the limit of {max_pixels / 1e6:.0f} "
                    "million pixels; reduce the image first"
                )
            return _from_pil(photo)
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large ({error}); reduce the image first") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}); convert it or restore it from its source"
        ) from error


def _from_pil(photo: Image.Image) -> Tensor:
    mode = photo.mode
    if mode.startswith("I;16"):
        return _from_array(np.asarray(photo).astype(np.uint16))
    if mode == "I":  # 16-bit PNG in some versions of Pillow
        return _from_array(np.asarray(photo).clip(0, 65535).astype(np.uint16))
    if mode == "F":
        return _from_array(np.asarray(photo))
    if mode in ("1", "L", "LA", "La"):
        return _from_array(np.asarray(photo.convert("L")))
    return _from_array(np.asarray(photo.convert("RGB")))


def _from_array(array: np.ndarray) -> Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            "an image array must be (H,W), (H,W,1), (H,W,3) or (H,W,4), not empty; got "
            f"{array.shape}"
        )
    return _from_tensor(
        torch.from_numpy(np.require(_native(array), requirements=["C", "W"])).permute(2, 0, 1)
    )


def _native(array: np.ndarray) -> np.ndarray:
    """Array in native byte order; uint16 and uint32 as float32 in [0,1], other types unchanged."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype in (np.uint16, np.uint32):
        return (array / np.iinfo(array.dtype).max).astype(np.float32)
    if array.dtype == np.uint8 or array.dtype == np.bool_ or array.dtype.kind == "f":
        return array.astype(np.float32) if array.dtype.kind == "f" else array
    raise ValueError(
        f"an image must be uint8, uint16, uint32, bool or float in [0,1]; got {array.dtype}"
    )


def _from_tensor(tensor: Tensor) -> Tensor:
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim == 4 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4) or tensor.numel() == 0:
        raise ValueError(
            "an image tensor must be (H,W), (C,H,W) or (1,C,H,W), C in 1, 3, 4; got "
            f"{tuple(tensor.shape)}"
        )
    tensor = tensor[:3]
    if tensor.dtype in (torch.uint8, torch.uint16):
        tensor = tensor.to(torch.float32) / (255 if tensor.dtype == torch.uint8 else 65535)
    elif tensor.dtype == torch.bool:
        tensor = tensor.to(torch.float32)
    elif tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
        low, high = float(tensor.min()), float(tensor.max())
        if not (low >= -1e-4 and high <= 1 + 1e-4):  # also catches nan
            raise ValueError(
                f"a float image must lie in [0,1] without NaN; got values from {low:g} to {high:g}"
            )
        tensor = tensor.clamp(0, 1)
    else:
        raise ValueError(
            f"an image must be uint8, uint16, bool or float in [0,1]; got {tensor.dtype}"
        )
    return to_gray(tensor[None])
