"""Files of training pairs, so that several trainings can use the same data.

A file is in the safetensors format: ``image_a, image_b`` (N,S,S) uint8, ``H_ab`` (N,3,3) float64,
``mask_a, mask_b`` (N,ceil(S*S/8)) uint8 (eight pixels per byte, the first pixel in the highest bit)
and the settings in the header. It is written and read through memory maps, so memory use does not
grow with the number of pairs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..files import atomic_path
from ..formats.records import compatible, files_digest, with_program, without_information
from ..geometry import warp_image
from ..progress import track
from .synthetic import Pair, PairDataset, PairSettings, as_tensors

#: NumPy types of the safetensors type names.
NAMES = {"U8": np.uint8, "F64": np.float64}


def _layout(count: int, size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each array, in the order of the file."""
    packed = (count, (size * size + 7) // 8)
    return {
        "H_ab": ("F64", (count, 3, 3)),  # first, for its alignment
        "image_a": ("U8", (count, size, size)),
        "image_b": ("U8", (count, size, size)),
        "mask_a": ("U8", packed),
        "mask_b": ("U8", packed),
    }


def _offsets(layout: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, list[int]], int]:
    """First and last byte of each array after the header, and the size of all."""
    offsets, offset = {}, 0
    for name, (kind, shape) in layout.items():
        length = int(np.prod(shape)) * np.dtype(NAMES[kind]).itemsize
        offsets[name] = [offset, offset + length]
        offset += length
    return offsets, offset


def _header(
    layout: dict[str, tuple[str, tuple[int, ...]]],
    offsets: dict[str, list[int]],
    metadata: dict[str, Any],
) -> bytes:
    """Header of the safetensors format, padded to a multiple of eight bytes."""
    header: dict[str, Any] = {"__metadata__": {"pairs": json.dumps(metadata)}}
    for name, (kind, shape) in layout.items():
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": offsets[name]}
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def _metadata(
    photos: list[Path], settings: PairSettings, count: int, seed: int, preset: str
) -> dict[str, Any]:
    """Description of the pairs in the header of a file."""
    return with_program(
        {
            "count": count,
            "seed": seed,
            "preset": preset,
            **asdict(settings),
            "photos": len(photos),
            "data": files_digest(photos),
        }
    )


