"""Evaluate patch descriptors: false positive rate on PhotoTour and the three tasks of HPatches.

- ``fpr95``: false positive rate at 95 % recall (Brown, Hua and Winder, PAMI 2011, section 4), as in
  PhotoTour tables.
- verification, matching, retrieval: Balntas et al., CVPR 2017, section 5, as defined by the
  benchmark's Python code. docs/patchdata.md lists differences from the paper and from this module.

Metrics are pure functions of arrays. A tie between a correct and an incorrect answer counts as
incorrect, so that a descriptor that is equal for all patches does not score. A network is any
callable patches (N,1,32,32) float32 in [0,1] -> (N,D) in evaluation mode.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..datasets.patch_sets import (
    COLUMNS,
    TEST_PAIRS,
    PatchSet,
    as_patches,
    hpatches_sequences,
    open_phototour,
    read_columns,
    read_split,
    read_test_pairs,
    shrink,
)
from ..errors import DataError
from ..metrics.patches import (
    POOLS,
    fpr95,
    matching_ap,
    retrieval_ap,
    squared_distances,
    verification_scores,
)
from ..progress import track

Net = Callable[[Tensor], Tensor]

KINDS = ("phototour", "hpatches")
TASKS = ("verification", "matching", "retrieval")
#: Column of the first image minus one, by level of geometric noise.
NOISES = {"easy": 0, "hard": 5, "tough": 10}
IMAGES = 6
#: From the benchmark: sizes of its task files; minimum standard deviation (gray levels) of a
#: retrieved patch; pairs are drawn from the first five of the six images.
NUM_PAIRS = 1_000_000
NUM_QUERIES = 10_000
NUM_DISTRACTORS = 20_000
MIN_CONTRAST = 10.0
PAIR_IMAGES = 5
BATCH = 1024
ROWS = 65_536
QUERIES_AT_ONCE = 256


# ---- descriptors


def describe(
    net: Net, gray: np.ndarray, *, batch: int = BATCH, device: str | torch.device = "cpu"
) -> Tensor:
    """Describe patches: gray levels (N,32,32) uint8 -> (N,D) float32 on the CPU.

    Raises:
        ValueError: the network's output has another shape, or is not finite.
    """
    parts = []
    with torch.inference_mode():
        for start in range(0, len(gray), batch):
            patches = as_patches(gray[start : start + batch]).to(device)
            output = net(patches)
            if output.ndim != 2 or len(output) != len(patches):
                raise ValueError(
                    f"the network returned shape {tuple(output.shape)} for {len(patches)} patches, "
                    f"expected ({len(patches)}, D)"
                )
            parts.append(output.float().cpu())
    if not parts:
        raise ValueError("no patches to describe")
    descriptors = torch.cat(parts).clone()
    if not descriptors.isfinite().all():
        raise ValueError("the network returned descriptors with NaN or infinity")
    return descriptors


def pair_distances(a: Tensor, b: Tensor, index_a: np.ndarray, index_b: np.ndarray) -> np.ndarray:
    """Distances (K,) float64 between rows ``index_a`` of ``a`` and ``index_b`` of ``b`` (N,D),
    (M,D).
    """
    distances = np.empty(len(index_a))
    for start in range(0, len(distances), ROWS):
        rows_a, rows_b = (
            torch.from_numpy(index[start : start + ROWS]) for index in (index_a, index_b)
        )
        distances[start : start + ROWS] = (a[rows_a] - b[rows_b]).norm(dim=1).numpy()
    return distances


# ---- PhotoTour


def phototour_fpr95(
    net: Net,
    patches: PatchSet,
    *,
    pairs: str | Path = TEST_PAIRS,
    batch: int = BATCH,
    device: str | torch.device = "cpu",
) -> float:
    """``fpr95`` of a network on the test pairs of a PhotoTour set, 0..1.

    Args:
        pairs: pair file: a name in the folder of the set, or a path.

    Raises:
        DataError: the pair file is missing, truncated, or of another set.
        ValueError: the network's output has another shape, or is not finite.
    """
    indices, same = read_test_pairs(patches.folder / pairs, patches.points)
    used, rows = np.unique(indices, return_inverse=True)
    rows = rows.reshape(indices.shape)
    descriptors = torch.cat(
        [
            describe(net, patches.images[used[start : start + ROWS]], batch=batch, device=device)
            for start in range(0, len(used), ROWS)
        ]
    )
    return fpr95(pair_distances(descriptors, descriptors, rows[:, 0], rows[:, 1]), same)


# ---- HPatches


@dataclass(frozen=True)
class Described:
    """Descriptors of sequences of HPatches in one table.

    Attributes:
        names: names of the S sequences.
        counts: (S,) number of patches per image (column) of each sequence.
        descriptors: (M,D) float32, ordered by sequence, then by column.
        contrast: per sequence an array (counts[s],): standard deviation of the reference patches in
            gray levels.
    """

    names: list[str]
    counts: np.ndarray
    descriptors: Tensor
    contrast: list[np.ndarray]

    @property
    def start(self) -> np.ndarray:
        """(S,) first row of each sequence."""
        return len(COLUMNS) * (np.cumsum(self.counts) - self.counts)

    def rows(
        self, sequence: np.ndarray, image: np.ndarray | int, index: np.ndarray, noise: str
    ) -> np.ndarray:
        """Rows of patches, given the index of the sequence, image 0 (reference) to 5, and the index
        in the column.
        """
        column = np.where(np.asarray(image) == 0, 0, NOISES[noise] + np.asarray(image))
        return self.start[sequence] + column * self.counts[sequence] + index

    def column(self, sequence: int, image: int, noise: str) -> Tensor:
        """Descriptors (N,D) of one image of one sequence."""
        first = int(self.rows(np.array(sequence), image, np.array(0), noise))
        return self.descriptors[first : first + int(self.counts[sequence])]


def describe_hpatches(
    net: Net,
    folder: str | Path,
    names: Iterable[str] | None = None,
    *,
    batch: int = BATCH,
    device: str | torch.device = "cpu",
) -> Described:
    """Describe all patches of the sequences ``names`` (default all); uses 80 MB per 10,000
    reference patches with 128 dimensions.

    Raises:
        FileNotFoundError, DataError: see ``hpatches_sequences`` and ``read_columns``.
    """
    sequences = hpatches_sequences(folder, names)
    counts, tables, contrast = [], [], []
    for sequence in track(sequences, label="hpatches", unit="sequence"):
        for i, column in enumerate(read_columns(sequence)):
            if i == 0:
                counts.append(len(column))
                contrast.append(column.reshape(len(column), -1).std(axis=1))
            tables.append(describe(net, shrink(column), batch=batch, device=device))
    return Described([s.name for s in sequences], np.array(counts), torch.cat(tables), contrast)


@dataclass(frozen=True)
class TaskFiles:
    """Patches to compare; sequences are indices into ``names`` of a ``Described``.

    Attributes:
        source: origin of the tasks, for the report.
        positives, intra, inter: pairs (K,6) int64: sequence, image 0..5, index, twice; ``inter`` is
            empty for a single sequence.
        queries, distractors: (Q,2) and (M,2): sequence, index in the reference image.
    """

    source: str
    positives: np.ndarray
    intra: np.ndarray
    inter: np.ndarray
    queries: np.ndarray
    distractors: np.ndarray


def draw_tasks(
    counts: np.ndarray,
    contrast: Sequence[np.ndarray],
    *,
    seed: int = 0,
    num_pairs: int = NUM_PAIRS,
    num_queries: int = NUM_QUERIES,
    num_distractors: int = NUM_DISTRACTORS,
) -> TaskFiles:
    """Draw pairs, queries and distractors in the proportions of the benchmark's own files; see
    docs/patchdata.md.

    Sequences are drawn uniformly, then patches of each. A negative pair shares the first patch and
    both images with its positive pair.

    Raises:
        DataError: a sequence has fewer than two patches, or too few patches have contrast.
    """
    rng = np.random.default_rng(seed)
    if not len(counts) or counts.min() < 2:
        raise DataError("negatives need two patches in every sequence")

    def draw_other(value: np.ndarray, count: np.ndarray | int) -> np.ndarray:
        """Uniformly from 0..count - 1 without ``value``."""
        drawn = rng.integers(np.asarray(count) - 1, size=len(value))
        return drawn + (drawn >= value)

    sequence = rng.integers(len(counts), size=num_pairs)
    first = rng.integers(counts[sequence])
    image = rng.integers(PAIR_IMAGES, size=num_pairs)
    other_image = draw_other(image, PAIR_IMAGES)

    def pairs(other_sequence: np.ndarray, other_first: np.ndarray) -> np.ndarray:
        return np.stack([sequence, image, first, other_sequence, other_image, other_first], axis=1)

    positives, intra = pairs(sequence, first), pairs(sequence, draw_other(first, counts[sequence]))
    inter = positives[:0]
    if len(counts) > 1:
        other = draw_other(sequence, len(counts))
        inter = pairs(other, rng.integers(counts[other]))
    patches = np.concatenate(
        [np.stack([np.full(n, s), np.arange(n)], axis=1) for s, n in enumerate(counts)]
    )
    patches = patches[np.concatenate(contrast) > MIN_CONTRAST]
    if len(patches) < 2:
        raise DataError(f"{len(patches)} reference patches have contrast; retrieval needs two")
    # the order in which patches appear if sequences are drawn uniformly and then their patches:
    # waiting times are exponential with the length of the sequence as mean
    order = patches[np.argsort(rng.exponential(counts[patches[:, 0]]))]
    # a set too small for both keeps the ratio of queries to distractors
    total = num_queries + num_distractors
    split = min(num_queries, math.ceil(len(order) * num_queries / total))
    queries, distractors = order[:split], order[split : split + num_distractors]
    return TaskFiles(f"drawn, seed {seed}", positives, intra, inter, queries, distractors)


def read_tasks(
    folder: str | Path,
    split: str,
    names: Sequence[str],
    counts: np.ndarray,
    wanted: Sequence[str] = TASKS,
) -> TaskFiles:
    """Read the benchmark's own task files: ``verif_pos_split-X.csv``, ``verif_neg_intra_...``,
    ``verif_neg_inter_...``, ``retr_queries_...`` and ``retr_distractors_...`` (``tasks/`` of the
    repository hpatches/hpatches-benchmark).

    Args:
        split: X of the file names.
        names, counts: sequences and their number of patches per column; the files must agree.
        wanted: some of ``TASKS``; the files of others are not read.

    Raises:
        DataError: a file is missing, damaged, or of other sequences; the message names it.
    """
    folder = Path(folder)
    number = {name: k for k, name in enumerate(names)}

    def table(stem: str, columns: Sequence[str], task: str) -> np.ndarray:
        if task not in wanted:
            return np.zeros((0, len(columns)), np.int64)
        path = folder / f"{stem}_split-{split}.csv"
        rows = _read_csv(path, columns, number)
        for k, column in enumerate(columns):
            if not column.startswith("s"):
                limit = (
                    IMAGES
                    if column.startswith("t")
                    else counts[rows[:, k - 1 if len(columns) == 2 else 3 * (k // 3)]]
                )
                if ((rows[:, k] < 0) | (rows[:, k] >= limit)).any():
                    raise DataError(
                        f"{path}: column {column} names a patch that does not exist; the file "
                        "belongs to other patches"
                    )
        return rows

    pair = ("s1", "t1", "idx1", "s2", "t2", "idx2")
    return TaskFiles(
        f"task files of split {split}",
        table("verif_pos", pair, "verification"),
        table("verif_neg_intra", pair, "verification"),
        table("verif_neg_inter", pair, "verification"),
        table("retr_queries", ("s", "idx"), "retrieval"),
        table("retr_distractors", ("s", "idx"), "retrieval"),
    )


def _read_csv(path: Path, columns: Sequence[str], number: dict[str, int]) -> np.ndarray:
    """Rows (K,len(columns)) int64, with the names of sequences replaced by their index."""
    if not path.is_file():
        raise DataError(
            f"{path}: missing; it is in tasks/ of hpatches/hpatches-benchmark. Without a folder of "
            "tasks they are drawn at random"
        )
    with path.open(newline="") as stream:
        lines = csv.reader(stream)
        header = next(lines, [])
        if sorted(header) != sorted(columns):
            raise DataError(
                f"{path}: columns {', '.join(header) or 'none'}, expected {', '.join(columns)}"
            )
        order = [header.index(column) for column in columns]
        names = [column.startswith("s") for column in columns]
        rows = []
        for line in lines:
            try:
                rows.append(
                    [
                        number[line[k]] if name else int(line[k])
                        for k, name in zip(order, names, strict=True)
                    ]
                )
            except KeyError as error:
                raise DataError(
                    f"{path}: line {lines.line_num} names the sequence {error}, which is not "
                    "evaluated"
                ) from error
            except (ValueError, IndexError) as error:
                raise DataError(
                    f"{path}: line {lines.line_num} is damaged ({','.join(line)!r})"
                ) from error
    if not rows:
        raise DataError(f"{path}: empty")
    return np.array(rows, np.int64)


def verification(described: Described, tasks: TaskFiles) -> dict[str, Any]:
    """Patch verification: ``ap`` and ``auc`` as means over noise levels and kinds of negatives, and
    the values of each.
    """
    table = described.descriptors
    found: dict[str, Any] = {}
    scores = []
    for noise in NOISES:

        def distances(pairs: np.ndarray, noise: str = noise) -> np.ndarray:
            rows = [
                described.rows(pairs[:, k], pairs[:, k + 1], pairs[:, k + 2], noise) for k in (0, 3)
            ]
            return pair_distances(table, table, rows[0], rows[1])

        positives = distances(tasks.positives)
        for kind, pairs in (("intra", tasks.intra), ("inter", tasks.inter)):
            if len(pairs):
                found.setdefault(noise, {})[kind] = verification_scores(positives, distances(pairs))
                scores.append(found[noise][kind])
    return {
        **{measure: _mean(score[measure] for score in scores) for measure in ("ap", "auc")},
        **found,
        "pairs": len(tasks.positives),
    }


def matching(described: Described, *, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Image matching: ``map`` as mean over kinds (viewpoint, illumination), noise levels, sequences
    and images, and the values of each kind and noise level.
    """
    kinds = [_kind(name) for name in described.names]
    found: dict[str, Any] = {}
    for noise in NOISES:
        scores: dict[str, list[float]] = {kind: [] for kind in dict.fromkeys(kinds)}
        for i, kind in enumerate(kinds):
            reference = described.column(i, 0, noise).to(device)
            others = (described.column(i, image, noise).to(device) for image in range(1, IMAGES))
            scores[kind].append(_mean(matching_ap(reference, other) for other in others))
        found[noise] = {kind: _mean(values) for kind, values in scores.items()}
    per_kind = [_mean(found[noise][kind] for noise in NOISES) for kind in dict.fromkeys(kinds)]
    return {"map": _mean(per_kind), **found}


