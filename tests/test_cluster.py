"""Extraction and matching on a local Ray cluster of two workers, of which one is killed."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from helpers import write_photos
from test_shards import OPTIONS, content
from tiepoints.errors import DataError
from tiepoints.formats.hdf5 import FeatureFile
from tiepoints.jobs import cluster
from tiepoints.jobs.extract import _shard_extractor as shard_extractor
from tiepoints.jobs.extract import extract_images
from tiepoints.jobs.match import match_images

ray = pytest.importorskip("ray", reason="extra ray")


@pytest.fixture(scope="module", autouse=True)
def two_workers():
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # of the workers
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
    patch.undo()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 12, (640, 480))


def killed_once(marker: Path, *arguments):
    """``_shard_extractor`` whose process is killed when it has written three images, but only the
    first that creates ``marker``.
    """
    written = []

    def write(store, *values):
        written.append(plain(store, *values))
        if len(written) == 3:
            try:
                marker.touch(exist_ok=False)
            except FileExistsError:
                return written[-1]
            os.kill(os.getpid(), signal.SIGKILL)
        return written[-1]

    plain, FeatureFile.write = FeatureFile.write, write
    return shard_extractor(*arguments)


def test_results_are_those_of_one_process_although_a_worker_is_killed(
    photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster, "SHARDS_PER_WORKER", 1)
    killing = partial(killed_once, tmp_path / "killed")
    monkeypatch.setattr("tiepoints.jobs.extract._shard_extractor", killing)
    one, many = tmp_path / "one", tmp_path / "many"
    extract_images([str(photos)], one, OPTIONS, format="h5", progress=False)
    report = extract_images([str(photos)], many, OPTIONS, format="h5", ray="auto", progress=False)
    assert (tmp_path / "killed").exists()
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


def of_any_kind():
    """The work of a worker that ends at job 1 and fails at job 2."""

    def work(job: int) -> int:
        if job == 1:
            os._exit(1)
        if job == 2:
            raise OSError(28, "No space left on device")
        return 10 * job

    return work


def not_starting():
    raise ImportError("no such library")


def test_jobs_that_end_their_workers_are_lost(monkeypatch):
    monkeypatch.setattr(cluster, "TRIES", 2)  # the fewest: Ray waits for restarts
    with cluster.connect("auto") as connected:
        assert (connected.actors, connected.needs["num_cpus"]) == (2, 1)
        found = list(connected.run(of_any_kind, (), [0, 1, 3, 4]))
        lost = [result for result in found if isinstance(result, cluster.Lost)]
        assert len(lost) == 1
        assert sorted(result for result in found if result not in lost) == [0, 30, 40]
        with pytest.raises(OSError, match="No space left"):
            list(connected.run(of_any_kind, (), [2]))
        with pytest.raises(DataError, match=r"could not start \(.*no such library"):
            list(connected.run(not_starting, (), [0]))


def test_addresses_without_a_cluster():
    with pytest.raises(ValueError, match="HOST:PORT"):
        cluster._check_address("somewhere")
    with pytest.raises(ConnectionError, match="no Ray cluster at localhost:1 "):
        cluster._check_address("localhost:1")


def test_workers_and_sizes_of_shards():
    connected = cluster.Cluster(ray, 8, {"num_cpus": 1, "num_gpus": 0}, 4)
    assert [connected.shard_size(count, 256) for count in (1, 33, 10_000)] == [1, 2, 256]
