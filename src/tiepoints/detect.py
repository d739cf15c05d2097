"""Keypoints from a score map network: pyramid levels, keypoint budgets, non-maximum suppression and
sub-pixel positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import sample_at
from .keypoints import BORDER, NMS_WINDOW, clear_border, local_maxima, refine, strongest
from .names import EXTRACT_NUM_KEYPOINTS, NMS_SHAPES
from .orientation import angle_at
from .pyramid import SCALE_STEP, Level, LevelBudget, Pyramid, level_budgets
from .structs import Keypoints

#: Keypoints of different levels are duplicates if nearer than this, in pixels of the finer level.
DUPLICATE_DISTANCE = 3.0
#: Each level proposes this many times its budget, because duplicates are removed.
SURPLUS = 2.0
#: Rows of the matrix of distances between keypoints in memory at a time.
BLOCK = 2048


@dataclass(frozen=True)
class DetectOptions:
    """How keypoints are selected from score maps.

    Attributes:
        num_keypoints: maximum number of keypoints per image.
        official: the published extraction, including its errors (docs/models.md).
        per_scale: keep a keypoint on every level where it is detected, with the level's scale, for
            matching across large scale changes; False keeps one keypoint per location, on the level
            with the strongest response, with a continuous scale. ``official`` always keeps all.
        up_levels, down_levels: enlarged and reduced pyramid levels; None = as published for the
            network (``DetectorSpec``).
        nms_window: odd side of the suppression window in pixels of the level.
        nms_shape: ``square`` or ``round``; None = the network's (``DetectorSpec``).
        border: width of the margin of each level without keypoints, in pixels.
        threshold: smallest response, before it is weighted by scale; responses up to that to a
            constant image are excluded too, except with ``official``.

    Raises:
        ValueError: an option is out of range.
    """

    num_keypoints: int = EXTRACT_NUM_KEYPOINTS
    official: bool = False
    per_scale: bool = False
    up_levels: int | None = None
    down_levels: int | None = None
    nms_window: int = NMS_WINDOW
    nms_shape: str | None = None
    border: int = BORDER
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.num_keypoints < 1:
            raise ValueError(f"num_keypoints must be at least 1, got {self.num_keypoints}")
        if self.nms_window < 1 or self.nms_window % 2 == 0:
            raise ValueError(f"nms_window must be odd and positive, got {self.nms_window}")
        if self.nms_shape not in (None, *NMS_SHAPES):
            raise ValueError(
                f"nms_shape must be one of {', '.join(NMS_SHAPES)}, or None for the network's; "
                f"got {self.nms_shape!r}"
            )
        if min(self.up_levels or 0, self.down_levels or 0, self.border) < 0:
            raise ValueError("up_levels, down_levels and border must not be negative")


def score_maps(net: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """A network's score map only, without the angle map that some networks also return."""

    def scores(image: Tensor) -> Tensor:
        output = net(image)
        return output if isinstance(output, Tensor) else output[0]

    return scores


def response_floor(net: Callable[[Tensor], Tensor], device: torch.device | str = "cpu") -> float:
    """The response of a network to a constant image, away from the border."""
    with torch.inference_mode():
        image = torch.full((1, 1, 65, 65), 0.5, device=device)
        return float(score_maps(net)(image)[0, 0, 32, 32])


