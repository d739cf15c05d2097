"""Reconstructions as training data: the tracks of COLMAP models are pairs of patches, and pairs of
positions, that no warp can make.

A 3D point that several photographs show gives the same place under another viewpoint, camera, light
and day. Depth and focal length say how large its surroundings are in each image, and the cameras'
poses by what angle they are rotated about the line of sight: patches are cut at that scale and
turned by that angle, so that what is left to learn is what a camera really changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from ..geometry import sample_at
from ..patches import extract_patches
from ..pyramid import Pyramid
from ..structs import Keypoints
from .candidates import CANDIDATES, OTHER_PLACE, SAME_PLACE
from .patch_pairs import PatchSettings, rotate_pair
from .reconstructions import ImageCache, Shared, TrackScene, TrackSettings
from .synthetic import PairSettings, degrade

#: Crops: fewest tracks both must show, frame without candidates, logarithms of the image's pixels a
#: pixel, and how near a keypoint must be to stand for a track, in pixels of the crop.
CROP_TRACKS = 12
EDGE = 8.0
CROP_ZOOM = (-0.2, 0.8)
SNAP = 2.0
#: Shared points looked at for each patch pair that is wanted.
PLACES = 4
#: Pairs of views tried for one item before the reconstructions are given up.
ATTEMPTS = 20


def _first_of_views(
    scenes: Sequence[TrackScene],
    make: Callable[[TrackScene, tuple[int, int], np.random.Generator], dict[str, Tensor] | None],
    rng: np.random.Generator,
    wanted: str,
) -> dict[str, Tensor]:
    """What ``make`` makes of a random pair of views, the first one of which it can; scenes count by
    the square root of their pairs.

    Raises:
        DataError: none of ``ATTEMPTS`` pairs had what is ``wanted``.
    """
    weight = np.sqrt([len(scene.pairs) for scene in scenes])
    for _ in range(ATTEMPTS):
        scene = scenes[rng.choice(len(scenes), p=weight / weight.sum())]
        pair = scene.pairs[rng.integers(len(scene.pairs))]
        item = make(scene, pair if rng.random() < 0.5 else pair[::-1], rng)
        if item is not None:
            return item
    raise DataError(
        f"{ATTEMPTS} pairs of views in a row had no {wanted}; the reconstructions are too sparse"
    )


class TrackPatches(Dataset):
    """Patch pairs of tracks: index -> the pairs of two images of one reconstruction.

    Items: ``anchor, positive`` (per_view,1,32,32) float32 in [0,1], as those of ``PatchPairs``.

    Args:
        scenes: reconstructions; each is drawn with the square root of its number of pairs of views.
        detect: gray image (1,1,H,W) in [0,1] -> keypoints (N,2), strongest first.
        patches: scales, errors and symmetry of the patches.
        seed: item ``i`` depends on ``seed``, ``i``, ``scenes`` and ``detect`` alone.
        length: number of items.
    """

    def __init__(
        self,
        scenes: Sequence[TrackScene],
        detect: Callable[[Tensor], Tensor],
        patches: PatchSettings | None = None,
        *,
        seed: int = 0,
        length: int,
    ):
        self.scenes, self.detect, self.seed, self.length = list(scenes), detect, seed, length
        self.settings = patches or PatchSettings()
        self.cache = ImageCache()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Item ``index``.

        Raises:
            DataError: no pair of views gave enough patches.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index, 3])
        return _first_of_views(
            self.scenes, self._cut, rng, f"{self.settings.per_view} tracks apart"
        )

    def _cut(
        self, scene: TrackScene, pair: tuple[int, int], rng: np.random.Generator
    ) -> dict[str, Tensor] | None:
        s, t = self.settings, scene.settings
        shared = scene.shared(*pair)
        (pyramid_a, found_a), (pyramid_b, found_b) = (
            self.cache.get(scene.images[i], self.detect) for i in pair
        )
        n = len(shared)
        scale = np.minimum(s.scale[0] * 2 ** rng.exponential(s.scale_mean, n), s.scale[1])
        # what is larger in one image must not fall below the finest scale in the other
        scale_a = scale * np.maximum(1, 1 / shared.scale)
        xy_a, xy_b = shared.xy_a.astype(np.float64), shared.xy_b.astype(np.float64)
        if n > PLACES * s.per_view:  # enough to choose from
            few = rng.permutation(n)[: PLACES * s.per_view]
            shared, scale_a, xy_a, xy_b, n = (
                shared.take(few),
                scale_a[few],
                xy_a[few],
                xy_b[few],
                len(few),
            )
        moved, onto = onto_keypoints(shared, found_a.numpy(), found_b.numpy(), t, rng)
        xy_a, xy_b = xy_a + moved, xy_b + onto
        order = rng.permutation(n)
        order = order[_apart(xy_a[order], s.min_distance) & _apart(xy_b[order], s.min_distance)]
        slip = rng.normal(0, 1, (n, 3))
        scale_b = scale_a * shared.scale * np.exp(s.scale_sigma * slip[:, 2])
        jitter = np.where((np.abs(onto).sum(axis=1) > 0)[:, None], 0.3, 1.0) * s.position_sigma
        xy_b = xy_b + jitter * scale_b[:, None] * slip[:, :2]
        drawn = rng.uniform(-1, 1, n)
        extra = math.radians(t.rotation) * np.sign(drawn) * np.abs(drawn) ** 1.5
        patches = []
        for pyramid, xy, size, angle in (
            (pyramid_a, xy_a, scale_a, 0 * extra),
            (pyramid_b, xy_b, scale_b, shared.angle + extra),
        ):
            at, scales, angles = (
                torch.from_numpy(np.ascontiguousarray(v[order])).float() for v in (xy, size, angle)
            )
            patches.append(
                extract_patches(pyramid, Keypoints(at, scales, angles, torch.zeros(len(order))))
            )
        contrast = torch.stack([p.flatten(1).std(dim=1) for p in patches]).amin(dim=0)
        kept = (contrast >= s.min_contrast).nonzero()[: s.per_view, 0]
        if len(kept) < s.per_view:
            return None
        anchor, positive = (_photometric(p[kept], rng, t.photometric) for p in patches)
        rotated = [rotate_pair(anchor[i], positive[i], rng, s.symmetric) for i in range(len(kept))]
        return {
            "anchor": torch.stack([a for a, _ in rotated]),
            "positive": torch.stack([p for _, p in rotated]),
        }


class TrackCrops(Dataset):
    """Pairs of crops of tracks with the keypoint candidates of each: index -> what
    ``CandidatePairs`` gives, but for ``H_ab``.

    Both crops show one 3D point at the size and rotation that the cameras imply, each off by a
    random factor and angle. Candidates are the 3D points that both show and other keypoints of the
    detector, which are negatives of these alone.

    Args:
        scenes, seed, length: see ``TrackPatches``.
        detect: gray crop (1,1,S,S) in [0,1] -> keypoints (N,2), strongest first.
        views: size, largest rotation and scale change of the crops, photometric changes.
        count: candidates of a crop.
    """

    def __init__(
        self,
        scenes: Sequence[TrackScene],
        detect: Callable[[Tensor], Tensor],
        views: PairSettings,
        *,
        seed: int = 0,
        length: int,
        count: int = CANDIDATES,
    ):
        self.scenes, self.detect, self.views, self.seed = list(scenes), detect, views, seed
        self.length, self.count = length, count
        self.cache = ImageCache()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Item ``index``.

        Raises:
            DataError: no pair of views gave crops with enough tracks.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index, 5])
        return _first_of_views(self.scenes, self._crop, rng, f"crops with {CROP_TRACKS} tracks")

    def _crop(
        self, scene: TrackScene, pair: tuple[int, int], rng: np.random.Generator
    ) -> dict[str, Tensor] | None:
        v = self.views
        shared = scene.shared(*pair)
        at = int(rng.integers(len(shared)))
        zoom_a = math.exp(rng.uniform(*CROP_ZOOM)) * max(1.0, 1 / shared.scale[at])
        drawn = rng.uniform(-1, 1)
        extra = math.radians(v.rotation) * math.copysign(abs(drawn) ** v.rotation_power, drawn)
        change = math.exp(rng.uniform(math.log(v.scale[0]), math.log(v.scale[1])) / 2)
        sides = []
        for number, xy, zoom, angle in (
            (pair[0], shared.xy_a, zoom_a, 0.0),
            (pair[1], shared.xy_b, zoom_a * shared.scale[at] * change, shared.angle[at] + extra),
        ):
            pyramid, _ = self.cache.get(scene.images[number], _empty_item)
            half = zoom * v.size / 2
            sides_of = np.array([pyramid.image.shape[-1], pyramid.image.shape[-2]]) - 1
            # as much inside the image as the place allows
            centre = xy[at] + rng.uniform(-0.5, 0.5, 2) * half
            centre = np.clip(
                centre, np.minimum(half, sides_of / 2), np.maximum(sides_of - half, sides_of / 2)
            )
            crop = _crop(pyramid, centre, zoom, angle, v.size)
            gray = degrade((crop[0, 0].numpy() * 255).round().clip(0, 255).astype(np.uint8), rng, v)
            image = torch.from_numpy(gray).float()[None, None] / 255
            rotate = np.array(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            )  # crop to image
            inside = (xy - centre) @ rotate / zoom + (v.size - 1) / 2
            sides.append((image, inside.astype(np.float32)))
        (image_a, xy_a), (image_b, xy_b) = sides
        kept = np.all(
            [
                (xy >= EDGE).all(axis=1) & (xy <= v.size - 1 - EDGE).all(axis=1)
                for xy in (xy_a, xy_b)
            ],
            axis=0,
        ).nonzero()[0]
        kept = rng.permutation(kept)
        kept = kept[_apart(xy_a[kept], SAME_PLACE) & _apart(xy_b[kept], SAME_PLACE)][
            : 2 * self.count // 3
        ]
        if len(kept) < CROP_TRACKS:
            return None
        found_a, found_b = self.detect(image_a).numpy(), self.detect(image_b).numpy()
        tracks_a, tracks_b = _snap(xy_a[kept], xy_b[kept], found_a, found_b)
        item = {"image_a": image_a[0], "image_b": image_b[0]}
        for side, tracks, found in (("a", tracks_a, found_a), ("b", tracks_b, found_b)):
            far = np.linalg.norm(found[:, None] - tracks[None], axis=2).min(axis=1) > OTHER_PLACE
            xy = np.concatenate([tracks, found[far]])[: self.count]
            item[f"xy_{side}"] = torch.full((self.count, 2), float("nan"))
            item[f"xy_{side}"][: len(xy)] = torch.from_numpy(xy)
        n = len(kept)
        known = torch.arange(self.count) < n
        item["positive"] = torch.diag(known)
        near_a, near_b = (
            torch.cdist(item[f"xy_{s}"], item[f"xy_{s}"][:n]) <= OTHER_PLACE for s in "ab"
        )  # (count,n) bool
        # i and j are certainly two places if i is a track and j lies away from where it is seen in
        # the other image, or the reverse
        apart = torch.zeros(self.count, self.count, dtype=torch.bool)
        apart[:n] = ~near_b.T
        apart[:, :n] &= ~near_a
        apart[n:, :n] = ~near_a[n:]
        item["negative"] = apart
        return item


def _empty_item(image: Tensor) -> Tensor:
    """No keypoints: crops are searched after they are cut."""
    return torch.zeros(0, 2)


def _crop(pyramid: Pyramid, centre: np.ndarray, zoom: float, angle: float, size: int) -> Tensor:
    """A square (1,1,size,size) of an image around ``centre``, ``zoom`` pixels of the image a pixel,
    its x axis rotated by ``angle``.
    """
    level = max(
        (level for level in pyramid.levels if level.scale <= zoom * 1.1),
        key=lambda level: level.scale,
        default=pyramid.levels[0],
    )
    offset = zoom * (torch.arange(size, dtype=torch.float32) - (size - 1) / 2)
    v, u = torch.meshgrid(offset, offset, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    xy = torch.stack(
        [float(centre[0]) + u * cos - v * sin, float(centre[1]) + u * sin + v * cos], dim=-1
    ).reshape(-1, 2)
    return sample_at(level.image, level.from_original(xy)[None], padding="border").view(
        1, 1, size, size
    )


def _snap(
    xy_a: np.ndarray, xy_b: np.ndarray, found_a: np.ndarray, found_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places (N,2) moved to the keypoints that the detector finds of them in both images, where it
    does.
    """
    if not len(found_a) or not len(found_b):
        return xy_a, xy_b
    distances = [
        np.linalg.norm(xy[:, None] - found[None], axis=2)
        for xy, found in ((xy_a, found_a), (xy_b, found_b))
    ]
    both = np.all([distance.min(axis=1) <= SNAP for distance in distances], axis=0)[:, None]
    a, b = (
        found[distance.argmin(axis=1)]
        for distance, found in zip(distances, (found_a, found_b), strict=True)
    )
    return np.where(both, a, xy_a), np.where(both, b, xy_b)


