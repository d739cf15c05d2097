"""Track keypoints in a video, an image sequence or the images of a camera, and draw the tracks.

``open_source`` reads frames, ``tracking.Tracker`` links their features, ``Window`` and
``VideoFile`` show and write the annotated images, ``live`` combines them. docs/live.md describes
the tracks.
"""

from __future__ import annotations

import glob
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError, first_line
from ..extract import Extractor
from ..files import (
    IMAGE_SUFFIXES,
    list_images,
    natural,
    remove_abandoned,
    require,
    temporary_path,
)
from ..image import load_image, to_rgb
from ..plot import draw_caption, draw_tracks
from ..progress import track
from ..tracking import Tracker

logger = logging.getLogger(__name__)
#: Frames per second of image sequences, and of cameras that do not report it.
SEQUENCE_RATE, CAMERA_RATE = 10.0, 25.0
#: Number of frames over which the displayed rate is averaged.
RATE_WINDOW = 20
#: A video is truncated if more than this number and fraction of its nominal frames are missing, as
#: containers round or estimate their length.
LENGTH_TOLERANCE_FRAMES, LENGTH_TOLERANCE = 2, 0.02
#: Codecs of all builds of OpenCV, by the suffix of the file.
CODECS = {".mp4": "mp4v", ".avi": "MJPG"}
TITLE = "tiepoints live (q: quit)"


# ---- input


class Frame(NamedTuple):
    """A frame: gray (1,1,H,W) float32 in [0,1], and (H,W,3) uint8 BGR to draw on."""

    image: Tensor
    picture: NDArray[np.uint8]


class Source(Protocol):
    """Frames in order.

    Attributes:
        rate: frames per second of a video of the frames.
        total: expected number of frames; None for a camera.
        skipped: (name, reason) of frames that could not be read so far.
    """

    rate: float
    total: int | None
    skipped: list[tuple[str, str]]

    def __iter__(self) -> Iterator[Frame]: ...
    def close(self) -> None: ...


