"""A folder of the Image Matching Challenge's images to a submission: extract, match, write the layout, read it back.

What is finished is kept in ``OUT.features.h5`` and ``OUT.matches.h5`` beside the submission (hloc's files, ``formats/hdf5.py``), which a
kill does not hurt; the layout is made of them at the end of each run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import DataError
from .extract import Extractor
from .formats import imc
from .formats.hdf5 import FeatureFile, MatchFile
from .jobs import MatchReport, Report, Task, check_settings, choose_pairs, extract_to_files, match_to_file, pair_matcher, settings_place

#: Geometry that custom matches agree with: the challenge fits all it is given without a RANSAC of its own.
KIND = "fundamental"


@dataclass
class Submission:
    """How an export went.

    Attributes:
        sequences: number of sequences written.
        extracted, matched: see ``jobs``; matched is None where no custom matches were asked for.
        failed: (image, folder or pair, reason), of all steps.
        violations: what the challenge would refuse in what was written.
    """

    sequences: int
    extracted: Report
    matched: MatchReport | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)
    violations: list[imc.Violation] = field(default_factory=list)


def export_imc(
    images: Path,
    out: Path,
    label: str,
    *,
    build: Callable[[], Extractor],
    extraction: dict[str, Any],
    keypoint: str,
    descriptor: str,
    num_points: int,
    matches: bool = False,
    ratio: float = 0.95,
    threshold: float = 0.5,
    overwrite: bool = False,
    workers: int = 2,
    progress: bool = True,
) -> Submission:
    """Write ``out`` from ``images``/DATASET/SEQUENCE; run again it goes on, and extracts no finished image again.

    Args:
        images: see ``imc.find_sequences``.
        label, keypoint, descriptor, num_points: see ``imc.make_config``.
        build: makes the extractor.
        extraction: its settings, which are compared with those of the run before.
        matches: write custom matches: mutual nearest neighbours that agree with a fundamental matrix.
        ratio: largest ratio of nearest to second distance, the benchmark's or ours.
        threshold: largest error of an inlier in pixels, of the benchmark's DEGENSAC or of our estimate.

    Raises:
        ValueError, FileNotFoundError, DataError, ImportError, OSError: with the remedy.
    """
    sequences, refused = imc.find_sequences(images)
    datasets = list(dict.fromkeys(place.partition("/")[0] for place in sequences))
    options: dict[str, Any] = {"ratio": ratio, "threshold": threshold, "matches": matches, "metadata": _metadata(out, label)}
    config = imc.make_config(label, keypoint, descriptor, num_points, datasets, **options)
    if not sequences:
        raise DataError("no images: " + "; ".join(f"{path}: {reason}" for path, reason in refused[:3]))
    names = {place: {key: f"{place}/{path.name}" for key, path in found.items()} for place, found in sequences.items()}
    tasks = [Task(path, PurePosixPath(names[place][key])) for place, found in sequences.items() for key, path in found.items()]
    with ExitStack() as stack:
        store = stack.enter_context(FeatureFile(_beside(out, "features.h5"), write=True))  # its lock keeps others off the layout too
        check_settings(settings_place(store), extraction, overwrite, store.clear, store.path)
        extractor = build()
        report = extract_to_files(tasks, extractor, store, described=True, overwrite=overwrite, workers=workers, progress=progress)
        result = Submission(len(sequences), report, failed=refused + report.failed)
        there = {place: {name: key for key, name in found.items() if name in store} for place, found in names.items()}
        pairs = {place: choose_pairs(found) for place, found in there.items()}
        if matches:
            kept = stack.enter_context(MatchFile(_beside(out, "matches.h5"), write=True))
            least = None if ratio >= 1 else ratio
            files = {str(task.relative): task.path for task in tasks}
            matcher = pair_matcher(extractor, files, ratio=least)
            settings: dict[str, Any] = {"ratio": ratio, "model": KIND, "threshold": threshold, "features": extraction}
            if matcher is not None:
                settings["orientation"] = "auto"
            check_settings(settings_place(kept), settings, overwrite, kept.clear, kept.path)
            result.matched = match_to_file(
                chain.from_iterable(pairs.values()), store, kept, ratio=least, kind=KIND, threshold=threshold,
                matcher=matcher, overwrite=overwrite, progress=progress,
            )  # fmt: skip
            result.failed += result.matched.failed
        for place, keys in there.items():
            imc.write_sequence(out / place, ((key, store.read(name)) for name, key in keys.items()))
            if matches:
                done = (pair for pair in pairs[place] if kept.has_matches(*pair))
                imc.write_matches(out / place, ((keys[a], keys[b], kept.read_matches(a, b)) for a, b in done))
        imc.write_config(out, config)
        result.violations = imc.check_imc(out, sequences)
    return result


def _beside(out: Path, end: str) -> Path:
    out = out.absolute()  # "." has no name
    return out.with_name(f"{out.name}.{end}")


def _metadata(out: Path, label: str) -> dict[str, Any] | None:
    """What a user wrote into the metadata of an earlier config of this name."""
    try:
        method = imc.read_config(out)[0]
    except (FileNotFoundError, DataError):
        return None
    common, found = method.get("config_common"), method.get("metadata")
    same = isinstance(common, dict) and common.get("json_label") == label
    return found if same and isinstance(found, dict) else None
