"""Listing of images, atomic writing, optional libraries."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tiepoints.files import (
    atomic_path,
    collect,
    is_image_name,
    list_images,
    natural,
    require,
    write_json,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two images with files of macOS, a movie, a document and hidden folders."""
    root = tmp_path / "photos"
    for name in ("a.png", "sub/b.JPG"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(root / name)
    for name in ("._a.png", "b.mpg", "c.pdf", ".cache/d.png", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image")
    return root


def test_only_images_are_listed_and_other_files_are_counted(folder):
    images, skipped, _ = list_images(folder)
    assert [path.relative_to(folder).as_posix() for path in images] == ["a.png", "sub/b.JPG"]
    assert skipped == 4
    assert [path.name for path in list_images(folder, recursive=False)[0]] == ["a.png"]
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        list_images(folder / "none")


def test_hidden_folders_are_not_read(folder, monkeypatch):
    """A repository or a trash may be large, unreadable, or contain broken links."""
    inside = folder / "sub" / ".trash" / "deep"
    inside.mkdir(parents=True)
    Image.new("L", (8, 8)).save(inside / "e.png")
    (inside / "loop").symlink_to(folder)
    (folder / ".link").symlink_to(folder / "sub" / ".trash")
    read, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: read.append(Path(path).name) or scan(path))
    images, skipped, refused = list_images(folder)
    assert [path.name for path in images] == ["a.png", "b.JPG"]
    assert (skipped, refused) == (4, [])
    assert sorted(read) == ["photos", "sub"]
    # a hidden folder that is given is read
    monkeypatch.undo()
    assert [path.name for path in list_images(inside, recursive=False).images] == ["e.png"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.png", True), ("A.TIFF", True), ("._a.png", False), ("b.mpg", False), ("c.pdf", False)],
)
def test_names_of_images(name, expected):
    assert is_image_name(Path(name)) == expected


def test_collect_skips_other_files_of_folders_and_patterns(folder):
    found = collect([folder])
    assert [str(task.relative) for task in found.tasks] == ["photos/a.png", "photos/sub/b.JPG"]
    assert (found.refused, found.skipped) == ([], 4)
    found = collect([f"{folder}/*"])  # a pattern: files and the folder sub
    assert {task.path.name for task in found.tasks} == {"a.png", "b.JPG"}
    assert found.skipped == 3
    named = collect([folder / "c.pdf", folder / "none.png"])
    assert [task.path.name for task in named.tasks] == ["c.pdf"]
    assert "no such file" in named.refused[0][1]


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})

    def fail() -> None:
        with atomic_path(path) as tmp_path:
            tmp_path.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_missing_library_is_named_with_its_extra():
    with pytest.raises(
        ImportError, match=r"video needs no_such: pip install 'tiepoints\[opencv\]'"
    ):
        require("no_such.part", extra="opencv", purpose="video")


def test_natural_order():
    assert natural("10²1")[:3] == [(0, 0, ""), (1, 10, ""), (0, 0, "²")]
    names = ["img10.png", "img2.png", "img1b.png", "img1a.png"]
    assert sorted(names, key=natural) == ["img1a.png", "img1b.png", "img2.png", "img10.png"]
