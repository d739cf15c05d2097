"""Records of what made a result, stored next to it.

A store of features or matches has two text files: ``settings.json``, the options, weights and
version that all of its results have in common, and a log (``.jsonl``) with a line for each image:
size and modification time of the image file, and a digest of its features. A result counts as done
only if its record agrees with the present weights, options and files; results without a record were
written by another program.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

PROGRAM = "tiepoints"
#: Entries of a settings file that are not compared as options.
INFORMATION = ("program", "version", "source")


@cache
def program_version() -> str:
    """Version of this package."""
    from importlib.metadata import version

    return version(PROGRAM)


def compatible(version: Any) -> bool:
    """Whether results of a version are those of this one: major and minor number agree. Records of
    the first versions have none.
    """
    if version is None:
        return True
    return str(version).split(".")[:2] == compatible_version().split(".")


def compatible_version() -> str:
    """Major and minor number of the version of this package."""
    return ".".join(program_version().split(".")[:2])


def record_path(results: Path, end: str) -> Path:
    """Path of the record ``end`` (such as ``settings.json``) of a file of results: ``NAME.end`` for
    ``NAME.h5``, and ``FILE.end`` for others, so that ``NAME.h5`` and ``NAME.db`` have their own.
    """
    name = results.stem if results.suffix == ".h5" else results.name
    return results.with_name(f"{name}.{end}")


def read_settings(path: Path) -> dict[str, Any] | None:
    """Content of a settings file; None if it is missing, unreadable or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def with_program(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the name and version of this package, as they are written."""
    return {**settings, "program": PROGRAM, "version": program_version()}


def without_information(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the entries that are not compared."""
    return {key: value for key, value in settings.items() if key not in INFORMATION}


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Describe the differences of two settings, one text for each option."""
    found = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "digests":
            found += _changed_weights(before, now, prefix)
        elif isinstance(old, dict) and isinstance(new, dict):
            if "foreign" in {**old, **new}:
                found.append(f"{prefix}{key}: {_features(old)} before, {_features(new)} now")
            else:
                found += changes(old, new, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}: {_shown(old)} before, {_shown(new)} now")
    return found


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def _features(settings: dict[str, Any]) -> str:
    """Describe the features of a record in a few words."""
    if settings.get("foreign"):
        return f"those of another program in {settings.get('path')}"
    return f"{settings.get('detector')} + {settings.get('descriptor')}"


def _changed_weights(before: dict[str, Any], now: dict[str, Any], prefix: str) -> list[str]:
    """Describe weights that were replaced under the same name; other names are other options."""
    old, new = (
        found if isinstance(found := settings.get("digests"), dict) else {}
        for settings in (before, now)
    )
    return [
        f"the weights of the {prefix}{role} {now.get(role)} were replaced: SHA-256 "
        f"{str(old[role])[:12]}... before, {new[role][:12]}... now"
        for role in old
        if role in new and old[role] != new[role] and before.get(role) == now.get(role)
    ]


def array_digest(*arrays: np.ndarray) -> str:
    """Digest of the type, shape and content of arrays."""
    found = hashlib.blake2b(digest_size=12)
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def json_digest(content: Any) -> str:
    """Digest of a JSON value."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def file_stamp(path: Path) -> list[int] | None:
    """Size and modification time (ns) of a file; None if it is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def files_digest(paths: Iterable[Path]) -> str:
    """Digest of the names, sizes and modification times of files, not of the folders they are
    in.
    """
    return json_digest(sorted([path.name, file_stamp(path)] for path in paths))


class RecordLog:
    """Append-only text file with one JSON object per line: a record by name.

    The last line of a name is valid. An incomplete line, which a killed process leaves, is ignored.

    Args:
        path: the file; it is created by the first ``put``.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        self._file: Any = None
        self._lock = threading.Lock()
        content = path.read_bytes() if path.is_file() else b""
        self._complete = not content or content.endswith(b"\n")
        for line in content.split(b"\n"):
            self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            name = entry.pop("name")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return
        if not isinstance(name, str):
            return
        if entry:
            self.entries[name] = entry
        else:
            self.entries.pop(name, None)

    def __enter__(self) -> RecordLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, name: str) -> dict[str, Any] | None:
        """The record of a name; None if there is none."""
        return self.entries.get(name)

    def put(self, name: str, **entry: Any) -> None:
        """Append the record of a name.

        Raises:
            OSError: the disk is full or not writable; earlier records are unchanged.
        """
        self._write([{"name": name, **entry}])
        self.entries[name] = entry

    def forget(self, names: Iterable[str]) -> None:
        """Remove the records of names."""
        known = [name for name in names if name in self.entries]
        self._write([{"name": name} for name in known])
        for name in known:
            del self.entries[name]

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        with self._lock:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            if not self._complete:
                data = b"\n" + data  # after an incomplete line
            self._complete = False
            rest = memoryview(data)
            while rest:  # a full disk is an error of the next attempt
                rest = rest[self._file.write(rest) :]
            self._complete = True

    def clear(self) -> None:
        """Remove all records."""
        self.close()
        self.path.unlink(missing_ok=True)
        self.entries.clear()
        self._complete = True

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
