"""One HTML page that shows a reconstruction: 3D view, photographs, pairs, errors, missing ones."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..plot import HUES, hue_at
from .charts import Series, Style, data_uri, legend, line_chart
from .page import Block, Charts, Column, Page, Row, Section, Table, Text

#: Longest side of the photographs in the report, and their largest number.
PREVIEW_SIZE, MAX_PHOTOS = 360, 60
#: Largest number of points in the 3D view.
MAX_POINTS = 200_000
#: Track length from which keypoints have the last color.
LONG_TRACK = 10
#: Extent of the 3D view: distance from the center that contains this share of the points, and the
#: multiple of it at which points and cameras are cut off.
VIEW_SHARE, VIEW_LIMIT = 0.9, 4.0
#: Cells of the map of errors along the longer side, and smallest number of keypoints of a cell.
ERROR_CELLS, CELL_KEYPOINTS = 12, 5
#: Length of the sides of the pyramids of the cameras, relative to the extent.
CAMERA_SIZE = 0.06


@dataclass(frozen=True)
class Scene:
    """A reconstruction to show.

    Attributes:
        title: of the page.
        summary: ``jobs.reconstruct.Summary`` as a JSON object.
        camera: which images share a camera.
        points: (P,3).
        colors: (P,3) uint8.
        length: (P,) number of images per point.
        views: registered image -> its ``jobs.mapping.View``.
        keypoints: image -> number of keypoints.
        inliers: pair -> number of verified matches.
        previews: registered image -> reduced photograph, see ``preview``.
    """

    title: str
    summary: dict[str, Any]
    camera: str
    points: np.ndarray
    colors: np.ndarray
    length: np.ndarray
    views: dict[str, Any]
    keypoints: dict[str, int]
    inliers: dict[tuple[str, str], int]
    previews: dict[str, Image.Image]


def preview(photo: Image.Image) -> Image.Image:
    """A reduced copy of a photograph."""
    small = photo.copy()
    small.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    return small


def render(scene: Scene) -> str:
    """HTML of the report."""
    summary, first = scene.summary, scene.summary["models"][0]
    sections = [
        Section("3D view", [Viewer(scene)]),
        Section("Photographs", [Text(_photo_text(scene)), Photographs(scene)]),
        Section("Images", _image_tables(scene)),
        Section("Pairs", [Text(_pair_text(summary)), Matrix(scene)]),
        Section("Reprojection errors", [_error_histogram(scene), ErrorMap(scene)]),
    ]
    if len(summary["models"]) > 1:
        sections.insert(3, Section("Models", [_model_table(summary)]))
    if summary["sift"] is not None:
        sections.append(Section("Compared with SIFT", [_sift_table(summary)]))
    text = f"{summary['registered']} of {summary['images']} images are in the model"
    return Page(
        title=f"Reconstruction of {scene.title}",
        metadata=[
            ("images", f"{summary['registered']} of {summary['images']} in the model"),
            ("points", f"{first['points']:,}"),
            ("track length", f"{first['track_length']:.2f} images per point"),
            ("reprojection error", f"{first['error']:.2f} px"),
            ("angle between rays", f"{summary['angle']:.1f} degrees (median)"),
            ("pairs", f"{summary['pairs']['verified']} of {summary['pairs']['chosen']} verified"),
            ("camera", scene.camera),
            ("time", ", ".join(f"{k} {v:.0f} s" for k, v in summary["seconds"].items() if v >= 1)),
        ],
        summary=[f"{text}.", *map(_sentence, summary["warnings"])],
        sections=sections,
        assets=("viewer",),
    ).html()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


# ---- 3D view


@dataclass(frozen=True)
class Viewer:
    """Points and cameras on a canvas; the data is in the page."""

    scene: Scene

    def html(self) -> str:
        data = json.dumps(_viewer_data(self.scene)).replace("<", "\\u003c")
        count = len(self.scene.points)
        side = 5 if count < 3_000 else 3 if count < 30_000 else 2
        shown = "" if count <= MAX_POINTS else f" ({MAX_POINTS:,} of them shown)"
        return (
            '<figure class="viewer"><canvas tabindex="0" role="img" aria-label="'
            f'{count:,} points and {len(self.scene.views)} cameras"></canvas>'
            '<div class="controls"><label><input type="checkbox" name="turn"> turn</label>'
            '<label><input type="checkbox" name="cameras" checked> cameras</label>'
            '<label>point size <input type="range" name="size" min="1" max="6" step="0.5" '
            f'value="{side}"></label><button type="button">reset</button>'
            '<span class="label" aria-live="polite"></span></div>'
            f'<p class="note">{count:,} points{shown}. Drag to turn, shift and drag to move, wheel '
            "to zoom; or arrow keys, + and -.</p>"
            f'<script type="application/json">{data}</script></figure>'
        )

    def markdown(self) -> str:
        return f"{len(self.scene.points)} points, {len(self.scene.views)} cameras"


def _viewer_data(scene: Scene) -> dict[str, Any]:
    """Points as 16-bit integers and cameras, centered, of unit extent and with y up."""
    views = list(scene.views.values())
    axes = _upright(views)
    middle = np.median(scene.points, axis=0)
    points = (scene.points - middle) @ axes.T
    distance = np.linalg.norm(points, axis=1)
    extent = max(float(np.quantile(distance, VIEW_SHARE)), 1e-9)
    kept = np.flatnonzero(distance <= VIEW_LIMIT * extent)
    if len(kept) > MAX_POINTS:
        kept = np.random.default_rng(0).choice(kept, MAX_POINTS, replace=False)
    points = points[kept] / extent
    low, high = points.min(axis=0), points.max(axis=0)
    grid = np.rint((points - low) / np.maximum(high - low, 1e-9) * 65535).astype("<u2")
    cameras = []
    centers = [(view.center - middle) @ axes.T / extent for view in scene.views.values()]
    outermost = float(np.quantile(np.linalg.norm(centers, axis=1), VIEW_SHARE))
    for (name, view), center in zip(scene.views.items(), centers, strict=True):
        if np.linalg.norm(center) > 3 * VIEW_LIMIT:
            continue
        x, y = (CAMERA_SIZE * side / max(view.size) / 2 for side in view.size)
        z = CAMERA_SIZE * view.focal / max(view.size)
        corners = np.array([(-x, -y, z), (x, -y, z), (x, y, z), (-x, y, z)])
        outer = center + corners @ view.rotation @ axes.T
        cameras.append({"name": name, "corners": np.round([center, *outer], 4).tolist()})
    return {
        "low": low.tolist(),
        "high": high.tolist(),
        "positions": base64.b64encode(grid.tobytes()).decode(),
        "colors": base64.b64encode(np.ascontiguousarray(scene.colors[kept]).tobytes()).decode(),
        "cameras": cameras,
        # a sphere of radius 1 fills the height at a distance of 2.2
        "distance": 2.2 * min(max(1.0, outermost), VIEW_LIMIT),
    }


def _upright(views: list[Any]) -> np.ndarray:
    """Rotation (3,3) to the axes right, up and back of a viewer who looks in the mean direction of
    the images. Up is opposite to their mean downward axis or, for aerial images that look at the
    plane of their positions, to their mean viewing direction.
    """
    down = np.mean([view.rotation[1] for view in views], axis=0)
    ahead = np.mean([view.rotation[2] for view in views], axis=0)
    centers = np.array([view.center for view in views])
    spread, axes = np.linalg.svd(centers - centers.mean(axis=0))[1:]
    aerial = (
        len(views) > 3
        and spread[2] < 0.3 * spread[1] > 0.1 * spread[0]
        and abs(axes[2] @ ahead) > 0.8
    )
    up = -ahead if aerial or np.linalg.norm(down) < 0.3 else -down
    length = np.linalg.norm(up)
    up = up / length if length > 1e-6 else np.array([0.0, 1.0, 0.0])
    right = np.cross(-down if aerial else ahead, up)
    if np.linalg.norm(right) < 0.1:
        right = np.cross(np.eye(3)[int(np.argmin(np.abs(up)))], up)
    right /= np.linalg.norm(right)
    return np.array([right, up, np.cross(right, up)])


# ---- photographs


def _photo_text(scene: Scene) -> str:
    shown = _shown(scene)
    few = "" if len(shown) == len(scene.views) else f"{len(shown)} of {len(scene.views)} images. "
    return (
        f"{few}Keypoints that belong to a 3D point, colored by the number of images that show the "
        f"point, from 2 to {LONG_TRACK} or more."
    )


def _shown(scene: Scene) -> list[str]:
    names = [name for name in scene.views if name in scene.previews]
    return names[:: max(1, math.ceil(len(names) / MAX_PHOTOS))]


@dataclass(frozen=True)
class Photographs:
    """Registered photographs with their keypoints."""

    scene: Scene

    def html(self) -> str:
        colors = ",".join(f"rgb{hue}" for hue in HUES)
        figures = "".join(self._figure(name) for name in _shown(self.scene))
        return (
            f'<p>2<span class="scale" style="background:linear-gradient(to right,{colors})"></span>'
            f'{LONG_TRACK}</p><div class="photos">{figures}</div>'
        )

    def _figure(self, name: str) -> str:
        view = self.scene.views[name]
        image = draw_tracks(
            self.scene.previews[name], view.size, view.xy, self.scene.length[view.point]
        )
        return (
            f'<figure><img src="{data_uri(image)}" alt="{html.escape(name)}" loading="lazy">'
            f"<figcaption>{html.escape(name)}: {len(view.xy)} points</figcaption></figure>"
        )

    def markdown(self) -> str:
        return ""


def draw_tracks(
    photo: Image.Image, size: tuple[int, int], xy: np.ndarray, length: np.ndarray
) -> Image.Image:
    """Draw keypoints (N,2) in pixels of an image of ``size`` on a reduced copy of it, colored by
    track length (N,); those of long tracks on top.
    """
    image = photo.convert("RGB")
    image = image.point(lambda value: round(0.6 * value))
    draw = ImageDraw.Draw(image)
    factor = image.width / size[0]
    for row in np.argsort(length, kind="stable"):
        x, y = (xy[row] + 0.5) * factor
        fraction = math.log(max(length[row], 2) / 2) / math.log(LONG_TRACK / 2)
        draw.ellipse((x - 1.6, y - 1.6, x + 1.6, y + 1.6), fill=hue_at(fraction))
    return image


# ---- tables


def _image_tables(scene: Scene) -> list[Block]:
    reasons = dict(scene.summary["unregistered"])
    partners = dict.fromkeys(scene.keypoints, 0)
    matches = dict.fromkeys(scene.keypoints, 0)
    for pair, count in scene.inliers.items():
        for name in pair:
            partners[name] += 1
            matches[name] += count
    blocks: list[Block] = []
    if reasons or scene.summary["failed"]:
        rows = [Row(name, [reason]) for name, reason in [*reasons.items(), *_failed(scene)]]
        blocks.append(
            Table("Images that are not in the model", [Column("why", digits=None)], rows,
                  corner="image")
        )  # fmt: skip
    columns = [
        Column("keypoints", digits=0),
        Column("images that overlap", digits=0),
        Column("verified matches", digits=0),
        Column("3D points", digits=0),
        Column("mean error, px", digits=2),
    ]
    rows = []
    for name, count in scene.keypoints.items():
        view = scene.views.get(name)
        points = None if view is None else len(view.xy)
        error = None if view is None or not len(view.xy) else float(_errors(view).mean())
        rows.append(Row(name, [count, partners[name], matches[name], points, error]))
    blocks.append(Table("All images", columns, rows, corner="image"))
    return blocks


def _failed(scene: Scene) -> Iterable[tuple[str, str]]:
    return [(str(name), str(reason)) for name, reason in scene.summary["failed"]]


def _errors(view: Any) -> np.ndarray:
    return np.linalg.norm(view.residual, axis=1)


_MODEL_COLUMNS = [
    Column("images", digits=0, better=1),
    Column("3D points", digits=0, better=1),
    Column("observations", digits=0, better=1),
    Column("track length", digits=2, better=1),
    Column("reprojection error, px", digits=2, better=-1),
]


def _model_cells(model: dict[str, Any]) -> list[Any]:
    names = ("images", "points", "observations", "track_length", "error")
    return [model[name] for name in names]


def _model_table(summary: dict[str, Any]) -> Table:
    rows = [
        Row(f"sparse/{index}", _model_cells(model)) for index, model in enumerate(summary["models"])
    ]
    columns = [Column(c.label, digits=c.digits) for c in _MODEL_COLUMNS]
    return Table("Models that are not connected", columns, rows, corner="model")


def _sift_table(summary: dict[str, Any]) -> Block:
    sift = summary["sift"]
    if not sift["models"]:
        return Text(f"SIFT: {sift.get('error', 'no model')}")
    resumed = 0 < summary["pairs"]["matched"] < summary["pairs"]["chosen"]
    stages = ("match", "check", "map")
    ours = None if resumed else sum(summary["seconds"].get(name, 0.0) for name in stages)
    rows = [
        Row("tiepoints", [*_model_cells(summary["models"][0]), ours]),
        Row("COLMAP's SIFT", [*_model_cells(sift["models"][0]), sift["seconds"]]),
    ]
    note = (
        "The largest model of each. COLMAP's SIFT with its default options and the same longest "
        "side of the images, pairs and mapper."
    )
    columns = [*_MODEL_COLUMNS, Column("seconds", digits=0)]
    return Table("Largest model", columns, rows, note=note)


# ---- pairs


def _pair_text(summary: dict[str, Any]) -> str:
    pairs = summary["pairs"]
    return (
        f"{pairs['chosen']} pairs were matched: {pairs['reason']}. {pairs['verified']} have "
        "matches that agree on a geometry. The brighter a cell, the more verified matches; rows "
        "and columns are the images in the order of the table above, and images outside the model "
        "have a gray diagonal."
    )


@dataclass(frozen=True)
class Matrix:
    """Number of verified matches of each pair of images."""

    scene: Scene

    def html(self) -> str:
        names = list(self.scene.keypoints)
        index = {name: i for i, name in enumerate(names)}
        values = np.zeros((len(names), len(names)))
        for (a, b), count in self.scene.inliers.items():
            values[index[a], index[b]] = values[index[b], index[a]] = count
        top = max(values.max(), 1.0)
        level = np.log1p(values) / math.log1p(top)
        pixels = np.zeros((*values.shape, 3), np.uint8)
        for (i, j), fraction in np.ndenumerate(level):
            if fraction > 0:
                pixels[i, j] = _heat(fraction)
        for i, name in enumerate(names):
            pixels[i, i] = (255, 255, 255) if name in self.scene.views else (110, 110, 110)
        cell = max(1, 640 // max(len(names), 1))
        image = Image.fromarray(pixels).resize((cell * len(names),) * 2, Image.Resampling.NEAREST)
        return (
            f'<figure class="matrix"><img src="{data_uri(image)}" alt="matrix of matched pairs">'
            f"<figcaption>largest number of verified matches: {int(top)}</figcaption></figure>"
        )

    def markdown(self) -> str:
        return ""


def _heat(fraction: float) -> tuple[int, int, int]:
    """Dark blue to yellow."""
    stops = np.array([(20, 40, 110), (30, 120, 170), (70, 190, 130), (250, 230, 60)])
    position = min(max(fraction, 0.0), 1.0) * (len(stops) - 1)
    red, green, blue = (
        round(float(np.interp(position, range(len(stops)), stops[:, k]))) for k in range(3)
    )
    return red, green, blue


# ---- errors


def _error_histogram(scene: Scene) -> Charts:
    """Distribution of the reprojection errors."""
    parts = [_errors(view) for view in scene.views.values() if len(view.xy)]
    errors = np.concatenate(parts) if parts else np.zeros(0)
    edges = np.linspace(0, 4, 33)
    shares = 100 * np.histogram(errors, edges)[0] / max(len(errors), 1)
    points = [(float((low + high) / 2), float(share)) for low, high, share in
              zip(edges[:-1], edges[1:], shares, strict=True)]  # fmt: skip
    series = Series("keypoints", Style(0), points)
    chart = line_chart(
        "Distribution of errors", "error in pixels", "% of the keypoints", [series],
        x_ticks=[0, 1, 2, 3, 4], y_unit=" %",
    )  # fmt: skip
    levels = (10, 25, 50, 75, 90, 99)
    values = [float(v) for v in np.percentile(errors, levels)] if len(errors) else [0.0] * 6
    table = Table(
        "Percentiles of the errors in pixels",
        [Column(f"{level} %", digits=2) for level in levels],
        [Row("keypoints", list(values))],
        corner="",
    )
    return Charts([chart], legend([series]), [table])


@dataclass(frozen=True)
class ErrorMap:
    """Mean reprojection error by the position in the image: a pattern shows distortion that the
    camera model does not describe.
    """

    scene: Scene

    def html(self) -> str:
        views = [view for view in self.scene.views.values() if len(view.xy)]
        sizes = {view.size for view in views}
        if not views:
            return ""
        width, height = max(sizes, key=lambda size: sum(view.size == size for view in views))
        same = [view for view in views if view.size == (width, height)]
        xy = np.concatenate([view.xy for view in same])
        residual = np.concatenate([view.residual for view in same])
        step = max(width, height) / ERROR_CELLS
        columns, rows = math.ceil(width / step - 1e-9), math.ceil(height / step - 1e-9)
        cell = 40
        column = np.clip(((xy[:, 0] + 0.5) / step).astype(int), 0, columns - 1)
        row = np.clip(((xy[:, 1] + 0.5) / step).astype(int), 0, rows - 1)
        parts = []
        for i in range(rows):
            for j in range(columns):
                inside = residual[(row == i) & (column == j)]
                parts.append(self._cell(inside, cell * j, cell * i, cell))
        few = "" if len(sizes) == 1 else f" {len(same)} of {len(views)} images, of the same size."
        return (
            '<figure class="table"><figcaption>Errors by position in the image</figcaption>'
            f'<svg class="chart" viewBox="0 0 {cell * columns} {cell * rows}" role="img" '
            'style="max-width:620px" aria-label="map of mean errors">'
            f'{"".join(parts)}</svg><p class="note">Brightness: mean error, the number in pixels; '
            "line: mean difference of the projected point from the keypoint, 20 times enlarged. "
            "Lines in a pattern show distortion that the camera model does not describe."
            f"{few}</p></figure>"
        )

    def _cell(self, residual: np.ndarray, x: int, y: int, side: int) -> str:
        if len(residual) < CELL_KEYPOINTS:
            return f'<rect class="grid" x="{x}" y="{y}" width="{side}" height="{side}"/>'
        error = float(np.linalg.norm(residual, axis=1).mean())
        red, green, blue = _heat(error / 2)
        dx, dy = np.clip(20 * residual.mean(axis=0), -side, side)
        middle_x, middle_y = x + side / 2, y + side / 2
        ink = "#000" if error > 1.2 else "#fff"
        return (
            f'<rect x="{x}" y="{y}" width="{side}" height="{side}" '
            f'fill="rgb({red},{green},{blue})"/><text x="{x + 3}" y="{y + 12}" font-size="10" '
            f'fill="{ink}">{error:.2f}</text><path d="M{middle_x:.1f} {middle_y:.1f}l{dx:.1f} '
            f'{dy:.1f}" stroke="{ink}" stroke-width="1.5"/><circle cx="{middle_x:.1f}" '
            f'cy="{middle_y:.1f}" r="1.6" fill="{ink}"/>'
        )

    def markdown(self) -> str:
        return ""
