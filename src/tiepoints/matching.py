"""Features of two images to matches: mutual nearest neighbors of the descriptors, the ratio test,
and filters by neighboring matches, dominant rotation and scale.

docs/matching.md has the options, their formulas and sources.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import WeightsError
from .geometry import distances
from .image import ImageLike
from .names import MIN_NEIGHBORS, NEIGHBORS
from .refine import refine_matches
from .structs import Features, Matches

#: Descriptors of each image compared at a time: of the matrix of cosines, only BLOCK * BLOCK
#: (16 MiB) are in memory.
BLOCK = 2048
#: An argmax costs ten times a maximum, so it is computed only within the group of this size that
#: has the maximum.
GROUP = 64
#: REKD's tolerance of its orientation filter.
ROTATION_TOLERANCE = math.radians(30)
#: ``filter_by_neighbors`` (chosen on training scenes, docs/diary.md): smallest distance of a
#: neighbor, and error of positions, in units of the keypoints' scales; largest deviation from the
#: predicted distance, as a fraction of it; largest factor between scale ratios; bins of the
#: dominant rotation; and steps that fit a linear map to the neighbors that agree, and to this
#: number of imaginary ones that are only rotated.
NEIGHBOR_DISTANCE, POSITION_ERROR, MAX_DEVIATION, MAX_SCALE_CHANGE = 6.0, 3.0, 0.35, 1.7
ROTATION_BINS, LINEAR_STEPS, PRIOR_NEIGHBORS = 36, 2, 20
#: Largest factor between the scale ratio of a match and the dominant one: an octave.
SCALE_TOLERANCE = 2.0
#: Constants of 1 in published weights of LightGlue (``disk``) that are not part of the network.
UNUSED_BUFFER = re.compile(r"log_assignment\.\d+\.r")

Matcher = Callable[[Features, Features], Matches]


# Options are flat keywords: each belongs to a separate step, and most callers use few of them.
def match(
    a: Features,
    b: Features,
    *,
    mutual: bool = True,
    ratio: float | None = None,
    min_similarity: float | None = None,
    min_neighbors: int = 0,
    rotation_tolerance: float | None = None,
    scale_tolerance: float | None = None,
    matcher: Matcher | None = None,
    refine: bool = False,
    images: tuple[ImageLike, ImageLike] | None = None,
) -> Matches:
    """Match each descriptor of ``a`` with its nearest neighbor in ``b``.

    Args:
        a, b: features with unit descriptors (N,D) and (M,D) on one device, float32 or half
            precision (compared in float32).
        mutual: keep a match only if it is the nearest in both directions; each keypoint then has
            at most one match.
        ratio: keep a match only if its distance is at most this fraction (0..1) of the distance of
            the second nearest neighbor, in both directions with ``mutual``. With a single
            candidate, the match is kept. Matches of duplicate descriptors fail every ratio below 1.
            None = no test.
        min_similarity: smallest cosine of a match.
        min_neighbors: keep only matches with which as many neighboring ones agree, see
            ``filter_by_neighbors``; 0 = all. 2 instead of a ratio test removes more incorrect
            matches and fewer correct ones.
        rotation_tolerance: keep only matches near the dominant rotation, see
            ``filter_by_rotation`` (radians; REKD's is pi/6).
        scale_tolerance: keep only matches near the dominant scale ratio, see ``filter_by_scale``
            (a factor above 1).
        matcher: used instead of nearest neighbors, for example a ``LightGlueMatcher``; it is not
            called if a or b is empty. ``mutual``, ``ratio`` and ``min_similarity`` must then keep
            their defaults.
        refine: give the matches sub-pixel positions (``refine.refine_matches``; read them with
            ``Matches.positions``); needs ``images``.
        images: the images of ``a`` and ``b`` (see ``image.load_image``).

    Returns:
        matches in the order of the keypoints of ``a``, on the device of the descriptors; the first
        of equally near candidates is taken. A ``matcher`` has its own order.

    Raises:
        ValueError: descriptors are missing, not finite, differ in dimension or device, or an option
            is out of range.
    """
    if matcher is None:
        _check_descriptors(a, b)
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
    elif ratio is not None or min_similarity is not None or not mutual:
        raise ValueError(
            "mutual, ratio and min_similarity apply to nearest neighbors only; a matcher has its "
            "own thresholds"
        )
    _check_tolerances(rotation_tolerance, scale_tolerance)
    check_min_neighbors(min_neighbors)
    if refine and images is None:
        raise ValueError(
            "refine=True needs the pixels: give images=(image_a, image_b), or use refine=False"
        )
    if not len(a) or not len(b):
        return _no_matches(a)
    found = (
        _nearest_neighbors(a, b, mutual, ratio, min_similarity)
        if matcher is None
        else _checked(matcher(a, b), a, b)
    )
    if min_neighbors:
        found = filter_by_neighbors(a, b, found, min_neighbors)
    if rotation_tolerance is not None:
        found = filter_by_rotation(a, b, found, rotation_tolerance)
    if scale_tolerance is not None:
        found = filter_by_scale(a, b, found, scale_tolerance)
    return refine_matches(a, b, found, images) if refine and images is not None else found


def filter_by_neighbors(
    a: Features, b: Features, matches: Matches, minimum: int = MIN_NEIGHBORS
) -> Matches:
    """Keep the matches with which neighboring ones agree.

    The scales and angles of the keypoints of a match predict where its neighbors in image a lie in
    image b. A neighbor agrees if it is matched there within 35 % of its predicted distance and 3
    times the scale of the keypoint, with about the same ratio of scales. The prediction includes
    the rotation and the linear map that most neighbors show, so that the filter holds for upright
    keypoints of rotated and of obliquely seen images too. Two of 24 neighbors seldom agree by
    chance (docs/matching.md has measurements).

    Args:
        minimum: number of neighbors, of the 24 nearest matches, that must agree; 0 to 24.

    Raises:
        ValueError: it is out of range.
    """
    check_min_neighbors(minimum)
    if not minimum or not len(matches):
        return matches
    return matches[_agreeing_neighbors(a, b, matches) >= minimum]


def check_min_neighbors(number: int) -> None:
    """Check a number of neighboring matches that must agree.

    Raises:
        ValueError: it is out of range.
    """
    if not 0 <= number <= NEIGHBORS:
        raise ValueError(f"min_neighbors must lie in [0, {NEIGHBORS}], got {number}")


def _agreeing_neighbors(a: Features, b: Features, matches: Matches) -> Tensor:
    """Number (K,) of neighboring matches that agree with each match."""
    scale_a, scale_b = _of_matches(a.scale, b.scale, matches)
    angle_a, angle_b = _of_matches(a.angle, b.angle, matches)
    # positions as complex numbers: a rotation and change of size is a factor
    xy_a, xy_b = (torch.view_as_complex(xy) for xy in _of_matches(a.xy, b.xy, matches))
    ratio = scale_b / scale_a
    # others of about the same place, as at another scale, are not neighbors
    nearest_a, nearest_b = (NEIGHBOR_DISTANCE * scale[:, None] for scale in (scale_a, scale_b))
    near = _nearest_points(xy_a, nearest_a)
    to_a, to_b = xy_a[near] - xy_a[:, None], xy_b[near] - xy_b[:, None]
    distance = to_a.abs()
    valid = (distance >= nearest_a) & (to_b.abs() >= nearest_b)
    valid &= (ratio[near] / ratio[:, None]).log().abs() < math.log(MAX_SCALE_CHANGE)
    predicted = torch.polar(ratio, angle_b - angle_a)[:, None] * to_a
    change = to_b / predicted
    likely = valid & ((change.abs() - 1).abs() < MAX_DEVIATION)
    rotation = _dominant_rotation(change[likely])
    tolerance = MAX_DEVIATION + POSITION_ERROR * scale_a[:, None] / distance
    # x -> factor x + mirrored conj(x) is any linear map
    factor, mirrored = rotation, torch.zeros_like(rotation)
    for _ in range(LINEAR_STEPS):
        agree = valid & _within(to_b, factor * predicted + mirrored * predicted.conj(), tolerance)
        factor, mirrored = _linear_map(predicted[agree], to_b[agree], rotation)
    agree = valid & _within(to_b, factor * predicted + mirrored * predicted.conj(), tolerance)
    return agree.sum(dim=1)


def _within(points: Tensor, predicted: Tensor, tolerance: Tensor) -> Tensor:
    """Whether points are where they are predicted, up to a fraction of the predicted distance."""
    return (points - predicted).abs() < tolerance * predicted.abs()


def _linear_map(x: Tensor, y: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (f, g) of the linear map y = f x + g conj(x) of complex numbers (N,), by least
    squares of the errors relative to the distances |x|; ``PRIOR_NEIGHBORS`` more agree with the
    rotation ``prior``.
    """
    x, y = x / x.abs(), y / x.abs()
    square = (x * x).sum()
    weight = len(x) + PRIOR_NEIGHBORS
    # normal equations: f weight + g conj(square) = p; f square + g weight = q
    p = (y * x.conj()).sum() + PRIOR_NEIGHBORS * prior
    q = (y * x).sum()
    determinant = weight**2 - square.abs() ** 2
    return (weight * p - square.conj() * q) / determinant, (weight * q - square * p) / determinant


def _nearest_points(points: Tensor, smallest: Tensor) -> Tensor:
    """Indices (N,min(N,NEIGHBORS)) of the nearest of N points (complex) to each that have at least
    its ``smallest`` (N,1) distance; where there are fewer, others are the last.
    """
    xy = torch.view_as_real(points).float()
    count = min(NEIGHBORS, len(xy))
    near = []
    for part, limit in zip(xy.split(BLOCK), smallest.float().split(BLOCK), strict=True):
        distance = distances(part, xy)
        distance[distance < limit] = math.inf
        near.append(distance.topk(count, dim=1, largest=False).indices)
    return torch.cat(near)


def _dominant_rotation(changes: Tensor) -> Tensor:
    """The most frequent direction of complex numbers, a number of absolute value 1: the mean of
    those within the three adjacent ones of ``ROTATION_BINS`` bins that hold most.
    """
    directions = changes / changes.abs()
    width = 2 * math.pi / ROTATION_BINS
    bins = (directions.angle() / width).floor().long() % ROTATION_BINS
    counts = torch.bincount(bins, minlength=ROTATION_BINS)
    fullest = (counts + counts.roll(1) + counts.roll(-1)).argmax()
    middle = torch.polar(torch.ones_like(width * fullest), width * (fullest + 0.5))
    total = directions[(directions / middle).angle().abs() < 1.5 * width].sum()
    return torch.where(total.abs() > 0, total / total.abs(), torch.ones_like(total))


def filter_by_rotation(
    a: Features, b: Features, matches: Matches, tolerance: float = ROTATION_TOLERANCE
) -> Matches:
    """Keep the matches near the dominant rotation: REKD's orientation filter (Lee, Kim, Cho, CVPR
    2022, the starred rows of its tables).

    The rotation of a match is ``angle_b - angle_a``; the dominant one is the most frequent after
    rounding to degrees (the first in order if several are). For detectors that measure angles; if
    all angles are 0, every match is kept.

    Args:
        tolerance: largest angular distance from the dominant rotation in radians, in (0, pi].
    """
    _check_tolerances(tolerance, None)
    if not len(matches):
        return matches
    angle_a, angle_b = _of_matches(a.angle, b.angle, matches)
    rotation = torch.rad2deg(angle_b - angle_a)
    dominant = _most_frequent(rotation.round().remainder(360))
    difference = (rotation - dominant + 180).remainder(360) - 180
    # the margin keeps float32 angles exactly at the limit
    return matches[difference.abs() <= math.degrees(tolerance) + 1e-3]


def filter_by_scale(
    a: Features, b: Features, matches: Matches, tolerance: float = SCALE_TOLERANCE
) -> Matches:
    """Keep the matches near the dominant scale ratio.

    The ratio of a match is ``scale_b / scale_a``; the dominant one is the geometric mean within the
    most frequent quarter octave (the first in order if several are).

    Args:
        tolerance: largest factor between the ratio of a match and the dominant one, in either
            direction, above 1.
    """
    _check_tolerances(None, tolerance)
    if not len(matches):
        return matches
    scale_a, scale_b = _of_matches(a.scale, b.scale, matches)
    octaves = torch.log2(scale_b / scale_a)
    valid = torch.isfinite(octaves)  # excludes scales of 0
    if not valid.any():
        return matches[valid]
    bins = (4 * octaves).round()
    dominant = octaves[bins == _most_frequent(bins[valid])].mean()
    return matches[valid & ((octaves - dominant).abs() <= math.log2(tolerance) + 1e-6)]


class LightGlueMatcher:
    """kornia's LightGlue (Lindenberger, Sarlin, Pollefeys, ICCV 2023) as a ``matcher`` of
    ``match``.

    The network gets the same input as from kornia's own ``LightGlueMatcher``: positions in pixels
    with their ``image_size`` and, if it was trained with them, affine frames or scales and angles
    (kornia's angles have the opposite sign and are converted here).

    Args:
        net: one of kornia's names of features, such as ``disk``, ``sift``, ``doghardnet``,
            ``keynet_affnet_hardnet``; or a ``kornia.feature.LightGlue``.
        weights: with a name: a local copy of its weights, a ``.pth`` or ``.safetensors`` file or a
            state dict. None lets kornia download them.
        half_side: half the side, in pixels, of the region from which a keypoint of scale 1 was
            described: 22 for Key.Net. For networks that use scales it must be 6 (``sift``) or 12
            (``doghardnet``) times the sigma of scale 1.
        options: with a name: settings of LightGlue, such as ``filter_threshold``.

    Raises:
        ImportError: kornia is missing.
        ValueError: unknown name; when called: another descriptor dimension than the network's, or
            keypoints outside the image.
        WeightsError: the weights are not those of this network.
    """

    def __init__(
        self,
        net: str | torch.nn.Module,
        *,
        weights: str | Path | Mapping[str, Tensor] | None = None,
        half_side: float = 22.0,
        **options: Any,
    ) -> None:
        if not half_side > 0:
            raise ValueError(f"half_side must be positive, got {half_side}")
        if not isinstance(net, str) and (weights is not None or options):
            raise ValueError(
                "weights and options go with a name; load them into the network instead"
            )
        self.half_side = half_side
        self.net: Any = (_lightglue(net, weights, options) if isinstance(net, str) else net).eval()

    @torch.no_grad()
    def __call__(self, a: Features, b: Features) -> Matches:
        """Matches in the order of ``a``, on the device of the descriptors; their score is
        LightGlue's, 0..1.
        """
        _check_descriptors(a, b)
        if not len(a) or not len(b):
            return _no_matches(a)
        assert a.descriptors is not None
        expected = self.net.conf.input_dim
        if a.descriptors.shape[1] != expected:
            raise ValueError(
                f"this LightGlue takes descriptors of dimension {expected}, got "
                f"{a.descriptors.shape[1]}"
            )
        found = self.net({"image0": self._input(a), "image1": self._input(b)})
        index, score = found["matches"][0], found["scores"][0].float().clamp(0, 1)
        device = a.descriptors.device
        return Matches(index.to(device), score.to(device))

    def _input(self, features: Features) -> dict[str, Tensor]:
        """LightGlue's input of one image (``formats.interop.to_laf`` makes the same frames)."""
        assert features.descriptors is not None
        weight = next(self.net.parameters())
        size = torch.tensor([features.image_size], dtype=torch.float32, device=weight.device)
        xy, scale, angle = (
            t.to(weight.device) for t in (features.xy, features.scale, features.angle)
        )
        # pixels span -0.5 .. w - 0.5 here, 0 .. w in LightGlue; a larger difference means that
        # image_size belongs to another image
        if not bool(((xy >= -1) & (xy <= size)).all()):
            raise ValueError(
                f"keypoints lie outside their image of {features.image_size[0]} x "
                f"{features.image_size[1]} px (width x height)"
            )
        xy = torch.minimum(xy.clamp(min=0), size)
        radius, conf = self.half_side * scale, self.net.conf
        content = {
            "keypoints": xy[None],
            "descriptors": features.descriptors.to(weight)[None],
            "image_size": size,
        }
        if conf.add_laf:
            cos, sin = angle.cos() * radius, angle.sin() * radius
            content["lafs"] = torch.stack(
                [torch.stack([cos, -sin, xy[:, 0]], -1), torch.stack([sin, cos, xy[:, 1]], -1)], -2
            )[None]
        elif conf.add_scale_ori and conf.scale_coef == 1:
            # sift: COLMAP's sigma, and its angle, which is ours wrapped to (-pi, pi]
            wrapped = math.pi - (math.pi - angle).remainder(2 * math.pi)
            content |= {"scales": radius[None] / 6, "oris": wrapped[None]}
        elif conf.add_scale_ori:  # kornia's frames; the network applies scale_coef itself
            content |= {"scales": radius[None], "oris": (-angle).remainder(2 * math.pi)[None]}
        return content


def _lightglue(
    name: str, weights: str | Path | Mapping[str, Tensor] | None, options: dict[str, Any]
) -> torch.nn.Module:
    try:
        from kornia import feature
    except ImportError as error:
        raise ImportError("LightGlue needs kornia: pip install 'tiepoints[interop]'") from error
    LightGlue: Any = feature.LightGlue
    if name not in LightGlue.features:
        raise ValueError(
            f"LightGlue knows no features {name!r}; known: {', '.join(sorted(LightGlue.features))}"
        )
    if weights is None:
        return LightGlue(name, **options)
    # without a name kornia downloads nothing; its "weights" entry names a file
    net = LightGlue(
        None, **options, **{k: v for k, v in LightGlue.features[name].items() if k != "weights"}
    )
    state = weights if isinstance(weights, Mapping) else _read_state(Path(weights))
    renamed = {}
    for key, value in state.items():
        # published files have an older layout: self_attn.3.x for transformers.3.self_attn.x
        parts = key.removeprefix("matcher.").split(".")
        if parts[0] in ("self_attn", "cross_attn"):
            parts[:2] = ["transformers", parts[1], parts[0]]
        renamed[".".join(parts)] = value
    try:
        mismatch = net.load_state_dict(renamed, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"these are not weights of LightGlue for {name}: {error}") from error
    # missing buffers are no error: they are computed
    missing = sorted(set(mismatch.missing_keys) & {key for key, _ in net.named_parameters()})
    unknown = [key for key in mismatch.unexpected_keys if not UNUSED_BUFFER.fullmatch(key)]
    if missing or unknown:
        raise WeightsError(
            f"these are not weights of LightGlue for {name}: missing {missing[:3]}, unknown "
            f"{unknown[:3]}"
        )
    return net


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


# ---- checks


def _check_descriptors(a: Features, b: Features) -> None:
    if a.descriptors is None or b.descriptors is None:
        raise ValueError("matching needs descriptors; extract with a descriptor such as hardnet")
    if a.descriptors.shape[1] != b.descriptors.shape[1]:
        raise ValueError(
            f"descriptors of dimensions {a.descriptors.shape[1]} and {b.descriptors.shape[1]} "
            "cannot be compared"
        )
    if a.descriptors.device != b.descriptors.device:
        raise ValueError(
            f"descriptors must be on one device, got {a.descriptors.device} and "
            f"{b.descriptors.device}"
        )
    for d in (a.descriptors, b.descriptors):
        if not d.is_floating_point():
            raise ValueError(f"descriptors must be floating point numbers, got {d.dtype}")
        if not torch.isfinite(d).all():
            raise ValueError("some descriptors are not finite")


def _check_tolerances(rotation: float | None, scale: float | None) -> None:
    if rotation is not None and not 0 < rotation <= math.pi:
        raise ValueError(f"the rotation tolerance must lie in (0, pi] radians, got {rotation}")
    if scale is not None and not 1 < scale < math.inf:
        raise ValueError(f"the scale tolerance must be a factor above 1, got {scale}")


def _checked(found: Any, a: Features, b: Features) -> Matches:
    if not isinstance(found, Matches):
        raise ValueError(f"a matcher must return Matches, got {type(found).__name__}")
    limit = found.index.new_tensor([len(a), len(b)])
    if not bool(((found.index >= 0) & (found.index < limit)).all()):
        raise ValueError(
            f"the matcher returned keypoints that do not exist; there are {len(a)} and {len(b)}"
        )
    return found


def _no_matches(a: Features) -> Matches:
    device = a.xy.device if a.descriptors is None else a.descriptors.device
    return Matches(
        torch.zeros(0, 2, dtype=torch.int64, device=device), torch.zeros(0, device=device)
    )


# ---- the dominant rotation and scale


def _of_matches(value_a: Tensor, value_b: Tensor, matches: Matches) -> tuple[Tensor, Tensor]:
    """Values of keypoints as values (K,) of both keypoints of each match, float64."""
    index = matches.index
    return value_a.to(index.device)[index[:, 0]].double(), value_b.to(index.device)[
        index[:, 1]
    ].double()


def _most_frequent(values: Tensor) -> float:
    """The most frequent value; the first in order if several are."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    return float(values[counts[which].argmax()])


# ---- nearest neighbors


class Nearest(NamedTuple):
    """For each of N descriptors, each field (N,): the largest cosine, the index of the descriptor
    of the other image that has it, and the second largest cosine (-inf if there is none).
    """

    best: Tensor
    row: Tensor
    second: Tensor


@torch.no_grad()
def _nearest_neighbors(
    a: Features, b: Features, mutual: bool, ratio: float | None, min_similarity: float | None
) -> Matches:
    rows_a, first_a, unique_a = _unique_rows(_normalized(a.descriptors))
    rows_b, first_b, unique_b = _unique_rows(_normalized(b.descriptors))
    a_to_b, b_to_a = _nearest(rows_a, rows_b)
    keep = torch.ones_like(a_to_b.row, dtype=torch.bool)
    if mutual:
        keep &= b_to_a.row[a_to_b.row] == torch.arange(len(keep), device=keep.device)
    if ratio is not None:
        keep &= _passes_ratio(a_to_b, _has_duplicate(unique_b)[a_to_b.row], ratio)
        if mutual:
            passes = _passes_ratio(b_to_a, _has_duplicate(unique_a)[b_to_a.row], ratio)
            keep &= passes[a_to_b.row]
    if min_similarity is not None:
        keep &= a_to_b.best >= min_similarity
    if mutual:  # of duplicate descriptors only the first is matched
        kept = keep.nonzero()[:, 0]
        pairs = torch.stack([first_a[kept], first_b[a_to_b.row[kept]]], dim=1)
    else:  # duplicate descriptors of a share the match of the first
        index_a = keep[unique_a].nonzero()[:, 0]
        kept = unique_a[index_a]
        pairs = torch.stack([index_a, first_b[a_to_b.row[kept]]], dim=1)
    return Matches(pairs, a_to_b.best[kept].clamp(0, 1))


def _normalized(descriptors: Tensor | None) -> Tensor:
    """Descriptors in float32, because CPUs emulate half precision at a tenth of the speed; those of
    half precision are normalized again.
    """
    assert descriptors is not None
    rows = descriptors.detach().float()
    return rows if descriptors.dtype.itemsize >= 4 else torch.nn.functional.normalize(rows, dim=1)


def _unique_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unique rows of (N,D) in order of occurrence: rows (U,D), the index of the first occurrence of
    each (U,), and the index of the unique row that equals each row (N,).

    Duplicate rows must be compared only once: a matrix product may round their cosines differently,
    and then the first of them would not be taken.
    """
    index = torch.arange(len(rows), device=rows.device)
    if len(_hashes(rows).unique()) == len(rows):  # a tenth of the time of comparing the rows
        return rows, index, index
    _, group = rows.unique(dim=0, return_inverse=True)
    first = index.new_full((int(group.max()) + 1,), len(rows))
    first = first.scatter_reduce_(0, group, index, "amin")
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=rows.device)
    first = first[order]
    return rows if len(first) == len(rows) else rows[first], first, rank[group]


