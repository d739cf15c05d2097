"""Extract features of many images to files."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..decode import page_count
from ..errors import DataError
from ..exif import shared_cameras
from ..extract import ExtractOptions, Extractor, recorded_precision
from ..files import Task, collect, is_disk_full
from ..formats.colmap import ColmapDatabase
from ..formats.hdf5 import FeatureFile
from ..formats.npy import FeatureFolder
from ..formats.records import RecordLog
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
from ..image import Notices
from ..names import FORMATS
from ..progress import Progress
from .images import ImageExtractor, Outcome, mask_loader, source_record
from .shards import FeatureShards, Shard, blocks
from .workers import check_workers, extract_tasks, has_named_networks

logger = logging.getLogger(__name__)
#: Images whose features wait to be written while others are extracted.
MAX_WRITES = 6


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
    workers: int | None = 1,
    shard: Shard | None = None,
    ray: str | None = None,
    progress: bool = True,
) -> ExtractReport:
    """Extract images to the folder ``output``; run again, it resumes.

    Args:
        images: files, folders and patterns (``files.collect``).
        format: ``npy``, ``h5`` (hloc) or ``colmap``.
        list_file: text file with one image path per line, below ``root``.
        camera: of a COLMAP database: ``auto`` (``exif.shared_cameras``), ``per-image``, or as that
            of ``ColmapDatabase``.
        half: store descriptors as float16 (``h5``).
        masks: folder of masks ``NAME.png`` or ``NAME.EXT.png`` (as COLMAP's) for ``NAME.EXT``; no
            keypoints where they are 0.
        pages: ``first`` page of each file, or ``all``, whose names end in ``#2``, ``#3``, ...
        overwrite: extract images with stored features again.
        workers: number of processes that extract images; None = one for each core, if there are
            enough images and memory. The features do not depend on it. A script that uses more
            than one must be protected by ``if __name__ == "__main__"``.
        shard: extract only this part of the images, as one of several jobs, to a file of its own
            (``shards``). The extraction without a shard then merges them.
        ray: extract on a Ray cluster: its address, or ``auto`` (``cluster.connect``); ``workers``
            is then the number of its workers.

    Raises:
        ValueError, FileNotFoundError, DataError, ImportError, OSError: invalid arguments, or files
            that cannot be used; the message names the remedy.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if format == "colmap":
        refuse_rotation(options)
    mask_loader(masks)  # raises before any work
    found = collect(images, list_file, root, inside=format != "npy", pages=counted_pages(pages))
    report = ExtractReport(ignored=found.skipped, output=str(output / FILE_NAMES[format]))
    if shard is not None and ray is not None:
        raise ValueError("a shard is one of several jobs, and Ray has its own; give one of the two")
    tasks = found.tasks if shard is None else shard.of(found.tasks)
    if tasks:
        extractor = options.build()
        if ray is None:
            check_workers(workers, extractor)
        settings = options.to_json()
        settings |= mask_settings(masks)
        if half and format == "h5":
            settings["half"] = True
        if format == "colmap":
            settings["camera"] = camera
        results = output / FILE_NAMES[format]
        merging = shard is None and format != "npy"
        shards = None
        with ExitStack() as stack:
            store: FeatureStore
            if shard is None or format == "npy":
                store = create_features(
                    format,
                    output,
                    camera=camera,
                    shared=camera_keys(camera, found.tasks) if format == "colmap" else None,
                    half=half,
                    overwrite=overwrite,
                )
            else:
                path = shard.path(results)
                store = FeatureFile(path, write=True, half=half, overwrite=overwrite)
                report.output = str(path)
            stack.enter_context(store)
            check_store(store, settings, overwrite)
            if overwrite and isinstance(store, ColmapDatabase):
                clear_features(store)
            if merging:
                shards = stack.enter_context(
                    FeatureShards(results, settings, normalize_settings, overwrite=overwrite)
                )
            notices = extract_to_store(
                tasks,
                extractor,
                store,
                report,
                described=options.described,
                masks=masks,
                overwrite=overwrite,
                workers=workers,
                shards=shards,
                ray=ray,
                progress=progress,
            )
            assign_cameras(store, tasks, camera)
            notices.log()
        if shards is not None:
            shards.remove({str(task.relative) for task in tasks})
    report.failed = found.refused + report.failed
    return report


def camera_keys(camera: str, tasks: Iterable[Task]) -> dict[str, Any]:
    """Keys of the images that share a camera in a database, see ``ColmapDatabase``."""
    if camera != "auto":
        return {}
    return shared_cameras({str(task.relative): task.source for task in tasks})


def assign_cameras(store: FeatureStore, tasks: Iterable[Task], camera: str) -> dict[str, Any]:
    """Give the images of a database the cameras that they would have in a new one, also those that
    are not among ``tasks`` but still exist; returns the key of the camera of each.

    Matches of images that had other cameras are verified, and their keypoints refined, by the next
    matching.
    """
    if not isinstance(store, ColmapDatabase):
        return {}
    files = {str(task.relative): task.source for task in tasks}
    absolute = ((name, Path(os.path.abspath(file))) for name, file in files.items())
    # folders to which names are relative
    roots = {
        file.parents[len(Path(name).parts) - 1]
        for name, file in absolute
        if file.as_posix().endswith(f"/{name}")
    }
    for name in store.names():
        if name not in files:
            found = (root / name for root in sorted(roots) if (root / name).is_file())
            if (file := next(found, None)) is not None:
                files[name] = file
    shared = shared_cameras(files) if camera == "auto" else {}
    store.assign_cameras(files, shared)
    return shared


def mask_settings(masks: Path | None) -> dict[str, Any]:
    """What the record of extracted features says about their masks."""
    return {} if masks is None else {"masks": str(masks)}


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
    masks: Path | None = None,
    overwrite: bool = False,
    workers: int | None = 1,
    shards: FeatureShards | None = None,
    ray: str | None = None,
    progress: bool = True,
) -> Notices:
    """Extract each task to ``store``; only this process writes to it.

    Images with features of the same file are skipped (``images_path``). Images that cannot be read
    or extracted are added to ``report.failed``. Returns what users should know about the others.

    Args:
        masks: folder of masks, see ``extract_images``.
        workers, ray: see ``extract_images``.
        shards: features that are written instead of extracting the images.

    Raises:
        ValueError: more than one worker is not possible.
        FileNotFoundError: no folder of masks.
    """
    started = time.monotonic()
    with RecordLog(images_path(store)) as log:
        todo = _select_tasks(
            tasks, store, log, report, described=described, masks=masks, overwrite=overwrite
        )

        def write(task: Task, outcome: Outcome) -> None:
            assert outcome.features is not None
            digest = store.write(str(task.relative), outcome.features, task.path)
            log.put(str(task.relative), **(outcome.record or {}), features=digest)

        notices = Notices()
        if shards is not None:
            todo = _take_over(todo, shards, store, log, report, masks)
        with Progress(len(todo), unit="image", label="extract", enabled=progress) as bar:
            if ray is None:
                outcomes = extract_tasks(todo, ImageExtractor(extractor, masks), workers)
                _write_outcomes(outcomes, write, report, notices, bar)
            elif todo:
                work = _RayExtraction(extractor, store, described, masks, workers, ray, shards)
                ended = _extract_on_ray(todo, work, report, notices, bar)
                if shards is not None:
                    shards.scan()
                    todo = _take_over(todo, shards, store, log, report, masks)
                _add_lost(todo, store, report, ended)
    if any(task.page > 1 for task in tasks):
        notices.paged.clear()  # all pages are used
    report.seconds += time.monotonic() - started
    return notices


