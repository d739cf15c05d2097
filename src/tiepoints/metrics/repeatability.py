"""Repeatability of keypoints on image pairs with known homography.

Three protocols that are easily confused (docs/evaluation.md compares them):

- ``keynet_*``: Key.Net, section 6 (Barroso-Laguna et al., ICCV 2019), as in its published
  evaluation code.
- ``rekd_*``: REKD, section 4 (Lee et al., CVPR 2022).
- ``mutual_*``: one-to-one repeatability at small pixel thresholds, which separates detectors best.

Sizes are (height, width), keypoints (N,2) in pixels and strongest first, ``H_ab`` (3,3) maps image
a to image b.
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

#: Key.Net's protocol: width of the border without keypoints, minimum value of a warped mask pixel,
#: normalized radius, minimum overlap, and distance of possible correspondences in pixels.
BORDER = 15
COVERED = 0.75
RADIUS = 30.0
MIN_OVERLAP = 0.6
POSSIBLE_DISTANCE = 5.0

#: Maximum distance of a correspondence in pixels: circles of radius 30 overlap by 0.6 at 11.86
#: pixels, circles of different radii at less.
REACH = 12.0
MUTUAL_THRESHOLDS = (1.0, 2.0, 3.0, 5.0)
#: OpenCV's bilinear warp, by which the published masks are computed, rounds to 1/32 pixel.
MASK_STEP = 32
FLOAT32_EPS = 1.1920928955078125e-07


# ---- common area


def in_both_images(
    xy: Tensor,
    size: tuple[int, int],
    H: Tensor,
    other_size: tuple[int, int],
    border: float = BORDER,
) -> Tensor:
    """Which points (N,2) lie at least ``border`` pixels inside their image and, mapped by ``H``,
    inside the other one: bool (N,).
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
    """Which points (N,2) lie in the common area of Key.Net's published code: bool (N,).

    The mask of the other image without a border of 15 pixels is warped with OpenCV's bilinear
    sampling (positions rounded to 1/32 pixel), thresholded at 0.75, and its border is removed
    again; a point is tested at the nearest mask pixel.
    """
    pixel = as_double(xy).round()
    h, w = size
    inside = (
        (pixel[:, 0] >= BORDER)
        & (pixel[:, 0] < w - BORDER)
        & (pixel[:, 1] >= BORDER)
        & (pixel[:, 1] < h - BORDER)
    )
    mapped = (warp_points(pixel, as_double(H)) * MASK_STEP).round() / MASK_STEP
    h, w = other_size
    end = torch.tensor([w - BORDER, h - BORDER], dtype=torch.float64)
    mask = torch.minimum(mapped - (BORDER - 1), end - mapped).clamp(0, 1).prod(dim=1)
    return inside & (mask >= COVERED)


# ---- Key.Net's repeatability


def projected_scale(xy: Tensor, scale: Tensor, H: Tensor) -> Tensor:
    """Scales (N,) mapped by a homography: multiplied by the square root of the determinant of its
    Jacobian at ``xy``.
    """
    xy, H = as_double(xy), as_double(H)
    depth = xy @ H[2, :2] + H[2, 2]
    area = torch.linalg.det(H).abs() / depth.abs() ** 3
    return ((as_double(scale).square() + FLOAT32_EPS) * area).sqrt()


def circle_overlap(distance: Tensor, radius_a: Tensor, radius_b: Tensor) -> Tensor:
    """Intersection over union of circles, 0..1; all tensors have the same shape."""
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
    intersection = torch.where(distance <= large - small, math.pi * small.square(), lens)
    disjoint = distance >= radius_a + radius_b
    intersection = torch.where(disjoint, torch.zeros_like(lens), intersection)
    return intersection / (math.pi * (a2 + b2) - intersection + 1e-6)


def one_to_one(index_a: Tensor, index_b: Tensor, value: Tensor) -> Tensor:
    """Greedy one-to-one assignment of candidate pairs (K,), by descending ``value``.

    Returns:
        indices (C,) of the accepted candidates, in the order of acceptance.
    """
    order = value.argsort(descending=True, stable=True)
    used_a: set[int] = set()
    used_b: set[int] = set()
    accepted = []
    for candidate, i, j in zip(
        order.tolist(), index_a[order].tolist(), index_b[order].tolist(), strict=True
    ):
        if i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            accepted.append(candidate)
    return torch.tensor(accepted, dtype=torch.int64)


