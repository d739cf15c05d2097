"""REKD: shapes, equivariance of scores and angles, the fused network, group sizes, weights."""

import math

import pytest
import torch

from tiepoints import load
from tiepoints.filters import gaussian_blur
from tiepoints.models import rekd as module
from tiepoints.models.rekd import REKD, histogram_angle
from tiepoints.weights import save


def lively(net: REKD, seed: int = 0) -> REKD:
    """The network in evaluation mode with statistics as after training."""
    rng = torch.Generator().manual_seed(seed)
    net.initialize(rng)
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            layer.running_mean.normal_(0, 0.2, generator=rng)
            layer.running_var.uniform_(0.5, 2, generator=rng)
            with torch.no_grad():
                layer.bias.normal_(0, 0.2, generator=rng)
    return net.eval()


def picture(height: int = 60, width: int = 76, seed: int = 1) -> torch.Tensor:
    image = gaussian_blur(
        torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed)), 1.5
    )
    return (image - image.min()) / (image.max() - image.min())


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((a - b + math.pi).remainder(2 * math.pi) - math.pi).abs()


@pytest.mark.parametrize("group", [1, 3, 8, 36])
@pytest.mark.parametrize("variant", ["default", "published"])
@pytest.mark.parametrize("size", [(1, 1), (5, 70), (33, 40)])
def test_shapes_ranges_and_any_size(group, variant, size):
    net = lively(REKD(group=group, variant=variant))
    with torch.inference_mode():
        score, histogram = net(torch.rand(2, 1, *size))
    assert score.shape == (2, 1, *size)
    assert histogram.shape == (2, group, *size)
    assert (score >= 0).all()
    torch.testing.assert_close(histogram.sum(dim=1), torch.ones(2, *size))


@pytest.mark.parametrize(("group", "dims"), [(36, (2, 2, 2)), (8, (1, 2, 3)), (4, (2, 1, 1))])
def test_number_of_parameters_follows_the_published_formula(group, dims):
    a, b, c = dims
    expected = (
        11 * a
        + 2 * a
        + 11 * group * a * b
        + 2 * b
        + 11 * group * b * c
        + 2 * c
        + group * c
        + 6 * c
        + 3 * c
        + 1
    )
    assert sum(p.numel() for p in REKD(group=group, dims=dims).parameters()) == expected
    if group == 36:
        assert expected == 3293


@pytest.mark.parametrize("group", [8, 36])
def test_rotations_by_90_degrees_rotate_scores_and_shift_angles(group):
    net, image = lively(REKD(group=group)), picture(64, 64)
    with torch.inference_mode():
        (score, histogram), (rotated, moved) = net(image), net(image.rot90(1, (-2, -1)))
    assert (rotated - score.rot90(1, (-2, -1))).abs().max() < 1e-4 * score.max()
    # counterclockwise is -90 degrees in our convention
    expected = histogram_angle(histogram).rot90(1, (-2, -1)) - math.pi / 2
    assert (difference(histogram_angle(moved), expected) < 1e-2).float().mean() > 0.99


def test_angle_is_exact_to_a_fraction_of_a_bin():
    bins = torch.arange(12, dtype=torch.float64)
    for wanted in (0.0, 4.0, 7.3, 11.6):
        logits = 3 * torch.cos((bins - wanted) * 2 * math.pi / 12)
        angle = histogram_angle(logits.softmax(0).view(1, 12, 1, 1)).item()
        assert difference(
            torch.tensor(angle), torch.tensor(-wanted * 2 * math.pi / 12)
        ) < math.radians(1)
        assert 0 <= angle < 2 * math.pi
    assert histogram_angle(torch.full((1, 12, 2, 2), 1 / 12)).isfinite().all()


@pytest.mark.parametrize("variant", ["default", "published"])
@pytest.mark.parametrize("size", [(60, 76), (37, 91), (1, 9), (130, 7)])
@pytest.mark.parametrize("pixels", [10**6, 900])
@pytest.mark.parametrize("quick", [1, 1000])
def test_fused_equals_unfused_for_any_number_of_tiles(variant, size, pixels, quick, monkeypatch):
    monkeypatch.setattr(module, "TILE_VALUES", 24 * pixels)
    monkeypatch.setattr(module, "WINOGRAD_CHANNELS", quick)
    # a small range avoids saturated histograms, in which the softmax loses differences of the
    # logits
    net = lively(REKD(group=8, dims=(2, 3, 2), variant=variant, input_range=1.0))
    image = torch.cat([picture(*size), picture(*size, seed=2)])
    with torch.inference_mode():
        score, histogram = net(image)
        fast, angle = net.fused()(image)
    torch.testing.assert_close(fast, score, atol=1e-4 * float(score.max()), rtol=1e-4)
    off = difference(angle, histogram_angle(histogram))
    assert (off < 1e-3).float().mean() > 0.995  # two equal bins may be exchanged


def test_winograd_is_used_for_the_published_width_only():
    assert REKD().fused().winograd
    assert not REKD(group=12).fused().winograd
    net, image = lively(REKD(group=36)), picture()
    with torch.inference_mode():
        wide = net.fused().double()  # only float32 uses Winograd
        wide.reference.double()
        slow = wide(image.double())[0].float()
        torch.testing.assert_close(
            net.fused()(image)[0], slow, atol=1e-4 * float(slow.max()), rtol=1e-4
        )


def test_larger_group_is_initialized_from_a_smaller_one():
    small = lively(REKD(group=12))
    large = small.regrouped(36)
    assert large.settings["group"] == 36
    image = picture()
    with torch.inference_mode():
        few, many = small(image)[0].flatten(), large(image)[0].flatten()
    assert torch.corrcoef(torch.stack([few, many]))[0, 1] > 0.97
    restored = large.regrouped(12)
    for (name, one), other in zip(
        small.state_dict().items(), restored.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4, msg=name)


def test_save_and_load(tmp_path):
    net = lively(REKD(group=8, dims=(1, 2, 2), scale_factor=1.3, input_range=1.0))
    net.offset = (0.25, -0.5)
    save(net, tmp_path / "mine.safetensors")
    again = load(tmp_path / "mine.safetensors")
    assert again.settings == net.settings
    assert again.offset == net.offset
    with torch.inference_mode():
        assert torch.equal(again(picture())[0], net(picture())[0])


@pytest.mark.parametrize(
    "options",
    [
        {"group": 0},
        {"dims": (2, 2)},
        {"dims": (2, 0, 2)},
        {"scale_factor": 1.0},
        {"num_levels": 0},
        {"variant": "mine"},
        {"input_range": 0.0},
    ],
)
def test_impossible_settings_raise(options):
    with pytest.raises(ValueError, match=r"must|are|at least"):
        REKD(**options)


def test_color_images_raise():
    with pytest.raises(ValueError, match="gray"):
        REKD(group=4)(torch.rand(1, 3, 20, 20))
