"""Images of all types are mapped to [0,1] by the range of their type; others raise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tiepoints.errors import DataError
from tiepoints.image import load_image

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (12, 17), dtype=np.uint8)
COLOR = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (12, 17), dtype=np.uint16)
LUMA = np.array([0.299, 0.587, 0.114])


def values(source) -> np.ndarray:
    tensor = load_image(source)
    assert tensor.dtype == torch.float32
    assert tensor.ndim == 4
    assert tensor.shape[:2] == (1, 1)
    assert 0 <= tensor.min() <= tensor.max() <= 1
    return tensor[0, 0].numpy()


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (GRAY, GRAY / 255),
        (GRAY[..., None], GRAY / 255),
        (GRAY[:, ::-1], GRAY[:, ::-1] / 255),
        (DEEP, DEEP / 65535),
        (DEEP.astype(np.uint32) * 65537, DEEP / 65535),
        (GRAY / 255, GRAY / 255),
        ((GRAY / 255).astype(np.float32), GRAY / 255),
        (GRAY > 99, GRAY > 99),
        (COLOR, COLOR @ LUMA / 255),
        (np.dstack([COLOR, GRAY]), COLOR @ LUMA / 255),
        (torch.from_numpy(GRAY), GRAY / 255),
        (torch.from_numpy(GRAY)[None], GRAY / 255),
        (torch.from_numpy(GRAY)[None, None], GRAY / 255),
        (torch.from_numpy(COLOR).permute(2, 0, 1), COLOR @ LUMA / 255),
        (torch.from_numpy(GRAY) > 99, GRAY > 99),
        (torch.from_numpy(GRAY / 255), GRAY / 255),
        (Image.fromarray(GRAY), GRAY / 255),
        (Image.fromarray(DEEP), DEEP / 65535),
        (Image.fromarray(COLOR), COLOR @ LUMA / 255),
        (Image.fromarray(np.dstack([COLOR, GRAY])), COLOR @ LUMA / 255),
        (Image.fromarray((GRAY / 255).astype(np.float32)), GRAY / 255),
        (Image.fromarray(GRAY > 99), GRAY > 99),
    ],
)
def test_range_by_type(source, wanted):
    np.testing.assert_allclose(values(source), wanted, atol=2e-6)


def test_half_precision():
    np.testing.assert_allclose(values((GRAY / 255).astype(np.float16)), GRAY / 255, atol=5e-4)


def test_range_does_not_depend_on_the_maximum_of_an_image():
    assert load_image(np.full((4, 5), 50, np.uint8)).unique().item() == pytest.approx(50 / 255)
    assert load_image(np.full((4, 5), 50, np.uint16)).unique().item() == pytest.approx(50 / 65535)
    assert load_image(np.ones((4, 5), np.uint8)).unique().item() == pytest.approx(1 / 255)


def test_source_is_not_modified():
    for source in (GRAY.copy(), (GRAY / 255).astype(np.float32)):
        before = source.copy()
        load_image(source).add_(5)
        assert np.array_equal(source, before)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp"])
def test_gray_and_color_files(tmp_path, name):
    path = tmp_path / name
    if name != "a.webp":
        Image.fromarray(GRAY).save(path)
        np.testing.assert_allclose(values(path), GRAY / 255, atol=1e-6)
    Image.fromarray(COLOR).save(path, lossless=True) if name == "a.webp" else Image.fromarray(
        COLOR
    ).save(path)
    np.testing.assert_allclose(values(str(path)), COLOR @ LUMA / 255, atol=1e-5)


def test_16_bit_palette_alpha_and_1_bit_files(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(DEEP).save(path)
    np.testing.assert_allclose(values(path), DEEP / 65535, atol=1e-6)
    palette = Image.fromarray(COLOR).quantize(16)
    palette.save(path)
    assert Image.open(path).mode == "P"
    np.testing.assert_allclose(
        values(path), np.asarray(palette.convert("RGB")) @ LUMA / 255, atol=1e-5
    )
    Image.fromarray(np.dstack([COLOR, GRAY])).save(path)
    np.testing.assert_allclose(values(path), COLOR @ LUMA / 255, atol=1e-5)
    Image.fromarray(np.dstack([GRAY, 255 - GRAY])).save(path)
    np.testing.assert_allclose(values(path), GRAY / 255, atol=1e-6)
    Image.fromarray(GRAY > 99).save(path)
    np.testing.assert_array_equal(values(path), GRAY > 99)
    Image.fromarray(DEEP).save(tmp_path / "a.tif")
    np.testing.assert_allclose(values(tmp_path / "a.tif"), DEEP / 65535, atol=1e-6)


def test_jpeg_orientation_is_ignored(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GRAY).save(path, exif=exif)
    assert values(path).shape == GRAY.shape


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        load_image(tmp_path / "nothing.png")


@pytest.mark.parametrize("kind", ["empty", "folder", "text", "cut"])
def test_unreadable_files(tmp_path, kind):
    path = tmp_path / "photo.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "cut":
        Image.fromarray(RNG.integers(0, 256, (200, 200), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    else:
        path.write_text("" if kind == "empty" else "no image at all\n" * 20)
    with pytest.raises(DataError, match=r"photo\.jpg"):
        load_image(path)


def test_too_large_files_raise_before_decoding(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(GRAY).save(path)
    with pytest.raises(DataError, match="17 x 12"):
        load_image(path, max_pixels=203)
    assert load_image(path, max_pixels=204).shape == (1, 1, 12, 17)


@pytest.mark.parametrize(
    "source",
    [
        np.full((4, 5), np.nan),
        np.array([[0.5, np.nan]]),
        np.full((4, 5), np.inf),
        np.full((4, 5), 1.5),
        np.full((4, 5), -0.1),
        GRAY.astype(np.float32),
        GRAY.astype(np.int64),
        GRAY.astype(np.int32),
        GRAY.astype(np.complex64),
        np.array([["a", "b"]]),
        np.zeros((0, 5), np.uint8),
        np.zeros((5,), np.uint8),
        np.zeros((4, 5, 2), np.uint8),
        np.zeros((3, 4, 5, 3), np.uint8),
        torch.zeros(2, 1, 4, 5),
        torch.zeros(2, 4, 5),
        torch.zeros(4),
        torch.zeros(1, 0, 5),
        torch.zeros(4, 5, dtype=torch.int64),
        torch.full((4, 5), float("nan")),
        None,
        7,
        [[0.0, 1.0]],
    ],
)
def test_invalid_values_raise(source):
    with pytest.raises(ValueError, match="image"):
        load_image(source)
