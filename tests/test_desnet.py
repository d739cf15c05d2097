"""DesNet: sizes, sampling convention, receptive field, fused equals unfused, levels by scale;
circle loss compared with a reference implementation.
"""

import math

import pytest
import torch

from tiepoints import build, load
from tiepoints.datasets.candidates import candidate_pairs
from tiepoints.describe import DenseDescriptor
from tiepoints.evaluation.systems import Options, patch_network, system
from tiepoints.extract import build_descriptor
from tiepoints.geometry import warp_image, warp_points
from tiepoints.models.desnet import (
    FILTER_FIELD,
    LCN_EPS,
    RECEPTIVE_FIELD,
    STRIDE,
    DesNet,
    local_contrast_normalization,
    pad_to_stride,
    sample,
)
from tiepoints.pyramid import build_pyramid
from tiepoints.structs import Keypoints
from tiepoints.training.losses import circle_loss
from tiepoints.weights import DATA, save


def lively(**options) -> DesNet:
    torch.manual_seed(3)
    net = DesNet(**options)
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-0.5, 0.5)
            norm.running_mean.uniform_(-0.2, 0.2)
    return net.eval()


@pytest.mark.parametrize("dim", [128, 64])
@pytest.mark.parametrize("size", [(64, 80), (61, 83), (8, 8), (1, 1), (3, 50)])
def test_any_size_and_fused_equals_unfused(dim, size):
    net = lively(dim=dim)
    image = torch.rand(2, 1, *size)
    with torch.inference_mode():
        plain, quick = net(image), net.fused()(image)
    assert plain.shape == (2, dim, math.ceil(size[0] / STRIDE), math.ceil(size[1] / STRIDE))
    torch.testing.assert_close(quick, plain, atol=1e-4, rtol=1e-4)


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="128"):
        DesNet(dim=96)
    with pytest.raises(ValueError, match="gray image"):
        lively()(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="bilinear, bicubic"):
        sample(torch.rand(1, 8, 4, 4), torch.zeros(1, 2), "nearest")
    with pytest.raises(ValueError, match="points"):
        sample(torch.rand(2, 8, 4, 4), torch.zeros(1, 2))


def test_translation_by_a_cell_translates_the_map_by_a_cell():
    net = lively()
    scene = torch.rand(1, 1, 320, 320)
    with torch.inference_mode():
        original, shifted = (
            net(scene[..., :288, :288]),
            net(scene[..., STRIDE : 288 + STRIDE, 2 * STRIDE : 288 + 2 * STRIDE]),
        )
    margin = math.ceil(RECEPTIVE_FIELD / 2 / STRIDE)  # cells affected by zero padding
    inner = slice(margin, 36 - margin - 2)
    expected = original[
        ..., slice(inner.start + 1, inner.stop + 1), slice(inner.start + 2, inner.stop + 2)
    ]
    torch.testing.assert_close(shifted[..., inner, inner], expected, atol=1e-5, rtol=1e-4)
    assert (original[..., inner, inner] - shifted[..., inner, inner]).abs().max() > 0.01
    # translated keypoints have the same descriptors
    xy = torch.tensor([[120.3, 130.9], [141.0, 127.5]])
    for mode in ("bilinear", "bicubic"):
        a, b = (
            sample(original, xy + torch.tensor([2.0 * STRIDE, STRIDE]), mode),
            sample(shifted, xy, mode),
        )
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_receptive_field_of_a_cell():
    net = lively().requires_grad_(False)
    image = torch.rand(1, 1, 320, 320, requires_grad=True)
    net(image)[0, :, 20, 20].square().sum().backward()
    ys, xs = image.grad[0, 0].nonzero().unbind(1)
    assert int(xs.max() - xs.min()) + 1 == RECEPTIVE_FIELD == 184
    assert (
        float(xs.max() + xs.min()) / 2
        == float(ys.max() + ys.min()) / 2
        == 20 * STRIDE + (STRIDE - 1) / 2
    )  # half-pixel convention


