"""Matches of two images, and of many pairs to one file."""

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
from ..image import ImageLike, load_image
from ..matching import match
from ..names import NUM_KEYPOINTS
from ..progress import track
from ..refine import matched_pairs, refine_matches, refine_tracks
from ..structs import Estimate, Features, Matches
from .extract import ExtractReport, extract_to_store, normalize_settings

NamedMatcher: TypeAlias = Callable[[str, str, Features, Features], Matches]
#: Images whose features are kept in memory while pairs are matched.
CACHE = 64


@dataclass(frozen=True)
class MatchOptions:
    """How the features of pairs are matched and verified.

    Attributes:
        ratio: largest ratio of nearest to second distance, in (0, 1]; 1 = no test.
        rotation_tolerance: largest difference in radians of a match's rotation from the dominant
            one (``matching.filter_by_rotation``); None = no filter.
        geometry: keep only matches that agree with a ``homography``, ``fundamental`` matrix; None
            keeps all.
        threshold: largest error of an inlier in pixels.
        refine: sub-pixel positions: of the matches of two images, of the tracks in a database.
        auto_orientation: find the relative rotation of each pair
            (``auto_orientation.PairMatcher``), where the descriptor describes upright patches.

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
        tolerance = self.rotation_tolerance
        if tolerance is not None and not 0 < tolerance <= math.pi:
            raise ValueError(f"rotation_tolerance must lie in (0, pi], got {tolerance}")

    def matcher(self) -> Callable[[Features, Features], Matches]:
        """``matching.match`` with these options."""
        ratio = None if self.ratio >= 1 else self.ratio
        return partial(match, ratio=ratio, rotation_tolerance=self.rotation_tolerance)

    def to_json(self, *, database: bool) -> dict[str, Any]:
        """The record of the matches in a file."""
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
    """Two images matched.

    Attributes:
        a, b: features of the images, those of b as matched.
        matches: see ``structs.Matches``.
        xy_a, xy_b: (K,2) positions of the matches.
        estimate: the geometry they agree with.
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
        """Everything as a JSON object."""
        found = self.estimate
        return {
            "points": [len(self.a), len(self.b)],
            "matches": len(self.matches),
            "inliers": int(found.inliers.sum()),
            "model": found.geometry,
            "ok": found.ok,
            "reason": found.reason,
            "matrix": None if found.model is None else found.model.tolist(),
            "xy_a": self.xy_a.tolist(),
            "xy_b": self.xy_b.tolist(),
            "inlier": found.inliers.tolist(),
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
    """Extract two images, match them and estimate their geometry (a fundamental matrix unless
    ``options.geometry`` is a homography).

    Args:
        masks: of the two images (``Extractor.extract``).

    Raises:
        ValueError, FileNotFoundError, DataError: images or options that cannot be used.
    """
    options = options or MatchOptions()
    extraction = extraction or ExtractOptions(num_keypoints=NUM_KEYPOINTS)
    extractor = extraction.build() if isinstance(extraction, ExtractOptions) else extraction
    pixels_a, pixels_b = load_image(image_a), load_image(image_b)
    a = extractor.extract_tensor(pixels_a, masks[:1])[0]
    b = extractor.extract_tensor(pixels_b, masks[1:])[0]
    matcher = options.matcher()
    if options.auto_orientation and can_reorient(extractor):
        oriented = PairMatcher(extractor, matcher)(a, b, pixels_b)
        found, b = oriented.matches, oriented.b
    else:
        found = matcher(a, b)
    if options.refine:
        found = refine_matches(a, b, found, (pixels_a, pixels_b))
    xy_a, xy_b = found.positions(a, b)
    geometry = options.geometry or "fundamental"
    result = estimate(xy_a, xy_b, geometry, threshold=options.threshold)
    return PairResult(a, b, found, xy_a, xy_b, result, pixels_a, pixels_b)


# ---- many pairs


@dataclass
class MatchReport:
    """How a run over pairs went.

    Attributes:
        done, skipped: pairs matched, and those that were stored before.
        matches: number of kept matches of the pairs done.
        verified: pairs done that have a geometry; None where none was asked for.
        failed: (image or pair, reason); a pair fails with its image.
        ignored: files in the folders given that are no images.
    """

    done: int = 0
    skipped: int = 0
    matches: int = 0
    verified: int | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)
    ignored: int = 0


