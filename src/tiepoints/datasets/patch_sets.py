"""The published sets of corresponding patches: PhotoTour and HPatches.

PhotoTour (Brown, Hua and Winder, PAMI 2011; also called UBC or Brown): a folder with
``patches0000.bmp`` and so on, 16 x 16 patches of 64 x 64 pixels each, ``info.txt`` (one patch per
line, its 3D point first) and pair files such as ``m50_100000_100000_0.txt``. HPatches (Balntas et
al., CVPR 2017): one folder per sequence with ``ref.png``, ``e1.png`` to ``t5.png``, columns of
65 x 65 patches.

Both are cached as 32 x 32 gray levels in one ``.npy`` file per set, written on first use and read
through a memory map (450,000 patches take 460 MB). ``PatchBatches`` draws training batches from any
number of such sets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError, first_line
from ..files import atomic_path, write_json
from ..formats.records import file_stamp, read_settings, record_path
from ..progress import track

PATCH_SIZE = 32
PHOTOTOUR_SIDE = 64
MOSAIC_SIDE = 1024
PER_MOSAIC = (MOSAIC_SIDE // PHOTOTOUR_SIDE) ** 2
HPATCHES_SIDE = 65
#: Columns of a sequence: the reference, then five images each with easy, hard and tough geometric
#: noise.
COLUMNS = ("ref", *(f"{noise}{image}" for noise in "eht" for image in range(1, 6)))
CACHE_NAME = "patches32.npy"
TEST_PAIRS = "m50_100000_100000_0.txt"
AUGMENTATIONS = ("none", "fliprot", "turns")
_REMEDY = "Unpack the archive again"


class PatchSet:
    """Patches in a file, and the index of the 3D point that each of them shows.

    Attributes:
        name, folder: of the source.
        file: ``.npy`` of (N,32,32) uint8 gray levels.
        points: (N,) int64 point indices; patches with the same index correspond. Indices of
            different sets are unrelated.
    """

    def __init__(self, name: str, folder: Path, file: Path, points: np.ndarray):
        self.name, self.folder, self.file, self.points = name, folder, file, points
        self._images: np.ndarray | None = None

    @property
    def images(self) -> np.ndarray:
        """(N,32,32) uint8, a memory map."""
        if self._images is None:
            self._images = np.load(self.file, mmap_mode="r")
        return self._images

    def __getstate__(self) -> dict[str, Any]:
        # a memory map is pickled as the whole array, once per worker of a loader
        return {**self.__dict__, "_images": None}

    def __len__(self) -> int:
        return len(self.points)

    def patches(self, indices: np.ndarray) -> Tensor:
        """Patches ``indices`` (n,) as (n,1,32,32) float32 in [0,1]."""
        return as_patches(self.images[indices])


def as_patches(gray: np.ndarray) -> Tensor:
    """Convert gray levels (n,P,P) uint8 to (n,1,P,P) float32 in [0,1]."""
    return torch.from_numpy(gray.astype(np.float32))[:, None] / 255


def shrink(gray: np.ndarray) -> np.ndarray:
    """Resize patches (n,P,P) uint8 to (n,32,32) uint8, bilinear without antialiasing.

    The published descriptors were trained on patches resized like this. For 64 pixels it is the
    mean of 2 x 2 pixels, for 65 nearly so. Gray levels are rounded.
    """
    if not len(gray):
        return np.zeros((0, PATCH_SIZE, PATCH_SIZE), np.uint8)
    large = torch.from_numpy(gray.astype(np.float32))[:, None]
    small = F.interpolate(
        large, size=(PATCH_SIZE, PATCH_SIZE), mode="bilinear", align_corners=False
    )
    return (small[:, 0] + 0.5).floor().byte().numpy()


# ---- PhotoTour


def open_phototour(folder: str | Path, *, cache: str | Path | None = None) -> PatchSet:
    """Open a PhotoTour set (``liberty``, ``notredame``, ``yosemite``).

    The first call reads all mosaics and writes the cache, which takes seconds.

    Args:
        folder: contains ``info.txt`` and the mosaics.
        cache: folder for ``NAME.npy``; default ``patches32.npy`` in ``folder``.

    Raises:
        FileNotFoundError: no such folder.
        DataError: a file is missing, truncated or of unexpected size; the message names the file
            and the remedy.
    """
    folder = _folder(folder, "PhotoTour set (with info.txt and patches0000.bmp)")
    info = folder / "info.txt"
    points = _integers(info, "a 3D point and a second number per line", usecols=0)[:, 0]
    mosaics = [folder / f"patches{k:04d}.bmp" for k in range(-(-len(points) // PER_MOSAIC))]
    for path in mosaics:
        if not path.is_file():
            raise DataError(
                f"{path}: missing; {info} lists {len(points)} patches, {len(mosaics)} mosaics. "
                f"{_REMEDY}"
            )
    extra = folder / f"patches{len(mosaics):04d}.bmp"
    if extra.exists():
        raise DataError(
            f"{info}: {len(points)} lines fill {len(mosaics)} mosaics, but there is "
            f"{extra.name}: info.txt is truncated. {_REMEDY}"
        )

    def blocks() -> Iterator[np.ndarray]:
        remaining = len(points)
        for path in track(mosaics, label=folder.name, unit="mosaic"):
            yield shrink(read_mosaic(path)[:remaining])
            remaining -= PER_MOSAIC

    file = _cached(folder, cache, (len(points), PATCH_SIZE, PATCH_SIZE), [info, *mosaics], blocks)
    return PatchSet(folder.resolve().name, folder, file, points)


def read_mosaic(path: Path) -> np.ndarray:
    """Read the patches (256,64,64) uint8 of a PhotoTour mosaic, in row-major order.

    Raises:
        DataError: unreadable, truncated, or not 1024 x 1024.
    """
    gray = _read_gray(path)
    if gray.shape != (MOSAIC_SIDE, MOSAIC_SIDE):
        raise DataError(
            f"{path}: {gray.shape[1]} x {gray.shape[0]} pixels; a mosaic has {MOSAIC_SIDE} x "
            f"{MOSAIC_SIDE}. {_REMEDY}"
        )
    side, count = PHOTOTOUR_SIDE, MOSAIC_SIDE // PHOTOTOUR_SIDE
    return gray.reshape(count, side, count, side).swapaxes(1, 2).reshape(PER_MOSAIC, side, side)


def read_test_pairs(file: str | Path, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read a PhotoTour pair file (``m50_100000_100000_0.txt``).

    Lines are: patch, its 3D point, unused, patch, its 3D point, unused (and one more unused number
    in some files).

    Args:
        file: the pair file.
        points: (N,) point indices of the set, from ``info.txt``, to check the pair file against.

    Returns:
        patch indices (K,2) int64; whether they correspond, (K,) bool.

    Raises:
        DataError: the file is missing, truncated, or belongs to another set.
    """
    path = Path(file)
    rows = _integers(path, "six or seven numbers per line")
    if rows.shape[1] not in (6, 7):
        raise DataError(
            f"{path}: {rows.shape[1]} numbers per line, expected 6 or 7 (patch, point, unused, "
            "patch, point, unused)"
        )
    named = re.fullmatch(r"m\d+_(\d+)_\d+_\d+\.txt", path.name)
    if named and len(rows) < int(named[1]):
        raise DataError(
            f"{path}: {len(rows)} pairs, expected {named[1]} by the file name: the file is "
            f"truncated. {_REMEDY}"
        )
    pairs, listed = rows[:, [0, 3]], rows[:, [1, 4]]
    if pairs.min() < 0 or pairs.max() >= len(points):
        raise DataError(
            f"{path}: refers to patch {pairs.max()}, the set has {len(points)}: the file belongs "
            "to another set"
        )
    mismatches = (points[pairs] != listed).any(axis=1).nonzero()[0]
    if len(mismatches):
        raise DataError(
            f"{path}: line {mismatches[0] + 1} has other 3D points than info.txt: the file belongs "
            "to another set"
        )
    return pairs, listed[:, 0] == listed[:, 1]


