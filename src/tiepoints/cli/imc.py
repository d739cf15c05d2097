"""``tiepoints imc``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..names import DESCRIPTOR, DETECTOR, NUM_KEYPOINTS
from .common import (
    AffineOption,
    BackendOption,
    CutRatioOption,
    DescriptorOption,
    DetectorOption,
    DeviceOption,
    MaxSizeOption,
    MemoryOption,
    NmsSizeOption,
    OfficialOption,
    OrientationOption,
    PerScaleOption,
    PrecisionOption,
    PyramidLevelsOption,
    SingleScaleOption,
    UprightOption,
    UpsampledLevelsOption,
    WorkersOption,
    extract_options,
    fail,
    finish,
    progress_wanted,
    user_errors,
)


def imc(
    context: typer.Context,
    images: Annotated[
        Path,
        typer.Argument(
            help="Folder of the benchmark's images: DATASET/SEQUENCE/*.jpg, or with set_100/images."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the submission.")],
    label: Annotated[str, typer.Option(help="Name: lower case letters, digits, '-' and '.'.")],
    num_keypoints: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of keypoints per image; the categories are 2048 and 8000."
        ),
    ] = NUM_KEYPOINTS,
    detector: DetectorOption = DETECTOR,
    descriptor: DescriptorOption = DESCRIPTOR,
    orientation: OrientationOption = None,
    affine: AffineOption = "none",
    upright: UprightOption = False,
    single_scale: SingleScaleOption = False,
    per_scale: PerScaleOption = None,
    official: OfficialOption = False,
    pyramid_levels: PyramidLevelsOption = None,
    upsampled_levels: UpsampledLevelsOption = None,
    nms_size: NmsSizeOption = None,
    cut_ratio: CutRatioOption = None,
    matches: Annotated[
        bool,
        typer.Option("--matches", help="Add matches, verified by a fundamental matrix."),
    ] = False,
    ratio: Annotated[
        float,
        typer.Option(
            min=0.1, max=1.0, help="Maximum ratio of nearest to second distance; 1 = off."
        ),
    ] = 0.95,
    threshold: Annotated[
        float, typer.Option(min=0.0, help="Maximum error of an inlier in pixels.")
    ] = 0.5,
    max_size: MaxSizeOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Extract and match again.")
    ] = False,
    workers: WorkersOption = "auto",
) -> None:
    """Write a submission to the Image Matching Challenge 2021 and check it (docs/formats.md)."""
    if descriptor == "none":
        fail("a submission needs descriptors; --descriptor none has none")
    extraction = extract_options(context)
    import dataclasses

    from ..jobs.imc import MATCHING, export_imc
    from ..jobs.workers import parse_workers
    from ..memory import keep_freed

    keep_freed()
    with user_errors():
        options = dataclasses.replace(MATCHING, ratio=ratio, threshold=threshold)
        result = export_imc(
            images,
            output,
            label,
            extraction,
            options,
            matches=matches,
            overwrite=overwrite,
            workers=parse_workers(workers),
            progress=progress_wanted(),
        )
    matched, extracted = result.matched, result.extracted
    pairs = ""
    if matched is not None:
        pairs = (
            f"; {matched.done} pairs matched ({matched.matches} matches), {matched.skipped} done "
            "before"
        )
    typer.echo(
        f"{extracted.done} extracted ({extracted.keypoints} keypoints), {extracted.skipped} done "
        f"before{pairs}; {len(result.failed)} failed -> {result.sequences} sequences in "
        f"{output}"
    )
    for violation in result.violations:
        typer.echo(f"not accepted by the challenge: {violation}", err=True)
    finish(result.failed, extracted.ignored, bad=bool(result.violations))
