"""How well a descriptor tells patches apart: PhotoTour's false positive rate and the three tasks of
HPatches.

- ``fpr95``: false positives at 95 % recall (Brown, Hua and Winder, PAMI 2011, section 4), the
  number of every PhotoTour table.
- verification, matching, retrieval: Balntas et al., CVPR 2017, section 5, in the terms of the
  benchmark's Python code. docs/patchdata.md says where that differs from the paper, and from here.

The measures are pure functions of arrays. A tie between a right and a wrong answer counts as wrong
everywhere: a descriptor that calls all patches equal must not score. A network is any callable
patches (N,1,32,32) float32 in [0,1] -> (N,D), already in evaluation mode.
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
from tqdm import tqdm

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

Net = Callable[[Tensor], Tensor]


KINDS = ("phototour", "hpatches")
TASKS = ("verification", "matching", "retrieval")
#: Column of the first image minus one, for each size of the error of the detected frame.
NOISES = {"easy": 0, "hard": 5, "tough": 10}
IMAGES = 6
#: Of the benchmark: sizes of its task files; the least standard deviation (gray levels) of a
#: retrieved patch; its pairs are drawn from the first five images, never from the sixth.
NUM_PAIRS = 1_000_000
NUM_QUERIES = 10_000
NUM_DISTRACTORS = 20_000
MIN_CONTRAST = 10.0
PAIR_IMAGES = 5
BATCH = 1024
ROWS = 65_536
QUERIES_AT_ONCE = 256


# ---- describing


def describe(
    net: Net, gray: np.ndarray, *, batch: int = BATCH, device: str | torch.device = "cpu"
) -> Tensor:
    """Gray levels (N,32,32) uint8 -> descriptors (N,D) float32 on the CPU.

    Raises:
        ValueError: the network gave another number of descriptors, or some that are not finite.
    """
    parts = []
    with torch.inference_mode():
        for start in range(0, len(gray), batch):
            patches = as_patches(gray[start : start + batch]).to(device)
            found = net(patches)
            if found.ndim != 2 or len(found) != len(patches):
                raise ValueError(
                    f"the network made {tuple(found.shape)} of {len(patches)} patches, expected "
                    f"({len(patches)}, D)"
                )
            parts.append(found.float().cpu())
    if not parts:
        raise ValueError("no patches to describe")
    descriptors = torch.cat(parts).clone()
    if not descriptors.isfinite().all():
        raise ValueError("the network gave descriptors with NaN or infinity")
    return descriptors


def pair_distances(a: Tensor, b: Tensor, index_a: np.ndarray, index_b: np.ndarray) -> np.ndarray:
    """Distances (K,) float64 between rows ``index_a`` of ``a`` and ``index_b`` of ``b`` (N,D),
    (M,D).
    """
    found = np.empty(len(index_a))
    for start in range(0, len(found), ROWS):
        rows_a, rows_b = (
            torch.from_numpy(index[start : start + ROWS]) for index in (index_a, index_b)
        )
        found[start : start + ROWS] = (a[rows_a] - b[rows_b]).norm(dim=1).numpy()
    return found


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
        pairs: the pair file, a name in the folder of the set or a path.

    Raises:
        DataError: the pair file is missing, cut, or of another set.
        ValueError: the network's output is not as it should be.
    """
    indices, same = read_test_pairs(patches.folder / pairs, patches.points)
    used, places = np.unique(indices, return_inverse=True)
    places = places.reshape(indices.shape)
    descriptors = torch.cat(
        [
            describe(net, patches.images[used[start : start + ROWS]], batch=batch, device=device)
            for start in range(0, len(used), ROWS)
        ]
    )
    return fpr95(pair_distances(descriptors, descriptors, places[:, 0], places[:, 1]), same)


# ---- HPatches