def test_receptive_field_of_the_filters():
    net = lively().requires_grad_(False)
    light = torch.rand(1, 1, 320, 320, requires_grad=True)
    maps = light
    for layer in net.downsample:
        maps = layer(maps)
    for layer in net.dilated:
        maps = maps + layer(maps)
    maps[0, :, 20, 20].square().sum().backward()
    xs = light.grad[0, 0].nonzero()[:, 1]
    assert int(xs.max() - xs.min()) + 1 == FILTER_FIELD == 134


def test_local_contrast_is_normalized():
    image = torch.rand(1, 1, 64, 96) * 0.2 + 0.4
    even = local_contrast_normalization(image)
    torch.testing.assert_close(
        local_contrast_normalization(0.5 * image + 0.1), even, atol=0.3, rtol=0
    )  # up to LCN_EPS
    cells = image[..., 8:48, 16:56]  # the 5 x 5 cells around the cell that starts at 24, 32
    center = image[..., 27:29, 35:37]
    at = even[..., 27:29, 35:37].mean()
    rough = (center.mean() - cells.mean()) / (cells.std(correction=0) + LCN_EPS)
    assert float(at) == pytest.approx(float(rough), abs=0.1)
    assert local_contrast_normalization(torch.full((1, 1, 16, 16), 0.7)).abs().max() < 1e-3


def test_sampling_is_exact_at_cells_and_linear_between_them():
    cells = torch.rand(1, 16, 5, 7)
    center = torch.tensor(
        [[2 * STRIDE + 3.5, 3 * STRIDE + 3.5], [3 * STRIDE + 3.5, 3 * STRIDE + 3.5]]
    )
    found = sample(
        cells, torch.cat([center, center.mean(dim=0, keepdim=True), torch.tensor([[-3.0, -3.0]])])
    )
    unit = torch.nn.functional.normalize
    raw = cells[0, :, 3, 2:4].T
    torch.testing.assert_close(found[:2], unit(raw, dim=1))
    torch.testing.assert_close(found[2], unit(raw.mean(dim=0), dim=0))
    torch.testing.assert_close(
        found[3], unit(cells[0, :, 0, 0], dim=0)
    )  # outside: the nearest cell
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(
        sample(cells, center, "bicubic"), unit(raw, dim=1), atol=1e-5, rtol=1e-4
    )
    assert sample(cells, torch.zeros(0, 2)).shape == (0, 16)


def test_odd_sizes_are_padded():
    image = torch.rand(1, 1, 9, 15)
    full = pad_to_stride(image)
    assert full.shape == (1, 1, 16, 16)
    assert torch.equal(full[..., :9, :15], image)
    assert torch.equal(full[0, 0, 15], torch.cat([image[0, 0, 8], image[0, 0, 8, -1:]]))
    assert pad_to_stride(full) is full


def test_descriptors_are_sampled_at_the_level_of_the_scale():
    net = lively()
    image = torch.rand(1, 1, 160, 200)
    pyramid = build_pyramid(image, up=1, down=2)
    describe = DenseDescriptor(net.fused(), net.dim)
    xy = torch.tensor([[80.0, 70.0]] * 4)
    scale = torch.tensor([0.9, 1.5, 3.0, 40.0])
    zeros = torch.zeros(4)
    found = describe(pyramid, Keypoints(xy, scale, zeros, zeros), 0)
    with torch.inference_mode():
        for i, level in enumerate((0, 1, 3, 3)):  # finest first
            wanted = sample(
                net(pyramid.levels[level].image), pyramid.levels[level].from_original(xy[:1])
            )
            torch.testing.assert_close(found[i : i + 1], wanted, atol=1e-4, rtol=1e-3)
    assert describe(pyramid, Keypoints.empty(), 0).shape == (0, 128)


