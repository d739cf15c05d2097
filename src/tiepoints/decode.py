"""Decode image files to their stored values, in strips of rows.

Pillow decodes what it decodes right. It cuts 16-bit color to 8 bits, and misreads or refuses many
kinds of TIFF (signed, inverted, several bands, planar, half, double), which tifffile reads (extra
``tiff``). ``open_raster`` selects the decoder by the header of the file. ``NAME#2`` is page 2 of
the file ``NAME``.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import PREFIXES, ImageFileDirectory_v2

from .errors import DataError
from .files import require

#: Values of a strip (h,W,C) as stored, C = 1 or 3, and (h,W) bool, true where it is not
#: transparent, or None.
Strip = tuple[np.ndarray, np.ndarray | None]

#: Formats that Pillow opens but that are no photographs, or that it does not read as stored.
REFUSED_FORMATS = frozenset(("BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "PSD", "WMF"))
#: Formats that store previews of the same photograph as further pages.
PREVIEW_FORMATS = frozenset(("MPO",))
#: EXIF orientation -> what Pillow applies to the stored image to make it upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Difference in counts from ``mask_value`` that lossy compression causes, and the formats.
LOSSY_TOLERANCE = 4.0
LOSSY_FORMATS = frozenset(("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"))
#: Largest number of pages that are looked for in a file.
MAX_PAGES = 10_000

# TIFF tags
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_ORIENTATION, _SAMPLES, _PLANAR, _COLORMAP, _EXTRA, _FORMAT = 274, 277, 284, 320, 338, 339
_DEPTH, _NODATA = 32997, 42113
_BIG_ENDIAN_BIG = 0  # no tag: whether the file is a big-endian BigTIFF
_TAGS = (
    *(_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC),
    *(_ORIENTATION, _SAMPLES, _PLANAR, _COLORMAP, _EXTRA, _FORMAT, _DEPTH, _NODATA),
)
#: Compressions that Pillow decodes: none, CCITT, LZW, JPEG, deflate, PackBits, LZMA, ZSTD.
_PILLOW_COMPRESSIONS = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000))
#: Photometric interpretation -> number of color samples.
_COLOR_SAMPLES = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}
_REFUSED_COLORS = {
    4: "a transparency mask",
    6: "YCbCr without JPEG compression",
    8: "CIE L*a*b*",
    9: "ICC L*a*b*",
    10: "ITU L*a*b*",
    32803: "raw data of a color filter array",
    32844: "LogL",
    32845: "LogLuv",
    34892: "linear raw data",
}


@dataclass(frozen=True)
class Raster:
    """A decoded image.

    Attributes:
        size: (width, height).
        strip: (first row, end row) -> the values of these rows, see ``Strip``.
        low, high: value range of the stored type; 0 and 1 for floats.
        inverted: whether the smallest value is white.
        nodata: value of pixels without data, of all channels.
        tolerance: largest difference of pixels of one value, caused by the compression.
        orientation: EXIF orientation, 1 to 8; not applied.
        pages: number of pages or frames of the file, of which this is one.
    """

    size: tuple[int, int]
    strip: Callable[[int, int], Strip]
    low: float = 0.0
    high: float = 255.0
    inverted: bool = False
    nodata: float | None = None
    tolerance: float = 0.0
    orientation: int = 1
    pages: int = 1


def split_page(path: str | os.PathLike) -> tuple[Path, int]:
    """The file and the page, from 1, of ``NAME`` or ``NAME#PAGE``."""
    path = Path(path)
    numbered = re.fullmatch(r"(.+)#([1-9]\d{0,4})", path.name)
    if numbered is None or path.exists():
        return path, 1
    return path.with_name(numbered[1]), int(numbered[2])


