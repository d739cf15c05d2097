"""Tables and figures of the Key.Net paper, with tiny trainings and a miniature of HPatches."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import call, texture, write_photos
from tiepoints.jobs import variants
from tiepoints.jobs.reproduce import PARTS, ReproduceOptions, _as_gray, printed, reproduce
from tiepoints.jobs.variants import (
    BUDGETS,
    Budget,
    base_variants,
    filter_variants,
    level_variants,
    window_variants,
)
from tiepoints.report import published
from tiepoints.weights import load

pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def hpatches(tmp_path_factory):
    """A miniature in HPatches' layout: one sequence of each kind, shifted by whole pixels."""
    root = tmp_path_factory.mktemp("hpatches")
    for seed, name in enumerate(("v_shift", "i_shift")):
        (root / name).mkdir()
        wide = texture(20 + seed, (240, 180))
        for k in (1, 2):
            left = 4 * k * (name[0] == "v")
            wide.crop((left, 0, left + 224, 180)).save(root / name / f"{k}.ppm")
            if k > 1:
                shift = 4 * (1 - k) * (name[0] == "v")
                np.savetxt(root / name / f"H_1_{k}", [[1, 0, shift], [0, 1, 0], [0, 0, 1]])
    return root


@pytest.fixture
def tiny(monkeypatch):
    """A budget of two steps."""
    schedule = {"steps": 2, "batch_size": 2, "validate_every": 2}
    budget = Budget("msip", "keynet-paper", 64, 4, 2, schedule)
    monkeypatch.setitem(BUDGETS, "quick", budget)
    monkeypatch.setattr(variants, "SEEDS", 1)


def test_variants_are_those_of_the_paper():
    windows = window_variants()
    assert [v.published for v in windows] == [70.5, 74.6, 76.8, 77.6, 65.7, 71.4, 73.2, 74.9, 79.1]
    assert windows[2].options == {"windows": (8, 16, 24)}
    assert windows[2].slug == "windows-8-16-24"
    assert windows[-1].slug == "full"
    assert len(filter_variants()) == 12
    assert {v.slug for v in filter_variants()} >= {"full", "blocks-1_handcrafted-none"}
    levels = [v.options.get("levels", 3) for v in level_variants()]
    assert levels == [1, 2, 3, 4, 5]
    assert base_variants()[2].options == {}
    # the full network is the same in all tables, and is trained once
    assert sum(v.slug == "full" for v in (*windows, *filter_variants(), *level_variants())) == 3


def test_table_of_trained_variants(photos, tmp_path, tiny):
    work = ["--images", photos, "--output", tmp_path / "w", "--workers", 1, "--device", "cpu"]
    code, out, err = call("reproduce", "keynet", "--table", "1a", "--only", "1 level", *work)
    assert code == 0, err
    assert "| 1 level |" in out
    assert "72.5" in out
    content = json.loads((tmp_path / "w" / "table-1a-quick.json").read_text())
    (row,) = content["rows"]
    assert row["published"] == 72.5
    assert row["parameters"] == 5873 - 2 * 200
    assert 0 <= row["paper"] <= 100
    # a second run trains nothing
    stamp = (tmp_path / "w" / "variants-quick" / "keynet-levels-1-seed0.safetensors").stat()
    work.append("--json")
    code, out, err = call("reproduce", "keynet", "--table", "1a", "--only", "1 level", *work)
    assert code == 0, err
    assert json.loads(out)["rows"] == [row]
    again = (tmp_path / "w" / "variants-quick" / "keynet-levels-1-seed0.safetensors").stat()
    assert again.st_mtime_ns == stamp.st_mtime_ns


def test_figure_of_windows(photos, tmp_path, tiny, monkeypatch):
    # two steps make maps of zeros: shipped networks are drawn instead of those that were trained
    shown = iter(("keynet-tiny", "keynet", "sobelnet", "keynet-tiny"))
    monkeypatch.setattr("tiepoints.jobs.reproduce.load", lambda path: load(next(shown)))
    options = ReproduceOptions("figure 3", tmp_path, images=photos, only="8 16", device="cpu")
    result = reproduce(options)
    windows = ("8 16", "8 16 24", "8 16 24 32", "8 16 24 32 40")
    assert [row["name"] for row in result.content["rows"]] == [f"M-SIP {w}" for w in windows]
    # a column for each: the photograph of 330 x 270 with keypoints, and below it the score map
    picture = np.asarray(Image.open(tmp_path / "figure-3-quick.png")).astype(int)
    height, width = picture.shape[0] // 2, picture.shape[1] // 4
    assert width / height == pytest.approx(330 / 270, rel=0.01)
    assert picture.shape == (2 * height, 4 * width, 3)
    columns = [picture[:, i * width : (i + 1) * width] for i in range(4)]
    for column in columns:
        assert np.ptp(column[:height], axis=2).max() > 60  # in color
        assert np.ptp(column[height:], axis=2).max() == 0
        assert np.ptp(column[height:]) > 100
    assert not np.array_equal(columns[0], columns[1])
    assert not np.array_equal(columns[1], columns[2])
    assert np.array_equal(columns[0], columns[3])


