"""Matches to a homography, a fundamental or essential matrix, or a pose, by robust estimators;
failure is a value, not an exception.

Whatever the backend, its model is judged here by one set of errors, and trusted only where chance
or a simpler geometry does not explain the matches as well: docs/matching.md has the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import poselib
import torch
from torch import Tensor

from .geometry import warp_points
from .structs import Estimate

#: Matches that fix a model, and how many models they can fix.
SAMPLES = {"homography": (4, 1), "fundamental": (7, 3), "essential": (5, 10), "pose": (5, 10)}
#: Largest expected number of models that chance would support as well as the one found.
FALSE_ALARMS = 1e-3
#: Wrong pairs of points looked at to learn how often chance agrees with a model.
WRONG_PAIRS = 16_384
#: A simpler geometry explains a match within so many thresholds: noise past the threshold is no
#: evidence against it.
SLACK = 2.0
#: Ratio of the smaller to the larger spread of the points below which they lie on a line.
FLAT = 1e-3
#: Beyond it, in pixels, float32 no longer resolves a tenth of a pixel.
FAR = 1e6


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
    seed: int = 0,
    verify: bool = True,
) -> Estimate:
    """Geometry that the matches obey.

    Args:
        xy_a, xy_b: (K,2) matched points in pixels, of any real type and device. ``usac_prosac``
            wants the surest first.
        geometry: ``homography`` (x_b ~ H x_a), ``fundamental`` (x_b^T F x_a = 0), ``essential``
            (the same for K^-1 x), or ``pose`` ([R | t] from camera a to camera b).
        K_a, K_b: (3,3) intrinsics, for ``essential`` and ``pose`` only; points are to be free of
            lens distortion.
        backend: ``poselib``; ``opencv``, its plain RANSAC; or a variant of OpenCV's USAC such as
            ``usac_magsac``.
        threshold: largest error of an inlier in pixels: of a homography the distance in image b,
            else Sampson's distance.
        confidence: probability, in (0, 1), of having drawn a sample free of outliers, at which the
            search stops.
        max_iterations: number of samples, at least 1, at which it stops anyway.
        seed: of PoseLib's samples; OpenCV's estimators have a fixed generator of their own, so
            every backend but ``usac_parallel`` gives the same answer to the same matches.
        verify: False gives what the backend found, however few matches agree: the protocols of
            papers measure that.

    Returns:
        an ``Estimate`` on the CPU. ``ok`` is false, with the reason, for too few, degenerate or
        disagreeing matches, and where they leave the model open: a plane or a camera that only
        turned has no fundamental matrix to be found.

    Raises:
        ValueError: shapes, geometry, intrinsics, backend or a number are wrong.
        ImportError: OpenCV is asked for and missing.
    """
    if geometry not in SAMPLES:
        raise ValueError(f"geometry must be one of {', '.join(SAMPLES)}; got {geometry!r}")
    for name, value, fits, wanted in (
        ("threshold", threshold, 0 < threshold < math.inf, "positive and finite"),
        ("confidence", confidence, 0 < confidence < 1, "in (0, 1)"),
        ("max_iterations", max_iterations, max_iterations >= 1, "at least 1"),
        ("seed", seed, seed >= 0, "at least 0"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {wanted}, got {value}")
    a, b = _points("xy_a", xy_a), _points("xy_b", xy_b)
    if len(a) != len(b):
        raise ValueError(f"matched points come in pairs, got {len(a)} and {len(b)}")
    calibrated = geometry in ("essential", "pose")
    if calibrated != (K_a is not None) or calibrated != (K_b is not None):
        raise ValueError(
            "K_a and K_b go with essential and "
            f"pose{', and only with them' if not calibrated else ''}; got geometry {geometry!r}"
        )
    K = (_intrinsics("K_a", K_a), _intrinsics("K_b", K_b)) if calibrated else None
    method = _method(geometry, backend)
    matches = _Matches(geometry, a, b, K, threshold)

    if reason := _unusable(matches):
        return matches.failed(reason)
    models = (
        _by_poselib(matches, confidence, int(max_iterations), int(seed))
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
        return _verified_estimate(matches, model)
    return Estimate(geometry, _scaled(geometry, model), matches.inliers(model), True)


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
    verify: bool = True,
) -> Estimate:
    """Pose between two calibrated cameras: ``model`` (3,4) = [R | t], |t| = 1, camera a to camera
    b.

    ``estimate(..., "pose")`` with the defaults of the papers on poses: arguments, result and errors
    are its own.
    """
    options: dict[str, Any] = {
        "threshold": threshold,
        "confidence": confidence,
        "max_iterations": max_iterations,
        "seed": seed,
    }
    return estimate(xy_a, xy_b, "pose", K_a=K_a, K_b=K_b, backend=backend, verify=verify, **options)


def backends(geometry: str = "fundamental") -> list[str]:
    """The backends for a geometry of model: PoseLib, and what the installed OpenCV offers (none
    where it is missing).
    """
    try:
        return ["poselib", *_opencv_methods(geometry)]
    except ImportError:
        return ["poselib"]


# ---- arguments


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
        usac.pop("usac_fm_8pts", None)  # eight points for a fundamental matrix
    return {"opencv": cv2.RANSAC, **usac}


def _method(geometry: str, backend: str) -> int | None:
    """OpenCV's number of a backend; None is PoseLib."""
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


