"""Time, peak memory and storage of each stage by the number of images.

    python benchmarks/scale.py PHOTOS --work build/scale [--counts 100,300,1000,3000,10000] \\
        [--stages extract,pairs,match,database,verify] --out benchmarks/results/scale.json
    python benchmarks/scale.py --fit benchmarks/results/scale.json

The images are crops of 320 x 240 pixels of the photographs of a folder, turned by up to 10 degrees
and zoomed by up to 1.5: some 20 of each photograph if there are 10,000, so that the similar
images of most of them overlap. The system is SobelNet and DesNet at a single scale, 256 keypoints,
one process with one thread. Each stage is a process of its own, whose peak memory is that of the
operating system's records.

`--fit` prints the exponent of each measure between the two largest numbers of images, 1 if it grows
in proportion.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common import machine
from tiepoints.files import list_images, write_json
from tiepoints.formats.store import open_features, own_settings
from tiepoints.jobs.image_pairs import Candidates, choose_image_pairs

#: Size of an image, and similar images that each image is matched with.
SIZE, NEIGHBORS = (320, 240), 20
#: Images of a folder; file systems and people dislike folders of millions.
PER_FOLDER = 1000
OPTIONS = ["--detector", "sobelnet", "--descriptor", "desnet", "--single-scale"]
OPTIONS += ["--num-keypoints", "256"]
STAGES = ("extract", "pairs", "match", "database", "verify")


def write_images(photos: list[Path], folder: Path, count: int) -> None:
    """Write ``count`` crops of photographs to ``folder``, unless they exist."""
    width, height = SIZE
    per_photo = math.ceil(count / len(photos))
    for number, path in enumerate(photos):
        wanted = range(number * per_photo, min((number + 1) * per_photo, count))
        paths = {i: folder / f"{i // PER_FOLDER:03}" / f"{i:06}.jpg" for i in wanted}
        if all(target.is_file() for target in paths.values()):
            continue
        with Image.open(path) as opened:
            opened.draft("RGB", (1600, 1200))
            photo = opened.convert("RGB")
        photo.thumbnail((1280, 960))
        rng = np.random.default_rng(number)
        for target in paths.values():
            target.parent.mkdir(parents=True, exist_ok=True)
            _crop(photo, rng, width, height).save(target, quality=90)


def _crop(photo: Image.Image, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A turned and zoomed crop near the center of a photograph."""
    center = np.array(photo.size) * rng.uniform(0.35, 0.65, 2)
    angle, zoom = np.radians(rng.uniform(-10, 10)), rng.uniform(1.0, 1.5)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * zoom
    shift = center - turn @ (width / 2, height / 2)
    matrix = np.column_stack([turn, shift]).ravel()
    return photo.transform(SIZE, Image.Transform.AFFINE, tuple(matrix), Image.Resampling.BILINEAR)


def measured(command: list[str]) -> dict[str, float]:
    """Seconds, processor seconds and peak memory (MB) of a command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):  # 1: an image without keypoints, for example
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {
        "seconds": round(time.monotonic() - started, 2),
        "processor seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "memory MB": round(usage.ru_maxrss / 1024, 1),
    }


def megabytes(folder: Path) -> float:
    """Size of the files in a folder."""
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20, 2)


def choose_pairs(features: Path, output: Path) -> None:
    """Write the pairs of the most similar images."""
    with open_features(features) as store:
        weights = (own_settings(store) or {}).get("digests", {}).get("descriptor")
        names = store.names()
        choice = choose_image_pairs(Candidates(names, store, weights, {}), "retrieval", NEIGHBORS)
    output.write_text("".join(f"{a} {b}\n" for a, b in choice.pairs), encoding="utf-8")


def measure(images: Path, count: int, work: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Run the stages on the first ``count`` images."""
    folder = work / str(count)
    folder.mkdir(parents=True, exist_ok=True)
    listed = [path.relative_to(images) for path in list_images(images).images[:count]]
    (folder / "images.txt").write_text("".join(f"{path}\n" for path in listed))
    program = [sys.executable, "-m", "tiepoints", "-q"]
    sources = ["--list-images", folder / "images.txt", "--root-images", images]
    extract = [*program, "extract", *sources, *OPTIONS, "--workers", "1", "--max-size", "0"]
    match = [*program, "match", "--pairs", folder / "pairs.txt", "--no-refine"]
    features, database = folder / "h5" / "features.h5", folder / "colmap" / "database.db"
    commands: dict[str, list[Any]] = {
        "extract": [*extract, "--format", "h5", "--half", "--output", features.parent],
        "pairs": [sys.executable, __file__, "--choose", features, folder / "pairs.txt"],
        "match": [*match, "--features", features, "--output", folder / "h5" / "matches.h5"],
        "database": [*extract, "--format", "colmap", "--output", database.parent],
        "verify": [*match, "--features", database, "--output", database],
    }
    result: dict[str, Any] = {"images": count}
    for stage in stages:
        before = megabytes(folder)
        result[stage] = measured([str(part) for part in commands[stage]])
        result[stage]["storage MB"] = round(megabytes(folder) - before, 2)
        print(count, stage, result[stage], flush=True)
    if (folder / "pairs.txt").is_file():
        result["matched pairs"] = len((folder / "pairs.txt").read_text().splitlines())
    return result


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Stage -> measure -> exponent between the two largest numbers of images.

    A matched pair is the unit of the stages that match; the fixed cost of a process, that of the
    smallest number of images, is subtracted from times and memory.
    """
    first, before, last = rows[0], rows[-2], rows[-1]
    found: dict[str, dict[str, float]] = {}
    for stage in (stage for stage in STAGES if stage in last and stage in before):
        unit = "matched pairs" if stage in ("match", "verify") else "images"
        growth = math.log(last[unit] / before[unit])
        found[stage] = {}
        for name in last[stage]:
            fixed = 0.0 if name == "storage MB" else min(first[stage][name], before[stage][name])
            one, two = before[stage][name] - fixed, last[stage][name] - fixed
            if one > 0 and two > 0:
                found[stage][name] = round(math.log(two / one) / growth, 2)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="?", type=Path, help="folder of photographs")
    parser.add_argument("--work", type=Path, help="folder of images and results")
    parser.add_argument("--counts", default="100,300,1000", help="comma-separated")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fit", type=Path, help="result of which to print the exponents")
    parser.add_argument("--choose", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.choose:
        choose_pairs(*args.choose)
        return
    if args.fit:
        print(json.dumps(exponents(json.loads(args.fit.read_text())["rows"]), indent=1))
        return
    counts = [int(number) for number in args.counts.split(",")]
    photos = list_images(args.photos).images
    images = args.work / f"images-{max(counts)}"
    write_images(photos, images, max(counts))
    rows = [measure(images, count, args.work, args.stages.split(",")) for count in counts]
    if args.out:
        write_json(args.out, {"rows": rows, "machine": machine()})


if __name__ == "__main__":
    main()