def open_raster(
    path: str | os.PathLike,
    max_pixels: int | None = None,
    bands: tuple[int, ...] | None = None,
) -> Raster:
    """Decode a file; some decode only when a strip is read, so use strips in ``file_errors``.

    Args:
        path: the file, or ``NAME#2`` for another page than the first.
        max_pixels: larger images raise an error before they are decoded.
        bands: use these bands, counted from 1, as gray (one) or as RGB (three).

    Raises:
        FileNotFoundError: no file at the path.
        DataError: the file cannot be decoded, whatever its decoder raised.
    """
    file, page = split_page(path)
    with file_errors(file):
        if (tiff := _tiff_pages(file)) is not None:
            return _open_tiff(file, tiff, page, max_pixels, bands)
        if (netpbm := _open_netpbm(file, max_pixels)) is not None:
            return select_bands(netpbm, file, bands)
        return select_bands(_open_pillow(file, page, max_pixels), file, bands)


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) of an image file as stored, from its header only; errors as
    ``open_raster``.
    """
    file, page = split_page(path)
    with file_errors(file):
        if (tiff := _tiff_pages(file)) is not None:
            return _tiff_size(_tiff_page(file, tiff, page)[1])
        with no_pixel_limit(), Image.open(file) as photo:
            return photo.size


def page_count(path: str | os.PathLike) -> int:
    """Number of pages or frames of an image file, previews and masks not included; errors
    as ``open_raster``.
    """
    file = split_page(path)[0]
    with file_errors(file):
        if (tiff := _tiff_pages(file)) is not None:
            return len(tiff)
        with no_pixel_limit(), Image.open(file) as photo:
            return _count_pages(photo)


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into a ``DataError`` that names the file."""
    if not path.exists():
        raise FileNotFoundError(f"no image at {path}")
    if path.is_dir():
        raise DataError(f"{path} is a folder, not an image")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(str(error)) from error
    except MemoryError as error:
        raise DataError(f"{path} needs more memory than there is; reduce the image") from error
    # Decoders raise errors of many types for damaged files, some of them undocumented.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} cannot be read as an image ({reason}); convert it or restore it from its "
            "source"
        ) from error


_limit_lock = threading.Lock()
_limit: dict[str, Any] = {"users": 0, "value": None}


@contextmanager
def no_pixel_limit() -> Iterator[None]:
    """Context manager without Pillow's own limit of pixels, a global variable: it warns for 90
    million pixels and refuses 180 million. Threads may overlap; the last one restores it.
    """
    with _limit_lock:
        if _limit["users"] == 0:
            _limit["value"], Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _limit["users"] += 1
    try:
        yield
    finally:
        with _limit_lock:
            _limit["users"] -= 1
            if _limit["users"] == 0:
                Image.MAX_IMAGE_PIXELS = _limit["value"]


def _check_size(path: Path, size: tuple[int, int], max_pixels: int | None) -> None:
    if 0 in size:
        raise DataError(f"{path} has no pixels")
    if max_pixels is not None and size[0] * size[1] > max_pixels:
        raise DataError(
            f"{path}: {size[0]} x {size[1]} is over the limit of {max_pixels / 1e6:.0f} million "
            "pixels; reduce the image first"
        )


def select_bands(raster: Raster, path: object, bands: tuple[int, ...] | None) -> Raster:
    """The raster with only ``bands`` of its channels."""
    if bands is None:
        return raster
    count = raster.strip(0, 1)[0].shape[2]
    index = _band_index(path, bands, count)

    def strip(start: int, end: int) -> Strip:
        values, opaque = raster.strip(start, end)
        return values[..., index], opaque

    return replace(raster, strip=strip)


def _band_index(path: object, bands: tuple[int, ...], count: int) -> list[int]:
    if max(bands) > count:
        raise DataError(f"{path} has {count} bands, so there is no band {max(bands)} (--bands)")
    return [band - 1 for band in bands]


# ---- Pillow


def _open_pillow(path: Path, page: int, max_pixels: int | None) -> Raster:
    with no_pixel_limit(), Image.open(path) as photo:
        _check_size(path, photo.size, max_pixels)
        if photo.format in REFUSED_FORMATS:
            raise DataError(f"{path} is a {photo.format} file; convert it to PNG or TIFF")
        pages = _count_pages(photo)
        if page > pages:
            raise DataError(f"{path} has {pages} pages, so there is no page {page}")
        if page > 1:
            photo.seek(page - 1)
        raster = _open_deep_png(path, photo) or pillow_raster(photo)
        raster.strip(0, 1)  # decodes
        orientation = photo.getexif().get(_ORIENTATION, 1)
        return replace(
            raster,
            orientation=orientation if orientation in UPRIGHT else 1,
            pages=pages,
            tolerance=LOSSY_TOLERANCE if photo.format in LOSSY_FORMATS else 0.0,
        )


