"""Descriptors of keypoints from a patch network or a dense network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .deformation import Deformation
from .geometry import warp_image, warp_points
from .memory import release_freed
from .models.desnet import RECEPTIVE_FIELD, STRIDE, sample
from .patches import HALF_SIDE, extract_patches
from .pyramid import Pyramid, build_pyramid
from .regions import TILE_PIXELS
from .structs import Keypoints

#: Scale of the pyramid level on which a dense network describes a keypoint, relative to the
#: keypoint's: below 1, because the receptive field is far larger than a patch (chosen on warped
#: held-out photographs).
DENSE_SCALE = 0.71

#: Distance in pixels from which a descriptor depends on others: of its cell and of the next one,
#: from which it is interpolated.
HALO = RECEPTIVE_FIELD // 2 + 2 * STRIDE
#: Patches that each thread describes at a time: their maps stay in the CPU's cache.
DESCRIBE_CHUNK = 96
#: Patches described at a time on other devices, so that the memory is bounded.
DEVICE_CHUNK = 2048


class PatchDescriptor:
    """Describe keypoints with a patch network (N,C,P,P) -> (N,D).

    Patches are rotated by the angles of the keypoints; with ``upright`` they are not, as in REKD's
    published evaluation.

    Args:
        net: the network.
        half_side, reach: see ``extract_patches``.
        upright: do not rotate patches.
        shape_net: a network (N,1,P,P) -> affine shapes (N,2,2), in whose frames the patches are
            sampled again; None = the patches are squares.
    """

    def __init__(
        self,
        net: Callable[[Tensor], Tensor],
        half_side: float = HALF_SIDE,
        *,
        reach: Sequence[float] = (1.0,),
        upright: bool = False,
        shape_net: Callable[[Tensor], Tensor] | None = None,
    ):
        self.net, self.half_side, self.reach, self.upright = net, half_side, reach, upright
        self.shape_net = shape_net

    def __call__(self, pyramid: Pyramid, keypoints: Keypoints, index: int) -> Tensor:
        """Descriptors (N,D) of the keypoints of image ``index`` of the batch."""
        return self._describe(pyramid, keypoints, index, None)

    def describe_deformed(
        self, pyramid: Pyramid, keypoints: Keypoints, deformation: Deformation
    ) -> Tensor:
        """Descriptors (N,D) of the keypoints of one image as they are before this deformation; a
        network of the shapes replaces its tilt.
        """
        angle = torch.full_like(keypoints.angle, deformation.rotation)
        shape = None if deformation.tilt == 1 else deformation.shape()
        return self._describe(pyramid, replace(keypoints, angle=angle), 0, shape)

    def _describe(
        self, pyramid: Pyramid, keypoints: Keypoints, index: int, shape: Tensor | None
    ) -> Tensor:
        if self.upright:
            keypoints = replace(keypoints, angle=torch.zeros_like(keypoints.angle))

        def sample(shapes: Tensor | None, reach: Sequence[float]) -> Tensor:
            return extract_patches(
                *(pyramid, keypoints),
                index=index,
                half_side=self.half_side,
                reach=reach,
                shapes=shapes,
            )

        with torch.inference_mode():
            shapes = None
            if self.shape_net is not None:
                shapes = _in_parts(self.shape_net, sample(None, (1.0,)))
            elif shape is not None:
                shapes = shape.to(keypoints.xy).expand(len(keypoints), 2, 2)
            return _in_parts(self.net, sample(shapes, self.reach))


def _in_parts(net: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
    """The output of a network for patches (N,C,P,P), some at a time."""
    return torch.cat([net(part) for part in patches.split(chunk_size(patches.device))])


def chunk_size(device: torch.device) -> int:
    """Number of patches to describe at a time."""
    return DESCRIBE_CHUNK * torch.get_num_threads() if device.type == "cpu" else DEVICE_CHUNK


class DenseDescriptor:
    """Describe keypoints with a dense network image -> map (``desnet.DesNet``), sampled at the
    level nearest to ``DENSE_SCALE`` times their scale.

    Angles of keypoints are not used.

    Args:
        net: (1,1,H,W) -> (1,D,ceil(H/8),ceil(W/8)).
        dim: D.
        tile_pixels: pixels of a level that are processed at a time.
    """

    def __init__(
        self, net: Callable[[Tensor], Tensor], dim: int, *, tile_pixels: int = TILE_PIXELS
    ):
        self.net, self.dim, self.tile_pixels = net, dim, tile_pixels

    def __call__(self, pyramid: Pyramid, keypoints: Keypoints, index: int) -> Tensor:
        """Descriptors (N,D) of the keypoints of image ``index`` of the batch."""
        scales = torch.tensor(
            [level.scale for level in pyramid.levels], device=keypoints.scale.device
        )
        nearest = (
            ((DENSE_SCALE * keypoints.scale).clamp(min=1e-6).log()[:, None] - scales.log())
            .abs()
            .argmin(dim=1)
            .cpu()  # once, instead of waiting for the rows of each level
        )
        out = torch.zeros(len(keypoints), self.dim, device=keypoints.xy.device)
        with torch.inference_mode():
            for i, level in enumerate(pyramid.levels):
                rows = (nearest == i).nonzero()[:, 0].to(keypoints.xy.device)
                xy = level.from_original(keypoints.xy[rows])
                for box, inside in level.boxes_of(xy, self.tile_pixels):
                    outer = box.grow(HALO, level.size).align(STRIDE, level.size)
                    descriptor_map = self.net(level.source.read(outer)[index : index + 1])
                    local = xy[inside] - xy.new_tensor([outer.left, outer.top])
                    out[rows[inside]] = sample(descriptor_map, local)
                    if box.size != level.size:
                        del descriptor_map
                        release_freed()
        return out

    def describe_deformed(
        self, pyramid: Pyramid, keypoints: Keypoints, deformation: Deformation
    ) -> Tensor:
        """Descriptors (N,D) of the keypoints of one image as they are before this deformation: the
        image is warped.
        """
        level = pyramid.levels[pyramid.original]
        h, w = level.size
        inverse = torch.linalg.inv(deformation.matrix())
        edges = [[x, y] for x in (-0.5, w - 0.5) for y in (-0.5, h - 0.5)]
        corners = torch.tensor(edges, dtype=torch.float64) @ inverse.T
        first = corners.min(dim=0).values
        width, height = (corners.max(dim=0).values - first).ceil().int().tolist()
        H = torch.eye(3, dtype=torch.float64)
        H[:2, :2], H[:2, 2] = inverse, -first - 0.5
        H = H.to(keypoints.xy.device)
        warped = build_pyramid(
            warp_image(level.image, H[None], (height, width), padding="border"),
            up=pyramid.original,
            down=len(pyramid.levels) - 1 - pyramid.original,
        )
        xy = warp_points(level.from_original(keypoints.xy).double(), H).float()
        return self(warped, replace(keypoints, xy=xy, scale=keypoints.scale / level.scale), 0)
