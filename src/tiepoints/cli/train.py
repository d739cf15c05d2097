"""``tiepoints train`` and ``tiepoints pairs``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..names import AFFINE_SHAPES, PAIR_PRESETS
from .common import (
    DeviceOption,
    JsonOption,
    fail,
    print_json,
    progress_wanted,
    user_errors,
)

Preset = Literal["default", "paper", "smoke", "msip", "corners"]
Handcrafted = Literal["both", "first", "second", "none"]
MsipForm = Literal["paper", "code"]
#: Parameters of ``train`` that do not determine its result; a checkpoint contains the others.
RUN_PARAMETERS = (
    *("output", "workers", "device", "devices", "save_every", "resume", "overwrite"),
    *("compare", "as_json"),
)


def _numbers(option: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
    """Parse a comma-separated list of numbers."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        fail(f"{option} must be comma-separated numbers, got {text!r}")


def train(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Weights file to write (.safetensors).")],
    network: Annotated[
        str | None,
        typer.Argument(
            help="Detectors keynet, keynet-light, keynet-tiny, rekd, rekd-light, sobelnet; "
            "descriptors hardnet, hardnet-light, hardnet-context, hynet, sosnet, desnet; affine "
            "shapes affnet. Not needed with --resume."
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of photographs, searched recursively; repeatable. A tenth is held out for "
            "validation. Not needed with --resume."
        ),
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(
            help="default; paper: the published data, loss and schedule; smoke: some minutes, to "
            "see that a folder trains; msip: Key.Net with its published loss; corners: Key.Net "
            "localized at corners."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Training time (default: 30), including the reading of the photographs and the "
            "validations; the comparison at the end takes additional time.",
        ),
    ] = None,
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
    validation_pairs: Annotated[
        Path | None,
        typer.Option(help="Detectors: pairs for validation, written by `tiepoints pairs`."),
    ] = None,
    num_training_data: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of different training pairs, or for patch descriptors of pairs of views, "
            "written to OUTPUT.pairs first (paper: 9000; hardnet-light: 3000; default: new pairs "
            "in every step).",
        ),
    ] = None,
    patch_size: Annotated[
        int | None,
        typer.Option(min=32, help="Detectors: side of the training pairs in pixels (192)."),
    ] = None,
    max_angle: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=180.0, help="Detectors: largest rotation of the pairs in degrees."
        ),
    ] = None,
    filters: Annotated[
        int | None, typer.Option(min=1, help="keynet: filters of each learned block (8).")
    ] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="keynet: learned blocks (3).")] = None,
    levels: Annotated[
        int | None, typer.Option(min=1, help="keynet: pyramid levels inside the network (3).")
    ] = None,
    kernel: Annotated[
        int | None, typer.Option(min=1, help="keynet: odd side of the learned filters (5).")
    ] = None,
    handcrafted: Annotated[
        Handcrafted | None,
        typer.Option(help="keynet: order of the handcrafted filters (both)."),
    ] = None,
    loss: Annotated[
        MsipForm | None,
        typer.Option(
            help="keynet, keynet-tiny with preset paper or msip: M-SIP as in the paper, or as in "
            "the published code."
        ),
    ] = None,
    windows: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="M-SIP: window sides in pixels (8,16,24,32,40)."),
    ] = None,
    window_weights: Annotated[
        str | None,
        typer.Option(
            metavar="X,X,...", help="M-SIP: weights of the windows (256,64,16,4,1 for these)."
        ),
    ] = None,
    base: Annotated[
        float | None, typer.Option(min=1.0, help="M-SIP: base of the spatial softmax (e).")
    ] = None,
    patches: Annotated[
        Path | None,
        typer.Option(help="Descriptors: train on PhotoTour or HPatches patches."),
    ] = None,
    reconstructions: Annotated[
        list[Path] | None,
        typer.Option(
            help="Descriptors, affnet: folder of COLMAP models with their images; repeatable."
        ),
    ] = None,
    validation_reconstructions: Annotated[
        list[Path] | None,
        typer.Option(
            help="Descriptors, affnet: folder of COLMAP models for validation; repeatable."
        ),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(help="desnet: detector of its training keypoints, a name or a weights file."),
    ] = None,
    descriptor: Annotated[
        str | None,
        typer.Option(
            help="affnet: trained patch descriptor of its loss, a name or a weights file "
            "(hardnet-light)."
        ),
    ] = None,
    dim: Annotated[
        int | None, typer.Option(help="desnet: descriptor dimension, 128 (default) or 64.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="desnet: factor of the number of channels, 1 (default) to 4.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Patch descriptors: trained descriptor to be approached, a name or a weights "
            "file, or none (hardnet-light: hardnet)."
        ),
    ] = None,
    on_device: Annotated[
        bool | None,
        typer.Option(
            "--on-device",
            help="Descriptors, affnet: keep all images in the memory of the device and draw the "
            "training data there; far faster on a GPU.",
        ),
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
    orientation_balance: Annotated[
        float | None,
        typer.Option(min=0.0, help="REKD: weight of the orientation loss (600; paper: 100)."),
    ] = None,
    device: DeviceOption = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 1,
    validate_every: Annotated[int | None, typer.Option(min=1, help="Steps.")] = None,
    save_every: Annotated[float, typer.Option(min=0.0, help="Seconds between checkpoints.")] = 60.0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume from OUTPUT.checkpoint, which also contains the other options.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the weights of an earlier training.")
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare/--no-compare", help="Compare with the shipped weights at the end."),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Train a detector or a descriptor on a folder of images, without labels."""
    from ..memory import keep_freed
    from ..training.loop import RunOptions
    from ..training.recipes.train import data_of, resumed_arguments, train_from

    keep_freed(large_blocks=True)
    if steps is not None and minutes is not None:
        fail("give --steps or --minutes, not both")
    if resume and overwrite:
        fail("give --resume or --overwrite, not both")
    # an option that may be repeated is an empty list if it is not given
    arguments = {
        key: value
        for key, value in context.params.items()
        if key not in RUN_PARAMETERS and value not in ([], ())
    }
    arguments["windows"] = _numbers("--windows", windows, int)
    arguments["window_weights"] = _numbers("--window-weights", window_weights, float)

    def stopped() -> str:
        checkpoint = Path(f"{output}.checkpoint")
        if checkpoint.is_file():
            return f"stopped; resume with --resume ({checkpoint})"
        return "stopped before the first checkpoint; run the same command again"

    try:
        with user_errors(stopped):
            if resume:
                arguments = resumed_arguments(output, arguments)
            options = RunOptions(
                device, devices, resume, progress_wanted(), workers, save_every, overwrite
            )
            result = train_from(arguments, output, options)
    except typer.Exit:  # a RuntimeError too
        raise
    except RuntimeError as error:  # the loss is not finite
        fail(str(error), stopped=stopped)
    comparison, held_out = None, []
    if compare and output.is_file():
        from ..evaluation.compare import compare_trained

        with user_errors(stopped):
            held_out = data_of(arguments).photographs(log=False)[1]
            comparison = compare_trained(arguments["network"], output, held_out)
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
    elif compare and output.is_file() and arguments["network"] not in AFFINE_SHAPES:
        typer.echo(
            f"not compared with the shipped weights: {len(held_out)} held-out photographs, and at "
            "least two with texture are needed; give more photographs, or others with --validation"
        )


def pairs(
    images: Annotated[Path, typer.Option(help="Folder of photographs.")],
    output: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    count: Annotated[int, typer.Option(min=1, help="Number of pairs to train on.")] = 9_000,
    validation: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also write this number of pairs of the photographs for validation, to "
            "NAME-validation.safetensors.",
        ),
    ] = 0,
    preset: Annotated[str, typer.Option(help=f"{', '.join(PAIR_PRESETS)}.")] = "default",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[int | None, typer.Option(min=16, help="Side of the images in pixels.")] = None,
    split: Annotated[
        str, typer.Option(help="Photographs to use: train, validation or all.")
    ] = "train",
    workers: Annotated[int, typer.Option(min=0)] = 2,
    preview: Annotated[
        Path | None, typer.Option(help="Image file that shows the first pairs.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of other pairs.")
    ] = False,
) -> None:
    """Write training pairs to a file, to train several times on the same data."""
    from ..datasets.pairs import PairFile, contains_pairs, write_pairs
    from ..datasets.pairs import preview as draw
    from ..datasets.synthetic import PRESETS, find_photos, split_readable

    if preset not in PAIR_PRESETS:
        fail(f"--preset must be one of {', '.join(PAIR_PRESETS)}; got {preset!r}")
    if split not in ("train", "validation", "all"):
        fail(f"--split must be train, validation or all; got {split!r}")
    if validation and split != "train":
        fail("--validation needs --split train, because both sets must be disjoint")
    with user_errors():
        photos = find_photos([images])
        settings = PRESETS[preset]
        if size is not None:
            settings = dataclasses.replace(settings, size=size)
        training, held_out = (photos, []) if split == "all" else split_readable(photos)
        sets = [(output, held_out if split == "validation" else training, count)]
        if validation:
            path = output.with_name(f"{output.stem}-validation{output.suffix}")
            sets.append((path, held_out, validation))
        for path, used, number in sets:
            same = contains_pairs(path, used, settings, number, seed, preset)
            if path.exists() and not same and not overwrite:
                fail(f"{path} has other pairs; give another --output or --overwrite")
        for path, used, number in sets:
            write_pairs(
                *(path, used, settings, number),
                seed=seed,
                workers=workers,
                preset=preset,
                progress=progress_wanted(),
                keep=not overwrite,
            )
            typer.echo(f"{number} pairs of {len(used)} photographs -> {path}")
        if preview is not None:
            draw(PairFile(output)).save(preview)
