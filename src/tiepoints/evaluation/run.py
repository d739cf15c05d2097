"""Evaluate systems on a dataset: one row of metrics per pair, in memory or on disk.

    rows = run(homography_sequences("oxford").pairs, tiepoints.build("keynet", "hardnet").extract)

On disk (``evaluate``) features are computed once and stored, rows are appended pair by pair, and an
interrupted run resumes where it stopped. A pair that fails gives a row with a reason: neither an
exception nor a zero. docs/evaluation.md lists the metrics of a row.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import queue
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets.ground_truth import (
    Dataset,
    HomographyPair,
    MarkedPair,
    Pair,
    PosePair,
    resize_target,
    resized_intrinsics,
    rotated_intrinsics,
    rotated_pose,
)
from ..decode import image_size
from ..errors import DataError, WeightsError
from ..extract import ExtractOptions
from ..files import Lock, write_json, write_text
from ..formats.records import compatible_version, file_stamp, json_digest, with_program
from ..image import ReadOptions, load_image, read_image
from ..names import EVALUATION_NUM_KEYPOINTS
from ..processes import follow_parent, interrupts_blocked
from ..progress import Progress
from ..structs import Features
from .pair import PROTOCOLS, homography_metrics, marked_metrics, pose_metrics
from .results import features_name, load_features, read_rows, save_features
from .sweeps import FACTORS, ROTATIONS, bias, sweep
from .systems import (
    CONTROLS,
    REKD_SPARE,
    SPARE,
    Options,
    System,
    as_features,
    split_modes,
    system,
    system_kind,
    system_label,
    system_record,
)

logger = logging.getLogger(__name__)

EXTRAS = ("rotation", "scale", "bias")
#: Number of failed pairs that are logged at the end of a run.
MAX_LOGGED_FAILURES = 5
#: Images whose features a run in memory caches; sequences are processed one after the other, so
#: old images are not needed again.
CACHE_SIZE = 64
#: Seconds between checks for finished workers.
POLL_INTERVAL = 0.2


def run(
    pairs: Sequence[HomographyPair] | Sequence[PosePair] | Sequence[MarkedPair],
    detect: Callable[[Any], Any],
    *,
    name: str = "system",
    num_keypoints: int = EVALUATION_NUM_KEYPOINTS,
    protocols: Sequence[str] = PROTOCOLS,
    resize: tuple[int, ...] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate any callable image path -> ``Features``, ``Keypoints`` or array (N,2..4), strongest
    first, on ``pairs``; returns one row per pair.

    Each image is detected once. A pair that fails gives a row with ``ok`` false and a reason.

    Args:
        name: name of the system in the rows.
        num_keypoints: number of keypoints compared.
        protocols: some of ``PROTOCOLS``.
        resize: for posed pairs, see ``datasets.resize_target``; ``detect`` then gets a tensor.
    """
    _check_names("protocol", protocols, PROTOCOLS)
    cache: dict[str, tuple[Features, float]] = {}

    def get(view: View) -> tuple[Features, float]:
        if view.name not in cache:
            if len(cache) > CACHE_SIZE:
                cache.clear()
            cache[view.name] = view.detect(detect)
        return cache[view.name]

    return [_row(pair, name, get, num_keypoints, protocols, resize) for pair in pairs]


def _check_names(kind: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"unknown {kind} {', '.join(unknown)}; must be {', '.join(allowed)}")


