"""Submissions to the Image Matching Challenge: reading by the benchmark, violations of each rule,
and kills.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from test_cli import run, textured
from test_formats import some
from tiepoints.errors import DataError
from tiepoints.extract import ExtractOptions, Extractor
from tiepoints.formats import imc
from tiepoints.jobs.imc import MATCHING, export_imc
from tiepoints.structs import Features, Matches

h5py = pytest.importorskip("h5py")

#: Names as in the benchmark, with a dot or a hyphen.
NAMES = ("b.2", "c-3", "a_1")
PLACE = "phototourism/sacre_coeur"


class Fake:
    """An extractor of synthetic features, as many as the value of the upper left pixel."""

    def __init__(self, wait: float = 0.0):
        self.wait, self.seen = wait, 0

    options = None
    read = Extractor.read
    combine = staticmethod(Extractor.combine)

    def extract_tensor(self, batch: torch.Tensor, masks=None) -> list[Features]:
        time.sleep(self.wait)
        self.seen += 1
        return [some(round(float(image[0, 0, 0]) * 255)) for image in batch]


class FakeOptions(ExtractOptions):
    """Options that build a given extractor."""

    def __init__(self, extractor: Fake, **options):
        super().__init__(**options)
        object.__setattr__(self, "extractor", extractor)

    def build(self):
        return self.extractor


def draw(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), count, np.uint8)).save(path)


def export(root: Path, out: Path, extractor: Fake, **options):
    named = ("detector", "descriptor", "num_keypoints", "threshold", "single_scale")
    extraction = {k: options.pop(k) for k in named[:3] + named[4:] if k in options}
    matching = {k: options.pop(k) for k in ("ratio", "threshold") if k in options}
    return export_imc(
        root,
        out,
        options.pop("label", "ours"),
        FakeOptions(extractor, **{"num_keypoints": 2048, **extraction}),
        replace(MATCHING, **matching),
        progress=False,
        **options,
    )


def table(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {key: file[key][()] for key in file}


@pytest.fixture
def images(tmp_path) -> Path:
    """Two sequences in the layouts of the validation and test data, an image without keypoints, and
    other files.
    """
    root = tmp_path / "data"
    for name, count in zip(NAMES, (9, 0, 6), strict=True):
        draw(root / PLACE / "set_100" / "images" / f"{name}.png", count)
    (root / PLACE / "set_100" / "calibration").mkdir()
    draw(root / "pragueparks" / "wall" / "x.png", 7)
    draw(root / "pragueparks" / "wall" / "y.png", 5)
    (root / "pragueparks" / "wall" / "readme.txt").write_text("no image")
    (root / "phototourism.tar.gz").write_bytes(b"left by a download")
    return root


@pytest.fixture
def submission(images, tmp_path) -> Path:
    result = export(images, tmp_path / "sub", Fake(), matches=True)
    assert (result.failed, result.violations) == ([], [])
    return tmp_path / "sub"


def check(folder: Path) -> list[imc.Violation]:
    return imc.check_imc(folder, {PLACE: NAMES, "pragueparks/wall": ("x", "y")})


def test_benchmark_reads_our_submission(images, tmp_path):
    result = export(images, tmp_path / "sub", Fake())
    assert (result.failed, result.violations, result.sequences, result.extracted.done) == (
        [],
        [],
        2,
        5,
    )
    folder = tmp_path / "sub" / PLACE
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{kind}.h5" for kind in imc.FILES)
    tables = {kind: table(folder / f"{kind}.h5") for kind in imc.FILES}
    for kind, found in tables.items():
        assert set(found) == set(NAMES), kind
        assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}, kind
    for name, count in zip(NAMES, (9, 0, 6), strict=True):
        assert tables["keypoints"][name].shape == (count, 2)
        assert tables["descriptors"][name].shape == (count, 128)
        features = some(count)
        assert np.array_equal(tables["keypoints"][name], features.xy.numpy())
        assert np.array_equal(tables["scales"][name], features.scale.numpy())
        assert np.allclose(tables["angles"][name], np.degrees(features.angle.numpy()), atol=1e-3)
        for kind in imc.COLUMNS:
            assert tables[kind][name].shape == (count,)
        assert np.array_equal(tables["angles"][name], tables["orientations"][name])
        # as the importer reduces the number of keypoints
        best = np.argsort(tables["scores"][name])[::-1][: min(count, 4)]
        assert tables["keypoints"][name][best, :].shape == (min(count, 4), 2)
    (method,) = json.loads((tmp_path / "sub" / "config.json").read_text())
    assert method["config_common"] == {
        "json_label": "ours",
        "keypoint": "keynet-light",
        "descriptor": "hardnet-light",
        "num_keypoints": 2048,
    }
    assert set(method) == {
        "metadata",
        "config_common",
        "config_phototourism_stereo",
        "config_phototourism_multiview",
        "config_pragueparks_stereo",
        "config_pragueparks_multiview",
    }
    stereo = method["config_phototourism_stereo"]
    assert stereo["matcher"]["filtering"] == {"type": "snn_ratio_pairwise", "threshold": 0.95}
    assert stereo["matcher"]["symmetric"] == {"enabled": True, "reduce": "both"}
    assert stereo["geom"]["method"] == "cmp-degensac-f"
    assert stereo["geom"]["max_iter"] == 100000
    again = imc.read_sequence(folder)
    for name, count in zip(NAMES, (9, 0, 6), strict=True):
        features = some(count)
        assert torch.equal(again[name].xy, features.xy)
        assert torch.equal(again[name].descriptors, features.descriptors)
        assert torch.allclose(again[name].angle, features.angle, atol=1e-5)


def test_angles_are_degrees_clockwise_in_0_to_360(tmp_path):
    angles = torch.tensor([0.0, math.pi / 2, -math.pi / 2, 7.0, -1e-9])
    features = some(5)
    features = replace(features, keypoints=replace(features.keypoints, angle=angles))
    imc.write_sequence(tmp_path, [("a", features)])
    found = table(tmp_path / "orientations.h5")["a"]
    assert found == pytest.approx([0, 90, 270, math.degrees(7) - 360, 0], abs=1e-4)
    assert (found < 360).all()


def test_matches_have_the_greater_name_first(tmp_path):
    index = torch.tensor([[0, 4], [2, 1]])
    imc.write_sequence(tmp_path, [("a", some(5)), ("b-c", some(6)), ("b", some(3))])
    imc.write_matches(
        tmp_path,
        [("a", "b-c", Matches(index, torch.ones(2))), ("b-c", "b", Matches(index, torch.ones(2)))],
    )
    found = table(tmp_path / "matches.h5")
    assert sorted(found) == ["b-c-a", "b-c-b"]
    assert found["b-c-a"].tolist() == [
        [4, 1],
        [0, 2],
    ]  # the first row has keypoints of the first image
    assert found["b-c-b"].tolist() == [[0, 2], [4, 1]]
    assert found["b-c-a"].dtype == np.int32
    again = imc.read_matches(tmp_path / "matches.h5", ("a", "b", "b-c"))
    assert again["b-c", "a"].index.tolist() == index.flip(1).tolist()
    assert again["b-c", "b"].index.tolist() == index.tolist()
    nothing = Matches(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0))
    with pytest.raises(DataError, match="rename an image"):  # a-b-c is a with b-c, and a-b with c
        imc.write_matches(tmp_path, [("z", "y-x", nothing), ("z-y", "x", nothing)])
    assert table(tmp_path / "matches.h5").keys() == found.keys()
    with pytest.raises(DataError, match="b-c-a"):
        imc.read_matches(tmp_path / "matches.h5", ("b", "b-c"))


def test_custom_matches_of_every_pair(submission):
    """Including pairs of an image without keypoints, and settings that the benchmark allows with
    custom matches.
    """
    found = table(submission / PLACE / "matches.h5")
    assert sorted(found) == ["b.2-a_1", "c-3-a_1", "c-3-b.2"]
    assert {array.shape[0] for array in found.values()} == {2}
    assert found["c-3-a_1"].shape == (2, 0)
    (method,) = json.loads((submission / "config.json").read_text())
    assert method["config_phototourism_stereo"] == {
        "use_custom_matches": True,
        "custom_matches_name": "ours",
        "geom": {"method": "cv2-8pt"},
    }


# ---- violations of each rule


def change(path: str, key: str, value):
    """Replace, add or (with None) remove one array of a file."""

    def apply(folder: Path) -> None:
        with h5py.File(folder / path, "a") as file:
            if key in file:
                del file[key]
            if value is not None:
                file[key] = value

    return apply


def rename(path: str, old: str, new: str):
    def apply(folder: Path) -> None:
        with h5py.File(folder / path, "a") as file:
            file.move(old, new)

    return apply


def every(kinds, action):
    def apply(folder: Path) -> None:
        for kind in kinds:
            action(kind)(folder)

    return apply


def setting(path: str, value):
    """Set or (with None) remove a setting of the config; parts are separated by "."."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        *outer, last = path.split(".")
        inner = config[0]
        for part in outer:
            inner = inner[part]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def remove(path: str):
    return lambda folder: (folder / path).unlink()