def test_half_precision_names_and_files(tmp_path):
    net = lively(dim=64)
    save(net, tmp_path / "d.safetensors", half=True)
    describe = build_descriptor(str(tmp_path / "d.safetensors"), precision="bfloat16")
    assert isinstance(describe, DenseDescriptor)
    image = torch.rand(1, 1, 96, 96)
    points = Keypoints(torch.rand(5, 2) * 90, torch.ones(5), torch.zeros(5), torch.ones(5))
    rough = describe(build_pyramid(image), points, 0)
    exact = build_descriptor(load(tmp_path / "d.safetensors"), precision="float32")(
        build_pyramid(image), points, 0
    )
    assert rough.shape == (5, 64)
    assert ((rough * exact).sum(dim=1) > 0.99).all()
    for weights in (str(DATA / "keynet.safetensors"), load("sobelnet")):
        with pytest.raises(ValueError, match="has no descriptors; use it as the detector"):
            build_descriptor(weights)
    for net in (load("desnet"), load("hardnet")):
        with pytest.raises(ValueError, match="detects no keypoints; use it as the descriptor"):
            build(net, None)
    with pytest.raises(ValueError, match="patch descriptor"):
        patch_network("desnet")


def test_desnet_describes_all_detectors_and_patches_describe_sobelnet():
    image = (
        torch.nn.functional.interpolate(torch.rand(1, 1, 30, 40), size=(180, 240), mode="bicubic")
    ).clamp(0, 1)
    for detector, descriptor in (
        ("keynet-tiny", "desnet"),
        ("sobelnet", "desnet"),
        ("sobelnet", "hardnet"),
        ("sobelnet", "rootsift"),
    ):
        features = build(detector, descriptor, num_keypoints=60, device="cpu").extract(image)
        assert len(features) > 20
        torch.testing.assert_close(
            features.descriptors.norm(dim=1), torch.ones(len(features)), atol=1e-3, rtol=0
        )
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    features = system("orb+desnet", Options(num_keypoints=60))(image)
    assert features.descriptors.shape == (len(features), 128)


def test_shipped_weights_match_a_transformed_texture():
    """A texture shifted by a fraction of a cell, darkened and rotated by 20 degrees: most keypoints
    are matched correctly.
    """
    torch.manual_seed(1)
    scene = torch.nn.functional.interpolate(
        torch.rand(1, 1, 60, 60), size=(360, 360), mode="bicubic"
    ).clamp(0, 1)
    angle, center = math.radians(20), 179.5
    c, s = math.cos(angle), math.sin(angle)
    right, down = center - c * center + s * center + 3.3, center - s * center - c * center - 2.1
    H = torch.tensor([[c, -s, right], [s, c, down], [0, 0, 1]], dtype=torch.float64)
    other = 0.6 * warp_image(scene, H[None]) + 0.1
    net = load("desnet").fused()
    xy = torch.rand(150, 2) * 180 + 90
    a, b = sample(net(scene), xy), sample(net(other), warp_points(xy.double(), H).float())
    right = ((a @ b.T).argmax(dim=1) == torch.arange(150)).float().mean()
    torch.manual_seed(0)
    untrained = DesNet().eval().fused()
    chance = (
        sample(untrained(scene), xy)
        @ sample(untrained(other), warp_points(xy.double(), H).float()).T
    ).argmax(dim=1)
    assert right > 0.8
    assert (chance == torch.arange(150)).float().mean() < 0.5


