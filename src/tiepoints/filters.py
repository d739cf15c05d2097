"""Image filters: gray conversion, derivatives, blur, resizing, contrast normalization.

All functions take and return float tensors (B,C,H,W) and keep size, dtype and device unless stated
otherwise. Resizing follows the half-pixel convention ``(x + 0.5) * s - 0.5``; value ranges are not
checked.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .gray import luma

# Binomial weights of the 5-tap blur that the official PyTorch Key.Net applies before every
# reduction.
BINOMIAL_5 = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def to_gray(image: Tensor) -> Tensor:
    """(B,3,H,W) RGB to (B,1,H,W) luma (BT.601); (B,1,H,W) passes through."""
    if image.shape[1] == 1:
        return image
    return luma(image[:, 0:1], image[:, 1:2], image[:, 2:3])


def pad_reflect(image: Tensor, pad: int) -> Tensor:
    """Pad all four sides by reflection without repeating the border pixel, for any size from 1 x 1
    up.
    """
    h, w = image.shape[-2:]
    if pad < min(h, w):
        return F.pad(image, (pad, pad, pad, pad), mode="reflect")
    for dim, size in ((-2, h), (-1, w)):  # repeated reflection, which F.pad does not support
        index = torch.arange(-pad, size + pad, device=image.device)
        period = max(2 * (size - 1), 1)
        index = index.remainder(period)
        image = image.index_select(dim, torch.where(index < size, index, period - index))
    return image


def blur_separable(image: Tensor, taps: Tensor, pad_mode: str = "reflect") -> Tensor:
    """Correlate every channel with ``taps`` (odd length) along rows and columns; borders reflected
    or replicated.
    """
    r = len(taps) // 2
    padded = (
        pad_reflect(image, r)
        if pad_mode == "reflect"
        else F.pad(image, (r, r, r, r), mode=pad_mode)
    )
    h, w = image.shape[-2:]
    # Sums of shifted views: several times faster on a CPU than a single-channel convolution.
    weights = taps.tolist()
    rows = padded[..., :h, :] * weights[0]
    for i, weight in enumerate(weights[1:], start=1):
        rows.add_(padded[..., i : i + h, :], alpha=weight)
    out = rows[..., :w] * weights[0]
    for i, weight in enumerate(weights[1:], start=1):
        out.add_(rows[..., i : i + w], alpha=weight)
    return out


def binomial_blur(image: Tensor) -> Tensor:
    """5 x 5 binomial blur, border reflected."""
    return blur_separable(image, image.new_tensor(BINOMIAL_5))


def gaussian_taps(sigma: float, radius: int | None = None) -> Tensor:
    """Normalized Gaussian weights (2*radius+1,); the default ``radius`` is 3.5 sigma."""
    radius = max(1, math.ceil(3.5 * sigma)) if radius is None else radius
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    taps = torch.exp(-0.5 * (x / sigma) ** 2)
    return taps / taps.sum()


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of standard deviation ``sigma`` pixels, border replicated; sigma 0 returns the
    image.
    """
    if sigma <= 0:
        return image
    return blur_separable(image, gaussian_taps(sigma).to(image), pad_mode="replicate")


def sobel(image: Tensor) -> tuple[Tensor, Tensor]:
    """First derivatives (dx, dy) by the 3 x 3 Sobel operator divided by 8, border replicated.

    x points right and y down; a ramp that rises by 1 per pixel gives 1. (B,1,H,W) -> two
    (B,1,H,W).
    """
    p = F.pad(image, (1, 1, 1, 1), mode="replicate")
    rows = p[..., :-2, :] + 2 * p[..., 1:-1, :] + p[..., 2:, :]  # (B,C,H,W+2)
    cols = p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]  # (B,C,H+2,W)
    dx = (rows[..., 2:] - rows[..., :-2]) / 8
    dy = (cols[..., 2:, :] - cols[..., :-2, :]) / 8
    return dx, dy


