"""Reading and writing of COLMAP databases with pycolmap.

The origin of COLMAP's image coordinates is the corner of the first pixel, ours is its center: 0.5
is added to positions on writing and subtracted on reading. Keypoints have four columns: x, y, scale
(in pixels) and orientation (radians from +x towards +y).

Descriptors have COLMAP's type SIFT, (N,128) uint8 of norm 512: its matchers of 4.2 end the process
at any other type. RootSIFT is 512 times the value; signed descriptors are shifted first
(``to_sift``), and read as they were up to rounding. Earlier versions stored the bytes of their
float32 values as (N,4D) uint8 with type UNDEFINED, as it is still done for D > 128.

Each image is one transaction of a database with a write-ahead log, so a killed process leaves no
incomplete images.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import sqlite3
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, first_line
from ..exif import read_position
from ..files import NOT_TEXT, Lock, is_text, printable, require, require_space, write_json
from ..progress import Progress
from ..structs import Features, Keypoints, Matches
from .records import array_digest, file_stamp, json_digest, read_settings, record_path
from .refinement import PendingRefinement, PositionFile

logger = logging.getLogger(__name__)
#: Center of the first pixel in COLMAP's coordinates.
HALF_PIXEL = 0.5
#: Scale of COLMAP's uint8 SIFT descriptors.
SIFT_FACTOR = 512.0
#: Dimension of SIFT.
SIFT_DIMENSION = 128
#: Added to signed descriptors of unit length, so that nearly all of their values are positive.
#: COLMAP's ratio test does not depend on it, since all distances shrink equally; a smaller shift
#: cuts off values, a larger one rounds coarsely.
SIFT_SHIFT = 0.25
#: Largest relative difference of the sum of a shifted descriptor from that of the shift alone (the
#: median of an image). SIFT has other sums.
SHIFT_TOLERANCE = 0.005
#: Bytes that a transaction needs in addition to its data: pages of indices, and the shared memory
#: of the write-ahead log.
TRANSACTION_BYTES = 2**18
#: Bytes that are checked in advance for the next transactions.
SPACE_BYTES = 2**25
#: Bytes of a camera with its rig, at most.
CAMERA_BYTES = 2**10
#: Pairs that are verified at a time, and images whose keypoints are cached meanwhile.
VERIFY_BATCH = 256
#: COLMAP's default focal length without EXIF, in units of the longest side of the image.
FOCAL_FACTOR = 1.2
#: Values of ``camera``, besides known intrinsics.
CAMERAS = ("auto", "per-image", "single")
#: A pair of images has the id ``PAIR_FACTOR * smaller id + larger id``.
PAIR_FACTOR = 2**31 - 1


def require_pycolmap() -> Any:
    with _signal_handlers_kept():
        pycolmap = require("pycolmap", extra="colmap", purpose="a COLMAP database")
    if not hasattr(pycolmap, "FeatureDescriptors"):
        raise ImportError(
            "COLMAP databases need pycolmap 4.0 or newer: pip install -U 'tiepoints[colmap]'"
        )
    return pycolmap


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Install the handlers of this process again if pycolmap is imported, whose logging library
    replaces that of SIGTERM: it prints a stack trace and ends the process.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = None if "pycolmap" in sys.modules or not main else signal.getsignal(signal.SIGTERM)
    yield
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)


class ColmapDatabase:
    """COLMAP database of cameras, images, keypoints, descriptors, matches and two-view geometries.

    Args:
        path: the ``.db`` file.
        camera: ``auto``: one camera for the images with the same key in ``shared``, and for each
            other one, its focal length from EXIF or 1.2 times the longest side; ``per-image``: the
            same without ``shared``; ``single``: one camera for all images, initialized from the
            first image; ``MODEL:p1,p2,...``: one camera with known intrinsics in COLMAP's order and
            coordinates (a centered principal point is half the size), such as
            ``PINHOLE:525,525,320,240``.
        shared: image name -> key of its camera, such as that of ``exif.shared_cameras``.
        write: open for reading and writing, by one process at a time.
        overwrite: delete a file that is not a COLMAP database, or a damaged one.

    Raises:
        FileNotFoundError: no such file to read.
        DataError: not a COLMAP database, a damaged one, or another process is writing it.
        OSError: the disk is full.
        ValueError: ``camera`` has another form.
        ImportError: pycolmap is missing or too old.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        camera: str = "auto",
        shared: Mapping[str, Any] | None = None,
        write: bool = False,
        overwrite: bool = False,
    ):
        self.path = Path(path)
        self._colmap = require_pycolmap()
        self._known = self._known_camera(camera)
        self._single = camera not in ("auto", "per-image")
        self._shared = dict(shared or {}) if camera == "auto" else {}
        self._lock = threading.Lock()
        self._file_lock: Lock | None = None
        self._detected = PositionFile(self.path)
        self._free_bytes = 0
        self._warned = False
        self._created = not self.path.exists()
        if not write and not self.path.is_file():
            raise FileNotFoundError(f"no database at {self.path}")
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file_lock = Lock(self.path)
        try:
            self._open(overwrite)
        except BaseException:
            self._close_lock()
            raise

    def _open(self, overwrite: bool) -> None:
        if self._file_lock is not None:
            require_space(self.path.parent, TRANSACTION_BYTES)
        try:
            self._database = self._colmap.Database.open(self.path)
            images = self._database.read_all_images()
        except (RuntimeError, ValueError) as error:
            if not overwrite:
                raise DataError(
                    f"{self.path} is not a COLMAP database or is damaged ({first_line(error)}); "
                    "use --overwrite, or delete it"
                ) from error
            self._remove()
            self._open(overwrite=False)
            return
        self._ids = {image.name: image.image_id for image in images}
        self._cameras = {
            self._shared[image.name]: image.camera_id
            for image in images
            if image.name in self._shared
        }

    def _remove(self) -> None:
        for end in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + end).unlink(missing_ok=True)
        self._detected.clear()

    def _known_camera(self, camera: str) -> Any:
        """Camera of ``MODEL:p1,p2,...``; None for ``CAMERAS``."""
        if camera in CAMERAS:
            return None
        model, _, numbers = camera.partition(":")
        names = sorted(set(self._colmap.CameraModelId.__members__) - {"INVALID"})
        try:
            values = [float(number) for number in numbers.split(",")]
        except ValueError:
            values = []
        if model not in names or not values:
            raise ValueError(
                f"camera must be {', '.join(CAMERAS)} or MODEL:p1,p2,... with MODEL one of "
                f"{', '.join(names)}; got {camera!r}"
            )
        known = self._colmap.Camera(model=model, width=1, height=1, params=values)
        if not known.verify_params():
            raise ValueError(
                f"{model} has the parameters {known.params_info}; got {len(values)} numbers in "
                f"{camera!r}"
            )
        focal = [known.params[i] for i in known.focal_length_idxs()]
        if not np.isfinite(known.params).all() or min(focal) <= 0:
            raise ValueError(f"focal lengths must be positive, and all numbers finite: {camera!r}")
        known.has_prior_focal_length = True
        return known

    def __enter__(self) -> ColmapDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database; all writes are already committed. A new one without images is
        removed.
        """
        self._database.close()
        if self._file_lock is not None and self._created and not self._ids:
            self._remove()
        self._close_lock()

    def _close_lock(self) -> None:
        if self._file_lock is not None:
            self._file_lock.close()

    def clear(self) -> None:
        """Remove all content of the database.

        Raises:
            DataError: it is damaged.
        """
        with self._writing():
            self._database.clear_all_tables()
        self._detected.clear()
        self._ids.clear()
        self._cameras.clear()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Exclude other threads, and turn COLMAP's errors into a ``DataError``."""
        with self._lock:
            try:
                yield
            except RuntimeError as error:
                raise DataError(
                    f"{self.path} could not be written ({first_line(error)})"
                ) from error

    def _require_space(self, size: int) -> None:
        """``files.require_space`` for several transactions at a time, as it takes a millisecond;
        with what the write-ahead log adds to the database when it is closed.
        """
        folder = self.path.parent
        log = self.path.with_name(f"{self.path.name}-wal")
        with suppress(FileNotFoundError):
            size += log.stat().st_size
        if size > self._free_bytes or shutil.disk_usage(folder).free < size + SPACE_BYTES:
            try:
                require_space(folder, size + SPACE_BYTES)
                self._free_bytes = size + SPACE_BYTES
            except OSError:
                require_space(folder, size)
                self._free_bytes = size
        self._free_bytes -= size

    @contextmanager
    def _transaction(self, size: int = 0) -> Iterator[None]:
        """Commit what is written within the block as a whole.

        Args:
            size: bytes of the data.

        Raises:
            OSError: the disk is full; COLMAP aborts the process when a commit fails.
            DataError: the database could not be written.
        """
        with self._writing():
            # the data is written twice: to the log and from there to the database
            self._require_space(2 * size + TRANSACTION_BYTES)
            with self._colmap.DatabaseTransaction(self._database):
                yield

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def names(self) -> list[str]:
        """Names of the images, sorted."""
        return sorted(self._ids)

    def done(self, name: str, *, described: bool) -> bool:
        """Whether the image has keypoints and, if ``described``, descriptors."""
        image_id = self._ids.get(name)
        if image_id is None or not self._database.exists_keypoints(image_id):
            return False
        return not described or self._database.exists_descriptors(image_id)

    # ---- features

    def write(self, name: str, features: Features, image: Path | None = None) -> str:
        """Write an image with its camera, keypoints and descriptors in one transaction; returns the
        digest of the features.

        Args:
            name: path relative to the image folder, with / as separator.
            features: of the image as stored (COLMAP ignores EXIF orientations, as this package
                does).
            image: the file, to read its EXIF; without it, or if COLMAP cannot read it, the default
                focal length is used.

        Raises:
            DataError: the image already has keypoints, its size differs from that of a camera it
                shares with others, or its name is not valid Unicode.
            OSError: the disk is full.
        """
        if not is_text(name):
            raise DataError(f"{printable(name)}: {NOT_TEXT}")
        xy = features.xy.cpu().double()
        scale, angle = features.scale.cpu().double(), features.angle.cpu().double()
        table = torch.cat([xy + HALF_PIXEL, scale[:, None], angle[:, None]], dim=1).float().numpy()
        descriptors = (
            None
            if features.descriptors is None
            else self._encode(features.descriptors.cpu().float().numpy())
        )
        image_id = self._ids.get(name)
        if image_id is not None and self._database.exists_keypoints(image_id):
            raise DataError(
                f"{self.path} already contains features of {name}, and possibly matches; call "
                "remove() first"
            )
        size = table.nbytes + (0 if descriptors is None else descriptors.data.nbytes)
        with self._transaction(size):
            if image_id is None:
                camera = self._camera(features.image_size, image, name)
                image_id = self._add_image(name, camera, image)
            else:
                camera = self._resize(image_id, features.image_size, image, name)
            self._database.write_keypoints(image_id, table)
            if descriptors is not None:
                self._database.write_descriptors(image_id, descriptors)
        self._ids[name] = image_id
        if name in self._shared and camera is not None:
            self._cameras[self._shared[name]] = camera.camera_id
        return _digest(table, None if descriptors is None else descriptors.data)

    def digest(self, name: str) -> str:
        """Digest of the stored features of an image; unchanged by ``move_keypoints`` if the image
        has descriptors.
        """
        image_id = self._image_id(name)
        descriptors = None
        if self._database.exists_descriptors(image_id):
            descriptors = self._database.read_descriptors(image_id).data
        return _digest(self._database.read_keypoints(image_id), descriptors)

    def read_camera(self, name: str) -> Any:
        """The ``pycolmap.Camera`` of an image."""
        return self._database.read_camera(self._database.read_image(self._image_id(name)).camera_id)

    def read_positions(self, name: str) -> np.ndarray:
        """Positions (N,2) float64 of the keypoints of an image, in pixels."""
        table = np.array(self._database.read_keypoints(self._image_id(name)), np.float64)
        return table[:, :2] - HALF_PIXEL

    def remove(self, names: Iterable[str]) -> None:
        """Remove the features, matches and two-view geometries of images, in one transaction;
        images and cameras are kept.
        """
        ids = [self._ids[name] for name in names if name in self._ids]
        self._delete(("keypoints", "descriptors"), ("matches", "two_view_geometries"), ids)

    def _delete(
        self, tables: tuple[str, ...], pair_tables: tuple[str, ...], ids: list[int]
    ) -> None:
        """Delete the rows of images, which pycolmap cannot."""
        if not ids:
            return
        selected = "IN (SELECT id FROM removed)"
        # pycolmap has its own copy of SQLite: two copies with the same file open in one process
        # remove each other's locks
        with self._lock:
            self._require_space(TRANSACTION_BYTES)
            self._database.close()
            try:
                with closing(sqlite3.connect(self.path, timeout=60)) as connection, connection:
                    connection.execute("CREATE TEMP TABLE removed (id INTEGER PRIMARY KEY)")
                    connection.executemany(
                        "INSERT OR IGNORE INTO removed VALUES (?)",
                        [(image_id,) for image_id in ids],
                    )
                    for table in tables:
                        connection.execute(f"DELETE FROM {table} WHERE image_id {selected}")
                    for table in pair_tables:
                        connection.execute(
                            f"DELETE FROM {table} WHERE pair_id / {PAIR_FACTOR} {selected} OR "
                            f"pair_id % {PAIR_FACTOR} {selected}"
                        )
            except sqlite3.Error as error:
                raise DataError(f"{self.path} could not be written ({error})") from error
            finally:
                self._database = self._colmap.Database.open(self.path)

    def _resize(self, image_id: int, size: tuple[int, int], file: Path | None, name: str) -> Any:
        """Change the camera of a stored image that was replaced by one of another size; returns the
        camera, None if the size is the same.
        """
        image = self._database.read_image(image_id)
        stored = self._database.read_camera(image.camera_id)
        if (stored.width, stored.height) == size:
            return None
        images = self._database.read_all_images()
        shared = any(i.camera_id == stored.camera_id and i.image_id != image_id for i in images)
        if shared and self._single:
            raise DataError(
                f"{name} is {size[0]} x {size[1]} but its camera, shared with other images, is "
                f"{stored.width} x {stored.height}; use --overwrite to start over"
            )
        camera = self._camera(size, file, name, replaced=not shared)
        if not shared:
            camera.camera_id = stored.camera_id
            self._database.update_camera(camera)
            return camera
        image.camera_id = self._store_camera(camera)
        self._change_cameras([image])
        return camera

    def _change_cameras(self, images: Iterable[Any]) -> None:
        """Store images with other cameras than before, in whose rigs their frames are then."""
        changed = {}
        for image in images:
            if hasattr(self._database, "write_rig"):
                frame = self._frame(image)
                frame.frame_id = image.frame_id
                self._database.update_frame(frame)
            self._database.update_image(image)
            changed[image.image_id] = image.data_id
        for prior in self._database.read_all_pose_priors() if changed else ():
            if prior.corr_data_id.id in changed:
                prior.corr_data_id = changed[prior.corr_data_id.id]
                self._database.update_pose_prior(prior)

    def assign_cameras(self, files: Mapping[str, Path], shared: Mapping[str, Any]) -> set[str]:
        """Give images the cameras and GPS positions that they would have in a new database.

        They had others if images that share a camera were added, removed or replaced, or if their
        EXIF was changed. Key, file and first parameters of the cameras are recorded; images are
        considered whose key or file has changed since, and those that share a camera with them.
        Parameters that others have set are kept, unless other images share the camera than before.

        Args:
            files: image -> file, of all images that still exist.
            shared: image -> key of its camera.

        Returns:
            images with another camera; their two-view geometries are removed, and they are marked
            as not refined.

        Raises:
            DataError: the database could not be written.
            OSError: the disk is full.
        """
        record = record_path(self.path, "cameras.json")
        before = read_settings(record) or {}
        now: dict[str, dict[str, Any]] = {
            name: {
                "key": json_digest(shared[name]) if name in shared else "",
                "file": file_stamp(file),
            }
            for name, file in files.items()
            if name in self._ids
        }
        changed = {
            name
            for name, entry in now.items()
            if not isinstance(old := before.get(name), dict)
            or (old.get("key"), old.get("file")) != (entry["key"], entry["file"])
        }
        if not changed:
            return set()
        images = {image.name: image for image in self._database.read_all_images()}
        plan = [] if self._single else self._planned_cameras(images, now, changed, before, files)
        moved = {name for _, names in plan for name in names}
        # first, so that a stopped process leaves no geometries of other cameras
        if moved and self.holds_matches():
            PendingRefinement(self.path).add(moved)
        self._delete((), ("two_view_geometries",), [self._ids[name] for name in moved])
        with self._transaction((len(changed) + len(moved)) * CAMERA_BYTES):
            for camera, names in plan:
                if self._database.exists_camera(camera.camera_id):
                    self._database.update_camera(camera)
                else:
                    camera.camera_id = self._database.write_camera(camera)
                for name in names:
                    images[name].camera_id = camera.camera_id
            self._change_cameras(images[name] for name in moved)
            self._update_positions({self._ids[name]: files[name] for name in changed})
        new = {name: entry for name, entry in now.items() if name in changed or "camera" in entry}
        write_json(record, {**before, **new})
        return moved

    def _planned_cameras(
        self,
        images: Mapping[str, Any],
        now: dict[str, dict[str, Any]],
        changed: set[str],
        before: Mapping[str, Any],
        files: Mapping[str, Path],
    ) -> list[tuple[Any, list[str]]]:
        """Cameras to write, and the images that get them; sets the first parameters in ``now``."""
        cameras = {camera.camera_id: camera for camera in self._database.read_all_cameras()}
        users: dict[int, set[str]] = defaultdict(set)
        for image in images.values():
            users[image.camera_id].add(image.name)
        groups: dict[Any, list[str]] = defaultdict(list)
        for name, entry in now.items():
            camera = cameras[images[name].camera_id]
            key = entry["key"]
            groups[(key, camera.width, camera.height) if key else name].append(name)
        plan = []
        for names in groups.values():
            if changed.isdisjoint(names):
                continue
            members, used = set(names), [images[name].camera_id for name in names]
            size = cameras[used[0]].width, cameras[used[0]].height
            camera = self._initial_camera(size, files[names[0]])
            first = _parameters(camera)
            own = next((number for number in used if users[number] <= members), None)
            if own is None:
                camera.camera_id = max(cameras) + 1
                cameras[camera.camera_id] = camera
            else:
                written = (before.get(name) for name in names)
                known = [entry.get("camera") for entry in written if isinstance(entry, dict)]
                if _parameters(cameras[own]) in known:  # nobody has set others
                    camera.camera_id = own
                else:
                    camera = cameras[own]
            same = own is not None and _parameters(camera) == _parameters(cameras[own])
            other = [name for name in names if not same or images[name].camera_id != own]
            if other:
                plan.append((camera, other))
            for name in names:
                now[name]["camera"] = first
        return plan

    def _update_positions(self, files: Mapping[int, Path]) -> None:
        """Store the GPS positions of files by the id of their image, where they have changed."""
        priors = {prior.corr_data_id.id: prior for prior in self._database.read_all_pose_priors()}
        for image_id, file in files.items():
            position, prior = read_position(file), priors.get(image_id)
            if position is None or not all(map(math.isfinite, position)):
                if prior is not None:  # pycolmap cannot delete it
                    prior.position = np.full(3, np.nan)
                    self._database.update_pose_prior(prior)
            elif prior is None:
                self._add_position(self._database.read_image(image_id), position)
            elif not np.array_equal(prior.position.ravel(), position):
                prior.position = np.array(position)
                self._database.update_pose_prior(prior)

    def _add_position(self, image: Any, position: Iterable[float]) -> None:
        self._database.write_pose_prior(
            self._colmap.PosePrior(
                corr_data_id=image.data_id,
                position=np.array(position),
                coordinate_system=self._colmap.PosePriorCoordinateSystem.WGS84,
            )
        )

    def next_camera_id(self) -> int:
        """The smallest number above those of all cameras and rigs."""
        used = [camera.camera_id for camera in self._database.read_all_cameras()]
        if hasattr(self._database, "write_rig"):
            used += [rig.rig_id for rig in self._database.read_all_rigs()]
        return max(used, default=0) + 1

    def separate(self, cameras: Mapping[str, int]) -> None:
        """Give images cameras of their own, copies of those that they have, in one transaction.

        Args:
            cameras: image -> number of its new camera, and of the rig of that, which no other image
                has; images that have it already are not changed.

        Raises:
            DataError: an image is not in the database, or it could not be written.
            OSError: the disk is full.
        """
        changed = []
        with self._transaction(len(cameras) * CAMERA_BYTES):
            for name, number in cameras.items():
                image = self._database.read_image(self._image_id(name))
                if image.camera_id == number:
                    continue
                camera = self._database.read_camera(image.camera_id)
                camera.camera_id = image.camera_id = number
                changed.append(image)
                if self._database.exists_camera(number):  # an earlier one of this image
                    continue
                self._database.write_camera(camera, use_camera_id=True)
                if hasattr(self._database, "write_rig"):
                    rig = self._colmap.Rig()
                    rig.rig_id = number
                    rig.add_ref_sensor(image.data_id.sensor_id)
                    self._database.write_rig(rig, use_rig_id=True)
            self._change_cameras(changed)

    def _camera(
        self, size: tuple[int, int], image: Path | None, name: str, *, replaced: bool = False
    ) -> Any:
        """Camera of an image; its id is set if the database already contains it."""
        width, height = size
        if width < 1 or height < 1:
            raise DataError(
                f"{name}: COLMAP needs the size of the image, which these features do not contain; "
                "extract them again"
            )
        if self._single and self._database.num_cameras() and not replaced:
            camera = self._database.read_all_cameras()[0]
            if (camera.width, camera.height) != size:
                raise DataError(
                    f"{name} is {width} x {height} but the one camera of all images, that of the "
                    f"first one, is {camera.width} x {camera.height}; use images of one size or "
                    "camera 'auto'"
                )
            return camera
        if not replaced and (number := self._cameras.get(self._shared.get(name))) is not None:
            camera = self._database.read_camera(number)
            if (camera.width, camera.height) == size:
                return camera
        if self._known is not None:
            camera = self._colmap.Camera(self._known.todict())
            camera.width, camera.height = size
            x, y = camera.principal_point_x, camera.principal_point_y
            if not (0 <= x <= width and 0 <= y <= height):
                raise DataError(
                    f"{name} is {width} x {height}, but the principal point of the given camera, "
                    f"({x:g}, {y:g}), lies outside of it; give the parameters of images of this "
                    "size"
                )
            return camera
        return self._initial_camera(size, image)

    def _initial_camera(self, size: tuple[int, int], image: Path | None) -> Any:
        """Camera by the EXIF of an image, or with the default focal length."""
        width, height = size
        if image is not None:
            try:
                camera = self._colmap.infer_camera_from_image(image)
                if (camera.width, camera.height) == size:
                    return camera
            except (ValueError, RuntimeError):
                pass  # a format that COLMAP cannot read, such as WebP
        focal = FOCAL_FACTOR * max(size)
        return self._colmap.Camera(
            model="SIMPLE_RADIAL",
            width=width,
            height=height,
            params=[focal, width / 2, height / 2, 0],
        )

    def _add_image(self, name: str, camera: Any, file: Path | None) -> int:
        """Add a camera, an image, the rig and frame that COLMAP creates for a single image, and the
        GPS position of the file.
        """
        colmap, database = self._colmap, self._database
        image = colmap.Image(name=name, camera_id=self._store_camera(camera))
        image.image_id = database.write_image(image)
        if hasattr(database, "write_rig"):
            database.write_frame(self._frame(image))
        position = None if file is None else read_position(file)
        if position is not None and all(map(math.isfinite, position)):
            self._add_position(image, position)
        return image.image_id

    def _store_camera(self, camera: Any) -> int:
        """The id of a camera, which is stored unless it is."""
        if not self._database.exists_camera(camera.camera_id):
            camera.camera_id = self._database.write_camera(camera)
        return camera.camera_id

    def _frame(self, image: Any) -> Any:
        """The frame of an image, in the rig of its camera."""
        sensor = image.data_id.sensor_id
        rig = self._database.read_rig_with_sensor(sensor)
        if rig is None:
            rig = self._colmap.Rig()
            rig.add_ref_sensor(sensor)
            rig.rig_id = self._database.write_rig(rig)
        frame = self._colmap.Frame()
        frame.rig_id = rig.rig_id
        frame.add_data_id(image.data_id)
        return frame

    def _encode(self, values: np.ndarray) -> Any:
        """Descriptors (N,D) float32 in COLMAP's representation."""
        kinds = self._colmap.FeatureExtractorType
        stored = self._colmap.FeatureDescriptors()
        dimension = values.shape[1]
        if dimension <= SIFT_DIMENSION:
            stored.data, stored.type = to_sift(values), kinds.SIFT
        else:
            if not self._warned:
                logger.warning(
                    "%s: COLMAP's own matchers end the process at descriptors of dimension %d "
                    "(largest: %d); use tiepoints match",
                    self.path,
                    dimension,
                    SIFT_DIMENSION,
                )
            self._warned = True
            stored.data = np.ascontiguousarray(values, dtype=np.float32).view(np.uint8)
            stored.type = kinds.UNDEFINED
        return stored

    def read(self, name: str) -> Features:
        """Read the features of an image; COLMAP stores no scores, so these are 1.

        Raises:
            DataError: no such image, no keypoints, or descriptors of an unsupported type.
        """
        image_id = self._image_id(name)
        if not self._database.exists_keypoints(image_id):
            raise DataError(f"{self.path} contains no features of {name!r}")
        table = torch.from_numpy(
            np.array(self._database.read_keypoints(image_id), dtype=np.float64)
        )
        count = len(table)
        scale, angle = torch.ones(count), torch.zeros(count)
        if table.shape[1] == 4:
            scale, angle = table[:, 2].float(), table[:, 3].float()
        elif table.shape[1] == 6:
            a11, a12, a21, a22 = table[:, 2:].unbind(1)  # affine shape
            scale = (a11 * a22 - a12 * a21).abs().sqrt().float()
            angle = torch.atan2(a21, a11).float()
        camera = self._database.read_camera(self._database.read_image(image_id).camera_id)
        descriptors = None
        if self._database.exists_descriptors(image_id):
            descriptors = torch.from_numpy(
                self._decode(self._database.read_descriptors(image_id), name)
            )
            if len(descriptors) != count:
                raise DataError(
                    f"{self.path}: {name} has {count} keypoints but {len(descriptors)} descriptors"
                )
        keypoints = Keypoints((table[:, :2] - HALF_PIXEL).float(), scale, angle, torch.ones(count))
        return Features(keypoints, descriptors, (camera.width, camera.height))

    def read_detected(self, name: str) -> Features:
        """``read`` with the positions that the keypoints had before ``keep_detected``, if that has
        been called.
        """
        features = self.read(name)
        xy = self._kept(name)
        if xy is None:
            return features
        positions = torch.from_numpy(xy.copy()).float()
        return replace(features, keypoints=replace(features.keypoints, xy=positions))

    def _kept(self, name: str) -> np.ndarray | None:
        """Positions of an image that ``keep_detected`` has stored and that are of its features."""
        digest = self._detected.digests.get(name)
        return None if digest is None or digest != self.digest(name) else self._detected.get(name)

    def keep_detected(self, names: Iterable[str]) -> None:
        """Remember the positions of the keypoints of images, which are going to be moved, in a file
        next to the database; those that are remembered already are kept.

        Raises:
            DataError: no such image, or the file could not be written.
            OSError: the disk is full.
        """
        known = self._detected.digests
        digests = {name: self.digest(name) for name in names}
        self._detected.put(
            (name, digest, self.read_positions(name))
            for name, digest in digests.items()
            if known.get(name) != digest
        )

    def restore_detected(self, names: Iterable[str]) -> set[str]:
        """Move the keypoints of images back to where ``keep_detected`` found them; returns the
        images of which some have moved.
        """
        moved = set()
        for name in names:
            xy = self._kept(name)
            if xy is not None and not np.array_equal(xy, self.read_positions(name)):
                self.move_keypoints(name, torch.from_numpy(xy.copy()))
                moved.add(name)
        return moved

    def move_keypoints(self, name: str, xy: torch.Tensor) -> None:
        """Replace the positions (N,2) of the keypoints of an image.

        Scales, angles, descriptors and matches are kept. The two-view geometries of the image still
        belong to the old positions: see ``forget_geometry``.

        Raises:
            DataError: no such image, or another number of keypoints.
        """
        image_id = self._image_id(name)
        table = np.array(self._database.read_keypoints(image_id), dtype=np.float32)
        if len(table) != len(xy):
            raise DataError(
                f"{self.path}: {name} has {len(table)} keypoints, got {len(xy)} positions"
            )
        table[:, :2] = (xy.double() + HALF_PIXEL).float().numpy()
        with self._transaction(table.nbytes):
            self._database.update_keypoints(image_id, table)

    def forget_geometry(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Remove the two-view geometries of ``pairs``, so that ``verify`` estimates them again; raw
        matches are kept.
        """
        with self._transaction():
            for a, b in pairs:
                if self._verified(a, b):
                    self._database.delete_two_view_geometry(self._image_id(a), self._image_id(b))

    def _decode(self, stored: Any, name: str) -> np.ndarray:
        """Descriptors (N,D) float32 of COLMAP's representation."""
        kinds = self._colmap.FeatureExtractorType
        data = np.array(stored.data, order="C")  # pycolmap's array is read-only
        if stored.type == kinds.SIFT:
            return from_sift(data)
        if data.shape[1] % 4:
            raise DataError(
                f"{self.path}: descriptors of {name} are {data.shape[1]} bytes of type "
                f"{stored.type.name}, not floats"
            )
        return data.view(np.float32)

    def _image_id(self, name: str) -> int:
        if name not in self._ids:
            raise DataError(f"{self.path} contains no image {name!r}")
        return self._ids[name]

    # ---- matches

    def has_matches(self, a: str, b: str) -> bool:
        """Whether the database contains matches of the pair, in either order."""
        if a not in self or b not in self:
            return False
        return self._database.exists_matches(self._image_id(a), self._image_id(b))

    def write_matches(self, a: str, b: str, matches: Matches, count: int | None = None) -> None:
        """Write the raw matches of two images; existing matches and their geometry are replaced."""
        id_a, id_b = self._image_id(a), self._image_id(b)
        table = matches.index.cpu().numpy().astype(np.uint32)
        with self._transaction(table.nbytes):
            if self._database.exists_matches(id_a, id_b):
                self._database.delete_matches(id_a, id_b)
            if self._database.exists_two_view_geometry(id_a, id_b):
                self._database.delete_two_view_geometry(id_a, id_b)
            self._database.write_matches(id_a, id_b, table)

    def holds_matches(self) -> bool:
        """Whether the database contains matches or two-view geometries of any pair."""
        database = self._database
        return database.num_matched_image_pairs() > 0 or database.num_verified_image_pairs() > 0

    def remove_matches(self, names: Iterable[str]) -> None:
        """Remove the matches and two-view geometries of all pairs of images."""
        ids = [self._ids[name] for name in names if name in self._ids]
        self._delete((), ("matches", "two_view_geometries"), ids)

    def clear_matches(self) -> None:
        """Remove all matches and two-view geometries; images and features are kept."""
        with self._writing():
            self._database.clear_matches()
            self._database.clear_two_view_geometries()

    def read_matches(self, a: str, b: str) -> Matches:
        """Read the raw matches of a pair; COLMAP stores no scores, so these are 1.

        Raises:
            DataError: no such image or pair.
        """
        if not self.has_matches(a, b):
            raise DataError(f"{self.path} contains no matches of {a!r} and {b!r}")
        return _as_matches(self._database.read_matches(self._image_id(a), self._image_id(b)))

    def verify(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        max_error: float = 4.0,
        max_trials: int = 10_000,
        seed: int = 0,
        among: Mapping[tuple[str, str], Tensor] | None = None,
        progress: bool = False,
    ) -> int:
        """Estimate and store the two-view geometries of the raw matches of ``pairs`` with COLMAP.

        The result is that of COLMAP's ``verify_matches``, whose list of pairs does not support
        names with white space, and which aborts the process on a full disk. Pairs that are already
        verified are skipped.

        Args:
            pairs: names of the images.
            max_error: largest error of an inlier in pixels.
            max_trials: largest number of random samples of a pair; the default is COLMAP's.
            seed: of the random sampling.
            among: pair -> (K,2) indices of the matches to use instead of the raw ones.

        Returns:
            number of pairs with a geometry that has inliers.

        Raises:
            OSError: the disk is full; the pairs verified so far are stored.
        """
        pairs = list(pairs)
        pending = [pair for pair in pairs if not self._verified(*pair)]
        options = self._colmap.TwoViewGeometryOptions()
        options.ransac.max_error, options.ransac.max_num_trials = max_error, max_trials
        options.ransac.random_seed = seed
        view, among = lru_cache(VERIFY_BATCH)(self._view), among or {}

        def estimate(job: tuple[Any, ...]) -> Any:
            (camera_a, xy_a), (camera_b, xy_b), index = job
            return self._colmap.estimate_two_view_geometry(
                camera_a, xy_a, camera_b, xy_b, index, options
            )

        bar = Progress(len(pending), unit="pair", label="verify", enabled=progress)
        with quiet_colmap(self._colmap), ThreadPoolExecutor(os.cpu_count()) as pool, bar:
            for start in range(0, len(pending), VERIFY_BATCH):
                batch = pending[start : start + VERIFY_BATCH]
                ids = [(self._image_id(a), self._image_id(b)) for a, b in batch]
                jobs = [
                    (
                        *(view(a), view(b)),
                        among[pair].numpy().astype(np.uint32)
                        if pair in among
                        else self._database.read_matches(a, b),
                    )
                    for pair, (a, b) in zip(batch, ids, strict=True)
                ]
                geometries = list(pool.map(estimate, jobs))
                with self._transaction(sum(job[2].nbytes for job in jobs)):
                    for (a, b), geometry in zip(ids, geometries, strict=True):
                        self._database.write_two_view_geometry(a, b, geometry)
                bar.update(len(ids))
        return sum(len(self.read_inliers(a, b)) > 0 for a, b in pairs)

    def _view(self, image_id: int) -> tuple[Any, np.ndarray]:
        """Camera, and positions (N,2) float64 of the keypoints, of an image."""
        camera = self._database.read_camera(self._database.read_image(image_id).camera_id)
        return camera, np.array(self._database.read_keypoints(image_id), np.float64)[:, :2]

    def read_inliers(self, a: str, b: str) -> Matches:
        """Inlier matches of a pair; empty if it has no two-view geometry."""
        if not self._verified(a, b):
            return _as_matches(np.zeros((0, 2)))
        id_a, id_b = self._image_id(a), self._image_id(b)
        return _as_matches(self._database.read_two_view_geometry(id_a, id_b).inlier_matches)

    def pairs(self) -> list[tuple[str, str]]:
        """The pairs that have been matched, also those without any match, as names in the order in
        which the images were added.
        """
        names = {image_id: name for name, image_id in self._ids.items()}
        self._database.close()  # see _delete; pycolmap omits pairs without matches
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as connection:
                rows = connection.execute("SELECT pair_id FROM matches ORDER BY pair_id").fetchall()
        finally:
            self._database = self._colmap.Database.open(self.path)
        found = [pair for (pair,) in rows]
        ids = (self._colmap.pair_id_to_image_pair(pair) for pair in found)
        return [(names[a], names[b]) for a, b in ids]

    def _verified(self, a: str, b: str) -> bool:
        return self._database.exists_two_view_geometry(self._image_id(a), self._image_id(b))


def _parameters(camera: Any) -> list[Any]:
    """All of a camera but its number, as JSON."""
    prior = bool(camera.has_prior_focal_length)
    return [camera.model.name, camera.width, camera.height, prior, *camera.params.tolist()]


def to_sift(values: np.ndarray) -> np.ndarray:
    """Descriptors (N,D) of unit length as SIFT of COLMAP, (N,128) uint8 of norm 512, between which
    COLMAP's distances are in the order of the distances of ``values``.

    If some are negative, the mean of each descriptor is subtracted and its length normalized, so
    that the shift by ``SIFT_SHIFT`` is orthogonal to it and all distances shrink equally. D is at
    most 128; columns above are 0.
    """
    count, dimension = values.shape
    if count and values.min() < 0:
        values = values - values.mean(axis=1, keepdims=True)
        values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-9)
        values = (values + SIFT_SHIFT) / _shifted_norm(dimension)
    padded = np.zeros((count, SIFT_DIMENSION), np.uint8)
    padded[:, :dimension] = np.clip(np.round(SIFT_FACTOR * values), 0, 255)
    return padded


