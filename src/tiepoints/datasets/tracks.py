"""Training data from COLMAP reconstructions: corresponding patches and keypoints of feature tracks.

Tracks show a 3D point under real changes of viewpoint, camera and illumination, which a synthetic
warp cannot produce. The relative scale (from depth and focal length) and the rotation about the
line of sight (from the poses) are known, and patches are extracted at that scale and rotation, so
that only the other changes remain to be learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from ..geometry import distances
from ..pyramid import Pyramid
from .candidates import CANDIDATES, NEGATIVE_DISTANCE, POSITIVE_DISTANCE
from .patch_pairs import PatchSettings, rotate_pair
from .reconstructions import ImageCache, Shared, TrackScene, TrackSettings, UnreadableImage
from .synthetic import PairSettings, UnreadableLog, degrade, unreadable_log

#: Minimum number of tracks that both crops must show.
CROP_TRACKS = 12
#: Width of the border of a crop without candidates, in pixels.
CROP_BORDER = 8.0
#: Range of the natural logarithm of the size of a crop's pixel in pixels of the image.
CROP_ZOOM = (-0.2, 0.8)
#: Maximum distance of a keypoint that replaces a track's position, in pixels of the crop.
SNAP_DISTANCE = 2.0
#: Maximum distance of the keypoint of the second image from the mapped one of the first, in pixels.
REPEATED_DISTANCE = 3.0
#: Shared points drawn per requested patch pair.
POINTS_PER_PATCH = 4
#: Random pairs of images tried per item before all are.
ATTEMPTS = 20


def _draw_item(
    scenes: Sequence[TrackScene],
    extract: Callable[[TrackScene, tuple[int, int], np.random.Generator], dict[str, Tensor] | None],
    rng: np.random.Generator,
    required: str,
    unreadable: UnreadableLog,
) -> dict[str, Tensor]:
    """Apply ``extract`` to random pairs of images until it succeeds, at last to each; unreadable
    images are logged.

    The probability of a scene is proportional to the square root of its number of pairs.

    Raises:
        DataError: no pair had what is ``required``.
    """
    for scene, pair in _random_pairs(scenes, rng):
        try:
            item = extract(scene, pair if rng.random() < 0.5 else pair[::-1], rng)
        except UnreadableImage as error:
            unreadable.add(error.path, error)
            continue
        if item is not None:
            return item
    raise DataError(
        f"no pair of images of the reconstructions had {required}; these are too sparse"
    )


def _random_pairs(
    scenes: Sequence[TrackScene], rng: np.random.Generator
) -> Iterator[tuple[TrackScene, tuple[int, int]]]:
    """``ATTEMPTS`` random pairs of images, and then all in random order, as most of a sparse
    reconstruction may be unusable.
    """
    weight = np.sqrt([len(scene.pairs) for scene in scenes])
    for _ in range(ATTEMPTS):
        scene = scenes[rng.choice(len(scenes), p=weight / weight.sum())]
        yield scene, scene.pairs[rng.integers(len(scene.pairs))]
    every = [(scene, pair) for scene in scenes for pair in scene.pairs]
    for index in rng.permutation(len(every)):
        yield every[index]


class TrackPatches(Dataset):
    """Patch pairs of tracks; each item holds patches of two images of one reconstruction.

    Items: ``anchor, positive`` (per_view,C,size,size) float32 in [0,1], as in ``PatchPairs``.

    Args:
        scenes: reconstructions; the probability of each is proportional to the square root of its
            number of image pairs.
        detect: gray image (1,1,H,W) in [0,1] -> keypoints (N,2), strongest first.
        patches: scales, errors and symmetry of the patches.
        seed: item ``i`` depends only on ``seed``, ``i``, ``scenes`` and ``detect``.
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
        self.unreadable = unreadable_log()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return item ``index``.

        Raises:
            DataError: no pair of images had enough patches.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index, 3])
        return _draw_item(
            self.scenes,
            self._extract,
            rng,
            f"{self.settings.per_view} separate tracks",
            self.unreadable,
        )

    def _extract(
        self, scene: TrackScene, pair: tuple[int, int], rng: np.random.Generator
    ) -> dict[str, Tensor] | None:
        """Patches of one pair of images, or None if there are too few."""
        s, t = self.settings, scene.settings
        shared = scene.shared(*pair)
        (pyramid_a, keypoints_a), (pyramid_b, keypoints_b) = (
            self.cache.get(scene.images[i], self.detect) for i in pair
        )
        n = len(shared)
        scale = np.minimum(s.scale[0] * 2 ** rng.exponential(s.scale_mean, n), s.scale[1])
        # in neither image may the scale be below the smallest one
        scale_a = scale * np.maximum(1, 1 / shared.scale)
        xy_a, xy_b = shared.xy_a.astype(np.float64), shared.xy_b.astype(np.float64)
        if n > POINTS_PER_PATCH * s.per_view:
            subset = rng.permutation(n)[: POINTS_PER_PATCH * s.per_view]
            shared, scale_a = shared.take(subset), scale_a[subset]
            xy_a, xy_b, n = xy_a[subset], xy_b[subset], len(subset)
        shift_a, shift_b = onto_keypoints(shared, keypoints_a.numpy(), keypoints_b.numpy(), t, rng)
        xy_a, xy_b = xy_a + shift_a, xy_b + shift_b
        order = rng.permutation(n)
        order = order[
            _separated(xy_a[order], s.min_distance) & _separated(xy_b[order], s.min_distance)
        ]
        noise = rng.normal(0, 1, (n, 3))
        scale_b = scale_a * shared.scale * np.exp(s.scale_sigma * noise[:, 2])
        # a detected keypoint already has a localization error
        jitter = np.where((np.abs(shift_b).sum(axis=1) > 0)[:, None], 0.3, 1.0) * s.position_sigma
        xy_b = xy_b + jitter * scale_b[:, None] * noise[:, :2]
        u = rng.uniform(-1, 1, n)
        rotation_error = math.radians(t.rotation) * np.sign(u) * np.abs(u) ** 1.5
        patches = []
        for pyramid, xy, size, angle in (
            (pyramid_a, xy_a, scale_a, 0 * rotation_error),
            (pyramid_b, xy_b, scale_b, shared.angle + rotation_error),
        ):
            positions, scales, angles = (
                torch.from_numpy(np.ascontiguousarray(v[order])).float() for v in (xy, size, angle)
            )
            patches.append(s.extract(pyramid, positions, scales, angles))
        kept = s.have_contrast(patches).nonzero()[: s.per_view, 0]
        if len(kept) < s.per_view:
            return None
        anchor, positive = (_photometric(p[kept], rng, t.photometric) for p in patches)
        augmented = [
            rotate_pair(anchor[i], positive[i], rng, s.symmetric) for i in range(len(kept))
        ]
        return {
            "anchor": torch.stack([a for a, _ in augmented]),
            "positive": torch.stack([p for _, p in augmented]),
        }