def _count_pages(photo: Any) -> int:
    """Number of pages or frames of an open image, previews not included."""
    return 1 if photo.format in PREVIEW_FORMATS else min(getattr(photo, "n_frames", 1), MAX_PAGES)


def pillow_raster(photo: Image.Image) -> Raster:
    """A PIL image as a raster; an image that is not loaded is decoded by the first strip."""
    mode, (width, height) = photo.mode, photo.size
    transparency = photo.info.get("transparency")
    deep = mode.startswith("I") or mode == "F"
    if mode in ("LAB", "HSV"):
        raise DataError(f"{getattr(photo, 'filename', 'the image')}: {mode} colors; convert to RGB")

    def strip(start: int, end: int) -> Strip:
        whole = start == 0 and end == height
        part = photo if whole else photo.crop((0, start, width, end))
        if deep:
            values = np.asarray(part)
            if mode != "F":  # 16-bit PNG and PGM are mode I in some versions of Pillow
                values = values.clip(0, 65535).astype(np.uint16)
            keyed = isinstance(transparency, int)
            return values[..., None], values != transparency if keyed else None
        opaque = None
        if part.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
            opaque = np.asarray(part.getchannel(part.mode[-1])) > 0
        elif transparency is not None:
            opaque = np.asarray(part.convert("RGBA").getchannel("A")) > 0
        if mode in ("1", "L", "LA", "La"):
            return np.asarray(part.convert("L"))[..., None], opaque
        return np.asarray(part.convert("RGB")), opaque

    high = {"F": 1.0, "I": 65535.0}.get(mode[0], 255.0)
    return Raster((width, height), strip, high=high)


def _open_deep_png(path: Path, photo: Any) -> Raster | None:
    """16-bit PNG with color or alpha; None for other images.

    Pillow returns the high byte of each sample. Decoded as if the other byte order were stored, it
    returns the low byte; the 4 bytes of gray and alpha pass as one RGBA pixel.
    """
    raw = photo.tile[0][3] if photo.format == "PNG" and getattr(photo, "tile", None) else None
    if raw not in ("RGB;16B", "RGBA;16B", "LA;16B"):
        return None
    key = photo.info.get("transparency")
    if raw == "LA;16B":
        photo.tile = [(*tile[:3], "RGBA") for tile in photo.tile]
        parts = [photo]
    else:
        low = Image.open(path)
        low.tile = [(*tile[:3], raw[:-1] + "L") for tile in low.tile]  # type: ignore[misc]
        low.load()
        parts = [photo, low]
    width, height = photo.size

    def strip(start: int, end: int) -> Strip:
        box = (0, start, width, end)
        high_bytes, *rest = (np.asarray(part.crop(box)).astype(np.uint16) for part in parts)
        if not rest:
            values = high_bytes[..., 0::2] * 256 + high_bytes[..., 1::2]
            return values[..., :1], values[..., 1] > 0
        values = high_bytes * 256 + rest[0]
        if values.shape[2] == 4:
            return values[..., :3], values[..., 3] > 0
        return values, None if key is None else (values != np.array(key)).any(axis=2)

    return Raster((width, height), strip, high=65535.0)


# ---- binary PGM and PPM of more, or fewer, than 8 bits


