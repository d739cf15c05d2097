"""Whether a two-view model can be trusted: agreement by chance and degenerate configurations.

A model is rejected if as many incorrect matches could fit it by chance (the a contrario test of
Desolneux, Moisan and Morel 2000), or if a simpler geometry explains its inliers and leaves the
model undetermined: points on one line, in one plane, or a camera that only rotated.
docs/matching.md has the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import poselib
import torch
from torch import Tensor

from .geometry import warp_points
from .structs import Estimate

#: Size of the minimal sample of a model, and its largest number of solutions.
SAMPLES = {"homography": (4, 1), "fundamental": (7, 3), "essential": (5, 10), "pose": (5, 10)}
#: Largest expected number of models that chance would support as well as the one found.
FALSE_ALARMS = 1e-3
#: Incorrect pairs of points from which the probability of agreement by chance is measured.
RANDOM_PAIRS = 16_384
#: A simpler geometry explains a match within this many thresholds: noise just beyond the threshold
#: is no evidence against it.
SLACK = 2.0
#: Points are collinear if the ratio of their smaller to their larger spread is at most this.
COLLINEAR_RATIO = 1e-3
#: Largest coordinate in pixels: beyond it float32 does not resolve a tenth of a pixel.
MAX_COORDINATE = 1e6


@dataclass(frozen=True)
class Correspondences:
    """K validated pairs of points and the geometry to estimate from them.

    A model is a matrix (3,3), or a pose (3,4) also if ``geometry`` is ``essential``.

    Attributes:
        geometry: a key of ``SAMPLES``.
        a, b: (K,2) float64 points in pixels.
        K: intrinsics (3,3) of both cameras, None for uncalibrated geometries.
        threshold: largest error of an inlier in pixels.
    """

    geometry: str
    a: Tensor
    b: Tensor
    K: tuple[Tensor, Tensor] | None
    threshold: float

    def __len__(self) -> int:
        return len(self.a)

    def failed(self, reason: str, inliers: Tensor | None = None) -> Estimate:
        """An estimate without a model."""
        if inliers is None:
            inliers = torch.zeros(len(self), dtype=torch.bool)
        return Estimate(self.geometry, None, inliers, False, reason)

    def error(self, model: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Error (N,) of a model in pixels at pairs of points (N,2); nan where it is undefined.

        The distance in image b for a homography, else Sampson's distance.
        """
        if self.geometry == "homography":
            return (warp_points(a, model) - b).norm(dim=1)
        if self.K is not None:
            inverse_a, inverse_b = (torch.linalg.inv(K) for K in self.K)
            model = inverse_b.T @ essential_matrix(model) @ inverse_a
        line_b, line_a = homogeneous(a) @ model.T, homogeneous(b) @ model
        return (line_b * homogeneous(b)).sum(dim=1).abs() / torch.cat(
            [line_a[:, :2], line_b[:, :2]], dim=1
        ).norm(dim=1)

    def fits(self, model: Tensor, slack: float = 1.0) -> Tensor:
        """Matches (K,) bool whose error is at most ``slack`` thresholds."""
        return self.error(model, self.a, self.b) <= slack * self.threshold

    def inliers(self, model: Tensor) -> Tensor:
        """Matches (K,) bool that fit and are physically possible: in front of both cameras, or on
        the visible side of the horizon of a plane.
        """
        fits = self.fits(model)
        if self.geometry == "homography":
            return fits & (homogeneous(self.a) @ model[2] > 0)
        return fits if self.K is None else fits & self.in_front(model)

    def in_front(self, pose: Tensor) -> Tensor:
        """Matches (K,) bool with positive depth in both cameras.

        The depths solve ``depth_b y = depth_a R x + t`` for the rays x and y.
        """
        x, y, t = self.rays(0) @ pose[:, :3].T, self.rays(1), pose[:, 3].expand(len(self), 3)
        normal = torch.linalg.cross(x, y)
        depth_a = (torch.linalg.cross(y, t) * normal).sum(dim=1)
        depth_b = (torch.linalg.cross(x, t) * normal).sum(dim=1)
        return (depth_a > 0) & (depth_b > 0)

    def rays(self, side: int) -> Tensor:
        """Rays (K,3) of image a (``side`` 0) or b (1), with third component 1."""
        assert self.K is not None
        return homogeneous((self.a, self.b)[side]) @ torch.linalg.inv(self.K[side]).T


# ---- models


def homogeneous(xy: Tensor) -> Tensor:
    """Points (N,2) with a third component of 1: (N,3)."""
    return torch.cat([xy, torch.ones_like(xy[:, :1])], dim=1)


