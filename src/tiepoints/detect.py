"""Keypoints from a score map network: pyramid levels, keypoint budgets, non-maximum suppression and
sub-pixel positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .geometry import distances, sample_at
from .keypoints import (
    BORDER,
    NMS_WINDOW,
    SMALL_BORDER,
    SMALL_WINDOW,
    local_maxima,
    refine,
    strongest,
)
from .memory import release_freed
from .names import EXTRACT_NUM_KEYPOINTS, NMS_SHAPES
from .orientation import angle_at
from .pyramid import SCALE_STEP, Level, LevelBudget, Pyramid, level_budgets
from .regions import TILE_PIXELS, Box
from .structs import Keypoints

#: The published suppression: options of evaluations, so that results are those of the papers, and
#: of validations, so that those of training runs are comparable.
PUBLISHED: dict[str, Any] = {"nms_window": NMS_WINDOW, "border": BORDER}
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
        per_scale: keep a keypoint on every level where it is detected, with the level's scale;
            False keeps one keypoint per location, on the level with the strongest response, with a
            continuous scale; None = the network's (``DetectorSpec``). ``official`` always keeps
            all.
        up_levels, down_levels: enlarged and reduced pyramid levels; None = as published for the
            network (``DetectorSpec``).
        nms_window: odd side of the suppression window in pixels of the level; None = the network's
            (``DetectorSpec``), with ``official`` the published ``keypoints.NMS_WINDOW``.
        nms_shape: ``square`` or ``round``; None = the network's (``DetectorSpec``).
        border: width of the margin of each level without keypoints, in pixels; None = the
            network's (``DetectorSpec``), with ``official`` the published ``keypoints.BORDER``.
        threshold: smallest response, before it is weighted by scale; responses up to that to a
            constant image are excluded too, except with ``official``.
        cut_ratio: smallest response as a fraction, in [0, 1), of the largest of its level; None =
            the network's (SobelNet has one).

    Raises:
        ValueError: an option is out of range.
    """

    num_keypoints: int = EXTRACT_NUM_KEYPOINTS
    official: bool = False
    per_scale: bool | None = None
    up_levels: int | None = None
    down_levels: int | None = None
    nms_window: int | None = None
    nms_shape: str | None = None
    border: int | None = None
    threshold: float = 0.0
    cut_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.num_keypoints < 1:
            raise ValueError(f"num_keypoints must be at least 1, got {self.num_keypoints}")
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"nms_window must be odd and positive, got {self.nms_window}")
        if self.nms_shape not in (None, *NMS_SHAPES):
            raise ValueError(
                f"nms_shape must be one of {', '.join(NMS_SHAPES)}, or None for the network's; "
                f"got {self.nms_shape!r}"
            )
        if min(self.up_levels or 0, self.down_levels or 0, self.margin) < 0:
            raise ValueError("up_levels, down_levels and border must not be negative")
        if self.cut_ratio is not None and not 0 <= self.cut_ratio < 1:
            raise ValueError(f"cut_ratio must lie in [0, 1), got {self.cut_ratio}")

    def suppression(
        self, window: int = SMALL_WINDOW, border: int = SMALL_BORDER
    ) -> tuple[int, int]:
        """``nms_window`` and ``border``: as given, else the published ones with ``official``, else
        the defaults of a network.
        """
        if self.official:
            window, border = NMS_WINDOW, BORDER
        return (
            window if self.nms_window is None else self.nms_window,
            border if self.border is None else self.border,
        )

    @property
    def window(self) -> int:
        """Side of the suppression window in pixels."""
        return self.suppression()[0]

    @property
    def margin(self) -> int:
        """Width of the margin without keypoints in pixels."""
        return self.suppression()[1]


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
            weights; without it, it is measured on first use. Its method ``part`` (source, box), the
            pixels of a box of its maps, bounds the memory of large images; its attribute ``ratio``
            is the threshold relative to the maximum of a map, which ``part`` does not apply.
        options: see ``DetectOptions``.
        scale_power: scores are multiplied by the scale of their level to this power before levels
            are compared.
        tile_pixels: pixels of a level that are processed at a time.
    """

    def __init__(
        self,
        net: Callable[[Tensor], Any],
        options: DetectOptions,
        *,
        device: torch.device | str = "cpu",
        scale_power: float = 2.0,
        tile_pixels: int = TILE_PIXELS,
    ):
        self.net, self.options, self.device, self.scale_power = net, options, device, scale_power
        self.tile_pixels = tile_pixels
        self.offset = getattr(net, "offset", (0.0, 0.0))
        self.ratio = float(getattr(net, "ratio", 0.0))
        if options.cut_ratio is not None:
            self.ratio = options.cut_ratio

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
        masks = [None] * pyramid.batch if masks is None else masks
        selections = [_Selection(self, pyramid, mask) for mask in masks]
        with torch.inference_mode():
            for number, level in enumerate(pyramid.levels):
                for box, region, score_map, angle_map in self._maps(level):
                    for i, selection in enumerate(selections):
                        angles = None if angle_map is None else angle_map[i, 0]
                        selection.add(number, box, region, score_map[i, 0], angles)
                for selection in selections:
                    selection.finish_level(number)
        return [selection.keypoints() for selection in selections]

    def _maps(self, level: Level) -> Iterator[tuple[Box, Box, Tensor, Tensor | None]]:
        """Score and angle maps (B,1,h,w) of a level: of a box, grown by what non-maximum
        suppression needs around it (the second box).
        """
        whole = Box.whole(level.size)
        part = getattr(self.net, "part", None)
        boxes = [whole] if part is None else whole.split(self.tile_pixels)
        for box in boxes:
            # a maximum is compared with others in its window, each of which has its own window
            region = box.grow(max(2, 2 * (self.options.window // 2)), level.size)
            output = self.net(level.image) if part is None else part(level.source, region)
            score_map, angle_map = (output, None) if isinstance(output, Tensor) else output
            yield box, region, score_map, angle_map
            if len(boxes) > 1:
                del output, score_map, angle_map
                release_freed()


class _Selection:
    """Keypoints of one image, selected from the score maps of its levels, finest first, which are
    added part by part and not kept.

    The default: sub-pixel positions mapped exactly, one keypoint per plateau, no duplicates across
    levels, strongest first. ``official``: border cleared before suppression, plateaus kept, integer
    positions, scaled without the half-pixel offset.
    """

    def __init__(self, detector: ScoreMapDetector, pyramid: Pyramid, mask: Tensor | None):
        self.detector, self.pyramid, self.mask = detector, pyramid, mask
        self.options = detector.options
        self.official, self.threshold = self.options.official, detector.threshold
        self.budgets = level_budgets(
            self.options.num_keypoints, pyramid.original, len(pyramid.levels)
        )
        self.left = LevelBudget()
        #: Candidates of the parts of the current level.
        self.found: list[_Candidates] = []
        #: Largest scores of these parts, on the device.
        self.maxima: list[Tensor] = []
        self.levels: list[_Candidates] = []

    def add(
        self, number: int, box: Box, region: Box, score_map: Tensor, angle_map: Tensor | None
    ) -> None:
        """Add the maps (h,w) of ``region`` of a level; keypoints are selected in ``box``."""
        level, options = self.pyramid.levels[number], self.options
        self.maxima.append(score_map.max().to(torch.float64))
        self._respond(level, box, region, score_map)
        if self.official:
            score_map = score_map * _inside(region, level.size, options.margin).to(score_map)
            found = local_maxima(
                score_map[None, None], options.window, self.threshold, unique=False
            )[0, 0]
        else:
            shape = options.nms_shape or "square"
            found = local_maxima(
                score_map[None, None], options.window, self.threshold, shape=shape
            )[0, 0]
        selected = torch.zeros_like(found)
        inner = box.intersection(Box.whole(level.size).shrink(options.margin))
        inner.crop(selected, region).copy_(inner.crop(found, region))
        selected = self._masked(selected, region, level)
        xy, score = strongest(score_map, selected, self._count(number))
        corner = xy.new_tensor([region.left, region.top])
        refined = xy.to(torch.float32) if self.official else refine(score_map, xy)
        angle = torch.zeros_like(score) if angle_map is None else angle_at(angle_map, refined)
        own = self._response(score_map, refined).clamp(min=1e-9)
        zeros = torch.zeros_like(score)
        self.found.append(_Candidates(xy + corner, refined + corner, score, angle, own, zeros))

    def _count(self, number: int) -> int:
        """Maximum number of candidates of a level."""
        budget, budgets = self.budgets[number], self.budgets
        if self.official:
            return self.left.allowed(budget)
        surplus = SURPLUS if len(budgets) > 1 else 1.0
        return int(surplus * budget) + self.options.num_keypoints - sum(budgets) + 1

    def _masked(self, found: Tensor, region: Box, level: Level) -> Tensor:
        """Pixels (h,w) bool of ``region`` that the mask of the image allows."""
        if self.mask is None or not bool(found.any()):
            return found
        rows, columns = (
            ((torch.arange(first, end) + 0.5) * (whole / length)).long().clamp(max=whole - 1)
            for first, end, length, whole in (
                (region.top, region.bottom, level.size[0], self.mask.shape[0]),
                (region.left, region.right, level.size[1], self.mask.shape[1]),
            )
        )
        return found & self.mask[rows[:, None], columns[None]].to(found.device)

    def _response(self, score_map: Tensor, xy: Tensor) -> Tensor:
        """Responses (N,) above the floor at points (N,2) of a part of a score map."""
        values = sample_at(score_map[None, None], xy[None], padding="border")[0, 0]
        return (values - self.detector.floor).clamp(min=0)

    def _respond(self, level: Level, box: Box, region: Box, score_map: Tensor) -> None:
        """Add the responses of this coarser level at the candidates of the levels before.

        A corner has similar responses on all levels up to the one where its surroundings interfere.
        That level follows the scale of the image; the level of the strongest response hardly does
        (docs/diary.md). Each coarser level adds the square root of its response at the position
        relative to the keypoint's own.
        """
        if self.official or self.options.per_scale:
            return
        for finer, candidates in zip(self.pyramid.levels, self.levels, strict=False):
            xy = level.from_original(self._position(finer, candidates))
            xy = xy + xy.new_tensor(self.detector.offset)
            rows = box.points(xy, level.size)
            response = self._response(
                score_map, xy[rows] - xy.new_tensor([region.left, region.top])
            )
            candidates.levels_above[rows] += (response / candidates.own[rows]).clamp(max=1).sqrt()

    def _position(self, level: Level, candidates: _Candidates) -> Tensor:
        """Positions (N,2) of candidates in the original image."""
        offset = candidates.refined.new_tensor(self.detector.offset)
        return level.to_original(candidates.refined - offset)

    def finish_level(self, number: int) -> None:
        """Select the candidates of a level from those of its parts."""
        candidates = _Candidates.concatenate(self.found)
        if len(self.found) > 1:
            # in reading order where scores are equal
            order = np.lexsort(
                (candidates.xy[:, 0].cpu(), candidates.xy[:, 1].cpu(), -candidates.score.cpu())
            )
            candidates = candidates[torch.from_numpy(order)[: self._count(number)]]
        # the network's threshold relative to the maximum of the map, which its parts do not have
        if self.detector.ratio:
            largest = torch.stack(self.maxima).max()
            candidates = candidates[candidates.score >= self.detector.ratio * largest]
        self.left.add(self.budgets[number])
        self.left.use(len(candidates.score))
        self.levels.append(candidates)
        self.found, self.maxima = [], []

    def keypoints(self) -> Keypoints:
        """The selected keypoints of all levels."""
        parts: list[Keypoints] = []
        for level, found in zip(self.pyramid.levels, self.levels, strict=True):
            if self.official:
                ratio = found.xy.new_tensor([level.ratio_x, level.ratio_y], dtype=torch.float64)
                scale = torch.full_like(found.score, level.nominal_scale)
                parts.append(Keypoints((found.xy * ratio).float(), scale, found.angle, found.score))
                continue
            scale = torch.full_like(found.score, level.scale) * SCALE_STEP**found.levels_above
            position = self._position(level, found)
            parts.append(Keypoints(position, scale, found.angle, found.score))
        return Keypoints.concatenate(parts) if self.official else self._without_duplicates(parts)

    def _without_duplicates(self, parts: list[Keypoints]) -> Keypoints:
        level_of = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])
        keypoints = Keypoints.concatenate(parts)
        scales = [level.scale for level in self.pyramid.levels]
        kept = torch.ones(len(keypoints), dtype=torch.bool)
        if not self.options.per_scale:
            kept = ~_duplicates(keypoints, level_of, scales)
        # Without this weight, most keypoints would be on the finest level.
        power = self.detector.scale_power
        weight = torch.tensor([scale**power for scale in scales])[level_of]
        keypoints = replace(keypoints, score=keypoints.score * weight.to(keypoints.score))
        selected = _within_budgets(
            level_of, kept.cpu(), self.budgets, self.options.num_keypoints, keypoints.score.cpu()
        )
        keypoints = keypoints[selected.to(keypoints.xy.device)]
        order = keypoints.score.argsort(descending=True, stable=True)
        return keypoints[order]


@dataclass(frozen=True)
class _Candidates:
    """Candidates of a level, N rows each.

    Attributes:
        xy, refined: (N,2) integer and sub-pixel positions on the level.
        score, angle: (N,).
        own: (N,) response above the floor at ``refined``, at least 1e-9.
        levels_above: (N,) how many coarser levels respond at the position.
    """

    xy: Tensor
    refined: Tensor
    score: Tensor
    angle: Tensor
    own: Tensor
    levels_above: Tensor

    def __getitem__(self, rows: Tensor) -> _Candidates:
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]  # once: a GPU waits for it
        return _Candidates(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def concatenate(cls, parts: list[_Candidates]) -> _Candidates:
        """All candidates of ``parts``."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(p, field.name) for p in parts]) for field in fields(cls)))


