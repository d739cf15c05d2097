"""Repeatability under rotation and scaling, and localization bias, measured on single images."""

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
#: Maximum error in degrees of a correct orientation.
ROTATION_TOLERANCE = 15.0
FACTORS = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)


def _transform(image: Tensor, M: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Warp an image by a linear map (2,2) and a shift, on a canvas that contains all of it; returns
    the new image and H (3,3).
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
    """Rotate an image (1,1,H,W) clockwise without cropping, with reflection padding; returns the
    new image and H (3,3).

    ``shift`` (0..1) moves the content right and down in pixels: with a fractional shift, even
    rotations by multiples of 90 degrees interpolate.
    """
    radians = math.radians(degrees)
    c, s = math.cos(radians), math.sin(radians)
    if degrees % 90 == 0:
        c, s = round(c), round(s)
    return _transform(image, torch.tensor([[c, -s], [s, c]], dtype=torch.float64), shift)


def rescaled(image: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Resize an image (1,1,H,W) by about ``factor`` with antialiasing; returns the new image and
    the exact H (3,3).
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
    """Repeatability between an image and its rotated (``kind`` "rotation", ``values`` in degrees)
    or resized ("scale", factors) copies; one row per value.

    If the keypoints have angles, also the orientation error of those repeated within 3 px: its
    median in degrees (``turn.median``) and the fraction within 15 degrees (``turn.right``).
    ``shift`` is that of ``rotated``.
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
        copy, H = make[kind](original, value)
        b = as_features(detect(copy), (copy.shape[-1], copy.shape[-2]))
        metrics = homography_metrics(a, b, H, num_keypoints=num_keypoints, protocols=("mutual",))
        if a.descriptors is not None and b.descriptors is not None:
            pairs = match(a[:num_keypoints], b[:num_keypoints]).index
            accuracy = m.matching_accuracy(m.match_errors(a.xy, b.xy, H, pairs))
            metrics |= {"mma@3": accuracy["mma@3"], "matches": len(pairs)}
        if bool(a.angle.any()) or bool(b.angle.any()):
            i, j = m.repeated_points(
                a.xy,
                b.xy,
                H,
                size[::-1],
                (copy.shape[-2], copy.shape[-1]),
                num_keypoints=num_keypoints,
            )
            if len(i):
                errors = m.orientation_errors(a.xy[i], a.angle[i], b.angle[j], H)
                correct = float((errors <= ROTATION_TOLERANCE).double().mean())
                metrics |= {"turn.median": float(errors.median()), "turn.right": correct}
        rows.append(
            {
                "kind": kind,
                "value": value,
                "ok": True,
                "reason": "",
                "metrics": {**metrics, "points": len(b)},
            }
        )
    return rows


def bias(
    detect: System, image: ImageLike, *, num_keypoints: int = EVALUATION_NUM_KEYPOINTS
) -> list[dict[str, Any]]:
    """Median displacement (dx, dy) in px between the keypoints of an image and those of its
    mirrored or rotated copy, mapped back.

    A detector with a constant localization offset shows twice that offset. None without paired
    keypoints. A further row, ``anchoring``, tells whether the strongest keypoints lie on structure
    (``anchoring.Anchoring``).
    """
    original = load_image(image)
    h, w = original.shape[-2:]
    a = as_features(detect(original), (w, h)).xy[:num_keypoints].double()
    rows = []
    for kind, dims in (("mirror_x", (-1,)), ("mirror_y", (-2,)), ("rotation_180", (-2, -1))):
        b = as_features(detect(original.flip(dims)), (w, h)).xy[:num_keypoints].double()
        for dim in dims:
            b[:, 0 if dim == -1 else 1] = original.shape[dim] - 1 - b[:, 0 if dim == -1 else 1]
        metrics: dict[str, float | None] = {"dx": None, "dy": None, "points": 0}
        index_a, index_b, _ = m.mutual_nearest(a, b, REACH)
        if len(index_a):
            dx, dy = (a[index_a] - b[index_b]).median(dim=0).values.tolist()
            metrics = {"dx": dx, "dy": dy, "points": len(index_a)}
        rows.append({"kind": kind, "metrics": metrics, "ok": True, "reason": ""})
    rank = percentiles(original, a[:ANCHORED_KEYPOINTS].float())
    anchoring: dict[str, float | None] = {"median": None, "below_half": None, "points": len(rank)}
    if len(rank):
        anchoring |= {
            "median": float(rank.median()),
            "below_half": float((rank < 0.5).float().mean()),
        }
    rows.append({"kind": "anchoring", "metrics": anchoring, "ok": True, "reason": ""})
    return rows
