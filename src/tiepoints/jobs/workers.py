"""Extraction by several processes, each with its share of the cores and of the memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..extract import ExtractOptions, Extractor
from ..files import Task
from ..memory import image_pixels, release_freed, worker_memory, workers_that_fit
from ..processes import Ended, Inbox, WorkerPool, usable_cores
from .images import ImageExtractor, Outcome, count_pixels

#: Without a given number, workers are used for at least this many images for each of them ...
IMAGES_PER_WORKER = 4
#: ... which would otherwise take at least this many seconds: starting workers takes a few.
WORTH_SECONDS = 20.0
#: Seconds of the first images that later ones do not take.
WARM_UP = 1.0
#: Number of images whose sizes tell how much memory a worker needs.
SAMPLES = 20


def parse_workers(text: str) -> int | None:
    """The number of workers of an argument; None for ``auto``.

    Raises:
        ValueError: neither ``auto`` nor a positive number.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"the number of workers must be auto or at least 1; got {text!r}")
    return int(text)


def _one_process(extractor: Extractor) -> str:
    """Why an extractor cannot be used by several processes; empty if it can."""
    if extractor.device.type != "cpu":
        return f"{extractor.device.type} is used by one process; use --device cpu"
    if has_named_networks(extractor):
        return ""
    return "a network in memory is used by one process; save it to a file"


def has_named_networks(extractor: Extractor) -> bool:
    """Whether another process can build the same extractor."""
    options = extractor.options
    return options is not None and all(
        name is None or isinstance(name, str) for name in (options.detector, options.descriptor)
    )


def check_workers(workers: int | None, extractor: Extractor) -> None:
    """Check that an extractor can be used by this number of processes.

    Raises:
        ValueError: it cannot.
    """
    if workers is None or workers == 1:
        return
    if workers < 1:
        raise ValueError(f"the number of workers must be at least 1, got {workers}")
    if reason := _one_process(extractor):
        raise ValueError(f"{workers} workers are not possible: {reason}")
    worker_options(extractor, workers)


def choose_workers(workers: int | None, extractor: Extractor, tasks: deque[Task]) -> int:
    """Number of processes that extract tasks.

    Args:
        workers: None = as many as there are cores, images and memory for.

    Raises:
        ValueError: as ``check_workers``.
    """
    check_workers(workers, extractor)
    if workers is not None:
        return min(workers, max(1, len(tasks)))
    if _one_process(extractor):
        return 1
    assert extractor.options is not None
    count = min(usable_cores(), len(tasks) // IMAGES_PER_WORKER)
    files = [task.source for task in tasks] if count > 1 else []
    return max(1, min(count, _with_memory(extractor.options.memory, files)))


def _with_memory(memory: int | None, files: Sequence[Path]) -> int:
    """Number of workers for which there is memory, each with one of the images."""
    sampled = files[:: max(1, len(files) // SAMPLES)]
    return workers_that_fit(memory, max(map(count_pixels, sampled), default=0))


def fitting_workers(workers: int | None, extractor: Extractor | None, files: Sequence[Path]) -> int:
    """Number of processes that work on images, each with an extractor if one is given.

    Args:
        workers: None = as many as there are cores and memory for.

    Raises:
        ValueError: as ``check_workers``.
    """
    if extractor is not None:
        check_workers(workers, extractor)
    if workers is not None:
        return workers
    if extractor is not None and _one_process(extractor):
        return 1
    memory = None
    if extractor is not None and extractor.options is not None:
        memory = extractor.options.memory
    return max(1, min(usable_cores(), _with_memory(memory, files)))


def worker_options(extractor: Extractor, workers: int) -> ExtractOptions:
    """The options of each worker."""
    options = extractor.options
    assert options is not None
    if options.memory is None:
        return options
    return replace(options, memory=worker_memory(options.memory, workers))


def extract_tasks(
    tasks: deque[Task], images: ImageExtractor, workers: int | None
) -> Generator[tuple[Task, Outcome], None, None]:
    """Extract tasks, which are removed from ``tasks``; yields them in their order, but last those
    too large for the memory of a worker.

    Args:
        workers: see ``choose_workers``. By default, this process extracts the first images, and
            workers the others if that is faster.

    Raises:
        ValueError: as ``choose_workers``.
    """
    count = choose_workers(workers, images.extractor, tasks)
    if count == 1:
        yield from images.run(lambda wait: tasks.popleft() if tasks else None)
        return
    options = worker_options(images.extractor, count)
    large = _remove_large(tasks, options)
    threads = max(1, min(torch.get_num_threads(), usable_cores() // count))
    with WorkerPool(count, _work, (options, images.masks, threads)) as pool:
        if workers is None:
            yield from _extract_first(tasks, images, pool)
        for task, outcome in pool.results(tasks):
            if isinstance(outcome, Ended):
                outcome = Outcome(
                    reason=f"the process that extracted it ended ({outcome.reason}), possibly for "
                    "lack of memory or in a damaged file"
                )
            yield task, outcome
    yield from images.run(lambda wait: large.popleft() if large else None)


def _remove_large(tasks: deque[Task], options: ExtractOptions) -> deque[Task]:
    """Remove and return the tasks that exceed the memory of a worker."""
    if options.memory is None:
        return deque()
    limit = image_pixels(options.memory)
    large = deque(task for task in tasks if count_pixels(task.source) > limit)
    names = {task.relative for task in large}
    kept = [task for task in tasks if task.relative not in names]
    tasks.clear()
    tasks.extend(kept)
    return large


def _extract_first(
    tasks: deque[Task], images: ImageExtractor, pool: WorkerPool
) -> Generator[tuple[Task, Outcome], None, None]:
    """Extract tasks in this process until the others would take long; they are left."""
    started, done = time.monotonic(), 0
    options = images.extractor.options

    def next_task(wait: bool) -> Task | None:
        if done and tasks:
            seconds = time.monotonic() - started - WARM_UP
            if seconds / done * len(tasks) > WORTH_SECONDS:
                if options is None or options.memory is None:
                    pool.start()  # while this process extracts the images that it has read
                return None
        return tasks.popleft() if tasks else None

    for task, outcome in images.run(next_task):
        done += 1
        yield task, outcome
    release_freed()


def _work(inbox: Inbox, options: ExtractOptions, masks: Path | None, threads: int) -> None:
    """Extract the tasks of an inbox (``processes.WorkerPool``)."""
    torch.set_num_threads(threads)
    images = ImageExtractor(options.build(), masks)
    inbox.send(None)
    for _, outcome in images.run(lambda wait: inbox.next(wait=wait), readers=1):
        inbox.send(outcome)