def _open_netpbm(path: Path, max_pixels: int | None) -> Raster | None:
    """Binary PGM or PPM whose largest value is not 255, which Pillow rescales; None for other
    files.
    """
    with path.open("rb") as file:
        head = file.read(1024)
    space = rb"(?:\s|#[^\n]*\n)+"
    header = re.match(
        rb"P([56])" + space + rb"(\d+)" + space + rb"(\d+)" + space + rb"(\d+)\s", head
    )
    if header is None or int(header[4]) in (0, 255) or int(header[4]) > 65535:
        return None
    channels = 1 if header[1] == b"5" else 3
    width, height, top = (int(header[i]) for i in (2, 3, 4))
    _check_size(path, (width, height), max_pixels)
    values = np.memmap(
        path,
        dtype=">u2" if top > 255 else "u1",
        mode="r",
        offset=header.end(),
        shape=(height, width, channels),
    )
    return Raster((width, height), lambda start, end: (values[start:end], None), high=float(top))


# ---- TIFF


def _tiff_pages(path: Path) -> list[tuple[int, dict[int, Any]]] | None:
    """(index of the directory, tags) of each page of a TIFF; None for other files.

    Directories of previews and of masks are no pages, unless there are no others.
    """
    found: list[tuple[int, dict[int, Any]]] = []
    with path.open("rb") as file:
        header = file.read(8)
        if not header.startswith(tuple(PREFIXES)):
            return None
        big_endian_big = header.startswith(b"MM\0+")
        directory = _directory(header + file.read(8) if 43 in header[2:4] else header)
        seen: set[int] = set()
        while (offset := directory.next) and offset not in seen and len(seen) < MAX_PAGES:
            seen.add(offset)
            file.seek(offset)
            try:
                directory.load(file)
                tags = {tag: directory[tag] for tag in _TAGS if tag in directory}
                tags[_BIG_ENDIAN_BIG] = big_endian_big
            # a damaged directory ends the list, unless it is the first
            except Exception:
                if not found:
                    raise
                break
            found.append((len(seen) - 1, tags))
    full = [page for page in found if not _number(page[1], _SUBFILE, 0) & 0b101]
    return full or found[:1]


def _directory(header: bytes) -> ImageFileDirectory_v2:
    """Reader of the directories of a TIFF with this header of 8, or in a BigTIFF 16 bytes."""
    if not header.startswith(b"MM\0+"):
        return ImageFileDirectory_v2(header)
    # Pillow takes the header of a big-endian BigTIFF for that of a classic one
    directory = ImageFileDirectory_v2(b"MM\0*" + bytes(4))
    directory._bigtiff = True
    directory.next = int.from_bytes(header[8:], "big")
    return directory


