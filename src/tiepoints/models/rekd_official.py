"""The published extraction of REKD (Lee, Kim, Cho, CVPR 2022), which ``official=True`` uses.

It is that of the TensorFlow Key.Net with another budget per level, and reads one orientation per
keypoint, on which the published filter of matches (``matching.filter_by_rotation``) acts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..structs import Keypoints
from .keynet_legacy import LegacyDetector, divide_by_maximum


class OfficialREKD(LegacyDetector):
    """Pyramid -> keypoints of each image, strongest first, inside the image, with angles.

    Kept as published: the budget of a level is one keypoint larger; angles are whole bins of the
    orientation histogram of the unscaled level, read one pixel up and left of the keypoint, on the
    opposite border for keypoints within half a pixel of the left and upper ones.

    Args:
        net: fused REKD, image (B,1,H,W) -> score and angle maps (B,1,H,W); its attribute ``group``
            is the number of orientations.
        options: see ``LegacyDetector``.
    """

    def _scores(self, level: Tensor) -> Tensor:
        return self.net(level.float())[0]

    def _budgets(self) -> list[int]:
        return [budget + 1 for budget in super()._budgets()]

    def _one(self, image: Tensor, mask: Tensor | None) -> Keypoints:
        keypoints = super()._one(image, mask)
        height, width = image.shape[-2:]
        limit = keypoints.xy.new_tensor([width - 1, height - 1])
        xy = torch.minimum(keypoints.xy, limit).clamp(min=0)
        divided = divide_by_maximum(image.double()).float()
        angle = whole_bins(self.net(divided)[1][0, 0], cast(int, self.net.group))
        return replace(keypoints, xy=xy, angle=published_angle(angle, xy))


def whole_bins(angle: Tensor, group: int) -> Tensor:
    """Angles in radians (``structs``), interpolated between the strongest bin of N and its
    neighbors, rounded to the bin.
    """
    step = 2 * math.pi / group
    return (angle / step).round().remainder(group) * step


def published_angle(angles: Tensor, xy: Tensor) -> Tensor:
    """Values (N,) of an angle map (h,w) at points (N,2) as the published code reads them, at
    ``round(x - 1), round(y - 1)``, where -1 is the last column or row.
    """
    index = torch.from_numpy(np.rint(xy.double().cpu().numpy() - 1)).long()
    x, y = index.to(angles.device).unbind(dim=-1)
    return angles[y, x]
