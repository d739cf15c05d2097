"""Submissions to the Image Matching Challenge 2021 (IMC): find its images, write the layout, read
it back and check it.

``SUBMISSION/config.json`` and ``SUBMISSION/DATASET/SEQUENCE/*.h5``, in each HDF5 file an array an
image at the top, named as the image without its extension: ``keypoints`` (n,2), ``descriptors``
(n,D), ``scores``, ``scales``, ``angles``, ``orientations`` (n,), all float32. Our pixels and our
sense of angles are the benchmark's (OpenCV's); its angles are degrees. It reads ``orientations.h5``
only, its tutorial writes ``angles.h5``: both are written, and all but the first two
one-dimensional, because it sorts scores along the last axis. ``matches.h5``, where there is one,
has an array (2,m) a pair, ``A-B`` with A > B as strings: points of A, points of B. The rules
checked are those of the benchmark's own validator and importer
(github.com/ubc-vision/image-matching-benchmark).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..files import is_image_name, remove_temporary, write_text
from ..structs import Features, Keypoints, Matches
from .hdf5 import need_h5py, whole_file

DATASETS = ("phototourism", "pragueparks", "googleurban")
TASKS = ("stereo", "multiview")
#: Largest number of points of any image, by category.
CATEGORIES = (2048, 8000)
CONFIG = "config.json"
#: Files of one number a point; the benchmark does without them.
COLUMNS = ("scores", "scales", "angles", "orientations")
FILES = ("keypoints", "descriptors", *COLUMNS)
#: The benchmark sees no other images.
SUFFIXES = (".jpg", ".png")
#: Descriptors: least and most numbers, and most bytes without custom matches.
DESCRIPTOR_LENGTHS = (64, 2048)
DESCRIPTOR_BYTES = 512


_NAME = re.compile(r"[a-z0-9.-]+")
_NAME_RULE = "lower case letters, digits, '-' and '.'"
_METADATA = {
    "publish_anonymously": bool,
    "authors": str,
    "contact_email": str,
    "method_name": str,
    "method_description": str,
}
_DEGENSAC = ("threshold", "confidence", "max_iter", "error_type", "degeneracy_check")
_AGAIN = "export it again"


# ---- what there is to export


def find_sequences(root: str | Path) -> tuple[dict[str, dict[str, Path]], list[tuple[str, str]]]:
    """Images below ``root``/DATASET/SEQUENCE: in ``set_100/images`` (the validation data),
    ``images`` or the folder itself (the test data).

    Returns:
        ``DATASET/SEQUENCE`` -> name without extension -> path; and what was refused, with its
        reason.

    Raises:
        FileNotFoundError: no such folder.
        DataError: none of the benchmark's data sets in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}")
    sequences: dict[str, dict[str, Path]] = {}
    refused: list[tuple[str, str]] = []
    folders = _folders(root)
    if not any(folder.name in DATASETS for folder in folders):
        there = ", ".join(folder.name for folder in folders[:5]) or "no folder"
        raise DataError(
            f"{root} must hold the benchmark's data sets ({', '.join(DATASETS)}), each with a "
            f"folder a sequence; found {there}"
        )
    for dataset in folders:
        if dataset.name not in DATASETS:
            refused.append(
                (str(dataset), f"no data set of the benchmark; those are {', '.join(DATASETS)}")
            )
            continue
        if not _folders(dataset):
            refused.append((str(dataset), "no sequence in this data set"))
        for sequence in _folders(dataset):
            images = _images(sequence, refused)
            if images:
                sequences[f"{dataset.name}/{sequence.name}"] = images
            else:
                refused.append(
                    (
                        str(sequence),
                        f"no image ({' or '.join(SUFFIXES)}) in it, nor in images or "
                        "set_100/images",
                    )
                )
    return sequences, refused


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(sequence: Path, refused: list[tuple[str, str]]) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for place in (sequence / "set_100" / "images", sequence / "images", sequence):
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            if path.name.startswith(".") or not path.is_file():
                continue
            if path.suffix not in SUFFIXES:
                if is_image_name(path):
                    refused.append(
                        (
                            str(path),
                            f"the benchmark reads {' and '.join(SUFFIXES)} only; convert or "
                            "rename it",
                        )
                    )
            elif path.stem in images:
                refused.append(
                    (
                        str(path),
                        f"the benchmark would call it as it calls {images[path.stem].name}; "
                        "rename one",
                    )
                )
            else:
                images[path.stem] = path
        if images:
            break
    return images


