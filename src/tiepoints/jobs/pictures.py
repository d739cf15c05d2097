"""Pictures of the best pairs of a file of matches."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import collect, natural
from ..formats.colmap import ColmapDatabase
from ..formats.hdf5 import MatchFile
from ..formats.store import open_features
from ..plot import draw_matches

#: Pairs that are drawn.
BEST_PAIRS = 10


def draw_best_pairs(
    matches: Path,
    images: list[str],
    output: Path,
    *,
    features: Path | None = None,
    root: Path | None = None,
    count: int = BEST_PAIRS,
) -> list[Path]:
    """Draw the pairs with the most matches of a file that ``match_images`` wrote.

    Args:
        matches: ``.h5`` or ``.db``.
        images, root: as given to ``match_images``.
        output: folder of the pictures.
        features: where the features are; default as ``match_images`` stores them.

    Returns:
        the pictures, best pair first.

    Raises:
        DataError: the matches or features cannot be read.
    """
    files = {
        str(task.relative): task.path for task in collect(images, root=root, inside=True).tasks
    }
    store: Any
    database = matches.suffix == ".db"
    source = features or (matches if database else matches.with_name(f"{matches.stem}.features.h5"))
    written = []
    with (
        ColmapDatabase(matches) if database else MatchFile(matches) as store,
        store if database else open_features(source) as stored,
    ):
        names = sorted((name for name in stored.names() if name in files), key=natural)
        found = [
            (len(store.read_matches(a, b)), a, b)
            for a, b in combinations(names, 2)
            if store.has_matches(a, b)
        ]
        if not found:
            raise DataError(f"{matches} has no matches of these images to draw")
        for _, a, b in sorted(found, key=lambda item: -item[0])[:count]:
            kept = store.read_matches(a, b)
            one, two = stored.read(a), stored.read(b)
            xy_a, xy_b = kept.positions(one, two)
            path = output / f"{Path(a).stem}-{Path(b).stem}.jpg"
            caption = f"{a} - {b}: {len(kept)} matches"
            draw_matches(files[a], files[b], xy_a, xy_b, caption=caption, path=path)
            written.append(path)
    return written
