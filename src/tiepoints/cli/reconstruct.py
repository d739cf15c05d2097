"""``tiepoints reconstruct``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .common import (
    CameraOption,
    DeviceOption,
    JsonOption,
    MasksOption,
    MaxSizeOption,
    NeighborsOption,
    PagesOption,
    PairsOption,
    ValueRangeOption,
    WorkersOption,
    finish,
    print_json,
    progress_wanted,
    user_errors,
)

if TYPE_CHECKING:
    from ..jobs.reconstruct import Summary

Quality = Literal["fast", "default", "best"]
Mapper = Literal["incremental", "global"]
Compared = Literal["sift"]


def reconstruct(
    photos: Annotated[
        list[str], typer.Argument(help="Folder of photographs, files or patterns; or one video.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the results.")],
    quality: Annotated[
        Quality,
        typer.Option(
            help="Detector, descriptor, number of keypoints, image size and number of pairs."
        ),
    ] = "default",
    max_size: MaxSizeOption = None,
    pairs: PairsOption = None,
    neighbors: NeighborsOption = None,
    camera: CameraOption = "auto",
    masks: MasksOption = None,
    value_range: ValueRangeOption = "type",
    pages: PagesOption = "first",
    mapper: Annotated[
        Mapper, typer.Option(help="COLMAP's mapper; global is faster for many images.")
    ] = "incremental",
    fps: Annotated[float, typer.Option(min=0.01, help="Video: frames per second to use.")] = 2.0,
    undistort: Annotated[
        bool,
        typer.Option(
            "--undistort", help="Write images without distortion, for dense reconstruction."
        ),
    ] = False,
    compare: Annotated[
        Compared | None,
        typer.Option(help="sift: reconstruct with COLMAP's SIFT as well, and compare."),
    ] = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the mapper.")] = 0,
    threads: Annotated[
        int, typer.Option(min=-1, help="Threads of the mapper; 1 repeats exactly (default: all).")
    ] = -1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Match and map again, also with other options.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Reconstruct photographs or a video: cameras, colored 3D points and a report (COLMAP).

    Exit code 0: all images are in one model; 1: some are not; 2: nothing could be reconstructed.
    """
    from ..jobs.reconstruct import reconstruct as run
    from ..jobs.workers import parse_workers
    from ..memory import keep_freed

    keep_freed()
    with user_errors():
        summary = run(
            photos,
            output,
            overwrite=overwrite,
            progress=progress_wanted(),
            quality=quality,
            max_size=max_size,
            pairs=pairs or "auto",
            neighbors=neighbors,
            camera=camera,
            masks=masks,
            value_range=value_range,
            pages=pages,
            mapper=mapper,
            fps=fps,
            undistort=undistort,
            compare=compare,
            device=device,
            workers=parse_workers(workers),
            seed=seed,
            threads=threads,
        )[1]
    if as_json:
        print_json(summary.to_json())
    else:
        _print(summary)
    for warning in summary.warnings:
        typer.echo(f"warning: {warning}", err=True)
    for name, reason in summary.unregistered:
        typer.echo(f"not in the model: {name}: {reason}", err=True)
    finish(summary.failed, summary.ignored, bad=not summary.complete)


def _print(summary: Summary) -> None:
    pairs = summary.pairs
    typer.echo(f"pairs   {pairs['verified']} of {pairs['chosen']} verified ({pairs['reason']})")
    typer.echo(f"camera  {summary.camera_text}")
    for index, model in enumerate(summary.models):
        typer.echo(
            f"model   {index}: {model.images} of {summary.images} images, {model.points} points, "
            f"track length {model.track_length:.2f}, reprojection error {model.error:.2f} px"
        )
    if summary.sift is not None:
        typer.echo(f"SIFT    {_sift(summary)}")
    for name, path in summary.files.items():
        typer.echo(f"{name:<7} {path}")


def _sift(summary: Summary) -> str:
    sift = summary.sift or {}
    if not sift["models"]:
        return sift.get("error", "no model")
    model = sift["models"][0]
    return (
        f"0: {model['images']} of {summary.images} images, {model['points']} points, track length "
        f"{model['track_length']:.2f}, reprojection error {model['error']:.2f} px"
    )
