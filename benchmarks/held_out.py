"""Detectors and descriptors on warped pairs of held-out photographs; used to select losses and
weights (docs/weights.md).

Detectors: mutual repeatability of the strongest keypoints at 1 and 3 px on 94 pairs of preset
``default`` (320 px, not mirrored, with another seed than validation). Descriptors: fraction of
repeated SobelNet keypoints with a correct mutual nearest neighbor on 24 pairs of preset ``dense``
(320 px), with any rotation and with rotations up to 45 degrees.

    python benchmarks/held_out.py PHOTOS [--detectors sobelnet,MSIP.safetensors] \\
        [--descriptors desnet,hardnet,rootsift]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from common import held_out_photos, load_network
from tiepoints.datasets.candidates import CandidatePairs
from tiepoints.datasets.patch_pairs import peak_detector
from tiepoints.datasets.synthetic import PRESETS, PairDataset
from tiepoints.extract import build_descriptor
from tiepoints.keypoints import detect_peaks
from tiepoints.metrics.repeatability import mutual_matches
from tiepoints.pyramid import build_pyramid
from tiepoints.structs import Keypoints
from tiepoints.training.validation import correctly_matched, mean_of_known

SIZE = 320
DETECTOR_PAIRS, DETECTOR_SEED = 94, 11
DESCRIPTOR_PAIRS, DESCRIPTOR_SEED = 24, 7


def detector_results(system: str, pairs: list[dict[str, Tensor]]) -> str:
    """Repeatability of the strongest 150 and 75 keypoints."""
    net, threshold = load_network(system)
    offset = torch.tensor(getattr(net, "offset", (0.0, 0.0)))
    found = dict.fromkeys([(150, 1.0), (150, 3.0), (75, 1.0), (75, 3.0)], 0.0)
    with torch.inference_mode():
        for pair in pairs:
            (a, _), (b, _) = detect_peaks(
                net(torch.stack([pair["image_a"], pair["image_b"]])), 1000, threshold=threshold
            )
            for count, distance in found:
                options = {"num_keypoints": count, "threshold": distance}
                matches = mutual_matches(
                    a - offset, b - offset, pair["H_ab"], (SIZE, SIZE), (SIZE, SIZE), **options
                )[0]
                found[count, distance] += matches / count / len(pairs)
    return "  ".join(
        f"{count} keypoints {distance:g} px {repeatability:.3f}"
        for (count, distance), repeatability in found.items()
    )


def descriptor_score(system: str, items: list[dict[str, Tensor]]) -> float:
    """Mean fraction of repeated keypoints with a correct match."""
    describe = build_descriptor(system, precision="float32")
    assert describe is not None
    scores = []
    for item in items:
        sides = []
        for side in ("a", "b"):
            xy = item[f"xy_{side}"]
            xy = xy[~xy[:, 0].isnan()]
            ones = torch.ones(len(xy))
            keypoints = Keypoints(xy, ones, 0 * ones, ones)
            pyramid = build_pyramid(item[f"image_{side}"][None], up=0, down=0)
            sides.append((describe(pyramid, keypoints, 0), xy))
        (a, xy_a), (b, xy_b) = sides
        scores.append(correctly_matched(a, b, xy_a, xy_b, item["H_ab"]))
    return mean_of_known(scores)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--detectors", default="sobelnet,keynet,keynet-tiny")
    parser.add_argument("--descriptors", default="desnet,hardnet,rootsift")
    args = parser.parse_args(argv)
    held_out = held_out_photos(args.photos)
    if args.detectors:
        views = PairDataset(
            held_out,
            replace(PRESETS["default"], size=SIZE, mirror=0.0),
            seed=DETECTOR_SEED,
            length=DETECTOR_PAIRS,
        )
        pairs = [views[i] for i in range(DETECTOR_PAIRS)]
        for system in args.detectors.split(","):
            print(f"{Path(system).name:20}", detector_results(system, pairs), flush=True)
    if args.descriptors:
        find = peak_detector(load_network("sobelnet")[0])
        for rotation in (180, 45):
            views = replace(PRESETS["dense"], size=SIZE, rotation=rotation)
            candidates = CandidatePairs(
                held_out, find, views, seed=DESCRIPTOR_SEED, length=DESCRIPTOR_PAIRS, count=200
            )
            items = [
                {**candidates[i], "H_ab": candidates.homography(i)} for i in range(DESCRIPTOR_PAIRS)
            ]
            for system in args.descriptors.split(","):
                print(
                    f"{Path(system).name:20} rotations up to {rotation:3} degrees: "
                    f"{descriptor_score(system, items):.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
