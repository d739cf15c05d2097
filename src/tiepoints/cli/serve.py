"""``tiepoints serve``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from .common import user_errors


def serve(
    graph: Annotated[
        list[Path] | None,
        typer.Option(help="Exported pipeline, .onnx (default: those of the package)."),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this computer; 0 = a free one.")
    ] = 8000,
    runtime: Annotated[
        Path | None,
        typer.Option(
            help="Folder dist of the npm package onnxruntime-web (default: downloaded once)."
        ),
    ] = None,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the page to this folder, for any web server, and end."),
    ] = None,
) -> None:
    """Open a page that matches two photographs in the browser; nothing is uploaded."""
    from ..jobs.serve import embedded_graphs, export_site, find_runtime, make_server, site

    with user_errors():
        contents = site(graph or embedded_graphs(), find_runtime(runtime))
        if output is not None:
            export_site(contents, output)
            typer.echo(f"page -> {output / 'index.html'}")
            return
        server = make_server(contents, port)
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        typer.echo(f"{address} (stop with Ctrl-C)")
        if browser:
            import webbrowser

            webbrowser.open(address)
        with server, suppress(KeyboardInterrupt):  # its normal end
            server.serve_forever()