def _apart(xy: np.ndarray, distance: float) -> np.ndarray:
    """Which of the points (N,2) are at least ``distance`` from all chosen before them: (N,)
    bool.
    """
    near = np.linalg.norm(xy[:, None] - xy[None], axis=2) < distance
    kept = np.zeros(len(xy), dtype=bool)
    for i in range(len(xy)):
        kept[i] = not (near[i] & kept).any()
    return kept


def onto_keypoints(
    shared: Shared,
    found_a: np.ndarray,
    found_b: np.ndarray,
    settings: TrackSettings,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Shifts (N,2) of the places in a and b onto keypoints near them: the nearest one of a, and
    what the detector found of it in b.
    """
    moved, onto = np.zeros((len(shared), 2)), np.zeros((len(shared), 2))
    chosen = rng.random(len(shared)) < settings.detected
    if not len(found_a) or not chosen.any():
        return moved, onto
    distance = np.linalg.norm(shared.xy_a[:, None] - found_a[None], axis=2)
    nearest = distance.argmin(axis=1)
    chosen &= distance[np.arange(len(shared)), nearest] <= settings.near
    moved[chosen] = found_a[nearest[chosen]] - shared.xy_a[chosen]
    cos, sin = np.cos(shared.angle) * shared.scale, np.sin(shared.angle) * shared.scale
    onto = np.stack(
        [cos * moved[:, 0] - sin * moved[:, 1], sin * moved[:, 0] + cos * moved[:, 1]], axis=1
    )
    if len(found_b):
        expected = shared.xy_b + onto
        distance = np.linalg.norm(expected[:, None] - found_b[None], axis=2)
        nearest = distance.argmin(axis=1)
        again = chosen & (distance[np.arange(len(shared)), nearest] <= 3.0)
        onto[again] = found_b[nearest[again]] - shared.xy_b[again]
    return moved, onto


def _photometric(patches: Tensor, rng: np.random.Generator, settings: PairSettings) -> Tensor:
    """All patches (N,1,P,P) of one image degraded alike, as its camera would have done."""
    n, _, side, _ = patches.shape
    sheet = (patches.reshape(n * side, side).numpy() * 255).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(degrade(sheet, rng, settings)).float().reshape(n, 1, side, side) / 255


class Mixture(Dataset):
    """Items of two datasets with keys alike: of the second one with probability ``share``, drawn by
    index.

    Item ``i`` depends on ``seed`` and ``i`` alone.
    """

    def __init__(self, first: Dataset, second: Dataset, share: float, *, seed: int = 0):
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {share}")
        self.first, self.second, self.share, self.seed = first, second, share, seed

    def __len__(self) -> int:
        return min(len(self.first), len(self.second))  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        second = np.random.default_rng([self.seed, index, 4]).random() < self.share
        return (self.second if second else self.first)[index]


# ---- validation


@dataclass(frozen=True)
class PosedPair:
    """Two images of a reconstruction to be matched, and their epipolar geometry.

    Attributes:
        images: their paths.
        essential: (3,3), ``x_b^T E x_a = 0`` in normalised coordinates.
        focal: of both in pixels.
        cameras: see ``TrackScene``.
    """

    images: tuple[Path, Path]
    essential: np.ndarray
    focal: tuple[float, float]
    cameras: tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]

    def errors(self, xy_a: np.ndarray, xy_b: np.ndarray) -> np.ndarray:
        """The larger distance to the epipolar line in either image, (N,) pixels, of matches (N,2),
        (N,2).
        """
        a, b = (
            np.c_[camera(xy), np.ones(len(xy))]
            for camera, xy in zip(self.cameras, (xy_a, xy_b), strict=True)
        )
        in_b, in_a = a @ self.essential.T, b @ self.essential
        residual = np.abs((b * in_b).sum(axis=1))
        distances = [
            residual * f / np.linalg.norm(line[:, :2], axis=1)
            for line, f in ((in_a, self.focal[0]), (in_b, self.focal[1]))
        ]
        return np.nan_to_num(np.maximum(*distances), nan=np.inf)


def posed_pairs(scenes: Sequence[TrackScene], count: int, seed: int) -> list[PosedPair]:
    """``count`` pairs of views drawn from the scenes in turn, the wide ones as often as the narrow
    ones.
    """
    rng = np.random.default_rng(seed)
    found: list[PosedPair] = []
    orders = [rng.permutation(len(scene.pairs)).tolist() for scene in scenes]
    while len(found) < count and any(orders):
        for scene, order in zip(scenes, orders, strict=True):
            if order and len(found) < count:
                a, b = scene.pairs[order.pop()]
                rotation = scene.rotation[b] @ scene.rotation[a].T
                x, y, z = scene.translation[b] - rotation @ scene.translation[a]
                essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ rotation
                found.append(
                    PosedPair(
                        (scene.images[a], scene.images[b]),
                        essential,
                        (float(scene.focal[a]), float(scene.focal[b])),
                        (scene.cameras[a], scene.cameras[b]),
                    )
                )
    return found


def correct_share(
    pair: PosedPair, xy_a: Tensor, xy_b: Tensor, index: Tensor, *, threshold: float = 2.0
) -> float:
    """Matches (K,2) within ``threshold`` px of the epipolar lines in both images, over the smaller
    number of keypoints.
    """
    count = min(len(xy_a), len(xy_b))
    if not count or not len(index):
        return 0.0
    errors = pair.errors(xy_a[index[:, 0]].numpy(), xy_b[index[:, 1]].numpy())
    return float((errors <= threshold).sum()) / count
