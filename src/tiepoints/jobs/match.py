"""Match two images, or many pairs to one file."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..auto_orientation import PairMatcher, can_reorient, match_verified
from ..errors import DataError
from ..estimation import estimate
from ..extract import ExtractOptions, Extractor
from ..files import (
    Task,
    collect,
    is_disk_full,
    printable,
    write_json,
    write_text,
)
from ..formats.colmap import ColmapDatabase
from ..formats.hdf5 import FeatureFile, MatchFile, pair_name, read_pairs
from ..formats.records import (
    RecordLog,
    file_stamp,
    json_digest,
    with_program,
)
from ..formats.refinement import PendingRefinement
from ..formats.store import (
    FeatureStore,
    MatchStore,
    check_settings,
    clear_all_matches,
    images_path,
    match_settings_path,
    matches_path,
    open_features,
    own_settings,
)
from ..hard_pairs import Attempt, View, match_again
from ..image import ImageLike, Notices, ReadOptions, read_image
from ..matching import check_min_neighbors, match
from ..names import GEOMETRIES, MATCH_MAX_SIZE, MIN_NEIGHBORS, NUM_KEYPOINTS, PAIR_METHODS
from ..progress import Progress
from ..refine import matched_pairs, refine_matches, refine_tracks
from ..structs import Estimate, Features, Matches
from .extract import (
    ExtractReport,
    assign_cameras,
    camera_keys,
    check_store,
    counted_pages,
    extract_to_store,
    mask_settings,
    normalize_settings,
    refuse_rotation,
)
from .image_pairs import Candidates, PairChoice, choose_image_pairs
from .images import mask_loader
from .pair_workers import PairOutcome, PairRunner, PairWork
from .shards import FeatureShards, MatchShards, Shard, blocks

logger = logging.getLogger(__name__)
#: Random samples of a pair in COLMAP's verification. Its default, 10,000, takes four times as long
#: for pairs without overlap and finds 0 to 0.5 % more inliers of others
#: (benchmarks/verification.py).
MAX_TRIALS = 2_500
#: Number of images whose features are cached while pairs are matched.
CACHE_SIZE = 64


@dataclass(frozen=True)
class MatchOptions:
    """Options of matching and verification.

    Attributes:
        ratio: maximum ratio of nearest to second distance, in (0, 1]; 1 = no test.
        min_neighbors: number of neighboring matches that must agree with a match
            (``matching.filter_by_neighbors``), 0..24; 0 keeps all.
        rotation_tolerance: maximum difference in radians between the rotation of a match and the
            dominant one (``matching.filter_by_rotation``); None = no filter.
        geometry: keep only the inliers of a ``homography`` or ``fundamental`` matrix; None keeps
            all matches.
        threshold: maximum error of an inlier in pixels.
        refine: refine to subpixel positions: the matches of two images, the tracks in a database.
        auto_orientation: estimate the relative rotation and tilt of each pair
            (``auto_orientation.PairMatcher``) if keypoints are described upright.
        retry: two images: if they hardly match, describe them in other ways
            (``hard_pairs.match_again``) and keep the matches if more agree; with
            ``auto_orientation`` only.

    Raises:
        ValueError: an option is out of range.
    """

    ratio: float = 1.0
    min_neighbors: int = MIN_NEIGHBORS
    rotation_tolerance: float | None = None
    geometry: str | None = None
    threshold: float = 2.0
    refine: bool = True
    auto_orientation: bool = True
    retry: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {self.ratio}")
        check_min_neighbors(self.min_neighbors)
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
        """``matching.match`` with these options, except for ``min_neighbors``."""
        ratio = None if self.ratio >= 1 else self.ratio
        return partial(match, ratio=ratio, rotation_tolerance=self.rotation_tolerance)

    def to_json(self, *, database: bool) -> dict[str, Any]:
        """The settings stored with matches."""
        content: dict[str, Any] = {
            "ratio": self.ratio,
            "model": self.geometry,
            "threshold": self.threshold,
        }
        if self.min_neighbors:
            content["min_neighbors"] = self.min_neighbors
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
        described: the way in which the images were described, see ``hard_pairs.Attempt``.
    """

    a: Features
    b: Features
    matches: Matches
    xy_a: Tensor
    xy_b: Tensor
    estimate: Estimate
    image_a: Tensor
    image_b: Tensor
    described: str = "as given"

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
            "described": self.described,
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
    read_a, read_b = extractor.read(image_a), extractor.read(image_b)
    a, b = (
        View(extractor.extract_tensor(reading.pixels, [mask])[0], reading.pixels, mask)
        for reading, given in zip((read_a, read_b), masks, strict=True)
        for mask in [extractor.combine(reading, given)]
    )
    reorient = options.auto_orientation and can_reorient(extractor)
    notices = Notices()
    for name, reading in ((image_a, read_a), (image_b, read_b)):
        notices.add(name, reading)
    notices.log(rotations=not reorient)
    attempt = match_views(extractor if reorient else None, a, b, options)
    matches, features_a, features_b = attempt.found.matches, attempt.a, attempt.found.b
    xy_a, xy_b = matches.positions(features_a, features_b)
    geometry = options.geometry or "fundamental"
    result = estimate(xy_a, xy_b, geometry, threshold=options.threshold)
    if options.min_neighbors and not attempt.found.support and result.inliers.any():
        reason = f"{int(result.inliers.sum())} matches agree, no more than chance explains"
        none = torch.zeros_like(result.inliers)
        result = replace(result, model=None, inliers=none, ok=False, reason=reason)
    return PairResult(
        *(features_a, features_b, matches, xy_a, xy_b, result, a.pixels, b.pixels), attempt.way
    )


