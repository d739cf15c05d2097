"""Reconstructions as training data: the tracks of COLMAP models are pairs of patches, and pairs of positions, that no warp can make.

A 3D point that several photographs show gives the same place under another viewpoint, camera, light and day. Depth and focal length
say how large its surroundings are in each image, and the cameras' poses by what angle they are rotated about the line of sight:
patches are cut at that scale and turned by that angle, so that what is left to learn is what a camera really changes.
"""

from __future__ import annotations

import math
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from ..geometry import sample_at
from ..image import load_image
from ..patches import extract_patches
from ..pyramid import Pyramid, build_pyramid
from ..structs import Keypoints
from .candidates import CANDIDATES
from .losses import OTHER_PLACE, SAME_PLACE
from .patchdata import PatchSettings, turn_alike
from .synthetic import PairSettings, degrade

#: A packed reconstruction: its file, and columns and rows of the table of each camera.
PACKED = "tracks.npz"
GRID_NODES = (65, 49)
#: Images whose pyramids are kept in memory, in pixels of the originals.
CACHED_PIXELS = 60_000_000
#: Crops: fewest tracks both must show, frame without candidates, logarithms of the image's pixels a pixel, and how near a keypoint
#: must be to stand for a track, in pixels of the crop.
CROP_TRACKS = 12
EDGE = 8.0
CROP_ZOOM = (-0.2, 0.8)
SNAP = 2.0
#: Shared points looked at for each patch pair that is wanted.
PLACES = 4
#: Pairs of views tried for one item before the reconstructions are given up.
ATTEMPTS = 20


@dataclass(frozen=True)
class TrackSettings:
    """Which tracks are trained on, and how. Lengths in pixels, angles in degrees.

    Attributes:
        min_length: fewest images that must show a 3D point.
        max_error: largest mean reprojection error of a 3D point.
        angles: smallest and largest angle between the rays of two cameras to a point, as the median over what they share.
        min_shared: fewest 3D points that two images must share.
        detected: share of the places that are keypoints of the detector near a projected 3D point instead of the point itself.
        near: how near a keypoint must be.
        rotation: largest rotation of the second patch beyond the true one; small ones are more frequent.
        photometric: probabilities of gamma, blur, noise and compression (``synthetic.degrade``).
    """

    min_length: int = 3
    max_error: float = 2.0
    angles: tuple[float, float] = (2.0, 60.0)
    min_shared: int = 20
    detected: float = 0.5
    near: float = 6.0
    rotation: float = 25.0
    photometric: PairSettings = field(
        default_factory=lambda: PairSettings(
            gamma=0.3, tone=0.15, shadow=0.1, blur=0.15, dark=0.05, noise=0.2, noise_sigma=12.0, noise_power=3.0, jpeg=0.2
        )
    )


@dataclass(frozen=True)
class Shared:
    """The 3D points that two images share, and how each looks in both.

    Attributes:
        xy_a, xy_b: (N,2) float32 positions.
        scale: (N,) size of the surroundings in b over their size in a, by depth and focal length.
        angle: (N,) rotation of the surroundings from a to b in radians, from +x towards +y.
    """

    xy_a: np.ndarray
    xy_b: np.ndarray
    scale: np.ndarray
    angle: np.ndarray

    def __len__(self) -> int:
        return len(self.xy_a)

    def take(self, index: np.ndarray) -> Shared:
        """Those of ``index``."""
        return Shared(self.xy_a[index], self.xy_b[index], self.scale[index], self.angle[index])


