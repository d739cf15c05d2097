"""Full and read-only disks: a message, nothing torn, and the command resumes when there is room.

The disk is a small tmpfs; the drills are skipped where it cannot be mounted.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from drilling import (
    FULL,
    Command,
    assert_equal_content,
    commands,
    content,
    number,
    run,
    temporary_files,
    write_photos,
)

pytest.importorskip("h5py")
pytest.importorskip("pycolmap")
#: Size of the disk; the results of each command are smaller.
SIZE = 4 << 20
COMMANDS = commands(200, steps=8, validate_every=4)
NAMES = [name for name in COMMANDS if FULL or name in ("extract h5", "extract colmap")]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """An empty file system of ``SIZE`` bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    words = [mount, "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if mount is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def images(photos, tmp_path_factory) -> dict[str, Path]:
    large = tmp_path_factory.mktemp("large")
    return {"PHOTOS": photos, "LARGE": write_photos(large, 4, (400, 360)) if FULL else large}


def check_error(command: Command, codes: tuple[int, ...], words: tuple[str, ...]) -> None:
    code, output = command.wait(), command.output()
    assert code in codes, f"exit code {code}: {output[-2000:]}"
    assert "Traceback" not in output, output[-3000:]
    if code:
        assert any(word in output for word in words), output[-2000:]


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_full_disk(name, images, disk, tmp_path, drill):
    arguments = [images.get(str(word), word) for word in COMMANDS[name]]
    run(arguments, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    sizes = [path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    moments = random.Random(name)
    for index in range(number(1, 12)):
        room = int(moments.uniform(0, sum(sizes)))
        clear(disk)
        with drill.run(f"room for {room} of {sum(sizes)} bytes"):
            filler = disk / "filler"
            filler.write_bytes(bytes(SIZE - room - 16384))
            folder = disk / f"results{index}"
            # a training continues without its checkpoint, as long as it can
            codes = (0, 1, 2) if name == "train" else (1, 2)
            command = Command(arguments, folder, log=tmp_path / "full.log")
            check_error(command, codes if room < max(sizes) else (0, 1, 2), ("space", "full"))
            assert not temporary_files(folder), temporary_files(folder)
            filler.unlink()
            again = arguments
            if name == "train" and not any(folder.glob("*.checkpoint")):
                # weights were written, but no checkpoint to resume from
                again = ["--overwrite" if word == "--resume" else word for word in arguments]
            run(again, folder, log=tmp_path / "full.log")
            assert_equal_content(content(folder), expected)


@pytest.mark.parametrize("name", NAMES)
def test_read_only_disk(name, images, disk, tmp_path, drill):
    """Without results there is nothing to read; with all of them, nothing is changed."""
    arguments = [images.get(str(word), word) for word in COMMANDS[name]]
    log = tmp_path / "log"
    for state in ("empty", "complete"):
        with drill.run(state):
            if state == "complete":
                run(arguments, disk / "work", log=log)
            (disk / "work").mkdir(exist_ok=True)
            before = content(disk / "work")
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            try:
                codes = (1, 2) if state == "empty" else (0, 1, 2)
                check_error(Command(arguments, disk / "work", log=log), codes, ("ead-only",))
            finally:
                subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            assert_equal_content(content(disk / "work"), before)
