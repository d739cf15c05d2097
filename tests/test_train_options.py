"""Options of trainings: variants of the networks, the papers' presets, pairs written once, resume
without options, and arguments that are refused before any work.
"""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch

from helpers import call, write_photos
from tiepoints import load
from tiepoints.datasets.pairs import PairFile, write_pairs
from tiepoints.datasets.synthetic import PairSettings, list_photos
from tiepoints.errors import WeightsError
from tiepoints.models.keynet import KeyNet
from tiepoints.training import recipes
from tiepoints.training.loop import RunOptions, read_checkpoint
from tiepoints.training.losses import msip_loss, orientation_loss, paper_msip_loss
from tiepoints.training.presets import RECIPES, REKD_RECIPES
from tiepoints.training.recipes import TrainData
from tiepoints.training.recipes.detectors import _oriented_loss, _score_map_loss
from tiepoints.training.recipes.options import NETWORK_OPTIONS, msip_weights, with_options
from tiepoints.training.recipes.train import NETWORKS, resumed_arguments
from tiepoints.training.validation import paper_score
from tiepoints.weights import metadata_of

pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def checks(photos, tmp_path_factory):
    """Two small pairs for validation, which replace those of the presets."""
    path = tmp_path_factory.mktemp("checks") / "pairs.safetensors"
    settings = PairSettings(size=96, scale=(1, 1), rotation=0, skew=0)
    write_pairs(path, list_photos(photos), settings, 2, seed=1)
    return path


def train(name, photos, checks, out, *, preset="default", pairs=None, **network):
    data = TrainData(photos, pairs=pairs, validation_pairs=checks)
    replaced = {key: network.pop(key, False) for key in ("resume", "overwrite")}
    run = RunOptions("cpu", progress=False, workers=0, **replaced)
    schedule = {"steps": 1, "batch_size": 2, "validate_every": 1}
    return recipes.train(name, data, out, preset=preset, run=run, network=network, **schedule)


# --- variants


def test_variant_of_keynet_is_trained_and_stored(photos, checks, tmp_path):
    out = tmp_path / "v.safetensors"
    options = {"filters": 4, "blocks": 1, "levels": 2, "kernel": 3, "handcrafted": "first"}
    loss = {"windows": (8, 16), "base": 3.0}
    train("keynet", photos, checks, out, preset="msip", patch_size=64, **options, **loss)
    settings = load(out).settings
    expected = KeyNet(
        num_filters=4, num_blocks=1, num_levels=2, kernel_size=3, handcrafted="first"
    ).settings
    assert settings == expected
    stored = metadata_of(out)["options"]
    assert stored == {**options, "windows": [8, 16], "base": 3.0, "patch_size": 64}
    assert read_checkpoint(tmp_path / "v.safetensors.checkpoint")["arguments"]["filters"] == 4


def test_options_change_the_loss():
    maps = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    batch = {"image_a": maps, "image_b": maps.flip(-1), "H_ab": torch.eye(3).expand(2, 3, 3)}
    batch |= {"mask_a": torch.ones_like(maps), "mask_b": torch.ones_like(maps)}
    options = {"windows": (8, 16), "window_weights": (3, 2), "base": 5.0}
    recipe = with_options(RECIPES["msip"], "msip", options)
    wanted = {"windows": (8, 16), "weights": (3.0, 2.0), "base": 5.0}
    pair = (maps, maps.flip(-1), batch["H_ab"])
    found = _score_map_loss(recipe)(torch.nn.Identity(), batch)[0]
    assert found == msip_loss(*pair, visibility="half", factor=500.0, **wanted)[0]
    paper = with_options(RECIPES["paper"], "paper", {**options, "loss": "paper"})
    found = _score_map_loss(paper)(torch.nn.Identity(), batch)[0]
    assert found == paper_msip_loss(*pair, **wanted)[0]
    code = with_options(RECIPES["paper"], "paper", {**options, "loss": "code"})
    found = _score_map_loss(code)(torch.nn.Identity(), batch)[0]
    tensorflow = {"weighting": "softmax", "visibility": "any", "empty": "ignore"}
    assert found == msip_loss(*pair, **tensorflow, **wanted)[0]


def test_weights_of_windows():
    assert msip_weights((8, 40), None) == (256.0, 1.0)
    assert msip_weights((12,), (7,)) == (7.0,)
    with pytest.raises(ValueError, match="no weight for windows of 12 px"):
        msip_weights((8, 12), None)
    with pytest.raises(ValueError, match="2 windows but 1 window_weights"):
        msip_weights((8, 12), (1,))
    with pytest.raises(ValueError, match="different sizes"):
        msip_weights((8, 8), None)


