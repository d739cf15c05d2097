"""How the surroundings of keypoints change from one image to another, measured with matches: the
linear part of an affine map, as a rotation and a tilt (the transition tilt of Morel and Yu, ASIFT,
SIAM Journal on Imaging Sciences 2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import distances

#: Number of matches that are measured, number of neighbors of each, and their smallest distance in
#: pixels: nearer ones may be one point at two scales.
POINTS, NEIGHBORS, MIN_NEIGHBOR = 300, 4, 8.0
#: Number of neighbors of ``local_maps``.
LOCAL_NEIGHBORS = 12
#: Points whose neighbors are searched at a time, to bound the memory.
BLOCK = 1024
#: Iterations of the reweighted least squares; residual, in units of the distance of neighbors,
#: below which weights are about equal; and weight of the similarity, in neighbors.
ITERATIONS, RESIDUAL, PRIOR = 8, 0.1, 2.0
#: Largest tilt.
MAX_TILT = 8.0
#: Steps of ``Deformation.rounded``: of angles in radians, and of tilts as a factor.
ANGLE_STEP, TILT_STEP = math.radians(15), 2 ** (1 / 3)


@dataclass(frozen=True)
class Deformation:
    """A linear map of areas of equal size: a stretching, then a rotation.

    Attributes:
        rotation: in radians, from +x towards +y.
        tilt: ratio of the largest to the smallest stretching, 1 or more: a plane that is turned
            away by an angle of which this is the inverse cosine.
        direction: in which it is stretched most, in radians.
    """

    rotation: float = 0.0
    tilt: float = 1.0
    direction: float = 0.0

    def shape(self) -> Tensor:
        """The stretching (2,2), float64, symmetric, determinant 1."""
        turn = _rotation(self.direction)
        stretch = torch.tensor([self.tilt**0.5, self.tilt**-0.5], dtype=torch.float64)
        return turn @ torch.diag(stretch) @ turn.T

    def matrix(self) -> Tensor:
        """The map (2,2), float64, determinant 1."""
        return _rotation(self.rotation) @ self.shape()

    @classmethod
    def of(cls, matrix: Tensor) -> Deformation:
        """Of a matrix (2,2) with a positive determinant, without its change of size."""
        U, S, V = torch.linalg.svd(matrix.double())
        rotation = U @ V
        return cls(
            math.atan2(float(rotation[1, 0]), float(rotation[0, 0])),
            min(float(S[0] / S[1]), MAX_TILT),
            math.atan2(float(V[0, 1]), float(V[0, 0])),
        )

    def rounded(self) -> Deformation:
        """With angles and tilt in steps, so that few different ones remain."""
        steps = round(math.log(self.tilt, TILT_STEP))
        # opposite directions are one
        direction = round(self.direction / ANGLE_STEP) % round(math.pi / ANGLE_STEP)
        return Deformation(
            round(self.rotation / ANGLE_STEP) * ANGLE_STEP,
            TILT_STEP**steps,
            direction * ANGLE_STEP if steps else 0.0,
        )

    def after(self, other: Deformation) -> Deformation:
        """What this deformation does besides ``other``."""
        return Deformation.of(self.matrix() @ torch.linalg.inv(other.matrix()))


UNDEFORMED = Deformation()


def measure_deformation(xy_a: Tensor, xy_b: Tensor) -> Deformation:
    """The deformation that maps the differences of neighboring points (N,2) of a best to those of
    the same points (N,2) of b; none for less than two points.

    A map of all points would instead follow the perspective and the depths of the scene.
    """
    if len(xy_a) < 2:
        return UNDEFORMED
    chosen = torch.arange(0, len(xy_a), -(-len(xy_a) // POINTS))
    a, b = xy_a.double(), xy_b.double()
    distance = distances(a[chosen], a)
    distance[distance < MIN_NEIGHBOR] = math.inf
    nearest = distance.topk(min(NEIGHBORS, len(a)), largest=False)
    used = nearest.values.isfinite()
    from_a, from_b = (
        (xy[nearest.indices] - xy[chosen, None])[used] / nearest.values[used, None] for xy in (a, b)
    )
    if not len(from_a):
        return UNDEFORMED
    rotation, similarity = _similarity(from_a, from_b)
    matrix = _fitted(from_a, from_b, torch.ones_like(from_a[:, 0]), similarity)
    return Deformation.of(matrix) if torch.linalg.det(matrix) > 0 else Deformation(rotation)


def local_maps(
    xy_a: Tensor, xy_b: Tensor, points_a: Tensor, points_b: Tensor, scale: Tensor
) -> Tensor:
    """Linear maps (K,2,2) from the surroundings of points (K,2) of a to those of the same points of
    b, which include the change of size.

    Args:
        points_a, points_b: (M,2) the same points of the two images, from whose positions relative
            to ``xy_a`` and ``xy_b`` the maps are estimated. The fewer there are near a point, the
            more its map is that of all; without any it is the identity.
        scale: (K,) scales of the points of a: those within ``MIN_NEIGHBOR`` times the smallest one
            may be the same points and are not used.
    """
    a, b, near_a, near_b = (xy.cpu().float() for xy in (xy_a, xy_b, points_a, points_b))
    smallest = MIN_NEIGHBOR * float(scale.min()) if len(scale) else 0.0
    found = []
    for part in a.split(BLOCK):
        distance = distances(part, near_a)
        distance[distance < smallest] = math.inf
        found.append(distance.topk(min(LOCAL_NEIGHBORS, len(near_a)), largest=False))
    distance, nearest = (torch.cat(parts) for parts in zip(*found, strict=True))
    used = distance.isfinite()
    if not used.any():
        return torch.eye(2).repeat(len(a), 1, 1).to(xy_a)
    unit = distance.where(used, torch.ones(()))[..., None]
    from_a, from_b = (
        ((near[nearest] - xy[:, None]) / unit * used[..., None]).double()
        for near, xy in ((near_a, a), (near_b, b))
    )
    all_a, all_b = from_a[used], from_b[used]
    _, similarity = _similarity(all_a, all_b)
    common = _fitted(all_a, all_b, torch.ones_like(all_a[:, 0]), similarity)
    maps = _fitted(from_a, from_b, used.double(), common)
    return maps.where(torch.linalg.det(maps)[:, None, None] > 0, similarity).to(xy_a)


def _similarity(from_a: Tensor, from_b: Tensor) -> tuple[float, Tensor]:
    """The rotation in radians from vectors (N,2) of unit length to those of b, and the matrix (2,2)
    with their change of size.
    """
    # of directions as complex numbers, so that no pair of points outweighs the others
    turn = torch.sgn(torch.view_as_complex(from_b) * torch.view_as_complex(from_a).conj()).sum()
    rotation = math.atan2(float(turn.imag), float(turn.real))
    return rotation, from_b.norm(dim=1).median() * _rotation(rotation)


def _fitted(from_a: Tensor, from_b: Tensor, used: Tensor, prior: Tensor) -> Tensor:
    """The linear maps (...,2,2) from vectors (...,N,2) of a to those of b with the least sum of
    distances, of the vectors with a weight in ``used`` (...,N); ``PRIOR`` more agree with the map
    ``prior``.
    """
    matrix = prior
    identity = torch.eye(2, dtype=prior.dtype)
    for _ in range(ITERATIONS):
        residual = (from_b - from_a @ matrix.transpose(-1, -2)).norm(dim=-1)
        weight = used / (residual + RESIDUAL)
        mean = weight.sum(dim=-1) / used.sum(dim=-1).clamp(min=1)
        strength = PRIOR * mean.clamp(min=1e-6)[..., None, None]  # positive without any vector
        weighted = weight[..., None] * from_a
        moments = from_a.transpose(-1, -2) @ weighted + strength * identity
        matrix = (from_b.transpose(-1, -2) @ weighted + strength * prior) @ torch.linalg.inv(
            moments
        )
    return matrix


def _rotation(angle: float) -> Tensor:
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