class TrackScene:
    """One COLMAP model with its images, as arrays.

    Args:
        images: the image files.
        rotation, translation: (I,3,3) and (I,3), world to camera.
        focal: (I,) in pixels of the image file.
        observations: for each image the indices (N,) into ``points`` and the positions (N,2), ours (the first pixel's centre is 0, 0).
        points: (P,3).
        settings: see ``TrackSettings``.
        cameras: what makes normalised coordinates (x / z, y / z) of positions, for each image; needed for ``posed_pairs`` alone.
    """

    def __init__(
        self,
        images: Sequence[Path],
        rotation: np.ndarray,
        translation: np.ndarray,
        focal: np.ndarray,
        observations: Sequence[tuple[np.ndarray, np.ndarray]],
        points: np.ndarray,
        settings: TrackSettings,
        cameras: Sequence[Callable[[np.ndarray], np.ndarray]] = (),
    ):
        self.cameras = list(cameras)
        self.images, self.settings = list(images), settings
        self.rotation, self.translation, self.focal = rotation, translation, focal
        self.observations, self.points = list(observations), points
        self.centre = -np.einsum("iab,ia->ib", rotation, translation)  # camera centres, -R^T t

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of images that share enough points under an angle within the limits."""
        seen = np.zeros((len(self.images), len(self.points)), dtype=np.float32)
        for i, (index, _) in enumerate(self.observations):
            seen[i, index] = 1
        together = seen @ seen.T
        found = []
        for a, b in zip(*np.nonzero(np.triu(together >= self.settings.min_shared, 1)), strict=True):
            both = np.nonzero(seen[a] * seen[b])[0]
            rays = [self.points[both] - self.centre[i] for i in (a, b)]
            rays = [ray / np.linalg.norm(ray, axis=1, keepdims=True) for ray in rays]
            angle = np.degrees(np.arccos(np.median((rays[0] * rays[1]).sum(axis=1)).clip(-1, 1)))
            if self.settings.angles[0] <= angle <= self.settings.angles[1]:
                found.append((int(a), int(b)))
        return found

    def shared(self, a: int, b: int) -> Shared:
        """What images ``a`` and ``b`` share."""
        (index_a, xy_a), (index_b, xy_b) = self.observations[a], self.observations[b]
        both, at_a, at_b = np.intersect1d(index_a, index_b, return_indices=True)
        in_a, in_b = (self.points[both] @ self.rotation[i].T + self.translation[i] for i in (a, b))
        depth_a, depth_b = in_a[:, 2], in_b[:, 2]
        # A patch that faces camera a: its two axes, a small step long, seen by camera b.
        a_to_b = self.rotation[b] @ self.rotation[a].T
        steps = a_to_b[:, :2].T[None]  # (1,2,3) the x and y axes of a in the frame of b
        jacobian = steps[..., :2] / depth_b[:, None, None] - in_b[:, None, :2] * (steps[..., 2:] / depth_b[:, None, None] ** 2)
        # the rotation nearest to the (2,2) matrix whose columns are the images of the axes
        angle = np.arctan2(jacobian[:, 0, 1] - jacobian[:, 1, 0], jacobian[:, 0, 0] + jacobian[:, 1, 1])
        scale = (self.focal[b] / depth_b) / (self.focal[a] / depth_a)
        ahead = (depth_a > 0) & (depth_b > 0)
        return Shared(xy_a[at_a][ahead], xy_b[at_b][ahead], scale[ahead], angle[ahead])


def find_models(folder: str | Path) -> list[tuple[Path, Path]]:
    """COLMAP models below ``folder`` and the folder that holds the images of each.

    A model is a folder with ``images.bin`` or ``images.txt``; its images lie in ``images`` beside it or beside a folder above it, or there
    themselves.

    Raises:
        FileNotFoundError: no such folder.
        DataError: no model, or one whose images cannot be found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of reconstructions at {folder}")
    models = sorted({path.parent for end in ("bin", "txt") for path in folder.rglob(f"points3D.{end}")})
    if not models:
        raise DataError(f"{folder} holds no COLMAP model (cameras, images and points3D as .bin or .txt); make one with COLMAP")
    found = []
    for model in models:
        name = _first_image(model)
        above = [model, *model.parents][:4]
        roots = [place for parent in above for place in (parent / "images", parent) if (place / name).is_file()]
        if not roots:
            raise DataError(f"{model}: image {name} is not below {above[-1]}; put the photographs into a folder images beside the model")
        found.append((model, roots[0]))
    return found


def _first_image(model: Path) -> str:
    reconstruction = _read(model)
    names = sorted(image.name for image in reconstruction.images.values())
    if not names:
        raise DataError(f"{model} holds no registered image")
    return names[0]


def _read(model: Path) -> Any:
    try:
        import pycolmap
    except ImportError as error:
        raise ImportError("reading reconstructions needs pycolmap: pip install 'tiepoints[colmap]'") from error
    try:
        return pycolmap.Reconstruction(str(model))
    except Exception as error:  # pycolmap raises many kinds for damaged files
        raise DataError(f"{model} is no readable COLMAP model ({str(error).splitlines()[0]})") from error


