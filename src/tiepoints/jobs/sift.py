"""The same photographs reconstructed with COLMAP's own SIFT, for a comparison."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import DataError, first_line
from ..files import write_json, write_text
from ..formats.colmap import quiet_colmap, require_pycolmap
from ..formats.records import files_digest, json_digest, read_settings
from ..progress import Progress
from .mapping import MapOptions, ModelStatistics, map_images, write_models


def compare_sift(
    folder: Path,
    root: Path,
    names: list[str],
    pairs: list[tuple[str, str]],
    *,
    max_size: int | None,
    camera: str,
    groups: Mapping[str, Any],
    mapping: MapOptions,
    progress: bool = False,
) -> dict[str, Any]:
    """Reconstruct images with COLMAP's SIFT, its default options and its own matching.

    Args:
        folder: of the results; kept if they are of the same images, pairs and options.
        root: folder to which ``names`` are relative.
        pairs: to match; all pairs are matched if a name has white space, which COLMAP's list of
            pairs does not support.
        max_size: longest side of the processed images.
        camera: known intrinsics, see ``ColmapDatabase``; other values change nothing.
        groups: name -> key, the same for images that share a camera; others have their own.

    Returns:
        ``models``, the statistics of each model; ``registered``, ``seconds``; ``unread``, the
        images that COLMAP cannot read; and, if it failed, ``error``.
    """
    record = {
        "names": names,
        "files": files_digest(root / name for name in names),
        "pairs": json_digest(pairs),
        "max_size": max_size,
        "camera": camera,
        "groups": json_digest(sorted(groups.items())),
        **asdict(mapping),
    }
    result = folder / "summary.json"
    stored = read_settings(result)
    if stored is not None and stored.get("options") == record:
        return stored["result"]
    folder.mkdir(parents=True, exist_ok=True)
    database = folder / "database.db"
    for end in ("", "-wal", "-shm"):
        database.with_name(database.name + end).unlink(missing_ok=True)
    started = time.monotonic()
    try:
        found = _reconstruct(
            database, root, names, pairs, max_size, camera, groups, mapping, progress
        )
    except (RuntimeError, ValueError, DataError) as error:
        return {"models": [], "registered": 0, "seconds": 0.0, "error": first_line(error)}
    write_models(found, folder / "sparse")
    models = [asdict(ModelStatistics.of(model)) for model in found]
    content = {
        "models": models,
        "registered": models[0]["images"] if models else 0,
        "unread": sorted(set(names) - _stored(database)),
        "seconds": round(time.monotonic() - started, 2),
    }
    write_json(result, {"options": record, "result": content})
    return content


def _stored(database: Path) -> set[str]:
    """Names of the images that COLMAP has read."""
    with require_pycolmap().Database.open(database) as stored:
        return {image.name for image in stored.read_all_images()}


# The options of the caller.
def _reconstruct(
    database: Path,
    root: Path,
    names: list[str],
    pairs: list[tuple[str, str]],
    max_size: int | None,
    camera: str,
    groups: Mapping[str, Any],
    mapping: MapOptions,
    progress: bool,
) -> list[Any]:
    colmap = require_pycolmap()
    extraction = colmap.FeatureExtractionOptions()
    extraction.type = colmap.FeatureExtractorType.SIFT
    extraction.max_image_size = max_size or -1
    extraction.num_threads = mapping.threads
    reader = colmap.ImageReaderOptions()
    model, _, numbers = camera.partition(":")
    if numbers:
        reader.camera_model, reader.camera_params = model, numbers
    members: dict[Any, list[str]] = defaultdict(list)
    for name in names:
        members[groups.get(name, name)].append(name)
    mode = colmap.CameraMode.SINGLE
    if len(members) == len(names):  # read at once
        members, mode = {"": names}, colmap.CameraMode.PER_IMAGE
    matching = colmap.FeatureMatchingOptions()
    matching.num_threads = mapping.threads
    with (
        quiet_colmap(colmap),
        Progress(2, unit="step", label="SIFT", enabled=progress) as bar,
    ):
        for group in members.values():
            colmap.extract_features(database, root, group, mode, reader, extraction)
        bar.update()
        if any(character.isspace() for name in names for character in name):
            colmap.match_exhaustive(database, matching)
        else:
            listed, known = database.with_name("pairs.txt"), _stored(database)
            chosen_pairs = [pair for pair in pairs if known.issuperset(pair)]
            write_text(listed, "".join(f"{a} {b}\n" for a, b in chosen_pairs))
            chosen = colmap.ImportedPairingOptions()
            chosen.match_list_path = listed
            colmap.match_image_pairs(database, matching, chosen)
        bar.update()
    return map_images(
        database, database.with_name(".mapping"), mapping, images=names, progress=progress
    )
