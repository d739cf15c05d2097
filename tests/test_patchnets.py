"""HardNet, HyNet, SOSNet: compared with kornia, fused with unfused, unusual patches, fast
normalization with a reference implementation.
"""

import pytest
import torch
import torch.nn.functional as F

from tiepoints.models.patchnets import (
    FilterResponseNorm,
    HardNet,
    HardNetContext,
    HardNetLight,
    HyNet,
    SOSNet,
    ThresholdedLinear,
    _ResponseNorm,
    parts_of,
    to_side,
    unit,
)
from tiepoints.weights import load

NETS = {
    "hardnet": HardNet,
    "hardnet-light": HardNetLight,
    "hardnet-context": HardNetContext,
    "hynet": HyNet,
    "sosnet": SOSNet,
}
PARAMETERS = {"hardnet": 1_334_560, "hynet": 1_336_355, "sosnet": 1_334_560}  # published
# a 5 x 5 filter in place of 3 x 3 in the first layer, and 4 x 4 in place of 8 x 8 in the last one
PARAMETERS["hardnet-light"] = 1_334_560 + 32 * (25 - 9) - 128 * 128 * (64 - 16)
# twice the layers before the last one; 64 dimensions of the patch, twice 32 by filters of 2 x 2
PARAMETERS["hardnet-context"] = (
    2 * (PARAMETERS["hardnet-light"] - 128 * 128 * 16) + 64 * 128 * 16 + 2 * 32 * 128 * 4
)


#: Columns of the descriptors of ``HardNetContext`` that describe each patch.
PART_COLUMNS = (slice(0, 64), slice(64, 96), slice(96, 128))


def random_net(cls, seed: int = 0):
    """A network without default values, also in statistics, scales and thresholds."""
    torch.manual_seed(seed)
    net = cls()
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.3, 2)
            elif name.endswith(("running_mean", "bias")):
                value.normal_(0, 0.2)
            elif name.endswith("tau"):
                value.uniform_(-1, 0)
            elif (
                name.endswith("weight")
                and value.shape[0] == 1
                and value.ndim == 4
                and value.shape[2:] == (1, 1)
            ):
                value.uniform_(0.5, 1.5)
    return net.eval()


@pytest.fixture(params=NETS)
def name(request):
    return request.param


def textured(n: int, side: int = 32, seed: int = 1, channels: int = 1):
    """Smooth random patches of very different brightness and contrast."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 6, 6, generator=rng)
    patches = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return patches * torch.linspace(0.05, 1, n)[:, None, None, None]


def test_shapes_lengths_and_sizes(name):
    net = random_net(NETS[name])
    channels = len(net.spec.reach)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    out = net(textured(5, channels=channels))
    assert out.shape == (5, 128)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=1), torch.ones(5))
    assert net(torch.zeros(0, channels, 32, 32)).shape == (0, 128)
    for one in (net, net.fused()):
        assert one(torch.zeros(0, channels, 32, 32)).shape == (0, 128)
        with pytest.raises(ValueError, match=rf"\(N,{channels},P,P\).*\(2, 2, 32, 32\)"):
            one(torch.zeros(2, 2, 32, 32))
        with pytest.raises(ValueError, match="P,P"):
            one(torch.zeros(2, channels, 32, 31))


@pytest.mark.parametrize("trained", [True, False])
def test_constant_patches_have_finite_unit_vectors(name, trained):
    net = random_net(NETS[name]) if trained else NETS[name]().eval()
    for level in (0.0, 0.5, 1.0):
        out = net(torch.full((3, len(net.spec.reach), 32, 32), level))
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out.norm(dim=1), torch.ones(3))


def test_batch_equals_single_for_any_patch_size(name):
    net = random_net(NETS[name])
    channels = len(net.spec.reach)
    patches = textured(4, channels=channels)
    torch.testing.assert_close(
        torch.cat([net(p[None]) for p in patches]), net(patches), atol=1e-5, rtol=0
    )
    big = textured(4, 64, channels=channels)
    torch.testing.assert_close(net(big), net(F.avg_pool2d(big, 2)))
    similar = (net(textured(4, 65, channels=channels)) * net(big)).sum(dim=1)
    assert (similar > 0.98).all()


def test_hardnet_and_sosnet_are_gain_and_offset_invariant():
    for cls in (HardNet, SOSNet):
        net = random_net(cls)
        patches = 0.2 + 0.6 * textured(4)[3:]
        torch.testing.assert_close(net(patches), net(0.5 * patches + 0.1), atol=1e-3, rtol=0)


def test_fused_equals_unfused(name):
    net = random_net(NETS[name])
    patches = textured(16, channels=len(net.spec.reach))
    with torch.inference_mode():
        plain, folded = net(patches), net.fused()(patches)
        half = net.fused(torch.bfloat16)(patches)
    torch.testing.assert_close(folded, plain, atol=2e-5, rtol=0)
    assert half.dtype == torch.float32
    assert ((half * plain).sum(dim=1) > 0.99).all()
    assert net.training is False
    assert any(key.endswith("running_mean") for key in net.state_dict())


def test_response_norm_equals_reference_implementation():
    torch.manual_seed(3)
    norm, limit = FilterResponseNorm(5).double(), ThresholdedLinear(5).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        limit.tau.uniform_(-1, 0.5)
    maps = torch.randn(3, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    inputs = [maps, norm.weight, norm.bias, limit.tau]
    slow, fast = (
        limit(norm(maps)),
        _ResponseNorm.apply(maps, norm.weight, norm.bias, limit.tau, norm.eps),
    )
    torch.testing.assert_close(fast, slow)
    pull = torch.randn_like(slow)
    for a, b in zip(
        torch.autograd.grad((slow * pull).sum(), inputs),
        torch.autograd.grad((fast * pull).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_gradients_reach_every_parameter(name):
    net = NETS[name]().train()
    (net(textured(8, channels=len(net.spec.reach))) * torch.randn(8, 128)).sum().backward()
    for key, parameter in net.named_parameters():
        if name == "hardnet-context" and key.startswith("convolutions.") and key[13] != "6":
            assert parameter.grad is None, key  # they stay as they are
            continue
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        # gray levels are never below HyNet's first threshold of -1
        assert parameter.grad.abs().sum() > 0 or key == "activations.0.tau", key


def to_kornia(name, net):
    """The same weights in kornia's class, by the order of their layers."""
    kf = pytest.importorskip("kornia.feature")
    other = {"hardnet": kf.HardNet, "hynet": kf.HyNet, "sosnet": kf.SOSNet}[name](
        pretrained=False
    ).eval()
    mine = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    if name == "hynet":
        layout = [
            ("norms.0", "layer1.0"),
            ("activations.0", "layer1.1"),
            ("convolutions.0", "layer1.2"),
            ("norms.1", "layer1.3"),
        ]
        layout += [("activations.1", "layer1.4")]
        for k in range(2, 7):
            parts = ((f"convolutions.{k - 1}", 0), (f"norms.{k}", 1), (f"activations.{k}", 2))
            layout += [(part, f"layer{k}.{index}") for part, index in parts]
        layout += [("convolutions.6", "layer7.1"), ("last_norm", "layer7.2")]
    else:
        kept, first = ("layers", 1) if name == "sosnet" else ("features", 0)
        indices = [first + 3 * k for k in range(6)] + [first + 19]
        layout = [(f"convolutions.{k}", f"{kept}.{index}") for k, index in enumerate(indices)]
        layout += [(f"norms.{k}", f"{kept}.{index + 1}") for k, index in enumerate(indices)]
    renamed = {}
    for key, value in mine.items():
        for mine_part, their_part in layout:
            if key.startswith(mine_part + "."):
                renamed[their_part + key[len(mine_part) :]] = value
    assert len(renamed) == len(mine)
    missing = [
        key
        for key in other.load_state_dict(renamed, strict=False).missing_keys
        if not key.endswith("num_batches_tracked")
    ]
    assert not missing
    return other


