"""Common parts of all recipes: data, output files and initial weights."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ...datasets.reconstructions import TrackScene, find_models, read_scenes
from ...datasets.synthetic import damaged_photos, find_photos, split_readable
from ...errors import DataError, WeightsError
from ...formats.records import file_stamp, files_digest, json_digest, with_program
from ...weights import digest, save
from ..loop import FitResult, FitSettings, RunOptions, Task, Trainer

logger = logging.getLogger(__name__)
#: One or more folders.
Folders: TypeAlias = str | Path | Sequence[str | Path]
R = TypeVar("R")


@dataclass(frozen=True)
class TrainData:
    """Data for training and validation.

    Attributes:
        images: folders of photographs, searched recursively. Without ``validation``, a fixed tenth
            of them is used for validation.
        validation: folders of other photographs for validation.
        pairs: detectors: file of ``tiepoints pairs`` for training, instead of randomly drawn pairs.
        validation_pairs: detectors: file of ``tiepoints pairs`` for validation, instead of pairs of
            the photographs for validation.
        patches: HardNet, HyNet, SOSNet: folder of PhotoTour or HPatches patches for training;
            ``images`` are then used for validation.
        reconstructions: descriptors: folders of COLMAP models with their images
            (``reconstructions.find_models``), whose tracks are half of the training pairs, except
            for the images for validation.
        validation_reconstructions: descriptors: folders of COLMAP models for validation; the score
            is then the mean of that on photographs and of ``tracks.correct_share``.
    """

    images: Folders
    validation: Folders | None = None
    pairs: str | Path | None = None
    validation_pairs: str | Path | None = None
    patches: str | Path | None = None
    reconstructions: Folders | None = None
    validation_reconstructions: Folders | None = None

    def photographs(self, *, log: bool = True) -> tuple[list[Path], list[Path]]:
        """List the photographs for training and validation.

        Args:
            log: log unusable images and the number of photographs.

        Raises:
            FileNotFoundError: no such folder.
            DataError: too few usable images, or images or reconstructions in both sets.
        """
        models = [
            {model.resolve() for folder in as_folders(folders) for model, _ in find_models(folder)}
            for folders in (self.reconstructions, self.validation_reconstructions)
        ]
        if both := models[0] & models[1]:
            raise DataError(
                f"{min(both)} is used for both training and validation; give other reconstructions "
                "for one of them"
            )
        if self.validation:
            training, held_out = (
                find_photos(as_folders(f), log=log) for f in (self.images, self.validation)
            )
            damaged = set(damaged_photos(held_out, log=log))
            held_out = [path for path in held_out if path not in damaged]
            if not training or not held_out:
                empty = self.images if not training else self.validation
                raise DataError(f"no usable images in {empty}")
            both = {path.resolve() for path in training} & {path.resolve() for path in held_out}
            if both:
                raise DataError(
                    f"{min(both)} is used for both training and validation; give disjoint folders"
                )
        else:
            photos = find_photos(as_folders(self.images), log=log)
            training, held_out = split_readable(photos, log=log)
        level = logging.INFO if log else logging.DEBUG
        validation = self._validation_images()
        kept = [path for path in training if path.resolve() not in validation]
        if not kept:
            raise DataError(
                "all images are of the reconstructions for validation; give other images"
            )
        if len(kept) < len(training):
            logger.log(
                level,
                "%d photographs are of the reconstructions for validation and not trained on",
                len(training) - len(kept),
            )
            training = kept
        logger.log(
            level, "%d photographs for training, %d for validation", len(training), len(held_out)
        )
        return training, held_out

    def scenes(self, held_out: Sequence[Path]) -> list[TrackScene]:
        """Read the reconstructions for training, without the pairs of images that are ``held_out``
        or in the reconstructions for validation.

        Raises:
            FileNotFoundError, ImportError, DataError: see ``read_scenes``.
        """
        if not self.reconstructions:
            return []
        excluded = {path.resolve() for path in held_out} | self._validation_images()
        return read_scenes(self.reconstructions, excluded=excluded)

    @cached_property
    def validation_scenes(self) -> list[TrackScene]:
        """The reconstructions for validation, read once.

        Raises:
            FileNotFoundError, ImportError, DataError: see ``read_scenes``.
        """
        folders = self.validation_reconstructions
        return read_scenes(as_folders(folders)) if folders else []

    def _validation_images(self) -> set[Path]:
        """The images of the reconstructions for validation."""
        return {path.resolve() for scene in self.validation_scenes for path in scene.images}


#: Arguments of a training that are data -> field of ``TrainData``.
DATA_ARGUMENTS = {
    "training_pairs" if name == "pairs" else name: name for name in TrainData.__dataclass_fields__
}


@dataclass(frozen=True)
class TrainJob:
    """Arguments of ``train``.

    Attributes:
        name: of the network.
        data: for training and validation.
        output: weights file.
        preset: name of the preset.
        init: initial weights (a name or a file); None: random.
        run: see ``RunOptions``.
        options: of the network.
        schedule: fields of ``FitSettings`` that replace those of the preset, unless None.
    """

    name: str
    data: TrainData
    output: Path
    preset: str
    init: str | Path | None
    run: RunOptions
    options: dict[str, Any]
    schedule: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that were given, by name, for the checkpoint: JSON values."""
        data = {name: getattr(self.data, field) for name, field in DATA_ARGUMENTS.items()}
        given = {"network": self.name, "preset": self.preset, "init": self.init}
        given |= {**data, **self.options, **self.schedule}
        return {key: plain(key, value) for key, value in given.items() if value is not None}


