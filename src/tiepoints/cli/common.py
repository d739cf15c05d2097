"""Options, error handling, exit codes and logging of all commands.

Exit codes: 0 = success; 1 = something was skipped or failed; 2 = invalid arguments, reported before
any work; 130, 143, 129 = stopped by SIGINT (Ctrl-C), SIGTERM, SIGHUP. Commands have many parameters
because typer declares an option by a parameter.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from ..errors import DataError, WeightsError
from .signals import STOPPED, exit_code, is_stopped

if TYPE_CHECKING:
    from ..extract import ExtractOptions

#: Errors that a user can correct; others are bugs and show a traceback.
USER_ERRORS = (ValueError, FileNotFoundError, ImportError, DataError, WeightsError, OSError)

#: Parameters of commands that are fields of ``ExtractOptions``. Not every field: ``threshold`` of a
#: command is the error of an inlier.
EXTRACT_PARAMETERS = (
    *("detector", "descriptor", "num_keypoints", "orientation", "upright"),
    *("single_scale", "per_scale", "official", "device"),
)

Orientation = Literal["none", "rekd", "rekd-light", "dominant"]
PairOrientation = Literal["auto", "none", "rekd", "rekd-light", "dominant"]
Format = Literal["npy", "h5", "colmap"]
Geometry = Literal["homography", "fundamental", "essential"]

DetectorOption = Annotated[
    str,
    typer.Option(
        help="keynet, keynet-tiny, rekd, rekd-light, sobelnet, a weights file, or an official "
        "checkpoint."
    ),
]
DescriptorOption = Annotated[
    str,
    typer.Option(help="hardnet, hynet, sosnet, desnet, rootsift, a weights file, or none."),
]
OrientationOption = Annotated[
    Orientation | None,
    typer.Option(
        help="Keypoint angles: from a network, or from the dominant gradient (default: rekd and "
        "rekd-light estimate them, others have none)."
    ),
]
PairOrientationOption = Annotated[
    PairOrientation,
    typer.Option(
        help="auto: match upright, and if few matches are verified, estimate the relative rotation "
        "of the images; others: as --orientation of extract."
    ),
]
UprightOption = Annotated[
    bool,
    typer.Option(
        "--upright",
        help="Describe patches without rotation by the angles, as in REKD's tables.",
    ),
]
SingleScaleOption = Annotated[
    bool, typer.Option("--single-scale", help="Without an image pyramid (the papers' TI).")
]
OfficialOption = Annotated[
    bool, typer.Option("--official", help="Extract as published, including known bugs.")
]
PerScaleOption = Annotated[
    bool,
    typer.Option("--per-scale", help="Keep one keypoint per scale, instead of one per location."),
]
CameraOption = Annotated[
    str,
    typer.Option(
        help="COLMAP: auto (from EXIF or guessed, per image), single (shared by all images) or "
        "MODEL:p1,p2,... (known)."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
WorkersOption = Annotated[int, typer.Option(min=1, help="Threads for reading and writing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
MasksOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of masks NAME.png or NAME.EXT.png; no keypoints where they are black."
    ),
]
MaskAlphaOption = Annotated[
    bool, typer.Option("--mask-alpha", help="No keypoints where an image is transparent.")
]


def fail(message: str, code: int = 2) -> NoReturn:
    """Print an error and exit; errors after a signal are a consequence of it."""
    if is_stopped() and code == 2:
        message, code = STOPPED, exit_code()
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def user_errors(stopped: str = STOPPED) -> Iterator[None]:
    """Turn errors that a user can correct into a message and exit code 2, and a signal that stops
    the command into a message and its exit code (``signals.exit_code``).
    """
    try:
        yield
    except USER_ERRORS as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(stopped, exit_code())


def finish(failed: Iterable[tuple[str, str]], ignored: int = 0, *, bad: bool = False) -> None:
    """Print failures and exit with 1 if there are any; of ignored files, print the number."""
    if ignored:
        typer.echo(f"skipped: {ignored} files that are not images", err=True)
    lines = [f"failed: {name}: {reason}" for name, reason in failed]
    for line in lines:
        typer.echo(line, err=True)
    if lines or bad:
        raise typer.Exit(1)


def print_json(content: Any) -> None:
    """Print a JSON object to standard output."""
    typer.echo(json.dumps(content, default=str))


def progress_wanted() -> bool:
    """Whether to show progress (not with --quiet)."""
    return logging.getLogger("tiepoints").level <= logging.INFO


def extract_options(context: typer.Context, **overrides: Any) -> ExtractOptions:
    """Create ``ExtractOptions`` from the parameters of a command (``EXTRACT_PARAMETERS``); exits
    with code 2 for invalid arguments.

    Args:
        overrides: values that replace those of the command.
    """
    from ..extract import ExtractOptions

    given = {key: value for key, value in context.params.items() if key in EXTRACT_PARAMETERS}
    with user_errors():
        return ExtractOptions.of(**{**given, **overrides})


def split_names(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


class _EchoHandler(logging.Handler):
    """Log to the current standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        typer.echo(level + record.getMessage(), err=True)


def configure_logging(verbose: bool, quiet: bool) -> None:
    """Log to standard error: only warnings with ``quiet``, details with ``verbose``."""
    logger = logging.getLogger("tiepoints")
    logger.handlers[:] = [_EchoHandler()]
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
