"""What every recipe shares: the data, the output files, the weights to start from."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ...datasets.synthetic import list_photos, split_photos, usable_photos
from ...errors import DataError, WeightsError
from ...weights import save
from ..loop import FitResult, FitSettings, RunOptions, Task, Trainer

logger = logging.getLogger(__name__)
#: A folder, or several.
Folders: TypeAlias = str | Path | Sequence[str | Path]
R = TypeVar("R")
#: Images that cannot be used are named up to this number.
NAMED = 10


@dataclass(frozen=True)
class TrainData:
    """What a network is trained and validated on.

    Attributes:
        images: folders of photographs, searched recursively. Without ``validation`` a tenth of them
            is held out to validate on, always the same one.
        validation: folders of other photographs to validate on.
        pairs: detectors: file of ``tiepoints pairs`` to train on instead of pairs made on the fly.
        patches: HardNet, HyNet, SOSNet: folder of PhotoTour or HPatches patches to train on;
            ``images`` then serve to validate.
        reconstructions: descriptors: folders of COLMAP models with their images
            (``reconstructions.find_models``), whose tracks are half of the pairs.
        validation_reconstructions: the same to validate on: the validation is then the mean of that
            of held-out photographs and of the share of keypoints that are matched in agreement with
            the models' cameras (``tracks.correct_share``).
    """

    images: Folders
    validation: Folders | None = None
    pairs: str | Path | None = None
    patches: str | Path | None = None
    reconstructions: Folders | None = None
    validation_reconstructions: Folders | None = None

    def photographs(self, *, log: bool = True) -> tuple[list[Path], list[Path]]:
        """Photographs to train on and to validate on; those that cannot be used are logged.

        Raises:
            FileNotFoundError, DataError: no folder, or too few usable images.
        """
        if self.validation:
            training, held_out = (_usable(f, log) for f in (self.images, self.validation))
            if not training or not held_out:
                empty = self.images if not training else self.validation
                raise DataError(f"no usable images in {empty}")
            both = {path.resolve() for path in training} & {path.resolve() for path in held_out}
            if both:
                raise DataError(
                    f"{min(both)} is among the images to train on and to validate on; give "
                    "disjoint folders"
                )
        else:
            training, held_out = split_photos(_usable(self.images, log))
        level = logging.INFO if log else logging.DEBUG
        logger.log(
            level, "%d photographs to train on, %d to validate on", len(training), len(held_out)
        )
        return training, held_out


def as_folders(folders: Folders | None) -> list[Path]:
    """A folder or several as a list."""
    if folders is None:
        return []
    return [Path(f) for f in ([folders] if isinstance(folders, str | Path) else folders)]


def _usable(folders: Folders, log: bool) -> list[Path]:
    found = [photo for folder in as_folders(folders) for photo in list_photos(folder)]
    photos, refused = usable_photos(found)
    if log:
        for line in refused[:NAMED]:
            logger.warning("skipped: %s", line)
        if len(refused) > NAMED:
            logger.warning("skipped: %d more images", len(refused) - NAMED)
    return photos


def choose(recipes: dict[str, R], preset: str) -> R:
    """The recipe of a preset.

    Raises:
        ValueError: an unknown preset.
    """
    if preset not in recipes:
        raise ValueError(f"preset must be one of {', '.join(recipes)}; got {preset!r}")
    return recipes[preset]


def with_schedule(settings: FitSettings, schedule: dict[str, Any]) -> FitSettings:
    """Settings with the fields that the caller chose; minutes count only where the preset's steps
    do not.
    """
    chosen = {name: value for name, value in schedule.items() if value is not None}
    if "minutes" in chosen and "steps" not in chosen:
        chosen["steps"] = 0
    return dataclasses.replace(settings, **chosen)


def initialized(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network drawn from ``seed``, channels last."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def both_views(batch: dict[str, Tensor]) -> Tensor:
    """Both images of every pair, (2B,1,S,S), those of a first."""
    images = torch.cat([batch["image_a"], batch["image_b"]])
    return images.contiguous(memory_format=torch.channels_last)


def load_partial_state_dict(net: nn.Module, source: nn.Module, name: str) -> int:
    """Copy every tensor of ``source`` that ``net`` has by the same name and shape; returns their
    number.

    Raises:
        WeightsError: there is none.
    """
    own, other = net.state_dict(), source.state_dict()
    common = {k: v for k, v in other.items() if k in own and own[k].shape == v.shape}
    if not common:
        raise WeightsError(
            f"weights {name} have no layer in common with a {type(net).__name__}; start from "
            "weights of its own kind"
        )
    net.load_state_dict({**own, **common})
    return len(common)


def fit_and_save(
    net: nn.Module,
    task: Task,
    settings: FitSettings,
    output: Path,
    run: RunOptions,
    *,
    make_network: Callable[[], nn.Module],
    half: bool = False,
    prepare: Callable[[Any], None] | None = None,
) -> FitResult:
    """Train ``net`` and write the weights that validated best to ``output``; the checkpoint and the
    logs are ``output`` with ``.checkpoint`` and ``.log`` appended.

    Args:
        make_network: makes the network that is written.
        half: write the filters in half precision.
        prepare: completes the network before it is written.
    """

    def save_best(state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        best = make_network()
        best.load_state_dict(state)
        best.eval()
        if prepare is not None:
            prepare(best)
        content = {**task.identity, "schedule": asdict(settings), **metadata}
        save(best, output, content, half=half)

    trainer = Trainer(
        net,
        dataclasses.replace(task, on_best=save_best),
        settings,
        output.with_name(output.name + ".checkpoint"),
        run,
        output.with_name(output.name + ".log"),
    )
    return trainer.fit()
