"""Match two images, or many pairs to one file."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from ..auto_orientation import PairMatcher, can_reorient
from ..errors import DataError
from ..estimation import estimate
from ..extract import ExtractOptions, Extractor
from ..files import Task, collect, natural, write_text
from ..formats.colmap import ColmapDatabase
from ..formats.hdf5 import FeatureFile, MatchFile, pair_name, read_pairs
from ..formats.store import FeatureStore, MatchStore, check_settings, open_features, settings_path
from ..image import ImageLike
from ..matching import match
from ..names import GEOMETRIES, MATCH_MAX_SIZE, NUM_KEYPOINTS
from ..progress import track
from ..refine import matched_pairs, refine_matches, refine_tracks
from ..structs import Estimate, Features, Matches
from .extract import (
    ExtractReport,
    check_store,
    extract_to_store,
    mask_loader,
    mask_settings,
    normalize_match_settings,
)

NamedMatcher: TypeAlias = Callable[[str, str, Features, Features], Matches]
#: Number of images whose features are cached while pairs are matched.
CACHE_SIZE = 64


@dataclass(frozen=True)
class MatchOptions:
    """Options of matching and verification.

    Attributes:
        ratio: maximum ratio of nearest to second distance, in (0, 1]; 1 = no test.
        rotation_tolerance: maximum difference in radians between the rotation of a match and the
            dominant one (``matching.filter_by_rotation``); None = no filter.
        geometry: keep only the inliers of a ``homography`` or ``fundamental`` matrix; None keeps
            all matches.
        threshold: maximum error of an inlier in pixels.
        refine: refine to subpixel positions: the matches of two images, the tracks in a database.
        auto_orientation: estimate the relative rotation of each pair
            (``auto_orientation.PairMatcher``) if patches are described upright.

    Raises:
        ValueError: an option is out of range.
    """

    ratio: float = 0.95
    rotation_tolerance: float | None = None
    geometry: str | None = None
    threshold: float = 2.0
    refine: bool = True
    auto_orientation: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {self.ratio}")
        if not self.threshold > 0:
            raise ValueError(f"threshold must be positive, got {self.threshold}")
        if self.geometry == "essential":
            raise ValueError(
                "an essential matrix needs the intrinsics of the cameras: use tiepoints.estimate "
                "with K_a and K_b, or geometry fundamental"
            )
        if self.geometry not in (None, *GEOMETRIES):
            raise ValueError(
                f"geometry must be homography, fundamental or None; got {self.geometry!r}"
            )
        tolerance = self.rotation_tolerance
        if tolerance is not None and not 0 < tolerance <= math.pi:
            raise ValueError(f"rotation_tolerance must lie in (0, pi], got {tolerance}")

    def matcher(self) -> Callable[[Features, Features], Matches]:
        """``matching.match`` with these options."""
        ratio = None if self.ratio >= 1 else self.ratio
        return partial(match, ratio=ratio, rotation_tolerance=self.rotation_tolerance)

    def to_json(self, *, database: bool) -> dict[str, Any]:
        """The settings stored with matches."""
        content: dict[str, Any] = {
            "ratio": self.ratio,
            "model": self.geometry,
            "threshold": self.threshold,
        }
        if self.rotation_tolerance is not None:
            content["rotation"] = self.rotation_tolerance
        if database:
            content["refine"] = self.refine
        if self.auto_orientation:
            content["orientation"] = "auto"
        return content


# ---- two images


@dataclass(frozen=True)
class PairResult:
    """Result of matching two images.

    Attributes:
        a, b: features of the images (of b with the relative rotation, if estimated).
        matches: see ``structs.Matches``.
        xy_a, xy_b: (K,2) positions of the matches.
        estimate: two-view geometry of the matches.
        image_a, image_b: (1,1,H,W) gray.
    """

    a: Features
    b: Features
    matches: Matches
    xy_a: Tensor
    xy_b: Tensor
    estimate: Estimate
    image_a: Tensor
    image_b: Tensor

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        estimate = self.estimate
        return {
            "points": [len(self.a), len(self.b)],
            "matches": len(self.matches),
            "inliers": int(estimate.inliers.sum()),
            "model": estimate.geometry,
            "ok": estimate.ok,
            "reason": estimate.reason,
            "matrix": None if estimate.model is None else estimate.model.tolist(),
            "xy_a": self.xy_a.tolist(),
            "xy_b": self.xy_b.tolist(),
            "inlier": estimate.inliers.tolist(),
            "score": self.matches.score.tolist(),
        }


def match_two(
    image_a: ImageLike,
    image_b: ImageLike,
    extraction: ExtractOptions | Extractor | None = None,
    options: MatchOptions | None = None,
    *,
    masks: tuple[Any, Any] = (None, None),
) -> PairResult:
    """Extract and match two images and estimate their geometry (by default a fundamental matrix).

    Args:
        masks: masks of the two images, see ``Extractor.extract``.

    Raises:
        ValueError, FileNotFoundError, DataError: invalid images or options.
    """
    options = options or MatchOptions()
    extraction = extraction or ExtractOptions(num_keypoints=NUM_KEYPOINTS, max_size=MATCH_MAX_SIZE)
    extractor = extraction.build() if isinstance(extraction, ExtractOptions) else extraction
    pixels_a, pixels_b = extractor.load(image_a), extractor.load(image_b)
    a = extractor.extract_tensor(pixels_a, masks[:1])[0]
    b = extractor.extract_tensor(pixels_b, masks[1:])[0]
    matcher = options.matcher()
    if options.auto_orientation and can_reorient(extractor):
        oriented = PairMatcher(extractor, matcher)(a, b, pixels_b)
        matches, b = oriented.matches, oriented.b
    else:
        matches = matcher(a, b)
    if options.refine:
        matches = refine_matches(a, b, matches, (pixels_a, pixels_b))
    xy_a, xy_b = matches.positions(a, b)
    geometry = options.geometry or "fundamental"
    result = estimate(xy_a, xy_b, geometry, threshold=options.threshold)
    return PairResult(a, b, matches, xy_a, xy_b, result, pixels_a, pixels_b)


# ---- many pairs


@dataclass
class MatchReport:
    """Result of matching many pairs.

    Attributes:
        done, skipped: number of pairs matched, and of those with stored matches.
        matches: number of matches of the pairs done.
        verified: number of pairs done with a geometry; None if none was requested.
        failed: (image or pair, reason); the pairs of an image that failed are not listed.
        ignored: number of files in the given folders that are not images.
    """

    done: int = 0
    skipped: int = 0
    matches: int = 0
    verified: int | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)
    ignored: int = 0


def choose_pairs(names: Iterable[str], sequential: int | None = None) -> list[tuple[str, str]]:
    """All pairs of ``names``, or each name with the next ``sequential`` ones, in natural order."""
    ordered = sorted(names, key=natural)
    if sequential is None:
        return list(combinations(ordered, 2))
    return [(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 : i + 1 + sequential]]


def stored_names(tasks: list[Task], store: FeatureStore) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of images in ``store`` (the longest suffix of their path that it contains), and
    failures for images without features.
    """
    found, missing = [], []
    for task in tasks:
        parts = task.path.resolve().parts[1:]
        suffixes = ["/".join(parts[i:]) for i in range(len(parts))]
        name = next((name for name in (str(task.relative), *suffixes) if name in store), None)
        if name is None:
            missing.append((str(task.path), f"{store.path} holds no features of it"))
        else:
            found.append(name)
    return found, missing


