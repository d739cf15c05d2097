"""Convolutions that turn along with the image: the rotation group C_N in plain PyTorch.

Sources: group convolutions (Cohen and Welling, ICML 2016), steerable filters (Weiler and Cesa,
NeurIPS 2019), as REKD uses them (Lee et al., CVPR 2022). docs/models.md derives what is ours: the
order of coefficients, their initialisation.

Idea: a *regular field* is N maps, one for each orientation of the same filter; turning the image by
360/N degrees turns the maps and moves them on by one. A filter is a sum of polar waves ``ring(r)
cos(m phi)``, ``ring(r) sin(m phi)``, which can be turned by any angle exactly; so one set of
coefficients gives the filters of all N orientations.

Maps are ordinary tensors (B, fields*N, H, W), field by field: channel ``f * N + g`` is orientation
g of field f. A turn of the image by 360/N degrees **counter-clockwise as seen** moves g to g + 1.
Quarter turns are exact where 4 divides N; other turns as exact as pixels allow. A trained layer is
frozen into an ordinary ``Conv2d`` by ``frozen``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Ring:
    """A ring of the polar basis: radius and Gaussian width in pixels, highest angular frequency
    that it carries.
    """

    radius: float
    sigma: float
    frequency: int


def published_rings(kernel_size: int) -> tuple[Ring, ...]:
    """The rings of e2cnn 0.1.9 and escnn for an odd kernel: radii 0, 1, ..., widths 0.6 (outermost
    0.4), frequencies at most 2r.

    The outermost ring stops at frequency 2: more would alias on its few pixels.
    """
    reach = kernel_size // 2
    rings = [Ring(0.0, 0.005, 0)]
    for radius in range(1, reach + 1):
        last = radius == reach
        frequency = min(2 * radius, 2 if last else 2 * radius - (radius + 1) % 2)
        rings.append(Ring(float(radius), 0.4 if last else 0.6, frequency))
    return tuple(rings)


#: Our rings of a 5 x 5 kernel. The waves die out before its corners, which are not round, and the
#: middle is soft: the error of equivariance after three layers is 20-30 % below the published
#: rings' (docs/models.md).
SMOOTH_RINGS = (Ring(0.0, 0.7, 0), Ring(1.0, 0.6, 2), Ring(1.8, 0.45, 2))


def polar_basis(
    kernel_size: int, turns: Sequence[float], rings: Sequence[Ring] | None = None
) -> Tensor:
    """The basis filters turned counter-clockwise by each of ``turns`` radians: (len(turns), K, k,
    k) float64.

    Filters: for every ring its constant, then the cosine and sine of each frequency; before turning
    each has the Euclidean norm 1. For the published rings of a 5 x 5 kernel K is 11, of a 1 x 1
    kernel 1.

    Raises:
        ValueError: the kernel size is even or below 1.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    rings = published_rings(kernel_size) if rings is None else tuple(rings)
    axis = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    y, x = torch.meshgrid(-axis, axis, indexing="ij")  # y up: angles grow counter-clockwise as seen
    r, phi = torch.hypot(x, y), torch.atan2(y, x)
    filters = []
    for ring in rings:
        profile = torch.exp(-((r - ring.radius) ** 2) / (2 * ring.sigma**2))
        for m in range(ring.frequency + 1):
            # no wave has a direction at the centre
            part = profile if m == 0 else torch.where(r > 0, profile, torch.zeros_like(profile))
            for phase in (0.0,) if m == 0 else (0.0, math.pi / 2):
                upright = part * torch.cos(m * phi - phase)
                filters.append(
                    torch.stack([part * torch.cos(m * (phi - turn) - phase) for turn in turns])
                    / upright.norm()
                )
    return torch.stack(filters, dim=1)


