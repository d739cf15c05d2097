"""Describe what made a file of results: the record of anything that this package writes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import DataError, WeightsError, first_line
from ..formats import imc
from ..formats.colmap import ColmapDatabase
from ..formats.hdf5 import FeatureFile, MatchFile
from ..formats.npy import FeatureFolder
from ..formats.records import PROGRAM, RecordLog, read_settings, record_path
from ..formats.store import (
    FILE_NAMES,
    differing_features,
    exists,
    images_path,
    own_settings,
    settings_path,
)
from ..training.loop import read_checkpoint
from ..weights import NETWORKS, file_checksum, read_graph, table

#: Arrays of ``Features.save``; the features of an evaluation have more.
NPZ_ARRAYS = {"xy", "scale", "angle", "score", "image_size"}


@dataclass(frozen=True)
class Info:
    """What made a file.

    Attributes:
        path: of the file or folder.
        kind: such as ``features``, ``matches``, ``weights``, ``evaluation``; ``unknown``.
        ours: whether this package wrote it; false without a valid record.
        reason: why not; empty if ``ours``.
        record: what is recorded.
    """

    path: str
    kind: str
    ours: bool = True
    reason: str = ""
    record: dict[str, Any] = field(default_factory=dict)


def describe(path: str | Path) -> Info:
    """Describe a file or folder by its content.

    Raises:
        FileNotFoundError: no such file or folder.
        DataError, ImportError: it cannot be read.
    """
    path = Path(path)
    if path.suffix == ".journal":
        path = path.with_suffix("")
    journal = path.with_name(path.name + ".journal")
    if path.is_dir():
        return _folder(path)
    if not path.is_file() and not journal.is_file():
        raise FileNotFoundError(f"no file or folder at {path}")
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(16)
    if not path.is_file() or start.startswith(b"\x89HDF"):
        return _hdf5(path)
    if start.startswith(b"SQLite format 3"):
        return _database(path)
    if start.startswith(b"PK"):
        return _zip(path)
    if path.name.endswith((".kpt.npy", ".dsc.npy")):
        return _npy(path)
    if start[8:9] == b"{":
        return _safetensors(path)
    if path.suffix == ".onnx":
        return _graph(path)
    if path.suffix == ".json":
        return _json(path)
    return _unknown(path)


def _unknown(path: Path, reason: str = "it is no file that tiepoints writes") -> Info:
    return Info(str(path), "unknown", False, reason)


def _folder(path: Path) -> Info:
    """Results of an evaluation, a submission, or a folder of features."""
    run = read_settings(path / "run.json")
    if run is not None and "systems" in run:
        return Info(str(path), "evaluation", record=run)
    if (path / imc.CONFIG).is_file():
        return _submission(path)
    stores = [_features(FeatureFolder(path))] if (path / "settings.json").is_file() else []
    stores += [
        describe(path / name) for name in FILE_NAMES.values() if name and exists(path / name)
    ]
    if len(stores) == 1:
        return stores[0]
    if stores:
        reason = next((store.reason for store in stores if not store.ours), "")
        names = {str(path): "npy"}
        record = {names.get(s.path, Path(s.path).name): s.record for s in stores}
        return Info(str(path), "features", not reason, reason, record)
    if next(path.rglob("*.kpt.npy"), None) is not None:
        return Info(str(path), "features", False, "it has no settings.json, the record of features")
    return _unknown(path, "it is no folder of results")


def _features(store: Any) -> Info:
    """Features in a store of any format."""
    settings = own_settings(store)
    if settings is None:
        if settings_path(store).is_file():
            with RecordLog(images_path(store)) as log:
                differing = differing_features(store, log)[0]
            reason = f"{settings_path(store).name} is damaged"
            if differing:
                reason = f"the features of {differing[0]} differ from their record"
        else:
            reason = f"it has no {settings_path(store).name}, the record of features"
        return Info(str(store.path), "features", False, reason)
    with RecordLog(images_path(store)) as log:
        recorded = sum(store.done(name, described=False) for name in log.entries)
    full = read_settings(settings_path(store)) or settings
    return Info(str(store.path), "features", record={**full, "images": recorded})


def _hdf5(path: Path) -> Info:
    """hloc's features or matches."""
    settings = read_settings(record_path(path, "settings.json"))
    if settings is not None and "ratio" in settings:
        with RecordLog(record_path(path, "matches.jsonl")) as log, MatchFile(path) as store:
            if log.entries and store.foreign:
                return Info(str(path), "matches", False, "it was replaced by another program")
            return Info(str(path), "matches", record={**settings, "images": len(log.entries)})
    with FeatureFile(path) as store:
        return _features(store)


