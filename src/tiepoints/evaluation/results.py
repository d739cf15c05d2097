"""Read the folder of an evaluation (rows, sweeps, biases, features) and average over its rows.

No metrics are computed here. Damaged or incomplete entries are skipped with a note.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..files import atomic_path
from ..image import load_image
from ..metrics.geometry import mean
from ..structs import Features, Keypoints

#: Key -> heading, in the order of the report.
SPLITS = {
    "all": "All pairs",
    "view": "Viewpoint",
    "illum": "Illumination",
    "other": "Other changes",
}
#: Kinds of pairs without a homography: they have other metrics and are excluded from other means.
APART = ("pose", "marked")
REMEDY = "make one with `tiepoints evaluate DATASET --output DIR` and give that DIR"


def finite(value: Any) -> float | None:
    """``value`` as float; None if it is not a number, or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True)
class PairRow:
    """A stored row: one system on one pair. ``stem`` is that of its file, which is also the
    name of the system's folder of features. ``folder`` is that of its run.
    """

    stem: str
    system: str
    sequence: str
    kind: str
    pair: str
    image_a: str = ""
    image_b: str = ""
    H_ab: list[list[float]] | None = None
    ok: bool = True
    reason: str = ""
    seconds: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    def value(self, metric: str) -> float | None:
        """A metric; None if it is missing, null or not finite."""
        return finite(self.metrics.get(metric))


@dataclass(frozen=True)
class ExtraRow:
    """A stored row: one step of a sweep (``value`` in degrees, or a factor) or one bias of a system
    on an image.
    """

    system: str
    image: str
    kind: str
    value: float | None = None
    ok: bool = True
    reason: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)

    def number(self, metric: str) -> float | None:
        """As ``PairRow.value``."""
        return finite(self.metrics.get(metric))


@dataclass(frozen=True)
class Run:
    """Contents of a results folder.

    Attributes:
        metadata: contents of ``run.json``.
        rows, sweeps, bias: the latest row of each measurement.
        systems: names in the order of ``run.json``; controls are last.
        notes: messages about what could not be read.
    """

    folder: Path
    metadata: dict[str, Any]
    rows: list[PairRow]
    sweeps: list[ExtraRow]
    bias: list[ExtraRow]
    systems: list[str]
    controls: set[str]
    notes: list[str]

    @property
    def real(self) -> list[str]:
        """Names of the systems that are not controls."""
        return [name for name in self.systems if name not in self.controls]

    @property
    def dataset(self) -> dict[str, Any]:
        """Entry ``dataset`` of ``run.json``; a string is taken as its name."""
        entry = self.metadata.get("dataset") or {}
        return entry if isinstance(entry, dict) else {"name": str(entry)}

    @property
    def name(self) -> str:
        """Name of the dataset, or of the folder if that is unknown."""
        return str(self.dataset.get("name") or self.folder.resolve().name)

    def role(self, system: str) -> str:
        """``control`` or ``real``."""
        return "control" if system in self.controls else "real"


