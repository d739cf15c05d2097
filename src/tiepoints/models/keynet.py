"""Key.Net: keypoint detection by handcrafted and learned CNN filters (Barroso-Laguna et al., ICCV
2019).

Idea: image derivatives up to second order and their products are the input of a very small network;
the same learned blocks are applied to three slightly different scales of the image; a last filter
merges them into a score for every pixel.

In:  image (B,1,H,W), float32 gray in [0,1], any size from 1 x 1 up. Out: score map (B,1,H,W), >= 0;
only the order of scores of one network is meaningful.

The defaults are the official PyTorch network, 5,873 parameters (variant A in docs/models.md); the
two other published variants, kept to reproduce published results, are in ``keynet_legacy``.
``KeyNet.fused()`` is the same function, faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..filters import binomial_blur, corner_strength, resize, sobel
from ..kernels.column_pairs import apply_paired, paired
from ..kernels.single_channel import SingleChannelConv2d
from ..kernels.tiling import apply_tiled
from ..keypoints import BORDER, NMS_WINDOW
from ..regions import Box, InMemory, Resized, Source, resize_box, source_box
from .spec import ConvStack, DetectorSpec

#: Handcrafted channels of first and second order, in the order of the official PyTorch weights.
FIRST_ORDER = ("dx", "dy", "dx^2", "dy^2", "dx*dy")
SECOND_ORDER = ("dxy", "dxy^2", "dxx", "dyy", "dxx*dyy")
HANDCRAFTED_SETS = {
    "both": FIRST_ORDER + SECOND_ORDER,
    "first": FIRST_ORDER,
    "second": SECOND_ORDER,
    "none": (),
}
FIRST_LAYER_CHANNELS = 10  # paper 6.1: ten filters in every variant, handcrafted or learned
DEFAULT_SCALE_FACTOR = 1.2  # paper 3.2
#: Activations after the last convolution.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "softplus": F.softplus}
#: Sigma in pixels of the window of the corner strength in ``structure_factor``.
STRUCTURE_SIGMA = 2.0
#: Distance in pixels from which the corner strength depends on others: gradient and window.
STRUCTURE_RADIUS = 8
#: Corner strengths below this are rounding errors: gradients of a hundredth of an 8 bit gray level.
STRUCTURE_FLOOR = 1e-10
# bounds the memory of the learned blocks on a large image; smaller tiles compute more rows twice
TILE_PIXELS = 300_000


def handcrafted_channels(
    image: Tensor, names: tuple[str, ...] = HANDCRAFTED_SETS["both"]
) -> list[Tensor]:
    """Derivative channels ``names`` of a gray image (paper 3.1): (B,1,H,W) -> (B,1,H,W) each.

    Second derivatives are the Sobel operator applied twice, border replicated each time.
    """
    dx, dy = sobel(image)
    derivatives = {"dx": dx, "dy": dy}
    if any(name in SECOND_ORDER for name in names):
        derivatives["dxx"], derivatives["dxy"] = sobel(dx)
        derivatives["dyy"] = sobel(dy)[1]
    channels = []
    for name in names:
        if name.endswith("^2"):
            channels.append(derivatives[name[:-2]].square())
        elif "*" in name:
            left, right = name.split("*")
            channels.append(derivatives[left] * derivatives[right])
        else:
            channels.append(derivatives[name])
    return channels


def structure_factor(image: Tensor, power: float) -> Tensor | None:
    """A power of ``filters.corner_strength`` of gray images (B,1,H,W), by which their scores
    (B,1,H,W) are multiplied; None with ``power`` 0.

    A network trained on homographies only learns high responses near edges, because keypoints there
    are as repeatable on a plane as on corners. Corner strength is small near edges, which
    suppresses these responses.
    """
    if not power:
        return None
    with torch.no_grad():  # not learned, and the derivative of a power at 0 is infinite
        strength = corner_strength(image.float(), STRUCTURE_SIGMA)
        # a small power would amplify rounding errors in constant areas
        return torch.where(strength < STRUCTURE_FLOOR, torch.zeros_like(strength), strength**power)


def pyramid_level_size(height: int, width: int, factor: float) -> tuple[int, int]:
    """Size of the next coarser level inside the network, never below 1 x 1."""
    return max(1, int(height // factor)), max(1, int(width // factor))


class FirstLayer(nn.Module):
    """Ten channels of the image, (B,1,H,W) -> (B,10,H,W): handcrafted, then learned filters."""

    def __init__(self, handcrafted: str, kernel_size: int):
        super().__init__()
        self.names = HANDCRAFTED_SETS[handcrafted]
        learned = FIRST_LAYER_CHANNELS - len(self.names)
        self.learned = (
            nn.Conv2d(1, learned, kernel_size, padding=kernel_size // 2) if learned else None
        )

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat(self.parts(image), dim=1)

    def parts(self, image: Tensor) -> list[Tensor]:
        """The channels before concatenation."""
        parts = handcrafted_channels(image, self.names) if self.names else []
        if self.learned is not None:
            parts.append(self.learned(image))
        return parts


class LearnedBlock(nn.Sequential):
    """Convolution, batch normalization, ReLU; keeps the size."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int):
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel_size, padding=kernel_size // 2),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise a ``ValueError`` for invalid settings of a ``KeyNet``."""
    merge, score, structure = settings["merge"], settings["score"], settings["structure"]
    num_levels, scale_factor = settings["num_levels"], settings["scale_factor"]
    kernel_size, handcrafted = settings["kernel_size"], settings["handcrafted"]
    if score not in SCORES or (not merge and score != "relu"):
        raise ValueError(
            f"score must be one of {', '.join(SCORES)}, and relu without merge; got {score!r}"
        )
    if not 0 <= structure <= 2 or (not merge and structure):
        raise ValueError(f"structure must lie in [0, 2], and be 0 without merge; got {structure}")
    for name in ("num_filters", "num_blocks", "num_levels"):
        if int(settings[name]) != settings[name] or settings[name] < 1:
            raise ValueError(f"{name} must be an integer from 1 up, got {settings[name]}")
    if int(kernel_size) != kernel_size or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be an odd integer from 1 up, got {kernel_size}")
    if handcrafted not in HANDCRAFTED_SETS:
        raise ValueError(
            f"handcrafted must be one of {', '.join(HANDCRAFTED_SETS)}; got {handcrafted!r}"
        )
    if num_levels == 1 and scale_factor is not None:
        raise ValueError("scale_factor requires num_levels > 1; with one level use None")
    if scale_factor is not None and not scale_factor > 1:
        raise ValueError(f"scale_factor must be above 1, got {scale_factor}")
    if not merge and (settings["num_filters"] != 1 or num_levels != 1):
        raise ValueError("merge=False requires num_filters=1 and num_levels=1")


