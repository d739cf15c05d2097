"""Matches to a homography or fundamental matrix by PoseLib's robust estimators; failure is a value, not an exception."""

from __future__ import annotations

import math

import poselib
import torch
from torch import Tensor

from .structs import Estimate

#: Inliers below which a model proves nothing: some matches beyond the minimal sample (4 and 7) agree by chance.
MIN_INLIERS = {"homography": 8, "fundamental": 12}
MIN_MATCHES = {"homography": 4, "fundamental": 8}
#: Ratio of the smaller to the larger spread of the points below which they lie on a line.
FLAT = 1e-3


def estimate(
    xy_a: Tensor,
    xy_b: Tensor,
    kind: str = "fundamental",
    *,
    threshold: float = 2.0,
    confidence: float = 0.9999,
    max_iterations: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Geometry that most matches obey.

    Args:
        xy_a, xy_b: (K,2) matched points in pixels.
        kind: ``homography`` (x_b ~ H x_a) or ``fundamental`` (x_b^T F x_a = 0).
        threshold: largest reprojection or epipolar error of an inlier in pixels.

    Returns:
        an ``Estimate``; ``ok`` is false, with the reason, for too few, degenerate or disagreeing matches.

    Raises:
        ValueError: shapes, kind or threshold are wrong.
    """
    if kind not in MIN_INLIERS:
        raise ValueError(f"kind must be homography or fundamental, got {kind!r}")
    if xy_a.shape != xy_b.shape or xy_a.ndim != 2 or xy_a.shape[1] != 2:
        raise ValueError(f"points must be two (K,2), got {tuple(xy_a.shape)} and {tuple(xy_b.shape)}")
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    none = torch.zeros(len(xy_a), dtype=torch.bool)

    def failed(reason: str) -> Estimate:
        return Estimate(kind, None, none, False, reason)

    if len(xy_a) < MIN_MATCHES[kind]:
        return failed(f"{len(xy_a)} matches; a {kind} needs at least {MIN_MATCHES[kind]}")
    a, b = xy_a.to(torch.float64).cpu(), xy_b.to(torch.float64).cpu()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return failed("some points are not finite")
    if _on_a_line(a) or _on_a_line(b):
        return failed("the points lie on one line or in one place")
    options = {"max_iterations": max_iterations, "success_prob": confidence, "seed": seed}
    run, name = (
        (poselib.estimate_homography, "max_reproj_error")
        if kind == "homography"
        else (poselib.estimate_fundamental, "max_epipolar_error")
    )
    try:
        model, info = run(a.numpy(), b.numpy(), {name: threshold, **options}, {})
    except (RuntimeError, ValueError) as error:
        return failed(f"PoseLib found no {kind} ({error})")
    matrix = torch.tensor(model, dtype=torch.float64)
    inliers = torch.tensor(info["inliers"], dtype=torch.bool)
    if len(inliers) != len(a) or not torch.isfinite(matrix).all() or not float(matrix.abs().max()) > 0:
        return failed(f"PoseLib found no {kind}")
    count = int(inliers.sum())
    if count < MIN_INLIERS[kind]:
        return failed(f"{count} matches agree; {MIN_INLIERS[kind]} are needed to trust a {kind}")
    if _on_a_line(a[inliers]) or _on_a_line(b[inliers]):
        return failed("the matches that agree lie on one line or in one place")
    scale = matrix[2, 2] if kind == "homography" and abs(float(matrix[2, 2])) > 1e-12 else matrix.norm()
    return Estimate(kind, matrix / scale, inliers, True)


def _on_a_line(xy: Tensor) -> bool:
    spread = torch.linalg.svdvals(xy - xy.mean(dim=0))
    return not float(spread[0]) > 0 or float(spread[1]) < FLAT * float(spread[0]) or math.isnan(float(spread[0]))