def copy(old: str, new: str):
    return lambda folder: (folder / new).write_bytes((folder / old).read_bytes())


def move(old: str, new: str):
    return lambda folder: (folder / old).rename(folder / new)


def text(path: str, content: str):
    return lambda folder: (folder / path).write_text(content)


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


P = PLACE
NAN = np.full(9, np.nan, np.float32)
BROKEN = [
    # keypoints
    (change(f"{P}/keypoints.h5", "b.2", f32(9, 3)), "keypoints.h5", "b.2", "(n,2)", "x and y"),
    (
        change(f"{P}/keypoints.h5", "b.2", np.zeros((9, 2), int)),
        "keypoints.h5",
        "b.2",
        "floating",
        "float32",
    ),
    (
        change(f"{P}/keypoints.h5", "b.2", NAN[:, None] + f32(2)),
        "keypoints.h5",
        "b.2",
        "not finite",
        "again",
    ),
    (
        every(
            imc.FILES,
            lambda k: change(
                f"{P}/{k}.h5", "zz", f32(0, *{"keypoints": [2], "descriptors": [128]}.get(k, []))
            ),
        ),
        "keypoints.h5",
        "zz",
        "no such image",
        "remove",
    ),
    (
        every(imc.FILES, lambda k: change(f"{P}/{k}.h5", "b.2", None)),
        "keypoints.h5",
        "b.2",
        "no keypoints",
        "(0,2)",
    ),
    (
        every(imc.FILES, lambda k: rename(f"{P}/{k}.h5", "c-3", "c-3.png")),
        "keypoints.h5",
        "c-3.png",
        "extension",
        "rename it to c-3",
    ),
    (remove(f"{P}/keypoints.h5"), "keypoints.h5", "", "missing", "again"),
    (text(f"{P}/keypoints.h5", "nonsense"), "keypoints.h5", "", "not an HDF5 file", "again"),
    (
        every(["a"], lambda _: rename(f"{P}/keypoints.h5", "b.2", "sub/b.2")),
        "keypoints.h5",
        "sub",
        "group",
        "at the top",
    ),
    # descriptors
    (
        change(f"{P}/descriptors.h5", "b.2", f32(8, 128)),
        "descriptors.h5",
        "b.2",
        "(9,D)",
        "one row per keypoint",
    ),
    (
        change(f"{P}/descriptors.h5", "b.2", np.zeros((9, 128))),
        "descriptors.h5",
        "b.2",
        "float64",
        "convert",
    ),
    (
        change(f"{P}/descriptors.h5", "b.2", NAN[:, None] + f32(128)),
        "descriptors.h5",
        "b.2",
        "not finite",
        "again",
    ),
    (
        change(f"{P}/descriptors.h5", "c-3", f32(0, 64)),
        "descriptors.h5",
        "c-3",
        "64",
        "same descriptor",
    ),
    (
        change("pragueparks/wall/descriptors.h5", "x", f32(7, 32)),
        "descriptors.h5",
        "x",
        "64 to 2048",
        "another",
    ),
    (change(f"{P}/descriptors.h5", "b.2", None), "descriptors.h5", "b.2", "missing", "again"),
    (
        change(f"{P}/descriptors.h5", "zz", f32(0, 128)),
        "descriptors.h5",
        "zz",
        "not in keypoints.h5",
        "again",
    ),
    (remove(f"{P}/descriptors.h5"), "descriptors.h5", "", "missing", "again"),
    # one value per keypoint
    (
        change(f"{P}/scores.h5", "b.2", f32(9, 1)),
        "scores.h5",
        "b.2",
        "cannot sort",
        "one dimension",
    ),
    (change(f"{P}/scales.h5", "b.2", f32(8)), "scales.h5", "b.2", "(9,)", "one value per keypoint"),
    (change(f"{P}/scores.h5", "b.2", NAN), "scores.h5", "b.2", "not finite", "again"),
    (change(f"{P}/scores.h5", "b.2", np.zeros(9, int)), "scores.h5", "b.2", "floating", "float32"),
    (
        change(f"{P}/orientations.h5", "b.2", f32(9)),
        "orientations.h5",
        "b.2",
        "differs from angles.h5",
        "copy",
    ),
    (
        every(["angles", "orientations"], lambda k: change(f"{P}/{k}.h5", "b.2", f32(9) + 361)),
        "angles.h5",
        "b.2",
        "beyond 360",
        "degrees",
    ),
    (remove(f"{P}/orientations.h5"), "orientations.h5", "", "ignores angles.h5", "copy"),
    # matches
    (change(f"{P}/matches.h5", "c-3-b.2", None), "matches.h5", "c-3-b.2", "1 of 3 pairs", "(2,0)"),
    (
        rename(f"{P}/matches.h5", "c-3-b.2", "b.2-c-3"),
        "matches.h5",
        "b.2-c-3",
        "incorrect order",
        "c-3-b.2",
    ),
    (
        change(f"{P}/matches.h5", "c-3-zz", np.zeros((2, 0), int)),
        "matches.h5",
        "c-3-zz",
        "two images",
        "A-B",
    ),
    (
        change(f"{P}/matches.h5", "b.2-a_1", np.zeros((4, 2), int)),
        "matches.h5",
        "b.2-a_1",
        "(2,m)",
        "points of the first",
    ),
    (
        change(f"{P}/matches.h5", "b.2-a_1", f32(2, 3)),
        "matches.h5",
        "b.2-a_1",
        "integers",
        "int32",
    ),
    (
        change(f"{P}/matches.h5", "b.2-a_1", np.array([[8], [6]])),
        "matches.h5",
        "b.2-a_1",
        "9 and 6",
        "from 0",
    ),
    (remove(f"{P}/matches.h5"), "matches.h5", "", "use_custom_matches", "--matches"),
    (
        copy(f"{P}/matches.h5", f"{P}/matches_stereo.h5"),
        "matches.h5",
        "",
        "conflicts with",
        "keep",
    ),
    (
        move(f"{P}/matches.h5", f"{P}/matches_stereo_0.h5"),
        "matches_multiview.h5",
        "",
        "missing",
        "add",
    ),
    (
        move(f"{P}/matches.h5", f"{P}/matches_multiview.h5"),
        "matches_stereo.h5",
        "",
        "missing",
        "add",
    ),
    (
        copy(f"{P}/matches.h5", f"{P}/matches_stereo_1.h5"),
        "matches_stereo_1.h5",
        "",
        "no such file",
        "remove",
    ),
    # config
    (remove("config.json"), "config.json", "", "is missing", "again"),
    (text("config.json", "[{]"), "config.json", "", "not valid JSON", "again"),
    (text("config.json", "{}"), "config.json", "", "list of methods", "again"),
    (setting("metadata", None), "config.json", "metadata", "missing", "add"),
    (setting("metadata.authors", 3), "config.json", "metadata.authors", "str", "add"),
    (
        setting("config_common.json_label", "Ours!"),
        "config.json",
        "config_common.json_label",
        "Ours!",
        "rename",
    ),
    (
        setting("config_common.keypoint", "key_net"),
        "config.json",
        "config_common.keypoint",
        "key_net",
        "rename",
    ),
    (
        setting("config_common.num_keypoints", 1000),
        "config.json",
        "config_common.num_keypoints",
        "2048 or 8000",
        "category",
    ),
    (setting("config_common", None), "config.json", "config_common", "missing", "again"),
    (
        setting("config_mine_stereo", {}),
        "config.json",
        "config_mine_stereo",
        "no such setting",
        "remove",
    ),
    (
        setting("config_googleurban_stereo", {"use_custom_matches": True}),
        "config.json",
        "config_googleurban_stereo",
        "no files",
        "export",
    ),
    (
        setting("config_phototourism_stereo.use_custom_matches", None),
        "config.json",
        ".use_custom_matches",
        "true or false",
        "again",
    ),
    (
        setting("config_phototourism_stereo.custom_matches_name", "a_b"),
        "config.json",
        ".custom_matches_name",
        "a_b",
        "rename",
    ),
    (
        setting("config_phototourism_stereo.matcher", {}),
        "config.json",
        "stereo.matcher",
        "not allowed",
        "remove",
    ),
    # folders
    (
        move("pragueparks/wall", "pragueparks/walls"),
        "pragueparks/walls",
        "",
        "no such sequence",
        "remove",
    ),
    (lambda folder: (folder / "mine").mkdir(), "mine", "", "not a dataset", "phototourism"),
]


