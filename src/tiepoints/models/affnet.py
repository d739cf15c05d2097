"""AffNet: the affine shape of a keypoint from its patch.

Mishkin, Radenovic and Matas, "Repeatability Is Not Enough: Learning Affine Regions via
Discriminability", ECCV 2018. Seven convolutions, of which the last reduces the 8x8 map to the three
elements of a lower triangular matrix. A patch that is sampled in the frame of its shape
(``patches.extract_patches``) looks similar from different viewpoints.

In: patches (N,1,P,P) in [0,1]; any P is resized to 32. Out: (N,2,2), determinant 1, lower
triangular with a positive diagonal: vertical lines stay vertical, so that a shape contains no
rotation of the patch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .patchnets import HARDNET_EPS, PATCH_SIZE, check_shape, folded, to_side
from .spec import ShapeSpec, StackInput

#: Channels and strides of the 3x3 convolutions before the last one, and side of its map.
CHANNELS = (16, 16, 32, 32, 64, 64)
STRIDES = (1, 1, 2, 1, 2, 1)
LAST_SIDE = 8
#: Gain of the initial orthogonal filters; the last layer starts at 0, with shapes of the identity.
INIT_GAIN = 0.8
#: Largest difference between an element of the matrix, before its determinant becomes 1, and the
#: identity: the diagonal must stay positive.
LIMIT = 0.9


class AffNet(nn.Module):
    """Affine shapes of patches: convolutions with batch normalization and ReLU, then tanh."""

    spec = ShapeSpec()

    def __init__(self, dropout: float = 0.25):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.settings: dict[str, Any] = {"dropout": dropout}
        self.dropout = nn.Dropout(dropout)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
            for c_in, c_out, stride in zip((1, *CHANNELS[:-1]), CHANNELS, STRIDES, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in CHANNELS)
        self.last = nn.Conv2d(CHANNELS[-1], 3, LAST_SIDE)
        for layer in self.convolutions:
            nn.init.orthogonal_(cast(Tensor, layer.weight), gain=INIT_GAIN)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(cast(Tensor, self.last.bias))

    def forward(self, patches: Tensor) -> Tensor:
        """(N,1,P,P) in [0,1] -> shapes (N,2,2) float32.

        Raises:
            ValueError: another shape.
        """
        return _shapes_of(patches, self.elements)

    def elements(self, patches: Tensor) -> Tensor:
        """(N,1,32,32) float32 in [0,1], N > 0 -> (N,3) float32, the argument of ``to_shapes``."""
        maps = standardized(patches).to(self.last.weight.dtype)
        if not self.training:  # faster on a CPU
            maps = maps.contiguous(memory_format=torch.channels_last)
        for layer, norm in zip(self.convolutions, self.norms, strict=True):
            maps = F.relu(norm(layer(maps)), inplace=True)
        # means over the positions of the map: of sums, steps of Adam would saturate the tanh
        return self.last(self.dropout(maps)).flatten(1).float() / LAST_SIDE**2

    def fused(self, dtype: torch.dtype = torch.float32) -> FusedAffNet:
        """The same function for inference, faster: see ``FusedAffNet``."""
        return FusedAffNet(self, dtype)

    def fold(self) -> None:
        """Fold batch normalization into the convolutions, in place."""
        self.convolutions = nn.ModuleList(
            nn.utils.fusion.fuse_conv_bn_eval(conv, norm)  # type: ignore[type-var, arg-type]
            for conv, norm in zip(self.convolutions, self.norms, strict=True)
        )
        self.norms = nn.ModuleList(nn.Identity() for _ in self.norms)


class FusedAffNet(nn.Module):
    """A trained ``AffNet`` for inference: batch normalization folded in, filters in ``dtype``.

    Equal to the network in eval mode up to rounding. The weights are copied, so later training of
    the original has no effect.
    """

    spec = AffNet.spec

    def __init__(self, net: AffNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.stack = _ShapeStack(folded(net, dtype))

    def forward(self, patches: Tensor) -> Tensor:
        """(N,1,P,P) -> (N,2,2).

        Raises:
            ValueError: another shape.
        """
        return _shapes_of(patches, self.stack)


class _ShapeStack(nn.Module):
    """The layers of the network: (N,1,32,32), N > 0 -> (N,3)."""

    input = StackInput(side=PATCH_SIZE)

    def __init__(self, net: AffNet):
        super().__init__()
        self.net = net

    def forward(self, patches: Tensor) -> Tensor:
        return self.net.elements(patches)


def _shapes_of(patches: Tensor, elements: Any) -> Tensor:
    """Shapes (N,2,2) of patches (N,1,P,P) by a module (N,1,32,32) -> (N,3)."""
    check_shape(patches)
    if not len(patches):
        return torch.zeros(0, 2, 2, device=patches.device)
    return to_shapes(elements(to_side(patches.float(), PATCH_SIZE)))


def standardized(patches: Tensor) -> Tensor:
    """Patches (N,1,P,P) with mean 0 and deviation 1 each."""
    deviation, mean = torch.std_mean(patches, dim=(1, 2, 3), keepdim=True)
    return (patches - mean) / (deviation + HARDNET_EPS)


def to_shapes(elements: Tensor) -> Tensor:
    """Lower triangular matrices (N,2,2) of determinant 1 from any numbers (N,3): upper left, lower
    left and lower right element; the identity from zeros.
    """
    a, b, c = (LIMIT * torch.tanh(elements)).unbind(dim=1)
    root = ((1 + a) * (1 + c)).rsqrt()
    zero = torch.zeros_like(a)
    rows = torch.stack([1 + a, zero, b, 1 + c], dim=1) * root[:, None]
    return rows.reshape(-1, 2, 2)
