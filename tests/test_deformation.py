"""Deformations of the surroundings of keypoints."""

import math

import pytest
import torch

from tiepoints.deformation import MAX_TILT, UNDEFORMED, Deformation, measure_deformation


def points(count: int = 60, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 100


@pytest.mark.parametrize("rotation", [0.0, 45.0, 170.0, -120.0])
@pytest.mark.parametrize(("tilt", "direction"), [(1.5, 20.0), (3.0, 140.0)])
def test_linear_maps_are_measured(rotation, tilt, direction):
    given = Deformation(math.radians(rotation), tilt, math.radians(direction))
    found = measure_deformation(points(), 1.7 * points().double() @ given.matrix().T)
    relative = found.after(given)
    assert abs(math.degrees(relative.rotation)) < 0.5
    assert relative.tilt < 1.05
    assert math.degrees(found.rotation) == pytest.approx(rotation, abs=1)
    assert found.tilt == pytest.approx(tilt, rel=0.04)
    assert math.degrees(found.direction) % 180 == pytest.approx(direction, abs=1)


def test_wrong_matches_and_depth_change_it_little():
    given = Deformation(math.radians(30), 2.0, math.radians(60))
    a = points()
    b = a.double() @ given.matrix().T
    b[::20] = points(3, 1).double()  # wrong
    b[30:] += torch.tensor([500.0, 0.0])  # another distance
    relative = measure_deformation(a, b).after(given)
    assert abs(math.degrees(relative.rotation)) < 5
    assert relative.tilt < 1.25


def test_object_that_passes_the_background_is_not_a_rotation():
    near, far = points(30), points(30, 1)
    a = torch.cat([near, far + torch.tensor([300.0, 0.0])])
    b = torch.cat([near + torch.tensor([600.0, 10.0]), far + torch.tensor([300.0, 0.0])])
    found = measure_deformation(a, b)
    assert abs(math.degrees(found.rotation)) < 1
    assert found.tilt < 1.05


def test_few_points_and_mirrored_points():
    a = points(20)
    assert measure_deformation(a[:0], a[:0]) == UNDEFORMED
    assert measure_deformation(a[:1], a[:1]) == UNDEFORMED
    assert measure_deformation(a[:1].repeat(5, 1), a[:1].repeat(5, 1)) == UNDEFORMED
    two = measure_deformation(torch.tensor([[0.0, 0], [50, 0]]), torch.tensor([[0.0, 0], [0, 50]]))
    assert math.degrees(two.rotation) == pytest.approx(90)
    mirrored = measure_deformation(a, a * torch.tensor([-1.0, 1.0]))
    assert math.isfinite(mirrored.rotation)
    assert 1 <= mirrored.tilt <= MAX_TILT


def test_rounding():
    rounded = Deformation(math.radians(52), 2.1, math.radians(-80)).rounded()
    assert math.degrees(rounded.rotation) == pytest.approx(45)
    assert rounded.tilt == pytest.approx(2)
    assert math.degrees(rounded.direction) == pytest.approx(105)  # that is, -75
    assert Deformation(0.01, 1.05, 1.0).rounded() == UNDEFORMED
    assert (
        Deformation(tilt=2.0, direction=0.1).rounded()
        == Deformation(tilt=2.0, direction=math.pi - 0.05).rounded()
    )


def test_shape_and_relative_deformation():
    given = Deformation(0.3, 2.0, 0.7)
    assert torch.linalg.det(given.shape()).item() == pytest.approx(1)
    assert torch.allclose(given.shape(), given.shape().T)
    assert Deformation.of(given.matrix() * 5).tilt == pytest.approx(2)
    relative = given.after(given)
    assert relative.rotation == pytest.approx(0, abs=1e-9)
    assert relative.tilt == pytest.approx(1)
    assert Deformation(0.5, 2.0, 0.7).after(Deformation(0.3, 2.0, 0.7)).rotation == pytest.approx(
        0.2, abs=1e-6
    )
