"""Pictures of keypoints, matches and tracks: the only painter of the package."""

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
#: Okabe and Ito's palette, which colour-blind people tell apart, in an order of hues.
HUES: tuple[Color, ...] = (
    (86, 180, 233),
    (0, 190, 140),
    (240, 228, 66),
    (245, 170, 20),
    (230, 110, 30),
    (214, 130, 180),
)
#: Keypoints; correct and wrong where the ground truth is known; outliers; ground of captions.
KEYPOINT: Color = (240, 228, 66)
CORRECT: Color = (90, 190, 255)
WRONG: Color = (255, 140, 30)
OUTLIER: Color = (150, 150, 150)
INK: Color = (30, 30, 30)
#: Lines are drawn at twice the size and reduced, which smooths them.
OVERSAMPLE = 2
GAP, CAPTION_HEIGHT = 8, 26
#: Age, in frames, of a track that is drawn in the last colour; ages in between are spread by their
#: logarithm.
OLD = 64


def hue_at(part: float) -> Color:
    """The colour at ``part`` in [0,1] of the palette, interpolated."""
    at = min(max(part, 0.0), 1.0) * (len(HUES) - 1)
    red, green, blue = (
        round(float(np.interp(at, range(len(HUES)), [hue[c] for hue in HUES]))) for c in range(3)
    )
    return red, green, blue


