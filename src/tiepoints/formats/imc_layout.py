"""Layout of submissions to the Image Matching Challenge 2021: names, limits, and reading of the
files.

See ``imc`` for the content of each file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, first_line
from .hdf5 import HDF5_ERRORS, require_h5py

DATASETS = ("phototourism", "pragueparks", "googleurban")
TASKS = ("stereo", "multiview")
#: Maximum number of keypoints per image, by category.
CATEGORIES = (2048, 8000)
CONFIG = "config.json"
#: Files of one value per keypoint, which are optional.
COLUMNS = ("scores", "scales", "angles", "orientations")
FILES = ("keypoints", "descriptors", *COLUMNS)
#: Image formats that the benchmark reads.
SUFFIXES = (".jpg", ".png")
#: Smallest and largest descriptor dimension, and maximum bytes per descriptor without custom
#: matches.
DESCRIPTOR_LENGTHS = (64, 2048)
DESCRIPTOR_BYTES = 512

#: Names that the benchmark accepts.
NAME = re.compile(r"[a-z0-9.-]+")
NAME_RULE = "lower case letters, digits, '-' and '.'"
#: The usual remedy of a damaged submission.
EXPORT_AGAIN = "export it again"


def subfolders(path: Path) -> list[Path]:
    """Visible folders in a folder, sorted."""
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def read_config(folder: str | Path) -> list[dict[str, Any]]:
    """Read the methods of ``config.json``; trailing commas are allowed, as in the benchmark's
    examples.

    Raises:
        FileNotFoundError: no such file.
        DataError: not a list of methods.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {path}")
    try:
        text = path.read_text(encoding="utf-8")
        try:
            config = json.loads(text)
        except ValueError:
            config = json.loads(re.sub(r",(\s*[\]}])", r"\1", text))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error})") from error
    if (
        not isinstance(config, list)
        or not config
        or not all(isinstance(method, dict) for method in config)
    ):
        raise DataError(f"{path} must be a list of methods")
    return config


def split_pair(key: str, names: frozenset[str]) -> tuple[str, str] | None:
    """The two of ``names`` in the key ``A-B`` of a pair, preferably with A > B; None if there are
    no such names.
    """
    splits = ((key[:i], key[i + 1 :]) for i, letter in enumerate(key) if letter == "-")
    pairs = [pair for pair in splits if pair[0] in names and pair[1] in names]
    return max(pairs, key=lambda pair: pair[0] > pair[1], default=None)


def read_arrays(path: Path) -> Iterator[tuple[str, np.ndarray | None]]:
    """Arrays at the top level of an HDF5 file by key; None for groups.

    Raises:
        DataError: not an HDF5 file, or a damaged one.
    """
    h5py = require_h5py()
    try:
        with h5py.File(path, "r") as file:
            for key, item in file.items():
                yield key, np.asarray(item[()]) if isinstance(item, h5py.Dataset) else None
    except HDF5_ERRORS as error:
        raise DataError(
            f"{path} is not an HDF5 file or is damaged ({first_line(error)}); {EXPORT_AGAIN}"
        ) from error


def either(numbers: Iterable[int]) -> str:
    """``1 or 2``."""
    return " or ".join(str(number) for number in numbers)
