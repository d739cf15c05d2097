"""The dense orientation loss: published values, a reference implementation, rotations; the errors
used in evaluations.
"""

import math

import numpy as np
import pytest
import torch

from tiepoints.geometry import local_rotation, pixel_grid
from tiepoints.metrics.repeatability import mutual_matches, orientation_errors, repeated_points
from tiepoints.training.losses import orientation_loss, shift_bins


def rotation_about_center(degrees: float, size: int) -> torch.Tensor:
    """(1,3,3), clockwise."""
    c, s, m = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), (size - 1) / 2
    return torch.tensor(
        [[[c, -s, m - c * m + s * m], [s, c, m - s * m - c * m], [0, 0, 1]]], dtype=torch.float64
    )


def histograms(n: int, size: int = 15, seed: int = 0) -> torch.Tensor:
    return (
        torch.randn(1, n, size, size, generator=torch.Generator().manual_seed(seed))
        .mul(2)
        .softmax(dim=1)
    )


@pytest.mark.parametrize("n", [36, 16])
def test_published_losses_and_gradients(reference_dir, n):
    with np.load(reference_dir / "loss_goldens.npz") as file:
        golden = {
            key.split("/")[1]: torch.from_numpy(np.asarray(file[key]))
            for key in file.files
            if key.startswith(f"ori_g{n}/")
        }
    a, b = (golden[key].clone().requires_grad_() for key in ("src", "dst"))
    H_ab = torch.linalg.inv(golden["h_dst_2_src"].double())
    loss, _ = orientation_loss(a, b, H_ab, bins=golden["shift_bins"].float().view(-1, 1, 1, 1))
    loss.backward()
    torch.testing.assert_close(loss, golden["loss"].to(loss).reshape(()), rtol=1e-5, atol=0)
    for tensor, key in ((a, "grad_src"), (b, "grad_dst")):
        torch.testing.assert_close(tensor.grad, golden[key], rtol=1e-4, atol=1e-6)
    # the published code truncates the rotation of the homography to integer bins
    angle = torch.rad2deg(-local_rotation(pixel_grid(24, 24, H_ab), H_ab))[:, 0]
    torch.testing.assert_close(angle, golden["angle_deg"][:, 0].double(), atol=1e-3, rtol=0)


def test_reference_implementation_with_fractional_bins():
    n, size = 8, 15
    a, b = histograms(n, size), histograms(n, size, 1)
    H_ab = rotation_about_center(-33.0, size)  # 33 degrees counterclockwise: 0.733 bins
    loss, _ = orientation_loss(a, b, H_ab, border=2)
    d = 33.0 * n / 360
    H_ba = torch.linalg.inv(H_ab[0])
    total, count = 0.0, 0
    for y in range(2, size - 2):
        for x in range(2, size - 2):
            mapped = H_ab[0] @ torch.tensor([x, y, 1.0], dtype=torch.float64)
            u, v = (mapped[:2] / mapped[2]).tolist()
            if not (0.001 <= u <= size - 1.001 and 0.001 <= v <= size - 1.001):
                continue
            i, j, p, q = int(u), int(v), u - int(u), v - int(v)
            above, below = (
                b[0, :, row, i] * (1 - p) + b[0, :, row, i + 1] * p for row in (j, j + 1)
            )
            seen = above * (1 - q) + below * q
            for k in range(n):
                low = math.floor(d)
                expected = (1 - (d - low)) * a[0, (k - low) % n, y, x] + (d - low) * a[
                    0, (k - low - 1) % n, y, x
                ]
                total -= float(expected * torch.log(seen[k] + 1e-7))
            count += 1
    assert H_ba.isfinite().all()
    whole, _ = orientation_loss(a, b, H_ab, border=2, mask_a=torch.ones(1, 1, size, size))
    assert whole.item() == pytest.approx(total / count, rel=1e-4)
    assert loss.item() == pytest.approx(
        whole.item(), rel=0.05
    )  # without a mask the partly covered border is included


