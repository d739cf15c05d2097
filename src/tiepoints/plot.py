"""Visualization of keypoints, matches and tracks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import require
from .image import ImageLike, to_rgb
from .structs import Features, Keypoints

Color = tuple[int, int, int]
#: Okabe and Ito's color-blind safe palette, ordered by hue.
HUES: tuple[Color, ...] = (
    (86, 180, 233),
    (0, 190, 140),
    (240, 228, 66),
    (245, 170, 20),
    (230, 110, 30),
    (214, 130, 180),
)
#: Keypoints; correct and incorrect matches if the ground truth is known; outliers; caption text.
KEYPOINT: Color = (240, 228, 66)
CORRECT: Color = (90, 190, 255)
INCORRECT: Color = (255, 140, 30)
OUTLIER: Color = (150, 150, 150)
CAPTION: Color = (30, 30, 30)
#: Lines are drawn at this multiple of the size and reduced, for anti-aliasing.
OVERSAMPLE = 2
GAP, CAPTION_HEIGHT = 8, 26
#: Age in frames from which on a track has the last color; the color is linear in the logarithm of
#: the age.
MAX_AGE = 64


def hue_at(fraction: float) -> Color:
    """The color at ``fraction`` in [0,1] of the palette, interpolated."""
    position = min(max(fraction, 0.0), 1.0) * (len(HUES) - 1)
    red, green, blue = (
        round(float(np.interp(position, range(len(HUES)), [hue[c] for hue in HUES])))
        for c in range(3)
    )
    return red, green, blue


class _Canvas:
    """Images side by side, enlarged for anti-aliased lines."""

    def __init__(self, images: Sequence[ImageLike], width: int | None, brightness: float):
        rgb = [to_rgb(image) for image in images]
        self.factors = [1.0 if width is None else min(1.0, width / image.width) for image in rgb]
        sizes = [
            (max(1, round(image.width * f)), max(1, round(image.height * f)))
            for image, f in zip(rgb, self.factors, strict=True)
        ]
        self.lefts = [sum(w + GAP for w, _ in sizes[:i]) for i in range(len(sizes))]
        self.size = (self.lefts[-1] + sizes[-1][0], max(h for _, h in sizes))
        s = OVERSAMPLE
        self.image = Image.new("RGB", (self.size[0] * s, self.size[1] * s), (255, 255, 255))
        for image, (w, h), left in zip(rgb, sizes, self.lefts, strict=True):
            reduce = image.width > w * s
            resampling = Image.Resampling.BOX if reduce else Image.Resampling.BILINEAR
            enlarged = image.resize((w * s, h * s), resampling)
            if brightness < 1:  # lines are better visible on darker images
                enlarged = enlarged.point(lambda value: round(value * brightness))
            self.image.paste(enlarged, (left * s, 0))
        self.draw = ImageDraw.Draw(self.image)

    def positions(self, xy: Tensor, index: int = 0) -> list[tuple[float, float]]:
        """Points (N,2) of image ``index`` in pixels of the canvas."""
        scaled = (xy.double().cpu() + 0.5) * self.factors[index]
        scaled[:, 0] += self.lefts[index]
        return [(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in scaled.tolist()]

    def circle(
        self, center: tuple[float, float], radius: float, color: Color, *, fill: bool
    ) -> None:
        """Draw a circle of ``radius`` pixels of the result."""
        r = radius * OVERSAMPLE
        box = [center[0] - r, center[1] - r, center[0] + r, center[1] + r]
        if fill:
            self.draw.ellipse(box, fill=color)
        else:
            self.draw.ellipse(box, outline=color, width=OVERSAMPLE)

    def line(
        self, start: tuple[float, float], end: tuple[float, float], color: Color, width: float = 1.0
    ) -> None:
        """Draw a line of ``width`` pixels of the result."""
        self.draw.line([*start, *end], fill=color, width=max(1, round(width * OVERSAMPLE)))

    def finish(self, caption: str, path: str | Path | None) -> Image.Image:
        """The result below its caption; written to ``path`` if given."""
        out = self.image.resize(self.size, Image.Resampling.BOX)
        if caption:
            taller = Image.new("RGB", (out.width, out.height + CAPTION_HEIGHT), (255, 255, 255))
            taller.paste(out, (0, CAPTION_HEIGHT))
            font = ImageFont.load_default(15)
            ImageDraw.Draw(taller).text((6, 5), caption, fill=CAPTION, font=font)
            out = taller
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            out.save(path)
        return out


def _subsample(index: Tensor, count: int) -> list[int]:
    """At most ``count`` of the indices (N,), evenly spaced in the list."""
    if len(index) > count:
        index = index[torch.linspace(0, len(index) - 1, count).long()]
    return index.tolist()


# The options are independent settings of one drawing, so they are flat keywords.
def draw_matches(
    image_a: ImageLike,
    image_b: ImageLike,
    xy_a: Tensor,
    xy_b: Tensor,
    inliers: Tensor | None = None,
    *,
    correct: Tensor | None = None,
    outliers: bool = False,
    max_lines: int = 300,
    width: int | None = None,
    caption: str | None = None,
    path: str | Path | None = None,
) -> Image.Image:
    """Draw both images side by side, in color, with lines between matched keypoints.

    The hue of a line depends on its x coordinate in the first image, which keeps many lines
    readable.

    Args:
        image_a, image_b: anything that ``Extractor.extract`` takes.
        xy_a, xy_b: (K,2) positions in pixels.
        inliers: (K,) bool: only these are drawn as lines.
        correct: (K,) bool, if the ground truth is known: correct matches are blue, incorrect ones
            orange and thinner.
        outliers: draw the keypoints of the other matches as gray dots.
        max_lines: maximum number of lines (of each color with ``correct``), evenly spaced in the
            list of matches.
        width: maximum width of each image in pixels; None = its own.
        caption: line above the images; None = the number of matches, ``""`` = none.
        path: file to write.

    Raises:
        ValueError: positions that are not finite, or arguments of other lengths.
    """
    xy_a, xy_b = (torch.as_tensor(xy).reshape(-1, 2) for xy in (xy_a, xy_b))
    inliers, correct = (
        None if selected is None else torch.as_tensor(selected).bool().cpu()
        for selected in (inliers, correct)
    )
    lengths = [len(given) for given in (xy_a, xy_b, inliers, correct) if given is not None]
    if len(set(lengths)) > 1:
        raise ValueError(f"positions and their selections must be as many; got {lengths}")
    if not (xy_a.isfinite().all() and xy_b.isfinite().all()):
        raise ValueError("positions must be finite")
    canvas = _Canvas([image_a, image_b], width, brightness=0.75)
    starts, ends = canvas.positions(xy_a, 0), canvas.positions(xy_b, 1)
    count = len(starts)
    if correct is not None:
        for color, selected, thickness in ((INCORRECT, ~correct, 1.0), (CORRECT, correct, 1.5)):
            for i in _subsample(selected.nonzero()[:, 0], max_lines):
                canvas.line(starts[i], ends[i], color, thickness)
                for point in (starts[i], ends[i]):
                    canvas.circle(point, 2, color, fill=False)
        text = f"{count} matches, {int(correct.sum())} correct (blue)"
    else:
        kept = torch.ones(count, dtype=torch.bool) if inliers is None else inliers
        if outliers:
            for i in (~kept).nonzero()[:, 0].tolist():
                for point in (starts[i], ends[i]):
                    canvas.circle(point, 1, OUTLIER, fill=True)
        lines = _subsample(kept.nonzero()[:, 0], max_lines)
        low = min((starts[i][0] for i in lines), default=0.0)
        span = max((starts[i][0] for i in lines), default=1.0) - low
        for i in lines:
            hue = hue_at((starts[i][0] - low) / max(span, 1.0))
            canvas.line(starts[i], ends[i], hue)
            for point in (starts[i], ends[i]):
                canvas.circle(point, 2, hue, fill=True)
        matches = f"{count} matches"
        text = matches if inliers is None else f"{int(kept.sum())} inliers of {matches}"
    return canvas.finish(text if caption is None else caption, path)


def draw_keypoints(
    image: ImageLike,
    keypoints: Features | Keypoints | Tensor,
    *,
    repeated: Tensor | None = None,
    radius: float = 5.0,
    width: int | None = None,
    path: str | Path | None = None,
) -> Image.Image:
    """Draw the image in color with a circle of ``radius * scale`` pixels around every keypoint.

    Args:
        image: anything that ``Extractor.extract`` takes.
        keypoints: features, keypoints, or positions (N,2).
        repeated: (N,) bool: repeated keypoints are drawn as blue discs, the others as orange
            crosses.
        width: maximum width in pixels; None = the image's.
        path: file to write.
    """
    canvas = _Canvas([image], width, brightness=1.0 if repeated is None else 0.7)
    xy = keypoints if isinstance(keypoints, Tensor) else keypoints.xy
    positions = canvas.positions(xy)
    if repeated is not None:
        flags = repeated.tolist()
        r = 3 * OVERSAMPLE
        for (x, y), is_repeated in zip(positions, flags, strict=True):
            if not is_repeated:
                canvas.line((x - r, y - r), (x + r, y + r), INCORRECT, 1.5)
                canvas.line((x - r, y + r), (x + r, y - r), INCORRECT, 1.5)
        for center, is_repeated in zip(positions, flags, strict=True):
            if is_repeated:
                canvas.circle(center, 2.5, CORRECT, fill=True)
        return canvas.finish("", path)
    scales = [1.0] * len(xy) if isinstance(keypoints, Tensor) else keypoints.scale.tolist()
    for center, scale in zip(positions, scales, strict=True):
        canvas.circle(center, radius * scale * canvas.factors[0], KEYPOINT, fill=False)
    return canvas.finish("", path)


# ---- tracks on video frames, drawn by OpenCV, which is fast enough for live video


class DrawnTrack(Protocol):
    """The attributes of a ``tracking.Track`` that ``draw_tracks`` uses."""

    xy: Any
    length: int

    @property
    def age(self) -> int: ...


#: BGR: keypoints without a track, text and background of the caption.
SINGLE, TEXT, BACKGROUND = (215, 215, 215), (255, 255, 255), (32, 32, 32)


def _cv2() -> Any:
    return require("cv2", extra="opencv", purpose="video")


def draw_tracks(frame: NDArray[np.uint8], tracks: Sequence[DrawnTrack]) -> NDArray[np.uint8]:
    """Draw the tracks of keypoints on a copy of a frame (H,W,3) BGR: tails colored by age, small
    dots for keypoints without a track.

    Raises:
        ImportError: OpenCV is missing.
    """
    cv2 = _cv2()
    out = np.ascontiguousarray(frame).copy()
    unit = max(1, round(math.hypot(*out.shape[:2]) / 800))
    for track in sorted(tracks, key=lambda t: t.age):  # the oldest on top
        # OpenCV's fixed-point coordinates with four fractional bits
        line = np.round(np.array(track.xy) * 16).astype(np.int32)
        color, head = age_color(track.age), tuple(line[-1].tolist())
        if track.length == 1:
            cv2.circle(out, head, 16 * unit, SINGLE, -1, cv2.LINE_AA, 4)
            continue
        cv2.polylines(out, [line[:, None]], False, color, unit, cv2.LINE_AA, 4)
        cv2.circle(out, head, 56 * unit, BACKGROUND, -1, cv2.LINE_AA, 4)  # an outline for contrast
        cv2.circle(out, head, 44 * unit, color, -1, cv2.LINE_AA, 4)
    return out


@lru_cache(maxsize=256)
def age_color(age: int) -> tuple[int, int, int]:
    """BGR color of a track: blue if new, through green and yellow to red at ``MAX_AGE`` frames."""
    fraction = min(1.0, math.log(max(age, 1)) / math.log(MAX_AGE))
    stops = np.array(
        [[255, 110, 40], [230, 220, 0], [70, 230, 60], [0, 220, 255], [40, 40, 255]],
        dtype=np.float64,
    )
    position = fraction * (len(stops) - 1)
    blue, green, red = (np.interp(position, np.arange(len(stops)), stops[:, c]) for c in range(3))
    return round(float(blue)), round(float(green)), round(float(red))


def draw_caption(frame: NDArray[np.uint8], text: str) -> None:
    """Draw a line of text in the upper left corner of a frame (H,W,3), with the color scale of ages
    below it.
    """
    cv2 = _cv2()
    scale = max(0.35, math.hypot(*frame.shape[:2]) / 1600)
    (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    gap, bar = round(12 * scale), max(2, round(8 * scale))
    cv2.rectangle(frame, (0, 0), (width + 2 * gap, height + base + bar + 2 * gap), BACKGROUND, -1)
    cv2.putText(
        frame, text, (gap, gap + height), cv2.FONT_HERSHEY_SIMPLEX, scale, TEXT, 1, cv2.LINE_AA
    )
    top = gap + height + base
    for x in range(width):
        color = age_color(round(MAX_AGE ** (x / max(1, width - 1))))
        cv2.line(frame, (gap + x, top), (gap + x, top + bar), color, 1)
