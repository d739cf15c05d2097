"""Strecha, WxBS, EVD and TILDE's webcams: detected by content, damaged items skipped with a
message, metrics of a known geometry.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tiepoints.cli import app
from tiepoints.datasets.benchmark import open_dataset
from tiepoints.datasets.ground_truth import MarkedPair, PosePair
from tiepoints.errors import DataError
from tiepoints.evaluation import pair as measures
from tiepoints.evaluation.results import read_run
from tiepoints.evaluation.run import RunSettings, evaluate, run
from tiepoints.evaluation.systems import Options, system
from tiepoints.geometry import warp_points
from tiepoints.metrics.geometry import epipolar_distances
from tiepoints.metrics.repeatability import rekd_repeatability
from tiepoints.report.report import write_report
from tiepoints.structs import Features, Keypoints

K = np.array([[2759.48, 0, 1520.69], [0, 2764.16, 1006.81], [0, 0, 1]])
SIZE = (96, 64)  # a 32nd of 3072 x 2048


def rotation(degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def strecha_scene(folder: Path, count: int = 3) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "gt_dense_cameras").mkdir()
    for k in range(count):
        Image.new("L", SIZE, 90 + k).save(folder / "images" / f"000{k}.jpg")
        rows = [*K, [0, 0, 0], *rotation(10 * k), [k, 0.5 * k, 0.1], [3072, 2048]]
        text = "\n".join(" ".join(f"{v:.9g}" for v in row) for row in rows)
        (folder / "gt_dense_cameras" / f"000{k}.jpg.camera").write_text(text + "\n")
    return folder


def textured(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (size[1] // 6, size[0] // 6), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def wxbs_pair(folder: Path, marked: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for k in (1, 2):
        textured(k).save(folder / f"0{k}.png")
    np.savetxt(folder / "corrs.txt", marked)
    return folder


def evd_folder(root: Path, names=("adam", "cafe"), shift: int = 12) -> Path:
    for side in ("1", "2", "h"):
        (root / side).mkdir(parents=True)
    for k, name in enumerate(names):
        wide = textured(k, (252, 180))
        wide.crop((0, 0, 240, 180)).save(root / "1" / f"{name}.png")
        wide.crop((shift, 0, 240 + shift, 180)).save(root / "2" / f"{name}.png")
        np.savetxt(
            root / "h" / f"{name}.txt", -2.5 * np.array([[1, 0, -shift], [0, 1, 0], [0, 0, 1]])
        )  # of any sign and scale
    return root


def webcam_scene(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True)
    for k in range(count):
        textured(7).point(lambda v, k=k: 20 * k + v * (0.8 - 0.1 * k)).save(
            folder / f"2013010{k}_120000.png"
        )
    return folder


# ---- Strecha


def test_strecha_cameras_project_a_point_to_its_image(tmp_path):
    strecha_scene(tmp_path / "castle")
    found = open_dataset(tmp_path)
    assert (found.layout, found.sequences, found.problems) == ("strecha", ["castle"], [])
    assert [p.name for p in found.pairs] == ["0000-0001", "0000-0002", "0001-0002"]
    assert open_dataset(tmp_path / "castle").sequences == ["castle"]
    world = np.array([0.3, -0.2, 6.0])
    pair = found.pairs[1]
    assert isinstance(pair, PosePair)
    pixels, seen = [], []
    for k in (0, 2):
        seen.append(rotation(10 * k).T @ (world - [k, 0.5 * k, 0.1]))
        full = K @ seen[-1]
        pixels.append((full[:2] / full[2] + 0.5) / 32 - 0.5)  # center of the first pixel at (0, 0)
    for image_K, camera, pixel in zip((pair.K_a, pair.K_b), seen, pixels, strict=True):
        projected = image_K.numpy() @ camera
        np.testing.assert_allclose(projected[:2] / projected[2], pixel, atol=1e-6)
    moved = pair.T_ab.numpy() @ np.append(seen[0], 1)
    np.testing.assert_allclose(moved[:3], seen[1], atol=1e-6)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("no image", "0002.jpg"),
        ("words", "0002.jpg.camera"),
        ("short", "26"),
        ("rotation", "not a rotation matrix"),
        ("cropped", "cropping"),
    ],
)
def test_damaged_camera_is_named_and_skipped(tmp_path, damage, named):
    scene = strecha_scene(tmp_path / "castle")
    camera, image = scene / "gt_dense_cameras" / "0002.jpg.camera", scene / "images" / "0002.jpg"
    if damage == "no image":
        image.unlink()
    elif damage == "words":
        camera.write_text("no numbers")
    elif damage == "short":
        camera.write_text(camera.read_text().rsplit(maxsplit=1)[0])
    elif damage == "rotation":
        values = camera.read_text().split()
        values[12] = "0.1"
        camera.write_text(" ".join(values))
    else:
        Image.new("L", (96, 60)).save(image)
    found = open_dataset(tmp_path)
    assert [p.name for p in found.pairs] == ["0000-0001"]
    assert len(found.problems) == 1
    assert named in found.problems[0]
    assert "0002.jpg" in found.problems[0]


def test_strecha_without_two_cameras_raises(tmp_path):
    strecha_scene(tmp_path / "castle", 1)
    with pytest.raises(DataError, match="gt_dense_cameras"):
        open_dataset(tmp_path)
    for split in ("view", "d2net"):
        with pytest.raises(ValueError, match="split is for homography sequences"):
            open_dataset(tmp_path, split)


def test_two_cameras_with_the_same_center_are_skipped(tmp_path):
    scene = strecha_scene(tmp_path / "castle")
    cameras = scene / "gt_dense_cameras"
    (cameras / "0001.jpg.camera").write_text((cameras / "0000.jpg.camera").read_text())
    found = open_dataset(tmp_path)
    assert [p.name for p in found.pairs] == ["0000-0002", "0001-0002"]
    assert "same camera center" in found.problems[0]


# ---- WxBS


def two_views(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points (count,2) in two views of a scene with depth, and the fundamental matrix."""
    rng = np.random.default_rng(seed)
    camera = np.array([[200.0, 0, 119.5], [0, 200, 89.5], [0, 0, 1]])
    R, t = rotation(8), np.array([-0.8, 0.1, 0.2])
    world = np.stack(
        [rng.uniform(-1.2, 1.2, count), rng.uniform(-0.9, 0.9, count), rng.uniform(3, 6, count)],
        axis=1,
    )
    a, b = world @ camera.T, (world @ R.T + t) @ camera.T
    cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    inverse = np.linalg.inv(camera)
    return a[:, :2] / a[:, 2:], b[:, :2] / b[:, 2:], inverse.T @ cross @ R @ inverse


