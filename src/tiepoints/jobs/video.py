"""Points followed through a video, an image sequence or a camera's pictures, and drawn as tracks.

``Tracker`` links the features of each frame with those before; it knows neither files nor OpenCV.
``open_source`` gives the frames, ``Window`` and ``VideoFile`` take the pictures, ``live`` ties them
together. docs/live.md says what the tracks mean.
"""

from __future__ import annotations

import glob
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
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..errors import DataError
from ..extract import Extractor
from ..files import IMAGE_SUFFIXES, list_images, natural, require
from ..image import load_image
from ..plot import draw_caption, draw_tracks
from ..tracking import Tracker

#: Frames a second of image sequences, and of a camera that does not tell its own.
SEQUENCE_RATE, CAMERA_RATE = 10.0, 25.0
#: Frames that the rate shown is averaged over.
RATE_WINDOW = 20
#: A video that ends so much before the length it claims broke off; containers round their length,
#: some only estimate it.
CLAIM_FRAMES, CLAIM_SHARE = 2, 0.02
#: Codecs that every build of OpenCV brings, by the suffix of the file.
CODECS = {".mp4": "mp4v", ".avi": "MJPG"}
TITLE = "tiepoints live (q ends)"


# ---- pictures


# ---- frames in


class Frame(NamedTuple):
    """One picture: gray (1,1,H,W) float32 in [0,1], and (H,W,3) uint8 BGR to draw on."""

    image: Tensor
    picture: NDArray[np.uint8]


class Source(Protocol):
    """Frames in their order.

    Attributes:
        rate: frames a second that a video of them should have.
        total: how many there seem to be; None for a camera.
        skipped: (name, reason) of frames that could not be read, as far as they have been met.
    """

    rate: float
    total: int | None
    skipped: list[tuple[str, str]]

    def __iter__(self) -> Iterator[Frame]: ...
    def close(self) -> None: ...


