"""Pairs of views with keypoint candidates, drawn on the training device: the fast counterpart of
``candidates.CandidatePairs`` and ``tracks.TrackCrops``.

What differs from those datasets: the light, noise and JPEG of the views are those of
``patch_changes``, and an occluding object covers a disc of the second view, instead of moving
through both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import distances
from ..keypoints import clear_border, local_maxima, refine
from .candidates import (
    CANDIDATE_POOL,
    CANDIDATE_WINDOW,
    CANDIDATES,
    NEGATIVE_DISTANCE,
    POSITIVE_DISTANCE,
    candidate_pairs,
)
from .device_images import DeviceImages, DeviceSampler, TrackTable, random_angles, rotations
from .patch_changes import change_patches, mixed_gray, uniform
from .reconstructions import TrackScene
from .synthetic import LAYER_RADIUS, PRESETS, PairSettings, draw_transform
from .tracks import CROP_BORDER, CROP_ZOOM, SNAP_DISTANCE, track_labels

#: Maximum number of shared points of a pair of images.
PAIR_POINTS = 2000
#: Shared points drawn per candidate; those near others are dropped.
DRAWN = 2


class CropSampler(DeviceSampler):
    """Batches of pairs of views with candidates, drawn and sampled on one device.

    Items: whole batches of the items of ``CandidatePairs``, B pairs of views of side S:
    ``image_a, image_b`` (B,1,S,S) float32 in [0,1], ``xy_a, xy_b`` (B,N,2), padded with NaN,
    ``positive, negative`` (B,N,N) bool. Use it with a batch size of one and without worker
    processes.

    Args:
        photos, scenes, device, views, share, seed, length, threads: see ``PatchSampler``.
        net: gray images (B,1,S,S) -> score maps, on the device; detects the candidates.
        warps: view changes of the warped pairs, and size, rotation, error of the scale and changes
            in light of all pairs.
        count: N, number of candidates per view.

    Raises:
        DataError: no image can be read, or they do not fit into the memory of the device.
    """

    def __init__(
        self,
        photos: Sequence[Path],
        scenes: Sequence[TrackScene],
        net: nn.Module,
        device: torch.device,
        *,
        views: int = 8,
        share: float = 0.5,
        warps: PairSettings | None = None,
        seed: int = 0,
        length: int = 1,
        threads: int = 1,
        count: int = CANDIDATES,
    ):
        self.warps = warps or PRESETS["dense-upright"]
        self.net, self.count = net, count
        images = DeviceImages(
            *(photos, scenes, device),
            detect=None,
            max_side=self.warps.max_side,
            pair_points=PAIR_POINTS,
            seed=seed,
            threads=threads,
        )
        super().__init__(images, views=views, share=share, seed=seed, length=length)

    def _batch(
        self, num_warps: int, num_tracks: int, rng: np.random.Generator, generator: torch.Generator
    ) -> dict[str, Tensor]:
        parts = []
        if num_warps:
            parts.append(self._warped(num_warps, rng, generator))
        if num_tracks and self.tracks is not None:
            parts.append(self._tracked(num_tracks, self.tracks, rng, generator))
        batch = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        swapped = uniform((len(batch["image_a"]),), 0, 1, generator) < 0.5
        for name in ("image", "xy"):
            a, b = batch[f"{name}_a"], batch[f"{name}_b"]
            mask = swapped.view(-1, *[1] * (a.ndim - 1))
            batch[f"{name}_a"], batch[f"{name}_b"] = (
                torch.where(mask, b, a),
                torch.where(mask, a, b),
            )
        for name in ("positive", "negative"):
            table = batch[name]
            batch[name] = torch.where(swapped[:, None, None], table.transpose(1, 2), table)
        return batch

    # ---- warps

    def _warped(
        self, groups: int, rng: np.random.Generator, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Pairs of views of photographs with random homographies."""
        w, device, half = self.warps, self.device, (self.warps.size - 1) / 2
        image = self._photos(groups, generator)
        transforms = [draw_transform(rng, w) for _ in range(groups)]
        # from a to b, with the centers of the views at the origin
        H_ab = torch.from_numpy(np.stack(transforms)).float().to(device)
        shift = uniform((groups, 2), -w.jitter, w.jitter, generator)
        H_ab[:, :2] += shift[:, :, None] * H_ab[:, 2:]
        H_ba = torch.linalg.inv(H_ab)
        H_ba = H_ba / H_ba[:, 2:, 2:]
        size = self.store.size[image]
        random = uniform((groups, 2), 0, 1, generator) * (size - 1)
        center = _inside(random, torch.full_like(random, w.size / 2), size)
        grid = self._grid()
        zoom = torch.linalg.det(H_ba[:, :2, :2]).abs().sqrt()
        color_a = self.store.sample(image, grid + center[:, None, None], torch.ones_like(zoom))
        mapped, _ = _mapped(H_ba, grid.view(1, -1, 2).expand(groups, -1, 2))
        positions = (mapped + center[:, None]).view(groups, w.size, w.size, 2)
        color_b = self.store.sample(image, positions, zoom)
        color_b, uncovered = self._occluded(color_b, generator)
        usual = torch.zeros(groups, device=device)
        images = [
            self._changed(color, probability, generator)
            for color, probability in ((color_a, usual), (color_b, usual + w.color))
        ]
        detected = self._detected(torch.cat(images)).chunk(2)
        kept = []
        for xy, homography, is_a in zip(detected, (H_ab, H_ba), (True, False), strict=True):
            seen, valid = _mapped(homography, xy - half)
            valid &= (seen.abs() <= half).all(dim=-1)
            # in the photograph, outside of which a view repeats the border
            in_photo = (xy - half if is_a else seen) + center[:, None]
            valid &= (in_photo >= 0).all(dim=-1) & (in_photo <= size[:, None] - 1).all(dim=-1)
            valid &= uncovered((seen if is_a else xy - half) + half)
            kept.append(_first(xy, valid, self.count))
        xy_a, xy_b = kept
        positive, negative = candidate_pairs(xy_a - half, xy_b - half, H_ab)
        return _item(images, xy_a, xy_b, positive, negative)

    def _occluded(
        self, color: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Views (B,3,S,S) of which some are covered by a disc of another view, and a function that
        tells which positions (B,N,2) are not covered.
        """
        groups, size = len(color), self.warps.size
        chosen = uniform((groups,), 0, 1, generator) < self.warps.layers
        radius = uniform((groups,), *LAYER_RADIUS, generator) * size * chosen
        center = uniform((groups, 2), 0, size - 1, generator)

        def distance(xy: Tensor) -> Tensor:
            return (xy - center[:, None]).norm(dim=-1) - radius[:, None]

        pixels = (self._grid() + (size - 1) / 2).view(1, -1, 2).expand(groups, -1, 2)
        weight = (0.5 - distance(pixels)).clamp(0, 1).view(groups, 1, size, size)
        weight = weight * chosen[:, None, None, None]
        covered = torch.lerp(color, color.roll(1, dims=0).flip(-1), weight)
        return covered, lambda xy: (distance(xy) > CROP_BORDER) | ~chosen[:, None]

    # ---- tracks

    def _tracked(
        self,
        groups: int,
        table: TrackTable,
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Crops of pairs of images at the relative scale and rotation of one shared point."""
        w, device, half = self.warps, self.device, (self.warps.size - 1) / 2
        pair = table.draw(groups, rng)
        count = table.count[pair]
        target = table.take(pair, (uniform((groups,), 0, 1, generator) * count).long())
        low, high = (math.log(s) / 2 for s in w.scale)
        zoom_a = torch.exp(uniform((groups,), *CROP_ZOOM, generator))
        zoom_a = zoom_a * (1 / target["scale"]).clamp(min=1)
        zoom_b = zoom_a * target["scale"] * torch.exp(uniform((groups,), low, high, generator))
        angle_b = target["angle"] + random_angles(groups, w.rotation, w.rotation_power, generator)
        # points near each other are dropped, so more are drawn than there are candidates
        limit = int(count.max())
        order = torch.rand(groups, limit, generator=generator, device=device)
        order = order.masked_fill(torch.arange(limit, device=device) >= count[:, None], 2.0)
        rows = table.take(pair, order.argsort(dim=1).clamp(max=count[:, None] - 1))
        valid = torch.arange(limit, device=device) < count[:, None]
        images, points = [], []
        for side, zoom, angle in (("a", zoom_a, 0 * angle_b), ("b", zoom_b, angle_b)):
            image = table.images[pair][:, "ab".index(side)]
            to_image = rotations(angle) * zoom[:, None, None]
            reach = (zoom * w.size / 2)[:, None].expand(-1, 2)
            offset = uniform((groups, 2), -0.5, 0.5, generator) * reach
            center = _inside(target[f"xy_{side}"] + offset, reach, self.store.size[image])
            positions = torch.einsum("nab,pqb->npqa", to_image, self._grid())
            color = self.store.sample(image, positions + center[:, None, None], zoom)
            images.append(self._changed(color, torch.zeros(groups, device=device), generator))
            xy = (rows[f"xy_{side}"] - center[:, None]) @ rotations(angle)
            xy = xy / zoom[:, None, None] + half
            points.append(xy)
            last = w.size - 1 - CROP_BORDER
            valid &= (xy >= CROP_BORDER).all(dim=-1) & (xy <= last).all(dim=-1)
        most = 2 * self.count // 3
        xy = _first(torch.cat(points, dim=-1), valid, DRAWN * most)
        xy = _first(xy, _separated(xy, POSITIVE_DISTANCE), most)
        detected = self._detected(torch.cat(images)).chunk(2)
        tracks = _snapped(list(xy.split(2, dim=-1)), list(detected))
        kept = []
        for own, found in zip(tracks, detected, strict=True):
            far = ~(distances(found, own) <= NEGATIVE_DISTANCE).any(dim=-1)  # NaN is not near
            candidates = torch.cat([own, found], dim=1)
            usable = torch.cat([torch.ones_like(own[..., 0], dtype=torch.bool), far], dim=1)
            kept.append(_first(candidates, usable & ~candidates.isnan().any(-1), self.count))
        xy_a, xy_b = kept
        num_tracks = (~tracks[0].isnan().any(dim=-1)).sum(dim=1)
        positive, negative = track_labels(xy_a, xy_b, num_tracks)
        return _item(images, xy_a, xy_b, positive, negative)

    # ---- both

    def _grid(self) -> Tensor:
        """Positions (S,S,2) of the pixels of a view relative to its center."""
        axis = torch.arange(self.warps.size, device=self.device) - (self.warps.size - 1) / 2
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        return torch.stack([x, y], dim=-1)

    def _changed(self, color: Tensor, mixed: Tensor, generator: torch.Generator) -> Tensor:
        """Gray views (B,1,S,S) of color ones, with random changes of light, noise and JPEG; the
        channels are mixed with probability ``mixed`` (B,).
        """
        group = torch.arange(len(color), device=self.device)
        gray = mixed_gray(color, group, mixed, generator)
        step = torch.ones(len(color), device=self.device)
        return change_patches(gray, group, step, [self.warps] * len(color), generator)[:, None]

    def _detected(self, images: Tensor) -> Tensor:
        """Keypoints (B,P,2) of gray images (B,1,S,S), strongest first, padded with NaN; P is at
        most ``CANDIDATE_POOL``.
        """
        maps = self.net(images).float()
        inner = clear_border(torch.ones_like(maps[:1]), int(CROP_BORDER)) > 0
        found = local_maxima(maps, CANDIDATE_WINDOW) & inner
        side = maps.shape[-1]
        pool = min(CANDIDATE_POOL, side * side)
        scores, place = maps.masked_fill(~found, -math.inf).flatten(1).topk(pool, dim=1)
        # all maps one below the other; the border keeps their neighborhoods apart
        row = place // side + side * torch.arange(len(maps), device=self.device)[:, None]
        xy = refine(maps.reshape(-1, side), torch.stack([place % side, row], dim=-1).view(-1, 2))
        xy = xy.view(len(maps), pool, 2)
        xy[..., 1] -= side * torch.arange(len(maps), device=self.device)[:, None]
        return xy.masked_fill((scores == -math.inf)[..., None], math.nan)


def _item(
    images: list[Tensor], xy_a: Tensor, xy_b: Tensor, positive: Tensor, negative: Tensor
) -> dict[str, Tensor]:
    a, b = images
    return {
        **{"image_a": a, "image_b": b, "xy_a": xy_a, "xy_b": xy_b},
        **{"positive": positive, "negative": negative},
    }


def _inside(center: Tensor, reach: Tensor, size: Tensor) -> Tensor:
    """Move centers (B,2) so that windows of half side ``reach`` (B,2) lie inside images of ``size``
    (B,2) where possible.
    """
    corner = size - 1
    low = torch.minimum(reach, corner / 2)
    return torch.maximum(torch.minimum(center, torch.maximum(corner - reach, corner / 2)), low)


def _mapped(H: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Points (B,N,2) mapped by homographies (B,3,3), and which are in front (B,N)."""
    mapped = F.pad(xy, (0, 1), value=1.0) @ H.transpose(1, 2)
    depth = mapped[..., 2]
    return mapped[..., :2] / depth.clamp(min=0.05)[..., None], depth > 0.05


def _first(values: Tensor, valid: Tensor, count: int) -> Tensor:
    """The first ``count`` valid ones of values (B,N,D), in their order, padded with NaN."""
    values = values.masked_fill(~valid[..., None], math.nan)
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    values = values.gather(1, order[..., None].expand(-1, -1, values.shape[-1]))
    return F.pad(values, (0, 0, 0, count - values.shape[1]), value=math.nan)


def _separated(xy: Tensor, distance: float) -> Tensor:
    """Points (B,N,4) of two views without an earlier one nearer than ``distance`` in either."""
    near = torch.zeros(*xy.shape[:2], xy.shape[1], dtype=torch.bool, device=xy.device)
    for one in xy.split(2, dim=-1):
        near |= distances(one, one) < distance  # false for NaN
    return ~near.tril(-1).any(dim=-1) & ~xy.isnan().any(dim=-1)


def _snapped(tracks: list[Tensor], detected: list[Tensor]) -> list[Tensor]:
    """Corresponding positions (B,N,2) moved to the nearest keypoints (B,M,2) where both are within
    ``SNAP_DISTANCE``.
    """
    nearest = []
    near = torch.ones(tracks[0].shape[:2], dtype=torch.bool, device=tracks[0].device)
    for xy, found in zip(tracks, detected, strict=True):
        distance, index = distances(xy, found).nan_to_num(nan=math.inf).min(dim=-1)
        near &= distance <= SNAP_DISTANCE
        nearest.append(found.gather(1, index[..., None].expand(-1, -1, 2)))
    return [
        torch.where(near[..., None], moved, xy) for moved, xy in zip(nearest, tracks, strict=True)
    ]
