"""The training loop of all networks.

The loop handles the optimizer, the schedule, mixed precision and several devices (Lightning
Fabric), the logs and the checkpoints. Network, data and loss are passed in. If batch ``i`` depends
only on ``i``, an interrupted and resumed training gives the same weights as an uninterrupted one
(same seed, CPU).
"""

from __future__ import annotations

import csv
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ..device import choose_device, fast_bfloat16
from ..errors import WeightsError
from ..files import atomic_path, require
from ..formats.records import compatible_version
from ..memory import release_freed
from ..progress import Progress

logger = logging.getLogger(__name__)
#: (network, batch) -> (scalar, values for the log).
Loss = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, dict[str, float]]]

#: Steps that are timed, after as many warm-up steps, to derive the number of steps from
#: ``minutes``. If steps are slow, warm-up and timing end at these fractions of the minutes.
TIMED_STEPS = 15
TIMED_FRACTIONS = (0.1, 0.25)
#: Number of steps after which freed memory is returned to the system: the gaps between blocks of
#: various sizes grow from step to step, to 22 GB after 100 steps of a training of HyNet.
RELEASE_STEPS = 5
CHECKPOINT_VERSION = 2
#: Entries of ``Task.identity`` that checkpoints of earlier versions do not contain.
ADDED = ("files", "init_sha256", "version")
#: Attributes of a ``Trainer`` that a checkpoint contains unchanged.
_SCALARS = (
    *("step", "total", "spent", "best", "best_step", "best_state", "rows"),
    *("recent_loss", "recent_values"),
)


@dataclass(frozen=True)
class FitSettings:
    """Optimizer and schedule of a training; saved in the checkpoint.

    Attributes:
        steps: optimizer steps; 0: derived from ``minutes`` after timing the first steps.
        minutes: duration of the training if ``steps`` is 0, from ``RunOptions.started`` on, with
            validations.
        batch_size: pairs per step, over all devices.
        optimizer: ``adam``, or ``sgd`` with momentum and dampening 0.9 (HardNet).
        learning_rate: peak of the learning rate.
        warmup: steps of linear increase to the peak.
        decay: decrease after the warm-up: ``cosine``, ``linear``, or ``step``, one step at
            ``decay_at``.
        decay_at: fraction of the steps at which ``step`` decreases the learning rate.
        final_rate: final learning rate over the peak.
        weight_decay: L2 term added to the gradient.
        clip: largest norm of the gradient; 0: unlimited.
        average: decay of the running average of the weights, which is validated and saved; 0: no
            average.
        validate_every: steps between validations.
        seed: of the batches and of the initialization.
        precision: Fabric's name, ``32-true`` or ``bf16-mixed``; ``auto``: the latter if the device
            supports bfloat16 (``device.fast_bfloat16``).

    Raises:
        ValueError: unknown optimizer or decay.
    """

    steps: int = 0
    minutes: float = 30.0
    batch_size: int = 8
    optimizer: str = "adam"
    learning_rate: float = 3e-3
    warmup: int = 50
    decay: str = "cosine"
    decay_at: float = 0.5
    final_rate: float = 0.02
    weight_decay: float = 1e-5
    clip: float = 1.0
    average: float = 0.995
    validate_every: int = 250
    seed: int = 0
    precision: str = "32-true"

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer must be adam or sgd, got {self.optimizer!r}")
        if self.decay not in ("cosine", "linear", "step"):
            raise ValueError(f"decay must be cosine, linear or step, got {self.decay!r}")
        if not 0 < self.decay_at <= 1:
            raise ValueError(f"decay_at must lie in (0, 1], got {self.decay_at}")


@dataclass
class FitResult:
    """Result of a training.

    Attributes:
        best, best_step: best validation score, and its step.
        steps: number of steps.
        rows: of the log, one per validation.
    """

    best: float
    best_step: int
    steps: int
    rows: list[dict[str, float]]


class _FromStep(Sampler[int]):
    """Indices ``first .. last-1``."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last

    def __iter__(self):
        return iter(range(self.first, self.last))

    def __len__(self) -> int:
        return self.last - self.first


def learning_rate_at(step: int, total: int, settings: FitSettings) -> float:
    """Learning rate of a step: linear warm-up, then the decay to ``final_rate`` times the peak."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = min(1.0, (step - settings.warmup) / max(1, total - settings.warmup))
    remaining = {"linear": 1 - done, "step": float(done < settings.decay_at)}.get(
        settings.decay, 0.5 * (1 + math.cos(math.pi * done))
    )
    low = settings.final_rate
    return settings.learning_rate * (low + (1 - low) * remaining)