def read_scene(model: Path, images: Path, settings: TrackSettings | None = None) -> TrackScene:
    """A COLMAP model as a ``TrackScene``; images that cannot be found or read are left out.

    Raises:
        ImportError: pycolmap is missing.
        DataError: the model is damaged.
    """
    settings = settings or TrackSettings()
    reconstruction = _read(model)
    points: list[np.ndarray] = []
    rows: dict[int, int] = {}
    for number, point in reconstruction.points3D.items():
        if len(point.track.elements) >= settings.min_length and point.error <= settings.max_error:
            rows[number] = len(points)
            points.append(point.xyz)
    files, rotation, translation, focal, observations, cameras = [], [], [], [], [], []
    for image in sorted(reconstruction.images.values(), key=lambda image: image.name):
        path = images / image.name
        camera = reconstruction.cameras[image.camera_id]
        try:
            with Image.open(path) as opened:
                factor = opened.width / camera.width
        except OSError:
            continue
        seen = [(rows[p.point3D_id], p.xy) for p in image.points2D if p.has_point3D() and p.point3D_id in rows]
        index = np.array([row for row, _ in seen], dtype=np.int64)
        xy = np.array([xy for _, xy in seen], dtype=np.float64).reshape(-1, 2)
        index, first = np.unique(index, return_index=True)
        pose = image.cam_from_world()
        files.append(path)
        rotation.append(pose.rotation.matrix())
        translation.append(pose.translation)
        focal.append(camera.mean_focal_length() * factor)
        cameras.append(Unprojection(camera, factor))
        # COLMAP counts from the corner of the first pixel, we from its centre
        observations.append((index, (xy[first] * factor - 0.5).astype(np.float32)))
    return TrackScene(
        files, np.array(rotation).reshape(-1, 3, 3), np.array(translation).reshape(-1, 3), np.array(focal), observations,
        np.array(points, dtype=np.float64).reshape(-1, 3), settings, cameras,
    )  # fmt: skip


@dataclass(frozen=True)
class Unprojection:
    """Positions (N,2) of an image file -> normalised coordinates (N,2) of its camera, lens distortion taken off.

    Attributes:
        camera: pycolmap's.
        factor: width of the image file over that of the camera.
    """

    camera: Any
    factor: float

    def __call__(self, xy: np.ndarray) -> np.ndarray:
        return np.asarray(self.camera.cam_from_img((xy.astype(np.float64) + 0.5) / self.factor)).reshape(-1, 2)


@dataclass(frozen=True)
class GridCamera:
    """What ``Unprojection`` does, from a table: normalised coordinates at the nodes of a grid over the image, linear in between.

    Attributes:
        table: (N,M,2) at N rows and M columns of nodes, the outermost ones at the corners' pixels.
        size: width and height of the image file in pixels.
    """

    table: np.ndarray
    size: tuple[int, int]

    def __call__(self, xy: np.ndarray) -> np.ndarray:
        rows, columns = self.table.shape[:2]
        at = xy / (np.array(self.size) - 1) * [columns - 1, rows - 1]
        low = np.floor(at).astype(int).clip(0, [columns - 2, rows - 2])
        x, y = (at - low).T[..., None]
        i, j = low[:, 1], low[:, 0]
        upper, lower = ((1 - x) * self.table[i + k, j] + x * self.table[i + k, j + 1] for k in (0, 1))
        return (1 - y) * upper + y * lower


def pack_scene(scene: TrackScene, folder: Path, *, quality: int = 80) -> None:
    """Write a scene into a folder that needs no COLMAP to be read: ``tracks.npz``, and its images as JPEG of a quality."""
    folder.mkdir(parents=True, exist_ok=True)
    names, sizes, tables = [], [], []
    for number, (path, camera) in enumerate(zip(scene.images, scene.cameras, strict=True)):
        with Image.open(path) as image:
            names.append(f"{number:04}.jpg")
            sizes.append(image.size)
            image.convert("RGB").save(folder / names[-1], quality=quality)
        axes = (np.linspace(0, side - 1, nodes) for side, nodes in zip(sizes[-1], GRID_NODES, strict=True))
        nodes = np.stack(np.meshgrid(*axes), axis=-1)
        tables.append(camera(nodes.reshape(-1, 2)).reshape(nodes.shape))
    np.savez_compressed(
        folder / PACKED, names=np.array(names), sizes=np.array(sizes), tables=np.array(tables, dtype=np.float32), rotation=scene.rotation,
        translation=scene.translation, focal=scene.focal, points=scene.points, count=[len(index) for index, _ in scene.observations],
        index=np.concatenate([index for index, _ in scene.observations]), xy=np.concatenate([xy for _, xy in scene.observations]),
    )  # fmt: skip


