"""SobelNet: real-time keypoints from gradients (Yuan et al. 2020, "Realtime CNN-based Keypoint
Detector with Sobel Filter ...").

Idea: gradients have several directions at corners, so a small network has gradients as input; the
same network is applied to three scales of the image, and its maps are summed, not concatenated,
before a last filter computes the score.

In:  image (B,1,H,W), float32 gray in [0,1], any size from 1 x 1 up. Out: score map (B,1,H,W), >= 0;
only the order of scores of one network is meaningful.

The paper's code was never published. Scales, the order of Sobel, Gaussian, three layers of eight
channels, sum, last layer and the threshold relative to the maximum are the paper's; the choice of
gradients, the kernel sizes, and the softplus of the score are ours (docs/models.md).
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..filters import binomial_blur, resize, sobel
from ..kernels.column_pairs import apply_paired, paired
from ..kernels.single_channel import SingleChannelConv2d
from ..kernels.tiling import apply_tiled
from ..regions import Box, InMemory, Resized, Source, resize_box, source_box
from .spec import ConvStack, DetectorSpec

#: Size ratio of neighboring scales: 1, 1/sqrt(2), 1/2.
SCALE_FACTOR = math.sqrt(2.0)
NUM_LEVELS = 3
NUM_FILTERS = 8
NUM_BLOCKS = 3
GRADIENTS = ("dx", "dy", "magnitude")
#: Scores below this fraction of the image's largest are set to zero. Scores span a wide range: 1e-6
#: would already remove repeatable keypoints.
RATIO = 1e-8
# bounds the memory of maps on a large image; smaller tiles cost more in calls than they save in
# cache
TILE_PIXELS = 300_000
_EPS = 1e-12  # added to the squared gradient, because the square root has no derivative at 0


def gradients(image: Tensor) -> list[Tensor]:
    """``GRADIENTS`` of a gray image (B,1,H,W) after a 5 x 5 binomial blur: (B,1,H,W) each, in gray
    values per pixel.
    """
    # Sobel and Gaussian commute: one blur of the image instead of two of the derivatives
    dx, dy = sobel(binomial_blur(image))
    return [dx, dy, (dx.square() + dy.square() + _EPS).sqrt()]


def level_size(height: int, width: int, level: int) -> tuple[int, int]:
    """Size of a coarser level inside the network, never below 1 x 1."""
    factor = SCALE_FACTOR**level
    return max(1, round(height / factor)), max(1, round(width / factor))


class SobelNet(nn.Module):
    """Score map network: image (B,1,H,W) -> score map (B,1,H,W).

    Args:
        kernel_size: odd side of all learned filters in pixels.
        ratio: scores below this fraction, in [0, 1), of the image's largest become zero in eval
            mode.

    Raises:
        ValueError: an argument is outside these limits.
    """

    spec = DetectorSpec()

    def __init__(self, *, kernel_size: int = 3, ratio: float = RATIO):
        super().__init__()
        if int(kernel_size) != kernel_size or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd integer from 1 up, got {kernel_size}")
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio must lie in [0, 1), got {ratio}")
        self.settings: dict[str, Any] = {"kernel_size": int(kernel_size), "ratio": float(ratio)}
        self.ratio = float(ratio)
        #: Localization bias (x, y) of the trained network in pixels, which extraction subtracts.
        self.offset: tuple[float, float] = (0.0, 0.0)
        #: Response to a constant image, stored with the weights; None = not measured.
        self.floor: float | None = None
        pad = kernel_size // 2
        widths = [len(GRADIENTS)] + NUM_BLOCKS * [NUM_FILTERS]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, kernel_size, padding=pad), nn.BatchNorm2d(b), nn.ReLU()
                )
                for a, b in pairwise(widths)
            )
        )
        self.last = nn.Conv2d(NUM_FILTERS, 1, kernel_size, padding=pad)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def level_images(self, image: Tensor) -> list[Tensor]:
        """The image and its coarser levels, each blurred and reduced from the previous one."""
        h, w = image.shape[-2:]
        levels = [image]
        for i in range(1, NUM_LEVELS):
            levels.append(resize(binomial_blur(levels[-1]), level_size(h, w, i)))
        return levels

    def forward(self, image: Tensor) -> Tensor:
        """Score map (B,1,H,W) >= 0 of a gray image (B,1,H,W) in [0,1]."""
        if image.ndim != 4 or image.shape[1] != 1:
            raise ValueError(f"expected a gray image (B,1,H,W), got shape {tuple(image.shape)}")
        total: Tensor | None = None
        for level in reversed(self.level_images(image)):
            maps = self.blocks(torch.cat(gradients(level), dim=1))
            total = (
                maps if total is None else maps + resize(total, (level.shape[-2], level.shape[-1]))
            )
        assert total is not None
        score = F.softplus(self.last(total))
        return score if self.training else cut(score, self.ratio)

    def fused(self, dtype: torch.dtype = torch.float32) -> FusedSobelNet:
        """The same function for inference, faster: see ``FusedSobelNet``."""
        return FusedSobelNet(self, dtype)


def cut(score: Tensor, ratio: float) -> Tensor:
    """Set scores (B,1,H,W) below ``ratio`` times the largest of their image to zero."""
    return (
        torch.where(score < ratio * score.amax(dim=(1, 2, 3), keepdim=True), 0.0, score)
        if ratio
        else score
    )


class FusedSobelNet(nn.Module):
    """A trained ``SobelNet`` for inference: batch normalization folded into the filters, which are
    applied to pairs of columns in channels-last memory in ``dtype``, in tiles of rows.

    Equal to the network in eval mode up to rounding. The weights are copied, so later training of
    the original has no effect.
    """

    spec = SobelNet.spec

    def __init__(self, net: SobelNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.offset, self.ratio = net.offset, net.ratio
        # the response to a constant image is another one in another precision: measured when needed
        self.floor = net.floor if dtype == torch.float32 else None
        self.reference = copy.deepcopy(net).eval().requires_grad_(False)
        folded = [fuse_conv_bn_eval(block[0], block[1]) for block in self.reference.blocks]  # type: ignore[index]
        self.plain = ConvStack(folded).to(dtype)
        self.stack: nn.Module = ConvStack(map(paired, folded)).to(dtype)
        self.last = SingleChannelConv2d(net.last.weight, net.last.bias)
        self.radius = net.settings["kernel_size"] // 2
        # gradients have a radius of one pixel, their blur of two
        self.halo = 3 + NUM_BLOCKS * self.radius

    def forward(self, image: Tensor) -> Tensor:
        """Score map (B,1,H,W) >= 0 of a gray image (B,1,H,W) in [0,1]."""
        source = InMemory(image)
        return cut(self.part(source, Box.whole(source.size)), self.ratio)

    @torch.inference_mode()
    def part(self, source: Source, box: Box) -> Tensor:
        """The pixels of ``box`` of the score map of gray images in [0,1], (B,1,h,w) >= 0, without
        the threshold relative to the maximum of the image.
        """
        outer = box.grow(self.radius, source.size)
        score = F.softplus(self.last(self._total(self._levels(source), outer)))
        return box.crop(score, outer)

    def _levels(self, source: Source) -> list[Source]:
        """The images and their coarser levels, as ``SobelNet.level_images``."""
        levels = [source]
        for i in range(1, NUM_LEVELS):
            levels.append(Resized(levels[-1], level_size(*source.size, i), blur=True))
        return levels

    def _total(self, levels: list[Source], box: Box) -> Tensor:
        """Sum of the maps of levels over a box of the first one, (B,M,h,w)."""
        level, *coarser = levels
        outer = box.grow(self.halo, level.size)
        maps = box.crop(
            apply_tiled(level.read(outer), self.halo, TILE_PIXELS, self._features), outer
        )
        if coarser:
            size = coarser[0].size
            inner = source_box(box, level.size, size)
            maps.add_(resize_box(self._total(coarser, inner), inner, size, box, level.size))
        return maps

    def _features(self, level: Tensor) -> Tensor:
        return apply_paired(gradients(level), self.stack, self.plain, self.plain.radii)
