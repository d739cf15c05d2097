"""Measures of points and matches on image pairs whose geometry is known: pure functions of tensors.

Three protocols that are often taken for one another stand side by side; docs/evaluation.md compares
them.

- ``keynet_*``: Key.Net, section 6 (Barroso-Laguna et al., ICCV 2019), as its published evaluation
  code computes it.
- ``rekd_*``: REKD, section 4 (Lee et al., CVPR 2022).
- ``mutual_*``: repeatability at small pixel thresholds, one to one, which separates detectors best.

Sizes are (height, width), points (N,2) in pixels and strongest first, ``H_ab`` (3,3) maps image a
to image b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..geometry import common_area, local_rotation, warp_points
from ..names import EVALUATION_NUM_KEYPOINTS
from .geometry import as_double

#: Key.Net's protocol: frame without points, share of a mask pixel that must be covered, common
#: radius, least overlap.
BORDER = 15
COVERED = 0.75
RADIUS = 30.0
MIN_OVERLAP = 0.6
POSSIBLE_DISTANCE = 5.0

#: Circles of equal radius 30 overlap by 0.6 at 11.86 pixels, unequal ones at less: no pair farther
#: apart can count.
REACH = 12.0
MUTUAL_THRESHOLDS = (1.0, 2.0, 3.0, 5.0)
#: Smallest weight of OpenCV's bilinear sampling, which the published masks went through.
MASK_STEP = 32
FLOAT32_EPS = 1.1920928955078125e-07


# ---- what both images see


def in_both_images(
    xy: Tensor,
    size: tuple[int, int],
    H: Tensor,
    other_size: tuple[int, int],
    border: float = BORDER,
) -> Tensor:
    """Points (N,2) that lie ``border`` pixels inside their image and, mapped by ``H``, inside the
    other one: bool (N,).
    """
    xy, H = as_double(xy), as_double(H)
    h, w = size
    inside = (
        (xy[:, 0] >= border)
        & (xy[:, 0] <= w - 1 - border)
        & (xy[:, 1] >= border)
        & (xy[:, 1] <= h - 1 - border)
    )
    return inside & common_area(xy, H, other_size, border)


def in_official_mask(
    xy: Tensor, size: tuple[int, int], H: Tensor, other_size: tuple[int, int]
) -> Tensor:
    """The published common area (spec 6.1): bool (N,).

    A frame of 15 pixels is cut from the other image's mask, which is warped here with OpenCV's
    bilinear sampling (places in steps of 1/32 pixel), cut at 0.75 and framed again; a point counts
    by the mask pixel it rounds to.
    """
    at = as_double(xy).round()
    h, w = size
    own = (
        (at[:, 0] >= BORDER)
        & (at[:, 0] < w - BORDER)
        & (at[:, 1] >= BORDER)
        & (at[:, 1] < h - BORDER)
    )
    there = (warp_points(at, as_double(H)) * MASK_STEP).round() / MASK_STEP
    h, w = other_size
    far = torch.tensor([w - BORDER, h - BORDER], dtype=torch.float64)
    covered = torch.minimum(there - (BORDER - 1), far - there).clamp(0, 1).prod(dim=1)
    return own & (covered >= COVERED)


# ---- Key.Net's repeatability


def projected_scale(xy: Tensor, scale: Tensor, H: Tensor) -> Tensor:
    """Scales (N,) after a homography: times the square root of the determinant of its Jacobian at
    ``xy``.
    """
    xy, H = as_double(xy), as_double(H)
    depth = xy @ H[2, :2] + H[2, 2]
    area = torch.linalg.det(H).abs() / depth.abs() ** 3
    return ((as_double(scale).square() + FLOAT32_EPS) * area).sqrt()


def circle_overlap(distance: Tensor, radius_a: Tensor, radius_b: Tensor) -> Tensor:
    """Intersection over union of circles: three tensors of one shape -> the same shape, 0..1."""
    d = distance.clamp(min=1e-300)
    small, large = torch.minimum(radius_a, radius_b), torch.maximum(radius_a, radius_b)
    a2, b2 = radius_a.square(), radius_b.square()
    angle_a = ((d * d + a2 - b2) / (2 * d * radius_a)).clamp(-1, 1).arccos()
    angle_b = ((d * d + b2 - a2) / (2 * d * radius_b)).clamp(-1, 1).arccos()
    kite = (
        (radius_a + radius_b - d)
        * (d + radius_a - radius_b)
        * (d - radius_a + radius_b)
        * (d + radius_a + radius_b)
    )
    lens = a2 * angle_a + b2 * angle_b - kite.clamp(min=0).sqrt() / 2
    shared = torch.where(distance <= large - small, math.pi * small.square(), lens)
    shared = torch.where(distance >= radius_a + radius_b, torch.zeros_like(lens), shared)
    return shared / (math.pi * (a2 + b2) - shared + 1e-6)


def one_to_one(index_a: Tensor, index_b: Tensor, value: Tensor) -> Tensor:
    """Greedy assignment: candidates (K,) by falling ``value``, each end used once: places (C,) in
    the candidate list.
    """
    order = value.argsort(descending=True, stable=True)
    used_a: set[int] = set()
    used_b: set[int] = set()
    taken = []
    for place, i, j in zip(
        order.tolist(), index_a[order].tolist(), index_b[order].tolist(), strict=True
    ):
        if i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            taken.append(place)
    return torch.tensor(taken, dtype=torch.int64)


def near_pairs(
    xy_a: Tensor, xy_b_in_a: Tensor, reach: float = REACH
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of points at most ``reach`` px apart: indices of a and of b and distances, (K,) each,
    by rising b, then a.

    Only points in the same vertical strip are compared, which saves the full table of distances.
    """
    a, b = as_double(xy_a), as_double(xy_b_in_a)
    by_x = a[:, 0].argsort(stable=True)
    x = a[by_x, 0].contiguous()
    first = torch.searchsorted(x, b[:, 0].contiguous() - reach)
    count = torch.searchsorted(x, b[:, 0].contiguous() + reach, right=True) - first
    index_b = torch.arange(len(b), device=b.device).repeat_interleave(count)
    within = torch.arange(len(index_b), device=b.device) - (
        count.cumsum(0) - count
    ).repeat_interleave(count)
    index_a = by_x[first.repeat_interleave(count) + within]
    distance = (a[index_a] - b[index_b]).square().sum(dim=1).sqrt()
    near = (distance <= reach).nonzero()[:, 0]
    near = near[(index_b[near] * len(a) + index_a[near]).argsort()]
    return index_a[near], index_b[near], distance[near]


