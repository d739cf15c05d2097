"""Pairs of views of one photograph with the homography between them: the training data of every
detector.

Key.Net, section 5.1; the published generators' faults (docs/training.md) are mended: rotation,
scale and skew act about the window, the homography is exact, shrinking is low-passed, the texture
test has an absolute threshold, and training and validation photographs are disjoint. Pair ``i`` of
seed ``s`` depends on nothing but ``s``, ``i`` and the list of photographs, so any number of workers
makes the same pairs.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from ..files import list_images
from ..filters import gaussian_blur, sobel, to_gray
from ..geometry import pixel_grid, sample_at, warp_points

#: Seed of the split into training and validation photographs: fixed, so that no training ever sees
#: a held-out one.
SPLIT_SEED = 20190827
#: Smallest usable side of a photograph in pixels.
MIN_SIDE = 64
#: Times a window is drawn in one photograph, and photographs tried, before a pair is given up.
ATTEMPTS_PER_PHOTO = 10
PHOTOS_PER_PAIR = 40
#: Grey levels a pixel that the strongest 2 % of first and second derivatives must reach in both
#: windows.
TEXTURE_FIRST = 3.0
TEXTURE_SECOND = 1.0
#: Factors of the gray levels of a dark image.
DARK = (0.15, 0.5)
#: Random curves of gray levels: knots, part of them in the mixture with the identity, and
#: probability that a curve need not rise.
TONE_KNOTS, TONE_STRENGTH, TONE_FALLING = 6, 0.75, 0.125
#: Logarithms of the factors of a shadow or a highlight.
SHADOW = (-1.2, 0.7)
#: A second layer: its radius over the side of the window, and how far it moves beyond the
#: background in pixels.
LAYER_RADIUS = (0.1, 0.3)
LAYER_SHIFT = (8.0, 40.0)


@dataclass(frozen=True)
class PairSettings:
    """How pairs are drawn. Angles in degrees, lengths in pixels of the window, probabilities in
    [0,1].

    Attributes:
        size: side of the square windows.
        scale: range of the size of things in b over their size in a, drawn log-uniformly.
        rotation: largest rotation to either side; ``rotation_power`` > 1 makes small ones more
            frequent.
        skew: largest skew to either side; ``skew_power`` > 1 makes small ones more frequent.
        perspective: largest relative change of scale between window centre and edge.
        jitter: largest shift of the window centre of b.
        mirror: probability of a mirrored b (left-right and top-bottom drawn apart), and of a
            transposed one (half of it).
        colour: probability of each step of the colour distortion of b.
        gamma, tone, shadow, blur, dark, noise, jpeg: probability of these changes, drawn apart for
            a and b (``degrade``).
        noise_sigma: largest standard deviation of the noise in gray levels of 255; the smallest is
            1. ``noise_power`` > 1 makes small ones more frequent.
        jpeg_quality: lowest quality of the compression; the highest is 90.
        layers: probability that a second layer covers a part of both windows and moves on its own,
            as things nearer to the camera do.
        min_overlap: smallest part of each window that the other one must see.
        max_side: longer photographs are reduced to this side first; 0 keeps all as they are.
    """

    size: int = 192
    scale: tuple[float, float] = (0.5, 2.5)
    rotation: float = 60.0
    skew: float = 0.8
    skew_power: float = 1.0
    rotation_power: float = 1.0
    perspective: float = 0.0
    jitter: float = 0.0
    mirror: float = 0.0
    colour: float = 0.5
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


PRESETS: dict[str, PairSettings] = {
    # Key.Net paper, 5.1
    "keynet-paper": PairSettings(scale=(0.5, 3.5), rotation=60, skew=0.8, max_side=0),
    # what the TensorFlow code of Key.Net draws (spec 4.1)
    "keynet-code": PairSettings(scale=(0.5, 2.0), rotation=45, skew=0.8, max_side=0),
    # REKD's defaults: in-plane rotation alone
    "rekd": PairSettings(scale=(1.0, 1.0), rotation=180, skew=0.0, max_side=0),
    "default": PairSettings(
        scale=(0.5, 2.2),
        rotation=60,
        skew=0.8,
        skew_power=3.0,
        perspective=0.25,
        jitter=16,
        mirror=0.5,
        gamma=0.3,
        blur=0.2,
        noise=0.25,
        jpeg=0.25,
        min_overlap=0.2,
    ),
    # for detectors of real scenes: things at several depths, noise and compression of poor cameras
    "layers": PairSettings(
        scale=(0.5, 2.2),
        rotation=60,
        skew=0.8,
        skew_power=3.0,
        perspective=0.25,
        jitter=16,
        mirror=0.5,
        gamma=0.3,
        blur=0.3,
        dark=0.05,
        noise=0.25,
        noise_sigma=25.0,
        noise_power=3.0,
        jpeg=0.25,
        jpeg_quality=15,
        layers=0.3,
        min_overlap=0.2,
    ),
    # for oriented points: any turn, and not mirrored, because a mirrored corner has no turn
    "turns": PairSettings(
        scale=(0.6, 1.8),
        rotation=180,
        skew=0.6,
        skew_power=3.0,
        perspective=0.2,
        jitter=16,
        gamma=0.3,
        blur=0.2,
        noise=0.25,
        jpeg=0.25,
        min_overlap=0.25,
    ),
    # for dense descriptors, which nothing turns: any turn, small ones more often
    "dense": PairSettings(
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
    ),
    # for descriptors of upright patches: cameras are held about level, and a mirrored patch is
    # another patch
    "patches": PairSettings(
        size=256,
        scale=(0.55, 1.8),
        rotation=45,
        rotation_power=1.5,
        skew=0.7,
        skew_power=2.0,
        perspective=0.25,
        jitter=16,
        gamma=0.3,
        blur=0.25,
        noise=0.3,
        jpeg=0.3,
        min_overlap=0.25,
    ),
    "dense-upright": PairSettings(
        size=320,
        scale=(0.5, 2.0),
        rotation=40,
        rotation_power=2,
        skew=0.8,
        skew_power=2.0,
        perspective=0.3,
        jitter=16,
        gamma=0.3,
        tone=0.25,
        shadow=0.25,
        blur=0.25,
        dark=0.08,
        noise=0.3,
        noise_sigma=20.0,
        noise_power=3.0,
        jpeg=0.3,
        jpeg_quality=15,
        layers=0.3,
        min_overlap=0.25,
    ),
    # the same for pairs whose rotation is found before they are described; light, noise and things
    # in front as real photographs have them
    "patches-upright": PairSettings(
        size=256,
        scale=(0.5, 2.0),
        rotation=25,
        rotation_power=1.5,
        skew=0.8,
        skew_power=2.0,
        perspective=0.3,
        jitter=16,
        gamma=0.3,
        tone=0.25,
        shadow=0.25,
        blur=0.25,
        dark=0.08,
        noise=0.3,
        noise_sigma=20.0,
        noise_power=3.0,
        jpeg=0.3,
        jpeg_quality=15,
        layers=0.3,
        min_overlap=0.25,
    ),
}


@dataclass(frozen=True)
class Pair:
    """Two windows of one photograph.

    Attributes:
        image_a, image_b: (S,S) uint8 gray.
        H_ab: (3,3) float64, pixels of a to pixels of b.
        mask_a, mask_b: (S,S) bool, pixels whose place the photograph and the other window both
            show.
        source: path of the photograph.
    """

    image_a: np.ndarray
    image_b: np.ndarray
    H_ab: np.ndarray
    mask_a: np.ndarray
    mask_b: np.ndarray
    source: str = ""


def list_photos(folder: str | Path) -> list[Path]:
    """Image files under ``folder`` and below by name; hidden ones left out.

    Raises:
        FileNotFoundError: no such folder.
    """
    return list_images(Path(folder))[0]


def usable_photos(paths: Sequence[Path], min_side: int = MIN_SIDE) -> tuple[list[Path], list[str]]:
    """Photographs whose header can be read and that are large enough, and one line for every other
    one, saying why.
    """
    good, refused = [], []
    for path in paths:
        try:
            with Image.open(path) as photo:
                width, height = photo.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            refused.append(f"{path}: cannot be read ({error})")
            continue
        if min(width, height) < min_side:
            refused.append(
                f"{path}: {width} x {height} pixels, at least {min_side} needed on the shorter side"
            )
        else:
            good.append(path)
    return good, refused


def split_photos(paths: Sequence[Path], held_out: float = 0.1) -> tuple[list[Path], list[Path]]:
    """Training and validation photographs, disjoint; the same split for the same list, whatever the
    training seed.

    Raises:
        DataError: fewer than two photographs.
    """
    if len(paths) < 2:
        raise DataError(
            f"{len(paths)} usable image(s); training needs at least two, one of them to validate "
            "on. "
            "Give a folder with more photographs (a hundred or more for good weights)."
        )
    ordered = sorted(paths)
    count = min(max(1, round(held_out * len(ordered))), len(ordered) - 1)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(ordered))
    chosen = set(order[:count].tolist())
    training = [p for i, p in enumerate(ordered) if i not in chosen]
    return training, [p for i, p in enumerate(ordered) if i in chosen]


def read_photo(path: Path, max_side: int = 0) -> np.ndarray:
    """A photograph as (H,W,3) uint8 RGB, reduced to ``max_side`` if that is not 0.

    Raises:
        DataError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as photo:
            if max_side:
                photo.draft("RGB", (max_side, max_side))  # lets the JPEG decoder skip detail
            rgb = _as_eight_bit(photo).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if max_side and max(rgb.size) > max_side:
        rgb.thumbnail((max_side, max_side), Image.Resampling.BOX)
    return np.asarray(rgb)


