"""Report of an evaluation: ``write_report(DIR)`` writes ``report.html`` and ``report.md``.

Values are means over the pairs that succeeded, as in the papers; a failed pair is listed with its
reason and excluded from means. Sections without data (descriptors, poses, sweeps, images) are
omitted.
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

from ..errors import DataError, WeightsError
from ..evaluation.complexity import num_parameters
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
from .charts import Series, Style, bar_chart, data_uri, legend, line_chart
from .merge import by_number_of_keypoints, merge_runs, settings_lines
from .page import (
    Block,
    Cell,
    Charts,
    Column,
    Definitions,
    Heading,
    ImageRow,
    Page,
    Row,
    Section,
    Table,
    Text,
)
from .papers import paper_tables

#: Maximum distance in pixels of a repeated keypoint and of a correct match in the images.
MAX_DISTANCE = 3.0
#: Width of the images in the report, in pixels.
IMAGE_WIDTH = 480
#: Numbers of keypoints for which the curve is computed from stored features, as far as they are
#: below that of the run.
BUDGETS = (100, 250, 500, 1000, 2000)


class Measure(NamedTuple):
    """A column that shows one metric times ``factor`` (100: ratios as percentages); ``better`` is 1
    (higher is better), -1 (lower is better) or 0.
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
    Measure("keynet.points", "keypoints", 0, 0, 1.0),
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
#: Columns of the same table without published values: TILDE's repeatability, and the measure of
#: EVD.
REKD_MORE = [
    Measure("rekd.repeatability@5", "rep.@5"),
    Measure("rekd.correct@5", "correct@5", 1, 1, 1.0),
]

GLOSSARY = [
    (
        "repeatability SL, L",
        "Key.Net protocol: fraction of keypoints with a one-to-one correspondence in the common "
        "area, with an overlap of their circles of at least 60 % (the larger one has a radius of "
        "30 px). SL uses the detected scales, L assumes correct scales.",
    ),
    (
        "overlap error",
        "Mean of 1 - overlap over the correspondences; pairs without correspondences are skipped.",
    ),
    ("S range", "Ratio of the largest to the smallest scale of an image; 1 for a single scale."),
    (
        "keypoints",
        "The smaller number of keypoints evaluated in the two images, in the common area and up to "
        "the limit.",
    ),
    (
        "mutual repeatability",
        "Number of mutual nearest keypoints within a distance in pixels, divided by the smaller "
        "number of keypoints.",
    ),
    ("error px", "Mean distance in pixels of the keypoints repeated within 3 px."),
    (
        "chance-corrected",
        "(repeatability - chance) / (1 - chance), where chance is the repeatability with the "
        "keypoints of the second image rotated by 180 degrees: 0 for keypoints independent of the "
        "image, 100 for a perfect detector.",
    ),
    (
        "bias px",
        "Constant localization error: half the displacement between keypoints of an image and of "
        "its mirrored or rotated copy.",
    ),
    (
        "on structure %",
        "Median percentile of the keypoints' corner strength among all pixels; chance is 50 "
        "(--extras bias).",
    ),
    (
        "below median %",
        "Fraction of keypoints with less corner strength than the median pixel; chance is 50.",
    ),
    ("s / image", "Seconds to detect and describe an image on the machine of the run."),
    ("pairs", "Number of pairs in the means; N of M if some failed."),
    (
        "matching score, MMA",
        "Number of correct mutual matches divided by the smaller number of keypoints; divided by "
        "the number of matches.",
    ),
    (
        "AUC",
        "Area under the curve of the fraction of pairs with an error below a threshold; pairs "
        "without an estimate (failed) have an infinite error.",
    ),
]


# ---- tables


