"""Square patches around keypoints, sampled from the pyramid level that fits their size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
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
) -> Tensor: ...


@overload
def extract_patches(
    pyramid: Pyramid,
    keypoints: Sequence[Keypoints],
    *,
    size: int = PATCH_SIZE,
    half_side: float = HALF_SIDE,
) -> list[Tensor]: ...


def extract_patches(
    pyramid, keypoints, *, index: int = 0, size: int = PATCH_SIZE, half_side: float = HALF_SIDE
):
    """Extract patches (N,1,size,size) around the keypoints of image ``index`` of the batch, or a
    list of them for the keypoints of each image.

    A patch covers ``2 * half_side * scale`` pixels of the original image, rotated by ``angle``;
    sample j of a row is at ``half_side * ((2 j + 1) / size - 1)`` in the keypoint's frame, so the
    samples are the centers of equal cells and the patch is centered on the keypoint. Bilinear;
    outside the image the border pixel is repeated. Patches are sampled from the coarsest level in
    which samples are at least a pixel apart, to avoid aliasing. Differentiable with respect to the
    image and, except for the choice of the level, to positions, scales and angles. Memory: the
    result and the samples of ``CHUNK`` patches.

    Raises:
        ValueError: the number of sets of keypoints is not that of the images of the batch.
    """
    if not isinstance(keypoints, Keypoints):
        if len(keypoints) != pyramid.batch:
            raise ValueError(
                f"{len(keypoints)} sets of keypoints for a batch of {pyramid.batch} images"
            )
        return [
            extract_patches(pyramid, one, index=i, size=size, half_side=half_side)
            for i, one in enumerate(keypoints)
        ]
    n = len(keypoints)
    out = keypoints.xy.new_zeros(n, 1, size, size)
    if not n:
        return out
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
            scale = keypoints.scale[part, None, None]
            cos, sin = (f(keypoints.angle[part])[:, None, None] for f in (torch.cos, torch.sin))
            x = keypoints.xy[part, 0, None, None] + scale * (u * cos - v * sin)
            y = keypoints.xy[part, 1, None, None] + scale * (u * sin + v * cos)
            values = level.sample(torch.stack([x, y], dim=-1).reshape(-1, 2), index)  # (n*P*P,)
            out[part] = values.reshape(len(part), 1, size, size)
    return out
