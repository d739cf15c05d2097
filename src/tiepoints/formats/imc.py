"""Submissions to the Image Matching Challenge 2021 (IMC): finding the images, writing, reading and
checking.

A submission consists of ``SUBMISSION/config.json`` and ``SUBMISSION/DATASET/SEQUENCE/*.h5``. Each
HDF5 file has one float32 array per image at the top level, named as the image without its
extension: ``keypoints`` (n,2), ``descriptors`` (n,D), ``scores``, ``scales``, ``angles``,
``orientations`` (n,). Pixel coordinates and the direction of angles are the same as ours
(OpenCV's); angles are in degrees. The benchmark reads only ``orientations.h5``, its tutorial writes
``angles.h5``: both are written. Arrays of one value per keypoint are one-dimensional, because the
benchmark sorts scores along the last axis. The optional ``matches.h5`` has one array (2,m) per
pair, ``A-B`` with A > B as strings: keypoints of A, keypoints of B.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import DataError
from ..files import NOT_TEXT, is_image_name, is_text, remove_temporary, write_text
from ..structs import Features, Keypoints, Matches
from .hdf5 import atomic_hdf5
from .imc_check import Violation, check_imc
from .imc_layout import (
    CATEGORIES,
    COLUMNS,
    CONFIG,
    DATASETS,
    EXPORT_AGAIN,
    FILES,
    NAME,
    NAME_RULE,
    SUFFIXES,
    TASKS,
    either,
    read_arrays,
    read_config,
    split_pair,
    subfolders,
)

__all__ = [
    "CATEGORIES",
    "COLUMNS",
    "CONFIG",
    "DATASETS",
    "FILES",
    "SUFFIXES",
    "TASKS",
    "Violation",
    "category",
    "check_imc",
    "check_name",
    "find_sequences",
    "make_config",
    "read_config",
    "read_matches",
    "read_sequence",
    "slug",
    "write_config",
    "write_matches",
    "write_sequence",
]


# ---- images


class Sequences(NamedTuple):
    """Images of a benchmark folder.

    Attributes:
        images: ``DATASET/SEQUENCE`` -> image name without extension -> path.
        refused: (path, reason) of images and folders that cannot be used.
        skipped: number of files that are not images.
    """

    images: dict[str, dict[str, Path]]
    refused: list[tuple[str, str]]
    skipped: int


def find_sequences(root: str | Path) -> Sequences:
    """Find the images below ``root``/DATASET/SEQUENCE.

    They are in ``set_100/images`` (validation data), ``images``, or the folder itself (test data).

    Raises:
        FileNotFoundError: no such folder.
        DataError: it contains none of the benchmark's datasets.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}")
    sequences: dict[str, dict[str, Path]] = {}
    skipped: list[tuple[str, str]] = []
    num_others = 0
    folders = subfolders(root)
    if not any(folder.name in DATASETS for folder in folders):
        names = ", ".join(folder.name for folder in folders[:5]) or "no folder"
        raise DataError(
            f"{root} must contain the benchmark's datasets ({', '.join(DATASETS)}), each with one "
            f"folder per sequence; found {names}"
        )
    for dataset in folders:
        if dataset.name not in DATASETS:
            reason = f"not a dataset of the benchmark ({', '.join(DATASETS)})"
            skipped.append((str(dataset), reason))
            continue
        if not subfolders(dataset):
            skipped.append((str(dataset), "no sequence in this dataset"))
        for sequence in subfolders(dataset):
            images, others = _find_images(sequence, skipped)
            num_others += others
            if images:
                sequences[f"{dataset.name}/{sequence.name}"] = images
            else:
                reason = f"no image ({' or '.join(SUFFIXES)}) in it, in images or in set_100/images"
                skipped.append((str(sequence), reason))
    return Sequences(sequences, skipped, num_others)


def _find_images(sequence: Path, skipped: list[tuple[str, str]]) -> tuple[dict[str, Path], int]:
    """Images of a sequence by name without extension, and the number of files that are not images;
    reasons are added to ``skipped``.
    """
    images: dict[str, Path] = {}
    num_others = 0
    for folder in (sequence / "set_100" / "images", sequence / "images", sequence):
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.is_dir():
                continue
            if path.name.startswith("."):
                num_others += 1
            elif not path.is_file():
                skipped.append((str(path), "a broken link"))
            elif not is_text(path.name):
                skipped.append((str(path), NOT_TEXT))
            elif path.suffix not in SUFFIXES:
                if is_image_name(path):
                    formats = " and ".join(SUFFIXES)
                    reason = f"the benchmark reads only {formats}; convert or rename it"
                    skipped.append((str(path), reason))
                else:
                    num_others += 1
            elif path.stem in images:
                other = images[path.stem].name
                reason = f"{other} has the same name in the benchmark; rename one"
                skipped.append((str(path), reason))
            else:
                images[path.stem] = path
        if images:
            break
    return images, num_others


# ---- writing


