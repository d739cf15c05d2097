"""Extraction and matching on a local Ray cluster of two workers, of which one is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from helpers import write_photos
from test_shards import OPTIONS, content
from tiepoints.jobs import cluster
from tiepoints.jobs.extract import extract_images
from tiepoints.jobs.match import match_images
from tiepoints.jobs.shards import shards_folder

ray = pytest.importorskip("ray", reason="extra ray")


@pytest.fixture(scope="module", autouse=True)
def two_workers():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=cluster.SHARED_MEMORY,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 12, (640, 480))


def writers(folder: Path) -> dict[int, int]:
    """Process -> bytes of the journal of a shard that it has open."""
    found = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = Path(os.readlink(link))
            if target.parent == folder and target.suffix == ".journal":
                found[int(link.parts[2])] = target.stat().st_size
        except OSError:  # a process that has ended
            continue
    return found


class Killer(threading.Thread):
    """Kills the first process that has written to the journal of a shard."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.killed, self.written = folder, 0, 0

    def run(self) -> None:
        end = time.monotonic() + 60
        while not self.killed and time.monotonic() < end:
            for pid, written in writers(self.folder).items():
                if written and pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
                    self.killed, self.written = pid, written
                    return


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_results_are_those_of_one_process_although_a_worker_is_killed(photos, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    extract_images([str(photos)], one, OPTIONS, format="h5", progress=False)
    killer = Killer(shards_folder(many / "features.h5"))
    killer.start()
    report = extract_images([str(photos)], many, OPTIONS, format="h5", ray="auto", progress=False)
    killer.join()
    assert killer.killed
    assert killer.written > 0
    assert (report.done, report.failed) == (12, [])
    assert content(many / "features.h5") == content(one / "features.h5")
    for folder in (one, many):
        more = {"ray": "auto"} if folder == many else {}
        output = folder / "matches.h5"
        found = match_images([], output, features=folder / "features.h5", progress=False, **more)
        assert found.done == 66
    assert content(many / "matches.h5") == content(one / "matches.h5")
    assert not list(tmp_path.rglob("*.shards"))


def test_matching_extracts_on_the_cluster(photos, tmp_path):
    images = [str(photos / f"{i}.png") for i in range(4)]
    one, many = tmp_path / "one.h5", tmp_path / "many.h5"
    match_images(images, one, OPTIONS, progress=False)  # estimates the rotation of each pair
    assert match_images(images, many, OPTIONS, ray="auto", progress=False).done == 6
    assert content(many) == content(one)
    assert content(tmp_path / "many.features.h5") == content(tmp_path / "one.features.h5")


def always_ending():
    """The work of a worker that ends at job 1."""

    def work(job: int) -> int:
        if job == 1:
            os._exit(1)
        return 10 * job

    return work


def failing():
    def work(job: int) -> int:
        raise OSError(28, "No space left on device")

    return work


def test_jobs_that_end_their_workers_are_lost(monkeypatch):
    with cluster.connect("auto") as connected:
        assert (connected.actors, connected.needs["num_cpus"]) == (2, 1)
        found = list(connected.run(always_ending, (), [0, 1, 2, 3]))
        lost = [result for result in found if isinstance(result, cluster.Lost)]
        assert sorted(result for result in found if result not in lost) == [0, 20, 30]
        assert len(lost) == 1
        with pytest.raises(OSError, match="No space left"):
            list(connected.run(failing, (), [0]))


def test_workers_and_sizes_of_shards():
    connected = cluster.Cluster(ray, 8, {"num_cpus": 1, "num_gpus": 0}, 4)
    assert [connected.shard_size(count, 256) for count in (1, 33, 10_000)] == [1, 2, 256]
