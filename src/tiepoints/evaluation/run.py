"""Dataset x system -> one row a pair, in memory or on disk.

    rows = run(homography_sequences("oxford").pairs, tiepoints.build("keynet", "rootsift").extract)

On disk (``evaluate``) features are computed once and kept, rows are appended pair by pair, and an interrupted run goes on where
it stopped. What can fail for one pair is a row with a reason: it is neither an exception nor a zero. docs/evaluation.md lists
the numbers of a row.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, WeightsError
from ..estimation import estimate, relative_pose
from ..geometry import warp_image, warp_points
from ..image import ImageLike, load_image
from ..matching import match
from ..structs import Features, Keypoints
from . import metrics as m
from .bias import REACH
from .datasets import Dataset, HomographyPair, PosePair, resize_target, resized_intrinsics, turned_intrinsics, turned_pose
from .results import load_features, read_rows, save_features
from .systems import CONTROLS, SPARE, Options, System, system

PROTOCOLS = ("keynet", "rekd", "mutual", "homography", "pose")
EXTRAS = ("rotation", "scale", "bias")
#: Where points have no order of strength, each protocol is averaged over so many random picks (Key.Net, table 2, MSER).
RANDOM_PICKS = 10
ROTATIONS = tuple(range(0, 360, 15))
FACTORS = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)
HOMOGRAPHY_THRESHOLD = 3.0
#: Failed pairs that a run names at its end.
SHOWN = 5
#: Pose papers: inlier threshold in pixels of the images compared (PoseLib); OpenCV's is given by SuperGlue as 1 px over the focal length.
POSE_THRESHOLD = 1.0


def as_features(found: Any, size: tuple[int, int]) -> Features:
    """What a system returned, as ``Features`` of an image of ``size`` (width, height).

    ``Features``, ``Keypoints``, or an array or tensor (N,2), (N,3) with scale, (N,4) with scale and score, strongest first.
    """
    if isinstance(found, Features):
        return found
    if isinstance(found, Keypoints):
        return Features(found, None, size)
    table = torch.as_tensor(np.asarray(found) if not isinstance(found, Tensor) else found).float()
    if table.ndim != 2 or not 2 <= table.shape[1] <= 4:
        raise ValueError(f"a system must return Features, Keypoints or (N,2..4) numbers; got shape {tuple(table.shape)}")
    n = len(table)
    scale = table[:, 2] if table.shape[1] > 2 else torch.ones(n)
    score = table[:, 3] if table.shape[1] > 3 else torch.linspace(1, 0.5, n)
    return Features(Keypoints(table[:, :2].contiguous(), scale, torch.zeros(n), score), None, size)


# ---- one pair


def homography_metrics(
    a: Features,
    b: Features,
    H_ab: Tensor,
    *,
    num_points: int = m.NUM_POINTS,
    protocols: Sequence[str] = PROTOCOLS,
    official: bool = False,
) -> dict[str, float | None]:
    """All numbers of a pair with known homography: ``protocol.name`` -> value (docs/evaluation.md); shares are 0..1.

    Points without an order of strength (all scores equal) are picked at random ten times and the results averaged.
    """
    options = {"num_points": num_points, "protocols": protocols, "official": official}
    if not (_unordered(a, num_points) or _unordered(b, num_points)):
        return _homography_metrics(a, b, H_ab, **options)  # type: ignore[arg-type]
    picks = []
    for seed in range(RANDOM_PICKS):
        rng = torch.Generator().manual_seed(seed)
        pick_a, pick_b = (f[torch.randperm(len(f), generator=rng)] for f in (a, b))
        picks.append(_homography_metrics(pick_a, pick_b, H_ab, **options))  # type: ignore[arg-type]
    return {key: _mean([p[key] for p in picks]) for key in picks[0]}


def _unordered(features: Features, num_points: int) -> bool:
    return len(features) > num_points and bool((features.score == features.score[0]).all())


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _homography_metrics(
    a: Features, b: Features, H_ab: Tensor, *, num_points: int, protocols: Sequence[str], official: bool
) -> dict[str, float | None]:
    H_ab = torch.as_tensor(H_ab, dtype=torch.float64)
    size_a, size_b = a.image_size[::-1], b.image_size[::-1]
    found: dict[str, float | None] = {"points_a": len(a), "points_b": len(b)}
    found["s_range"] = _mean([m.scale_range(a.scale), m.scale_range(b.scale)])
    described = a.descriptors is not None and b.descriptors is not None
    if "keynet" in protocols:
        found |= _keynet(a, b, H_ab, size_a, size_b, num_points, official, described)
    if "mutual" in protocols:
        local = m.localisation(a.xy, b.xy, H_ab, size_a, size_b, num_points=num_points)
        found |= {f"mutual.{k}": v for k, v in local.items()}
        chance = m.localisation(a.xy, m.turned(b.xy, size_b), H_ab, size_a, size_b, num_points=num_points)
        found["chance.rep@3"] = m.above_chance(local["rep@3"] or 0.0, chance["rep@3"] or 0.0)
    first_a, first_b = a[:num_points], b[:num_points]
    pairs = torch.zeros(0, 2, dtype=torch.int64)
    if described and ("rekd" in protocols or "homography" in protocols):
        pairs = match(first_a, first_b).index
    if "rekd" in protocols:
        found["rekd.repeatability"] = m.rekd_repeatability(first_a.xy, first_b.xy, H_ab)
        found["rekd.points"] = (len(first_a) + len(first_b)) / 2
        if described:
            found |= {f"rekd.{k}": v for k, v in _accuracy(first_a, first_b, H_ab, pairs).items()}
            if bool(first_a.angle.any()):
                kept = m.orientation_filter(first_a.angle, first_b.angle, pairs)
                found |= {f"rekd*.{k}": v for k, v in _accuracy(first_a, first_b, H_ab, kept).items()}
    if "homography" in protocols and described:
        found |= _homography(first_a.xy[pairs[:, 0]], first_b.xy[pairs[:, 1]], H_ab, size_a)
    return found


def _keynet(a: Features, b: Features, H_ab: Tensor, size_a, size_b, num_points: int, official: bool, described: bool):
    back = torch.linalg.inv(H_ab)

    def compare(xy_b: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, float | None]]:
        chosen_a, chosen_b = m.keynet_points(a.xy, xy_b, H_ab, size_a, size_b, num_points=num_points, official=official)
        there = xy_b[chosen_b]
        in_a, scale = warp_points(there.double(), back), m.projected_scale(there, b.scale[chosen_b], back)
        return chosen_a, chosen_b, in_a, m.keynet_repeatability(a.xy[chosen_a], a.scale[chosen_a], in_a, scale, official=official)

    chosen_a, chosen_b, in_a, rep = compare(b.xy)
    chance = compare(m.turned(b.xy, size_b))[3]
    found = {f"keynet.{k}": v for k, v in rep.items()}
    for name in ("SL", "L"):
        found[f"chance.rep_{name}"] = m.above_chance(rep[f"rep_{name}"] or 0.0, chance[f"rep_{name}"] or 0.0)
    if described:
        pairs = match(a[chosen_a], b[chosen_b]).index
        matching = m.keynet_matching(a.xy[chosen_a], in_a, pairs, int(rep["possible"] or 0))
        found |= {f"keynet.{k}": v for k, v in matching.items()}
    return found


def _accuracy(a: Features, b: Features, H_ab: Tensor, pairs: Tensor) -> dict[str, float | None]:
    return {"matches": len(pairs), **m.matching_accuracy(m.match_errors(a.xy, b.xy, H_ab, pairs))}


def _homography(xy_a: Tensor, xy_b: Tensor, H_ab: Tensor, size_a) -> dict[str, float | None]:
    robust = estimate(xy_a, xy_b, "homography", threshold=HOMOGRAPHY_THRESHOLD)
    found: dict[str, float | None] = {"homography.ok": float(robust.ok)}
    plain = m.homography_dlt(xy_a, xy_b)
    for name, H in (("error", robust.model), ("error_dlt", plain)):
        error = math.inf if H is None else m.corner_error(H, H_ab, size_a)
        found[f"homography.{name}"] = error if math.isfinite(error) else None
    return found


def pose_metrics(a: Features, b: Features, K_a: Tensor, K_b: Tensor, T_ab: Tensor, *, num_points: int) -> dict[str, float | None]:
    """Pose error in degrees by PoseLib and by OpenCV (180 = failed), number of matches."""
    a, b = a[:num_points], b[:num_points]
    pairs = match(a, b).index
    xy_a, xy_b = a.xy[pairs[:, 0]], b.xy[pairs[:, 1]]
    found: dict[str, float | None] = {"points_a": len(a), "points_b": len(b), "pose.matches": len(pairs)}
    for backend in ("poselib", "opencv"):
        pose = relative_pose(xy_a, xy_b, K_a, K_b, backend=backend, threshold=POSE_THRESHOLD)
        found[f"pose.error_{backend}"] = 180.0 if pose.model is None else m.pose_error(pose.model[:, :3], pose.model[:, 3], T_ab)
    return found


# ---- many pairs in memory


def run(
    pairs: Sequence[HomographyPair] | Sequence[PosePair],
    detect: Callable[[Any], Any],
    *,
    name: str = "system",
    num_points: int = m.NUM_POINTS,
    protocols: Sequence[str] = PROTOCOLS,
    resize: tuple[int, ...] | None = None,
    features: Callable[[Path, str], tuple[Features, float]] | None = None,
) -> list[dict[str, Any]]:
    """Rows of ``pairs`` for any callable: image path -> ``Features``, ``Keypoints`` or (N,2..4) numbers, strongest first.

    Each image is detected once. A pair that fails is a row with ``ok`` false and a reason.

    Args:
        num_points: points compared.
        protocols: some of ``PROTOCOLS``.
        resize: for posed pairs, see ``datasets.resize_target``.
        features: gives features of (image, sequence) and seconds, instead of calling ``detect`` (used for those on disk).
    """
    unknown = set(protocols) - set(PROTOCOLS)
    if unknown:
        raise ValueError(f"unknown protocol {', '.join(sorted(unknown))}; known are {', '.join(PROTOCOLS)}")
    cache: dict[Path, tuple[Features, float]] = {}

    def get(path: Path, sequence: str) -> tuple[Features, float]:
        if path not in cache:
            if len(cache) > 64:  # sequences come one after the other; old images are not needed again
                cache.clear()
            cache[path] = features(path, sequence) if features else timed(detect, path)
        return cache[path]

    return [_row(pair, name, get, detect, num_points, protocols, resize) for pair in pairs]


def timed(detect: Callable[[Any], Any], source: ImageLike) -> tuple[Features, float]:
    """Features of one image and the seconds it took, reading the file included."""
    image = load_image(source)
    started = time.perf_counter()
    found = as_features(detect(source), (image.shape[-1], image.shape[-2]))
    return found, time.perf_counter() - started


def _row(pair, name: str, get, detect, num_points: int, protocols: Sequence[str], resize) -> dict[str, Any]:
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
        if isinstance(pair, HomographyPair):
            (a, seconds_a), (b, seconds_b) = get(pair.image_a, pair.sequence), get(pair.image_b, pair.sequence)
            row["metrics"] = homography_metrics(a, b, pair.H_ab, num_points=num_points, protocols=protocols)
        else:
            (a, K_a, seconds_a), (b, K_b, seconds_b) = (_posed(pair, side, detect, resize) for side in "ab")
            if a.descriptors is None or b.descriptors is None:
                raise DataError("the system gives no descriptors, a pose needs matches; name it DETECTOR+rootsift")
            T_ab = turned_pose(pair.T_ab, pair.turns_a, pair.turns_b)
            row["metrics"] = pose_metrics(a, b, K_a, K_b, T_ab, num_points=num_points)
        row["seconds"] = (seconds_a + seconds_b) / 2
    except (DataError, WeightsError, ValueError, RuntimeError, OSError) as error:
        row |= {"ok": False, "reason": f"{type(error).__name__}: {error}", "metrics": {}}
    return row


def _posed(pair: PosePair, side: str, detect, resize) -> tuple[Features, Tensor, float]:
    """Features of an image resized and turned as the list says, its intrinsics, seconds."""
    path, K, turns = (getattr(pair, f"{what}_{side}") for what in ("image", "K", "turns"))
    if resize is None and not turns:
        found, seconds = timed(detect, path)
        return found, K, seconds
    image = load_image(path)
    size = (image.shape[-1], image.shape[-2])
    target = resize_target(*size, resize)
    if target != size:
        image = torch.nn.functional.interpolate(image, size=target[::-1], mode="bilinear", antialias=True).clamp(0, 1)
    found, seconds = timed(detect, torch.rot90(image, turns, dims=(-2, -1)))
    return found, turned_intrinsics(resized_intrinsics(K, size, target), target, turns), seconds


# ---- sweeps and bias on any photograph


def _moved(image: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """The image moved by a linear map (2,2), on a canvas that holds all of it: new image and H (3,3)."""
    h, w = image.shape[-2:]
    corners = torch.tensor([[-0.5, -0.5], [w - 0.5, -0.5], [-0.5, h - 0.5], [w - 0.5, h - 0.5]], dtype=torch.float64)
    mapped = corners @ M.T
    low, high = mapped.amin(dim=0), mapped.amax(dim=0)
    size = (high - low - 1e-6).ceil().clamp(min=1)
    H = torch.eye(3, dtype=torch.float64)
    H[:2, :2] = M
    H[:2, 2] = -low - 0.5 + (size - (high - low)) / 2
    return warp_image(image, H[None], (int(size[1]), int(size[0])), padding="reflection").clamp(0, 1), H


def rotated(image: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Image (1,1,H,W) turned clockwise as seen, nothing cut off, mirrored content outside; and H to it."""
    turn = math.radians(degrees)
    c, s = math.cos(turn), math.sin(turn)
    if degrees % 90 == 0:
        c, s = round(c), round(s)
    return _moved(image, torch.tensor([[c, -s], [s, c]], dtype=torch.float64))


