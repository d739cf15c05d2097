"""Single images of an extraction: read with their masks, and extracted."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..decode import image_size
from ..errors import DataError, first_line
from ..extract import Extractor
from ..files import Task
from ..formats.records import file_stamp
from ..image import Reading, read_mask
from ..memory import image_pixels
from ..structs import Features

logger = logging.getLogger(__name__)
#: Loads the mask (H,W) of an image, non-zero where keypoints are allowed; or None.
MaskLoader = Callable[[Task], Any]
#: ``next_task(wait)``: the next task; None if there are no more, or, without ``wait``, none yet.
NextTask = Callable[[bool], Task | None]
#: Threads that read images while one is extracted.
READERS = 2


def _mask_names(task: Task) -> list[str]:
    """Names of the mask of an image, by its path in the given folder or by that of its results."""
    paths = dict.fromkeys((task.inner or task.relative, task.relative))
    return [str(name) for path in paths for name in (f"{path}.png", path.with_suffix(".png"))]


def find_mask(task: Task, folder: Path | None) -> Path | None:
    """The mask file of an image; None if there is none."""
    if folder is None:
        return None
    paths = (folder / name for name in _mask_names(task))
    return next((path for path in paths if path.is_file()), None)


def mask_loader(folder: Path | None) -> MaskLoader | None:
    """The masks of images in a folder; None without one.

    Raises:
        FileNotFoundError: no such folder.
    """
    if folder is None:
        return None
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of masks at {folder}")

    def load_mask(task: Task) -> Any:
        path = find_mask(task, folder)
        if path is None:
            names = " or ".join(str(folder / name) for name in _mask_names(task)[:2])
            raise DataError(f"no mask {names}")
        return read_mask(path)

    return load_mask


def source_record(task: Task, masks: Path | None) -> dict[str, Any] | None:
    """Size and modification time of an image file and of its mask; None if the image is missing."""
    stamp = file_stamp(task.path)
    if stamp is None:
        return None
    record: dict[str, Any] = {"size": stamp[0], "mtime_ns": stamp[1]}
    mask = find_mask(task, masks)
    return record if mask is None else {**record, "mask": file_stamp(mask)}


def count_pixels(file: Path) -> int:
    """Number of pixels of an image; 0 if it cannot be read, which reading it reports."""
    try:
        width, height = image_size(file)
    except (OSError, DataError):
        return 0
    return width * height


@dataclass
class Loaded:
    """An image that has been read, with the record of its file and a mask from another file."""

    record: dict[str, Any] | None
    reading: Reading
    mask: Any


@dataclass
class Outcome:
    """What the extraction of an image gave.

    Attributes:
        features: None if it failed.
        record: of its file.
        reading: what ``Notices`` needs, without pixels.
        reason: why it failed.
    """

    features: Features | None = None
    record: dict[str, Any] | None = None
    reading: Reading | None = None
    reason: str = ""


class ImageExtractor:
    """Reads and extracts single images.

    Args:
        masks: folder of masks, see ``mask_loader``.
    """

    def __init__(self, extractor: Extractor, masks: Path | None = None):
        self.extractor, self.masks = extractor, masks
        self._load_mask = mask_loader(masks)
        memory = None if extractor.options is None else extractor.options.memory
        #: Pixels that images in memory may have together.
        self.max_pixels = image_pixels(memory)

    def load(self, task: Task) -> Loaded:
        """Read an image; errors as ``Extractor.read``."""
        # before the image is read, so that a replacement during the extraction is noticed
        record = source_record(task, self.masks)
        mask = None if self._load_mask is None else self._load_mask(task)
        return Loaded(record, self.extractor.read(task.source), mask)

    def extract(self, loading: Future[Loaded]) -> Outcome:
        """Extract an image that is being read."""
        try:
            loaded = loading.result()
            reading = loaded.reading
            mask = self.extractor.combine(reading, loaded.mask)
            features = self.extractor.extract_tensor(reading.pixels, [mask])[0]
        except (OSError, DataError, ValueError, RuntimeError, MemoryError) as error:
            return Outcome(reason=first_line(error))
        empty = replace(reading, pixels=reading.pixels.new_empty(0), mask=None)
        return Outcome(features, loaded.record, empty)

    def run(
        self, next_task: NextTask, readers: int = READERS
    ) -> Generator[tuple[Task, Outcome], None, None]:
        """Extract tasks, while threads read the next ones."""
        with ThreadPoolExecutor(readers) as pool:
            for task, loading in self._read_ahead(next_task, pool, readers + 1):
                outcome = self.extract(loading)
                del loading  # holds the image
                yield task, outcome

    def _read_ahead(
        self, next_task: NextTask, pool: ThreadPoolExecutor, depth: int
    ) -> Iterator[tuple[Task, Future[Loaded]]]:
        """Read images in threads, at most ``depth`` ahead of their use and, unless it is a single
        one, with at most ``max_pixels`` in memory.
        """
        loading: deque[tuple[Task, int, Future[Loaded]]] = deque()
        held: Task | None = None  # until there is memory for it
        in_memory = 0
        while True:
            while len(loading) < depth:
                task = held or next_task(not loading)
                if task is None:
                    break
                pixels = count_pixels(task.source)
                held = task if loading and in_memory + pixels > self.max_pixels else None
                if held is not None:
                    break
                in_memory += pixels
                loading.append((task, pixels, pool.submit(self.load, task)))
            if not loading:
                return
            task, pixels, future = loading.popleft()
            yield task, future
            del future  # holds the image
            in_memory -= pixels
