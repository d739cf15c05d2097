"""Shared by the drills: commands in processes that can be killed, comparison of results, counts.

``make drills`` runs all of them with full numbers (DRILLS=full); the test suite runs a short form.
Commands run in forks of a process that has imported the package, because a start of torch takes
seconds; ``test_signals.py`` also stops real processes during their start.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FULL = os.environ.get("DRILLS") == "full"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the forks
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        *(f"tiepoints.cli.{name}" for name in ("commands", "match", "train")),
        *("tiepoints.jobs.match", "tiepoints.jobs.imc", "tiepoints.formats.hdf5"),
        *("tiepoints.training.recipes", "tiepoints.evaluation.run", "h5py", "pycolmap"),
    ]
)
#: Temporary files and locks of this package and of SQLite.
TEMPORARY = re.compile(r"\.part(\.\w+)?$|\.tmp$|-wal$|-shm$|-journal$|\.lock$")
#: Keys of JSON files that differ between equal runs.
VOLATILE = {"seconds", "date", "spent", "versions", "time", "modified"}


def number(short: int, full: int) -> int:
    """A count in the test suite and in ``make drills``."""
    return full if FULL else short


@dataclass
class Drill:
    """Counts the runs of a drill and collects failures, so that one does not end the drill."""

    name: str
    runs: int = 0
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def run(self, what: str) -> Iterator[None]:
        """Count a run; a failed assertion within is a failure called ``what``."""
        self.runs += 1
        try:
            yield
        except AssertionError as error:
            self.failures.append(f"{what}: {error}")


# ---- commands


def commands(num_keypoints: int, *, steps: int, validate_every: int, workers: int = 0) -> dict:
    """Name -> arguments of the commands that write stores and weights; PHOTOS and LARGE stand for
    folders of images.
    """
    extract = ("extract", "PHOTOS", "--output", "out", "--num-keypoints", num_keypoints)
    match = ("match", "PHOTOS", "--num-keypoints", num_keypoints)
    return {
        "extract npy": extract,
        "extract h5": (*extract, "--format", "h5"),
        "extract colmap": (*extract, "--format", "colmap"),
        "match h5": (*match, "--output", "m.h5"),
        "match db": (*match, "--output", "m.db"),
        "train": (
            *("train", "keynet-tiny", "--images", "LARGE", "--output", "w.safetensors", "--resume"),
            *("--steps", steps, "--validate-every", validate_every, "--workers", workers),
            *("--batch-size", 1, "--save-every", 0, "--device", "cpu", "--no-compare"),
        ),
    }


def _call(arguments: list[str], folder: Path, log: Path, group: bool) -> None:
    from tiepoints.cli import main

    # a fork inherits the method by which it was started; the command's workers use the usual one
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    if group:
        os.setsid()
    os.chdir(folder)
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["tiepoints", *arguments]
    main()


class Command:
    """A command of the package, running in ``folder``; its output goes to ``log``.

    Args:
        log: a file, by default next to ``folder``.
        group: with a process group of its own, to which ``send`` sends signals.
    """

    def __init__(
        self, arguments: list[Any], folder: Path, *, log: Path | None = None, group: bool = False
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder.with_name(folder.name + ".log") if log is None else log
        self.log.unlink(missing_ok=True)
        self.group = group
        words = [str(argument) for argument in arguments]
        self.process = _FORKS.Process(target=_call, args=(words, folder, self.log, group))
        self.process.start()

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, timeout: float = 120.0) -> int:
        """The exit code; the negative number of the signal for a killed process."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"no end within {timeout} s; {self.output()[-500:]}")
        return self.process.exitcode

    def send(self, number: int, after: float) -> None:
        """Send a signal, to the whole process group as a terminal does if it has its own,
        ``after`` seconds from when the process handles signals.
        """
        while not handles_signals(self.process.pid):
            time.sleep(0.001)
        self.process.join(after)
        if self.process.exitcode is None:
            with suppress(ProcessLookupError):  # it has ended since
                (os.killpg if self.group else os.kill)(self.process.pid, number)


