"""A convolution with one output channel, quick on vector units: what a network's last layer is.

With one output channel a library leaves most vector lanes empty, so ``LANES`` neighbouring columns
are made the output channels of one wider filter that moves by as many columns; the plain filter
does the columns left.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LANES = 8  # float32 values of a 256-bit vector register


class SingleChannelConv2d(nn.Module):
    """``F.conv2d`` with zeros outside, of weight (1,C,k,k), k odd, and bias (1,): the same up to
    rounding.

    Args:
        weight: (1,C,k,k).
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
