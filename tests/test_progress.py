"""Progress without a terminal: log lines with count, rate and time left."""

import logging

import pytest

from tiepoints import progress
from tiepoints.progress import Progress, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""
    times = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times[0])
    return times


def test_a_line_every_thirty_seconds(clock, caplog):
    caplog.set_level(logging.INFO, logger="tiepoints")
    for index, _ in enumerate(track(range(10), unit="image", label="extract"), 1):
        clock[0] = 10.0 * index
    assert [record.getMessage() for record in caplog.records] == [
        "extract: 4 of 10 images, 0.1 images/s, 1 min 0 s left",
        "extract: 8 of 10 images, 0.1 images/s, 0 min 20 s left",
    ]


def test_resumed_work_counts_what_was_done_and_shows_values(clock):
    with Progress(None, unit="step", label="train", initial=100, enabled=False) as bar:
        clock[0] = 10.0
        bar.update(20)
        assert bar.line() == "train: 120 steps, 2 steps/s"
        bar.set_total(200)
        bar.set_values(loss="0.5")
        assert bar.line() == "train: 120 of 200 steps, 2 steps/s, 0 min 40 s left, loss 0.5"


def test_disabled_progress_is_silent(clock, caplog):
    caplog.set_level(logging.INFO, logger="tiepoints")
    for _ in track(range(3), unit="image", label="extract", enabled=False):
        clock[0] += 100.0
    assert not caplog.records
