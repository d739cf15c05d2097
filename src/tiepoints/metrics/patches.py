"""Metrics of patch descriptors, from distances and labels.

``fpr95``: Brown, Hua and Winder, PAMI 2011, section 4. Verification, matching and retrieval:
Balntas et al., CVPR 2017, section 5. Ties between correct and incorrect results count as incorrect.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

#: Squared distances are rounded to this fraction of the largest squared norm, the accuracy of a
#: float32 matrix product.
RESOLUTION = 1e-6
#: Sizes of the pools in retrieval.
POOLS = (100, 500, 1000, 5000, 10000, 15000, 20000)
#: The imbalanced protocol keeps one positive in ``IMBALANCE``, and all negatives.
IMBALANCE = 5


def fpr95(distances: np.ndarray, labels: np.ndarray) -> float:
    """False positive rate at 95 % recall, 0..1.

    Args:
        distances: (N,) descriptor distances.
        labels: (N,) bool, true for corresponding patches.

    Raises:
        ValueError: shapes differ, a distance is not finite, or there are no positive or no negative
            pairs.
    """
    distances, labels = _checked(distances, labels)
    positives, negatives = np.sort(distances[labels]), distances[~labels]
    if not len(positives) or not len(negatives):
        raise ValueError(
            f"needs pairs of both kinds, got {len(positives)} corresponding and "
            f"{len(negatives)} other pairs"
        )
    # integer arithmetic, because 0.95 has no exact binary representation
    threshold = positives[-(-95 * len(positives) // 100) - 1]
    return float((negatives <= threshold).mean())


def average_precision(
    distances: np.ndarray, labels: np.ndarray, positives: int | None = None
) -> float:
    """Area under the precision-recall curve, 0..1, by the trapezoidal rule from (recall 0,
    precision 1).

    Args:
        distances: (N,) results are ranked by ascending distance; in ties, incorrect ones first.
        labels: (N,) bool, true for a correct result.
        positives: total number of correct results, including those not retrieved; default: those in
            ``labels``.

    Returns:
        0 if there is no correct result.

    Raises:
        ValueError: shapes differ, a distance is not finite, or ``positives`` is smaller than the
            number of correct results.
    """
    distances, labels = _checked(distances, labels)
    retrieved = int(labels.sum())
    total = retrieved if positives is None else positives
    if total < retrieved:
        raise ValueError(f"{retrieved} correct results among {total}")
    ranked = labels[np.lexsort((labels, distances))]
    true_positives = np.arange(1, retrieved + 1)
    false_positives = np.flatnonzero(ranked) + 1 - true_positives
    return _trapezoids(true_positives, false_positives) / total if total else 0.0


def _trapezoids(tp: np.ndarray, fp: np.ndarray) -> float:
    """Trapezoidal sum of precision over the number of correct results.

    Args:
        tp, fp: (K,) true and false positives up to each correct result, where recall increases.
    """
    after = tp / (tp + fp)
    before = np.divide(tp - 1, tp - 1 + fp, out=np.ones(len(tp)), where=tp - 1 + fp > 0)
    return float((before + after).sum() / 2)


def roc_auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a corresponding pair has a strictly smaller
    distance than another pair.

    Args:
        positives, negatives: distances (P,) and (N,).

    Raises:
        ValueError: one of them is empty or not finite.
    """
    positives, negatives = np.asarray(positives, np.float64), np.asarray(negatives, np.float64)
    if (
        not len(positives)
        or not len(negatives)
        or not (np.isfinite(positives).all() and np.isfinite(negatives).all())
    ):
        raise ValueError(
            f"needs finite distances of both kinds, got {len(positives)} and {len(negatives)}"
        )
    farther = len(negatives) - np.searchsorted(np.sort(negatives), positives, side="right")
    return float(farther.mean() / len(negatives))


def verification_scores(positives: np.ndarray, negatives: np.ndarray) -> dict[str, float]:
    """Scores of patch verification for one level of noise and one kind of negatives.

    Args:
        positives, negatives: distances (P,) and (N,) of corresponding and of other pairs.

    Returns:
        ``ap``, average precision of the first fifth of the positives and all negatives (imbalanced
        protocol); ``auc``, area under the ROC curve of all pairs (balanced). 0..1.
    """
    subset = positives[: max(1, len(positives) // IMBALANCE)]
    labels = np.repeat([True, False], [len(subset), len(negatives)])
    return {
        "ap": average_precision(np.concatenate([subset, negatives]), labels),
        "auc": roc_auc(positives, negatives),
    }


def matching_ap(reference: Tensor, other: Tensor) -> float:
    """Average precision of image matching, 0..1.

    Each reference patch is matched to its nearest neighbor, and matches are ranked by their
    distance; recall is relative to all N patches.

    Args:
        reference, other: descriptors (N,D) of the patches of two images, in the same order.

    Raises:
        ValueError: shapes differ.
    """
    if reference.shape != other.shape:
        raise ValueError(
            "descriptors of the two images must have the same shape, got "
            f"{tuple(reference.shape)} and {tuple(other.shape)}"
        )
    if not len(reference):
        return 0.0
    nearest, distances = [], []
    for rows in reference.split(2048):
        table = squared_distances(rows, other).cpu().numpy()
        nearest.append(table.argmin(axis=1))  # NumPy: first minimum
        distances.append(table.min(axis=1))
    correct = np.concatenate(nearest) == np.arange(len(reference))
    return average_precision(np.concatenate(distances), correct, len(reference))


def retrieval_ap(
    positives: np.ndarray, distractors: np.ndarray, pools: Sequence[int] = POOLS
) -> np.ndarray:
    """Average precision of patch retrieval for one query and each pool size.

    Args:
        positives: distances (P,) of the corresponding patches.
        distractors: distances (M,) of other patches, in the order in which they are added to pools.
        pools: sizes including the positives; larger pools contain all patches.

    Returns:
        (len(pools),) 0..1.
    """
    positives = np.sort(np.asarray(positives, np.float64))
    true_positives = np.arange(1, len(positives) + 1)
    nearer = (np.asarray(distractors) <= positives[:, None]).cumsum(axis=1)
    precisions = []
    for pool in pools:
        count = min(pool - len(positives), len(distractors))
        false_positives = nearer[:, count - 1] if count > 0 else np.zeros(len(positives), np.int64)
        precisions.append(_trapezoids(true_positives, false_positives) / len(positives))
    return np.array(precisions)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (N,M) of descriptors (N,D) and (M,D).

    Computed with one matrix product, because tables may have 10,000 x 20,000 entries, and rounded
    to its accuracy (``RESOLUTION``), so that equal descriptors have equal distances.
    """
    a, b = a.float(), b.float()
    aa, bb = a.square().sum(dim=1, keepdim=True), b.square().sum(dim=1)
    step = float(max(aa.max(), bb.max())) * RESOLUTION or 1.0
    return ((aa + bb - 2 * (a @ b.T)).clamp(min=0) / step).round() * step


def _checked(distances: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert to float64 and bool; raise ValueError for different shapes or non-finite values."""
    distances, labels = np.asarray(distances, np.float64), np.asarray(labels, bool)
    if distances.ndim != 1 or distances.shape != labels.shape:
        raise ValueError(
            f"distances and labels must be (N,), got {distances.shape} and {labels.shape}"
        )
    if not np.isfinite(distances).all():
        raise ValueError(
            f"{(~np.isfinite(distances)).sum()} of {len(distances)} distances are not finite"
        )
    return distances, labels