def choose_pairs(names: Iterable[str], sequential: int | None = None) -> list[tuple[str, str]]:
    """All pairs of ``names``, or each name with the ``sequential`` ones after it; names in natural
    order.
    """
    ordered = sorted(names, key=natural)
    if sequential is None:
        return list(combinations(ordered, 2))
    return [(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 : i + 1 + sequential]]


def stored_names(tasks: list[Task], store: FeatureStore) -> tuple[list[str], list[tuple[str, str]]]:
    """The names in ``store`` of images: the longest end of their path that it holds; and images
    that it lacks.
    """
    found, lacking = [], []
    for task in tasks:
        parts = task.path.resolve().parts[1:]
        ends = ["/".join(parts[i:]) for i in range(len(parts))]
        name = next((end for end in (str(task.relative), *ends) if end in store), None)
        if name is None:
            lacking.append((str(task.path), f"{store.path} holds no features of it"))
        else:
            found.append(name)
    return found, lacking


class _FeatureCache:
    """Features by name, the ``CACHE`` last used ones in memory; images without are counted."""

    def __init__(self, store: FeatureStore):
        self.store = store
        self.broken: dict[str, str] = {}
        self.lost_pairs: dict[str, int] = {}
        self._names = lru_cache(store.names)
        self._kept: OrderedDict[str, Features] = OrderedDict()

    def get(self, name: str) -> Features | None:
        """Features with descriptors; None where the image has none, which is then counted."""
        if name not in self._kept and name not in self.broken:
            try:
                self._kept[name] = self._read(name)
            except (DataError, OSError) as error:
                self.broken[name] = str(error)
        if name in self.broken:
            self.lost_pairs[name] = self.lost_pairs.get(name, 0) + 1
            return None
        self._kept.move_to_end(name)
        while len(self._kept) > CACHE:
            self._kept.popitem(last=False)
        return self._kept[name]

    def _read(self, name: str) -> Features:
        if name not in self.store:
            names = self._names()
            such = f" with names such as {names[0]}" if names else ""
            raise DataError(f"{self.store.path} holds no features of it; it has {len(names)}{such}")
        features = self.store.read(name)
        if features.descriptors is None:
            raise DataError(
                f"{self.store.path} has no descriptors of it; extract with a descriptor"
            )
        return features

    def failures(self) -> list[tuple[str, str]]:
        """(image, reason and number of its pairs)."""
        lost = self.lost_pairs.items()
        return [(name, f"{self.broken[name]} ({count} pairs)") for name, count in lost]


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
    """Match each pair of names and store its matches; with ``options.geometry`` only those that
    agree with one.

    A pair is done once, whichever way round it comes. An image without features fails once, with
    the number of its pairs.

    Args:
        matcher: matches the features of two named images instead of ``options.matcher()``.
    """
    report = MatchReport(verified=None if options.geometry is None else 0)
    cache = _FeatureCache(features)
    groups: dict[str, tuple[str, str]] = {}
    todo: dict[frozenset[str], tuple[str, str]] = {}
    for a, b in pairs:
        if a == b:
            report.failed.append((f"{a} {b}", "an image is not matched with itself"))
        else:
            todo.setdefault(frozenset((a, b)), (a, b))
    for a, b in track(todo.values(), unit="pair", label="match", enabled=progress):
        if isinstance(store, MatchFile):
            # hloc turns / into -, which can give two pairs one name
            other = groups.setdefault(min(pair_name(a, b), pair_name(b, a)), (a, b))
            if other != (a, b):
                reason = (
                    f"hloc would store it under the same name as {' '.join(other)}; rename an image"
                )
                report.failed.append((f"{a} {b}", reason))
                continue
        if not overwrite and store.has_matches(a, b):
            report.skipped += 1
            continue
        one, two = cache.get(a), cache.get(b)
        if one is None or two is None:
            continue
        try:
            _match_named(a, b, one, two, store, options, matcher, report)
        except (ValueError, DataError, OSError) as error:
            report.failed.append((f"{a} {b}", str(error)))
    report.failed += cache.failures()
    return report


def _match_named(
    a: str,
    b: str,
    one: Features,
    two: Features,
    store: MatchStore,
    options: MatchOptions,
    matcher: NamedMatcher | None,
    report: MatchReport,
) -> None:
    assert one.descriptors is not None
    assert two.descriptors is not None
    lengths = one.descriptors.shape[1], two.descriptors.shape[1]
    if lengths[0] != lengths[1]:
        raise DataError(
            f"descriptor dimensions differ, {lengths[0]} and {lengths[1]}; extract both images "
            "with one descriptor"
        )
    found = options.matcher()(one, two) if matcher is None else matcher(a, b, one, two)
    if options.geometry is not None:
        xy_a, xy_b = one.xy[found.index[:, 0]], two.xy[found.index[:, 1]]
        result = estimate(xy_a, xy_b, options.geometry, threshold=options.threshold)
        report.verified = (report.verified or 0) + result.ok
        found = found[result.inliers]
    store.write_matches(a, b, found, len(one))
    report.done += 1
    report.matches += len(found)


