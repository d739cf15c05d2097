"""Robust geometry: known geometry with all backends, chance, and degenerate inputs."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import poselib
import pytest
import torch

from tiepoints.estimation import backends, estimate, relative_pose
from tiepoints.geometry import warp_points
from tiepoints.structs import Estimate
from tiepoints.verification import (
    Correspondences,
    beyond_chance,
    decompose_homography,
    num_false_alarms,
    verify_model,
)

KINDS = ("homography", "fundamental", "essential", "pose")
WIDTH, HEIGHT = 640, 480
H = torch.tensor([[1.1, 0.1, 20.0], [-0.05, 0.95, 10.0], [1e-4, -5e-5, 1.0]], dtype=torch.float64)
K_A = torch.tensor([[500.0, 0, 320], [0, 480, 240], [0, 0, 1]], dtype=torch.float64)
K_B = torch.tensor([[620.0, 3, 300], [0, 610, 260], [0, 0, 1]], dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def anywhere(n: int, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(n, 2, generator=rng, dtype=torch.float64) * torch.tensor([WIDTH, HEIGHT])


def rotation_matrix(x: float, y: float, z: float) -> torch.Tensor:
    return torch.linalg.matrix_exp(
        torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    )


R = rotation_matrix(0.03, -0.15, 0.05)
T = torch.nn.functional.normalize(torch.tensor([1.0, 0.15, 0.2], dtype=torch.float64), dim=0)
#: A motion towards the scene, not perpendicular to the plane below.
TOWARDS = torch.nn.functional.normalize(torch.tensor([0.5, -0.2, -1.0], dtype=torch.float64), dim=0)


def project(K: torch.Tensor, world: torch.Tensor) -> torch.Tensor:
    seen = world @ K.T
    return seen[:, :2] / seen[:, 2:]


def views(
    n: int, rng: torch.Generator, t: torch.Tensor = T, flat: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of a scene 4 to 9 baselines away (or of a plane), without noise."""
    depth = 4 + 5 * torch.rand(n, 1, generator=rng, dtype=torch.float64)
    rays = (
        torch.cat([anywhere(n, rng), torch.ones(n, 1, dtype=torch.float64)], dim=1)
        @ torch.linalg.inv(K_A).T
    )
    if flat:
        depth = 5 / (rays @ torch.tensor([[0.3], [0.2], [1.0]], dtype=torch.float64))
    world = rays * depth
    return project(K_A, world), project(K_B, world @ R.T + t)


def spoiled(
    a: torch.Tensor,
    b: torch.Tensor,
    rng: torch.Generator,
    noise: float = 0.5,
    outliers: float = 0.5,
):
    """Add noise to both, and make the last part of the matches incorrect."""
    right = round((1 - outliers) * len(a))
    a = a + noise * torch.randn(a.shape, generator=rng, dtype=torch.float64)
    b = b + noise * torch.randn(b.shape, generator=rng, dtype=torch.float64)
    b[right:] = anywhere(len(b) - right, rng)
    return a, b, right


def cameras(kind: str) -> dict[str, torch.Tensor]:
    return {"K_a": K_A, "K_b": K_B} if kind in ("essential", "pose") else {}


def essential(pose: torch.Tensor) -> torch.Tensor:
    x, y, z = pose[:, 3].tolist()
    return torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64) @ pose[:, :3]


def degrees(cosine: torch.Tensor) -> float:
    return math.degrees(math.acos(min(1.0, max(-1.0, float(cosine)))))


def assert_failed(result: Estimate, n: int) -> None:
    assert not result.ok
    assert result.reason
    assert result.model is None
    assert result.inliers.shape == (n,)
    assert result.inliers.dtype == torch.bool


# ---- known geometry