# ---- writing


def check_name(name: str, what: str) -> str:
    """``name``, if the benchmark accepts it.

    Raises:
        ValueError: other characters than its own; the message says ``what`` they are in.
    """
    if not _NAME.fullmatch(name):
        near = slug(name)
        raise ValueError(
            f"{what} may use {_NAME_RULE} only; got {name!r}" + (f", try {near!r}" if near else "")
        )
    return name


def slug(text: str) -> str:
    """``text`` in the characters that the benchmark accepts."""
    return re.sub(r"[^a-z0-9.-]+", "-", text.lower()).strip("-")


def category(num_keypoints: int) -> int:
    """The least category that allows ``num_keypoints`` an image.

    Raises:
        ValueError: none does.
    """
    for most in CATEGORIES:
        if 1 <= num_keypoints <= most:
            return most
    raise ValueError(
        f"the challenge takes 1 to {CATEGORIES[-1]} points an image (categories "
        f"{_either(CATEGORIES)}), got {num_keypoints}"
    )


def make_config(
    label: str,
    keypoint: str,
    descriptor: str,
    num_keypoints: int,
    datasets: Iterable[str],
    *,
    ratio: float,
    threshold: float,
    matches: bool = False,
    metadata: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The content of ``config.json``: one method, both tasks of each data set.

    Args:
        label: name of the results (``json_label``).
        keypoint, descriptor: names of the methods.
        num_keypoints: most points an image; the config states its category.
        ratio: largest ratio of nearest to second distance, in both directions, in [0.1, 1].
        threshold: of the benchmark's DEGENSAC, pixels.
        matches: matches are custom ones: the benchmark then neither matches nor runs a RANSAC, but
            fits all matches it is given.
        metadata: who and what [default: the label, and no author].

    Raises:
        ValueError: an option that the benchmark refuses.
    """
    names = {
        what: check_name(name, what)
        for what, name in (("label", label), ("keypoint", keypoint), ("descriptor", descriptor))
    }
    if not 0.1 <= ratio <= 1:
        raise ValueError(f"ratio must lie in [0.1, 1] for this benchmark, got {ratio}")
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    matcher = {
        "method": "nn",
        "distance": "L2",
        "flann": True,
        "num_nn": 1,
        "filtering": {"type": "snn_ratio_pairwise", "threshold": ratio},
        "symmetric": {"enabled": True, "reduce": "both"},
    }
    degensac = {
        "method": "cmp-degensac-f",
        "threshold": threshold,
        "confidence": 0.999999,
        "max_iter": 100000,
        "error_type": "sampson",
        "degeneracy_check": True,
    }
    common: dict[str, Any] = {
        "use_custom_matches": False,
        "matcher": matcher,
        "outlier_filter": {"method": "none"},
    }
    if matches:
        common, degensac = (
            {"use_custom_matches": True, "custom_matches_name": label},
            {"method": "cv2-8pt"},
        )
    most = category(num_keypoints)
    about = f"{keypoint} points with {descriptor} descriptors (tiepoints)"
    method: dict[str, Any] = {
        "metadata": metadata
        or {
            "publish_anonymously": False,
            "authors": "",
            "contact_email": "",
            "method_name": label,
            "method_description": about,
            "link_to_website": "",
            "link_to_pdf": "",
        },
        "config_common": {
            "json_label": names["label"],
            "keypoint": names["keypoint"],
            "descriptor": names["descriptor"],
            "num_keypoints": most,
        },
    }
    for dataset in datasets:
        method[f"config_{dataset}_stereo"] = {**common, "geom": degensac}
        method[f"config_{dataset}_multiview"] = {**common, "colmap": {}}
    return [method]


def write_config(folder: str | Path, config: list[dict[str, Any]]) -> None:
    """Write ``config.json``, whole or not at all."""
    place = Path(folder) / CONFIG
    remove_temporary(place)
    write_text(place, json.dumps(config, indent=2) + "\n")


def read_config(folder: str | Path) -> list[dict[str, Any]]:
    """The methods of ``config.json``; a comma after a last item is allowed, as in the benchmark's
    own examples.

    Raises:
        FileNotFoundError: there is none.
        DataError: it is no list of methods.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {path}")
    try:
        text = path.read_text(encoding="utf-8")
        try:
            config = json.loads(text)
        except ValueError:
            config = json.loads(re.sub(r",(\s*[\]}])", r"\1", text))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error})") from error
    if (
        not isinstance(config, list)
        or not config
        or not all(isinstance(method, dict) for method in config)
    ):
        raise DataError(f"{path} must be a list of methods")
    return config


