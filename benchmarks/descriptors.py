"""Descriptors on the same keypoints, and whole systems: matching on homography sequences and
relative pose on posed pairs.

Keypoints of Key.Net at multiple scales (SI), the strongest 2000 of each image, mutual nearest
neighbors. MMA@3: fraction of matches within 3 px in image k (REKD's protocol), mean over all pairs
1-k; matching score: correct matches within 5 px divided by the smaller number of keypoints in the
common area (Key.Net's protocol). AUC of the pose error with PoseLib. An interrupted run resumes, as
`tiepoints evaluate` does.

    python benchmarks/descriptors.py OXFORD --poses POSE_PAIRS --work DIR \\
        [--out descriptors.json] [--table descriptors.md]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import machine
from tiepoints.datasets.homography import homography_sequences
from tiepoints.datasets.posed import posed_pairs
from tiepoints.evaluation.results import PairRow, read_run
from tiepoints.evaluation.run import RunSettings, evaluate
from tiepoints.metrics.geometry import error_auc, mean
from tiepoints.report.page import Cell, Column, Row, Table

NUM_POINTS = 2000
SYSTEMS = (
    "keynet+hardnet,keynet+hynet,keynet+sosnet,keynet+rootsift,keynet+raw,"
    "sift,sift+rootsift,sift+hardnet,akaze,orb"
)
MEASURES = {
    "MMA@1": "rekd.mma@1",
    "MMA@3": "rekd.mma@3",
    "MMA@5": "rekd.mma@5",
    "matches": "rekd.matches",
    "score@3": "keynet.score@3",
    "score@5": "keynet.score@5",
}
POSE_SIZE = (640, 480)  # as in papers that evaluate on ScanNet
DEGREES = (5.0, 10.0, 20.0)


def homography_results(rows: Sequence[PairRow]) -> dict[str, Any]:
    """Means over all pairs, and MMA@3 by sequence."""
    found: dict[str, Any] = {
        name: mean(row.value(metric) for row in rows) for name, metric in MEASURES.items()
    }
    found["right"] = mean(
        (row.value("rekd.mma@3") or 0.0) * (row.value("rekd.matches") or 0.0) for row in rows
    )
    for sequence in dict.fromkeys(row.sequence for row in rows):
        found[f"MMA@3 {sequence}"] = mean(
            row.value("rekd.mma@3") for row in rows if row.sequence == sequence
        )
    return found


def pose_results(rows: Sequence[PairRow]) -> dict[str, Any]:
    """AUC, and pose error and number of correct matches of each pair."""
    errors = [row.value("pose.error_poselib") for row in rows]
    found: dict[str, Any] = {
        f"AUC@{d:g}": auc for d, auc in zip(DEGREES, error_auc(errors, DEGREES), strict=True)
    }
    found["right"] = mean(row.value("pose.right") for row in rows)
    found["precision"] = mean(row.value("pose.precision") for row in rows)
    found["pairs"] = {
        f"{row.sequence}/{row.pair}": {
            "error": row.value("pose.error_poselib"),
            "right": row.value("pose.right"),
        }
        for row in rows
    }
    return found


def run(
    dataset, systems: tuple[str, ...], work: Path, summarize, resize: tuple[int, ...] | None = None
) -> dict[str, Any]:
    results = read_run(
        evaluate(
            dataset,
            RunSettings(systems, num_keypoints=NUM_POINTS, resize=resize),
            work,
            progress=True,
        )
    )
    return {
        s: summarize([row for row in results.rows if row.system == s and row.ok])
        for s in results.systems
    }


def table(
    caption: str, content: dict[str, Any], percent: Sequence[str], counts: Sequence[str]
) -> str:
    columns = [Column(name, "%", 1, 1) for name in percent] + [
        Column(name, "number", 0, 1) for name in counts
    ]
    rows = []
    for system, found in content.items():
        cells: list[Cell] = [None if found[name] is None else 100 * found[name] for name in percent]
        rows.append(Row(system, [*cells, *(found[name] for name in counts)]))
    return Table(caption, columns, rows).markdown()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--poses", type=Path, help="folder with pairs_with_gt.txt and images/")
    parser.add_argument("--work", type=Path, required=True, help="folder for features and rows")
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args(argv)
    systems = tuple(args.systems.split(","))
    content: dict[str, Any] = {"machine": machine(), "num_points": NUM_POINTS}
    content["homography"] = run(
        homography_sequences(args.folder), systems, args.work / "homography", homography_results
    )
    sequences = [
        name for name in next(iter(content["homography"].values())) if name.startswith("MMA@3 ")
    ]
    text = table(
        "Homography sequences",
        content["homography"],
        ["MMA@1", "MMA@3", "MMA@5", *sequences, "score@3", "score@5"],
        ["matches", "right"],
    )
    if args.poses:
        content["pose"] = run(
            posed_pairs(args.poses), systems, args.work / "pose", pose_results, POSE_SIZE
        )
        aucs = [f"AUC@{d:g}" for d in DEGREES]
        text += "\n\n" + table(
            "Pairs with known pose (PoseLib)", content["pose"], [*aucs, "precision"], ["right"]
        )
    if args.out:
        args.out.write_text(json.dumps(content, indent=1) + "\n")
    if args.table:
        args.table.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