def check_answer(result: Estimate, loose: bool) -> None:
    """Documented tolerances: 1 px and 1 degree (4 degrees for the direction of t); twice that for
    plain RANSAC without refinement.
    """
    assert result.ok, result.reason
    model, factor = result.model, 2.0 if loose else 1.0
    assert model.dtype == torch.float64
    a, b = views(200, generator(99))
    if result.geometry == "homography":
        a = anywhere(200, generator(99))
        assert (warp_points(a, model) - warp_points(a, H)).norm(dim=1).max() < 2 * factor
        assert model[2, 2] == 1
    elif result.geometry == "fundamental":
        one = torch.ones(len(a), 1, dtype=torch.float64)
        lines = torch.cat([a, one], 1) @ model.T
        assert (
            (lines * torch.cat([b, one], 1)).sum(1).abs() / lines[:, :2].norm(dim=1)
        ).median() < factor
        assert torch.linalg.svdvals(model)[2] < 1e-6
    elif result.geometry == "essential":
        assert (model - essential(torch.cat([R, T[:, None]], 1))).norm() < 0.1 * factor
        torch.testing.assert_close(
            torch.linalg.svdvals(model),
            torch.tensor([1.0, 1, 0], dtype=torch.float64),
            atol=1e-6,
            rtol=0,
        )
    else:
        assert degrees((torch.trace(model[:, :3] @ R.T) - 1) / 2) < factor
        assert degrees(model[:, 3] @ T) < 4 * factor
        torch.testing.assert_close(
            model[:, :3] @ model[:, :3].T, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0
        )
        assert float(model[:, 3].norm()) == pytest.approx(1)


def drawn(kind: str, seed: int, n: int = 300) -> tuple[torch.Tensor, torch.Tensor, int]:
    rng = generator(seed)
    if kind == "homography":
        a = anywhere(n, rng)
        return spoiled(a, warp_points(a, H), rng)
    return spoiled(*views(n, rng), rng)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("kind", "backend"), [(k, b) for k in KINDS for b in backends(k)])
def test_known_geometry_with_noise_and_half_outliers(kind, backend, seed):
    a, b, right = drawn(kind, seed)
    result = estimate(a, b, kind, backend=backend, threshold=2.0, **cameras(kind))
    check_answer(result, loose=backend == "opencv")
    assert result.inliers[:right].float().mean() > (0.8 if backend == "opencv" else 0.9)
    assert result.inliers[right:].float().mean() < 0.1


def test_relative_pose_equals_estimate_of_the_pose():
    a, b, _ = drawn("pose", 0)
    result = relative_pose(a, b, K_A, K_B, threshold=2.0)
    check_answer(result, loose=False)
    same = estimate(a, b, "pose", threshold=2.0, confidence=0.99999, **cameras("pose"))
    assert torch.equal(result.model, same.model)
    E = estimate(a, b, "essential", threshold=2.0, confidence=0.99999, **cameras("essential"))
    torch.testing.assert_close(E.model, essential(result.model))
    assert torch.equal(E.inliers, result.inliers)


@pytest.mark.parametrize("kind", KINDS)
def test_inliers_are_those_of_poselib(kind):
    poselib = pytest.importorskip("poselib")
    a, b, _ = drawn(kind, 4)
    result = estimate(a, b, kind, threshold=2.0, **cameras(kind))
    options = {
        "max_reproj_error": 2.0,
        "max_epipolar_error": 2.0,
        "max_iterations": 10_000,
        "success_prob": 0.9999,
        "seed": 0,
    }
    if kind in ("homography", "fundamental"):
        info = getattr(poselib, f"estimate_{kind}")(a.numpy(), b.numpy(), options, {})[1]
    else:
        models = [
            {
                "model": "PINHOLE",
                "width": 1,
                "height": 1,
                "params": [float(K[i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2))],
            }
            for K in (K_A, K_B)
        ]
        info = poselib.estimate_relative_pose(a.numpy(), b.numpy(), *models, options, {})[1]
    theirs = torch.tensor(info["inliers"], dtype=torch.bool)
    assert (
        theirs != result.inliers
    ).float().mean() < 0.02  # they compute inliers before the last refinement


