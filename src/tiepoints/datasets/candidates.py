"""Pairs of views with keypoint candidates: the training data of dense descriptors (Yuan et al.
2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..geometry import distances, warp_points
from .synthetic import PairDataset, PairSettings

#: Number of candidates per view; missing ones are padded with NaN.
CANDIDATES = 160
#: Number of keypoints per view among which they are chosen, and side of their non-maximum
#: suppression in pixels: denser than in extraction, because near negatives are the hardest ones.
CANDIDATE_POOL, CANDIDATE_WINDOW = 400, 9


class CandidatePairs(Dataset):
    """Pairs of views (``PairDataset``) with keypoint candidates and their correspondence masks.

    Items: ``image_a, image_b`` as in ``PairDataset``; ``xy_a, xy_b`` (``count``,2), each view's
    strongest keypoints, padded with NaN; ``positive, negative`` (``count``,``count``) bool, the
    pairs of candidates that show the same location, and those that certainly do not
    (``candidate_pairs``).

    Only keypoints inside the overlap of the views are used: outside the photograph, a view shows
    its reflection.

    Args:
        photos: image files.
        detect: gray view (1,1,S,S) in [0,1] -> keypoints (N,2), strongest first.
        views: how the pairs of views are drawn.
        seed: item ``i`` depends only on ``seed``, ``i``, ``photos`` and ``detect``.
        length: number of items.
        count: number of candidates per view.
    """

    def __init__(
        self,
        photos: Sequence[Path],
        detect: Callable[[Tensor], Tensor],
        views: PairSettings,
        *,
        seed: int = 0,
        length: int,
        count: int = CANDIDATES,
    ):
        self.views = PairDataset(photos, views, seed=seed, length=length)
        self.detect, self.count = detect, count

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return item ``index``.

        Raises:
            DataError: the photographs have no texture.
        """
        item = self.views[index]
        for side in ("a", "b"):
            detected = self.detect(item[f"image_{side}"][None])
            pixel = detected.round().long()
            in_overlap = item[f"mask_{side}"][0, pixel[:, 1], pixel[:, 0]] > 0
            keypoints = torch.full((self.count, 2), float("nan"))
            kept = detected[in_overlap][: self.count]
            keypoints[: len(kept)] = kept
            item[f"xy_{side}"] = keypoints
        item["positive"], item["negative"] = candidate_pairs(
            item["xy_a"], item["xy_b"], item["H_ab"]
        )
        return {
            key: item[key] for key in ("image_a", "image_b", "xy_a", "xy_b", "positive", "negative")
        }

    def homography(self, index: int) -> Tensor:
        """Homography (3,3) float64 from view a to view b of item ``index``."""
        return self.views[index]["H_ab"]


#: Candidates at most ``POSITIVE_DISTANCE`` px apart are positive pairs, those more than
#: ``NEGATIVE_DISTANCE`` px apart are negative pairs; pairs in between are ignored.
POSITIVE_DISTANCE = 2.0
NEGATIVE_DISTANCE = 8.0


def candidate_pairs(xy_a: Tensor, xy_b: Tensor, H_ab: Tensor) -> tuple[Tensor, Tensor]:
    """Label pairs of candidates (...,N,2) of a and (...,M,2) of b as positive or negative.

    Returns:
        positive (...,N,M) bool, at most ``POSITIVE_DISTANCE`` px apart in both images; negative
        (...,N,M) bool, more than ``NEGATIVE_DISTANCE`` px apart in both. Other pairs are neither.
    """
    H_ab = H_ab.to(torch.float64)
    in_b = distances(warp_points(xy_a.double(), H_ab), xy_b.double())
    in_a = distances(xy_a.double(), warp_points(xy_b.double(), torch.linalg.inv(H_ab)))
    positive = torch.maximum(in_a, in_b) <= POSITIVE_DISTANCE
    negative = torch.minimum(in_a, in_b) > NEGATIVE_DISTANCE
    return positive, negative