@pytest.mark.parametrize(
    ("name", "preset", "options", "message"),
    [
        ("sobelnet", "default", {"filters": 2}, "filters is an option of keynet"),
        ("sobelnet", "default", {"windows": (8,)}, "Gaussian loss"),
        ("keynet", "corners", {"base": 2.0}, "Gaussian loss"),
        ("keynet", "default", {"loss": "paper"}, "presets paper and msip"),
        ("keynet", "msip", {"base": 1.0}, "base must be above 1"),
        ("keynet", "msip", {"kernel": 4}, "kernel_size must be an odd integer"),
        ("keynet", "msip", {"patch_size": 32}, "smaller than a window of 40"),
        ("keynet-tiny", "default", {"orientation_balance": 1.0}, "option of rekd and rekd-light"),
        ("hardnet", "default", {"max_angle": 10.0}, "max_angle is an option of"),
    ],
)
def test_unsuitable_options_are_refused(photos, tmp_path, name, preset, options, message):
    with pytest.raises(ValueError, match=message):
        train(name, photos, None, tmp_path / "x.safetensors", preset=preset, **options)
    assert not (tmp_path / "x.safetensors").exists()


def test_every_option_belongs_to_networks():
    for names in NETWORK_OPTIONS.values():
        assert set(names) <= set(NETWORKS)


# --- the papers' presets


def test_paper_preset_of_keynet():
    recipe = RECIPES["paper"]
    assert (recipe.num_pairs, recipe.check_pairs, recipe.check_size) == (9000, 3000, 192)
    assert (recipe.kind, recipe.loss["weighting"], recipe.fit.batch_size) == ("msip", "softmax", 32)
    epoch = recipe.num_pairs / recipe.fit.batch_size
    assert recipe.fit.decay_at * recipe.fit.steps == pytest.approx(30 * epoch, abs=1)
    assert (recipe.fit.decay, recipe.fit.final_rate, recipe.fit.warmup) == ("step", 0.5, 0)


def test_pairs_of_the_paper_preset_are_written_once(photos, checks, tmp_path):
    out = tmp_path / "p.safetensors"
    options = {"preset": "paper", "num_training_data": 3, "patch_size": 64, "windows": (8,)}
    options["loss"] = "paper"
    train("keynet", photos, checks, out, **options)
    path = tmp_path / "p.safetensors.pairs" / "training.safetensors"
    assert (PairFile(path).info["count"], PairFile(path).info["size"]) == (3, 64)
    before = path.stat().st_mtime_ns
    train("keynet", photos, checks, out, resume=True, **options)
    assert path.stat().st_mtime_ns == before
    train("keynet", photos, checks, out, overwrite=True, **{**options, "num_training_data": 4})
    assert PairFile(path).info["count"] == 4
    # pairs of a file are not changed by options
    options = {"preset": "paper", "patch_size": 64, "overwrite": True}
    with pytest.raises(ValueError, match="patch_size does not apply"):
        train("keynet", photos, checks, out, pairs=path, **options)


def test_largest_angle_of_the_pairs(photos, checks, tmp_path):
    out = tmp_path / "p.safetensors"
    options = {"num_training_data": 6, "patch_size": 64, "windows": (8,), "preset": "paper"}
    angles = []
    for max_angle in (0.0, 90.0):
        options |= {"max_angle": max_angle, "overwrite": True}
        train("rekd-light", photos, checks, out, group_size=4, **options)
        pairs = PairFile(tmp_path / "p.safetensors.pairs" / "training.safetensors")
        H = [pairs.pair(i).H_ab for i in range(6)]
        angles.append(max(abs(math.degrees(math.atan2(h[1, 0], h[0, 0]))) for h in H))
    assert angles[0] == pytest.approx(0, abs=1e-6)
    assert 5 < angles[1] <= 90
    assert load(out).settings["variant"] == "published"


def test_orientation_loss_of_the_published_recipe_is_not_weighted():
    rng = torch.Generator().manual_seed(0)
    score = torch.rand(2, 1, 48, 48, generator=rng)
    histogram = (9 * torch.rand(2, 4, 48, 48, generator=rng)).softmax(dim=1)
    batch = {"image_a": score[:1], "image_b": score[1:], "H_ab": torch.eye(3)[None]}
    batch |= {"mask_a": torch.ones(1, 1, 48, 48), "mask_b": torch.ones(1, 1, 48, 48)}

    def network(images):
        return score, histogram

    recipe = with_options(
        REKD_RECIPES["paper"], "paper", {"orientation_balance": 7.0, "windows": (8,)}
    )
    total, metrics = _oriented_loss(recipe)(network, batch)
    plain = orientation_loss(histogram[:1], histogram[1:], batch["H_ab"])[0]
    assert metrics["orientation"] == pytest.approx(plain.item(), rel=1e-5)
    assert total.item() == pytest.approx(metrics["location"] + 7 * metrics["orientation"])
    weighted = _oriented_loss(with_options(REKD_RECIPES["default"], "default", {"windows": (8,)}))
    assert weighted(network, batch)[1]["orientation"] != pytest.approx(plain.item(), rel=1e-4)


