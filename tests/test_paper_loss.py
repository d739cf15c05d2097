"""The M-SIP loss of the Key.Net paper: values by hand, a reference implementation, gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tiepoints.training.losses import paper_msip_loss, soft_coordinates


def smooth_map(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, 1, size + 4, size + 4, generator=generator, dtype=torch.float64)
    return 8 * torch.nn.functional.avg_pool2d(noise, 5, 1)


def similarity(scale: float, degrees: float, center: float) -> np.ndarray:
    c, s = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    to_center = np.array([[1.0, 0, -center], [0, 1, -center], [0, 0, 1]])
    return (
        np.linalg.inv(to_center) @ np.array([[c, -s, 1.3], [s, c, -0.7], [1e-4, 0, 1]]) @ to_center
    )


# --- reference implementation, window by window and pixel by pixel


def mapped(H: np.ndarray, x: float, y: float) -> tuple[float, float]:
    u, v, w = H @ (x, y, 1.0)
    return u / w, v / w


def bilinear(image: np.ndarray, x: float, y: float) -> float:
    """Value between the pixels; 0 outside."""
    x0, y0 = math.floor(x), math.floor(y)
    total = 0.0
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        if 0 <= y0 + i < image.shape[0] and 0 <= x0 + j < image.shape[1]:
            weight = (y - y0 if i else 1 - y + y0) * (x - x0 if j else 1 - x + x0)
            total += weight * image[y0 + i, x0 + j]
    return total


def softmax_position(pixels: list[tuple[int, int]], image: np.ndarray, base: float):
    weights = [base ** image[y, x] for x, y in pixels]
    return tuple(
        sum(w * p[k] for w, p in zip(weights, pixels, strict=True)) / sum(weights) for k in (0, 1)
    )


def slow_loss(a, b, H_ab, mask_a, mask_b, *, windows, weights, border, base) -> float:
    """``paper_msip_loss`` of one pair of maps (S,S)."""
    size = len(a)
    H_ba = np.linalg.inv(H_ab)
    frame = np.zeros((size, size))
    frame[border : size - border, border : size - border] = 1
    in_a, in_b = frame * mask_a, frame * mask_b
    pixels = [(x, y) for y in range(size) for x in range(size)]
    common_a = [p for p in pixels if in_a[p[1], p[0]] * bilinear(in_b, *mapped(H_ab, *p)) > 0.5]
    common_b = [p for p in pixels if in_b[p[1], p[0]] * bilinear(in_a, *mapped(H_ba, *p)) > 0.5]
    total = 0.0
    for window, factor in zip(windows, weights, strict=True):
        for top in range(0, size - window + 1, window):
            for left in range(0, size - window + 1, window):

                def inside(x, y, left=left, top=top, window=window):
                    return (
                        left - 0.5 <= x < left + window - 0.5
                        and top - 0.5 <= y < top + window - 0.5
                    )

                of_a = [p for p in common_a if inside(*p)]
                of_b = [p for p in common_b if inside(*mapped(H_ba, *p))]
                if not of_a or not of_b:
                    continue
                at_a, at_b = softmax_position(of_a, a, base), softmax_position(of_b, b, base)
                other = mapped(H_ba, *at_b)
                distance = (at_a[0] - other[0]) ** 2 + (at_a[1] - other[1]) ** 2
                total += factor * (bilinear(a, *at_a) + bilinear(b, *at_b)) * distance
    return total


@pytest.mark.parametrize("base", [math.e, 3.0])
def test_loss_equals_the_reference_implementation(base):
    size = 24
    a, b = smooth_map(size, 0), smooth_map(size, 1)
    H = [similarity(1.3, 25, 11), similarity(0.8, -70, 13)]
    mask_a, mask_b = torch.ones(2, 1, size, size), torch.ones(2, 1, size, size)
    mask_a[1, 0, :, :9] = 0
    mask_b[0, 0, 15:] = 0
    options = {"windows": (5, 8), "weights": (4.0, 1.0), "border": 2, "base": base}
    found, metrics = paper_msip_loss(
        torch.cat([a, b]),
        torch.cat([b, a]),
        torch.from_numpy(np.stack(H)),
        mask_a=mask_a.double(),
        mask_b=mask_b.double(),
        **options,
    )
    maps = (a[0, 0].numpy(), b[0, 0].numpy())
    slow = [
        slow_loss(maps[i], maps[1 - i], H[i], mask_a[i, 0].numpy(), mask_b[i, 0].numpy(), **options)
        for i in (0, 1)
    ]
    assert min(slow) > 10
    assert found.item() == pytest.approx(sum(slow) / 2, rel=1e-9)
    assert metrics["loss"] == pytest.approx(4 * metrics["loss_5"] + metrics["loss_8"])


def test_loss_by_hand():
    """One window, sharp peaks 2 px apart: the squared distance times the sum of both scores."""
    a, b = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    a[0, 0, 3, 2], b[0, 0, 3, 4] = 60.0, 80.0
    loss, _ = paper_msip_loss(a, b, torch.eye(3)[None], windows=(8,), weights=(1.0,), border=0)
    assert loss.item() == pytest.approx(4 * 140, rel=1e-5)
    shift = torch.tensor([[[1.0, 0, 2], [0, 1, 0], [0, 0, 1]]])  # the peaks correspond
    loss, _ = paper_msip_loss(a, b, shift, windows=(8,), weights=(1.0,), border=0)
    assert loss.item() == pytest.approx(0, abs=1e-4)


def test_gradient_reaches_both_maps_but_not_the_weight_of_a_window():
    a, b = (smooth_map(16, seed).requires_grad_() for seed in (2, 3))
    loss, _ = paper_msip_loss(a, b, torch.eye(3)[None], windows=(8,), weights=(1.0,), border=0)
    loss.backward()
    for score in (a, b):
        # the soft argmax does not depend on a constant added to a window's scores
        grad = score.grad[0, 0, :8, :8]
        assert grad.abs().max() > 1e-3
        assert grad.sum().item() == pytest.approx(0, abs=1e-12)


def test_large_scores_and_empty_windows_are_finite():
    a = torch.zeros(1, 1, 16, 16, requires_grad=True)
    far = torch.tensor([[[1.0, 0, 100], [0, 1, 0], [0, 0, 1]]])
    assert paper_msip_loss(a, a, far, windows=(8,), weights=(1.0,), border=0)[0].item() == 0
    large = torch.rand(1, 1, 16, 16) * 1e4
    large.requires_grad_()
    loss, _ = paper_msip_loss(
        large, large.detach().flip(-1), torch.eye(3)[None], windows=(8,), weights=(1.0,), border=0
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(large.grad).all()


def test_soft_coordinates_of_missing_windows():
    xy = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    score = torch.tensor([[0.0, math.log(3), 7.0]])
    positions, found = soft_coordinates(score, xy, torch.tensor([[1, 1, -1]]), 2)
    assert found.tolist() == [[False, True]]
    assert positions[0, 1].tolist() == pytest.approx([0.75, 0.0])


def test_arguments():
    maps = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="2 windows but 1 weights"):
        paper_msip_loss(maps, maps, torch.eye(3)[None], windows=(4, 8), weights=(1.0,))
    with pytest.raises(ValueError, match="smaller than a window"):
        paper_msip_loss(maps, maps, torch.eye(3)[None])
    with pytest.raises(ValueError, match="base must be above 1"):
        paper_msip_loss(maps, maps, torch.eye(3)[None], windows=(8,), weights=(1.0,), base=1.0)


def test_a_constant_map_is_a_minimum():
    """The reason why the published code has another target: a constant map has a loss of almost 0,
    a random one has not.
    """
    H = torch.from_numpy(similarity(1.0, 0, 23.5) * [[1], [1], [0]])[None].clone()
    H[0, 2] = torch.tensor([0.0, 0, 1])  # a shift by 1.3 and -0.7 px
    constant = torch.ones(1, 1, 48, 48)
    options = {"windows": (8,), "weights": (1.0,), "border": 0}
    flat = paper_msip_loss(constant, constant, H, **options)[0]
    noise = 8 * torch.rand(1, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    random = paper_msip_loss(noise, noise.flip(-1), H, **options)[0]
    # the centers of the pixels of both views differ by less than a pixel
    assert flat.item() < 2 * 36
    assert random.item() > 10 * flat.item()
