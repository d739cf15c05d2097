"""Errors of estimated geometry: homographies, epipolar lines, poses, and the area under their
curves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..geometry import warp_points

#: Squared epipolar distance below which a match of a posed pair is called right (SuperGlue's
#: evaluation).
RIGHT_EPIPOLAR = 5e-4


def as_double(xy: Tensor) -> Tensor:
    return torch.as_tensor(xy).to(torch.float64)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there; None of none."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


# ---- geometry


def homography_dlt(xy_a: Tensor, xy_b: Tensor) -> Tensor | None:
    """Least-squares homography (3,3) of matches by the normalised direct linear transform; None
    with fewer than 4.
    """
    if len(xy_a) < 4:
        return None
    frames = []
    for xy in (as_double(xy_a), as_double(xy_b)):
        centre = xy.mean(dim=0)
        spread = float((xy - centre).norm(dim=1).mean())
        if not spread > 0:
            return None
        s = math.sqrt(2) / spread
        frame = torch.tensor(
            [[s, 0, -s * centre[0]], [0, s, -s * centre[1]], [0, 0, 1]], dtype=torch.float64
        )
        frames.append((frame, warp_points(xy, frame)))
    (T_a, a), (T_b, b) = frames
    one, zero = (
        torch.ones(len(a), 1, dtype=torch.float64),
        torch.zeros(len(a), 3, dtype=torch.float64),
    )
    p = torch.cat([a, one], dim=1)
    rows = torch.cat(
        [torch.cat([p, zero, -b[:, :1] * p], dim=1), torch.cat([zero, p, -b[:, 1:] * p], dim=1)]
    )
    H = torch.linalg.svd(rows, full_matrices=len(rows) < 9).Vh[-1].reshape(3, 3)
    return torch.linalg.inv(T_b) @ H @ T_a


def corner_error(H: Tensor, H_true: Tensor, size_a: tuple[int, int]) -> float:
    """Mean distance in image b of the four corners of image a mapped by both homographies; inf
    where one is not finite.
    """
    h, w = size_a
    corners = torch.tensor([[0, 0], [w - 1, 0], [0, h - 1], [w - 1, h - 1]], dtype=torch.float64)
    error = (
        (warp_points(corners, as_double(H)) - warp_points(corners, as_double(H_true)))
        .norm(dim=1)
        .mean()
    )
    return float(error) if torch.isfinite(error) else math.inf


def pose_error(R: Tensor, t: Tensor, T_ab: Tensor) -> float:
    """The larger of rotation error and angle between translations, in degrees (0..180; the sign of
    t counts for nothing).
    """
    R, t, T_ab = as_double(R), as_double(t), as_double(T_ab)
    cosine = ((R.T @ T_ab[:3, :3]).trace() - 1) / 2
    rotation = math.degrees(math.acos(float(cosine.clamp(-1, 1))))
    true = T_ab[:3, 3]
    norm = float(t.norm() * true.norm())
    if not norm > 0:
        return 180.0
    direction = math.degrees(math.acos(min(1.0, abs(float(t @ true)) / norm)))
    return max(rotation, direction)


def epipolar_errors(xy_a: Tensor, xy_b: Tensor, K_a: Tensor, K_b: Tensor, T_ab: Tensor) -> Tensor:
    """Squared symmetric distances (K,) of matches (K,2) to their epipolar lines under the true
    pose, in focal lengths squared.

    ``(x_b E x_a)^2 (1 / |l_a|^2 + 1 / |l_b|^2)`` on normalised coordinates: SuperGlue's measure of
    a right match.

    Args:
        T_ab: (3,4) or (4,4) pose of camera b in terms of a; its translation must not be zero.
    """
    rays = []
    for xy, K in ((xy_a, K_a), (xy_b, K_b)):
        ones = torch.ones(len(xy), 1, dtype=torch.float64)
        rays.append(torch.cat([as_double(xy), ones], dim=1) @ torch.linalg.inv(as_double(K)).T)
    R, t = as_double(T_ab)[:3, :3], as_double(T_ab)[:3, 3]
    t = t / t.norm()
    E = torch.stack([torch.linalg.cross(t, R[:, k]) for k in range(3)], dim=1)  # [t]x R
    line_b, line_a = rays[0] @ E.T, rays[1] @ E
    residual = (rays[1] * line_b).sum(dim=1).square()
    return residual * (
        1 / line_a[:, :2].square().sum(dim=1) + 1 / line_b[:, :2].square().sum(dim=1)
    )


def epipolar_distances(xy_a: Tensor, xy_b: Tensor, F: Tensor) -> Tensor:
    """Symmetric epipolar distances (K,) in px of correspondences (K,2): the larger of both points'
    distances to their lines.

    Args:
        F: (3,3) with x_b^T F x_a = 0.

    Returns:
        inf where a line has no direction (the point is the epipole).
    """
    a, b = (
        torch.cat([as_double(xy), torch.ones(len(xy), 1, dtype=torch.float64)], dim=1)
        for xy in (xy_a, xy_b)
    )
    F = as_double(F)
    line_b, line_a = a @ F.T, b @ F
    residual = (b * line_b).sum(dim=1).abs()
    norm = torch.minimum(line_a[:, :2].norm(dim=1), line_b[:, :2].norm(dim=1))
    return torch.where(norm > 0, residual / norm, math.inf)


def error_auc(errors: Sequence[float | None], thresholds: Sequence[float]) -> list[float]:
    """Area under the curve of recall against error, up to each threshold and divided by it (0..1).

    Failures (None, inf, nan) count as never reached. The curve is linear between errors, as in
    SuperGlue's evaluation.
    """
    finite = sorted(math.inf if e is None or not math.isfinite(e) else e for e in errors)
    if not finite:
        return [0.0 for _ in thresholds]
    recall = [(i + 1) / len(finite) for i in range(len(finite))]
    areas = []
    for limit in thresholds:
        x, y = [0.0], [0.0]
        for e, r in zip(finite, recall, strict=True):
            if e < limit:
                x.append(e)
                y.append(r)
        x.append(float(limit))
        y.append(y[-1])
        areas.append(
            sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1)) / limit
        )
    return areas
