"""Whether matches show a camera that only rotated, for an unknown focal length.

Such images have no parallax: any depth explains them, and a reconstruction of them is arbitrary.
"""

from __future__ import annotations

import numpy as np
import poselib

#: Range of focal lengths that is searched, in units of the longest side, and number of steps.
FOCALS, STEPS = (0.5, 2.0), 25
#: Matches from which a rotation is estimated; share of them that a homography must explain, as a
#: rotation is one but for the distortion of the lens; smallest and largest number of its samples.
MIN_MATCHES, MIN_PLANAR, ITERATIONS = 8, 0.5, (100, 1000)
#: Largest error of a match that a rotation explains, in units of the longest side; the distortion
#: of a lens is larger than the noise.
TOLERANCE = 0.005


Size = tuple[int, int]


def rotation_share(
    xy_a: np.ndarray, xy_b: np.ndarray, sizes: tuple[Size, Size], focal: float | None = None
) -> float:
    """Largest share (0..1) of matches that one rotation of the camera explains; 0 if no homography
    explains half of them.

    Args:
        xy_a, xy_b: (K,2) inliers of an epipolar geometry in pixels.
        sizes: (width, height) of both images.
        focal: known focal length in units of the longest side; None searches it in ``FOCALS``.
    """
    if len(xy_a) < MIN_MATCHES:
        return 0.0
    a, b = (_centered(xy, size) for xy, size in zip((xy_a, xy_b), sizes, strict=True))
    of_plane = _homography_inliers(a, b)
    if of_plane.sum() < max(MIN_MATCHES, MIN_PLANAR * len(a)):
        return 0.0
    if focal is not None:
        return _explained(a, b, of_plane, focal)
    low, high = FOCALS
    share = 0.0
    for _ in range(2):  # coarse, then fine
        focals = np.geomspace(low, high, STEPS)
        shares = [_explained(a, b, of_plane, value) for value in focals]
        best = int(np.argmax(shares))
        share = max(share, shares[best])
        low, high = focals[max(best - 1, 0)], focals[min(best + 1, STEPS - 1)]
    return share


def _centered(xy: np.ndarray, size: Size) -> np.ndarray:
    """Positions (K,2) from the center of the image, in units of its longest side."""
    center = (np.array(size) - 1) / 2
    return np.asarray((xy - center) / max(size), dtype=np.float64)


def _homography_inliers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    least, most = ITERATIONS
    options = {
        "max_reproj_error": TOLERANCE,
        "min_iterations": least,
        "max_iterations": most,
        "seed": 0,
    }
    try:
        return np.asarray(poselib.estimate_homography(a, b, options, {})[1]["inliers"], dtype=bool)
    except (RuntimeError, ValueError):
        return np.zeros(len(a), dtype=bool)


def _explained(a: np.ndarray, b: np.ndarray, chosen: np.ndarray, focal: float) -> float:
    """Share of the matches near the rotation that fits the chosen ones best (Kabsch)."""
    x, y = (_rays(points, focal) for points in (a, b))
    U, _, V = np.linalg.svd(y[chosen].T @ x[chosen])
    rotated = x @ (U @ np.diag([1.0, 1.0, np.linalg.det(U @ V)]) @ V).T
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.linalg.norm(focal * rotated[:, :2] / rotated[:, 2:] - b, axis=1)
    return float(((rotated[:, 2] > 0) & (error <= TOLERANCE)).mean())


def _rays(points: np.ndarray, focal: float) -> np.ndarray:
    rays = np.concatenate([points / focal, np.ones((len(points), 1))], axis=1)
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)