def retrieval(
    described: Described,
    tasks: TaskFiles,
    *,
    device: str | torch.device = "cpu",
    pools: Sequence[int] = POOLS,
) -> dict[str, Any]:
    """Patch retrieval: ``map`` as mean over noise levels, pools and queries, and the mean over
    queries of each noise level and pool.

    A query is a reference patch; correct are its five patches of one noise level, incorrect the
    distractors of other sequences. Pools larger than the number of distractors are skipped; if all
    are, one pool holds everything.

    Raises:
        DataError: all distractors are of one sequence, so that its queries have none.
    """
    if len(np.unique(tasks.distractors[:, 0])) < 2:
        raise DataError(
            "retrieval needs distractors of two sequences; evaluate more sequences, or only the "
            "other tasks"
        )
    sizes = [pool for pool in pools if pool <= len(tasks.distractors)] or [
        len(tasks.distractors) + IMAGES - 1
    ]
    distractors = _gather(described, tasks.distractors[:, 0], 0, tasks.distractors[:, 1]).to(device)
    sums = {noise: np.zeros(len(sizes)) for noise in NOISES}
    starts = range(0, len(tasks.queries), QUERIES_AT_ONCE)
    for start in track(starts, label="retrieval", unit="batch"):
        batch = tasks.queries[start : start + QUERIES_AT_ONCE]
        for noise, ap in _retrieval_batch(
            described, batch, tasks.distractors[:, 0], distractors, sizes
        ).items():
            sums[noise] += ap
    found = {
        noise: {
            str(size): float(v)
            for size, v in zip(sizes, sums[noise] / len(tasks.queries), strict=True)
        }
        for noise in NOISES
    }
    return {
        "map": _mean(_mean(f.values()) for f in found.values()),
        **found,
        "queries": len(tasks.queries),
        "distractors": len(distractors),
    }