def read_run(folder: Path) -> Run:
    """Read the results that ``tiepoints evaluate`` wrote into ``folder``.

    Lines that cannot be read (an interrupted run leaves an incomplete line) are skipped and noted.

    Raises:
        DataError: the folder or its rows are missing, or ``run.json`` is missing or damaged.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of results; {REMEDY}")
    metadata = read_metadata(folder)
    notes: list[str] = []
    rows: dict[tuple[str, str, str], PairRow] = {}
    for stem, entry in _entries(folder / "rows", ("system", "sequence", "pair"), notes):
        row = replace(_pair_row(stem, entry), folder=folder)
        rows[row.system, row.sequence, row.pair] = row
    if not rows:
        raise DataError(f"{folder} holds no rows (rows/*.jsonl); {REMEDY}")
    found = {row.system for row in rows.values()}
    listed = metadata.get("systems")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    unavailable = metadata.get("unavailable")
    unavailable = unavailable if isinstance(unavailable, dict) else {}
    for name, reason in unavailable.items():
        if name not in found:  # by an earlier run
            notes.append(f"{name} was not run: {reason}")
    if missing := [name for name in names if name not in found and name not in unavailable]:
        notes.append(
            f"No rows yet of {', '.join(missing)}: the run was interrupted or is in progress."
        )
    order = [name for name in dict.fromkeys(names) if name in found]
    order += sorted(found - set(order))
    listed = metadata.get("controls")
    controls = set(listed) & found if isinstance(listed, list) else set[str]()
    order.sort(key=lambda name: name in controls)
    sweeps, bias = (_extras(folder / part, notes) for part in ("sweeps", "bias"))
    return Run(folder, metadata, list(rows.values()), sweeps, bias, order, controls, notes)


def read_metadata(folder: Path) -> dict[str, Any]:
    """The content of a run's ``run.json``.

    Raises:
        DataError: it is missing or damaged.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise DataError(f"{folder} has no run.json and is no folder of results; {REMEDY}")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({error}); run the evaluation again") from error
    if not isinstance(metadata, dict):
        raise DataError(f"{path} must hold one JSON object; run the evaluation again")
    return metadata


def _objects(path: Path) -> tuple[list[dict[str, Any]], int]:
    """JSON objects of a file of lines, and the number of lines that could not be read."""
    objects, bad = [], 0
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in filter(str.strip, text.splitlines()):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            objects.append(entry)
        else:
            bad += 1
    return objects, bad


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file; of several rows for the same measurement, the last one. Empty if the file is
    missing.
    """
    keys = ("system", "sequence", "pair", "image", "kind", "value")
    return list(
        {tuple(str(row.get(key)) for key in keys): row for row in _objects(path)[0]}.values()
    )


def _entries(
    folder: Path, required: Sequence[str], notes: list[str]
) -> list[tuple[str, dict[str, Any]]]:
    """(file stem, JSON object) of the lines in the files of a folder that have the ``required``
    keys.
    """
    entries = []
    for path in sorted(folder.glob("*.jsonl")):
        objects, bad = _objects(path)
        for entry in objects:
            if all(key in entry for key in required) and isinstance(
                entry.get("metrics"), dict | None
            ):
                entries.append((path.stem, entry))
            else:
                bad += 1
        if bad:
            notes.append(
                f"{bad} line{'s' if bad > 1 else ''} of {folder.name}/{path.name} could not be "
                "read and skipped."
            )
    return entries


def _pair_row(stem: str, entry: dict[str, Any]) -> PairRow:
    return PairRow(
        stem=stem,
        system=str(entry["system"]),
        sequence=str(entry["sequence"]),
        kind=str(entry.get("kind") or "other"),
        pair=str(entry["pair"]),
        image_a=str(entry.get("image_a") or ""),
        image_b=str(entry.get("image_b") or ""),
        H_ab=entry.get("H_ab"),
        ok=bool(entry.get("ok", True)),
        reason=str(entry.get("reason") or ""),
        seconds=finite(entry.get("seconds")),
        metrics=entry.get("metrics") or {},
    )


def _extras(folder: Path, notes: list[str]) -> list[ExtraRow]:
    """Rows of sweeps or biases; the failure of a whole sweep (no value) is dropped once that sweep
    has succeeded.
    """
    rows: dict[tuple[str, str, str, float | None], ExtraRow] = {}
    for _, entry in _entries(folder, ("system", "kind"), notes):
        row = ExtraRow(
            system=str(entry["system"]),
            image=str(entry.get("image") or ""),
            kind=str(entry["kind"]),
            value=finite(entry.get("value")),
            ok=bool(entry.get("ok", True)),
            reason=str(entry.get("reason") or ""),
            metrics=entry.get("metrics") or {},
        )
        if row.ok:
            for kind in (row.kind, "bias"):
                rows.pop((row.system, row.image, kind, None), None)
        rows[row.system, row.image, row.kind, row.value] = row
    return list(rows.values())


class Rows:
    """Rows of a run by split and system; posed pairs and annotated correspondences are separate
    splits.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._rows: dict[tuple[str, str], list[PairRow]] = {}
        for row in run.rows:
            split = row.kind if row.kind in ("view", "illum", *APART) else "other"
            for name in [split] if split in APART else [split, "all"]:
                self._rows.setdefault((name, row.system), []).append(row)
        kinds = [
            split
            for split in list(SPLITS)[1:]
            if any((split, name) in self._rows for name in run.systems)
        ]
        #: Splits of homography pairs: all and each kind, or the only kind.
        self.splits = (
            ["all", *kinds]
            if len(kinds) > 1
            else ["all" if kind == "other" else kind for kind in kinds]
        )

    def all(self, split: str, system: str) -> list[PairRow]:
        """All rows of a split, including failures."""
        return self._rows.get((split, system), [])

    def good(self, split: str, system: str) -> list[PairRow]:
        """Rows of the pairs that succeeded."""
        return [row for row in self.all(split, system) if row.ok]

    def mean(self, split: str, system: str, metric: str, factor: float = 1.0) -> float | None:
        """Mean of a metric over the rows that have it, times ``factor``."""
        value = mean(row.value(metric) for row in self.good(split, system))
        return None if value is None else value * factor

    def seconds(self, split: str, system: str) -> float | None:
        """Mean number of seconds per image."""
        return mean(row.seconds for row in self.good(split, system))

    def count(self, split: str, system: str) -> int | str:
        """Number of pairs that succeeded; if some failed, as "N of M"."""
        good, total = len(self.good(split, system)), len(self.all(split, system))
        return good if good == total else f"{good} of {total}"


