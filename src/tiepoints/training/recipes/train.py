"""Entry point for the training of all networks."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ...files import Lock
from ..loop import FitResult, RunOptions
from ..presets import DESCRIPTORS, MODELS, REKD_SIZES
from .common import TrainData, TrainJob, check_output
from .descriptors import train_dense, train_patches
from .detectors import train_oriented, train_score_map

NETWORKS = (*MODELS, *REKD_SIZES, *DESCRIPTORS, "desnet")
#: Options of networks, and the networks that have them.
_NETWORK_OPTIONS = {
    "group_size": tuple(REKD_SIZES),
    "dims": tuple(REKD_SIZES),
    "detector": ("desnet",),
    "dim": ("desnet",),
    "width": ("desnet",),
}


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
        name: ``keynet``, ``keynet-tiny``, ``sobelnet``, ``rekd``, ``rekd-light``, ``hardnet``,
            ``hynet``, ``sosnet`` or ``desnet``.
        data: see ``TrainData``; a path is a folder of images.
        output: weights file to write (.safetensors).
        preset: see ``training.presets``.
        init: initial weights (a name or a file) of a network with the same layers; a REKD of
            another group size is interpolated (``REKD.regrouped``), of a descriptor all layers with
            the same name and shape are used.
        run: see ``RunOptions``.
        network: options of the network: ``group_size`` and ``dims`` of REKD; ``dim``, ``width`` and
            ``detector`` (of the candidates) of DesNet.
        schedule: fields of ``FitSettings``; None: the preset's value.

    Raises:
        FileNotFoundError: no such folder.
        FileExistsError: there are weights at ``output``; see ``RunOptions.overwrite`` and
            ``resume``.
        DataError: fewer than two usable images, or another run is writing ``output``.
        OSError: the weights cannot be written; the checkpoint, if written, resumes.
        ValueError: unknown name, preset or option, or data that the network cannot use.
        WeightsError: ``init`` is not a weights file, or one of another network.
    """
    data = data if isinstance(data, TrainData) else TrainData(data)
    run = run or RunOptions()
    options = {key: value for key, value in (network or {}).items() if value is not None}
    check_arguments(name, data, options)
    output = Path(output)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent} to write {output.name} into")
    job = TrainJob(data, output, preset, init, run, schedule)
    # of several processes, one per device, the first holds the lock
    first = all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "LOCAL_RANK"))
    with Lock(output) if first else nullcontext():
        check_output(output, run)
        return _train(name, job, options)


def _train(name: str, job: TrainJob, options: dict[str, Any]) -> FitResult:
    if name in MODELS:
        return train_score_map(name, job)
    if name in REKD_SIZES:
        return train_oriented(name, job, **options)
    if name in DESCRIPTORS:
        return train_patches(name, job)
    return train_dense(job, **options)


def check_arguments(name: str, data: TrainData, network: dict[str, Any]) -> None:
    """Check that data and options are suitable for a network.

    Raises:
        ValueError: they are not; the message names the suitable networks.
    """
    if name not in NETWORKS:
        raise ValueError(f"the network must be one of {', '.join(NETWORKS)}; got {name!r}")
    for option in network:
        networks = _NETWORK_OPTIONS.get(option, ())
        if name not in networks:
            raise ValueError(f"{option} is an option of {' and '.join(networks) or 'no network'}")
    is_descriptor = name in DESCRIPTORS or name == "desnet"
    if is_descriptor and data.pairs is not None:
        raise ValueError(
            "training pairs are for detectors; a descriptor trains on images"
            + ", or on patches" * (name in DESCRIPTORS)
        )
    if data.patches is not None and name not in DESCRIPTORS:
        raise ValueError(f"patches are for descriptors ({', '.join(DESCRIPTORS)})")
    if (data.reconstructions or data.validation_reconstructions) and not is_descriptor:
        raise ValueError("reconstructions are for descriptors (hardnet, hynet, sosnet, desnet)")
