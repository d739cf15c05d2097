"""Table 4 and section 6.4 of the Key.Net paper: learnable parameters of detectors, and the time of
their network for an image of 600 x 600 pixels.

    python benchmarks/complexity.py [SYSTEM ...] [--device cuda] [--out complexity.json]

SYSTEM is a name of ours or a weights file (ours or an official checkpoint).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from common import machine
from tiepoints.evaluation.complexity import TIMED_SIDE, num_parameters, seconds_per_image
from tiepoints.report import published


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="*", default=["keynet-tiny", "keynet"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=TIMED_SIDE)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = {}
    for name in args.systems:
        seconds = seconds_per_image(name, side=args.side, repeat=args.repeat, device=args.device)
        found[Path(name).name] = {
            "parameters": num_parameters(name),
            "milliseconds": round(1000 * seconds, 2),
        }
    print(f"{'detector':24s} {'parameters':>10s}  ms for {args.side} x {args.side}")
    for name, entry in found.items():
        print(f"{name:24s} {entry['parameters']:10,}  {entry['milliseconds']:.1f}")
    for name, count in published.TABLE_4.items():
        time = published.SECONDS_600.get(name)
        shown = "" if time is None else f"{1000 * time:.1f} (GTX 1080 Ti)"
        print(f"{name + ', paper':24s} {count:10,}  {shown}")
    if args.out:
        content = {"machine": machine(), "side": args.side, "threads": args.threads}
        args.out.write_text(json.dumps({**content, "detectors": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
