"""A detector of your own in place of Key.Net: any module that maps an image to a score map.

    python examples/own_detector.py a.jpg b.jpg

The pyramid, non-maximum suppression, sub-pixel positions and descriptors are those of tiepoints.
"""

import argparse

import torch
from torch import Tensor, nn

import tiepoints


class Harris(nn.Module):
    """Image (B,1,H,W) in [0,1] -> corner strength (B,1,H,W) of Harris and Stephens."""

    def forward(self, image: Tensor) -> Tensor:
        """Products of the gradients, averaged over 5 x 5 pixels."""
        dy, dx = torch.gradient(image, dim=(2, 3))
        blur = nn.AvgPool2d(5, stride=1, padding=2)
        xx, yy, xy = blur(dx * dx), blur(dy * dy), blur(dx * dy)
        return (xx * yy - xy**2 - 0.05 * (xx + yy) ** 2).clamp(min=0)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image_a")
parser.add_argument("image_b")
parser.add_argument("--num-keypoints", type=int, default=1000)
args = parser.parse_args()

for detector in (Harris(), "keynet"):
    extractor = tiepoints.build(detector, "hardnet-light", num_keypoints=args.num_keypoints)
    result = tiepoints.match_two(args.image_a, args.image_b, extractor)
    inliers = int(result.estimate.inliers.sum())
    print(f"{extractor}: {inliers} inliers of {len(result.matches)} matches")
