"""COLMAP's mappers on a database of verified matches, and what their models consist of."""

from __future__ import annotations

import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, first_line
from ..files import atomic_path, require_space
from ..formats.colmap import HALF_PIXEL, quiet_colmap, require_pycolmap
from ..image import ReadOptions, to_rgb
from ..names import MAPPERS
from ..progress import Progress, track

#: Smallest number of images of a second model.
MIN_MODEL_SIZE = 3
#: The mapper starts again with another seed, at most this number of times in all, if its largest
#: model has fewer than this share of the images.
TRIES, SUFFICIENT_SHARE = 3, 0.5
#: Largest number of images that are mapped once more with constant cameras if some are missing or a
#: focal length is implausible.
FEW_IMAGES = 100
#: Plausible focal lengths relative to the longest side of the image; COLMAP's limits.
FOCAL_RANGE = (0.1, 10.0)
#: Largest factor between the focal lengths before and after their refinement at the end.
FOCAL_CHANGE = 2.0
#: Scale of the robust loss, and largest residual of the observations that are kept, relative to the
#: median residual. If the coordinates of the residuals are normal with deviation s, their median
#: length is 1.18 s, and a Cauchy loss of 2.4 s costs 5 % of the accuracy (Holland, Welsch 1977).
LOSS_SCALE, KEPT_RESIDUAL = 2.0, 10.0
#: Rounds of robust bundle adjustment, as the median falls with the outliers; smallest angle in
#: degrees between the rays of the points that are kept, COLMAP's default.
ROBUST_ROUNDS, MIN_ANGLE = 2, 1.5
#: Number of points that an image of a model must see, and that parts of a model must share: COLMAP
#: needs as many to register an image.
MIN_POINTS = 30
#: A round ends when the loss falls by less than this fraction.
TOLERANCE = 1e-5
#: Images that share a camera are not of one if cameras of their own reduce the median residual
#: below this share (docs/results/reconstruction.md: above 0.9 for images of one camera), and
#: their largest focal length is this factor above the smallest.
SEPARATE_SHARE, SEPARATE_FACTOR = 0.85, 1.05
#: They keep at least this share of the observations then (scenes with a zoom: 0.97 and more). Views
#: that hardly determine the focal length have small residuals, too, if the cameras move together,
#: which removes points (0.43).
SEPARATE_KEPT = 0.9
#: Of models that are adjusted at the end: the incremental mapper adjusts all of a model when it has
#: grown by this factor (COLMAP's default is 1.1), and ends when the loss falls by less than this
#: fraction. Half the time for as many images and points, and camera errors as small.
MAPPER_GROWTH, MAPPER_TOLERANCE = 1.3, 1e-4
#: Color of the positions of the cameras in ``model.ply``.
CAMERA_COLOR = (255, 0, 0)
#: Bytes of a model per 2D and 3D point, at most.
POINT_BYTES = 200


@dataclass(frozen=True)
class ModelStatistics:
    """Statistics of a model.

    Attributes:
        images: number of images with a pose.
        points: number of 3D points (seen by at least three images each, COLMAP's default).
        observations: number of keypoints that belong to a 3D point.
        track_length: mean number of images per 3D point.
        error: mean reprojection error in pixels.
    """

    images: int
    points: int
    observations: int
    track_length: float
    error: float

    @classmethod
    def of(cls, model: Any) -> ModelStatistics:
        """Statistics of a ``pycolmap.Reconstruction``."""
        return cls(
            images=model.num_reg_images(),
            points=model.num_points3D(),
            observations=model.compute_num_observations(),
            track_length=model.compute_mean_track_length(),
            error=model.compute_mean_reprojection_error(),
        )


@dataclass(frozen=True)
class MapOptions:
    """Options of the mapper.

    Attributes:
        mapper: ``incremental``, or ``global`` (GLOMAP: faster for many images).
        seed: of the random draws; results are reproducible with one thread only.
        threads: -1: all.
        verbose: show COLMAP's log.

    Raises:
        ValueError: an unknown mapper.
    """

    mapper: str = "incremental"
    seed: int = 0
    threads: int = -1
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.mapper not in MAPPERS:
            raise ValueError(f"mapper must be one of {', '.join(MAPPERS)}; got {self.mapper!r}")