def rescaled(image: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Image (1,1,H,W) resized by about ``factor`` with a low-pass before shrinking, and the exact H to it."""
    h, w = image.shape[-2:]
    size = max(1, round(h * factor)), max(1, round(w * factor))
    sy, sx = size[0] / h, size[1] / w
    resized = torch.nn.functional.interpolate(image, size=size, mode="bilinear", antialias=True).clamp(0, 1)
    return resized, torch.tensor([[sx, 0, (sx - 1) / 2], [0, sy, (sy - 1) / 2], [0, 0, 1]], dtype=torch.float64)


def sweep(detect: System, image: ImageLike, kind: str, values: Sequence[float], *, num_points: int = m.NUM_POINTS) -> list[dict[str, Any]]:
    """Repeatability of one photograph against itself turned (``rotation``, degrees) or resized (``scale``, factors)."""
    make = {"rotation": rotated, "scale": rescaled}[kind]
    original = load_image(image)
    size = (original.shape[-1], original.shape[-2])
    a = as_features(detect(original), size)
    rows = []
    for value in values:
        moved, H = make(original, value)
        b = as_features(detect(moved), (moved.shape[-1], moved.shape[-2]))
        numbers = homography_metrics(a, b, H, num_points=num_points, protocols=("mutual",))
        if a.descriptors is not None and b.descriptors is not None:
            pairs = match(a[:num_points], b[:num_points]).index
            accuracy = m.matching_accuracy(m.match_errors(a.xy, b.xy, H, pairs))
            numbers |= {"mma@3": accuracy["mma@3"], "matches": len(pairs)}
        rows.append({"kind": kind, "value": value, "ok": True, "reason": "", "metrics": {**numbers, "points": len(b)}})
    return rows


def bias(detect: System, image: ImageLike, *, num_points: int = m.NUM_POINTS) -> list[dict[str, Any]]:
    """Median displacement (dx, dy) in px between detections on an image and on its mirrored or turned copy, moved back.

    A detector that answers everything at a constant offset shows twice that offset. None without paired points.
    """
    original = load_image(image)
    h, w = original.shape[-2:]
    a = as_features(detect(original), (w, h)).xy[:num_points].double()
    rows = []
    for kind, dims in (("mirror_x", (-1,)), ("mirror_y", (-2,)), ("rotation_180", (-2, -1))):
        b = as_features(detect(original.flip(dims)), (w, h)).xy[:num_points].double()
        for dim in dims:
            b[:, 0 if dim == -1 else 1] = original.shape[dim] - 1 - b[:, 0 if dim == -1 else 1]
        numbers: dict[str, float | None] = {"dx": None, "dy": None, "points": 0}
        index_a, index_b, _ = m.mutual_nearest(a, b, REACH)
        if len(index_a):
            dx, dy = (a[index_a] - b[index_b]).median(dim=0).values.tolist()
            numbers = {"dx": dx, "dy": dy, "points": len(index_a)}
        rows.append({"kind": kind, "metrics": numbers, "ok": True, "reason": ""})
    return rows


# ---- on disk


@dataclass(frozen=True)
class RunSettings:
    """What a folder of results was made with; stored in its ``run.json``.

    Attributes:
        systems: names, see ``systems.system``; ``LABEL=NAME`` gives one another name in rows and tables.
        num_points: points compared.
        mode: ``ti`` (one scale) or ``si``.
        protocols: some of ``PROTOCOLS``.
        extras: some of ``EXTRAS``, measured on the first image of every sequence.
        resize: of posed pairs.
        device: for networks.
    """

    systems: tuple[str, ...]
    num_points: int = m.NUM_POINTS
    mode: str = "ti"
    protocols: tuple[str, ...] = PROTOCOLS
    extras: tuple[str, ...] = ()
    resize: tuple[int, ...] | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.mode not in ("ti", "si"):
            raise ValueError(f"mode must be ti or si, got {self.mode!r}")
        if self.num_points < 1:
            raise ValueError(f"num_points must be at least 1, got {self.num_points}")
        for given, known in ((self.protocols, PROTOCOLS), (self.extras, EXTRAS)):
            unknown = [p for p in given if p not in known]
            if unknown:
                raise ValueError(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")

    @property
    def options(self) -> Options:
        return Options(self.num_points * SPARE, self.mode == "ti", self.device)


def _label(name: str) -> str:
    """What rows call the system ``name`` or ``LABEL=NAME``."""
    return name.split("=", 1)[0]


def _make(name: str, settings: RunSettings) -> System:
    return system(name.split("=", 1)[-1], settings.options)


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
    say: Callable[[str], None] = print,
    versions: dict[str, str] | None = None,
) -> Path:
    """Measure all systems on a dataset and write rows, features and settings below ``folder``; what is there is not done again.

    One worker process takes one sequence of one system at a time. An image or pair that fails becomes a row with its reason and is
    tried again by the next run.

    Raises:
        DataError: the folder holds results of other settings.
        ValueError: unknown system (before anything is computed).
    """
    folder = Path(folder)
    if dataset.pairs and isinstance(dataset.pairs[0], PosePair):
        controls = [name for name in settings.systems if name in CONTROLS]
        if controls:
            say(f"left out: {', '.join(controls)}: controls have no descriptors, and a pose needs matches")
            settings = replace(settings, systems=tuple(name for name in settings.systems if name not in controls))
    for name in settings.systems:
        _make(name, settings)  # a wrong name or missing library is said now, not in an hour
    _check_folder(folder, dataset, settings, versions or {})
    for problem in dataset.problems:
        say(f"left out: {problem}")
    tasks = []
    for spec in settings.systems:
        name = _label(spec)
        done = _done(folder / "rows" / f"{file_name(name)}.jsonl")
        for sequence in dataset.sequences:
            pairs = [p for p in dataset.pairs if p.sequence == sequence and (sequence, p.name) not in done]
            extras = [x for x in settings.extras if not _has_extra(folder, name, x, _first_image(dataset, sequence))]
            if pairs or extras:
                tasks.append((spec, pairs, extras, _first_image(dataset, sequence)))
    total = sum(len(t[1]) + len(t[2]) for t in tasks)
    bar = _bar(total, progress)
    failed: list[str] = []
    for rows, extra in _work(tasks, settings, folder, workers):
        for row in rows:
            _append(folder / "rows" / f"{file_name(row['system'])}.jsonl", row)
            if not row["ok"]:
                failed.append(f"{row['system']}, {row['sequence']} {row['pair']}: {row['reason']}")
            bar.update(1)
        for kind, row in extra:
            part = "bias" if kind == "bias" else "sweeps"
            _append(folder / part / f"{file_name(row['system'])}.jsonl", row)
        bar.update(len({(kind, row["image"]) for kind, row in extra}))
    bar.close()
    if failed:
        for line in failed[:SHOWN]:
            say(f"failed: {line}")
        say(f"{len(failed)} pairs failed; all reasons are in {folder / 'rows'}")
    return folder


def _bar(total: int, progress: bool):
    from tqdm import tqdm

    return tqdm(total=total, unit="pair", disable=not progress)


def _first_image(dataset: Dataset, sequence: str) -> Path:
    return next(p.image_a for p in dataset.pairs if p.sequence == sequence)


def _check_folder(folder: Path, dataset: Dataset, settings: RunSettings, versions: dict[str, str]) -> None:
    """Write or compare ``run.json``: everything but the list of systems, extras and versions must agree."""
    content: dict[str, Any] = {
        "dataset": {"name": dataset.name, "layout": dataset.layout, "root": str(dataset.root), "sequences": dataset.sequences},
        **json.loads(json.dumps(asdict(settings))),
        "systems": [_label(name) for name in settings.systems],
        "controls": [_label(name) for name in settings.systems if name.split("=", 1)[-1].split("+")[0] in CONTROLS],
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }
    place = folder / "run.json"
    if place.is_file():
        try:
            before = json.loads(place.read_text())
        except ValueError as error:
            raise DataError(f"{place} is damaged ({error}); use another --out") from error
        for key in ("num_points", "mode", "protocols", "resize"):
            if before.get(key) != content[key]:
                raise DataError(f"{folder} holds results with {key} = {before.get(key)}, asked is {content[key]}; use another --out")
        if before.get("dataset", {}).get("root") != content["dataset"]["root"]:
            raise DataError(f"{folder} holds results of {before.get('dataset', {}).get('root')}; use another --out")
        for key in ("systems", "extras", "controls"):
            content[key] = list(dict.fromkeys([*before.get(key, []), *content[key]]))
        sequences = [*before["dataset"].get("sequences", []), *content["dataset"]["sequences"]]
        content["dataset"]["sequences"] = list(dict.fromkeys(sequences))
    _write(place, json.dumps(content, indent=1) + "\n")


def _write(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.getpid()}.part")
    beside.write_text(text)
    os.replace(beside, place)


def _append(place: Path, row: dict[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a kill left half a line
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def _done(place: Path) -> set[tuple[str, str]]:
    return {(row["sequence"], row["pair"]) for row in read_rows(place) if row["ok"]}


def _has_extra(folder: Path, name: str, extra: str, image: Path) -> bool:
    part = "bias" if extra == "bias" else "sweeps"
    rows = read_rows(folder / part / f"{file_name(name)}.jsonl")
    return any(r["image"] == str(image) and r["ok"] and (extra == "bias" or r["kind"] == extra) for r in rows)


def _work(tasks: list, settings: RunSettings, folder: Path, workers: int):
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield _sequence(task, settings, folder)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        waiting = [pool.submit(_sequence, task, settings, folder) for task in tasks]
        for future in as_completed(waiting):
            yield future.result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _sequence(task: tuple, settings: RunSettings, folder: Path) -> tuple[list[dict[str, Any]], list[tuple[str, dict[str, Any]]]]:
    """Rows of one sequence for one system, features taken from disk or computed and stored; and its sweeps and bias."""
    spec, pairs, extras, image = task
    name, detect = _label(spec), _make(spec, settings)
    store = folder / "features" / file_name(name)

    def features(path: Path, sequence: str) -> tuple[Features, float]:
        place = store / sequence / f"{path.stem}.npz"
        found = load_features(place)
        if found is None:
            found = timed(detect, path)
            save_features(place, *found)
            found = load_features(place) or found  # the same numbers as a run that finds them on disk
        return found

    posed = bool(pairs) and isinstance(pairs[0], PosePair)
    rows = run(
        pairs,
        detect,
        name=name,
        num_points=settings.num_points,
        protocols=settings.protocols,
        resize=settings.resize,
        features=None if posed else features,
    )
    found = []
    for extra in extras:
        try:
            if extra == "bias":
                made = bias(detect, image, num_points=settings.num_points)
            else:
                made = sweep(detect, image, extra, ROTATIONS if extra == "rotation" else FACTORS, num_points=settings.num_points)
        except (DataError, ValueError, RuntimeError, OSError) as error:
            made = [{"kind": extra, "ok": False, "reason": f"{type(error).__name__}: {error}", "metrics": {}}]
        found += [(extra, {"system": name, "image": str(image), **row}) for row in made]
    return rows, found