def corner_strength(image: Tensor, sigma: float = 2.0) -> Tensor:
    """Smaller eigenvalue of the structure tensor (Shi and Tomasi 1994), Gaussian window of
    ``sigma`` pixels: (B,1,H,W) -> (B,1,H,W) >= 0.

    Large where gradients have several directions (corners, junctions, blobs), near 0 in constant
    areas and on straight edges.
    """
    dx, dy = sobel(image)
    products = gaussian_blur(torch.cat([dx.square(), dy.square(), dx * dy], dim=1), sigma)
    xx, yy, xy = products.split(1, dim=1)
    return (((xx + yy) - ((xx - yy).square() + 4 * xy.square()).sqrt()) / 2).clamp(min=0)


def laplacian_variance(image: Tensor) -> float:
    """Variance of the Laplacian of an image (1,1,H,W): larger for sharper images of one scene."""
    center = image[..., 1:-1, 1:-1]
    if not center.numel():
        return 0.0
    around = image[..., :-2, 1:-1] + image[..., 2:, 1:-1]
    around = around + image[..., 1:-1, :-2] + image[..., 1:-1, 2:]
    return float((around - 4 * center).var(unbiased=False))


def percentile_rank(values: Tensor) -> Tensor:
    """Fraction of an image's other pixels that are smaller, for each pixel: (B,1,H,W) ->
    (B,1,H,W) in [0,1]; ties are ranked in reading order.
    """
    flat = values.flatten(1)
    rank = flat.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank.to(values) / max(1, flat.shape[1] - 1)).view(values.shape)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing to ``size`` = (height, width), half-pixel convention, no anti-aliasing.

    Raises:
        RuntimeError: while it is traced, which would make the sizes of one image those of all.
    """
    if torch.jit.is_tracing():
        raise RuntimeError(
            "networks with levels of several sizes cannot be traced: the result would be wrong for "
            "images of other sizes; use `tiepoints export`"
        )
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)


def fitting_size(size: tuple[int, int], max_size: int | None) -> tuple[int, int]:
    """(height, width) with the longer side reduced to ``max_size``, both at least 1; None and
    larger values leave ``size`` unchanged.
    """
    longest = max(size)
    if max_size is None or longest <= max_size:
        return size
    return max(1, round(size[0] * max_size / longest)), max(1, round(size[1] * max_size / longest))


def reduce(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear reduction to ``size`` = (height, width) with anti-aliasing, half-pixel
    convention.
    """
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)


#: Radius of the window of the local contrast normalization of REKD and of the two older Key.Nets:
#: 65 x 65 pixels.
CONTRAST_RADIUS = 32


def unnormalized_gaussian_taps() -> Tensor:
    """Seven float64 taps of sigma 1.5 whose outer product is the published blur: center 0.26596,
    sum 3.62994.

    The published kernel divides the two-dimensional Gaussian by the normalization constant of the
    one-dimensional one, which brightens the image; the taps here contain its square root.
    """
    u = torch.arange(-3, 4, dtype=torch.float64)
    return torch.exp(-0.5 * (u / 1.5) ** 2) / (2 * math.pi * 1.5**2) ** 0.25


def _window_mean(image: Tensor, boxes: int) -> Tensor:
    radius = CONTRAST_RADIUS // boxes
    side = 2 * radius + 1
    for _ in range(boxes):
        image = pad_reflect(image, radius)
        for dim in (-2, -1):  # differences of cumulative sums: the cost is that of any window
            total = F.pad(
                image.to(torch.float64).cumsum(dim), (0, 0, 1, 0) if dim == -2 else (1, 0)
            )
            length = total.shape[dim] - side
            image = (total.narrow(dim, side, length) - total.narrow(dim, 0, length)) / side
    return image


def normalize_contrast(image: Tensor, *, floor: float = 1.0, boxes: int = 1) -> Tensor:
    """Local contrast normalization: (value - mean) / (floor + deviation) over the 65 x 65 pixels
    around each pixel, border reflected; keeps (B,1,H,W).

    With ``boxes=2``, two boxes of half the side are applied: the window decreases towards its edge
    and is nearly isotropic, which makes the result nearly equivariant to rotation.
    """
    mean = _window_mean(image, boxes)  # float64, because large numbers are subtracted next
    deviation = (_window_mean(image.to(torch.float64).square(), boxes) - mean.square()).abs().sqrt()
    return ((image - mean) / (floor + deviation + 1e-10)).to(image.dtype)
