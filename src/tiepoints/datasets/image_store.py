"""Images in the memory of a device, reduced by powers of the square root of two, from which patches
of any position, size and shape are sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Levels per octave, and minimum side of the smallest level in pixels.
PER_OCTAVE = 2
MIN_SIDE = 24
#: The finest level whose pixels are at most this much larger than the distance of the samples is
#: used.
TOLERANCE = 1.15


class ImageStore:
    """Color images on a device, each with its reduced copies; 6 bytes per pixel.

    Args:
        images: (H,W,3) uint8, of any sizes.
        device: where they are stored.

    Attributes:
        size: (I,2) float32, width and height of each image in pixels.

    Raises:
        ValueError: no images.
    """

    def __init__(self, images: Iterable[np.ndarray], device: torch.device | str = "cpu"):
        levels: list[Tensor] = []
        offsets: list[list[int]] = []
        sizes: list[list[tuple[int, int]]] = []
        total = 0
        for image in images:
            values = torch.from_numpy(np.array(image)).to(device)
            first, own, own_sizes = values.permute(2, 0, 1)[None].float(), [], []
            h, w = values.shape[:2]
            count = 1 + max(0, int(PER_OCTAVE * math.log2(max(1.0, min(h, w) / MIN_SIDE))))
            for number in range(count):
                factor = 2 ** (number / PER_OCTAVE)
                size = (round(h / factor), round(w / factor))
                reduced = first
                if number:
                    reduced = F.interpolate(
                        first, size=size, mode="bilinear", align_corners=False, antialias=True
                    )
                levels.append(reduced[0].permute(1, 2, 0).reshape(-1, 3).round().to(torch.uint8))
                own.append(total)
                own_sizes.append((size[1], size[0]))
                total += size[0] * size[1]
            offsets.append(own)
            sizes.append(own_sizes)
        if not levels:
            raise ValueError("no images to sample from")
        self.pixels = torch.cat(levels)  # (pixels of all levels, 3) uint8
        most = max(len(own) for own in offsets)
        padded = [own + own[-1:] * (most - len(own)) for own in offsets]
        self.offset = torch.tensor(padded, device=device)  # (I,L)
        padded_sizes = [own + own[-1:] * (most - len(own)) for own in sizes]
        self.sizes = torch.tensor(padded_sizes, dtype=torch.float32, device=device)  # (I,L,2)
        self.size = self.sizes[:, 0]

    def __len__(self) -> int:
        return len(self.offset)

    def sample(self, image: Tensor, xy: Tensor, step: Tensor) -> Tensor:
        """Sample at positions, bilinearly, in the copy that fits the distance of the samples;
        outside an image its border is repeated.

        Args:
            image: (N,) index of the image.
            xy: (N,P,Q,2) positions in pixels of the image.
            step: (N,) distance of neighboring samples in pixels of the image.

        Returns:
            (N,3,P,Q) float32 in [0,1].
        """
        level = (PER_OCTAVE * torch.log2(step.clamp(min=1.0) * TOLERANCE)).floor().long()
        level = level.clamp(max=self.offset.shape[1] - 1)
        size = self.sizes[image, level][:, None, None]  # (N,1,1,2)
        position = (xy + 0.5) * (size / self.size[image][:, None, None]) - 0.5
        position = torch.minimum(position.clamp(min=0), size - 1)
        low = torch.minimum(position.floor(), (size - 2).clamp(min=0))
        fraction = position - low
        column, row = low.long().unbind(-1)
        width = size[..., 0].long()
        start = self.offset[image, level][:, None, None] + row * width + column
        right = (width > 1).long()
        below = torch.where(size[..., 1] > 1, width, 0)
        fx, fy = (fraction[..., i, None] for i in (0, 1))
        upper, lower = (
            (1 - fx) * self.pixels[index] + fx * self.pixels[index + right]
            for index in (start, start + below)
        )
        return ((1 - fy) * upper + fy * lower).permute(0, 3, 1, 2) / 255
