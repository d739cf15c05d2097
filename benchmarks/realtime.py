"""SobelNet + DesNet from gray tensor to points and descriptors, on one thread: 640 x 480, top 1000, one scale, float32.

Beside OpenCV's SIFT and ORB (detectAndCompute, 1000 points, one thread), and the network of XFeat as kornia has it (random weights
serve for timing; no points are taken from its maps). All take turns in one run; the quickest and the median round are told, and the
most memory that each had beyond the start, in a process of its own.

    python benchmarks/realtime.py [--image FILE] [--rounds 15] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import machine, vga_image
from tiepoints.extract import build
from tiepoints.keypoints import detect_peaks
from tiepoints.pyramid import build_pyramid
from tiepoints.weights import load

POINTS = 1000


def jobs(image: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed: whole systems, and the stages of ours."""
    import cv2

    cv2.setNumThreads(1)
    gray = (image[0, 0].numpy() * 255).round().astype("uint8")
    sift, orb = cv2.SIFT_create(POINTS), cv2.ORB_create(POINTS)
    ours = build("sobelnet", "desnet", single_scale=True, num_points=POINTS, device="cpu", precision="float32")
    detector: Any = load("sobelnet")
    sobel, dense = detector.fused(), ours.describe.net  # type: ignore[union-attr]
    score, pyramid = sobel(image), build_pyramid(image, up=0, down=0)
    points = detect_peaks(score, POINTS)[0][0]
    made = ours.detect(pyramid)[0]
    found: dict[str, Callable[[], Any]] = {
        "SobelNet + DesNet": lambda: ours.extract(image),
        "  SobelNet": lambda: sobel(image),
        "  points from the score map": lambda: detect_peaks(score, POINTS),
        "  DesNet": lambda: dense(image),
        "  DesNet, sampled and normalised": lambda: ours.describe(pyramid, made, 0),  # type: ignore[misc]
        "SIFT": lambda: sift.detectAndCompute(gray, None),
        "ORB": lambda: orb.detectAndCompute(gray, None),
    }
    print(f"{len(points)} points")
    try:
        from kornia.feature import XFeat
    except ImportError:
        print("kornia has no XFeat here: left out")
    else:
        net = XFeat().net.eval()
        found["XFeat's network (kornia)"] = torch.inference_mode()(lambda: net(image))
    return found


def memory(name: str, picture: Path | None) -> float:
    """MiB that the largest moment of one job takes beyond what was there before it, in a process of its own."""
    words = [sys.executable, __file__, "--memory-of", name] + (["--image", str(picture)] if picture else [])
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def status(field: str) -> int:
    """A number of KiB of this process as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="default: scikit-image's motorcycle")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    image = vga_image(args.image)
    runs = jobs(image)
    if args.memory_of:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        before = status("VmRSS")
        runs[args.memory_of]()
        print((status("VmHWM") - before) / 1024)
        return
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - began))
    found = {name: {"best_ms": min(each), "median_ms": statistics.median(each)} for name, each in times.items()}
    for name in runs:
        if not name.startswith("  "):
            found[name]["peak_mib"] = memory(name, args.image)
    for name, each in found.items():
        print(f"{name:34} best {each['best_ms']:7.1f} ms, median {each['median_ms']:7.1f} ms" + (
            f", {each['peak_mib']:.0f} MiB" if "peak_mib" in each else ""))  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "points": POINTS, "milliseconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
