"""Shards: parts of a job that several processes or machines work on, each with its own file.

The shards of ``FILE`` are HDF5 files in ``FILE.shards/``, each with its records. The job without a
shard takes their content over, works on what is missing and removes them, so that it merges,
completes and resumes in one. Feature files of each image (npy) need no shards of their own.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import DataError
from ..formats.hdf5 import FeatureFile, MatchFile, pair_name
from ..formats.records import (
    RecordLog,
    changes,
    compatible,
    read_settings,
    record_path,
    without_information,
)
from ..formats.store import exists
from ..structs import Features, Matches

logger = logging.getLogger(__name__)
T = TypeVar("T")
S = TypeVar("S", FeatureFile, MatchFile)


@dataclass(frozen=True)
class Shard:
    """Part ``index``, from 1, of ``count`` parts of about the same size.

    Raises:
        ValueError: no such part.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ValueError(f"a shard I/N is one of 1/N to N/N, got {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard of an argument ``I/N``.

        Raises:
            ValueError: another form.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if found is None:
            raise ValueError(f"a shard is given as I/N, such as 3/40; got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def of(self, items: Sequence[T]) -> list[T]:
        """The items of this shard: a block, so that shards follow each other in the order of the
        items.
        """
        start, end = (len(items) * i // self.count for i in (self.index - 1, self.index))
        return list(items[start:end])

    def path(self, results: Path) -> Path:
        """File of this shard of a file of results."""
        return shards_folder(results) / f"{self.index:05}-of-{self.count:05}.h5"


def shards_folder(results: Path) -> Path:
    """Folder of the shards of a file of results."""
    return results.with_name(f"{results.name}.shards")


class _Shards(Generic[S]):
    """Content of the shards of a file of results; a context manager.

    Args:
        results: the file of results.
        settings: what the shards must have been made with.
        normalize: converts settings of earlier versions to the current form.
        overwrite: remove shards of other settings.

    Raises:
        DataError: shards of other settings, damaged ones, or such that are being written.
    """

    kind: Callable[..., S]
    log: str

    def __init__(
        self,
        results: Path,
        settings: dict[str, Any],
        normalize: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        overwrite: bool = False,
    ):
        self.results, self.folder = results, shards_folder(results)
        self.settings, self.normalize, self.overwrite = settings, normalize, overwrite
        self.taken = 0
        self._open: tuple[Path, S] | None = None
        self.paths: list[Path] = []
        self.scan()

    def scan(self) -> None:
        """Find the shards, and read what they contain."""
        self.close()
        files = self.folder.iterdir() if self.folder.is_dir() else ()
        named = (re.match(r"\d+-of-\d+(?=\.h5)", path.name) for path in files)
        found = {self.folder / f"{name[0]}.h5" for name in named if name is not None}
        for path in found:
            self._check_settings(path)
        self.paths = sorted(path for path in found if exists(path))

    def _check_settings(self, path: Path) -> None:
        stored = read_settings(record_path(path, "settings.json")) or {}
        try:
            before = self.normalize(without_information(stored))
        except (ValueError, TypeError, AttributeError):
            before = {}
        differing = changes(before, without_information(self.settings))
        if not compatible(stored.get("version")):
            differing.append(f"version {stored['version']}")
        if not differing:
            return
        if not self.overwrite:
            raise DataError(
                f"{path} is a shard of other settings ({', '.join(differing)}); run with its "
                f"options, or delete {self.folder}"
            )
        remove_shard(path)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def opened(self, path: Path) -> S:
        """A shard, open until another one is: shards are read one after the other.

        Raises:
            DataError: it is damaged, or being written.
        """
        if self._open is None or self._open[0] != path:
            self.close()
            # for writing: another process must not write it at the same time
            self._open = path, self.kind(path, write=True)
        return self._open[1]

    def close(self) -> None:
        """Close the shard that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def records(self) -> Iterator[tuple[Path, RecordLog]]:
        """The record of each shard."""
        for path in self.paths:
            with RecordLog(record_path(path, self.log)) as log:
                yield path, log

    def remove(self, handled: set[str]) -> None:
        """Remove the shards whose content has been taken over, or is outdated.

        Args:
            handled: names of the groups that the job was about; shards with others are kept.
        """
        if not self.folder.is_dir():
            return
        kept = [path for path in self.paths if not handled.issuperset(self.opened(path).names())]
        self.close()
        if self.taken:
            logger.info("merged the results of %d shards (%d)", len(self.paths), self.taken)
        for path in self.paths:
            if path not in kept:
                remove_shard(path)
        if kept:
            logger.info(
                "kept %d shards in %s: they contain more than this run was about",
                len(kept),
                self.folder,
            )
        else:
            shutil.rmtree(self.folder)


class FeatureShards(_Shards[FeatureFile]):
    """Features of images in shards."""

    kind, log = FeatureFile, "images.jsonl"

    def scan(self) -> None:
        super().scan()
        #: Image -> its shard, and the record of its file there.
        self.found: dict[str, tuple[Path, dict[str, Any]]] = {}
        for path, log in self.records():
            self.found |= {name: (path, entry) for name, entry in log.entries.items()}

    def read(
        self, name: str, source: dict[str, Any] | None
    ) -> tuple[Features, dict[str, Any]] | None:
        """Features of an image and the record of its file; None if no shard has them, or of another
        version of the file.

        Args:
            source: record of the file now (``images.source_record``); None if it is missing.
        """
        if name not in self.found:
            return None
        path, entry = self.found[name]
        record = {key: value for key, value in entry.items() if key != "features"}
        if source is not None and record != source:
            return None
        shard = self.opened(path)
        try:
            features = shard.read(name)
        except DataError:
            return None  # damaged, extracted again
        self.taken += 1
        return features, record


class MatchShards(_Shards[MatchFile]):
    """Matches of pairs in shards."""

    kind, log = MatchFile, "matches.jsonl"

    def scan(self) -> None:
        super().scan()
        self._digests: dict[Path, dict[str, Any]] = {
            path: {name: entry.get("features") for name, entry in log.entries.items()}
            for path, log in self.records()
        }
        self._last = 0
        self._read: set[tuple[Path, str]] = set()

    def find(self, a: str, b: str, now: RecordLog) -> Path | None:
        """The shard with the matches of a pair of the present features; None if there is none.

        Args:
            now: digest of the features of each image.
        """
        digests = [(now.get(name) or {}).get("features") for name in (a, b)]
        if None in digests:
            return None
        # consecutive pairs are in the same shard, or the next one
        for step in range(len(self.paths)):
            index = (self._last + step) % len(self.paths)
            known = self._digests[self.paths[index]]
            if [known.get(a), known.get(b)] == digests and pair_name(a, b) in self.opened(
                self.paths[index]
            ):
                self._last = index
                return self.paths[index]
        return None

    def read(self, a: str, b: str, now: RecordLog) -> tuple[Matches, int] | None:
        """Matches of a pair, and the number of keypoints of ``a``; None if no shard has them."""
        path, key = self.find(a, b, now), pair_name(a, b)
        if path is None or (path, key) in self._read:  # two pairs may have the same name
            return None
        self._read.add((path, key))
        self.taken += 1
        return self.opened(path).read_with_count(a, b)


def remove_shard(path: Path) -> None:
    """Remove a shard and its records."""
    for found in path.parent.glob(f"{path.stem}.*"):
        found.unlink(missing_ok=True)


def blocks(items: Sequence[T], size: int) -> Iterator[tuple[Shard, list[T]]]:
    """Shards of at most ``size`` items, and their items."""
    count = -(-len(items) // size)
    for index in range(1, count + 1):
        shard = Shard(index, count)
        yield shard, shard.of(items)
