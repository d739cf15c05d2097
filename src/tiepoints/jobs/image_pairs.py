"""Which pairs of images to match: all, neighbors in time or by GPS, or images that look alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..exif import Position, local_meters, read_position
from ..files import natural
from ..formats.store import FeatureStore
from ..names import PAIR_METHODS
from ..progress import track
from ..retrieval import (
    CANDIDATES,
    TRAINING_DESCRIPTORS,
    Vocabulary,
    center,
    load_vocabulary,
    most_similar,
    order_by_matches,
    similar_images,
    strongest,
    train_vocabulary,
)

logger = logging.getLogger(__name__)
Pair = tuple[str, str]
#: Largest number of images of which ``auto`` takes all pairs.
EXHAUSTIVE_LIMIT = 60
#: Default number of neighbors per image: next ones of a sequence, most similar ones, nearest ones.
NEIGHBORS = {"sequential": 10, "retrieval": 20, "gps": 20}
#: Similar images outside the neighborhood in time that close the loops of a sequence, per image.
LOOP_NEIGHBORS = 5
#: Share of images with a GPS position, and extent in meters, from which ``auto`` relies on GPS.
GPS_SHARE, GPS_EXTENT = 0.8, 30.0
#: Images from which a vocabulary is trained if the package has none.
TRAINING_IMAGES = 500


@dataclass(frozen=True)
class PairChoice:
    """Pairs of images to match.

    Attributes:
        pairs: names of the images.
        method: one of ``names.PAIR_METHODS``, or ``list``.
        reason: what was chosen, and why.
    """

    pairs: list[Pair]
    method: str
    reason: str


@dataclass(frozen=True)
class Candidates:
    """Images to choose pairs of.

    Attributes:
        names: of the images.
        store: their features, with descriptors.
        weights: SHA-256 of the weights of the descriptor; None if it has none.
        files: name -> file, to read GPS positions.
    """

    names: Sequence[str]
    store: FeatureStore
    weights: str | None
    files: dict[str, Path]


def choose_image_pairs(
    images: Candidates,
    method: str = "auto",
    neighbors: int | None = None,
    *,
    default_neighbors: int | None = None,
    progress: bool = False,
) -> PairChoice:
    """Choose pairs by a method of ``names.PAIR_METHODS``.

    ``auto``: all pairs up to ``EXHAUSTIVE_LIMIT`` images; beyond that the nearest ones by GPS if
    most photographs have a position, else the most similar ones.

    Args:
        neighbors: number of neighbors per image; if it is given, ``auto`` never chooses all pairs.
        default_neighbors: without it, the number for ``retrieval`` and ``gps``, instead of
            ``NEIGHBORS``.

    Raises:
        ValueError: an unknown method, or ``neighbors`` of a method without.
        DataError: ``gps`` without positions.
    """
    if method not in PAIR_METHODS:
        raise ValueError(f"pairs must be one of {', '.join(PAIR_METHODS)}; got {method!r}")
    if method == "exhaustive" and neighbors is not None:
        raise ValueError("all pairs have no number of neighbors; use another method of pairs")
    names = sorted(images.names, key=natural)
    because = ""
    positions: dict[str, Position] = {}
    if method == "gps" or (method == "auto" and len(names) > EXHAUSTIVE_LIMIT):
        positions = read_positions(images.files, names, progress=progress)
    if method == "auto":
        method, because = _automatic(len(names), neighbors, list(positions.values()))
    if method == "exhaustive":
        return PairChoice(all_pairs(names), method, f"all pairs{because}")
    if neighbors is None and method != "sequential":
        neighbors = default_neighbors
    count = neighbors or NEIGHBORS[method]
    search = _Search(images, names, progress)
    if method == "sequential":
        pairs = search.following(count) | search.similar(LOOP_NEIGHBORS, window=count)
        what = (
            f"each image with the next {count} by name, and with the {LOOP_NEIGHBORS} most similar "
            "others"
        )
    elif method == "retrieval":
        pairs, what = search.similar(count), f"each image with the {count} most similar ones"
    else:
        pairs, what = _by_position(search, positions, count)
    ordered = sorted(pairs, key=lambda pair: (natural(pair[0]), natural(pair[1])))
    return PairChoice(ordered, method, what + because)


def all_pairs(names: Iterable[str]) -> list[Pair]:
    """All pairs of names in natural order."""
    return list(combinations(sorted(names, key=natural), 2))


def _automatic(count: int, neighbors: int | None, positions: list[Position]) -> tuple[str, str]:
    """The method that ``auto`` chooses, and why."""
    if count <= EXHAUSTIVE_LIMIT and neighbors is None:
        return "exhaustive", f", as there are at most {EXHAUSTIVE_LIMIT} images"
    many = f", as there are {count} images"
    if len(positions) >= GPS_SHARE * count:
        extent = float(np.ptp(local_meters(positions), axis=0).max()) if positions else 0.0
        if extent >= GPS_EXTENT:
            return "gps", f"{many}, {len(positions)} of them with a GPS position"
        return "retrieval", f"{many} within {extent:.0f} m by GPS"
    return "retrieval", f"{many}, {len(positions)} of them with a GPS position"


def read_positions(
    files: dict[str, Path], names: Iterable[str], *, progress: bool = False
) -> dict[str, Position]:
    """Name -> GPS position, of the images that have one."""
    named = [name for name in names if name in files]
    read = (
        (name, read_position(files[name]))
        for name in track(named, unit="image", label="GPS", enabled=progress)
    )
    return {name: position for name, position in read if position is not None}


def _by_position(
    search: _Search, positions: dict[str, Position], count: int
) -> tuple[set[Pair], str]:
    """Pairs of images near each other; images without a position are paired by similarity."""
    located = [name for name in search.names if name in positions]
    if len(located) < 2:
        raise DataError(
            f"{len(located)} of {len(search.names)} photographs have a GPS position in their EXIF; "
            "use --pairs retrieval"
        )
    meters = torch.from_numpy(local_meters([positions[name] for name in located]))
    # the nearest neighbor maximizes x.y - |y|^2 / 2
    table = torch.cat([meters, -0.5 * meters.square().sum(dim=1, keepdim=True)], dim=1)
    queries = torch.cat([meters, torch.ones(len(meters), 1)], dim=1)
    own = torch.arange(len(located))
    found = most_similar(queries, table, count, torch.stack([own, own + 1], dim=1))
    pairs = {
        _ordered(located[i], located[j])
        for i, row in enumerate(found.tolist())
        for j in row
        if j >= 0
    }
    what = f"each image with the {count} nearest ones by GPS"
    if missing := [name for name in search.names if name not in positions]:
        pairs |= search.similar(count, queries=missing)
        what += f"; the {len(missing)} without a position with the most similar ones"
    return pairs, what


def _ordered(a: str, b: str) -> Pair:
    return (a, b) if natural(a) <= natural(b) else (b, a)


class _Search:
    """Neighbors of images, sorted by name."""

    def __init__(self, images: Candidates, names: list[str], progress: bool):
        self.images, self.names, self.progress = images, names, progress
        self._tables: tuple[Tensor, Tensor] | None = None

    def following(self, count: int) -> set[Pair]:
        """Each image with the next ``count``."""
        names = self.names
        return {(a, b) for i, a in enumerate(names) for b in names[i + 1 : i + 1 + count]}

    def similar(
        self, count: int, *, window: int = 0, queries: list[str] | None = None
    ) -> set[Pair]:
        """Each image, or each of ``queries``, with the ``count`` most similar ones that are more
        than ``window`` places away in the order of the names.
        """
        if len(self.names) <= window + 1:
            return set()
        table, local = self.tables()
        index = {name: i for i, name in enumerate(self.names)}
        rows = torch.tensor([index[name] for name in queries or self.names])
        excluded = torch.stack([rows - window, rows + window + 1], dim=1)
        given = table if queries is None else table[rows]
        found = similar_images(given, table, max(count, CANDIDATES), excluded)
        found = order_by_matches(found, rows, local)[:, :count]
        return {
            _ordered(self.names[row], self.names[j])
            for row, others in zip(rows.tolist(), found.tolist(), strict=True)
            for j in others
            if j >= 0
        }

    def tables(self) -> tuple[Tensor, Tensor]:
        """Global descriptors (N,G) float16 of all images, zeros for those without features; and
        the local ones of their strongest keypoints (``retrieval.strongest``).
        """
        if self._tables is None:
            read = _reader(self.images.store)
            vocabulary = load_vocabulary(self.images.weights) or _own_vocabulary(self.names, read)
            names = track(self.names, unit="image", label="similarity", enabled=self.progress)
            table = torch.empty(len(self.names), vocabulary.words.numel(), dtype=torch.float16)
            local: Tensor | None = None
            for i, name in enumerate(names):
                descriptors = read(name)
                table[i] = vocabulary.describe(descriptors)
                best = strongest(descriptors)
                if local is None:
                    local = best.new_empty(len(self.names), *best.shape)
                local[i] = best
            assert local is not None
            self._tables = center(table), local
        return self._tables


def _reader(store: FeatureStore) -> Callable[[str], Tensor]:
    """Name -> local descriptors (N,D)."""

    def read(name: str) -> Tensor:
        descriptors = store.read(name).descriptors
        if descriptors is None:
            raise DataError(
                f"{store.path} has no descriptors of {name}; extract with a descriptor, or choose "
                "other pairs"
            )
        return descriptors

    return read


def _own_vocabulary(names: list[str], read: Callable[[str], Tensor]) -> Vocabulary:
    """A vocabulary trained on the images themselves."""
    chosen = names[:: max(1, len(names) // TRAINING_IMAGES)]
    logger.info("training a vocabulary on %d images: there is none of this descriptor", len(chosen))
    limit = max(1, TRAINING_DESCRIPTORS // len(chosen))
    try:
        return train_vocabulary(read(name)[:limit] for name in chosen)
    except ValueError as error:
        raise DataError(f"no keypoints in any of {len(chosen)} images to compare") from error
