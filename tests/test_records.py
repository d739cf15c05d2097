"""Records of what made a result: what has changed is done again, what has no record is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from typer.testing import CliRunner

from tiepoints import ExtractOptions, MatchOptions, WeightsError
from tiepoints.cli import app
from tiepoints.datasets.homography import homography_sequences
from tiepoints.errors import DataError
from tiepoints.evaluation.results import read_rows
from tiepoints.evaluation.run import RunSettings, evaluate, label
from tiepoints.extract import Extractor, network_label
from tiepoints.formats.colmap import ColmapDatabase
from tiepoints.formats.hdf5 import FeatureFile, MatchFile
from tiepoints.formats.records import RecordLog
from tiepoints.formats.refinement import PendingRefinement, PositionFile
from tiepoints.formats.store import open_features
from tiepoints.jobs.extract import extract_images
from tiepoints.jobs.info import describe
from tiepoints.jobs.match import match_images
from tiepoints.models.patchnets import HardNet
from tiepoints.models.sobelnet import SobelNet
from tiepoints.structs import Features, Keypoints, Matches
from tiepoints.training.loop import RunOptions
from tiepoints.training.recipes import TrainData
from tiepoints.training.recipes import train as train_network
from tiepoints.weights import load, save

FORMATS = ("npy", "h5", "colmap")
STORES = {"npy": "", "h5": "features.h5", "colmap": "database.db"}
OPTIONS = ExtractOptions(
    detector="keynet-tiny", descriptor="rootsift", num_keypoints=60, single_scale=True
)


def draw(path: Path, seed: int, size: tuple[int, int] = (140, 110)) -> None:
    """Write an image of smooth noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 5, size[0] // 5), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def images(tmp_path):
    for i in range(3):
        draw(tmp_path / "images" / f"{i}.png", i)
    return tmp_path / "images"


def need(name: str) -> None:
    if name in ("h5", "m.h5"):
        pytest.importorskip("h5py")
    if name in ("colmap", "m.db"):
        pytest.importorskip("pycolmap")


