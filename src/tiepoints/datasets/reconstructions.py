"""COLMAP models with their images: 3D points, the images that observe them, and their scale in each
image.
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..decode import image_size
from ..errors import DataError, first_line
from ..files import require
from ..image import load_image
from ..pyramid import Pyramid, build_pyramid
from .synthetic import PairSettings

logger = logging.getLogger(__name__)

#: File of a packed reconstruction, and columns and rows of the undistortion table of each camera.
PACKED = "tracks.npz"
GRID_NODES = (65, 49)
#: File that names the folder of the images of the models below it, relative or absolute.
IMAGE_FOLDER = "image_folder.txt"
#: Size of the image cache, in pixels of the original images.
CACHED_PIXELS = 60_000_000


@dataclass(frozen=True)
class TrackSettings:
    """Selection and augmentation of tracks for training. Lengths in pixels, angles in degrees.

    Attributes:
        min_length: minimum number of images that observe a 3D point.
        max_error: maximum mean reprojection error of a 3D point.
        angles: smallest and largest triangulation angle of a pair of images, the median over their
            shared points.
        min_shared: minimum number of 3D points shared by two images.
        detected: probability that a projected 3D point is replaced by a detected keypoint near it.
        near: maximum distance of that keypoint.
        rotation: largest rotation error of the second patch; small ones are more frequent.
        photometric: photometric changes (``synthetic.degrade``).
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
    """The 3D points that two images share, and their relative scale and rotation.

    Attributes:
        xy_a, xy_b: (N,2) float32 positions in pixels.
        scale: (N,) local scale in b over that in a, from depth and focal length.
        angle: (N,) local rotation from a to b in radians, from +x towards +y.
    """

    xy_a: np.ndarray
    xy_b: np.ndarray
    scale: np.ndarray
    angle: np.ndarray

    def __len__(self) -> int:
        return len(self.xy_a)

    def take(self, index: np.ndarray) -> Shared:
        """Select the points ``index``."""
        return Shared(self.xy_a[index], self.xy_b[index], self.scale[index], self.angle[index])


class TrackScene:
    """One COLMAP model with its images, as arrays.

    Args:
        images: the image files.
        rotation, translation: (I,3,3) and (I,3), world to camera.
        focal: (I,) in pixels of the image file.
        observations: for each image the indices (N,) into ``points`` and the positions (N,2) in
            pixels (the center of the first pixel is 0, 0).
        points: (P,3).
        settings: see ``TrackSettings``.
        cameras: for each image, a function from positions (N,2) to normalized coordinates
            (x / z, y / z); needed only for ``reconstruction_pairs``.
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
        #: Images of which no pairs are used.
        self.excluded: set[int] = set()
        self._centers = -np.einsum("iab,ia->ib", rotation, translation)  # camera centers, -R^T t

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of images with enough shared points and a triangulation angle within the limits."""
        visible = np.zeros((len(self.images), len(self.points)), dtype=np.float32)
        for i, (index, _) in enumerate(self.observations):
            visible[i, index] = 1
        num_shared = visible @ visible.T
        pairs = []
        enough = np.triu(num_shared >= self.settings.min_shared, 1)
        excluded = list(self.excluded)
        enough[excluded] = enough[:, excluded] = False
        for a, b in zip(*np.nonzero(enough), strict=True):
            both = np.nonzero(visible[a] * visible[b])[0]
            rays = [self.points[both] - self._centers[i] for i in (a, b)]
            rays = [ray / np.linalg.norm(ray, axis=1, keepdims=True) for ray in rays]
            angle = np.degrees(np.arccos(np.median((rays[0] * rays[1]).sum(axis=1)).clip(-1, 1)))
            if self.settings.angles[0] <= angle <= self.settings.angles[1]:
                pairs.append((int(a), int(b)))
        return pairs

    def shared(self, a: int, b: int) -> Shared:
        """Points shared by the images ``a`` and ``b``, in front of both cameras."""
        (index_a, xy_a), (index_b, xy_b) = self.observations[a], self.observations[b]
        both, rows_a, rows_b = np.intersect1d(index_a, index_b, return_indices=True)
        in_a, in_b = (self.points[both] @ self.rotation[i].T + self.translation[i] for i in (a, b))
        depth_a, depth_b = in_a[:, 2], in_b[:, 2]
        # Jacobian of the projection into b of a small patch parallel to the image plane of a
        a_to_b = self.rotation[b] @ self.rotation[a].T
        steps = a_to_b[:, :2].T[None]  # (1,2,3) x and y axes of camera a in the frame of b
        jacobian = steps[..., :2] / depth_b[:, None, None] - in_b[:, None, :2] * (
            steps[..., 2:] / depth_b[:, None, None] ** 2
        )
        # rotation nearest to the (2,2) matrix whose columns are the projected axes
        angle = np.arctan2(
            jacobian[:, 0, 1] - jacobian[:, 1, 0], jacobian[:, 0, 0] + jacobian[:, 1, 1]
        )
        scale = (self.focal[b] / depth_b) / (self.focal[a] / depth_a)
        in_front = (depth_a > 0) & (depth_b > 0)
        shared = Shared(xy_a[rows_a], xy_b[rows_b], scale, angle)
        return shared.take(in_front)


