"""Feature files of the original Key.Net code as arrays: NAME.kpt.npy and NAME.dsc.npy; without
torch.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ..files import atomic_path
from .records import array_digest


def feature_paths(base: Path) -> tuple[Path, Path]:
    """Files of keypoints and descriptors for ``base``, the image's path in the results folder."""
    return base.with_name(base.name + ".kpt.npy"), base.with_name(base.name + ".dsc.npy")


def _save(path: Path, array: np.ndarray) -> None:
    content = io.BytesIO()  # NumPy hides the reason for which a file cannot be written
    np.save(content, array)
    with atomic_path(path) as tmp_path:
        tmp_path.write_bytes(content.getbuffer())


def write_arrays(base: Path, keypoints: np.ndarray, descriptors: np.ndarray | None) -> str:
    """Write both files as float32, atomically; the keypoints last, as the mark of a complete image.

    Args:
        base: the image's path in the results folder.
        keypoints: (N,4) x, y, scale, score, or (N,5) with the angle (``formats.npy``).
        descriptors: (N,D), or None.

    Returns:
        digest of the arrays.
    """
    paths = feature_paths(base)
    arrays = []
    if descriptors is not None:
        arrays.append(descriptors.astype(np.float32))
        _save(paths[1], arrays[0])
    arrays.append(keypoints.astype(np.float32))
    _save(paths[0], arrays[-1])
    return array_digest(*arrays)


def clear_arrays(folder: Path) -> None:
    """Remove the feature files of all images below a folder."""
    for kind in ("kpt", "dsc"):
        for path in folder.rglob(f"*.{kind}.npy"):
            path.unlink()
