"""Image pairs with known homography: sequences (HPatches, Oxford), EVD and fixed cameras (TILDE's
webcams).
"""

from __future__ import annotations

import json
import logging
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..decode import image_size
from ..errors import DataError, first_line
from ..files import printable
from .ground_truth import Dataset, HomographyPair

logger = logging.getLogger(__name__)
HPATCHES_FOLDER = "hpatches-sequences-release"

IMAGE_SUFFIXES = (".ppm", ".pgm", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
#: What changes in the sequences of the Oxford dataset (Mikolajczyk et al. 2005).
OXFORD_KINDS = {"graf": "view", "wall": "view", "boat": "view", "bark": "view", "leuven": "illum"}
#: Sequences of HPatches that a split excludes. D2-Net and most later papers exclude eight very
#: large sequences; Key.Net's split file excludes some from its test lists.
_LARGE = (
    "i_contruction",
    "i_crownnight",
    "i_dc",
    "i_pencils",
    "i_whitebuilding",
    "v_artisans",
    "v_astronautis",
    "v_talent",
)
_VIEW_TEST = ("v_artisans", "v_birdwoman", "v_eastsouth")
_ILLUM_TEST = ("i_crownday", "i_village", "i_yellowtent")
SPLITS = ("full", "view", "illum", "d2net", "view_test", "illum_test")

EVD_FOLDERS = ("1", "2", "h")

#: TILDE's frames (Verdie et al., CVPR 2015) are named by the time of the exposure.
WEBCAM_NAME = re.compile(r"\d{8}_\d{6}")


def read_homography(path: Path) -> Tensor:
    """Read a homography (3,3) float64 from a text file of nine numbers.

    Raises:
        DataError: no such file, not nine finite numbers, or a singular matrix.
    """
    try:
        values = np.loadtxt(path, dtype=np.float64)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as a homography ({first_line(error)}); it needs nine numbers "
            "separated by white space"
        ) from error
    if values.size != 9 or not np.isfinite(values).all():
        finite = int(np.isfinite(values).sum())
        raise DataError(
            f"{path}: expected nine finite numbers, got {values.size}"
            + (f", {finite} of them finite" if finite < values.size else "")
        )
    H = torch.from_numpy(values.reshape(3, 3))
    if abs(float(torch.linalg.det(H))) < 1e-12:
        raise DataError(f"{path}: the homography is singular")
    return H


def numbered_images(folder: Path) -> dict[int, Path]:
    """Images named 1.*, 2.*, ... or img1.*, img2.*, ... by number."""
    images: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        name = re.fullmatch(r"(?:img|image)?0*(\d+)", path.stem, re.IGNORECASE)
        if name and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            images.setdefault(int(name[1]), path)
    return images


def _homography_files(folder: Path) -> dict[int, Path]:
    """Files named H_1_k (HPatches) or H1tok, H1tokp (Oxford), with or without .txt, by k."""
    files: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        name = re.fullmatch(r"H_1_(\d+)|H1to(\d+)p?", path.name.removesuffix(".txt"))
        if name and path.is_file():
            files[int(name[1] or name[2])] = path
    return files


def _kind(sequence: str) -> str:
    if sequence.startswith("v_"):
        return "view"
    if sequence.startswith("i_"):
        return "illum"
    return OXFORD_KINDS.get(sequence, "other")


def read_sequence(folder: Path) -> list[HomographyPair]:
    """Read the pairs (1,k) of one sequence folder.

    Raises:
        DataError: an image or a homography is missing or damaged; the message names the file.
    """
    images, homographies = numbered_images(folder), _homography_files(folder)
    if 1 not in images:
        raise DataError(f"{folder}: no image 1 (1.ppm, img1.png, ...)")
    pairs = []
    for k in sorted((set(images) | set(homographies)) - {1}):
        if k not in homographies:
            raise DataError(f"{folder}: image {k} has no homography (H_1_{k} or H1to{k}p)")
        if k not in images:
            raise DataError(f"{folder}: {homographies[k].name} has no image {k}")
        for path in (images[1], images[k]):
            if path.stat().st_size == 0:
                raise DataError(f"{path}: empty file")
        pairs.append(
            HomographyPair(
                folder.name,
                f"1-{k}",
                _kind(folder.name),
                images[1],
                images[k],
                read_homography(homographies[k]),
            )
        )
    if not pairs:
        raise DataError(f"{folder}: only image 1, at least two images are needed")
    return pairs


