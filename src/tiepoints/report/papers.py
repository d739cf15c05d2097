"""Tables 2 and 3 of the Key.Net paper: our value of each row next to the published one."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.results import Rows, Run
from ..evaluation.systems import OPENCV_SYSTEMS, scales, split_modes
from ..names import EVALUATION_DESCRIPTOR, ORIENTATIONS
from . import published
from .page import Block, Cell, Column, Row, Section, Table

#: Detectors by name -> the paper's name of the method.
METHODS = {
    "sift": "SIFT",
    "surf": "SURF",
    "fast": "FAST",
    "mser": "MSER",
    "harris-laplace": "Harris-Laplace",
    "kaze": "KAZE",
    "akaze": "AKAZE",
    "superpoint": "SuperPoint",
    "keynet-light": "Key.Net light",
    "keynet-tiny": "Tiny-Key.Net",
    "keynet": "Key.Net",
}
#: Start of the label of stored features and weights files, lower case and without punctuation, ->
#: the paper's name of the method.
LABELS = {
    **{"tilde": "TILDE", "lift": "LIFT", "dnet": "DNet", "tcdet": "TCDET"},
    **{"lfnet": "LF-Net", "superpoint": "SuperPoint", "tinykeynet": "Tiny-Key.Net"},
    **{"keynettiny": "Tiny-Key.Net", "keynetlight": "Key.Net light", "keynet": "Key.Net"},
}
#: Columns of table 2: metric, heading, factor, decimals.
TABLE_2_COLUMNS = (
    ("keynet.rep_SL", "SL", 100.0, 1),
    ("keynet.rep_L", "L", 100.0, 1),
    ("keynet.err_SL", "error SL", 1.0, 2),
    ("keynet.err_L", "error L", 1.0, 2),
    ("s_range", "S range", 1.0, 1),
)


def method_of(label: str, spec: str) -> str | None:
    """The paper's name of the method of a system ``LABEL=SPEC``; None if it has no row there."""
    base = split_modes(spec.partition("+")[0])[0]
    if base in METHODS:
        return METHODS[base]
    plain = "".join(c for c in label.lower() if c.isalnum())
    return next((name for start, name in LABELS.items() if plain.startswith(start)), None)


def row_of_table_2(label: str, spec: str, single_scale: bool) -> str | None:
    """The row of table 2 that a system measures, such as ``Key.Net-TI``; None if there is none."""
    method = method_of(label, spec)
    scale = scales(spec, single_scale)
    if not scale and "upright" in split_modes(spec.partition("+")[0])[1]:
        return None  # keypoints that differ in the angle alone count once
    rows = [
        name
        for name in published.TABLE_2
        if name.rpartition("-")[0] == method and scale in ("", name.rpartition("-")[2])
    ]
    return rows[0] if rows else None


def row_of_table_3(label: str, spec: str, single_scale: bool) -> str | None:
    """The row of table 3 that a system measures, such as ``SIFT + HardNet``; None if there is none,
    or if the orientation, which the paper discards, is used.
    """
    detector, _, descriptor = spec.partition("+")
    base, modes = split_modes(detector)
    method = method_of(label, spec)
    if method is None or (scales(spec, single_scale) == "TI" and method.endswith("Key.Net")):
        return None
    if method.endswith("Key.Net"):
        descriptor = descriptor or EVALUATION_DESCRIPTOR
        upright = not set(modes) & set(ORIENTATIONS) - {"none"}
    else:
        upright = "upright" in modes or not descriptor or base == "superpoint"
    own = not descriptor and base not in OPENCV_SYSTEMS
    name = method if own else f"{method} + HardNet"
    described = own or "hardnet" in descriptor.lower()
    return name if upright and described and name in published.TABLE_3 else None


def _systems(run: Run) -> list[tuple[str, str, bool]]:
    """(label, spec, single scale) of the systems without controls."""
    made_by = run.metadata.get("made_by")
    made_by = made_by if isinstance(made_by, dict) else {}
    modes = run.metadata.get("modes", {})  # of a merged run
    return [
        (
            label,
            str(made_by.get(label, label)),
            modes.get(label, run.metadata.get("mode")) == "ti",
        )
        for label in run.real
    ]


