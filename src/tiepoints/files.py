"""Files: atomic writing, listing of images, paths of results, natural sorting, optional imports."""

from __future__ import annotations

import glob
import importlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import DataError

#: Suffixes of the image files of a folder; a file given by its name may have any suffix.
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".jp2", ".avif"),
    )
)


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional library.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs {library}: pip install 'tiepoints[{extra}]' ({error})"
        ) from error


#: Folders from which this process has removed the temporary files of killed ones.
_cleaned: set[str] = set()


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", platform.node())


def temporary_path(path: Path, suffix: str = "") -> Path:
    """Path of a temporary file next to ``path``; it names this computer and process."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.part{suffix}")


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files (``temporary_path``) whose process no longer runs on this computer
    from a folder; once per folder and process, so that many writes take linear time.
    """
    key = os.path.abspath(folder)
    if key in _cleaned:
        return
    _cleaned.add(key)
    pattern = re.compile(rf"\..+\.{re.escape(_host())}-(\d+)\.part(\.\w+)?", re.DOTALL)
    for path in folder.iterdir():
        found = pattern.fullmatch(path.name)
        if found is not None and not _is_running(int(found[1])):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # a process of another user
        return True
    return True


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Context manager: a temporary path that is renamed to ``path`` when the block ends.

    The folder is created, and temporary files of killed processes are removed from it. If the block
    fails, the temporary file is removed and an existing file at ``path`` is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    tmp_path = temporary_path(path)
    try:
        yield tmp_path
        os.replace(tmp_path, path)
    except BaseException:
        tmp_path.unlink(missing_ok=True)
        raise


def remove_temporary(path: Path) -> None:
    """Remove temporary files of killed writers of ``path``; only for the holder of its lock."""
    for tmp_path in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        tmp_path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) atomically."""
    with atomic_path(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically; values of other types than JSON's are written as text."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def natural(name: str) -> list[Any]:
    """Sort key for natural order: img2 before img10."""
    return [
        (1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)
    ]


def is_image_name(path: Path) -> bool:
    """Whether a file of a folder is an image, by its suffix; hidden files are not.

    Hidden files include the metadata files ``._NAME`` that macOS writes on other file systems.
    """
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def list_images(folder: Path, *, recursive: bool = True) -> tuple[list[Path], int]:
    """Images in a folder, sorted by path, and the number of other files; hidden folders are
    skipped.

    Raises:
        FileNotFoundError: no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images at {folder}")
    found = sorted(folder.rglob("*") if recursive else folder.iterdir())
    files = [path for path in found if path.is_file()]
    images = [
        path
        for path in files
        if is_image_name(path)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return images, len(files) - len(images)


@dataclass(frozen=True)
class Task:
    """An image file, and the relative path of its results."""

    path: Path
    relative: PurePosixPath


@dataclass
class Collected:
    """Images to process.

    Attributes:
        tasks: the images.
        refused: (name, reason) of arguments that cannot be used.
        skipped: number of files in folders that are not images.
    """

    tasks: list[Task] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    skipped: int = 0


def _inside(name: str) -> PurePosixPath:
    """``name`` as a path relative to the results folder.

    Raises:
        DataError: the path is outside that folder.
    """
    path = PurePosixPath(name.replace(os.sep, "/"))
    path = path.relative_to(path.anchor) if path.is_absolute() else path
    depth = 0
    for part in path.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            raise DataError(
                "its path is outside the results folder (../); list it relative to --root-images"
            )
    return PurePosixPath(os.path.normpath(str(path)))


class _Collector:
    """Adds images one by one; see ``collect``."""

    def __init__(self, root: Path | None, inside: bool):
        self.root, self.inside = root, inside
        self.tasks: dict[PurePosixPath, Task] = {}
        self.refused: list[tuple[str, str]] = []
        self.skipped = 0

    def add(self, path: Path, name: str) -> None:
        try:
            relative = _inside(name)
        except DataError as error:
            self.refused.append((name, str(error)))
            return
        known = self.tasks.get(relative)
        if known is not None and known.path.resolve() != path.resolve():
            reason = f"its results would overwrite those of {known.path}; extract to another folder"
            self.refused.append((str(path), reason))
            return
        self.tasks[relative] = Task(path, relative)

    def add_inside(self, path: Path, folder: Path) -> None:
        start = folder if self.root is None else self.root
        try:
            self.add(path, path.resolve().relative_to(start.resolve()).as_posix())
        except ValueError:
            self.refused.append((str(path), f"not inside --root-images {start}"))

    def add_named(self, path: Path) -> None:
        """Add a file given by its name or by a pattern."""
        if self.inside:
            self.add_inside(path, path.parent)
        elif path.is_absolute() or ".." in path.parts:
            self.add(path, path.name)
        else:
            self.add(path, str(path))

    def add_folder(self, folder: Path) -> None:
        base = folder.resolve().parent if folder.is_absolute() or ".." in folder.parts else None
        images, skipped = list_images(folder)
        self.skipped += skipped
        if not images:
            self.refused.append((str(folder), "no images in this folder"))
        for path in images:
            if self.inside:
                self.add_inside(path, folder)
            else:
                self.add(path, os.path.relpath(path.resolve() if base else path, base))


def collect(
    images: Iterable[str | os.PathLike],
    list_file: Path | None = None,
    root: Path | None = None,
    *,
    inside: bool = False,
) -> Collected:
    """Collect images from file names, folders, patterns and a list file.

    Lines of the list file are paths relative to ``root`` and become the paths of the results. Other
    results have the path as given, or, if that is absolute, from the name of the given folder on.
    With ``inside``, paths are relative to ``root`` or, without it, to the given folder, as hloc and
    COLMAP name images.

    Raises:
        FileNotFoundError: no list file.
    """
    found = _Collector(root, inside)
    for given in [str(image) for image in images]:
        named = os.path.exists(given)
        names = [given] if named else sorted(glob.glob(given, recursive=True))
        if not names:
            found.refused.append((given, "no such file, folder or pattern"))
        for path in map(Path, names):
            if path.is_dir():
                found.add_folder(path)
            elif len(names) > 1 and not is_image_name(path):
                found.skipped += 1  # matched by a pattern
            else:
                found.add_named(path)
    if list_file is not None:
        if not list_file.is_file():
            raise FileNotFoundError(f"no list of images at {list_file}")
        for line in list_file.read_text(encoding="utf-8-sig").splitlines():
            if name := line.strip():
                found.add(Path(name) if root is None else root / name, name)
    return Collected(list(found.tasks.values()), found.refused, found.skipped)
