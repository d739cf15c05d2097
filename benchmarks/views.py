"""Matching of views of reconstructions with known cameras: correct matches, poses, subpixel
refinement, and rotated cameras.

    python benchmarks/views.py SCENES... [--systems keynet+hardnet,...] [--pairs 24] \\
        [--rotations 0,30,60,90,180] [--num-keypoints 1000] [--upsampled-levels N] [--nms-size N]
        [--max-size N] [--affine NAME] [--per-scale | --no-per-scale] [--single-scale] \\
        [--ratio R] [--min-neighbors N] [--out FILE.json]

SCENES: folders with COLMAP models and their images (docs/training.md). A system is
DETECTOR+DESCRIPTOR, each a name or a weights file. Matches are mutual nearest neighbors that pass
a ratio test or agree with their neighbors, if given. A match is correct within 2 px of the epipolar
lines in both images. Columns:

    right %      correct matches divided by the smaller number of keypoints, without refinement
    correct      mean number of correct matches, without refinement
    precision %  fraction of correct matches, without refinement
    auto         the same with `--orientation auto`: the relative rotation and tilt of each pair
    cells        mean number of squares of 8 px of the first image with a correct match
    AUC@5        area under the recall curve of the relative pose up to 5 degrees, after refinement
    0.5, 1 px    fraction of matches within this distance of the epipolar lines, before (detected)
                 and after refinement
    time         processor time of refinement divided by that of matching (without extraction)
    N degrees    number of correct matches of the better half of the pairs with the second image
                 rotated by N degrees, without and with `--orientation auto`
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import machine
from tiepoints.auto_orientation import PairMatcher, can_reorient
from tiepoints.datasets.reconstructions import read_scenes
from tiepoints.datasets.tracks import ReconstructionPair, reconstruction_pairs
from tiepoints.estimation import relative_pose
from tiepoints.extract import Extractor, build
from tiepoints.geometry import sample_at, warp_points
from tiepoints.image import load_image
from tiepoints.matching import Matcher, filter_by_neighbors, match
from tiepoints.metrics.geometry import error_auc, pose_error
from tiepoints.refine import refine_matches
from tiepoints.report.page import Column, Row, Table
from tiepoints.structs import Features
from tiepoints.weights import load

MAX_DISTANCE = 2.0
SMALL_DISTANCES = (0.5, 1.0)
#: Side in pixels of the squares that are counted, and largest error in pixels of the relative pose.
CELL, POSE_THRESHOLD = 8, 1.0
SEED = 11


def extractor(system: str, **options: Any) -> Extractor:
    """An extractor with the defaults of ``tiepoints match``, except for ``options``."""
    detector, _, descriptor = system.partition("+")
    described_by = descriptor if descriptor == "rootsift" else load(descriptor)
    return build(load(detector), described_by, device="cpu", **options)


def rotated(image: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Rotate a gray image (1,1,H,W) clockwise about its center without cropping; returns the new
    image and H (3,3).
    """
    h, w = image.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    new_w, new_h = (math.ceil(abs(x * cos) + abs(y * sin) - 1e-6) for x, y in ((w, h), (h, w)))
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    to_new = np.array([[1, 0, (new_w - 1) / 2], [0, 1, (new_h - 1) / 2], [0, 0, 1]])
    to_origin = np.array([[1, 0, -(w - 1) / 2], [0, 1, -(h - 1) / 2], [0, 0, 1]])
    matrix = torch.from_numpy(to_new @ rotation @ to_origin)
    y, x = torch.meshgrid(torch.arange(new_h), torch.arange(new_w), indexing="ij")
    grid = torch.stack([x, y], dim=-1).reshape(-1, 2).double()
    values = sample_at(
        image, warp_points(grid, torch.linalg.inv(matrix))[None].float(), padding="zeros"
    )
    return values.view(1, 1, new_h, new_w), matrix


def count_correct(
    pair: ReconstructionPair, xy_a: Tensor, xy_b: Tensor, threshold: float = MAX_DISTANCE
) -> int:
    return int((pair.errors(xy_a.numpy(), xy_b.numpy()) <= threshold).sum()) if len(xy_a) else 0


def pose_error_of(pair: ReconstructionPair, xy_a: Tensor, xy_b: Tensor) -> float:
    """Error in degrees of the relative pose estimated from matches (K,2); 180 without one."""
    sides = []
    for camera, focal, xy in zip(pair.cameras, pair.focal, (xy_a, xy_b), strict=True):
        K = torch.diag(torch.tensor([focal, focal, 1.0], dtype=torch.float64))
        sides.append((torch.from_numpy(focal * camera(xy.double().numpy())), K))
    (a, K_a), (b, K_b) = sides
    pose = relative_pose(a, b, K_a, K_b, threshold=POSE_THRESHOLD, verify=False).model
    if pose is None:
        return 180.0
    return pose_error(pose[:, :3], pose[:, 3], torch.from_numpy(pair.T_ab))


