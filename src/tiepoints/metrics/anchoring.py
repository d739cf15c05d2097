"""Metrics of whether keypoints lie on image structure (docs/evaluation.md).

A keypoint at a constant distance from an edge moves with a plane like a corner does, so metrics on
homographies accept it. In a scene with depth it may lie on another surface than the structure that
caused the response, and moves differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..filters import corner_strength, gaussian_blur, percentile_rank
from ..geometry import distances
from ..render import render_outlines

#: Gray image (1,1,H,W) in [0,1] -> keypoints (N,2), strongest first.
Detector = Callable[[Tensor], Tensor]

#: Keypoints per image in ``anchoring``, and the window of its structure tensor in pixels.
ANCHORED_KEYPOINTS = 200
SIGMA = 2.0
#: ``layers``: radius of the disc over the shorter side; in pixels, the motion of the disc, the
#: width of the ring around it in which keypoints are counted, and the largest distance of a
#: repeated keypoint.
DISC = 0.22
SHIFT = (24.0, 7.0)
RIM = 30.0
SAME = 2.0
#: ``corners``: side of the image and of the cell of each target, and the distance thresholds of
#: ``Corners.found`` and ``Corners.near``, in pixels.
CORNER_SIZE = 640
CELL = 80
FOUND, NEAR = 1.0, 3.0


@dataclass(frozen=True)
class Anchoring:
    """Percentiles of keypoints among the pixels of their images by ``filters.corner_strength``.

    Attributes:
        median: median percentile, 0..1; 0.5 for random positions.
        below_half: fraction of keypoints below the median pixel of their image; 0.5 for random
            positions.
        count: number of keypoints.
    """

    median: float
    below_half: float
    count: int


def percentiles(image: Tensor, xy: Tensor) -> Tensor:
    """Percentile of corner strength (N,) in [0,1] at ``xy`` (N,2) in a gray image (1,1,H,W)."""
    rank = percentile_rank(corner_strength(image, SIGMA))[0, 0]
    h, w = rank.shape
    x, y = xy.round().long().unbind(dim=1)
    return rank[y.clamp(0, h - 1), x.clamp(0, w - 1)]


def anchoring(
    detect: Detector, images: Iterable[Tensor], *, num_keypoints: int = ANCHORED_KEYPOINTS
) -> Anchoring:
    """Measure the corner strength at the strongest ``num_keypoints`` keypoints of each gray image
    (1,1,H,W), pooled over all images.
    """
    per_image = [percentiles(image, detect(image)[:num_keypoints]) for image in images]
    values = torch.cat(per_image) if per_image else torch.zeros(0)
    if not len(values):
        return Anchoring(0.0, 1.0, 0)
    return Anchoring(float(values.median()), float((values < 0.5).float().mean()), len(values))


@dataclass(frozen=True)
class Layers:
    """Keypoints of the background near a moving foreground.

    Attributes:
        found: number of repeated keypoints, at their position or moved with the foreground.
        wrong: number of those that moved with the foreground.
    """

    found: int
    wrong: int

    @property
    def share(self) -> float:
        """Fraction that moved with the incorrect layer, 0..1; 0 if none was repeated."""
        return self.wrong / self.found if self.found else 0.0


def layered_frames(background: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Render a disc of ``foreground`` over ``background``, which moves by ``SHIFT``.

    Args:
        background, foreground: gray images (1,1,H,W) of the same size.

    Returns:
        both frames (1,1,H,W), the center (2,) of the disc in the first, and its radius in pixels.

    Raises:
        ValueError: the sizes differ.
    """
    if background.shape != foreground.shape:
        raise ValueError(
            f"both photographs must have the same size, got {tuple(background.shape)} and "
            f"{tuple(foreground.shape)}"
        )
    h, w = background.shape[-2:]
    radius = DISC * min(h, w)
    center = torch.tensor([w / 2 - SHIFT[0] / 2, h / 2 - SHIFT[1] / 2]).round()
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    frames = []
    for moved in (0, 1):
        dx, dy = (int(moved * step) for step in SHIFT)
        opacity = (radius + 0.5 - torch.hypot(x - center[0] - dx, y - center[1] - dy)).clamp(0, 1)
        disc = foreground.roll((dy, dx), dims=(-2, -1))
        frames.append(background * (1 - opacity) + disc * opacity)
    return frames[0], frames[1], center, radius


