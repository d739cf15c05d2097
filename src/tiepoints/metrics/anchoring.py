"""Do keypoints lie on structure? Three measures that see what homographies cannot
(docs/evaluation.md).

A point that keeps 12 px from an edge moves with the plane as well as a corner does, so every planar
measure accepts it. In a scene with depth it lies on something else than the structure it answers
to, and moves otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..filters import corner_strength, gaussian_blur, percentile_rank
from ..render import render_outlines

#: A detector as these measures take it: gray image (1,1,H,W) in [0,1] -> positions (N,2), strongest
#: first.
Detector = Callable[[Tensor], Tensor]


#: Keypoints of an image that anchoring looks at, and the window of its structure tensor in pixels.
ANCHORED_KEYPOINTS = 200
SIGMA = 2.0
#: Layers: radius of the disc over the shorter side, how far it moves, how near to its rim keypoints
#: of the background count, and how near a keypoint must be to be the same one. Pixels.
DISC = 0.22
SHIFT = (24.0, 7.0)
RIM = 30.0
SAME = 2.0
#: Corners: side of the image and of the cell of each target, and the distances that count as found.
CORNER_SIZE = 640
CELL = 80
FOUND, NEAR = 1.0, 3.0


@dataclass(frozen=True)
class Anchoring:
    """Where keypoints lie among the pixels of their images by ``filters.corner_strength``.

    Attributes:
        median: median percentile, 0..1; chance is 0.5.
        below_half: share of keypoints below their image's median pixel; chance is 0.5.
        count: keypoints.
    """

    median: float
    below_half: float
    count: int


def percentiles(image: Tensor, xy: Tensor) -> Tensor:
    """Percentile (N,) in [0,1] of the pixels nearest to ``xy`` (N,2) among those of a gray image
    (1,1,H,W) by corner strength.
    """
    rank = percentile_rank(corner_strength(image, SIGMA))[0, 0]
    h, w = rank.shape
    x, y = xy.round().long().unbind(dim=1)
    return rank[y.clamp(0, h - 1), x.clamp(0, w - 1)]


def anchoring(
    detect: Detector, images: Iterable[Tensor], *, num_keypoints: int = ANCHORED_KEYPOINTS
) -> Anchoring:
    """How far the strongest ``num_keypoints`` keypoints of gray images (1,1,H,W) lie on structure,
    all images together.
    """
    parts = [percentiles(image, detect(image)[:num_keypoints]) for image in images]
    values = torch.cat(parts) if parts else torch.zeros(0)
    if not len(values):
        return Anchoring(0.0, 1.0, 0)
    return Anchoring(float(values.median()), float((values < 0.5).float().mean()), len(values))


@dataclass(frozen=True)
class Layers:
    """Keypoints of the background near a moving foreground.

    Attributes:
        found: keypoints found again, at their place or moved with the foreground.
        wrong: those that moved with the foreground.
    """

    found: int
    wrong: int

    @property
    def share(self) -> float:
        """Share that moved with the wrong layer, 0..1; 0 where none was found again."""
        return self.wrong / self.found if self.found else 0.0


def layered_frames(background: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Two frames (1,1,H,W): a disc of ``foreground`` over ``background`` (of one size), moved by
    ``SHIFT`` in the second.

    Returns:
        both frames, the centre (2,) of the disc in the first, and its radius in pixels.

    Raises:
        ValueError: the sizes differ.
    """
    if background.shape != foreground.shape:
        raise ValueError(
            f"both photographs must be of one size, got {tuple(background.shape)} and "
            f"{tuple(foreground.shape)}"
        )
    h, w = background.shape[-2:]
    radius = DISC * min(h, w)
    centre = torch.tensor([w / 2 - SHIFT[0] / 2, h / 2 - SHIFT[1] / 2]).round()
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    frames = []
    for moved in (0, 1):
        dx, dy = (int(moved * step) for step in SHIFT)
        opacity = (radius + 0.5 - torch.hypot(x - centre[0] - dx, y - centre[1] - dy)).clamp(0, 1)
        disc = foreground.roll((dy, dx), dims=(-2, -1))
        frames.append(background * (1 - opacity) + disc * opacity)
    return frames[0], frames[1], centre, radius


