"""Work of the worker processes of test_workers.py: without torch, so that they start at once."""

from __future__ import annotations

import os
import signal
import time


def double(inbox, delay: float = 0.0) -> None:
    """Double numbers; the first one last, ``kill`` and ``exit`` end the process."""
    inbox.send(None)
    while (task := inbox.next(wait=True)) is not None:
        if task == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "exit":
            os._exit(3)
        time.sleep(delay if task == 0 else 0)
        inbox.send(2 * task)


def never_ready(inbox) -> None:
    """End before the first task."""
    os._exit(1)


def stuck(inbox) -> None:
    """Never finish a task."""
    inbox.send(None)
    time.sleep(600)
