"""Pairs of patches from photographs: the training data of patch descriptors.

The locations are detected keypoints and random positions of one view of a photograph
(``synthetic``), mapped to a second view by the homography. Position and scale of the second patch
are perturbed with the errors of repeated detections, and each patch is extracted from the pyramid
of its view as in feature extraction. Only flat patches are skipped; very dissimilar pairs are kept.
All patches of a view are in the same batch, where they are each other's hardest negatives, as in
matching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from ..geometry import distances, warp_points
from ..keypoints import NMS_WINDOW, detect_peaks
from ..patches import HALF_SIDE, PATCH_SIZE, crop_patches, extract_patches
from ..pyramid import Pyramid, build_pyramid
from ..structs import Keypoints
from .synthetic import PRESETS, Pair, PairDataset, PairSettings

#: Number of views tried per item before an error is raised, and offset between their indices.
VIEWS_PER_ITEM = 8
OTHER_VIEW = 1_000_003


@dataclass(frozen=True)
class PatchSettings:
    """How patch pairs are drawn. Lengths in pixels of the view.

    Attributes:
        per_view: number of patch pairs per pair of views.
        random_part: fraction of them at random positions; the others are the strongest keypoints.
        min_distance: minimum distance between keypoints of a view, so that negatives show different
            locations.
        scale: smallest and largest scale of a patch in the first view.
        scale_mean: mean number of octaves above the smallest scale (exponential distribution).
        position_sigma: standard deviation of the second position along each axis, in units of its
            scale.
        scale_sigma: standard deviation of the natural logarithm of the second scale.
        symmetric: probability that both patches are rotated by the same multiple of 90 degrees, and
            probability that both are mirrored.
        min_contrast: minimum standard deviation of the central ``PATCH_SIZE`` x ``PATCH_SIZE``
            samples of a patch; patches below it are skipped.
        size: samples along a side of a patch.
        half_side: half the side of a patch in units of its scale.
        reach: factors of ``half_side``, one for each of the C patches of a location.
    """

    per_view: int = 48
    random_part: float = 0.25
    min_distance: float = 5.0
    scale: tuple[float, float] = (0.75, 3.0)
    scale_mean: float = 0.7
    position_sigma: float = 0.7
    scale_sigma: float = 0.17
    symmetric: float = 0.5
    min_contrast: float = 0.012
    size: int = PATCH_SIZE
    half_side: float = HALF_SIDE
    reach: tuple[float, ...] = (1.0,)

    def extract(self, pyramid: Pyramid, xy: Tensor, scale: Tensor, angle: Tensor) -> Tensor:
        """Patches (N,C,size,size) at positions (N,2) with scales and angles (N,)."""
        keypoints = Keypoints(xy, scale, angle, torch.zeros(len(xy)))
        return extract_patches(
            *(pyramid, keypoints),
            size=self.size,
            half_side=self.half_side,
            reach=self.reach,
            halved=False,
        )

    def have_contrast(self, views: Sequence[Tensor]) -> Tensor:
        """Whether the first patches of locations have enough contrast in all views
        (N,C,size,size): (N,) bool.
        """
        centers = [crop_patches(patches[:, :1], PATCH_SIZE) for patches in views]
        contrast = torch.stack([p.flatten(1).std(dim=1) for p in centers]).amin(dim=0)
        return contrast >= self.min_contrast


class PatchPairs(Dataset):
    """Patch pairs generated from photographs; each item holds the patches of one pair of views.

    Items: ``anchor, positive`` (per_view,C,size,size) float32 in [0,1].

    Args:
        photos: image files.
        detect: gray view (1,1,S,S) in [0,1] -> keypoints (N,2), strongest first.
        settings: how patches are drawn.
        views: how the pairs of views are drawn.
        seed: item ``i`` depends only on ``seed``, ``i``, ``photos`` and ``detect``.
        length: number of items.
    """

    def __init__(
        self,
        photos: Sequence[Path],
        detect: Callable[[Tensor], Tensor],
        settings: PatchSettings | None = None,
        *,
        views: PairSettings | None = None,
        seed: int = 0,
        length: int,
    ):
        self.settings = settings or PatchSettings()
        self.detect, self.seed, self.length = detect, seed, length
        self.views = PairDataset(photos, views or PRESETS["patches"], seed=seed, length=length)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return item ``index``.

        Raises:
            DataError: the photographs have no texture.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        for attempt in range(VIEWS_PER_ITEM):
            rng = np.random.default_rng([self.seed, index, attempt, 2])
            item = self._extract(self.views.pair(index + attempt * OTHER_VIEW), rng)
            if item is not None:
                return item
        raise DataError(
            f"{VIEWS_PER_ITEM} consecutive views had fewer than {self.settings.per_view} patches "
            "with enough contrast; the images are too small or too smooth"
        )

    def _extract(self, pair: Pair, rng: np.random.Generator) -> dict[str, Tensor] | None:
        """Patches of one pair of views, or None if there are too few."""
        s = self.settings
        view_a, view_b = (
            torch.from_numpy(v.copy()).float()[None, None] / 255
            for v in (pair.image_a, pair.image_b)
        )
        xy = self._locations(view_a, pair.mask_a, rng)
        H_ab = torch.from_numpy(pair.H_ab)
        octaves = torch.from_numpy(rng.exponential(s.scale_mean, len(xy))).float()
        scale_a = (s.scale[0] * 2**octaves).clamp(max=s.scale[1])
        exact = warp_points(xy.double(), H_ab)
        scale_ratio = local_scale(xy.double(), H_ab).float()
        noise = torch.from_numpy(rng.normal(0, 1, (len(xy), 3))).float()
        scale_b = scale_a * scale_ratio * torch.exp(s.scale_sigma * noise[:, 2])
        xy_b = exact.float() + s.position_sigma * scale_b[:, None] * noise[:, :2]
        size = torch.tensor([view_b.shape[-1], view_b.shape[-2]])
        inside = ((exact >= 0) & (exact <= size - 1)).all(dim=1)
        zeros = torch.zeros(len(xy))
        patches = [
            s.extract(build_pyramid(view), position, scale, zeros)
            for view, position, scale in ((view_a, xy, scale_a), (view_b, xy_b, scale_b))
        ]
        kept = (inside & s.have_contrast(patches)).nonzero()[: s.per_view, 0]
        if len(kept) < s.per_view:
            return None
        anchor, positive = (p[kept] for p in patches)
        augmented = [
            rotate_pair(anchor[i], positive[i], rng, s.symmetric) for i in range(len(kept))
        ]
        return {
            "anchor": torch.stack([a for a, _ in augmented]),
            "positive": torch.stack([p for _, p in augmented]),
        }

    def _locations(self, view: Tensor, mask: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Detected keypoints and random positions (N,2) in the overlap, more than needed and at
        least ``min_distance`` apart.
        """
        s = self.settings
        detected = self.detect(view)
        h, w = mask.shape
        positions = torch.from_numpy(
            rng.uniform([0, 0], [w - 1, h - 1], (4 * s.per_view, 2))
        ).float()
        strong = _in_mask(detected, mask)[: 2 * s.per_view]
        random = _in_mask(positions, mask)
        num_random = max(1, round(s.random_part * s.per_view))
        order = torch.from_numpy(rng.permutation(len(strong)))
        # the requested mixture first, the remaining ones as a reserve
        cut = s.per_view - num_random
        xy = torch.cat(
            [strong[order[:cut]], random[:num_random], strong[order[cut:]], random[num_random:]]
        )
        kept: list[int] = []
        near = distances(xy, xy) < s.min_distance
        for i in range(len(xy)):
            if not kept or not bool(near[i, kept].any()):
                kept.append(i)
        return xy[kept]


