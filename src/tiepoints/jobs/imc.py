"""A folder of the Image Matching Challenge's images to a submission: extract, match, write the
layout, read it back.

What is finished is kept in ``OUT.features.h5`` and ``OUT.matches.h5`` beside the submission (hloc's
files, ``formats/hdf5.py``), which a kill does not hurt; the layout is made of them at the end of
each run.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError
from ..extract import ExtractOptions
from ..files import Task
from ..formats import imc
from ..formats.hdf5 import FeatureFile, MatchFile
from ..formats.store import check_settings, settings_path
from .extract import ExtractReport, extract_to_store, normalize_settings
from .match import MatchOptions, MatchReport, choose_pairs, match_to_store, named_matcher

#: Custom matches agree with a fundamental matrix: the challenge fits all it is given without a
#: RANSAC of its own.
MATCHING = MatchOptions(geometry="fundamental", threshold=0.5, refine=False)


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
    extracted: ExtractReport
    matched: MatchReport | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)
    violations: list[imc.Violation] = field(default_factory=list)


def export_imc(
    images: Path,
    output: Path,
    label: str,
    extraction: ExtractOptions,
    options: MatchOptions = MATCHING,
    *,
    matches: bool = False,
    overwrite: bool = False,
    workers: int = 2,
    progress: bool = True,
) -> Submission:
    """Write ``output`` from ``images``/DATASET/SEQUENCE; run again, it resumes and extracts no
    finished image again.

    Args:
        images: see ``imc.find_sequences``.
        label: name of the submission, see ``imc.make_config``.
        extraction: which features.
        options: of the custom matches; ``ratio`` and ``threshold`` are those of the benchmark's
            matching and DEGENSAC where there are none.
        matches: write custom matches: mutual nearest neighbours that agree with a fundamental
            matrix.

    Raises:
        ValueError, FileNotFoundError, DataError, ImportError, OSError: with the remedy.
    """
    sequences, refused = imc.find_sequences(images)
    datasets = list(dict.fromkeys(name.partition("/")[0] for name in sequences))
    config = imc.make_config(
        label,
        imc.slug(Path(str(extraction.detector)).stem),
        imc.slug(Path(str(extraction.descriptor)).stem),
        extraction.num_keypoints,
        datasets,
        ratio=options.ratio,
        threshold=options.threshold,
        matches=matches,
        metadata=_metadata(output, label),
    )
    if not sequences:
        raise DataError(
            "no images: " + "; ".join(f"{path}: {reason}" for path, reason in refused[:3])
        )
    names = {
        sequence: {key: f"{sequence}/{path.name}" for key, path in found.items()}
        for sequence, found in sequences.items()
    }
    tasks = [
        Task(path, PurePosixPath(names[sequence][key]))
        for sequence, found in sequences.items()
        for key, path in found.items()
    ]
    with ExitStack() as stack:
        # the lock of this file keeps others off the submission too
        store = stack.enter_context(FeatureFile(_sibling(output, "features.h5"), write=True))
        settings = extraction.to_json()
        check_settings(
            settings_path(store),
            settings,
            overwrite=overwrite,
            clear=store.clear,
            results=store.path,
            normalize=normalize_settings,
        )
        extractor = extraction.build()
        report = ExtractReport()
        extract_to_store(
            tasks,
            extractor,
            store,
            report,
            described=True,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
        )
        result = Submission(len(sequences), report, failed=refused + report.failed)
        stored = {
            sequence: {name: key for key, name in found.items() if name in store}
            for sequence, found in names.items()
        }
        pairs = {sequence: choose_pairs(found) for sequence, found in stored.items()}
        if matches:
            kept = stack.enter_context(MatchFile(_sibling(output, "matches.h5"), write=True))
            files = {str(task.relative): task.path for task in tasks}
            check_settings(
                settings_path(kept),
                {**options.to_json(database=False), "features": settings},
                overwrite=overwrite,
                clear=kept.clear,
                results=kept.path,
                normalize=_normalize,
            )
            result.matched = match_to_store(
                chain.from_iterable(pairs.values()),
                store,
                kept,
                options,
                matcher=named_matcher(extractor, files, options),
                overwrite=overwrite,
                progress=progress,
            )
            result.failed += result.matched.failed
        for sequence, keys in stored.items():
            imc.write_sequence(
                output / sequence, ((key, store.read(name)) for name, key in keys.items())
            )
            if matches:
                done = (pair for pair in pairs[sequence] if kept.has_matches(*pair))
                imc.write_matches(
                    output / sequence,
                    ((keys[a], keys[b], kept.read_matches(a, b)) for a, b in done),
                )
        imc.write_config(output, config)
        result.violations = imc.check_imc(output, sequences)
    return result


def _normalize(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "features": normalize_settings(content["features"])}


def _sibling(output: Path, end: str) -> Path:
    output = output.absolute()  # "." has no name
    return output.with_name(f"{output.name}.{end}")


def _metadata(output: Path, label: str) -> dict[str, Any] | None:
    """What a user wrote into the metadata of an earlier config of this name."""
    try:
        method = imc.read_config(output)[0]
    except (FileNotFoundError, DataError):
        return None
    common, found = method.get("config_common"), method.get("metadata")
    same = isinstance(common, dict) and common.get("json_label") == label
    return found if same and isinstance(found, dict) else None