@pytest.mark.parametrize("kind", KINDS)
def test_point_types_do_not_matter_and_seeds_are_reproducible(kind):
    a, b, _ = drawn(kind, 5)
    a, b = a.float(), b.float()
    first = estimate(a, b, kind, **cameras(kind))
    assert first.ok
    for x, y in (
        (a.double(), b),
        (a.numpy(), b.numpy()),
        (a.tolist(), b.tolist()),
        (a.clone().requires_grad_(), b),
    ):
        again = estimate(x, y, kind, **cameras(kind))
        torch.testing.assert_close(again.model, first.model, rtol=1e-5, atol=1e-6)
        assert not again.model.requires_grad
    assert torch.equal(estimate(a, b, kind, **cameras(kind)).model, first.model)
    assert estimate(a.round().long(), b.round().long(), kind, **cameras(kind)).ok
    K = {name: K.float().requires_grad_() for name, K in cameras(kind).items()}
    assert estimate(a, b, kind, seed=7, **K).ok


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_points_on_two_devices():
    a, b, _ = drawn("pose", 0)
    result = estimate(a.cuda(), b, "pose", K_a=K_A.cuda(), K_b=K_B)
    assert result.ok
    assert result.model.device.type == result.inliers.device.type == "cpu"


# ---- chance


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(
    ("n", "threshold", "seeds"),
    [(8, 3.0, 20), (12, 1.0, 20), (25, 5.0, 8), (60, 2.0, 6), (300, 4.0, 2)],
)
@pytest.mark.parametrize(
    "kind", ["homography", "fundamental", "pose"]
)  # an essential matrix is estimated as a pose
def test_random_matches_have_no_estimate(kind, n, threshold, seeds, clustered):
    for seed in range(seeds):
        rng = generator(seed)

        def draw(rng=rng) -> torch.Tensor:
            centers = anywhere(5, rng)[torch.randint(5, (n,), generator=rng)]
            return (
                centers + 8 * torch.randn(n, 2, generator=rng, dtype=torch.float64)
                if clustered
                else anywhere(n, rng)
            )

        assert_failed(
            estimate(draw(), draw(), kind, threshold=threshold, seed=seed, **cameras(kind)), n
        )


@pytest.mark.parametrize(
    ("kind", "backend"), [(k, b) for k in KINDS for b in backends(k) if b != "poselib"]
)
def test_random_matches_have_no_estimate_with_opencv(kind, backend):
    for seed in range(3):
        for n in (9, 40):
            a, b = anywhere(n, generator(seed)), anywhere(n, generator(100 + seed))
            assert_failed(
                estimate(
                    a, b, kind, backend=backend, threshold=3.0, max_iterations=500, **cameras(kind)
                ),
                n,
            )


@pytest.mark.parametrize("kind", KINDS)
def test_threshold_as_large_as_the_scene_has_no_estimate(kind):
    a, b, _ = drawn(kind, 0, n=60)
    assert_failed(estimate(a / 100, b / 100, "homography", threshold=5.0), 60)
    assert_failed(estimate(a, b, kind, threshold=800.0, **cameras(kind)), 60)


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_matches_count_once(kind):
    rng = generator(0)
    a, b = (anywhere(6, rng).repeat(20, 1) for _ in range(2))
    jitter = 0.4 * torch.randn(2, 120, 2, generator=rng, dtype=torch.float64)
    for x, y in ((a, b), (a + jitter[0], b + jitter[1])):
        assert_failed(estimate(x, y, kind, threshold=3.0, **cameras(kind)), 120)


@pytest.mark.parametrize("kind", KINDS)
def test_few_consistent_matches_are_enough(kind):
    rng = generator(1)
    n = {"homography": 8, "fundamental": 14}.get(kind, 12)
    a = anywhere(n, rng)
    a, b = (a, warp_points(a, H)) if kind == "homography" else views(n, rng)
    result = estimate(a, b, kind, threshold=1.0, **cameras(kind))
    assert result.ok, result.reason
    assert result.inliers.all()


