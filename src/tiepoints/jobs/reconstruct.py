"""Photographs or a video to a 3D model in one call: extract, choose pairs, match, verify, refine,
map, color and report.

Every stage is stored in the folder of the results, and the same call resumes.
docs/how-to/reconstruct.md describes the files.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.reconstructions import IMAGE_FOLDER
from ..errors import DataError, first_line
from ..extract import ExtractOptions
from ..files import Lock, Task, collect, is_disk_full, write_json, write_text
from ..filters import fitting_size, laplacian_variance, reduce
from ..formats.colmap import ColmapDatabase, quiet_colmap, require_pycolmap
from ..formats.hdf5 import read_pairs
from ..formats.records import array_digest, json_digest, read_settings, record_path
from ..image import load_image
from ..names import DESCRIPTOR, DETECTOR, PAIR_METHODS, QUALITIES
from ..panorama import rotation_share
from ..progress import track
from .extract import counted_pages
from .frames import is_video, save_frames
from .mapping import (
    KEPT_RESIDUAL,
    LOSS_SCALE,
    MIN_MODEL_SIZE,
    MIN_POINTS,
    SEPARATE_FACTOR,
    SEPARATE_KEPT,
    SEPARATE_SHARE,
    MapOptions,
    Model,
    ModelStatistics,
    adjusted_parts,
    color_points,
    implausible_focal_lengths,
    is_certain,
    largest_first,
    map_images,
    median_angle,
    read_model,
    separate_cameras,
    without_uncertain_images,
    write_models,
    write_ply,
)
from .match import MatchOptions, MatchReport, match_images
from .sift import compare_sift

logger = logging.getLogger(__name__)
#: Verified matches from which a pair shows whether the camera moved, and the share of them that a
#: rotation explains in a pair without parallax.
ROTATION_MATCHES, ROTATION_SHARE = 30, 0.85
#: Share of the verified matches in pairs without parallax from which nothing is reconstructed, and
#: the number of pairs that are checked.
ROTATION_SCENE, ROTATION_PAIRS = 0.9, 200
#: Median displacement of the matches, as a fraction of the longest side, below which two images
#: show the same view.
SAME_VIEW = 0.002
#: Images with fewer keypoints are said to have too few.
FEW_KEYPOINTS = 50
#: Images whose variance of the Laplacian, at this longest side, is less than this fraction of the
#: median of the registered ones (of at most this number) are said to be blurred.
SHARPNESS_SIZE, BLURRED, SHARPNESS_IMAGES = 800, 0.2, 20
#: Results of the last stages.
RESULTS = ("sparse", "model.ply", "report.html", "dense")
#: Median angle between the rays of a point in degrees below which depths are uncertain.
SMALL_ANGLE = 2.0


@dataclass(frozen=True)
class Quality:
    """What ``quality`` chooses.

    Attributes:
        detector, descriptor, num_keypoints, max_size, down_levels: see ``ExtractOptions``.
        neighbors: of each image if not all pairs are matched.
    """

    detector: str
    descriptor: str
    num_keypoints: int
    max_size: int
    neighbors: int
    down_levels: int | None = None


QUALITY = {
    "fast": Quality("sobelnet", "desnet", 1024, 1024, 10, down_levels=2),
    "default": Quality(DETECTOR, DESCRIPTOR, 2048, 1600, 20),
    "best": Quality(DETECTOR, DESCRIPTOR, 4096, 3200, 40),
}
assert tuple(QUALITY) == QUALITIES


@dataclass(frozen=True)
class ReconstructOptions:
    """Options of ``reconstruct``.

    Attributes:
        quality: ``fast``, ``default`` or ``best``: detector, descriptor, number of keypoints, image
            size and number of pairs (``QUALITY``), without an enlarged level of the pyramid.
        max_size: longest side of the processed images, instead of that of ``quality``; 0 = no
            limit.
        pairs: a method of ``names.PAIR_METHODS``, or a file with a list of pairs.
        neighbors: number of neighbors per image, instead of that of ``quality``.
        camera: see ``extract_images``; of videos, ``auto`` is ``single``.
        masks: folder of masks, see ``extract_images``.
        value_range, pages: see ``ReadOptions`` and ``extract_images``.
        mapper: ``incremental`` or ``global``.
        fps: frames per second of a video.
        undistort: write images without distortion for dense reconstruction.
        compare: ``sift`` reconstructs the same images with COLMAP's SIFT as well.
        device: of the networks.
        workers: number of processes that extract images and match pairs, see ``match_images``;
            None = one for each core, from a script only if it is protected by
            ``if __name__ == "__main__"``.
        seed, threads: see ``MapOptions``.

    Raises:
        ValueError: an option is out of range.
    """

    quality: str = "default"
    max_size: int | None = None
    pairs: str = "auto"
    neighbors: int | None = None
    camera: str = "auto"
    masks: str | Path | None = None
    value_range: str = "type"
    pages: str = "first"
    mapper: str = "incremental"
    fps: float = 2.0
    undistort: bool = False
    compare: str | None = None
    device: str = "auto"
    workers: int | None = 1
    seed: int = 0
    threads: int = -1

    def __post_init__(self) -> None:
        if self.quality not in QUALITY:
            raise ValueError(f"quality must be one of {', '.join(QUALITY)}; got {self.quality!r}")
        if self.compare not in (None, "sift"):
            raise ValueError(f"compare must be sift or None, got {self.compare!r}")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be positive, got {self.fps}")
        if self.neighbors is not None and self.neighbors < 1:
            raise ValueError(f"neighbors must be at least 1, got {self.neighbors}")
        if self.threads < -1:
            raise ValueError(f"threads must be at least -1 (all), got {self.threads}")
        self.mapping()
        self.extraction()

    def mapping(self) -> MapOptions:
        """The options of the mapper."""
        return MapOptions(self.mapper, self.seed, self.threads)

    def extraction(self) -> ExtractOptions:
        """The options of the extraction."""
        chosen = QUALITY[self.quality]
        largest = chosen.max_size if self.max_size is None else self.max_size
        return ExtractOptions(
            detector=chosen.detector,
            descriptor=chosen.descriptor,
            num_keypoints=chosen.num_keypoints,
            # a third faster, and more images are registered than with an enlarged level
            up_levels=0,
            down_levels=chosen.down_levels,
            max_size=largest or None,
            value_range=self.value_range,
            device=self.device,
        )


@dataclass
class Summary:
    """Result of ``reconstruct``, written to ``summary.json``.

    Attributes:
        images: number of images with features.
        registered: number of images in the largest model.
        models: statistics of each model in ``sparse/0``, ``sparse/1``, ...
        pairs: how many pairs were chosen, matched and verified, and why these.
        camera: as ``ReconstructOptions.camera``.
        cameras: number of cameras of the largest model.
        unregistered: (image, reason) of images that are not in the largest model.
        failed: (image or pair, reason) of what could not be used.
        ignored: number of files in the given folders that are not images.
        warnings: what users should know about the model.
        angle: median angle in degrees between two rays of a point of the largest model.
        seconds: duration of each stage; of an earlier call if its results were complete.
        sift: statistics with COLMAP's SIFT, see ``sift.compare_sift``.
        files: name -> path of the results.
    """

    images: int = 0
    registered: int = 0
    models: list[ModelStatistics] = field(default_factory=list)
    pairs: dict[str, Any] = field(default_factory=dict)
    camera: str = ""
    cameras: int = 0
    unregistered: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    ignored: int = 0
    warnings: list[str] = field(default_factory=list)
    angle: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    sift: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all images are in one model."""
        return not self.unregistered and not self.failed

    @property
    def camera_text(self) -> str:
        """Which images share a camera, in words."""
        if ":" in self.camera:
            return self.camera  # known intrinsics
        if self.cameras == 1:
            return "one for all images"
        if self.cameras == self.registered:
            return "one per image"
        return f"{self.cameras} for {self.registered} images"

    def to_json(self) -> dict[str, Any]:
        """The summary as a JSON object."""
        return asdict(self)


