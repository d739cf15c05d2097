"""Descriptor losses, each compared with a reference implementation with loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from tiepoints.training.losses import (
    SAME_POINT,
    hardnet_loss,
    hynet_loss,
    second_order_term,
    sosnet_loss,
)


def vectors(n: int = 7, d: int = 16, seed: int = 0, noise: float = 0.6):
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=rng, dtype=torch.float64)
    b = a + noise * torch.randn(n, d, generator=rng, dtype=torch.float64)
    return F.normalize(a, dim=1), F.normalize(b, dim=1)


def slow_distance(x, y) -> float:
    return math.sqrt(max(0.0, float((x * x).sum() + (y * y).sum() - 2 * (x * y).sum())) + 1e-6)


def slow_negatives(a, b, i: int, within: bool, swap: bool = True) -> float:
    """Nearest descriptor of another point than number i, from the anchor or from the positive."""
    candidates = []
    for j in range(len(a)):
        if j == i:
            continue
        found = [slow_distance(a[i], b[j])]
        found += [slow_distance(a[j], b[i])] if swap else []
        found += [slow_distance(a[i], a[j]), slow_distance(b[i], b[j])] if within else []
        candidates += [d for d in found if d >= SAME_POINT]
    return min(candidates)


@pytest.mark.parametrize("swap", [True, False])
def test_hardnet_loss_equals_reference_implementation(swap):
    a, b = vectors()
    a[5] = b[2]  # another view of the same point is not a negative
    slow = [
        max(0.0, 1 + slow_distance(a[i], b[i]) - slow_negatives(a, b, i, False, swap))
        for i in range(len(a))
    ]
    loss, numbers = hardnet_loss(a, b, anchor_swap=swap)
    assert loss.item() == pytest.approx(sum(slow) / len(slow), abs=1e-9)
    assert numbers["loss"] == loss.item()


def test_sosnet_loss_equals_reference_implementation():
    a, b = vectors(12)
    n, k = len(a), 3
    first = [
        max(0.0, 1 + slow_distance(a[i], b[i]) - slow_negatives(a, b, i, True)) ** 2
        for i in range(n)
    ]

    def nearest(x, y, i):
        return sorted((j for j in range(n) if j != i), key=lambda j: slow_distance(x[i], y[j]))[:k]

    graph = {
        (i, j) for x, y in ((a, a), (b, b), (a, b)) for i in range(n) for j in nearest(x, y, i)
    }
    graph |= {(j, i) for i, j in graph}
    second = [
        math.sqrt(
            sum(
                (slow_distance(a[i], a[j]) - slow_distance(b[i], b[j])) ** 2
                for j in range(n)
                if (i, j) in graph
            )
            + 1e-6
        )
        for i in range(n)
    ]
    loss, numbers = sosnet_loss(a, b, neighbors=k, second_order=0.5)
    assert loss.item() == pytest.approx((sum(first) + 0.5 * sum(second)) / n, abs=1e-9)
    assert numbers["second"] == pytest.approx(sum(second) / n, abs=1e-9)


@pytest.mark.parametrize("second", [0.0, 0.3])
def test_hynet_loss_equals_reference_implementation(second):
    a, b = vectors(10)
    rng = torch.Generator().manual_seed(4)
    raw_a, raw_b = (
        x * (0.5 + 3 * torch.rand(len(x), 1, generator=rng, dtype=torch.float64)) for x in (a, b)
    )

    def hybrid(d):
        return d + 2.0 * d * d / 2

    hinge, drift = [], []
    for i in range(len(a)):
        hinge.append(
            max(
                0.0, 1.2 + hybrid(slow_distance(a[i], b[i])) - hybrid(slow_negatives(a, b, i, True))
            )
        )
        drift.append(
            (
                math.sqrt(float(raw_a[i].square().sum()) + 1e-6)
                - math.sqrt(float(raw_b[i].square().sum()) + 1e-6)
            )
            ** 2
        )
    expected = (sum(hinge) + 0.1 * sum(drift)) / len(a)
    if second:
        expected += second * second_order_term(a, b).item()
    loss, _ = hynet_loss(raw_a, raw_b, second_order=second)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("loss", [hardnet_loss, sosnet_loss, hynet_loss])
def test_descriptor_losses_train_free_vectors(loss):
    """Thirty steps on free vectors bring pairs together and separate others; equal vectors have
    finite gradients.
    """
    a, b = (x.clone().requires_grad_() for x in vectors(16, 8, noise=3.0))
    optimiser = torch.optim.Adam([a, b], lr=0.05)
    values = []
    for _ in range(30):
        value, _ = loss(F.normalize(a, dim=1), F.normalize(b, dim=1))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.6 * values[0]
    same = torch.ones(4, 8, requires_grad=True)
    loss(F.normalize(same, dim=1), F.normalize(same, dim=1))[0].backward()
    assert torch.isfinite(same.grad).all()


@pytest.mark.parametrize("loss", [hardnet_loss, sosnet_loss, hynet_loss])
def test_descriptor_losses_reject_invalid_shapes(loss):
    with pytest.raises(ValueError, match="same shape"):
        loss(torch.rand(3, 8), torch.rand(4, 8))
    with pytest.raises(ValueError, match="two pairs"):
        loss(torch.rand(1, 8), torch.rand(1, 8))
