"""Square patches around keypoints, sampled from the pyramid level that fits their size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .pyramid import Pyramid
from .structs import Keypoints

#: Half side of a patch in pixels of the keypoint's level, and samples along a side (as in
#: the official PyTorch code).
HALF_SIDE = 22.0
PATCH_SIZE = 32
#: Patches sampled at a time, to bound the memory.
CHUNK = 2048


@overload
def extract_patches(
    pyramid: Pyramid,
    keypoints: Keypoints,
    *,
    index: int = 0,
    size: int = PATCH_SIZE,
    half_side: float = HALF_SIDE,
    reach: Sequence[float] = (1.0,),
    halved: bool = True,
    shapes: Tensor | None = None,
) -> Tensor: ...


@overload
def extract_patches(
    pyramid: Pyramid,
    keypoints: Sequence[Keypoints],
    *,
    size: int = PATCH_SIZE,
    half_side: float = HALF_SIDE,
    reach: Sequence[float] = (1.0,),
    halved: bool = True,
) -> list[Tensor]: ...


def extract_patches(
    pyramid,
    keypoints,
    *,
    index: int = 0,
    size: int = PATCH_SIZE,
    half_side: float = HALF_SIDE,
    reach: Sequence[float] = (1.0,),
    halved: bool = True,
    shapes: Tensor | None = None,
):
    """Extract patches (N,C,size,size) around the keypoints of image ``index`` of the batch, or a
    list of them for the keypoints of each image.

    A patch covers ``2 * half_side * scale`` pixels of the original image, rotated by ``angle``;
    sample j of a row is at ``half_side * ((2 j + 1) / size - 1)`` in the keypoint's frame, so the
    samples are the centers of equal cells and the patch is centered on the keypoint. Bilinear;
    outside the image the border pixel is repeated. Patches are sampled from the coarsest level in
    which samples are at least a pixel apart, to avoid aliasing. Differentiable with respect to the
    image and, except for the choice of the level, to positions, scales, angles and shapes. Memory:
    the result and the samples of ``CHUNK`` patches.

    Args:
        pyramid: of the images.
        keypoints: of one image, or of each.
        index: the image of ``keypoints`` of one image.
        size: samples along a side.
        half_side: half the side of a patch in units of the keypoint's scale.
        reach: factors of ``half_side``, one for each of the C patches of a keypoint; factors other
            than 1 are for its surroundings.
        halved: sample surroundings at half the resolution, each value twice along both sides.
        shapes: (N,2,2) with determinant 1, for keypoints of one image: the sample at u of the patch
            is at ``shape @ u`` in the keypoint's frame (``models.affnet``); None = squares.

    Raises:
        ValueError: the number of sets of keypoints is not that of the images of the batch.
    """
    if not isinstance(keypoints, Keypoints):
        if len(keypoints) != pyramid.batch:
            raise ValueError(
                f"{len(keypoints)} sets of keypoints for a batch of {pyramid.batch} images"
            )
        return [
            extract_patches(
                *(pyramid, one),
                index=i,
                size=size,
                half_side=half_side,
                reach=reach,
                halved=halved,
            )
            for i, one in enumerate(keypoints)
        ]
    out = keypoints.xy.new_zeros(len(keypoints), len(reach), size, size)
    for channel, factor in enumerate(reach):
        side = factor * half_side
        if factor == 1 or not len(keypoints):
            _sample_patches(pyramid, keypoints, index, side, shapes, out[:, channel])
            continue
        samples = size // 2 if halved else size
        # the usual levels end where usual patches do
        levels = pyramid.with_coarser(float(keypoints.scale.max()) * 2 * side / samples)
        coarse = out.new_empty(len(keypoints), samples, samples)
        _sample_patches(levels, keypoints, index, side, shapes, coarse)
        out[:, channel] = doubled(coarse) if halved else coarse
    return out


def doubled(patches: Tensor) -> Tensor:
    """Patches (N,P,P) with each value twice along both sides, (N,2P,2P)."""
    return patches.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


def _sample_patches(
    pyramid: Pyramid,
    keypoints: Keypoints,
    index: int,
    half_side: float,
    shapes: Tensor | None,
    out: Tensor,
) -> None:
    """Sample one patch of each keypoint into ``out`` (N,size,size); see ``extract_patches``."""
    size = out.shape[-1]
    step = keypoints.scale * (2 * half_side / size)  # original pixels per sample, (N,)
    scales = torch.tensor([level.scale for level in pyramid.levels], device=step.device)
    # levels are sorted by scale
    level_of = (step[:, None] >= scales[None, :]).sum(dim=1).sub(1).clamp(min=0).cpu()
    offset = half_side * (
        (2 * torch.arange(size, device=step.device, dtype=torch.float32) + 1) / size - 1
    )
    v, u = torch.meshgrid(offset, offset, indexing="ij")  # (P,P) down, right
    for i, level in enumerate(pyramid.levels):
        for part in (level_of == i).nonzero()[:, 0].to(step.device).split(CHUNK):
            p, q = (u, v) if shapes is None else _deformed(u, v, shapes[part])
            scale = keypoints.scale[part, None, None]
            cos, sin = (f(keypoints.angle[part])[:, None, None] for f in (torch.cos, torch.sin))
            x = keypoints.xy[part, 0, None, None] + scale * (p * cos - q * sin)
            y = keypoints.xy[part, 1, None, None] + scale * (p * sin + q * cos)
            values = level.sample(torch.stack([x, y], dim=-1).reshape(-1, 2), index)  # (n*P*P,)
            out[part] = values.reshape(len(part), size, size)


def _deformed(u: Tensor, v: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (P,P) right and down, mapped by shapes (N,2,2): (N,P,P) each."""
    rows = shapes[..., None, None]
    return rows[:, 0, 0] * u + rows[:, 0, 1] * v, rows[:, 1, 0] * u + rows[:, 1, 1] * v


def crop_patches(patches: Tensor, size: int, shapes: Tensor | None = None) -> Tensor:
    """The central part of patches (N,1,S,S) at their sampling step: (N,1,size,size).

    With ``shapes`` (N,2,2), it is sampled in the frames of these, as by ``extract_patches``;
    differentiable with respect to them. Outside of the patches their border is repeated.
    """
    side = patches.shape[-1]
    if shapes is None:
        first = (side - size) // 2
        return patches[..., first : first + size, first : first + size]
    axis = (2 * torch.arange(size, device=patches.device, dtype=patches.dtype) + 1 - size) / side
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack(_deformed(u, v, shapes), dim=-1)
    return F.grid_sample(patches, grid, mode="bilinear", padding_mode="border", align_corners=False)
