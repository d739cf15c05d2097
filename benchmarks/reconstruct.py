"""Photographs to a model: `tiepoints reconstruct` beside COLMAP's SIFT and the features of others.

    python benchmarks/reconstruct.py FOLDER[:CAMERA] ... [--systems default,fast,sift-1600,xfeat] \\
        [--every K] [--enlarge F] --out FILE.json

Systems: a quality of `tiepoints reconstruct`; ``sift-N``, COLMAP's SIFT with its defaults and at
most N pixels per side; ``xfeat`` and ``aliked-n16`` (``peers.py``) with mutual nearest neighbors;
and each of these as ``NAME+robust``, with the last adjustment of `tiepoints reconstruct`.
All use COLMAP's verification and incremental mapper, once, on all cores that the process may use.
Each runs in a process of its own. The time of processor is that of all its threads and processes
without the imports, so that, unlike the elapsed time, it hardly depends on what else runs.

All systems share cameras between images as CAMERA says (`docs/formats.md`).

The cameras of Strecha's scenes are surveyed: the model is aligned with them by a similarity, and
the distances between camera centers are reported in meters. With `--every`, every K-th of the
images of a COLMAP model next to FOLDER is used; their distances from the cameras of that model are
reported in percent of the median distance of a camera from the nearest one. With `--enlarge`, every
other one of these images is enlarged F times and cut to its size, as by a zoom lens. With both, the
number of cameras of our models is reported; of one camera, the median residual with a camera for
each image, relative to that of the model (`jobs.mapping.separate_cameras`). Other rows of FILE.json
are kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tiepoints
from common import machine
from tiepoints.datasets.posed import STRECHA_CAMERAS, surveyed_cameras
from tiepoints.datasets.reconstructions import find_models
from tiepoints.errors import DataError
from tiepoints.exif import shared_cameras
from tiepoints.files import collect, write_json
from tiepoints.formats.colmap import ColmapDatabase, require_pycolmap
from tiepoints.jobs.mapping import (
    MapOptions,
    ModelStatistics,
    adjust_robustly,
    map_images,
    median_residual,
    with_own_cameras,
)
from tiepoints.jobs.sift import compare_sift
from tiepoints.matching import match
from tiepoints.names import QUALITIES
from tiepoints.structs import Matches

SYSTEMS = "default,fast,sift-1600"
#: Longest side of the images that SIFT and our systems process, if a system names none.
MAX_SIZE = 1600


def measure(
    system: str, folder: Path, camera: str, every: int = 1, enlarge: float = 1.0
) -> dict[str, Any]:
    """Reconstruct the photographs of a folder with one system."""
    chosen = every > 1 or enlarge > 1
    truth = _modeled(folder, every) if chosen else _surveyed(folder)
    data = folder.parent.name if folder.name == "images" else folder.name
    with tempfile.TemporaryDirectory() as copies:
        if chosen:
            tasks = collect([folder], root=folder, inside=True).tasks
            files = sorted(task.path for task in tasks if task.path.name in truth)
            for index, file in enumerate(files):
                if index % 2 and enlarge > 1:
                    enlarged(file, enlarge).save(Path(copies) / file.name, quality=95)
                else:
                    (Path(copies) / file.name).symlink_to(file.resolve())
            folder = Path(copies)
        row = _measure(system, folder, camera, truth, separate=chosen)
        return {"data": data, "every": every, "enlarge": enlarge, **row}


def enlarged(path: Path, factor: float) -> Image.Image:
    """The center of a photograph, enlarged to the size of the whole."""
    with Image.open(path) as photo:
        width, height = photo.size
        x, y = (side * (1 - 1 / factor) / 2 for side in photo.size)
        box = (x, y, width - x, height - y)
        return photo.resize(photo.size, Image.Resampling.BICUBIC, box)


def _measure(
    system: str, folder: Path, camera: str, truth: dict[str, np.ndarray], separate: bool
) -> dict[str, Any]:
    """The row of a system, with the distances from ``truth``, image -> position of its camera."""
    found = collect([folder], root=folder, inside=True)
    images = {str(task.relative): task.path for task in found.tasks}
    run: Callable[..., tuple[Any, dict[str, Any]]]
    base = system.removesuffix("+robust")
    if base in QUALITIES:
        run = _ours
    elif base.startswith("sift-"):
        run = _sift
    else:
        run = _peer(base)
    started, before = time.perf_counter(), _processor_seconds()
    with tempfile.TemporaryDirectory() as work:
        model, seconds = run(base, folder, images, camera, Path(work))
        if base != system and model is not None:
            model = adjust_robustly(model)
        elapsed, used = time.perf_counter() - started, _processor_seconds() - before
    statistics = asdict(ModelStatistics.of(model)) if model is not None else {"images": 0}
    return {
        "system": system,
        "camera": camera,
        "images": len(images),
        "registered": statistics.pop("images"),
        **statistics,
        **_camera_errors(model, truth),
        **(_separation(model) if separate and base in QUALITIES else {}),
        "elapsed_s": round(elapsed, 1),
        "processor_s": round(used, 1),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }


def _processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# ---- systems: each returns the largest model, and seconds by stage


def _ours(
    system: str, folder: Path, images: dict[str, Path], camera: str, work: Path
) -> tuple[Any, dict[str, Any]]:
    try:
        model, summary = tiepoints.reconstruct(
            folder, work, quality=system, max_size=MAX_SIZE, camera=camera, workers=None
        )
    except DataError as error:
        print(f"{folder}: {error}", file=sys.stderr)
        return None, {}
    return model, summary.seconds


def _sift(
    system: str, folder: Path, images: dict[str, Path], camera: str, work: Path
) -> tuple[Any, dict[str, Any]]:
    found = compare_sift(
        work,
        folder,
        sorted(images),
        list(combinations(sorted(images), 2)),
        max_size=int(system.removeprefix("sift-")),
        camera=camera,
        groups=_groups(images, camera),
        mapping=MapOptions(),
    )
    if not found["models"]:
        return None, {}
    return require_pycolmap().Reconstruction(work / "sparse" / "0"), {}


def _groups(images: dict[str, Path], camera: str) -> dict[str, Any]:
    """Keys of the images that share a camera, for all systems the same."""
    if camera == "per-image":
        return {}
    return shared_cameras(images) if camera == "auto" else dict.fromkeys(images, 0)


def _peer(name: str) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """The features of another system, loaded before the time is measured."""
    import peers

    extract = peers.make(name)

    def run(
        system: str, folder: Path, images: dict[str, Path], camera: str, work: Path
    ) -> tuple[Any, dict[str, Any]]:
        seconds, started = {}, time.perf_counter()
        features = {image: extract(path) for image, path in images.items()}
        seconds["extract"], started = time.perf_counter() - started, time.perf_counter()
        pairs = list(combinations(sorted(images), 2))
        path = work / "database.db"
        shared = _groups(images, camera)
        with ColmapDatabase(path, camera=camera, shared=shared, write=True) as database:
            for image, file in images.items():
                database.write(image, replace(features[image], descriptors=None), file)
            for a, b in pairs:
                index = match(features[a], features[b]).index
                database.write_matches(a, b, Matches(index, torch.ones(len(index))))
            database.verify(pairs)
        seconds["match"], started = time.perf_counter() - started, time.perf_counter()
        models = map_images(path, work / "map", images=sorted(images))
        seconds["map"] = time.perf_counter() - started
        return (models[0] if models else None), seconds

    return run


# ---- known cameras


def _surveyed(folder: Path) -> dict[str, np.ndarray]:
    """Image -> surveyed position of the camera in meters; empty if it was not surveyed."""
    if not (folder.parent / STRECHA_CAMERAS).is_dir():
        return {}
    cameras = surveyed_cameras(folder.parent)[0]
    return {image.name: (-T[:3, :3].T @ T[:3, 3]).numpy() for image, (_, T) in cameras.items()}


def _modeled(folder: Path, every: int) -> dict[str, np.ndarray]:
    """Every few images of the COLMAP model next to their folder -> position of the camera."""
    model = require_pycolmap().Reconstruction(find_models(folder.parent)[0][0])
    images = [model.image(number) for number in model.reg_image_ids()]
    images.sort(key=lambda image: image.name)
    return {Path(image.name).name: image.projection_center() for image in images[::every]}


def _camera_errors(model: Any, truth: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean and largest distance between camera centers and ``truth`` after an alignment, and the
    mean relative to the distance between neighbors; empty if fewer than three are known.
    """
    registered = [] if model is None else [model.image(image) for image in model.reg_image_ids()]
    common = [image for image in registered if image.name in truth]
    if len(common) < 3:
        return {}
    found = np.array([image.projection_center() for image in common])
    true = np.array([truth[image.name] for image in common])
    errors = aligned_distances(found, true)
    apart = np.linalg.norm(true[:, None] - true, axis=2)
    np.fill_diagonal(apart, np.inf)
    return {
        "camera_error_m": float(errors.mean()),
        "camera_error_max_m": float(errors.max()),
        "camera_error_percent": float(100 * errors.mean() / np.median(apart.min(axis=1))),
    }