#: Arguments that are paths of files or folders, or lists of them.
_FOLDERS = ("images", "validation", "reconstructions", "validation_reconstructions")
PATHS = (*_FOLDERS, "training_pairs", "validation_pairs", "patches")


def plain(key: str, value: Any) -> Any:
    """An argument of ``train`` as a JSON value; paths are absolute."""
    if key in _FOLDERS:
        return [os.path.abspath(folder) for folder in as_folders(value)]
    if key in PATHS or (key in ("init", "detector", "descriptor") and Path(value).is_file()):
        return os.path.abspath(value)
    if isinstance(value, tuple | list):
        return [plain("", part) for part in value]
    return str(value) if isinstance(value, Path) else value


def as_folders(folders: Folders | None) -> list[Path]:
    """Convert one or more folders to a list."""
    if folders is None:
        return []
    return [Path(f) for f in ([folders] if isinstance(folders, str | Path) else folders)]


def choose(recipes: dict[str, R], preset: str) -> R:
    """Recipe of a preset.

    Raises:
        ValueError: unknown preset.
    """
    if preset not in recipes:
        raise ValueError(f"preset must be one of {', '.join(recipes)}; got {preset!r}")
    return recipes[preset]


def data_record(photos: Sequence[Path], *sources: str | Path | None) -> str:
    """Digest of the names, sizes and modification times of photographs and of other files and
    folders of training data; not of the folders they are in, so that the data may be moved.
    """
    others = [_stamps(Path(source)) for source in sources if source is not None]
    return json_digest([files_digest(photos), others])


def _stamps(source: Path) -> list[Any]:
    """Size and modification time of a file, or of the files in a folder except caches."""
    if not source.is_dir():
        return [file_stamp(source)]
    files = sorted(path for path in source.rglob("*") if path.suffix not in (".npy", ".json"))
    return [
        [path.relative_to(source).as_posix(), file_stamp(path)] for path in files if path.is_file()
    ]


def init_record(init: str | Path | None) -> dict[str, Any]:
    """Name and SHA-256 of initial weights."""
    name = "" if init is None else str(init)
    return {"init": Path(name).name, "init_sha256": digest(name) if name else None}


def check_output(output: Path, run: RunOptions) -> None:
    """Check that a training replaces no results of another one, unless requested.

    Raises:
        FileExistsError: there are weights or a checkpoint; the message names the options.
    """
    checkpoint = companion(output, "checkpoint")
    if run.overwrite:
        return
    if run.resume:
        if output.exists() and not checkpoint.exists():
            raise FileExistsError(
                f"{output} exists, but not {checkpoint.name} to resume from; use --overwrite "
                "(overwrite=True) to train again, or another output"
            )
        return
    for path in (output, checkpoint):
        if path.exists():
            raise FileExistsError(
                f"{path} exists; use --resume (resume=True) to continue its training, --overwrite "
                "(overwrite=True) to replace it, or another output"
            )


def with_schedule(settings: FitSettings, schedule: dict[str, Any]) -> FitSettings:
    """Replace the fields of the settings that are not None in ``schedule``.

    ``minutes`` without ``steps`` disables the steps of the preset.
    """
    changes = {name: value for name, value in schedule.items() if value is not None}
    if "minutes" in changes and "steps" not in changes:
        changes["steps"] = 0
    return dataclasses.replace(settings, **changes)


def initialized(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Create a network with weights drawn from ``seed``, in channels-last format."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def both_views(batch: dict[str, Tensor]) -> Tensor:
    """Concatenate the images of a and b of a batch: (2B,1,S,S)."""
    images = torch.cat([batch["image_a"], batch["image_b"]])
    return images.contiguous(memory_format=torch.channels_last)


def load_partial_state_dict(net: nn.Module, source: nn.Module, name: str) -> int:
    """Copy the tensors of ``source`` that have the same name and shape in ``net``.

    Args:
        net: changed in place.
        source: network to copy from.
        name: of the source, for the message.

    Returns:
        number of copied tensors.

    Raises:
        WeightsError: no such tensor.
    """
    own, other = net.state_dict(), source.state_dict()
    common = {k: v for k, v in other.items() if k in own and own[k].shape == v.shape}
    if not common:
        raise WeightsError(
            f"weights {name} have no layer in common with a {type(net).__name__}; start from "
            "weights of the same network"
        )
    net.load_state_dict({**own, **common})
    return len(common)


def fit_and_save(
    net: nn.Module,
    task: Task,
    settings: FitSettings,
    job: TrainJob,
    *,
    make_network: Callable[[], nn.Module],
    half: bool = False,
    prepare: Callable[[Any], None] | None = None,
) -> FitResult:
    """Train ``net`` and write the weights of the best validation to the output of the job.

    Args:
        net, task, settings: see ``Trainer``.
        job: arguments of the training.
        make_network: creates the network that is written.
        half: write the filters in half precision.
        prepare: called with the network before it is written.
    """

    def save_best(state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        best = make_network()
        best.load_state_dict(state)
        best.eval()
        if prepare is not None:
            prepare(best)
        content = with_program({**task.identity, "schedule": asdict(settings), **metadata})
        save(best, job.output, content, half=half)

    trainer = Trainer(
        net,
        dataclasses.replace(task, on_best=save_best, arguments=job.arguments),
        settings,
        companion(job.output, "checkpoint"),
        job.run,
        companion(job.output, "log"),
    )
    if trainer.best_state and not job.output.exists():  # deleted since
        best = {"step": trainer.best_step, task.score_name: trainer.best}
        trainer.unsaved = trainer.unsaved or best
    return trainer.fit()


def companion(output: Path, suffix: str) -> Path:
    """Path of the checkpoint, the logs or the pairs (``suffix``) of a training."""
    return output.with_name(f"{output.name}.{suffix}")
