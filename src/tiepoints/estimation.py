"""Matches to a homography, a fundamental or essential matrix, or a pose, by robust estimators.

Failure is a value, not an exception. The inliers of a model are computed here with the same errors
for every backend, and ``verification`` decides whether the model can be trusted. docs/matching.md
has the rules.
"""

from __future__ import annotations

import math
from typing import Any

import poselib
import torch
from torch import Tensor

from .structs import Estimate
from .verification import (
    SAMPLES,
    Correspondences,
    homogeneous,
    normalize_model,
    pose_matrix,
    unusable,
    verify_model,
)


# Options are flat keywords here and in ``relative_pose``, as in OpenCV's and PoseLib's estimators.
def estimate(
    xy_a: Tensor,
    xy_b: Tensor,
    geometry: str = "fundamental",
    *,
    K_a: Tensor | None = None,
    K_b: Tensor | None = None,
    backend: str = "poselib",
    threshold: float = 2.0,
    confidence: float = 0.9999,
    max_iterations: int = 10_000,
    min_iterations: int = 1_000,
    seed: int = 0,
    verify: bool = True,
) -> Estimate:
    """Estimate a two-view geometry from matches.

    Args:
        xy_a, xy_b: (K,2) matched points in pixels, of any real type and device. ``usac_prosac``
            expects the most certain ones first.
        geometry: ``homography`` (x_b ~ H x_a), ``fundamental`` (x_b^T F x_a = 0), ``essential``
            (the same for K^-1 x), or ``pose`` ([R | t] from camera a to camera b).
        K_a, K_b: (3,3) intrinsics, for ``essential`` and ``pose`` only; the points must be free of
            lens distortion.
        backend: ``poselib``; ``opencv``, its plain RANSAC; or a variant of OpenCV's USAC such as
            ``usac_magsac``.
        threshold: largest error of an inlier in pixels: the distance in image b for a homography,
            else Sampson's distance.
        confidence: probability, in (0, 1), of having drawn a sample free of outliers, at which the
            search stops.
        max_iterations: largest number of samples, at least 1.
        min_iterations: number of samples that PoseLib draws at least; OpenCV's backends have none.
        seed: of PoseLib's samples; OpenCV's estimators have a fixed generator of their own, so
            every backend but ``usac_parallel`` is repeatable.
        verify: False returns what the backend found, however few matches agree, as the protocols
            of papers require.

    Returns:
        an ``Estimate`` on the CPU. ``ok`` is false, with the reason, for too few, degenerate or
        inconsistent matches, and if they leave the model undetermined, as a plane or a camera that
        only rotated does a fundamental matrix.

    Raises:
        ValueError: invalid shapes, geometry, intrinsics, backend or number.
        ImportError: the backend needs OpenCV, which is missing.
    """
    _check_options(geometry, threshold, confidence, max_iterations, min_iterations, seed)
    a, b = _points("xy_a", xy_a), _points("xy_b", xy_b)
    if len(a) != len(b):
        raise ValueError(f"matched points come in pairs, got {len(a)} and {len(b)}")
    matches = Correspondences(geometry, a, b, _cameras(geometry, K_a, K_b), threshold)
    method = _opencv_method(geometry, backend)

    if reason := unusable(matches):
        return matches.failed(reason)
    models = (
        _by_poselib(matches, confidence, int(max_iterations), int(min_iterations), int(seed))
        if method is None
        else _by_opencv(matches, method, confidence, int(max_iterations))
    )
    models = [m for m in models if bool(torch.isfinite(m).all()) and float(m.abs().max()) > 0]
    if not models:
        return matches.failed(f"{backend} found no {geometry}")
    model = max(
        (_oriented(matches, m) for m in models), key=lambda m: int(matches.inliers(m).sum())
    )
    if verify:
        return verify_model(matches, model)
    return Estimate(geometry, normalize_model(geometry, model), matches.inliers(model), True)


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
    min_iterations: int = 1_000,
    seed: int = 0,
    verify: bool = True,
) -> Estimate:
    """Pose between two calibrated cameras: ``model`` (3,4) = [R | t], |t| = 1, from camera a to
    camera b.

    ``estimate(..., "pose")`` with the defaults of papers on relative pose; arguments, result and
    errors are the same.
    """
    options: dict[str, Any] = {
        "threshold": threshold,
        "confidence": confidence,
        "max_iterations": max_iterations,
        "min_iterations": min_iterations,
        "seed": seed,
    }
    return estimate(xy_a, xy_b, "pose", K_a=K_a, K_b=K_b, backend=backend, verify=verify, **options)