def bias_px(run: Run, system: str) -> float | None:
    """Mean over the images of a detector's localization bias in pixels, from the mirrored copies or
    from the copy rotated by 180 degrees.
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
    """Means over the images, in percent, of the median percentile of corner strength and of the
    fraction of keypoints below the median pixel.
    """
    rows = [row for row in run.bias if row.system == system and row.kind == "anchoring" and row.ok]
    known = [
        (a, b)
        for row in rows
        if (a := row.number("median")) is not None and (b := row.number("below_half")) is not None
    ]
    if not known:
        return None, None
    medians, fractions = zip(*known, strict=True)
    return 100 * math.fsum(medians) / len(known), 100 * math.fsum(fractions) / len(known)


def _values(rows: Rows, split: str, system: str, measures: Iterable[Measure]) -> list[Cell]:
    return [rows.mean(split, system, m.metric, m.factor) for m in measures]


def _main_table(rows: Rows, split: str) -> Table | None:
    run = rows.run
    columns = [Column(m.label, m.group, m.digits, m.better) for m in MAIN]
    columns += [
        Column("bias px", "", 2, -1),
        Column("on structure %", "", 1, 1),
        Column("below median %", "", 1, -1),
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
                "Systems have different numbers of pairs (column pairs), so that their means are "
                "only roughly comparable."
            ),
        )
    return Section("Repeatability", blocks) if blocks else None


def _matching(rows: Rows) -> Section | None:
    run, blocks = rows.run, list[Block]()
    selected = [(m, split) for m in MATCHING for split in rows.splits]
    columns = [
        Column(SPLITS[split].lower().split()[0], m.label, m.digits, m.better)
        for m, split in selected
    ]
    lines = [
        Row(s, [rows.mean(split, s, m.metric, m.factor) for m, split in selected], run.role(s))
        for s in run.systems
    ]
    for name, (view, illum) in published.TABLE_3.items():
        printed = {
            ("keynet.score@5", "view"): f"{view:.1f}",
            ("keynet.score@5", "illum"): f"{illum:.1f}",
        }
        lines.append(
            Row(name, [printed.get((m.metric, split)) for m, split in selected], "published")
        )
    note = "Mutual nearest neighbors without a ratio test, in the common area."
    source = f"{published.KEYNET}, table 3 ({published.DATASET})"
    if table := Table("Matching, Key.Net protocol", columns, lines, source, note=note).trimmed():
        blocks.append(table)
    if charts := _curves(rows, "keynet.mma@{}", range(1, 11), "MMA", "correct matches %"):
        blocks += [Heading("Matching accuracy by threshold"), charts]
    blocks += [table for split in rows.splits if (table := _rekd_table(rows, split))]
    return Section("Matching", blocks) if blocks else None


def _rekd_table(rows: Rows, split: str) -> Table | None:
    """Table of a split: REKD's README has one of all pairs, of viewpoint and of illumination."""
    run = rows.run
    selected = [*REKD, *REKD_MORE]
    columns = [Column(m.label, "", m.digits, m.better) for m in selected]
    lines = []
    for system in run.systems:
        lines.append(
            Row(
                system,
                [rows.mean(split, system, m.metric, m.factor) for m in selected],
                run.role(system),
            )
        )
        filtered: list[Cell] = [
            None
            if "repeatability" in m.metric
            else rows.mean(split, system, m.metric.replace("rekd.", "rekd*."), m.factor)
            for m in selected
        ]
        lines.append(Row(f"{system}*", filtered, run.role(system)))
    for name, row in published.REKD_TABLES.get(split, {}).items():
        cells: list[Cell] = [f"{value:.1f}" for value in row]
        lines.append(Row(name, cells + [None] * len(REKD_MORE), "published"))
    note = (
        "rep.: % of keypoints of image 1 with a keypoint of image 2 within 3 px (many to one, "
        "without common area); rep.@5: within 5 px (TILDE); MMA: % of correct matches; correct@5: "
        "number of correct matches. *: only matches that agree with the dominant rotation."
    )
    return Table(
        f"REKD protocol, {SPLITS[split].lower()}",
        columns,
        lines,
        f"{published.REKD} ({published.DATASET})",
        note=note,
    ).trimmed()


def _auc(rows: list[PairRow], metric: str, thresholds: tuple[float, ...]) -> list[Cell]:
    """AUC in %, and the fraction of pairs without an estimate in %; None if no row has the
    metric.
    """
    measured = [row for row in rows if metric in row.metrics]
    if not measured:
        return [None] * (len(thresholds) + 1)
    errors = [row.value(metric) for row in measured]
    failed = sum(error is None or (metric.startswith("pose") and error >= 180) for error in errors)
    return [*(100 * auc for auc in error_auc(errors, thresholds)), 100 * failed / len(measured)]


