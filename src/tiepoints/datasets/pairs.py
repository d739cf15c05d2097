"""A file of training pairs: written once, read by every training that is to be compared with
another.

One safetensors file with ``image_a, image_b`` (N,S,S) uint8, ``H_ab`` (N,3,3) float64, ``mask_a,
mask_b`` (N,ceil(S*S/8)) uint8 (eight pixels a byte, first pixel in the highest bit) and the
settings in the header. It is written and read through memory maps, so 12,000 pairs need no more
memory than one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import DataError
from ..files import atomic_path
from ..geometry import warp_image
from .synthetic import Pair, PairDataset, PairSettings, as_tensors

NAMES = {"U8": np.uint8, "F64": np.float64}


def _layout(count: int, size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    packed = (count, (size * size + 7) // 8)
    return {
        "H_ab": ("F64", (count, 3, 3)),  # first, so that it is aligned
        "image_a": ("U8", (count, size, size)),
        "image_b": ("U8", (count, size, size)),
        "mask_a": ("U8", packed),
        "mask_b": ("U8", packed),
    }


def write_pairs(
    path: Path,
    photos: list[Path],
    settings: PairSettings,
    count: int,
    *,
    seed: int,
    workers: int = 0,
    preset: str = "",
) -> None:
    """Make ``count`` pairs and write them to ``path``; the file appears when it is complete.

    Raises:
        DataError: no texture in the photographs.
        OSError: the disk is full or the folder not writable.
    """
    dataset = PairDataset(photos, settings, seed=seed, length=count)
    layout = _layout(count, settings.size)
    header: dict[str, Any] = {
        "__metadata__": {
            "pairs": json.dumps(
                {"count": count, "seed": seed, "preset": preset, **asdict(settings)}
            )
        }
    }
    offset = 0
    for name, (kind, shape) in layout.items():
        length = int(np.prod(shape)) * np.dtype(NAMES[kind]).itemsize
        header[name] = {
            "dtype": kind,
            "shape": list(shape),
            "data_offsets": [offset, offset + length],
        }
        offset += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as tmp_path:
        with open(tmp_path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            _reserve(file, 8 + len(text) + offset)
        arrays = {
            name: np.memmap(
                tmp_path, NAMES[kind], "r+", 8 + len(text) + header[name]["data_offsets"][0], shape
            )
            for name, (kind, shape) in layout.items()
        }
        loader = DataLoader(_Raw(dataset), batch_size=None, num_workers=workers)
        for index, pair in enumerate(tqdm(loader, total=count, unit="pair")):
            arrays["H_ab"][index] = pair["H_ab"]
            arrays["image_a"][index], arrays["image_b"][index] = pair["image_a"], pair["image_b"]
            arrays["mask_a"][index] = np.packbits(pair["mask_a"])
            arrays["mask_b"][index] = np.packbits(pair["mask_b"])
        for array in arrays.values():
            array.flush()


def _reserve(file: Any, size: int) -> None:
    """Make a file ``size`` bytes long; where the system can, a full disk shows now, not at the
    end.
    """
    if hasattr(os, "posix_fallocate"):  # neither macOS nor Windows has it
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


class _Raw(Dataset):
    """Pairs as dicts of arrays, which workers can send."""

    def __init__(self, dataset: PairDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pair = self.dataset.pair(index)
        return {k: getattr(pair, k) for k in ("image_a", "image_b", "H_ab", "mask_a", "mask_b")}


class PairFile(Dataset):
    """Pairs of a file of ``write_pairs``, shuffled anew in each turn through the file.

    Args:
        path: the file.
        length: items offered; default each pair once, in the order of the file.
        seed: of the shuffling; None keeps the order of the file.

    Raises:
        FileNotFoundError, DataError: no such file, or another kind of file.
    """

    def __init__(self, path: str | Path, *, length: int | None = None, seed: int | None = None):
        self.path, self.seed = Path(path), seed
        if not self.path.is_file():
            raise FileNotFoundError(f"no file of pairs at {path}; make one with `tiepoints pairs`")
        try:
            with open(self.path, "rb") as file:
                start = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(start, 100_000)))
            self.info = json.loads(header["__metadata__"]["pairs"])
            self.arrays = {
                name: np.memmap(
                    self.path, NAMES[kind], "r", 8 + start + header[name]["data_offsets"][0], shape
                )
                for name, (kind, shape) in _layout(self.info["count"], self.info["size"]).items()
            }
        except (ValueError, KeyError, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} is no complete file of pairs ({error}); make one with `tiepoints pairs`"
            ) from error
        self.length = self.info["count"] if length is None else length

    def __len__(self) -> int:
        return self.length

    def pair(self, index: int) -> Pair:
        """Item ``index`` of the shuffled order."""
        turn, place = divmod(index, self.info["count"])
        if self.seed is not None:
            place = int(
                np.random.default_rng([self.seed, turn]).permutation(self.info["count"])[place]
            )
        size = self.info["size"]

        def unpack(bits: np.ndarray) -> np.ndarray:
            return np.unpackbits(bits, count=size * size).reshape(size, size).astype(bool)

        a = self.arrays
        return Pair(
            np.array(a["image_a"][place]),
            np.array(a["image_b"][place]),
            np.array(a["H_ab"][place]),
            unpack(a["mask_a"][place]),
            unpack(a["mask_b"][place]),
        )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return as_tensors(self.pair(index))


def preview(dataset: PairDataset | PairFile, count: int = 16) -> Image.Image:
    """A picture of pairs: a, b, and a warped onto b where both see the same; three columns a pair,
    four pairs a row.
    """
    tiles = []
    for index in range(min(count, len(dataset))):
        pair = dataset.pair(index)
        moved = warp_image(
            torch.from_numpy(pair.image_a.copy()).float()[None, None],
            torch.from_numpy(pair.H_ab)[None],
        )
        shown = np.where(pair.mask_b, moved[0, 0].numpy(), 0).astype(np.uint8)
        tiles.append(
            np.pad(
                np.concatenate([pair.image_a, pair.image_b, shown], axis=1), 2, constant_values=255
            )
        )
    while len(tiles) % 4:
        tiles.append(np.zeros_like(tiles[0]))
    rows = [np.concatenate(tiles[i : i + 4], axis=1) for i in range(0, len(tiles), 4)]
    return Image.fromarray(np.concatenate(rows))
