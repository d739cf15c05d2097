"""The command line in a separate process, on files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tiepoints.cli import app
from tiepoints.datasets.pairs import PairFile, write_pairs
from tiepoints.datasets.synthetic import PRESETS, list_photos
from tiepoints.errors import DataError
from tiepoints.formats.colmap import ColmapDatabase
from tiepoints.formats.hdf5 import FeatureFile, MatchFile
from tiepoints.formats.store import open_features
from tiepoints.structs import Features, Keypoints
from tiepoints.weights import load


def run(*arguments, cwd, ok=True, timeout=300):
    done = subprocess.run(
        [sys.executable, "-m", "tiepoints", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def textured(seed: int, size=(220, 280)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = torch.zeros(1, 3, *size)
    for cell in (5, 12, 40):
        noise = torch.from_numpy(
            rng.random((1, 3, size[0] // cell + 2, size[1] // cell + 2))
        ).float()
        image += torch.nn.functional.interpolate(noise, size=size, mode="bicubic") * cell**0.5
    image = (image - image.min()) / (image.max() - image.min()) * 255
    return image[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    (folder / "sub").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(textured(i)).save(folder / ("sub" if i % 2 else "") / f"p{i}.png")
    return folder


def test_extract_mirrors_folders_skips_done_images_and_reports_failures(photos, tmp_path):
    (photos / "broken.png").write_bytes(b"\x89PNG nonsense")
    (photos / "empty.jpg").write_bytes(b"")
    done = run(
        "extract",
        "photos",
        "missing.png",
        "--results-dir",
        tmp_path,
        "--num-keypoints",
        200,
        cwd=photos.parent,
        ok=False,
    )
    assert done.returncode == 1
    for word in ("broken.png", "empty.jpg", "missing.png", "4 extracted"):
        assert word in done.stdout + done.stderr
    (photos / "broken.png").unlink()
    (photos / "empty.jpg").unlink()
    points = np.load(tmp_path / "keynet-light-hardnet-light" / "photos" / "sub" / "p1.png.kpt.npy")
    descriptors = np.load(
        tmp_path / "keynet-light-hardnet-light" / "photos" / "sub" / "p1.png.dsc.npy"
    )
    assert points.dtype == descriptors.dtype == np.float32
    assert points.shape[1] == 4
    assert descriptors.shape == (len(points), 128)
    assert (np.diff(points[:, 3]) <= 0).all()
    again = run(
        "extract", "photos", "--results-dir", tmp_path, "--num-keypoints", 200, cwd=photos.parent
    )
    assert "0 extracted" in again.stdout
    assert "4 done before" in again.stdout
    other = run(
        "extract",
        "photos",
        "--results-dir",
        tmp_path,
        "--num-keypoints",
        100,
        cwd=photos.parent,
        ok=False,
    )
    assert other.returncode == 2
    assert "--overwrite" in other.stderr
    fresh = run(
        "extract",
        "photos/*.png",
        "--results-dir",
        tmp_path,
        "--num-kpts",
        100,
        "--overwrite",
        cwd=photos.parent,
    )
    assert "2 extracted" in fresh.stdout


def test_extract_from_a_list_stays_inside_the_results_folder(photos, tmp_path):
    (tmp_path / "list.txt").write_text("p0.png\n\nsub/p1.png\n../outside.png\n")
    done = run(
        "extract",
        "--list-images",
        "list.txt",
        "--root-images",
        photos,
        "--results-dir",
        "out",
        "--method-name",
        "mine",
        "--descriptor",
        "none",
        "--single-scale",
        "--num-keypoints",
        50,
        cwd=tmp_path,
        ok=False,
    )
    assert done.returncode == 1
    assert "outside the results folder" in done.stderr
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.npy"))
    assert found == ["mine/p0.png.kpt.npy", "mine/sub/p1.png.kpt.npy"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("extract",),
        ("extract", "a.png", "--method-name", "../x"),
        ("extract", "a.png", "--detector", "nothing.safetensors"),
        ("extract", "--list-images", "nothing.txt"),
        ("extract", "a.png", "--no-such-option"),
        ("match", "nothing.png", "nothing.png"),
        ("train", "keynet", "--images", "nothing", "--output", "x.safetensors"),
        ("train", "nonsense", "--images", ".", "--output", "x.safetensors"),
        ("pairs", "--images", ".", "--output", "x", "--preset", "nonsense"),
        ("weights", "show", "nothing"),
    ],
)
def test_invalid_arguments_are_reported_without_a_traceback(arguments, tmp_path):
    done = run(*arguments, cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert done.stderr.strip()


def test_match_prints_json_and_draws(photos, tmp_path):
    image = Image.open(photos / "p0.png")
    moved = image.transform(
        image.size,
        Image.Transform.AFFINE,
        (0.96, 0.05, 6, -0.05, 0.96, 9),
        Image.Resampling.BICUBIC,
    )
    moved.save(tmp_path / "b.png")
    done = run(
        "match",
        photos / "p0.png",
        "b.png",
        "--output",
        "m.png",
        "--json",
        "--geometry",
        "homography",
        cwd=tmp_path,
    )
    content = json.loads(done.stdout)
    assert content["ok"]
    assert content["inliers"] > 0.6 * content["matches"] > 20
    true = np.linalg.inv(np.array([[0.96, 0.05, 6], [-0.05, 0.96, 9], [0, 0, 1]]))
    corners = np.array([[50, 50, 1], [200, 60, 1], [120, 180, 1.0]]).T
    ours, right = np.array(content["matrix"]) @ corners, true @ corners
    assert np.abs(ours[:2] / ours[2] - right[:2] / right[2]).max() < 1.5
    assert Image.open(tmp_path / "m.png").size[0] > 500


def test_weights_commands(tmp_path):
    assert "keynet-tiny" in run("weights", "list", cwd=tmp_path).stdout
    assert json.loads(run("weights", "show", "keynet", cwd=tmp_path).stdout)["parameters"] == 5873
    assert "ok" in run("weights", "verify", cwd=tmp_path).stdout


def test_import_official_weights_and_extract(reference_dir, photos, tmp_path):
    run(
        "weights",
        "import",
        reference_dir / "checkpoints" / "keynet_pytorch.pth",
        "--output",
        "o.safetensors",
        cwd=tmp_path,
    )
    assert sum(p.numel() for p in load(tmp_path / "o.safetensors").parameters()) == 5873
    run(
        "extract",
        photos / "p0.png",
        "--detector",
        "o.safetensors",
        "--official",
        "--results-dir",
        "r",
        "--method-name",
        "o",
        "--num-keypoints",
        100,
        cwd=tmp_path,
    )
    assert len(np.load(tmp_path / "r" / "o" / "p0.png.kpt.npy")) > 50


def test_pair_files_do_not_depend_on_the_number_of_workers(photos, tmp_path):
    settings = PRESETS["default"]
    for workers in (0, 2):
        write_pairs(
            tmp_path / f"{workers}.st", list_photos(photos), settings, 6, seed=3, workers=workers
        )
    assert (tmp_path / "0.st").read_bytes() == (tmp_path / "2.st").read_bytes()
    pairs = PairFile(tmp_path / "0.st")
    assert len(pairs) == 6
    assert pairs[0]["image_a"].shape == (1, 192, 192)
    assert pairs.pair(5).mask_b.shape == (192, 192)
    shuffled = PairFile(tmp_path / "0.st", length=12, seed=1)
    firsts = [shuffled.pair(i).H_ab[0, 0] for i in range(12)]
    assert sorted(firsts[:6]) == sorted(firsts[6:])
    (tmp_path / "bad.st").write_bytes((tmp_path / "0.st").read_bytes()[:5000])
    with pytest.raises(DataError, match="complete"):
        PairFile(tmp_path / "bad.st")


def test_pairs_command_writes_file_and_preview(photos, tmp_path):
    run(
        "pairs",
        "--images",
        photos,
        "--output",
        "p.st",
        "--count",
        5,
        "--preset",
        "keynet-paper",
        "--preview",
        "g.png",
        cwd=tmp_path,
    )
    assert Image.open(tmp_path / "g.png").size[0] > 1000
    before = (tmp_path / "p.st").read_bytes()
    again = ("pairs", "--images", photos, "--output", "p.st", "--count", 2)
    assert "--overwrite" in run(*again, cwd=tmp_path, ok=False).stderr
    assert (tmp_path / "p.st").read_bytes() == before
    run(*again[:3], "--output", "q.st", "--count", 2, cwd=tmp_path)
    run(*again[:3], "--output", "q.st", "--count", 1, "--overwrite", cwd=tmp_path)
    assert len(PairFile(tmp_path / "q.st")) == 1
    run(
        "train",
        "keynet-tiny",
        "--images",
        photos,
        "--output",
        "t.safetensors",
        "--steps",
        2,
        "--batch-size",
        2,
        "--training-pairs",
        "p.st",
        "--workers",
        0,
        cwd=tmp_path,
    )
    load(tmp_path / "t.safetensors")


def test_killed_training_resumes_to_the_same_weights(photos, tmp_path):
    """SIGKILL during training, then --resume: equal to an uninterrupted run bit for bit."""
    arguments = [
        "train",
        "keynet-tiny",
        "--images",
        photos,
        "--steps",
        "160",
        "--batch-size",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--validate-every",
        "160",
        "--save-every",
        "0.5",
    ]
    run(*arguments, "--output", "whole.safetensors", cwd=tmp_path)
    command = [
        sys.executable,
        "-m",
        "tiepoints",
        *map(str, arguments),
        "--output",
        "broken.safetensors",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env
    )
    checkpoint = tmp_path / "broken.safetensors.checkpoint"
    deadline = time.monotonic() + 200
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, "the training ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < step < 160
    run(*arguments, "--output", "broken.safetensors", "--resume", cwd=tmp_path)
    whole, again = load(tmp_path / "whole.safetensors"), load(tmp_path / "broken.safetensors")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Three real overlapping views of a scene, cut from one photograph, and one without content."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path_factory.mktemp("views") / "v"
    (folder / "sub").mkdir(parents=True)
    photo = Image.fromarray(data.stereo_motorcycle()[0]).convert("L")
    for i, name in enumerate(("v2.png", "v10.png", "sub/v3.png")):
        photo.crop((60 * i, 20 * i, 60 * i + 360, 20 * i + 300)).save(folder / name)
    Image.fromarray(np.full((90, 120), 128, np.uint8)).save(folder / "flat.png")
    return folder


NAMES = ["flat.png", "sub/v3.png", "v10.png", "v2.png"]


def call(*arguments) -> tuple[int, str]:
    """Run a command in this process; returns its exit code and its output."""
    done = CliRunner().invoke(app, [str(word) for word in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize("form", ["h5", "colmap"])
def test_extract_into_one_file(form, views, tmp_path):
    pytest.importorskip({"h5": "h5py", "colmap": "pycolmap"}[form])
    arguments = [
        "extract",
        views,
        "--format",
        form,
        "--results-dir",
        tmp_path,
        "--method-name",
        "m",
        "--descriptor",
        "rootsift",
    ]
    (views / "broken.png").write_bytes(b"\x89PNG nonsense")
    code, text = call(*arguments, "--num-keypoints", 80)
    (views / "broken.png").unlink()
    assert code == 1
    assert "4 extracted" in text
    assert "broken.png" in text
    with open_features(tmp_path / "m") as store:
        assert store.names() == NAMES
        counts = [len(store.read(name)) for name in NAMES]
        assert counts[0] == 0
        assert min(counts[1:]) > 60
        assert store.read("v2.png").descriptors.shape == (counts[3], 128)
        assert store.read("v2.png").image_size == (360, 300)
    assert "0 extracted" in call(*arguments, "--num-keypoints", 80)[1]
    code, text = call(*arguments, "--num-keypoints", 40)
    assert code == 2
    assert "num_keypoints: 80 before, 40 now" in text
    assert "--overwrite" in text
    code, text = call(*arguments, "--num-keypoints", 40, "--overwrite")
    assert "4 extracted" in text, text
    code, text = call(
        "extract",
        views / "v2.png",
        views / "sub",
        "--root-images",
        views,
        *arguments[2:],
        "--num-keypoints",
        40,
    )
    assert "2 done before" in text, text
    code, text = call(
        "extract", views, "--root-images", tmp_path, *arguments[2:], "--num-keypoints", 40
    )
    assert code == 1
    assert "not inside --root-images" in text


def test_killed_extraction_into_hdf5_resumes(photos, tmp_path):
    pytest.importorskip("h5py")
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(textured(i)).save(folder / f"{i}.png")
    arguments = [
        "extract",
        "many",
        "--format",
        "h5",
        "--num-keypoints",
        "300",
        "--method-name",
        "m",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "tiepoints", *arguments]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    journal = tmp_path / "extracted_features" / "m" / "features.h5.journal"
    log = journal.with_name("features.images.jsonl")  # written after the features
    deadline = time.monotonic() + 200
    while (
        not (log.is_file() and b"\n" in log.read_bytes())
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open_features(journal.parent) as store:
        before = {name: store.read(name) for name in store.names()}
    recorded = log.read_text().count("\n")
    assert 0 < recorded <= len(before) <= 8
    done = run(*arguments, cwd=tmp_path)
    assert f"{8 - recorded} extracted" in done.stdout
    assert f"{recorded} done before" in done.stdout
    with open_features(journal.parent) as store:
        assert store.names() == [f"{i}.png" for i in range(8)]
        for name, features in before.items():
            assert torch.equal(store.read(name).descriptors, features.descriptors)
    assert not journal.exists()


def test_match_folder_into_a_file_for_hloc(views, tmp_path):
    pytest.importorskip("h5py")
    output = tmp_path / "m.h5"
    arguments = [
        "match",
        views,
        "--output",
        output,
        "--num-keypoints",
        150,
        "--descriptor",
        "rootsift",
    ]
    code, text = call(*arguments)
    assert code == 0, text
    assert "6 pairs matched" in text
    assert (tmp_path / "m.pairs.txt").read_text().splitlines()[:2] == [
        "flat.png sub/v3.png",
        "flat.png v2.png",
    ]
    with MatchFile(output) as file, FeatureFile(tmp_path / "m.features.h5") as features:
        assert features.names() == NAMES
        assert len(file.read_matches("flat.png", "v2.png")) == 0
        found = file.read_matches("v2.png", "v10.png")
        a, b = features.read("v2.png"), features.read("v10.png")
        move = a.xy[found.index[:, 0]] - b.xy[found.index[:, 1]] - torch.tensor([60.0, 20.0])
        assert (move.norm(dim=1) < 2).float().mean() > 0.8
        assert len(found) > 40
    code, text = call(*arguments)
    assert "0 pairs matched" in text
    assert "6 done before" in text
    code, text = call(*arguments, "--ratio", 0.8)
    assert code == 2
    assert f"{output} holds results of other settings (ratio: 1.0 before, 0.8 now)" in text
    code, text = call(
        *arguments, "--ratio", 0.8, "--geometry", "homography", "--overwrite", "--json"
    )
    content = json.loads(text)
    assert (content["done"], content["verified"]) == (6, 3)
    # stored features: neighbors in natural order, from the HDF5 file and from npy files
    call(
        "extract",
        views,
        "--results-dir",
        tmp_path,
        "--method-name",
        "npy",
        "--num-keypoints",
        150,
        "--descriptor",
        "rootsift",
    )
    for features in (tmp_path / "m.features.h5", tmp_path / "npy"):
        path = tmp_path / f"{features.name}.m.h5"
        choice = ("--pairs", "sequential", "--neighbors", 3)
        code, text = call("match", views, "--features", features, *choice, "--output", path)
        assert code == 0, text
        assert "6 pairs matched" in text
        listed = path.with_name(f"{path.stem}.pairs.txt").read_text().split()
        order = [name.rpartition("/")[2] for name in listed[::2]]
        assert order == ["flat.png"] * 3 + ["v3.png"] * 2 + ["v2.png"]


def test_match_a_list_of_pairs_with_missing_images(views, tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "pairs.txt").write_text(
        "# two names a line\nv2.png sub/v3.png\nsub/v3.png v2.png\nv2.png gone.png\nv2.png v2.png\n"
    )
    code, text = call(
        "match",
        views,
        "--pairs",
        tmp_path / "pairs.txt",
        "--output",
        tmp_path / "m.h5",
        "--num-keypoints",
        100,
    )
    assert code == 1
    assert "1 pairs matched" in text
    assert "gone.png: " in text
    assert "holds no features of it" in text
    assert "it has 2 with names such as sub/v3.png" in text
    assert "not matched with itself" in text
    with FeatureFile(tmp_path / "m.features.h5") as file:
        assert file.names() == ["sub/v3.png", "v2.png"]  # only images of the list
    # hloc reads the matches of each listed pair
    assert (tmp_path / "m.pairs.txt").read_text() == "v2.png sub/v3.png\n"


def test_missing_photographs_are_not_mapped(views, tmp_path):
    pytest.importorskip("pycolmap")
    folder, output = tmp_path / "v", tmp_path / "d.db"
    shutil.copytree(views, folder)
    (folder / "flat.png").unlink()
    arguments = ["match", folder, "--output", output, "--num-keypoints", 150]
    arguments += ["--descriptor", "rootsift"]
    code, text = call(*arguments)
    assert (code, "3 pairs with a geometry" in text) == (0, True), text
    content = (folder / "v10.png").read_bytes()
    (folder / "v10.png").unlink()
    code, text = call(*arguments)
    assert code == 0, text
    assert "1 image, such as v10.png, is not among the files any more; the geometries" in text
    with ColmapDatabase(output) as database:
        assert len(database.read_inliers("v2.png", "v10.png")) == 0
        assert len(database.read_inliers("v2.png", "sub/v3.png")) > 30
        assert len(database.read_matches("v2.png", "v10.png")) > 30
    code, text = call(*arguments)
    assert (code, "any more" in text) == (0, False), text
    (folder / "v10.png").write_bytes(content)
    code, text = call(*arguments)
    assert (code, "3 pairs with a geometry" in text) == (0, True), text
    # images of another folder are only not given now
    code, text = call("match", folder / "sub", folder / "v2.png", *arguments[2:], "--root", folder)
    assert "any more" not in text


def test_match_into_a_colmap_database(views, tmp_path):
    pytest.importorskip("pycolmap")
    output = tmp_path / "d.db"
    images = [views / "v2.png", views / "v10.png", views / "sub", views / "flat.png"]
    arguments = [
        "match",
        *images,
        "--root-images",
        views,
        "--output",
        output,
        "--num-keypoints",
        150,
        "--descriptor",
        "rootsift",
    ]
    code, text = call(*arguments, "--camera", "PINHOLE:400,400,180,150")
    assert code == 1  # the image without content has another size than the shared camera
    assert "flat.png is 120 x 90 but the one camera of all images" in text
    assert "3 pairs matched" in text
    assert "3 pairs with a geometry" in text
    with ColmapDatabase(output) as database:
        assert database.names() == NAMES[1:]
        assert len(database.read_inliers("v2.png", "v10.png")) > 30
    code, text = call("match", "--features", output, "--output", output)
    assert code == 2
    assert "orientation: auto before, not set now" in text
    code, text = call("match", "--features", output, "--output", output, "--overwrite")
    assert code == 0, text
    assert "3 pairs matched" in text
    code, text = call("match", "--features", output, "--output", tmp_path / "other.db")
    assert code == 2
    assert "its own features" in text


def test_interrupted_refinement_of_a_database_is_completed_by_the_next_run(
    views, tmp_path, monkeypatch
):
    pytest.importorskip("pycolmap")
    arguments = [
        "match",
        views / "v2.png",
        views / "v10.png",
        "--num-keypoints",
        150,
        "--single-scale",
        "--detector",
        "keynet-tiny",
    ]
    arguments += ["--root-images", views]

    def positions(name):
        with ColmapDatabase(tmp_path / name) as database:
            return torch.cat([database.read(image).xy for image in ("v2.png", "v10.png")])

    assert call(*arguments, "--output", tmp_path / "whole.db")[0] == 0
    assert call(*arguments, "--output", tmp_path / "plain.db", "--no-refine")[0] == 0

    def stop(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tiepoints.jobs.match.refine_database", stop)
        CliRunner().invoke(
            app, [str(word) for word in (*arguments, "--output", tmp_path / "stopped.db")]
        )
    assert torch.equal(positions("stopped.db"), positions("plain.db"))
    code, text = call(*arguments, "--output", tmp_path / "stopped.db")
    assert code == 0, text
    assert torch.equal(positions("stopped.db"), positions("whole.db"))
    assert not torch.equal(positions("whole.db"), positions("plain.db"))
    call(*arguments, "--output", tmp_path / "stopped.db")  # no new pairs: nothing is refined again
    assert torch.equal(positions("stopped.db"), positions("whole.db"))
    assert not list(tmp_path.glob("*pending*"))


def test_refinement_of_a_database_starts_from_the_detected_positions(views, tmp_path):
    pytest.importorskip("pycolmap")
    names = [name for name in NAMES if name != "flat.png"]
    options = ["--num-keypoints", 150, "--single-scale", "--detector", "keynet-tiny"]
    options += ["--root-images", views]

    def positions(output, count, *more):
        images = [views / name for name in names[:count]]
        code, text = call("match", *images, "--output", tmp_path / output, *options, *more)
        assert code == 0, text
        with ColmapDatabase(tmp_path / output) as database:
            return torch.cat([database.read(name).xy for name in names[:count]])

    plain = positions("plain.db", 3, "--no-refine")
    refined = positions("refined.db", 3)
    assert not torch.equal(refined, plain)
    assert torch.equal(positions("refined.db", 3, "--overwrite"), refined)
    with ColmapDatabase(tmp_path / "refined.db") as database:
        xy = torch.cat([database.read_detected(name).xy for name in names[:3]])
        assert torch.equal(xy, plain)
    positions("added.db", 2)
    assert torch.equal(positions("added.db", 3), refined)
    assert torch.equal(positions("refined.db", 3, "--no-refine", "--overwrite"), plain)
    (tmp_path / "added.db.detected.sqlite").write_bytes(b"no database" * 99)
    images = [views / name for name in names[:2]]
    code, text = call("match", *images, "--output", tmp_path / "added.db", *options, "--overwrite")
    assert code != 0
    assert "added.db.detected.sqlite is damaged" in text


def test_refinement_needs_the_images_of_all_pairs(views, tmp_path):
    pytest.importorskip("pycolmap")
    folder = tmp_path / "photos" / "inner"
    folder.mkdir(parents=True)
    for name in NAMES[2:]:
        shutil.copy2(views / name, folder / name)
    output = tmp_path / "out" / "database.db"
    extraction = ["--num-keypoints", 150, "--single-scale", "--detector", "keynet-tiny"]
    code, text = call(
        "extract",
        tmp_path / "photos",
        "--output",
        tmp_path / "out",
        "--format",
        "colmap",
        *extraction,
    )
    assert code == 0, text

    def positions():
        with ColmapDatabase(output) as database:
            assert database.names() == [f"inner/{name}" for name in NAMES[2:]]
            return torch.cat([database.read(name).xy for name in database.names()])

    plain = positions()
    code, text = call("match", "--features", output, "--output", output)
    assert code == 0
    assert "keypoints are not refined" in text
    assert "--no-refine" in text
    assert torch.equal(positions(), plain)
    # other paths than those that were extracted; the record has no orientation
    code, text = call("match", folder, "--features", output, "--output", output)
    assert code == 0, text
    assert "not refined" not in text
    assert not torch.equal(positions(), plain)
    assert not list(output.parent.glob("*pending*"))


def test_match_reports_invalid_input_with_a_remedy(views, tmp_path, monkeypatch):
    pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "three.txt").write_text("a b c\n")
    (tmp_path / "two.txt").write_text("a b\n")
    features = Keypoints(torch.rand(9, 2), torch.ones(9), torch.zeros(9), torch.ones(9))
    with FeatureFile("f.h5", write=True) as file:
        file.write("a.png", Features(features, torch.rand(9, 128), (9, 9)))
        file.write("b.png", Features(features, torch.rand(9, 64), (9, 9)))
        file.write("c.png", Features(features, None, (9, 9)))
    with FeatureFile("one.h5", write=True) as file:
        file.write("a.png", Features(features, torch.rand(9, 128), (9, 9)))
    Path("f.settings.json").write_text(json.dumps({"descriptor": "rootsift"}))
    for arguments, message in (
        (["match"], "no images given"),
        (["match", views], "--output FILE.h5"),
        (["match", views, "--output", "m.png"], "got m.png"),
        (["match", views / "v2.png"], "one image given"),
        (["evaluate-patches", "gone"], "expected PhotoTour's"),
        (["match", "empty", "--output", "m.h5"], "no images in this folder"),
        (["match", "gone", "--output", "m.h5"], "no such file"),
        (
            ["match", views / "v2.png", "--output", "m.h5"],
            "1 image with features, and at least two are needed",
        ),
        (
            ["match", views, "--pairs", "gone.txt", "--output", "m.h5"],
            "no list of pairs at gone.txt",
        ),
        (["match", views, "--pairs", "none.txt", "--output", "m.h5"], "none.txt lists no pairs"),
        (
            ["match", views, "--pairs", "three.txt", "--output", "m.h5"],
            "three.txt, line 1: expected two names",
        ),
        (
            ["match", views, "--pairs", "two.txt", "--neighbors", 2, "--output", "m.h5"],
            "has no number of neighbors",
        ),
        (["match", "--features", "gone.h5", "--output", "m.h5"], "no features at gone.h5"),
        (
            ["match", "--features", "empty", "--output", "m.h5"],
            "empty contains no features; create them with: tiepoints extract",
        ),
        (["match", "--features", "one.h5", "--output", "m.h5"], "two are needed"),
        (
            ["match", "--features", "f.h5", "--output", "m.h5", "--masks", "empty"],
            "extract the features with --masks",
        ),
        (
            ["match", "--features", "f.h5", "--output", "m.h5", "--descriptor", "none"],
            "--descriptor must not be none",
        ),
        (
            ["match", "--features", "f.h5", "--output", "m.h5", "--descriptor", "sosnet"],
            "f.h5 has rootsift descriptors, not sosnet",
        ),
        (
            ["match", views, "--output", "m.h5", "--descriptor", "surf"],
            "descriptor must be one of hardnet",
        ),
        (
            ["match", "--features", "f.h5", "--output", "m.h5", "--ratio", 0],
            "ratio must lie in (0, 1]",
        ),
        (
            ["match", "--features", "f.h5", "--output", "m.h5", "--threshold", 0],
            "threshold must be positive",
        ),
        (
            ["match", views, "--output", "m.db", "--camera", "nonsense"],
            "camera must be auto, per-image, single or",
        ),
        (
            ["extract", views, "--format", "colmap", "--camera", "PINHOLE:1"],
            "PINHOLE has the parameters",
        ),
        (["extract", views, "--format", "nonsense"], "npy"),
    ):
        code, text = call(*arguments)
        assert code == 2, (arguments, text)
        assert message in " ".join(text.split()), (arguments, text)
    code, text = call("match", "--features", "f.h5", "--output", "m.h5")
    assert code == 1
    assert (
        "a.png b.png: descriptor dimensions differ, 128 and 64; extract both images with one "
        "descriptor" in text
    )
    assert "c.png: f.h5 has no descriptors of it; extract with a descriptor (2 pairs)" in text


def test_train_and_evaluate_patches_reject_incompatible_arguments(photos, tmp_path):
    out = tmp_path / "x.safetensors"
    for arguments, message in (
        (
            ("softnet",),
            "must be one of keynet, keynet-light, keynet-tiny, sobelnet, rekd, rekd-light, "
            "hardnet, hardnet-light, hardnet-context, hynet, sosnet, desnet",
        ),
        (("hardnet", "--training-pairs", "p"), "training pairs are for detectors"),
        (("desnet", "--training-pairs", "p"), "training pairs are for detectors"),
        (
            ("desnet", "--detector", "hardnet"),
            "candidates are found by keynet, keynet-light, keynet-tiny or sobelnet",
        ),
        (("desnet", "--dim", "96"), "dim must be one of"),
        (("keynet", "--dim", "64"), "dim is an option of desnet"),
        (("sobelnet", "--preset", "paper"), "preset must be one of default, msip, smoke"),
        (("keynet", "--init", "sobelnet"), "weights sobelnet have other layers than keynet"),
        (("hardnet", "--preset", "paper"), "published patches"),
        (("hardnet", "--init", "keynet"), "no layer in common"),
    ):
        done = run(
            "train",
            arguments[0],
            "--images",
            photos,
            "--output",
            out,
            *arguments[1:],
            cwd=tmp_path,
            ok=False,
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert not out.exists()
    done = run("evaluate-patches", tmp_path, "--descriptors", "rootsift", cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert "no sequence with a ref.png" in done.stderr
    done = run("evaluate-patches", tmp_path, "--descriptors", "surf", cwd=tmp_path, ok=False)
    assert "rootsift, raw or a weights file" in done.stderr
    arguments = ("evaluate-patches", tmp_path, "--descriptors", "hardnet-context")
    done = run(*arguments, cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert "hardnet-context sees the surroundings of patches" in done.stderr


def test_keypoint_angles_in_every_format(photos, tmp_path):
    image = sorted(photos.rglob("*.png"))[-1]
    base = [
        "extract",
        str(image),
        "--results-dir",
        str(tmp_path),
        "--num-keypoints",
        "60",
        "--single-scale",
    ]
    for arguments, name, has_angles in (
        (["--detector", "rekd-light"], "rekd-light-hardnet-light", True),
        (["--orientation", "dominant"], "keynet-light-hardnet-light", True),
        (
            ["--detector", "rekd-light", "--orientation", "none", "--method-name", "level"],
            "level",
            False,
        ),
    ):
        code, out = call(*base, *arguments)
        assert code == 0, out
        table = np.load(next((tmp_path / name).rglob("*.kpt.npy")))
        assert table.shape[1] == (5 if has_angles else 4)
        if has_angles:
            assert 0 <= table[:, 4].min() < table[:, 4].max() <= 360
            read = open_features(tmp_path / name)
            again = read.read(read.names()[0])
            angle = torch.rad2deg(-again.angle).remainder(360)
            assert torch.allclose(angle, torch.from_numpy(table[:, 4]), atol=1e-3)
    code, out = call(*base, "--orientation", "rekd-light")
    assert code == 2  # other settings than the existing results
    assert "--overwrite" in out


def test_matches_are_filtered_by_rotation(photos, tmp_path):
    image = Image.open(sorted(photos.rglob("p0.png"))[0])
    image.save(tmp_path / "a.png")
    image.rotate(70, expand=True, resample=Image.Resampling.BICUBIC).save(tmp_path / "b.png")
    arguments = [
        "match",
        *(str(tmp_path / name) for name in ("a.png", "b.png")),
        "--detector",
        "rekd-light",
        "--single-scale",
    ]
    arguments += ["--geometry", "homography"]
    found = {}
    for name, more in {"all": [], "filtered": ["--rotation-tolerance", "30"]}.items():
        code, out = call(*arguments, *more, "--json")
        assert code == 0, out
        found[name] = json.loads(out)
    assert found["filtered"]["inliers"] >= 0.9 * found["all"]["inliers"] >= 20
    assert found["filtered"]["matches"] <= found["all"]["matches"]
    H = np.array(found["filtered"]["matrix"])
    rotation = np.degrees(np.arctan2(H[1, 0], H[0, 0]))
    assert abs(rotation + 70) < 1  # Pillow rotates counterclockwise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["keynet", "--group-size", "8"], "group_size is an option of rekd"),
        (["keynet", "--init", "rekd"], "other layers"),
        (["rekd", "--patches", "."], "patches are for descriptors"),
        (["rekd", "--init", "hardnet", "--steps", "1"], "HardNet"),
        (["rekd", "--dims", "0", "2", "2", "--steps", "1"], "fields"),
    ],
)
def test_rekd_training_rejects_incompatible_arguments(photos, tmp_path, arguments, message):
    code, out = call(
        "train",
        *arguments,
        "--images",
        str(photos),
        "--output",
        str(tmp_path / "w.safetensors"),
        "--workers",
        "0",
    )
    assert code == 2
    assert message in out


def test_sobelnet_and_desnet_in_all_commands(photos, tmp_path):
    """Files, hloc's file, two images matched, an evaluation with its report."""
    images = sorted(photos.rglob("*.png"))[-2:]
    names = [
        "--detector",
        "sobelnet",
        "--descriptor",
        "desnet",
        "--num-keypoints",
        "80",
        "--device",
        "cpu",
    ]
    code, out = call("extract", *map(str, images), "--results-dir", str(tmp_path), *names)
    assert code == 0, out
    tables = sorted((tmp_path / "sobelnet-desnet").rglob("*.kpt.npy"))
    assert len(tables) == 2
    for table in tables:
        points, descriptors = np.load(table), np.load(str(table).replace(".kpt.", ".dsc."))
        assert points.shape == (len(descriptors), 4)
        assert len(points) > 20
        assert descriptors.shape[1] == 128
        np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-3)
    code, out = call(
        "match",
        str(images[0]),
        str(images[0]),
        "--geometry",
        "homography",
        "--json",
        "--single-scale",
        *names,
    )
    assert code == 0, out
    found = json.loads(out)
    assert found["ok"]
    assert (
        found["inliers"] == found["matches"] == found["points"][0]
    )  # an image matched with itself
    np.testing.assert_allclose(found["xy_a"], found["xy_b"])
    code, out = call(
        "match",
        str(images[0]),
        str(images[0]),
        "--geometry",
        "homography",
        "--json",
        "--per-scale",
        *names,
    )
    assert code == 0, out
    repeated = json.loads(out)["xy_a"]
    assert len({(round(x / 3), round(y / 3)) for x, y in repeated}) < len(
        repeated
    )  # locations at several scales
    code, out = call(
        "extract", *map(str, images), "--results-dir", str(tmp_path), "--format", "h5", *names
    )
    assert code == 0, out
    assert [path.name for path in (tmp_path / "sobelnet-desnet").glob("*.h5")] == ["features.h5"]
    scene = tmp_path / "data" / "moved"
    scene.mkdir(parents=True)
    whole = np.asarray(Image.open(images[0]).convert("L"))
    Image.fromarray(whole[:-6, :-9]).save(scene / "1.png")
    Image.fromarray(whole[6:, 9:]).save(scene / "2.png")
    np.savetxt(scene / "H_1_2", [[1, 0, -9], [0, 1, -6], [0, 0, 1]])
    arguments = [
        "--systems",
        "sobelnet+desnet,sift+desnet",
        "--num-keypoints",
        "100",
        "--single-scale",
        "--output",
        str(tmp_path / "run"),
    ]
    code, out = call("evaluate", str(tmp_path / "data"), *arguments)
    assert code == 0, out
    code, out = call("report", str(tmp_path / "run"))
    assert code == 0, out
    text = (tmp_path / "run" / "report.md").read_text()
    assert "sobelnet+desnet" in text
    assert "sift+desnet" in text
    with open(tmp_path / "run" / "rows" / "sobelnet+desnet.jsonl") as file:
        row = json.loads(file.readlines()[-1])
    assert "rekd.mma@3" in json.dumps(row)
