"""Affine shapes: the network, patches in the frames of shapes, training, extraction."""

import json

import numpy as np
import pytest
import torch

from helpers import call, write_photos
from test_patches import points, smooth_image
from tiepoints.datasets.patch_pairs import PatchPairs, PatchSettings
from tiepoints.datasets.synthetic import draw_tilt
from tiepoints.describe import PatchDescriptor
from tiepoints.evaluation.systems import system_record
from tiepoints.export import pipeline_graph
from tiepoints.extract import ExtractOptions, build, build_descriptor
from tiepoints.geometry import warp_image
from tiepoints.models.affnet import AffNet, to_shapes
from tiepoints.models.keynet import KeyNet
from tiepoints.models.spec import fused
from tiepoints.patches import crop_patches, extract_patches
from tiepoints.pretrained import from_pretrained
from tiepoints.pyramid import build_pyramid
from tiepoints.training.losses import hard_negative_constant_loss, hardnet_loss
from tiepoints.training.recipes.affine import elongation, shape_loss
from tiepoints.weights import digest, load, save

EYE = torch.eye(2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def net():
    """A network with random shapes, in eval mode."""
    torch.manual_seed(0)
    net = AffNet()
    torch.nn.init.normal_(net.last.weight, std=6.0)
    with torch.no_grad():
        net(torch.rand(64, 1, 32, 32))  # statistics of the normalization
    return net.eval().requires_grad_(False)


def affine_pair(shape: torch.Tensor, seed: int = 3):
    """An image and its copy warped by ``shape`` about the center, and the center."""
    image = smooth_image(241, 321, seed, wave=25.0)
    center = torch.tensor([160.0, 120.0])
    H = torch.eye(3)
    H[:2, :2] = shape
    H[:2, 2] = center - shape @ center
    return image, warp_image(image, H[None], padding="border"), center[None]


def test_shapes_have_determinant_1_and_keep_the_vertical(net):
    shapes = to_shapes(10 * torch.randn(500, 3))
    torch.testing.assert_close(torch.linalg.det(shapes), torch.ones(500), rtol=0, atol=1e-4)
    assert (shapes[:, 0, 1] == 0).all()
    assert (shapes.diagonal(dim1=1, dim2=2) > 0).all()
    torch.testing.assert_close(to_shapes(torch.zeros(1, 3))[0], EYE, rtol=0, atol=0)
    found = net(torch.rand(20, 1, 32, 32))
    assert found.shape == (20, 2, 2)
    assert float((found - EYE).abs().amax()) > 0.05
    assert (found[:, 0, 1] == 0).all()
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(20), rtol=0, atol=1e-4)
    assert net(torch.full((2, 1, 32, 32), 0.5)).isfinite().all()


def test_untrained_network_keeps_patches_square():
    shapes = AffNet()(torch.rand(8, 1, 40, 40))
    torch.testing.assert_close(shapes, EYE.expand(8, 2, 2), rtol=0, atol=0)
    assert AffNet()(torch.rand(0, 1, 32, 32)).shape == (0, 2, 2)
    with pytest.raises(ValueError, match="patches must be"):
        AffNet()(torch.rand(8, 32, 32))