def _gather(
    described: Described,
    sequence: np.ndarray,
    image: int,
    index: np.ndarray,
    noise: str = "easy",
) -> Tensor:
    """Descriptors (N,D) of one image of each sequence."""
    return described.descriptors[torch.from_numpy(described.rows(sequence, image, index, noise))]


def _retrieval_batch(
    described: Described,
    queries: np.ndarray,
    sequences: np.ndarray,
    distractors: Tensor,
    sizes: Sequence[int],
) -> dict[str, np.ndarray]:
    """Average precision per noise level and pool size, summed over the queries.

    Args:
        queries: (Q,2) sequence, index.
        sequences: (M,) sequence of each distractor.
        distractors: (M,D) on the device to compute on.
    """
    sequence, index = queries.T
    query = _gather(described, sequence, 0, index).to(distractors.device)
    correct = [
        _gather(described, sequence, image, index, noise).to(distractors.device)
        for noise in NOISES
        for image in range(1, IMAGES)
    ]
    # a single matrix product, so that all distances are rounded in the same way
    distances = squared_distances(query, torch.cat([distractors, *correct])).cpu().numpy()
    sums = {noise: np.zeros(len(sizes)) for noise in NOISES}
    for q in range(len(query)):
        negatives = distances[q, : len(distractors)][sequences != sequence[q]]
        for i, noise in enumerate(NOISES):
            first = len(distractors) + i * (IMAGES - 1) * len(query) + q
            positives = distances[q, first : first + (IMAGES - 1) * len(query) : len(query)]
            sums[noise] += retrieval_ap(positives, negatives, sizes)
    return sums


