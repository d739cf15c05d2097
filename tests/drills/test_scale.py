"""Many images: linear time and bounded memory (only in ``make drills``)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from drilling import FULL, Command, texture

pytestmark = pytest.mark.skipif(not FULL, reason="takes minutes; run by `make drills`")
COUNT = 5000
#: Bytes of the largest process, with torch.
LIMIT = 400 << 20


@pytest.mark.parametrize("form", ["npy", "h5"])
def test_many_images(form, tmp_path, drill):
    if form == "h5":
        pytest.importorskip("h5py")
    photos = tmp_path / "photos"
    photos.mkdir()
    first = photos / "0.png"
    texture(size=(64, 48)).save(first)
    for index in range(1, COUNT):
        os.link(first, photos / f"{index}.png")
    with drill.run(f"{COUNT} images"):
        arguments = ["extract", photos, "--output", "out", "--format", form, "--single-scale"]
        command = Command([*arguments, "--num-keypoints", 10], tmp_path / "run")
        seconds, peak = watch(command, tmp_path / "run" / "out", form)
        assert command.wait() == 0, command.output()[-1000:]
        assert f"{COUNT} extracted" in command.output()
        assert peak < LIMIT, f"{peak >> 20} MiB"
        halves = seconds[1] - seconds[0], seconds[2] - seconds[1]
        assert halves[1] < 1.5 * halves[0] + 1, halves


def watch(command: Command, output: Path, form: str) -> tuple[list[float], int]:
    """Seconds at the first, the middle and the last image, and the peak of the process's memory."""
    steps, seconds, peak = [1, COUNT // 2, COUNT], list[float](), 0
    started = time.monotonic()
    while command.process.is_alive():
        try:
            status = Path(f"/proc/{command.process.pid}/status").read_text()
        except OSError:
            break
        high = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        peak = max(peak, *(int(value) << 10 for value in high), 0)
        while len(seconds) < len(steps) and count(output, form) >= steps[len(seconds)]:
            seconds.append(time.monotonic() - started)
        time.sleep(0.1)
    seconds += [time.monotonic() - started] * (len(steps) - len(seconds))
    return seconds, peak


def count(output: Path, form: str) -> float:
    """Number of images that are stored, in a journal by its share of equal records."""
    if form == "npy":
        return len(list(output.rglob("*.kpt.npy")))
    journal = output / "features.h5.journal"
    size = journal.stat().st_size if journal.exists() else 0
    record = 7000  # ten keypoints with descriptors
    return size / record
