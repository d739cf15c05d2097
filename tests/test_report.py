"""The report: values are means of the rows, controls and published values are marked, and sections
without data are omitted.
"""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiepoints.errors import DataError
from tiepoints.evaluation.results import Rows, read_run
from tiepoints.report.merge import merge_runs
from tiepoints.report.papers import row_of_table_2, row_of_table_3
from tiepoints.report.report import repeated_points, write_report

VOID = {"meta", "img", "br", "rect", "circle", "path"}


class Reader(HTMLParser):
    """Collects tables (caption -> row name -> cells), headings, and external addresses; checks
    nesting.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, dict[str, list[str]]] = {}
        self.roles: dict[str, str] = {}
        self.headings: list[str] = []
        self.addresses: list[str] = []
        self.caption, self.row, self.text, self.role = "", [""], "", ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [
            value for key in ("src", "href", "xlink:href") if (value := given.get(key))
        ]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tbody":
            self.role = given.get("class") or ""
        if tag == "tr":
            self.row = []
        if tag in ("td", "th", "figcaption", "h2"):
            self.text = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.row.append(self.text)
        if tag == "figcaption":
            self.caption = self.text
        if tag == "h2":
            self.headings.append(self.text)
        if tag == "tr" and "tbody" in self.open and len(self.row) > 1:
            self.tables.setdefault(self.caption, {})[self.row[0]] = self.row[1:]
            self.roles[self.row[0]] = self.role

    def handle_data(self, data: str) -> None:
        self.text += data


def row(
    system: str, sequence: str, pair: str, kind: str = "view", **changes: Any
) -> dict[str, Any]:
    metrics = {
        "keynet.rep_SL": 0.5,
        "keynet.rep_L": 0.75,
        "keynet.err_SL": 0.125,
        "mutual.rep@1": 0.125,
        "mutual.rep@3": 0.25,
    }
    entry = {
        "system": system,
        "sequence": sequence,
        "kind": kind,
        "pair": pair,
        "image_a": "",
        "image_b": "",
        "H_ab": np.eye(3).tolist(),
    }
    return entry | {"ok": True, "reason": "", "seconds": 0.5, "metrics": metrics} | changes


def write(folder: Path, rows: list[dict[str, Any]], part: str = "rows", **metadata: Any) -> Path:
    (folder / part).mkdir(parents=True, exist_ok=True)
    systems = list(dict.fromkeys(r["system"] for r in rows))
    for system in systems:
        lines = [json.dumps(r) for r in rows if r["system"] == system]
        (folder / part / f"{system.replace('<', '-')}.jsonl").write_text("\n".join(lines) + "\n")
    if part == "rows":
        known = {
            "dataset": {"name": "made", "root": "made"},
            "num_points": 1000,
            "mode": "si",
            "systems": systems,
        }
        (folder / "run.json").write_text(json.dumps(known | metadata))
    return folder


def read(folder: Path | list[Path], **options: Any) -> tuple[Reader, str]:
    files = write_report(folder, **options)
    return Reader(files.html.read_text(encoding="utf-8")), files.markdown.read_text(
        encoding="utf-8"
    )


def test_tables_hold_the_means_of_the_rows(tmp_path: Path) -> None:
    values = [0.10, 0.30, 0.80]
    rows = [
        row(
            "one",
            "v_a",
            f"1-{k}",
            metrics={"keynet.rep_SL": v, "keynet.err_SL": None if k else 0.2},
        )
        for k, v in enumerate(values)
    ]
    rows += [row("two", "i_b", "1-2", "illum", metrics={"keynet.rep_SL": 0.9})]
    page, markdown = read(write(tmp_path, rows))
    assert page.tables["Viewpoint"]["one"][:2] == [
        "40.0",
        "0.200",
    ]  # null is skipped, not counted as zero
    assert page.tables["Viewpoint"]["one"][-1] == "3"
    assert "two" not in page.tables["Viewpoint"]
    assert page.tables["All pairs"]["two"][0] == "90.0"
    assert "| one | 40.0 |" in markdown
    assert "| **90.0** |" in markdown  # the best of all pairs
    assert not [address for address in page.addresses if not address.startswith(("#", "data:"))]


def test_failed_pair_is_listed_and_excluded_from_means(tmp_path: Path) -> None:
    rows = [
        row("one", "v_a", "1-2"),
        row("one", "v_a", "1-3", ok=False, reason="DataError: broken | image", metrics={}),
    ]
    page, markdown = read(write(tmp_path, rows))
    assert page.tables["Viewpoint"]["one"][0] == "50.0"
    assert page.tables["Viewpoint"]["one"][-1] == "1 of 2"
    assert page.tables["1 failure, excluded from all means"]["one"] == [
        "v_a",
        "1-3",
        "DataError: broken | image",
    ]
    assert r"broken \| image" in markdown


def test_last_row_of_a_pair_is_used_and_incomplete_line_is_noted(tmp_path: Path) -> None:
    rows = [row("one", "v_a", "1-2", ok=False, reason="x", metrics={}), row("one", "v_a", "1-2")]
    write(tmp_path, rows, systems=["one", "later"])
    with (tmp_path / "rows" / "one.jsonl").open("a") as file:
        file.write('{"system": "one", "seq')
    run = read_run(tmp_path)
    assert [r.ok for r in run.rows] == [True]
    assert len(run.notes) == 2
    assert "later" in run.notes[1]
    assert Rows(run).mean("view", "one", "keynet.rep_L") == 0.75


def test_controls_and_published_values_are_separate(tmp_path: Path) -> None:
    rows = [row(s, "v_a", "1-2") for s in ("lattice", "one", "random")]
    rows[0]["metrics"] = {"keynet.rep_SL": 0.9, "keynet.rep_L": 0.8125}
    page, markdown = read(write(tmp_path, rows, controls=["random", "lattice"]))
    table = page.tables["Viewpoint"]
    names = list(table)
    assert names[:4] == ["one", "lattice control", "random control", "SIFT-SI published"]
    assert table["Key.Net-SI published"][:3] == ["60.5", "73.2", "0.19"]
    assert page.roles["lattice control"] == "control"
    assert page.roles["Key.Net-SI published"] == "published"
    assert "| *lattice* (control) | 90.0 |" in markdown  # not in bold: a control is never the best
    assert "| *Key.Net-SI* (published) | 60.5 |" in markdown
    assert "has a repeatability of 81.2 % in L" in markdown
    assert "chance-corrected columns subtract" in markdown


def test_sections_without_data_are_omitted(tmp_path: Path) -> None:
    page, markdown = read(write(tmp_path, [row("one", "x", "1-2", "other")]))
    assert page.headings == [
        "Repeatability",
        "Repeatability by threshold",
        "Sequences",
        "Definitions of the columns",
    ]
    assert "published" not in "".join(
        page.tables["All pairs"]
    )  # other changes than those of the paper
    assert "This run has no controls" in markdown


def test_matching_homography_sweeps_and_bias(tmp_path: Path) -> None:
    metrics = {f"keynet.mma@{t}": t / 10 for t in range(1, 11)} | {
        "keynet.score@5": 0.3,
        "keynet.matches": 7,
        "mutual.rep@3": 0.5,
    }
    metrics |= {"rekd.repeatability": 0.4, "rekd.mma@3": 0.6, "rekd*.mma@3": 0.7}
    rows = [
        row("one", "v_a", f"1-{k}", metrics=metrics | {"homography.error": e})
        for k, e in enumerate((0.0, None))
    ]
    write(tmp_path, rows)
    sweeps = [
        {
            "system": "one",
            "image": "a",
            "kind": "rotation",
            "value": v,
            "metrics": {"mutual.rep@3": v / 100},
        }
        for v in (50, 100)
    ]
    failed = {
        "system": "two",
        "image": "a",
        "kind": "scale",
        "ok": False,
        "reason": "too small",
        "metrics": {},
    }
    write(tmp_path, [*sweeps, failed], "sweeps")
    shifts = {"mirror_x": {"dx": 6.0, "dy": 0.0}, "mirror_y": {"dx": 0.0, "dy": -8.0}}
    write(
        tmp_path,
        [{"system": "one", "image": "a", "kind": kind, "metrics": m} for kind, m in shifts.items()],
        "bias",
    )
    page, _ = read(tmp_path)
    assert page.tables["Matching, Key.Net protocol"]["one"] == ["30.0", "30.0", "7"]
    assert page.tables["Matching, Key.Net protocol"]["Key.Net + HardNet published"] == [
        "32.3",
        "–",
        "–",
    ]
    assert page.tables["correct matches % by threshold px"]["4"] == ["40.0"]
    assert page.tables["REKD protocol, viewpoint"]["one*"] == ["–", "70.0"]
    homography = next(
        table
        for caption, table in page.tables.items()
        if caption.startswith("Homography by PoseLib")
    )
    assert homography["one"][-1] == "50.0"  # one of two pairs without an estimate
    assert page.tables["repeatability % at 3 px by rotation in degrees"]["50"] == ["50.0"]
    assert page.tables["Localization bias, mean over the images"]["one"] == [
        "6.00",
        "-8.00",
        "5.00",
    ]
    assert page.tables["Viewpoint"]["one"][-3] == "5.00"
    assert page.tables["1 failure, excluded from all means"]["two"] == ["a", "scale", "too small"]


def test_poses_have_a_separate_table(tmp_path: Path) -> None:
    metrics = [{"pose.error_poselib": error, "pose.error_opencv": 0.0} for error in (0.0, 180.0)]
    rows = [
        row("one", "scene", str(k), "pose", H_ab=None, metrics=m) for k, m in enumerate(metrics)
    ]
    page, markdown = read(write(tmp_path, rows))
    (table,) = (
        table for caption, table in page.tables.items() if caption.startswith("Relative pose")
    )
    assert table["one"] == [
        "50.0",
        "50.0",
        "50.0",
        "50.0",
        "100.0",
        "100.0",
        "100.0",
        "0.0",
        "0.500",
        "2",
    ]
    assert "Repeatability" not in page.headings
    assert "lattice" not in markdown  # no controls to explain


def test_images_and_curve_by_number_of_keypoints_use_stored_features(tmp_path: Path) -> None:
    gen = np.random.default_rng(0)
    folder = tmp_path / "data" / "v_a"
    folder.mkdir(parents=True)
    for k in (1, 2):
        Image.fromarray(gen.integers(0, 255, (120, 160), dtype=np.uint8)).save(folder / f"{k}.png")
    x, y = np.meshgrid(np.arange(20, 140, 8.0), np.arange(20, 100, 8.0))
    xy = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)
    order = gen.permutation(len(xy))
    store = tmp_path / "features" / "one" / "v_a"
    store.mkdir(parents=True)
    ones, descriptors = np.ones(len(xy), np.float32), np.eye(len(xy), dtype=np.float16)[order]
    for stem, moved in (("1", 0.0), ("2", np.where(np.arange(len(xy)) < 100, 1.0, 4.0)[:, None])):
        points = (xy[order] + moved).astype(np.float32)
        stored = {
            "xy": points,
            "scale": ones,
            "angle": ones,
            "score": ones,
            "descriptors": descriptors,
        }
        np.savez(store / f"{stem}.npz", **stored, image_size=(160, 120), seconds=0.1)
    images = {"image_a": str(folder / "1.png"), "image_b": str(folder / "2.png")}
    page, markdown = read(
        write(tmp_path, [row("one", "v_a", "1-2", **images, metrics={"mutual.rep@3": 2 / 3})]),
        pictures=1,
    )
    assert sum(address.startswith("data:image/") for address in page.addresses) == 3
    assert "one on v\\_a 1-2: 100 of 150 keypoints" in markdown
    named = write_report(tmp_path, pairs=["v_a:1-2"], only=["one"]).markdown.read_text()
    assert "one on v\\_a 1-2: 100 of 150 keypoints" in named
    with pytest.raises(ValueError, match=r"no pair 'v_a:1-9'; pairs are named like v_a:1-2"):
        write_report(tmp_path, pairs=["v_a:1-9"])
    with pytest.raises(ValueError, match="no system 'two'"):
        write_report(tmp_path, pairs=["v_a:1-2"], only=["two"])
    assert "150 mutual matches, 100 correct within 3 px (blue), 50 incorrect" in markdown
    assert page.tables["repeatability % by number of keypoints"] == {
        "100": ["100.0"],
        "250": ["66.7"],
        "500": ["66.7"],
        "1000": ["66.7"],
    }
    assert "Keypoints and matches" not in read(tmp_path, pictures=0)[0].headings


def test_repeated_points_are_one_to_one() -> None:
    a, b = torch.tensor([[0.0, 0], [1, 0], [50, 50]]), torch.tensor([[1.5, 0], [54, 50]])
    found_a, found_b = repeated_points(a, b, torch.eye(3, dtype=torch.float64))
    assert found_a.tolist() == [False, True, False]
    assert found_b.tolist() == [True, False]


def test_several_runs_are_combined_in_one_curve(tmp_path: Path) -> None:
    folders = [
        write(
            tmp_path / str(n),
            [row("one", "v_a", "1-2", metrics={"keynet.rep_SL": n / 1000})],
            num_points=n,
        )
        for n in (500, 250)
    ]
    files = write_report(folders, tmp_path / "out" / "page.html")
    page = Reader(files.html.read_text())
    assert files.markdown == tmp_path / "out" / "page.md"
    assert page.tables["repeatability % by number of keypoints"] == {
        "250": ["25.0"],
        "500": ["50.0"],
    }
    # both are in the tables, named by what differs
    table = page.tables["Viewpoint"]
    assert table["one (500 keypoints)"][0] == "50.0"
    assert table["one (250 keypoints)"][0] == "25.0"


def test_runs_of_one_scale_and_of_many_are_merged(tmp_path: Path) -> None:
    known = {"keynet": "keynet", "fast": "fast"}
    si = write(
        tmp_path / "si",
        [row(name, "v_a", "1-2", metrics={"keynet.rep_SL": 0.6}) for name in known],
        made_by=known,
    )
    ti_rows = [
        row("keynet", "v_a", "1-2", metrics={"keynet.rep_SL": 0.3}),
        row("fast", "v_a", "1-2", metrics={"keynet.rep_SL": 0.6, "mutual.rep@3": 0.5}),
        row("fast", "v_a", "1-3", metrics={"keynet.rep_SL": 0.2}),
    ]
    ti = write(tmp_path / "ti", ti_rows, made_by=known, mode="ti")
    page, markdown = read([si, ti], out=tmp_path / "out")
    table = page.tables["Viewpoint"]
    assert table["keynet (SI)"][0] == "60.0"
    assert table["keynet (TI)"][0] == "30.0"
    assert table["fast"][:2] == ["40.0", "50.0"]  # one way to detect: the pairs of both runs
    assert "si: 1000 keypoints, multiple scales (SI); ti: 1000 keypoints" in markdown
    paper = page.tables["Table 2"]
    assert paper["Key.Net-SI: keynet (SI)"][:2] == ["60.0", "60.5"]
    assert paper["Key.Net-TI: keynet (TI)"][:2] == ["30.0", "34.2"]
    assert paper["FAST-TI: fast"][:2] == ["40.0", "30.4"]
    assert paper["LIFT-SI published"][:2] == ["–", "43.4"]


def test_merged_runs_keep_the_mode_of_each_system(tmp_path: Path) -> None:
    folders = []
    for mode, names in (("si", ("keynet", "sobelnet")), ("ti", ("keynet", "fast", "keynet@ti"))):
        rows = [row(name, "v_a", "1-2") for name in names]
        made_by = {name: name for name in names}
        folders.append(write(tmp_path / mode, rows, made_by=made_by, mode=mode))
    merged = merge_runs([read_run(folder) for folder in folders])
    modes = {"keynet (SI)": "si", "sobelnet (SI)": "si"}
    modes |= {"keynet (TI)": "ti", "fast": "ti", "keynet@ti (TI)": "ti"}
    assert merged.metadata["modes"] == modes
    assert merged.systems == list(modes)
    assert merged.metadata["made_by"]["keynet (TI)"] == "keynet"
    assert {made.system for made in merged.rows} == set(modes)
    # merged runs can be merged again
    third = write(tmp_path / "third", [row("sift", "v_a", "1-2")], made_by={"sift": "sift"})
    again = merge_runs([merged, read_run(third)])
    assert again.metadata["modes"] == {**modes, "sift": "si"}


def test_other_results_of_the_same_name_keep_their_rows(tmp_path: Path) -> None:
    first = write(tmp_path / "first", [row("own", "v_a", "1-2", metrics={"keynet.rep_SL": 0.6})])
    second = write(tmp_path / "second", [row("own", "v_a", "1-2", metrics={"keynet.rep_SL": 0.5})])
    page, _ = read([first, second], out=tmp_path / "out")
    assert page.tables["Viewpoint"]["own"][0] == "60.0"
    assert page.tables["Viewpoint"]["own (second)"][0] == "50.0"


def test_runs_of_other_images_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "first", [row("one", "v_a", "1-2")])
    moved = {"name": "made", "root": "elsewhere"}
    same = write(tmp_path / "same", [row("two", "v_a", "1-2")], dataset=moved)
    page, _ = read([first, same], out=tmp_path / "out")  # the same pairs in another folder
    assert set(page.tables["Viewpoint"]) >= {"one", "two"}
    H = (2 * np.eye(3)).tolist()
    other = write(tmp_path / "other", [row("two", "v_a", "1-2", H_ab=H)], dataset=moved)
    with pytest.raises(DataError, match=r"other measured images of elsewhere.*report of each"):
        write_report([first, other])
    resized = write(tmp_path / "resized", [row("two", "v_a", "1-2")], resize=[640])
    with pytest.raises(DataError, match=r"resized images differently.*report of each"):
        write_report([first, resized])


def test_rows_of_the_key_net_paper() -> None:
    assert row_of_table_2("keynet", "keynet", False) == "Key.Net-SI"
    assert row_of_table_2("keynet@ti", "keynet@ti", False) == "Key.Net-TI"
    assert row_of_table_2("keynet", "keynet", True) == "Key.Net-TI"
    assert row_of_table_2("t", "keynet-tiny@official", False) == "Tiny-Key.Net-SI"
    assert row_of_table_2("t", "keynet-tiny@ti", False) is None  # not in the paper
    assert row_of_table_2("LF-Net", "features/lf", False) == "LF-Net-SI"
    assert row_of_table_2("own", "features/lf", False) is None
    assert row_of_table_2("s", "sift@upright+hardnet", False) is None
    assert row_of_table_3("sift", "sift@upright+hardnet", False) == "SIFT + HardNet"
    assert row_of_table_3("sift", "sift+hardnet", False) is None  # rotated patches
    assert row_of_table_3("sift", "sift", False) is None
    assert row_of_table_3("keynet", "keynet", False) == "Key.Net + HardNet"
    assert row_of_table_3("keynet", "keynet@dominant", False) is None
    assert row_of_table_3("lift", "features/lift", False) == "LIFT"
    assert row_of_table_3("lift", "features/lift@upright+hardnet", False) == "LIFT + HardNet"
    assert row_of_table_3("superpoint", "superpoint", False) == "SuperPoint"
    assert row_of_table_3("superpoint", "superpoint+hardnet", False) == "SuperPoint + HardNet"


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    page, markdown = read(
        write(
            tmp_path,
            [
                row("a<b>&", evil, "1|2", ok=True),
                row("a<b>&", evil, "3", ok=False, reason=evil, metrics={}),
            ],
        )
    )
    assert page.tables["Viewpoint"]["a<b>&"][0] == "50.0"
    assert page.tables["1 failure, excluded from all means"]["a<b>&"][2] == evil
    assert "<script" not in markdown


def test_invalid_folders_raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.*tiepoints evaluate"):
        write_report(tmp_path / "gone")
    with pytest.raises(DataError, match=f"{tmp_path.name} has no run.json.*tiepoints evaluate"):
        write_report(tmp_path)
    write(tmp_path, [row("one", "v_a", "1-2")])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json cannot be read"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "rows" / "one.jsonl").unlink()
    with pytest.raises(DataError, match="holds no rows"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        write_report([])
