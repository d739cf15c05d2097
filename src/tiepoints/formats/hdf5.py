"""hloc's HDF5 files of features and of matches, written such that a killed process loses no
completed image.

Features: one group per image, named by its path relative to the image folder, with ``keypoints``
(N,2), ``descriptors`` (D,N), ``scores`` (N,), ``image_size`` (width, height), and ``scales`` and
``oris`` (N,), which hloc's AdaLAM matcher needs. Angles are in degrees from +x towards +y, as those
of hloc's DoG; the attribute ``unit`` says so, because earlier versions wrote radians without it.
Coordinates are the same as ours (center of the first pixel = (0, 0)); hloc adds COLMAP's half pixel
on import. Matches: one group per pair, ``a-name/b-name`` with each / in a name replaced by -, with
``matches0`` (N_a,), keypoint of b or -1, and ``matching_scores0``.

Appending to HDF5 is not safe: a process killed during a write can destroy images written before
(docs/formats.md). Completed images are therefore appended to ``FILE.journal``, a plain file in
which an incomplete last record is detected; ``close`` merges it into a copy of the HDF5 file, which
then replaces it. The journal of a killed process is read together with the file and merged by the
next writer.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, first_line
from ..files import (
    NOT_TEXT,
    atomic_path,
    is_at,
    is_text,
    lock_file,
    printable,
    remove_temporary,
    require,
)
from ..structs import Features, Keypoints, Matches
from .records import PROGRAM, array_digest

#: Standard deviation of a keypoint in pixels, the default of hloc's extractors.
UNCERTAINTY = 1.0
#: Unit of ``oris``, in the attribute ``unit``.
DEGREES = "degrees"
#: Largest angle in radians, with room for the rounding of float32.
ONE_TURN = 2 * math.pi * (1 + 1e-6)
#: A journal record starts with this, then header length, data length, and checksum of both.
_MAGIC = b"TPJ1"
_HEAD = struct.Struct("<4sIQI")
#: What h5py raises for damaged files.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, MemoryError)


def require_h5py() -> Any:
    """Import h5py; raises ImportError with the extra to install."""
    return require("h5py", extra="hdf5", purpose="an HDF5 file")


class _DeferredErrors(io.FileIO):
    """File for HDF5, whose library does not survive a failed write, such as on a full disk: the
    first error is kept and the bytes are dropped.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all bytes; after an error none."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.error is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        if self.error is not None:
            self.seek(len(rest), os.SEEK_CUR)
        return size

    def readinto(self, buffer: Any) -> int:
        """Read; dropped bytes are zero."""
        view = memoryview(buffer).cast("B")
        count = super().readinto(view) or 0
        view[count:] = bytes(len(view) - count)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Change the size, unless a write has failed."""
        try:
            return size or 0 if self.error else super().truncate(size)
        except OSError as error:
            self.error = error
            return size or 0


@contextmanager
def atomic_hdf5(path: Path, *, keep: bool = False) -> Iterator[Any]:
    """Open a temporary HDF5 file for writing, which replaces ``path`` atomically when complete.

    Args:
        path: the file.
        keep: start with a copy of ``path`` if it exists, instead of an empty file.

    Raises:
        OSError: a write failed.
    """
    with atomic_path(path) as tmp_path:
        keep = keep and path.is_file()
        if keep:
            shutil.copyfile(path, tmp_path)
        with _DeferredErrors(tmp_path, "r+" if keep else "w+") as stream:
            with require_h5py().File(stream, "r+" if keep else "w") as file:
                yield file
            if stream.error is None:
                os.fsync(stream.fileno())  # before the file is renamed
        if stream.error is not None:
            raise stream.error


class _Journal:
    """Append-only file of records (name, arrays, attributes); one without arrays removes a name."""

    def __init__(self, path: Path, *, write: bool, overwrite: bool = False):
        self.path, self.writing = path, write
        # name -> offset of its record, keys of its arrays
        self.index: dict[str, tuple[int, frozenset[str]]] = {}
        self._keys: dict[frozenset[str], frozenset[str]] = {}  # one object for equal sets
        self._lock = threading.Lock()
        if not write and not path.is_file():
            self._file = None
            return
        self._file = open(path, "a+b" if write else "rb", buffering=0)  # noqa: SIM115
        try:
            if write:
                self._lock_file()
            end = self._scan()
            if end == 0 and not overwrite:
                self._check_start()
            if write and end < os.fstat(self._file.fileno()).st_size:
                self._file.truncate(end)  # incomplete record of a killed process
        except BaseException:
            self._file.close()
            raise

    def _lock_file(self) -> None:
        target = self.path.with_name(self.path.name.removesuffix(".journal"))
        assert self._file is not None
        lock_file(self._file, target)
        if not is_at(self._file, self.path):
            # the other run removed its journal between our opening and our locking
            raise DataError(f"another run is writing {target}; wait until it ends")

    def _check_start(self) -> None:
        """Raise for a file that is not a journal; an incomplete first record is none."""
        assert self._file is not None
        self._file.seek(0)
        start = self._file.read(len(_MAGIC))
        if start.strip(b"\0") and not _MAGIC.startswith(start):
            raise DataError(
                f"{self.path} is not a journal of images that are not yet in the HDF5 file, or is "
                "damaged; use --overwrite, or delete it to extract these images again"
            )

    def _scan(self) -> int:
        """Fill the index; returns the end of the last complete record."""
        assert self._file is not None
        self._file.seek(0)
        end = 0
        while (record := self._read_at(end)) is not None:
            header, data = record
            # earlier versions wrote names that an HDF5 file cannot contain
            if is_text(header["name"]):
                self.index[header["name"]] = (
                    end,
                    self._shared(key for key, _, _ in header["arrays"]),
                )
            end += _HEAD.size + header["length"] + len(data)
        return end

    def _shared(self, keys: Iterable[str]) -> frozenset[str]:
        found = frozenset(keys)
        return self._keys.setdefault(found, found)

    def _read_at(self, offset: int) -> tuple[dict, bytes] | None:
        """Header and data of the record at ``offset``; None if it is incomplete or damaged."""
        assert self._file is not None
        self._file.seek(offset)
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        magic, header_length, data_length, checksum = _HEAD.unpack(head)
        remaining = os.fstat(self._file.fileno()).st_size - offset - _HEAD.size
        if magic != _MAGIC or header_length + data_length > remaining:
            return None
        header, data = _read(self._file, header_length), _read(self._file, data_length)
        if zlib.crc32(data, zlib.crc32(header)) != checksum:
            return None
        try:
            content = json.loads(header)
            name, layout, attributes = (content[k] for k in ("name", "arrays", "attributes"))
            size = sum(np.dtype(kind).itemsize * math.prod(shape) for _, kind, shape in layout)
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if not isinstance(name, str) or not isinstance(attributes, dict) or size != len(data):
            return None
        return {**content, "length": header_length}, data

    def append(
        self, name: str, arrays: dict[str, np.ndarray], attributes: dict[str, dict[str, Any]]
    ) -> None:
        """Append a record."""
        arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        layout = [[key, value.dtype.str, list(value.shape)] for key, value in arrays.items()]
        header = json.dumps({"name": name, "arrays": layout, "attributes": attributes}).encode()
        data = b"".join(value.tobytes() for value in arrays.values())
        head = _HEAD.pack(_MAGIC, len(header), len(data), zlib.crc32(data, zlib.crc32(header)))
        assert self._file is not None
        with self._lock:
            offset = self._file.seek(0, os.SEEK_END)
            try:
                record = memoryview(head + header + data)
                while record:
                    record = record[self._file.write(record) :]
            except OSError:
                # on a full disk, later records must not follow an incomplete one
                self._file.truncate(offset)
                raise
            self.index[name] = offset, self._shared(arrays)

    def read(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
        """Arrays and attributes of the last record ``name``."""
        with self._lock:
            record = self._read_at(self.index[name][0])
        if record is None:
            raise DataError(f"{self.path} was changed while it was read; try again")
        header, data = record
        arrays, start = {}, 0
        for key, dtype, shape in header["arrays"]:
            count = int(np.prod(shape, dtype=np.int64))
            arrays[key] = np.frombuffer(data, dtype, count, start).reshape(shape)
            start += arrays[key].nbytes
        return arrays, header["attributes"]

    def clear(self) -> None:
        """Remove all records."""
        if self._file is not None:
            self._file.truncate(0)
        self.index.clear()

    def close(self, *, remove: bool = False) -> None:
        """Close the file, and delete it if ``remove``."""
        if self._file is not None:
            if remove:
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _read(file: Any, length: int) -> bytes:
    """Read ``length`` bytes; an unbuffered read may return fewer."""
    parts = []
    while length > 0 and (part := file.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


class _GroupFile:
    """Groups of arrays in an HDF5 file and its journal, which ``close`` merges into the file."""

    def __init__(self, path: str | Path, *, write: bool = False, overwrite: bool = False):
        self.path, self.writing = Path(path), write
        self._file: Any = None
        self._h5py = require_h5py()
        journal = self.path.with_name(self.path.name + ".journal")
        if not write and not self.path.is_file() and not journal.is_file():
            raise FileNotFoundError(f"no file at {self.path}")
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = _Journal(journal, write=write, overwrite=overwrite)
        try:
            if write:
                remove_temporary(self.path)
            try:
                self._open()
                if overwrite:
                    self.names()
            except DataError:
                if not overwrite:
                    raise
                self.clear()
        except BaseException:
            self._journal.close()
            raise

    def _open(self) -> None:
        if not self.path.is_file():
            return
        try:
            self._file = self._h5py.File(self.path, "r")
            list(self._file)  # the entries at its top level
        except HDF5_ERRORS as error:
            raise DataError(
                f"{self.path} is not an HDF5 file or is damaged ({first_line(error)}); "
                "use --overwrite, or delete it and create it again"
            ) from error

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def clear(self) -> None:
        """Remove all content."""
        self._journal.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
        self.path.unlink(missing_ok=True)

    def __contains__(self, name: str) -> bool:
        if name in self._journal.index:
            return bool(self._journal.index[name][1])
        with self._reading(name):
            return self._file is not None and is_text(name) and name in self._file

    @contextmanager
    def _reading(self, name: str = "") -> Iterator[None]:
        """Turn the errors of reading a damaged file into a ``DataError``."""
        try:
            yield
        except HDF5_ERRORS as error:
            raise DataError(
                f"{self.path} is damaged{f' at {name}' if name else ''} ({first_line(error)}); "
                "use --overwrite, or delete it and create it again"
            ) from error

    def names(self) -> list[str]:
        """Names of the groups that contain arrays, sorted."""
        names: set[str] = set()

        def visit(name: bytes, info: Any) -> None:
            if info.type == self._h5py.h5o.TYPE_DATASET:
                names.add(name.decode().rpartition("/")[0])

        if self._file is not None:
            with self._reading():
                # six times as fast as visititems, which opens each object
                self._h5py.h5o.visit(self._file.id, visit, info=True)
        names -= self._journal.index.keys()
        return sorted(names.union(name for name, (_, keys) in self._journal.index.items() if keys))

    def _get(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
        """Arrays of a group and their attributes."""
        if name in self._journal.index:
            return self._journal.read(name)
        with self._reading(name):
            items = {
                key: item
                for key, item in self._file[name].items()
                if isinstance(item, self._h5py.Dataset)
            }
            return (
                {key: np.asarray(item[()]) for key, item in items.items()},
                {key: dict(item.attrs) for key, item in items.items()},
            )

    def _put(
        self,
        name: str,
        arrays: dict[str, np.ndarray],
        attributes: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Write a group to the journal."""
        if not self.writing:
            raise ValueError(f"{self.path} was opened for reading; open it with write=True")
        if not is_text(name):
            raise DataError(f"{printable(name)}: {NOT_TEXT}")
        self._journal.append(name, arrays, attributes or {})

    def _delete(self, names: Iterable[str]) -> None:
        """Remove groups, in the journal."""
        for name in names:
            if name in self:
                self._put(name, {})

    def close(self) -> None:
        """Merge the journal into the file, which is replaced atomically, and close both."""
        try:
            if self.writing and self._journal.index:
                self._merge()
                self._journal.close(remove=True)
            self._journal.close(remove=self.writing and not self._journal.index)
            self.writing = False
        finally:
            self._journal.close()
            if self._file is not None:
                self._file.close()
                self._file = None

    def _merge(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        try:
            with atomic_hdf5(self.path, keep=True) as file:
                file.attrs["program"] = PROGRAM
                for name in self._journal.index:
                    if name in file:
                        del file[name]
                    arrays, attributes = self._journal.read(name)
                    if not arrays:
                        continue  # removed
                    group = file.create_group(name)
                    for key, value in arrays.items():
                        group.create_dataset(key, data=value).attrs.update(attributes.get(key, {}))
        except HDF5_ERRORS as error:
            raise OSError(
                f"{self.path} could not be written ({first_line(error)}); nothing is lost, fix the "
                "cause and run again"
            ) from error


class FeatureFile(_GroupFile):
    """hloc's file of features; the docstring of the module describes its content.

    Args:
        path: the ``.h5`` file.
        write: open for reading and writing, by one process at a time.
        half: write descriptors as float16; positions are always float32.
        overwrite: delete a file that is not an HDF5 file, or a damaged one.

    Raises:
        FileNotFoundError: no such file to read.
        DataError: not an HDF5 file, a damaged one, or another process is writing it.
        ImportError: h5py is missing.
    """

    def __init__(
        self, path: str | Path, *, write: bool = False, half: bool = False, overwrite: bool = False
    ):
        super().__init__(path, write=write, overwrite=overwrite)
        self.half = half

    def done(self, name: str, *, described: bool) -> bool:
        """Whether the image has keypoints and, if ``described``, descriptors."""
        if name not in self:
            return False
        if name in self._journal.index:
            keys = self._journal.index[name][1]
        else:
            with self._reading(name):
                keys = frozenset(self._file[name])
        return "keypoints" in keys and (not described or "descriptors" in keys)

    def write(self, name: str, features: Features, image: Path | None = None) -> str:
        """Write the features of the image ``name`` (path relative to the image folder, with / as
        separator); returns their digest.
        """
        arrays: dict[str, np.ndarray] = {
            "keypoints": features.xy.cpu().numpy().astype(np.float32),
            "scores": features.score.cpu().numpy().astype(np.float32),
            "scales": features.scale.cpu().numpy().astype(np.float32),
            # in double precision radians are the same after conversion to degrees and back
            "oris": np.degrees(features.angle.cpu().numpy().astype(np.float64)),
            "image_size": np.array(features.image_size, dtype=np.int64),
        }
        if features.descriptors is not None:
            arrays["descriptors"] = (
                features.descriptors.cpu().numpy().astype(np.float16 if self.half else np.float32).T
            )
        attributes: dict[str, dict[str, Any]] = {
            "keypoints": {"uncertainty": UNCERTAINTY},
            "oris": {"unit": DEGREES},
        }
        self._put(name, arrays, attributes)
        return _group_digest(arrays)

    def digest(self, name: str) -> str:
        """Digest of the stored features of an image."""
        return _group_digest(self._get(name)[0])

    def remove(self, names: Iterable[str]) -> None:
        """Remove the features of images."""
        self._delete(names)

    def read(self, name: str, image_size: tuple[int, int] | None = None) -> Features:
        """Read the features of an image; missing scales and scores are 1, missing angles 0.

        Args:
            name: as in ``names()``.
            image_size: (width, height), instead of that in the file.

        Raises:
            DataError: no such image, or arrays of other shapes.
        """
        if name not in self:
            raise DataError(f"{self.path} contains no features of {name!r}")
        group, attributes = self._get(name)
        if "keypoints" not in group:
            raise DataError(
                f"{self.path}: {name} has no dataset 'keypoints'; is this a file of features?"
            )
        xy = group["keypoints"]
        if xy.ndim != 2 or xy.shape[1] < 2:
            raise DataError(f"{self.path}: keypoints of {name} must be (N,2), found {xy.shape}")
        count = len(xy)

        def column(key: str, default: float) -> Tensor:
            if key not in group:
                return torch.full((count,), default)
            if group[key].size != count:
                raise DataError(
                    f"{self.path}: {key} of {name} must be ({count},), found {group[key].shape}"
                )
            return _tensor(group[key].reshape(-1))

        descriptors = None
        if "descriptors" in group:
            if group["descriptors"].ndim != 2 or group["descriptors"].shape[1] != count:
                raise DataError(
                    f"{self.path}: descriptors of {name} must be (D,{count}), found "
                    f"{group['descriptors'].shape}"
                )
            descriptors = _tensor(group["descriptors"].T)
        if image_size is None:
            stored = group.get("image_size", (0, 0))
            image_size = int(stored[0]), int(stored[1])
        if "oris" in group:
            unit = attributes.get("oris", {}).get("unit")
            group = {**group, "oris": _radians(group["oris"], unit)}
        keypoints = Keypoints(
            _tensor(xy[:, :2]), column("scales", 1.0), column("oris", 0.0), column("scores", 1.0)
        )
        return Features(keypoints, descriptors, image_size)


def _group_digest(arrays: dict[str, np.ndarray]) -> str:
    return array_digest(*(arrays[key] for key in sorted(arrays)))


def _radians(angles: np.ndarray, unit: str | None) -> np.ndarray:
    """Angles of an image in radians. Those without a unit are hloc's, in degrees, or those of an
    earlier version of this package, in radians within one turn.
    """
    angles = angles.astype(np.float64)
    in_degrees = bool((np.abs(angles) > ONE_TURN).any()) if unit is None else unit == DEGREES
    return np.radians(angles) if in_degrees else angles


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def pair_name(a: str, b: str) -> str:
    """Name of the group of a pair."""
    return f"{a.replace('/', '-')}/{b.replace('/', '-')}"


class MatchFile(_GroupFile):
    """hloc's file of matches; arguments and errors as ``FeatureFile``."""

    def _key(self, a: str, b: str) -> tuple[str, bool] | None:
        """Group of a pair, and whether it contains the pair in reverse order; None if missing."""
        for key, swapped in ((pair_name(a, b), False), (pair_name(b, a), True)):
            if key in self:
                return key, swapped
        return None

    def has_matches(self, a: str, b: str) -> bool:
        """Whether the file contains the pair, in either order."""
        return self._key(a, b) is not None

    def holds_matches(self) -> bool:
        """Whether the file contains any pair."""
        return bool(self.names())

    @property
    def foreign(self) -> bool:
        """Whether another program, or an earlier version of this one, wrote the file."""
        with self._reading():
            return self._file is not None and self._file.attrs.get("program") != PROGRAM

    def clear_matches(self) -> None:
        """Remove all content."""
        self.clear()

    def remove_matches(self, names: Iterable[str]) -> None:
        """Remove all pairs of images, also of others whose names differ only in / and -."""
        keys = {name.replace("/", "-") for name in names}
        if not keys:
            return
        pairs = [key for key in self._pairs() if not keys.isdisjoint(key.split("/"))]
        self._delete(pairs)

    def _pairs(self) -> list[str]:
        """Names of all groups of pairs; also of removed ones."""
        names = list(self._journal.index)
        with self._reading():
            for first in () if self._file is None else self._file:
                group = self._file[first]
                if isinstance(group, self._h5py.Group):
                    names += [f"{first}/{second}" for second in group]
        return names

    def write_matches(self, a: str, b: str, matches: Matches, count: int) -> None:
        """Write the matches of the images ``a`` and ``b``, in place of those in either order.

        Args:
            a, b: names of the images.
            matches: at most one per keypoint of a.
            count: number of keypoints of a.

        Raises:
            ValueError: a keypoint of a has several matches, or an index is not below ``count``.
        """
        index = matches.index.cpu().numpy()
        if len(index) and (len(np.unique(index[:, 0])) < len(index) or index[:, 0].max() >= count):
            raise ValueError(
                f"hloc stores one match for each of the {count} keypoints of {a}; match with "
                "mutual=True"
            )
        partner = np.full(count, -1, dtype=np.int32)
        score = np.zeros(count, dtype=np.float32)
        partner[index[:, 0]] = index[:, 1]
        score[index[:, 0]] = matches.score.cpu().numpy()
        arrays: dict[str, np.ndarray] = {"matches0": partner, "matching_scores0": score}
        name, reverse = pair_name(a, b), pair_name(b, a)
        self._put(name, arrays)
        if reverse != name:
            self._delete([reverse])

    def read_matches(self, a: str, b: str) -> Matches:
        """Read the matches of a pair, sorted by the keypoint of ``a``, in either stored order.

        Raises:
            DataError: no such pair, or arrays of other shapes.
        """
        return self.read_with_count(a, b)[0]

    def read_with_count(self, a: str, b: str) -> tuple[Matches, int]:
        """``read_matches``, and the number of keypoints of the first image of the stored pair."""
        key = self._key(a, b)
        if key is None:
            raise DataError(f"{self.path} contains no matches of {a!r} and {b!r}")
        group_name, swapped = key
        group, _ = self._get(group_name)
        if "matches0" not in group or group["matches0"].ndim != 1:
            raise DataError(
                f"{self.path}: {group_name} needs 'matches0' (N,); is this a file of matches?"
            )
        partner = group["matches0"].astype(np.int64)
        matched = np.flatnonzero(partner >= 0)
        score = group.get("matching_scores0", np.ones(len(partner)))[matched].astype(np.float32)
        index = np.stack([matched, partner[matched]], axis=1)
        if swapped:
            order = np.argsort(index[:, 1], kind="stable")
            index, score = index[order][:, ::-1], score[order]
        return Matches(torch.from_numpy(index.copy()), torch.from_numpy(score)), len(partner)


def read_pairs(path: str | Path) -> Iterator[tuple[str, str]]:
    """Read a list of pairs: two names per line, separated by white space (hloc) or, for names with
    spaces, by a tab; lines whose first character is # are comments.

    Raises:
        FileNotFoundError: no list.
        DataError: a line does not have two names; the message has its number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no list of pairs at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not a text file ({error}); a list of pairs has two image names per line"
        ) from error
    for number, line in enumerate(re.split(r"\r?\n|\r", text), 1):
        if not line.strip() or line.startswith("#"):
            continue
        names = (
            [part.strip() for part in line.split("\t") if part.strip()]
            if "\t" in line
            else line.split()
        )
        if len(names) != 2:
            raise DataError(
                f"{path}, line {number}: expected two names, found {len(names)}: "
                f"{line.strip()[:80]!r}"
            )
        yield names[0], names[1]
