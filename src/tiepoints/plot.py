"""Pictures of key points and matches, drawn with Pillow alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .structs import Keypoints

RIGHT, WRONG, POINT = (60, 220, 90), (235, 70, 60), (255, 210, 0)
#: Lines are drawn at twice the size and reduced, which smooths them.
OVERSAMPLE = 2


def as_picture(image: Tensor | Image.Image) -> Image.Image:
    """A tensor (H,W) or (1,1,H,W) in [0,1], or a PIL image, as RGB."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = image.reshape(image.shape[-2:]).clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(pixels).convert("RGB")


def draw_matches(
    image_a: Tensor | Image.Image,
    image_b: Tensor | Image.Image,
    xy_a: Tensor,
    xy_b: Tensor,
    right: Tensor | None = None,
    path: Path | None = None,
    max_lines: int = 400,
) -> Image.Image:
    """Both images side by side with lines between matched points: green where ``right`` (K,) bool, red elsewhere.

    At most ``max_lines`` of each colour are drawn, spread evenly over the list; the caption counts all.
    """
    a, b = as_picture(image_a), as_picture(image_b)
    gap, caption = 8, 26
    canvas = Image.new("RGB", (a.width + gap + b.width, max(a.height, b.height)), (255, 255, 255))
    for picture, left in ((a, 0), (b, a.width + gap)):
        dim = np.asarray(picture, dtype=np.float32) * 0.75  # lines stand out on darker images
        canvas.paste(Image.fromarray(dim.astype(np.uint8)), (left, 0))
    s = OVERSAMPLE
    canvas = canvas.resize((canvas.width * s, canvas.height * s), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    good = torch.ones(len(xy_a), dtype=torch.bool) if right is None else right.cpu()
    for colour, chosen in ((WRONG, (~good).nonzero()[:, 0]), (RIGHT, good.nonzero()[:, 0])):
        if len(chosen) > max_lines:
            chosen = chosen[torch.linspace(0, len(chosen) - 1, max_lines).long()]
        for i in chosen.tolist():
            start = [(float(v) + 0.5) * s for v in xy_a[i]]
            end = [(float(v) + 0.5) * s for v in xy_b[i]]
            end[0] += (a.width + gap) * s
            draw.line([*start, *end], fill=colour, width=s)
            for x, y in (start, end):
                draw.ellipse([x - 2 * s, y - 2 * s, x + 2 * s, y + 2 * s], outline=colour, width=s)
    small = canvas.resize((canvas.width // s, canvas.height // s), Image.Resampling.BOX)
    out = Image.new("RGB", (small.width, small.height + caption), (255, 255, 255))
    out.paste(small, (0, caption))
    text = f"{len(xy_a)} matches"
    if right is not None:
        text += f", {int(good.sum())} right (green), {int((~good).sum())} not (red)"
    ImageDraw.Draw(out).text((6, 5), text, fill=(30, 30, 30), font=ImageFont.load_default(15))
    if path is not None:
        out.save(path)
    return out


def draw_keypoints(image: Tensor | Image.Image, keypoints: Keypoints, path: Path | None = None, radius: float = 5.0) -> Image.Image:
    """The image with a circle of ``radius * scale`` pixels around every point."""
    s = OVERSAMPLE
    picture = as_picture(image)
    canvas = picture.resize((picture.width * s, picture.height * s), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    for (x, y), scale in zip(keypoints.xy.tolist(), keypoints.scale.tolist(), strict=True):
        r, cx, cy = radius * scale * s, (x + 0.5) * s, (y + 0.5) * s
        draw.ellipse([cx - r, cy - r, cx + r, cy + r], outline=POINT, width=s)
    out = canvas.resize(picture.size, Image.Resampling.BOX)
    if path is not None:
        out.save(path)
    return out
