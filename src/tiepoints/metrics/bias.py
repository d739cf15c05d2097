"""Localization bias of a detector, measured with mirrored images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..keypoints import detect_peaks
from .repeatability import mutual_nearest

#: Maximum distance of a keypoint pair in pixels, and number of keypoints in image and mirror image.
REACH = 6.0
POINTS = 500


def mirror_offsets(
    net: Callable[[Tensor], Tensor],
    image: Tensor,
    dim: int,
    *,
    offset: tuple[float, float] = (0.0, 0.0),
    threshold: float = 0.0,
) -> Tensor:
    """Differences (K,) in pixels between the keypoints of an image and of its mirror image.

    Keypoints of the mirror image are mirrored back for the comparison. A detector with a bias of d
    gives 2 d.

    Args:
        net: gray image (1,1,H,W) -> score map (1,1,H,W).
        image: gray image (1,1,H,W).
        dim: axis of mirroring and comparison: -1 = x, -2 = y.
        offset: (x, y) bias that is subtracted from all keypoints first.
        threshold: minimum score of a keypoint.
    """
    with torch.inference_mode():
        maps = torch.cat([net(image), net(image.flip(dim))])
    (xy, _), (mirrored, _) = (
        (keypoints - keypoints.new_tensor(offset), score)
        for keypoints, score in detect_peaks(maps, POINTS, threshold=threshold)
    )
    axis = 0 if dim == -1 else 1
    mirrored[:, axis] = image.shape[dim] - 1 - mirrored[:, axis]
    a, b, _ = mutual_nearest(xy, mirrored, REACH)
    return (xy[a] - mirrored[b])[:, axis]


def constant_offset(
    net: Callable[[Tensor], Tensor], images: Iterable[Tensor]
) -> tuple[float, float]:
    """Localization bias (x, y) of a network in pixels: half the median of ``mirror_offsets``."""
    offsets: dict[int, list[Tensor]] = {-1: [], -2: []}
    for image in images:
        for dim, per_image in offsets.items():
            per_image.append(mirror_offsets(net, image, dim))
    x, y = (torch.cat(parts) if parts else torch.zeros(0) for parts in offsets.values())
    return tuple(float(v.median()) / 2 if len(v) else 0.0 for v in (x, y))  # type: ignore[return-value]
