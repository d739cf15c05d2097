"""Command line interface, with one module per group of commands."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands import app as app

#: How often an idle OpenMP thread of PyTorch (libgomp) looks for work before it sleeps. The default
#: of 300,000 takes the core from the thread it waits for when other programs run: two threads then
#: take six times as long as one.
SPIN_COUNT = "1000"


def limit_spinning() -> None:
    """Let threads sleep soon, before libgomp is loaded, unless the user has set how they wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def main() -> None:
    """Entry point of the ``tiepoints`` command; signals are handled before its imports."""
    from .signals import handle_signals, release_signals, stop_message

    try:
        with stop_message():
            handle_signals()
            limit_spinning()
            from .commands import app

            app()
    finally:
        release_signals()


def __getattr__(name: str) -> Any:
    if name == "app":  # imported on first use: ``main`` handles signals first
        from .commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