@pytest.mark.parametrize(("action", "file", "key", "problem", "remedy"), BROKEN)
def test_violated_rule_is_reported_with_file_key_and_remedy(
    submission, action, file, key, problem, remedy
):
    action(submission)
    found = check(submission)
    hits = [
        v
        for v in found
        if v.file.endswith(file)
        and v.key.endswith(key)
        and problem in v.problem
        and remedy in v.remedy
    ]
    assert hits, "\n".join(map(str, found))
    assert problem in str(hits[0])


def test_only_the_violated_rule_is_reported(submission):
    change(f"{P}/scores.h5", "b.2", f32(9, 1))(submission)
    change("pragueparks/wall/keypoints.h5", "x", f32(7, 3))(submission)
    assert [(v.file, v.key) for v in check(submission)] == [
        (f"{P}/scores.h5", "b.2"),
        ("pragueparks/wall/keypoints.h5", "x"),
    ]
    with pytest.raises(DataError, match="x must be"):
        imc.read_sequence(submission / "pragueparks" / "wall")


def test_categories_are_respected(images, tmp_path):
    draw(images / "pragueparks" / "wall" / "x.png", 250)
    out = tmp_path / "sub"
    export(images, out, Fake())
    big = np.zeros((2049, 2), np.float32)
    change("pragueparks/wall/keypoints.h5", "x", big)(out)
    hit = next(v for v in check(out) if "2049 keypoints" in v.problem)
    assert hit.remedy == "set num_keypoints to 8000, or export fewer"
    setting("config_common.num_keypoints", 8000)(out)
    assert not any("keypoints, but" in v.problem for v in check(out))
    change("pragueparks/wall/keypoints.h5", "x", np.zeros((8001, 2), np.float32))(out)
    assert "at most 8000" in next(v for v in check(out) if "8001 keypoints" in v.problem).remedy
    assert [imc.category(n) for n in (1, 2048, 2049, 8000)] == [2048, 2048, 8000, 8000]


