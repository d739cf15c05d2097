"""``tiepoints export``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..names import DESCRIPTOR, DETECTOR
from .common import (
    DescriptorOption,
    DetectorOption,
    JsonOption,
    NmsSizeOption,
    PerScaleOption,
    PyramidLevelsOption,
    SingleScaleOption,
    UpsampledLevelsOption,
    extract_options,
    fail,
    print_json,
    user_errors,
)


def export(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="File to write (.onnx).")],
    name: Annotated[
        str | None,
        typer.Argument(help="For a network alone: keynet, desnet, hardnet, ... or a weights file."),
    ] = None,
    form: Annotated[
        Literal["network", "pipeline"] | None,
        typer.Option(
            help="network: a network alone; pipeline: from the image and the number of keypoints "
            "to positions, scales, scores and descriptors (default: network if one is named)."
        ),
    ] = None,
    detector: DetectorOption = DETECTOR,
    descriptor: DescriptorOption = DESCRIPTOR,
    single_scale: SingleScaleOption = False,
    per_scale: PerScaleOption = False,
    pyramid_levels: PyramidLevelsOption = None,
    upsampled_levels: UpsampledLevelsOption = None,
    nms_size: NmsSizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export a network, or a detector and descriptor with all steps between, as one ONNX file for
    images of any size.

    The file is written only if ONNX Runtime computes with it what torch computes. Other networks
    than REKD, and upright keypoints only.
    """
    if form == "network" and name is None:
        fail("--form network requires the name of a network, such as: tiepoints export desnet")
    if form == "pipeline" and name is not None:
        fail(f"--form pipeline takes --detector and --descriptor, and not {name!r}")
    options = extract_options(context)
    from ..export import export_network, export_pipeline

    with user_errors():
        if name is not None:
            result = export_network(name, output)
        else:
            result = export_pipeline(options, output)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        typer.echo(f"{result.form}, {result.size / 1e6:.2f} MB -> {result.path}")