def _hashes(rows: Tensor) -> Tensor:
    """Hashes (N,) int64 of rows (N,D) float32; equal rows have equal ones."""
    # + 0 turns -0 to 0; two numbers at a time
    bits = torch.nn.functional.pad(rows + 0.0, (0, rows.shape[1] % 2)).view(torch.int64)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator)
    return (bits * (2 * weights + 1).to(bits.device)).sum(dim=1)


def _has_duplicate(unique_index: Tensor) -> Tensor:
    """Which unique rows (U,) occur more than once, from the index (N,) of ``_unique_rows``."""
    return unique_index.bincount() > 1


def _passes_ratio(nearest: Nearest, duplicated: Tensor, ratio: float) -> Tensor:
    """Lowe's ratio test (N,) bool; the second neighbor of a ``duplicated`` nearest one is its
    duplicate.
    """
    best = _distance(nearest.best)
    second = torch.where(duplicated, best, _distance(nearest.second))
    return (best <= ratio * second) & ((best < second) | (ratio == 1))


def _distance(cosine: Tensor) -> Tensor:
    """Euclidean distance of unit vectors from their cosine; infinite for cosine -inf."""
    return (2 - 2 * cosine).clamp(min=0).sqrt()


def _nearest(a: Tensor, b: Tensor) -> tuple[Nearest, Nearest]:
    """Nearest rows of ``b`` for the rows of ``a``, and of ``a`` for those of ``b``, from the same
    cosines, block by block.
    """
    buffer = a.new_empty(min(BLOCK, len(a)), min(BLOCK, len(b)))
    a_to_b, b_to_a = [], [_empty_nearest(len(part), a) for part in b.split(BLOCK)]
    for i, part_a in enumerate(a.split(BLOCK)):
        nearest = _empty_nearest(len(part_a), a)
        for j, part_b in enumerate(b.split(BLOCK)):
            cosine = torch.mm(part_a, part_b.T, out=buffer[: len(part_a), : len(part_b)])
            nearest = _merge(nearest, _two_largest(cosine, 1), j * BLOCK)
            b_to_a[j] = _merge(b_to_a[j], _two_largest(cosine, 0), i * BLOCK)
        a_to_b.append(nearest)
    return _concatenate(a_to_b), _concatenate(b_to_a)


