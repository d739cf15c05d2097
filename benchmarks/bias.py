"""Mirror bias: median displacement between keypoints of an image and of its mirrored copy.

An unbiased detector finds mirrored keypoints in the mirrored image. For each pyramid level, the
strongest 500 keypoints of both are paired (mutual nearest within 6 px of the level) and the median
displacement is printed in pixels of the level; the bias of the detector is half of it.

    python benchmarks/bias.py FOLDER [--systems keynet,keynet-tiny,FILE] [--out bias.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import load_network, sequence_images
from tiepoints.image import load_image
from tiepoints.metrics.bias import mirror_offsets
from tiepoints.pyramid import build_pyramid


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--systems", default="keynet,keynet-tiny")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows = []
    for system in args.systems.split(","):
        net, threshold = load_network(system)
        levels: dict[int, dict[int, list[Tensor]]] = {}
        for path in sequence_images(args.folder):
            for i, level in enumerate(build_pyramid(load_image(path)).levels):
                for flip in (-1, -2):
                    found = mirror_offsets(
                        net, level.image, flip, offset=net.offset, threshold=threshold
                    )
                    levels.setdefault(i, {-1: [], -2: []})[flip].append(found)
        for i, offsets in levels.items():
            x, y = (torch.cat(offsets[flip]) for flip in (-1, -2))
            rows.append(
                {
                    "system": Path(system).name,
                    "level": i - 1,
                    "x": x.median().item(),
                    "y": y.median().item(),
                    "pairs": len(x),
                }
            )
            print(
                f"{Path(system).name:20s} level {i - 1:2d}  x {rows[-1]['x']:+.3f}  y "
                f"{rows[-1]['y']:+.3f} px  ({len(x)} pairs)"
            )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