def test_rules_without_custom_matches(images, tmp_path):
    out = tmp_path / "sub"
    export(images, out, Fake())
    for path, problem in (
        ("geom.threshold", "DEGENSAC"),
        ("matcher", "is missing"),
        ("geom", "is missing"),
    ):
        before = (out / "config.json").read_text()
        setting(f"config_phototourism_stereo.{path}", None)(out)
        assert [v.key for v in check(out) if problem in v.problem] == [
            f"config_phototourism_stereo.{path}"
        ]
        (out / "config.json").write_text(before)
    for kind in ("x", "y"):
        change("pragueparks/wall/descriptors.h5", kind, f32({"x": 7, "y": 5}[kind], 256))(out)
    assert any("512 bytes (1024)" in v.problem for v in check(out))
    before = (out / "config.json").read_text()
    for task in imc.TASKS:
        setting(f"config_phototourism_{task}", None)(out)
    assert any("would ignore the dataset" in v.problem for v in check(out))
    (out / "config.json").write_text(before)
    with h5py.File(out / PLACE / "matches.h5", "w"):
        pass
    assert any("does not set use_custom_matches" in v.problem for v in check(out))


def test_submissions_of_other_methods_are_read(tmp_path):
    """As in the benchmark's tutorial and examples: (n,1) columns, angles under one name, trailing
    commas.
    """
    path = tmp_path / PLACE
    path.mkdir(parents=True)
    for kind, shape in (
        ("keypoints", (3, 2)),
        ("descriptors", (3, 128)),
        ("scores", (3, 1)),
        ("angles", (3, 1)),
    ):
        change(f"{PLACE}/{kind}.h5", "a", np.full(shape, 90, np.float32))(tmp_path)
    config = imc.make_config(
        "theirs", "sift-def", "rootsift", 2048, ["phototourism"], ratio=0.9, threshold=0.5
    )
    (tmp_path / "config.json").write_text(
        json.dumps(config, indent=1).replace("\n}", ",\n}").replace("true\n", "true,\n")
    )
    assert ",\n" in (tmp_path / "config.json").read_text()
    assert [(Path(v.file).name, v.key) for v in imc.check_imc(tmp_path)] == [
        ("scores.h5", "a"),
        ("angles.h5", "a"),
        ("orientations.h5", ""),
    ]
    found = imc.read_sequence(path)["a"]
    assert found.angle.tolist() == pytest.approx([math.pi / 2] * 3)
    assert found.scale.tolist() == [1.0] * 3
    with pytest.raises(FileNotFoundError, match="no submission"):
        imc.check_imc(tmp_path / "none")


