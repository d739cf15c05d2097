"""Options, error handling, exit codes and logging of all commands.

Exit codes: 0 = success; 1 = something was skipped or failed; 2 = the command cannot start or go on:
invalid arguments, unusable files, a full disk; 130, 143, 129 = stopped by SIGINT (Ctrl-C), SIGTERM,
SIGHUP. Commands have many parameters because typer declares an option by a parameter.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from ..errors import DataError, WeightsError
from ..files import printable
from .signals import exit_code, is_stopped

if TYPE_CHECKING:
    from ..extract import ExtractOptions

#: Message of a stopped command; ``train`` has its own.
STOPPED = "stopped; the same command resumes"
#: Errors that a user can correct; others are bugs and show a traceback.
USER_ERRORS = (ValueError, FileNotFoundError, ImportError, DataError, WeightsError, OSError)

#: Parameters of commands that are fields of ``ExtractOptions``. Not every field: ``threshold`` of a
#: command is the error of an inlier.
EXTRACT_PARAMETERS = (
    *("detector", "descriptor", "num_keypoints", "orientation", "affine", "upright"),
    *("single_scale", "per_scale", "official", "device", "backend", "precision"),
    *("value_range", "exif_orientation", "mask_alpha", "mask_value", "bands"),
)
#: Parameters with the names of the published code -> fields of ``ExtractOptions``; None leaves the
#: default.
PUBLISHED_PARAMETERS = {
    "cut_ratio": "cut_ratio",
    "pyramid_levels": "down_levels",
    "upsampled_levels": "up_levels",
    "nms_size": "nms_window",
}

Backend = Literal["auto", "torch", "onnxruntime", "openvino"]
Precision = Literal["auto", "float32", "bfloat16", "int8"]
Orientation = Literal["none", "rekd", "rekd-light", "dominant"]
PairOrientation = Literal["auto", "none", "rekd", "rekd-light", "dominant"]
Format = Literal["npy", "h5", "colmap"]
Pages = Literal["first", "all"]
ExifOrientation = Literal["ignore", "apply"]
Geometry = Literal["homography", "fundamental", "essential"]

DetectorOption = Annotated[
    str,
    typer.Option(
        help="keynet, keynet-light, keynet-tiny, rekd, rekd-light, sobelnet, a weights file, or an "
        "official checkpoint."
    ),
]
DescriptorOption = Annotated[
    str,
    typer.Option(
        help="hardnet, hardnet-light, hardnet-context, hynet, sosnet, desnet, rootsift, a weights "
        "file, or none."
    ),
]
OrientationOption = Annotated[
    Orientation | None,
    typer.Option(
        help="Keypoint angles: from a network, or from the dominant gradient (default: rekd and "
        "rekd-light estimate them, others have none)."
    ),
]
AffineOption = Annotated[
    str,
    typer.Option(
        help="Affine shapes of patches, for views from very different directions and patch "
        "descriptors: affnet, a weights file, or none."
    ),
]
PairOrientationOption = Annotated[
    PairOrientation,
    typer.Option(
        help="auto: match upright, and estimate the relative rotation and tilt of the images if "
        "the verified matches show one, or are few; others: as --orientation of extract."
    ),
]
PairsOption = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD|FILE",
        help="exhaustive; sequential: neighbors by name, and loops; retrieval: similar images; "
        "gps: neighbors by EXIF; or a list, two names per line (default, auto: all pairs up to 60 "
        "images, else gps or retrieval).",
    ),
]
NeighborsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Neighbors per image (default: sequential 10, retrieval and gps 20)."),
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
PyramidLevelsOption = Annotated[
    int | None,
    typer.Option(
        min=0, help="Reduced levels of the pyramid (default: keynet 4, rekd 5; the papers: 5)."
    ),
]
UpsampledLevelsOption = Annotated[
    int | None,
    typer.Option(min=0, help="Enlarged levels of the pyramid (default: keynet 1, rekd 2)."),
]
NmsSizeOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Odd side of the window of non-maximum suppression in pixels of a level (default: 7; "
        "15 of keynet-tiny, in evaluations and with --official).",
    ),
]
CutRatioOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Smallest score as a fraction of the largest of the level (default: sobelnet 1e-8, "
        "others 0).",
    ),
]
PerScaleOption = Annotated[
    bool | None,
    typer.Option(
        "--per-scale/--per-location",
        help="Keep keypoints of one location at several scales, or one of them (default: per scale "
        "for Key.Net, else per location).",
    ),
]
CameraOption = Annotated[
    str,
    typer.Option(
        help="COLMAP: auto (shared by images of one size whose EXIF names the same camera and "
        "focal length, or that have no EXIF), per-image, single (shared by all images) or "
        "MODEL:p1,p2,... (known)."
    ),
]
MaxSizeOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="PIXELS",
        help="Longest side of the images that are processed; larger ones are reduced, positions "
        "stay those of the original (default: 1600 for two images and COLMAP databases, else no "
        "limit; 0 = no limit).",
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory that may be used, such as 2G: large images are processed in smaller parts, "
        "fewer at a time; an image that needs more is refused.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
BackendOption = Annotated[
    Backend, typer.Option(help="What runs the networks (extras onnx, openvino).")
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(help="Of the networks; int8: those that have an eight-bit graph."),
]
WorkersOption = Annotated[
    str,
    typer.Option(
        metavar="auto|N",
        help="Processes that extract images and match pairs, with one thread each if there are as "
        "many as cores; auto: one per core, if there is enough work and memory.",
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Only part I of N, as one of N jobs (SLURM); afterwards the command without --shard "
        "merges them.",
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|ADDRESS",
        help="Work on a Ray cluster (extra ray); auto: the one that runs here, else a new one of "
        "the cores of this computer.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
MasksOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of masks NAME.png or NAME.EXT.png; no keypoints where they are black."
    ),
]
MaskAlphaOption = Annotated[
    bool,
    typer.Option(
        "--mask-alpha/--no-mask-alpha", help="No keypoints where an image is transparent."
    ),
]
MaskValueOption = Annotated[
    float | None,
    typer.Option(
        help="No keypoints on a surround of this value that reaches the border, such as 0 for "
        "black, 255 for white (8 bits)."
    ),
]
ValueRangeOption = Annotated[
    str,
    typer.Option(
        metavar="type|auto|LO,HI",
        help="Stored values that become black and white: the range of their type, percentiles of "
        "the image (thermal and 12-bit images), or two values.",
    ),
]
BandsOption = Annotated[
    str | None,
    typer.Option(metavar="N|R,G,B", help="Bands to use of a multispectral image, counted from 1."),
]
ExifOrientationOption = Annotated[
    ExifOrientation,
    typer.Option(
        help="ignore: keypoints are in pixels of the stored image, as in COLMAP; apply: of the "
        "upright image, and so are masks."
    ),
]
PagesOption = Annotated[
    Pages,
    typer.Option(
        help="Of multi-page and animated files: the first page, or all, named NAME#2, NAME#3 ..."
    ),
]


def fail(message: str, code: int = 2, *, stopped: str | Callable[[], str] = STOPPED) -> NoReturn:
    """Print an error and exit; errors after a signal are a consequence of it, reported as
    ``stopped``, or what that returns.
    """
    if is_stopped() and code == 2:
        message, code = _text(stopped), exit_code()
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _text(message: str | Callable[[], str]) -> str:
    return message if isinstance(message, str) else message()


@contextmanager
def user_errors(stopped: str | Callable[[], str] = STOPPED) -> Iterator[None]:
    """Turn errors that a user can correct into a message and exit code 2, and a signal that stops
    the command into a message (``stopped``, or what that returns) and its exit code
    (``signals.exit_code``).
    """
    try:
        with missing_library():
            yield
    except USER_ERRORS as error:
        fail(str(error), stopped=stopped)
    except KeyboardInterrupt:
        fail(_text(stopped), exit_code())


def refuse_source(output: Path | None, sources: Iterable[str]) -> None:
    """End the command if ``output`` is one of the files that it reads."""
    if output is None or not output.exists():
        return
    if any(Path(source).exists() and output.samefile(source) for source in sources):
        fail(f"--output {output} is one of the given files; use another file")


@contextmanager
def missing_library() -> Iterator[None]:
    """Turn the absence of a library, as of torch in an installation for ``lite`` alone, into a
    message and exit code 2.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in ("", "tiepoints"):
            raise
        fail(f"this command needs {library}: pip install {library}")