class TrackCrops(Dataset):
    """Pairs of image crops with keypoint candidates; items are those of ``CandidatePairs``.

    Both crops are centered near the same 3D point, at the relative scale and rotation given by the
    cameras with a random error. Candidates are the 3D points that both crops show and other
    detected keypoints, which are negatives of the 3D points only.

    Args:
        scenes, seed, length: see ``TrackPatches``.
        detect: gray crop (1,1,S,S) in [0,1] -> keypoints (N,2), strongest first.
        views: size, largest rotation and scale error of the crops, photometric changes.
        count: number of candidates per crop.
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
        self.unreadable = unreadable_log()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return item ``index``.

        Raises:
            DataError: no pair of images had crops with enough tracks.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index, 5])
        required = f"crops with {CROP_TRACKS} tracks"
        return _draw_item(self.scenes, self._extract, rng, required, self.unreadable)

    def _crops(
        self, scene: TrackScene, pair: tuple[int, int], shared: Shared, rng: np.random.Generator
    ) -> list[tuple[Tensor, np.ndarray]]:
        """A crop (1,1,S,S) of each image and the positions (N,2) of the shared points in it."""
        v = self.views
        target = int(rng.integers(len(shared)))
        zoom_a = math.exp(rng.uniform(*CROP_ZOOM)) * max(1.0, 1 / shared.scale[target])
        u = rng.uniform(-1, 1)
        rotation_error = math.radians(v.rotation) * math.copysign(abs(u) ** v.rotation_power, u)
        scale_error = math.exp(rng.uniform(math.log(v.scale[0]), math.log(v.scale[1])) / 2)
        zoom_b = zoom_a * shared.scale[target] * scale_error
        crops = []
        for number, xy, zoom, angle in (
            (pair[0], shared.xy_a, zoom_a, 0.0),
            (pair[1], shared.xy_b, zoom_b, shared.angle[target] + rotation_error),
        ):
            pyramid, _ = self.cache.get(scene.images[number], _no_keypoints)
            half = zoom * v.size / 2
            corner = np.array([pyramid.image.shape[-1], pyramid.image.shape[-2]]) - 1
            # the crop should lie inside the image where possible
            center = xy[target] + rng.uniform(-0.5, 0.5, 2) * half
            center = np.clip(
                center, np.minimum(half, corner / 2), np.maximum(corner - half, corner / 2)
            )
            crop = _crop(pyramid, center, zoom, angle, v.size)
            gray = degrade((crop[0, 0].numpy() * 255).round().clip(0, 255).astype(np.uint8), rng, v)
            image = torch.from_numpy(gray).float()[None, None] / 255
            crop_to_image = np.array(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            )
            xy_crop = (xy - center) @ crop_to_image / zoom + (v.size - 1) / 2
            crops.append((image, xy_crop.astype(np.float32)))
        return crops

    def _extract(
        self, scene: TrackScene, pair: tuple[int, int], rng: np.random.Generator
    ) -> dict[str, Tensor] | None:
        """Crops and candidates of one pair of images, or None if there are too few tracks."""
        shared = scene.shared(*pair)
        (image_a, xy_a), (image_b, xy_b) = self._crops(scene, pair, shared, rng)
        last = self.views.size - 1 - CROP_BORDER
        inside = [(xy >= CROP_BORDER).all(axis=1) & (xy <= last).all(axis=1) for xy in (xy_a, xy_b)]
        kept = rng.permutation(np.all(inside, axis=0).nonzero()[0])
        kept = kept[
            _separated(xy_a[kept], POSITIVE_DISTANCE) & _separated(xy_b[kept], POSITIVE_DISTANCE)
        ][: 2 * self.count // 3]
        if len(kept) < CROP_TRACKS:
            return None
        detected_a, detected_b = self.detect(image_a).numpy(), self.detect(image_b).numpy()
        tracks_a, tracks_b = _snap(xy_a[kept], xy_b[kept], detected_a, detected_b)
        item = {"image_a": image_a[0], "image_b": image_b[0]}
        for side, tracks, detected in (("a", tracks_a, detected_a), ("b", tracks_b, detected_b)):
            far = (
                np.linalg.norm(detected[:, None] - tracks[None], axis=2).min(axis=1)
                > NEGATIVE_DISTANCE
            )
            xy = np.concatenate([tracks, detected[far]])[: self.count]
            item[f"xy_{side}"] = torch.full((self.count, 2), float("nan"))
            item[f"xy_{side}"][: len(xy)] = torch.from_numpy(xy)
        item["positive"], item["negative"] = track_labels(
            item["xy_a"], item["xy_b"], torch.tensor(len(kept))
        )
        return item


def track_labels(xy_a: Tensor, xy_b: Tensor, num_tracks: Tensor) -> tuple[Tensor, Tensor]:
    """Positive and negative pairs (...,N,N) bool of candidates (...,N,2), the first ``num_tracks``
    (...) of which are the same tracks in both crops.
    """
    number = torch.arange(xy_a.shape[-2], device=xy_a.device)
    is_track = number < num_tracks[..., None]
    in_a, in_b = is_track[..., None], is_track[..., None, :]  # the candidate of a, and that of b
    positive = (number[:, None] == number) & in_a
    near_a, near_b = (distances(xy, xy) <= NEGATIVE_DISTANCE for xy in (xy_a, xy_b))
    # certainly negative: one candidate is a track, and the other one is far from the position of
    # this track in its own image
    negative = (in_a | in_b) & ~(in_a & near_b) & ~(in_b & near_a)
    return positive, negative


def _no_keypoints(image: Tensor) -> Tensor:
    """Detect nothing: keypoints are detected in the crops."""
    return torch.zeros(0, 2)


def _crop(pyramid: Pyramid, center: np.ndarray, zoom: float, angle: float, size: int) -> Tensor:
    """Extract a square crop (1,1,size,size) around ``center``, its x axis rotated by ``angle``; one
    of its pixels covers ``zoom`` pixels of the image.
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
        [float(center[0]) + u * cos - v * sin, float(center[1]) + u * sin + v * cos], dim=-1
    ).reshape(-1, 2)
    return level.sample(xy).view(1, 1, size, size)