def find_models(folder: str | Path) -> list[tuple[Path, Path]]:
    """Find the COLMAP models below ``folder`` and the image folder of each.

    A model is a folder with ``points3D.bin`` or ``points3D.txt``. Its images are in the folder of
    the model or in one of the three folders above it, in a subfolder ``images`` of one of them, or
    in the folder that a file ``IMAGE_FOLDER`` in one of them names. Below a folder with such a
    file, a result of ``reconstruct``, only ``sparse`` is read.

    Returns:
        (model, image folder) pairs, sorted.

    Raises:
        FileNotFoundError: no such folder.
        DataError: no model, or one whose images are not found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of reconstructions at {folder}")
    searched = folder / "sparse" if (folder / IMAGE_FOLDER).is_file() else folder
    models = sorted(
        {path.parent for suffix in ("bin", "txt") for path in searched.rglob(f"points3D.{suffix}")}
    )
    if not models:
        raise DataError(
            f"{folder} contains no COLMAP model (cameras, images and points3D as .bin or .txt); "
            "create one with COLMAP"
        )
    with_images = []
    for model in models:
        name = _first_image(model)
        parents = [model, *model.parents][:4]
        roots = [
            root
            for parent in parents
            for root in (parent / "images", parent, *_named_folder(parent))
            if (root / name).is_file()
        ]
        if not roots:
            raise DataError(
                f"{model}: image {name} is not below {parents[-1]}; put the photographs into a "
                "folder images next to the model"
            )
        with_images.append((model, roots[0]))
    return with_images


def _named_folder(parent: Path) -> list[Path]:
    """The folder that the file ``IMAGE_FOLDER`` of ``parent`` names, if there is one."""
    file = parent / IMAGE_FOLDER
    return [parent / os.fsdecode(file.read_bytes()).strip()] if file.is_file() else []


def _first_image(model: Path) -> str:
    """Name of the first registered image."""
    reconstruction = _read(model)
    names = sorted(image.name for image in reconstruction.images.values())
    if not names:
        raise DataError(f"{model} contains no registered image")
    return names[0]


def _read(model: Path) -> Any:
    pycolmap = require("pycolmap", extra="colmap", purpose="a COLMAP reconstruction")
    try:
        return pycolmap.Reconstruction(str(model))
    except Exception as error:  # pycolmap raises various types for damaged files
        raise DataError(f"{model} is not a readable COLMAP model ({first_line(error)})") from error


def read_scene(model: Path, images: Path, settings: TrackSettings | None = None) -> TrackScene:
    """Read a COLMAP model as a ``TrackScene``; images that cannot be read are skipped.

    Raises:
        ImportError: pycolmap is missing.
        DataError: the model is damaged.
    """
    settings = settings or TrackSettings()
    reconstruction = _read(model)
    points: list[np.ndarray] = []
    rows: dict[int, int] = {}
    for point_id, point in reconstruction.points3D.items():
        if len(point.track.elements) >= settings.min_length and point.error <= settings.max_error:
            rows[point_id] = len(points)
            points.append(point.xyz)
    files, rotation, translation, focal, observations, cameras = [], [], [], [], [], []
    for image in sorted(reconstruction.images.values(), key=lambda image: image.name):
        path = images / image.name
        camera = reconstruction.cameras[image.camera_id]
        try:
            factor = image_size(path)[0] / camera.width
        except FileNotFoundError:
            continue
        except (DataError, OSError) as error:
            logger.warning("skipped: %s", first_line(error))
            continue
        observed = [
            (rows[p.point3D_id], p.xy)
            for p in image.points2D
            if p.has_point3D() and p.point3D_id in rows
        ]
        index = np.array([row for row, _ in observed], dtype=np.int64)
        xy = np.array([xy for _, xy in observed], dtype=np.float64).reshape(-1, 2)
        index, first = np.unique(index, return_index=True)
        pose = image.cam_from_world()
        files.append(path)
        rotation.append(pose.rotation.matrix())
        translation.append(pose.translation)
        focal.append(camera.mean_focal_length() * factor)
        cameras.append(Unprojection(camera, factor))
        # COLMAP's origin is the corner of the first pixel, ours its center
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
    """Map positions (N,2) in an image file to undistorted normalized camera coordinates (N,2).

    Attributes:
        camera: a pycolmap camera.
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
    """``Unprojection`` by bilinear interpolation of a table, which needs no COLMAP.

    Attributes:
        table: (N,M,2) normalized coordinates at the nodes of a grid whose corners are the corner
            pixels of the image.
        size: width and height of the image file in pixels.
    """

    table: np.ndarray
    size: tuple[int, int]

    def __call__(self, xy: np.ndarray) -> np.ndarray:
        rows, columns = self.table.shape[:2]
        position = xy / (np.array(self.size) - 1) * [columns - 1, rows - 1]
        low = np.floor(position).astype(int).clip(0, [columns - 2, rows - 2])
        x, y = (position - low).T[..., None]
        i, j = low[:, 1], low[:, 0]
        upper, lower = (
            (1 - x) * self.table[i + k, j] + x * self.table[i + k, j + 1] for k in (0, 1)
        )
        return (1 - y) * upper + y * lower


