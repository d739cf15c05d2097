"""Metrics of keypoint localization: on structure, on the correct layer, at drawn corners."""

import math

import pytest
import torch

from tiepoints.filters import corner_strength, gaussian_blur
from tiepoints.keypoints import detect_peaks
from tiepoints.metrics.anchoring import (
    SHIFT,
    anchoring,
    corner_image,
    corners,
    layered_frames,
    layers,
    percentiles,
)


def textured(seed: int, height: int = 240, width: int = 320) -> torch.Tensor:
    noise = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed)) - 0.5
    image = gaussian_blur(noise, 2.0)
    return (0.5 + image / (4 * image.std())).clamp(0, 1)


def shi_tomasi(image: torch.Tensor, sigma: float = 1.0, count: int = 500) -> torch.Tensor:
    return detect_peaks(corner_strength(image, sigma), count, window=7)[0][0]


def test_percentiles_are_ranks_among_the_pixels():
    image = torch.zeros(1, 1, 60, 60) + 0.01 * torch.rand(
        1, 1, 60, 60, generator=torch.Generator().manual_seed(0)
    )
    image[..., 30:, 30:] += 0.8
    found = percentiles(image, torch.tensor([[30.0, 30.0], [45.0, 30.0], [-9.0, 200.0]]))
    assert found[0] > 0.99
    assert found[1] < found[0]
    assert float(found.min()) >= 0
    assert percentiles(image, torch.zeros(0, 2)).shape == (0,)


def test_anchoring_separates_corners_from_random_and_offset_points():
    images = [textured(seed) for seed in range(3)]
    on = anchoring(shi_tomasi, images)
    assert on.median > 0.95
    assert on.below_half < 0.01
    assert on.count == 600
    generator = torch.Generator().manual_seed(1)
    by_chance = anchoring(
        lambda image: torch.rand(200, 2, generator=generator) * torch.tensor([319.0, 239.0]), images
    )
    assert by_chance.median == pytest.approx(0.5, abs=0.06)
    assert by_chance.below_half == pytest.approx(0.5, abs=0.06)
    offset = anchoring(lambda image: shi_tomasi(image) + 12, images)
    assert offset.median < 0.7
    assert anchoring(lambda image: torch.zeros(0, 2), images).count == 0


def test_layered_images_move_only_the_disc():
    background, foreground = textured(0), textured(1)
    one, two, center, radius = layered_frames(background, foreground)
    y, x = torch.meshgrid(torch.arange(240), torch.arange(320), indexing="ij")
    first = torch.hypot(x - center[0], y - center[1])
    second = torch.hypot(x - center[0] - SHIFT[0], y - center[1] - SHIFT[1])
    away = (first > radius + 1) & (second > radius + 1)
    assert torch.equal(one[0, 0][away], background[0, 0][away])
    assert torch.equal(two[0, 0][away], one[0, 0][away])
    inside = (first < radius - 1)[: 240 - int(SHIFT[1]), : 320 - int(SHIFT[0])]
    moved = two[0, 0, int(SHIFT[1]) :, int(SHIFT[0]) :]
    assert torch.equal(
        moved[inside], one[0, 0, : 240 - int(SHIFT[1]), : 320 - int(SHIFT[0])][inside]
    )
    with pytest.raises(ValueError, match="same size"):
        layered_frames(background, foreground[..., :100])


def test_layers_find_keypoints_next_to_the_foreground():
    background, foreground = textured(0), textured(1)
    honest = layers(lambda image: shi_tomasi(image, count=2000), background, foreground)
    assert honest.found > 20
    assert honest.share < 0.03
    first, _, center, radius = layered_frames(background, foreground)
    angles = torch.linspace(0, 2 * math.pi, 40)
    ring = center + (radius + 12) * torch.stack([angles.cos(), angles.sin()], dim=1)

    def offset(image):  # a ring 12 px outside of the disc
        return ring if torch.equal(image, first) else ring + torch.tensor(SHIFT)

    fooled = layers(offset, background, foreground)
    assert fooled.found > 10
    assert fooled.share > 0.9
    assert layers(lambda image: torch.zeros(0, 2), background, foreground).share == 0


def test_drawn_corners_are_at_their_positions():
    image, targets = corner_image()
    assert image.shape == (1, 1, 640, 640)
    assert targets.shape == (60, 2)
    assert torch.equal(corner_image()[0], image)
    assert not torch.equal(corner_image(1)[0], image)
    distance = torch.cdist(targets, targets) + 1e3 * torch.eye(60)
    assert float(distance.min()) > 20
    exact = corners(lambda given: targets)
    assert (exact.total, exact.found, exact.near, exact.error) == (60, 60, 60, 0)
    off = corners(lambda given: targets + torch.tensor([1.5, 0.0]))
    assert (off.found, off.near) == (0, 60)
    assert off.error == pytest.approx(1.5, abs=1e-4)
    nothing = corners(lambda given: torch.zeros(0, 2))
    assert nothing.found == 0
    assert math.isnan(nothing.error)


def test_corner_detector_finds_drawn_corners():
    found = corners(lambda image: shi_tomasi(image, 0.8, 600))
    assert found.near >= 55
    assert found.error < 1.5
