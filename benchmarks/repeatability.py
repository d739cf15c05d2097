"""Repeatability on homography sequences: mutual nearest within 3 px, one to one, single scale, top
1000 of the common area.

15 x 15 non-maximum suppression, 15 px border, pairs 1-2, 1-3, 1-4 of each sequence, distances in
image k (``in_k``) and in image 1 (``in_1``). The mean number of keypoints compared (the smaller one
in the common area) is reported too, as fewer keypoints have a higher repeatability.

    python benchmarks/repeatability.py FOLDER [--systems keynet,keynet-tiny,sift,fast,FILE] \\
        [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import SEQUENCES, homography, load_network, machine
from tiepoints.image import load_image
from tiepoints.keypoints import detect_peaks
from tiepoints.metrics.repeatability import mutual_matches, mutual_repeatability

CANDIDATES = 5000
PAIRS = (2, 3, 4)


def opencv_map(name: str, image: Tensor) -> Tensor:
    """Responses of an OpenCV detector as a score map, for the same suppression in all systems."""
    import cv2

    gray = (image[0, 0].numpy() * 255).round().astype(np.uint8)
    if name == "shi-tomasi":
        return torch.from_numpy(cv2.cornerMinEigenVal(gray, 3))[None, None]
    if name == "harris":
        return torch.from_numpy(cv2.cornerHarris(gray, 2, 3, 0.04)).clamp(min=0)[None, None]
    detectors = {
        "sift": cv2.SIFT_create,
        "orb": lambda: cv2.ORB_create(5000),
        "fast": lambda: cv2.FastFeatureDetector_create(5),
    }
    score_map = torch.zeros_like(image)
    for point in detectors[name]().detect(gray):
        x, y = round(point.pt[0]), round(point.pt[1])
        score_map[0, 0, y, x] = max(float(score_map[0, 0, y, x]), point.response)
    return score_map


def detector(system: str):
    """A function image (1,1,H,W) -> positions (N,2), strongest first."""
    if system in ("sift", "orb", "fast", "harris", "shi-tomasi"):
        return lambda image: detect_peaks(opencv_map(system, image), CANDIDATES, subpixel=False)[0][
            0
        ]
    net, threshold = load_network(system)

    @torch.inference_mode()
    def detect(image: Tensor) -> Tensor:
        xy = detect_peaks(net(image), CANDIDATES, threshold=threshold)[0][0]
        return xy - xy.new_tensor(getattr(net, "offset", (0.0, 0.0)))

    return detect


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--systems", default="keynet,keynet-tiny,sobelnet,sift,orb,harris,fast,shi-tomasi"
    )
    parser.add_argument("--threshold", type=float, default=3.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows = []
    for system in args.systems.split(","):
        detect = detector(system)
        row: dict = {"system": Path(system).name}
        for sequence in SEQUENCES:
            images = {k: load_image(args.folder / sequence / f"{k}.png") for k in (1, *PAIRS)}
            points = {k: detect(image) for k, image in images.items()}
            sizes = {k: tuple(image.shape[-2:]) for k, image in images.items()}
            in_k, in_1, counts = [], [], []
            for k in PAIRS:
                H = homography(args.folder, sequence, k)
                options = {"threshold": args.threshold}
                in_k.append(
                    mutual_repeatability(points[1], points[k], H, sizes[1], sizes[k], **options)
                )
                inverse = torch.linalg.inv(H)
                in_1.append(
                    mutual_repeatability(
                        points[k], points[1], inverse, sizes[k], sizes[1], **options
                    )
                )
                _, *found = mutual_matches(points[1], points[k], H, sizes[1], sizes[k], **options)
                counts.append(min(found))
            row[sequence] = {
                "in_k": float(np.mean(in_k)),
                "in_1": float(np.mean(in_1)),
                "points": float(np.mean(counts)),
            }
        for column in ("in_k", "in_1"):
            row[column] = float(np.mean([row[s][column] for s in SEQUENCES]))
        rows.append(row)
        parts = "  ".join(f"{s} {row[s]['in_k']:.3f} ({row[s]['points']:.0f})" for s in SEQUENCES)
        print(
            f"{row['system']:20s} {parts}  mean {row['in_k']:.3f}  (in image 1: {row['in_1']:.3f})",
            flush=True,
        )
    if args.out:
        args.out.write_text(
            json.dumps({"machine": machine(), "threshold": args.threshold, "rows": rows}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
