"""The command line as a whole: consistent names, exit codes, JSON, masks, images."""

import importlib
import json
import shutil
import signal
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import tiepoints
from tiepoints.cli import app, signals
from tiepoints.cli.common import STOPPED, user_errors
from tiepoints.errors import DataError
from tiepoints.evaluation import compare
from tiepoints.formats.hdf5 import FeatureFile, MatchFile
from tiepoints.formats.npy import read_features
from tiepoints.jobs.extract import extract_images
from tiepoints.jobs.pictures import _stems, draw_best_pairs
from tiepoints.structs import Features, Keypoints, Matches


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two overlapping crops of a texture, as color images."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    texture = Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8))
    texture = texture.resize((420, 340), Image.Resampling.BICUBIC)
    for i in range(2):
        texture.crop((20 * i, 10 * i, 20 * i + 320, 10 * i + 260)).save(folder / f"{i}.png")
    return folder


def call(*arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def commands() -> dict[str, click.Command]:
    """Every command by its full name."""
    found: dict[str, click.Command] = {}

    def add(prefix: str, command) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            if getattr(inner, "commands", None):
                add(f"{prefix}{name} ", inner)
            else:
                found[prefix + name] = inner

    add("", typer.main.get_command(app))
    return found


def test_option_names_are_consistent():
    """The interface table of docs/concepts: no second name for an option."""
    for name, command in commands().items():
        options = {option for p in command.params for option in p.opts if option.startswith("--")}
        assert not options & {"--out", "--model", "--mode", "--scales", "--weights"}, name
        aliases = {"--num-points", "--num-kpts"} & options
        assert not aliases or name == "extract", name
    assert set(commands()) >= {"extract", "match", "train", "evaluate", "compare", "report", "live"}


def test_every_command_has_help():
    for name in commands():
        code, out, _ = call(*name.split(), "--help")
        assert code == 0
        assert "Usage:" in out


def test_stopped_commands_print_one_message(monkeypatch, capsys):
    monkeypatch.setattr(signals._handler, "number", signal.SIGINT)
    with pytest.raises(typer.Exit), signals.stop_message(), user_errors():
        raise signals.Stopped
    assert capsys.readouterr().err == f"error: {STOPPED}\n"


def test_a_training_stopped_early_names_no_checkpoint(photos, tmp_path, monkeypatch):
    def stop(arguments, output, options):
        raise KeyboardInterrupt

    module = importlib.import_module("tiepoints.training.recipes.train")
    monkeypatch.setattr(module, "train_from", stop)
    arguments = ("train", "keynet-tiny", "--images", photos, "--output", tmp_path / "a.safetensors")
    _, _, err = call(*arguments)
    assert "run the same command again" in err
    (tmp_path / "a.safetensors.checkpoint").touch()
    _, _, err = call(*arguments)
    assert f"--resume ({tmp_path / 'a.safetensors.checkpoint'})" in err


def test_version():
    code, out, _ = call("--version")
    assert (code, out) == (0, f"tiepoints {tiepoints.__version__}\n")


def test_quiet_shows_no_log_lines(photos, tmp_path):
    (tmp_path / "p").mkdir()
    for i in range(2):
        (tmp_path / "p" / f"{i}.png").write_bytes((photos / f"{i}.png").read_bytes())
    arguments = ["train", "keynet-tiny", "--images", tmp_path / "p", "--steps", 1]
    arguments += ["--batch-size", 1, "--workers", 0, "--device", "cpu", "--no-compare"]
    code, out, err = call(*arguments, "--output", tmp_path / "a.safetensors", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 1
    assert "photographs for training" in err
    code, _, err = call("-q", *arguments, "--output", tmp_path / "b.safetensors")
    assert (code, err) == (0, "")


def test_other_files_are_skipped_and_damaged_images_fail(photos, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes((photos / "0.png").read_bytes())
    for name in ("._a.png", "b.mpg", "c.pdf"):
        (folder / name).write_bytes(b"no image")
    arguments = ["extract", folder, "--num-keypoints", 60, "--single-scale", "--json"]
    arguments += ["--descriptor", "none"]
    code, out, err = call(*arguments, "--output", tmp_path / "x")
    assert code == 0
    assert err == "skipped: 3 files that are not images\n"
    report = json.loads(out)
    assert (report["done"], report["ignored"], report["failed"]) == (1, 3, [])
    (folder / "broken.png").write_bytes(b"\x89PNG nonsense")
    code, out, err = call(*arguments, "--output", tmp_path / "x")
    assert code == 1
    assert json.loads(out)["skipped"] == 1
    assert "failed: " in err
    code, _, err = call("extract", folder, "--output", tmp_path / "y", "--nms", 3)
    assert code == 2


def test_masks_and_transparency_exclude_keypoints(photos, tmp_path):
    image = Image.open(photos / "0.png")
    mask = np.zeros((image.height, image.width), np.uint8)
    mask[:, 160:] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "0.png")
    transparent = image.convert("RGBA")
    transparent.putalpha(Image.fromarray(mask))
    transparent.save(tmp_path / "0.png")
    arguments = ["--num-keypoints", 80, "--single-scale", "--descriptor", "none", "--output"]
    code, *_ = call(
        "extract", photos / "0.png", "--masks", tmp_path / "masks", *arguments, tmp_path / "m"
    )
    assert code == 0
    code, *_ = call("extract", tmp_path / "0.png", "--mask-alpha", *arguments, tmp_path / "a")
    assert code == 0
    for name in ("m", "a"):
        xy = read_features(tmp_path / name / "0.png").xy
        assert len(xy) > 20
        assert xy[:, 0].min() > 157
    found = {}
    for name, more in {"all": [], "masked": ["--masks", tmp_path / "masks"]}.items():
        pair = [photos / "0.png", photos / "0.png"]
        code, out, err = call("match", *pair, "--json", "--num-keypoints", 80, *more)
        assert code == 0, err
        found[name] = min(x for x, _ in json.loads(out)["xy_a"])
    assert found["masked"] > 157 > found["all"]
    # a mask is named by the path of its image in the given folder, in all formats
    (tmp_path / "folder" / "a").mkdir(parents=True)
    shutil.copy(photos / "0.png", tmp_path / "folder" / "a" / "b.png")
    (tmp_path / "nested" / "a").mkdir(parents=True)
    Image.fromarray(mask).save(tmp_path / "nested" / "a" / "b.png.png")
    for kind, root in (("npy", []), ("npy", ["--root-images", tmp_path / "folder"]), ("h5", [])):
        code, _, err = call(
            *("extract", tmp_path / "folder", "--masks", tmp_path / "nested", "--format", kind),
            *(*root, *arguments, tmp_path / f"{kind}{len(root)}"),
        )
        assert code == 0, err
    code, _, err = call(
        "extract", photos, "--masks", tmp_path / "masks", *arguments, tmp_path / "b"
    )
    assert code == 1
    assert "no mask" in err
    assert "1.png" in err


def test_match_draws_two_images_and_the_best_pairs_in_color(photos, tmp_path):
    pytest.importorskip("h5py")
    arguments = ["--num-keypoints", 200, "--single-scale", "--descriptor", "rootsift"]
    images = [photos / "0.png", photos / "1.png"]
    code, out, _ = call("match", *images, "--output", tmp_path / "m.png", "--outliers", *arguments)
    assert code == 0
    assert "inliers" in out
    assert np.ptp(np.asarray(Image.open(tmp_path / "m.png")).astype(int), axis=2).max() > 60
    code, out, _ = call("match", photos, "--pictures", tmp_path / "best", *arguments)
    assert code == 0, out
    assert (tmp_path / "best" / "0.png-1.png.jpg").is_file()
    assert "image  " in out
    code, _, err = call("match", *images, "--geometry", "essential")
    assert code == 2
    assert "intrinsics" in err


def test_compare_takes_images_from_the_whole_list(monkeypatch):
    seen = []

    class Dataset:
        def __init__(self, paths, *_, **__):
            seen.extend(path.stem for path in paths)

        def pair(self, index):
            raise DataError("no texture")

    monkeypatch.setattr(compare, "PairDataset", Dataset)
    images = [Path(f"{number}.png") for number in range(8)]
    with pytest.raises(DataError, match="texture"):
        compare.compare_systems("random", "random", images, compare.CompareSettings(photos=5))
    assert seen == ["0", "1", "3", "5", "7"]


def test_match_refuses_to_write_to_its_photographs(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    images = [folder / "0.png", folder / "1.png"]
    before = images[1].read_bytes()
    code, _, err = call("match", *images, "--output", images[1])
    assert code == 2
    assert "is one of the given files" in err
    assert images[1].read_bytes() == before
    output = tmp_path / "m.h5"
    code, _, err = call("match", folder, "--output", output, "--pictures", folder / "drawn")
    assert code == 2
    assert "inside the folder of the images" in err
    assert not output.exists()


def test_options_that_do_not_apply_are_refused(photos, tmp_path):
    images = [photos / "0.png", photos / "1.png"]
    many = ["match", photos, "--output", tmp_path / "m.h5"]
    for arguments, message in (
        (["match", *images, "--pictures", tmp_path / "p"], "--pictures is for many images"),
        ([*many, "--outliers"], "--outliers is for two images"),
        ([*many, "--camera", "single"], "--camera is for COLMAP"),
        (["extract", photos, "--camera", "single"], "--camera is for --format colmap, not for npy"),
        (
            ["match", "--features", "f.h5", "--detector", "keynet"],
            "--detector does not apply to stored",
        ),
        (["match", "--features", "f.h5", "--max-size", 800], "--max-size does not apply to stored"),
        (["extract", photos, "--half"], "--half is for --format h5, not for npy"),
    ):
        code, _, err = call(*arguments)
        assert code == 2, arguments
        assert message in err


def test_pictures_of_pairs_have_distinct_names(tmp_path):
    """x + y-z and x-y + z are two pairs, as are those of folders; names alike but for / are one."""
    pytest.importorskip("h5py")
    names = ("x", "y-z", "x-y", "z", "a/b", "a-b")
    folder, matches = tmp_path / "photos", tmp_path / "m.h5"
    (folder / "a").mkdir(parents=True)
    points = Keypoints(torch.rand(9, 2) * 60, torch.ones(9), torch.zeros(9), torch.ones(9))
    index = torch.arange(9)[:, None].expand(9, 2)
    for name in names:
        Image.new("L", (64, 48), 128).save(folder / name, "PNG")
    with FeatureFile(tmp_path / "m.features.h5", write=True) as file:
        for name in names:
            file.write(name, Features(points, None, (64, 48)))
    pairs = (("x", "y-z"), ("x-y", "z"), ("a/b", "z"))
    with MatchFile(matches, write=True) as file:
        for a, b in pairs:
            file.write_matches(a, b, Matches(index, torch.ones(9)), 9)
    given = [str(folder / name) for name in names]
    with pytest.raises(DataError, match="name them, or their folder"):
        draw_best_pairs(matches, [], tmp_path / "best")
    written = draw_best_pairs(matches, given, tmp_path / "best", root=folder)
    assert sorted(path.name for path in written) == ["x-y-z-2.jpg", "x-y-z.jpg"]
    assert all(path.is_file() for path in written)
    # COLMAP distinguishes all names
    assert list(_stems(["a-b/c", "a/b-c", "a-b-c/2", "a-b/c"])) == [
        *("a-b-c", "a-b-c-2", "a-b-c-2-2", "a-b-c-3")
    ]


def test_compare_reports_the_better_system(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40), dtype=np.uint8))
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    arguments = ["--images", tmp_path, "--size", 160, "--num-keypoints", 100, "--device", "cpu"]
    code, out, _ = call("compare", "keynet-tiny", "random", *arguments, "--json")
    assert code == 0
    found = json.loads(out)
    measure = found["measures"]["repeatability"]
    assert found["photos"] == 4
    assert measure["better"] == "keynet-tiny"
    assert measure["low"] <= measure["difference"] <= measure["high"] < 0
    assert "correct matches" not in found["measures"]  # random keypoints have no descriptors
    code, out, _ = call("compare", "keynet-tiny", "keynet-tiny", *arguments)
    assert code == 0
    assert out.count("no difference shown") == 3
    seen = []
    measure = compare._measure
    monkeypatch.setattr(
        compare, "_measure", lambda *given: seen.append(given[1]) or measure(*given)
    )
    call("compare", "keynet-tiny", "keynet-tiny", *arguments)
    warps = {pair.H_ab.tobytes() for pair in seen}
    assert len(warps) == 4 * compare.VIEWS  # each view of each image has its own
    assert len(seen) == 2 * len(warps)
    code, _, err = call("compare", "keynet-tiny", "nonsense", *arguments)
    assert code == 2
    assert "nonsense" in err


def test_documented_python_calls(photos):
    image_a, image_b = (str(photos / f"{i}.png") for i in range(2))
    result = tiepoints.match_two(
        image_a,
        image_b,
        tiepoints.ExtractOptions(num_keypoints=200, single_scale=True),
        tiepoints.MatchOptions(geometry="homography"),
    )
    assert result.estimate.ok
    picture = tiepoints.draw_matches(
        image_a, image_b, result.xy_a, result.xy_b, result.estimate.inliers
    )
    assert picture.size[0] > 640
    assert tiepoints.draw_keypoints(image_a, result.a).size == (320, 260)
    with pytest.raises(ValueError, match=r"K_a and K_b|intrinsics"):
        tiepoints.estimate(torch.rand(9, 2), torch.rand(9, 2), "essential")


def test_results_of_earlier_versions_are_resumed(photos, tmp_path):
    """The settings files of features and matches as an earlier version wrote them."""
    pytest.importorskip("h5py")
    arguments = ["match", photos, "--num-keypoints", 100, "--descriptor", "rootsift"]
    arguments += ["--single-scale", "--detector", "keynet", "--output", tmp_path / "m.h5"]
    arguments += ["--ratio", 0.95, "--min-neighbors", 0]  # before matches had to agree
    assert call(*arguments)[0] == 0
    features = {
        **{"detector": "keynet", "descriptor": "rootsift", "num_points": 100},
        **{"single_scale": True, "weights": None},
    }
    matches = {"ratio": 0.95, "model": None, "threshold": 2.0, "orientation": "auto"}
    (tmp_path / "m.features.settings.json").write_text(json.dumps(features))
    (tmp_path / "m.settings.json").write_text(json.dumps({**matches, "features": features}))
    code, out, err = call(*arguments)
    assert code == 0, err
    assert "0 pairs matched" in out
    assert "1 done before" in out
    code, _, err = call(*arguments[:3], 90, *arguments[4:])
    assert code == 2
    assert "num_keypoints: 100 before, 90 now" in err


def test_a_sequence_that_cannot_be_read_makes_an_evaluation_incomplete(photos, tmp_path):
    for name in ("v_good", "v_bad"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in (1, 2):
            (folder / f"{i}.png").write_bytes((photos / f"{i - 1}.png").read_bytes())
    np.savetxt(tmp_path / "data" / "v_good" / "H_1_2", np.eye(3))
    (tmp_path / "data" / "v_bad" / "H_1_2").write_text("no matrix")
    arguments = ["evaluate", tmp_path / "data", "--systems", "random", "--protocol", "mutual"]
    code, out, err = call(*arguments, "--output", tmp_path / "run", "--json")
    assert code == 1
    assert json.loads(out)["unread"] == 1
    assert "v_bad" in err


def test_unknown_formats_and_geometries_are_refused_before_any_work(photos, tmp_path):
    options = tiepoints.ExtractOptions(num_keypoints=10)
    with pytest.raises(ValueError, match="format must be one of npy, h5, colmap; got 'csv'"):
        extract_images([str(photos)], tmp_path, options, format="csv")
    with pytest.raises(ValueError, match="geometry must be homography, fundamental or None"):
        tiepoints.MatchOptions(geometry="affine")
    with pytest.raises(ValueError, match="intrinsics of the cameras"):
        tiepoints.MatchOptions(geometry="essential")


def test_training_ends_with_a_comparison_with_the_shipped_weights(photos, tmp_path):
    rng = np.random.default_rng(2)
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8))
        coarse.resize((400, 400), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for i in (0, 1):
        (tmp_path / f"{i}.png").rename(held_out / f"{i}.png")
    photos_to_train = tmp_path / "photos"
    photos_to_train.mkdir()
    for i in (2, 3):
        (tmp_path / f"{i}.png").rename(photos_to_train / f"{i}.png")
    arguments = ["train", "keynet-tiny", "--images", photos_to_train, "--validation", held_out]
    arguments += ["--steps", 1, "--batch-size", 1, "--workers", 0, "--device", "cpu", "--json"]
    code, out, err = call(*arguments, "--output", tmp_path / "t.safetensors")
    assert code == 0, err
    comparison = json.loads(out)["comparison"]
    assert comparison["photos"] == 2
    assert comparison["a"] == "keynet-tiny"
    assert comparison["b"] == str(tmp_path / "t.safetensors")
    assert set(comparison["measures"]) >= {"repeatability", "correct matches"}