def open_source(source: str | Sequence[str], every: int = 1) -> Source:
    """Open a video file, a folder of images, a pattern, image files, or a camera by its index.

    A name of digits is a camera. Images are in natural order of their names (img2 before img10).

    Args:
        every: read only every N-th frame.

    Raises:
        FileNotFoundError: no such file, or no match of a pattern.
        DataError: a folder without images, a file that is not a video, a camera that does not open.
        ValueError: several files that are not all images, or a single image.
        ImportError: OpenCV is missing.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    names = [source] if isinstance(source, str) else list(source)
    if len(names) == 1:
        name, path = names[0], Path(names[0])
        if name.isascii() and name.isdecimal():
            return VideoFrames(int(name), every)
        if path.is_dir():
            listing = list_images(path, recursive=False)
            files = set(listing.images)
            if not files:
                raise DataError(
                    f"no image in the folder {name}; give a folder of frames, a video file or the "
                    "index of a camera"
                )
            if listing.skipped:
                logger.info("skipped: %d files that are not images", listing.skipped)
            frames = ImageFrames(files, every)
            frames.skipped += listing.refused
            return frames
        if path.is_file():
            if path.suffix.lower() in IMAGE_SUFFIXES - {".gif"}:
                pattern = path.with_name("*" + path.suffix)
                raise ValueError(
                    f"{name} is one image; give its folder, or a pattern such as '{pattern}', or "
                    "a video"
                )
            return VideoFrames(path, every)
    files = set()
    for name in names:
        found = (
            [name]
            if os.path.isfile(name)
            else [p for p in glob.glob(name, recursive=True) if os.path.isfile(p)]
        )
        if not found:
            raise FileNotFoundError(
                f"no file, folder or pattern {name}; give a video, a folder of frames or the index "
                "of a camera"
            )
        files.update(Path(p) for p in found)
    for path in files:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(
                f"{path} is not an image; several files must be images, and only one video can be "
                "given"
            )
    return ImageFrames(files, every)


class ImageFrames:
    """Image files as frames, in natural order of their names; unreadable ones are skipped.

    Raises (while iterating):
        DataError: none of them could be read.
    """

    def __init__(self, paths: Iterable[Path], every: int = 1) -> None:
        self.paths = sorted(paths, key=lambda p: natural(str(p)))[::every]
        self.rate = SEQUENCE_RATE
        self.total: int | None = len(self.paths)
        self.skipped: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[Frame]:
        readable = False
        for path in self.paths:
            try:
                frame = Frame(load_image(path), np.asarray(to_rgb(path))[:, :, ::-1])
            except (OSError, DataError, ValueError) as error:
                self.skipped.append((str(path), first_line(error)))
                continue
            readable = True
            yield frame
        if not readable:
            raise DataError(
                f"none of the {len(self.paths)} images could be read; the first: "
                f"{self.skipped[0][1]}"
            )

    def close(self) -> None:
        """Nothing to close."""


class VideoFrames:
    """A video file, or a camera by its index, read with OpenCV.

    Raises:
        DataError: it does not open; while iterating: it has no frame, is truncated, or the camera
            stops.
        ImportError: OpenCV is missing.
    """

    def __init__(self, path: Path | int, every: int = 1) -> None:
        cv2 = _cv2()
        self.every, self.camera = every, isinstance(path, int)
        self.name = f"camera {path}" if self.camera else str(path)
        self.skipped: list[tuple[str, str]] = []
        try:
            with _quiet(cv2):
                self.capture = cv2.VideoCapture(path if isinstance(path, int) else str(path))
            opened = self.capture.isOpened()
        except cv2.error:  # an index beyond the range of a C integer
            opened = False
        if not opened and self.camera:
            raise DataError(
                f"{self.name} does not open; it must be connected, not in use, and accessible for "
                "this user. The first camera is 0"
            )
        if not opened:
            raise DataError(
                f"{self.name} cannot be read as a video; convert it (to .mp4 or .avi) or get it "
                "again from its source"
            )
        self._position = cv2.CAP_PROP_POS_MSEC
        count = self.capture.get(cv2.CAP_PROP_FRAME_COUNT)
        rate = self.capture.get(cv2.CAP_PROP_FPS)
        if self.camera:
            self.capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest image instead of a queue
        valid = 0 < rate < 1000  # without a rate in the file it is NaN, 0 or the time base
        self._rate = rate if valid else CAMERA_RATE
        self.rate = self._rate if self.camera else self._rate / every
        self.nominal_count = int(count) if not self.camera and 0 < count < 1e9 and valid else None
        self.total = None if self.nominal_count is None else -(-self.nominal_count // every)

    def __iter__(self) -> Iterator[Frame]:
        count, seconds = 0, 0.0
        while self.capture.grab():
            seconds = self.capture.get(self._position) / 1000
            count += 1
            if (count - 1) % self.every:
                continue
            ok, image = self.capture.retrieve()
            if not ok or image is None:
                self.skipped.append((f"{self.name}, frame {count}", "could not be decoded"))
                continue
            yield Frame(load_image(image[:, :, ::-1]), image)
        if self.camera:
            raise DataError(
                f"{self.name} returned no more images (after {count}); check whether it is "
                "connected and not in use by another program"
            )
        if not count:
            raise DataError(
                f"{self.name} has no frame that can be decoded; convert it (to .mp4 or .avi) or "
                "get it again from its source"
            )
        if self.nominal_count is None:
            return
        # with a variable rate the nominal count is estimated from the duration, and dropped frames
        # reduce only the count: both must be too small
        tolerance = max(LENGTH_TOLERANCE_FRAMES, LENGTH_TOLERANCE * self.nominal_count)
        if max(count, 1 + seconds * self._rate) < self.nominal_count - tolerance:
            raise DataError(
                f"{self.name} is truncated after {count} of about {self.nominal_count} frames; get "
                "it again from its source"
            )

    def close(self) -> None:
        """Close the file or the camera."""
        self.capture.release()


@contextmanager
def _quiet(cv2: Any) -> Iterator[None]:
    """Disable OpenCV's warnings where a failure is reported by an exception."""
    log = cv2.utils.logging
    level = log.setLogLevel(log.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        log.setLogLevel(level)


# ---- output


class Screen(Protocol):
    """Output of annotated images."""

    def show(self, picture: NDArray[np.uint8]) -> bool:
        """Show the next image; False if the user has quit."""

    def close(self) -> None: ...


class Window:
    """A window that shows at most ``rate`` images per second; ``q``, Escape or closing it quits.

    Raises:
        DataError: no display, or OpenCV without support for windows.
        ImportError: OpenCV is missing.
    """

    def __init__(self, rate: float | None = None) -> None:
        self.cv2, self.rate, self.due = _cv2(), rate, 0.0
        remedy = "write a video instead: --output FILE.mp4"
        # checked first, because Qt in OpenCV aborts the process without a display
        if sys.platform == "linux" and not (
            os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        ):
            raise DataError(f"no display for a window; {remedy}")
        try:
            self.cv2.namedWindow(TITLE)
        except (self.cv2.error, AttributeError) as error:
            raise DataError(
                f"this OpenCV cannot show windows (a headless build, or no display); {remedy}"
            ) from error

    def show(self, picture: NDArray[np.uint8]) -> bool:
        """Show the next image; False if the user has closed the window."""
        self.cv2.imshow(TITLE, picture)
        key = self.cv2.waitKey(max(1, round(1000 * (self.due - time.monotonic())))) & 0xFF
        self.due = 0.0 if self.rate is None else time.monotonic() + 1 / self.rate
        return (
            key not in (ord("q"), 27)
            and self.cv2.getWindowProperty(TITLE, self.cv2.WND_PROP_VISIBLE) >= 1
        )

    def close(self) -> None:
        """Close the window."""
        self.cv2.destroyAllWindows()


class VideoFile:
    """A video of images of one size; written to a temporary file that ``close`` renames.

    Args:
        path: ``.mp4`` (MPEG-4) or ``.avi`` (Motion JPEG).
        rate: frames per second.
        live: the images arrive in real time, as from a camera: they are repeated or dropped to keep
            the duration.

    Raises:
        ValueError: another suffix, or an image of another size.
        DataError: ``path`` is a folder, or the file cannot be written.
        ImportError: OpenCV is missing.
    """

    def __init__(self, path: Path, rate: float, *, live: bool = False) -> None:
        if path.suffix.lower() not in CODECS:
            raise ValueError(f"--output must end with {' or '.join(CODECS)}, got {path.name}")
        if path.is_dir():
            raise DataError(f"{path} is a folder; give a file name for the video")
        self.cv2, self.path, self.rate, self.live = _cv2(), path, rate, live
        self.tmp_path = temporary_path(path, path.suffix.lower())
        self.writer: Any = None
        self.size, self.start, self.written = (0, 0), 0.0, 0

    def show(self, picture: NDArray[np.uint8]) -> bool:
        """Write the next image."""
        if self.writer is None:
            self._open(picture.shape[1], picture.shape[0])
        if (picture.shape[1], picture.shape[0]) != self.size:
            raise ValueError(
                f"the video is {self.size[0]} x {self.size[1]}, got an image of "
                f"{picture.shape[1]} x {picture.shape[0]}"
            )
        copies = 1
        if self.live:
            copies += int((time.monotonic() - self.start) * self.rate) - self.written
        for _ in range(copies):
            self.writer.write(picture)
            self.written += 1
        return True

    def _open(self, width: int, height: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.path.parent)
        codec = self.cv2.VideoWriter_fourcc(*CODECS[self.path.suffix.lower()])
        with _quiet(self.cv2):
            self.writer = self.cv2.VideoWriter(
                str(self.tmp_path), codec, self.rate, (width, height)
            )
        if not self.writer.isOpened():
            self.tmp_path.unlink(missing_ok=True)
            raise DataError(
                f"{self.path} cannot be written as a video of {width} x {height}; check whether "
                "its folder is writable, or try .avi"
            )
        self.size, self.start = (width, height), time.monotonic()

    def close(self) -> None:
        """Finish and rename the video; without images no file is written."""
        if self.writer is not None:
            self.writer.release()
            self.writer = None
            if self.written:
                os.replace(self.tmp_path, self.path)


# ---- the job


@dataclass
class Summary:
    """Result of a run.

    Attributes:
        frames: number of frames processed.
        seconds: total duration.
        frames_per_second: mean rate of extraction and tracking, without reading, showing and
            writing.
        points: mean number of keypoints per frame.
        tracks: number of tracks with two frames or more.
        median_length, mean_length: of these tracks, in frames; 0 without tracks.
        stopped: ended by Ctrl-C or by closing the window, before the end of the source.
        skipped: (frame, reason) of frames that could not be read.
        failure: why the source failed; empty if it did not.
    """

    frames: int = 0
    seconds: float = 0.0
    frames_per_second: float = 0.0
    points: float = 0.0
    tracks: int = 0
    median_length: float = 0.0
    mean_length: float = 0.0
    stopped: bool = False
    skipped: list[tuple[str, str]] = field(default_factory=list)
    failure: str = ""


def live(
    source: Source,
    extractor: Extractor,
    screen: Screen,
    *,
    tracker: Tracker | None = None,
    max_frames: int | None = None,
    progress: bool = False,
) -> Summary:
    """Track the keypoints of a source and show them, until it ends, the user quits, or Ctrl-C.

    Args:
        source, screen: opened and closed by the caller.
        extractor: extracts keypoints with descriptors.
        tracker: tracker with its options.
        max_frames: maximum number of frames.

    Raises:
        DataError: the source has no frame. A later failure is stored as ``failure``.
        ValueError: the extractor has no descriptor.
    """
    tracker = Tracker() if tracker is None else tracker
    summary, num_keypoints, busy = Summary(), 0, 0.0
    recent: deque[float] = deque(maxlen=RATE_WINDOW)
    total = source.total if max_frames is None else min(max_frames, source.total or max_frames)
    frames = islice(_until_failure(source, summary), max_frames)
    size: tuple[int, int] | None = None
    started = time.monotonic()
    try:
        for frame in track(frames, total=total, unit="frame", label="live", enabled=progress):
            before = time.perf_counter()
            features = extractor.extract(frame.image)
            tracks = tracker.update(features)
            recent.append(time.perf_counter() - before)
            size = size or features.image_size
            image = _resize(draw_tracks(frame.picture, tracks), size)
            rate, count = len(recent) / sum(recent), sum(t.length > 1 for t in tracks)
            draw_caption(image, f"{rate:.1f} frames/s   {count} tracks")
            proceed = screen.show(image)
            summary.frames += 1
            num_keypoints += len(features)
            busy += recent[-1]
            if not proceed:
                summary.stopped = True
                break
    except KeyboardInterrupt:
        summary.stopped = True
    if summary.failure and not summary.frames:
        raise DataError(summary.failure)
    summary.seconds, summary.skipped = time.monotonic() - started, source.skipped
    if summary.frames:
        summary.frames_per_second = summary.frames / busy
        summary.points = num_keypoints / summary.frames
    _summarize_lengths(summary, tracker.lengths())
    return summary


def _summarize_lengths(summary: Summary, lengths: Counter[int]) -> None:
    """Store the number of tracks and their median and mean length."""
    summary.tracks = lengths.total()
    if summary.tracks:
        summary.median_length = _median(lengths)
        total = sum(length * count for length, count in lengths.items())
        summary.mean_length = total / summary.tracks


def _until_failure(source: Source, summary: Summary) -> Iterator[Frame]:
    """Frames of a source up to a failure, which is stored in the summary."""
    try:
        yield from source
    except DataError as error:
        summary.failure = str(error)


def _resize(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an image to (width, height), as all frames of a video have the same size."""
    if image.shape[1::-1] == size:
        return image
    cv2 = _cv2()
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _median(counts: Counter[int]) -> float:
    """Median of values by their counts, without a list of all values."""
    values = np.array(sorted(counts))
    cumulative = np.cumsum([counts[v] for v in values.tolist()])
    middle = np.array([(cumulative[-1] - 1) // 2, cumulative[-1] // 2])
    return float(values[np.searchsorted(cumulative, middle, side="right")].mean())


def _cv2() -> Any:
    return require("cv2", extra="opencv", purpose="video")
