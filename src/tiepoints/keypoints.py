"""Score map to keypoints: border, non-maximum suppression, selection, sub-pixel positions.

Key.Net, section 5.2 and the published extraction code: a 15 x 15 suppression and a border of 15
pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Published suppression window and width of the border without keypoints, in pixels.
NMS_WINDOW = 15
BORDER = 15
#: The same by default: with a smaller window more of the strongest keypoints are kept, and more of
#: them are matched (docs/diary.md).
SMALL_WINDOW = 7
SMALL_BORDER = 8


def max_filter(score_map: Tensor, window: int) -> Tensor:
    """Largest value in the ``window`` x ``window`` (odd) neighborhood of every pixel; (...,H,W) ->
    (...,H,W).

    Separable, with window widths that double: about 2 log2(window) passes instead of window
    squared.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, got {window}")
    radius = window // 2
    out = F.pad(score_map, (radius, radius, radius, radius), value=float("-inf"))
    return _running_max(_running_max(out, window, -1), window, -2)


def round_max_filter(score_map: Tensor, window: int) -> Tensor:
    """As ``max_filter``, in the disc of diameter ``window`` around every pixel, which makes the
    result independent of image rotation.
    """
    radius = window // 2
    h = score_map.shape[-2]
    padded = F.pad(score_map, (0, 0, radius, radius), value=float("-inf"))
    out = score_map
    for width in sorted({_chord(radius, dy) for dy in range(radius + 1)}):
        wide = _max_filter_rows(padded, width)
        for dy in range(-radius, radius + 1):
            if _chord(radius, dy) == width:
                out = torch.maximum(out, wide[..., radius + dy : radius + dy + h, :])
    return out


def _chord(radius: int, dy: int) -> int:
    """Width in pixels of the row of a disc at distance ``dy`` from its center; the radius of the
    disc is ``radius`` plus half a pixel.
    """
    return 2 * int(((radius + 0.5) ** 2 - dy * dy) ** 0.5) + 1


def _max_filter_rows(score_map: Tensor, width: int) -> Tensor:
    """Largest value among the ``width`` (odd) pixels of its row around every pixel; same shape."""
    return _running_max(F.pad(score_map, (width // 2, width // 2), value=float("-inf")), width, -1)


def _running_max(padded: Tensor, window: int, dim: int) -> Tensor:
    width = 1
    while width < window:
        step = min(width, window - width)
        length = padded.shape[dim] - step
        padded = torch.maximum(padded.narrow(dim, 0, length), padded.narrow(dim, step, length))
        width += step
    return padded


_MAX_FILTERS = {"square": max_filter, "round": round_max_filter}


def clear_border(score_map: Tensor, border: int) -> Tensor:
    """A copy with the outer ``border`` rows and columns set to zero."""
    out = torch.zeros_like(score_map)
    h, w = score_map.shape[-2:]
    if h > 2 * border and w > 2 * border:
        inner = (..., slice(border, h - border), slice(border, w - border))
        out[inner] = score_map[inner]
    return out


def local_maxima(
    score_map: Tensor,
    window: int = NMS_WINDOW,
    threshold: float = 0.0,
    *,
    unique: bool = True,
    shape: str = "square",
) -> Tensor:
    """Pixels that are the maximum of their window (with a ``shape`` of ``names.NMS_SHAPES``) and
    above ``threshold``: bool, same shape (B,1,H,W).

    With ``unique``, only the first pixel of a plateau in reading order is marked, else all are.
    """
    largest = _MAX_FILTERS[shape]
    found = (score_map == largest(score_map, window)) & (score_map > threshold)
    if not unique:
        return found
    scores = score_map[found]
    if scores.numel() == scores.unique().numel():
        return found
    # Equal scores: number the candidates in reverse order and keep the highest number of each
    # window.
    count = score_map[0].numel()
    numbers = torch.arange(count, 0, -1, device=score_map.device, dtype=torch.float64).view(
        score_map[:1].shape
    )
    numbers = numbers * found
    return found & (numbers == largest(numbers, window))


def strongest(score_map: Tensor, found: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` strongest marked pixels of one map (H,W), strongest first: positions (N,2)
    int64 as x, y, and scores (N,).

    Equal scores are in reading order.
    """
    yx = found.nonzero()
    scores = score_map[yx[:, 0], yx[:, 1]]
    order = scores.argsort(descending=True, stable=True)[:count]
    return yx[order].flip(-1), scores[order]


def refine(score_map: Tensor, xy: Tensor) -> Tensor:
    """Sub-pixel positions (N,2) float32 of integer maxima ``xy`` (N,2) of one map (H,W).

    The vertex of the paraboloid through the 3 x 3 neighborhood, at most half a pixel away along
    each axis. Positions at the edge of the map, and those without a strict maximum, are unchanged.
    """
    h, w = score_map.shape
    if not len(xy):
        return xy.to(torch.float32)
    x, y = xy[:, 0].clamp(1, max(w - 2, 1)), xy[:, 1].clamp(1, max(h - 2, 1))
    movable = (x == xy[:, 0]) & (y == xy[:, 1])
    if h < 3 or w < 3:
        return xy.to(torch.float32)
    flat = score_map.reshape(-1).to(torch.float64)
    center = y * w + x

    def at(dy: int, dx: int) -> Tensor:
        return flat[center + dy * w + dx]

    mid = at(0, 0)
    gx, gy = (at(0, 1) - at(0, -1)) / 2, (at(1, 0) - at(-1, 0)) / 2
    hxx, hyy = at(0, 1) + at(0, -1) - 2 * mid, at(1, 0) + at(-1, 0) - 2 * mid
    hxy = (at(1, 1) + at(-1, -1) - at(1, -1) - at(-1, 1)) / 4
    det = hxx * hyy - hxy * hxy
    proper = movable & (det > 1e-12 * mid.square()) & (hxx < 0)
    det = torch.where(proper, det, torch.ones_like(det))
    step = torch.stack([(hxy * gy - hyy * gx) / det, (hxy * gx - hxx * gy) / det], dim=-1)
    step = torch.where(proper[:, None], step, torch.zeros_like(step)).clamp(-0.5, 0.5)
    return (xy.to(torch.float64) + step).to(torch.float32)


def detect_peaks(
    score_map: Tensor,
    count: int,
    *,
    window: int = NMS_WINDOW,
    border: int = BORDER,
    threshold: float = 0.0,
    unique: bool = True,
    subpixel: bool = True,
    shape: str = "square",
) -> list[tuple[Tensor, Tensor]]:
    """Strongest peaks of each map of a batch (B,1,H,W): xy (N,2) float32 and score (N,) of every
    image, N <= count.

    Maxima are computed before the border is cleared, so that a slope that rises into the border
    gives no keypoint. ``unique=False`` is the published order: the border is cleared first, and
    all pixels of a plateau are kept.
    """
    inner = clear_border(score_map, border)
    if unique:
        found = local_maxima(score_map, window, threshold, shape=shape) & (
            clear_border(torch.ones_like(score_map), border) > 0
        )
    else:
        found = local_maxima(inner, window, threshold, unique=False)
    peaks = []
    source = score_map if unique else inner
    for one, mask in zip(source[:, 0], found[:, 0], strict=True):
        xy, score = strongest(one, mask, count)
        peaks.append((refine(one, xy) if subpixel else xy.to(torch.float32), score))
    return peaks
