"""Equivariance error of three untrained layers with 36 orientations, for several sets of rings
(docs/models.md).

The error is that of tests/test_equivariant.py: the maximum over rotations by one to four steps, of
the response, on images of waves with a minimum wavelength.

    python benchmarks/rings.py [--out rings.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from common import machine
from tiepoints.models.equivariant import SMOOTH_RINGS, Ring, published_rings

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from test_equivariant import error_of, layers

GROUP = 36
WAVES = (4.0, 7.0, 10.0)  # px
RINGS = {
    "published (0 px sharp; 1, sigma 0.6; 2, sigma 0.4)": published_rings(5),
    "outer ring as wide as the inner one (0.6)": (*published_rings(5)[:2], Ring(2.0, 0.6, 2)),
    "outer ring at 1.8 px, sigma 0.4": (*published_rings(5)[:2], Ring(1.8, 0.4, 2)),
    "ours": SMOOTH_RINGS,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {
        name: {
            f"{wave:g} px": max(
                error_of(layers(GROUP, rings), GROUP, step, wave) for step in range(1, 5)
            )
            for wave in WAVES
        }
        for name, rings in RINGS.items()
    }
    for name, errors in found.items():
        print(
            f"{name:52}",
            "  ".join(f"{wave} {100 * error:5.1f} %" for wave, error in errors.items()),
        )
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "errors": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
