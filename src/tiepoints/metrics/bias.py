"""Mirror bias of a detector: does it answer beside the thing it answers to?"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..keypoints import detect_peaks
from .repeatability import mutual_nearest

#: Points are paired when nearer than this, in pixels, among the strongest so many of image and
#: mirror image.
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
    """Differences along ``dim`` (-1 = x, -2 = y) of detections on an image and on its mirror image,
    flipped back: (K,).

    ``offset`` is subtracted from every detection first. A detector that answers everything at +d
    gives 2 d.
    """
    with torch.inference_mode():
        maps = torch.cat([net(image), net(image.flip(dim))])
    (xy, _), (mirrored, _) = (
        (points - points.new_tensor(offset), score)
        for points, score in detect_peaks(maps, POINTS, threshold=threshold)
    )
    axis = 0 if dim == -1 else 1
    mirrored[:, axis] = image.shape[dim] - 1 - mirrored[:, axis]
    a, b, _ = mutual_nearest(xy, mirrored, REACH)
    return (xy[a] - mirrored[b])[:, axis]


def constant_offset(
    net: Callable[[Tensor], Tensor], images: Iterable[Tensor]
) -> tuple[float, float]:
    """The constant (x, y) in pixels by which a network's points miss their place: half the median
    mirror offset.
    """
    found: dict[int, list[Tensor]] = {-1: [], -2: []}
    for image in images:
        for dim, parts in found.items():
            parts.append(mirror_offsets(net, image, dim))
    x, y = (torch.cat(parts) if parts else torch.zeros(0) for parts in found.values())
    return tuple(float(v.median()) / 2 if len(v) else 0.0 for v in (x, y))  # type: ignore[return-value]
