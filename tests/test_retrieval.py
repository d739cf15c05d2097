"""Global descriptors, and the choice of pairs."""

from __future__ import annotations

import importlib.util
from itertools import combinations
from pathlib import Path

import pytest
import torch

from helpers import texture
from tiepoints.errors import DataError
from tiepoints.exif import Position
from tiepoints.formats.npy import FeatureFolder
from tiepoints.jobs.image_pairs import Candidates, choose_image_pairs
from tiepoints.retrieval import (
    Vocabulary,
    center,
    load_vocabulary,
    most_similar,
    order_by_matches,
    similar_images,
    strongest,
    train_vocabulary,
)
from tiepoints.structs import Features, Keypoints
from tiepoints.weights import digest

DIMENSION = 16


def described(seed: int, shared: int = 0, count: int = 60) -> torch.Tensor:
    """Unit descriptors of scene ``shared``, with noise of ``seed``."""
    scene = torch.randn(count, DIMENSION, generator=torch.Generator().manual_seed(1000 + shared))
    noise = torch.randn(count, DIMENSION, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(scene + 0.2 * noise, dim=1)


def features(descriptors: torch.Tensor) -> Features:
    count = len(descriptors)
    xy = torch.arange(2.0 * count).reshape(count, 2)
    return Features(
        Keypoints(xy, torch.ones(count), torch.zeros(count), torch.ones(count)),
        descriptors,
        (640, 480),
    )


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train_vocabulary([described(k, k % 4) for k in range(20)], words=8, dimensions=12)


def test_residuals_are_summed_by_word():
    vocabulary = Vocabulary(torch.zeros(2), torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    found = vocabulary.describe(torch.tensor([[1.0, 0.3], [1.2, 0.3], [0.0, 2.0]]))
    # residuals (0, 0.3) + (0.2, 0.3) of the first word, (0, 1) of the second, of unit length each
    first = torch.nn.functional.normalize(torch.tensor([0.2, 0.6]), dim=0)
    torch.testing.assert_close(found, torch.cat([first, torch.tensor([0.0, 1.0])]) / 2**0.5)
    assert (vocabulary.describe(torch.zeros(0, 2)) == 0).all()
    with pytest.raises(ValueError, match="dimension 2, got 3"):
        vocabulary.describe(torch.zeros(1, 3))


def test_images_of_one_scene_are_nearest(vocabulary):
    scene = [k % 4 for k in range(24)]
    images = [described(100 + k, scene[k]) for k in range(24)]
    table = center(torch.stack([vocabulary.describe(image) for image in images]))
    own = torch.arange(24)
    found = most_similar(table, table, 5, torch.stack([own, own + 1], dim=1))
    for i, row in enumerate(found.tolist()):
        assert sorted(row) == [j for j in range(24) if scene[j] == scene[i] and j != i]


def test_excluded_rows_are_not_found():
    table = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    found = most_similar(table[:1], table, 6, torch.tensor([[0, 4]]))
    assert sorted(found[0, :2].tolist()) == [4, 5]
    assert found[0, 2:].tolist() == [-1] * 4


def test_blocks_find_what_the_whole_table_has(monkeypatch):
    monkeypatch.setattr("tiepoints.retrieval.BLOCK", 3)
    table = torch.nn.functional.normalize(torch.randn(50, 6), dim=1)
    own = torch.arange(50)
    found = most_similar(table, table, 7, torch.stack([own, own + 1], dim=1))
    whole = (table @ table.T).fill_diagonal_(-torch.inf).topk(7, dim=1).indices
    assert found.tolist() == whole.tolist()


def test_vocabularies_belong_to_their_weights(vocabulary, tmp_path, monkeypatch):
    for name in ("hardnet", "desnet"):
        found = load_vocabulary(digest(name))
        assert found is not None, name
        assert found.axes.shape == (128, 64)
    assert load_vocabulary(digest("sosnet")) is None
    assert load_vocabulary(None) is None
    monkeypatch.setattr("tiepoints.retrieval.VOCABULARIES", tmp_path)
    vocabulary.save(tmp_path / "own.vocabulary", "abc")
    read = load_vocabulary("abc")
    torch.testing.assert_close(read.words, vocabulary.words, rtol=0, atol=2e-3)


# ---- pairs


@pytest.fixture
def candidates(tmp_path):
    """70 images of 7 scenes in turn: image k shows scene k % 7."""
    store = FeatureFolder(tmp_path / "features", write=True)
    names = [f"{k}.jpg" for k in range(70)]
    for k, name in enumerate(names):
        store.write(name, features(described(k, k % 7)))
    files = {name: tmp_path / name for name in names}
    yield Candidates(names, store, None, files)
    store.close()


def scene_of(name: str) -> int:
    return int(Path(name).stem) % 7


def test_retrieval_finds_the_images_of_each_scene(candidates):
    choice = choose_image_pairs(candidates, "retrieval", 9)
    expected = {
        pair for pair in combinations(candidates.names, 2) if len({*map(scene_of, pair)}) == 1
    }
    assert set(choice.pairs) == expected
    assert choice.reason == "each image with the 9 most similar ones"


def test_sequences_close_loops(candidates):
    choice = choose_image_pairs(candidates, "sequential", 2)
    near = {(f"{k}.jpg", f"{k + d}.jpg") for k in range(70) for d in (1, 2) if k + d < 70}
    loops = set(choice.pairs) - near
    assert near < set(choice.pairs)
    assert len(loops) >= 5 * 70 / 2
    assert all(scene_of(a) == scene_of(b) for a, b in loops)


def test_all_pairs_of_few_images(candidates):
    few = Candidates(candidates.names[:60], candidates.store, None, candidates.files)
    choice = choose_image_pairs(few, default_neighbors=3)
    assert (choice.method, len(choice.pairs)) == ("exhaustive", 60 * 59 // 2)
    choice = choose_image_pairs(candidates)
    assert choice.method == "retrieval"
    fewer = choose_image_pairs(candidates, default_neighbors=3)
    assert fewer.pairs == choose_image_pairs(candidates, "retrieval", 3).pairs
    assert len(fewer.pairs) < len(choice.pairs)
    assert choose_image_pairs(candidates, "retrieval", 3, default_neighbors=9).pairs == fewer.pairs
    assert "as there are 70 images, 0 of them with a GPS position" in choice.reason


def test_neighbors_by_gps(candidates, monkeypatch):
    # a square of 8 x 9 positions, 20 m apart; the last ones have none
    def position(path: Path) -> Position | None:
        k = int(path.stem)
        return None if k >= 65 else Position(48 + k // 8 * 18e-5, 11 + k % 8 * 27e-5, 100.0)

    monkeypatch.setattr("tiepoints.jobs.image_pairs.read_position", position)
    choice = choose_image_pairs(candidates)
    assert choice.method == "gps"
    assert "70 images, 65 of them with a GPS position" in choice.reason
    pairs = set(choose_image_pairs(candidates, "gps", 4).pairs)
    for k in (9, 18, 27):  # inside: the four adjacent ones
        for other in (k - 8, k - 1, k + 1, k + 8):
            assert tuple(sorted((f"{k}.jpg", f"{other}.jpg"), key=lambda n: int(n[:-4]))) in pairs
    assert any("69.jpg" in pair for pair in pairs)
    monkeypatch.setattr("tiepoints.jobs.image_pairs.read_position", lambda path: None)
    with pytest.raises(DataError, match="0 of 70 photographs have a GPS position"):
        choose_image_pairs(candidates, "gps")


def test_photographs_at_one_place_are_not_paired_by_gps(candidates, monkeypatch):
    monkeypatch.setattr(
        "tiepoints.jobs.image_pairs.read_position", lambda path: Position(48.0, 11.0, 0.0)
    )
    choice = choose_image_pairs(candidates)
    assert choice.method == "retrieval"
    assert "within 0 m by GPS" in choice.reason


def test_invalid_choices(candidates):
    with pytest.raises(ValueError, match="pairs must be one of auto, exhaustive"):
        choose_image_pairs(candidates, "all")
    with pytest.raises(ValueError, match="no number of neighbors"):
        choose_image_pairs(candidates, "exhaustive", 5)


def test_photographs_of_one_scene_are_similar(tmp_path):
    """Crops of one texture resemble each other more than those of another, with the vocabulary of
    the package.
    """
    import tiepoints

    extractor = tiepoints.build("sobelnet", "desnet", num_keypoints=200)
    vocabulary = load_vocabulary(digest("desnet"))
    crops = [
        texture(seed, (300, 260)).crop((x, x // 2, x + 240, x // 2 + 200))
        for seed in range(3)
        for x in (0, 30, 60)
    ]
    rows = [vocabulary.describe(extractor.extract(crop).descriptors) for crop in crops]
    table = center(torch.stack(rows))
    own = torch.arange(9)
    found = most_similar(table, table, 2, torch.stack([own, own + 1], dim=1))
    assert all({j // 3 for j in row} == {i // 3} for i, row in enumerate(found.tolist()))


def test_candidates_are_ordered_by_matches():
    # candidate 1 shares 40 of 60 local descriptors with the query, 2 shares 10, 3 none
    query = described(0)
    images = [query]
    for k, shared in ((1, 40), (2, 10), (3, 0)):
        images.append(torch.cat([query[:shared], described(k, 10 + k)[shared:]]))
    local = torch.stack([strongest(image) for image in images])
    assert local.shape == (4, 128, DIMENSION)
    assert (local[:, 60:] == 0).all()
    found = order_by_matches(torch.tensor([[3, -1, 2, 1]]), torch.tensor([0]), local)
    assert found.tolist() == [[1, 2, 3, -1]]


def test_many_images_are_searched_with_faiss_if_installed(monkeypatch, caplog):
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator), dim=1).half()
    rows = torch.arange(60)
    excluded = torch.stack([rows - 2, rows + 3], dim=1)
    exact = most_similar(table, table, 5, excluded)
    monkeypatch.setattr("tiepoints.retrieval.EXACT_LIMIT", 50)
    monkeypatch.setattr("tiepoints.retrieval.PROBES", 100)  # all cells
    if importlib.util.find_spec("faiss") is None:
        caplog.set_level("INFO")
        assert torch.equal(similar_images(table, table, 5, excluded), exact)
        assert "tiepoints[faiss]" in caplog.text
    else:
        found = similar_images(table, table, 5, excluded)
        assert found.shape == exact.shape
        assert (found == exact).float().mean() > 0.97  # equal ones are ordered by rounding
        similarity = table.float() @ table.float().T
        torch.testing.assert_close(
            similarity.gather(1, found), similarity.gather(1, exact), atol=1e-3, rtol=0
        )
