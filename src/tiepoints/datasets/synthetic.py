"""Pairs of views of a photograph with their homography: the training data of detectors.

After Key.Net, section 5.1, with the errors of the published generators (docs/training.md) fixed:
rotation, scale and skew are centered on the window, the homography is exact, downsampling is
low-pass filtered, the texture test has an absolute threshold, and training and validation
photographs are disjoint. Pair ``i`` of seed ``s`` depends only on ``s``, ``i`` and the list of
photographs, whatever the number of workers.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..decode import file_errors, image_size, no_pixel_limit
from ..errors import DataError, first_line
from ..files import list_images
from ..filters import gaussian_blur, sobel, to_gray
from ..geometry import pixel_grid, sample_at, warp_points
from ..image import to_rgb
from ..progress import track

logger = logging.getLogger(__name__)
#: Maximum number of log messages about images that are skipped.
MAX_SKIPPED_LOGGED = 10
#: Seed of the split into training and validation photographs, the same for every training, so that
#: validation photographs are never trained on.
SPLIT_SEED = 20190827
#: Minimum side of a photograph in pixels.
MIN_SIDE = 64
#: Windows drawn per photograph, and photographs tried per pair, before an error is raised.
ATTEMPTS_PER_PHOTO = 10
PHOTOS_PER_PAIR = 40
#: Minimum 98th percentile of the absolute first and second derivatives in both windows, in gray
#: levels per pixel.
TEXTURE_FIRST = 3.0
TEXTURE_SECOND = 1.0
#: Range of the factor on the gray levels of a dark image.
DARK = (0.15, 0.5)
#: Random tone curves: number of knots, weight in the mixture with the identity, and probability of
#: a non-monotonic curve.
TONE_KNOTS, TONE_STRENGTH, TONE_FALLING = 6, 0.75, 0.125
#: Range of the natural logarithm of the factor of a shadow or highlight.
SHADOW = (-1.2, 0.7)
#: Foreground layer: range of its radius over the side of the window, and of its motion relative to
#: the background in pixels.
LAYER_RADIUS = (0.1, 0.3)
LAYER_SHIFT = (8.0, 40.0)


@dataclass(frozen=True)
class PairSettings:
    """Random transforms of a pair.

    Angles in degrees, lengths in pixels of the window, probabilities in [0,1].

    Attributes:
        size: side of the square windows.
        scale: range of the scale of b over that of a, drawn log-uniformly.
        rotation: largest rotation to either side; ``rotation_power`` > 1 makes small ones more
            frequent.
        skew: largest skew to either side; ``skew_power`` > 1 makes small ones more frequent.
        tilt: largest ratio of the stretch along a random direction to that across it, drawn
            log-uniformly, as by a level camera that looks obliquely at a plane: vertical lines stay
            vertical; 1 = none.
        perspective: largest relative change of scale between window center and edge.
        jitter: largest shift of the window center of b.
        mirror: probability of mirroring b horizontally, and vertically; half of it is the
            probability of transposing b.
        color: probability of each step of the color distortion of b.
        gamma, tone, shadow, blur, dark, noise, jpeg: probability of these changes, drawn
            independently for a and b (``degrade``).
        noise_sigma: largest standard deviation of the noise in 8-bit gray levels; the smallest is
            1. ``noise_power`` > 1 makes small ones more frequent.
        jpeg_quality: lowest quality of the compression; the highest is 90.
        layers: probability of a foreground layer that covers a part of both windows and moves
            independently, like an object at another depth.
        min_overlap: minimum fraction of each window that the other window shows.
        max_side: longer photographs are reduced to this side first; 0: no limit.
    """

    size: int = 192
    scale: tuple[float, float] = (0.5, 2.5)
    rotation: float = 60.0
    skew: float = 0.8
    skew_power: float = 1.0
    rotation_power: float = 1.0
    tilt: float = 1.0
    perspective: float = 0.0
    jitter: float = 0.0
    mirror: float = 0.0
    color: float = 0.5
    gamma: float = 0.0
    tone: float = 0.0
    shadow: float = 0.0
    blur: float = 0.0
    dark: float = 0.0
    noise: float = 0.0
    noise_sigma: float = 8.0
    noise_power: float = 1.0
    jpeg: float = 0.0
    jpeg_quality: int = 20
    layers: float = 0.0
    min_overlap: float = 0.1
    max_side: int = 1024


#: Views of a plane under changes of viewpoint and light: the base of the presets for detectors.
_PLANAR = PairSettings(
    scale=(0.5, 2.2),
    rotation=60,
    skew=0.8,
    skew_power=3.0,
    perspective=0.25,
    jitter=16,
    gamma=0.3,
    blur=0.2,
    noise=0.25,
    jpeg=0.25,
    min_overlap=0.2,
)
#: The base of the presets for descriptors.
_DESCRIBED = PairSettings(
    size=256,
    scale=(0.55, 1.8),
    rotation=180,
    rotation_power=3,
    skew=0.7,
    skew_power=2.0,
    perspective=0.25,
    jitter=16,
    gamma=0.3,
    blur=0.25,
    noise=0.3,
    jpeg=0.3,
    min_overlap=0.25,
)
#: The same with illumination, noise and occlusion of real photographs.
_REALISTIC = replace(
    _DESCRIBED,
    scale=(0.5, 2.0),
    skew=0.8,
    perspective=0.3,
    tone=0.25,
    shadow=0.25,
    dark=0.08,
    noise_sigma=20.0,
    noise_power=3.0,
    jpeg_quality=15,
    layers=0.3,
)
#: Settings of each name in ``names.PAIR_PRESETS``.
PRESETS: dict[str, PairSettings] = {
    # Key.Net paper, 5.1
    "keynet-paper": PairSettings(scale=(0.5, 3.5), rotation=60, skew=0.8, max_side=0),
    # TensorFlow code of Key.Net
    "keynet-code": PairSettings(scale=(0.5, 2.0), rotation=45, skew=0.8, max_side=0),
    # REKD's defaults: in-plane rotation only
    "rekd": PairSettings(scale=(1.0, 1.0), rotation=180, skew=0.0, max_side=0),
    "default": replace(_PLANAR, mirror=0.5),
    # for detectors of real scenes: several depths, noise and compression of low-quality cameras
    "layers": replace(
        _PLANAR,
        mirror=0.5,
        blur=0.3,
        dark=0.05,
        noise_sigma=25.0,
        noise_power=3.0,
        jpeg_quality=15,
        layers=0.3,
    ),
    # for oriented keypoints: all rotations; not mirrored, because the relative orientation of a
    # mirrored corner is undefined
    "turns": replace(
        _PLANAR, scale=(0.6, 1.8), rotation=180, skew=0.6, perspective=0.2, min_overlap=0.25
    ),
    # for dense descriptors, which are not rotation-normalized: all rotations, small ones more often
    "dense": _DESCRIBED,
    # for descriptors of upright patches, because cameras are roughly level; not mirrored, because a
    # mirrored patch is a different patch
    "patches": replace(_DESCRIBED, rotation=45, rotation_power=1.5),
    "dense-upright": replace(_REALISTIC, size=320, rotation=40, rotation_power=2),
    # as "patches", for pairs whose rotation is estimated before description
    "patches-upright": replace(_REALISTIC, rotation=25, rotation_power=1.5),
    # for affine shapes: oblique views by cameras that are nearly level
    "tilted": replace(
        _REALISTIC,
        size=320,
        rotation=15,
        rotation_power=1.5,
        scale=(0.6, 1.6),
        skew=0.3,
        tilt=4.0,
        perspective=0.5,
        tone=0.1,
        layers=0.15,
    ),
}


@dataclass(frozen=True)
class Pair:
    """Two windows of one photograph.

    Attributes:
        image_a, image_b: (S,S) uint8 gray.
        H_ab: (3,3) float64, pixels of a to pixels of b.
        mask_a, mask_b: (S,S) bool, pixels inside the photograph that the other window shows.
        source: path of the photograph.
    """

    image_a: np.ndarray
    image_b: np.ndarray
    H_ab: np.ndarray
    mask_a: np.ndarray
    mask_b: np.ndarray
    source: str = ""


def list_photos(folder: str | Path) -> list[Path]:
    """List the image files below ``folder``, sorted by path; hidden files are skipped.

    Raises:
        FileNotFoundError: no such folder.
    """
    return list_images(Path(folder))[0]


def find_photos(
    folders: Sequence[str | Path], min_side: int = MIN_SIDE, *, log: bool = True
) -> list[Path]:
    """List the usable photographs in folders (``usable_photos``), each file once; log the others.

    Raises:
        FileNotFoundError: no such folder.
    """
    listings = [list_images(Path(folder)) for folder in folders]
    paths: dict[Path, Path] = {}
    for path in (path for listing in listings for path in listing.images):
        paths.setdefault(path.resolve(), path)
    usable, rejected = usable_photos([*paths.values()], min_side)
    refused = [f"{path}: {reason}" for listing in listings for path, reason in listing.refused]
    if log:
        _log_skipped(refused + rejected)
        if others := sum(listing.skipped for listing in listings):
            logger.info("skipped: %d files that are not images", others)
    return usable


def _log_skipped(lines: list[str]) -> None:
    for line in lines[:MAX_SKIPPED_LOGGED]:
        logger.warning("skipped: %s", line)
    if len(lines) > MAX_SKIPPED_LOGGED:
        logger.warning("skipped: %d more images", len(lines) - MAX_SKIPPED_LOGGED)


def usable_photos(paths: Sequence[Path], min_side: int = MIN_SIDE) -> tuple[list[Path], list[str]]:
    """Select photographs with a readable header and sufficient size.

    Returns:
        usable paths; one message for each other path.
    """
    usable, rejected = [], []
    for path in track(paths, unit="image", label="scan"):
        try:
            width, height = image_size(path)
        except (OSError, DataError) as error:
            rejected.append(str(error))
            continue
        if min(width, height) < min_side:
            rejected.append(
                f"{path}: {width} x {height} pixels, the shorter side must have at least {min_side}"
            )
        else:
            usable.append(path)
    return usable, rejected


def split_photos(paths: Sequence[Path], held_out: float = 0.1) -> tuple[list[Path], list[Path]]:
    """Split photographs into training and validation; the split depends only on the list.

    Args:
        paths: photographs.
        held_out: fraction for validation; at least one photograph.

    Raises:
        DataError: fewer than two photographs.
    """
    if len(paths) < 2:
        raise DataError(
            f"{len(paths)} usable image(s); training needs at least two, one of them for "
            "validation. Use a folder with more photographs (at least a hundred for good weights)."
        )
    ordered = sorted(paths)
    count = min(max(1, round(held_out * len(ordered))), len(ordered) - 1)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(ordered))
    validation = set(order[:count].tolist())
    training = [p for i, p in enumerate(ordered) if i not in validation]
    return training, [p for i, p in enumerate(ordered) if i in validation]


def split_readable(paths: Sequence[Path], *, log: bool = True) -> tuple[list[Path], list[Path]]:
    """``split_photos`` without photographs for validation that cannot be decoded; these are logged.

    Their headers may be intact. A damaged photograph for training is skipped when it is drawn.

    Raises:
        DataError: fewer than two photographs.
    """
    paths, readable = list(paths), set[Path]()
    while True:
        training, held_out = split_photos(paths)
        damaged = set(damaged_photos([p for p in held_out if p not in readable], log=log))
        if not damaged:
            return training, held_out
        readable.update(set(held_out) - damaged)
        paths = [path for path in paths if path not in damaged]


def damaged_photos(paths: Sequence[Path], *, log: bool = True) -> list[Path]:
    """The photographs that cannot be decoded; these are logged."""
    damaged, lines = [], []
    for path in track(paths, unit="image", label="check", enabled=log):
        try:
            read_photo(path, PairSettings.max_side)
        except DataError as error:
            damaged.append(path)
            lines.append(str(error))
    if log:
        _log_skipped(lines)
    return damaged


class UnreadableLog:
    """Logs each unreadable file once, from whichever worker process reads it."""

    def __init__(self) -> None:
        self._logged = torch.zeros(2**16, dtype=torch.bool).share_memory_()

    def add(self, path: Path, error: Exception) -> None:
        """Log a file unless it has been."""
        slot = zlib.crc32(os.fsencode(path)) % len(self._logged)
        if not self._logged[slot]:
            self._logged[slot] = True
            text = first_line(error)
            logger.warning("skipped: %s", text if str(path) in text else f"{path}: {text}")


@cache
def unreadable_log() -> UnreadableLog:
    """The log of this process and of the workers to which it is passed."""
    return UnreadableLog()


def read_photo(path: Path, max_side: int = 0) -> np.ndarray:
    """Read a photograph as (H,W,3) uint8 RGB, reduced to ``max_side`` unless that is 0.

    Raises:
        DataError: the file cannot be decoded.
    """
    with file_errors(path), no_pixel_limit(), Image.open(path) as photo:
        if photo.format == "JPEG":
            if max_side:
                photo.draft("RGB", (max_side, max_side))  # decodes at a reduced size
            rgb = photo.convert("RGB")
        else:
            rgb = to_rgb(path)
    if max_side and max(rgb.size) > max_side:
        rgb.thumbnail((max_side, max_side), Image.Resampling.BOX)
    return np.asarray(rgb)


def distort_color(
    rgb: np.ndarray, rng: np.random.Generator, probability: float = 0.5
) -> np.ndarray:
    """Randomly change brightness, contrast, saturation, hue and channel order of an (H,W,3) uint8
    image, each with ``probability``.
    """

    def coin() -> bool:
        return bool(rng.random() < probability)

    values = rgb.astype(np.float32)
    if coin():
        values = (values + rng.uniform(-36, 36)).clip(0, 255)
    contrast = coin()
    if contrast:
        values = (values * rng.uniform(0.5, 1.5)).clip(0, 255)
    saturation = rng.uniform(0.5, 1.5) if coin() else 1.0
    hue = rng.uniform(-36, 36) if coin() else 0.0
    if saturation != 1.0 or hue != 0.0:
        hsv = np.array(Image.fromarray(values.astype(np.uint8)).convert("HSV"), dtype=np.float32)
        hsv[..., 0] = (hsv[..., 0] + hue * 256 / 360) % 256
        hsv[..., 1] = (hsv[..., 1] * saturation).clip(0, 255)
        bands = [Image.fromarray(hsv[..., band].astype(np.uint8)) for band in range(3)]
        values = np.array(Image.merge("HSV", bands).convert("RGB"), dtype=np.float32)
    if contrast:
        values = (values * rng.uniform(0.7, 1.3)).clip(0, 255)
    if coin():
        values = values[..., rng.permutation(3)]
    return values.astype(np.uint8)


def degrade(gray: np.ndarray, rng: np.random.Generator, settings: PairSettings) -> np.ndarray:
    """Randomly degrade an (H,W) uint8 image like illumination, weather and real cameras.

    In this order: gamma, tone (``tone_curve``), shadow (``cast_shadow``), blur, dark, noise, JPEG.
    """
    if rng.random() < settings.gamma:
        curve = 255 * np.linspace(0, 1, 256) ** rng.uniform(0.6, 1.6)
        gray = curve.round().astype(np.uint8)[gray]
    # no random number is drawn for changes that a preset does not use, so that the pairs of older
    # presets stay the same
    if settings.tone and rng.random() < settings.tone:
        gray = tone_curve(rng)[gray]
    if settings.shadow and rng.random() < settings.shadow:
        gray = cast_shadow(gray, rng)
    if rng.random() < settings.blur:
        tensor = torch.from_numpy(gray.astype(np.float32))[None, None]
        gray = (
            gaussian_blur(tensor, float(rng.uniform(0.5, 2.0)))[0, 0]
            .round()
            .clamp(0, 255)
            .numpy()
            .astype(np.uint8)
        )
    if settings.dark and rng.random() < settings.dark:
        gray = (gray * rng.uniform(*DARK)).round().astype(np.uint8)
    if rng.random() < settings.noise:
        sigma = 1 + (settings.noise_sigma - 1) * rng.random() ** settings.noise_power
        gray = (gray + rng.normal(0, sigma, gray.shape)).round().clip(0, 255).astype(np.uint8)
    if rng.random() < settings.jpeg:
        buffer = io.BytesIO()
        Image.fromarray(gray).save(
            buffer, "JPEG", quality=int(rng.integers(settings.jpeg_quality, 91))
        )
        gray = np.array(Image.open(buffer))
    return gray


def tone_curve(rng: np.random.Generator) -> np.ndarray:
    """Random tone curve (256,) uint8; one in eight is not monotonic, as between different bands."""
    knots = np.linspace(0, 255, TONE_KNOTS)
    values = rng.uniform(0, 255, TONE_KNOTS)
    if rng.random() >= TONE_FALLING:
        values = np.sort(values)
    values = TONE_STRENGTH * values + (1 - TONE_STRENGTH) * knots
    return np.interp(np.arange(256), knots, values).round().clip(0, 255).astype(np.uint8)


def cast_shadow(gray: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darken or brighten one side of a random line, with a sharp or soft edge: (H,W) uint8."""
    h, w = gray.shape
    angle = rng.uniform(0, 2 * math.pi)
    softness = math.exp(rng.uniform(math.log(0.5), math.log(0.2 * max(h, w))))
    y, x = np.mgrid[:h, :w]
    origin = rng.uniform(0.2, 0.8, 2) * (w, h)
    distance = (x - origin[0]) * math.cos(angle) + (y - origin[1]) * math.sin(angle)
    weight = 0.5 * (1 + np.tanh(distance / softness))
    factor = math.exp(rng.uniform(*SHADOW))
    return (gray * (1 + (factor - 1) * weight)).round().clip(0, 255).astype(np.uint8)