def _snap(
    xy_a: np.ndarray, xy_b: np.ndarray, detected_a: np.ndarray, detected_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Move corresponding positions (N,2) to the nearest keypoints if both are within
    ``SNAP_DISTANCE``.
    """
    if not len(detected_a) or not len(detected_b):
        return xy_a, xy_b
    distances = [
        np.linalg.norm(xy[:, None] - detected[None], axis=2)
        for xy, detected in ((xy_a, detected_a), (xy_b, detected_b))
    ]
    both = np.all([distance.min(axis=1) <= SNAP_DISTANCE for distance in distances], axis=0)[
        :, None
    ]
    a, b = (
        detected[distance.argmin(axis=1)]
        for distance, detected in zip(distances, (detected_a, detected_b), strict=True)
    )
    return np.where(both, a, xy_a), np.where(both, b, xy_b)


def _separated(xy: np.ndarray, distance: float) -> np.ndarray:
    """Greedily select points (N,2) at least ``distance`` from those selected before: (N,) bool."""
    near = np.linalg.norm(xy[:, None] - xy[None], axis=2) < distance
    kept = np.zeros(len(xy), dtype=bool)
    for i in range(len(xy)):
        kept[i] = not (near[i] & kept).any()
    return kept


@dataclass(frozen=True)
class TrackPoints:
    """Shared points of two images and the keypoints detected near them.

    Attributes:
        xy_a, xy_b, scale, angle: see ``reconstructions.Shared``.
        shift_a, shift_b: (N,2) from the points to keypoints. In a to the nearest keypoint, in b to
            the keypoint detected at the same location, or to the mapped position if there is none.
        near: (N,) bool, whether the keypoint of a is near enough; the shifts are 0 elsewhere.
    """

    xy_a: np.ndarray
    xy_b: np.ndarray
    scale: np.ndarray
    angle: np.ndarray
    shift_a: np.ndarray
    shift_b: np.ndarray
    near: np.ndarray


def _nearest(points: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance and index (N,) of the nearest of ``others`` (M,2) to each of ``points`` (N,2)."""
    a, b = (torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)) for v in (points, others))
    # exact also far from the origin
    found, nearest = distances(a, b).min(dim=1)
    return found.numpy(), nearest.numpy()


