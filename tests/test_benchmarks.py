"""Every benchmark script runs on tiny inputs, so that a change of the package does not break one
unnoticed. Scripts that need a missing library are skipped.
"""

from __future__ import annotations

import importlib
import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import test_tracks  # without pycolmap, this file is skipped as well
from helpers import call, texture, write_photos
from tiepoints.datasets.reconstructions import find_models
from tiepoints.export import Exported
from tiepoints.training.recipes import affine, descriptors

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

#: Fixture: folder of a COLMAP model with images, and homographies.
world = test_tracks.world
#: Scripts without a test here: shared functions, and scripts with their own tests.
ELSEWHERE = {"common", "speed_page", "peers", "foreign_features"}


@pytest.fixture(scope="module")
def oxford(tmp_path_factory):
    """Sequences of four images with the names that the scripts expect, shifted by whole pixels."""
    root = tmp_path_factory.mktemp("oxford")
    for seed, name in enumerate(("graf", "boat", "bikes", "leuven")):
        folder = root / name
        folder.mkdir()
        wide = texture(seed, (192, 132))
        for k in range(1, 5):
            wide.crop((4 * k, 0, 4 * k + 168, 132)).convert("L").save(folder / f"{k}.png")
            np.savetxt(folder / f"H_1_{k}", [[1, 0, 4.0 - 4 * k], [0, 1, 0], [0, 0, 1]])
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), size=(264, 216))


@pytest.fixture
def script(monkeypatch):
    """A function that runs a script with arguments, and with other values of its constants."""
    threads = torch.get_num_threads()

    def run(name: str, *arguments, **constants) -> None:
        module = importlib.import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        module.main([str(argument) for argument in arguments])

    yield run
    torch.set_num_threads(threads)


def written(path: Path):
    return json.loads(path.read_text())


def test_every_script_is_run():
    names = {path.stem for path in BENCHMARKS.glob("*.py")} - ELSEWHERE
    source = Path(__file__).read_text()
    assert not [
        name for name in names if f'script("{name}"' not in source.replace("\n        ", "")
    ]


def test_quantized(script, oxford, tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "oxford").symlink_to(oxford)
    arguments = ["--data", tmp_path, "--systems", "sobelnet+desnet", "--sequences", "boat"]
    arguments += ["--photos", 0, "--out", tmp_path / "q.json"]
    script("quantized", *arguments, NUM_KEYPOINTS=100)
    found = written(tmp_path / "q.json")["systems"]["sobelnet+desnet"]
    assert 0 < found["float32"]["mma@3"] <= 1
    for precision in ("int8", "bfloat16"):
        assert not found[precision]["passed"]  # without photographs of one place
        assert all(0.5 < ratio < 1.5 for ratio in found[precision]["ratios"].values())
        assert found[precision]["seconds"] != found["float32"]["seconds"] > 0


def test_oxford(script, oxford, tmp_path):
    systems = ("--work", tmp_path / "w", "--systems", "keynet-tiny,random")
    script("oxford", oxford, *systems, "--out", tmp_path / "o.json", "--table", tmp_path / "o.md")
    found = written(tmp_path / "o.json")["modes"]
    assert found["ti"]["keynet-tiny"]["mean"]["keynet.rep_L"] > 0.8  # shifted by whole pixels
    assert found["ti"]["random"]["mean"]["mutual.rep@3"] < 0.3
    assert "keynet-tiny" in (tmp_path / "o.md").read_text()
    # the time of the metrics, from these results
    script("metrics_speed", tmp_path / "w" / "ti", "--system", "keynet-tiny", "--repeat", 1)


def test_scale(script, photos, tmp_path):
    arguments = ["--work", tmp_path, "--stages", "extract,pairs", "--out", tmp_path / "s.json"]
    script("scale", photos, *arguments, "--counts", 6, NEIGHBORS=3)
    (row,) = written(tmp_path / "s.json")["rows"]
    assert row["images"] == 6
    assert 9 <= row["matched pairs"] <= 15
    assert row["extract"]["memory MB"] > 100
    assert row["extract"]["storage MB"] > 0.05
    from scale import exponents

    rows = [
        {"images": n, "extract": {"seconds": 2 + n**1.5, "storage MB": n}} for n in (1, 100, 400)
    ]
    assert exponents(rows) == {
        "extract": {"seconds": pytest.approx(1.5, abs=0.01), "storage MB": 1}
    }