@dataclass(frozen=True)
class View:
    """An image as used by a pair: resized and rotated as the pair list specifies.

    Attributes:
        name: key of its features within a system; unique for each path, size and rotation.
        path, resize: see ``datasets``.
        rot90: number of counterclockwise rotations by 90 degrees, see ``datasets``.
    """

    name: str
    path: Path
    resize: tuple[int, ...] | None = None
    rot90: int = 0

    @classmethod
    def of(cls, pair: Pair, side: str, resize: tuple[int, ...] | None) -> View:
        """The view of image ``a`` or ``b`` of a pair."""
        path = getattr(pair, f"image_{side}")
        if not isinstance(pair, PosePair):
            return cls(features_name(pair.sequence, path), path)
        rot90 = getattr(pair, f"rot90_{side}")
        # a pair list is one sequence of many scenes with repeated file names, and the depth of
        # the scene's folder in the path varies
        name = f"{'-'.join(path.with_suffix('').parts[-3:])}-{zlib.crc32(str(path).encode()):08x}"
        return cls(
            f"{pair.sequence}/{name}" + (f"-turned{rot90}" if rot90 else ""), path, resize, rot90
        )

    def detect(
        self, detect: Callable[[Any], Any], value_range: str = "type"
    ) -> tuple[Features, float]:
        """Features and the seconds they took; includes reading the file where the stored image is
        used unchanged. ``value_range``: see ``image.ReadOptions``.
        """
        source = _source(self.path, value_range)
        image = load_image(source)
        if self.resize is not None or self.rot90:
            size = (image.shape[-1], image.shape[-2])
            target = resize_target(*size, self.resize)
            if target != size:
                image = F.interpolate(
                    image, size=target[::-1], mode="bilinear", antialias=True
                ).clamp(0, 1)
            source = image = torch.rot90(image, self.rot90, dims=(-2, -1))
        started = time.perf_counter()
        features = as_features(detect(source), (image.shape[-1], image.shape[-2]))
        return features, time.perf_counter() - started

    def intrinsics(self, K: Tensor) -> Tensor:
        """Intrinsics (3,3) of the view, from those of the stored image."""
        size = image_size(self.path)
        target = resize_target(*size, self.resize)
        return rotated_intrinsics(resized_intrinsics(K, size, target), target, self.rot90)


def _source(path: Path, value_range: str) -> Any:
    """What a system gets of an image file: the path, or the image read with another value range."""
    if value_range == "type":
        return path
    return read_image(path, ReadOptions(value_range=value_range)).pixels


def _row(
    pair: Pair,
    name: str,
    get: Callable[[View], tuple[Features, float]],
    num_keypoints: int,
    protocols: Sequence[str],
    resize: tuple[int, ...] | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "system": name,
        "sequence": pair.sequence,
        "kind": pair.kind,
        "pair": pair.name,
        "image_a": str(pair.image_a),
        "image_b": str(pair.image_b),
        "H_ab": pair.H_ab.tolist() if isinstance(pair, HomographyPair) else None,
        "ok": True,
        "reason": "",
        "seconds": None,
        "metrics": {},
    }
    try:
        view_a, view_b = (View.of(pair, side, resize) for side in "ab")
        (a, seconds_a), (b, seconds_b) = get(view_a), get(view_b)
        if isinstance(pair, HomographyPair):
            row["metrics"] = homography_metrics(
                a, b, pair.H_ab, num_keypoints=num_keypoints, protocols=protocols
            )
        elif a.descriptors is None or b.descriptors is None:
            raise DataError(
                "the system has no descriptors, and pairs without a homography need matches; "
                "use DETECTOR+hardnet"
            )
        elif isinstance(pair, MarkedPair):
            row["metrics"] = marked_metrics(a, b, pair.xy_a, pair.xy_b, num_keypoints=num_keypoints)
        else:
            K_a, K_b = view_a.intrinsics(pair.K_a), view_b.intrinsics(pair.K_b)
            T_ab = rotated_pose(pair.T_ab, pair.rot90_a, pair.rot90_b)
            row["metrics"] = pose_metrics(a, b, K_a, K_b, T_ab, num_keypoints=num_keypoints)
        row["seconds"] = (seconds_a + seconds_b) / 2
    except (DataError, WeightsError, ValueError, RuntimeError, OSError) as error:
        row |= {"ok": False, "reason": f"{type(error).__name__}: {error}", "metrics": {}}
    return row


# ---- on disk