def call(*arguments) -> tuple[int, str]:
    """Exit code and output of the command line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def extract(images, output, format, options=OPTIONS, **more):
    return extract_images([str(images)], output, options, format=format, progress=False, **more)


def match(images, output, **more):
    options = MatchOptions(auto_orientation=False)
    return match_images([str(images)], output, OPTIONS, options, progress=False, **more)


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Base name -> positions and descriptors of all stored features."""
    with open_features(path) as store:
        found = {
            name: store.read(name) for name in store.names() if store.done(name, described=True)
        }
    return {Path(k).name: torch.cat([f.xy, f.descriptors], dim=1) for k, f in found.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def foreign_features(path: Path, names=("0.png", "1.png", "2.png")) -> None:
    """Features of another program, without a record."""
    generator = torch.Generator().manual_seed(1)
    stores = {".h5": FeatureFile, ".db": ColmapDatabase}
    with stores[path.suffix](path, write=True) as store:
        for name in names:
            xy = 100 * torch.rand(20, 2, generator=generator)
            keypoints = Keypoints(xy, torch.ones(20), torch.zeros(20), torch.ones(20))
            descriptors = torch.rand(20, 64, generator=generator)
            store.write(name, Features(keypoints, descriptors, (140, 110)))


# ---- extraction


@pytest.mark.parametrize("format", FORMATS)
def test_a_second_run_extracts_nothing(images, tmp_path, format, monkeypatch):
    need(format)
    assert extract(images, tmp_path / "out", format).done == 3

    def forbidden(*_):
        raise AssertionError("extracted")

    monkeypatch.setattr(Extractor, "extract_tensor", forbidden)
    report = extract(images, tmp_path / "out", format)
    assert (report.done, report.skipped, report.changed, report.failed) == (0, 3, 0, [])


@pytest.mark.parametrize("format", FORMATS)
def test_a_changed_image_is_extracted_again(images, tmp_path, format, caplog):
    need(format)
    out = tmp_path / "out"
    extract(images, out, format)
    draw(images / "1.png", 9)
    with caplog.at_level(logging.INFO, "tiepoints"):
        report = extract(images, out, format)
    assert (report.done, report.skipped, report.changed) == (1, 2, 1)
    assert "1 image changed since the last extraction; extracted again" in caplog.text
    extract(images, tmp_path / "fresh", format)
    assert same(stored(out / STORES[format]), stored(tmp_path / "fresh" / STORES[format]))
    assert extract(images, out, format).skipped == 3


@pytest.mark.parametrize("format", FORMATS)
def test_features_of_an_image_that_became_unreadable_are_removed(images, tmp_path, format):
    need(format)
    extract(images, tmp_path / "out", format)
    (images / "1.png").write_bytes(b"no image")
    report = extract(images, tmp_path / "out", format)
    assert [Path(name).name for name, _ in report.failed] == ["1.png"]
    assert stored(tmp_path / "out" / STORES[format]).keys() == {"0.png", "2.png"}


def test_a_changed_mask_is_a_changed_image(images, tmp_path):
    masks = tmp_path / "masks"
    (masks / "images").mkdir(parents=True)
    white = np.full((110, 140), 255, np.uint8)
    for i in range(3):
        Image.fromarray(white).save(masks / "images" / f"{i}.png")
    options = {"masks": masks}
    assert extract(images, tmp_path / "out", "npy", **options).done == 3
    white[:, :70] = 0
    Image.fromarray(white).save(masks / "images" / "2.png")
    report = extract(images, tmp_path / "out", "npy", **options)
    assert (report.done, report.skipped, report.changed) == (1, 2, 1)
    assert stored(tmp_path / "out")["2.png"][:, 0].min() >= 69


def test_pairs_of_an_image_with_a_changed_mask_are_matched_again(images, tmp_path):
    pytest.importorskip("h5py")
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(3):
        Image.fromarray(np.full((110, 140), 255, np.uint8)).save(masks / f"{i}.png")
    assert match(images, tmp_path / "m.h5", masks=masks).done == 3
    assert match(images, tmp_path / "m.h5", masks=masks).skipped == 3
    Image.fromarray(np.eye(140, dtype=np.uint8)[:110]).save(masks / "2.png")
    report = match(images, tmp_path / "m.h5", masks=masks)
    assert (report.done, report.skipped, report.changed) == (2, 1, 1)


@pytest.mark.parametrize("format", FORMATS)
def test_features_stored_by_a_killed_run_without_their_record_are_extracted_again(
    images, tmp_path, format, monkeypatch
):
    need(format)
    extract(images, tmp_path / "out", format)
    draw(images / "0.png", 9)

    def killed(self, name, **entry):
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(RecordLog, "put", killed)
        assert len(extract(images, tmp_path / "out", format).failed) == 1
    draw(images / "0.png", 0)  # whatever the file is now, its features are of unknown origin
    assert extract(images, tmp_path / "out", format).done == 1
    extract(images, tmp_path / "fresh", format)
    store = STORES[format]
    assert same(stored(tmp_path / "out" / store), stored(tmp_path / "fresh" / store))


@pytest.mark.parametrize("format", FORMATS)
def test_weights_replaced_under_the_same_name_are_refused(images, tmp_path, format):
    need(format)
    weights, out = tmp_path / "w.safetensors", tmp_path / "out"
    save(load("sobelnet"), weights)
    arguments = ["extract", images, "--detector", weights, "--descriptor", "rootsift"]
    arguments += ["--output", out, "--format", format, "--num-keypoints", 30, "--single-scale"]
    assert call(*arguments)[0] == 0
    before = stored(out / STORES[format])
    shutil.copy2(weights, tmp_path / "copy")
    save(SobelNet(), weights)
    code, text = call(*arguments)
    assert code == 2
    assert f"the weights of the detector {weights} were replaced: SHA-256 " in text
    assert "--overwrite" in text
    assert same(stored(out / STORES[format]), before)
    code, text = call(*arguments, "--overwrite")
    assert code == 0, text
    assert "3 extracted" in text
    assert not same(stored(out / STORES[format]), before)
    weights.rename(tmp_path / "renamed.safetensors")
    arguments[3] = tmp_path / "renamed.safetensors"
    code, text = call(*arguments)
    assert code == 2
    assert f"detector: {weights} before, {arguments[3]} now" in text


def test_results_of_another_version_are_refused(images, tmp_path):
    extract(images, tmp_path / "out", "npy")
    path = tmp_path / "out" / "settings.json"
    content = json.loads(path.read_text())
    assert content["program"] == "tiepoints"
    major, minor, *_ = content["version"].split(".")
    path.write_text(json.dumps({**content, "version": f"{major}.{minor}.99"}))
    assert extract(images, tmp_path / "out", "npy").skipped == 3
    path.write_text(json.dumps({**content, "version": f"{major}.{int(minor) + 1}.0"}))
    with pytest.raises(DataError, match="holds results of version"):
        extract(images, tmp_path / "out", "npy")
    assert extract(images, tmp_path / "out", "npy", overwrite=True).done == 3


# ---- features of other programs


@pytest.mark.parametrize("format", ["h5", "colmap"])
def test_foreign_features_are_refused_or_replaced(images, tmp_path, format):
    need(format)
    path = tmp_path / "out" / STORES[format]
    path.parent.mkdir()
    foreign_features(path)
    before = stored(path)
    with pytest.raises(DataError, match=f"{STORES[format]} holds results without a record.*--feat"):
        extract(images, tmp_path / "out", format)
    assert same(stored(path), before)
    report = extract(images, tmp_path / "out", format, overwrite=True)
    assert (report.done, report.skipped) == (3, 0)
    assert extract(images, tmp_path / "out", format).skipped == 3


def test_foreign_npy_files_are_refused(images, tmp_path):
    extract(images, tmp_path / "out", "npy")
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(DataError, match="holds results without a record"):
        extract(images, tmp_path / "out", "npy")


def test_a_store_replaced_by_a_foreign_one_is_refused(images, tmp_path):
    pytest.importorskip("h5py")
    extract(images, tmp_path / "out", "h5")
    path = tmp_path / "out" / "features.h5"
    path.unlink()
    foreign_features(path)
    with pytest.raises(DataError, match=r"the features of 0\.png differ from their record"):
        extract(images, tmp_path / "out", "h5")
    assert not describe(path).ours
    match_images([], tmp_path / "m.h5", None, features=path, progress=False)
    record = describe(tmp_path / "m.h5").record
    assert record["features"] == {"foreign": True, "path": str(path.resolve())}


@pytest.mark.parametrize("output", ["m.h5", "m.db"])
def test_foreign_features_next_to_matches(images, tmp_path, output):
    need(output)
    out = tmp_path / output
    features = out if output == "m.db" else tmp_path / "m.features.h5"
    foreign_features(features)
    with pytest.raises(DataError, match=f"{features.name} holds results without a record"):
        match(images, out)
    options = MatchOptions(refine=False)
    for done in (3, 0):
        report = match_images([], out, None, options, features=features, progress=False)
        assert (report.done, report.skipped) == (done, 3 - done)
    assert describe(out).record.get("matches", describe(out).record)["features"]["foreign"]
    with pytest.raises(DataError):
        match(images, out)
    assert match(images, out, overwrite=True).done == 3
    assert describe(features).ours


def test_foreign_features_that_changed_are_matched_again(tmp_path):
    pytest.importorskip("h5py")
    foreign, out = tmp_path / "f.h5", tmp_path / "m.h5"
    foreign_features(foreign)
    assert match_images([], out, None, features=foreign, progress=False).done == 3
    with FeatureFile(foreign, write=True) as file:
        features = file.read("1.png")
        file.write("1.png", Features(features.keypoints, features.descriptors.flip(0), (140, 110)))
    report = match_images([], out, None, features=foreign, progress=False)
    assert (report.done, report.skipped, report.changed) == (2, 1, 1)


@pytest.mark.parametrize("output", ["m.h5", "m.db"])
def test_foreign_matches_are_refused(images, tmp_path, output):
    need(output)
    out = tmp_path / output
    extract(images, tmp_path, "colmap" if output == "m.db" else "h5")
    features = tmp_path / "features.h5"
    if output == "m.db":
        (tmp_path / "database.db").rename(out)
        for end in ("settings.json", "images.jsonl"):
            (tmp_path / f"database.db.{end}").rename(tmp_path / f"m.db.{end}")
        features = out
    with (
        ColmapDatabase(out, write=True) if output == "m.db" else MatchFile(out, write=True) as store
    ):
        store.write_matches("0.png", "1.png", Matches(torch.tensor([[0, 1]]), torch.ones(1)), 60)
    with pytest.raises(DataError, match=f"{output} holds results without a record"):
        match_images([], out, None, features=features, progress=False)
    options = {"features": features, "progress": False}
    assert match_images([], out, None, overwrite=True, **options).done == 3


def test_matches_replaced_by_those_of_another_program_are_refused(images, tmp_path):
    h5py = pytest.importorskip("h5py")
    match(images, tmp_path / "m.h5")
    (tmp_path / "m.h5").unlink()
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["0.png/1.png/matches0"] = np.full(60, -1)
    assert not describe(tmp_path / "m.h5").ours
    with pytest.raises(DataError, match=r"m\.h5 was replaced by a file of another program"):
        match(images, tmp_path / "m.h5")
    assert match(images, tmp_path / "m.h5", overwrite=True).done == 3


# ---- matches


def pairs_of(output: Path) -> dict[tuple[str, str], torch.Tensor]:
    names = ("0.png", "1.png", "2.png")
    with ColmapDatabase(output) if output.suffix == ".db" else MatchFile(output) as store:
        found = {(a, b): (a, b) for a in names for b in names if a < b and store.has_matches(a, b)}
        return {pair: store.read_matches(*pair).index for pair in found}


@pytest.mark.parametrize("output", ["m.h5", "m.db"])
def test_pairs_of_a_changed_image_are_matched_again(images, tmp_path, output):
    need(output)
    assert match(images, tmp_path / output).done == 3
    draw(images / "1.png", 9)
    report = match(images, tmp_path / output)
    assert (report.done, report.skipped, report.changed) == (2, 1, 1)
    (tmp_path / "fresh").mkdir()
    match(images, tmp_path / "fresh" / output)
    assert same(pairs_of(tmp_path / output), pairs_of(tmp_path / "fresh" / output))
    report = match(images, tmp_path / output)
    assert (report.done, report.skipped, report.changed) == (0, 3, 0)


@pytest.mark.parametrize("output", ["m.h5", "m.db"])
@pytest.mark.parametrize("at", ["extraction", "matching"])
def test_a_run_killed_after_an_image_changed_leaves_no_old_matches(
    images, tmp_path, output, at, monkeypatch
):
    need(output)
    match(images, tmp_path / output)
    draw(images / "1.png", 9)

    class Killed(Exception):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patched:
        if at == "extraction":
            patched.setattr(Extractor, "extract_tensor", killed)
        else:
            patched.setattr("tiepoints.jobs.pair_workers.PairWork.match", killed)
        with pytest.raises(Killed):
            match(images, tmp_path / output)
    if output == "m.db" or at == "matching":
        assert pairs_of(tmp_path / output).keys() == {("0.png", "2.png")}
    assert match(images, tmp_path / output).done == 2
    (tmp_path / "fresh").mkdir()
    match(images, tmp_path / "fresh" / output)
    assert same(pairs_of(tmp_path / output), pairs_of(tmp_path / "fresh" / output))


def test_listed_pairs_of_an_image_that_became_unreadable_are_not_done(images, tmp_path, caplog):
    pytest.importorskip("h5py")
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("0.png 1.png\n0.png 2.png\n")
    assert match(images, tmp_path / "m.h5", pairs=pairs).done == 2
    (images / "1.png").write_bytes(b"no image")
    with caplog.at_level(logging.INFO):
        report = match(images, tmp_path / "m.h5", pairs=pairs)
    # its pair was not matched again
    assert (report.done, report.skipped, report.changed) == (0, 1, 0)
    assert "removed the matches of 1 image without features" in caplog.text
    assert "matched again" not in caplog.text
    assert {Path(name).name for name, _ in report.failed} == {"1.png"}
    assert pairs_of(tmp_path / "m.h5").keys() == {("0.png", "2.png")}


@pytest.mark.parametrize("output", ["m.h5", "m.db"])
def test_a_replaced_list_of_pairs_is_matched(images, tmp_path, output):
    need(output)
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("0.png 1.png\n")
    assert match(images, tmp_path / output, pairs=pairs).done == 1
    pairs.write_text("1.png 2.png\n0.png 1.png\n")
    report = match(images, tmp_path / output, pairs=pairs)
    assert (report.done, report.skipped, report.changed) == (1, 1, 0)


def test_matches_in_two_formats_are_independent(images, tmp_path):
    pytest.importorskip("h5py")
    pytest.importorskip("pycolmap")
    for output in ("m.h5", "m.db", "m.h5", "m.db"):
        match(images, tmp_path / output)
    assert pairs_of(tmp_path / "m.h5").keys() == pairs_of(tmp_path / "m.db").keys()


@pytest.mark.parametrize("camera", ["auto", "per-image"])
def test_a_changed_image_of_a_database_keeps_its_id(images, tmp_path, camera):
    pycolmap = pytest.importorskip("pycolmap")
    match(images, tmp_path / "m.db", camera=camera)

    def read():
        with pycolmap.Database.open(tmp_path / "m.db") as database:
            cameras = {c.camera_id: (c.width, c.height) for c in database.read_all_cameras()}
            return {i.name: (i.image_id, i.camera_id) for i in database.read_all_images()}, cameras

    ids, _ = read()
    draw(images / "0.png", 8)
    draw(images / "1.png", 9, (160, 120))
    assert not match(images, tmp_path / "m.db", camera=camera).failed
    new_ids, new_cameras = read()
    assert {name: number for name, (number, _) in new_ids.items()} == {
        name: number for name, (number, _) in ids.items()
    }
    # all were of one size, and shared a camera; in a new database, each would have its own, too
    assert len({own for _, own in ids.values()}) == (1 if camera == "auto" else 3)
    assert len({own for _, own in new_ids.values()}) == 3
    number, own = new_ids["1.png"]
    assert [new_cameras[used] for _, used in new_ids.values()].count((160, 120)) == 1
    assert new_cameras[own] == (160, 120)
    if camera == "per-image":
        assert new_ids == ids
    with pycolmap.Database.open(tmp_path / "m.db") as database:
        image = database.read_image(number)
        frame = database.read_frame(image.frame_id)
        assert {data.sensor_id.id for data in frame.data_ids} == {own}
        assert {data.id for data in frame.data_ids} == {number}
        assert database.read_rig(frame.rig_id).ref_sensor_id.id == own


def test_a_changed_image_cannot_leave_the_only_camera_of_a_database(images, tmp_path):
    pytest.importorskip("pycolmap")
    match(images, tmp_path / "m.db", camera="single")
    draw(images / "1.png", 9, (160, 120))
    report = match(images, tmp_path / "m.db", camera="single")
    ((_, reason),) = [failed for failed in report.failed if failed[0].endswith("1.png")]
    assert "shared with other images" in reason
    assert "--overwrite" in reason


def test_refined_keypoints_of_a_database_agree_with_their_record(images, tmp_path):
    pytest.importorskip("pycolmap")
    with ColmapDatabase(tmp_path / "m.db", write=True) as database:
        keypoints = Keypoints(torch.rand(9, 2), torch.rand(9) + 1, torch.zeros(9), torch.ones(9))
        digest = database.write("a", Features(keypoints, torch.rand(9, 64), (20, 10)))
        database.move_keypoints("a", keypoints.xy + 0.25)
        assert database.digest("a") == digest
        database.remove(["a"])
        assert database.write("a", Features(keypoints, torch.rand(9, 64), (20, 10))) != digest


# ---- logs


def test_log_ignores_incomplete_and_damaged_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    with RecordLog(path) as log:
        log.put("a", size=1)
        log.put("caf\udce9\n.jpg", size=2)
        log.put("a", size=3)
        log.put("c", size=4)
        log.forget(["c", "unknown"])
    path.write_bytes(
        path.read_bytes() + b'[1]\n7\n{"size": 1}\n{"name": 3, "size": 1}\n{"name": "b'
    )
    with RecordLog(path) as log:
        assert log.entries == {"a": {"size": 3}, "caf\udce9\n.jpg": {"size": 2}}
        log.put("b", size=5)
    assert RecordLog(path).get("b") == {"size": 5}
    log.clear()
    assert not path.exists()


# ---- labels


def test_weights_files_are_filed_by_their_content(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(load("sobelnet"), "keynet.safetensors")
    save(load("hardnet"), "mine.safetensors")
    save(load("desnet"), "desnet.safetensors")
    assert network_label("keynet") == "keynet"
    assert network_label("keynet.safetensors") == "sobelnet.keynet"
    assert network_label("desnet.safetensors") == "desnet"
    assert network_label(None) == "none"
    assert label("keynet.safetensors@all+mine.safetensors") == "sobelnet.keynet@all+hardnet.mine"
    assert label("own=keynet.safetensors") == "own"
    options = ["--num-keypoints", 20, "--single-scale"]
    code, text = call(
        "extract",
        images,
        "--detector",
        "keynet.safetensors",
        "--descriptor",
        "mine.safetensors",
        *options,
    )
    assert code == 0, text
    assert os.listdir("extracted_features") == ["sobelnet.keynet-hardnet.mine"]
    code, text = call("extract", images, "--detector", "mine.safetensors", *options)
    assert code == 2
    assert "detects no keypoints" in text


def test_official_checkpoints_are_filed_by_their_content(reference_dir):
    checkpoints = reference_dir / "checkpoints"
    found = {path.name: path for path in checkpoints.rglob("*") if path.is_file()}
    path = next(
        path
        for name, path in sorted(found.items())
        if "keynet" in name.lower() and name.endswith((".pth", ".pt"))
    )
    assert network_label(str(path)) in ("keynet", f"keynet.{path.stem}")


# ---- evaluation


@pytest.fixture
def sequences(tmp_path):
    for name in ("v_a", "v_b"):
        for i in (1, 2):
            draw(tmp_path / "data" / name / f"{i}.png", 1)
        np.savetxt(tmp_path / "data" / name / "H_1_2", np.eye(3))
    return tmp_path / "data"


def measured(data, out, system, **more):
    """Rows by sequence, and the number of rows that the run measured."""
    settings = RunSettings((system,), num_keypoints=50, single_scale=True, **more)
    path = out / "rows" / "own.jsonl"
    before = path.read_text().splitlines() if path.is_file() else []
    evaluate(homography_sequences(data), settings, out)
    after = path.read_text().splitlines()
    rows = {row["sequence"]: row["metrics"] for row in read_rows(path)}
    return rows, len([line for line in after if line not in before])


def test_evaluation_is_repeated_for_what_has_changed(sequences, tmp_path, caplog):
    weights = tmp_path / "w.safetensors"
    save(load("sobelnet"), weights)
    system, out = f"own={weights}+rootsift", tmp_path / "out"
    first, count = measured(sequences, out, system)
    assert count == 2
    assert measured(sequences, out, system) == (first, 0)
    with caplog.at_level(logging.INFO, "tiepoints"):
        draw(sequences / "v_b" / "2.png", 2)
        changed, count = measured(sequences, out, system)
        assert count == 1
        assert "1 results in" in caplog.text
        np.savetxt(sequences / "v_a" / "H_1_2", np.array([[1, 0, 9], [0, 1, 0], [0, 0, 1.0]]))
        moved, count = measured(sequences, out, system)
        assert count == 1
        save(SobelNet(), weights)
        other, count = measured(sequences, out, system)
        assert count == 2
    assert changed["v_a"] == first["v_a"]
    assert changed["v_b"] != first["v_b"]
    assert moved["v_a"] != first["v_a"]
    assert other == measured(sequences, tmp_path / "fresh", system)[0]
    record = describe(out).record["records"]["own"]
    assert record["detector"] == describe(weights).record["sha256"]


def test_sweeps_are_repeated_for_a_changed_image(sequences, tmp_path):
    settings = RunSettings(("random",), num_keypoints=30, extras=("bias",))
    path = tmp_path / "out" / "bias" / "random.jsonl"

    def lines():
        evaluate(homography_sequences(sequences), settings, tmp_path / "out")
        return {json.loads(line)["inputs"] for line in path.read_text().splitlines()}

    first = lines()
    assert lines() == first
    draw(sequences / "v_a" / "1.png", 7)
    assert len(lines() & first) == 1  # of the other sequence


def test_stored_features_that_changed_are_measured_again(sequences, tmp_path):
    features, out = tmp_path / "features", tmp_path / "out"
    extract(sequences, features, "npy")
    system = f"own={features}"
    assert measured(sequences, out, system)[1] == 2
    assert measured(sequences, out, system)[1] == 0
    extract(
        sequences,
        features,
        "npy",
        ExtractOptions(detector="sobelnet", descriptor="rootsift"),
        overwrite=True,
    )
    assert measured(sequences, out, system)[1] == 2


# ---- training


@pytest.fixture
def quick_validation(monkeypatch):
    validation = "tiepoints.training.recipes.descriptors.patch_validation"
    monkeypatch.setattr(validation, lambda *_: lambda network: 0.5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        draw(folder / f"{i}.png", i, (400, 400))
    return folder


def train(photos, out, steps=1, **run):
    pytest.importorskip("lightning")
    options = RunOptions("cpu", progress=False, workers=0, **run)
    schedule = {"preset": "smoke", "steps": steps, "batch_size": 1, "validate_every": 1}
    return train_network("hardnet", TrainData(photos), out, run=options, **schedule)


def files_below(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_finished_weights_are_not_replaced_by_a_second_training(
    photos, tmp_path, caplog, quick_validation
):
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "w.safetensors"
    train(photos, out)
    before = files_below(folder)
    with pytest.raises(FileExistsError, match=r"w\.safetensors exists; use --resume"):
        train(photos, out)
    assert files_below(folder) == before
    with caplog.at_level(logging.INFO, "tiepoints"):
        assert train(photos, out, resume=True).steps == 1
    assert "the training is finished (1 steps); nothing to do" in caplog.text
    assert files_below(folder) == before
    assert train(photos, out, steps=2, overwrite=True).steps == 2
    assert files_below(folder)["w.safetensors"] != before["w.safetensors"]
    out.unlink()  # the checkpoint alone is the result of hours, too
    with pytest.raises(FileExistsError, match="checkpoint exists; use --resume"):
        train(photos, out)
    train(photos, out, steps=2, resume=True)
    assert out.is_file()  # written again from the checkpoint
    (folder / "w.safetensors.checkpoint").unlink()
    with pytest.raises(FileExistsError, match="to resume from"):
        train(photos, out, resume=True)
    code, text = call("train", "hardnet", "--images", photos, "--output", out, "--steps", 1)
    assert code == 2
    assert "use --resume" in text


def test_training_does_not_resume_with_replaced_photographs(photos, tmp_path, quick_validation):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    train(folder, tmp_path / "w.safetensors")
    draw(folder / "0.png", 9, (400, 400))
    with pytest.raises(WeightsError, match="files of the training data have other names"):
        train(folder, tmp_path / "w.safetensors", resume=True)


# ---- info


def test_info_describes_what_was_written(
    images, photos, sequences, tmp_path, monkeypatch, quick_validation
):
    pytest.importorskip("h5py")
    pytest.importorskip("pycolmap")
    monkeypatch.chdir(tmp_path)
    for format in FORMATS:
        extract(images, Path(format), format)
    for output in ("m.h5", "m.db"):
        match(images, Path(output))
    train(photos, Path("w.safetensors"))
    measured(sequences, Path("run"), "own=random")
    OPTIONS.build().extract(images / "0.png").save("f.npz")
    assert call("pairs", "--images", photos, "--output", "p.safetensors", "--count", 2)[0] == 0
    kinds = {
        "npy": "features",
        f"npy/{images.name}/0.png.kpt.npy": "features",
        "h5": "features",
        "h5/features.h5": "features",
        "colmap/database.db": "features",
        "m.h5": "matches",
        "m.features.h5": "features",
        "m.db": "features and matches",
        "w.safetensors": "weights",
        "w.safetensors.checkpoint": "training checkpoint",
        "p.safetensors": "training pairs",
        "run": "evaluation",
        "f.npz": "features",
        "m.settings.json": "record",
    }
    for name, kind in kinds.items():
        code, text = call("info", name, "--json")
        assert code == 0, text
        found = json.loads(text)
        assert found["ours"]
        assert found["kind"] == kind, name
    assert describe("h5").record["images"] == 3
    digests = describe("m.h5").record["features"]["digests"]
    assert digests == {"detector": describe_embedded("keynet-tiny")}
    assert describe("w.safetensors").record["training"]["photos"] == 4
    assert describe("w.safetensors.checkpoint").record["step"] == 1
    assert describe("p.safetensors").record["count"] == 2
    assert describe("f.npz").record["image_size"] == [140, 110]
    code, text = call("info", "npy")
    assert code == 0
    assert "  detector: keynet-tiny\n" in text


def describe_embedded(name: str) -> str:
    from tiepoints.weights import table

    return table()[name]["sha256"]


def test_info_reports_files_of_other_programs(images, tmp_path):
    pytest.importorskip("h5py")
    foreign_features(tmp_path / "f.h5")
    (tmp_path / "n.npy").write_bytes(b"\x93NUMPY")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    save(HardNet(), tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:3000])
    for name in ("f.h5", "n.npy", "other.pth", "cut.safetensors", "images", "images/0.png"):
        code, text = call("info", tmp_path / name)
        assert code == 1, name
        assert "not written by tiepoints, or changed since" in text
    extract(images, tmp_path / "out", "npy")
    np.save(tmp_path / "out" / "images" / "0.png.kpt.npy", np.zeros((5, 4), np.float32))
    assert call("info", tmp_path / "out" / "images" / "0.png.kpt.npy")[0] == 1
    code, text = call("info", tmp_path / "missing")
    assert code == 2
    assert "no file or folder at" in text


def photograph(
    folder: Path, number: int, width: int = 280, focal: int | None = None, north: int = 0
) -> None:
    """Write a part of a large image, with EXIF if it is given."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 80), dtype=np.uint8))
    whole = coarse.resize((400, 300), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if focal:
        exif[ExifTags.Base.Model] = "M"
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = focal
    if north:
        gps = {1: "N", 2: (north, 0, 0), 3: "E", 4: (8, 0, 0), 5: b"\0", 6: 100}
        exif.get_ifd(ExifTags.IFD.GPSInfo).update(gps)
    part = whole.crop((9 * number, 5 * number, 9 * number + width, 5 * number + 220))
    part.save(folder / f"{number}.jpg", exif=exif, quality=95)


def database_content(path: Path, photos: Path):
    """Cameras with their images, GPS positions, and verified matches of existing photographs."""
    import pycolmap

    names = sorted(photo.name for photo in photos.iterdir())
    with pycolmap.Database.open(path) as database:
        images = {image.name: image for image in database.read_all_images()}
        users: dict[int, list[str]] = {}
        for name in names:
            users.setdefault(images[name].camera_id, []).append(name)
        cameras = [
            (group, database.read_camera(number).params.tolist()) for number, group in users.items()
        ]
        numbers = {images[name].image_id: name for name in names}
        positions = {
            numbers[prior.corr_data_id.id]: prior.position.ravel().tolist()
            for prior in database.read_all_pose_priors()
            if prior.corr_data_id.id in numbers and np.isfinite(prior.position).all()
        }
    with ColmapDatabase(path) as database:
        inliers = {
            pair: database.read_inliers(*pair).index.tolist()
            for pair in database.pairs()
            if set(pair) <= set(names)
        }
    assert all(len(found) > 30 for found in inliers.values())
    return cameras, positions, inliers


def test_cameras_of_a_database_do_not_depend_on_what_it_had_before(tmp_path):
    """Cameras, GPS positions and verified matches are those of a new database."""
    pytest.importorskip("pycolmap")
    photos = tmp_path / "photos"

    def check():
        match(photos, tmp_path / "m.db")
        match(photos, tmp_path / "new.db")
        found = database_content(tmp_path / "m.db", photos)
        assert found == database_content(tmp_path / "new.db", photos)
        match(photos, tmp_path / "m.db")  # nothing changed
        assert database_content(tmp_path / "m.db", photos) == found
        for path in tmp_path.glob("new.db*"):
            path.unlink()
        return len(found[0]), found[1]

    for number in range(3):
        photograph(photos, number)
    assert check() == (1, {})
    photograph(photos, 3, 270)  # photographs of several sizes are of several cameras
    assert check() == (4, {})
    (photos / "3.jpg").unlink()
    assert check() == (1, {})
    for number in range(2):  # tags are added, and changed
        photograph(photos, number, focal=28, north=50)
    assert check() == (2, {"0.jpg": [50, 8, 100], "1.jpg": [50, 8, 100]})
    photograph(photos, 1, focal=35, north=51)
    assert check() == (3, {"0.jpg": [50, 8, 100], "1.jpg": [51, 8, 100]})
    photograph(photos, 0)
    photograph(photos, 1, focal=35)
    assert check() == (2, {})
    photograph(photos, 3, 270)
    assert check() == (4, {})


@pytest.mark.parametrize("width", [280, 270])
def test_some_images_of_a_database_do_not_change_its_cameras(tmp_path, width, monkeypatch):
    """Neither if they are given alone, nor by a list of pairs, nor if the record is missing."""
    pytest.importorskip("pycolmap")
    photos, database = tmp_path / "photos", tmp_path / "m.db"
    for number in range(3):
        photograph(photos, number)
    photograph(photos, 3, width)
    match(photos, database)
    found = database_content(database, photos)
    assert len(found[0]) == (1 if width == 280 else 4)
    listed = tmp_path / "pairs.txt"
    listed.write_text("0.jpg 2.jpg\n")
    options = MatchOptions(auto_orientation=False)
    for _ in range(2):
        match(photos, database, pairs=listed)
        assert database_content(database, photos) == found
        some = [str(photos / f"{number}.jpg") for number in (0, 2)]
        match_images(some, database, OPTIONS, options, root=photos, progress=False)
        assert database_content(database, photos) == found
        with monkeypatch.context() as patched:  # relative names
            patched.chdir(photos)
            match_images(["0.jpg", "2.jpg"], database, OPTIONS, options, progress=False)
        assert database_content(database, photos) == found
        (tmp_path / "m.db.cameras.json").unlink()
    photograph(photos, 4)
    listed.write_text("0.jpg 4.jpg\n1.jpg 4.jpg\n")
    match(photos, database, pairs=listed)
    cameras, _, inliers = database_content(database, photos)
    assert len(cameras) == (1 if width == 280 else 5)
    assert len(inliers) == 8
    match(photos, database)
    match(photos, tmp_path / "new.db")
    new = database_content(tmp_path / "new.db", photos)
    assert database_content(database, photos) == new


def test_intrinsics_that_were_set_in_a_database_are_kept(tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    photos = tmp_path / "photos"
    for number in range(3):
        photograph(photos, number)
    match(photos, tmp_path / "m.db")
    with pycolmap.Database.open(tmp_path / "m.db") as database:
        (camera,) = database.read_all_cameras()
        camera.params = [555, 140, 110, 0.01]
        database.update_camera(camera)
    photograph(photos, 3)
    match(photos, tmp_path / "m.db")
    ((names, params),) = database_content(tmp_path / "m.db", photos)[0]
    assert len(names) == 4
    assert params == [555, 140, 110, 0.01]


def test_a_stopped_change_of_cameras_is_completed(tmp_path, monkeypatch):
    pytest.importorskip("pycolmap")
    photos = tmp_path / "photos"
    for number in range(3):
        photograph(photos, number)
    match(photos, tmp_path / "m.db")
    for number in range(3):
        photograph(photos, number, focal=28)

    def killed(*_):
        raise KeyboardInterrupt

    for at in ("_change_cameras", "_update_positions", "_delete"):
        with monkeypatch.context() as patched:
            patched.setattr(ColmapDatabase, at, killed)
            with pytest.raises(KeyboardInterrupt):
                match(photos, tmp_path / "m.db")
    match(photos, tmp_path / "m.db")
    match(photos, tmp_path / "new.db")
    new = database_content(tmp_path / "new.db", photos)
    assert database_content(tmp_path / "m.db", photos) == new


def test_a_stopped_write_of_detected_positions_is_no_damage(tmp_path):
    file = PositionFile(tmp_path / "m.db")
    file.path.touch()
    assert file.digests == {}
    assert file.get("a") is None
    file.put([("a", "digest", np.ones((3, 2)))])
    assert PositionFile(tmp_path / "m.db").get("a").tolist() == [[1, 1]] * 3
    file.path.write_bytes(b"damaged" * 99)
    damaged = PositionFile(tmp_path / "m.db")
    for _ in range(2):
        with pytest.raises(DataError, match="damaged"):
            damaged.get("a")


def test_images_are_pending_until_they_are_refined(tmp_path):
    pytest.importorskip("pycolmap")
    photos, database = tmp_path / "photos", tmp_path / "out" / "database.db"
    for number in range(4):
        photograph(photos, number)
    extract_images([str(photos)], tmp_path / "out", OPTIONS, format="colmap", progress=False)

    def positions():
        with ColmapDatabase(database) as stored:
            return {name: stored.read_positions(name).tolist() for name in stored.names()}

    def run(*names, **more):
        images = [str(photos / name) for name in names]
        given = {"features": database, "progress": False, "root": photos, **more}
        match_images(images, database, None, MatchOptions(auto_orientation=False), **given)

    plain = positions()
    run()  # no images: not refined
    assert positions() == plain
    run("0.jpg", "1.jpg")
    some = positions()
    moved = {name for name in plain if some[name] != plain[name]}
    assert moved
    assert moved <= {"0.jpg", "1.jpg"}
    everything = [f"{number}.jpg" for number in range(4)]
    run(*everything)
    refined = positions()
    assert sum(refined[name] != plain[name] for name in plain) >= 3  # one may be the reference
    pending = PendingRefinement(database)
    assert pending.read() == set()
    run()  # nothing new: they stay refined
    run("0.jpg", "1.jpg")
    assert positions() == refined
    assert pending.read() == set()
    pending.path.touch()  # as earlier versions marked all images
    assert pending.includes({"any"})
    run(*everything)
    assert positions() == refined
    assert not pending.path.exists()