def test_training_with_the_circle_loss_converges():
    """Thirty steps on one pair match the candidates."""
    torch.manual_seed(0)
    scene = torch.nn.functional.interpolate(
        torch.rand(1, 1, 32, 32), size=(192, 192), mode="bicubic"
    ).clamp(0, 1)
    images = torch.cat(
        [scene, 0.7 * scene.roll((5, -3), (2, 3)) + 0.1 + 0.03 * torch.randn_like(scene)]
    )
    xy = torch.rand(40, 2) * 110 + 40
    same, other = candidate_pairs(
        xy, xy + torch.tensor([-3.0, 5.0]), torch.tensor([[1, 0, -3.0], [0, 1, 5], [0, 0, 1]])
    )
    net = DesNet()
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    curve = []
    for _ in range(30):
        maps = net(images)
        loss, numbers = circle_loss(
            sample(maps[:1], xy) @ sample(maps[1:], xy + torch.tensor([-3.0, 5.0])).T, same, other
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(numbers)
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    assert (
        curve[-1]["positive"] - curve[-1]["negative"]
        > curve[0]["positive"] - curve[0]["negative"] + 0.1
    )


# ---- circle loss


def slow_circle(similarity, positive, negative, margin, scale):
    losses = []
    for s, p, n in zip(similarity.tolist(), positive.tolist(), negative.tolist(), strict=True):
        near = [
            scale * max(0, 1 + margin - v) * -(v - (1 - margin))
            for v, yes in zip(s, p, strict=True)
            if yes
        ]
        far = [
            scale * max(0, v + margin) * (v - margin) for v, yes in zip(s, n, strict=True) if yes
        ]
        if near and far:
            z = math.log(sum(math.exp(v) for v in near)) + math.log(sum(math.exp(v) for v in far))
            losses.append(math.log1p(math.exp(-abs(z))) + max(z, 0))
    return sum(losses) / len(losses)


def test_circle_loss_equals_reference_implementation():
    torch.manual_seed(0)
    similarity = torch.rand(12, 15, dtype=torch.float64) * 2 - 1
    kind = torch.randint(0, 6, (12, 15))
    positive, negative = kind == 0, kind > 1
    positive[3] = False  # a row without a positive is ignored
    loss, numbers = circle_loss(similarity, positive, negative, margin=0.3, scale=20.0)
    assert float(loss) == pytest.approx(
        slow_circle(similarity, positive, negative, 0.3, 20.0), rel=1e-6
    )
    assert numbers["rows"] == int((positive.any(1) & negative.any(1)).sum())


def test_circle_loss_weights_hard_pairs_most():
    similarity = torch.tensor([[0.6, 0.7, 0.3, -0.5]], requires_grad=True)
    positive, negative = (
        torch.tensor([[True, False, False, False]]),
        torch.tensor([[False, True, True, True]]),
    )
    circle_loss(similarity, positive, negative)[0].backward()
    pull, hard, easy, far = similarity.grad[0].tolist()
    assert pull < 0 < easy < hard
    assert hard > 100 * easy
    assert far == 0  # already beyond the margin
    left_out = torch.tensor([[0.6, 0.7, 0.3, -0.5]], requires_grad=True)
    circle_loss(left_out, positive, torch.tensor([[False, False, True, True]]))[0].backward()
    assert left_out.grad[0, 1] == 0  # small displacements are ignored


def test_circle_loss_of_empty_and_invalid_inputs():
    similarity = torch.rand(3, 4, requires_grad=True)
    none = torch.zeros(3, 4, dtype=torch.bool)
    loss, numbers = circle_loss(similarity, none, ~none)
    loss.backward()
    assert loss.item() == 0 == numbers["rows"]
    assert (similarity.grad == 0).all()
    with pytest.raises(ValueError, match="three"):
        circle_loss(torch.rand(3, 4), none, none[:2])


def test_candidates_are_positives_negatives_or_ignored():
    H = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))  # b is twice as large
    xy_a = torch.tensor([[10.0, 10.0]])
    xy_b = torch.tensor([[20.0, 20.0], [21.5, 20.0], [23.0, 20.0], [32.0, 20.0], [37.0, 20.0]])
    same, other = candidate_pairs(xy_a, xy_b, H)
    assert same.tolist() == [
        [True, True, False, False, False]
    ]  # 3 px in b are too far, though 1.5 in a
    assert other.tolist() == [[False, False, False, False, True]]  # 12 px in b are 6 in a