def read_packed(file: Path, settings: TrackSettings | None = None) -> TrackScene:
    """A scene of ``pack_scene``; the limits of tracks are those it was packed with.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with np.load(file) as held:
            a = dict(held)
        ends = np.cumsum(a["count"])[:-1]
        observations = list(zip(np.split(a["index"], ends), np.split(a["xy"], ends), strict=True))
        cameras = [GridCamera(table, tuple(size)) for table, size in zip(a["tables"], a["sizes"].tolist(), strict=True)]
        images = [file.parent / name for name in a["names"]]
        return TrackScene(
            images, a["rotation"], a["translation"], a["focal"], observations, a["points"], settings or TrackSettings(), cameras
        )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} is no readable packed reconstruction ({error}); pack it again") from error


def read_scenes(
    folders: Sequence[str | Path] | str | Path, settings: TrackSettings | None = None, log: Callable[[str], None] | None = None
) -> list[TrackScene]:
    """Every reconstruction below ``folders``, COLMAP models or packed ones (``pack_scene``), that has pairs to train on.

    Raises:
        FileNotFoundError, ImportError, DataError: see ``find_models`` and ``read_scene``; or no reconstruction has such a pair.
    """
    scenes = []
    for folder in [folders] if isinstance(folders, str | Path) else folders:
        packed = sorted(Path(folder).rglob(PACKED))
        found = [(file, read_packed(file, settings)) for file in packed]
        if not packed:
            found = [(model, read_scene(model, images, settings)) for model, images in find_models(folder)]
        for model, scene in found:
            if log is not None:
                log(f"{model}: {len(scene.images)} images, {len(scene.points)} 3D points, {len(scene.pairs)} pairs of views")
            if scene.pairs:
                scenes.append(scene)
    if not scenes:
        raise DataError(f"no reconstruction in {folders} has two images that share enough 3D points; see docs/training.md")
    return scenes


class ImageCache:
    """Gray images and their pyramids by path; the least recently used ones are dropped."""

    def __init__(self, pixels: int = CACHED_PIXELS):
        self.pixels = pixels
        self._kept: OrderedDict[Path, tuple[Pyramid, Tensor]] = OrderedDict()
        self._held = 0

    def get(self, path: Path, detect: Callable[[Tensor], Tensor]) -> tuple[Pyramid, Tensor]:
        """Pyramid of the image, and the positions (N,2) that ``detect`` finds in it."""
        if path in self._kept:
            self._kept.move_to_end(path)
            return self._kept[path]
        image = load_image(path)
        entry = build_pyramid(image, up=0), detect(image)
        self._kept[path] = entry
        self._held += image.numel()
        while self._held > self.pixels and len(self._kept) > 1:
            _, (old, _) = self._kept.popitem(last=False)
            self._held -= old.image.numel()
        return entry


def _first_of_views(
    scenes: Sequence[TrackScene],
    make: Callable[[TrackScene, tuple[int, int], np.random.Generator], dict[str, Tensor] | None],
    rng: np.random.Generator,
    wanted: str,
) -> dict[str, Tensor]:
    """What ``make`` makes of a random pair of views, the first one of which it can; scenes count by the square root of their pairs.

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
    raise DataError(f"{ATTEMPTS} pairs of views in a row had no {wanted}; the reconstructions are too sparse")


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
        return _first_of_views(self.scenes, self._cut, rng, f"{self.settings.per_view} tracks apart")

    def _cut(self, scene: TrackScene, pair: tuple[int, int], rng: np.random.Generator) -> dict[str, Tensor] | None:
        s, t = self.settings, scene.settings
        shared = scene.shared(*pair)
        (pyramid_a, found_a), (pyramid_b, found_b) = (self.cache.get(scene.images[i], self.detect) for i in pair)
        n = len(shared)
        scale = np.minimum(s.scale[0] * 2 ** rng.exponential(s.scale_mean, n), s.scale[1])
        # what is larger in one image must not fall below the finest scale in the other
        scale_a = scale * np.maximum(1, 1 / shared.scale)
        xy_a, xy_b = shared.xy_a.astype(np.float64), shared.xy_b.astype(np.float64)
        if n > PLACES * s.per_view:  # enough to choose from
            few = rng.permutation(n)[: PLACES * s.per_view]
            shared, scale_a, xy_a, xy_b, n = shared.take(few), scale_a[few], xy_a[few], xy_b[few], len(few)
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
        for pyramid, xy, size, angle in ((pyramid_a, xy_a, scale_a, 0 * extra), (pyramid_b, xy_b, scale_b, shared.angle + extra)):
            at, scales, angles = (torch.from_numpy(np.ascontiguousarray(v[order])).float() for v in (xy, size, angle))
            patches.append(extract_patches(pyramid, Keypoints(at, scales, angles, torch.zeros(len(order)))))
        contrast = torch.stack([p.flatten(1).std(dim=1) for p in patches]).amin(dim=0)
        kept = (contrast >= s.min_contrast).nonzero()[: s.per_view, 0]
        if len(kept) < s.per_view:
            return None
        anchor, positive = (_photometric(p[kept], rng, t.photometric) for p in patches)
        rotated = [turn_alike(anchor[i], positive[i], rng, s.symmetric) for i in range(len(kept))]
        return {"anchor": torch.stack([a for a, _ in rotated]), "positive": torch.stack([p for _, p in rotated])}


