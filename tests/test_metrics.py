"""All metrics: recorded values of the original, reference implementations, known results."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tiepoints import metrics
from tiepoints.geometry import warp_points
from tiepoints.metrics.repeatability import mutual_repeatability

SIZE = (120, 160)


def grid(step: int = 25) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(20.0, 140, step), torch.arange(20.0, 100, step))


def shift(x: float, y: float) -> torch.Tensor:
    return torch.tensor([[1.0, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float64)


def score(a, b, H=None, **options) -> float:
    return mutual_repeatability(a, b, torch.eye(3) if H is None else H, SIZE, SIZE, **options)


def test_identity_is_one():
    assert score(grid(), grid()) == 1


def test_far_points_are_not_repeated():
    assert score(grid(), grid() + torch.tensor([10.0, 0]), border=0) == 0


def test_threshold():
    moved = grid() + torch.tensor([2.0, 0])
    assert score(grid(), moved) == 1
    assert score(grid(), moved, threshold=1.9) == 0
    assert score(grid(), moved, threshold=2.0) == 1


def test_no_points():
    none = torch.zeros(0, 2)
    assert score(none, grid()) == score(grid(), none) == score(none, none) == 0
    assert score(grid(), grid(), shift(1000, 0)) == 0


def test_true_homography_counts():
    H = shift(11, -7)
    inner = torch.cartesian_prod(torch.arange(40.0, 110, 10), torch.arange(40.0, 80, 10))
    assert score(inner, inner + torch.tensor([11.0, -7]), H) == 1
    assert score(inner, inner + torch.tensor([11.0, -7]), shift(-11, 7), border=0) < 0.7


def test_one_to_one():
    crowd = torch.tensor([[50.0, 50], [51, 50], [50, 51]])
    one = torch.tensor([[50.0, 50]])
    assert score(crowd, one) == score(one, crowd) == 1
    two = torch.tensor([[50.0, 50], [90, 80]])
    assert score(crowd, two) == score(two, crowd) == 0.5


def test_points_outside_the_common_area_do_not_count():
    outside = torch.tensor([[10.0, 60]])
    a = torch.cat([outside, grid()])
    assert score(a, grid()) == 1
    assert score(a, a[1:], border=0) == 1
    assert score(outside, outside) == 0
    assert score(outside, outside, border=10) == 1


def test_only_the_strongest_are_counted():
    a = grid()
    order = torch.arange(len(a) - 1, -1, -1)
    assert score(a, a[order], num_keypoints=3) == 0
    assert score(a, a, num_keypoints=3) == 1
    assert score(torch.cat([torch.tensor([[0.0, 0]]), a]), a, num_keypoints=3) == pytest.approx(
        1
    )  # cut after the border


# ---- Key.Net's protocol against the original's recorded stages

GOLD_CASES = [
    f"{system}/{pair}"
    for system in ("keynet", "sift", "fast", "akaze")
    for pair in ("graf_1-2", "graf_1-4", "boat_1-3", "leuven_1-4")
]


@pytest.fixture(scope="module")
def goldens(reference_dir):
    pairs = json.loads((reference_dir / "eval_goldens.json").read_text())["pairs"]
    return np.load(reference_dir / "eval_goldens.npz"), pairs


@pytest.mark.parametrize("case", GOLD_CASES)
def test_official_protocol_stage_by_stage(goldens, case):
    arrays, pairs = goldens
    gold = pairs[case]["official_stable_sort"]

    def read(name):
        return torch.from_numpy(arrays[f"{case}/{name}"])

    H, H_ba = read("H_src_to_dst"), read("H_dst_to_src")
    size_a, size_b = tuple(read("shape_src").tolist()), tuple(read("shape_dst").tolist())
    a, b = read("kpts_src"), read("kpts_dst")
    inside_a = metrics.in_official_mask(a[:, :2], size_a, H, size_b).nonzero()[:, 0]
    inside_b = metrics.in_official_mask(b[:, :2], size_b, H_ba, size_a).nonzero()[:, 0]
    assert torch.equal(inside_a, read("common_idx_src").long())
    assert torch.equal(inside_b, read("common_idx_dst").long())
    a = a[inside_a][a[inside_a][:, 3].argsort(descending=True, stable=True)[:1000]]
    b = b[inside_b][b[inside_b][:, 3].argsort(descending=True, stable=True)[:1000]]
    in_a, scale = warp_points(b[:, :2], H_ba), metrics.projected_scale(b[:, :2], b[:, 2], H_ba)
    torch.testing.assert_close(
        torch.cat([in_a, scale[:, None]], dim=1),
        read("points_dst_in_src")[:, :3],
        atol=1e-6,
        rtol=1e-9,
    )
    # from here with the stored keypoints, so that stages are tested separately
    a, b = read("points_src"), read("points_dst_in_src")
    near = metrics.near_pairs(a[:, :2], b[:, :2])
    multi, _ = metrics.overlap_correspondences(near, a[:, 2], b[:, 2])
    single, _ = metrics.overlap_correspondences(near)
    assert torch.equal(multi.flip(1), read("stable_corr_multi").long())
    assert torch.equal(single.flip(1), read("stable_corr_single").long())
    rep = metrics.keynet_repeatability(a[:, :2], a[:, 2], b[:, :2], b[:, 2], official=True)
    assert rep["rep_SL"] * 100 == pytest.approx(gold["rep_multi_scale"], abs=1e-6)
    assert rep["rep_L"] * 100 == pytest.approx(gold["rep_single_scale"], abs=1e-6)
    assert rep["err_SL"] == pytest.approx(gold["error_overlap_multi_scale"], abs=1e-6)
    assert rep["err_L"] == pytest.approx(gold["error_overlap_single_scale"], abs=1e-6)
    assert (rep["corr_SL"], rep["corr_L"]) == (
        gold["num_points_multi_scale"],
        gold["num_points_single_scale"],
    )
    assert (rep["points"], rep["possible"]) == (gold["total_num_points"], gold["possible_matches"])
    matches = read("stable_mutual_matches").long()
    found = metrics.keynet_matching(a[:, :2], b[:, :2], matches, int(rep["possible"]))
    assert found["matches"] == gold["num_mutual_matches"]
    for t in range(1, 11):
        assert found[f"score@{t}"] == pytest.approx(gold["match_score"][str(t)], abs=1e-6)
        assert found[f"possible@{t}"] == pytest.approx(
            gold["match_score_possible"][str(t)], abs=1e-6
        )
        assert found[f"correct@{t}"] == gold["num_correct_matches"][str(t)]
    assert np.mean([found[f"score@{t}"] for t in range(1, 11)]) == pytest.approx(
        gold["avg_match_score_1_10"], abs=1e-6
    )


# ---- known results


def test_circle_overlap_by_counting_pixels():
    y, x = torch.meshgrid(
        torch.arange(-80.0, 80, 0.25), torch.arange(-80.0, 80, 0.25), indexing="ij"
    )
    for d, ra, rb in ((0.0, 30, 20), (11.858637, 30, 30), (25, 30, 12), (10, 30, 27), (70, 30, 30)):
        one, two = x**2 + y**2 <= ra**2, (x - d) ** 2 + y**2 <= rb**2
        counted = float((one & two).sum() / (one | two).sum())
        found = float(
            metrics.circle_overlap(
                *(torch.tensor([float(v)], dtype=torch.float64) for v in (d, ra, rb))
            )
        )
        assert found == pytest.approx(counted, abs=2e-3)


def test_appendix_a6():
    def overlap(d, ra, rb):
        return float(
            metrics.circle_overlap(
                *(torch.tensor([float(v)], dtype=torch.float64) for v in (d, ra, rb))
            )
        )

    assert overlap(11.858637, 30, 30) == pytest.approx(0.6, abs=1e-6)
    assert overlap(0, 30, 30 / 2**0.5) == pytest.approx(0.5, abs=1e-6)
    assert overlap(10.86, 30, 27) == pytest.approx(0.6, abs=1e-3)
    assert overlap(8.53, 30, 24) == pytest.approx(0.6, abs=1e-3)


def test_one_to_one_equals_a_double_loop():
    torch.manual_seed(3)
    a, b = torch.rand(120, 2).double() * 100, torch.rand(90, 2).double() * 100
    near = metrics.near_pairs(a, b)
    found, overlap = metrics.overlap_correspondences(near)
    candidates = []
    for j in range(90):
        for i in range(120):
            d = (a[i] - b[j]).norm()
            iou = float(
                metrics.circle_overlap(
                    d[None], torch.tensor([30.0]).double(), torch.tensor([30.0]).double()
                )
            )
            if iou >= 0.6:
                candidates.append((iou, i, j))
    candidates.sort(key=lambda c: -c[0])
    used_i, used_j, plain = set(), set(), []
    for _, i, j in candidates:
        if i not in used_i and j not in used_j:
            used_i.add(i)
            used_j.add(j)
            plain.append((i, j))
    assert [tuple(p) for p in found.tolist()] == plain
    assert (overlap >= 0.6).all()


def test_neighboring_sqrt2_levels_never_match_in_sl():
    xy = grid()
    one, other = torch.ones(len(xy)), torch.full((len(xy),), 2**0.5)
    rep = metrics.keynet_repeatability(xy, one, xy, other)
    assert (rep["rep_SL"], rep["rep_L"], rep["err_SL"]) == (0, 1, None)
    assert metrics.keynet_repeatability(xy, one, xy, other, official=True)["err_SL"] == 0
    assert metrics.keynet_repeatability(xy, one, xy, one)["rep_SL"] == 1


def test_no_keypoints_in_all_metrics():
    none, scale = torch.zeros(0, 2), torch.zeros(0)
    rep = metrics.keynet_repeatability(none, scale, grid(), torch.ones(len(grid())))
    assert (rep["rep_SL"], rep["rep_L"], rep["points"], rep["possible"]) == (0, 0, 0, 0)
    assert (
        metrics.keynet_matching(none, grid(), torch.zeros(0, 2, dtype=torch.long), 0)["score@5"]
        == 0
    )
    assert metrics.rekd_repeatability(none, grid(), torch.eye(3)) == 0
    assert metrics.localization(none, grid(), torch.eye(3), SIZE, SIZE)["err@3"] is None
    assert metrics.scale_range(scale) is None


def test_projected_scale_is_the_square_root_of_the_area_ratio():
    H = torch.tensor([[1.1, 0.2, 3], [-0.1, 0.9, 5], [1e-3, -5e-4, 1]], dtype=torch.float64)
    xy = torch.tensor([[40.0, 30], [100, 80]], dtype=torch.float64)
    step = 1e-4
    corners = [torch.tensor(c, dtype=torch.float64) * step for c in ((0, 0), (1, 0), (0, 1))]
    o, u, v = (warp_points(xy + c, H) for c in corners)
    area = ((u - o)[:, 0] * (v - o)[:, 1] - (u - o)[:, 1] * (v - o)[:, 0]).abs() / step**2
    scale = torch.tensor([2.0, 3])
    torch.testing.assert_close(
        metrics.projected_scale(xy, scale, H), scale * area.sqrt(), rtol=1e-4, atol=0
    )


def test_exact_and_official_common_area_agree_away_from_the_edge():
    torch.manual_seed(0)
    xy = torch.rand(2000, 2).double() * torch.tensor([159.0, 119])
    H = torch.tensor([[0.9, 0.2, -8], [-0.1, 1.1, 6], [2e-4, 0, 1]], dtype=torch.float64)
    exact, official = (
        metrics.in_both_images(xy, SIZE, H, SIZE),
        metrics.in_official_mask(xy, SIZE, H, SIZE),
    )
    assert 0.2 < exact.double().mean() < 0.9
    assert (exact != official).double().mean() < 0.02


def test_rekd_counts_one_direction_with_a_strict_limit():
    a, b = torch.tensor([[50.0, 50], [51, 50], [500, 500]]), torch.tensor([[50.0, 50]])
    assert metrics.rekd_repeatability(a, b, torch.eye(3)) == pytest.approx(2 / 3)
    assert metrics.rekd_repeatability(a[:1] + torch.tensor([3.0, 0]), b, torch.eye(3)) == 0


def test_matching_accuracy_is_inclusive():
    shares = metrics.matching_accuracy(torch.tensor([0.5, 1.0, 3.0, 9]))
    assert list(shares.values()) == [0.5, 0.5, 0.75, 0.75, 0.75]
    assert metrics.matching_accuracy(torch.zeros(0))["mma@3"] == 0


def test_dlt_and_corner_error():
    H = torch.tensor([[1.1, 0.2, 3], [-0.1, 0.9, 5], [1e-3, -5e-4, 1]], dtype=torch.float64)
    xy = torch.rand(30, 2, dtype=torch.float64) * 100
    found = metrics.homography_dlt(xy, warp_points(xy, H))
    assert metrics.corner_error(found, H, SIZE) < 1e-6
    assert metrics.corner_error(shift(3, 4), shift(0, 0), SIZE) == pytest.approx(5)
    assert metrics.homography_dlt(xy[:3], xy[:3]) is None


def test_pose_error():
    T = torch.eye(4, dtype=torch.float64)
    T[0, 3] = 2
    angle = torch.tensor(np.deg2rad(10.0))
    c, s = angle.cos(), angle.sin()
    R = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    assert metrics.pose_error(R, torch.tensor([1.0, 0, 0]), T) == pytest.approx(10, abs=1e-5)
    assert metrics.pose_error(torch.eye(3), torch.tensor([-1.0, 1, 0]), T) == pytest.approx(45)


def test_error_auc():
    assert metrics.error_auc([0.0, 0.0], (1, 5)) == [1, 1]
    assert metrics.error_auc([None, float("inf")], (5,)) == [0]
    # recall rises along a line from (0, 0) to (2, 1), then stays: (1 + 3) / 5
    assert metrics.error_auc([2.0], (5,)) == [pytest.approx((1 + 3) / 5)]
    assert metrics.error_auc([], (5,)) == [0]


def test_chance_correction_of_a_lattice_is_zero():
    torch.manual_seed(0)
    size = (600, 800)
    lattice = torch.cartesian_prod(torch.arange(5.0, 800, 20), torch.arange(5.0, 600, 20))
    other = torch.cartesian_prod(torch.arange(13.0, 800, 20), torch.arange(9.0, 600, 20))
    one = torch.ones(len(lattice))

    def rep(b):
        a_in, b_in = metrics.keynet_points(lattice, b, torch.eye(3), size, size, num_keypoints=2000)
        return metrics.keynet_repeatability(
            lattice[a_in], one[a_in], b[b_in].double(), torch.ones(len(b_in))
        )["rep_L"]

    value, chance = rep(other), rep(metrics.rotate_180(other, size))
    assert value > 0.7
    assert abs(metrics.above_chance(value, chance)) < 0.3
    assert metrics.above_chance(1.0, 0.5) == 1
    assert metrics.above_chance(0.5, 0.5) == 0


def test_epipolar_errors_are_distances_to_epipolar_lines():
    """Points seen by two cameras; a match shifted by d pixels across its epipolar line has an error
    of d in both images.
    """
    K = torch.tensor([[500.0, 0, 320], [0, 480, 240], [0, 0, 1]], dtype=torch.float64)
    c, s = math.cos(0.2), math.sin(0.2)
    T = torch.tensor([[c, 0, s, 1.0], [0, 1, 0, 0.2], [-s, 0, c, 0.1]], dtype=torch.float64)
    X = torch.rand(
        20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ) * 2 + torch.tensor([-1, -1, 4.0])

    def seen(points):
        x = points @ K.T
        return x[:, :2] / x[:, 2:]

    a, b = seen(X), seen(X @ T[:, :3].T + T[:, 3])
    assert metrics.epipolar_errors(a, b, K, K, T).max() < 1e-20
    # a camera translated sideways has horizontal epipolar lines
    level = torch.eye(4, dtype=torch.float64)
    level[0, 3] = 2.0
    moved = seen(X + torch.tensor([2.0, 0, 0])) + torch.tensor([0, 4.8])
    found = metrics.epipolar_errors(a, moved, K, K, level)
    torch.testing.assert_close(found, torch.full((20,), 2 * 0.01**2, dtype=torch.float64))
