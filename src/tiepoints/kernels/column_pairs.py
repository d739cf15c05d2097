"""Fast convolutions with few channels: two neighboring columns of the maps as one pixel.

Libraries compute 16 output channels at a time, half of which a layer of 8 channels leaves unused.
Maps (B,C,H,W) with the channels innermost in memory are, without a copy, maps (B,2C,H,W/2) whose
pixels are pairs of columns; a filter of k columns becomes one of (k+1)/2 pairs or one more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def pair_columns(maps: Tensor) -> Tensor:
    """(B,C,H,W), W even -> (B,2C,H,W/2), channels-last; a view of channels-last maps."""
    b, c, h, w = maps.shape
    return maps.permute(0, 2, 3, 1).reshape(b, h, w // 2, 2 * c).permute(0, 3, 1, 2)


def split_columns(pairs: Tensor) -> Tensor:
    """The inverse of ``pair_columns``."""
    b, c, h, w = pairs.shape
    return pairs.permute(0, 2, 3, 1).reshape(b, h, 2 * w, c // 2).permute(0, 3, 1, 2)


def paired(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution (B,C,H,W) -> (B,D,H,W), odd kernel, zero padding that keeps the size, as one
    of pairs of columns, (B,2C,H,W/2) -> (B,2D,H,W/2), with as few weights other than zero.
    """
    d, c, rows, columns = conv.weight.shape
    radius = columns // 2
    reach = (radius + 1) // 2  # pairs on each side
    weight = conv.weight.new_zeros(2 * d, 2 * c, rows, 2 * reach + 1)
    with torch.no_grad():
        for side in (0, 1):  # of the output within its pair
            for k in range(columns):
                pair, other = divmod(side + k - radius, 2)
                weight[side * d : (side + 1) * d, other * c : (other + 1) * c, :, reach + pair] = (
                    conv.weight[..., k]
                )
    wide = nn.Conv2d(2 * c, 2 * d, weight.shape[2:], padding=(rows // 2, reach))  # type: ignore[arg-type]
    wide.weight = nn.Parameter(weight, requires_grad=False)
    bias = weight.new_zeros(d) if conv.bias is None else conv.bias.detach()
    wide.bias = nn.Parameter(bias.repeat(2), requires_grad=False)
    return wide.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def apply_paired(
    channels: Sequence[Tensor],
    stack: nn.Module,
    plain: nn.Module,
    radii: Sequence[int],
) -> Tensor:
    """Convolutions, each followed by a ReLU, of maps of any width: (B,D,H,W), channels-last, in
    the data type of the input; computed in that of the filters.

    Args:
        channels: the C channels of the input, (B,1,H,W) each.
        stack: the convolutions of pairs of columns.
        plain: the same convolutions of maps; computes the last columns of an odd width, which
            depend on the column by which the input is extended.
        radii: of the filters of each convolution.
    """
    first, dtype = channels[0], next(plain.parameters()).dtype
    b, _, h, w = first.shape
    odd = w % 2
    shape = (b, len(channels), h, w + odd)
    maps = torch.empty(shape, dtype=dtype, device=first.device, memory_format=torch.channels_last)
    # directly in channels-last memory, which saves a conversion after concatenation
    torch.cat([channel.to(dtype) for channel in channels], dim=1, out=maps[..., :w])
    if odd:
        maps[..., w:] = 0
    out = split_columns(stack(pair_columns(maps)))[..., :w]
    # without gaps between the rows, with which later steps are slow
    out = out.to(first.dtype).contiguous(memory_format=torch.channels_last)
    # the second layer is the first whose padding the extension replaces
    if odd and (wrong := sum(radii[1:])):
        start = max(0, w - wrong - sum(radii))
        edge = plain(maps[..., start:w])
        out[..., -min(wrong, w) :] = edge[..., -min(wrong, w) :]
    return out