class TrackCrops(Dataset):
    """Pairs of crops of tracks with the keypoint candidates of each: index -> what ``CandidatePairs`` gives, but for ``H_ab``.

    Both crops show one 3D point at the size and rotation that the cameras imply, each off by a random factor and angle. Candidates are
    the 3D points that both show and other keypoints of the detector, which are negatives of these alone.

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

    def _crop(self, scene: TrackScene, pair: tuple[int, int], rng: np.random.Generator) -> dict[str, Tensor] | None:
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
            pyramid, _ = self.cache.get(scene.images[number], _nothing)
            half = zoom * v.size / 2
            sides_of = np.array([pyramid.image.shape[-1], pyramid.image.shape[-2]]) - 1
            # as much inside the image as the place allows
            centre = xy[at] + rng.uniform(-0.5, 0.5, 2) * half
            centre = np.clip(centre, np.minimum(half, sides_of / 2), np.maximum(sides_of - half, sides_of / 2))
            crop = _crop(pyramid, centre, zoom, angle, v.size)
            gray = degrade((crop[0, 0].numpy() * 255).round().clip(0, 255).astype(np.uint8), rng, v)
            image = torch.from_numpy(gray).float()[None, None] / 255
            rotate = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])  # crop to image
            inside = (xy - centre) @ rotate / zoom + (v.size - 1) / 2
            sides.append((image, inside.astype(np.float32)))
        (image_a, xy_a), (image_b, xy_b) = sides
        kept = np.all([(xy >= EDGE).all(axis=1) & (xy <= v.size - 1 - EDGE).all(axis=1) for xy in (xy_a, xy_b)], axis=0).nonzero()[0]
        kept = rng.permutation(kept)
        kept = kept[_apart(xy_a[kept], SAME_PLACE) & _apart(xy_b[kept], SAME_PLACE)][: 2 * self.count // 3]
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
        near_a, near_b = (torch.cdist(item[f"xy_{s}"], item[f"xy_{s}"][:n]) <= OTHER_PLACE for s in "ab")  # (count,n) bool
        # i and j are certainly two places if i is a track and j lies away from where it is seen in the other image, or the reverse
        apart = torch.zeros(self.count, self.count, dtype=torch.bool)
        apart[:n] = ~near_b.T
        apart[:, :n] &= ~near_a
        apart[n:, :n] = ~near_a[n:]
        item["negative"] = apart
        return item


def _nothing(image: Tensor) -> Tensor:
    """No keypoints: crops are searched after they are cut."""
    return torch.zeros(0, 2)


def _crop(pyramid: Pyramid, centre: np.ndarray, zoom: float, angle: float, size: int) -> Tensor:
    """A square (1,1,size,size) of an image around ``centre``, ``zoom`` pixels of the image a pixel, its x axis rotated by ``angle``."""
    level = max((level for level in pyramid.levels if level.scale <= zoom * 1.1), key=lambda level: level.scale, default=pyramid.levels[0])
    offset = zoom * (torch.arange(size, dtype=torch.float32) - (size - 1) / 2)
    v, u = torch.meshgrid(offset, offset, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    xy = torch.stack([float(centre[0]) + u * cos - v * sin, float(centre[1]) + u * sin + v * cos], dim=-1).reshape(-1, 2)
    return sample_at(level.image, level.from_original(xy)[None], padding="border").view(1, 1, size, size)


def _snap(xy_a: np.ndarray, xy_b: np.ndarray, found_a: np.ndarray, found_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places (N,2) moved to the keypoints that the detector finds of them in both images, where it does."""
    if not len(found_a) or not len(found_b):
        return xy_a, xy_b
    distances = [np.linalg.norm(xy[:, None] - found[None], axis=2) for xy, found in ((xy_a, found_a), (xy_b, found_b))]
    both = np.all([distance.min(axis=1) <= SNAP for distance in distances], axis=0)[:, None]
    a, b = (found[distance.argmin(axis=1)] for distance, found in zip(distances, (found_a, found_b), strict=True))
    return np.where(both, a, xy_a), np.where(both, b, xy_b)


