"""Key points to square patches of pixels, each cut from the pyramid level that fits its size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from .geometry import sample_at
from .pyramid import Pyramid
from .structs import Keypoints

#: Half side of a patch in pixels of the level of its point, and samples along a side (spec 2.6,
#: official PyTorch).
HALF_SIDE = 22.0
PATCH_SIZE = 32
#: Patches sampled at a time, which bounds the memory.
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
    """Patches (N,1,size,size) around the points of image ``index`` of the batch, or a list of them
    for the points of each image.

    A patch covers ``2 * half_side * scale`` pixels of the original image, turned by ``angle``;
    sample j of a row lies at ``half_side * ((2 j + 1) / size - 1)`` in the point's frame, so
    samples are centres of equal cells and the patch is centred on the point. Bilinear; outside the
    image the border pixel is repeated. It is cut from the coarsest level in which samples lie at
    least a pixel apart, so that coarse patches are low-passed. Gradients flow to the image and, but
    for the choice of the level, to positions, scales and angles. Memory: the result and the samples
    of ``CHUNK`` patches.

    Raises:
        ValueError: not one set of points for each image of the batch.
    """
    if not isinstance(keypoints, Keypoints):
        if len(keypoints) != len(pyramid.image):
            raise ValueError(
                f"{len(keypoints)} sets of points for a batch of {len(pyramid.image)} images"
            )
        return [
            extract_patches(pyramid, points, index=number, size=size, half_side=half_side)
            for number, points in enumerate(keypoints)
        ]
    n = len(keypoints)
    out = pyramid.image.new_zeros(n, 1, size, size)
    if not n:
        return out
    step = keypoints.scale * (2 * half_side / size)  # original pixels per sample, (N,)
    scales = torch.tensor([level.scale for level in pyramid.levels], device=step.device)
    wanted = (
        (step[:, None] >= scales[None, :]).sum(dim=1).sub(1).clamp(min=0)
    )  # levels are sorted by scale
    offset = half_side * (
        (2 * torch.arange(size, device=step.device, dtype=torch.float32) + 1) / size - 1
    )
    v, u = torch.meshgrid(offset, offset, indexing="ij")  # (P,P) down, right
    for number, level in enumerate(pyramid.levels):
        chosen = (wanted == number).nonzero()[:, 0]
        image = level.image[index : index + 1]
        for part in chosen.split(CHUNK):
            scale = keypoints.scale[part, None, None]
            cos, sin = (f(keypoints.angle[part])[:, None, None] for f in (torch.cos, torch.sin))
            x = keypoints.xy[part, 0, None, None] + scale * (u * cos - v * sin)
            y = keypoints.xy[part, 1, None, None] + scale * (u * sin + v * cos)
            xy = level.from_original(torch.stack([x, y], dim=-1).reshape(-1, 2))  # (n*P*P,2)
            values = sample_at(image, xy[None], padding="border")  # (1,1,n*P*P)
            out[part] = values.reshape(len(part), 1, size, size)
    return out