def handles_signals(pid: int) -> bool:
    """Whether a process of the command has set its handlers, or has ended (Linux)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)
    # the last one that is set, and Python sets none for it
    return (
        caught is None or "zombie" in status or int(caught[1], 16) >> (signal.SIGHUP - 1) & 1 == 1
    )


def run(
    arguments: list[Any], folder: Path, codes: tuple[int, ...] = (0,), *, log: Path | None = None
) -> str:
    """Run a command to its end; returns its output."""
    command = Command(arguments, folder, log=log)
    code, output = command.wait(), command.output()
    assert code in codes, f"exit code {code}: {output[-2000:]}"
    assert "Traceback" not in output, output[-2000:]
    return output


# ---- results


def temporary_files(folder: Path) -> list[str]:
    """Temporary files anywhere below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if TEMPORARY.search(p.name))


def content(folder: Path) -> dict[str, Any]:
    """Content of all files of results below a folder, in a form that equal runs share.

    Logs, checkpoints and dates are excluded.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and ".log/" not in name:
            found[name] = _read(path, str(folder))
    return found


def _read(path: Path, folder: str) -> Any:
    if path.suffix == ".checkpoint":
        return "a checkpoint"
    if path.suffix in (".npy", ".npz"):
        loaded = np.load(path)
        arrays = {"": loaded} if path.suffix == ".npy" else dict(loaded)
        return {key: value.tolist() for key, value in arrays.items() if key != "seconds"}
    if path.suffix == ".h5":
        return _read_hdf5(path)
    if path.suffix == ".db":
        return _read_database(path)
    if path.suffix == ".safetensors":
        return _read_tensors(path)
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().replace(folder, "FOLDER").splitlines()
        texts = lines if path.suffix == ".jsonl" else ["\n".join(lines)]
        values = [_without_volatile(json.loads(text)) for text in texts]
        if path.suffix == ".jsonl" and all("name" in value for value in values):
            return {value["name"]: value for value in values}  # a log, whose last lines are valid
        return sorted(values, key=json.dumps)
    return path.read_bytes()


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_volatile(v) for k, v in value.items() if k not in VOLATILE}
    return [_without_volatile(v) for v in value] if isinstance(value, list) else value


def _read_hdf5(path: Path) -> dict[str, Any]:
    import h5py

    found: dict[str, Any] = {}
    with h5py.File(path) as file:

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                found[name] = item[()].tolist(), dict(item.attrs)

        file.visititems(visit)
    return found


def _read_database(path: Path) -> dict[str, Any]:
    from tiepoints.formats.colmap import ColmapDatabase

    with ColmapDatabase(path) as database:
        names = database.names()
        found: dict[str, Any] = {}
        for name in names:
            features = database.read(name)
            found[name] = [features.xy.tolist(), features.scale.tolist()]
            if features.descriptors is not None:
                found[name].append(features.descriptors.tolist())
        for a in names:
            for b in names:
                if a < b and database.has_matches(a, b):
                    matches, inliers = database.read_matches(a, b), database.read_inliers(a, b)
                    found[f"{a} {b}"] = matches.index.tolist(), inliers.index.tolist()
    return found


def _read_tensors(path: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return {key: value.tolist() for key, value in load_file(path).items()}


def assert_equal_content(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sorted(found) == sorted(expected), sorted(set(found) ^ set(expected))
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, f"other content: {different}"


# ---- inputs


def texture(seed: int = 0, size: tuple[int, int] = (260, 200)) -> Image.Image:
    """A gray texture (width, height) with structures of several sizes."""
    rng = np.random.default_rng(seed)
    total = np.zeros(size[::-1])
    for cell in (4, 9, 23):
        small = rng.integers(0, 256, (size[1] // cell + 2, size[0] // cell + 2), dtype=np.uint8)
        image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        total += np.asarray(image, dtype=float)
    return Image.fromarray((total / 3).astype(np.uint8))


def write_photos(folder: Path, count: int, size: tuple[int, int] = (160, 120)) -> Path:
    """Overlapping crops of a texture; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    large = texture(size=(size[0] + 8 * count, size[1] + 6 * count))
    for i in range(count):
        box = (8 * i, 6 * i, 8 * i + size[0], 6 * i + size[1])
        large.crop(box).save(folder / f"p{i}.png")
    return folder
