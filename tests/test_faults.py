"""Odd names and folders, damaged files, full disks, and two runs with one target."""

import ctypes
import io
import json
import os
import pickle
import shutil
import sqlite3
import struct
import subprocess
import sys
import zipfile
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from typer.testing import CliRunner

from tiepoints import reading
from tiepoints.checkpoints import load_official
from tiepoints.cli import app
from tiepoints.datasets import synthetic
from tiepoints.datasets.homography import homography_sequences
from tiepoints.datasets.synthetic import PairDataset, PairSettings, find_photos, split_readable
from tiepoints.errors import DataError, WeightsError
from tiepoints.files import Lock, collect, list_images, printable, require_space
from tiepoints.formats import npy
from tiepoints.formats.colmap import ColmapDatabase
from tiepoints.formats.hdf5 import _HEAD, _MAGIC, FeatureFile, read_pairs
from tiepoints.formats.imc import find_sequences
from tiepoints.structs import Features, Keypoints, Matches
from tiepoints.weights import DATA, load, metadata_of, table

SYSTEM = ["--detector", "sobelnet", "--descriptor", "rootsift", "--num-keypoints", "150"]
NOT_UTF8 = os.fsdecode(b"caf\xe9.png")
#: Features of one keypoint.
ONE = Features(Keypoints(torch.ones(1, 2), *[torch.ones(1)] * 3), None, (8, 8))
FORMATS = {"npy": "", "h5": "features.h5", "colmap": "database.db"}


def picture(seed: int, factor: int = 1) -> Image.Image:
    """Rectangles of random gray levels, shifted by ``3 * seed`` pixels."""
    rng = np.random.default_rng(0)
    pixels = np.full((200 * factor, 260 * factor), 128, np.uint8)
    for _ in range(250 * factor**2):
        x, y, w, h = rng.integers([0, 0, 6, 6], [250 * factor, 190 * factor, 40, 40])
        pixels[y : y + h, x : x + w] = rng.integers(0, 256)
    return Image.fromarray(np.roll(pixels, 3 * seed, axis=1)[: 160 * factor, : 220 * factor])


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        picture(i).save(folder / f"p{i}.png")
    return folder


