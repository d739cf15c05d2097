"""All metrics of one image pair with known geometry, as a dictionary ``protocol.name`` -> value.

docs/evaluation.md describes each protocol; the metrics themselves are in ``metrics``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import metrics as m
from ..estimation import estimate, relative_pose
from ..geometry import warp_points
from ..matching import filter_by_rotation, match
from ..names import EVALUATION_NUM_KEYPOINTS
from ..structs import Features, Matches

PROTOCOLS = ("keynet", "rekd", "mutual", "homography", "pose")
#: Number of random selections over which protocols are averaged if keypoints have no ranking
#: (Key.Net, table 2, MSER).
RANDOM_PICKS = 10
HOMOGRAPHY_THRESHOLD = 3.0
#: Inlier threshold of relative pose in pixels of the images compared (PoseLib); for OpenCV,
#: SuperGlue uses 1 px divided by the focal length.
POSE_THRESHOLD = 1.0
#: Distance in px of TILDE's repeatability (Verdie et al. 2015); many to one, of the strongest
#: keypoints without a common area, as REKD's.
TILDE_THRESHOLD = 5.0
#: Inlier threshold of a fundamental matrix in px: the default of ``estimate``.
FUNDAMENTAL_THRESHOLD = 2.0
#: WxBS (Mishkin et al. 2015): distances in px up to which a marked correspondence agrees with an
#: estimate.
MARKED_THRESHOLDS = tuple(range(1, 21))
#: Number of seeds of the estimator; if few matches are correct, the seed changes the mean of
#: 14 pairs by up to 5 percentage points (XFeat).
MARKED_SEEDS = 5


def homography_metrics(
    a: Features,
    b: Features,
    H_ab: Tensor,
    *,
    num_keypoints: int = EVALUATION_NUM_KEYPOINTS,
    protocols: Sequence[str] = PROTOCOLS,
    official: bool = False,
) -> dict[str, float | None]:
    """All metrics of a pair with known homography, ``protocol.name`` -> value
    (docs/evaluation.md); ratios are in 0..1.

    If all scores are equal, the metrics are averaged over ``RANDOM_PICKS`` random selections of
    keypoints.
    """
    options = {"num_keypoints": num_keypoints, "protocols": protocols, "official": official}
    if not (_unranked(a, num_keypoints) or _unranked(b, num_keypoints)):
        return _homography_metrics(a, b, H_ab, **options)  # type: ignore[arg-type]
    picks = []
    for seed in range(RANDOM_PICKS):
        rng = torch.Generator().manual_seed(seed)
        pick_a, pick_b = (f[torch.randperm(len(f), generator=rng)] for f in (a, b))
        picks.append(_homography_metrics(pick_a, pick_b, H_ab, **options))  # type: ignore[arg-type]
    return {key: m.mean([p[key] for p in picks]) for key in picks[0]}


def _unranked(features: Features, num_keypoints: int) -> bool:
    return len(features) > num_keypoints and bool((features.score == features.score[0]).all())


def _homography_metrics(
    a: Features,
    b: Features,
    H_ab: Tensor,
    *,
    num_keypoints: int,
    protocols: Sequence[str],
    official: bool,
) -> dict[str, float | None]:
    H_ab = torch.as_tensor(H_ab, dtype=torch.float64)
    size_a, size_b = a.image_size[::-1], b.image_size[::-1]
    found: dict[str, float | None] = {"points_a": len(a), "points_b": len(b)}
    found["s_range"] = m.mean([m.scale_range(a.scale), m.scale_range(b.scale)])
    described = a.descriptors is not None and b.descriptors is not None
    if "keynet" in protocols:
        found |= _keynet(a, b, H_ab, size_a, size_b, num_keypoints, official, described)
    if "mutual" in protocols:
        local = m.localization(a.xy, b.xy, H_ab, size_a, size_b, num_keypoints=num_keypoints)
        found |= {f"mutual.{k}": v for k, v in local.items()}
        chance = m.localization(
            a.xy, m.rotate_180(b.xy, size_b), H_ab, size_a, size_b, num_keypoints=num_keypoints
        )
        found["chance.rep@3"] = m.above_chance(local["rep@3"] or 0.0, chance["rep@3"] or 0.0)
    first_a, first_b = a[:num_keypoints], b[:num_keypoints]
    matches = Matches(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0))
    if described and ("rekd" in protocols or "homography" in protocols):
        matches = match(first_a, first_b)
    pairs = matches.index
    if "rekd" in protocols:
        found["rekd.repeatability"] = m.rekd_repeatability(first_a.xy, first_b.xy, H_ab)
        found["rekd.repeatability@5"] = m.rekd_repeatability(
            first_a.xy, first_b.xy, H_ab, TILDE_THRESHOLD
        )
        found["rekd.points"] = (len(first_a) + len(first_b)) / 2
        if described:
            found |= {f"rekd.{k}": v for k, v in _accuracy(first_a, first_b, H_ab, pairs).items()}
            if bool(first_a.angle.any()):
                kept = filter_by_rotation(first_a, first_b, matches).index
                found |= {
                    f"rekd*.{k}": v for k, v in _accuracy(first_a, first_b, H_ab, kept).items()
                }
    if "homography" in protocols and described:
        found |= _homography(first_a.xy[pairs[:, 0]], first_b.xy[pairs[:, 1]], H_ab, size_a)
    return found


def _keynet(
    a: Features,
    b: Features,
    H_ab: Tensor,
    size_a,
    size_b,
    num_keypoints: int,
    official: bool,
    described: bool,
):
    H_ba = torch.linalg.inv(H_ab)

    def compare(xy_b: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, float | None]]:
        index_a, index_b = m.keynet_points(
            a.xy, xy_b, H_ab, size_a, size_b, num_keypoints=num_keypoints, official=official
        )
        selected = xy_b[index_b]
        in_a = warp_points(selected.double(), H_ba)
        scale_in_a = m.projected_scale(selected, b.scale[index_b], H_ba)
        repeatability = m.keynet_repeatability(
            a.xy[index_a], a.scale[index_a], in_a, scale_in_a, official=official
        )
        return index_a, index_b, in_a, repeatability

    index_a, index_b, in_a, rep = compare(b.xy)
    chance = compare(m.rotate_180(b.xy, size_b))[3]
    found = {f"keynet.{k}": v for k, v in rep.items()}
    for name in ("SL", "L"):
        found[f"chance.rep_{name}"] = m.above_chance(
            rep[f"rep_{name}"] or 0.0, chance[f"rep_{name}"] or 0.0
        )
    if described:
        pairs = match(a[index_a], b[index_b]).index
        matching = m.keynet_matching(a.xy[index_a], in_a, pairs, int(rep["possible"] or 0))
        found |= {f"keynet.{k}": v for k, v in matching.items()}
    return found


def _accuracy(a: Features, b: Features, H_ab: Tensor, pairs: Tensor) -> dict[str, float | None]:
    return accuracy_metrics(a.xy[pairs[:, 0]], b.xy[pairs[:, 1]], H_ab)


def accuracy_metrics(xy_a: Tensor, xy_b: Tensor, H_ab: Tensor) -> dict[str, float | None]:
    """``matches``, ``mma@t`` and the number of correct matches ``correct@t`` at 1..5 px of matched
    points (K,2).
    """
    index = torch.arange(len(xy_a))[:, None].expand(-1, 2)
    accuracy = m.matching_accuracy(m.match_errors(xy_a, xy_b, H_ab, index))
    correct = {
        key.replace("mma", "correct"): round(share * len(xy_a)) for key, share in accuracy.items()
    }
    return {"matches": len(xy_a), **accuracy, **correct}


def _homography(xy_a: Tensor, xy_b: Tensor, H_ab: Tensor, size_a) -> dict[str, float | None]:
    robust = estimate(xy_a, xy_b, "homography", threshold=HOMOGRAPHY_THRESHOLD, verify=False)
    found: dict[str, float | None] = {"homography.ok": float(robust.ok)}
    plain = m.homography_dlt(xy_a, xy_b)
    for name, H in (("error", robust.model), ("error_dlt", plain)):
        error = math.inf if H is None else m.corner_error(H, H_ab, size_a)
        found[f"homography.{name}"] = error if math.isfinite(error) else None
    return found


def _matched(
    a: Features, b: Features, num_keypoints: int
) -> tuple[Tensor, Tensor, dict[str, float | None]]:
    """Matched positions (K,2) of the strongest keypoints of both images, and the number of
    keypoints.
    """
    a, b = a[:num_keypoints], b[:num_keypoints]
    pairs = match(a, b).index
    return a.xy[pairs[:, 0]], b.xy[pairs[:, 1]], {"points_a": len(a), "points_b": len(b)}


def pose_metrics(
    a: Features, b: Features, K_a: Tensor, K_b: Tensor, T_ab: Tensor, *, num_keypoints: int
) -> dict[str, float | None]:
    """``matched_pose_metrics`` of the mutual nearest neighbors of the first ``num_keypoints``."""
    xy_a, xy_b, found = _matched(a, b, num_keypoints)
    return {**found, **matched_pose_metrics(xy_a, xy_b, K_a, K_b, T_ab)}


def matched_pose_metrics(
    xy_a: Tensor,
    xy_b: Tensor,
    K_a: Tensor,
    K_b: Tensor,
    T_ab: Tensor,
    *,
    backends: Sequence[str] = ("poselib", "opencv"),
) -> dict[str, float | None]:
    """Pose error in degrees by each backend (180 = failed), number of matches (K,2), number of
    correct ones (``pose.right``) and their ratio (``pose.precision``).
    """
    correct = int((m.epipolar_errors(xy_a, xy_b, K_a, K_b, T_ab) < m.MAX_EPIPOLAR_ERROR).sum())
    found: dict[str, float | None] = {"pose.matches": len(xy_a)}
    found |= {"pose.right": correct, "pose.precision": correct / len(xy_a) if len(xy_a) else 0.0}
    for backend in backends:
        pose = relative_pose(
            xy_a, xy_b, K_a, K_b, backend=backend, threshold=POSE_THRESHOLD, verify=False
        )
        found[f"pose.error_{backend}"] = (
            180.0 if pose.model is None else m.pose_error(pose.model[:, :3], pose.model[:, 3], T_ab)
        )
    return found


def marked_metrics(
    a: Features, b: Features, marked_a: Tensor, marked_b: Tensor, *, num_keypoints: int
) -> dict[str, float | None]:
    """``matched_marked_metrics`` of the mutual nearest neighbors of the first
    ``num_keypoints``.
    """
    xy_a, xy_b, found = _matched(a, b, num_keypoints)
    return {**found, **matched_marked_metrics(xy_a, xy_b, marked_a, marked_b)}


def matched_marked_metrics(
    xy_a: Tensor, xy_b: Tensor, marked_a: Tensor, marked_b: Tensor
) -> dict[str, float | None]:
    """WxBS: fraction of manually annotated correspondences that agree with the fundamental matrix
    estimated from matches (K,2).

    ``marked.share@t`` is the fraction whose distance to the epipolar lines (the larger one of both
    images) is at most t px, ``marked.share`` its mean over t = 1..20; both are 0 without an
    estimate. All values are means over ``MARKED_SEEDS`` seeds of the estimator.
    """
    estimates = [
        estimate(
            xy_a, xy_b, "fundamental", threshold=FUNDAMENTAL_THRESHOLD, seed=seed, verify=False
        )
        for seed in range(MARKED_SEEDS)
    ]
    found: dict[str, float | None] = {"marked.matches": len(xy_a)}
    found["marked.inliers"] = m.mean(float(result.inliers.sum()) for result in estimates)
    found["marked.ok"] = m.mean(float(result.ok) for result in estimates)
    distances = [
        m.epipolar_distances(marked_a, marked_b, result.model)
        for result in estimates
        if result.model is not None
    ]
    shares = {
        t: sum(float((d <= t).double().mean()) for d in distances) / MARKED_SEEDS
        for t in MARKED_THRESHOLDS
    }
    found["marked.share"] = m.mean(shares.values())
    return found | {f"marked.share@{t}": share for t, share in shares.items()}
