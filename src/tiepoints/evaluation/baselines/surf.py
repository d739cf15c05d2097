"""SURF: maxima of the determinant of the Hessian in space and scale (Bay, Ess, Tuytelaars, Van Gool
2008).

Implemented from the paper because OpenCV's wheels are built without it. With an integral image the
sum over any box takes four look-ups, so box filters approximate Gaussian derivatives at every scale
at equal cost; maxima over 3 x 3 x 3 samples are refined by a quadratic fit; the descriptor sums
Haar wavelets over 4 x 4 cells rotated with the keypoint.

Input: gray (H,W) in [0,1]. Output: keypoints with scale = filter side / 9 (1 = the smallest
filter), and descriptors (N,64). Choices the paper leaves open: every pixel is sampled in the first
octave (without upsampling), four octaves of four filters, filters that extend beyond the image have
no response, and for orientation and descriptor the border is replicated.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...structs import Keypoints

#: Sides of the box filters per octave, with sampling steps of 1, 2, 4 and 8 pixels (section 3.3 of
#: the paper).
OCTAVES = ((9, 15, 21, 27), (15, 27, 39, 51), (27, 51, 75, 99), (51, 99, 147, 195))
SMALLEST = 9
#: Sigma in pixels of the Gaussian that the smallest filter approximates.
SIGMA = 1.2
#: Weight of the mixed derivative, which compensates the box approximation (equation 3).
MIXED = 0.9
#: Minimum determinant; about OpenCV's default of 100, which is for bytes and another normalization.
THRESHOLD = 5e-5
#: Radius of a keypoint's wavelets in sigma: the corner of the rotated 20 x 20 samples (13.5) plus
#: half a wavelet.
RADIUS = 15
#: Number of sectors of a full circle, in which the sliding window of 60 degrees moves.
SECTORS = 72
#: Keypoints described at a time, to limit memory.
CHUNK = 512


def surf(
    gray: Tensor, num_keypoints: int, *, threshold: float = THRESHOLD, describe: bool = True
) -> tuple[Keypoints, Tensor | None]:
    """Detect the ``num_keypoints`` strongest blobs of ``gray`` (H,W) in [0,1], strongest first, and
    compute descriptors (N,64) of unit length (None without ``describe``).
    """
    gray = gray.double()
    integral = F.pad(gray, (1, 0, 1, 0)).cumsum(dim=0).cumsum(dim=1)
    found = torch.cat(
        [_maxima(integral, sides, 2**octave, threshold) for octave, sides in enumerate(OCTAVES)]
    )
    order = found[:, 3].argsort(descending=True, stable=True)[:num_keypoints]
    found = found[order]  # (N,4) x, y, side, determinant
    xy, scale, score = found[:, :2], found[:, 2] / SMALLEST, found[:, 3]
    sigma = SIGMA * scale
    wavelets = _Wavelets(gray, RADIUS * float(sigma.max()) if len(sigma) else 0.0)
    angles, rows = [torch.zeros(0)], [torch.zeros(0, 64)]
    for part in zip(xy.split(CHUNK), sigma.split(CHUNK), strict=True):
        angles.append(_orientation(wavelets, *part))
        if describe:
            rows.append(_descriptors(wavelets, *part, angles[-1]).float())
    keypoints = Keypoints(xy.float(), scale.float(), torch.cat(angles).float(), score.float())
    return keypoints, torch.cat(rows) if describe else None


def hessian(integral: Tensor, side: int, step: int) -> Tensor:
    """Determinant of the Hessian at every ``step``-th pixel from box filters of odd ``side``; 0
    where they extend beyond the image.
    """
    height, width = (n - 1 for n in integral.shape)
    half, lobe = side // 2, side // 3
    out = integral.new_zeros(-(-height // step), -(-width // step))
    first = -(-half // step)
    rows, cols = ((n - 1 - half) // step - first + 1 for n in (height, width))
    if rows < 1 or cols < 1:
        return out

    def box(top: int, left: int, bottom: int, right: int) -> Tensor:
        """Sums over pixels ``top..bottom`` x ``left..right`` (inclusive) relative to each
        sample.
        """

        def corner(dy: int, dx: int) -> Tensor:
            y, x = first * step + dy, first * step + dx
            return integral[
                y : y + (rows - 1) * step + 1 : step, x : x + (cols - 1) * step + 1 : step
            ]

        return (
            corner(bottom + 1, right + 1)
            - corner(top, right + 1)
            - corner(bottom + 1, left)
            + corner(top, left)
        )

    near, mid = lobe - 1, lobe // 2
    yy = box(-half, -near, half, near) - 3 * box(-mid, -near, mid, near)
    xx = box(-near, -half, near, half) - 3 * box(-near, -mid, near, mid)
    xy = (
        box(-lobe, -lobe, -1, -1)
        + box(1, 1, lobe, lobe)
        - box(-lobe, 1, -1, lobe)
        - box(1, -lobe, lobe, -1)
    )
    out[first : first + rows, first : first + cols] = (xx * yy - (MIXED * xy) ** 2) / side**4
    return out


def _maxima(integral: Tensor, sides: tuple[int, ...], step: int, threshold: float) -> Tensor:
    """Refined maxima (N,4) of one octave: x, y, side, determinant."""
    volume = torch.stack([hessian(integral, side, step) for side in sides])  # (4,h,w)
    if min(volume.shape[1:]) < 3:
        return volume.new_zeros(0, 4)
    # where the larger filter extends beyond the image, there is no neighbor to compare with
    inner = (volume[1:-1, 1:-1, 1:-1] > threshold) & (volume[2:, 1:-1, 1:-1] != 0)
    index = inner.nonzero() + 1  # (N,3) layer, row, column

    def at(*offset: int) -> Tensor:
        return volume[tuple((index + torch.tensor(offset)).T)]

    steps = [
        (a, b, c)
        for a in (-1, 0, 1)
        for b in (-1, 0, 1)
        for c in (-1, 0, 1)
        if (a, b, c) != (0, 0, 0)
    ]
    # of two equal neighbors the later one is kept, so that they give one keypoint
    for k, offset in enumerate(steps):
        value, other = at(0, 0, 0), at(*offset)
        index = index[value >= other if k < len(steps) // 2 else value > other]
    value = at(0, 0, 0)
    # derivatives relative to the center, so that the fit does not depend on contrast
    gradient = torch.stack(
        [at(1, 0, 0) - at(-1, 0, 0), at(0, 1, 0) - at(0, -1, 0), at(0, 0, 1) - at(0, 0, -1)], dim=-1
    )
    gradient = gradient / (2 * value[:, None])
    second = volume.new_empty(len(index), 3, 3)
    axes = torch.eye(3, dtype=torch.int64)
    for i in range(3):
        second[:, i, i] = (at(*axes[i]) + at(*-axes[i])) / value - 2
        for j in range(i):
            plus, minus = axes[i] + axes[j], axes[i] - axes[j]
            second[:, i, j] = second[:, j, i] = (
                at(*plus) + at(*-plus) - at(*minus) - at(*-minus)
            ) / (4 * value)
    solvable = torch.linalg.det(second).abs() > 1e-9
    index, value = index[solvable], value[solvable]
    shift = torch.linalg.solve(second[solvable], -gradient[solvable])
    position = index + shift
    side = sides[0] + (sides[1] - sides[0]) * position[:, 0]
    found = torch.stack([position[:, 2] * step, position[:, 1] * step, side, value], dim=-1)
    return found[(shift.abs() <= 1).all(dim=1)]


class _Wavelets:
    """Haar wavelets of real positions and sizes, exact for pixels as constant squares.

    Args:
        gray: (H,W); its border is replicated.
        margin: maximum distance in pixels by which a wavelet extends beyond the image.
    """

    def __init__(self, gray: Tensor, margin: float):
        self.pad = math.ceil(margin) + 1
        padded = F.pad(gray[None, None], (self.pad,) * 4, mode="replicate")[0, 0]
        self.integral = F.pad(padded, (1, 0, 1, 0)).cumsum(dim=0).cumsum(dim=1)
        self.size = (padded.shape[1], padded.shape[0])

    def __call__(self, xy: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        """Differences (N,K) of right and left, and of lower and upper halves of squares with half
        side ``half`` (N,) around ``xy`` (N,K,2).
        """
        corners = torch.tensor(
            [(-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1)]
        )
        grid = xy.new_empty(len(xy), len(corners), xy.shape[1], 2)
        # a loop with K as last dimension: operations with an inner dimension of two are slow
        for axis in (0, 1):
            # the integral image is indexed by pixel edges, half a pixel from the centers
            at = (
                xy[:, None, :, axis]
                + half[:, None, None] * corners[:, axis, None]
                + (self.pad + 0.5)
            )
            grid[..., axis] = at * (2 / self.size[axis]) - 1
        sums = F.grid_sample(
            self.integral[None, None], grid.flatten(1, 2)[None], align_corners=True
        )
        nw, n, ne, w, e, sw, s, se = sums.view(grid.shape[:3]).unbind(dim=1)
        return (se - s - ne + n) - (s - sw - n + nw), (se - e - sw + w) - (e - ne - w + nw)


def _orientation(wavelets: _Wavelets, xy: Tensor, sigma: Tensor) -> Tensor:
    """Angle (N,) of the strongest sum of wavelet responses within 60 degrees (section 4.1)."""
    grid = torch.arange(-6, 7, dtype=torch.float64)
    around = torch.cartesian_prod(grid, grid)
    around = around[around.square().sum(dim=1) <= 36]  # (K,2)
    # wavelets of side 4 sigma
    dx, dy = wavelets(xy[:, None] + sigma[:, None, None] * around, 2 * sigma)
    weight = torch.exp(-around.square().sum(dim=1) / (2 * 2.0**2))
    responses = torch.stack([dx, dy]) * weight  # (2,N,K)
    direction = torch.atan2(dy, dx) % (2 * math.pi)
    sector = (direction * (SECTORS / (2 * math.pi))).long().clamp(max=SECTORS - 1)
    sums = responses.new_zeros(2, len(xy), SECTORS).scatter_add_(
        2, sector.expand_as(responses), responses
    )
    window = SECTORS // 6
    wrapped = F.pad(torch.cat([sums, sums[..., : window - 1]], dim=-1), (1, 0)).cumsum(dim=-1)
    within = wrapped[..., window:] - wrapped[..., :-window]  # (2,N,SECTORS)
    best = within.square().sum(dim=0).argmax(dim=1)
    x, y = within[:, torch.arange(len(xy)), best]
    return torch.atan2(y, x) % (2 * math.pi)


def _descriptors(wavelets: _Wavelets, xy: Tensor, sigma: Tensor, angle: Tensor) -> Tensor:
    """SURF-64 (N,64): sums of the wavelets and of their magnitudes in 4 x 4 cells of 5 x 5 samples
    (section 4.2).
    """
    grid = torch.arange(20, dtype=torch.float64) - 9.5
    v, u = torch.cartesian_prod(grid, grid).T
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    around = torch.stack([u * cos - v * sin, u * sin + v * cos], dim=-1)
    dx, dy = wavelets(xy[:, None] + sigma[:, None, None] * around, sigma)
    weight = torch.exp(-(u**2 + v**2) / (2 * 3.3**2))
    # components in the frame of the keypoint
    along = (dx * cos + dy * sin) * weight
    across = (dy * cos - dx * sin) * weight
    values = torch.stack([along, across, along.abs(), across.abs()], dim=-1)  # (N,400,4)
    cells = values.view(len(xy), 4, 5, 4, 5, 4).sum(dim=(2, 4)).flatten(1)
    return F.normalize(cells, dim=1)
