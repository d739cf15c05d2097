"""Shards of a job on a Ray cluster: its actors hold what the work needs, such as networks, and
write files of shards; Ray distributes them, and restarts and retries the actors that end.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import DataError, first_line
from ..extract import ExtractOptions
from ..files import require
from ..memory import worker_memory
from ..processes import usable_cores

#: How often a shard is tried whose worker ends.
TRIES = 3
#: Shards per worker, so that all workers end at about the same time, and the largest ones.
SHARDS_PER_WORKER = 4
MAX_IMAGES, MAX_PAIRS = 256, 4000
#: Bytes of the shared memory of a cluster on this computer; nothing large is passed by it.
SHARED_MEMORY = 2**27

#: ``setup(*arguments)`` gives the function that an actor calls with each job.
Setup = Callable[..., Callable[[Any], Any]]


@dataclass(frozen=True)
class Lost:
    """Instead of a result: the workers that tried a job have ended.

    Attributes:
        reason: what Ray says about it.
    """

    reason: str


@dataclass(frozen=True)
class Cluster:
    """A connected Ray cluster.

    Attributes:
        ray: the module.
        actors: number of workers.
        needs: what each of them needs: ``num_cpus`` and ``num_gpus``.
        per_node: largest number of workers of a machine.
    """

    ray: Any
    actors: int
    needs: dict[str, int]
    per_node: int

    def worker_options(self, options: ExtractOptions) -> ExtractOptions:
        """Options of the extractor of a worker, which has its share of the memory.

        Raises:
            ValueError: the memory is too little.
        """
        if options.memory is None:
            return options
        return replace(options, memory=worker_memory(options.memory, self.per_node))

    def shard_size(self, count: int, largest: int) -> int:
        """Number of items of a shard of ``count`` items, at most ``largest``."""
        return max(1, min(largest, -(-count // (SHARDS_PER_WORKER * self.actors))))

    def run(self, setup: Setup, arguments: tuple[Any, ...], jobs: Sequence[Any]) -> Iterator[Any]:
        """Results of jobs, or ``Lost``, in the order in which they end.

        Raises:
            DataError: the workers cannot start.
            Exception: what the work on a job raised.
        """
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool

        actor = self.ray.remote(max_restarts=-1, max_task_retries=TRIES - 1, **self.needs)(_Worker)
        count = min(self.actors, len(jobs))
        workers = [actor.remote(os.getcwd(), self.needs, setup, arguments) for _ in range(count)]
        started, _ = self.ray.wait([worker.started.remote() for worker in workers])
        try:
            self.ray.get(started)
        except RayError as error:
            last = str(error).strip().rpartition("\n")[2]
            raise DataError(f"the Ray workers could not start ({last})") from error
        pool = ActorPool(workers)
        for job in jobs:
            pool.submit(lambda worker, job: worker.work.remote(job), job)
        while pool.has_next():
            try:
                yield pool.get_next_unordered()
            except RayTaskError as error:
                raise error.cause or error from error
            except RayError as error:
                yield Lost(first_line(error))


class _Worker:
    """Actor: works on jobs, with relative paths as in the process that started it."""

    def __init__(
        self, folder: str, needs: dict[str, int], setup: Setup, arguments: tuple[Any, ...]
    ):
        with suppress(OSError):
            os.chdir(folder)
        torch.set_num_threads(max(1, needs["num_cpus"]))
        self._work = setup(*arguments)

    def started(self) -> None:
        """Return once the worker is ready."""

    def work(self, job: Any) -> Any:
        """Result of a job."""
        return self._work(job)


@contextmanager
def connect(address: str, *, device: str = "cpu", workers: int | None = None) -> Iterator[Cluster]:
    """Connect to a Ray cluster, unless this process is connected already.

    Args:
        address: of the cluster; ``auto``: the one that runs on this computer or that the variable
            ``RAY_ADDRESS`` names, else a new one of all cores of this computer.
        device: of the extractor; unless ``cpu``, each worker has a GPU if the cluster has any.
        workers: their number; by default one for each core or GPU.

    Raises:
        ImportError: Ray is missing.
        ValueError: no address.
        ConnectionError: no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports about users
    ray = require("ray", extra="ray", purpose="a Ray cluster")
    connected = ray.is_initialized()
    if not connected:
        with _handlers_kept():
            _start(ray, address)
    try:
        gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
        kind = "GPU" if gpu else "CPU"
        nodes = [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]
        count = max(1, sum(nodes))
        actors = count if workers is None else min(workers, count)
        needs = {"num_cpus": 0 if gpu else 1, "num_gpus": int(gpu)}
        yield Cluster(ray, actors, needs, max([1, *nodes]))
    finally:
        if not connected:
            ray.shutdown()


def _start(ray: Any, address: str) -> None:
    # output of workers must not mix with that of this process
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address != "auto":
        _check_address(address)
        ray.init(address=address, **quiet)
        return
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init(
            address="local",
            num_cpus=usable_cores(),
            include_dashboard=False,
            object_store_memory=SHARED_MEMORY,
            **quiet,
        )


def _check_address(address: str) -> None:
    """Check that something listens at an address, for which Ray would wait for minutes.

    Raises:
        ValueError: no address.
        ConnectionError: nothing listens.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"a Ray cluster is auto or HOST:PORT, such as 10.0.0.1:6379; got {address!r}"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"no Ray cluster at {address} ({error}); start one with: ray start --head"
        ) from error


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keep the signal handlers of this process, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
