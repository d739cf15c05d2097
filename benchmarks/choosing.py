"""Systems on held-out photographs with four synthetic changes; used to select settings without the
Oxford images.

The photographs are those that training on the same folder uses only for validation
(``split_photos``). Each is zoomed out and rotated (``zoom``), warped by an oblique view (``view``),
blurred (``blur``) and darkened (``light``), with noise. One line per change and their mean:
repeatability SL and L, mutual repeatability at 1 and 3 px, chance-corrected values, MMA@3 and
matching score@3 of systems with descriptors, number of keypoints compared (docs/evaluation.md;
ratios in %).

    python benchmarks/choosing.py PHOTOS [--systems keynet,keynet@all,LABEL=FILE] [--photos 12] \\
        [--num-keypoints 300] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import held_out_photos, machine
from tiepoints.evaluation.pair import homography_metrics
from tiepoints.evaluation.systems import SPARE, Options, system
from tiepoints.filters import gaussian_blur
from tiepoints.geometry import warp_image
from tiepoints.image import load_image
from tiepoints.metrics.geometry import mean

SYSTEMS = "keynet,keynet@all,akaze,kaze,random,lattice"
NOISE = 0.008
#: Heading, metric, factor.
COLUMNS = (
    ("SL", "keynet.rep_SL", 100),
    ("L", "keynet.rep_L", 100),
    ("1 px", "mutual.rep@1", 100),
    ("3 px", "mutual.rep@3", 100),
    ("SL-chance", "chance.rep_SL", 100),
    ("3px-chance", "chance.rep@3", 100),
    ("MMA@3", "keynet.mma@3", 100),
    ("score@3", "keynet.score@3", 100),
    ("points", "mutual.points_a", 1),
)
Change = tuple[Tensor, np.ndarray]


def _warped(image: Tensor, M: np.ndarray) -> Change:
    """Warp an image by ``M`` about its center, with a low-pass filter for minification; returns the
    new image and H.
    """
    h, w = image.shape[-2:]
    to_center = np.array([[1, 0, -(w - 1) / 2], [0, 1, -(h - 1) / 2], [0, 0, 1]])
    H = np.linalg.inv(to_center) @ M @ to_center
    factor = math.sqrt(abs(np.linalg.det(H[:2, :2])))
    low_passed = gaussian_blur(image, 0.5 * math.sqrt(max(0.0, 1 / factor**2 - 1)))
    return warp_image(low_passed, torch.from_numpy(H)[None], (h, w)), H


def zoom(image: Tensor, rng: np.random.Generator) -> Change:
    factor = math.exp(rng.uniform(math.log(0.36), math.log(0.9)))
    angle = rng.uniform(0, math.pi / 3)
    c, s = factor * math.cos(angle), factor * math.sin(angle)
    return _warped(image, np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]))


def view(image: Tensor, rng: np.random.Generator) -> Change:
    squeeze, skew = rng.uniform(0.25, 0.8), rng.uniform(-0.35, 0.35)
    second = [rng.uniform(-0.2, 0.2), rng.uniform(0.85, 1.1), 0]
    return _warped(
        image, np.array([[squeeze, skew, 0], second, [*(6e-4 * rng.uniform(-1, 1, 2)), 1]])
    )


def blur(image: Tensor, rng: np.random.Generator) -> Change:
    return gaussian_blur(image, rng.uniform(0.8, 3.0)), np.eye(3)


def light(image: Tensor, rng: np.random.Generator) -> Change:
    return (image * rng.uniform(0.25, 0.8)) ** rng.uniform(0.8, 1.3), np.eye(3)


KINDS: dict[str, Callable[[Tensor, np.random.Generator], Change]] = {
    "zoom": zoom,
    "view": view,
    "blur": blur,
    "light": light,
}


def changed(photos: list[Path], seed: int) -> Iterator[tuple[Tensor, dict[str, Change]]]:
    """Each photograph (1,1,H,W) with its changed copies, quantized to 8 bits, and H, by kind;
    reproducible for a seed.
    """
    rng = np.random.default_rng(seed)
    for path in photos:
        image = load_image(path)
        copies = {}
        for kind, change in KINDS.items():
            copy, H = change(image, rng)
            noise = torch.from_numpy(rng.normal(0, NOISE, tuple(image.shape)).astype(np.float32))
            copies[kind] = (((copy + noise).clamp(0, 1) * 255).round() / 255, H)
        yield image, copies


def measure(
    name: str, photos: list[Path], *, num_keypoints: int, seed: int, single_scale: bool
) -> dict[str, dict[str, float | None]]:
    """Kind, or ``mean`` over kinds -> metric -> mean over photographs."""
    detect = system(name, Options(num_keypoints * SPARE, single_scale))
    rows: dict[str, list[dict[str, float | None]]] = {kind: [] for kind in KINDS}
    for image, copies in changed(photos, seed):
        a = detect(image)
        for kind, (copy, H) in copies.items():
            found = homography_metrics(
                a,
                detect(copy),
                torch.from_numpy(H),
                num_keypoints=num_keypoints,
                protocols=("keynet", "mutual"),
            )
            rows[kind].append(found)
    keys = [key for _, key, _ in COLUMNS]
    kinds = {
        kind: {key: mean(row.get(key) for row in found) for key in keys}
        for kind, found in rows.items()
    }
    return {**kinds, "mean": {key: mean(found[key] for found in kinds.values()) for key in keys}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="PHOTOS",
        help="the whole folder that the networks were trained on",
    )
    parser.add_argument(
        "--systems", default=SYSTEMS, help="names of docs/evaluation.md, or LABEL=NAME"
    )
    parser.add_argument("--photos", type=int, default=12)
    parser.add_argument("--num-keypoints", type=int, default=300)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--single-scale", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    photos = held_out_photos(args.folder)[: args.photos]
    settings = {
        "photos": len(photos),
        **{key: getattr(args, key) for key in ("num_keypoints", "seed", "single_scale")},
    }
    content: dict[str, Any] = {"machine": machine(), "settings": settings, "systems": {}}
    print(f"{'system':24} {'':6}" + "".join(f"{heading:>11}" for heading, _, _ in COLUMNS))
    for entry in args.systems.split(","):
        label, _, name = entry.rpartition("=")
        label = label or Path(name).name
        found = measure(
            name,
            photos,
            num_keypoints=args.num_keypoints,
            seed=args.seed,
            single_scale=args.single_scale,
        )
        content["systems"][label] = found
        for kind, metrics in found.items():
            cells = [(metrics[key], factor) for _, key, factor in COLUMNS]
            print(
                f"{label:24} {kind:6}"
                + "".join(
                    f"{'-' if v is None else f'{v * factor:.1f}':>11}" for v, factor in cells
                ),
                flush=True,
            )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
