"""One photograph against itself: turned, resized (repeatability) and mirrored (bias), for any
system.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import metrics as m
from ..geometry import warp_image
from ..image import ImageLike, load_image
from ..matching import match
from ..metrics.anchoring import ANCHORED_KEYPOINTS, percentiles
from ..metrics.bias import REACH
from ..names import EVALUATION_NUM_KEYPOINTS
from .pair import homography_metrics
from .systems import System, as_features

ROTATIONS = tuple(range(0, 360, 15))
#: Degrees within which a point's turn counts as right.
ROTATION_TOLERANCE = 15.0
FACTORS = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)


def _moved(image: Tensor, M: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """The image moved by a linear map (2,2) and shifted, on a canvas that holds all of it: new
    image and H (3,3).
    """
    h, w = image.shape[-2:]
    corners = torch.tensor(
        [[-0.5, -0.5], [w - 0.5, -0.5], [-0.5, h - 0.5], [w - 0.5, h - 0.5]], dtype=torch.float64
    )
    mapped = corners @ M.T
    low, high = mapped.amin(dim=0), mapped.amax(dim=0)
    size = (high - low + shift - 1e-6).ceil().clamp(min=1)
    H = torch.eye(3, dtype=torch.float64)
    H[:2, :2] = M
    H[:2, 2] = -low - 0.5 + (shift if shift else (size - (high - low)) / 2)
    return warp_image(image, H[None], (int(size[1]), int(size[0])), padding="reflection").clamp(
        0, 1
    ), H


def rotated(image: Tensor, degrees: float, *, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Image (1,1,H,W) turned clockwise as seen, nothing cut off, mirrored content outside; and H to
    it.

    ``shift`` pixels to the right and down, 0..1: with a part of a pixel no turn hands over the
    pixels as they were.
    """
    turn = math.radians(degrees)
    c, s = math.cos(turn), math.sin(turn)
    if degrees % 90 == 0:
        c, s = round(c), round(s)
    return _moved(image, torch.tensor([[c, -s], [s, c]], dtype=torch.float64), shift)


def rescaled(image: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Image (1,1,H,W) resized by about ``factor`` with a low-pass before shrinking, and the exact H
    to it.
    """
    h, w = image.shape[-2:]
    size = max(1, round(h * factor)), max(1, round(w * factor))
    sy, sx = size[0] / h, size[1] / w
    resized = torch.nn.functional.interpolate(
        image, size=size, mode="bilinear", antialias=True
    ).clamp(0, 1)
    return resized, torch.tensor(
        [[sx, 0, (sx - 1) / 2], [0, sy, (sy - 1) / 2], [0, 0, 1]], dtype=torch.float64
    )


def sweep(
    detect: System,
    image: ImageLike,
    kind: str,
    values: Sequence[float],
    *,
    num_keypoints: int = EVALUATION_NUM_KEYPOINTS,
    shift: float = 0.0,
) -> list[dict[str, Any]]:
    """Repeatability of one photograph against itself turned (``rotation``, degrees) or resized
    (``scale``, factors).

    Of points with angles also the error of their turn, where they are repeated within 3 px: its
    median in degrees, and the part within 15 degrees. ``shift``: of the turned copy, see
    ``rotated``.
    """
    make: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
        "rotation": partial(rotated, shift=shift),
        "scale": rescaled,
    }
    original = load_image(image)
    size = (original.shape[-1], original.shape[-2])
    a = as_features(detect(original), size)
    rows = []
    for value in values:
        moved, H = make[kind](original, value)
        b = as_features(detect(moved), (moved.shape[-1], moved.shape[-2]))
        numbers = homography_metrics(a, b, H, num_keypoints=num_keypoints, protocols=("mutual",))
        if a.descriptors is not None and b.descriptors is not None:
            pairs = match(a[:num_keypoints], b[:num_keypoints]).index
            accuracy = m.matching_accuracy(m.match_errors(a.xy, b.xy, H, pairs))
            numbers |= {"mma@3": accuracy["mma@3"], "matches": len(pairs)}
        if bool(a.angle.any()) or bool(b.angle.any()):
            i, j = m.repeated_points(
                a.xy,
                b.xy,
                H,
                size[::-1],
                (moved.shape[-2], moved.shape[-1]),
                num_keypoints=num_keypoints,
            )
            if len(i):
                errors = m.orientation_errors(a.xy[i], a.angle[i], b.angle[j], H)
                right = float((errors <= ROTATION_TOLERANCE).double().mean())
                numbers |= {"turn.median": float(errors.median()), "turn.right": right}
        rows.append(
            {
                "kind": kind,
                "value": value,
                "ok": True,
                "reason": "",
                "metrics": {**numbers, "points": len(b)},
            }
        )
    return rows


def bias(
    detect: System, image: ImageLike, *, num_keypoints: int = EVALUATION_NUM_KEYPOINTS
) -> list[dict[str, Any]]:
    """Median displacement (dx, dy) in px between detections on an image and on its mirrored or
    turned copy, moved back.

    A detector that answers everything at a constant offset shows twice that offset. None without
    paired points. One more row, ``anchoring``, says whether the strongest keypoints lie on
    structure (``anchoring.Anchoring``).
    """
    original = load_image(image)
    h, w = original.shape[-2:]
    a = as_features(detect(original), (w, h)).xy[:num_keypoints].double()
    rows = []
    for kind, dims in (("mirror_x", (-1,)), ("mirror_y", (-2,)), ("rotation_180", (-2, -1))):
        b = as_features(detect(original.flip(dims)), (w, h)).xy[:num_keypoints].double()
        for dim in dims:
            b[:, 0 if dim == -1 else 1] = original.shape[dim] - 1 - b[:, 0 if dim == -1 else 1]
        numbers: dict[str, float | None] = {"dx": None, "dy": None, "points": 0}
        index_a, index_b, _ = m.mutual_nearest(a, b, REACH)
        if len(index_a):
            dx, dy = (a[index_a] - b[index_b]).median(dim=0).values.tolist()
            numbers = {"dx": dx, "dy": dy, "points": len(index_a)}
        rows.append({"kind": kind, "metrics": numbers, "ok": True, "reason": ""})
    rank = percentiles(original, a[:ANCHORED_KEYPOINTS].float())
    placed: dict[str, float | None] = {"median": None, "below_half": None, "points": len(rank)}
    if len(rank):
        placed |= {"median": float(rank.median()), "below_half": float((rank < 0.5).float().mean())}
    rows.append({"kind": "anchoring", "metrics": placed, "ok": True, "reason": ""})
    return rows