def test_descriptors(script, oxford, tmp_path):
    arguments = ("--work", tmp_path / "w", "--systems", "keynet-tiny+rootsift")
    script("descriptors", oxford, *arguments, "--out", tmp_path / "d.json", NUM_POINTS=100)
    (row,) = written(tmp_path / "d.json")["homography"].values()
    assert row["MMA@3"] > 0.8


def test_rekd(script, oxford, tmp_path):
    arguments = ("--work", tmp_path / "w", "--systems", "keynet-tiny+rootsift")
    script("rekd", oxford, *arguments, "--out", tmp_path / "r.json")
    (row,) = written(tmp_path / "r.json")["homography"].values()
    assert row


def test_bias(script, oxford, tmp_path):
    script("bias", oxford, "--systems", "keynet-tiny", "--out", tmp_path / "b.json")
    rows = written(tmp_path / "b.json")
    assert all(abs(row["x"]) < 0.5 for row in rows if row["pairs"] > 20)


def test_repeatability(script, oxford, tmp_path):
    pytest.importorskip("cv2")
    arguments = ("--systems", "keynet-tiny,orb,harris", "--out", tmp_path / "r.json")
    script("repeatability", oxford, *arguments)
    rows = written(tmp_path / "r.json")["rows"]
    assert [row["system"] for row in rows] == ["keynet-tiny", "orb", "harris"]
    assert rows[0]["in_k"] > 0.8


def test_choosing(script, photos, tmp_path):
    arguments = ("--systems", "keynet-tiny", "--photos", 1, "--num-keypoints", 50)
    script("choosing", photos, *arguments, "--out", tmp_path / "c.json")
    (found,) = written(tmp_path / "c.json")["systems"].values()
    assert set(found) == {"zoom", "view", "blur", "light", "mean"}


def test_held_out(script, photos, capsys):
    counts = {"DETECTOR_PAIRS": 1, "DESCRIPTOR_PAIRS": 1}
    arguments = ("--detectors", "keynet-tiny", "--descriptors", "rootsift")
    script("held_out", photos, *arguments, **counts)
    assert capsys.readouterr().out.count("rotations up to") == 2


def test_rotation(script, photos, tmp_path):
    arguments = ("--systems", "keynet-tiny", "--photos", 1, "--out", tmp_path / "r.json")
    script("rotation", photos, *arguments, ROTATIONS=(90,))
    found = written(tmp_path / "r.json")["systems"]["keynet-tiny"]
    assert 0 < found["mean"] <= 1


def test_structure(script, photos, tmp_path):
    arguments = ("--systems", "keynet-tiny", "--count", 2, "--out", tmp_path / "s.json")
    script("structure", photos, *arguments, POINTS=50)
    assert written(tmp_path / "s.json")["systems"]["keynet-tiny"]["median percentile"] > 50


def test_score_maps(script, photos, tmp_path):
    arguments = ("--image", photos / "0.png", "--crop", 10, 10, 100)
    script("score_maps", "keynet-tiny", "sobelnet", *arguments, "--out", tmp_path / "m.png")
    assert Image.open(tmp_path / "m.png").size == (3 * 104, 104)


def test_rings(script, tmp_path):
    script("rings", "--out", tmp_path / "r.json", GROUP=4, WAVES=(7.0,))
    errors = written(tmp_path / "r.json")["errors"]
    assert len(errors) == 4
    assert all(error["7 px"] >= 0 for error in errors.values())