def test_epipolar_distance_is_the_maximum_of_both_images():
    a, b, F = two_views(6)
    none = epipolar_distances(torch.tensor(a), torch.tensor(b), torch.tensor(F))
    torch.testing.assert_close(none, torch.zeros(6).double(), atol=1e-9, rtol=0)
    a[:, 1] += 3
    found = epipolar_distances(torch.tensor(a), torch.tensor(b), torch.tensor(F)).numpy()
    for k in range(6):
        p, q = np.append(a[k], 1), np.append(b[k], 1)
        sides = [abs(q @ F @ p) / np.hypot(*line[:2]) for line in (F @ p, F.T @ q)]
        assert found[k] == pytest.approx(max(sides))
        assert max(sides) - min(sides) > 1e-3
    # translation along the axis: the epipole is at the center and has no line
    epipole = torch.tensor([[0.0, 0.0]])
    across = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 0]])
    assert epipolar_distances(epipole, epipole + 1, across).isinf().all()


def test_fraction_of_annotated_correspondences():
    a, b, _ = two_views(60)
    xy_a, xy_b = torch.tensor(a), torch.tensor(b)
    marked_a, marked_b, F = (torch.tensor(v) for v in two_views(40, seed=1))
    line = torch.cat([marked_a, torch.ones(40, 1)], dim=1).double() @ F.T
    across = line[:, :2] / line[:, :2].norm(dim=1, keepdim=True)
    marked_b[:10] += 30 * across[:10]  # errors above all thresholds
    found = measures.matched_marked_metrics(xy_a, xy_b, marked_a, marked_b)
    assert found["marked.ok"] == 1
    assert found["marked.inliers"] == found["marked.matches"] == 60
    assert found["marked.share@1"] == found["marked.share@20"] == found["marked.share"] == 0.75
    marked_b[10:30] += 10.5 * across[10:30]
    distance = epipolar_distances(marked_a, marked_b, F)
    found = measures.matched_marked_metrics(xy_a, xy_b, marked_a, marked_b)
    for t in (1, 5, 15, 20):
        assert found[f"marked.share@{t}"] == pytest.approx(float((distance <= t).double().mean()))
    assert found["marked.share"] == pytest.approx(
        np.mean([found[f"marked.share@{t}"] for t in range(1, 21)])
    )
    nothing = measures.matched_marked_metrics(xy_a[:5], xy_b[:5], marked_a, marked_b)
    assert (nothing["marked.ok"], nothing["marked.share"], nothing["marked.share@20"]) == (0, 0, 0)


