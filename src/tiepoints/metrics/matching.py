"""Accuracy of matches against a known homography."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import warp_points
from .geometry import as_double

SCORE_THRESHOLDS = tuple(range(1, 11))


def keynet_matching(
    xy_a: Tensor, xy_b_in_a: Tensor, matches: Tensor, possible: int
) -> dict[str, float | None]:
    """Matching score and MMA at 1..10 pixels in image a, strictly below (Key.Net 6.3; spec 6.3).

    ``score@t = correct / min(points of a, points of b)`` is what Key.Net's code calls MMA; ``mma@t
    = correct / matches`` is the usual mean matching accuracy (0 without matches); ``possible@t =
    correct / (possible + 1e-6)``.

    Args:
        matches: (K,2) indices of a and b, mutual nearest neighbours of the chosen points.
        possible: see ``keynet_repeatability``.
    """
    distance = (as_double(xy_a)[matches[:, 0]] - as_double(xy_b_in_a)[matches[:, 1]]).norm(dim=1)
    count = min(len(xy_a), len(xy_b_in_a))
    found: dict[str, float | None] = {"matches": len(matches)}
    for t in SCORE_THRESHOLDS:
        correct = int((distance < t).sum())
        found[f"correct@{t}"] = correct
        found[f"score@{t}"] = correct / count if count else 0.0
        found[f"mma@{t}"] = correct / len(matches) if len(matches) else 0.0
        found[f"possible@{t}"] = correct / (possible + 1e-6)
    return found


def match_errors(xy_a: Tensor, xy_b: Tensor, H_ab: Tensor, matches: Tensor) -> Tensor:
    """Distance in image b between each match's point of b and its mapped point of a: (K,) px."""
    return (
        warp_points(as_double(xy_a)[matches[:, 0]], as_double(H_ab))
        - as_double(xy_b)[matches[:, 1]]
    ).norm(dim=1)


def matching_accuracy(
    errors: Tensor, thresholds: Sequence[float] = (1, 2, 3, 4, 5)
) -> dict[str, float]:
    """REKD's and D2-Net's MMA: share of matches with an error of at most each threshold; 0 without
    matches.
    """
    return {
        f"mma@{t}": float((errors <= t).double().mean()) if len(errors) else 0.0 for t in thresholds
    }


def turned(xy: Tensor, size: tuple[int, int]) -> Tensor:
    """Points (N,2) of an image turned by 180 degrees about its centre.

    The chance level of a repeatability: the same number, spacing and order of points, without any
    relation to the content. A dense or regular set of points repeats by chance, and that much is
    taken off.
    """
    h, w = size
    return torch.tensor([w - 1.0, h - 1.0], dtype=torch.float64) - as_double(xy)