def test_views(script, world, tmp_path):
    arguments = ("--systems", "keynet-tiny+rootsift", "--pairs", 2, "--rotations", "0")
    out = tmp_path / "v.json"
    script("views", world[0], *arguments, "--num-keypoints", 100, "--out", out)
    assert written(out)["systems"]["keynet-tiny+rootsift"]["right %"] >= 0
    assert written(out)["options"] == {
        **{"num_keypoints": 100, "up_levels": None, "affine": "none", "single_scale": False},
        **{"ratio": None, "min_neighbors": 0},
    }
    row = written(out)["systems"]["keynet-tiny+rootsift"]
    assert 0 <= row["cells"] <= row["correct"] <= 100
    assert 0 <= row["AUC@5"] <= 100
    changed = ("--upsampled-levels", 0, "--nms-size", 9, "--max-size", 200, "--per-scale")
    script("views", world[0], *arguments, *changed, "--num-keypoints", 100, "--out", out)
    options = written(out)["options"]
    assert (options["nms_window"], options["max_size"], options["per_scale"]) == (9, 200, True)
    script("views", world[0], *arguments, "--single-scale", "--num-keypoints", 100, "--out", out)
    assert written(out)["options"]["single_scale"]


def test_validation(script, world, monkeypatch, capsys):
    for recipe in (affine, descriptors):
        monkeypatch.setattr(recipe, "MATCHING_PAIRS", 2)
    networks = ("--networks", "hardnet-light,hardnet-context,affnet")
    script("validation", world[0], *networks)
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == {"hardnet-light", "hardnet-context", "affnet"}
    assert all(0 < float(score) < 1 for score in lines.values())
    script("validation", world[0], "--networks", "affnet", "--tilts", 3, PAIRS=1, SIZE=200)
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert list(lines)[:2] == ["tilts to 3, squares", "tilts to 3, affnet"]
    assert len(lines) == 4


def test_verification(script, world, tmp_path, capsys):
    images = world[0] / "images"
    options = ("--detector", "sobelnet", "--descriptor", "desnet", "--num-keypoints", 300)
    assert call("match", images, *options, "--output", tmp_path / "x.db")[0] == 0
    before = (tmp_path / "x.db").read_bytes()
    script("verification", tmp_path / "x.db", "--trials", 100, MANY=1)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[2].strip() for row in rows] == ["10,000", "100"]
    assert int(rows[0].split("|")[4]) > 0
    assert (tmp_path / "x.db").read_bytes() == before


def test_reconstruct(script, world, tmp_path, capsys, monkeypatch):
    script("reconstruct", world[0] / "images", "--systems", "sift-320")
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["system"] == "sift-320"
    assert row["images"] == 4
    assert row["processor_s"] > 0
    module = importlib.import_module("reconstruct")
    model = pytest.importorskip("pycolmap").Reconstruction(find_models(world[0])[0][0])
    kept = []

    def stored(system, *_):
        kept.append(system)
        return model, {}

    monkeypatch.setattr(module, "_sift", stored)
    for system in ("sift-320", "sift-320+robust"):
        kept.append(module.measure(system, world[0] / "images", "auto")["error"])
    assert kept[::2] == ["sift-320", "sift-320"]
    assert kept[3] < kept[1]
    # every second image of the model, and its cameras
    images = find_models(world[0])[0][1]
    row = module.measure("sift-320", images, "auto", 2)
    assert (row["images"], row["every"], row["data"]) == (2, 2, images.parent.name)
    assert len(module._modeled(images, 2)) == 2
    found = module._camera_errors(model, module._modeled(images, 1))
    assert found["camera_error_percent"] < 1e-6
    moved = module._modeled(images, 1)
    moved[next(iter(moved))] += 1.0
    assert module._camera_errors(model, moved)["camera_error_percent"] > 1
    assert module._camera_errors(None, moved) == {}
    assert "1/2 | auto" in module.table([{**row, "registered": 0}])
    # every other image enlarged
    monkeypatch.setattr(module, "_ours", stored)
    seen = []
    collected = module.collect

    def recorded(folders, **options):
        found = collected(folders, **options)
        seen.append([np.asarray(Image.open(task.path)) for task in found.tasks])
        return found

    monkeypatch.setattr(module, "collect", recorded)
    row = module.measure("fast", images, "auto", 1, 2.0)
    given, used = seen[0], seen[-1]
    assert [np.array_equal(a, b) for a, b in zip(given, used, strict=True)] == [True, False] * 2
    assert used[1].shape == given[1].shape
    height, width = given[1].shape[:2]
    center = given[1][height // 4 : height * 3 // 4, width // 4 : width * 3 // 4]
    assert abs(float(used[1].mean()) - float(center.mean())) < 3
    assert row["enlarge"] == 2
    assert row["cameras"] == 1
    assert 0 < row["own_cameras"] < 1.1
    assert "x 2 | auto" in module.table([row])
    assert module._separation(None) == {}
    own = module.with_own_cameras(model, set(model.cameras))
    assert module._separation(own) == {"cameras": model.num_reg_images()}
    files = {path.name: path for path in images.iterdir()}
    cameras = [len(set(module._groups(files, c).values())) for c in ("auto", "single", "per-image")]
    assert cameras == [1, 1, 0]
    assert f"0 of {row['images']}" in module.table([{**row, "registered": 0}])
    # a similarity is removed, and an error of one point is found
    points = np.random.default_rng(0).normal(size=(9, 3))
    turned = 3 * points @ np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]) + 5
    assert module.aligned_distances(points, turned).max() < 1e-9
    turned[0, 0] += 1
    assert 0.3 < module.aligned_distances(points, turned)[0] < 1


