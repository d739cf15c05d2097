"""Files next to a COLMAP database about the refinement of its keypoints: their detected positions,
and the images for which it is pending.

Without the positions, each refinement would start from the result of the one before. COLMAP's
tables have no place for them, and its own copy of SQLite has the database open.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..files import require_space, write_json
from .records import read_settings, record_path

#: Bytes that a transaction needs in addition to its data.
TRANSACTION_BYTES = 2**16


class PositionFile:
    """Positions (N,2) float64 by image, with a digest of the features that they belong to.

    Args:
        results: the COLMAP database; the file is created with the first positions.
    """

    def __init__(self, results: Path):
        self.path = record_path(results, "detected.sqlite")
        self._digests: dict[str, str] | None = None

    @property
    def digests(self) -> dict[str, str]:
        """Image -> digest of its features.

        Raises:
            DataError: the file is damaged.
        """
        if self._digests is None:
            found: dict[str, str] = {}
            if self.path.exists():
                with self._open() as connection:
                    tables = "SELECT name FROM sqlite_master WHERE name = 'detected'"
                    if connection.execute(tables).fetchone():  # not of a process that was stopped
                        found.update(connection.execute("SELECT name, digest FROM detected"))
            self._digests = found
        return self._digests

    def get(self, name: str) -> np.ndarray | None:
        """Positions of an image; None if there are none."""
        if name not in self.digests:
            return None
        with self._open() as connection:
            query = "SELECT xy FROM detected WHERE name = ?"
            (data,) = connection.execute(query, (name,)).fetchone()
        return np.frombuffer(data, dtype="<f8").reshape(-1, 2)

    def put(self, items: Iterable[tuple[str, str, np.ndarray]]) -> None:
        """Store name, digest and positions of images in one transaction, in place of those before.

        Raises:
            OSError: the disk is full.
            DataError: the file could not be written.
        """
        rows = [
            (name, digest, np.ascontiguousarray(xy, dtype="<f8").tobytes())
            for name, digest, xy in items
        ]
        if not rows:
            return
        known = self.digests
        size = sum(len(data) for *_, data in rows)
        require_space(self.path.parent, 2 * size + TRANSACTION_BYTES)
        with self._open() as connection, connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS detected (name TEXT PRIMARY KEY, digest TEXT, xy BLOB)"
            )
            connection.executemany("INSERT OR REPLACE INTO detected VALUES (?, ?, ?)", rows)
        known.update((name, digest) for name, digest, _ in rows)

    def clear(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
        self._digests = None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as connection:
                yield connection
        except sqlite3.Error as error:
            raise DataError(
                f"{self.path} is damaged or could not be written ({error}); delete it and its "
                "database"
            ) from error


class PendingRefinement:
    """The images of a database whose keypoints still have to be refined, in a file that exists as
    long as there are any.

    Args:
        results: the COLMAP database.
    """

    def __init__(self, results: Path):
        self.path = record_path(results, "refinement-pending")

    def read(self) -> set[str] | None:
        """The images; None = all, as earlier versions marked them."""
        if not self.path.exists():
            return set()
        images = (read_settings(self.path) or {}).get("images")
        return set(images) if isinstance(images, list) else None

    def includes(self, names: set[str]) -> bool:
        """Whether one of the images is pending."""
        found = self.read()
        return found is None or not found.isdisjoint(names)

    def add(self, names: Iterable[str]) -> None:
        """Mark images."""
        found = self.read()
        if found is not None and (found := found | set(names)):
            write_json(self.path, {"images": sorted(found)})

    def remove(self, names: Iterable[str]) -> None:
        """Unmark images."""
        if left := (self.read() or set()) - set(names):
            write_json(self.path, {"images": sorted(left)})
        else:
            self.path.unlink(missing_ok=True)
