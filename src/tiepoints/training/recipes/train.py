"""One entry for the training of every network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..loop import FitResult, RunOptions
from ..presets import DESCRIPTORS, MODELS, REKD_SIZES
from .common import TrainData
from .descriptors import train_dense, train_patches
from .detectors import train_oriented, train_score_map

NETWORKS = (*MODELS, *REKD_SIZES, *DESCRIPTORS, "desnet")
#: Options of networks: who takes them, and what of ``TrainData`` belongs to descriptors alone.
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
    """Train a network on folders of images and write the weights that validated best.

    Besides ``output`` there are ``<output>.checkpoint`` to resume from and ``<output>.log/`` with
    CSV and TensorBoard files.

    Args:
        name: ``keynet``, ``keynet-tiny``, ``sobelnet``, ``rekd``, ``rekd-light``, ``hardnet``,
            ``hynet``, ``sosnet`` or ``desnet``.
        data: see ``TrainData``; a path is a folder of images.
        output: weights file to write (.safetensors).
        preset: see ``training.presets``.
        init: weights to start from (a name or a file), of a network with the same layers; a REKD of
            another group size is interpolated (``REKD.regrouped``), a descriptor takes what fits.
        run: see ``RunOptions``.
        network: options of the network: ``group_size`` and ``dims`` of REKD; ``dim``, ``width`` and
            ``detector``, whose candidates it learns, of DesNet.
        schedule: fields of ``FitSettings``; None leaves the preset's value.

    Raises:
        FileNotFoundError, DataError: no folder, or fewer than two usable images.
        ValueError: unknown name, preset or option, or data that the network cannot use.
        WeightsError: ``init`` names no weights, or those of another network.
    """
    data = data if isinstance(data, TrainData) else TrainData(data)
    run = run or RunOptions()
    options = {key: value for key, value in (network or {}).items() if value is not None}
    check_arguments(name, data, options)
    output = Path(output)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent} to write {output.name} into")
    if name in MODELS:
        return train_score_map(name, data, output, preset, init, run, schedule)
    if name in REKD_SIZES:
        return train_oriented(name, data, output, preset, init, run, schedule, **options)
    if name in DESCRIPTORS:
        return train_patches(name, data, output, preset, init, run, schedule)
    return train_dense(data, output, preset, init, run, schedule, **options)


def check_arguments(name: str, data: TrainData, network: dict[str, Any]) -> None:
    """Refuse what does not belong to a network.

    Raises:
        ValueError: with the networks that the option is for.
    """
    if name not in NETWORKS:
        raise ValueError(f"the network must be one of {', '.join(NETWORKS)}; got {name!r}")
    for option in network:
        owners = _NETWORK_OPTIONS.get(option, ())
        if name not in owners:
            raise ValueError(f"{option} is an option of {' and '.join(owners) or 'no network'}")
    described = name in DESCRIPTORS or name == "desnet"
    if described and data.pairs is not None:
        raise ValueError(
            "training pairs are for detectors; a descriptor trains on images"
            + ", or on patches" * (name in DESCRIPTORS)
        )
    if data.patches is not None and name not in DESCRIPTORS:
        raise ValueError(f"patches are for descriptors ({', '.join(DESCRIPTORS)})")
    if (data.reconstructions or data.validation_reconstructions) and not described:
        raise ValueError("reconstructions are for descriptors (hardnet, hynet, sosnet, desnet)")
