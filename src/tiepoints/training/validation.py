"""What a training is validated by: repeatability on warped pairs, correct matches of warped and
real views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets.reconstructions import TrackScene
from ..datasets.synthetic import PairDataset, PairSettings
from ..datasets.tracks import correct_share, posed_pairs
from ..describe import DenseDescriptor
from ..extract import build
from ..geometry import warp_points
from ..image import load_image
from ..keypoints import detect_peaks
from ..matching import match
from ..metrics.anchoring import percentiles
from ..metrics.repeatability import orientation_errors, repeated_points
from ..models.rekd import histogram_angle
from ..orientation import angle_at
from ..patches import extract_patches
from ..pyramid import build_pyramid
from ..structs import Features, Keypoints


@dataclass(frozen=True)
class MatchingCheck:
    """Two views to be matched: points and patches of each, found apart, and the truth.

    Attributes:
        xy_a, xy_b: (N,2), (M,2) points.
        patches_a, patches_b: (N,1,32,32), (M,1,32,32).
        H_ab: (3,3) float64.
    """

    xy_a: Tensor
    xy_b: Tensor
    patches_a: Tensor
    patches_b: Tensor
    H_ab: Tensor


def value_at_points(image: Tensor, xy: Tensor) -> Tensor:
    """Values (N,) of an image (H,W) at the pixels nearest to points (N,2) inside it."""
    index = xy.round().long()
    return image[index[:, 1], index[:, 0]]


def matching_checks(
    photos: Sequence[Path],
    detect: Callable[[Tensor], Keypoints],
    *,
    views: PairSettings,
    seed: int,
    count: int,
) -> list[MatchingCheck]:
    """``count`` pairs of views with the points that ``detect`` (image (1,1,S,S) -> points) finds in
    each.
    """
    pairs = PairDataset(photos, views, seed=seed, length=count)
    checks = []
    for index in range(count):
        pair = pairs.pair(index)
        both = []
        for view in (pair.image_a, pair.image_b):
            image = torch.from_numpy(view.copy()).float()[None, None] / 255
            points = detect(image)
            both.append((points.xy, extract_patches(build_pyramid(image), points)))
        checks.append(
            MatchingCheck(
                both[0][0], both[1][0], both[0][1], both[1][1], torch.from_numpy(pair.H_ab)
            )
        )
    return checks


def matching_score(describe: Callable[[Tensor], Tensor], checks: Sequence[MatchingCheck]) -> float:
    """Mean ``correctly_matched`` of the checks' patches."""
    scores = [
        correctly_matched(describe(c.patches_a), describe(c.patches_b), c.xy_a, c.xy_b, c.H_ab)
        for c in checks
    ]
    return mean_of_known(scores)


def mean_of_known(scores: Sequence[float | None]) -> float:
    """Mean of the numbers among ``scores``, 0 where there is none."""
    known = [score for score in scores if score is not None]
    return math.fsum(known) / len(known) if known else 0.0


def correctly_matched(
    a: Tensor, b: Tensor, xy_a: Tensor, xy_b: Tensor, H_ab: Tensor, *, reach: float = 3.0
) -> float | None:
    """Part of the repeated points that mutual nearest descriptors (N,D), (M,D) match rightly
    (within ``reach`` px); None of none.
    """
    near = torch.cdist(warp_points(xy_a.double(), H_ab).float(), xy_b) <= reach
    repeated = min(int(near.any(dim=1).sum()), int(near.any(dim=0).sum()))
    if not repeated:
        return None
    similarity = a @ b.T
    forward, backward = similarity.argmax(dim=1), similarity.argmax(dim=0)
    mutual = backward[forward] == torch.arange(len(forward))
    return float((mutual & near[torch.arange(len(forward)), forward]).sum()) / repeated


#: Validation: seed of the pairs of held-out photographs, how many points of each are compared, and
#: in degrees what turn is right.
VALIDATION_SEED = 7
VALIDATION_KEYPOINTS = 150
ROTATED_KEYPOINTS = 75  # about half of the maxima of a smaller view
ROTATION_TOLERANCE = 15.0