def homography_sequences(root: str | Path, split: str | Path = "full") -> Dataset:
    """Find all sequences below ``root`` in HPatches or Oxford layout.

    Args:
        root: folder of sequence folders, or one sequence folder.
        split: ``full``; ``view``, ``illum`` (by what changes); ``d2net`` (without the eight very
            large sequences of HPatches, 52 + 56 remain); ``view_test``, ``illum_test`` (Key.Net's);
            or a JSON file: a list of names, or HPatches' own ``{split: {"test": [names]}}`` given
            as ``FILE:split``.

    Returns:
        the pairs; damaged sequences are skipped and reported in ``problems``.

    Raises:
        FileNotFoundError: no such folder.
        DataError: no usable sequence.
        ValueError: unknown split.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}; `tiepoints data hpatches --output DIR` downloads HPatches"
        )
    if (root / HPATCHES_FOLDER).is_dir():
        root = root / HPATCHES_FOLDER
    folders = [
        f
        for f in (root, *sorted(root.iterdir()))
        if f.is_dir() and (_homography_files(f) or _looks_like_sequence(f))
    ]
    others = [
        f.name
        for f in sorted(root.iterdir())
        if f.is_dir() and f not in folders and not f.name.startswith(".")
    ]
    if others and root not in folders:
        logger.warning(
            "skipped: %s: no images 1.*, 2.* with H_1_2, or img1.*, img2.* with H1to2p",
            ", ".join(map(printable, others)),
        )
    selected = _select_split([f.name for f in folders], split)
    pairs: list[HomographyPair] = []
    problems = [
        f"{name}: in the split, but not in {root}"
        for name in selected
        if name not in {f.name for f in folders}
    ]
    for folder in folders:
        if folder.name in selected:
            try:
                pairs.extend(read_sequence(folder))
            except DataError as error:
                problems.append(f"{folder.name} skipped: {error}")
    if not pairs:
        detail = (
            "; ".join(problems[:3])
            or "no folder contains images 1.*, 2.* with H_1_2 (HPatches) "
            "or img1.*, img2.* with H1to2p (Oxford)"
        )
        raise DataError(f"no usable homography sequence in {root}: {detail}")
    layout = "hpatches" if any(f.name.startswith(("v_", "i_")) for f in folders) else "oxford"
    return Dataset(root.name, layout, root, pairs, problems)


def _looks_like_sequence(folder: Path) -> bool:
    return bool(re.match(r"[vi]_", folder.name)) and bool(numbered_images(folder))


def _select_split(names: list[str], split: str | Path) -> list[str]:
    """Sequences of ``split``; see ``homography_sequences``."""
    text = str(split)
    if text == "full":
        return names
    if text in ("view", "illum"):
        return [n for n in names if _kind(n) == text]
    if text == "d2net":
        return [n for n in names if n not in _LARGE]
    if text == "view_test":
        return [n for n in names if _kind(n) == "view" and n not in _VIEW_TEST]
    if text == "illum_test":
        return [n for n in names if _kind(n) == "illum" and n not in _ILLUM_TEST]
    file, _, key = text.partition(":") if ".json:" in text else (text, "", "")
    if not file.endswith(".json"):
        raise ValueError(
            f"split must be {', '.join(SPLITS)}, or a JSON file of sequence names; got {text!r}"
        )
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no split file {path}")
    try:
        content = json.loads(path.read_text())
        listed = content if not key else content[key]
        listed = listed["test"] if isinstance(listed, dict) else listed
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected a list of names, or {{split: {{'test': [names]}}}} with FILE:split "
            f"({error!r})"
        ) from error
    if not isinstance(listed, list) or not all(isinstance(n, str) for n in listed):
        raise DataError(f"{path}: expected a list of sequence names")
    return listed


def with_subfolders(root: Path) -> list[Path]:
    """The folder and its subfolders, sorted; empty if the folder is missing."""
    return (
        [root, *sorted(folder for folder in root.iterdir() if folder.is_dir())]
        if root.is_dir()
        else []
    )


def image_size_of(path: Path) -> tuple[int, int]:
    """Size (width, height) of an image, from the header of the file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return image_size(path)
    except (OSError, DataError) as error:
        reason = error.__cause__ or error
        raise DataError(
            f"{path}: cannot be read as an image ({reason}); replace or remove it"
        ) from error


