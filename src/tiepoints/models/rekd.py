"""REKD: oriented keypoints from a rotation-equivariant network (Lee, Kim, Cho, CVPR 2022).

Idea: three group convolutions answer in N orientations at every pixel. The strongest orientation
says how much of a key point a pixel is, whichever way the image is turned; the histogram over the
orientations says which way it points. The same layers look at three slightly different scales.

In:  image (B,1,H,W), float32 gray in [0,1], any size from 1 x 1 up. Out: score map (B,1,H,W), >= 0,
without unit, and orientation histograms (B,N,H,W), which sum to 1 over N: bin k stands for a
direction of ``k * 360 / N`` degrees counter-clockwise as seen, from a zero that training chose.
Only differences between views have a meaning; ``histogram_angle`` gives them in the convention of
``structs``.

``REKD.fused()`` gives score and angle maps from ordinary convolutions, strip by strip.
``variant="published"`` is the network as published, for imported weights; docs/models.md says what
ours changes and why.
"""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..filters import (
    binomial_blur,
    blur_separable,
    bright_blur_taps,
    normalize_contrast,
    resize,
)
from ..kernels.tiling import tiles
from ..kernels.winograd import PAD, WinogradConv, pack
from .equivariant import SMOOTH_RINGS, FieldNorm, GroupConv, LiftingConv, Ring, group_pool
from .spec import DetectorSpec

#: Published defaults (paper 4.1 and the released options).
GROUP_SIZE = 36
DIMS = (2, 2, 2)
NUM_LEVELS = 3
SCALE_FACTOR = 1.2
KERNEL_SIZE = 5
VARIANTS = ("default", "published")
#: Deviation in grey levels (of 255) below which the contrast is not raised to full: 1 in the
#: published code, where the noise of a smooth sky then weighs like a corner.
CONTRAST_FLOOR = 15.0
#: Rows of the image computed at a time, as pixels: bounds the memory of the maps of all
#: orientations.
TILE_PIXELS = 150_000
#: Channels from which on Winograd's convolution beats the library's on a CPU: 72 do (twice as
#: fast), 24 do not.
WINOGRAD_CHANNELS = 48


class Trunk(nn.Module):
    """The three equivariant layers, shared by all levels: (B,1,H,W) -> (B,d3*N,H,W)."""

    def __init__(self, group: int, dims: tuple[int, int, int], rings: tuple[Ring, ...] | None):
        super().__init__()
        first, second, third = dims
        self.convs = nn.ModuleList(
            [
                LiftingConv(group, 1, first, KERNEL_SIZE, rings),
                GroupConv(group, first, second, KERNEL_SIZE, rings),
                GroupConv(group, second, third, KERNEL_SIZE, rings),
            ]
        )
        self.norms = nn.ModuleList(FieldNorm(group, dim) for dim in dims)

    def forward(self, image: Tensor) -> Tensor:
        maps = image
        for conv, norm in zip(self.convs, self.norms, strict=True):
            maps = F.relu(norm(conv(maps)))
        return maps


