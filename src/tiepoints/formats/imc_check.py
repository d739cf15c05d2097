"""Checking of submissions to the Image Matching Challenge 2021.

The rules are those of the benchmark's own validator and importer
(github.com/ubc-vision/image-matching-benchmark).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .imc_layout import (
    CATEGORIES,
    COLUMNS,
    CONFIG,
    DATASETS,
    DESCRIPTOR_BYTES,
    DESCRIPTOR_LENGTHS,
    EXPORT_AGAIN,
    NAME,
    NAME_RULE,
    SUFFIXES,
    TASKS,
    either,
    read_arrays,
    read_config,
    split_pair,
    subfolders,
)

#: Required metadata of a method.
METADATA = {
    "publish_anonymously": bool,
    "authors": str,
    "contact_email": str,
    "method_name": str,
    "method_description": str,
}
#: Required settings of DEGENSAC.
DEGENSAC = ("threshold", "confidence", "max_iter", "error_type", "degeneracy_check")
#: Files of custom matches: of both tasks, of multiview only, of stereo only.
MATCHES = "matches.h5"
MULTIVIEW_MATCHES = "matches_multiview.h5"
STEREO_MATCHES = ("matches_stereo.h5", "matches_stereo_0.h5")

#: Reports a violation: key, problem, remedy.
Report = Callable[[str, str, str], None]


@dataclass(frozen=True)
class Violation:
    """A rule of the benchmark that a submission violates.

    Attributes:
        file: path relative to the submission.
        key: of the array or setting; empty if the problem concerns the whole file.
        problem, remedy: description of the violation, and how to fix it.
    """

    file: str
    key: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key}{': ' if self.key else ''}{self.problem}; {self.remedy}"


@dataclass
class _Submission:
    """A submission and what its files must agree with.

    Attributes:
        folder: of the submission.
        violations: found so far.
        methods: content of ``config.json``.
        max_keypoints: category of the submission.
        descriptor_type: type and dimension of all descriptors, from the first array.
        descriptor_source: sequence and image of that array.
    """

    folder: Path
    violations: list[Violation] = field(default_factory=list)
    methods: list[dict[str, Any]] = field(default_factory=list)
    max_keypoints: int = CATEGORIES[-1]
    descriptor_type: tuple[np.dtype, int] | None = None
    descriptor_source: str = ""

    def report(self, file: str) -> Report:
        """Function that adds a violation of ``file``."""
        return lambda key, problem, remedy: self.violations.append(
            Violation(file, key, problem, remedy)
        )

    def uses_custom_matches(self, dataset: str) -> set[bool]:
        """Whether the methods' settings of a dataset use custom matches."""
        settings = [
            method.get(f"config_{dataset}_{task}") for method in self.methods for task in TASKS
        ]
        return {
            setting.get("use_custom_matches") is True
            for setting in settings
            if isinstance(setting, dict) and setting
        }