def test_wxbs_at_any_folder_depth_with_damaged_pairs(tmp_path):
    marked = np.concatenate(two_views(12)[:2], axis=1)
    wxbs_pair(tmp_path / "WGBS" / "church", marked)
    wxbs_pair(tmp_path / "WLABS" / "square", marked)
    found = open_dataset(tmp_path)
    assert [(p.sequence, p.name, p.kind) for p in found.pairs] == [
        ("WGBS", "church", "marked"),
        ("WLABS", "square", "marked"),
    ]
    assert isinstance(found.pairs[0], MarkedPair)
    np.testing.assert_allclose(
        torch.cat([found.pairs[0].xy_a, found.pairs[0].xy_b], dim=1).numpy(), marked
    )
    assert open_dataset(tmp_path / "WGBS").sequences == ["WGBS"]
    alone = open_dataset(tmp_path / "WGBS" / "church").pairs
    assert [(p.sequence, p.name) for p in alone] == [("WGBS", "church")]
    for name in ("columns", "words", "empty", "image", "list"):
        folder = wxbs_pair(tmp_path / "WGBS" / name, marked)
        file = folder / "corrs.txt"
        if name == "columns":
            np.savetxt(file, marked[:3, :3])
        elif name in ("words", "empty"):
            file.write_text("one two" if name == "words" else "")
        elif name == "image":
            (folder / "02.png").write_bytes(b"no image")
        else:
            file.unlink()
    found = open_dataset(tmp_path)
    assert [p.name for p in found.pairs] == ["church", "square"]
    assert len(found.problems) == 5
    for name in ("columns", "words", "empty", "image", "list"):
        assert any(f"WGBS/{name}" in problem and "remove" in problem for problem in found.problems)


# ---- EVD, webcams


def test_evd_with_damaged_pairs(tmp_path):
    root = evd_folder(tmp_path / "EVD", ("adam", "cafe", "dum", "face"))
    (root / "2" / "cafe.png").unlink()
    (root / "h" / "dum.txt").write_text("1 2 3")
    (root / "1" / "face.png").write_bytes(b"")
    found = open_dataset(root)
    assert [(p.sequence, p.name, p.kind) for p in found.pairs] == [("EVD", "adam", "view")]
    assert [
        word in "; ".join(found.problems) for word in ("2/cafe.*", "h/dum.txt", "1/face.png")
    ] == [True] * 3
    assert len(found.problems) == 3


def test_webcams_are_frames_named_by_time(tmp_path):
    webcam_scene(tmp_path / "Mexico")
    textured(1, (120, 90)).save(tmp_path / "Mexico" / "20130104_120000.png")
    (tmp_path / "photos").mkdir()
    for k in range(3):
        textured(k).save(tmp_path / "photos" / f"holiday{k}.png")
    found = open_dataset(tmp_path)
    assert (found.layout, found.sequences, len(found.pairs)) == ("webcams", ["Mexico"], 3)
    assert all(torch.equal(p.H_ab, torch.eye(3).double()) for p in found.pairs)
    assert "120 x 90" in found.problems[0]
    with pytest.raises(
        DataError, match="no usable homography sequence"
    ):  # not images of a fixed camera
        open_dataset(tmp_path / "photos")
    webcam_scene(tmp_path / "one", 1)
    with pytest.raises(DataError, match="no scene has two frames"):
        open_dataset(tmp_path / "one")


def test_tilde_repeatability_is_many_to_one_within_5_px():
    a = torch.tensor([[10.0, 10], [12, 10], [50, 50], [90, 90]])
    b = torch.tensor([[11.0, 14], [50, 55], [200, 200]])
    points = [
        Keypoints(
            xy, torch.ones(len(xy)), torch.zeros(len(xy)), torch.arange(len(xy), 0, -1).float()
        )
        for xy in (a, b)
    ]
    found = measures.homography_metrics(
        *(Features(p, None, (240, 240)) for p in points), torch.eye(3), protocols=("rekd",)
    )
    assert (
        found["rekd.repeatability@5"] == 0.5
    )  # the first two match the same keypoint; exactly 5 px is too far
    assert found["rekd.repeatability@5"] == rekd_repeatability(a, b, torch.eye(3), 5.0)
    assert found["rekd.repeatability"] == 0


