"""Many images and many pairs to files: what to read, where to write, what is done already, what failed and why."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .auto_orientation import PairMatcher, can_reorient
from .errors import DataError
from .estimation import estimate
from .extract import Extractor
from .formats.colmap import ColmapDatabase
from .formats.hdf5 import FeatureFile, MatchFile, pair_name, read_pairs
from .formats.npy import FeatureFolder
from .image import load_image
from .matching import match
from .refine import matched_pairs, refine_tracks
from .structs import Features, Matches

#: Formats of features -> file below the results folder; npy is two files an image.
FORMATS = {"npy": "", "h5": "features.h5", "colmap": "database.db"}
HDF5_SUFFIXES = (".h5", ".hdf5")
#: Images whose features are kept in memory while pairs are matched.
CACHE = 64


class FeatureStore(Protocol):
    """Where features of many images are kept by name: ``FeatureFolder``, ``FeatureFile`` or ``ColmapDatabase``."""

    path: Path

    def __contains__(self, name: str) -> bool: ...
    def names(self) -> list[str]: ...
    def done(self, name: str, *, described: bool) -> bool: ...
    def write(self, name: str, features: Features, image: Path | None = None) -> None: ...
    def read(self, name: str) -> Features: ...
    def clear(self) -> None: ...
    def close(self) -> None: ...


class MatchStore(Protocol):
    """Where matches of many pairs are kept by names: ``MatchFile`` or ``ColmapDatabase``."""

    def has_matches(self, a: str, b: str) -> bool: ...
    def write_matches(self, a: str, b: str, matches: Matches, count: int) -> None: ...


@dataclass(frozen=True)
class Task:
    """One image: where it is, and its path below the results folder."""

    path: Path
    relative: PurePosixPath


@dataclass
class Report:
    """How a run went: images done, skipped because their results were there, and failures with reasons."""

    done: int = 0
    skipped: int = 0
    points: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def _inside(name: str) -> PurePosixPath:
    """``name`` as a path below the results folder.

    Raises:
        DataError: it would leave that folder.
    """
    path = PurePosixPath(name.replace(os.sep, "/"))
    path = path.relative_to(path.anchor) if path.is_absolute() else path
    depth = 0
    for part in path.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            raise DataError("its path leaves the results folder (../); list it below --root-images")
    return PurePosixPath(os.path.normpath(str(path)))


def collect(
    images: Iterable[str], list_file: Path | None = None, root: Path | None = None, *, inside: bool = False
) -> tuple[list[Task], list[tuple[str, str]]]:
    """Images named on the command line (files, folders, patterns) and in a list file, and those refused with a reason.

    Listed images lie below ``root`` and keep their line as their path; files and folders keep the path as typed, from
    the folder's own name on where that is absolute. With ``inside`` their path begins at ``root``, or without it inside the
    folder given, as hloc and COLMAP name images.

    Raises:
        FileNotFoundError: no list file.
    """
    tasks: dict[PurePosixPath, Task] = {}
    refused: list[tuple[str, str]] = []

    def add(path: Path, name: str) -> None:
        try:
            relative = _inside(name)
        except DataError as error:
            refused.append((name, str(error)))
            return
        known = tasks.get(relative)
        if known is not None and known.path.resolve() != path.resolve():
            refused.append((str(path), f"its results would overwrite those of {known.path}; extract them apart"))
            return
        tasks[relative] = Task(path, relative)

    def add_inside(path: Path, folder: Path) -> None:
        start = folder if root is None else root
        try:
            add(path, path.resolve().relative_to(start.resolve()).as_posix())
        except ValueError:
            refused.append((str(path), f"not below --root-images {start}"))

    kinds = set(Image.registered_extensions())
    for given in images:
        found = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        if not found:
            refused.append((given, "no such file, folder or pattern"))
        for name in found:
            path = Path(name)
            if path.is_dir():
                base = path.resolve().parent if path.is_absolute() or ".." in path.parts else Path()
                inner = sorted(p for p in path.rglob("*") if p.suffix.lower() in kinds and p.is_file())
                if not inner:
                    refused.append((name, "no image in this folder"))
                for p in inner:
                    if inside:
                        add_inside(p, path)
                        continue
                    add(p, os.path.relpath(p.resolve() if base != Path() else p, base))
            elif inside:
                add_inside(path, path.parent)
            elif path.is_absolute() or ".." in path.parts:
                add(path, path.name)
            else:
                add(path, name)
    if list_file is not None:
        if not list_file.is_file():
            raise FileNotFoundError(f"no list of images at {list_file}")
        for line in list_file.read_text(encoding="utf-8-sig").splitlines():
            if name := line.strip():
                add((root / name) if root is not None else Path(name), name)
    return list(tasks.values()), refused


def check_settings(place: Path, settings: dict[str, Any], overwrite: bool, clear: Callable[[], None], what: Path | None = None) -> None:
    """Write the settings of results to ``place`` (JSON), or compare with those there.

    Args:
        clear: removes the results that are there; called where ``overwrite`` lets other settings replace them, so that settings
            and results always belong together.
        what: the results, for the message [default: the folder of ``place``].

    Raises:
        DataError: there are results made with other settings.
    """
    if place.is_file():
        try:
            before = json.loads(place.read_text())
        except ValueError as error:
            if not overwrite:
                raise DataError(f"{place} is damaged ({error}); use --overwrite") from error
            before = None
        if before != settings:
            if not overwrite:
                keys = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
                changed = ", ".join(f"{k}: {before.get(k)} there, {settings.get(k)} now" for k in keys)
                raise DataError(
                    f"{what or place.parent} holds results of other settings ({changed}); use --overwrite or another place for these"
                )
            clear()
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(beside, place)


def settings_place(store: Any) -> Path:
    """Where the settings of what a store holds are kept."""
    folder = isinstance(store, FeatureFolder)
    return store.path / "settings.json" if folder else store.path.with_suffix(".settings.json")


def open_store(form: str, folder: Path, *, camera: str = "auto", half: bool = False) -> Any:
    """The store of a format of ``FORMATS`` below ``folder``, for writing.

    Raises:
        ValueError, DataError, ImportError: as ``FeatureFile`` and ``ColmapDatabase``.
    """
    if form == "h5":
        return FeatureFile(folder / FORMATS[form], write=True, half=half)
    if form == "colmap":
        return ColmapDatabase(folder / FORMATS[form], camera=camera, write=True)
    return FeatureFolder(folder)


def open_features(place: Path) -> Any:
    """Features made before, for reading: a folder of npy files, an ``.h5`` file, a COLMAP ``.db``, or a folder that holds one of these.

    Raises:
        FileNotFoundError: nothing there.
        DataError: no features there.
    """
    if place.is_dir():
        inner = [place / name for name in FORMATS.values() if name and (place / name).is_file()]
        inner += [place / f"{name}.journal" for name in FORMATS.values() if (place / f"{name}.journal").is_file()]
        folder = FeatureFolder(place)
        if next(place.rglob("*.kpt.npy"), None) is not None:
            return folder
        if not inner:
            raise DataError(f"{place} holds no features; make some with: tiepoints extract IMAGES")
        place = place / inner[0].name.removesuffix(".journal")
    if place.suffix == ".db":
        return ColmapDatabase(place)
    if not place.is_file() and not place.with_name(place.name + ".journal").is_file():
        raise FileNotFoundError(f"no features at {place}; make some with: tiepoints extract IMAGES --format h5")
    return FeatureFile(place)


def extract_to_files(
    tasks: list[Task],
    extractor: Extractor,
    store: FeatureStore,
    *,
    described: bool,
    overwrite: bool = False,
    workers: int = 2,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Extract each task into ``store``; reading and writing run in ``workers`` threads beside the computing.

    An image that cannot be read or worked on becomes a line of the report; the others go on.
    """
    report = Report()
    todo: deque[Task] = deque()
    for task in tasks:
        if store.done(str(task.relative), described=described) and not overwrite:
            report.skipped += 1
        else:
            todo.append(task)
    loading: deque[tuple[Task, Future[Tensor]]] = deque()
    writing: deque[tuple[Task, Future[None]]] = deque()

    def settle(limit: int) -> None:
        while len(writing) > limit:
            task, future = writing.popleft()
            try:
                future.result()
                report.done += 1
            except (OSError, DataError) as error:
                report.failed.append((str(task.path), f"results could not be written ({error})"))

    ahead = max(1, workers) + 1
    bar = tqdm(total=len(todo), unit="image", disable=not progress, dynamic_ncols=True)
    with ThreadPoolExecutor(max(1, workers)) as readers, ThreadPoolExecutor(max(1, workers)) as writers, bar:
        while todo or loading:
            while todo and len(loading) < ahead:
                task = todo.popleft()
                loading.append((task, readers.submit(load_image, task.path)))
            task, future = loading.popleft()
            try:
                features = extractor.extract(future.result())
                report.points += len(features)
                writing.append((task, writers.submit(store.write, str(task.relative), features, task.path)))
            except (OSError, DataError, ValueError, RuntimeError, MemoryError) as error:
                report.failed.append((str(task.path), str(error).splitlines()[0] if str(error) else type(error).__name__))
                if say is not None:
                    say(f"failed: {task.path}: {report.failed[-1][1]}")
            settle(2 * ahead)
            bar.update(1)
        settle(0)
    return report


