"""Figures of the report: charts as inline SVG, and pictures of a pair as inline images; no other
library, no file beside the page.

Colours are told apart by people who see few (after Okabe and Ito), change with the page's light or
dark mode through style sheet variables, and never stand alone: lines also differ in marker and
dash, points in shape.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, features

COLOURS = 7
DASHES = ("", "6 3", "2 3")
WIDTH, HEIGHT = 360, 250


@dataclass(frozen=True)
class Look:
    """How one system is drawn in every chart: its place in the palette, or that of a control."""

    index: int
    control: bool = False

    @property
    def colour(self) -> str:
        """Class of the style sheet."""
        return "sk" if self.control else f"s{self.index % COLOURS}"

    @property
    def dash(self) -> str:
        """Lengths of strokes and gaps; empty = a full line."""
        if self.control:
            return DASHES[1 + self.index % 2]
        return DASHES[self.index // COLOURS % len(DASHES)]


@dataclass(frozen=True)
class Series:
    """A named line: points (x, y), in the order to draw them."""

    label: str
    look: Look
    points: list[tuple[float, float]]


def _mark(shape: int, x: float, y: float, title: str = "") -> str:
    """A marker around (x, y): circle, square, triangle, diamond or plus; ``title`` shows under the
    mouse.
    """
    inside = f"<title>{html.escape(title)}</title>" if title else ""
    if shape % 5 == 0:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3">{inside}</circle>'
    outlines = {
        1: "M-2.7-2.7h5.4v5.4h-5.4z",
        2: "M0-3.5l3.3 6h-6.6z",
        3: "M0-3.8l3.8 3.8-3.8 3.8-3.8-3.8z",
        4: "M-1.1-3.5h2.2v2.4h2.4v2.2h-2.4v2.4h-2.2v-2.4h-2.4v-2.2h2.4z",
    }
    return (
        f'<path class="mark" transform="translate({x:.1f} {y:.1f})" '
        f'd="{outlines[shape % 5]}">{inside}</path>'
    )


def _dashed(look: Look) -> str:
    return f' stroke-dasharray="{look.dash}"' if look.dash else ""


def legend(series: Iterable[Series]) -> str:
    """What each line stands for, as an HTML list shared by charts of the same systems."""
    items = []
    for s in series:
        line = f'<path class="curve" d="M1 6H33"{_dashed(s.look)}/>{_mark(s.look.index, 17, 6)}'
        items.append(
            f'<li><svg viewBox="0 0 34 12" class="{s.look.colour}" '
            f'aria-hidden="true">{line}</svg>{html.escape(s.label)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def nice_top(value: float) -> tuple[float, float]:
    """Upper end of an axis from 0 that holds ``value``, and the distance of its ticks: a round
    number, 3 to 6 ticks.
    """
    if not value > 0:
        return 1.0, 0.5
    power = 10.0 ** math.floor(math.log10(value))
    for factor in (0.2, 0.25, 0.5, 1.0, 2.0):
        step = factor * power
        if math.ceil(value / step - 1e-9) <= 6:
            break
    return step * math.ceil(value / step - 1e-9), step


def _number(value: float) -> str:
    return f"{value:.6g}"


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    x_ticks: Sequence[float] | None = None,
    log_x: bool = False,
    y_unit: str = "",
) -> str:
    """Lines over common axes as SVG text, y from 0; logarithmic in x where asked.

    Args:
        x_ticks: where to write numbers below the axis; the x of the points by default.
        y_unit: written after values shown under the mouse.
    """
    xs = sorted({x for s in series for x, _ in s.points})
    ticks = list(xs if x_ticks is None else x_ticks)
    top, step = nice_top(max((y for s in series for _, y in s.points), default=0.0))
    left, right, above, below = 42, 12, 26, 40
    low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)

    def place(x: float) -> float:
        share = 0.5 if high == low else (x - low) / (high - low)
        if log_x and high > low:
            share = math.log(x / low) / math.log(high / low)
        return left + 4 + share * (WIDTH - left - right - 8)

    def level(y: float) -> float:
        return HEIGHT - below - max(0.0, y) / top * (HEIGHT - above - below)

    best = ", ".join(
        f"{s.label} {_number(round(s.points[-1][1], 1))}{y_unit} at {_number(s.points[-1][0])}"
        for s in series
        if s.points
    )
    out = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="'
        + html.escape(f"Line chart, {title}: {y_label} against {x_label}. Last points: {best}.")
        + f'"><text class="title" x="{left}" y="14">{html.escape(title)}</text>'
    ]
    for k in range(round(top / step) + 1):
        y = level(k * step)
        out.append(f'<path class="grid" d="M{left} {y:.1f}H{WIDTH - right}"/>')
        out.append(
            f'<text class="label" x="{left - 5}" y="{y + 4:.1f}" '
            f'text-anchor="end">{_number(k * step)}</text>'
        )
    out.append(f'<path class="axis" d="M{left} {above - 4}V{HEIGHT - below}H{WIDTH - right}"/>')
    for x in ticks:
        at = place(x)
        out.append(f'<path class="axis" d="M{at:.1f} {HEIGHT - below}v4"/>')
        out.append(
            f'<text class="label" x="{at:.1f}" y="{HEIGHT - below + 16}" '
            f'text-anchor="middle">{_number(x)}</text>'
        )
    middle, centre = (left + WIDTH - right) / 2, (above + HEIGHT - below) / 2
    out.append(
        f'<text class="label" x="{middle:.0f}" y="{HEIGHT - 6}" '
        f'text-anchor="middle">{html.escape(x_label)}</text>'
    )
    out.append(
        f'<text class="label" transform="translate(11 {centre:.0f}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(y_label)}</text>'
    )
    for s in series:
        if not s.points:
            continue
        path = "M" + "L".join(f"{place(x):.1f} {level(y):.1f}" for x, y in s.points)
        every = max(1, round(len(s.points) / 10))  # markers of a dense curve would hide it
        marks = "".join(
            _mark(
                s.look.index,
                place(x),
                level(y),
                f"{s.label}: {_number(round(y, 2))}{y_unit} at {_number(x)}",
            )
            for x, y in s.points[(s.look.index % every) :: every]
        )
        out.append(
            f'<g class="{s.look.colour}"><path class="curve"{_dashed(s.look)} '
            f'd="{path}"/>{marks}</g>'
        )
    return "".join(out) + "</svg>"


def bar_chart(
    title: str, bars: Sequence[tuple[str, float, Look]], *, unit: str = "%", top: float = 100.0
) -> str:
    """Horizontal bars from 0 to ``top``, each with its label and number, as SVG text."""
    row, above, left, right = 19, 24, 122, 44
    height = above + row * len(bars) + 6
    spoken = ", ".join(f"{label} {value:.1f}{unit}" for label, value, _ in bars)
    out = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(f"Bars, {title}: {spoken}.")}">'
        f'<text class="title" x="0" y="14">{html.escape(title)}</text>'
    ]
    for k, (label, value, look) in enumerate(bars):
        y = above + row * k
        short = label if len(label) <= 19 else label[:18] + "…"
        length = max(0.0, min(1.0, value / top)) * (WIDTH - left - right)
        kind = "bar control" if look.control else "bar"
        out.append(
            f'<g class="{look.colour}"><title>{html.escape(f"{label}: {value:.1f}{unit}")}</title>'
            f'<rect class="{kind}" x="{left}" y="{y + 2}" width="{length:.1f}" '
            f'height="{row - 6}"/></g>'
            f'<text x="{left - 6}" y="{y + 12}" text-anchor="end">{html.escape(short)}</text>'
            f'<text class="label" x="{left + length + 4:.1f}" y="{y + 12}">{value:.1f}</text>'
        )
    out.append(f'<path class="axis" d="M{left} {above - 2}V{height - 4}"/>')
    return "".join(out) + "</svg>"


def data_uri(picture: Image.Image) -> str:
    """The picture as the address of an ``img`` element that needs no file: WebP, or JPEG where
    Pillow lacks it.
    """
    kind, quality = ("webp", 68) if features.check("webp") else ("jpeg", 74)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, kind, quality=quality)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