def track_points(
    shared: Shared, detected_a: np.ndarray, detected_b: np.ndarray, distance: float
) -> TrackPoints:
    """Find the keypoints (N,2), (M,2) of both images near shared points, in a at most ``distance``
    pixels away.
    """
    n = len(shared)
    shift_a, near = np.zeros((n, 2)), np.zeros(n, dtype=bool)
    if len(detected_a) and n:
        found, nearest = _nearest(shared.xy_a, detected_a)
        near = found <= distance
        shift_a[near] = detected_a[nearest[near]] - shared.xy_a[near]
    cos, sin = np.cos(shared.angle) * shared.scale, np.sin(shared.angle) * shared.scale
    dx, dy = shift_a[:, 0], shift_a[:, 1]
    shift_b = np.stack([cos * dx - sin * dy, sin * dx + cos * dy], axis=1)
    if len(detected_b) and n:
        found, nearest = _nearest(shared.xy_b + shift_b, detected_b)
        repeated = near & (found <= REPEATED_DISTANCE)
        shift_b[repeated] = detected_b[nearest[repeated]] - shared.xy_b[repeated]
    return TrackPoints(
        *(shared.xy_a, shared.xy_b, shared.scale, shared.angle, shift_a, shift_b, near)
    )


def onto_keypoints(
    shared: Shared,
    detected_a: np.ndarray,
    detected_b: np.ndarray,
    settings: TrackSettings,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Shifts (N,2) of a random subset of the shared points (``settings.detected``) in a and b to
    detected keypoints near them, see ``TrackPoints``; 0 for the others.
    """
    selected = rng.random(len(shared)) < settings.detected
    points = track_points(shared, detected_a, detected_b, settings.near)
    selected &= points.near
    return points.shift_a * selected[:, None], points.shift_b * selected[:, None]


def _photometric(patches: Tensor, rng: np.random.Generator, settings: PairSettings) -> Tensor:
    """Degrade all patches (N,C,P,P) of one image as one, because they come from one exposure."""
    sheet = (patches.reshape(-1, patches.shape[-1]).numpy() * 255).round().clip(0, 255)
    degraded = degrade(sheet.astype(np.uint8), rng, settings)
    return torch.from_numpy(degraded).float().reshape(patches.shape) / 255


class Mixture(Dataset):
    """Mixture of two datasets with the same keys: an item of ``second`` with probability ``share``.

    The choice for item ``i`` depends only on ``seed`` and ``i``.

    Raises:
        ValueError: ``share`` outside of [0, 1].
    """

    def __init__(self, first: Dataset, second: Dataset, share: float, *, seed: int = 0):
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {share}")
        self.first, self.second, self.share, self.seed = first, second, share, seed

    def __len__(self) -> int:
        return min(len(self.first), len(self.second))  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        use_second = np.random.default_rng([self.seed, index, 4]).random() < self.share
        return (self.second if use_second else self.first)[index]


# ---- validation


@dataclass(frozen=True)
class ReconstructionPair:
    """Two images of a reconstruction and their epipolar geometry.

    Attributes:
        images: paths of the images.
        T_ab: (3,4) float64 [R | t], from coordinates of the first camera to those of the second.
        essential: (3,3), ``x_b^T E x_a = 0`` in normalized coordinates.
        focal: focal lengths of both cameras in pixels.
        cameras: see ``TrackScene``.
    """

    images: tuple[Path, Path]
    T_ab: np.ndarray
    essential: np.ndarray
    focal: tuple[float, float]
    cameras: tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]

    def errors(self, xy_a: np.ndarray, xy_b: np.ndarray) -> np.ndarray:
        """Epipolar error (N,) of matches (N,2), (N,2): the larger of the distances to the epipolar
        lines in both images, in pixels.
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


def reconstruction_pairs(
    scenes: Sequence[TrackScene], count: int, seed: int
) -> list[ReconstructionPair]:
    """Draw ``count`` pairs of images from the scenes in turn, uniformly from the pairs of each."""
    rng = np.random.default_rng(seed)
    pairs: list[ReconstructionPair] = []
    orders = [rng.permutation(len(scene.pairs)).tolist() for scene in scenes]
    while len(pairs) < count and any(orders):
        for scene, order in zip(scenes, orders, strict=True):
            if order and len(pairs) < count:
                a, b = scene.pairs[order.pop()]
                rotation = scene.rotation[b] @ scene.rotation[a].T
                translation = scene.translation[b] - rotation @ scene.translation[a]
                x, y, z = translation
                essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ rotation
                pairs.append(
                    ReconstructionPair(
                        (scene.images[a], scene.images[b]),
                        np.c_[rotation, translation],
                        essential,
                        (float(scene.focal[a]), float(scene.focal[b])),
                        (scene.cameras[a], scene.cameras[b]),
                    )
                )
    return pairs


def correct_share(
    pair: ReconstructionPair, xy_a: Tensor, xy_b: Tensor, index: Tensor, *, threshold: float = 2.0
) -> float:
    """Fraction of correct matches: those of ``index`` (K,2) with an epipolar error of at most
    ``threshold`` px, over the smaller number of keypoints.
    """
    count = min(len(xy_a), len(xy_b))
    if not count or not len(index):
        return 0.0
    errors = pair.errors(xy_a[index[:, 0]].numpy(), xy_b[index[:, 1]].numpy())
    return float((errors <= threshold).sum()) / count
