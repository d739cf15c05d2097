"""COLMAP models with their images as scenes: 3D points, the images that see them, and their scale
there.
"""

from __future__ import annotations

import logging
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import DataError
from ..files import require
from ..image import load_image
from ..pyramid import Pyramid, build_pyramid
from .synthetic import PairSettings

logger = logging.getLogger(__name__)
#: A packed reconstruction: its file, and columns and rows of the table of each camera.
PACKED = "tracks.npz"
GRID_NODES = (65, 49)
#: Images whose pyramids are kept in memory, in pixels of the originals.
CACHED_PIXELS = 60_000_000


@dataclass(frozen=True)
class TrackSettings:
    """Which tracks are trained on, and how. Lengths in pixels, angles in degrees.

    Attributes:
        min_length: fewest images that must show a 3D point.
        max_error: largest mean reprojection error of a 3D point.
        angles: smallest and largest angle between the rays of two cameras to a point, as the median
            over what they share.
        min_shared: fewest 3D points that two images must share.
        detected: share of the places that are keypoints of the detector near a projected 3D point
            instead of the point itself.
        near: how near a keypoint must be.
        rotation: largest rotation of the second patch beyond the true one; small ones are more
            frequent.
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
            gamma=0.3,
            tone=0.15,
            shadow=0.1,
            blur=0.15,
            dark=0.05,
            noise=0.2,
            noise_sigma=12.0,
            noise_power=3.0,
            jpeg=0.2,
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
        observations: for each image the indices (N,) into ``points`` and the positions (N,2), ours
            (the first pixel's centre is 0, 0).
        points: (P,3).
        settings: see ``TrackSettings``.
        cameras: what makes normalised coordinates (x / z, y / z) of positions, for each image;
            needed for ``posed_pairs`` alone.
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
        jacobian = steps[..., :2] / depth_b[:, None, None] - in_b[:, None, :2] * (
            steps[..., 2:] / depth_b[:, None, None] ** 2
        )
        # the rotation nearest to the (2,2) matrix whose columns are the images of the axes
        angle = np.arctan2(
            jacobian[:, 0, 1] - jacobian[:, 1, 0], jacobian[:, 0, 0] + jacobian[:, 1, 1]
        )
        scale = (self.focal[b] / depth_b) / (self.focal[a] / depth_a)
        ahead = (depth_a > 0) & (depth_b > 0)
        return Shared(xy_a[at_a][ahead], xy_b[at_b][ahead], scale[ahead], angle[ahead])


def find_models(folder: str | Path) -> list[tuple[Path, Path]]:
    """COLMAP models below ``folder`` and the folder that holds the images of each.

    A model is a folder with ``images.bin`` or ``images.txt``; its images lie in ``images`` beside
    it or beside a folder above it, or there themselves.

    Raises:
        FileNotFoundError: no such folder.
        DataError: no model, or one whose images cannot be found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of reconstructions at {folder}")
    models = sorted(
        {path.parent for end in ("bin", "txt") for path in folder.rglob(f"points3D.{end}")}
    )
    if not models:
        raise DataError(
            f"{folder} holds no COLMAP model (cameras, images and points3D as .bin or .txt); make "
            "one with COLMAP"
        )
    found = []
    for model in models:
        name = _first_image(model)
        above = [model, *model.parents][:4]
        roots = [
            place
            for parent in above
            for place in (parent / "images", parent)
            if (place / name).is_file()
        ]
        if not roots:
            raise DataError(
                f"{model}: image {name} is not below {above[-1]}; put the photographs into a "
                "folder images beside the model"
            )
        found.append((model, roots[0]))
    return found


def _first_image(model: Path) -> str:
    reconstruction = _read(model)
    names = sorted(image.name for image in reconstruction.images.values())
    if not names:
        raise DataError(f"{model} holds no registered image")
    return names[0]


