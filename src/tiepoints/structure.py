"""Image structure for training: a weight that is high at corners."""

from __future__ import annotations

import torch
from torch import Tensor

from .filters import corner_strength, percentile_rank
from .keypoints import max_filter

#: Sigma in pixels of the Gaussian peaks of target score maps.
GAUSSIAN_SIGMA = 1.5
#: Sigma of the structure tensor's window in pixels, the percentiles of corner strength at which the
#: weight begins to rise and reaches 1, and the side of the window of the local maximum.
ANCHOR_SIGMA = 2.0
ANCHOR_LOW, ANCHOR_HIGH = 0.6, 0.95
ANCHOR_WINDOW = 13


def anchor_weight(image: Tensor, pull: float = 0.0) -> Tensor:
    """Weight of a keypoint at each pixel of a gray image by its corner strength: (B,1,H,W) ->
    (B,1,H,W) in [0,1].

    A linear ramp of the pixel's percentile by ``filters.corner_strength``, from 0 at ``ANCHOR_LOW``
    to 1 at ``ANCHOR_HIGH``.

    Args:
        pull: 0..1, preference for the strongest pixel nearby: the ramp is multiplied by ``1 - pull
            + pull r``, with r the strength divided by the largest one within ``ANCHOR_WINDOW``.
    """
    with torch.no_grad():
        strength = corner_strength(image, ANCHOR_SIGMA)
        ramp = ((percentile_rank(strength) - ANCHOR_LOW) / (ANCHOR_HIGH - ANCHOR_LOW)).clamp(0, 1)
        return ramp * (
            1 - pull + pull * strength / max_filter(strength, ANCHOR_WINDOW).clamp(min=1e-12)
        )
