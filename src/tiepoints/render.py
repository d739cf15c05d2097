"""Rendering of filled polygons with sub-pixel accuracy, as images with exactly known corners."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw

from .geometry import warp_points

#: Factor in each direction by which the drawing is larger before it is averaged.
OVERSAMPLING = 6


def render_outlines(
    outlines: list[tuple[np.ndarray, int]], background: int, H: np.ndarray, size: int
) -> np.ndarray:
    """Render filled polygons (vertices (N,2), gray value) warped by H (3,3) on a constant
    background: (size,size) float32.
    """
    large = Image.new("L", (size * OVERSAMPLING, size * OVERSAMPLING), background)
    draw = ImageDraw.Draw(large)
    mapped = warp_points(
        torch.from_numpy(np.concatenate([outline for outline, _ in outlines])), torch.from_numpy(H)
    ).numpy()
    # pixel i covers i - 0.5 .. i + 0.5; Pillow's integer coordinates are pixel centers
    points = ((mapped + 0.5) * OVERSAMPLING - 0.5).round().clip(-1e6, 1e6).astype(int)
    start = 0
    for outline, gray in outlines:
        draw.polygon([tuple(p) for p in points[start : start + len(outline)].tolist()], fill=gray)
        start += len(outline)
    return np.asarray(large.reduce(OVERSAMPLING), dtype=np.float32)
