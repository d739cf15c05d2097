"""Many images: all are extracted, in linear time and with bounded memory."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from drilling import FULL, Command, number, texture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
COUNT = number(60, 5000)
#: Bytes of the largest process, with torch.
LIMIT = 400 << 20
#: The record of each image is a line of this file, in the folder of results.
LOGS = {"npy": "images.jsonl", "h5": "features.images.jsonl"}


@pytest.mark.parametrize("form", LOGS)
def test_many_images(form, tmp_path, drill):
    if form == "h5":
        pytest.importorskip("h5py")
    photos = tmp_path / "photos"
    photos.mkdir()
    first = photos / "0.png"
    texture(size=(64, 48)).save(first)
    for index in range(1, COUNT):
        os.link(first, photos / f"{index}.png")
    arguments = ["extract", photos, "--output", "out", "--format", form, "--single-scale"]
    with drill.run(f"{COUNT} images"):
        command = Command([*arguments, "--num-keypoints", 10], tmp_path / "run")
        moments, peak = watch(command, tmp_path / "run" / "out" / LOGS[form])
        assert command.wait() == 0, command.output()[-1000:]
        assert f"{COUNT} extracted" in command.output()
        assert 0 < peak < LIMIT, f"{peak >> 20} MiB"
        if FULL:  # times of few images are chance
            middle = next(seconds for seconds, count in moments if count >= COUNT // 2)
            start, end = moments[0][0], moments[-1][0]
            assert end - middle < 1.5 * (middle - start) + 1, (start, middle, end)


def watch(command: Command, log: Path) -> tuple[list[tuple[float, int]], int]:
    """Seconds and number of extracted images while the command runs, from the first image on, and
    the peak of its memory in bytes.
    """
    moments, peak, started = list[tuple[float, int]](), 0, time.monotonic()
    while command.process.is_alive():
        try:
            status = Path(f"/proc/{command.process.pid}/status").read_text()
        except OSError:
            break
        if "VmHWM:" in status:  # not of a process that is ending
            peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) << 10)
        count = log.read_bytes().count(b"\n") if log.exists() else 0
        if count:
            moments.append((time.monotonic() - started, count))
        time.sleep(0.1)
    return moments, peak