class _Canvas:
    """Images side by side, enlarged for smooth lines."""

    def __init__(self, images: Sequence[ImageLike], width: int | None, dim: float):
        pictures = [to_rgb(image) for image in images]
        self.factors = [
            1.0 if width is None else min(1.0, width / picture.width) for picture in pictures
        ]
        sizes = [
            (max(1, round(p.width * f)), max(1, round(p.height * f)))
            for p, f in zip(pictures, self.factors, strict=True)
        ]
        self.lefts = [sum(w + GAP for w, _ in sizes[:i]) for i in range(len(sizes))]
        self.size = (self.lefts[-1] + sizes[-1][0], max(h for _, h in sizes))
        s = OVERSAMPLE
        self.picture = Image.new("RGB", (self.size[0] * s, self.size[1] * s), (255, 255, 255))
        for picture, (w, h), left in zip(pictures, sizes, self.lefts, strict=True):
            reduce = picture.width > w * s
            filtering = Image.Resampling.BOX if reduce else Image.Resampling.BILINEAR
            enlarged = picture.resize((w * s, h * s), filtering)
            if dim < 1:  # lines stand out on darker images
                enlarged = enlarged.point(lambda value: round(value * dim))
            self.picture.paste(enlarged, (left * s, 0))
        self.draw = ImageDraw.Draw(self.picture)

    def positions(self, xy: Tensor, index: int = 0) -> list[tuple[float, float]]:
        """Points (N,2) of image ``index`` in pixels of the canvas."""
        at = (xy.double().cpu() + 0.5) * self.factors[index]
        at[:, 0] += self.lefts[index]
        return [(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in at.tolist()]

    def circle(self, at: tuple[float, float], radius: float, color: Color, *, fill: bool) -> None:
        """A circle of ``radius`` pixels of the picture."""
        r = radius * OVERSAMPLE
        box = [at[0] - r, at[1] - r, at[0] + r, at[1] + r]
        if fill:
            self.draw.ellipse(box, fill=color)
        else:
            self.draw.ellipse(box, outline=color, width=OVERSAMPLE)

    def line(
        self, start: tuple[float, float], end: tuple[float, float], color: Color, width: float = 1.0
    ) -> None:
        """A line of ``width`` pixels of the picture."""
        self.draw.line([*start, *end], fill=color, width=max(1, round(width * OVERSAMPLE)))

    def finish(self, caption: str, path: str | Path | None) -> Image.Image:
        """The picture at its size, below its caption; written to ``path`` where one is given."""
        out = self.picture.resize(self.size, Image.Resampling.BOX)
        if caption:
            taller = Image.new("RGB", (out.width, out.height + CAPTION_HEIGHT), (255, 255, 255))
            taller.paste(out, (0, CAPTION_HEIGHT))
            font = ImageFont.load_default(15)
            ImageDraw.Draw(taller).text((6, 5), caption, fill=INK, font=font)
            out = taller
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            out.save(path)
        return out


def _spread(chosen: Tensor, count: int) -> list[int]:
    """At most ``count`` of the indices, spread evenly over the list."""
    if len(chosen) > count:
        chosen = chosen[torch.linspace(0, len(chosen) - 1, count).long()]
    return chosen.tolist()


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
    """Both images side by side, in colour, with lines between matched points.

    The hue of a line follows the position of its point in the first image from left to right, so
    that many lines stay readable.

    Args:
        image_a, image_b: anything that ``Extractor.extract`` takes.
        xy_a, xy_b: (K,2) positions in pixels.
        inliers: (K,) bool: only these are drawn as lines.
        correct: (K,) bool, where the ground truth is known: correct matches blue, others orange
            and thinner.
        outliers: show the ends of the other matches as faint dots.
        max_lines: maximum number of lines (of each colour), spread evenly over the list.
        width: maximum width of each image in the picture; None = its own.
        caption: line above the images; None = the numbers of matches, ``""`` = none.
        path: file to write.
    """
    canvas = _Canvas([image_a, image_b], width, dim=0.75)
    starts, ends = canvas.positions(xy_a, 0), canvas.positions(xy_b, 1)
    count = len(starts)
    everything = torch.ones(count, dtype=torch.bool)
    if correct is not None:
        correct = correct.cpu()
        for color, chosen, thickness in ((WRONG, ~correct, 1.0), (CORRECT, correct, 1.5)):
            for i in _spread(chosen.nonzero()[:, 0], max_lines):
                canvas.line(starts[i], ends[i], color, thickness)
                for at in (starts[i], ends[i]):
                    canvas.circle(at, 2, color, fill=False)
        text = f"{count} matches, {int(correct.sum())} correct (blue)"
    else:
        kept = everything if inliers is None else inliers.cpu()
        if outliers:
            for i in (~kept).nonzero()[:, 0].tolist():
                for at in (starts[i], ends[i]):
                    canvas.circle(at, 1, OUTLIER, fill=True)
        lines = _spread(kept.nonzero()[:, 0], max_lines)
        low = min((starts[i][0] for i in lines), default=0.0)
        span = max((starts[i][0] for i in lines), default=1.0) - low
        for i in lines:
            part = (starts[i][0] - low) / max(span, 1.0)
            canvas.line(starts[i], ends[i], hue_at(part))
            for at in (starts[i], ends[i]):
                canvas.circle(at, 2, hue_at(part), fill=True)
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
    """The image in colour with a circle of ``radius * scale`` pixels around every keypoint.

    Args:
        image: anything that ``Extractor.extract`` takes.
        keypoints: features, keypoints, or positions (N,2).
        repeated: (N,) bool, which are found again: blue discs; the others become orange crosses.
        width: maximum width of the picture; None = the image's.
        path: file to write.
    """
    canvas = _Canvas([image], width, dim=1.0 if repeated is None else 0.7)
    xy = keypoints if isinstance(keypoints, Tensor) else keypoints.xy
    positions = canvas.positions(xy)
    if repeated is not None:
        found = repeated.tolist()
        r = 3 * OVERSAMPLE
        for (x, y), again in zip(positions, found, strict=True):
            if not again:
                canvas.line((x - r, y - r), (x + r, y + r), WRONG, 1.5)
                canvas.line((x - r, y + r), (x + r, y - r), WRONG, 1.5)
        for at, again in zip(positions, found, strict=True):
            if again:
                canvas.circle(at, 2.5, CORRECT, fill=True)
        return canvas.finish("", path)
    scales = [1.0] * len(xy) if isinstance(keypoints, Tensor) else keypoints.scale.tolist()
    for at, scale in zip(positions, scales, strict=True):
        canvas.circle(at, radius * scale * canvas.factors[0], KEYPOINT, fill=False)
    return canvas.finish("", path)


# ---- tracks on video frames, by OpenCV: fast enough for every frame


class DrawnTrack(Protocol):
    """What ``draw_tracks`` reads of a ``tracking.Track``."""

    xy: Any
    length: int

    @property
    def age(self) -> int: ...


#: BGR: keypoints without a track, text and ground of the caption.
SINGLE, TEXT, GROUND = (215, 215, 215), (255, 255, 255), (32, 32, 32)


def _cv2() -> Any:
    return require("cv2", extra="opencv", purpose="video")


def draw_tracks(frame: NDArray[np.uint8], tracks: Sequence[DrawnTrack]) -> NDArray[np.uint8]:
    """A copy of a frame (H,W,3) BGR with the tracks of its keypoints: tails coloured by age,
    keypoints without a track small.

    Raises:
        ImportError: OpenCV is missing.
    """
    cv2 = _cv2()
    out = np.ascontiguousarray(frame).copy()
    unit = max(1, round(math.hypot(*out.shape[:2]) / 800))
    for track in sorted(tracks, key=lambda t: t.age):  # the oldest on top
        # OpenCV's fixed point: four bits of sub-pixel
        line = np.round(np.array(track.xy) * 16).astype(np.int32)
        color, head = age_color(track.age), tuple(line[-1].tolist())
        if track.length == 1:
            cv2.circle(out, head, 16 * unit, SINGLE, -1, cv2.LINE_AA, 4)
            continue
        cv2.polylines(out, [line[:, None]], False, color, unit, cv2.LINE_AA, 4)
        cv2.circle(out, head, 56 * unit, GROUND, -1, cv2.LINE_AA, 4)  # a rim, visible anywhere
        cv2.circle(out, head, 44 * unit, color, -1, cv2.LINE_AA, 4)
    return out


@lru_cache(maxsize=256)
def age_color(age: int) -> tuple[int, int, int]:
    """BGR of a track: blue when new, through green and yellow to red at ``OLD`` frames."""
    part = min(1.0, math.log(max(age, 1)) / math.log(OLD))
    stops = np.array(
        [[255, 110, 40], [230, 220, 0], [70, 230, 60], [0, 220, 255], [40, 40, 255]],
        dtype=np.float64,
    )
    at = part * (len(stops) - 1)
    blue, green, red = (np.interp(at, np.arange(len(stops)), stops[:, c]) for c in range(3))
    return round(float(blue)), round(float(green)), round(float(red))


def draw_caption(frame: NDArray[np.uint8], text: str) -> None:
    """Write a line into the upper left corner of a frame (H,W,3), with the colours of the ages
    below it.
    """
    cv2 = _cv2()
    scale = max(0.35, math.hypot(*frame.shape[:2]) / 1600)
    (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    gap, bar = round(12 * scale), max(2, round(8 * scale))
    cv2.rectangle(frame, (0, 0), (width + 2 * gap, height + base + bar + 2 * gap), GROUND, -1)
    cv2.putText(
        frame, text, (gap, gap + height), cv2.FONT_HERSHEY_SIMPLEX, scale, TEXT, 1, cv2.LINE_AA
    )
    top = gap + height + base
    for x in range(width):
        color = age_color(round(OLD ** (x / max(1, width - 1))))
        cv2.line(frame, (gap + x, top), (gap + x, top + bar), color, 1)
