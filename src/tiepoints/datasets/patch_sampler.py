"""Patch pairs drawn on the training device: the fast counterpart of ``patch_pairs.PatchPairs`` and
``tracks.TrackPatches``.

All images are kept in the memory of the device (``ImageStore``), and each item is a whole batch, of
which all patches are sampled at once. A GPU draws a thousand pairs in a few milliseconds, which
takes a processor core several seconds.

What differs from those datasets: a warp is the affine map of each patch with a random curvature
instead of one homography of the view, patches are changed in light and noise after sampling
(``patch_changes``), and occluded ones show another patch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..decode import image_size
from ..errors import DataError
from ..filters import to_gray
from ..memory import available_memory
from ..progress import track
from .image_store import ImageStore
from .patch_changes import change_patches, mixed_gray, normal, occlude, uniform
from .patch_pairs import PatchSettings
from .reconstructions import TrackScene, TrackSettings
from .synthetic import PRESETS, PairSettings, draw_tilt, read_photo, unreadable_log
from .tracks import TrackPoints, track_points

#: Locations drawn per requested patch pair; near duplicates and flat patches are dropped.
DRAWN = 4 / 3
#: Largest change of an element of the affine map of a patch, besides that of its view, and standard
#: deviation of the curvature of a patch: displacement at its edge in half sides.
AFFINE_JITTER = 0.12
CURVATURE = 0.05
#: Bytes of the memory of the device per pixel of the images while they are stored.
BYTES_PER_PIXEL = 14
#: Range of the size of a pixel of a view in pixels of the photograph; below 1 it is 1.
RESOLUTION = (0.7, 2.2)
#: Limits per reconstruction, drawn at random: pairs of images, and shared points of each.
SCENE_PAIRS = 600
PAIR_POINTS = 400
#: Factor on the position error of a detected keypoint, which has one already.
SNAPPED_JITTER = 0.3


@dataclass
class _Draw:
    """N patch pairs to be sampled, on the device.

    Attributes:
        group: (N,) index of the pair of views.
        image: (2,N) indices of the images.
        xy: (2,N,2) centers in pixels of the images.
        matrix: (2,N,2,2) from the grid [-1,1] of a patch to pixels of the image.
        curvature: (2,N,2,3) coefficients of the displacement by xx, xy and yy of the grid.
        resolution: (2,N) size of a pixel of the view in pixels of the image.
    """

    group: Tensor
    image: Tensor
    xy: Tensor
    matrix: Tensor
    curvature: Tensor
    resolution: Tensor


class PatchSampler(Dataset):
    """Batches of patch pairs, drawn and sampled on one device.

    Items: whole batches ``anchor, positive`` (N,1,size,size) float32 in [0,1] on the device, where
    N is at most ``views * settings.per_view``: flat patches and neighbors of others are dropped.
    Use it with a batch size of one and without worker processes.

    Args:
        photos: image files of warped pairs.
        scenes: reconstructions of pairs of different images, all with the same settings; may be
            empty.
        detect: gray image (1,1,H,W) in [0,1], on the device -> keypoints (N,2), strongest first.
        device: of the images and the patches.
        views: number of pairs of views of a batch.
        share: fraction of the pairs that come from reconstructions, if there are any.
        settings: scales, errors and symmetry of the patches.
        warps: view changes of the warped pairs.
        seed: item ``i`` depends only on ``seed``, ``i``, the images and the device.
        length: number of batches.
        threads: threads that decode the images.

    Raises:
        DataError: no image can be read, or they do not fit into the memory of the device.
    """

    def __init__(
        self,
        photos: Sequence[Path],
        scenes: Sequence[TrackScene],
        detect: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        views: int = 24,
        share: float = 0.5,
        settings: PatchSettings | None = None,
        warps: PairSettings | None = None,
        seed: int = 0,
        length: int = 1,
        threads: int = 1,
    ):
        self.settings = settings or PatchSettings()
        self.warps = warps or PRESETS["patches-upright"]
        self.views, self.share, self.seed, self.length = views, share, seed, length
        self.device = device
        scene_images = [path for scene in scenes for path in scene.images]
        _check_memory([*photos, *scene_images], len(photos), self.warps.max_side, device)
        read = _read_all([*photos, *scene_images], len(photos), self.warps.max_side, threads)
        keypoints: list[Tensor] = []
        self.index: dict[Path, int] = {}

        def images() -> Iterator[np.ndarray]:
            for path, image in read:
                # of an image that is a photograph, too, this is the one of the scene, not reduced
                self.index[path] = len(keypoints)
                keypoints.append(_keypoints(image, detect, device))
                yield image

        try:
            self.store = ImageStore(images(), device)
        except ValueError as error:
            raise DataError("none of the images for training can be read") from error
        self.num_photos = sum(path in self.index for path in photos)
        if not self.num_photos:
            raise DataError("none of the photographs for training can be read")
        counts = torch.tensor([len(k) for k in keypoints[: self.num_photos]], device=device)
        self.keypoints = torch.cat(keypoints[: self.num_photos])  # of all photographs
        self.keypoint_count = counts
        self.keypoint_start = counts.cumsum(0) - counts
        self.tracks = self._track_table(scenes, [k.cpu().numpy() for k in keypoints])

    def with_length(self, length: int) -> PatchSampler:
        """The same with another number of batches; the images are shared."""
        other = object.__new__(PatchSampler)
        other.__dict__.update(self.__dict__, length=length)
        return other

    def __len__(self) -> int:
        return self.length

    @torch.no_grad()
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"batch {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index, 6])
        generator = torch.Generator(self.device).manual_seed(self.seed * 10**9 + index)
        share = 0.0 if self.tracks is None else self.share
        num_tracks = int((rng.random(self.views) < share).sum())
        draws, changes = [], []
        if num_tracks < self.views:
            draws.append(self._warped(self.views - num_tracks, rng, generator))
            changes += [self.warps] * (self.views - num_tracks)
        if num_tracks and self.tracks is not None:
            draws.append(self._tracked(num_tracks, self.tracks, rng, generator))
            changes += [self.tracks.photometric] * num_tracks
        return self._sampled(_joined(draws), changes, generator)

    @property
    def drawn(self) -> int:
        """Number of locations drawn per pair of views."""
        return round(DRAWN * self.settings.per_view)

    # ---- warps

    def _warped(self, groups: int, rng: np.random.Generator, generator: torch.Generator) -> _Draw:
        """Locations of photographs and their random affine maps."""
        s, w, count, device = self.settings, self.warps, self.drawn, self.device
        n = groups * count
        group = torch.arange(groups, device=device).repeat_interleave(count)
        image = torch.randint(self.num_photos, (groups,), generator=generator, device=device)[group]
        number = (uniform((n,), 0, 1, generator) * self.keypoint_count[image]).long()
        number = (self.keypoint_start[image] + number).clamp(max=max(0, len(self.keypoints) - 1))
        random = uniform((n, 2), 0, 1, generator) * (self.store.size[image] - 1)
        use_random = uniform((n,), 0, 1, generator) < s.random_part
        use_random |= self.keypoint_count[image] == 0
        detected = self.keypoints[number] if len(self.keypoints) else random
        xy = torch.where(use_random[:, None], random, detected)
        scale_a = self._scales(n, generator)
        noise = normal((n, 3), generator)
        scale_b = scale_a * torch.exp(s.scale_sigma * noise[:, 2])
        xy_b = xy + s.position_sigma * scale_b[:, None] * noise[:, :2]
        angle, axis, skew = (
            limit * torch.sign(u) * u.abs() ** power
            for u, limit, power in zip(
                uniform((3, groups), -1, 1, generator),
                (math.radians(w.rotation), math.pi, w.skew),
                (w.rotation_power, 1.0, w.skew_power),
                strict=True,
            )
        )
        shear = torch.eye(2, device=device).repeat(groups, 1, 1)
        shear[:, 0, 1] = skew
        view = _rotation(axis) @ shear @ _rotation(angle - axis)
        if w.tilt > 1:
            tilts = np.stack([draw_tilt(rng, w.tilt) for _ in range(groups)])
            view = torch.from_numpy(tilts).float().to(device) @ view
        jitter = torch.eye(2, device=device) + uniform((n, 2, 2), -1, 1, generator) * AFFINE_JITTER
        jitter = jitter / torch.linalg.det(jitter).sqrt()[:, None, None]
        maps = torch.stack([torch.eye(2, device=device).expand(n, 2, 2), view[group] @ jitter])
        scales = torch.stack([scale_a, scale_b])[..., None, None]
        curvature = torch.zeros(2, n, 2, 3, device=device)
        curvature[1] = CURVATURE * normal((n, 2, 3), generator)
        low, high = (math.log(r) for r in RESOLUTION)
        resolution = torch.exp(uniform((2, groups), low, high, generator)).clamp(min=1)
        return _Draw(
            group,
            torch.stack([image, image]),
            torch.stack([xy, xy_b]),
            maps * scales * s.half_side,
            curvature,
            resolution[:, group],
        )

    def _scales(self, count: int, generator: torch.Generator) -> Tensor:
        """Scales (N,) of patches, see ``PatchSettings``."""
        s = self.settings
        octaves = -s.scale_mean * torch.log(uniform((count,), 1e-9, 1, generator))
        return (s.scale[0] * 2**octaves).clamp(max=s.scale[1])

    # ---- tracks

    def _track_table(
        self, scenes: Sequence[TrackScene], keypoints: list[np.ndarray]
    ) -> _TrackTable | None:
        """The shared points of random pairs of images of each scene; None without a readable
        pair.
        """
        rng = np.random.default_rng([self.seed, 8])
        images, points, weights = [], [], []
        for scene in scenes:
            pairs = [p for p in scene.pairs if all(scene.images[i] in self.index for i in p)]
            chosen = rng.permutation(len(pairs))[:SCENE_PAIRS].tolist()
            # in all, a scene is drawn with the square root of its number of pairs
            weights += [math.sqrt(len(pairs)) / len(chosen) for _ in chosen]
            for a, b in (pairs[i] for i in chosen):
                own = [self.index[scene.images[i]] for i in (a, b)]
                shared = scene.shared(a, b)
                shared = shared.take(rng.permutation(len(shared))[:PAIR_POINTS])
                detected_a, detected_b = (keypoints[k] for k in own)
                points.append(track_points(shared, detected_a, detected_b, scene.settings.near))
                images.append(own)
        if not images:
            return None
        return _TrackTable(scenes[0].settings, images, points, weights, self.device)

    def _tracked(
        self,
        groups: int,
        table: _TrackTable,
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> _Draw:
        """Locations of shared points, see ``tracks.TrackPatches``."""
        s, t, count, device = self.settings, table.settings, self.drawn, self.device
        n = groups * count
        group = torch.arange(groups, device=device).repeat_interleave(count)
        drawn = rng.choice(len(table.weights), groups, p=table.weights)
        pair = torch.from_numpy(drawn).to(device)[group]
        # a point that is drawn twice is dropped as a neighbor of itself
        number = (uniform((n,), 0, 1, generator) * table.count[pair]).long()
        row = {key: value[table.start[pair] + number] for key, value in table.rows.items()}
        snapped = row["near"] & (uniform((n,), 0, 1, generator) < t.detected)
        xy_a, xy_b = (
            row[f"xy_{side}"] + row[f"shift_{side}"] * snapped[:, None] for side in ("a", "b")
        )
        ratio = row["scale"]
        scale_a = self._scales(n, generator) * (1 / ratio).clamp(min=1)
        noise = normal((n, 3), generator)
        scale_b = scale_a * ratio * torch.exp(s.scale_sigma * noise[:, 2])
        jitter = torch.where(snapped, SNAPPED_JITTER, 1.0) * s.position_sigma * scale_b
        u = uniform((n,), -1, 1, generator)
        error = math.radians(t.rotation) * torch.sign(u) * u.abs() ** 1.5
        maps = torch.stack([_rotation(angle) for angle in (0 * error, row["angle"] + error)])
        scales = torch.stack([scale_a, scale_b])[..., None, None]
        return _Draw(
            group,
            table.images[pair].T,
            torch.stack([xy_a, xy_b + jitter[:, None] * noise[:, :2]]),
            maps * scales * s.half_side,
            torch.zeros(2, n, 2, 3, device=device),
            torch.ones(2, n, device=device),
        )

    # ---- patches

    def _sampled(
        self, draw: _Draw, changes: list[PairSettings], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The patches of all locations that are inside, apart from each other, and not flat."""
        s, groups = self.settings, len(changes)
        n = len(draw.group)
        symmetry = _symmetries(n, s.symmetric, generator)
        axis = (2 * torch.arange(s.size, device=self.device) + 1) / s.size - 1
        v, u = torch.meshgrid(axis, axis, indexing="ij")
        grid = torch.einsum("nab,bpq->npqa", symmetry, torch.stack([u, v]))
        x, y = grid.unbind(-1)
        squares = torch.stack([x * x, x * y, y * y], dim=-1)
        colors, steps = [], []
        for side in range(2):
            bent = grid + torch.einsum("npqk,nak->npqa", squares, draw.curvature[side])
            xy = draw.xy[side][:, None, None] + torch.einsum(
                "nab,npqb->npqa", draw.matrix[side], bent
            )
            step = torch.linalg.det(draw.matrix[side]).abs().sqrt() * 2 / s.size
            fine = torch.maximum(step, draw.resolution[side])
            colors.append(self.store.sample(draw.image[side], xy, fine))
            steps.append(step / draw.resolution[side])
        layers = torch.tensor([change.layers for change in changes], device=self.device)
        colors[1] = occlude(colors[1], draw.group, layers, generator)
        color = torch.tensor([change.color for change in changes], device=self.device)
        grays = [
            mixed_gray(colors[side], draw.group, probability, generator)
            for side, probability in enumerate((torch.zeros_like(color), color))
        ]
        patches = [
            change_patches(gray, draw.group, step, changes, generator)
            for gray, step in zip(grays, steps, strict=True)
        ]
        kept = s.have_contrast([p[:, None] for p in patches]) & self._inside(draw)
        kept &= _apart(draw, s.min_distance, kept)
        kept &= _rank(draw.group, kept, groups) <= s.per_view
        swapped = (uniform((groups,), 0, 1, generator) < 0.5)[draw.group][:, None, None]
        anchor = torch.where(swapped, patches[1], patches[0])[kept][:, None]
        positive = torch.where(swapped, patches[0], patches[1])[kept][:, None]
        if len(anchor) < 2:
            raise DataError(
                "the photographs have too few locations with enough contrast; they are too small "
                "or too smooth"
            )
        return {"anchor": anchor, "positive": positive}

    def _inside(self, draw: _Draw) -> Tensor:
        """Locations (N,) that are inside both images."""
        inside = [
            (xy >= 0).all(dim=1) & (xy <= self.store.size[image] - 1).all(dim=1)
            for xy, image in zip(draw.xy, draw.image, strict=True)
        ]
        return inside[0] & inside[1]


