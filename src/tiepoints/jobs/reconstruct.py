"""COLMAP's incremental mapper on a database of verified matches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..formats.colmap import quiet_colmap, require_pycolmap
from ..progress import Progress


@dataclass(frozen=True)
class Reconstruction:
    """Statistics of the largest model of COLMAP's mapper.

    Attributes:
        models: number of models.
        registered: number of images with a pose.
        points: number of 3D points (seen by at least three images each, COLMAP's default).
        observations: number of keypoints that belong to a 3D point.
        track_length: mean number of images per 3D point.
        error: mean reprojection error in pixels.
        folder: of the model in COLMAP's binary format; None without a model.
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
    progress: bool = False,
) -> Reconstruction:
    """Run COLMAP's incremental mapper with its default options on a database of verified matches.

    Args:
        database: ``.db`` file.
        images: folder to which the names of the images are relative.
        out: folder for the models, ``0``, ``1``, ...
        seed: of the random draws; results are reproducible with one thread only.
        threads: -1: all.
        verbose: show COLMAP's log.
        progress: show the number of registered images.
    """
    colmap = require_pycolmap()
    options = colmap.IncrementalPipelineOptions()
    options.random_seed = seed
    options.num_threads = threads
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    bar = Progress(None, unit="image", label="map", enabled=progress)
    with nullcontext() if verbose else quiet_colmap(colmap), bar:
        models = colmap.incremental_mapping(
            Path(database), Path(images), out, options, next_image_callback=bar.update
        )
    if not models:
        return Reconstruction(0, 0, 0, 0, 0.0, 0.0, None)
    index, best = max(
        models.items(), key=lambda item: (item[1].num_reg_images(), item[1].num_points3D())
    )
    return Reconstruction(
        models=len(models),
        registered=best.num_reg_images(),
        points=best.num_points3D(),
        observations=best.compute_num_observations(),
        track_length=best.compute_mean_track_length(),
        error=best.compute_mean_reprojection_error(),
        folder=out / str(index),
    )
