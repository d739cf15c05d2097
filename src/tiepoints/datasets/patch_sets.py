"""The two published sets of corresponding patches, for those who have them: PhotoTour and HPatches.

PhotoTour (Brown, Hua and Winder, PAMI 2011; also called UBC or Brown): a folder with
``patches0000.bmp`` and so on, 16 x 16 patches of 64 x 64 pixels each, ``info.txt`` (a patch a line,
its 3-D point first) and pair files such as ``m50_100000_100000_0.txt``. HPatches (Balntas et al.,
CVPR 2017): a folder a sequence with ``ref.png``, ``e1.png`` to ``t5.png``, columns of 65 x 65
patches.

Both are kept as 32 x 32 gray levels in one ``.npy`` a set, made on first use and read through a
memory map: 450,000 patches are 460 MB of file and next to no memory. ``PatchBatches`` turns any
number of such sets into training batches.
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
from tqdm import tqdm

from ..errors import DataError
from ..files import atomic_path

PATCH_SIZE = 32
PHOTOTOUR_SIDE = 64
MOSAIC_SIDE = 1024
PER_MOSAIC = (MOSAIC_SIDE // PHOTOTOUR_SIDE) ** 2
HPATCHES_SIDE = 65
#: The columns of a sequence: the reference, then five images with easy, hard and tough errors of
#: the detected frame.
COLUMNS = ("ref", *(f"{noise}{image}" for noise in "eht" for image in range(1, 6)))
CACHE_NAME = "patches32.npy"
TEST_PAIRS = "m50_100000_100000_0.txt"
AUGMENTATIONS = ("none", "fliprot", "turns")
_AGAIN = "Unpack the archive again"


class PatchSet:
    """Patches in a file, and which of them show the same point.

    Attributes:
        name, folder: where they come from.
        file: ``.npy`` of (N,32,32) uint8 gray levels.
        points: (N,) int64; patches of one number correspond, numbers of different sets have nothing
            to do with each other.
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
        # a pickled memory map would be the whole array, once for each worker of a loader
        return {**self.__dict__, "_images": None}

    def __len__(self) -> int:
        return len(self.points)

    def patches(self, indices: np.ndarray) -> Tensor:
        """(n,1,32,32) float32 in [0,1] of the patches ``indices`` (n,)."""
        return as_patches(self.images[indices])


def as_patches(gray: np.ndarray) -> Tensor:
    """Gray levels (n,P,P) uint8 -> (n,1,P,P) float32 in [0,1]."""
    return torch.from_numpy(gray.astype(np.float32))[:, None] / 255


