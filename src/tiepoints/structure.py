"""Image structure for training: where corners are, and what a keypoint beside them costs."""

from __future__ import annotations

import torch
from torch import Tensor

from .filters import corner_strength, percentile_rank
from .keypoints import max_filter

GAUSSIAN_SIGMA = 1.5

#: Where a peak may lie: window of the structure tensor in pixels, the percentiles from which a peak
#: counts, and counts fully, and the side of the window whose strongest pixel it is compared with.
ANCHOR_SIGMA = 2.0
ANCHOR_LOW, ANCHOR_HIGH = 0.6, 0.95
ANCHOR_WINDOW = 13


def anchor_weight(image: Tensor, pull: float = 0.0) -> Tensor:
    """How much a keypoint at each pixel of a gray image lies on structure: (B,1,H,W) -> (B,1,H,W)
    in [0,1].

    A linear ramp of the pixel's percentile by ``filters.corner_strength``, from 0 at ``ANCHOR_LOW``
    to 1 at ``ANCHOR_HIGH``.

    Args:
        pull: 0..1, how much it also counts that a pixel is the strongest one nearby: the ramp is
            multiplied by ``1 - pull + pull r``, r the strength over the largest one within
            ``ANCHOR_WINDOW``.
    """
    with torch.no_grad():
        strength = corner_strength(image, ANCHOR_SIGMA)
        ramp = ((percentile_rank(strength) - ANCHOR_LOW) / (ANCHOR_HIGH - ANCHOR_LOW)).clamp(0, 1)
        return ramp * (
            1 - pull + pull * strength / max_filter(strength, ANCHOR_WINDOW).clamp(min=1e-12)
        )
