"""Specification of a network class for the code that uses it; each class has one as ``spec``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..keypoints import SMALL_BORDER, SMALL_WINDOW


@dataclass(frozen=True)
class DetectorSpec:
    """A network image (B,1,H,W) -> score map (B,1,H,W), or score map and angle map.

    Attributes:
        up_levels, down_levels: enlarged and reduced pyramid levels of the published extraction.
        nms_window, border: side of the suppression window and width of the margin without
            keypoints, in pixels of a level, by default.
        nms_shape: shape of the suppression window, ``square`` or ``round``.
        per_scale: whether extraction keeps keypoints of one location on several levels by default.
        scale_power: scores are multiplied by the scale of their level to this power before levels
            are compared.
        angles: whether the network also estimates the orientation of keypoints.
        official: factory of the published detector, if ``ScoreMapDetector`` does not implement it:
            (network, ``DetectOptions``) -> (pyramid, masks) -> keypoints of each image.
    """

    up_levels: int = 1
    down_levels: int = 4
    nms_window: int = SMALL_WINDOW
    border: int = SMALL_BORDER
    nms_shape: str = "square"
    per_scale: bool = False
    scale_power: float = 2.0
    angles: bool = False
    official: Callable[[nn.Module, Any], Callable[..., Any]] | None = None


@dataclass(frozen=True)
class PatchSpec:
    """A network patches (N,C,P,P) -> unit descriptors (N,D).

    Attributes:
        reach: half sides of the C patches of a keypoint relative to ``patches.HALF_SIDE``.
    """

    reach: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class DenseSpec:
    """A network image (B,1,H,W) -> descriptor map (B,D,h,w); D is its attribute ``dim``."""


@dataclass(frozen=True)
class ShapeSpec:
    """A network patches (N,1,P,P) -> affine shapes (N,2,2) of keypoints, with determinant 1."""


Spec = DetectorSpec | PatchSpec | DenseSpec | ShapeSpec


@dataclass(frozen=True)
class StackInput:
    """Input of the costly part of a network.

    A fused network has that part as its attribute ``stack``, a module from one tensor to one tensor
    with this as its attribute ``input``; backends replace it (``backends``).

    Attributes:
        channels: C of the input (B,C,H,W).
        side: side of patches (N,C,side,side); None = maps of any height and width.
        step: height and width are multiples of it.
    """

    channels: int = 1
    side: int | None = None
    step: int = 1


class ConvStack(nn.ModuleList):
    """Convolutions that keep the size, each followed by a ReLU, in channels-last memory."""

    def __init__(self, convs: Iterable[nn.Conv2d]):
        super().__init__(conv.to(memory_format=torch.channels_last) for conv in convs)  # type: ignore[call-overload]

    @property
    def input(self) -> StackInput:
        """Maps with the channels of the first convolution."""
        return StackInput(channels=self[0].in_channels)  # type: ignore[arg-type]

    @property
    def radii(self) -> list[int]:
        """Radius of the filters of each convolution."""
        return [conv.kernel_size[0] // 2 for conv in self]  # type: ignore[index, misc]

    def forward(self, maps: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,D,H,W)."""
        for conv in self:
            maps = F.relu_(conv(maps))
        return maps


def spec_of(net: nn.Module) -> Spec | None:
    """The spec of a network, None for a user's network without one."""
    return getattr(net, "spec", None)


def fused(net: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The fast copy of a network for inference, its convolutions in ``dtype``, or the network
    itself if it has none.
    """
    make = getattr(net, "fused", None)
    if make is None:
        return net
    return make() if dtype == torch.float32 else make(dtype)