def test_a_map_of_zeros_is_white():
    assert (_as_gray(torch.zeros(1, 1, 6, 8), (4, 3)) == 255).all()


def test_table_2_on_a_miniature(hpatches, tmp_path):
    work = ["--data", hpatches, "--output", tmp_path, "--num-keypoints", 100, "--device", "cpu"]
    code, out, err = call("reproduce", "keynet", "--table", "2", "--only", "Key.Net", *work)
    assert code == 0, err
    content = json.loads((tmp_path / "table-2-shipped.json").read_text())
    rows = {(row["name"], row["split"]): row for row in content["rows"]}
    assert len(rows) == 6
    row = rows["Key.Net-TI", "view"]
    assert row["L published"] == published.TABLE_2["Key.Net-TI"][0].rep_L
    assert row["L ours"] > 80  # shifted by whole pixels
    assert row["S range ours"] == 1.0
    assert rows["Key.Net-SI", "illum"]["S range ours"] > 2
    assert "Key.Net, table 2, viewpoint" in out


def test_table_3_on_a_miniature(hpatches, tmp_path):
    only = "Tiny-Key.Net"
    options = ReproduceOptions(
        "table 3", tmp_path, data=hpatches, only=only, num_keypoints=100, device="cpu"
    )
    (row,) = reproduce(options).content["rows"]
    assert row["matching score %, viewpoint published"] == 33.2
    assert row["matching score %, illumination ours"] > 60
    with pytest.raises(ValueError, match="no row contains 'XYZ'"):
        reproduce(ReproduceOptions("table 3", tmp_path, data=hpatches, only="XYZ"))


def test_features_on_disk_make_a_row(hpatches, tmp_path):
    folder = tmp_path / "features"
    code, _, err = call(
        *("extract", hpatches, "--output", folder, "--descriptor", "hardnet"),
        *("--detector", "keynet-tiny", "--num-keypoints", 200, "--device", "cpu"),
    )
    assert code == 0, err
    options = ReproduceOptions(
        "table 3",
        tmp_path / "w",
        data=hpatches,
        only="LIFT",
        features=(f"LIFT={folder}",),
        num_keypoints=100,
        device="cpu",
    )
    rows = reproduce(options).content["rows"]
    assert [row["name"] for row in rows] == ["LIFT"]
    assert rows[0]["matching score %, viewpoint published"] == 26.8
    assert rows[0]["matching score %, viewpoint ours"] > 60


def test_table_4_counts_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr("tiepoints.jobs.reproduce.TIMED_SIDE", 64)
    result = reproduce(ReproduceOptions("table 4", tmp_path))
    rows = {row["name"]: row for row in result.content["rows"]}
    assert rows["Key.Net"]["parameters ours"] == 5873
    assert rows["Tiny-Key.Net"]["parameters ours"] == 253
    assert rows["Tiny-Key.Net"]["parameters published"] == 260
    assert rows["SuperPoint"]["parameters ours"] is None
    assert "table 4" in (tmp_path / "table-4-shipped.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --table or --figure"),
        (["--table", "1a", "--figure", "5"], "either --table or --figure"),
        (["--table", "1a"], "give a folder of photographs"),
        (["--table", "2"], "HPatches' layout"),
        (["--table", "3", "--features", "LIFT"], "ROW=PATH"),
    ],
)
def test_missing_data_is_named(tmp_path, arguments, message):
    code, _, err = call("reproduce", "keynet", *arguments, "--output", tmp_path / "w")
    assert code == 2
    assert message in err


def test_published_values_are_those_of_the_split():
    assert printed(published.TABLE_3, "LIFT", "view") == 26.8
    assert printed(published.TABLE_3, "LIFT", "illum") == 36.5
    assert printed(published.TABLE_3, "LIFT", "other") is None
    assert printed(published.TABLE_3, "ours", "view") is None


def test_unknown_parts():
    assert len(PARTS) == 7
    with pytest.raises(ValueError, match="the part must be one of"):
        ReproduceOptions("table 9", None)
    with pytest.raises(ValueError, match="budget"):
        ReproduceOptions("table 4", None, budget="large")
