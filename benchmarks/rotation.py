"""Repeatability between photographs and their copies rotated by 0..345 degrees in steps of 15, and
the orientation error of keypoints.

Held-out photographs of a folder (not used in training), single scale, the strongest 1000 in the
common area, mutual nearest within 3 px. The rotated copy is shifted by half a pixel, so that
rotations by multiples of 90 degrees also interpolate (not with ``--plain``).

    python benchmarks/rotation.py PHOTOS --systems rekd,rekd-light,keynet,sift,fast \\
        --out rotation.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common import held_out_photos, machine
from tiepoints.evaluation.sweeps import ROTATIONS, sweep
from tiepoints.evaluation.systems import Options, system
from tiepoints.metrics.geometry import mean

SYSTEMS = "rekd,rekd-light,keynet,keynet-tiny,sift,fast,orb,akaze,harris"


def measure(name: str, photos: list[Path], shift: float) -> dict[str, Any]:
    """Means over the photographs for each angle, and the worst and the best of them."""
    detect = system(f"{name}+none", Options(single_scale=True))
    found: dict[float, list[dict[str, Any]]] = {float(angle): [] for angle in ROTATIONS}
    for photo in photos:
        for row in sweep(detect, photo, "rotation", ROTATIONS, shift=shift):
            found[float(row["value"])].append(row["metrics"])
    angles = {
        f"{angle:g}": {
            key: mean(row.get(key) for row in rows)
            for key in ("mutual.rep@3", "turn.median", "turn.right", "points")
        }
        for angle, rows in found.items()
    }
    rates = [metrics["mutual.rep@3"] for metrics in angles.values()]
    rows = [row for angle_rows in found.values() for row in angle_rows]
    return {
        "mean": mean(rates),
        "worst": min(rates),
        "best": max(rates),
        "turn.median": mean(row.get("turn.median") for row in rows),
        "turn.right": mean(row.get("turn.right") for row in rows),
        "points": mean(row["points"] for row in rows),
        "angles": angles,
    }


def table(systems: dict[str, Any]) -> str:
    lines = [
        "| system | mean | worst angle | best angle | median orientation error | within 15 deg | "
        "keypoints |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, found in systems.items():
        orientation = (
            "| |"
            if found["turn.median"] is None
            else f"{found['turn.median']:.1f} | {100 * found['turn.right']:.0f} |"
        )
        rates = " | ".join(f"{100 * found[key]:.1f}" for key in ("mean", "worst", "best"))
        lines.append(f"| {name} | {rates} | {orientation} {found['points']:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--photos", type=int, default=20)
    parser.add_argument(
        "--plain", action="store_true", help="rotate about the center, without shift"
    )
    parser.add_argument("--out", type=Path, help="JSON; existing systems are not measured again")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    photos = held_out_photos(args.folder)[: args.photos]
    content: dict[str, Any] = {
        "machine": machine(),
        "photos": len(photos),
        "shift": 0.0 if args.plain else 0.5,
        "systems": {},
    }
    if args.out and args.out.is_file():
        content["systems"] = json.loads(args.out.read_text())["systems"]
    for name in args.systems.split(","):
        if name not in content["systems"]:
            content["systems"][name] = measure(name, photos, content["shift"])
            if args.out:
                args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content["systems"]))


if __name__ == "__main__":
    main()