def write_sequence(folder: str | Path, features: Iterable[tuple[str, Features]]) -> None:
    """Write the files of one sequence anew, each whole or not at all.

    Args:
        folder: ``SUBMISSION/DATASET/SEQUENCE``.
        features: (image name without extension, its features with descriptors); an image without
            points has arrays of length 0.

    Raises:
        ValueError: no descriptors.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    places = {kind: folder / f"{kind}.h5" for kind in FILES}
    with ExitStack() as stack:
        for place in places.values():
            remove_temporary(place)
        files = {kind: stack.enter_context(whole_file(place)) for kind, place in places.items()}
        for name, found in features:
            if found.descriptors is None:
                raise ValueError(f"{name} has no descriptors, and the benchmark needs them")
            degrees = _degrees(found.angle)
            values = {
                "keypoints": found.xy,
                "descriptors": found.descriptors,
                "scores": found.score,
                "scales": found.scale,
                "angles": degrees,
                "orientations": degrees,
            }
            for kind, file in files.items():
                file.create_dataset(name, data=values[kind].cpu().numpy().astype(np.float32))


def _degrees(angle: torch.Tensor) -> torch.Tensor:
    degrees = torch.rad2deg(angle.double()).remainder(360).float()
    return degrees.where(
        degrees < 360, degrees.new_zeros(())
    )  # a little below 0 becomes 360 in float32


def write_matches(
    folder: str | Path, matches: Iterable[tuple[str, str, Matches]], name: str = "matches.h5"
) -> None:
    """Write the custom matches of one sequence anew.

    Args:
        matches: (image a, image b, matches with the points of a first), names without extension, in
            any order.

    Raises:
        DataError: two pairs that the benchmark would call the same.
    """
    place = Path(folder) / name
    remove_temporary(place)
    with whole_file(place) as file:
        for a, b, found in matches:
            index = found.index.cpu().numpy().astype(np.int32).T
            key = f"{a}-{b}" if a > b else f"{b}-{a}"
            if key in file:
                raise DataError(
                    f"{place}: two pairs would be called {key}; rename an image that has a '-' in "
                    "its name"
                )
            file.create_dataset(key, data=index if a > b else index[::-1])


# ---- reading


def read_sequence(folder: str | Path) -> dict[str, Features]:
    """Features of one sequence by image name; scores and scales 1, angles 0 (radians) where there
    is no file, sizes (0, 0).

    Raises:
        FileNotFoundError: no key points.
        DataError: a file is damaged, or has not one entry a point; ``check_imc`` names every such
            place.
    """
    folder = Path(folder)
    tables = {
        kind: _read_all(folder / f"{kind}.h5")
        for kind in FILES
        if (folder / f"{kind}.h5").is_file()
    }
    if "keypoints" not in tables:
        raise FileNotFoundError(f"no key points at {folder / 'keypoints.h5'}")
    turned = tables.get("orientations", tables.get("angles"))
    found = {}
    for name, xy in tables["keypoints"].items():
        count = len(xy)

        def column(
            table: dict[str, np.ndarray] | None,
            default: float,
            name: str = name,
            count: int = count,
        ) -> torch.Tensor:
            if table is None:
                return torch.full((count,), default)
            if name not in table or table[name].size != count:
                raise DataError(
                    f"{folder}: not one number for each of the {count} points of {name}; {_AGAIN}"
                )
            return torch.from_numpy(table[name].reshape(-1).astype(np.float32))

        described = tables.get("descriptors", {}).get(name)
        if (
            xy.ndim != 2
            or xy.shape[1] != 2
            or (described is not None and (described.ndim != 2 or len(described) != count))
        ):
            raise DataError(
                f"{folder}: key points of {name} must be (n,2) and its descriptors (n,D); {_AGAIN}"
            )
        points = Keypoints(
            torch.from_numpy(xy.astype(np.float32)),
            column(tables.get("scales"), 1.0),
            torch.deg2rad(column(turned, 0.0)),
            column(tables.get("scores"), 1.0),
        )
        found[name] = Features(
            points,
            None if described is None else torch.from_numpy(described.astype(np.float32)),
            (0, 0),
        )
    return found


def read_matches(path: str | Path, names: Iterable[str]) -> dict[tuple[str, str], Matches]:
    """Custom matches of one file by pair (A, B) as in its keys; scores 1.

    Args:
        names: the images of the sequence, which tell where a key's first name ends.

    Raises:
        FileNotFoundError: no file.
        DataError: a key of no two images, or an array that is not (2,m).
    """
    path, known = Path(path), frozenset(names)
    if not path.is_file():
        raise FileNotFoundError(f"no matches at {path}")
    found = {}
    for key, index in _read_all(path).items():
        pair = _pair(key, known)
        if pair is None or index.ndim != 2 or len(index) != 2:
            raise DataError(
                f"{path}: {key} must be two images' names with - between, its array (2,m), found "
                f"{index.shape}"
            )
        found[pair] = Matches(
            torch.from_numpy(index.T.astype(np.int64)), torch.ones(index.shape[1])
        )
    return found


def _pair(key: str, names: frozenset[str]) -> tuple[str, str] | None:
    splits = ((key[:i], key[i + 1 :]) for i, letter in enumerate(key) if letter == "-")
    pairs = [pair for pair in splits if pair[0] in names and pair[1] in names]
    return max(pairs, key=lambda pair: pair[0] > pair[1], default=None)


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray | None]]:
    """Arrays at the top of a file by key; None for what is no array.

    Raises:
        DataError: no HDF5 file, or a damaged one.
    """
    h5py = need_h5py()
    try:
        with h5py.File(path, "r") as file:
            for key, item in file.items():
                yield key, np.asarray(item[()]) if isinstance(item, h5py.Dataset) else None
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{path} is no HDF5 file or is damaged ({str(error).splitlines()[0]}); {_AGAIN}"
        ) from error


def _read_all(path: Path) -> dict[str, np.ndarray]:
    return {key: array for key, array in _arrays(path) if array is not None}


# ---- checking


@dataclass(frozen=True)
class Violation:
    """A rule of the benchmark that a submission breaks.

    Attributes:
        file: path below the submission.
        key: of the array or of the setting; empty where it is about the whole file.
    """

    file: str
    key: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key}{': ' if self.key else ''}{self.problem}; {self.remedy}"


#: Adds a violation: key, problem, remedy.
_Say = Callable[[str, str, str], None]


def check_imc(
    folder: str | Path, images: Mapping[str, Iterable[str]] | None = None
) -> list[Violation]:
    """Read a submission and list every rule that it breaks.

    Args:
        images: ``DATASET/SEQUENCE`` -> names of its images without extension, see
            ``find_sequences``; without it nothing is known of images that are missing altogether.

    Raises:
        FileNotFoundError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no submission at {folder}")
    check = _Check(folder)
    check.config()
    there = [
        p for dataset in _folders(folder) for p in _folders(dataset) if dataset.name in DATASETS
    ]
    for dataset in _folders(folder):
        if dataset.name not in DATASETS:
            check.say(dataset.name)(
                "",
                "no data set of the benchmark",
                f"call it one of {', '.join(DATASETS)}, or move it away",
            )
        elif not _folders(dataset):
            check.say(dataset.name)("", "has no sequence", "export it again, or remove it")
    for sequence in there:
        place = f"{sequence.parent.name}/{sequence.name}"
        if images is not None and place not in images:
            check.say(place)(
                "",
                "no such sequence among the images",
                "remove it, or add its images and export again",
            )
        check.sequence(
            place, None if images is None or place not in images else sorted(images[place])
        )
    for place in sorted(set(images or ()) - {f"{p.parent.name}/{p.name}" for p in there}):
        check.say(place)("", "the sequence is missing", _AGAIN)
    check.tasks({sequence.parent.name for sequence in there})
    return check.found


