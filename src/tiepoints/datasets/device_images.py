"""Images for training in the memory of a device, with the keypoints and the shared points that
patches (``patch_sampler``) and crops (``crop_sampler``) are drawn from.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
from .patch_changes import uniform
from .reconstructions import TrackScene, TrackSettings
from .synthetic import read_photo, unreadable_log
from .tracks import TrackPoints, track_points

#: Bytes of the memory of the device per pixel of the images while they are stored.
BYTES_PER_PIXEL = 14
#: Limit of pairs of images per reconstruction, drawn at random.
SCENE_PAIRS = 600


class DeviceImages:
    """Photographs and images of reconstructions on a device.

    Args:
        photos: image files.
        scenes: reconstructions of pairs of different images, all with the same settings; may be
            empty.
        device: of the images.
        detect: gray image (1,1,H,W) in [0,1], on the device -> keypoints (N,2), strongest first;
            None: keypoints are not needed.
        max_side: photographs are reduced to this longest side; 0: not.
        pair_points: maximum number of shared points of each pair of images, drawn at random.
        seed: of the random choice of pairs and points.
        threads: threads that decode the images.

    Attributes:
        store: the images, first the photographs.
        num_photos: number of photographs that could be read.
        keypoints: (K,2) of all photographs; those of photograph i are ``keypoint_count[i]`` from
            ``keypoint_start[i]`` on.
        tracks: see ``TrackTable``; None without a pair of readable images.

    Raises:
        DataError: no image can be read, or they do not fit into the memory of the device.
    """

    def __init__(
        self,
        photos: Sequence[Path],
        scenes: Sequence[TrackScene],
        device: torch.device,
        *,
        detect: Callable[[Tensor], Tensor] | None,
        max_side: int,
        pair_points: int,
        seed: int,
        threads: int = 1,
    ):
        self.device = device
        scene_images = [path for scene in scenes for path in scene.images]
        _check_memory([*photos, *scene_images], len(photos), max_side, device)
        read = _read_all([*photos, *scene_images], len(photos), max_side, threads)
        keypoints: list[Tensor] = []
        index: dict[Path, int] = {}

        def images() -> Iterator[np.ndarray]:
            for path, image in read:
                # of an image that is a photograph, too, this is the one of the scene, not reduced
                index[path] = len(keypoints)
                keypoints.append(_keypoints(image, detect, device))
                yield image

        try:
            self.store = ImageStore(images(), device)
        except ValueError as error:
            raise DataError("none of the images for training can be read") from error
        self.num_photos = sum(path in index for path in photos)
        if not self.num_photos:
            raise DataError("none of the photographs for training can be read")
        counts = torch.tensor([len(k) for k in keypoints[: self.num_photos]], device=device)
        self.keypoints = torch.cat(keypoints[: self.num_photos])
        self.keypoint_count = counts
        self.keypoint_start = counts.cumsum(0) - counts
        rng = np.random.default_rng([seed, 8])
        detected = [k.cpu().numpy() for k in keypoints]
        self.tracks = _track_table(scenes, index, detected, pair_points, rng, device)


class TrackTable:
    """The shared points of pairs of images of reconstructions, on a device.

    Attributes:
        settings: of the reconstructions.
        photometric: photometric changes; nothing is mixed or occluded, because the images differ
            in light and occlusion already.
        images: (P,2) index of the images of each pair.
        count, start: (P,) number of the points of each pair, and the first of its rows.
        rows: arrays of ``TrackPoints``, all pairs one after the other.
    """

    def __init__(
        self,
        settings: TrackSettings,
        images: list[list[int]],
        points: list[TrackPoints],
        weights: list[float],
        device: torch.device,
    ):
        self.settings = settings
        self.photometric = dataclasses.replace(settings.photometric, color=0.0, layers=0.0)
        self.images = torch.tensor(images, device=device)
        self.weights = np.array(weights) / sum(weights)
        self.count = torch.tensor([len(p.scale) for p in points], device=device)
        self.start = self.count.cumsum(0) - self.count
        self.rows: dict[str, Tensor] = {}
        for f in dataclasses.fields(TrackPoints):
            values = torch.from_numpy(np.concatenate([getattr(p, f.name) for p in points]))
            values = values if values.dtype == torch.bool else values.float()
            self.rows[f.name] = values.to(device)

    def draw(self, count: int, rng: np.random.Generator) -> Tensor:
        """Draw ``count`` pairs of images (count,); the probability of a reconstruction is
        proportional to the square root of its number of pairs.
        """
        drawn = rng.choice(len(self.weights), count, p=self.weights)
        return torch.from_numpy(drawn).to(self.count.device)

    def take(self, pair: Tensor, number: Tensor) -> dict[str, Tensor]:
        """Rows of the points ``number`` (N,...) of the pairs ``pair`` (N,)."""
        start = self.start[pair].view(-1, *[1] * (number.ndim - 1))
        return {key: value[start + number] for key, value in self.rows.items()}


class DeviceSampler(Dataset, ABC):
    """Batches drawn from ``DeviceImages``: each item is a whole batch on the device, so it is used
    with a batch size of one and without worker processes.

    Args:
        images: to draw from.
        views: number of pairs of views of a batch.
        share: fraction of the pairs that come from reconstructions, if there are any.
        seed: item ``i`` depends only on ``seed``, ``i``, the images and the device.
        length: number of batches.
    """

    def __init__(self, images: DeviceImages, *, views: int, share: float, seed: int, length: int):
        self.images, self.device = images, images.device
        self.store, self.tracks = images.store, images.tracks
        self.views, self.share, self.seed, self.length = views, share, seed, length

    def with_length(self, length: int) -> DeviceSampler:
        """The same with another number of batches; the images are shared."""
        other = object.__new__(type(self))
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
        return self._batch(self.views - num_tracks, num_tracks, rng, generator)

    @abstractmethod
    def _batch(
        self, num_warps: int, num_tracks: int, rng: np.random.Generator, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """A batch of ``num_warps`` warped pairs and ``num_tracks`` pairs of reconstructions."""

    def _photos(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` photographs (count,), different ones as long as there are any: a batch
        would take the same point of two views of one photograph as a negative.
        """
        number = self.images.num_photos
        rounds = [
            torch.randperm(number, generator=generator, device=self.device)
            for _ in range(0, max(count, 1), number)
        ]
        return torch.cat(rounds)[:count]


