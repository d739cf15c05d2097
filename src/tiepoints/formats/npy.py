"""Features in the format of the original Key.Net code: NAME.kpt.npy and NAME.dsc.npy.

Keypoints are (N,4) x, y, scale, score, with the angle in degrees, counter-clockwise, as an optional
fifth column (as in REKD); descriptors are (N,D). Files are written as float32; the float64 of the
published code is also read.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError, first_line
from ..files import Lock
from ..structs import Features, Keypoints
from .arrays import clear_arrays, feature_paths, write_arrays
from .records import array_digest


def write_features(base: Path, features: Features) -> str:
    """Write both files; see ``arrays.write_arrays``."""
    columns = [features.xy, features.scale[:, None], features.score[:, None]]
    if bool(features.angle.any()):
        columns.append(torch.rad2deg(-features.angle).remainder(360)[:, None])
    described = None if features.descriptors is None else features.descriptors.cpu().numpy()
    return write_arrays(base, torch.cat(columns, dim=1).cpu().numpy(), described)


def read_features(base: Path, image_size: tuple[int, int] = (0, 0)) -> Features:
    """Read features written by this package or by the original code.

    Raises:
        FileNotFoundError: no keypoints at ``base``.
        DataError: a file is damaged or has another shape.
    """
    keypoints, descriptors = feature_paths(base)
    if not keypoints.is_file():
        raise FileNotFoundError(f"no keypoints at {keypoints}; extract the image first")
    table = _read(keypoints)
    if table.ndim != 2 or table.shape[1] not in (4, 5):
        raise DataError(
            f"{keypoints}: expected (N,4) or (N,5), found {table.shape}; extract the image again"
        )
    angle = torch.zeros(len(table))
    if table.shape[1] == 5:
        angle = torch.from_numpy(
            np.remainder(-np.radians(table[:, 4]), 2 * np.pi).astype(np.float32)
        )
    values = torch.from_numpy(table[:, :4].astype(np.float32))
    described = None
    if descriptors.is_file():
        described = torch.from_numpy(_read(descriptors).astype(np.float32))
        if described.ndim != 2 or len(described) != len(values):
            raise DataError(
                f"{descriptors}: expected ({len(values)},D), found {tuple(described.shape)}; "
                "extract the image again"
            )
    return Features(
        Keypoints(values[:, :2].clone(), values[:, 2].clone(), angle, values[:, 3].clone()),
        described,
        image_size,
    )


class FeatureFolder:
    """Folder of feature files; an image's name is its path relative to the folder.

    Args:
        folder: the folder.
        write: prevent other processes from removing the features while these are written; several
            processes may write the features of different images.

    Raises:
        DataError: another process is removing the features.
    """

    def __init__(self, folder: str | Path, *, write: bool = False):
        self.path = Path(folder)
        self._lock: Lock | None = None
        if write:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path, shared=True)

    def __enter__(self) -> FeatureFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; no file is kept open."""
        if self._lock is not None:
            self._lock.close()

    def __contains__(self, name: str) -> bool:
        return feature_paths(self.path / name)[0].is_file()

    def names(self) -> list[str]:
        """Names of the images with keypoints, sorted."""
        return sorted(
            p.relative_to(self.path).as_posix().removesuffix(".kpt.npy")
            for p in self.path.rglob("*.kpt.npy")
            if not p.name.startswith(".")
        )

    def done(self, name: str, *, described: bool) -> bool:
        """Whether the image has keypoints and, if ``described``, descriptors."""
        keypoints, descriptors = feature_paths(self.path / name)
        return keypoints.is_file() and (not described or descriptors.is_file())

    def write(self, name: str, features: Features, image: Path | None = None) -> str:
        """Write the features of an image; returns their digest."""
        base = self.path / name
        base.parent.mkdir(parents=True, exist_ok=True)
        return write_features(base, features)

    def read(self, name: str) -> Features:
        """Read the features of an image; see ``read_features``."""
        return read_features(self.path / name)

    def digest(self, name: str) -> str:
        """Digest of the stored features of an image."""
        keypoints, descriptors = feature_paths(self.path / name)
        found = [_read(path) for path in (descriptors, keypoints) if path.is_file()]
        return array_digest(*found)

    def remove(self, names: Iterable[str]) -> None:
        """Remove the features of images."""
        for name in names:
            for path in feature_paths(self.path / name):
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the features of all images.

        Raises:
            DataError: another process is writing to the folder.
        """
        with nullcontext() if self._lock is None else self._lock.exclusive():
            clear_arrays(self.path)


def _read(path: Path) -> np.ndarray:
    """Read an array of numbers; its size is compared with that of the file before it is allocated.

    Raises:
        DataError: the file holds something else.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises various types for damaged files
        if not path.stat().st_size:
            raise DataError(f"{path} is empty; extract the image again") from error
        array = _read_empty(path)
        if array is None:
            reason = first_line(error).partition(". ")[0]
            raise DataError(f"{path} is damaged ({reason}); extract the image again") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise DataError(f"{path} is not an array of numbers; extract the image again")
    return np.array(array)


def _read_empty(path: Path) -> np.ndarray | None:
    """Read an array without elements, which cannot be mapped; None if it has any."""
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False) if path.stat().st_size < 2**12 else None
    except Exception:  # NumPy raises various types for damaged files
        return None
    return array if isinstance(array, np.ndarray) and not array.size else None
