"""Peak memory and time of ``tiepoints extract`` for images of 1 to 100 megapixels and a panorama.

    python benchmarks/memory.py [--systems keynet+hardnet,...] [--sizes 1000x1000,...] [--memory 2G]

Every measurement is a new process that extracts 2,000 keypoints of one JPEG file on all default
levels; reported are the largest resident memory of the process (VmHWM, Linux) and its time. The
images are random boxes and noise, the same for all systems.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common import machine

SYSTEMS = (
    "keynet+hardnet,keynet-tiny+hynet,sobelnet+desnet,keynet+desnet,keynet+rootsift,"
    "rekd-light+hardnet"
)
SIZES = "1155x866,4000x3000,8160x6120,12000x8334,40000x500"
KEYPOINTS = 2000
#: Side of the square of boxes that is repeated to fill an image.
TEXTURE = 1024


def write_image(path: Path, width: int, height: int) -> None:
    """Write a color JPEG of boxes and noise."""
    rng = np.random.default_rng(0)
    canvas = np.full((TEXTURE, TEXTURE), 128, np.uint8)
    for _ in range(1500):
        x, y = rng.integers(0, TEXTURE, 2)
        w, h = rng.integers(5, 80, 2)
        canvas[y : y + h, x : x + w] = rng.integers(0, 256)
    # mirrored copies of different brightness have no repeated pixels
    row = np.concatenate([canvas, canvas[:, ::-1]], axis=1)
    image = Image.new("RGB", (width, height))
    for top in range(0, height, TEXTURE):
        for left in range(0, width, 2 * TEXTURE):
            tile = row.astype(np.float32) * rng.uniform(0.5, 1) + rng.normal(0, 2, row.shape)
            image.paste(
                Image.fromarray(tile.clip(0, 255).astype(np.uint8)).convert("RGB"), (left, top)
            )
    image.save(path, quality=90)


def extract(path: Path, detector: str, descriptor: str, memory: str | None) -> dict[str, float]:
    """Extract one image in this process; peak memory in MiB and time in seconds."""
    from tiepoints.extract import ExtractOptions
    from tiepoints.jobs.extract import extract_images
    from tiepoints.memory import parse_size

    limit = None if memory is None else parse_size(memory)
    options = ExtractOptions(
        detector=detector, descriptor=descriptor, num_keypoints=KEYPOINTS, memory=limit
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        report = extract_images([str(path)], Path(folder), options, progress=False)
        seconds = time.monotonic() - started
    if report.failed:
        raise SystemExit(str(report.failed))
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    return {"MiB": int(peak) / 1024, "seconds": seconds, "keypoints": report.keypoints}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", default=SYSTEMS, help="DETECTOR+DESCRIPTOR, comma-separated")
    parser.add_argument("--sizes", default=SIZES, help="WIDTHxHEIGHT, comma-separated")
    parser.add_argument("--memory", help="limit, as of tiepoints extract")
    parser.add_argument("--work", type=Path, help="folder for the images (default: temporary)")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        path, detector, descriptor = args.child
        print(json.dumps(extract(Path(path), detector, descriptor, args.memory)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for size in args.sizes.split(","):
            width, height = map(int, size.split("x"))
            path = work / f"{size}.jpg"
            if not path.is_file():
                write_image(path, width, height)
            for system in args.systems.split(","):
                command = [sys.executable, __file__, "--child", str(path), *system.split("+")]
                command += [] if args.memory is None else ["--memory", args.memory]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{system} {size}: {done.stderr[-2000:]}")
                row = {"system": system, "size": size, **json.loads(done.stdout.splitlines()[-1])}
                rows.append(row)
                print(
                    f"{system:22} {size:>12} {width * height / 1e6:6.1f} MP {row['MiB']:7.0f} MiB "
                    f"{row['seconds']:7.1f} s {row['keypoints']:5} keypoints",
                    flush=True,
                )
    if args.out is not None:
        args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