def match_views(
    extractor: Extractor | None, a: View, b: View, options: MatchOptions | None = None
) -> Attempt:
    """Match the features of two images.

    Args:
        extractor: of the features; it describes them at other rotations and, with ``retry``, in
            other ways. None = match them as they are.
        a, b: the images and their features.
    """
    options = options or MatchOptions()
    matcher = options.matcher()
    if extractor is None:
        found = match_verified(a.features, b.features, matcher, options.min_neighbors)
        attempt = Attempt(a.features, found, b.pixels)
    else:
        pair_matcher = PairMatcher(extractor, matcher, options.min_neighbors)
        found = pair_matcher(a.features, b.features, b.pixels)
        attempt = Attempt(a.features, found, b.pixels)
        if options.retry:
            attempt = match_again(pair_matcher, a, b, found)
    if not options.refine:
        return attempt
    found = attempt.found
    matches = refine_matches(attempt.a, found.b, found.matches, (a.pixels, attempt.pixels_b))
    return replace(attempt, found=replace(found, matches=matches))


# ---- many pairs


@dataclass
class MatchReport:
    """Result of matching many pairs.

    Attributes:
        done, skipped: number of pairs matched, and of those with stored matches.
        matches: number of matches of the pairs done.
        changed: number of images whose features have changed since they were matched; their pairs
            are matched again.
        verified: number of pairs done with a geometry; None if none was requested.
        failed: (image or pair, reason); the pairs of an image that failed are not listed.
        ignored: number of files in the given folders that are not images.
        selection: how the pairs were chosen, and why.
        pairs: the chosen pairs, of which some may have failed.
        shared: image of a database -> key of its camera, see ``exif.shared_cameras``.
    """

    done: int = 0
    skipped: int = 0
    matches: int = 0
    changed: int = 0
    verified: int | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)
    ignored: int = 0
    selection: str = ""
    pairs: list[tuple[str, str]] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)


def stored_images(
    tasks: list[Task], store: FeatureStore
) -> tuple[dict[str, Path], list[tuple[str, str]]]:
    """Names of images in ``store`` (the longest suffix of their path that it contains) with their
    files, and failures for images without features of their own.
    """
    found: dict[str, Path] = {}
    missing = []
    for task in tasks:
        suffixes = [
            "/".join(parts[i:])
            for parts in (
                Path(os.path.abspath(task.source)).parts[1:],
                task.source.resolve().parts[1:],
            )
            for i in range(len(parts))
        ]
        name = next((name for name in (str(task.relative), *suffixes) if name in store), None)
        if name is None:
            missing.append((str(task.path), f"{store.path} holds no features of it"))
        elif name in found:
            reason = f"{store.path} holds one image {name}, for which {found[name]} is taken"
            missing.append((str(task.path), reason))
        else:
            found[name] = task.source
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
        store = self.store
        # not as an earlier refinement has moved them
        read = store.read_detected if isinstance(store, ColmapDatabase) else store.read
        features = read(name)
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
    work: PairWork,
    *,
    workers: int | None = 1,
    overwrite: bool = False,
    shards: MatchShards | None = None,
    progress: bool = True,
) -> MatchReport:
    """Match pairs of names and store the matches; with a geometry in ``work`` only its inliers.

    A pair is matched only once, in either order, and again if the features of an image have changed
    (``matches_path``). An image without features is listed once, with the number of its pairs.

    Args:
        work: how the pairs are matched.
        workers: see ``PairRunner``.
        shards: matches that are written instead of matching the pairs.
    """
    report = MatchReport(verified=None if work.options.geometry is None else 0)
    cache = _FeatureCache(features)
    todo: dict[tuple[str, str], tuple[str, str]] = {}
    for pair in pairs:
        a, b = pair
        if a == b:
            report.failed.append((f"{a} {b}", "an image is not matched with itself"))
        else:
            todo.setdefault(pair if a < b else (b, a), pair)
    names = {name for pair in todo for name in pair}
    report.changed = _remove_outdated(names, features, store)
    ordered = list(todo.values())
    if work.oriented is not None:  # which caches what it computes of the second image
        first = {b: i for i, (_, b) in reversed(list(enumerate(ordered)))}
        ordered.sort(key=lambda pair: first[pair[1]])
    bar = Progress(len(ordered), unit="pair", label="match", enabled=progress)
    pending = _pending(ordered, store, report, shards, bar, overwrite=overwrite)
    with bar, PairRunner(work, cache.get, workers) as runner:
        for pair, outcome in runner.run(pending):
            _write_outcome(pair, outcome, store, report)
            bar.update()
    report.failed += cache.failures()
    return report


