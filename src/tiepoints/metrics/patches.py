"""How well descriptors tell patches apart: pure functions of distances and labels.

``fpr95``: Brown, Hua and Winder, PAMI 2011, section 4. Verification, matching and retrieval:
Balntas et al., CVPR 2017, section 5. A tie between a correct and a wrong answer counts as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

#: Squared distances are told apart down to this part of the largest squared length: one product of
#: float32 is no more exact.
RESOLUTION = 1e-6
#: Numbers of distractors that retrieval is measured with.
POOLS = (100, 500, 1000, 5000, 10000, 15000, 20000)
#: One positive in this many is kept beside all negatives in the imbalanced protocol.
IMBALANCE = 5


def fpr95(distances: np.ndarray, labels: np.ndarray) -> float:
    """False positive rate at 95 % recall: the part of the negatives no farther than the last of the
    nearest 95 % of positives.

    Args:
        distances: (N,) small where patches look alike.
        labels: (N,) true where they correspond.

    Returns:
        0..1.

    Raises:
        ValueError: shapes differ, a distance is not finite, or one of the two kinds of pairs is
            missing.
    """
    distances, labels = _checked(distances, labels)
    positives, negatives = np.sort(distances[labels]), distances[~labels]
    if not len(positives) or not len(negatives):
        raise ValueError(
            f"needs pairs of both kinds, got {len(positives)} that correspond and "
            f"{len(negatives)} that do not"
        )
    threshold = positives[
        -(-95 * len(positives) // 100) - 1
    ]  # in whole numbers: 0.95 is none in binary
    return float((negatives <= threshold).mean())


def average_precision(
    distances: np.ndarray, labels: np.ndarray, positives: int | None = None
) -> float:
    """Area under precision over recall, by trapezoids from (recall 0, precision 1) on; of N answers
    ranked by distance.

    Args:
        distances: (N,) smallest is ranked first; among equals wrong ones go first.
        labels: (N,) true for a right answer.
        positives: right answers there are, found or not; default those in ``labels``.

    Returns:
        0..1; 0 where there is no right answer.

    Raises:
        ValueError: shapes differ, a distance is not finite, or ``positives`` is smaller than the
            right answers.
    """
    distances, labels = _checked(distances, labels)
    found = int(labels.sum())
    total = found if positives is None else positives
    if total < found:
        raise ValueError(f"{found} right answers among {total}")
    ranked = labels[np.lexsort((labels, distances))]
    right = np.arange(1, found + 1)
    wrong = np.flatnonzero(ranked) + 1 - right  # wrong answers before each right one
    return _trapezoids(right, wrong) / total if total else 0.0


def _trapezoids(right: np.ndarray, wrong: np.ndarray) -> float:
    """Sum of the mean precisions before and after each right answer: ``right`` of them, ``wrong``
    wrong ones before it.

    Recall only moves at right answers, so these are all the trapezoids there are.
    """
    after = right / (right + wrong)
    before = np.divide(
        right - 1, right - 1 + wrong, out=np.ones(len(right)), where=right - 1 + wrong > 0
    )
    return float((before + after).sum() / 2)


def roc_auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Area under the receiver operating curve: how often a pair that corresponds is strictly nearer
    than one that does not.

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
    """Patch verification of one noise and one kind of negatives.

    Args:
        positives, negatives: distances (P,) and (N,) of pairs that correspond and pairs that do
            not.

    Returns:
        ap: of the first fifth of the positives among all negatives (imbalanced); auc: of all
            (balanced). 0..1.
    """
    few = positives[: max(1, len(positives) // IMBALANCE)]
    labels = np.repeat([True, False], [len(few), len(negatives)])
    return {
        "ap": average_precision(np.concatenate([few, negatives]), labels),
        "auc": roc_auc(positives, negatives),
    }


def matching_ap(reference: Tensor, other: Tensor) -> float:
    """Image matching: descriptors (N,D) of the patches of two images, in one order -> average
    precision, 0..1.

    Each reference patch is answered by its nearest, answers are ranked by their distance, and
    recall counts all N.

    Raises:
        ValueError: shapes differ.
    """
    if reference.shape != other.shape:
        raise ValueError(
            f"descriptors of the two images must have one shape, got {tuple(reference.shape)} and "
            f"{tuple(other.shape)}"
        )
    if not len(reference):
        return 0.0
    nearest, distances = [], []
    for rows in reference.split(2048):
        table = squared_distances(rows, other).cpu().numpy()
        nearest.append(table.argmin(axis=1))  # NumPy's, because it promises the first of equals
        distances.append(table.min(axis=1))
    right = np.concatenate(nearest) == np.arange(len(reference))
    return average_precision(np.concatenate(distances), right, len(reference))


def retrieval_ap(
    positives: np.ndarray, distractors: np.ndarray, pools: Sequence[int] = POOLS
) -> np.ndarray:
    """Patch retrieval of one query: average precisions, one for each pool.

    Args:
        positives: distances (P,) of the patches that correspond.
        distractors: distances (M,) of those that do not, in the order in which pools take them.
        pools: sizes, positives included; a pool larger than all is all.

    Returns:
        (len(pools),) 0..1.
    """
    positives = np.sort(np.asarray(positives, np.float64))
    right = np.arange(1, len(positives) + 1)
    nearer = (np.asarray(distractors) <= positives[:, None]).cumsum(axis=1)
    found = []
    for pool in pools:
        taken = min(pool - len(positives), len(distractors))
        wrong = nearer[:, taken - 1] if taken > 0 else np.zeros(len(positives), np.int64)
        found.append(_trapezoids(right, wrong) / len(positives))
    return np.array(found)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N,D) and (M,D) -> (N,M), rounded to ``RESOLUTION`` so that equal descriptors are at equal
    distances.

    One product, because tables of 10,000 x 20,000 are wanted; the differences that rounding hides
    are its errors.
    """
    a, b = a.float(), b.float()
    aa, bb = a.square().sum(dim=1, keepdim=True), b.square().sum(dim=1)
    step = float(max(aa.max(), bb.max())) * RESOLUTION or 1.0
    return ((aa + bb - 2 * (a @ b.T)).clamp(min=0) / step).round() * step


def _checked(distances: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distances, labels = np.asarray(distances, np.float64), np.asarray(labels, bool)
    if distances.ndim != 1 or distances.shape != labels.shape:
        raise ValueError(
            f"distances and labels must be (N,) both, got {distances.shape} and {labels.shape}"
        )
    if not np.isfinite(distances).all():
        raise ValueError(
            f"{(~np.isfinite(distances)).sum()} of {len(distances)} distances are not finite"
        )
    return distances, labels