def _read(model: Path) -> Any:
    pycolmap = require("pycolmap", extra="colmap", purpose="a COLMAP reconstruction")
    try:
        return pycolmap.Reconstruction(str(model))
    except Exception as error:  # pycolmap raises many kinds for damaged files
        raise DataError(
            f"{model} is no readable COLMAP model ({str(error).splitlines()[0]})"
        ) from error


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
        seen = [
            (rows[p.point3D_id], p.xy)
            for p in image.points2D
            if p.has_point3D() and p.point3D_id in rows
        ]
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
        files,
        np.array(rotation).reshape(-1, 3, 3),
        np.array(translation).reshape(-1, 3),
        np.array(focal),
        observations,
        np.array(points, dtype=np.float64).reshape(-1, 3),
        settings,
        cameras,
    )


@dataclass(frozen=True)
class Unprojection:
    """Positions (N,2) of an image file -> normalised coordinates (N,2) of its camera, lens
    distortion taken off.

    Attributes:
        camera: pycolmap's.
        factor: width of the image file over that of the camera.
    """

    camera: Any
    factor: float

    def __call__(self, xy: np.ndarray) -> np.ndarray:
        return np.asarray(
            self.camera.cam_from_img((xy.astype(np.float64) + 0.5) / self.factor)
        ).reshape(-1, 2)


@dataclass(frozen=True)
class GridCamera:
    """What ``Unprojection`` does, from a table: normalised coordinates at the nodes of a grid over
    the image, linear in between.

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
        upper, lower = (
            (1 - x) * self.table[i + k, j] + x * self.table[i + k, j + 1] for k in (0, 1)
        )
        return (1 - y) * upper + y * lower


def pack_scene(scene: TrackScene, folder: Path, *, quality: int = 80) -> None:
    """Write a scene into a folder that needs no COLMAP to be read: ``tracks.npz``, and its images
    as JPEG of a quality.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names, sizes, tables = [], [], []
    for number, (path, camera) in enumerate(zip(scene.images, scene.cameras, strict=True)):
        with Image.open(path) as image:
            names.append(f"{number:04}.jpg")
            sizes.append(image.size)
            image.convert("RGB").save(folder / names[-1], quality=quality)
        axes = (
            np.linspace(0, side - 1, nodes)
            for side, nodes in zip(sizes[-1], GRID_NODES, strict=True)
        )
        nodes = np.stack(np.meshgrid(*axes), axis=-1)
        tables.append(camera(nodes.reshape(-1, 2)).reshape(nodes.shape))
    np.savez_compressed(
        folder / PACKED,
        names=np.array(names),
        sizes=np.array(sizes),
        tables=np.array(tables, dtype=np.float32),
        rotation=scene.rotation,
        translation=scene.translation,
        focal=scene.focal,
        points=scene.points,
        count=[len(index) for index, _ in scene.observations],
        index=np.concatenate([index for index, _ in scene.observations]),
        xy=np.concatenate([xy for _, xy in scene.observations]),
    )


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
        cameras = [
            GridCamera(table, tuple(size))
            for table, size in zip(a["tables"], a["sizes"].tolist(), strict=True)
        ]
        images = [file.parent / name for name in a["names"]]
        return TrackScene(
            images,
            a["rotation"],
            a["translation"],
            a["focal"],
            observations,
            a["points"],
            settings or TrackSettings(),
            cameras,
        )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file} is no readable packed reconstruction ({error}); pack it again"
        ) from error


def read_scenes(
    folders: Sequence[str | Path] | str | Path,
    settings: TrackSettings | None = None,
) -> list[TrackScene]:
    """Every reconstruction below ``folders``, COLMAP models or packed ones (``pack_scene``), that
    has pairs to train on.

    Raises:
        FileNotFoundError, ImportError, DataError: see ``find_models`` and ``read_scene``; or no
            reconstruction has such a pair.
    """
    scenes = []
    for folder in [folders] if isinstance(folders, str | Path) else folders:
        packed = sorted(Path(folder).rglob(PACKED))
        found = [(file, read_packed(file, settings)) for file in packed]
        if not packed:
            found = [
                (model, read_scene(model, images, settings))
                for model, images in find_models(folder)
            ]
        for model, scene in found:
            logger.info(
                "%s: %d images, %d 3D points, %d pairs of views",
                model,
                len(scene.images),
                len(scene.points),
                len(scene.pairs),
            )
            if scene.pairs:
                scenes.append(scene)
    if not scenes:
        raise DataError(
            f"no reconstruction in {folders} has two images that share enough 3D points; see "
            "docs/training.md"
        )
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
