"""Stores of features and matches of many images, and the records of what made their content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import DataError
from ..files import write_json
from ..structs import Features, Matches
from .colmap import ColmapDatabase
from .hdf5 import FeatureFile
from .npy import FeatureFolder
from .records import (
    RecordLog,
    changes,
    compatible,
    program_version,
    read_settings,
    record_path,
    with_program,
    without_information,
)

#: File name of each format (``names.FORMATS``) in the results folder; npy has two files per image.
FILE_NAMES = {"npy": "", "h5": "features.h5", "colmap": "database.db"}


class FeatureStore(Protocol):
    """Features of many images by name: ``FeatureFolder``, ``FeatureFile`` or ``ColmapDatabase``."""

    path: Path

    def __contains__(self, name: str) -> bool: ...
    def names(self) -> list[str]: ...
    def done(self, name: str, *, described: bool) -> bool: ...
    def write(self, name: str, features: Features, image: Path | None = None) -> str: ...
    def read(self, name: str) -> Features: ...
    def digest(self, name: str) -> str: ...
    def remove(self, names: Iterable[str]) -> None: ...
    def clear(self) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: object) -> None: ...


class MatchStore(Protocol):
    """Matches of many pairs by names: ``MatchFile`` or ``ColmapDatabase``."""

    path: Path

    def has_matches(self, a: str, b: str) -> bool: ...
    def write_matches(self, a: str, b: str, matches: Matches, count: int) -> None: ...
    def holds_matches(self) -> bool: ...
    def remove_matches(self, names: Iterable[str]) -> None: ...
    def clear_matches(self) -> None: ...


def create_features(
    form: str,
    folder: Path,
    *,
    camera: str = "auto",
    shared: Mapping[str, Any] | None = None,
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
            folder / FILE_NAMES[form],
            camera=camera,
            shared=shared,
            write=True,
            overwrite=overwrite,
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
        inner = [path / name for name in names if exists(path / name)]
        if not inner:
            raise DataError(
                f"{path} contains no features; create them with: tiepoints extract IMAGES"
            )
        path = inner[0]
    if path.suffix == ".db":
        return ColmapDatabase(path)
    if not exists(path):
        raise FileNotFoundError(
            f"no features at {path}; create them with: tiepoints extract IMAGES --format h5"
        )
    return FeatureFile(path)


def exists(path: Path) -> bool:
    """Whether a file of results exists, or its journal, which a killed process leaves."""
    return path.is_file() or path.with_name(path.name + ".journal").is_file()


def settings_path(store: FeatureStore) -> Path:
    """Path of the file that records the settings of a store's content."""
    return _record(store, "settings.json")


def images_path(store: FeatureStore) -> Path:
    """Path of the log with the record of each image's features."""
    return _record(store, "images.jsonl")


def match_settings_path(store: MatchStore) -> Path:
    """Path of the settings of matches, which a database stores together with features."""
    if isinstance(store, ColmapDatabase):
        return record_path(store.path, "matches.settings.json")
    return record_path(store.path, "settings.json")


def matches_path(store: MatchStore) -> Path:
    """Path of the log with the digest of the features that each image was matched with."""
    return record_path(store.path, "matches.jsonl")


def _record(store: Any, end: str) -> Path:
    if isinstance(store, FeatureFolder):
        return store.path / end
    return record_path(store.path, end)


def holds_features(store: FeatureStore) -> bool:
    """Whether a store has content that would be mixed with features written to it."""
    names = store.names()
    if isinstance(store, ColmapDatabase):  # images may be imported before their features
        return any(store.done(name, described=False) for name in names)
    return bool(names)


def clear_features(store: FeatureStore) -> None:
    """Remove all features and their records."""
    RecordLog(images_path(store)).clear()
    if isinstance(store, ColmapDatabase):
        clear_all_matches(store)
    store.clear()


def clear_all_matches(store: MatchStore) -> None:
    """Remove all matches and their records."""
    RecordLog(matches_path(store)).clear()
    store.clear_matches()


def check_settings(
    path: Path,
    settings: dict[str, Any],
    *,
    overwrite: bool,
    clear: Callable[[], None],
    results: Path,
    normalize: Callable[[dict[str, Any]], dict[str, Any]],
    has_results: Callable[[], bool],
    usable: bool,
) -> None:
    """Write the settings of results to ``path`` (JSON), after a comparison with existing ones.

    Args:
        path: file of the settings.
        settings: JSON values.
        overwrite: replace results of other settings, of another version or of another program.
        clear: removes the results; called before they are replaced, so that settings and results
            always belong together.
        results: path of the results, for the message.
        normalize: converts settings of earlier versions to the current form.
        has_results: whether there are results; called unless the settings agree.
        usable: whether results without settings can be used as they are, as features can.

    Raises:
        DataError: there are results of other settings, or without settings.
    """
    if path.is_file():
        reason = _disagreement(path, settings, overwrite, results, normalize)
    else:
        reason = foreign_message(results, f"there is no {path.name}", usable=usable)
    if reason and has_results():
        if not overwrite:
            raise DataError(reason)
        clear()
    write_json(path, with_program(settings))


def _disagreement(
    path: Path,
    settings: dict[str, Any],
    overwrite: bool,
    results: Path,
    normalize: Callable[[dict[str, Any]], dict[str, Any]],
) -> str:
    """Why existing results must not be extended; empty if their settings agree."""
    stored = read_settings(path)
    try:
        if stored is None:
            raise ValueError("no JSON object")
        before = normalize(without_information(stored))
    except (ValueError, TypeError, AttributeError) as error:
        if not overwrite:
            raise DataError(f"{path} is damaged ({error}); use --overwrite") from error
        return f"{path} is damaged"
    remedy = "use --overwrite, or another --output for these"
    if changed := changes(before, without_information(settings)):
        return f"{results} holds results of other settings ({', '.join(changed)}); {remedy}"
    if not compatible(stored.get("version")):
        version = stored["version"]
        return f"{results} holds results of version {version}, not {program_version()}; {remedy}"
    return ""


def foreign_message(results: Path, reason: str, *, usable: bool) -> str:
    """The message about results without a valid record; features are ``usable`` by matching."""
    use = f"match them as they are with --features {results}, " if usable else ""
    return (
        f"{results} holds results without a record of how they were made ({reason}), possibly of "
        f"another program; {use}replace them with --overwrite, or choose another --output"
    )


#: Number of images whose features are compared with their records when a store is opened.
SAMPLES = 8


def differing_features(store: FeatureStore, log: RecordLog) -> tuple[list[str], list[str]]:
    """Names of images whose stored features differ from their records, and of those whose features
    are damaged, among ``SAMPLES`` images.

    If the store was replaced by that of another program, all of them differ.
    """
    names = sorted(log.entries)
    differing, damaged = [], []
    for name in names[:: max(1, len(names) // SAMPLES)][:SAMPLES]:
        if not store.done(name, described=False):
            continue
        try:
            if store.digest(name) != log.entries[name].get("features"):
                differing.append(name)
        except DataError:
            damaged.append(name)
    return differing, damaged


def own_settings(store: FeatureStore) -> dict[str, Any] | None:
    """Settings of stored features of this package; None for those of other programs: without
    settings, or with features that differ from their records.
    """
    settings = read_settings(settings_path(store))
    if settings is None or "descriptor" not in settings:
        return None
    with RecordLog(images_path(store)) as log:
        return None if differing_features(store, log)[0] else without_information(settings)