class _FeatureCache:
    """LRU cache of features by name; counts the pairs of images without features."""

    def __init__(self, store: FeatureStore):
        self.store = store
        self.errors: dict[str, str] = {}
        self.failed_pairs: dict[str, int] = {}
        self._names = lru_cache(store.names)
        self._features: OrderedDict[str, Features] = OrderedDict()

    def get(self, name: str) -> Features | None:
        """Features with descriptors; None if the image has none, which is counted."""
        if name not in self._features and name not in self.errors:
            try:
                self._features[name] = self._read(name)
            except (DataError, OSError) as error:
                self.errors[name] = str(error)
        if name in self.errors:
            self.failed_pairs[name] = self.failed_pairs.get(name, 0) + 1
            return None
        self._features.move_to_end(name)
        while len(self._features) > CACHE_SIZE:
            self._features.popitem(last=False)
        return self._features[name]

    def _read(self, name: str) -> Features:
        if name not in self.store:
            names = self._names()
            example = f" with names such as {names[0]}" if names else ""
            raise DataError(
                f"{self.store.path} holds no features of it; it has {len(names)}{example}"
            )
        features = self.store.read(name)
        if features.descriptors is None:
            raise DataError(
                f"{self.store.path} has no descriptors of it; extract with a descriptor"
            )
        return features

    def failures(self) -> list[tuple[str, str]]:
        """(image, reason and number of its pairs)."""
        counts = self.failed_pairs.items()
        return [(name, f"{self.errors[name]} ({count} pairs)") for name, count in counts]


