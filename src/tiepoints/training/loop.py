"""One training loop for every network: batches in, checkpoint and rows of numbers out.

The loop owns the optimiser, the schedule, mixed precision and several devices (Lightning Fabric), the logs and the
checkpoints. It knows no network, no data and no loss: those are passed in. Batch ``i`` must depend on ``i`` alone; then
a run that was killed and resumed ends at the same weights as an unbroken one (same seed, CPU).
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from ..errors import WeightsError
from ..extract import choose_device, fast_bfloat16

Loss = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, dict[str, float]]]

#: Steps that are timed before a run of ``minutes`` fixes its number of steps, after as many to warm up.
TIMED_STEPS = 15
CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class FitSettings:
    """How a network is trained; saved with the checkpoint.

    Attributes:
        steps: optimiser steps; where 0, ``minutes`` decides after timing the first steps.
        minutes: time to train for, used where ``steps`` is 0.
        batch_size: pairs a step, over all devices.
        optimiser: ``adam``, or ``sgd`` with momentum and dampening 0.9 (HardNet's).
        learning_rate: peak of the learning rate.
        warmup: steps of linear rise to it; then it falls to ``final_rate`` times the peak.
        decay: how it falls: ``cosine``, ``linear``, or ``step``, at once after half of the steps.
        weight_decay: L2 term added to the gradient.
        clip: largest norm of the gradient; 0 = unlimited.
        average: decay of the running average of the weights that is validated and kept; 0 = none.
        validate_every: steps between validations.
        save_every: seconds between checkpoints.
        seed: of the batches and of the initialisation.
        workers: processes that make batches.
        precision: Fabric's name, ``32-true`` or ``bf16-mixed``; ``auto`` is the latter where the device computes bfloat16
            (``extract.fast_bfloat16``).
    """

    steps: int = 0
    minutes: float = 30.0
    batch_size: int = 8
    optimiser: str = "adam"
    learning_rate: float = 3e-3
    warmup: int = 50
    decay: str = "cosine"
    final_rate: float = 0.02
    weight_decay: float = 1e-5
    clip: float = 1.0
    average: float = 0.995
    validate_every: int = 250
    save_every: float = 60.0
    seed: int = 0
    workers: int = 1
    precision: str = "32-true"

    def __post_init__(self) -> None:
        if self.optimiser not in ("adam", "sgd"):
            raise ValueError(f"optimiser must be adam or sgd, got {self.optimiser!r}")
        if self.decay not in ("cosine", "linear", "step"):
            raise ValueError(f"decay must be cosine, linear or step, got {self.decay!r}")


@dataclass
class FitResult:
    """What a training gave: best validation score, the step it was reached at, steps done, rows of the log."""

    best: float
    best_step: int
    steps: int
    rows: list[dict[str, float]]


class _FromStep(Sampler[int]):
    """Indices ``first .. last-1`` of this process's share of every batch."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last

    def __iter__(self):
        return iter(range(self.first, self.last))

    def __len__(self) -> int:
        return self.last - self.first


def learning_rate_at(step: int, total: int, settings: FitSettings) -> float:
    """Linear warm-up, then half a cosine, a straight line or one step down to ``final_rate`` times the peak."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = min(1.0, (step - settings.warmup) / max(1, total - settings.warmup))
    left = {"linear": 1 - done, "step": float(done < 0.5)}.get(settings.decay, 0.5 * (1 + math.cos(math.pi * done)))
    low = settings.final_rate
    return settings.learning_rate * (low + (1 - low) * left)


def _optimiser(net: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    if settings.optimiser == "sgd":
        return torch.optim.SGD(
            net.parameters(), lr=settings.learning_rate, momentum=0.9, dampening=0.9, weight_decay=settings.weight_decay
        )
    return torch.optim.Adam(net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)


def save_atomically(state: Any, path: Path) -> None:
    """Write with ``torch.save`` beside ``path``, then rename, so that a kill never leaves half a file.

    Raises:
        OSError: the disk is full or not writable; an older file at ``path`` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"checkpoint {path} could not be written ({error})") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this loop.

    Raises:
        WeightsError: the file is damaged or no checkpoint of a training.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise WeightsError(f"{path} is no readable training checkpoint ({error}); delete it to start afresh") from error
    if not isinstance(state, dict) or state.get("version") != CHECKPOINT_VERSION:
        raise WeightsError(f"{path} is no training checkpoint of this version; delete it to start afresh")
    return state


