"""COLMAP's database through pycolmap, written and read; the only place where COLMAP's half pixel is
added or taken away.

COLMAP puts the corner of the first pixel at (0, 0), we its centre: positions get +0.5 on the way in
and -0.5 on the way out. Points have four columns: x, y, scale (ours, in pixels), orientation
(radians from +x towards +y, as ours). Descriptors that are none of COLMAP's are kept as it keeps
floats, their bytes as (N,4D) uint8, with type UNDEFINED: its own matchers refuse those aloud, ours
read them. RootSIFT is what COLMAP calls SIFT: (N,128) uint8, 512 times the value.

Each image is one transaction of a database with a write-ahead log, so a killed process leaves whole
images only.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..files import require
from ..structs import Features, Keypoints, Matches

#: Centre of the first pixel in COLMAP's coordinates.
HALF_PIXEL = 0.5
#: COLMAP's factor of SIFT in uint8.
SIFT_FACTOR = 512.0
#: COLMAP's guess of a focal length without EXIF, in longest sides of the image.
FOCAL_FACTOR = 1.2


def _pycolmap() -> Any:
    pycolmap = require("pycolmap", extra="colmap", purpose="a COLMAP database")
    if not hasattr(pycolmap, "FeatureDescriptors"):
        raise ImportError(
            "COLMAP databases need pycolmap 4.0 or newer: pip install -U 'tiepoints[colmap]'"
        )
    return pycolmap


class ColmapDatabase:
    """A database of cameras, images, points, descriptors, matches and verified pairs.

    Args:
        path: the ``.db`` file.
        camera: ``auto`` = one camera an image, its focal length from EXIF or COLMAP's guess of 1.2
            longest sides; ``single`` = one camera for all images, begun like the first one's;
            ``MODEL:p1,p2,...`` = one camera with known intrinsics in COLMAP's order and coordinates
            (principal point of a centred camera: half the size), such as
            ``PINHOLE:525,525,320,240``.
        write: open for writing too.

    Raises:
        FileNotFoundError: nothing to read.
        DataError: not a database of COLMAP.
        ValueError: ``camera`` is none of these.
        ImportError: pycolmap is missing or too old.
    """

    def __init__(self, path: str | Path, *, camera: str = "auto", write: bool = False):
        self.path = Path(path)
        self._colmap = _pycolmap()
        self._known = self._known_camera(camera)
        self._single = camera != "auto"
        self._lock = threading.Lock()
        if not write and not self.path.is_file():
            raise FileNotFoundError(f"no database at {self.path}")
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = self._colmap.Database.open(self.path)
            self._ids = {image.name: image.image_id for image in self._database.read_all_images()}
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"{self.path} is no database of COLMAP or is damaged ({_first_line(error)})"
            ) from error

    def _known_camera(self, camera: str) -> Any:
        if camera in ("auto", "single"):
            return None
        model, _, numbers = camera.partition(":")
        names = sorted(set(self._colmap.CameraModelId.__members__) - {"INVALID"})
        try:
            values = [float(word) for word in numbers.split(",")]
        except ValueError:
            values = []
        if model not in names or not values:
            raise ValueError(
                "camera must be auto, single or MODEL:p1,p2,... with MODEL one of "
                f"{', '.join(names)}; got {camera!r}"
            )
        known = self._colmap.Camera(model=model, width=1, height=1, params=values)
        if not known.verify_params():
            raise ValueError(
                f"{model} has the parameters {known.params_info}; got {len(values)} numbers in "
                f"{camera!r}"
            )
        known.has_prior_focal_length = True
        return known

    def __enter__(self) -> ColmapDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database; what was written is in it already."""
        self._database.close()

    def clear(self) -> None:
        """Begin with an empty database."""
        self._database.clear_all_tables()
        self._ids.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def names(self) -> list[str]:
        """Names of the images, sorted."""
        return sorted(self._ids)

    def done(self, name: str, *, described: bool) -> bool:
        """Whether the image has points, and descriptors where they are asked for."""
        known = self._ids.get(name)
        if known is None or not self._database.exists_keypoints(known):
            return False
        return not described or self._database.exists_descriptors(known)

    # ---- features

    def write(self, name: str, features: Features, image: Path | None = None) -> None:
        """Keep an image, its camera, points and descriptors, whole or not at all.

        Args:
            name: path below the image folder, / between parts.
            features: of the image as stored (COLMAP ignores EXIF orientations as we do).
            image: the file, to read its EXIF; without it, or where COLMAP cannot read it, the focal
                length is a guess.

        Raises:
            DataError: the image has points there already, or another size than the single camera.
        """
        xy, scale, angle = (
            features.xy.cpu().double(),
            features.scale.cpu().double(),
            features.angle.cpu().double(),
        )
        table = torch.cat([xy + HALF_PIXEL, scale[:, None], angle[:, None]], dim=1).float().numpy()
        descriptors = (
            None
            if features.descriptors is None
            else self._encode(features.descriptors.cpu().float().numpy())
        )
        with self._lock:
            if name in self._ids and self._database.exists_keypoints(self._ids[name]):
                raise DataError(
                    f"{self.path} holds features of {name} already, and perhaps matches of them; "
                    "clear() it first"
                )
            camera = None if name in self._ids else self._camera(features.image_size, image, name)
            try:
                with self._colmap.DatabaseTransaction(self._database):
                    number = self._ids[name] if camera is None else self._add_image(name, camera)
                    self._database.write_keypoints(number, table)
                    if descriptors is not None:
                        self._database.write_descriptors(number, descriptors)
            except RuntimeError as error:
                raise DataError(
                    f"{self.path}: {name} could not be written ({_first_line(error)})"
                ) from error
            self._ids[name] = number

    def _camera(self, size: tuple[int, int], image: Path | None, name: str) -> Any:
        """A camera with its number where it is there already."""
        width, height = size
        if width < 1 or height < 1:
            raise DataError(
                f"{name}: COLMAP needs the size of the image, which these features do not state; "
                "extract them again"
            )
        if self._single and self._database.num_cameras():
            camera = self._database.read_all_cameras()[0]
            if (camera.width, camera.height) != size:
                raise DataError(
                    f"{name} is {width} x {height} but the single camera is {camera.width} x "
                    f"{camera.height}; use camera 'auto'"
                )
            return camera
        if self._known is not None:
            camera = self._colmap.Camera(self._known.todict())
            camera.width, camera.height = size
            return camera
        if image is not None:
            try:
                camera = self._colmap.infer_camera_from_image(image)
                if (camera.width, camera.height) == size:
                    return camera
            except (ValueError, RuntimeError):
                pass  # a kind of file that COLMAP does not read, such as WebP
        guess = FOCAL_FACTOR * max(size)
        return self._colmap.Camera(
            model="SIMPLE_RADIAL",
            width=width,
            height=height,
            params=[guess, width / 2, height / 2, 0],
        )

    def _add_image(self, name: str, camera: Any) -> int:
        """Camera, image, and the rig and frame of one camera that COLMAP makes of an image."""
        colmap, database = self._colmap, self._database
        if not database.exists_camera(camera.camera_id):
            camera.camera_id = database.write_camera(camera)
        image = colmap.Image(name=name, camera_id=camera.camera_id)
        image.image_id = database.write_image(image)
        if hasattr(database, "write_rig"):
            rig = database.read_rig_with_sensor(camera.sensor_id)
            if rig is None:
                rig = colmap.Rig()
                rig.add_ref_sensor(camera.sensor_id)
                rig.rig_id = database.write_rig(rig)
            frame = colmap.Frame()
            frame.rig_id = rig.rig_id
            frame.add_data_id(image.data_id)
            database.write_frame(frame)
        return image.image_id

    def _encode(self, values: np.ndarray) -> Any:
        kinds = self._colmap.FeatureExtractorType
        stored = self._colmap.FeatureDescriptors()
        if values.shape[1] == 128 and (not len(values) or values.min() >= 0):
            stored.data = np.clip(np.round(SIFT_FACTOR * values), 0, 255).astype(np.uint8)
            stored.type = kinds.SIFT
        else:
            stored.data = np.ascontiguousarray(values, dtype=np.float32).view(np.uint8)
            stored.type = kinds.UNDEFINED
        return stored

    def read(self, name: str) -> Features:
        """Features of an image; COLMAP keeps no scores, so these are 1.

        Raises:
            DataError: no such image, no points, or descriptors of a kind that is not ours.
        """
        number = self._number(name)
        if not self._database.exists_keypoints(number):
            raise DataError(f"{self.path} holds no features of {name!r}")
        table = torch.from_numpy(np.array(self._database.read_keypoints(number), dtype=np.float64))
        count = len(table)
        scale, angle = torch.ones(count), torch.zeros(count)
        if table.shape[1] == 4:
            scale, angle = table[:, 2].float(), table[:, 3].float()
        elif table.shape[1] == 6:
            a11, a12, a21, a22 = table[:, 2:].unbind(1)  # an affine shape
            scale, angle = (
                (a11 * a22 - a12 * a21).abs().sqrt().float(),
                torch.atan2(a21, a11).float(),
            )
        camera = self._database.read_camera(self._database.read_image(number).camera_id)
        descriptors = None
        if self._database.exists_descriptors(number):
            descriptors = torch.from_numpy(
                self._decode(self._database.read_descriptors(number), name)
            )
            if len(descriptors) != count:
                raise DataError(
                    f"{self.path}: {name} has {count} points but {len(descriptors)} descriptors"
                )
        points = Keypoints((table[:, :2] - HALF_PIXEL).float(), scale, angle, torch.ones(count))
        return Features(points, descriptors, (camera.width, camera.height))

    def move_keypoints(self, name: str, xy: torch.Tensor) -> None:
        """Give the keypoints of an image other positions (N,2), ours; scales, angles, descriptors
        and matches stay.

        The geometries of the image's pairs are those of the old positions: see ``forget_geometry``.

        Raises:
            DataError: no such image, or another number of keypoints.
        """
        number = self._number(name)
        table = np.array(self._database.read_keypoints(number), dtype=np.float32)
        if len(table) != len(xy):
            raise DataError(
                f"{self.path}: {name} has {len(table)} keypoints, got {len(xy)} positions"
            )
        table[:, :2] = (xy.double() + HALF_PIXEL).float().numpy()
        with self._lock, self._colmap.DatabaseTransaction(self._database):
            self._database.update_keypoints(number, table)

    def forget_geometry(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Remove the verified geometries of ``pairs``, so that ``verify`` works on them again;
        their raw matches stay.
        """
        with self._lock, self._colmap.DatabaseTransaction(self._database):
            for a, b in pairs:
                if self._verified(a, b):
                    self._database.delete_two_view_geometry(self._number(a), self._number(b))

    def _decode(self, stored: Any, name: str) -> np.ndarray:
        kinds = self._colmap.FeatureExtractorType
        data = np.array(stored.data, order="C")  # pycolmap's own array cannot be written to
        if stored.type == kinds.SIFT:
            values = data.astype(np.float32)
            return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-9)
        if data.shape[1] % 4:
            raise DataError(
                f"{self.path}: descriptors of {name} are {data.shape[1]} bytes of type "
                f"{stored.type.name}, not floats"
            )
        return data.view(np.float32)

    def _number(self, name: str) -> int:
        if name not in self._ids:
            raise DataError(f"{self.path} holds no image {name!r}")
        return self._ids[name]

    # ---- matches

    def has_matches(self, a: str, b: str) -> bool:
        """Whether matches of the pair are there, either way round."""
        if a not in self or b not in self:
            return False
        return self._database.exists_matches(self._number(a), self._number(b))

    def write_matches(self, a: str, b: str, matches: Matches, count: int | None = None) -> None:
        """Keep raw matches of two images of the database, in place of older ones and of their
        geometry.
        """
        one, two = self._number(a), self._number(b)
        with self._lock, self._colmap.DatabaseTransaction(self._database):
            if self._database.exists_matches(one, two):
                self._database.delete_matches(one, two)
            if self._database.exists_two_view_geometry(one, two):
                self._database.delete_two_view_geometry(one, two)
            self._database.write_matches(one, two, matches.index.cpu().numpy().astype(np.uint32))

    def clear_matches(self) -> None:
        """Remove all matches and geometries; images and features stay."""
        self._database.clear_matches()
        self._database.clear_two_view_geometries()

    def read_matches(self, a: str, b: str) -> Matches:
        """Raw matches of a pair; COLMAP keeps no scores, so these are 1.

        Raises:
            DataError: no such image or pair.
        """
        if not self.has_matches(a, b):
            raise DataError(f"{self.path} holds no matches of {a!r} and {b!r}")
        return _as_matches(self._database.read_matches(self._number(a), self._number(b)))

    def verify(
        self, pairs: Iterable[tuple[str, str]], *, max_error: float = 4.0, seed: int = 0
    ) -> int:
        """COLMAP's geometric verification of the raw matches of ``pairs``; what agrees becomes
        their two-view geometry.

        Pairs that have been verified already are left alone.

        Args:
            max_error: largest error of an inlier in pixels.

        Returns:
            how many of the pairs have a geometry.
        """
        pairs = list(pairs)
        todo = [pair for pair in pairs if not self._verified(*pair)]
        options = self._colmap.TwoViewGeometryOptions()
        options.ransac.max_error = max_error
        options.ransac.random_seed = seed
        spaced = sorted({n for pair in todo for n in pair if any(c.isspace() for c in n)})
        if spaced:
            raise DataError(
                f"COLMAP's list of pairs cannot hold names with spaces such as {spaced[0]!r}; "
                "rename these images"
            )
        if todo:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "pairs.txt"
                path.write_text("".join(f"{a} {b}\n" for a, b in todo))
                with _quiet(self._colmap):
                    self._colmap.verify_matches(self.path, path, options)
        return sum(len(self.read_inliers(a, b)) > 0 for a, b in pairs)

    def read_inliers(self, a: str, b: str) -> Matches:
        """Matches of the verified geometry of a pair; none where there is no geometry."""
        if not self._verified(a, b):
            return _as_matches(np.zeros((0, 2)))
        one, two = self._number(a), self._number(b)
        return _as_matches(self._database.read_two_view_geometry(one, two).inlier_matches)

    def _verified(self, a: str, b: str) -> bool:
        return self._database.exists_two_view_geometry(self._number(a), self._number(b))


def _as_matches(table: np.ndarray) -> Matches:
    index = torch.from_numpy(np.asarray(table).astype(np.int64).reshape(-1, 2))
    index = index[index[:, 0].argsort(stable=True)]
    return Matches(index, torch.ones(len(index)))


@contextmanager
def _quiet(colmap: Any) -> Iterator[None]:
    """COLMAP's log without its notes on every image and its warnings of a mapper's usual steps;
    errors stay.
    """
    before = colmap.logging.minloglevel
    colmap.logging.minloglevel = max(before, 2)
    try:
        yield
    finally:
        colmap.logging.minloglevel = before


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@dataclass(frozen=True)
class Reconstruction:
    """What COLMAP's mapper made of a database: its largest model.

    Attributes:
        models: how many models it fell into.
        registered: images with a pose in the largest one.
        points: 3D points; every one is seen by three images or more unless the mapper is told
            otherwise.
        observations: image points that belong to a 3D point.
        track_length: mean number of images that see a 3D point.
        error: mean reprojection error in pixels.
        folder: where the model is, in COLMAP's binary files; None without a model.
    """

    models: int
    registered: int
    points: int
    observations: int
    track_length: float
    error: float
    folder: Path | None


def reconstruct(
    database: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    threads: int = -1,
    verbose: bool = False,
) -> Reconstruction:
    """COLMAP's incremental mapper with its default options on a database of verified matches.

    Args:
        database: ``.db`` file.
        images: folder that the names of the images start from.
        out: folder of the models, ``0``, ``1``, ...
        seed: of its draws, the first pair of images among them; with one thread the result repeats.
        threads: -1 = all.
        verbose: COLMAP tells each step.
    """
    colmap = _pycolmap()
    options = colmap.IncrementalPipelineOptions()
    options.random_seed = seed
    options.num_threads = threads
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with nullcontext() if verbose else _quiet(colmap):
        models = colmap.incremental_mapping(Path(database), Path(images), out, options)
    if not models:
        return Reconstruction(0, 0, 0, 0, 0.0, 0.0, None)
    place, best = max(
        models.items(), key=lambda item: (item[1].num_reg_images(), item[1].num_points3D())
    )
    return Reconstruction(
        models=len(models),
        registered=best.num_reg_images(),
        points=best.num_points3D(),
        observations=best.compute_num_observations(),
        track_length=best.compute_mean_track_length(),
        error=best.compute_mean_reprojection_error(),
        folder=out / str(place),
    )
