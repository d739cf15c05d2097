"""Computation of maps in tiles of rows, to bound the memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def tiles(height: int, width: int, pixels: int) -> list[tuple[int, int]]:
    """Divide the rows of an image into tiles of about ``pixels``: (top, bottom) of each."""
    count = max(1, round(height * width / pixels))
    edges = [height * i // count for i in range(count + 1)]
    return [(top, bottom) for top, bottom in pairwise(edges) if bottom > top]


def apply_tiled(image: Tensor, halo: int, pixels: int, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn(image)``, (B,1,H,W) -> (B,M,H,W) channels-last, computed in tiles of about ``pixels``.

    Each tile is computed with ``halo`` more rows on each side (the radius of the filters of
    ``fn``), which are dropped, because the padding at inner edges is incorrect.
    """
    h, w = image.shape[-2:]
    rows = tiles(h, w, pixels)
    if len(rows) == 1:
        return fn(image)
    out: Tensor | None = None
    for top, bottom in rows:
        low, high = max(0, top - halo), min(h, bottom + halo)
        maps = fn(image[:, :, low:high])
        if out is None:
            shape = (len(image), maps.shape[1], h, w)
            out = torch.empty(
                shape, dtype=maps.dtype, device=maps.device, memory_format=torch.channels_last
            )
        out[:, :, top:bottom] = maps[:, :, top - low : bottom - low]
    assert out is not None
    return out