class ScoreMapDetector:
    """Detect keypoints with a score map network: pyramid -> keypoints of each image of the batch.

    Args:
        net: (B,1,H,W) in [0,1] -> score map (B,1,H,W) >= 0, or score map and angle map (B,1,H,W) in
            radians. Its attribute ``floor``, the response to a constant image, is stored with the
            weights; without it, it is measured on first use.
        options: see ``DetectOptions``.
        scale_power: scores are multiplied by the scale of their level to this power before levels
            are compared.
    """

    def __init__(
        self,
        net: Callable[[Tensor], Any],
        options: DetectOptions,
        *,
        device: torch.device | str = "cpu",
        scale_power: float = 2.0,
    ):
        self.net, self.options, self.device, self.scale_power = net, options, device, scale_power
        self.offset = getattr(net, "offset", (0.0, 0.0))

    @cached_property
    def floor(self) -> float:
        """The response of the network to a constant image; 0 with ``official``."""
        if self.options.official:
            return 0.0
        stored = getattr(self.net, "floor", None)
        return response_floor(self.net, self.device) if stored is None else stored

    @property
    def threshold(self) -> float:
        """Smallest response of a keypoint, above ``floor`` plus rounding errors."""
        if self.options.official:
            return max(self.options.threshold, 0.0)
        return max(self.options.threshold, self.floor * (1 + 1e-3) + 1e-6)

    def __call__(
        self, pyramid: Pyramid, masks: Sequence[Tensor | None] | None = None
    ) -> list[Keypoints]:
        """Keypoints of each image; ``masks`` (H,W) bool, true where keypoints may lie."""
        with torch.inference_mode():
            outputs = [self.net(level.image) for level in pyramid.levels]
        maps = [output if isinstance(output, Tensor) else output[0] for output in outputs]
        angles = None if isinstance(outputs[0], Tensor) else [output[1] for output in outputs]
        masks = [None] * len(pyramid.image) if masks is None else masks
        return [
            self.select(
                pyramid,
                [m[i, 0] for m in maps],
                masks[i],
                None if angles is None else [a[i, 0] for a in angles],
            )
            for i in range(len(pyramid.image))
        ]

    def select(
        self,
        pyramid: Pyramid,
        maps: list[Tensor],
        mask: Tensor | None = None,
        angles: list[Tensor] | None = None,
    ) -> Keypoints:
        """Keypoints of one image from the score maps (h,w), and angle maps, of its levels."""
        select = self._official if self.options.official else self._default
        return select(pyramid, maps, mask, angles)

    def _official(
        self, pyramid: Pyramid, maps: list[Tensor], mask: Tensor | None, angles: list[Tensor] | None
    ) -> Keypoints:
        """The published selection: border cleared before suppression, plateaus kept, integer
        positions, scaled without the half-pixel offset.
        """
        options = self.options
        budgets = level_budgets(options.num_keypoints, pyramid.original, len(maps))
        parts: list[Keypoints] = []
        left = LevelBudget()
        for i, (level, score_map, budget) in enumerate(
            zip(pyramid.levels, maps, budgets, strict=True)
        ):
            allowed = left.add(budget)
            inner = clear_border(score_map[None, None], options.border)
            found = local_maxima(inner, options.nms_window, self.threshold, unique=False)[0, 0]
            found &= _level_mask(mask, level, found)
            xy, score = strongest(inner[0, 0], found, allowed)
            left.use(len(xy))
            ratio = xy.new_tensor([level.ratio_x, level.ratio_y], dtype=torch.float64)
            scale = torch.full_like(score, level.nominal_scale)
            angle = torch.zeros_like(score) if angles is None else angle_at(angles[i], xy)
            parts.append(Keypoints((xy * ratio).float(), scale, angle, score))
        return Keypoints.concatenate(parts)

    def _default(
        self, pyramid: Pyramid, maps: list[Tensor], mask: Tensor | None, angles: list[Tensor] | None
    ) -> Keypoints:
        """Sub-pixel positions mapped exactly, one keypoint per plateau, no duplicates across
        levels, strongest first.
        """
        options = self.options
        budgets = level_budgets(options.num_keypoints, pyramid.original, len(maps))
        surplus = SURPLUS if len(maps) > 1 else 1.0
        parts: list[Keypoints] = []
        for i, (level, score_map, budget) in enumerate(
            zip(pyramid.levels, maps, budgets, strict=True)
        ):
            found = local_maxima(
                score_map[None, None],
                options.nms_window,
                self.threshold,
                shape=options.nms_shape or "square",
            )
            found = (clear_border(found.to(score_map.dtype), options.border) > 0)[0, 0]
            found &= _level_mask(mask, level, found)
            count = int(surplus * budget) + options.num_keypoints - sum(budgets) + 1
            xy, score = strongest(score_map, found, count)
            refined = refine(score_map, xy)
            position = level.to_original(refined - refined.new_tensor(self.offset))
            scale = torch.full_like(score, level.scale)
            if not options.per_scale:
                scale = scale * self._scale_factor(pyramid, maps, i, position)
            angle = torch.zeros_like(score) if angles is None else angle_at(angles[i], refined)
            parts.append(Keypoints(position, scale, angle, score))
        level_of = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])
        keypoints = Keypoints.concatenate(parts)
        scales = [level.scale for level in pyramid.levels]
        kept = torch.ones(len(keypoints), dtype=torch.bool)
        if not options.per_scale:
            kept = ~_duplicates(keypoints, level_of.to(keypoints.xy.device), scales)
        # Without this weight, most keypoints would be on the finest level.
        weight = torch.tensor([scale**self.scale_power for scale in scales])[level_of]
        keypoints = replace(keypoints, score=keypoints.score * weight.to(keypoints.score))
        selected = _within_budgets(
            level_of, kept.cpu(), budgets, options.num_keypoints, keypoints.score.cpu()
        )
        keypoints = keypoints[selected.to(keypoints.xy.device)]
        order = keypoints.score.argsort(descending=True, stable=True)
        return keypoints[order]

    def _scale_factor(
        self, pyramid: Pyramid, maps: list[Tensor], index: int, position: Tensor
    ) -> Tensor:
        """Factors (N,) >= 1 from the scale of level ``index`` to the scales of its keypoints at
        positions (N,2).

        A corner has similar responses on all levels up to the one where its surroundings interfere.
        That level follows the scale of the image; the level of the strongest response hardly does
        (docs/diary.md). Each coarser level adds the square root of its response at the position
        relative to the keypoint's own.
        """
        own = None
        levels_above = torch.zeros(len(position), device=position.device)
        for level, score_map in zip(pyramid.levels[index:], maps[index:], strict=True):
            xy = level.from_original(position) + position.new_tensor(self.offset)
            response = (
                sample_at(score_map[None, None], xy[None], padding="border")[0, 0] - self.floor
            ).clamp(min=0)
            if own is None:
                own = response.clamp(min=1e-9)
            else:
                levels_above = levels_above + (response / own).clamp(max=1).sqrt()
        return SCALE_STEP**levels_above