def _number(tags: dict[int, Any], tag: int, default: int) -> int:
    value = tags.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _numbers(tags: dict[int, Any], tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
    value = tags.get(tag, default)
    return tuple(int(v) for v in value) if isinstance(value, tuple) else (int(value),)


def _tiff_page(
    path: Path, pages: list[tuple[int, dict[int, Any]]], page: int
) -> tuple[int, dict[int, Any]]:
    if not pages:
        raise DataError(f"{path} contains no image")
    if page > len(pages):
        raise DataError(f"{path} has {len(pages)} pages, so there is no page {page}")
    return pages[page - 1]


def _tiff_size(tags: dict[int, Any]) -> tuple[int, int]:
    return _number(tags, _WIDTH, 0), _number(tags, _HEIGHT, 0)


def _open_tiff(
    path: Path,
    pages: list[tuple[int, dict[int, Any]]],
    page: int,
    max_pixels: int | None,
    bands: tuple[int, ...] | None,
) -> Raster:
    index, tags = _tiff_page(path, pages, page)
    _check_size(path, _tiff_size(tags), max_pixels)
    if bands is None and _pillow_reads(tags):
        raster = _open_pillow_tiff(path, index, tags)
    else:
        raster = _open_tifffile(path, index, tags, bands)
    orientation = _number(tags, _ORIENTATION, 1)
    return replace(
        raster,
        nodata=None if _number(tags, _PHOTOMETRIC, 1) == 3 else _nodata(tags),
        orientation=orientation if orientation in UPRIGHT else 1,
        pages=len(pages),
        tolerance=LOSSY_TOLERANCE if _number(tags, _COMPRESSION, 1) in (6, 7) else 0.0,
    )


def _nodata(tags: dict[int, Any]) -> float | None:
    """The value that GDAL writes for pixels without data."""
    try:
        return float(str(tags[_NODATA]).strip(" \0"))
    except (KeyError, ValueError):
        return None


def _pillow_reads(tags: dict[int, Any]) -> bool:
    """Whether Pillow decodes a page of a TIFF to the stored values."""
    bits = set(_numbers(tags, _BITS, (1,)))
    samples = _number(tags, _SAMPLES, 1)
    photometric = _number(tags, _PHOTOMETRIC, 1)
    extra = _numbers(tags, _EXTRA, ())
    formats = set(_numbers(tags, _FORMAT, (1,)))
    if tags.get(_BIG_ENDIAN_BIG) or _number(tags, _DEPTH, 1) != 1:
        return False
    if _number(tags, _COMPRESSION, 1) not in _PILLOW_COMPRESSIONS:
        return False
    if formats == {3}:
        return bits == {32} and (samples, photometric) == (1, 1)
    if formats - {1, 4}:
        return False
    if photometric == 3 and max(_numbers(tags, _COLORMAP, (0,))) < 256:
        return False  # colors of 8 bits, against the standard
    if bits in ({12}, {16}):
        return (samples, photometric) == (1, 1)
    if bits != {8}:
        return bits <= {1, 2, 4} and samples == 1 and photometric in (0, 1, 3)
    if samples > 1 and _number(tags, _PLANAR, 1) == 2:
        return False
    if photometric in (0, 1):
        return samples == 1 or (photometric == 1 and samples == 2 and extra[:1] in ((1,), (2,)))
    return samples in {2: (3, 4), 3: (1,), 5: (4,), 6: (1, 3)}.get(photometric, ())


def _open_pillow_tiff(path: Path, index: int, tags: dict[int, Any]) -> Raster:
    # from a path, Pillow maps uncompressed pixels and confuses their rows if the image is rotated
    with path.open("rb") as file, no_pixel_limit(), Image.open(file) as opened:
        photo: Image.Image = opened
        if index:
            photo.seek(index)
        photo.load()
        orientation = _number(tags, _ORIENTATION, 1)
        if orientation in UPRIGHT:
            photo = photo.transpose(_inverse(orientation))  # Pillow has made a TIFF upright
        if photo.size != _tiff_size(tags):
            raise DataError(f"{path}: the decoded image has {photo.size} pixels")
        raster = pillow_raster(photo)
        bits = _number(tags, _BITS, 1)
        if bits < 8 and _number(tags, _PHOTOMETRIC, 1) != 3:
            raster = _with_values(raster, lambda values: values // (255 // (2**bits - 1)))
            raster = replace(raster, high=2.0**bits - 1)
        if bits <= 8 and _number(tags, _PHOTOMETRIC, 1) == 0:  # which Pillow has inverted
            high = int(raster.high)
            raster = replace(_with_values(raster, lambda values: high - values), inverted=True)
        return replace(raster, high=4095.0) if bits == 12 else raster


def _with_values(raster: Raster, function: Callable[[np.ndarray], np.ndarray]) -> Raster:
    """A raster whose values are changed by a function."""

    def strip(start: int, end: int) -> Strip:
        values, opaque = raster.strip(start, end)
        return function(values), opaque

    return replace(raster, strip=strip)


def _inverse(orientation: int) -> Image.Transpose:
    return UPRIGHT[{6: 8, 8: 6}.get(orientation, orientation)]


def _type_range(tags: dict[int, Any]) -> tuple[float, float]:
    """Value range of the samples of a page."""
    bits, form = max(_numbers(tags, _BITS, (1,))), _number(tags, _FORMAT, 1)
    if form == 3:
        return 0.0, 1.0
    if form == 2:
        return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    return 0.0, 2.0**bits - 1


def _type_name(tags: dict[int, Any]) -> str:
    """Such as ``3 x int16``."""
    form = {2: "int", 3: "float", 5: "complex int", 6: "complex"}.get(_number(tags, _FORMAT, 1))
    samples = _number(tags, _SAMPLES, 1)
    name = f"{form or 'uint'}{max(_numbers(tags, _BITS, (1,)))}"
    return name if samples == 1 else f"{samples} x {name}"


def _open_tifffile(
    path: Path, index: int, tags: dict[int, Any], bands: tuple[int, ...] | None
) -> Raster:
    photometric = _number(tags, _PHOTOMETRIC, 1)
    name = f"{path} ({_type_name(tags)} TIFF)"
    if bands is None and photometric not in _COLOR_SAMPLES:
        kind = _REFUSED_COLORS.get(photometric, f"photometric interpretation {photometric}")
        raise DataError(f"{name} holds {kind}; convert it to gray or RGB")
    if set(_numbers(tags, _FORMAT, (1,))) & {5, 6}:
        raise DataError(f"{name} holds complex numbers; convert it to their magnitudes")
    colors, alpha = _samples(name, tags, bands)
    tifffile = require("tifffile", extra="tiff", purpose=name)
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[index]
            if page.imagedepth > 1:
                raise DataError(f"{name} is a volume; save its slices as pages")
            values = page.asarray()
            axes = page.axes
            colormap = page.colormap if photometric == 3 and bands is None else None
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        raise DataError(
            f"{name} needs imagecodecs: pip install 'tiepoints[tiff]' ({error})"
        ) from error
    width, height = _tiff_size(tags)
    if axes.startswith("S"):
        values = np.moveaxis(values, 0, -1)
    values = values.reshape(height, width, -1)
    low, high = _type_range(tags)
    if colormap is not None:
        low, high = 0.0, 65535.0
    strip = _tifffile_strip(values, tags, colors, alpha, colormap)
    inverted = photometric == 0
    return Raster((width, height), strip, low=low, high=high, inverted=inverted)


def _samples(
    name: str, tags: dict[int, Any], bands: tuple[int, ...] | None
) -> tuple[list[int], int | None]:
    """Indices of the samples that are the color, and that of alpha."""
    count, photometric = _number(tags, _SAMPLES, 1), _number(tags, _PHOTOMETRIC, 1)
    number = _COLOR_SAMPLES.get(photometric, 1)
    if count < number:
        raise DataError(f"{name} has too few samples for its colors; convert it to gray or RGB")
    missing = count == 4 and number == 3 and _EXTRA not in tags  # commonly alpha
    extra = _numbers(tags, _EXTRA, (2,) if missing else ())
    alpha = next((number + i for i, kind in enumerate(extra) if kind in (1, 2)), None)
    alpha = alpha if alpha is not None and alpha < count else None
    if bands is not None:
        return _band_index(name, bands, count), alpha
    if number == 1 and count - (alpha is not None) > 1:
        raise DataError(
            f"{name} has {count} bands: select the one to use as gray, such as --bands 1, or three "
            "as RGB, such as --bands 3,2,1"
        )
    return list(range(number)), alpha


def _tifffile_strip(
    values: np.ndarray,
    tags: dict[int, Any],
    colors: list[int],
    alpha: int | None,
    colormap: np.ndarray | None,
) -> Callable[[int, int], Strip]:
    """Strips of decoded samples (H,W,S)."""
    high = _type_range(tags)[1]
    extra = _numbers(tags, _EXTRA, ())
    first = values.shape[2] - len(extra)  # of the extra samples
    premultiplied = alpha is not None and first <= alpha and extra[alpha - first] == 1
    if colormap is not None and colormap.max() < 256:
        colormap = colormap * np.uint16(257)

    def strip(start: int, end: int) -> Strip:
        part = values[start:end]
        opaque = None if alpha is None else part[..., alpha] > 0
        if colormap is not None:
            return np.moveaxis(colormap[:, part[..., 0].astype(np.intp)], 0, -1), opaque
        color = part[..., colors]
        if len(colors) == 4:  # CMYK
            light = high - color.astype(np.float64)
            color = light[..., :3] * light[..., 3:] / high
        if premultiplied:
            weight = part[..., alpha, None].astype(np.float64) / high
            color = np.divide(color, weight, out=np.zeros(color.shape), where=weight > 0)
        return color, opaque

    return strip
