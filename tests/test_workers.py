"""Extraction by several processes: equal results, and workers that end."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import worker_tasks
from helpers import run_python, write_photos
from tiepoints import ExtractOptions, processes
from tiepoints.errors import DataError
from tiepoints.jobs import workers
from tiepoints.jobs.extract import extract_images
from tiepoints.memory import (
    BASE,
    MIN_MEMORY,
    available_memory,
    tile_pixels,
    worker_memory,
    workers_that_fit,
)
from tiepoints.processes import Ended, WorkerPool

OPTIONS = ExtractOptions(
    detector="sobelnet", descriptor="desnet", num_keypoints=60, single_scale=True
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = write_photos(tmp_path_factory.mktemp("photos"), 6, size=(160, 120))
    (folder / "3.png").write_bytes(b"not an image")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_pool(tasks, work=worker_tasks.double, *arguments, count=2):
    with WorkerPool(count, work, arguments) as pool:
        return list(pool.results(deque(tasks)))


# --- pool


def test_results_are_in_the_order_of_the_tasks():
    tasks = list(range(20))
    assert run_pool(tasks, worker_tasks.double, 0.3) == [(task, 2 * task) for task in tasks]


def test_large_tasks_and_results_do_not_wait_for_each_other():
    tasks = [bytes([number]) * 2**21 for number in range(6)]
    found = []
    with WorkerPool(2, worker_tasks.double, ()) as pool:
        thread = threading.Thread(
            target=lambda: found.extend(pool.results(deque(tasks))), daemon=True
        )
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    assert found == [(task, 2 * task) for task in tasks]


def test_only_the_task_that_ends_its_worker_fails():
    tasks = [1, "kill", 2, 3, "exit", 4, 5]
    found = dict(run_pool(tasks))
    assert found.pop("kill") == Ended("SIGKILL")
    assert found.pop("exit") == Ended("exit code 3")
    assert found == {1: 2, 2: 4, 3: 6, 4: 8, 5: 10}


def test_tensors_are_sent_as_arrays():
    with torch.inference_mode():
        made = torch.arange(6).view(2, 3).T
    tensors = [made, torch.zeros(0, 2), torch.ones(3).bfloat16(), torch.ones(2, requires_grad=True)]
    received = pickle.loads(processes._pickled(tensors))
    assert all(map(torch.equal, tensors, received))
    assert [t.dtype for t in received] == [t.dtype for t in tensors]
    assert received[3].requires_grad
    received[0] += 1  # it can be written to
    assert b"_to_tensor" in processes._pickled(made)


def test_workers_that_cannot_start_are_an_error():
    with pytest.raises(DataError, match=r"its first result \(exit code 1\); use --workers 1"):
        run_pool([1, 2], worker_tasks.never_ready)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_wait_until_processes_are_started(name):
    """In a process of its own: a signal that was not deferred would end that of the tests."""
    script = (
        "import signal, threading, time; from tiepoints import processes\n"
        f"number = signal.{name}\n"
        "def handler(received, _):\n"
        "    raise KeyboardInterrupt\n"
        "def send():\n"
        "    wanted.wait()\n"
        # to a thread that does not block it, as those of torch
        "    signal.pthread_kill(threading.get_ident(), number)\n"
        "signal.signal(number, handler)\n"
        "wanted = threading.Event(); sender = threading.Thread(target=send); sender.start()\n"
        "try:\n"
        "    with processes.interrupts_blocked():\n"
        "        wanted.set(); sender.join(); time.sleep(0.05); print('started', flush=True)\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped', signal.getsignal(number) is handler)\n"
    )
    code, out, err = run_python(script)
    assert (code, out) == (0, "started\nstopped True\n"), err


def test_a_closed_pool_has_no_processes():
    pool = WorkerPool(2, worker_tasks.stuck, ())
    results = pool.results(deque([1, 2]))
    pool.start()
    running = [worker.process for worker in pool._workers]
    pool.close()
    results.close()
    assert [process.exitcode for process in running] == [-signal.SIGKILL] * 2


# --- extraction


@pytest.mark.parametrize("form", ["npy", "h5", "colmap"])
def test_features_do_not_depend_on_the_number_of_workers(photos, tmp_path, forked, form):
    reports = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        report = extract_images([str(photos)], folder, OPTIONS, format=form, workers=count)
        reports.append(replace(report, seconds=0.0, output=""))
    assert reports[0] == reports[1]
    assert reports[0].done == 5
    assert [Path(name).name for name, _ in reports[0].failed] == ["3.png"]
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_command_with_started_workers(photos, tmp_path):
    """The usual start of processes; masks are read by them."""
    masks = tmp_path / "masks"
    (masks / photos.name).mkdir(parents=True)
    (masks / photos.name / "0.png.png").write_bytes((photos / "0.png").read_bytes())
    command = [sys.executable, "-m", "tiepoints", "-q", "extract", photos, "--output", tmp_path]
    command += ["--workers", "2", "--masks", masks, "--detector", "sobelnet", "--json"]
    command += ["--descriptor", "none", "--single-scale"]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    report = json.loads(ended.stdout)
    assert report["done"] == 1
    assert len(report["failed"]) == 5
    assert "no mask" in report["failed"][0][1]


def test_interrupted_extraction_resumes(photos, tmp_path, forked, monkeypatch):
    from tiepoints.formats.npy import FeatureFolder

    write, written = FeatureFolder.write, []

    def interrupted(store, name, *arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        return write(store, name, *arguments)

    monkeypatch.setattr(FeatureFolder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract_images([str(photos)], tmp_path, OPTIONS, workers=2)
    assert not processes.multiprocessing.active_children()
    monkeypatch.setattr(FeatureFolder, "write", write)
    report = extract_images([str(photos)], tmp_path, OPTIONS, workers=2)
    assert (report.skipped, report.done) == (2, 3)


def test_an_image_that_ends_its_worker_is_reported(photos, tmp_path, forked, monkeypatch):
    from tiepoints.extract import Extractor

    read = Extractor.read

    def fatal(extractor, source):
        if Path(source).name == "1.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(extractor, source)

    monkeypatch.setattr(Extractor, "read", fatal)
    report = extract_images([str(photos)], tmp_path, OPTIONS, workers=2)
    assert report.done == 4
    assert [Path(name).name for name, _ in report.failed] == ["1.png", "3.png"]
    assert "SIGKILL" in report.failed[0][1]


def test_workers_start_when_the_first_images_take_long(photos, tmp_path, forked, monkeypatch):
    started = []
    start = WorkerPool.start
    monkeypatch.setattr(WorkerPool, "start", lambda pool: started.append(start(pool)))
    monkeypatch.setattr(workers, "usable_cores", lambda: 2)
    monkeypatch.setattr(workers, "IMAGES_PER_WORKER", 1)
    monkeypatch.setattr(processes, "usable_cores", lambda: 2)
    report = extract_images([str(photos)], tmp_path / "short", OPTIONS, workers=None)
    assert (report.done, started) == (5, [])
    monkeypatch.setattr(workers, "WORTH_SECONDS", -100.0)
    report = extract_images([str(photos)], tmp_path / "long", OPTIONS, workers=None)
    assert report.done == 5
    assert started
    assert contents(tmp_path / "short") == contents(tmp_path / "long")


# --- number of workers, memory


def tasks_of(folder: Path):
    from tiepoints.files import collect

    return deque(collect([str(folder)]).tasks)


def test_number_of_workers(photos, monkeypatch):
    extractor = OPTIONS.build()
    monkeypatch.setattr(workers, "usable_cores", lambda: 8)
    tasks = tasks_of(photos)
    assert workers.choose_workers(None, extractor, tasks) == 1  # few images
    many = deque(list(tasks) * 10)
    monkeypatch.setattr(workers, "workers_that_fit", lambda memory, pixels: 3)
    assert workers.choose_workers(None, extractor, many) == 3
    monkeypatch.setattr(workers, "workers_that_fit", lambda memory, pixels: 0)
    assert workers.choose_workers(None, extractor, many) == 1
    assert workers.choose_workers(2, extractor, tasks) == 2
    assert workers.choose_workers(20, extractor, tasks) == 6


def test_networks_in_memory_and_gpus_have_one_process(photos):
    from tiepoints.weights import load

    extractor = replace(OPTIONS, detector=load("sobelnet")).build()
    assert workers.choose_workers(None, extractor, deque(range(100))) == 1
    with pytest.raises(ValueError, match="save it to a file"):
        workers.choose_workers(2, extractor, tasks_of(photos))
    extractor.device = torch.device("cuda")
    with pytest.raises(ValueError, match="use --device cpu"):
        workers.choose_workers(2, extractor, tasks_of(photos))


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", ""])
def test_invalid_number_of_workers(text):
    with pytest.raises(ValueError, match="auto or at least 1"):
        workers.parse_workers(text)


def test_memory_is_divided_among_workers(photos, tmp_path, forked):
    extractor = replace(OPTIONS, memory=3 << 30).build()
    assert workers.worker_options(extractor, 2).memory == ((3 << 30) - BASE) // 2
    limited = replace(OPTIONS, memory=MIN_MEMORY + BASE)
    with pytest.raises(ValueError, match="use --workers 1"):
        extract_images([str(photos)], tmp_path / "out", limited, workers=2)
    assert not (tmp_path / "out").exists()
    assert workers_that_fit(1 << 30, 1_000_000) == 0
    assert workers_that_fit(3 << 30, 1_000_000) == 2
    assert workers_that_fit(3 << 30, 100_000_000) == 1
    # the parts of large images are those of one process, so the features are equal
    assert tile_pixels(worker_memory(3 << 30, 2)) == tile_pixels(3 << 30)
    assert available_memory() > 1 << 20


def test_images_too_large_for_a_worker_come_last(photos, tmp_path, forked, monkeypatch):
    """Extracted by the process that has the whole memory, instead of being refused."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "c.png"):
        (folder / name).write_bytes((photos / "0.png").read_bytes())
    Image.open(photos / "1.png").resize((1600, 1000)).save(folder / "a.png")
    options = replace(OPTIONS, memory=BASE + 2 * MIN_MEMORY + 2)
    report = extract_images([str(folder)], tmp_path / "out", options, workers=2)
    assert (report.done, report.failed) == (3, [])
    names = [json.loads(line)["name"] for line in images_log(tmp_path / "out")]
    assert [Path(name).name for name in names] == ["b.png", "c.png", "a.png"]


def images_log(folder: Path) -> list[str]:
    return (folder / "images.jsonl").read_text().splitlines()


def test_cores_of_a_container(tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(processes, "CGROUP", tmp_path)
    assert processes.usable_cores() == min(2, len(os.sched_getaffinity(0)))
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert processes.usable_cores() == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processes.usable_cores() >= 1


def test_workers_end_with_a_killed_parent(tmp_path):
    script = (
        "import sys, time; from collections import deque; import worker_tasks\n"
        "from tiepoints.processes import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    pool = WorkerPool(1, worker_tasks.stuck, ()); pool.start()\n"
        "    print(pool._workers[0].process.pid, flush=True); time.sleep(600)\n"
    )
    path = tmp_path / "parent.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 20
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


def test_threads_of_a_command_sleep_soon(monkeypatch):
    from tiepoints.cli import SPIN_COUNT, limit_spinning

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == SPIN_COUNT
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
