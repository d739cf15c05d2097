"""Losses of detectors (multi-scale index proposal M-SIP, Gaussian, orientation alignment) and of
descriptors (triplet, second order, circle).

M-SIP: Key.Net, section 4 (Barroso-Laguna et al., ICCV 2019); REKD uses it with other window
weights. Where paper and published code differ (listed in docs/training.md), ``msip_loss`` follows
the code, because the published weights were trained with it, and ``paper_msip_loss`` the paper. All
losses return ``(loss, metrics)``: a scalar tensor to minimize and a dict of floats to log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import local_rotation, pixel_grid, sample_at, warp_image, warp_points
from ..keypoints import max_filter
from ..structure import GAUSSIAN_SIGMA

#: Window sides in pixels and the weight of each (paper 5.3).
WINDOWS = (8, 16, 24, 32, 40)
WINDOW_WEIGHTS = (256.0, 64.0, 16.0, 4.0, 1.0)
#: Constants of the published code: width of the ignored border in pixels, factor of the loss, and
#: offset against division by zero in empty windows.
BORDER = 16
FACTOR = 1000.0
EPS = 1e-6
SOFTMAX_FACTOR = 100.0


def _windows(maps: Tensor, window: int) -> Tensor:
    """Split maps (B,1,H,W) into windows (B,rows,cols,window*window); the rest on the right and
    bottom is dropped.
    """
    b, _, h, w = maps.shape
    rows, cols = h // window, w // window
    whole = maps[:, 0, : rows * window, : cols * window].reshape(b, rows, window, cols, window)
    return whole.permute(0, 1, 3, 2, 4).reshape(b, rows, cols, window * window)


def index_proposal(
    score_map: Tensor, window: int, *, base: float = math.e, detach_max: bool = True
) -> tuple[Tensor, Tensor]:
    """Soft argmax and soft maximum of every window (paper 4.1, equations 2 and 3).

    Args:
        score_map: (B,1,H,W), >= 0.
        window: side of the non-overlapping windows in pixels, starting at the top left corner.
        base: base of the spatial softmax (paper, table 1b).
        detach_max: no gradient through the window maximum that normalizes the scores.

    Returns:
        index (B,rows,cols,2): row and column inside the window, counted from 1; score
        (B,rows,cols).

    Raises:
        ValueError: ``base`` is not above 1.
    """
    if not base > 1:
        raise ValueError(f"base must be above 1, got {base}")
    values = _windows(score_map, window)  # (B,rows,cols,N*N)
    peak = values.amax(dim=-1, keepdim=True)
    if detach_max:
        peak = peak.detach()
    weights = torch.exp(values * (math.log(base) / (peak + EPS))) - 1 + EPS
    total = weights.sum(dim=-1) + EPS  # (B,rows,cols)
    count = torch.arange(1, window + 1, device=score_map.device, dtype=score_map.dtype)
    # (N*N,2) row, column
    positions = torch.stack([count.repeat_interleave(window), count.repeat(window)], dim=-1)
    index = (weights @ positions) / total[..., None]
    score = (weights * values).sum(dim=-1) / total
    return index, score


def hard_index(score_map: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Row and column (from 1) of the maximum of each window, (B,rows,cols,2), and the maximum
    (B,rows,cols).
    """
    peak, argmax = _windows(score_map, window).max(dim=-1)
    index = torch.stack([argmax // window + 1, argmax % window + 1], dim=-1)
    return index.to(score_map.dtype), peak


def window_weights(soft_score: Tensor, weighting: str) -> Tensor:
    """Weights of windows (B,rows,cols) by their soft score.

    Args:
        soft_score: (B,rows,cols).
        weighting: ``minmax``: normalized to 0..1 within each image (REKD); ``softmax``: 100 times
            the softmax within each image (Key.Net, TensorFlow); ``none``: 1.
    """
    flat = soft_score.detach().flatten(1)
    if weighting == "minmax":
        flat = flat - flat.amin(dim=1, keepdim=True)
        flat = flat / (flat.amax(dim=1, keepdim=True) + EPS)
    elif weighting == "softmax":
        flat = SOFTMAX_FACTOR * flat.softmax(dim=1)
    elif weighting == "none":
        flat = torch.ones_like(flat)
    else:
        raise ValueError(f"weighting must be minmax, softmax or none; got {weighting!r}")
    return flat.view_as(soft_score)


# One keyword for each variant of the paper and the published codes.
def index_proposal_loss(
    score_map: Tensor,
    target_map: Tensor,
    visible: Tensor,
    window: int,
    *,
    base: float = math.e,
    weighting: str = "minmax",
    visibility: str = "any",
    empty: str = "ignore",
    detach_max: bool = True,
    factor: float = FACTOR,
) -> Tensor:
    """Index proposal loss of one direction and one window size.

    Mean over the windows of ``factor * weight * |soft_argmax(score_map) - argmax(target_map)|^2 /
    window^2``.

    Args:
        score_map: (B,1,H,W), zero outside the common area; receives the gradient.
        target_map: (B,1,H,W), the scores of the other view in this frame, without gradient.
        visible: (B,1,H,W) in [0,1], the common area.
        window, base, detach_max: see ``index_proposal``.
        weighting: see ``window_weights``.
        visibility: ``any``: windows are weighted by their most visible pixel (published code);
            ``half``: only windows that are more than half visible count, because others may miss
            their true maximum.
        empty: windows without a positive target score are skipped (``ignore``) or have the target
            position 0 (``zero``, REKD).
        factor: of the loss.

    Returns:
        scalar
    """
    index, score = index_proposal(score_map, window, base=base, detach_max=detach_max)
    target, peak = hard_index(target_map, window)
    weight = window_weights(score, weighting)
    visible_part = _windows(visible, window)
    if visibility == "any":
        weight = weight * visible_part.amax(dim=-1)
    elif visibility == "half":
        weight = weight * (visible_part.mean(dim=-1) > 0.5)
    else:
        raise ValueError(f"visibility must be any or half, got {visibility!r}")
    if empty == "ignore":
        weight = weight * (peak > 0)
    elif empty == "zero":
        target = target * (peak > 0)[..., None]
    else:
        raise ValueError(f"empty must be ignore or zero, got {empty!r}")
    distance = ((index - target) / window).square().sum(dim=-1)
    return factor * (weight.detach() * distance).mean()


def border_mask(like: Tensor, border: int = BORDER) -> Tensor:
    """Mask (B,1,H,W) of ones with a border of zeros, ``border`` pixels wide."""
    h, w = like.shape[-2:]
    inner = like.new_ones(len(like), 1, max(h - 2 * border, 0), max(w - 2 * border, 0))
    left, top = min(border, w), min(border, h)
    return F.pad(inner, (left, w - left - inner.shape[-1], top, h - top - inner.shape[-2]))


def _without_border(score_map: Tensor, mask: Tensor | None, border: int) -> Tensor:
    """Mask (B,1,H,W), default 1, with zeros on the border."""
    inner = border_mask(score_map, border)
    return inner if mask is None else inner * mask


@dataclass(frozen=True)
class _Views:
    """Score maps of both views, the other view's maps warped to them, and the common areas,
    (B,1,H,W) each; zero outside the common area.
    """

    a: Tensor
    b: Tensor
    b_in_a: Tensor
    a_in_b: Tensor
    visible_a: Tensor
    visible_b: Tensor


def _warp_views(
    a: Tensor, b: Tensor, mask_a: Tensor, mask_b: Tensor, H_ab: Tensor, H_ba: Tensor
) -> _Views:
    """Warp each score map to the other view; no gradient through the warp."""
    with torch.no_grad():
        b_in_a, visible_a = warp_image(torch.cat([b * mask_b, mask_b], dim=1), H_ba).split(1, dim=1)
        a_in_b, visible_b = warp_image(torch.cat([a * mask_a, mask_a], dim=1), H_ab).split(1, dim=1)
        visible_a, visible_b = visible_a * mask_a, visible_b * mask_b
    return _Views(
        a * visible_a, b * visible_b, b_in_a * visible_a, a_in_b * visible_b, visible_a, visible_b
    )


def _check_score_maps(score_a: Tensor, score_b: Tensor) -> None:
    if score_a.shape != score_b.shape or score_a.ndim != 4 or score_a.shape[1] != 1:
        raise ValueError(
            f"score maps must be (B,1,H,W) of equal shape, got {score_a.shape} and {score_b.shape}"
        )


def _check_windows(score_map: Tensor, windows: Sequence[int], weights: Sequence[float]) -> None:
    """Check that windows (sides in pixels) have weights and fit into a score map (B,1,H,W)."""
    if len(windows) != len(weights):
        raise ValueError(f"{len(windows)} windows but {len(weights)} weights")
    if min(score_map.shape[-2:]) < max(windows):
        raise ValueError(
            f"maps of {tuple(score_map.shape[-2:])} pixels are smaller than a window of "
            f"{max(windows)}"
        )


def _prepared(
    score_a: Tensor,
    score_b: Tensor,
    H_ab: Tensor,
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    border: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H_ab, H_ba, and both masks without the border, of checked score maps."""
    _check_score_maps(score_a, score_b)
    H_ba = torch.linalg.inv(H_ab.to(torch.float64)).to(score_a)
    masks = (_without_border(score_a, mask, border) for mask in (mask_a, mask_b))
    return H_ab.to(score_a), H_ba, *masks


def _over_windows(
    loss_of: Callable[[int], Tensor],
    score_map: Tensor,
    windows: Sequence[int],
    weights: Sequence[float],
) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum of the losses of all windows, and the values to log."""
    _check_windows(score_map, windows, weights)
    total = score_map.new_zeros(())
    metrics: dict[str, float] = {}
    for window, weight in zip(windows, weights, strict=True):
        loss = loss_of(window)
        metrics[f"loss_{window}"] = loss.item()
        total = total + weight * loss
    return total, {**metrics, "loss": total.item()}


def msip_loss(
    score_a: Tensor,
    score_b: Tensor,
    H_ab: Tensor,
    *,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    windows: Sequence[int] = WINDOWS,
    weights: Sequence[float] = WINDOW_WEIGHTS,
    border: int = BORDER,
    **options: Any,
) -> tuple[Tensor, dict[str, float]]:
    """Multi-scale index proposal loss of a batch of pairs, the mean of both directions (paper 4.2,
    equation 5).

    Args:
        score_a, score_b: (B,1,S,S) score maps >= 0 of both views.
        H_ab: (B,3,3) homographies from a to b in pixels.
        mask_a, mask_b: (B,1,S,S), 1 where the pixel shows real image content; default: everywhere.
        windows, weights: window sides and their weights.
        border: width of the ignored border of each map in pixels.
        options: ``base``, ``weighting``, ``visibility``, ``empty``, ``detach_max`` and ``factor``
            of ``index_proposal_loss``.

    Returns:
        scalar loss and ``{"loss": ..., "loss_8": ..., ...}``.

    Raises:
        ValueError: unsuitable shapes, or different numbers of windows and weights.
    """
    H_ab, H_ba, valid_a, valid_b = _prepared(score_a, score_b, H_ab, mask_a, mask_b, border)
    # As in the published code, maps are cropped to whole windows before they are warped.
    cropped: dict[tuple[int, int], _Views] = {}

    def loss_of(window: int) -> Tensor:
        h, w = (side // window * window for side in score_a.shape[-2:])
        if (h, w) not in cropped:
            a, b, in_a, in_b = (t[..., :h, :w] for t in (score_a, score_b, valid_a, valid_b))
            cropped[h, w] = _warp_views(a, b, in_a, in_b, H_ab, H_ba)
        v = cropped[h, w]
        loss_a = index_proposal_loss(v.a, v.b_in_a, v.visible_a, window, **options)
        loss_b = index_proposal_loss(v.b, v.a_in_b, v.visible_b, window, **options)
        return (loss_a + loss_b) / 2

    return _over_windows(loss_of, score_a, windows, weights)


def soft_coordinates(
    score: Tensor, xy: Tensor, index: Tensor, count: int, *, base: float = math.e
) -> tuple[Tensor, Tensor]:
    """Softmax-weighted mean position of the pixels of each window (paper 4.1, equations 2 and 3).

    Args:
        score: (B,P) scores.
        xy: (P,2) positions of the pixels.
        index: (B,P) window of each pixel, 0 .. count - 1; -1: none.
        count: number of windows W.
        base: base of the softmax.

    Returns:
        positions (B,W,2), and whether a window has pixels (B,W); without, the position is (0, 0).
    """
    bins = torch.where(index < 0, count, index)  # the last one is dropped
    empty = score.new_full((len(score), count + 1), -torch.inf)
    peak = empty.scatter_reduce(1, bins, score.detach(), "amax")  # against overflow
    weight = torch.exp(math.log(base) * (score - peak.gather(1, bins)))
    sums = score.new_zeros(len(score), count + 1, 3).scatter_add(
        1,
        bins[..., None].expand(-1, -1, 3),
        weight[..., None] * torch.cat([xy, torch.ones_like(xy[:, :1])], dim=-1),
    )[:, :count]
    found = sums[..., 2] > 0
    return sums[..., :2] / torch.where(found, sums[..., 2], 1.0)[..., None], found


def paper_msip_loss(
    score_a: Tensor,
    score_b: Tensor,
    H_ab: Tensor,
    *,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    windows: Sequence[int] = WINDOWS,
    weights: Sequence[float] = WINDOW_WEIGHTS,
    border: int = BORDER,
    base: float = math.e,
) -> tuple[Tensor, dict[str, float]]:
    """Multi-scale index proposal loss as the paper defines it (section 4, equations 2 to 5).

    Sum over the windows of a of ``(R_a(x_a) + R_b(x_b)) |x_a - H_ba x_b|^2``, mean over the batch.
    ``x_a`` is the soft argmax of a window of a, ``x_b`` that of the pixels of b that the homography
    maps into the same window, both in pixels and within the common area. Gradients flow through
    both positions. None flows through ``R_a + R_b``, the weight of a window: with one, a score map
    of zeros would be the minimum. A constant score map is a minimum in any case
    (docs/training.md); ``msip_loss`` excludes it by its hard target.

    Args:
        score_a, score_b, H_ab, mask_a, mask_b, windows, weights, border: as in ``msip_loss``.
        base: base of the softmax (table 1b).

    Returns:
        scalar loss and ``{"loss": ..., "loss_8": ..., ...}``.

    Raises:
        ValueError: as ``msip_loss``, or ``base`` is not above 1.
    """
    if not base > 1:
        raise ValueError(f"base must be above 1, got {base}")
    H_ab, H_ba, mask_a, mask_b = _prepared(score_a, score_b, H_ab, mask_a, mask_b, border)
    h, w = score_a.shape[-2:]
    grid = pixel_grid(h, w, score_a)  # (H*W,2)
    grids = grid.expand(len(H_ba), -1, -1)
    with torch.no_grad():
        common_a = (mask_a * warp_image(mask_b, H_ba) > 0.5).flatten(1)  # (B,H*W)
        common_b = (mask_b * warp_image(mask_a, H_ab) > 0.5).flatten(1)
        b_in_a = warp_points(grids, H_ba)

    def loss_of(window: int) -> Tensor:
        count = (h // window) * (w // window)
        index_a = _window_index(grids, common_a, window, (h, w))
        xy_a, found_a = soft_coordinates(score_a.flatten(1), grid, index_a, count, base=base)
        index_b = _window_index(b_in_a, common_b, window, (h, w))
        xy_b, found_b = soft_coordinates(score_b.flatten(1), grid, index_b, count, base=base)
        with torch.no_grad():
            height = (sample_at(score_a, xy_a) + sample_at(score_b, xy_b))[:, 0]  # (B,W)
        distance = (xy_a - warp_points(xy_b, H_ba)).square().sum(dim=-1)
        return torch.where(found_a & found_b, height * distance, 0.0).sum(dim=1).mean()

    return _over_windows(loss_of, score_a, windows, weights)


def _window_index(xy: Tensor, valid: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """Window of each point (B,P,2) of a map of ``size``, counted row by row: (B,P); -1 for points
    in none and for those that are not ``valid``.
    """
    rows, cols = (side // window for side in size)
    cell = ((xy + 0.5) / window).nan_to_num(-1.0, -1.0, -1.0).floor()
    inside = ((cell >= 0) & (cell < cell.new_tensor([cols, rows]))).all(dim=-1) & valid
    return torch.where(inside, cell[..., 1] * cols + cell[..., 0], -1).long()


# Gaussian
# -----------------------------------------------------------------------------

#: Side of the window around a peak, and maximum distance of the other view's peak, in pixels.
GAUSSIAN_WINDOW = 15
AGREEMENT = 2
#: Value of a target's Gaussian at a distance of one pixel.
ON_TARGET = 0.8
#: Peaks are weighted by their height to this power; with 1, few strong peaks would dominate.
HEIGHT_POWER = 0.25


def gaussian_likeness(
    score_map: Tensor, window: int = GAUSSIAN_WINDOW, sigma: float = GAUSSIAN_SIGMA
) -> Tensor:
    """Cosine similarity of the neighborhood of every pixel and a Gaussian peak, in [0,1].

    ``<R, T> / (|R| |T|)`` of the ``window`` x ``window`` scores R around the pixel and ``T =
    exp(-|x|^2 / 2 sigma^2)``. (B,1,H,W) -> (B,1,H,W).
    """
    radius = window // 2
    offset = (torch.arange(window, device=score_map.device) - radius).to(score_map)
    taps = torch.exp(-0.5 * offset.square() / sigma**2)
    rows = F.conv2d(score_map, taps.view(1, 1, 1, -1), padding=(0, radius))
    product = F.conv2d(rows, taps.view(1, 1, -1, 1), padding=(radius, 0))
    energy = F.avg_pool2d(score_map.square(), window, stride=1, padding=radius) * window**2
    return product / ((energy + EPS**2).sqrt() * taps.square().sum())


def local_cosine(a: Tensor, b: Tensor, window: int = GAUSSIAN_WINDOW) -> Tensor:
    """Cosine similarity (B,1,H,W) of two maps (B,1,H,W) in the ``window`` x ``window`` neighborhood
    of every pixel.
    """

    def mean(maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, window, stride=1, padding=window // 2)

    return mean(a * b) / ((mean(a.square()) * mean(b.square())).clamp(min=0) + EPS**4).sqrt()


def _gaussian_terms(
    score: Tensor,
    other: Tensor,
    visible: Tensor,
    window: int,
    sigma: float,
    anchor: Tensor | None,
    target: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of one direction; arguments as in ``gaussian_loss``, ``other`` is the warped map.

    Returns:
        shape loss; fraction of the peaks without a peak of the other view; number of peaks.
    """
    with torch.no_grad():
        valid = visible > 0.999
        peaks = (score == max_filter(score, window)) & (score > 0) & valid
        other_peaks = (other == max_filter(other, window)) & (other > 0)
        both = score + other
        common_peaks = (both == max_filter(both, window)) & valid
        side = 2 * AGREEMENT + 1
        near_peak, near_other = (max_filter(p.to(score), side) for p in (peaks, other_peaks))
        if anchor is not None:  # a peak off structure counts as if the other view did not have it
            near_other = near_other * anchor
        weight = common_peaks * near_peak * near_other * both**HEIGHT_POWER
        if target is not None:  # known positions replace the peaks of both views
            has_targets = target.amax(dim=(1, 2, 3), keepdim=True) > 0
            known = ((target > ON_TARGET) & valid).to(score)
            weight = torch.where(has_targets, known, weight)
            near_other = torch.where(has_targets, (target > ON_TARGET).to(score), near_other)
        weight = weight / weight.sum(dim=(1, 2, 3), keepdim=True).clamp(min=EPS)
    likeness = gaussian_likeness(score, window, sigma)
    if target is not None:
        likeness = torch.where(has_targets, local_cosine(score, target, window), likeness)
    shape = (weight * (1 - likeness)).sum(dim=(1, 2, 3)).mean()
    height = (score + EPS) ** HEIGHT_POWER * peaks
    unmatched = (height * (1 - near_other)).sum(dim=(1, 2, 3)) / (height.sum(dim=(1, 2, 3)) + EPS)
    return shape, unmatched.mean(), peaks.sum()


# Masks, anchors and targets are keywords of their own, as the items of a batch.
def gaussian_loss(
    score_a: Tensor,
    score_b: Tensor,
    H_ab: Tensor,
    *,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    anchor_a: Tensor | None = None,
    anchor_b: Tensor | None = None,
    target_a: Tensor | None = None,
    target_b: Tensor | None = None,
    window: int = GAUSSIAN_WINDOW,
    sigma: float = GAUSSIAN_SIGMA,
    border: int = BORDER,
) -> tuple[Tensor, dict[str, float]]:
    """Gaussian loss of SobelNet (named in Yuan et al. 2020; our formula, see docs/training.md).

    Peaks are the maxima of ``window`` x ``window`` pixels. The shape term is the mean of ``1 -
    gaussian_likeness`` at the peaks of the sum of both views that have a peak of each view within
    2 px. The second term is the fraction of peaks without a peak of the other view. Peaks are
    weighted by ``HEIGHT_POWER``; the loss does not depend on the scale of the scores. Mean of both
    directions.

    Args:
        score_a, score_b: (B,1,S,S) score maps >= 0 of both views.
        H_ab: (B,3,3) homographies from a to b in pixels.
        mask_a, mask_b: (B,1,S,S), 1 where the pixel shows real image content; default: everywhere.
        anchor_a, anchor_b: (B,1,S,S) in [0,1], weight of a peak (``anchor_weight``); default: 1.
        target_a, target_b: (B,1,S,S), Gaussians of height 1 at known keypoints, 0 elsewhere. In
            images with targets, the score map is compared with this map, and peaks more than a
            pixel from all targets are penalized.
        window: odd side in pixels.
        sigma: standard deviation of the Gaussian in pixels.
        border: width of the ignored border of each map in pixels.

    Returns:
        scalar and the metrics ``loss``, ``shape``, ``alone`` (second term), ``peaks`` (per map).

    Raises:
        ValueError: unsuitable shapes, or an invalid window or sigma.
    """
    if window < 3 or window % 2 == 0 or not sigma > 0:
        raise ValueError(
            f"window must be odd and at least 3 and sigma above 0, got {window} and {sigma}"
        )
    H_ab, H_ba, mask_a, mask_b = _prepared(score_a, score_b, H_ab, mask_a, mask_b, border)
    v = _warp_views(score_a, score_b, mask_a, mask_b, H_ab, H_ba)
    terms_a = _gaussian_terms(v.a, v.b_in_a, v.visible_a, window, sigma, anchor_a, target_a)
    terms_b = _gaussian_terms(v.b, v.a_in_b, v.visible_b, window, sigma, anchor_b, target_b)
    shape, unmatched = ((terms_a[i] + terms_b[i]) / 2 for i in range(2))
    loss = shape + unmatched
    return loss, {
        "loss": loss.item(),
        "shape": shape.item(),
        "alone": unmatched.item(),
        "peaks": float(terms_a[2] + terms_b[2]) / (2 * len(score_a)),
    }


# Orientation
# -----------------------------------------------------------------------------


def shift_bins(histogram: Tensor, bins: Tensor) -> Tensor:
    """Shift histograms (B,N,H,W) cyclically by ``bins`` (B,1,H,W or 1,1), with linear
    interpolation.
    """
    n = histogram.shape[1]
    whole = bins.floor()
    frac = bins - whole
    target = torch.arange(n, device=histogram.device).view(1, n, 1, 1)
    source = ((target - whole.long()) % n).expand(histogram.shape)
    lower = histogram.gather(1, source)
    return lower + frac * (histogram.gather(1, (source - 1) % n) - lower)


def orientation_loss(
    histogram_a: Tensor,
    histogram_b: Tensor,
    H_ab: Tensor,
    *,
    mask_a: Tensor | None = None,
    bins: Tensor | None = None,
    border: int = 0,
) -> tuple[Tensor, dict[str, float]]:
    """Dense orientation alignment loss (REKD, section 3.3).

    Cross-entropy ``-sum_k A[k - d] log(B[k] + 1e-7)`` of the histogram of a, shifted by the true
    rotation ``d``, and that of b warped to a; mean over the common area. Gradients flow through
    both.

    Args:
        histogram_a, histogram_b: (B,N,H,W) probabilities over N; bin k is the orientation k 360/N
            degrees counter-clockwise.
        H_ab: (B,3,3) homographies from a to b in pixels, without mirroring.
        mask_a: (B,1,H,W), weight of the pixels of a; default: 1 in the common area.
        bins: (B,1,1,1) rotation in bins, counter-clockwise; default: ``local_rotation`` at each
            pixel. The published code truncates the angle to whole bins (of ``360 // N`` degrees).
        border: width of the ignored border in pixels.

    Returns:
        scalar loss and ``{"loss": ..., "agree": fraction of pixels whose strongest bins differ by
        at most one}``.

    Raises:
        ValueError: the histograms differ in shape, or a homography mirrors, so that the rotation is
            undefined.
    """
    if histogram_a.shape != histogram_b.shape or histogram_a.ndim != 4:
        raise ValueError(
            f"histograms must be (B,N,H,W) of equal shape, got {histogram_a.shape} and "
            f"{histogram_b.shape}"
        )
    if bool((torch.linalg.det(H_ab) * H_ab[:, 2, 2] < 0).any()):
        raise ValueError(
            "a pair is mirrored, so its relative rotation is undefined; create pairs without "
            "mirroring (preset turns or rekd)"
        )
    n = histogram_a.shape[1]
    H_ba = torch.linalg.inv(H_ab.to(torch.float64)).to(histogram_a)
    warped = warp_image(torch.cat([histogram_b, torch.ones_like(histogram_b[:, :1])], dim=1), H_ba)
    b_in_a, valid = warped[:, :n], warped[:, n:].detach()
    mask = (valid > 0).to(b_in_a) if mask_a is None else (valid > 0.999) * mask_a
    if border:
        mask = mask * border_mask(mask, border)
    expected = shift_bins(histogram_a, _true_bins(histogram_a, H_ab) if bins is None else bins)
    entropy = -(expected * torch.log(b_in_a + 1e-7)).sum(dim=1, keepdim=True)
    count = mask.sum().clamp(min=1)
    loss = (entropy * mask).sum() / count
    with torch.no_grad():
        difference = expected.argmax(dim=1, keepdim=True) - b_in_a.argmax(dim=1, keepdim=True)
        difference = (difference + n // 2) % n - n // 2
        agree = ((difference.abs() <= 1) * mask).sum() / count
    return loss, {"loss": loss.item(), "agree": agree.item()}


def _true_bins(histogram: Tensor, H_ab: Tensor) -> Tensor:
    """Rotation (B,1,H,W) of a homography in bins of a histogram (B,N,H,W), counter-clockwise."""
    b, n, h, w = histogram.shape
    rotation = local_rotation(pixel_grid(h, w, H_ab.to(torch.float64)), H_ab).view(b, 1, h, w)
    return -rotation.to(histogram) * (n / (2 * math.pi))  # local_rotation is clockwise


# Descriptors
# -----------------------------------------------------------------------------

#: Patches with a smaller descriptor distance are assumed to show the same point and are not used as
#: negatives (published code of HardNet and HyNet).
SAME_POINT = 0.008
#: Larger than any distance of unit vectors; added to exclude a patch from the negatives.
FAR = 10.0


def pairwise_distances(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Distances (N,M) of unit vectors (N,D) and (M,D): ``sqrt(|a|^2 + |b|^2 - 2 a b + eps)``."""
    squared = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None] - 2 * a @ b.T
    return (squared.clamp(min=0) + eps).sqrt()


def _check_pairs(anchor: Tensor, positive: Tensor) -> None:
    if anchor.ndim != 2 or anchor.shape != positive.shape:
        raise ValueError(
            f"descriptors must be two (N,D) of the same shape, got {tuple(anchor.shape)} and "
            f"{tuple(positive.shape)}"
        )
    if len(anchor) < 2:
        raise ValueError(
            "a batch needs at least two pairs, because the negatives come from other pairs"
        )


def _negatives(distances: Tensor) -> Tensor:
    """Distances (N,N) with ``FAR`` added to positives and suspected repetitions of a point."""
    same = torch.eye(len(distances), dtype=torch.bool, device=distances.device) | (
        distances.detach() < SAME_POINT
    )
    return distances + FAR * same


def hardest_negatives(
    anchor: Tensor, positive: Tensor, *, within: bool = False
) -> tuple[Tensor, Tensor]:
    """Distances (N,) of the positive pairs, and to the nearest negative of either side (anchor
    swap).

    Args:
        anchor, positive: (N,D) unit descriptors.
        within: also search negatives among the anchors and among the positives (SOSNet, HyNet).
    """
    across = pairwise_distances(anchor, positive)
    negatives = _negatives(across)
    nearest = torch.minimum(negatives.amin(dim=1), negatives.amin(dim=0))
    if within:
        for side in (anchor, positive):
            nearest = torch.minimum(nearest, _negatives(pairwise_distances(side, side)).amin(dim=1))
    return across.diagonal(), nearest


def hardnet_loss(
    anchor: Tensor, positive: Tensor, *, margin: float = 1.0, anchor_swap: bool = True
) -> tuple[Tensor, dict[str, float]]:
    """HardNet's triplet loss with the hardest negative in the batch (Mishchuk et al. 2017, equation
    1): ``mean max(0, margin + d_pos - d_neg)``.

    Args:
        anchor, positive: (N,D) unit descriptors, N >= 2; row i of both shows the same point.
        margin: required difference of the distances.
        anchor_swap: use the nearer one of the negatives of anchor and positive.

    Returns:
        scalar and the metrics ``loss``, ``positive``, ``negative`` (mean distances).

    Raises:
        ValueError: unsuitable shapes.
    """
    _check_pairs(anchor, positive)
    if anchor_swap:
        near, far = hardest_negatives(anchor, positive)
    else:
        across = pairwise_distances(anchor, positive)
        near, far = across.diagonal(), _negatives(across).amin(dim=1)
    loss = (margin + near - far).clamp(min=0).mean()
    return loss, {
        "loss": loss.item(),
        "positive": near.mean().item(),
        "negative": far.mean().item(),
    }


def hard_negative_constant_loss(
    anchor: Tensor, positive: Tensor, *, margin: float = 1.0
) -> tuple[Tensor, dict[str, float]]:
    """The loss HardNegC of AffNet (Mishkin et al. 2018): the value of ``hardnet_loss``, but the
    distances to the negatives are constants, so that only the distances of the pairs are reduced.

    Arguments, results and errors as ``hardnet_loss``.
    """
    _check_pairs(anchor, positive)
    near, far = hardest_negatives(anchor, positive)
    loss = (margin + near - far.detach()).clamp(min=0).mean()
    return loss, {
        "loss": loss.item(),
        "positive": near.mean().item(),
        "negative": far.mean().item(),
    }


def nearest_neighbors(distances: Tensor, k: int) -> Tensor:
    """Mask (N,N) bool of the ``k`` nearest neighbors of each row, without the diagonal."""
    blocked = distances.detach() + FAR * torch.eye(len(distances), device=distances.device)
    index = blocked.topk(min(k, len(distances) - 1), dim=1, largest=False).indices
    return torch.zeros_like(blocked, dtype=torch.bool).scatter_(1, index, True)


def second_order_term(anchor: Tensor, positive: Tensor, *, neighbors: int = 8) -> Tensor:
    """SOSNet's second order similarity (Tian et al. 2019, equation 5).

    ``mean_i sqrt(sum_j A_ij (|a_i - a_j| - |p_i - p_j|)^2 + 1e-6)``, with A the symmetric union of
    the ``neighbors`` nearest neighbors among the anchors, among the positives and between them.
    """
    within_a, within_p = pairwise_distances(anchor, anchor), pairwise_distances(positive, positive)
    across = pairwise_distances(anchor, positive)
    graph = (
        nearest_neighbors(within_a, neighbors)
        | nearest_neighbors(within_p, neighbors)
        | nearest_neighbors(across, neighbors)
    )
    graph = graph | graph.T
    return ((within_a - within_p).square() * graph).sum(dim=1).add(1e-6).sqrt().mean()


def sosnet_loss(
    anchor: Tensor,
    positive: Tensor,
    *,
    margin: float = 1.0,
    neighbors: int = 8,
    second_order: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """SOSNet's loss: squared hinge on the hardest negative of four sets, plus ``second_order``
    times ``second_order_term``.

    Means over the batch, instead of the sums of the published code. Arguments and result as in
    ``hardnet_loss``.
    """
    _check_pairs(anchor, positive)
    near, far = hardest_negatives(anchor, positive, within=True)
    first = (margin + near - far).clamp(min=0).square().mean()
    second = second_order_term(anchor, positive, neighbors=neighbors)
    loss = first + second_order * second
    return loss, {
        "loss": loss.item(),
        "first": first.item(),
        "second": second.item(),
        "positive": near.mean().item(),
        "negative": far.mean().item(),
    }


def hynet_loss(
    raw_anchor: Tensor,
    raw_positive: Tensor,
    *,
    margin: float = 1.2,
    alpha: float = 2.0,
    length: float = 0.1,
    second_order: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """HyNet's triplet loss on the hybrid similarity with L2 norm regularization (Tian et al. 2020,
    3.2 and 3.3).

    ``mean max(0, margin + s_pos - s_neg) + length mean (|x_a| - |x_p|)^2`` with ``s = d + alpha d^2
    / 2`` of the distance d: the gradient of d alone is too strong for near pairs, that of the inner
    product too weak. Means instead of the sums of the published code.

    Args:
        raw_anchor, raw_positive: (N,D) descriptors before L2 normalization, N >= 2.
        margin: required difference of the similarities.
        alpha: weight of the squared distance in the similarity.
        length: weight of the regularization.
        second_order: weight of SOSNet's term, which the paper tests but does not use.

    Returns:
        scalar and metrics, as in ``hardnet_loss``.
    """
    _check_pairs(raw_anchor, raw_positive)
    norms = [(x.square().sum(dim=1) + 1e-6).sqrt() for x in (raw_anchor, raw_positive)]
    anchor, positive = (
        x / norm[:, None] for x, norm in zip((raw_anchor, raw_positive), norms, strict=True)
    )
    near, far = hardest_negatives(anchor, positive, within=True)
    hinge = (
        (margin + (near + alpha / 2 * near.square()) - (far + alpha / 2 * far.square()))
        .clamp(min=0)
        .mean()
    )
    drift = (norms[0] - norms[1]).square().mean()
    loss = hinge + length * drift
    metrics = {
        "hinge": hinge.item(),
        "drift": drift.item(),
        "positive": near.mean().item(),
        "negative": far.mean().item(),
    }
    if second_order:
        second = second_order_term(anchor, positive)
        loss = loss + second_order * second
        metrics["second"] = second.item()
    return loss, {"loss": loss.item(), **metrics}


#: Margin and scale of the circle loss (Sun et al. 2020: 0.25 and 64 to 256).
CIRCLE_MARGIN = 0.25
CIRCLE_SCALE = 64.0


def circle_loss(
    similarity: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = CIRCLE_MARGIN,
    scale: float = CIRCLE_SCALE,
) -> tuple[Tensor, dict[str, float]]:
    """Circle loss (Sun et al. 2020, equations 4 to 8), mean over the rows with positives and
    negatives.

    ``softplus(LSE_j scale a_n (s_n - margin) + LSE_i -scale a_p (s_p - 1 + margin))`` with ``a_p =
    max(0, 1 + margin - s_p)`` and ``a_n = max(0, s_n + margin)``, both without gradient. The
    weights are largest for hard positives and hard negatives.

    Args:
        similarity: (N,M) cosine similarities.
        positive, negative: (N,M) bool; other pairs are ignored.
        margin, scale: see above.

    Returns:
        scalar (0 without such rows) and the metrics ``loss``, ``rows`` (their number),
        ``positive``, ``negative`` (mean similarity of the hardest positive and negative).

    Raises:
        ValueError: the shapes differ.
    """
    if (
        similarity.ndim != 2
        or similarity.shape != positive.shape
        or similarity.shape != negative.shape
    ):
        raise ValueError(
            f"expected three (N,M), got {tuple(similarity.shape)}, {tuple(positive.shape)}, "
            f"{tuple(negative.shape)}"
        )
    rows = positive.any(dim=1) & negative.any(dim=1)
    if not bool(rows.any()):
        return similarity.sum() * 0.0, {"loss": 0.0, "positive": 0.0, "negative": 0.0, "rows": 0.0}
    s, p, n = similarity[rows], positive[rows], negative[rows]
    weight_p = (1 + margin - s.detach()).clamp(min=0)
    weight_n = (s.detach() + margin).clamp(min=0)
    logits_p = (-scale * weight_p * (s - (1 - margin))).masked_fill(~p, -math.inf)
    logits_n = (scale * weight_n * (s - margin)).masked_fill(~n, -math.inf)
    loss = F.softplus(logits_p.logsumexp(dim=1) + logits_n.logsumexp(dim=1)).mean()
    with torch.no_grad():
        hardest_positive = s.masked_fill(~p, 2.0).amin(dim=1).mean()
        hardest_negative = s.masked_fill(~n, -2.0).amax(dim=1).mean()
    return loss, {
        "loss": loss.item(),
        "positive": hardest_positive.item(),
        "negative": hardest_negative.item(),
        "rows": float(rows.sum()),
    }


def off_structure(
    score: Tensor,
    anchor: Tensor,
    mask: Tensor,
    *,
    window: int = GAUSSIAN_WINDOW,
    border: int = BORDER,
) -> Tensor:
    """Fraction of the peaks, weighted by height, that lie off image structure; mean over the
    images.

    Args:
        score: (B,1,S,S) score maps >= 0.
        anchor: (B,1,S,S) in [0,1], ``anchor_weight``.
        mask: (B,1,S,S), 1 where peaks count.
        window: odd side in pixels of the neighborhood of a peak.
        border: width of the ignored border of each map in pixels.

    Returns:
        scalar in [0,1].
    """
    score = score * border_mask(score, border) * mask
    peak = (score.detach() == max_filter(score.detach(), window)) & (score > 0)
    height = score * peak
    fraction = (height * (1 - anchor)).sum(dim=(1, 2, 3)) / height.sum(dim=(1, 2, 3)).clamp(min=EPS)
    return fraction.mean()
