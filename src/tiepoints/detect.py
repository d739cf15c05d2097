"""A network image -> score map as a detector: levels, budgets of keypoints, suppression, sub-pixel
positions (spec section 2).
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
from .pyramid import SCALE_STEP, Level, Pyramid, level_budgets
from .structs import Keypoints

#: Two keypoints of different levels are the same one when nearer than this, in pixels of the finer
#: level.
DUPLICATE_DISTANCE = 3.0
#: Duplicates and masks cost keypoints, so each level offers this many times its budget.
SURPLUS = 2.0
#: Rows of distances between keypoints held at a time.
BLOCK = 2048


@dataclass(frozen=True)
class DetectOptions:
    """How keypoints are selected from score maps.

    Attributes:
        num_keypoints: maximum number of keypoints per image.
        official: the published extraction with its faults (docs/models.md).
        per_scale: keep a corner on every level that finds it, with the level's scale, for matching
            across large changes of scale; False keeps one keypoint per location, on the level where
            it is strongest, with a continuous scale. ``official`` always keeps all.
        up_levels, down_levels: enlarged and reduced pyramid levels; None = as published for the
            network (``DetectorSpec``).
        nms_window: odd side of the suppression window in pixels of the level.
        nms_shape: ``square`` or ``round``; None = as is best for the network (``DetectorSpec``).
        border: pixels of each level without keypoints.
        threshold: smallest response, before it is weighted by area; the network's response to an
            image without content is excluded too, except in ``official`` mode.

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
    """A network's score map alone: of one that gives an angle map too, the first of both."""

    def scores(image: Tensor) -> Tensor:
        found = net(image)
        return found if isinstance(found, Tensor) else found[0]

    return scores


def response_floor(net: Callable[[Tensor], Tensor], device: torch.device | str = "cpu") -> float:
    """The score that a network gives to an image without content, away from the border."""
    with torch.inference_mode():
        image = torch.full((1, 1, 65, 65), 0.5, device=device)
        return float(score_maps(net)(image)[0, 0, 32, 32])


