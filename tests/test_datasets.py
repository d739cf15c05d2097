"""Finding sequences and posed pairs, and messages for damaged ones."""

import io
import logging
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiepoints.datasets.download import fetch_hpatches, unpack
from tiepoints.datasets.ground_truth import (
    resize_target,
    resized_intrinsics,
    rotated_intrinsics,
    rotated_pose,
)
from tiepoints.datasets.homography import homography_sequences
from tiepoints.datasets.posed import posed_pairs
from tiepoints.errors import DataError


def sequence(folder: Path, count: int = 3, *, oxford: bool = False, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for k in range(1, count + 1):
        Image.new("L", (40, 30), k).save(folder / f"{'img' if oxford else ''}{k}{suffix}")
        if k > 1:
            H = np.eye(3)
            H[0, 2] = k
            np.savetxt(folder / (f"H1to{k}p" if oxford else f"H_1_{k}"), H)
    return folder


def test_both_layouts_with_any_format_and_number(tmp_path):
    sequence(tmp_path / "v_wall", 4, suffix=".ppm")
    sequence(tmp_path / "i_lamp", 2, suffix=".jpg")
    sequence(tmp_path / "graf", 3, oxford=True, suffix=".bmp")
    (tmp_path / "notes").mkdir()
    found = homography_sequences(tmp_path)
    assert [(p.sequence, p.name, p.kind) for p in found.pairs] == [
        ("graf", "1-2", "view"),
        ("graf", "1-3", "view"),
        ("i_lamp", "1-2", "illum"),
        ("v_wall", "1-2", "view"),
        ("v_wall", "1-3", "view"),
        ("v_wall", "1-4", "view"),
    ]
    assert found.pairs[1].H_ab[0, 2] == 3
    assert found.layout == "hpatches"
    assert homography_sequences(tmp_path / "graf").sequences == ["graf"]


def test_splits(tmp_path):
    for name in ("v_wall", "v_talent", "i_dc", "i_lamp"):
        sequence(tmp_path / name, 2)
    (tmp_path / "mine.json").write_text('["v_wall", "v_gone"]')
    (tmp_path / "splits.json").write_text('{"a": {"test": ["i_dc"], "train": ["v_wall"]}}')

    def names(split):
        return homography_sequences(tmp_path, split).sequences

    assert names("view") == ["v_talent", "v_wall"]
    assert names("illum") == ["i_dc", "i_lamp"]
    assert names("d2net") == ["i_lamp", "v_wall"]
    assert names(f"{tmp_path}/splits.json:a") == ["i_dc"]
    mine = homography_sequences(tmp_path, f"{tmp_path}/mine.json")
    assert mine.sequences == ["v_wall"]
    assert "v_gone" in mine.problems[0]
    with pytest.raises(ValueError, match="split must be"):
        names("everything")


@pytest.mark.parametrize(
    "damage", ["no image", "no homography", "words", "singular", "empty image"]
)
def test_damaged_sequence_is_skipped_and_its_file_named(tmp_path, damage):
    bad = sequence(tmp_path / "v_bad")
    sequence(tmp_path / "v_good")
    named = "H_1_3"
    if damage == "no image":
        (bad / "3.png").unlink()
    elif damage == "no homography":
        (bad / "H_1_3").unlink()
    elif damage == "words":
        (bad / "H_1_3").write_text("one two")
    elif damage == "singular":
        np.savetxt(bad / "H_1_3", np.ones((3, 3)))
    else:
        (bad / "3.png").write_bytes(b"")
        named = "3.png"
    found = homography_sequences(tmp_path)
    assert found.sequences == ["v_good"]
    assert len(found.problems) == 1
    assert named in found.problems[0]
    assert "v_bad skipped" in found.problems[0]


def test_no_usable_data_raises(tmp_path):
    with pytest.raises(DataError, match="no usable homography sequence"):
        homography_sequences(tmp_path)
    with pytest.raises(FileNotFoundError, match="data hpatches"):
        homography_sequences(tmp_path / "none")


def test_posed_pairs_of_a_list(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("L", (40, 30)).save(tmp_path / "images" / f"{name}.png")
    K = "500 0 20 0 510 15 0 0 1"
    T = "1 0 0 0.5 0 1 0 0 0 0 1 0 0 0 0 1"
    lines = [
        f"a.png b.png 0 1 {K} {K} {T}",
        "a.png b.png 0 0 1 2",
        f"a.png gone.png 0 0 {K} {K} {T}",
        "",
    ]
    (tmp_path / "pairs_with_gt.txt").write_text("\n".join(lines))
    found = posed_pairs(tmp_path)
    assert len(found.pairs) == 1
    pair = found.pairs[0]
    assert pair.K_a[1, 1] == 510
    assert pair.T_ab[0, 3] == 0.5
    assert (pair.rot90_a, pair.rot90_b) == (0, 1)
    assert "line 2" in found.problems[0]
    assert "38 expected" in found.problems[0]
    assert "gone.png" in found.problems[1]


def test_real_posed_pairs(data_dir):
    found = posed_pairs(data_dir / "pose_pairs")
    assert len(found.pairs) == 8
    for pair in found.pairs:
        torch.testing.assert_close(
            pair.T_ab[:3, :3] @ pair.T_ab[:3, :3].T,
            torch.eye(3, dtype=torch.float64),
            atol=1e-3,
            rtol=0,
        )


def test_resize_target_as_in_the_papers():
    assert resize_target(1296, 968, (640, 480)) == (640, 480)
    assert resize_target(1000, 500, (1600,)) == (1600, 800)
    assert resize_target(7, 5, None) == (7, 5)


def project(K, X):
    x = X @ K.T
    return x[:, :2] / x[:, 2:]


def test_intrinsics_follow_resizing_and_rotation():
    """A projected point mapped explicitly equals the point projected with the new intrinsics (and
    rotated axes).
    """
    K = torch.tensor([[500.0, 0, 21], [0, 510, 14], [0, 0, 1]], dtype=torch.float64)
    X = torch.tensor([[0.1, -0.2, 4.0], [-0.3, 0.1, 5.0]], dtype=torch.float64)
    xy = project(K, X)
    small = resized_intrinsics(K, (40, 30), (20, 10))
    torch.testing.assert_close(
        project(small, X), (xy + 0.5) * torch.tensor([0.5, 1 / 3], dtype=torch.float64) - 0.5
    )
    image = torch.zeros(30, 40)
    image[12, 33] = 1
    for k in range(4):
        y, x = (torch.rot90(image, k) > 0).nonzero()[0].tolist()
        T = rotated_pose(torch.eye(4, dtype=torch.float64), 0, k)
        ray = torch.linalg.inv(K) @ torch.tensor([33.0, 12, 1], dtype=torch.float64)
        moved = project(rotated_intrinsics(K, (40, 30), k), (T[:3, :3] @ ray)[None])[0]
        torch.testing.assert_close(moved, torch.tensor([x, y], dtype=torch.float64))


def hpatches(folder: Path, count: int = 116) -> Path:
    for i in range(count):
        sequence(
            folder / "hpatches-sequences-release" / f"{'v' if i % 2 else 'i'}_{i}", 6, suffix=".ppm"
        )
    return folder


def test_hpatches_is_downloaded_checked_and_unpacked(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tiepoints")
    source = hpatches(tmp_path / "source")
    archive = tmp_path / "hpatches.tar.gz"
    with tarfile.open(archive, "w:gz") as content:
        content.add(source / "hpatches-sequences-release", "hpatches-sequences-release")
    gone = (tmp_path / "gone.zip").as_uri()
    folder = fetch_hpatches(tmp_path / "to", mirrors=[gone, archive.as_uri()])
    assert len(homography_sequences(tmp_path / "to").pairs) == 580
    assert "sha256" in caplog.text
    assert [f.name for f in (tmp_path / "to").iterdir()] == [folder.name]
    fetch_hpatches(tmp_path / "to", mirrors=[gone])  # complete: nothing is downloaded
    assert "complete, nothing to download" in caplog.text
    with pytest.raises(DataError, match="Offline"):
        fetch_hpatches(tmp_path / "other", mirrors=[gone])
    with pytest.raises(DataError, match="expected 00"):
        fetch_hpatches(tmp_path / "other", mirrors=[archive.as_uri()], sha256="00")


def test_incomplete_hpatches_raises(tmp_path):
    archive = tmp_path / "h.zip"
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("hpatches-sequences-release/v_wall/1.ppm", b"P5 1 1 255 0")
    with pytest.raises(DataError, match="1 sequences, 116 expected"):
        fetch_hpatches(tmp_path / "to", mirrors=[archive.as_uri()])


def test_archive_must_not_write_outside_its_folder(tmp_path):
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as content:
        content.writestr("../outside.txt", "x")
    with pytest.raises(DataError, match="written outside of"):
        unpack(bad, tmp_path / "in")
    tar = tmp_path / "bad.tar"
    with tarfile.open(tar, "w") as content:
        member = tarfile.TarInfo("../outside.txt")
        member.size = 1
        content.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(tar, tmp_path / "in")
    assert not (tmp_path / "outside.txt").exists()
