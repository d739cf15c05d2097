"""Facts about a kind of network that the code around it needs; each network class carries its
``spec``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class DetectorSpec:
    """A network image (B,1,H,W) -> score map (B,1,H,W), or score map and angle map.

    Attributes:
        up_levels, down_levels: enlarged and reduced pyramid levels of the published extraction.
        nms_shape: shape of the suppression window, ``square`` or ``round``.
        scale_power: scores of different levels are compared times the level's scale to this power.
        angles: whether the network measures the orientation of keypoints too.
        official: the detector of the published extraction where it is not the common one:
            (network, ``DetectOptions``) -> (pyramid, masks) -> keypoints of each image.
    """

    up_levels: int = 1
    down_levels: int = 4
    nms_shape: str = "square"
    scale_power: float = 2.0
    angles: bool = False
    official: Callable[[nn.Module, Any], Callable[..., Any]] | None = None


@dataclass(frozen=True)
class PatchSpec:
    """A network patches (N,1,P,P) -> unit descriptors (N,D)."""


@dataclass(frozen=True)
class DenseSpec:
    """A network image (B,1,H,W) -> descriptor map (B,D,h,w), with D in its attribute ``dim``."""


Spec = DetectorSpec | PatchSpec | DenseSpec


def spec_of(net: nn.Module) -> Spec | None:
    """The spec of a network, None for one that carries none (a user's own)."""
    return getattr(net, "spec", None)


def fused(net: nn.Module, *args: Any) -> nn.Module:
    """The fast copy of a network for inference; the network itself where it has none."""
    make = getattr(net, "fused", None)
    return net if make is None else make(*args)