def _auc_columns(thresholds: Iterable[float], unit: str, group: str) -> list[Column]:
    return [
        *(Column(f"@{t:g}{unit}", group, 1, 1) for t in thresholds),
        Column("failed %", group, 1, -1),
    ]


def _geometry(rows: Rows) -> Section | None:
    tables = (
        _homography_table(rows, "homography.error", "PoseLib's RANSAC"),
        _homography_table(rows, "homography.error_dlt", "least squares (DLT) of all matches"),
        _pose_table(rows),
        _marked_table(rows),
    )
    blocks: list[Block] = [table for table in tables if table]
    return Section("Homography and pose", blocks) if blocks else None


def _homography_table(rows: Rows, metric: str, estimator: str) -> Table | None:
    thresholds = (1.0, 3.0, 5.0)
    columns = [
        column
        for split in rows.splits
        for column in _auc_columns(thresholds, "\u00a0px", f"{SPLITS[split].lower()}: AUC %")
    ]
    lines = []
    for system in rows.run.systems:
        cells = [
            cell
            for split in rows.splits
            for cell in _auc(rows.good(split, system), metric, thresholds)
        ]
        lines.append(Row(system, cells, rows.run.role(system)))
    caption = f"Homography by {estimator}: mean error of the image corners"
    return Table(caption, columns, lines).trimmed()


def _pose_table(rows: Rows) -> Table | None:
    thresholds = (5.0, 10.0, 20.0)
    columns = [
        *_auc_columns(thresholds, "°", "PoseLib: AUC %"),
        *_auc_columns(thresholds, "°", "OpenCV: AUC %"),
        Column("correct", "matches", 0, 1),
        Column("correct %", "matches", 1, 1),
        Column("s / image", "", 3, -1),
        Column("pairs", "", 0),
    ]
    lines = []
    for system in rows.run.systems:
        if rows.all("pose", system):
            good = rows.good("pose", system)
            cells: list[Cell] = [
                cell
                for name in ("poselib", "opencv")
                for cell in _auc(good, f"pose.error_{name}", thresholds)
            ]
            cells += [
                rows.mean("pose", system, "pose.right"),
                rows.mean("pose", system, "pose.precision", 100),
                rows.seconds("pose", system),
                rows.count("pose", system),
            ]
            lines.append(Row(system, cells, rows.run.role(system)))
    caption = "Relative pose: the larger error of rotation and translation direction"
    return Table(caption, columns, lines).trimmed()


def _marked_table(rows: Rows) -> Table | None:
    """Annotated correspondences that agree with the estimated fundamental matrix (WxBS)."""
    fractions = [
        Measure("marked.share", "mean"),
        *(Measure(f"marked.share@{t}", f"{t} px") for t in (1, 3, 5, 10, 20)),
    ]
    counts = [
        Measure("marked.matches", "matches", 0, 0, 1.0),
        Measure("marked.inliers", "inliers", 0, 0, 1.0),
    ]
    columns = [Column(m.label, "agreement %", m.digits, m.better) for m in fractions]
    columns += [Column(m.label, "", m.digits, m.better) for m in counts]
    columns += [Column("s / image", "", 3, -1), Column("pairs", "", 0)]
    lines = []
    for system in rows.run.systems:
        if rows.all("marked", system):
            cells = _values(rows, "marked", system, [*fractions, *counts])
            cells += [rows.seconds("marked", system), rows.count("marked", system)]
            lines.append(Row(system, cells, rows.run.role(system)))
    note = (
        "Fraction of the correspondences whose larger distance to the epipolar lines is within a "
        "threshold, and its mean over 1..20 px; means over the pairs and five seeds of the "
        "estimator (PoseLib, 2 px); 0 without an estimate."
    )
    caption = "Fundamental matrix: manually annotated correspondences"
    return Table(caption, columns, lines, note=note).trimmed()