def _take_over(
    todo: deque[Task],
    shards: FeatureShards,
    store: FeatureStore,
    log: RecordLog,
    report: ExtractReport,
    masks: Path | None,
) -> deque[Task]:
    """Write the features of shards to the store; returns the tasks without."""
    rest: deque[Task] = deque()
    for task in todo:
        name = str(task.relative)
        found = shards.read(name, source_record(task, masks))
        if found is None:
            rest.append(task)
            continue
        features, record = found
        digest = store.write(name, features, task.path)
        log.put(name, **record, features=digest)
        report.done += 1
        report.keypoints += len(features)
    return rest


@dataclass(frozen=True)
class _RayExtraction:
    """What extracts tasks on a Ray cluster; fields as the parameters of ``extract_to_store``."""

    extractor: Extractor
    store: FeatureStore
    described: bool
    masks: Path | None
    workers: int | None
    address: str
    shards: FeatureShards | None


def _extract_on_ray(
    todo: deque[Task],
    work: _RayExtraction,
    report: ExtractReport,
    notices: Notices,
    bar: Progress,
) -> str:
    """Extract tasks to shards, or to the files of a folder, on a Ray cluster; returns why workers
    have ended that could not complete their shard, empty if there were none.

    Raises:
        ValueError: networks in memory.
    """
    from .cluster import MAX_IMAGES, Lost, connect

    if not has_named_networks(work.extractor):
        raise ValueError("a network in memory is used by one process; save it to a file for Ray")
    options = work.extractor.options
    assert options is not None
    tasks = list(todo)
    with connect(work.address, device=options.device, workers=work.workers) as cluster:
        results = work.store.path if work.shards is None else work.shards.results
        jobs = [
            (results if work.shards is None else shard.path(results), part)
            for shard, part in blocks(tasks, cluster.shard_size(len(tasks), MAX_IMAGES))
        ]
        settings = None if work.shards is None else work.shards.settings
        arguments = cluster.worker_options(options), work.masks, work.described, settings
        lost = ""
        for found in cluster.run(_shard_extractor, arguments, jobs):
            if isinstance(found, Lost):
                lost = found.reason
                continue
            done, noted = found
            report.failed += done.failed
            notices.merge(noted)
            bar.update(done.done + done.skipped + len(done.failed))
            if work.shards is None:  # else counted when they are taken over
                report.done += done.done + done.skipped
                report.keypoints += done.keypoints
    return lost