def write_pairs(
    path: Path,
    photos: list[Path],
    settings: PairSettings,
    count: int,
    *,
    seed: int,
    workers: int = 0,
    preset: str = "",
    progress: bool = False,
    keep: bool = False,
) -> None:
    """Draw ``count`` pairs and write them to ``path``; the file is written atomically.

    Args:
        path: the file.
        photos, settings, seed: see ``PairDataset``.
        count: number of pairs.
        workers: number of worker processes.
        preset: name of the settings, stored in the header.
        progress: show progress.
        keep: leave a file that already contains these pairs.

    Raises:
        DataError: the photographs have no texture.
        OSError: the disk is full or the folder is not writable.
    """
    metadata = _metadata(photos, settings, count, seed, preset)
    if keep and _contains(path, metadata):
        return
    dataset = PairDataset(photos, settings, seed=seed, length=count)
    layout = _layout(count, settings.size)
    offsets, size = _offsets(layout)
    text = _header(layout, offsets, metadata)
    with atomic_path(path) as tmp_path:
        with open(tmp_path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            try:
                _reserve(file, 8 + len(text) + size)
            except OSError as error:
                raise OSError(f"{path} could not be written ({error})") from error
        arrays = {
            name: np.memmap(tmp_path, NAMES[kind], "r+", 8 + len(text) + offsets[name][0], shape)
            for name, (kind, shape) in layout.items()
        }
        loader = DataLoader(_Raw(dataset), batch_size=None, num_workers=workers)
        for index, pair in enumerate(
            track(loader, total=count, unit="pair", label="pairs", enabled=progress)
        ):
            arrays["H_ab"][index] = pair["H_ab"]
            arrays["image_a"][index], arrays["image_b"][index] = pair["image_a"], pair["image_b"]
            arrays["mask_a"][index] = np.packbits(pair["mask_a"])
            arrays["mask_b"][index] = np.packbits(pair["mask_b"])
        for array in arrays.values():
            array.flush()


def contains_pairs(
    path: Path, photos: list[Path], settings: PairSettings, count: int, seed: int, preset: str = ""
) -> bool:
    """Whether a file has the pairs that ``write_pairs`` would write."""
    return _contains(path, _metadata(photos, settings, count, seed, preset))


def _contains(path: Path, metadata: dict[str, Any]) -> bool:
    """Whether a file has pairs of this description, of this version of the package."""
    try:
        info = PairFile(path).info
    except (FileNotFoundError, DataError):  # missing or damaged
        return False
    wanted = json.loads(json.dumps(metadata))
    same = without_information(info) == without_information(wanted)
    return same and compatible(info.get("version"))


def _reserve(file: Any, size: int) -> None:
    """Extend a file to ``size`` bytes; where supported, a full disk is detected here."""
    if hasattr(os, "posix_fallocate"):  # missing on macOS and Windows
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


class _Raw(Dataset):
    """Pairs as dicts of arrays, which worker processes can send."""

    def __init__(self, dataset: PairDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pair = self.dataset.pair(index)
        return {k: getattr(pair, k) for k in ("image_a", "image_b", "H_ab", "mask_a", "mask_b")}


class PairFile(Dataset):
    """Pairs of a file of ``write_pairs``, reshuffled in each pass over the file.

    Args:
        path: the file.
        length: number of items; default: the number of pairs in the file.
        seed: of the shuffling; None: in the order of the file.

    Raises:
        FileNotFoundError: no such file.
        DataError: not a file of pairs, or an incomplete one.
    """

    def __init__(self, path: str | Path, *, length: int | None = None, seed: int | None = None):
        self.path, self.seed = Path(path), seed
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no file of pairs at {path}; create one with `tiepoints pairs`"
            )
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
                f"{path} is not a complete file of pairs ({error}); create one with "
                "`tiepoints pairs`"
            ) from error
        self.length = self.info["count"] if length is None else length

    def __len__(self) -> int:
        return self.length

    @property
    def settings(self) -> PairSettings:
        """How the pairs were drawn."""
        names = {field.name for field in fields(PairSettings)}
        return PairSettings(**{key: self.info[key] for key in names if key in self.info})

    def pair(self, index: int) -> Pair:
        """Item ``index`` of the shuffled order."""
        epoch, position = divmod(index, self.info["count"])
        if self.seed is not None:
            rng = np.random.default_rng([self.seed, epoch])
            position = int(rng.permutation(self.info["count"])[position])
        size = self.info["size"]

        def unpack(bits: np.ndarray) -> np.ndarray:
            return np.unpackbits(bits, count=size * size).reshape(size, size).astype(bool)

        a = self.arrays
        return Pair(
            np.array(a["image_a"][position]),
            np.array(a["image_b"][position]),
            np.array(a["H_ab"][position]),
            unpack(a["mask_a"][position]),
            unpack(a["mask_b"][position]),
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return as_tensors(self.pair(index))


def preview(dataset: PairDataset | PairFile, count: int = 16) -> Image.Image:
    """Visualize pairs: image a, image b, and a warped onto b within their overlap; four pairs per
    row.
    """
    tiles = []
    for index in range(min(count, len(dataset))):
        pair = dataset.pair(index)
        warped = warp_image(
            torch.from_numpy(pair.image_a.copy()).float()[None, None],
            torch.from_numpy(pair.H_ab)[None],
        )
        overlap = np.where(pair.mask_b, warped[0, 0].numpy(), 0).astype(np.uint8)
        tiles.append(
            np.pad(
                np.concatenate([pair.image_a, pair.image_b, overlap], axis=1),
                2,
                constant_values=255,
            )
        )
    while len(tiles) % 4:
        tiles.append(np.zeros_like(tiles[0]))
    rows = [np.concatenate(tiles[i : i + 4], axis=1) for i in range(0, len(tiles), 4)]
    return Image.fromarray(np.concatenate(rows))