def read_numbers(path: Path) -> Tensor:
    """Read all numbers of a text file as one vector, float64.

    Raises:
        DataError: the file cannot be read, or contains something else.
    """
    try:
        values = torch.tensor(
            [float(token) for token in path.read_text().split()], dtype=torch.float64
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as numbers ({error}); replace or remove it"
        ) from error
    if not bool(torch.isfinite(values).all()):
        raise DataError(f"{path}: not all numbers are finite; replace or remove it")
    return values


# ---- other datasets


def evd(root: str | Path) -> Dataset:
    """Read the Extreme View Dataset (Mishkin et al., CVIU 2015).

    Images ``1/NAME.*`` and ``2/NAME.*``, and ``h/NAME.txt``, the homography from the first to the
    second.

    Raises:
        DataError: no usable pair. Pairs with a missing or damaged file are reported in
            ``problems``.
    """
    root = Path(root)
    folders = {side: root / side for side in EVD_FOLDERS}
    images = {
        side: {
            path.stem: path
            for path in sorted(folders[side].iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES
        }
        for side in "12"
    }
    files = {path.stem: path for path in sorted(folders["h"].glob("*.txt"))}
    pairs: list[HomographyPair] = []
    problems = []
    for name in sorted({*files, *images["1"], *images["2"]}):
        try:
            for available, missing in (
                (images["1"], f"1/{name}.*"),
                (images["2"], f"2/{name}.*"),
                (files, f"h/{name}.txt"),
            ):
                if name not in available:
                    raise DataError(
                        f"{root}: {name} has no {missing}; add it or remove the other files of "
                        "that name"
                    )
            image_a, image_b = images["1"][name], images["2"][name]
            image_size_of(image_a)
            image_size_of(image_b)
            pairs.append(
                HomographyPair(
                    root.resolve().name,
                    name,
                    "view",
                    image_a,
                    image_b,
                    read_homography(files[name]),
                )
            )
        except DataError as error:
            problems.append(str(error))
    if not pairs:
        raise DataError(
            f"no usable pair in {root}: "
            f"{'; '.join(problems[:3]) or 'the folders 1, 2 and h are empty'}"
        )
    return Dataset(root.resolve().name, "evd", root, pairs, problems)


def webcams(root: str | Path) -> Dataset:
    """Read all pairs of frames of fixed cameras (TILDE, Verdie et al., CVPR 2015).

    The homography is the identity. A scene is a folder of images named YYYYMMDD_HHMMSS; the names
    distinguish frames of a fixed camera from other photographs.

    Args:
        root: a folder of scenes, or one scene.

    Raises:
        DataError: no usable pair. Frames that cannot be read, or whose size differs from most of
            their scene, are reported in ``problems``.
    """
    root = Path(root)
    pairs: list[HomographyPair] = []
    problems = []
    for scene in webcam_scenes(root):
        sizes: dict[Path, tuple[int, int]] = {}
        for frame in _frames(scene):
            try:
                sizes[frame] = image_size_of(frame)
            except DataError as error:
                problems.append(str(error))
        common = max(sizes.values(), key=list(sizes.values()).count, default=(0, 0))
        for frame, size in sizes.items():
            if size != common:
                problems.append(
                    f"{frame}: {size[0]} x {size[1]}, most frames of the scene are {common[0]} x "
                    f"{common[1]}; replace or remove it"
                )
        frames = [frame for frame, size in sizes.items() if size == common]
        identity = torch.eye(3, dtype=torch.float64)
        pairs += [
            HomographyPair(scene.resolve().name, f"{a.stem}-{b.stem}", "illum", a, b, identity)
            for a, b in combinations(frames, 2)
        ]
    if not pairs:
        raise DataError(
            f"no usable pair of frames in {root}: "
            f"{'; '.join(problems[:3]) or 'no scene has two frames'}"
        )
    return Dataset(root.resolve().name, "webcams", root, pairs, problems)


def _frames(scene: Path) -> list[Path]:
    return [
        p
        for p in sorted(scene.iterdir())
        if p.suffix.lower() in IMAGE_SUFFIXES and WEBCAM_NAME.fullmatch(p.stem)
    ]


def webcam_scenes(root: Path) -> list[Path]:
    """Folders at most one level below ``root`` that contain webcam frames."""
    return [folder for folder in with_subfolders(root) if _frames(folder)]
