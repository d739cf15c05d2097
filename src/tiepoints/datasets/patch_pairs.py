"""Pairs of patches from a folder of photographs: the training data of every patch descriptor.

Two views of one photograph (``synthetic``) give the places: a detector's points and random ones of
the first view, moved into the second by the homography. Position and scale of the second patch are
off by what a detector's repeated points are off, and both patches are cut from the pyramids of
their own views as at extraction. Nothing but flat patches is left out: views that are hardly alike
stay, and all points of a view stand in one batch, where they are each other's hardest negatives as
they will be in matching.
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
from ..geometry import warp_points
from ..keypoints import NMS_WINDOW, detect_peaks
from ..patches import extract_patches
from ..pyramid import build_pyramid
from ..structs import Keypoints
from .synthetic import PRESETS, Pair, PairDataset, PairSettings

#: Views tried for one item before the photographs are given up, and stride between their numbers.
VIEWS_PER_ITEM = 8
OTHER_VIEW = 1_000_003


@dataclass(frozen=True)
class PatchSettings:
    """How patch pairs are drawn. Lengths in pixels of the view.

    Attributes:
        per_view: pairs from one pair of views.
        random_part: part of them at random places; the rest are the strongest points of the
            detector.
        min_distance: points of one view are at least this far apart, so that a negative is another
            place.
        scale: smallest and largest scale of a patch in the first view.
        scale_mean: mean number of octaves above the smallest (exponential): many fine points, few
            coarse ones.
        position_sigma: error of the second position along each axis, times its scale.
        scale_sigma: error of the second scale, in natural logarithms.
        symmetric: probability that both patches are turned by the same quarter turns, and mirrored
            alike.
        min_contrast: least standard deviation of a patch; flat ones are left out.
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


class PatchPairs(Dataset):
    """Patch pairs made on the fly from photographs: index -> the pairs of one pair of views.

    Items: ``anchor, positive`` (per_view,1,32,32) float32 in [0,1].

    Args:
        photos: image files.
        detect: gray view (1,1,S,S) in [0,1] -> points (N,2), strongest first.
        settings: how patches are drawn.
        views: how the pairs of views are drawn.
        seed: item ``i`` depends on ``seed``, ``i``, ``photos`` and ``detect`` alone.
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
        """Item ``index``.

        Raises:
            DataError: the photographs have no texture.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        for attempt in range(VIEWS_PER_ITEM):
            rng = np.random.default_rng([self.seed, index, attempt, 2])
            item = self._cut(self.views.pair(index + attempt * OTHER_VIEW), rng)
            if item is not None:
                return item
        raise DataError(
            f"{VIEWS_PER_ITEM} views in a row had no {self.settings.per_view} places with "
            "contrast; the images are too small or too smooth"
        )

    def _cut(self, pair: Pair, rng: np.random.Generator) -> dict[str, Tensor] | None:
        """Patches of one pair of views, or None where there are not enough."""
        s = self.settings
        view_a, view_b = (
            torch.from_numpy(v.copy()).float()[None, None] / 255
            for v in (pair.image_a, pair.image_b)
        )
        xy = self._places(view_a, pair.mask_a, rng)
        H_ab = torch.from_numpy(pair.H_ab)
        ahead = torch.from_numpy(rng.exponential(s.scale_mean, len(xy))).float()
        scale_a = (s.scale[0] * 2**ahead).clamp(max=s.scale[1])
        exact = warp_points(xy.double(), H_ab)
        change = local_scale(xy.double(), H_ab).float()
        slip = torch.from_numpy(rng.normal(0, 1, (len(xy), 3))).float()
        scale_b = scale_a * change * torch.exp(s.scale_sigma * slip[:, 2])
        xy_b = exact.float() + s.position_sigma * scale_b[:, None] * slip[:, :2]
        side = torch.tensor([view_b.shape[-1], view_b.shape[-2]])
        inside = ((exact >= 0) & (exact <= side - 1)).all(dim=1)
        zeros = torch.zeros(len(xy))
        patches = [
            extract_patches(build_pyramid(view), Keypoints(at, scale, zeros, zeros))
            for view, at, scale in ((view_a, xy, scale_a), (view_b, xy_b, scale_b))
        ]
        contrast = torch.stack([p.flatten(1).std(dim=1) for p in patches]).amin(dim=0)
        kept = (inside & (contrast >= s.min_contrast)).nonzero()[: s.per_view, 0]
        if len(kept) < s.per_view:
            return None
        anchor, positive = (p[kept] for p in patches)
        turned = [rotate_pair(anchor[i], positive[i], rng, s.symmetric) for i in range(len(kept))]
        return {
            "anchor": torch.stack([a for a, _ in turned]),
            "positive": torch.stack([p for _, p in turned]),
        }

    def _places(self, view: Tensor, mask: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Candidate points (N,2), more than needed: the detector's and random ones, mixed, apart
        and where both views see.
        """
        s = self.settings
        found = self.detect(view)
        h, w = mask.shape
        anywhere = torch.from_numpy(
            rng.uniform([0, 0], [w - 1, h - 1], (4 * s.per_view, 2))
        ).float()
        strong = _seen(found, mask)[: 2 * s.per_view]
        loose = _seen(anywhere, mask)
        share = max(1, round(s.random_part * s.per_view))
        order = torch.from_numpy(rng.permutation(len(strong)))
        # the wanted mixture first, what is left over behind it as a reserve
        cut = s.per_view - share
        xy = torch.cat([strong[order[:cut]], loose[:share], strong[order[cut:]], loose[share:]])
        kept: list[int] = []
        near = torch.cdist(xy, xy) < s.min_distance
        for i in range(len(xy)):
            if not kept or not bool(near[i, kept].any()):
                kept.append(i)
        return xy[kept]


def _seen(xy: Tensor, mask: np.ndarray) -> Tensor:
    """The points (N,2) whose pixel the mask (H,W) holds."""
    index = xy.round().long()
    return xy[
        torch.from_numpy(mask)[
            index[:, 1].clamp(0, mask.shape[0] - 1), index[:, 0].clamp(0, mask.shape[1] - 1)
        ]
    ]


def local_scale(xy: Tensor, H_ab: Tensor) -> Tensor:
    """How much larger small things at points (N,2) of a are in b: (N,), the root of the area's
    change.
    """
    h = H_ab.to(xy)
    depth = xy[:, 0] * h[2, 0] + xy[:, 1] * h[2, 1] + h[2, 2]
    return (torch.linalg.det(h).abs() / depth.abs().pow(3)).sqrt()


def rotate_pair(
    anchor: Tensor, positive: Tensor, rng: np.random.Generator, probability: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Both patches (1,P,P) turned by the same quarter turns and mirrored alike, each with this
    probability.
    """
    turns = int(rng.integers(1, 4)) if rng.random() < probability else 0
    mirrored = rng.random() < probability
    both = torch.stack([anchor, positive])
    both = torch.rot90(both, turns, dims=(-2, -1))
    both = both.flip(-1) if mirrored else both
    return both[0], both[1]


def peak_detector(
    net: Callable[[Tensor], Tensor], count: int = 200, border: int = 8, window: int = NMS_WINDOW
) -> Callable[[Tensor], Tensor]:
    """A score-map network as the ``detect`` of ``PatchPairs`` and ``CandidatePairs``."""

    def detect(view: Tensor) -> Tensor:
        with torch.inference_mode():
            return detect_peaks(net(view), count, border=border, window=window)[0][0].clone()

    return detect
