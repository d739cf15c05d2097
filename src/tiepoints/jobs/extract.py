"""Extract features of many images to files."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..decode import image_size, page_count
from ..errors import DataError, first_line
from ..extract import ExtractOptions, Extractor, recorded_precision
from ..files import Task, collect, is_disk_full
from ..formats.records import RecordLog, file_stamp
from ..formats.store import (
    FILE_NAMES,
    FeatureStore,
    check_settings,
    clear_features,
    create_features,
    differing_features,
    foreign_message,
    holds_features,
    images_path,
    settings_path,
)
from ..image import Notices, Reading, read_mask
from ..memory import image_pixels
from ..names import FORMATS
from ..progress import Progress
from ..structs import Features

logger = logging.getLogger(__name__)
#: Loads the mask (H,W) of an image, non-zero where keypoints are allowed; or None.
MaskLoader = Callable[[Task], Any]


@dataclass
class ExtractReport:
    """Result of an extraction.

    Attributes:
        done, skipped: number of images extracted, and of those with stored features.
        changed: number of images whose file has changed since their extraction; they are extracted
            again.
        keypoints: number of keypoints of the images extracted.
        seconds: duration of the extraction.
        failed: (image, reason).
        ignored: number of files in the given folders that are not images.
        output: path of the features.
    """

    done: int = 0
    skipped: int = 0
    changed: int = 0
    keypoints: int = 0
    seconds: float = 0.0
    failed: list[tuple[str, str]] = field(default_factory=list)
    ignored: int = 0
    output: str = ""


def normalize_settings(content: dict[str, Any]) -> dict[str, Any]:
    """Convert settings of extraction of this or an earlier version to the current format.

    Raises:
        TypeError, ValueError: invalid settings.
    """
    names = ("half", "camera", "masks")
    store: dict[str, Any] = {name: content[name] for name in names if name in content}
    options = {name: value for name, value in content.items() if name not in store}
    # the weights of then, not those that have their names now
    digests = content.get("digests", {})
    try:
        found = {**ExtractOptions.from_json(options).to_json(), **store, "digests": digests}
        # what ``auto`` was then, not what it is here
        return {**found, "precision": recorded_precision(content.get("precision", "auto"))}
    except ValueError:
        if not digests:
            raise
        return content  # of this version; a weights file has been renamed or removed


def check_store(store: FeatureStore, settings: dict[str, Any], overwrite: bool) -> None:
    """Record the settings of a store of features, or compare them with its record.

    Raises:
        DataError: the store holds features of other settings, or of another program.
    """

    def clear() -> None:
        clear_features(store)

    check_settings(
        settings_path(store),
        settings,
        overwrite=overwrite,
        clear=clear,
        results=store.path,
        normalize=normalize_settings,
        has_results=lambda: holds_features(store),
        usable=True,
    )
    with RecordLog(images_path(store)) as log:
        differing, damaged = differing_features(store, log)
        log.forget(damaged)  # extracted again
    if differing and not overwrite:
        reason = f"the features of {differing[0]} differ from their record"
        raise DataError(foreign_message(store.path, reason, usable=True))
    if differing:
        clear()


# One call per command of the command line, whose options are its parameters.
def extract_images(
    images: Iterable[str],
    output: Path,
    options: ExtractOptions,
    *,
    format: str = "npy",
    list_file: Path | None = None,
    root: Path | None = None,
    camera: str = "auto",
    half: bool = False,
    masks: Path | None = None,
    pages: str = "first",
    overwrite: bool = False,
    workers: int = 2,
    progress: bool = True,
) -> ExtractReport:
    """Extract images to the folder ``output``; run again, it resumes.

    Args:
        images: files, folders and patterns (``files.collect``).
        format: ``npy``, ``h5`` (hloc) or ``colmap``.
        list_file: text file with one image path per line, below ``root``.
        camera: camera of a COLMAP database, see ``ColmapDatabase``.
        half: store descriptors as float16 (``h5``).
        masks: folder of masks ``NAME.png`` or ``NAME.EXT.png`` (as COLMAP's) for ``NAME.EXT``; no
            keypoints where they are 0.
        pages: ``first`` page of each file, or ``all``, whose names end in ``#2``, ``#3``, ...
        overwrite: extract images with stored features again.
        workers: number of threads for reading and writing.

    Raises:
        ValueError, FileNotFoundError, DataError, ImportError, OSError: invalid arguments, or files
            that cannot be used; the message names the remedy.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if format == "colmap":
        refuse_rotation(options)
    load_mask = mask_loader(masks)
    found = collect(images, list_file, root, inside=format != "npy", pages=counted_pages(pages))
    report = ExtractReport(ignored=found.skipped, output=str(output / FILE_NAMES[format]))
    if found.tasks:
        extractor = options.build()
        settings = options.to_json()
        settings |= mask_settings(masks)
        if half and format == "h5":
            settings["half"] = True
        if format == "colmap":
            settings["camera"] = camera
        with create_features(
            format, output, camera=camera, half=half, overwrite=overwrite
        ) as store:
            check_store(store, settings, overwrite)
            if overwrite and format == "colmap":
                clear_features(store)
            notices = extract_to_store(
                found.tasks,
                extractor,
                store,
                report,
                described=options.described,
                load_mask=load_mask,
                masks=masks,
                overwrite=overwrite,
                workers=workers,
                progress=progress,
            )
            notices.log()
    report.failed = found.refused + report.failed
    return report


def mask_settings(masks: Path | None) -> dict[str, Any]:
    """What the record of extracted features says about their masks."""
    return {} if masks is None else {"masks": str(masks)}


def _mask_names(task: Task) -> tuple[str, str]:
    return f"{task.relative}.png", str(task.relative.with_suffix(".png"))


def find_mask(task: Task, folder: Path | None) -> Path | None:
    """The mask file of an image; None if there is none."""
    if folder is None:
        return None
    paths = (folder / name for name in _mask_names(task))
    return next((path for path in paths if path.is_file()), None)


def source_record(task: Task, masks: Path | None) -> dict[str, Any] | None:
    """Size and modification time of an image file and of its mask; None if the image is missing."""
    stamp = file_stamp(task.path)
    if stamp is None:
        return None
    record: dict[str, Any] = {"size": stamp[0], "mtime_ns": stamp[1]}
    mask = find_mask(task, masks)
    return record if mask is None else {**record, "mask": file_stamp(mask)}


def counted_pages(pages: str) -> Callable[[Path], int] | None:
    """The argument ``pages`` of ``files.collect`` for ``first`` or ``all`` pages.

    Raises:
        ValueError: another value.
    """
    if pages not in ("first", "all"):
        raise ValueError(f"pages must be first or all, got {pages!r}")

    def count(path: Path) -> int:
        try:
            return page_count(path)
        except (DataError, OSError):
            return 1  # reading it says why

    return count if pages == "all" else None


def refuse_rotation(options: ExtractOptions) -> None:
    """Raise for features of COLMAP whose coordinates are not those of the stored image.

    Raises:
        ValueError: EXIF orientations are applied.
    """
    if options.exif_orientation == "apply":
        raise ValueError(
            "COLMAP reads images as stored, so keypoints must be those of the stored image: use "
            "--exif-orientation ignore for a database; match finds the rotation of each pair"
        )


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
            names = " or ".join(str(folder / name) for name in _mask_names(task))
            raise DataError(f"no mask {names}")
        return read_mask(path)

    return load_mask


def _same_source(record: dict[str, Any], now: dict[str, Any]) -> bool:
    return all(record.get(key) == now.get(key) for key in ("size", "mtime_ns", "mask"))


def _select_tasks(
    tasks: list[Task],
    store: FeatureStore,
    log: RecordLog,
    report: ExtractReport,
    *,
    described: bool,
    masks: Path | None,
    overwrite: bool,
) -> deque[Task]:
    """The tasks to extract: those without features, and those whose image has changed since.

    Outdated features are removed first, with the matches of a database, so that a killed process
    leaves none.
    """
    todo: deque[Task] = deque()
    outdated, unrecorded = [], 0
    for task in tasks:
        name = str(task.relative)
        if not store.done(name, described=described):
            todo.append(task)
            continue
        record, now = log.get(name), source_record(task, masks)
        # an image that no longer exists keeps its features
        if record is not None and (now is None or _same_source(record, now)):
            if overwrite:
                todo.append(task)
            else:
                report.skipped += 1
            continue
        todo.append(task)
        outdated.append(name)
        unrecorded += record is None
    changed = len(outdated) - unrecorded
    report.changed += changed
    if overwrite:
        log.forget(str(task.relative) for task in todo)
    if outdated:
        log.forget(outdated)
        store.remove(outdated)
    for count, what in (
        (changed, "changed since the last extraction"),
        (unrecorded, "without a record of the extraction"),
    ):
        if count:
            logger.info("%d image%s %s; extracted again", count, "s" * (count > 1), what)
    return todo


# Everything that decides what is done with each task.
def extract_to_store(
    tasks: list[Task],
    extractor: Extractor,
    store: FeatureStore,
    report: ExtractReport,
    *,
    described: bool,
    load_mask: MaskLoader | None = None,
    masks: Path | None = None,
    overwrite: bool = False,
    workers: int = 2,
    progress: bool = True,
) -> Notices:
    """Extract each task to ``store``, with ``workers`` threads for reading and writing.

    Images with features of the same file are skipped (``images_path``). Images that cannot be read
    or extracted are added to ``report.failed``. Returns what users should know about the others.

    Args:
        masks: folder of the masks that ``load_mask`` reads.
    """
    started = time.monotonic()
    with RecordLog(images_path(store)) as log:
        todo = _select_tasks(
            tasks, store, log, report, described=described, masks=masks, overwrite=overwrite
        )

        def load(task: Task) -> _Loaded:
            # before the image is read, so that a replacement during the extraction is noticed
            record = source_record(task, masks)
            mask = None if load_mask is None else load_mask(task)
            return _Loaded(record, extractor.read(task.source), mask)

        def write(task: Task, features: Features, record: dict[str, Any] | None) -> None:
            digest = store.write(str(task.relative), features, task.path)
            log.put(str(task.relative), **(record or {}), features=digest)

        notices = _extract_tasks(
            todo, extractor, load, write, report, workers=workers, progress=progress
        )
    if any(task.page > 1 for task in tasks):
        notices.paged.clear()  # all pages are used
    report.seconds += time.monotonic() - started
    return notices


@dataclass
class _Loaded:
    """An image that has been read, with the record of its file and a mask from another file."""

    record: dict[str, Any] | None
    reading: Reading
    mask: Any


def _count_pixels(task: Task) -> int:
    """Number of pixels of an image; 0 if it cannot be read, which reading it reports."""
    try:
        width, height = image_size(task.source)
    except (OSError, DataError):
        return 0
    return width * height


def _extract_tasks(
    todo: deque[Task],
    extractor: Extractor,
    load: Callable[[Task], _Loaded],
    write: Callable[[Task, Features, dict[str, Any] | None], None],
    report: ExtractReport,
    *,
    workers: int,
    progress: bool,
) -> Notices:
    """Extract tasks, while threads load images and write features."""
    writing: deque[tuple[Task, Future[None]]] = deque()

    def finish_writes(limit: int) -> None:
        while len(writing) > limit:
            task, future = writing.popleft()
            try:
                future.result()
                report.done += 1
            except (OSError, DataError) as error:
                if is_disk_full(error):
                    raise OSError(
                        f"the features of {task.path} could not be written ({error}); free space "
                        "and run again: it resumes"
                    ) from error
                report.failed.append((str(task.path), f"results could not be written ({error})"))

    def extract(loaded: _Loaded) -> Features:
        mask = extractor.combine(loaded.reading, loaded.mask)
        features = extractor.extract_tensor(loaded.reading.pixels, [mask])[0]
        notices.add(task.relative, loaded.reading)
        return features

    notices = Notices()
    num_ahead = max(1, workers) + 1
    limit = image_pixels(None if extractor.options is None else extractor.options.memory)
    bar = Progress(len(todo), unit="image", label="extract", enabled=progress)
    with ThreadPoolExecutor(max(1, workers)) as pool, bar:
        for task, reading in _read_ahead(todo, load, pool, num_ahead, limit):
            try:
                features = extract(reading.result())
                record = reading.result().record
                report.keypoints += len(features)
                writing.append((task, pool.submit(write, task, features, record)))
            except (OSError, DataError, ValueError, RuntimeError, MemoryError) as error:
                reason = first_line(error)
                report.failed.append((str(task.path), reason))
                logger.debug("failed: %s: %s", task.path, reason)
            del reading  # holds the image
            finish_writes(2 * num_ahead)
            bar.update()
        finish_writes(0)
    return notices


def _read_ahead(
    todo: deque[Task],
    load: Callable[[Task], _Loaded],
    pool: ThreadPoolExecutor,
    depth: int,
    limit: int,
) -> Iterator[tuple[Task, Future[_Loaded]]]:
    """Read images in threads, at most ``depth`` ahead of their use and, unless it is a single one,
    with at most ``limit`` pixels in memory.
    """
    loading: deque[tuple[Task, int, Future[_Loaded]]] = deque()
    in_memory = 0
    while todo or loading:
        while todo and len(loading) < depth:
            pixels = _count_pixels(todo[0])
            if loading and in_memory + pixels > limit:
                break
            task = todo.popleft()
            in_memory += pixels
            loading.append((task, pixels, pool.submit(load, task)))
        task, pixels, future = loading.popleft()
        yield task, future
        del future  # holds the image
        in_memory -= pixels