def validation_score(net: nn.Module, pairs: list[dict[str, Tensor]]) -> float:
    """Mean 3 px mutual repeatability of a score-map network (in eval mode) on pairs of equal size,
    of keypoints on structure alone.

    A repeated keypoint counts if its pixels lie above the median of their images by
    ``filters.corner_strength``: what lies beside structure moves with a plane as well as a corner
    does, but not with a scene. Repeated keypoints are divided by ``VALIDATION_KEYPOINTS``, not by
    the keypoints found: a network must not gain by finding few.
    """
    scores = []
    device = next(net.parameters()).device
    for pair in pairs:
        both = torch.stack([pair["image_a"], pair["image_b"]]).to(
            device, memory_format=torch.channels_last
        )
        (xy_a, _), (xy_b, _) = detect_peaks(net(both).float().cpu(), 1000)
        h, w = pair["image_a"].shape[-2:]
        size = (int(h), int(w))
        xy_a, xy_b = (
            xy[value_at_points(pair[f"mask_{side}"][0], xy) > 0]
            for side, xy in (("a", xy_a), ("b", xy_b))
        )
        a, b = repeated_points(
            xy_a, xy_b, pair["H_ab"], size, size, num_keypoints=VALIDATION_KEYPOINTS
        )
        on_structure = (
            torch.minimum(
                percentiles(pair["image_a"][None], xy_a[a]),
                percentiles(pair["image_b"][None], xy_b[b]),
            )
            > 0.5
        )
        scores.append(int(on_structure.sum()) / VALIDATION_KEYPOINTS)
    return float(np.mean(scores)) if scores else 0.0


def oriented_score(net: nn.Module, pairs: list[dict[str, Tensor]]) -> float:
    """As ``validation_score`` for a network with orientation: repeated points whose turn is right
    within 15 degrees.
    """
    scores = []
    device = next(net.parameters()).device
    for pair in pairs:
        both = torch.stack([pair["image_a"], pair["image_b"]]).to(
            device, memory_format=torch.channels_last
        )
        score, histogram = net(both)
        angle = histogram_angle(histogram.float()).cpu()
        (xy_a, _), (xy_b, _) = detect_peaks(score.float().cpu(), 1000, shape="round")
        h, w = pair["image_a"].shape[-2:]
        size = (int(h), int(w))
        a, b = repeated_points(
            xy_a, xy_b, pair["H_ab"], size, size, num_keypoints=ROTATED_KEYPOINTS
        )
        angle_a, angle_b = angle_at(angle[0, 0], xy_a[a]), angle_at(angle[1, 0], xy_b[b])
        right = orientation_errors(xy_a[a], angle_a, angle_b, pair["H_ab"]) <= ROTATION_TOLERANCE
        scores.append(int(right.sum()) / ROTATED_KEYPOINTS)
    return float(np.mean(scores)) if scores else 0.0


#: Validation: pairs of views of held-out photographs, their side, and points looked for in each.
MATCHING_PAIRS = 24
MATCHING_SIZE = 320
MATCHING_KEYPOINTS = 200

#: Validation on reconstructions: pairs of views and keypoints of each image.
POSED_PAIRS = 24
POSED_KEYPOINTS = 500


class PosedCheck:
    """Validation on pairs of views of reconstructions: how many keypoints descriptors match in
    agreement with the cameras.
    """

    def __init__(self, scenes: list[TrackScene], detector: str | nn.Module = "keynet"):
        self.pairs = posed_pairs(scenes, POSED_PAIRS, VALIDATION_SEED)
        extractor = build(detector, None, num_keypoints=POSED_KEYPOINTS, up_levels=0, device="cpu")
        paths = dict.fromkeys(path for pair in self.pairs for path in pair.images)
        self.images = {path: load_image(path) for path in paths}
        self.keypoints = {
            path: extractor.extract(image).keypoints for path, image in self.images.items()
        }

    def patches(self, describe: Callable[[Tensor], Tensor]) -> float:
        """Mean ``tracks.correct_share`` of a network of patches."""
        described = {
            path: describe(extract_patches(build_pyramid(image), self.keypoints[path]))
            for path, image in self.images.items()
        }
        return self._score(described)

    def dense(self, describe: Callable[[Tensor], Tensor], dim: int) -> float:
        """Mean ``tracks.correct_share`` of a network image (1,1,H,W) -> map (1,dim,h,w), both on
        the CPU.
        """
        descriptor = DenseDescriptor(describe, dim)
        described = {
            path: descriptor(build_pyramid(image), self.keypoints[path], 0)
            for path, image in self.images.items()
        }
        return self._score(described)

    def _score(self, described: dict[Path, Tensor]) -> float:
        shares = []
        for pair in self.pairs:
            a, b = (Features(self.keypoints[path], described[path], (1, 1)) for path in pair.images)
            shares.append(correct_share(pair, a.xy, b.xy, match(a, b).index))
        return float(np.mean(shares))