def open_source(source: str | Sequence[str], every: int = 1) -> Source:
    """A video file, a folder of images, a pattern, image files, or the number of a camera, as
    frames.

    A name made of digits alone is a camera. Images come in natural order of their names (img2
    before img10).

    Args:
        every: take only every so manieth frame.

    Raises:
        FileNotFoundError: nothing of that name, or a pattern that fits nothing.
        DataError: a folder without images, a file that is no video, a camera that does not open.
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
            files = set(list_images(path, recursive=False)[0])
            if not files:
                raise DataError(
                    f"no image in the folder {name}; give a folder of frames, a video file or a "
                    "camera's number"
                )
            return ImageFrames(files, every)
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
                f"no file, folder or pattern {name}; give a video, a folder of frames or a "
                "camera's number"
            )
        files.update(Path(p) for p in found)
    for path in files:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(
                f"{path} is not an image; several files are a sequence of images, and a video "
                "comes alone"
            )
    return ImageFrames(files, every)


class ImageFrames:
    """Image files as frames, in natural order of their names; one that cannot be read is skipped.

    Raises, while read:
        DataError: not one of them could be read.
    """

    def __init__(self, paths: Iterable[Path], every: int = 1) -> None:
        self.paths = sorted(paths, key=lambda p: natural(str(p)))[::every]
        self.rate = SEQUENCE_RATE
        self.total: int | None = len(self.paths)
        self.skipped: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[Frame]:
        for path in self.paths:
            try:
                frame = _read_frame(path)
            except (DataError, OSError, ValueError) as error:
                self.skipped.append((str(path), str(error)))
                continue
            yield frame
        if len(self.skipped) == len(self.paths):
            raise DataError(
                f"none of the {len(self.paths)} images could be read; the first: "
                f"{self.skipped[0][1]}"
            )

    def close(self) -> None:
        """Nothing is open."""


def _read_frame(path: Path) -> Frame:
    image = load_image(path)
    with Image.open(path) as photo:
        if photo.mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
            return Frame(image, np.asarray(photo.convert("RGB"))[:, :, ::-1])
    gray = (
        image[0, 0].mul(255).round().to(torch.uint8).numpy()
    )  # 16 bit and float: Pillow would cut off what is above 255
    return Frame(image, np.repeat(gray[:, :, None], 3, axis=2))


class VideoFrames:
    """A video file, or a camera by its number, through OpenCV.

    Raises:
        DataError: it does not open; while read: it has no frame, breaks off, or the camera gives no
            more.
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
        except cv2.error:  # a number beyond the range of a C integer
            opened = False
        if not opened and self.camera:
            raise DataError(
                f"{self.name} does not open; is it plugged in, free, and allowed to this user? "
                "The first camera is 0"
            )
        if not opened:
            raise DataError(
                f"{self.name} cannot be read as a video; convert it (to .mp4 or .avi) or restore "
                "it from its source"
            )
        self._position = cv2.CAP_PROP_POS_MSEC
        claimed, rate = (
            self.capture.get(cv2.CAP_PROP_FRAME_COUNT),
            self.capture.get(cv2.CAP_PROP_FPS),
        )
        if self.camera:
            self.capture.set(
                cv2.CAP_PROP_BUFFERSIZE, 1
            )  # the newest picture, not the oldest of a queue
        known = 0 < rate < 1000  # NaN, 0, or a time base taken for a rate where a file does not say
        self._rate = rate if known else CAMERA_RATE
        self.rate = self._rate if self.camera else self._rate / every
        self.claimed = int(claimed) if not self.camera and 0 < claimed < 1e9 and known else None
        self.total = None if self.claimed is None else -(-self.claimed // every)

    def __iter__(self) -> Iterator[Frame]:
        count, seconds = 0, 0.0
        while self.capture.grab():
            seconds = self.capture.get(self._position) / 1000
            count += 1
            if (count - 1) % self.every:
                continue
            good, picture = self.capture.retrieve()
            if not good or picture is None:
                self.skipped.append((f"{self.name}, frame {count}", "could not be decoded"))
                continue
            yield Frame(load_image(picture[:, :, ::-1]), picture)
        if self.camera:
            raise DataError(
                f"{self.name} gives no more pictures (after {count}); check its plug, and whether "
                "another program uses it"
            )
        if not count:
            raise DataError(
                f"{self.name} has no frame that can be decoded; convert it (to .mp4 or .avi) or "
                "restore it from its source"
            )
        # of a variable rate the count is an estimate from the time, and frames left out shorten the
        # count alone: both must lack
        slack = max(CLAIM_FRAMES, CLAIM_SHARE * (self.claimed or 0))
        if self.claimed is not None and max(count, 1 + seconds * self._rate) < self.claimed - slack:
            raise DataError(
                f"{self.name} breaks off after {count} of about {self.claimed} frames; restore it "
                "from its source"
            )

    def close(self) -> None:
        """Let the file or the camera go."""
        self.capture.release()


@contextmanager
def _quiet(cv2: Any) -> Iterator[None]:
    """OpenCV's own warnings off while it tries what may fail: the error that follows says it
    better.
    """
    log = cv2.utils.logging
    level = log.setLogLevel(log.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        log.setLogLevel(level)


# ---- pictures out


class Screen(Protocol):
    """Where pictures go."""

    def show(self, picture: NDArray[np.uint8]) -> bool:
        """Take the next picture; false when the user wants no more."""

    def close(self) -> None: ...


class Window:
    """Pictures on the display at no more than ``rate`` a second; ``q``, Escape or closing the
    window ends.

    Raises:
        DataError: no display, or an OpenCV without windows.
        ImportError: OpenCV is missing.
    """

    def __init__(self, rate: float | None = None) -> None:
        self.cv2, self.rate, self.due = _cv2(), rate, 0.0
        remedy = "write a video instead: --output FILE.mp4"
        # asked first, because OpenCV's Qt ends the whole process where it finds no display
        if sys.platform == "linux" and not (
            os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        ):
            raise DataError(f"there is no display to show a window on; {remedy}")
        try:
            self.cv2.namedWindow(TITLE)
        except (self.cv2.error, AttributeError) as error:
            raise DataError(
                f"this OpenCV cannot show windows (a headless build, or no display); {remedy}"
            ) from error

    def show(self, picture: NDArray[np.uint8]) -> bool:
        """Show the next picture; false when the user has closed the window."""
        self.cv2.imshow(TITLE, picture)
        key = self.cv2.waitKey(max(1, round(1000 * (self.due - time.monotonic())))) & 0xFF
        self.due = 0.0 if self.rate is None else time.monotonic() + 1 / self.rate
        return (
            key not in (ord("q"), 27)
            and self.cv2.getWindowProperty(TITLE, self.cv2.WND_PROP_VISIBLE) >= 1
        )

    def close(self) -> None:
        """Take the window away."""
        self.cv2.destroyAllWindows()


class VideoFile:
    """Pictures of one size as a video; written beside its place and put there by ``close``.

    Args:
        path: ``.mp4`` (MPEG-4) or ``.avi`` (Motion JPEG).
        rate: frames a second.
        live: the pictures come when they come, as a camera's: each is repeated, or left out, as
            real time needs.

    Raises:
        ValueError: another suffix, or a picture of another size.
        DataError: a folder of that name; while written: the file cannot be.
        ImportError: OpenCV is missing.
    """

    def __init__(self, path: Path, rate: float, *, live: bool = False) -> None:
        if path.suffix.lower() not in CODECS:
            raise ValueError(f"--output must end with {' or '.join(CODECS)}, got {path.name}")
        if path.is_dir():
            raise DataError(f"{path} is a folder; name a file for the video")
        self.cv2, self.path, self.rate, self.live = _cv2(), path, rate, live
        self.tmp_path = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix.lower()}")
        self.writer: Any = None
        self.size, self.start, self.written = (0, 0), 0.0, 0

    def show(self, picture: NDArray[np.uint8]) -> bool:
        """Write the next picture."""
        if self.writer is None:
            self._open(picture.shape[1], picture.shape[0])
        if (picture.shape[1], picture.shape[0]) != self.size:
            raise ValueError(
                f"the video is {self.size[0]} x {self.size[1]}, got a picture of "
                f"{picture.shape[1]} x {picture.shape[0]}"
            )
        copies = (
            int((time.monotonic() - self.start) * self.rate) + 1 - self.written if self.live else 1
        )
        for _ in range(copies):
            self.writer.write(picture)
            self.written += 1
        return True

    def _open(self, width: int, height: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        codec = self.cv2.VideoWriter_fourcc(*CODECS[self.path.suffix.lower()])
        with _quiet(self.cv2):
            self.writer = self.cv2.VideoWriter(
                str(self.tmp_path), codec, self.rate, (width, height)
            )
        if not self.writer.isOpened():
            self.tmp_path.unlink(missing_ok=True)
            raise DataError(
                f"{self.path} cannot be written as a video of {width} x {height}; is its folder "
                "writable? Or try .avi"
            )
        self.size, self.start = (width, height), time.monotonic()

    def close(self) -> None:
        """Finish the video and put it in its place; without a picture nothing is written."""
        if self.writer is not None:
            self.writer.release()
            self.writer = None
            if self.written:
                os.replace(self.tmp_path, self.path)


# ---- the job


@dataclass
class Summary:
    """How a run went.

    Attributes:
        frames: pictures worked on.
        seconds: from the first to the end, all included.
        frames_per_second: mean of extracting and tracking alone, without reading, showing and
            writing.
        points: mean number a frame.
        tracks: points found in two frames or more; their median and mean length in frames, 0
            without any.
        stopped: ended by Ctrl-C or by closing the window, before the source did.
        skipped: (frame, reason) of those that could not be read.
        failure: why the source broke off; empty where it did not.
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
    """Follow the points of a source from frame to frame and show them, until it ends, the user ends
    it, or Ctrl-C.

    Args:
        source, screen: opened before; whoever opened them closes them.
        extractor: gives points with descriptors.
        tracker: holds the options of tracking.
        max_frames: end after so many.

    Raises:
        DataError: the source has not a single frame. One that breaks off later is the summary's
            ``failure``.
        ValueError: the extractor gives no descriptors.
    """
    tracker = Tracker() if tracker is None else tracker
    summary, points, spent = Summary(), 0, 0.0
    recent: deque[float] = deque(maxlen=RATE_WINDOW)
    total = source.total if max_frames is None else min(max_frames, source.total or max_frames)
    frames = islice(_until_broken(source, summary), max_frames)
    size: tuple[int, int] | None = None
    started = time.monotonic()
    try:
        for frame in tqdm(
            frames, total=total, unit="frame", disable=not progress, dynamic_ncols=True
        ):
            before = time.perf_counter()
            features = extractor.extract(frame.image)
            tracks = tracker.update(features)
            recent.append(time.perf_counter() - before)
            size = features.image_size if size is None else size
            picture = _resized(draw_tracks(frame.picture, tracks), size)
            draw_caption(
                picture,
                f"{len(recent) / sum(recent):.1f} frames/s   {sum(t.length > 1 for t in tracks)} "
                "tracks",
            )
            wanted = screen.show(picture)
            summary.frames, points, spent = (
                summary.frames + 1,
                points + len(features),
                spent + recent[-1],
            )
            if not wanted:
                summary.stopped = True
                break
    except KeyboardInterrupt:
        summary.stopped = True
    if summary.failure and not summary.frames:
        raise DataError(summary.failure)
    summary.seconds, summary.skipped = time.monotonic() - started, source.skipped
    if summary.frames:
        summary.frames_per_second, summary.points = summary.frames / spent, points / summary.frames
    lengths = tracker.lengths()
    summary.tracks = lengths.total()
    if summary.tracks:
        summary.median_length = _median(lengths)
        summary.mean_length = (
            sum(length * count for length, count in lengths.items()) / summary.tracks
        )
    return summary


def _until_broken(source: Source, summary: Summary) -> Iterator[Frame]:
    """The frames of a source; where it breaks off they end and the summary says why."""
    try:
        yield from source
    except DataError as error:
        summary.failure = str(error)


def _resized(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture in another size (width, height), as all pictures of a video have one."""
    cv2 = _cv2()
    return (
        picture
        if picture.shape[1::-1] == size
        else cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    )


def _median(counts: Counter[int]) -> float:
    """Median of values by their counts, which may be far more than memory would hold as a list."""
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[v] for v in values.tolist()])
    middle = np.array([(ends[-1] - 1) // 2, ends[-1] // 2])
    return float(values[np.searchsorted(ends, middle, side="right")].mean())


def _cv2() -> Any:
    return require("cv2", extra="opencv", purpose="video")
