"""``tiepoints match``."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..names import (
    DESCRIPTOR,
    DETECTOR,
    MATCH_MAX_SIZE,
    MATCH_SUFFIXES,
    MIN_NEIGHBORS,
    NEIGHBORS,
    NUM_KEYPOINTS,
)
from .common import (
    EXTRACT_PARAMETERS,
    PUBLISHED_PARAMETERS,
    AffineOption,
    BackendOption,
    BandsOption,
    CameraOption,
    CutRatioOption,
    DescriptorOption,
    DetectorOption,
    DeviceOption,
    ExifOrientationOption,
    Geometry,
    JsonOption,
    MaskAlphaOption,
    MasksOption,
    MaskValueOption,
    MaxSizeOption,
    MemoryOption,
    NeighborsOption,
    NmsSizeOption,
    OfficialOption,
    PagesOption,
    PairOrientationOption,
    PairsOption,
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
    finish,
    print_json,
    progress_wanted,
    refuse_source,
    user_errors,
)

if TYPE_CHECKING:
    from ..jobs.match import MatchReport

#: Parameters of the extraction that stored features are compared with, or that do not concern it
#: alone.
SHARED_PARAMETERS = ("descriptor", "orientation", "device", "backend", "precision")


def match(
    context: typer.Context,
    images: Annotated[
        list[str] | None, typer.Argument(help="Two images; or folders, patterns and more images.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Two images: image file that shows the matches. Many images: .h5 (hloc) or .db "
            "(COLMAP)."
        ),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Many images: folder for images of the best pairs.")
    ] = None,
    pairs: PairsOption = None,
    neighbors: NeighborsOption = None,
    features: Annotated[
        Path | None,
        typer.Option(help="Stored features: folder, .h5 or .db (default: extract them)."),
    ] = None,
    root_images: Annotated[
        Path | None, typer.Option(help="Many images: folder to which names are relative.")
    ] = None,
    num_keypoints: Annotated[
        int, typer.Option(min=1, help="Maximum number of keypoints per image.")
    ] = NUM_KEYPOINTS,
    detector: DetectorOption = DETECTOR,
    descriptor: DescriptorOption = DESCRIPTOR,
    orientation: PairOrientationOption = "auto",
    affine: AffineOption = "none",
    retry: Annotated[
        bool,
        typer.Option(
            "--retry/--no-retry",
            help="Two images that hardly match: describe them again in affine shapes, with their "
            "surroundings, and the second one as its negative; keep what verifies more matches.",
        ),
    ] = True,
    upright: UprightOption = False,
    rotation_tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=180.0,
            help="Maximum difference in degrees between the rotation of a match and the dominant "
            "one (REKD: 30).",
        ),
    ] = None,
    geometry: Annotated[
        Geometry | None,
        typer.Option(
            help="Two-view geometry of the inliers (default: fundamental; many images: none)."
        ),
    ] = None,
    ratio: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Maximum ratio of nearest to second distance; 1 = off."
        ),
    ] = 1.0,
    min_neighbors: Annotated[
        int,
        typer.Option(
            min=0,
            max=NEIGHBORS,
            help=f"Number of neighboring matches, of {NEIGHBORS}, that must agree with a match; "
            "0 = off.",
        ),
    ] = MIN_NEIGHBORS,
    threshold: Annotated[
        float, typer.Option(min=0.0, help="Maximum error of an inlier in pixels.")
    ] = 2.0,
    single_scale: SingleScaleOption = False,
    per_scale: PerScaleOption = None,
    official: OfficialOption = False,
    pyramid_levels: PyramidLevelsOption = None,
    upsampled_levels: UpsampledLevelsOption = None,
    nms_size: NmsSizeOption = None,
    cut_ratio: CutRatioOption = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine/--no-refine",
            help="Subpixel refinement: of the matches of two images, of the tracks in a .db.",
        ),
    ] = True,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Two images: draw outliers as faint dots.")
    ] = False,
    masks: MasksOption = None,
    mask_alpha: MaskAlphaOption = True,
    mask_value: MaskValueOption = None,
    value_range: ValueRangeOption = "type",
    bands: BandsOption = None,
    exif_orientation: ExifOrientationOption = "ignore",
    pages: PagesOption = "first",
    camera: CameraOption = "auto",
    max_size: MaxSizeOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Match pairs again.")] = False,
    workers: WorkersOption = "auto",
    shard: ShardOption = None,
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Match two images, or many pairs to one file: mutual nearest neighbors that agree with their
    neighbors, robust geometry, subpixel refinement.
    """
    images = images or []
    if descriptor == "none":
        fail("matching needs descriptors; --descriptor must not be none")
    to_file = output is not None and output.suffix in MATCH_SUFFIXES
    many = len(images) != 2 or any(Path(name).is_dir() for name in images)
    many = many or to_file
    many = many or any(o is not None for o in (pairs, neighbors, features, shard, ray))
    if many and not images and features is None:
        fail("no images given; name two images, or folders, or give --features")
    database = output is not None and output.suffix == ".db"
    extraction = extract_options(
        context,
        max_size=MATCH_MAX_SIZE if not many or database else None,
        orientation=None if orientation == "auto" else orientation,
    )
    from ..jobs.match import MatchOptions, match_images
    from ..jobs.shards import Shard
    from ..jobs.workers import parse_workers
    from ..memory import keep_freed

    keep_freed()
    with user_errors():
        num_workers = parse_workers(workers)
        part = None if shard is None else Shard.parse(shard)
        options = MatchOptions(
            ratio=ratio,
            min_neighbors=min_neighbors,
            rotation_tolerance=(
                None if rotation_tolerance is None else math.radians(rotation_tolerance)
            ),
            geometry=geometry,
            threshold=threshold,
            refine=refine,
            auto_orientation=orientation == "auto",
            retry=retry,
        )
    if not many and pictures is not None:
        fail("--pictures is for many images; for two, give --output FILE.jpg")
    if many and outliers:
        fail("--outliers is for two images")
    if features is not None:
        for name in (*EXTRACT_PARAMETERS, *PUBLISHED_PARAMETERS, "max_size"):
            source = context.get_parameter_source(name)
            if name not in SHARED_PARAMETERS and source is not None and source.name != "DEFAULT":
                option = f"--{name.replace('_', '-')}"
                fail(f"{option} does not apply to stored features ({features}); omit it")
    if camera != "auto" and not database:
        fail("--camera is for COLMAP databases; give --output FILE.db")
    if not many:
        _match_two(images, output, extraction, options, masks, outliers, as_json)
        return
    # with stored features, an explicit descriptor is compared with theirs
    source = context.get_parameter_source("descriptor")
    explicit = features is None or (source is not None and source.name != "DEFAULT")
    inside = [
        name
        for name in images
        if pictures is not None
        and Path(name).is_dir()
        and pictures.resolve().is_relative_to(Path(name).resolve())
    ]
    if inside:
        fail(
            f"--pictures {pictures} is inside the folder of the images, {inside[0]}, where the "
            "next call would read them; choose one outside"
        )
    if pictures is not None and not to_file:
        output, to_file = pictures / "matches.h5", True
    if output is None or not to_file:
        if len(images) == 1 and Path(images[0]).is_file():
            fail(f"one image given: {images[0]}; give two, or a folder and --output FILE.h5")
        fail(
            "matches of many pairs need --output FILE.h5 (hloc) or FILE.db (COLMAP), or "
            f"--pictures FOLDER; got {'nothing' if output is None else output.name}"
        )
    with user_errors():
        report = match_images(
            images,
            output,
            extraction if explicit else None,
            options,
            pairs=pairs,
            neighbors=neighbors,
            features=features,
            root=root_images,
            camera=camera,
            masks=masks,
            pages=pages,
            overwrite=overwrite,
            workers=num_workers,
            shard=part,
            ray=ray,
            progress=progress_wanted(),
        )
        drawn: list[Path] = []
        if pictures is not None:
            from ..jobs.pictures import draw_best_pairs

            drawn = draw_best_pairs(
                output,
                images,
                pictures,
                features=features,
                root=root_images,
                pages=pages,
            )
    _print_report(report, output, drawn, as_json)