def check_name(name: str, what: str) -> str:
    """Return ``name`` if the benchmark accepts it.

    Args:
        name: the name.
        what: description of the name for the message.

    Raises:
        ValueError: it contains other characters than the benchmark accepts.
    """
    if not NAME.fullmatch(name):
        suggestion = slug(name)
        raise ValueError(
            f"{what} may use {NAME_RULE} only; got {name!r}"
            + (f", try {suggestion!r}" if suggestion else "")
        )
    return name


def slug(text: str) -> str:
    """Replace the characters of ``text`` that the benchmark does not accept."""
    return re.sub(r"[^a-z0-9.-]+", "-", text.lower()).strip("-")


def category(num_keypoints: int) -> int:
    """Smallest category that allows ``num_keypoints`` per image.

    Raises:
        ValueError: too many or too few keypoints.
    """
    for most in CATEGORIES:
        if 1 <= num_keypoints <= most:
            return most
    raise ValueError(
        f"the challenge allows 1 to {CATEGORIES[-1]} keypoints per image (categories "
        f"{either(CATEGORIES)}), got {num_keypoints}"
    )


# The options are parameters of their own, because each is one of the command's options.
def make_config(
    label: str,
    keypoint: str,
    descriptor: str,
    num_keypoints: int,
    datasets: Iterable[str],
    *,
    ratio: float,
    threshold: float,
    matches: bool = False,
    metadata: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Content of ``config.json``: one method, both tasks of each dataset.

    Args:
        label: name of the results (``json_label``).
        keypoint, descriptor: names of the methods.
        num_keypoints: maximum per image; the config contains its category.
        datasets: names of the datasets.
        ratio: maximum ratio of the distances to the nearest and the second nearest neighbor, in
            both directions, in [0.1, 1].
        threshold: of the benchmark's DEGENSAC, pixels.
        matches: the submission has custom matches; the benchmark then neither matches nor runs a
            RANSAC, but fits all matches.
        metadata: of the method; default: the label and no authors.

    Raises:
        ValueError: an option that the benchmark does not accept.
    """
    common = {
        "json_label": check_name(label, "label"),
        "keypoint": check_name(keypoint, "keypoint"),
        "descriptor": check_name(descriptor, "descriptor"),
    }
    if not 0.1 <= ratio <= 1:
        raise ValueError(f"ratio must lie in [0.1, 1] for this benchmark, got {ratio}")
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    description = f"{keypoint} keypoints with {descriptor} descriptors (tiepoints)"
    method: dict[str, Any] = {
        "metadata": metadata or _metadata(label, description),
        "config_common": {**common, "num_keypoints": category(num_keypoints)},
    }
    if matches:
        setting = {"use_custom_matches": True, "custom_matches_name": label}
        geometry: dict[str, Any] = {"method": "cv2-8pt"}
    else:
        setting, geometry = _matcher_config(ratio), _degensac_config(threshold)
    for dataset in datasets:
        method[f"config_{dataset}_stereo"] = {**setting, "geom": geometry}
        method[f"config_{dataset}_multiview"] = {**setting, "colmap": {}}
    return [method]


def _metadata(name: str, description: str) -> dict[str, Any]:
    """Metadata of a method without authors."""
    return {
        "publish_anonymously": False,
        "authors": "",
        "contact_email": "",
        "method_name": name,
        "method_description": description,
        "link_to_website": "",
        "link_to_pdf": "",
    }


def _matcher_config(ratio: float) -> dict[str, Any]:
    """Settings of the benchmark's matcher: mutual nearest neighbors with a ratio test."""
    return {
        "use_custom_matches": False,
        "matcher": {
            "method": "nn",
            "distance": "L2",
            "flann": True,
            "num_nn": 1,
            "filtering": {"type": "snn_ratio_pairwise", "threshold": ratio},
            "symmetric": {"enabled": True, "reduce": "both"},
        },
        "outlier_filter": {"method": "none"},
    }


def _degensac_config(threshold: float) -> dict[str, Any]:
    """Settings of the benchmark's DEGENSAC."""
    return {
        "method": "cmp-degensac-f",
        "threshold": threshold,
        "confidence": 0.999999,
        "max_iter": 100000,
        "error_type": "sampson",
        "degeneracy_check": True,
    }


def write_config(folder: str | Path, config: list[dict[str, Any]]) -> None:
    """Write ``config.json`` atomically."""
    path = Path(folder) / CONFIG
    remove_temporary(path)
    write_text(path, json.dumps(config, indent=2) + "\n")


def write_sequence(folder: str | Path, features: Iterable[tuple[str, Features]]) -> None:
    """Write the files of one sequence; existing files are replaced atomically.

    Args:
        folder: ``SUBMISSION/DATASET/SEQUENCE``.
        features: (image name without extension, its features with descriptors); the arrays of an
            image without keypoints have length 0.

    Raises:
        ValueError: no descriptors.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{kind}.h5" for kind in FILES}
    with ExitStack() as stack:
        for path in paths.values():
            remove_temporary(path)
        files = {kind: stack.enter_context(atomic_hdf5(path)) for kind, path in paths.items()}
        for name, extracted in features:
            if extracted.descriptors is None:
                raise ValueError(f"{name} has no descriptors, but the benchmark needs them")
            degrees = _degrees(extracted.angle)
            values = {
                "keypoints": extracted.xy,
                "descriptors": extracted.descriptors,
                "scores": extracted.score,
                "scales": extracted.scale,
                "angles": degrees,
                "orientations": degrees,
            }
            for kind, file in files.items():
                file.create_dataset(name, data=values[kind].cpu().numpy().astype(np.float32))


def _degrees(angle: torch.Tensor) -> torch.Tensor:
    """Radians -> degrees in [0, 360), float32."""
    degrees = torch.rad2deg(angle.double()).remainder(360).float()
    # values slightly below 0 become 360 in float32
    return degrees.where(degrees < 360, degrees.new_zeros(()))


def write_matches(
    folder: str | Path, matches: Iterable[tuple[str, str, Matches]], name: str = "matches.h5"
) -> None:
    """Write the custom matches of one sequence; an existing file is replaced atomically.

    Args:
        folder: ``SUBMISSION/DATASET/SEQUENCE``.
        matches: (image a, image b, matches from a to b), names without extension, in any order.
        name: of the file.

    Raises:
        DataError: two pairs have the same key in the benchmark.
    """
    path = Path(folder) / name
    remove_temporary(path)
    with atomic_hdf5(path) as file:
        for a, b, pair_matches in matches:
            index = pair_matches.index.cpu().numpy().astype(np.int32).T
            key = f"{a}-{b}" if a > b else f"{b}-{a}"
            if key in file:
                raise DataError(
                    f"{path}: two pairs have the key {key}; rename an image that has a '-' in its "
                    "name"
                )
            file.create_dataset(key, data=index if a > b else index[::-1])


# ---- reading


def read_sequence(folder: str | Path) -> dict[str, Features]:
    """Read the features of one sequence by image name.

    Without their file, scores and scales are 1 and angles 0 (radians). Image sizes are (0, 0).

    Raises:
        FileNotFoundError: no keypoints.
        DataError: a file is damaged, or does not have one entry per keypoint; ``check_imc`` lists
            all such problems.
    """
    folder = Path(folder)
    tables = {
        kind: _read_all(folder / f"{kind}.h5")
        for kind in FILES
        if (folder / f"{kind}.h5").is_file()
    }
    if "keypoints" not in tables:
        raise FileNotFoundError(f"no keypoints at {folder / 'keypoints.h5'}")
    angles = tables.get("orientations", tables.get("angles"))
    features = {}
    for name, xy in tables["keypoints"].items():
        descriptors = tables.get("descriptors", {}).get(name)
        if (
            xy.ndim != 2
            or xy.shape[1] != 2
            or (descriptors is not None and (descriptors.ndim != 2 or len(descriptors) != len(xy)))
        ):
            raise DataError(
                f"{folder}: keypoints of {name} must be (n,2) and its descriptors (n,D); "
                f"{EXPORT_AGAIN}"
            )
        keypoints = Keypoints(
            torch.from_numpy(xy.astype(np.float32)),
            _column(folder, tables.get("scales"), name, len(xy), default=1.0),
            torch.deg2rad(_column(folder, angles, name, len(xy), default=0.0)),
            _column(folder, tables.get("scores"), name, len(xy), default=1.0),
        )
        features[name] = Features(
            keypoints,
            None if descriptors is None else torch.from_numpy(descriptors.astype(np.float32)),
            (0, 0),
        )
    return features


def _column(
    folder: Path, table: dict[str, np.ndarray] | None, name: str, count: int, *, default: float
) -> torch.Tensor:
    """One value (count,) per keypoint of image ``name``; ``default`` without a table."""
    if table is None:
        return torch.full((count,), default)
    if name not in table or table[name].size != count:
        raise DataError(
            f"{folder}: expected one value for each of the {count} keypoints of {name}; "
            f"{EXPORT_AGAIN}"
        )
    return torch.from_numpy(table[name].reshape(-1).astype(np.float32))


def read_matches(path: str | Path, names: Iterable[str]) -> dict[tuple[str, str], Matches]:
    """Read the custom matches of one file by pair (A, B); scores are 1.

    Args:
        path: the file.
        names: of the images of the sequence, needed to split the keys.

    Raises:
        FileNotFoundError: no file.
        DataError: a key without two image names, or an array that is not (2,m).
    """
    path, known = Path(path), frozenset(names)
    if not path.is_file():
        raise FileNotFoundError(f"no matches at {path}")
    matches = {}
    for key, index in _read_all(path).items():
        pair = split_pair(key, known)
        if pair is None or index.ndim != 2 or len(index) != 2:
            raise DataError(
                f"{path}: {key} must be the names of two images joined by -, with an array (2,m), "
                f"found {index.shape}"
            )
        matches[pair] = Matches(
            torch.from_numpy(index.T.astype(np.int64)), torch.ones(index.shape[1])
        )
    return matches


def _read_all(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file; groups are skipped."""
    return {key: array for key, array in read_arrays(path) if array is not None}
