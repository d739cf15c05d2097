"""Keypoints on structure in training: drawn shapes, anchors of photographs, second layers."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tiepoints.datasets.shapes import WithShapes, draw_shapes, target_map
from tiepoints.datasets.synthetic import PairDataset, PairSettings, make_pair
from tiepoints.filters import corner_strength, percentile_rank
from tiepoints.geometry import warp_points
from tiepoints.keypoints import detect_peaks
from tiepoints.models.keynet import STRUCTURE_SIGMA, KeyNet
from tiepoints.structure import GAUSSIAN_SIGMA, anchor_weight
from tiepoints.training.losses import gaussian_loss, local_cosine, off_structure
from tiepoints.training.validation import validation_score
from tiepoints.weights import load, save

CLEAN = PairSettings(size=160, scale=(0.8, 1.25), rotation=30, skew=0.2)


def square(size: int = 96, low: int = 30, high: int = 62) -> torch.Tensor:
    image = torch.full((1, 1, size, size), 0.2)
    image[..., low:high, low:high] = 0.8
    return image


def test_corner_strength_is_high_only_at_corners():
    strength = corner_strength(square(), 1.5)[0, 0]
    corners = [(y, x) for y in (30, 61) for x in (30, 61)]
    near = [float(strength[y - 2 : y + 3, x - 2 : x + 3].max()) for y, x in corners]
    assert min(near) == pytest.approx(float(strength.max()), rel=1e-4)
    assert float(strength[46, 30]) < 0.02 * near[0]  # the middle of an edge
    assert float(strength[5, 5]) == pytest.approx(0, abs=1e-9)
    assert float(corner_strength(torch.rand(2, 1, 20, 30)).min()) >= 0


def test_percentile_rank_counts_smaller_pixels():
    values = torch.tensor([[3.0, 1.0], [2.0, 0.0]])[None, None]
    assert torch.equal(percentile_rank(values)[0, 0], torch.tensor([[1.0, 1 / 3], [2 / 3, 0.0]]))
    assert percentile_rank(torch.zeros(1, 1, 1, 1)).item() == 0


def test_anchor_is_at_the_corner():
    image = square() + 0.01 * torch.rand(1, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    weight, ramp = anchor_weight(image, 1.0)[0, 0], anchor_weight(image)[0, 0]
    for y, x, outward in ((30, 30, -1), (61, 61, 1)):
        assert float(weight[y - 2 : y + 3, x - 2 : x + 3].max()) > 0.95
        assert float(weight[y + 6 * outward, x + 6 * outward]) < 0.1
        assert float(ramp[y, x]) == 1
    assert float(ramp[5:20, 5:20].mean()) < 0.4  # constant background
    assert bool((weight <= ramp).all())
    assert 0 <= float(weight.min()) <= float(ramp.max()) <= 1


def bump(at: tuple[float, float], size: int = 96, height: float = 1.0) -> torch.Tensor:
    return height * target_map(np.array([at]), size, GAUSSIAN_SIGMA)[None]


def test_peak_without_anchor_counts_as_not_repeated():
    H = torch.eye(3)[None]
    both = bump((40, 40)) + bump((60, 62))
    everywhere = torch.ones(1, 1, 96, 96)
    elsewhere = everywhere.clone()
    elsewhere[..., 55:70, 55:70] = 0
    free = gaussian_loss(both, both, H)[1]
    assert gaussian_loss(both, both, H, anchor_a=everywhere, anchor_b=everywhere)[1] == free
    bound = gaussian_loss(both, both, H, anchor_a=elsewhere, anchor_b=elsewhere)[1]
    assert free["alone"] == pytest.approx(0, abs=1e-3)
    assert bound["alone"] == pytest.approx(0.5, abs=1e-3)


def test_only_known_positions_are_used_in_their_image():
    H = torch.eye(3)[None]
    truth = torch.maximum(bump((40.3, 40.6)), bump((47.0, 50.2)))  # nearer than the window
    none = torch.zeros_like(truth)
    right = gaussian_loss(truth, truth, H, target_a=truth, target_b=truth)[1]
    assert right["shape"] == pytest.approx(0, abs=1e-3)
    assert right["alone"] == pytest.approx(0, abs=1e-3)
    # both views agree on a peak elsewhere, which does not reduce the loss
    wrong = bump((70, 30)) + 1e-6
    agreed = gaussian_loss(wrong, wrong, H, target_a=truth, target_b=truth)[1]
    assert agreed["shape"] > 0.5
    assert agreed["alone"] > 0.9
    assert (
        gaussian_loss(wrong, wrong, H, target_a=none, target_b=none)[1]
        == gaussian_loss(wrong, wrong, H)[1]
    )
    shifted = torch.maximum(bump((41.3, 40.6)), bump((48.0, 50.2)))
    assert (
        right["shape"]
        < gaussian_loss(shifted, shifted, H, target_a=truth, target_b=truth)[1]["shape"]
        < agreed["shape"]
    )


def test_local_cosine_equals_a_loop():
    a, b = torch.rand(2, 1, 1, 20, 20, generator=torch.Generator().manual_seed(1))
    found = local_cosine(a, b, 5)[0, 0, 9, 7]
    one, two = (x[0, 0, 7:12, 5:10].flatten() for x in (a, b))
    assert float(found) == pytest.approx(float(one @ two / (one.norm() * two.norm())), rel=1e-5)


def test_shapes_are_drawn_at_their_target_positions():
    """Positions agree with the homography, and nearly all of them are on structure."""
    near = []
    for seed in range(4):
        pair = draw_shapes(np.random.default_rng(seed), CLEAN)
        again = draw_shapes(np.random.default_rng(seed), CLEAN)
        assert np.array_equal(pair.image_b, again.image_b)
        mapped = warp_points(torch.from_numpy(pair.targets_a), torch.from_numpy(pair.H_ab)).numpy()
        inside = ((mapped >= 0) & (mapped <= CLEAN.size - 1)).all(axis=1)
        assert inside.sum() >= 5
        distance = np.linalg.norm(mapped[inside][:, None] - pair.targets_b[None], axis=2).min(
            axis=1
        )
        assert distance.max() < 1e-6
        for image, targets in ((pair.image_a, pair.targets_a), (pair.image_b, pair.targets_b)):
            rank = percentile_rank(
                corner_strength(torch.from_numpy(image.copy()).float()[None, None] / 255, 1.0)
            )[0, 0]
            for x, y in targets:
                column, row = round(x), round(y)
                near.append(
                    float(rank[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].max())
                )
    assert len(near) > 60
    assert np.mean(np.array(near) > 0.9) > 0.9


def test_target_maps_have_maxima_at_subpixel_positions():
    heat = target_map(np.array([[10.3, 20.8], [0.0, 31.0], [10.9, 20.8]]), 32)
    assert heat.shape == (1, 32, 32)
    assert float(heat[0, 21, 10]) == pytest.approx(
        np.exp(-0.5 * (0.3**2 + 0.2**2) / GAUSSIAN_SIGMA**2), rel=1e-5
    )
    assert float(heat[0, 31, 0]) == 1
    assert target_map(np.zeros((0, 2)), 32).sum() == 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def test_pairs_with_shapes_have_anchors_or_targets(photos):
    pairs = PairDataset(photos, PairSettings(size=96, rotation=10), length=12)
    items = WithShapes(pairs, 0.5, seed=1)
    kinds = set()
    for i in range(12):
        item = items[i]
        drawn = bool(item["target_a"].any())
        kinds.add(drawn)
        assert item["anchor_a"].shape == item["target_b"].shape == (1, 96, 96)
        if drawn:
            assert bool((item["anchor_a"] == 1).all())
        else:
            assert torch.equal(item["image_a"], pairs[i]["image_a"])
            assert torch.equal(item["anchor_b"], anchor_weight(item["image_b"][None])[0])
    assert kinds == {True, False}


def test_second_layer_moves_independently_and_is_masked(photos):
    """The views agree where their masks are set, without and with layers; with layers the masks are
    smaller.
    """
    photo = np.asarray(Image.open(photos[0]))
    plain = PairSettings(size=128, scale=(1, 1), rotation=0, skew=0, color=0)
    differs = 0
    for seed in range(6):
        for settings in (plain, dataclasses.replace(plain, layers=1.0)):
            pair = make_pair(photo, np.random.default_rng(seed), settings)
            assert pair is not None
            xy = torch.from_numpy(np.argwhere(pair.mask_a)[:, ::-1].copy())
            mapped = warp_points(xy.double(), torch.from_numpy(pair.H_ab)).round().long().numpy()
            a, b = (
                pair.image_a[pair.mask_a].astype(int),
                pair.image_b[mapped[:, 1], mapped[:, 0]].astype(int),
            )
            assert np.abs(a - b).max() <= 2
            if settings.layers:
                hidden = ~pair.mask_a
                assert 0.01 < hidden.mean() < 0.7
                differs += int(np.abs(pair.image_a.astype(int) - pair.image_b)[hidden].max() > 20)
    assert differs == 6


def test_soft_score_is_kept_by_file_and_fused_network(tmp_path):
    torch.manual_seed(0)
    net = KeyNet(score="softplus", num_filters=4, num_blocks=2)
    image = torch.rand(1, 1, 50, 61)
    for _ in range(3):
        net(image)
    net.eval()
    with torch.inference_mode():
        expected = net(image)
    assert float(expected.min()) > 0
    torch.testing.assert_close(net.fused()(image), expected, rtol=1e-4, atol=1e-6)
    save(net, tmp_path / "soft.safetensors", {})
    with torch.inference_mode():
        torch.testing.assert_close(load(tmp_path / "soft.safetensors")(image), expected)
    with pytest.raises(ValueError, match="score must be"):
        KeyNet(score="sigmoid")
    with pytest.raises(ValueError, match="score must be"):
        KeyNet(num_filters=1, num_blocks=1, num_levels=1, merge=False, score="softplus")


class Fixed(torch.nn.Module):
    """A score map of peaks at given positions of the first and of the second image of a pair."""

    def __init__(self, maps: torch.Tensor):
        super().__init__()
        self.maps = torch.nn.Parameter(maps)

    def forward(self, image):
        return self.maps


def test_validation_counts_only_repeated_keypoints_on_structure():
    corner, flat = (40.0, 40.0), (80.0, 25.0)
    generator = torch.Generator().manual_seed(0)
    image = square(112, 40, 72)[0] + 0.005 * torch.rand(1, 112, 112, generator=generator)
    everywhere = torch.ones(1, 112, 112)
    pair = {
        "image_a": image,
        "image_b": image,
        "H_ab": torch.eye(3).double(),
        "mask_a": everywhere,
        "mask_b": everywhere,
    }
    scores = {}
    for name, at in (("corner", [corner]), ("flat", [flat]), ("both", [corner, flat])):
        one = sum(bump(xy, 112) for xy in at)
        scores[name] = validation_score(Fixed(torch.cat([one, one])), [pair]) * 150
    assert round(scores["corner"]) == 1
    assert round(scores["both"]) == 1 + round(scores["flat"])
    hidden = {**pair, "mask_a": torch.zeros(1, 112, 112)}
    one = bump(corner, 112)
    assert validation_score(Fixed(torch.cat([one, one])), [hidden]) == 0


def test_scores_off_structure_are_lower_than_those_at_corners():
    """With a constant network, the score is the corner strength."""
    image = torch.full((1, 1, 80, 80), 0.2)
    image[..., 30:60, 30:60] = 0.9
    net = KeyNet(num_filters=2, num_blocks=1, structure=0.5).eval()
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(net.last.bias)
    with torch.inference_mode():
        score = net(image)
    assert torch.allclose(score, corner_strength(image, STRUCTURE_SIGMA) ** 0.5)
    assert torch.allclose(net.fused()(image), score, atol=1e-6)
    (found, _), *_ = detect_peaks(score, 4)
    corners = torch.tensor([[x, y] for x in (29.5, 59.5) for y in (29.5, 59.5)])
    assert float(torch.cdist(corners, found).amin(dim=1).max()) < 3
    plain = KeyNet(num_filters=2, num_blocks=1).eval()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(image), torch.ones_like(image))  # as published
    with pytest.raises(ValueError, match="structure must lie"):
        KeyNet(structure=-1.0)
    with pytest.raises(ValueError, match="structure must lie"):
        KeyNet(num_filters=1, num_blocks=1, num_levels=1, merge=False, structure=0.5)


def test_structure_has_gradients_on_constant_images():
    net = KeyNet(num_filters=2, num_blocks=1, structure=0.5).train()
    image = torch.full((2, 1, 40, 40), 0.5)
    image[0, 0, 10:20, 10:20] = 1.0
    net(image).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def test_peaks_off_structure_are_penalized():
    score = torch.zeros(1, 1, 80, 80)
    score[..., 30, 30], score[..., 30, 60] = 3.0, 1.0
    score[..., 2, 2] = 50.0  # in the frame
    anchor = torch.zeros_like(score)
    anchor[..., 30, 60] = 1.0
    everywhere = torch.ones_like(score)
    assert float(off_structure(score, anchor, everywhere)) == pytest.approx(0.75)
    assert float(off_structure(score, everywhere, everywhere)) == 0
    hidden = everywhere.clone()
    hidden[..., :40] = 0
    assert float(off_structure(score, anchor, hidden)) == 0
    assert (
        float(off_structure(torch.zeros_like(score), anchor, everywhere)) == 0
    )  # no peaks: no penalty and no NaN
    lowered = score.clone().requires_grad_(True)
    off_structure(lowered, anchor, everywhere).backward()
    assert lowered.grad[0, 0, 30, 30] > 0 > lowered.grad[0, 0, 30, 60]


def test_map_without_peaks_has_a_finite_gradient():
    """Early in training a whole map can be 0."""
    score = torch.zeros(2, 1, 64, 64, requires_grad=True)
    value = off_structure(score, torch.rand(2, 1, 64, 64), torch.ones(2, 1, 64, 64))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(score.grad).all()