# ---- through the run and the command line


def test_features_of_equal_file_names_are_separate(tmp_path):
    root = evd_folder(tmp_path / "EVD")
    evaluate(open_dataset(root), RunSettings(("sift",), num_keypoints=200), tmp_path / "out")
    stored = sorted(
        str(p.relative_to(tmp_path / "out" / "features" / "sift"))
        for p in (tmp_path / "out" / "features").rglob("*.npz")
    )
    assert stored == ["EVD/1-adam.npz", "EVD/1-cafe.npz", "EVD/2-adam.npz", "EVD/2-cafe.npz"]
    for row in read_run(tmp_path / "out").rows:
        assert row.ok
        assert row.value("rekd.mma@3") > 0.9
        assert row.value("rekd.correct@5") == round(
            row.value("rekd.mma@5") * row.value("rekd.matches")
        )


def test_evaluate_and_report_of_annotated_pairs(tmp_path):
    a, b, _ = two_views(20)
    wxbs_pair(tmp_path / "wxbs" / "WGBS" / "same", np.concatenate([a, a], axis=1))
    textured(1).save(tmp_path / "wxbs" / "WGBS" / "same" / "02.png")  # the first image again
    wxbs_pair(tmp_path / "wxbs" / "WGBS" / "other", np.concatenate([a, b], axis=1))
    arguments = [
        "evaluate",
        str(tmp_path / "wxbs"),
        "--systems",
        "sift,lattice",
        "--output",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "controls have no descriptors" in done.output
    rows = {row.pair: row for row in read_run(tmp_path / "out").rows}
    assert set(rows) == {"same", "other"}
    # equal images: x_a = x_b fulfills any skew-symmetric matrix, so all annotations agree
    assert rows["same"].value("marked.share") == 1
    assert rows["other"].value("marked.share") < 0.5
    assert rows["same"].kind == "marked"
    text = write_report(tmp_path / "out").markdown.read_text()
    assert "manually annotated correspondences" in text
    assert "| sift" in text
    bare = run(open_dataset(tmp_path / "wxbs").pairs, lambda _: torch.zeros(3, 2))
    assert all("needs matches" in row["reason"] or "need matches" in row["reason"] for row in bare)


# ---- the real sets


@pytest.fixture
def eval_dir(data_dir):
    folder = data_dir / "eval"
    if not folder.is_dir():
        pytest.skip("no evaluation sets next to the repository (../shared/data/eval)")
    return folder


def test_real_folders_are_read_completely(eval_dir):
    counts = {"strecha": 171 + 45, "wxbs": 14, "evd": 7, "tilde_webcam": 3 * 45}
    for name, count in counts.items():
        found = open_dataset(eval_dir / name)
        assert len(found.pairs) == count
        assert not found.problems


def test_real_cameras_agree_with_matches_of_neighbors(eval_dir):
    pair = open_dataset(eval_dir / "strecha" / "entry-P10").pairs[0]
    row = run([pair], system("sift", Options(2000)), num_keypoints=2000)[0]
    assert row["ok"], row["reason"]
    assert row["metrics"]["pose.precision"] > 0.8
    assert row["metrics"]["pose.error_poselib"] < 1


def test_real_homographies_and_annotations(eval_dir):
    for pair in open_dataset(eval_dir / "evd").pairs:
        sizes = []
        for path in (pair.image_a, pair.image_b):
            with Image.open(path) as image:
                sizes.append(torch.tensor(image.size).double())
        grid = torch.cartesian_prod(torch.linspace(0, 1, 30), torch.linspace(0, 1, 30)).double() * (
            sizes[0] - 1
        )
        mapped = warp_points(grid, pair.H_ab)
        assert (
            float(((mapped >= 0) & (mapped <= sizes[1] - 1)).all(dim=1).double().mean()) > 0.15
        )  # cafe has a sixth of the size
    for pair in open_dataset(eval_dir / "wxbs").pairs:
        for path, xy in ((pair.image_a, pair.xy_a), (pair.image_b, pair.xy_b)):
            with Image.open(path) as image:
                assert bool((xy >= -1).all())
                assert bool((xy <= torch.tensor(image.size)).all())
