"""HardNet, HyNet and SOSNet: one trunk of seven convolutions, three ways to normalise what flows
through it.

HardNet (Mishchuk et al., NeurIPS 2017), SOSNet (Tian et al., CVPR 2019), HyNet (Tian et al.,
NeurIPS 2020). The trunk is L2-Net's: six 3x3 convolutions, two of stride 2, and one 8x8 that turns
the 8x8 map into 128 numbers.

In: patches (N,1,P,P) in [0,1]; any P is brought to 32. Each network does its own scaling.
Out: (N,128), unit length; finite for flat patches too, whose direction means nothing.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import PatchSpec

PATCH_SIZE = 32
DIMENSION = 128
#: Channels and strides of the six 3x3 convolutions.
CHANNELS = (32, 32, 64, 64, 128, 128)
STRIDES = (1, 1, 2, 1, 2, 1)
#: Constants of the published code (spec 7): HardNet's guard of the deviation, SOSNet's of the
#: variance, FRN's.
HARDNET_EPS = 1e-7
SOSNET_EPS = 1e-5
FRN_EPS = 1e-6
#: The range in which HyNet's and SOSNet's published weights saw their patches.
GRAY_LEVELS = 255.0
#: HardNet's published initialisation: orthogonal filters of this gain.
INIT_GAIN = 0.6


class PatchNet(nn.Module):
    """The trunk. Subclasses say how patches are normalised and what follows each convolution."""

    spec = PatchSpec()
    #: Whether the six 3x3 convolutions have a bias.
    bias = False

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.settings: dict[str, Any] = {"dropout": dropout}
        self.dropout = nn.Dropout(dropout)
        sources = (1, *CHANNELS[:-1])
        layers = [
            nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=self.bias)
            for c_in, c_out, stride in zip(sources, CHANNELS, STRIDES, strict=True)
        ]
        layers.append(nn.Conv2d(CHANNELS[-1], DIMENSION, PATCH_SIZE // 4, bias=False))
        self.convolutions = nn.ModuleList(layers)
        for layer in layers:
            nn.init.orthogonal_(layer.weight, gain=INIT_GAIN)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def standardize(self, patches: Tensor) -> Tensor:
        """(N,1,32,32) in [0,1] -> what the first convolution takes."""
        raise NotImplementedError

    def follow(self, index: int, maps: Tensor) -> Tensor:
        """Normalisation and activation after convolution ``index``."""
        raise NotImplementedError

    def forward(self, patches: Tensor, raw: bool = False) -> Tensor:
        """(N,1,P,P) in [0,1] -> (N,128) float32 of unit length; ``raw``: before that, as HyNet's
        loss needs it.

        Raises:
            ValueError: wrong shape.
        """
        if (
            patches.ndim != 4
            or patches.shape[1] != 1
            or patches.shape[2] != patches.shape[3]
            or not patches.shape[2]
        ):
            raise ValueError(f"patches must be (N,1,P,P), got {tuple(patches.shape)}")
        if not len(patches):
            return torch.zeros(0, DIMENSION, device=patches.device)
        dtype = cast(nn.Conv2d, self.convolutions[0]).weight.dtype
        maps = self.standardize(to_side(patches.float(), PATCH_SIZE)).to(dtype)
        if not self.training:  # a third faster on a CPU
            maps = maps.contiguous(memory_format=torch.channels_last)
        for index, layer in enumerate(self.convolutions):
            if index == len(self.convolutions) - 1:
                maps = self.dropout(maps)
            maps = self.follow(index, layer(maps))
        vectors = maps.flatten(1).float()
        return vectors if raw else unit(vectors)

    def fused(self, dtype: torch.dtype = torch.float32) -> PatchNet:
        """A copy for inference: the same function, batch normalisation folded into the
        convolutions.

        ``dtype`` is that of the convolutions; input and output stay float32.
        """
        net = copy.deepcopy(self).eval()
        net.fold()
        return net.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def fold(self) -> None:
        """Fold what can be folded, in place."""


class HardNet(PatchNet):
    """HardNet: patches standardised one by one, batch normalisation without parameters, ReLU."""

    def __init__(self, dropout: float = 0.1):
        super().__init__(dropout)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in (*CHANNELS, DIMENSION))

    def standardize(self, patches: Tensor) -> Tensor:
        # constants in the gradient, as published
        deviation, mean = torch.std_mean(patches.detach(), dim=(1, 2, 3), keepdim=True)
        return (patches - mean) / (deviation + HARDNET_EPS)

    def follow(self, index: int, maps: Tensor) -> Tensor:
        maps = self.norms[index](maps)
        return maps if index == len(CHANNELS) else F.relu(maps, inplace=True)

    def fold(self) -> None:
        self.convolutions = nn.ModuleList(
            nn.utils.fusion.fuse_conv_bn_eval(conv, norm)  # type: ignore[type-var, arg-type]
            for conv, norm in zip(self.convolutions, self.norms, strict=True)
        )
        self.norms = nn.ModuleList(nn.Identity() for _ in self.norms)


class SOSNet(HardNet):
    """SOSNet: HardNet's layers behind an instance normalisation of the gray levels."""

    def standardize(self, patches: Tensor) -> Tensor:
        return F.instance_norm(patches * GRAY_LEVELS, eps=SOSNET_EPS)


