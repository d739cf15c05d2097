"""DesNet: a fast dense descriptor, trained on keypoint candidates (Yuan et al. 2020, "Realtime
CNN-based ... Keypoint Candidates").

Idea: a descriptor needs a large receptive field, and those of an image's keypoints overlap; so one
fully convolutional network is applied once to the image, and descriptors are sampled from its map
at the keypoints of any detector.

In:  image (B,1,H,W), float32 gray in [0,1], any size from 1 x 1 up.
Out: map (B,D,ceil(H/8),ceil(W/8)); ``sample`` reads unit descriptors (N,D) from it.

The paper's code was never published: separate network, gray image, large receptive field and the
training on the detector's candidates are the paper's; the layers are ours (docs/models.md).
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..filters import resize
from ..geometry import resize_points
from .spec import DenseSpec, StackInput

#: Image pixels per cell of the map: three layers of stride 2.
STRIDE = 8
DIMS = (128, 64)
WIDTHS = (16, 32, 64)  # channels of the downsampling layers
# of the downsampling layers: the center of an even window is between pixels, as the half-pixel
# convention requires
KERNEL = 4
DILATIONS = (1, 2, 4)  # of the 3 x 3 layers after downsampling
#: Side of the window of the local contrast normalization in cells, and the constant added to its
#: deviation, which keeps the noise of constant areas small.
LCN_WINDOW = 5
LCN_EPS = 0.02
#: Side in pixels of the receptive field of the filters of one cell (134), and of the full one with
#: the local contrast normalization (184).
FILTER_FIELD = (
    1
    + sum((KERNEL - 1) * 2**i for i in range(len(WIDTHS)))
    + sum(2 * d * STRIDE for d in DILATIONS)
)
RECEPTIVE_FIELD = STRIDE * (1 + 2 * (FILTER_FIELD // (2 * STRIDE) + 1 + LCN_WINDOW // 2))
SAMPLING = ("bilinear", "bicubic")


class DesNet(nn.Module):
    """Dense descriptor network: image (B,1,H,W) -> map (B,D,h,w).

    Args:
        dim: D, 128 or 64.
        width: factor of ``WIDTHS``, 1 to 4; the run time grows with its square.

    Raises:
        ValueError: another dimension or width.
    """

    spec = DenseSpec()

    def __init__(self, *, dim: int = 128, width: int = 1):
        super().__init__()
        if dim not in DIMS:
            raise ValueError(f"dim must be one of {DIMS}, got {dim}")
        if width not in range(1, 5):
            raise ValueError(f"width must be a whole number from 1 to 4, got {width}")
        self.settings: dict[str, Any] = {"dim": int(dim), "width": int(width)}
        widths = [width * channels for channels in WIDTHS]
        self.dim = int(dim)
        self.downsample = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, KERNEL, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            )
            for a, b in pairwise((1, *widths))
        )
        wide = widths[-1]
        self.dilated = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(wide, wide, 3, padding=d, dilation=d, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU(),
            )
            for d in DILATIONS
        )
        self.head = nn.Conv2d(wide, dim, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B,D,h,w) of a gray image (B,1,H,W) in [0,1], not normalized; the center of cell j is
        at pixel ``8 j + 3.5``.
        """
        maps = local_contrast_normalization(pad_to_stride(image))
        for layer in self.downsample:
            maps = layer(maps)
        for layer in self.dilated:
            maps = maps + layer(maps)
        return self.head(maps)

    def fused(self, dtype: torch.dtype = torch.float32) -> FusedDesNet:
        """The same function for inference, faster: see ``FusedDesNet``."""
        return FusedDesNet(self, dtype)


def pad_to_stride(image: Tensor) -> Tensor:
    """Pad a gray image on the right and below, by repeating its last column and row, to a multiple
    of ``STRIDE``.

    Raises:
        ValueError: the shape is not (B,1,H,W).
    """
    if image.ndim != 4 or image.shape[1] != 1:
        raise ValueError(f"expected a gray image (B,1,H,W), got shape {tuple(image.shape)}")
    h, w = image.shape[-2:]
    below, right = -h % STRIDE, -w % STRIDE
    return F.pad(image, (0, right, 0, below), mode="replicate") if below or right else image


