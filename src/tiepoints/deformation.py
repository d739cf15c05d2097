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
    # of directions as complex numbers, so that no pair of points outweighs the others
    turn = torch.sgn(torch.view_as_complex(from_b) * torch.view_as_complex(from_a).conj()).sum()
    rotation = math.atan2(float(turn.imag), float(turn.real))
    if not len(from_a):
        return Deformation(rotation)
    similarity = from_b.norm(dim=1).median() * _rotation(rotation)
    matrix = similarity
    for _ in range(ITERATIONS):
        weight = 1 / ((from_b - from_a @ matrix.T).norm(dim=1, keepdim=True) + RESIDUAL)
        prior = PRIOR * weight.mean()
        moments = from_a.T @ (weight * from_a) + prior * torch.eye(2, dtype=torch.float64)
        matrix = (from_b.T @ (weight * from_a) + prior * similarity) @ torch.linalg.inv(moments)
    return Deformation.of(matrix) if torch.linalg.det(matrix) > 0 else Deformation(rotation)


def _rotation(angle: float) -> Tensor:
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
