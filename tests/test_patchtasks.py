"""FPR95 and the tasks of HPatches: known rankings, reference implementations that iterate over the
rankings, and small data sets.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiepoints.datasets.patch_sets import COLUMNS, open_phototour, shrink
from tiepoints.errors import DataError
from tiepoints.evaluation.patch_tasks import (
    Described,
    describe,
    describe_hpatches,
    draw_tasks,
    evaluate_patches,
    matching,
    phototour_fpr95,
    read_tasks,
    retrieval,
    verification,
)
from tiepoints.metrics.patches import (
    average_precision,
    fpr95,
    matching_ap,
    retrieval_ap,
    roc_auc,
    squared_distances,
    verification_scores,
)

# ---- reference implementations


def slow_fpr95(distances, labels):
    """Increase the threshold from distance to distance until 95 of 100 positives are accepted."""
    positives = [d for d, same in zip(distances, labels, strict=True) if same]
    negatives = [d for d, same in zip(distances, labels, strict=True) if not same]
    for threshold in sorted(set(positives)):
        if 100 * sum(d <= threshold for d in positives) >= 95 * len(positives):
            return sum(d <= threshold for d in negatives) / len(negatives)
    raise AssertionError


def slow_ap(distances, labels, total=None):
    """Iterate over the ranking and sum the trapezoids under the curve."""
    ranked = sorted(zip(distances, labels, strict=True), key=lambda pair: (pair[0], pair[1]))
    total = sum(labels) if total is None else total
    recall, precision, area, right = 0.0, 1.0, 0.0, 0
    for rank, (_, label) in enumerate(ranked, 1):
        right += bool(label)
        now = (right / total, right / rank)
        area += (now[0] - recall) * (now[1] + precision) / 2
        recall, precision = now
    return area


def slow_auc(positives, negatives):
    return sum(p < n for p in positives for n in negatives) / (len(positives) * len(negatives))


def drawn(seed, n=300, ties=False):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.4
    distances = rng.normal(size=n) - labels
    return (distances.round(1) if ties else distances), labels


# ---- the false positive rate


def test_fpr95_of_known_rankings():
    distances = np.arange(40.0)
    assert fpr95(distances, distances < 20) == 0
    assert fpr95(distances, distances >= 20) == 1
    # 19 of 20 positives are 95 %: the distance of the twentieth does not matter
    positives = np.append(np.arange(19.0), 100.0)
    negatives = np.array([18.5, 17.5, 50.0, 200.0])
    everything, labels = np.append(positives, negatives), np.arange(24) < 20
    assert fpr95(everything, labels) == 1 / 4
    # a negative at the threshold is accepted
    assert fpr95(np.append(positives, [18.0, 50.0]), np.arange(22) < 20) == 1 / 2
    assert fpr95(np.ones(10), np.arange(10) < 5) == 1


def test_fpr95_counts_in_integers():
    """0.95 x 20 in floating point is 19.000000000000004 or 19 depending on the machine: here it is
    19.
    """
    for n in (20, 40, 60, 100, 50_000):
        distances = np.append(np.arange(n), [0.95 * n - 0.5, n + 1.0])
        assert fpr95(distances, np.arange(n + 2) < n) == 0.0
        distances[n] -= 1  # between the last two that count
        assert fpr95(distances, np.arange(n + 2) < n) == 0.5


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_fpr95_equals_reference_implementation(seed, ties):
    distances, labels = drawn(seed, ties=ties)
    assert fpr95(distances, labels) == pytest.approx(slow_fpr95(distances, labels), abs=1e-12)
    order = np.random.default_rng(9).permutation(len(labels))
    assert fpr95(distances[order], labels[order]) == fpr95(distances, labels)


def test_fpr95_rejects_invalid_inputs():
    with pytest.raises(ValueError, match="pairs of both kinds, got 3"):
        fpr95(np.ones(3), np.ones(3, bool))
    with pytest.raises(ValueError, match="1 of 3 distances are not finite"):
        fpr95(np.array([1, np.nan, 2]), np.array([True, False, True]))
    with pytest.raises(ValueError, match="must be"):
        fpr95(np.ones(3), np.ones(2, bool))


# ---- average precision


def test_average_precision_of_known_rankings():
    assert average_precision(np.arange(4.0), np.array([1, 1, 0, 0], bool)) == 1
    # incorrect, correct: the precision increases from 0 to 1/2 over the whole recall
    assert average_precision(np.array([0.0, 1]), np.array([0, 1], bool)) == pytest.approx(1 / 4)
    # correct, incorrect, correct: half at precision 1, half from 1/2 to 2/3
    assert average_precision(np.arange(3.0), np.array([1, 0, 1], bool)) == pytest.approx(
        0.5 + (1 / 2 + 2 / 3) / 4
    )
    # one of two positives found, at rank 1
    assert average_precision(np.arange(2.0), np.array([1, 0], bool), positives=2) == pytest.approx(
        1 / 2
    )
    assert average_precision(np.arange(2.0), np.zeros(2, bool)) == 0
    assert average_precision(np.zeros(0), np.zeros(0, bool)) == 0
    with pytest.raises(ValueError, match="2 correct results among 1"):
        average_precision(np.arange(2.0), np.ones(2, bool), positives=1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("total", [None, 500])
@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_reference_implementation(seed, total, ties):
    distances, labels = drawn(seed, ties=ties)
    assert average_precision(distances, labels, total) == pytest.approx(
        slow_ap(distances, labels, total), abs=1e-12
    )
    order = np.random.default_rng(9).permutation(len(labels))
    assert average_precision(distances[order], labels[order]) == pytest.approx(
        average_precision(distances, labels), abs=1e-15
    )


@pytest.mark.parametrize("ties", [False, True])
def test_roc_area_equals_reference_implementation(ties):
    distances, labels = drawn(4, ties=ties)
    positives, negatives = distances[labels], distances[~labels]
    assert roc_auc(positives, negatives) == pytest.approx(slow_auc(positives, negatives), abs=1e-12)
    with pytest.raises(ValueError, match="both kinds"):
        roc_auc(positives, negatives[:0])


def test_imbalanced_uses_the_first_fifth_of_the_positives():
    distances, labels = drawn(5)
    positives, negatives = distances[labels], distances[~labels]
    few = positives[: len(positives) // 5]
    found = verification_scores(positives, negatives)
    expected = slow_ap(np.append(few, negatives), np.arange(len(few) + len(negatives)) < len(few))
    assert found["ap"] == pytest.approx(expected, abs=1e-12)
    assert found["auc"] == pytest.approx(slow_auc(positives, negatives), abs=1e-12)


# ---- matching and retrieval


def slow_matching_ap(reference, other):
    answers, right = [], []
    for k, descriptor in enumerate(reference):
        table = [float(((descriptor - o) ** 2).sum()) for o in other]
        answers.append(min(table))
        right.append(table.index(min(table)) == k)
    return slow_ap(answers, right, len(reference))


def noisy(seed, n, dimension=16, noise=0.6):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.nn.functional.normalize(torch.randn(n, dimension, generator=generator), dim=1)
    return clean, torch.nn.functional.normalize(
        clean + noise * torch.randn(n, dimension, generator=generator), dim=1
    )


def test_matching_of_known_descriptors():
    clean, _ = noisy(0, 20)
    assert matching_ap(clean, clean) == 1
    assert matching_ap(clean, clean.flip(0)) == 0
    # one of four is correct, at rank 1
    ids = torch.eye(4)
    assert matching_ap(
        ids, ids[[0, 2, 3, 1]] * torch.tensor([1, 0.5, 0.5, 0.5])[:, None]
    ) == pytest.approx(1 / 4)
    assert matching_ap(ids[:0], ids[:0]) == 0
    with pytest.raises(ValueError, match="same shape"):
        matching_ap(ids, ids[:2])


@pytest.mark.parametrize("seed", range(3))
def test_matching_equals_reference_implementation(seed):
    reference, other = noisy(seed, 60)
    found = matching_ap(reference, other)
    assert 0.05 < found < 0.95
    assert found == pytest.approx(slow_matching_ap(reference.double(), other.double()), abs=1e-9)


def slow_retrieval_ap(positives, distractors, pool):
    taken = list(distractors)[: max(0, pool - len(positives))]
    return slow_ap(list(positives) + taken, [True] * len(positives) + [False] * len(taken))


def test_retrieval_of_known_descriptors():
    assert retrieval_ap([0.1, 0.2], [0.3, 0.4, 0.5], [3, 100]).tolist() == [1, 1]
    # the nearest negative is only in the larger pool
    found = retrieval_ap([0.1, 0.2], [0.3, 0.15], [3, 4])
    assert found.tolist() == pytest.approx([1, 0.5 + (1 / 2 + 2 / 3) / 4])
    assert retrieval_ap([0.5] * 5, [0.5] * 95, [100])[0] < 0.1  # ties count as incorrect
    assert retrieval_ap([0.5], [0.1], [1]).tolist() == [1]  # a pool too small for negatives


@pytest.mark.parametrize("ties", [False, True])
def test_retrieval_equals_reference_implementation(ties):
    rng = np.random.default_rng(2)
    for _ in range(10):
        positives, distractors = rng.random(5) * 0.7, rng.random(200)
        if ties:
            positives, distractors = positives.round(1), distractors.round(1)
        pools = [5, 6, 20, 100, 205, 1000]
        expected = [slow_retrieval_ap(positives, distractors, pool) for pool in pools]
        np.testing.assert_allclose(
            retrieval_ap(positives, distractors, pools), expected, atol=1e-12
        )


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_distances_by_matrix_product(size):
    a, b = (part * size for part in noisy(0, 50))
    exact = torch.cdist(a.double(), b.double()).square()
    torch.testing.assert_close(squared_distances(a, b).double(), exact, atol=2e-6 * size**2, rtol=0)
    same = squared_distances(a, a.flip(0)).flip(1)
    assert (same.diag() == 0).all()  # equal descriptors, whatever the order of the sum
    assert (squared_distances(torch.zeros(2, 3), torch.zeros(1, 3)) == 0).all()


# ---- descriptors


def flat(patches):
    """A descriptor without a network: the pixels."""
    return patches.flatten(1)


def test_describe_uses_batches_and_checks_the_output():
    gray = np.random.default_rng(0).integers(0, 256, (7, 32, 32), dtype=np.uint8)
    seen = []

    def net(patches):
        seen.append((tuple(patches.shape), float(patches.max())))
        return flat(patches)

    found = describe(net, gray, batch=3)
    torch.testing.assert_close(found, torch.from_numpy(gray.reshape(7, -1) / 255).float())
    assert [shape for shape, _ in seen] == [(3, 1, 32, 32), (3, 1, 32, 32), (1, 1, 32, 32)]
    assert all(0.5 < largest <= 1 for _, largest in seen)
    with pytest.raises(ValueError, match=r"expected \(7, D\)"):
        describe(lambda patches: patches[:, 0], gray)
    with pytest.raises(ValueError, match="NaN or infinity"):
        describe(lambda patches: flat(patches) / 0, gray)
    with pytest.raises(ValueError, match="no patches"):
        describe(flat, gray[:0])


# ---- PhotoTour


def make_phototour(folder: Path, points: np.ndarray, seed: int, noise: float) -> Path:
    """A set of one mosaic, with patches of a 3D point equal except for noise, and 200 pairs, half
    of which correspond.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    scenes = rng.integers(40, 216, (points.max() + 1, 64, 64))
    patches = np.zeros((256, 64, 64), np.uint8)
    patches[: len(points)] = (scenes[points] + rng.normal(0, noise, (len(points), 64, 64))).clip(
        0, 255
    )
    rows = [np.concatenate(list(row), axis=1) for row in patches.reshape(16, 16, 64, 64)]
    Image.fromarray(np.concatenate(rows)).save(folder / "patches0000.bmp")
    (folder / "info.txt").write_text("".join(f"{p} 0\n" for p in points))
    lines = []
    for k in range(200):
        a = int(rng.integers(len(points)))
        others = np.flatnonzero((points == points[a]) == (k % 2 == 0))
        b = int(rng.choice(others[others != a]))
        lines.append(f"{a} {points[a]} 0 {b} {points[b]} 0 0\n")
    (folder / "m50_200_200_0.txt").write_text("".join(lines))
    return folder