def backends(geometry: str = "fundamental") -> list[str]:
    """Available backends for a geometry: PoseLib, and those of OpenCV if it is installed."""
    try:
        return ["poselib", *_opencv_methods(geometry)]
    except ImportError:
        return ["poselib"]


# ---- arguments


def _check_options(
    geometry: str,
    threshold: float,
    confidence: float,
    max_iterations: int,
    min_iterations: int,
    seed: int,
) -> None:
    if geometry not in SAMPLES:
        raise ValueError(f"geometry must be one of {', '.join(SAMPLES)}; got {geometry!r}")
    for name, value, valid, accepted in (
        ("threshold", threshold, 0 < threshold < math.inf, "positive and finite"),
        ("confidence", confidence, 0 < confidence < 1, "in (0, 1)"),
        ("max_iterations", max_iterations, max_iterations >= 1, "at least 1"),
        ("min_iterations", min_iterations, min_iterations >= 0, "at least 0"),
        ("seed", seed, seed >= 0, "at least 0"),
    ):
        if not valid:
            raise ValueError(f"{name} must be {accepted}, got {value}")


def _points(name: str, xy: Tensor) -> Tensor:
    try:
        xy = torch.as_tensor(xy)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be points (K,2), got {type(xy).__name__}: {error}"
        ) from error
    if xy.ndim != 2 or xy.shape[1] != 2:
        raise ValueError(f"{name} must be points (K,2), got {tuple(xy.shape)}")
    if xy.is_complex() or xy.dtype == torch.bool:
        raise ValueError(f"{name} must be real numbers, got {xy.dtype}")
    return xy.detach().to("cpu", torch.float64)


