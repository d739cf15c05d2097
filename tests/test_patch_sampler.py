"""Patch pairs drawn on the training device: positions, shapes, light, and the training on them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import call, texture, write_photos
from tiepoints.datasets import device_images, patch_sampler
from tiepoints.datasets.image_store import ImageStore
from tiepoints.datasets.patch_changes import (
    blur,
    cast_shadows,
    change_patches,
    compress,
    mixed_gray,
    occlude,
    tone_curves,
)
from tiepoints.datasets.patch_pairs import PatchSettings
from tiepoints.datasets.patch_sampler import PatchSampler
from tiepoints.datasets.synthetic import PairSettings, list_photos
from tiepoints.errors import DataError
from tiepoints.training.loop import RunOptions
from tiepoints.training.recipes import TrainData, train
from tiepoints.weights import load

CPU = torch.device("cpu")
EXACT = PatchSettings(per_view=24, position_sigma=0.0, scale_sigma=0.0)
PLAIN = PairSettings(rotation=0.0, skew=0.0, color=0.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return list_photos(write_photos(tmp_path_factory.mktemp("photos")))


def grid(image):
    axes = [torch.arange(20.0, side - 20, 9) for side in (image.shape[-1], image.shape[-2])]
    return torch.cartesian_prod(*axes)


def generator():
    return torch.Generator().manual_seed(0)


def random_patches(count=12, channels=None):
    shape = (count, 32, 32) if channels is None else (count, channels, 32, 32)
    return torch.rand(shape, generator=generator())


def correlations(item):
    """Of corresponding patches, and of each with the next one's counterpart."""
    a, b = (item[key].flatten(1) for key in ("anchor", "positive"))
    a, b = ((x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True) for x in (a, b))
    return (a * b).mean(dim=1), (a * b.roll(1, 0)).mean(dim=1)


def test_samples_have_the_values_at_their_positions():
    y, x = np.mgrid[:90, :120]
    ramp = np.stack([2 * x, y, 0 * x], axis=-1).astype(np.uint8)
    store = ImageStore([texture_array(1), ramp])
    xy = torch.tensor([[3.5, 7.25], [100.0, 60.5], [-9.0, 400.0]])
    for step, tolerance in ((1.0, 1e-4), (2.0, 1.0), (3.9, 2.0)):  # reduced copies are smoothed
        found = 255 * store.sample(torch.tensor([1]), xy[None, None], torch.tensor([step]))
        expected = torch.tensor([[7.0, 200.0, 0.0], [7.25, 60.5, 89.0], [0.0, 0.0, 0.0]])
        assert torch.allclose(found[0, :, 0], expected, atol=tolerance)
    assert store.size.tolist() == [[120, 90], [120, 90]]


def texture_array(seed, size=(120, 90)):
    return np.asarray(texture(seed, size))


def test_without_changes_both_patches_are_equal(photos, monkeypatch):
    monkeypatch.setattr(patch_sampler, "AFFINE_JITTER", 0.0)
    monkeypatch.setattr(patch_sampler, "CURVATURE", 0.0)
    monkeypatch.setattr(patch_sampler, "RESOLUTION", (1.0, 1.0))
    item = PatchSampler(photos, [], grid, CPU, settings=EXACT, warps=PLAIN, views=3)[0]
    assert item["anchor"].shape[0] > 48
    assert item["anchor"].shape[1:] == (1, 32, 32)
    assert torch.allclose(item["anchor"], item["positive"], atol=1 / 254)


def test_surroundings_change_like_the_patch(photos, monkeypatch):
    for name, value in (("AFFINE_JITTER", 0.0), ("CURVATURE", 0.0), ("RESOLUTION", (1.0, 1.0))):
        monkeypatch.setattr(patch_sampler, name, value)
    settings = replace(EXACT, reach=(1.0, 3.0), symmetric=1.0)
    item = PatchSampler(photos, [], grid, CPU, settings=settings, warps=PLAIN, views=3)[0]
    assert item["anchor"].shape[1:] == (2, 32, 32)
    assert torch.allclose(item["anchor"], item["positive"], atol=1 / 254)
    # the third of the side around the center shows what the patch shows
    near, wide = item["anchor"].unbind(dim=1)
    center = F.interpolate(wide[:, None, ::2, ::2][..., 5:11, 5:11], size=8, mode="bilinear")
    small = F.avg_pool2d(near[:, None], 4)
    both = torch.stack([center, small]).flatten(2)
    center, small = both - both.mean(dim=2, keepdim=True)
    assert F.cosine_similarity(center, small).median() > 0.6
    assert F.cosine_similarity(center, small.roll(1, 0)).median().abs() < 0.2