def _print_report(report: MatchReport, output: Path, drawn: list[Path], as_json: bool) -> None:
    if as_json:
        print_json({**dataclasses.asdict(report), "output": str(output)})
    else:
        verified = "" if report.verified is None else f", {report.verified} pairs with a geometry"
        typer.echo(
            f"{report.done} pairs matched ({report.matches} matches{verified}), "
            f"{report.skipped} done before, {len(report.failed)} failed -> {output}"
        )
        for path in drawn:
            typer.echo(f"image  {path}")
    finish(report.failed, report.ignored)


def _match_two(
    images: list[str],
    output: Path | None,
    extraction: Any,
    options: Any,
    masks: Path | None,
    outliers: bool,
    as_json: bool,
) -> None:
    from ..extract import network_label
    from ..files import Task
    from ..image import to_rgb
    from ..jobs.images import mask_loader
    from ..jobs.match import match_two
    from ..plot import draw_matches

    refuse_source(output, images)
    with user_errors():
        load_mask = mask_loader(masks)
        found = [
            load_mask and load_mask(Task(Path(name), PurePosixPath(Path(name).name)))
            for name in images
        ]
        result = match_two(images[0], images[1], extraction, options, masks=(found[0], found[1]))
        estimate = result.estimate
        inliers = int(estimate.inliers.sum())
        if output is not None:
            labels = " + ".join(map(network_label, (extraction.detector, extraction.descriptor)))
            geometry = estimate.geometry if estimate.ok else f"no {estimate.geometry}"
            caption = (
                f"{Path(images[0]).name} - {Path(images[1]).name}: {labels}, {geometry}, "
                f"{inliers} inliers of {len(result.matches)} matches"
            )
            if result.described != "as given":
                caption += f" ({result.described})"
            draw_matches(
                to_rgb(images[0], extraction),
                to_rgb(images[1], extraction),
                result.xy_a,
                result.xy_b,
                estimate.inliers,
                outliers=outliers,
                caption=caption,
                path=output,
            )
    if as_json:
        print_json(result.to_json())
        return
    typer.echo(f"keypoints  {len(result.a)} and {len(result.b)}")
    typer.echo(f"matches    {len(result.matches)}")
    summary = (
        f"{inliers} ({estimate.geometry})"
        if estimate.ok
        else f"no {estimate.geometry}: {estimate.reason}"
    )
    typer.echo(f"inliers    {summary}")
    if result.described != "as given":
        typer.echo(f"described  {result.described}")
    if output is not None:
        typer.echo(f"image      {output}")
