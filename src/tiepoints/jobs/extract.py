"""Features of many images to files."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DataError
from ..extract import ExtractOptions, Extractor
from ..files import Task, collect
from ..formats.store import FILE_NAMES, FeatureStore, check_settings, create_features, settings_path
from ..image import load_alpha, load_image
from ..progress import Progress

logger = logging.getLogger(__name__)
#: Gives the mask of an image: (H,W), non-zero where keypoints may lie, or None.
MaskOf = Callable[[Task], Any]


@dataclass
class ExtractReport:
    """How a run went.

    Attributes:
        done, skipped: images extracted, and those whose features were stored before.
        keypoints: number of keypoints of the images extracted.
        seconds: duration of the extraction.
        failed: (image, reason).
        ignored: files in the folders given that are no images.
        output: where the features are.
    """

    done: int = 0
    skipped: int = 0
    keypoints: int = 0
    seconds: float = 0.0
    failed: list[tuple[str, str]] = field(default_factory=list)
    ignored: int = 0
    output: str = ""


def normalize_settings(content: dict[str, Any]) -> dict[str, Any]:
    """Settings of extraction as written today, from those of this or an earlier version.

    Raises:
        TypeError, ValueError: they are none.
    """
    names = ("half", "camera")
    store: dict[str, Any] = {name: content[name] for name in names if name in content}
    options = {name: value for name, value in content.items() if name not in store}
    return {**ExtractOptions.from_json(options).to_json(), **store}


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
    mask_alpha: bool = False,
    overwrite: bool = False,
    workers: int = 2,
    progress: bool = True,
) -> ExtractReport:
    """Extract images into the folder ``output``; run again, it resumes.

    Args:
        images: files, folders and patterns (``files.collect``).
        format: ``npy``, ``h5`` (hloc) or ``colmap``.
        list_file: text file with one image path per line, below ``root``.
        camera: of COLMAP's database, see ``ColmapDatabase``.
        half: descriptors as float16 (``h5``).
        masks: folder of masks, ``NAME.png`` or ``NAME.EXT.png`` (COLMAP's) for ``NAME.EXT``;
            keypoints lie where they are not 0.
        mask_alpha: keypoints lie where an image is not fully transparent.
        overwrite: extract again what is stored.
        workers: threads that read and write.

    Raises:
        ValueError, FileNotFoundError, DataError, ImportError, OSError: nothing can be done; the
            message has the remedy.
    """
    if masks is not None and not masks.is_dir():
        raise FileNotFoundError(f"no folder of masks at {masks}")
    found = collect(images, list_file, root, inside=format != "npy")
    report = ExtractReport(ignored=found.skipped, output=str(output / FILE_NAMES[format]))
    if found.tasks:
        extractor = options.build()
        settings = options.to_json()
        if half and format == "h5":
            settings["half"] = True
        if format == "colmap":
            settings["camera"] = camera
        with create_features(format, output, camera=camera, half=half) as store:
            check_settings(
                settings_path(store),
                settings,
                overwrite=overwrite,
                clear=store.clear,
                results=store.path,
                normalize=normalize_settings,
            )
            if overwrite and format == "colmap":
                store.clear()
            extract_to_store(
                found.tasks,
                extractor,
                store,
                report,
                described=options.described,
                mask_of=_mask_source(masks, mask_alpha),
                overwrite=overwrite,
                workers=workers,
                progress=progress,
            )
    report.failed = found.refused + report.failed
    return report


def _mask_source(folder: Path | None, alpha: bool) -> MaskOf | None:
    if folder is None and not alpha:
        return None

    def mask_of(task: Task) -> Any:
        transparent = load_alpha(task.path) if alpha else None
        if folder is None:
            return transparent
        names = (f"{task.relative}.png", str(task.relative.with_suffix(".png")))
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise DataError(f"no mask {folder / names[0]} or {folder / names[1]}")
        mask = load_image(path)[0, 0] != 0
        return mask if transparent is None else mask & transparent

    return mask_of


def extract_to_store(
    tasks: list[Task],
    extractor: Extractor,
    store: FeatureStore,
    report: ExtractReport,
    *,
    described: bool,
    mask_of: MaskOf | None = None,
    overwrite: bool = False,
    workers: int = 2,
    progress: bool = True,
) -> None:
    """Extract each task into ``store``; ``workers`` threads read and write meanwhile.

    An image that cannot be read or extracted becomes a line of the report; the others are done.
    """
    started = time.monotonic()
    todo: deque[Task] = deque()
    for task in tasks:
        if store.done(str(task.relative), described=described) and not overwrite:
            report.skipped += 1
        else:
            todo.append(task)
    loading: deque[tuple[Task, Future[tuple[Tensor, Any]]]] = deque()
    writing: deque[tuple[Task, Future[None]]] = deque()

    def load(task: Task) -> tuple[Tensor, Any]:
        return load_image(task.path), None if mask_of is None else mask_of(task)

    def finish_writes(limit: int) -> None:
        while len(writing) > limit:
            task, future = writing.popleft()
            try:
                future.result()
                report.done += 1
            except (OSError, DataError) as error:
                report.failed.append((str(task.path), f"results could not be written ({error})"))

    ahead = max(1, workers) + 1
    bar = Progress(len(todo), unit="image", label="extract", enabled=progress)
    with ThreadPoolExecutor(max(1, workers)) as pool, bar:
        while todo or loading:
            while todo and len(loading) < ahead:
                task = todo.popleft()
                loading.append((task, pool.submit(load, task)))
            task, future = loading.popleft()
            try:
                image, mask = future.result()
                features = extractor.extract_tensor(image, [mask])[0]
                report.keypoints += len(features)
                write = pool.submit(store.write, str(task.relative), features, task.path)
                writing.append((task, write))
            except (OSError, DataError, ValueError, RuntimeError, MemoryError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                report.failed.append((str(task.path), reason))
                logger.debug("failed: %s: %s", task.path, reason)
            finish_writes(2 * ahead)
            bar.update()
        finish_writes(0)
    report.seconds += time.monotonic() - started
