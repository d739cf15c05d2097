"""The rows of an evaluation to a page people can read: ``write_report(DIR)`` makes ``report.html`` and ``report.md``.

Figures are plain means over the pairs that succeeded, as in the papers; a failing pair is listed with its reason and enters no
mean. What a run does not hold (descriptors, poses, sweeps, pictures) leaves its section out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from .. import weights
from ..errors import DataError
from ..geometry import common_area, warp_points
from ..image import load_image
from ..matching import match
from ..structs import Features, Keypoints
from . import published
from .figures import Look, Series, bar_chart, data_uri, legend, line_chart, matches_picture, points_picture
from .metrics import error_auc
from .page import Block, Cell, Charts, Column, Definitions, Heading, Page, Picture, Row, Section, Table, Text

SPLITS = {"all": "All pairs", "view": "Viewpoint", "illum": "Illumination", "other": "Other changes"}
#: Names taken for controls where ``run.json`` does not say.
CONTROLS = ("random", "lattice")
THRESHOLDS = (1, 2, 3, 5)
MMA_RANGE = range(1, 11)
BORDER, REACH = 15.0, 3.0  # px: of the common area and of a repeated point in the pictures, as in the measure "mutual"
REMEDY = "make one with `tiepoints evaluate DATASET --out DIR` and give that DIR"


# -------------------------------------------------------------------------------------------------------------------------- tables

#: Metric -> (heading, label, factor, decimals, which way is better) of the main table.
MAIN: dict[str, tuple[str, str, float, int, int]] = {
    "keynet.rep_SL": ("repeatability %", "SL", 100, 1, 1),
    "keynet.rep_L": ("repeatability %", "L", 100, 1, 1),
    "keynet.err_SL": ("overlap error", "SL", 1, 3, -1),
    "keynet.err_L": ("overlap error", "L", 1, 3, -1),
    "s_range": ("", "S range", 1, 1, 0),
    "keynet.points": ("", "points", 1, 0, 0),
    "mutual.rep@1": ("mutual repeatability %", "1 px", 100, 1, 1),
    "mutual.rep@2": ("mutual repeatability %", "2 px", 100, 1, 1),
    "mutual.rep@3": ("mutual repeatability %", "3 px", 100, 1, 1),
    "mutual.rep@5": ("mutual repeatability %", "5 px", 100, 1, 1),
    "mutual.err@3": ("", "error px", 1, 2, -1),
    "chance.rep_SL": ("chance-corrected %", "SL", 100, 1, 1),
    "chance.rep_L": ("chance-corrected %", "L", 100, 1, 1),
    "chance.rep@3": ("chance-corrected %", "3 px", 100, 1, 1),
}

GLOSSARY: list[tuple[str, str]] = [
    (
        "repeatability SL, L",
        "Key.Net protocol: share of points found again one to one in the common area, circles of the points overlapping by more than 60 % "
        "(the larger one has a radius of 30 px). SL uses the detected scales, L takes them as right.",
    ),
    ("overlap error", "Mean of 1 - overlap over the correspondences; pairs without any do not count."),
    ("S range", "Largest over smallest detected scale of an image; 1 for a detector of one scale."),
    ("points", "The smaller number of points evaluated in the two images, after the common area and the limit."),
    ("mutual repeatability", "Share of points that are each other's nearest within so many pixels, of the smaller number of points."),
    ("error px", "Mean distance in pixels of the points repeated at 3 px."),
    ("chance-corrected", "(repeatability - chance) / (1 - chance): 0 for points strewn at random, 100 for a perfect detector."),
    ("bias px", "How far points miss their place for good: the length of the shift found by mirroring or turning the picture and back."),
    ("s / image", "Seconds to detect and describe one image on the machine named above."),
    ("pairs", "Pairs that enter the means, and of how many where some failed."),
    ("matching score, MMA", "Right mutual matches over the smaller number of points; over the number of matches."),
    ("AUC", "Area under the share of pairs whose error is below a threshold, up to it; a pair without an estimate counts as missed."),
]


def _bias_px(run: Run, system: str) -> float | None:
    """Mean over the images of the length of a detector's constant shift: x and y from the mirrors, else from the half turn."""
    images: dict[str, dict[str, float]] = {}
    for row in run.bias:
        if str(row["system"]) != system or not row.get("ok", True):
            continue
        metrics = row.get("metrics") or {}
        dx, dy = _finite(metrics.get("dx")), _finite(metrics.get("dy"))
        shift = images.setdefault(str(row.get("image", "")), {})
        if row["kind"] == "mirror_x" and dx is not None:
            shift["x"] = dx
        elif row["kind"] == "mirror_y" and dy is not None:
            shift["y"] = dy
        elif row["kind"] == "rotation_180" and dx is not None and dy is not None:
            shift.setdefault("x", dx)
            shift.setdefault("y", dy)
    return mean(math.hypot(shift["x"], shift["y"]) for shift in images.values() if len(shift) == 2)


