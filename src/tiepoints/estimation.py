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


def relative_pose(
    xy_a: Tensor,
    xy_b: Tensor,
    K_a: Tensor,
    K_b: Tensor,
    *,
    backend: str = "poselib",
    threshold: float = 1.0,
    confidence: float = 0.99999,
    max_iterations: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Pose between two calibrated cameras from matches: ``model`` (3,4) = [R | t], |t| = 1, camera a to camera b.

    Args:
        xy_a, xy_b: (K,2) matched points in pixels.
        K_a, K_b: (3,3) intrinsics.
        backend: ``poselib``, or ``opencv`` (essential matrix by RANSAC, then the decomposition with most points in front).
        threshold: largest epipolar error of an inlier in pixels.

    Raises:
        ValueError: shapes or backend are wrong.
        ImportError: OpenCV is asked for and missing.
    """
    if xy_a.shape != xy_b.shape or xy_a.ndim != 2 or xy_a.shape[1] != 2:
        raise ValueError(f"points must be two (K,2), got {tuple(xy_a.shape)} and {tuple(xy_b.shape)}")
    if backend not in ("poselib", "opencv"):
        raise ValueError(f"backend must be poselib or opencv, got {backend!r}")
    none = torch.zeros(len(xy_a), dtype=torch.bool)
    if len(xy_a) < 5:
        return Estimate("pose", None, none, False, f"{len(xy_a)} matches; a pose needs at least 5")
    if not (torch.isfinite(xy_a).all() and torch.isfinite(xy_b).all()):
        return Estimate("pose", None, none, False, "some points are not finite")
    if _on_a_line(xy_a.double().cpu()) or _on_a_line(xy_b.double().cpu()):
        return Estimate("pose", None, none, False, "the points lie on one line or in one place")
    a, b = xy_a.to(torch.float64).cpu().numpy(), xy_b.to(torch.float64).cpu().numpy()
    K_a, K_b = K_a.to(torch.float64).cpu(), K_b.to(torch.float64).cpu()
    if backend == "poselib":
        options = {"max_epipolar_error": threshold, "max_iterations": max_iterations, "success_prob": confidence, "seed": seed}
        pose, info = poselib.estimate_relative_pose(a, b, _camera(K_a), _camera(K_b), options, {})
        R, t = torch.tensor(pose.R, dtype=torch.float64), torch.tensor(pose.t, dtype=torch.float64)
        inliers = torch.tensor(info["inliers"], dtype=torch.bool)
    else:
        R, t, inliers = _opencv_pose(a, b, K_a, K_b, threshold, confidence, max_iterations)
    if len(inliers) != len(a) or int(inliers.sum()) < 5 or not (torch.isfinite(R).all() and float(t.norm()) > 0):
        return Estimate("pose", None, none, False, f"{backend} found no pose")
    return Estimate("pose", torch.cat([R, (t / t.norm())[:, None]], dim=1), inliers, True)


def _camera(K: Tensor) -> dict:
    params = [float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2])]
    # PoseLib asks for an image size but uses only the parameters here
    return {"model": "PINHOLE", "width": int(2 * params[2]) + 1, "height": int(2 * params[3]) + 1, "params": params}


def _opencv_pose(a, b, K_a: Tensor, K_b: Tensor, threshold: float, confidence: float, max_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    try:
        import cv2
    except ImportError as error:
        raise ImportError("the opencv backend needs OpenCV: pip install 'tiepoints[opencv]'") from error
    import numpy as np

    failed = torch.zeros(3, 3), torch.zeros(3), torch.zeros(len(a), dtype=torch.bool)
    rays = [(xy - K[[0, 1], [2, 2]].numpy()) / K[[0, 1], [0, 1]].numpy() for xy, K in ((a, K_a), (b, K_b))]
    focal = float(torch.stack([K_a[0, 0], K_a[1, 1], K_b[0, 0], K_b[1, 1]]).mean())
    try:
        stack, mask = cv2.findEssentialMat(
            rays[0], rays[1], np.eye(3), method=cv2.RANSAC, prob=confidence, threshold=threshold / focal, maxIters=max_iterations
        )
    except cv2.error:
        return failed
    if stack is None:
        return failed
    best, found = 0, failed
    for E in np.split(stack, len(stack) // 3):  # several solutions come stacked
        count, R, t, front = cv2.recoverPose(E, rays[0], rays[1], np.eye(3), 1e9, mask=mask.copy())[:4]
        if count > best:
            best, found = count, (torch.from_numpy(R), torch.from_numpy(t[:, 0]), torch.from_numpy(front.ravel() > 0))
    return found


def _on_a_line(xy: Tensor) -> bool:
    spread = torch.linalg.svdvals(xy - xy.mean(dim=0))
    return not float(spread[0]) > 0 or float(spread[1]) < FLAT * float(spread[0]) or math.isnan(float(spread[0]))
