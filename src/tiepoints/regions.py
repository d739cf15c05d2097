"""Large images in parts: boxes of pixels, and images computed on demand, one box at a time.

A filter of radius r needs r more pixels on each side of a box: ``Box.grow``, which stops at the
edge of the image, so that the padding of a filter is right there; ``Box.crop`` then drops the
pixels that the padding made wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import binomial_blur

#: Pixels of a part of an image that a detector or descriptor processes at a time.
TILE_PIXELS = 2_500_000
#: Parts are strips of whole rows unless these would have fewer rows: narrow strips would mostly
#: consist of the pixels added for the filters.
MIN_ROWS = 512
#: Pixels that ``resize_box`` computes at a time: they stay in the CPU's cache.
STRIP_PIXELS = 50_000
#: Radius of ``filters.binomial_blur``.
BLUR_RADIUS = 2


@dataclass(frozen=True)
class Box:
    """Pixels of an image: rows ``top`` to ``bottom`` and columns ``left`` to ``right``, ends
    excluded.
    """

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Box:
        """All pixels of an image of ``size`` = (height, width)."""
        return cls(0, size[0], 0, size[1])

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left

    def grow(self, margin: int, size: tuple[int, int]) -> Box:
        """The box with ``margin`` more pixels on each side that lie in an image of ``size``."""
        return Box(
            max(0, self.top - margin),
            min(size[0], self.bottom + margin),
            max(0, self.left - margin),
            min(size[1], self.right + margin),
        )

    def align(self, step: int, size: tuple[int, int]) -> Box:
        """The box grown to multiples of ``step``, or to the edge of an image of ``size``."""
        return Box(
            self.top - self.top % step,
            min(size[0], self.bottom + -self.bottom % step),
            self.left - self.left % step,
            min(size[1], self.right + -self.right % step),
        )

    def shrink(self, margin: int) -> Box:
        """The box without ``margin`` pixels on each side, possibly empty."""
        top, left = self.top + margin, self.left + margin
        return Box(top, max(top, self.bottom - margin), left, max(left, self.right - margin))

    def intersection(self, other: Box) -> Box:
        """The pixels of both boxes, possibly none."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Box(top, max(top, bottom), left, max(left, right))

    def union(self, other: Box) -> Box:
        """The smallest box that contains both."""
        return Box(
            min(self.top, other.top),
            max(self.bottom, other.bottom),
            min(self.left, other.left),
            max(self.right, other.right),
        )

    def crop(self, maps: Tensor, outer: Box) -> Tensor:
        """The pixels of this box (...,h,w) of the maps of a box around it, as a view."""
        rows = slice(self.top - outer.top, self.bottom - outer.top)
        return maps[..., rows, self.left - outer.left : self.right - outer.left]

    def points(self, xy: Tensor, size: tuple[int, int]) -> Tensor:
        """Indices of the points (N,2) in the box, in an image of ``size``; a point outside the
        image belongs to its nearest pixel.
        """
        if self == Box.whole(size):
            return torch.arange(len(xy), device=xy.device)
        x, y = xy[:, 0].clamp(0, size[1] - 1), xy[:, 1].clamp(0, size[0] - 1)
        inside = (y >= self.top) & (y < self.bottom) & (x >= self.left) & (x < self.right)
        return inside.nonzero()[:, 0]

    def split(self, pixels: int, min_rows: int = MIN_ROWS) -> list[Box]:
        """Divide the box into boxes of about ``pixels``, row by row: strips of full width, or, if
        these would have fewer than ``min_rows`` rows, rectangles.
        """
        h, w = self.size
        columns = max(1, round(w * min(min_rows, h) / pixels))
        rows = max(1, round(h * w / (columns * pixels)))
        edges_y = [self.top + h * i // rows for i in range(rows + 1)]
        edges_x = [self.left + w * i // columns for i in range(columns + 1)]
        return [
            Box(top, bottom, left, right)
            for top, bottom in pairwise(edges_y)
            for left, right in pairwise(edges_x)
            if bottom > top and right > left
        ]


class Source(Protocol):
    """A batch of equal-sized images, read one box at a time.

    Attributes:
        size: (height, width).
    """

    size: tuple[int, int]

    def read(self, box: Box) -> Tensor:
        """The pixels of a box, (B,1,h,w)."""
        ...


class InMemory:
    """Images (B,1,h,w) in memory, or a box of larger ones.

    Args:
        pixels: the pixels of ``box``.
        box: their box; None = the whole image.
        size: (height, width) of the image; with ``box``.
    """

    def __init__(self, pixels: Tensor, box: Box | None = None, size: tuple[int, int] | None = None):
        self.pixels = pixels
        self.size = (pixels.shape[-2], pixels.shape[-1]) if size is None else size
        self.box = Box.whole(self.size) if box is None else box

    def read(self, box: Box) -> Tensor:
        """The pixels of a box, (B,1,h,w), as a view."""
        return box.crop(self.pixels, self.box)


class Filtered:
    """A filter of a source, computed on demand.

    Args:
        source: the images.
        function: (B,1,h,w) -> (B,1,h,w), correct at the edges of the image.
        radius: distance in pixels from which a value depends on others.
    """

    def __init__(self, source: Source, function: Callable[[Tensor], Tensor], radius: int):
        self.source, self.function, self.radius = source, function, radius
        self.size = source.size

    def read(self, box: Box) -> Tensor:
        """The pixels of a box, (B,1,h,w)."""
        outer = box.grow(self.radius, self.size)
        return box.crop(self.function(self.source.read(outer)), outer)


class Resized:
    """A source resized as by ``filters.resize``, computed on demand.

    Args:
        source: the images.
        size: (height, width) of the result.
        blur: whether to apply ``filters.binomial_blur`` first, as before a reduction.
        align_corners: as of ``torch.nn.functional.interpolate``.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        *,
        blur: bool = False,
        align_corners: bool = False,
    ):
        self.source: Source = Filtered(source, binomial_blur, BLUR_RADIUS) if blur else source
        self.size, self.align_corners = size, align_corners

    def read(self, box: Box) -> Tensor:
        """The pixels of a box, (B,1,h,w)."""
        inner = source_box(box, self.size, self.source.size, self.align_corners)
        pixels = self.source.read(inner)
        return resize_box(
            pixels, inner, self.source.size, box, self.size, align_corners=self.align_corners
        )


def in_memory(source: Source, pixels: int = TILE_PIXELS) -> InMemory:
    """The images of a source, computed in parts of about ``pixels``."""
    if isinstance(source, InMemory) and source.box == Box.whole(source.size):
        return source
    boxes = Box.whole(source.size).split(pixels)
    first = source.read(boxes[0])
    if len(boxes) == 1:
        return InMemory(first)
    out = first.new_empty(*first.shape[:2], *source.size)
    for box in boxes:
        box.crop(out, Box.whole(source.size)).copy_(first if box is boxes[0] else source.read(box))
    return InMemory(out)


def source_box(
    box: Box, size: tuple[int, int], source_size: tuple[int, int], align_corners: bool = False
) -> Box:
    """The pixels of an image of ``source_size`` from which a box of the image resized to ``size``
    is interpolated.
    """

    def bounds(first: int, last: int, axis: int) -> tuple[int, int]:
        position = _positions(
            torch.tensor([first, last]), size[axis], source_size[axis], align_corners
        )
        low, high = position.floor().long().tolist()
        return low, min(high + 2, source_size[axis])

    top, bottom = bounds(box.top, box.bottom - 1, 0)
    left, right = bounds(box.left, box.right - 1, 1)
    return Box(top, bottom, left, right)


def _positions(index: Tensor, length: int, source_length: int, align_corners: bool) -> Tensor:
    """Fractional source positions, float64, of the pixels of a resized row or column."""
    index = index.to(torch.float64)
    if align_corners:
        position = index * ((source_length - 1) / max(length - 1, 1))
    else:
        position = (index + 0.5) * (source_length / length) - 0.5
    return position.clamp(0, source_length - 1)


def resize_box(
    maps: Tensor,
    inner: Box,
    source_size: tuple[int, int],
    box: Box,
    size: tuple[int, int],
    *,
    align_corners: bool = False,
) -> Tensor:
    """A box of maps resized to ``size``, as resizing the whole maps would give, bilinearly.

    Args:
        maps: (B,C,h,w) pixels of ``inner``, which contains ``source_box(box, ...)``.
        inner: box of the maps of ``source_size``.
        source_size, size: (height, width) before and after resizing.
        box: of the resized maps.
        align_corners: as of ``torch.nn.functional.interpolate``.
    """
    if source_size == size:
        return box.crop(maps, inner)
    if inner == Box.whole(source_size) and box == Box.whole(size):
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)
    # with the channels innermost in memory, as the maps of the networks are
    source = maps.permute(0, 2, 3, 1)
    rows, columns = (
        torch.arange(first, end, device=maps.device)
        for first, end in ((box.top, box.bottom), (box.left, box.right))
    )
    upper, lower, down = _neighbors(
        _positions(rows, size[0], source_size[0], align_corners), inner.top, maps
    )
    first, second, right = _neighbors(
        _positions(columns, size[1], source_size[1], align_corners), inner.left, maps
    )
    lower, second = lower.clamp(max=maps.shape[-2] - 1), second.clamp(max=maps.shape[-1] - 1)
    out = source.new_empty(len(source), *box.size, source.shape[3])
    strip = max(1, STRIP_PIXELS // len(first))
    for part in torch.arange(len(upper), device=maps.device).split(strip):
        lines = torch.lerp(
            source.index_select(1, upper[part]),
            source.index_select(1, lower[part]),
            down[part].view(-1, 1, 1),
        )
        out[:, part[0] : part[-1] + 1] = torch.lerp(
            lines.index_select(2, first), lines.index_select(2, second), right.view(-1, 1)
        )
    return out.permute(0, 3, 1, 2)


def _neighbors(position: Tensor, offset: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels from which each position is interpolated, counted from ``offset``, and the
    weight of the second.
    """
    whole = position.floor()
    index = whole.long() - offset
    return index, index + 1, (position - whole).to(like.dtype)
