"""Tie points of a stereo pair with known disparity: the first thing to run (``make demo``).

The two photographs come with scikit-image (Middlebury "motorcycle"); so does the true disparity: a
point (x, y) of the left image lies at (x - disparity, y) in the right one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image

import tiepoints
from tiepoints.image import load_image
from tiepoints.plot import draw_matches
from tiepoints.pyramid import build_pyramid


def timed(label: str, times: dict[str, float], work):
    """Run ``work`` and note its milliseconds."""
    started = time.perf_counter()
    result = work()
    times[label] = times.get(label, 0.0) + 1000 * (time.perf_counter() - started)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--num-keypoints", type=int, default=2000)
    args = parser.parse_args()
    left, right, disparity = skimage.data.stereo_motorcycle()

    extractor = tiepoints.build(num_keypoints=args.num_keypoints)
    extractor.extract(np.zeros((64, 64), np.uint8))  # the first call pays for set-up
    times: dict[str, float] = {}
    features = []
    for image in (left, right):
        tensor = timed("read", times, lambda image=image: load_image(image))
        pyramid = timed("pyramid", times, lambda tensor=tensor: build_pyramid(tensor))
        keypoints = timed("detect", times, lambda pyramid=pyramid: extractor.detect(pyramid)[0])
        descriptors = timed(
            "describe", times, lambda p=pyramid, k=keypoints: extractor.describe(p, k, 0)
        )
        features.append(
            tiepoints.Features(keypoints, descriptors, (image.shape[1], image.shape[0]))
        )
    a, b = features
    matches = timed("match", times, lambda: tiepoints.match(a, b, ratio=0.95))
    xy_a, xy_b = a.xy[matches.index[:, 0]], b.xy[matches.index[:, 1]]
    estimate = timed(
        "estimate", times, lambda: tiepoints.estimate(xy_a, xy_b, "fundamental", threshold=2.0)
    )

    x, y = xy_a.round().long().unbind(1)
    true = torch.from_numpy(np.asarray(disparity, dtype=np.float32))[y, x]
    known = torch.isfinite(true) & (true > 0)
    expected = torch.stack([xy_a[:, 0] - true, xy_a[:, 1]], dim=1)
    right_ones = known & ((xy_b - expected).norm(dim=1) <= 2)

    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "matches.png"
    # a match whose true disparity is unknown is neither right nor wrong
    draw_matches(
        Image.fromarray(left),
        Image.fromarray(right),
        xy_a[known],
        xy_b[known],
        right_ones[known],
        path=picture,
    )
    share = 100 * right_ones.sum().item() / max(1, int(known.sum()))
    print(f"points                       {len(a)} and {len(b)}")
    print(f"matches                      {len(matches)}")
    print(f"  with known disparity       {int(known.sum())}")
    print(f"  agreeing with it to 2 px   {int(right_ones.sum())} ({share:.1f} %)")
    print(f"  inliers of a fundamental   {int(estimate.inliers.sum())}")
    for label, milliseconds in times.items():
        print(
            f"{label:10s} {milliseconds:8.1f} "
            f"ms{' (both images)' if label not in ('match', 'estimate') else ''}"
        )
    print(f"picture: {picture} (green agrees with the true disparity)")


if __name__ == "__main__":
    main()
