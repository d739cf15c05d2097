"""``tiepoints backends`` and ``tiepoints quantize``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import JsonOption, print_json, progress_wanted, user_errors

Calibration = Literal["percentile", "minmax", "entropy"]


def backends(
    network: Annotated[
        str, typer.Option(help="Network to time: keynet, sobelnet, hardnet, ...")
    ] = "desnet",
    as_json: JsonOption = False,
) -> None:
    """List what can run the networks on this computer, and time each backend and precision on a
    network.
    """
    from ..jobs.backends import describe_backends

    with user_errors():
        found = describe_backends(network)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    for name, version in found.backends.items():
        typer.echo(f"{name:12s} {version}")
    for name, command in found.missing.items():
        typer.echo(f"{name:12s} not installed: {command}")
    features = [name for name, there in found.processor.items() if there]
    typer.echo(f"processor    {', '.join(features) or 'none of the known features'}")
    count, _, height, width = found.input
    images = f"{count} patches" if count > 1 else "an image"
    typer.echo(f"{found.network}, {images} of {width} x {height} pixels, {found.threads} threads:")
    for name, value in sorted(found.milliseconds.items(), key=lambda item: item[1]):
        typer.echo(f"  {name:22s} {value:7.1f} ms")
    for name, reason in found.failed.items():
        typer.echo(f"  {name:22s} {reason}")


def quantize(
    weights: Annotated[
        str, typer.Argument(help="An embedded network, a weights file or an official checkpoint.")
    ],
    images: Annotated[
        list[Path],
        typer.Option(help="Folder of photographs like those to be processed (repeatable)."),
    ],
    output: Annotated[Path, typer.Option(help="File to write (.onnx).")],
    photos: Annotated[
        int,
        typer.Option(min=4, help="Number of photographs, a quarter of which checks the result."),
    ] = 48,
    calibration: Annotated[
        Calibration, typer.Option(help="How the ranges of the activations are chosen.")
    ] = "percentile",
    as_json: JsonOption = False,
) -> None:
    """Write an eight-bit network for --detector or --descriptor, calibrated on photographs."""
    from ..jobs.quantize import quantize

    with user_errors():
        report = quantize(
            weights,
            images,
            output,
            photos=photos,
            calibration=calibration,
            progress=progress_wanted(),
        )
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    typer.echo(
        f"{report.network} -> {report.output} ({report.size} bytes); {report.measure} with "
        f"float32 on {report.held_out} held-out photographs: mean {report.mean:.5f}, worst "
        f"{report.worst:.4f}"
    )