def _database(path: Path) -> Info:
    """Features and matches of a COLMAP database."""
    matches = read_settings(record_path(path, "matches.settings.json"))
    if record_path(path, "settings.json").is_file():
        with ColmapDatabase(path) as store:
            features = _features(store)
    else:  # opening would change a database of an older version of COLMAP
        reason = f"it has no {record_path(path, 'settings.json').name}, the record of features"
        features = Info(str(path), "features", False, reason)
    if matches is None:
        return features
    record = {"features": features.record, "matches": matches}
    if not features.ours:
        record["features"] = {"foreign": True, "reason": features.reason}
    return Info(str(path), "features and matches", record=record)


def _npy(path: Path) -> Info:
    """One image of a folder of features."""
    for folder in path.absolute().parents:
        settings = read_settings(folder / "settings.json")
        if settings is None or "descriptor" not in settings:
            continue
        name = path.absolute().relative_to(folder).as_posix()[: -len(".kpt.npy")]
        store = FeatureFolder(folder)
        with RecordLog(images_path(store)) as log:
            entry = log.get(name)
        if entry is None or entry.get("features") != store.digest(name):
            reason = f"{folder / 'images.jsonl'} has no record of its content"
            return Info(str(path), "features", False, reason)
        return Info(str(path), "features", record={**settings, "image": {"name": name, **entry}})
    return Info(str(path), "features", False, "no folder above it has settings.json, the record")


def _graph(path: Path) -> Info:
    """An eight-bit network."""
    try:
        found = read_graph(path)
    except WeightsError as error:
        return _unknown(path, first_line(error))
    checksum = file_checksum(path)
    record = {"network": found["network"], "settings": found["settings"], "sha256": checksum}
    return Info(str(path), "weights", record={**record, "quantization": found["facts"]})


def _safetensors(path: Path) -> Info:
    """Weights, or training pairs."""
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            count = sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118
        content = {
            key: json.loads(header[key]) for key in ("settings", "facts", "pairs") if key in header
        }
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        return _unknown(path, f"it is no readable safetensors file ({first_line(error)})")
    if not all(isinstance(value, dict) for value in content.values()):
        return _unknown(path, "its header is damaged")
    if "pairs" in content:
        return Info(str(path), "training pairs", record=content["pairs"])
    if header.get("network") not in NETWORKS:
        return Info(str(path), "weights", False, "its header names no network of tiepoints")
    checksum = file_checksum(path)
    record: dict[str, Any] = {
        "network": header["network"],
        "settings": content.get("settings"),
        "parameters": count,
        "sha256": checksum,
        "training": content.get("facts") or {},
    }
    embedded = [name for name, entry in table().items() if entry["sha256"] == checksum]
    if embedded:
        record["embedded"] = embedded[0]
    return Info(str(path), "weights", record=record)


def _zip(path: Path) -> Info:
    """A file of ``Features.save``, features of an evaluation, or a training checkpoint."""
    try:
        with ZipFile(path) as file:
            arrays = {Path(name).stem for name in file.namelist() if name.endswith(".npy")}
    except (BadZipFile, OSError) as error:
        return _unknown(path, f"it is damaged ({error})")
    if arrays >= NPZ_ARRAYS:
        return _npz(path)
    try:
        state = read_checkpoint(path)
        identity = dict(state["identity"])
    except (WeightsError, KeyError, TypeError, ValueError):
        return _unknown(path, "it is neither features nor a training checkpoint of tiepoints")
    names = ("step", "total", "best", "best_step", "spent")
    record = {**identity, **{name: state.get(name) for name in names}}
    return Info(str(path), "training checkpoint", record=record)


def _npz(path: Path) -> Info:
    try:
        with np.load(path, allow_pickle=False) as content:
            record: dict[str, Any] = {
                "keypoints": len(content["xy"]),
                "image_size": content["image_size"].tolist(),
            }
            if "descriptors" in content:
                record["descriptor_dimension"] = content["descriptors"].shape[1]
            if "inputs" in content:
                record["inputs"] = str(content["inputs"])
    except Exception as error:  # NumPy and zipfile raise various types for damaged files
        return _unknown(path, f"it is damaged ({first_line(error)})")
    return Info(str(path), "features", record=record)


def _submission(path: Path) -> Info:
    """A submission to the Image Matching Challenge, made from stores next to it."""
    try:
        config = imc.read_config(path)[0]
    except DataError as error:
        return _unknown(path, str(error))
    record: dict[str, Any] = {"config": config}
    base = path.absolute()
    for part in ("features", "matches"):
        settings = read_settings(base.with_name(f"{base.name}.{part}.settings.json"))
        if settings is not None:
            record[part] = settings
    if "features" not in record:
        reason = f"it has no {base.name}.features.settings.json, the record of its features"
        return Info(str(path), "IMC submission", False, reason, record)
    return Info(str(path), "IMC submission", record=record)


def _json(path: Path) -> Info:
    """Results of ``evaluate-patches``, or a record."""
    for source, kind in ((record_path(path, "settings.json"), "evaluation"), (path, "record")):
        content = read_settings(source)
        if content is not None and content.get("program") == PROGRAM:
            return Info(str(path), kind, record=content)
    return _unknown(path)
