"""Command line interface, with one module per group of commands."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands import app as app


def main() -> None:
    """Entry point of the ``tiepoints`` command; signals are handled before its imports."""
    from .signals import handle_signals, release_signals, stop_message

    try:
        with stop_message():
            handle_signals()
            from .commands import app

            app()
    finally:
        release_signals()


def __getattr__(name: str) -> Any:
    if name == "app":  # imported on first use: ``main`` handles signals first
        from .commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
