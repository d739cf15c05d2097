"""Winograd's 5 x 5 convolution compared with torch."""

import pytest
import torch
import torch.nn.functional as F

from tiepoints.kernels.winograd import WinogradConv, pack, transforms, unpack


def test_one_dimension_is_exact():
    a, g, b = transforms()
    signal, taps = torch.randn(8, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(
        a @ ((g @ taps) * (b @ signal)), F.conv1d(signal[None, None], taps[None, None])[0, 0]
    )


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 9), (5, 30), (30, 2), (47, 61)])
@pytest.mark.parametrize("channels", [(3, 5), (24, 24)])
def test_equals_torch_convolution(size, channels):
    rng = torch.Generator().manual_seed(0)
    maps = torch.randn(*size, channels[0], generator=rng)
    weight = torch.randn(channels[1], channels[0], 5, 5, generator=rng)
    bias = torch.randn(channels[1], generator=rng)
    plain = (
        F.conv2d(maps.permute(2, 0, 1)[None].double(), weight.double(), bias.double(), padding=2)
        .relu()[0]
        .permute(1, 2, 0)
    )
    packed = WinogradConv(weight, bias)(pack(maps), *size)
    assert (unpack(packed, *size) - plain).abs().max() < 5e-5 * plain.abs().max()
    assert torch.equal(
        pack(unpack(packed, *size)), packed
    )  # zero padding, as input of the next layer
