"""Tie points of a stereo pair with known disparity: the first thing to run (``make demo``).

The photographs come with scikit-image (Middlebury "motorcycle"); so does the true disparity: a
point (x, y) of the left image is at (x - disparity, y) in the right one.
"""

import argparse
from pathlib import Path

import numpy as np
import skimage.data
import torch

import tiepoints

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the picture")
parser.add_argument("--num-keypoints", type=int, default=2000)
args = parser.parse_args()
left, right, disparity = skimage.data.stereo_motorcycle()

extraction = tiepoints.ExtractOptions(num_keypoints=args.num_keypoints)
result = tiepoints.match_two(left, right, extraction)
xy_a, xy_b = result.xy_a, result.xy_b

x, y = xy_a.round().long().unbind(1)
true = torch.from_numpy(np.asarray(disparity, dtype=np.float32))[y, x]
known = torch.isfinite(true) & (true > 0)
expected = torch.stack([xy_a[:, 0] - true, xy_a[:, 1]], dim=1)
correct = (known & ((xy_b - expected).norm(dim=1) <= 2))[known]

path = args.output / "matches.png"
tiepoints.draw_matches(left, right, xy_a[known], xy_b[known], correct=correct, path=path)
print(f"keypoints                    {len(result.a)} and {len(result.b)}")
print(f"matches                      {len(result.matches)}")
print(f"  with known disparity       {int(known.sum())}")
print(f"  agreeing with it to 2 px   {int(correct.sum())} ({100 * correct.float().mean():.1f} %)")
print(f"inliers                      {int(result.estimate.inliers.sum())}")
print(f"picture                      {path} (blue lines agree with the true disparity)")