class _TrackTable:
    """The shared points of pairs of images of reconstructions, on the device."""

    def __init__(
        self,
        settings: TrackSettings,
        images: list[list[int]],
        points: list[TrackPoints],
        weights: list[float],
        device: torch.device,
    ):
        self.settings = settings
        # nothing is mixed or occluded here: the images differ in light and occlusion already
        self.photometric = dataclasses.replace(settings.photometric, color=0.0, layers=0.0)
        self.images = torch.tensor(images, device=device)  # (pairs,2)
        self.weights = np.array(weights) / sum(weights)
        self.count = torch.tensor([len(p.scale) for p in points], device=device)
        self.start = self.count.cumsum(0) - self.count
        self.rows: dict[str, Tensor] = {}
        for f in dataclasses.fields(TrackPoints):
            values = torch.from_numpy(np.concatenate([getattr(p, f.name) for p in points]))
            values = values if values.dtype == torch.bool else values.float()
            self.rows[f.name] = values.to(device)


def _check_memory(
    paths: Sequence[Path], num_photos: int, max_side: int, device: torch.device
) -> None:
    """Raise DataError if the images, the first ``num_photos`` reduced to ``max_side``, do not fit
    into the memory of the device.
    """
    pixels = 0.0
    for number, path in enumerate(paths):
        with suppress(OSError, DataError):  # logged when it is read
            width, height = image_size(path)
            reduced = max_side / max(width, height) if number < num_photos and max_side else 1.0
            pixels += width * height * min(1.0, reduced) ** 2
    needed = pixels * BYTES_PER_PIXEL
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if needed > free:
        raise DataError(
            f"{len(paths)} images need {needed / 1e9:.1f} GB of memory on the device, "
            f"{free / 1e9:.1f} are free; use fewer or smaller images, or do not draw on the device"
        )


