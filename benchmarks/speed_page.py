"""Table and figure of ``speed.py``."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiepoints.files import write_text

#: The table of a page stands between these lines.
BEGIN, END = "<!-- speed.py: begin -->", "<!-- speed.py: end -->"
LABELS = {
    "kornia": "kornia: KeyNetDetector + HardNet, the same weights",
    "xfeat": "XFeat",
    "aliked-n16": "ALIKED-N16",
    "sift": "SIFT (OpenCV)",
    "akaze": "AKAZE (OpenCV)",
    "orb": "ORB (OpenCV)",
    "colmap-sift": "SIFT (COLMAP, with file and database)",
}
STAGES = ("pyramid", "network", "selection", "description")
#: Qualities of the figure; the first that most systems have is used.
QUALITIES = ("oxford correct@3", "graf correct@3", "colmap sacre_coeur inliers")
WIDTH, HEIGHT, LEFT, RIGHT, ABOVE, BELOW = 900, 520, 64, 210, 20, 48
#: Height of a line of text, and about the width of a character.
LINE, CHARACTER = 13, 6.4


def label(name: str) -> str:
    """Name of a system in a table."""
    return LABELS.get(name, name)


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _stages(found: dict[str, float]) -> str:
    if "detection" in found:
        return f"{found['detection']:.0f} (detection); {found['description']:.0f}"
    if "network" not in found:
        return ""
    return "; ".join(f"{found[stage]:.0f}" for stage in STAGES if stage in found)


def table(content: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    rows = {n: row for n, row in content["systems"].items() if "unavailable" not in row}
    threads = list(next(iter(rows.values()))["milliseconds"]) if rows else []
    qualities = list(dict.fromkeys(key for row in rows.values() for key in row["quality"]))
    rates = content["photos"] > 0
    columns = ["system", f"ms by stage: {', '.join(STAGES)}"]
    columns += [f"ms, {t} thread{'s' * (t != '1')}" for t in threads]
    columns += ["keypoints", "MiB", *([f"images/s, {t}" for t in threads] if rates else [])]
    columns += qualities
    lines = [f"| {' | '.join(columns)} |", f"|---|---{'|---:' * (len(columns) - 2)}|"]
    for name, row in rows.items():
        times = row["milliseconds"]
        cells = [label(name), _stages(times[threads[0]])]
        cells += [_number(times[t]["total"]) if name in rows else "" for t in threads]
        cells += [_number(row["keypoints"]), _number(row["memory"]["peak_mib"])]
        if rates:
            cells += [_number(row["images_per_second"].get(t), 2) for t in threads]
        cells += [_number(row["quality"].get(key), 3 if "mma" in key else 0) for key in qualities]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [n for n, row in content["systems"].items() if "unavailable" in row]
    if missing:
        lines += ["", f"Not available in this run: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def write_page(path: Path, content: dict[str, Any]) -> None:
    """Replace the table of a page between ``BEGIN`` and ``END``, or write a page with it."""
    before, after = "", ""
    if path.is_file() and BEGIN in (text := path.read_text()):
        before, rest = text.split(BEGIN, 1)
        after = rest.split(END, 1)[1]
    processor, cores = content["machine"]["processor"], content["machine"]["cores"]
    caption = f"{processor}, {cores} cores, {content['machine']['date']}."
    write_text(path, f"{before}{BEGIN}\n\n{table(content)}\n{caption}\n\n{END}{after or chr(10)}")


def points(content: dict[str, Any]) -> tuple[str, dict[str, tuple[float, float]]]:
    """The quality of the figure, and (ms on the first number of threads, quality) by system."""
    found: dict[str, dict[str, tuple[float, float]]] = {key: {} for key in QUALITIES}
    for name, row in content["systems"].items():
        if "unavailable" in row:
            continue
        milliseconds = next(iter(row["milliseconds"].values()))["total"]
        for key in QUALITIES:
            if key in row["quality"]:
                found[key][name] = milliseconds, row["quality"][key]
    best = max(QUALITIES, key=lambda key: len(found[key]))
    return best, found[best]


def write_figure(path: Path, content: dict[str, Any]) -> None:
    """Write quality against time as SVG."""
    key, found = points(content)
    write_text(path, "".join(_svg(key, found)))


def _svg(key: str, found: dict[str, tuple[float, float]]) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )
    if not found:
        yield f'<text x="{LEFT}" y="{HEIGHT // 2}">no quality was measured</text></svg>'
        return
    times = [time for time, _ in found.values()]
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)) + 1e-9)
    values = [value for _, value in found.values()]
    base, top = 0.8 * min(values), 1.05 * max(values) or 1.0
    right, bottom = WIDTH - RIGHT, HEIGHT - BELOW

    def x(time: float) -> float:
        return LEFT + (math.log10(time) - low) / (high - low) * (right - LEFT)

    def y(value: float) -> float:
        return bottom - (value - base) / (top - base) * (bottom - ABOVE)

    yield f'<path d="M{LEFT} {ABOVE}V{bottom}H{right}" fill="none" stroke="black"/>'
    for power in range(low, high + 1):
        yield (
            f'<text x="{x(10**power):.0f}" y="{bottom + 16}" text-anchor="middle">{10**power:g}'
            "</text>"
        )
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = base + fraction * (top - base)
        yield (
            f'<path d="M{LEFT} {y(value):.0f}H{right}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.0f}" text-anchor="end">{value:.0f}</text>'
        )
    yield (
        f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">'
        "milliseconds per image of 640 x 480, one thread</text>"
        f'<text transform="translate(14 {HEIGHT // 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(key)}</text>"
    )
    at = {name: (x(time), y(value)) for name, (time, value) in found.items()}
    for name, (label_x, label_y) in _labels(at).items():
        color = "#777" if name in LABELS else "#0072b2"
        (cx, cy) = at[name]
        yield (
            f'<path d="M{cx:.1f} {cy:.1f}L{label_x - 2:.1f} {label_y - 4:.1f}" stroke="#bbb"/>'
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="{color}"/>'
            f'<text x="{label_x:.1f}" y="{label_y:.1f}">{html.escape(name)}</text>'
        )
    yield "</svg>\n"


def _labels(at: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Positions of labels to the right of their points, moved up or down so that none overlap each
    other, or points, or the edge of the figure.
    """
    placed: dict[str, tuple[float, float]] = {}
    for name, (x, y) in sorted(at.items(), key=lambda item: (item[1][1], item[1][0])):
        steps = (sign * k for k in range(40) for sign in (1, -1))
        for step in steps:
            left, base = x + 9 + 4 * min(abs(step), 6), y + 4 + LINE * step
            right = left + CHARACTER * len(name)
            free = not any(
                abs(base - other_y) < LINE
                and left < other_x + CHARACTER * len(other)
                and other_x < right
                for other, (other_x, other_y) in placed.items()
            )
            free &= not any(
                abs(base - 4 - point_y) < LINE - 3 and left - 6 < point_x < right
                for point_x, point_y in at.values()
            )
            if free and LINE <= base <= HEIGHT - BELOW:
                break
        placed[name] = left, base
    return placed