def _main_table(rows: Rows, split: str) -> Table | None:
    run = rows.run
    columns = [Column(label, group, digits, better) for group, label, _, digits, better in MAIN.values()]
    columns += [Column("bias px", "", 2, -1), Column("s / image", "", 3, -1), Column("pairs", "", 0)]
    lines = []
    for system in run.systems:
        every, good = rows.all(split, system), rows.good(split, system)
        if not every:
            continue
        cells: list[Cell] = [rows.mean(split, system, metric, factor) for metric, (_, _, factor, _, _) in MAIN.items()]
        cells += [_bias_px(run, system), mean(row.seconds for row in good)]
        cells.append(len(good) if len(good) == len(every) else f"{len(good)} of {len(every)}")
        lines.append(Row(system, cells, run.role(system)))
    if split in ("view", "illum"):
        for name, halves in published.TABLE_2.items():
            half = halves[0 if split == "view" else 1]
            printed = {
                "keynet.rep_SL": f"{half.rep_SL:.1f}",
                "keynet.rep_L": f"{half.rep_L:.1f}",
                "keynet.err_SL": f"{half.err_SL:.2f}",
                "keynet.err_L": f"{half.err_L:.2f}",
                "s_range": None if half.s_range is None else f"{half.s_range:g}",
            }
            lines.append(Row(name, [printed.get(metric) for metric in MAIN] + [None] * 3, "published"))
    return Table(SPLITS[split], columns, lines, f"{published.KEYNET}, table 2 ({published.DATASET}, {SPLITS[split].lower()})").trimmed()


def _repeatability(rows: Rows) -> Section | None:
    tables: list[Block] = [table for split in rows.splits if (table := _main_table(rows, split))]
    if not tables:
        return None
    if len({len(rows.good("all", name)) for name in rows.run.systems}) > 1:
        tables.insert(0, Text("Not all systems have the same pairs (column pairs); means over different pairs compare only roughly."))
    return Section("Repeatability", tables)


def _split_groups(rows: Rows, labels: Sequence[tuple[str, str, float, int, int]], by: str) -> tuple[list[Column], list[tuple[str, str, float]]]:
    """Columns for (metric, label, factor, decimals, better) x splits under headings ``by`` split or metric, and what fills each."""
    pairs = [(label, split) for label in labels for split in rows.splits]
    if by == "split":
        pairs = [(label, split) for split in rows.splits for label in labels]
    columns, filled = [], []
    for (metric, text, factor, digits, better), split in pairs:
        name = SPLITS[split].lower()
        group, label = (text, name.split()[0]) if by == "metric" else (name, text)
        columns.append(Column(label, group, digits, better))
        filled.append((metric, split, factor))
    return columns, filled


def _matching(rows: Rows) -> Section | None:
    run = rows.run
    labels = [
        ("keynet.score@5", "matching score % at 5 px", 100.0, 1, 1),
        ("keynet.mma@3", "MMA % at 3 px", 100.0, 1, 1),
        ("keynet.mma@5", "MMA % at 5 px", 100.0, 1, 1),
        ("keynet.matches", "mutual matches", 1.0, 0, 0),
    ]
    columns, filled = _split_groups(rows, labels, "metric")
    lines = [Row(s, [rows.mean(split, s, metric, factor) for metric, split, factor in filled], run.role(s)) for s in run.systems]
    for name, (view, illum) in published.TABLE_3.items():
        printed = {("keynet.score@5", "view"): f"{view:.1f}", ("keynet.score@5", "illum"): f"{illum:.1f}"}
        lines.append(Row(name, [printed.get((metric, split)) for metric, split, _ in filled], "published"))
    note = "Mutual nearest neighbours of the descriptors, no ratio test, in the common area."
    head = f"{published.KEYNET}, table 3 ({published.DATASET})"
    blocks: list[Block] = []
    if table := Table("Matching, Key.Net protocol", columns, lines, head, note=note).trimmed():
        blocks.append(table)
        if charts := _curves(rows, "keynet.mma@{}", MMA_RANGE, "MMA", "right matches %", "threshold px"):
            blocks += [Heading("Matching accuracy against the threshold"), charts]
    if table := _rekd_table(rows):
        blocks.append(table)
    return Section("Matching", blocks) if blocks else None