def _level_mask(mask: Tensor | None, level: Level, like: Tensor) -> Tensor:
    """``mask`` of the original image at a level: (h,w) bool."""
    if mask is None:
        return torch.ones_like(like)
    resized = F.interpolate(mask[None, None].float(), size=like.shape, mode="nearest-exact")
    return resized[0, 0].to(like.device) > 0


def _duplicates(keypoints: Keypoints, level_of: Tensor, scales: list[float]) -> Tensor:
    """Keypoints (N,) bool near a stronger one of any other level; ``scales`` of the levels, finest
    first.
    """
    drop = torch.zeros(len(keypoints), dtype=torch.bool, device=keypoints.xy.device)
    for fine, scale in enumerate(scales):
        a, b = (level_of == fine).nonzero()[:, 0], (level_of > fine).nonzero()[:, 0]
        if not len(a) or not len(b):
            continue
        for part in b.split(BLOCK):  # blocks bound the memory
            near_b, near_a = (
                torch.cdist(keypoints.xy[part], keypoints.xy[a]) < DUPLICATE_DISTANCE * scale
            ).nonzero(as_tuple=True)
            stronger = keypoints.score[part[near_b]] > keypoints.score[a[near_a]]
            drop[a[near_a[stronger]]] = True
            drop[part[near_b[~stronger]]] = True
    return drop


def _within_budgets(
    level_of: Tensor, kept: Tensor, budgets: list[int], count: int, score: Tensor
) -> Tensor:
    """Indices of at most ``count`` keypoints: the budget of each level, of which the unused part is
    passed on to the next level, then the strongest of the rest.
    """
    parts: list[Tensor] = []
    left = LevelBudget()
    for level, budget in enumerate(budgets):
        of_level = ((level_of == level) & kept).nonzero()[:, 0][: left.add(budget)]
        left.use(len(of_level))
        parts.append(of_level)
    index = torch.cat(parts)
    rest = kept.clone()
    rest[index] = False
    surplus = rest.nonzero()[:, 0]
    fill = surplus[score[surplus].argsort(descending=True, stable=True)[: count - len(index)]]
    return torch.cat([index, fill])