@dataclass(frozen=True)
class Described:
    """All descriptors of some sequences of HPatches, in one table.

    Attributes:
        names: of the sequences.
        counts: (S,) patches in a column of each.
        descriptors: (M,D) float32: sequence by sequence, column by column.
        contrast: one array (counts[s],) a sequence: standard deviation of the reference patches, in
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
        """Rows of patches: number of the sequence, image 0 (reference) to 5, index in the
        column.
        """
        column = np.where(np.asarray(image) == 0, 0, NOISES[noise] + np.asarray(image))
        return self.start[sequence] + column * self.counts[sequence] + index

    def column(self, sequence: int, image: int, noise: str) -> Tensor:
        """(N,D) of one image of one sequence."""
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
    """Descriptors of all patches of the sequences ``names`` (default all): 80 MB for 10,000
    reference patches and 128 numbers.

    Raises:
        FileNotFoundError, DataError: see ``hpatches_sequences`` and ``read_columns``.
    """
    sequences = hpatches_sequences(folder, names)
    counts, tables, contrast = [], [], []
    for sequence in tqdm(sequences, desc="hpatches", unit="sequence", leave=False):
        for number, column in enumerate(read_columns(sequence)):
            if number == 0:
                counts.append(len(column))
                contrast.append(column.reshape(len(column), -1).std(axis=1))
            tables.append(describe(net, shrink(column), batch=batch, device=device))
    return Described([s.name for s in sequences], np.array(counts), torch.cat(tables), contrast)


@dataclass(frozen=True)
class TaskFiles:
    """What is compared with what; sequences by their number in ``names`` of a ``Described``.

    Attributes:
        source: where it comes from, for the report.
        positives, intra, inter: pairs (K,6) int64: sequence, image 0..5, index, twice; ``inter`` is
            empty for a single sequence.
        queries, distractors: (Q,2) and (M,2): sequence, index in its reference image.
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
    """Pairs, queries and distractors in the proportions of the benchmark's own files; see
    docs/patchdata.md.

    Sequences are drawn evenly, then patches of each. A negative pair shares the first patch and
    both images with its positive.

    Raises:
        DataError: a sequence has fewer than two patches, or too few patches have contrast.
    """
    rng = np.random.default_rng(seed)
    if not len(counts) or counts.min() < 2:
        raise DataError("negatives need two patches in every sequence")

    def another(value: np.ndarray, of: np.ndarray | int) -> np.ndarray:
        drawn = rng.integers(np.asarray(of) - 1, size=len(value))
        return drawn + (drawn >= value)

    sequence = rng.integers(len(counts), size=num_pairs)
    first = rng.integers(counts[sequence])
    image = rng.integers(PAIR_IMAGES, size=num_pairs)
    other_image = another(image, PAIR_IMAGES)

    def pairs(other_sequence: np.ndarray, other_first: np.ndarray) -> np.ndarray:
        return np.stack([sequence, image, first, other_sequence, other_image, other_first], axis=1)

    positives, intra = pairs(sequence, first), pairs(sequence, another(first, counts[sequence]))
    inter = positives[:0]
    if len(counts) > 1:
        elsewhere = another(sequence, len(counts))
        inter = pairs(elsewhere, rng.integers(counts[elsewhere]))
    places = np.concatenate(
        [np.stack([np.full(n, s), np.arange(n)], axis=1) for s, n in enumerate(counts)]
    )
    places = places[np.concatenate(contrast) > MIN_CONTRAST]
    if len(places) < 2:
        raise DataError(f"{len(places)} reference patches have contrast: nothing to retrieve among")
    # how long one waits for a patch, where sequences are drawn evenly and then patches: longer in
    # long sequences
    order = places[np.argsort(rng.exponential(counts[places[:, 0]]))]
    # a set too small for both keeps the proportion of queries to distractors
    queries = min(
        num_queries, math.ceil(len(order) * num_queries / (num_queries + num_distractors))
    )
    return TaskFiles(
        f"drawn, seed {seed}",
        positives,
        intra,
        inter,
        order[:queries],
        order[queries : queries + num_distractors],
    )


