"""Extraction: the published output, and the properties of the default mode."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import tiepoints
from tiepoints.checkpoints import load_official
from tiepoints.detect import PUBLISHED, DetectOptions
from tiepoints.extract import ExtractOptions, build
from tiepoints.image import load_image
from tiepoints.models.keynet import KeyNet
from tiepoints.models.spec import DetectorSpec
from tiepoints.patches import extract_patches
from tiepoints.pyramid import build_pyramid, level_budgets
from tiepoints.structs import Keypoints, PaddedFeatures
from tiepoints.weights import load, save


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A textured gray image (H,W) uint8 with corners and blobs of many sizes."""
    rng = np.random.default_rng(0)
    image = torch.zeros(1, 1, 240, 320)
    for size in (6, 15, 40, 120):
        noise = torch.from_numpy(rng.random((1, 1, 240 // size + 2, 320 // size + 2))).float()
        image += torch.nn.functional.interpolate(noise, size=(240, 320), mode="bicubic") * size**0.5
    image = (image - image.min()) / (image.max() - image.min())
    return (image[0, 0] * 255).round().to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def extractor():
    return build("keynet", "rootsift", num_keypoints=400, precision="float32", device="cpu")


@pytest.mark.parametrize(
    "key", ["graf1_n1000", "graf2_n5000", "boat2_n5000", "graf3_single_scale_n1000"]
)
def test_official_mode_equals_the_published_keypoints(reference_dir, key):
    expected = np.load(reference_dir / "keynet_keypoints.npz")[key]
    image = np.load(reference_dir / "oxford_gray_inputs.npz")[key.split("_")[0]]
    net = load_official(reference_dir / "checkpoints" / "keynet_pytorch.pth")
    run = build(
        net,
        None,
        official=True,
        num_keypoints=int(key.split("_n")[-1]),
        single_scale="single" in key,
        device="cpu",
    )
    found = run.extract(image)
    assert len(found) == len(expected)
    table = (
        torch.cat([found.xy, found.scale[:, None], found.score[:, None]], dim=1).double().numpy()
    )
    real, ours = expected[expected[:, 3] > 1.2], table[table[:, 3] > 1.2]
    same = np.zeros(len(real), bool)
    if len(real) == len(ours):  # in the published order, row by row
        same = (np.abs(real[:, :2] - ours[:, :2]).max(axis=1) < 0.01) & (
            np.abs(real[:, 2] - ours[:, 2]) < 1e-4
        )
        same &= np.abs(real[:, 3] / ours[:, 3] - 1) < 1e-3
    assert same.mean() >= 0.99


def test_published_level_budgets():
    assert level_budgets(5000, 1, 6) == [2539, 1269, 634, 317, 158, 79]
    assert level_budgets(1500, 1, 7) == [755, 377, 188, 94, 47, 23, 11]


def test_features_have_documented_shapes_and_order(extractor, photo):
    f = extractor.extract(photo)
    assert 100 < len(f) <= 400
    assert f.xy.dtype == f.descriptors.dtype == torch.float32
    assert f.descriptors.shape == (len(f), 128)
    assert torch.allclose(f.descriptors.norm(dim=1), torch.ones(len(f)), atol=1e-4)
    assert (f.score.diff() <= 0).all()
    assert f.image_size == (320, 240)
    assert ((f.xy >= -0.5) & (f.xy <= torch.tensor([319.5, 239.5]))).all()


def test_all_input_types_agree(extractor, photo, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(photo).save(path)
    first = extractor.extract(photo)
    for other in (
        path,
        str(path),
        Image.fromarray(photo),
        torch.from_numpy(photo),
        np.stack([photo] * 3, axis=-1),
    ):
        again = extractor.extract(other)
        assert len(again) == len(first)
        assert torch.allclose(again.xy, first.xy, atol=2e-2)
    assert len(extractor.extract([photo, photo[:100]])) == 2


def test_several_images_are_extracted_from_any_container(extractor, photo):
    other = np.ascontiguousarray(photo[::-1])
    flat = np.full_like(photo, 128)
    images = [photo, other, flat]
    alone = [extractor.extract(image) for image in images]
    batch = torch.from_numpy(np.stack(images))[:, None]
    for given in (images, tuple(images), (image for image in images), batch):
        found = extractor.extract(given)
        assert [len(f) for f in found] == [len(f) for f in alone]
        for f, expected in zip(found, alone, strict=True):
            assert torch.equal(f.xy, expected.xy)
    together = extractor.extract_tensor(torch.cat([load_image(image) for image in images]))
    padded = PaddedFeatures.pad(together)
    for row, expected in enumerate(alone):
        valid = padded.valid[row]
        assert int(valid.sum()) == len(expected)
        assert torch.allclose(padded.xy[row][valid], expected.xy, atol=1e-3)
        assert torch.allclose(padded.descriptors[row][valid], expected.descriptors, atol=1e-3)
    with pytest.raises(ValueError, match="2 images but 1 masks"):
        extractor.extract(images[:2], [None])


def test_masks_are_paths_images_arrays_or_tensors(extractor, photo, tmp_path):
    mask = np.zeros(photo.shape, np.uint8)
    mask[:, 160:] = 255
    picture = Image.fromarray(mask)
    picture.save(tmp_path / "mask.png")
    found = [
        extractor.extract(photo, given)
        for given in (mask, torch.from_numpy(mask), picture, tmp_path / "mask.png")
    ]
    for f in found:
        assert torch.equal(f.xy, found[0].xy)
        assert f.xy[:, 0].min() > 157
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        extractor.extract(photo, tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"got \(320, 240\); that of the image rotated"):
        extractor.extract(photo, mask.T)


def test_extractor_can_be_pickled_and_has_a_repr(photo):
    for options in ({"orientation": "none"}, {}, {"orientation": "dominant"}):
        one = build("keynet-tiny", "rootsift", num_keypoints=30, device="cpu", **options)
        again = pickle.loads(pickle.dumps(one))
        assert torch.equal(one.extract(photo).xy, again.extract(photo).xy)
    assert repr(one) == "Extractor(keynet-tiny + rootsift, 30 keypoints, 6 levels, cpu)"


def test_options_round_trip_as_json_and_from_earlier_versions():
    options = ExtractOptions(
        detector="rekd", num_keypoints=77, per_scale=True, upright=True, nms_window=9, border=4
    )
    content = json.loads(json.dumps(options.to_json()))
    assert ExtractOptions.from_json(content) == options
    before = {
        **{"detector": "keynet", "descriptor": "rootsift", "num_points": 100, "mode": "official"},
        **{"scales": "all", "single_scale": False, "weights": None},
    }
    expected = ExtractOptions(
        detector="keynet", descriptor="rootsift", num_keypoints=100, official=True, per_scale=True
    )
    assert ExtractOptions.from_json(before) == expected
    with pytest.raises(TypeError, match="did you mean 'num_keypoints'"):
        build(num_keypoint=5)
    with pytest.raises(ValueError, match="single_scale excludes pyramid levels"):
        build(single_scale=True, up_levels=2)
    with pytest.raises(ValueError, match="network in memory"):
        ExtractOptions(detector=KeyNet()).to_json()


def test_a_weights_file_is_a_detector(photo, tmp_path):
    save(load("keynet-tiny"), tmp_path / "mine.safetensors")
    one = build(str(tmp_path / "mine.safetensors"), None, num_keypoints=50, device="cpu")
    other = build("keynet-tiny", None, num_keypoints=50, device="cpu")
    assert torch.equal(one.extract(photo).xy, other.extract(photo).xy)


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (31, 31), (49, 64), (97, 131)])
def test_constant_and_small_images_have_no_keypoints(extractor, shape):
    f = extractor.extract(np.full(shape, 77, np.uint8))
    assert len(f) == 0
    assert f.descriptors.shape == (0, 128)


def test_masked_areas_have_no_keypoints(extractor, photo):
    mask = np.zeros(photo.shape, bool)
    mask[:, 160:] = True
    f = extractor.extract(photo, mask)
    assert len(f) > 20
    assert (f.xy[:, 0] > 157).all()
    with pytest.raises(ValueError, match="mask"):
        extractor.extract(photo, mask[:10])


def test_single_scale_and_multiple_levels(photo):
    single = build("keynet", None, single_scale=True, num_keypoints=300, device="cpu").extract(
        photo
    )
    many = build("keynet", None, num_keypoints=300, device="cpu").extract(photo)
    assert set(single.scale.tolist()) == {1.0}
    assert len(set(many.scale.tolist())) >= 3
    assert single.descriptors is None


def test_duplicates_across_scales_are_removed(photo):
    f = build("keynet", None, num_keypoints=2000, per_scale=False, device="cpu").extract(photo)
    distance = torch.cdist(f.xy, f.xy) + torch.eye(len(f)) * 100
    assert distance.min() > 1.5
    every = build("keynet", None, num_keypoints=2000, device="cpu").extract(photo)
    distance = torch.cdist(every.xy, every.xy) + torch.eye(len(every)) * 100
    assert (distance.min(dim=1).values < 1.5).float().mean() > 0.3
    levels = torch.log2(every.scale) * 2
    assert (
        levels - levels.round()
    ).abs().max() < 0.05  # keypoints have the scales of the levels, up to integer pixels


def test_scale_follows_the_image(photo):
    run = build("keynet", None, num_keypoints=400, device="cpu")
    large = np.asarray(Image.fromarray(photo).resize((640, 480), Image.Resampling.BICUBIC))
    a, b = run.extract(photo), run.extract(large)
    distance, nearest = torch.cdist(a.xy * 2 + 0.5, b.xy).min(dim=1)
    ratio = (b.scale[nearest] / a.scale)[distance < 3]
    assert len(ratio) > 100
    assert 1.3 < ratio.median() < 2.2


def test_keypoints_follow_mirroring_with_subpixel_accuracy(photo):
    run = build("keynet", None, num_keypoints=300, device="cpu")
    a, b = run.extract(photo), run.extract(np.ascontiguousarray(photo[:, ::-1]))
    mirrored = torch.stack([photo.shape[1] - 1 - b.xy[:, 0], b.xy[:, 1]], dim=1)
    distance, nearest = torch.cdist(a.xy, mirrored).min(dim=1)
    found = distance < 3
    assert found.float().mean() > 0.7
    assert abs((a.xy[:, 0] - mirrored[nearest][:, 0])[found].median()) < 0.2


def test_pyramid_levels_map_points_exactly():
    pyramid = build_pyramid(torch.rand(1, 1, 201, 303))
    for level in pyramid.levels:
        h, w = level.image.shape[-2:]
        corners = torch.tensor([[-0.5, -0.5], [w - 0.5, h - 0.5]])
        assert torch.allclose(
            level.to_original(corners), torch.tensor([[-0.5, -0.5], [302.5, 200.5]]), atol=1e-3
        )
        assert torch.allclose(level.from_original(level.to_original(corners)), corners, atol=1e-3)


def test_patches_are_centered_rotated_and_scaled():
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(200.0), indexing="ij")
    pyramid = build_pyramid(
        ((x + 2 * y) / 600)[None, None]
    )  # a ramp: the value of a sample is its position
    angle = 0.5
    points = Keypoints(
        torch.tensor([[90.25, 100.5], [100.0, 100.0]]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([angle, 0.0]),
        torch.ones(2),
    )
    patches = extract_patches(pyramid, points, size=16, half_side=11)
    offset = 11 * ((2 * torch.arange(16.0) + 1) / 16 - 1)
    v, u = torch.meshgrid(offset, offset, indexing="ij")
    cos, sin = np.cos(angle), np.sin(angle)
    expected = (90.25 + u * cos - v * sin + 2 * (100.5 + u * sin + v * cos)) / 600
    assert torch.allclose(patches[0, 0], expected, atol=2e-3)
    assert torch.allclose(patches[1, 0], (100 + 2 * u + 2 * (100 + 2 * v)) / 600, atol=4e-3)


def test_threshold_num_keypoints_border_and_window_are_used(photo):
    many = build("keynet", None, num_keypoints=1000, device="cpu").extract(photo)
    assert len(build("keynet", None, num_keypoints=50, device="cpu").extract(photo)) == 50
    one = build("keynet", None, num_keypoints=1000, single_scale=True, device="cpu").extract(photo)
    middle = float(one.score.median())
    some = build(
        "keynet", None, num_keypoints=1000, single_scale=True, threshold=middle, device="cpu"
    ).extract(photo)
    assert 0 < len(some) < len(one)
    assert float(some.score.min()) > middle
    published = build("keynet", None, num_keypoints=1000, device="cpu", **PUBLISHED).extract(photo)
    assert len(published) < len(many)
    wide = build("keynet", None, num_keypoints=1000, nms_window=31, device="cpu").extract(photo)
    assert len(wide) < len(many)
    inner = build(
        "keynet", None, num_keypoints=1000, border=40, single_scale=True, device="cpu"
    ).extract(photo)
    assert (inner.xy >= 39).all()


@pytest.mark.parametrize(
    ("arguments", "options", "remedy"),
    [
        (("nonsense",), {}, "detector must be one of keynet"),
        (("keynet", "nonsense"), {}, "descriptor must be one of hardnet"),
        (("keynet",), {"orientation": "x"}, "orientation must be one of none"),
        (("keynet",), {"num_keypoints": 0}, "num_keypoints must be at least 1"),
        (("keynet",), {"nms_window": 4}, "nms_window must be odd"),
        (("keynet",), {"nms_shape": "x"}, "nms_shape must be one of square"),
        (("keynet",), {"device": "nowhere"}, "try auto or cpu"),
        (("keynet",), {"border": -1}, "border must not be negative"),
        (("hardnet",), {}, "detector must be one of"),
    ],
)
def test_invalid_arguments_raise_with_a_remedy(arguments, options, remedy):
    with pytest.raises(ValueError, match=remedy):
        build(*arguments, **options)


def test_the_published_extraction_has_the_published_suppression():
    for official, window, margin in ((False, 7, 8), (True, 15, 15)):
        options = ExtractOptions(official=official)
        assert (options.window, options.margin) == (window, margin)
        resolved = options.resolved(DetectorSpec())
        assert (resolved.nms_window, resolved.border) == (window, margin)
    given = ExtractOptions(official=True, nms_window=9, border=0)
    assert (given.window, given.margin) == (9, 0)
    resolved = given.resolved(DetectorSpec())
    assert (resolved.nms_window, resolved.border) == (9, 0)


def test_tiny_key_net_has_the_published_suppression(photo):
    options = {"num_keypoints": 1000, "device": "cpu"}
    default = build("keynet-tiny", None, **options).extract(photo)
    published = build("keynet-tiny", None, **options, **PUBLISHED).extract(photo)
    assert torch.equal(default.xy, published.xy)
    small = build("keynet-tiny", None, **options, nms_window=7, border=8).extract(photo)
    assert len(small) > len(default)


def test_public_names_are_complete_and_load():
    for name in tiepoints.__all__:
        assert getattr(tiepoints, name) is not None
    assert callable(tiepoints.match)
    assert callable(tiepoints.estimate)
    assert DetectOptions().num_keypoints == 5000
    with pytest.raises(AttributeError, match="public names"):
        _ = tiepoints.nonsense


def test_fused_network_equals_the_network(photo):
    image = torch.from_numpy(photo)[None, None].float() / 255
    for name in ("keynet", "keynet-tiny"):
        net = tiepoints.load(name)
        for size in ((240, 320), (101, 77), (1, 1), (3, 50)):
            part = image[..., : size[0], : size[1]]
            with torch.inference_mode():
                slow = net(part)
            assert torch.allclose(
                net.fused()(part), slow, rtol=1e-4, atol=1e-4 * float(slow.max()) + 1e-6
            )


def test_settings_are_plain_data():
    json.dumps(vars(DetectOptions()))