def _inside(region: Box, size: tuple[int, int], border: int) -> Tensor:
    """(h,w) bool: the pixels of ``region`` at least ``border`` pixels from the edge of an image."""
    inside = torch.zeros(region.size, dtype=torch.bool)
    inner = region.intersection(Box.whole(size).shrink(border))
    inner.crop(inside, region).fill_(True)
    return inside


def _duplicates(keypoints: Keypoints, level_of: Tensor, scales: list[float]) -> Tensor:
    """Keypoints (N,) bool near a stronger one of any other level; ``scales`` of the levels, finest
    first, ``level_of`` (N,) on the CPU.
    """
    device = keypoints.xy.device
    drop = torch.zeros(len(keypoints), dtype=torch.bool, device=device)
    for fine, scale in enumerate(scales):
        a, b = (rows.nonzero()[:, 0].to(device) for rows in (level_of == fine, level_of > fine))
        if not len(a) or not len(b):
            continue
        for part in b.split(BLOCK):  # blocks bound the memory
            near_b, near_a = (
                distances(keypoints.xy[part], keypoints.xy[a]) < DUPLICATE_DISTANCE * scale
            ).nonzero(as_tuple=True)
            stronger = keypoints.score[part[near_b]] > keypoints.score[a[near_a]]
            drop[torch.where(stronger, a[near_a], part[near_b])] = True
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
