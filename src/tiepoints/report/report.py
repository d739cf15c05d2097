"""The rows of an evaluation to a page people can read: ``write_report(DIR)`` makes ``report.html``
and ``report.md``.

Figures are plain means over the pairs that succeeded, as in the papers; a failed pair is listed
with its reason and enters no mean. What a run does not hold (descriptors, poses, sweeps, images)
leaves its section out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import weights
from ..evaluation.results import (
    APART,
    SPLITS,
    PairRow,
    Rows,
    Run,
    finite,
    read_run,
    stored_features,
    stored_image,
)
from ..files import write_text
from ..geometry import common_area, warp_points
from ..matching import match
from ..metrics.geometry import error_auc, mean
from ..metrics.repeatability import BORDER, localization, mutual_nearest
from ..plot import draw_keypoints, draw_matches
from ..report import published
from .charts import (
    Look,
    Series,
    bar_chart,
    data_uri,
    legend,
    line_chart,
)
from .page import (
    Block,
    Cell,
    Charts,
    Column,
    Definitions,
    Heading,
    Page,
    Picture,
    Row,
    Section,
    Table,
    Text,
)

REACH = 3.0
#: Width of the images in the report, in pixels.
PICTURE_WIDTH = 480  # px: of a repeated point and a right match in the pictures
#: Numbers of points of the curve that is computed from stored features, below the number the run
#: was made with.
BUDGETS = (100, 250, 500, 1000, 2000)


class Measure(NamedTuple):
    """A column filled by one metric: shares become percentages (``factor``); ``better`` is 1, -1
    (less is better) or 0.
    """

    metric: str
    label: str
    digits: int = 1
    better: int = 1
    factor: float = 100.0
    group: str = ""


MAIN = [
    *(Measure(f"keynet.rep_{name}", name, group="repeatability %") for name in ("SL", "L")),
    *(Measure(f"keynet.err_{name}", name, 3, -1, 1.0, "overlap error") for name in ("SL", "L")),
    Measure("s_range", "S range", 1, 0, 1.0),
    Measure("keynet.points", "points", 0, 0, 1.0),
    *(Measure(f"mutual.rep@{t}", f"{t} px", group="mutual repeatability %") for t in (1, 2, 3, 5)),
    Measure("mutual.err@3", "error px", 2, -1, 1.0),
    *(Measure(f"chance.rep_{name}", name, group="chance-corrected %") for name in ("SL", "L")),
    Measure("chance.rep@3", "3 px", group="chance-corrected %"),
]
MATCHING = [
    Measure("keynet.score@5", "matching score % at 5 px"),
    Measure("keynet.mma@3", "MMA % at 3 px"),
    Measure("keynet.matches", "mutual matches", 0, 0, 1.0),
]
REKD = [
    Measure("rekd.repeatability", "rep."),
    Measure("rekd.mma@3", "MMA@3"),
    Measure("rekd.mma@5", "MMA@5"),
    Measure("rekd.matches", "matches", 1, 0, 1.0),
]
#: Columns of the same table that the papers did not print: TILDE's repeatability, and the measure
#: of EVD.
REKD_MORE = [
    Measure("rekd.repeatability@5", "rep.@5"),
    Measure("rekd.correct@5", "correct@5", 1, 1, 1.0),
]


GLOSSARY = [
    (
        "repeatability SL, L",
        "Key.Net protocol: share of points found again one to one in the common area, circles of "
        "the points overlapping by at least "
        "60 % (the larger one has a radius of 30 px). SL uses the detected scales, L takes them "
        "as right.",
    ),
    (
        "overlap error",
        "Mean of 1 - overlap over the correspondences; pairs without any do not count.",
    ),
    ("S range", "Largest over smallest detected scale of an image; 1 for a detector of one scale."),
    (
        "points",
        "The smaller number of points evaluated in the two images, after the common area and the "
        "limit.",
    ),
    (
        "mutual repeatability",
        "Share of points that are each other's nearest within so many pixels, of the smaller "
        "number of points.",
    ),
    ("error px", "Mean distance in pixels of the points repeated at 3 px."),
    (
        "chance-corrected",
        "(repeatability - chance) / (1 - chance), where chance is what the same points score with "
        "those of the second image turned "
        "by 180 degrees: 0 for points without relation to the image, 100 for a perfect detector.",
    ),
    (
        "bias px",
        "How far points miss their place for good: half the shift found by mirroring or turning "
        "the picture and back.",
    ),
    (
        "on structure %",
        "Percentile of the keypoints' pixels by corner strength, median; chance is 50 (--extras "
        "bias).",
    ),
    ("beside %", "Keypoints below their image's median pixel by corner strength; chance is 50."),
    ("s / image", "Seconds to detect and describe one image, where and when this run was made."),
    ("pairs", "Pairs that enter the means, and of how many where some failed."),
    (
        "matching score, MMA",
        "Right mutual matches over the smaller number of points; over the number of matches.",
    ),
    (
        "AUC",
        "Area under the share of pairs whose error is below a threshold, up to it; a pair without "
        "an estimate (failed) never is.",
    ),
]


# ---- tables


def bias_px(run: Run, system: str) -> float | None:
    """Mean over the images of the length of a detector's constant offset: x and y from the mirrors,
    else from the half turn.
    """
    offsets: dict[str, dict[str, float]] = {}
    for kind, axes in (
        ("rotation_180", ("dx", "dy")),
        ("mirror_x", ("dx",)),
        ("mirror_y", ("dy",)),
    ):
        for row in run.bias:
            if row.system == system and row.kind == kind and row.ok:
                known = {
                    axis: shift / 2 for axis in axes if (shift := row.number(axis)) is not None
                }
                offsets.setdefault(row.image, {}).update(known)
    return mean(
        math.hypot(offset["dx"], offset["dy"]) for offset in offsets.values() if len(offset) == 2
    )


def anchoring_percent(run: Run, system: str) -> tuple[float | None, float | None]:
    """Means over the images of the median percentile, and of the share of keypoints below the
    median pixel, in percent.
    """
    rows = [row for row in run.bias if row.system == system and row.kind == "anchoring" and row.ok]
    known = [
        (a, b)
        for row in rows
        if (a := row.number("median")) is not None and (b := row.number("below_half")) is not None
    ]
    if not known:
        return None, None
    return 100 * math.fsum(a for a, _ in known) / len(known), 100 * math.fsum(
        b for _, b in known
    ) / len(known)


def _values(rows: Rows, split: str, system: str, measures: Iterable[Measure]) -> list[Cell]:
    return [rows.mean(split, system, m.metric, m.factor) for m in measures]


def _main_table(rows: Rows, split: str) -> Table | None:
    run = rows.run
    columns = [Column(m.label, m.group, m.digits, m.better) for m in MAIN]
    columns += [
        Column("bias px", "", 2, -1),
        Column("on structure %", "", 1, 1),
        Column("beside %", "", 1, -1),
    ]
    columns += [Column("s / image", "", 3, -1), Column("pairs", "", 0)]
    lines = []
    for system in run.systems:
        if rows.all(split, system):
            extra: list[Cell] = [
                bias_px(run, system),
                *anchoring_percent(run, system),
                rows.seconds(split, system),
                rows.count(split, system),
            ]
            lines.append(Row(system, _values(rows, split, system, MAIN) + extra, run.role(system)))
    if split in ("view", "illum"):
        for name, halves in published.TABLE_2.items():
            printed = halves[split == "illum"].printed()
            cells: list[Cell] = [printed.get(m.metric) for m in MAIN]
            lines.append(Row(name, [*cells, None, None, None, None, None], "published"))
    source = f"{published.KEYNET}, table 2 ({published.DATASET}, {SPLITS[split].lower()})"
    return Table(SPLITS[split], columns, lines, source).trimmed()


def _repeatability(rows: Rows) -> Section | None:
    blocks: list[Block] = [table for split in rows.splits if (table := _main_table(rows, split))]
    if blocks and len({len(rows.good("all", name)) for name in rows.run.systems}) > 1:
        blocks.insert(
            0,
            Text(
                "Not all systems have the same pairs (column pairs); means over different pairs "
                "compare only roughly."
            ),
        )
    return Section("Repeatability", blocks) if blocks else None


def _matching(rows: Rows) -> Section | None:
    run, blocks = rows.run, list[Block]()
    picks = [(m, split) for m in MATCHING for split in rows.splits]
    columns = [
        Column(SPLITS[split].lower().split()[0], m.label, m.digits, m.better) for m, split in picks
    ]
    lines = [
        Row(s, [rows.mean(split, s, m.metric, m.factor) for m, split in picks], run.role(s))
        for s in run.systems
    ]
    for name, (view, illum) in published.TABLE_3.items():
        printed = {
            ("keynet.score@5", "view"): f"{view:.1f}",
            ("keynet.score@5", "illum"): f"{illum:.1f}",
        }
        lines.append(Row(name, [printed.get((m.metric, split)) for m, split in picks], "published"))
    note = "Mutual nearest neighbours of the descriptors, no ratio test, in the common area."
    source = f"{published.KEYNET}, table 3 ({published.DATASET})"
    if table := Table("Matching, Key.Net protocol", columns, lines, source, note=note).trimmed():
        blocks.append(table)
    if charts := _curves(rows, "keynet.mma@{}", range(1, 11), "MMA", "right matches %"):
        blocks += [Heading("Matching accuracy against the threshold"), charts]
    if table := _rekd_table(rows):
        blocks.append(table)
    return Section("Matching", blocks) if blocks else None


def _rekd_table(rows: Rows) -> Table | None:
    run = rows.run
    picks = [(m, split) for split in rows.splits for m in (*REKD, *REKD_MORE)]
    columns = [Column(m.label, SPLITS[split].lower(), m.digits, m.better) for m, split in picks]
    lines = []
    for system in run.systems:
        lines.append(
            Row(
                system,
                [rows.mean(split, system, m.metric, m.factor) for m, split in picks],
                run.role(system),
            )
        )
        starred: list[Cell] = [
            None
            if "repeatability" in m.metric
            else rows.mean(split, system, m.metric.replace("rekd.", "rekd*."), m.factor)
            for m, split in picks
        ]
        lines.append(Row(f"{system}*", starred, run.role(system)))
    for name in published.REKD_TABLES["all"]:
        cells: list[Cell] = []
        for m, split in picks:
            row = published.REKD_TABLES.get(split, {}).get(name)
            cells.append(f"{row[REKD.index(m)]:.1f}" if row and m in REKD else None)
        lines.append(Row(name, cells, "published"))
    note = (
        "In %: points of image 1 with any point of image 2 within 3 px (rep.; many to one, no "
        "common area) or 5 px (rep.@5, TILDE's), and "
        "right matches (MMA; correct@5 is their number). "
        "*: only matches that agree on the turn."
    )
    return Table(
        "REKD protocol", columns, lines, f"{published.REKD} ({published.DATASET})", note=note
    ).trimmed()


def _auc(rows: list[PairRow], metric: str, thresholds: tuple[float, ...]) -> list[Cell]:
    """Areas in %, and the share of pairs without an estimate in %; Nones where no row has the
    metric.
    """
    have = [row for row in rows if metric in row.metrics]
    if not have:
        return [None] * (len(thresholds) + 1)
    errors = [row.value(metric) for row in have]
    missed = sum(error is None or (metric.startswith("pose") and error >= 180) for error in errors)
    return [*(100 * area for area in error_auc(errors, thresholds)), 100 * missed / len(have)]


def _auc_columns(thresholds: Iterable[float], unit: str, group: str) -> list[Column]:
    return [
        *(Column(f"@{t:g}{unit}", group, 1, 1) for t in thresholds),
        Column("failed %", group, 1, -1),
    ]


def _geometry(rows: Rows) -> Section | None:
    run, blocks = rows.run, list[Block]()
    pixels, degrees = (1.0, 3.0, 5.0), (5.0, 10.0, 20.0)
    for metric, how in (
        ("homography.error", "PoseLib's RANSAC"),
        ("homography.error_dlt", "least squares (DLT) of all matches"),
    ):
        columns = [
            c
            for split in rows.splits
            for c in _auc_columns(pixels, "\u00a0px", f"{SPLITS[split].lower()}: AUC %")
        ]
        lines = [
            Row(
                s,
                [
                    cell
                    for split in rows.splits
                    for cell in _auc(rows.good(split, s), metric, pixels)
                ],
                run.role(s),
            )
            for s in run.systems
        ]
        if table := Table(
            f"Homography by {how}: mean error of the image corners", columns, lines
        ).trimmed():
            blocks.append(table)
    columns = [
        *_auc_columns(degrees, "°", "PoseLib: AUC %"),
        *_auc_columns(degrees, "°", "OpenCV: AUC %"),
    ]
    columns += [Column("right", "matches", 0, 1), Column("right %", "matches", 1, 1)]
    columns += [Column("s / image", "", 3, -1), Column("pairs", "", 0)]
    lines = []
    for system in run.systems:
        if rows.all("pose", system):
            good = rows.good("pose", system)
            cells: list[Cell] = [
                cell
                for name in ("poselib", "opencv")
                for cell in _auc(good, f"pose.error_{name}", degrees)
            ]
            right, share = (
                mean(row.value(f"pose.{n}") for row in good) for n in ("right", "precision")
            )
            cells += [right, None if share is None else 100 * share]
            lines.append(
                Row(
                    system,
                    [*cells, rows.seconds("pose", system), rows.count("pose", system)],
                    run.role(system),
                )
            )
    if table := Table(
        "Relative pose: the larger error of rotation and translation direction", columns, lines
    ).trimmed():
        blocks.append(table)
    if table := _marked_table(rows):
        blocks.append(table)
    return Section("Homography and pose", blocks) if blocks else None


def _marked_table(rows: Rows) -> Table | None:
    """Correspondences marked by hand against the estimated fundamental matrix (WxBS)."""
    shares = [
        Measure("marked.share", "mean"),
        *(Measure(f"marked.share@{t}", f"{t} px") for t in (1, 3, 5, 10, 20)),
    ]
    counts = [
        Measure("marked.matches", "matches", 0, 0, 1.0),
        Measure("marked.inliers", "inliers", 0, 0, 1.0),
    ]
    columns = [Column(m.label, "agree within %", m.digits, m.better) for m in shares]
    columns += [Column(m.label, "", m.digits, m.better) for m in counts]
    columns += [Column("s / image", "", 3, -1), Column("pairs", "", 0)]
    lines = []
    for system in rows.run.systems:
        if rows.all("marked", system):
            cells = _values(rows, "marked", system, [*shares, *counts])
            lines.append(
                Row(
                    system,
                    [*cells, rows.seconds("marked", system), rows.count("marked", system)],
                    rows.run.role(system),
                )
            )
    note = (
        "Share of the correspondences whose larger distance to the epipolar lines is within so "
        "many pixels, mean over 1..20 px, over the "
        "pairs and five seeds of the estimator (PoseLib, 2 px); 0 without an estimate."
    )
    return Table(
        "Fundamental matrix: correspondences marked by hand", columns, lines, note=note
    ).trimmed()


def _bias(run: Run) -> Section | None:
    kinds = {
        "mirror_x": ("mirrored in x", ("dx",)),
        "mirror_y": ("mirrored in y", ("dy",)),
        "rotation_180": ("half turn", ("dx", "dy")),
    }
    columns = [
        Column(f"{axis} px", heading, 2) for heading, axes in kinds.values() for axis in axes
    ] + [Column("bias px", "", 2, -1)]
    lines = []
    for system in run.systems:
        cells: list[Cell] = []
        for kind, (_, axes) in kinds.items():
            chosen = [
                row for row in run.bias if row.system == system and row.kind == kind and row.ok
            ]
            cells += [mean(row.number(axis) for row in chosen) for axis in axes]
        lines.append(Row(system, [*cells, bias_px(run, system)], run.role(system)))
    note = (
        "Shift of the points between a picture and its mirrored or turned copy, moved back: twice "
        "what each point is off (bias px)."
    )
    table = Table(
        "Constant shift of the points, mean over the images", columns, lines, note=note
    ).trimmed()
    return Section("Bias", [table]) if table else None


def _parameters(run: Run, system: str) -> int | None:
    """Learnable numbers of a system's detector, if it is a network of ours."""
    name = str((run.facts.get("made_by") or {}).get(system, system)).split("+")[0].split("@")[0]
    return (
        sum(p.numel() for p in weights.load(name).parameters()) if name in weights.table() else None
    )


