"""Validation scores of descriptors and affine shapes, as in their trainings.

    python benchmarks/validation.py SCENES... --networks hardnet,FILE,desnet,affnet
    python benchmarks/validation.py SCENES... --networks affnet --tilts 2,4,6

SCENES: held-out reconstructions (docs/training.md) with their images in SCENE/images. The score of
a descriptor is that of `tiepoints train`: the mean of the share of repeated keypoints of warped
views that are matched correctly, and of the share of keypoints of real pairs. Of AffNet it is the
same with HardNet light, on obliquely seen views; that without shapes is logged. With --tilts: the
first share alone, with HardNet, for largest tilts of the views of preset `tilted`, and of preset
`patches-upright`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from tiepoints.datasets.synthetic import PRESETS, find_photos
from tiepoints.detect import PUBLISHED, DetectOptions, ScoreMapDetector
from tiepoints.models.affnet import AffNet
from tiepoints.models.desnet import DesNet
from tiepoints.models.spec import fused
from tiepoints.pyramid import build_pyramid
from tiepoints.training.recipes import TrainData
from tiepoints.training.recipes.affine import PATCHES, shape_validation, shaped
from tiepoints.training.recipes.descriptors import dense_validation, patch_validation
from tiepoints.training.validation import matching_checks, matching_score
from tiepoints.weights import load

#: Of --tilts: number of pairs of views, their side in pixels, keypoints per view, and seed.
PAIRS, SIZE, KEYPOINTS, SEED = 12, 400, 400, 23


def photographs(scenes: list[Path]) -> list[Path]:
    """The images of all scenes."""
    return find_photos([scene / "images" for scene in scenes], log=False)


def scores(scenes: list[Path], networks: Sequence[str]) -> dict[str, float]:
    """Validation score of each network."""
    photos = photographs(scenes)
    data = TrainData(images=scenes, validation_reconstructions=scenes)
    found: dict[str, float] = {}
    for name in networks:
        net = load(name)
        if isinstance(net, AffNet):
            descriptor = fused(load("hardnet-light")).requires_grad_(False)
            validate = shape_validation(data, photos, descriptor)
        elif isinstance(net, DesNet):
            views = PRESETS["dense-upright"]
            validate = dense_validation(data, photos, views, load("sobelnet"), net.dim)
        else:
            views = PRESETS["patches-upright"]
            validate = patch_validation(data, photos, views, net.spec.reach)
        with torch.inference_mode():
            found[name] = validate(net)
    return found


def by_tilt(
    scenes: list[Path], networks: Sequence[str], tilts: Sequence[float]
) -> dict[str, float]:
    """Share of the repeated keypoints that HardNet matches correctly, for each kind of views, with
    square patches and with the shapes of each network.
    """
    photos = photographs(scenes)
    detector = ScoreMapDetector(
        fused(load("keynet")), DetectOptions(num_keypoints=KEYPOINTS, **PUBLISHED)
    )
    descriptor = fused(load("hardnet"))
    kinds = {f"tilts to {t:g}": dataclasses.replace(PRESETS["tilted"], tilt=t) for t in tilts}
    found: dict[str, float] = {}
    for kind, views in {**kinds, "patches-upright": PRESETS["patches-upright"]}.items():
        checks = matching_checks(
            photos,
            lambda image: detector(build_pyramid(image))[0],
            views=dataclasses.replace(views, size=SIZE),
            seed=SEED,
            count=PAIRS,
            patch_size=PATCHES.size,
            half_side=PATCHES.half_side,
        )
        for name in ("squares", *networks):
            net = None if name == "squares" else fused(load(name))
            found[f"{kind}, {name}"] = matching_score(shaped(net, descriptor), checks)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenes", nargs="+", type=Path)
    parser.add_argument("--networks", required=True, help="comma-separated names or weights files")
    parser.add_argument("--tilts", help="comma-separated, with AffNet")
    args = parser.parse_args(argv)
    # the score without shapes is logged
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = args.networks.split(",")
    tilts = [float(tilt) for tilt in (args.tilts or "").split(",") if tilt]
    found = by_tilt(args.scenes, names, tilts) if tilts else scores(args.scenes, names)
    for name, score in found.items():
        print(f"{name}: {score:.3f}", flush=True)


if __name__ == "__main__":
    main()
