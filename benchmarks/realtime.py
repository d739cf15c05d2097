"""SobelNet + DesNet from gray tensor to points and descriptors, on one thread: 640 x 480, top 1000,
one scale, float32.

Beside OpenCV's SIFT and ORB (detectAndCompute, 1000 points, one thread), and the network of XFeat
as kornia has it (random weights serve for timing; no points are taken from its maps). All take
turns in one run; the quickest and the median round are told, and the most memory that each had
beyond the start, in a process of its own.

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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import machine, vga_image
from tiepoints.extract import Extractor, build
from tiepoints.keypoints import detect_peaks
from tiepoints.pyramid import build_pyramid
from tiepoints.weights import load

POINTS = 1000  # asked for
XFEAT = "XFeat's network (kornia)"


def makers(image: torch.Tensor) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What is timed, whole systems and the stages of ours, each made only when it is called for.
    The stages return what they make.
    """
    gray = (image[0, 0].numpy() * 255).round().astype("uint8")

    def opencv(create: str) -> Callable[[], Any]:
        import cv2

        cv2.setNumThreads(1)
        detector = getattr(cv2, create)(POINTS)
        return lambda: detector.detectAndCompute(gray, None)[0]

    def ours() -> Extractor:
        return build(
            "sobelnet",
            "desnet",
            single_scale=True,
            num_keypoints=POINTS,
            device="cpu",
            precision="float32",
        )

    def whole() -> Callable[[], Any]:
        extractor = ours()
        return lambda: extractor.extract(image)

    def peaks() -> Callable[[], Any]:
        score = load("sobelnet").fused()(image)  # type: ignore[operator]
        return lambda: detect_peaks(score, POINTS)

    def dense() -> Callable[[], Any]:
        net = load("desnet").fused()  # type: ignore[operator]
        return lambda: net(image)

    def sobel() -> Callable[[], Any]:
        net = load("sobelnet").fused()  # type: ignore[operator]
        return lambda: net(image)

    def sampled() -> Callable[[], Any]:
        extractor, pyramid = ours(), build_pyramid(image, up=0, down=0)
        points = extractor.detect(pyramid)[0]
        assert extractor.describe is not None
        return partial(extractor.describe, pyramid, points, 0)

    def xfeat() -> Callable[[], Any]:
        from kornia.feature import XFeat

        net = XFeat().net.eval()
        return torch.inference_mode()(lambda: net(image))

    return {
        "SobelNet + DesNet": whole,
        "  SobelNet": sobel,
        "  points from the score map": peaks,
        "  DesNet": dense,
        "  DesNet, sampled and normalised": sampled,
        "SIFT": partial(opencv, "SIFT_create"),
        "ORB": partial(opencv, "ORB_create"),
        XFEAT: xfeat,
    }


def memory(name: str, picture: Path | None) -> float:
    """MiB that the largest moment of one job takes beyond what was there before it, in a process of
    its own.
    """
    words = [sys.executable, __file__, "--memory-of", name] + (
        ["--image", str(picture)] if picture else []
    )
    return float(
        subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def status(field: str) -> int:
    """A number of KiB of this process as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, help="default: scikit-image's motorcycle")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    image = vga_image(args.image)
    made = makers(image)
    if args.memory_of:
        run = made[args.memory_of]()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        before = status("VmRSS")
        run()
        print((status("VmHWM") - before) / 1024)
        return
    runs = {name: make() for name, make in made.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - began))
    found = {
        name: {"best_ms": min(each), "median_ms": statistics.median(each)}
        for name, each in times.items()
    }
    for name in runs:
        if not name.startswith("  "):
            found[name]["peak_mib"] = memory(name, args.image)
            if name != XFEAT:
                found[name]["points"] = len(runs[name]())
    for name, each in found.items():
        more = "".join(
            f", {each[key]:.0f} {unit}"
            for key, unit in (("peak_mib", "MiB"), ("points", "points"))
            if key in each
        )
        print(f"{name:34} best {each['best_ms']:7.1f} ms, median {each['median_ms']:7.1f} ms{more}")
    if args.out:
        args.out.write_text(
            json.dumps({"machine": machine(), "asked": POINTS, "systems": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