def finish(failed: Iterable[tuple[str, str]], ignored: int = 0, *, bad: bool = False) -> None:
    """Print failures and exit with 1 if there are any; of ignored files, print the number."""
    if ignored:
        typer.echo(f"skipped: {ignored} files that are not images", err=True)
    lines = [f"failed: {printable(name)}: {reason}" for name, reason in failed]
    for line in lines:
        typer.echo(line, err=True)
    if lines or bad:
        raise typer.Exit(1)


def print_extraction(report: Any, as_json: bool) -> None:
    """Print the result of an extraction, and exit with 1 if images failed.

    Args:
        report: ``jobs.extract.ExtractReport`` or ``lite.LiteReport``.
        as_json: print all of it as JSON instead of one line.
    """
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        typer.echo(
            f"{report.done} extracted ({report.keypoints} keypoints, {report.seconds:.1f} s), "
            f"{report.skipped} done before, {len(report.failed)} failed -> {report.output}"
        )
    finish(report.failed, report.ignored)


def print_json(content: Any) -> None:
    """Print a JSON object to standard output."""
    typer.echo(json.dumps(content, default=str))


def progress_wanted() -> bool:
    """Whether to show progress (not with --quiet)."""
    return logging.getLogger("tiepoints").level <= logging.INFO


def extract_options(
    context: typer.Context, *, max_size: int | None = None, **overrides: Any
) -> ExtractOptions:
    """Create ``ExtractOptions`` from the parameters of a command (``EXTRACT_PARAMETERS``); exits
    with code 2 for invalid arguments.

    Args:
        max_size: default of the command's ``--max-size``; not with ``--official``.
        overrides: values that replace those of the command.
    """
    from ..extract import ExtractOptions
    from ..memory import parse_size

    given = {key: value for key, value in context.params.items() if key in EXTRACT_PARAMETERS}
    given |= published_options(context)
    largest = context.params.get("max_size")
    if largest is None:
        largest = None if given.get("official") else max_size
    memory = context.params.get("memory")
    with user_errors():
        given["memory"] = None if memory is None else parse_size(memory)
        return ExtractOptions.of(**{**given, "max_size": largest or None, **overrides})


def published_options(context: typer.Context) -> dict[str, Any]:
    """The given ``PUBLISHED_PARAMETERS`` of a command, as options of ``ExtractOptions``."""
    return {
        field: context.params[key]
        for key, field in PUBLISHED_PARAMETERS.items()
        if context.params.get(key) is not None
    }


def split_names(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


class _EchoHandler(logging.Handler):
    """Log to the current standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        typer.echo(level + record.getMessage(), err=True)


def configure_logging(verbose: bool, quiet: bool) -> None:
    """Log to standard error: only warnings with ``quiet``, details with ``verbose``.

    Characters that the terminal's encoding lacks, such as in file names, are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("tiepoints")
    logger.handlers[:] = [_EchoHandler()]
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    # what decoders say of damaged files names no file, unlike the errors that follow
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