def pack_scene(scene: TrackScene, folder: Path, *, quality: int = 80) -> None:
    """Write a scene to a folder that can be read without COLMAP: ``tracks.npz`` and JPEG images."""
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
    """Read a scene of ``pack_scene``; tracks were selected by the settings used in packing.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with np.load(file) as content:
            a = dict(content)
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
            f"{file} is not a readable packed reconstruction ({error}); pack it again"
        ) from error


def read_scenes(
    folders: Sequence[str | Path] | str | Path,
    settings: TrackSettings | None = None,
    *,
    excluded: Collection[Path] = (),
) -> list[TrackScene]:
    """Read all reconstructions below ``folders``, COLMAP models or packed ones (``pack_scene``).

    Reconstructions without a usable pair of images are skipped.

    Args:
        excluded: image files, resolved, of which no pairs are used.

    Raises:
        FileNotFoundError, ImportError, DataError: see ``find_models`` and ``read_scene``.
        DataError: no reconstruction has a usable pair.
    """
    scenes = []
    for folder in [folders] if isinstance(folders, str | Path) else folders:
        packed = sorted(Path(folder).rglob(PACKED))
        candidates = [(file, read_packed(file, settings)) for file in packed]
        if not packed:
            candidates = [
                (model, read_scene(model, images, settings))
                for model, images in find_models(folder)
            ]
        for model, scene in candidates:
            scene.excluded = {i for i, p in enumerate(scene.images) if p.resolve() in excluded}
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
        others = ", not counting the images for validation" if excluded else ""
        raise DataError(
            f"no reconstruction in {folders} has two images that share enough 3D points{others}; "
            "see docs/training.md"
        )
    return scenes


class UnreadableImage(DataError):
    """An image of a reconstruction that is damaged or missing; ``path`` is its file."""

    def __init__(self, path: Path, error: Exception):
        super().__init__(f"{path}: cannot be read ({first_line(error)})")
        self.path = path


class ImageCache:
    """LRU cache of image pyramids and keypoints by path.

    Args:
        pixels: maximum total size of the images in pixels.
    """

    def __init__(self, pixels: int = CACHED_PIXELS):
        self.pixels = pixels
        self._entries: OrderedDict[Path, tuple[Pyramid, Tensor]] = OrderedDict()
        self._num_pixels = 0

    def get(self, path: Path, detect: Callable[[Tensor], Tensor]) -> tuple[Pyramid, Tensor]:
        """Pyramid of the image, and the keypoints (N,2) that ``detect`` finds in it.

        Raises:
            UnreadableImage: the file is damaged or missing.
        """
        if path in self._entries:
            self._entries.move_to_end(path)
            return self._entries[path]
        try:
            image = load_image(path)
        except Exception as error:  # decoders raise various types for damaged files
            raise UnreadableImage(path, error) from error
        entry = build_pyramid(image, up=0), detect(image)
        self._entries[path] = entry
        self._num_pixels += image.numel()
        while self._num_pixels > self.pixels and len(self._entries) > 1:
            _, (dropped, _) = self._entries.popitem(last=False)
            self._num_pixels -= dropped.image.numel()
        return entry
