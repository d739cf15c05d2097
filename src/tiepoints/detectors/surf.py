"""SURF: blobs where the determinant of the Hessian peaks in space and scale (Bay, Ess, Tuytelaars, Van Gool 2008).

Written here from the paper because OpenCV's wheels are built without it. An integral image makes the sum over any box four
look-ups, so box filters stand in for Gaussian derivatives at every scale at equal cost; maxima over 3 x 3 x 3 samples are refined
by a quadratic; the descriptor sums Haar wavelets over 4 x 4 cells turned with the point.

In: gray (H,W) in [0,1]. Out: key points with scale = filter side / 9 (1 = the smallest filter), and descriptors (N,64).
Choices the paper leaves open: every pixel is sampled in the first octave (no doubled image), four octaves of four filters,
filters that leave the image have no response, and outside of it the border pixel is repeated for orientation and descriptor.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..structs import Keypoints

Floats = NDArray[np.float64]

#: Sides of the box filters, octave by octave; samples lie 1, 2, 4 and 8 pixels apart (section 3.3 of the paper).
OCTAVES = ((9, 15, 21, 27), (15, 27, 39, 51), (27, 51, 75, 99), (51, 99, 147, 195))
SMALLEST = 9
#: The Gaussian that the smallest filter stands for has this sigma, in pixels.
SIGMA = 1.2
#: Weight of the mixed derivative, which balances the box approximation (equation 3).
MIXED = 0.9
#: Least determinant: about what OpenCV's default of 100 means for bytes and its normalisation.
THRESHOLD = 5e-5
#: Points described at a time; bounds the memory.
CHUNK = 256


def surf(
    gray: NDArray, num_points: int, *, threshold: float = THRESHOLD, describe: bool = True
) -> tuple[Keypoints, torch.Tensor]:
    """The ``num_points`` strongest blobs of ``gray`` (H,W) in [0,1], strongest first, and descriptors (N,64) of unit length.

    With ``describe`` false the descriptors are (N,0).
    """
    integral = np.zeros((gray.shape[0] + 1, gray.shape[1] + 1))
    integral[1:, 1:] = np.asarray(gray, dtype=np.float64).cumsum(axis=0).cumsum(axis=1)
    parts = [_maxima(integral, sides, 2**octave, threshold) for octave, sides in enumerate(OCTAVES)]
    points = np.concatenate(parts)  # (N,4) x, y, side, determinant
    points = points[np.argsort(-points[:, 3], kind="stable")[:num_points]]
    x, y, scale, score = points[:, 0], points[:, 1], points[:, 2] / SMALLEST, points[:, 3]
    chunks = [slice(i, i + CHUNK) for i in range(0, len(points), CHUNK)]
    angle = np.concatenate([np.zeros(0), *(_orientation(integral, x[c], y[c], SIGMA * scale[c]) for c in chunks)])
    rows: list[Floats] = [np.zeros((0, 64))]
    if describe:
        rows += [_descriptors(integral, x[c], y[c], SIGMA * scale[c], angle[c]) for c in chunks]
    found = Keypoints(
        torch.from_numpy(points[:, :2].astype(np.float32)),
        *(torch.from_numpy(v.astype(np.float32)) for v in (scale, angle, score)),
    )
    descriptors = np.concatenate(rows) if describe else np.zeros((len(points), 0))
    return found, torch.from_numpy(descriptors.astype(np.float32))


def hessian(integral: Floats, side: int, step: int) -> Floats:
    """Determinant of the Hessian at every ``step``-th pixel from box filters of odd ``side``; 0 where they leave the image."""
    height, width = (n - 1 for n in integral.shape)
    half, lobe = side // 2, side // 3
    out = np.zeros((-(-height // step), -(-width // step)))
    first = -(-half // step)
    rows, cols = ((n - 1 - half) // step - first + 1 for n in (height, width))
    if rows < 1 or cols < 1:
        return out

    def box(top: int, left: int, bottom: int, right: int) -> Floats:
        """Sums over pixels ``top..bottom`` x ``left..right`` (inclusive) relative to each sample."""

        def corner(dy: int, dx: int) -> Floats:
            y, x = first * step + dy, first * step + dx
            return integral[y : y + (rows - 1) * step + 1 : step, x : x + (cols - 1) * step + 1 : step]

        return corner(bottom + 1, right + 1) - corner(top, right + 1) - corner(bottom + 1, left) + corner(top, left)

    near, mid = lobe - 1, lobe // 2
    yy = box(-half, -near, half, near) - 3 * box(-mid, -near, mid, near)
    xx = box(-near, -half, near, half) - 3 * box(-near, -mid, near, mid)
    xy = box(-lobe, -lobe, -1, -1) + box(1, 1, lobe, lobe) - box(-lobe, 1, -1, lobe) - box(1, -lobe, lobe, -1)
    out[first : first + rows, first : first + cols] = (xx * yy - (MIXED * xy) ** 2) / side**4
    return out


def _maxima(integral: Floats, sides: tuple[int, ...], step: int, threshold: float) -> Floats:
    """Refined maxima (N,4) of one octave: x, y, side, determinant."""
    volume = np.stack([hessian(integral, side, step) for side in sides])  # (4,h,w)
    if min(volume.shape[1:]) < 3:
        return np.zeros((0, 4))
    inner = volume[1:-1, 1:-1, 1:-1]
    # a place whose larger filter left the image has no neighbour to be compared with
    layer, row, col = ((inner > threshold) & (volume[2:, 1:-1, 1:-1] != 0)).nonzero()
    index = np.stack([layer, row, col]) + 1
    value = volume[tuple(index)]
    steps = [(a, b, c) for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1) if (a, b, c) != (0, 0, 0)]
    for k, offset in enumerate(steps):  # of two equal neighbours the later one wins, so a pair gives one point
        other = volume[tuple(index + np.array(offset)[:, None])]
        keep = value >= other if k < len(steps) // 2 else value > other
        index, value = index[:, keep], value[keep]

    def at(a: int, b: int, c: int) -> Floats:
        """Neighbours in units of the centre, so that the fit does not depend on contrast."""
        return volume[tuple(index + np.array((a, b, c))[:, None])] / value

    gradient = np.stack([at(1, 0, 0) - at(-1, 0, 0), at(0, 1, 0) - at(0, -1, 0), at(0, 0, 1) - at(0, 0, -1)], axis=-1) / 2
    second = np.empty((len(value), 3, 3))
    axes = np.eye(3, dtype=int)
    for i in range(3):
        second[:, i, i] = at(*axes[i]) + at(*-axes[i]) - 2
        for j in range(i):
            mixed = at(*(axes[i] + axes[j])) + at(*-(axes[i] + axes[j])) - at(*(axes[i] - axes[j])) - at(*(axes[j] - axes[i]))
            second[:, i, j] = second[:, j, i] = mixed / 4
    solvable = np.abs(np.linalg.det(second)) > 1e-9
    index, value, gradient, second = index[:, solvable], value[solvable], gradient[solvable], second[solvable]
    offset_zyx = np.linalg.solve(second, -gradient[..., None])[..., 0]
    good = (np.abs(offset_zyx) <= 1).all(axis=1)
    place = (index.T + offset_zyx)[good]
    side = sides[0] + (sides[1] - sides[0]) * place[:, 0]
    return np.stack([place[:, 2] * step, place[:, 1] * step, side, value[good]], axis=-1)


def _lookup(integral: Floats, y: Floats, x: Floats) -> Floats:
    """The integral image at real positions (pixel centres at whole numbers), exact for pixels of constant value.

    Beyond the border the outermost cell is continued, which is the integral of an image with repeated border pixels.
    """
    height, width = (n - 1 for n in integral.shape)
    y, x = y + 0.5, x + 0.5
    row = np.clip(np.floor(y), 0, height - 1)
    col = np.clip(np.floor(x), 0, width - 1)
    v, u = y - row, x - col
    flat = (row * (width + 1) + col).astype(np.int64)
    values = integral.ravel()
    top = values[flat] * (1 - u) + values[flat + 1] * u
    flat += width + 1
    return top * (1 - v) + (values[flat] * (1 - u) + values[flat + 1] * u) * v


def _haar(integral: Floats, x: Floats, y: Floats, half: Floats) -> tuple[Floats, Floats]:
    """Right minus left half and lower minus upper half of the square of ``half`` side around each position."""
    at = [[_lookup(integral, y + b * half, x + a * half) if a or b else None for a in (-1, 0, 1)] for b in (-1, 0, 1)]
    (nw, n, ne), (w, _, e), (sw, s, se) = at
    dx = (se - s - ne + n) - (s - sw - n + nw)
    dy = (se - e - sw + w) - (e - ne - w + nw)
    return dx, dy


def _orientation(integral: Floats, x: Floats, y: Floats, sigma: Floats) -> Floats:
    """Angle (N,) of the strongest sum of wavelet responses within 60 degrees (section 4.1)."""
    grid = np.arange(-6, 7)
    v, u = (g.ravel() for g in np.meshgrid(grid, grid, indexing="ij"))
    inside = u**2 + v**2 <= 36
    u, v = u[inside], v[inside]
    spread = sigma[:, None]
    dx, dy = _haar(integral, x[:, None] + spread * u, y[:, None] + spread * v, 2 * spread)  # wavelets of side 4 sigma
    weight = np.exp(-(u**2 + v**2) / (2 * 2.0**2))
    dx, dy = dx * weight, dy * weight
    turn = np.arctan2(dy, dx)
    best = np.zeros((len(x), 3))  # squared length, x, y of the longest sum
    for centre in np.arange(0, 2 * np.pi, np.pi / 36):
        near = np.abs((turn - centre + np.pi) % (2 * np.pi) - np.pi) <= np.pi / 6
        sums = np.stack([(dx * near).sum(axis=1), (dy * near).sum(axis=1)], axis=-1)
        length = np.square(sums).sum(axis=1)
        longer = length > best[:, 0]
        best[longer, 0], best[longer, 1:] = length[longer], sums[longer]
    return np.arctan2(best[:, 2], best[:, 1]) % (2 * np.pi)


def _descriptors(integral: Floats, x: Floats, y: Floats, sigma: Floats, angle: Floats) -> Floats:
    """SURF-64 (N,64): sums of the wavelets and of their magnitudes in 4 x 4 cells of 5 x 5 samples (section 4.2)."""
    grid = np.arange(20) - 9.5
    v, u = (g.ravel() for g in np.meshgrid(grid, grid, indexing="ij"))
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    spread = sigma[:, None]
    dx, dy = _haar(integral, x[:, None] + spread * (u * cos - v * sin), y[:, None] + spread * (u * sin + v * cos), spread)
    weight = np.exp(-(u**2 + v**2) / (2 * 3.3**2))
    along, across = (dx * cos + dy * sin) * weight, (dy * cos - dx * sin) * weight  # in the point's own frame
    values = np.stack([along, across, np.abs(along), np.abs(across)], axis=-1)  # (N,400,4)
    cells = values.reshape(len(x), 4, 5, 4, 5, 4).sum(axis=(2, 4)).reshape(len(x), 64)
    return cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-12)
