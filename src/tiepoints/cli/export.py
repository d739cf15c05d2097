"""``tiepoints export``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..names import DESCRIPTOR, DETECTOR, EXPORT_OPSET
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

#: Measure of ``export.Exported.fidelity`` -> how it is printed.
FIDELITY = {
    "keypoints": "fraction of the keypoints of float32 found with eight bits",
    "cosine": "cosine of descriptors or maps to those of float32",
}


def export(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="File to write (.onnx).")],
    name: Annotated[
        str | None,
        typer.Argument(
            help="For a network alone: keynet, sobelnet, desnet, hardnet, ... or a weights file."
        ),
    ] = None,
    form: Annotated[
        Literal["network", "pipeline", "colmap"] | None,
        typer.Option(
            help="network: a network alone; pipeline: from the image and the number of keypoints "
            "to positions, scales, scores and descriptors; colmap: a pipeline that COLMAP runs in "
            "place of ALIKED (default: network if one is named, else pipeline)."
        ),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="With the eight-bit networks of the package, or of tiepoints quantize."
        ),
    ] = False,
    opset: Annotated[
        int, typer.Option(help="Version of the ONNX operator set, 18 to 21.")
    ] = EXPORT_OPSET,
    detector: DetectorOption = DETECTOR,
    descriptor: DescriptorOption = DESCRIPTOR,
    single_scale: SingleScaleOption = False,
    per_scale: PerScaleOption = None,
    pyramid_levels: PyramidLevelsOption = None,
    upsampled_levels: UpsampledLevelsOption = None,
    nms_size: NmsSizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export a network, or a detector and descriptor with all steps between, as one ONNX file for
    images of any size.

    The file is written only if ONNX Runtime computes with it what torch computes. REKD and AffNet
    cannot be exported, and the keypoints of a pipeline are upright (no orientations).
    """
    if form == "network" and name is None:
        fail("--form network requires the name of a network, such as: tiepoints export desnet")
    if form in ("pipeline", "colmap") and name is not None:
        fail(f"--form {form} takes --detector and --descriptor, and not {name!r}")
    if name is not None:
        for given in ("detector", "descriptor"):
            source = context.get_parameter_source(given)
            if source is not None and source.name != "DEFAULT":
                fail(f"--{given} is an option of a pipeline; give it or the network {name}")
    options = extract_options(context, precision="int8" if int8 else "float32")
    from ..export import export_network, export_pipeline

    with user_errors():
        if name is not None:
            result = export_network(name, output, int8=int8, opset=opset)
        else:
            result = export_pipeline(options, output, form=form or "pipeline", opset=opset)
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    for measure, value in (result.fidelity or {}).items():
        what = FIDELITY[measure]
        typer.echo(f"{what}: {value:.4f}")
    typer.echo(f"{result.form}, {result.size / 1e6:.2f} MB -> {result.path}")
