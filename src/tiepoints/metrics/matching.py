"""Accuracy of matches given the true homography."""

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
    """Matching score and MMA at thresholds of 1..10 px in image a (Key.Net, section 6.3).

    A match is correct if its error is strictly below the threshold t. ``score@t = correct /
    min(keypoints of a, keypoints of b)`` is called MMA in Key.Net's code; ``mma@t = correct /
    matches`` is the usual mean matching accuracy (0 without matches); ``possible@t = correct /
    (possible + 1e-6)``.

    Args:
        xy_a, xy_b_in_a: keypoints (N,2), (M,2) of ``keynet_points`` in image a.
        matches: (K,2) indices of a and b, mutual nearest neighbors.
        possible: see ``keynet_repeatability``.
    """
    distance = (as_double(xy_a)[matches[:, 0]] - as_double(xy_b_in_a)[matches[:, 1]]).norm(dim=1)
    count = min(len(xy_a), len(xy_b_in_a))
    result: dict[str, float | None] = {"matches": len(matches)}
    for t in SCORE_THRESHOLDS:
        correct = int((distance < t).sum())
        result[f"correct@{t}"] = correct
        result[f"score@{t}"] = correct / count if count else 0.0
        result[f"mma@{t}"] = correct / len(matches) if len(matches) else 0.0
        result[f"possible@{t}"] = correct / (possible + 1e-6)
    return result


def match_errors(xy_a: Tensor, xy_b: Tensor, H_ab: Tensor, matches: Tensor) -> Tensor:
    """Reprojection errors (K,) of matches in image b, in pixels.

    Args:
        xy_a, xy_b: keypoints (N,2), (M,2).
        H_ab: homography (3,3) from a to b.
        matches: (K,2) indices of a and b.
    """
    return (
        warp_points(as_double(xy_a)[matches[:, 0]], as_double(H_ab))
        - as_double(xy_b)[matches[:, 1]]
    ).norm(dim=1)


def matching_accuracy(
    errors: Tensor, thresholds: Sequence[float] = (1, 2, 3, 4, 5)
) -> dict[str, float]:
    """MMA of REKD and D2-Net: fraction of matches with an error of at most each threshold.

    0 without matches.
    """
    return {
        f"mma@{t}": float((errors <= t).double().mean()) if len(errors) else 0.0 for t in thresholds
    }


def rotate_180(xy: Tensor, size: tuple[int, int]) -> Tensor:
    """Rotate points (N,2) by 180 degrees about the center of an image of ``size`` (height, width).

    Gives the chance level of repeatability (``above_chance``): the same number, spacing and order
    of keypoints, unrelated to the image content. Dense or regular keypoints repeat by chance.
    """
    h, w = size
    return torch.tensor([w - 1.0, h - 1.0], dtype=torch.float64) - as_double(xy)
