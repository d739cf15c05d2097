"""Synthetic corners, junctions and blobs with exact positions, to train the localization of
detectors.

Like MagicPoint's synthetic shapes (DeTone, Malisiewicz, Rabinovich, CVPRW 2018), but in pairs of
views: each shape is rendered in both views from its transformed outline, so that positions are
exact in both at any scale.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset

from ..filters import gaussian_blur
from ..geometry import warp_points
from ..render import render_outlines
from ..structure import GAUSSIAN_SIGMA, anchor_weight
from .pairs import PairFile
from .synthetic import Pair, PairDataset, PairSettings, as_tensors, degrade, draw_transform

#: Side of the grid cells, one shape each, in pixels of the first view.
CELL = 44
#: Kinds of shapes and their probabilities.
KINDS = {"polygon": 0.4, "checkerboard": 0.2, "junction": 0.2, "spot": 0.2}
#: Smallest and largest interior angle of a polygon, in degrees, for its vertex to be a target.
SHARP, FLAT = 25.0, 145.0
#: Range of the scale ratio of the views.
SHAPE_SCALE = (0.6, 1.6)
#: Minimum difference of gray levels between a shape and its background.
CONTRAST = 25


#: Outlines of a shape (N,2) with the index, 1 or 2, of their gray level, and its targets (M,2).
Shape: TypeAlias = tuple[list[tuple[np.ndarray, int]], np.ndarray]


@dataclass(frozen=True)
class ShapePair:
    """Two views of synthetic shapes.

    Attributes:
        image_a, image_b: (S,S) uint8 gray.
        H_ab: (3,3) float64, pixels of a to pixels of b.
        targets_a, targets_b: (N,2), (M,2) positions of corners, junctions and blobs inside each
            view.
    """

    image_a: np.ndarray
    image_b: np.ndarray
    H_ab: np.ndarray
    targets_a: np.ndarray
    targets_b: np.ndarray


def _polygon(rng: np.random.Generator, radius: float) -> Shape:
    """A polygon with three to six vertices; sharp and flat vertices are no targets."""
    count = int(rng.integers(3, 7))
    angles = (
        np.sort(rng.uniform(0, 2 * math.pi, count))
        if count > 4
        else rng.uniform(0, 2 * math.pi)
        + 2 * math.pi * (np.arange(count) + rng.uniform(-0.2, 0.2, count)) / count
    )
    outline = radius * rng.uniform(0.6, 1, (count, 1)) * np.c_[np.cos(angles), np.sin(angles)]
    before, after = np.roll(outline, 1, axis=0) - outline, np.roll(outline, -1, axis=0) - outline
    cosine = (before * after).sum(axis=1) / (
        np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1) + 1e-9
    )
    inner = np.degrees(np.arccos(cosine.clip(-1, 1)))
    # the ends of a short edge cannot be separated
    isolated = np.minimum(np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)) > 7
    return [(outline, 1)], outline[(inner > SHARP) & (inner < FLAT) & isolated]


def _checkerboard(rng: np.random.Generator, radius: float) -> Shape:
    """A rotated checkerboard of 2 x 2 or 3 x 3 fields; the targets are their corners."""
    n = int(rng.integers(2, 4))
    side = 2 * radius / math.sqrt(2) / n
    angle = rng.uniform(0, 2 * math.pi)
    rotate = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corner = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=float)
    fields = []
    for i in range(n):
        for j in range(n):
            fields.append(((corner + np.array([i, j]) - n / 2) * side @ rotate.T, 1 + (i + j) % 2))
    grid = np.array([[i, j] for i in range(n + 1) for j in range(n + 1)], dtype=float)
    return fields, (grid - n / 2) * side @ rotate.T


def _junction(rng: np.random.Generator, radius: float) -> Shape:
    """Two to four bars that meet in a point, the target."""
    count = int(rng.integers(2, 5))
    start = rng.uniform(0, 2 * math.pi)
    angles = start + 2 * math.pi * (np.arange(count) + rng.uniform(-0.15, 0.15, count)) / max(
        count, 3
    )
    half_width = rng.uniform(1.0, 2.0)
    bars = []
    for angle in angles:
        end = radius * np.array([math.cos(angle), math.sin(angle)])
        normal = half_width * np.array([-math.sin(angle), math.cos(angle)])
        bars.append((np.array([normal, end + normal, end - normal, -normal]), 1))
    return bars, np.zeros((1, 2))


def _spot(rng: np.random.Generator, radius: float) -> Shape:
    """An elliptic blob; the target is its center."""
    axes = rng.uniform(1.8, 4.0) * np.array([1, rng.uniform(0.75, 1)])
    t = np.linspace(0, 2 * math.pi, 32, endpoint=False)
    angle = rng.uniform(0, math.pi)
    rotate = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return [((np.c_[np.cos(t), np.sin(t)] * axes) @ rotate.T, 1)], np.zeros((1, 2))


_SHAPES = {"polygon": _polygon, "checkerboard": _checkerboard, "junction": _junction, "spot": _spot}


def draw_shapes(rng: np.random.Generator, settings: PairSettings) -> ShapePair:
    """Render a pair of views of random shapes.

    Transform and photometric changes are drawn as ``settings`` says.
    """
    size = settings.size
    center = (size - 1) / 2
    to_center = np.array([[1.0, 0, -center], [0, 1, -center], [0, 0, 1]])
    H_ab = np.linalg.inv(to_center) @ draw_transform(rng, settings) @ to_center
    H_ab /= H_ab[2, 2]
    background = int(rng.integers(20, 236))
    outlines: list[tuple[np.ndarray, int]] = []
    targets = []
    # also cells outside of the first view, which the second view may show
    cells = range(-1, size // CELL + 2)
    for i in cells:
        for j in cells:
            if rng.random() < 0.15:
                continue
            position = (np.array([i, j]) + rng.uniform(0.4, 0.6, 2)) * CELL
            grays: list[int] = []
            while len(grays) < 2:
                gray = int(rng.integers(0, 256))
                if min(abs(gray - other) for other in (background, *grays)) >= CONTRAST:
                    grays.append(gray)
            kind = rng.choice(list(KINDS), p=list(KINDS.values()))
            shape, shape_targets = _SHAPES[kind](rng, rng.uniform(0.25, 0.42) * CELL)
            outlines += [(outline + position, grays[index - 1]) for outline, index in shape]
            targets.append(shape_targets + position)
    all_targets = np.concatenate(targets)
    views = []
    for H in (np.eye(3), H_ab):
        sharp = torch.from_numpy(render_outlines(outlines, background, H, size))
        view = gaussian_blur(sharp[None, None], float(rng.uniform(0, 1.2)))[0, 0].numpy()
        if rng.random() < 0.5:  # horizontal illumination gradient
            view = view * (1 + rng.uniform(-0.3, 0.3) * np.linspace(-1, 1, size)[None, :])
        xy = warp_points(torch.from_numpy(all_targets), torch.from_numpy(H)).numpy()
        inside = ((xy >= 0) & (xy <= size - 1)).all(axis=1)
        views.append(
            (degrade(view.round().clip(0, 255).astype(np.uint8), rng, settings), xy[inside])
        )
    return ShapePair(views[0][0], views[1][0], H_ab, views[0][1], views[1][1])


def target_map(targets: np.ndarray, size: int, sigma: float = GAUSSIAN_SIGMA) -> torch.Tensor:
    """Render targets (N,2) as the maximum of Gaussians of height 1: (1,size,size) float32."""
    heatmap = np.zeros((size, size), dtype=np.float32)
    radius = math.ceil(3.5 * sigma)
    for x, y in targets:
        left, top = max(0, round(x) - radius), max(0, round(y) - radius)
        columns = np.arange(left, min(size, round(x) + radius + 1))
        rows = np.arange(top, min(size, round(y) + radius + 1))
        gaussian = np.exp(-0.5 * ((columns[None] - x) ** 2 + (rows[:, None] - y) ** 2) / sigma**2)
        window = heatmap[top : top + len(rows), left : left + len(columns)]
        np.maximum(window, gaussian, out=window)
    return torch.from_numpy(heatmap)[None]


class WithShapes(Dataset):
    """Pairs of photographs with structure weights, some replaced by pairs of synthetic shapes.

    Items: those of ``PairDataset``, ``anchor_a, anchor_b`` (``structure.anchor_weight``; 1 for
    shapes) and ``target_a, target_b`` (``target_map``; 0 for photographs), (1,S,S) float32 each.

    Args:
        photos: pairs of photographs.
        share: probability of synthetic shapes.
        pull: see ``structure.anchor_weight``.
        seed: item ``i`` depends only on ``seed``, ``i`` and ``photos``.
    """

    def __init__(
        self, photos: PairDataset | PairFile, share: float, *, pull: float = 0.0, seed: int = 0
    ):
        self.photos, self.share, self.pull, self.seed = photos, share, pull, seed

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, index, 6])
        size = self.photos.settings.size
        if rng.random() >= self.share:
            item = self.photos[index]
            for side in "ab":
                item[f"anchor_{side}"] = anchor_weight(item[f"image_{side}"][None], self.pull)[0]
                item[f"target_{side}"] = torch.zeros(1, size, size)
            return item
        pair = draw_shapes(rng, dataclasses.replace(self.photos.settings, scale=SHAPE_SCALE))
        mask = np.ones((size, size), dtype=bool)
        item = as_tensors(Pair(pair.image_a, pair.image_b, pair.H_ab, mask, mask))
        for side, targets in (("a", pair.targets_a), ("b", pair.targets_b)):
            item[f"anchor_{side}"] = torch.ones(1, size, size)
            item[f"target_{side}"] = target_map(targets, size)
        return item