@dataclass(frozen=True)
class RunSettings:
    """Settings of an evaluation; stored in the ``run.json`` of its folder.

    Attributes:
        systems: names, see ``systems.system``; ``LABEL=NAME`` sets the name in rows and tables.
        num_keypoints: number of keypoints compared.
        single_scale: without a scale pyramid (the papers' TI mode) instead of with one (SI).
        protocols: some of ``PROTOCOLS``.
        extras: some of ``EXTRAS``, measured on the first image of every sequence.
        resize: for posed pairs, see ``datasets.resize_target``.
        device: device of the networks.
        value_range: see ``image.ReadOptions``; with another than ``type``, systems get tensors.
        extraction: see ``systems.Options``.
    """

    systems: tuple[str, ...]
    num_keypoints: int = EVALUATION_NUM_KEYPOINTS
    single_scale: bool = False
    protocols: tuple[str, ...] = PROTOCOLS
    extras: tuple[str, ...] = ()
    resize: tuple[int, ...] | None = None
    device: str = "cpu"
    value_range: str = "type"
    extraction: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ReadOptions(value_range=self.value_range)  # raises if it is invalid
        if self.num_keypoints < 1:
            raise ValueError(f"num_keypoints must be at least 1, got {self.num_keypoints}")
        _check_names("protocol", self.protocols, PROTOCOLS)
        _check_names("extra", self.extras, EXTRAS)
        # raises for values out of range, also if no network is among the systems
        ExtractOptions.of(single_scale=self.single_scale, **self.extraction)
        if self.value_range != "type":
            stored = [name for name in self.systems if _is_stored(name)]
            if stored:
                raise ValueError(
                    f"the value range is that of their extraction for stored features: omit "
                    f"value_range, or {stored[0]}"
                )
        files = [file_name(label(name)) for name in self.systems]
        duplicates = sorted({name for name in files if files.count(name) > 1})
        if duplicates:
            raise ValueError(f"two systems called {', '.join(duplicates)}; name one LABEL=NAME")

    def to_json(self) -> dict[str, Any]:
        """The settings as stored in ``run.json``."""
        return {
            "num_points": self.num_keypoints,
            "mode": "ti" if self.single_scale else "si",
            "protocols": list(self.protocols),
            "extras": list(self.extras),
            "resize": None if self.resize is None else list(self.resize),
            "device": self.device,
            "value_range": self.value_range,
            "extraction": dict(self.extraction),
        }

    @property
    def options(self) -> Options:
        # REKD's protocol compares the strongest keypoints: 1000 of 1500 extracted
        surplus = REKD_SPARE if set(self.protocols) == {"rekd"} else SPARE
        return Options(
            int(self.num_keypoints * surplus), self.single_scale, self.device, self.extraction
        )


def label(name: str) -> str:
    """The name of system ``LABEL=NAME`` or ``NAME`` in rows; see ``systems.system_label``."""
    explicit, equals, _ = name.partition("=")
    return explicit if equals else system_label(name)


def _is_stored(name: str) -> bool:
    try:
        return system_kind(split_modes(_spec(name).partition("+")[0])[0]) == "stored"
    except (ValueError, FileNotFoundError):
        return False  # ``system`` says why


def _make(name: str, settings: RunSettings) -> System:
    return system(_spec(name), settings.options)


def _spec(name: str) -> str:
    return name.partition("=")[2] or name


def file_name(name: str) -> str:
    """The file name of a system: path separators and other special characters become dashes."""
    return "".join(c if c.isalnum() or c in "._+@-" else "-" for c in name).strip("-.") or "system"


def evaluate(
    dataset: Dataset,
    settings: RunSettings,
    folder: str | Path,
    *,
    workers: int = 1,
    progress: bool = False,
    versions: dict[str, str] | None = None,
) -> Path:
    """Measure all systems on a dataset and write rows, features and settings below ``folder``.

    Existing results are not computed again. One worker process handles one sequence of one system
    at a time. An image or pair that fails gives a row with its reason and is retried by the next
    run. A system whose library, weights or features are missing is skipped; ``run.json`` has the
    reason under ``unavailable``.

    Raises:
        DataError: the folder holds results of other settings, or another run is writing them.
        OSError: the disk is full.
        ValueError: unknown system (before anything is computed).
        FileNotFoundError, ImportError, WeightsError, DataError: no system can be run.
    """
    folder = Path(folder)
    settings = _without_controls(dataset, settings)
    unavailable = _unavailable(settings)
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder):
        _check_folder(folder, dataset, settings, versions or {}, unavailable)
        run = tuple(name for name in settings.systems if label(name) not in unavailable)
        _evaluate(dataset, replace(settings, systems=run), folder, workers, progress)
    return folder