@pytest.mark.parametrize("kind", ["fundamental", "pose"])
def test_poselib_draws_at_least_as_many_samples(kind):
    """Matches without outliers need few."""
    rng = generator(3)
    a, b = views(200, rng)
    name = "estimate_relative_pose" if kind == "pose" else "estimate_fundamental"
    estimator = relative_pose if kind == "pose" else estimate
    iterations = []

    def counted(*arguments):
        found = getattr(poselib, name)(*arguments)
        iterations.append(found[1]["iterations"])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiepoints.estimation.poselib", SimpleNamespace(**{name: counted}))
        for least in (1, 300):
            assert estimator(a, b, **cameras(kind), min_iterations=least).ok
    assert iterations[0] < 300 <= iterations[1] <= 400


@pytest.mark.parametrize("flat", [False, True])
def test_matches_beyond_chance_are_those_of_the_verification(flat):
    """Also of a plane, which leaves the fundamental matrix undetermined."""
    rng = generator(0)
    a, b, _ = spoiled(*views(200, rng, flat=flat), rng, noise=0.5, outliers=0.3)
    for x, y, agree in ((a, b, True), (anywhere(60, rng), anywhere(60, rng), False)):
        model = estimate(x, y, "fundamental", threshold=2.0, verify=False).model
        matches = Correspondences("fundamental", x, y, None, 2.0)
        verified = verify_model(matches, model)
        assert verified.ok == (agree and not flat)
        inliers = beyond_chance(matches, model)
        assert torch.equal(inliers, verified.inliers)
        assert bool(inliers.any()) == agree


def test_false_alarms_equal_the_formula():
    n, k, sample, chance = 30, 11, 4, 0.07
    rng = generator(0)
    matches = Correspondences("homography", anywhere(n, rng), anywhere(n, rng), None, 1.0)
    agreeing = torch.arange(n) < k
    tail = sum(
        math.comb(n - sample, j) * chance**j * (1 - chance) ** (n - sample - j)
        for j in range(k - sample, n - sample + 1)
    )
    found = num_false_alarms(matches, agreeing, sample, 3, chance)
    assert found == pytest.approx(3 * math.comb(n, sample) * tail)
    twice = Correspondences("homography", matches.a.repeat(2, 1), matches.b.repeat(2, 1), None, 1.0)
    assert num_false_alarms(twice, agreeing.repeat(2), sample, 3, chance) == pytest.approx(found)
    assert num_false_alarms(matches, torch.arange(n) < sample, sample, 3, chance) == math.inf


# ---- degenerate inputs


LINE = torch.stack([torch.arange(50.0), 2 * torch.arange(50.0)], dim=1)
WITHOUT = {
    "none": (torch.zeros(0, 2), torch.zeros(0, 2)),
    "one": (torch.rand(1, 2), torch.rand(1, 2)),
    "four": (100 * torch.rand(4, 2), 100 * torch.rand(4, 2)),
    "eight": (100 * torch.rand(8, 2), 100 * torch.rand(8, 2)),
    "one point": (torch.ones(50, 2), torch.ones(50, 2)),
    "to one point": (100 * torch.rand(50, 2), torch.ones(50, 2)),
    "line": (LINE, LINE + 3),
    "to a line": (100 * torch.rand(50, 2), LINE),
    "nan": (torch.full((50, 2), math.nan), torch.rand(50, 2)),
    "one inf": (torch.rand(50, 2), torch.rand(50, 2).index_fill(0, torch.tensor(7), math.inf)),
    "huge": (1e30 * torch.rand(50, 2), torch.rand(50, 2)),
    "tiny": (1e-30 * torch.rand(50, 2), 1e-30 * torch.rand(50, 2)),
}


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize(("kind", "backend"), [(k, b) for k in KINDS for b in backends(k)])
def test_degenerate_inputs_are_not_ok(kind, backend, name):
    a, b = WITHOUT[name]
    assert_failed(
        estimate(a, b, kind, backend=backend, max_iterations=200, **cameras(kind)), len(a)
    )