# ---- HPatches


def hpatches_sequences(folder: str | Path, names: Iterable[str] | None = None) -> list[Path]:
    """Find the sequence folders (those with a ``ref.png``), sorted, or in the order of ``names``.

    Raises:
        FileNotFoundError: no such folder.
        DataError: no sequence, or one of ``names`` is missing.
    """
    folder = _folder(folder, "HPatches folder (hpatches-release, with v_wall/ref.png and so on)")
    sequences = {path.parent.name: path.parent for path in sorted(folder.glob("*/ref.png"))}
    if not sequences:
        raise DataError(
            f"{folder}: no sequence with a ref.png; unpack hpatches-release.tar.gz and give its "
            "folder (not that of the full images)"
        )
    if names is None:
        return list(sequences.values())
    selected = list(names)
    missing = [name for name in selected if name not in sequences]
    if missing:
        raise DataError(
            f"{folder}: no sequence {', '.join(missing[:5])} ({len(missing)} of {len(selected)} "
            f"missing). {_REMEDY}"
        )
    return [sequences[name] for name in selected]


def read_split(file: str | Path, split: str) -> dict[str, list[str]]:
    """Read a split (``a``, ``b``, ``c``, ...) of the benchmark's ``splits.json``.

    Returns:
        ``{"test": names, "train": names}``; some splits have no ``train``.

    Raises:
        FileNotFoundError: no such file.
        DataError: another kind of file, or no such split in it.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}; splits.json comes with the repository hpatches/hpatches-benchmark"
        )
    try:
        content = json.loads(path.read_text())
        if split not in content:
            raise DataError(f"{path}: no split {split!r}; it has {', '.join(content)}")
        return {
            part: [str(name) for name in content[split][part]]
            for part in ("test", "train")
            if part in content[split]
        }
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: expected {{split: {{'test': names, 'train': names}}}} ({error})"
        ) from error


def read_column(path: Path) -> np.ndarray:
    """Read the patches (N,65,65) uint8 of one file of HPatches.

    Raises:
        DataError: missing, unreadable, truncated, or not a column of 65 x 65 patches.
    """
    gray = _read_gray(path)
    height, width = gray.shape
    if width != HPATCHES_SIDE or height % HPATCHES_SIDE or not height:
        raise DataError(
            f"{path}: {width} x {height} pixels; expected a column of 65 x 65 patches. {_REMEDY}"
        )
    return gray.reshape(-1, HPATCHES_SIDE, HPATCHES_SIDE)


def read_columns(sequence: Path) -> Iterator[np.ndarray]:
    """Read the sixteen columns of a sequence in the order of ``COLUMNS``, each (N,65,65) uint8.

    Raises:
        DataError: as ``read_column``, or columns of different lengths.
    """
    count = None
    for name in COLUMNS:
        path = sequence / f"{name}.png"
        column = read_column(path)
        if count is None:
            count = len(column)
        if len(column) != count:
            raise DataError(
                f"{path}: {len(column)} patches, {sequence / 'ref.png'} has {count}. {_REMEDY}"
            )
        yield column


def open_hpatches(
    folder: str | Path, names: Iterable[str] | None = None, *, cache: str | Path | None = None
) -> list[PatchSet]:
    """Open the sequences of HPatches, one set each: sixteen patches per point, reference first.

    Args:
        folder: contains the sequence folders.
        names: sequences to open, for example the training part of a split; default: all.
        cache: folder for the files ``SEQUENCE.npy``; default ``patches32.npy`` in each sequence.

    Raises:
        FileNotFoundError: no such folder.
        DataError: a file is missing, truncated or of unexpected size; the message names the file
            and the remedy.
    """
    sets = []
    for sequence in track(hpatches_sequences(folder, names), label="hpatches", unit="sequence"):
        count = len(read_column(sequence / "ref.png"))
        sources = [sequence / f"{name}.png" for name in COLUMNS]

        def blocks(sequence: Path = sequence) -> Iterator[np.ndarray]:
            return (shrink(column) for column in read_columns(sequence))

        file = _cached(
            sequence, cache, (len(COLUMNS) * count, PATCH_SIZE, PATCH_SIZE), sources, blocks
        )
        sets.append(
            PatchSet(sequence.name, sequence, file, np.tile(np.arange(count), len(COLUMNS)))
        )
    return sets


# ---- training batches


class PatchBatches(Dataset):
    """Training batches of corresponding patches, each pair of a different point.

    Items: ``anchor, positive`` (batch,1,32,32) float32 in [0,1]. Points are drawn uniformly, and
    two different patches of each. Item ``i`` depends only on ``seed``, ``i`` and the sets.

    Args:
        sets: one or more sets; a batch mixes them.
        batch: pairs per batch (HardNet: 1024, HyNet: 512).
        length: number of batches; default: an epoch of HyNet, ``patches // (2 * batch)``.
        seed: of the random draws.
        augment: transform of both patches of a pair, each step with probability 0.5. ``fliprot``
            (HardNet): transpose, mirror horizontally. ``turns`` (HyNet): rotate by 90, 180 or 270
            degrees, mirror vertically. ``none``.

    Raises:
        ValueError: unknown augmentation, no sets, or a batch or length that is not positive.
        DataError: fewer points with two patches than a batch needs.
    """

    def __init__(
        self,
        sets: PatchSet | Sequence[PatchSet],
        *,
        batch: int = 1024,
        length: int | None = None,
        seed: int = 0,
        augment: str = "fliprot",
    ):
        self.sets = [sets] if isinstance(sets, PatchSet) else list(sets)
        if not self.sets:
            raise ValueError("no sets of patches")
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {augment!r}")
        if batch < 1 or (length is not None and length < 1):
            raise ValueError(f"batch and length must be positive, got {batch} and {length}")
        self.batch, self.seed, self.augment = batch, seed, augment
        self.first = np.cumsum([0, *(len(s) for s in self.sets)])
        #: All patches ordered by point; those of a point are ``members[start : start + count]``.
        self.members, self.start, self.count = _by_point(self.sets)
        if len(self.start) < batch:
            names = ", ".join(s.name for s in self.sets[:3])
            raise DataError(
                f"{names}: {len(self.start)} points with two patches, a batch needs {batch}: "
                "use more sets or a smaller batch"
            )
        self.length = max(1, int(self.first[-1]) // (2 * batch)) if length is None else length

    def __len__(self) -> int:
        return self.length

    def indices(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices (batch,) of the anchors and positives of item ``index``, over all sets."""
        return self._draw(np.random.default_rng([self.seed, index]))

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        selected = rng.choice(len(self.start), self.batch, replace=False)
        start, count = self.start[selected], self.count[selected]
        first = rng.integers(count)
        second = rng.integers(count - 1)
        second += second >= first  # uniform over the others
        return self.members[start + first], self.members[start + second]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index])
        anchor, positive = (self._read(indices) for indices in self._draw(rng))
        rotate_both(anchor, positive, self.augment, rng)
        return {"anchor": as_patches(anchor), "positive": as_patches(positive)}

    def _read(self, indices: np.ndarray) -> np.ndarray:
        """Patches (n,32,32) uint8 of indices over all sets."""
        out = np.empty((len(indices), PATCH_SIZE, PATCH_SIZE), np.uint8)
        owner = np.searchsorted(self.first, indices, side="right") - 1
        for i in np.unique(owner):
            in_set = owner == i
            out[in_set] = self.sets[i].images[indices[in_set] - self.first[i]]
        return out