class KeyNet(nn.Module):
    """Key.Net with the variants of the paper (section 6.1, figure 5 and table 1a).

    A new network is untrained (He initialization, biases 0); ``tiepoints.weights.load`` returns
    trained ones.

    Args:
        num_filters: M, filters of each learned block, >= 1.
        num_blocks: learned blocks, >= 1, shared by all pyramid levels.
        kernel_size: odd side of all learned filters in pixels.
        num_levels: pyramid levels inside the network, >= 1.
        scale_factor: size ratio of neighboring levels, > 1; default 1.2. Not with one level.
        handcrafted: ``both``, ``first``, ``second`` order channels or ``none``; learned filters
            replace the others, so that the first layer always has ten channels.
        merge: whether a last convolution merges the levels. Without it the output of the blocks is
            the score, which requires one filter and one level (Tiny-Key.Net).
        score: activation after the last convolution: ``relu`` as published, or ``softplus``, which
            has a gradient everywhere and so can be trained by losses of peaks alone
            (docs/training.md). Only with ``merge``.
        structure: 0 as published; above 0 the score is multiplied by this power of the image's
            corner strength (``structure_factor``). Only with ``merge``.

    Raises:
        ValueError: an argument is outside these limits.
    """

    #: A patch descriptor needs the scale of its keypoint, and that of the strongest response is
    #: often another one in the other image (docs/scales.md).
    spec = DetectorSpec(per_scale=True)

    # Flat keywords, because weights files store them as the settings of the network.
    def __init__(
        self,
        *,
        num_filters: int = 8,
        num_blocks: int = 3,
        kernel_size: int = 5,
        num_levels: int = 3,
        scale_factor: float | None = None,
        handcrafted: str = "both",
        merge: bool = True,
        score: str = "relu",
        structure: float = 0.0,
    ):
        super().__init__()
        self.settings: dict[str, Any] = {
            "num_filters": num_filters,
            "num_blocks": num_blocks,
            "kernel_size": kernel_size,
            "num_levels": num_levels,
            "scale_factor": scale_factor,
            "handcrafted": handcrafted,
            "merge": merge,
            "score": score,
            "structure": float(structure),
        }
        _check_settings(self.settings)
        num_filters, num_blocks, kernel_size, num_levels = (
            int(value) for value in (num_filters, num_blocks, kernel_size, num_levels)
        )
        self.settings |= {
            "num_filters": num_filters,
            "num_blocks": num_blocks,
            "kernel_size": kernel_size,
            "num_levels": num_levels,
        }
        self.scale_factor = DEFAULT_SCALE_FACTOR if scale_factor is None else float(scale_factor)
        #: Localization bias (x, y) of the trained network in pixels, which extraction subtracts.
        self.offset: tuple[float, float] = (0.0, 0.0)
        #: Response to a constant image, stored with the weights; None = not measured.
        self.floor: float | None = None
        self.num_levels = num_levels
        self.first = FirstLayer(handcrafted, kernel_size)
        widths = [FIRST_LAYER_CHANNELS] + [num_filters] * num_blocks
        self.blocks = nn.Sequential(
            *(LearnedBlock(widths[i], widths[i + 1], kernel_size) for i in range(num_blocks))
        )
        self.last = (
            nn.Conv2d(num_filters * num_levels, 1, kernel_size, padding=kernel_size // 2)
            if merge
            else None
        )
        if not merge:
            # with a small window, its strongest keypoints are those of leaves (docs/diary.md)
            self.spec = replace(KeyNet.spec, nms_window=NMS_WINDOW, border=BORDER)
        self.initialize()

    @classmethod
    def tiny(cls) -> KeyNet:
        """Tiny-Key.Net (paper 6.4): all handcrafted filters, one learned 5 x 5 filter, one scale;
        253 parameters.

        The paper says 260, but its sum 5*5*10 + bias + batch normalization is 253.
        """
        return cls(num_filters=1, num_blocks=1, num_levels=1, merge=False)

    @classmethod
    def light(cls, **settings: Any) -> KeyNet:
        """Key.Net with one level inside the network instead of three, less than half of the
        arithmetic: the levels of the pyramid on which keypoints are detected take their place.
        """
        return cls(num_levels=1, **settings)

    def one_level(self) -> KeyNet:
        """The same filters with one level inside the network: those that merge the levels are
        summed.
        """
        if self.last is None or self.num_levels == 1:
            return copy.deepcopy(self)
        net = type(self)(**{**self.settings, "num_levels": 1, "scale_factor": None})
        state = self.state_dict()
        parts = state["last.weight"].split(self.settings["num_filters"], dim=1)
        net.load_state_dict({**state, "last.weight": torch.stack(parts).sum(dim=0)})
        net.offset = self.offset
        return net.train(self.training)

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """He initialization of all filters (fan-in) from ``generator``, zero biases (paper 5.3)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                with torch.no_grad():
                    module.weight.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
                    module.bias.zero_()  # type: ignore[union-attr]
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.reset_parameters()

    def level_images(self, image: Tensor) -> list[Tensor]:
        """The image and its coarser levels, each blurred and reduced from the previous one."""
        levels = [image]
        for _ in range(self.num_levels - 1):
            previous = levels[-1]
            size = pyramid_level_size(previous.shape[-2], previous.shape[-1], self.scale_factor)
            levels.append(resize(binomial_blur(previous), size))
        return levels

    def forward(self, image: Tensor) -> Tensor:
        """Score map (B,1,H,W) >= 0 of a gray image (B,1,H,W) in [0,1]."""
        if image.ndim != 4 or image.shape[1] != 1:
            raise ValueError(f"expected a gray image (B,1,H,W), got shape {tuple(image.shape)}")
        size = (image.shape[-2], image.shape[-1])
        maps = [
            resize(self.blocks(self.first(level)), size) for level in self.level_images(image)
        ]  # each (B,M,H,W)
        volume = torch.cat(maps, dim=1)  # (B,M*levels,H,W)
        if self.last is None:
            return volume
        score = SCORES[self.settings["score"]](self.last(volume))
        factor = structure_factor(image, self.settings["structure"])
        return score if factor is None else score * factor

    def fused(self, dtype: torch.dtype = torch.float32) -> FusedKeyNet:
        """The same function for inference, faster: see ``FusedKeyNet``."""
        return FusedKeyNet(self, dtype)


class FusedKeyNet(nn.Module):
    """A trained ``KeyNet`` for inference: batch normalization folded into the filters, which are
    applied to pairs of columns in channels-last memory in ``dtype``, in tiles of rows.

    Equal to the network in eval mode up to rounding; about twice as fast on a CPU. The weights are
    copied, so later training of the original has no effect.
    """

    spec = KeyNet.spec

    def __init__(self, net: KeyNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.offset = net.offset
        # the response to a constant image is another one in another precision: measured when needed
        self.floor = net.floor if dtype == torch.float32 else None
        self.reference = copy.deepcopy(net).eval().requires_grad_(False)
        folded = [fuse_conv_bn_eval(block[0], block[1]) for block in self.reference.blocks]  # type: ignore[index]
        self.plain = ConvStack(folded).to(dtype)
        self.stack: nn.Module = ConvStack(map(paired, folded)).to(dtype)
        side = self.radius = net.settings["kernel_size"] // 2
        self.filters = net.settings["num_filters"]
        # second derivatives have a radius of two pixels
        self.halo = max(2, side) + side * len(folded)
        self.merges = net.last is not None
        self.score, self.structure = net.settings["score"], net.settings["structure"]
        if net.last is not None:
            # The last convolution is a sum over levels, so the maps of all levels need not be
            # concatenated.
            parts = net.last.weight.split(self.filters, dim=1)
            self.merge = nn.ModuleList(
                SingleChannelConv2d(part, net.last.bias if i == 0 else None)
                for i, part in enumerate(parts)
            )

    def forward(self, image: Tensor) -> Tensor:
        """Score map (B,1,H,W) >= 0 of a gray image (B,1,H,W) in [0,1]."""
        source = InMemory(image)
        return self.part(source, Box.whole(source.size))

    @torch.inference_mode()
    def part(self, source: Source, box: Box) -> Tensor:
        """The pixels of ``box`` of the score map of gray images in [0,1], (B,1,h,w) >= 0."""
        if not self.merges:
            return self._learned(source, box)
        size, outer = source.size, box.grow(self.radius, source.size)
        score: Tensor | float = 0.0
        for level, merge in zip(self._levels(source), self.merge, strict=True):
            inner = source_box(outer, size, level.size)
            maps = resize_box(self._learned(level, inner), inner, level.size, outer, size)
            score = score + merge(maps)
        score = box.crop(SCORES[self.score](score), outer)  # type: ignore[arg-type]
        around = box.grow(STRUCTURE_RADIUS, size)
        factor = structure_factor(source.read(around), self.structure)
        return score if factor is None else score * box.crop(factor, around)

    def _levels(self, source: Source) -> list[Source]:
        """The images and their coarser levels, as ``KeyNet.level_images``."""
        levels = [source]
        for _ in range(self.reference.num_levels - 1):
            size = pyramid_level_size(*levels[-1].size, self.reference.scale_factor)
            levels.append(Resized(levels[-1], size, blur=True))
        return levels

    def _learned(self, level: Source, box: Box) -> Tensor:
        """First layer and learned blocks of a box of one level, (B,M,h,w), in strips of rows."""
        outer = box.grow(self.halo, level.size)
        return box.crop(
            apply_tiled(level.read(outer), self.halo, TILE_PIXELS, self._features), outer
        )

    def _features(self, level: Tensor) -> Tensor:
        channels = [map for part in self.reference.first.parts(level) for map in part.split(1, 1)]
        return apply_paired(channels, self.stack, self.plain, self.plain.radii)
