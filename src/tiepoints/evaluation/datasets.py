"""Image pairs whose geometry is known; ``open_dataset`` recognises the kind of a folder by its content.

Homographies: sequences (HPatches, Oxford), EVD, fixed cameras (TILDE's webcams). Poses: SuperGlue's lists, Strecha's surveyed
cameras. Correspondences marked by hand: WxBS.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError

KINDS = ("view", "illum", "other", "pose", "marked")
IMAGE_SUFFIXES = (".ppm", ".pgm", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
#: What changes in the sequences of the Oxford set (Mikolajczyk et al. 2005), which their names do not tell.
OXFORD_KINDS = {"graf": "view", "wall": "view", "boat": "view", "bark": "view", "leuven": "illum"}
#: Named parts of HPatches: what each leaves out. D2-Net and most later papers drop eight very large sequences; Key.Net's split
#: file drops some from its test lists.
_LARGE = ("i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding", "v_artisans", "v_astronautis", "v_talent")
_VIEW_TEST = ("v_artisans", "v_birdwoman", "v_eastsouth")
_ILLUM_TEST = ("i_crownday", "i_village", "i_yellowtent")
SPLITS = ("full", "view", "illum", "d2net", "view_test", "illum_test")

#: Folders of Strecha's sets (Strecha et al., CVPR 2008) and of EVD (Mishkin et al., CVIU 2015), file of WxBS (BMVC 2015).
STRECHA_CAMERAS = "gt_dense_cameras"
EVD_FOLDERS = ("1", "2", "h")
WXBS_FILE = "corrs.txt"
#: TILDE's frames (Verdie et al., CVPR 2015) are named by the time they were taken.
WEBCAM_NAME = re.compile(r"\d{8}_\d{6}")
#: Largest deviation of R R^T from the identity: camera files have six digits.
ROTATION_TOLERANCE = 1e-3

HPATCHES_FOLDER = "hpatches-sequences-release"
HPATCHES_SEQUENCES = 116
HPATCHES_MIRRORS = (
    "https://huggingface.co/datasets/vbalnt/hpatches/resolve/main/hpatches-sequences-release.zip",
    "https://cvg-data.inf.ethz.ch/hpatches/hpatches-sequences-release.tar.gz",
    "http://icvl.ee.ic.ac.uk/vbalnt/hpatches/hpatches-sequences-release.tar.gz",
)


@dataclass(frozen=True)
class HomographyPair:
    """Two images and the homography between them.

    Attributes:
        sequence, name: for example ``graf`` and ``1-4``.
        kind: ``view``, ``illum`` or ``other`` (what changes).
        image_a, image_b: paths.
        H_ab: (3,3) float64 from a to b in pixels.
    """

    sequence: str
    name: str
    kind: str
    image_a: Path
    image_b: Path
    H_ab: Tensor


@dataclass(frozen=True)
class PosePair:
    """Two images of calibrated cameras and the pose between them.

    Attributes:
        sequence, name, kind: as in ``HomographyPair``; kind is ``pose``.
        image_a, image_b: paths.
        K_a, K_b: (3,3) float64 intrinsics of the images as stored.
        T_ab: (4,4) float64, points of camera a into camera b.
        turns_a, turns_b: quarter turns counter-clockwise by which each image is turned before use (SuperGlue's lists).
    """

    sequence: str
    name: str
    kind: str
    image_a: Path
    image_b: Path
    K_a: Tensor
    K_b: Tensor
    T_ab: Tensor
    turns_a: int = 0
    turns_b: int = 0


@dataclass(frozen=True)
class MarkedPair:
    """Two images and correspondences between them that were marked by hand.

    Attributes:
        sequence, name, kind: as in ``HomographyPair``; kind is ``marked``.
        image_a, image_b: paths.
        xy_a, xy_b: (K,2) float64, the marked points in pixels.
    """

    sequence: str
    name: str
    kind: str
    image_a: Path
    image_b: Path
    xy_a: Tensor
    xy_b: Tensor


Pair: TypeAlias = HomographyPair | PosePair | MarkedPair


@dataclass(frozen=True)
class Dataset:
    """Pairs found at a place, and what was left out, in words."""

    name: str
    layout: str
    root: Path
    pairs: list[HomographyPair] | list[PosePair] | list[MarkedPair]
    problems: list[str] = field(default_factory=list)

    @property
    def sequences(self) -> list[str]:
        """Names in order, each once."""
        return list(dict.fromkeys(pair.sequence for pair in self.pairs))


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
        (bool(_strecha_scenes(path)), strecha),
        (bool(_wxbs_folders(path)), wxbs),
        (all((path / name).is_dir() for name in EVD_FOLDERS), evd),
        (bool(_webcam_scenes(path)), webcams),
    ]
    for fits, read in readers:
        if fits:
            if str(split) != "full":
                raise ValueError(f"a split is for homography sequences; {path} is read whole, got split {str(split)!r}")
            return read(path)
    return homography_sequences(path, split)


def read_homography(path: Path) -> Tensor:
    """(3,3) float64 of a text file of nine numbers.

    Raises:
        DataError: missing, not nine finite numbers, or singular.
    """
    try:
        values = np.loadtxt(path, dtype=np.float64)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a homography ({str(error).splitlines()[0]})") from error
    if values.size != 9 or not np.isfinite(values).all():
        raise DataError(f"{path}: a homography has nine finite numbers, this file {values.size}")
    H = torch.from_numpy(values.reshape(3, 3))
    if abs(float(torch.linalg.det(H))) < 1e-12:
        raise DataError(f"{path}: the homography is singular")
    return H


def _numbered_images(folder: Path) -> dict[int, Path]:
    """Images called 1.*, 2.*, ... or img1.*, img2.*, ... by number."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        name = re.fullmatch(r"(?:img|image)?0*(\d+)", path.stem, re.IGNORECASE)
        if name and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            found.setdefault(int(name[1]), path)
    return found


def _homography_files(folder: Path) -> dict[int, Path]:
    """Files H_1_k (HPatches) or H1tok, H1tokp (Oxford) by k; a name with an ending such as .txt counts too."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        name = re.fullmatch(r"H_1_(\d+)|H1to(\d+)p?", path.name.removesuffix(".txt"))
        if name and path.is_file():
            found[int(name[1] or name[2])] = path
    return found


def _kind(sequence: str) -> str:
    if sequence.startswith("v_"):
        return "view"
    if sequence.startswith("i_"):
        return "illum"
    return OXFORD_KINDS.get(sequence, "other")


def read_sequence(folder: Path) -> list[HomographyPair]:
    """Pairs (1,k) of one sequence folder.

    Raises:
        DataError: image 1, an image with a homography, or a homography is missing or broken; the file is named.
    """
    images, homographies = _numbered_images(folder), _homography_files(folder)
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
        pairs.append(HomographyPair(folder.name, f"1-{k}", _kind(folder.name), images[1], images[k], read_homography(homographies[k])))
    if not pairs:
        raise DataError(f"{folder}: only image 1, nothing to compare it with")
    return pairs


def homography_sequences(root: str | Path, split: str | Path = "full") -> Dataset:
    """All sequences below ``root`` in HPatches or Oxford layout, found by looking.

    Args:
        root: folder of sequence folders, or one sequence folder.
        split: ``full``; ``view``, ``illum`` (by what changes); ``d2net`` (without the eight very large sequences of HPatches,
            52 + 56 left); ``view_test``, ``illum_test`` (Key.Net's); or a JSON file: a list of names, or the original's
            ``{split: {"test": [names]}}`` given as ``FILE:split``.

    Returns:
        the pairs; sequences that are broken are left out and named in ``problems``.

    Raises:
        FileNotFoundError: no such folder.
        DataError: no usable sequence.
        ValueError: unknown split.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; `tiepoints data hpatches --to DIR` fetches HPatches")
    if (root / HPATCHES_FOLDER).is_dir():
        root = root / HPATCHES_FOLDER
    folders = [f for f in (root, *sorted(root.iterdir())) if f.is_dir() and (_homography_files(f) or _looks_like_sequence(f))]
    chosen = _choose([f.name for f in folders], split)
    pairs: list[HomographyPair] = []
    problems = [f"{name}: in the split, but not in {root}" for name in chosen if name not in {f.name for f in folders}]
    for folder in folders:
        if folder.name in chosen:
            try:
                pairs.extend(read_sequence(folder))
            except DataError as error:
                problems.append(f"{folder.name} left out: {error}")
    if not pairs:
        detail = "; ".join(problems[:3]) or "no folder holds images 1.*, 2.* with H_1_2 (HPatches) or img1.*, img2.* with H1to2p (Oxford)"
        raise DataError(f"no usable homography sequence in {root}: {detail}")
    layout = "hpatches" if any(f.name.startswith(("v_", "i_")) for f in folders) else "oxford"
    return Dataset(root.name, layout, root, pairs, problems)


def _looks_like_sequence(folder: Path) -> bool:
    return bool(re.match(r"[vi]_", folder.name)) and bool(_numbered_images(folder))


def _choose(names: list[str], split: str | Path) -> list[str]:
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
        raise ValueError(f"split must be {', '.join(SPLITS)}, or a JSON file of sequence names; got {text!r}")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no split file {path}")
    try:
        content = json.loads(path.read_text())
        listed = content if not key else content[key]
        listed = listed["test"] if isinstance(listed, dict) else listed
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected a list of names, or {{split: {{'test': [names]}}}} with FILE:split ({error!r})") from error
    if not isinstance(listed, list) or not all(isinstance(n, str) for n in listed):
        raise DataError(f"{path}: expected a list of sequence names")
    return listed


# ---- posed pairs


def posed_pairs(listing: str | Path, root: str | Path | None = None) -> Dataset:
    """Pairs of a list with 38 columns a line: two names, two turns, two intrinsics (9 each), the pose (16).

    This is SuperGlue's format, in which its ScanNet and MegaDepth (YFCC) lists and the usual ScanNet-1500 and MegaDepth-1500
    lists come.

    Args:
        listing: the text file, or a folder that holds ``pairs_with_gt.txt``.
        root: folder the names start from; default ``images`` beside the list, or the list's own folder.

    Raises:
        FileNotFoundError: no list.
        DataError: no usable line. Lines that are broken or whose images are missing are named in ``problems``.
    """
    listing = Path(listing)
    if listing.is_dir():
        listing = listing / "pairs_with_gt.txt"
    if not listing.is_file():
        raise FileNotFoundError(f"no list of posed pairs {listing}")
    base = Path(root) if root is not None else (listing.parent / "images" if (listing.parent / "images").is_dir() else listing.parent)
    pairs: list[PosePair] = []
    problems = []
    for number, line in enumerate(listing.read_text().splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            pair = _posed_pair(words, base, len(pairs) + 1)
        except DataError as error:
            problems.append(f"{listing.name}, line {number}: {error}")
            continue
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{listing}: no usable pair: {'; '.join(problems[:3]) or 'the file is empty'}")
    return Dataset(listing.parent.name, "posed pairs", base, pairs, problems)


def _posed_pair(words: list[str], base: Path, number: int) -> PosePair:
    if len(words) != 38:
        raise DataError(f"{len(words)} columns, 38 expected")
    try:
        numbers = [float(w) for w in words[2:]]
    except ValueError as error:
        raise DataError(str(error)) from error
    image_a, image_b = base / words[0], base / words[1]
    for path in (image_a, image_b):
        if not path.is_file():
            raise DataError(f"no image {path}")
    values = torch.tensor(numbers, dtype=torch.float64)
    K_a, K_b, T_ab = values[2:11].reshape(3, 3), values[11:20].reshape(3, 3), values[20:].reshape(4, 4)
    return PosePair(base.parent.name, str(number), "pose", image_a, image_b, K_a, K_b, T_ab, int(numbers[0]) % 4, int(numbers[1]) % 4)


# ---- Strecha's surveyed cameras


def strecha(root: str | Path) -> Dataset:
    """All pairs of images of surveyed scenes (Strecha et al., CVPR 2008).

    ``SCENE/gt_dense_cameras/NAME.camera`` of the image ``SCENE/images/NAME`` holds K (9 numbers), three zeros, the rotation from
    the camera to the world (9), the centre (3), width and height. Images may be smaller than that; K is scaled to them.

    Args:
        root: a folder of scenes, or one scene.

    Raises:
        DataError: no usable pair. Images without a camera, and cameras that are broken, are named in ``problems``.
    """
    root = Path(root)
    pairs: list[PosePair] = []
    problems = []
    for scene in _strecha_scenes(root):
        cameras: dict[Path, tuple[Tensor, Tensor]] = {}
        for file in sorted((scene / STRECHA_CAMERAS).glob("*.camera")):
            try:
                image = _image_of(scene, file.name.removesuffix(".camera"))
                cameras[image] = _read_camera(file, image)
            except DataError as error:
                problems.append(str(error))
        for a, b in combinations(cameras, 2):
            (K_a, T_a), (K_b, T_b) = cameras[a], cameras[b]
            T_ab = T_b @ torch.linalg.inv(T_a)
            if not float(T_ab[:3, 3].norm()) > 0:
                problems.append(f"{scene.name}: {a.name} and {b.name} have one centre, so no direction of translation; remove one of them")
                continue
            pairs.append(PosePair(scene.resolve().name, f"{a.stem}-{b.stem}", "pose", a, b, K_a, K_b, T_ab))
    if not pairs:
        detail = "; ".join(problems[:3]) or f"no scene with two {STRECHA_CAMERAS}/NAME.camera of images/NAME"
        raise DataError(f"no usable pair of surveyed cameras in {root}: {detail}")
    return Dataset(root.resolve().name, "strecha", root, pairs, problems)


def _strecha_scenes(root: Path) -> list[Path]:
    return [folder for folder in _with_subfolders(root) if (folder / STRECHA_CAMERAS).is_dir()]


def _with_subfolders(root: Path) -> list[Path]:
    """The folder and those in it, sorted; none where it is missing."""
    return [root, *sorted(folder for folder in root.iterdir() if folder.is_dir())] if root.is_dir() else []


def _image_of(scene: Path, name: str) -> Path:
    for image in (scene / "images" / name, scene / name):
        if image.is_file():
            return image
    raise DataError(f"{scene / STRECHA_CAMERAS / name}.camera has no image {scene / 'images' / name}; put it there or remove the camera")


def _image_size(path: Path) -> tuple[int, int]:
    """(width, height), from the header of the file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error


def _read_numbers(path: Path) -> Tensor:
    """All numbers of a text file, float64, whatever its lines.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        values = torch.tensor([float(word) for word in path.read_text().split()], dtype=torch.float64)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as numbers ({error}); replace or remove it") from error
    if not bool(torch.isfinite(values).all()):
        raise DataError(f"{path}: not all numbers are finite; replace or remove it")
    return values


def _read_camera(file: Path, image: Path) -> tuple[Tensor, Tensor]:
    """Intrinsics (3,3) of the image as stored, and the pose (4,4) from the world to the camera."""
    values = _read_numbers(file)
    if len(values) != 26:
        raise DataError(f"{file}: {len(values)} numbers, a camera has 26 (K 9, zeros 3, R 9, centre 3, size 2); replace or remove it")
    K, R, centre = values[:9].reshape(3, 3), values[12:21].reshape(3, 3), values[21:24]
    if float((R @ R.T - torch.eye(3, dtype=torch.float64)).abs().max()) > ROTATION_TOLERANCE or float(torch.linalg.det(R)) < 0:
        raise DataError(f"{file}: R is no rotation; replace or remove it")
    width, height = (int(v) for v in values[24:])
    size = _image_size(image)
    if width < 1 or height < 1 or abs(size[0] / width * height - size[1]) > 1:  # a pixel of rounding
        raise DataError(f"{file}: for {width} x {height}, but {image} is {size[0]} x {size[1]}; resize the image without cropping it")
    T = torch.eye(4, dtype=torch.float64)
    T[:3, :3], T[:3, 3] = R.T, -R.T @ centre
    return resized_intrinsics(K, (width, height), size), T


# ---- WxBS: correspondences marked by hand


def wxbs(root: str | Path) -> Dataset:
    """Pairs with correspondences marked by hand: ``GROUP/PAIR/01.*``, ``02.*`` and ``corrs.txt`` with x1 y1 x2 y2 a line.

    Args:
        root: the folder of groups, a group, or a pair. The group is the sequence.

    Raises:
        DataError: no usable pair. Broken ones are named in ``problems``.
    """
    root = Path(root)
    pairs: list[MarkedPair] = []
    problems = []
    for folder in _wxbs_folders(root):
        try:
            pairs.append(_marked_pair(folder))
        except DataError as error:
            problems.append(str(error))
    if not pairs:
        raise DataError(f"no usable pair with marked correspondences in {root}: {'; '.join(problems[:3])}")
    return Dataset(root.resolve().name, "wxbs", root, pairs, problems)


def _wxbs_folders(root: Path) -> list[Path]:
    """Folders of pairs at most two below ``root``: those with a list of correspondences, and their neighbours with images 1 and 2."""
    marked = sorted({file.parent for pattern in ("", "*/", "*/*/") for file in root.glob(pattern + WXBS_FILE)})
    if not marked or root in marked:
        return marked
    neighbours = {folder for group in {path.parent for path in marked} for folder in _with_subfolders(group)[1:]}
    return sorted({*marked, *(folder for folder in neighbours if {1, 2} <= set(_numbered_images(folder)))})


def _marked_pair(folder: Path) -> MarkedPair:
    images, file = _numbered_images(folder), folder / WXBS_FILE
    for k in (1, 2):
        if k not in images:
            raise DataError(f"{folder}: no image {k} (0{k}.jpg, {k}.png, ...); put it there or remove the folder")
        _image_size(images[k])
    if not file.is_file():
        raise DataError(f"{folder}: no {WXBS_FILE} with x1 y1 x2 y2 a line; put it there or remove the folder")
    values = _read_numbers(file)
    if not len(values) or len(values) % 4:
        raise DataError(f"{file}: {len(values)} numbers, expected lines of four (x1 y1 x2 y2); replace or remove it")
    xy_a, xy_b = values.reshape(-1, 4).split(2, dim=1)
    folder = folder.resolve()
    return MarkedPair(folder.parent.name, folder.name, "marked", images[1], images[2], xy_a, xy_b)


# ---- homographies outside of sequences


def evd(root: str | Path) -> Dataset:
    """The Extreme View Dataset: images ``1/NAME.*`` and ``2/NAME.*``, and ``h/NAME.txt``, the homography from the first to the second.

    Raises:
        DataError: no usable pair. Names that lack a file are named in ``problems``.
    """
    root = Path(root)
    folders = {side: root / side for side in EVD_FOLDERS}
    images = {
        side: {path.stem: path for path in sorted(folders[side].iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES} for side in "12"
    }
    files = {path.stem: path for path in sorted(folders["h"].glob("*.txt"))}
    pairs: list[HomographyPair] = []
    problems = []
    for name in sorted({*files, *images["1"], *images["2"]}):
        try:
            for found, missing in ((images["1"], f"1/{name}.*"), (images["2"], f"2/{name}.*"), (files, f"h/{name}.txt")):
                if name not in found:
                    raise DataError(f"{root}: {name} has no {missing}; put it there or remove the others of that name")
            image_a, image_b = images["1"][name], images["2"][name]
            _image_size(image_a)
            _image_size(image_b)
            pairs.append(HomographyPair(root.resolve().name, name, "view", image_a, image_b, read_homography(files[name])))
        except DataError as error:
            problems.append(str(error))
    if not pairs:
        raise DataError(f"no usable pair in {root}: {'; '.join(problems[:3]) or 'the folders 1, 2 and h are empty'}")
    return Dataset(root.resolve().name, "evd", root, pairs, problems)


def webcams(root: str | Path) -> Dataset:
    """All pairs of frames of fixed cameras (TILDE, Verdie et al., CVPR 2015): the homography is the identity.

    A scene is a folder of images called YYYYMMDD_HHMMSS; other folders are not taken for one, since nothing else would tell
    frames of a fixed camera from any photographs.

    Args:
        root: a folder of scenes, or one scene.

    Raises:
        DataError: no usable pair. Frames that cannot be read, or of another size than most of their scene, are named in ``problems``.
    """
    root = Path(root)
    pairs: list[HomographyPair] = []
    problems = []
    for scene in _webcam_scenes(root):
        sizes: dict[Path, tuple[int, int]] = {}
        for frame in _frames(scene):
            try:
                sizes[frame] = _image_size(frame)
            except DataError as error:
                problems.append(str(error))
        common = max(sizes.values(), key=list(sizes.values()).count, default=(0, 0))
        for frame, size in sizes.items():
            if size != common:
                problems.append(f"{frame}: {size[0]} x {size[1]}, most of the scene is {common[0]} x {common[1]}; replace or remove it")
        frames = [frame for frame, size in sizes.items() if size == common]
        identity = torch.eye(3, dtype=torch.float64)
        pairs += [
            HomographyPair(scene.resolve().name, f"{a.stem}-{b.stem}", "illum", a, b, identity) for a, b in combinations(frames, 2)
        ]
    if not pairs:
        raise DataError(f"no usable pair of frames in {root}: {'; '.join(problems[:3]) or 'no scene has two frames'}")
    return Dataset(root.resolve().name, "webcams", root, pairs, problems)


def _frames(scene: Path) -> list[Path]:
    return [p for p in sorted(scene.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES and WEBCAM_NAME.fullmatch(p.stem)]


def _webcam_scenes(root: Path) -> list[Path]:
    return [folder for folder in _with_subfolders(root) if _frames(folder)]


# ---- sizes and rotations of posed images


def resize_target(width: int, height: int, resize: tuple[int, ...] | None) -> tuple[int, int]:
    """Size (width, height) that the pose papers resize an image to.

    ``(w, h)``: exactly that (SuperGlue's ScanNet: 640, 480); ``(side,)``: longest side, smaller images enlarged too (its outdoor
    1600); None: as stored.
    """
    if resize is None:
        return width, height
    if len(resize) == 2:
        return resize[0], resize[1]
    if len(resize) != 1:
        raise ValueError(f"resize must be (side,) or (width, height), got {resize}")
    factor = resize[0] / max(width, height)
    return max(1, round(width * factor)), max(1, round(height * factor))


def resized_intrinsics(K: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """(3,3) intrinsics of an image resized from ``size`` to ``new_size`` (width, height), half-pixel law."""
    sx, sy = new_size[0] / size[0], new_size[1] / size[1]
    moved = torch.tensor([[sx, 0, (sx - 1) / 2], [0, sy, (sy - 1) / 2], [0, 0, 1]], dtype=torch.float64)
    return moved @ K


def turned_intrinsics(K: Tensor, size: tuple[int, int], turns: int) -> Tensor:
    """(3,3) intrinsics after ``turns`` quarter turns counter-clockwise of an image of ``size`` (width, height)."""
    w, h = size
    for _ in range(turns % 4):
        # the pixel (x, y) goes to (y, w - 1 - x); a camera keeps positive focal lengths, so its axes turn with the image
        fx, fy, cx, cy = (float(v) for v in (K[0, 0], K[1, 1], K[0, 2], K[1, 2]))
        K = torch.tensor([[fy, 0, cy], [0, fx, w - 1 - cx], [0, 0, 1]], dtype=torch.float64)
        w, h = h, w
    return K


def turned_pose(T_ab: Tensor, turns_a: int, turns_b: int) -> Tensor:
    """(4,4) pose between the turned cameras of images turned by quarter turns counter-clockwise."""

    def turn(count: int) -> Tensor:
        angle = torch.tensor(count % 4 * torch.pi / 2, dtype=torch.float64)
        c, s = angle.cos().round(), angle.sin().round()
        T = torch.eye(4, dtype=torch.float64)
        T[:2, :2] = torch.stack([torch.stack([c, s]), torch.stack([-s, c])])
        return T

    return turn(turns_b) @ T_ab @ torch.linalg.inv(turn(turns_a))


# ---- fetching HPatches


def fetch_hpatches(to: str | Path, *, mirrors: Iterable[str] = HPATCHES_MIRRORS, sha256: str | None = None, say=print) -> Path:
    """Download, check and unpack the HPatches sequences (1.3 GB) below ``to``; the folder of sequences.

    A finished folder is only checked. The archive's checksum is said aloud and compared with ``sha256`` where given; whatever
    the archive, the result must hold 116 sequences of six images and five homographies each.

    Raises:
        DataError: no mirror answered (with what to do offline), the checksum differs, or sequences are missing.
    """
    to = Path(to)
    folder = to / HPATCHES_FOLDER
    if folder.is_dir() and not _hpatches_problems(folder):
        say(f"{folder}: complete, nothing to fetch")
        return folder
    to.mkdir(parents=True, exist_ok=True)
    failures = []
    archive: Path | None = None
    for url in mirrors:
        target = to / url.rsplit("/", 1)[-1]
        part = target.with_name(target.name + ".part")
        say(f"fetching {url}")
        try:
            digest = _download(url, part)
        except (urllib.error.URLError, OSError, ValueError) as error:
            failures.append(f"{url}: {error}")
            part.unlink(missing_ok=True)
            continue
        if sha256 is not None and digest != sha256.lower():
            failures.append(f"{url}: sha256 is {digest}, expected {sha256}")
            part.unlink(missing_ok=True)
            continue
        say(f"sha256 {digest}")
        part.replace(target)
        archive = target
        break
    if archive is None:
        raise DataError(
            "HPatches could not be fetched:\n  " + "\n  ".join(failures) + f"\nOffline: fetch {HPATCHES_FOLDER}.zip or .tar.gz on another "
            f"machine from one of these addresses, unpack it so that {folder}/v_wall/1.ppm exists, and run this command again to check it"
        )
    unpack(archive, to)
    archive.unlink()
    problems = _hpatches_problems(folder)
    if problems:
        raise DataError(f"{folder} is not complete: {'; '.join(problems[:5])}")
    return folder


def _download(url: str, part: Path) -> str:
    from tqdm import tqdm

    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=30) as answer, part.open("wb") as file:
        total = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=total or None, unit="B", unit_scale=True) as bar:
            while block := answer.read(1 << 20):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
    return digest.hexdigest()


def unpack(archive: Path, to: Path) -> None:
    """Unpack a .zip or .tar.gz below ``to``; members that would leave it are refused.

    Raises:
        DataError: not an archive, or a member leaves the folder.
    """
    inside = to.resolve()
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as content:
                for name in content.namelist():
                    if not (inside / name).resolve().is_relative_to(inside):
                        raise DataError(f"{archive}: member {name!r} would leave {to}")
                content.extractall(to)
        else:
            with tarfile.open(archive) as content:
                content.extractall(to, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); delete it and fetch again") from error


def _hpatches_problems(folder: Path) -> list[str]:
    if not folder.is_dir():
        return [f"no folder {folder}"]
    names = [f for f in sorted(folder.iterdir()) if f.is_dir() and f.name.startswith(("v_", "i_"))]
    problems = [] if len(names) == HPATCHES_SEQUENCES else [f"{len(names)} sequences, {HPATCHES_SEQUENCES} expected"]
    for sequence in names:
        try:
            if len(read_sequence(sequence)) != 5:
                problems.append(f"{sequence.name}: not six images")
        except DataError as error:
            problems.append(str(error))
    return problems
