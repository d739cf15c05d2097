"""A network of patches, or a dense network, as a descriptor of keypoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .models.desnet import sample
from .patches import HALF_SIDE, extract_patches
from .pyramid import Pyramid
from .structs import Keypoints

#: A dense network sees far more than a patch: finer levels serve it better (chosen on warped
#: held-out photographs).
DENSE_SCALE = 0.71

#: Patches described at a time: their maps stay in a processor's cache, and memory is bounded.
DESCRIBE_CHUNK = 256


class PatchDescriptor:
    """A network of patches (N,1,P,P) -> (N,D) as a descriptor of points.

    Patches are turned by the points' angles; with ``upright`` they are not, as in REKD's published
    evaluation.
    """

    def __init__(
        self,
        net: Callable[[Tensor], Tensor],
        half_side: float = HALF_SIDE,
        *,
        upright: bool = False,
    ):
        self.net, self.half_side, self.upright = net, half_side, upright

    def __call__(self, pyramid: Pyramid, keypoints: Keypoints, index: int) -> Tensor:
        """Descriptors (N,D) of the points of image ``index`` of the batch."""
        if self.upright:
            keypoints = replace(keypoints, angle=torch.zeros_like(keypoints.angle))
        with torch.inference_mode():
            patches = extract_patches(pyramid, keypoints, index=index, half_side=self.half_side)
            return torch.cat([self.net(part) for part in patches.split(DESCRIBE_CHUNK)])


class DenseDescriptor:
    """Network image -> map (``desnet.DesNet``) as a descriptor: points are read at the level
    nearest to ``DENSE_SCALE`` times their scale.

    The points' angles do not matter: what a turn changes, the network has to know.
    """

    def __init__(self, net: Callable[[Tensor], Tensor], dim: int):
        self.net, self.dim = net, dim

    def __call__(self, pyramid: Pyramid, keypoints: Keypoints, index: int) -> Tensor:
        """Descriptors (N,D) of the points of image ``index`` of the batch."""
        scales = torch.tensor(
            [level.scale for level in pyramid.levels], device=keypoints.scale.device
        )
        nearest = (
            ((DENSE_SCALE * keypoints.scale).clamp(min=1e-6).log()[:, None] - scales.log())
            .abs()
            .argmin(dim=1)
        )
        out = torch.zeros(len(keypoints), self.dim, device=keypoints.xy.device)
        with torch.inference_mode():
            for i, level in enumerate(pyramid.levels):
                mine = (nearest == i).nonzero()[:, 0]
                if len(mine):
                    found = self.net(level.image[index : index + 1])
                    out[mine] = sample(found, level.from_original(keypoints.xy[mine]))
        return out