def measure(
    extract: Extractor,
    pairs: list[ReconstructionPair],
    rotations: list[float],
    matcher: Matcher = match,
    min_neighbors: int = 0,
) -> dict[str, Any]:
    images = {
        path: load_image(path)
        for path in dict.fromkeys(path for pair in pairs for path in pair.images)
    }
    features: dict[Path, Features] = {
        path: extract.extract(image) for path, image in images.items()
    }
    rates, matches = [], 0
    counts, auto, cells, errors = [], [], [], []
    oriented = PairMatcher(extract, matcher, min_neighbors) if can_reorient(extract) else None
    within = {(kind, t): 0 for kind in ("detected", "refined") for t in SMALL_DISTANCES}
    spent = {"match": 0.0, "refine": 0.0}
    for pair in pairs:
        a, b = (features[path] for path in pair.images)
        started = time.process_time()
        found = filter_by_neighbors(a, b, matcher(a, b), min_neighbors)
        between = time.process_time()
        refined = refine_matches(a, b, found, (images[pair.images[0]], images[pair.images[1]]))
        spent["match"] += between - started
        spent["refine"] += time.process_time() - between
        xy_a, xy_b = found.positions(a, b)
        right = torch.from_numpy(pair.errors(xy_a.numpy(), xy_b.numpy()) <= MAX_DISTANCE)
        counts.append(int(right.sum()))
        if oriented is not None:
            key = str(pair.images[1])
            other = oriented(a, b, images[pair.images[1]], key)
            auto.append(count_correct(pair, *other.matches.positions(a, other.b)))
        cells.append(len((xy_a[right] / CELL).floor().unique(dim=0)))
        errors.append(pose_error_of(pair, *refined.positions(a, b)))
        rates.append(counts[-1] / max(1, min(len(a), len(b))))
        matches += len(found)
        for kind, kind_matches in (("detected", found), ("refined", refined)):
            for t in SMALL_DISTANCES:
                within[kind, t] += count_correct(pair, *kind_matches.positions(a, b), t)
    result: dict[str, Any] = {
        "right %": 100 * float(np.mean(rates)),
        "correct": float(np.mean(counts)),
        "precision %": 100 * sum(counts) / max(1, matches),
        **({"auto": float(np.mean(auto))} if auto else {}),
        "cells": float(np.mean(cells)),
        "AUC@5": 100 * error_auc(errors, [5])[0],
    }
    for (kind, t), count in within.items():
        result[f"{t:g} px, {kind} %"] = 100 * count / max(1, matches)
    result["time"] = spent["refine"] / max(spent["match"], 1e-9)
    # pairs with few matches without rotation are not informative
    best = [pairs[i] for i in np.argsort(rates)[::-1][: len(pairs) // 2]]
    for degrees in rotations:
        result.update(_rotation(extract, best, images, features, degrees, matcher, min_neighbors))
    return result


def _rotation(
    extract: Extractor,
    pairs: Iterable[ReconstructionPair],
    images: dict[Path, Tensor],
    features: dict[Path, Features],
    degrees: float,
    matcher: Matcher,
    min_neighbors: int,
) -> dict[str, float]:
    """Mean number of correct matches of pairs whose second image is rotated, without and with
    estimation of the relative rotation.
    """
    oriented = PairMatcher(extract, matcher, min_neighbors) if can_reorient(extract) else None
    plain, auto = [], []
    for pair in pairs:
        a = features[pair.images[0]]
        image, matrix = rotated(images[pair.images[1]], degrees)
        b = extract.extract(image)
        inverse = torch.linalg.inv(matrix)
        for counts, found in (
            (plain, filter_by_neighbors(a, b, matcher(a, b), min_neighbors)),
            (auto, None if oriented is None else oriented(a, b, image).matches),
        ):
            if found is not None:
                xy_a, xy_b = found.positions(a, b)
                counts.append(count_correct(pair, xy_a, warp_points(xy_b.double(), inverse)))
    name = f"{degrees:g} degrees"
    return {
        name: float(np.mean(plain)),
        **({f"{name}, auto": float(np.mean(auto))} if auto else {}),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenes", type=Path, nargs="+")
    parser.add_argument(
        "--systems", default="keynet+hardnet,keynet+desnet,sobelnet+desnet,keynet+rootsift"
    )
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rotations", default="0,30,60,90,180")
    parser.add_argument("--num-keypoints", type=int, default=1000)
    parser.add_argument("--upsampled-levels", type=int, help="enlarged levels of the pyramid")
    parser.add_argument("--nms-size", type=int, help="side of the suppression window in pixels")
    parser.add_argument("--max-size", type=int, help="longest side of the images in pixels")
    parser.add_argument("--affine", default="none", help="affine shapes, as of tiepoints extract")
    parser.add_argument("--per-scale", action=argparse.BooleanOptionalAction)
    parser.add_argument("--single-scale", action="store_true", help="without a pyramid")
    parser.add_argument("--ratio", type=float, help="ratio test of the matches (default: none)")
    parser.add_argument(
        "--min-neighbors", type=int, default=0, help="neighboring matches that must agree"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pairs = reconstruction_pairs(read_scenes(args.scenes), args.pairs, SEED)
    options = {"num_keypoints": args.num_keypoints, "up_levels": args.upsampled_levels}
    options |= {"affine": args.affine, "single_scale": args.single_scale}
    given = {"nms_window": args.nms_size, "max_size": args.max_size, "per_scale": args.per_scale}
    options |= {name: value for name, value in given.items() if value is not None}
    rotations = [float(part) for part in args.rotations.split(",") if part]
    matching = {"ratio": args.ratio, "min_neighbors": args.min_neighbors}
    matcher = partial(match, ratio=args.ratio)
    rows: dict[str, dict[str, Any]] = {}
    for name in args.systems.split(","):
        rows[name] = measure(
            extractor(name, **options), pairs, rotations, matcher, args.min_neighbors
        )
        if args.out:  # after each system, so that an interrupted run keeps its results
            content = {
                "machine": machine(),
                "options": options | matching,
                "scenes": [path.name for path in args.scenes],
                "pairs": len(pairs),
                "systems": rows,
            }
            args.out.write_text(json.dumps(content, indent=1) + "\n")
    names = list(dict.fromkeys(key for row in rows.values() for key in row))
    columns = [Column(name, "", 0 if "degrees" in name else 1) for name in names]
    print(
        Table(
            f"{len(pairs)} pairs of views",
            columns,
            [Row(n, [row.get(c) for c in names]) for n, row in rows.items()],
        ).markdown()
    )


if __name__ == "__main__":
    main()
