"""``tiepoints extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..names import DESCRIPTOR, DETECTOR, EXTRACT_NUM_KEYPOINTS, MATCH_MAX_SIZE
from .common import (
    AffineOption,
    BackendOption,
    BandsOption,
    CameraOption,
    CutRatioOption,
    DescriptorOption,
    DetectorOption,
    DeviceOption,
    ExifOrientationOption,
    Format,
    JsonOption,
    MaskAlphaOption,
    MasksOption,
    MaskValueOption,
    MaxSizeOption,
    MemoryOption,
    NmsSizeOption,
    OfficialOption,
    OrientationOption,
    PagesOption,
    PerScaleOption,
    PrecisionOption,
    PyramidLevelsOption,
    RayOption,
    ShardOption,
    SingleScaleOption,
    UprightOption,
    UpsampledLevelsOption,
    ValueRangeOption,
    WorkersOption,
    extract_options,
    fail,
    print_extraction,
    progress_wanted,
    user_errors,
)


def extract(
    context: typer.Context,
    images: Annotated[list[str] | None, typer.Argument(help="Images, folders or patterns.")] = None,
    list_images: Annotated[
        Path | None, typer.Option(help="Text file with one image path per line.")
    ] = None,
    root_images: Annotated[
        Path | None,
        typer.Option(
            help="Folder to which listed paths, and names in h5 and colmap, are relative."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Results folder (default: see --results-dir).")
    ] = None,
    results_dir: Annotated[
        Path, typer.Option(help="Without --output: results go to RESULTS_DIR/METHOD_NAME.")
    ] = Path("extracted_features"),
    method_name: Annotated[
        str | None,
        typer.Option(
            help="Name of the results (default: DETECTOR-DESCRIPTOR, of a weights file its network "
            "and name, such as sobelnet.mine)."
        ),
    ] = None,
    form: Annotated[
        Format,
        typer.Option(
            "--format", help="npy: two files per image; h5: an hloc file; colmap: a database."
        ),
    ] = "npy",
    num_keypoints: Annotated[
        int,
        typer.Option(
            "--num-keypoints",
            "--num-points",
            "--num-kpts",
            min=1,
            help="Maximum number of keypoints per image.",
        ),
    ] = EXTRACT_NUM_KEYPOINTS,
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
    masks: MasksOption = None,
    mask_alpha: MaskAlphaOption = True,
    mask_value: MaskValueOption = None,
    value_range: ValueRangeOption = "type",
    bands: BandsOption = None,
    exif_orientation: ExifOrientationOption = "ignore",
    pages: PagesOption = "first",
    camera: CameraOption = "auto",
    half: Annotated[bool, typer.Option("--half", help="h5: descriptors as float16.")] = False,
    max_size: MaxSizeOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Extract images again (colmap: start over).")
    ] = False,
    workers: WorkersOption = "auto",
    shard: ShardOption = None,
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Extract features of images to npy files, an HDF5 file for hloc, or a COLMAP database.

    Run again, it resumes and skips images with stored features.
    """
    if not images and list_images is None:
        fail("no images given; name images, folders or patterns, or use --list-images")
    if method_name in (".", "..") or (method_name and ("/" in method_name or "\\" in method_name)):
        fail(f"--method-name must be a folder name, not a path; got {method_name!r}")
    if camera != "auto" and form != "colmap":
        fail(f"--camera is for --format colmap, not for {form}")
    if half and form != "h5":
        fail(f"--half is for --format h5, not for {form}")
    options = extract_options(context, max_size=MATCH_MAX_SIZE if form == "colmap" else None)
    from ..extract import network_label
    from ..jobs.extract import extract_images
    from ..jobs.shards import Shard
    from ..jobs.workers import parse_workers

    with user_errors():
        if output is None:
            labels = f"{network_label(detector)}-{network_label(descriptor)}"
            output = results_dir / (method_name or labels)
        report = extract_images(
            images or [],
            output,
            options,
            format=form,
            list_file=list_images,
            root=root_images,
            camera=camera,
            half=half,
            masks=masks,
            pages=pages,
            overwrite=overwrite,
            workers=parse_workers(workers),
            shard=None if shard is None else Shard.parse(shard),
            ray=ray,
            progress=progress_wanted(),
        )
    print_extraction(report, as_json)
