"""Matching of many pairs, in this process or by several, each with its share of the cores."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..auto_orientation import (
    KnownRotations,
    Oriented,
    PairMatcher,
    can_reorient,
    has_angles,
    is_upright,
    match_verified,
)
from ..errors import DataError
from ..estimation import estimate
from ..extract import ExtractOptions, Extractor
from ..memory import keep_freed
from ..processes import Ended, Inbox, WorkerPool, usable_cores
from ..structs import Features, Matches
from .workers import fitting_workers, worker_options

if TYPE_CHECKING:
    from .match import MatchOptions

Pair = tuple[str, str]
#: Function that returns the features of an image, None if it has none.
FeatureReader = Callable[[str], Features | None]
#: Largest number of pairs of one second image that a worker gets at a time: it caches what is
#: computed of that image. Blocks with fewer are joined up to a smaller number.
BLOCK, SMALL_BLOCK = 16, 8
#: Number of pairs after which those that need a search for their rotation are searched.
BATCH = 1024
#: Without a given number, workers are used if the pairs would otherwise take at least this many
#: seconds, estimated after this many pairs: starting workers takes a few.
WORTH_SECONDS, FIRST_PAIRS = 10.0, 4


@dataclass(frozen=True)
class PairOutcome:
    """What the matching of a pair gave.

    Attributes:
        matches: None if it failed.
        count: number of keypoints of the first image.
        verified: whether a requested geometry was found.
        support: see ``Oriented``; 0 if not sure.
        rotation: from the first image to the second in radians, as measured.
        weak: whether a search may find another rotation with more matches.
        reason: why it failed.
    """

    matches: Matches | None = None
    count: int = 0
    verified: bool = False
    support: int = 0
    rotation: float = 0.0
    weak: bool = False
    reason: str = ""


@dataclass
class _Block:
    """Pairs of images for a worker, with the features of these images.

    Attributes:
        search: pair -> its predicted rotation, None if unknown, to search for the rotations of the
            pairs; empty without a search.
    """

    pairs: list[Pair]
    search: dict[Pair, float | None]
    features: dict[str, Features] = field(default_factory=dict)


class PairWork:
    """Matches the pairs of named images.

    Args:
        options: see ``MatchOptions``.
        extractor: extractor of the features, to estimate the relative rotation of each pair; None
            or one for which that is not possible matches them as they are.
        images: name -> file; pairs with other images are matched without rotation.
    """

    def __init__(
        self,
        options: MatchOptions,
        extractor: Extractor | None = None,
        images: dict[str, Path] | None = None,
    ):
        self.options, self.images = options, images or {}
        self.matcher = options.matcher()
        self.extractor: Extractor | None = None
        self.oriented: PairMatcher | None = None
        if extractor is not None and options.auto_orientation and can_reorient(extractor):
            self.extractor = extractor
            self.oriented = PairMatcher(extractor, self.matcher, options.min_neighbors)

    def match(self, pair: Pair, block: _Block) -> PairOutcome:
        """Match a pair of a block."""
        a, b = (block.features[name] for name in pair)
        try:
            _check_dimensions(a, b)
            found, weak = self._oriented(pair, a, b, block)
            matches, verified = found.matches, False
            if self.options.min_neighbors and not found.support:
                # incorrect matches may agree with their neighbors, and then with a geometry
                matches = matches[matches.index[:0, 0]]
            if self.options.geometry is not None:
                xy_a, xy_b = a.xy[matches.index[:, 0]], b.xy[matches.index[:, 1]]
                result = estimate(
                    xy_a, xy_b, self.options.geometry, threshold=self.options.threshold
                )
                matches, verified = matches[result.inliers], result.ok
        except (ValueError, DataError, OSError) as error:
            return PairOutcome(reason=str(error))
        rotation = found.measured.rotation
        support = found.support if found.sure else 0
        return PairOutcome(matches, len(a), verified, support, rotation, weak)

    def _oriented(
        self, pair: Pair, a: Features, b: Features, block: _Block
    ) -> tuple[Oriented, bool]:
        """Matches of a pair, and whether a search may find more."""
        name = pair[1]
        if self.oriented is None or name not in self.images:
            return match_verified(a, b, self.matcher, self.options.min_neighbors), False
        if pair in block.search:
            return self.oriented(a, b, self.images[name], name, block.search[pair]), False
        found = self.oriented.match_near(a, b, self.images[name], name)
        return found, not found.sure and not has_angles(a, b)


def _check_dimensions(a: Features, b: Features) -> None:
    assert a.descriptors is not None
    assert b.descriptors is not None
    dims = a.descriptors.shape[1], b.descriptors.shape[1]
    if dims[0] != dims[1]:
        raise DataError(
            f"descriptor dimensions differ, {dims[0]} and {dims[1]}; extract both images with one "
            "descriptor"
        )


class PairRunner:
    """Matches pairs in this process or by workers; a context manager.

    Neither the results nor their order depend on the number of workers.

    Args:
        work: what is done with each pair.
        read: the features of an image; called in this process, which may be writing their file.
        workers: number of processes; None = as many as there are cores and memory for, once the
            pairs would otherwise take long.

    Raises:
        ValueError: several workers are given and not possible.
    """

    def __init__(self, work: PairWork, read: FeatureReader, workers: int | None = 1):
        self.work, self.read = work, read
        self.count = fitting_workers(workers, work.extractor, list(work.images.values()))
        self.at_once = workers is not None and self.count > 1
        self._stack = ExitStack()
        self._pool: WorkerPool | None = None

    def __enter__(self) -> PairRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, pairs: Iterable[Pair]) -> Iterator[tuple[Pair, PairOutcome]]:
        """Match pairs, except those of images without features.

        Of ``BATCH`` pairs, those with too few matches are the last, and their rotations are
        searched unless the others show that both images are upright (``KnownRotations``).
        """
        pairs, known = iter(pairs), KnownRotations()
        while batch := list(islice(pairs, BATCH)):
            weak: dict[Pair, PairOutcome] = {}
            for pair, outcome in self._results(batch, {}):
                if outcome.weak:
                    weak[pair] = outcome
                    continue
                known.add(*pair, outcome.rotation, outcome.support)
                yield pair, outcome
            predicted = {pair: known.predict(*pair) for pair in weak}
            searched = {pair: angle for pair, angle in predicted.items() if not is_upright(angle)}
            yield from ((pair, weak[pair]) for pair in weak if pair not in searched)
            for pair, outcome in self._results(list(searched), searched):
                known.add(*pair, outcome.rotation, outcome.support)
                yield pair, outcome

    def _results(
        self, pairs: list[Pair], search: dict[Pair, float | None]
    ) -> Iterator[tuple[Pair, PairOutcome]]:
        blocks = _blocks(pairs, search)
        if self._pool is None and not self.at_once:
            yield from self._in_process(blocks)
        if blocks:
            yield from self._by_workers(blocks)

    def _in_process(self, blocks: deque[_Block]) -> Iterator[tuple[Pair, PairOutcome]]:
        """Match blocks, which are removed, until workers are worth their start."""
        started, done = time.monotonic(), 0
        left = sum(len(block.pairs) for block in blocks)
        while blocks:
            block = self._load(blocks.popleft())
            left -= len(block.pairs)
            while block.pairs:
                pair = block.pairs.pop(0)
                yield pair, self.work.match(pair, block)
                done += 1
                if done == 1:  # takes longer than the others
                    started = time.monotonic()
                seconds = (time.monotonic() - started) / max(1, done - 1)
                if (
                    self.count > 1
                    and done > FIRST_PAIRS
                    and seconds * (left + len(block.pairs)) > WORTH_SECONDS
                ):
                    blocks.appendleft(block)
                    return

    def _by_workers(self, blocks: deque[_Block]) -> Iterator[tuple[Pair, PairOutcome]]:
        if self._pool is None:
            options = self.work.options
            count = min(self.count, len(blocks))
            extraction = None
            if self.work.extractor is not None:
                extraction = worker_options(self.work.extractor, count)
            threads = max(1, min(torch.get_num_threads(), usable_cores() // count))
            arguments = options, extraction, self.work.images, threads
            self._pool = self._stack.enter_context(WorkerPool(count, _work, arguments))
        lost: list[_Block] = []
        for block, outcomes in self._pool.results(_Loaded(blocks, self._load)):
            if isinstance(outcomes, Ended):
                lost += [_Block([pair], block.search) for pair in block.pairs]
            else:
                yield from zip(block.pairs, outcomes, strict=True)
        for block, outcomes in self._pool.results(_Loaded(lost, self._load)):
            if isinstance(outcomes, Ended):
                reason = f"the process that matched it ended ({outcomes.reason}), possibly for lack"
                outcomes = [PairOutcome(reason=f"{reason} of memory")] * len(block.pairs)
            yield from zip(block.pairs, outcomes, strict=True)

    def _load(self, block: _Block) -> _Block:
        """A block with features, without the pairs for which there are none."""
        loaded = _Block([], block.search)
        for a, b in block.pairs:
            features_a, features_b = self.read(a), self.read(b)
            if features_a is not None and features_b is not None:
                loaded.pairs.append((a, b))
                loaded.features |= {a: features_a, b: features_b}
        return loaded


class _Loaded(deque):
    """Blocks that are loaded when a worker gets them."""

    def __init__(self, blocks: Iterable[_Block], load: Callable[[_Block], _Block]):
        super().__init__(blocks)
        self.load = load

    def popleft(self) -> _Block:
        return self.load(super().popleft())


def _blocks(pairs: list[Pair], search: dict[Pair, float | None]) -> deque[_Block]:
    """Consecutive pairs in blocks; those of one second image together, if there are few."""
    blocks: deque[_Block] = deque()
    for _, group in groupby(pairs, key=itemgetter(1)):
        chosen = list(group)
        for start in range(0, len(chosen), BLOCK):
            part = chosen[start : start + BLOCK]
            if not blocks or len(blocks[-1].pairs) + len(part) > SMALL_BLOCK:
                blocks.append(_Block([], {}))
            blocks[-1].pairs += part
            blocks[-1].search |= {pair: search[pair] for pair in part if pair in search}
    return blocks


def _work(
    inbox: Inbox,
    options: MatchOptions,
    extraction: ExtractOptions | None,
    images: dict[str, Path],
    threads: int,
) -> None:
    """Match the blocks of an inbox (``processes.WorkerPool``)."""
    torch.set_num_threads(threads)
    keep_freed()
    work = PairWork(options, None if extraction is None else extraction.build(), images)
    inbox.send(None)
    while (block := inbox.next(wait=True)) is not None:
        inbox.send([work.match(pair, block) for pair in block.pairs])