def test_fused_equals_unfused(net):
    patches = torch.rand(30, 1, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(fused(net)(patches), net(patches), rtol=0, atol=1e-5)


def test_identity_changes_no_patch():
    pyramid = build_pyramid(smooth_image(wave=20.0))
    keypoints = points(torch.rand(40, 2) * 200 + 20, 1.6, 0.4)
    plain = extract_patches(pyramid, keypoints)
    assert torch.equal(extract_patches(pyramid, keypoints, shapes=EYE.expand(40, 2, 2)), plain)
    patches = torch.rand(5, 1, 64, 64)
    assert torch.equal(crop_patches(patches, 32), patches[:, :, 16:48, 16:48])
    cropped = crop_patches(patches, 32, EYE.expand(5, 2, 2))
    torch.testing.assert_close(cropped, crop_patches(patches, 32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [[[1.5, 0.0], [0.0, 1 / 1.5]], [[0.8, 0.0], [0.6, 1.25]]])
@pytest.mark.parametrize("angle", [0.0, 0.5])
def test_patches_of_a_warped_image_agree_with_the_true_shape(rows, angle):
    shape = torch.tensor(rows)
    image, warped, xy = affine_pair(shape)
    a, b = build_pyramid(image), build_pyramid(warped)
    keypoints = points(xy, 1.2, angle)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float32)
    # the shape is relative to the frame that the angle rotates
    true = (rotation.T @ shape @ rotation)[None]
    patch = extract_patches(a, keypoints)
    aligned = extract_patches(b, keypoints, shapes=true)
    spread = float(patch.std())
    assert float((aligned - patch).abs().mean()) < 0.06 * spread
    assert float((extract_patches(b, keypoints) - patch).abs().mean()) > 0.3 * spread
    # the same from a larger patch, as in training
    large = extract_patches(b, keypoints, size=64, half_side=44.0)
    cropped = crop_patches(large, 32, true)
    assert float((cropped - aligned).abs().mean()) < 0.06 * spread


def test_descriptor_samples_patches_in_the_frames_of_the_network():
    shape = torch.tensor([[1.4, 0.0], [0.3, 1 / 1.4]])
    image, warped, xy = affine_pair(shape)
    keypoints = points(xy, 1.2)
    hardnet = load("hardnet-light")
    known = PatchDescriptor(hardnet, shape_net=lambda patches: shape.expand(len(patches), 2, 2))
    a = PatchDescriptor(hardnet)(build_pyramid(image), keypoints, 0)
    b = {
        name: describe(build_pyramid(warped), keypoints, 0)
        for name, describe in {"known": known, "square": PatchDescriptor(hardnet)}.items()
    }
    cosine = {name: float((a * vectors).sum()) for name, vectors in b.items()}
    assert cosine["known"] > 0.97
    assert cosine["square"] < cosine["known"] - 0.1


def test_shipped_network_aligns_obliquely_seen_patches():
    shape = torch.tensor([[1.5, 0.0], [0.0, 1 / 1.5]])
    image, warped, center = affine_pair(shape)
    grid = torch.cartesian_prod(torch.arange(-60.0, 61, 20), torch.arange(-60.0, 61, 20))
    cosine = {}
    for affine in ("none", "affnet"):
        describe = build_descriptor("hardnet-light", precision="float32", affine=affine)
        a = describe(build_pyramid(image), points(center + grid, 1.0), 0)
        b = describe(build_pyramid(warped), points(center + grid @ shape.T, 1.0), 0)
        cosine[affine] = float((a * b).sum(dim=1).mean())
    assert cosine["affnet"] > cosine["none"] + 0.05


def test_shapes_in_evaluation_and_export():
    assert system_record("keynet@affnet+hardnet")["affine"] == digest("affnet")
    assert "affine" not in system_record("keynet+hardnet")
    with pytest.raises(ValueError, match="affine shapes cannot be exported"):
        pipeline_graph(ExtractOptions(affine="affnet"))


def test_larger_patches_have_those_of_descriptors_in_their_center(photos):
    paths = sorted(photos.glob("*.png"))

    def detect(view):
        return torch.rand(300, 2, generator=torch.Generator().manual_seed(1)) * 250

    options = {"per_view": 6, "symmetric": 0.0}
    small = PatchPairs(paths, detect, PatchSettings(**options), length=1)[0]
    large = PatchPairs(paths, detect, PatchSettings(**options, size=64, half_side=44.0), length=1)[
        0
    ]
    for key in ("anchor", "positive"):
        assert large[key].shape == (6, 1, 64, 64)
        torch.testing.assert_close(crop_patches(large[key], 32), small[key], rtol=0, atol=1e-4)


def test_tilts_keep_the_vertical():
    rng = np.random.default_rng(0)
    tilts = np.stack([draw_tilt(rng, 4.0) for _ in range(200)])
    np.testing.assert_allclose(np.linalg.det(tilts), 1, atol=1e-9)
    np.testing.assert_allclose(tilts[:, 0, 1], 0, atol=1e-12)
    assert (tilts[:, 1, 1] > 0).all()
    ratio = np.divide(*np.linalg.svd(tilts, compute_uv=False).T)
    assert 3 < ratio.max() <= 4.0 + 1e-9


def test_distances_to_negatives_have_no_gradient():
    torch.manual_seed(0)
    a, p = (torch.nn.functional.normalize(torch.randn(20, 16), dim=1) for _ in range(2))
    a.requires_grad_()
    loss, metrics = hard_negative_constant_loss(a, p)
    expected, _ = hardnet_loss(a, p)
    assert loss.item() == pytest.approx(expected.item())
    assert metrics["negative"] > 0
    (gradient,) = torch.autograd.grad(loss, a)
    active = ((a - p).square().sum(dim=1) + 1e-6).sqrt()  # all triplets are violated
    (alone,) = torch.autograd.grad(active.mean(), a)
    torch.testing.assert_close(gradient, alone, rtol=1e-3, atol=1e-6)
    assert float(elongation(torch.tensor([[[2.0, 0.0], [0.0, 0.5]]]))) == pytest.approx(1.5**2)


def test_training_aligns_stretched_patches():
    torch.manual_seed(0)
    coarse = torch.rand(32, 1, 12, 12)
    anchor = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(0, 1)
    stretch = to_shapes(torch.tensor([[0.6, 0.0, -0.6]])).expand(32, 2, 2)
    positive = crop_patches(torch.nn.functional.pad(anchor, (16,) * 4, mode="reflect"), 64, stretch)
    both = torch.cat([anchor, positive])
    net, descriptor = AffNet(dropout=0.0), fused(load("hardnet-light")).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        value, metrics = shape_loss(net, descriptor, both)
        losses.append(metrics["positive"])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert np.mean(losses[-3:]) < 0.9 * losses[0]


def test_trained_file_is_used_by_extraction_and_refused_elsewhere(photos, tmp_path):
    weights = tmp_path / "shapes.safetensors"
    arguments = ["train", "affnet", "--images", photos, "--output", weights, "--workers", 0]
    arguments += ["--steps", 2, "--batch-size", 1, "--validate-every", 2, "--device", "cpu"]
    code, _, err = call(*arguments)
    assert code == 0
    assert "matching without shapes: 0." in err
    assert isinstance(load(weights), AffNet)
    extract = ["extract", photos / "0.png", "--detector", "keynet-tiny", "--num-keypoints", 50]
    extract += ["--device", "cpu"]
    code, _, err = call(*extract, "--affine", weights, "--output", tmp_path / "f", "--json")
    assert (code, err) == (0, "")
    settings = json.loads((tmp_path / "f" / "settings.json").read_text())
    assert settings["affine"] == str(weights)
    assert len(settings["digests"]["affine"]) == 64
    refused = {
        ("--affine", weights, "--descriptor", "desnet"): "describes the whole image",
        ("--affine", weights, "--descriptor", "none"): "use a patch descriptor",
        ("--affine", "shapes"): "affine must be one of none, affnet",
        ("--descriptor", weights): "use it as the affine",
        ("--detector", weights): "use it as the affine",
    }
    for options, message in refused.items():
        code, _, err = call(*extract, *options, "--output", tmp_path / "g")
        assert code == 2
        assert message in err
    code, _, err = call(
        *("train", "affnet", "--images", photos, "--output", tmp_path / "x.safetensors"),
        *("--descriptor", "desnet"),
    )
    assert code == 2
    assert "descriptor must be a patch descriptor" in err


def test_shapes_change_descriptors_only(net, photos, tmp_path):
    options = {"num_keypoints": 60, "device": "cpu", "precision": "float32"}
    image = photos / "0.png"
    plain = build("keynet-tiny", "hardnet-light", **options).extract(image)
    shaped = build("keynet-tiny", "hardnet-light", affine=net, **options).extract(image)
    assert torch.equal(plain.xy, shaped.xy)
    assert not torch.allclose(plain.descriptors, shaped.descriptors, atol=0.05)
    untrained = build("keynet-tiny", "hardnet-light", affine=AffNet(), **options).extract(image)
    torch.testing.assert_close(untrained.descriptors, plain.descriptors, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="estimates no affine shapes"):
        build("keynet-tiny", affine=KeyNet.tiny())
    with pytest.raises(ValueError, match="affine is a network in memory"):
        ExtractOptions(affine=net).to_json()
    save(net, tmp_path / "shapes.safetensors")
    extractor = from_pretrained(tmp_path, detector="keynet-tiny", **options)
    torch.testing.assert_close(
        extractor.extract(image).descriptors, shaped.descriptors, rtol=0, atol=0.05
    )