def test_phototour_by_pixels(tmp_path):
    points = np.repeat(np.arange(50), 3)
    folder = make_phototour(tmp_path / "liberty", points, 0, 400)
    opened = open_phototour(folder)
    found = phototour_fpr95(flat, opened, pairs="m50_200_200_0.txt", batch=37)
    rows = [line.split() for line in (folder / "m50_200_200_0.txt").read_text().splitlines()]
    pixels = opened.images.astype(float) / 255
    distances = [np.sqrt(((pixels[int(r[0])] - pixels[int(r[3])]) ** 2).sum()) for r in rows]
    assert 0 < found < 1
    assert found == pytest.approx(slow_fpr95(distances, [r[1] == r[4] for r in rows]))
    assert (
        phototour_fpr95(
            lambda patches: torch.ones(len(patches), 4), opened, pairs="m50_200_200_0.txt"
        )
        == 1
    )


def test_all_phototour_sets_of_a_folder(tmp_path):
    points = np.repeat(np.arange(50), 3)
    for seed, name in enumerate(("yosemite", "liberty")):
        make_phototour(tmp_path / "sets" / name, points, seed, 3)
    found = evaluate_patches(
        flat, tmp_path / "sets", "phototour", pairs="m50_200_200_0.txt", cache=tmp_path / "cache"
    )
    assert found == {
        "kind": "phototour",
        "pairs": "m50_200_200_0.txt",
        "fpr95": {"liberty": 0.0, "yosemite": 0.0},
        "mean": 0.0,
    }
    cached = sorted(p.name for p in (tmp_path / "cache").glob("*.npy"))
    assert cached == ["liberty.npy", "yosemite.npy"]
    one = evaluate_patches(
        flat, tmp_path / "sets" / "liberty", "phototour", pairs="m50_200_200_0.txt"
    )
    assert one["fpr95"] == {"liberty": 0.0}
    with pytest.raises(DataError, match=r"m50_100000_100000_0\.txt: missing"):
        evaluate_patches(flat, tmp_path / "sets", "phototour")
    with pytest.raises(DataError, match="neither a PhotoTour set"):
        evaluate_patches(flat, tmp_path / "cache", "phototour")
    with pytest.raises(FileNotFoundError):
        evaluate_patches(flat, tmp_path / "nowhere", "phototour")