def shrink(gray: np.ndarray) -> np.ndarray:
    """(n,P,P) uint8 -> (n,32,32) uint8, bilinear without a filter, as published descriptors had
    these sets.

    Of 64 pixels that is the mean of 2 x 2, of 65 nearly so. Rounded to whole gray levels, as an
    image library does.
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
    """One PhotoTour set (``liberty``, ``notredame``, ``yosemite``); the first call reads all
    mosaics, which takes seconds.

    Args:
        folder: holds ``info.txt`` and the mosaics.
        cache: folder for ``NAME.npy``; default ``patches32.npy`` beside the mosaics.

    Raises:
        FileNotFoundError: no such folder.
        DataError: a file is missing, cut or of another size; it is named, with what to do.
    """
    folder = _folder(folder, "PhotoTour set (with info.txt and patches0000.bmp)")
    info = folder / "info.txt"
    points = _integers(info, "a 3-D point and a second number a line", usecols=0)[:, 0]
    mosaics = [folder / f"patches{k:04d}.bmp" for k in range(-(-len(points) // PER_MOSAIC))]
    for path in mosaics:
        if not path.is_file():
            raise DataError(
                f"{path}: missing; {info} lists {len(points)} patches, {len(mosaics)} mosaics. "
                f"{_AGAIN}"
            )
    beyond = folder / f"patches{len(mosaics):04d}.bmp"
    if beyond.exists():
        raise DataError(
            f"{info}: {len(points)} lines fill {len(mosaics)} mosaics, but there is "
            f"{beyond.name}: info.txt is cut. {_AGAIN}"
        )

    def parts() -> Iterator[np.ndarray]:
        left = len(points)
        for path in tqdm(mosaics, desc=folder.name, unit="mosaic", leave=False):
            yield shrink(read_mosaic(path)[:left])
            left -= PER_MOSAIC

    file = _cached(folder, cache, (len(points), PATCH_SIZE, PATCH_SIZE), [info, *mosaics], parts)
    return PatchSet(folder.resolve().name, folder, file, points)


def read_mosaic(path: Path) -> np.ndarray:
    """(256,64,64) uint8 patches of a PhotoTour mosaic, row by row.

    Raises:
        DataError: unreadable, cut, or not 1024 x 1024.
    """
    gray = _read_gray(path)
    if gray.shape != (MOSAIC_SIDE, MOSAIC_SIDE):
        raise DataError(
            f"{path}: {gray.shape[1]} x {gray.shape[0]} pixels; a mosaic has {MOSAIC_SIDE} x "
            f"{MOSAIC_SIDE}. {_AGAIN}"
        )
    side, count = PHOTOTOUR_SIDE, MOSAIC_SIDE // PHOTOTOUR_SIDE
    return gray.reshape(count, side, count, side).swapaxes(1, 2).reshape(PER_MOSAIC, side, side)


def read_test_pairs(file: str | Path, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a PhotoTour pair file (``m50_100000_100000_0.txt``): indices (K,2) int64, and
    whether they correspond, (K,) bool.

    Lines are: patch, its 3-D point, unused, patch, its 3-D point, unused (and a last, unused number
    in some files).

    Args:
        file: the pair file.
        points: (N,) of the set, from ``info.txt``; the pair file must agree with it.

    Raises:
        DataError: missing, cut, or of another set.
    """
    path = Path(file)
    rows = _integers(path, "six or seven numbers a line")
    if rows.shape[1] not in (6, 7):
        raise DataError(
            f"{path}: {rows.shape[1]} numbers a line, expected 6 or 7 (patch, point, unused, "
            "patch, point, unused)"
        )
    named = re.fullmatch(r"m\d+_(\d+)_\d+_\d+\.txt", path.name)
    if named and len(rows) < int(named[1]):
        raise DataError(
            f"{path}: {len(rows)} pairs, the name promises {named[1]}: the file is cut. {_AGAIN}"
        )
    pairs, told = rows[:, [0, 3]], rows[:, [1, 4]]
    if pairs.min() < 0 or pairs.max() >= len(points):
        raise DataError(
            f"{path}: names patch {pairs.max()}, the set has {len(points)}: the file belongs to "
            "another set"
        )
    wrong = (points[pairs] != told).any(axis=1).nonzero()[0]
    if len(wrong):
        raise DataError(
            f"{path}: line {wrong[0] + 1} gives other 3-D points than info.txt: the file belongs "
            "to another set"
        )
    return pairs, told[:, 0] == told[:, 1]


# ---- HPatches


def hpatches_sequences(folder: str | Path, names: Iterable[str] | None = None) -> list[Path]:
    """Sequence folders (those with a ``ref.png``) in the order of their names, or those called
    ``names`` in that order.

    Raises:
        FileNotFoundError: no such folder.
        DataError: no sequence, or a named one is missing.
    """
    folder = _folder(folder, "HPatches folder (hpatches-release, with v_wall/ref.png and so on)")
    found = {path.parent.name: path.parent for path in sorted(folder.glob("*/ref.png"))}
    if not found:
        raise DataError(
            f"{folder}: no sequence with a ref.png; unpack hpatches-release.tar.gz and name its "
            "folder (not the full images)"
        )
    if names is None:
        return list(found.values())
    wanted = list(names)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(
            f"{folder}: no sequence {', '.join(missing[:5])} ({len(missing)} of {len(wanted)} "
            f"missing). {_AGAIN}"
        )
    return [found[name] for name in wanted]


