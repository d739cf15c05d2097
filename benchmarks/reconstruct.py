"""Reconstruction of photographs by COLMAP: our features compared with SIFT, with the same number of
keypoints, matcher, verification and mapper.

The mapper selects its initial pair at random and sometimes stops at two images with any features;
so it runs with several seeds, and the table has the median of those that registered the most
images.

    python benchmarks/reconstruct.py FOLDER[:CAMERA] ... [--descriptors hardnet,rootsift] \\
        [--points 2048] [--seeds 5] --out FILE.json

Other rows of FILE.json are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import tiepoints
from common import largest_model, machine
from tiepoints.evaluation.systems import Options, system
from tiepoints.files import collect, write_json
from tiepoints.formats.colmap import ColmapDatabase
from tiepoints.jobs.match import MatchOptions, named_matcher, refine_database
from tiepoints.structs import Features, Matches


def measure(
    name: str, descriptor: str, folder: Path, camera: str, ratio: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Reconstruct photographs with one system and several seeds."""
    images = {
        str(task.relative): task.path for task in collect([folder], root=folder, inside=True).tasks
    }
    pairs = list(combinations(sorted(images), 2))
    extract, matcher = _system(name, descriptor, images, MatchOptions(ratio=ratio), args.points)
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
            # SIFT's keypoints have subpixel positions, and SIFT is compared without changes
            if name != "sift":
                verified = refine_database(database, pairs, images)
            inliers = sum(len(database.read_inliers(a, b)) for a, b in pairs)
        seconds["verify"], started = time.perf_counter() - started, time.perf_counter()
        tries = [largest_model(path, Path(out) / "map", seed) for seed in range(args.seeds)]
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


def _system(
    name: str, descriptor: str, images: dict[str, Path], options: MatchOptions, num_keypoints: int
) -> tuple[Any, Any]:
    """Functions that extract an image and match two named images."""
    plain = options.matcher()

    def match(name_a: str, name_b: str, a: Features, b: Features) -> Matches:
        return plain(a, b)

    if name == "sift":
        return system("sift", Options(num_keypoints=num_keypoints)), match
    extractor = tiepoints.build("keynet", descriptor, num_keypoints=num_keypoints)
    return extractor.extract, named_matcher(extractor, images, options) or match


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders",
        nargs="+",
        help="folders of photographs; :single for a shared camera, see docs/formats.md",
    )
    parser.add_argument("--descriptors", default="hardnet,rootsift", help="comma-separated")
    parser.add_argument("--points", type=int, default=2048)
    parser.add_argument("--ratios", default="0.95,0.8", help="of the ratio test, comma-separated")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
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
    """Medians over the seeds that registered the most images."""
    most = max(result["registered"] for result in row["tries"])
    best = [result for result in row["tries"] if result["registered"] == most]
    medians = {
        key: statistics.median(result[key] for result in best)
        for key in ("points", "track_length", "error", "observations")
    }
    return {"registered": most, "seeds_with_most": len(best), **medians}


def table(rows: list[dict]) -> str:
    """Markdown table of the rows."""
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