def _evaluate(
    dataset: Dataset, settings: RunSettings, folder: Path, workers: int, progress: bool
) -> None:
    for problem in dataset.problems:
        logger.warning("skipped: %s", problem)
    tasks = _tasks(dataset, settings, folder)
    failed: list[str] = []
    total = sum(len(task.pairs) + len(task.extras) for task in tasks)
    with Progress(total, unit="pair", label="evaluate", enabled=progress) as bar:
        for name, part, rows in _run_tasks(tasks, settings, folder, workers):
            _append(_rows_path(folder, part, name), rows)
            failed += [
                f"{r['system']}, {r['sequence']} {r['pair']}: {r['reason']}"
                for r in rows
                if part == "rows" and not r["ok"]
            ]
            bar.update()
    if failed:
        for line in failed[:MAX_LOGGED_FAILURES]:
            logger.warning("failed: %s", line)
        logger.warning("%d pairs failed; all reasons are in %s", len(failed), folder / "rows")


def _unavailable(settings: RunSettings) -> dict[str, str]:
    """Label -> reason of the systems whose library, weights or features are missing, tried before
    any work.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError, ImportError, WeightsError, DataError: none of the systems can be run.
    """
    reasons: dict[str, str] = {}
    for name in settings.systems:
        try:
            _make(name, settings)
        except (FileNotFoundError, ImportError, WeightsError, DataError) as error:
            reasons[label(name)] = str(error)
            if len(reasons) == len(settings.systems):
                raise
    for name, reason in reasons.items():
        logger.warning("not run: %s: %s", name, reason)
    return reasons


def _without_controls(dataset: Dataset, settings: RunSettings) -> RunSettings:
    """The settings without controls (which cannot be matched) for pairs without a homography."""
    if not dataset.pairs or isinstance(dataset.pairs[0], HomographyPair):
        return settings
    controls = [name for name in settings.systems if _is_control(name)]
    if not controls:
        return settings
    logger.warning(
        "skipped: %s: controls have no descriptors, and pairs without a homography need matches",
        ", ".join(controls),
    )
    return replace(settings, systems=tuple(n for n in settings.systems if n not in controls))


def _tasks(dataset: Dataset, settings: RunSettings, folder: Path) -> list[Task]:
    """The tasks that have no valid results in the folder yet; outdated results are removed."""
    tasks: list[Task] = []
    for name in settings.systems:
        record = system_record(_spec(name))
        valid = {(p.sequence, p.name): _pair_inputs(p, record, settings) for p in dataset.pairs}
        done = _valid_rows(_rows_path(folder, "rows", name), valid, _pair_key)
        done_pairs = {_pair_key(row) for row in done if row["ok"]}
        images: dict[str, Path] = {}
        for pair in dataset.pairs:
            images.setdefault(pair.sequence, pair.image_a)
        extras_done = _valid_extras(folder, name, record, list(images.values()), settings)
        for sequence, image in images.items():
            pairs = [
                p
                for p in dataset.pairs
                if p.sequence == sequence and (sequence, p.name) not in done_pairs
            ]
            extras = [e for e in settings.extras if (e, str(image)) not in extras_done]
            if pairs or extras:
                tasks.append(Task(name, pairs, extras, image, record))
    return tasks


def _pair_key(row: dict[str, Any]) -> tuple[str, str]:
    return row["sequence"], row["pair"]


def _inputs(record: dict[str, Any], *others: Any) -> str:
    """Digest of what a result is made from: system, version of this package, files. Options of a
    folder do not change (``_check_same``).
    """
    return json_digest([record, compatible_version(), *others])


def _pair_inputs(pair: Pair, record: dict[str, Any], settings: RunSettings) -> str:
    """Digest of what the row of a pair is made from."""
    truth = [  # also K, T, marked points, rotations
        value.tolist() if isinstance(value, Tensor) else value
        for value in vars(pair).values()
        if isinstance(value, Tensor | int)
    ]
    stamps = [file_stamp(path) for path in (pair.image_a, pair.image_b)]
    return _inputs(record, sorted(settings.protocols), truth, stamps)


def _valid_extras(
    folder: Path, name: str, record: dict[str, Any], images: list[Path], settings: RunSettings
) -> set[tuple[str, str]]:
    """(extra, image) of the sweeps and biases that need not be measured again."""
    valid = {str(image): _inputs(record, file_stamp(image)) for image in images}
    found = set()
    for part in {_part(extra) for extra in settings.extras}:
        rows = _valid_rows(_rows_path(folder, part, name), valid, lambda row: row.get("image"))
        found |= {("bias" if part == "bias" else r["kind"], r["image"]) for r in rows if r["ok"]}
    return found