def _read_all(
    paths: Sequence[Path], num_photos: int, max_side: int, threads: int
) -> Iterator[tuple[Path, np.ndarray]]:
    """Each path with its image (H,W,3) uint8, the first ``num_photos`` reduced to ``max_side``;
    unreadable ones are logged and skipped.
    """

    def read(number: int) -> np.ndarray | None:
        path = paths[number]
        try:
            if number < num_photos:
                return read_photo(path, max_side)
            return read_photo(path)
        except Exception as error:  # decoders raise various types for damaged files
            unreadable_log().add(path, error)
            return None

    with ThreadPoolExecutor(max(1, threads)) as pool:
        images = pool.map(read, range(len(paths)))
        for path, image in track(
            zip(paths, images, strict=True), total=len(paths), unit="image", label="read"
        ):
            if image is not None:
                yield path, image


def _keypoints(
    image: np.ndarray, detect: Callable[[Tensor], Tensor], device: torch.device
) -> Tensor:
    """Keypoints (N,2) of an image (H,W,3) uint8 on the device."""
    values = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float() / 255
    return detect(to_gray(values)).to(device)


def _joined(draws: list[_Draw]) -> _Draw:
    """One draw of several, whose groups are numbered consecutively."""
    first, groups = 0, []
    for draw in draws:
        groups.append(draw.group + first)
        first += int(draw.group[-1]) + 1
    return _Draw(
        torch.cat(groups),
        *(
            torch.cat([getattr(draw, f.name) for draw in draws], dim=1)
            for f in dataclasses.fields(_Draw)[1:]
        ),
    )


