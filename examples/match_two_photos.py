"""Match two photographs with two combinations of networks and keep the better one.

python examples/match_two_photos.py a.jpg b.jpg --output matches.png
"""

import argparse

import tiepoints

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image_a")
parser.add_argument("image_b")
parser.add_argument("--output", default="matches.png")
parser.add_argument("--num-keypoints", type=int, default=2048)
args = parser.parse_args()

best = None
for detector, descriptor in (("keynet", "hardnet-light"), ("sobelnet", "desnet")):
    extraction = tiepoints.ExtractOptions(
        detector=detector, descriptor=descriptor, num_keypoints=args.num_keypoints
    )
    result = tiepoints.match_two(args.image_a, args.image_b, extraction)
    inliers = int(result.estimate.inliers.sum())
    print(f"{detector} + {descriptor}: {inliers} inliers of {len(result.matches)} matches")
    if best is None or inliers > int(best.estimate.inliers.sum()):
        best = result

if not best.estimate.ok:
    print(f"no {best.estimate.geometry} matrix: {best.estimate.reason}")
tiepoints.draw_matches(
    args.image_a, args.image_b, best.xy_a, best.xy_b, best.estimate.inliers, path=args.output
)
