"""Images that show the same: global descriptors aggregated from local ones, and nearest neighbors.

A vocabulary assigns each local descriptor to the nearest of its words. The global descriptor of an
image is the sum of the residuals to each word (VLAD, Jegou et al., CVPR 2010), each of unit length
(Arandjelovic and Zisserman, CVPR 2013) and projected to fewer dimensions. The most similar images
are then ordered by the number of matches of their strongest keypoints. Descriptors of different
networks need different vocabularies: those of the embedded descriptors are part of the package,
others are trained on the images themselves. docs/how-to/reconstruct.md has measurements.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import atomic_path

logger = logging.getLogger(__name__)

#: File in ``data/`` of the vocabulary of an embedded descriptor.
VOCABULARIES = Path(__file__).parent / "data"
#: Number of words, and of dimensions of a local descriptor after the projection.
WORDS, DIMENSIONS = 64, 64
#: Iterations of k-means, and local descriptors from which a vocabulary is trained.
ITERATIONS, TRAINING_DESCRIPTORS = 20, 60_000
#: Images above which ``similar_images`` searches with Faiss, if it is installed: an inverted file
#: of ``CELLS`` times the root of their number of cells, of which a ``PROBES``-th are searched.
EXACT_LIMIT, CELLS, PROBES = 20_000, 4, 16
#: Images compared at a time with others, four times as many.
BLOCK, PARTS = 1024, 4
#: Most similar images of each that are ordered by the matches of their strongest keypoints, the
#: number of these, and the ratio test of the matches (chosen on training scenes, docs/diary.md).
CANDIDATES, STRONGEST, RATIO = 60, 128, 0.8


@dataclass(frozen=True)
class Vocabulary:
    """Words of local descriptors.

    Attributes:
        mean: (D,) of the descriptors.
        axes: (D,E) principal axes of the descriptors, by decreasing variance.
        words: (W,E) in the coordinates of the axes.
    """

    mean: Tensor
    axes: Tensor
    words: Tensor

    def describe(self, descriptors: Tensor) -> Tensor:
        """Global descriptor (W*E,) float32 of unit length from local ones (N,D); zeros if N is 0.

        Raises:
            ValueError: the descriptors have another dimension.
        """
        if descriptors.shape[1] != len(self.mean):
            raise ValueError(
                f"the vocabulary is of descriptors of dimension {len(self.mean)}, got "
                f"{descriptors.shape[1]}"
            )
        local, word = self.assign(descriptors)
        sums = torch.zeros_like(self.words).index_add_(0, word, local - self.words[word])
        return torch.nn.functional.normalize(_unit(sums).flatten(), dim=0)

    def assign(self, descriptors: Tensor) -> tuple[Tensor, Tensor]:
        """Local descriptors (N,D) in the coordinates of the axes (N,E), and their words (N,)."""
        local = (descriptors.float() - self.mean) @ self.axes
        return local, _nearest(local, self.words)

    def save(self, path: Path, weights: str) -> None:
        """Write the vocabulary of the descriptors of a weights file with this SHA-256."""
        tensors = {name: getattr(self, name).half().contiguous() for name in _TENSORS}
        with atomic_path(path) as tmp_path:
            save_file(tensors, tmp_path, {"weights": weights})


_TENSORS = ("mean", "axes", "words")


def load_vocabulary(weights: str | None) -> Vocabulary | None:
    """The vocabulary in the package for descriptors of the weights file with this SHA-256; None if
    there is none.
    """
    for path in sorted(VOCABULARIES.glob("*.vocabulary")) if weights else ():
        with safe_open(path, "pt") as file:
            if file.metadata().get("weights") == weights:
                return Vocabulary(*(file.get_tensor(name).float() for name in _TENSORS))
    return None


def train_vocabulary(
    descriptors: Iterable[Tensor],
    *,
    words: int = WORDS,
    dimensions: int = DIMENSIONS,
    seed: int = 0,
) -> Vocabulary:
    """Train a vocabulary by principal component analysis and k-means.

    Args:
        descriptors: local descriptors (N,D) of each image; ``TRAINING_DESCRIPTORS`` of them in all
            are enough.

    Raises:
        ValueError: no descriptors.
    """
    parts = [part.float() for part in descriptors if len(part)]
    if not parts:
        raise ValueError("a vocabulary needs images with descriptors")
    table = torch.cat(parts)
    generator = torch.Generator().manual_seed(seed)
    table = table[torch.randperm(len(table), generator=generator)[:TRAINING_DESCRIPTORS]]
    mean = table.mean(dim=0)
    centered = table - mean
    variance, vectors = torch.linalg.eigh(centered.T @ centered / len(table))
    axes = vectors[:, variance.argsort(descending=True)[:dimensions]]
    local = centered @ axes
    centers = local[:words].clone()  # in random order
    for _ in range(ITERATIONS):
        word = _nearest(local, centers)
        count = torch.zeros(len(centers)).index_add_(0, word, torch.ones(len(word)))
        sums = torch.zeros_like(centers).index_add_(0, word, local)
        used = count > 0
        centers[used] = sums[used] / count[used, None]
    return Vocabulary(mean, axes, centers)


def strongest(descriptors: Tensor) -> Tensor:
    """The first ``STRONGEST`` of local descriptors (N,D), those of the strongest keypoints, as
    (STRONGEST,D) float16 of unit length; zeros if there are fewer.
    """
    local = _unit(descriptors[:STRONGEST].float())
    return torch.nn.functional.pad(local, (0, 0, 0, STRONGEST - len(local))).half()


def center(table: Tensor) -> Tensor:
    """Global descriptors (N,G) without what all images of the collection have in common, of unit
    length and the same type; a single one is unchanged.
    """
    if len(table) < 2:
        return table
    total = sum((part.float().sum(dim=0) for part in table.split(BLOCK)), torch.zeros(()))
    centered = torch.empty_like(table)
    for part, found in zip(table.split(BLOCK), centered.split(BLOCK), strict=True):
        found.copy_(_unit(part.float() - total / len(table)))
    return centered


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    """Index (N,) of the center nearest to each point."""
    return (points @ centers.T - 0.5 * centers.square().sum(dim=1)).argmax(dim=1)


def _unit(rows: Tensor) -> Tensor:
    """Rows of unit length; rows of zeros stay zeros."""
    return torch.nn.functional.normalize(rows, dim=1)


def most_similar(queries: Tensor, table: Tensor, count: int, excluded: Tensor) -> Tensor:
    """Indices (N,K) of the rows of ``table`` (M,G) most similar to each query (N,G), K at most
    ``count``, by exact products in blocks; the most similar one is first.

    Args:
        excluded: (N,2) int64: of each query, the first and the end row of a range that does not
            count, such as itself and its neighbors in time; -1 for those that follow if fewer than
            ``count`` rows remain.
    """
    count = min(count, len(table))
    # half precision is compared in single precision, positions in double precision stay exact
    kind = torch.promote_types(table.dtype, torch.float32)
    found = []
    for start in range(0, len(queries), BLOCK):
        rows = slice(start, start + BLOCK)
        block, low, high = queries[rows].to(kind), excluded[rows, :1], excluded[rows, 1:]
        values, index = block.new_zeros(len(block), 0), low.new_zeros(len(block), 0)
        for first in range(0, len(table), PARTS * BLOCK):
            part = table[first : first + PARTS * BLOCK].to(kind)
            columns = torch.arange(first, first + len(part))
            similarity = block @ part.T
            similarity[(columns >= low) & (columns < high)] = -torch.inf
            best, chosen = similarity.topk(min(count, len(part)), dim=1)
            values = torch.cat([values, best], dim=1)
            index = torch.cat([index, chosen + first], dim=1)
            values, chosen = values.topk(min(count, values.shape[1]), dim=1)
            index = index.gather(1, chosen)
        found.append(torch.where(values.isfinite(), index, -1))
    return torch.cat(found) if found else torch.zeros(0, count, dtype=torch.int64)


def similar_images(queries: Tensor, table: Tensor, count: int, excluded: Tensor) -> Tensor:
    """``most_similar`` for global descriptors: above ``EXACT_LIMIT`` images approximate, with Faiss
    (extra ``faiss``), if that is installed.
    """
    if len(table) <= EXACT_LIMIT:
        return most_similar(queries, table, count, excluded)
    if importlib.util.find_spec("faiss") is None:
        logger.info("%d images: pip install 'tiepoints[faiss]' searches faster", len(table))
        return most_similar(queries, table, count, excluded)
    return _by_faiss(queries, table, count, excluded)


def _by_faiss(queries: Tensor, table: Tensor, count: int, excluded: Tensor) -> Tensor:
    import faiss

    count = min(count, len(table))
    cells = max(1, int(CELLS * math.sqrt(len(table))))
    kind = f"IVF{cells},SQfp16"
    index: Any = faiss.index_factory(table.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = max(PROBES, cells // PROBES)
    index.train(table[:: max(1, len(table) // (64 * cells))].float().numpy())
    for block in table.split(8 * BLOCK):
        index.add(block.float().numpy())
    wanted = min(len(table), count + int((excluded[:, 1] - excluded[:, 0]).max()))
    found = []
    for block, limits in zip(queries.split(BLOCK), excluded.split(BLOCK), strict=True):
        near = torch.from_numpy(index.search(block.float().numpy(), wanted)[1])
        skipped = ((near >= limits[:, :1]) & (near < limits[:, 1:])) | (near < 0)
        near[skipped] = -1
        order = skipped.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        found.append(near.gather(1, order))
    return torch.cat(found)


def order_by_matches(found: Tensor, rows: Tensor, local: Tensor) -> Tensor:
    """Order candidates by the number of matches of their strongest keypoints: mutual nearest
    neighbors that pass a ratio test. Equal ones keep their order.

    Args:
        found: (N,K) int64 candidates of each query, rows of ``local``; -1 = none.
        rows: (N,) int64 rows of the queries.
        local: (M,P,D) of all images (``strongest``).

    Returns:
        (N,K) int64.
    """
    ordered = torch.empty_like(found)
    own = torch.arange(local.shape[1])
    for i, row in enumerate(rows.tolist()):
        cosine = local[row].float() @ local[found[i].clamp(min=0)].float().transpose(1, 2)
        best = cosine.topk(2, dim=2)  # (K,P,2)
        distance = (2 - 2 * best.values).clamp(min=0)
        distinct = distance[..., 0] <= RATIO**2 * distance[..., 1]
        back = cosine.argmax(dim=1).gather(1, best.indices[..., 0])
        matches = (distinct & (back == own)).sum(dim=1)
        matches[found[i] < 0] = -1
        ordered[i] = found[i][matches.argsort(descending=True, stable=True)]
    return ordered
