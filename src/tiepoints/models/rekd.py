"""REKD: oriented keypoints from a rotation-equivariant network (Lee, Kim, Cho, CVPR 2022).

Idea: three group convolutions have responses in N orientations at every pixel. Their maximum over
the orientations is a keypoint score that does not depend on image rotation; a histogram over the
orientations gives the keypoint's orientation. The same layers are applied to three slightly
different scales.

In:  image (B,1,H,W), float32 gray in [0,1], any size from 1 x 1 up. Out: score map (B,1,H,W), >= 0,
and orientation histograms (B,N,H,W), which sum to 1 over N: bin k is a direction of ``k * 360 / N``
degrees counter-clockwise, relative to an arbitrary learned zero. Only differences between views are
meaningful; ``histogram_angle`` converts to the convention of ``structs``.

``REKD.fused()`` computes score and angle maps with ordinary convolutions, in tiles.
``variant="published"`` is the network as published, for imported weights; docs/models.md explains
the differences of ours.
"""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..device import processor_features
from ..filters import (
    CONTRAST_RADIUS,
    binomial_blur,
    blur_separable,
    normalize_contrast,
    resize,
    unnormalized_gaussian_taps,
)
from ..kernels.winograd import PAD, WinogradConv, pack
from ..regions import (
    BLUR_RADIUS,
    Box,
    Filtered,
    InMemory,
    Resized,
    Source,
    resize_box,
    source_box,
)
from .equivariant import SMOOTH_RINGS, FieldNorm, GroupConv, LiftingConv, Ring, group_pool
from .rekd_official import OfficialREKD
from .spec import DetectorSpec, StackInput

#: Published defaults (paper 4.1 and the released options).
GROUP_SIZE = 36
DIMS = (2, 2, 2)
NUM_LEVELS = 3
SCALE_FACTOR = 1.2
KERNEL_SIZE = 5
VARIANTS = ("default", "published")
#: Constant added to the deviation in gray levels (of 255) in contrast normalization. The published
#: code has 1, which amplifies the noise of a smooth sky to the contrast of a corner.
CONTRAST_FLOOR = 15.0
#: Values of the maps of all orientations of a tile, to bound the memory.
TILE_VALUES = 10_800_000
#: Tiles are strips of whole rows unless these would have fewer rows (``regions.Box.split``).
MIN_ROWS = 64
#: Number of channels from which on Winograd's convolution is used on a CPU: it is twice as fast as
#: the library's with 72 channels, and slower with 24.
WINOGRAD_CHANNELS = 48


