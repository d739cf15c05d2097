"""A fast convolution with one output channel, as in the last layer of a score map network.

With one output channel, libraries leave most lanes of the vector registers unused. Here ``LANES``
neighboring columns are the output channels of a wider filter with a stride of as many columns; the
remaining columns are computed with the ordinary filter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LANES = 8  # float32 values of a 256-bit vector register


class SingleChannelConv2d(nn.Module):
    """``F.conv2d`` with zero padding that keeps the size, equal up to rounding.

    Args:
        weight: (1,C,k,k), k odd.
        bias: (1,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        weight = weight.detach()
        k = weight.shape[-1]
        wide = weight.new_zeros(LANES, weight.shape[1], k, k + LANES - 1)
        for column in range(LANES):
            wide[column, :, :, column : column + k] = weight[0]
        self.register_buffer("wide", wide.contiguous(memory_format=torch.channels_last))
        self.register_buffer("weight", weight)
        self.register_buffer("bias", weight.new_zeros(1) if bias is None else bias.detach())

    wide: Tensor
    weight: Tensor
    bias: Tensor

    def forward(self, maps: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,1,H,W)."""
        h, w = maps.shape[-2:]
        side = self.weight.shape[-1] // 2
        out = maps.new_empty(len(maps), 1, h, w)
        packed = w - w % LANES
        if packed:
            columns = F.conv2d(
                maps, self.wide, self.bias.expand(LANES), stride=(1, LANES), padding=side
            )
            out[..., :packed] = columns.permute(0, 2, 3, 1).reshape(len(maps), 1, h, packed)
        if packed < w:
            left = min(side, packed)
            rest = F.pad(maps[..., packed - left :], (side - left, side, side, side))
            out[..., packed:] = F.conv2d(rest, self.weight, self.bias)
        return out
