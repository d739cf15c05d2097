"""Signals stop a command as Ctrl-C does: with cleanup, a message and an exit code.

Only light modules are imported here, so that signals are handled before the others are imported.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

#: Signals that stop a command; the last one is that of a closed terminal, missing on Windows.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
#: Signals that arrive within this number of seconds of the first one are ignored, as programs such
#: as ``timeout`` signal a process and then its group; later ones end the process at once.
REPEATED = 1.0


class Stopped(KeyboardInterrupt):
    """A signal stops the command.

    A class of its own, as Python ends by SIGINT, with another exit code, after KeyboardInterrupt
    itself has been raised within ``eval``.
    """


class _Handler:
    """Raises ``Stopped`` in the main thread at the first signal.

    Attributes:
        number: of that signal; 0 before.
    """

    def __init__(self) -> None:
        self.number = 0
        self._first = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._first = number, time.monotonic()
            raise Stopped
        if time.monotonic() - self._first > REPEATED:
            os._exit(128 + number)

    def unraisable(self, error: Any) -> None:
        """Signal again if the exception was raised where Python discards it (destructors)."""
        if not (self.number and issubclass(error.exc_type, Stopped)):
            sys.__unraisablehook__(error)
            return
        number, self.number = self.number, 0
        timer = threading.Timer(0.01, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()


_handler = _Handler()


def is_stopped() -> bool:
    """Whether a signal has stopped the command: further errors are a consequence."""
    return _handler.number != 0


def exit_code() -> int:
    """Exit code of a stopped command: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + (_handler.number or signal.SIGINT)


def _restore_in_child() -> None:
    """In a forked process, which its parent ends: SIGINT, which a terminal sends to both, is
    ignored.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _handler:
            ignored = number == signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)


def handle_signals() -> None:
    """Raise ``Stopped`` in the main thread at a signal of ``STOP_SIGNALS``; signals that the
    caller of this process ignores, as ``nohup`` does, stay ignored.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handler)
    sys.unraisablehook = _handler.unraisable
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_restore_in_child)


def release_signals() -> None:
    """End the process without a message at a signal, such as while the interpreter ends."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _handler:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def stop_message() -> Iterator[None]:
    """Print that the command was stopped, where nothing else has, and exit."""
    try:
        yield
    # Python and libraries convert exceptions, such as within class statements
    except Exception as error:
        printed = getattr(error, "exit_code", None) == exit_code()  # typer.Exit after the message
        if printed or not is_stopped():
            raise
        _exit_stopped()
    except KeyboardInterrupt:
        _exit_stopped()


def _exit_stopped() -> NoReturn:
    print("error: stopped", file=sys.stderr)
    sys.exit(exit_code())
