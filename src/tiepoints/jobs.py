"""Extraction of many images to files: what to read, where to write, what is done already, what failed and why."""

from __future__ import annotations

import glob
import json
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .errors import DataError
from .extract import Extractor
from .formats.npy import write_features
from .image import load_image


@dataclass(frozen=True)
class Task:
    """One image: where it is, and its path below the results folder."""

    path: Path
    relative: PurePosixPath


@dataclass
class Report:
    """How a run went: images done, skipped because their results were there, and failures with reasons."""

    done: int = 0
    skipped: int = 0
    points: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def _inside(name: str) -> PurePosixPath:
    """``name`` as a path below the results folder.

    Raises:
        DataError: it would leave that folder.
    """
    path = PurePosixPath(name.replace(os.sep, "/"))
    path = path.relative_to(path.anchor) if path.is_absolute() else path
    depth = 0
    for part in path.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            raise DataError("its path leaves the results folder (../); list it below --root-images")
    return PurePosixPath(os.path.normpath(str(path)))


def collect(
    images: Iterable[str], list_file: Path | None = None, root: Path | None = None
) -> tuple[list[Task], list[tuple[str, str]]]:
    """Images named on the command line (files, folders, patterns) and in a list file, and those refused with a reason.

    Listed images lie below ``root`` and keep their line as their path; files and folders keep the path as typed, from
    the folder's own name on where that is absolute.

    Raises:
        FileNotFoundError: no list file.
    """
    tasks: dict[PurePosixPath, Task] = {}
    refused: list[tuple[str, str]] = []

    def add(path: Path, name: str) -> None:
        try:
            relative = _inside(name)
        except DataError as error:
            refused.append((name, str(error)))
            return
        known = tasks.get(relative)
        if known is not None and known.path.resolve() != path.resolve():
            refused.append((str(path), f"its results would overwrite those of {known.path}; extract them apart"))
            return
        tasks[relative] = Task(path, relative)

    kinds = set(Image.registered_extensions())
    for given in images:
        found = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        if not found:
            refused.append((given, "no such file, folder or pattern"))
        for name in found:
            path = Path(name)
            if path.is_dir():
                base = path.resolve().parent if path.is_absolute() or ".." in path.parts else Path()
                inner = sorted(p for p in path.rglob("*") if p.suffix.lower() in kinds and p.is_file())
                if not inner:
                    refused.append((name, "no image in this folder"))
                for p in inner:
                    add(p, os.path.relpath(p.resolve() if base != Path() else p, base))
            elif path.is_absolute() or ".." in path.parts:
                add(path, path.name)
            else:
                add(path, name)
    if list_file is not None:
        if not list_file.is_file():
            raise FileNotFoundError(f"no list of images at {list_file}")
        for line in list_file.read_text(encoding="utf-8-sig").splitlines():
            if name := line.strip():
                add((root / name) if root is not None else Path(name), name)
    return list(tasks.values()), refused


def check_settings(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Write ``settings.json`` of a results folder, or compare with the one there.

    Raises:
        DataError: the folder holds results made with other settings.
    """
    place = folder / "settings.json"
    if place.is_file() and not overwrite:
        try:
            before = json.loads(place.read_text())
        except ValueError as error:
            raise DataError(f"{place} is damaged ({error}); use --overwrite") from error
        if before != settings:
            keys = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
            changed = ", ".join(f"{k}: {before.get(k)} there, {settings.get(k)} now" for k in keys)
            raise DataError(
                f"{folder} holds results of other settings ({changed}); use --overwrite or another --method-name"
            )
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".settings.{os.getpid()}.part"
    beside.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(beside, place)


def extract_to_files(
    tasks: list[Task],
    extractor: Extractor,
    folder: Path,
    *,
    described: bool,
    overwrite: bool = False,
    workers: int = 2,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Extract each task into ``folder``; reading and writing run in ``workers`` threads beside the computing.

    An image that cannot be read or worked on becomes a line of the report; the others go on.
    """
    report = Report()
    todo: deque[Task] = deque()
    for task in tasks:
        base = folder / task.relative
        ready = base.with_name(base.name + ".kpt.npy").is_file()
        ready = ready and (not described or base.with_name(base.name + ".dsc.npy").is_file())
        if ready and not overwrite:
            report.skipped += 1
        else:
            todo.append(task)
    loading: deque[tuple[Task, Future[Tensor]]] = deque()
    writing: deque[tuple[Task, Future[None]]] = deque()

    def settle(limit: int) -> None:
        while len(writing) > limit:
            task, future = writing.popleft()
            try:
                future.result()
                report.done += 1
            except OSError as error:
                report.failed.append((str(task.path), f"results could not be written ({error})"))

    def write(task: Task, features) -> None:
        base = folder / task.relative
        base.parent.mkdir(parents=True, exist_ok=True)
        write_features(base, features)

    ahead = max(1, workers) + 1
    bar = tqdm(total=len(todo), unit="image", disable=not progress, dynamic_ncols=True)
    with ThreadPoolExecutor(max(1, workers)) as readers, ThreadPoolExecutor(max(1, workers)) as writers, bar:
        while todo or loading:
            while todo and len(loading) < ahead:
                task = todo.popleft()
                loading.append((task, readers.submit(load_image, task.path)))
            task, future = loading.popleft()
            try:
                features = extractor.extract(future.result())
                report.points += len(features)
                writing.append((task, writers.submit(write, task, features)))
            except (OSError, DataError, ValueError, RuntimeError, MemoryError) as error:
                report.failed.append((str(task.path), str(error).splitlines()[0] if str(error) else type(error).__name__))
                if say is not None:
                    say(f"failed: {task.path}: {report.failed[-1][1]}")
            settle(2 * ahead)
            bar.update(1)
        settle(0)
    return report