@pytest.mark.parametrize("name", ["hardnet", "hynet", "sosnet"])
def test_equals_kornia(name):
    net = random_net(NETS[name])
    other = to_kornia(name, net)
    patches = textured(32)[8:]
    # kornia's HyNet and SOSNet expect gray levels, as the published weights
    theirs = patches if name == "hardnet" else patches * 255
    with torch.inference_mode():
        torch.testing.assert_close(net(patches), other(theirs), atol=1e-5, rtol=0)
        torch.testing.assert_close(net.fused()(patches), other(theirs), atol=2e-5, rtol=0)


def test_cosines_with_context_are_those_of_the_patches():
    net = random_net(HardNetContext)
    patches = textured(6, channels=3)
    others = patches.clone()
    others[:, 1] = textured(6, seed=2)[:, 0]
    with torch.inference_mode():
        a, b = net(patches), net(others)
    for vectors in (a, b):
        squares = [vectors[:, columns].square().sum(dim=1) for columns in PART_COLUMNS]
        torch.testing.assert_close(
            torch.stack(squares, dim=1), torch.tensor([[0.45, 0.3, 0.25]] * 6)
        )
    same = [bool((a - b)[:, columns].abs().max() < 1e-6) for columns in PART_COLUMNS]
    assert same == [True, False, True]


def test_context_starts_from_the_light_network():
    light, net = load("hardnet-light"), HardNetContext()
    net.start_from(light)
    patches = textured(40, channels=3)
    net.train()(patches)  # statistics of the new layers
    assert torch.equal(net.norms[2].running_mean, light.norms[2].running_mean)
    near = parts_of(net.eval()(patches))[0]
    given = light(patches[:, :1])
    cosines = torch.stack([near @ near.T, given @ given.T]).flatten(1)
    assert torch.corrcoef(cosines)[0, 1] > 0.7
    for mine, other in zip(net.context, light.convolutions[:-1], strict=False):
        assert torch.equal(mine.weight, other.weight)
        assert mine.weight.requires_grad


def test_helper_functions():
    torch.testing.assert_close(unit(torch.zeros(1, 4)), torch.full((1, 4), 0.5))
    patches = textured(2, 64)
    torch.testing.assert_close(to_side(patches, 32), F.avg_pool2d(patches, 2))
    assert to_side(textured(2, 20), 32).shape == (2, 1, 32, 32)
    with pytest.raises(ValueError, match="dropout"):
        HardNet(dropout=1.0)
