"""Create a submission to the Image Matching Challenge: extract, match, write the files and check
them.

Features and matches are stored in ``OUT.features.h5`` and ``OUT.matches.h5`` next to the submission
(hloc's format, ``formats/hdf5.py``), which are robust to interruption; the files of the submission
are written from them at the end of each run.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError
from ..extract import ExtractOptions, network_label
from ..files import Task
from ..formats import imc
from ..formats.hdf5 import FeatureFile, MatchFile
from .extract import ExtractReport, check_store, extract_to_store
from .image_pairs import all_pairs
from .match import (
    MatchOptions,
    MatchReport,
    check_match_store,
    match_to_store,
)
from .pair_workers import PairWork

#: Custom matches are verified by a fundamental matrix, as the challenge applies no RANSAC to them.
#: Without our matches, the benchmark matches by itself, with a ratio test only.
MATCHING = MatchOptions(ratio=0.95, geometry="fundamental", threshold=0.5, refine=False)


@dataclass
class Submission:
    """Result of an export.

    Attributes:
        sequences: number of sequences written.
        extracted, matched: reports of both steps; matched is None without custom matches.
        failed: (image, folder or pair, reason) of all steps.
        violations: problems for which the challenge would reject the submission.
    """

    sequences: int
    extracted: ExtractReport
    matched: MatchReport | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)
    violations: list[imc.Violation] = field(default_factory=list)


# A sequence of steps on open stores; each step is a function.
def export_imc(
    images: Path,
    output: Path,
    label: str,
    extraction: ExtractOptions,
    options: MatchOptions = MATCHING,
    *,
    matches: bool = False,
    overwrite: bool = False,
    workers: int | None = 1,
    progress: bool = True,
) -> Submission:
    """Write the submission ``output`` for ``images``/DATASET/SEQUENCE; run again, it resumes.

    Args:
        images: see ``imc.find_sequences``.
        label: name of the submission, see ``imc.make_config``.
        extraction: options of the features.
        options: options of custom matches; without them, ``ratio`` and ``threshold`` are those of
            the benchmark's matching and DEGENSAC.
        matches: write custom matches: mutual nearest neighbors verified by a fundamental matrix.
        workers: see ``extract_images``.

    Raises:
        ValueError, FileNotFoundError, DataError, ImportError, OSError: invalid arguments, or files
            that cannot be used; the message names the remedy.
    """
    sequences, refused, skipped = imc.find_sequences(images)
    config = _make_config(output, label, sequences, extraction, options, matches)
    if not sequences:
        raise DataError(
            "no images: " + "; ".join(f"{path}: {reason}" for path, reason in refused[:3])
        )
    tasks = [
        Task(path, PurePosixPath(f"{sequence}/{path.name}"))
        for sequence, paths in sequences.items()
        for path in paths.values()
    ]
    with ExitStack() as stack:
        # the lock of this file also protects the submission
        path = _sibling(output, "features.h5")
        store = stack.enter_context(FeatureFile(path, write=True, overwrite=overwrite))
        check_store(store, extraction.to_json(), overwrite)
        extractor = extraction.build()
        report = ExtractReport()
        notices = extract_to_store(
            tasks,
            extractor,
            store,
            report,
            described=True,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
        )
        notices.log(pages=False, rotations=False)
        report.ignored = skipped
        result = Submission(len(sequences), report, failed=refused + report.failed)
        names = {sequence: _keys(sequence, paths, store) for sequence, paths in sequences.items()}
        match_store = None
        if matches:
            path = _sibling(output, "matches.h5")
            match_store = stack.enter_context(MatchFile(path, write=True, overwrite=overwrite))
            settings = {**options.to_json(database=False), "features": extraction.to_json()}
            check_match_store(match_store, settings, overwrite)
            files = {str(task.relative): task.path for task in tasks}
            pairs = chain.from_iterable(all_pairs(keys) for keys in names.values())
            result.matched = match_to_store(
                pairs,
                store,
                match_store,
                PairWork(options, extractor, files),
                workers=workers,
                overwrite=overwrite,
                progress=progress,
            )
            result.failed += result.matched.failed
        for sequence, keys in names.items():
            _write_sequence(output / sequence, keys, store, match_store)
        imc.write_config(output, config)
        result.violations = imc.check_imc(output, sequences)
    return result


def _make_config(
    output: Path,
    label: str,
    sequences: Iterable[str],
    extraction: ExtractOptions,
    options: MatchOptions,
    matches: bool,
) -> Any:
    return imc.make_config(
        label,
        imc.slug(network_label(extraction.detector)),
        imc.slug(network_label(extraction.descriptor)),
        extraction.num_keypoints,
        list(dict.fromkeys(name.partition("/")[0] for name in sequences)),
        ratio=options.ratio,
        threshold=options.threshold,
        matches=matches,
        metadata=_metadata(output, label),
    )


def _keys(sequence: str, paths: dict[str, Path], store: FeatureFile) -> dict[str, str]:
    """Name of the stored features -> key in the submission."""
    names = {f"{sequence}/{path.name}": key for key, path in paths.items()}
    return {name: key for name, key in names.items() if name in store}


def _write_sequence(
    folder: Path, keys: dict[str, str], store: FeatureFile, match_store: MatchFile | None
) -> None:
    """Write features, and matches if there are any, of one sequence (``keys``: name -> key)."""
    imc.write_sequence(folder, ((key, store.read(name)) for name, key in keys.items()))
    if match_store is not None:
        done = (pair for pair in all_pairs(keys) if match_store.has_matches(*pair))
        matches = ((keys[a], keys[b], match_store.read_matches(a, b)) for a, b in done)
        imc.write_matches(folder, matches)


def _sibling(output: Path, end: str) -> Path:
    output = output.absolute()  # "." has no name
    return output.with_name(f"{output.name}.{end}")


def _metadata(output: Path, label: str) -> dict[str, Any] | None:
    """Metadata that the user has added to an earlier config with this label."""
    try:
        method = imc.read_config(output)[0]
    except (FileNotFoundError, DataError):
        return None
    common, found = method.get("config_common"), method.get("metadata")
    same_label = isinstance(common, dict) and common.get("json_label") == label
    return found if same_label and isinstance(found, dict) else None
