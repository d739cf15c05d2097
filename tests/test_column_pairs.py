"""Convolutions of pairs of columns compared with torch."""

import pytest
import torch
from torch import nn

from tiepoints.kernels.column_pairs import apply_paired, pair_columns, paired, split_columns
from tiepoints.models.spec import ConvStack


def convolutions(sides: tuple[int, ...], channels: tuple[int, ...]) -> list[nn.Conv2d]:
    torch.manual_seed(0)
    return [
        nn.Conv2d(a, b, k, padding=k // 2)
        for k, a, b in zip(sides, channels[:-1], channels[1:], strict=True)
    ]


def test_pairs_of_columns_are_a_view():
    maps = torch.rand(2, 3, 5, 8).contiguous(memory_format=torch.channels_last)
    pairs = pair_columns(maps)
    assert pairs.shape == (2, 6, 5, 4)
    assert pairs.data_ptr() == maps.data_ptr()
    assert torch.equal(pairs[:, 3:, :, 1], maps[:, :, :, 3])
    assert torch.equal(split_columns(pairs), maps)


@pytest.mark.parametrize("width", [1, 2, 3, 6, 7, 9, 11, 20, 31])
@pytest.mark.parametrize("sides", [(1,), (3,), (5, 5, 5), (7, 3, 1), (1, 1)])
def test_equals_torch_for_any_width(width, sides):
    convs = convolutions(sides, (4, 3, 5, 2)[: len(sides) + 1])
    plain, stack = ConvStack(convs), ConvStack(map(paired, convs))
    maps = torch.randn(2, 4, 6, width)
    with torch.inference_mode():
        found = apply_paired(list(maps.split(1, dim=1)), stack, plain, plain.radii)
        torch.testing.assert_close(found, plain(maps.clone()), rtol=1e-5, atol=1e-5)


def test_filters_without_bias():
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    maps = torch.rand(1, 2, 4, 6)
    with torch.inference_mode():
        torch.testing.assert_close(
            split_columns(paired(conv)(pair_columns(maps))), conv(maps), rtol=1e-5, atol=1e-5
        )
