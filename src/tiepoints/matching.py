"""Features of two images to matches: nearest descriptors, kept where both sides agree and none
other is as near.

docs/matching.md has the options, their formulae and sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import WeightsError
from .image import ImageLike
from .refine import refine_matches
from .structs import Features, Matches

#: Rows of each side compared at a time: BLOCK * BLOCK cosines (16 MiB) are all that is ever held of
#: the matrix.
BLOCK = 2048
#: A maximum with its place costs ten times one without: the place is looked for in the best group
#: of so many alone.
GROUP = 64
#: REKD's tolerance of its orientation filter.
ROTATION_TOLERANCE = math.radians(30)
#: Factor on either side of the dominant change of scale: an octave.
SCALE_TOLERANCE = 2.0


Matcher = Callable[[Features, Features], Matches]


def match(
    a: Features,
    b: Features,
    *,
    mutual: bool = True,
    ratio: float | None = None,
    min_similarity: float | None = None,
    rotation_tolerance: float | None = None,
    scale_tolerance: float | None = None,
    matcher: Matcher | None = None,
    refine: bool = False,
    images: tuple[ImageLike, ImageLike] | None = None,
) -> Matches:
    """Nearest neighbours of the descriptors of ``a`` among those of ``b``.

    Args:
        a, b: features with unit descriptors (N,D) and (M,D) on one device, float32 or half
            precision (compared in float32).
        mutual: keep a match only if it is the nearest in both directions; no point then has two
            matches.
        ratio: keep a match only if its distance is at most this part of the second nearest one
            (0..1), with ``mutual`` in both directions; with a single candidate there is no second
            one and the match stays. Of equal descriptors none is distinct, so they fail every ratio
            below 1. None = no test.
        min_similarity: least cosine of a match.
        rotation_tolerance: drop matches that turn otherwise than most, see ``filter_by_rotation``
            (radians; REKD's is pi/6).
        scale_tolerance: drop matches that zoom otherwise than most, see ``filter_by_scale`` (a
            factor above 1).
        matcher: pairs the features instead of the nearest neighbours, for example a
            ``LightGlueMatcher``; it is not called where a side is empty. ``mutual``, ``ratio`` and
            ``min_similarity`` are then not for use.
        refine: give the matches sub-pixel positions (``refine.refine_matches``; read them by
            ``Matches.positions``); needs ``images``.
        images: the images of ``a`` and ``b`` (see ``image.load_image``).

    Returns:
        matches in the order of the points of ``a``, on the device of the descriptors; of equally
        near candidates the first is taken. A ``matcher``'s come in its own order.

    Raises:
        ValueError: descriptors are missing, not finite, differ in length or device, or an option is
            out of range.
    """
    if matcher is None:
        _check_descriptors(a, b)
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
    elif ratio is not None or min_similarity is not None or not mutual:
        raise ValueError(
            "mutual, ratio and min_similarity belong to nearest neighbours; a matcher has "
            "thresholds of its own"
        )
    _check_tolerances(rotation_tolerance, scale_tolerance)
    if refine and images is None:
        raise ValueError(
            "refine=True needs the pixels: give images=(image_a, image_b), or leave refine out"
        )
    if not len(a) or not len(b):
        return _no_matches(a)
    found = (
        _nearest_neighbours(a, b, mutual, ratio, min_similarity)
        if matcher is None
        else _checked(matcher(a, b), a, b)
    )
    if rotation_tolerance is not None:
        found = filter_by_rotation(a, b, found, rotation_tolerance)
    if scale_tolerance is not None:
        found = filter_by_scale(a, b, found, scale_tolerance)
    return refine_matches(a, b, found, images) if refine and images is not None else found


def filter_by_rotation(
    a: Features, b: Features, matches: Matches, tolerance: float = ROTATION_TOLERANCE
) -> Matches:
    """The matches that turn as most do: REKD's orientation filter (Lee, Kim, Cho, CVPR 2022, the
    starred rows of its tables).

    The turn of a match is ``angle_b - angle_a``, rounded to degrees; the most frequent one is the
    common turn (of equally frequent ones the first met). Meant for detectors that measure an angle;
    where all angles are 0 every match stays.

    Args:
        tolerance: largest difference from the common turn in radians, on the circle, in (0, pi].
    """
    _check_tolerances(tolerance, None)
    if not len(matches):
        return matches
    angle_a, angle_b = _of_matches(a.angle, b.angle, matches)
    turn = torch.rad2deg(angle_b - angle_a)
    common = _most_frequent(turn.round().remainder(360))
    off = (turn - common + 180).remainder(360) - 180
    return _chosen(
        matches, off.abs() <= math.degrees(tolerance) + 1e-3
    )  # angles are float32: the limit itself stays in


def filter_by_scale(
    a: Features, b: Features, matches: Matches, tolerance: float = SCALE_TOLERANCE
) -> Matches:
    """The matches that zoom as most do.

    The zoom of a match is ``log2(scale_b / scale_a)``; the common zoom is the mean of the quarter
    octave that most fall into (of equally frequent ones the first met).

    Args:
        tolerance: largest factor between the zoom of a match and the common one, either way, above
            1.
    """
    _check_tolerances(None, tolerance)
    if not len(matches):
        return matches
    scale_a, scale_b = _of_matches(a.scale, b.scale, matches)
    zoom = torch.log2(scale_b / scale_a)
    known = torch.isfinite(zoom)  # a scale of 0 says nothing and votes for nothing
    if not known.any():
        return _chosen(matches, known)
    votes = (4 * zoom).round()
    common = zoom[votes == _most_frequent(votes[known])].mean()
    return _chosen(matches, known & ((zoom - common).abs() <= math.log2(tolerance) + 1e-6))


class LightGlueMatcher:
    """kornia's LightGlue (Lindenberger, Sarlin, Pollefeys, ICCV 2023) as a ``matcher`` of
    ``match``.

    What the network gets is what kornia's own ``LightGlueMatcher`` gives it: pixels with their
    ``image_size``; where it was trained with them, frames, or scales and angles (kornia's sense of
    angles is opposite to ours and is converted here).

    Args:
        net: one of kornia's names of features, such as ``disk``, ``sift``, ``doghardnet``,
            ``keynet_affnet_hardnet``; or a ``kornia.feature.LightGlue`` that you have built.
        weights: with a name: your copy of its weights, a ``.pth`` or ``.safetensors`` file or a
            state dictionary. None lets kornia fetch them.
        half_side: half the side, in pixels, of the region that a point of scale 1 was described
            from: 22 for Key.Net. For the networks that read scales it is to be 6 (``sift``) or 12
            (``doghardnet``) times the sigma of scale 1.
        options: with a name: settings of LightGlue, such as ``filter_threshold``.

    Raises:
        ImportError: kornia is missing.
        ValueError: the name is unknown; in use: descriptors of another length than the network's,
            points outside the image.
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
                "weights and options go with a name; load them into the network that you give"
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
        wanted = self.net.conf.input_dim
        if a.descriptors.shape[1] != wanted:
            raise ValueError(
                f"this LightGlue takes descriptors of {wanted} numbers, got "
                f"{a.descriptors.shape[1]}"
            )
        found = self.net({"image0": self._side(a), "image1": self._side(b)})
        index, score = found["matches"][0], found["scores"][0].float().clamp(0, 1)
        device = a.descriptors.device
        return Matches(index.to(device), score.to(device))

    def _side(self, features: Features) -> dict[str, Tensor]:
        """LightGlue's dictionary of one image; ``formats.interop`` has the same frames for other
        uses.
        """
        assert features.descriptors is not None
        weight = next(self.net.parameters())
        size = torch.tensor([features.image_size], dtype=torch.float32, device=weight.device)
        xy, scale, angle = (
            t.to(weight.device) for t in (features.xy, features.scale, features.angle)
        )
        # pixel borders reach from -0.5 to w - 0.5, LightGlue's from 0 to w; further out the size is
        # not this image's
        if not bool(((xy >= -1) & (xy <= size)).all()):
            raise ValueError(
                f"points lie outside their image of {features.image_size[0]} x "
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
        elif (
            conf.add_scale_ori and conf.scale_coef == 1
        ):  # sift: COLMAP's sigma and angle, which is ours in (-pi, pi]
            turned = math.pi - (math.pi - angle).remainder(2 * math.pi)
            content |= {"scales": radius[None] / 6, "oris": turned[None]}
        elif conf.add_scale_ori:  # kornia's frames; the network takes scale_coef of them itself
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
    # without a name kornia fetches nothing; "weights" would be a file of its own
    net = LightGlue(
        None, **options, **{k: v for k, v in LightGlue.features[name].items() if k != "weights"}
    )
    state = weights if isinstance(weights, Mapping) else _read_state(Path(weights))
    renamed = {}
    for (
        key,
        value,
    ) in (
        state.items()
    ):  # published files are of an older layout: self_attn.3.x for transformers.3.self_attn.x
        parts = key.removeprefix("matcher.").split(".")
        if parts[0] in ("self_attn", "cross_attn"):
            parts[:2] = ["transformers", parts[1], parts[0]]
        renamed[".".join(parts)] = value
    try:
        wrong = net.load_state_dict(renamed, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"these are not weights of LightGlue for {name}: {error}") from error
    missing = sorted(
        set(wrong.missing_keys) & {key for key, _ in net.named_parameters()}
    )  # buffers are computed
    if missing or wrong.unexpected_keys:
        raise WeightsError(
            f"these are not weights of LightGlue for {name}: missing {missing[:3]}, unknown "
            f"{wrong.unexpected_keys[:3]}"
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
            f"descriptors of {a.descriptors.shape[1]} and {b.descriptors.shape[1]} numbers cannot "
            "be compared"
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
        raise ValueError(
            f"the tolerance of the rotation must lie in (0, pi] radians, got {rotation}"
        )
    if scale is not None and not 1 < scale < math.inf:
        raise ValueError(f"the tolerance of the scale is a factor above 1, got {scale}")


def _checked(found: Any, a: Features, b: Features) -> Matches:
    if not isinstance(found, Matches):
        raise ValueError(f"a matcher must return Matches, got {type(found).__name__}")
    limit = found.index.new_tensor([len(a), len(b)])
    if not bool(((found.index >= 0) & (found.index < limit)).all()):
        raise ValueError(
            f"the matcher returned points that do not exist; there are {len(a)} and {len(b)}"
        )
    return found


def _no_matches(a: Features) -> Matches:
    device = a.xy.device if a.descriptors is None else a.descriptors.device
    return Matches(
        torch.zeros(0, 2, dtype=torch.int64, device=device), torch.zeros(0, device=device)
    )


# ---- votes over matches


def _of_matches(value_a: Tensor, value_b: Tensor, matches: Matches) -> tuple[Tensor, Tensor]:
    index = matches.index
    return value_a.to(index.device)[index[:, 0]].double(), value_b.to(index.device)[
        index[:, 1]
    ].double()


def _most_frequent(values: Tensor) -> float:
    """The value met most often; of equally frequent ones the first met."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    return float(values[counts[which].argmax()])


def _chosen(matches: Matches, keep: Tensor) -> Matches:
    return Matches(matches.index[keep], matches.score[keep])


# ---- nearest neighbours


class Nearest(NamedTuple):
    """For each of N rows: the largest cosine, the row of the other side that has it, and the second
    largest (-inf without).
    """

    best: Tensor
    row: Tensor
    second: Tensor


@torch.no_grad()
def _nearest_neighbours(
    a: Features, b: Features, mutual: bool, ratio: float | None, min_similarity: float | None
) -> Matches:
    rows_a, first_a, twin_a = _unique_rows(_comparable(a.descriptors))
    rows_b, first_b, twin_b = _unique_rows(_comparable(b.descriptors))
    there, back = _nearest(rows_a, rows_b)
    keep = torch.ones_like(there.row, dtype=torch.bool)
    if mutual:
        keep &= back.row[there.row] == torch.arange(len(keep), device=keep.device)
    if ratio is not None:
        keep &= _is_unique(there, _has_duplicate(twin_b)[there.row], ratio)
        if mutual:
            keep &= _is_unique(back, _has_duplicate(twin_a)[back.row], ratio)[there.row]
    if min_similarity is not None:
        keep &= there.best >= min_similarity
    if mutual:  # the first of equal descriptors stands for them all
        chosen = keep.nonzero()[:, 0]
        pairs = torch.stack([first_a[chosen], first_b[there.row[chosen]]], dim=1)
    else:  # all of equal descriptors have the match of the first
        points = keep[twin_a].nonzero()[:, 0]
        chosen = twin_a[points]
        pairs = torch.stack([points, first_b[there.row[chosen]]], dim=1)
    return Matches(pairs, there.best[chosen].clamp(0, 1))


def _comparable(descriptors: Tensor | None) -> Tensor:
    """In float32 (processors emulate half precision at a tenth of the speed), rounded descriptors
    of unit length again.
    """
    assert descriptors is not None
    rows = descriptors.detach().float()
    return rows if descriptors.dtype.itemsize >= 4 else torch.nn.functional.normalize(rows, dim=1)


def _unique_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different ones of N rows in their order: rows (U,D), the first index of each (U,), and
    for each row its place (N,).

    Equal rows are compared only once: a matrix product may round their cosines differently, and
    then the first of them would not be the one taken.
    """
    _, group = rows.unique(dim=0, return_inverse=True)
    own = torch.arange(len(rows), device=rows.device)
    first = own.new_full((int(group.max()) + 1,), len(rows)).scatter_reduce_(0, group, own, "amin")
    order = first.argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=rows.device)
    first = first[order]
    return rows if len(first) == len(rows) else rows[first], first, place[group]


def _has_duplicate(place: Tensor) -> Tensor:
    """Which of the different rows occur more than once."""
    return place.bincount() > 1


def _is_unique(nearest: Nearest, twin: Tensor, ratio: float) -> Tensor:
    """Lowe's ratio test; a nearest row that has a twin has its second at the same distance."""
    best = _distance(nearest.best)
    second = torch.where(twin, best, _distance(nearest.second))
    return (best <= ratio * second) & ((best < second) | (ratio == 1))


def _distance(cosine: Tensor) -> Tensor:
    """Euclidean distance of unit vectors from their cosine; infinite for cosine -inf."""
    return (2 - 2 * cosine).clamp(min=0).sqrt()


def _nearest(a: Tensor, b: Tensor) -> tuple[Nearest, Nearest]:
    """Nearest rows of ``b`` for the rows of ``a``, and of ``a`` for those of ``b``, from the same
    cosines, tile by tile.
    """
    tile = a.new_empty(min(BLOCK, len(a)), min(BLOCK, len(b)))
    there, back = [], [_none(len(part), a) for part in b.split(BLOCK)]
    for i, part_a in enumerate(a.split(BLOCK)):
        nearest = _none(len(part_a), a)
        for j, part_b in enumerate(b.split(BLOCK)):
            cosine = torch.mm(part_a, part_b.T, out=tile[: len(part_a), : len(part_b)])
            nearest = _better(nearest, _two_largest(cosine, 1), j * BLOCK)
            back[j] = _better(back[j], _two_largest(cosine, 0), i * BLOCK)
        there.append(nearest)
    return _joined(there), _joined(back)


def _two_largest(values: Tensor, dim: int) -> Nearest:
    """Along ``dim`` (0 or 1) of a matrix: the largest value, its first place, and the second
    largest.
    """
    tops = torch.stack([part.amax(dim) for part in values.split(GROUP, dim)])  # (groups, rows)
    best, group = tops.max(dim=0)
    index = (group * GROUP).unsqueeze(dim) + torch.arange(GROUP, device=values.device).unsqueeze(
        1 - dim
    )
    end = values.shape[dim]
    inside = values.gather(dim, index.clamp(max=end - 1)).masked_fill_(index >= end, -math.inf)
    place = inside.argmax(dim)
    inside.scatter_(dim, place.unsqueeze(dim), -math.inf)
    tops.scatter_(0, group[None], -math.inf)
    return Nearest(best, group * GROUP + place, torch.maximum(inside.amax(dim), tops.amax(dim=0)))


def _none(count: int, like: Tensor) -> Nearest:
    nothing = like.new_full((count,), -math.inf)
    return Nearest(nothing, torch.zeros(count, dtype=torch.int64, device=like.device), nothing)


def _better(old: Nearest, new: Nearest, offset: int) -> Nearest:
    """The two largest of both; ``old`` comes first and keeps ties."""
    row = torch.where(new.best > old.best, new.row + offset, old.row)
    second = torch.maximum(torch.minimum(old.best, new.best), torch.maximum(old.second, new.second))
    return Nearest(torch.maximum(old.best, new.best), row, second)


def _joined(parts: list[Nearest]) -> Nearest:
    return Nearest(*(torch.cat(column) for column in zip(*parts, strict=True)))
