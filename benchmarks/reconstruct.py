"""Photographs to 3D models by COLMAP: ours against SIFT, the same number of points, matcher,
verification and mapper.

The mapper draws its first pair at random and sometimes ends with two images, whatever the features;
so it runs from several seeds, and the table has the median of those that placed most images.

    python benchmarks/reconstruct.py FOLDER[:CAMERA] ... [--descriptors hardnet,rootsift] \\
        [--points 2048] [--seeds 5] --out FILE.json

Rows of FILE.json that are not measured again stay in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "to_colmap.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="+", help="photographs; :single for one camera, see docs/formats.md"
    )
    parser.add_argument("--descriptors", default="hardnet,rootsift", help="with commas between")
    parser.add_argument("--points", type=int, default=2048)
    parser.add_argument(
        "--ratios", default="0.95,0.8", help="of the ratio test, with commas between"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    for given in args.folders:
        folder, _, camera = given.partition(":")
        for ratio in args.ratios.split(","):
            for k, descriptor in enumerate(args.descriptors.split(",")):
                words = [
                    "--points",
                    str(args.points),
                    "--descriptor",
                    descriptor,
                    "--ratio",
                    ratio,
                    "--camera",
                    camera or "auto",
                ]
                words += [
                    "--tries",
                    str(args.seeds),
                    "--every-try",
                    "--threads",
                    "1",
                    *(["--compare-sift"] if not k else []),
                ]
                with tempfile.TemporaryDirectory() as out:
                    numbers = Path(out) / "numbers.json"
                    subprocess.run(
                        [sys.executable, EXAMPLE, folder, "--out", out, "--json", numbers, *words],
                        check=True,
                    )
                    new = [
                        {"data": Path(folder).name, "ratio": float(ratio), **row}
                        for row in json.loads(numbers.read_text())
                    ]
                for row in new:
                    row.update(summary(row), camera=camera or "auto", **{"machine": machine()})
                rows = [
                    row for row in rows if not any(_key(row) == _key(other) for other in new)
                ] + new
                args.out.write_text(json.dumps({"rows": sorted(rows, key=_key)}, indent=1) + "\n")
    print(table(sorted(rows, key=_key)))


def _key(row: dict) -> tuple:
    return row["data"], row["camera"], row["ratio"], row["system"]


def summary(row: dict) -> dict:
    """Medians over the seeds that placed most images."""
    most = max(one["registered"] for one in row["tries"])
    good = [one for one in row["tries"] if one["registered"] == most]
    for one in row["tries"]:
        one.pop("folder", None)
    row.pop("folder", None)
    medians = {
        key: statistics.median(one[key] for one in good)
        for key in ("points", "track_length", "error", "observations")
    }
    return {"registered": most, "seeds_with_most": len(good), **medians}


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| photographs | ratio | system | images (seeds) | 3D points | track length | error px | "
        "verified pairs | verified matches |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['data']} | {r['ratio']} | {r['system']} | {r['registered']}/{r['images']} "
            f"({r['seeds_with_most']} of {len(r['tries'])}) "
            f"| {r['points']:.0f} | {r['track_length']:.2f} | {r['error']:.2f} | "
            f"{r['verified_pairs']}/{r['pairs']} "
            f"| {r['inliers']} of {r['matches']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