# ---- errors of a model


@dataclass(frozen=True)
class _Matches:
    """What is asked for, checked: K pairs of points (K,2) float64, intrinsics where calibrated,
    threshold in pixels.

    A model is a matrix (3,3), or a pose (3,4) also where the essential matrix is asked for.
    """

    geometry: str
    a: Tensor
    b: Tensor
    K: tuple[Tensor, Tensor] | None
    threshold: float

    def __len__(self) -> int:
        return len(self.a)

    def failed(self, reason: str, inliers: Tensor | None = None) -> Estimate:
        return Estimate(
            self.geometry,
            None,
            torch.zeros(len(self), dtype=torch.bool) if inliers is None else inliers,
            False,
            reason,
        )

    def error(self, model: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Distance in pixels of pairs of points from a model; nan where there is none."""
        if self.geometry == "homography":
            return (warp_points(a, model) - b).norm(dim=1)
        if self.K is not None:
            back_a, back_b = (torch.linalg.inv(K) for K in self.K)
            model = back_b.T @ _essential(model) @ back_a
        line_b, line_a = _homogeneous(a) @ model.T, _homogeneous(b) @ model
        return (line_b * _homogeneous(b)).sum(dim=1).abs() / torch.cat(
            [line_a[:, :2], line_b[:, :2]], dim=1
        ).norm(dim=1)

    def fits(self, model: Tensor, slack: float = 1.0) -> Tensor:
        return self.error(model, self.a, self.b) <= slack * self.threshold

    def inliers(self, model: Tensor) -> Tensor:
        """Matches that fit and could have been seen: in front of both cameras, or before the
        horizon of a plane.
        """
        fits = self.fits(model)
        if self.geometry == "homography":
            return fits & (_homogeneous(self.a) @ model[2] > 0)
        return fits if self.K is None else fits & self.in_front(model)

    def in_front(self, pose: Tensor) -> Tensor:
        """Whether the rays meet before both cameras: the signs of the depths that solve ``depth_b y
        = depth_a R x + t``.
        """
        x, y, t = self.rays(0) @ pose[:, :3].T, self.rays(1), pose[:, 3].expand(len(self), 3)
        normal = torch.linalg.cross(x, y)
        depth_a = (torch.linalg.cross(y, t) * normal).sum(dim=1)
        depth_b = (torch.linalg.cross(x, t) * normal).sum(dim=1)
        return (depth_a > 0) & (depth_b > 0)

    def rays(self, side: int) -> Tensor:
        """(K,3) with third number 1."""
        assert self.K is not None
        return _homogeneous((self.a, self.b)[side]) @ torch.linalg.inv(self.K[side]).T


def _homogeneous(xy: Tensor) -> Tensor:
    return torch.cat([xy, torch.ones_like(xy[:, :1])], dim=1)


def _essential(pose: Tensor) -> Tensor:
    return torch.linalg.cross(pose[:, 3:].expand(3, 3), pose[:, :3], dim=0)


def _oriented(matches: _Matches, model: Tensor) -> Tensor:
    """A homography with the sign that sees most of its matches; other models as they are."""
    if matches.geometry != "homography":
        return model
    seen = (_homogeneous(matches.a) @ model[2])[matches.fits(model)]
    return -model if (seen < 0).sum() > (seen > 0).sum() else model


# ---- backends


def _by_poselib(
    matches: _Matches, confidence: float, max_iterations: int, seed: int
) -> list[Tensor]:
    options: dict[str, Any] = {
        "max_iterations": max_iterations,
        "success_prob": confidence,
        "seed": seed,
    }
    for error in ("max_reproj_error", "max_epipolar_error"):
        options[error] = matches.threshold
    try:
        if matches.K is None:
            run = (
                poselib.estimate_homography
                if matches.geometry == "homography"
                else poselib.estimate_fundamental
            )
            return [
                torch.tensor(
                    run(matches.a.numpy(), matches.b.numpy(), options, {})[0], dtype=torch.float64
                )
            ]
        # rays times the focal length stand for pixels: PoseLib's cameras have no skew
        focal = [float(K[0, 0] + K[1, 1]) / 2 for K in matches.K]
        points = [(f * matches.rays(side)[:, :2]).numpy() for side, f in enumerate(focal)]
        cameras = [
            {"model": "SIMPLE_PINHOLE", "width": 1, "height": 1, "params": [f, 0.0, 0.0]}
            for f in focal
        ]
        pose, _ = poselib.estimate_relative_pose(*points, *cameras, options, {})
        return [
            _pose(
                torch.tensor(pose.R, dtype=torch.float64), torch.tensor(pose.t, dtype=torch.float64)
            )
        ]
    except (RuntimeError, ValueError):
        return []


def _by_opencv(
    matches: _Matches, method: int, confidence: float, max_iterations: int
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
            # one camera for both sides, of the mean focal length: USAC's grid of neighbours counts
            # in pixels
            focal = float(torch.stack([K[i, i] for K in matches.K for i in (0, 1)]).mean())
            K = torch.diag(torch.tensor([focal, focal, 1.0], dtype=torch.float64))
            K[:2, 2] = matches.K[0][:2, 2]
            a, b = ((matches.rays(side) @ K.T)[:, :2].numpy() for side in (0, 1))
            found, _ = cv2.findEssentialMat(a, b, K.numpy(), method, confidence, t, max_iterations)
    except cv2.error:
        return []
    if found is None or found.size % 9:
        return []
    several = torch.from_numpy(found).double().reshape(-1, 3, 3)  # solutions come stacked
    if matches.K is None:
        return list(several)
    poses = []
    for E in several:
        if bool(torch.isfinite(E).all()) and float(E.abs().max()) > 0:
            turn_1, turn_2, t_ab = (
                torch.from_numpy(m) for m in cv2.decomposeEssentialMat(E.numpy())
            )
            poses += [_pose(R, sign * t_ab[:, 0]) for R in (turn_1, turn_2) for sign in (1, -1)]
    return poses


def _pose(R: Tensor, t: Tensor) -> Tensor:
    return torch.cat([R, (t / t.norm())[:, None]], dim=1)


# ---- what a model is worth


def _unusable(matches: _Matches) -> str:
    """Why no model can come of the matches; empty where one can."""
    least = SAMPLES[matches.geometry][0]
    if len(matches) <= least:
        return (
            f"{len(matches)} matches; a {matches.geometry} is fixed by {least} and needs more to "
            "be "
            "trusted"
        )
    if not bool(torch.isfinite(matches.a).all() & torch.isfinite(matches.b).all()):
        return "some points are not finite"
    if float(torch.cat([matches.a, matches.b]).abs().max()) > FAR:
        return f"some points are further than {FAR:.0e} pixels away"
    if _collinear(matches.a) or _collinear(matches.b):
        return "the points lie on one line or in one place"
    return ""


def _collinear(xy: Tensor) -> bool:
    spread = torch.linalg.svdvals(xy - xy.mean(dim=0))
    return float(spread[1]) <= FLAT * float(spread[0])


def _verified_estimate(matches: _Matches, model: Tensor) -> Estimate:
    sample, solutions = SAMPLES[matches.geometry]
    chance = _chance(matches, model)

    def by_chance(agreeing: Tensor) -> bool:
        return _false_alarms(matches, agreeing, sample, solutions, chance) > FALSE_ALARMS

    fits = matches.fits(model)
    if by_chance(fits):
        return matches.failed(
            f"{int(fits.sum())} of {len(matches)} matches agree; chance can do the same"
        )

    def rest_by_chance(explained: Tensor, freedom: int) -> bool:
        """Whether chance may have made the matches fit that a simpler geometry leaves; ``freedom``
        of them then fix the model.
        """
        return (
            _false_alarms(matches, fits & ~explained, freedom, 1, chance, of=~explained)
            > FALSE_ALARMS
        )

    if reason := _degenerate(matches, model, fits, rest_by_chance):
        return matches.failed(reason, fits)
    inliers = matches.inliers(model)
    if by_chance(inliers):
        return matches.failed("most matches that agree lie behind a camera or the horizon")
    return Estimate(matches.geometry, _scaled(matches.geometry, model), inliers, True)


def _scaled(geometry: str, model: Tensor) -> Tensor:
    """A model with the free factor set; the essential matrix of a pose where that is asked for."""
    if geometry == "homography":
        corner = float(model[2, 2])
        return model / (corner if abs(corner) > 1e-12 * float(model.norm()) else model.norm())
    if geometry == "fundamental":
        return model / model.norm()
    return _essential(model) if geometry == "essential" else model


def _chance(matches: _Matches, model: Tensor) -> float:
    """Probability that a wrong pair fits the model, from pairs of points that were not matched."""
    n = len(matches)
    if n * (n - 1) <= WRONG_PAIRS:
        i, j = (~torch.eye(n, dtype=torch.bool)).nonzero().T
    else:
        rng = torch.Generator().manual_seed(0)
        i = torch.randint(n, (WRONG_PAIRS,), generator=rng)
        j = (i + 1 + torch.randint(n - 1, (WRONG_PAIRS,), generator=rng)) % n
    wrong = ~_same(matches, i, j)
    i, j = i[wrong], j[wrong]
    agreeing = int((matches.error(model, matches.a[i], matches.b[j]) <= matches.threshold).sum())
    return (agreeing + 1) / (len(i) + 1)


def _same(matches: _Matches, i: Tensor, j: Tensor) -> Tensor:
    """Whether two matches are one seen twice, as by two levels of a pyramid: within the threshold
    on both sides.
    """
    apart = torch.cat([matches.a[i] - matches.a[j], matches.b[i] - matches.b[j]], dim=-1)
    return apart.abs().amax(dim=-1) <= matches.threshold


def _different(matches: _Matches, chosen: Tensor, enough: int = 256) -> int:
    """Number of chosen matches that are not the same as one counted before; above ``enough``
    counted roughly, by cells.
    """
    index = chosen.nonzero()[:, 0]
    if len(index) > enough:
        cells = (
            torch.cat([matches.a, matches.b], dim=1)[index].div(matches.threshold).floor().long()
        )
        key = (cells * torch.tensor([1, 1_000_003, 1_000_003**2, 1_000_003**3])).sum(
            dim=1
        )  # sooner or later two cells share one
        _, cell = key.unique(return_inverse=True)
        count = int(cell.max()) + 1
        if count > enough:
            return count
        index = index[
            torch.zeros(count, dtype=torch.int64).scatter_(0, cell, torch.arange(len(cell)))
        ]  # one of each cell
    same = _same(matches, index[:, None], index).numpy()
    new = np.ones(len(index), dtype=bool)
    for i in range(len(index)):
        if new[i]:
            new[i + 1 :] &= ~same[i, i + 1 :]
    return int(new.sum())


def _false_alarms(
    matches: _Matches,
    agreeing: Tensor,
    sample: int,
    solutions: int,
    chance: float,
    of: Tensor | None = None,
) -> float:
    """Expected number of models, one for each sample of the n matches ``of``, that at least as many
    matches fit by chance.

    ``solutions * C(n, s) * P(Binomial(n - s, chance) >= k - s)``: Desolneux, Moisan and Morel's
    number of false alarms.
    """
    total = len(matches) if of is None else int(of.sum())
    found = int(agreeing.sum())
    k = _different(matches, agreeing)
    if k <= sample or chance >= 1:
        return math.inf
    n = max(k, round(total * k / found))  # repetitions thin out all matches alike
    more = torch.arange(k - sample, n - sample + 1, dtype=torch.float64)
    tail = (
        _log_choose(n - sample, more)
        + more * math.log(chance)
        + (n - sample - more) * math.log1p(-chance)
    )
    log = (
        math.log(solutions)
        + float(_log_choose(n, torch.tensor(float(sample))))
        + min(0.0, float(tail.logsumexp(dim=0)))
    )
    return math.exp(min(log, 700.0))


def _log_choose(n: int, k: Tensor) -> Tensor:
    k = k.double()
    return math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


# ---- simpler geometries that would explain the matches and leave the model open


def _degenerate(
    matches: _Matches, model: Tensor, fits: Tensor, rest_by_chance: Callable[[Tensor, int], bool]
) -> str:
    """Why the matches that fit the model do not tell it from others that fit as well; empty where
    they do.
    """
    if matches.geometry == "homography":
        alone = rest_by_chance(_best_line(matches, fits), 2)
        return (
            "nearly all matches that agree lie on one line, which leaves the homography open"
            if alone
            else ""
        )
    plane = _plane(matches, fits)
    if plane is None:
        return ""
    flat = rest_by_chance(_near(matches, plane), 2)
    if matches.K is None:
        reason = (
            "the matches obey one homography (a plane, or a camera that only turned), which "
            "leaves the fundamental matrix open"
        )
        return reason if flat else ""
    K_a, K_b = matches.K
    of_rays = torch.linalg.inv(K_b) @ plane @ K_a
    of_rays = (
        of_rays * torch.linalg.det(of_rays).sign()
    )  # both cameras see the same side of the plane
    turned = _near(matches, K_b @ _nearest_rotation(matches, of_rays) @ torch.linalg.inv(K_a))
    if 2 * int((turned & fits).sum()) > int(fits.sum()) and rest_by_chance(turned, 2):
        return (
            "the camera only turned, or all points are far away: no direction of movement can be "
            "told"
        )
    twins = (
        [pose for pose in _poses_of_plane(of_rays) if not _similar_pose(pose, model)]
        if flat
        else []
    )
    if any(rest_by_chance(matches.fits(twin, SLACK) & matches.in_front(twin), 0) for twin in twins):
        return "the points lie in one plane, which two poses explain"
    return ""


def _near(matches: _Matches, H: Tensor) -> Tensor:
    return (warp_points(matches.a, H) - matches.b).norm(dim=1) <= SLACK * matches.threshold


def _best_line(matches: _Matches, fits: Tensor) -> Tensor:
    """Which matches lie, in image b, on the line through two of those that fit that passes by most
    of them.
    """
    xy = matches.b[fits]
    ends = xy[
        torch.linspace(0, len(xy) - 1, min(len(xy), 32)).round().long()
    ]  # half of the points on it: surely met
    i, j = torch.triu_indices(len(ends), len(ends), 1)
    along = ends[j] - ends[i]
    normal = torch.stack([-along[:, 1], along[:, 0]], dim=1) / along.norm(dim=1, keepdim=True)
    offset = (normal * ends[i]).sum(dim=1)
    some = xy[torch.linspace(0, len(xy) - 1, min(len(xy), 1000)).round().long()]
    reach = SLACK * matches.threshold
    best = ((some @ normal.T - offset).abs() <= reach).sum(dim=0).argmax()
    return (matches.b @ normal[best] - offset[best]).abs() <= reach


def _plane(matches: _Matches, fits: Tensor) -> Tensor | None:
    """The homography that most of the matches that fit obey, loosely."""
    a, b = matches.a[fits], matches.b[fits]
    if _collinear(a) or _collinear(b):
        return None
    found = _by_poselib(
        _Matches("homography", a, b, None, SLACK * matches.threshold), 0.9999, 1000, 0
    )
    return (
        found[0]
        if found
        and bool(torch.isfinite(found[0]).all())
        and float(torch.linalg.det(found[0]).abs()) > 0
        else None
    )


def _nearest_rotation(matches: _Matches, H: Tensor) -> Tensor:
    """The rotation next to a homography of rays, fitted to the rays that it takes to one
    another.
    """
    assert matches.K is not None
    K_a, K_b = matches.K
    R = _rotation(H)
    x, y = (torch.nn.functional.normalize(matches.rays(side), dim=1) for side in (0, 1))
    for _ in range(3):
        near = _near(matches, K_b @ R @ torch.linalg.inv(K_a))
        if int(near.sum()) < 3:
            break
        R = _rotation(y[near].T @ x[near])
    return R


def _rotation(M: Tensor) -> Tensor:
    """The rotation nearest to a matrix."""
    U, _, V = torch.linalg.svd(M)
    return (
        U
        @ torch.diag(torch.tensor([1.0, 1.0, float(torch.linalg.det(U @ V).sign())], dtype=M.dtype))
        @ V
    )


def _poses_of_plane(H: Tensor) -> list[Tensor]:
    """The four poses [R | t] of a homography between rays, H ~ R + t n^T (Ma, Soatto, Kosecka,
    Sastry 2004, section 5.3.3).
    """
    H = H / torch.linalg.svdvals(H)[1]
    square, V = torch.linalg.eigh(H.T @ H)  # ascending
    v3, v2, v1 = V.T
    low, high = (1 - square[0]).clamp(min=0).sqrt(), (square[2] - 1).clamp(min=0).sqrt()
    if float(low + high) < 1e-6:
        return []  # a rotation
    poses = []
    for sign in (1, -1):
        u = (low * v1 + sign * high * v3) / (square[2] - square[0]).sqrt()
        normal = torch.linalg.cross(v2, u)
        before = torch.stack([v2, u, normal], dim=1)
        after = torch.stack([H @ v2, H @ u, torch.linalg.cross(H @ v2, H @ u)], dim=1)
        R = _rotation(after @ before.T)
        t = (H - R) @ normal
        if float(t.norm()) > 0:
            poses += [_pose(R, t), _pose(R, -t)]
    return poses


def _similar_pose(pose: Tensor, other: Tensor, degrees: float = 5.0) -> bool:
    """Whether two poses differ by so little that it does not matter which is meant."""
    turn = ((pose[:, :3] * other[:, :3]).sum() - 1) / 2
    way = pose[:, 3] @ other[:, 3]
    return min(float(turn), float(way)) > math.cos(math.radians(degrees))
