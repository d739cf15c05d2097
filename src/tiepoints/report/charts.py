"""Charts of the report as inline SVG, and images as data URIs, without a plotting library.

Colors are suitable for color-blind readers (after Okabe and Ito) and follow the light or dark mode
of the page by style sheet variables; lines also differ in marker and dash.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, features

COLORS = 7
DASHES = ("", "6 3", "2 3")
WIDTH, HEIGHT = 360, 250
#: Margins of a line chart.
LEFT, RIGHT, ABOVE, BELOW = 42, 12, 26, 40


@dataclass(frozen=True)
class Style:
    """Style of one system in all charts: index in the palette, or of the controls."""

    index: int
    control: bool = False

    @property
    def color(self) -> str:
        """CSS class."""
        return "sk" if self.control else f"s{self.index % COLORS}"

    @property
    def dash(self) -> str:
        """SVG dash pattern; empty for a solid line."""
        if self.control:
            return DASHES[1 + self.index % 2]
        return DASHES[self.index // COLORS % len(DASHES)]


@dataclass(frozen=True)
class Series:
    """A line with a label: points (x, y) in drawing order."""

    label: str
    style: Style
    points: list[tuple[float, float]]


def _mark(shape: int, x: float, y: float, title: str = "") -> str:
    """A marker at (x, y): circle, square, triangle, diamond or plus; ``title`` is its tooltip."""
    tooltip = f"<title>{html.escape(title)}</title>" if title else ""
    if shape % 5 == 0:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3">{tooltip}</circle>'
    outlines = {
        1: "M-2.7-2.7h5.4v5.4h-5.4z",
        2: "M0-3.5l3.3 6h-6.6z",
        3: "M0-3.8l3.8 3.8-3.8 3.8-3.8-3.8z",
        4: "M-1.1-3.5h2.2v2.4h2.4v2.2h-2.4v2.4h-2.2v-2.4h-2.4v-2.2h2.4z",
    }
    return (
        f'<path class="mark" transform="translate({x:.1f} {y:.1f})" '
        f'd="{outlines[shape % 5]}">{tooltip}</path>'
    )


def _dashed(style: Style) -> str:
    return f' stroke-dasharray="{style.dash}"' if style.dash else ""


def legend(series: Iterable[Series]) -> str:
    """Legend as an HTML list, shared by charts of the same systems."""
    items = []
    for s in series:
        line = f'<path class="curve" d="M1 6H33"{_dashed(s.style)}/>{_mark(s.style.index, 17, 6)}'
        items.append(
            f'<li><svg viewBox="0 0 34 12" class="{s.style.color}" '
            f'aria-hidden="true">{line}</svg>{html.escape(s.label)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def nice_top(value: float) -> tuple[float, float]:
    """Upper limit of an axis from 0 that contains ``value``, and a round step of 3 to 6 ticks."""
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
    """Line chart as SVG; y starts at 0.

    Args:
        x_ticks: tick positions, by default the x of the points.
        log_x: logarithmic x axis.
        y_unit: unit of the values in tooltips.
    """
    axes = _Axes.of(series, log_x)
    last = ", ".join(
        f"{s.label} {_number(round(s.points[-1][1], 1))}{y_unit} at {_number(s.points[-1][0])}"
        for s in series
        if s.points
    )
    description = f"Line chart, {title}: {y_label} against {x_label}. Last points: {last}."
    out = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(description)}">'
        f'<text class="title" x="{LEFT}" y="14">{html.escape(title)}</text>'
    ]
    ticks = sorted({x for s in series for x, _ in s.points}) if x_ticks is None else x_ticks
    out += axes.draw(ticks, x_label, y_label)
    for s in series:
        if not s.points:
            continue
        path = "M" + "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in s.points)
        every = max(1, round(len(s.points) / 10))  # more markers would hide a dense curve
        marks = "".join(
            _mark(
                s.style.index,
                axes.x(x),
                axes.y(y),
                f"{s.label}: {_number(round(y, 2))}{y_unit} at {_number(x)}",
            )
            for x, y in s.points[(s.style.index % every) :: every]
        )
        out.append(
            f'<g class="{s.style.color}"><path class="curve"{_dashed(s.style)} '
            f'd="{path}"/>{marks}</g>'
        )
    return "".join(out) + "</svg>"


@dataclass(frozen=True)
class _Axes:
    """Mapping of values to SVG coordinates in a line chart."""

    low: float
    high: float
    top: float
    step: float
    log_x: bool

    @classmethod
    def of(cls, series: Sequence[Series], log_x: bool) -> _Axes:
        xs = [x for s in series for x, _ in s.points]
        top, step = nice_top(max((y for s in series for _, y in s.points), default=0.0))
        low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)
        return cls(low, high, top, step, log_x)

    def x(self, value: float) -> float:
        fraction = 0.5 if self.high == self.low else (value - self.low) / (self.high - self.low)
        if self.log_x and self.high > self.low:
            fraction = math.log(value / self.low) / math.log(self.high / self.low)
        return LEFT + 4 + fraction * (WIDTH - LEFT - RIGHT - 8)

    def y(self, value: float) -> float:
        return HEIGHT - BELOW - max(0.0, value) / self.top * (HEIGHT - ABOVE - BELOW)

    def draw(self, ticks: Iterable[float], x_label: str, y_label: str) -> list[str]:
        """SVG of grid, axes, ticks and labels."""
        out = []
        for k in range(round(self.top / self.step) + 1):
            y = self.y(k * self.step)
            out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            out.append(
                f'<text class="label" x="{LEFT - 5}" y="{y + 4:.1f}" '
                f'text-anchor="end">{_number(k * self.step)}</text>'
            )
        out.append(f'<path class="axis" d="M{LEFT} {ABOVE - 4}V{HEIGHT - BELOW}H{WIDTH - RIGHT}"/>')
        for tick in ticks:
            x = self.x(tick)
            out.append(f'<path class="axis" d="M{x:.1f} {HEIGHT - BELOW}v4"/>')
            out.append(
                f'<text class="label" x="{x:.1f}" y="{HEIGHT - BELOW + 16}" '
                f'text-anchor="middle">{_number(tick)}</text>'
            )
        center_x, center_y = (LEFT + WIDTH - RIGHT) / 2, (ABOVE + HEIGHT - BELOW) / 2
        out.append(
            f'<text class="label" x="{center_x:.0f}" y="{HEIGHT - 6}" '
            f'text-anchor="middle">{html.escape(x_label)}</text>'
        )
        out.append(
            f'<text class="label" transform="translate(11 {center_y:.0f}) rotate(-90)" '
            f'text-anchor="middle">{html.escape(y_label)}</text>'
        )
        return out


def bar_chart(
    title: str, bars: Sequence[tuple[str, float, Style]], *, unit: str = "%", top: float = 100.0
) -> str:
    """Horizontal bar chart as SVG, from 0 to ``top``, with a label and a value per bar."""
    row, above, left, right = 19, 24, 122, 44
    height = above + row * len(bars) + 6
    description = ", ".join(f"{label} {value:.1f}{unit}" for label, value, _ in bars)
    out = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(f"Bars, {title}: {description}.")}">'
        f'<text class="title" x="0" y="14">{html.escape(title)}</text>'
    ]
    for k, (label, value, style) in enumerate(bars):
        y = above + row * k
        short = label if len(label) <= 19 else label[:18] + "…"
        length = max(0.0, min(1.0, value / top)) * (WIDTH - left - right)
        kind = "bar control" if style.control else "bar"
        out.append(
            f'<g class="{style.color}"><title>{html.escape(f"{label}: {value:.1f}{unit}")}</title>'
            f'<rect class="{kind}" x="{left}" y="{y + 2}" width="{length:.1f}" '
            f'height="{row - 6}"/></g>'
            f'<text x="{left - 6}" y="{y + 12}" text-anchor="end">{html.escape(short)}</text>'
            f'<text class="label" x="{left + length + 4:.1f}" y="{y + 12}">{value:.1f}</text>'
        )
    out.append(f'<path class="axis" d="M{left} {above - 2}V{height - 4}"/>')
    return "".join(out) + "</svg>"


def data_uri(image: Image.Image) -> str:
    """Encode an image as a data URI: WebP, or JPEG if Pillow does not support WebP."""
    kind, quality = ("webp", 68) if features.check("webp") else ("jpeg", 74)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, quality=quality)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