def _rekd_table(rows: Rows) -> Table | None:
    run = rows.run
    labels = [
        ("rekd.repeatability", "rep. %", 100.0, 1, 1),
        ("rekd.mma@3", "MMA@3", 100.0, 1, 1),
        ("rekd.mma@5", "MMA@5", 100.0, 1, 1),
        ("rekd.matches", "matches", 1.0, 1, 0),
    ]
    columns, filled = _split_groups(rows, labels, "split")
    lines = []
    for system in run.systems:
        lines.append(Row(system, [rows.mean(split, system, metric, f) for metric, split, f in filled], run.role(system)))
        starred = [(metric.replace("rekd.m", "rekd*.m"), split, f) for metric, split, f in filled]
        cells = [rows.mean(split, system, metric, f) for metric, split, f in starred]
        if any(cell is not None for (metric, _, _), cell in zip(starred, cells, strict=True) if "*" in metric):
            lines.append(Row(f"{system}*", list(cells), run.role(system)))
    for name in published.REKD_TABLES["all"]:
        cells_: list[Cell] = []
        for metric, split, _ in filled:
            found = published.REKD_TABLES.get(split, {}).get(name)
            fields = dict(zip((label[0] for label in labels), found or (), strict=False))
            cells_.append(f"{fields[metric]:.1f}" if metric in fields else None)
        lines.append(Row(name, cells_, "published"))
    note = "Points of image 1 with any point of image 2 within 3 px, many to one, no common area. *: matches that agree on the turn."
    return Table("REKD protocol", columns, lines, f"{published.REKD} ({published.DATASET})", note=note).trimmed()


def _auc(rows: list[PairRow], metric: str, thresholds: tuple[float, ...]) -> list[Cell]:
    """Areas in %, and the share of pairs without an estimate in %; Nones where no row has the metric."""
    have = [row for row in rows if metric in row.metrics]
    if not have:
        return [None] * (len(thresholds) + 1)
    errors = [math.inf if (value := row.value(metric)) is None else value for row in have]
    failed = sum(math.isinf(error) or (metric.startswith("pose") and error >= 180) for error in errors)
    return [100 * float(area) for area in error_auc(errors, thresholds)] + [100 * failed / len(have)]


def _geometry(rows: Rows) -> Section | None:
    run = rows.run
    blocks: list[Block] = []
    one, three, five = Column("@1 px", "", 1, 1), Column("@3 px", "", 1, 1), Column("@5 px", "", 1, 1)
    columns = []
    for split in rows.splits:
        group = f"{SPLITS[split].lower()}: AUC %"
        columns += [Column(c.label, group, c.digits, c.better) for c in (one, three, five)] + [Column("no estimate %", group, 1, -1)]
    lines = []
    for system in run.systems:
        cells = [cell for split in rows.splits for cell in _auc(rows.good(split, system), "homography.error", (1, 3, 5))]
        lines.append(Row(system, cells, run.role(system)))
    if table := Table("Homography: mean error of the image corners", columns, lines).trimmed():
        blocks.append(table)
    columns = []
    for name in ("PoseLib", "OpenCV"):
        columns += [Column(f"@{t}°", f"{name}: AUC %", 1, 1) for t in (5, 10, 20)] + [Column("no estimate %", f"{name}: AUC %", 1, -1)]
    columns += [Column("s / image", "", 3, -1), Column("pairs", "", 0)]
    lines = []
    for system in run.systems:
        every, good = rows.all("pose", system), rows.good("pose", system)
        if not every:
            continue
        cells = _auc(good, "pose.error_poselib", (5, 10, 20)) + _auc(good, "pose.error_opencv", (5, 10, 20))
        cells += [mean(row.seconds for row in good), len(good) if len(good) == len(every) else f"{len(good)} of {len(every)}"]
        lines.append(Row(system, cells, run.role(system)))
    if table := Table("Relative pose: the larger error of rotation and translation direction", columns, lines).trimmed():
        blocks.append(table)
    return Section("Homography and pose", blocks) if blocks else None


