"""All available systems on homography sequences, at multiple scales (SI) and a single scale (TI):
tables, and all means as JSON.

Every value is the mean over sequences of the mean over pairs. An interrupted run resumes, as
`tiepoints evaluate` does.

    python benchmarks/oxford.py FOLDER --work DIR [--systems keynet,sift,LABEL=FILE] \\
        [--out oxford.json] [--table oxford.md]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import machine
from tiepoints.datasets.homography import homography_sequences
from tiepoints.evaluation.results import Run, read_run
from tiepoints.evaluation.run import RunSettings, evaluate
from tiepoints.metrics.geometry import mean
from tiepoints.report.page import Column, Row, Table
from tiepoints.report.report import MAIN, bias_px

SYSTEMS = (
    "keynet,keynet@all,keynet-tiny,keynet-tiny@all,sift,surf,fast,mser,harris-laplace,"
    "kaze,akaze,orb,brisk,shi-tomasi,harris,random,lattice"
)
MODES = {
    "si": "Multiple scales (SI)",
    "ti": "Single scale (TI) for our systems and controls; others as in SI",
}


def summarize(run: Run, system: str) -> dict[str, Any]:
    """Means of one system: metric -> value, overall and by sequence."""
    sequences: dict[str, dict[str, float | None]] = {}
    for name in dict.fromkeys(row.sequence for row in run.rows):
        rows = [row for row in run.rows if row.system == system and row.sequence == name and row.ok]
        sequences[name] = {
            measure.metric: mean(row.value(measure.metric) for row in rows) for measure in MAIN
        }
        sequences[name]["seconds"] = mean(row.seconds for row in rows)
    metrics = [*(measure.metric for measure in MAIN), "seconds"]
    overall = {metric: mean(values[metric] for values in sequences.values()) for metric in metrics}
    failed = sum(not row.ok for row in run.rows if row.system == system)
    return {
        "mean": {**overall, "bias": bias_px(run, system)},
        "sequences": sequences,
        "failed": failed,
    }


def table(caption: str, content: dict[str, Any], controls: list[str]) -> Table:
    shown = [measure for measure in MAIN if measure.metric not in ("mutual.rep@5", "mutual.err@3")]
    columns = [Column(m.label, m.group, m.digits, m.better) for m in shown] + [
        Column("bias px", "", 2, -1),
        Column("s / image", "", 2, -1),
    ]
    rows = []
    for system, found in content.items():
        values = found["mean"]
        cells = [None if values[m.metric] is None else values[m.metric] * m.factor for m in shown]
        rows.append(
            Row(
                system,
                [*cells, values["bias"], values["seconds"]],
                "control" if system in controls else "real",
            )
        )
    return Table(caption, columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for features and rows")
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args(argv)
    dataset = homography_sequences(args.folder)
    content: dict[str, Any] = {
        "machine": machine(),
        "num_points": 1000,
        "pairs": len(dataset.pairs),
        "modes": {},
    }
    tables = []
    for mode, caption in MODES.items():
        # "@all" has no effect at a single scale
        systems = tuple(
            name for name in args.systems.split(",") if mode == "si" or "@all" not in name
        )
        settings = RunSettings(systems, single_scale=mode == "ti", extras=("bias",))
        run = read_run(evaluate(dataset, settings, args.work / mode, progress=True))
        content["modes"][mode] = {system: summarize(run, system) for system in run.systems}
        tables.append(table(caption, content["modes"][mode], list(run.controls)).markdown())
    text = "\n\n".join(tables) + "\n"
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1) + "\n")
    if args.table:
        args.table.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
