"""Pairs with known poses: SuperGlue's lists of pairs and Strecha's surveyed scenes."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from .ground_truth import Dataset, PosePair, resized_intrinsics
from .homography import image_size_of, read_numbers, with_subfolders

#: Folder of the cameras in Strecha's scenes (Strecha et al., CVPR 2008).
STRECHA_CAMERAS = "gt_dense_cameras"

#: Largest deviation of R R^T from the identity: camera files have six digits.
ROTATION_TOLERANCE = 1e-3


# ---- posed pairs


def posed_pairs(listing: str | Path, root: str | Path | None = None) -> Dataset:
    """Read a list of pairs in SuperGlue's format.

    Each line has 38 columns: two names, two rotations (multiples of 90 degrees), two intrinsics (9
    each) and the pose (16). SuperGlue's ScanNet and MegaDepth (YFCC) lists and the ScanNet-1500 and
    MegaDepth-1500 lists are in this format.

    Args:
        listing: the text file, or a folder that contains ``pairs_with_gt.txt``.
        root: folder to which the names are relative; default: ``images`` next to the list if it
            exists, else the folder of the list.

    Raises:
        FileNotFoundError: no list.
        DataError: no usable line. Damaged lines and lines with missing images are reported in
            ``problems``.
    """
    listing = Path(listing)
    if listing.is_dir():
        listing = listing / "pairs_with_gt.txt"
    if not listing.is_file():
        raise FileNotFoundError(f"no list of posed pairs {listing}")
    base = (
        Path(root)
        if root is not None
        else (listing.parent / "images" if (listing.parent / "images").is_dir() else listing.parent)
    )
    pairs: list[PosePair] = []
    problems = []
    for number, line in enumerate(listing.read_text().splitlines(), 1):
        columns = line.split()
        if not columns:
            continue
        try:
            pair = _posed_pair(columns, base, len(pairs) + 1)
        except DataError as error:
            problems.append(f"{listing.name}, line {number}: {error}")
            continue
        pairs.append(pair)
    if not pairs:
        raise DataError(
            f"{listing}: no usable pair: {'; '.join(problems[:3]) or 'the file is empty'}"
        )
    return Dataset(listing.parent.name, "posed pairs", base, pairs, problems)


def _posed_pair(columns: list[str], base: Path, number: int) -> PosePair:
    if len(columns) != 38:
        raise DataError(f"{len(columns)} columns, 38 expected")
    try:
        numbers = [float(column) for column in columns[2:]]
    except ValueError as error:
        raise DataError(str(error)) from error
    image_a, image_b = base / columns[0], base / columns[1]
    for path in (image_a, image_b):
        if not path.is_file():
            raise DataError(f"no image {path}")
    values = torch.tensor(numbers, dtype=torch.float64)
    K_a, K_b, T_ab = (
        values[2:11].reshape(3, 3),
        values[11:20].reshape(3, 3),
        values[20:].reshape(4, 4),
    )
    return PosePair(
        base.parent.name,
        str(number),
        "pose",
        image_a,
        image_b,
        K_a,
        K_b,
        T_ab,
        int(numbers[0]) % 4,
        int(numbers[1]) % 4,
    )


# ---- Strecha's surveyed cameras


def strecha(root: str | Path) -> Dataset:
    """Read all pairs of images of surveyed scenes (Strecha et al., CVPR 2008).

    ``SCENE/gt_dense_cameras/NAME.camera`` for the image ``SCENE/images/NAME`` contains K (9
    numbers), three zeros, the rotation from the camera to the world (9), the camera center (3),
    width and height. If the image is smaller than that, K is scaled.

    Args:
        root: a folder of scenes, or one scene.

    Raises:
        DataError: no usable pair. Cameras that are damaged or have no image are reported in
            ``problems``.
    """
    root = Path(root)
    pairs: list[PosePair] = []
    problems = []
    for scene in strecha_scenes(root):
        cameras, damaged = surveyed_cameras(scene)
        problems += damaged
        for a, b in combinations(cameras, 2):
            (K_a, T_a), (K_b, T_b) = cameras[a], cameras[b]
            T_ab = T_b @ torch.linalg.inv(T_a)
            if not float(T_ab[:3, 3].norm()) > 0:
                problems.append(
                    f"{scene.name}: {a.name} and {b.name} have the same camera center, so the "
                    "direction of translation is undefined; remove one of them"
                )
                continue
            pairs.append(
                PosePair(scene.resolve().name, f"{a.stem}-{b.stem}", "pose", a, b, K_a, K_b, T_ab)
            )
    if not pairs:
        detail = (
            "; ".join(problems[:3])
            or f"no scene has two files {STRECHA_CAMERAS}/NAME.camera with images/NAME"
        )
        raise DataError(f"no usable pair of surveyed cameras in {root}: {detail}")
    return Dataset(root.resolve().name, "strecha", root, pairs, problems)


def surveyed_cameras(scene: Path) -> tuple[dict[Path, tuple[Tensor, Tensor]], list[str]]:
    """Image -> intrinsics (3,3) and pose (4,4), world to camera, of one of Strecha's scenes; and
    why other cameras cannot be used.
    """
    cameras, problems = {}, []
    for file in sorted((scene / STRECHA_CAMERAS).glob("*.camera")):
        try:
            image = _image_of(scene, file.name.removesuffix(".camera"))
            cameras[image] = _read_camera(file, image)
        except DataError as error:
            problems.append(str(error))
    return cameras, problems


def strecha_scenes(root: Path) -> list[Path]:
    """Folders at most one level below ``root`` that contain surveyed cameras."""
    return [folder for folder in with_subfolders(root) if (folder / STRECHA_CAMERAS).is_dir()]


def _image_of(scene: Path, name: str) -> Path:
    for image in (scene / "images" / name, scene / name):
        if image.is_file():
            return image
    raise DataError(
        f"{scene / STRECHA_CAMERAS / name}.camera has no image {scene / 'images' / name}; add it "
        "or remove the camera"
    )


def _read_camera(file: Path, image: Path) -> tuple[Tensor, Tensor]:
    """Intrinsics (3,3) of the image as stored, and the pose (4,4), world to camera."""
    values = read_numbers(file)
    if len(values) != 26:
        raise DataError(
            f"{file}: {len(values)} numbers, expected 26 (K 9, zeros 3, R 9, center 3, size 2); "
            "replace or remove it"
        )
    K, R, center = values[:9].reshape(3, 3), values[12:21].reshape(3, 3), values[21:24]
    if (
        float((R @ R.T - torch.eye(3, dtype=torch.float64)).abs().max()) > ROTATION_TOLERANCE
        or float(torch.linalg.det(R)) < 0
    ):
        raise DataError(f"{file}: R is not a rotation matrix; replace or remove it")
    width, height = (int(v) for v in values[24:])
    size = image_size_of(image)
    # one pixel of tolerance for the rounding of the size
    if width < 1 or height < 1 or abs(size[0] / width * height - size[1]) > 1:
        raise DataError(
            f"{file}: camera of {width} x {height} pixels, but {image} has {size[0]} x {size[1]}; "
            "resize the image without cropping it"
        )
    T = torch.eye(4, dtype=torch.float64)
    T[:3, :3], T[:3, 3] = R.T, -R.T @ center
    return resized_intrinsics(K, (width, height), size), T