@pytest.mark.parametrize("backend", backends("homography"))
def test_identical_images_have_only_a_homography(backend):
    a = anywhere(100, generator(0))
    same = estimate(a, a, "homography", backend=backend)
    assert same.ok, same.reason
    torch.testing.assert_close(same.model, torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)
    for kind in KINDS[1:]:
        K = {"K_a": K_A, "K_b": K_A} if cameras(kind) else {}
        assert_failed(estimate(a, a, kind, backend=backend, **K), 100)


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["poselib", "opencv", "usac_magsac"])
def test_rotated_camera_without_translation_has_no_pose(backend, noise):
    if backend not in backends("pose"):
        pytest.skip("needs OpenCV")
    for seed in range(3):
        rng = generator(seed)
        a, b, right = spoiled(
            *views(200, rng, t=torch.zeros(3, dtype=torch.float64)), rng, noise=noise, outliers=0.3
        )
        result = estimate(a, b, "homography", backend=backend)
        assert result.ok, result.reason
        for kind in KINDS[1:]:
            result = estimate(a, b, kind, backend=backend, **cameras(kind))
            assert_failed(result, 200)
            assert "rotated" in result.reason
            assert result.inliers[:right].float().mean() > 0.6  # their agreement is given


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["poselib", "opencv", "usac_magsac"])
def test_plane_has_no_fundamental_matrix_and_two_poses(backend, noise):
    if backend not in backends("pose"):
        pytest.skip("needs OpenCV")
    for seed, t in ((0, T), (1, T), (2, TOWARDS), (3, TOWARDS)):
        rng = generator(seed)
        a, b, _ = spoiled(*views(200, rng, t=t, flat=True), rng, noise=noise, outliers=0.3)
        assert estimate(a, b, "homography", backend=backend).ok
        result = estimate(a, b, "fundamental", backend=backend)
        assert_failed(result, 200)
        assert "plane" in result.reason
        for kind in ("essential", "pose"):
            result = estimate(a, b, kind, backend=backend, **cameras(kind))
            if t is T and (
                result.ok or backend == "poselib"
            ):  # the other pose has points behind the cameras,
                check_answer(result, loose=True)  # which OpenCV does not check
            else:
                assert_failed(result, 200)
                assert "two poses" in result.reason


@pytest.mark.parametrize("kind", KINDS[1:])
def test_enough_points_off_the_plane_resolve_the_ambiguity(kind):
    rng = generator(0)
    plane, rest = views(150, rng, flat=True), views(60, rng)
    a, b, _ = spoiled(
        *(torch.cat(pair) for pair in zip(plane, rest, strict=True)), rng, outliers=0.0
    )
    wrong = anywhere(60, rng), anywhere(60, rng)
    result = estimate(torch.cat([a, wrong[0]]), torch.cat([b, wrong[1]]), kind, **cameras(kind))
    check_answer(result, loose=True)


def test_a_line_and_two_points_do_not_determine_a_homography():
    rng = generator(3)
    along = 600 * torch.rand(40, 1, generator=rng, dtype=torch.float64)
    line = along * torch.tensor([[0.9, 0.4]], dtype=torch.float64) + 20
    a = torch.cat([line, anywhere(12, rng)])
    b = warp_points(a, H)
    full = estimate(a, b, "homography")
    assert full.ok, full.reason
    b[42:] = anywhere(10, rng)
    result = estimate(a, b, "homography")
    assert_failed(result, 52)
    assert "collinear" in result.reason


def test_homographies_across_the_horizon_are_rejected():
    rng = generator(0)
    a = anywhere(60, rng)
    across = torch.tensor(
        [[1.0, 0, 0], [0, 1.0, 0], [1 / 320.5, 0, -1.0]], dtype=torch.float64
    )  # points on both sides of the horizon
    b = warp_points(a, across)
    b = b / b.abs().max() * 1e5
    result = estimate(a, b, "homography")
    if result.ok:  # points on one side
        depth = torch.cat([a, torch.ones(60, 1, dtype=torch.float64)], 1) @ result.model[2]
        assert len(depth[result.inliers].sign().unique()) == 1


