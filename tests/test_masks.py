"""Pixels without content: keypoints neither on them nor near them, and none of their edges."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tiepoints.cli import app
from tiepoints.errors import DataError
from tiepoints.extract import ExtractOptions, build
from tiepoints.files import collect
from tiepoints.formats.npy import read_features
from tiepoints.image import Notices, Reading, ReadOptions, read_image, read_mask
from tiepoints.jobs.match import MatchOptions, match_two
from tiepoints.masks import MARGIN, connected_to_border, exclude, fill, grow

RNG = np.random.default_rng(0)
CASES = Path(__file__).parents[2] / "shared" / "cases"


def call(*arguments) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def texture(width: int = 300, height: int = 220, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(20, 236, (height // 5, width // 5, 3))
    image = Image.fromarray(noise.astype(np.uint8))
    return image.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 8, 40])
def test_grow_is_a_dilation_by_a_square(radius):
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = RNG.random((37, 29)) < 0.02
    wanted = ndimage.maximum_filter(mask, 2 * radius + 1, mode="constant")
    np.testing.assert_array_equal(grow(mask, radius), wanted)


def test_connected_to_border():
    ndimage = pytest.importorskip("scipy.ndimage")
    for density in (0.3, 0.6, 0.7):
        mask = RNG.random((300, 41)) < density
        labels = ndimage.label(mask)[0]
        border = {*labels[[0, -1]].ravel(), *labels[:, [0, -1]].ravel()} - {0}
        np.testing.assert_array_equal(connected_to_border(mask), np.isin(labels, list(border)))


@pytest.mark.parametrize("size", [(600, 7), (7, 600), (1, 1), (513, 300)])
def test_fill_continues_smoothly(size):
    rows, columns = np.mgrid[: size[0], : size[1]]
    ramp = ((rows + columns) / 2000).astype(np.float32)
    invalid = np.zeros(size, bool)
    invalid[size[0] // 3 : size[0] // 2, :] = True
    pixels = np.where(invalid, 9, ramp).astype(np.float32)
    fill(pixels, invalid)
    np.testing.assert_array_equal(pixels[~invalid], ramp[~invalid])
    if not invalid.all():
        np.testing.assert_allclose(pixels, ramp, atol=0.06)


def test_specks_are_filled_without_a_margin():
    pixels, invalid = np.ones((60, 60), np.float32), np.zeros((60, 60), bool)
    invalid[10, 10] = invalid[:, 40] = True
    mask = exclude(pixels, invalid)
    np.testing.assert_array_equal(mask, ~invalid)
    invalid[:, 40:43] = True
    mask = exclude(pixels, invalid)
    assert not mask[:, 40 - MARGIN : 43 + MARGIN].any()
    assert mask[:, 43 + MARGIN :].all()


def distances(image: np.ndarray, xy: torch.Tensor) -> np.ndarray:
    """Distance of keypoints from the pixels (H,W) bool, in steps of a chess king."""
    ndimage = pytest.importorskip("scipy.ndimage")
    away = ndimage.distance_transform_cdt(~image, "chessboard")
    x, y = xy.round().long().numpy().T
    return away[y.clip(0, image.shape[0] - 1), x.clip(0, image.shape[1] - 1)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alpha.png", {}),
        ("black.png", {"mask_value": 0}),
        ("black.jpg", {"mask_value": 0}),
        ("white.tif", {"mask_value": 255}),
    ],
)
def test_a_surround_has_no_keypoints(tmp_path, name, options):
    pytest.importorskip("scipy")
    rotated = texture().convert("RGBA").rotate(17, Image.Resampling.BICUBIC, expand=True)
    outside = np.asarray(rotated)[..., 3] == 0
    path = tmp_path / name
    if name == "alpha.png":
        rotated.save(path)
    else:
        color = (0, 0, 0, 255) if "black" in name else (255, 255, 255, 255)
        Image.alpha_composite(Image.new("RGBA", rotated.size, color), rotated).convert("RGB").save(
            path
        )
    counts = {}
    for masked in (False, True):
        chosen = options if masked else {"mask_alpha": False}
        extractor = build("sobelnet", "none", num_keypoints=250, **chosen)
        features = extractor.extract(path)
        assert len(features) > 200
        counts[masked] = (distances(outside, features.xy) < (5 if "jpg" in name else 7)).sum()
    assert counts[True] == 0
    if name == "alpha.png":  # the colors of transparent pixels are black
        assert counts[False] > 3


def test_black_inside_the_content_stays(tmp_path):
    image = np.full((80, 90), 120, np.uint8)
    image[:10] = image[40:50, 40:50] = 0
    Image.fromarray(image).save(tmp_path / "a.png")
    mask = read_image(tmp_path / "a.png", ReadOptions(mask_value=0)).mask
    assert mask is not None
    assert not mask[: 10 + MARGIN].any()
    assert mask[10 + MARGIN :].all()


def test_alpha_of_arrays_tensors_and_pil_images():
    values = np.asarray(texture(60, 50).convert("RGBA")).copy()
    values[:, :20, 3] = 0
    for source in (values, torch.from_numpy(values).permute(2, 0, 1), Image.fromarray(values)):
        reading = read_image(source)
        assert reading.mask is not None
        assert not reading.mask[:, : 20 + MARGIN].any()
        assert reading.mask[:, 20 + MARGIN :].all()
        assert read_image(source, ReadOptions(mask_alpha=False)).mask is None
    values[..., 3] = 0  # not a transparent image but one without opacity
    assert read_image(values).mask is None


def test_match_masks_transparent_pixels(tmp_path):
    photo = texture().convert("RGBA")
    opacity = np.full((220, 300), 255, np.uint8)
    opacity[:, :150] = 0
    photo.putalpha(Image.fromarray(opacity))
    photo.save(tmp_path / "a.png")
    extraction = ExtractOptions(detector="sobelnet", descriptor="rootsift", num_keypoints=200)
    result = match_two(tmp_path / "a.png", tmp_path / "a.png", extraction)
    assert len(result.a) > 50
    assert result.a.xy[:, 0].min() > 150 + MARGIN - 2


# ---- value range, EXIF orientation and pages, as users meet them


def test_thermal_images_match_with_automatic_range(tmp_path, caplog):
    tifffile = pytest.importorskip("tifffile")
    cv2 = pytest.importorskip("cv2")
    if not (CASES / "thermal").is_dir():
        pytest.skip("needs ../shared")
    path = CASES / "thermal" / "kelvin16.tif"
    counts = tifffile.imread(path)
    turn = cv2.getRotationMatrix2D((200, 160), 9, 0.9)
    H_ab = np.vstack([turn, [1e-4, 5e-5, 1]])
    warped = cv2.warpPerspective(counts, H_ab, (400, 320), borderValue=int(np.median(counts)))
    noise = RNG.normal(0, 4, warped.shape).round().astype(int)
    tifffile.imwrite(tmp_path / "b.tif", (warped + noise).astype(np.uint16))
    correct = {}
    for value_range in ("type", "auto"):
        # per location, because repeated ones are counted more often
        extraction = ExtractOptions(num_keypoints=500, per_scale=False, value_range=value_range)
        with caplog.at_level(logging.WARNING, "tiepoints"):
            caplog.clear()
            options = MatchOptions(geometry="homography")
            result = match_two(path, tmp_path / "b.tif", extraction, options)
        warned = "2 of 2 images, such as" in caplog.text and "--value-range auto" in caplog.text
        assert warned == (value_range == "type")
        projected = np.c_[result.xy_a, np.ones(len(result.xy_a))] @ H_ab.T
        error = projected[:, :2] / projected[:, 2:] - result.xy_b.numpy()
        correct[value_range] = int((np.linalg.norm(error, axis=1) < 3).sum())
    assert correct["auto"] >= 200
    assert correct["auto"] > 1.2 * correct["type"]


def test_rotated_photos_match_the_landscape(tmp_path):
    photo, shifted = texture(300, 220), texture(300, 220).crop((12, 8, 300, 220))
    photo.save(tmp_path / "a.png")
    extraction = ExtractOptions(num_keypoints=300)
    upright = None
    for orientation in (1, 6, 8):
        exif = Image.Exif()
        exif[274] = orientation
        stored = shifted
        if orientation != 1:  # upright again when EXIF is applied
            stored = shifted.transpose(
                Image.Transpose.ROTATE_90 if orientation == 6 else Image.Transpose.ROTATE_270
            )
        stored.save(tmp_path / "b.png", exif=exif)
        result = match_two(tmp_path / "a.png", tmp_path / "b.png", extraction)
        assert result.image_b.shape[-2:] == stored.size[::-1]
        inliers = int(result.estimate.inliers.sum())
        upright = upright or inliers
        assert upright > 150
        assert inliers > 0.8 * upright
        if orientation == 1:
            continue
        applied = ExtractOptions(num_keypoints=300, exif_orientation="apply")
        result = match_two(tmp_path / "a.png", tmp_path / "b.png", applied)
        assert result.image_b.shape[-2:] == shifted.size[::-1]
        moved = (result.xy_b - result.xy_a).median(dim=0).values
        np.testing.assert_allclose(moved, [-12, -8], atol=0.1)


def test_exif_orientation_of_stores(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "p").mkdir()
    texture(200, 150).save(tmp_path / "p" / "a.png")
    texture(200, 150, seed=1).save(tmp_path / "p" / "b.png", exif=exif)
    arguments = ["extract", tmp_path / "p", "--descriptor", "none", "--single-scale"]
    arguments += ["--num-keypoints", 50, "--output"]
    code, _, err = call(*arguments, tmp_path / "x")
    assert code == 0
    assert "1 of 2 images, such as" in err
    assert "--exif-orientation apply" in err
    code, _, err = call(*arguments, tmp_path / "y", "--exif-orientation", "apply")
    assert (code, err) == (0, "")
    code, _, err = call(
        *arguments, tmp_path / "z", "--exif-orientation", "apply", "--format", "colmap"
    )
    assert code == 2
    assert "COLMAP reads images as stored" in err


def test_pages_become_images(tmp_path):
    pytest.importorskip("h5py")
    folder = tmp_path / "p"
    folder.mkdir()
    whole = texture(260, 200)
    frames = [whole.crop((8 * i, 0, 8 * i + 220, 200)) for i in range(3)]
    frames[0].save(folder / "a.tif", save_all=True, append_images=frames[1:])
    arguments = ["--num-keypoints", 100, "--descriptor", "rootsift", "--single-scale"]
    code, out, err = call("extract", folder, *arguments, "--output", tmp_path / "x")
    assert code == 0
    assert "1 of 1 images, such as" in err
    assert "--pages all" in err
    assert out.startswith("1 extracted")
    more = ["--output", tmp_path / "y", "--pages", "all", "--json"]
    code, out, err = call("extract", tmp_path / "p", *arguments, *more)
    assert (code, err) == (0, "")
    assert json.loads(out)["done"] == 3
    names = sorted(path.name for path in (tmp_path / "y").rglob("*.kpt.npy"))
    assert names == ["a.tif#2.kpt.npy", "a.tif#3.kpt.npy", "a.tif.kpt.npy"]
    pages = [
        read_features(path.with_name(path.name[:-8]))
        for path in (tmp_path / "y").rglob("*2.kpt.npy")
    ]
    assert len(pages[0]) > 50
    code, out, err = call(
        "match", folder, *arguments, "--pages", "all", "--output", tmp_path / "m.h5", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["done"] == 3
    assert json.loads(out)["matches"] > 100
    assert (tmp_path / "m.pairs.txt").read_text().splitlines()[0] == "a.tif a.tif#2"


def test_pages_of_tasks(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"x")
    found = collect([str(tmp_path / "a.tif")], inside=True, pages=lambda path: 3)
    assert [(str(task.relative), task.page, task.source.name) for task in found.tasks] == [
        ("a.tif", 1, "a.tif"),
        ("a.tif#2", 2, "a.tif#2"),
        ("a.tif#3", 3, "a.tif#3"),
    ]
    assert {task.path for task in found.tasks} == {tmp_path / "a.tif"}


def test_notices_are_logged_once(caplog):
    notices = Notices()
    pixels = torch.zeros(1, 1, 2, 2)
    with caplog.at_level(logging.INFO, "tiepoints"):
        for i in range(5):
            notices.add(f"{i}.tif", Reading(pixels, narrow=i > 2, pages=i, orientation=6))
            notices.log()
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "such as 2.tif" in caplog.records[0].getMessage()
    assert "such as 3.tif" in caplog.records[1].getMessage()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--value-range", "7"), ("--bands", "1,2"), ("--exif-orientation", "maybe"), ("--pages", "2")],
)
def test_invalid_options_are_refused(tmp_path, option, value):
    texture(60, 60).save(tmp_path / "a.png")
    code, _, err = call("extract", tmp_path / "a.png", "--output", tmp_path / "x", option, value)
    assert code == 2
    assert value in err or option in err
    assert not (tmp_path / "x").exists()


def test_masks_with_a_nodata_value_are_not_filled(tmp_path):
    """GDAL marks the zeros of masks as pixels without data."""
    tifffile = pytest.importorskip("tifffile")
    allowed = np.zeros((60, 80), np.uint8)
    allowed[10:40, 20:80] = 255
    path = tmp_path / "m.tif"
    tifffile.imwrite(path, allowed, extratags=[(42113, "s", 0, "0", True)])
    assert torch.equal(read_mask(path), torch.from_numpy(allowed > 0))


def test_options_apply_to_arrays_and_pil_images():
    pixels = np.full((60, 80, 3), (10, 20, 30), np.uint8)
    pixels[:, :30] = 0  # a surround
    for source in (pixels, Image.fromarray(pixels)):
        masked = read_image(source, ReadOptions(mask_value=0)).mask
        assert masked is not None
        assert not bool(masked[:, :30].any())
        one = read_image(source, ReadOptions(bands="3")).pixels
        assert float(one[0, 0, 30, 60]) == pytest.approx(30 / 255)
        with pytest.raises(DataError, match="no band 9"):
            read_image(source, ReadOptions(bands="9"))