# ---- pairs


@dataclass
class MatchReport:
    """How a run over pairs went: pairs done, skipped because they were there, and what failed with reasons.

    Attributes:
        matches: kept matches of the pairs done.
        verified: pairs done that have a geometry; None where none was asked for.
        failed: (image or pair, reason); a pair fails with its image.
    """

    done: int = 0
    skipped: int = 0
    matches: int = 0
    verified: int | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)


def natural(name: str) -> list[Any]:
    """Sorting key that puts img2 before img10."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def choose_pairs(names: Iterable[str], sequential: int | None = None) -> list[tuple[str, str]]:
    """All pairs of ``names``, or of each with the ``sequential`` ones after it; names in natural order."""
    ordered = sorted(names, key=natural)
    if sequential is None:
        return list(combinations(ordered, 2))
    return [(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 : i + 1 + sequential]]


def stored_names(tasks: list[Task], store: FeatureStore) -> tuple[list[str], list[tuple[str, str]]]:
    """The names in ``store`` of images: the longest end of their path that it holds; and images that it lacks."""
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


def match_to_file(
    pairs: Iterable[tuple[str, str]],
    features: FeatureStore,
    store: MatchStore,
    *,
    ratio: float | None = None,
    rotation: float | None = None,
    kind: str | None = None,
    threshold: float = 2.0,
    matcher: Callable[[str, str, Features, Features], Matches] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> MatchReport:
    """Match each pair of names and keep its matches; with a ``kind`` of geometry only those that agree with one.

    A pair is done once, whichever way round it comes. An image without features fails once, with the number of its pairs.

    Args:
        matcher: pairs the features of two named images instead of ``matching.match`` with these options.

    Raises:
        ValueError: ratio or threshold are out of range.
    """
    _check_options(ratio, threshold)
    report = MatchReport(verified=None if kind is None else 0)
    cache: OrderedDict[str, Features] = OrderedDict()
    broken: dict[str, str] = {}
    cost: dict[str, int] = {}
    groups: dict[str, tuple[str, str]] = {}
    names = lru_cache(features.names)

    def get(name: str) -> Features | None:
        """Features of an image; None where it has none to match, which is then counted."""
        if name not in cache and name not in broken:
            try:
                if name not in features:
                    raise DataError(f"{features.path} holds no features of it; it has {len(names())}{_such_as(names())}")
                cache[name] = features.read(name)
                if cache[name].descriptors is None:
                    raise DataError(f"{features.path} has no descriptors of it; extract with a descriptor")
            except (DataError, OSError) as error:
                broken[name] = str(error)
        if name in broken:
            cache.pop(name, None)
            cost[name] = cost.get(name, 0) + 1
            return None
        cache.move_to_end(name)
        while len(cache) > CACHE:
            cache.popitem(last=False)
        return cache[name]

    todo: dict[frozenset[str], tuple[str, str]] = {}
    for a, b in pairs:
        if a == b:
            report.failed.append((f"{a} {b}", "an image is not matched with itself"))
        else:
            todo.setdefault(frozenset((a, b)), (a, b))
    for a, b in tqdm(todo.values(), unit="pair", disable=not progress, dynamic_ncols=True):
        label = f"{a} {b}"
        if isinstance(store, MatchFile):
            # hloc turns / into -, which can give two pairs one name
            other = groups.setdefault(min(pair_name(a, b), pair_name(b, a)), (a, b))
            if other != (a, b):
                report.failed.append((label, f"hloc would file it under the same name as {' '.join(other)}; rename an image"))
                continue
        if not overwrite and store.has_matches(a, b):
            report.skipped += 1
            continue
        one, two = get(a), get(b)
        if one is None or two is None:
            continue
        lengths = [f.descriptors.shape[1] for f in (one, two) if f.descriptors is not None]
        if lengths[0] != lengths[1]:
            reason = f"{features.path} has descriptors of {lengths[0]} and {lengths[1]} numbers of them; extract both with one descriptor"
            report.failed.append((label, reason))
            continue
        try:
            found = match(one, two, ratio=ratio, rotation_tolerance=rotation) if matcher is None else matcher(a, b, one, two)
            if kind is not None:
                result = estimate(one.xy[found.index[:, 0]], two.xy[found.index[:, 1]], kind, threshold=threshold)
                report.verified = (report.verified or 0) + result.ok
                found = found[result.inliers]
            store.write_matches(a, b, found, len(one))
        except (ValueError, DataError, OSError) as error:
            report.failed.append((label, str(error)))
            continue
        report.done += 1
        report.matches += len(found)
    report.failed += [(name, f"{broken[name]} ({count} pairs)") for name, count in cost.items()]
    return report


def pair_matcher(
    extractor: Extractor, images: dict[str, Path], **options: Any
) -> Callable[[str, str, Features, Features], Matches] | None:
    """The ``matcher`` of ``match_to_file`` that finds the relative rotation of each pair; None where it has no use.

    Args:
        extractor: what the features were extracted with.
        images: name -> file; a pair with an image that is not among them is matched as it is.
        options: of ``matching.match``.
    """
    if not can_reorient(extractor):
        return None
    pairs = PairMatcher(extractor, partial(match, **options))

    def matched(a: str, b: str, one: Features, two: Features) -> Matches:
        if b not in images:
            return match(one, two, **options)
        return pairs(one, two, images[b], b).matches

    return matched


def _check_options(ratio: float | None, threshold: float) -> None:
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")


def _such_as(names: list[str]) -> str:
    return f" with names such as {names[0]}" if names else ""


def match_images(
    images: list[str],
    output: Path,
    *,
    build: Callable[[], Extractor],
    extraction: dict[str, Any],
    pair_list: Path | None = None,
    sequential: int | None = None,
    features: Path | None = None,
    descriptor: str | None = None,
    root: Path | None = None,
    camera: str = "auto",
    ratio: float = 1.0,
    rotation: float | None = None,
    kind: str | None = None,
    threshold: float = 2.0,
    refine: bool = True,
    auto_orientation: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> MatchReport:
    """Pairs of many images into one file of matches: hloc's ``.h5``, or a COLMAP ``.db``, whose pairs COLMAP then verifies.

    Args:
        images: files, folders, patterns; with ``features`` they choose among its names, and may be left out.
        build: makes the extractor, where there is something to extract: into ``NAME.features.h5`` beside ``NAME.h5``, or into
            the database itself. Each image once, and not again in the next run.
        extraction: its settings, which are compared with those of the run before.
        pair_list, sequential: see ``read_pairs`` and ``choose_pairs``; by default all pairs. Pairs that were chosen here are written
            to ``NAME.pairs.txt``, which hloc asks for.
        features: made before, see ``open_features``.
        descriptor: what they must be, where that is known; None = whatever they are.
        root: see ``collect``.
        rotation: largest difference of a match's turn from the common one, radians (``matching.keep_common_rotation``); None = any.
        refine: a database of images that are given: move its keypoints to consistent sub-pixel positions (``refine.refine_tracks``).
        auto_orientation: find the relative rotation of each pair (``auto_orientation.PairMatcher``), where images are extracted here by a
            descriptor of upright patches.

    Raises:
        ValueError, FileNotFoundError, DataError, ImportError: nothing to match, or files that do not fit; the message has the remedy.
    """
    _check_options(ratio, threshold)  # before anything is extracted or written
    pairs = None if pair_list is None else list(read_pairs(pair_list))
    if pairs is not None and not pairs:
        raise DataError(f"{pair_list} lists no pairs; it needs two names a line")
    tasks, refused = collect(images, root=root, inside=True)
    if images and not tasks and pairs is None:
        raise DataError(f"no images: {refused[0][0]}: {refused[0][1]}" if refused else "no images given")
    database = output.suffix == ".db"
    failed = list(refused)
    settings: dict[str, Any] = {"ratio": ratio, "model": kind, "threshold": threshold}
    if rotation is not None:
        settings["rotation"] = rotation
    if database:
        settings["refine"] = refine
    if auto_orientation:
        settings["orientation"] = "auto"
    matcher = None
    with ExitStack() as stack:
        if features is None:
            if pairs is not None:
                listed = {name for pair in pairs for name in pair}
                tasks = [task for task in tasks if str(task.relative) in listed]
            source: Any
            if database:
                source = stack.enter_context(ColmapDatabase(output, camera=camera, write=True))
                extraction = {**extraction, "camera": camera}
            else:
                source = stack.enter_context(FeatureFile(_beside(output, "features.h5"), write=True))
            check_settings(settings_place(source), extraction, overwrite, source.clear, source.path)
            extractor = build()
            extracted = extract_to_files(tasks, extractor, source, described=True, progress=progress)
            if auto_orientation:
                files = {str(task.relative): task.path for task in tasks}
                matcher = pair_matcher(extractor, files, ratio=None if ratio >= 1 else ratio, rotation_tolerance=rotation)
            failed += extracted.failed
            names = [str(task.relative) for task in tasks if str(task.relative) in source]
            settings["features"] = extraction
        elif database and features.resolve() == output.resolve():
            source = stack.enter_context(ColmapDatabase(output, write=True))
            names, lacking = stored_names(tasks, source) if images else (source.names(), [])
            failed += lacking
        else:
            if database:
                raise ValueError(f"a database gets matches of its own features: give --features {output}, or leave --features out")
            source = stack.enter_context(open_features(features))
            names, lacking = stored_names(tasks, source) if images else (source.names(), [])
            failed += lacking
            settings["features"] = facts = _facts(features, source)
            if descriptor is not None and facts.get("descriptor", descriptor) != descriptor:
                there = facts["descriptor"]
                raise DataError(f"{features} has {there} descriptors, not {descriptor}; leave --descriptor out or extract again")
        if pairs is None:
            pairs = choose_pairs(names, sequential)
            if not pairs:
                reason = f"; {failed[0][0]}: {failed[0][1]}" if failed else ""
                raise DataError(f"{len(names)} images with features, and two are needed{reason}")
            if not database:
                _write_pairs(_beside(output, "pairs.txt"), pairs)
        store: Any = source if database else stack.enter_context(MatchFile(output, write=True))
        place = _beside(output, "matches.settings.json" if database else "settings.json")
        check_settings(place, settings, overwrite, store.clear_matches if database else store.clear, output)
        # stands from the first match to the end of the refinement, so that a run that was stopped in between is made good by the next
        pending = _beside(output, "refinement-pending")
        stopped = pending.exists()
        if database and refine:
            pending.touch()
        report = match_to_file(
            pairs, source, store, ratio=None if ratio >= 1 else ratio, rotation=rotation, kind=kind, threshold=threshold,
            matcher=matcher, overwrite=overwrite, progress=progress,
        )  # fmt: skip
        if database:
            matched = [pair for pair in pairs if store.has_matches(*pair)]
            report.verified = store.verify(matched)
            files = {str(task.relative): task.path for task in tasks}
            if refine and (report.done or stopped) and all(name in files for pair in matched for name in pair):
                report.verified = refine_database(store, matched, files)
            pending.unlink(missing_ok=True)
    report.failed = failed + report.failed
    return report


def refine_database(database: ColmapDatabase, pairs: list[tuple[str, str]], images: dict[str, Path]) -> int:
    """Give the keypoints of a database consistent sub-pixel positions along the tracks of its verified matches, and verify again.

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
    positions = refine_tracks(keypoints, matched_pairs(pairs, database.read_inliers), lambda name: images[name])
    for name, xy in positions.items():
        database.move_keypoints(name, xy)
    database.forget_geometry(pairs)
    return database.verify(pairs)


def _beside(output: Path, end: str) -> Path:
    return output.with_name(f"{output.stem}.{end}")


def _facts(features: Path, store: Any) -> dict[str, Any]:
    """What tells features from others: their settings where we made them, else where they lie."""
    try:
        return json.loads(settings_place(store).read_text())
    except (OSError, ValueError):
        return {"path": str(features.resolve())}


def _write_pairs(place: Path, pairs: list[tuple[str, str]]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.getpid()}.part")
    between = "\t" if any(" " in name for pair in pairs for name in pair) else " "
    beside.write_text("".join(f"{a}{between}{b}\n" for a, b in pairs))
    os.replace(beside, place)
