"""Entry point for the training of all networks."""

from __future__ import annotations

import dataclasses
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ...errors import WeightsError
from ...files import Lock, require
from ..loop import FitResult, FitSettings, RunOptions, read_checkpoint
from ..presets import DESCRIPTORS, MODELS, REKD_SIZES
from .affine import train_shapes
from .common import DATA_ARGUMENTS, PATHS, TrainData, TrainJob, check_output, companion, plain
from .descriptors import train_dense, train_patches
from .detectors import train_oriented, train_score_map
from .options import NETWORK_OPTIONS, check_options

NETWORKS = (*MODELS, *REKD_SIZES, *DESCRIPTORS, "desnet", "affnet")
#: Arguments of ``train`` other than data, options and schedule.
_MAIN_ARGUMENTS = ("network", "preset", "init")


def train(
    name: str,
    data: TrainData | str | Path,
    output: str | Path,
    *,
    preset: str = "default",
    init: str | Path | None = None,
    run: RunOptions | None = None,
    network: dict[str, Any] | None = None,
    **schedule: Any,
) -> FitResult:
    """Train a network on folders of images and write the weights of the best validation.

    Also writes ``<output>.checkpoint`` to resume from, and CSV and TensorBoard files in
    ``<output>.log/``.

    Args:
        name: ``keynet``, ``keynet-light``, ``keynet-tiny``, ``sobelnet``, ``rekd``, ``rekd-light``,
            ``hardnet``, ``hardnet-light``, ``hardnet-context``, ``hynet``, ``sosnet``, ``desnet``
            or ``affnet``.
        data: see ``TrainData``; a path is a folder of images.
        output: weights file to write, with the suffix ``.safetensors``.
        preset: see ``training.presets``.
        init: initial weights (a name or a file) of a network with the same layers; a REKD of
            another group size is interpolated (``REKD.regrouped``), the levels of a Key.Net are
            merged for ``keynet-light`` (``KeyNet.one_level``), of a descriptor all layers with the
            same name and shape are used.
        run: see ``RunOptions``.
        network: options of the network, see ``options.NETWORK_OPTIONS`` and docs/training.md; None:
            the preset's value.
        schedule: fields of ``FitSettings``; None: the preset's value.

    Raises:
        FileNotFoundError: no such folder.
        FileExistsError: there are weights at ``output``; see ``RunOptions.overwrite`` and
            ``resume``.
        DataError: fewer than two usable images, or another run is writing ``output``.
        OSError: the weights cannot be written; the checkpoint, if written, resumes.
        ValueError: unknown name, preset or option, or data that the network cannot use.
        WeightsError: ``init`` is not a weights file, or one of another network.
        ImportError: Lightning Fabric is missing.
    """
    data = data if isinstance(data, TrainData) else TrainData(data)
    run = run or RunOptions()
    if run.started is None:
        run = dataclasses.replace(run, started=time.monotonic())
    options = {key: value for key, value in (network or {}).items() if value is not None}
    check_arguments(name, data, options)
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"the output must be a .safetensors file, got {output.name}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent} to write {output.name} into")
    require("lightning.fabric", extra="train", purpose="training")  # before images are read
    job = TrainJob(name, data, output, preset, init, run, options, schedule)
    # of several processes, one per device, the first holds the lock
    first = all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "LOCAL_RANK"))
    with Lock(output) if first else nullcontext():
        check_output(output, run)
        return _train(name, job)


def _train(name: str, job: TrainJob) -> FitResult:
    if name in MODELS:
        return train_score_map(name, job)
    if name in REKD_SIZES:
        return train_oriented(name, job)
    if name in DESCRIPTORS:
        return train_patches(name, job)
    if name == "affnet":
        return train_shapes(job)
    return train_dense(job, **job.options)


def resumed_arguments(output: str | Path, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the training of a checkpoint, from the checkpoint.

    Args:
        output: weights file of the training.
        given: arguments by name, as in ``train_from``; None: not given.

    Returns:
        those of the checkpoint, with the given paths, because files may have been moved; ``given``
        if there is no checkpoint, or one of an earlier version without arguments.

    Raises:
        WeightsError: the checkpoint is damaged, or an argument contradicts it.
    """
    given = {key: value for key, value in given.items() if value is not None}
    path = companion(Path(output), "checkpoint")
    stored = read_checkpoint(path).get("arguments", {}) if path.is_file() else {}
    if not stored:
        return given
    changed = [
        f"{key} was {stored.get(key)!r}, now {plain(key, value)!r}"
        for key, value in given.items()
        if key not in PATHS and stored.get(key) != plain(key, value)
    ]
    if changed:
        raise WeightsError(
            f"{path} belongs to another training ({'; '.join(changed)}); omit these options, or "
            "start over without --resume"
        )
    return {**stored, **{key: plain(key, value) for key, value in given.items() if key in PATHS}}


def train_from(arguments: dict[str, Any], output: str | Path, run: RunOptions) -> FitResult:
    """Call ``train`` with arguments by name: ``network``, ``preset``, ``init``, the fields of
    ``TrainData`` (``pairs`` as ``training_pairs``), options of the network, and the schedule.

    Raises:
        ValueError: no network or images, or an unknown name; others as ``train``.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    if "network" not in given or "images" not in given:
        checkpoint = companion(Path(output), "checkpoint")
        raise ValueError(
            f"a training needs a network and --images (there is no checkpoint {checkpoint} to "
            "resume)"
        )
    network = {key: given.pop(key) for key in NETWORK_OPTIONS if key in given}
    main = {key: given.pop(key) for key in _MAIN_ARGUMENTS if key in given}
    data = data_of(given)
    rest = {key: value for key, value in given.items() if key not in DATA_ARGUMENTS}
    schedule = {key: value for key, value in rest.items() if key in FitSettings.__annotations__}
    if unknown := rest.keys() - schedule.keys():
        raise ValueError(f"unknown argument of a training: {min(unknown)}")
    name = main.pop("network")
    return train(name, data, output, run=run, network=network, **main, **schedule)


def data_of(arguments: dict[str, Any]) -> TrainData:
    """The data of arguments by name, see ``train_from``."""
    fields = {field: arguments.get(name) for name, field in DATA_ARGUMENTS.items()}
    return TrainData(**fields)  # type: ignore[arg-type]


def check_arguments(name: str, data: TrainData, network: dict[str, Any]) -> None:
    """Check that data and options are suitable for a network.

    Raises:
        ValueError: they are not; the message names the suitable networks.
    """
    if name not in NETWORKS:
        raise ValueError(f"the network must be one of {', '.join(NETWORKS)}; got {name!r}")
    check_options(name, network)
    is_detector = name in (*MODELS, *REKD_SIZES)
    if not is_detector and (data.pairs is not None or data.validation_pairs is not None):
        raise ValueError(
            f"training pairs are for detectors; {name} trains on images"
            + ", or on patches" * (name in DESCRIPTORS)
        )
    if data.patches is not None and name not in DESCRIPTORS:
        raise ValueError(f"patches are for descriptors ({', '.join(DESCRIPTORS)})")
    if (data.reconstructions or data.validation_reconstructions) and is_detector:
        raise ValueError(
            f"reconstructions are for {', '.join(DESCRIPTORS)}, desnet and affnet, not for {name}"
        )
