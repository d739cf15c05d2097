"""Localization of keypoints on image structure: anchoring on photographs, layers and drawn corners
(docs/evaluation.md describes the metrics).

    python benchmarks/structure.py PHOTOS [--systems keynet,keynet-tiny,...] [--count 10] \\
        [--out FILE.json] [--table FILE.md]

PHOTOS: a folder; COUNT photographs are sampled evenly from its sorted list. Single scale. A system
is a name of `tiepoints evaluate` or a weights file (of this package or official).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from common import machine
from tiepoints.datasets.synthetic import list_photos
from tiepoints.evaluation.systems import Options, as_features, system
from tiepoints.image import load_image
from tiepoints.metrics.anchoring import ANCHORED_KEYPOINTS, anchoring, corners, layers
from tiepoints.report.page import Column, Row, Table

SYSTEMS = "keynet,keynet-tiny,sobelnet,rekd-light,sift,akaze,orb,harris,shi-tomasi"
#: Number of keypoints in the image of drawn corners and in the images with layers.
POINTS = 500


def measure(name: str, photos: list[Path]) -> dict[str, float]:
    extract = system(name, Options(num_keypoints=POINTS, single_scale=True))

    def detect(image: torch.Tensor) -> torch.Tensor:
        return as_features(extract(image), (image.shape[-1], image.shape[-2])).xy

    images = [load_image(path) for path in photos]
    anchored = anchoring(detect, images, num_keypoints=ANCHORED_KEYPOINTS)
    wrong_layer = near_edge = 0
    for background, foreground in zip(images, images[1:] + images[:1], strict=True):
        size = background.shape[-2:]
        layered = layers(
            detect,
            background,
            F.interpolate(foreground, size=size, mode="bilinear", align_corners=False),
        )
        wrong_layer, near_edge = wrong_layer + layered.wrong, near_edge + layered.found
    drawn = corners(detect)
    return {
        "median percentile": 100 * anchored.median,
        "below half %": 100 * anchored.below_half,
        "keypoints": anchored.count,
        "with the wrong layer": wrong_layer,
        "near the rim": near_edge,
        "corners within 1 px": drawn.found,
        "within 3 px": drawn.near,
        "error px": drawn.error,
        "of": drawn.total,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args(argv)
    photos = list_photos(args.photos)
    photos = photos[:: max(1, len(photos) // args.count)][: args.count]
    rows = {name: measure(name, photos) for name in args.systems.split(",")}
    names = list(next(iter(rows.values())))
    digits = {"median percentile": 1, "below half %": 1, "error px": 2}
    columns = [Column(name, "", digits.get(name, 0)) for name in names]
    table = Table(
        "Keypoints on structure",
        columns,
        [Row(name, list(found.values())) for name, found in rows.items()],
    )
    if args.out:
        args.out.write_text(
            json.dumps(
                {"machine": machine(), "photos": [p.name for p in photos], "systems": rows},
                indent=1,
            )
            + "\n"
        )
    if args.table:
        args.table.write_text(table.markdown() + "\n")
    print(table.markdown())


if __name__ == "__main__":
    main()