def _rotation(angle: Tensor) -> Tensor:
    """Rotation matrices (N,2,2)."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], dim=-2)


def _symmetries(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """Matrices (N,2,2) that rotate by a random multiple of 90 degrees and mirror, each with the
    given probability.
    """
    chosen = uniform((2, count), 0, 1, generator) < probability
    turns = torch.randint(1, 4, (count,), generator=generator, device=generator.device) * chosen[0]
    matrix = _rotation(turns * (math.pi / 2)).round()
    mirror = torch.ones(count, 2, device=matrix.device)
    mirror[:, 0] = torch.where(chosen[1], -1.0, 1.0)
    return matrix * mirror[:, None, :]


def _apart(draw: _Draw, distance: float, valid: Tensor) -> Tensor:
    """Locations (N,) without an earlier valid one of the same pair of views nearer than
    ``distance`` pixels, in both images.
    """
    apart = torch.ones_like(valid)
    same = (draw.group[:, None] == draw.group) & valid
    earlier = same.tril(-1)
    for xy in draw.xy:
        apart &= ~((torch.cdist(xy, xy) < distance) & earlier).any(dim=1)
    return apart


def _rank(group: Tensor, kept: Tensor, groups: int) -> Tensor:
    """Rank (N,) from 1 of each kept location in its group; groups are consecutive."""
    total = kept.cumsum(0)
    before = torch.zeros(groups, dtype=total.dtype, device=total.device)
    count = torch.zeros_like(before).index_add_(0, group, kept.to(total.dtype))
    before = count.cumsum(0) - count
    return total - before[group]