def paper_tables(rows: Rows) -> Section | None:
    """The section of tables 2 and 3; None without a system of theirs or without pairs of viewpoint
    or illumination changes.
    """
    blocks: list[Block] = [table for table in (table_2(rows), table_3(rows)) if table is not None]
    return Section("Tables of the Key.Net paper", blocks) if blocks else None


def _table(
    rows: Rows,
    caption: str,
    columns: list[Column],
    measured: dict[str, list[tuple[str, list[Cell]]]],
    printed: dict[str, list[Cell]],
    note: str,
) -> Table | None:
    """Alternating columns, ours and the paper's; the paper's rows without a system of ours last."""
    lines = []
    for name, cells in printed.items():
        for label, ours in measured.get(name, []):
            mixed = [cell for pair in zip(ours, cells, strict=True) for cell in pair]
            lines.append(Row(f"{name}: {label}", mixed))
    for name, cells in printed.items():
        if name not in measured:
            lines.append(
                Row(name, [cell for value in cells for cell in (None, value)], "published")
            )
    source = f"{published.KEYNET} ({published.DATASET}), rows that this run does not have"
    return Table(caption, columns, lines, source, "row: system", note).trimmed()


def _columns(groups: Sequence[tuple[str, int]]) -> list[Column]:
    return [
        column
        for group, digits in groups
        for column in (Column("ours", group, digits), Column("paper", group, digits))
    ]


def table_2(rows: Rows) -> Table | None:
    """Table 2, detectors of both kinds of scale; ours on the images of the run."""
    halves = [split for split in ("view", "illum") if _has(rows, split)]
    groups = [(f"{split} {m[1]}", m[3]) for split in halves for m in TABLE_2_COLUMNS]
    measured: dict[str, list[tuple[str, list[Cell]]]] = {}
    for label, spec, single in _known(rows.run):
        if name := row_of_table_2(label, spec, single):
            cells: list[Cell] = [
                rows.mean(split, label, metric, factor)
                for split in halves
                for metric, _, factor, _ in TABLE_2_COLUMNS
            ]
            measured.setdefault(name, []).append((label, cells))
    printed: dict[str, list[Cell]] = {
        name: [
            detections[split == "illum"].printed()[metric]
            for split in halves
            for metric, *_ in TABLE_2_COLUMNS
        ]
        for name, detections in published.TABLE_2.items()
    }
    note = (
        "Repeatability % and mean overlap error of the strongest 1000 keypoints of the common "
        "area. The paper's values are of HPatches; ours compare with them only on it."
    )
    return _table(rows, "Table 2", _columns(groups), measured, printed, note)


def table_3(rows: Rows) -> Table | None:
    """Table 3, matching score without orientation; ours on the images of the run."""
    halves = [split for split in ("view", "illum") if _has(rows, split)]
    measured: dict[str, list[tuple[str, list[Cell]]]] = {}
    for label, spec, single in _known(rows.run):
        if name := row_of_table_3(label, spec, single):
            cells: list[Cell] = [rows.mean(split, label, "keynet.score@5", 100) for split in halves]
            if any(cell is not None for cell in cells):
                measured.setdefault(name, []).append((label, cells))
    printed: dict[str, list[Cell]] = {
        name: [f"{values[split == 'illum']:.1f}" for split in halves]
        for name, values in published.TABLE_3.items()
    }
    note = (
        "Matching score % at 5 px: correct mutual nearest neighbors over the smaller number of "
        "keypoints, of patches that are not rotated (DETECTOR@upright+hardnet)."
    )
    groups = [(split, 1) for split in halves]
    return _table(rows, "Table 3", _columns(groups), measured, printed, note)


def _has(rows: Rows, split: str) -> bool:
    return any(rows.all(split, name) for name in rows.run.systems)


def _known(run: Run) -> list[tuple[str, str, bool]]:
    """``_systems`` whose names this version knows."""
    found = []
    for label, spec, single in _systems(run):
        try:
            scales(spec, single)
        except ValueError:
            continue
        found.append((label, spec, single))
    return found