def _sizes(rows: Rows) -> Section | None:
    columns = [Column("learnable parameters", "", 0), Column("s / image", "", 3, -1)]
    counts = {
        system: count
        for system in rows.run.real
        if (count := _parameters(rows.run, system)) is not None
    }
    lines = [
        Row(s, [count, mean(rows.seconds(split, s) for split in ("all", *APART))])
        for s, count in counts.items()
    ]
    for name, count in published.TABLE_4.items():
        seconds = published.SECONDS_600.get(name)
        lines.append(
            Row(name, [f"{count:,}", None if seconds is None else f"{seconds:g}"], "published")
        )
    source = f"{published.KEYNET}, table 4; seconds for 600 × 600 pixels on a GTX 1080 Ti"
    table = Table("Learned detectors: size and speed", columns, lines, source).trimmed()
    return Section("Size and speed", [table]) if table else None


def _failures(run: Run) -> Section | None:
    failed = [(r.system, r.sequence, r.pair, r.reason) for r in run.rows if not r.ok]
    for row in (*run.sweeps, *run.bias):
        if not row.ok:
            failed.append(
                (
                    row.system,
                    row.image,
                    row.kind if row.value is None else f"{row.kind} {row.value:g}",
                    row.reason,
                )
            )
    blocks: list[Block] = [Text(note) for note in run.notes]
    if failed:
        columns = [
            Column("sequence", "", None),
            Column("pair", "", None),
            Column("reason", "", None),
        ]
        lines = [
            Row(s, [where, what, reason or "no reason given"], run.role(s))
            for s, where, what, reason in failed
        ]
        blocks.append(Table(f"{len(failed)} failed, in no mean above", columns, lines))
    return Section("Failures", blocks) if blocks else None