class ScoreMapDetector:
    """A network image -> score map as a detector: pyramid -> keypoints of each image of the batch.

    Args:
        net: (B,1,H,W) in [0,1] -> (B,1,H,W) >= 0, or that and an angle map (B,1,H,W) in radians,
            which gives the angles of the keypoints. Its attribute ``floor``, the response to an
            image without content, is stored with the weights; a network without one is measured on
            first use.
        options: see ``DetectOptions``.
        scale_power: scores of different levels are compared times the level's scale to this power.
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
        """The response of the network to an image without content; 0 in ``official`` mode."""
        if self.options.official:
            return 0.0
        stored = getattr(self.net, "floor", None)
        return response_floor(self.net, self.device) if stored is None else stored

    @property
    def threshold(self) -> float:
        """Smallest response of a keypoint: rounding lifts pixels of a flat area above the floor."""
        if self.options.official:
            return max(self.options.threshold, 0.0)
        return max(self.options.threshold, self.floor * (1 + 1e-3) + 1e-6)

    def __call__(
        self, pyramid: Pyramid, masks: Sequence[Tensor | None] | None = None
    ) -> list[Keypoints]:
        """Keypoints of each image; ``masks`` (H,W) bool, true where keypoints may lie."""
        with torch.inference_mode():
            found = [self.net(level.image) for level in pyramid.levels]
        maps = [one if isinstance(one, Tensor) else one[0] for one in found]
        angles = None if isinstance(found[0], Tensor) else [one[1] for one in found]
        masks = [None] * len(pyramid.image) if masks is None else masks
        select = self._official if self.options.official else self._default
        return [
            select(
                pyramid,
                [m[i, 0] for m in maps],
                masks[i],
                None if angles is None else [a[i, 0] for a in angles],
            )
            for i in range(len(pyramid.image))
        ]

    def _official(
        self, pyramid: Pyramid, maps: list[Tensor], mask: Tensor | None, angles: list[Tensor] | None
    ) -> Keypoints:
        """The published selection: border cleared first, plateaus kept, whole pixels, no half-pixel
        term; angles of the level.
        """
        s = self.options
        budgets = level_budgets(s.num_keypoints, pyramid.original, len(maps))
        parts: list[Keypoints] = []
        requested = selected = 0
        for i, (level, score_map, budget) in enumerate(
            zip(pyramid.levels, maps, budgets, strict=True)
        ):
            requested += budget
            inner = clear_border(score_map[None, None], s.border)
            found = local_maxima(inner, s.nms_window, self.threshold, unique=False)[0, 0]
            found &= _level_mask(mask, level, found)
            xy, score = strongest(inner[0, 0], found, max(0, requested - selected))
            selected += len(xy)
            ratio = xy.new_tensor([level.ratio_x, level.ratio_y], dtype=torch.float64)
            scale = torch.full_like(score, level.nominal_scale)
            angle = torch.zeros_like(score) if angles is None else angle_at(angles[i], xy)
            parts.append(Keypoints((xy * ratio).float(), scale, angle, score))
        return Keypoints.concatenate(parts)

    def _default(
        self, pyramid: Pyramid, maps: list[Tensor], mask: Tensor | None, angles: list[Tensor] | None
    ) -> Keypoints:
        """Exact mapping, sub-pixel positions, one point a plateau, no duplicates across levels,
        strongest first.
        """
        s = self.options
        budgets = level_budgets(s.num_keypoints, pyramid.original, len(maps))
        surplus = SURPLUS if len(maps) > 1 else 1.0
        parts: list[Keypoints] = []
        for i, (level, score_map, budget) in enumerate(
            zip(pyramid.levels, maps, budgets, strict=True)
        ):
            found = local_maxima(
                score_map[None, None], s.nms_window, self.threshold, shape=s.nms_shape or "square"
            )
            found = (clear_border(found.to(score_map.dtype), s.border) > 0)[0, 0]
            found &= _level_mask(mask, level, found)
            xy, score = strongest(
                score_map, found, int(surplus * budget) + s.num_keypoints - sum(budgets) + 1
            )
            refined = refine(score_map, xy)
            position = level.to_original(refined - refined.new_tensor(self.offset))
            scale = torch.full_like(score, level.scale)
            if not s.per_scale:
                scale = scale * self._persistence(pyramid, maps, i, position)
            angle = torch.zeros_like(score) if angles is None else angle_at(angles[i], refined)
            parts.append(Keypoints(position, scale, angle, score))
        rank = torch.cat([torch.arange(len(p)) for p in parts])  # place within its level
        level_of = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])
        points = Keypoints.concatenate(parts)
        kept = torch.ones(len(points), dtype=torch.bool)
        if not s.per_scale:
            kept = ~_duplicates(
                points, level_of.to(points.xy.device), [level.scale for level in pyramid.levels]
            )
        # A coarse point stands for a larger area: without this weight the finest level would
        # outnumber all others.
        area = torch.tensor([level.scale**self.scale_power for level in pyramid.levels])[
            level_of
        ].to(points.score)
        points = replace(points, score=points.score * area)
        chosen = _within_budgets(
            level_of, kept.cpu(), budgets, s.num_keypoints, rank, points.score.cpu()
        )
        points = points[chosen.to(points.xy.device)]
        order = points.score.argsort(descending=True, stable=True)
        return points[order]

    def _persistence(
        self, pyramid: Pyramid, maps: list[Tensor], index: int, position: Tensor
    ) -> Tensor:
        """Factors (N,) >= 1 from the scale of level ``index`` to that of each of its points (N,2).

        A corner answers alike on all levels up to the one where its surroundings interfere, and
        that one moves with the scale of the image where the strongest level hardly does
        (docs/diary.md). Each coarser level counts by the square root of its score there relative to
        the point's own.
        """
        own = None
        reach = torch.zeros(len(position), device=position.device)
        for level, score_map in zip(pyramid.levels[index:], maps[index:], strict=True):
            at = level.from_original(position) + position.new_tensor(self.offset)
            value = (
                sample_at(score_map[None, None], at[None], padding="border")[0, 0] - self.floor
            ).clamp(min=0)
            if own is None:
                own = value.clamp(min=1e-9)
            else:
                reach = reach + (value / own).clamp(max=1).sqrt()
        return SCALE_STEP**reach


def _level_mask(mask: Tensor | None, level: Level, like: Tensor) -> Tensor:
    """``mask`` of the original image at a level: (h,w) bool."""
    if mask is None:
        return torch.ones_like(like)
    resized = F.interpolate(mask[None, None].float(), size=like.shape, mode="nearest-exact")
    return resized[0, 0].to(like.device) > 0


def _duplicates(points: Keypoints, level_of: Tensor, scales: list[float]) -> Tensor:
    """Points (N,) bool near a stronger one of any other level; ``scales`` of the levels, finest
    first.
    """
    drop = torch.zeros(len(points), dtype=torch.bool, device=points.xy.device)
    for fine, scale in enumerate(scales):
        a, b = (level_of == fine).nonzero()[:, 0], (level_of > fine).nonzero()[:, 0]
        if not len(a) or not len(b):
            continue
        for part in b.split(BLOCK):  # blocks bound the memory
            near_b, near_a = (
                torch.cdist(points.xy[part], points.xy[a]) < DUPLICATE_DISTANCE * scale
            ).nonzero(as_tuple=True)
            stronger = points.score[part[near_b]] > points.score[a[near_a]]
            drop[a[near_a[stronger]]] = True
            drop[part[near_b[~stronger]]] = True
    return drop


def _within_budgets(
    level_of: Tensor, kept: Tensor, budgets: list[int], count: int, rank: Tensor, score: Tensor
) -> Tensor:
    """Indices of at most ``count`` points: each level's budget, what it leaves passed on, the rest
    by score.
    """
    chosen: list[Tensor] = []
    requested = selected = 0
    for level, budget in enumerate(budgets):
        requested += budget
        mine = ((level_of == level) & kept).nonzero()[:, 0][: max(0, requested - selected)]
        selected += len(mine)
        chosen.append(mine)
    index = torch.cat(chosen)
    rest = kept.clone()
    rest[index] = False
    surplus = rest.nonzero()[:, 0]
    fill = surplus[score[surplus].argsort(descending=True, stable=True)[: count - len(index)]]
    return torch.cat([index, fill])