def reconstruct(
    images: str | os.PathLike | Iterable[str | os.PathLike],
    output: str | os.PathLike,
    *,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> tuple[Any, Summary]:
    """Reconstruct photographs: cameras and colored 3D points. Run again, it resumes.

    Args:
        images: a folder of photographs, several files, folders and patterns, or one video.
        output: folder of the results: ``database.db``, ``sparse/0`` (the model of the most images,
            in COLMAP's binary format), ``model.ply``, ``summary.json``, ``report.html``.
        overwrite: match and map again, also with other options.
        progress: show the progress of each stage.
        options: attributes of ``ReconstructOptions``.

    Returns:
        the ``pycolmap.Reconstruction`` with the most images, and the summary.

    Raises:
        DataError: nothing can be reconstructed: one image, no overlap, a camera that only rotated;
            or files that cannot be used. The message names the reason and the remedy.
        ValueError, TypeError, FileNotFoundError, ImportError: invalid options or files.
        OSError: the disk is full; what is done is kept.
    """
    chosen = ReconstructOptions(**options)
    require_pycolmap()
    given = [images] if isinstance(images, str | os.PathLike) else list(images)
    for image in given:
        if not isinstance(image, str | os.PathLike):
            raise TypeError(
                f"images must be names of files or folders, got {type(image).__name__}; save "
                "arrays as files first"
            )
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder):
        job = _Reconstruction(folder, chosen, overwrite, progress)
        try:
            return job.run([str(i) for i in given])
        except DataError as error:
            if earlier := [name for name in RESULTS if (folder / name).exists()]:
                raise DataError(
                    f"{error} ({', '.join(earlier)} in {folder} are of an earlier call)"
                ) from error
            raise