# ---- charts


def _looks(run: Run) -> dict[str, Look]:
    """One look a system, the same in all charts; controls are counted apart."""
    real, controls = run.real, [name for name in run.systems if name in run.controls]
    return {
        name: Look(k, names is controls)
        for names in (real, controls)
        for k, name in enumerate(names)
    }


def _charts(
    run: Run,
    series: dict[str, dict[str, dict[float, float]]],
    y_label: str,
    x_label: str,
    *,
    ticks: Sequence[float] | None = None,
    log_x: bool = False,
) -> Charts | None:
    """A chart for each title with a line for each system (title -> system -> x -> %), and the
    numbers; None without points.
    """
    looks = _looks(run)
    lines = {
        title: [
            Series(s, looks[s], sorted(systems[s].items())) for s in run.systems if systems.get(s)
        ]
        for title, systems in series.items()
    }
    lines = {title: group for title, group in lines.items() if group}
    if not lines:
        return None
    charts = [
        line_chart(title, x_label, y_label, group, x_ticks=ticks, log_x=log_x, y_unit=" %")
        for title, group in lines.items()
    ]
    known = {s.label: s for group in lines.values() for s in group}
    names = [name for name in run.systems if name in known]
    table = []
    for title in lines:
        for x in sorted({x for points in series[title].values() for x in points}):
            label = f"{title}, {x:g}" if len(lines) > 1 else f"{x:g}"
            table.append(Row(label, [series[title].get(name, {}).get(x) for name in names]))
    numbers = Table(
        f"{y_label} by {x_label}", [Column(name) for name in names], table, corner=x_label
    )
    return Charts(charts, legend(known[name] for name in names), [numbers])