def features_name(sequence: str, image: str | Path) -> str:
    """File name, without suffix, of the features of an image of a sequence.

    It is that of the image if the sequence is its folder; otherwise it is prefixed by the folder,
    as names repeat between folders.
    """
    image = Path(image)
    folder = image.parent.name
    return (
        f"{sequence}/{image.stem}"
        if folder in ("", sequence)
        else f"{sequence}/{folder}-{image.stem}"
    )


def stored_features(row: PairRow, image: str, *, described: bool = True) -> Features | None:
    """Features that a run stored for an image of a pair; None if they are missing or damaged.
    ``described=False`` does not read descriptors.
    """
    found = load_features(
        row.folder / "features" / row.stem / f"{features_name(row.sequence, image)}.npz",
        described=described,
    )
    return None if found is None else found[0]


def save_features(path: Path, features: Features, seconds: float, inputs: str = "") -> None:
    """Write the features of one image as .npz atomically, with descriptors in half precision.

    Args:
        inputs: digest of what the features were made from.
    """
    arrays: dict[str, Any] = {
        k: getattr(features, k).cpu().numpy() for k in ("xy", "scale", "angle", "score")
    }
    arrays |= {"image_size": np.array(features.image_size), "seconds": np.array(seconds)}
    arrays["inputs"] = np.array(inputs)
    if features.descriptors is not None:
        arrays["descriptors"] = features.descriptors.cpu().numpy().astype(np.float16)
    with atomic_path(path) as tmp_path, tmp_path.open("wb") as file:
        np.savez(file, **arrays)


def load_features(
    path: Path, *, described: bool = True, inputs: str | None = None
) -> tuple[Features, float] | None:
    """Read features and seconds written by ``save_features``; None if the file is missing or
    damaged, or was not made from ``inputs``, unless that is None.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            if inputs is not None and str(content["inputs"]) != inputs:
                return None
            parts = [torch.from_numpy(content[k]) for k in ("xy", "scale", "angle", "score")]
            descriptors = (
                torch.from_numpy(content["descriptors"]).float()
                if described and "descriptors" in content
                else None
            )
            width, height = (int(v) for v in content["image_size"])
            return Features(Keypoints(*parts), descriptors, (width, height)), float(
                content["seconds"]
            )
    except Exception:  # NumPy and zipfile raise various types for damaged files
        return None


def stored_image(path: str) -> Tensor | None:
    """Load an image that a row refers to; None if it is missing or damaged."""
    try:
        return load_image(path)
    except (DataError, OSError, ValueError):
        return None