def _two_largest(values: Tensor, dim: int) -> Nearest:
    """The largest value along ``dim`` (0 or 1) of a matrix, its first index, and the second largest
    value.
    """
    maxima = torch.stack([part.amax(dim) for part in values.split(GROUP, dim)])  # (groups, rows)
    best, group = maxima.max(dim=0)
    index = (group * GROUP).unsqueeze(dim) + torch.arange(GROUP, device=values.device).unsqueeze(
        1 - dim
    )
    end = values.shape[dim]
    inside = values.gather(dim, index.clamp(max=end - 1)).masked_fill_(index >= end, -math.inf)
    argmax = inside.argmax(dim)
    inside.scatter_(dim, argmax.unsqueeze(dim), -math.inf)
    maxima.scatter_(0, group[None], -math.inf)
    second = torch.maximum(inside.amax(dim), maxima.amax(dim=0))
    return Nearest(best, group * GROUP + argmax, second)


def _empty_nearest(count: int, like: Tensor) -> Nearest:
    cosine = like.new_full((count,), -math.inf)
    return Nearest(cosine, torch.zeros(count, dtype=torch.int64, device=like.device), cosine)


def _merge(old: Nearest, new: Nearest, offset: int) -> Nearest:
    """The two largest of both; rows of ``new`` start at ``offset``, ``old`` wins ties."""
    row = torch.where(new.best > old.best, new.row + offset, old.row)
    second = torch.maximum(torch.minimum(old.best, new.best), torch.maximum(old.second, new.second))
    return Nearest(torch.maximum(old.best, new.best), row, second)


def _concatenate(parts: list[Nearest]) -> Nearest:
    return Nearest(*(torch.cat(column) for column in zip(*parts, strict=True)))