def _curves(
    rows: Rows, metric: str, thresholds: Iterable[int], what: str, y_label: str
) -> Charts | None:
    """A chart for each split: ``metric`` (with a place for the threshold) as % against the
    threshold.
    """
    series: dict[str, dict[str, dict[float, float]]] = {}
    for split in rows.splits:
        lines = series[f"{what}: {SPLITS[split].lower()}"] = {}
        for system in rows.run.systems:
            values = {float(t): rows.mean(split, system, metric.format(t), 100) for t in thresholds}
            lines[system] = {t: value for t, value in values.items() if value is not None}
    return _charts(rows.run, series, y_label, "threshold px")


def _thresholds(rows: Rows) -> Section | None:
    charts = _curves(rows, "mutual.rep@{}", (1, 2, 3, 5), "Repeatability", "mutual repeatability %")
    return Section("Repeatability against the threshold", [charts]) if charts else None


def budget_curve(run: Run, system: str, budgets: Sequence[int]) -> dict[float, float]:
    """Mean mutual repeatability (%) at 3 px for numbers of points, from stored features; empty
    where any of them is gone.

    The means go over the pairs that succeeded with homographies, as that of the rows does.
    """
    found: dict[float, list[float]] = {float(n): [] for n in budgets}
    cache: dict[str, Any] = {}
    for row in run.rows:
        if (
            row.system != system
            or not row.ok
            or row.H_ab is None
            or row.value("mutual.rep@3") is None
        ):
            continue
        for image in (row.image_a, row.image_b):
            if image not in cache:
                cache[image] = stored_features(run, row, image, described=False)
        a, b = cache[row.image_a], cache[row.image_b]
        if a is None or b is None:
            return {}
        H_ab = torch.tensor(row.H_ab, dtype=torch.float64)
        sizes = a.image_size[::-1], b.image_size[::-1]
        for n in budgets:
            found[n].append(
                100
                * (
                    localization(a.xy, b.xy, H_ab, *sizes, num_keypoints=n, thresholds=(REACH,))[
                        "rep@3"
                    ]
                    or 0.0
                )
            )
    return {n: sum(values) / len(values) for n, values in found.items() if values}


