"""``tiepoints weights``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import WeightsError
from .common import user_errors

app = typer.Typer(no_args_is_help=True, help="Trained weights: list, show, import, verify.")


@app.command("list")
def list_weights() -> None:
    """List the embedded weights."""
    from ..weights import DATA, load, table

    for name, entry in table().items():
        count = sum(p.numel() for p in load(name).parameters())
        size = (DATA / entry["file"]).stat().st_size
        typer.echo(f"{name:14s} {entry['network']:8s} {count:6d} parameters  {size} bytes")


@app.command("show")
def show_weights(name: str) -> None:
    """Show settings, origin and checksum of embedded weights, a weights file or an official
    checkpoint.
    """
    from ..extract import load_file
    from ..weights import DATA, file_checksum, load, metadata_of, read_graph, table

    with user_errors():
        known = table()
        ours = name in known or Path(name).suffix == ".safetensors"
        # of a name that is no file, ``load`` lists the known ones
        net = load(name) if ours or not Path(name).exists() else load_file(name)
        path = DATA / known[name]["file"] if name in known else Path(name)
        content = {
            "file": path.name,
            "sha256": file_checksum(path),
            "network": type(net).__name__,
            "settings": getattr(net, "settings", {}),
            "parameters": sum(p.numel() for p in net.parameters()),
            "facts": metadata_of(path) if ours else {},
        }
        if path.suffix == ".onnx":
            stored = read_graph(path)
            content |= {key: stored[key] for key in ("network", "settings", "facts")}
            del content["parameters"]
        if name in known:
            content |= {key: known[name][key] for key in ("licence", "recipe")}
    typer.echo(json.dumps(content, indent=1))


@app.command("import")
def import_weights(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Official checkpoint: Key.Net (PyTorch, kornia, TensorFlow .npz, REKD's), REKD, "
            "HardNet, SOSNet, HyNet."
        ),
    ],
    output: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    restore_statistics: Annotated[
        bool,
        typer.Option("--restore-statistics", help="TensorFlow: correct the batch statistics."),
    ] = False,
    input_range: Annotated[
        float,
        typer.Option(
            help="REKD: value of white in the network input; 1 as in its extraction, 255 as in its "
            "training."
        ),
    ] = 1.0,
) -> None:
    """Convert an official checkpoint to a weights file for --detector or --descriptor."""
    from ..checkpoints import load_official
    from ..weights import save

    with user_errors():
        net = load_official(
            checkpoint, restore_statistics=restore_statistics, input_range=input_range
        )
        save(net, output, {"imported_from": checkpoint.name})
    typer.echo(f"{type(net).__name__} -> {output}")


@app.command("verify")
def verify_weights(names: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Check the checksums of embedded weights and load them; by default all."""
    from ..weights import table, verify

    failed = False
    for name in names or list(table()):
        try:
            verify(name)
            typer.echo(f"{name}: ok")
        except WeightsError as error:
            failed = True
            typer.echo(f"{name}: {error}", err=True)
    if failed:
        raise typer.Exit(1)
