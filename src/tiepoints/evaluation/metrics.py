"""Measures of keypoints on image pairs with known homography: pure functions of arrays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..geometry import common_area, warp_points


def mutual_matches(
    xy_a: Tensor,
    xy_b: Tensor,
    H_ab: Tensor,
    size_a: tuple[int, int],
    size_b: tuple[int, int],
    *,
    num_points: int = 1000,
    threshold: float = 3.0,
    border: float = 15.0,
) -> tuple[int, int, int]:
    """How many points are found again within ``threshold`` pixels, one to one, and of how many: (matches, of a, of b).

    Points outside the common area (with ``border``) are left out, then the first ``num_points`` of each image are kept;
    points of a are mapped into b, and mutual nearest neighbours no farther apart than the threshold count.

    Args:
        xy_a, xy_b: (N,2), (M,2), strongest first.
        H_ab: (3,3) from a to b.
        size_a, size_b: (height, width).
    """
    H_ab = H_ab.to(torch.float64)
    xy_a, xy_b = xy_a.to(torch.float64), xy_b.to(torch.float64)
    xy_a = xy_a[common_area(xy_a, H_ab, size_b, border)][:num_points]
    xy_b = xy_b[common_area(xy_b, torch.linalg.inv(H_ab), size_a, border)][:num_points]
    if not len(xy_a) or not len(xy_b):
        return 0, len(xy_a), len(xy_b)
    distance = torch.cdist(warp_points(xy_a, H_ab), xy_b)
    nearest_b, nearest_a = distance.argmin(dim=1), distance.argmin(dim=0)
    index = torch.arange(len(xy_a))
    mutual = (nearest_a[nearest_b] == index) & (distance[index, nearest_b] <= threshold)
    return int(mutual.sum()), len(xy_a), len(xy_b)


def mutual_repeatability(
    xy_a: Tensor, xy_b: Tensor, H_ab: Tensor, size_a: tuple[int, int], size_b: tuple[int, int], **options: Any
) -> float:
    """``matches / min(points of a, points of b)`` of ``mutual_matches``, same arguments; 0 where an image has none.

    It flatters a detector that finds few points: the number of points belongs beside it.
    """
    matches, count_a, count_b = mutual_matches(xy_a, xy_b, H_ab, size_a, size_b, **options)
    return matches / min(count_a, count_b) if matches else 0.0
