"""Losses. Detectors: multi-scale index-proposal (M-SIP), Gaussian, orientation alignment;
descriptors: triplet, second order, circle.

Key.Net, section 4 (Barroso-Laguna et al., ICCV 2019); REKD uses the same loss with other window
weights. Where paper and published code disagree (docs/training.md lists it) the code is followed,
because it made the published weights. All losses return ``(loss, numbers)``: a scalar tensor to
minimise and a dict of floats for the log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import local_rotation, pixel_grid, warp_image
from ..keypoints import max_filter
from ..structure import GAUSSIAN_SIGMA

#: Window sides in pixels and the weight of each (paper 5.3).
WINDOWS = (8, 16, 24, 32, 40)
WINDOW_WEIGHTS = (256.0, 64.0, 16.0, 4.0, 1.0)
#: Constants of the published code: frame of pixels that never count, factor of the loss, guard
#: against empty windows.
BORDER = 16
FACTOR = 1000.0
EPS = 1e-6
SOFTMAX_FACTOR = 100.0


def _windows(maps: Tensor, window: int) -> Tensor:
    """(B,1,H,W) -> (B,rows,cols,window*window), dropping what does not fill a window at the right
    and bottom.
    """
    b, _, h, w = maps.shape
    rows, cols = h // window, w // window
    cut = maps[:, 0, : rows * window, : cols * window].reshape(b, rows, window, cols, window)
    return cut.permute(0, 1, 3, 2, 4).reshape(b, rows, cols, window * window)


def index_proposal(
    score_map: Tensor, window: int, *, base: float = math.e, detach_max: bool = True
) -> tuple[Tensor, Tensor]:
    """Soft position and soft score of the strongest point of every window (paper 4.1, equations 2
    and 3).

    Args:
        score_map: (B,1,H,W), >= 0.
        window: side of the non-overlapping windows in pixels, laid from the top left corner.
        base: base of the spatial softmax (paper, table 1b).
        detach_max: keep the gradient from flowing through the window maximum that normalises the
            scores.

    Returns:
        index (B,rows,cols,2): row and column inside the window, counted from 1; score
        (B,rows,cols).
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
    axes = torch.stack(
        [count.repeat_interleave(window), count.repeat(window)], dim=-1
    )  # (N*N,2) row, column
    index = (weights @ axes) / total[..., None]
    score = (weights * values).sum(dim=-1) / total
    return index, score