def local_contrast_normalization(image: Tensor) -> Tensor:
    """(value - mean) / (deviation + ``LCN_EPS``) of a gray image (B,1,H,W) of whole cells, with the
    statistics of the surrounding 5 x 5 cells, interpolated between cells.
    """
    size = (image.shape[-2], image.shape[-1])
    cells = F.avg_pool2d(torch.cat([image, image.square()], dim=1), STRIDE)
    mean, square = F.avg_pool2d(
        cells, LCN_WINDOW, stride=1, padding=LCN_WINDOW // 2, count_include_pad=False
    ).split(1, dim=1)
    factor = 1 / ((square - mean.square()).clamp(min=0).sqrt() + LCN_EPS)
    mean, factor = resize(torch.cat([mean, factor], dim=1), size).split(1, dim=1)
    return (image - mean) * factor


def sample(descriptor_map: Tensor, xy: Tensor, mode: str = "bilinear") -> Tensor:
    """Sample unit descriptors (N,D) at points (N,2) in pixels of the image from its map (1,D,h,w).

    Pixel x is at ``(x + 0.5) / 8 - 0.5`` of the map; beyond the centers of the outermost cells, the
    border is repeated.

    Raises:
        ValueError: an unknown mode (``SAMPLING``) or shapes that do not fit.
    """
    if mode not in SAMPLING:
        raise ValueError(f"mode must be one of {', '.join(SAMPLING)}; got {mode!r}")
    if descriptor_map.ndim != 4 or len(descriptor_map) != 1 or xy.ndim != 2 or xy.shape[1] != 2:
        raise ValueError(
            f"expected a map (1,D,h,w) and points (N,2), got {tuple(descriptor_map.shape)} and "
            f"{tuple(xy.shape)}"
        )
    return sample_batch(descriptor_map, xy[None], mode)[0]


def sample_batch(maps: Tensor, xy: Tensor, mode: str = "bilinear") -> Tensor:
    """As ``sample``, of maps (B,D,h,w) at points (B,N,2): (B,N,D)."""
    h, w = maps.shape[-2:]
    position = resize_points(xy.to(maps.dtype), 1 / STRIDE, 1 / STRIDE)
    grid = (position + 0.5) * position.new_tensor([2 / w, 2 / h]) - 1
    values = F.grid_sample(
        maps, grid[:, None], mode=mode, padding_mode="border", align_corners=False
    )  # (B,D,1,N)
    return F.normalize(values[:, :, 0].transpose(1, 2), dim=2)


class FusedDesNet(nn.Module):
    """A trained ``DesNet`` for inference: batch normalization folded into the filters,
    channels-last memory, filters in ``dtype``.

    Equal to the network in eval mode up to rounding. The weights are copied, so later training of
    the original has no effect.
    """

    spec = DesNet.spec

    def __init__(self, net: DesNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dim, self.dtype = net.dim, dtype
        net = copy.deepcopy(net).eval().requires_grad_(False)

        def folded(layers: nn.ModuleList) -> nn.ModuleList:
            return nn.ModuleList(fuse_conv_bn_eval(layer[0], layer[1]) for layer in layers)  # type: ignore[index]

        self.stack = _DesNetStack(folded(net.downsample), folded(net.dilated), net.head)
        self.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def forward(self, image: Tensor) -> Tensor:
        """Map (B,D,h,w) float32 of a gray image (B,1,H,W) in [0,1]."""
        maps = local_contrast_normalization(pad_to_stride(image)).to(self.dtype)
        return self.stack(maps).float()


class _DesNetStack(nn.Module):
    """The filters of a fused ``DesNet``: normalized image (B,1,H,W) -> map (B,D,H/8,W/8)."""

    input = StackInput(step=STRIDE)

    def __init__(self, downsample: nn.ModuleList, dilated: nn.ModuleList, head: nn.Module):
        super().__init__()
        self.downsample, self.dilated, self.head = downsample, dilated, head

    def forward(self, maps: Tensor) -> Tensor:
        for conv in self.downsample:
            maps = F.relu_(conv(maps.contiguous(memory_format=torch.channels_last)))
        for conv in self.dilated:
            maps = F.relu_(conv(maps)).add_(maps)
        return self.head(maps)
