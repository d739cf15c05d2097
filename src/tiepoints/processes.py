"""Worker processes: how many, and a pool of them that survives the end of one."""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .errors import DataError

CGROUP = Path("/sys/fs/cgroup")
#: How workers are started: a fork would inherit threads of torch and locks.
START_METHOD = "spawn"
#: Tasks that a worker has at a time: one in progress, one to read in the meantime.
DEPTH = 2


def usable_cores() -> int:
    """Number of processor cores that this process may use: those of its affinity, within the quota
    of its control group (containers).
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _cgroup_cores())))


def _cgroup_cores() -> float:
    with suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = (
            (CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
        )
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Block SIGINT, for good, in the processes that are started: a terminal sends it to all of
    them, and this process stops the others. Signals that stop this process are handled at the end,
    as a process that is started halfway ends with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    with _deferred_signals():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Call the handlers of signals that arrive in the meantime at the end. The signal mask of this
    thread does not do that: another thread may receive them, and Python calls the handlers in the
    main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if callable(handler := signal.getsignal(number))
    }
    for number in handlers:
        signal.signal(number, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for received in arrived:
            signal.raise_signal(received)


def follow_parent() -> None:
    """In a worker process: ignore signals, which the parent handles, and end with the parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays: ``Connection.send`` would pass them by shared memory, one file
    descriptor each, and pickled by torch they take several times as long.
    """

    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or type(value) is not torch.Tensor or value.requires_grad:
            return NotImplemented
        try:
            return _to_tensor, (value.numpy(),)
        except TypeError:  # of another device, or a type that numpy does not have
            return NotImplemented


def _to_tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(array)


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


class Inbox:
    """Tasks that a worker receives, and the results it sends; results are in the order of the
    tasks.

    A thread receives the tasks, so that the parent, which sends the next one during the work on
    another, need not wait: it receives no results meanwhile, and large ones would wait for it.
    """

    def __init__(self, connection: Connection):
        self._connection = connection
        self._received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        try:
            while True:
                self._received.put(self._connection.recv_bytes())
        except (EOFError, OSError):  # the parent has stopped
            self._received.put(None)

    def next(self, *, wait: bool) -> Any:
        """The next task; None if, without ``wait``, there is none yet.

        Raises:
            EOFError: the parent has stopped.
        """
        try:
            task = self._received.get(block=wait)
        except queue.Empty:
            return None
        if task is None:
            raise EOFError
        return pickle.loads(task)

    def send(self, result: Any) -> None:
        """Send the result of a task."""
        self._connection.send_bytes(_pickled(result))


#: What a worker does with its tasks until there are no more.
Work = Callable[..., None]


def _run_worker(connection: Connection, work: Work, arguments: tuple[Any, ...]) -> None:
    follow_parent()
    with suppress(EOFError, ConnectionError):  # of a parent that has stopped
        work(Inbox(connection), *arguments)


@dataclass(frozen=True)
class Ended:
    """Instead of a result: the worker ended while it had this task alone.

    Attributes:
        reason: how it ended, such as ``SIGKILL``.
    """

    reason: str


@dataclass
class _Worker:
    """A process, the connection to it, and the indices of the tasks that it has.

    Attributes:
        ready: whether it has started.
        suspect: whether its task is one of a worker that ended; it gets no other.
    """

    process: Any
    connection: Connection
    tasks: deque[int] = field(default_factory=deque)
    ready: bool = False
    suspect: bool = False

    def reason(self) -> str:
        """How the process has ended."""
        self.process.join(5.0)
        code = self.process.exitcode
        if code is not None and code < 0:
            with suppress(ValueError):
                return signal.Signals(-code).name
        return f"exit code {code}"


class WorkerPool:
    """Processes that work on tasks; results come in the order of the tasks.

    The tasks of a worker that ends are given to others, one at a time: so the task that ends its
    worker is found, and the others are completed.

    Args:
        count: number of processes.
        work: called in each process as ``work(inbox, *arguments)``; it sends ``None`` when it is
            ready, and then a result for each task.
        arguments: arguments that can be pickled, like ``work``, tasks and results.
    """

    def __init__(self, count: int, work: Work, arguments: tuple[Any, ...]):
        self.count, self._work, self._arguments = count, work, arguments
        self._context: Any = multiprocessing.get_context(START_METHOD)
        self._workers: list[_Worker] = []
        self._given: dict[int, Any] = {}
        self._results: dict[int, Any] = {}
        self._suspects: deque[int] = deque()
        self._next = 0  # index of the next task

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the processes up to their number."""
        while len(self._workers) < self.count:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_run_worker, args=(theirs, self._work, self._arguments), daemon=True
            )
            with interrupts_blocked():
                process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def close(self) -> None:
        """End the processes at once."""
        for worker in self._workers:
            worker.process.kill()
            worker.connection.close()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()

    def results(self, tasks: deque[Any]) -> Iterator[tuple[Any, Any]]:
        """Work on ``tasks``, which are removed from it; yields each with its result or ``Ended``.

        Raises:
            DataError: workers cannot be started.
        """
        position = self._next  # index of the next result
        while tasks or self._given:
            self.start()
            # a slow task does not let the results of many others pile up
            last = position + 2 * DEPTH * self.count
            for worker in self._workers:
                self._give(worker, tasks, last)
            for worker in self._ready_workers():
                self._receive(worker)
            while position in self._results:
                yield self._given.pop(position), self._results.pop(position)
                position += 1

    def _give(self, worker: _Worker, tasks: deque[Any], last: int) -> None:
        """Send tasks to a worker that has room for them."""
        while len(worker.tasks) < DEPTH and not worker.suspect:
            if self._suspects and not worker.tasks:
                index = self._suspects.popleft()
                worker.suspect = True
            elif tasks and not self._suspects and self._next < last:
                index = self._next
                self._next += 1
                self._given[index] = tasks.popleft()
            else:
                return
            worker.tasks.append(index)
            with suppress(ConnectionError):  # it has ended, which receiving finds
                worker.connection.send_bytes(_pickled(self._given[index]))

    def _ready_workers(self) -> list[_Worker]:
        """Workers that have sent something, or ended; waits for the first."""
        found = wait([worker.connection for worker in self._workers])
        return [worker for worker in self._workers if worker.connection in found]

    def _receive(self, worker: _Worker) -> None:
        """Receive a result, or the end of the worker."""
        try:
            result = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._remove(worker)
            return
        if not worker.ready:
            worker.ready = True
            return
        self._results[worker.tasks.popleft()] = result
        worker.suspect = False

    def _remove(self, worker: _Worker) -> None:
        """Forget a worker that has ended, whose tasks are tried again unless it had only one."""
        reason = worker.reason()
        self._workers.remove(worker)
        worker.connection.close()
        if not worker.ready:
            raise DataError(
                f"a worker process ended before its first result ({reason}); use --workers 1"
            )
        if worker.suspect:
            self._results[worker.tasks[0]] = Ended(reason)
        else:
            self._suspects.extend(worker.tasks)
