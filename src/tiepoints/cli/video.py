"""``tiepoints live``."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..names import VIDEO_NUM_KEYPOINTS
from .common import (
    AffineOption,
    BackendOption,
    DescriptorOption,
    DetectorOption,
    DeviceOption,
    JsonOption,
    OrientationOption,
    PrecisionOption,
    UprightOption,
    extract_options,
    fail,
    print_json,
    progress_wanted,
    refuse_source,
    user_errors,
)

if TYPE_CHECKING:
    from ..jobs.video import Summary


def live(
    context: typer.Context,
    source: Annotated[
        list[str],
        typer.Argument(
            help="Video file, folder of images, pattern, or index of a camera (the first is 0)."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Write a video (.mp4 or .avi) instead of showing a window."),
    ] = None,
    num_keypoints: Annotated[
        int, typer.Option(min=1, help="Maximum number of keypoints per frame.")
    ] = VIDEO_NUM_KEYPOINTS,
    detector: DetectorOption = "sobelnet",
    descriptor: DescriptorOption = "desnet",
    orientation: OrientationOption = None,
    affine: AffineOption = "none",
    upright: UprightOption = False,
    single_scale: Annotated[
        bool,
        typer.Option(
            "--single-scale/--multi-scale",
            help="Multiple scales are slower and more robust to zoom.",
        ),
    ] = True,
    ratio: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, help="Maximum ratio of nearest to second distance; 1 = off."
        ),
    ] = 0.9,
    max_motion: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="Maximum motion between frames, as a fraction of the image diagonal.",
        ),
    ] = 0.2,
    patience: Annotated[
        int, typer.Option(min=0, help="Maximum number of frames that a track may be missing.")
    ] = 1,
    tail: Annotated[
        int, typer.Option(min=1, help="Number of latest positions drawn of each track.")
    ] = 12,
    every: Annotated[int, typer.Option(min=1, help="Use every N-th frame.")] = 1,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Maximum number of frames.")] = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Track keypoints in a video, an image sequence or the images of a camera; show them in a
    window or write a video (docs/live.md).
    """
    if descriptor == "none":
        fail("tracking needs descriptors; --descriptor must not be none")
    refuse_source(output, source)
    # a keypoint at every scale of a location would be a track of its own
    options = dataclasses.replace(extract_options(context), per_scale=False)
    from ..jobs.video import VideoFile, VideoFrames, Window, open_source
    from ..jobs.video import live as run
    from ..memory import keep_freed
    from ..tracking import Tracker

    keep_freed()
    with user_errors("stopped before the first frame"):
        tracker = Tracker(
            ratio=None if ratio >= 1 else ratio,
            max_motion=max_motion,
            patience=patience,
            history=tail,
        )
        with closing(open_source(source, every)) as frames:
            camera = isinstance(frames, VideoFrames) and frames.camera
            screen = (
                Window(None if camera else frames.rate)
                if output is None
                else VideoFile(output, frames.rate, live=camera)
            )
            with closing(screen):
                summary = run(
                    frames,
                    options.build(),
                    screen,
                    tracker=tracker,
                    max_frames=max_frames,
                    progress=output is not None and progress_wanted(),
                )
    _print_summary(summary, output if summary.frames else None, as_json)
    for name, reason in summary.skipped:
        typer.echo(f"skipped: {name}: {reason}", err=True)
    if summary.failure:
        fail(summary.failure, 1 if summary.frames else 2)
    if summary.skipped:
        raise typer.Exit(1)


def _print_summary(summary: Summary, written: Path | None, as_json: bool) -> None:
    if as_json:
        content = dataclasses.asdict(summary)
        print_json({**content, "output": None if written is None else str(written)})
    else:
        ended = " (stopped)" if summary.stopped else ""
        typer.echo(
            f"frames     {summary.frames} in {summary.seconds:.1f} s{ended}, "
            f"{summary.frames_per_second:.1f} per second"
        )
        typer.echo(f"keypoints  {summary.points:.0f} per frame")
        typer.echo(
            f"tracks     {summary.tracks}, length {summary.median_length:g} (median), "
            f"{summary.mean_length:.1f} (mean) frames"
        )
        if written is not None:
            typer.echo(f"video      {written}")
