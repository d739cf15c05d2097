"""The ``tiepoints`` command: all commands and their common options."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import (
    backends,
    evaluate,
    export,
    extract,
    imc,
    info,
    lite,
    match,
    reconstruct,
    reproduce,
    serve,
    train,
    video,
    weights,
)
from .common import configure_logging, missing_library
from .signals import stop_message


class _Commands(TyperGroup):
    """Commands that a signal or a missing library stops also where they handle no errors, such as
    in their imports.
    """

    def make_context(self, *args: Any, **options: Any) -> Any:
        with stop_message():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with stop_message(), missing_library():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find, describe, match and measure tie points, and train the networks that do so.",
)
app.command("extract")(extract.extract)
app.command("lite")(lite.lite)
app.command("match")(match.match)
app.command("reconstruct")(reconstruct.reconstruct)
app.command("train")(train.train)
app.command("pairs")(train.pairs)
app.command("compare")(evaluate.compare)
app.command("evaluate")(evaluate.evaluate)
app.command("evaluate-patches")(evaluate.evaluate_patches)
app.command("report")(evaluate.report)
app.command("reproduce")(reproduce.reproduce)
app.command("live")(video.live)
app.command("serve")(serve.serve)
app.command("imc")(imc.imc)
app.command("export")(export.export)
app.command("info")(info.info)
app.command("backends")(backends.backends)
app.command("quantize")(backends.quantize)
app.add_typer(weights.app, name="weights")
app.add_typer(evaluate.data_app, name="data")


def _print_version(enabled: bool) -> None:
    if enabled:
        from .. import __version__

        typer.echo(f"tiepoints {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log details.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, log only warnings and errors.")
    ] = False,
) -> None:
    """Find, describe, match and measure tie points, and train the networks that do so."""
    configure_logging(verbose, quiet)