def essential_matrix(pose: Tensor) -> Tensor:
    """``[t]x R`` (3,3) of a pose (3,4)."""
    return torch.linalg.cross(pose[:, 3:].expand(3, 3), pose[:, :3], dim=0)


def pose_matrix(R: Tensor, t: Tensor) -> Tensor:
    """The pose [R | t] (3,4) with |t| = 1."""
    return torch.cat([R, (t / t.norm())[:, None]], dim=1)


def normalize_model(geometry: str, model: Tensor) -> Tensor:
    """The model as ``Estimate`` holds it: its free factor fixed, a pose converted to an essential
    matrix if ``geometry`` is ``essential``.
    """
    if geometry == "homography":
        corner = float(model[2, 2])
        return model / (corner if abs(corner) > 1e-12 * float(model.norm()) else model.norm())
    if geometry == "fundamental":
        return model / model.norm()
    return essential_matrix(model) if geometry == "essential" else model


def _nearest_rotation(M: Tensor) -> Tensor:
    """The rotation nearest to a matrix (3,3)."""
    U, _, V = torch.linalg.svd(M)
    sign = float(torch.linalg.det(U @ V).sign())
    return U @ torch.diag(torch.tensor([1.0, 1.0, sign], dtype=M.dtype)) @ V


# ---- verification


def unusable(matches: Correspondences) -> str:
    """Why no model can be estimated from the matches; empty if one can."""
    minimum = SAMPLES[matches.geometry][0]
    if len(matches) <= minimum:
        return (
            f"{len(matches)} matches; a {matches.geometry} is determined by {minimum} and needs "
            "more to be trusted"
        )
    if not bool(torch.isfinite(matches.a).all() & torch.isfinite(matches.b).all()):
        return "some points are not finite"
    if float(torch.cat([matches.a, matches.b]).abs().max()) > MAX_COORDINATE:
        return f"some coordinates are larger than {MAX_COORDINATE:.0e} pixels"
    if _collinear(matches.a) or _collinear(matches.b):
        return "the points are collinear or coincident"
    return ""


def _collinear(xy: Tensor) -> bool:
    spread = torch.linalg.svdvals(xy - xy.mean(dim=0))
    return float(spread[1]) <= COLLINEAR_RATIO * float(spread[0])


def beyond_chance(matches: Correspondences, model: Tensor, alarms: float = FALSE_ALARMS) -> Tensor:
    """Matches (K,) bool that fit a model; none if chance explains them: if it is expected to
    support more than ``alarms`` models as well. Whether they determine the model
    (``verify_model``) takes several times as long.
    """
    fits = matches.fits(model)
    if _by_chance(matches, fits, _chance(matches, model), alarms):
        return torch.zeros_like(fits)
    return fits


def _by_chance(
    matches: Correspondences, inliers: Tensor, chance: float, alarms: float = FALSE_ALARMS
) -> bool:
    sample, solutions = SAMPLES[matches.geometry]
    return num_false_alarms(matches, inliers, sample, solutions, chance) > alarms


def verify_model(matches: Correspondences, model: Tensor) -> Estimate:
    """The estimate of a model, ``ok`` only if its support exceeds chance and is not degenerate."""
    chance = _chance(matches, model)
    fits = matches.fits(model)
    if _by_chance(matches, fits, chance):
        return matches.failed(
            f"{int(fits.sum())} of {len(matches)} matches agree, no more than chance explains"
        )

    def rest_by_chance(explained: Tensor, sample: int) -> bool:
        """Whether chance may explain the inliers that a simpler geometry does not, ``sample`` of
        which determine the model.
        """
        rest = fits & ~explained
        alarms = num_false_alarms(matches, rest, sample, 1, chance, of=~explained)
        return alarms > FALSE_ALARMS

    if reason := _degenerate(matches, model, fits, rest_by_chance):
        return matches.failed(reason, fits)
    inliers = matches.inliers(model)
    if _by_chance(matches, inliers, chance):
        return matches.failed("most matches that agree lie behind a camera or the horizon")
    return Estimate(matches.geometry, normalize_model(matches.geometry, model), inliers, True)


# ---- agreement by chance


def _chance(matches: Correspondences, model: Tensor) -> float:
    """Probability that an incorrect match fits the model, from pairs of points that were not
    matched.
    """
    n = len(matches)
    if n * (n - 1) <= RANDOM_PAIRS:
        i, j = (~torch.eye(n, dtype=torch.bool)).nonzero().T
    else:
        rng = torch.Generator().manual_seed(0)
        i = torch.randint(n, (RANDOM_PAIRS,), generator=rng)
        j = (i + 1 + torch.randint(n - 1, (RANDOM_PAIRS,), generator=rng)) % n
    incorrect = ~_duplicates(matches, i, j)
    i, j = i[incorrect], j[incorrect]
    agreeing = int((matches.error(model, matches.a[i], matches.b[j]) <= matches.threshold).sum())
    return (agreeing + 1) / (len(i) + 1)


