"""Rotation-equivariant convolutions for the cyclic group C_N, in plain PyTorch.

Sources: group convolutions (Cohen and Welling, ICML 2016), steerable filters (Weiler and Cesa,
NeurIPS 2019), as in REKD (Lee et al., CVPR 2022). docs/models.md derives the order of the
coefficients and their initialization, which are ours.

Idea: a *regular field* has N maps, one for each orientation of the same filter; rotating the image
by 360/N degrees rotates the maps and shifts them cyclically by one. A filter is a sum of circular
harmonics ``ring(r) cos(m phi)``, ``ring(r) sin(m phi)``, which can be rotated exactly by any angle;
so one set of coefficients determines the filters of all N orientations.

Maps are ordinary tensors (B, fields*N, H, W), field by field: channel ``f * N + g`` is orientation
g of field f. Rotating the image by 360/N degrees **counter-clockwise** moves g to g + 1. Rotations
by 90 degrees are exact if 4 divides N, others up to the discretization of the pixel grid.
``frozen`` converts a trained layer to an ordinary ``Conv2d``.
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
    """A ring of the polar basis: radius and Gaussian sigma in pixels, highest angular frequency."""

    radius: float
    sigma: float
    frequency: int


def published_rings(kernel_size: int) -> tuple[Ring, ...]:
    """The rings of e2cnn 0.1.9 and escnn for an odd kernel: radii 0, 1, ..., sigmas 0.6 (outermost
    0.4), frequencies at most 2r.

    The outermost ring has frequencies up to 2: higher ones would alias on its few pixels.
    """
    max_radius = kernel_size // 2
    rings = [Ring(0.0, 0.005, 0)]
    for radius in range(1, max_radius + 1):
        last = radius == max_radius
        frequency = min(2 * radius, 2 if last else 2 * radius - (radius + 1) % 2)
        rings.append(Ring(float(radius), 0.4 if last else 0.6, frequency))
    return tuple(rings)


#: Our rings of a 5 x 5 kernel. They vanish towards its corners, which break the rotational
#: symmetry, and have a wider center: the equivariance error after three layers is 20-30 % below
#: that of the published rings (docs/models.md).
SMOOTH_RINGS = (Ring(0.0, 0.7, 0), Ring(1.0, 0.6, 2), Ring(1.8, 0.45, 2))


def polar_basis(
    kernel_size: int, turns: Sequence[float], rings: Sequence[Ring] | None = None
) -> Tensor:
    """Basis filters rotated counter-clockwise by each of ``turns`` in radians: (len(turns), K, k,
    k) float64.

    Order: for every ring its constant filter, then the cosine and sine of each frequency. The
    unrotated filters have Euclidean norm 1. K is 11 for the published rings of a 5 x 5 kernel, 1
    for a 1 x 1 kernel.

    Raises:
        ValueError: the kernel size is even or below 1.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    rings = published_rings(kernel_size) if rings is None else tuple(rings)
    axis = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    y, x = torch.meshgrid(-axis, axis, indexing="ij")  # y up: angles grow counter-clockwise
    r, phi = torch.hypot(x, y), torch.atan2(y, x)
    filters = []
    for ring in rings:
        profile = torch.exp(-((r - ring.radius) ** 2) / (2 * ring.sigma**2))
        for m in range(ring.frequency + 1):
            # phi is undefined at the center
            radial = profile if m == 0 else torch.where(r > 0, profile, torch.zeros_like(profile))
            for phase in (0.0,) if m == 0 else (0.0, math.pi / 2):
                unrotated = radial * torch.cos(m * phi - phase)
                rotated = [radial * torch.cos(m * (phi - angle) - phase) for angle in turns]
                filters.append(torch.stack(rotated) / unrotated.norm())
    return torch.stack(filters, dim=1)