class Trunk(nn.Module):
    """The three equivariant layers, shared by all levels: (B,1,H,W) -> (B,dims[2]*N,H,W)."""

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
        group: N, number of orientations, from 1 up; only multiples of 4 are exactly equivariant to
            rotations by 90 degrees.
        dims: number of regular fields of the three layers (``dim_first, dim_second, dim_third``).
        num_levels: pyramid levels inside the network.
        scale_factor: size ratio of neighboring levels, > 1.
        variant: ``default``, or ``published`` for imported weights: levels resized from the full
            image after a blur that brightens it, contrast normalized on each, corners aligned,
            filters that include the corners of their window, a ReLU for the score.
        input_range: gray value of a white pixel in training (255 in the published training, 1 in
            the published extraction).

    Raises:
        ValueError: an argument is outside these limits.
    """

    #: Levels of the published extraction. Suppression is round, so that keypoints do not depend on
    #: image rotation. Scores are computed from normalized contrast, which does not decrease from
    #: level to level; the power was chosen on warped held-out photographs.
    spec = DetectorSpec(
        up_levels=2,
        down_levels=5,
        nms_shape="round",
        scale_power=0.5,
        angles=True,
        official=lambda net, options: _official(net, options),
    )

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
        #: Localization bias (x, y) of the trained network in pixels, which extraction subtracts.
        self.offset: tuple[float, float] = (0.0, 0.0)
        #: Response to a constant image, stored with the weights; None = not measured.
        self.floor: float | None = None
        self.group, self.num_levels, self.scale_factor = group, num_levels, float(scale_factor)
        self.published, self.input_range = variant == "published", float(input_range)
        self.trunk = Trunk(group, (first, second, third), None if self.published else SMOOTH_RINGS)
        self.orientation = GroupConv(group, third, 1, 1)
        self.score_norm = nn.BatchNorm2d(third * num_levels)
        self.score = nn.Conv2d(third * num_levels, 1, 1)
        self.initialize()

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """He initialization; the score is initialized as the mean of the pooled maps, because
        strong responses are keypoints.
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
        """The contrast-normalized levels (B,1,h,w) for the trunk, finest first, without
        gradient.
        """
        with torch.no_grad():
            lazy = self.level_sources(InMemory(image))
            levels = [InMemory(lazy[0].read(Box.whole(lazy[0].size)))]
            for level in lazy[1:]:
                source = level if self.published else Resized(levels[-1], level.size, blur=True)
                levels.append(InMemory(source.read(Box.whole(level.size))))
            return [level.pixels for level in levels]

    def level_sources(self, source: Source) -> list[Source]:
        """The levels of ``level_images``, computed on demand."""
        if self.published:
            return self._published_levels(source)
        # The blur removes high frequencies, which the pixel grid does not represent
        # equivariantly.
        levels: list[Source] = [Filtered(source, self._normalized, CONTRAST_RADIUS + BLUR_RADIUS)]
        for _ in range(self.num_levels - 1):
            h, w = levels[-1].size
            size = max(1, int(h // self.scale_factor)), max(1, int(w // self.scale_factor))
            levels.append(Resized(levels[-1], size, blur=True))
        return levels

    def _normalized(self, image: Tensor) -> Tensor:
        return normalize_contrast(
            binomial_blur(image * self.input_range),
            floor=CONTRAST_FLOOR * self.input_range / 255,
            boxes=2,
        )

    def _published_levels(self, source: Source) -> list[Source]:
        h, w = source.size
        taps = unnormalized_gaussian_taps()

        def blur(image: Tensor) -> Tensor:
            return blur_separable(image * self.input_range, taps.to(image), pad_mode="constant")

        def normalize(image: Tensor) -> Tensor:
            return normalize_contrast(image * self.input_range)

        blurred = Filtered(source, blur, len(taps) // 2)
        levels: list[Source] = [Filtered(source, normalize, CONTRAST_RADIUS)]
        for i in range(1, self.num_levels):
            size = max(1, int(h / self.scale_factor**i)), max(1, int(w / self.scale_factor**i))
            resized = Resized(blurred, size, align_corners=True)
            levels.append(Filtered(resized, normalize_contrast, CONTRAST_RADIUS))
        return levels

    def resize(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize maps (B,C,h,w) of a level."""
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
        """Positive scores from responses of either sign: softplus, because with a ReLU, as
        published, weak corners get no gradient (docs/diary.md).
        """
        return F.relu(response) if self.published else F.softplus(response)

    def regrouped(self, group: int) -> REKD:
        """An approximation with another number of orientations, so that a small group, which trains
        faster, can initialize a large one.
        """
        net = REKD(**{**self.settings, "group": group})
        convs = {"orientation": self.orientation} | {
            f"trunk.convs.{i}": conv
            for i, conv in enumerate(self.trunk.convs)
            if isinstance(conv, GroupConv)
        }
        coefficients = {
            f"{name}.coefficients": conv.regrouped(group).coefficients.detach()
            for name, conv in convs.items()
        }
        net.load_state_dict({**self.state_dict(), **coefficients})
        net.offset = self.offset
        return net.train(self.training)

    def fused(self, dtype: torch.dtype = torch.float32) -> FusedREKD:
        """The same function for inference, faster and with bounded memory: see ``FusedREKD``."""
        return FusedREKD(self, dtype)


def _official(net: nn.Module, options: Any) -> OfficialREKD:
    """The published detector of an unfused network."""
    return OfficialREKD(cast(REKD, net).fused(), options)


def histogram_angle(histogram: Tensor) -> Tensor:
    """Angle of the strongest bin of histograms (B,N,H,W): (B,1,H,W) radians in [0, 2 pi), in the
    convention of ``structs``.

    Interpolated by the vertex of the parabola through the logarithms of the strongest bin and its
    neighbors. Angles are clockwise in the image, bins counter-clockwise.
    """
    return logits_angle(histogram.clamp(min=1e-30).log())


def logits_angle(logits: Tensor) -> Tensor:
    """As ``histogram_angle``, from the logits (B,N,H,W) of the histograms, the input of the
    softmax.
    """
    n = logits.shape[1]
    peak, best = logits.max(dim=1, keepdim=True)
    before, after = (logits.gather(1, (best + step) % n) for step in (-1, 1))
    curvature = before + after - 2 * peak  # <= 0
    shift = torch.where(
        curvature < 0,
        0.5 * (before - after) / curvature.clamp(max=-1e-12),
        torch.zeros_like(curvature),
    ).clamp(-0.5, 0.5)
    angle = (-(best + shift) * (2 * math.pi / n)).remainder(2 * math.pi)
    # the remainder of a tiny negative angle is rounded to 2 pi
    return torch.where(angle < 2 * math.pi, angle, torch.zeros_like(angle))


class FusedREKD(nn.Module):
    """A trained ``REKD`` for inference: constant filters with batch normalization folded in,
    computed in tiles of rows.

    In: as ``REKD``. Out: score map (B,1,H,W) and angle map (B,1,H,W), radians in the convention of
    ``structs``. Equal to the network in eval mode up to rounding. The weights are copied.
    """

    spec = REKD.spec

    def __init__(self, net: REKD, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.offset, self.group = net.offset, net.group
        # the response to a constant image is another one in another precision: measured when needed
        self.floor = net.floor if dtype == torch.float32 else None
        self.reference = copy.deepcopy(net).eval().requires_grad_(False)
        trunk = self.reference.trunk
        self.convs = nn.ModuleList(
            fuse_conv_bn_eval(conv.frozen().eval(), norm.frozen())  # type: ignore[operator]
            for conv, norm in zip(trunk.convs, trunk.norms, strict=True)
        )
        self.direction = self.reference.orientation.frozen()
        channels = min(conv.weight.shape[1] for conv in self.convs[1:])  # type: ignore[index]
        wide = channels >= WINOGRAD_CHANNELS and dtype == torch.float32
        # The Winograd layers have the channels last. With few channels, the library is faster with
        # contiguous maps on processors without AVX-512.
        last = wide or dtype != torch.float32 or processor_features()["avx512"]
        self.layout = torch.channels_last if last else torch.contiguous_format
        for conv in self.convs:
            conv.to(memory_format=self.layout)  # type: ignore[call-overload]
        inner = cast(list[nn.Conv2d], list(self.convs[1:])) if wide else []
        self.winograd = [WinogradConv(conv.weight, cast(Tensor, conv.bias)) for conv in inner]
        self.stack: nn.Module = _REKDStack(self.convs, self.direction, self.group).to(dtype)
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

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Score and angle maps (B,1,H,W) each, of a gray image (B,1,H,W) in [0,1]."""
        source = InMemory(image)
        return self.part(source, Box.whole(source.size))

    @torch.inference_mode()
    def part(self, source: Source, box: Box) -> tuple[Tensor, Tensor]:
        """The pixels of ``box`` of the score and angle maps of gray images in [0,1], (B,1,h,w)."""
        levels = self._levels(source, box)
        batch = len(levels[0].pixels)
        score, angle = (levels[0].pixels.new_empty(batch, 1, *box.size) for _ in range(2))
        channels = batch * len(self.convs[0].weight)  # type: ignore[arg-type]
        for tile in box.split(max(1, TILE_VALUES // channels), MIN_ROWS):
            parts = self._tile(levels, source.size, tile)
            for maps, part in zip((score, angle), parts, strict=True):
                tile.crop(maps, box).copy_(part)
        return score, angle

    def _levels(self, source: Source, box: Box) -> list[InMemory]:
        """The parts of the contrast-normalized levels from which ``box`` is computed, as
        ``REKD.level_images``.
        """
        net = self.reference
        lazy = net.level_sources(source)
        needed = [
            source_box(box, source.size, level.size, net.published).grow(self.halo, level.size)
            for level in lazy
        ]
        if net.published:  # computed independently
            return [
                InMemory(level.read(inner), inner, level.size)
                for level, inner in zip(lazy, needed, strict=True)
            ]
        for i in range(len(lazy) - 1, 0, -1):
            below = source_box(needed[i], lazy[i].size, lazy[i - 1].size)
            needed[i - 1] = needed[i - 1].union(below.grow(BLUR_RADIUS, lazy[i - 1].size))
        levels = [InMemory(lazy[0].read(needed[0]), needed[0], lazy[0].size)]
        for level, inner in zip(lazy[1:], needed[1:], strict=True):
            resized = Resized(levels[-1], level.size, blur=True)
            levels.append(InMemory(resized.read(inner), inner, level.size))
        return levels

    def _tile(
        self, levels: list[InMemory], size: tuple[int, int], box: Box
    ) -> tuple[Tensor, Tensor]:
        """Score and angle maps of a box of images of ``size``."""
        score: Tensor | float = self.bias.view(1, 1, 1, 1)
        logits: Tensor | float = 0.0
        fields = self.weight.shape[1] // len(levels)
        corners = self.reference.published
        for i, level in enumerate(levels):
            inner = source_box(box, size, level.size, corners)
            # Resizing is linear, so it can follow the sum over fields, which leaves fewer maps.
            responses = self._responses(
                level, inner, self.weight[0, i * fields : (i + 1) * fields, 0, 0]
            )
            pooled, directions = (
                resize_box(maps, inner, level.size, box, size, align_corners=corners)
                for maps in responses
            )
            score = score + pooled
            logits = directions if i == 0 else logits + directions
        return self.reference.positive(score), logits_angle(logits)  # type: ignore[arg-type]

    def _responses(self, level: InMemory, box: Box, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Responses of a box of a level: (B,1,h,w) for the score and (B,N,h,w) for the
        orientation.
        """
        outer = box.grow(self.halo, level.size)
        image = level.read(outer).contiguous(memory_format=self.layout)
        fast = self.winograd and isinstance(self.stack, _REKDStack)
        if not fast or image.device.type != "cpu" or image.dtype != torch.float32:
            dtype = self.direction.weight.dtype
            both = self.stack(image.to(dtype)).to(image.dtype)
            maps, directions = box.crop(both, outer).split([len(weight), self.group], dim=1)
            return (maps * weight.view(-1, 1, 1)).sum(dim=1, keepdim=True), directions
        maps = F.relu_(self.convs[0](image))
        mixed = self.direction.weight[:, :, 0, 0].T  # (fields*N,N)
        h, w = outer.size
        top = box.top - outer.top
        columns = slice(PAD + box.left - outer.left, PAD + box.right - outer.left)
        parts = []
        for image in maps.permute(0, 2, 3, 1):
            packed = pack(image)
            for layer in self.winograd:
                packed = layer(packed, h, w)
            packed = packed[PAD + top : PAD + top + box.size[0]]
            flat = packed.flatten(0, 2)
            shape = (*packed.shape[:3], -1)
            both = [self._pooled(flat, weight).view(shape), (flat @ mixed).view(shape)]
            parts.append(
                [
                    maps.permute(0, 2, 1, 3).flatten(1, 2)[:, columns].permute(2, 0, 1)
                    for maps in both
                ]
            )
        if len(parts) == 1:  # stacking copies
            return parts[0][0][None], parts[0][1][None]
        return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])

    def _pooled(self, maps: Tensor, weight: Tensor) -> Tensor:
        """Weighted sum over fields of the maximum over orientations: (...,fields*N) -> (...,1)."""
        return (maps.unflatten(-1, (-1, self.group)).amax(dim=-1) * weight).sum(
            dim=-1, keepdim=True
        )


class _REKDStack(nn.Module):
    """Trunk of a fused ``REKD``, its maxima over orientations and its orientation layer:
    normalized level (B,1,H,W) -> (B,fields+N,H,W).
    """

    input = StackInput()

    def __init__(self, convs: nn.ModuleList, direction: nn.Module, group: int):
        super().__init__()
        self.convs, self.direction, self.group = convs, direction, group

    def forward(self, maps: Tensor) -> Tensor:
        for conv in self.convs:
            maps = F.relu_(conv(maps))
        return torch.cat([group_pool(maps, self.group), self.direction(maps)], dim=1)
