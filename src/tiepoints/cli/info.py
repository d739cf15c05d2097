"""``tiepoints info``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import JsonOption, print_json, user_errors


def info(
    path: Annotated[
        Path,
        typer.Argument(
            help="File or folder that tiepoints wrote: features, matches, weights, a training "
            "checkpoint, training pairs, results of an evaluation, a submission."
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show what made a file: weights, options, version and images. Exit code 1: it has no valid
    record, so it was written by another program.
    """
    from ..jobs.info import describe

    with user_errors():
        found = describe(path)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        typer.echo(f"{found.path}: {found.kind}")
        for line in _lines(found.record):
            typer.echo(line)
    if not found.ours:
        typer.echo(f"not written by tiepoints, or changed since: {found.reason}", err=True)
        raise typer.Exit(1)


def _lines(record: dict[str, Any], prefix: str = "") -> list[str]:
    """One line per value, with the names of nested ones joined by dots."""
    lines = []
    for key, value in record.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            lines.append(f"  {prefix}{key}: {text}")
    return lines
