"""HardNet, HyNet and SOSNet: patch descriptors with the same seven convolutions and different
normalization; and two forms of HardNet of our own.

HardNet (Mishchuk et al., NeurIPS 2017), SOSNet (Tian et al., CVPR 2019), HyNet (Tian et al.,
NeurIPS 2020). The trunk is L2-Net's: six 3x3 convolutions, two of them of stride 2, and one 8x8
that reduces the 8x8 map to a vector of dimension 128. ``HardNetLight`` has stride 2 in its first
convolution already, which leaves a quarter of the arithmetic. ``HardNetContext`` is the light one
with two larger patches of the same keypoint as further channels.

In: patches (N,1,P,P) in [0,1], of ``HardNetContext`` (N,3,P,P); any P is resized to 32. Each
network scales the values itself.
Out: (N,128), unit length; for constant patches finite, but meaningless.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import PatchSpec, StackInput

PATCH_SIZE = 32
DIMENSION = 128
#: Channels and strides of the six convolutions before the last one.
CHANNELS = (32, 32, 64, 64, 128, 128)
STRIDES = (1, 1, 2, 1, 2, 1)
#: Dimensions, and shares of the squared length, of the patches of ``HardNetContext``.
PARTS = (64, 32, 32)
SHARES = (0.45, 0.3, 0.25)
#: Constants of the published code, added to the deviation (HardNet), the variance (SOSNet)
#: and the mean square (filter response normalization).
HARDNET_EPS = 1e-7
SOSNET_EPS = 1e-5
FRN_EPS = 1e-6
#: Value of a white pixel in the published training of HyNet and SOSNet.
GRAY_LEVELS = 255.0
#: HardNet's published initialization: orthogonal filters of this gain.
INIT_GAIN = 0.6


class PatchNet(nn.Module):
    """Base class with the convolutions. Subclasses define the normalization of patches and what
    follows each convolution.
    """

    spec = PatchSpec()
    #: Whether the six convolutions before the last one have a bias.
    bias = False
    #: Stride and side of the filters of the first convolution.
    first_stride, first_kernel = STRIDES[0], 3

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.settings: dict[str, Any] = {"dropout": dropout}
        self.dropout = nn.Dropout(dropout)
        sources = (1, *CHANNELS[:-1])
        strides = (self.first_stride, *STRIDES[1:])
        kernels = (self.first_kernel, *(3 for _ in STRIDES[1:]))
        layers = [
            nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=self.bias)
            for c_in, c_out, kernel, stride in zip(sources, CHANNELS, kernels, strides, strict=True)
        ]
        side = PATCH_SIZE // math.prod(strides)
        layers.append(nn.Conv2d(CHANNELS[-1], DIMENSION, side, bias=False))
        self.convolutions = nn.ModuleList(layers)
        for layer in layers:
            nn.init.orthogonal_(layer.weight, gain=INIT_GAIN)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def standardize(self, patches: Tensor) -> Tensor:
        """Normalize patches (N,C,32,32) in [0,1] for the first convolution."""
        raise NotImplementedError

    def follow(self, index: int, maps: Tensor) -> Tensor:
        """Apply normalization and activation after convolution ``index``."""
        raise NotImplementedError

    def forward(self, patches: Tensor, raw: bool = False) -> Tensor:
        """(N,C,P,P) in [0,1] -> (N,128) float32 of unit length; with ``raw`` not normalized, as
        HyNet's loss needs it.

        Raises:
            ValueError: another shape.
        """
        check_shape(patches, len(self.spec.reach))
        if not len(patches):
            return torch.zeros(0, DIMENSION, device=patches.device)
        vectors = self.vectors(to_side(patches.float(), PATCH_SIZE))
        return vectors if raw else unit(vectors)

    def vectors(self, patches: Tensor) -> Tensor:
        """(N,C,32,32) float32 in [0,1], N > 0 -> (N,128) float32, not normalized."""
        maps = self.prepared(self.standardize(patches))
        for index, layer in enumerate(self.convolutions):
            if index == len(self.convolutions) - 1:
                maps = self.dropout(maps)
            maps = self.follow(index, layer(maps))
        return maps.flatten(1).float()

    def prepared(self, maps: Tensor) -> Tensor:
        """Maps (N,C,H,W) in the type and memory format of the convolutions."""
        maps = maps.to(cast(nn.Conv2d, self.convolutions[0]).weight.dtype)
        # a third faster on a CPU
        return maps if self.training else maps.contiguous(memory_format=torch.channels_last)

    def fused(self, dtype: torch.dtype = torch.float32) -> FusedPatchNet:
        """The same function for inference, faster: see ``FusedPatchNet``."""
        return FusedPatchNet(self, dtype)

    def fold(self) -> None:
        """Fold normalization into convolutions where possible, in place."""


class HardNet(PatchNet):
    """HardNet: each patch standardized, batch normalization without parameters, ReLU."""

    def __init__(self, dropout: float = 0.1):
        super().__init__(dropout)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in (*CHANNELS, DIMENSION))

    def standardize(self, patches: Tensor) -> Tensor:
        # no gradient through the statistics, as published
        deviation, mean = torch.std_mean(patches.detach(), dim=(2, 3), keepdim=True)
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


class HardNetLight(HardNet):
    """HardNet with a quarter of its arithmetic: the first convolution, 5x5, has stride 2, so that
    all others see maps of half the size.
    """

    first_stride, first_kernel = 2, 5


class HardNetContext(HardNetLight):
    """HardNet light that also sees the surroundings of the patch, in patches around the same
    keypoint of 3 and 8 times its side: places that look alike often have different ones.

    The layers of a trained HardNet light, which stay as they are, process the patch; copies of them
    the surroundings, at half the resolution. The descriptor joins a unit vector of each patch, with
    ``PARTS`` dimensions and ``SHARES`` of the squared length, so that the cosine of two descriptors
    is the weighted mean of those of the patches.
    """

    spec = PatchSpec(reach=(1.0, 3.0, 8.0))

    def __init__(self, dropout: float = 0.0):
        super().__init__(dropout)
        near, *others = PARTS
        for layer in self.convolutions[:-1]:
            layer.requires_grad_(False)
        self.context = nn.ModuleList(copy.deepcopy(layer) for layer in self.convolutions[:-1])
        self.context.requires_grad_(True)
        last = cast(nn.Conv2d, self.convolutions[-1])
        side = last.kernel_size[0]
        self.convolutions[-1] = nn.Conv2d(last.in_channels, near, side, bias=False)
        self.norms[-1] = nn.BatchNorm2d(near, affine=False)
        self.context.extend(
            nn.Conv2d(last.in_channels, dim, side // 2, bias=False) for dim in others
        )
        sizes = (*CHANNELS, *others)
        self.context_norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in sizes)
        for layer in (self.convolutions[-1], *self.context[len(CHANNELS) :]):
            nn.init.orthogonal_(cast(Tensor, layer.weight), gain=INIT_GAIN)

    @torch.no_grad()
    def start_from(self, light: HardNetLight) -> None:
        """Take the layers of a trained HardNet light."""
        layers = light.convolutions[:-1].state_dict()
        self.convolutions[:-1].load_state_dict(layers)
        self.context[: len(CHANNELS)].load_state_dict(layers)
        self.norms[:-1].load_state_dict(light.norms[:-1].state_dict())
        # a random projection of its descriptors
        weight = cast(nn.Conv2d, light.convolutions[-1]).weight
        norm = cast(nn.BatchNorm2d, light.norms[-1])
        scale = torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)
        projection = nn.init.orthogonal_(torch.empty(PARTS[0], DIMENSION))
        last = cast(nn.Conv2d, self.convolutions[-1])
        last.weight.copy_(torch.einsum("kd,d,dchw->kchw", projection, scale, weight))

    def train(self, mode: bool = True) -> HardNetContext:
        super().train(mode)
        self.norms[:-1].eval()
        return self

    def vectors(self, patches: Tensor) -> Tensor:
        around = self.standardize(F.avg_pool2d(patches[:, 1:], 2))
        n, count = around.shape[:2]
        around = self.prepared(around.flatten(0, 1)[:, None])
        layers = list(zip(self.context, self.context_norms, strict=True))
        for layer, norm in layers[:-count]:
            around = F.relu(norm(layer(around)), inplace=True)
        around = around.reshape(n, count, *around.shape[1:])
        others = [
            norm(layer(around[:, i])).flatten(1) for i, (layer, norm) in enumerate(layers[-count:])
        ]
        return joined([super().vectors(patches[:, :1]), *others])

    def fold(self) -> None:
        super().fold()
        self.context = nn.ModuleList(
            nn.utils.fusion.fuse_conv_bn_eval(conv, norm)  # type: ignore[type-var, arg-type]
            for conv, norm in zip(self.context, self.context_norms, strict=True)
        )
        self.context_norms = nn.ModuleList(nn.Identity() for _ in self.context_norms)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The descriptor (N,128) of vectors (N,D) of the patches of ``HardNetContext``."""
    return torch.cat(
        [share**0.5 * unit(part.float()) for share, part in zip(SHARES, parts, strict=True)], dim=1
    )