def test_retrieval(script, world, photos, tmp_path, monkeypatch):
    arguments = ("--descriptors", "rootsift", "--work", tmp_path)
    script("retrieval", world[0], *arguments, "--out", tmp_path / "r.json", SHARED_POINTS=1)
    rows = written(tmp_path / "r.json")["rows"]
    assert {row["method"] for row in rows} == {
        "VLAD, own vocabulary, by matches",
        "VLAD, own vocabulary",
        "bag of words",
        "random",
        "number of shared points",
    }
    # all pairs of few images
    assert all(row["recall"] == row["bounded"] == 1 for row in rows if row["k"] == 20)
    module = importlib.import_module("retrieval")
    partners = {0: {1, 2}, 1: {0}, 2: {0}}
    found = module.recalls([[1], [2], [-1]], partners, 2, 1)
    assert found == {"proposed": 2, "recall": 0.5, "bounded": pytest.approx(1 / 3)}
    monkeypatch.setattr("tiepoints.retrieval.ITERATIONS", 2)
    arguments = ("--descriptors", "desnet", "--work", tmp_path)
    script("retrieval", "--train", photos, *arguments, "--save", tmp_path / "v.vocabulary")
    assert (tmp_path / "v.vocabulary").stat().st_size > 10_000


# --- times: only that they are measured


def test_matching(script, tmp_path, monkeypatch):
    module = importlib.import_module("matching")
    methods = {name: module.METHODS[name] for name in ("tiepoints", "whole matrix")}
    monkeypatch.setattr(module, "METHODS", methods)
    script("matching", "--one", "tiepoints", 300)
    rows = [module.measure(name, 300) for name in methods]
    assert rows[0]["matches"] == rows[1]["matches"] > 200
    assert len(module.trusted(1)) == 27


def test_describe(script, tmp_path):
    pytest.importorskip("kornia")
    arguments = ("--weights", "random", "--repeat", 1, "--out", tmp_path / "d.json")
    script("describe", *arguments, PATCHES=16)
    assert written(tmp_path / "d.json")["milliseconds"]["ours float32"] > 0


def small_image(file):
    """Replaces ``common.vga_image``."""
    return torch.rand(1, 1, 120, 160, generator=torch.Generator().manual_seed(0))


def test_labels_of_the_figure_are_inside_and_apart(script):
    speed_page = importlib.import_module("speed_page")
    at = {f"system number {i}": (300.0 + 9 * i, 24.0 + 5 * (i % 3)) for i in range(12)}
    labels = speed_page._labels(at)
    assert labels.keys() == at.keys()
    lines = [base for _, base in labels.values()]
    assert min(lines) >= speed_page.LINE
    assert max(lines) <= speed_page.HEIGHT - speed_page.BELOW
    for name, (left, base) in labels.items():
        right = left + speed_page.CHARACTER * len(name)
        for x, y in at.values():
            assert not (abs(base - 4 - y) < 10 and left - 6 < x < right)
        assert sum(abs(base - line) < speed_page.LINE for line in lines) == 1


