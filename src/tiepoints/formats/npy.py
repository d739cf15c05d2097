"""Features as the original authors' files: NAME.kpt.npy (N,4) x, y, scale, score and NAME.dsc.npy
(N,D).

We write float32. The published files are float64, and REKD's have the angle in degrees,
counter-clockwise, as a fifth column; both are read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from ..files import atomic_path
from ..structs import Features, Keypoints


def feature_paths(base: Path) -> tuple[Path, Path]:
    """Files of key points and descriptors for ``base``, the image's path below the results
    folder.
    """
    return base.with_name(base.name + ".kpt.npy"), base.with_name(base.name + ".dsc.npy")


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as tmp_path, tmp_path.open("wb") as file:
        np.save(file, array)


def write_features(base: Path, features: Features) -> None:
    """Write both files, each whole or not at all, the key points last: their file means that the
    image is done.
    """
    points, descriptors = feature_paths(base)
    if features.descriptors is not None:
        _save(descriptors, features.descriptors.cpu().numpy().astype(np.float32))
    columns = [features.xy, features.scale[:, None], features.score[:, None]]
    if bool(features.angle.any()):
        columns.append(torch.rad2deg(-features.angle).remainder(360)[:, None])
    _save(points, torch.cat(columns, dim=1).cpu().numpy().astype(np.float32))


def read_features(base: Path, image_size: tuple[int, int] = (0, 0)) -> Features:
    """Features written by us or by the original code.

    Raises:
        FileNotFoundError: no key points at ``base``.
        DataError: a file is damaged or has another shape.
    """
    points, descriptors = feature_paths(base)
    if not points.is_file():
        raise FileNotFoundError(f"no key points at {points}; extract the image first")
    table = _read(points)
    if table.ndim != 2 or table.shape[1] not in (4, 5):
        raise DataError(
            f"{points}: expected (N,4) or (N,5), found {table.shape}; extract the image again"
        )
    angle = torch.zeros(len(table))
    if table.shape[1] == 5:
        angle = torch.from_numpy(
            np.remainder(-np.radians(table[:, 4]), 2 * np.pi).astype(np.float32)
        )
    values = torch.from_numpy(table[:, :4].astype(np.float32))
    found = None
    if descriptors.is_file():
        found = torch.from_numpy(_read(descriptors).astype(np.float32))
        if found.ndim != 2 or len(found) != len(values):
            raise DataError(
                f"{descriptors}: expected ({len(values)},D), found {tuple(found.shape)}; extract "
                "the image again"
            )
    return Features(
        Keypoints(values[:, :2].clone(), values[:, 2].clone(), angle, values[:, 3].clone()),
        found,
        image_size,
    )


class FeatureFolder:
    """A folder of such files; an image's name is its path below the folder, / between parts."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder)

    def __enter__(self) -> FeatureFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is left open."""

    def __contains__(self, name: str) -> bool:
        return feature_paths(self.path / name)[0].is_file()

    def names(self) -> list[str]:
        """Names of the images with key points, sorted."""
        found = self.path.rglob("*.kpt.npy")
        return sorted(
            p.relative_to(self.path).as_posix().removesuffix(".kpt.npy")
            for p in found
            if not p.name.startswith(".")
        )

    def done(self, name: str, *, described: bool) -> bool:
        """Whether the image has key points, and descriptors where they are asked for."""
        points, descriptors = feature_paths(self.path / name)
        return points.is_file() and (not described or descriptors.is_file())

    def write(self, name: str, features: Features, image: Path | None = None) -> None:
        """Keep the features of an image."""
        base = self.path / name
        base.parent.mkdir(parents=True, exist_ok=True)
        write_features(base, features)

    def read(self, name: str) -> Features:
        """Features of an image; errors as ``read_features``."""
        return read_features(self.path / name)

    def clear(self) -> None:
        """Remove the features of all images."""
        for end in ("kpt", "dsc"):
            for path in self.path.rglob(f"*.{end}.npy"):
                path.unlink()


def _read(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}); extract the image again") from error
