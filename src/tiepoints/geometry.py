"""Geometry of points and images: warping by a homography, resizing, sampling, common areas.

The coordinate convention is that of ``structs``: x right, y down, the center of the first pixel is
(0, 0), ``H_ab`` maps a to b.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def warp_points(xy: Tensor, H_ab: Tensor) -> Tensor:
    """Map points (...,N,2) of image a to image b by homographies (...,3,3); points at infinity
    become inf or nan.
    """
    H_ab = H_ab.to(xy)
    ones = torch.ones_like(xy[..., :1])
    mapped = torch.cat([xy, ones], dim=-1) @ H_ab.transpose(-1, -2)  # (...,N,3)
    return mapped[..., :2] / mapped[..., 2:]


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances (...,N,M) of points (...,N,2) from points (...,M,2).

    By differences: by products of the coordinates, torch's default for many points, distances below
    10 px are wrong by 1 px where coordinates are 2000.
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def local_rotation(xy: Tensor, H_ab: Tensor) -> Tensor:
    """Local rotation of homographies (...,3,3) at points (...,N,2) of a: (...,N) radians in (-pi,
    pi], clockwise in the image.

    The rotation nearest to the derivative of the homography at the point. Undefined for
    reflections.
    """
    H_ab = H_ab.to(xy)
    mapped = torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1) @ H_ab.transpose(-1, -2)
    w = mapped[..., 2]
    u, v = mapped[..., 0] / w, mapped[..., 1] / w

    def derivative(row: int, axis: int, value: Tensor) -> Tensor:
        return (H_ab[..., row, axis, None] - value * H_ab[..., 2, axis, None]) / w

    return torch.atan2(
        derivative(1, 0, v) - derivative(0, 1, u), derivative(0, 0, u) + derivative(1, 1, v)
    )


def resize_points(xy: Tensor, factor_x: float, factor_y: float) -> Tensor:
    """Coordinates of points (N,2) after resizing the image by these factors: ``(x + 0.5) * factor -
    0.5``.
    """
    factor = xy.new_tensor([factor_x, factor_y])
    return (xy + 0.5) * factor - 0.5


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Centers of all pixels, (H*W,2) as x, y, row by row."""
    y, x = torch.meshgrid(
        torch.arange(height, device=like.device, dtype=like.dtype),
        torch.arange(width, device=like.device, dtype=like.dtype),
        indexing="ij",
    )
    return torch.stack([x.reshape(-1), y.reshape(-1)], dim=-1)


def sample_at(image: Tensor, xy: Tensor, padding: str = "zeros") -> Tensor:
    """Sample ``image`` (B,C,H,W) bilinearly at pixel positions (B,...,2): (B,C,...).

    ``padding`` is ``zeros``, ``border`` or ``reflection``, as in
    ``torch.nn.functional.grid_sample``.
    """
    b, _, h, w = image.shape
    scale = xy.new_tensor([2.0 / w, 2.0 / h])
    grid = (xy + 0.5) * scale - 1
    grid = grid.nan_to_num(nan=2e6, posinf=2e6, neginf=-2e6)
    flat = grid.reshape(b, 1, -1, 2)
    values = F.grid_sample(
        image, flat, mode="bilinear", padding_mode=padding, align_corners=False
    )  # (B,C,1,N)
    return values.reshape(b, image.shape[1], *xy.shape[1:-1])


def warp_image(
    image: Tensor, H: Tensor, size: tuple[int, int] | None = None, padding: str = "zeros"
) -> Tensor:
    """Warp ``image`` (B,C,H,W) by ``H`` (B,3,3), bilinearly: the pixel at p moves to H p.

    ``size`` (height, width) of the result defaults to that of the image; ``padding`` as in
    ``sample_at``.
    """
    h, w = image.shape[-2:] if size is None else size
    grid = pixel_grid(h, w, image)[None].expand(len(image), -1, -1)
    source = warp_points(grid, torch.linalg.inv(H.to(torch.float64)).to(image))
    return sample_at(image, source, padding).reshape(len(image), -1, h, w)


def common_area(xy_a: Tensor, H_ab: Tensor, size_b: tuple[int, int], border: float = 0.0) -> Tensor:
    """Whether points (N,2) of image a lie in image b of ``size_b`` = (height, width), at least
    ``border`` pixels from its edge: bool (N,).
    """
    xy = warp_points(xy_a, H_ab)
    h, w = size_b
    inside_x = (xy[:, 0] >= border) & (xy[:, 0] <= w - 1 - border)
    return inside_x & (xy[:, 1] >= border) & (xy[:, 1] <= h - 1 - border)
