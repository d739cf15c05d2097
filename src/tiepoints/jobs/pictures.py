"""Draw the best pairs of a file of matches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import collect, natural, printable
from ..formats.colmap import ColmapDatabase
from ..formats.hdf5 import MatchFile, pair_name
from ..formats.store import open_features, own_settings
from ..image import ReadOptions, to_rgb
from ..plot import draw_matches
from .extract import counted_pages

logger = logging.getLogger(__name__)
#: Default number of pairs.
BEST_PAIRS = 10


def draw_best_pairs(
    matches: Path,
    images: list[str],
    output: Path,
    *,
    features: Path | None = None,
    root: Path | None = None,
    count: int = BEST_PAIRS,
    pages: str = "first",
) -> list[Path]:
    """Draw the pairs with the most matches of a file that ``match_images`` wrote, with images read
    as for their features.

    Args:
        matches: ``.h5`` or ``.db``.
        images, root, pages: arguments of ``match_images``.
        output: folder of the image files.
        features: path of the features; by default that of ``match_images``.

    Returns:
        the image files, the pair with the most matches first.

    Raises:
        DataError: the matches or features cannot be read.
    """
    found = collect(images, root=root, inside=True, pages=counted_pages(pages))
    files = {str(task.relative): task.source for task in found.tasks}
    store: Any
    database = matches.suffix == ".db"
    source = features or (matches if database else matches.with_name(f"{matches.stem}.features.h5"))
    written = []
    with (
        ColmapDatabase(matches) if database else MatchFile(matches) as store,
        store if database else open_features(source) as stored,
    ):
        reading = ReadOptions.of_record(own_settings(stored) or {})
        if not files:
            raise DataError(
                f"pictures need the photographs of {matches}; name them, or their folder"
            )
        names = sorted((name for name in stored.names() if name in files), key=natural)
        if not database:
            names = _distinct(names)
        matched = [
            (len(store.read_matches(a, b)), a, b)
            for a, b in combinations(names, 2)
            if store.has_matches(a, b)
        ]
        if not matched:
            raise DataError(f"{matches} has no matches of these images to draw")
        best = sorted(matched, key=lambda item: -item[0])[:count]
        stems = _stems(pair_name(a, b) for _, a, b in best)
        for (_, a, b), stem in zip(best, stems, strict=True):
            pair_matches = store.read_matches(a, b)
            xy_a, xy_b = pair_matches.positions(stored.read(a), stored.read(b))
            path = output / f"{stem}.jpg"
            caption = f"{a} - {b}: {len(pair_matches)} matches"
            shown = to_rgb(files[a], reading), to_rgb(files[b], reading)
            draw_matches(*shown, xy_a, xy_b, caption=caption, path=path)
            written.append(path)
    return written


def _distinct(names: list[str]) -> list[str]:
    """The names that hloc's file of matches distinguishes; others are logged."""
    counts = Counter(name.replace("/", "-") for name in names)
    shared = [name for name in names if counts[name.replace("/", "-")] > 1]
    if shared:
        logger.warning(
            "not drawn: pairs of %s, whose names differ only in / and -; rename the images",
            ", ".join(map(printable, shared)),
        )
    return [name for name in names if name not in shared]


def _stems(pairs: Iterable[str]) -> Iterator[str]:
    """Distinct file names for pairs A/B, in order: A-B, or A-B-2 and so on if that is taken."""
    taken: set[str] = set()
    for pair in pairs:
        first = stem = pair.replace("/", "-")
        number = 1
        while stem in taken:
            number += 1
            stem = f"{first}-{number}"
        taken.add(stem)
        yield stem
