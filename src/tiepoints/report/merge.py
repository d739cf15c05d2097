"""Merge runs of the same images into one, so that their systems share the tables of a report.

No row is dropped: what settings or names have in common is merged, and systems that two runs
measured differently keep separate rows, named by the setting (or the folder) that differs. Runs of
other images are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import DataError
from ..evaluation.results import PairRow, Run
from ..evaluation.systems import scales


def merge_runs(runs: Sequence[Run]) -> Run:
    """The first run with the rows of all others.

    The names of systems get what distinguishes the runs, such as ``keynet (TI)``, where it affects
    them. Rows of a system that several runs measured in the same way are taken from the first run
    that has the pair.

    Raises:
        DataError: a run measured other images, or images of another size.
    """
    return _merged(_distinguished(runs))


def _distinguished(runs: Sequence[Run], but: str = "") -> list[Run]:
    """The runs with systems renamed by the settings that differ, except the setting ``but``.

    Raises:
        DataError: as ``merge_runs``.
    """
    for other in runs[1:]:
        _check_same_images(runs[0], other)
    names = _new_names(runs, but)
    return [_renamed(run, rename) for run, rename in zip(runs, names, strict=True)]


def _merged(runs: Sequence[Run]) -> Run:
    """One run of all rows; systems that differ in spite of equal names get that of their folder."""
    parts: list[Run] = []
    for part in runs:
        conflicts = {name for before in parts for name in _conflicts(before, part)}
        if conflicts:
            folder = part.folder.name
            if any(folder == before.folder.name for before in parts):
                folder = str(part.folder)
            part = _renamed(part, {name: f"{name} ({folder})" for name in conflicts})
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    rows: dict[tuple[str, str, str], PairRow] = {}
    for part in parts:
        for row in part.rows:
            key = row.system, row.sequence, row.pair
            before = rows.get(key)
            if before is None or (row.ok and not before.ok):
                rows[key] = row
            elif row.ok:  # metrics of other protocols
                rows[key] = replace(before, metrics={**row.metrics, **before.metrics})
    systems = list(dict.fromkeys(name for part in parts for name in part.systems))
    controls = set[str]().union(*(part.controls for part in parts))
    systems.sort(key=lambda name: name in controls)
    made_by = {k: v for part in parts for k, v in _made_by(part).items()}
    modes = {k: v for part in parts for k, v in _modes(part).items()}
    entries = {"systems": systems, "made_by": made_by, "modes": modes}
    return replace(
        parts[0],
        metadata={**parts[0].metadata, **entries},
        rows=list(rows.values()),
        sweeps=_extras(parts, lambda part: part.sweeps),
        bias=_extras(parts, lambda part: part.bias),
        systems=systems,
        controls=controls,
        notes=[f"{part.folder.name}: {note}" for part in parts for note in part.notes],
    )


def _made_by(run: Run) -> dict[str, str]:
    entry = run.metadata.get("made_by")
    return {k: str(v) for k, v in entry.items()} if isinstance(entry, dict) else {}


def _modes(run: Run) -> dict[str, str]:
    """Mode (ti, si) in which each system of a run was measured."""
    return run.metadata.get("modes") or dict.fromkeys(run.systems, str(run.metadata.get("mode")))


def _check_same_images(first: Run, other: Run) -> None:
    remedy = "write a report of each"
    sizes = [run.metadata.get("resize") for run in (first, other)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{first.folder} and {other.folder} resized images differently ({sizes[0]} and "
            f"{sizes[1]}); {remedy}"
        )
    roots = [run.dataset.get("root") for run in (first, other)]
    if roots[0] == roots[1]:
        return
    known = {(row.sequence, row.pair): row.H_ab for row in first.rows if row.H_ab is not None}
    common = [row for row in other.rows if (row.sequence, row.pair) in known]
    if not common or any(row.H_ab != known[row.sequence, row.pair] for row in common):
        raise DataError(
            f"{other.folder} measured images of {roots[1]}, {first.folder} images of {roots[0]}; "
            f"{remedy}"
        )


def _setting_texts(run: Run) -> dict[str, str]:
    """The settings of a run that affect the rows of systems, as texts."""
    extraction = run.metadata.get("extraction") or {}
    return {
        "mode": str(run.metadata.get("mode", "")),
        "extraction": ", ".join(f"{k} {v}" for k, v in sorted(extraction.items())) or "defaults",
        "num_points": f"{run.metadata.get('num_points')} keypoints",
        "value_range": f"value range {run.metadata.get('value_range', 'type')}",
    }


def settings_lines(runs: Sequence[Run]) -> list[str]:
    """One line per run: its folder and settings."""
    modes = {"ti": "single scale (TI)", "si": "multiple scales (SI)"}
    lines = []
    for run in runs:
        texts = _setting_texts(run)
        parts = [texts["num_points"], modes.get(texts["mode"], texts["mode"])]
        parts += [texts["extraction"]] * (texts["extraction"] != "defaults")
        parts += [texts["value_range"]] * (texts["value_range"] != "value range type")
        lines.append(f"{run.folder.name}: {', '.join(part for part in parts if part)}")
    return lines


def _new_names(runs: Sequence[Run], but: str) -> list[dict[str, str]]:
    """For each run, new names of its systems with the settings in which the runs differ, except the
    setting ``but``.
    """
    texts = [_setting_texts(run) for run in runs]
    differ = {key for key in texts[0] if len({text[key] for text in texts}) > 1} - {but}
    names = []
    for run, text in zip(runs, texts, strict=True):
        made_by, renamed = _made_by(run), dict[str, str]()
        for name in run.systems:
            try:
                scale = scales(made_by.get(name, name), text["mode"] == "ti")
            except ValueError:  # not a name of this version, such as a system of the library
                scale = text["mode"].upper()
            parts = [scale] * ("mode" in differ and bool(scale))
            parts += [text["extraction"]] * ("extraction" in differ and bool(scale))
            parts += [text[key] for key in ("num_points", "value_range") if key in differ]
            if parts:
                renamed[name] = f"{name} ({', '.join(parts)})"
        names.append(renamed)
    return names


def _renamed(run: Run, names: dict[str, str]) -> Run:
    def new(name: str) -> str:
        return names.get(name, name)

    entries = {
        "made_by": {new(k): v for k, v in _made_by(run).items()},
        "modes": {new(k): v for k, v in _modes(run).items()},
    }
    return replace(
        run,
        metadata={**run.metadata, **entries},
        rows=[replace(row, system=new(row.system)) for row in run.rows],
        sweeps=[replace(row, system=new(row.system)) for row in run.sweeps],
        bias=[replace(row, system=new(row.system)) for row in run.bias],
        systems=[new(name) for name in run.systems],
        controls={new(name) for name in run.controls},
    )


def _conflicts(first: Run, other: Run) -> set[str]:
    """Systems of the same name that are not the same, or have other results of a pair."""
    made = _made_by(first), _made_by(other)
    both = set(first.systems) & set(other.systems)
    found = {name for name in both if made[0].get(name, name) != made[1].get(name, name)}
    known = {(row.system, row.sequence, row.pair): row for row in first.rows if row.ok}
    for row in other.rows:
        before = known.get((row.system, row.sequence, row.pair))
        if row.ok and before is not None:
            common = set(before.metrics) & set(row.metrics)
            if any(before.metrics[key] != row.metrics[key] for key in common):
                found.add(row.system)
    return found


def _extras(parts: Sequence[Run], rows_of: Callable[[Run], list[Any]]) -> list[Any]:
    """Sweeps or biases of all runs, each measurement once."""
    found: dict[tuple[Any, ...], Any] = {}
    for part in parts:
        for row in rows_of(part):
            found.setdefault((row.system, row.image, row.kind, row.value), row)
    return list(found.values())


def by_number_of_keypoints(runs: Sequence[Run]) -> list[Run]:
    """One merged run for each number of keypoints, in the order of the runs."""
    groups: dict[str, list[Run]] = {}
    for run in _distinguished(runs, but="num_points"):
        groups.setdefault(str(run.metadata.get("num_points")), []).append(run)
    return [_merged(group) for group in groups.values()]