class _Reconstruction:
    """The stages of ``reconstruct``; each leaves its files in the folder."""

    def __init__(self, folder: Path, options: ReconstructOptions, overwrite: bool, progress: bool):
        self.folder, self.options = folder, options
        self.overwrite, self.progress = overwrite, progress
        self.database = folder / "database.db"
        self.summary = Summary()
        self.files: dict[str, Path] = {}
        self.root = Path()
        self.mapped_before = False
        #: Image -> key of its camera, the same for images that are mapped as of one camera.
        self._shared: dict[str, Any] = {}

    def run(self, given: list[str]) -> tuple[Any, Summary]:
        summary = self.summary
        self._collect(given)
        with self._stage("match"):
            report = self._match()
        with self._stage("check"), ColmapDatabase(self.database) as database:
            graph = read_graph(database, report.pairs)
        unlisted: list[str] = []
        if Path(self.options.pairs).is_file():
            listed = {name for pair in report.pairs for name in pair}
            unlisted = [name for name in self.files if name not in listed]
            reason = f"{self.options.pairs} has no pair of it"
            summary.unregistered += [(name, reason) for name in unlisted]
        summary.images = len(graph.keypoints) + len(unlisted)
        summary.camera = self.camera
        summary.pairs["verified"] = len(graph.inliers)
        self._check(graph)
        with self._stage("map"):
            models = self._map(graph)
        with self._stage("color"):
            arrays, colors, previews = self._color(models)
        self._summarize(models, arrays, graph)
        if self.options.undistort:
            with self._stage("undistort"):
                self._undistort()
        elif not self.mapped_before and (self.folder / "dense").exists():
            summary.warnings.append("dense is of an earlier model; use --undistort to renew it")
        if self.options.compare:
            with self._stage("sift"):
                summary.sift = compare_sift(
                    self.folder / "sift",
                    self.root,
                    list(graph.keypoints),
                    graph.pairs,
                    max_size=self.options.extraction().max_size,
                    camera=self.camera,
                    groups=self._shared,
                    mapping=self.options.mapping(),
                    progress=self.progress,
                )
            if unread := summary.sift.get("unread"):
                summary.warnings.append(
                    f"COLMAP cannot read {len(unread)} images ({unread[0]}, ...), so its SIFT is "
                    "compared on fewer; convert them to JPEG or PNG"
                )
        summary.failed, summary.ignored = report.failed + summary.failed, report.ignored
        self._keep_seconds(report)
        with self._stage("report"):
            self._report(arrays, colors, graph, previews)
        write_json(self.folder / "summary.json", summary.to_json())
        return models[0], summary

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except OSError as error:
            if not is_disk_full(error) or str(error).endswith("resumes"):
                raise
            raise OSError(
                f"the results of the stage {name} could not be written ({error}); free space and "
                "run again: it resumes"
            ) from error
        self.summary.seconds[name] = round(time.monotonic() - started, 2)

    def _keep_seconds(self, report: MatchReport) -> None:
        """Take the durations of stages whose results were stored from the earlier call."""
        summary = self.summary
        before = (read_settings(self.folder / "summary.json") or {}).get("seconds")
        before = before if isinstance(before, dict) else {}
        stored = {"match": report.done == 0, "map": self.mapped_before, "frames": True}
        for name, is_stored in stored.items():
            if is_stored and name in summary.seconds:
                seconds = before.get(name)
                earlier = float(seconds) if isinstance(seconds, int | float) else 0.0
                summary.seconds[name] = max(summary.seconds[name], earlier)
        if summary.sift is not None:
            summary.seconds["sift"] = max(summary.seconds["sift"], summary.sift["seconds"])

    # ---- images

    def _collect(self, given: list[str]) -> None:
        """The images, and the folder to which their names are relative; frames of a video first."""
        if len(given) == 1 and is_video(given[0]):
            frames = self.folder / "frames"
            with self._stage("frames"):
                self.summary.warnings += save_frames(
                    Path(given[0]), frames, self.options.fps, progress=self.progress
                )
            self.arguments, self.root = [str(frames)], frames
            if self.options.pairs == "auto":
                self.options = replace(self.options, pairs="sequential")
            camera = "single"
        else:
            for name in given:
                if is_video(name):
                    raise ValueError(
                        f"{name} is not an image that can be read; convert it, for example to JPEG "
                        "(only one video can be given, alone)"
                    )
            self.arguments, self.root = given, _common_folder(given, self.folder)
            camera = "auto"
        pages = counted_pages(self.options.pages)
        found = collect(self.arguments, root=self.root, inside=True, pages=pages)
        results = [(self.folder / name).resolve() for name in ("dense", "frames")]
        if camera == "auto" and any(
            task.source.resolve().is_relative_to(folder)
            for task in found.tasks
            for folder in results
        ):
            raise ValueError(
                f"the given images include results in --output {self.folder}; choose a folder "
                "outside of the photographs"
            )
        self.tasks: list[Task] = found.tasks
        self.files = {str(task.relative): task.source for task in found.tasks}
        if self.options.pairs not in PAIR_METHODS:
            next(read_pairs(self.options.pairs), None)  # raises before any work
        if 0 < len(found.tasks) < MIN_MODEL_SIZE:
            raise DataError(
                f"{len(found.tasks)} photograph{'s' * (len(found.tasks) > 1)} given, and a model "
                f"needs at least {MIN_MODEL_SIZE} that overlap, from different positions"
            )
        self.camera = camera if self.options.camera == "auto" else self.options.camera

    # ---- features and matches

    def _match(self) -> MatchReport:
        options = self.options
        report = match_images(
            self.arguments,
            self.database,
            options.extraction(),
            MatchOptions(),
            pairs=options.pairs,
            neighbors=options.neighbors,
            default_neighbors=QUALITY[options.quality].neighbors,
            root=self.root,
            camera=self.camera,
            masks=None if options.masks is None else Path(options.masks),
            pages=options.pages,
            overwrite=self.overwrite,
            exclusive=True,
            workers=options.workers,
            progress=self.progress,
        )
        self._shared = {name: report.shared[name] for name in self.files if name in report.shared}
        if self.camera not in ("auto", "per-image"):
            self._shared = dict.fromkeys(self.files, self.camera)
        self.summary.pairs = {
            "chosen": len(report.pairs),
            "matched": report.done,
            "reason": report.selection,
        }
        return report

    # ---- checks before the mapping

    def _check(self, graph: Graph) -> None:
        """Raise a ``DataError`` if nothing can be reconstructed."""
        if not graph.inliers:
            raise DataError(_no_overlap(graph))
        overlapping = {name for pair in graph.inliers for name in pair}
        if len(overlapping) < MIN_MODEL_SIZE:
            raise DataError(
                f"only {' and '.join(sorted(overlapping))} overlap, and a model needs at least "
                f"{MIN_MODEL_SIZE} such photographs; take more from different positions"
            )
        if graph.still < ROTATION_SCENE:
            return
        if graph.moved < SAME_VIEW:
            raise DataError(
                "the photographs show the same view from one position, which has no depth; take "
                "them from different positions"
            )
        raise DataError(
            f"the camera only rotated: {graph.still:.0%} of the verified matches have no parallax, "
            "so depths cannot be determined; take photographs from different positions (for a "
            "panorama, use the matches in database.db)"
        )

    # ---- models

    def _map(self, graph: Graph) -> list[Any]:
        """The models, mapped unless those of the same matches and options are stored."""
        colmap = require_pycolmap()
        sparse = self.folder / "sparse"
        settings = record_path(sparse, "settings.json")
        record = {
            **asdict(self.options.mapping()),
            "matches": graph.digest,
            "adjusted": [LOSS_SCALE, KEPT_RESIDUAL, MIN_POINTS, MIN_MODEL_SIZE],
            "cameras": json_digest(sorted(self._shared.items())),
            "separated": [SEPARATE_SHARE, SEPARATE_FACTOR, SEPARATE_KEPT]
            if self._assumed
            else None,
        }
        write_text(self.folder / IMAGE_FOLDER, f"{os.path.abspath(self.root)}\n")
        stored = read_settings(settings) or {}
        count = stored.pop("models", 0)
        if stored == record and count and not self.overwrite:
            try:
                models = [colmap.Reconstruction(sparse / str(i)) for i in range(count)]
                self.mapped_before = True
                self._store_cameras(models)
                return models
            except (RuntimeError, ValueError, LookupError):
                logger.info("%s is damaged; mapped again", sparse)
        matched = {name for pair in graph.inliers for name in pair}
        models = map_images(
            self.database,
            self.folder / ".mapping",
            self.options.mapping(),
            images=sorted(matched),
            adjusted_later=True,
            progress=self.progress,
        )
        bar = track(models, unit="model", label="adjust", enabled=self.progress)
        with ColmapDatabase(self.database) as database:
            first_id = database.next_camera_id()
        models = largest_first([one for model in bar for one in self._adjusted(model, first_id)])
        # of a few points, only the largest model is worth showing, with a warning
        models = [model for model in models if is_certain(model)] or models[:1]
        if not models:
            raise DataError(
                f"no model: {len(graph.inliers)} pairs of {len(matched)} images overlap, but no "
                "two of them have enough common points at different depths; take photographs with "
                "more overlap from more different positions"
            )
        settings.unlink(missing_ok=True)
        write_models(models, sparse)
        self._store_cameras(models)
        write_json(settings, {**record, "models": len(models)})
        return models

    def _store_cameras(self, models: list[Any]) -> None:
        """Give images of the database the cameras that they have in the models, so that COLMAP can
        continue with both.
        """
        cameras = {
            image.name: image.camera_id
            for model in reversed(models)  # the largest one decides
            for image in map(model.image, model.reg_image_ids())
        }
        with ColmapDatabase(self.database) as database:
            other = any(
                database.read_camera(name).camera_id != number for name, number in cameras.items()
            )
        if other:
            with ColmapDatabase(self.database, write=True) as database:
                database.separate(cameras)

    def _adjusted(self, model: Any, first_id: int) -> list[Any]:
        """The adjusted model, or several if it consists of parts that nothing connects."""
        threads = self.options.threads
        found = []
        for part, adjusted in adjusted_parts(model, threads):
            if self._assumed:
                adjusted = separate_cameras(part, adjusted, threads, first_id=first_id)
            found.append(without_uncertain_images(adjusted))
        return found

    @property
    def _assumed(self) -> bool:
        """Whether nobody has said which images share a camera."""
        return self.options.camera == "auto"

    def _color(self, models: list[Any]) -> tuple[Model, np.ndarray, dict[str, Any]]:
        """Colors of all models; arrays, colors and previews of the first."""
        from ..report.reconstruction import preview

        previews: dict[str, Any] = {}

        def keep(name: str, photo: Any) -> None:
            previews[name] = preview(photo)

        changed, first = False, None
        for model in models:
            arrays = read_model(model)
            colors = color_points(
                arrays,
                self.files,
                on_image=keep if first is None else None,
                progress=self.progress,
            )
            for point, color in zip(model.points3D.values(), colors, strict=True):
                changed = changed or not np.array_equal(point.color, color)
                point.color = color
            first = first or (arrays, colors)
        assert first is not None
        if changed:
            write_models(models, self.folder / "sparse")
        write_ply(self.folder / "model.ply", *first)
        return (*first, previews)

    def _undistort(self) -> None:
        """Write ``dense/``: images without distortion, and the model of them."""
        colmap = require_pycolmap()
        dense = self.folder / "dense"
        with quiet_colmap(colmap, errors=False):
            try:
                colmap.undistort_images(dense, self.folder / "sparse" / "0", self.root)
            except (RuntimeError, ValueError) as error:
                self.summary.failed.append(
                    ("undistort", f"COLMAP could not write {dense} ({first_line(error)})")
                )
                return
            self._remove_unread(dense)
        self.summary.files["undistorted"] = str(dense)

    def _remove_unread(self, dense: Path) -> None:
        """Remove images that COLMAP cannot read, such as WebP, from the undistorted model, and the
        images of earlier models.
        """
        model = require_pycolmap().Reconstruction(dense / "sparse")
        images = {model.image(number).name: number for number in model.reg_image_ids()}
        for path in (dense / "images").rglob("*"):
            if path.is_file() and path.relative_to(dense / "images").as_posix() not in images:
                path.unlink()
        unread = sorted(name for name in images if not (dense / "images" / name).is_file())
        for name in unread:
            self.summary.failed.append(
                (name, f"COLMAP cannot read it, so {dense} lacks it; convert it to JPEG or PNG")
            )
            model.deregister_frame(model.image(images[name]).frame_id)
        if unread:
            model.write(dense / "sparse")

    # ---- result

    def _summarize(self, models: list[Any], arrays: Model, graph: Graph) -> None:
        summary, folder = self.summary, self.folder
        summary.models = [ModelStatistics.of(model) for model in models]
        summary.registered = summary.models[0].images
        summary.angle = round(median_angle(arrays), 2)
        others = {
            model.image(image).name: index
            for index, model in reversed(list(enumerate(models)))
            for image in model.reg_image_ids()
        }
        missing = [name for name in graph.keypoints if name not in arrays.views]
        sharpness = self._sharpness(missing, list(arrays.views))
        for name in missing:
            reason = _why_unregistered(name, others.get(name), graph, set(arrays.views))
            if graph.keypoints[name] and sharpness.get(name, 1.0) < BLURRED:
                reason += f"; blurred: {sharpness[name]:.0%} of the usual sharpness"
            summary.unregistered.append((name, reason))
        if len(models) > 1:
            sizes = ", ".join(str(model.images) for model in summary.models)
            summary.warnings.append(
                f"{len(models)} models of {sizes} images: the photographs show {len(models)} "
                "scenes, or parts of one without enough overlap between them"
            )
        if not is_certain(models[0]):
            summary.warnings.append(
                f"the model has only {summary.models[0].points} points, so the positions of its "
                "cameras are uncertain; take photographs with more overlap"
            )
        if summary.angle < SMALL_ANGLE:
            summary.warnings.append(
                f"the rays of a point meet at {summary.angle:.1f} degrees (median), so depths are "
                "uncertain; take photographs from more different positions"
            )
        used = {models[0].image(image).camera_id for image in models[0].reg_image_ids()}
        summary.cameras = len(used)
        if len(used) > len({self._shared.get(name, name) for name in arrays.views}):
            focal = [models[0].camera(number).mean_focal_length() for number in used]
            summary.warnings.append(
                f"the images seem not to be of one camera and zoom: focal lengths from "
                f"{min(focal):.0f} to {max(focal):.0f} pixels, so each has a camera of its own; if "
                "they are of one, use --camera single --overwrite"
                + ("; for the missing ones, use --camera per-image --overwrite" if missing else "")
            )
        if wrong := implausible_focal_lengths(models[0]):
            summary.warnings.append(
                f"the focal lengths of {len(wrong)} images are implausible ({wrong[0]}, ...), so "
                "the model is distorted: the photographs hardly determine them; give --camera "
                "single if all are of one camera, or its parameters"
            )
        summary.files |= {
            "database": str(self.database),
            "model": str(folder / "sparse" / "0"),
            "points": str(folder / "model.ply"),
            "report": str(folder / "report.html"),
        }

    def _sharpness(self, missing: list[str], registered: list[str]) -> dict[str, float]:
        """Sharpness of the missing images, as a fraction of the median of registered ones."""
        if not missing:
            return {}
        chosen = registered[:: max(1, math.ceil(len(registered) / SHARPNESS_IMAGES))]
        measured: dict[str, float] = {}
        for name in [*chosen, *missing]:
            try:
                image = load_image(self.files[name])
            except (OSError, DataError, ValueError):
                continue
            size = fitting_size((image.shape[-2], image.shape[-1]), SHARPNESS_SIZE)
            measured[name] = laplacian_variance(reduce(image, size))
        usual = float(np.median([measured[name] for name in chosen if name in measured] or [0.0]))
        if not usual > 0:
            return {}
        return {name: measured[name] / usual for name in missing if name in measured}

    def _report(
        self, arrays: Model, colors: np.ndarray, graph: Graph, previews: dict[str, Any]
    ) -> None:
        from ..report.reconstruction import Scene, render

        scene = Scene(
            title=self.root.resolve().name or "reconstruction",
            summary=self.summary.to_json(),
            camera=self.summary.camera_text,
            points=arrays.points,
            colors=colors,
            length=arrays.length,
            views=arrays.views,
            keypoints=graph.keypoints,
            inliers=graph.inliers,
            previews=previews,
        )
        write_text(self.folder / "report.html", render(scene))