def _pending(
    pairs: list[tuple[str, str]],
    store: MatchStore,
    report: MatchReport,
    shards: MatchShards | None,
    bar: Progress,
    *,
    overwrite: bool,
) -> Iterator[tuple[str, str]]:
    """The pairs to match: neither stored, nor in shards, which are taken over, nor ambiguous."""
    ambiguous = _ambiguous({name for pair in pairs for name in pair})
    stored_as: dict[str, tuple[str, str]] = {}
    now = RecordLog(matches_path(store))
    for a, b in pairs:
        if isinstance(store, MatchFile) and not ambiguous.isdisjoint((a, b)):
            other = stored_as.setdefault(min(pair_name(a, b), pair_name(b, a)), (a, b))
            if other != (a, b):
                reason = (
                    f"hloc would store it under the same name as {' '.join(other)}; rename an image"
                )
                report.failed.append((f"{a} {b}", reason))
                bar.update()
                continue
        if not overwrite and store.has_matches(a, b):
            report.skipped += 1
        elif shards is None or not _take_over((a, b), shards, now, store, report):
            yield a, b
            continue
        bar.update()


def _write_outcome(
    pair: tuple[str, str], outcome: PairOutcome, store: MatchStore, report: MatchReport
) -> None:
    """Write the matches of a pair to the store."""
    if outcome.matches is None:
        report.failed.append((" ".join(pair), outcome.reason))
        return
    try:
        store.write_matches(*pair, outcome.matches, outcome.count)
    except (ValueError, DataError, OSError) as error:
        if is_disk_full(error):
            raise OSError(
                f"the matches of {' '.join(pair)} could not be written ({error}); free space and "
                "run again: it resumes"
            ) from error
        report.failed.append((" ".join(pair), str(error)))
        return
    report.done += 1
    report.matches += len(outcome.matches)
    if report.verified is not None:
        report.verified += outcome.verified


def _ambiguous(names: Iterable[str]) -> set[str]:
    """Names that are the same for hloc, which replaces / by -, so that two pairs may be."""
    same: dict[str, list[str]] = {}
    for name in names:
        same.setdefault(name.replace("/", "-"), []).append(name)
    return {name for group in same.values() if len(group) > 1 for name in group}


def _take_over(
    pair: tuple[str, str],
    shards: MatchShards,
    now: RecordLog,
    store: MatchStore,
    report: MatchReport,
) -> bool:
    """Write the matches of a pair in a shard to the store; returns whether there are any."""
    found = shards.read(*pair, now)
    if found is None:
        return False
    matches, count = found
    store.write_matches(*pair, matches, count)
    report.done += 1
    report.matches += len(matches)
    if report.verified is not None:
        report.verified += len(matches) > 0
    return True


def _remove_outdated(names: set[str], features: FeatureStore, store: MatchStore) -> int:
    """Remove the matches of images whose features have changed since, or exist no longer, and
    record the features that the next matches are made from; returns the number of images whose
    features have changed.

    Matches are removed before the record is changed, so that a killed process leaves no outdated
    ones.
    """
    with RecordLog(matches_path(store)) as log:
        now = feature_records(names, features, store, log)
        gone = [
            name
            for name in log.entries
            if name not in now and (name in names or not features.done(name, described=False))
        ]
        outdated = {
            name: log.get(name)
            for name, record in now.items()
            if (log.get(name) or {}).get("features") != record["features"]
        }
        store.remove_matches([*outdated, *gone])
        log.forget(gone)
        for name, record in now.items():
            if log.get(name) != record:
                log.put(name, **record)
    if gone:
        logger.info(
            "removed the matches of %d image%s without features", len(gone), "s" * (len(gone) > 1)
        )
    changed = sum(before is not None for before in outdated.values())
    if changed:
        logger.info(
            "the features of %d image%s changed since the last matching; matched again",
            changed,
            "s" * (changed > 1),
        )
    return changed


def feature_records(
    names: Iterable[str], features: FeatureStore, store: MatchStore, log: RecordLog
) -> dict[str, dict[str, Any]]:
    """Name -> ``features``, the digest of its features, for the images that have some.

    The digests of features of this package are those recorded at their extraction. Those of other
    programs are computed, unless size and modification time of their file (``file``) are the same
    as in ``log``, that of ``store``.
    """
    own = own_settings(features) is not None
    # writing matches changes the file of a database
    separate = features.path.is_file() and features.path != store.path
    stamp = file_stamp(features.path) if separate else None
    found: dict[str, dict[str, Any]] = {}
    with RecordLog(images_path(features)) as extracted:
        for name in sorted(names):
            if not features.done(name, described=False):
                continue
            entry = extracted.get(name) if own else None
            known = log.get(name)
            if entry is not None and "features" in entry:
                found[name] = {"features": entry["features"]}
            elif known is not None and stamp is not None and known.get("file") == stamp:
                found[name] = known
            else:
                try:
                    digest = features.digest(name)
                except DataError:  # reported when the image is matched
                    continue
                found[name] = {"features": digest} | ({} if stamp is None else {"file": stamp})
    return found