def _budgets(runs: Sequence[Run]) -> Section | None:
    """Repeatability against the number of points: from several runs on the same data, and from the
    features of the first.
    """
    first = runs[0]
    titles = {"mutual.rep@3": "Within 3 px, mutual", "keynet.rep_SL": "SL", "keynet.rep_L": "L"}
    series: dict[str, dict[str, dict[float, float]]] = {
        title: {s: {} for s in first.systems} for title in titles.values()
    }
    asked = [n for run in runs if (n := finite(run.facts.get("num_points")))]
    for system in first.systems:
        below = [n for n in BUDGETS if n not in asked and n < max(asked, default=0)]
        series["Within 3 px, mutual"][system] |= budget_curve(first, system, below)
    for run in runs:
        rows, n = Rows(run), finite(run.facts.get("num_points"))
        for metric, title in titles.items():
            for system in first.systems:
                if n and (value := rows.mean("all", system, metric, 100)) is not None:
                    series[title][system][n] = value
    long = {
        title: {s: points for s, points in lines.items() if len(points) > 1}
        for title, lines in series.items()
    }
    charts = _charts(first, long, "repeatability %", "number of points", log_x=True)
    return Section("Repeatability against the number of points", [charts]) if charts else None


def _sweeps(run: Run) -> Section | None:
    """Mean over the images at each angle and each factor."""
    made = list[Charts]()
    for metric, what in (("mutual.rep@3", "repeatability"), ("mma@3", "right matches")):
        for kind, heading, x_label in (
            ("rotation", "Rotation", "rotation in degrees"),
            ("scale", "Scale", "scale factor"),
        ):
            gathered: dict[str, dict[float, list[float]]] = {}
            for row in run.sweeps:
                value = row.number(metric)
                if (
                    row.kind == kind
                    and row.ok
                    and row.value is not None
                    and value is not None
                    and (row.value > 0 or kind == "rotation")
                ):
                    gathered.setdefault(row.system, {}).setdefault(row.value, []).append(
                        100 * value
                    )
            lines = {
                system: {x: sum(v) / len(v) for x, v in points.items()}
                for system, points in gathered.items()
            }
            reached = max((x for points in lines.values() for x in points), default=0.0)
            ticks = (
                [float(t) for t in range(0, 361, 45) if t <= reached]
                if kind == "rotation"
                else None
            )
            if charts := _charts(
                run,
                {f"{heading}: {what}": lines},
                f"{what} % at 3 px",
                x_label,
                ticks=ticks,
                log_x=kind == "scale",
            ):
                made.append(charts)
    if not made:
        return None
    every = max(
        (c.legend for c in made), key=len
    )  # fewer systems have descriptors than have points
    together = Charts(
        [chart for c in made for chart in c.charts],
        every,
        [table for c in made for table in c.numbers],
    )
    return Section("Rotation and scale sweeps", [together])