class REKD(nn.Module):
    """The network of the paper, section 3.2.

    Args:
        group: N, number of orientations, from 1 up; only multiples of 4 are exact for quarter
            turns.
        dims: regular fields of the three layers (``dim_first, dim_second, dim_third``).
        num_levels: pyramid levels inside the network.
        scale_factor: size ratio of neighbouring levels, > 1.
        variant: ``default``, or ``published`` for imported weights: levels cut from the full image
            after a blur that brightens, contrast normalised on each, corners aligned, filters that
            weigh the corners of their window, a ReLU before the score.
        input_range: largest grey value that the weights were trained with (published training 255,
            its extraction 1).

    Raises:
        ValueError: an argument is outside these limits.
    """

    #: Levels of the published extraction. Keypoints must not depend on the rotation of the image,
    #: so suppression is round. Its scores are of normalised contrast, which does not fall from
    #: level to level; the power was chosen on warped held-out photographs.
    spec = DetectorSpec(up_levels=2, down_levels=5, nms_shape="round", scale_power=0.5, angles=True)

    def __init__(
        self,
        *,
        group: int = GROUP_SIZE,
        dims: tuple[int, int, int] = DIMS,
        num_levels: int = NUM_LEVELS,
        scale_factor: float = SCALE_FACTOR,
        variant: str = "default",
        input_range: float = 255.0,
    ):
        super().__init__()
        if len(dims) != 3:
            raise ValueError(f"dims are the fields of three layers, got {dims}")
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        if not scale_factor > 1:
            raise ValueError(f"scale_factor must be above 1, got {scale_factor}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}")
        if not input_range > 0:
            raise ValueError(f"input_range must be positive, got {input_range}")
        first, second, third = (int(dim) for dim in dims)
        self.settings: dict[str, Any] = {
            "group": group,
            "dims": [first, second, third],
            "num_levels": num_levels,
            "scale_factor": scale_factor,
            "variant": variant,
            "input_range": input_range,
        }
        #: Localisation bias (x, y) of the trained network in pixels, which extraction subtracts.
        self.offset: tuple[float, float] = (0.0, 0.0)
        #: Response to an image without content, stored with the weights; None = not measured.
        self.floor: float | None = None
        self.group, self.num_levels, self.scale_factor = group, num_levels, float(scale_factor)
        self.published, self.input_range = variant == "published", float(input_range)
        self.trunk = Trunk(group, (first, second, third), None if self.published else SMOOTH_RINGS)
        self.orientation = GroupConv(group, third, 1, 1)
        self.score_norm = nn.BatchNorm2d(third * num_levels)
        self.score = nn.Conv2d(third * num_levels, 1, 1)
        self.initialize()

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """He initialisation; the score starts as a mean of the pooled maps, because strong means
        wanted.
        """
        for module in self.modules():
            if isinstance(module, LiftingConv | GroupConv):
                module.initialize(generator)
            elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                module.reset_running_stats()
                module.reset_parameters()
        with torch.no_grad():
            self.score.weight.fill_(1 / self.score.weight.numel())
            self.score.bias.zero_()  # type: ignore[union-attr]

    def level_images(self, image: Tensor) -> list[Tensor]:
        """The levels (B,1,h,w) that the trunk sees, contrast normalised, finest first; no
        gradient.
        """
        with torch.no_grad():
            image = image * self.input_range
            if self.published:
                return self._published_levels(image)
            # The blur takes away what the pixel grid shows differently from turn to turn.
            levels = [
                normalize_contrast(
                    binomial_blur(image), floor=CONTRAST_FLOOR * self.input_range / 255, boxes=2
                )
            ]
            for _ in range(self.num_levels - 1):
                h, w = levels[-1].shape[-2:]
                size = max(1, int(h // self.scale_factor)), max(1, int(w // self.scale_factor))
                levels.append(resize(binomial_blur(levels[-1]), size))
            return levels

    def _published_levels(self, image: Tensor) -> list[Tensor]:
        h, w = image.shape[-2:]
        blurred = blur_separable(image, bright_blur_taps().to(image), pad_mode="constant")
        levels = [normalize_contrast(image)]
        for i in range(1, self.num_levels):
            size = max(1, int(h / self.scale_factor**i)), max(1, int(w / self.scale_factor**i))
            levels.append(
                normalize_contrast(
                    F.interpolate(blurred, size=size, mode="bilinear", align_corners=True)
                )
            )
        return levels

    def resize(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps (B,C,h,w) of a level at another size."""
        if self.published:
            return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
        return resize(maps, size)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Score map (B,1,H,W) and orientation histograms (B,N,H,W) of a gray image (B,1,H,W) in
        [0,1].
        """
        if image.ndim != 4 or image.shape[1] != 1:
            raise ValueError(f"expected a gray image (B,1,H,W), got shape {tuple(image.shape)}")
        size = (image.shape[-2], image.shape[-1])
        pooled, directions = [], []
        for level in self.level_images(image):
            maps = self.trunk(level)
            pooled.append(self.resize(group_pool(maps, self.group), size))
            directions.append(self.resize(self.orientation(maps), size))
        score = self.positive(self.score(self.score_norm(torch.cat(pooled, dim=1))))
        return score, torch.stack(directions).sum(dim=0).softmax(dim=1)

    def positive(self, response: Tensor) -> Tensor:
        """Scores from responses of either sign. A ReLU, as published, cuts off weak corners for
        good (docs/diary.md).
        """
        return F.relu(response) if self.published else F.softplus(response)

    def regrouped(self, group: int) -> REKD:
        """About the same function with another number of orientations: a cheap small group starts a
        large one.
        """
        net = REKD(**{**self.settings, "group": group})
        state = self.state_dict()
        turned = {
            "orientation.coefficients": self.orientation.regrouped(group).coefficients.detach()
        }
        for i, conv in enumerate(self.trunk.convs):
            if isinstance(conv, GroupConv):
                turned[f"trunk.convs.{i}.coefficients"] = conv.regrouped(
                    group
                ).coefficients.detach()
        net.load_state_dict({**state, **turned})
        net.offset = self.offset
        return net.train(self.training)

    def fused(self) -> FusedREKD:
        """The same function for inference, faster and with bounded memory: see ``FusedREKD``."""
        return FusedREKD(self)


def histogram_angle(histogram: Tensor) -> Tensor:
    """Angle of the strongest bin of histograms (B,N,H,W): (B,1,H,W) radians in [0, 2 pi), by the
    coordinate law.

    Between bins by the vertex of the parabola through the logarithms of the strongest bin and its
    neighbours. The law's angles are clockwise as seen, bins counter-clockwise.
    """
    return logits_angle(histogram.clamp(min=1e-30).log())


def logits_angle(logits: Tensor) -> Tensor:
    """As ``histogram_angle``, of the logarithms (B,N,H,W) up to a constant for each pixel: what the
    softmax takes.
    """
    n = logits.shape[1]
    peak, best = logits.max(dim=1, keepdim=True)
    before, after = (logits.gather(1, (best + step) % n) for step in (-1, 1))
    bend = before + after - 2 * peak  # <= 0
    shift = torch.where(
        bend < 0, 0.5 * (before - after) / bend.clamp(max=-1e-12), torch.zeros_like(bend)
    ).clamp(-0.5, 0.5)
    angle = (-(best + shift) * (2 * math.pi / n)).remainder(2 * math.pi)
    return torch.where(
        angle < 2 * math.pi, angle, torch.zeros_like(angle)
    )  # a tiny negative one rounds to the whole turn


class FusedREKD(nn.Module):
    """A trained ``REKD`` for inference: filters made once, normalisation folded in, strips of rows.

    In: as ``REKD``. Out: score map (B,1,H,W) and angle map (B,1,H,W), radians by the coordinate
    law. Equal to the network in eval mode up to rounding. It copies the weights.
    """

    spec = REKD.spec

    def __init__(self, net: REKD):
        super().__init__()
        self.offset, self.floor, self.group = net.offset, net.floor, net.group
        self.reference = copy.deepcopy(net).eval().requires_grad_(False)
        trunk = self.reference.trunk
        self.convs = nn.ModuleList(
            fuse_conv_bn_eval(conv.frozen().eval(), norm.frozen())  # type: ignore[operator]
            for conv, norm in zip(trunk.convs, trunk.norms, strict=True)
        )
        self.direction = self.reference.orientation.frozen()
        channels = min(conv.weight.shape[1] for conv in self.convs[1:])  # type: ignore[index]
        wide = channels >= WINOGRAD_CHANNELS
        # the Winograd layers pack channels last; the library prefers the other layout
        self.layout = torch.channels_last if wide else torch.contiguous_format
        for conv in self.convs:
            conv.to(memory_format=self.layout)  # type: ignore[call-overload]
        inner = cast(list[nn.Conv2d], list(self.convs[1:])) if wide else []
        self.winograd = [WinogradConv(conv.weight, cast(Tensor, conv.bias)) for conv in inner]
        self.halo = sum(conv.kernel_size[0] // 2 for conv in self.convs)  # type: ignore[index, misc]
        norm, score = self.reference.score_norm, self.reference.score
        assert norm.running_var is not None
        assert norm.running_mean is not None
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.register_buffer("weight", score.weight * factor.view(1, -1, 1, 1))
        shift = norm.bias - norm.running_mean * factor
        self.register_buffer("bias", score.bias + (score.weight[:, :, 0, 0] @ shift))  # type: ignore[operator]

    weight: Tensor
    bias: Tensor

    @torch.inference_mode()
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Score and angle maps (B,1,H,W) each, of a gray image (B,1,H,W) in [0,1]."""
        b, _, h, w = image.shape
        levels = self.reference.level_images(image)
        score, angle = image.new_empty(b, 1, h, w), image.new_empty(b, 1, h, w)
        for top, bottom in tiles(h, b * w, TILE_PIXELS):
            score[:, :, top:bottom], angle[:, :, top:bottom] = self._strip(
                levels, (h, w), top, bottom
            )
        return score, angle

    def _strip(
        self, levels: list[Tensor], size: tuple[int, int], top: int, bottom: int
    ) -> tuple[Tensor, Tensor]:
        strength: Tensor | float = self.bias.view(1, 1, 1, 1)
        direction: Tensor | float = 0.0
        fields = self.weight.shape[1] // len(levels)
        for i, level in enumerate(levels):
            rows = self._rows(level.shape[-2], size[0], top, bottom, level)
            low, high = int(rows.min()), min(int(rows.max()) + 2, level.shape[-2])
            # Resizing is linear, so it may follow the sums over fields: fewer maps to resize.
            answers = self._answers(
                level, low, high, self.weight[0, i * fields : (i + 1) * fields, 0, 0]
            )
            pooled, directions = (self._to_strip(maps, rows - low, size[1]) for maps in answers)
            strength = strength + pooled
            direction = directions if i == 0 else direction.add_(directions)  # type: ignore[union-attr]
        return self.reference.positive(strength), logits_angle(direction)  # type: ignore[arg-type]

    def _answers(self, level: Tensor, low: int, high: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What rows ``low`` to ``high`` of a level say: (B,1,rows,w) for the score and (B,N,rows,w)
        for the direction.

        Made from as many rows more as the filters reach, which are then dropped.
        """
        h, w = level.shape[-2:]
        first, last = max(0, low - self.halo), min(h, high + self.halo)
        maps = F.relu_(self.convs[0](level[:, :, first:last].contiguous(memory_format=self.layout)))
        mixed = self.direction.weight[:, :, 0, 0].T  # (fields*N,N)
        if not self.winograd or maps.device.type != "cpu" or maps.dtype != torch.float32:
            for conv in self.convs[1:]:
                maps = F.relu_(conv(maps))
            maps = maps[:, :, low - first : high - first]
            pooled = (group_pool(maps, self.group) * weight.view(-1, 1, 1)).sum(dim=1, keepdim=True)
            return pooled, self.direction(maps)
        parts = []
        for image in maps.permute(0, 2, 3, 1):
            packed = pack(image)
            for layer in self.winograd:
                packed = layer(packed, last - first, w)
            packed = packed[PAD + low - first : PAD + high - first]
            flat = packed.flatten(0, 2)
            shape = (*packed.shape[:3], -1)
            both = [self._pooled(flat, weight).view(shape), (flat @ mixed).view(shape)]
            parts.append(
                [
                    answer.permute(0, 2, 1, 3).flatten(1, 2)[:, PAD : PAD + w].permute(2, 0, 1)
                    for answer in both
                ]
            )
        if len(parts) == 1:  # stacking copies
            return parts[0][0][None], parts[0][1][None]
        return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])

    def _pooled(self, maps: Tensor, weight: Tensor) -> Tensor:
        """Strongest orientation of each field of (...,fields*N), weighed: (...,1)."""
        return (maps.unflatten(-1, (-1, self.group)).amax(dim=-1) * weight).sum(
            dim=-1, keepdim=True
        )

    def _rows(self, level: int, height: int, top: int, bottom: int, like: Tensor) -> Tensor:
        """Where rows ``top`` to ``bottom`` of the image lie in a level, as the resize of the
        network has it.
        """
        y = torch.arange(top, bottom, device=like.device, dtype=torch.float64)
        if self.reference.published:
            return (y * ((level - 1) / (height - 1)) if height > 1 else y * 0).clamp(0, level - 1)
        return ((y + 0.5) * (level / height) - 0.5).clamp(0, level - 1)

    def _to_strip(self, maps: Tensor, rows: Tensor, width: int) -> Tensor:
        """Rows (fractional) of ``maps`` by linear interpolation, then the width resized."""
        whole = rows.floor()
        if len(rows) != maps.shape[-2] or not torch.equal(rows, torch.arange(len(rows)).to(rows)):
            below = (whole + 1).clamp(max=maps.shape[-2] - 1).long()
            weight = (rows - whole).to(maps).view(-1, 1)
            maps = torch.lerp(maps[:, :, whole.long()], maps[:, :, below], weight)
        if maps.shape[-1] == width:
            return maps
        return self.reference.resize(maps, (maps.shape[-2], width))