def _valid_rows(
    path: Path, inputs: Mapping[Any, str], key: Callable[[dict[str, Any]], Any]
) -> list[dict[str, Any]]:
    """Rows of a file that were made from the present inputs.

    Rows made from others are removed from the file, so that an interrupted run does not leave a
    mixture. Rows whose ``key`` has no present ``inputs`` belong to other pairs and are kept.
    """
    kept, valid, outdated = [], [], 0
    for row in read_rows(path):
        expected = inputs.get(key(row))
        if expected is not None and row.get("inputs") != expected:
            outdated += 1
            continue
        kept.append(row)
        if expected is not None:
            valid.append(row)
    if outdated:
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        logger.info(
            "%d results in %s were made from other weights, images, ground truth or versions; "
            "measured again",
            outdated,
            path,
        )
    return valid


def _is_control(name: str) -> bool:
    return _spec(name).split("+")[0] in CONTROLS


def _rows_path(folder: Path, part: str, name: str) -> Path:
    return folder / part / f"{file_name(label(name))}.jsonl"


def _check_folder(
    folder: Path,
    dataset: Dataset,
    settings: RunSettings,
    versions: dict[str, str],
    unavailable: dict[str, str],
) -> None:
    """Write or update ``run.json``; raises if its settings differ, except for systems, extras and
    versions.
    """
    content: dict[str, Any] = {
        "dataset": {
            "name": dataset.name,
            "layout": dataset.layout,
            "root": str(dataset.root),
            "sequences": dataset.sequences,
        },
        **settings.to_json(),
        "systems": [label(name) for name in settings.systems],
        "controls": [label(name) for name in settings.systems if _is_control(name)],
        "made_by": {label(name): _spec(name) for name in settings.systems},
        "records": {
            label(name): system_record(_spec(name))
            for name in settings.systems
            if label(name) not in unavailable
        },
        "unavailable": unavailable,
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }
    path = folder / "run.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}); use another --output") from error
        _check_same(folder, before, content)
        _add_earlier(before, content)
    elif any((folder / "rows").glob("*.jsonl")):
        raise DataError(f"{folder} holds rows but no run.json; use another --output")
    write_json(path, with_program(content))


def _check_same(folder: Path, before: dict[str, Any], content: dict[str, Any]) -> None:
    """Raise a ``DataError`` if an earlier run had other settings, images or labels."""
    before.setdefault("value_range", "type")  # earlier versions had no other
    before.setdefault("extraction", {})
    for key in ("num_points", "mode", "protocols", "resize", "value_range", "extraction"):
        if before.get(key) != content[key]:
            raise DataError(
                f"{folder} holds results with {key} = {before.get(key)}, requested is "
                f"{content[key]}; use another --output"
            )
    if before.get("dataset", {}).get("root") != content["dataset"]["root"]:
        raise DataError(
            f"{folder} holds results of {before.get('dataset', {}).get('root')}; use another "
            "--output"
        )
    stored = {file_name(name): (name, spec) for name, spec in before.get("made_by", {}).items()}
    for name, spec in content["made_by"].items():
        other = stored.get(file_name(name), (name, spec))
        if other != (name, spec):
            raise DataError(
                f"{folder} holds results of {other[1]} called {other[0]}; give {spec} another "
                f"name: LABEL={spec}"
            )


def _add_earlier(before: dict[str, Any], content: dict[str, Any]) -> None:
    """Add the systems, extras and sequences of an earlier run to ``content``."""
    made_by = before.get("made_by", {})
    requested = set(content["made_by"].values())
    # a system that could not be run, and that now runs, perhaps under the name of its content
    resolved = {
        name
        for name in before.get("unavailable", {})
        if name in content["made_by"] or made_by.get(name) in requested
    }
    for key in ("made_by", "records", "unavailable"):
        kept = {k: v for k, v in before.get(key, {}).items() if k not in resolved}
        content[key] = {**kept, **content[key]}
    for key in ("systems", "extras", "controls"):
        kept_names = [name for name in before.get(key, []) if name not in resolved]
        content[key] = list(dict.fromkeys([*kept_names, *content[key]]))
    sequences = [*before["dataset"].get("sequences", []), *content["dataset"]["sequences"]]
    content["dataset"]["sequences"] = list(dict.fromkeys(sequences))


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a file in a single write, so that a sweep is stored completely or not at
    all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        end = file.tell()
        if end:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # an interrupted run left an incomplete line
                text = b"\n" + text
        try:
            rest = memoryview(text)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            file.truncate(end)
            raise OSError(
                f"{path} could not be written ({error}); run again: it resumes"
            ) from error