def random_angles(count: int, largest: float, power: float, generator: torch.Generator) -> Tensor:
    """Random angles (count,) in radians of up to ``largest`` degrees to either side; with
    ``power`` > 1 small ones are more frequent.
    """
    u = uniform((count,), -1, 1, generator)
    return math.radians(largest) * torch.sign(u) * u.abs() ** power


def rotations(angle: Tensor) -> Tensor:
    """Rotation matrices (N,2,2)."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], dim=-2)


def _track_table(
    scenes: Sequence[TrackScene],
    index: dict[Path, int],
    keypoints: list[np.ndarray],
    pair_points: int,
    rng: np.random.Generator,
    device: torch.device,
) -> TrackTable | None:
    """The shared points of random pairs of images of each scene; None without a readable pair."""
    images, points, weights = [], [], []
    for scene in scenes:
        pairs = [p for p in scene.pairs if all(scene.images[i] in index for i in p)]
        chosen = rng.permutation(len(pairs))[:SCENE_PAIRS].tolist()
        # in all, a scene is drawn with the square root of its number of pairs
        weights += [math.sqrt(len(pairs)) / len(chosen) for _ in chosen]
        for a, b in (pairs[i] for i in chosen):
            own = [index[scene.images[i]] for i in (a, b)]
            shared = scene.shared(a, b)
            shared = shared.take(rng.permutation(len(shared))[:pair_points])
            detected_a, detected_b = (keypoints[k] for k in own)
            points.append(track_points(shared, detected_a, detected_b, scene.settings.near))
            images.append(own)
    if not images:
        return None
    return TrackTable(scenes[0].settings, images, points, weights, device)


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
    image: np.ndarray, detect: Callable[[Tensor], Tensor] | None, device: torch.device
) -> Tensor:
    """Keypoints (N,2) of an image (H,W,3) uint8 on the device."""
    if detect is None:
        return torch.zeros(0, 2, device=device)
    values = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float() / 255
    return detect(to_gray(values)).to(device)