def _duplicates(matches: Correspondences, i: Tensor, j: Tensor) -> Tensor:
    """Whether matches i and j are one observation, as a corner found on two pyramid levels: within
    the threshold in both images.
    """
    difference = torch.cat([matches.a[i] - matches.a[j], matches.b[i] - matches.b[j]], dim=-1)
    return difference.abs().amax(dim=-1) <= matches.threshold


def _count_unique(matches: Correspondences, selected: Tensor, exact: int = 256) -> int:
    """Number of selected matches (K,) bool without duplicates; above ``exact`` approximated by
    counting cells.
    """
    index = selected.nonzero()[:, 0]
    if len(index) > exact:
        cells = (
            torch.cat([matches.a, matches.b], dim=1)[index].div(matches.threshold).floor().long()
        )
        # a hash: two cells may share a key, which hardly changes the count
        key = (cells * torch.tensor([1, 1_000_003, 1_000_003**2, 1_000_003**3])).sum(dim=1)
        _, cell = key.unique(return_inverse=True)
        count = int(cell.max()) + 1
        if count > exact:
            return count
        one_per_cell = torch.zeros(count, dtype=torch.int64).scatter_(
            0, cell, torch.arange(len(cell))
        )
        index = index[one_per_cell]
    duplicates = _duplicates(matches, index[:, None], index).numpy()
    new = np.ones(len(index), dtype=bool)
    for i in range(len(index)):
        if new[i]:
            new[i + 1 :] &= ~duplicates[i, i + 1 :]
    return int(new.sum())


def num_false_alarms(
    matches: Correspondences,
    agreeing: Tensor,
    sample: int,
    solutions: int,
    chance: float,
    of: Tensor | None = None,
) -> float:
    """Expected number of models that at least as many of the matches fit by chance.

    ``solutions * C(n, s) * P(Binomial(n - s, chance) >= k - s)``: the number of false alarms of
    Desolneux, Moisan and Morel, with n matches, k of which agree, and samples of size s.

    Args:
        agreeing: (K,) bool, the matches that fit the model.
        sample: number of matches that determine a model.
        solutions: largest number of models of a sample.
        chance: probability that an incorrect match fits the model.
        of: (K,) bool, the n matches counted; None = all.
    """
    total = len(matches) if of is None else int(of.sum())
    found = int(agreeing.sum())
    k = _count_unique(matches, agreeing)
    if k <= sample or chance >= 1:
        return math.inf
    n = max(k, round(total * k / found))  # duplicates reduce all matches in the same proportion
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


# ---- degenerate configurations: a simpler geometry explains the matches


def _degenerate(
    matches: Correspondences,
    model: Tensor,
    fits: Tensor,
    rest_by_chance: Callable[[Tensor, int], bool],
) -> str:
    """Why the inliers ``fits`` of a model do not determine it; empty if they do."""
    if matches.geometry == "homography":
        if rest_by_chance(_best_line(matches, fits), 2):
            return (
                "nearly all matches that agree are collinear, which leaves the homography "
                "undetermined"
            )
        return ""
    plane = _dominant_plane(matches, fits)
    if plane is None:
        return ""
    planar = rest_by_chance(_near(matches, plane), 2)
    if matches.K is None:
        reason = (
            "the matches fit one homography (a plane, or a camera that only rotated), which "
            "leaves the fundamental matrix undetermined"
        )
        return reason if planar else ""
    return _degenerate_pose(matches, model, fits, plane, planar, rest_by_chance)


def _degenerate_pose(
    matches: Correspondences,
    pose: Tensor,
    fits: Tensor,
    plane: Tensor,
    planar: bool,
    rest_by_chance: Callable[[Tensor, int], bool],
) -> str:
    """As ``_degenerate``, for a pose whose inliers mostly fit the homography ``plane``."""
    assert matches.K is not None
    K_a, K_b = matches.K
    of_rays = torch.linalg.inv(K_b) @ plane @ K_a
    # both cameras see the same side of the plane
    of_rays = of_rays * torch.linalg.det(of_rays).sign()
    rotated = _near(matches, K_b @ _fit_rotation(matches, of_rays) @ torch.linalg.inv(K_a))
    if 2 * int((rotated & fits).sum()) > int(fits.sum()) and rest_by_chance(rotated, 2):
        return (
            "the camera only rotated, or all points are far away: the direction of translation is "
            "undetermined"
        )
    if not planar:
        return ""
    for other in decompose_homography(of_rays):
        if not _similar_pose(other, pose) and rest_by_chance(
            matches.fits(other, SLACK) & matches.in_front(other), 0
        ):
            return "the points lie in one plane, which two poses explain"
    return ""


