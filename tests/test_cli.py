"""The command line as a user runs it: in a process of its own, on files."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tiepoints.errors import DataError
from tiepoints.training.pairs import PairFile, write_pairs
from tiepoints.training.synthetic import PRESETS, list_photos
from tiepoints.weights import load


def run(*words, cwd, ok=True, timeout=300):
    done = subprocess.run(
        [sys.executable, "-m", "tiepoints", *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def textured(seed: int, size=(220, 280)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = torch.zeros(1, 3, *size)
    for cell in (5, 12, 40):
        noise = torch.from_numpy(rng.random((1, 3, size[0] // cell + 2, size[1] // cell + 2))).float()
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


def test_extract_writes_mirrored_files_skips_done_ones_and_reports_bad_ones(photos, tmp_path):
    (photos / "broken.png").write_bytes(b"\x89PNG nonsense")
    (photos / "empty.jpg").write_bytes(b"")
    done = run("extract", "photos", "missing.png", "--results-dir", tmp_path, "--num-points", 200, cwd=photos.parent, ok=False)
    assert done.returncode == 1
    for word in ("broken.png", "empty.jpg", "missing.png", "4 extracted"):
        assert word in done.stdout + done.stderr
    (photos / "broken.png").unlink()
    (photos / "empty.jpg").unlink()
    points = np.load(tmp_path / "keynet-rootsift" / "photos" / "sub" / "p1.png.kpt.npy")
    descriptors = np.load(tmp_path / "keynet-rootsift" / "photos" / "sub" / "p1.png.dsc.npy")
    assert points.dtype == descriptors.dtype == np.float32
    assert points.shape[1] == 4
    assert descriptors.shape == (len(points), 128)
    assert (np.diff(points[:, 3]) <= 0).all()
    again = run("extract", "photos", "--results-dir", tmp_path, "--num-points", 200, cwd=photos.parent)
    assert "0 extracted" in again.stdout
    assert "4 done before" in again.stdout
    other = run("extract", "photos", "--results-dir", tmp_path, "--num-points", 100, cwd=photos.parent, ok=False)
    assert other.returncode == 2
    assert "--overwrite" in other.stderr
    fresh = run("extract", "photos/*.png", "--results-dir", tmp_path, "--num-kpts", 100, "--overwrite", cwd=photos.parent)
    assert "2 extracted" in fresh.stdout


def test_extract_from_a_list_keeps_inside_the_results(photos, tmp_path):
    (tmp_path / "list.txt").write_text("p0.png\n\nsub/p1.png\n../outside.png\n")
    done = run(
        "extract", "--list-images", "list.txt", "--root-images", photos, "--results-dir", "out", "--method-name", "mine",
        "--descriptor", "none", "--single-scale", "--num-points", 50, cwd=tmp_path, ok=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "leaves the results folder" in done.stderr
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.npy"))
    assert found == ["mine/p0.png.kpt.npy", "mine/sub/p1.png.kpt.npy"]


@pytest.mark.parametrize(
    "words",
    [
        ("extract",),
        ("extract", "a.png", "--method-name", "../x"),
        ("extract", "a.png", "--weights", "nothing.safetensors"),
        ("extract", "--list-images", "nothing.txt"),
        ("extract", "a.png", "--no-such-option"),
        ("match", "nothing.png", "nothing.png"),
        ("train", "keynet", "--images", "nothing", "--out", "x.safetensors"),
        ("train", "nonsense", "--images", ".", "--out", "x.safetensors"),
        ("pairs", "--images", ".", "--out", "x", "--preset", "nonsense"),
        ("weights", "show", "nothing"),
    ],
)
def test_wrong_words_are_told_without_a_trace(words, tmp_path):
    done = run(*words, cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert done.stderr.strip()


def test_match_prints_json_and_draws(photos, tmp_path):
    image = Image.open(photos / "p0.png")
    moved = image.transform(image.size, Image.Transform.AFFINE, (0.96, 0.05, 6, -0.05, 0.96, 9), Image.Resampling.BICUBIC)
    moved.save(tmp_path / "b.png")
    done = run("match", photos / "p0.png", "b.png", "--output", "m.png", "--json", "--model", "homography", cwd=tmp_path)
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
    assert "good" in run("weights", "verify", cwd=tmp_path).stdout


def test_import_of_the_official_weights_and_extraction_with_them(reference_dir, photos, tmp_path):
    run("weights", "import", reference_dir / "checkpoints" / "keynet_pytorch.pth", "--out", "o.safetensors", cwd=tmp_path)
    assert sum(p.numel() for p in load(tmp_path / "o.safetensors").parameters()) == 5873
    run(
        "extract", photos / "p0.png", "--weights", "o.safetensors", "--mode", "official", "--results-dir", "r",
        "--num-points", 100, cwd=tmp_path,
    )  # fmt: skip
    assert len(np.load(tmp_path / "r" / "keynet-rootsift" / "p0.png.kpt.npy")) > 50


def test_pair_files_are_the_same_from_any_number_of_workers(photos, tmp_path):
    settings = PRESETS["default"]
    for workers in (0, 2):
        write_pairs(tmp_path / f"{workers}.st", list_photos(photos), settings, 6, seed=3, workers=workers)
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
    run("pairs", "--images", photos, "--out", "p.st", "--count", 5, "--preset", "keynet-paper", "--preview", "g.png", cwd=tmp_path)
    assert Image.open(tmp_path / "g.png").size[0] > 1000
    run(
        "train", "keynet-tiny", "--images", photos, "--out", "t.safetensors", "--steps", 2, "--batch-size", 2, "--pairs", "p.st",
        "--workers", 0, cwd=tmp_path,
    )  # fmt: skip
    load(tmp_path / "t.safetensors")


def test_training_killed_and_resumed_ends_at_the_same_weights(photos, tmp_path):
    """SIGKILL in the middle, then --resume: equal to the unbroken run bit for bit."""
    words = [
        "train", "keynet-tiny", "--images", photos, "--steps", "160", "--batch-size", "1", "--workers", "0", "--device", "cpu",
        "--validate-every", "160", "--save-every", "0.5",
    ]  # fmt: skip
    run(*words, "--out", "whole.safetensors", cwd=tmp_path)
    command = [sys.executable, "-m", "tiepoints", *map(str, words), "--out", "broken.safetensors"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env)
    checkpoint = tmp_path / "broken.safetensors.checkpoint"
    deadline = time.monotonic() + 200
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, "the training ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < step < 160
    run(*words, "--out", "broken.safetensors", "--resume", cwd=tmp_path)
    whole, again = load(tmp_path / "whole.safetensors"), load(tmp_path / "broken.safetensors")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