class RunningAverage:
    """Exponential average of weights and buffers; short at first, so that early weights are soon forgotten."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay, self.count = decay, 0
        self.state = {k: v.detach().clone() for k, v in net.state_dict().items()}

    def update(self, net: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for key, value in net.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value.detach(), 1 - decay)
            else:
                self.state[key].copy_(value)


def _fabric(device: str, devices: int, precision: str):
    try:
        from lightning.fabric import Fabric
    except ImportError as error:
        raise ImportError("training needs Lightning Fabric: pip install 'tiepoints[train]'") from error
    accelerator = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "mps": "mps"}.get(device.split(":")[0])
    if accelerator is None:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps; got {device!r}")
    chosen: int | list[int] = [int(device.split(":")[1])] if ":" in device else devices
    strategy = "ddp" if not isinstance(chosen, list) and chosen > 1 else "auto"
    return Fabric(accelerator=accelerator, devices=chosen, precision=precision, strategy=strategy)  # type: ignore[arg-type]


def fit(
    net: nn.Module,
    make_batches: Callable[[int], Dataset],
    loss: Loss,
    validate: Callable[[nn.Module], float],
    settings: FitSettings,
    checkpoint: Path,
    *,
    log_dir: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    devices: int = 1,
    progress: bool = True,
    score_name: str = "repeatability",
    extra: Mapping[str, Any] | None = None,
    on_best: Callable[[dict[str, Tensor], dict[str, Any]], None] | None = None,
) -> FitResult:
    """Train ``net`` in place; at the end it holds the weights that validated best.

    Args:
        net: moves to the device.
        make_batches: length -> dataset of single items (dicts of tensors); item ``i`` must depend on ``i`` alone.
        loss: (net, batch) -> (scalar, numbers for the log).
        validate: net in eval mode -> score, larger is better; run on the first device alone.
        settings: see ``FitSettings``.
        checkpoint: where the state of the training is kept (atomically).
        log_dir: folder for ``log.csv`` and TensorBoard files; none = no logs.
        resume: go on from ``checkpoint`` if it is there.
        score_name: what ``validate`` gives, for the log.
        device, devices: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``, and how many.
        extra: stored in the checkpoint, checked when resuming.
        on_best: called with state dict and facts each time the validation improves.

    Raises:
        WeightsError: the checkpoint to resume from is damaged or belongs to another training.
        RuntimeError: the loss is no longer finite.
    """
    precision = settings.precision
    if precision == "auto":
        precision = "bf16-mixed" if fast_bfloat16(choose_device(device)) else "32-true"
    fabric = _fabric(device, devices, precision)
    fabric.launch()
    if settings.batch_size % fabric.world_size:
        raise ValueError(f"batch_size {settings.batch_size} does not divide among {fabric.world_size} devices")
    share = settings.batch_size // fabric.world_size
    main = fabric.is_global_zero

    wrapped, optimiser = fabric.setup(net, _optimiser(net, settings))
    average = RunningAverage(net, settings.average) if settings.average else None
    step, total, spent, best, best_step = 0, settings.steps, 0.0, -math.inf, 0
    best_state: dict[str, Tensor] = {}
    rows: list[dict[str, float]] = []
    recent = 0.0
    identity = {"settings": {**asdict(settings), "workers": 0, "save_every": 0.0}, "extra": dict(extra or {})}
    if resume and checkpoint.exists():
        state = read_checkpoint(checkpoint)
        if state["identity"] != identity:
            changed = _differences(state["identity"], identity)
            raise WeightsError(f"{checkpoint} belongs to another training ({changed}); use the same options or start afresh")
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        if average is not None:
            average.state = {k: v.to(fabric.device) for k, v in state["average"].items()}
            average.count = state["average_count"]
        step, total, spent = state["step"], state["total"], state["spent"]
        recent = state["recent"]
        best, best_step, best_state, rows = state["best"], state["best_step"], state["best_state"], state["rows"]
    elif not resume:
        checkpoint.unlink(missing_ok=True)

    def current() -> dict[str, Tensor]:
        source = net.state_dict() if average is None else average.state
        return {k: v.detach().cpu().clone() for k, v in source.items()}

    def save() -> None:
        if not main:
            return
        state = {
            "version": CHECKPOINT_VERSION,
            "identity": identity,
            "net": {k: v.cpu() for k, v in net.state_dict().items()},
            "optimiser": optimiser.state_dict(),
            "average": {} if average is None else average.state,
            "average_count": 0 if average is None else average.count,
            "step": step, "total": total, "spent": spent + time.monotonic() - started,
            "best": best, "best_step": best_step, "best_state": best_state, "rows": rows, "recent": recent,
        }  # fmt: skip
        try:
            save_atomically(state, checkpoint)
        except OSError as error:  # a full disk must not end the training: the next attempt may find room
            tqdm.write(f"warning: {error}; training goes on")

    def check() -> float:
        """Validate the weights to be kept, in place of the ones in training."""
        kept = {k: v.detach().clone() for k, v in net.state_dict().items()}
        net.load_state_dict(current())
        net.eval()
        with torch.inference_mode():
            score = float(validate(net)) if main else 0.0
        net.load_state_dict(kept)
        net.train()
        return float(fabric.broadcast(score))

    logs = _Logs(log_dir if main else None, rows)
    started = saved = time.monotonic()
    net.train()
    limit = total or 10**9
    dataset = make_batches(limit * settings.batch_size)
    loader: DataLoader | None = None
    stream: Iterator[dict[str, Tensor]] = iter(())
    bar = tqdm(total=total or None, initial=step, unit="step", disable=not (progress and main), dynamic_ncols=True)
    timer = time.monotonic()
    with torch.random.fork_rng(), logs, bar:
        while not total or step < total:
            if loader is None:
                first = step * share
                loader = DataLoader(
                    _Share(dataset, share, fabric.global_rank, fabric.world_size),
                    batch_size=share,
                    sampler=_FromStep(first, limit * share),
                    num_workers=settings.workers,
                    prefetch_factor=4 if settings.workers else None,
                )
                stream = iter(loader)
            batch = {k: v.to(fabric.device) for k, v in next(stream).items()}
            torch.manual_seed(settings.seed * 10**9 + step)  # dropout of step i depends on i alone, also after a resume
            rate = learning_rate_at(step, total or 10**9, settings)
            for group in optimiser.param_groups:
                group["lr"] = rate
            with nullcontext() if fabric.world_size == 1 else fabric.no_backward_sync(wrapped, enabled=False):
                value, numbers = loss(wrapped, batch)
                if not torch.isfinite(value):
                    raise RuntimeError(
                        f"the loss became {value.item()} at step {step}; lower the learning rate "
                        f"(now {settings.learning_rate:g}). The last good state is in {checkpoint}"
                    )
                fabric.backward(value)
            if settings.clip:
                fabric.clip_gradients(wrapped, optimiser, max_norm=settings.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if average is not None:
                average.update(net)
            step += 1
            recent = numbers["loss"] if not recent else 0.98 * recent + 0.02 * numbers["loss"]
            if not total and step == TIMED_STEPS:
                timer = time.monotonic()
            if not total and step == 2 * TIMED_STEPS:
                seconds = (time.monotonic() - timer) / TIMED_STEPS
                total = max(step + 1, round((settings.minutes * 60 - (time.monotonic() - started)) / seconds))
                total = int(fabric.broadcast(total))
                bar.total = total
            if total and (step % settings.validate_every == 0 or step == total):
                score = check()
                row = {"step": step, "loss": recent, score_name: score, "learning_rate": rate,
                       "seconds": round(spent + time.monotonic() - started, 1), **numbers}  # fmt: skip
                row["loss"] = recent
                rows.append(row)
                logs.write(row)
                if score >= best:
                    best, best_step, best_state = score, step, current()
                    if on_best is not None and main:
                        on_best(best_state, {"step": step, score_name: score, "seconds": row["seconds"]})
            bar.set_postfix({"loss": f"{recent:.4g}", score_name: f"{max(best, 0):.3f}"}, refresh=False)
            bar.update(1)
            if total and (time.monotonic() - saved > settings.save_every or step == total):
                save()
                saved = time.monotonic()
    if best_state:
        net.load_state_dict(best_state)
    net.eval()
    return FitResult(best, best_step, step, rows)


class _Share(Dataset):
    """This process's items: item ``i`` of the share is item of the whole batch it belongs to."""

    def __init__(self, dataset: Dataset, share: int, rank: int, world: int):
        self.dataset, self.share, self.rank, self.world = dataset, share, rank, world

    def __len__(self) -> int:
        return len(self.dataset) // self.world  # type: ignore[arg-type]

    def __getitem__(self, index: int):
        batch, place = divmod(index, self.share)
        return self.dataset[(batch * self.world + self.rank) * self.share + place]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Which settings differ between two trainings, in words."""
    changed = []
    for part in ("settings", "extra"):
        for key in {**old[part], **new[part]}:
            if old[part].get(key) != new[part].get(key):
                changed.append(f"{key} was {old[part].get(key)!r}, now {new[part].get(key)!r}")
    return "; ".join(changed)


class _Logs:
    """``log.csv``, rewritten from the rows kept in the checkpoint when resuming, and TensorBoard where installed."""

    def __init__(self, folder: Path | None, rows: list[dict[str, float]]):
        self.folder = folder
        self.board: Any = None
        self.file: Any = None
        self.rows = list(rows)

    def __enter__(self) -> _Logs:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / "log.csv", "w", newline="")
            self.writer = csv.writer(self.file)
            for row in self.rows:
                self._line(row, first=row is self.rows[0])
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.folder))
            except ImportError:
                pass  # the CSV alone then
        return self

    def _line(self, row: Mapping[str, float], first: bool) -> None:
        if first:
            self.writer.writerow(row)
        self.writer.writerow([f"{v:.6g}" for v in row.values()])
        self.file.flush()

    def write(self, row: Mapping[str, float]) -> None:
        if self.file is None:
            return
        try:
            self._line(row, first=not self.rows)
        except OSError as error:
            tqdm.write(f"warning: log could not be written ({error}); training goes on")
        self.rows.append(dict(row))
        if self.board is not None:
            for key, value in row.items():
                if key != "step":
                    self.board.add_scalar(key, value, int(row["step"]))

    def __exit__(self, *exc: object) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file, written beside its place and renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os.replace(beside, path)
