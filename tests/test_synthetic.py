"""Synthetic pairs: correct homographies, reproducibility, unusable photographs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tiepoints.datasets.synthetic import (
    PRESETS,
    PairDataset,
    PairSettings,
    cast_shadow,
    degrade,
    distort_color,
    list_photos,
    read_photo,
    split_photos,
    tone_curve,
    usable_photos,
)
from tiepoints.errors import DataError
from tiepoints.filters import gaussian_blur
from tiepoints.geometry import warp_image
from tiepoints.names import PAIR_PRESETS

SIZE = 64
PLAIN = PairSettings(size=SIZE, scale=(0.7, 1.5), rotation=60, skew=0.3, color=0.0)


def texture(
    height: int = 240, width: int = 320, seed: int = 0, sigma: float = 3.0, channels: int = 1
) -> np.ndarray:
    """Blurred noise that fills the range, (H,W,channels) uint8."""
    noise = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(seed))
    smooth = gaussian_blur(noise, sigma)
    values = (128 + 50 * smooth / smooth.std()).clamp(0, 255).round()
    return values[0].permute(1, 2, 0).numpy().astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        Image.fromarray(texture(seed=i)[..., 0]).save(folder / f"{i}.png")
    Image.fromarray(texture(seed=3, channels=3)).save(folder / "3.jpg", quality=95)
    return list_photos(folder)


def off_by(pair, H: np.ndarray) -> float:
    """Mean difference between image b and image a warped by ``H``, in gray levels, where both show
    the photograph.
    """
    a = torch.from_numpy(pair.image_a).float()[None, None]
    stacked = torch.cat([a, torch.ones_like(a)], dim=1)
    moved, covered = warp_image(stacked, torch.from_numpy(H)[None])[0]
    sure = (covered > 0.999) & torch.from_numpy(pair.mask_b)
    assert sure.sum() > 50
    return (moved - torch.from_numpy(pair.image_b).float())[sure].abs().mean().item()


@pytest.mark.parametrize(
    "settings",
    [
        PLAIN,
        dataclasses.replace(PLAIN, scale=(1.0, 1.0), skew=0.0, rotation=180),
        dataclasses.replace(PLAIN, perspective=0.25, jitter=10, mirror=0.5, min_overlap=0.2),
        dataclasses.replace(PLAIN, scale=(0.5, 0.6)),
        dataclasses.replace(PLAIN, scale=(1.8, 2.0), skew=0.0),
    ],
    ids=["plain", "rotation", "all", "smaller", "larger"],
)
def test_homography_maps_between_the_views(photos, settings):
    data = PairDataset(photos, settings, seed=1, length=8)
    for i in range(8):
        pair = data.pair(i)
        error = off_by(pair, pair.H_ab)
        assert error < 5
        for dx, dy in ((0.7, 0), (-0.7, 0), (0, 0.7), (0, -0.7)):
            moved = np.array([[1, 0, dx], [0, 1, dy], [0, 0, 1.0]]) @ pair.H_ab
            assert off_by(pair, moved) > error


def test_every_preset_is_named():
    assert tuple(PRESETS) == PAIR_PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets(photos, name):
    data = PairDataset(photos, dataclasses.replace(PRESETS[name], size=SIZE), seed=2, length=4)
    for item in (data[i] for i in range(4)):
        assert item["image_a"].shape == item["image_b"].shape == (1, SIZE, SIZE)
        assert item["image_a"].dtype == torch.float32
        assert 0 <= item["image_a"].min() < item["image_a"].max() <= 1
        assert item["H_ab"].dtype == torch.float64
        assert item["H_ab"][2, 2] == 1
        for key in ("mask_a", "mask_b"):
            assert set(item[key].unique().tolist()) <= {0, 1}
            assert item[key].mean() >= PRESETS[name].min_overlap


def items(photos, seed: int, workers: int) -> list[dict[str, torch.Tensor]]:
    settings = dataclasses.replace(PRESETS["default"], size=SIZE)
    loader = DataLoader(
        PairDataset(photos, settings, seed=seed, length=6), batch_size=2, num_workers=workers
    )
    return list(loader)


def test_pairs_are_reproducible_with_any_number_of_workers(photos):
    alone, shared, other = items(photos, 5, 0), items(photos, 5, 2), items(photos, 6, 0)
    for one, two, three in zip(alone, shared, other, strict=True):
        for key in one:
            assert torch.equal(one[key], two[key])
        assert not torch.equal(one["image_a"], three["image_a"])
        assert not torch.equal(one["H_ab"], three["H_ab"])


def test_pairs_do_not_depend_on_earlier_pairs(photos):
    first, second = (
        PairDataset(photos, PLAIN, seed=5, length=6, cache_bytes=room) for room in (10**9, 0)
    )
    ahead = [first.pair(i) for i in range(6)]
    for i in (5, 2, 0):
        pair = second.pair(i)
        assert np.array_equal(pair.image_b, ahead[i].image_b)
        assert pair.source == ahead[i].source


def test_all_photos_are_used(photos):
    data = PairDataset(photos, PLAIN, seed=0, length=4)
    assert {data.pair(i).source for i in range(4)} == {str(p) for p in photos}


def test_masks_exclude_areas_outside_the_other_view(photos):
    settings = dataclasses.replace(PLAIN, scale=(0.5, 0.5), rotation=0, skew=0)
    pair = PairDataset(photos, settings, seed=0, length=1).pair(0)
    assert pair.mask_a.dtype == np.bool_
    assert pair.mask_a.mean() > 0.95  # b contains all of a
    assert pair.mask_b.mean() == pytest.approx(0.25, abs=0.05)  # a contains a quarter of b
    inside = pair.mask_b[18:46, 18:46]
    assert inside.all()
    assert not pair.mask_b[:14].any()


def test_windows_larger_than_the_photo_are_masked(tmp_path):
    Image.fromarray(texture(70, 80, sigma=2)[..., 0]).save(tmp_path / "a.png")
    settings = PairSettings(size=100, scale=(1.0, 1.0), rotation=0, skew=0, color=0)
    pair = PairDataset([tmp_path / "a.png"], settings, length=1).pair(0)
    assert pair.mask_a.mean() == pytest.approx(0.56, abs=0.02)


def signs(photos, mirror: float) -> list[float]:
    settings = dataclasses.replace(PLAIN, mirror=mirror)
    data = PairDataset(photos, settings, seed=3, length=16)
    return [float(np.sign(np.linalg.det(data.pair(i).H_ab[:2, :2]))) for i in range(16)]


def test_mirror_gives_negative_determinants(photos):
    assert set(signs(photos, 0.0)) == {1.0}
    assert set(signs(photos, 0.5)) == {1.0, -1.0}


def test_rekd_is_a_rotation_about_the_center(photos):
    data = PairDataset(photos, dataclasses.replace(PRESETS["rekd"], size=SIZE), seed=0, length=12)
    angles = []
    for i in range(12):
        H = data.pair(i).H_ab
        np.testing.assert_allclose(H[:2, :2] @ H[:2, :2].T, np.eye(2), atol=1e-9)
        assert np.linalg.det(H[:2, :2]) > 0
        np.testing.assert_allclose(H[2], [0, 0, 1], atol=1e-12)
        center = np.array([(SIZE - 1) / 2] * 2 + [1])
        np.testing.assert_allclose(H @ center, center, atol=1e-9)
        angles.append(np.degrees(np.arctan2(H[1, 0], H[0, 0])))
    assert max(angles) > 90
    assert min(angles) < -90


@pytest.mark.parametrize(
    "change", ["color", "gamma", "tone", "shadow", "blur", "dark", "noise", "jpeg"]
)
def test_photometric_changes(photos, change):
    changed = dataclasses.replace(PLAIN, **{change: 1.0})
    plain, other = (PairDataset(photos, s, seed=4, length=1).pair(0) for s in (PLAIN, changed))
    assert np.array_equal(plain.H_ab, other.H_ab)
    assert not np.array_equal(plain.image_b, other.image_b)
    assert np.array_equal(plain.image_a, other.image_a) == (change == "color")


def test_changes_keep_shape_and_type():
    rng = np.random.default_rng(0)
    every = PairSettings(gamma=1, tone=1, shadow=1, blur=1, dark=1, noise=1, jpeg=1)
    for image in (
        texture(40, 50, channels=3),
        np.zeros((40, 50, 3), np.uint8),
        np.full((40, 50, 3), 255, np.uint8),
    ):
        assert distort_color(image, rng, 1.0).shape == image.shape
        assert distort_color(image, rng, 1.0).dtype == np.uint8
        assert np.array_equal(distort_color(image, rng, 0.0), image)
        assert degrade(image[..., 0], rng, every).shape == (40, 50)
        assert degrade(image[..., 0], rng, every).dtype == np.uint8
        assert np.array_equal(degrade(image[..., 0], rng, PairSettings()), image[..., 0])


def test_disabled_changes_use_no_random_numbers():
    image = texture(40, 50)[..., 0] if texture(40, 50).ndim == 3 else texture(40, 50)
    gamma = PairSettings(gamma=1)
    never = dataclasses.replace(gamma, tone=1e-12, shadow=1e-12, dark=1e-12)
    one, two = (
        degrade(image, np.random.default_rng(1), settings)
        for settings in (gamma, dataclasses.replace(gamma, tone=0.0))
    )
    assert np.array_equal(one, two)
    drawn = [np.random.default_rng(1) for _ in range(2)]
    degrade(image, drawn[0], gamma)
    degrade(image, drawn[1], never)
    # three more random numbers: each uses one state of the generator
    drawn[0].random(3)
    assert drawn[0].random() == drawn[1].random()


def test_noise_has_the_standard_deviations_of_its_settings():
    gray = np.full((100, 100), 128, np.uint8)
    for power, middle in ((1.0, 13), (3.0, 7.25)):  # mean of 1 + 24 u^power
        settings = PairSettings(noise=1, noise_sigma=25, noise_power=power)
        deviations = [
            float(degrade(gray, np.random.default_rng(i), settings).std()) for i in range(300)
        ]
        assert min(deviations) > 0.9
        assert max(deviations) < 26
        assert np.mean(deviations) == pytest.approx(middle, rel=0.12)


def test_dark_images_shadows_and_tones_change_only_intensities():
    gray = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    changes = []
    for i in range(20):
        dark = degrade(gray, np.random.default_rng(i), PairSettings(dark=1))
        assert 0.1 < dark.max() / gray.max() < 0.55
        shadow = cast_shadow(gray, np.random.default_rng(i)).astype(int) - gray
        assert (shadow <= 0).all() or (shadow >= 0).all()
        changes.append(np.abs(shadow).max())
    assert np.median(changes) > 20
    curves = [tone_curve(np.random.default_rng(i)).astype(int) for i in range(400)]
    falling = np.mean([(np.diff(curve) < 0).any() for curve in curves])
    assert 0.05 < falling < 0.2
    assert all(
        curve.shape == (256,) and curve.min() >= 0 and curve.max() <= 255 for curve in curves
    )


# --- unusable photographs


def test_textureless_photos_raise(tmp_path):
    gradient = np.linspace(0, 255, 200).astype(np.uint8)[None].repeat(150, axis=0)
    for name, image in (("flat", np.full((150, 200), 90, np.uint8)), ("gradient", gradient)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        with pytest.raises(DataError, match="texture"):
            PairDataset([tmp_path / f"{name}.png"], PLAIN, length=1).pair(0)


def test_damaged_image_data_is_skipped(tmp_path, photos):
    damaged = tmp_path / "damaged.jpg"
    Image.fromarray(texture(sigma=0.7)[..., 0]).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:3000])
    good, refused = usable_photos([damaged, photos[0]])
    assert (len(good), len(refused)) == (2, 0)  # the header is valid
    with pytest.raises(DataError, match=r"damaged\.jpg"):
        read_photo(damaged)
    data = PairDataset(good, PLAIN, length=4)
    assert {data.pair(i).source for i in range(4)} == {str(photos[0])}
    with pytest.raises(DataError, match="unreadable"):
        PairDataset([damaged], PLAIN, length=1).pair(0)


def test_small_and_unreadable_files_are_reported(tmp_path, photos):
    Image.fromarray(texture(63, 200)[..., 0]).save(tmp_path / "tiny.png")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    good, refused = usable_photos([*list_photos(tmp_path), photos[0]])
    assert good == [photos[0]]
    assert len(refused) == 3
    assert "200 x 63" in next(line for line in refused if "tiny.png" in line)


def test_list_photos(tmp_path):
    for name in ("b.png", "sub/a.JPG", ".hidden/c.png", "sub/.d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(texture(64, 64)[..., 0]).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    assert [p.name for p in list_photos(tmp_path)] == ["b.png", "a.JPG"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_photos(tmp_path / "nowhere")


@pytest.mark.parametrize("count", [2, 3, 10, 57])
def test_split_is_disjoint_and_stable(count):
    paths = [Path(f"{i:03}.jpg") for i in range(count)]
    training, held_out = split_photos(paths)
    assert not set(training) & set(held_out)
    assert set(training) | set(held_out) == set(paths)
    assert len(held_out) == max(1, round(0.1 * count))
    assert split_photos(paths[::-1]) == (training, held_out)
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    assert split_photos(paths) == (training, held_out)


@pytest.mark.parametrize("count", [0, 1])
def test_one_photo_raises(count):
    with pytest.raises(DataError, match="at least two"):
        split_photos([Path("a.jpg")] * count)


def test_no_photos_raise():
    with pytest.raises(DataError, match="no photographs"):
        PairDataset([], PLAIN, length=1)


def test_16_bit_photos_keep_their_range(tmp_path):
    eight = texture(100, 120, sigma=2)[..., 0]
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray((eight / 255).astype(np.float32)).save(tmp_path / "float.tif")
    for name in ("deep.png", "float.tif"):
        photo = read_photo(tmp_path / name)
        assert photo.shape == (100, 120, 3)
        assert photo.dtype == np.uint8
        assert np.abs(photo[..., 0].astype(int) - eight).max() <= 1
    PairDataset([tmp_path / "deep.png"], PLAIN, length=1).pair(0)


def test_large_photos_are_reduced(tmp_path):
    Image.fromarray(texture(100, 400)[..., 0]).save(tmp_path / "a.jpg")
    assert read_photo(tmp_path / "a.jpg", 200).shape == (50, 200, 3)
    assert read_photo(tmp_path / "a.jpg").shape == (100, 400, 3)
