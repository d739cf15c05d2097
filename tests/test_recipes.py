"""Recipes: what each adds to a network for its training."""

import torch

from tiepoints.detectors.keynet import KeyNet
from tiepoints.training.recipes import floored_tiny


def test_tiny_in_training_is_a_tiny_that_scores_flat_images_zero() -> None:
    torch.manual_seed(1)
    net, plain = floored_tiny(), KeyNet.tiny()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    images = torch.rand(4, 1, 40, 40)
    for _ in range(5):
        optimiser.zero_grad()
        (net(images) - 1).square().mean().backward()
        optimiser.step()
    plain.load_state_dict(net.state_dict())
    net.eval(), plain.eval()
    with torch.no_grad():
        assert net(images).max() > 0.01
        torch.testing.assert_close(net(images), plain(images))
        assert plain(torch.full((1, 1, 20, 20), 0.4)).abs().max() == 0