def test_poses_of_a_plane_contain_the_correct_one():
    normal, distance = (
        torch.nn.functional.normalize(torch.tensor([0.3, 0.2, 1.0], dtype=torch.float64), dim=0),
        5.0,
    )
    plane = R + T[:, None] * normal[None] / distance
    found = decompose_homography(3.0 * plane)
    assert len(found) == 4
    assert min(float((pose - torch.cat([R, T[:, None]], 1)).abs().max()) for pose in found) < 1e-9
    for pose in found:
        assert float(torch.linalg.det(pose[:, :3])) == pytest.approx(1)
    assert decompose_homography(R) == []


# ---- arguments


def test_invalid_arguments_raise():
    a = 100 * torch.rand(9, 2)
    with pytest.raises(ValueError, match="geometry must be one of"):
        estimate(a, a, "affine")
    for wrong in (
        torch.rand(9, 3),
        torch.rand(18),
        torch.rand(1, 9, 2),
        None,
        "points",
        [[1.0, 2.0], [3.0]],
    ):
        with pytest.raises(ValueError, match=r"\(K,2\)"):
            estimate(a, wrong)
        with pytest.raises(ValueError, match=r"\(K,2\)"):
            estimate(wrong, a)
    with pytest.raises(ValueError, match="pairs, got 9 and 8"):
        estimate(a, a[:8])
    with pytest.raises(ValueError, match="real"):
        estimate(a > 50, a)
    for name, values in {
        "threshold": (0, -1.0, math.nan, math.inf),
        "confidence": (0.0, 1.0, math.nan),
        "max_iterations": (0, -5),
        "min_iterations": (-1,),
        "seed": (-1,),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                estimate(a, a, **{name: value})


def test_invalid_intrinsics_raise():
    a, eye = 100 * torch.rand(9, 2), torch.eye(3)
    for kind, K in (
        ("pose", {}),
        ("essential", {"K_a": eye}),
        ("homography", {"K_a": eye}),
        ("fundamental", {"K_a": eye, "K_b": eye}),
    ):
        with pytest.raises(ValueError, match="K_a and K_b"):
            estimate(a, a, kind, **K)
    wrong = [
        eye[:2],
        torch.full((3, 3), math.nan),
        2 * eye,
        torch.diag(torch.tensor([-1.0, 1, 1])),
        torch.diag(torch.tensor([1.0, 0, 1])),
        K_A.T,
    ]
    for K in wrong:
        with pytest.raises(ValueError, match="K_b"):
            relative_pose(a, a, eye, K)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_backends_raise_with_the_allowed_names(kind, monkeypatch):
    a = 100 * torch.rand(9, 2)
    if "opencv" in backends(kind):
        with pytest.raises(ValueError, match=r"poselib, opencv, usac_.*got 'ransac'"):
            estimate(a, a, kind, backend="ransac", **cameras(kind))
        assert ("usac_fm_8pts" in backends(kind)) == (kind == "fundamental")
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert backends(kind) == ["poselib"]
    for backend in ("opencv", "usac_magsac"):
        with pytest.raises(ImportError, match=r"tiepoints\[opencv\]"):
            estimate(a, a, kind, backend=backend, **cameras(kind))
    with pytest.raises(ValueError, match="poselib"):
        estimate(a, a, kind, backend="ransac", **cameras(kind))


def test_estimates_are_tensors_for_numpy_input():
    a, b, _ = drawn("pose", 0)
    result = relative_pose(np.asarray(a), np.asarray(b), K_A.numpy(), K_B.numpy())
    assert isinstance(result.model, torch.Tensor)
    assert isinstance(result.inliers, torch.Tensor)


def test_without_verification_the_estimate_of_the_backend_is_returned():
    """Random matches: protocols measure any estimate."""
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.rand(60, 2, generator=rng) * 500 for _ in range(2))
    K = torch.tensor([[500.0, 0, 250], [0, 500, 250], [0, 0, 1]])
    for kind, intrinsics in (
        ("homography", {}),
        ("fundamental", {}),
        ("pose", {"K_a": K, "K_b": K}),
    ):
        assert not estimate(a, b, kind, **intrinsics).ok
        raw = estimate(a, b, kind, verify=False, **intrinsics)
        assert raw.ok
        assert raw.model is not None
        assert raw.inliers.shape == (60,)