def _near(matches: Correspondences, H: Tensor) -> Tensor:
    """Matches (K,) bool that a homography explains within ``SLACK`` thresholds."""
    return (warp_points(matches.a, H) - matches.b).norm(dim=1) <= SLACK * matches.threshold


def _best_line(matches: Correspondences, fits: Tensor) -> Tensor:
    """Matches (K,) bool near the line in image b that passes through two of the inliers and near
    most of them.
    """
    xy = matches.b[fits]
    # if at least half of the points are on one line, two of these 32 almost surely are
    ends = xy[torch.linspace(0, len(xy) - 1, min(len(xy), 32)).round().long()]
    i, j = torch.triu_indices(len(ends), len(ends), 1)
    along = ends[j] - ends[i]
    normal = torch.stack([-along[:, 1], along[:, 0]], dim=1) / along.norm(dim=1, keepdim=True)
    offset = (normal * ends[i]).sum(dim=1)
    subset = xy[torch.linspace(0, len(xy) - 1, min(len(xy), 1000)).round().long()]
    max_distance = SLACK * matches.threshold
    best = ((subset @ normal.T - offset).abs() <= max_distance).sum(dim=0).argmax()
    return (matches.b @ normal[best] - offset[best]).abs() <= max_distance


def _dominant_plane(matches: Correspondences, fits: Tensor) -> Tensor | None:
    """The homography (3,3) that most inliers fit within ``SLACK`` thresholds; None without one."""
    a, b = matches.a[fits], matches.b[fits]
    if _collinear(a) or _collinear(b):
        return None
    options = {
        "max_reproj_error": SLACK * matches.threshold,
        "max_iterations": 1000,
        "success_prob": 0.9999,
        "seed": 0,
    }
    try:
        found = poselib.estimate_homography(a.numpy(), b.numpy(), options, {})[0]
    except (RuntimeError, ValueError):
        return None
    H = torch.tensor(found, dtype=torch.float64)
    return H if bool(torch.isfinite(H).all()) and float(torch.linalg.det(H).abs()) > 0 else None


def _fit_rotation(matches: Correspondences, H: Tensor) -> Tensor:
    """The rotation nearest to a homography of rays, fitted to the matches that it explains."""
    assert matches.K is not None
    K_a, K_b = matches.K
    R = _nearest_rotation(H)
    x, y = (torch.nn.functional.normalize(matches.rays(side), dim=1) for side in (0, 1))
    for _ in range(3):
        near = _near(matches, K_b @ R @ torch.linalg.inv(K_a))
        if int(near.sum()) < 3:
            break
        R = _nearest_rotation(y[near].T @ x[near])
    return R


def decompose_homography(H: Tensor) -> list[Tensor]:
    """The four poses [R | t] of a homography between rays, H ~ R + t n^T; none for a rotation.

    Ma, Soatto, Kosecka, Sastry 2004, section 5.3.3.
    """
    H = H / torch.linalg.svdvals(H)[1]
    square, V = torch.linalg.eigh(H.T @ H)  # ascending
    v3, v2, v1 = V.T
    low, high = (1 - square[0]).clamp(min=0).sqrt(), (square[2] - 1).clamp(min=0).sqrt()
    if float(low + high) < 1e-6:
        return []
    poses = []
    for sign in (1, -1):
        u = (low * v1 + sign * high * v3) / (square[2] - square[0]).sqrt()
        normal = torch.linalg.cross(v2, u)
        before = torch.stack([v2, u, normal], dim=1)
        after = torch.stack([H @ v2, H @ u, torch.linalg.cross(H @ v2, H @ u)], dim=1)
        R = _nearest_rotation(after @ before.T)
        t = (H - R) @ normal
        if float(t.norm()) > 0:
            poses += [pose_matrix(R, t), pose_matrix(R, -t)]
    return poses


def _similar_pose(pose: Tensor, other: Tensor, degrees: float = 5.0) -> bool:
    """Whether rotation and direction of translation both differ by less than ``degrees``."""
    rotation_cosine = ((pose[:, :3] * other[:, :3]).sum() - 1) / 2
    translation_cosine = pose[:, 3] @ other[:, 3]
    limit = math.cos(math.radians(degrees))
    return min(float(rotation_cosine), float(translation_cosine)) > limit