def _common_folder(given: list[str], output: Path) -> Path:
    """The folder to which the names of images are relative.

    Raises:
        ValueError: it contains the results, whose images would be read on the next call.
    """
    if len(given) == 1 and Path(given[0]).is_dir():
        root = Path(given[0])
    else:
        tasks = collect(given).tasks
        parents = [os.path.abspath(task.path.parent) for task in tasks]
        parents += [os.path.abspath(name) for name in given if Path(name).is_dir()]
        root = Path(os.path.commonpath(parents)) if parents else Path()
    inputs = [Path(name) for name in given if Path(name).is_dir()]
    if any(output.resolve().is_relative_to(folder.resolve()) for folder in inputs):
        raise ValueError(
            f"--output {output} is inside the folder of the photographs; choose one outside"
        )
    return root


# ---- matches


@dataclass(frozen=True)
class Graph:
    """Verified matches of a database.

    Attributes:
        keypoints: image -> number of its keypoints.
        pairs: the pairs that were matched.
        inliers: pair -> number of its verified matches, if there are some.
        digest: of keypoints, cameras and verified matches.
        still: share (0..1) of the verified matches in pairs that show no parallax.
        moved: median displacement of the verified matches, in units of the longest side.
    """

    keypoints: dict[str, int]
    pairs: list[tuple[str, str]]
    inliers: dict[tuple[str, str], int]
    digest: str
    still: float
    moved: float

    @cached_property
    def partners(self) -> dict[str, dict[str, int]]:
        """Image -> overlapping image -> number of verified matches."""
        found: dict[str, dict[str, int]] = {name: {} for name in self.keypoints}
        for (a, b), count in self.inliers.items():
            found[a][b] = found[b][a] = count
        return found

    @cached_property
    def tried(self) -> Counter[str]:
        """Image -> number of its pairs that were matched."""
        return Counter(name for pair in self.pairs for name in pair)


