"""GPS positions and cameras of photographs from their EXIF."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from .decode import image_size, no_pixel_limit, split_page
from .errors import DataError

#: Mean radius of the Earth in meters.
EARTH_RADIUS = 6_371_000.0


class Position(NamedTuple):
    """WGS84 position: degrees (north and east positive), and meters, nan if unknown."""

    latitude: float
    longitude: float
    altitude: float


def read_position(path: str | Path) -> Position | None:
    """The GPS position of a photograph; None if its EXIF has none, or no valid one.

    Positions of 0 degrees latitude and longitude, which cameras without a fix write, are not valid.
    """
    try:
        with no_pixel_limit(), Image.open(split_page(path)[0]) as photo:
            tags = photo.getexif().get_ifd(ExifTags.IFD.GPSInfo)
        latitude = _degrees(tags, ExifTags.GPS.GPSLatitude, "S")
        longitude = _degrees(tags, ExifTags.GPS.GPSLongitude, "W")
        altitude = float(tags.get(ExifTags.GPS.GPSAltitude, math.nan))
        if tags.get(ExifTags.GPS.GPSAltitudeRef, 0) in (1, b"\x01"):
            altitude = -altitude  # below sea level
    # Pillow raises errors of many types for damaged EXIF; reading the image reports a damaged file
    except Exception:
        return None
    valid = abs(latitude) <= 90 and abs(longitude) <= 180 and (latitude, longitude) != (0, 0)
    return Position(latitude, longitude, altitude) if valid else None


def _degrees(tags: Any, key: int, negative: str) -> float:
    """Degrees, minutes and seconds of a tag, whose reference is the tag before it."""
    degrees, minutes, seconds = (float(part) for part in tags[key])
    reference = tags.get(key - 1, "")
    value = degrees + minutes / 60 + seconds / 3600
    return -value if str(reference).upper().startswith(negative) else value


def local_meters(positions: Iterable[Position]) -> np.ndarray:
    """Positions (N,2) east and north of their mean in meters, on a plane that touches the Earth
    there: exact to about 1 % within 100 km.
    """
    degrees = np.array([(p.latitude, p.longitude) for p in positions]).reshape(-1, 2)
    latitude = degrees[:, 0]
    # relative to the first, so that longitudes across the date line are neighbors
    longitude = (degrees[:, 1] - degrees[:1, 1] + 180) % 360 - 180
    north = np.radians(latitude - latitude.mean()) * EARTH_RADIUS
    east = np.radians(longitude - longitude.mean()) * EARTH_RADIUS
    return np.stack([east * np.cos(np.radians(latitude.mean())), north], axis=1)


class CameraTags(NamedTuple):
    """What the EXIF of a photograph says of camera and zoom; None for what is missing.

    Attributes:
        make, model: of the camera.
        focal: focal length in mm.
        equivalent: focal length in mm of the same field of view on 35 mm film; phones with
            several lenses, or that crop, differ in it.
        zoom: digital zoom ratio.
    """

    make: str | None = None
    model: str | None = None
    focal: float | None = None
    equivalent: float | None = None
    zoom: float | None = None


def read_camera(path: str | Path) -> CameraTags:
    """Camera and zoom by the EXIF of a photograph."""
    base = ExifTags.Base
    try:
        with no_pixel_limit(), Image.open(split_page(path)[0]) as photo:
            tags = photo.getexif()
            more = tags.get_ifd(ExifTags.IFD.Exif)
        wanted = base.FocalLength, base.FocalLengthIn35mmFilm, base.DigitalZoomRatio
        found = (more.get(tag) for tag in wanted)
        values = (math.nan if value is None else float(value) for value in found)
        # some cameras write 0/0 for an unknown digital zoom
        numbers = (round(value, 3) if math.isfinite(value) else None for value in values)
        return CameraTags(tags.get(base.Make), tags.get(base.Model), *numbers)
    except Exception:  # see read_position
        return CameraTags()


def shared_cameras(files: Mapping[str, Path]) -> dict[str, tuple[Any, ...]]:
    """Which images are taken for images of one camera and zoom.

    These are images of one size with the same ``CameraTags``. Images without a focal length are,
    too, if all of them have one size, up to their orientation, as exported by one program;
    photographs of many people have many sizes.

    Args:
        files: name -> image.

    Returns:
        name -> key, which is the same for the images of one camera; images without a key have
        cameras of their own.
    """
    known: dict[str, tuple[Any, ...]] = {}
    unknown: dict[str, tuple[Any, ...]] = {}
    for name, file in files.items():
        try:
            size = image_size(file)
        except (OSError, DataError):
            continue  # the extraction reports it
        camera = read_camera(file)
        plain = camera.focal is None and camera.equivalent is None
        (unknown if plain else known)[name] = (*size, *camera)
    sizes = {tuple(sorted(key[:2])) for key in unknown.values()}
    return known | unknown if len(sizes) == 1 else known