class _RotationConv(nn.Module):
    """What both convolutions share: coefficients, basis, and the ordinary filters that they
    make.
    """

    basis: Tensor

    def __init__(
        self,
        group: int,
        fields_in: int,
        fields_out: int,
        kernel_size: int,
        relations: int,
        rings: Sequence[Ring] | None,
    ):
        super().__init__()
        if group < 1:
            raise ValueError(f"the group must have at least one rotation, got {group}")
        if min(fields_in, fields_out) < 1:
            raise ValueError(f"fields must be at least 1, got {fields_in} in and {fields_out} out")
        self.group, self.kernel_size = group, kernel_size
        self.rings = published_rings(kernel_size) if rings is None else tuple(rings)
        basis = polar_basis(
            kernel_size, [2 * math.pi * g / group for g in range(group)], self.rings
        )
        self.register_buffer("basis", basis.to(torch.float32), persistent=False)  # (N,K,k,k)
        self.coefficients = nn.Parameter(
            torch.zeros(fields_out, fields_in, relations, basis.shape[1])
        )
        self.initialize()

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """He initialisation: the filters of one output map have the mean squared norm 2."""
        with torch.no_grad():
            self.coefficients.normal_(
                0.0, math.sqrt(2 / self.coefficients[0].numel()), generator=generator
            )

    def filters(self) -> Tensor:
        """Ordinary filters (out, in, k, k)."""
        raise NotImplementedError

    def forward(self, maps: Tensor) -> Tensor:
        """(B,in,H,W) -> (B,out,H,W); zeros outside the image."""
        return F.conv2d(maps, self.filters(), padding=self.kernel_size // 2)

    def frozen(self) -> nn.Conv2d:
        """The same convolution with its filters made once."""
        weight = self.filters().detach()
        conv = nn.Conv2d(
            weight.shape[1],
            weight.shape[0],
            self.kernel_size,
            padding=self.kernel_size // 2,
            bias=False,
        )
        conv.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return conv


class LiftingConv(_RotationConv):
    """An image, or maps that only turn, to regular fields: (B,C,H,W) -> (B,fields*N,H,W).

    Args:
        group: N, rotations of the group.
        channels: C; an image has one.
        fields: regular fields out.
        kernel_size: odd side of the filters in pixels.
        rings: of the basis; default ``published_rings``.
    """

    def __init__(
        self,
        group: int,
        channels: int,
        fields: int,
        kernel_size: int = 5,
        rings: Sequence[Ring] | None = None,
    ):
        super().__init__(group, channels, fields, kernel_size, 1, rings)

    def filters(self) -> Tensor:
        """(fields*N, C, k, k): each filter turned to all N orientations."""
        made = torch.einsum("oik,gkyx->ogiyx", self.coefficients[:, :, 0], self.basis)
        return made.flatten(0, 1)


class GroupConv(_RotationConv):
    """Regular fields to regular fields: (B,fields_in*N,H,W) -> (B,fields_out*N,H,W).

    Output orientation g weighs input orientation g + h by filter h turned by g; with a kernel of 1
    this is a cyclic correlation over the orientations. Arguments as ``LiftingConv``.
    """

    def __init__(
        self,
        group: int,
        fields_in: int,
        fields_out: int,
        kernel_size: int = 5,
        rings: Sequence[Ring] | None = None,
    ):
        super().__init__(group, fields_in, fields_out, kernel_size, group, rings)
        g = torch.arange(group)
        self.register_buffer(
            "relation", (g[None, :] - g[:, None]) % group, persistent=False
        )  # h of (g out, g in)

    relation: Tensor

    def filters(self) -> Tensor:
        """(fields_out*N, fields_in*N, k, k)."""
        chosen = self.coefficients[:, :, self.relation]  # (o,i,N out,N in,K)
        made = torch.einsum("oighk,gkyx->ogihyx", chosen, self.basis)
        return made.flatten(2, 3).flatten(0, 1)

    def regrouped(self, group: int) -> GroupConv:
        """About the same convolution of continuous orientation, for another N: the filters
        interpolated over h.

        What a network learned with few orientations starts one with many (docs/models.md).
        """
        fields_out, fields_in = self.coefficients.shape[:2]
        out = GroupConv(group, fields_in, fields_out, self.kernel_size, self.rings)
        spectrum = torch.fft.rfft(self.coefficients.detach().double(), dim=2)
        wanted = group // 2 + 1
        if self.group % 2 == 0 and wanted > spectrum.shape[2]:
            spectrum[:, :, -1] /= (
                2  # the highest frequency of an even group stands for both its signs
            )
        resized = spectrum.new_zeros(*spectrum.shape[:2], wanted, spectrum.shape[3])
        common = min(wanted, spectrum.shape[2])
        resized[:, :, :common] = spectrum[:, :, :common]
        if group % 2 == 0 and wanted < spectrum.shape[2]:
            resized[:, :, -1] *= 2
        # a sum over N orientations has N / M as many terms; the inverse transform divides by the
        # new N already
        with torch.no_grad():
            out.coefficients.copy_(torch.fft.irfft(resized, n=group, dim=2))
        return out


class FieldNorm(nn.Module):
    """Batch normalisation with one mean, deviation, weight and bias for all N maps of a field:
    (B,fields*N,H,W), same out.
    """

    def __init__(self, group: int, fields: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.group, self.fields = group, fields
        self.norm = nn.BatchNorm3d(fields, eps=eps, momentum=momentum)

    def forward(self, maps: Tensor) -> Tensor:
        """Statistics over batch, orientations and pixels."""
        b, _, h, w = maps.shape
        return self.norm(maps.view(b, self.fields, self.group, h, w)).flatten(1, 2)

    def frozen(self) -> nn.BatchNorm2d:
        """As an ordinary normalisation in eval mode, each number repeated N times."""
        plain = nn.BatchNorm2d(self.fields * self.group, eps=self.norm.eps)
        state = {
            k: v.repeat_interleave(self.group) for k, v in self.norm.state_dict().items() if v.ndim
        }
        plain.load_state_dict({**state, "num_batches_tracked": torch.tensor(0)})
        return plain.eval().requires_grad_(False)


def group_pool(maps: Tensor, group: int) -> Tensor:
    """The strongest orientation of each field: (B,fields*N,H,W) -> (B,fields,H,W), which only turns
    with the image.
    """
    b, c, h, w = maps.shape
    return maps.view(b, c // group, group, h, w).amax(dim=2)