# -------------------------------------------------------------------------------------------------------------------------- charts


def _numbers(caption: str, corner: str, series: dict[str, list[Series]], run: Run) -> Table:
    """The points of charts (title -> lines) as a table: a row for each x, a column for each system."""
    names = [name for name in run.systems if any(s.label == name for lines in series.values() for s in lines)]
    lines = []
    for title, group in series.items():
        values = {s.label: dict(s.points) for s in group}
        for x in sorted({x for points in values.values() for x in points}):
            label = f"{title}, {x:g}" if len(series) > 1 else f"{x:g}"
            lines.append(Row(label, [values.get(name, {}).get(x) for name in names]))
    return Table(caption, [Column(name, "", 1) for name in names], lines, corner=corner)


def _charts(
    run: Run, series: dict[str, list[Series]], y_label: str, x_label: str, *, ticks: Sequence[float] | None = None, log_x: bool = False
) -> Charts | None:
    """One chart a title; None where no line has a point."""
    series = {title: [s for s in lines if s.points] for title, lines in series.items()}
    series = {title: lines for title, lines in series.items() if lines}
    if not series:
        return None
    charts = [line_chart(title, x_label, y_label, lines, x_ticks=ticks, log_x=log_x, y_unit=" %") for title, lines in series.items()]
    known = {s.label: s for lines in series.values() for s in lines}
    key = legend(known[name] for name in run.systems if name in known)
    return Charts(charts, key, _numbers(f"{y_label} by {x_label}", x_label, series, run))


def _curves(rows: Rows, metric: str, places: Iterable[int], what: str, y_label: str, x_label: str) -> Charts | None:
    """A chart for each split with a line for each system through ``metric`` (with a place for the threshold), as %."""
    run, looks = rows.run, rows.run.looks()
    places = list(places)
    series: dict[str, list[Series]] = {}
    for split in rows.splits:
        lines = []
        for system in run.systems:
            values = [(float(t), rows.mean(split, system, metric.format(t), 100)) for t in places]
            lines.append(Series(system, looks[system], [(t, v) for t, v in values if v is not None]))
        series[f"{what}: {SPLITS[split].lower()}"] = lines
    return _charts(run, series, y_label, x_label)


def _thresholds(rows: Rows) -> Section | None:
    charts = _curves(rows, "mutual.rep@{}", THRESHOLDS, "Repeatability", "mutual repeatability %", "threshold px")
    return Section("Repeatability against the threshold", [charts]) if charts else None


def _budgets(runs: Sequence[Run]) -> Section | None:
    """Repeatability against the number of points asked for, from several runs on the same data."""
    if len(runs) < 2:
        return None
    looks = runs[0].looks()
    titles = {"mutual.rep@3": "Within 3 px, mutual", "keynet.rep_SL": "SL", "keynet.rep_L": "L"}
    found: dict[str, dict[str, dict[float, float]]] = {title: {} for title in titles.values()}
    for run in runs:
        rows, asked = Rows(run), _finite(run.facts.get("num_points"))
        for metric, title in titles.items():
            for system in runs[0].systems:
                value = rows.mean("all", system, metric, 100)
                place = asked or rows.mean("all", system, "keynet.points")
                if value is not None and place:
                    found[title].setdefault(system, {})[place] = value
    series = {
        title: [Series(s, looks[s], sorted(points.items())) for s, points in lines.items() if len(points) > 1]
        for title, lines in found.items()
    }
    charts = _charts(runs[0], series, "repeatability %", "number of points", log_x=True)
    return Section("Repeatability against the number of points", [charts]) if charts else None