class _RotationConv(nn.Module):
    """Base class of both convolutions: coefficients, basis, and the ordinary filters computed from
    them.
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
        """He initialization: the filters of one output map have a mean squared norm of 2."""
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
        """The same convolution with constant filters."""
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
    """Convolution of an image, or of scalar fields, to regular fields: (B,C,H,W) ->
    (B,fields*N,H,W).

    Args:
        group: N, number of rotations of the group.
        channels: C, 1 for a gray image.
        fields: number of output fields.
        kernel_size: odd side of the filters in pixels.
        rings: rings of the basis; default ``published_rings``.
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
        """(fields*N, C, k, k): each filter rotated to all N orientations."""
        rotated = torch.einsum("oik,gkyx->ogiyx", self.coefficients[:, :, 0], self.basis)
        return rotated.flatten(0, 1)


class GroupConv(_RotationConv):
    """Convolution of regular fields to regular fields: (B,fields_in*N,H,W) ->
    (B,fields_out*N,H,W).

    Output orientation g applies filter h, rotated by g, to input orientation g + h; with a kernel
    of 1 this is a cyclic correlation over the orientations. Arguments as ``LiftingConv``.
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
        # h of (output orientation, input orientation)
        self.register_buffer("relation", (g[None, :] - g[:, None]) % group, persistent=False)

    relation: Tensor

    def filters(self) -> Tensor:
        """(fields_out*N, fields_in*N, k, k)."""
        expanded = self.coefficients[:, :, self.relation]  # (o,i,N out,N in,K)
        rotated = torch.einsum("oighk,gkyx->ogihyx", expanded, self.basis)
        return rotated.flatten(2, 3).flatten(0, 1)

    def regrouped(self, group: int) -> GroupConv:
        """An approximation with another N: the filters are interpolated over the orientation h.

        A network trained with few orientations can initialize one with many (docs/models.md).
        """
        fields_out, fields_in = self.coefficients.shape[:2]
        out = GroupConv(group, fields_in, fields_out, self.kernel_size, self.rings)
        spectrum = torch.fft.rfft(self.coefficients.detach().double(), dim=2)
        length = group // 2 + 1
        if self.group % 2 == 0 and length > spectrum.shape[2]:
            # the Nyquist frequency of an even group is the sum of its positive and negative one
            spectrum[:, :, -1] /= 2
        resized = spectrum.new_zeros(*spectrum.shape[:2], length, spectrum.shape[3])
        common = min(length, spectrum.shape[2])
        resized[:, :, :common] = spectrum[:, :, :common]
        if group % 2 == 0 and length < spectrum.shape[2]:
            resized[:, :, -1] *= 2
        # the number of terms of a sum over orientations changes; the inverse transform, which
        # divides by the new N, already accounts for it
        with torch.no_grad():
            out.coefficients.copy_(torch.fft.irfft(resized, n=group, dim=2))
        return out


class FieldNorm(nn.Module):
    """Batch normalization with one mean, deviation, weight and bias for all N maps of a field:
    (B,fields*N,H,W), same shape out.
    """

    def __init__(self, group: int, fields: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.group, self.fields = group, fields
        self.norm = nn.BatchNorm3d(fields, eps=eps, momentum=momentum)

    def forward(self, maps: Tensor) -> Tensor:
        """Normalize with statistics over batch, orientations and pixels."""
        b, _, h, w = maps.shape
        return self.norm(maps.view(b, self.fields, self.group, h, w)).flatten(1, 2)

    def frozen(self) -> nn.BatchNorm2d:
        """The ordinary batch normalization in eval mode, with each parameter repeated N times."""
        plain = nn.BatchNorm2d(self.fields * self.group, eps=self.norm.eps)
        state = {
            k: v.repeat_interleave(self.group) for k, v in self.norm.state_dict().items() if v.ndim
        }
        plain.load_state_dict({**state, "num_batches_tracked": torch.tensor(0)})
        return plain.eval().requires_grad_(False)


def group_pool(maps: Tensor, group: int) -> Tensor:
    """Maximum over the orientations of each field: (B,fields*N,H,W) -> scalar fields
    (B,fields,H,W).
    """
    b, c, h, w = maps.shape
    return maps.view(b, c // group, group, h, w).amax(dim=2)
