"""``tiepoints reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import DeviceOption, JsonOption, fail, print_json, progress_wanted, user_errors

Paper = Literal["keynet"]
PaperTable = Literal["1a", "1b", "2", "3", "4"]
Figure = Literal["3", "5"]
BudgetName = Literal["quick", "paper"]


def reproduce(
    paper: Annotated[Paper, typer.Argument(help="keynet: the Key.Net paper.")],
    output: Annotated[
        Path,
        typer.Option(help="Work folder: pairs, weights, features and results; it is resumed."),
    ],
    table: Annotated[PaperTable | None, typer.Option(help="Table of the paper.")] = None,
    figure: Annotated[Figure | None, typer.Option(help="Figure of the paper.")] = None,
    budget: Annotated[
        BudgetName,
        typer.Option(help="Of trainings; quick: minutes per row on a CPU; paper: the paper's."),
    ] = "quick",
    images: Annotated[
        Path | None,
        typer.Option(
            help="Photographs to train on. Required for tables 1a and 1b and the figures; without "
            "it, tables 2 to 4 use the shipped weights."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Tables 2 and 3: sequences in HPatches' layout.")
    ] = None,
    only: Annotated[str, typer.Option(help="Rows whose names contain this text.")] = "",
    features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROW=PATH",
            help="Tables 2 and 3: stored features of a row, such as LIFT-SI=features/lift; "
            "repeatable.",
        ),
    ] = None,
    num_keypoints: Annotated[
        int, typer.Option(min=1, help="Tables 2 and 3: keypoints compared per image.")
    ] = 1000,
    device: DeviceOption = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Reproduce a table or figure of a paper: train, evaluate, and compare with the published
    values.
    """
    from ..jobs.reproduce import ReproduceOptions
    from ..jobs.reproduce import reproduce as run

    if (table is None) == (figure is None):
        fail("give either --table or --figure")
    part = f"table {table}" if table is not None else f"figure {figure}"
    with user_errors():
        for entry in features or ():
            if "=" not in entry:
                raise ValueError(f"--features must be ROW=PATH, got {entry!r}")
        result = run(
            ReproduceOptions(
                part,
                output,
                images=images,
                data=data,
                budget=budget,
                only=only,
                features=tuple(features or ()),
                num_keypoints=num_keypoints,
                device=device,
                workers=workers,
                progress=progress_wanted(),
            )
        )
    if as_json:
        print_json({**result.content, "files": [str(path) for path in result.files]})
    else:
        typer.echo(result.markdown())
        for path in result.files:
            typer.echo(f"written {path}")
    for line in result.skipped:
        typer.echo(f"skipped: {line}", err=True)
    if result.skipped:
        raise typer.Exit(1)
