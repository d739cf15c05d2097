"""Patch descriptors without learned weights: RootSIFT (Lowe 2004; Arandjelovic and Zisserman 2012)
and raw pixels.

In: patches (N,1,P,P) in [0,1]. Out: (N,D), unit length.

RootSIFT: a patch is divided into 4 x 4 cells with 8 gradient directions each; every pixel adds its
gradient magnitude, weighted by a Gaussian window and interpolated between neighboring cells and
directions. The histogram is L2 normalized, clipped at 0.2 and L1 normalized; its square root is the
descriptor, so the dot product of two descriptors is the Hellinger kernel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..filters import sobel

CELLS = 4
DIRECTIONS = 8
CLIP = 0.2  # Lowe 2004, 6.1


class RootSIFT(nn.Module):
    """RootSIFT of a patch. A constant patch gives the uniform descriptor, which is finite and of
    unit length.

    Args:
        size: patch side P in pixels.
    """

    def __init__(self, size: int = 32):
        super().__init__()
        if size < 2 * CELLS:
            raise ValueError(f"size must be at least {2 * CELLS}, got {size}")
        self.size = size
        position = (torch.arange(size) + 0.5) * CELLS / size - 0.5  # in cells
        # bilinear weights (4,P)
        weight = (1 - (position[None] - torch.arange(CELLS)[:, None]).abs()).clamp(min=0)
        offset = (torch.arange(size) + 0.5) / size * 2 - 1
        window = torch.exp(-0.5 * offset.square())  # sigma = half the patch, as Lowe
        self.register_buffer("weight", weight * window, persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        """(N,1,P,P) -> (N,128)."""
        if patches.ndim != 4 or patches.shape[1:] != (1, self.size, self.size):
            raise ValueError(
                f"patches must be (N,1,{self.size},{self.size}), got {tuple(patches.shape)}"
            )
        dx, dy = (d[:, 0] for d in sobel(patches))  # (N,P,P)
        magnitude = torch.sqrt(dx.square() + dy.square() + 1e-20)
        bins = torch.atan2(dy, dx) * (DIRECTIONS / (2 * math.pi))  # -4 .. 4
        bin0 = bins.floor()
        frac = bins - bin0
        first = bin0.long() % DIRECTIONS
        votes = torch.zeros(
            len(patches),
            DIRECTIONS,
            self.size,
            self.size,
            device=patches.device,
            dtype=patches.dtype,
        )
        votes.scatter_(1, first[:, None], (magnitude * (1 - frac))[:, None])
        votes.scatter_add_(1, ((first + 1) % DIRECTIONS)[:, None], (magnitude * frac)[:, None])
        cells = self.weight @ votes @ self.weight.T  # type: ignore[operator]  # (N,8,4,4)
        histogram = cells.permute(0, 2, 3, 1).flatten(1) + 1e-12
        histogram = F.normalize(histogram, dim=1).clamp(max=CLIP)
        return torch.sqrt(F.normalize(histogram, p=1, dim=1))


class RawPatch(nn.Module):
    """Pixels of zero mean, as a baseline: the dot product is normalized cross-correlation.

    Args:
        size: side to which patches are reduced first, by averaging blocks; the descriptor dimension
            is ``size * size``.
    """

    def __init__(self, size: int = 16):
        super().__init__()
        self.size = size

    def forward(self, patches: Tensor) -> Tensor:
        """(N,1,P,P), P a multiple of ``size`` -> (N,size*size); a constant patch gives the uniform
        descriptor.
        """
        side = patches.shape[-1]
        if patches.ndim != 4 or patches.shape[1:] != (1, side, side) or side % self.size:
            raise ValueError(
                f"patches must be (N,1,P,P) with P a multiple of {self.size}, got "
                f"{tuple(patches.shape)}"
            )
        pixels = F.avg_pool2d(patches, side // self.size).flatten(1)
        return F.normalize(pixels - pixels.mean(dim=1, keepdim=True) + 1e-10, dim=1, eps=1e-20)