def _sequences(rows: Rows) -> Section | None:
    """A chart of bars for each sequence."""
    run, looks = rows.run, _looks(rows.run)
    kinds = {row.sequence: row.kind for row in run.rows if row.kind not in APART}
    values: dict[tuple[str, str], list[float | None]] = {}
    for row in run.rows:
        values.setdefault((row.sequence, row.system), []).append(
            row.value("mutual.rep@3") if row.ok else None
        )
    charts, lines = [], []
    order = list(SPLITS)
    for sequence in sorted(
        kinds,
        key=lambda name: (order.index(kinds[name]) if kinds[name] in order else len(order), name),
    ):
        means = {s: mean(values.get((sequence, s), [])) for s in run.systems}
        bars = [(s, 100 * value, looks[s]) for s, value in means.items() if value is not None]
        if bars:
            charts.append(bar_chart(sequence, bars))
            lines.append(
                Row(
                    sequence,
                    [None if means[s] is None else 100 * (means[s] or 0.0) for s in run.systems],
                )
            )
    if not charts:
        return None
    numbers = Table(
        "Mutual repeatability % at 3 px by sequence",
        [Column(s) for s in run.systems],
        lines,
        corner="sequence",
    )
    return Section(
        "Sequences",
        [
            Text("Mutual repeatability at 3 px in %; hollow bars are controls."),
            Charts(charts, "", [numbers]),
        ],
    )


# ---- pictures


def repeated_points(
    a: Tensor, b: Tensor, H_ab: Tensor, reach: float = REACH
) -> tuple[Tensor, Tensor]:
    """Which points of a (N,2) and b (M,2) are each other's nearest within ``reach`` px in image b:
    bool (N,) and (M,).
    """
    found_a, found_b = torch.zeros(len(a), dtype=torch.bool), torch.zeros(len(b), dtype=torch.bool)
    index_a, index_b, _ = mutual_nearest(warp_points(a.double(), H_ab), b, reach)
    found_a[index_a], found_b[index_b] = True, True
    return found_a, found_b


def _pair_pictures(run: Run, row: PairRow, limit: int) -> list[Picture]:
    """Points and matches of one system on one pair; empty where features or images are gone."""
    a, b = (stored_features(run, row, image) for image in (row.image_a, row.image_b))
    image_a, image_b = (stored_image(image) for image in (row.image_a, row.image_b))
    if a is None or b is None or image_a is None or image_b is None:
        return []
    H_ab = torch.tensor(row.H_ab, dtype=torch.float64)
    a = a[common_area(a.xy.double(), H_ab, b.image_size[::-1], BORDER)][:limit]
    b = b[common_area(b.xy.double(), torch.linalg.inv(H_ab), a.image_size[::-1], BORDER)][:limit]
    found_a, found_b = repeated_points(a.xy, b.xy, H_ab)
    count, fewer = int(found_a.sum()), min(len(a), len(b))
    share = f" ({100 * count / fewer:.1f} %)" if fewer else ""
    where = f"{row.system} on {row.sequence} {row.pair}"
    caption = (
        f"{where}: {count} of {fewer} points{share} repeated within {REACH:g} px (blue discs), "
        "the others missed (orange crosses)"
    )
    images = [
        (
            data_uri(draw_keypoints(image, f.xy, repeated=found, width=PICTURE_WIDTH)),
            f"{name} image of {where}: {len(f)} points in the common area, {count} repeated.",
        )
        for name, image, f, found in (
            ("First", image_a, a, found_a),
            ("Second", image_b, b, found_b),
        )
    ]
    out = [Picture(caption, images)]
    if a.descriptors is not None and b.descriptors is not None:
        index = match(a, b).index
        xy_a, xy_b = a.xy[index[:, 0]], b.xy[index[:, 1]]
        right = (warp_points(xy_a.double(), H_ab) - xy_b.double()).norm(dim=1) <= REACH
        good = int(right.sum())
        text = (
            f"{where}: {len(index)} mutual matches, {good} right within {REACH:g} px (blue), "
            f"{len(index) - good} wrong (orange, thin)"
        )
        lines = data_uri(
            draw_matches(
                image_a,
                image_b,
                xy_a,
                xy_b,
                correct=right,
                max_lines=250,
                width=PICTURE_WIDTH,
                caption="",
            )
        )
        out.append(Picture(text, [(lines, f"Lines between both images of {text}.")], wide=True))
    return out