def _as_eight_bit(photo: Image.Image) -> Image.Image:
    """Sixteen-bit and float images, as thermal and medical cameras write them, brought to the 8-bit
    range by their type.
    """
    if photo.mode.startswith("I;16") or photo.mode in ("I", "F"):
        values = np.asarray(photo, dtype=np.float32)
        top = 1.0 if photo.mode == "F" else 65535.0
        return Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8))
    return photo


def distort_colour(
    rgb: np.ndarray, rng: np.random.Generator, probability: float = 0.5
) -> np.ndarray:
    """Random brightness, contrast, saturation, hue and channel order of an (H,W,3) uint8 image
    (spec 4.3, mended).
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
    """Random light, blur, noise and JPEG artefacts of an (H,W) uint8 image, as weather and real
    cameras add them.

    In this order: gamma, tone (``tone_curve``), shadow (``cast_shadow``), blur, dark, noise, JPEG.
    """
    if rng.random() < settings.gamma:
        curve = 255 * np.linspace(0, 1, 256) ** rng.uniform(0.6, 1.6)
        gray = curve.round().astype(np.uint8)[gray]
    # nothing is drawn for changes that a preset does not have: the pairs of older presets stay what
    # they were
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
    """A random curve of gray levels, (256,) uint8: often steep, and one in eight rises and falls,
    as between sensors of other bands.
    """
    knots = np.linspace(0, 255, TONE_KNOTS)
    values = rng.uniform(0, 255, TONE_KNOTS)
    if rng.random() >= TONE_FALLING:
        values = np.sort(values)
    values = TONE_STRENGTH * values + (1 - TONE_STRENGTH) * knots
    return np.interp(np.arange(256), knots, values).round().clip(0, 255).astype(np.uint8)


def cast_shadow(gray: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One side of a random line darkened, or lit until it saturates, with a sharp or soft edge:
    (H,W) uint8 -> (H,W) uint8.
    """
    h, w = gray.shape
    angle, softness = (
        rng.uniform(0, 2 * math.pi),
        math.exp(rng.uniform(math.log(0.5), math.log(0.2 * max(h, w)))),
    )
    y, x = np.mgrid[:h, :w]
    at = rng.uniform(0.2, 0.8, 2) * (w, h)
    distance = (x - at[0]) * math.cos(angle) + (y - at[1]) * math.sin(angle)
    inside = 0.5 * (1 + np.tanh(distance / softness))
    factor = math.exp(rng.uniform(*SHADOW))
    return (gray * (1 + (factor - 1) * inside)).round().clip(0, 255).astype(np.uint8)