def _bias(run: Run) -> Section | None:
    kinds = {
        "mirror_x": ("mirrored in x", ("dx",)),
        "mirror_y": ("mirrored in y", ("dy",)),
        "rotation_180": ("rotated by 180°", ("dx", "dy")),
    }
    columns = [
        Column(f"{axis} px", heading, 2) for heading, axes in kinds.values() for axis in axes
    ] + [Column("bias px", "", 2, -1)]
    lines = []
    for system in run.systems:
        cells: list[Cell] = []
        for kind, (_, axes) in kinds.items():
            selected = [
                row for row in run.bias if row.system == system and row.kind == kind and row.ok
            ]
            cells += [mean(row.number(axis) for row in selected) for axis in axes]
        lines.append(Row(system, [*cells, bias_px(run, system)], run.role(system)))
    note = (
        "Displacement between the keypoints of an image and those of its mirrored or rotated copy, "
        "mapped back: twice the localization bias (bias px)."
    )
    table = Table("Localization bias, mean over the images", columns, lines, note=note).trimmed()
    return Section("Bias", [table]) if table else None


def _parameters(run: Run, system: str) -> int | None:
    """Number of learnable parameters of a system's detector; None if it is not a network of ours or
    of a weights file.
    """
    spec = str((run.metadata.get("made_by") or {}).get(system, system))
    try:
        return num_parameters(spec.partition("+")[0])
    except (ValueError, DataError, WeightsError, OSError):
        return None  # the file has been moved since


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
            step = row.kind if row.value is None else f"{row.kind} {row.value:g}"
            failed.append((row.system, row.image, step, row.reason))
    blocks: list[Block] = [Text(note) for note in run.notes]
    if failed:
        columns = [
            Column("sequence", "", None),
            Column("pair", "", None),
            Column("reason", "", None),
        ]
        lines = [
            Row(s, [sequence, pair, reason or "no reason given"], run.role(s))
            for s, sequence, pair, reason in failed
        ]
        caption = f"{_count(len(failed), 'failure')}, excluded from all means"
        blocks.append(Table(caption, columns, lines))
    return Section("Failures", blocks) if blocks else None


# ---- charts