def test_warped_patches_show_the_same_location(photos, monkeypatch):
    monkeypatch.setattr(patch_sampler, "CURVATURE", 0.02)
    warps = PairSettings(rotation=10.0, skew=0.1, color=0.0)
    sampler = PatchSampler(photos, [], grid, CPU, settings=EXACT, warps=warps, views=3, length=5)
    for item in sampler:
        same, other = correlations(item)
        assert same.median() > 0.8
        assert other.median() < 0.3
        assert item["anchor"].min() >= 0
        assert item["positive"].max() <= 1


def test_tilted_patches_keep_the_vertical(photos, monkeypatch):
    for name in ("AFFINE_JITTER", "CURVATURE"):
        monkeypatch.setattr(patch_sampler, name, 0.0)
    warps = PairSettings(rotation=0.0, skew=0.0, color=0.0, tilt=4.0)
    sampler = PatchSampler(photos, [], grid, CPU, settings=EXACT, warps=warps, views=6)
    draw = sampler._warped(6, np.random.default_rng(0), generator())
    _, matrix = draw.matrix
    assert torch.allclose(matrix[:, 0, 1], torch.zeros(len(matrix)), atol=1e-4)
    singular = torch.linalg.svdvals(matrix)
    ratio = singular[:, 0] / singular[:, 1]
    assert ratio.max() <= 4.01
    assert ratio.max() > 1.5


def test_a_batch_depends_only_on_seed_and_index(photos):
    one, two = (PatchSampler(photos, [], grid, CPU, views=2, seed=4, length=9) for _ in range(2))
    assert torch.equal(one[5]["positive"], two.with_length(6)[5]["positive"])
    assert not torch.equal(one[5]["anchor"][:9], one[6]["anchor"][:9])
    with pytest.raises(IndexError, match="batch 6 of 6"):
        two.with_length(6)[6]


def test_neighbors_and_flat_patches_are_dropped(photos):
    def crowded(image):
        return torch.full((500, 2), 150.0) + torch.rand(500, 2)

    settings = PatchSettings(per_view=24, random_part=0.0)
    with pytest.raises(DataError, match="too few locations"):
        PatchSampler(photos, [], crowded, CPU, settings=settings, views=1)[0]


def test_unreadable_photographs_are_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="can be read"):
        PatchSampler([tmp_path / "a.png"], [], grid, CPU)


def test_images_that_do_not_fit_are_an_error(photos, monkeypatch):
    monkeypatch.setattr(device_images, "available_memory", lambda: 3e6)
    with pytest.raises(DataError, match=r"4 images need 0\.0 GB .* do not draw on the device"):
        PatchSampler(photos, [], grid, CPU)


