"""Quality of networks in int8 and bfloat16 against float32: the gate for their choice by ``auto``.

Each system extracts 2048 keypoints per image with its own defaults in each precision, and
features are matched by mutual nearest neighbors. Measured are, on the Oxford sequences, mutual
repeatability at 3 px and MMA at 1 and 3 px (means over pairs), and, on photographs of one place,
verified matches (inliers of a fundamental matrix, summed over pairs). A system passes if none is
lower than 99.5 % of float32's. These images are used for nothing else: calibrations are chosen on
held-out training photographs (``tiepoints quantize``).

    python benchmarks/quantized.py --data DATA [--systems keynet+hardnet,sobelnet+desnet] \\
        [--precisions int8,bfloat16] [--sequences graf,boat,bikes,leuven] [--photos 10] \\
        --out FILE.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from common import homography, machine
from tiepoints.estimation import estimate
from tiepoints.evaluation.pair import accuracy_metrics, homography_metrics
from tiepoints.extract import Extractor, build
from tiepoints.files import list_images, write_json
from tiepoints.matching import match
from tiepoints.metrics.geometry import mean
from tiepoints.structs import Features

NUM_KEYPOINTS = 2048
SYSTEMS = "keynet+hardnet-light,keynet+hardnet,keynet+desnet,sobelnet+desnet"
PRECISIONS = "int8,bfloat16"
#: Smallest ratio of a measure to float32's.
GATE = 0.995
MEASURES = ("repeatability@3", "mma@1", "mma@3", "inliers")
#: Number of estimates of which the mean number of inliers is taken.
SEEDS = 8
#: Longest side in pixels of the photographs of one place.
MAX_SIZE = 1024


def oxford(extractor: Extractor, folder: Path, sequences: Sequence[str]) -> dict[str, Any]:
    """Means over pairs of an image with the first of its sequence."""
    rows: list[dict[str, Any]] = []
    for sequence in sequences:
        first = extractor.extract(folder / sequence / "1.png")
        numbers = sorted(int(path.stem) for path in (folder / sequence).glob("[2-9].png"))
        for k in numbers:
            other = extractor.extract(folder / sequence / f"{k}.png")
            H = homography(folder, sequence, k)
            found = homography_metrics(
                first, other, H, num_keypoints=NUM_KEYPOINTS, protocols=("mutual",)
            )
            matched = accuracy_metrics(*match(first, other).positions(first, other), H)
            rows.append({"repeatability@3": found["mutual.rep@3"], **matched})
    return {key: mean(row[key] for row in rows) for key in MEASURES[:3]}


def inliers(extractor: Extractor, photos: list[Path]) -> float:
    """Verified matches of all pairs of photographs, mean over ``SEEDS`` estimates: a single one
    varies by 1 %.
    """
    features: list[Features] = [extractor.extract(photo) for photo in photos]
    total = 0
    for a, b in combinations(features, 2):
        xy_a, xy_b = match(a, b).positions(a, b)
        for seed in range(SEEDS):
            found = estimate(xy_a, xy_b, "fundamental", seed=seed)
            total += int(found.inliers.sum()) if found.ok else 0
    return total / SEEDS


def measure(
    name: str, data: Path, sequences: Sequence[str], photos: int, **options: Any
) -> dict[str, Any]:
    """All measures of a system, and the seconds they took."""
    detector, descriptor = name.split("+")
    extractor = build(
        detector, descriptor, num_keypoints=NUM_KEYPOINTS, max_size=MAX_SIZE, **options
    )
    started = time.perf_counter()
    found = oxford(extractor, data / "oxford", sequences)
    if photos:
        chosen = list_images(data / "sacre_coeur").images[:photos]
        found["inliers"] = inliers(extractor, chosen)
    return {**found, "seconds": time.perf_counter() - started}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with oxford, sacre_coeur")
    parser.add_argument("--systems", default=SYSTEMS, help="comma-separated DETECTOR+DESCRIPTOR")
    parser.add_argument("--sequences", default="graf,boat,bikes,leuven")
    parser.add_argument("--photos", type=int, default=10, help="photographs of one place; 0: none")
    parser.add_argument("--precisions", default=PRECISIONS, help="compared with float32")
    parser.add_argument("--backend", default="auto", help="backend of the precisions")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; other systems are kept")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    content: dict[str, Any] = {"systems": {}}
    if args.out.is_file():
        content = json.loads(args.out.read_text())
    content |= {"machine": machine(), "gate": GATE, "num_keypoints": NUM_KEYPOINTS}
    for name in args.systems.split(","):
        where = (args.data, args.sequences.split(","), args.photos)
        exact = measure(name, *where, backend="torch", precision="float32")
        entry: dict[str, Any] = {"sequences": where[1], "photos": args.photos, "float32": exact}
        content["systems"][name] = entry
        for precision in args.precisions.split(","):
            quick = measure(name, *where, backend=args.backend, precision=precision)
            ratios = {key: quick[key] / exact[key] for key in MEASURES if key in exact}
            passed = min(ratios.values()) >= GATE and len(ratios) == len(MEASURES)
            entry[precision] = {**quick, "ratios": ratios, "passed": passed}
            write_json(args.out, content)
            shown = ", ".join(f"{key} {ratio:.4f}" for key, ratio in ratios.items())
            verdict = "passed" if passed else "not passed"
            print(f"{name}, {precision}: {verdict}: {shown}", flush=True)


if __name__ == "__main__":
    main()
