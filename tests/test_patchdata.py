"""Patch pairs from photographs: correspondence, seeds, and images without contrast."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tiepoints.datasets.patch_pairs import PatchPairs, PatchSettings, local_scale, rotate_pair
from tiepoints.datasets.synthetic import PRESETS
from tiepoints.errors import DataError
from tiepoints.geometry import warp_points
from tiepoints.keypoints import detect_peaks
from tiepoints.structs import Keypoints
from tiepoints.training.validation import matching_checks, matching_score

STILL = dataclasses.replace(
    PRESETS["patches"],
    size=160,
    scale=(1.0, 1.0),
    rotation=0,
    skew=0,
    perspective=0,
    jitter=0,
    color=0,
    gamma=0,
    blur=0,
    noise=0,
    jpeg=0,
)
EXACT = PatchSettings(per_view=24, position_sigma=0, scale_sigma=0, symmetric=0)


def brightest(view):
    """A detector for the tests: local maxima of brightness."""
    return detect_peaks(view, 100, window=7, border=6)[0][0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    paths = []
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 52, 3), dtype=np.uint8))
        coarse.resize((260, 200), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        paths.append(folder / f"{i}.png")
    return paths


def test_items_are_patches_and_depend_only_on_seed_and_index(photos):
    views = dataclasses.replace(PRESETS["patches"], size=160)

    def make(seed):
        return PatchPairs(
            photos, brightest, PatchSettings(per_view=16), views=views, seed=seed, length=6
        )

    first, again, other = make(0), make(0), make(1)
    for k in (3, 0):
        a, b = first[k], again[k]
        assert a["anchor"].shape == a["positive"].shape == (16, 1, 32, 32)
        assert a["anchor"].dtype == torch.float32
        assert a["anchor"].min() >= 0
        assert a["anchor"].max() <= 1
        assert torch.equal(a["anchor"], b["anchor"])
        assert torch.equal(a["positive"], b["positive"])
    assert not torch.equal(first[0]["anchor"], other[0]["anchor"])
    with pytest.raises(IndexError):
        first[6]


def test_identical_views_have_equal_patches(photos):
    item = PatchPairs(photos, brightest, EXACT, views=STILL, length=2)[1]
    torch.testing.assert_close(item["anchor"], item["positive"], atol=0.02, rtol=0)
    moved = PatchPairs(
        photos, brightest, dataclasses.replace(EXACT, position_sigma=2.0), views=STILL, length=2
    )[1]
    assert (moved["anchor"] - moved["positive"]).abs().mean() > 0.02


def test_patches_follow_a_rotation_and_a_change_of_size(photos):
    """Rotation by 90 degrees and half the size: the positive is the rotated anchor, cut at half the
    scale.
    """
    rotated = dataclasses.replace(STILL, rotation=90, rotation_power=0.0, scale=(0.999, 1.0))
    item = PatchPairs(photos, brightest, EXACT, views=rotated, length=3)[0]
    errors = [
        (torch.rot90(item["anchor"], k, dims=(-2, -1)) - item["positive"]).abs().mean()
        for k in (0, 1, 3)
    ]
    assert min(errors[1:]) < 0.02 < errors[0]
    small = dataclasses.replace(STILL, scale=(0.5, 0.5))
    item = PatchPairs(
        photos, brightest, dataclasses.replace(EXACT, scale=(2.0, 2.0)), views=small, length=3
    )[0]
    inner = (..., slice(8, -8), slice(8, -8))
    assert (item["anchor"][inner] - item["positive"][inner]).abs().mean() < 0.05


def test_local_scale_equals_that_of_the_jacobian(photos):
    H = torch.tensor([[1.2, 0.1, 3], [-0.2, 0.9, 5], [4e-4, -3e-4, 1]], dtype=torch.float64)
    at = torch.tensor([[40.0, 70], [10, 20]], dtype=torch.float64)
    for point, scale in zip(at, local_scale(at, H), strict=True):
        J = torch.autograd.functional.jacobian(lambda p: warp_points(p[None], H)[0], point)
        torch.testing.assert_close(scale, torch.linalg.det(J).abs().sqrt())


def test_rotations_are_the_same_for_both_patches():
    rng = np.random.default_rng(0)
    a = torch.rand(1, 8, 8)
    seen = set()
    for _ in range(60):
        x, y = rotate_pair(a, a.clone(), rng, 0.7)
        assert torch.equal(x, y)
        seen.add(tuple(x.flatten().tolist()))
    assert len(seen) == 8  # four rotations, mirrored or not
    assert torch.equal(rotate_pair(a, a, rng, 0.0)[0], a)


def test_photographs_without_contrast_raise(photos, tmp_path):
    paths = []
    for i in range(2):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (200, 200), (90, 90, 90)).save(path)
        paths.append(path)
    with pytest.raises(DataError, match="texture"):
        PatchPairs(paths, brightest, length=1)[0]
    with pytest.raises(DataError, match="too small or too smooth"):
        PatchPairs(
            photos, brightest, dataclasses.replace(EXACT, min_contrast=0.9), views=STILL, length=1
        )[0]


def test_matching_score_distinguishes_correct_and_incorrect_matches(photos):
    def points(image):
        xy = brightest(image)
        return Keypoints(xy, torch.ones(len(xy)), torch.zeros(len(xy)), torch.ones(len(xy)))

    checks = matching_checks(photos, points, views=STILL, seed=1, count=3)

    def pixels(patches):
        return torch.nn.functional.normalize((patches - patches.mean()).flatten(1), dim=1)

    assert matching_score(pixels, checks) > 0.95
    assert (
        matching_score(
            lambda p: torch.nn.functional.normalize(torch.rand(len(p), 8), dim=1), checks
        )
        < 0.3
    )
    assert matching_score(pixels, []) == 0
