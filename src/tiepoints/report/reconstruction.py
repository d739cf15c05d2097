"""The page that shows a reconstruction (placeholder until the blocks follow)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

#: Longest side of the photographs in the report.
PREVIEW_SIZE = 360


def preview(photo: Image.Image) -> Image.Image:
    """A reduced copy."""
    small = photo.copy()
    small.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    return small


@dataclass(frozen=True)
class Scene:
    title: str
    summary: dict[str, Any]
    model: Any
    colors: np.ndarray
    keypoints: dict[str, int]
    inliers: dict[tuple[str, str], int]
    previews: dict[str, Image.Image]


def render(scene: Scene) -> str:
    """HTML of the report."""
    return f"<title>{scene.title}</title>"