class _Check:
    """What is found, and what one file says that others must agree with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.found: list[Violation] = []
        self.methods: list[dict[str, Any]] = []
        self.most = CATEGORIES[-1]
        self.kind: tuple[np.dtype, int] | None = None  # of all descriptors: type, length
        self.kind_at = ""

    def say(self, file: str) -> _Say:
        return lambda key, problem, remedy: self.found.append(Violation(file, key, problem, remedy))

    # -- config.json

    def config(self) -> None:
        say = self.say(CONFIG)
        try:
            self.methods = read_config(self.folder)
        except FileNotFoundError:
            say("", "is missing", _AGAIN)
            return
        except DataError as error:
            say("", str(error).removeprefix(f"{self.folder / CONFIG} "), _AGAIN)
            return
        for method in self.methods:
            data = method.get("metadata")
            if not isinstance(data, dict):
                say("metadata", "is missing", "say who and what, as docs/formats.md shows")
            else:
                for key, kind in _METADATA.items():
                    if not isinstance(data.get(key), kind):
                        say(
                            f"metadata.{key}",
                            f"must be there, a {kind.__name__}",
                            "add it (a text may be empty)",
                        )
            common = method.get("config_common")
            if not isinstance(common, dict):
                say("config_common", "is missing", _AGAIN)
                continue
            for key in ("json_label", "keypoint", "descriptor"):
                name = common.get(key)
                # the benchmark lets labels alone have a _
                if not isinstance(name, str) or not _NAME.fullmatch(
                    name.replace("_", "-") if key == "json_label" else name
                ):
                    say(
                        f"config_common.{key}",
                        f"must be a name of {_NAME_RULE}, found {name!r}",
                        "rename it",
                    )
            number = common.get("num_keypoints")
            if number in CATEGORIES:
                self.most = min(self.most, number)
            else:
                say(
                    "config_common.num_keypoints",
                    f"must be {_either(CATEGORIES)} (a category), found {number!r}",
                    "state the category",
                )

    def tasks(self, datasets: set[str]) -> None:
        """The settings of each data set; ``datasets`` are those with files."""
        say = self.say(CONFIG)
        known = {
            f"config_{dataset}_{task}": (dataset, task) for dataset in DATASETS for task in TASKS
        }
        for method in self.methods:
            for key, setting in method.items():
                if key in ("metadata", "config_common") or (
                    key.startswith("config_") and key.endswith("_relocalization")
                ):
                    continue
                if key not in known:
                    say(key, "the benchmark knows no such setting", "remove it")
                elif not isinstance(setting, dict):
                    say(key, "must be an object", _AGAIN)
                elif setting and known[key][0] not in datasets:
                    say(
                        key,
                        "the submission has no files of this data set",
                        "export it too, or remove the setting",
                    )
                elif setting:
                    self._task(key, known[key][1], setting)
            for dataset in sorted(datasets):
                if not any(method.get(f"config_{dataset}_{task}") for task in TASKS):
                    say(
                        f"config_{dataset}_{TASKS[0]}",
                        "is missing, so nothing would be done with the data set",
                        _AGAIN,
                    )

    def _task(self, key: str, task: str, setting: dict[str, Any]) -> None:
        say = self.say(CONFIG)
        custom = setting.get("use_custom_matches")
        if not isinstance(custom, bool):
            say(f"{key}.use_custom_matches", "must be true or false", _AGAIN)
        elif custom:
            name = setting.get("custom_matches_name")
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                say(
                    f"{key}.custom_matches_name",
                    f"must be a name of {_NAME_RULE}, found {name!r}",
                    "rename it",
                )
            for part in ("matcher", "outlier_filter"):
                if part in setting:
                    say(f"{key}.{part}", "is not allowed with custom matches", "remove it")
        else:
            for part in ("matcher", "outlier_filter", *(["geom"] if task == "stereo" else [])):
                if not isinstance(setting.get(part), dict):
                    say(f"{key}.{part}", "is missing, and needed without custom matches", _AGAIN)
        geom = setting.get("geom")
        if isinstance(geom, dict) and geom.get("method") == "cmp-degensac-f":
            for part in _DEGENSAC:
                if part not in geom:
                    say(f"{key}.geom.{part}", "is missing, and DEGENSAC needs it", _AGAIN)

    def _custom(self, dataset: str) -> set[bool]:
        """Whether the methods' settings of a data set use custom matches."""
        settings = [
            method.get(f"config_{dataset}_{task}") for method in self.methods for task in TASKS
        ]
        return {
            setting.get("use_custom_matches") is True
            for setting in settings
            if isinstance(setting, dict) and setting
        }

    # -- files of a sequence

    def arrays(self, path: Path, place: str) -> Iterator[tuple[str, np.ndarray]]:
        """Arrays of a file; what is damaged or none is said and left out."""
        say = self.say(f"{place}/{path.name}")
        try:
            for key, array in _arrays(path):
                if array is None:
                    say(
                        key,
                        "is a group",
                        "put the array at the top, named as the image without folder and extension",
                    )
                else:
                    yield key, array
        except DataError as error:
            say("", str(error).removeprefix(f"{path} ").removesuffix(f"; {_AGAIN}"), _AGAIN)

    def sequence(self, place: str, images: list[str] | None) -> None:
        folder = self.folder / place
        matches = sorted(p.name for p in folder.glob("match*.h5"))
        counts = self._keypoints(folder, place, images)
        if counts is None:
            return
        if (folder / "descriptors.h5").is_file():
            self._descriptors(folder, place, counts, custom=bool(matches))
        else:
            self.say(f"{place}/descriptors.h5")("", "is missing", _AGAIN)
        columns = {
            kind: self._column(folder, place, kind, counts)
            for kind in COLUMNS
            if (folder / f"{kind}.h5").is_file()
        }
        if "angles" in columns and "orientations" not in columns:
            self.say(f"{place}/orientations.h5")(
                "",
                "is missing, and the benchmark ignores angles.h5",
                "copy angles.h5 to orientations.h5",
            )
        for key, angles in columns.get("angles", {}).items():
            other = columns.get("orientations", {}).get(key)
            if other is not None and not np.array_equal(angles, other):
                self.say(f"{place}/orientations.h5")(
                    key, "differs from angles.h5", "copy angles.h5 to orientations.h5"
                )
        self._matches(folder, place, matches, counts)

    def _keypoints(
        self, folder: Path, place: str, images: list[str] | None
    ) -> dict[str, int] | None:
        """Number of points of each image; None without a file."""
        path = folder / "keypoints.h5"
        say = self.say(f"{place}/{path.name}")
        if not path.is_file():
            say("", "is missing", _AGAIN)
            return None
        counts: dict[str, int] = {}
        for key, xy in self.arrays(path, place):
            counts[key] = len(xy) if xy.ndim else 0
            if xy.ndim != 2 or xy.shape[1] != 2:
                say(
                    key,
                    f"must be (n,2), found {xy.shape}",
                    "write x and y of each point, nothing else",
                )
            self._float(say, key, xy)
            if counts[key] > self.most:
                say(
                    key,
                    f"has {counts[key]} points, and {CONFIG} allows {self.most}",
                    _fewer(counts[key]),
                )
        keys = set(counts)
        if images is None:
            for key in sorted(keys):
                if key.lower().endswith((*SUFFIXES, ".jpeg")):
                    say(key, "has an extension", f"call it {Path(key).stem}")
        else:
            for name in sorted(set(images) - keys):
                say(
                    name,
                    "the image has no key points",
                    "mend the image and export again (an image without points has an array (0,2))",
                )
            for key in sorted(keys - set(images)):
                if Path(key).stem in images:
                    say(key, "has an extension", f"call it {Path(key).stem}")
                else:
                    say(key, "no such image in this sequence", "remove it, or export again")
        return counts

    def _same_keys(self, say: _Say, keys: set[str], counts: Mapping[str, int]) -> None:
        for key in sorted(set(counts) - keys):
            say(key, "is missing, and keypoints.h5 has it", _AGAIN)
        for key in sorted(keys - set(counts)):
            say(key, "is not in keypoints.h5", _AGAIN)

    @staticmethod
    def _float(say: _Say, key: str, array: np.ndarray) -> None:
        if array.dtype.kind != "f":
            say(key, f"must be of floating point, found {array.dtype}", "write float32")
        elif not np.isfinite(array).all():
            say(key, "has numbers that are not finite", _AGAIN)

    def _descriptors(
        self, folder: Path, place: str, counts: Mapping[str, int], *, custom: bool
    ) -> None:
        say = self.say(f"{place}/descriptors.h5")
        keys = set()
        for key, array in self.arrays(folder / "descriptors.h5", place):
            keys.add(key)
            if array.ndim != 2 or len(array) != counts.get(key, len(array)):
                say(
                    key,
                    f"must be ({counts.get(key, 'n')},D), found {array.shape}",
                    "one row a point",
                )
                continue
            if array.dtype != np.uint8:  # the type of binary descriptors
                if array.dtype != np.float32:
                    say(
                        key,
                        f"must be float32, or uint8 of binary descriptors, found {array.dtype}",
                        "convert it",
                    )
                elif not np.isfinite(array).all():
                    say(key, "has numbers that are not finite", _AGAIN)
            kind = array.dtype, array.shape[1]
            if self.kind is None:
                self.kind, self.kind_at = kind, f"{place}: {key}"
            if kind != self.kind:
                say(
                    key,
                    f"has {kind[1]} {kind[0]}, and {self.kind_at} has {self.kind[1]} "
                    f"{self.kind[0]}",
                    "use one descriptor for all",
                )
            low, high = DESCRIPTOR_LENGTHS
            if not low <= kind[1] <= high:
                say(
                    key,
                    f"descriptors have {low} to {high} numbers, found {kind[1]}",
                    "use another descriptor",
                )
            elif (size := kind[1] * kind[0].itemsize) > DESCRIPTOR_BYTES and not custom:
                say(
                    key,
                    f"more than {DESCRIPTOR_BYTES} bytes ({size}) are allowed with custom matches "
                    "only",
                    "export with --matches",
                )
        self._same_keys(say, keys, counts)

    def _column(
        self, folder: Path, place: str, kind: str, counts: Mapping[str, int]
    ) -> dict[str, np.ndarray]:
        say = self.say(f"{place}/{kind}.h5")
        found = {}
        for key, array in self.arrays(folder / f"{kind}.h5", place):
            found[key] = array
            if array.shape != (counts.get(key, array.size),):
                why = (
                    ", which the importer cannot sort"
                    if array.ndim == 2 and kind == "scores"
                    else ""
                )
                say(
                    key,
                    f"must be ({counts.get(key, 'n')},), found {array.shape}{why}",
                    "one number a point, in one dimension",
                )
            self._float(say, key, array)
            if (
                kind in ("angles", "orientations")
                and array.dtype.kind == "f"
                and (np.abs(array) > 360).any()
            ):
                say(key, "has angles beyond 360", "write degrees, clockwise as OpenCV's")
        self._same_keys(say, set(found), counts)
        return found

    def _matches(
        self, folder: Path, place: str, files: list[str], counts: Mapping[str, int]
    ) -> None:
        used = self._custom(place.partition("/")[0])
        one, several, stereo = (
            "matches.h5",
            "matches_multiview.h5",
            ("matches_stereo.h5", "matches_stereo_0.h5"),
        )
        if not files and True in used:
            self.say(f"{place}/{one}")(
                "", f"is missing, and {CONFIG} has use_custom_matches", "export with --matches"
            )
        if files and used == {False}:
            self.say(f"{place}/{files[0]}")(
                "",
                f"is there, and {CONFIG} has no use_custom_matches",
                "remove it, or export with --matches",
            )
        if one in files and len(files) > 1:
            self.say(f"{place}/{one}")(
                "",
                f"does not go with {', '.join(f for f in files if f != one)}",
                "leave one or the others",
            )
        elif files and one not in files:
            if several not in files:
                self.say(f"{place}/{several}")(
                    "",
                    "is missing, and there are matches of stereo",
                    f"add it, or call one file {one}",
                )
            if not any(name in files for name in stereo):
                self.say(f"{place}/{stereo[0]}")(
                    "",
                    "is missing, and there are matches of multiview",
                    f"add it, or call one file {one}",
                )
        for name in files:
            if name not in (one, several, *stereo):
                self.say(f"{place}/{name}")(
                    "", "the 2021 challenge reads no such file", "remove it"
                )
                continue
            self._match_file(folder / name, place, counts)

    def _match_file(self, path: Path, place: str, counts: Mapping[str, int]) -> None:
        say = self.say(f"{place}/{path.name}")
        names = frozenset(counts)
        missing = {f"{a}-{b}" for a in names for b in names if a > b}
        total = len(missing)
        for key, index in self.arrays(path, place):
            missing.discard(key)
            pair = _pair(key, names)
            if pair is None or pair[0] == pair[1]:
                say(
                    key,
                    "names no two images of this sequence",
                    "call it A-B, names without extension",
                )
                continue
            if pair[0] < pair[1]:
                say(
                    key,
                    "has the names in the wrong order",
                    f"call it {pair[1]}-{pair[0]} and swap its rows",
                )
            if index.ndim != 2 or len(index) != 2:
                say(
                    key,
                    f"must be (2,m), found {index.shape}",
                    "points of the first image, then points of the second",
                )
            elif index.dtype.kind not in "iu":
                say(key, f"must be whole numbers, found {index.dtype}", "write int32")
            elif index.size and (
                index.min() < 0
                or any(row.max() >= counts[n] for row, n in zip(index, pair, strict=True))
            ):
                say(
                    key,
                    f"names points beyond the {counts[pair[0]]} and {counts[pair[1]]} there are",
                    "count from 0, A's points first",
                )
        if missing:  # one line: an image that is missing has many pairs
            say(
                min(missing),
                f"{len(missing)} of {total} pairs are missing, this the first",
                "a pair without matches has an array (2,0)",
            )


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(str(number) for number in numbers)


def _fewer(count: int) -> str:
    fits = [str(most) for most in CATEGORIES if count <= most]
    return (
        f"state num_keypoints {fits[0]}, or export fewer"
        if fits
        else f"export at most {CATEGORIES[-1]}"
    )