def _styles(run: Run) -> dict[str, Style]:
    """One style per system for all charts; controls are counted separately."""
    real, controls = run.real, [name for name in run.systems if name in run.controls]
    return {
        name: Style(k, names is controls)
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
    """One chart per title with one line per system, and a table of the values; None without values.

    Args:
        series: title -> system -> x -> %.
    """
    styles = _styles(run)
    lines = {
        title: [
            Series(s, styles[s], sorted(systems[s].items())) for s in run.systems if systems.get(s)
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
    by_name = {s.label: s for group in lines.values() for s in group}
    names = [name for name in run.systems if name in by_name]
    table = []
    for title in lines:
        for x in sorted({x for points in series[title].values() for x in points}):
            label = f"{title}, {x:g}" if len(lines) > 1 else f"{x:g}"
            table.append(Row(label, [series[title].get(name, {}).get(x) for name in names]))
    values = Table(
        f"{y_label} by {x_label}", [Column(name) for name in names], table, corner=x_label
    )
    return Charts(charts, legend(by_name[name] for name in names), [values])


def _curves(
    rows: Rows, metric: str, thresholds: Iterable[int], title: str, y_label: str
) -> Charts | None:
    """One chart per split: ``metric`` (a format string for the threshold) in % by threshold."""
    series: dict[str, dict[str, dict[float, float]]] = {}
    for split in rows.splits:
        lines = series[f"{title}: {SPLITS[split].lower()}"] = {}
        for system in rows.run.systems:
            values = {float(t): rows.mean(split, system, metric.format(t), 100) for t in thresholds}
            lines[system] = {t: value for t, value in values.items() if value is not None}
    return _charts(rows.run, series, y_label, "threshold px")


def _thresholds(rows: Rows) -> Section | None:
    charts = _curves(rows, "mutual.rep@{}", (1, 2, 3, 5), "Repeatability", "mutual repeatability %")
    return Section("Repeatability by threshold", [charts]) if charts else None


def budget_curve(run: Run, system: str, budgets: Sequence[int]) -> dict[float, float]:
    """Mean mutual repeatability (%) at 3 px by number of keypoints, from stored features; empty if
    any of them are missing.

    The means are over the homography pairs that succeeded, as those of the rows.
    """
    found: dict[float, list[float]] = {float(n): [] for n in budgets}
    cache: dict[str, Any] = {}
    for row in run.rows:
        if row.system != system or not row.ok:
            continue
        if row.H_ab is None or row.value("mutual.rep@3") is None:
            continue
        for image in (row.image_a, row.image_b):
            if image not in cache:
                cache[image] = stored_features(row, image, described=False)
        a, b = cache[row.image_a], cache[row.image_b]
        if a is None or b is None:
            return {}
        H_ab = torch.tensor(row.H_ab, dtype=torch.float64)
        sizes = a.image_size[::-1], b.image_size[::-1]
        for n in budgets:
            local = localization(
                a.xy, b.xy, H_ab, *sizes, num_keypoints=n, thresholds=(MAX_DISTANCE,)
            )
            found[n].append(100 * (local["rep@3"] or 0.0))
    return {n: sum(values) / len(values) for n, values in found.items() if values}


def _budgets(runs: Sequence[Run]) -> Section | None:
    """Repeatability by number of keypoints: from several runs on the same data, and from stored
    features of the first.
    """
    first = runs[0]
    titles = {"mutual.rep@3": "Within 3 px, mutual", "keynet.rep_SL": "SL", "keynet.rep_L": "L"}
    systems = list(dict.fromkeys(system for run in runs for system in run.systems))
    series: dict[str, dict[str, dict[float, float]]] = {
        title: {s: {} for s in systems} for title in titles.values()
    }
    measured = [n for run in runs if (n := finite(run.metadata.get("num_points")))]
    for system in first.systems:
        below = [n for n in BUDGETS if n not in measured and n < max(measured, default=0)]
        series["Within 3 px, mutual"][system] |= budget_curve(first, system, below)
    for run in runs:
        rows, n = Rows(run), finite(run.metadata.get("num_points"))
        for metric, title in titles.items():
            for system in systems:
                if n and (value := rows.mean("all", system, metric, 100)) is not None:
                    series[title][system][n] = value
    curves = {
        title: {s: points for s, points in lines.items() if len(points) > 1}
        for title, lines in series.items()
    }
    charts = _charts(first, curves, "repeatability %", "number of keypoints", log_x=True)
    return Section("Repeatability by number of keypoints", [charts]) if charts else None


def _sweeps(run: Run) -> Section | None:
    """Means over the images at each angle and each factor."""
    found = list[Charts]()
    for metric, name in (("mutual.rep@3", "repeatability"), ("mma@3", "correct matches")):
        for kind, heading, x_label in (
            ("rotation", "Rotation", "rotation in degrees"),
            ("scale", "Scale", "scale factor"),
        ):
            lines = _sweep_means(run, kind, metric)
            largest = max((x for points in lines.values() for x in points), default=0.0)
            ticks = [float(t) for t in range(0, 361, 45) if t <= largest]
            if charts := _charts(
                run,
                {f"{heading}: {name}": lines},
                f"{name} % at 3 px",
                x_label,
                ticks=ticks if kind == "rotation" else None,
                log_x=kind == "scale",
            ):
                found.append(charts)
    if not found:
        return None
    # systems without descriptors are missing in some charts
    complete_legend = max((c.legend for c in found), key=len)
    charts = Charts(
        [chart for c in found for chart in c.charts],
        complete_legend,
        [table for c in found for table in c.tables],
    )
    return Section("Rotation and scale sweeps", [charts])


def _sweep_means(run: Run, kind: str, metric: str) -> dict[str, dict[float, float]]:
    """System -> step of the sweep -> mean over the images in %."""
    values: dict[str, dict[float, list[float]]] = {}
    for row in run.sweeps:
        value = row.number(metric)
        if row.kind != kind or not row.ok or row.value is None or value is None:
            continue
        if row.value > 0 or kind == "rotation":
            values.setdefault(row.system, {}).setdefault(row.value, []).append(100 * value)
    return {
        system: {x: sum(v) / len(v) for x, v in steps.items()} for system, steps in values.items()
    }


def _sequences(rows: Rows) -> Section | None:
    """One bar chart per sequence."""
    run, styles = rows.run, _styles(rows.run)
    kinds = {row.sequence: row.kind for row in run.rows if row.kind not in APART}
    values: dict[tuple[str, str], list[float | None]] = {}
    for row in run.rows:
        values.setdefault((row.sequence, row.system), []).append(
            row.value("mutual.rep@3") if row.ok else None
        )
    charts, lines = [], []
    order = {kind: i for i, kind in enumerate(SPLITS)}
    for sequence in sorted(kinds, key=lambda name: (order.get(kinds[name], len(order)), name)):
        means = {s: mean(values.get((sequence, s), [])) for s in run.systems}
        percent = {s: None if value is None else 100 * value for s, value in means.items()}
        bars = [(s, value, styles[s]) for s, value in percent.items() if value is not None]
        if bars:
            charts.append(bar_chart(sequence, bars))
            lines.append(Row(sequence, list(percent.values())))
    if not charts:
        return None
    columns = [Column(s) for s in run.systems]
    caption = "Mutual repeatability % at 3 px by sequence"
    table = Table(caption, columns, lines, corner="sequence")
    text = Text("Mutual repeatability at 3 px in %; hollow bars are controls.")
    return Section("Sequences", [text, Charts(charts, "", [table])])


# ---- images


def repeated_points(
    a: Tensor, b: Tensor, H_ab: Tensor, max_distance: float = MAX_DISTANCE
) -> tuple[Tensor, Tensor]:
    """Masks (N,) and (M,) of the keypoints of a (N,2) and b (M,2) that are mutual nearest neighbors
    within ``max_distance`` px in image b.
    """
    mask_a, mask_b = torch.zeros(len(a), dtype=torch.bool), torch.zeros(len(b), dtype=torch.bool)
    index_a, index_b, _ = mutual_nearest(warp_points(a.double(), H_ab), b, max_distance)
    mask_a[index_a], mask_b[index_b] = True, True
    return mask_a, mask_b


def _pair_images(run: Run, row: PairRow, limit: int) -> list[ImageRow]:
    """Keypoints and matches of one system on one pair; empty if features or images are missing."""
    a, b = (stored_features(row, image) for image in (row.image_a, row.image_b))
    image_a, image_b = (stored_image(image) for image in (row.image_a, row.image_b))
    if a is None or b is None or image_a is None or image_b is None:
        return []
    H_ab = torch.tensor(row.H_ab, dtype=torch.float64)
    a = a[common_area(a.xy.double(), H_ab, b.image_size[::-1], BORDER)][:limit]
    b = b[common_area(b.xy.double(), torch.linalg.inv(H_ab), a.image_size[::-1], BORDER)][:limit]
    repeated_a, repeated_b = repeated_points(a.xy, b.xy, H_ab)
    count, total = int(repeated_a.sum()), min(len(a), len(b))
    percent = f" ({100 * count / total:.1f} %)" if total else ""
    title = f"{row.system} on {row.sequence} {row.pair}"
    caption = (
        f"{title}: {count} of {total} keypoints{percent} repeated within {MAX_DISTANCE:g} px (blue "
        "discs), the others not repeated (orange crosses)"
    )
    images = [
        (
            data_uri(draw_keypoints(image, f.xy, repeated=mask, width=IMAGE_WIDTH)),
            f"{name} image of {title}: {len(f)} keypoints in the common area, {count} repeated.",
        )
        for name, image, f, mask in (
            ("First", image_a, a, repeated_a),
            ("Second", image_b, b, repeated_b),
        )
    ]
    found = [ImageRow(caption, images)]
    if a.descriptors is not None and b.descriptors is not None:
        index = match(a, b).index
        xy_a, xy_b = a.xy[index[:, 0]], b.xy[index[:, 1]]
        correct = (warp_points(xy_a.double(), H_ab) - xy_b.double()).norm(dim=1) <= MAX_DISTANCE
        num_correct = int(correct.sum())
        text = (
            f"{title}: {len(index)} mutual matches, {num_correct} correct within "
            f"{MAX_DISTANCE:g} px (blue), {len(index) - num_correct} incorrect (orange, thin)"
        )
        image = draw_matches(
            image_a,
            image_b,
            xy_a,
            xy_b,
            correct=correct,
            max_lines=250,
            width=IMAGE_WIDTH,
            caption="",
        )
        alt = f"Lines between both images of {text}."
        found.append(ImageRow(text, [(data_uri(image), alt)], wide=True))
    return found


def _select_pairs(rows: Rows, count: int) -> list[tuple[str, str]]:
    """(sequence, pair) to show: sequences sampled evenly from each kind, kinds in alternation; of
    each sequence the pair of median repeatability over the systems without controls.
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
    alternating = [item for group in zip_longest(*queues) for item in group if item]
    return alternating[:count]


def _ranking(rows: Rows) -> list[tuple[float, str]]:
    """Systems without controls by mutual repeatability at 3 px in %, best first."""
    values = [
        (rows.mean(rows.splits[0], name, "mutual.rep@3", 100), name)
        for name in rows.run.real
        if rows.splits
    ]
    return sorted(
        ((value, name) for value, name in values if value is not None), key=lambda item: -item[0]
    )


def _named_pairs(rows: Rows, names: Sequence[str]) -> list[tuple[str, str]]:
    """Parse ``SEQUENCE:PAIR`` to (sequence, pair).

    Raises:
        ValueError: the run has no such pair.
    """
    existing = {(row.sequence, row.pair) for row in rows.run.rows}
    pairs = []
    for name in names:
        sequence, _, pair = name.rpartition(":")
        if (sequence, pair) not in existing:
            examples = ", ".join(f"{s}:{p}" for s, p in sorted(existing)[:5])
            raise ValueError(
                f"{rows.run.folder} has no pair {name!r}; pairs are named like {examples}"
            )
        pairs.append((sequence, pair))
    return pairs


def _images(
    rows: Rows, pairs: Sequence[tuple[str, str]], only: Sequence[str] = ()
) -> Section | None:
    """Keypoints and matches of the systems ``only`` on each pair; by default the first system and
    the best of the others, and a control on the first pair.
    """
    run = rows.run
    if unknown := [name for name in only if name not in run.systems]:
        raise ValueError(
            f"{run.folder} has no system {unknown[0]!r}; it has {', '.join(run.systems)}"
        )
    limit = int(finite(run.metadata.get("num_points")) or 1000)
    first = run.real[:1]
    shown = first + [name for _, name in _ranking(rows) if name not in first][:1]
    control = [name for name in reversed(run.systems) if name in run.controls][:1]
    blocks = list[Block]()
    for k, pair in enumerate(pairs):
        systems = list(only) or (shown if k else shown + control)
        found = {
            row.system: row
            for row in run.rows
            if (row.sequence, row.pair) == pair and row.ok and row.H_ab is not None
        }
        images = [
            image
            for name in systems
            if name in found
            for image in _pair_images(run, found[name], limit)
        ]
        if images:
            blocks += [Heading(f"{pair[0]}, pair {pair[1]}"), *images]
    return Section("Keypoints and matches", blocks) if blocks else None


# ---- page


def _as_text(value: Any) -> str:
    """Format a value of ``run.json``."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_as_text(part)}" for name, part in value.items())
    return ", ".join(_as_text(part) for part in value) if isinstance(value, list) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _header(rows: Rows, runs: Sequence[Run]) -> list[tuple[str, str]]:
    run, metadata = rows.run, rows.run.metadata
    sequences = {row.sequence for row in run.rows}
    pairs = {(row.sequence, row.pair) for row in run.rows}
    failed = sum(not row.ok for row in run.rows)
    mode = metadata.get("mode")
    mode = {"ti": "single scale (TI)", "si": "multiple scales (SI)"}.get(str(mode), mode)
    number = metadata.get("num_points")
    settings = [] if number is None else [f"{number} keypoints per image"]
    settings += [str(mode)] * bool(mode)
    settings += [f"{k} {v}" for k, v in (metadata.get("extraction") or {}).items()]
    counts = f"{_count(len(sequences), 'sequence')}, {_count(len(pairs), 'pair')}"
    out = [("Dataset", f"{run.name}: {counts}")]
    if len(runs) > 1:
        out.append(("Runs", "; ".join(settings_lines(runs))))
    else:
        out += [("Settings", ", ".join(settings))] * bool(settings)
    out.append(("Systems", f"{len(run.real)}, and {_count(len(run.controls), 'control')}"))
    out += [
        (name.capitalize(), _as_text(metadata[name]))
        for name in ("protocols", "date", "machine", "versions")
        if metadata.get(name)
    ]
    failures = f"{failed}, listed under Failures and excluded from means"
    out.append(("Failed pairs", failures if failed else "none"))
    return out


def _summary(rows: Rows) -> list[str]:
    """Explanation of controls and chance correction, and the main result of the run; empty for
    posed pairs only.
    """
    run = rows.run
    if not rows.splits:
        return []
    lattice = None
    if "lattice" in run.controls:
        lattice = rows.mean(rows.splits[0], "lattice", "keynet.rep_L", 100)
    out = [
        "Controls are keypoints independent of the image content. Nevertheless a lattice has a "
        f"repeatability of {'about 80' if lattice is None else f'{lattice:.1f}'} % in L, because L "
        "accepts keypoints up to 11.9 px apart and so mostly measures even coverage. The "
        "chance-corrected columns subtract the repeatability with the keypoints of image 2 rotated "
        "by 180 degrees (0 is chance, 100 is perfect): they and small pixel thresholds distinguish "
        "detectors."
    ]
    if ranking := _ranking(rows):
        best = ", ".join(f"{name} {value:.1f} %" for value, name in ranking[:3])
        controls = [
            (rows.mean(rows.splits[0], name, "mutual.rep@3", 100), name)
            for name in run.systems
            if name in run.controls
        ]
        measured = ", ".join(
            f"{name} {value:.1f} %" for value, name in controls if value is not None
        )
        out.append(
            f"Mutual repeatability at 3 px: {best}"
            + (f"; controls: {measured}." if measured else ".")
        )
    if not run.controls:
        out.append("This run has no controls: add random and lattice to its systems.")
    return out


def build_page(
    runs: Sequence[Run], *, pictures: int = 4, pairs: Sequence[str] = (), only: Sequence[str] = ()
) -> Page:
    """The report of all runs as one (``merge.merge_runs``); runs with other numbers of keypoints
    also extend the curves by number of keypoints.
    """
    run = merge_runs(runs)
    rows = Rows(run)
    sections: list[Section | None] = [
        _repeatability(rows),
        _thresholds(rows),
        _budgets(by_number_of_keypoints(runs)),
        _matching(rows),
        paper_tables(rows),
        _geometry(rows),
        _sweeps(run),
        _bias(run),
        _sequences(rows),
        _images(rows, _named_pairs(rows, pairs) or _select_pairs(rows, pictures), only),
        _sizes(rows),
        _failures(run),
        Section("Definitions of the columns", [Definitions(GLOSSARY)]),
    ]
    return Page(
        f"Evaluation: {run.name}",
        _header(rows, runs),
        _summary(rows),
        [section for section in sections if section],
    )


@dataclass(frozen=True)
class ReportFiles:
    """Files written by ``write_report``."""

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
    """Write ``report.html`` (self-contained) and ``report.md`` of a run of ``tiepoints evaluate``.

    Args:
        folder: output of the run; several are merged (``merge.merge_runs``).
        out: output folder, by default the first ``folder``; a path ending in ``.html`` is the name
            of the page, and with ``.md`` instead that of the Markdown file.
        pictures: number of pairs whose images are shown.
        pairs: pairs to show instead, as ``SEQUENCE:PAIR``, such as ``graf:1-4``.
        only: systems to show, by default the first and the best of the others.

    Raises:
        ValueError: no folder given, or an unknown pair or system.
        DataError: a folder is missing, has no rows, or no readable ``run.json``; or several
            measured different images.
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
