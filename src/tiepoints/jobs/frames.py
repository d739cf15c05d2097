"""Sharp frames of a video as image files, for a reconstruction."""

from __future__ import annotations

import logging
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DataError
from ..files import IMAGE_SUFFIXES, write_json
from ..filters import laplacian_variance
from ..formats.records import file_stamp, read_settings, record_path
from ..progress import track
from .video import VideoFrames

logger = logging.getLogger(__name__)
#: Quality of the JPEG files.
QUALITY = 95


def is_video(path: str | Path) -> bool:
    """Whether a path is a file that is read as a video: no image by its suffix."""
    return Path(path).is_file() and Path(path).suffix.lower() not in IMAGE_SUFFIXES


def save_frames(video: Path, folder: Path, fps: float, *, progress: bool = False) -> list[str]:
    """Save the sharpest frame of each interval of ``1 / fps`` seconds as ``NAME_NUMBER.jpg``.

    The folder is complete if it exists; it is kept if it is of the same video and ``fps``, and
    replaced otherwise.

    Returns:
        warnings, such as of a truncated video.

    Raises:
        DataError: not a video, or without frames.
        ImportError: OpenCV is missing.
        OSError: the disk is full.
    """
    record = {"video": str(video.resolve()), "stamp": file_stamp(video), "fps": fps}
    settings = record_path(folder, "settings.json")
    if folder.is_dir() and (stored := read_settings(settings)) is not None:
        warnings = stored.pop("warnings", [])
        if stored == record:
            return warnings
    warnings = []
    tmp_path = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir(parents=True)
    with closing(VideoFrames(video)) as frames:
        try:
            count = _save_sharpest(frames, video.stem, tmp_path, fps, progress)
        except DataError as error:
            count = sum(1 for _ in tmp_path.iterdir())
            if not count:
                raise
            warnings.append(str(error))
    shutil.rmtree(folder, ignore_errors=True)
    tmp_path.rename(folder)
    write_json(settings, {**record, "warnings": warnings})
    logger.info("%d frames of %s -> %s", count, video, folder)
    return warnings


def _save_sharpest(frames: Any, stem: str, folder: Path, fps: float, progress: bool) -> int:
    """Save the sharpest frame of each interval; returns their number."""
    interval, best = 0, (-1.0, 0, None)
    count = 0

    def save() -> int:
        _, number, picture = best
        if picture is None:
            return 0
        rgb = Image.fromarray(picture[:, :, ::-1])
        rgb.save(folder / f"{stem}_{number:06d}.jpg", quality=QUALITY)
        return 1

    total = frames.total
    try:
        for number, frame in enumerate(
            track(frames, total=total, unit="frame", label="frames", enabled=progress)
        ):
            if int(number * fps / frames.rate) > interval:
                count += save()
                interval, best = int(number * fps / frames.rate), (-1.0, 0, None)
            sharpness = laplacian_variance(frame.image)
            if sharpness > best[0]:
                best = (sharpness, number, frame.picture.copy())
    finally:
        count += save()
    return count