def named_matcher(
    extractor: Extractor, images: dict[str, Path], options: MatchOptions
) -> NamedMatcher | None:
    """The ``matcher`` of ``match_to_store`` that finds the relative rotation of each pair; None
    where it has no use.

    Args:
        extractor: what the features were extracted with.
        images: name -> file; a pair with an image that is not among them is matched as it is.
    """
    if not options.auto_orientation or not can_reorient(extractor):
        return None
    plain = options.matcher()
    oriented = PairMatcher(extractor, plain)

    def matched(a: str, b: str, one: Features, two: Features) -> Matches:
        if b not in images:
            return plain(one, two)
        return oriented(one, two, images[b], b).matches

    return matched


@dataclass
class _Source:
    """Features to match.

    Attributes:
        store: where they are.
        names: of the images to match.
        settings: what they were made with.
        failed: images without features, and why.
        matcher: see ``match_to_store``.
    """

    store: Any
    names: list[str]
    settings: dict[str, Any] | None
    failed: list[tuple[str, str]]
    matcher: NamedMatcher | None = None


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
    overwrite: bool = False,
    progress: bool = True,
) -> MatchReport:
    """Match pairs of many images into one file: hloc's ``.h5``, or a COLMAP ``.db``, whose pairs
    COLMAP then verifies. Run again, it resumes.

    Args:
        images: files, folders, patterns; with ``features`` they select among its names, and may be
            left out.
        extraction: extracts the images: into ``NAME.features.h5`` for ``NAME.h5``, or into the
            database itself. Each image once, and not again in the next run. With ``features`` only
            its descriptor is compared with what is stored.
        options: see ``MatchOptions``; ``refine`` moves the keypoints of a database to consistent
            sub-pixel positions (``refine.refine_tracks``).
        pairs, sequential: a list of pairs (``read_pairs``), or ``choose_pairs``; by default all
            pairs. Pairs that were chosen here are written to ``NAME.pairs.txt``, which hloc asks
            for.
        features: stored features, see ``open_features``.
        root: see ``collect``.
        camera: see ``ColmapDatabase``.

    Raises:
        ValueError, FileNotFoundError, DataError, ImportError: nothing to match, or files that do
            not fit; the message has the remedy.
    """
    options = options or MatchOptions()
    listed = None if pairs is None else list(read_pairs(pairs))
    if listed is not None and not listed:
        raise DataError(f"{pairs} lists no pairs; it needs two names per line")
    found = collect(images, root=root, inside=True)
    if images and not found.tasks and listed is None:
        reason = found.refused[0] if found.refused else ("", "none given")
        raise DataError(f"no images: {reason[0]}: {reason[1]}")
    tasks = found.tasks
    database = output.suffix == ".db"
    with ExitStack() as stack:
        if features is None:
            if listed is not None:
                wanted = {name for pair in listed for name in pair}
                tasks = [task for task in tasks if str(task.relative) in wanted]
            extraction = extraction or ExtractOptions(num_keypoints=NUM_KEYPOINTS)
            source = _extracted(
                stack, tasks, output, extraction, options, camera, overwrite, progress
            )
        else:
            descriptor = None if extraction is None else extraction.descriptor
            source = _stored(stack, tasks if images else None, output, features, descriptor)
        failed = found.refused + source.failed
        chosen = listed
        if chosen is None:
            chosen = choose_pairs(source.names, sequential)
            if not chosen:
                reason_text = f"; {failed[0][0]}: {failed[0][1]}" if failed else ""
                raise DataError(
                    f"{len(source.names)} images with features, and two are needed{reason_text}"
                )
            if not database:
                _write_pairs(_sibling(output, "pairs.txt"), chosen)
        store: Any = source.store
        if not database:
            store = stack.enter_context(MatchFile(output, write=True))
        settings = options.to_json(database=database)
        if source.settings is not None:
            settings["features"] = source.settings
        check_settings(
            _sibling(output, "matches.settings.json" if database else "settings.json"),
            settings,
            overwrite=overwrite,
            clear=store.clear_matches if database else store.clear,
            results=output,
            normalize=_normalize,
        )
        files = {str(task.relative): task.path for task in tasks}
        with _Refinement(output, store, files, enabled=database and options.refine) as refinement:
            report = match_to_store(
                chosen,
                source.store,
                store,
                options,
                matcher=source.matcher,
                overwrite=overwrite,
                progress=progress,
            )
            if database:
                matched = [pair for pair in chosen if store.has_matches(*pair)]
                report.verified = refinement.verify(matched, changed=report.done > 0)
    report.failed = failed + report.failed
    report.ignored = found.skipped
    return report


