"""Reading PhotoTour and HPatches, their training batches, and messages for damaged files."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tiepoints.datasets.patch_sets import (
    COLUMNS,
    PatchBatches,
    PatchSet,
    hpatches_sequences,
    open_hpatches,
    open_phototour,
    read_column,
    read_mosaic,
    read_split,
    read_test_pairs,
    rotate_both,
    shrink,
)
from tiepoints.errors import DataError

COUNT = 300  # a full mosaic and a part of one


def make_phototour(
    folder: Path, count: int = COUNT, seed: int = 0
) -> tuple[Path, np.ndarray, np.ndarray]:
    """A small set: folder, patches (count,64,64), points (count,); every third point has one patch,
    the others two or three.
    """
    rng = np.random.default_rng(seed)
    points = np.repeat(np.arange(count), np.tile([1, 2, 3], count)[:count])[:count]
    patches = rng.integers(0, 256, (count, 64, 64), dtype=np.uint8)
    folder.mkdir(parents=True)
    mosaics = np.zeros((-(-count // 256) * 256, 64, 64), np.uint8)
    mosaics[:count] = patches
    for k, mosaic in enumerate(mosaics.reshape(-1, 16, 16, 64, 64)):
        rows = [np.concatenate(list(row), axis=1) for row in mosaic]
        Image.fromarray(np.concatenate(rows)).save(folder / f"patches{k:04d}.bmp")
    (folder / "info.txt").write_text("".join(f"{point} 0\n" for point in points))
    return folder, patches, points


def make_sequence(folder: Path, count: int, seed: int = 0) -> np.ndarray:
    """A sequence of HPatches; its patches (16,count,65,65)."""
    rng = np.random.default_rng([seed, count])
    patches = rng.integers(0, 256, (16, count, 65, 65), dtype=np.uint8)
    folder.mkdir(parents=True)
    for name, column in zip(COLUMNS, patches, strict=True):
        Image.fromarray(column.reshape(-1, 65)).save(folder / f"{name}.png")
    return patches


@pytest.fixture
def phototour(tmp_path):
    return make_phototour(tmp_path / "liberty")


# ---- PhotoTour


def test_mosaics_are_read_row_by_row(phototour):
    folder, patches, _ = phototour
    np.testing.assert_array_equal(read_mosaic(folder / "patches0000.bmp"), patches[:256])


def test_a_set_has_every_patch_and_point_in_order(phototour):
    folder, patches, points = phototour
    found = open_phototour(folder)
    assert (found.name, len(found), found.images.shape, found.images.dtype) == (
        "liberty",
        COUNT,
        (COUNT, 32, 32),
        np.uint8,
    )
    np.testing.assert_array_equal(found.points, points)
    chosen = np.array([299, 0, 17, 256])
    # 64 -> 32 is the mean of 2 x 2, rounded
    blocks = patches[chosen].reshape(4, 32, 2, 32, 2).astype(int).sum(axis=(2, 4))
    np.testing.assert_array_equal(found.images[chosen], (blocks + 2) // 4)
    given = found.patches(chosen)
    assert given.shape == (4, 1, 32, 32)
    torch.testing.assert_close(given[:, 0], torch.from_numpy(found.images[chosen]) / 255)


def test_set_is_a_memory_map_created_once(phototour, tmp_path):
    folder, _, _ = phototour
    first = open_phototour(folder)
    assert isinstance(first.images, np.memmap)
    stamp = first.file.stat().st_mtime_ns
    assert open_phototour(folder).file.stat().st_mtime_ns == stamp
    assert [p.name for p in folder.iterdir() if "part" in p.name] == []
    elsewhere = open_phototour(folder, cache=tmp_path / "cache")
    assert elsewhere.file == tmp_path / "cache" / "liberty.npy"
    np.testing.assert_array_equal(elsewhere.images, first.images)
    assert len(pickle.dumps(first)) < 10_000  # a worker opens the file itself


def test_changed_mosaic_or_damaged_cache_is_read_again(phototour):
    folder, _, _ = phototour
    old = open_phototour(folder).images[0].copy()
    Image.new("L", (1024, 1024), 7).save(folder / "patches0000.bmp")
    later = (folder / "patches32.npy").stat().st_mtime + 5
    os.utime(folder / "patches0000.bmp", (later, later))
    found = open_phototour(folder)
    assert (found.images[0] == 7).all()
    assert not (old == 7).all()
    found.file.write_bytes(b"\x93NUMPY broken")
    os.utime(found.file, (later + 5, later + 5))
    assert (open_phototour(folder).images[0] == 7).all()


def test_color_and_palette_bitmaps_are_converted_to_gray(phototour):
    folder, patches, _ = phototour
    with Image.open(folder / "patches0000.bmp") as image:
        colored = image.convert("RGB")
    colored.save(folder / "patches0000.bmp")
    np.testing.assert_array_equal(read_mosaic(folder / "patches0000.bmp"), patches[:256])


@pytest.mark.parametrize(
    ("damage", "named", "message"),
    [
        ("cut mosaic", "patches0001.bmp", "Unpack the archive again"),
        ("no mosaic", "patches0001.bmp", "missing"),
        ("small mosaic", "patches0001.bmp", "512 x 1024 pixels"),
        ("no info", "info.txt", "missing"),
        ("empty info", "info.txt", "empty file"),
        ("words in info", "info.txt", "truncated or damaged"),
        ("cut info", "info.txt", "is truncated"),
    ],
)
def test_damaged_phototour_sets_raise_with_file_and_remedy(phototour, damage, named, message):
    folder, _, _ = phototour
    mosaic, info = folder / "patches0001.bmp", folder / "info.txt"
    if damage == "cut mosaic":
        mosaic.write_bytes(mosaic.read_bytes()[:5000])
    elif damage == "no mosaic":
        mosaic.unlink()
    elif damage == "small mosaic":
        Image.new("L", (512, 1024)).save(mosaic)
    elif damage == "no info":
        info.unlink()
    elif damage == "empty info":
        info.write_text("")
    elif damage == "words in info":
        info.write_text("1 0\ntwo 0\n")
    else:
        info.write_text("".join(info.read_text().splitlines(keepends=True)[:200]))
    with pytest.raises(DataError, match=message) as caught:
        open_phototour(folder)
    assert named in str(caught.value)
    assert not list(folder.glob("*.npy")) + list(folder.glob(".*.part"))


def test_no_folder_and_no_space_for_the_cache(phototour, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"info\.txt"):
        open_phototour(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="give a cache folder with 1 MB of free space"):
        open_phototour(phototour[0], cache=tmp_path / "file" / "inside")


def write_pairs(path: Path, points: np.ndarray, pairs: np.ndarray, *, last: bool = True) -> Path:
    lines = [f"{a} {points[a]} 0 {b} {points[b]} 0{' 0' if last else ''}\n" for a, b in pairs]
    path.write_text("".join(lines))
    return path


def test_pairs_are_read_and_checked(phototour):
    folder, _, points = phototour
    wanted = np.random.default_rng(1).integers(0, COUNT, (50, 2))
    for last in (True, False):
        pairs, same = read_test_pairs(
            write_pairs(folder / "m50_50_50_0.txt", points, wanted, last=last), points
        )
        np.testing.assert_array_equal(pairs, wanted)
        np.testing.assert_array_equal(same, points[wanted[:, 0]] == points[wanted[:, 1]])


@pytest.mark.parametrize(
    "damage", ["missing", "cut", "cut line", "another set", "too few columns", "too far"]
)
def test_damaged_pair_files(phototour, damage):
    folder, _, points = phototour
    path = write_pairs(
        folder / "m50_20_20_0.txt", points, np.stack([np.arange(20), np.arange(20) + 1], axis=1)
    )
    text = path.read_text()
    message = "pairs, expected 20 by the file name"
    if damage == "missing":
        path.unlink()
        message = "missing"
    elif damage == "cut":
        path.write_text("".join(text.splitlines(keepends=True)[:11]))
    elif damage == "cut line":
        path.write_text(text[:-6])
        message = "truncated or damaged"
    elif damage == "another set":
        points = points + 1
        message = "line 1 has other 3D points"
    elif damage == "too few columns":
        path.write_text("1 2 3 4\n" * 20)
        message = "expected 6 or 7"
    else:
        points = points[:10]
        message = "refers to patch 20, the set has 10"
    with pytest.raises(DataError, match=message) as caught:
        read_test_pairs(path, points)
    assert path.name in str(caught.value)


# ---- HPatches


def test_sequences_are_listed_selected_and_read(tmp_path):
    patches = {
        name: make_sequence(tmp_path / "h" / name, count)
        for name, count in (("v_wall", 5), ("i_lamp", 3))
    }
    (tmp_path / "h" / "notes").mkdir()
    assert [f.name for f in hpatches_sequences(tmp_path / "h")] == ["i_lamp", "v_wall"]
    sets = open_hpatches(tmp_path / "h", ["v_wall", "i_lamp"], cache=tmp_path / "cache")
    assert [s.name for s in sets] == ["v_wall", "i_lamp"]
    wall = sets[0]
    assert len(wall) == 80
    np.testing.assert_array_equal(wall.points[:7], [0, 1, 2, 3, 4, 0, 1])
    # patch 3 of column h2
    np.testing.assert_array_equal(
        wall.images[5 * COLUMNS.index("h2") + 3],
        shrink(patches["v_wall"][COLUMNS.index("h2"), 3:4])[0],
    )
    assert sorted(p.name for p in (tmp_path / "cache").glob("*.npy")) == [
        "i_lamp.npy",
        "v_wall.npy",
    ]
    assert (
        open_hpatches(tmp_path / "h", ["i_lamp"])[0].file
        == tmp_path / "h" / "i_lamp" / "patches32.npy"
    )
    with pytest.raises(DataError, match="no sequence v_gone"):
        hpatches_sequences(tmp_path / "h", ["v_wall", "v_gone"])
    with pytest.raises(DataError, match=r"no sequence with a ref\.png"):
        hpatches_sequences(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="hpatches-release"):
        hpatches_sequences(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["missing", "cut", "too wide", "half a patch", "shorter"])
def test_damaged_columns_name_the_file(tmp_path, damage):
    make_sequence(tmp_path / "h" / "v_wall", 4)
    path = tmp_path / "h" / "v_wall" / "h3.png"
    message = "65 x 65"
    if damage == "missing":
        path.unlink()
        message = "missing"
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:3000])
        message = "truncated or damaged"
    elif damage == "too wide":
        Image.new("L", (66, 260)).save(path)
    elif damage == "half a patch":
        Image.new("L", (65, 230)).save(path)
    else:
        Image.new("L", (65, 65 * 3)).save(path)
        message = "3 patches, .*ref.png has 4"
    with pytest.raises(DataError, match=message) as caught:
        open_hpatches(tmp_path / "h")
    assert "h3.png" in str(caught.value)
    assert not list(path.parent.glob("*.npy"))


def test_splits(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(
        json.dumps(
            {
                "a": {"test": ["v_wall"], "train": ["i_lamp"], "name": "a"},
                "full": {"test": ["v_wall", "i_lamp"]},
            }
        )
    )
    assert read_split(path, "a") == {"test": ["v_wall"], "train": ["i_lamp"]}
    assert read_split(path, "full") == {"test": ["v_wall", "i_lamp"]}
    with pytest.raises(DataError, match="no split 'z'; it has a, full"):
        read_split(path, "z")
    path.write_text("[1")
    with pytest.raises(DataError, match="expected"):
        read_split(path, "a")
    with pytest.raises(FileNotFoundError, match=r"splits\.json"):
        read_split(tmp_path / "none.json", "a")


@pytest.mark.parametrize("side", [64, 65])
def test_shrinking_equals_opencv(side):
    """The published descriptors used ``cv2.resize``; its fixed-point arithmetic differs by at most
    one gray level.
    """
    cv2 = pytest.importorskip("cv2")
    gray = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)
    theirs = np.stack([cv2.resize(patch, (32, 32)) for patch in gray])
    assert np.abs(shrink(gray).astype(int) - theirs).max() <= 1
    assert shrink(gray[:0]).shape == (0, 32, 32)


# ---- batches


def memory_set(tmp_path: Path, name: str, points: list[int], seed: int = 0) -> PatchSet:
    file = tmp_path / f"{name}.npy"
    np.save(
        file, np.random.default_rng(seed).integers(0, 256, (len(points), 32, 32), dtype=np.uint8)
    )
    return PatchSet(name, tmp_path, file, np.array(points))


def test_batch_has_unique_points_with_two_patches_each(phototour):
    found = open_phototour(phototour[0])
    batches = PatchBatches(found, batch=64, length=20, augment="none")
    usable = {p for p, c in zip(*np.unique(found.points, return_counts=True), strict=True) if c > 1}
    seen = set()
    for index in range(20):
        anchor, positive = batches.indices(index)
        assert (found.points[anchor] == found.points[positive]).all()
        assert (anchor != positive).all()
        assert len(set(found.points[anchor])) == 64
        seen |= set(found.points[anchor].tolist())
        item = batches[index]
        torch.testing.assert_close(item["anchor"], found.patches(anchor))
        torch.testing.assert_close(item["positive"], found.patches(positive))
    assert seen == usable
    assert item["anchor"].shape == (64, 1, 32, 32)
    assert item["anchor"].dtype == torch.float32
    assert item["anchor"].min() >= 0
    assert item["anchor"].max() <= 1


def test_pairs_of_a_point_are_drawn_uniformly(tmp_path):
    found = memory_set(tmp_path, "one", [5, 5, 5])
    drawn = PatchBatches(found, batch=1, length=600)
    pairs = [tuple(int(x[0]) for x in drawn.indices(i)) for i in range(600)]
    counts = [pairs.count(p) for p in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1))]
    assert sum(counts) == 600
    assert min(counts) > 60


def test_several_sets_are_mixed_with_separate_points(tmp_path):
    sets = [
        memory_set(tmp_path, "a", [0, 0, 1, 1, 2], 1),
        memory_set(tmp_path, "b", [1, 0, 1, 0, 0], 2),
    ]
    batches = PatchBatches(sets, batch=4, length=30, augment="none")
    everything = np.concatenate([s.images for s in sets])
    points = np.array([0, 0, 1, 1, 2, 11, 10, 11, 10, 10])
    for index in range(30):
        anchor, positive = batches.indices(index)
        assert (points[anchor] == points[positive]).all()
        assert sorted(points[anchor]) == [0, 1, 10, 11]
        np.testing.assert_allclose(
            batches[index]["positive"][:, 0].numpy() * 255, everything[positive], atol=1e-4
        )


def test_items_depend_only_on_seed_and_index(phototour):
    found = open_phototour(phototour[0])
    one, same, other = (PatchBatches(found, batch=32, length=6, seed=seed) for seed in (3, 3, 4))
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - that it is left alone is the test
    late = one[5]["anchor"]
    assert torch.equal(same[5]["anchor"], late)
    assert not torch.equal(other[5]["anchor"], late)
    assert not torch.equal(one[4]["anchor"], late)
    assert torch.equal(torch.random.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    loaded = list(DataLoader(one, batch_size=None, num_workers=2))
    assert torch.equal(loaded[5]["anchor"], late)


@pytest.mark.parametrize("augment", ["fliprot", "turns"])
def test_both_patches_are_rotated_equally_in_all_orientations(augment):
    rng = np.random.default_rng(0)
    patch = np.arange(9, dtype=np.uint8).reshape(3, 3)
    anchor = np.repeat(patch[None], 2000, axis=0)
    positive = anchor + 100
    rotate_both(anchor, positive, augment, rng)
    np.testing.assert_array_equal(positive, anchor + 100)
    ways = [np.rot90(patch, quarter) for quarter in range(4)]
    if augment == "fliprot":
        expected = {w.tobytes(): 0.25 for w in (patch, patch.T, patch[:, ::-1], patch.T[:, ::-1])}
    else:
        expected = {
            (w[::-1] if flip else w).tobytes(): (0.25 if k == 0 else 1 / 12)
            for k, w in enumerate(ways)
            for flip in (0, 1)
        }
    found, counts = np.unique(anchor.reshape(2000, -1), axis=0, return_counts=True)
    assert {row.tobytes() for row in found} == set(expected)
    for row, count in zip(found, counts, strict=True):
        assert count / 2000 == pytest.approx(expected[row.tobytes()], abs=0.04)


def test_rotated_batches_contain_the_same_patches(phototour):
    found = open_phototour(phototour[0])
    plain, rotated = (
        PatchBatches(found, batch=16, length=1, augment=a)[0] for a in ("none", "turns")
    )
    assert not torch.equal(plain["anchor"], rotated["anchor"])
    torch.testing.assert_close(
        plain["anchor"].flatten(1).sort()[0], rotated["anchor"].flatten(1).sort()[0]
    )


def test_invalid_arguments_raise(tmp_path):
    found = memory_set(tmp_path, "a", [0, 0, 1, 1, 2])
    assert len(PatchBatches(found, batch=2)) == 1
    assert len(PatchBatches(found, batch=1)) == 2
    with pytest.raises(DataError, match="a: 2 points with two patches, a batch needs 3"):
        PatchBatches(found, batch=3)
    with pytest.raises(ValueError, match="augment must be one of none, fliprot, turns"):
        PatchBatches(found, batch=1, augment="spin")
    with pytest.raises(ValueError, match="must be positive"):
        PatchBatches(found, batch=0)
    with pytest.raises(ValueError, match="no sets"):
        PatchBatches([])
    with pytest.raises(IndexError):
        PatchBatches(found, batch=2)[1]
    with pytest.raises(DataError, match=r"gone\.png: missing"):
        read_column(tmp_path / "gone.png")
