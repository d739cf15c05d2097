"""Robust geometry: known answers, and inputs without one."""

import math

import pytest
import torch

from tiepoints.estimation import estimate
from tiepoints.geometry import warp_points

H = torch.tensor([[1.1, 0.1, 20.0], [-0.05, 0.95, 10.0], [1e-4, -5e-5, 1.0]], dtype=torch.float64)


def test_homography_is_found_among_outliers():
    generator = torch.Generator().manual_seed(3)
    a = 500 * torch.rand(200, 2, generator=generator, dtype=torch.float64)
    b = warp_points(a, H)
    b[120:] = 500 * torch.rand(80, 2, generator=generator, dtype=torch.float64)
    result = estimate(a, b, "homography")
    assert result.ok
    assert result.inliers[:120].all()
    assert result.inliers[120:].sum() < 3
    assert torch.allclose(warp_points(a[:120], result.model), b[:120], atol=0.1)


def test_fundamental_is_found_among_outliers():
    generator = torch.Generator().manual_seed(4)
    world = torch.rand(200, 3, generator=generator, dtype=torch.float64) * 4 + torch.tensor([-2.0, -2.0, 4.0])
    camera = torch.tensor([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]], dtype=torch.float64)
    cos, sin = math.cos(0.2), math.sin(0.2)
    turn = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=torch.float64)

    def see(points: torch.Tensor) -> torch.Tensor:
        seen = points @ camera.T
        return seen[:, :2] / seen[:, 2:]

    a, b = see(world), see(world @ turn.T + torch.tensor([0.5, 0.1, 0.0]))
    b[140:] = 400 * torch.rand(60, 2, generator=generator, dtype=torch.float64)
    result = estimate(a, b, "fundamental", threshold=1.0)
    assert result.ok
    assert result.inliers[:140].float().mean() > 0.95
    one = torch.ones(140, 1, dtype=torch.float64)
    lines = torch.cat([a[:140], one], 1) @ result.model.T
    error = (lines * torch.cat([b[:140], one], 1)).sum(1).abs() / lines[:, :2].norm(dim=1)
    assert error.median() < 0.1


@pytest.mark.parametrize("kind", ["homography", "fundamental"])
def test_inputs_without_an_answer_are_not_ok(kind):
    generator = torch.Generator().manual_seed(5)
    line = torch.stack([torch.arange(50.0), 2 * torch.arange(50.0)], dim=1)
    cases = {
        "none": (torch.zeros(0, 2), torch.zeros(0, 2)),
        "few": (torch.rand(3, 2), torch.rand(3, 2)),
        "one place": (torch.ones(50, 2), torch.ones(50, 2)),
        "line": (line, line + 3),
        "nan": (torch.full((50, 2), float("nan")), torch.rand(50, 2)),
    }
    for name, (a, b) in cases.items():
        result = estimate(a, b, kind)
        assert not result.ok, name
        assert result.reason, name
        assert result.model is None, name
        assert result.inliers.shape == (len(a),), name
    a, b = (1000 * torch.rand(40, 2, generator=generator) for _ in range(2))
    assert not estimate(a, b, kind, threshold=0.5).ok


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="kind"):
        estimate(torch.rand(9, 2), torch.rand(9, 2), "affine")
    with pytest.raises(ValueError, match="points"):
        estimate(torch.rand(9, 2), torch.rand(8, 2))
    with pytest.raises(ValueError, match="threshold"):
        estimate(torch.rand(9, 2), torch.rand(9, 2), threshold=0)
