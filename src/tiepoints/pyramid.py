"""Image pyramid, shared by detector and descriptor.

Scale factors are powers of sqrt(2): ``up`` enlarged copies, the image, ``down`` reduced ones, each
computed from the previous level. ``Level`` has the exact size ratios, so that points are
mapped exactly. Enlarged levels of large images are computed on demand, one part at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .filters import fitting_size, reduce
from .geometry import resize_points, sample_at
from .regions import TILE_PIXELS, Box, InMemory, Resized, Source, in_memory

SCALE_STEP = math.sqrt(2.0)
#: Levels of the published extraction with the PyTorch weights.
DOWN_LEVELS = 4
UP_LEVELS = 1
#: Smallest shorter side of a level: a border of 15 pixels would cover most of a smaller one.
MIN_SIDE = 48
#: Side that a level must exceed from which only the surroundings of keypoints are sampled.
CONTEXT_SIDE = 16


@dataclass(frozen=True)
class Level:
    """One level of a pyramid.

    Attributes:
        source: images of the level, in memory, or computed on demand if they are large.
        nominal_scale: 1 = original size, 2 = half size.
        ratio_x, ratio_y: width and height of the original divided by those of the level.
    """

    source: Source
    nominal_scale: float
    ratio_x: float
    ratio_y: float

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.source.size

    @property
    def image(self) -> Tensor:
        """All pixels, (B,1,h,w)."""
        return self.source.read(Box.whole(self.size))

    @property
    def scale(self) -> float:
        """Original pixels per pixel of this level, geometric mean of both directions."""
        return math.sqrt(self.ratio_x * self.ratio_y)

    def to_original(self, xy: Tensor) -> Tensor:
        """Convert points (N,2) from pixels of this level to pixels of the original image."""
        return resize_points(xy, self.ratio_x, self.ratio_y)

    def from_original(self, xy: Tensor) -> Tensor:
        """Convert points (N,2) from pixels of the original image to pixels of this level."""
        return resize_points(xy, 1 / self.ratio_x, 1 / self.ratio_y)

    def sample(self, xy: Tensor, index: int = 0) -> Tensor:
        """Gray values (N,) at points (N,2) in pixels of the original image, bilinear, of image
        ``index`` of the batch; the border is repeated.
        """
        xy = self.from_original(xy)
        if isinstance(self.source, InMemory):
            image = self.source.pixels[index : index + 1]
            return sample_at(image, xy[None], padding="border")[0, 0]
        out = xy.new_empty(len(xy))
        for box, rows in self.boxes_of(xy):
            outer = box.grow(1, self.size)  # the second pixel of an interpolation
            image = self.source.read(outer)[index : index + 1]
            local = xy[rows] - xy.new_tensor([outer.left, outer.top])
            out[rows] = sample_at(image, local[None], padding="border")[0, 0]
        return out

    def boxes_of(self, xy: Tensor, pixels: int = TILE_PIXELS) -> Iterator[tuple[Box, Tensor]]:
        """The boxes of ``regions.Box.split`` in which there are points (N,2), in pixels of this
        level, each with the indices of its points; a point outside the image is in the nearest box.
        """
        for box in Box.whole(self.size).split(pixels):
            rows = box.points(xy, self.size)
            if len(rows):
                yield box, rows


@dataclass(frozen=True)
class Pyramid:
    """Levels of a batch of equal-sized images, finest first; ``original`` is the index of the level
    that is neither enlarged nor reduced further.
    """

    levels: list[Level]
    original: int

    @property
    def image(self) -> Tensor:
        """The images of the level ``original``, (B,1,H,W)."""
        return self.levels[self.original].image

    def in_memory(self) -> Pyramid:
        """The pyramid without enlarged levels that are computed on demand, for points that are
        sampled many times.
        """
        levels = self.levels
        kept = [level for level in levels if isinstance(level.source, InMemory)]
        return Pyramid(kept, self.original - (len(levels) - len(kept)))

    def with_coarser(self, scale: float) -> Pyramid:
        """The pyramid with further reduced levels up to ``scale``, as far as their sides exceed
        ``CONTEXT_SIDE``.
        """
        levels = list(self.levels)
        while levels[-1].scale * SCALE_STEP <= scale:
            last = levels[-1]
            size = _reduced(last.size)
            if min(size) <= CONTEXT_SIDE:
                break
            h, w = last.size
            source = in_memory(Resized(last.source, size, blur=True))
            x, y = last.ratio_x * w / size[1], last.ratio_y * h / size[0]
            levels.append(Level(source, last.nominal_scale * SCALE_STEP, x, y))
        return Pyramid(levels, self.original)

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.image)


def build_pyramid(
    image: Tensor,
    *,
    up: int = UP_LEVELS,
    down: int = DOWN_LEVELS,
    min_side: int = MIN_SIDE,
    max_size: int | None = None,
) -> Pyramid:
    """Build the pyramid of ``image`` (B,1,H,W), without coarse levels whose shorter side would be
    below ``min_side``.

    Reduced levels are in memory, as much together as the image; enlarged ones too, unless they have
    more than ``regions.TILE_PIXELS``.

    Args:
        max_size: images with a longer side are first reduced to it (``filters.reduce``); positions
            and scales are still those of ``image``.
    """
    h, w = image.shape[-2:]
    largest = fitting_size((h, w), max_size)
    if largest != (h, w):
        image = reduce(image, largest)
    reduction = math.sqrt(h * w / (largest[0] * largest[1]))

    def level(source: Source, nominal: float) -> Level:
        return Level(source, reduction * nominal, w / source.size[1], h / source.size[0])

    whole = InMemory(image)
    finer: list[Level] = []
    source: Source = whole
    for i in range(1, up + 1):
        size = int(largest[0] * SCALE_STEP**i), int(largest[1] * SCALE_STEP**i)
        source = Resized(source, size)
        if size[0] * size[1] <= TILE_PIXELS:
            source = in_memory(source)
        finer.append(level(source, SCALE_STEP**-i))
    levels = [*reversed(finer), level(whole, 1.0)]
    current = whole
    for i in range(1, down + 1):
        size = _reduced(current.size)
        if min(size) < max(min_side, 1):
            break
        current = in_memory(Resized(current, size, blur=True))
        levels.append(level(current, SCALE_STEP**i))
    return Pyramid(levels, up)


def _reduced(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the next coarser level."""
    return int(size[0] // SCALE_STEP), int(size[1] // SCALE_STEP)


def level_budgets(count: int, up: int, levels: int) -> list[int]:
    """Number of keypoints of each level, finest first: halved from level to level,
    rounded down.
    """
    shares = [2.0 ** (up - i) for i in range(levels)]
    return [int(count * share / sum(shares)) for share in shares]


class LevelBudget:
    """Counts the keypoints selected level by level: what a level leaves of its budget is passed on
    to the next ones.
    """

    def __init__(self) -> None:
        self.total = self.selected = 0

    def allowed(self, budget: int) -> int:
        """How many keypoints the next level may have with its budget."""
        return max(0, self.total + budget - self.selected)

    def add(self, budget: int) -> int:
        """Add the budget of the next level; returns how many keypoints it may have."""
        allowed = self.allowed(budget)
        self.total += budget
        return allowed

    def use(self, count: int) -> None:
        """Count the keypoints selected on the level."""
        self.selected += count
