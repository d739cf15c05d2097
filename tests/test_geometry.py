"""Points and coordinate frames."""

from __future__ import annotations

import pytest
import torch

from tiepoints.geometry import (
    common_area,
    pixel_grid,
    resize_points,
    sample_at,
    warp_image,
    warp_points,
)

H = torch.tensor([[1.1, 0.2, -7.0], [-0.1, 0.9, 4.0], [1e-4, -2e-4, 1.0]], dtype=torch.float64)


def points(count: int = 50) -> torch.Tensor:
    return (
        torch.rand(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 300
    )


def test_warp_points_by_hand():
    xy = warp_points(torch.tensor([[10.0, 20.0]], dtype=torch.float64), H)
    depth = 1e-3 - 4e-3 + 1
    assert xy[0].tolist() == pytest.approx([(11 + 4 - 7) / depth, (-1 + 18 + 4) / depth])


def test_warp_points_round_trip():
    result = warp_points(warp_points(points(), H), torch.linalg.inv(H))
    torch.testing.assert_close(result, points())


def test_warp_points_batch():
    many = torch.stack([H, torch.eye(3, dtype=torch.float64)])
    xy = points().expand(2, -1, -1)
    both = warp_points(xy, many)
    torch.testing.assert_close(both[0], warp_points(points(), H))
    torch.testing.assert_close(both[1], points())
    assert warp_points(points()[:0], H).shape == (0, 2)


def test_points_at_infinity_are_not_finite():
    far = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])
    assert not torch.isfinite(warp_points(torch.tensor([[0.0, 5.0]]), far)).any()


def test_resize_points_keeps_edges():
    edges = torch.tensor([[-0.5, -0.5], [99.5, 49.5], [0.0, 0.0]])  # an image of 100 x 50
    resized = resize_points(edges, 2.0, 0.5)
    assert resized.tolist() == [[-0.5, -0.5], [199.5, 24.5], [0.5, -0.25]]
    torch.testing.assert_close(resize_points(resized, 0.5, 2.0), edges)


def test_pixel_grid_is_row_by_row():
    assert pixel_grid(2, 3, torch.empty(0)).tolist() == [
        [0, 0],
        [1, 0],
        [2, 0],
        [0, 1],
        [1, 1],
        [2, 1],
    ]


def test_sample_at_pixel_centers():
    image = torch.rand(2, 3, 5, 7)
    grid = pixel_grid(5, 7, image).expand(2, -1, -1)
    torch.testing.assert_close(sample_at(image, grid).view(2, 3, 5, 7), image)
    between = sample_at(image, torch.tensor([[[2.5, 3.0]]]).expand(2, 1, 2))[..., 0]
    torch.testing.assert_close(between, (image[:, :, 3, 2] + image[:, :, 3, 3]) / 2)
    outside = torch.tensor([[[-5.0, 2.0], [float("nan"), 0.0], [float("inf"), 1.0]]]).expand(
        2, 3, 2
    )
    assert sample_at(image, outside).abs().max() == 0


@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (0, -2), (-4, 5)])
def test_warp_image_translation_is_exact(dx, dy):
    image = torch.rand(1, 2, 20, 24) + 1
    moved = warp_image(image, torch.tensor([[[1.0, 0, dx], [0, 1, dy], [0, 0, 1]]]))
    for y in range(20):
        for x in range(24):
            inside = 0 <= y - dy < 20 and 0 <= x - dx < 24
            wanted = image[0, :, y - dy, x - dx] if inside else torch.zeros(2)
            torch.testing.assert_close(moved[0, :, y, x], wanted, rtol=1e-4, atol=1e-4)


def test_warp_image_agrees_with_warp_points_for_any_size():
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(60.0), indexing="ij")
    position = torch.stack([x, y])[None]
    moved = warp_image(position, H[None].float(), size=(30, 45))
    assert moved.shape == (1, 2, 30, 45)
    source = warp_points(pixel_grid(30, 45, H), torch.linalg.inv(H)).T.view(2, 30, 45).float()
    inside = ((source > 0) & (source < 59)).all(dim=0)
    assert inside.any()
    torch.testing.assert_close(moved[0][:, inside], source[:, inside], rtol=1e-3, atol=1e-3)


def test_common_area():
    xy = torch.tensor([[0.0, 0.0], [9.0, 0.0], [5.0, 5.0], [19.0, 9.0], [19.1, 9.0]])
    assert common_area(xy, torch.eye(3), (10, 20)).tolist() == [True, True, True, True, False]
    assert common_area(xy, torch.eye(3), (10, 20), border=3).tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]
    shift = torch.tensor([[1.0, 0, -6], [0, 1, 0], [0, 0, 1]])
    assert common_area(xy, shift, (10, 20)).tolist() == [False, True, False, True, True]
    assert common_area(xy[:0], shift, (10, 20)).shape == (0,)