def read_split(file: str | Path, split: str) -> dict[str, list[str]]:
    """The benchmark's ``splits.json``: ``{"test": names, "train": names}`` of ``a``, ``b``, ``c``
    and so on; some have no ``train``.

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
    """(N,65,65) uint8 patches of one file of HPatches.

    Raises:
        DataError: missing, unreadable, cut, or not a column of 65 x 65 patches.
    """
    gray = _read_gray(path)
    height, width = gray.shape
    if width != HPATCHES_SIDE or height % HPATCHES_SIDE or not height:
        raise DataError(
            f"{path}: {width} x {height} pixels; expected a column of 65 x 65 patches. {_AGAIN}"
        )
    return gray.reshape(-1, HPATCHES_SIDE, HPATCHES_SIDE)


def read_columns(sequence: Path) -> Iterator[np.ndarray]:
    """The sixteen columns of a sequence in the order of ``COLUMNS``, each (N,65,65) uint8 of the
    same N.

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
                f"{path}: {len(column)} patches, {sequence / 'ref.png'} has {count}. {_AGAIN}"
            )
        yield column


def open_hpatches(
    folder: str | Path, names: Iterable[str] | None = None, *, cache: str | Path | None = None
) -> list[PatchSet]:
    """A set for each sequence of HPatches: sixteen patches a point, reference first.

    Args:
        folder: holds the sequence folders.
        names: which sequences (the training part of a split); default all.
        cache: folder for a ``SEQUENCE.npy`` each; default ``patches32.npy`` in each sequence.

    Raises:
        FileNotFoundError: no such folder.
        DataError: a file is missing, cut or of another size; it is named, with what to do.
    """
    sets = []
    for sequence in tqdm(
        hpatches_sequences(folder, names), desc="hpatches", unit="sequence", leave=False
    ):
        count = len(read_column(sequence / "ref.png"))
        sources = [sequence / f"{name}.png" for name in COLUMNS]

        def parts(sequence: Path = sequence) -> Iterator[np.ndarray]:
            return (shrink(column) for column in read_columns(sequence))

        file = _cached(
            sequence, cache, (len(COLUMNS) * count, PATCH_SIZE, PATCH_SIZE), sources, parts
        )
        sets.append(
            PatchSet(sequence.name, sequence, file, np.tile(np.arange(count), len(COLUMNS)))
        )
    return sets


# ---- training batches


class PatchBatches(Dataset):
    """Training batches: index -> ``anchor, positive`` (batch,1,32,32) float32 in [0,1], each pair
    of another point.

    Points are drawn evenly, and two different patches of each. Nothing is drawn ahead, and item
    ``i`` depends on ``seed``, ``i`` and the sets alone.

    Args:
        sets: one or more sets; a batch mixes them.
        batch: pairs in a batch: 1024 in HardNet's recipe, 512 in HyNet's.
        length: batches offered; default what HyNet calls an epoch, ``patches // (2 * batch)``.
        seed: of all that is drawn.
        augment: what is done alike to both patches of a pair. ``fliprot`` (HardNet): by a coin
            each, transposed and mirrored left to right. ``turns`` (HyNet): by a coin each, turned
            by 90, 180 or 270 degrees and mirrored upside down. ``none``.

    Raises:
        ValueError: unknown augmentation, no sets, a batch or length that is not positive.
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
        #: All patches, point by point; a point's are ``members[start : start + count]``.
        self.members, self.start, self.count = _by_point(self.sets)
        if len(self.start) < batch:
            names = ", ".join(s.name for s in self.sets[:3])
            raise DataError(
                f"{names}: {len(self.start)} points with two patches, a batch needs {batch}: name "
                "more sets or a smaller batch"
            )
        self.length = max(1, int(self.first[-1]) // (2 * batch)) if length is None else length

    def __len__(self) -> int:
        return self.length

    def indices(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Anchors and positives (batch,) of item ``index``, counted through all sets."""
        return self._draw(np.random.default_rng([self.seed, index]))

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.choice(len(self.start), self.batch, replace=False)
        start, count = self.start[chosen], self.count[chosen]
        one = rng.integers(count)
        two = rng.integers(count - 1)
        two += two >= one  # any other than the first, all alike
        return self.members[start + one], self.members[start + two]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index])
        anchor, positive = (self._read(indices) for indices in self._draw(rng))
        rotate_both(anchor, positive, self.augment, rng)
        return {"anchor": as_patches(anchor), "positive": as_patches(positive)}

    def _read(self, indices: np.ndarray) -> np.ndarray:
        """(n,32,32) uint8 of indices through all sets."""
        out = np.empty((len(indices), PATCH_SIZE, PATCH_SIZE), np.uint8)
        owner = np.searchsorted(self.first, indices, side="right") - 1
        for number in np.unique(owner):
            here = owner == number
            out[here] = self.sets[number].images[indices[here] - self.first[number]]
        return out