def parts_of(descriptors: Tensor) -> list[Tensor]:
    """The unit vectors (N,D) that ``joined`` joined."""
    parts = descriptors.split(PARTS, dim=1)
    return [part / share**0.5 for share, part in zip(SHARES, parts, strict=True)]


class SOSNet(HardNet):
    """SOSNet: HardNet's layers after an instance normalization of the gray levels."""

    def standardize(self, patches: Tensor) -> Tensor:
        return F.instance_norm(patches * GRAY_LEVELS, eps=SOSNET_EPS)


class FilterResponseNorm(nn.Module):
    """Division of each map by its root mean square, then scale and shift per channel (Singh and
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
    """Thresholded linear unit: the maximum of the value and a learned threshold per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.tau = nn.Parameter(-torch.ones(1, channels, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """(N,C,H,W) -> (N,C,H,W)."""
        return torch.maximum(maps, self.tau)


class _ResponseNorm(torch.autograd.Function):
    """``ThresholdedLinear(FilterResponseNorm(x))`` in fewer passes over the maps, which reduces the
    training time by a third.
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
        grad = gradient * (out > tau)
        grad_bias = grad.sum(dim=(0, 2, 3), keepdim=True)
        grad_tau = gradient.sum(dim=(0, 2, 3), keepdim=True) - grad_bias
        product = (grad * maps).sum(dim=(2, 3), keepdim=True)
        grad_weight = (product * inverse).sum(dim=0, keepdim=True)
        by_power = weight * inverse.pow(3) * product / maps[0, 0].numel()
        grad_maps = grad.mul_(weight * inverse).addcmul_(maps, by_power, value=-1)
        return grad_maps, grad_weight, grad_bias, grad_tau, None


class HyNet(PatchNet):
    """HyNet: filter response normalization and thresholded linear units; gray levels are not
    standardized.
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
        # with mixed precision, the type of the maps is not that of the parameters
        given = (norm.weight, norm.bias, limit.tau)
        parameters = [cast(Tensor, p).to(maps.dtype) for p in given]
        if torch.compiler.is_compiling():  # exported without a gradient
            power = maps.square().mean(dim=(2, 3), keepdim=True)
            inverse = torch.rsqrt(power + cast(Tensor, norm.eps).abs())
            weight, bias, tau = parameters
            return torch.maximum(maps * (weight * inverse) + bias, tau)
        return _ResponseNorm.apply(maps, *parameters, norm.eps)

    def fold(self) -> None:
        self.convolutions[-1] = nn.utils.fusion.fuse_conv_bn_eval(
            self.convolutions[-1], self.last_norm
        )  # type: ignore[type-var]
        self.last_norm = nn.Identity()  # type: ignore[assignment]


class FusedPatchNet(nn.Module):
    """A trained ``PatchNet`` for inference: (N,C,P,P) in [0,1] -> (N,128) float32 of unit length,
    with batch normalization folded into the convolutions, which are in ``dtype``.

    Equal to the network in eval mode up to rounding. The weights are copied, so later training of
    the original has no effect.
    """

    def __init__(self, net: PatchNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.spec = net.spec
        self.stack = _PatchStack(folded(net, dtype))

    def forward(self, patches: Tensor) -> Tensor:
        """(N,C,P,P) -> (N,128).

        Raises:
            ValueError: another shape.
        """
        check_shape(patches, len(self.spec.reach))
        if not len(patches):
            return torch.zeros(0, DIMENSION, device=patches.device)
        return self.stack(to_side(patches.float(), PATCH_SIZE))


def folded(net: Any, dtype: torch.dtype) -> Any:
    """A copy of a network with ``fold`` for inference: folded, channels-last, in ``dtype``."""
    net = copy.deepcopy(net).eval()
    net.fold()
    return net.to(dtype).to(memory_format=torch.channels_last)


def check_shape(patches: Tensor, channels: int = 1) -> None:
    """Check that patches are (N,channels,P,P).

    Raises:
        ValueError: they are not.
    """
    if (
        patches.ndim != 4
        or patches.shape[1] != channels
        or patches.shape[2] != patches.shape[3]
        or not patches.shape[2]
    ):
        raise ValueError(f"patches must be (N,{channels},P,P), got {tuple(patches.shape)}")


class _PatchStack(nn.Module):
    """The layers of a patch network: (N,C,32,32), N > 0 -> unit descriptors (N,128)."""

    def __init__(self, net: PatchNet):
        super().__init__()
        self.net = net
        self.input = StackInput(channels=len(net.spec.reach), side=PATCH_SIZE)

    def forward(self, patches: Tensor) -> Tensor:
        return unit(self.net.vectors(patches))


def unit(vectors: Tensor) -> Tensor:
    """Rows (N,D) normalized to length 1; a row of zeros becomes the uniform vector."""
    return F.normalize(vectors + 1e-10, dim=1, eps=1e-20)


def to_side(patches: Tensor, side: int) -> Tensor:
    """Resize patches (N,C,P,P) to (N,C,side,side): means of blocks if P is a multiple, else
    bilinear with anti-aliasing.
    """
    p = patches.shape[-1]
    if p == side:
        return patches
    if p % side == 0:
        return F.avg_pool2d(patches, p // side)
    return F.interpolate(
        patches, size=(side, side), mode="bilinear", align_corners=False, antialias=p > side
    )