def _in_mask(xy: Tensor, mask: np.ndarray) -> Tensor:
    """Keep the points (N,2) whose nearest pixel is set in the mask (H,W)."""
    index = xy.round().long()
    return xy[
        torch.from_numpy(mask)[
            index[:, 1].clamp(0, mask.shape[0] - 1), index[:, 0].clamp(0, mask.shape[1] - 1)
        ]
    ]


def local_scale(xy: Tensor, H_ab: Tensor) -> Tensor:
    """Scale change from a to b at points (N,2) of a: (N,), the square root of the area ratio."""
    h = H_ab.to(xy)
    depth = xy[:, 0] * h[2, 0] + xy[:, 1] * h[2, 1] + h[2, 2]
    return (torch.linalg.det(h).abs() / depth.abs().pow(3)).sqrt()


def rotate_pair(
    anchor: Tensor, positive: Tensor, rng: np.random.Generator, probability: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Rotate both patches (C,P,P) by the same multiple of 90 degrees and mirror both, each with the
    given probability.
    """
    rot90 = int(rng.integers(1, 4)) if rng.random() < probability else 0
    mirrored = rng.random() < probability
    both = torch.stack([anchor, positive])
    both = torch.rot90(both, rot90, dims=(-2, -1))
    both = both.flip(-1) if mirrored else both
    return both[0], both[1]


def peak_detector(
    net: Callable[[Tensor], Tensor], count: int = 200, border: int = 8, window: int = NMS_WINDOW
) -> Callable[[Tensor], Tensor]:
    """Turn a score-map network into the ``detect`` of ``PatchPairs`` and ``CandidatePairs``."""

    def detect(view: Tensor) -> Tensor:
        with torch.inference_mode():
            return detect_peaks(net(view), count, border=border, window=window)[0][0].clone()

    return detect