def read_graph(database: ColmapDatabase, chosen: Iterable[tuple[str, str]]) -> Graph:
    """Read the verified matches of the pairs ``chosen``."""
    chosen = list(chosen)
    positions = {
        name: database.read_positions(name)
        for name in dict.fromkeys(name for pair in chosen for name in pair)
        if database.done(name, described=False)
    }
    cameras = {name: database.read_camera(name) for name in positions}
    digests: list[Any] = [
        [name, array_digest(xy), array_digest(np.asarray(cameras[name].params))]
        for name, xy in positions.items()
    ]
    wanted = {frozenset(pair) for pair in chosen}
    pairs = [pair for pair in database.pairs() if frozenset(pair) in wanted]
    inliers: dict[tuple[str, str], np.ndarray] = {}
    for a, b in pairs:
        index = database.read_inliers(a, b).index.numpy()
        if len(index):
            inliers[a, b] = index
            digests.append([a, b, array_digest(index)])
    still, moved = _parallax(inliers, positions, cameras)
    return Graph(
        {name: len(xy) for name, xy in positions.items()},
        pairs,
        {pair: len(index) for pair, index in inliers.items()},
        json_digest(digests),
        still,
        moved,
    )


def _parallax(
    inliers: dict[tuple[str, str], np.ndarray],
    positions: dict[str, np.ndarray],
    cameras: dict[str, Any],
) -> tuple[float, float]:
    """``still`` and ``moved`` of ``Graph``, from the pairs with the most verified matches."""
    largest = sorted(inliers, key=lambda pair: -len(inliers[pair]))
    # evenly chosen, as neighbors in time have the most matches and the least parallax
    usable = [pair for pair in largest if len(inliers[pair]) >= ROTATION_MATCHES]
    chosen = usable[:: max(1, math.ceil(len(usable) / ROTATION_PAIRS))]
    total = still = 0
    moved = []
    for a, b in chosen:
        index = inliers[a, b]
        xy_a, xy_b = positions[a][index[:, 0]], positions[b][index[:, 1]]
        sizes = tuple((cameras[name].width, cameras[name].height) for name in (a, b))
        focal = None
        if cameras[a].has_prior_focal_length and cameras[b].has_prior_focal_length:
            focal = cameras[a].mean_focal_length() / max(sizes[0])
        share = rotation_share(xy_a, xy_b, (sizes[0], sizes[1]), focal)
        total += len(index)
        still += len(index) * (share >= ROTATION_SHARE)
        moved.append(np.linalg.norm(xy_a - xy_b, axis=1) / max(sizes[0]))
    if not total:
        return 0.0, 1.0
    return still / total, float(np.median(np.concatenate(moved)))