def _cameras(geometry: str, K_a: Tensor | None, K_b: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both intrinsics (3,3), None for uncalibrated geometries."""
    calibrated = geometry in ("essential", "pose")
    if calibrated != (K_a is not None) or calibrated != (K_b is not None):
        raise ValueError(
            "K_a and K_b are required for essential and "
            f"pose{', and only for them' if not calibrated else ''}; got geometry {geometry!r}"
        )
    return (_intrinsics("K_a", K_a), _intrinsics("K_b", K_b)) if calibrated else None


def _intrinsics(name: str, K: Tensor | None) -> Tensor:
    try:
        K = torch.as_tensor(K)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be (3,3), got {type(K).__name__}: {error}") from error
    if K.shape != (3, 3):
        raise ValueError(f"{name} must be (3,3), got {tuple(K.shape)}")
    K = K.detach().to("cpu", torch.float64)
    upper = K[1, 0] == 0 and K[2].tolist() == [0, 0, 1]
    if not (bool(torch.isfinite(K).all()) and upper and K[0, 0] > 0 and K[1, 1] > 0):
        raise ValueError(
            f"{name} must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]], finite, fx and fy positive; "
            f"got {K.tolist()}"
        )
    return K


def _opencv_methods(geometry: str) -> dict[str, int]:
    import cv2

    usac = {name.lower(): getattr(cv2, name) for name in dir(cv2) if name.startswith("USAC_")}
    if geometry != "fundamental":
        usac.pop("usac_fm_8pts", None)  # samples of eight points, for a fundamental matrix only
    return {"opencv": cv2.RANSAC, **usac}


def _opencv_method(geometry: str, backend: str) -> int | None:
    """OpenCV's flag of a backend; None for PoseLib."""
    if backend == "poselib":
        return None
    try:
        methods = _opencv_methods(geometry)
    except ImportError as error:
        if backend == "opencv" or backend.startswith("usac_"):
            raise ImportError(
                f"the backend {backend} needs OpenCV: pip install 'tiepoints[opencv]'"
            ) from error
        raise ValueError(
            "backend must be poselib, or with OpenCV installed opencv or a usac_...; got "
            f"{backend!r}"
        ) from error
    if backend not in methods:
        raise ValueError(
            f"backend of a {geometry} must be one of poselib, {', '.join(methods)}; got {backend!r}"
        )
    return methods[backend]


# ---- backends


def _oriented(matches: Correspondences, model: Tensor) -> Tensor:
    """A homography with the sign that puts most matches on the visible side of the horizon; other
    models unchanged.
    """
    if matches.geometry != "homography":
        return model
    depth = (homogeneous(matches.a) @ model[2])[matches.fits(model)]
    return -model if (depth < 0).sum() > (depth > 0).sum() else model


def _by_poselib(
    matches: Correspondences, confidence: float, max_iterations: int, min_iterations: int, seed: int
) -> list[Tensor]:
    options: dict[str, Any] = {
        "max_iterations": max_iterations,
        "min_iterations": min_iterations,
        "success_prob": confidence,
        "seed": seed,
        "max_reproj_error": matches.threshold,
        "max_epipolar_error": matches.threshold,
    }
    try:
        if matches.K is None:
            run = (
                poselib.estimate_homography
                if matches.geometry == "homography"
                else poselib.estimate_fundamental
            )
            found = run(matches.a.numpy(), matches.b.numpy(), options, {})[0]
            return [torch.tensor(found, dtype=torch.float64)]
        # PoseLib's cameras have no skew, so it gets rays times the focal length instead of pixels
        focal = [float(K[0, 0] + K[1, 1]) / 2 for K in matches.K]
        points = [(f * matches.rays(side)[:, :2]).numpy() for side, f in enumerate(focal)]
        cameras = [
            {"model": "SIMPLE_PINHOLE", "width": 1, "height": 1, "params": [f, 0.0, 0.0]}
            for f in focal
        ]
        pose, _ = poselib.estimate_relative_pose(*points, *cameras, options, {})
        R, t = (torch.tensor(value, dtype=torch.float64) for value in (pose.R, pose.t))
        return [pose_matrix(R, t)]
    except (RuntimeError, ValueError):
        return []


def _by_opencv(
    matches: Correspondences, method: int, confidence: float, max_iterations: int
) -> list[Tensor]:
    import cv2

    t = matches.threshold
    try:
        if matches.K is None:
            a, b = matches.a.numpy(), matches.b.numpy()
            if matches.geometry == "homography":
                found, _ = cv2.findHomography(
                    a, b, method, t, maxIters=max_iterations, confidence=confidence
                )
            else:
                found, _ = cv2.findFundamentalMat(a, b, method, t, confidence, max_iterations)
        else:
            # one camera of the mean focal length for both images, because USAC's neighborhood grid
            # is in pixels
            focal = float(torch.stack([K[i, i] for K in matches.K for i in (0, 1)]).mean())
            K = torch.diag(torch.tensor([focal, focal, 1.0], dtype=torch.float64))
            K[:2, 2] = matches.K[0][:2, 2]
            a, b = ((matches.rays(side) @ K.T)[:, :2].numpy() for side in (0, 1))
            found, _ = cv2.findEssentialMat(a, b, K.numpy(), method, confidence, t, max_iterations)
    except cv2.error:
        return []
    if found is None or found.size % 9:
        return []
    solutions = torch.from_numpy(found).double().reshape(-1, 3, 3)  # OpenCV stacks them
    if matches.K is None:
        return list(solutions)
    poses = []
    for E in solutions:
        if bool(torch.isfinite(E).all()) and float(E.abs().max()) > 0:
            R_1, R_2, t_ab = (torch.from_numpy(m) for m in cv2.decomposeEssentialMat(E.numpy()))
            poses += [pose_matrix(R, sign * t_ab[:, 0]) for R in (R_1, R_2) for sign in (1, -1)]
    return poses