def _by_point(sets: Sequence[PatchSet]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patches of all sets ordered by point; start and count of the points with two or more."""
    members, starts, counts = [], [], []
    offset = 0
    for patches in sets:
        members.append(offset + np.argsort(patches.points, kind="stable"))
        _, count = np.unique(patches.points, return_counts=True)
        start = offset + np.cumsum(count) - count
        starts.append(start[count > 1])
        counts.append(count[count > 1])
        offset += len(patches)
    return np.concatenate(members), np.concatenate(starts), np.concatenate(counts)


def rotate_both(
    anchor: np.ndarray, positive: np.ndarray, augment: str, rng: np.random.Generator
) -> None:
    """Rotate and mirror pairs of patches (n,P,P) in place; see ``PatchBatches``."""
    if augment == "none":
        return
    n = len(anchor)
    if augment == "fliprot":
        transposed, mirrored = rng.random(n) < 0.5, rng.random(n) < 0.5
        for patches in (anchor, positive):
            patches[transposed] = patches[transposed].swapaxes(1, 2)
            patches[mirrored] = patches[mirrored, :, ::-1]
        return
    rot90 = np.where(rng.random(n) < 0.5, rng.integers(1, 4, n), 0)
    mirrored = rng.random(n) < 0.5
    for patches in (anchor, positive):
        for k in (1, 2, 3):
            patches[rot90 == k] = np.rot90(patches[rot90 == k], k, axes=(1, 2))
        patches[mirrored] = patches[mirrored, ::-1]


# ---- files


def _folder(folder: str | Path, what: str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; expected a {what}")
    return folder


def _read_gray(path: Path) -> np.ndarray:
    """(H,W) uint8."""
    if not path.is_file():
        raise DataError(f"{path}: missing. {_REMEDY}")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}): truncated or damaged. {_REMEDY}"
        ) from error


def _integers(path: Path, what: str, usecols: int | None = None) -> np.ndarray:
    """(lines, columns) int64."""
    if not path.is_file():
        raise DataError(f"{path}: missing. {_REMEDY}")
    try:
        if not path.stat().st_size:
            raise ValueError("empty file")
        return np.loadtxt(
            path, dtype=np.int64, ndmin=2, usecols=None if usecols is None else (usecols,)
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected {what} ({first_line(error)}): truncated or damaged. {_REMEDY}"
        ) from error


def _cached(
    folder: Path,
    cache: str | Path | None,
    shape: tuple[int, ...],
    sources: Sequence[Path],
    blocks: Callable[[], Iterator[np.ndarray]],
) -> Path:
    """Write ``blocks()`` to a ``.npy`` of uint8 ``shape``, unless it exists and its sources have
    the recorded sizes and modification times.
    """
    file = folder / CACHE_NAME if cache is None else Path(cache) / f"{folder.resolve().name}.npy"
    missing = [path for path in sources if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: missing. {_REMEDY}")
    record = record_path(file, "sources.json")
    stamps = {path.name: file_stamp(path) for path in sources}
    recorded = read_settings(record)
    if recorded is None and file.is_file():  # an earlier version wrote no record
        valid = file.stat().st_mtime >= max(path.stat().st_mtime for path in sources)
    else:
        valid = recorded == stamps
    if valid and _has_shape(file, shape):
        return file
    try:
        # written, not mapped: on a full disk, writing raises an error, a memory map crashes
        with atomic_path(file) as tmp_path, open(tmp_path, "wb") as out:
            np.lib.format.write_array_header_1_0(
                out, {"descr": "|u1", "fortran_order": False, "shape": shape}
            )
            for block in blocks():
                out.write(block.tobytes())
        write_json(record, stamps)
    except OSError as error:
        size = int(np.prod(shape)) // 1_000_000 + 1
        raise DataError(
            f"{file}: cannot be written ({error}); give a cache folder with {size} MB of free space"
        ) from error
    return file


def _has_shape(file: Path, shape: tuple[int, ...]) -> bool:
    try:
        content = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return content.shape == shape and content.dtype == np.uint8
