"""Input that is meant to do harm, or holds no numbers: nothing is run, nothing is written outside
the folder of results, and no result is invented.
"""

from __future__ import annotations

import json
import pickle
import shutil
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from drilling import content, run, texture, write_photos
from PIL import Image
from safetensors.torch import load_file, save_file

import tiepoints
from tiepoints.checkpoints import load_official
from tiepoints.errors import DataError, WeightsError
from tiepoints.evaluation.results import load_features, read_run
from tiepoints.formats.npy import FeatureFolder
from tiepoints.report.report import write_report
from tiepoints.structs import Features
from tiepoints.training.loop import read_checkpoint
from tiepoints.weights import DATA, load

FEW = ("--num-keypoints", 30, "--single-scale")
NAMES = [
    "<script>alert(1)</script>",
    'a" onload="alert(1)',
    "</title></figcaption><img src=x onerror=alert(1)>",
    "a|b|c",
    "`x` **b** [l](javascript:alert(1)) ![i](http://x)",
    "two\nlines\n# heading\n\n---",
    "../../../outside",
    "{{ 7 * 7 }} {% raw %} ${7*7}",
    "~~s~~ \\| &lt;b&gt; <http://x>",
]


class Marker:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ---- reports


class Elements(HTMLParser):
    """The elements and event handlers of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [key for key, _ in attrs if key.startswith("on")]
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]


def write_results(folder: Path, hostile: str) -> Path:
    """Results of an evaluation in which every text is ``hostile``."""
    rows = [
        {
            **{"system": system, "sequence": hostile, "pair": hostile, "kind": "view"},
            **{"image_a": hostile, "image_b": f"../{hostile}.png", "H_ab": np.eye(3).tolist()},
            **{"ok": ok, "reason": hostile, "seconds": 0.5},
            "metrics": {"mutual.rep@3": 0.5, "keynet.rep_SL": 0.25} if ok else {},
        }
        for system in (hostile, "other")
        for ok in (True, False)
    ]
    (folder / "rows").mkdir(parents=True)
    for number, system in enumerate((hostile, "other")):
        lines = [json.dumps(row) for row in rows if row["system"] == system]
        (folder / "rows" / f"s{number}.jsonl").write_text("\n".join(lines) + "\n")
    metadata = {"dataset": {"name": hostile, "root": hostile}, "systems": [hostile, "other"]}
    metadata |= {"protocols": [hostile], "versions": {hostile: hostile}, "mode": hostile}
    (folder / "run.json").write_text(json.dumps(metadata))
    return folder


def test_reports_with_hostile_names(tmp_path, drill):
    """The page has the elements of one with harmless names; so has the rendered Markdown."""
    markdown_it = pytest.importorskip("markdown_it")
    render = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render
    usual = write_report(write_results(tmp_path / "usual", "usual"))
    expected = Elements(usual.html.read_text(encoding="utf-8"))
    expected_markdown = Elements(render(usual.markdown.read_text(encoding="utf-8")))
    for index, name in enumerate(NAMES):
        with drill.run(name):
            folder = write_results(tmp_path / "inside" / str(index), name)
            files = write_report(folder)
            page = Elements(files.html.read_text(encoding="utf-8"))
            assert page.tags == expected.tags
            assert not page.handlers
            assert page.addresses == expected.addresses
            markdown = Elements(render(files.markdown.read_text(encoding="utf-8")))
            assert markdown.tags == expected_markdown.tags, files.markdown.read_text()
            assert not markdown.addresses
            assert read_run(folder).systems[0] == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "usual"]


# ---- values that are no numbers


def test_images_with_nan(tmp_path, drill):
    """Features are finite, or the image is refused by its name."""
    photos = write_photos(tmp_path / "photos", 1)
    values = np.asarray(texture(size=(160, 120)), dtype=np.float32)
    for name, value in (("nan", np.nan), ("inf", np.inf), ("low", -np.inf), ("huge", 3e38)):
        for part in ("pixel", "half", "all"):
            broken = values.copy()
            broken[{"pixel": (50, 60), "half": slice(0, 60), "all": slice(None)}[part]] = value
            Image.fromarray(broken).save(photos / f"{name}-{part}.tif")
    output = run(["extract", photos, "--output", "out", *FEW], tmp_path / "run", codes=(0, 1))
    found = content(tmp_path / "run" / "out")
    for path in sorted(photos.iterdir()):
        with drill.run(path.name):
            arrays = [np.array(v[""]) for n, v in found.items() if f"{path.name}." in n]
            assert arrays or f"{path}: " in output, output
            assert all(np.isfinite(array).all() for array in arrays)


def test_weights_with_nan(tmp_path, drill):
    """A detector or a descriptor with weights that are no numbers is refused by its name."""
    photos = write_photos(tmp_path / "photos", 1)
    for name, option in (("keynet-tiny", "--detector"), ("hardnet", "--descriptor")):
        source = DATA / tiepoints.weights.table()[name]["file"]
        for value in (float("nan"), float("inf")):
            with drill.run(f"{name} {value}"):
                broken = tmp_path / f"{name}.safetensors"
                write_with(source, broken, value)
                arguments = ["extract", photos, "--output", "out", option, broken, *FEW]
                output = run(arguments, tmp_path / f"{name}{value}", codes=(2,))
                assert str(broken) in output, output
                assert not list((tmp_path / f"{name}{value}").rglob("*.npy"))


def write_with(source: Path, target: Path, value: float) -> None:
    """Copy a weights file with one value of one tensor replaced."""
    tensors = load_file(source)
    name = next(key for key, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[0] = value
    data = source.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    save_file(tensors, target, metadata)


# ---- nothing is unpickled


def test_nothing_is_unpickled(photos, tmp_path, drill):
    """Pickled objects in place of weights, checkpoints and features."""
    marker = tmp_path / "unpickled"
    objects = np.array([Marker(marker)], dtype=object)
    torch.save({"net": Marker(marker)}, tmp_path / "w.pth")
    torch.save({"net": Marker(marker)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "w.safetensors").write_bytes(pickle.dumps(Marker(marker)))
    np.savez(tmp_path / "w.npz", net=objects, xy=objects)
    for kind in ("kpt", "dsc"):
        np.save(tmp_path / f"p0.png.{kind}.npy", objects, allow_pickle=True)
    files = [tmp_path / name for name in ("w.pth", "old.pth", "w.safetensors", "w.npz")]
    readers = [load, load_official, read_checkpoint, Features.load]
    attempts = [(reader, path) for reader in readers for path in files]
    attempts.append((FeatureFolder(tmp_path).read, "p0.png"))
    for reader, path in attempts:
        with drill.run(f"{reader.__name__} {path}"):
            with pytest.raises((DataError, WeightsError, ValueError, OSError)):
                reader(path)
            assert not marker.exists()
    for path in files:  # the results of an evaluation
        with drill.run(f"load_features {path}"):
            assert load_features(path) is None
            assert not marker.exists()
    with drill.run("extract"):
        arguments = ["extract", photos, "--output", "out", "--detector", files[0], *FEW]
        output = run(arguments, tmp_path / "run", codes=(2,))
        assert str(files[0]) in output
        assert not marker.exists()


def test_only_safetensors_and_graphs_are_shipped():
    """The weights of the package are data, not pickled objects; each is in the index."""
    index = tomllib.loads((DATA / "index.toml").read_text())
    graphs = {entry["file"] for entry in index.pop("graphs").values()}
    graphs |= {entry["int8"]["file"] for entry in index.values() if "int8" in entry}
    listed = {entry["file"] for entry in index.values()}
    vocabularies = {path.name for path in DATA.glob("*.vocabulary")}
    found = {path.name for path in DATA.iterdir() if path.name != "index.toml"}
    assert found == listed | graphs | vocabularies
    assert all(name.endswith(".onnx") for name in graphs)
    assert all(name.endswith(".safetensors") for name in listed)
    for name in listed | vocabularies:  # both are in the safetensors format
        data = (DATA / name).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert all("dtype" in entry for key, entry in header.items() if key != "__metadata__")


# ---- nothing is written outside


def test_names_do_not_lead_outside(photos, tmp_path, drill):
    """Names with ../ in lists of images and pairs, and in stores that others have written."""
    h5py = pytest.importorskip("h5py")
    box = tmp_path / "a" / "b"
    box.mkdir(parents=True)
    for name in ("p0.png", "p1.png"):
        shutil.copy(photos / name, box / name)
    (box / "list.txt").write_text("../../up.png\np0.png\n/etc/hostname\n./x/../../p1.png\n")
    (box / "pairs.txt").write_text("../../up.png p0.png\np0.png p1.png\n../b/p0.png p1.png\n")
    with h5py.File(box / "f.h5", "w") as file:
        for name in ("p0.png", "p1.png", "..", "/../../up.png"):
            group = file.require_group(name)
            group["keypoints"] = np.random.default_rng(0).uniform(0, 100, (20, 2))
            group["descriptors"] = np.eye(128, 20)
            group["image_size"] = [160, 120]
    listed = ("extract", "--list-images", "list.txt", "--root-images", ".", *FEW)
    commands = [
        (*listed, "--output", "out"),
        (*listed, "--output", "out5", "--format", "h5"),
        ("extract", "../b/p0.png", "../../a/b/p1.png", "--output", "out2", *FEW),
        ("match", "p0.png", "p1.png", "--pairs", "pairs.txt", "--output", "m.h5", *FEW),
        ("match", "--features", "f.h5", "--output", "n.h5"),
        ("match", "p0.png", "p1.png", "--features", "f.h5", "--pictures", "pictures"),
    ]
    before = outside(tmp_path, box)
    for arguments in commands:
        with drill.run(" ".join(str(word) for word in arguments[:3])):
            run(list(arguments), box, codes=(0, 1, 2), log=tmp_path / "log")
            assert outside(tmp_path, box) == before


def outside(folder: Path, box: Path) -> list[str]:
    """Files below ``folder`` that are not below ``box``."""
    files = [path for path in folder.rglob("*") if not path.is_relative_to(box)]
    return sorted(str(path) for path in files if path.name != "log")
