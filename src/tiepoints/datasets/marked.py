"""Pairs with manually marked correspondences: WxBS."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from .ground_truth import Dataset, MarkedPair
from .homography import image_size_of, numbered_images, read_numbers, with_subfolders

WXBS_FILE = "corrs.txt"


def wxbs(root: str | Path) -> Dataset:
    """Read WxBS: ``GROUP/PAIR/01.*``, ``02.*`` and ``corrs.txt`` with x1 y1 x2 y2 per line.

    Args:
        root: the folder of groups, a group, or a pair. Each group is a sequence.

    Raises:
        DataError: no usable pair. Damaged pairs are reported in ``problems``.
    """
    root = Path(root)
    pairs: list[MarkedPair] = []
    problems = []
    for folder in wxbs_folders(root):
        try:
            pairs.append(_marked_pair(folder))
        except DataError as error:
            problems.append(str(error))
    if not pairs:
        raise DataError(
            f"no usable pair with marked correspondences in {root}: {'; '.join(problems[:3])}"
        )
    return Dataset(root.resolve().name, "wxbs", root, pairs, problems)


def wxbs_folders(root: Path) -> list[Path]:
    """Folders of pairs at most two levels below ``root``: those with a list of correspondences, and
    folders next to them with images 1 and 2.
    """
    marked = sorted(
        {file.parent for pattern in ("", "*/", "*/*/") for file in root.glob(pattern + WXBS_FILE)}
    )
    if not marked or root in marked:
        return marked
    siblings = {
        folder
        for group in {path.parent for path in marked}
        for folder in with_subfolders(group)[1:]
    }
    return sorted(
        {*marked, *(folder for folder in siblings if {1, 2} <= set(numbered_images(folder)))}
    )


def _marked_pair(folder: Path) -> MarkedPair:
    images, file = numbered_images(folder), folder / WXBS_FILE
    for k in (1, 2):
        if k not in images:
            raise DataError(
                f"{folder}: no image {k} (0{k}.jpg, {k}.png, ...); add it or remove the folder"
            )
        image_size_of(images[k])
    if not file.is_file():
        raise DataError(
            f"{folder}: no {WXBS_FILE} with x1 y1 x2 y2 per line; add it or remove the folder"
        )
    values = read_numbers(file)
    if not len(values) or len(values) % 4:
        raise DataError(
            f"{file}: {len(values)} numbers, expected lines of four (x1 y1 x2 y2); replace or "
            "remove it"
        )
    xy_a, xy_b = values.reshape(-1, 4).split(2, dim=1)
    folder = folder.resolve()
    return MarkedPair(folder.parent.name, folder.name, "marked", images[1], images[2], xy_a, xy_b)