def test_paper_score_of_known_maps():
    """Keypoints in the same positions repeat; positions without a counterpart do not."""

    class Spots(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return images

    a = torch.zeros(1, 96, 96)
    for y, x in ((30, 30), (30, 60), (60, 30), (60, 60)):
        a[0, y, x] = 1
    b = torch.zeros(1, 96, 96)
    for y, x in ((30, 30), (30, 60), (48, 48), (70, 48)):
        b[0, y, x] = 1
    item = {"image_a": a, "H_ab": torch.eye(3, dtype=torch.float64)}
    assert paper_score(Spots(), [{**item, "image_b": a}]) == 1.0
    assert paper_score(Spots(), [{**item, "image_b": b}]) == 0.5
    assert paper_score(Spots(), [{**item, "image_b": torch.zeros_like(a)}]) == 0.0


def test_one_command_writes_both_sets_of_pairs(photos, tmp_path):
    arguments = ["--images", photos, "--size", 64, "--count", 3, "--validation", 2]
    arguments += ["--workers", 0, "--output", tmp_path / "p.safetensors"]
    code, out, err = call("pairs", *arguments)
    assert code == 0, err
    training, validation = (
        PairFile(tmp_path / name) for name in ("p.safetensors", "p-validation.safetensors")
    )
    assert (len(training), len(validation)) == (3, 2)
    assert (training.info["photos"], validation.info["photos"]) == (3, 1)
    assert "3 pairs of 3 photographs" in out
    code, _, err = call("pairs", *arguments, "--split", "all")
    assert code == 2
    assert "disjoint" in err


# --- resume, refusals


@pytest.fixture
def arguments(photos, checks):
    given = ["--images", photos, "--validation-pairs", checks, "--preset", "msip", "--steps", 2]
    given += ["--batch-size", 2, "--filters", 2, "--blocks", 1, "--levels", 1, "--windows", "8,16"]
    return ["keynet", *given, "--patch-size", 64, "--seed", 3]


RUN = ("--workers", 0, "--device", "cpu", "--no-compare")


def test_resume_needs_no_other_options(arguments, photos, checks, tmp_path, monkeypatch):
    out = tmp_path / "r.safetensors"
    monkeypatch.chdir(checks.parent)  # relative paths are stored as absolute ones
    arguments[arguments.index("--validation-pairs") + 1] = checks.name
    code, _, err = call("train", *arguments, *RUN, "--output", out)
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    arguments[arguments.index("--validation-pairs") + 1] = checks
    before = load(out).state_dict()
    out.unlink()
    # as if the training had been killed before its last validation
    path = tmp_path / "r.safetensors.checkpoint"
    state = read_checkpoint(path)
    state["rows"], state["best"], state["best_state"] = [], -math.inf, {}
    torch.save(state, path)
    code, text, err = call("train", "--resume", *RUN, "--output", out, "--json")
    assert code == 0, err
    assert json.loads(text)["steps"] == 2
    after = load(out)
    assert after.settings["num_filters"] == 2
    assert all(torch.equal(before[key], value) for key, value in after.state_dict().items())
    # the same ones, and photographs that were moved
    arguments[arguments.index("--images") + 1] = shutil.copytree(photos, tmp_path / "moved")
    code, _, err = call("train", *arguments, *RUN, "--resume", "--output", out)
    assert code == 0, err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", 3], "steps was 2, now 3"),
        (["--filters", 4], "filters was 2, now 4"),
        (["--windows", "8"], "windows was [8, 16], now [8]"),
        (["--init", "keynet"], "init was None, now 'keynet'"),
        (["keynet-tiny"], "network was 'keynet', now 'keynet-tiny'"),
    ],
)
def test_options_that_contradict_the_checkpoint_are_refused(arguments, tmp_path, given, message):
    out = tmp_path / "r.safetensors"
    assert call("train", *arguments, *RUN, "--output", out)[0] == 0
    code, _, err = call("train", *given, "--resume", *RUN, "--output", out)
    assert code == 2
    assert message in err
    assert "omit these options" in err


def test_resume_without_a_checkpoint_names_it(tmp_path):
    code, _, err = call("train", "--resume", *RUN, "--output", tmp_path / "none.safetensors")
    assert code == 2
    assert "none.safetensors.checkpoint" in err
    assert "--images" in err


def test_arguments_are_checked_before_photographs_are_read(photos, tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("photographs were read")

    monkeypatch.setattr(recipes.common, "find_photos", read)
    code, _, err = call("train", "keynet", "--images", photos, "--output", tmp_path / "x.pth")
    assert code == 2
    assert "must be a .safetensors file, got x.pth" in err

    def missing(module, **_):
        raise ImportError(f"training needs {module}: pip install 'tiepoints[train]'")

    # the package exports the function of the same name
    monkeypatch.setattr(sys.modules["tiepoints.training.recipes.train"], "require", missing)
    out = tmp_path / "x.safetensors"
    code, _, err = call("train", "keynet", "--images", photos, "--output", out)
    assert code == 2
    assert "tiepoints[train]" in err


def test_windows_must_be_numbers(photos, tmp_path):
    out = tmp_path / "x.safetensors"
    options = ["--images", photos, "--output", out, "--windows", "8,large"]
    code, _, err = call("train", "keynet", *options)
    assert code == 2
    assert "--windows must be comma-separated numbers" in err


def test_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "d.safetensors.checkpoint").write_bytes(b"no checkpoint")
    with pytest.raises(WeightsError, match="not a readable training checkpoint"):
        resumed_arguments(tmp_path / "d.safetensors", {})