def _separation(model: Any) -> dict[str, Any]:
    """Number of cameras; if there is one, the median residual with a camera for each image relative
    to that of the model.
    """
    if model is None:
        return {}
    used = {model.image(image).camera_id for image in model.reg_image_ids()}
    if len(used) > 1:
        return {"cameras": len(used)}
    own = adjust_robustly(with_own_cameras(model, used))
    shared = adjust_robustly(model)  # once more, too
    return {"cameras": 1, "own_cameras": median_residual(own) / median_residual(shared)}


def aligned_distances(points: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Distances (N,) between points (N,3) and true ones after the similarity that minimizes their
    squares (Umeyama, PAMI 1991).
    """
    a, b = points - points.mean(axis=0), truth - truth.mean(axis=0)
    U, S, V = np.linalg.svd(b.T @ a)
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(U @ V))])
    scale = (S * sign).sum() / np.square(a).sum()
    return np.linalg.norm(scale * a @ (U @ np.diag(sign) @ V).T - b, axis=1)


# ---- results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders",
        nargs="+",
        help="folders of photographs; :single for a shared camera, see docs/formats.md",
    )
    parser.add_argument("--systems", default=SYSTEMS, help="comma-separated")
    parser.add_argument("--every", type=int, default=1, help="use every K-th image of a model")
    parser.add_argument("--enlarge", type=float, default=1.0, help="enlarge every other image")
    parser.add_argument("--out", type=Path, help="results; without, one row is printed as JSON")
    args = parser.parse_args(argv)
    if args.out is None:
        folder, _, camera = args.folders[0].partition(":")
        options = camera or "auto", args.every, args.enlarge
        print(json.dumps(measure(args.systems, Path(folder), *options)))
        return
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    for given in args.folders:
        for system in args.systems.split(","):
            # a process of its own: memory, and the processor's time
            command = [sys.executable, __file__, given, "--systems", system]
            command += ["--every", str(args.every), "--enlarge", str(args.enlarge)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            rows = [other for other in rows if _key(other) != _key(row)] + [row]
            write_json(args.out, {"rows": sorted(rows, key=_key)})
    print(table(sorted(rows, key=_key)))


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    numbers = str(row.get("every", 1)), str(row.get("enlarge", 1.0))
    return row["data"], *numbers, row["camera"], row["system"]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the rows."""
    lines = [
        "| photographs | cameras | system | images | points | track length | "
        "reprojection error px | camera error | own cameras | minutes of processor | minutes |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        every, enlarge = row.get("every", 1), row.get("enlarge", 1.0)
        name = row["data"] if every == 1 else f"{row['data']} 1/{every}"
        name += "" if enlarge == 1 else f" x {enlarge:g}"
        cells = [name, row["camera"], row["system"], f"{row['registered']} of {row['images']}"]
        if row["registered"]:
            cells += [f"{row['points']:,}", f"{row['track_length']:.2f}", f"{row['error']:.2f}"]
        else:
            cells += ["", "", ""]
        cells.append("")
        if "camera_error_m" in row:
            meters, percent = row["camera_error_m"], row.get("camera_error_percent")
            modeled = every > 1 or enlarge > 1
            cells[-1] = f"{percent:.1f} %" if modeled else f"{100 * meters:.1f} cm"
        own = row.get("own_cameras")
        cells.append(f"{own:.2f}" if own is not None else str(row.get("cameras", "")))
        cells += [f"{row['processor_s'] / 60:.2f}", f"{row['elapsed_s'] / 60:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
