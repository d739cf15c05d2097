"""Key.Net: its published size, all arguments, all image sizes."""

from __future__ import annotations

import pytest
import torch

from tiepoints.models.keynet import (
    HANDCRAFTED_SETS,
    KeyNet,
    handcrafted_channels,
    pyramid_level_size,
)


def seeded(**arguments) -> KeyNet:
    net = KeyNet(**arguments)
    net.initialize(torch.Generator().manual_seed(3))
    return net.eval()


def picture(height: int = 33, width: int = 41, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 1, height, width, generator=torch.Generator().manual_seed(seed))


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_published_sizes():
    assert count(KeyNet()) == 5873
    assert count(KeyNet.tiny()) == 253


def test_one_level_has_the_filters_of_all():
    """On a constant image all levels have equal maps, so that the scores are equal."""
    net = seeded(num_filters=4, scale_factor=1.5)
    one = net.one_level()
    assert (one.num_levels, one.training) == (1, False)
    assert count(one) == count(net) - 2 * 4 * 25
    assert torch.equal(one.blocks[0][0].weight, net.blocks[0][0].weight)
    constant = torch.full((1, 1, 60, 60), 0.3)
    with torch.no_grad():
        middle = (..., slice(25, 35), slice(25, 35))
        assert torch.allclose(one(constant)[middle], net(constant)[middle], atol=1e-5)
        assert not torch.allclose(one(picture()), net(picture()))
    same = one.one_level()
    assert same is not one
    assert torch.equal(same.last.weight, one.last.weight)
    assert count(KeyNet.light()) == 5873 - 16 * 25


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({"num_filters": 4}, 10 * 25 * 4 + 4 + 8 + 2 * (4 * 25 * 4 + 4 + 8) + 12 * 25 + 1),
        ({"num_blocks": 1}, 10 * 25 * 8 + 8 + 16 + 24 * 25 + 1),
        ({"kernel_size": 3}, 10 * 9 * 8 + 8 + 16 + 2 * (8 * 9 * 8 + 8 + 16) + 24 * 9 + 1),
        ({"num_levels": 1}, 5873 - 16 * 25),
        ({"scale_factor": 1.5}, 5873),
        ({"handcrafted": "first"}, 5873 + 5 * 26),
        ({"handcrafted": "second"}, 5873 + 5 * 26),
        ({"handcrafted": "none"}, 5873 + 10 * 26),
    ],
)
def test_every_argument_changes_the_result(arguments, parameters):
    net = seeded(**arguments)
    assert count(net) == parameters
    image = picture()
    with torch.no_grad():
        assert not torch.allclose(net(image), seeded()(image))


def test_merge_changes_the_result():
    plain, merged = (
        seeded(num_filters=1, num_levels=1, merge=False),
        seeded(num_filters=1, num_levels=1),
    )
    assert count(merged) - count(plain) == 26
    with torch.no_grad():
        assert not torch.allclose(plain(picture()), merged(picture()))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_filters": 0},
        {"num_filters": 1.5},
        {"num_blocks": 0},
        {"num_levels": 0},
        {"kernel_size": 4},
        {"kernel_size": 0},
        {"kernel_size": -3},
        {"scale_factor": 1.0},
        {"scale_factor": 0.5},
        {"scale_factor": float("nan")},
        {"num_levels": 1, "scale_factor": 1.2},
        {"handcrafted": "all"},
        {"merge": False},
        {"merge": False, "num_filters": 1},
        {"merge": False, "num_levels": 1},
    ],
)
def test_invalid_arguments_raise(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        KeyNet(**arguments)


@pytest.mark.parametrize("name", HANDCRAFTED_SETS)
def test_handcrafted_sets(name):
    net = seeded(handcrafted=name)
    with torch.no_grad():
        assert net.first(picture()).shape == (1, 10, 33, 41)
        assert net(picture()).shape == (1, 1, 33, 41)


def test_handcrafted_channels_of_known_images():
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    names = HANDCRAFTED_SETS["both"]
    # 0.5 x^2 + 2 x y: dx = x + 2y, dy = 2x, dxx = 1, dxy = 2, dyy = 0
    features = torch.cat(handcrafted_channels((0.5 * x**2 + 2 * x * y)[None, None]), dim=1)[
        0, :, 8, 9
    ]
    at = dict(zip(names, features.tolist(), strict=True))
    wanted = {"dx": 25, "dy": 18, "dx^2": 625, "dy^2": 324, "dx*dy": 450}
    wanted |= {"dxy": 2, "dxy^2": 4, "dxx": 1, "dyy": 0, "dxx*dyy": 0}
    assert at == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (13, 1), (3, 5), (17, 31)])
@pytest.mark.parametrize("make", [seeded, KeyNet.tiny], ids=["full", "tiny"])
def test_any_size(size, make):
    with torch.no_grad():
        score = make().eval()(picture(*size))
    assert score.shape == (1, 1, *size)
    assert torch.isfinite(score).all()
    assert (score >= 0).all()


def test_level_sizes():
    assert pyramid_level_size(100, 77, 1.2) == (83, 64)
    assert pyramid_level_size(1, 1, 1.2) == (1, 1)
    sizes = [tuple(level.shape[-2:]) for level in seeded().level_images(picture(100, 77))]
    assert sizes == [(100, 77), (83, 64), (69, 53)]


def test_batch_equals_single():
    net, images = seeded(), picture(batch=3)
    with torch.no_grad():
        together = net(images)
        alone = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(33, 41), (1, 33, 41), (1, 3, 33, 41), (1, 1, 1, 33, 41)])
def test_invalid_shape_raises(shape):
    with pytest.raises(ValueError, match="gray"):
        seeded()(torch.rand(shape))


def test_initialization_is_reproducible():
    first, second = seeded(), seeded()
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    second.initialize(torch.Generator().manual_seed(4))
    assert not torch.equal(first.last.weight, second.last.weight)
    assert first.last.bias.abs().max() == 0
    spread = first.blocks[1][0].weight.std().item()
    assert spread == pytest.approx((2 / 200) ** 0.5, rel=0.1)  # He: 2 / fan-in


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (33, 41), (40, 48)])
@pytest.mark.parametrize("make", [seeded, KeyNet.tiny], ids=["full", "tiny"])
def test_fused_equals_unfused(size, make):
    net = make()
    net.train()
    with torch.no_grad():
        for seed in range(3):  # statistics other than 0 and 1
            net(picture(24, 24, 4, seed))
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            net.fused()(picture(*size)), net(picture(*size)), rtol=1e-4, atol=1e-5
        )