def run(*arguments, code=0):
    """Run a command in this process; returns standard output and error."""
    result = CliRunner().invoke(app, ["-q", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def tables(path: Path) -> list[tuple]:
    with sqlite3.connect(path) as connection:
        return connection.execute("SELECT * FROM two_view_geometries ORDER BY pair_id").fetchall()


# ---- names


@pytest.mark.parametrize("form", ["h5", "colmap"])
def test_name_that_is_not_utf8_is_refused_and_the_rest_is_done(photos, tmp_path, form):
    if form == "colmap":
        pytest.importorskip("pycolmap")
    picture(3).save(photos / NOT_UTF8)
    for done in ("3 extracted", "0 extracted"):
        output = run(
            "extract", photos, *SYSTEM, "--format", form, "--output", tmp_path / "o", code=1
        )
        assert done in output
        assert "caf\\xe9.png: its name is not valid UTF-8; rename it" in output
    names = [p.name for p in (tmp_path / "o").iterdir() if p.suffix not in (".json", ".jsonl")]
    assert names == [FORMATS[form]]


def test_name_that_is_not_utf8_in_npy(photos, tmp_path):
    picture(3).save(photos / NOT_UTF8)
    assert "4 extracted" in run("extract", photos, *SYSTEM, "--output", tmp_path / "o")
    assert npy.feature_paths(tmp_path / "o" / "photos" / NOT_UTF8)[0].is_file()
    assert "4 done before" in run("extract", photos, *SYSTEM, "--output", tmp_path / "o")


def test_journal_with_a_name_that_is_not_utf8_is_merged(tmp_path):
    pytest.importorskip("h5py")
    path = tmp_path / "f.h5"
    records = []
    for name in (NOT_UTF8, "good.png"):  # as earlier versions wrote them
        header = {"name": name, "arrays": [["keypoints", "<f4", [1, 2]]], "attributes": {}}
        header, data = json.dumps(header).encode(), np.ones((1, 2), np.float32).tobytes()
        checksum = zlib.crc32(data, zlib.crc32(header))
        records.append(_HEAD.pack(_MAGIC, len(header), len(data), checksum) + header + data)
    path.with_name("f.h5.journal").write_bytes(b"".join(records))
    with FeatureFile(path, write=True) as file:
        assert file.names() == ["good.png"]
        with pytest.raises(DataError, match=r"caf\\xe9.png: its name is not valid UTF-8"):
            file.write(NOT_UTF8, ONE)
    assert [p.name for p in tmp_path.iterdir()] == ["f.h5"]
    assert len(FeatureFile(path).read("good.png")) == 1


def test_names_in_messages_are_printable():
    assert printable(NOT_UTF8) == "caf\\xe9.png"
    assert printable("a\n\x1b[31mü.png") == "a\\n\\x1b[31mü.png"


def test_such_names_are_printed_in_any_locale(photos, tmp_path):
    os.rename(photos, tmp_path / os.fsdecode(b"\xe9"))
    done = subprocess.run(
        [sys.executable, "-m", "tiepoints", "extract", b"\xe9", *SYSTEM, "--output", b"o\xe9"],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert b"3 extracted" in done.stdout


ODD_NAMES = ["p 0.png", "tab\t1.png", "#\"q'2.png", "line\n3.png", "ü\u20284.png"]


def test_names_with_white_space_are_verified_as_others(photos, tmp_path):
    pytest.importorskip("pycolmap")
    odd = tmp_path / "odd"
    odd.mkdir()
    for name, path in zip(ODD_NAMES, sorted(photos.iterdir()), strict=False):
        shutil.copy(path, odd / name)
    options = [*SYSTEM, "--no-refine"]
    run("match", photos, *options, "--output", tmp_path / "plain.db")
    assert "3 pairs with a geometry" in run("match", odd, *options, "--output", tmp_path / "odd.db")
    names = ("plain", "odd")
    databases = [ColmapDatabase(tmp_path / f"{name}.db") for name in names]
    plain, other = (
        {
            tuple(sorted((order.index(a), order.index(b)))): len(database.read_inliers(a, b))
            for a, b in combinations(database.names(), 2)
        }
        for database, order in zip(
            databases, ([f"p{i}.png" for i in range(3)], ODD_NAMES), strict=True
        )
    )
    assert plain == other
    assert min(plain.values()) > 20


def test_verification_equals_that_of_colmap(tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    rng = torch.Generator().manual_seed(0)
    paths = tmp_path / "ours.db", tmp_path / "theirs.db"
    names = ["a.png", "b.png", "c.png"]
    pairs = [("b.png", "a.png"), ("a.png", "c.png"), ("b.png", "c.png")]
    with ColmapDatabase(paths[0], write=True) as database:
        xy = torch.rand(80, 2, generator=rng) * 200
        for i, name in enumerate(names):
            moved = xy + torch.tensor([7.0 * i, 0]) + (i == 2) * xy * 0.2
            zeros = torch.zeros(80)
            database.write(
                name, Features(Keypoints(moved, zeros + 1, zeros, zeros), None, (300, 300))
            )
        index = torch.arange(80).repeat(2, 1).T
        index[60:, 1] = index[60:, 1].flip(0)  # outliers
        for pair, count in zip(pairs, (80, 80, 5), strict=True):
            database.write_matches(*pair, Matches(index[:count], torch.ones(count)))
    shutil.copy(paths[0], paths[1])
    with ColmapDatabase(paths[0], write=True) as database:
        assert database.verify(pairs) == 2
    (tmp_path / "pairs.txt").write_text("".join(f"{a} {b}\n" for a, b in pairs))
    options = pycolmap.TwoViewGeometryOptions()
    options.ransac.max_error, options.ransac.random_seed = 4.0, 0
    pycolmap.verify_matches(paths[1], tmp_path / "pairs.txt", options)
    assert tables(paths[0]) == tables(paths[1])
    assert len(tables(paths[0])) == 3


def test_list_of_pairs_with_odd_names(photos, tmp_path):
    pytest.importorskip("h5py")
    names = ["#0.png", "p 1.png", "t\tb.png"]
    for name, path in zip(names, sorted(photos.iterdir()), strict=True):
        path.rename(photos / name)
    output = run("match", photos, *SYSTEM, "--output", tmp_path / "m.h5")
    assert "3 pairs matched" in output
    assert "does not list the pairs of t\\tb.png" in output
    assert "m.pairs.txt, as p 1.png contain spaces" in output
    assert list(read_pairs(tmp_path / "m.pairs.txt")) == [("#0.png", "p 1.png")]


def test_names_with_spaces_in_a_colmap_database(photos, tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    for name, path in zip(("a b.png", "c d.png", "e.png"), sorted(photos.iterdir()), strict=True):
        path.rename(photos / name)
    assert "3 pairs matched" in run("match", photos, *SYSTEM, "--output", tmp_path / "m.db")
    database = pycolmap.Database.open(tmp_path / "m.db")
    assert [image.name for image in database.read_all_images()] == ["a b.png", "c d.png", "e.png"]
    assert database.num_verified_image_pairs() == 3
    database.close()


def test_listed_name_that_is_not_utf8(photos, tmp_path):
    (photos / "p0.png").rename(photos / NOT_UTF8)
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9.png\r\np1.png\r\n")
    found = collect([], tmp_path / "list.txt", photos)
    assert [task.path for task in found.tasks] == [photos / NOT_UTF8, photos / "p1.png"]


# ---- folders


@pytest.fixture
def linked(photos, tmp_path) -> Path:
    """Links to images and folders: of another folder, of a parent, of nothing."""
    root = tmp_path / "linked"
    (root / "sub").mkdir(parents=True)
    picture(0).save(root / "own.png")
    (root / "sub" / "a.png").symlink_to(photos / "p1.png")
    (root / "elsewhere").symlink_to(photos)
    (root / "again").symlink_to("sub")
    (root / "sub" / "loop").symlink_to("..")
    (root / "broken.png").symlink_to("nothing.png")
    (root / "itself.png").symlink_to("itself.png")
    return root


LINKED = ["elsewhere/p0.png", "elsewhere/p1.png", "elsewhere/p2.png", "own.png", "sub/a.png"]


def test_links_are_followed_once(linked):
    images, skipped, refused = list_images(linked)
    assert [str(path.relative_to(linked)) for path in images] == LINKED
    assert skipped == 0
    assert [(Path(path).name, reason.split(" that ")[0]) for path, reason in refused] == [
        ("again", "a link to a folder"),
        ("broken.png", "a broken link"),
        ("itself.png", "a broken link"),
        ("loop", "a link to a folder"),
    ]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("given", ["absolute", "relative", "link", "parent"])
def test_images_have_the_names_of_the_links(linked, monkeypatch, inside, given):
    monkeypatch.chdir(linked)
    (linked.parent / "other").symlink_to(linked)
    folder, base = {
        "absolute": (str(linked), "linked"),
        "relative": (".", ""),
        "link": ("../other", "linked"),  # as ".." is resolved
        "parent": (str(linked.parent / "other"), "other"),
    }[given]
    prefix = "" if inside or not base else f"{base}/"
    found = collect([folder], inside=inside)
    assert [str(task.relative) for task in found.tasks] == [f"{prefix}{name}" for name in LINKED]


def test_images_below_a_linked_root(photos, tmp_path):
    (tmp_path / "root").symlink_to(photos)
    found = collect([photos / "p0.png"], root=tmp_path / "root", inside=True)
    assert [str(task.relative) for task in found.tasks] == ["p0.png"]
    found = collect([photos / "p0.png"], root=tmp_path / "none", inside=True)
    assert "not inside --root-images" in found.refused[0][1]


JUNK = ("._a.png", "b.mpg", "c.pdf", "m.h5", "Thumbs.db")


def test_photographs_in_other_formats_are_named(photos, tmp_path):
    for name in ("phone.HEIC", "raw.dng", f"{next(photos.glob('*.png')).stem}.cr2"):
        (photos / name).write_bytes(b"no image")
    listing = list_images(photos)
    assert len(listing.images) == 3
    assert listing.skipped == 1  # a raw file next to its image
    reason = "2 photographs in a format that cannot be read (.HEIC, .dng); convert to JPEG"
    assert listing.refused == [(str(photos), reason)]


def test_other_files_are_skipped_with_one_line(photos, tmp_path, caplog):
    for name in JUNK:
        (photos / name).write_bytes(b"no image")
    output = run("extract", photos, *SYSTEM, "--output", tmp_path / "o")
    assert output.count("skipped: 5 files that are not images") == 1
    output = run("match", photos, *SYSTEM, "--output", tmp_path / "m.h5")
    assert output.count("skipped: 5 files that are not images") == 1
    caplog.set_level("INFO", logger="tiepoints")
    assert len(find_photos([photos])) == 3
    assert caplog.messages == ["skipped: 5 files that are not images"]
    again = photos.with_name("again")
    again.symlink_to(photos)
    assert len(find_photos([photos, again])) == 3  # each file once
    sequence = tmp_path / "imc" / "phototourism" / "s"
    shutil.copytree(photos, sequence)
    found = find_sequences(tmp_path / "imc")
    assert (len(found.images["phototourism/s"]), found.refused, found.skipped) == (3, [], 5)


# ---- damaged photographs and sequences


def cut(path: Path) -> None:
    """Leave the header and a part of the pixels."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_photographs_are_named_once_and_left_out(tmp_path, caplog):
    for i in range(8):
        picture(i).save(tmp_path / f"p{i}.png")
    photos = find_photos([tmp_path])
    first = split_readable(photos)[1][0]
    cut(first)
    training, held_out = split_readable(photos)
    assert len(training) + len(held_out) == 7
    assert first not in training + held_out
    assert len(caplog.messages) == 1
    assert str(first) in caplog.messages[0]
    caplog.clear()
    synthetic.unreadable_log.cache_clear()
    cut(training[0])
    training[1].unlink()  # in the middle of a training
    settings = PairSettings(size=64)
    pairs = [PairDataset(training, settings, seed=seed, length=20) for seed in (0, 1)]
    sources = {dataset.pair(i).source for dataset in pairs for i in range(20)}
    assert sources == {str(path) for path in training[2:]}
    assert len(caplog.messages) == 2
    assert all(any(str(p) in message for message in caplog.messages) for p in training[:2])


def test_sequences_that_are_left_out_are_named_once(tmp_path, caplog):
    for name, matrix in (
        ("v_good", "1 0 3\n0 1 0\n0 0 1"),
        ("v_commas", "1,0,3\n0,1,0\n0,0,1"),
        ("i_six", "1 0 3 0 1 0"),
    ):
        folder = tmp_path / "hp" / name
        folder.mkdir(parents=True)
        picture(0).save(folder / "1.png")
        picture(1).save(folder / "2.png")
        (folder / "H_1_2").write_text(matrix)
    (tmp_path / "hp" / "junk").mkdir()
    dataset = homography_sequences(tmp_path / "hp")
    assert dataset.sequences == ["v_good"]
    assert ["six" in dataset.problems[0], "commas" in dataset.problems[1]] == [True, True]
    assert "nine finite numbers, got 6" in dataset.problems[0]
    assert "separated by white space" in dataset.problems[1]
    assert [message for message in caplog.messages if "junk" in message] != []
    out = tmp_path / "out"
    systems = ["--systems", "sobelnet+rootsift", "--num-keypoints", "50", "--output", out]
    output = run("evaluate", tmp_path / "hp", *systems, code=1)
    named = ("v_commas skipped:", "i_six skipped:", "junk:")
    assert [output.count(name) for name in named] == [1, 1, 1]


def test_whatever_a_decoder_raises_is_listed(photos, tmp_path, monkeypatch):
    def open_raster(path, *options):
        if Path(path).name == "p1.png":
            raise TypeError("integer argument expected")
        return original(path, *options)

    original = reading.open_raster
    monkeypatch.setattr(reading, "open_raster", open_raster)
    output = run("extract", photos, *SYSTEM, "--output", tmp_path / "o", code=1)
    assert "2 extracted" in output
    assert "p1.png cannot be read as an image (integer argument expected)" in output


# ---- weights


@pytest.fixture(scope="module")
def keynet() -> tuple[dict, dict]:
    """Tensors and header of an embedded weights file."""
    with safe_open(DATA / table()["keynet"]["file"], framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def changed(settings: str, **values) -> str:
    return json.dumps({**json.loads(settings), **values})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t, h: h.pop("settings"), "no readable settings"),
        (lambda t, h: h.update(settings="[1]"), "not those of a KeyNet"),
        (lambda t, h: h.update(settings="[" * 100_000), "no readable settings"),
        (
            lambda t, h: h.update(settings=changed(h["settings"], num_filters=200_000)),
            "num_filters in its header is 200000",
        ),
        (
            lambda t, h: h.update(settings=changed(h["settings"], num_filters=1000)),
            r"shape \(8,\), expected \(1000,\)",
        ),
        (
            lambda t, h: h.update(settings=changed(h["settings"], num_filters="x")),
            "no KeyNet with the settings",
        ),
        (lambda t, h: h.update(settings=changed(h["settings"], other=1)), "not those of a KeyNet"),
        (lambda t, h: h.update(floor='"x"'), "floor in its header must be 1 numbers"),
        (lambda t, h: h.update(offset="3"), "offset in its header must be 2 numbers"),
        (lambda t, h: h.update(network="Other"), "names no known network"),
        (lambda t, h: t["last.bias"].fill_(float("nan")), "last.bias contains NaN"),
        (lambda t, h: t.update({"last.bias": t["last.bias"].int()}), "has type I32"),
        (lambda t, h: t.pop("last.bias"), "last.bias is missing"),
        (lambda t, h: t.update(more=torch.zeros(1)), "more is not expected"),
        (lambda t, h: h.update({f"k{i}": "v" * 40 for i in range(100_000)}), "a header of"),
    ],
)
def test_damaged_weights_are_refused_before_anything_is_allocated(keynet, tmp_path, change, reason):
    tensors, header = {key: value.clone() for key, value in keynet[0].items()}, dict(keynet[1])
    change(tensors, header)
    path = tmp_path / "w.safetensors"
    path.write_bytes(to_safetensors(tensors, metadata=header))
    with pytest.raises(WeightsError, match=reason) as error:
        load(path)
    assert str(path) in str(error.value)


def test_other_files_are_not_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    for content, reason in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (struct.pack("<Q", 10**12) + b"{}", "no readable safetensors"),
        (b"\x80\x02}q\x00.", "no readable safetensors"),
    ):
        path.write_bytes(content)
        for read in (load, metadata_of):
            with pytest.raises(WeightsError, match=reason):
                read(path)
        assert reason in run("weights", "show", path, code=2)
    with pytest.raises(WeightsError, match="is a folder"):
        load(tmp_path)


def test_checkpoints_are_not_larger_than_their_data(tmp_path):
    path = tmp_path / "c.pth"
    name = "feature_extractor.lb_block.conv0.0.weight"
    torch.save({"state_dict": {name: torch.zeros(1).expand(10**10)}}, path)
    with pytest.raises(WeightsError, match="is larger than its data"):
        load_official(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="git lfs pull"):
        load_official(path)
    array = io.BytesIO()
    np.save(array, np.zeros(3, np.float32))
    content = array.getvalue().replace(b"(3,), }        ", b"(999999999,), }")
    assert content != array.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model_deep_detector_x.npy", content)
    with pytest.raises(WeightsError, match="larger than its data"):
        load_official(path)


# ---- damaged results


@pytest.mark.parametrize("form", ["h5", "colmap"])
@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_overwrite_gets_past_a_damaged_file(photos, tmp_path, form, damage):
    pytest.importorskip("h5py" if form == "h5" else "pycolmap")
    command = ["extract", photos, *SYSTEM, "--format", form, "--output", tmp_path / "o"]
    run(*command)
    path = tmp_path / "o" / FORMATS[form]
    if damage == "cut":
        os.truncate(path, 700)
    else:
        path.write_bytes(b"\0garbage" * 200)
    output = run(*command, code=2)
    assert str(path) in output
    assert "use --overwrite" in output
    assert "3 extracted" in run(*command, "--overwrite")
    assert "3 done before" in run(*command)


def test_overwrite_gets_past_damaged_matches(photos, tmp_path):
    pytest.importorskip("h5py")
    command = ["match", photos, *SYSTEM, "--output", tmp_path / "m.h5"]
    run(*command)
    for name in ("m.h5", "m.features.h5", "m.settings.json", "m.features.h5.journal"):
        (tmp_path / name).write_bytes(b"[1]" if name.endswith("json") else b"garbage")
        output = run(*command, code=2)
        assert name in output
        assert "--overwrite" in output
        assert "3 pairs matched" in run(*command, "--overwrite")


def test_garbage_in_a_journal_does_not_hide_its_records(tmp_path):
    pytest.importorskip("h5py")
    file = FeatureFile(tmp_path / "f.h5", write=True)
    file.write("a.png", ONE)
    header = b'{"name": 5}'
    head = _HEAD.pack(_MAGIC, len(header), 0, zlib.crc32(b"", zlib.crc32(header)))
    content = (tmp_path / "f.h5.journal").read_bytes()
    file._journal.close()
    (tmp_path / "f.h5.journal").write_bytes(content + head + header)
    with FeatureFile(tmp_path / "f.h5", write=True) as file:
        assert file.names() == ["a.png"]


def as_npy(array, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        pickle.dumps([1, 2]),
        as_npy(np.array([{}], object), allow_pickle=True),
        as_npy(np.array(["text"])),
        as_npy(np.zeros((9, 4), np.float32))[:-5],
        as_npy(np.zeros((9, 4), np.float32)).replace(
            b"(9, 4), }          ", b"(99999999999, 4), }"
        ),
        as_npy(np.zeros(9, np.float32)),
    ],
)
def test_files_that_are_no_arrays_are_named(tmp_path, content):
    path = npy.feature_paths(tmp_path / "a.png")[0]
    path.write_bytes(content)
    with pytest.raises(DataError, match="extract the image again") as error:
        npy.read_features(tmp_path / "a.png")
    assert str(path) in str(error.value)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz .*extract the image again"):
        Features.load(tmp_path / "a.npz")


# ---- two runs with one target


def test_second_run_says_who_holds_the_target(photos, tmp_path):
    pytest.importorskip("pycolmap")
    command = ["extract", photos, *SYSTEM, "--format", "colmap", "--output", tmp_path / "o"]
    with ColmapDatabase(tmp_path / "o" / "database.db", write=True):
        output = run(*command, code=2)
        assert f"another run (process {os.getpid()}) is writing" in output
        assert "database.db; wait until it ends" in output
    assert "3 extracted" in run(*command)
    with Lock(tmp_path / "o" / "database.db"):
        assert "is writing" in run(*command, "--overwrite", code=2)
    assert "3 done before" in run(*command)
    assert [p.name for p in (tmp_path / "o").iterdir() if p.name.startswith(".")] == []


def test_writers_of_npy_files_exclude_only_their_removal(tmp_path):
    with npy.FeatureFolder(tmp_path, write=True) as a:
        with npy.FeatureFolder(tmp_path, write=True):
            pass
        b = npy.FeatureFolder(tmp_path, write=True)
        with pytest.raises(DataError, match="another run is writing"):
            b.clear()
        b.close()
        a.clear()
    assert list(tmp_path.iterdir()) == []


def test_one_training_and_one_evaluation_at_a_time(photos, tmp_path):
    pytest.importorskip("lightning")
    target = tmp_path / "w.safetensors"
    command = ["train", "sobelnet", "--images", photos, "--output", target, "--preset", "smoke"]
    target.with_name("w.safetensors.checkpoint").write_bytes(b"of the other run")
    with Lock(target):
        assert f"process {os.getpid()}" in run(*command, code=2)
    assert target.with_name("w.safetensors.checkpoint").read_bytes() == b"of the other run"
    sequence, out = tmp_path / "hp" / "v_a", tmp_path / "out"
    sequence.mkdir(parents=True)
    out.mkdir()
    shutil.copy(photos / "p0.png", sequence / "1.png")
    shutil.copy(photos / "p1.png", sequence / "2.png")
    (sequence / "H_1_2").write_text("1 0 3\n0 1 0\n0 0 1")
    with Lock(out):
        systems = ["--systems", "lattice", "--output", out]
        assert "is writing" in run("evaluate", tmp_path / "hp", *systems, code=2)
    assert list(out.iterdir()) == []


def test_refused_database_leaves_nothing(photos, tmp_path):
    pytest.importorskip("pycolmap")
    (tmp_path / "m.settings.json").write_text("[]")
    (tmp_path / "m.db.settings.json").write_text("[]")
    run("match", photos, *SYSTEM, "--output", tmp_path / "m.db", code=2)
    assert sorted(p.name for p in tmp_path.glob("*m.*")) == [
        "m.db.settings.json",
        "m.settings.json",
    ]


# ---- full disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB, of which 1.4 MB are free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(folder)
    if sys.platform != "linux" or libc.mount(b"none", path, b"tmpfs", 0, b"size=2m"):
        pytest.skip("mounting a small disk needs Linux and its administrator")
    (folder / "filler").write_bytes(bytes(600_000))
    yield folder
    libc.umount2(path, 2)


#: Runs commands in one process, which a crash of a library would end, and prints their exit codes.
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from tiepoints.cli import app
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, ["-q", *arguments])
    print(json.dumps([result.exit_code, result.output]))
"""


def run_all(commands) -> list:
    commands = json.dumps([[str(argument) for argument in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, commands],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_extraction_on_a_full_disk(small_disk, tmp_path):
    pytest.importorskip("h5py")
    pytest.importorskip("pycolmap")
    photos = tmp_path / "many"
    photos.mkdir()
    for i in range(12):
        picture(i, 2).save(photos / f"p{i}.png")
    results = {form: small_disk / form for form in FORMATS}
    for form, folder in results.items():
        command = ["extract", photos, *SYSTEM, "--format", form, "--output", folder]
        command[command.index("150")] = "500"
        full, again = run_all([command, command])
        assert full[0] == again[0] == 2, full
        assert "No space left on device" in full[1]
        assert not [path for path in folder.rglob("*") if path.suffix == ".part"]
        shutil.copytree(folder, tmp_path / form)
        shutil.rmtree(folder)
        command[-1] = tmp_path / form
        output = run(*command)
        extracted = int(output.split(" extracted")[0].split()[-1])
        assert 0 < extracted < 12
        assert f"{12 - extracted} done before" in output


def test_matching_to_a_database_on_a_full_disk(small_disk, tmp_path):
    pytest.importorskip("pycolmap")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(6):
        picture(i, 2).save(photos / f"p{i}.png")
    output = small_disk / "m.db"
    command = ["match", photos, *SYSTEM, "--output", output]
    command[command.index("150")] = "500"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    for left in range(100_000, free, 150_000):  # full in each of the stages
        filler = small_disk / "more"
        filler.write_bytes(bytes(free - left))
        ((code, text),) = run_all([command])
        assert code in (0, 2), text
        assert code == 0 or "No space left on device" in text
        filler.unlink()
        output.unlink(missing_ok=True)
        for path in small_disk.glob("m.db*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_space_is_checked(small_disk):
    require_space(small_disk, 1_000_000)
    with pytest.raises(OSError, match="No space left"):
        require_space(small_disk, 3_000_000)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_evaluation_and_pairs_on_a_full_disk(small_disk, photos, tmp_path):
    sequence = tmp_path / "hp" / "v_a"
    sequence.mkdir(parents=True)
    for i in range(3):
        shutil.copy(photos / f"p{i}.png", sequence / f"{i + 1}.png")
    for i in (2, 3):
        (sequence / f"H_1_{i}").write_text(f"1 0 {3 * (i - 1)}\n0 1 0\n0 0 1")
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "more").write_bytes(bytes(free - 60_000))
    out = small_disk / "out"
    command = ["evaluate", tmp_path / "hp", "--systems", "sobelnet+rootsift", "--output", out]
    command += ["--num-keypoints", "400"]
    pairs = [
        "pairs",
        "--images",
        photos,
        "--output",
        small_disk / "p.safetensors",
        "--split",
        "all",
    ]
    (code, output), (pairs_code, pairs_output) = run_all([command, [*pairs, "--workers", "0"]])
    assert (code in (1, 2), pairs_code) == (True, 2), output
    assert "No space left" in output
    assert "p.safetensors could not be written" in pairs_output
    (small_disk / "more").unlink()
    assert "2 rows, 0 of them failed" in run(*command)

    lines = next((out / "rows").glob("*.jsonl")).read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