def _extracted(
    stack: ExitStack,
    tasks: list[Task],
    output: Path,
    extraction: ExtractOptions,
    options: MatchOptions,
    camera: str,
    overwrite: bool,
    progress: bool,
) -> _Source:
    """Features of images, extracted where they are not stored yet."""
    settings = extraction.to_json()
    store: Any
    if output.suffix == ".db":
        store = stack.enter_context(ColmapDatabase(output, camera=camera, write=True))
        settings["camera"] = camera
    else:
        store = stack.enter_context(FeatureFile(_sibling(output, "features.h5"), write=True))
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
    extract_to_store(tasks, extractor, store, report, described=True, progress=progress)
    files = {str(task.relative): task.path for task in tasks}
    names = [name for name in files if name in store]
    matcher = named_matcher(extractor, files, options)
    return _Source(store, names, settings, report.failed, matcher)


def _stored(
    stack: ExitStack,
    tasks: list[Task] | None,
    output: Path,
    features: Path,
    descriptor: Any,
) -> _Source:
    """Stored features; ``tasks`` select among them, None takes all."""
    inside = features.resolve() == output.resolve()
    if output.suffix == ".db" and not inside:
        raise ValueError(
            f"a database gets matches of its own features: give --features {output}, or leave "
            "--features out"
        )
    store: Any = ColmapDatabase(output, write=True) if inside else open_features(features)
    stack.enter_context(store)
    names, lacking = (store.names(), []) if tasks is None else stored_names(tasks, store)
    if inside:
        return _Source(store, names, None, lacking)
    try:
        settings = json.loads(settings_path(store).read_text())
    except (OSError, ValueError):  # made by others: then their path tells them apart
        settings = {"path": str(features.resolve())}
    found = settings.get("descriptor", descriptor)
    if descriptor is not None and found != descriptor:
        raise DataError(
            f"{features} has {found} descriptors, not {descriptor}; leave --descriptor out or "
            "extract again"
        )
    return _Source(store, names, settings, lacking)


class _Refinement:
    """Refinement of the keypoints of a database after matching. A marker file stands from the
    first match to the end of the refinement, so that the next run completes a stopped one.
    """

    def __init__(self, output: Path, store: Any, images: dict[str, Path], *, enabled: bool):
        self.marker = _sibling(output, "refinement-pending")
        self.store, self.images, self.enabled = store, images, enabled
        self.stopped = self.marker.exists()

    def __enter__(self) -> _Refinement:
        if self.enabled:
            self.marker.touch()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.marker.unlink(missing_ok=True)

    def verify(self, pairs: list[tuple[str, str]], *, changed: bool) -> int:
        """Verify pairs, refining in between; the number of those with a geometry."""
        verified = self.store.verify(pairs)
        known = all(name in self.images for pair in pairs for name in pair)
        if self.enabled and (changed or self.stopped) and known:
            return refine_database(self.store, pairs, self.images)
        return verified


def refine_database(
    database: ColmapDatabase, pairs: list[tuple[str, str]], images: dict[str, Path]
) -> int:
    """Give the keypoints of a database consistent sub-pixel positions along the tracks of its
    verified matches, and verify again.

    Args:
        database: open for writing; ``pairs`` have been verified.
        images: name -> file.

    Returns:
        pairs that have a geometry afterwards.

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


def _normalize(content: dict[str, Any]) -> dict[str, Any]:
    """Settings of matches with those of their features as written today."""
    features = content.get("features")
    if isinstance(features, dict) and "detector" in features:
        return {**content, "features": normalize_settings(features)}
    return content


def _sibling(output: Path, end: str) -> Path:
    return output.with_name(f"{output.stem}.{end}")


def _write_pairs(path: Path, pairs: list[tuple[str, str]]) -> None:
    between = "\t" if any(" " in name for pair in pairs for name in pair) else " "
    write_text(path, "".join(f"{a}{between}{b}\n" for a, b in pairs))
