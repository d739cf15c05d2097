"""Load images as gray tensors (1,1,H,W) float32 in [0,1].

Files, PIL images and arrays are read by ``reading``; tensors are converted here. Transparent pixels
and pixels without data are filled from their surroundings and excluded by the mask of the
``Reading``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decode import UPRIGHT, file_errors, open_raster, split_page
from .filters import to_gray
from .masks import exclude
from .reading import (
    MAX_PIXELS,
    GrayImage,
    Notices,
    ReadOptions,
    checked_array,
    finite,
    read_gray,
    read_raster,
    scale,
    strips,
    upright,
    value_limits,
)

__all__ = [
    "MAX_PIXELS",
    "ImageLike",
    "Notices",
    "ReadOptions",
    "Reading",
    "load_image",
    "read_image",
    "read_mask",
    "read_rgb",
    "to_rgb",
]

ImageLike: TypeAlias = str | os.PathLike | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Reading:
    """An image that has been read.

    Attributes:
        pixels: (1,1,H,W) gray float32 in [0,1].
        mask: (H,W) bool, true where keypoints may lie; None = everywhere.
        narrow: whether the image fills under 2 % of the value range of its type.
        pages: number of pages or frames of the file.
        orientation: EXIF orientation of the file if it was not applied, else 1.
    """

    pixels: Tensor
    mask: Tensor | None = None
    narrow: bool = False
    pages: int = 1
    orientation: int = 1


def read_image(
    source: ImageLike,
    options: ReadOptions | None = None,
    max_pixels: int = MAX_PIXELS,
    *,
    whole_levels: bool = False,
) -> Reading:
    """Read an image with its mask, from a path, PIL image, array or tensor.

    Arrays and tensors have the shapes of ``load_image``. Tensors have been read already: of the
    options, only ``mask_alpha`` applies to them.

    Args:
        source: the image.
        options: how to read it.
        max_pixels: larger files raise an error.
        whole_levels: 8-bit color becomes whole gray levels, as OpenCV and so the published code
            converts it; up to half a level from the other gray values.

    Raises:
        FileNotFoundError, DataError, ValueError: as ``load_image``.
    """
    options = options or ReadOptions()
    plain = options.value_range == "type" and options.mask_value is None and options.bands is None
    array = isinstance(source, np.ndarray) and (whole_levels or not plain)
    if array or isinstance(source, str | os.PathLike | Image.Image):
        return _reading(read_gray(source, options, max_pixels, whole_levels=whole_levels))  # type: ignore[arg-type]
    pixels = load_image(source)
    opaque = _opaque(source) if options.mask_alpha else None
    if opaque is None or opaque.all() or not opaque.any():
        return Reading(pixels)
    gray = pixels[0, 0].cpu().numpy().copy()
    mask = exclude(gray, ~opaque)
    return _reading(GrayImage(gray, mask))


def _reading(found: GrayImage) -> Reading:
    mask = None if found.mask is None else torch.from_numpy(found.mask)
    pixels = torch.from_numpy(found.pixels)[None, None]
    return Reading(pixels, mask, found.narrow, found.pages, found.orientation)


def load_image(source: ImageLike, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Load a gray image (1,1,H,W) float32 in [0,1] from a path, PIL image, array or tensor.

    Arrays are (H,W), (H,W,1), (H,W,3) RGB or (H,W,4); tensors (H,W), (C,H,W) or (1,C,H,W) with C =
    1, 3 or 4. Alpha is dropped. Unsigned integers are divided by the largest value of their type,
    bool becomes 0 and 1, floats must lie in [0,1]. ``read_image`` has options and masks.

    Raises:
        FileNotFoundError: no file at the path.
        DataError: the file cannot be decoded, is empty, or has more than ``max_pixels``.
        ValueError: an array or tensor of another shape, type or range.
    """
    if isinstance(source, str | os.PathLike | Image.Image):
        return read_image(source, ReadOptions(mask_alpha=False), max_pixels).pixels
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Tensor):
        return _from_tensor(source)
    raise ValueError(
        "an image must be a path, PIL image, numpy array or torch tensor, got "
        f"{type(source).__name__}"
    )


def read_mask(path: str | os.PathLike) -> Tensor:
    """A mask (H,W) bool from an image file, true where it is not black; errors as ``load_image``.

    Programs mark the black of masks as pixels without data, which therefore are not filled.
    """
    with file_errors(split_page(path)[0]):
        raster = replace(open_raster(path, MAX_PIXELS), nodata=None)
        return torch.from_numpy(
            read_raster(raster, path, ReadOptions(mask_alpha=False)).pixels != 0
        )


def read_rgb(source: str | os.PathLike, options: ReadOptions | None = None) -> Tensor:
    """(1,3,H,W) float32 in [0,1] of an image file for visualization and for networks on colors,
    without masks; errors as ``load_image``.
    """
    options = options or ReadOptions()
    with file_errors(split_page(source)[0]):
        raster = open_raster(source, MAX_PIXELS, options.band_numbers)
        low, high = value_limits(raster, options)
        width, height = raster.size
        rgb = torch.empty(1, 3, height, width)
        for start, end in strips(raster.size):
            values = finite(raster.strip(start, end)[0], low)
            unit = torch.from_numpy(scale(raster, values, low, high))
            rgb[:, :, start:end] = unit.permute(2, 0, 1)  # gray is repeated
    rgb.clamp_(0, 1)
    applied = options.exif_orientation == "apply"
    return torch.from_numpy(upright(rgb.numpy(), raster.orientation)) if applied else rgb


def to_rgb(source: ImageLike, options: ReadOptions | None = None) -> Image.Image:
    """RGB image of any source for visualization; arguments and errors as ``read_image``."""
    if isinstance(source, str | os.PathLike):
        return _picture(source, options or ReadOptions())
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


def _picture(path: str | os.PathLike, options: ReadOptions) -> Image.Image:
    """RGB image of a file; 8-bit values are copied."""
    with file_errors(split_page(path)[0]):
        raster = open_raster(path, MAX_PIXELS, options.band_numbers)
        if (raster.low, raster.high, raster.inverted) == (0, 255, False) and (
            options.value_range == "type"
        ):
            values = raster.strip(0, raster.size[1])[0]
            if values.dtype == np.uint8:
                picture = Image.fromarray(values if values.shape[2] == 3 else values[..., 0])
                if raster.orientation != 1 and options.exif_orientation == "apply":
                    picture = picture.transpose(UPRIGHT[raster.orientation])
                return picture.convert("RGB")
    return Image.fromarray(_as_bytes(read_rgb(path, options)[0].permute(1, 2, 0)))


# ---- from arrays and tensors to gray


def _opaque(source: ImageLike) -> np.ndarray | None:
    """(H,W) bool of an array (H,W,4) or tensor (4,H,W), true where it is not transparent."""
    if isinstance(source, Tensor) and source.ndim >= 3 and source.shape[-3] == 4:
        return (source.reshape(source.shape[-3:])[3] > 0).cpu().numpy()
    if isinstance(source, np.ndarray) and source.ndim == 3 and source.shape[2] == 4:
        return source[..., 3] > 0
    return None


def _from_array(array: np.ndarray) -> Tensor:
    array = _native(checked_array(array))
    return _from_tensor(
        torch.from_numpy(np.require(array, requirements=["C", "W"])).permute(2, 0, 1)
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
