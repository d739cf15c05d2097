"""Pairs of views with the key point candidates of each: the training data of dense descriptors
(Yuan et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..geometry import warp_points
from .synthetic import PairDataset, PairSettings

#: Candidates of a view; fewer are filled up with nan.
CANDIDATES = 160


class CandidatePairs(Dataset):
    """Index -> a pair of views (``PairDataset``), its candidates and what they are to each other.

    ``xy_a, xy_b`` (``count``,2): each view's strongest points, nan where there are fewer;
    ``positive, negative`` (``count``,``count``) bool: which of a and of b show one place, and which
    certainly two (``losses.candidate_pairs``).

    Only points whose place the other view shows count: what lies beside a photograph is its
    reflection.

    Args:
        photos: image files.
        detect: gray view (1,1,S,S) in [0,1] -> points (N,2), strongest first.
        views: how the pairs of views are drawn.
        seed: item ``i`` depends on ``seed``, ``i``, ``photos`` and ``detect`` alone.
        length: number of items.
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
        """Item ``index``.

        Raises:
            DataError: the photographs have no texture.
        """
        item = self.views[index]
        for side in ("a", "b"):
            found = self.detect(item[f"image_{side}"][None])
            pixel = found.round().long()
            seen = item[f"mask_{side}"][0, pixel[:, 1], pixel[:, 0]] > 0
            points = torch.full((self.count, 2), float("nan"))
            kept = found[seen][: self.count]
            points[: len(kept)] = kept
            item[f"xy_{side}"] = points
        item["positive"], item["negative"] = candidate_pairs(
            item["xy_a"], item["xy_b"], item["H_ab"]
        )
        return {
            key: item[key] for key in ("image_a", "image_b", "xy_a", "xy_b", "positive", "negative")
        }

    def homography(self, index: int) -> Tensor:
        """(3,3) float64 from view a to view b of item ``index``."""
        return self.views[index]["H_ab"]


#: Candidates nearer than this are one place; nearer than that, neither one place nor two. Pixels.
SAME_PLACE = 2.0
OTHER_PLACE = 8.0


def candidate_pairs(xy_a: Tensor, xy_b: Tensor, H_ab: Tensor) -> tuple[Tensor, Tensor]:
    """Which candidates (N,2) of a and (M,2) of b show one place, and which certainly two: (N,M)
    bool each.

    The same place: at most ``SAME_PLACE`` px apart in both images; two places: more than
    ``OTHER_PLACE`` px in both. The rest is neither.
    """
    H_ab = H_ab.to(torch.float64)
    in_b = torch.cdist(warp_points(xy_a.double(), H_ab), xy_b.double())
    in_a = torch.cdist(xy_a.double(), warp_points(xy_b.double(), torch.linalg.inv(H_ab)))
    return torch.maximum(in_a, in_b) <= SAME_PLACE, torch.minimum(in_a, in_b) > OTHER_PLACE
