"""Index proposals and the M-SIP loss: values by hand, a reference implementation, the official
outputs, gradients.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tiepoints.geometry import warp_image
from tiepoints.training import losses
from tiepoints.training.losses import (
    border_mask,
    hard_index,
    index_proposal,
    index_proposal_loss,
    msip_loss,
)

CASES = ("uniform", "sparse", "large_scores", "identity_same")
EPS = 1e-6


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def smooth_map(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(noise(2, 1, height + 4, width + 4, seed=seed), 5, 1)


def shift(x: float, y: float, batch: int = 2) -> torch.Tensor:
    return torch.tensor([[1.0, 0, x], [0, 1, y], [0, 0, 1]]).expand(batch, 3, 3)


# --- reference implementation, window by window and pixel by pixel


def slow_proposal(values: np.ndarray, base: float) -> tuple[float, float, float]:
    """Row, column and score of one window (N,N)."""
    peak = values.max()
    total, row, column, score = EPS, 0.0, 0.0, 0.0
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            weight = base ** (values[i, j] / (peak + EPS)) - 1 + EPS
            total += weight
            row += weight * (i + 1)
            column += weight * (j + 1)
            score += weight * values[i, j]
    return row / total, column / total, score / total


def slow_loss(maps, targets, visible, window, *, base, weighting, visibility, empty, factor):
    """``index_proposal_loss`` of (B,H,W) arrays."""
    terms = []
    for image, target, seen in zip(maps, targets, visible, strict=True):
        windows = [
            (slice(y, y + window), slice(x, x + window))
            for y in range(0, image.shape[0] - window + 1, window)
            for x in range(0, image.shape[1] - window + 1, window)
        ]
        soft = [slow_proposal(image[part_of], base) for part_of in windows]
        scores = [s for _, _, s in soft]
        if weighting == "minmax":
            low = min(scores)
            weights = [(s - low) / (max(scores) - low + EPS) for s in scores]
        elif weighting == "softmax":
            total = sum(math.exp(s) for s in scores)
            weights = [100 * math.exp(s) / total for s in scores]
        else:
            weights = [1.0] * len(scores)
        for part_of, (row, column, _), weight in zip(windows, soft, weights, strict=True):
            part = target[part_of]
            r, c = divmod(int(part.argmax()), window)
            r, c = r + 1, c + 1
            if part.max() <= 0:
                if empty == "ignore":
                    weight = 0.0
                r = c = 0
            if visibility == "any":
                weight *= seen[part_of].max()
            elif seen[part_of].mean() <= 0.5:
                weight = 0.0
            terms.append(factor * weight * ((row - r) ** 2 + (column - c) ** 2) / window**2)
    return sum(terms) / len(terms)


# --- index proposals


def test_index_proposal_by_hand():
    score_map = torch.zeros(1, 1, 16, 16)
    score_map[0, 0, 2, 5], score_map[0, 0, 12, 3], score_map[0, 0, 12, 4] = 4, 2, 1
    index, score = index_proposal(score_map, 8)
    assert index.shape == (1, 2, 2, 2)
    assert index[0, 0, 0].tolist() == pytest.approx([3.00006, 5.99994], abs=1e-5)
    assert score[0, 0, 0].item() == pytest.approx(3.99986, abs=1e-5)
    assert index[0, 1, 0].tolist() == pytest.approx([4.99998, 4.27407], abs=1e-5)
    assert score[0, 1, 0].item() == pytest.approx(1.72589, abs=1e-5)
    assert index[0, :, 1].flatten().tolist() == pytest.approx([4.43077] * 4, abs=1e-5)


@pytest.mark.parametrize("base", [1.5, math.e, 100.0])
@pytest.mark.parametrize(("size", "window"), [((24, 24), 8), ((17, 29), 5), ((6, 20), 6)])
def test_index_proposal_equals_reference_implementation(size, window, base):
    score_map = noise(2, 1, *size, seed=window, dtype=torch.float64) ** 4
    index, score = index_proposal(score_map, window, base=base)
    assert index.shape == (2, size[0] // window, size[1] // window, 2)
    for b in range(2):
        for r in range(size[0] // window):
            for c in range(size[1] // window):
                part = score_map[
                    b, 0, r * window : (r + 1) * window, c * window : (c + 1) * window
                ].numpy()
                wanted = slow_proposal(part, base)
                assert [*index[b, r, c].tolist(), score[b, r, c].item()] == pytest.approx(
                    wanted, rel=1e-9
                )


def test_softmax_base_sharpens():
    score_map = 0.2 * noise(1, 1, 16, 16)
    score_map[0, 0, 2:5, 10:13] = 0.8
    score_map[0, 0, 3, 11] = 1
    target, _ = hard_index(score_map, 16)
    distances = [
        (index_proposal(score_map, 16, base=base)[0] - target).norm().item()
        for base in (1.5, math.e, 1e4)
    ]
    assert distances[0] > distances[1] > distances[2]
    for base in (1.0, 0.5, float("nan")):
        with pytest.raises(ValueError, match="base"):
            index_proposal(score_map, 8, base=base)


def test_hard_index():
    score_map = torch.zeros(1, 1, 12, 20)
    score_map[0, 0, 7, 3] = 2
    score_map[0, 0, 5, 9] = 3
    index, peak = hard_index(score_map, 6)
    assert index.shape == (1, 2, 3, 2)
    assert index[0, 1, 0].tolist() == [2, 4]
    assert index[0, 0, 1].tolist() == [6, 4]
    assert peak[0].tolist() == [[0, 3, 0], [2, 0, 0]]


def test_huge_and_zero_scores_stay_finite():
    for score_map in (
        torch.zeros(1, 1, 16, 16),
        noise(1, 1, 16, 16) * 1e30,
        noise(1, 1, 16, 16) * 1e-30,
    ):
        score_map.requires_grad_()
        index, score = index_proposal(score_map, 8)
        index.sum().backward()
        assert torch.isfinite(index).all()
        assert torch.isfinite(score).all()
        assert torch.isfinite(score_map.grad).all()


# --- one window size, one direction


@pytest.mark.parametrize("weighting", ["minmax", "softmax", "none"])
@pytest.mark.parametrize("visibility", ["any", "half"])
@pytest.mark.parametrize("empty", ["ignore", "zero"])
def test_loss_equals_reference_implementation(weighting, visibility, empty):
    size, window, base, factor = (18, 27), 6, 3.0, 500.0
    maps, targets, visible = (noise(2, 1, *size, seed=s, dtype=torch.float64) for s in (1, 2, 3))
    targets[0, 0, :6, :12] = 0  # two windows without a target
    visible = torch.where(visible > 0.5, visible, torch.zeros_like(visible))
    visible[1, 0, 6:12, 6:12] = 0  # a window that is not visible
    visible[1, 0, 12:, :6] = 0.9  # a window that is visible
    options = {
        "base": base,
        "weighting": weighting,
        "visibility": visibility,
        "empty": empty,
        "factor": factor,
    }
    loss = index_proposal_loss(maps, targets, visible, window, **options)
    wanted = slow_loss(
        maps[:, 0].numpy(), targets[:, 0].numpy(), visible[:, 0].numpy(), window, **options
    )
    assert wanted > 0
    assert loss.item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("option", ["weighting", "visibility", "empty"])
def test_unknown_options_raise(option):
    maps = noise(1, 1, 16, 16)
    with pytest.raises(ValueError, match=option):
        index_proposal_loss(maps, maps, torch.ones_like(maps), 8, **{option: "other"})


def test_gradients_are_exact():
    score_map = noise(2, 1, 8, 12, dtype=torch.float64).requires_grad_()
    target, visible = (
        noise(2, 1, 8, 12, seed=1, dtype=torch.float64),
        noise(2, 1, 8, 12, seed=2, dtype=torch.float64),
    )
    assert torch.autograd.gradcheck(lambda m: index_proposal(m, 4, detach_max=False), score_map)
    assert torch.autograd.gradcheck(
        lambda m: index_proposal_loss(m, target, visible, 4, weighting="none", detach_max=False),
        score_map,
    )


def test_detached_maximum_changes_only_the_gradient():
    gradients, values = [], []
    for detach in (True, False):
        score_map = noise(1, 1, 8, 8).requires_grad_()
        loss = index_proposal_loss(
            score_map,
            noise(1, 1, 8, 8, seed=1),
            torch.ones(1, 1, 8, 8),
            8,
            detach_max=detach,
            weighting="none",
        )
        loss.backward()
        gradients.append(score_map.grad)
        values.append(loss.item())
    assert values[0] == values[1] > 0
    differs = gradients[0] != gradients[1]
    assert differs.any()


# --- the whole loss


def test_loss_of_a_pair_is_the_sum_of_its_windows():
    a, b = smooth_map(96, 96), smooth_map(96, 96, 1)
    total, numbers = msip_loss(a, b, shift(3, -2))
    parts = sum(
        w * numbers[f"loss_{s}"] for s, w in zip(losses.WINDOWS, losses.WINDOW_WEIGHTS, strict=True)
    )
    assert numbers["loss"] == total.item() == pytest.approx(parts, rel=1e-5)


def test_loss_is_symmetric():
    a, b = smooth_map(96, 96), smooth_map(96, 96, 1)
    forward, _ = msip_loss(a, b, shift(5, 3))
    backward, _ = msip_loss(b, a, shift(-5, -3))
    assert forward.item() == pytest.approx(backward.item(), rel=1e-5)


def test_true_homography_has_a_lower_loss():
    whole = smooth_map(96, 120)
    a, b = whole[..., :96], whole[..., 9:105]  # x in a corresponds to x - 9 in b
    true, _ = msip_loss(a**8, b**8, shift(-9, 0))
    wrong, _ = msip_loss(a**8, b**8, shift(9, 0))
    assert true < 0.8 * wrong


def test_masks_hide_pixels():
    a, b = smooth_map(96, 96), smooth_map(96, 96, 1)
    mask = torch.ones_like(a)
    mask[..., :48] = 0
    plain, _ = msip_loss(a, b, shift(0, 0))
    same, _ = msip_loss(a, b, shift(0, 0), mask_a=torch.ones_like(a), mask_b=torch.ones_like(a))
    assert plain.item() == same.item()
    for name in ("mask_a", "mask_b"):
        hidden, _ = msip_loss(a, b, shift(0, 0), **{name: mask})
        assert hidden.item() != plain.item()
    changed_a, changed_b = a.clone(), b.clone()
    changed_a[..., :48], changed_b[..., :48] = 0.123, 0.9
    one, _ = msip_loss(a, b, shift(0, 0), mask_a=mask, mask_b=mask)
    two, _ = msip_loss(changed_a, changed_b, shift(0, 0), mask_a=mask, mask_b=mask)
    assert one.item() == two.item() > 0
    none, _ = msip_loss(a, b, shift(0, 0), mask_a=torch.zeros_like(a))
    assert none.item() == 0


def test_no_gradient_from_outside():
    a, b = smooth_map(96, 96).requires_grad_(), smooth_map(96, 96, 1).requires_grad_()
    msip_loss(a, b, shift(20, 0))[0].backward()
    for grad in (a.grad, b.grad):
        assert (grad * (1 - border_mask(a))).abs().max() == 0
        assert grad.abs().max() > 0
    assert a.grad[..., 60:].abs().max() == 0  # beyond the frame of b


@pytest.mark.parametrize("size", [(50, 90), (90, 50), (41, 47)])
def test_maps_need_not_be_square(size):
    a, b = smooth_map(*size), smooth_map(*size, 1)
    loss, numbers = msip_loss(a, b, shift(2, 1), border=4)
    assert math.isfinite(loss.item())
    assert (
        min(numbers["loss"], numbers["loss_8"], numbers["loss_16"]) > 0
    )  # a single window has weight 0
    transposed, _ = msip_loss(a.mT, b.mT, shift(1, 2), border=4)  # windows at the same positions
    assert transposed.item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"base": 10.0},
        {"weighting": "none"},
        {"weighting": "softmax"},
        {"visibility": "half"},
        {"border": 5},
        {"factor": 1.0},
        {"windows": (8, 16), "weights": (1.0, 1.0)},
        {"weights": (1.0, 1.0, 1.0, 1.0, 1.0)},
    ],
    ids=lambda options: "-".join(f"{k}" for k in options),
)
def test_every_option_is_used(options):
    a, b = smooth_map(96, 96), smooth_map(96, 96, 1)
    assert msip_loss(a, b, shift(9, 5), **options)[0].item() != pytest.approx(
        msip_loss(a, b, shift(9, 5))[0].item()
    )


def test_invalid_arguments_raise():
    a = smooth_map(96, 96)
    with pytest.raises(ValueError, match="equal shape"):
        msip_loss(a, smooth_map(96, 90), shift(0, 0))
    with pytest.raises(ValueError, match="equal shape"):
        msip_loss(a[:, 0], a[:, 0], shift(0, 0))
    with pytest.raises(ValueError, match="5 windows but 1 weights"):
        msip_loss(a, a, shift(0, 0), weights=(1.0,))
    with pytest.raises(ValueError, match="smaller than a window of 40"):
        msip_loss(smooth_map(39, 96), smooth_map(39, 96), shift(0, 0))


@pytest.mark.parametrize(("size", "border"), [((10, 20), 3), ((5, 9), 3), ((4, 4), 2), ((7, 7), 0)])
def test_border_mask(size, border):
    mask = border_mask(torch.empty(2, 1, *size), border)
    assert mask.shape == (2, 1, *size)
    for y in range(size[0]):
        for x in range(size[1]):
            inside = border <= y < size[0] - border and border <= x < size[1] - border
            assert mask[1, 0, y, x] == float(inside)


# --- outputs of the official implementations


@pytest.fixture(scope="module")
def rekd(reference_dir):
    with np.load(reference_dir / "loss_goldens.npz") as file:
        return {k: torch.from_numpy(v) for k, v in file.items() if not k.startswith("ori_")}


@pytest.fixture(scope="module")
def tensorflow(reference_dir):
    with np.load(reference_dir / "loss_goldens_tf.npz") as file:
        return {k: torch.from_numpy(v) for k, v in file.items()}


def frames(score_a, score_b, H_ab, window):
    """Inputs of the loss: both maps, their warped counterparts and the common areas, cropped to
    whole windows.
    """
    side = score_a.shape[-1] // window * window
    mask = border_mask(score_a)
    a, b, mask = (t[..., :side, :side] for t in (score_a, score_b, mask))
    H_ba = torch.linalg.inv(H_ab.double()).float()
    b_in_a, in_b = warp_image(torch.cat([b * mask, mask], dim=1), H_ba).split(1, dim=1)
    a_in_b, in_a = warp_image(torch.cat([a * mask, mask], dim=1), H_ab).split(1, dim=1)
    visible_a, visible_b = in_b * mask, in_a * mask
    return a * visible_a, b * visible_b, b_in_a * visible_a, a_in_b * visible_b


def close_gradient(ours, theirs):
    scale = theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("case", CASES)
def test_rekd_loss_and_gradients(rekd, case):
    a, b = (rekd[f"{case}/{side}_score"].clone().requires_grad_() for side in ("src", "dst"))
    loss, numbers = msip_loss(a, b, rekd[f"{case}/h_src_2_dst"], empty="zero", detach_max=False)
    assert loss.item() == pytest.approx(rekd[f"{case}/loss_total"].item(), rel=1e-4)
    windows = [numbers[f"loss_{w}"] for w in losses.WINDOWS]
    assert windows == pytest.approx(rekd[f"{case}/loss_per_window"].tolist(), rel=1e-4)
    loss.backward()
    close_gradient(a.grad, rekd[f"{case}/grad_src"])
    close_gradient(b.grad, rekd[f"{case}/grad_dst"])


@pytest.mark.parametrize("window", losses.WINDOWS)
@pytest.mark.parametrize("case", CASES)
def test_rekd_indices(rekd, case, window):
    gold = {k.split("/")[-1]: v for k, v in rekd.items() if k.startswith(f"{case}/ws{window}/")}
    a, b, b_in_a, a_in_b = frames(
        rekd[f"{case}/src_score"], rekd[f"{case}/dst_score"], rekd[f"{case}/h_src_2_dst"], window
    )
    for side, score_map in (("src", a), ("dst", b)):
        index, score = index_proposal(score_map, window)
        torch.testing.assert_close(
            index, gold[f"{side}_soft_index"].permute(0, 2, 3, 1), rtol=0, atol=1e-3
        )
        torch.testing.assert_close(score, gold[f"{side}_soft_score"][:, 0], rtol=1e-4, atol=1e-5)
    for used_by, side, warped in (("src", "dst", b_in_a), ("dst", "src", a_in_b)):
        index, peak = hard_index(warped, window)
        counts = (gold[f"{used_by}_weight"][:, 0] > 0) & (peak > 1e-3 * warped.max())
        assert counts.any()
        assert torch.equal(index[counts], gold[f"{side}_warped_argmax"].permute(0, 2, 3, 1)[counts])


@pytest.mark.parametrize(("name", "weighting"), [("weighted", "softmax"), ("unweighted", "none")])
def test_tensorflow_loss_and_gradients(tensorflow, rekd, name, weighting):
    a, b = (
        tensorflow[f"{side}_score_nhwc"].permute(0, 3, 1, 2).clone().requires_grad_()
        for side in ("src", "dst")
    )
    loss, numbers = msip_loss(
        a, b, rekd["uniform/h_src_2_dst"], weighting=weighting, empty="ignore"
    )
    assert loss.item() == pytest.approx(tensorflow[f"{name}/loss_total"].item(), rel=1e-4)
    windows = [numbers[f"loss_{w}"] for w in losses.WINDOWS]
    assert windows == pytest.approx(tensorflow[f"{name}/loss_per_window"].tolist(), rel=1e-4)
    loss.backward()
    close_gradient(a.grad, tensorflow[f"{name}/grad_src"].permute(0, 3, 1, 2))
    close_gradient(b.grad, tensorflow[f"{name}/grad_dst"].permute(0, 3, 1, 2))


@pytest.mark.parametrize("window", losses.WINDOWS)
def test_tensorflow_soft_indices(tensorflow, rekd, window):
    a, b = (tensorflow[f"{side}_score_nhwc"].permute(0, 3, 1, 2) for side in ("src", "dst"))
    in_a, in_b, *_ = frames(a, b, rekd["uniform/h_src_2_dst"], window)
    for side, score_map in (("src", in_a), ("dst", in_b)):
        index, _ = index_proposal(score_map, window)
        torch.testing.assert_close(
            index, tensorflow[f"weighted/ws{window}/{side}_indexes"], rtol=0, atol=1e-3
        )
