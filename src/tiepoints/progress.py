"""Progress of long jobs: a bar with rate and time left on a terminal, else log lines."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)
T = TypeVar("T")
#: Seconds between log lines without a terminal.
INTERVAL = 30.0


class Progress:
    """Progress of a number of steps; a context manager.

    Args:
        total: number of steps, None if unknown.
        unit: name of a step, such as ``image``.
        label: name of the job, such as ``extract``.
        enabled: False shows nothing.
        initial: number of steps already completed.
    """

    def __init__(
        self,
        total: int | None,
        *,
        unit: str,
        label: str,
        enabled: bool = True,
        initial: int = 0,
    ):
        self.total, self.unit, self.label, self.initial = total, unit, label, initial
        self.count, self.enabled = initial, enabled
        self.started = self.shown = time.monotonic()
        self.values: dict[str, str] = {}
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=initial, unit=unit, desc=label, dynamic_ncols=True, delay=1.0
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def set_total(self, total: int) -> None:
        """Set the number of steps once it is known."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total

    def set_values(self, **values: str) -> None:
        """Set values to show next to the count."""
        self.values = values
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def update(self, steps: int = 1) -> None:
        """Advance by ``steps``."""
        self.count += steps
        if self._bar is not None:
            self._bar.update(steps)
        elif self.enabled and time.monotonic() - self.shown > INTERVAL:
            self.shown = time.monotonic()
            logger.info(self.line())

    def line(self) -> str:
        """The state in one line: count, rate and time left."""
        rate = (self.count - self.initial) / max(time.monotonic() - self.started, 1e-9)
        total = "" if self.total is None else f" of {self.total}"
        text = f"{self.label}: {self.count}{total} {self.unit}s, {rate:.2g} {self.unit}s/s"
        if self.total is not None and rate > 0:
            left = round((self.total - self.count) / rate)
            text += f", {left // 60} min {left % 60} s left"
        return text + "".join(f", {name} {value}" for name, value in self.values.items())


def track(
    items: Iterable[T], *, total: int | None = None, unit: str, label: str, enabled: bool = True
) -> Iterator[T]:
    """Iterate over items with progress."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Progress(total, unit=unit, label=label, enabled=enabled) as progress:
        for item in items:
            yield item
            progress.update()