class FilterResponseNorm(nn.Module):
    """Division by the root mean square of each map, then scale and shift a channel (Singh and
    Krishnan, CVPR 2020).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("eps", torch.tensor([FRN_EPS]))

    def forward(self, maps: Tensor) -> Tensor:
        """(N,C,H,W) -> (N,C,H,W)."""
        power = maps.square().mean(dim=(2, 3), keepdim=True)
        return torch.addcmul(self.bias, maps, self.weight * torch.rsqrt(power + self.eps.abs()))  # type: ignore[operator]


class ThresholdedLinear(nn.Module):
    """TLU: the larger of the value and a learned threshold a channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.tau = nn.Parameter(-torch.ones(1, channels, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """(N,C,H,W) -> (N,C,H,W)."""
        return torch.maximum(maps, self.tau)


class _ResponseNorm(torch.autograd.Function):
    """``ThresholdedLinear(FilterResponseNorm(x))`` in fewer passes over the maps: training takes
    two thirds of the time.
    """

    @staticmethod
    def forward(
        ctx, maps: Tensor, weight: Tensor, bias: Tensor, tau: Tensor, eps: Tensor
    ) -> Tensor:
        wide = torch.promote_types(maps.dtype, torch.float32)
        power = (
            torch.linalg.vector_norm(maps, dim=(2, 3), keepdim=True, dtype=wide).square()
            / maps[0, 0].numel()
        )
        inverse = torch.rsqrt(power + eps.abs()).to(maps.dtype)
        out = torch.addcmul(bias, maps, weight * inverse)
        torch.maximum(out, tau, out=out)
        ctx.save_for_backward(maps, weight, tau, inverse, out)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        maps, weight, tau, inverse, out = ctx.saved_tensors
        through = gradient * (out > tau)
        of_bias = through.sum(dim=(0, 2, 3), keepdim=True)
        of_tau = gradient.sum(dim=(0, 2, 3), keepdim=True) - of_bias
        product = (through * maps).sum(dim=(2, 3), keepdim=True)
        of_weight = (product * inverse).sum(dim=0, keepdim=True)
        pull = weight * inverse.pow(3) * product / maps[0, 0].numel()
        of_maps = through.mul_(weight * inverse).addcmul_(maps, pull, value=-1)
        return of_maps, of_weight, of_bias, of_tau, None


class HyNet(PatchNet):
    """HyNet: filter response normalisation and thresholded linear units, the gray levels neither
    centred nor scaled.
    """

    bias = True

    def __init__(self, dropout: float = 0.1):
        super().__init__(dropout)
        self.norms = nn.ModuleList(FilterResponseNorm(c) for c in (1, *CHANNELS))
        self.activations = nn.ModuleList(ThresholdedLinear(c) for c in (1, *CHANNELS))
        self.last_norm = nn.BatchNorm2d(DIMENSION, affine=False)

    def standardize(self, patches: Tensor) -> Tensor:
        return self._respond(0, patches * GRAY_LEVELS)

    def follow(self, index: int, maps: Tensor) -> Tensor:
        if index == len(CHANNELS):
            return self.last_norm(maps)
        return self._respond(index + 1, maps)

    def _respond(self, index: int, maps: Tensor) -> Tensor:
        norm, limit = self.norms[index], self.activations[index]
        # under mixed precision the maps are of another type than the parameters
        parameters = (p.to(maps.dtype) for p in (norm.weight, norm.bias, limit.tau))
        return _ResponseNorm.apply(maps, *parameters, norm.eps)

    def fold(self) -> None:
        self.convolutions[-1] = nn.utils.fusion.fuse_conv_bn_eval(
            self.convolutions[-1], self.last_norm
        )  # type: ignore[type-var]
        self.last_norm = nn.Identity()  # type: ignore[assignment]


def unit(vectors: Tensor) -> Tensor:
    """Rows (N,D) at length 1; a row of zeros becomes the uniform direction."""
    return F.normalize(vectors + 1e-10, dim=1, eps=1e-20)


def to_side(patches: Tensor, side: int) -> Tensor:
    """Patches (N,1,P,P) as (N,1,side,side): means over whole blocks where P is a multiple, else
    filtered linear resizing.
    """
    p = patches.shape[-1]
    if p == side:
        return patches
    if p % side == 0:
        return F.avg_pool2d(patches, p // side)
    return F.interpolate(
        patches, size=(side, side), mode="bilinear", align_corners=False, antialias=p > side
    )