def _optimizer(net: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            net.parameters(),
            lr=settings.learning_rate,
            momentum=0.9,
            dampening=0.9,
            weight_decay=settings.weight_decay,
        )
    return torch.optim.Adam(
        net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


def save_atomically(state: Any, path: Path) -> None:
    """Write ``state`` to ``path`` with ``torch.save``, atomically.

    Raises:
        OSError: the disk is full or not writable; an existing file at ``path`` is unchanged.
    """
    try:
        with atomic_path(path) as tmp_path, open(tmp_path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise OSError(f"checkpoint {path} could not be written ({error})") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of the training loop.

    Raises:
        WeightsError: the file is damaged or not a training checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises various types for damaged files
        raise WeightsError(
            f"{path} is not a readable training checkpoint ({error}); delete it to start over"
        ) from error
    if not isinstance(state, dict) or state.get("version") != CHECKPOINT_VERSION:
        raise WeightsError(
            f"{path} is not a training checkpoint of this version; delete it to start over"
        )
    return state


class RunningAverage:
    """Exponential moving average of weights and buffers, over fewer steps at the start."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay, self.count = decay, 0
        self.state = {k: v.detach().clone() for k, v in net.state_dict().items()}

    def update(self, net: nn.Module) -> None:
        """Include the current weights."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for key, value in net.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value.detach(), 1 - decay)
            else:
                self.state[key].copy_(value)


def _fabric(device: str, devices: int, precision: str):
    Fabric = require("lightning.fabric", extra="train", purpose="training").Fabric
    accelerator = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "mps": "mps"}.get(
        device.split(":")[0]
    )
    if accelerator is None:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps; got {device!r}")
    selected: int | list[int] = [int(device.split(":")[1])] if ":" in device else devices
    strategy = "ddp" if not isinstance(selected, list) and selected > 1 else "auto"
    return Fabric(accelerator=accelerator, devices=selected, precision=precision, strategy=strategy)


@dataclass(frozen=True)
class RunOptions:
    """Options of a training that do not affect its result.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        devices: number of devices.
        resume: resume from the checkpoint if it exists.
        progress: show progress.
        workers: processes that load batches.
        save_every: seconds between checkpoints.
        overwrite: replace the weights and the checkpoint of an earlier training.
        started: ``time.monotonic()`` at the start of the training, from which ``minutes`` are
            counted; None: when the ``Trainer`` is created.
    """

    device: str = "auto"
    devices: int = 1
    resume: bool = False
    progress: bool = True
    workers: int = 1
    save_every: float = 60.0
    overwrite: bool = False
    started: float | None = None


@dataclass(frozen=True)
class Task:
    """Data, loss and validation of a training.

    Attributes:
        make_batches: length -> dataset of single items (dicts of tensors); item ``i`` must depend
            only on ``i``.
        loss: see ``Loss``.
        validate: network in eval mode -> score, larger is better; runs on the first device only.
        score_name: name of the score in the log.
        identity: stored in the checkpoint and compared when resuming.
        arguments: of the training, stored in the checkpoint to resume without them.
        on_best: called with state dict and metadata at each best validation.
    """

    make_batches: Callable[[int], Dataset]
    loss: Loss
    validate: Callable[[nn.Module], float]
    score_name: str = "repeatability"
    identity: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    on_best: Callable[[dict[str, Tensor], dict[str, Any]], None] | None = None


class Trainer:
    """Trains a network in place; after ``fit`` it has the weights of the best validation.

    Args:
        net: the network, which is moved to the device.
        task: see ``Task``.
        settings: see ``FitSettings``.
        checkpoint: file for the state of the training, written atomically.
        run: see ``RunOptions``.
        log_dir: folder for ``log.csv`` and TensorBoard files; None: no logs.

    Raises:
        WeightsError: the checkpoint is damaged or belongs to another training.
        ValueError: unusable device or batch size.
        ImportError: Lightning Fabric is missing.
    """

    def __init__(
        self,
        net: nn.Module,
        task: Task,
        settings: FitSettings,
        checkpoint: Path,
        run: RunOptions | None = None,
        log_dir: Path | None = None,
    ):
        self.net, self.task, self.settings = net, task, settings
        self.checkpoint, self.log_dir = checkpoint, log_dir
        self.run = run or RunOptions()
        precision = settings.precision
        if precision == "auto":
            fast = fast_bfloat16(choose_device(self.run.device))
            precision = "bf16-mixed" if fast else "32-true"
        self.fabric = _fabric(self.run.device, self.run.devices, precision)
        self.fabric.launch()
        if settings.batch_size % self.fabric.world_size:
            raise ValueError(
                f"batch_size {settings.batch_size} is not divisible by "
                f"{self.fabric.world_size} devices"
            )
        self.share = settings.batch_size // self.fabric.world_size
        self.main = self.fabric.is_global_zero
        self.wrapped, self.optimizer = self.fabric.setup(net, _optimizer(net, settings))
        self.average = RunningAverage(net, settings.average) if settings.average else None
        self.step = 0
        self.total = settings.steps  # 0 until the first steps have been timed
        self.spent = 0.0
        self.best, self.best_step = -math.inf, 0
        self.best_state: dict[str, Tensor] = {}
        self.rows: list[dict[str, float]] = []
        self.recent_loss = 0.0
        # metadata of the best weights, until ``on_best`` has written them
        self.unsaved: dict[str, Any] | None = None
        #: Learning rate and values of the loss of the last step.
        self.recent_values: dict[str, float] = {}
        self.identity = {
            "settings": asdict(settings),
            "task": {**task.identity, "version": compatible_version()},
        }
        if self.run.resume and checkpoint.exists():
            self.restore()
        elif not self.run.resume:
            checkpoint.unlink(missing_ok=True)
        self.saved = time.monotonic()
        self.started = self.saved if self.run.started is None else self.run.started
        #: Step and time of the start of this run, and of the end of its warm-up.
        self.first_step = self.step
        self.timer: tuple[int, float] | None = None

    def restore(self) -> None:
        """Restore the state from the checkpoint.

        Raises:
            WeightsError: see ``Trainer``.
        """
        state = read_checkpoint(self.checkpoint)
        # checkpoints of earlier versions do not contain all of the present entries
        known = state["identity"]["task"]
        added = {
            key: self.identity["task"][key]
            for key in ADDED
            if key in self.identity["task"] and key not in known
        }
        # settings added since the checkpoint was written have their default
        settings = {**asdict(FitSettings()), **state["identity"]["settings"]}
        stored = {"settings": settings, "task": {**known, **added}}
        if stored != self.identity:
            changed = _differences(stored, self.identity)
            raise WeightsError(
                f"{self.checkpoint} belongs to another training ({changed}); use the same options "
                "or start over without --resume"
            )
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            device = self.fabric.device
            self.average.state = {k: v.to(device) for k, v in state["average"].items()}
            self.average.count = state["average_count"]
        for name in _SCALARS:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.unsaved = state.get("unsaved")

    def save(self) -> None:
        """Write the checkpoint; on an error, such as a full disk, the training continues."""
        self.saved = time.monotonic()
        if not self.main:
            return
        state = {
            "version": CHECKPOINT_VERSION,
            "identity": self.identity,
            "arguments": dict(self.task.arguments),
            "net": {k: v.cpu() for k, v in self.net.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "average": {} if self.average is None else self.average.state,
            "average_count": 0 if self.average is None else self.average.count,
            **{name: getattr(self, name) for name in _SCALARS},
            "spent": self.seconds(),
            "unsaved": self.unsaved,
        }
        try:
            save_atomically(state, self.checkpoint)
        except OSError as error:
            logger.warning("%s; the training continues", error)

    def seconds(self) -> float:
        """Duration of the training, including earlier runs."""
        return self.spent + time.monotonic() - self.started

    def current(self) -> dict[str, Tensor]:
        """Copy of the weights that are validated and saved: the running average, if any."""
        source = self.net.state_dict() if self.average is None else self.average.state
        return {k: v.detach().cpu().clone() for k, v in source.items()}

    def fit(self) -> FitResult:
        """Train to the last step.

        Raises:
            RuntimeError: the loss is not finite.
            OSError: the best weights could not be written.
        """
        if self.finished:
            logger.info(
                "%s: the training is finished (%d steps); nothing to do", self.checkpoint, self.step
            )
            return self._result()
        limit = self.total or 10**9
        dataset = self.task.make_batches(limit * self.settings.batch_size)
        stream = self._batches(dataset, limit)
        self.net.train()
        progress = Progress(
            self.total or None,
            unit="step",
            label="train",
            enabled=self.run.progress and self.main,
            initial=self.step,
        )
        with (
            torch.random.fork_rng(),
            _Logs(self.log_dir if self.main else None, self.rows) as logs,
            progress,
        ):
            self._validate_if_due(logs)  # if the previous run was killed during a validation
            while not self.total or self.step < self.total:
                batch = {k: v.to(self.fabric.device) for k, v in next(stream).items()}
                self.train_step(batch)
                if not self.total:
                    self._fix_total(logs)
                    if self.total:
                        progress.set_total(self.total)
                self._validate_if_due(logs)
                progress.set_values(**self._progress_values())
                progress.update()
                if self.step % RELEASE_STEPS == 0:
                    release_freed()
                due = time.monotonic() - self.saved > self.run.save_every
                if due or self.step == self.total:
                    self.save()
        return self._result()

    @property
    def finished(self) -> bool:
        """Whether all steps and the last validation are done."""
        return self.total > 0 and self.step >= self.total and not self._validation_due

    def _result(self) -> FitResult:
        """The result, with the weights of the best validation in the network."""
        if self.best_state:
            self._write_best(last=True)
            self.net.load_state_dict(self.best_state)
        self.net.eval()
        return FitResult(self.best, self.best_step, self.step, self.rows)

    def _progress_values(self) -> dict[str, str]:
        """Values to show; the validation score once there is one."""
        values = {"loss": f"{self.recent_loss:.4g}"}
        if self.rows:
            values[f"best {self.task.score_name}"] = f"{self.best:.3f}"
        return values

    def _batches(self, dataset: Dataset, limit: int) -> Iterator[dict[str, Tensor]]:
        """Batches from the current step on; workers start with the first one."""
        yield from DataLoader(
            _BatchShare(dataset, self.share, self.fabric.global_rank, self.fabric.world_size),
            batch_size=self.share,
            sampler=_FromStep(self.step * self.share, limit * self.share),
            num_workers=self.run.workers,
            prefetch_factor=4 if self.run.workers else None,
        )

    def train_step(self, batch: dict[str, Tensor]) -> None:
        """Do one optimizer step."""
        # dropout of step i depends only on i, also when resuming
        torch.manual_seed(self.settings.seed * 10**9 + self.step)
        rate = learning_rate_at(self.step, self.total or 10**9, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        single = self.fabric.world_size == 1
        with nullcontext() if single else self.fabric.no_backward_sync(self.wrapped, enabled=False):
            value, metrics = self.task.loss(self.wrapped, batch)
            if not torch.isfinite(value):
                raise RuntimeError(
                    f"the loss became {value.item()} at step {self.step}; lower the learning rate "
                    f"(now {self.settings.learning_rate:g}). The last valid state is in "
                    f"{self.checkpoint}"
                )
            self.fabric.backward(value)
        if self.settings.clip:
            self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.net)
        self.step += 1
        loss = metrics["loss"]
        self.recent_loss = 0.98 * self.recent_loss + 0.02 * loss if self.recent_loss else loss
        self.recent_values = {"learning_rate": rate, **metrics}

    def _seconds_per_step(self) -> float | None:
        """Seconds of a step, once enough steps of this run have been timed."""
        now = time.monotonic()
        elapsed = self.seconds() / (60 * self.settings.minutes)
        if self.timer is None:
            if self.step - self.first_step >= TIMED_STEPS or elapsed > TIMED_FRACTIONS[0]:
                self.timer = (self.step, now)
            return None
        step, started = self.timer
        if self.step - step >= TIMED_STEPS or elapsed > TIMED_FRACTIONS[1]:
            return (now - started) / (self.step - step)
        return None

    def _fix_total(self, logs: _Logs) -> None:
        """Derive the number of steps from ``minutes``, once steps have been timed, and a
        validation, which also gives weights early.
        """
        seconds = self.fabric.broadcast(self._seconds_per_step())
        if seconds is None:
            return
        started = time.monotonic()
        self._validate(logs)
        validation = time.monotonic() - started
        remaining = self.settings.minutes * 60 - self.seconds() - validation  # for the last one
        steps = remaining / (seconds + validation / self.settings.validate_every)
        self.total = int(self.fabric.broadcast(self.step + max(0, round(steps))))
        logger.info(
            "%d steps in %g minutes: %.2g s per step, %.2g s per validation, %.2g s so far",
            *(self.total, self.settings.minutes, seconds, validation, self.seconds()),
        )

    @property
    def _validation_due(self) -> bool:
        """Whether to validate: after every ``validate_every`` steps and at the end, once per
        step.
        """
        due = self.step % self.settings.validate_every == 0 or self.step == self.total
        done = int(self.rows[-1]["step"]) if self.rows else 0
        return self.total > 0 and due and self.step > done

    def _validate_if_due(self, logs: _Logs) -> None:
        if self._validation_due:
            self._validate(logs)

    def _validate(self, logs: _Logs) -> None:
        self.save()  # if this run is killed during the validation, the next one repeats it
        logs.write(self._validated())

    def _validated(self) -> dict[str, float]:
        """Validate, save the weights if they are the best, and return the row of the log."""
        score = self.validation_score()
        name = self.task.score_name
        row = {
            "step": self.step,
            "loss": self.recent_loss,
            name: score,
            "learning_rate": 0.0,  # the order of the columns
            "seconds": round(self.seconds(), 1),
            **self.recent_values,
        }
        row["loss"] = self.recent_loss
        self.rows.append(row)
        if score >= self.best:
            self.best, self.best_step, self.best_state = score, self.step, self.current()
            self.unsaved = {"step": self.step, name: score, "seconds": row["seconds"]}
            self._write_best()
        return row

    def _write_best(self, *, last: bool = False) -> None:
        """Write the best weights; on an error, such as a full disk, the training continues.

        Raises:
            OSError: they cannot be written after the ``last`` step.
        """
        if self.unsaved is None or self.task.on_best is None or not self.main:
            return
        try:
            self.task.on_best(self.best_state, self.unsaved)
            self.unsaved = None
        except OSError as error:
            if last:
                raise OSError(f"{error}; free space and use --resume") from error
            logger.warning("%s; the training continues", error)

    def validation_score(self) -> float:
        """Validate the running average of the weights."""
        trained = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        self.net.load_state_dict(self.current())
        self.net.eval()
        with torch.inference_mode():
            score = float(self.task.validate(self.net)) if self.main else 0.0
        self.net.load_state_dict(trained)
        self.net.train()
        return float(self.fabric.broadcast(score))


class _BatchShare(Dataset):
    """The items of this process: ``share`` consecutive items of each batch."""

    def __init__(self, dataset: Dataset, share: int, rank: int, world: int):
        self.dataset, self.share, self.rank, self.world = dataset, share, rank, world

    def __len__(self) -> int:
        return len(self.dataset) // self.world  # type: ignore[arg-type]

    def __getitem__(self, index: int):
        batch, offset = divmod(index, self.share)
        return self.dataset[(batch * self.world + self.rank) * self.share + offset]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Describe the differences between the identities of two trainings."""
    changed = []
    for part in ("settings", "task"):
        for key in {**old[part], **new[part]}:
            if old[part].get(key) == new[part].get(key):
                continue
            if key == "files":
                changed.append(
                    "files of the training data have other names, sizes or modification times"
                )
            else:
                changed.append(f"{key} was {old[part].get(key)!r}, now {new[part].get(key)!r}")
    return "; ".join(changed)


class _Logs:
    """Writes ``log.csv`` and, if installed, TensorBoard files.

    When resuming, ``log.csv`` is rewritten from the rows in the checkpoint. A log that cannot be
    written, such as on a full disk, does not end the training.
    """

    def __init__(self, folder: Path | None, rows: list[dict[str, float]]):
        self.folder = folder
        self.board: Any = None
        self.file: Any = None
        self.rows = list(rows)

    def __enter__(self) -> _Logs:
        if self.folder is None:
            return self
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / "log.csv", "w", newline="")
            self.writer = csv.writer(self.file)
            for row in self.rows:
                self._write_line(row, first=row is self.rows[0])
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder))
        except ImportError:
            logger.debug("TensorBoard is not installed: log.csv alone is written")
        except OSError as error:
            self._warn(error)
        return self

    def _warn(self, error: OSError) -> None:
        logger.warning("log could not be written (%s); the training continues", error)

    def _write_line(self, row: Mapping[str, float], first: bool) -> None:
        """Write a line, before the first one also the header."""
        if first:
            self.writer.writerow(row)
        self.writer.writerow([f"{v:.6g}" for v in row.values()])
        self.file.flush()

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row."""
        try:
            if self.file is not None:
                self._write_line(row, first=not self.rows)
            if self.board is not None:
                for key, value in row.items():
                    if key != "step":
                        self.board.add_scalar(key, value, int(row["step"]))
        except OSError as error:
            self._warn(error)
        self.rows.append(dict(row))

    def __exit__(self, *exc: object) -> None:
        for log in (self.file, self.board):
            if log is not None:
                with suppress(OSError):  # already reported
                    log.close()
