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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..geometry import distances
from .device_images import DeviceImages, DeviceSampler, TrackTable, random_angles, rotations
from .patch_changes import change_patches, mixed_gray, normal, occlude, uniform
from .patch_pairs import PatchSettings
from .reconstructions import TrackScene
from .synthetic import PRESETS, PairSettings, draw_tilt

#: Locations drawn per requested patch pair; near duplicates and flat patches are dropped.
DRAWN = 4 / 3
#: Largest change of an element of the affine map of a patch, besides that of its view, and standard
#: deviation of the curvature of a patch: displacement at its edge in half sides.
AFFINE_JITTER = 0.12
CURVATURE = 0.05
#: Largest such displacement in half sides, also of larger patches.
MAX_CURVED = 0.5
#: Range of the size of a pixel of a view in pixels of the photograph; below 1 it is 1.
RESOLUTION = (0.7, 2.2)
#: Maximum number of shared points of a pair of images.
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


class PatchSampler(DeviceSampler):
    """Batches of patch pairs, drawn and sampled on one device.

    Items: whole batches ``anchor, positive`` (N,C,size,size) float32 in [0,1] on the device, where
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
        images = DeviceImages(
            *(photos, scenes, device),
            detect=detect,
            max_side=self.warps.max_side,
            pair_points=PAIR_POINTS,
            seed=seed,
            threads=threads,
        )
        super().__init__(images, views=views, share=share, seed=seed, length=length)

    def _batch(
        self, num_warps: int, num_tracks: int, rng: np.random.Generator, generator: torch.Generator
    ) -> dict[str, Tensor]:
        draws, changes = [], []
        if num_warps:
            draws.append(self._warped(num_warps, rng, generator))
            changes += [self.warps] * num_warps
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
        image = self._photos(groups, generator)[group]
        keypoints, counts = self.images.keypoints, self.images.keypoint_count[image]
        number = (uniform((n,), 0, 1, generator) * counts).long()
        number += self.images.keypoint_start[image]
        number = number.clamp(max=max(0, len(keypoints) - 1))
        random = uniform((n, 2), 0, 1, generator) * (self.store.size[image] - 1)
        use_random = uniform((n,), 0, 1, generator) < s.random_part
        use_random |= counts == 0
        detected = keypoints[number] if len(keypoints) else random
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
        view = rotations(axis) @ shear @ rotations(angle - axis)
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

    def _tracked(
        self,
        groups: int,
        table: TrackTable,
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> _Draw:
        """Locations of shared points, see ``tracks.TrackPatches``."""
        s, t, count, device = self.settings, table.settings, self.drawn, self.device
        n = groups * count
        group = torch.arange(groups, device=device).repeat_interleave(count)
        pair = table.draw(groups, rng)[group]
        # a point that is drawn twice is dropped as a neighbor of itself
        number = (uniform((n,), 0, 1, generator) * table.count[pair]).long()
        row = table.take(pair, number)
        snapped = row["near"] & (uniform((n,), 0, 1, generator) < t.detected)
        xy_a, xy_b = (
            row[f"xy_{side}"] + row[f"shift_{side}"] * snapped[:, None] for side in ("a", "b")
        )
        ratio = row["scale"]
        scale_a = self._scales(n, generator) * (1 / ratio).clamp(min=1)
        noise = normal((n, 3), generator)
        scale_b = scale_a * ratio * torch.exp(s.scale_sigma * noise[:, 2])
        jitter = torch.where(snapped, SNAPPED_JITTER, 1.0) * s.position_sigma * scale_b
        error = random_angles(n, t.rotation, 1.5, generator)
        maps = torch.stack([rotations(angle) for angle in (0 * error, row["angle"] + error)])
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
        symmetry = _symmetries(len(draw.group), s.symmetric, generator)
        state = generator.get_state()
        channels = []
        for reach in s.reach:
            generator.set_state(state)  # all patches of a location change alike
            channels.append(self._changed(draw, symmetry, reach, changes, generator))
        patches = [torch.stack(views, dim=1) for views in zip(*channels, strict=True)]
        kept = s.have_contrast(patches) & self._inside(draw)
        kept &= _apart(draw, s.min_distance, kept)
        kept &= _rank(draw.group, kept, groups) <= s.per_view
        swapped = (uniform((groups,), 0, 1, generator) < 0.5)[draw.group][:, None, None, None]
        anchor = torch.where(swapped, patches[1], patches[0])[kept]
        positive = torch.where(swapped, patches[0], patches[1])[kept]
        if len(anchor) < 2:
            raise DataError(
                "the photographs have too few locations with enough contrast; they are too small "
                "or too smooth"
            )
        return {"anchor": anchor, "positive": positive}

    def _changed(
        self,
        draw: _Draw,
        symmetry: Tensor,
        reach: float,
        changes: list[PairSettings],
        generator: torch.Generator,
    ) -> list[Tensor]:
        """The patches (N,size,size) of both views, ``reach`` times as large as usual, with changes
        of light, cameras and occlusion.
        """
        s = self.settings
        axis = (2 * torch.arange(s.size, device=self.device) + 1) / s.size - 1
        v, u = torch.meshgrid(axis, axis, indexing="ij")
        grid = reach * torch.einsum("nab,bpq->npqa", symmetry, torch.stack([u, v]))
        x, y = grid.unbind(-1)
        squares = torch.stack([x * x, x * y, y * y], dim=-1)
        colors, steps = [], []
        for side in range(2):
            curved = torch.einsum("npqk,nak->npqa", squares, draw.curvature[side])
            bent = grid + curved.clamp(-MAX_CURVED * reach, MAX_CURVED * reach)
            xy = draw.xy[side][:, None, None] + torch.einsum(
                "nab,npqb->npqa", draw.matrix[side], bent
            )
            step = torch.linalg.det(draw.matrix[side]).abs().sqrt() * 2 * reach / s.size
            fine = torch.maximum(step, draw.resolution[side])
            colors.append(self.store.sample(draw.image[side], xy, fine))
            steps.append(step / draw.resolution[side])
        layers = torch.tensor([change.layers for change in changes], device=self.device)
        colors[1] = occlude(colors[1], draw.group, layers, generator, reach)
        color = torch.tensor([change.color for change in changes], device=self.device)
        grays = [
            mixed_gray(colors[side], draw.group, probability, generator)
            for side, probability in enumerate((torch.zeros_like(color), color))
        ]
        return [
            change_patches(gray, draw.group, step, changes, generator, reach)
            for gray, step in zip(grays, steps, strict=True)
        ]

    def _inside(self, draw: _Draw) -> Tensor:
        """Locations (N,) that are inside both images."""
        inside = [
            (xy >= 0).all(dim=1) & (xy <= self.store.size[image] - 1).all(dim=1)
            for xy, image in zip(draw.xy, draw.image, strict=True)
        ]
        return inside[0] & inside[1]


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


def _symmetries(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """Matrices (N,2,2) that rotate by a random multiple of 90 degrees and mirror, each with the
    given probability.
    """
    chosen = uniform((2, count), 0, 1, generator) < probability
    turns = torch.randint(1, 4, (count,), generator=generator, device=generator.device) * chosen[0]
    matrix = rotations(turns * (math.pi / 2)).round()
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
        apart &= ~((distances(xy, xy) < distance) & earlier).any(dim=1)
    return apart


def _rank(group: Tensor, kept: Tensor, groups: int) -> Tensor:
    """Rank (N,) from 1 of each kept location in its group; groups are consecutive."""
    total = kept.cumsum(0)
    before = torch.zeros(groups, dtype=total.dtype, device=total.device)
    count = torch.zeros_like(before).index_add_(0, group, kept.to(total.dtype))
    before = count.cumsum(0) - count
    return total - before[group]