def map_images(
    database: str | Path,
    work: Path,
    options: MapOptions | None = None,
    *,
    images: Sequence[str] | None = None,
    adjusted_later: bool = False,
    progress: bool = False,
) -> list[Any]:
    """Run COLMAP's mapper with its default options on a database of verified matches.

    The incremental mapper draws its first pair at random and sometimes stops early; it starts again
    if its largest model has fewer than ``SUFFICIENT_SHARE`` of the images. If any of at most
    ``FEW_IMAGES`` images are missing, it starts once more, and the models with more images, or with
    more observations of as many, are kept. Of views that hardly determine the focal length, its
    estimate may diverge: if images are missing then, or a focal length is implausible, they are
    mapped with the cameras as they are in the database, which are refined at the end.

    Args:
        database: ``.db`` file.
        work: folder that is created for COLMAP's files and removed.
        images: names of the images to use; None uses all and does not start again.
        adjusted_later: the models are adjusted afterwards (``adjust_robustly``), so that fewer and
            less exact adjustments during the incremental mapping suffice.
        progress: show the number of registered images.

    Returns:
        ``pycolmap.Reconstruction`` of each model without colors, that of the most images first;
        without those whose images are all in larger ones.

    Raises:
        DataError: COLMAP fails.
        OSError: the disk is full.
    """
    options = options or MapOptions()

    def run(seed: int, *, refine: bool = True) -> list[Any]:
        return largest_first(
            _map_once(
                database,
                work,
                options,
                seed,
                images,
                progress,
                refine=refine,
                adjusted_later=adjusted_later,
            )
        )

    best: list[Any] = []
    again = images is not None and options.mapper == "incremental"
    for seed in range(options.seed, options.seed + (TRIES if again else 1)):
        models = run(seed)
        if not best or (models and models[0].num_reg_images() > best[0].num_reg_images()):
            best = models
        if images is None or (best and best[0].num_reg_images() >= SUFFICIENT_SHARE * len(images)):
            break
    if not again or images is None or len(images) > FEW_IMAGES:
        return best
    if best and len(_names(best)) < len(images):
        models = run(seed + 1)
        best = max(best, models, key=_explained)
    implausible = any(map(implausible_focal_lengths, best))
    if implausible or len(_names(best)) < len(images):
        models = run(options.seed, refine=False)
        if len(_names(models)) > len(_names(best)) - implausible:
            best = [_refined(model, options.threads) for model in models]
    return best


def _explained(models: list[Any]) -> tuple[int, int]:
    """Number of images in models, and number of their observations."""
    return len(_names(models)), sum(model.compute_num_observations() for model in models)


def implausible_focal_lengths(model: Any) -> list[str]:
    """Names of the registered images with a focal length beyond ``FOCAL_RANGE``."""
    low, high = FOCAL_RANGE
    bad = {
        number
        for number, camera in model.cameras.items()
        if not low <= camera.mean_focal_length() / max(camera.width, camera.height) <= high
    }
    images = (model.image(number) for number in model.reg_image_ids())
    return sorted(image.name for image in images if image.camera_id in bad)


def largest_first(models: list[Any]) -> list[Any]:
    """The models with 3D points, that of the most images first, see ``not_contained``."""
    models = [model for model in models if model.num_points3D()]
    models.sort(key=lambda model: (-model.num_reg_images(), -model.num_points3D()))
    return not_contained(models)


def _names(models: Iterable[Any]) -> set[str]:
    """Names of the registered images of all models."""
    return {model.image(image).name for model in models for image in model.reg_image_ids()}


def _refined(model: Any, threads: int) -> Any:
    """The model with cameras, poses and points refined together; unchanged if a focal length
    diverges.
    """
    colmap = require_pycolmap()
    refined = colmap.Reconstruction(model)
    options = colmap.BundleAdjustmentOptions()
    options.ceres.solver_options.num_threads = threads
    _adjust(refined, options)
    return model if _diverged(model, refined) else refined


