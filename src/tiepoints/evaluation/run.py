"""Dataset x system -> one row a pair, in memory or on disk.

    rows = run(homography_sequences("oxford").pairs, tiepoints.build("keynet", "hardnet").extract)

On disk (``evaluate``) features are computed once and kept, rows are appended pair by pair, and an
interrupted run goes on where it stopped. What can fail for one pair is a row with a reason: it is
neither an exception nor a zero. docs/evaluation.md lists the numbers of a row.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import queue
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
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
from ..errors import DataError, WeightsError
from ..files import write_json
from ..image import load_image
from ..names import EVALUATION_NUM_KEYPOINTS
from ..progress import Progress
from ..structs import Features
from .pair import PROTOCOLS, homography_metrics, marked_metrics, pose_metrics
from .results import features_name, load_features, read_rows, save_features
from .sweeps import FACTORS, ROTATIONS, bias, sweep
from .systems import CONTROLS, REKD_SPARE, SPARE, Options, System, as_features, system

logger = logging.getLogger(__name__)

EXTRAS = ("rotation", "scale", "bias")
#: Failed pairs that a run names at its end.
SHOWN = 5
#: Features that a run in memory keeps; sequences come one after the other, old images are not
#: needed again.
KEPT = 64
#: Seconds between looks for ended workers.
POLL = 0.2


def run(
    pairs: Sequence[HomographyPair] | Sequence[PosePair] | Sequence[MarkedPair],
    detect: Callable[[Any], Any],
    *,
    name: str = "system",
    num_keypoints: int = EVALUATION_NUM_KEYPOINTS,
    protocols: Sequence[str] = PROTOCOLS,
    resize: tuple[int, ...] | None = None,
) -> list[dict[str, Any]]:
    """Rows of ``pairs`` for any callable: image path -> ``Features``, ``Keypoints`` or (N,2..4)
    numbers, strongest first.

    Each image is detected once. A pair that fails is a row with ``ok`` false and a reason.

    Args:
        name: what the rows call the system.
        num_keypoints: points compared.
        protocols: some of ``PROTOCOLS``.
        resize: for posed pairs, see ``datasets.resize_target``; ``detect`` then gets a tensor.
    """
    _known("protocol", protocols, PROTOCOLS)
    kept: dict[str, tuple[Features, float]] = {}

    def get(view: View) -> tuple[Features, float]:
        if view.name not in kept:
            if len(kept) > KEPT:
                kept.clear()
            kept[view.name] = view.detect(detect)
        return kept[view.name]

    return [_row(pair, name, get, num_keypoints, protocols, resize) for pair in pairs]


def _known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [word for word in given if word not in known]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; known are {', '.join(known)}")


@dataclass(frozen=True)
class View:
    """An image as a pair uses it: resized and turned where its list says so.

    Attributes:
        name: of its features among those of a system; different for different pixels.
        path, resize, turns: see ``datasets``.
    """

    name: str
    path: Path
    resize: tuple[int, ...] | None = None
    turns: int = 0

    @classmethod
    def of(cls, pair: Pair, side: str, resize: tuple[int, ...] | None) -> View:
        """Of image ``a`` or ``b`` of a pair."""
        path = getattr(pair, f"image_{side}")
        if not isinstance(pair, PosePair):
            return cls(features_name(pair.sequence, path), path)
        turns = getattr(pair, f"turns_{side}")
        # a list is one sequence of many scenes, where file names come again; how deep the scene
        # stands in the path differs
        name = f"{'-'.join(path.with_suffix('').parts[-3:])}-{zlib.crc32(str(path).encode()):08x}"
        return cls(
            f"{pair.sequence}/{name}" + (f"-turned{turns}" if turns else ""), path, resize, turns
        )

    def detect(self, detect: Callable[[Any], Any]) -> tuple[Features, float]:
        """Features and the seconds they took, reading the file included where it is used as
        stored.
        """
        source: Any = self.path
        image = load_image(self.path)
        if self.resize is not None or self.turns:
            size = (image.shape[-1], image.shape[-2])
            target = resize_target(*size, self.resize)
            if target != size:
                image = F.interpolate(
                    image, size=target[::-1], mode="bilinear", antialias=True
                ).clamp(0, 1)
            source = image = torch.rot90(image, self.turns, dims=(-2, -1))
        started = time.perf_counter()
        found = as_features(detect(source), (image.shape[-1], image.shape[-2]))
        return found, time.perf_counter() - started

    def intrinsics(self, K: Tensor) -> Tensor:
        """(3,3) intrinsics of the image as used, from those of the image as stored."""
        with Image.open(self.path) as stored:
            size = stored.size
        target = resize_target(*size, self.resize)
        return rotated_intrinsics(resized_intrinsics(K, size, target), target, self.turns)


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
                "the system gives no descriptors, and pairs without a homography need matches; "
                "name it DETECTOR+hardnet"
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
    """What a folder of results was made with; stored in its ``run.json``.

    Attributes:
        systems: names, see ``systems.system``; ``LABEL=NAME`` gives one another name in rows and
            tables.
        num_keypoints: points compared.
        single_scale: no pyramid (the papers' TI mode) instead of one (SI).
        protocols: some of ``PROTOCOLS``.
        extras: some of ``EXTRAS``, measured on the first image of every sequence.
        resize: of posed pairs.
        device: for networks.
    """

    systems: tuple[str, ...]
    num_keypoints: int = EVALUATION_NUM_KEYPOINTS
    single_scale: bool = False
    protocols: tuple[str, ...] = PROTOCOLS
    extras: tuple[str, ...] = ()
    resize: tuple[int, ...] | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.num_keypoints < 1:
            raise ValueError(f"num_keypoints must be at least 1, got {self.num_keypoints}")
        _known("protocol", self.protocols, PROTOCOLS)
        _known("extra", self.extras, EXTRAS)
        files = [file_name(label(name)) for name in self.systems]
        twice = sorted({name for name in files if files.count(name) > 1})
        if twice:
            raise ValueError(f"two systems called {', '.join(twice)}; name one LABEL=NAME")

    def to_json(self) -> dict[str, Any]:
        """The settings as ``run.json`` has them."""
        return {
            "num_points": self.num_keypoints,
            "mode": "ti" if self.single_scale else "si",
            "protocols": list(self.protocols),
            "extras": list(self.extras),
            "resize": None if self.resize is None else list(self.resize),
            "device": self.device,
        }

    @property
    def options(self) -> Options:
        # REKD's protocol takes the first points as they are: 1000 of 1500 extracted
        spare = REKD_SPARE if set(self.protocols) == {"rekd"} else SPARE
        return Options(int(self.num_keypoints * spare), self.single_scale, self.device)


def label(name: str) -> str:
    """What rows call the system ``LABEL=NAME`` or ``NAME``, of a file or folder the last part of
    its path.
    """
    given, equals, _ = name.partition("=")
    return given if equals else name.rstrip("/").rsplit("/", 1)[-1]


def _make(name: str, settings: RunSettings) -> System:
    return system(_spec(name), settings.options)


def _spec(name: str) -> str:
    return name.partition("=")[2] or name


def file_name(name: str) -> str:
    """A system's name as the name of its files: path separators and the like become dashes."""
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
    """Measure all systems on a dataset and write rows, features and settings below ``folder``; what
    is there is not done again.

    One worker process takes one sequence of one system at a time. An image or pair that fails
    becomes a row with its reason and is tried again by the next run.

    Raises:
        DataError: the folder holds results of other settings.
        ValueError: unknown system (before anything is computed).
    """
    folder = Path(folder)
    if dataset.pairs and not isinstance(dataset.pairs[0], HomographyPair):
        controls = [name for name in settings.systems if _is_control(name)]
        if controls:
            logger.warning(
                "skipped: %s: controls have no descriptors, and pairs without a homography need "
                "matches",
                ", ".join(controls),
            )
            settings = replace(
                settings, systems=tuple(name for name in settings.systems if name not in controls)
            )
    for name in settings.systems:
        _make(name, settings)  # a wrong name or missing library is said now, not in an hour
    _check_folder(folder, dataset, settings, versions or {})
    for problem in dataset.problems:
        logger.warning("skipped: %s", problem)
    tasks: list[Task] = []
    for name in settings.systems:
        done = {
            (row["sequence"], row["pair"])
            for row in read_rows(_place(folder, "rows", name))
            if row["ok"]
        }
        for sequence in dataset.sequences:
            pairs = [
                p
                for p in dataset.pairs
                if p.sequence == sequence and (sequence, p.name) not in done
            ]
            image = next(p.image_a for p in dataset.pairs if p.sequence == sequence)
            extras = [
                extra for extra in settings.extras if not _has_extra(folder, name, extra, image)
            ]
            if pairs or extras:
                tasks.append(Task(name, pairs, extras, image))
    failed: list[str] = []
    total = sum(len(task.pairs) + len(task.extras) for task in tasks)
    with Progress(total, unit="pair", label="evaluate", enabled=progress) as bar:
        for name, part, rows in _work(tasks, settings, folder, workers):
            _append(_place(folder, part, name), rows)
            failed += [
                f"{r['system']}, {r['sequence']} {r['pair']}: {r['reason']}"
                for r in rows
                if part == "rows" and not r["ok"]
            ]
            bar.update()
    if failed:
        for line in failed[:SHOWN]:
            logger.warning("failed: %s", line)
        logger.warning("%d pairs failed; all reasons are in %s", len(failed), folder / "rows")
    return folder


def _is_control(name: str) -> bool:
    return _spec(name).split("+")[0] in CONTROLS


def _place(folder: Path, part: str, name: str) -> Path:
    return folder / part / f"{file_name(label(name))}.jsonl"


def _check_folder(
    folder: Path, dataset: Dataset, settings: RunSettings, versions: dict[str, str]
) -> None:
    """Write or compare ``run.json``: everything but the list of systems, extras and versions must
    agree.
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
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }
    path = folder / "run.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}); use another --out") from error
        for key in ("num_points", "mode", "protocols", "resize"):
            if before.get(key) != content[key]:
                raise DataError(
                    f"{folder} holds results with {key} = {before.get(key)}, asked is "
                    f"{content[key]}; use another --out"
                )
        if before.get("dataset", {}).get("root") != content["dataset"]["root"]:
            raise DataError(
                f"{folder} holds results of {before.get('dataset', {}).get('root')}; use another "
                "--out"
            )
        there = {file_name(name): (name, spec) for name, spec in before.get("made_by", {}).items()}
        for name, spec in content["made_by"].items():
            other = there.get(file_name(name), (name, spec))
            if other != (name, spec):
                raise DataError(
                    f"{folder} holds results of {other[1]} called {other[0]}; give {spec} another "
                    f"name: LABEL={spec}"
                )
        content["made_by"] = {**before.get("made_by", {}), **content["made_by"]}
        for key in ("systems", "extras", "controls"):
            content[key] = list(dict.fromkeys([*before.get(key, []), *content[key]]))
        sequences = [*before["dataset"].get("sequences", []), *content["dataset"]["sequences"]]
        content["dataset"]["sequences"] = list(dict.fromkeys(sequences))
    write_json(path, content)


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add lines to a file, all by one write: a sweep that is there at all is there whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a kill left half a line
                text = b"\n" + text
        file.write(text)


def _has_extra(folder: Path, name: str, extra: str, image: Path) -> bool:
    rows = read_rows(_place(folder, _part(extra), name))
    return any(
        r["image"] == str(image) and r["ok"] and (extra == "bias" or r["kind"] == extra)
        for r in rows
    )


def _part(extra: str) -> str:
    return "bias" if extra == "bias" else "sweeps"


@dataclass(frozen=True)
class Task:
    """What one worker does at a time: pairs of one sequence for one system, and sweeps or bias of
    its first image.
    """

    system: str
    pairs: Sequence[Pair]
    extras: list[str]
    image: Path


#: (system, folder of the file, rows that belong together)
Made: TypeAlias = tuple[str, str, list[dict[str, Any]]]


def _work(tasks: list[Task], settings: RunSettings, folder: Path, workers: int) -> Iterator[Made]:
    """What the tasks make, as soon as it is made."""
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield from _make_rows(task, settings, folder)
        return
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool,
    ):
        made = manager.Queue()
        running = {pool.submit(_send, task, settings, folder, made) for task in tasks}
        try:
            while running:
                ended = {future for future in running if future.done()}
                with suppress(queue.Empty):
                    while True:  # what ended workers have sent is there by now
                        yield made.get(timeout=POLL)
                for future in ended:
                    future.result()
                running -= ended
        except BaseException:
            pool.shutdown(
                wait=False, cancel_futures=True
            )  # nobody would write the rows of tasks that have not begun
            raise


def _send(task: Task, settings: RunSettings, folder: Path, made: Any) -> None:
    for item in _make_rows(task, settings, folder):
        made.put(item)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _make_rows(task: Task, settings: RunSettings, folder: Path) -> Iterator[Made]:
    """Rows of one task, features taken from disk or computed and stored."""
    name, detect = label(task.system), _make(task.system, settings)
    store = folder / "features" / file_name(name)

    def get(view: View) -> tuple[Features, float]:
        place = store / f"{view.name}.npz"
        found = load_features(place)
        if found is None:
            save_features(place, *view.detect(detect))
            found = load_features(place)  # the numbers of a run that finds them on disk
        if found is None:
            raise DataError(f"{place} was written and cannot be read back")
        return found

    for pair in task.pairs:
        yield (
            task.system,
            "rows",
            [_row(pair, name, get, settings.num_keypoints, settings.protocols, settings.resize)],
        )
    for extra in task.extras:
        try:
            if extra == "bias":
                made = bias(detect, task.image, num_keypoints=settings.num_keypoints)
            else:
                made = sweep(
                    detect,
                    task.image,
                    extra,
                    ROTATIONS if extra == "rotation" else FACTORS,
                    num_keypoints=settings.num_keypoints,
                )
        except (DataError, WeightsError, ValueError, RuntimeError, OSError) as error:
            made = [
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
            [{"system": name, "image": str(task.image), **row} for row in made],
        )