def draw_transform(rng: np.random.Generator, settings: PairSettings) -> np.ndarray:
    """Draw a transform (3,3) float64 from a to b, with the window centers at the origin."""
    low, high = settings.scale
    scale = math.exp(rng.uniform(math.log(low), math.log(high)))
    u = rng.uniform(-1, 1)
    angle = math.radians(settings.rotation * math.copysign(abs(u) ** settings.rotation_power, u))
    skew = rng.uniform(-1, 1)
    skew = settings.skew * math.copysign(abs(skew) ** settings.skew_power, skew)
    rotate = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = np.eye(3)
    matrix[:2, :2] = np.array([[1, skew], [0, 1]]) @ (scale * rotate)
    # see ``degrade`` about random numbers
    if settings.tilt > 1:
        matrix[:2, :2] = draw_tilt(rng, settings.tilt) @ matrix[:2, :2]
    flips = rng.random(3)
    if flips[0] < settings.mirror:
        matrix = np.diag([-1.0, 1.0, 1.0]) @ matrix
    if flips[1] < settings.mirror:
        matrix = np.diag([1.0, -1.0, 1.0]) @ matrix
    if flips[2] < settings.mirror / 2:
        matrix = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]) @ matrix
    tilt = np.eye(3)
    tilt[2, :2] = rng.uniform(-1, 1, 2) * settings.perspective / settings.size
    return tilt @ matrix