def _apart(xy: np.ndarray, distance: float) -> np.ndarray:
    """Which of the points (N,2) are at least ``distance`` from all chosen before them: (N,) bool."""
    near = np.linalg.norm(xy[:, None] - xy[None], axis=2) < distance
    kept = np.zeros(len(xy), dtype=bool)
    for i in range(len(xy)):
        kept[i] = not (near[i] & kept).any()
    return kept


def onto_keypoints(
    shared: Shared, found_a: np.ndarray, found_b: np.ndarray, settings: TrackSettings, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Shifts (N,2) of the places in a and b onto keypoints near them: the nearest one of a, and what the detector found of it in b."""
    moved, onto = np.zeros((len(shared), 2)), np.zeros((len(shared), 2))
    chosen = rng.random(len(shared)) < settings.detected
    if not len(found_a) or not chosen.any():
        return moved, onto
    distance = np.linalg.norm(shared.xy_a[:, None] - found_a[None], axis=2)
    nearest = distance.argmin(axis=1)
    chosen &= distance[np.arange(len(shared)), nearest] <= settings.near
    moved[chosen] = found_a[nearest[chosen]] - shared.xy_a[chosen]
    cos, sin = np.cos(shared.angle) * shared.scale, np.sin(shared.angle) * shared.scale
    onto = np.stack([cos * moved[:, 0] - sin * moved[:, 1], sin * moved[:, 0] + cos * moved[:, 1]], axis=1)
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
    """Items of two datasets with keys alike: of the second one with probability ``share``, drawn by index.

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
        """The larger distance to the epipolar line in either image, (N,) pixels, of matches (N,2), (N,2)."""
        a, b = (np.c_[camera(xy), np.ones(len(xy))] for camera, xy in zip(self.cameras, (xy_a, xy_b), strict=True))
        in_b, in_a = a @ self.essential.T, b @ self.essential
        residual = np.abs((b * in_b).sum(axis=1))
        distances = [residual * f / np.linalg.norm(line[:, :2], axis=1) for line, f in ((in_a, self.focal[0]), (in_b, self.focal[1]))]
        return np.nan_to_num(np.maximum(*distances), nan=np.inf)


def posed_pairs(scenes: Sequence[TrackScene], count: int, seed: int) -> list[PosedPair]:
    """``count`` pairs of views drawn from the scenes in turn, the wide ones as often as the narrow ones."""
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
                found.append(PosedPair(
                    (scene.images[a], scene.images[b]), essential, (float(scene.focal[a]), float(scene.focal[b])),
                    (scene.cameras[a], scene.cameras[b]),
                ))  # fmt: skip
    return found


def correct_share(pair: PosedPair, xy_a: Tensor, xy_b: Tensor, index: Tensor, *, threshold: float = 2.0) -> float:
    """Matches (K,2) within ``threshold`` px of the epipolar lines in both images, over the smaller number of keypoints."""
    count = min(len(xy_a), len(xy_b))
    if not count or not len(index):
        return 0.0
    errors = pair.errors(xy_a[index[:, 0]].numpy(), xy_b[index[:, 1]].numpy())
    return float((errors <= threshold).sum()) / count