@dataclass
class _Source:
    """Features to match.

    Attributes:
        store: store of the features.
        names: names of the images to match.
        files: name -> file of the images that were given.
        settings: settings of the extraction; for features of other programs, their path.
        failed: images without features, with a reason.
        extractor: of the features, if they were extracted now; it can describe them again.
        reading: how the images were read.
        extraction: options of ``extractor``.
        shared: image of a database -> key of its camera.
        missing: other images of the store whose files do not exist any more.
    """

    store: Any
    names: list[str]
    files: dict[str, Path]
    settings: dict[str, Any]
    failed: list[tuple[str, str]]
    extractor: Extractor | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    extraction: ExtractOptions | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)


# One call per command of the command line, whose options are its parameters.
def match_images(
    images: list[str],
    output: Path,
    extraction: ExtractOptions | None = None,
    options: MatchOptions | None = None,
    *,
    pairs: str | Path | None = None,
    neighbors: int | None = None,
    default_neighbors: int | None = None,
    features: Path | None = None,
    root: Path | None = None,
    camera: str = "auto",
    masks: Path | None = None,
    pages: str = "first",
    overwrite: bool = False,
    exclusive: bool = False,
    workers: int | None = 1,
    shard: Shard | None = None,
    ray: str | None = None,
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
        pairs, neighbors, default_neighbors: a list of pairs (``read_pairs``), or arguments of
            ``image_pairs.choose_image_pairs``; by default ``auto``. Those that did
            not fail are written to ``NAME.pairs.txt``, which hloc requires.
        features: stored features, see ``open_features``.
        root: see ``collect``.
        camera: see ``extract_images``.
        masks, pages: see ``extract_images``.
        exclusive: remove the two-view geometries of other pairs from a database; their matches are
            kept.
        workers: see ``extract_images`` and, of the pairs, ``pair_workers.PairRunner``.
        shard: match only this part of the pairs of stored ``features``, as one of several jobs, to
            a file of its own (``shards``). Matching without a shard then merges them.
        ray: extract and match on a Ray cluster, see ``extract_images``.

    Raises:
        ValueError, FileNotFoundError, DataError, ImportError: no pairs, or invalid arguments or
            files; the message names the remedy.
    """
    options = options or MatchOptions()
    method = pairs if isinstance(pairs, str) and pairs in PAIR_METHODS else "auto"
    listed = None if pairs is None or pairs == method else _distinct(read_pairs(pairs))
    if listed is not None and neighbors is not None:
        raise ValueError("a list of pairs has no number of neighbors; give one of the two")
    if listed is not None and not listed:
        raise DataError(f"{pairs} lists no pairs; it needs two names per line")
    found = collect(images, root=root, inside=True, pages=counted_pages(pages))
    if images and not found.tasks and listed is None:
        path, reason = found.refused[0] if found.refused else ("", "none given")
        raise DataError(f"no images: {path}: {reason}")
    tasks = found.tasks
    database = output.suffix == ".db"
    _check_shard(shard, ray, features)
    with ExitStack() as stack:
        if features is None:
            if listed is not None:
                names = {name for pair in listed for name in pair}
                chosen = [task for task in tasks if str(task.relative) in names]
                if exclusive:
                    listed = _among(listed, {str(t.relative) for t in chosen}, found.refused)
                if not (chosen and listed):
                    known = f", with names such as {tasks[0].relative}" if tasks else ""
                    raise DataError(
                        f"{pairs} lists no pair of the {len(tasks)} images{printable(known)}; it "
                        f"has names such as {printable(min(names))}"
                    )
                tasks = chosen
            largest = MATCH_MAX_SIZE if database else None
            extraction = extraction or ExtractOptions(num_keypoints=NUM_KEYPOINTS, max_size=largest)
            storing = _Storing(camera, found.tasks, masks, overwrite, workers, ray, progress)
            source = _extract_source(stack, tasks, output, extraction, options, storing)
        else:
            if masks is not None:
                raise ValueError("masks apply to the extraction: extract the features with --masks")
            descriptor = None if extraction is None else extraction.descriptor
            given = tasks if images else None
            stored = output if shard is None else None
            source = _stored_source(stack, given, stored, features, descriptor)
        source.failed = found.refused + source.failed
        choice = (
            PairChoice(listed, "list", f"the pairs of {pairs}")
            if listed is not None
            else _choose_pairs(source, method, neighbors, default_neighbors, progress)
        )
        settings = {**options.to_json(database=database), "features": source.settings}
        if features is not None:  # without images, no rotation is estimated
            settings.pop("orientation", None)
        job = _Matching(source, output, settings, options, overwrite, exclusive, progress)
        if shard is not None:
            report = job.match_shard(shard, choice.pairs, workers)
        else:
            own = _sibling(output, "pairs.txt")
            same = listed is not None and Path(str(pairs)).resolve() == own.resolve()
            written = not database and not same
            if written:
                _write_pairs(own, choice.pairs)
            report = job.match(stack, choice.pairs, ray, workers)
            succeeded = _without_failed(choice.pairs, report)
            if written and len(succeeded) < len(choice.pairs):  # hloc reads the matches of each
                _write_pairs(own, succeeded)
    report.failed = source.failed + report.failed
    report.ignored = found.skipped
    report.selection, report.pairs = choice.reason, choice.pairs
    report.shared = source.shared
    return report


def _without_failed(pairs: list[tuple[str, str]], report: MatchReport) -> list[tuple[str, str]]:
    """The pairs that did not fail, and whose images did not."""
    failed = {name for name, _ in report.failed}
    return [pair for pair in pairs if failed.isdisjoint((*pair, " ".join(pair)))]


def _distinct(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs without those that are repeated, in either order."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for a, b in pairs:
        found.setdefault((min(a, b), max(a, b)), (a, b))
    return list(found.values())


def _among(
    pairs: list[tuple[str, str]], names: set[str], refused: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The pairs of images ``names``; others are added to ``refused``."""
    counts = Counter(name for pair in pairs for name in pair if name not in names)
    refused += [
        (name, f"is not among the images, but in {count} of the listed pairs")
        for name, count in counts.items()
    ]
    return [pair for pair in pairs if names.issuperset(pair)]


@dataclass(frozen=True)
class _Matching:
    """Matching of chosen pairs; fields as the parameters of ``match_images``.

    Attributes:
        source: the features.
        settings: the settings stored with the matches.
    """

    source: _Source
    output: Path
    settings: dict[str, Any]
    options: MatchOptions
    overwrite: bool
    exclusive: bool
    progress: bool

    def match_shard(
        self, shard: Shard, pairs: list[tuple[str, str]], workers: int | None
    ) -> MatchReport:
        """Match a part of the pairs to the file of a shard."""
        path = shard.path(self.output)
        with MatchFile(path, write=True, overwrite=self.overwrite) as store:
            check_match_store(store, self.settings, self.overwrite)
            return match_to_store(
                shard.of(pairs),
                self.source.store,
                store,
                PairWork(self.options),
                workers=workers,
                overwrite=self.overwrite,
                progress=self.progress,
            )

    def match(
        self,
        stack: ExitStack,
        pairs: list[tuple[str, str]],
        ray: str | None,
        workers: int | None,
    ) -> MatchReport:
        """Match the pairs, except those of shards, and verify those of a database.

        Args:
            stack: closes the files.
            ray, workers: see ``match_images``.
        """
        source, options, progress = self.source, self.options, self.progress
        database = self.output.suffix == ".db"
        store: Any = source.store
        if not database:
            store = MatchFile(self.output, write=True, overwrite=self.overwrite)
            stack.enter_context(store)
        check_match_store(store, self.settings, self.overwrite)
        shards = stack.enter_context(
            MatchShards(
                self.output, self.settings, _normalize_match_settings, overwrite=self.overwrite
            )
        )
        refine = database and options.refine
        names = {name for pair in pairs for name in pair} if database else set()
        with _Refinement(self.output, source, names, enabled=refine) as refinement:
            if ray is not None:
                self._match_on_ray(pairs, store, shards, ray, workers)
            report = match_to_store(
                pairs,
                source.store,
                store,
                PairWork(options, source.extractor, source.files),
                workers=workers if ray is None else 1,
                overwrite=self.overwrite,
                shards=shards,
                progress=progress,
            )
            if database:
                matched = [pair for pair in pairs if store.has_matches(*pair)]
                changed = self.exclusive and _forget_others(store, matched)
                if not self.exclusive:
                    _forget_missing(store, source.missing)
                    others = [p for p in _others(store, matched) if source.missing.isdisjoint(p)]
                    # geometries of other cameras were removed
                    others = refinement.affected(others)
                    store.verify(others, max_trials=MAX_TRIALS, progress=progress)
                report.verified = refinement.verify(
                    matched, changed=changed or report.done > 0, progress=progress
                )
            _record_source(store, self.settings)
        if shards.folder.is_dir():
            shards.remove({name for a, b in pairs for name in (pair_name(a, b), pair_name(b, a))})
        return report

    def _match_on_ray(
        self,
        pairs: list[tuple[str, str]],
        store: MatchStore,
        shards: MatchShards,
        ray: str,
        workers: int | None,
    ) -> None:
        """Match the pairs that are neither in the store nor in shards to shards, on a Ray cluster;
        parameters as of ``match``.
        """
        from .cluster import MAX_PAIRS, Lost, connect

        source = self.source
        _remove_outdated({name for pair in pairs for name in pair}, source.store, store)
        now = RecordLog(matches_path(store))
        todo = [
            pair
            for pair in pairs
            if pair[0] != pair[1]
            and (self.overwrite or not store.has_matches(*pair))
            and shards.find(*pair, now) is None
        ]
        if not todo:
            return
        reorient = self.options.auto_orientation and can_reorient(source.extractor)
        extraction = source.extraction if reorient else None
        device = "cpu" if extraction is None else extraction.device
        bar = Progress(len(todo), unit="pair", label="match", enabled=self.progress)
        with connect(ray, device=device, workers=workers) as cluster, bar:
            if extraction is not None:
                extraction = cluster.worker_options(extraction)
            arguments = (
                *(source.store.path, extraction, source.files),
                *(self.options, self.settings),
            )
            size = cluster.shard_size(len(todo), MAX_PAIRS)
            jobs = [(shard.path(self.output), part) for shard, part in blocks(todo, size)]
            for found in cluster.run(_shard_matcher, arguments, jobs):
                if isinstance(found, Lost):
                    logger.warning(
                        "a Ray worker ended (%s); this process does its pairs", found.reason
                    )
                else:
                    bar.update(found.done + found.skipped + len(found.failed))
        shards.scan()


def _shard_matcher(
    features: Path,
    extraction: ExtractOptions | None,
    files: dict[str, Path],
    options: MatchOptions,
    settings: dict[str, Any],
) -> Callable[[tuple[Path, list[tuple[str, str]]]], MatchReport]:
    """The work of a Ray worker: it matches pairs to the file of a shard, and resumes what an ended
    worker has begun.

    Args:
        features: see ``open_features``.
        extraction: of the features, to estimate the rotation of each pair (``PairWork``).
        files: image -> file.
    """
    store = open_features(features)
    work = PairWork(options, None if extraction is None else extraction.build(), files)

    def match_part(job: tuple[Path, list[tuple[str, str]]]) -> MatchReport:
        path, pairs = job
        with MatchFile(path, write=True) as matches:
            check_match_store(matches, settings, overwrite=False)
            return match_to_store(pairs, store, matches, work, progress=False)

    return match_part


def _check_shard(shard: Shard | None, ray: str | None, features: Path | None) -> None:
    if shard is not None and ray is not None:
        raise ValueError("a shard is one of several jobs, and Ray has its own; give one of the two")
    if shard is not None and features is None:
        raise ValueError(
            "shards match stored features: extract the images first and give --features"
        )


def _record_source(store: MatchStore, settings: dict[str, Any]) -> None:
    """Add size and digest of features of another program to the record of their matches."""
    if not settings["features"].get("foreign"):
        return
    with RecordLog(matches_path(store)) as log:
        digests = {name: entry.get("features") for name, entry in log.entries.items()}
    size, modified = file_stamp(Path(settings["features"]["path"])) or (None, None)
    source = {"size": size, "mtime_ns": modified, "digest": json_digest(digests)}
    write_json(match_settings_path(store), with_program({**settings, "source": source}))


def _choose_pairs(
    source: _Source,
    method: str,
    neighbors: int | None,
    default_neighbors: int | None,
    progress: bool,
) -> PairChoice:
    """Choose pairs of the images with features."""
    weights = source.settings.get("digests", {}).get("descriptor")
    candidates = Candidates(source.names, source.store, weights, source.files)
    choice = choose_image_pairs(
        candidates, method, neighbors, default_neighbors=default_neighbors, progress=progress
    )
    if not choice.pairs:
        reason = f"; {source.failed[0][0]}: {source.failed[0][1]}" if source.failed else ""
        count = f"{len(source.names)} image{'s' * (len(source.names) != 1)}"
        raise DataError(f"{count} with features, and at least two are needed{reason}")
    if choice.method != "exhaustive":
        logger.info("%d pairs: %s", len(choice.pairs), choice.reason)
    return choice


def _normalize_match_settings(content: dict[str, Any]) -> dict[str, Any]:
    """Settings of matches with those of their features as written today; of features of other
    programs only the path is known.
    """
    features = content.get("features")
    if not isinstance(features, dict):
        return content
    if "detector" in features:
        return {**content, "features": normalize_settings(features)}
    return {**content, "features": {**features, "foreign": True}}


def check_match_store(store: MatchStore, settings: dict[str, Any], overwrite: bool) -> None:
    """Record the settings of a store of matches, or compare them with its record.

    Raises:
        DataError: the store holds matches of other settings, or of another program.
    """
    check_settings(
        match_settings_path(store),
        settings,
        overwrite=overwrite,
        clear=lambda: clear_all_matches(store),
        results=store.path,
        normalize=_normalize_match_settings,
        has_results=store.holds_matches,
        usable=False,
    )
    with RecordLog(matches_path(store)) as log:
        replaced = bool(log.entries) and isinstance(store, MatchFile) and store.foreign
    if replaced and not overwrite:
        raise DataError(
            f"{store.path} was replaced by a file of another program since its last matching; use "
            "--overwrite, or another --output"
        )
    if replaced:
        clear_all_matches(store)


@dataclass(frozen=True)
class _Storing:
    """How features are extracted to a store; fields as the parameters of ``match_images``.

    Attributes:
        given: all images, also those of no pair, so that a list of pairs does not change cameras.
    """

    camera: str
    given: list[Task]
    masks: Path | None
    overwrite: bool
    workers: int | None
    ray: str | None
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
    mask_loader(storing.masks)  # raises before any work
    settings = {**extraction.to_json(), **mask_settings(storing.masks)}
    store: Any
    if output.suffix == ".db":
        refuse_rotation(extraction)
        store = stack.enter_context(
            ColmapDatabase(
                output,
                camera=storing.camera,
                shared=camera_keys(storing.camera, storing.given),
                write=True,
                overwrite=storing.overwrite,
            )
        )
        settings["camera"] = storing.camera
    else:
        path = _sibling(output, "features.h5")
        store = stack.enter_context(FeatureFile(path, write=True, overwrite=storing.overwrite))
    check_store(store, settings, storing.overwrite)
    extractor = extraction.build()
    report = ExtractReport()
    shards = stack.enter_context(
        FeatureShards(store.path, settings, normalize_settings, overwrite=storing.overwrite)
    )
    notices = extract_to_store(
        tasks,
        extractor,
        store,
        report,
        described=True,
        masks=storing.masks,
        workers=storing.workers,
        shards=shards,
        ray=storing.ray,
        progress=storing.progress,
    )
    shards.remove({str(task.relative) for task in tasks})
    notices.log(rotations=not (options.auto_orientation and can_reorient(extractor)))
    shared = assign_cameras(store, storing.given, storing.camera)
    files = {str(task.relative): task.source for task in tasks}
    names = [name for name in files if store.done(name, described=True)]
    if storing.ray is not None and isinstance(store, FeatureFile):
        store.close()  # complete, before other machines read it
        store = stack.enter_context(FeatureFile(store.path))
    source = _Source(
        store, names, files, settings, report.failed, extractor, extraction, extraction
    )
    return replace(source, shared=shared, missing=_missing_files(store.names(), storing.given))


def _missing_files(names: Iterable[str], given: list[Task]) -> set[str]:
    """The names that are not of given images, and of no file in the folders to which the names of
    these are relative.
    """
    known = {str(task.relative) for task in given}
    folders = {
        task.path.parents[len(task.relative.parts) - 1]
        for task in given
        if task.path.parts[-len(task.relative.parts) :] == task.relative.parts
    }
    return {
        name
        for name in set(names) - known
        if folders and not any((folder / name.partition("#")[0]).exists() for folder in folders)
    }


def _stored_source(
    stack: ExitStack,
    tasks: list[Task] | None,
    output: Path | None,
    features: Path,
    descriptor: Any,
) -> _Source:
    """Stored features of ``tasks``; None selects all.

    Args:
        output: of the matches; None for a shard, which is no database.
    """
    same_file = output is not None and features.resolve() == output.resolve()
    if output is not None and output.suffix == ".db" and not same_file:
        raise ValueError(
            f"a database stores matches of its own features: use --features {output}, or omit "
            "--features"
        )
    store: Any = ColmapDatabase(features, write=True) if same_file else open_features(features)
    stack.enter_context(store)
    files, missing = ({}, []) if tasks is None else stored_images(tasks, store)
    names = store.names() if tasks is None else list(files)
    settings = own_settings(store)
    if settings is None:
        # of another program: identified by their path, and by the digests of each image
        settings = {"foreign": True, "path": str(features.resolve())}
    stored = settings.get("descriptor", descriptor)
    if descriptor is not None and stored != descriptor:
        raise DataError(
            f"{features} has {stored} descriptors, not {descriptor}; omit --descriptor or extract "
            "again"
        )
    return _Source(store, names, files, settings, missing, reading=ReadOptions.of_record(settings))


def _forget_others(database: ColmapDatabase, pairs: list[tuple[str, str]]) -> bool:
    """Remove the verified matches of other pairs; returns whether there were any."""
    verified = matched_pairs(_others(database, pairs), database.read_inliers)
    database.forget_geometry(verified)
    return bool(verified)


def _forget_missing(database: ColmapDatabase, missing: set[str]) -> None:
    """Remove the verified matches of images whose files do not exist any more, which a mapper would
    add to a model.
    """
    pairs = [p for p in database.pairs() if not missing.isdisjoint(p)] if missing else []
    if verified := matched_pairs(pairs, database.read_inliers):
        database.forget_geometry(verified)
        concerned = sorted(missing & {name for pair in verified for name in pair})
        logger.warning(
            "%s: %d image%s, such as %s, %s not among the files any more; the geometries of their "
            "%d pairs are removed, their keypoints and matches are kept",
            *(database.path, len(concerned), "s" * (len(concerned) > 1)),
            *(printable(concerned[0]), "are" if len(concerned) > 1 else "is", len(verified)),
        )


def _others(database: ColmapDatabase, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The other pairs with matches."""
    chosen = {frozenset(pair) for pair in pairs}
    return [pair for pair in database.pairs() if frozenset(pair) not in chosen]


class _Refinement:
    """Verification of the matches of a database, and refinement of its keypoints. The images are
    marked as pending from the first match to the end of the refinement, so that the next run
    completes an interrupted one, or one for which images were not given.

    Args:
        names: the images that are matched.
    """

    def __init__(self, output: Path, source: _Source, names: set[str], *, enabled: bool):
        self.pending = PendingRefinement(output)
        self.source, self.names, self.enabled = source, names, enabled
        self.before = self.pending.read()
        self.interrupted = self.pending.includes(names)
        #: Images that are not pending at the end.
        self.done: set[str] = set()

    def __enter__(self) -> _Refinement:
        if self.enabled:
            self.pending.add(self.names)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.pending.remove(self.done)

    def affected(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The pairs with an image that was pending at the start."""
        before = self.before
        return [pair for pair in pairs if before is None or not before.isdisjoint(pair)]

    def verify(self, pairs: list[tuple[str, str]], *, changed: bool, progress: bool) -> int:
        """Verify pairs, refine and verify again; returns the number of pairs with a geometry."""
        store, files = self.source.store, self.source.files
        changed = changed or self.interrupted
        missing = sorted({name for pair in pairs for name in pair} - set(files))
        refine = self.enabled and changed and not missing
        if refine or not self.enabled:
            moved = store.restore_detected({name for pair in pairs for name in pair})
            affected = [pair for pair in pairs if not moved.isdisjoint(pair)]
            store.forget_geometry(matched_pairs(affected, store.read_inliers))
            self.done = self.names
        elif not changed:
            self.done = self.names - (self.before or set())
        verified = store.verify(pairs, max_trials=MAX_TRIALS, progress=progress)
        if refine:
            return refine_database(
                store, pairs, files, self.source.reading, max_trials=MAX_TRIALS, progress=progress
            )
        if self.enabled and changed:
            logger.warning(
                "%s: keypoints are not refined, for which all images of the pairs are needed (%s "
                "is not among the given ones); give them and run again, or use --no-refine",
                store.path,
                printable(missing[0]),
            )
        return verified


def refine_database(
    database: ColmapDatabase,
    pairs: list[tuple[str, str]],
    images: dict[str, Path],
    reading: ReadOptions | None = None,
    *,
    max_trials: int = 10_000,
    progress: bool = False,
) -> int:
    """Refine the keypoints of a database to consistent subpixel positions along the tracks of its
    verified matches, and verify again.

    Args:
        database: open for writing; ``pairs`` have been verified.
        images: name -> file.
        reading: how the images were read.
        max_trials: see ``ColmapDatabase.verify``.

    Returns:
        the number of pairs with a geometry.

    Raises:
        DataError: an image cannot be read.
    """
    names = sorted({name for pair in pairs for name in pair})
    keypoints = {name: database.read_detected(name).keypoints for name in names}
    inliers = matched_pairs(pairs, database.read_inliers)

    def pixels(name: str) -> Tensor:
        return read_image(images[name], reading).pixels

    refined = refine_tracks(keypoints, inliers, pixels, progress=progress)
    database.keep_detected(refined)
    for name, xy in refined.items():
        database.move_keypoints(name, xy)
    # without a geometry, a pair would need most of the time, and hardly ever gets one; of images of
    # one camera, only the inliers: COLMAP estimates their focal length, too, in six times the time
    database.forget_geometry(inliers)
    camera = {name: database.read_camera(name).camera_id for name in names}
    among = {(a, b): index for (a, b), index in inliers.items() if camera[a] == camera[b]}
    return database.verify(pairs, max_trials=max_trials, among=among, progress=progress)


def _sibling(output: Path, end: str) -> Path:
    return output.with_name(f"{output.stem}.{end}")


def _write_pairs(path: Path, pairs: list[tuple[str, str]]) -> None:
    """Write a list for ``read_pairs``; names that it cannot contain, or that hloc cannot read, are
    logged.
    """
    unlisted = sorted({n for pair in pairs for n in pair if re.search(r"[\t\n\r]|^\s|\s$", n)})
    if unlisted:
        logger.warning(
            "%s does not list the pairs of %s: a name in a list cannot contain "
            "tabs, line breaks, or spaces at its ends",
            path,
            ", ".join(map(printable, unlisted)),
        )
        pairs = [pair for pair in pairs if not set(pair) & set(unlisted)]
    spaced = sorted({name for pair in pairs for name in pair if re.search(r"\s", name)})
    if spaced:
        more = f" and {len(spaced) - 4} more" if len(spaced) > 4 else ""
        logger.warning(
            "hloc cannot read %s, as %s%s contain spaces: names are separated by tabs, for match "
            "--pairs; for hloc, rename the images and match again",
            path,
            ", ".join(map(printable, spaced[:4])),
            more,
        )
    separator = "\t" if spaced else " "
    # a # at the start of a line would begin a comment
    lines = (f"{' ' * a.startswith('#')}{a}{separator}{b}\n" for a, b in pairs)
    write_text(path, "".join(lines))
