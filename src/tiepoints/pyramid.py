"""One image to its scale levels, built once and shared by detector and descriptor.

Level factors are powers of sqrt(2): ``up`` enlarged copies, the image, ``down`` reduced ones, each
made from the level before (spec 2.3). ``Level`` carries the true size ratios, so that points map
back exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .filters import binomial_blur, resize
from .geometry import resize_points

SCALE_STEP = math.sqrt(2.0)
#: Levels of the published extraction with the PyTorch weights.
DOWN_LEVELS = 4
UP_LEVELS = 1
#: No level below this shorter side: the border of 15 pixels would leave nothing of it.
MIN_SIDE = 48


@dataclass(frozen=True)
class Level:
    """One level: its image (B,1,h,w), nominal scale (1 = original, 2 = half size), true size ratios
    to the original.
    """

    image: Tensor
    nominal_scale: float
    ratio_x: float
    ratio_y: float

    @property
    def scale(self) -> float:
        """Original pixels per pixel of this level: geometric mean of both directions."""
        return math.sqrt(self.ratio_x * self.ratio_y)

    def to_original(self, xy: Tensor) -> Tensor:
        """Points (N,2) of this level in pixels of the original image."""
        return resize_points(xy, self.ratio_x, self.ratio_y)

    def from_original(self, xy: Tensor) -> Tensor:
        """Points (N,2) of the original image in pixels of this level."""
        return resize_points(xy, 1 / self.ratio_x, 1 / self.ratio_y)


@dataclass(frozen=True)
class Pyramid:
    """Levels of a batch of equal-sized images, finest first; ``original`` is the index of the
    unresized one.
    """

    levels: list[Level]
    original: int

    @property
    def image(self) -> Tensor:
        """The images themselves, (B,1,H,W)."""
        return self.levels[self.original].image


def build_pyramid(
    image: Tensor, *, up: int = UP_LEVELS, down: int = DOWN_LEVELS, min_side: int = MIN_SIDE
) -> Pyramid:
    """Scale levels of ``image`` (B,1,H,W); coarser levels stop where the shorter side falls below
    ``min_side``.
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
    """Points asked of each level, finest first: halved from level to level (spec 2.2), cut to whole
    numbers.
    """
    shares = [2.0 ** (up - i) for i in range(levels)]
    return [int(count * share / sum(shares)) for share in shares]


def as_batch(images: list[Tensor]) -> Tensor:
    """Equal-sized images (1,1,H,W) as one batch (B,1,H,W).

    Raises:
        ValueError: sizes differ.
    """
    sizes = {tuple(image.shape[-2:]) for image in images}
    if len(sizes) != 1:
        raise ValueError(
            f"a batch needs images of one size, got {sorted(sizes)}; extract them one by one "
            "instead"
        )
    return torch.cat(images)
