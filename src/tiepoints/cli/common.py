"""What the commands share: options worded once, errors, exit codes, logging.

Exit codes: 0 = all done; 1 = something was skipped or failed; 2 = invalid arguments, reported
before any work; 130 = interrupted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from ..errors import DataError, WeightsError

#: What a user can correct; anything else is a fault of ours and shows its trace.
USER_ERRORS = (ValueError, FileNotFoundError, ImportError, DataError, WeightsError, OSError)

Orientation = Literal["none", "rekd", "rekd-light", "dominant"]
PairOrientation = Literal["auto", "none", "rekd", "rekd-light", "dominant"]
Format = Literal["npy", "h5", "colmap"]
Geometry = Literal["homography", "fundamental", "essential"]

DetectorOption = Annotated[
    str,
    typer.Option(
        help="keynet, keynet-tiny, rekd, rekd-light, sobelnet, or a weights file (ours, or an "
        "official checkpoint)."
    ),
]
DescriptorOption = Annotated[
    str,
    typer.Option(help="hardnet, hynet, sosnet, desnet, rootsift, a weights file, or none."),
]
OrientationOption = Annotated[
    Orientation | None,
    typer.Option(
        help="Angles of the keypoints: of a network, or of the dominant gradient (default: REKD's "
        "own; others none)."
    ),
]
PairOrientationOption = Annotated[
    PairOrientation,
    typer.Option(
        help="auto: match upright, and where little verifies at the rotation of one image to the "
        "other; else as --orientation of extract."
    ),
]
UprightOption = Annotated[
    bool,
    typer.Option(
        "--upright",
        help="Describe patches that are not rotated by the angles, as in REKD's tables.",
    ),
]
SingleScaleOption = Annotated[
    bool, typer.Option("--single-scale", help="No image pyramid (the papers' TI).")
]
OfficialOption = Annotated[
    bool, typer.Option("--official", help="The published extraction, faults included.")
]
PerScaleOption = Annotated[
    bool,
    typer.Option("--per-scale", help="Keep one keypoint per scale, instead of one per location."),
]
CameraOption = Annotated[
    str,
    typer.Option(
        help="COLMAP: auto (EXIF or a guess, per image), single (one for all) or "
        "MODEL:p1,p2,... (known)."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
WorkersOption = Annotated[int, typer.Option(min=1, help="Threads that read and write.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
MasksOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of masks, NAME.png or NAME.EXT.png; keypoints lie where they are not black."
    ),
]
MaskAlphaOption = Annotated[
    bool, typer.Option("--mask-alpha", help="No keypoints where an image is transparent.")
]


def fail(message: str, code: int = 2) -> NoReturn:
    """Print an error and exit."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def user_errors(stopped: str = "stopped; the same command resumes") -> Iterator[None]:
    """Turn errors that a user can correct into a message and exit code 2, Ctrl-C into 130."""
    try:
        yield
    except USER_ERRORS as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(stopped, 130)


def finish(failed: Iterable[tuple[str, str]], ignored: int = 0, *, bad: bool = False) -> None:
    """Print what failed and exit with 1 if anything did; ignored files are counted alone."""
    if ignored:
        typer.echo(f"skipped: {ignored} files that are no images", err=True)
    lines = [f"failed: {name}: {reason}" for name, reason in failed]
    for line in lines:
        typer.echo(line, err=True)
    if lines or bad:
        raise typer.Exit(1)


def print_json(content: Any) -> None:
    """A JSON object on standard output."""
    typer.echo(json.dumps(content, default=str))


def progress_wanted() -> bool:
    """Whether to show progress: unless --quiet."""
    return logging.getLogger("tiepoints").level <= logging.INFO


def extract_options(**options: Any) -> Any:
    """``ExtractOptions`` of a command; invalid arguments end it with 2."""
    from ..extract import ExtractOptions

    with user_errors():
        return ExtractOptions.of(**options)


def split_names(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


class _EchoHandler(logging.Handler):
    """Log lines to the present standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        typer.echo(level + record.getMessage(), err=True)


def configure_logging(verbose: bool, quiet: bool) -> None:
    """Log to standard error: warnings alone with ``quiet``, details with ``verbose``."""
    logger = logging.getLogger("tiepoints")
    logger.handlers[:] = [_EchoHandler()]
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
