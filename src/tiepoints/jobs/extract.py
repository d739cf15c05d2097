"""Extract features of many images to files."""

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
from ..names import FORMATS
from ..progress import Progress

logger = logging.getLogger(__name__)
#: Loads the mask (H,W) of an image, non-zero where keypoints are allowed; or None.
MaskLoader = Callable[[Task], Any]


@dataclass
class ExtractReport:
    """Result of an extraction.

    Attributes:
        done, skipped: number of images extracted, and of those with stored features.
        keypoints: number of keypoints of the images extracted.
        seconds: duration of the extraction.
        failed: (image, reason).
        ignored: number of files in the given folders that are not images.
        output: path of the features.
    """

    done: int = 0
    skipped: int = 0
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
    names = ("half", "camera", "masks", "mask_alpha")
    store: dict[str, Any] = {name: content[name] for name in names if name in content}
    options = {name: value for name, value in content.items() if name not in store}
    return {**ExtractOptions.from_json(options).to_json(), **store}


def check_store(store: Any, settings: dict[str, Any], overwrite: bool) -> None:
    """Record the settings of a store of features or matches, or compare them with its record.

    Raises:
        DataError: the store holds results of other settings.
    """
    matches = "features" in settings
    check_settings(
        settings_path(store),
        settings,
        overwrite=overwrite,
        clear=store.clear,
        results=store.path,
        normalize=normalize_match_settings if matches else normalize_settings,
    )


def normalize_match_settings(content: dict[str, Any]) -> dict[str, Any]:
    """Settings of matches with those of their features as written today; features of other
    programs have none.
    """
    features = content.get("features")
    if isinstance(features, dict) and "detector" in features:
        return {**content, "features": normalize_settings(features)}
    return content


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
    mask_alpha: bool = False,
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
        mask_alpha: no keypoints where an image is fully transparent.
        overwrite: extract images with stored features again.
        workers: number of threads for reading and writing.

    Raises:
        ValueError, FileNotFoundError, DataError, ImportError, OSError: invalid arguments, or files
            that cannot be used; the message names the remedy.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    load_mask = mask_loader(masks, mask_alpha)
    found = collect(images, list_file, root, inside=format != "npy")
    report = ExtractReport(ignored=found.skipped, output=str(output / FILE_NAMES[format]))
    if found.tasks:
        extractor = options.build()
        settings = options.to_json()
        settings |= mask_settings(masks, mask_alpha)
        if half and format == "h5":
            settings["half"] = True
        if format == "colmap":
            settings["camera"] = camera
        with create_features(format, output, camera=camera, half=half) as store:
            check_store(store, settings, overwrite)
            if overwrite and format == "colmap":
                store.clear()
            extract_to_store(
                found.tasks,
                extractor,
                store,
                report,
                described=options.described,
                load_mask=load_mask,
                overwrite=overwrite,
                workers=workers,
                progress=progress,
            )
    report.failed = found.refused + report.failed
    return report


def mask_settings(masks: Path | None, mask_alpha: bool) -> dict[str, Any]:
    """What the record of extracted features says about their masks."""
    settings: dict[str, Any] = {} if masks is None else {"masks": str(masks)}
    return {**settings, "mask_alpha": True} if mask_alpha else settings


def mask_loader(folder: Path | None, alpha: bool) -> MaskLoader | None:
    """The masks of images, from a folder and from their transparency; None without either.

    Raises:
        FileNotFoundError: no such folder.
    """
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"no folder of masks at {folder}")
    if folder is None and not alpha:
        return None

    def load_mask(task: Task) -> Any:
        opaque = load_alpha(task.path) if alpha else None
        if folder is None:
            return opaque
        names = (f"{task.relative}.png", str(task.relative.with_suffix(".png")))
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise DataError(f"no mask {folder / names[0]} or {folder / names[1]}")
        mask = load_image(path)[0, 0] != 0
        return mask if opaque is None else mask & opaque

    return load_mask


# Everything that decides what is done with each task.
def extract_to_store(
    tasks: list[Task],
    extractor: Extractor,
    store: FeatureStore,
    report: ExtractReport,
    *,
    described: bool,
    load_mask: MaskLoader | None = None,
    overwrite: bool = False,
    workers: int = 2,
    progress: bool = True,
) -> None:
    """Extract each task to ``store``, with ``workers`` threads for reading and writing.

    Images that cannot be read or extracted are added to ``report.failed``.
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
        return extractor.load(task.path), None if load_mask is None else load_mask(task)

    def finish_writes(limit: int) -> None:
        while len(writing) > limit:
            task, future = writing.popleft()
            try:
                future.result()
                report.done += 1
            except (OSError, DataError) as error:
                report.failed.append((str(task.path), f"results could not be written ({error})"))

    num_ahead = max(1, workers) + 1
    bar = Progress(len(todo), unit="image", label="extract", enabled=progress)
    with ThreadPoolExecutor(max(1, workers)) as pool, bar:
        while todo or loading:
            while todo and len(loading) < num_ahead:
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
            finish_writes(2 * num_ahead)
            bar.update()
        finish_writes(0)
    report.seconds += time.monotonic() - started