def _adjust(model: Any, options: Any) -> None:
    """Bundle adjustment of a model, which is changed; ``pycolmap.bundle_adjustment`` always writes
    to the standard error.
    """
    colmap = require_pycolmap()
    config = colmap.BundleAdjustmentConfig()
    for image in model.reg_image_ids():
        config.add_image(image)
    config.fix_gauge(colmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    options.print_summary = False
    with quiet_colmap(colmap):
        colmap.create_default_bundle_adjuster(options, config, model).solve()
    model.update_point_3d_errors()


def _diverged(model: Any, refined: Any) -> bool:
    """Whether the refinement of a model has changed a focal length more than ``FOCAL_CHANGE``."""
    changes = [
        camera.mean_focal_length() / model.cameras[number].mean_focal_length()
        for number, camera in refined.cameras.items()
    ]
    return not all(1 / FOCAL_CHANGE < change < FOCAL_CHANGE for change in changes)


def adjust_robustly(model: Any, threads: int = -1) -> Any:
    """The model after bundle adjustment with a Cauchy loss, without the observations that it does
    not explain.

    COLMAP's mapper minimizes squared residuals of all observations within 4 px, many of which are
    matches of different points next to each other; their influence is bounded here.

    Args:
        model: a ``pycolmap.Reconstruction``; it is not changed.
        threads: -1: all.

    Returns:
        another ``pycolmap.Reconstruction`` with the same images; or ``model``, if a focal length
        diverges or an image would lose its last point.
    """
    colmap = require_pycolmap()
    adjusted = colmap.Reconstruction(model)
    options = colmap.BundleAdjustmentOptions()
    options.ceres.loss_function_type = colmap.LossFunctionType.CAUCHY
    options.ceres.solver_options.function_tolerance = TOLERANCE
    options.ceres.solver_options.num_threads = threads
    for _ in range(ROBUST_ROUNDS):
        options.ceres.loss_function_scale = LOSS_SCALE * median_residual(adjusted)
        _adjust(adjusted, options)
        colmap.ObservationManager(adjusted).filter_all_points3D(
            KEPT_RESIDUAL * median_residual(adjusted), MIN_ANGLE
        )
    seen = all(adjusted.image(image).num_points3D for image in adjusted.reg_image_ids())
    return model if not seen or _diverged(model, adjusted) else adjusted


def adjusted_parts(model: Any, threads: int = -1) -> list[tuple[Any, Any]]:
    """The model after ``adjust_robustly``, or its parts, each adjusted alone, if it falls apart.

    Parts that the mapper connected by incorrect matches, as of repeated structure, are not
    connected any more when those have been removed; nothing tells then where they are relative to
    each other.

    Args:
        model: a ``pycolmap.Reconstruction``; it is not changed.
        threads: -1: all.

    Returns:
        each part before and after the adjustment, that of the most images first; without those of
        fewer than ``MIN_MODEL_SIZE`` images, unless all are.
    """
    adjusted = adjust_robustly(model, threads)
    parts = connected_parts(adjusted)
    large = [part for part in parts if len(part) >= MIN_MODEL_SIZE]
    if len(parts) == 1 or not large:
        return [(model, adjusted)]
    return [one for part in large for one in adjusted_parts(_only(model, part), threads)]


def connected_parts(model: Any) -> list[set[int]]:
    """Numbers of the images of each part of a model, that of the most images first. Images, and
    parts found so far, that share ``MIN_POINTS`` points belong to one part.
    """
    part = {image: image for image in model.reg_image_ids()}
    views = [
        {element.image_id for element in point.track.elements} for point in model.points3D.values()
    ]
    while True:
        shared: Counter[tuple[int, int]] = Counter()
        for images in views:
            shared.update(combinations(sorted({part[image] for image in images}), 2))
        joined = [pair for pair, count in shared.items() if count >= MIN_POINTS]
        if not joined:
            break
        neighbors: dict[int, set[int]] = defaultdict(set)
        for a, b in joined:
            neighbors[a].add(b)
            neighbors[b].add(a)
        first = {number: number for number in part.values()}
        reached: set[int] = set()
        for start in sorted(neighbors):
            ends = [start] if start not in reached else []
            while ends:
                number = ends.pop()
                if number not in reached:
                    reached.add(number)
                    first[number] = start
                    ends.extend(neighbors[number])
        part = {image: first[number] for image, number in part.items()}
    members: dict[int, set[int]] = defaultdict(set)
    for image, number in part.items():
        members[number].add(image)
    return sorted(members.values(), key=len, reverse=True)


def _only(model: Any, images: Collection[int]) -> Any:
    """A copy of a model with these of its images."""
    part = require_pycolmap().Reconstruction(model)
    for image in sorted(set(part.reg_image_ids()) - set(images)):
        part.deregister_frame(part.image(image).frame_id)
    return part


def without_uncertain_images(model: Any) -> Any:
    """The model without images that see fewer than ``MIN_POINTS`` of its points, the fewest first;
    their positions are often wrong.

    Args:
        model: a ``pycolmap.Reconstruction``; it is not changed.

    Returns:
        another ``pycolmap.Reconstruction``; or ``model``, if no image is uncertain or fewer than
        two would remain.
    """
    certain = require_pycolmap().Reconstruction(model)
    while certain.num_reg_images() > 1:
        images = [certain.image(image) for image in certain.reg_image_ids()]
        fewest = min(images, key=lambda image: image.num_points3D)
        if fewest.num_points3D >= MIN_POINTS:
            return model if len(images) == model.num_reg_images() else certain
        certain.deregister_frame(fewest.frame_id)
    return model


def is_certain(model: Any) -> bool:
    """Whether each image of a model sees at least ``MIN_POINTS`` of its points."""
    return all(model.image(image).num_points3D >= MIN_POINTS for image in model.reg_image_ids())


def separate_cameras(
    model: Any, adjusted: Any, threads: int = -1, *, first_id: int | None = None
) -> Any:
    """The model with a camera for each image, adjusted robustly, if its images turn out to be not
    of one camera and zoom, as ``exif.shared_cameras`` assumes.

    Args:
        model: a ``pycolmap.Reconstruction``; it is not changed.
        adjusted: ``adjust_robustly(model)``; each adjustment removes the largest residuals, so both
            results must have had as many.
        threads: -1: all.
        first_id: of ``with_own_cameras``.

    Returns:
        another ``pycolmap.Reconstruction``; or ``adjusted``, if cameras of their own hardly differ,
        hardly reduce the residuals (``SEPARATE_SHARE``) or lose observations (``SEPARATE_KEPT``).
    """
    users: dict[int, list[int]] = defaultdict(list)
    for number in model.reg_image_ids():
        users[model.image(number).camera_id].append(number)
    shared = {camera for camera, images in users.items() if len(images) > 1}
    if not shared:
        return adjusted
    separate = adjust_robustly(with_own_cameras(model, shared, first_id), threads)

    def focal(image: int) -> float:
        return separate.camera(separate.image(image).camera_id).mean_focal_length()

    lengths = [[focal(image) for image in users[camera]] for camera in shared]
    differ = any(max(found) > SEPARATE_FACTOR * min(found) for found in lengths)
    better = median_residual(separate) < SEPARATE_SHARE * median_residual(adjusted)
    count = separate.compute_num_observations()
    kept = count >= SEPARATE_KEPT * adjusted.compute_num_observations()
    return separate if differ and better and kept else adjusted


def with_own_cameras(model: Any, shared: set[int], first_id: int | None = None) -> Any:
    """A copy of a model with copies of the cameras ``shared``, one for each image.

    Args:
        first_id: from which on no camera and rig has an id; a copy has the sum of it and the id of
            its image. None: above the cameras of the model.
    """
    colmap = require_pycolmap()
    first_id = max(model.cameras) + 1 if first_id is None else first_id
    result = colmap.Reconstruction()
    for number in sorted(model.reg_image_ids()):
        given = model.image(number)
        camera = colmap.Camera(model.camera(given.camera_id).todict())
        if given.camera_id in shared:
            camera.camera_id = first_id + number
        if camera.camera_id not in result.cameras:
            result.add_camera_with_trivial_rig(camera)
        image = colmap.Image(name=given.name, camera_id=camera.camera_id, image_id=number)
        image.points2D = [colmap.Point2D(point.xy) for point in given.points2D]
        result.add_image_with_trivial_frame(image, given.cam_from_world())
    for point in model.points3D.values():
        result.add_point3D(point.xyz, point.track, point.color)
    return result


def median_residual(model: Any) -> float:
    """Median distance in pixels between projected points and keypoints; at least 1e-3."""
    views = read_model(model).views.values()
    lengths = [np.linalg.norm(view.residual, axis=1) for view in views]
    # not a number: a point behind the camera, as an adjustment may leave a few
    return max(float(np.nanmedian(np.concatenate([*lengths, np.zeros(1)]))), 1e-3)


def not_contained(models: list[Any]) -> list[Any]:
    """The models that have an image which those before them do not have: the mapper tries again
    from another pair, also of images that are in a model.
    """
    kept: list[Any] = []
    seen: set[str] = set()
    for model in models:
        names = _names([model])
        if not names <= seen:
            kept.append(model)
        seen |= names
    return kept


def _map_once(
    database: str | Path,
    work: Path,
    options: MapOptions,
    seed: int,
    images: Sequence[str] | None,
    progress: bool,
    *,
    refine: bool,
    adjusted_later: bool,
) -> list[Any]:
    """Run the mapper once; without ``refine``, the cameras of the database are not changed."""
    colmap = require_pycolmap()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    total = None if images is None else len(images)
    bar = Progress(total, unit="image", label="map", enabled=progress)

    def advance() -> None:
        if total is None or bar.count < total:  # an image may be registered in several models
            bar.update()

    try:
        with nullcontext() if options.verbose else quiet_colmap(colmap, errors=False), bar:
            if options.mapper == "global":
                settings = colmap.GlobalPipelineOptions()
                settings.image_names = list(images or ())
                settings.random_seed, settings.num_threads = seed, options.threads
                models = colmap.global_mapping(Path(database), work, work, settings)
            else:
                settings = colmap.IncrementalPipelineOptions()
                settings.image_names = list(images or ())
                settings.random_seed, settings.num_threads = seed, options.threads
                settings.min_model_size = MIN_MODEL_SIZE
                settings.extract_colors = False
                settings.ba_refine_focal_length = refine
                settings.ba_refine_extra_params = refine
                if adjusted_later:
                    settings.ba_global_frames_ratio = settings.ba_global_points_ratio = (
                        MAPPER_GROWTH
                    )
                    settings.ba_global_function_tolerance = MAPPER_TOLERANCE
                    settings.ba_local_function_tolerance = MAPPER_TOLERANCE
                models = colmap.incremental_mapping(
                    Path(database), work, work, settings, next_image_callback=advance
                )
    except (RuntimeError, ValueError) as error:
        raise DataError(f"COLMAP could not map {database}: {first_line(error)}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return list(models.values())


def write_models(models: list[Any], folder: Path) -> None:
    """Write models to ``0``, ``1``, ... of a folder, which is replaced.

    Raises:
        OSError: the disk is full; COLMAP would abort the process.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    size = sum(model.compute_num_observations() + model.num_points3D() for model in models)
    require_space(folder.parent, POINT_BYTES * size + 2**20)
    tmp_path = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()  # of no model, an empty folder
    for index, model in enumerate(models):
        (tmp_path / str(index)).mkdir(parents=True)
        model.write(tmp_path / str(index))
    shutil.rmtree(folder, ignore_errors=True)
    tmp_path.rename(folder)


@dataclass(frozen=True)
class View:
    """An image of a model.

    Attributes:
        center: (3,) position of the camera.
        rotation: (3,3) from the world to the camera.
        size: (width, height) of the image.
        focal: focal length in pixels.
        xy: (N,2) keypoints that belong to a 3D point, in pixels.
        point: (N,) int64 rows of the points in ``Model``.
        residual: (N,2) projected point minus keypoint in pixels.
    """

    center: np.ndarray
    rotation: np.ndarray
    size: tuple[int, int]
    focal: float
    xy: np.ndarray
    point: np.ndarray
    residual: np.ndarray


@dataclass(frozen=True)
class Model:
    """Arrays of a model.

    Attributes:
        points: (P,3).
        length: (P,) number of images per point.
        views: image name -> its view.
    """

    points: np.ndarray
    length: np.ndarray
    views: dict[str, View]


def read_model(model: Any) -> Model:
    """The arrays of a ``pycolmap.Reconstruction``; points in the order of ``model.points3D``."""
    ids = list(model.points3D)
    row = {point: i for i, point in enumerate(ids)}
    found = list(model.points3D.values())
    points = np.array([point.xyz for point in found]).reshape(-1, 3)
    length = np.array([point.track.length() for point in found], dtype=np.int64)
    views = {}
    for image_id in sorted(model.reg_image_ids()):
        image = model.image(image_id)
        camera = model.camera(image.camera_id)
        seen = [(row[p.point3D_id], *p.xy) for p in image.points2D if p.has_point3D()]
        table = np.array(seen, dtype=np.float64).reshape(-1, 3)
        index, xy = table[:, 0].astype(np.int64), table[:, 1:]
        pose = image.cam_from_world()
        rotation = pose.rotation.matrix()
        projected = camera.img_from_cam(points[index] @ rotation.T + pose.translation)
        views[image.name] = View(
            center=-rotation.T @ pose.translation,
            rotation=rotation,
            size=(camera.width, camera.height),
            focal=camera.mean_focal_length(),
            xy=xy - HALF_PIXEL,
            point=index,
            residual=np.asarray(projected).reshape(-1, 2) - xy,
        )
    return Model(points, length, views)


def color_points(
    arrays: Model,
    files: Mapping[str, Path],
    reading: ReadOptions | None = None,
    *,
    on_image: Callable[[str, Any], None] | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Mean colors (P,3) uint8 of the points of a model in their images; black if none can be read.

    Args:
        files: name -> image.
        on_image: called with the name and the RGB image of each view.
    """
    sums = np.zeros((len(arrays.points), 3))
    count = np.zeros(len(arrays.points))
    for name in track(list(arrays.views), unit="image", label="color", enabled=progress):
        view = arrays.views[name]
        if name not in files:
            continue
        try:
            photo = to_rgb(files[name], reading)
        except (OSError, DataError):
            continue
        pixels = np.asarray(photo)
        x, y = (np.rint(view.xy[:, k]).astype(int) for k in (0, 1))
        x, y = x.clip(0, pixels.shape[1] - 1), y.clip(0, pixels.shape[0] - 1)
        np.add.at(sums, view.point, pixels[y, x])
        np.add.at(count, view.point, 1)
        if on_image is not None:
            on_image(name, photo)
    return np.rint(sums / np.maximum(count, 1)[:, None]).astype(np.uint8)


def write_ply(path: Path, arrays: Model, colors: np.ndarray) -> None:
    """Write colored points, and the positions of the cameras in ``CAMERA_COLOR``, as binary PLY."""
    centers = np.array([view.center for view in arrays.views.values()]).reshape(-1, 3)
    kind = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertices = np.zeros(len(arrays.points) + len(centers), kind)
    vertices["xyz"] = np.concatenate([arrays.points, centers])
    vertices["rgb"][: len(colors)] = colors
    vertices["rgb"][len(colors) :] = CAMERA_COLOR
    fields = [f"property float {name}" for name in "xyz"]
    fields += [f"property uchar {name}" for name in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    text = "\n".join([*header, *fields, "end_header", ""])
    with atomic_path(path) as tmp_path:
        tmp_path.write_bytes(text.encode() + vertices.tobytes())


def median_angle(arrays: Model, limit: int = 2000) -> float:
    """Median over (at most ``limit``) points of the largest angle in degrees between two of their
    rays; 0 without points.
    """
    rays: dict[int, list[np.ndarray]] = {}
    chosen = set(range(0, len(arrays.points), max(1, math.ceil(len(arrays.points) / limit))))
    for view in arrays.views.values():
        for point in view.point.tolist():
            if point in chosen:
                rays.setdefault(point, []).append(view.center - arrays.points[point])
    angles = []
    for directions in rays.values():
        unit = np.array(directions)
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        angles.append(np.degrees(np.arccos(np.clip(unit @ unit.T, -1, 1).min())))
    return float(np.median(angles)) if angles else 0.0