def draw_tilt(rng: np.random.Generator, largest: float) -> np.ndarray:
    """Draw a stretch (2,2) of determinant 1 along a random direction, rotated so that vertical
    lines stay vertical: lower triangular. The ratio of its singular values is at most ``largest``.
    """
    root = math.exp(0.5 * rng.uniform(0, math.log(largest)))
    direction = rng.uniform(0, math.pi)
    cos, sin = math.cos(direction), math.sin(direction)
    rotate = np.array([[cos, -sin], [sin, cos]])
    stretch = rotate @ np.diag([root, 1 / root]) @ rotate.T
    x, y = stretch[:, 1] / np.linalg.norm(stretch[:, 1])  # where the vertical goes
    return np.array([[y, -x], [x, y]]) @ stretch


def _translation(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def _has_texture(gray: np.ndarray) -> bool:
    """Whether the first and second derivatives of a window (S,S) are large in both directions."""
    image = torch.from_numpy(gray.astype(np.float32))[None, None]
    dx, dy = sobel(image)
    dxx, dxy = sobel(dx)
    dyy = sobel(dy)[1]

    def percentile(channel: Tensor) -> float:
        values = channel[..., ::2, ::2].abs().flatten()
        return float(values.kthvalue(int(0.98 * values.numel())).values)

    first = all(percentile(c) >= TEXTURE_FIRST for c in (dx, dy))
    return first and all(percentile(c) >= TEXTURE_SECOND for c in (dxx, dxy, dyy))


def make_pair(photo: np.ndarray, rng: np.random.Generator, settings: PairSettings) -> Pair | None:
    """Draw one pair from a photograph (H,W,3) uint8; None if ``ATTEMPTS_PER_PHOTO`` draws fail.

    A draw fails if a window has too little texture (paper 5.1) or the views overlap too little.
    """
    size = settings.size
    height, width = photo.shape[:2]
    center = (size - 1) / 2
    for _ in range(ATTEMPTS_PER_PHOTO):
        # window a lies inside the photograph where possible
        center_a = [
            rng.uniform(min(center, (n - 1) / 2), max(n - 1 - center, (n - 1) / 2))
            for n in (width, height)
        ]
        corner = np.round(np.array(center_a) - center)
        a_to_photo = _translation(corner[0], corner[1])
        transform = draw_transform(rng, settings)
        shift = (
            rng.uniform(-settings.jitter, settings.jitter, 2) if settings.jitter else np.zeros(2)
        )
        H_ab = (
            _translation(center + shift[0], center + shift[1])
            @ transform
            @ _translation(-center, -center)
        )
        H_ab = H_ab / H_ab[2, 2]
        b_to_photo = a_to_photo @ np.linalg.inv(H_ab)
        shrink = 1 / math.sqrt(abs(np.linalg.det(transform[:2, :2])))
        if not _in_front(H_ab, size):
            continue
        gray_a, valid_a = _window(photo, a_to_photo, size, 1.0)
        if not _has_texture(gray_a):
            continue
        gray_b, valid_b = _window(photo, b_to_photo, size, shrink, rng, settings.color)
        if not _has_texture(gray_b):
            continue
        if settings.layers and rng.random() < settings.layers:
            layer = draw_layer(photo, rng, H_ab, shrink, settings)
            gray_a, valid_a = _blend_layer(gray_a, valid_a, *layer[0])
            gray_b, valid_b = _blend_layer(gray_b, valid_b, *layer[1])
        mask_a = valid_a & _overlap(H_ab, valid_b)
        mask_b = valid_b & _overlap(np.linalg.inv(H_ab), valid_a)
        if min(mask_a.mean(), mask_b.mean()) < settings.min_overlap:
            continue
        return Pair(
            degrade(gray_a, rng, settings), degrade(gray_b, rng, settings), H_ab, mask_a, mask_b
        )
    return None


def draw_layer(
    photo: np.ndarray,
    rng: np.random.Generator,
    H_ab: np.ndarray,
    shrink: float,
    settings: PairSettings,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw a foreground layer for both windows.

    The layer is an ellipse that shows another part of the photograph and moves by an additional
    random shift.

    Args:
        photo: (H,W,3) uint8.
        rng: random generator.
        H_ab: homography (3,3) of the background.
        shrink: size of a pixel of b in pixels of the photograph.
        settings: size of the windows and color distortion of b.

    Returns:
        for a and for b the gray values (S,S) uint8 and the opacity (S,S) float in [0,1].
    """
    size = settings.size
    height, width = photo.shape[:2]
    corner = [rng.uniform(min(0, n - size), max(0, n - size)) for n in (width, height)]
    direction = rng.uniform(0, 2 * math.pi)
    distance = rng.uniform(*LAYER_SHIFT)
    H_layer = _translation(distance * math.cos(direction), distance * math.sin(direction)) @ H_ab
    center = rng.uniform(0.15 * size, 0.85 * size, 2)
    radii = rng.uniform(*LAYER_RADIUS, 2) * size
    angle = rng.uniform(0, math.pi)
    axes = (
        np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        / radii[:, None]
    )
    to_photo = _translation(*corner)
    grid = pixel_grid(size, size, torch.empty(0, dtype=torch.float64))
    layers = []
    for H, factor, color_rng in ((np.eye(3), 1.0, None), (H_layer, shrink, rng)):
        gray, _ = _window(
            photo, to_photo @ np.linalg.inv(H), size, factor, color_rng, settings.color
        )
        in_a = warp_points(grid, torch.from_numpy(np.linalg.inv(H))).numpy()
        radius = np.linalg.norm((in_a - center) @ axes.T, axis=1)
        # antialiased edge, one pixel of the window wide
        opacity = ((1 - radius) * radii.min() / max(factor, 1e-6) + 0.5).clip(0, 1)
        layers.append((gray, np.nan_to_num(opacity).reshape(size, size)))
    return layers


def _blend_layer(
    gray: np.ndarray, valid: np.ndarray, layer: np.ndarray, opacity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Blend a layer onto a window; also its valid pixels (S,S) bool that show only background."""
    blended = gray * (1 - opacity) + layer * opacity
    return blended.round().clip(0, 255).astype(np.uint8), valid & (opacity == 0)


def _in_front(H: np.ndarray, size: int) -> bool:
    """Whether the whole window stays on one side of the homography's line at infinity."""
    corners = np.array([[0, 0, 1], [size - 1, 0, 1], [0, size - 1, 1], [size - 1, size - 1, 1.0]])
    forward = (corners @ H.T)[:, 2]
    backward = (corners @ np.linalg.inv(H).T)[:, 2]
    return bool((forward > 0.2).all() and (backward * np.sign(backward[0]) > 0).all())


def _window(
    photo: np.ndarray,
    to_photo: np.ndarray,
    size: int,
    shrink: float,
    rng: np.random.Generator | None = None,
    color: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Resample a gray window from a photograph (H,W,3), which is extended by reflection.

    Args:
        photo: (H,W,3) uint8.
        to_photo: homography (3,3), window to photograph.
        size: side S of the window.
        shrink: size of a pixel of the window in pixels of the photograph, for the low-pass filter.
        rng: for the color distortion; None: no distortion.
        color: probability of each step of the color distortion.

    Returns:
        gray window (S,S) uint8; its pixels inside the photograph, (S,S) bool.
    """
    h, w = photo.shape[:2]
    grid = pixel_grid(size, size, torch.empty(0, dtype=torch.float64))
    xy = warp_points(grid, torch.from_numpy(to_photo))
    valid = (xy[:, 0] >= 0) & (xy[:, 0] <= w - 1) & (xy[:, 1] >= 0) & (xy[:, 1] <= h - 1)
    # Process only the part of the photograph that the window shows, with a margin for the low-pass
    # filter, unless the reflection is needed.
    margin = math.ceil(4 * shrink) + 2
    low = (xy.amin(dim=0).floor() - margin).clamp(min=0).nan_to_num(0)
    high = xy.amax(dim=0).ceil() + margin
    extent = high - low if bool(valid.all()) else torch.tensor([float(w), float(h)])
    left, top = (0, 0) if not bool(valid.all()) else (int(low[0]), int(low[1]))
    crop = photo[top : top + int(extent[1]) + 1, left : left + int(extent[0]) + 1]
    if rng is not None and color:
        crop = distort_color(crop, rng, color)
    image = to_gray(torch.from_numpy(crop.astype(np.float32)).permute(2, 0, 1)[None])
    if shrink > 1:  # low-pass filter against aliasing
        image = gaussian_blur(image, 0.5 * math.sqrt(shrink**2 - 1))
    values = sample_at(image, (xy - xy.new_tensor([left, top]))[None].float(), padding="reflection")
    gray = values.reshape(size, size).round().clamp(0, 255).numpy().astype(np.uint8)
    return gray, valid.reshape(size, size).numpy()


def _overlap(H: np.ndarray, valid_other: np.ndarray) -> np.ndarray:
    """Pixels of a window that ``H`` maps to valid pixels of the other window: (S,S) bool."""
    size = len(valid_other)
    grid = pixel_grid(size, size, torch.empty(0, dtype=torch.float64))
    xy = warp_points(grid, torch.from_numpy(H)).round().nan_to_num(-1, -1, -1)
    inside = ((xy >= 0) & (xy <= size - 1)).all(dim=-1)
    index = xy.clamp(0, size - 1).long()
    overlap = inside & torch.from_numpy(valid_other)[index[:, 1], index[:, 0]]
    return overlap.reshape(size, size).numpy()


class PairDataset(Dataset):
    """Pairs of views generated from photographs.

    Items: ``image_a, image_b`` (1,S,S) float32 in [0,1], ``H_ab`` (3,3) float64, ``mask_a, mask_b``
    (1,S,S) float32.

    Args:
        photos: image files.
        settings: how pairs are drawn.
        seed: pair ``i`` depends only on ``seed``, ``i`` and ``photos``.
        length: number of pairs.
        cache_bytes: memory limit of the cache of decoded photographs.

    Raises:
        DataError: ``photos`` is empty.
    """

    def __init__(
        self,
        photos: Sequence[Path],
        settings: PairSettings,
        *,
        seed: int = 0,
        length: int,
        cache_bytes: int = 600_000_000,
    ):
        if not photos:
            raise DataError("no photographs to draw pairs from")
        self.photos, self.settings, self.seed, self.length = list(photos), settings, seed, length
        self._cache: dict[int, np.ndarray | None] = {}
        self._free_bytes = cache_bytes
        self._unreadable = unreadable_log()

    def __len__(self) -> int:
        return self.length

    def _photo(self, index: int) -> np.ndarray | None:
        if index not in self._cache:
            try:
                photo = read_photo(self.photos[index], self.settings.max_side)
            except (DataError, OSError) as error:
                # intact header, but damaged data, or removed: the next photograph is used
                self._unreadable.add(self.photos[index], error)
                photo = None
            if photo is not None and photo.nbytes > self._free_bytes:
                return photo
            self._free_bytes -= 0 if photo is None else photo.nbytes
            self._cache[index] = photo
        return self._cache[index]

    def pair(self, index: int) -> Pair:
        """Draw pair ``index``.

        Raises:
            DataError: no photograph had windows with enough texture.
        """
        rng = np.random.default_rng([self.seed, index])
        epoch, position = divmod(index, len(self.photos))
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.photos))
        candidates = [
            int(order[position]),
            *rng.integers(0, len(self.photos), PHOTOS_PER_PAIR - 1).tolist(),
        ]
        for candidate in candidates:
            photo = self._photo(candidate)
            pair = None if photo is None else make_pair(photo, rng, self.settings)
            if pair is not None:
                return dataclasses.replace(pair, source=str(self.photos[candidate]))
        raise DataError(
            f"none of {PHOTOS_PER_PAIR} photographs had a window of {self.settings.size} px with "
            "texture in both views; the images are too small, too smooth or unreadable"
        )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"pair {index} of {self.length}")
        return as_tensors(self.pair(index))


def as_tensors(pair: Pair) -> dict[str, Tensor]:
    """Convert a pair to the tensors of an item of ``PairDataset``."""
    return {
        "image_a": torch.from_numpy(pair.image_a).float()[None] / 255,
        "image_b": torch.from_numpy(pair.image_b).float()[None] / 255,
        "H_ab": torch.from_numpy(np.ascontiguousarray(pair.H_ab)),
        "mask_a": torch.from_numpy(pair.mask_a).float()[None],
        "mask_b": torch.from_numpy(pair.mask_b).float()[None],
    }
