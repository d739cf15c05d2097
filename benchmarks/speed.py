"""Time to detect 2048 keypoints in a 640 x 480 image on one thread, compared with kornia's
KeyNetDetector with the same weights.

Both are measured alternately in one run; times are medians of ``--repeat`` calls. Ours is also
measured by stage; the convolutions of the network are timed by torch's profiler (self CPU time),
and their multiplications and additions are counted.

    python benchmarks/speed.py [--image FILE] [--repeat 7] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from common import machine, vga_image
from tiepoints.checkpoints import to_official_state_dict
from tiepoints.detect import ScoreMapDetector
from tiepoints.extract import build
from tiepoints.models.keynet import KeyNet
from tiepoints.pyramid import build_pyramid
from tiepoints.weights import load

POINTS = 2048
CONVOLUTIONS = "    of which convolutions"


def convolutions(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds in convolutions of one call, and their GFLOP (including those of overlapping
    tiles and padded filters).
    """
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        call()
    found = [event for event in profiler.key_averages() if "conv" in event.key]
    milliseconds = sum(event.self_cpu_time_total for event in found) / 1e3
    return milliseconds, sum(event.flops for event in found) / 1e9


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path, help="default: scikit-image's motorcycle")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    image = vga_image(args.image)

    import kornia
    from kornia.feature import KeyNetDetector

    net = load("keynet")
    theirs = KeyNetDetector(pretrained=False, num_features=POINTS).eval()
    # kornia's network has no factor of corner strength: the same layers without it
    plain = KeyNet(**{**net.settings, "structure": 0.0})
    plain.load_state_dict(net.state_dict())
    theirs.model.load_state_dict(to_official_state_dict(plain), strict=True)
    ours = build("keynet", "rootsift", num_keypoints=POINTS, device="cpu")
    single = build("keynet", None, num_keypoints=POINTS, single_scale=True, device="cpu")
    fused, pyramid = net.fused(), build_pyramid(image)
    keypoints = ours.detect(pyramid)[0]

    @torch.inference_mode()
    def network() -> list:
        return [fused(level.image) for level in pyramid.levels]

    maps = {level.size: net_map for level, net_map in zip(pyramid.levels, network(), strict=True)}

    def stored(part: torch.Tensor) -> torch.Tensor:
        return maps[part.shape[-2], part.shape[-1]]

    stored.floor = fused.floor  # type: ignore[attr-defined]
    selection = ScoreMapDetector(stored, ours.detect.options)  # type: ignore[attr-defined]
    calls: dict[str, Callable[[], object]] = {
        "kornia KeyNetDetector": torch.inference_mode()(lambda: theirs(image)),
        "ours, detection": lambda: ours.detect(build_pyramid(image)),
        "ours, single scale": lambda: single.detect(build_pyramid(image, up=0, down=0)),
        "  stage: pyramid": lambda: build_pyramid(image),
        "  stage: network, all levels": network,
        "  stage: keypoints of the maps": torch.inference_mode()(lambda: selection(pyramid)),
        "  stage: rootsift (not in detection)": lambda: ours.describe(pyramid, keypoints, 0),  # type: ignore[misc]
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(args.repeat):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - started))
    # after the other measurements, which the profiler slows down
    profiled = [convolutions(network) for _ in range(args.repeat)]
    medians: dict[str, float] = {}
    for name, values in times.items():
        medians[name] = statistics.median(values)
        if calls[name] is network:
            medians[CONVOLUTIONS] = statistics.median(milliseconds for milliseconds, _ in profiled)
    report(medians, profiled[0][1], kornia.__version__, len(keypoints), args.out)


def report(
    medians: dict[str, float], gflop: float, kornia: str, num_keypoints: int, out: Path | None
) -> None:
    """Print the results and write them to ``out``."""
    rate = 1000 * gflop / medians[CONVOLUTIONS]
    for name, value in medians.items():
        print(
            f"{name:36s} {value:8.1f} ms"
            + (f", {gflop:.1f} GFLOP: {rate:.0f} GFLOP/s" if name == CONVOLUTIONS else "")
        )
    ratio = medians["kornia KeyNetDetector"] / medians["ours, detection"]
    print(f"kornia {kornia} / ours: {ratio:.2f}   ({num_keypoints} keypoints)")
    if out:
        content = {
            "machine": machine(),
            "kornia": kornia,
            "milliseconds": medians,
            "ratio": ratio,
            "GFLOP": gflop,
            "GFLOP/s": rate,
        }
        out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
