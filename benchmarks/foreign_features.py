"""Write the published output of other detectors in our layout of stored features, for rows of the
papers whose method does not run here.

One reader per format; the layout is that of docs/formats.md ("Features of other methods").

    python benchmarks/foreign_features.py METHOD SOURCE OUTPUT --images IMAGES [--unit U]
    tiepoints evaluate IMAGES --systems tilde=OUTPUT,tilde+hardnet=OUTPUT@upright+hardnet

For each image ``SEQUENCE/NAME.EXT`` below IMAGES the method's file is read from SOURCE:

    tilde       SEQUENCE/NAME.mat, ``keypts`` (6,N): the matrix that its detectors return
    dnet        SEQUENCE/NAME.mat, ``frames`` (3,N), ``peakScores`` (1,N): outputs of DDet.detect
    tcdet       SEQUENCE/NAME.mat, ``feature`` (N,6), ``score`` (N,1)
    lift        SEQUENCE/NAME_ori.txt or NAME_kp.txt, 13 columns; NAME_desc.h5 with ``descriptors``
    lf-net      SEQUENCE/NAME.EXT.npz, ``kpts``, ``feats`` or ``descs``, ``scales``, ``oris``
    superpoint  SEQUENCE/NAME.npz, ``pts`` (3,N), ``desc`` (256,N): outputs of the frontend's run
"""

from __future__ import annotations

import argparse
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tiepoints.errors import DataError
from tiepoints.files import list_images
from tiepoints.formats.npy import FeatureFolder
from tiepoints.structs import Features, Keypoints

#: What NumPy, SciPy and h5py raise for damaged files and for other versions of their formats.
UNREADABLE = (
    *(OSError, DataError, KeyError, ValueError, IndexError, NotImplementedError, EOFError),
    zipfile.BadZipFile,
)


@dataclass
class Points:
    """Keypoints of an image: ``xy`` (N,2) with the center of the first pixel at 0, ``size`` (N,) in
    the method's unit, ``score`` (N,), ``angle`` (N,) in radians from +x towards +y (clockwise),
    ``descriptors`` (N,D) or None.
    """

    xy: np.ndarray
    size: np.ndarray
    score: np.ndarray
    angle: np.ndarray
    descriptors: np.ndarray | None = None

    @classmethod
    def of(cls, xy, size=None, score=None, angle=None, descriptors=None) -> Points:
        n = len(xy)
        size = np.ones(n) if size is None else size
        score = np.ones(n) if score is None else score  # without a ranking, as MSER
        angle = np.zeros(n) if angle is None else angle
        return cls(xy, *(np.asarray(v).reshape(n) for v in (size, score, angle)), descriptors)


def _matlab(path: Path, *names: str) -> list[np.ndarray]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path)
    except (MatReadError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error})") from error
    missing = [name for name in names if name not in content]
    if missing:
        raise DataError(f"{path} has no variable {missing[0]}")
    return [np.asarray(content[name], dtype=np.float64) for name in names]


def tilde(base: Path) -> Points:
    """Columns x, y, -, -, score, scale; MATLAB counts pixels from 1."""
    (table,) = _matlab(base.with_suffix(".mat"), "keypts")
    return Points.of(table[:2].T - 1, table[5], table[4])


def dnet(base: Path) -> Points:
    """Rows x, y, scale; MATLAB counts pixels from 1."""
    frames, scores = _matlab(base.with_suffix(".mat"), "frames", "peakScores")
    return Points.of(frames[:2].T - 1, frames[2], scores)


def tcdet(base: Path) -> Points:
    """Rows of an affine frame a11, a12, x, a21, a22, y; MATLAB counts pixels from 1."""
    table, scores = _matlab(base.with_suffix(".mat"), "feature", "score")
    return Points.of(table[:, [2, 5]] - 1, table[:, 0], scores)