def draw_transform(rng: np.random.Generator, settings: PairSettings) -> np.ndarray:
    """Content transform from a to b about the window centres (at the origin): (3,3) float64."""
    low, high = settings.scale
    scale = math.exp(rng.uniform(math.log(low), math.log(high)))
    turn = rng.uniform(-1, 1)
    angle = math.radians(
        settings.rotation * math.copysign(abs(turn) ** settings.rotation_power, turn)
    )
    skew = rng.uniform(-1, 1)
    skew = settings.skew * math.copysign(abs(skew) ** settings.skew_power, skew)
    rotate = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = np.eye(3)
    matrix[:2, :2] = np.array([[1, skew], [0, 1]]) @ (scale * rotate)
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


def _translation(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def _has_texture(gray: np.ndarray) -> bool:
    """Whether first and second derivatives in both directions reach a few grey levels somewhere in
    the window.
    """
    image = torch.from_numpy(gray.astype(np.float32))[None, None]
    dx, dy = sobel(image)
    dxx, dxy = sobel(dx)
    dyy = sobel(dy)[1]

    def strong(channel: Tensor) -> float:
        values = channel[..., ::2, ::2].abs().flatten()
        return float(values.kthvalue(int(0.98 * values.numel())).values)

    first = all(strong(c) >= TEXTURE_FIRST for c in (dx, dy))
    return first and all(strong(c) >= TEXTURE_SECOND for c in (dxx, dxy, dyy))


def make_pair(photo: np.ndarray, rng: np.random.Generator, settings: PairSettings) -> Pair | None:
    """Draw one pair from a photograph (H,W,3) uint8; ``None`` where ten windows in a row were
    refused.

    A window is refused when it has too little texture (paper 5.1) or when the views share too
    little.
    """
    size = settings.size
    height, width = photo.shape[:2]
    centre = (size - 1) / 2
    for _ in range(ATTEMPTS_PER_PHOTO):
        # window a: as much inside the photograph as it can be
        place = [
            rng.uniform(min(centre, (n - 1) / 2), max(n - 1 - centre, (n - 1) / 2))
            for n in (width, height)
        ]
        corner = np.round(np.array(place) - centre)
        a_to_photo = _translation(corner[0], corner[1])
        transform = draw_transform(rng, settings)
        shift = (
            rng.uniform(-settings.jitter, settings.jitter, 2) if settings.jitter else np.zeros(2)
        )
        H_ab = (
            _translation(centre + shift[0], centre + shift[1])
            @ transform
            @ _translation(-centre, -centre)
        )
        H_ab = H_ab / H_ab[2, 2]
        b_to_photo = a_to_photo @ np.linalg.inv(H_ab)
        shrink = 1 / math.sqrt(abs(np.linalg.det(transform[:2, :2])))
        if not _in_front(H_ab, size):
            continue
        gray_a, covered_a = _window(photo, a_to_photo, size, 1.0)
        if not _has_texture(gray_a):
            continue
        gray_b, covered_b = _window(photo, b_to_photo, size, shrink, rng, settings.colour)
        if not _has_texture(gray_b):
            continue
        if settings.layers and rng.random() < settings.layers:
            layer = draw_layer(photo, rng, H_ab, shrink, settings)
            gray_a, covered_a = _cover(gray_a, covered_a, *layer[0])
            gray_b, covered_b = _cover(gray_b, covered_b, *layer[1])
        mask_a = covered_a & _seen_by_other(H_ab, covered_b)
        mask_b = covered_b & _seen_by_other(np.linalg.inv(H_ab), covered_a)
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
    """A second layer in both windows: another part of the photograph behind an ellipse that moves
    by a shift of its own.

    Returns:
        for a and for b its gray values (S,S) uint8 and its opacity (S,S) float in [0,1].
    """
    size = settings.size
    height, width = photo.shape[:2]
    corner = [rng.uniform(min(0, n - size), max(0, n - size)) for n in (width, height)]
    direction = rng.uniform(0, 2 * math.pi)
    distance = rng.uniform(*LAYER_SHIFT)
    H_layer = _translation(distance * math.cos(direction), distance * math.sin(direction)) @ H_ab
    centre = rng.uniform(0.15 * size, 0.85 * size, 2)
    radii = rng.uniform(*LAYER_RADIUS, 2) * size
    angle = rng.uniform(0, math.pi)
    axes = (
        np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        / radii[:, None]
    )
    to_photo = _translation(*corner)
    grid = pixel_grid(size, size, torch.empty(0, dtype=torch.float64))
    sides = []
    for H, factor, colour in ((np.eye(3), 1.0, None), (H_layer, shrink, rng)):
        gray, _ = _window(photo, to_photo @ np.linalg.inv(H), size, factor, colour, settings.colour)
        in_a = warp_points(grid, torch.from_numpy(np.linalg.inv(H))).numpy()
        outside = np.linalg.norm((in_a - centre) @ axes.T, axis=1)
        # one pixel of the window wide: a rim without steps
        opacity = ((1 - outside) * radii.min() / max(factor, 1e-6) + 0.5).clip(0, 1)
        sides.append((gray, np.nan_to_num(opacity).reshape(size, size)))
    return sides


def _cover(
    gray: np.ndarray, covered: np.ndarray, layer: np.ndarray, opacity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A window with a layer over it, and which of its pixels still show the background."""
    mixed = gray * (1 - opacity) + layer * opacity
    return mixed.round().clip(0, 255).astype(np.uint8), covered & (opacity == 0)


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
    colour: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Resample a gray window (S,S) uint8 from a photograph (H,W,3), and which of its pixels the
    photograph covers.

    Outside the photograph its reflection stands. Colours are distorted where ``rng`` is given.
    """
    h, w = photo.shape[:2]
    grid = pixel_grid(size, size, torch.empty(0, dtype=torch.float64))
    xy = warp_points(grid, torch.from_numpy(to_photo))
    covered = (xy[:, 0] >= 0) & (xy[:, 0] <= w - 1) & (xy[:, 1] >= 0) & (xy[:, 1] <= h - 1)
    # Work on the part of the photograph that the window reaches, with room for the low-pass and the
    # reflection.
    margin = math.ceil(4 * shrink) + 2
    low = (xy.amin(dim=0).floor() - margin).clamp(min=0).nan_to_num(0)
    high = xy.amax(dim=0).ceil() + margin
    reach = high - low if bool(covered.all()) else torch.tensor([float(w), float(h)])
    left, top = (0, 0) if not bool(covered.all()) else (int(low[0]), int(low[1]))
    part = photo[top : top + int(reach[1]) + 1, left : left + int(reach[0]) + 1]
    if rng is not None and colour:
        part = distort_colour(part, rng, colour)
    image = to_gray(torch.from_numpy(part.astype(np.float32)).permute(2, 0, 1)[None])
    if shrink > 1:  # low-pass to what the window can show
        image = gaussian_blur(image, 0.5 * math.sqrt(shrink**2 - 1))
    values = sample_at(image, (xy - xy.new_tensor([left, top]))[None].float(), padding="reflection")
    gray = values.reshape(size, size).round().clamp(0, 255).numpy().astype(np.uint8)
    return gray, covered.reshape(size, size).numpy()


def _seen_by_other(H: np.ndarray, covered_other: np.ndarray) -> np.ndarray:
    """Pixels of a window whose place the other window shows with real content: (S,S) bool."""
    size = len(covered_other)
    grid = pixel_grid(size, size, torch.empty(0, dtype=torch.float64))
    xy = warp_points(grid, torch.from_numpy(H)).round().nan_to_num(-1, -1, -1)
    inside = ((xy >= 0) & (xy <= size - 1)).all(dim=-1)
    index = xy.clamp(0, size - 1).long()
    seen = inside & torch.from_numpy(covered_other)[index[:, 1], index[:, 0]]
    return seen.reshape(size, size).numpy()


class PairDataset(Dataset):
    """Pairs made on the fly from photographs: index -> dict of tensors.

    Items: ``image_a, image_b`` (1,S,S) float32 in [0,1], ``H_ab`` (3,3) float64, ``mask_a, mask_b``
    (1,S,S) float32.

    Args:
        photos: image files.
        settings: how pairs are drawn.
        seed: pair ``i`` depends on ``seed``, ``i`` and ``photos`` alone.
        length: number of pairs.
        cache_bytes: how much memory decoded photographs may take.
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
            raise DataError("no photographs to make pairs from")
        self.photos, self.settings, self.seed, self.length = list(photos), settings, seed, length
        self._cache: dict[int, np.ndarray | None] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return self.length

    def _photo(self, index: int) -> np.ndarray | None:
        if index not in self._cache:
            try:
                photo = read_photo(self.photos[index], self.settings.max_side)
            except DataError:
                photo = (
                    None  # a damaged body behind a good header: other photographs take its place
                )
            if photo is not None and photo.nbytes > self._room:
                return photo
            self._room -= 0 if photo is None else photo.nbytes
            self._cache[index] = photo
        return self._cache[index]

    def pair(self, index: int) -> Pair:
        """Pair number ``index``.

        Raises:
            DataError: no photograph gave a window with texture.
        """
        rng = np.random.default_rng([self.seed, index])
        turn, place = divmod(index, len(self.photos))
        order = np.random.default_rng([self.seed, turn, 1]).permutation(len(self.photos))
        candidates = [
            int(order[place]),
            *rng.integers(0, len(self.photos), PHOTOS_PER_PAIR - 1).tolist(),
        ]
        for candidate in candidates:
            photo = self._photo(candidate)
            pair = None if photo is None else make_pair(photo, rng, self.settings)
            if pair is not None:
                return dataclasses.replace(pair, source=str(self.photos[candidate]))
        raise DataError(
            f"none of {PHOTOS_PER_PAIR} photographs gave a window of {self.settings.size} px with "
            "texture in both "
            "views; the images are too small, too smooth or unreadable"
        )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"pair {index} of {self.length}")
        return as_tensors(self.pair(index))


def as_tensors(pair: Pair) -> dict[str, Tensor]:
    """A pair as training wants it: see ``PairDataset``."""
    return {
        "image_a": torch.from_numpy(pair.image_a).float()[None] / 255,
        "image_b": torch.from_numpy(pair.image_b).float()[None] / 255,
        "H_ab": torch.from_numpy(np.ascontiguousarray(pair.H_ab)),
        "mask_a": torch.from_numpy(pair.mask_a).float()[None],
        "mask_b": torch.from_numpy(pair.mask_b).float()[None],
    }
