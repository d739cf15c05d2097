"""Stores of features and matches of many images, and the record of their settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..errors import DataError
from ..files import write_json
from ..structs import Features, Matches
from .colmap import ColmapDatabase
from .hdf5 import FeatureFile, MatchFile
from .npy import FeatureFolder

#: File name of each format (``names.FORMATS``) in the results folder; npy has two files per image.
FILE_NAMES = {"npy": "", "h5": "features.h5", "colmap": "database.db"}


@runtime_checkable
class FeatureStore(Protocol):
    """Features of many images by name: ``FeatureFolder``, ``FeatureFile`` or ``ColmapDatabase``."""

    path: Path

    def __contains__(self, name: str) -> bool: ...
    def names(self) -> list[str]: ...
    def done(self, name: str, *, described: bool) -> bool: ...
    def write(self, name: str, features: Features, image: Path | None = None) -> None: ...
    def read(self, name: str) -> Features: ...
    def clear(self) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: object) -> None: ...


class MatchStore(Protocol):
    """Matches of many pairs by names: ``MatchFile`` or ``ColmapDatabase``."""

    def has_matches(self, a: str, b: str) -> bool: ...
    def write_matches(self, a: str, b: str, matches: Matches, count: int) -> None: ...


def create_features(
    form: str,
    folder: Path,
    *,
    camera: str = "auto",
    half: bool = False,
    overwrite: bool = False,
) -> FeatureStore:
    """Create the feature store of a format (``names.FORMATS``) in ``folder``, or open it for
    writing; a damaged file is an error, or deleted with ``overwrite``.

    Raises:
        ValueError, DataError, ImportError: as ``FeatureFile`` and ``ColmapDatabase``.
    """
    if form == "h5":
        return FeatureFile(folder / FILE_NAMES[form], write=True, half=half, overwrite=overwrite)
    if form == "colmap":
        return ColmapDatabase(
            folder / FILE_NAMES[form], camera=camera, write=True, overwrite=overwrite
        )
    return FeatureFolder(folder, write=True)


def open_features(path: Path) -> FeatureStore:
    """Open stored features for reading.

    Args:
        path: a folder of npy files, an ``.h5`` file (or only its journal, which a killed process
            leaves), a COLMAP ``.db``, or a folder that contains one of these.

    Raises:
        FileNotFoundError: no such path.
        DataError: no features in it.
    """
    if path.is_dir():
        if next(path.rglob("*.kpt.npy"), None) is not None:
            return FeatureFolder(path)
        names = [name for name in FILE_NAMES.values() if name]
        inner = [path / name for name in names if _exists(path / name)]
        if not inner:
            raise DataError(
                f"{path} contains no features; create them with: tiepoints extract IMAGES"
            )
        path = inner[0]
    if path.suffix == ".db":
        return ColmapDatabase(path)
    if not _exists(path):
        raise FileNotFoundError(
            f"no features at {path}; create them with: tiepoints extract IMAGES --format h5"
        )
    return FeatureFile(path)


def _exists(path: Path) -> bool:
    """Whether a file or its journal exists."""
    return path.is_file() or path.with_name(path.name + ".journal").is_file()


def settings_path(store: FeatureStore | MatchFile) -> Path:
    """Path of the file that records the settings of a store's content."""
    folder = isinstance(store, FeatureFolder)
    return store.path / "settings.json" if folder else store.path.with_suffix(".settings.json")


def check_settings(
    path: Path,
    settings: dict[str, Any],
    *,
    overwrite: bool,
    clear: Callable[[], None],
    results: Path,
    normalize: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Write the settings of results to ``path`` (JSON), after a comparison with existing ones.

    Args:
        path: file of the settings.
        settings: JSON values.
        overwrite: replace results of other settings.
        clear: removes the results; called before they are replaced, so that settings and results
            always belong together.
        results: path of the results, for the message.
        normalize: converts settings of earlier versions to the current form.

    Raises:
        DataError: there are results of other settings.
    """
    if path.is_file():
        try:
            before = normalize(json.loads(path.read_text()))
        except (ValueError, TypeError, AttributeError) as error:
            if not overwrite:
                raise DataError(f"{path} is damaged ({error}); use --overwrite") from error
            before = {}
        if before != settings:
            if not overwrite:
                keys = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
                changed = ", ".join(
                    f"{k}: {before.get(k)} before, {settings.get(k)} now" for k in keys
                )
                raise DataError(
                    f"{results} holds results of other settings ({changed}); use --overwrite, or "
                    "another --output for these"
                )
            clear()
    write_json(path, settings)