def _kind(name: str) -> str:
    return {"v_": "view", "i_": "illum"}.get(name[:2], "other")


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


# ---- entry point


# One call per data set, with independent options of both kinds: parameters and their documentation
# make up most of its length.
def evaluate_patches(
    net: Net,
    folder: str | Path,
    kind: str,
    *,
    pairs: str | Path = TEST_PAIRS,
    cache: str | Path | None = None,
    split: str = "full",
    splits: str | Path | None = None,
    tasks: str | Path | None = None,
    only: Sequence[str] = TASKS,
    seed: int = 0,
    num_pairs: int = NUM_PAIRS,
    batch: int = BATCH,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Evaluate a descriptor on PhotoTour or HPatches patches.

    Args:
        net: patches (N,1,32,32) float32 in [0,1] on ``device`` -> (N,D), in evaluation mode.
        folder: PhotoTour: a set, or a folder of sets; HPatches: the folder of sequences.
        kind: ``phototour`` or ``hpatches``.
        pairs, cache: pair file of PhotoTour and folder of its cache, see ``open_phototour``.
        split: of HPatches: ``full``, ``view`` or ``illum``; other names need ``splits``.
        splits: the benchmark's ``splits.json``; default: in ``tasks`` or ``tasks/splits``.
        tasks: folder of the benchmark's task files; default: drawn at random, with slightly
            different results.
        only: some of ``TASKS``.
        seed, num_pairs: of random tasks.
        batch: batch size of the network.
        device: device of the network and of distance computations.

    Returns:
        values in 0..1 as a JSON object. PhotoTour: ``fpr95`` of each set and their ``mean``.
        HPatches: ``verification`` with ``ap`` and ``auc``, ``matching`` and ``retrieval`` with
        ``map``, each with its parts; ``split``, ``sequences`` and ``tasks`` describe the data.

    Raises:
        ValueError: unknown kind, split or task, or invalid output of the network.
        FileNotFoundError, DataError: data are missing or damaged; the message names the file.
    """
    if kind == "phototour":
        return _evaluate_phototour(net, Path(folder), pairs, cache, batch, device)
    if kind != "hpatches":
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    unknown = [task for task in only if task not in TASKS]
    if unknown or not only:
        raise ValueError(f"tasks are {', '.join(TASKS)}, got {', '.join(unknown) or 'none'}")
    names = _names_of_split(Path(folder), split, splits, tasks)
    described = describe_hpatches(net, folder, names, batch=batch, device=device)
    if tasks is not None:
        selected = read_tasks(tasks, split, described.names, described.counts, only)
    else:
        selected = draw_tasks(described.counts, described.contrast, seed=seed, num_pairs=num_pairs)
    found: dict[str, Any] = {"kind": kind, "split": split}
    found |= {"sequences": len(described.names), "tasks": selected.source}
    if "verification" in only:
        found["verification"] = verification(described, selected)
    if "matching" in only:
        found["matching"] = matching(described, device=device)
    if "retrieval" in only:
        found["retrieval"] = retrieval(described, selected, device=device)
    return found


def _evaluate_phototour(
    net: Net,
    folder: Path,
    pairs: str | Path,
    cache: str | Path | None,
    batch: int,
    device: str | torch.device,
) -> dict[str, Any]:
    folders = (
        [folder]
        if (folder / "info.txt").exists() or not folder.is_dir()
        else sorted(p.parent for p in folder.glob("*/info.txt"))
    )
    if not folders:
        raise DataError(
            f"{folder}: neither a PhotoTour set (info.txt, patches0000.bmp) nor a folder of sets"
        )
    rates = {}
    for path in folders:
        patches = open_phototour(path, cache=cache)
        rates[patches.name] = phototour_fpr95(net, patches, pairs=pairs, batch=batch, device=device)
    return {
        "kind": "phototour",
        "pairs": Path(pairs).name,
        "fpr95": rates,
        "mean": _mean(rates.values()),
    }


def _names_of_split(
    folder: Path, split: str, splits: str | Path | None, tasks: str | Path | None
) -> list[str]:
    """Names of the test sequences of a split."""
    candidates = (
        [Path(tasks) / "splits" / "splits.json", Path(tasks) / "splits.json"]
        if tasks is not None
        else []
    )
    file = (
        splits
        if splits is not None
        else next((path for path in candidates if path.is_file()), None)
    )
    if file is not None:
        return read_split(file, split).get("test", [])
    names = [path.name for path in hpatches_sequences(folder)]
    if split == "full":
        return names
    if split not in ("view", "illum"):
        raise ValueError(
            f"split {split!r} needs splits.json of hpatches/hpatches-benchmark; only full, view "
            "and illum do not"
        )
    chosen = [name for name in names if _kind(name) == split]
    if not chosen:
        raise DataError(f"{folder}: no sequence of the split {split}")
    return chosen
