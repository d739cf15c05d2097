"""Drawn corners, junctions and spots whose positions are known exactly: they teach a detector where
on a structure its keypoint lies.

As in MagicPoint's synthetic shapes (DeTone, Malisiewicz, Rabinovich, CVPRW 2018), but in pairs of
views: every shape is drawn in each view from its mapped outline, so that positions are exact in
both, whatever the scale.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from ..filters import gaussian_blur
from ..geometry import warp_points
from ..render import render_outlines
from ..structure import GAUSSIAN_SIGMA, anchor_weight
from .synthetic import Pair, PairDataset, PairSettings, as_tensors, degrade, draw_transform

#: Side of the cells that shapes are laid into, one each, in pixels of the first view.
CELL = 44
#: Kinds of shapes and how often each is drawn.
KINDS = {"polygon": 0.4, "checkerboard": 0.2, "junction": 0.2, "spot": 0.2}
#: Interior angles of polygons in degrees beyond which a vertex is no corner.
SHARP, FLAT = 25.0, 145.0
#: Range of the change of scale between the views.
SHAPE_SCALE = (0.6, 1.6)
#: Least difference of gray levels between a shape and what lies behind it.
CONTRAST = 25


@dataclass(frozen=True)
class ShapePair:
    """Two views of drawn shapes.

    Attributes:
        image_a, image_b: (S,S) uint8 gray.
        H_ab: (3,3) float64.
        targets_a, targets_b: (N,2), (M,2) positions of corners, junctions and spots inside each
            view.
    """

    image_a: np.ndarray
    image_b: np.ndarray
    H_ab: np.ndarray
    targets_a: np.ndarray
    targets_b: np.ndarray


def _polygon(
    rng: np.random.Generator, radius: float
) -> tuple[list[tuple[np.ndarray, int]], np.ndarray]:
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
    # edges too short to part their ends are no corners
    long = np.minimum(np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)) > 7
    return [(outline, 1)], outline[(inner > SHARP) & (inner < FLAT) & long]


def _checkerboard(
    rng: np.random.Generator, radius: float
) -> tuple[list[tuple[np.ndarray, int]], np.ndarray]:
    n = int(rng.integers(2, 4))
    side = 2 * radius / math.sqrt(2) / n
    angle = rng.uniform(0, 2 * math.pi)
    rotate = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corner = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=float)
    parts = []
    for i in range(n):
        for j in range(n):
            parts.append(((corner + np.array([i, j]) - n / 2) * side @ rotate.T, 1 + (i + j) % 2))
    grid = np.array([[i, j] for i in range(n + 1) for j in range(n + 1)], dtype=float)
    return parts, (grid - n / 2) * side @ rotate.T


def _junction(
    rng: np.random.Generator, radius: float
) -> tuple[list[tuple[np.ndarray, int]], np.ndarray]:
    count = int(rng.integers(2, 5))
    start = rng.uniform(0, 2 * math.pi)
    angles = start + 2 * math.pi * (np.arange(count) + rng.uniform(-0.15, 0.15, count)) / max(
        count, 3
    )
    half = rng.uniform(1.0, 2.0)
    parts = []
    for angle in angles:
        along, across = (
            np.array([math.cos(angle), math.sin(angle)]),
            np.array([-math.sin(angle), math.cos(angle)]),
        )
        parts.append(
            (
                np.array(
                    [
                        half * across,
                        radius * along + half * across,
                        radius * along - half * across,
                        -half * across,
                    ]
                ),
                1,
            )
        )
    return parts, np.zeros((1, 2))


def _spot(
    rng: np.random.Generator, radius: float
) -> tuple[list[tuple[np.ndarray, int]], np.ndarray]:
    axes = rng.uniform(1.8, 4.0) * np.array([1, rng.uniform(0.75, 1)])
    t = np.linspace(0, 2 * math.pi, 32, endpoint=False)
    angle = rng.uniform(0, math.pi)
    rotate = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return [((np.c_[np.cos(t), np.sin(t)] * axes) @ rotate.T, 1)], np.zeros((1, 2))


_DRAW = {"polygon": _polygon, "checkerboard": _checkerboard, "junction": _junction, "spot": _spot}


def draw_shapes(rng: np.random.Generator, settings: PairSettings) -> ShapePair:
    """A pair of views of random shapes under the transform, and with the photometric changes, of
    ``settings``.
    """
    size = settings.size
    centre = (size - 1) / 2
    to_centre = np.array([[1.0, 0, -centre], [0, 1, -centre], [0, 0, 1]])
    H_ab = np.linalg.inv(to_centre) @ draw_transform(rng, settings) @ to_centre
    H_ab /= H_ab[2, 2]
    background = int(rng.integers(20, 236))
    outlines: list[tuple[np.ndarray, int]] = []
    targets = []
    # cells beyond the first view: the second one may show more
    cells = range(-1, size // CELL + 2)
    for i in cells:
        for j in cells:
            if rng.random() < 0.15:
                continue
            at = (np.array([i, j]) + rng.uniform(0.4, 0.6, 2)) * CELL
            grays: list[int] = []
            while len(grays) < 2:
                gray = int(rng.integers(0, 256))
                if min(abs(gray - other) for other in (background, *grays)) >= CONTRAST:
                    grays.append(gray)
            kind = rng.choice(list(KINDS), p=list(KINDS.values()))
            parts, marks = _DRAW[kind](rng, rng.uniform(0.25, 0.42) * CELL)
            outlines += [(outline + at, grays[which - 1]) for outline, which in parts]
            targets.append(marks + at)
    everything = np.concatenate(targets)
    views = []
    for H in (np.eye(3), H_ab):
        sharp = torch.from_numpy(render_outlines(outlines, background, H, size))
        view = gaussian_blur(sharp[None, None], float(rng.uniform(0, 1.2)))[0, 0].numpy()
        if rng.random() < 0.5:  # light that changes across the image
            view = view * (1 + rng.uniform(-0.3, 0.3) * np.linspace(-1, 1, size)[None, :])
        xy = warp_points(torch.from_numpy(everything), torch.from_numpy(H)).numpy()
        inside = ((xy >= 0) & (xy <= size - 1)).all(axis=1)
        views.append(
            (degrade(view.round().clip(0, 255).astype(np.uint8), rng, settings), xy[inside])
        )
    return ShapePair(views[0][0], views[1][0], H_ab, views[0][1], views[1][1])


def target_map(targets: np.ndarray, size: int, sigma: float = GAUSSIAN_SIGMA) -> torch.Tensor:
    """A Gaussian of height 1 at each target, the larger one where two meet: (1,size,size)
    float32.
    """
    heat = np.zeros((size, size), dtype=np.float32)
    reach = math.ceil(3.5 * sigma)
    for x, y in targets:
        left, top = max(0, round(x) - reach), max(0, round(y) - reach)
        columns, rows = (
            np.arange(left, min(size, round(x) + reach + 1)),
            np.arange(top, min(size, round(y) + reach + 1)),
        )
        spot = np.exp(-0.5 * ((columns[None] - x) ** 2 + (rows[:, None] - y) ** 2) / sigma**2)
        part = heat[top : top + len(rows), left : left + len(columns)]
        np.maximum(part, spot, out=part)
    return torch.from_numpy(heat)[None]


class WithShapes(Dataset):
    """Pairs of photographs with ``anchor_a, anchor_b`` (``losses.anchor_weight``), some replaced by
    pairs of drawn shapes.

    Items: those of ``PairDataset``, the anchors and ``target_a, target_b`` (``target_map``; 0 for
    photographs), (1,S,S) float32 each.

    Args:
        photos: pairs of photographs.
        share: probability of drawn shapes instead.
        pull: see ``losses.anchor_weight``.
        seed: item ``i`` depends on ``seed``, ``i`` and ``photos`` alone.
    """

    def __init__(self, photos: PairDataset, share: float, *, pull: float = 0.0, seed: int = 0):
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
        everywhere = np.ones((size, size), dtype=bool)
        item = as_tensors(Pair(pair.image_a, pair.image_b, pair.H_ab, everywhere, everywhere))
        for side, targets in (("a", pair.targets_a), ("b", pair.targets_b)):
            item[f"anchor_{side}"] = torch.ones(1, size, size)
            item[f"target_{side}"] = target_map(targets, size)
        return item
