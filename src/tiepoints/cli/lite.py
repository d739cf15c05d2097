"""``tiepoints lite``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..names import EXTRACT_NUM_KEYPOINTS, LITE_GRAPH, MATCH_MAX_SIZE
from .common import (
    BandsOption,
    ExifOrientationOption,
    JsonOption,
    MaskAlphaOption,
    MaskValueOption,
    ValueRangeOption,
    print_extraction,
    progress_wanted,
    user_errors,
)


def lite(
    images: Annotated[list[str], typer.Argument(help="Images, folders or patterns.")],
    output: Annotated[Path, typer.Option(help="Results folder.")] = Path("extracted_features/lite"),
    graph: Annotated[
        str,
        typer.Option(
            help="sobelnet+desnet; sobelnet+desnet-int8 or keynet+desnet-int8, of one scale; or a "
            "file written by: tiepoints export."
        ),
    ] = LITE_GRAPH,
    num_keypoints: Annotated[
        int, typer.Option(min=1, help="Maximum number of keypoints per image.")
    ] = EXTRACT_NUM_KEYPOINTS,
    max_size: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="PIXELS",
            help="Longest side of the images that are processed; larger ones are reduced, "
            "positions stay those of the original (0 = no limit).",
        ),
    ] = MATCH_MAX_SIZE,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads (default: one per core).")
    ] = None,
    mask_alpha: MaskAlphaOption = True,
    mask_value: MaskValueOption = None,
    value_range: ValueRangeOption = "type",
    bands: BandsOption = None,
    exif_orientation: ExifOrientationOption = "ignore",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Extract images again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Extract features of images with ONNX Runtime, without torch, to the npy files of extract.

    Run again, it resumes and skips images with stored features.
    """
    with user_errors():
        from ..lite import Extractor, extract_files
        from ..reading import ReadOptions

        read = ReadOptions(
            value_range=value_range,
            exif_orientation=exif_orientation,
            mask_alpha=mask_alpha,
            mask_value=mask_value,
            bands=bands,
        )
        extractor = Extractor(
            graph,
            num_keypoints=num_keypoints,
            max_size=max_size or None,
            read=read,
            threads=threads,
        )
        report = extract_files(
            images, output, extractor, overwrite=overwrite, progress=progress_wanted()
        )
    print_extraction(report, as_json)