def from_sift(data: np.ndarray) -> np.ndarray:
    """Descriptors (N,D) float32 of unit length of COLMAP's (N,128) uint8: SIFT, or signed ones
    given to ``to_sift``, without their mean. Shifted ones are recognized by their sums.
    """
    values = data.astype(np.float32)
    used = np.flatnonzero(data.any(axis=0))
    if len(used):
        dimension = int(used[-1]) + 1
        norm = _shifted_norm(dimension)
        expected = SIFT_FACTOR * SIFT_SHIFT * dimension / norm
        if np.median(np.abs(values.sum(axis=1) / expected - 1)) < SHIFT_TOLERANCE:
            values = values[:, :dimension] * (norm / SIFT_FACTOR) - SIFT_SHIFT
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-9)


def _shifted_norm(dimension: int) -> float:
    """Norm of a unit vector plus an orthogonal vector of ``dimension`` values ``SIFT_SHIFT``."""
    return math.sqrt(1 + dimension * SIFT_SHIFT**2)


def _digest(keypoints: np.ndarray, descriptors: np.ndarray | None) -> str:
    """Digest of features; without positions, which refinement moves, if there are descriptors."""
    table = np.asarray(keypoints, dtype=np.float32)
    if descriptors is None:
        return array_digest(table)
    return array_digest(table[:, 2:], np.asarray(descriptors))


def _as_matches(table: np.ndarray) -> Matches:
    """Matches of a table (K,2), sorted by the keypoint of a, with scores of 1."""
    index = torch.from_numpy(np.asarray(table).astype(np.int64).reshape(-1, 2))
    index = index[index[:, 0].argsort(stable=True)]
    return Matches(index, torch.ones(len(index)))


@contextmanager
def quiet_colmap(colmap: Any, *, errors: bool = True) -> Iterator[None]:
    """Suppress COLMAP's information and warnings, which it writes for every image; errors are
    shown unless the caller reports them.
    """
    before = colmap.logging.minloglevel
    colmap.logging.minloglevel = max(before, 2 if errors else 3)
    try:
        yield
    finally:
        colmap.logging.minloglevel = before
