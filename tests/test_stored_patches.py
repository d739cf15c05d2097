"""Files of training patches and of their descriptors."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from tiepoints.datasets.stored_patches import StoredPatches, write_patches, write_targets
from tiepoints.errors import DataError


class Pairs(Dataset):
    """Patches whose gray level is the number of the item, and half a level more."""

    def __init__(self, count: int):
        self.count, self.reads = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.reads += 1
        patches = torch.full((4, 1, 32, 32), index / 255)
        return {"anchor": patches, "positive": patches + 100 / 255}


def describe(patches: torch.Tensor) -> torch.Tensor:
    return patches.flatten(1)[:, :8]


@pytest.fixture
def files(tmp_path):
    paths = tmp_path / "pairs" / "patches.npy", tmp_path / "pairs" / "targets.npy"
    write_patches(paths[0], Pairs(5), identity="a")
    write_targets(paths[1], paths[0], describe, identity="a")
    return paths


def test_each_pass_has_each_item_once_in_another_order(files):
    data = StoredPatches(*files, seed=3, length=15)
    levels = []
    for index in range(15):
        item = data[index]
        assert item["anchor"].shape == (4, 1, 32, 32)
        level = item["anchor"][0, 0, 0, 0] * 255
        levels.append(round(level.item()))
        torch.testing.assert_close(item["positive"] * 255, torch.full((4, 1, 32, 32), level + 100))
        for view in ("anchor", "positive"):
            expected = describe(item[view]).half()
            torch.testing.assert_close(item[f"{view}_target"], expected)
    passes = [levels[i : i + 5] for i in (0, 5, 10)]
    assert [sorted(part) for part in passes] == [[0, 1, 2, 3, 4]] * 3
    assert passes[0] != passes[1] or passes[1] != passes[2]
    again = StoredPatches(*files, seed=3, length=15)
    assert torch.equal(again[7]["anchor"], data[7]["anchor"])
    assert "anchor_target" not in StoredPatches(files[0], length=1)[0]


def test_files_are_written_again_for_other_data(files):
    pairs = Pairs(5)
    write_patches(files[0], pairs, identity="a")
    assert pairs.reads == 1  # for the shape
    write_patches(files[0], pairs, identity="b")
    assert pairs.reads == 7
    write_patches(files[0], Pairs(6), identity="b")
    assert len(np.load(files[0])) == 6
    with pytest.raises(DataError, match=r"targets.npy has not the patches of .*patches.npy"):
        StoredPatches(*files, length=1)


def test_damaged_files_are_named(files, tmp_path):
    files[0].write_bytes(files[0].read_bytes()[:200])
    with pytest.raises(DataError, match=r"patches.npy is no readable file of patches.*delete it"):
        StoredPatches(files[0], length=1)
    with pytest.raises(DataError, match=r"nowhere\.npy"):
        StoredPatches(tmp_path / "nowhere.npy", length=1)
    with pytest.raises(IndexError):
        StoredPatches(files[1], length=2)[2]
