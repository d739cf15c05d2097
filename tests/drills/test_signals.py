"""Commands that are stopped or killed at random moments, then resumed, equal unbroken ones."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from drilling import (
    FULL,
    Command,
    assert_equal_content,
    commands,
    content,
    handles_signals,
    number,
    run,
    temporary_files,
    texture,
    write_photos,
)

pytest.importorskip("h5py")
pytest.importorskip("pycolmap")
pytest.importorskip("lightning")
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
FEW = ("--num-keypoints", 60)

#: Name -> arguments; PHOTOS, LARGE, SCENE and SEQUENCES are folders of images.
COMMANDS = {
    **commands(60, steps=24, validate_every=12, workers=1),
    "evaluate": ("evaluate", "SEQUENCES", "--systems", "keynet,sobelnet", "--output", "out"),
    "pairs": ("pairs", "--images", "LARGE", "--output", "p.st", "--count", 12, "--workers", 1),
    "imc": ("imc", "SCENE", "--output", "out", "--label", "x", "--matches", *FEW),
}


@pytest.fixture(scope="session")
def places(photos, tmp_path_factory) -> dict[str, Path]:
    """The folders that stand for the capital names of ``COMMANDS``."""
    base = tmp_path_factory.mktemp("places")
    scene = base / "imc" / "phototourism" / "church"
    scene.mkdir(parents=True)
    for path in sorted(photos.iterdir())[:3]:
        (scene / path.name).write_bytes(path.read_bytes())
    sequence = base / "hpatches" / "v_wall"
    sequence.mkdir(parents=True)
    for i in range(3):
        texture().crop((6 * i, 4 * i, 6 * i + 160, 4 * i + 120)).save(sequence / f"{i + 1}.ppm")
        if i:
            np.savetxt(sequence / f"H_1_{i + 1}", [[1, 0, -6 * i], [0, 1, -4 * i], [0, 0, 1]])
    large = write_photos(base / "large", 4, (400, 360))
    return {"PHOTOS": photos, "LARGE": large, "SCENE": base / "imc", "SEQUENCES": base / "hpatches"}


def arguments_of(name: str, places: dict[str, Path]) -> list[object]:
    return [places.get(str(word), word) for word in COMMANDS[name]]


def check_stopped(command: Command, code: int, expected: int, folder: Path) -> None:
    """The right exit code, and after a clean stop also the message and no temporary files."""
    output = command.output()
    assert code in (0, expected), f"exit code {code}: {output[-2000:]}"
    assert "Traceback" not in output, output[-3000:]
    if code > 0:
        assert "stopped" in output, output
        assert not temporary_files(folder), temporary_files(folder)


@pytest.mark.parametrize(
    "name",
    # a training takes long; tests/test_cli.py has a short one
    [name for name in COMMANDS if FULL or name != "train"],
)
def test_stopped_commands_resume(name, places, tmp_path, drill):
    arguments = arguments_of(name, places)
    started = time.monotonic()
    run(arguments, tmp_path / "whole")
    duration = time.monotonic() - started
    expected = content(tmp_path / "whole")
    assert expected
    moments = random.Random(name)
    first = list(COMMANDS).index(name) % 3
    signals = (list(CODES) * 8)[first : first + number(1, 9 if name == "train" else 24)]
    for index, sent in enumerate(signals):
        with drill.run(f"{signal.Signals(sent).name} {index}"):
            folder = tmp_path / f"broken{index}"
            command = Command(arguments, folder, group=sent == signal.SIGINT)
            command.send(sent, moments.uniform(0, 0.9 * duration))
            check_stopped(command, command.wait(), CODES[sent], folder)
            run(arguments, folder)
            assert not temporary_files(folder), temporary_files(folder)
            assert_equal_content(content(folder), expected)


def start(arguments: list[object], folder: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "tiepoints", *map(str, arguments)]
    return subprocess.Popen(
        words,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_signals_during_the_start_of_a_command(photos, tmp_path, drill):
    """While modules are imported, there is nothing to resume: only a message and the code."""
    arguments = ["extract", photos, "--output", "out", *FEW]
    moments = random.Random(0)
    for index in range(number(2, 60)):
        sent = (signal.SIGTERM, signal.SIGINT)[index % 2]
        with drill.run(f"{sent.name} {index}"):
            process = start(arguments, tmp_path)
            while not handles_signals(process.pid):
                time.sleep(0.002)
            time.sleep(moments.uniform(0, number(1, 3)))
            os.killpg(process.pid, sent)
            error = process.communicate(timeout=60)[1]
            # when the command has ended, Python itself may be ended by the signal
            assert process.returncode in (0, CODES[sent], -sent), f"{process.returncode}: {error}"
            assert "Traceback" not in error, error
            assert process.returncode != CODES[sent] or "stopped" in error, error
            assert not temporary_files(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes as on Linux")
@pytest.mark.parametrize(("name", "count"), [("evaluate", 3), ("extract h5", 2), ("match db", 2)])
def test_workers_end_with_their_command(name, count, places, tmp_path, drill):
    """Two worker processes, and those that serve them: killed with their parent, or stopped
    by it.
    """
    arguments = [*arguments_of(name, places), "--workers", 2]
    for index in range(number(1, 4)):
        for sent in CODES:
            with drill.run(f"{signal.Signals(sent).name} {index}"):
                folder = tmp_path / f"{sent}-{index}"
                command = Command(arguments, folder, group=sent != signal.SIGKILL)
                children = wait_for_children(command, count)
                assert len(children) >= count, command.output()
                command.send(sent, 0.5 * index)
                check_stopped(command, command.wait(), CODES[sent], folder)
                deadline = time.monotonic() + 20
                while any(map(is_running, children)) and time.monotonic() < deadline:
                    time.sleep(0.05)
                assert not [pid for pid in children if is_running(pid)], command.output()


def wait_for_children(command: Command, count: int) -> list[int]:
    """The processes of a command that have been there twice, when there are ``count`` or the
    command has ended; others, such as those that read the processor's name, live for moments.
    """
    before: list[int] = []
    found: list[int] = []
    while len(found) < count and is_running(command.process.pid):
        now = descendants(command.process.pid)
        found, before = [pid for pid in now if pid in before], now
        time.sleep(0.05)
    return found


def descendants(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:  # ended
        return []
    own = [int(word) for word in text.split()]
    return own + [inner for child in own for inner in descendants(child)]


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()