def _part(extra: str) -> str:
    return "bias" if extra == "bias" else "sweeps"


@dataclass(frozen=True)
class Task:
    """Work of one worker: pairs of one sequence for one system, and sweeps or bias of its first
    image; ``record`` is that of the system (``systems.system_record``).
    """

    system: str
    pairs: Sequence[Pair]
    extras: list[str]
    image: Path
    record: dict[str, Any]


#: (system, folder of the file, rows that are written together)
Result: TypeAlias = tuple[str, str, list[dict[str, Any]]]


def _run_tasks(
    tasks: list[Task], settings: RunSettings, folder: Path, workers: int
) -> Iterator[Result]:
    """Results of the tasks in the order of completion."""
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield from _compute_rows(task, settings, folder)
        return
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    with interrupts_blocked():  # inherited by the processes
        manager.start(follow_parent)
    with (
        manager,
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool,
    ):
        results, stop = manager.Queue(), manager.Event()
        with interrupts_blocked():
            running = {pool.submit(_send, task, settings, folder, results, stop) for task in tasks}
        try:
            while running:
                ended = {future for future in running if future.done()}
                with suppress(queue.Empty):
                    while True:  # finished workers have already queued all their results
                        yield results.get(timeout=POLL_INTERVAL)
                for future in ended:
                    future.result()
                running -= ended
        except BaseException:
            # nothing would write the rows of further pairs
            with suppress(OSError, EOFError):
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _send(task: Task, settings: RunSettings, folder: Path, results: Any, stop: Any) -> None:
    for item in _compute_rows(task, settings, folder):
        if stop.is_set():
            return
        results.put(item)


def _start_worker() -> None:
    torch.set_num_threads(1)
    follow_parent()


def _compute_rows(task: Task, settings: RunSettings, folder: Path) -> Iterator[Result]:
    """Rows of one task; features are read from disk, or computed and stored."""
    name, detect = label(task.system), _make(task.system, settings)
    store = folder / "features" / file_name(name)

    def get(view: View) -> tuple[Features, float]:
        path = store / f"{view.name}.npz"
        inputs = _inputs(task.record, file_stamp(view.path), view.rot90)
        stored = load_features(path, inputs=inputs)
        if stored is None:
            save_features(path, *view.detect(detect, settings.value_range), inputs)
            # read back, so that the metrics equal those of a run that finds the file
            stored = load_features(path)
        if stored is None:
            raise DataError(f"{path} was written and cannot be read back")
        return stored

    for pair in task.pairs:
        # before the images are read, so that a replacement during the measurement is noticed
        inputs = _pair_inputs(pair, task.record, settings)
        row = _row(pair, name, get, settings.num_keypoints, settings.protocols, settings.resize)
        yield task.system, "rows", [{**row, "inputs": inputs}]
    for extra in task.extras:
        inputs = _inputs(task.record, file_stamp(task.image))
        try:
            image = _source(task.image, settings.value_range)
            if extra == "bias":
                rows = bias(detect, image, num_keypoints=settings.num_keypoints)
            else:
                rows = sweep(
                    detect,
                    image,
                    extra,
                    ROTATIONS if extra == "rotation" else FACTORS,
                    num_keypoints=settings.num_keypoints,
                )
        except (DataError, WeightsError, ValueError, RuntimeError, OSError) as error:
            rows = [
                {
                    "kind": extra,
                    "ok": False,
                    "reason": f"{type(error).__name__}: {error}",
                    "metrics": {},
                }
            ]
        yield (
            task.system,
            _part(extra),
            [{"system": name, "image": str(task.image), **row, "inputs": inputs} for row in rows],
        )