def _sweeps(run: Run) -> Section | None:
    """Mean over the images at each angle and each factor."""
    looks = run.looks()
    blocks: list[Block] = []
    for kind, heading, x_label, ticks, log_x in (
        ("rotation", "Rotation", "rotation in degrees", (0.0, 90.0, 180.0, 270.0, 360.0), False),
        ("scale", "Scale", "scale factor", None, True),
    ):
        gathered: dict[str, dict[float, list[float]]] = {}
        for entry in run.sweeps:
            at, metrics = _finite(entry["value"]), entry.get("metrics") or {}
            value = _finite(metrics.get("mutual.rep@3"))
            if entry["kind"] == kind and entry.get("ok", True) and at is not None and value is not None and (at > 0 or not log_x):
                gathered.setdefault(str(entry["system"]), {}).setdefault(at, []).append(100 * value)
        lines = [
            Series(system, looks[system], sorted((x, sum(v) / len(v)) for x, v in gathered[system].items()))
            for system in run.systems
            if system in gathered
        ]
        reached = [x for line in lines for x, _ in line.points]
        if reached and ticks:
            ticks = tuple(t for t in ticks if min(reached) <= t <= max(reached))
        if charts := _charts(run, {heading: lines}, "repeatability % at 3 px", x_label, ticks=ticks, log_x=log_x):
            blocks.append(charts)
    return Section("Rotation and scale sweeps", blocks) if blocks else None


def _bias(run: Run) -> Section | None:
    kinds = {"mirror_x": ("mirrored in x", ("dx",)), "mirror_y": ("mirrored in y", ("dy",)), "rotation_180": ("half turn", ("dx", "dy"))}
    columns = [Column(f"{axis} px", heading, 2) for heading, axes in kinds.values() for axis in axes] + [Column("|bias| px", "", 2, -1)]
    lines = []
    for system in run.systems:
        cells: list[Cell] = []
        for kind, (_, axes) in kinds.items():
            chosen = [r for r in run.bias if str(r["system"]) == system and r["kind"] == kind and r.get("ok", True)]
            cells += [mean(_finite((r.get("metrics") or {}).get(axis)) for r in chosen) for axis in axes]
        lines.append(Row(system, [*cells, _bias_px(run, system)], run.role(system)))
    table = Table("Constant shift of the points, mean over the images", columns, lines).trimmed()
    return Section("Bias", [table]) if table else None


def _sequences(rows: Rows) -> Section | None:
    """A chart of bars for each sequence."""
    run, looks = rows.run, rows.run.looks()
    order = {split: k for k, split in enumerate(("view", "illum", "other"))}
    kinds = {row.sequence: row.kind for row in run.rows if row.kind != "pose"}
    charts, names, cells = [], [], []
    per: dict[tuple[str, str], list[float]] = {}
    for row in run.rows:
        if row.ok and (value := row.value("mutual.rep@3")) is not None:
            per.setdefault((row.sequence, row.system), []).append(100 * value)
    for sequence in sorted(kinds, key=lambda name: (order.get(kinds[name], 9), name)):
        values = {s: sum(v) / len(v) for s in run.systems if (v := per.get((sequence, s)))}
        if values:
            charts.append(bar_chart(sequence, [(s, v, looks[s]) for s, v in values.items()]))
            names.append(sequence)
            cells.append([values.get(s) for s in run.systems])
    if not charts:
        return None
    columns = [Column(s, "", 1) for s in run.systems]
    caption = "Mutual repeatability % at 3 px by sequence"
    numbers = Table(caption, columns, [Row(n, list(c)) for n, c in zip(names, cells, strict=True)], corner="sequence").trimmed()
    return Section("Sequences", [Text("Mutual repeatability at 3 px in %; hollow bars are controls."), Charts(charts, "", numbers)])


# ------------------------------------------------------------------------------------------------------------------------ pictures


def repeated_points(a: Tensor, b: Tensor, H_ab: Tensor, reach: float = REACH) -> tuple[Tensor, Tensor]:
    """Which points of a (N,2) and b (M,2) are each other's nearest within ``reach`` px in image b: bool (N,) and (M,)."""
    found_a, found_b = torch.zeros(len(a), dtype=torch.bool), torch.zeros(len(b), dtype=torch.bool)
    if len(a) and len(b):
        distance = torch.cdist(warp_points(a.double(), H_ab), b.double())
        forward = distance.argmin(dim=1)
        index = torch.arange(len(a))
        found_a = (distance.argmin(dim=0)[forward] == index) & (distance[index, forward] <= reach)
        found_b[forward[found_a]] = True
    return found_a, found_b


