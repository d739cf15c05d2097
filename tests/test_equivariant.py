"""Rotation-group convolutions: equivariance, filters compared with a reference implementation and
with escnn, fusing.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from tiepoints.models.equivariant import (
    SMOOTH_RINGS,
    FieldNorm,
    GroupConv,
    LiftingConv,
    group_pool,
    polar_basis,
    published_rings,
)

SIZE = 64
#: Maximum relative change of the response of three layers by a rotation of smooth images (waves of
#: 10 px and longer).
SMOOTH_TOLERANCE = 0.09


def waves(angle: float = 0.0, wavelength: float = 10.0, size: int = SIZE) -> torch.Tensor:
    """A smooth image (1,1,S,S) known everywhere, with its content rotated counterclockwise about
    its center.
    """
    rng = torch.Generator().manual_seed(3)
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = cos * x - sin * y, sin * x + cos * y  # y points down
    image = torch.zeros_like(x)
    for a, b, c in torch.rand(40, 3, generator=rng, dtype=torch.float64):
        k, direction = 2 * math.pi / (wavelength * (1 + 2 * a)), 2 * math.pi * b
        image += torch.cos(k * (direction.cos() * u + direction.sin() * v) + 2 * math.pi * c)
    return (image / math.sqrt(20)).float()[None, None]


def rotated_back(maps: torch.Tensor, angle: float) -> torch.Tensor:
    """Maps of the image rotated by ``angle``, warped bicubically to the upright frame."""
    size = maps.shape[-1]
    axis = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    xy = torch.stack([cos * x + sin * y, -sin * x + cos * y], dim=-1) + (size - 1) / 2
    return F.grid_sample(
        maps,
        ((xy + 0.5) * 2 / size - 1)[None].expand(len(maps), -1, -1, -1),
        mode="bicubic",
        align_corners=False,
    )


def shift_orientations(maps: torch.Tensor, group: int, steps: int) -> torch.Tensor:
    """Every regular field shifted by ``steps`` orientations."""
    b, c, h, w = maps.shape
    return maps.view(b, c // group, group, h, w).roll(steps, 2).view(b, c, h, w)


def layers(group: int, rings=SMOOTH_RINGS) -> list[torch.nn.Module]:
    torch.manual_seed(1)
    return [
        LiftingConv(group, 1, 2, 5, rings),
        GroupConv(group, 2, 3, 5, rings),
        GroupConv(group, 3, 2, 5, rings),
    ]


def run(modules, maps: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        for module in modules:
            maps = F.relu(module(maps))
    return maps


@pytest.mark.parametrize("group", [4, 8, 12, 36])
@pytest.mark.parametrize("rings", [SMOOTH_RINGS, None])
def test_rotations_by_90_degrees_are_exact(group, rings):
    image = torch.rand(2, 1, 33, 40)
    modules = layers(group, rings)
    straight, rotated = (
        run(modules, image),
        run(modules, image.rot90(1, (-2, -1))),
    )  # counterclockwise
    expected = shift_orientations(straight, group, group // 4).rot90(1, (-2, -1))
    assert (rotated - expected).abs().max() < 1e-4 * straight.abs().max()
    assert (
        group_pool(rotated, group) - group_pool(straight, group).rot90(1, (-2, -1))
    ).abs().max() < 1e-4 * straight.abs().max()
    other = shift_orientations(straight, group, -group // 4).rot90(
        1, (-2, -1)
    )  # the opposite direction is incorrect
    assert (rotated - other).norm() > 0.3 * rotated.norm()


def error_of(modules, group: int, step: int, wavelength: float = 10.0) -> float:
    angle = 2 * math.pi * step / group
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    inside = (
        axis[:, None] ** 2 + axis[None] ** 2
    ).sqrt() < SIZE / 2 - 9  # without the area affected by zero padding
    straight = run(modules, waves(wavelength=wavelength))
    restored = rotated_back(
        shift_orientations(run(modules, waves(angle, wavelength)), group, -step), angle
    )
    return float((restored - straight)[..., inside].norm() / straight[..., inside].norm())


@pytest.mark.parametrize("group", [5, 8, 12, 36])
def test_all_rotations_of_the_group_are_within_tolerance_on_smooth_images(group):
    modules = layers(group)
    errors = [error_of(modules, group, step) for step in range(1, group)]
    assert max(errors) < SMOOTH_TOLERANCE
    assert (
        error_of([torch.nn.Conv2d(1, group, 5, padding=2)], group, 1) > 0.3
    )  # an ordinary layer does not


def test_our_rings_have_a_smaller_error_than_the_published_ones():
    ours, published = (
        max(error_of(layers(12, rings), 12, step) for step in range(1, 12))
        for rings in (SMOOTH_RINGS, None)
    )
    assert ours < 0.95 * published


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_basis_counts_and_norms(kernel):
    basis = polar_basis(kernel, [0.0, 0.3])
    assert basis.shape[1] == {1: 1, 3: 6, 5: 11, 7: 18}[kernel]
    torch.testing.assert_close(
        basis[0].flatten(1).norm(dim=1), torch.ones(basis.shape[1], dtype=torch.float64)
    )
    assert [ring.frequency for ring in published_rings(5)] == [0, 2, 2]
    with pytest.raises(ValueError, match="odd"):
        polar_basis(4, [0.0])


def test_group_filters_equal_their_definition():
    """The filter of (out g, in g + h) is filter h of the upright orientation rotated by g: computed
    one by one.
    """
    conv = GroupConv(6, 2, 3, 5)
    made = conv.filters().detach()
    for o, i, g, h in [(0, 0, 0, 0), (2, 1, 3, 5), (1, 0, 5, 2), (2, 0, 4, 4)]:
        rotated = polar_basis(5, [2 * math.pi * g / 6])[0].float()
        expected = (conv.coefficients[o, i, h, :, None, None].detach() * rotated).sum(dim=0)
        torch.testing.assert_close(made[o * 6 + g, i * 6 + (g + h) % 6], expected)


def test_frozen_layers_are_ordinary_and_equal():
    conv, norm = GroupConv(8, 2, 2), FieldNorm(8, 2)
    norm.norm.running_mean.uniform_(-1, 1), norm.norm.running_var.uniform_(0.5, 2)
    torch.nn.init.uniform_(norm.norm.weight)
    norm.eval()
    maps = torch.randn(1, 16, 20, 24)
    frozen = torch.nn.Sequential(conv.frozen(), norm.frozen())
    assert type(frozen[0]) is torch.nn.Conv2d
    assert type(frozen[1]) is torch.nn.BatchNorm2d
    with torch.inference_mode():
        torch.testing.assert_close(frozen(maps), norm(conv(maps)), atol=1e-5, rtol=1e-5)


def test_field_norm_shares_statistics_over_the_group():
    norm = FieldNorm(4, 2).train()
    maps = torch.randn(3, 8, 5, 6) * torch.arange(1, 9).view(1, 8, 1, 1)
    out = norm(maps).view(3, 2, 4, 5, 6)
    torch.testing.assert_close(out.mean(dim=(0, 2, 3, 4)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        out.var(dim=(0, 2, 3, 4), correction=0), torch.ones(2), atol=1e-3, rtol=0
    )
    assert norm.norm.weight.shape == (2,)
    assert out[:, 0, 3].std() > 2 * out[:, 0, 0].std()  # not normalized separately


def test_initial_responses_keep_their_variance():
    torch.manual_seed(0)
    maps = F.relu(torch.randn(2, 24, 40, 40))
    out = GroupConv(12, 2, 2)(maps)
    assert 0.3 < out.square().mean() / (2 * maps.square().mean()) < 3


@pytest.mark.parametrize(("small", "large"), [(8, 16), (12, 36), (9, 27), (12, 24)])
def test_regrouping_round_trip(small, large):
    conv = GroupConv(small, 2, 1)
    restored = conv.regrouped(large).regrouped(small)
    torch.testing.assert_close(restored.coefficients, conv.coefficients, atol=1e-5, rtol=1e-5)


def test_regrouped_convolution_has_equal_responses():
    """On maps that vary slowly with orientation, orientation 2 g of 24 is orientation g of 12."""
    conv = GroupConv(12, 1, 1, 5)
    phase = torch.randn(2, 9, 9)

    def maps(n: int) -> torch.Tensor:
        angle = 2 * math.pi * torch.arange(n).view(n, 1, 1) / n
        return (phase[0] * angle.cos() + phase[1] * (2 * angle).sin() + 1)[None]

    with torch.inference_mode():
        few, many = conv(maps(12)), conv.regrouped(24)(maps(24))
    torch.testing.assert_close(many[:, ::2], few, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arguments", [(0, 1, 1), (4, 0, 1), (4, 1, 0)])
def test_impossible_sizes_raise(arguments):
    with pytest.raises(ValueError, match="at least"):
        GroupConv(*arguments)


def test_filters_agree_with_escnn():
    """escnn's expanded filters of the same rings are in our space, orientation by orientation."""
    pytest.importorskip("escnn", reason="escnn, the oracle, is not installed")
    from escnn import gspaces, nn

    space = gspaces.rot2dOnR2(N=12)
    trivial, regular = (
        nn.FieldType(space, [space.trivial_repr]),
        nn.FieldType(space, 2 * [space.regular_repr]),
    )
    torch.manual_seed(0)
    for theirs, ours in (
        (nn.R2Conv(trivial, regular, 5, padding=2, bias=False), LiftingConv(12, 1, 2, 5)),
        (nn.R2Conv(regular, regular, 5, padding=2, bias=False), GroupConv(12, 2, 2, 5)),
    ):
        wanted = theirs.eval().export().weight.detach().double()
        size = ours.coefficients.numel()
        columns = []
        with torch.no_grad():
            for j in range(size):
                ours.coefficients.copy_(F.one_hot(torch.tensor(j), size).view_as(ours.coefficients))
                columns.append(ours.filters().double().flatten())
        space_of_ours = torch.stack(columns, dim=1)
        fitted = (
            space_of_ours @ torch.linalg.lstsq(space_of_ours, wanted.flatten()[:, None]).solution
        )
        assert (fitted[:, 0] - wanted.flatten()).abs().max() < 1e-5 * wanted.abs().max()