@dataclass(frozen=True)
class _Sequence:
    """One sequence, ``DATASET/SEQUENCE``, of a submission."""

    submission: _Submission
    name: str

    @property
    def folder(self) -> Path:
        return self.submission.folder / self.name

    def report(self, file: str) -> Report:
        """Function that adds a violation of ``file`` in this sequence."""
        return self.submission.report(f"{self.name}/{file}")

    def has(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def arrays(self, file: str) -> Iterator[tuple[str, np.ndarray]]:
        """Arrays of a file; damaged files and groups are reported and skipped."""
        path, report = self.folder / file, self.report(file)
        try:
            for key, array in read_arrays(path):
                if array is None:
                    report(
                        key,
                        "is a group",
                        "put the array at the top level, named as the image without folder and "
                        "extension",
                    )
                else:
                    yield key, array
        except DataError as error:
            problem = str(error).removeprefix(f"{path} ").removesuffix(f"; {EXPORT_AGAIN}")
            report("", problem, EXPORT_AGAIN)


def check_imc(
    folder: str | Path, images: Mapping[str, Iterable[str]] | None = None
) -> list[Violation]:
    """Read a submission and list all violations of the benchmark's rules.

    Args:
        folder: of the submission.
        images: ``DATASET/SEQUENCE`` -> names of its images without extension, see
            ``find_sequences``; None: missing sequences and images are not detected.

    Raises:
        FileNotFoundError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no submission at {folder}")
    submission = _Submission(folder)
    _check_config(submission)
    sequences = _check_folders(submission)
    for name in sequences:
        expected = None if images is None else images.get(name)
        if images is not None and name not in images:
            submission.report(name)(
                "",
                "no such sequence among the images",
                "remove it, or add its images and export again",
            )
        _check_sequence(_Sequence(submission, name), None if expected is None else sorted(expected))
    for name in sorted(set(images or ()) - set(sequences)):
        submission.report(name)("", "the sequence is missing", EXPORT_AGAIN)
    _check_tasks(submission, {name.partition("/")[0] for name in sequences})
    return submission.violations


def _check_folders(submission: _Submission) -> list[str]:
    """Check the dataset folders; returns the sequences, ``DATASET/SEQUENCE``."""
    sequences = []
    for dataset in subfolders(submission.folder):
        report = submission.report(dataset.name)
        if dataset.name not in DATASETS:
            report(
                "",
                "not a dataset of the benchmark",
                f"rename it to one of {', '.join(DATASETS)}, or remove it",
            )
            continue
        names = [f"{dataset.name}/{sequence.name}" for sequence in subfolders(dataset)]
        if not names:
            report("", "has no sequence", "export it again, or remove it")
        sequences += names
    return sequences


# ---- config.json


def _check_config(submission: _Submission) -> None:
    """Read ``config.json`` and check what does not depend on the datasets."""
    report = submission.report(CONFIG)
    try:
        submission.methods = read_config(submission.folder)
    except FileNotFoundError:
        report("", "is missing", EXPORT_AGAIN)
        return
    except DataError as error:
        problem = str(error).removeprefix(f"{submission.folder / CONFIG} ")
        report("", problem, EXPORT_AGAIN)
        return
    for method in submission.methods:
        _check_metadata(method.get("metadata"), report)
        _check_common(method.get("config_common"), submission, report)


def _check_metadata(metadata: Any, report: Report) -> None:
    if not isinstance(metadata, dict):
        report("metadata", "is missing", "add it as shown in docs/formats.md")
        return
    for key, kind in METADATA.items():
        if not isinstance(metadata.get(key), kind):
            report(
                f"metadata.{key}",
                f"is missing or not of type {kind.__name__}",
                "add it (a string may be empty)",
            )


def _check_common(common: Any, submission: _Submission, report: Report) -> None:
    if not isinstance(common, dict):
        report("config_common", "is missing", EXPORT_AGAIN)
        return
    for key in ("json_label", "keypoint", "descriptor"):
        name = common.get(key)
        # the benchmark allows _ in labels only
        if not isinstance(name, str) or not NAME.fullmatch(
            name.replace("_", "-") if key == "json_label" else name
        ):
            report(
                f"config_common.{key}",
                f"must be a name of {NAME_RULE}, found {name!r}",
                "rename it",
            )
    number = common.get("num_keypoints")
    if number in CATEGORIES:
        submission.max_keypoints = min(submission.max_keypoints, number)
    else:
        report(
            "config_common.num_keypoints",
            f"must be {either(CATEGORIES)} (a category), found {number!r}",
            "set the category",
        )


def _check_tasks(submission: _Submission, datasets: set[str]) -> None:
    """Check the settings of each task; ``datasets`` are those with sequences."""
    report = submission.report(CONFIG)
    known = {f"config_{dataset}_{task}": (dataset, task) for dataset in DATASETS for task in TASKS}
    for method in submission.methods:
        for key, setting in method.items():
            if key in ("metadata", "config_common") or (
                key.startswith("config_") and key.endswith("_relocalization")
            ):
                continue
            if key not in known:
                report(key, "no such setting in the benchmark", "remove it")
            elif not isinstance(setting, dict):
                report(key, "must be an object", EXPORT_AGAIN)
            elif setting and known[key][0] not in datasets:
                report(
                    key,
                    "the submission has no files of this dataset",
                    "export it too, or remove the setting",
                )
            elif setting:
                _check_task(key, known[key][1], setting, report)
        for dataset in sorted(datasets):
            if not any(method.get(f"config_{dataset}_{task}") for task in TASKS):
                report(
                    f"config_{dataset}_{TASKS[0]}",
                    "is missing, so the benchmark would ignore the dataset",
                    EXPORT_AGAIN,
                )


def _check_task(key: str, task: str, setting: dict[str, Any], report: Report) -> None:
    custom = setting.get("use_custom_matches")
    if not isinstance(custom, bool):
        report(f"{key}.use_custom_matches", "must be true or false", EXPORT_AGAIN)
    elif custom:
        name = setting.get("custom_matches_name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            report(
                f"{key}.custom_matches_name",
                f"must be a name of {NAME_RULE}, found {name!r}",
                "rename it",
            )
        for part in ("matcher", "outlier_filter"):
            if part in setting:
                report(f"{key}.{part}", "is not allowed with custom matches", "remove it")
    else:
        for part in ("matcher", "outlier_filter", *(["geom"] if task == "stereo" else [])):
            if not isinstance(setting.get(part), dict):
                report(
                    f"{key}.{part}",
                    "is missing, but required without custom matches",
                    EXPORT_AGAIN,
                )
    geom = setting.get("geom")
    if isinstance(geom, dict) and geom.get("method") == "cmp-degensac-f":
        for part in DEGENSAC:
            if part not in geom:
                report(f"{key}.geom.{part}", "is missing, but required by DEGENSAC", EXPORT_AGAIN)


# ---- files of a sequence


def _check_sequence(sequence: _Sequence, images: list[str] | None) -> None:
    """Check all files of a sequence; ``images`` are the expected names, if known."""
    matches = sorted(p.name for p in sequence.folder.glob("match*.h5"))
    counts = _check_keypoints(sequence, images)
    if counts is None:
        return
    if sequence.has("descriptors.h5"):
        _check_descriptors(sequence, counts, custom=bool(matches))
    else:
        sequence.report("descriptors.h5")("", "is missing", EXPORT_AGAIN)
    columns = {
        kind: _check_column(sequence, kind, counts)
        for kind in COLUMNS
        if sequence.has(f"{kind}.h5")
    }
    _check_orientations(sequence, columns.get("angles"), columns.get("orientations"))
    _check_matches(sequence, matches, counts)


def _check_same_keys(report: Report, keys: set[str], counts: Mapping[str, int]) -> None:
    for key in sorted(set(counts) - keys):
        report(key, "is missing, but present in keypoints.h5", EXPORT_AGAIN)
    for key in sorted(keys - set(counts)):
        report(key, "is not in keypoints.h5", EXPORT_AGAIN)


def _check_finite(report: Report, key: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        report(key, "has values that are not finite", EXPORT_AGAIN)


def _check_float(report: Report, key: str, array: np.ndarray) -> None:
    if array.dtype.kind != "f":
        report(key, f"must be floating point, found {array.dtype}", "write float32")
    else:
        _check_finite(report, key, array)


def _check_keypoints(sequence: _Sequence, images: list[str] | None) -> dict[str, int] | None:
    """Check ``keypoints.h5``; returns the number of keypoints per image, None without a file."""
    file = "keypoints.h5"
    report, most = sequence.report(file), sequence.submission.max_keypoints
    if not sequence.has(file):
        report("", "is missing", EXPORT_AGAIN)
        return None
    counts: dict[str, int] = {}
    for key, xy in sequence.arrays(file):
        counts[key] = len(xy) if xy.ndim else 0
        if xy.ndim != 2 or xy.shape[1] != 2:
            report(key, f"must be (n,2), found {xy.shape}", "write only x and y of each keypoint")
        _check_float(report, key, xy)
        if counts[key] > most:
            report(
                key,
                f"has {counts[key]} keypoints, but {CONFIG} allows {most}",
                _fewer_keypoints(counts[key]),
            )
    _check_images(report, set(counts), images)
    return counts


def _check_images(report: Report, keys: set[str], images: list[str] | None) -> None:
    """Compare the keys of ``keypoints.h5`` with the names of the images."""
    if images is None:
        for key in sorted(keys):
            if key.lower().endswith((*SUFFIXES, ".jpeg")):
                report(key, "has an extension", f"rename it to {Path(key).stem}")
        return
    for name in sorted(set(images) - keys):
        report(
            name,
            "the image has no keypoints",
            "fix the image and export again (an image without keypoints has an array (0,2))",
        )
    for key in sorted(keys - set(images)):
        if Path(key).stem in images:
            report(key, "has an extension", f"rename it to {Path(key).stem}")
        else:
            report(key, "no such image in this sequence", "remove it, or export again")


def _check_descriptors(sequence: _Sequence, counts: Mapping[str, int], *, custom: bool) -> None:
    """Check ``descriptors.h5``; ``custom``: the sequence has custom matches."""
    file = "descriptors.h5"
    report = sequence.report(file)
    keys = set()
    for key, array in sequence.arrays(file):
        keys.add(key)
        if array.ndim != 2 or len(array) != counts.get(key, len(array)):
            report(
                key,
                f"must be ({counts.get(key, 'n')},D), found {array.shape}",
                "write one row per keypoint",
            )
            continue
        if array.dtype == np.float32:
            _check_finite(report, key, array)
        elif array.dtype != np.uint8:
            report(
                key,
                f"must be float32, or uint8 for binary descriptors, found {array.dtype}",
                "convert it",
            )
        _check_descriptor_type(sequence, key, array, report, custom=custom)
    _check_same_keys(report, keys, counts)


def _check_descriptor_type(
    sequence: _Sequence, key: str, array: np.ndarray, report: Report, *, custom: bool
) -> None:
    """Check that all descriptors have the same type and dimension, within the limits."""
    submission = sequence.submission
    dtype, dimension = array.dtype, array.shape[1]
    if submission.descriptor_type is None:
        submission.descriptor_type = dtype, dimension
        submission.descriptor_source = f"{sequence.name}: {key}"
    first_dtype, first_dimension = submission.descriptor_type
    if (dtype, dimension) != (first_dtype, first_dimension):
        report(
            key,
            f"has {dimension} values of {dtype}, but {submission.descriptor_source} has "
            f"{first_dimension} of {first_dtype}",
            "use the same descriptor for all images",
        )
    low, high = DESCRIPTOR_LENGTHS
    if not low <= dimension <= high:
        report(
            key,
            f"the descriptor dimension must be {low} to {high}, found {dimension}",
            "use another descriptor",
        )
    elif (size := dimension * dtype.itemsize) > DESCRIPTOR_BYTES and not custom:
        report(
            key,
            f"more than {DESCRIPTOR_BYTES} bytes ({size}) are allowed with custom matches only",
            "export with --matches",
        )


def _check_column(
    sequence: _Sequence, kind: str, counts: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Check a file of one value per keypoint; returns its arrays."""
    file = f"{kind}.h5"
    report = sequence.report(file)
    arrays = {}
    for key, array in sequence.arrays(file):
        arrays[key] = array
        if array.shape != (counts.get(key, array.size),):
            detail = (
                ", which the importer cannot sort" if array.ndim == 2 and kind == "scores" else ""
            )
            report(
                key,
                f"must be ({counts.get(key, 'n')},), found {array.shape}{detail}",
                "write one value per keypoint in one dimension",
            )
        _check_float(report, key, array)
        if (
            kind in ("angles", "orientations")
            and array.dtype.kind == "f"
            and (np.abs(array) > 360).any()
        ):
            report(key, "has angles beyond 360", "write degrees, clockwise as in OpenCV")
    _check_same_keys(report, set(arrays), counts)
    return arrays


def _check_orientations(
    sequence: _Sequence,
    angles: dict[str, np.ndarray] | None,
    orientations: dict[str, np.ndarray] | None,
) -> None:
    """Check that ``orientations.h5``, which the benchmark reads, equals ``angles.h5``."""
    report, remedy = sequence.report("orientations.h5"), "copy angles.h5 to orientations.h5"
    if angles is not None and orientations is None:
        report("", "is missing, and the benchmark ignores angles.h5", remedy)
    for key, array in (angles or {}).items():
        other = (orientations or {}).get(key)
        if other is not None and not np.array_equal(array, other):
            report(key, "differs from angles.h5", remedy)


# ---- custom matches


def _check_matches(sequence: _Sequence, files: list[str], counts: Mapping[str, int]) -> None:
    """Check which files of custom matches exist, and their content."""
    custom = sequence.submission.uses_custom_matches(sequence.name.partition("/")[0])
    if not files and True in custom:
        sequence.report(MATCHES)(
            "", f"is missing, but {CONFIG} sets use_custom_matches", "export with --matches"
        )
    if files and custom == {False}:
        sequence.report(files[0])(
            "",
            f"exists, but {CONFIG} does not set use_custom_matches",
            "remove it, or export with --matches",
        )
    if MATCHES in files and len(files) > 1:
        sequence.report(MATCHES)(
            "",
            f"conflicts with {', '.join(file for file in files if file != MATCHES)}",
            "keep one or the others",
        )
    elif files and MATCHES not in files:
        remedy = f"add it, or rename one file to {MATCHES}"
        if MULTIVIEW_MATCHES not in files:
            sequence.report(MULTIVIEW_MATCHES)(
                "", "is missing, but there are matches for stereo", remedy
            )
        if not any(file in files for file in STEREO_MATCHES):
            sequence.report(STEREO_MATCHES[0])(
                "", "is missing, but there are matches for multiview", remedy
            )
    for file in files:
        if file in (MATCHES, MULTIVIEW_MATCHES, *STEREO_MATCHES):
            _check_match_file(sequence, file, counts)
        else:
            sequence.report(file)("", "no such file in the 2021 challenge", "remove it")


def _check_match_file(sequence: _Sequence, file: str, counts: Mapping[str, int]) -> None:
    """Check the matches of all pairs of a sequence."""
    report = sequence.report(file)
    names = frozenset(counts)
    missing = {f"{a}-{b}" for a in names for b in names if a > b}
    total = len(missing)
    for key, index in sequence.arrays(file):
        missing.discard(key)
        pair = split_pair(key, names)
        if pair is None or pair[0] == pair[1]:
            report(
                key,
                "does not name two images of this sequence",
                "rename it to A-B (names without extension)",
            )
            continue
        if pair[0] < pair[1]:
            report(
                key,
                "has the names in incorrect order",
                f"rename it to {pair[1]}-{pair[0]} and swap its rows",
            )
        _check_match_indices(report, key, index, (counts[pair[0]], counts[pair[1]]))
    if missing:  # one message, because a missing image has many pairs
        report(
            min(missing),
            f"{len(missing)} of {total} pairs are missing, this is the first",
            "a pair without matches has an array (2,0)",
        )


def _check_match_indices(
    report: Report, key: str, index: np.ndarray, counts: tuple[int, int]
) -> None:
    """Check one array of matches; ``counts`` are the numbers of keypoints of both images."""
    if index.ndim != 2 or len(index) != 2:
        report(
            key,
            f"must be (2,m), found {index.shape}",
            "write the keypoints of the first image, then those of the second",
        )
    elif index.dtype.kind not in "iu":
        report(key, f"must be integers, found {index.dtype}", "write int32")
    elif index.size and (
        index.min() < 0 or any(row.max() >= n for row, n in zip(index, counts, strict=True))
    ):
        report(
            key,
            f"has indices beyond the {counts[0]} and {counts[1]} keypoints of the images",
            "count from 0, keypoints of A first",
        )


def _fewer_keypoints(count: int) -> str:
    """Remedy for an image with ``count`` keypoints, more than its category allows."""
    fits = [str(most) for most in CATEGORIES if count <= most]
    return (
        f"set num_keypoints to {fits[0]}, or export fewer"
        if fits
        else f"export at most {CATEGORIES[-1]}"
    )