def _add_lost(todo: deque[Task], store: FeatureStore, report: ExtractReport, ended: str) -> None:
    """Add the tasks to ``report.failed`` that were neither extracted nor failed."""
    failed = {path for path, _ in report.failed}
    reason = (
        f"the Ray workers that extracted it, or others of its shard, ended ({ended}); run again, "
        "without --ray to find the image that ends them"
    )
    report.failed += [
        (str(task.path), reason)
        for task in todo
        if str(task.path) not in failed and not store.done(str(task.relative), described=False)
    ]


def _shard_extractor(
    options: ExtractOptions, masks: Path | None, described: bool, settings: dict[str, Any] | None
) -> Callable[[tuple[Path, list[Task]]], tuple[ExtractReport, Notices]]:
    """The work of a Ray worker: it extracts tasks to the file of a shard, or without ``settings``
    to a folder, and resumes what an ended worker has begun.
    """
    extractor = options.build()

    def extract(job: tuple[Path, list[Task]]) -> tuple[ExtractReport, Notices]:
        path, tasks = job
        report = ExtractReport()
        store: FeatureStore
        if settings is None:
            store = FeatureFolder(path, write=True)
        else:
            store = FeatureFile(path, write=True, half=settings.get("half", False))
        with store:
            if settings is not None:
                check_store(store, settings, overwrite=False)
            notices = extract_to_store(
                tasks, extractor, store, report, described=described, masks=masks, progress=False
            )
        return report, notices

    return extract


def _write_outcomes(
    outcomes: Generator[tuple[Task, Outcome], None, None],
    write: Callable[[Task, Outcome], None],
    report: ExtractReport,
    notices: Notices,
    bar: Progress,
) -> None:
    """Write features in a thread, while others are extracted."""
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

    # one thread: the order of the images in a file does not depend on the time they take
    with ThreadPoolExecutor(1) as pool, closing(outcomes):
        for task, outcome in outcomes:
            if outcome.features is None:
                report.failed.append((str(task.path), outcome.reason))
                logger.debug("failed: %s: %s", task.path, outcome.reason)
            else:
                report.keypoints += len(outcome.features)
                assert outcome.reading is not None
                notices.add(task.relative, outcome.reading)
                writing.append((task, pool.submit(write, task, outcome)))
            finish_writes(MAX_WRITES)
            bar.update()
        finish_writes(0)
