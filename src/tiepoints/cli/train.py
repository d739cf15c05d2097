"""``tiepoints train`` and ``tiepoints pairs``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import (
    DeviceOption,
    JsonOption,
    fail,
    print_json,
    progress_wanted,
    user_errors,
)

Preset = Literal["default", "paper", "smoke", "msip", "corners"]


def disable_malloc_trim() -> None:
    """Disable trimming of freed memory in glibc, which takes a third of the training time for
    returning and zeroing memory in each step.
    """
    import ctypes

    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc's malloc.h: M_MMAP_MAX -4, M_TRIM_THRESHOLD -1
            libc.mallopt(-4, 0)
            libc.mallopt(-1, 2**31 - 1)


def train(
    network: Annotated[
        str,
        typer.Argument(
            help="Detectors keynet, keynet-tiny, rekd, rekd-light, sobelnet; descriptors hardnet, "
            "hynet, sosnet, desnet."
        ),
    ],
    images: Annotated[
        list[Path],
        typer.Option(
            help="Folder of photographs, searched recursively; repeatable. A tenth is held out for "
            "validation."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Weights file to write (.safetensors).")],
    preset: Annotated[
        Preset,
        typer.Option(
            help="paper: the published schedule; smoke: a few steps; msip: Key.Net with its "
            "published loss; corners: Key.Net localized at corners."
        ),
    ] = "default",
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Training time.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps, instead of --minutes.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that generate pairs.")] = 1,
    precision: Annotated[
        str | None,
        typer.Option(help="32-true, bf16-mixed, or auto: bf16-mixed if the device supports it."),
    ] = None,
    training_pairs: Annotated[
        Path | None, typer.Option(help="Detectors: pairs written by `tiepoints pairs`.")
    ] = None,
    patches: Annotated[
        Path | None,
        typer.Option(help="Descriptors: train on PhotoTour or HPatches patches."),
    ] = None,
    reconstructions: Annotated[
        list[Path] | None,
        typer.Option(help="Descriptors: folder of COLMAP models with their images; repeatable."),
    ] = None,
    validation_reconstructions: Annotated[
        list[Path] | None,
        typer.Option(help="Descriptors: folder of COLMAP models for validation; repeatable."),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(help="desnet: detector of its training keypoints, a name or a weights file."),
    ] = None,
    dim: Annotated[
        int | None, typer.Option(help="desnet: descriptor dimension, 128 (default) or 64.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="desnet: factor of the number of channels, 1 (default) to 4.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Initial weights, a name or a file.")] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of photographs for validation, instead of a tenth of --images; repeatable."
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="REKD: number of orientations (36, light 12).")
    ] = None,
    dims: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="REKD: number of fields of its three layers."),
    ] = None,
    device: DeviceOption = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 1,
    validate_every: Annotated[int | None, typer.Option(min=1, help="Steps.")] = None,
    save_every: Annotated[float, typer.Option(min=0.0, help="Seconds between checkpoints.")] = 60.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from OUTPUT.checkpoint.")
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare/--no-compare", help="Compare with the shipped weights at the end."),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Train a detector or a descriptor on a folder of images, without labels."""
    from ..training.loop import RunOptions
    from ..training.recipes import TrainData
    from ..training.recipes import train as run

    disable_malloc_trim()
    if steps is not None and minutes is not None:
        fail("give --steps or --minutes, not both")
    data = TrainData(
        images=images,
        validation=validation,
        pairs=training_pairs,
        patches=patches,
        reconstructions=reconstructions,
        validation_reconstructions=validation_reconstructions,
    )
    options: dict[str, Any] = {"group_size": group_size, "dims": dims}
    options |= {"detector": detector, "dim": dim, "width": width}
    stopped = f"stopped; resume with --resume ({output}.checkpoint)"
    try:
        with user_errors(stopped):
            result = run(
                network,
                data,
                output,
                preset=preset,
                init=init,
                run=RunOptions(device, devices, resume, progress_wanted(), workers, save_every),
                network=options,
                minutes=minutes,
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                seed=seed,
                precision=precision,
                validate_every=validate_every,
            )
    except typer.Exit:  # a RuntimeError too
        raise
    except RuntimeError as error:  # the loss is not finite
        fail(str(error))
    comparison = None
    if compare and output.is_file():
        from ..evaluation.compare import compare_trained

        with user_errors(stopped):
            comparison = compare_trained(network, output, data.photographs(log=False)[1])
    if as_json:
        content = {**dataclasses.asdict(result), "output": str(output)}
        print_json({**content, "comparison": None if comparison is None else comparison.to_json()})
        return
    typer.echo(
        f"{result.steps} steps, best validation {result.best:.3f} on held-out photographs at step "
        f"{result.best_step} -> {output}"
    )
    if comparison is not None:
        typer.echo(comparison.table())


def pairs(
    images: Annotated[Path, typer.Option(help="Folder of photographs.")],
    output: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    count: Annotated[int, typer.Option(min=1)] = 12_000,
    preset: Annotated[
        str, typer.Option(help="keynet-paper, keynet-code, rekd, turns, patches, dense or default.")
    ] = "default",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[int | None, typer.Option(min=16, help="Side of the images in pixels.")] = None,
    split: Annotated[
        str, typer.Option(help="Photographs to use: train, validation or all.")
    ] = "train",
    workers: Annotated[int, typer.Option(min=0)] = 2,
    preview: Annotated[
        Path | None, typer.Option(help="Image file that shows the first pairs.")
    ] = None,
) -> None:
    """Write training pairs to a file, to train several times on the same data."""
    from ..datasets.pairs import PairFile, write_pairs
    from ..datasets.pairs import preview as draw
    from ..datasets.synthetic import PRESETS, list_photos, split_photos, usable_photos

    if preset not in PRESETS:
        fail(f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    if split not in ("train", "validation", "all"):
        fail(f"--split must be train, validation or all; got {split!r}")
    with user_errors():
        photos, skipped = usable_photos(list_photos(images))
        if skipped:
            typer.echo(f"skipped: {len(skipped)} images, such as {skipped[0]}", err=True)
        if split != "all":
            photos = split_photos(photos)[split == "validation"]
        settings = PRESETS[preset]
        if size is not None:
            settings = dataclasses.replace(settings, size=size)
        write_pairs(output, photos, settings, count, seed=seed, workers=workers, preset=preset)
        if preview is not None:
            draw(PairFile(output)).save(preview)
    typer.echo(f"{count} pairs of {len(photos)} photographs -> {output}")
