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
import tempfile
import time
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import tiepoints
from common import machine
from tiepoints.evaluation.systems import Options, system
from tiepoints.files import collect, write_json
from tiepoints.formats.colmap import ColmapDatabase, reconstruct
from tiepoints.jobs.match import MatchOptions, named_matcher, refine_database


def measure(
    name: str, descriptor: str, folder: Path, camera: str, ratio: float, args: argparse.Namespace
) -> dict[str, Any]:
    """One system from photographs to models of every seed."""
    images = {
        str(task.relative): task.path for task in collect([folder], root=folder, inside=True).tasks
    }
    pairs = list(combinations(sorted(images), 2))
    matcher: Any
    if name == "sift":
        extract = system("sift", Options(num_keypoints=args.points))
        plain = partial(tiepoints.match, ratio=None if ratio >= 1 else ratio)
        matcher = lambda a, b, one, two: plain(one, two)  # noqa: E731
    else:
        extractor = tiepoints.build("keynet", descriptor, num_keypoints=args.points)
        extract = extractor.extract
        matcher = named_matcher(extractor, images, MatchOptions(ratio=ratio))
        if matcher is None:  # the descriptor has no upright patches
            plain = MatchOptions(ratio=ratio).matcher()
            matcher = lambda a, b, one, two: plain(one, two)  # noqa: E731
    seconds, started = {}, time.perf_counter()
    features = {image: extract(path) for image, path in images.items()}
    seconds["extract"], started = time.perf_counter() - started, time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "database.db"
        with ColmapDatabase(path, camera=camera, write=True) as database:
            for image, file in images.items():
                database.write(image, features[image], file)
            count = 0
            for a, b in pairs:
                matches = matcher(a, b, features[a], features[b])
                database.write_matches(a, b, matches)
                count += len(matches)
            seconds["match"], started = time.perf_counter() - started, time.perf_counter()
            verified = database.verify(pairs)
            # SIFT's keypoints are sub-pixel already, and the comparison is with SIFT as it is
            if name != "sift":
                verified = refine_database(database, pairs, images)
            inliers = sum(len(database.read_inliers(a, b)) for a, b in pairs)
        seconds["verify"], started = time.perf_counter() - started, time.perf_counter()
        tries = [
            {
                **asdict(reconstruct(path, folder, Path(out) / str(seed), seed=seed, threads=1)),
                "seed": seed,
            }
            for seed in range(args.seeds)
        ]
        seconds["map"] = time.perf_counter() - started
    return {
        "data": folder.name,
        "ratio": ratio,
        "system": name,
        "images": len(images),
        "points_an_image": sum(map(len, features.values())) / len(images),
        "pairs": len(pairs),
        "verified_pairs": verified,
        "matches": count,
        "inliers": inliers,
        "tries": tries,
        "seconds": seconds,
        "camera": camera,
        "machine": machine(),
    }


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
        for ratio in map(float, args.ratios.split(",")):
            descriptors = args.descriptors.split(",")
            for name, descriptor in [(f"keynet-{d}", d) for d in descriptors] + [("sift", "")]:
                row = measure(name, descriptor, Path(folder), camera or "auto", ratio, args)
                row.update(summary(row))
                rows = [other for other in rows if _key(other) != _key(row)] + [row]
                write_json(args.out, {"rows": sorted(rows, key=_key)})
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