# ---- arguments, damaged images, resumed runs


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"label": "My Method"}, "try 'my-method'"),
        ({"label": ""}, "label may use lower case"),
        ({"num_keypoints": 8001}, "2048 or 8000"),
        ({"ratio": 0.05}, r"\[0.1, 1\]"),
        ({"threshold": 0.0}, "threshold"),
    ],
)
def test_invalid_arguments_raise_before_any_work(images, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        export(images, tmp_path / "sub", Fake(), **option)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_folders_of_other_layouts_raise(images, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder at"):
        imc.find_sequences(tmp_path / "none")
    with pytest.raises(
        DataError, match=r"must contain the benchmark's datasets.*found sacre_coeur"
    ):
        imc.find_sequences(images / "phototourism")
    draw(images / "photos" / "mine" / "a.png", 3)
    draw(images / "pragueparks" / "wall" / "x.jpg", 3)
    draw(images / "pragueparks" / "wall" / "z.bmp", 3)
    (images / "pragueparks" / "bare").mkdir()
    (images / "googleurban").mkdir()
    sequences, refused, _ = imc.find_sequences(images)
    assert {folder: sorted(found) for folder, found in sequences.items()} == {
        PLACE: sorted(NAMES),
        "pragueparks/wall": ["x", "y"],
    }
    reasons = {Path(path).name: reason for path, reason in refused}
    assert set(reasons) == {"photos", "x.png", "z.bmp", "bare", "googleurban"}
    assert "rename one" in reasons["x.png"]
    assert "convert" in reasons["z.bmp"]


def test_damaged_image_is_listed_and_others_are_processed(images, tmp_path):
    path = images / PLACE / "set_100" / "images" / "b.2.png"
    path.write_bytes(b"\x89PNG nonsense")
    extractor = Fake()
    result = export(images, tmp_path / "sub", extractor, matches=True)
    assert [Path(name).name for name, _ in result.failed] == ["b.2.png"]
    assert [(v.file, v.key) for v in result.violations] == [(f"{PLACE}/keypoints.h5", "b.2")]
    assert extractor.seen == 4
    config = json.loads((tmp_path / "sub" / "config.json").read_text())
    config[0]["metadata"]["authors"] = "We"
    (tmp_path / "sub" / "config.json").write_text(json.dumps(config))
    draw(path, 9)  # repaired: only this image is extracted
    again = export(images, tmp_path / "sub", extractor, matches=True)
    assert (again.failed, again.violations, extractor.seen) == ([], [], 5)
    assert (again.extracted.skipped, again.matched.skipped, again.matched.done) == (4, 2, 2)
    assert (
        json.loads((tmp_path / "sub" / "config.json").read_text())[0]["metadata"]["authors"] == "We"
    )
    with pytest.raises(DataError, match="--overwrite"):
        export(images, tmp_path / "sub", extractor, single_scale=True)


def test_files_are_replaced_atomically(submission):
    folder = submission / PLACE
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / ".scores.h5.77.part").write_bytes(b"left by a kill")

    def breaks():
        yield "a", some(3)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        imc.write_sequence(folder, breaks())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(ValueError, match="a has no descriptors"):
        imc.write_sequence(folder, [("a", replace(some(3), descriptors=None))])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


SLOW = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_imc import Fake, export
print("ready", flush=True)
export(Path(sys.argv[1]), Path(sys.argv[2]), Fake(wait=0.3), workers=1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_finished_results_survive_a_kill(tmp_path):
    root, out = tmp_path / "data", tmp_path / "sub"
    for i in range(30):
        draw(root / PLACE / f"p{i}.png", i)
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, root, out, Path(__file__).parent],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    journal = tmp_path / "sub.features.h5.journal"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (journal.is_file() and journal.stat().st_size > 20_000):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert journal.is_file()
    assert not (out / "config.json").exists()
    extractor = Fake()
    result = export(root, out, extractor)
    assert (result.failed, result.violations) == ([], [])
    assert 5 <= result.extracted.skipped == 30 - extractor.seen
    found = imc.read_sequence(out / PLACE)
    assert {name: len(features) for name, features in found.items()} == {
        f"p{i}": i for i in range(30)
    }
    assert all(
        torch.equal(features.descriptors, some(len(features)).descriptors)
        for features in found.values()
    )


def test_command(tmp_path):
    for i in range(2):
        (tmp_path / "data" / PLACE).mkdir(parents=True, exist_ok=True)
        Image.fromarray(textured(i)).save(tmp_path / "data" / PLACE / f"p{i}.png")
    arguments = (
        "imc",
        "data",
        "--output",
        "sub",
        "--detector",
        "keynet-tiny",
        "--descriptor",
        "rootsift",
        "--single-scale",
        "--num-keypoints",
        100,
    )
    bad = run(*arguments, "--label", "My_Method", cwd=tmp_path, ok=False)
    assert bad.returncode == 2
    assert "try 'my-method'" in bad.stderr
    done = run(*arguments, "--label", "ours", "--matches", cwd=tmp_path)
    for part in ("2 extracted", "1 pairs matched", "0 failed -> 1 sequences in sub"):
        assert part in done.stdout
    assert table(tmp_path / "sub" / PLACE / "keypoints.h5")["p0"].shape == (100, 2)
    (tmp_path / "data" / PLACE / "p2.png").write_bytes(b"nonsense")
    again = run(*arguments, "--label", "ours", cwd=tmp_path, ok=False)
    assert again.returncode == 1
    assert "0 extracted (0 keypoints), 2 done before; 1 failed" in again.stdout
    for part in ("p2.png", "keypoints.h5: p2: the image has no keypoints", "matches.h5: exists"):
        assert part in again.stderr
    assert (
        "descriptors"
        in run(*arguments, "--label", "a", "--descriptor", "none", cwd=tmp_path, ok=False).stderr
    )