def layers(detect: Detector, background: Tensor, foreground: Tensor) -> Layers:
    """Keypoints of the background within ``RIM`` px of the disc of ``layered_frames``, and how many
    of them move with the disc.
    """
    one, two, centre, radius = layered_frames(background, foreground)
    shift = torch.tensor(SHIFT)
    a, b = detect(one), detect(two)
    if not len(a) or not len(b):
        return Layers(0, 0)
    outside = (a - centre).norm(dim=1) - radius
    near = a[(outside > 1) & (outside < RIM) & ((a - centre - shift).norm(dim=1) > radius + 1)]
    stays = torch.cdist(near, b).amin(dim=1) <= SAME
    moves = torch.cdist(near + shift, b).amin(dim=1) <= SAME
    # what texture gives by chance at the place moved to is no keypoint that moved: it was there
    # before
    before = torch.cdist(near + shift, a).amin(dim=1) <= SAME
    wrong = moves & ~stays & ~before
    return Layers(int((stays | wrong).sum()), int(wrong.sum()))


@dataclass(frozen=True)
class Corners:
    """Drawn corners, junctions and spots found by a detector.

    Attributes:
        total: targets.
        found: those with a keypoint within ``FOUND`` px.
        near: those with one within ``NEAR`` px.
        error: mean distance of the nearest keypoints of the latter in pixels; nan where there is
            none.
    """

    total: int
    found: int
    near: int
    error: float


def corner_image(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sixty drawn targets at known sub-pixel positions: image (1,1,640,640) in [0,1] and positions
    (60,2).

    Squares (every corner counts), T-junctions (an edge that ends at another one), crossings of
    checkerboards and spots, light on dark and dark on light, at any rotation, slightly blurred and
    noisy.
    """
    rng = np.random.default_rng([seed, 60])
    kinds = ["square"] * 6 + ["tee"] * 12 + ["cross"] * 12 + ["spot"] * 12
    cells = rng.permutation((CORNER_SIZE // CELL) ** 2)[: len(kinds)]
    outlines: list[tuple[np.ndarray, int]] = []
    targets = []
    for kind, cell in zip(kinds, cells, strict=True):
        at = (np.array(divmod(int(cell), CORNER_SIZE // CELL)) + 0.5) * CELL + rng.uniform(-4, 4, 2)
        angle = rng.uniform(0, 2 * math.pi)
        rotate = np.array(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        ).T
        first, second = rng.permutation(
            [int(rng.integers(20, 60)), int(rng.integers(200, 240))]
        ).tolist()
        half = rng.uniform(14, 20)
        box = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
        if kind == "square":
            outlines.append((box @ rotate + at, first))
            targets.append(box @ rotate + at)
        elif kind == "tee":
            outlines.append((box @ rotate + at, first))
            outlines.append(
                ((box * [0.5, 1] + [half / 2, 0]) @ rotate + at, second)
            )  # its right half
            targets.append(
                np.array([[0, half]]) @ rotate + at
            )  # one end of the edge between the halves
        elif kind == "cross":
            for sign in (1, -1):
                outlines.append(((box * 0.5 + sign * half / 2) @ rotate + at, first))
                outlines.append(
                    ((box * 0.5 + np.array([sign, -sign]) * half / 2) @ rotate + at, second)
                )
            targets.append(np.zeros((1, 2)) + at)
        else:
            t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
            outlines.append((rng.uniform(2, 3.5) * np.c_[np.cos(t), np.sin(t)] + at, first))
            targets.append(np.zeros((1, 2)) + at)
    gray = (
        torch.from_numpy(render_outlines(outlines, 128, np.eye(3), CORNER_SIZE))[None, None] / 255
    )
    noise = torch.from_numpy(
        rng.normal(0, 1.5 / 255, (CORNER_SIZE, CORNER_SIZE)).astype(np.float32)
    )
    return (gaussian_blur(gray, 0.6) + noise).clamp(0, 1), torch.from_numpy(
        np.concatenate(targets)
    ).float()


def corners(detect: Detector, *, seed: int = 0) -> Corners:
    """How many of the targets of ``corner_image`` a detector finds, and how exactly."""
    image, targets = corner_image(seed)
    xy = detect(image)
    if not len(xy):
        return Corners(len(targets), 0, 0, math.nan)
    # matrix products would round by hundredths of a pixel
    distance = torch.cdist(targets, xy, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
    near = distance <= NEAR
    error = float(distance[near].mean()) if bool(near.any()) else math.nan
    return Corners(len(targets), int((distance <= FOUND).sum()), int(near.sum()), error)
