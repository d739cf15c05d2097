"""Key points to square patches of pixels, each cut from the pyramid level that fits its size."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import sample_at
from .pyramid import Pyramid
from .structs import Keypoints

#: Half side of a patch in pixels of the level of its point, and samples along a side (spec 2.6, official PyTorch).
HALF_SIDE = 22.0
PATCH_SIZE = 32
#: Patches sampled at a time, which bounds the memory.
CHUNK = 2048


def extract_patches(
    pyramid: Pyramid,
    keypoints: Keypoints,
    *,
    index: int = 0,
    size: int = PATCH_SIZE,
    half_side: float = HALF_SIDE,
) -> Tensor:
    """Patches (N,1,size,size) around the points of image ``index`` of the batch.

    A patch covers ``2 * half_side * scale`` pixels of the original image, turned by ``angle``; sample j of a row lies at
    ``half_side * ((2 j + 1) / size - 1)`` in the point's frame, so samples are centres of equal cells and the patch is
    centred on the point. Bilinear; outside the image the border pixel is repeated. It is cut from the coarsest level in
    which samples lie at least a pixel apart, so that coarse patches are low-passed.
    """
    n = len(keypoints)
    out = keypoints.xy.new_zeros(n, 1, size, size)
    if not n:
        return out
    step = keypoints.scale * (2 * half_side / size)  # original pixels per sample, (N,)
    scales = torch.tensor([level.scale for level in pyramid.levels], device=step.device)
    wanted = (step[:, None] >= scales[None, :]).sum(dim=1).sub(1).clamp(min=0)  # levels are sorted by scale
    offset = half_side * ((2 * torch.arange(size, device=step.device, dtype=torch.float32) + 1) / size - 1)
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
