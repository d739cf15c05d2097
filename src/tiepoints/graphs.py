"""Networks and whole extraction pipelines as modules that ``torch.onnx.export`` translates for
images of any size (``export``).

The arithmetic is that of the modules for inference, expressed so that neither sizes nor numbers of
points become constants: sizes of levels by integer fractions, sets of points by ``nonzero``. ONNX
Runtime computes the same features as ``extract.Extractor``, up to rounding.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .describe import DENSE_SCALE
from .detect import DUPLICATE_DISTANCE, SURPLUS, DetectOptions, response_floor
from .filters import BINOMIAL_5, gaussian_taps
from .gray import LUMA
from .models import desnet, keynet, patchnets, sobelnet
from .models.spec import DetectorSpec, PatchSpec, spec_of
from .patches import HALF_SIDE, PATCH_SIZE, doubled
from .pyramid import CONTEXT_SIDE, MIN_SIDE, SCALE_STEP

#: Largest side of an image for which the sizes of levels are those of the pyramid.
MAX_SIDE = 16384
#: Smallest side of an image, and of a level that is computed; smaller levels have no keypoints.
LEAST_SIDE = 16
#: sqrt(2) as a fraction: a convergent of its continued fraction, so that whole sizes up to its
#: denominator are the same; products with sizes fit 32 bits, in which OpenVINO computes.
ROOT_2 = Fraction(47321, 33461)
#: Domain of the nodes that eight-bit graphs replace.
INT8_DOMAIN = "tiepoints"
#: Distance in pixels of a level within which duplicates are searched: ``DUPLICATE_DISTANCE``, and
#: the roundings of two positions.
DUPLICATE_RADIUS = int(DUPLICATE_DISTANCE) + 1


# ---- sizes


def times(length: Any, factor: Fraction) -> Any:
    """``length * factor`` rounded down, for whole and for symbolic lengths."""
    return length * factor.numerator // factor.denominator


def enlarged(length: Any, level: int) -> Any:
    """Side of the enlarged level ``level`` of a pyramid (``pyramid.build_pyramid``)."""
    return times(length, 2 ** (level // 2) * (ROOT_2 if level % 2 else Fraction(1)))


def reduced(length: Any) -> Any:
    """Side of the next reduced level of a pyramid, at least ``LEAST_SIDE``."""
    return torch.sym_max(times(length, ROOT_2 / 2), LEAST_SIDE)


def sobelnet_side(length: Any, level: int) -> Any:
    """Side of a level inside SobelNet (``sobelnet.level_size``)."""
    if level % 2 == 0:
        return torch.sym_max(length // 2 ** (level // 2), 1)
    factor = ROOT_2 / 2 ** ((level + 1) // 2)
    numerator, denominator = factor.numerator, factor.denominator
    return torch.sym_max((length * numerator + denominator // 2) // denominator, 1)


def keynet_factor(factor: float) -> Fraction:
    """The reciprocal of the size ratio of Key.Net's levels as a fraction.

    Raises:
        ValueError: there is no small fraction that gives the same sizes.
    """
    simple = Fraction(factor).limit_denominator(10_000)
    fraction = 1 / simple
    if Fraction(factor) > simple:  # by its rounding: multiples have a pixel less
        fraction -= Fraction(1, fraction.denominator * 10**9)
    if any(times(n, fraction) != int(n // factor) for n in range(1, MAX_SIDE)):
        raise ValueError(f"a scale factor of {factor} cannot be exported; use one such as 1.2")
    return fraction


# ---- filters


def _filter(image: Tensor, weight: Tensor, mode: str) -> Tensor:
    """Correlate each channel of (B,C,H,W) with filters (K,1,k,l), the border padded by ``mode``:
    (B,C*K,H,W).
    """
    rows, columns = weight.shape[-2] // 2, weight.shape[-1] // 2
    channels = image.shape[1]
    padded = F.pad(image, (columns, columns, rows, rows), mode=mode)
    return F.conv2d(padded, weight.repeat(channels, 1, 1, 1), groups=channels)


def _separable(image: Tensor, taps: Tensor, mode: str) -> Tensor:
    rows = _filter(image, taps.view(1, 1, -1, 1), mode)
    return _filter(rows, taps.view(1, 1, 1, -1), mode)


def _resize(image: Tensor, size: tuple[Any, Any]) -> Tensor:
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)


def _sobel_filters() -> Tensor:
    """Filters (2,1,3,3) of ``filters.sobel``."""
    dx = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    return torch.stack([dx, dx.T])[:, None]


class _Filters(nn.Module):
    """Base class with the constant filters."""

    blur_taps: Tensor
    derivatives: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("blur_taps", torch.tensor(BINOMIAL_5))
        self.register_buffer("derivatives", _sobel_filters())

    def blur(self, image: Tensor) -> Tensor:
        """As ``filters.binomial_blur``."""
        taps = self.blur_taps
        return _filter(image, (taps[:, None] * taps)[None, None], "reflect")

    def sobel(self, image: Tensor) -> Tensor:
        """The derivatives dx, dy of each channel (B,C,H,W) -> (B,2C,H,W)."""
        return _filter(image, self.derivatives, "replicate")


class _Blocks(nn.ModuleList):
    """Convolutions with the batch normalization of their blocks, each followed by a ReLU."""

    def __init__(self, blocks: Any):
        super().__init__(fuse_conv_bn_eval(block[0], block[1]) for block in blocks)
        self.dim: int = self[-1].out_channels  # type: ignore[assignment]

    def forward(self, maps: Tensor) -> Tensor:
        for conv in self:
            maps = F.relu(conv(maps))
        return maps


class _Conv(nn.Module):
    """A convolution with the batch normalization that follows it.

    The filters are stored as they are and multiplied by the factors of the normalization in the
    graph, because they are exact in half precision and the products are not.
    """

    weight: Tensor
    factor: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None):
        super().__init__()
        factor, bias = torch.ones(len(conv.weight)), torch.zeros(len(conv.weight))
        if conv.bias is not None:
            bias = conv.bias.detach()
        if norm is not None:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            factor = torch.rsqrt(norm.running_var + norm.eps)
            factor = factor if norm.weight is None else factor * norm.weight.detach()
            bias = (bias - norm.running_mean) * factor
            bias = bias if norm.bias is None else bias + norm.bias.detach()
        self.register_buffer("weight", conv.weight.detach())
        self.register_buffer("factor", factor.view(-1, 1, 1, 1))
        self.register_buffer("bias", bias)
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation

    def filters(self) -> Tensor:
        """The filters with the factors."""
        return self.weight * self.factor

    def forward(self, maps: Tensor, filters: Tensor) -> Tensor:
        return F.conv2d(
            maps,
            filters,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
        )


class Int8Part(nn.Module):
    """The place of the costly part of a network, which ``export`` fills with its eight-bit graph.

    Args:
        graph: the eight-bit graph (``weights.int8_graph``).
        dim: channels of the output (B,dim,H/step,W/step), or with ``patches`` of (N,dim).
    """

    def __init__(self, graph: Path, dim: int, *, step: int = 1, patches: bool = False):
        super().__init__()
        self.graph, self.dim, self.step, self.patches = graph, dim, step, patches

    def forward(self, maps: Tensor) -> Tensor:
        count, _, h, w = maps.shape
        shape = (count, self.dim, h // self.step, w // self.step)
        return torch.onnx.ops.symbolic(
            f"{INT8_DOMAIN}::Int8",
            (maps,),
            {"graph": str(self.graph)},
            dtype=torch.float32,
            shape=shape[:2] if self.patches else shape,
            version=1,
        )


# ---- networks


class SobelNetGraph(_Filters):
    """``sobelnet.SobelNet``; with ``ratio`` 0 without the threshold relative to the maximum."""

    def __init__(self, net: sobelnet.SobelNet, int8: Path | None = None):
        super().__init__()
        net = copy.deepcopy(net).eval()
        self.ratio = net.ratio
        self.blocks, self.last = _blocks(net.blocks, int8), net.last

    def forward(self, image: Tensor) -> Tensor:
        """Score map (B,1,H,W) of a gray image (B,1,H,W)."""
        h, w = image.shape[-2:]
        levels = [image]
        for i in range(1, sobelnet.NUM_LEVELS):
            size = sobelnet_side(h, i), sobelnet_side(w, i)
            levels.append(_resize(self.blur(levels[-1]), size))
        total: Tensor | None = None
        for level in reversed(levels):
            gradient = self.sobel(self.blur(level))
            magnitude = (gradient.square().sum(dim=1, keepdim=True) + sobelnet._EPS).sqrt()
            maps = torch.cat([gradient, magnitude], dim=1)
            maps = self.blocks(maps)
            if total is not None:
                maps = maps + _resize(total, (level.shape[-2], level.shape[-1]))
            total = maps
        assert total is not None
        return sobelnet.cut(F.softplus(self.last(total)), self.ratio)


class KeyNetGraph(_Filters):
    """``keynet.KeyNet``."""

    def __init__(self, net: keynet.KeyNet, int8: Path | None = None):
        super().__init__()
        net = copy.deepcopy(net).eval()
        self.names, self.learned = net.first.names, net.first.learned
        self.blocks, self.last = _blocks(net.blocks, int8), net.last
        self.num_levels = net.num_levels
        self.factor = keynet_factor(net.scale_factor)
        self.score, self.structure = net.settings["score"], net.settings["structure"]
        self.register_buffer("window", gaussian_taps(keynet.STRUCTURE_SIGMA))

    window: Tensor

    def forward(self, image: Tensor) -> Tensor:
        """Score map (B,1,H,W) of a gray image (B,1,H,W)."""
        h, w = image.shape[-2:]
        level, maps = image, [self._features(image)]
        for _ in range(self.num_levels - 1):
            size = times(level.shape[-2], self.factor), times(level.shape[-1], self.factor)
            level = _resize(self.blur(level), size)
            maps.append(_resize(self._features(level), (h, w)))
        volume = torch.cat(maps, dim=1)
        if self.last is None:
            return volume
        score = keynet.SCORES[self.score](self.last(volume))
        return score * self._corner_factor(image) if self.structure else score

    def _features(self, image: Tensor) -> Tensor:
        channels = []
        if self.names:
            first = self.sobel(image)
            dx, dy = first.split(1, dim=1)
            dxx, dxy, _, dyy = self.sobel(first).split(1, dim=1)
            found = {"dx": dx, "dy": dy, "dxx": dxx, "dxy": dxy, "dyy": dyy}
            for name in self.names:
                left, _, right = name.partition("*")
                if right:
                    channels.append(found[left] * found[right])
                elif name.endswith("^2"):
                    channels.append(found[name[:-2]].square())
                else:
                    channels.append(found[name])
        if self.learned is not None:
            channels.append(self.learned(image))
        return self.blocks(torch.cat(channels, dim=1))

    def _corner_factor(self, image: Tensor) -> Tensor:
        """As ``keynet.structure_factor``."""
        dx, dy = self.sobel(image).split(1, dim=1)
        products = torch.cat([dx.square(), dy.square(), dx * dy], dim=1)
        xx, yy, xy = _separable(products, self.window, "replicate").split(1, dim=1)
        root = ((xx - yy).square() + 4 * xy.square()).sqrt()
        strength = ((xx + yy - root) / 2).clamp(min=0)
        zero = torch.zeros_like(strength)
        return torch.where(strength < keynet.STRUCTURE_FLOOR, zero, strength**self.structure)


class DesNetGraph(nn.Module):
    """``desnet.DesNet``."""

    def __init__(self, net: desnet.DesNet, int8: Path | None = None):
        super().__init__()
        net = copy.deepcopy(net).eval()
        self.dim = net.dim
        self.int8 = None if int8 is None else Int8Part(int8, net.dim, step=desnet.STRIDE)
        self.downsample, self.dilated = (
            nn.ModuleList(_Conv(layer[0], layer[1]) for layer in layers)  # type: ignore[index]
            for layers in (net.downsample, net.dilated)
        )
        self.head = _Conv(net.head)

    def filters(self) -> list[Tensor]:
        """The filters of all layers, to be computed once for several images."""
        if self.int8 is not None:
            return []
        layers = [*self.downsample, *self.dilated, self.head]
        return [layer.filters() for layer in layers]

    def forward(self, image: Tensor, filters: list[Tensor] | None = None) -> Tensor:
        """Map (B,D,ceil(H/8),ceil(W/8)) of a gray image (B,1,H,W)."""
        rest = iter(self.filters() if filters is None else filters)
        h, w = image.shape[-2:]
        step = desnet.STRIDE
        below, right = (h + step - 1) // step * step - h, (w + step - 1) // step * step - w
        maps = self._normalized(F.pad(image, (0, right, 0, below), mode="replicate"))
        if self.int8 is not None:
            return self.int8(maps)
        for conv in self.downsample:
            maps = F.relu(conv(maps, next(rest)))
        for conv in self.dilated:
            maps = maps + F.relu(conv(maps, next(rest)))
        return self.head(maps, next(rest))

    def _normalized(self, image: Tensor) -> Tensor:
        """As ``desnet.local_contrast_normalization``."""
        window = desnet.LCN_WINDOW
        cells = F.avg_pool2d(torch.cat([image, image.square()], dim=1), desnet.STRIDE)
        means = F.avg_pool2d(cells, window, 1, window // 2, count_include_pad=False)
        mean, square = means.split(1, dim=1)
        factor = 1 / ((square - mean.square()).clamp(min=0).sqrt() + desnet.LCN_EPS)
        size = image.shape[-2], image.shape[-1]
        mean, factor = _resize(torch.cat([mean, factor], dim=1), size).split(1, dim=1)
        return (image - mean) * factor


class PatchNetGraph(nn.Module):
    """A ``patchnets.PatchNet`` for patches of its own size."""

    def __init__(self, net: patchnets.PatchNet, int8: Path | None = None):
        super().__init__()
        dim = patchnets.DIMENSION
        self.int8 = None if int8 is None else Int8Part(int8, dim, patches=True)
        self.net = net = copy.deepcopy(net).eval()
        norms: list[Any] = [None] * len(net.convolutions)
        if isinstance(net, patchnets.HardNet):
            norms = list(net.norms)
        elif isinstance(net, patchnets.HyNet):
            norms[-1] = net.last_norm
        convolutions = zip(net.convolutions, norms, strict=True)
        self.layers = nn.ModuleList(_Conv(conv, norm) for conv, norm in convolutions)  # type: ignore[arg-type]
        net.fold()  # what follows a layer then is its activation only

    def forward(self, patches: Tensor) -> Tensor:
        """Unit descriptors (N,128) of patches (N,C,32,32)."""
        if self.int8 is not None:
            return self.int8(patches)
        return patchnets.unit(self.vectors(patches))

    def vectors(self, patches: Tensor) -> Tensor:
        """(N,C,32,32) -> (N,128), as by the network."""
        maps = self.net.standardize(patches)
        for index, layer in enumerate(self.layers):
            maps = self.net.follow(index, _apply(layer, maps))
        return maps.flatten(1)


class ContextGraph(PatchNetGraph):
    """A ``patchnets.HardNetContext``."""

    def __init__(self, net: patchnets.HardNetContext, int8: Path | None = None):
        super().__init__(net, int8)
        convolutions = zip(net.context, net.context_norms, strict=True)
        self.context = nn.ModuleList(_Conv(conv, norm) for conv, norm in convolutions)  # type: ignore[arg-type]

    def vectors(self, patches: Tensor) -> Tensor:
        around = self.net.standardize(F.avg_pool2d(patches[:, 1:], 2))
        _, count, side, _ = around.shape
        around = around.reshape(-1, 1, side, side)
        last = len(self.context) - count
        for layer in self.context[:last]:
            around = F.relu(_apply(layer, around))
        around = around.reshape(-1, count, *around.shape[1:])
        parts = [super().vectors(patches[:, :1])]
        for i, layer in enumerate(self.context[last:]):
            parts.append(_apply(layer, around[:, i]).flatten(1))
        return patchnets.joined(parts)


def _apply(layer: Any, maps: Tensor) -> Tensor:
    return layer(maps, layer.filters())


#: Network -> its module for export.
NETWORKS: dict[type[nn.Module], Any] = {
    sobelnet.SobelNet: SobelNetGraph,
    keynet.KeyNet: KeyNetGraph,
    desnet.DesNet: DesNetGraph,
    patchnets.HardNet: PatchNetGraph,
    patchnets.HardNetLight: PatchNetGraph,
    patchnets.HardNetContext: ContextGraph,
    patchnets.SOSNet: PatchNetGraph,
    patchnets.HyNet: PatchNetGraph,
}


class _PairedInt8(nn.Module):
    """The eight-bit blocks of a detector, which are those of pairs of columns
    (``kernels.column_pairs``). With an odd width, the last columns differ slightly; they lie in the
    border without keypoints.
    """

    def __init__(self, graph: Path, dim: int):
        super().__init__()
        self.dim, self.part = dim, Int8Part(graph, 2 * dim)

    def forward(self, maps: Tensor) -> Tensor:
        _, c, h, w = maps.shape
        half = (w + 1) // 2
        pairs = F.pad(maps, (0, 2 * half - w)).reshape(1, c, h, half, 2)
        out = self.part(pairs.permute(0, 4, 1, 2, 3).reshape(1, 2 * c, h, half))
        out = out.reshape(1, 2, self.dim, h, half).permute(0, 2, 3, 4, 1)
        return out.reshape(1, self.dim, h, 2 * half)[..., :w]


def _blocks(blocks: Any, int8: Path | None) -> nn.Module:
    found = _Blocks(blocks)
    return found if int8 is None else _PairedInt8(int8, found.dim)


def network_graph(net: nn.Module, int8: Path | None = None) -> nn.Module:
    """The module for export of a network.

    Args:
        net: not fused.
        int8: the eight-bit graph that replaces its costly part.

    Raises:
        ValueError: there is none for a network of its type.
    """
    make = NETWORKS.get(type(net))
    if make is None:
        names = ", ".join(sorted(kind.__name__ for kind in NETWORKS))
        raise ValueError(f"a {type(net).__name__} cannot be exported; use one of {names}")
    return make(net, int8)


# ---- pipeline


def _lengths(*values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of whole or symbolic lengths."""
    return torch.cat([torch.full((1,), value, dtype=dtype) for value in values])


