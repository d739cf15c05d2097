"""Files: atomic writing, locks, listing of images, paths of results, natural sorting, optional
imports.
"""

from __future__ import annotations

import codecs
import errno
import glob
import importlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

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
    with suppress(OSError):  # a folder that cannot be listed
        for path in folder.iterdir():
            found = pattern.fullmatch(path.name)
            if found is not None and not _is_running(int(found[1])):
                with suppress(OSError):  # a file of another user
                    path.unlink()


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
    """Write a text file (UTF-8) atomically; names of files that are not UTF-8 keep their bytes."""
    with atomic_path(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically; values of other types than JSON's are written as text."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that no more bytes can be written: a full disk or a quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_space(folder: Path, size: int) -> None:
    """Check that ``size`` bytes can be written to ``folder``.

    For libraries that abort the process when a write fails; others report a full disk themselves.

    Raises:
        OSError: the disk is full or a quota is exhausted.
    """
    if hasattr(os, "posix_fallocate"):  # missing on macOS and Windows
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if is_disk_full(error):
                raise OSError(error.errno, error.strerror, str(folder)) from error
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def lock_file(file: IO[bytes], target: Path, *, shared: bool = False, holder: str = "") -> None:
    """Lock an open file until it is closed; without effect where locks are not supported.

    Args:
        file: the open file.
        target: what the lock protects, for the message.
        shared: exclude only holders of exclusive locks.
        holder: description of the process that holds an exclusive lock, for the message.

    Raises:
        DataError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"another run{holder} is writing {target}; wait until it ends") from error
    except OSError:  # a file system without locks
        return


def is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


class Lock:
    """Lock on a file or folder of results, held until ``close``; a context manager.

    A hidden file next to a file, or in a folder, is locked; the last holder removes it.

    Args:
        target: the file, or an existing folder.
        shared: exclude only holders of exclusive locks.

    Raises:
        DataError: another process holds the lock; the message has its number.
    """

    def __init__(self, target: Path, *, shared: bool = False):
        self.target, self.shared = target, shared
        inside = target.is_dir()
        self.path = target / ".lock" if inside else target.with_name(f".{target.name}.lock")
        self._file: IO[bytes] | None = None
        while self._file is None:
            file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
            try:
                self._acquire(file, shared)
            except BaseException:
                file.close()
                raise
            if is_at(file, self.path):
                self._file = file
            else:  # the previous holder removed it between opening and locking
                file.close()
        self._file.truncate(0)
        if not shared:
            with suppress(OSError):  # on a full disk, without the number
                self._file.write(str(os.getpid()).encode())

    def _acquire(self, file: IO[bytes], shared: bool) -> None:
        file.seek(0)
        number = file.read(20)
        holder = f" (process {number.decode()})" if number.isdigit() else ""
        lock_file(file, self.target, shared=shared, holder=holder)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Exclude also the holders of shared locks within the block.

        Raises:
            DataError: there are others.
        """
        assert self._file is not None
        lock_file(self._file, self.target)
        try:
            yield
        finally:
            lock_file(self._file, self.target, shared=self.shared)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock, and remove its file unless others hold it."""
        if self._file is not None:
            with suppress(DataError):
                lock_file(self._file, self.target)
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def is_text(name: str) -> bool:
    """Whether a file name is valid Unicode; HDF5 and SQLite store no others."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


#: Reason for which an image whose name is not ``is_text`` is refused.
NOT_TEXT = "its name is not valid UTF-8; rename it"


def printable(name: str) -> str:
    """A file name for messages; other bytes than UTF-8, and control characters, are escaped."""

    def escape(character: str) -> str:
        if "\udc80" <= character <= "\udcff":  # an undecodable byte of a file name
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character.encode("unicode_escape").decode()

    return "".join(c if c.isprintable() else escape(c) for c in name)


#: What is wrong with a file for which ``is_lfs_pointer``, for a message that begins with its path.
LFS_POINTER = "is a Git LFS pointer, not the file itself; get it with `git lfs pull`"


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file with these first bytes is the placeholder of one that Git LFS stores."""
    return start.startswith(b"version https://git-lfs")


def natural(name: str) -> list[Any]:
    """Sort key for natural order: img2 before img10."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def is_image_name(path: Path) -> bool:
    """Whether a file of a folder is an image, by its suffix; hidden files are not.

    Hidden files include the metadata files ``._NAME`` that macOS writes on other file systems.
    """
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


#: Suffixes of photographs that cannot be read.
UNREADABLE_PHOTOS = frozenset(
    ".heic .heif .arw .cr2 .cr3 .dng .nef .orf .raf .rw2".split()  # noqa: SIM905
)


class Listing(NamedTuple):
    """Content of a folder.

    Attributes:
        images: the image files, sorted by path.
        skipped: number of other files, without those in hidden folders.
        refused: (path, reason) of links, folders and photographs that cannot be read.
    """

    images: list[Path]
    skipped: int
    refused: list[tuple[str, str]]


def list_images(folder: Path, *, recursive: bool = True) -> Listing:
    """List the images in a folder; hidden folders are skipped, and symbolic links are followed.

    Images have the paths of the links. A folder that links lead to several times, such as by a
    loop, is read once.

    Raises:
        FileNotFoundError: no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images at {folder}")
    images: list[Path] = []
    unreadable: list[Path] = []
    refused: list[tuple[str, str]] = []
    skipped = 0
    seen: dict[str, Path] = {}
    pending, links = [folder], list[Path]()
    while pending or links:
        # links last, so that a folder is read under its own name if possible
        current = pending.pop() if pending else links.pop(0)
        first = seen.setdefault(os.path.realpath(current), current)
        if first is not current:
            refused.append((str(current), f"a link to a folder that is read as {first}"))
            continue
        try:
            entries = list(os.scandir(current))
        except OSError as error:
            refused.append((str(current), f"cannot be read ({error.strerror})"))
            continue
        for entry in entries:
            path = current / entry.name
            if entry.name.startswith("."):
                skipped += not path.is_dir()
            elif not entry.is_symlink() and entry.is_dir():
                pending += [path] * recursive
            elif path.is_dir():
                links += [path] * recursive
            elif not path.is_file() and entry.is_symlink():
                refused.append((str(path), "a broken link"))
            elif is_image_name(path) and path.is_file():
                images.append(path)
            elif path.suffix.lower() in UNREADABLE_PHOTOS:
                unreadable.append(path)
            else:
                skipped += 1
    # cameras write a JPEG file of the same name next to a raw one
    readable = {path.with_suffix("") for path in images}
    photos = [path for path in unreadable if path.with_suffix("") not in readable]
    skipped += len(unreadable) - len(photos)
    if photos:
        formats = ", ".join(sorted({path.suffix for path in photos}))
        count = f"{len(photos)} photograph{'s' * (len(photos) > 1)}"
        reason = f"{count} in a format that cannot be read ({formats}); convert to JPEG"
        refused.append((str(folder), reason))
    return Listing(sorted(images), skipped, sorted(refused))


@dataclass(frozen=True)
class Task:
    """An image file, and the relative path of its results.

    Attributes:
        path: the file.
        relative: the name of the image, ``NAME#2`` for page 2 of the file ``NAME``.
        page: page of the file, from 1.
        inner: the path in the given folder, by which its mask is named; None: ``relative``.
    """

    path: Path
    relative: PurePosixPath
    page: int = 1
    inner: PurePosixPath | None = None

    @property
    def source(self) -> Path:
        """The argument of ``image.read_image``."""
        return self.path if self.page == 1 else self.path.with_name(f"{self.path.name}#{self.page}")


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

    def __init__(self, root: Path | None, inside: bool, pages: Callable[[Path], int] | None = None):
        self.root, self.inside, self.pages = root, inside, pages
        self.tasks: dict[PurePosixPath, Task] = {}
        self.refused: list[tuple[str, str]] = []
        self.skipped = 0

    def add(self, path: Path, name: str, inner: str | None = None) -> None:
        if self.inside and not is_text(name):
            self.refused.append((str(path), NOT_TEXT))
            return
        try:
            relative = _inside(name)
        except DataError as error:
            self.refused.append((name, str(error)))
            return
        known = self.tasks.get(relative)
        if known is not None and known.path.resolve() != path.resolve():
            reason = (
                f"its results would overwrite those of {known.path}; name results relative to a "
                "folder of both (--root-images), or extract to another folder"
            )
            self.refused.append((str(path), reason))
            return
        in_folder = relative if inner is None else PurePosixPath(inner)
        self.tasks[relative] = Task(path, relative, inner=in_folder)
        for page in range(2, 1 + (1 if self.pages is None else self.pages(path))):
            paged = relative.with_name(f"{relative.name}#{page}")
            own = in_folder.with_name(f"{in_folder.name}#{page}")
            self.tasks[paged] = Task(path, paged, page, own)

    def add_inside(self, path: Path, folder: Path) -> None:
        start = folder if self.root is None else self.root
        name = _relative(path, start)
        if name is None:
            self.refused.append((str(path), f"not inside --root-images {start}"))
        else:
            self.add(path, name)

    def add_named(self, path: Path) -> None:
        """Add a file given by its name or by a pattern."""
        if self.inside:
            self.add_inside(path, path.parent)
        elif path.is_absolute() or ".." in path.parts:
            self.add(path, path.name, self._inner(path, path.parent))
        else:
            self.add(path, str(path), self._inner(path, path.parent))

    def add_folder(self, folder: Path) -> None:
        images, skipped, refused = list_images(folder)
        self.skipped += skipped
        self.refused += refused
        if not images:
            self.refused.append((str(folder), "no images in this folder"))
        base: str | Path = folder
        if ".." in folder.parts:
            base = folder.resolve().name
        elif folder.is_absolute():
            base = folder.name
        for path in images:
            if self.inside:
                self.add_inside(path, folder)
            else:
                name = os.path.join(base, path.relative_to(folder))
                self.add(path, name, self._inner(path, folder))

    def _inner(self, path: Path, folder: Path) -> str | None:
        """Name of a file relative to the root, or without one to the folder that was given."""
        return _relative(path, folder if self.root is None else self.root)


def _relative(path: Path, start: Path) -> str | None:
    """Name of a file relative to a folder, as linked if it lies in the folder; None if outside."""
    parent = path.parent.resolve() / path.name
    for inner, outer in (
        (Path(os.path.abspath(path)), Path(os.path.abspath(start))),
        (parent, start.resolve()),
        (path.resolve(), start.resolve()),
    ):
        if inner.is_relative_to(outer):
            return inner.relative_to(outer).as_posix()
    return None


def collect(
    images: Iterable[str | os.PathLike],
    list_file: Path | None = None,
    root: Path | None = None,
    *,
    inside: bool = False,
    pages: Callable[[Path], int] | None = None,
) -> Collected:
    """Collect images from file names, folders, patterns and a list file.

    Lines of the list file are paths relative to ``root`` and become the paths of the results. Other
    results have the path as given, or, if that is absolute, from the name of the given folder on.
    With ``inside``, paths are relative to ``root`` or, without it, to the given folder, as hloc and
    COLMAP name images. With ``pages``, the number of pages of a file, each page is an image.

    Raises:
        FileNotFoundError: no list file.
    """
    found = _Collector(root, inside, pages)
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
        # as file names are decoded: other bytes than UTF-8 are valid
        text = os.fsdecode(list_file.read_bytes().removeprefix(codecs.BOM_UTF8))
        names = [name for line in text.split("\n") if (name := line.strip())]
        if not names:
            found.refused.append((str(list_file), "lists no images"))
        for name in names:
            found.add(Path(name) if root is None else root / name, name)
    return Collected(list(found.tasks.values()), found.refused, found.skipped)
