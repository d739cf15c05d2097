"""Draw the best pairs of a file of matches."""

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
) -> list[Path]:
    """Draw the pairs with the most matches of a file that ``match_images`` wrote.

    Args:
        matches: ``.h5`` or ``.db``.
        images, root: arguments of ``match_images``.
        output: folder of the image files.
        features: path of the features; by default that of ``match_images``.

    Returns:
        the image files, the pair with the most matches first.

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
            pair_matches = store.read_matches(a, b)
            xy_a, xy_b = pair_matches.positions(stored.read(a), stored.read(b))
            path = output / f"{Path(a).stem}-{Path(b).stem}.jpg"
            caption = f"{a} - {b}: {len(pair_matches)} matches"
            draw_matches(files[a], files[b], xy_a, xy_b, caption=caption, path=path)
            written.append(path)
    return written
