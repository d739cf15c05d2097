"""Features of two images to matches: nearest descriptors, kept where both sides agree and none other is as near."""

from __future__ import annotations

import torch
from torch import Tensor

from .structs import Features, Matches

#: Rows compared at a time; bounds the memory to about ``BLOCK * M`` numbers.
BLOCK = 4096


def match(
    a: Features, b: Features, *, mutual: bool = True, ratio: float | None = None, min_similarity: float | None = None
) -> Matches:
    """Nearest neighbours of the descriptors of ``a`` among those of ``b``.

    Args:
        a, b: features with unit descriptors (N,D) and (M,D).
        mutual: keep a match only if it is the nearest in both directions.
        ratio: keep a match only if its distance is at most this part of the second nearest one (0..1); with a single
            candidate there is no second one and the match stays. None = no test.
        min_similarity: least cosine of a match.

    Returns:
        matches in the order of the points of ``a``; of equally near candidates the first is taken.

    Raises:
        ValueError: descriptors are missing, differ in length, or an option is out of range.
    """
    if a.descriptors is None or b.descriptors is None:
        raise ValueError("matching needs descriptors; extract with a descriptor such as rootsift")
    if a.descriptors.shape[1] != b.descriptors.shape[1]:
        raise ValueError(f"descriptors of {a.descriptors.shape[1]} and {b.descriptors.shape[1]} numbers cannot be compared")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
    if not len(a) or not len(b):
        return Matches(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0))
    forward, best, second, backward = _nearest(a.descriptors, b.descriptors, want_second=ratio is not None)
    keep = torch.ones(len(a), dtype=torch.bool)
    if mutual:
        keep &= backward[forward] == torch.arange(len(a))
    if ratio is not None:
        assert second is not None
        keep &= _distance(best) <= ratio * _distance(second)
    if min_similarity is not None:
        keep &= best >= min_similarity
    chosen = keep.nonzero()[:, 0]
    return Matches(torch.stack([chosen, forward[chosen]], dim=1), best[chosen].clamp(0, 1))


def _distance(similarity: Tensor) -> Tensor:
    """Euclidean distance of unit vectors from their cosine; infinite for cosine -inf."""
    return (2 - 2 * similarity).clamp(min=0).sqrt()


def _nearest(a: Tensor, b: Tensor, *, want_second: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """For each row of ``a``: index of its nearest row of ``b``, its cosine, and the second one's (-inf without); for each row of
    ``b`` the index of its nearest row of ``a``. Blocks of rows bound the memory."""
    a, b = a.float(), b.float()
    index, best, second = [], [], []
    back = torch.zeros(len(b), dtype=torch.int64)
    back_best = torch.full((len(b),), float("-inf"))
    for start in range(0, len(a), BLOCK):
        similarity = a[start : start + BLOCK] @ b.T
        value, place = similarity.max(dim=0)
        better = value > back_best  # of equal ones the first stays
        back[better], back_best[better] = place[better] + start, value[better]
        value, place = similarity.max(dim=1)
        index.append(place)
        best.append(value)
        if want_second:
            similarity.scatter_(1, place[:, None], float("-inf"))
            second.append(similarity.amax(dim=1))
    return torch.cat(index), torch.cat(best), torch.cat(second) if want_second else None, back
