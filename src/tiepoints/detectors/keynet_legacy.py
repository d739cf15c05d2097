"""The two other published Key.Net networks, with the preprocessing their weights were trained on.

Sources: variant B, the official TensorFlow code of Barroso-Laguna et al., ICCV 2019; variant C, the retrained port
which the REKD authors ship (Lee et al., CVPR 2022). Variant A, which new work should use, is ``keynet.KeyNet``.

Idea: as Key.Net, but every level is cut directly from the full image, brightened by a Gaussian that is not normalised,
then normalised to its local contrast; Sobel filters are not divided, borders are zero, resizing aligns the corners, and
the merged levels are batch-normalised before the last filter. These choices are accidents of the published code. They
are kept because weights only work with the preprocessing they saw; this file exists to reproduce published files.

In:  image (B,1,H,W), float32 gray in [0,1], any size from 1 x 1 up; each image is divided by its own maximum inside.
Out: score map (B,1,H,W), >= 0, without unit.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..filters import blur_separable, pad_reflect

NUM_FILTERS = 8  # paper 5.3, the only published width
NUM_BLOCKS = 3
KERNEL_SIZE = 5
NUM_LEVELS = 3
SCALE_FACTOR = 1.2
BLUR_SIGMA = 1.5
BLUR_RADIUS = 3
CONTRAST_RADIUS = 32  # windows of 65 x 65 pixels
TENSORFLOW_EPS = 1e-3  # defaults of the batch normalisation in the two frameworks
PYTORCH_EPS = 1e-5

#: Handcrafted channels in the order of both published weight files (not the order of ``KeyNet``).
CHANNELS = ("dx", "dx^2", "dxx", "dy", "dy^2", "dyy", "dx*dy", "dxx*dyy", "dxy", "dxy^2")


def blur_taps() -> Tensor:
    """Seven float64 taps whose outer product is the published blur: centre 0.26596, sum 3.62994.

    The published kernel divides the two-dimensional Gaussian by the constant of the one-dimensional one, so that it
    brightens the image; each direction here carries the square root of that constant.
    """
    u = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, dtype=torch.float64)
    return torch.exp(-0.5 * (u / BLUR_SIGMA) ** 2) / (2 * math.pi * BLUR_SIGMA**2) ** 0.25


def level_size(height: int, width: int, level: int, *, float32: bool) -> tuple[int, int]:
    """Size (height, width) of ``level`` 0, 1, 2, ..., cut directly from the full size and never below 1 x 1.

    ``float32`` computes in single precision and, since TensorFlow's graph optimiser rewrites a division by a constant
    so, times the reciprocal. The reference maps confirm it for level 1 (240 -> 200, where true float32 division says
    199); for level 2 it is inferred, and costs one pixel at a few sizes (180, 324, 360, 612, ...).
    """
    factor = SCALE_FACTOR**level
    reciprocal = np.float32(1) / np.float32(factor)
    h, w = (int(np.float32(side) * reciprocal) if float32 else int(side / factor) for side in (height, width))
    return max(1, h), max(1, w)


def divide_by_maximum(image: Tensor) -> Tensor:
    """Each image of (B,1,H,W) divided by its own largest value; black images stay black."""
    largest = image.amax(dim=(1, 2, 3), keepdim=True)
    return image / torch.where(largest > 0, largest, torch.ones_like(largest))


def _window_mean(image: Tensor) -> Tensor:
    # Rows then columns: seven times faster than 65 x 65 at once, equal to it in exact arithmetic.
    side = 2 * CONTRAST_RADIUS + 1
    columns = F.avg_pool2d(pad_reflect(image, CONTRAST_RADIUS), (side, 1), stride=1)
    return F.avg_pool2d(columns, (1, side), stride=1)


def normalise_contrast(image: Tensor) -> Tensor:
    """(value - mean) / (1 + deviation) over the 65 x 65 pixels around each pixel, mirror border; keeps (B,1,H,W)."""
    mean = _window_mean(image)
    variance = (_window_mean(image.square()) - mean.square()).abs()
    return (image - mean) / (1 + variance.sqrt() + 1e-10)


def _sobel_undivided(image: Tensor) -> tuple[Tensor, Tensor]:
    p = F.pad(image, (1, 1, 1, 1))
    rows = p[..., :-2, :] + 2 * p[..., 1:-1, :] + p[..., 2:, :]  # (B,1,H,W+2)
    cols = p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]  # (B,1,H+2,W)
    return rows[..., 2:] - rows[..., :-2], cols[..., 2:, :] - cols[..., :-2, :]


def legacy_features(image: Tensor) -> Tensor:
    """The ten channels ``CHANNELS``, Sobel undivided and zero border each time: (B,1,H,W) -> (B,10,H,W)."""
    dx, dy = _sobel_undivided(image)
    dxx, dxy = _sobel_undivided(dx)
    dyy = _sobel_undivided(dy)[1]
    return torch.cat([dx, dx.square(), dxx, dy, dy.square(), dyy, dx * dy, dxx * dyy, dxy, dxy.square()], dim=1)


def _resize_corners(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size=size, mode="bilinear", align_corners=True)


class LegacyKeyNet(nn.Module):
    """Variants B (``LegacyKeyNet.tensorflow()``, 5,921 parameters) and C (``LegacyKeyNet.rekd_port()``, 5,345).

    Args:
        last_kernel: odd side of the filter that merges the levels: 5 in B, 1 in C.
        norm_eps: constant added to the variance in batch normalisation: 1e-3 in B, 1e-5 in C.
        float32_sizes: whether level sizes are computed in single precision, see ``level_size``: yes in B, no in C.

    Raises:
        ValueError: ``last_kernel`` is not odd and positive.

    Image (B,1,H,W) in [0,1] -> score map (B,1,H,W) >= 0, each image on its own. Meant for ``eval()`` with weights from
    ``tiepoints.importers.load_official``; for training use ``KeyNet``.
    """

    def __init__(self, *, last_kernel: int = 5, norm_eps: float = TENSORFLOW_EPS, float32_sizes: bool = True):
        super().__init__()
        if int(last_kernel) != last_kernel or last_kernel < 1 or last_kernel % 2 == 0:
            raise ValueError(f"last_kernel must be an odd whole number from 1 up, got {last_kernel}")
        self.settings = {"last_kernel": last_kernel, "norm_eps": norm_eps, "float32_sizes": float32_sizes}
        self.float32_sizes = float32_sizes
        widths = [len(CHANNELS)] + [NUM_FILTERS] * NUM_BLOCKS
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], KERNEL_SIZE, padding=KERNEL_SIZE // 2),
                    nn.BatchNorm2d(widths[i + 1], eps=norm_eps),
                    nn.ReLU(),
                )
                for i in range(NUM_BLOCKS)
            )
        )
        merged = NUM_FILTERS * NUM_LEVELS
        self.last_norm = nn.BatchNorm2d(merged, eps=norm_eps)
        self.last = nn.Conv2d(merged, 1, last_kernel, padding=last_kernel // 2)

    @classmethod
    def tensorflow(cls) -> LegacyKeyNet:
        """Variant B, the official TensorFlow network; untrained."""
        return cls()

    @classmethod
    def rekd_port(cls) -> LegacyKeyNet:
        """Variant C, the network of ``keyNet.pt`` in the REKD repository; untrained."""
        return cls(last_kernel=1, norm_eps=PYTORCH_EPS, float32_sizes=False)

    def level_images(self, image: Tensor) -> list[Tensor]:
        """Contrast-normalised levels (B,1,h,w) of an image in [0,1], all cut from the full resolution."""
        image = divide_by_maximum(image)
        blurred = blur_separable(image, blur_taps(), pad_mode="constant")
        levels = [image]
        height, width = image.shape[-2:]
        for level in range(1, NUM_LEVELS):
            levels.append(_resize_corners(blurred, level_size(height, width, level, float32=self.float32_sizes)))
        return [normalise_contrast(level) for level in levels]

    def forward(self, image: Tensor) -> Tensor:
        """Score map (B,1,H,W) >= 0 of a gray image (B,1,H,W) in [0,1]."""
        if image.ndim != 4 or image.shape[1] != 1:
            raise ValueError(f"expected a gray image (B,1,H,W), got shape {tuple(image.shape)}")
        size = (image.shape[-2], image.shape[-1])
        levels = self.level_images(image)
        maps = [_resize_corners(self.blocks(legacy_features(level)), size) for level in levels]  # each (B,8,H,W)
        return F.relu(self.last(self.last_norm(torch.cat(maps, dim=1))))
