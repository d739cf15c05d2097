"""Photographs to a 3D model: extract, match, verify and map with COLMAP, and SIFT beside it if you
like.

    python examples/to_colmap.py photos/ --out model/ [--points 2048] [--camera single] \\
        [--compare-sift]

The folder ``model/NAME/`` gets ``database.db`` for any COLMAP tool, and models as COLMAP's binary
files. Needs pycolmap: pip install 'tiepoints[colmap]', and OpenCV for SIFT.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from functools import partial
from itertools import combinations
from pathlib import Path

import tiepoints
from tiepoints.evaluation.systems import Options, system
from tiepoints.files import collect
from tiepoints.formats.colmap import ColmapDatabase, reconstruct
from tiepoints.formats.hdf5 import read_pairs
from tiepoints.jobs.match import pair_matcher, refine_database


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", type=int, default=2048, help="most points an image")
    parser.add_argument("--detector", default="keynet")
    parser.add_argument("--descriptor", help="default: that of tiepoints.build")
    parser.add_argument(
        "--ratio", type=float, default=0.95, help="of nearest to second distance; 1 = off"
    )
    parser.add_argument("--pairs", type=Path, help="two names a line; default: all pairs")
    parser.add_argument(
        "--camera", default="auto", help="auto, single, or MODEL:p1,p2,... (see docs/formats.md)"
    )
    parser.add_argument(
        "--no-refine", action="store_true", help="leave keypoints where the detector found them"
    )
    parser.add_argument(
        "--compare-sift", action="store_true", help="the same with OpenCV's SIFT and RootSIFT"
    )
    parser.add_argument(
        "--tries",
        type=int,
        default=3,
        help="the mapper's first pair is luck: start again until all images fit, so often",
    )
    parser.add_argument(
        "--every-try", action="store_true", help="do not stop at the first model with all images"
    )
    parser.add_argument("--threads", type=int, default=-1, help="of the mapper; 1 repeats exactly")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    args = parser.parse_args()
    if not args.images.is_dir():
        sys.exit(f"error: {args.images} is no folder of photographs")
    tasks, refused = collect([str(args.images)], root=args.images, inside=True)
    for name, reason in refused:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    images = {str(task.relative): task.path for task in tasks}
    pairs = list(read_pairs(args.pairs)) if args.pairs else list(combinations(sorted(images), 2))
    unknown = sorted({name for pair in pairs for name in pair} - set(images))
    if unknown or not pairs:
        sys.exit(
            f"error: {args.pairs} names {unknown[0]!r}, which is not in {args.images}"
            if unknown
            else "error: no pairs of images"
        )

    words = {} if args.descriptor is None else {"descriptor": args.descriptor}
    name = "-".join(Path(word).stem for word in (args.detector, *words.values()))
    extractor = tiepoints.build(args.detector, num_keypoints=args.points, **words)
    systems = {name: extractor.extract}
    if args.compare_sift:
        systems["sift"] = system("sift", Options(num_keypoints=args.points))
    rows = []
    for name, extract in systems.items():
        rows.append(run(name, extract, extractor, images, pairs, args))
        print(line(rows[-1], len(images)))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def run(
    name: str,
    extract,
    extractor: tiepoints.Extractor,
    images: dict[str, Path],
    pairs: list[tuple[str, str]],
    args: argparse.Namespace,
) -> dict:
    """One system from photographs to a model; its numbers, and those of every try."""
    folder = args.out / name
    shutil.rmtree(folder / "models", ignore_errors=True)
    seconds, features = {}, {}
    started = time.perf_counter()
    for image, path in images.items():
        features[image] = extract(path)
    seconds["extract"], started = time.perf_counter() - started, time.perf_counter()
    with ColmapDatabase(folder / "database.db", camera=args.camera, write=True) as database:
        database.clear()
        for image, path in images.items():
            database.write(image, features[image], path)
        count = 0
        matcher = partial(tiepoints.match, ratio=None if args.ratio >= 1 else args.ratio)
        rotating = None if name == "sift" else pair_matcher(extractor, images, **matcher.keywords)
        for a, b in pairs:
            matches = (
                matcher(features[a], features[b])
                if rotating is None
                else rotating(a, b, features[a], features[b])
            )
            database.write_matches(a, b, matches)
            count += len(matches)
        seconds["match"], started = time.perf_counter() - started, time.perf_counter()
        verified = database.verify(pairs)
        # SIFT's keypoints are sub-pixel already, and the comparison is with SIFT as it is
        if not args.no_refine and name != "sift":
            verified = refine_database(database, pairs, images)
        inliers = sum(len(database.read_inliers(a, b)) for a, b in pairs)
    seconds["verify"], started = time.perf_counter() - started, time.perf_counter()
    tries = []
    for seed in range(args.tries):
        model = reconstruct(
            folder / "database.db",
            args.images,
            folder / "models" / str(seed),
            seed=seed,
            threads=args.threads,
        )
        tries.append({**dataclasses.asdict(model), "folder": str(model.folder), "seed": seed})
        if model.registered == len(images) and not args.every_try:
            break
    seconds["map"] = time.perf_counter() - started
    best = max(tries, key=lambda row: (row["registered"], row["points"]))
    return {
        "system": name,
        "images": len(images),
        "points_an_image": sum(map(len, features.values())) / len(features),
        "pairs": len(pairs),
        "verified_pairs": verified,
        "matches": count,
        "inliers": inliers,
        **best,
        "tries": tries,
        "seconds": seconds,
    }


def line(row: dict, images: int) -> str:
    """The numbers of a system for people."""
    return (
        f"{row['system']:18s} {row['registered']}/{images} images in one of {row['models']} "
        f"models, {row['points']} 3D points, "
        f"track length {row['track_length']:.2f}, reprojection error {row['error']:.2f} px "
        f"({row['points_an_image']:.0f} points an image, {row['verified_pairs']}/{row['pairs']} "
        "pairs verified, "
        f"{row['inliers']} of {row['matches']} matches; best of {len(row['tries'])} tries) -> "
        f"{row['folder']}"
    )


if __name__ == "__main__":
    main()
