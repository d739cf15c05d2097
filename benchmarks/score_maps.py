"""Draw an image and the score maps of several networks side by side, with a gamma of 0.4 to show
low scores.

    python benchmarks/score_maps.py sobelnet MSIP.safetensors --out docs/gaussian_loss.png \\
        [--image FILE] [--crop X Y SIDE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import load_network
from tiepoints.image import load_image

GAMMA = 0.4
BRIGHT = 0.998  # quantile of the scores that is drawn white


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="+", help="names or weights files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image", type=Path, help="default: scikit-image's motorcycle")
    parser.add_argument(
        "--crop", type=int, nargs=3, default=(160, 60, 280), metavar=("X", "Y", "SIDE")
    )
    args = parser.parse_args(argv)
    if args.image is None:
        import skimage.data

        image = load_image(skimage.data.stereo_motorcycle()[0])
    else:
        image = load_image(args.image)
    x, y, side = args.crop
    tiles = [image[0, 0, y : y + side, x : x + side].numpy()]
    for system in args.systems:
        with torch.inference_mode():
            score = load_network(system)[0](image)[0, 0, y : y + side, x : x + side]
        tiles.append(((score / score.quantile(BRIGHT)).clamp(0, 1) ** GAMMA).numpy())
    canvas = (
        (np.concatenate([np.pad(tile, 2, constant_values=1) for tile in tiles], axis=1) * 255)
        .round()
        .astype(np.uint8)
    )
    Image.fromarray(canvas).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