def hard_index(score_map: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Row and column (from 1) of each window's maximum, (B,rows,cols,2), and that maximum
    (B,rows,cols).
    """
    peak, place = _windows(score_map, window).max(dim=-1)
    index = torch.stack([place // window + 1, place % window + 1], dim=-1)
    return index.to(score_map.dtype), peak


def window_weights(soft_score: Tensor, weighting: str) -> Tensor:
    """How much each window (B,rows,cols) counts by its soft score.

    ``minmax``: from 0 to 1 within each image (REKD); ``softmax``: 100 times the softmax within each
    image (Key.Net, TensorFlow); ``none``: 1.
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
    """One direction, one window size: squared distance of soft positions to the maxima of the other
    view.

    ``mean over windows of factor * weight * |soft(score_map) - argmax(target_map)|^2 / window^2``.

    Args:
        score_map: (B,1,H,W), already zero where not visible; the gradient flows through it.
        target_map: (B,1,H,W), the other view's scores in this frame, a constant.
        visible: (B,1,H,W) in [0,1], the common area.
        visibility: ``any`` weighs a window by its most visible pixel (published code); ``half``
            counts only windows more than half visible, so that a cut-off neighbour cannot be taken
            for the maximum.
        empty: a window whose target holds no positive score is skipped (``ignore``) or takes
            position 0 (``zero``, REKD).

    Returns:
        scalar
    """
    index, score = index_proposal(score_map, window, base=base, detach_max=detach_max)
    target, peak = hard_index(target_map, window)
    weight = window_weights(score, weighting)
    seen = _windows(visible, window)
    if visibility == "any":
        weight = weight * seen.amax(dim=-1)
    elif visibility == "half":
        weight = weight * (seen.mean(dim=-1) > 0.5)
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
    """Ones (B,1,H,W) with a frame of zeros ``border`` pixels wide."""
    h, w = like.shape[-2:]
    inner = like.new_ones(len(like), 1, max(h - 2 * border, 0), max(w - 2 * border, 0))
    left, top = min(border, w), min(border, h)
    return F.pad(inner, (left, w - left - inner.shape[-1], top, h - top - inner.shape[-2]))


def _meet(views: list[Tensor], H_ab: Tensor, H_ba: Tensor) -> tuple[Tensor, ...]:
    """Both maps and their warped partners in each frame, zero outside the common area, and the two
    common areas.
    """
    a, b, mask_a, mask_b = views
    with torch.no_grad():
        b_in_a, visible_a = warp_image(torch.cat([b * mask_b, mask_b], dim=1), H_ba).split(1, dim=1)
        a_in_b, visible_b = warp_image(torch.cat([a * mask_a, mask_a], dim=1), H_ab).split(1, dim=1)
        visible_a, visible_b = visible_a * mask_a, visible_b * mask_b
    return (
        a * visible_a,
        b * visible_b,
        b_in_a * visible_a,
        a_in_b * visible_b,
        visible_a,
        visible_b,
    )


def msip_loss(
    score_a: Tensor,
    score_b: Tensor,
    H_ab: Tensor,
    *,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    windows: Sequence[int] = WINDOWS,
    weights: Sequence[float] = WINDOW_WEIGHTS,
    base: float = math.e,
    weighting: str = "minmax",
    visibility: str = "any",
    empty: str = "ignore",
    detach_max: bool = True,
    border: int = BORDER,
    factor: float = FACTOR,
) -> tuple[Tensor, dict[str, float]]:
    """Multi-scale index-proposal loss of a batch of pairs (paper 4.2, equation 5; both directions
    averaged).

    Args:
        score_a, score_b: (B,1,S,S) score maps >= 0 of both views.
        H_ab: (B,3,3) homographies from a to b in pixels.
        mask_a, mask_b: (B,1,S,S), 1 where the pixel shows real image content; default everywhere.
        windows, weights: window sides and the weight of each.
        base, weighting, visibility, empty, detach_max, factor: see ``index_proposal_loss``.
        border: frame of each map that never counts.

    Returns:
        scalar loss and ``{"loss": ..., "loss_8": ..., ...}``.

    Raises:
        ValueError: shapes do not fit, or windows and weights differ in number.
    """
    if score_a.shape != score_b.shape or score_a.ndim != 4 or score_a.shape[1] != 1:
        raise ValueError(
            f"score maps must be (B,1,H,W) of equal shape, got {score_a.shape} and {score_b.shape}"
        )
    if len(windows) != len(weights):
        raise ValueError(f"{len(windows)} windows but {len(weights)} weights")
    if min(score_a.shape[-2:]) < max(windows):
        raise ValueError(
            f"maps of {tuple(score_a.shape[-2:])} pixels do not hold a window of {max(windows)}"
        )
    H_ba = torch.linalg.inv(H_ab.to(torch.float64)).to(score_a)
    H_ab = H_ab.to(score_a)
    frame = border_mask(score_a, border)
    mask_a = frame if mask_a is None else frame * mask_a
    mask_b = frame if mask_b is None else frame * mask_b
    total = score_a.new_zeros(())
    numbers: dict[str, float] = {}
    # The windows cover only the part of the maps that they fill, and the published code cuts before
    # it warps.
    cuts: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    for window, weight in zip(windows, weights, strict=True):
        cut = (score_a.shape[-2] // window * window, score_a.shape[-1] // window * window)
        if cut not in cuts:
            cuts[cut] = _meet(
                [t[..., : cut[0], : cut[1]] for t in (score_a, score_b, mask_a, mask_b)], H_ab, H_ba
            )
        a, b, b_in_a, a_in_b, visible_a, visible_b = cuts[cut]
        options = {
            "base": base,
            "weighting": weighting,
            "visibility": visibility,
            "empty": empty,
            "detach_max": detach_max,
            "factor": factor,
        }
        loss_a = index_proposal_loss(a, b_in_a, visible_a, window, **options)  # type: ignore[arg-type]
        loss_b = index_proposal_loss(b, a_in_b, visible_b, window, **options)  # type: ignore[arg-type]
        loss = (loss_a + loss_b) / 2
        numbers[f"loss_{window}"] = loss.item()
        total = total + weight * loss
    numbers["loss"] = total.item()
    return total, numbers


# Gaussian
# -----------------------------------------------------------------------------

#: Side of the window around a peak, its standard deviation, and how near the other view's peak must
#: be, in pixels.
GAUSSIAN_WINDOW = 15

AGREEMENT = 2
#: A pixel with more than this height of a target's Gaussian is within a pixel of it.
ON_TARGET = 0.8
#: A peak counts by its height to this power: with 1, few strong peaks outgrow all others.
HEIGHT_POWER = 0.25


def gaussian_likeness(
    score_map: Tensor, window: int = GAUSSIAN_WINDOW, sigma: float = GAUSSIAN_SIGMA
) -> Tensor:
    """How much the surroundings of every pixel look like one Gaussian peak at it: their cosine,
    (B,1,H,W) -> (B,1,H,W) in [0,1].

    ``<R, T> / (|R| |T|)`` of the ``window`` x ``window`` scores R around the pixel and ``T =
    exp(-|x|^2 / 2 sigma^2)``.
    """
    reach = window // 2
    taps = torch.exp(
        -0.5
        * (torch.arange(window, device=score_map.device) - reach).to(score_map).square()
        / sigma**2
    )
    rows = F.conv2d(score_map, taps.view(1, 1, 1, -1), padding=(0, reach))
    product = F.conv2d(rows, taps.view(1, 1, -1, 1), padding=(reach, 0))
    energy = F.avg_pool2d(score_map.square(), window, stride=1, padding=reach) * window**2
    return product / ((energy + EPS**2).sqrt() * taps.square().sum())


def local_cosine(a: Tensor, b: Tensor, window: int = GAUSSIAN_WINDOW) -> Tensor:
    """Cosine of two maps (B,1,H,W) within the ``window`` x ``window`` pixels around each pixel:
    (B,1,H,W).
    """

    def mean(maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, window, stride=1, padding=window // 2)

    return mean(a * b) / ((mean(a.square()) * mean(b.square())).clamp(min=0) + EPS**4).sqrt()


def _gaussian_one_way(
    score: Tensor,
    other: Tensor,
    visible: Tensor,
    window: int,
    sigma: float,
    anchor: Tensor | None,
    target: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of shape, share of the score that no peak of the other view confirms, and number of
    peaks, of one view.
    """
    with torch.no_grad():
        seen = visible > 0.999
        own = (score == max_filter(score, window)) & (score > 0) & seen
        theirs = (other == max_filter(other, window)) & (other > 0)
        both = score + other
        agreed = (both == max_filter(both, window)) & seen
        near = 2 * AGREEMENT + 1
        own_near, theirs_near = (max_filter(peaks.to(score), near) for peaks in (own, theirs))
        if anchor is not None:  # a peak beside structure counts as if the other view lacked it
            theirs_near = theirs_near * anchor
        weight = agreed * own_near * theirs_near * both**HEIGHT_POWER
        if (
            target is not None
        ):  # where positions are known they count alone, whatever the views agree on
            has_targets = target.amax(dim=(1, 2, 3), keepdim=True) > 0
            known = ((target > ON_TARGET) & seen).to(score)
            weight = torch.where(has_targets, known, weight)
            theirs_near = torch.where(has_targets, (target > ON_TARGET).to(score), theirs_near)
        weight = weight / weight.sum(dim=(1, 2, 3), keepdim=True).clamp(min=EPS)
    likeness = gaussian_likeness(score, window, sigma)
    if target is not None:
        likeness = torch.where(has_targets, local_cosine(score, target, window), likeness)
    shape = (weight * (1 - likeness)).sum(dim=(1, 2, 3)).mean()
    height = (score + EPS) ** HEIGHT_POWER * own
    alone = (height * (1 - theirs_near)).sum(dim=(1, 2, 3)) / (height.sum(dim=(1, 2, 3)) + EPS)
    return shape, alone.mean(), own.sum()


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
    """Gaussian loss of SobelNet (its name is the paper's, Yuan et al. 2020; the formula is ours,
    docs/training.md).

    Peaks are maxima of ``window`` x ``window``. Around each peak of the sum of both views (the
    other one warped here) that has a peak of each view within 2 px, the score must be a Gaussian:
    ``mean (1 - cosine)``. And the share of peaks that no peak of the other view confirms must be
    small. Both count a peak by a small power of its height and ignore the scores' scale. Both
    directions are averaged.

    Args:
        score_a, score_b: (B,1,S,S) score maps >= 0 of both views.
        H_ab: (B,3,3) homographies from a to b in pixels.
        mask_a, mask_b: (B,1,S,S), 1 where the pixel shows real image content; default everywhere.
        anchor_a, anchor_b: (B,1,S,S) in [0,1], how much a peak there may count (``anchor_weight``);
            default 1 everywhere.
        target_a, target_b: (B,1,S,S), Gaussians of height 1 at known keypoints, 0 elsewhere. An
            image that has any is to be this map, and every peak that is not within a pixel of one
            is to vanish.
        window: odd side in pixels; sigma: standard deviation of the Gaussian in pixels.
        border: frame of each map that never counts.

    Returns:
        scalar and the numbers ``loss, shape, alone, peaks`` (mean number of a map).

    Raises:
        ValueError: the maps' shapes do not fit, or window or sigma is impossible.
    """
    if score_a.shape != score_b.shape or score_a.ndim != 4 or score_a.shape[1] != 1:
        raise ValueError(
            f"score maps must be (B,1,H,W) of equal shape, got {score_a.shape} and {score_b.shape}"
        )
    if window < 3 or window % 2 == 0 or not sigma > 0:
        raise ValueError(
            f"window must be odd and at least 3 and sigma above 0, got {window} and {sigma}"
        )
    frame = border_mask(score_a, border)
    mask_a = frame if mask_a is None else frame * mask_a
    mask_b = frame if mask_b is None else frame * mask_b
    H_ba = torch.linalg.inv(H_ab.to(torch.float64)).to(score_a)
    a, b, b_in_a, a_in_b, visible_a, visible_b = _meet(
        [score_a, score_b, mask_a, mask_b], H_ab.to(score_a), H_ba
    )
    ways = [
        _gaussian_one_way(a, b_in_a, visible_a, window, sigma, anchor_a, target_a),
        _gaussian_one_way(b, a_in_b, visible_b, window, sigma, anchor_b, target_b),
    ]
    shape, alone = ((ways[0][i] + ways[1][i]) / 2 for i in range(2))
    loss = shape + alone
    peaks = float(ways[0][2] + ways[1][2]) / (2 * len(score_a))
    return loss, {"loss": loss.item(), "shape": shape.item(), "alone": alone.item(), "peaks": peaks}


# Orientation
# -----------------------------------------------------------------------------


def shift_bins(histogram: Tensor, bins: Tensor) -> Tensor:
    """Histograms (B,N,H,W) moved on by ``bins`` (B,1,H,W or 1,1), cyclically; parts of a bin by
    linear interpolation.
    """
    n = histogram.shape[1]
    whole = bins.floor()
    part = bins - whole
    target = torch.arange(n, device=histogram.device).view(1, n, 1, 1)
    source = ((target - whole.long()) % n).expand(histogram.shape)
    near = histogram.gather(1, source)
    return near + part * (histogram.gather(1, (source - 1) % n) - near)


def orientation_loss(
    histogram_a: Tensor,
    histogram_b: Tensor,
    H_ab: Tensor,
    *,
    mask_a: Tensor | None = None,
    bins: Tensor | None = None,
    border: int = 0,
) -> tuple[Tensor, dict[str, float]]:
    """Dense orientation alignment loss (REKD, section 3.3): turned by the ground truth, both views'
    histograms agree.

    Cross-entropy ``-sum_k A[k - d] log(B[k] + 1e-7)`` of the histogram of a, moved on by the turn
    ``d``, and that of b warped into a, mean over the common area. Gradients flow through both.

    Args:
        histogram_a, histogram_b: (B,N,H,W) probabilities over N; bin k is a direction of k 360/N
            degrees counter-clockwise.
        H_ab: (B,3,3) homographies from a to b in pixels, without mirroring.
        mask_a: (B,1,H,W), 1 where the pixel of a counts; default wherever b covers it.
        bins: (B,1,1,1) shift in bins, counter-clockwise; default ``local_rotation`` at each pixel,
            parts of bins interpolated. The published code cuts the angle to whole bins (of ``360 //
            N`` degrees) towards zero.
        border: frame that never counts.

    Returns:
        scalar loss and ``{"loss": ..., "agree": share of pixels whose strongest bins agree to one
        bin}``.

    Raises:
        ValueError: the histograms differ in shape, or a homography mirrors: what is mirrored has no
            turn.
    """
    if histogram_a.shape != histogram_b.shape or histogram_a.ndim != 4:
        raise ValueError(
            f"histograms must be (B,N,H,W) of equal shape, got {histogram_a.shape} and "
            f"{histogram_b.shape}"
        )
    if bool((torch.linalg.det(H_ab) * H_ab[:, 2, 2] < 0).any()):
        raise ValueError(
            "a pair is mirrored, and a mirrored corner has no turn; make pairs without mirroring "
            "(preset turns or rekd)"
        )
    b, n, h, w = histogram_a.shape
    H_ba = torch.linalg.inv(H_ab.to(torch.float64)).to(histogram_a)
    there = warp_image(torch.cat([histogram_b, torch.ones_like(histogram_b[:, :1])], dim=1), H_ba)
    in_a, covered = there[:, :n], there[:, n:].detach()
    mask = (covered > 0).to(in_a) if mask_a is None else (covered > 0.999) * mask_a
    if border:
        mask = mask * border_mask(mask, border)
    if bins is None:
        turn = local_rotation(pixel_grid(h, w, H_ab.to(torch.float64)), H_ab).view(
            b, 1, h, w
        )  # clockwise; bins are not
        bins = -turn.to(histogram_a) * (n / (2 * math.pi))
    expected = shift_bins(histogram_a, bins)
    each = -(expected * torch.log(in_a + 1e-7)).sum(dim=1, keepdim=True)
    count = mask.sum().clamp(min=1)
    loss = (each * mask).sum() / count
    with torch.no_grad():
        off = (
            expected.argmax(dim=1, keepdim=True) - in_a.argmax(dim=1, keepdim=True) + n // 2
        ) % n - n // 2
        agree = ((off.abs() <= 1) * mask).sum() / count
    return loss, {"loss": loss.item(), "agree": agree.item()}


# Descriptors
# -----------------------------------------------------------------------------

#: Entries nearer than this are taken for the same point seen twice, not for a negative (HardNet,
#: HyNet: published code).
SAME_POINT = 0.008
#: Larger than any distance of unit vectors: what is no candidate for the nearest negative.
FAR = 10.0


def pairwise_distances(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Distances (N,M) of unit vectors (N,D) and (M,D): ``sqrt(|a|^2 + |b|^2 - 2 a b + eps)``, never
    below sqrt(eps).
    """
    squared = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None] - 2 * a @ b.T
    return (squared.clamp(min=0) + eps).sqrt()


def _check_pairs(anchor: Tensor, positive: Tensor) -> None:
    if anchor.ndim != 2 or anchor.shape != positive.shape:
        raise ValueError(
            f"descriptors must be two (N,D) of one shape, got {tuple(anchor.shape)} and "
            f"{tuple(positive.shape)}"
        )
    if len(anchor) < 2:
        raise ValueError("a batch needs at least two pairs: the negatives of one are the others")


def _negatives(distances: Tensor) -> Tensor:
    """(N,N) distances with the pairs themselves and suspected repetitions of one point put far
    away.
    """
    same = torch.eye(len(distances), dtype=torch.bool, device=distances.device) | (
        distances.detach() < SAME_POINT
    )
    return distances + FAR * same


def hardest_negatives(
    anchor: Tensor, positive: Tensor, *, within: bool = False
) -> tuple[Tensor, Tensor]:
    """Distances (N,) of each pair and to its nearest negative, from either side (anchor swap).

    ``within`` also searches among the anchors and among the positives (SOSNet, HyNet).
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
    """HardNet's triplet loss with the hardest negative of the batch (Mishchuk et al. 2017, equation
    1).

    ``mean max(0, margin + d_pos - d_neg)``.

    Args:
        anchor, positive: (N,D) unit descriptors, N >= 2; row i of both shows the same place.
        margin: wanted difference of the distances.
        anchor_swap: the negative is the nearer of those to the anchor and to the positive.

    Returns:
        scalar and the numbers ``loss, positive, negative`` (mean distances).
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


def nearest_neighbours(distances: Tensor, k: int) -> Tensor:
    """Which of the others are among the ``k`` nearest of each row: (N,N) bool; the diagonal is left
    out.
    """
    blocked = distances.detach() + FAR * torch.eye(len(distances), device=distances.device)
    index = blocked.topk(min(k, len(distances) - 1), dim=1, largest=False).indices
    return torch.zeros_like(blocked, dtype=torch.bool).scatter_(1, index, True)


def second_order_term(anchor: Tensor, positive: Tensor, *, neighbours: int = 8) -> Tensor:
    """SOSNet's second order similarity (Tian et al. 2019, equation 5): distances among anchors
    equal those among positives.

    ``mean_i sqrt(sum_j A_ij (|a_i - a_j| - |p_i - p_j|)^2 + 1e-6)`` with A the union, made
    symmetric, of the ``neighbours`` nearest within the anchors, within the positives and across.
    """
    left, right = pairwise_distances(anchor, anchor), pairwise_distances(positive, positive)
    across = pairwise_distances(anchor, positive)
    graph = (
        nearest_neighbours(left, neighbours)
        | nearest_neighbours(right, neighbours)
        | nearest_neighbours(across, neighbours)
    )
    graph = graph | graph.T
    return ((left - right).square() * graph).sum(dim=1).add(1e-6).sqrt().mean()


def sosnet_loss(
    anchor: Tensor,
    positive: Tensor,
    *,
    margin: float = 1.0,
    neighbours: int = 8,
    second_order: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """SOSNet's loss: squared hinge on the hardest negative of four sets, and ``second_order`` times
    that term.

    Means over the batch, where the published code sums. Arguments and result as ``hardnet_loss``.
    """
    _check_pairs(anchor, positive)
    near, far = hardest_negatives(anchor, positive, within=True)
    first = (margin + near - far).clamp(min=0).square().mean()
    second = second_order_term(anchor, positive, neighbours=neighbours)
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
    """HyNet's triplet on the hybrid similarity, and its regularisation of the lengths (Tian et al.
    2020, 3.2 and 3.3).

    A distance d counts as ``d + alpha d^2 / 2``: of d alone the gradient is too strong for near
    pairs, of the inner product too weak. ``mean max(0, margin + s_pos - s_neg) + length mean (|x_a|
    - |x_p|)^2``; the published code sums.

    Args:
        raw_anchor, raw_positive: (N,D) descriptors before their length is set to 1, N >= 2.
        second_order: weight of SOSNet's term, which the paper tries and leaves out.

    Returns:
        scalar and numbers, as ``hardnet_loss``.
    """
    _check_pairs(raw_anchor, raw_positive)
    lengths = [(x.square().sum(dim=1) + 1e-6).sqrt() for x in (raw_anchor, raw_positive)]
    anchor, positive = (
        x / norm[:, None] for x, norm in zip((raw_anchor, raw_positive), lengths, strict=True)
    )
    near, far = hardest_negatives(anchor, positive, within=True)
    hinge = (
        (margin + (near + alpha / 2 * near.square()) - (far + alpha / 2 * far.square()))
        .clamp(min=0)
        .mean()
    )
    drift = (lengths[0] - lengths[1]).square().mean()
    loss = hinge + length * drift
    numbers = {
        "hinge": hinge.item(),
        "drift": drift.item(),
        "positive": near.mean().item(),
        "negative": far.mean().item(),
    }
    if second_order:
        second = second_order_term(anchor, positive)
        loss = loss + second_order * second
        numbers["second"] = second.item()
    return loss, {"loss": loss.item(), **numbers}


#: Margin and scale of the circle loss (Sun et al. 2020 take 0.25 and 64 to 256).
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
    """Circle loss of each row's candidates (Sun et al. 2020, equations 4 to 8), mean over rows that
    have both kinds.

    ``softplus(LSE_j scale a_n (s_n - margin) + LSE_i -scale a_p (s_p - 1 + margin))`` with ``a_p =
    max(0, 1 + margin - s_p)`` and ``a_n = max(0, s_n + margin)``, both without gradient: what is
    far from its aim is pulled hardest, so hard negatives count most.

    Args:
        similarity: (N,M) cosines.
        positive, negative: (N,M) bool; what is in neither does not count.

    Returns:
        scalar (0 where no row has both kinds) and the numbers ``loss, rows, positive, negative``
        (mean cosine of a row's worst).

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
    pull = (1 + margin - s.detach()).clamp(min=0)
    push = (s.detach() + margin).clamp(min=0)
    near = (-scale * pull * (s - (1 - margin))).masked_fill(~p, float("-inf")).logsumexp(dim=1)
    far = (scale * push * (s - margin)).masked_fill(~n, float("-inf")).logsumexp(dim=1)
    loss = F.softplus(near + far).mean()
    with torch.no_grad():
        worst_positive = s.masked_fill(~p, 2.0).amin(dim=1).mean()
        worst_negative = s.masked_fill(~n, -2.0).amax(dim=1).mean()
    return loss, {
        "loss": loss.item(),
        "positive": worst_positive.item(),
        "negative": worst_negative.item(),
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
    """Share of the heights of an image's peaks that lies beside structure, mean over the images.

    Args:
        score: (B,1,S,S) score maps >= 0.
        anchor: (B,1,S,S) in [0,1], ``anchor_weight``.
        mask: (B,1,S,S), 1 where a peak counts.
        window: odd side in pixels of the area that a peak is the maximum of.
        border: frame of each map that never counts.

    Returns:
        scalar in [0,1].
    """
    score = score * border_mask(score, border) * mask
    peak = (score.detach() == max_filter(score.detach(), window)) & (score > 0)
    height = score * peak
    share = (height * (1 - anchor)).sum(dim=(1, 2, 3)) / height.sum(dim=(1, 2, 3)).clamp(
        min=EPS
    )
    return share.mean()
