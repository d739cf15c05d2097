"""The two other published Key.Net networks, with the preprocessing of their training.

Sources: variant B, the official TensorFlow code of Barroso-Laguna et al., ICCV 2019; variant C, the
retrained port of the REKD authors (Lee et al., CVPR 2022). Variant A, which new work should use, is
``keynet.KeyNet``.

Differences from ``KeyNet``: every level is resized directly from the full image after a Gaussian
blur that is not normalized and brightens it, then its local contrast is normalized; Sobel filters
are not divided, borders are zero, resizing aligns the corners, and the merged levels are batch
normalized before the last filter. These choices are accidents of the published code, kept because
weights only work with the preprocessing of their training.

In:  image (B,1,H,W), float32 gray in [0,1], any size from 1 x 1 up; each image is divided by its
own maximum inside. Out: score map (B,1,H,W), >= 0.

``LegacyDetector`` is the published TensorFlow extraction, which ``official=True`` uses for these
networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..filters import blur_separable, normalize_contrast, unnormalized_gaussian_taps
from ..keypoints import clear_border, local_maxima
from ..pyramid import SCALE_STEP, LevelBudget, Pyramid, level_budgets
from ..structs import Keypoints
from .spec import DetectorSpec

NUM_FILTERS = 8  # paper 5.3, the only published width
NUM_BLOCKS = 3
KERNEL_SIZE = 5
NUM_LEVELS = 3
SCALE_FACTOR = 1.2
TENSORFLOW_EPS = 1e-3  # defaults of batch normalization in the two frameworks
PYTORCH_EPS = 1e-5


#: Handcrafted channels in the order of both published weight files (not the order of ``KeyNet``).
CHANNELS = ("dx", "dx^2", "dxx", "dy", "dy^2", "dyy", "dx*dy", "dxx*dyy", "dxy", "dxy^2")


def level_size(height: int, width: int, level: int, *, float32: bool) -> tuple[int, int]:
    """Size (height, width) of ``level`` 0, 1, 2, ..., computed from the full size, never below
    1 x 1.

    ``float32`` multiplies by the reciprocal in single precision, because TensorFlow's graph
    optimizer rewrites a division by a constant in this way. The reference maps confirm it for level
    1 (240 -> 200, where true float32 division gives 199); for level 2 it is inferred, and changes a
    few sizes (180, 324, 360, 612, ...) by one pixel.
    """
    factor = SCALE_FACTOR**level
    reciprocal = np.float32(1) / np.float32(factor)
    h, w = (
        int(np.float32(side) * reciprocal) if float32 else int(side / factor)
        for side in (height, width)
    )
    return max(1, h), max(1, w)


def divide_by_maximum(image: Tensor) -> Tensor:
    """Each image of (B,1,H,W) divided by its own largest value; black images stay black."""
    largest = image.amax(dim=(1, 2, 3), keepdim=True)
    return image / torch.where(largest > 0, largest, torch.ones_like(largest))


def _sobel_undivided(image: Tensor) -> tuple[Tensor, Tensor]:
    p = F.pad(image, (1, 1, 1, 1))
    rows = p[..., :-2, :] + 2 * p[..., 1:-1, :] + p[..., 2:, :]  # (B,1,H,W+2)
    cols = p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]  # (B,1,H+2,W)
    return rows[..., 2:] - rows[..., :-2], cols[..., 2:, :] - cols[..., :-2, :]


def legacy_features(image: Tensor) -> Tensor:
    """The ten channels ``CHANNELS``, Sobel undivided and zero border each time: (B,1,H,W) ->
    (B,10,H,W).
    """
    dx, dy = _sobel_undivided(image)
    dxx, dxy = _sobel_undivided(dx)
    dyy = _sobel_undivided(dy)[1]
    return torch.cat(
        [dx, dx.square(), dxx, dy, dy.square(), dyy, dx * dy, dxx * dyy, dxy, dxy.square()], dim=1
    )


def _resize_corners(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size=size, mode="bilinear", align_corners=True)


class LegacyKeyNet(nn.Module):
    """Variants B (``LegacyKeyNet.tensorflow()``, 5,921 parameters) and C
    (``LegacyKeyNet.rekd_port()``, 5,345).

    Args:
        last_kernel: odd side of the filter that merges the levels: 5 in B, 1 in C.
        norm_eps: constant added to the variance in batch normalization: 1e-3 in B, 1e-5 in C.
        float32_sizes: whether level sizes are computed in single precision, see ``level_size``: yes
            in B, no in C.

    Raises:
        ValueError: ``last_kernel`` is not odd and positive.

    Image (B,1,H,W) in [0,1] -> score map (B,1,H,W) >= 0. For inference with weights from
    ``tiepoints.checkpoints.load_official``; use ``KeyNet`` for training.
    """

    spec: DetectorSpec

    def __init__(
        self, *, last_kernel: int = 5, norm_eps: float = TENSORFLOW_EPS, float32_sizes: bool = True
    ):
        super().__init__()
        if int(last_kernel) != last_kernel or last_kernel < 1 or last_kernel % 2 == 0:
            raise ValueError(f"last_kernel must be an odd integer from 1 up, got {last_kernel}")
        self.settings = {
            "last_kernel": last_kernel,
            "norm_eps": norm_eps,
            "float32_sizes": float32_sizes,
        }
        self.float32_sizes = float32_sizes
        self.floor: float | None = None
        widths = [len(CHANNELS)] + [NUM_FILTERS] * NUM_BLOCKS
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], KERNEL_SIZE, padding=KERNEL_SIZE // 2),
                    nn.BatchNorm2d(widths[i + 1], eps=norm_eps),
                    nn.ReLU(),
                )
                for i in range(NUM_BLOCKS)
            )
        )
        merged = NUM_FILTERS * NUM_LEVELS
        self.last_norm = nn.BatchNorm2d(merged, eps=norm_eps)
        self.last = nn.Conv2d(merged, 1, last_kernel, padding=last_kernel // 2)

    @classmethod
    def tensorflow(cls) -> LegacyKeyNet:
        """Variant B, the official TensorFlow network, untrained."""
        return cls()

    @classmethod
    def rekd_port(cls) -> LegacyKeyNet:
        """Variant C, the network of ``keyNet.pt`` in the REKD repository, untrained."""
        return cls(last_kernel=1, norm_eps=PYTORCH_EPS, float32_sizes=False)

    def level_images(self, image: Tensor) -> list[Tensor]:
        """Contrast-normalized levels (B,1,h,w) of an image divided by its maximum, all resized from
        the full resolution.
        """
        blurred = blur_separable(image, unnormalized_gaussian_taps(), pad_mode="constant")
        levels = [image]
        height, width = image.shape[-2:]
        for level in range(1, NUM_LEVELS):
            levels.append(
                _resize_corners(
                    blurred, level_size(height, width, level, float32=self.float32_sizes)
                )
            )
        return [normalize_contrast(level) for level in levels]

    def forward(self, image: Tensor) -> Tensor:
        """Score map (B,1,H,W) >= 0 of a gray image (B,1,H,W) in [0,1]."""
        if image.ndim != 4 or image.shape[1] != 1:
            raise ValueError(f"expected a gray image (B,1,H,W), got shape {tuple(image.shape)}")
        return self.score(divide_by_maximum(image))

    def score(self, image: Tensor) -> Tensor:
        """``forward`` of an image already divided by its maximum, from which the published pyramid
        is built.
        """
        size = (image.shape[-2], image.shape[-1])
        levels = self.level_images(image)
        maps = [
            _resize_corners(self.blocks(legacy_features(level)), size) for level in levels
        ]  # each (B,8,H,W)
        return F.relu(self.last(self.last_norm(torch.cat(maps, dim=1))))


def _lines_at(image: Tensor, position: Tensor, dim: int) -> Tensor:
    """Linear interpolation of rows (dim -2) or columns (-1) at fractional positions, reflected at
    the center of the border pixels.
    """
    last = image.shape[dim] - 1
    position = position.abs()
    position = torch.where(position > last, 2 * last - position, position).clamp(0, last)
    below = position.long()
    weight = (position - below).view((-1, 1) if dim == -2 else (1, -1))
    above = (below + 1).clamp(max=last)
    return torch.lerp(image.index_select(dim, below), image.index_select(dim, above), weight)


def _resize_by(image: Tensor, size: tuple[int, int], steps: tuple[float, float]) -> Tensor:
    """Bilinear samples at ``(i + 0.5) * step - 0.5``; (B,1,H,W) -> (B,1,h,w) = ``size``."""
    for dim, count, step in ((-2, size[0], steps[0]), (-1, size[1], steps[1])):
        image = _lines_at(
            image,
            (torch.arange(count, dtype=image.dtype, device=image.device) + 0.5) * step - 0.5,
            dim,
        )
    return image


def _blur_before_reduction(image: Tensor) -> Tensor:
    """Gaussian blur of sigma 2 * sqrt(2) / 6, five taps, border reflected with the edge pixel
    repeated (scikit-image's pyramid).
    """
    u = torch.arange(-2, 3, dtype=image.dtype, device=image.device)
    taps = torch.exp(-0.5 * (u / (2 * SCALE_STEP / 6)) ** 2)
    taps = taps / taps.sum()
    for dim in (-2, -1):
        n = image.shape[dim]
        rows = torch.arange(-2, n + 2, device=image.device)
        rows = torch.where(
            rows < 0, -1 - rows, torch.where(rows >= n, 2 * n - 1 - rows, rows)
        ).clamp(0, n - 1)
        padded = image.index_select(dim, rows)
        image = sum(taps[i] * padded.narrow(dim, i, n) for i in range(5))  # type: ignore[assignment]
    return image


def legacy_levels(image: Tensor, up: int, down: int, min_side: int) -> list[tuple[Tensor, float]]:
    """Levels of the published TensorFlow and REKD pyramids, finest first, with nominal scales.

    Enlarged levels are resized from the image (factor exact, size rounded), reduced ones from the
    previous level (size rounded up). ``image`` (B,1,H,W) is float64, as published. Levels smaller
    than ``min_side`` are skipped.
    """
    h, w = image.shape[-2:]
    levels = []
    for i in range(up, 0, -1):
        factor = SCALE_STEP**i
        levels.append(
            (
                _resize_by(image, (round(h * factor), round(w * factor)), (1 / factor, 1 / factor)),
                1 / factor,
            )
        )
    levels.append((image, 1.0))
    for i in range(1, down + 1):
        rows, cols = image.shape[-2:]
        size = math.ceil(rows / SCALE_STEP), math.ceil(cols / SCALE_STEP)
        if size == (rows, cols) or min(size) < min_side:
            break
        image = _resize_by(_blur_before_reduction(image), size, (rows / size[0], cols / size[1]))
        levels.append((image, SCALE_STEP**i))
    return levels


class LegacyDetector:
    """The extraction of the published TensorFlow code: pyramid -> keypoints of every image of the
    batch.

    Of each level the strongest local maxima of its score map are kept, half as many as of the level
    before; what a level leaves of its number is passed on. Errors of that code are kept: keypoints
    are mapped by the nominal factor without the half-pixel offset, and equal scores at the budget
    of a level are cut in reading order. Only the image of the pyramid is used; the levels are those
    of ``legacy_levels``.

    Args:
        net: a ``LegacyKeyNet``, or another network with its method ``score``.
        options: the fields ``num_keypoints`` (published: 1500), ``up_levels`` and ``down_levels``
            (published: 1 and 5; the published sample file: 1 and 4), ``nms_window``, ``border``,
            ``threshold`` and ``cut_ratio`` of ``DetectOptions``, of which no level is None.
    """

    def __init__(self, net: nn.Module, options: Any):
        self.net, self.num_keypoints = net, options.num_keypoints
        self.up_levels, self.down_levels = options.up_levels, options.down_levels
        self.nms_window, self.border = options.window, options.margin
        self.threshold, self.cut_ratio = max(0.0, options.threshold), options.cut_ratio or 0.0

    @torch.inference_mode()
    def __call__(
        self, pyramid: Pyramid, masks: Sequence[Tensor | None] | None = None
    ) -> list[Keypoints]:
        """Keypoints of each image, strongest first; ``masks`` (H,W) bool, true where keypoints may
        lie.
        """
        masks = [None] * len(pyramid.image) if masks is None else masks
        whole = pyramid.levels[pyramid.original]  # smaller than the image with ``max_size``
        found = [
            self._one(image[None], mask) for image, mask in zip(pyramid.image, masks, strict=True)
        ]
        if (whole.ratio_x, whole.ratio_y) == (1.0, 1.0):
            return found
        ratio = torch.tensor([whole.ratio_x, whole.ratio_y])
        return [
            replace(points, xy=points.xy * ratio.to(points.xy), scale=points.scale * whole.scale)
            for points in found
        ]

    def _scores(self, level: Tensor) -> Tensor:
        """Score map (1,1,h,w) of a level, float64, of an image divided by its maximum."""
        return self.net.score(level.float())  # type: ignore[operator]

    def _budgets(self) -> list[int]:
        """Number of keypoints of each level, finest first."""
        return level_budgets(
            self.num_keypoints, self.up_levels, self.up_levels + 1 + self.down_levels
        )

    def _one(self, image: Tensor, mask: Tensor | None) -> Keypoints:
        divided = divide_by_maximum(image.double())
        levels = legacy_levels(divided, self.up_levels, self.down_levels, 2 * self.border + 1)
        parts: list[Keypoints] = []
        left = LevelBudget()
        for (level, nominal), budget in zip(levels, self._budgets(), strict=False):
            count = left.add(budget)
            inner = clear_border(self._scores(level), self.border)
            found = local_maxima(inner, self.nms_window, self.threshold, unique=False)[0, 0]
            found &= inner[0, 0] >= self.cut_ratio * inner.max()
            if mask is not None:
                shape = found.shape
                found &= (
                    F.interpolate(mask[None, None].float(), size=shape, mode="nearest-exact")[
                        0, 0
                    ].to(found.device)
                    > 0
                )
            yx, score = found.nonzero(), inner[0, 0][found]
            if len(score) > count:
                lowest = score.topk(count).values[-1] if count > 0 else torch.inf
                kept = (score >= lowest).nonzero()[:count, 0]
                yx, score = yx[kept], score[kept]
            left.use(len(score))
            xy = (yx.flip(-1).double() * nominal).float()
            scale = torch.full_like(score, nominal * math.sqrt(1 + np.finfo(np.float32).eps))
            parts.append(Keypoints(xy, scale, torch.zeros_like(score), score))
        keypoints = Keypoints.concatenate(parts)
        order = keypoints.score.argsort(descending=True, stable=True)
        return keypoints[order[: self.num_keypoints]]


LegacyKeyNet.spec = DetectorSpec(official=LegacyDetector)