def _pair_pictures(run: Run, row: PairRow, system: str, limit: int) -> list[Picture]:
    """Points and matches of one system on one pair; empty where features or images are gone."""
    a, b = (_stored_features(run, system, row.sequence, image) for image in (row.image_a, row.image_b))
    image_a, image_b = _image(run, row.image_a), _image(run, row.image_b)
    if a is None or b is None or image_a is None or image_b is None:
        return []
    H_ab = torch.tensor(row.H_ab, dtype=torch.float64)
    (height_a, width_a), (height_b, width_b) = image_a.shape[-2:], image_b.shape[-2:]
    a = a[common_area(a.xy.double(), H_ab, (height_b, width_b), BORDER)][:limit]
    b = b[common_area(b.xy.double(), torch.linalg.inv(H_ab), (height_a, width_a), BORDER)][:limit]
    found_a, found_b = repeated_points(a.xy, b.xy, H_ab)
    count, fewer = int(found_a.sum()), min(len(a), len(b))
    share = f" ({100 * count / fewer:.1f} %)" if fewer else ""
    where = f"{row.sequence} {row.pair}, {system}"
    caption = f"{where}: {count} of {fewer} points{share} repeated within {REACH:g} px (blue discs), the others missed (orange crosses)"
    images = [
        (data_uri(points_picture(image_a, a.xy, found_a)), f"First image of {where}: {len(a)} points in the common area, {count} repeated."),
        (data_uri(points_picture(image_b, b.xy, found_b)), f"Second image of {where}: {len(b)} points in the common area, {count} repeated."),
    ]
    out = [Picture(caption, images)]
    if a.descriptors is not None and b.descriptors is not None and a.descriptors.shape[1] == b.descriptors.shape[1]:
        index = match(a, b).index
        xy_a, xy_b = a.xy[index[:, 0]], b.xy[index[:, 1]]
        right = (warp_points(xy_a.double(), H_ab) - xy_b.double()).norm(dim=1) <= REACH
        good = int(right.sum())
        text = f"{where}: {len(index)} mutual matches, {good} right within {REACH:g} px (blue), {len(index) - good} wrong (orange, thin)"
        out.append(Picture(text, [(data_uri(matches_picture(image_a, image_b, xy_a, xy_b, right)), f"Lines between both images of {text}.")], True))
    return out