def _sample(maps: Tensor, xy: Tensor) -> Tensor:
    """Values (C,...) at positions (...,2) in pixels of maps (1,C,H,W), bilinear; the border is
    repeated.
    """
    size = _lengths(maps.shape[-1], maps.shape[-2], dtype=torch.float32)
    grid = (xy + 0.5) * (2 / size) - 1
    return F.grid_sample(
        maps, grid[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0]


def _sorted(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N,) in descending order, equal ones in theirs, and their indices."""
    return torch.sort(values, descending=True, stable=True)


def _first(count: Tensor, length: Any) -> Tensor:
    """Indices of the first ``count`` (1,) of ``length`` elements."""
    return (torch.arange(length) < count).nonzero()[:, 0]


@dataclass
class _Level:
    """A level of the pyramid.

    Attributes:
        image: (1,1,h,w).
        size, ratio: (2,) x, y: its size, and that of the image relative to it, float64.
        valid: (1,) bool, whether it is large enough.
    """

    image: Tensor
    size: Tensor
    ratio: Tensor
    valid: Tensor

    @property
    def scale(self) -> Tensor:
        """Pixels of the image per pixel of the level, (1,) float64."""
        return self.ratio.prod(dim=0, keepdim=True).sqrt()

    def to_original(self, xy: Tensor) -> Tensor:
        return (xy + 0.5) * self.ratio.float() - 0.5

    def from_original(self, xy: Tensor) -> Tensor:
        return (xy + 0.5) * (1 / self.ratio).float() - 0.5


@dataclass
class _Candidates:
    """Candidates of a level, N rows: see ``detect._Candidates``; ``position`` is that in the
    image.
    """

    pixel: Tensor
    position: Tensor
    score: Tensor
    own: Tensor
    levels_above: Tensor


class PipelineGraph(_Filters):
    """Detector and descriptor that share a pyramid, as ``extract.Extractor``.

    Args:
        detector: network image -> score map, with a ``spec``.
        descriptor: patch network, ``DesNet``, or None.
        options: options of the detector; ``up_levels``, ``down_levels`` and ``nms_shape`` given.
        int8: eight-bit graphs of the two networks (``network_graph``).

    Raises:
        ValueError: an option or network that cannot be exported.
    """

    def __init__(
        self,
        detector: nn.Module,
        descriptor: nn.Module | None,
        options: DetectOptions,
        int8: tuple[Path | None, Path | None] = (None, None),
    ):
        super().__init__()
        if options.official:
            raise ValueError("the published extraction (official) cannot be exported")
        if options.nms_shape == "round":
            raise ValueError("detectors with round suppression windows, REKD's, cannot be exported")
        if options.margin < 1:
            raise ValueError("a border of at least 1 pixel is required for the export")
        spec = spec_of(detector)
        assert isinstance(spec, DetectorSpec)
        self.options, self.scale_power = options, spec.scale_power
        self.up, self.down = options.up_levels or 0, options.down_levels or 0
        self.register_buffer("luma", torch.tensor(LUMA))
        self.register_buffer("offset", torch.tensor(getattr(detector, "offset", (0.0, 0.0))))
        floor = getattr(detector, "floor", None)
        self.floor = response_floor(detector) if floor is None else float(floor)
        self.threshold = max(options.threshold, self.floor * (1 + 1e-3) + 1e-6)
        ratio = getattr(detector, "ratio", 0.0)
        self.ratio = float(ratio if options.cut_ratio is None else options.cut_ratio)
        self.scores = network_graph(detector, int8[0])
        if isinstance(self.scores, SobelNetGraph):
            self.scores.ratio = 0.0  # applied to the candidates
        self.describe = None if descriptor is None else network_graph(descriptor, int8[1])
        described_by = None if descriptor is None else spec_of(descriptor)
        self.reach = described_by.reach if isinstance(described_by, PatchSpec) else (1.0,)

    luma: Tensor
    offset: Tensor

    def forward(self, image: Tensor, max_keypoints: Tensor) -> tuple[Tensor, ...]:
        """Features of an image.

        Args:
            image: (1,1,H,W) gray or (1,3,H,W) RGB in [0,1].
            max_keypoints: (1,) int64, at least 1.

        Returns:
            keypoints (K,2), scales (K,), scores (K,), and with a descriptor descriptors (K,D),
            strongest first.
        """
        weights = self.luma[: image.shape[1]]
        weights = weights / weights.sum()
        gray = (image * weights[None, :, None, None]).sum(dim=1, keepdim=True)
        levels = self._pyramid(gray)
        budgets = self._budgets(levels, max_keypoints)
        found: list[_Candidates] = []
        for i, level in enumerate(levels):
            scores = self.scores(level.image)
            if not self.options.per_scale:
                for candidates in found:
                    self._respond(level, scores, candidates)
            count = self._count(budgets, i, levels, max_keypoints)
            found.append(self._detect(level, scores, count))
        keypoints, scales, values = self._select(levels, found, budgets, max_keypoints)
        if self.describe is None:
            return keypoints, scales, values
        if isinstance(self.describe, DesNetGraph):
            return keypoints, scales, values, self._dense(levels, keypoints, scales)
        return keypoints, scales, values, self._described(levels, keypoints, scales)

    def _pyramid(self, gray: Tensor) -> list[_Level]:
        h, w = gray.shape[-2:]

        def level(image: Tensor, least: int) -> _Level:
            size = _lengths(image.shape[-1], image.shape[-2])
            valid = size.min(dim=0, keepdim=True)[0] >= least
            return _Level(image, size, _lengths(w, h) / size, valid)

        levels, current = [level(gray, 0)], gray
        for i in range(1, self.up + 1):
            current = _resize(current, (enlarged(h, i), enlarged(w, i)))
            levels.insert(0, level(current, 0))
        current = gray
        for _ in range(self.down):
            current = self._reduced(current)
            levels.append(level(current, MIN_SIDE))
        return levels

    def _reduced(self, image: Tensor) -> Tensor:
        return _resize(self.blur(image), (reduced(image.shape[-2]), reduced(image.shape[-1])))

    def _budgets(self, levels: list[_Level], count: Tensor) -> Tensor:
        """As ``pyramid.level_budgets``, (L,) int64; 0 for levels that are too small."""
        shares = torch.tensor([2.0 ** (self.up - i) for i in range(len(levels))])
        shares = shares.double() * torch.cat([level.valid for level in levels]).double()
        return (count.double() * shares / shares.sum()).floor().long()

    def _count(self, budgets: Tensor, i: int, levels: list[_Level], count: Tensor) -> Tensor:
        """Maximum number (1,) of candidates of a level, as in ``detect``."""
        several = torch.cat([level.valid for level in levels]).long().sum() > 1
        surplus = torch.where(several, budgets[i : i + 1] * int(SURPLUS), budgets[i : i + 1])
        return surplus + count - budgets.sum() + 1

    def _detect(self, level: _Level, scores: Tensor, count: Tensor) -> _Candidates:
        h, w = scores.shape[-2:]
        border = self.options.margin
        found = (scores == self._largest(scores)) & (scores > self.threshold)
        rows, columns = torch.arange(h), torch.arange(w)
        found = found & self._first_of_plateau(found, rows, columns)
        inside = ((rows >= border) & (rows < h - border))[:, None] & (
            (columns >= border) & (columns < w - border)
        )
        y, x = (found[0, 0] & inside & level.valid).nonzero().unbind(dim=1)
        score, order = _sorted(scores.flatten()[y * w + x])
        least = self.ratio * scores.max()
        kept = ((torch.arange(score.shape[0]) < count) & (score >= least)).nonzero()[:, 0]
        order, score = order[kept], score[kept]
        x, y = x[order], y[order]
        refined = _refine(scores.flatten(), x, y, w)
        own = self._response(scores, refined).clamp(min=1e-9)
        position = level.to_original(refined - self.offset)
        return _Candidates(y * w + x, position, score, own, torch.zeros_like(score))

    def _first_of_plateau(self, found: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether no other candidate of the window comes before, in reading order: in its upper
        rows, or before in the same row. In single precision, which runtimes have for ``MaxPool``.
        """
        above = (rows.shape[0] - rows).float()[:, None] * found
        before = (columns.shape[0] - columns).float() * found
        return (above == self._largest(above)) & (before == self._largest_of_row(before))

    def _largest(self, maps: Tensor) -> Tensor:
        """As ``keypoints.max_filter``."""
        window = self.options.window
        return F.max_pool2d(self._largest_of_row(maps), (window, 1), 1, (window // 2, 0))

    def _largest_of_row(self, maps: Tensor) -> Tensor:
        window = self.options.window
        return F.max_pool2d(maps, (1, window), 1, (0, window // 2))

    def _response(self, scores: Tensor, xy: Tensor) -> Tensor:
        return (_sample(scores, xy[None])[0, 0] - self.floor).clamp(min=0)

    def _respond(self, level: _Level, scores: Tensor, candidates: _Candidates) -> None:
        xy = level.from_original(candidates.position) + self.offset
        response = (self._response(scores, xy) / candidates.own).clamp(max=1).sqrt()
        candidates.levels_above = candidates.levels_above + response * level.valid.float()

    def _select(
        self, levels: list[_Level], found: list[_Candidates], budgets: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, scales and scores of the keypoints of all levels."""
        position = torch.cat([one.position for one in found])
        score = torch.cat([one.score for one in found])
        kept = torch.ones_like(score, dtype=torch.bool)
        if not self.options.per_scale and len(levels) > 1:
            kept = ~self._duplicates(levels, found, position, score)
        pairs = list(zip(levels, found, strict=True))
        weighted = torch.cat(
            [one.score * (level.scale**self.scale_power).float() for level, one in pairs]
        )
        scale = torch.cat(
            [level.scale.float() * SCALE_STEP**one.levels_above for level, one in pairs]
        )
        level_of = torch.cat(
            [torch.full_like(one.score, i, dtype=torch.int64) for i, one in enumerate(found)]
        )
        chosen = _within_budgets(level_of, kept, budgets, len(levels))
        rest = (kept & ~chosen).nonzero()[:, 0]
        ordered = rest[_sorted(weighted[rest])[1]]
        fill = ordered[_first(count - chosen.long().sum(), ordered.shape[0])]
        rows = torch.cat([chosen.nonzero()[:, 0], fill])
        values, order = _sorted(weighted[rows])
        rows = rows[order]
        return position[rows], scale[rows], values

    def _duplicates(
        self, levels: list[_Level], found: list[_Candidates], position: Tensor, score: Tensor
    ) -> Tensor:
        """As ``detect._duplicates``, (N,) bool; the candidates of a finer level are searched in a
        map of their numbers around those of the coarser levels.
        """
        counts = [one.score.shape[0] for one in found]
        drop = torch.zeros_like(score, dtype=torch.bool)
        side = torch.arange(-DUPLICATE_RADIUS, DUPLICATE_RADIUS + 1)
        start: Any = 0
        for fine, level in enumerate(levels[:-1]):
            h, w = level.image.shape[-2:]
            numbers = torch.full((h * w,), -1, dtype=torch.int64)
            numbers[found[fine].pixel] = torch.arange(counts[fine]) + start
            start = start + counts[fine]
            coarser = torch.cat([one.position for one in found[fine + 1 :]])
            center = (level.from_original(coarser) + self.offset).round().long()
            x = center[:, 0].clamp(DUPLICATE_RADIUS, w - 1 - DUPLICATE_RADIUS)
            y = center[:, 1].clamp(DUPLICATE_RADIUS, h - 1 - DUPLICATE_RADIUS)
            around = (y * w + x)[:, None, None] + side[:, None] * w + side
            finer = numbers[around.flatten(1)]
            b, column = (finer >= 0).nonzero().unbind(dim=1)
            a, b = finer[b, column], b + start
            distance = (position[b] - position[a]).square().sum(dim=1).sqrt()
            near = distance < (DUPLICATE_DISTANCE * level.scale).float()
            stronger = score[b] > score[a]
            dropped = torch.where(stronger, a, b)[near.nonzero()[:, 0]]
            drop = drop.index_put((dropped,), torch.ones_like(dropped, dtype=torch.bool))
        return drop

    def _dense(self, levels: list[_Level], xy: Tensor, scale: Tensor) -> Tensor:
        """As ``describe.DenseDescriptor``."""
        assert isinstance(self.describe, DesNetGraph)
        scales = torch.cat([level.scale for level in levels]).float().log()
        valid = torch.cat([level.valid for level in levels])
        distance = ((DENSE_SCALE * scale).clamp(min=1e-6).log()[:, None] - scales).abs()
        nearest = torch.where(valid, distance, torch.full_like(distance, 1e9)).argmin(dim=1)
        out = torch.zeros_like(scale)[:, None].repeat(1, self.describe.dim)
        filters = self.describe.filters()
        for i, level in enumerate(levels):
            rows = (nearest == i).nonzero()[:, 0]
            maps = self.describe(level.image, filters)
            cell = (level.from_original(xy[rows]) + 0.5) / desnet.STRIDE - 0.5
            found = F.normalize(_sample(maps, cell[None])[:, 0].T, dim=1)
            out = out.index_put((rows,), found)
        return out

    def _described(self, levels: list[_Level], xy: Tensor, scale: Tensor) -> Tensor:
        """As ``describe.PatchDescriptor`` of upright keypoints."""
        near, *others = self.reach
        channels = [self._patches(levels, xy, scale, near * HALF_SIDE, PATCH_SIZE)]
        size = PATCH_SIZE // 2
        if others:
            levels = self._with_coarser(levels, 2 * max(others) * HALF_SIDE / size)
        for factor in others:
            patches = self._patches(levels, xy, scale, factor * HALF_SIDE, size)
            channels.append(doubled(patches))
        assert self.describe is not None
        return self.describe(torch.stack(channels, dim=1))

    def _with_coarser(self, levels: list[_Level], step: float) -> list[_Level]:
        """As ``Pyramid.with_coarser``, for keypoints of the last level whose samples are ``step``
        of its pixels apart.
        """
        finer, reduced_levels = levels[: self.up + 1], levels[self.up + 1 :]
        last = levels[-1]
        image = last.image
        for _ in range(int(math.log(step, SCALE_STEP))):
            image = self._reduced(image)
            size = _lengths(image.shape[-1], image.shape[-2])
            reduced_levels.append(_Level(image, size, last.size * last.ratio / size, last.valid))
        for level in reduced_levels:
            valid = level.size.min(dim=0, keepdim=True)[0] > CONTEXT_SIDE
            finer.append(replace(level, valid=valid))
        return finer

    def _patches(
        self, levels: list[_Level], xy: Tensor, scale: Tensor, half_side: float, size: int
    ) -> Tensor:
        """As ``patches.extract_patches``, (N,size,size)."""
        step = scale * (2 * half_side / size)
        scales = torch.cat([level.scale for level in levels]).float()
        valid = torch.cat([level.valid for level in levels])
        level_of = ((step[:, None] >= scales) & valid).long().sum(dim=1).sub(1).clamp(min=0)
        side = half_side * ((2 * torch.arange(size).float() + 1) / size - 1)
        v, u = torch.meshgrid(side, side, indexing="ij")
        offsets = torch.stack([u.flatten(), v.flatten()], dim=1)
        patches = torch.zeros_like(scale)[:, None].repeat(1, size**2)
        for i, level in enumerate(levels):
            rows = (level_of == i).nonzero()[:, 0]
            points = xy[rows][:, None] + scale[rows][:, None, None] * offsets
            patches = patches.index_put(
                (rows,), _sample(level.image, level.from_original(points))[0]
            )
        return patches.view(-1, size, size)


class ColmapGraph(nn.Module):
    """A pipeline with the inputs and outputs of the ALIKED networks that COLMAP runs.

    Positions are relative to the image, the centers of its outermost pixels at -1 and 1. Scores are
    mapped into [``min_score``, 1], because that limit is one for the scores of ALIKED.
    """

    def __init__(self, pipeline: PipelineGraph):
        super().__init__()
        self.pipeline = pipeline

    def forward(
        self, image: Tensor, max_keypoints: Tensor, min_score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of an image.

        Args:
            image: (1,3,H,W) RGB in [0,1].
            max_keypoints: () int64, at least 1.
            min_score: () in [0,1].

        Returns:
            keypoints (1,K,2), descriptors (1,K,D), scores (1,K), strongest first.
        """
        xy, _, scores, descriptors = self.pipeline(image, max_keypoints.reshape(1))
        size = _lengths(image.shape[-1], image.shape[-2], dtype=torch.float32)
        scores = min_score + (1 - min_score) * scores / (1 + scores)
        return (xy * (2 / (size - 1)) - 1)[None], descriptors[None], scores[None]


def _refine(scores: Tensor, x: Tensor, y: Tensor, width: Any) -> Tensor:
    """As ``keypoints.refine`` of pixels that are not at the edge, of a flat score map."""
    center = y * width + x

    def at(dy: int, dx: int) -> Tensor:
        return scores[center + (dy * width + dx)].double()

    mid = at(0, 0)
    gx, gy = (at(0, 1) - at(0, -1)) / 2, (at(1, 0) - at(-1, 0)) / 2
    hxx, hyy = at(0, 1) + at(0, -1) - 2 * mid, at(1, 0) + at(-1, 0) - 2 * mid
    hxy = (at(1, 1) + at(-1, -1) - at(1, -1) - at(-1, 1)) / 4
    det = hxx * hyy - hxy * hxy
    proper = (det > 1e-12 * mid.square()) & (hxx < 0)
    det = torch.where(proper, det, torch.ones_like(det))
    step = torch.stack([(hxy * gy - hyy * gx) / det, (hxy * gx - hxx * gy) / det], dim=1)
    step = torch.where(proper[:, None], step, torch.zeros_like(step)).clamp(-0.5, 0.5)
    return (torch.stack([x, y], dim=1).double() + step).float()


def _within_budgets(level_of: Tensor, kept: Tensor, budgets: Tensor, levels: int) -> Tensor:
    """The keypoints (N,) bool within the budget of their level, which includes what the levels
    before have left, as in ``detect``.
    """
    chosen = torch.zeros_like(kept)
    left = torch.zeros_like(budgets[:1])
    for level in range(levels):
        of_level = kept & (level_of == level)
        left = left + budgets[level : level + 1]
        now = of_level & (of_level.long().cumsum(dim=0) <= left.clamp(min=0))
        left = left - now.long().sum()
        chosen = chosen | now
    return chosen
