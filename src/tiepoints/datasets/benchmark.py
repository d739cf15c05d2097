"""``open_dataset`` opens any supported data set and recognises its kind by its content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .ground_truth import Dataset
from .homography import EVD_FOLDERS, evd, homography_sequences, webcam_scenes, webcams
from .marked import wxbs, wxbs_folders
from .posed import posed_pairs, strecha, strecha_scenes


def open_dataset(path: str | Path, split: str | Path = "full") -> Dataset:
    """The dataset at ``path``, its kind recognised by its content: see the function of each kind.

    Args:
        path: a list of posed pairs, or a folder of any kind.
        split: of homography sequences only.

    Raises:
        FileNotFoundError: no such file or folder.
        DataError: nothing usable in it.
        ValueError: unknown split, or a split of a dataset that has none.
    """
    path = Path(path)
    readers: list[tuple[bool, Callable[[Path], Dataset]]] = [
        (path.is_file() or (path / "pairs_with_gt.txt").is_file(), posed_pairs),
        (bool(strecha_scenes(path)), strecha),
        (bool(wxbs_folders(path)), wxbs),
        (all((path / name).is_dir() for name in EVD_FOLDERS), evd),
        (bool(webcam_scenes(path)), webcams),
    ]
    for fits, read in readers:
        if fits:
            if str(split) != "full":
                raise ValueError(
                    f"a split is for homography sequences; {path} is read whole, got split "
                    f"{str(split)!r}"
                )
            return read(path)
    return homography_sequences(path, split)