def _by_point(sets: Sequence[PatchSet]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patches of all sets ordered by point, and start and count of the points that have two patches
    or more.
    """
    members, starts, counts = [], [], []
    offset = 0
    for each in sets:
        members.append(offset + np.argsort(each.points, kind="stable"))
        _, count = np.unique(each.points, return_counts=True)
        start = offset + np.cumsum(count) - count
        starts.append(start[count > 1])
        counts.append(count[count > 1])
        offset += len(each)
    return np.concatenate(members), np.concatenate(starts), np.concatenate(counts)


def rotate_both(
    anchor: np.ndarray, positive: np.ndarray, augment: str, rng: np.random.Generator
) -> None:
    """Turn and mirror pairs of patches (n,P,P) in place, the two of a pair alike; see
    ``PatchBatches``.
    """
    if augment == "none":
        return
    n = len(anchor)
    if augment == "fliprot":
        across, mirrored = rng.random(n) < 0.5, rng.random(n) < 0.5
        for patches in (anchor, positive):
            patches[across] = patches[across].swapaxes(1, 2)
            patches[mirrored] = patches[mirrored, :, ::-1]
        return
    turns = np.where(rng.random(n) < 0.5, rng.integers(1, 4, n), 0)
    mirrored = rng.random(n) < 0.5
    for patches in (anchor, positive):
        for quarter in (1, 2, 3):
            patches[turns == quarter] = np.rot90(patches[turns == quarter], quarter, axes=(1, 2))
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
        raise DataError(f"{path}: missing. {_AGAIN}")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read ({error}): cut or damaged. {_AGAIN}") from error


def _integers(path: Path, what: str, usecols: int | None = None) -> np.ndarray:
    """(lines, columns) int64."""
    if not path.is_file():
        raise DataError(f"{path}: missing. {_AGAIN}")
    try:
        if not path.stat().st_size:
            raise ValueError("empty file")
        return np.loadtxt(
            path, dtype=np.int64, ndmin=2, usecols=None if usecols is None else (usecols,)
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected {what} ({str(error).splitlines()[0]}): cut or damaged. {_AGAIN}"
        ) from error


def _cached(
    folder: Path,
    cache: str | Path | None,
    shape: tuple[int, ...],
    sources: Sequence[Path],
    parts: Callable[[], Iterator[np.ndarray]],
) -> Path:
    """The ``.npy`` of uint8 ``shape`` made of ``parts()``, unless it is there and newer than its
    sources.
    """
    file = folder / CACHE_NAME if cache is None else Path(cache) / f"{folder.resolve().name}.npy"
    missing = [path for path in sources if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: missing. {_AGAIN}")
    if (
        file.is_file()
        and file.stat().st_mtime >= max(path.stat().st_mtime for path in sources)
        and _has_shape(file, shape)
    ):
        return file
    try:
        # written, not mapped: a full disk is an error here and a crash there
        with atomic_path(file) as tmp_path, open(tmp_path, "wb") as out:
            np.lib.format.write_array_header_1_0(
                out, {"descr": "|u1", "fortran_order": False, "shape": shape}
            )
            for part in parts():
                out.write(part.tobytes())
    except OSError as error:
        size = int(np.prod(shape)) // 1_000_000 + 1
        raise DataError(
            f"{file}: cannot be written ({error}); name a folder with {size} MB to spare as cache"
        ) from error
    return file


def _has_shape(file: Path, shape: tuple[int, ...]) -> bool:
    try:
        found = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return found.shape == shape and found.dtype == np.uint8
