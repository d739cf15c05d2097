"""Orientation of keypoints: from a network's angle map, or from the dominant gradient direction.

Both are callables (pyramid, keypoints, index of the image in the batch) -> angles (N,) in radians,
in the convention of ``structs``.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import sobel
from .memory import release_freed
from .patches import CHUNK, extract_patches
from .pyramid import Pyramid
from .regions import TILE_PIXELS, Box, Filtered, Source
from .structs import Keypoints

#: Bins of the histogram of gradient directions, and the number of passes of (1, 1, 1) / 3 that
#: smooth it (SIFT: Lowe 2004, section 5).
BINS = 36
SMOOTHINGS = 6
#: Radius of the window of gradients in pixels of the keypoint's scale, weighted by a Gaussian whose
#: sigma is a third of it.
RADIUS = 20.0
SIZE = 32


def angle_at(angles: Tensor, xy: Tensor) -> Tensor:
    """Values (N,) of an angle map (h,w) at the pixels nearest to points (N,2), because angles must
    not be interpolated linearly.
    """
    h, w = angles.shape
    x, y = xy.round().long().unbind(dim=-1)
    return angles[y.clamp(0, h - 1), x.clamp(0, w - 1)]


def upright(pyramid: Pyramid, keypoints: Keypoints, index: int) -> Tensor:
    """Angles (N,) of 0."""
    return torch.zeros_like(keypoints.angle)


class AngleNet(Protocol):
    """A network that computes score and angle maps of a box of images, (B,1,h,w) each."""

    def part(self, source: Source, box: Box) -> tuple[Tensor, Tensor]: ...


class NetOrientation:
    """Angles from a network's angle map on the pyramid level nearest to each keypoint's scale.

    Args:
        net: its method ``part`` gives the score map and the angle map in radians of a box of an
            image, as that of ``models.rekd.FusedREKD``.
        tile_pixels: pixels of a level that are processed at a time.
    """

    def __init__(self, net: AngleNet, *, tile_pixels: int = TILE_PIXELS):
        self.net, self.tile_pixels = net, tile_pixels

    def __call__(self, pyramid: Pyramid, keypoints: Keypoints, index: int) -> Tensor:
        """Angles (N,)."""
        out = torch.zeros_like(keypoints.score)
        if not len(keypoints):
            return out
        scales = torch.tensor([level.scale for level in pyramid.levels], device=out.device)
        nearest = (keypoints.scale[:, None].log() - scales.log()[None]).abs().argmin(dim=1)
        for i, level in enumerate(pyramid.levels):
            rows = (nearest == i).nonzero()[:, 0]
            xy = level.from_original(keypoints.xy[rows])
            image = Filtered(level.source, lambda pixels: pixels[index : index + 1], 0)
            for box, inside in level.boxes_of(xy, self.tile_pixels):
                outer = box.grow(1, level.size)
                angles = self.net.part(image, outer)[1][0, 0]
                local = xy[inside] - xy.new_tensor([outer.left, outer.top])
                out[rows[inside]] = angle_at(angles, local).to(out)
                if box.size != level.size:
                    del angles
                    release_freed()
        return out


class DominantOrientation:
    """Dominant gradient direction around a keypoint (Lowe 2004, section 5), interpolated between
    histogram bins.
    """

    def __call__(self, pyramid: Pyramid, keypoints: Keypoints, index: int) -> Tensor:
        """Angles (N,); 0 without a gradient."""
        upright = Keypoints(
            keypoints.xy, keypoints.scale, torch.zeros_like(keypoints.score), keypoints.score
        )
        with torch.inference_mode():
            parts = [
                dominant_angle(
                    extract_patches(
                        pyramid, upright[part], index=index, size=SIZE, half_side=RADIUS
                    )
                )
                for part in torch.arange(len(upright), device=upright.xy.device).split(CHUNK)
            ]
        return torch.cat(parts) if parts else torch.zeros_like(keypoints.score)


def dominant_angle(patches: Tensor) -> Tensor:
    """Dominant gradient direction of patches (N,1,P,P): (N,) radians in [0, 2 pi), from +x towards
    +y; 0 without a gradient.
    """
    n, size = len(patches), patches.shape[-1]
    dx, dy = sobel(patches)
    # -1..1 across the patch
    axis = (torch.arange(size, device=patches.device) + 0.5) / size * 2 - 1
    r2 = axis[None, :] ** 2 + axis[:, None] ** 2
    weight = torch.exp(-r2 / (2 / 9)) * (r2 <= 1)
    magnitude = (torch.hypot(dx, dy)[:, 0] * weight).flatten(1)
    bins = (torch.atan2(dy, dx).remainder(2 * math.pi) * (BINS / (2 * math.pi)))[:, 0].flatten(1)
    bin0 = bins.floor()
    frac = bins - bin0
    histogram = patches.new_zeros(n, BINS)
    histogram.scatter_add_(1, bin0.long() % BINS, magnitude * (1 - frac))
    histogram.scatter_add_(1, (bin0.long() + 1) % BINS, magnitude * frac)
    kernel = patches.new_full((1, 1, 3), 1 / 3)
    for _ in range(SMOOTHINGS):
        histogram = F.conv1d(F.pad(histogram[:, None], (1, 1), mode="circular"), kernel)[:, 0]
    peak, best = histogram.max(dim=1)
    before, after = (histogram.gather(1, ((best + step) % BINS)[:, None])[:, 0] for step in (-1, 1))
    curvature = 2 * peak - before - after
    shift = torch.where(
        curvature > 0,
        0.5 * (after - before) / curvature.clamp(min=1e-12),
        torch.zeros_like(curvature),
    )
    angle = ((best + shift) * (2 * math.pi / BINS)).remainder(2 * math.pi)
    return torch.where(peak > 0, angle, torch.zeros_like(angle))
