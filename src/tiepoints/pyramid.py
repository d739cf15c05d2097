"""Image pyramid, shared by detector and descriptor.

Scale factors are powers of sqrt(2): ``up`` enlarged copies, the image, ``down`` reduced ones, each
computed from the previous level. ``Level`` has the exact size ratios, so that points are
mapped exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .filters import binomial_blur, resize
from .geometry import resize_points

SCALE_STEP = math.sqrt(2.0)
#: Levels of the published extraction with the PyTorch weights.
DOWN_LEVELS = 4
UP_LEVELS = 1
#: Smallest shorter side of a level: a border of 15 pixels would cover most of a smaller one.
MIN_SIDE = 48


@dataclass(frozen=True)
class Level:
    """One level of a pyramid.

    Attributes:
        image: (B,1,h,w).
        nominal_scale: 1 = original size, 2 = half size.
        ratio_x, ratio_y: width and height of the original divided by those of the level.
    """

    image: Tensor
    nominal_scale: float
    ratio_x: float
    ratio_y: float

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


@dataclass(frozen=True)
class Pyramid:
    """Levels of a batch of equal-sized images, finest first; ``original`` is the index of the level
    at the original size.
    """

    levels: list[Level]
    original: int

    @property
    def image(self) -> Tensor:
        """The original images (B,1,H,W)."""
        return self.levels[self.original].image


def build_pyramid(
    image: Tensor, *, up: int = UP_LEVELS, down: int = DOWN_LEVELS, min_side: int = MIN_SIDE
) -> Pyramid:
    """Build the pyramid of ``image`` (B,1,H,W), without coarse levels whose shorter side would be
    below ``min_side``.
    """
    h, w = image.shape[-2:]

    def level(pixels: Tensor, nominal: float) -> Level:
        return Level(pixels, nominal, w / pixels.shape[-1], h / pixels.shape[-2])

    finer: list[Level] = []
    current = image
    for i in range(1, up + 1):
        current = resize(current, (int(h * SCALE_STEP**i), int(w * SCALE_STEP**i)))
        finer.append(level(current, SCALE_STEP**-i))
    levels = [*reversed(finer), level(image, 1.0)]
    current = image
    for i in range(1, down + 1):
        size = int(current.shape[-2] // SCALE_STEP), int(current.shape[-1] // SCALE_STEP)
        if min(size) < max(min_side, 1):
            break
        current = resize(binomial_blur(current), size)
        levels.append(level(current, SCALE_STEP**i))
    return Pyramid(levels, up)


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

    def add(self, budget: int) -> int:
        """Add the budget of the next level; returns how many keypoints it may have."""
        self.total += budget
        return max(0, self.total - self.selected)

    def use(self, count: int) -> None:
        """Count the keypoints selected on the level."""
        self.selected += count
