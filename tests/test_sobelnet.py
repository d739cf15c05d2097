"""SobelNet: shapes and limits, sum over scales, threshold, fused equals unfused; the packed last
layer; the Gaussian loss.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import tiepoints.models.sobelnet as module
from tiepoints import build
from tiepoints.filters import resize
from tiepoints.geometry import warp_image
from tiepoints.kernels.single_channel import SingleChannelConv2d
from tiepoints.models.sobelnet import GRADIENTS, SobelNet, cut, gradients
from tiepoints.training.losses import gaussian_likeness, gaussian_loss
from tiepoints.weights import load, save


def lively(**options) -> SobelNet:
    """A network whose normalization differs from the initial one."""
    torch.manual_seed(2)
    net = SobelNet(**options)
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-0.5, 0.5)
            norm.running_mean.uniform_(-0.02, 0.02)
            norm.running_var.uniform_(0.0005, 0.01)
    return net.eval()


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(
    "shape", [(1, 1, 48, 64), (3, 1, 37, 41), (2, 1, 5, 1), (1, 1, 1, 1), (1, 1, 8, 19)]
)
def test_any_size_and_batch_and_fused_equals_unfused(kernel_size, shape):
    net = lively(kernel_size=kernel_size)
    image = torch.rand(shape)
    with torch.inference_mode():
        plain, quick = net(image), net.fused()(image)
        alone = torch.cat([net(one[None]) for one in image])
    assert plain.shape == shape
    error = 1e-4 * float(plain.max())
    torch.testing.assert_close(quick, plain, atol=error, rtol=0)
    torch.testing.assert_close(alone, plain, atol=error, rtol=0)


@pytest.mark.parametrize("pixels", [1, 700, 2000])
def test_tiling_does_not_change_the_result(pixels, monkeypatch):
    net = lively()
    image = torch.rand(2, 1, 61, 70)
    monkeypatch.setattr(module, "TILE_PIXELS", pixels)
    with torch.inference_mode():
        plain, quick = net(image), net.fused()(image)
    torch.testing.assert_close(quick, plain, atol=1e-4 * float(plain.max()), rtol=0)


def test_parameters_and_settings():
    net = SobelNet()
    assert sum(p.numel() for p in net.parameters()) == (3 * 8 * 9 + 8) + 2 * (
        8 * 8 * 9 + 8
    ) + 3 * 16 + (8 * 9 + 1)
    assert sum(p.numel() for p in SobelNet(kernel_size=5).parameters()) > 2 * 1513
    for wrong in ({"kernel_size": 2}, {"kernel_size": 0}, {"ratio": 1.0}, {"ratio": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SobelNet(**wrong)
    with pytest.raises(ValueError, match="gray image"):
        net(torch.rand(1, 3, 20, 20))


def test_gradients_of_a_ramp():
    x = torch.arange(30.0).expand(1, 1, 20, 30)
    y = torch.arange(20.0)[:, None].expand(1, 1, 20, 30)
    dx, dy, magnitude = (g[..., 5:-5, 5:-5] for g in gradients(3 * x - 4 * y))
    assert GRADIENTS == ("dx", "dy", "magnitude")
    for found, wanted in ((dx, 3.0), (dy, -4.0), (magnitude, 5.0)):
        torch.testing.assert_close(found, torch.full_like(found, wanted))


def test_constant_image_has_a_finite_gradient():
    image = torch.full((1, 1, 9, 9), 0.5, requires_grad=True)
    sum(g.sum() for g in gradients(image)).backward()
    assert torch.isfinite(image.grad).all()


def test_scales_are_summed_with_shared_filters():
    """Explicitly: the same blocks at 1, 1/sqrt 2, 1/2 of the image, resized and added, then one
    convolution.
    """
    net = lively(ratio=0.0)
    image = torch.rand(1, 1, 40, 56)
    with torch.inference_mode():
        levels = net.level_images(image)
        assert [tuple(level.shape[-2:]) for level in levels] == [(40, 56), (28, 40), (20, 28)]
        fine, middle, coarse = (net.blocks(torch.cat(gradients(level), 1)) for level in levels)
        total = fine + resize(middle + resize(coarse, (28, 40)), (40, 56))
        assert total.shape == (1, 8, 40, 56)
        torch.testing.assert_close(net(image), F.softplus(net.last(total)))


def test_scores_below_a_fraction_of_the_maximum_are_zero():
    score = torch.tensor([[10.0, 0.9, 1.1], [0.5, 1.0, 9.0]]).view(2, 1, 1, 3)
    torch.testing.assert_close(
        cut(score, 0.1).view(2, 3), torch.tensor([[10.0, 0.0, 1.1], [0.0, 1.0, 9.0]])
    )  # of its own image
    assert cut(score, 0.0) is score
    image = torch.rand(1, 1, 40, 40)
    net, whole = lively(ratio=0.5), lively(ratio=0.0)
    with torch.inference_mode():
        part, full = net(image), whole(image)
    assert torch.equal(part, torch.where(full < 0.5 * full.max(), 0.0, full))
    assert 0 < (part > 0).float().mean() < 1
    assert (net.train()(image) > 0).all()  # training uses every score


@pytest.mark.parametrize("width", [1, 7, 8, 9, 31])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_packed_convolution_equals_torch(width, kernel):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 1, kernel, padding=kernel // 2)
    maps = torch.rand(2, 6, 11, width)
    with torch.no_grad():
        torch.testing.assert_close(
            SingleChannelConv2d(conv.weight, conv.bias)(maps), conv(maps), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            SingleChannelConv2d(conv.weight)(maps),
            F.conv2d(maps, conv.weight, padding=kernel // 2),
            atol=1e-5,
            rtol=1e-5,
        )


def test_weights_file_keeps_settings(tmp_path):
    net = lively(kernel_size=5, ratio=0.2)
    net.offset = (0.25, -0.5)
    save(net, tmp_path / "s.safetensors")
    again = load(tmp_path / "s.safetensors")
    image = torch.rand(1, 1, 30, 30)
    assert again.settings == net.settings
    assert tuple(again.offset) == net.offset
    with torch.inference_mode():
        assert torch.equal(again(image), net(image))


def test_shipped_weights_are_repeatable_on_a_rotated_and_darkened_texture():
    torch.manual_seed(0)
    image = F.interpolate(torch.rand(1, 1, 40, 40), size=(320, 320), mode="bicubic").clamp(0, 1)
    extract = build("sobelnet", None, single_scale=True, num_keypoints=100, device="cpu").extract
    xy = extract(image).xy
    assert len(xy) == 100
    rotated = extract(0.6 * image.rot90(1, (-2, -1)) + 0.1).xy
    mapped = torch.stack([image.shape[-1] - 1 - rotated[:, 1], rotated[:, 0]], dim=1)
    again = (torch.cdist(mapped, xy).amin(dim=1) <= 3).float().mean()
    by_chance = (torch.cdist(torch.rand(100, 2) * 290 + 15, xy).amin(dim=1) <= 3).float().mean()
    assert by_chance < 0.1
    assert again > 0.6


# ---- Gaussian loss


def blob(size: int, at: tuple[float, float], sigma: float, height: float = 1.0) -> torch.Tensor:
    axis = torch.arange(size, dtype=torch.float32)
    return (
        height
        * torch.exp(-((axis[None] - at[0]) ** 2 + (axis[:, None] - at[1]) ** 2) / (2 * sigma**2))[
            None, None
        ]
    )


def test_gaussian_similarity_is_the_cosine():
    maps = torch.rand(2, 1, 24, 26)
    found = gaussian_likeness(maps, 7, 1.3)
    axis = torch.arange(7.0) - 3
    template = torch.exp(-(axis[None] ** 2 + axis[:, None] ** 2) / (2 * 1.3**2))
    for i, y, x in ((0, 10, 12), (1, 4, 20), (1, 3, 3)):
        around = maps[i, 0, y - 3 : y + 4, x - 3 : x + 4]
        wanted = (around * template).sum() / (around.norm() * template.norm())
        assert float(found[i, 0, y, x]) == pytest.approx(float(wanted), abs=1e-5)
    assert float(gaussian_likeness(5 * blob(31, (15, 15), 1.5))[0, 0, 15, 15]) == pytest.approx(
        1, abs=1e-5
    )


def slow_gaussian(score, other, visible, window, sigma):
    """One direction of the loss, keypoint by keypoint."""
    half, size = window // 2, score.shape[-1]

    def peaks(m, seen):
        out = []
        for y in range(size):
            for x in range(size):
                around = m[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1]
                if m[y, x] == around.max() and seen[y, x] and m[y, x] > 0:
                    out.append((y, x))
        return out

    ones = torch.ones_like(score, dtype=torch.bool)
    own, theirs, both = (
        peaks(score, visible > 0.999),
        peaks(other, ones),
        peaks(score + other, visible > 0.999),
    )

    def near(p, group):
        return any(abs(p[0] - q[0]) <= 2 and abs(p[1] - q[1]) <= 2 for q in group)

    template = torch.tensor(
        [
            [math.exp(-(i * i + j * j) / (2 * sigma**2)) for j in range(-half, half + 1)]
            for i in range(-half, half + 1)
        ]
    )
    padded = F.pad(score[None, None], (half,) * 4)[0, 0]
    total, shape = 0.0, 0.0
    for y, x in both:
        if near((y, x), own) and near((y, x), theirs):
            around = padded[y : y + window, x : x + window]
            weight = float(score[y, x] + other[y, x]) ** 0.25
            total += weight
            shape += weight * (
                1 - float((around * template).sum() / (around.norm() * template.norm()))
            )
    strength = sum(float(score[p]) ** 0.25 for p in own)
    alone = sum(float(score[p]) ** 0.25 for p in own if not near(p, theirs))
    return shape / max(total, 1e-6), alone / strength


def test_gaussian_loss_equals_reference_implementation():
    torch.manual_seed(4)
    a = torch.rand(1, 1, 48, 48) ** 4
    b = (a + 0.3 * torch.rand(1, 1, 48, 48)).roll((1, 0), (-2, -1))
    H = torch.eye(3, dtype=torch.float64)[None]
    _, numbers = gaussian_loss(a, b, H, window=9, sigma=1.2, border=6)
    frame = F.pad(torch.ones(36, 36), (6, 6, 6, 6))
    inside_a, inside_b = a[0, 0] * frame, b[0, 0] * frame
    ways = [
        slow_gaussian(inside_a, inside_b, frame, 9, 1.2),
        slow_gaussian(inside_b, inside_a, frame, 9, 1.2),
    ]
    assert numbers["shape"] == pytest.approx((ways[0][0] + ways[1][0]) / 2, abs=1e-4)
    assert numbers["alone"] == pytest.approx((ways[0][1] + ways[1][1]) / 2, abs=1e-4)
    assert 0 < numbers["alone"] < 1


def test_gaussian_loss_is_small_only_if_views_agree_on_gaussians():
    size = 96
    H = torch.eye(3, dtype=torch.float64)[None]
    H[0, 0, 2] = 5.0
    spots = [(30.0, 30.0), (60.0, 40.0), (40.0, 65.0)]
    a = sum(blob(size, p, 1.5) for p in spots)
    moved = warp_image(a, H)
    good = gaussian_loss(a, moved, H)[1]
    assert good["loss"] < 1e-3
    assert good["peaks"] == 3
    broad = sum(blob(size, p, 4.0) for p in spots)
    wide = gaussian_loss(broad, warp_image(broad, H), H)[1]
    assert wide["shape"] > 0.2
    assert wide["alone"] < 1e-3
    shifted = gaussian_loss(a, a, H)[1]  # the second view does not follow the scene
    assert shifted["alone"] > 0.9
    lonely = gaussian_loss(a + blob(size, (70.0, 70.0), 1.5, 0.5), moved, H)[1]
    assert lonely["alone"] == pytest.approx(
        0.5**0.25 / (3 + 0.5**0.25) / 2, abs=0.01
    )  # one direction only


def test_gaussian_loss_is_scale_invariant_and_has_a_gradient():
    torch.manual_seed(0)
    a = (torch.rand(1, 1, 64, 64) ** 3).requires_grad_()
    b = (a.detach() * (0.5 + torch.rand(1, 1, 64, 64))).requires_grad_()
    H = torch.eye(3, dtype=torch.float64)[None]
    loss, numbers = gaussian_loss(a, b, H)
    more = gaussian_loss(100 * a, 100 * b, H)[1]
    assert more["loss"] == pytest.approx(numbers["loss"], rel=1e-3)
    loss.backward()
    with torch.no_grad():
        nearer = gaussian_loss((a - 0.05 * a.grad / a.grad.abs().max()).clamp(min=0), b, H)[1][
            "loss"
        ]
    assert nearer < numbers["loss"]
    assert torch.isfinite(a.grad).all()


def test_training_with_the_gaussian_loss_converges():
    """Thirty steps on one pair reduce both terms."""
    torch.manual_seed(0)
    net = SobelNet()
    scene = F.interpolate(torch.rand(1, 1, 24, 24), size=(144, 144), mode="bicubic").clamp(0, 1)
    H = torch.tensor(
        [[[0.96, -0.26, 20.0], [0.26, 0.96, -16.0], [0.0, 0.0, 1.0]]], dtype=torch.float64
    )
    pair = torch.cat([scene, 0.8 * warp_image(scene, H) + 0.05])
    seen = torch.ones_like(scene)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    curve = []
    for _ in range(30):
        a, b = net(pair).chunk(2)
        loss, numbers = gaussian_loss(a, b, H, mask_a=seen, mask_b=warp_image(seen, H))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(numbers)
    first, last = (
        {key: sum(n[key] for n in part) / 5 for key in ("shape", "alone")}
        for part in (curve[:5], curve[-5:])
    )
    assert last["shape"] < 0.7 * first["shape"]
    assert last["alone"] < 0.9 * first["alone"]


def test_gaussian_loss_rejects_invalid_inputs():
    H = torch.eye(3, dtype=torch.float64)[None]
    with pytest.raises(ValueError, match="equal shape"):
        gaussian_loss(torch.rand(1, 1, 64, 64), torch.rand(1, 1, 64, 32), H)
    for wrong in ({"window": 8}, {"window": 1}, {"sigma": 0.0}):
        with pytest.raises(ValueError, match="window must be odd"):
            gaussian_loss(torch.rand(1, 1, 64, 64), torch.rand(1, 1, 64, 64), H, **wrong)
    zeros = torch.zeros(1, 1, 64, 64, requires_grad=True)
    loss, _ = gaussian_loss(zeros, zeros, H)
    loss.backward()
    assert torch.isfinite(zeros.grad).all()