def read_tasks(
    folder: str | Path,
    split: str,
    names: Sequence[str],
    counts: np.ndarray,
    wanted: Sequence[str] = TASKS,
) -> TaskFiles:
    """The benchmark's own task files: ``verif_pos_split-X.csv``, ``verif_neg_intra_...``,
    ``verif_neg_inter_...``, ``retr_queries_...`` and ``retr_distractors_...`` (``tasks/`` of the
    repository hpatches/hpatches-benchmark).

    Args:
        split: X of the names.
        names, counts: sequences and the patches in a column of each, which the files must fit.
        wanted: of ``TASKS``; files of others need not be there.

    Raises:
        DataError: a file is missing, damaged, or of other sequences; it is named.
    """
    folder = Path(folder)
    number = {name: k for k, name in enumerate(names)}

    def table(stem: str, columns: Sequence[str], task: str) -> np.ndarray:
        if task not in wanted:
            return np.zeros((0, len(columns)), np.int64)
        path = folder / f"{stem}_split-{split}.csv"
        rows = _read_csv(path, columns, number)
        for at, column in enumerate(columns):
            if not column.startswith("s"):
                limit = (
                    IMAGES
                    if column.startswith("t")
                    else counts[rows[:, at - 1 if len(columns) == 2 else 3 * (at // 3)]]
                )
                if ((rows[:, at] < 0) | (rows[:, at] >= limit)).any():
                    raise DataError(
                        f"{path}: column {column} names a patch that is not there; the file "
                        "belongs to other patches"
                    )
        return rows

    both = ("s1", "t1", "idx1", "s2", "t2", "idx2")
    return TaskFiles(
        f"task files of split {split}",
        table("verif_pos", both, "verification"),
        table("verif_neg_intra", both, "verification"),
        table("verif_neg_inter", both, "verification"),
        table("retr_queries", ("s", "idx"), "retrieval"),
        table("retr_distractors", ("s", "idx"), "retrieval"),
    )


def _read_csv(path: Path, columns: Sequence[str], number: dict[str, int]) -> np.ndarray:
    """(K, len(columns)) int64; names of sequences by their number."""
    if not path.is_file():
        raise DataError(
            f"{path}: missing; take it from tasks/ of hpatches/hpatches-benchmark, or leave the "
            "folder of tasks out"
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
    """Patch verification: ``ap`` and ``auc``, means over noises and kinds of negatives, and each of
    them below.
    """
    table = described.descriptors
    found: dict[str, Any] = {}
    scores = []
    for noise in NOISES:

        def distances(pairs: np.ndarray, noise: str = noise) -> np.ndarray:
            ends = [
                described.rows(pairs[:, k], pairs[:, k + 1], pairs[:, k + 2], noise) for k in (0, 3)
            ]
            return pair_distances(table, table, ends[0], ends[1])

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
    """Image matching: ``map``, the mean over what changes (viewpoint, illumination), noises,
    sequences and images, and its parts.
    """
    kinds = [_kind(name) for name in described.names]
    found: dict[str, Any] = {}
    for noise in NOISES:
        scores: dict[str, list[float]] = {kind: [] for kind in dict.fromkeys(kinds)}
        for number, kind in enumerate(kinds):
            reference = described.column(number, 0, noise).to(device)
            others = (
                described.column(number, image, noise).to(device) for image in range(1, IMAGES)
            )
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
    """Patch retrieval: ``map``, the mean over noises, pools and queries, and the mean over queries
    of each noise and pool.

    A query is a reference patch; right are its five patches of one noise, wrong the distractors of
    other sequences. Pools larger than the number of distractors are left out; where that is all of
    them, one pool takes everything.

    Raises:
        DataError: the distractors are of one sequence, so that its own queries would have none.
    """
    if len(np.unique(tasks.distractors[:, 0])) < 2:
        raise DataError(
            "retrieval needs distractors of two sequences; evaluate more sequences, or only the "
            "other tasks"
        )
    sizes = [pool for pool in pools if pool <= len(tasks.distractors)] or [
        len(tasks.distractors) + IMAGES - 1
    ]
    table = described.descriptors
    wrong = table[
        torch.from_numpy(
            described.rows(tasks.distractors[:, 0], 0, tasks.distractors[:, 1], "easy")
        )
    ].to(device)
    sums = {noise: np.zeros(len(sizes)) for noise in NOISES}
    for start in tqdm(range(0, len(tasks.queries), QUERIES_AT_ONCE), desc="retrieval", leave=False):
        sequence, index = tasks.queries[start : start + QUERIES_AT_ONCE].T
        asked = table[torch.from_numpy(described.rows(sequence, 0, index, "easy"))].to(device)
        right = {
            noise: table[
                torch.from_numpy(
                    np.stack([described.rows(sequence, i, index, noise) for i in range(1, IMAGES)])
                )
            ]
            for noise in NOISES
        }
        # one table for both, so that both are rounded alike
        every = torch.cat([wrong, *(part.flatten(0, 1).to(device) for part in right.values())])
        distances = squared_distances(asked, every).cpu().numpy()
        for q in range(len(asked)):
            others = distances[q, : len(wrong)][tasks.distractors[:, 0] != sequence[q]]
            for number, noise in enumerate(NOISES):
                first = len(wrong) + number * (IMAGES - 1) * len(asked) + q
                mine = distances[q, first : first + (IMAGES - 1) * len(asked) : len(asked)]
                sums[noise] += retrieval_ap(mine, others, sizes)
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
        "distractors": len(wrong),
    }


def _kind(name: str) -> str:
    return {"v_": "view", "i_": "illum"}.get(name[:2], "other")


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


# ---- the whole


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
    """Everything published of a descriptor on PhotoTour or HPatches patches.

    Args:
        net: patches (N,1,32,32) float32 in [0,1] on ``device`` -> (N,D), in evaluation mode.
        folder: PhotoTour: a set, or a folder of sets; HPatches: the folder of sequences.
        kind: ``phototour`` or ``hpatches``.
        pairs, cache: PhotoTour's pair file and the folder for its cache, see ``open_phototour``.
        split: HPatches: ``full``, ``view``, ``illum`` by what is there; others by ``splits``.
        splits: the benchmark's ``splits.json``; default the one in ``tasks`` (or in
            ``tasks/splits``).
        tasks: folder of the benchmark's task files; without it they are drawn, which shifts the
            numbers a little.
        only: of ``verification``, ``matching``, ``retrieval``.
        seed, num_pairs: of what is drawn.
        batch: patches the network sees at once.
        device: where the network and the tables of distances are.

    Returns:
        numbers 0..1 that JSON can hold. PhotoTour: ``fpr95`` of each set and their ``mean``.
            HPatches: ``verification`` with ``ap`` and
        ``auc``, ``matching`` and ``retrieval`` with ``map``, and their parts; ``split``,
        ``sequences`` and ``tasks`` say what of.

    Raises:
        ValueError: unknown kind, split or task, or the network's output is not as it should be.
        FileNotFoundError, DataError: the data are not there or damaged; the file is named.
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
        work = read_tasks(tasks, split, described.names, described.counts, only)
    else:
        work = draw_tasks(described.counts, described.contrast, seed=seed, num_pairs=num_pairs)
    found: dict[str, Any] = {
        "kind": kind,
        "split": split,
        "sequences": len(described.names),
        "tasks": work.source,
    }
    if "verification" in only:
        found["verification"] = verification(described, work)
    if "matching" in only:
        found["matching"] = matching(described, device=device)
    if "retrieval" in only:
        found["retrieval"] = retrieval(described, work, device=device)
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
    for each in folders:
        opened = open_phototour(each, cache=cache)
        rates[opened.name] = phototour_fpr95(net, opened, pairs=pairs, batch=batch, device=device)
    return {
        "kind": "phototour",
        "pairs": Path(pairs).name,
        "fpr95": rates,
        "mean": _mean(rates.values()),
    }


def _names_of_split(
    folder: Path, split: str, splits: str | Path | None, tasks: str | Path | None
) -> list[str]:
    """Test sequences of a split."""
    beside = (
        [Path(tasks) / "splits" / "splits.json", Path(tasks) / "splits.json"]
        if tasks is not None
        else []
    )
    file = splits if splits is not None else next((path for path in beside if path.is_file()), None)
    if file is not None:
        return read_split(file, split).get("test", [])
    names = [path.name for path in hpatches_sequences(folder)]
    if split == "full":
        return names
    if split not in ("view", "illum"):
        raise ValueError(
            f"split {split!r} needs splits.json of hpatches/hpatches-benchmark; full, view and "
            "illum do not"
        )
    chosen = [name for name in names if _kind(name) == split]
    if not chosen:
        raise DataError(f"{folder}: no sequence of the split {split}")
    return chosen
