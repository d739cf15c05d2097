"""Read images as gray arrays (H,W) float32 in [0,1]; without torch.

Values are scaled to [0,1] by the range of their type, not by their own maximum: unsigned integers
of b bits from 0 to 2^b - 1, signed ones from -2^(b-1) to 2^(b-1) - 1, and floats must already lie
in [0,1]. ``ReadOptions`` selects another range. Pixels are read as stored: EXIF orientation is
ignored, so keypoints are in pixels of the stored image, as in COLMAP, unless
``exif_orientation="apply"``. Transparent pixels, pixels without data (NaN, the nodata value of
GDAL) and, if named, a uniform surround are filled from their surroundings and excluded by the mask
of the ``GrayImage``.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .decode import (
    Raster,
    Strip,
    file_errors,
    open_raster,
    pillow_raster,
    select_bands,
    split_page,
)
from .errors import DataError
from .gray import OPENCV_LUMA, luma
from .masks import connected_to_border, exclude

logger = logging.getLogger(__name__)

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
class GrayImage:
    """An image that has been read.

    Attributes:
        pixels: (H,W) gray float32 in [0,1].
        mask: (H,W) bool, true where keypoints may lie; None = everywhere.
        narrow: whether the image fills under 2 % of the value range of its type.
        pages: number of pages or frames of the file.
        orientation: EXIF orientation of the file if it was not applied, else 1.
    """

    pixels: np.ndarray
    mask: np.ndarray | None = None
    narrow: bool = False
    pages: int = 1
    orientation: int = 1


class Read(Protocol):
    """What ``Notices`` need of an image that has been read."""

    @property
    def narrow(self) -> bool: ...
    @property
    def pages(self) -> int: ...
    @property
    def orientation(self) -> int: ...


@dataclass
class Notices:
    """What users should know about the images that were read, logged once for each kind."""

    total: int = 0
    narrow: list[str] = field(default_factory=list)
    paged: list[str] = field(default_factory=list)
    rotated: list[str] = field(default_factory=list)
    orientations: set[int] = field(default_factory=set)
    _logged: set[str] = field(default_factory=set)

    def add(self, source: object, reading: Read) -> None:
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

    def merge(self, others: Notices) -> None:
        """Add what another process noted."""
        self.total += others.total
        self.narrow += others.narrow
        self.paged += others.paged
        self.rotated += others.rotated
        self.orientations |= others.orientations

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
                "stored rotated (EXIF orientation) and read as stored; match, which extracts them, "
                "finds their rotations; else, except for COLMAP, use --exif-orientation apply",
            )

    def _log(self, level: int, names: list[str], text: str) -> None:
        if names and text not in self._logged:
            self._logged.add(text)
            logger.log(
                level, "%d of %d images, such as %s: %s", len(names), self.total, names[0], text
            )


def read_gray(
    source: str | os.PathLike | Image.Image | np.ndarray,
    options: ReadOptions | None = None,
    max_pixels: int = MAX_PIXELS,
    *,
    whole_levels: bool = False,
) -> GrayImage:
    """Read an image with its mask, from a path, PIL image or array (H,W), (H,W,1), (H,W,3) RGB or
    (H,W,4) of any numbers.

    Args:
        source: the image.
        options: how to read it.
        max_pixels: larger files raise an error.
        whole_levels: 8-bit color becomes whole gray levels, as OpenCV and so the published code
            converts it; up to half a level from the other gray values.

    Raises:
        FileNotFoundError: no file at the path.
        DataError: the file cannot be decoded, is empty, or has more than ``max_pixels``.
        ValueError: an array of another shape, type or range.
    """
    options = options or ReadOptions()
    bands = options.band_numbers
    if isinstance(source, str | os.PathLike):
        with file_errors(split_page(source)[0]):
            raster = open_raster(source, max_pixels, bands)
            return read_raster(raster, source, options, whole_levels)
    if isinstance(source, Image.Image):
        raster = select_bands(pillow_raster(source), "the image", bands)
        return read_raster(raster, "the image", options, whole_levels)
    if not isinstance(source, np.ndarray):
        raise ValueError(
            f"an image must be a path, PIL image or numpy array, got {type(source).__name__}"
        )
    raster = select_bands(_array_raster(source), "the array", bands)
    return read_raster(raster, "the array", options, whole_levels)


def read_raster(
    raster: Raster, name: object, options: ReadOptions, whole_levels: bool = False
) -> GrayImage:
    """Gray values and mask of a decoded image; arguments and errors as ``read_gray``."""
    if 0 in raster.size:
        raise ValueError("an image must not be empty")
    gray, invalid = _scaled(raster, name, options, whole_levels)
    narrow = options.value_range == "type" and _is_narrow(gray, invalid)
    mask = None if invalid is None else exclude(gray, invalid)
    orientation = raster.orientation
    if orientation != 1 and options.exif_orientation == "apply":
        gray = upright(gray, orientation)
        mask = None if mask is None else upright(mask, orientation)
        orientation = 1
    return GrayImage(gray, mask, narrow, raster.pages, orientation)


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate or mirror the last two dimensions of a stored image by its EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(-2, -1)
    flips = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}.get(orientation, ())
    return np.ascontiguousarray(np.flip(image, flips))


def strips(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(first row, end row) of strips of about ``STRIP_PIXELS``."""
    width, height = size
    rows = max(1, STRIP_PIXELS // width)
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


def _scaled(
    raster: Raster, name: object, options: ReadOptions, whole_levels: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Gray values (H,W) in [0,1], and (H,W) bool, true where there is no content, or None."""
    width, height = raster.size
    low, high = value_limits(raster, options)
    gray = np.empty((height, width), np.float32)
    # (H,W) bool, allocated when the first pixel needs it
    kinds: dict[str, np.ndarray] = {}
    least, most = math.inf, -math.inf
    for start, end in strips(raster.size):
        values, opaque = raster.strip(start, end)
        found = _without_content(values, opaque, raster, options)
        for kind, part in found.items():
            if part.any():
                whole = kinds.setdefault(kind, np.zeros((height, width), bool))
                whole[start:end] = part
        if whole_levels and values.dtype == np.uint8 and values.shape[2] == 3:
            values = ((values @ OPENCV_LUMA + (1 << 14)) >> 15)[..., None]
        unit = _gray(scale(raster, finite(values, low), low, high))
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


def finite(values: np.ndarray, low: float) -> np.ndarray:
    """Values with ``low`` for NaN and infinity."""
    if values.dtype.kind != "f":
        return values
    return np.where(np.isfinite(values), values, np.asarray(low, values.dtype))


def scale(raster: Raster, values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values (h,W,C) float32 with ``low`` mapped to 0 and ``high`` to 1."""
    exact = values.dtype.itemsize <= 2 and values.dtype.kind in "uib"
    numbers: np.ndarray = values.astype(np.float32 if exact else np.float64)
    if low:
        numbers = np.subtract(numbers, low, out=numbers)
    numbers = np.divide(numbers, high - low, out=numbers)
    if raster.inverted:
        numbers = 1 - numbers
    return numbers.astype(np.float32, copy=False)


def _gray(values: np.ndarray) -> np.ndarray:
    """Luma (h,W) of values (h,W,C), C = 1 or 3."""
    return values[..., 0] if values.shape[2] == 1 else luma(*np.moveaxis(values, 2, 0))


def value_limits(raster: Raster, options: ReadOptions) -> tuple[float, float]:
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
        sample.append(_gray(finite(values, 0).astype(np.float64))[valid])
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


def _array_raster(array: np.ndarray) -> Raster:
    """An array of any numbers as a raster."""
    array = checked_array(array)
    if array.dtype.kind not in "uifb":
        raise ValueError(f"an image must hold real numbers; got {array.dtype}")
    opaque = array[..., 3] > 0 if array.shape[2] == 4 else None
    low, high = 0.0, 1.0
    if array.dtype.kind in "ui":
        low, high = (float(v) for v in (np.iinfo(array.dtype).min, np.iinfo(array.dtype).max))

    def strip(start: int, end: int) -> Strip:
        values = array[start:end, :, :3]
        return values, None if opaque is None else opaque[start:end]

    return Raster((array.shape[1], array.shape[0]), strip, low=low, high=high)


def checked_array(array: np.ndarray) -> np.ndarray:
    """(H,W,C) of an image array."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            "an image array must be (H,W), (H,W,1), (H,W,3) or (H,W,4), not empty; got "
            f"{array.shape}"
        )
    return array
