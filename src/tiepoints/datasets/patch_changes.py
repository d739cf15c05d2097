"""Random changes of light, cameras and occlusion of patches, on the device that the patches are on:
the counterpart of ``synthetic.degrade`` for batches of patches.

All functions take patches (N,P,P) in [0,1], or (N,3,P,P), and a generator of the same device. The
patches of a group come from one image and are changed alike.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..filters import to_gray
from .synthetic import DARK, SHADOW, TONE_FALLING, TONE_KNOTS, TONE_STRENGTH, PairSettings

#: Half of the number of taps of the blur, in samples.
BLUR_RADIUS = 4
#: Range of the standard deviation of the blur, in pixels.
BLUR = (0.5, 2.0)
#: Side of JPEG's blocks.
BLOCK = 8
#: Ranges of the distance of an occluding half-plane from the center of a patch in half sides.
OCCLUDED = (0.3, 0.95)
#: Probability that a patch is occluded, in a view with occlusion.
OCCLUDED_PATCHES = 0.35


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Uniform random numbers in [low, high] on the device of the generator."""
    values = torch.rand(shape, generator=generator, device=generator.device)
    return low + (high - low) * values


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal random numbers on the device of the generator."""
    return torch.randn(shape, generator=generator, device=generator.device)


def mixed_gray(
    patches: Tensor, group: Tensor, probability: Tensor, generator: torch.Generator
) -> Tensor:
    """Gray patches (N,P,P) of color patches (N,3,P,P).

    With ``probability`` (G,) the color channels of a group are mixed by random weights, as in other
    seasons, sensors and light.
    """
    groups = len(probability)
    usual = to_gray(torch.eye(3, device=patches.device).view(3, 3, 1, 1)).flatten()
    drawn = -torch.log(uniform((groups, 3), 1e-6, 1.0, generator))
    drawn = drawn / drawn.sum(dim=1, keepdim=True)
    mixed = uniform((groups,), 0, 1, generator) < probability
    weights = torch.where(mixed[:, None], drawn, usual)[group]
    return torch.einsum("ncpq,nc->npq", patches, weights)


def change_patches(
    patches: Tensor,
    group: Tensor,
    step: Tensor,
    settings: list[PairSettings],
    generator: torch.Generator,
    reach: float = 1.0,
) -> Tensor:
    """Gamma, tone curve, shadow, blur, darkness, noise and JPEG, as ``synthetic.degrade``.

    Args:
        patches: (N,P,P) in [0,1].
        group: (N,) index of the view of each patch.
        step: (N,) distance of neighboring samples in pixels of the view.
        settings: the probabilities for each of the G views.
        generator: random number generator.
        reach: half sides of the patches in those of the usual ones, which are the unit of the
            positions of shadows.
    """
    groups, device = len(settings), patches.device

    def chosen(name: str) -> Tensor:
        probability = torch.tensor([getattr(s, name) for s in settings], device=device)
        return (uniform((groups,), 0, 1, generator) < probability)[group]

    def where(mask: Tensor, changed: Tensor) -> Tensor:
        return torch.where(mask[:, None, None], changed, patches)

    gamma = uniform((groups,), 0.6, 1.6, generator)[group, None, None]
    patches = where(chosen("gamma"), patches.clamp(1e-4, 1) ** gamma)
    patches = where(chosen("tone"), tone_curves(patches, group, groups, generator))
    patches = where(chosen("shadow"), cast_shadows(patches, generator, reach))
    sigma = uniform((groups,), *BLUR, generator)[group] / step.clamp(min=0.75)
    patches = where(chosen("blur"), blur(patches, sigma))
    patches = where(
        chosen("dark"), patches * uniform((groups,), *DARK, generator)[group, None, None]
    )
    largest, power = (
        torch.tensor([getattr(s, name) for s in settings], device=device)
        for name in ("noise_sigma", "noise_power")
    )
    noise = 1 + (largest - 1) * uniform((groups,), 0, 1, generator) ** power
    noise = (noise[group] / step.clamp(min=1) / 255)[:, None, None]
    patches = where(
        chosen("noise"), (patches + noise * normal(tuple(patches.shape), generator)).clamp(0, 1)
    )
    lowest = torch.tensor([float(s.jpeg_quality) for s in settings], device=device)
    quality = (lowest + (90 - lowest) * uniform((groups,), 0, 1, generator))[group]
    patches = where(chosen("jpeg"), compress(patches, quality, step, generator))
    return (patches * 255).round().clamp(0, 255) / 255


def tone_curves(patches: Tensor, group: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """A random tone curve for each group, see ``synthetic.tone_curve``."""
    values = uniform((groups, TONE_KNOTS), 0, 1, generator)
    falling = uniform((groups, 1), 0, 1, generator) < TONE_FALLING
    values = torch.where(falling, values, values.sort(dim=1).values)
    knots = torch.linspace(0, 1, TONE_KNOTS, device=values.device)
    values = (TONE_STRENGTH * values + (1 - TONE_STRENGTH) * knots)[group]  # (N,K)
    position = patches.clamp(0, 1).flatten(1) * (TONE_KNOTS - 1)
    low = position.floor().clamp(max=TONE_KNOTS - 2)
    index = low.long()
    left, right = values.gather(1, index), values.gather(1, index + 1)
    return (left + (right - left) * (position - low)).view_as(patches)


def _distances(
    count: int, side: int, offset: Tensor, generator: torch.Generator, reach: float
) -> Tensor:
    """Signed distances (N,P,P) in half sides of the usual patches from a random line at ``offset``
    (N,) from the center.
    """
    angle = uniform((count,), 0, 2 * math.pi, generator)[:, None, None]
    grid = reach * ((2 * torch.arange(side, device=angle.device) + 1) / side - 1)
    return grid * torch.cos(angle) + grid[:, None] * torch.sin(angle) - offset[:, None, None]


def cast_shadows(patches: Tensor, generator: torch.Generator, reach: float = 1.0) -> Tensor:
    """Darken or brighten one side of a random line through each patch, see
    ``synthetic.cast_shadow``.
    """
    n, side = patches.shape[0], patches.shape[-1]
    distance = _distances(n, side, uniform((n,), -1.2, 1.2, generator), generator, reach)
    softness = torch.exp(uniform((n,), math.log(0.05), math.log(3.0), generator))[:, None, None]
    weight = 0.5 * (1 + torch.tanh(distance / softness))
    factor = torch.exp(uniform((n,), *SHADOW, generator))[:, None, None]
    return (patches * (1 + (factor - 1) * weight)).clamp(0, 1)


def blur(patches: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of standard deviation ``sigma`` (N,) in samples."""
    taps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=patches.device)
    weights = torch.exp(-0.5 * (taps / sigma[:, None].clamp(min=0.05)) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    side = patches.shape[-1]
    padding = (BLUR_RADIUS,) * 4
    padded = F.pad(patches[:, None], padding, mode="replicate")[:, 0]
    rows = torch.zeros_like(padded[:, :side])
    for i in range(2 * BLUR_RADIUS + 1):
        rows += weights[:, i, None, None] * padded[:, i : i + side]
    blurred = torch.zeros_like(patches)
    for i in range(2 * BLUR_RADIUS + 1):
        blurred += weights[:, i, None, None] * rows[..., i : i + side]
    return blurred


def _cosines(device: torch.device) -> Tensor:
    """The orthonormal cosine transform (8,8) of JPEG's blocks."""
    k = torch.arange(BLOCK, device=device, dtype=torch.float32)
    table = torch.cos(math.pi * (k + 0.5) * k[:, None] / BLOCK) * math.sqrt(2 / BLOCK)
    table[0] /= math.sqrt(2)
    return table


def compress(patches: Tensor, quality: Tensor, step: Tensor, generator: torch.Generator) -> Tensor:
    """Errors like those of JPEG compression of ``quality`` (N,), 1 to 100: the coefficients of
    blocks of 8 x 8 samples are rounded, the more coarsely the higher their frequency; weaker in
    patches whose samples are far apart (``step``), which average over several blocks.
    """
    side = patches.shape[-1]
    # one position of the blocks in all patches of a batch
    dx, dy = torch.randint(0, BLOCK, (2,), generator=generator, device=generator.device).tolist()
    pad = (dx, (-side - dx) % BLOCK, dy, (-side - dy) % BLOCK)
    padded = F.pad(patches[:, None], pad, mode="reflect")[:, 0]
    n, h, w = padded.shape
    blocks = padded.view(n, h // BLOCK, BLOCK, w // BLOCK, BLOCK).transpose(2, 3)
    table = _cosines(patches.device)
    coefficients = table @ (blocks - 0.5) @ table.T
    k = torch.arange(BLOCK, device=patches.device)
    # close to the luminance table of the standard
    base = 12 + 9 * (k + k[:, None]).float()
    factor = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    unit = (factor / step.clamp(min=1) / 255)[:, None, None, None, None] * base
    blocks = table.T @ ((coefficients / unit).round() * unit) @ table + 0.5
    padded = blocks.transpose(2, 3).reshape(n, h, w)
    return padded[:, dy : dy + side, dx : dx + side].clamp(0, 1)


def occlude(
    patches: Tensor,
    group: Tensor,
    probability: Tensor,
    generator: torch.Generator,
    reach: float = 1.0,
) -> Tensor:
    """Patches (N,C,P,P) of which some show another patch beyond a random line next to their center,
    like an object in front of the background, in groups chosen with ``probability`` (G,);
    ``reach`` as in ``change_patches``.
    """
    n, side = patches.shape[0], patches.shape[-1]
    chosen = uniform((len(probability),), 0, 1, generator) < probability
    occluded = chosen[group] & (uniform((n,), 0, 1, generator) < OCCLUDED_PATCHES)
    distance = _distances(n, side, uniform((n,), *OCCLUDED, generator), generator, reach)
    weight = (distance / reach * side / 2 + 0.5).clamp(0, 1) * occluded[:, None, None]
    other = patches.roll(max(1, n // 2 + 1), dims=0)
    return torch.lerp(patches, other, weight[:, None])