@pytest.mark.parametrize("degrees", [0, 45, 90, -135, 180, 17])
def test_rotated_histograms_agree_best(degrees):
    """Peaks at the same location of the scene, and at incorrect ones."""
    n, size = 36, 31
    H_ab = rotation_about_center(degrees, size)  # clockwise
    bins = torch.arange(n)
    peak = 5 * torch.cos((bins - 4) * 2 * math.pi / n)
    moved = 5 * torch.cos(
        (bins - 4 + degrees * n / 360) * 2 * math.pi / n
    )  # bins are in counterclockwise order
    a = peak.softmax(0).view(1, n, 1, 1).expand(1, n, size, size)
    b = moved.softmax(0).view(1, n, 1, 1).expand(1, n, size, size)
    right, numbers = orientation_loss(a, b, H_ab)
    wrong, other = orientation_loss(a, b.roll(12, 1), H_ab)
    assert right < 0.8 * wrong
    assert numbers["agree"] == pytest.approx(1.0)
    assert other["agree"] == pytest.approx(0.0)


def test_fractional_shift_interpolates_neighboring_bins():
    h = histograms(7, 3)
    for whole in (0, 2, -3):
        torch.testing.assert_close(
            shift_bins(h, torch.full((1, 1, 1, 1), float(whole))), h.roll(whole, 1)
        )
    half = shift_bins(h, torch.full((1, 1, 3, 3), 1.5))
    torch.testing.assert_close(half, (h.roll(1, 1) + h.roll(2, 1)) / 2)
    torch.testing.assert_close(half.sum(dim=1), torch.ones(1, 3, 3))


def test_gradients_of_both_inputs_and_shape_checks():
    a, b = histograms(8).requires_grad_(), histograms(8, seed=1).requires_grad_()
    orientation_loss(a, b, rotation_about_center(20, 15))[0].backward()
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="equal shape"):
        orientation_loss(a, b[:, :4], rotation_about_center(20, 15))


def test_local_rotation_of_a_tilted_plane_equals_finite_differences():
    H = torch.tensor([[0.8, -0.5, 3.0], [0.55, 0.9, -2.0], [1e-3, -5e-4, 1.0]], dtype=torch.float64)
    xy = torch.tensor([[10.0, 20.0], [80.0, 5.0]], dtype=torch.float64)

    def warp(p):
        q = torch.cat([p, torch.ones(len(p), 1, dtype=p.dtype)], dim=1) @ H.T
        return q[:, :2] / q[:, 2:]

    dx, dy = (
        (warp(xy + step) - warp(xy - step)) / 2e-4
        for step in (torch.tensor([1e-4, 0]), torch.tensor([0, 1e-4]))
    )
    expected = torch.atan2(dx[:, 1] - dy[:, 0], dx[:, 0] + dy[:, 1])
    torch.testing.assert_close(local_rotation(xy, H), expected, atol=1e-6, rtol=0)


def test_orientation_errors_and_repeated_points():
    rng = torch.Generator().manual_seed(0)
    H = rotation_about_center(50, 200)[0]
    xy_a = 40 + 120 * torch.rand(60, 2, generator=rng, dtype=torch.float64)
    xy_b = (torch.cat([xy_a, torch.ones(60, 1)], dim=1) @ H.T)[:, :2]
    i, j = repeated_points(xy_a, xy_b.flip(0), H, (200, 200), (200, 200))
    assert len(i) == mutual_matches(xy_a, xy_b.flip(0), H, (200, 200), (200, 200))[0]
    assert (j == 59 - i).all()
    angle_a = torch.linspace(0, 6, 60)
    angle_b = (angle_a + math.radians(50 - 360) + torch.tensor([0.1, -0.2]).repeat(30)).remainder(
        2 * math.pi
    )
    errors = orientation_errors(xy_a, angle_a, angle_b, H)
    torch.testing.assert_close(
        errors, torch.rad2deg(torch.tensor([0.1, 0.2]).repeat(30)).double(), atol=1e-3, rtol=0
    )


def test_mirrored_pairs_raise():
    mirror = torch.tensor([[[-1.0, 0, 14], [0, 1, 0], [0, 0, 1]]])
    for H_ab in (mirror, -2 * mirror):  # whatever the scale of the matrix
        with pytest.raises(ValueError, match="mirrored"):
            orientation_loss(histograms(8), histograms(8), H_ab)
    orientation_loss(histograms(8), histograms(8), -rotation_about_center(20, 15))
