"""From score map to keypoints: suppression, order, subpixel positions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tiepoints.keypoints import (
    clear_border,
    detect_peaks,
    local_maxima,
    max_filter,
    refine,
    round_max_filter,
    strongest,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def bump(
    height: int,
    width: int,
    x0: float,
    y0: float,
    sigma: float = 2.0,
    stretch: float = 1.0,
    angle: float = 0.0,
):
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    u = (x - x0) * math.cos(angle) + (y - y0) * math.sin(angle)
    v = (y - y0) * math.cos(angle) - (x - x0) * math.sin(angle)
    return torch.exp(-0.5 * (u**2 + (v / stretch) ** 2) / sigma**2)


@pytest.mark.parametrize("window", [1, 3, 5, 15])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (13, 1), (17, 31), (40, 40)])
def test_max_filter_is_max_pooling(window, size):
    maps = noise(2, 1, *size) - 0.5
    assert torch.equal(max_filter(maps, window), F.max_pool2d(maps, window, 1, window // 2))


@pytest.mark.parametrize("window", [0, 2, -3])
def test_max_filter_rejects_even_windows(window):
    with pytest.raises(ValueError, match="window"):
        max_filter(noise(1, 1, 5, 5), window)


def test_local_maxima_of_random_maps_follow_the_published_rule():
    maps = noise(2, 1, 50, 60)
    wanted = (maps == F.max_pool2d(maps, 7, 1, 3)) & (maps > 0.9)
    assert torch.equal(local_maxima(maps, 7, 0.9), wanted)
    assert torch.equal(local_maxima(maps, 7, 0.9, unique=False), wanted)


def test_plateaus():
    maps = torch.zeros(2, 1, 30, 30)
    maps[0, 0, 10:12, 10:13] = 1
    maps[1, 0, 20, 5], maps[1, 0, 5, 20] = 1, 1
    maps[1, 0, 20, 8] = 1  # within the window of an equal value
    found = local_maxima(maps, 15)
    assert found[0, 0].nonzero().tolist() == [[10, 10]]
    assert found[1, 0].nonzero().tolist() == [[5, 20], [20, 5]]
    assert local_maxima(maps, 15, unique=False).sum().item() == 6 + 3


def test_threshold_is_exclusive():
    maps = torch.zeros(1, 1, 9, 9)
    maps[0, 0, 4, 4] = 0.5
    assert local_maxima(maps, 3, 0.5).sum() == 0
    assert local_maxima(maps, 3, 0.4999).sum() == 1
    assert local_maxima(torch.zeros(1, 1, 9, 9), 3).sum() == 0


@pytest.mark.parametrize(
    ("size", "border"), [((9, 12), 0), ((9, 12), 2), ((9, 12), 4), ((9, 12), 5), ((1, 1), 15)]
)
def test_clear_border(size, border):
    maps = noise(1, 1, *size) + 1
    cleared = clear_border(maps, border)
    for y in range(size[0]):
        for x in range(size[1]):
            inside = border <= y < size[0] - border and border <= x < size[1] - border
            assert cleared[0, 0, y, x] == (maps[0, 0, y, x] if inside else 0)


def test_no_keypoints_in_the_border():
    maps = noise(1, 1, 60, 70)
    for unique in (True, False):
        xy, _ = detect_peaks(maps, 1000, window=3, border=10, unique=unique, subpixel=False)[0]
        assert len(xy) > 20
        assert xy.amin() >= 10
        assert xy[:, 0].max() <= 59
        assert xy[:, 1].max() <= 49


def test_slopes_into_the_border_are_not_keypoints():
    ramp = torch.arange(40.0).expand(1, 1, 40, 40) + 1e-3 * torch.arange(40.0)[:, None]
    assert len(detect_peaks(ramp, 10, window=5, border=5)[0][0]) == 0
    assert len(detect_peaks(ramp, 10, window=5, border=5, unique=False)[0][0]) > 0


def test_strongest_first_and_ties_in_raster_order():
    maps = torch.zeros(9, 20)
    for y, x, value in (
        (7, 1, 3.0),
        (1, 8, 2.0),
        (1, 4, 2.0),
        (5, 0, 2.0),
        (3, 3, 5.0),
        (8, 8, 1.0),
    ):
        maps[y, x] = value
    xy, score = strongest(maps, maps > 0, 5)
    assert xy.tolist() == [[3, 3], [1, 7], [4, 1], [8, 1], [0, 5]]
    assert score.tolist() == [5, 3, 2, 2, 2]
    assert len(strongest(maps, maps > 0, 100)[0]) == 6
    assert len(strongest(maps, maps > 0, 0)[0]) == 0


@pytest.mark.parametrize(
    "position", [(20.0, 15.0), (20.3, 15.0), (19.8, 15.4), (20.4, 14.6), (3.2, 3.3)]
)
@pytest.mark.parametrize(("stretch", "angle"), [(1.0, 0.0), (1.2, 0.6), (1.2, -0.9)])
def test_refine_finds_the_top_of_a_gaussian(position, stretch, angle):
    score_map = bump(30, 40, *position, sigma=2.5, stretch=stretch, angle=angle)
    row, column = divmod(int(score_map.argmax()), 40)
    found = refine(score_map, torch.tensor([[column, row]]))
    assert found.dtype == torch.float32
    assert found[0].tolist() == pytest.approx(position, abs=0.05)


def test_refine_is_exact_on_paraboloids():
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    u, v = x - 5.3, y - 6.2
    found = refine(100 - 2 * u**2 - 3 * v**2 + 1.0 * u * v, torch.tensor([[5, 6]]))
    assert found[0].tolist() == pytest.approx([5.3, 6.2], abs=1e-4)


def test_refine_keeps_positions_without_a_maximum():
    flat = torch.ones(9, 9)
    xy = torch.tensor([[4, 4], [0, 4], [8, 8]])
    assert torch.equal(refine(flat, xy), xy.float())
    rising = torch.arange(81.0).view(9, 9)
    assert torch.equal(refine(rising, xy), xy.float())
    for size in ((1, 1), (2, 9), (9, 2)):
        assert refine(torch.ones(size), torch.tensor([[0, 0]])).tolist() == [[0, 0]]
    assert refine(flat, torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2)


def test_refine_moves_at_most_half_a_pixel():
    maps = noise(1, 1, 80, 80)
    whole, _ = detect_peaks(maps, 500, window=3, border=1, subpixel=False)[0]
    fine, _ = detect_peaks(maps, 500, window=3, border=1)[0]
    assert 0 < (whole - fine).abs().max() <= 0.5


@pytest.mark.parametrize("border", [0, 10])
@pytest.mark.parametrize("position", [(10.3, 20.2), (29.3, 10.4), (10.0, 10.0)])
def test_peaks_next_to_the_border_are_refined_from_the_whole_map(position, border):
    xy, _ = detect_peaks(bump(40, 40, *position)[None, None], 1, border=border)[0]
    assert xy[0].tolist() == pytest.approx(position, abs=0.05)


def test_empty_and_tiny_maps():
    for size in ((40, 40), (1, 1), (3, 50)):
        for xy, score in detect_peaks(torch.zeros(2, 1, *size), 10):
            assert xy.shape == (0, 2)
            assert xy.dtype == torch.float32
            assert score.shape == (0,)
    assert len(detect_peaks(torch.ones(1, 1, 1, 1), 10)[0][0]) == 0
    xy, score = detect_peaks(torch.ones(1, 1, 1, 1), 10, border=0)[0]
    assert xy.tolist() == [[0, 0]]
    assert score.tolist() == [1]


@pytest.mark.parametrize("unique", [True, False])
def test_batch_equals_single(unique):
    maps = (noise(3, 1, 50, 64) * 20).round()  # many ties
    together = detect_peaks(maps, 50, window=5, border=4, unique=unique)
    assert len(together) == 3
    for one, (xy, score) in zip(maps, together, strict=True):
        alone_xy, alone_score = detect_peaks(one[None], 50, window=5, border=4, unique=unique)[0]
        assert torch.equal(xy, alone_xy)
        assert torch.equal(score, alone_score)
        assert (score.diff() <= 0).all()


@pytest.mark.parametrize("window", [1, 3, 5, 15])
def test_round_filter_is_the_maximum_of_a_disc(window):
    score = noise(2, 1, 37, 44)
    radius = window // 2
    slow = torch.full_like(score, float("-inf"))
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if dx * dx + dy * dy <= (radius + 0.5) ** 2:
                padded = torch.nn.functional.pad(score, [radius] * 4, value=float("-inf"))
                slow = torch.maximum(
                    slow,
                    padded[..., radius + dy : radius + dy + 37, radius + dx : radius + dx + 44],
                )
    assert torch.equal(round_max_filter(score, window), slow)


def test_suppression_by_a_disc_is_rotation_invariant():
    """Pairs of maxima 9 px apart: along the axes both shapes keep the stronger one, along the
    diagonal only the square does.
    """
    score = torch.zeros(1, 1, 60, 60)
    score[0, 0, 20, 20], score[0, 0, 20, 26], score[0, 0, 40, 20], score[0, 0, 46, 26] = 2, 1, 2, 1
    assert local_maxima(score, 15).sum() == 2
    assert local_maxima(score, 15, shape="round").sum() == 3