def near_pairs(
    xy_a: Tensor, xy_b_in_a: Tensor, reach: float = REACH
) -> tuple[Tensor, Tensor, Tensor]:
    """Find all pairs of points at most ``reach`` px apart, without the full distance matrix.

    Returns:
        indices of a, indices of b, distances, (K,) each, sorted by b, then a.
    """
    a, b = as_double(xy_a), as_double(xy_b_in_a)
    by_x = a[:, 0].argsort(stable=True)
    x = a[by_x, 0].contiguous()
    first = torch.searchsorted(x, b[:, 0].contiguous() - reach)
    count = torch.searchsorted(x, b[:, 0].contiguous() + reach, right=True) - first
    index_b = torch.arange(len(b), device=b.device).repeat_interleave(count)
    start = (count.cumsum(0) - count).repeat_interleave(count)
    rank = torch.arange(len(index_b), device=b.device) - start
    index_a = by_x[first.repeat_interleave(count) + rank]
    distance = (a[index_a] - b[index_b]).square().sum(dim=1).sqrt()
    near = (distance <= reach).nonzero()[:, 0]
    near = near[(index_b[near] * len(a) + index_a[near]).argsort()]
    return index_a[near], index_b[near], distance[near]


def overlap_correspondences(
    near: tuple[Tensor, Tensor, Tensor],
    radius_a: Tensor | None = None,
    radius_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Select Key.Net's correspondences among the pairs of ``near_pairs``.

    The radii of a pair are scaled so that the larger one is 30 pixels; the distance is not scaled.
    Without radii, both are 30 (location only, L). The overlap must be at least 0.6.

    Returns:
        (C,2) indices of a and b, in the order of acceptance; overlaps (C,).
    """
    a, b, distance = near
    if radius_a is None or radius_b is None:
        ra = rb = torch.full_like(distance, RADIUS)
    else:
        ra, rb = as_double(radius_a)[a], as_double(radius_b)[b]
        factor = RADIUS / torch.maximum(ra, rb)
        ra, rb = ra * factor, rb * factor
    overlap = circle_overlap(distance, ra, rb)
    valid = overlap >= MIN_OVERLAP
    a, b, overlap = a[valid], b[valid], overlap[valid]
    accepted = one_to_one(b, a, overlap)
    return torch.stack([a[accepted], b[accepted]], dim=1), overlap[accepted]


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
    """Select the keypoints that Key.Net's protocol compares: the first ``num_keypoints`` of each
    image in the common area.

    Args:
        official: use the masks of the published code instead of exact positions.
    """
    H_ab = as_double(H_ab)
    in_common = in_official_mask if official else in_both_images
    a = in_common(xy_a, size_a, H_ab, size_b).nonzero()[:num_keypoints, 0]
    b = in_common(xy_b, size_b, torch.linalg.inv(H_ab), size_a).nonzero()[:num_keypoints, 0]
    return a, b


def keynet_repeatability(
    xy_a: Tensor,
    scale_a: Tensor,
    xy_b_in_a: Tensor,
    scale_b_in_a: Tensor,
    *,
    official: bool = False,
) -> dict[str, float | None]:
    """Repeatability of the keypoints of ``keynet_points`` (Key.Net, section 6.2).

    ``rep = correspondences / min(keypoints of a, keypoints of b)`` and ``err = mean(1 - overlap)``,
    for scale and location (SL) and for location only (L); ``possible`` is the number of keypoints
    of a with a keypoint of b within 5 pixels. Without correspondences ``err`` is None; the
    published code (``official``) uses 0, which counts as a perfect overlap in its means.

    Args:
        xy_a, scale_a: keypoints (N,2) and scales (N,) of a.
        xy_b_in_a, scale_b_in_a: keypoints (M,2) and scales (M,) of b, mapped into a.
        official: as the published code.

    Returns:
        rep_SL, rep_L (0..1), err_SL, err_L, corr_SL, corr_L, points, possible.
    """
    result: dict[str, float | None] = {}
    count = min(len(xy_a), len(xy_b_in_a))
    near = near_pairs(xy_a, xy_b_in_a)
    for name, radii in (("SL", (scale_a, scale_b_in_a)), ("L", (None, None))):
        pairs, overlap = overlap_correspondences(near, *radii)
        result[f"rep_{name}"] = len(pairs) / count if count else 0.0
        result[f"err_{name}"] = (
            float((1 - overlap).mean()) if len(pairs) else (0.0 if official else None)
        )
        result[f"corr_{name}"] = len(pairs)
    result["points"] = count
    result["possible"] = len(near[0][near[2] <= POSSIBLE_DISTANCE].unique())
    return result


# ---- REKD's repeatability


def rekd_repeatability(xy_a: Tensor, xy_b: Tensor, H_ab: Tensor, threshold: float = 3.0) -> float:
    """Fraction of the keypoints of a that map to less than ``threshold`` px from a keypoint of b.

    From a to b only, many-to-one; keypoints outside of image b are included.
    """
    if not len(xy_a):
        return 0.0
    xy_a_in_b = warp_points(as_double(xy_a), as_double(H_ab))
    _, index_a, distance = near_pairs(as_double(xy_b), xy_a_in_b, threshold)
    return len(index_a[distance < threshold].unique()) / len(xy_a)


# ---- one-to-one repeatability at small thresholds


def mutual_nearest(xy_a: Tensor, xy_b: Tensor, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mutual nearest neighbors of points (N,2) and (M,2), at most ``reach`` px apart.

    Returns:
        indices of a, indices of b, distances, (K,) each.
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
    """Mutual nearest keypoints in the common area, at most ``reach`` px apart in image b.

    Returns:
        indices of a, indices of b, distances, (K,) each; number of compared keypoints of a, of b.
    """
    H_ab, xy_a, xy_b = as_double(H_ab), as_double(xy_a), as_double(xy_b)
    in_a = common_area(xy_a, H_ab, size_b, border).nonzero()[:num_keypoints, 0]
    in_b = common_area(xy_b, torch.linalg.inv(H_ab), size_a, border).nonzero()[:num_keypoints, 0]
    a, b, distance = mutual_nearest(warp_points(xy_a[in_a], H_ab), xy_b[in_b], reach)
    return in_a[a], in_b[b], distance, len(in_a), len(in_b)


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
    """Indices (K,) into ``xy_a`` and ``xy_b`` of the keypoints that ``mutual_matches`` counts."""
    return repeated_pairs(xy_a, xy_b, H_ab, size_a, size_b, num_keypoints, BORDER, threshold)[:2]


def orientation_errors(xy_a: Tensor, angle_a: Tensor, angle_b: Tensor, H_ab: Tensor) -> Tensor:
    """Errors (K,) in degrees, 0..180, of the relative orientation of corresponding keypoints.

    The ground truth is the local rotation of the homography (``geometry.local_rotation``).

    Args:
        xy_a: keypoints (K,2) of a.
        angle_a, angle_b: orientations (K,) in radians.
        H_ab: homography (3,3).
    """
    expected = local_rotation(as_double(xy_a), as_double(H_ab))
    error = as_double(angle_b) - as_double(angle_a) - expected
    return torch.rad2deg((error + math.pi).remainder(2 * math.pi) - math.pi).abs()


def mutual_repeatability(
    xy_a: Tensor,
    xy_b: Tensor,
    H_ab: Tensor,
    size_a: tuple[int, int],
    size_b: tuple[int, int],
    **options: Any,
) -> float:
    """``matches / min(keypoints of a, keypoints of b)`` of ``mutual_matches``, with its arguments.

    0 without keypoints. It favors detectors with few keypoints, so report it together with their
    number.
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
    """``mutual_repeatability`` (rep@t) and the mean distance of the counted pairs (err@t, pixels)
    at each threshold; err@t is None without pairs.
    """
    _, _, distance, count_a, count_b = repeated_pairs(
        xy_a, xy_b, H_ab, size_a, size_b, num_keypoints, BORDER, max(thresholds)
    )
    result: dict[str, float | None] = {"points_a": count_a, "points_b": count_b}
    for t in thresholds:
        near = distance[distance <= t]
        result[f"rep@{t:g}"] = len(near) / min(count_a, count_b) if len(near) else 0.0
        result[f"err@{t:g}"] = float(near.mean()) if len(near) else None
    return result


def above_chance(value: float, chance: float) -> float:
    """Correct a repeatability for chance: ``(value - chance) / (1 - chance)``, at most 1."""
    return (value - chance) / (1 - chance) if chance < 1 else 0.0


def scale_range(scale: Tensor) -> float | None:
    """Largest over smallest scale of the keypoints of an image (S_range in Key.Net, table 2); None
    without keypoints.
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
    """Count keypoints that are repeated within ``threshold`` pixels, one-to-one.

    The first ``num_keypoints`` of each image in the common area (with ``border``) are compared:
    keypoints of a are mapped into b, and mutual nearest neighbors within the threshold are counted.

    Returns:
        number of repeated keypoints; number of compared keypoints of a, of b.
    """
    _, _, distance, count_a, count_b = repeated_pairs(
        xy_a, xy_b, H_ab, size_a, size_b, num_keypoints, border, threshold
    )
    return len(distance), count_a, count_b