def layers(detect: Detector, background: Tensor, foreground: Tensor) -> Layers:
    """Count background keypoints within ``RIM`` px of the disc of ``layered_frames``, and those
    that move with the disc.
    """
    frame_a, frame_b, center, radius = layered_frames(background, foreground)
    shift = torch.tensor(SHIFT)
    a, b = detect(frame_a), detect(frame_b)
    if not len(a) or not len(b):
        return Layers(0, 0)
    outside = (a - center).norm(dim=1) - radius
    near = a[(outside > 1) & (outside < RIM) & ((a - center - shift).norm(dim=1) > radius + 1)]
    stays = distances(near, b).amin(dim=1) <= SAME
    moves = distances(near + shift, b).amin(dim=1) <= SAME
    # a keypoint that the first frame already has at the shifted position did not move there
    existing = distances(near + shift, a).amin(dim=1) <= SAME
    incorrect = moves & ~stays & ~existing
    return Layers(int((stays | incorrect).sum()), int(incorrect.sum()))


@dataclass(frozen=True)
class Corners:
    """Synthetic corners, junctions and blobs found by a detector.

    Attributes:
        total: number of targets.
        found: number of targets with a keypoint within ``FOUND`` px.
        near: number of targets with a keypoint within ``NEAR`` px.
        error: mean distance in pixels between the latter and their nearest keypoints; NaN if there
            are none.
    """

    total: int
    found: int
    near: int
    error: float


def corner_image(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Render sixty targets at known subpixel positions: image (1,1,640,640) in [0,1], xy (60,2).

    Corners of squares, T-junctions, checkerboard crossings and blobs, bright on dark and dark on
    bright, at random rotations, slightly blurred and noisy.
    """
    rng = np.random.default_rng([seed, 60])
    kinds = ["square"] * 6 + ["tee"] * 12 + ["cross"] * 12 + ["spot"] * 12
    cells = rng.permutation((CORNER_SIZE // CELL) ** 2)[: len(kinds)]
    outlines: list[tuple[np.ndarray, int]] = []
    targets = []
    for kind, cell in zip(kinds, cells, strict=True):
        center = (np.array(divmod(int(cell), CORNER_SIZE // CELL)) + 0.5) * CELL
        center = center + rng.uniform(-4, 4, 2)
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
            outlines.append((box @ rotate + center, first))
            targets.append(box @ rotate + center)
        elif kind == "tee":
            outlines.append((box @ rotate + center, first))
            right_half = box * [0.5, 1] + [half / 2, 0]
            outlines.append((right_half @ rotate + center, second))
            targets.append(np.array([[0, half]]) @ rotate + center)  # end of the inner edge
        elif kind == "cross":
            for sign in (1, -1):
                outlines.append(((box * 0.5 + sign * half / 2) @ rotate + center, first))
                other = box * 0.5 + np.array([sign, -sign]) * half / 2
                outlines.append((other @ rotate + center, second))
            targets.append(np.zeros((1, 2)) + center)
        else:
            t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
            outlines.append((rng.uniform(2, 3.5) * np.c_[np.cos(t), np.sin(t)] + center, first))
            targets.append(np.zeros((1, 2)) + center)
    gray = torch.from_numpy(render_outlines(outlines, 128, np.eye(3), CORNER_SIZE)) / 255
    noise = rng.normal(0, 1.5 / 255, (CORNER_SIZE, CORNER_SIZE)).astype(np.float32)
    image = (gaussian_blur(gray[None, None], 0.6) + torch.from_numpy(noise)).clamp(0, 1)
    return image, torch.from_numpy(np.concatenate(targets)).float()


def corners(detect: Detector, *, seed: int = 0) -> Corners:
    """Measure how many targets of ``corner_image`` a detector finds, and its localization error."""
    image, targets = corner_image(seed)
    xy = detect(image)
    if not len(xy):
        return Corners(len(targets), 0, 0, math.nan)
    # matrix multiplication would cause errors of hundredths of a pixel
    distance = distances(targets, xy).amin(dim=1)
    near = distance <= NEAR
    error = float(distance[near].mean()) if bool(near.any()) else math.nan
    return Corners(len(targets), int((distance <= FOUND).sum()), int(near.sum()), error)
