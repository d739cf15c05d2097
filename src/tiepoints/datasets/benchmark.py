"""Opening a dataset of any supported kind, recognized by its content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .ground_truth import Dataset
from .homography import EVD_FOLDERS, evd, homography_sequences, webcam_scenes, webcams
from .marked import wxbs, wxbs_folders
from .posed import posed_pairs, strecha, strecha_scenes


def open_dataset(path: str | Path, split: str | Path = "full") -> Dataset:
    """Open the dataset at ``path``; its kind is recognized by its content.

    Args:
        path: a list of posed pairs, or a folder of any kind.
        split: of homography sequences only; see ``homography_sequences``.

    Raises:
        FileNotFoundError: no such file or folder.
        DataError: it contains nothing usable.
        ValueError: unknown split, or a split of a dataset that has no splits.
    """
    path = Path(path)
    readers: list[tuple[bool, Callable[[Path], Dataset]]] = [
        (path.is_file() or (path / "pairs_with_gt.txt").is_file(), posed_pairs),
        (bool(strecha_scenes(path)), strecha),
        (bool(wxbs_folders(path)), wxbs),
        (all((path / name).is_dir() for name in EVD_FOLDERS), evd),
        (bool(webcam_scenes(path)), webcams),
    ]
    for matches, read in readers:
        if matches:
            if str(split) != "full":
                raise ValueError(
                    f"a split is for homography sequences only; {path} has no splits, got split "
                    f"{str(split)!r}"
                )
            return read(path)
    return homography_sequences(path, split)