# ---- HPatches

COUNTS = {"i_lamp": 7, "v_boat": 9, "v_wall": 5}


def make_hpatches(folder: Path, noises=(10, 60, 200), seed: int = 0) -> Path:
    """Three sequences; the columns differ from the reference by three levels of noise."""
    rng = np.random.default_rng(seed)
    for name, count in COUNTS.items():
        (folder / name).mkdir(parents=True)
        scenes = rng.integers(40, 216, (count, 65, 65))
        scenes[0] = 100 + rng.integers(0, 3)  # without contrast, not used in retrieval
        for column in COLUMNS:
            size = 0 if column == "ref" else noises["eht".index(column[0])]
            patches = (scenes + rng.normal(0, size, scenes.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(patches.reshape(-1, 65)).save(folder / name / f"{column}.png")
    return folder


@pytest.fixture
def hpatches(tmp_path):
    return make_hpatches(tmp_path / "hpatches")


def patch_of(described: Described, name: str, image: int, index: int, noise: str) -> np.ndarray:
    number = described.names.index(name)
    return described.column(number, image, noise)[index].double().numpy()


def test_rows_are_those_of_the_patches(hpatches):
    described = describe_hpatches(flat, hpatches, batch=4)
    assert described.names == ["i_lamp", "v_boat", "v_wall"]
    assert described.counts.tolist() == [7, 9, 5]
    assert described.descriptors.shape == (16 * 21, 1024)
    for name, image, noise, column in (
        ("v_boat", 3, "hard", "h3"),
        ("v_wall", 0, "tough", "ref"),
        ("i_lamp", 5, "easy", "e5"),
    ):
        file = np.asarray(Image.open(hpatches / name / f"{column}.png")).reshape(-1, 65, 65)
        np.testing.assert_allclose(
            patch_of(described, name, image, 4, noise), shrink(file)[4].ravel() / 255, atol=1e-6
        )
        number = described.names.index(name)
        row = described.rows(np.array([number]), np.array([image]), np.array([4]), noise)
        np.testing.assert_array_equal(
            described.descriptors[int(row[0])], described.column(number, image, noise)[4]
        )
    assert [c[0] < 10 < c[1:].min() for c in described.contrast] == [True] * 3


def distance(described, row, noise):
    a = patch_of(described, described.names[row[0]], row[1], row[2], noise)
    b = patch_of(described, described.names[row[3]], row[4], row[5], noise)
    return float(np.sqrt(((a - b) ** 2).sum()))


def test_verification_equals_reference_implementation(tmp_path):
    described = describe_hpatches(flat, make_hpatches(tmp_path / "h", (150, 300, 600)))
    tasks = draw_tasks(described.counts, described.contrast, seed=1, num_pairs=200)
    found = verification(described, tasks)
    aps, aucs = [], []
    for noise in ("easy", "hard", "tough"):
        positives = [distance(described, row, noise) for row in tasks.positives]
        for kind, pairs in (("intra", tasks.intra), ("inter", tasks.inter)):
            negatives = [distance(described, row, noise) for row in pairs]
            aps.append(slow_ap(positives[:40] + negatives, [True] * 40 + [False] * 200))
            aucs.append(slow_auc(positives, negatives))
            assert found[noise][kind]["ap"] == pytest.approx(aps[-1], abs=1e-6)
            assert found[noise][kind]["auc"] == pytest.approx(aucs[-1], abs=1e-6)
    assert found["ap"] == pytest.approx(np.mean(aps), abs=1e-6)
    assert found["auc"] == pytest.approx(np.mean(aucs), abs=1e-6)
    assert 0.2 < found["tough"]["inter"]["ap"] < found["easy"]["inter"]["ap"]


def test_matching_of_a_folder_equals_reference_implementation(tmp_path):
    described = describe_hpatches(flat, make_hpatches(tmp_path / "h", (150, 300, 600)))
    found = matching(described)
    expected = {}
    for noise in ("easy", "hard", "tough"):
        per_sequence = {
            name: np.mean(
                [
                    slow_matching_ap(
                        *(
                            np.array([patch_of(described, name, i, k, noise) for k in range(count)])
                            for i in (0, image)
                        )
                    )
                    for image in range(1, 6)
                ]
            )
            for name, count in COUNTS.items()
        }
        expected[noise] = {
            "illum": per_sequence["i_lamp"],
            "view": (per_sequence["v_boat"] + per_sequence["v_wall"]) / 2,
        }
        assert found[noise] == pytest.approx(expected[noise], abs=1e-5)
    kinds = [np.mean([expected[noise][kind] for noise in expected]) for kind in ("illum", "view")]
    assert found["map"] == pytest.approx(np.mean(kinds), abs=1e-5)
    assert found["easy"]["view"] > found["tough"]["view"]


@pytest.mark.parametrize("pools", [(7, 9, 12), (100, 500)])
def test_retrieval_of_a_folder_equals_reference_implementation(tmp_path, pools):
    described = describe_hpatches(flat, make_hpatches(tmp_path / "h", (150, 300, 600)))
    tasks = draw_tasks(
        described.counts, described.contrast, seed=1, num_queries=5, num_distractors=12
    )
    found = retrieval(described, tasks, pools=pools)
    sizes = pools if pools[0] == 7 else (12 + 5,)
    for noise in ("easy", "hard", "tough"):
        for size in sizes:
            scores = []
            for s, index in tasks.queries:
                asked = patch_of(described, described.names[s], 0, index, noise)
                mine = [
                    patch_of(described, described.names[s], i, index, noise) for i in range(1, 6)
                ]
                others = [
                    patch_of(described, described.names[t], 0, k, noise)
                    for t, k in tasks.distractors
                    if t != s
                ]
                distances = [[((asked - o) ** 2).sum() for o in group] for group in (mine, others)]
                scores.append(slow_retrieval_ap(*distances, size))
            assert found[noise][str(size)] == pytest.approx(np.mean(scores), abs=1e-5)
    assert found["map"] == pytest.approx(
        np.mean([found[n][str(s)] for n in ("easy", "hard", "tough") for s in sizes])
    )


def test_drawn_tasks_have_the_proportions_of_the_benchmark():
    counts = np.array([30, 60, 200])
    contrast = [np.where(np.arange(n) % 2, 20.0, 5.0) for n in counts]
    tasks = draw_tasks(
        counts, contrast, seed=3, num_pairs=30_000, num_queries=20, num_distractors=40
    )
    p, intra, inter = tasks.positives, tasks.intra, tasks.inter
    np.testing.assert_array_equal(p[:, [0, 2]], p[:, [3, 5]])
    assert (p[:, 1] != p[:, 4]).all()
    assert set(p[:, [1, 4]].ravel()) == set(
        range(5)
    )  # the sixth image is never drawn, as in the official files
    np.testing.assert_allclose(np.bincount(p[:, 0]) / len(p), 1 / 3, atol=0.02)
    np.testing.assert_array_equal(intra[:, :5], p[:, :5])
    assert (intra[:, 5] != p[:, 5]).all()
    np.testing.assert_array_equal(inter[:, [0, 1, 2, 4]], p[:, [0, 1, 2, 4]])
    assert (inter[:, 3] != inter[:, 0]).all()
    for pairs in (p, intra, inter):
        assert (pairs[:, [2, 5]] < counts[pairs[:, [0, 3]]]).all()
    both = np.concatenate([tasks.queries, tasks.distractors])
    assert both.shape == (60, 2)
    assert len(np.unique(both, axis=0)) == 60
    assert (both[:, 1] % 2 == 1).all()  # only patches with contrast
    again, other = (
        draw_tasks(counts, contrast, seed=seed, num_pairs=100).positives for seed in (3, 4)
    )
    assert not np.array_equal(again, other)
    np.testing.assert_array_equal(
        again, draw_tasks(counts, contrast, seed=3, num_pairs=100).positives
    )


def test_first_draws_are_uniform_over_sequences():
    counts = np.array([50, 50, 2000])
    contrast = [np.full(n, 20.0) for n in counts]
    first = [
        draw_tasks(
            counts, contrast, seed=seed, num_pairs=1, num_queries=6, num_distractors=6
        ).queries[:, 0]
        for seed in range(200)
    ]
    np.testing.assert_allclose(np.bincount(np.concatenate(first)) / 1200, 1 / 3, atol=0.06)


def test_too_small_sets_raise():
    with pytest.raises(DataError, match="two patches in every sequence"):
        draw_tasks(np.array([1, 5]), [np.ones(1), np.ones(5)])
    with pytest.raises(DataError, match="have contrast"):
        draw_tasks(np.array([4, 5]), [np.ones(4), np.ones(5)], num_pairs=3)


# ---- the benchmark's own files


def write_tasks(folder: Path, tasks, names, split="a") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in (
        ("verif_pos", tasks.positives),
        ("verif_neg_intra", tasks.intra),
        ("verif_neg_inter", tasks.inter),
    ):
        with (folder / f"{stem}_split-{split}.csv").open("w", newline="") as stream:
            out = csv.writer(stream)
            out.writerow(["s1", "t1", "idx1", "s2", "t2", "idx2"])
            out.writerows([names[r[0]], r[1], r[2], names[r[3]], r[4], r[5]] for r in rows.tolist())
    for stem, rows in (("retr_queries", tasks.queries), ("retr_distractors", tasks.distractors)):
        with (folder / f"{stem}_split-{split}.csv").open("w", newline="") as stream:
            out = csv.writer(stream)
            out.writerow(["s", "idx"])
            out.writerows([names[s], k] for s, k in rows.tolist())
    return folder


def test_task_files_round_trip(hpatches, tmp_path):
    described = describe_hpatches(flat, hpatches)
    tasks = draw_tasks(
        described.counts, described.contrast, num_pairs=60, num_queries=5, num_distractors=9
    )
    folder = write_tasks(tmp_path / "tasks", tasks, described.names)
    read = read_tasks(folder, "a", described.names, described.counts)
    for name in ("positives", "intra", "inter", "queries", "distractors"):
        np.testing.assert_array_equal(getattr(read, name), getattr(tasks, name))
    assert read.source == "task files of split a"
    # the older order of columns
    path = folder / "retr_queries_split-a.csv"
    path.write_text("idx,s\n" + "".join(f"{k},{described.names[s]}\n" for s, k in tasks.queries))
    np.testing.assert_array_equal(
        read_tasks(folder, "a", described.names, described.counts).queries, tasks.queries
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing; it is in tasks/"),
        ("", "columns none, expected s1, t1"),
        ("s,idx\nv_wall,1\n", "columns s, idx, expected s1"),
        ("s1,t1,idx1,s2,t2,idx2\n", "empty"),
        ("s1,t1,idx1,s2,t2,idx2\nv_wall,0,1,v_wall,2\n", "line 2 is damaged"),
        ("s1,t1,idx1,s2,t2,idx2\nv_wall,0,1,v_wall,2,x\n", "line 2 is damaged"),
        ("s1,t1,idx1,s2,t2,idx2\nv_wall,0,1,v_gone,2,1\n", "line 2 names the sequence 'v_gone'"),
        (
            "s1,t1,idx1,s2,t2,idx2\nv_wall,0,1,v_wall,6,1\n",
            "column t2 names a patch that does not exist",
        ),
        (
            "s1,t1,idx1,s2,t2,idx2\nv_boat,0,8,v_wall,2,5\n",
            "column idx2 names a patch that does not exist",
        ),
    ],
)
def test_damaged_task_files(tmp_path, text, message):
    names, counts = list(COUNTS), np.array(list(COUNTS.values()))
    tasks = draw_tasks(
        counts, [np.full(n, 20.0) for n in counts], num_pairs=20, num_queries=4, num_distractors=8
    )
    folder = write_tasks(tmp_path / "tasks", tasks, names)
    path = folder / "verif_neg_intra_split-a.csv"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_tasks(folder, "a", names, counts)
    assert path.name in str(caught.value)
    read_tasks(folder, "a", names, counts, wanted=["retrieval"])  # does not need the files


# ---- entry point


def test_all_tasks_of_a_folder(hpatches, tmp_path):
    found = evaluate_patches(flat, hpatches, "hpatches", num_pairs=300)
    assert (found["sequences"], found["split"], found["tasks"]) == (3, "full", "drawn, seed 0")
    assert (
        found["verification"]["easy"]["inter"]["auc"] > 0.97
    )  # constant patches of two sequences may be equal
    assert found["matching"]["easy"] == {"illum": 1.0, "view": 1.0}
    assert min(found["retrieval"]["easy"].values()) > 0.99
    assert json.loads(json.dumps(found)) == found
    assert found == evaluate_patches(flat, hpatches, "hpatches", num_pairs=300, batch=5)
    part = evaluate_patches(flat, hpatches, "hpatches", split="view", only=["matching"])
    assert (part["sequences"], part["matching"]["easy"]) == (2, {"view": 1.0})
    assert "retrieval" not in part


def test_splits_and_task_files_of_the_benchmark(hpatches, tmp_path):
    names = ["v_wall", "i_lamp"]
    described = describe_hpatches(flat, hpatches, names)
    tasks = draw_tasks(
        described.counts, described.contrast, seed=5, num_pairs=50, num_queries=3, num_distractors=6
    )
    folder = write_tasks(tmp_path / "tasks", tasks, names)
    (folder / "splits").mkdir()
    (folder / "splits" / "splits.json").write_text(
        json.dumps({"a": {"test": names, "train": ["v_boat"]}})
    )
    found = evaluate_patches(flat, hpatches, "hpatches", split="a", tasks=folder)
    assert (found["sequences"], found["tasks"]) == (2, "task files of split a")
    drawn_alike = evaluate_patches(
        flat,
        hpatches,
        "hpatches",
        split="a",
        splits=folder / "splits" / "splits.json",
        only=["matching"],
    )
    assert drawn_alike["matching"] == found["matching"]
    assert found["verification"] == verification(described, tasks)
    with pytest.raises(DataError, match="no split 'b'"):
        evaluate_patches(flat, hpatches, "hpatches", split="b", tasks=folder)


def test_constant_descriptor_scores_zero(hpatches):
    """In the benchmark's own code it has a retrieval mAP of 1 (hpatches-benchmark, issue 16)."""
    found = evaluate_patches(
        lambda patches: torch.full((len(patches), 8), 0.3), hpatches, "hpatches", num_pairs=300
    )
    assert found["verification"]["auc"] == 0
    assert found["verification"]["ap"] < 0.15
    assert found["matching"]["map"] < 0.2
    assert found["retrieval"]["map"] < 0.5


def test_invalid_arguments_raise(hpatches, tmp_path):
    with pytest.raises(ValueError, match="kind must be one of phototour, hpatches"):
        evaluate_patches(flat, hpatches, "oxford")
    with pytest.raises(
        ValueError, match="tasks are verification, matching, retrieval, got counting"
    ):
        evaluate_patches(flat, hpatches, "hpatches", only=["counting"])
    with pytest.raises(ValueError, match=r"split 'a' needs splits\.json"):
        evaluate_patches(flat, hpatches, "hpatches", split="a")
    with pytest.raises(FileNotFoundError, match="hpatches-release"):
        evaluate_patches(flat, tmp_path / "nowhere", "hpatches")
    one = tmp_path / "one"
    one.mkdir()
    (hpatches / "v_wall").rename(one / "v_wall")
    with pytest.raises(DataError, match="two sequences"):
        evaluate_patches(flat, one, "hpatches", num_pairs=50)
    found = evaluate_patches(flat, one, "hpatches", num_pairs=50, only=["verification", "matching"])
    assert set(found["verification"]["easy"]) == {"intra"}
    with pytest.raises(DataError, match="no sequence of the split illum"):
        evaluate_patches(flat, one, "hpatches", split="illum")
