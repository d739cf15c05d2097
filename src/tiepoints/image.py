"""Load images as gray tensors (1,1,H,W) float32 in [0,1].

Values are scaled to [0,1] by the range of their type, not by their own maximum: unsigned integers
of b bits from 0 to 2^b - 1, signed ones from -2^(b-1) to 2^(b-1) - 1, and floats must already lie
in [0,1]. ``ReadOptions`` selects another range. Pixels are read as stored: EXIF orientation is
ignored, so keypoints are in pixels of the stored image, as in COLMAP, unless
``exif_orientation="apply"``. Transparent pixels, pixels without data (NaN, the nodata value of
GDAL) and, if named, a uniform surround are filled from their surroundings and excluded by the mask
of the ``Reading``.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decode import (
    UPRIGHT,
    Raster,
    Strip,
    file_errors,
    open_raster,
    pillow_raster,
    select_bands,
    split_page,
)
from .errors import DataError
from .filters import to_gray
from .masks import connected_to_border, exclude

logger = logging.getLogger(__name__)

ImageLike: TypeAlias = str | os.PathLike | Image.Image | np.ndarray | Tensor

#: Images with more pixels than this raise a ``DataError``.
MAX_PIXELS = 300_000_000
#: Values of ``exif_orientation``.
EXIF_ORIENTATIONS = ("ignore", "apply")
#: Percentiles of the valid pixels that ``value_range="auto"`` maps to 0 and 1.
AUTO_PERCENTILES = (0.5, 99.5)
#: An image whose middle 98 % of pixels fill less of the range of their type than this is reported.
NARROW_RANGE = 0.02
#: Number of pixels of a strip, and of rows and columns of a sample for percentiles.
STRIP_PIXELS, SAMPLE_SIDE = 1 << 20, 512


@dataclass(frozen=True)
class ReadOptions:
    """How the pixels of an image are read.

    Attributes:
        value_range: the stored values that become 0 and 1: ``type``, the range of the type;
            ``auto``, the 0.5 and 99.5 percentiles of the valid pixels; or ``LO,HI``. Values outside
            are clipped.
        exif_orientation: ``ignore``: coordinates are those of the stored image; ``apply``: those of
            the image rotated upright.
        mask_alpha: no keypoints on or near transparent pixels; an image that is transparent
            everywhere is read as opaque.
        mask_value: no keypoints on or near a surround of this stored value (in all channels) that
            is connected to the border of the image; in JPEG files also of similar values.
        bands: the band to use as gray, or the three to use as RGB, counted from 1, such as ``4`` or
            ``4,3,2``; None = the colors that the file declares.

    Raises:
        ValueError: an option is invalid.
    """

    value_range: str = "type"
    exif_orientation: str = "ignore"
    mask_alpha: bool = True
    mask_value: float | None = None
    bands: str | None = None

    def __post_init__(self) -> None:
        _ = self.limits, self.band_numbers  # both raise for invalid text
        if self.exif_orientation not in EXIF_ORIENTATIONS:
            raise ValueError(
                f"exif_orientation must be one of {', '.join(EXIF_ORIENTATIONS)}; got "
                f"{self.exif_orientation!r}"
            )

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> ReadOptions:
        """The options of reading in the record of stored features."""
        names = {f.name for f in fields(ReadOptions)}
        return ReadOptions(**{key: value for key, value in record.items() if key in names})

    @property
    def limits(self) -> tuple[float, float] | None:
        """The two values of a ``value_range`` ``LO,HI``."""
        if self.value_range in ("type", "auto"):
            return None
        try:
            low, high = (float(part) for part in self.value_range.split(","))
        except ValueError:
            low = high = math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                "value_range must be auto, type or LO,HI with LO below HI, such as 29500,31000; "
                f"got {self.value_range!r}"
            )
        return low, high

    @property
    def band_numbers(self) -> tuple[int, ...] | None:
        """``bands`` as numbers."""
        if self.bands is None:
            return None
        parts = self.bands.split(",")
        if len(parts) not in (1, 3) or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
            raise ValueError(
                "bands must be one number, or three separated by commas, counted from 1; got "
                f"{self.bands!r}"
            )
        return tuple(int(part) for part in parts)


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


@dataclass
class Notices:
    """What users should know about the images that were read, logged once for each kind."""

    total: int = 0
    narrow: list[str] = field(default_factory=list)
    paged: list[str] = field(default_factory=list)
    rotated: list[str] = field(default_factory=list)
    orientations: set[int] = field(default_factory=set)
    _logged: set[str] = field(default_factory=set)

    def add(self, source: object, reading: Reading) -> None:
        """Note what was read from an image."""
        name = str(source) if isinstance(source, str | os.PathLike) else "an image in memory"
        self.total += 1
        self.orientations.add(reading.orientation)
        if reading.narrow:
            self.narrow.append(name)
        if reading.pages > 1:
            self.paged.append(name)
        if reading.orientation != 1:
            self.rotated.append(name)

    def log(self, *, pages: bool = True, rotations: bool = True) -> None:
        """Log the kinds that have not been logged before.

        Args:
            pages: whether to mention further pages.
            rotations: whether to mention different EXIF orientations.
        """
        self._log(
            logging.WARNING,
            self.narrow,
            f"the values fill under {NARROW_RANGE * 100:.0f} % of the range of their type, so few "
            "matches may be found; use --value-range auto",
        )
        if pages:
            self._log(
                logging.INFO,
                self.paged,
                "only the first of several pages or frames is used; use --pages all",
            )
        if rotations and len(self.orientations) > 1:
            self._log(
                logging.INFO,
                self.rotated,
                "stored rotated (EXIF orientation) and read as stored; match with --orientation "
                "auto, or use --exif-orientation apply",
            )

    def _log(self, level: int, names: list[str], text: str) -> None:
        if names and text not in self._logged:
            self._logged.add(text)
            logger.log(
                level, "%d of %d images, such as %s: %s", len(names), self.total, names[0], text
            )


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
    if isinstance(source, str | os.PathLike):
        with file_errors(split_page(source)[0]):
            raster = open_raster(source, max_pixels, options.band_numbers)
            return _read_raster(raster, source, options, whole_levels)
    bands = options.band_numbers
    if isinstance(source, Image.Image):
        raster = select_bands(pillow_raster(source), "the image", bands)
        return _read_raster(raster, "the image", options, whole_levels)
    plain = options.value_range == "type" and options.mask_value is None and bands is None
    if isinstance(source, np.ndarray) and (whole_levels or not plain):
        raster = select_bands(_array_raster(source), "the array", bands)
        return _read_raster(raster, "the array", options, whole_levels)
    pixels = load_image(source)
    opaque = _opaque(source) if options.mask_alpha else None
    if opaque is None or opaque.all() or not opaque.any():
        return Reading(pixels)
    gray = pixels[0, 0].cpu().numpy().copy()
    return Reading(_as_tensor(gray), torch.from_numpy(exclude(gray, ~opaque)))


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
        return _read_raster(raster, path, ReadOptions(mask_alpha=False)).pixels[0, 0] != 0


def read_rgb(source: str | os.PathLike, options: ReadOptions | None = None) -> Tensor:
    """(1,3,H,W) float32 in [0,1] of an image file for visualization and for networks on colors,
    without masks; errors as ``load_image``.
    """
    options = options or ReadOptions()
    with file_errors(split_page(source)[0]):
        raster = open_raster(source, MAX_PIXELS, options.band_numbers)
        low, high = _limits(raster, options)
        width, height = raster.size
        rgb = torch.empty(1, 3, height, width)
        for start, end in _strips(raster.size):
            values = _finite(raster.strip(start, end)[0], low)
            rgb[:, :, start:end] = _unit(raster, values, low, high)  # gray is repeated
    rgb.clamp_(0, 1)
    applied = options.exif_orientation == "apply"
    return _upright(rgb, raster.orientation) if applied else rgb


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


# ---- from stored values to gray


def _read_raster(
    raster: Raster, name: object, options: ReadOptions, whole_levels: bool = False
) -> Reading:
    if 0 in raster.size:
        raise ValueError("an image must not be empty")
    gray, invalid = _scaled(raster, name, options, whole_levels)
    narrow = options.value_range == "type" and _is_narrow(gray, invalid)
    mask = None if invalid is None else torch.from_numpy(exclude(gray, invalid))
    pixels, orientation = _as_tensor(gray), raster.orientation
    if orientation != 1 and options.exif_orientation == "apply":
        pixels = _upright(pixels, orientation)
        mask = None if mask is None else _upright(mask, orientation)
        orientation = 1
    return Reading(pixels, mask, narrow, raster.pages, orientation)


def _as_tensor(gray: np.ndarray) -> Tensor:
    return torch.from_numpy(gray)[None, None]


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(first row, end row) of strips of about ``STRIP_PIXELS``."""
    width, height = size
    rows = max(1, STRIP_PIXELS // width)
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


#: Luma weights of OpenCV's conversion to gray in units of 2^-15 (``filters.LUMA``).
_OPENCV_LUMA = np.array((9798, 19235, 3735), np.int32)


def _scaled(
    raster: Raster, name: object, options: ReadOptions, whole_levels: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Gray values (H,W) in [0,1], and (H,W) bool, true where there is no content, or None."""
    width, height = raster.size
    low, high = _limits(raster, options)
    gray = np.empty((height, width), np.float32)
    # (H,W) bool, allocated when the first pixel needs it
    kinds: dict[str, np.ndarray] = {}
    least, most = math.inf, -math.inf
    for start, end in _strips(raster.size):
        values, opaque = raster.strip(start, end)
        found = _without_content(values, opaque, raster, options)
        for kind, part in found.items():
            if part.any():
                whole = kinds.setdefault(kind, np.zeros((height, width), bool))
                whole[start:end] = part
        if whole_levels and values.dtype == np.uint8 and values.shape[2] == 3:
            values = ((values @ _OPENCV_LUMA + (1 << 14)) >> 15)[..., None]
        unit = to_gray(_unit(raster, _finite(values, low), low, high))[0, 0].numpy()
        missing = found.get("nodata")
        valid = unit if missing is None else unit[~missing]
        least, most = min(least, valid.min(initial=least)), max(most, valid.max(initial=most))
        np.clip(unit, 0, 1, out=gray[start:end])
    is_float = (raster.low, raster.high) == (0.0, 1.0)
    if options.value_range == "type" and is_float and (least < -1e-4 or most > 1 + 1e-4):
        raise DataError(
            f"{name} holds float values from {least:g} to {most:g}, and not in [0, 1]; use "
            "--value-range auto, or LO,HI"
        )
    return gray, _combined(kinds)


def _without_content(
    values: np.ndarray, opaque: np.ndarray | None, raster: Raster, options: ReadOptions
) -> dict[str, np.ndarray]:
    """Kind -> pixels (h,W) bool of a strip: ``nodata``, ``transparent``, and ``surround``, pixels
    of ``mask_value`` wherever they are.
    """
    found = {}
    if values.dtype.kind == "f":
        found["nodata"] = ~np.isfinite(values).all(axis=2)
    if raster.nodata is not None and math.isfinite(raster.nodata):
        value = np.float64(raster.nodata)
        if values.dtype.kind == "f":
            value = value.astype(values.dtype)  # the text may have more digits than the type
        found["nodata"] = (values == value).all(axis=2) | found.get("nodata", False)
    if opaque is not None and options.mask_alpha:
        found["transparent"] = ~opaque
    if options.mask_value is not None:
        distance = np.abs(values.astype(np.float64) - options.mask_value)
        found["surround"] = (distance <= raster.tolerance).all(axis=2)
    return found


def _combined(kinds: dict[str, np.ndarray]) -> np.ndarray | None:
    """Pixels without content of a whole image, or None."""
    if "transparent" in kinds and kinds["transparent"].all():
        del kinds["transparent"]
    if "surround" in kinds:
        kinds["surround"] = connected_to_border(kinds["surround"])
    result = None
    for mask in kinds.values():
        if mask.any():
            result = mask if result is None else result | mask
    return result


def _finite(values: np.ndarray, low: float) -> np.ndarray:
    if values.dtype.kind != "f":
        return values
    return np.where(np.isfinite(values), values, np.asarray(low, values.dtype))


def _unit(raster: Raster, values: np.ndarray, low: float, high: float) -> Tensor:
    """Values (h,W,C) with ``low`` mapped to 0 and ``high`` to 1: (1,C,h,W) float32."""
    exact = values.dtype.itemsize <= 2 and values.dtype.kind in "uib"
    numbers: np.ndarray = values.astype(np.float32 if exact else np.float64)
    if low:
        numbers = np.subtract(numbers, low, out=numbers)
    numbers = np.divide(numbers, high - low, out=numbers)
    if raster.inverted:
        numbers = 1 - numbers
    return torch.from_numpy(numbers.astype(np.float32, copy=False)).permute(2, 0, 1)[None]


def _limits(raster: Raster, options: ReadOptions) -> tuple[float, float]:
    """The stored values that become 0 and 1."""
    if options.value_range == "type":
        return raster.low, raster.high
    return options.limits or _percentiles(raster, options)


def _percentiles(raster: Raster, options: ReadOptions) -> tuple[float, float]:
    """``AUTO_PERCENTILES`` of the gray values of a sample of the pixels with content."""
    width, height = raster.size
    sample = []
    for row in range(0, height, max(1, height // SAMPLE_SIDE)):
        values, opaque = raster.strip(row, row + 1)
        step = max(1, width // SAMPLE_SIDE)
        values, opaque = values[:, ::step], None if opaque is None else opaque[:, ::step]
        valid = np.ones(values.shape[:2], bool)
        for part in _without_content(values, opaque, raster, options).values():
            valid &= ~part
        color = torch.from_numpy(_finite(values, 0).astype(np.float64)).permute(2, 0, 1)
        sample.append(to_gray(color[None])[0, 0].numpy()[valid])
    numbers = np.concatenate(sample)
    if not len(numbers):
        return raster.low, raster.high
    low, high = (float(value) for value in np.percentile(numbers, AUTO_PERCENTILES))
    return low, high if high > low else low + 1


def _is_narrow(gray: np.ndarray, invalid: np.ndarray | None) -> bool:
    """Whether the valid pixels fill a small part of [0,1]; a constant image does not count."""
    step = tuple(slice(None, None, max(1, side // (SAMPLE_SIDE // 2))) for side in gray.shape)
    sample = gray[step] if invalid is None else gray[step][~invalid[step]]
    if not sample.size:
        return False
    low, high = np.percentile(sample, (1, 99))
    return bool(0 < high - low < NARROW_RANGE)


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Rotate or mirror the last two dimensions of a stored image by its EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(-2, -1)
    flips = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}.get(orientation, ())
    return image.flip(flips).contiguous()


def _opaque(source: ImageLike) -> np.ndarray | None:
    """(H,W) bool of an array (H,W,4) or tensor (4,H,W), true where it is not transparent."""
    if isinstance(source, Tensor) and source.ndim >= 3 and source.shape[-3] == 4:
        return (source.reshape(source.shape[-3:])[3] > 0).cpu().numpy()
    if isinstance(source, np.ndarray) and source.ndim == 3 and source.shape[2] == 4:
        return source[..., 3] > 0
    return None


def _array_raster(array: np.ndarray) -> Raster:
    """An array of any numbers as a raster."""
    array = _checked(array)
    if array.dtype.kind not in "uifb":
        raise ValueError(f"an image must hold real numbers; got {array.dtype}")
    opaque = _opaque(array)
    low, high = 0.0, 1.0
    if array.dtype.kind in "ui":
        low, high = (float(v) for v in (np.iinfo(array.dtype).min, np.iinfo(array.dtype).max))

    def strip(start: int, end: int) -> Strip:
        values = array[start:end, :, :3]
        return values, None if opaque is None else opaque[start:end]

    return Raster((array.shape[1], array.shape[0]), strip, low=low, high=high)


def _checked(array: np.ndarray) -> np.ndarray:
    """(H,W,C) of an image array."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            "an image array must be (H,W), (H,W,1), (H,W,3) or (H,W,4), not empty; got "
            f"{array.shape}"
        )
    return array


def _from_array(array: np.ndarray) -> Tensor:
    array = _native(_checked(array))
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
