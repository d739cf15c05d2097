"""SobelNet + DesNet from gray tensor to keypoints and descriptors on one thread: 640 x 480, top
1000, single scale, float32.

Compared with OpenCV's SIFT and ORB (detectAndCompute, 1000 keypoints, one thread), and with the
network of XFeat in kornia (random weights, without extraction of keypoints). All alternate in one
run; reported are the minimum and the median time, and the peak memory in addition to that at the
start, in a separate process.

    python benchmarks/realtime.py [--image FILE] [--rounds 15] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import machine, vga_image
from tiepoints.extract import Extractor, build
from tiepoints.keypoints import detect_peaks
from tiepoints.pyramid import build_pyramid
from tiepoints.weights import load

NUM_KEYPOINTS = 1000
XFEAT = "XFeat's network (kornia)"


def opencv(create: str, image: torch.Tensor) -> Callable[[], Any]:
    import cv2

    cv2.setNumThreads(1)
    gray = (image[0, 0].numpy() * 255).round().astype("uint8")
    detector = getattr(cv2, create)(NUM_KEYPOINTS)
    return lambda: detector.detectAndCompute(gray, None)[0]


def sobelnet_desnet() -> Extractor:
    return build(
        "sobelnet",
        "desnet",
        single_scale=True,
        num_keypoints=NUM_KEYPOINTS,
        device="cpu",
        precision="float32",
    )


def network(name: str, image: torch.Tensor) -> Callable[[], Any]:
    net = load(name).fused()  # type: ignore[operator]
    return lambda: net(image)


def factories(image: torch.Tensor) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Functions that create what is timed: whole systems, and the stages of ours."""

    def whole() -> Callable[[], Any]:
        return partial(sobelnet_desnet().extract, image)

    def peaks() -> Callable[[], Any]:
        return partial(detect_peaks, network("sobelnet", image)(), NUM_KEYPOINTS)

    def sampling() -> Callable[[], Any]:
        extractor, pyramid = sobelnet_desnet(), build_pyramid(image, up=0, down=0)
        keypoints = extractor.detect(pyramid)[0]
        assert extractor.describe is not None
        return partial(extractor.describe, pyramid, keypoints, 0)

    def xfeat() -> Callable[[], Any]:
        from kornia.feature import XFeat

        net = XFeat().net.eval()
        return torch.inference_mode()(lambda: net(image))

    return {
        "SobelNet + DesNet": whole,
        "  SobelNet": partial(network, "sobelnet", image),
        "  points from the score map": peaks,
        "  DesNet": partial(network, "desnet", image),
        "  DesNet, sampled and normalised": sampling,
        "SIFT": partial(opencv, "SIFT_create", image),
        "ORB": partial(opencv, "ORB_create", image),
        XFEAT: xfeat,
    }


def memory(name: str, image: Path | None) -> float:
    """Peak memory of a call in MiB in addition to that before it, in a separate process."""
    command = [sys.executable, __file__, "--memory-of", name]
    command += ["--image", str(image)] if image else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def status(field: str) -> int:
    """A field in KiB of the status of this process on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, help="default: scikit-image's motorcycle")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    image = vga_image(args.image)
    create = factories(image)
    if args.memory_of:
        run = create[args.memory_of]()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
        before = status("VmRSS")
        run()
        print((status("VmHWM") - before) / 1024)
        return
    runs = {name: factory() for name, factory in create.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(args.rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if i:  # the first round is a warm-up
                times[name].append(1e3 * (time.perf_counter() - started))
    found = {
        name: {"best_ms": min(values), "median_ms": statistics.median(values)}
        for name, values in times.items()
    }
    for name in runs:
        if not name.startswith("  "):
            found[name]["peak_mib"] = memory(name, args.image)
            if name != XFEAT:
                found[name]["points"] = len(runs[name]())
    for name, row in found.items():
        more = "".join(
            f", {row[key]:.0f} {unit}"
            for key, unit in (("peak_mib", "MiB"), ("points", "keypoints"))
            if key in row
        )
        print(f"{name:34} best {row['best_ms']:7.1f} ms, median {row['median_ms']:7.1f} ms{more}")
    if args.out:
        args.out.write_text(
            json.dumps({"machine": machine(), "asked": NUM_KEYPOINTS, "systems": found}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