def match_to_store(
    pairs: Iterable[tuple[str, str]],
    features: FeatureStore,
    store: MatchStore,
    options: MatchOptions,
    *,
    matcher: NamedMatcher | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> MatchReport:
    """Match pairs of names and store the matches; with ``options.geometry`` only its inliers.

    A pair is matched only once, in either order. An image without features is listed once, with
    the number of its pairs.

    Args:
        matcher: matches the features of two named images, instead of ``options.matcher()``.
    """
    report = MatchReport(verified=None if options.geometry is None else 0)
    cache = _FeatureCache(features)
    stored_as: dict[str, tuple[str, str]] = {}
    todo: dict[frozenset[str], tuple[str, str]] = {}
    for a, b in pairs:
        if a == b:
            report.failed.append((f"{a} {b}", "an image is not matched with itself"))
        else:
            todo.setdefault(frozenset((a, b)), (a, b))
    for a, b in track(todo.values(), unit="pair", label="match", enabled=progress):
        if isinstance(store, MatchFile):
            # hloc replaces / by -, so that two pairs may have the same name
            other = stored_as.setdefault(min(pair_name(a, b), pair_name(b, a)), (a, b))
            if other != (a, b):
                reason = (
                    f"hloc would store it under the same name as {' '.join(other)}; rename an image"
                )
                report.failed.append((f"{a} {b}", reason))
                continue
        if not overwrite and store.has_matches(a, b):
            report.skipped += 1
            continue
        features_a, features_b = cache.get(a), cache.get(b)
        if features_a is None or features_b is None:
            continue
        try:
            _match_pair((a, b), features_a, features_b, store, options, matcher, report)
        except (ValueError, DataError, OSError) as error:
            report.failed.append((f"{a} {b}", str(error)))
    report.failed += cache.failures()
    return report


def _match_pair(
    names: tuple[str, str],
    a: Features,
    b: Features,
    store: MatchStore,
    options: MatchOptions,
    matcher: NamedMatcher | None,
    report: MatchReport,
) -> None:
    assert a.descriptors is not None
    assert b.descriptors is not None
    dims = a.descriptors.shape[1], b.descriptors.shape[1]
    if dims[0] != dims[1]:
        raise DataError(
            f"descriptor dimensions differ, {dims[0]} and {dims[1]}; extract both images with one "
            "descriptor"
        )
    matches = options.matcher()(a, b) if matcher is None else matcher(*names, a, b)
    if options.geometry is not None:
        xy_a, xy_b = a.xy[matches.index[:, 0]], b.xy[matches.index[:, 1]]
        result = estimate(xy_a, xy_b, options.geometry, threshold=options.threshold)
        report.verified = (report.verified or 0) + result.ok
        matches = matches[result.inliers]
    store.write_matches(*names, matches, len(a))
    report.done += 1
    report.matches += len(matches)


def named_matcher(
    extractor: Extractor, images: dict[str, Path], options: MatchOptions
) -> NamedMatcher | None:
    """The ``matcher`` of ``match_to_store`` that estimates the relative rotation of each pair; None
    if that is disabled or not possible.

    Args:
        extractor: extractor of the features.
        images: name -> file; pairs with other images are matched without rotation.
    """
    if not options.auto_orientation or not can_reorient(extractor):
        return None
    plain = options.matcher()
    oriented = PairMatcher(extractor, plain)

    def match_named(name_a: str, name_b: str, a: Features, b: Features) -> Matches:
        if name_b not in images:
            return plain(a, b)
        return oriented(a, b, images[name_b], name_b).matches

    return match_named


@dataclass
class _Source:
    """Features to match.

    Attributes:
        store: store of the features.
        names: names of the images to match.
        settings: settings of the extraction.
        failed: images without features, with a reason.
        matcher: see ``match_to_store``.
    """

    store: Any
    names: list[str]
    settings: dict[str, Any] | None
    failed: list[tuple[str, str]]
    matcher: NamedMatcher | None = None


# One call per command of the command line, whose options are its parameters.
def match_images(
    images: list[str],
    output: Path,
    extraction: ExtractOptions | None = None,
    options: MatchOptions | None = None,
    *,
    pairs: Path | None = None,
    sequential: int | None = None,
    features: Path | None = None,
    root: Path | None = None,
    camera: str = "auto",
    masks: Path | None = None,
    mask_alpha: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> MatchReport:
    """Match pairs of many images to one file: ``.h5`` (hloc), or ``.db`` (with pairs verified by
    COLMAP). Run again, it resumes.

    Args:
        images: files, folders, patterns; optional with ``features``, among which they select.
        extraction: extracts the images once, to ``NAME.features.h5`` for ``NAME.h5``, or to the
            database. With ``features``, its descriptor must be that of the stored features.
        options: see ``MatchOptions``; ``refine`` refines the keypoints of a database to consistent
            subpixel positions (``refine.refine_tracks``).
        pairs, sequential: a list of pairs (``read_pairs``), or an argument of ``choose_pairs``; by
            default all pairs. Unless listed, pairs are written to ``NAME.pairs.txt``, which hloc
            requires.
        features: stored features, see ``open_features``.
        root: see ``collect``.
        camera: see ``ColmapDatabase``.
        masks, mask_alpha: see ``extract_images``.

    Raises:
        ValueError, FileNotFoundError, DataError, ImportError: no pairs, or invalid arguments or
            files; the message names the remedy.
    """
    options = options or MatchOptions()
    listed = None if pairs is None else list(read_pairs(pairs))
    if listed is not None and not listed:
        raise DataError(f"{pairs} lists no pairs; it needs two names per line")
    found = collect(images, root=root, inside=True)
    if images and not found.tasks and listed is None:
        path, reason = found.refused[0] if found.refused else ("", "none given")
        raise DataError(f"no images: {path}: {reason}")
    tasks = found.tasks
    database = output.suffix == ".db"
    with ExitStack() as stack:
        if features is None:
            if listed is not None:
                names = {name for pair in listed for name in pair}
                tasks = [task for task in tasks if str(task.relative) in names]
            largest = MATCH_MAX_SIZE if database else None
            extraction = extraction or ExtractOptions(num_keypoints=NUM_KEYPOINTS, max_size=largest)
            storing = _Storing(camera, masks, mask_alpha, overwrite, progress)
            source = _extract_source(stack, tasks, output, extraction, options, storing)
        else:
            descriptor = None if extraction is None else extraction.descriptor
            source = _stored_source(stack, tasks if images else None, output, features, descriptor)
        source.failed = found.refused + source.failed
        selected = listed or _choose_pairs(source, sequential, None if database else output)
        store: Any = source.store
        if not database:
            store = stack.enter_context(MatchFile(output, write=True))
        _check_settings(store, output, options, source.settings, overwrite)
        files = {str(task.relative): task.path for task in tasks}
        with _Refinement(output, store, files, enabled=database and options.refine) as refinement:
            report = match_to_store(
                selected,
                source.store,
                store,
                options,
                matcher=source.matcher,
                overwrite=overwrite,
                progress=progress,
            )
            if database:
                matched = [pair for pair in selected if store.has_matches(*pair)]
                report.verified = refinement.verify(matched, changed=report.done > 0)
    report.failed = source.failed + report.failed
    report.ignored = found.skipped
    return report


def _choose_pairs(
    source: _Source, sequential: int | None, output: Path | None
) -> list[tuple[str, str]]:
    """Choose pairs and write them next to ``output``."""
    pairs = choose_pairs(source.names, sequential)
    if not pairs:
        reason = f"; {source.failed[0][0]}: {source.failed[0][1]}" if source.failed else ""
        raise DataError(f"{len(source.names)} images with features, and two are needed{reason}")
    if output is not None:
        _write_pairs(_sibling(output, "pairs.txt"), pairs)
    return pairs


def _check_settings(
    store: Any,
    output: Path,
    options: MatchOptions,
    features: dict[str, Any] | None,
    overwrite: bool,
) -> None:
    database = output.suffix == ".db"
    settings = options.to_json(database=database)
    if features is not None:
        settings["features"] = features
    check_settings(
        _sibling(output, "matches.settings.json" if database else "settings.json"),
        settings,
        overwrite=overwrite,
        clear=store.clear_matches if database else store.clear,
        results=output,
        normalize=normalize_match_settings,
    )


@dataclass(frozen=True)
class _Storing:
    """How features are extracted to a store; fields as the parameters of ``match_images``."""

    camera: str
    masks: Path | None
    mask_alpha: bool
    overwrite: bool
    progress: bool


def _extract_source(
    stack: ExitStack,
    tasks: list[Task],
    output: Path,
    extraction: ExtractOptions,
    options: MatchOptions,
    storing: _Storing,
) -> _Source:
    """Features of images, extracted unless they are stored."""
    load_mask = mask_loader(storing.masks, storing.mask_alpha)
    settings = {**extraction.to_json(), **mask_settings(storing.masks, storing.mask_alpha)}
    store: Any
    if output.suffix == ".db":
        store = stack.enter_context(ColmapDatabase(output, camera=storing.camera, write=True))
        settings["camera"] = storing.camera
    else:
        store = stack.enter_context(FeatureFile(_sibling(output, "features.h5"), write=True))
    check_store(store, settings, storing.overwrite)
    extractor = extraction.build()
    report = ExtractReport()
    extract_to_store(
        tasks,
        extractor,
        store,
        report,
        described=True,
        load_mask=load_mask,
        progress=storing.progress,
    )
    files = {str(task.relative): task.path for task in tasks}
    names = [name for name in files if name in store]
    matcher = named_matcher(extractor, files, options)
    return _Source(store, names, settings, report.failed, matcher)


def _stored_source(
    stack: ExitStack,
    tasks: list[Task] | None,
    output: Path,
    features: Path,
    descriptor: Any,
) -> _Source:
    """Stored features of ``tasks``; None selects all."""
    same_file = features.resolve() == output.resolve()
    if output.suffix == ".db" and not same_file:
        raise ValueError(
            f"a database stores matches of its own features: use --features {output}, or omit "
            "--features"
        )
    store: Any = ColmapDatabase(output, write=True) if same_file else open_features(features)
    stack.enter_context(store)
    names, missing = (store.names(), []) if tasks is None else stored_names(tasks, store)
    if same_file:
        return _Source(store, names, None, missing)
    try:
        settings = json.loads(settings_path(store).read_text())
    except (OSError, ValueError):  # features of other programs are identified by their path
        settings = {"path": str(features.resolve())}
    stored = settings.get("descriptor", descriptor)
    if descriptor is not None and stored != descriptor:
        raise DataError(
            f"{features} has {stored} descriptors, not {descriptor}; omit --descriptor or extract "
            "again"
        )
    return _Source(store, names, settings, missing)


class _Refinement:
    """Refinement of the keypoints of a database after matching. A marker file exists from the first
    match to the end of the refinement, so that the next run completes an interrupted one.
    """

    def __init__(self, output: Path, store: Any, images: dict[str, Path], *, enabled: bool):
        self.marker = _sibling(output, "refinement-pending")
        self.store, self.images, self.enabled = store, images, enabled
        self.interrupted = self.marker.exists()

    def __enter__(self) -> _Refinement:
        if self.enabled:
            self.marker.touch()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.marker.unlink(missing_ok=True)

    def verify(self, pairs: list[tuple[str, str]], *, changed: bool) -> int:
        """Verify pairs, refine and verify again; returns the number of pairs with a geometry."""
        verified = self.store.verify(pairs)
        complete = all(name in self.images for pair in pairs for name in pair)
        if self.enabled and (changed or self.interrupted) and complete:
            return refine_database(self.store, pairs, self.images)
        return verified


def refine_database(
    database: ColmapDatabase, pairs: list[tuple[str, str]], images: dict[str, Path]
) -> int:
    """Refine the keypoints of a database to consistent subpixel positions along the tracks of its
    verified matches, and verify again.

    Args:
        database: open for writing; ``pairs`` have been verified.
        images: name -> file.

    Returns:
        the number of pairs with a geometry.

    Raises:
        DataError: an image cannot be read.
    """
    names = sorted({name for pair in pairs for name in pair})
    keypoints = {name: database.read(name).keypoints for name in names}
    inliers = matched_pairs(pairs, database.read_inliers)
    for name, xy in refine_tracks(keypoints, inliers, lambda name: images[name]).items():
        database.move_keypoints(name, xy)
    database.forget_geometry(pairs)
    return database.verify(pairs)


def _sibling(output: Path, end: str) -> Path:
    return output.with_name(f"{output.stem}.{end}")


def _write_pairs(path: Path, pairs: list[tuple[str, str]]) -> None:
    separator = "\t" if any(" " in name for pair in pairs for name in pair) else " "
    write_text(path, "".join(f"{a}{separator}{b}\n" for a, b in pairs))