def test_speed(script, oxford, photos, tmp_path, monkeypatch):
    pytest.importorskip("kornia")
    module = importlib.import_module("speed")
    speed_page = importlib.import_module("speed_page")
    monkeypatch.setattr(module, "child", lambda *_: {"peak_mib": 1.0, "added_mib": 1.0})
    systems = "sobelnet@ti+desnet,keynet-tiny+rootsift,kornia,orb,missing"
    page, figure = tmp_path / "s.md", tmp_path / "s.svg"
    page.write_text(f"before\n{speed_page.BEGIN}\nold\n{speed_page.END}\nafter\n")
    arguments = ("--systems", systems, "--repeat", 1, "--threads", 1, "--photos", photos)
    arguments += ("--quality", oxford, "--out", tmp_path / "s.json", "--page", page)
    rate = {"photos_per_second": lambda *_: 2.0}
    numbers = {"POINTS": 100, "vga_image": small_image, **rate}
    script("speed", *arguments, "--figure", figure, **numbers)
    found = written(tmp_path / "s.json")
    assert found["ratio"] > 0
    assert "unavailable" in found["systems"]["missing"]
    row = found["systems"]["sobelnet@ti+desnet"]
    assert row["quality"]["graf mma@3"] > 0.8
    stages = row["milliseconds"]["1"]
    assert stages["total"] == pytest.approx(
        sum(stages[key] for key in ("pyramid", "network", "selection", "description"))
    )
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("| 2.00 |") == 4
    assert figure.read_text().count("<circle") == 4


def test_gpu(script, tmp_path):
    arguments = ("--device", "cpu", "--systems", "sobelnet+desnet", "--batch", "1,2")
    script("gpu", *arguments, "--size", "160x120", "--repeat", 1, "--out", tmp_path / "g.json")
    rows = written(tmp_path / "g.json")["rows"]
    assert [row["batch"] for row in rows] == [1, 2]
    # for each level at most these: pixels above the threshold, plateaus, positions, rows
    assert rows[0]["copies_to_host"]["detection"]["nonzero"] <= 50
    assert rows[0]["copies_per_image"] == pytest.approx(rows[1]["copies_per_image"], abs=4)


def test_realtime(script, tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    module = importlib.import_module("realtime")
    known = module.factories

    def without_xfeat(image):  # its network is another library's
        return {name: make for name, make in known(image).items() if name != module.XFEAT}

    monkeypatch.setattr(module, "memory", lambda name, image: 1.0)
    arguments = ("--rounds", 1, "--out", tmp_path / "r.json")
    script("realtime", *arguments, factories=without_xfeat, vga_image=small_image)
    assert written(tmp_path / "r.json")["systems"]["ORB"]["points"] > 0


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_complexity(script, tmp_path):
    arguments = ("keynet-tiny", "--side", 64, "--repeat", 1, "--out", tmp_path / "c.json")
    script("complexity", *arguments)
    assert written(tmp_path / "c.json")["detectors"]["keynet-tiny"]["parameters"] == 253


def test_memory(script, tmp_path):
    arguments = ("--systems", "keynet-tiny+none", "--sizes", "160x120")
    script("memory", *arguments, "--work", tmp_path, "--out", tmp_path / "m.json")
    assert written(tmp_path / "m.json")["rows"][0]["MiB"] > 10


def test_export_files(script, tmp_path):
    """With a stand-in for the export, which takes long and has its own tests."""
    calls = []

    def write(options, path, *, form):
        calls.append((options.detector, options.single_scale, options.precision, form))
        path.write_bytes(path.stem.encode())
        return Exported(str(path), form, 7, 0.001)

    script("export_files", "--output", tmp_path / "files", export_pipeline=write)
    assert len(set(calls)) == 10
    assert ("keynet", True, "int8", "pipeline") in calls
    assert ("sobelnet", False, "float32", "colmap") in calls
    rows = written(tmp_path / "files" / "files.json")
    assert [row["path"] for row in rows][:2] == [
        "sobelnet-desnet.onnx",
        "sobelnet-desnet-int8.onnx",
    ]
    lines = (tmp_path / "files" / "SHA256SUMS").read_text().splitlines()
    assert lines[0] == f"{sha256(b'sobelnet-desnet').hexdigest()}  sobelnet-desnet.onnx"
    assert len(lines) == len(rows) == 10