def overlap_correspondences(
    near: tuple[Tensor, Tensor, Tensor],
    radius_a: Tensor | None = None,
    radius_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Key.Net's correspondences among ``near_pairs`` (spec 6.2): (C,2) indices of a and b as
    accepted, overlaps (C,).

    The larger circle of a pair gets a radius of 30 pixels and the smaller one shrinks along; the
    distance does not. Without radii both are 30: the location-only measure (L). Only overlaps of at
    least 0.6 count.
    """
    a, b, distance = near
    if radius_a is None or radius_b is None:
        ra = rb = torch.full_like(distance, RADIUS)
    else:
        ra, rb = as_double(radius_a)[a], as_double(radius_b)[b]
        factor = RADIUS / torch.maximum(ra, rb)
        ra, rb = ra * factor, rb * factor
    overlap = circle_overlap(distance, ra, rb)
    good = overlap >= MIN_OVERLAP
    a, b, overlap = a[good], b[good], overlap[good]
    taken = one_to_one(b, a, overlap)
    return torch.stack([a[taken], b[taken]], dim=1), overlap[taken]


def keynet_points(
    xy_a: Tensor,
    xy_b: Tensor,
    H_ab: Tensor,
    size_a: tuple[int, int],
    size_b: tuple[int, int],
    *,
    num_keypoints: int = EVALUATION_NUM_KEYPOINTS,
    official: bool = False,
) -> tuple[Tensor, Tensor]:
    """Indices of the points that Key.Net's protocol compares: the first ``num_keypoints`` of those
    that both images see.

    ``official`` uses the published masks, otherwise exact positions do.
    """
    H_ab = as_double(H_ab)
    test = in_official_mask if official else in_both_images
    a = test(xy_a, size_a, H_ab, size_b).nonzero()[:num_keypoints, 0]
    b = test(xy_b, size_b, torch.linalg.inv(H_ab), size_a).nonzero()[:num_keypoints, 0]
    return a, b


def keynet_repeatability(
    xy_a: Tensor,
    scale_a: Tensor,
    xy_b_in_a: Tensor,
    scale_b_in_a: Tensor,
    *,
    official: bool = False,
) -> dict[str, float | None]:
    """Repeatability of points already chosen and brought into image a (Key.Net 6.2; spec 6.2).

    ``rep = correspondences / min(points of a, points of b)``, ``err = mean(1 - overlap)``, for
    scale and location (SL) and for location alone (L); ``possible``: points of a with any point of
    b within 5 pixels. Without correspondences ``err`` is None; the published code (``official``)
    writes 0, which passes for a perfect overlap in its means.

    Returns:
        rep_SL, rep_L (0..1), err_SL, err_L, corr_SL, corr_L, points, possible.
    """
    found: dict[str, float | None] = {}
    count = min(len(xy_a), len(xy_b_in_a))
    near = near_pairs(xy_a, xy_b_in_a)
    for name, radii in (("SL", (scale_a, scale_b_in_a)), ("L", (None, None))):
        pairs, overlap = overlap_correspondences(near, *radii)
        found[f"rep_{name}"] = len(pairs) / count if count else 0.0
        found[f"err_{name}"] = (
            float((1 - overlap).mean()) if len(pairs) else (0.0 if official else None)
        )
        found[f"corr_{name}"] = len(pairs)
    found["points"] = count
    found["possible"] = len(near[0][near[2] <= POSSIBLE_DISTANCE].unique())
    return found


# ---- REKD's measures


def rekd_repeatability(xy_a: Tensor, xy_b: Tensor, H_ab: Tensor, threshold: float = 3.0) -> float:
    """Share of all points of a that land, in image b, strictly nearer than ``threshold`` to any
    point of b (spec 6.4).

    One way, many to one, points that leave image b included.
    """
    if not len(xy_a):
        return 0.0
    _, there, distance = near_pairs(
        as_double(xy_b), warp_points(as_double(xy_a), as_double(H_ab)), threshold
    )
    return len(there[distance < threshold].unique()) / len(xy_a)


# ---- small thresholds, one to one


def mutual_nearest(xy_a: Tensor, xy_b: Tensor, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Points (N,2) and (M,2) of one frame that are each other's nearest, at most ``reach`` px
    apart: indices of a and of b and distances, (K,) each.
    """
    a, b, distance = near_pairs(xy_a, xy_b, reach)
    rank = distance.argsort(stable=True).argsort()
    best_a, best_b = (
        rank.new_full((count,), len(rank)).scatter_reduce(0, index, rank, "amin")
        for count, index in ((len(xy_a), a), (len(xy_b), b))
    )
    mutual = (best_a[a] == rank) & (best_b[b] == rank)
    return a[mutual], b[mutual], distance[mutual]


def repeated_pairs(
    xy_a: Tensor,
    xy_b: Tensor,
    H_ab: Tensor,
    size_a: tuple[int, int],
    size_b: tuple[int, int],
    num_keypoints: int,
    border: float,
    reach: float,
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Mutual nearest points of the common area up to ``reach`` apart in b: indices of a and of b,
    distances, (K,) each, and how many points took part on each side.
    """
    H_ab, xy_a, xy_b = as_double(H_ab), as_double(xy_a), as_double(xy_b)
    seen_a = common_area(xy_a, H_ab, size_b, border).nonzero()[:num_keypoints, 0]
    seen_b = common_area(xy_b, torch.linalg.inv(H_ab), size_a, border).nonzero()[:num_keypoints, 0]
    a, b, distance = mutual_nearest(warp_points(xy_a[seen_a], H_ab), xy_b[seen_b], reach)
    return seen_a[a], seen_b[b], distance, len(seen_a), len(seen_b)


def repeated_points(
    xy_a: Tensor,
    xy_b: Tensor,
    H_ab: Tensor,
    size_a: tuple[int, int],
    size_b: tuple[int, int],
    *,
    num_keypoints: int = EVALUATION_NUM_KEYPOINTS,
    threshold: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """The points that ``mutual_matches`` counts: indices into ``xy_a`` and ``xy_b``, (K,) each."""
    return repeated_pairs(xy_a, xy_b, H_ab, size_a, size_b, num_keypoints, BORDER, threshold)[:2]


def orientation_errors(xy_a: Tensor, angle_a: Tensor, angle_b: Tensor, H_ab: Tensor) -> Tensor:
    """Error of the change of angle (radians, (K,) each) of points of a (K,2) and their partners:
    (K,) degrees, 0..180.

    Truth is the rotation of the homography at the point (``geometry.local_rotation``).
    """
    turn = (
        as_double(angle_b) - as_double(angle_a) - local_rotation(as_double(xy_a), as_double(H_ab))
    )
    return torch.rad2deg((turn + math.pi).remainder(2 * math.pi) - math.pi).abs()


def mutual_repeatability(
    xy_a: Tensor,
    xy_b: Tensor,
    H_ab: Tensor,
    size_a: tuple[int, int],
    size_b: tuple[int, int],
    **options: Any,
) -> float:
    """``matches / min(points of a, points of b)`` of ``mutual_matches``, same arguments; 0 where an
    image has none.

    It flatters a detector that finds few points: the number of points belongs beside it.
    """
    matches, count_a, count_b = mutual_matches(xy_a, xy_b, H_ab, size_a, size_b, **options)
    return matches / min(count_a, count_b) if matches else 0.0


def localization(
    xy_a: Tensor,
    xy_b: Tensor,
    H_ab: Tensor,
    size_a: tuple[int, int],
    size_b: tuple[int, int],
    *,
    num_keypoints: int = EVALUATION_NUM_KEYPOINTS,
    thresholds: Sequence[float] = MUTUAL_THRESHOLDS,
) -> dict[str, float | None]:
    """``mutual_repeatability`` (rep@t) and the mean distance of the pairs it counts (err@t, px,
    None without) at each threshold.
    """
    _, _, distance, count_a, count_b = repeated_pairs(
        xy_a, xy_b, H_ab, size_a, size_b, num_keypoints, BORDER, max(thresholds)
    )
    found: dict[str, float | None] = {"points_a": count_a, "points_b": count_b}
    for t in thresholds:
        near = distance[distance <= t]
        found[f"rep@{t:g}"] = len(near) / min(count_a, count_b) if len(near) else 0.0
        found[f"err@{t:g}"] = float(near.mean()) if len(near) else None
    return found


def above_chance(value: float, chance: float) -> float:
    """``(value - chance) / (1 - chance)``: 0 for what chance gives, 1 for perfect, negative below
    chance.
    """
    return (value - chance) / (1 - chance) if chance < 1 else 0.0


def scale_range(scale: Tensor) -> float | None:
    """S_range: largest over smallest scale of the points of an image (Key.Net, table 2); None
    without points.
    """
    return float(scale.max() / scale.min()) if len(scale) else None


def mutual_matches(
    xy_a: Tensor,
    xy_b: Tensor,
    H_ab: Tensor,
    size_a: tuple[int, int],
    size_b: tuple[int, int],
    *,
    num_keypoints: int = EVALUATION_NUM_KEYPOINTS,
    threshold: float = 3.0,
    border: float = BORDER,
) -> tuple[int, int, int]:
    """How many points are found again within ``threshold`` pixels, one to one, and of how many:
    (matches, of a, of b).

    Points outside the common area (with ``border``) are left out, then the first ``num_keypoints``
    of each image are kept; points of a are mapped into b, and mutual nearest neighbours no farther
    apart than the threshold count.
    """
    _, _, distance, count_a, count_b = repeated_pairs(
        xy_a, xy_b, H_ab, size_a, size_b, num_keypoints, border, threshold
    )
    return len(distance), count_a, count_b
