"""Known answers of the repeatability used while training."""

from __future__ import annotations

import pytest
import torch

from tiepoints.evaluation.metrics import mutual_repeatability

SIZE = (120, 160)


def grid(step: int = 25) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(20.0, 140, step), torch.arange(20.0, 100, step))


def shift(x: float, y: float) -> torch.Tensor:
    return torch.tensor([[1.0, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float64)


def score(a, b, H=None, **options) -> float:
    return mutual_repeatability(a, b, torch.eye(3) if H is None else H, SIZE, SIZE, **options)


def test_identity_is_one():
    assert score(grid(), grid()) == 1


def test_far_points_are_not_repeated():
    assert score(grid(), grid() + torch.tensor([10.0, 0]), border=0) == 0


def test_threshold():
    moved = grid() + torch.tensor([2.0, 0])
    assert score(grid(), moved) == 1
    assert score(grid(), moved, threshold=1.9) == 0
    assert score(grid(), moved, threshold=2.0) == 1


def test_no_points():
    none = torch.zeros(0, 2)
    assert score(none, grid()) == score(grid(), none) == score(none, none) == 0
    assert score(grid(), grid(), shift(1000, 0)) == 0


def test_true_homography_counts():
    H = shift(11, -7)
    inner = torch.cartesian_prod(torch.arange(40.0, 110, 10), torch.arange(40.0, 80, 10))
    assert score(inner, inner + torch.tensor([11.0, -7]), H) == 1
    assert score(inner, inner + torch.tensor([11.0, -7]), shift(-11, 7), border=0) < 0.7


def test_one_to_one():
    crowd = torch.tensor([[50.0, 50], [51, 50], [50, 51]])
    one = torch.tensor([[50.0, 50]])
    assert score(crowd, one) == score(one, crowd) == 1
    two = torch.tensor([[50.0, 50], [90, 80]])
    assert score(crowd, two) == score(two, crowd) == 0.5


def test_points_beside_the_common_area_do_not_count():
    outside = torch.tensor([[10.0, 60]])
    a = torch.cat([outside, grid()])
    assert score(a, grid()) == 1
    assert score(a, a[1:], border=0) == 1
    assert score(outside, outside) == 0
    assert score(outside, outside, border=10) == 1


def test_only_the_strongest_count():
    a = grid()
    order = torch.arange(len(a) - 1, -1, -1)
    assert score(a, a[order], num_points=3) == 0
    assert score(a, a, num_points=3) == 1
    assert score(torch.cat([torch.tensor([[0.0, 0]]), a]), a, num_points=3) == pytest.approx(1)  # cut after the border
