"""Files of training patches, so that a small network can be trained on the same patches many times,
and towards the descriptors of a larger one that are computed once.

A file is a NumPy array (views, 2, N, C, 32, 32) uint8: for each pair of views, the patches of N
locations of one and the corresponding ones of the other; that of the descriptors is
(views, 2, N, D) float16. A text file next to each says what it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError, first_line
from ..files import atomic_path, write_json
from ..formats.records import json_digest, read_settings, record_path, with_program
from ..progress import track

VIEWS = ("anchor", "positive")
#: Keys of the descriptors of both views in the items of ``StoredPatches``.
TARGETS = ("anchor_target", "positive_target")


def write_patches(
    path: Path, pairs: Dataset, *, identity: Any, workers: int = 0, progress: bool = False
) -> None:
    """Write all items of a dataset of patch pairs, unless the file was made from the same ones.

    Args:
        path: the file (``.npy``); its folder is created.
        pairs: items with ``anchor, positive`` (N,C,32,32) in [0,1].
        identity: JSON value on which the items depend.
        workers: number of worker processes.
        progress: show progress.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    count = len(pairs)  # type: ignore[arg-type]
    shape = (count, len(VIEWS), *pairs[0][VIEWS[0]].shape)

    def blocks() -> Iterator[np.ndarray]:
        loader = DataLoader(pairs, batch_size=None, num_workers=workers)
        for item in track(loader, total=count, unit="view", label="patches", enabled=progress):
            both = torch.stack([item[key] for key in VIEWS])
            yield (both * 255).round().to(torch.uint8).numpy()

    _write(path, shape, "|u1", blocks, identity)


def write_targets(
    path: Path,
    patches: Path,
    describe: Callable[[Tensor], Tensor],
    *,
    identity: Any,
    progress: bool = False,
) -> None:
    """Write the descriptors of the patches of a file, unless the file was made from the same ones.

    Args:
        path: the file (``.npy``).
        patches: file of ``write_patches``.
        describe: patches (N,C,32,32) in [0,1] -> (N,D).
        identity: JSON value on which patches and descriptors depend.
        progress: show progress.

    Raises:
        DataError: ``patches`` is damaged.
        OSError: the disk is full or the folder is not writable.
    """
    stored = _open(patches)

    def vectors(views: np.ndarray) -> np.ndarray:
        found = describe(_as_tensor(views.reshape(-1, *views.shape[-3:])))
        return found.numpy().astype(np.float16).reshape(*views.shape[:2], -1)

    def blocks() -> Iterator[np.ndarray]:
        for views in track(
            stored, total=len(stored), unit="view", label="targets", enabled=progress
        ):
            yield vectors(views)

    dimension = vectors(stored[0]).shape[-1]
    _write(path, (*stored.shape[:3], dimension), "<f2", blocks, identity)


def _write(
    path: Path,
    shape: tuple[int, ...],
    kind: str,
    blocks: Callable[[], Iterator[np.ndarray]],
    identity: Any,
) -> None:
    """Write an array block by block, unless the file has the same identity and shape."""
    record = record_path(path, "settings.json")
    content = {"identity": json_digest(identity), "shape": list(shape)}
    if path.is_file() and (read_settings(record) or {}).items() >= content.items():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    try:
        # written, not mapped: on a full disk, writing raises an error, a memory map crashes
        with atomic_path(path) as tmp_path, open(tmp_path, "wb") as file:
            header = {"descr": kind, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks():
                file.write(np.ascontiguousarray(block, np.dtype(kind)).tobytes())
        write_json(record, with_program(content))
    except OSError as error:
        raise OSError(f"{path} could not be written ({error})") from error


def _as_tensor(gray: np.ndarray) -> Tensor:
    """Gray levels (...) uint8 as float32 in [0,1]."""
    return torch.from_numpy(gray.astype(np.float32)) / 255


def _open(path: Path) -> np.ndarray:
    """A file as a memory map.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} is no readable file of patches ({first_line(error)}); delete it to write it "
            "again"
        ) from error


class StoredPatches(Dataset):
    """Patch pairs of a file of ``write_patches``, reshuffled in each pass over the file.

    Items: ``anchor, positive`` (N,C,32,32) float32 in [0,1], and with ``targets`` their descriptors
    ``anchor_target, positive_target`` (N,D) float16.

    Args:
        path: the file.
        targets: file of ``write_targets``, or None.
        seed: of the shuffling.
        length: number of items.

    Raises:
        DataError: a file is damaged, or has another number of patches than the other.
    """

    def __init__(self, path: Path, targets: Path | None = None, *, seed: int = 0, length: int):
        self.seed, self.length = seed, length
        self.patches = _open(path)
        self.targets = None if targets is None else _open(targets)
        if self.targets is not None and self.targets.shape[:3] != self.patches.shape[:3]:
            raise DataError(f"{targets} has not the patches of {path}; delete it to write it again")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        epoch, position = divmod(index, len(self.patches))
        rng = np.random.default_rng([self.seed, epoch])
        position = int(rng.permutation(len(self.patches))[position])
        item = {
            key: _as_tensor(views) for key, views in zip(VIEWS, self.patches[position], strict=True)
        }
        if self.targets is not None:
            vectors = torch.from_numpy(np.array(self.targets[position]))
            item |= dict(zip(TARGETS, vectors, strict=True))
        return item
