"""Shards of extraction and matching: the merged results are those of one process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import pytest

from helpers import call, write_photos
from tiepoints.errors import DataError
from tiepoints.extract import ExtractOptions
from tiepoints.formats.colmap import ColmapDatabase
from tiepoints.formats.hdf5 import FeatureFile
from tiepoints.formats.npy import FeatureFolder
from tiepoints.jobs.extract import extract_images
from tiepoints.jobs.match import MatchOptions, match_images
from tiepoints.jobs.shards import Shard, blocks, shards_folder

OPTIONS = ExtractOptions(
    detector="sobelnet", descriptor="desnet", num_keypoints=60, single_scale=True
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 5)


def extract(photos: Path, output: Path, format: str = "h5", **more):
    return extract_images([str(photos)], output, OPTIONS, format=format, progress=False, **more)


def match(features: Path, output: Path, **more):
    options = MatchOptions(ratio=1.0)
    return match_images([], output, None, options, features=features, progress=False, **more)


def content(path: Path) -> dict[str, tuple[str, bytes]]:
    """Name -> type and bytes of each array of an HDF5 file."""
    found = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item.dtype.str, item[()].tobytes()

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def local(photos, tmp_path_factory) -> Path:
    """Features and matches of one process."""
    folder = tmp_path_factory.mktemp("local")
    extract(photos, folder)
    match(folder / "features.h5", folder / "matches.h5")
    return folder


def test_shards_cover_all_items_once():
    for count in (1, 3, 7, 12):
        parts = [Shard(i, count).of(range(10)) for i in range(1, count + 1)]
        assert [item for part in parts for item in part] == list(range(10))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    found = list(blocks(range(10), 4))
    assert [part for _, part in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert [str(shard) for shard, _ in found] == [str(Shard(i, 3)) for i in (1, 2, 3)]
    assert Shard.parse("3/40") == Shard(3, 40)
    for text in ("0/3", "4/3", "1", "1/0", "a/b", "-1/3"):
        with pytest.raises(ValueError, match="shard"):
            Shard.parse(text)


def test_merged_features_are_those_of_one_process(photos, local, tmp_path):
    for i in (2, 1):
        report = extract(photos, tmp_path, shard=Shard(i, 2))
        assert report.output.endswith(f"features.h5.shards/0000{i}-of-00002.h5")
    assert extract(photos, tmp_path, shard=Shard(1, 2)).skipped == 2  # resumes
    assert not (tmp_path / "features.h5").exists()
    report = extract(photos, tmp_path)
    assert (report.done, report.skipped, report.failed) == (5, 0, [])
    assert content(tmp_path / "features.h5") == content(local / "features.h5")
    expected = {"features.h5", "features.images.jsonl", "features.settings.json"}
    assert files(tmp_path) == expected
    for name in ("features.images.jsonl", "features.settings.json"):
        assert (tmp_path / name).read_text() == (local / name).read_text()
    assert extract(photos, tmp_path).skipped == 5


def test_merged_database_is_that_of_one_process(photos, tmp_path):
    pytest.importorskip("pycolmap")
    one, many = tmp_path / "one", tmp_path / "many"
    extract(photos, one, "colmap")
    for i in (3, 1, 2):
        extract(photos, many, "colmap", shard=Shard(i, 3))
    assert extract(photos, many, "colmap").done == 5
    matched = []
    for folder in (one, many):
        path = folder / "database.db"
        if folder == many:
            for i in (1, 2):
                assert match(path, path, shard=Shard(i, 2)).done == 5
        report = match(path, path)
        matched.append((report.done, report.matches, report.verified))
        assert files(folder) == {
            *("database.db", "database.db.images.jsonl", "database.db.settings.json"),
            *("database.db.matches.jsonl", "database.db.matches.settings.json"),
            *("database.db.cameras.json", "database.db.refinement-pending"),
        }
    assert matched[0] == matched[1]
    with ColmapDatabase(one / "database.db") as a, ColmapDatabase(many / "database.db") as b:
        assert a._ids == b._ids  # in the order of one process
        for name in a.names():
            assert a.digest(name) == b.digest(name)
            assert (a.read_positions(name) == b.read_positions(name)).all()
        assert a.pairs() == b.pairs()
        for pair in a.pairs():
            assert (a.read_matches(*pair).index == b.read_matches(*pair).index).all()


def test_files_of_each_image_need_no_merge(photos, tmp_path):
    for i in (1, 2):
        extract(photos, tmp_path, "npy", shard=Shard(i, 2))
    assert extract(photos, tmp_path, "npy").skipped == 5
    with FeatureFolder(tmp_path) as store:
        assert len(store.names()) == 5


def test_what_shards_lack_is_done_by_the_merge(photos, local, tmp_path):
    own = tmp_path / "photos"
    shutil.copytree(photos, own)
    extract(own, tmp_path, shard=Shard(1, 2))  # and 2/2 is missing
    write_photos(tmp_path, 1, (200, 180))
    os.replace(tmp_path / "0.png", own / "1.png")  # changed since
    extract(own, tmp_path)
    with FeatureFile(tmp_path / "features.h5") as store:
        assert len(store.names()) == 5
        assert store.read("1.png").image_size == (200, 180)
    found, expected = content(tmp_path / "features.h5"), content(local / "features.h5")
    assert {k: v for k, v in found.items() if "1.png" not in k} == {
        k: v for k, v in expected.items() if "1.png" not in k
    }


def test_overwriting_takes_the_shards(photos, local, tmp_path):
    extract(photos, tmp_path, half=True)
    for i in (1, 2):
        extract(photos, tmp_path, shard=Shard(i, 2))
    with pytest.raises(DataError, match="--overwrite"):
        extract(photos, tmp_path)
    assert shards_folder(tmp_path / "features.h5").is_dir()
    assert extract(photos, tmp_path, overwrite=True).done == 5
    assert content(tmp_path / "features.h5") == content(local / "features.h5")


def test_shards_of_other_settings_are_refused(photos, tmp_path):
    extract(photos, tmp_path, half=True, shard=Shard(1, 2))
    with pytest.raises(DataError, match=r"00001-of-00002\.h5 is a shard of other settings \(half"):
        extract(photos, tmp_path)
    extract(photos, tmp_path, overwrite=True)
    assert not shards_folder(tmp_path / "features.h5").exists()


def test_shards_of_other_images_are_kept(photos, tmp_path):
    extract(photos, tmp_path, shard=Shard(1, 1))
    folder = shards_folder(tmp_path / "features.h5")
    report = extract_images([str(photos / "1.png")], tmp_path, OPTIONS, format="h5", progress=False)
    assert report.done == 1
    assert (folder / "00001-of-00001.h5").is_file()
    assert extract(photos, tmp_path).done == 4
    assert not folder.exists()


def test_a_shard_that_is_being_written_is_not_merged(photos, tmp_path):
    extract(photos, tmp_path, shard=Shard(1, 2))
    path = Shard(1, 2).path(tmp_path / "features.h5")
    with FeatureFile(path, write=True), pytest.raises(DataError, match="another run is writing"):
        extract(photos, tmp_path)
    assert extract(photos, tmp_path).done + 2 > 5 - 1


def test_merged_matches_are_those_of_one_process(local, tmp_path):
    features, output = local / "features.h5", tmp_path / "matches.h5"
    for i in (2, 3, 1):
        match(features, output, shard=Shard(i, 3))
    assert not output.exists()
    report = match(features, output)
    assert (report.done, report.skipped, report.failed) == (10, 0, [])
    assert content(output) == content(local / "matches.h5")
    for name in ("matches.matches.jsonl", "matches.settings.json", "matches.pairs.txt"):
        assert (tmp_path / name).read_text() == (local / name).read_text()
    assert files(tmp_path) == {path for path in files(local) if path.startswith("matches")}


def test_matches_of_changed_features_are_not_merged(photos, local, tmp_path):
    own = tmp_path / "photos"
    shutil.copytree(photos, own)
    extract(own, tmp_path)
    features, output = tmp_path / "features.h5", tmp_path / "matches.h5"
    match(features, output, shard=Shard(1, 1))
    shutil.copy(own / "1.png", own / "0.png")
    extract(own, tmp_path)
    assert match(features, output).done == 10
    with FeatureFile(features) as store:
        expected = len(store.read("0.png"))
    with h5py.File(output) as file:
        matched = file["0.png/1.png/matches0"][()]
    assert (matched == range(expected)).all()  # now the same image


def test_invalid_shards_of_commands(photos, tmp_path):
    extraction = ["extract", photos, "--output", tmp_path / "x", "--format", "h5"]
    code, _, err = call(*extraction, "--shard", "3/2")
    assert (code, "1/N to N/N" in err) == (2, True)
    code, _, err = call(*extraction, "--shard", "1/2", "--ray", "auto")
    assert (code, "one of the two" in err) == (2, True)
    code, _, err = call("match", photos, "--output", tmp_path / "m.h5", "--shard", "1/2")
    assert (code, "--features" in err) == (2, True)
    assert not (tmp_path / "x").exists()