def test_changes_of_light():
    patches = random_patches()
    group = torch.arange(12) // 6
    assert torch.allclose(blur(patches, torch.full((12,), 1e-3)), patches, atol=1e-5)
    assert blur(patches, torch.full((12,), 2.0)).std() < 0.3 * patches.std()
    for changed in (
        tone_curves(patches, group, 2, generator()),
        cast_shadows(patches, generator()),
    ):
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert (changed - patches).abs().mean() > 0.01
    step = torch.ones(12)
    errors = [
        (compress(patches, torch.full((12,), q), step, generator()) - patches).abs().mean()
        for q in (10.0, 50.0, 99.0)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    nothing = PairSettings(color=0.0)
    unchanged = change_patches(patches, group, step, [nothing, nothing], generator())
    assert torch.allclose(unchanged, patches, atol=1 / 254)
    dark = PairSettings(dark=1.0)
    changed = change_patches(patches, group, step, [nothing, dark], generator())
    assert torch.equal(changed[:6], unchanged[:6])
    assert changed[6:].mean() < 0.6 * patches[6:].mean()


def test_channels_are_mixed_only_in_chosen_views():
    colors, group = random_patches(channels=3), torch.arange(12) // 6
    gray = mixed_gray(colors, group, torch.tensor([0.0, 1.0]), generator())
    usual = (colors * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1)
    assert torch.allclose(gray[:6], usual[:6], atol=1e-5)
    assert (gray[6:] - usual[6:]).abs().max() > 0.02


def test_shadows_and_occlusions_of_surroundings_are_at_the_same_places():
    patches = (torch.arange(40) / 40)[:, None, None].expand(40, 32, 32)
    near, wide = (cast_shadows(patches, generator(), reach) for reach in (1.0, 3.0))
    # sample j of three times the side is at sample 3 j - 31 of the side
    torch.testing.assert_close(near[:, 2:30:3, 2:30:3], wide[:, 11:21, 11:21])
    assert near.flatten(1).std(dim=1).max() > 0.1
    group, always = torch.zeros(40, dtype=torch.long), torch.ones(1)
    near, wide = (
        occlude(patches[:, None], group, always, generator(), reach)[:, 0] != patches
        for reach in (1.0, 3.0)
    )
    same = near[:, 2:30:3, 2:30:3] == wide[:, 11:21, 11:21]
    assert same.float().mean() > 0.98  # their edges are a sample wide
    assert wide.float().mean() > 1.5 * near.float().mean() > 0


def test_occlusion_leaves_the_center():
    colors, group = random_patches(200, channels=3), torch.zeros(200, dtype=torch.long)
    changed = occlude(colors, group, torch.ones(1), generator())
    different = (changed != colors).any(dim=1)  # (N,P,P)
    share = different.flatten(1).any(dim=1).float().mean()
    assert 0.2 < share < 0.5
    assert not different[:, 14:18, 14:18].any()
    assert torch.equal(occlude(colors, group, torch.zeros(1), generator()), colors)


def test_photographs_of_a_batch_differ(photos):
    sampler = PatchSampler(
        photos, [], grid, torch.device("cpu"), views=len(photos), settings=EXACT, length=1
    )
    assert sorted(sampler._photos(len(photos), generator()).tolist()) == list(range(len(photos)))
    counts = torch.bincount(sampler._photos(2 * len(photos) + 1, generator()))
    assert set(counts.tolist()) == {2, 3}
    assert len(sampler._photos(0, generator())) == 0


def test_the_seed_determines_the_start_of_the_context(tmp_path, photos):
    found = []
    for number in (0, 1):
        torch.manual_seed(number)
        output = tmp_path / f"{number}.safetensors"
        train(
            "hardnet-context",
            TrainData(images=photos[0].parent),
            output,
            run=RunOptions(device="cpu", progress=False),
            network={"on_device": True},
            steps=1,
            batch_size=2,
            validate_every=1,
        )
        found.append(load(output).state_dict())
    one, two = found
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["hardnet", "hardnet-context", "affnet"])
def test_training_draws_on_the_device(tmp_path, photos, name):
    output = tmp_path / "mine.safetensors"
    data = TrainData(images=photos[0].parent)
    result = train(
        name,
        data,
        output,
        run=RunOptions(device="cpu", progress=False),
        network={"on_device": True},
        steps=2,
        batch_size=2,
        validate_every=2,
    )
    assert result.steps == 2
    assert output.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hardnet", "--num-training-data", "5"), "not both"),
        (("sobelnet",), "on_device is an option of hardnet"),
        (("hardnet", "--devices", "2"), "drawn on one device"),
    ],
)
def test_unsuitable_options(tmp_path, photos, arguments, message):
    code, _, error = call(
        *("train", *arguments, "--on-device", "--images", photos[0].parent),
        *("--output", tmp_path / "mine.safetensors", "--steps", "1"),
    )
    assert code == 2
    assert message in " ".join(error.split())