def _chosen_pairs(rows: Rows, count: int) -> list[tuple[str, str]]:
    """(sequence, pair) to show: sequences of all kinds in turn, of each the pair of middle difficulty for the real systems."""
    by_kind: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows.run.rows:
        if row.ok and row.H_ab is not None and row.system not in rows.run.controls:
            pairs = by_kind.setdefault(row.kind, {}).setdefault(row.sequence, {})
            pairs.setdefault(row.pair, []).append(row.value("mutual.rep@3") or 0.0)
    queues = []
    for kind in ("view", "illum", "other"):
        names = sorted(by_kind.get(kind, {}))
        spread = [names[i] for i in np.linspace(0, len(names) - 1, min(count, len(names))).astype(int)] if names else []
        queues.append([(kind, name) for name in spread])
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                kind, sequence = queue.pop(0)
                pairs = by_kind[kind][sequence]
                ranked = sorted(pairs, key=lambda pair: (sum(pairs[pair]) / len(pairs[pair]), pair))  # noqa: B023 - used at once
                chosen.append((sequence, ranked[len(ranked) // 2]))
    return chosen


def _shown_systems(rows: Rows) -> list[str]:
    """The first real system of the run and the best of the others at 3 px."""
    ranked = _ranking(rows) or [(0.0, name) for name in rows.run.real]
    first = rows.run.real[:1]
    return first + [name for _, name in ranked if name not in first][:1]


def _ranking(rows: Rows) -> list[tuple[float, str]]:
    """Real systems by mutual repeatability at 3 px in %, best first."""
    values = [(rows.mean("all", name, "mutual.rep@3", 100), name) for name in rows.run.real]
    return sorted(((value, name) for value, name in values if value is not None), key=lambda item: -item[0])


def _pictures(rows: Rows, count: int) -> Section | None:
    run = rows.run
    limit = int(_finite(run.facts.get("num_points")) or 1000)
    blocks: list[Block] = []
    controls = [name for name in ("lattice", *run.systems) if name in run.controls][:1]
    for k, (sequence, pair) in enumerate(_chosen_pairs(rows, count)):
        shown: list[Block] = []
        for system in _shown_systems(rows) + (controls if not k else []):  # one picture of a control is enough to see what it is
            for row in rows.good("all", system):
                if (row.sequence, row.pair) == (sequence, pair) and row.H_ab is not None:
                    shown += _pair_pictures(run, row, system, limit)
        if shown:
            blocks += [Heading(f"{sequence}, pair {pair}"), *shown]
    return Section("Pictures", blocks) if blocks else None


# ---------------------------------------------------------------------------------------------------------------------------- page


def _parameters(run: Run, system: str) -> int | None:
    """Learnable numbers of a system's detector: as the run says, or those of our own network of that name."""
    stated = run.facts.get("parameters")
    if isinstance(stated, dict) and (value := _finite(stated.get(system))) is not None:
        return int(value)
    name = system.split("+")[0]
    if name not in weights.table():
        return None
    return sum(p.numel() for p in weights.load(name).parameters())


def _sizes(rows: Rows) -> Section | None:
    run = rows.run
    columns = [Column("learnable parameters", "", 0), Column("s / image", "", 3, -1)]
    counts = {system: _parameters(run, system) for system in run.real}
    if all(count is None for count in counts.values()):
        return None
    seconds = {s: mean(row.seconds for split in ("all", "pose") for row in rows.good(split, s)) for s in run.real}
    lines = [Row(s, [counts[s], seconds[s]]) for s in run.real if counts[s] is not None]
    for name, count in published.TABLE_4.items():
        time = published.SECONDS_600.get(name)
        lines.append(Row(name, [f"{count:,}", None if time is None else f"{time:g}"], "published"))
    head = f"{published.KEYNET}, table 4; seconds for 600 × 600 pixels on a GTX 1080 Ti"
    table = Table("Learned detectors: size and speed", columns, lines, head).trimmed()
    return Section("Size and speed", [table]) if table else None


def _failures(run: Run) -> Section | None:
    failed = [(r.system, r.sequence, r.pair, r.reason) for r in run.rows if not r.ok]
    for entry in run.sweeps:
        if not entry.get("ok", True):
            failed.append((str(entry["system"]), str(entry.get("image", "")), f"{entry['kind']} {entry['value']}", str(entry.get("reason") or "")))
    blocks: list[Block] = [Text(note) for note in run.notes]
    if failed:
        columns = [Column("sequence", "", None), Column("pair", "", None), Column("reason", "", None)]
        lines = [Row(s, [q, p, reason or "no reason given"], run.role(s)) for s, q, p, reason in failed]
        blocks.append(Table(f"{len(failed)} failed, in no mean above", columns, lines))
    return Section("Failures", blocks) if blocks else None


def _joined(value: Any) -> str:
    """A value of ``run.json`` in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_joined(part)}" for name, part in value.items())
    return ", ".join(_joined(part) for part in value) if isinstance(value, list) else str(value)


def _facts_of(rows: Rows, runs: Sequence[Run]) -> list[tuple[str, str]]:
    run, facts = rows.run, rows.run.facts
    sequences = {row.sequence for row in run.rows}
    pairs = {(row.sequence, row.pair) for row in run.rows}
    failed = sum(not row.ok for row in run.rows)
    out = [("Dataset", f"{run.dataset.get('name', run.folder.name)}: {len(sequences)} sequences, {len(pairs)} pairs")]
    mode = {"ti": "one scale (TI)", "si": "many scales (SI)"}.get(str(facts.get("mode")), facts.get("mode"))
    asked = [f"{n} points an image" for n in [facts.get("num_points")] if n] + [str(m) for m in [mode] if m]
    if asked:
        out.append(("Settings", ", ".join(asked)))
    out.append(("Systems", f"{len(run.real)} and {len(run.controls)} controls"))
    for name in ("protocols", "date", "machine", "versions"):
        if facts.get(name):
            out.append((name.capitalize(), _joined(facts[name])))
    out.append(("Failed pairs", f"{failed}, listed below and in no mean" if failed else "none"))
    if len(runs) > 1:
        out.append(("Runs", f"{len(runs)}; the tables show the first, {run.folder.name}"))
    return out


def _lead(rows: Rows) -> list[str]:
    """The two sentences that explain the controls, and what this run says in short."""
    lattice = rows.mean("all", "lattice", "keynet.rep_L", 100) if "lattice" in rows.run.controls else None
    here = f" ({lattice:.1f} % in this run)" if lattice is not None else ""
    out = [
        f"A lattice of points that never looked at the image scores about 80 % in L{here}, because L accepts centre distances up to "
        "11.9 px and so mostly measures how evenly points are spread. Only tight pixel thresholds and the chance-corrected figures "
        "separate detectors: read every number beside the controls, which stand apart in each table."
    ]
    ranking = _ranking(rows)
    if ranking:
        first = ", then ".join(f"{name} {value:.1f} %" for value, name in ranking[:3])
        controls = [(rows.mean("all", name, "mutual.rep@3", 100), name) for name in rows.run.systems if name in rows.run.controls]
        reach = " and ".join(f"{name} {value:.1f} %" for value, name in controls if value is not None)
        out.append(f"Mutual repeatability at 3 px, all pairs: {first}" + (f"; the controls reach {reach}." if reach else "."))
    if not rows.run.controls:
        out.append("This run has no controls: add random and lattice to its systems.")
    return out


@dataclass(frozen=True)
class ReportFiles:
    """What ``write_report`` wrote."""

    html: Path
    markdown: Path


def build_page(runs: Sequence[Run], *, pictures: int = 4) -> Page:
    """The report of the first run; the others only add their number of points to the curves."""
    run = runs[0]
    same = [other for other in runs if other.dataset.get("name") == run.dataset.get("name") and other.facts.get("mode") == run.facts.get("mode")]
    for other in runs:
        if other not in same:
            run.notes.append(f"{other.folder.name} was made on other data or in another mode and is not drawn beside {run.folder.name}.")
    rows = Rows(run)
    makers: list[Callable[[], Section | None]] = [
        lambda: _repeatability(rows),
        lambda: _thresholds(rows),
        lambda: _budgets(same),
        lambda: _matching(rows),
        lambda: _geometry(rows),
        lambda: _sweeps(run),
        lambda: _bias(run),
        lambda: _sequences(rows),
        lambda: _pictures(rows, pictures) if pictures > 0 else None,
        lambda: _sizes(rows),
        lambda: _failures(run),
    ]
    sections = [section for make in makers if (section := make())]
    sections.append(Section("What the columns mean", [Definitions(GLOSSARY)]))
    return Page(f"Evaluation: {run.dataset.get('name', run.folder.name)}", _facts_of(rows, runs), _lead(rows), sections)


def write_report(folder: Path | Sequence[Path], out: Path | None = None, *, pictures: int = 4) -> ReportFiles:
    """Write ``report.html`` (one file, no network, no other file) and ``report.md`` of a run of ``tiepoints evaluate``.

    Args:
        folder: what the run wrote; of several, the first is reported and the others add to the curves against the number of points.
        out: where to write, ``folder`` (the first) by default; a name ending in ``.html`` gives the page that name, and the
            Markdown the same with ``.md``.
        pictures: how many pairs to show.

    Raises:
        ValueError: no folder given.
        DataError: a folder that is missing, holds no rows, or has a damaged ``run.json``.
    """
    folders = [Path(folder)] if isinstance(folder, str | os.PathLike) else [Path(f) for f in folder]
    if not folders:
        raise ValueError("no folder of results given; name at least one")
    page = build_page([read_run(path) for path in folders], pictures=pictures)
    target = folders[0] if out is None else Path(out)
    html = target if target.suffix == ".html" else target / "report.html"
    html.parent.mkdir(parents=True, exist_ok=True)
    files = ReportFiles(html, html.with_suffix(".md"))
    for path, text in ((files.html, page.html()), (files.markdown, page.markdown())):
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    return files
