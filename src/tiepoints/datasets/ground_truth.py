"""Image pairs with ground truth: a homography, a relative pose or manually marked points."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

KINDS = ("view", "illum", "other", "pose", "marked")


@dataclass(frozen=True)
class HomographyPair:
    """Two images and the homography between them.

    Attributes:
        sequence, name: for example ``graf`` and ``1-4``.
        kind: ``view``, ``illum`` or ``other``, what changes between the images.
        image_a, image_b: paths.
        H_ab: (3,3) float64, pixels of a to pixels of b.
    """

    sequence: str
    name: str
    kind: str
    image_a: Path
    image_b: Path
    H_ab: Tensor


@dataclass(frozen=True)
class PosePair:
    """Two images of calibrated cameras and their relative pose.

    Attributes:
        sequence, name, kind: as in ``HomographyPair``; kind is ``pose``.
        image_a, image_b: paths.
        K_a, K_b: (3,3) float64 intrinsics of the images as stored.
        T_ab: (4,4) float64, coordinates of camera a to coordinates of camera b.
        rot90_a, rot90_b: rotation applied to each image before use, in multiples of 90 degrees
            counter-clockwise (SuperGlue's lists).
    """

    sequence: str
    name: str
    kind: str
    image_a: Path
    image_b: Path
    K_a: Tensor
    K_b: Tensor
    T_ab: Tensor
    rot90_a: int = 0
    rot90_b: int = 0


@dataclass(frozen=True)
class MarkedPair:
    """Two images and manually marked correspondences between them.

    Attributes:
        sequence, name, kind: as in ``HomographyPair``; kind is ``marked``.
        image_a, image_b: paths.
        xy_a, xy_b: (K,2) float64, the marked points (x, y) in pixels.
    """

    sequence: str
    name: str
    kind: str
    image_a: Path
    image_b: Path
    xy_a: Tensor
    xy_b: Tensor


Pair: TypeAlias = HomographyPair | PosePair | MarkedPair


@dataclass(frozen=True)
class Dataset:
    """Pairs of images with ground truth.

    Attributes:
        name, layout: of the dataset, for reports.
        root: folder of the images.
        pairs: all of one kind.
        problems: one message for each item that was skipped.
    """

    name: str
    layout: str
    root: Path
    pairs: list[HomographyPair] | list[PosePair] | list[MarkedPair]
    problems: list[str] = field(default_factory=list)

    @property
    def sequences(self) -> list[str]:
        """Unique names of the sequences, in the order of the pairs."""
        return list(dict.fromkeys(pair.sequence for pair in self.pairs))


# ---- sizes and rotations of posed images


def resize_target(width: int, height: int, resize: tuple[int, ...] | None) -> tuple[int, int]:
    """Size (width, height) to which an image is resized in the papers on pose estimation.

    Args:
        width, height: of the image.
        resize: ``(w, h)``, the exact size (SuperGlue's ScanNet: 640, 480); ``(side,)``, the longest
            side, smaller images are enlarged (SuperGlue outdoors: 1600); None, unchanged.

    Raises:
        ValueError: ``resize`` has another length.
    """
    if resize is None:
        return width, height
    if len(resize) == 2:
        return resize[0], resize[1]
    if len(resize) != 1:
        raise ValueError(f"resize must be (side,) or (width, height), got {resize}")
    factor = resize[0] / max(width, height)
    return max(1, round(width * factor)), max(1, round(height * factor))


def resized_intrinsics(K: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Intrinsics (3,3) of an image resized from ``size`` to ``new_size`` (width, height).

    Half-pixel convention: pixel centers have integer coordinates.
    """
    sx, sy = new_size[0] / size[0], new_size[1] / size[1]
    moved = torch.tensor(
        [[sx, 0, (sx - 1) / 2], [0, sy, (sy - 1) / 2], [0, 0, 1]], dtype=torch.float64
    )
    return moved @ K


def rotated_intrinsics(K: Tensor, size: tuple[int, int], turns: int) -> Tensor:
    """Intrinsics (3,3) of an image of ``size`` (width, height) rotated by ``turns`` * 90 degrees
    counter-clockwise.
    """
    w, h = size
    for _ in range(turns % 4):
        # pixel (x, y) moves to (y, w - 1 - x); the camera's axes rotate with the image, so that the
        # focal lengths stay positive
        fx, fy, cx, cy = (float(v) for v in (K[0, 0], K[1, 1], K[0, 2], K[1, 2]))
        K = torch.tensor([[fy, 0, cy], [0, fx, w - 1 - cx], [0, 0, 1]], dtype=torch.float64)
        w, h = h, w
    return K


def rotated_pose(T_ab: Tensor, rot90_a: int, rot90_b: int) -> Tensor:
    """Pose (4,4) between the cameras of images rotated by multiples of 90 degrees (see
    ``PosePair``).
    """

    def rotation(rot90: int) -> Tensor:
        angle = torch.tensor(rot90 % 4 * torch.pi / 2, dtype=torch.float64)
        c, s = angle.cos().round(), angle.sin().round()
        T = torch.eye(4, dtype=torch.float64)
        T[:2, :2] = torch.stack([torch.stack([c, s]), torch.stack([-s, c])])
        return T

    return rotation(rot90_b) @ T_ab @ torch.linalg.inv(rotation(rot90_a))