def _no_overlap(graph: Graph) -> str:
    """Why no pair has verified matches."""
    few = sorted(name for name, count in graph.keypoints.items() if count < FEW_KEYPOINTS)
    text = f"no overlap: none of {len(graph.pairs)} pairs of {len(graph.keypoints)} images match"
    if few:
        text += (
            f"; {len(few)} images have fewer than {FEW_KEYPOINTS} keypoints, such as {few[0]} "
            f"({graph.keypoints[few[0]]}): they are uniform or blurred"
        )
    return text + "; neighboring photographs should share at least half of their area"


def _why_unregistered(
    name: str, model: int | None, graph: Graph, registered: Collection[str]
) -> str:
    """Why an image is not in the largest model."""
    if model is not None:
        return f"in another model, sparse/{model}"
    count = graph.keypoints[name]
    if count < FEW_KEYPOINTS:
        return f"{count} keypoints: uniform, blurred or masked"
    partners = graph.partners[name]
    if not partners:
        return f"no overlap with another image was found ({graph.tried[name]} pairs matched)"
    best = max(partners, key=lambda other: partners[other])
    inside = [other for other in partners if other in registered]
    text = f"{partners[best]} verified matches with {best}"
    if not inside:
        return f"overlaps only with images that are not in the model ({text})"
    return f"too few matches with points of the model ({text}, {len(inside)} images in all)"
