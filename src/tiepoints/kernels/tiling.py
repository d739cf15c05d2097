"""Computation of maps in strips of rows, to bound the memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..regions import Box


def apply_tiled(image: Tensor, halo: int, pixels: int, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn(image)``, (B,1,H,W) -> (B,M,H,W) channels-last, computed in strips of about ``pixels``.

    Each strip is computed with ``halo`` more rows on each side (the radius of the filters of
    ``fn``), which are dropped, because the padding at inner edges is incorrect.
    """
    whole = Box.whole((image.shape[-2], image.shape[-1]))
    strips = whole.split(pixels, min_rows=1)
    if len(strips) == 1:
        return fn(image)
    out: Tensor | None = None
    for strip in strips:
        outer = strip.grow(halo, whole.size)
        maps = fn(outer.crop(image, whole))
        if out is None:
            out = torch.empty(
                (*maps.shape[:2], *whole.size),
                dtype=maps.dtype,
                device=maps.device,
                memory_format=torch.channels_last,
            )
        strip.crop(out, whole).copy_(strip.crop(maps, outer))
    assert out is not None
    return out