def _chosen_pairs(rows: Rows, count: int) -> list[tuple[str, str]]:
    """(sequence, pair) to show: sequences spread over each kind, kinds in turn; of each the pair of
    middle difficulty for real systems.
    """
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows.run.rows:
        if row.ok and row.H_ab is not None and row.system not in rows.run.controls:
            pairs = values.setdefault(row.kind, {}).setdefault(row.sequence, {})
            pairs.setdefault(row.pair, []).append(row.value("mutual.rep@3") or 0.0)
    queues = []
    for sequences in values.values():
        names = sorted(sequences)
        queue = []
        for k in np.linspace(0, len(names) - 1, min(count, len(names))).astype(int):
            pairs = sequences[names[k]]
            ranked = sorted((sum(v) / len(v), pair) for pair, v in pairs.items())
            queue.append((names[k], ranked[len(ranked) // 2][1]))
        queues.append(queue)
    turns = [item for turn in zip_longest(*queues) for item in turn if item]
    return turns[:count]


def _ranking(rows: Rows) -> list[tuple[float, str]]:
    """Real systems by mutual repeatability at 3 px in %, best first."""
    values = [
        (rows.mean(rows.splits[0], name, "mutual.rep@3", 100), name)
        for name in rows.run.real
        if rows.splits
    ]
    return sorted(
        ((value, name) for value, name in values if value is not None), key=lambda item: -item[0]
    )


def _named_pairs(rows: Rows, names: Sequence[str]) -> list[tuple[str, str]]:
    """``SEQUENCE:PAIR`` as (sequence, pair).

    Raises:
        ValueError: the run has no such pair.
    """
    known = {(row.sequence, row.pair) for row in rows.run.rows}
    places = []
    for name in names:
        sequence, _, pair = name.rpartition(":")
        if (sequence, pair) not in known:
            some = ", ".join(f"{s}:{p}" for s, p in sorted(known)[:5])
            raise ValueError(f"{rows.run.folder} has no pair {name!r}; pairs are named like {some}")
        places.append((sequence, pair))
    return places


def _pictures(
    rows: Rows, places: Sequence[tuple[str, str]], only: Sequence[str] = ()
) -> Section | None:
    """Systems ``only`` on each pair, or the first real one of the run and the best of the others,
    and a control on the first pair.
    """
    run = rows.run
    if unknown := [name for name in only if name not in run.systems]:
        raise ValueError(
            f"{run.folder} has no system {unknown[0]!r}; it has {', '.join(run.systems)}"
        )
    limit = int(finite(run.facts.get("num_points")) or 1000)
    first = run.real[:1]
    shown = first + [name for _, name in _ranking(rows) if name not in first][:1]
    blocks = list[Block]()
    for k, place in enumerate(places):
        systems = (
            list(only)
            or shown
            + [name for name in reversed(run.systems) if name in run.controls and not k][:1]
        )
        found = {
            row.system: row
            for row in run.rows
            if (row.sequence, row.pair) == place and row.ok and row.H_ab is not None
        }
        pictures = [
            picture
            for name in systems
            if name in found
            for picture in _pair_pictures(run, found[name], limit)
        ]
        if pictures:
            blocks += [Heading(f"{place[0]}, pair {place[1]}"), *pictures]
    return Section("Pictures", blocks) if blocks else None


# ---- page


def _words(value: Any) -> str:
    """A value of ``run.json`` in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items())
    return ", ".join(_words(part) for part in value) if isinstance(value, list) else str(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _header(rows: Rows, runs: Sequence[Run]) -> list[tuple[str, str]]:
    run, facts = rows.run, rows.run.facts
    sequences = {row.sequence for row in run.rows}
    pairs = {(row.sequence, row.pair) for row in run.rows}
    failed = sum(not row.ok for row in run.rows)
    mode = {"ti": "one scale (TI)", "si": "many scales (SI)"}.get(
        str(facts.get("mode")), facts.get("mode")
    )
    asked = [f"{facts['num_points']} points an image"] * ("num_points" in facts) + [
        str(mode)
    ] * bool(mode)
    out = [
        (
            "Dataset",
            f"{run.name}: {_count(len(sequences), 'sequence')}, {_count(len(pairs), 'pair')}",
        )
    ]
    out += [("Settings", ", ".join(asked))] * bool(asked)
    out.append(("Systems", f"{len(run.real)}, and {_count(len(run.controls), 'control')}"))
    out += [
        (name.capitalize(), _words(facts[name]))
        for name in ("protocols", "date", "machine", "versions")
        if facts.get(name)
    ]
    out.append(
        ("Failed pairs", f"{failed}, listed under Failures and in no mean" if failed else "none")
    )
    if len(runs) > 1:
        out.append(
            (
                "Runs",
                f"{len(runs)}; all but the curves against the number of points show the first, "
                f"{run.folder.name}",
            )
        )
    return out


def _summary(rows: Rows) -> list[str]:
    """The two sentences that explain controls and chance-corrected columns, and what this run says
    in short; nothing of poses alone.
    """
    run = rows.run
    if not rows.splits:
        return []
    here = "about 80 %"
    if (
        "lattice" in run.controls
        and (value := rows.mean(rows.splits[0], "lattice", "keynet.rep_L", 100)) is not None
    ):
        here = f"{value:.1f} %"
    out = [
        "Controls are points that never looked at the image, and yet a lattice of them repeats "
        f"to {here} in L, because L accepts points "
        "up to 11.9 px apart and so mostly rewards even coverage. The chance-corrected columns "
        "take off what the same points score "
        "against a picture turned by 180 degrees (0 is chance, 100 is perfect): they and the "
        "tight pixel thresholds tell detectors apart."
    ]
    if ranking := _ranking(rows):
        best = ", then ".join(f"{name} {value:.1f} %" for value, name in ranking[:3])
        controls = [
            (rows.mean(rows.splits[0], name, "mutual.rep@3", 100), name)
            for name in run.systems
            if name in run.controls
        ]
        reach = " and ".join(
            f"{name} {value:.1f} %" for value, name in controls if value is not None
        )
        out.append(
            f"Mutual repeatability at 3 px: {best}"
            + (f"; the controls reach {reach}." if reach else ".")
        )
    if not run.controls:
        out.append("This run has no controls: add random and lattice to its systems.")
    return out


def build_page(
    runs: Sequence[Run], *, pictures: int = 4, pairs: Sequence[str] = (), only: Sequence[str] = ()
) -> Page:
    """The report of the first run; the others only add their number of points to the curves."""
    run = runs[0]
    same = []
    for other in runs:
        if (other.dataset.get("root"), other.facts.get("mode")) == (
            run.dataset.get("root"),
            run.facts.get("mode"),
        ):
            same.append(other)
        else:
            run.notes.append(
                f"{other.folder.name} was made on other data or in another mode and is not drawn "
                f"beside {run.folder.name}."
            )
    rows = Rows(run)
    made: list[Section | None] = [
        _repeatability(rows),
        _thresholds(rows),
        _budgets(same),
        _matching(rows),
        _geometry(rows),
        _sweeps(run),
        _bias(run),
        _sequences(rows),
        _pictures(rows, _named_pairs(rows, pairs) or _chosen_pairs(rows, pictures), only),
        _sizes(rows),
        _failures(run),
        Section("What the columns mean", [Definitions(GLOSSARY)]),
    ]
    return Page(
        f"Evaluation: {run.name}",
        _header(rows, runs),
        _summary(rows),
        [section for section in made if section],
    )


@dataclass(frozen=True)
class ReportFiles:
    """What ``write_report`` wrote."""

    html: Path
    markdown: Path


def write_report(
    folder: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    pictures: int = 4,
    pairs: Sequence[str] = (),
    only: Sequence[str] = (),
) -> ReportFiles:
    """Write ``report.html`` (one file, no network, no other file) and ``report.md`` of a run of
    ``tiepoints evaluate``.

    Args:
        folder: what the run wrote; of several, the first is reported and the others add to the
            curves against the number of points.
        out: where to write, ``folder`` (the first) by default; a name ending in ``.html`` gives the
            page that name, and the Markdown the same with ``.md``.
        pictures: how many pairs to show.
        pairs: ``SEQUENCE:PAIR`` to show instead, such as ``graf:1-4``.
        only: systems in the pictures, by default the first and the best of the others.

    Raises:
        ValueError: no folder given, or an unknown pair or system.
        DataError: a folder that is missing, holds no rows, or has no readable ``run.json``.
    """
    folders = [Path(folder)] if isinstance(folder, str | os.PathLike) else [Path(f) for f in folder]
    if not folders:
        raise ValueError("no folder of results given; name at least one")
    page = build_page(
        [read_run(path) for path in folders], pictures=pictures, pairs=pairs, only=only
    )
    target = folders[0] if out is None else Path(out)
    html = target if target.suffix == ".html" else target / "report.html"
    files = ReportFiles(html, html.with_suffix(".md"))
    for path, text in ((files.html, page.html()), (files.markdown, page.markdown())):
        write_text(path, text)
    return files