def lift(base: Path) -> Points:
    """Text: two lines of header, then x, y, size, angle in degrees (as OpenCV's), response, ...."""
    stem = base.with_suffix("")
    paths = [stem.with_name(f"{stem.name}_{kind}.txt") for kind in ("ori", "kp")]
    path = next((path for path in paths if path.is_file()), paths[-1])
    table = np.loadtxt(path, skiprows=2, ndmin=2)
    descriptors = None
    file = stem.with_name(f"{stem.name}_desc.h5")
    if file.is_file():
        import h5py

        with h5py.File(file) as content:
            descriptors = np.asarray(content["descriptors"])
    angle = np.radians(table[:, 3])
    return Points.of(table[:, :2], table[:, 2], table[:, 4], angle, descriptors)


def lf_net(base: Path) -> Points:
    """No scores: an evaluation averages over ten random picks if there are too many keypoints."""
    with np.load(base.with_name(base.name + ".npz")) as content:
        found = dict(content)
    descriptors = found.get("descs", found.get("feats"))
    return Points.of(found["kpts"], found.get("scales"), None, found.get("oris"), descriptors)


def superpoint(base: Path) -> Points:
    """x, y, confidence; a descriptor per column."""
    with np.load(base.with_suffix(".npz")) as content:
        points, descriptors = content["pts"], content["desc"]
    return Points.of(points[:2].T, None, points[2], None, descriptors.T)


#: Method -> reader, and the size in its unit of a keypoint that is scale 1 here, that is, whose
#: patch is 44 px wide. TILDE and D-Net write one fixed size; TCDET writes frames as D-Net; LIFT the
#: sigma of SIFT, whose first level is 1.6.
METHODS: dict[str, tuple[Callable[[Path], Points], float]] = {
    "tilde": (tilde, 10.0),
    "dnet": (dnet, 3.0),
    "tcdet": (tcdet, 3.0),
    "lift": (lift, 1.6),
    "lf-net": (lf_net, 1.0),
    "superpoint": (superpoint, 1.0),
}


def features(points: Points, unit: float, size: tuple[int, int]) -> Features:
    """``Features`` of an image of ``size`` (width, height), strongest first.

    Raises:
        DataError: arrays of different lengths, or keypoints that lie outside the image or nowhere.
    """
    xy = np.asarray(points.xy, dtype=np.float32)
    if points.descriptors is not None and len(points.descriptors) != len(xy):
        raise DataError(f"{len(xy)} keypoints but {len(points.descriptors)} descriptors")
    # a comparison with NaN is false
    if len(xy) and not (xy.min() >= -1 and (xy.max(axis=0) <= np.array(size)).all()):
        low, high = xy.min(axis=0).tolist(), xy.max(axis=0).tolist()
        raise DataError(f"keypoints from {low} to {high}, but the image has {size} pixels")
    order = torch.from_numpy(np.argsort(-points.score, kind="stable").copy())
    values = [
        torch.from_numpy(np.asarray(v, dtype=np.float32))[order]
        for v in (xy, points.size / unit, np.mod(points.angle, 2 * np.pi), points.score)
    ]
    described = points.descriptors
    return Features(
        Keypoints(*values),
        None if described is None else torch.from_numpy(described.astype(np.float32))[order],
        size,
    )


def convert(
    method: str, source: Path, output: Path, images: Path, unit: float | None = None
) -> list[str]:
    """Convert the features of all images below ``images``; returns what failed, one per line."""
    read, default = METHODS[method]
    store, listing = FeatureFolder(output), list_images(images)
    failed = [f"{path}: {reason}" for path, reason in listing.refused]
    for path in listing.images:
        name = path.relative_to(images)
        try:
            with Image.open(path) as image:
                size = image.size
            found = features(read(source / name), default if unit is None else unit, size)
        except UNREADABLE as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
            continue
        store.write(name.as_posix(), found)
    return failed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--unit", type=float, help="size of a keypoint of scale 1")
    args = parser.parse_args(argv)
    failed = convert(args.method, args.source, args.output, args.images, args.unit)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
