"""Errors of estimated homographies and poses, epipolar errors, and the area under error curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..geometry import warp_points

#: Squared epipolar error below which a match of a posed pair is correct (SuperGlue's evaluation).
MAX_EPIPOLAR_ERROR = 5e-4


def as_double(xy: Tensor) -> Tensor:
    """Convert to float64."""
    return torch.as_tensor(xy).to(torch.float64)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None if empty."""
    valid = [value for value in values if value is not None]
    return sum(valid) / len(valid) if valid else None


# ---- geometry


def homography_dlt(xy_a: Tensor, xy_b: Tensor) -> Tensor | None:
    """Estimate a homography (3,3) from matches (K,2), (K,2) by the normalized DLT.

    Returns:
        None with fewer than four matches, or if all points of an image coincide.
    """
    if len(xy_a) < 4:
        return None
    normalized = []
    for xy in (as_double(xy_a), as_double(xy_b)):
        centroid = xy.mean(dim=0)
        distance = float((xy - centroid).norm(dim=1).mean())
        if not distance > 0:
            return None
        s = math.sqrt(2) / distance
        T = torch.tensor(
            [[s, 0, -s * centroid[0]], [0, s, -s * centroid[1]], [0, 0, 1]], dtype=torch.float64
        )
        normalized.append((T, warp_points(xy, T)))
    (T_a, a), (T_b, b) = normalized
    zero = torch.zeros(len(a), 3, dtype=torch.float64)
    p = torch.cat([a, torch.ones(len(a), 1, dtype=torch.float64)], dim=1)
    rows = torch.cat(
        [torch.cat([p, zero, -b[:, :1] * p], dim=1), torch.cat([zero, p, -b[:, 1:] * p], dim=1)]
    )
    H = torch.linalg.svd(rows, full_matrices=len(rows) < 9).Vh[-1].reshape(3, 3)
    return torch.linalg.inv(T_b) @ H @ T_a


def corner_error(H: Tensor, H_true: Tensor, size_a: tuple[int, int]) -> float:
    """Mean distance in image b of the four corners of image a, mapped by both homographies.

    Args:
        H, H_true: (3,3) from a to b.
        size_a: (height, width).

    Returns:
        pixels; inf if a mapped corner is not finite.
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
    """Pose error in degrees, 0..180: the larger of the rotation error and the angle between the
    translations.

    Args:
        R, t: estimated rotation (3,3) and translation (3,), whose length and sign are ignored.
        T_ab: true pose, (3,4) or (4,4).
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
    """Squared symmetric epipolar errors (K,) of matches in normalized coordinates.

    ``(x_b E x_a)^2 (1 / |l_a|^2 + 1 / |l_b|^2)``, SuperGlue's criterion of a correct match.

    Args:
        xy_a, xy_b: matches (K,2) in pixels.
        K_a, K_b: intrinsics (3,3).
        T_ab: true pose, (3,4) or (4,4), with a translation other than zero.
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
    """Epipolar distances (K,) in pixels of matches: the larger of the distances of both points to
    their epipolar lines.

    Args:
        xy_a, xy_b: matches (K,2).
        F: fundamental matrix (3,3), x_b^T F x_a = 0.

    Returns:
        inf if a point is the epipole, which has no epipolar line.
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
    """Area under the recall-error curve up to each threshold, divided by the threshold (0..1).

    Failures (None, inf, NaN) count as infinite errors. The curve is linear between errors, as in
    SuperGlue's evaluation.
    """
    ordered = sorted(math.inf if e is None or not math.isfinite(e) else e for e in errors)
    if not ordered:
        return [0.0 for _ in thresholds]
    recall = [(i + 1) / len(ordered) for i in range(len(ordered))]
    areas = []
    for threshold in thresholds:
        x, y = [0.0], [0.0]
        for e, r in zip(ordered, recall, strict=True):
            if e < threshold:
                x.append(e)
                y.append(r)
        x.append(float(threshold))
        y.append(y[-1])
        area = sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1))
        areas.append(area / threshold)
    return areas
