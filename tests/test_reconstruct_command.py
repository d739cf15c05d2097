"""``tiepoints reconstruct`` on rendered scenes: two textured planes at different depths, seen by a
camera that moves sideways or only rotates.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter, TiffImagePlugin

import tiepoints
from helpers import call, run_python, texture
from tiepoints.datasets.reconstructions import find_models
from tiepoints.errors import DataError
from tiepoints.exif import Position, local_meters, read_camera, read_position, shared_cameras
from tiepoints.formats.colmap import ColmapDatabase, quiet_colmap
from tiepoints.jobs import mapping
from tiepoints.jobs.mapping import MapOptions, View, not_contained, write_models
from tiepoints.jobs.reconstruct import ReconstructOptions, Summary
from tiepoints.jobs.sift import compare_sift
from tiepoints.panorama import rotation_share
from tiepoints.report.reconstruction import Scene

pytest.importorskip("pycolmap")
SIZE, FOCAL = (320, 240), 300.0
FAST = ("--quality", "fast", "--max-size", 320, "--threads", 1)


def shifted(folder: Path, count: int, seed: int = 0) -> Path:
    """Views of a near plane in front of a far one; the camera moves by 0.25 of the near depth."""
    folder.mkdir(parents=True, exist_ok=True)
    far, near = (np.asarray(texture(seed + k, (700, 260))) for k in (0, 1))
    for k in range(count):
        x_far, x_near = 12 * k, 30 * k
        picture = far[:240, x_far : x_far + 320].copy()
        picture[110:] = near[110:240, x_near : x_near + 320]
        Image.fromarray(picture).save(folder / f"{seed}_{k}.png")
    return folder


def rotated(folder: Path, count: int) -> Path:
    """Views of one position in different directions."""
    folder.mkdir()
    scene = texture(5, (900, 700))
    K = np.array([[FOCAL, 0, 159.5], [0, FOCAL, 119.5], [0, 0, 1]])
    center = np.array([[500.0, 0, 449.5], [0, 500.0, 349.5], [0, 0, 1]])
    for k in range(count):
        a = math.radians(5 * (k - count / 2))
        R = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
        H = center @ R @ np.linalg.inv(K)
        coefficients = (H / H[2, 2]).ravel()[:8].tolist()
        view = scene.transform(SIZE, Image.Transform.PERSPECTIVE, coefficients, Image.BICUBIC)
        view.save(folder / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Four views, a uniform image and one of something else, reconstructed."""
    base = tmp_path_factory.mktemp("scene")
    photos = shifted(base / "photos", 5)
    Image.new("RGB", SIZE, (128, 128, 128)).save(photos / "gray.png")
    texture(77, SIZE).filter(ImageFilter.GaussianBlur(3)).save(photos / "other.png")
    done = call("-q", "reconstruct", photos, "--output", base / "model", *FAST, "--json")
    return base, *done


def test_photographs_become_a_model(result):
    import pycolmap

    base, code, out, err = result
    summary = json.loads(out)
    assert code == 1, err  # two images are not in the model
    assert (summary["images"], summary["registered"]) == (7, 5)
    assert (summary["camera"], summary["cameras"]) == ("auto", 1)
    assert "one for all images" in (base / "model" / "report.html").read_text(encoding="utf-8")
    reasons = dict(summary["unregistered"])
    assert set(reasons) == {"gray.png", "other.png"}
    assert "keypoints: uniform" in reasons["gray.png"]
    assert "no overlap with another image" in reasons["other.png"]
    assert "blurred" in reasons["other.png"].partition(";")[2]
    assert "not in the model: gray.png" in err
    model = pycolmap.Reconstruction(base / "model" / "sparse" / "0")
    assert model.num_reg_images() == 5
    assert model.num_points3D() == summary["models"][0]["points"] > 50
    assert summary["models"][0]["error"] < 1
    # the camera moves sideways in equal steps: the positions are on a line, equally spaced
    centers = np.array(
        [model.find_image_with_name(f"0_{k}.png").projection_center() for k in range(5)]
    )
    steps = np.linalg.norm(np.diff(centers, axis=0), axis=1)
    assert steps.std() < 0.05 * steps.mean()
    # colors are those of the image
    view = model.find_image_with_name("0_0.png")
    pixels = np.asarray(Image.open(base / "photos" / "0_0.png")).astype(float)
    seen = [(p.xy, model.points3D[p.point3D_id].color) for p in view.points2D if p.has_point3D()]
    errors = [np.abs(pixels[int(xy[1]), int(xy[0])] - color).mean() for xy, color in seen]
    assert np.median(errors) < 12


def test_points_and_cameras_are_in_the_ply_file(result):
    base, _, out, _ = result
    content = (base / "model" / "model.ply").read_bytes()
    header, _, body = content.partition(b"end_header\n")
    count = json.loads(out)["models"][0]["points"] + 5
    assert f"element vertex {count}".encode() in header
    vertices = np.frombuffer(body, np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)]))
    assert len(vertices) == count
    assert (vertices["rgb"][-5:] == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("quality", "down_levels"), [("fast", 2), ("default", None), ("best", None)]
)
def test_keypoints_are_detected_without_the_enlarged_level(quality, down_levels):
    options = ReconstructOptions(quality=quality).extraction()
    assert (options.up_levels, options.down_levels) == (0, down_levels)


def test_the_same_command_resumes(result, monkeypatch):
    base, *_ = result
    before = (base / "model" / "sparse" / "0" / "points3D.bin").stat().st_mtime_ns

    def fail(*_, **__):
        raise AssertionError("mapped again")

    monkeypatch.setattr("tiepoints.jobs.reconstruct.map_images", fail)
    code, out, _ = call(
        "-q", "reconstruct", base / "photos", "--output", base / "model", *FAST, "--json"
    )
    assert code == 1
    assert json.loads(out)["pairs"]["matched"] == 0
    assert (base / "model" / "sparse" / "0" / "points3D.bin").stat().st_mtime_ns == before


def test_interrupted_mapping_keeps_the_matches(result, monkeypatch):
    base, *_ = result

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tiepoints.jobs.reconstruct.map_images", stop)
    arguments = ("reconstruct", base / "photos", "--output", base / "model", *FAST, "--seed", 3)
    code, _, err = call("-q", *arguments)
    assert code == 130
    assert "the same command resumes" in err
    monkeypatch.undo()
    code, out, _ = call("-q", *arguments, "--json")
    assert json.loads(out)["pairs"]["matched"] == 0
    assert json.loads(out)["registered"] == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: shifted(folder, 1), "at least 3 that overlap"),
        (lambda folder: rotated(folder, 4), "the camera only rotated"),
    ],
)
def test_what_cannot_be_reconstructed(tmp_path, make, message):
    photos = make(tmp_path / "photos")
    code, _, err = call("-q", "reconstruct", photos, "--output", tmp_path / "model", *FAST)
    assert code == 2
    assert message in err
    assert not (tmp_path / "model" / "sparse").exists()


def test_copies_and_unrelated_images_are_refused(tmp_path):
    for name in ("same", "unrelated"):
        (tmp_path / name).mkdir()
        for k in range(3):
            seed = 40 + k if name == "unrelated" else 0
            texture(seed, SIZE).save(tmp_path / name / f"{k}.png")
    for name, message in (("same", "the same view"), ("unrelated", "no overlap: none of 3")):
        with pytest.raises(DataError, match=message):
            tiepoints.reconstruct(
                tmp_path / name, tmp_path / f"out-{name}", quality="fast", max_size=320
            )


def test_two_scenes_become_two_models(tmp_path):
    photos = shifted(tmp_path / "photos", 4)
    shifted(photos, 4, seed=20)
    code, out, err = call("-q", "reconstruct", photos, "--output", tmp_path / "m", *FAST, "--json")
    summary = json.loads(out)
    assert code == 1
    assert [model["images"] for model in summary["models"]] == [4, 4]
    assert "show 2 scenes" in err
    assert (tmp_path / "m" / "sparse" / "1" / "images.bin").is_file()
    assert {reason for _, reason in summary["unregistered"]} == {"in another model, sparse/1"}


def test_invalid_arguments(tmp_path):
    photos = shifted(tmp_path / "photos", 3)
    (photos / "phone.heic").write_bytes(b"ftypheic")
    pinhole = "SIMPLE_PINHOLE:nan,160,120"
    (tmp_path / "o" / "dense" / "images").mkdir(parents=True)
    shutil.copy2(photos / "0_0.png", tmp_path / "o" / "dense" / "images")
    for arguments, message in (
        ((photos, "--output", photos / "model"), "is inside the folder of the photographs"),
        ((tmp_path / "gone", "--output", tmp_path / "o"), "no such file"),
        ((photos, "--output", tmp_path / "o", "--pairs", "all"), "no list of pairs at all"),
        ((photos, "--output", tmp_path / "o", "--camera", "x"), "camera must be auto"),
        ((photos, "--output", tmp_path / "o", "--camera", pinhole), "all numbers finite"),
        ((photos / "phone.heic", photos / "0_0.png", "--output", tmp_path / "o"), "convert it"),
        ((photos / "0_[01].png", "--output", tmp_path / "o"), "2 photographs given"),
        ((tmp_path / "**" / "*.png", "--output", tmp_path / "o"), "include results in --output"),
    ):
        code, _, err = call("-q", "reconstruct", *arguments)
        assert code == 2
        assert message in err, err
    with pytest.raises(ValueError, match="quality must be one of"):
        tiepoints.reconstruct(photos, tmp_path / "o", quality="ultra")
    for options in ({"fps": math.inf}, {"neighbors": 0}, {"threads": -2}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            ReconstructOptions(**options)
    with pytest.raises(TypeError, match="got ndarray; save arrays"):
        tiepoints.reconstruct([np.zeros((9, 9))], tmp_path / "o")


def test_video(tmp_path):
    cv2 = pytest.importorskip("cv2")
    frames = sorted(shifted(tmp_path / "frames", 5).iterdir())
    writer = cv2.VideoWriter(str(tmp_path / "c.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 4, SIZE)
    for frame in frames:
        sharp = cv2.imread(str(frame))
        writer.write(cv2.GaussianBlur(sharp, (0, 0), 3))
        writer.write(sharp)
    writer.release()
    model, summary = tiepoints.reconstruct(
        tmp_path / "c.avi", tmp_path / "m", quality="fast", max_size=320, fps=2, threads=1
    )
    assert model.num_reg_images() == 5
    names = sorted(path.name for path in (tmp_path / "m" / "frames").iterdir())
    assert names == [f"c_{k:06d}.jpg" for k in (1, 3, 5, 7, 9)]  # the sharp ones
    assert (summary.camera, summary.cameras) == ("single", 1)
    assert summary.pairs["reason"].startswith("each image with the next 10")


def write_position(path: Path, position: Position) -> None:
    def dms(value: float) -> tuple[float, float, float]:
        degrees, rest = divmod(abs(value), 1)
        minutes, rest = divmod(rest * 60, 1)
        return degrees, minutes, rest * 60

    exif = Image.Exif()
    exif[0x8825] = {
        1: "N" if position.latitude >= 0 else "S",
        2: dms(position.latitude),
        3: "E" if position.longitude >= 0 else "W",
        4: dms(position.longitude),
        6: position.altitude,
    }
    texture(0, (64, 48)).save(path, exif=exif)


def test_gps_positions_of_the_exif(tmp_path):
    place = Position(-33.8568, 151.2153, 12.5)
    write_position(tmp_path / "a.jpg", place)
    assert read_position(tmp_path / "a.jpg") == pytest.approx(place, abs=1e-6)
    texture(0, (64, 48)).save(tmp_path / "b.jpg")
    assert read_position(tmp_path / "b.jpg") is None
    assert read_position(tmp_path / "gone.jpg") is None
    # 0.001 degrees of latitude are 111.2 m; of longitude less, by the cosine; across 180 degrees
    meters = local_meters(
        [Position(60, 179.9995, 0), Position(60, -179.9995, 0), Position(60.001, 179.9995, 0)]
    )
    assert np.linalg.norm(meters[0] - meters[1]) == pytest.approx(55.6, abs=0.1)
    assert np.linalg.norm(meters[0] - meters[2]) == pytest.approx(111.2, abs=0.1)


def test_cameras_are_known_by_their_exif(tmp_path):
    def photo(name: str, model: str, focal: float | dict, size: tuple[int, int] = (64, 48)) -> Path:
        exif = Image.Exif()
        exif[0x010F], exif[0x0110] = "Maker", model
        exif.get_ifd(0x8769).update(focal if isinstance(focal, dict) else {0x920A: focal})
        texture(0, size).save(tmp_path / name, exif=exif)
        return tmp_path / name

    def plain(name: str, size: tuple[int, int]) -> Path:
        texture(0, size).save(tmp_path / name)
        return tmp_path / name

    def shared(**files: Path) -> set[str]:
        """Names in groups, such as ab,c."""
        keys = shared_cameras(files)
        return {"".join(n for n in keys if keys[n] == key) for key in keys.values()}

    a, b = photo("a.jpg", "M", 4.25), photo("b.jpg", "M", 4.25)
    assert read_camera(a) == ("Maker", "M", 4.25, None, None)
    tags = {0x920A: 4.25, 0xA405: 26, 0xA404: 2.0}
    assert read_camera(photo("zoom.jpg", "M", tags)) == ("Maker", "M", 4.25, 26, 2)
    c, d, e = (
        photo("c.jpg", "N", 4.25),
        photo("d.jpg", "M", 5.0),
        photo("e.jpg", "M", 4.25, (48, 64)),
    )
    unknown = {0x920A: 4.25, 0xA404: TiffImagePlugin.IFDRational(0, 0)}
    assert read_camera(photo("unknown.jpg", "M", unknown)) == ("Maker", "M", 4.25, None, None)
    z = photo("z.jpg", "M", {0x920A: 4.25, 0xA405: 52})  # another lens or crop of the phone
    assert shared(a=a, b=b, c=c, d=d, e=e, z=z) == {"ab", "c", "d", "e", "z"}
    f, g, h = plain("f.jpg", (64, 48)), plain("g.jpg", (64, 48)), plain("h.jpg", (48, 64))
    assert set(read_camera(f)) == set(read_camera(tmp_path / "none.jpg")) == {None}
    assert shared(f=f, g=g, h=h) == {"fg", "h"}
    assert shared(a=a, b=b, f=f, g=g) == {"ab", "fg"}
    # of many sizes: photographs of many people
    assert shared(a=a, b=b, f=f, g=g, i=plain("i.jpg", (64, 52))) == {"ab"}
    (tmp_path / "j.jpg").write_bytes(b"no image")
    assert shared(f=f, g=g, j=tmp_path / "j.jpg", k=tmp_path / "none.jpg") == {"fg"}


def test_images_of_a_camera_are_separated(tmp_path):
    import pycolmap

    write_position(tmp_path / "a.jpg", Position(48.1, 11.5, 520.0))
    features = tiepoints.build("sobelnet", "desnet").extract(tmp_path / "a.jpg")
    shared = dict.fromkeys("abcd", 1)
    with ColmapDatabase(tmp_path / "d.db", shared=shared, write=True) as database:
        database.write("a", features, tmp_path / "a.jpg")
        database.write("b", features)
        first = database.read_camera("a")
        first_id = database.next_camera_id()
        assert first_id > first.camera_id == database.read_camera("b").camera_id
        for _ in range(2):  # the second time, nothing is left to do
            database.separate({"a": first_id + 7})
        own = database.read_camera("a")
        assert own.camera_id == first_id + 7
        assert own.params.tolist() == first.params.tolist()
        assert database.read_camera("b").camera_id == first.camera_id
        with pytest.raises(DataError, match="contains no image 'missing'"):
            database.separate({"b": first_id, "missing": first_id + 1})
        assert database.read_camera("b").camera_id == first.camera_id
    with ColmapDatabase(tmp_path / "d.db", shared=shared, write=True) as database:
        for name in "cd":
            database.write(name, features)
    with pycolmap.Database.open(tmp_path / "d.db") as stored:
        image = stored.read_image_with_name("a")
        frame = stored.read_frame(image.frame_id)
        assert frame.rig_id == stored.read_rig_with_sensor(image.data_id.sensor_id).rig_id
        assert frame.rig_id == own.camera_id
        assert stored.read_all_pose_priors()[0].corr_data_id == image.data_id
    # images were added: all share one again, as in a new database
    with ColmapDatabase(tmp_path / "d.db", shared=shared, write=True) as database:
        files = dict.fromkeys("abcd", tmp_path / "a.jpg")
        moved = database.assign_cameras(files, shared)
        assert len({database.read_camera(name).camera_id for name in "abcd"}) == 1
        assert moved
        assert database.assign_cameras(files, shared) == set()


def test_positions_become_pose_priors(tmp_path):
    import pycolmap

    write_position(tmp_path / "a.jpg", Position(48.1, 11.5, 520.0))
    features = tiepoints.build("sobelnet", "desnet").extract(tmp_path / "a.jpg")
    with ColmapDatabase(tmp_path / "d.db", write=True) as database:
        database.write("a.jpg", features, tmp_path / "a.jpg")

    def check() -> None:
        with pycolmap.Database.open(tmp_path / "d.db") as database:
            (prior,) = database.read_all_pose_priors()
            image = database.read_image_with_name("a.jpg")
        assert prior.position.ravel() == pytest.approx([48.1, 11.5, 520.0], abs=1e-6)
        assert prior.coordinate_system == pycolmap.PosePriorCoordinateSystem.WGS84
        assert prior.corr_data_id == image.data_id

    check()
    shared = {"a.jpg": 1, "b.jpg": 1}
    with ColmapDatabase(tmp_path / "d.db", shared=shared, write=True) as database:
        database.write("b.jpg", features)
        database.remove(["a.jpg"])
        database.write("a.jpg", replace(features, image_size=(48, 64)))  # replaced
        assert database.read_camera("a.jpg").camera_id != database.read_camera("b.jpg").camera_id
    check()


def test_rotation_and_parallax_are_told_apart():
    rng = np.random.default_rng(0)
    points = rng.uniform((-2, -1.5, 4), (2, 1.5, 8), (200, 3))
    a = math.radians(8)
    R = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])

    def project(xyz):
        return FOCAL * xyz[:, :2] / xyz[:, 2:] + (159.5, 119.5)

    sizes = (SIZE, SIZE)
    noise = rng.normal(0, 0.3, (200, 2))
    assert rotation_share(project(points), project(points @ R.T) + noise, sizes) > 0.95
    moved = project(points @ R.T + (0.6, 0, 0))
    # no homography explains half of the matches
    assert rotation_share(project(points), moved + noise, sizes) == 0
    plane = points * (1, 1, 0) + (0, 0, 5)  # a translation in front of a plane is no rotation
    moved = project(plane @ R.T + (0.6, 0, 0.2))
    assert rotation_share(project(plane), moved, sizes, focal=FOCAL / 320) < 0.85


def test_report_contains_everything_without_a_network(result):
    base, *_ = result
    page = (base / "model" / "report.html").read_text(encoding="utf-8")
    for text in ("3D view", "Images that are not in the model", "gray.png", "Reprojection errors"):
        assert text in page
    assert not re.search(r"(src|href)=[\"']?https?:", page)
    assert "script-src 'unsafe-inline'" in page
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page).group(1))
    count = json.loads((base / "model" / "summary.json").read_text())["models"][0]["points"]
    assert len(base64.b64decode(data["colors"])) <= 3 * count
    assert len(base64.b64decode(data["positions"])) == 2 * len(base64.b64decode(data["colors"]))
    assert {camera["name"] for camera in data["cameras"]} == {f"0_{k}.png" for k in range(5)}


def test_report_quantizes_the_points_to_a_fraction_of_the_extent():
    from tiepoints.report.reconstruction import _upright, _viewer_data

    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(0, 2, (500, 3)), [[1000, 0, 0]]])
    views = {
        f"{k}": View(
            np.array([k, 0.2 * k, -5.0]), np.eye(3), SIZE, FOCAL, np.zeros((0, 2)),
            np.zeros(0, np.int64), np.zeros((0, 2)),
        )
        for k in range(4)
    }  # fmt: skip
    scene = Scene(
        "<x>", {}, "", points, np.zeros((501, 3), np.uint8), np.full(501, 3), views, {}, {}, {}
    )
    data = _viewer_data(scene)
    grid = np.frombuffer(base64.b64decode(data["positions"]), "<u2").reshape(-1, 3)
    low, high = np.array(data["low"]), np.array(data["high"])
    found = low + (high - low) * grid / 65535
    assert len(found) == 500  # without the distant one
    axes = _upright(list(views.values()))
    np.testing.assert_allclose(axes, [[1, 0, 0], [0, -1, 0], [0, 0, -1]], atol=1e-9)
    centered = (points - np.median(points, axis=0)) @ axes.T
    scale = np.quantile(np.linalg.norm(centered, axis=1), 0.9)
    np.testing.assert_allclose(found, centered[:500] / scale, atol=1e-3)


def test_aerial_images_are_shown_from_above():
    from tiepoints.report.reconstruction import _upright

    north = np.array([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])  # looks down, top of the image north
    views = [
        View(np.array([x, y, 9.0]), north, SIZE, FOCAL, *[np.zeros((0, 2))] * 3)
        for x in range(3)
        for y in range(3)
    ]
    np.testing.assert_allclose(_upright(views)[1], [0, 0, 1], atol=1e-9)


def test_numbers_of_sift_are_compared(result):
    base, *_ = result
    out = base / "compared"
    model, summary = tiepoints.reconstruct(
        base / "photos",
        out,
        quality="fast",
        max_size=320,
        threads=1,
        compare="sift",
        undistort=True,
    )
    assert summary.sift["registered"] >= 4
    assert "Compared with SIFT" in (out / "report.html").read_text(encoding="utf-8")
    assert len(list((out / "dense" / "images").iterdir())) == model.num_reg_images()


def test_cameras_of_sift_are_shared_as_ours(tmp_path):
    import pycolmap

    photos = shifted(tmp_path / "photos", 4)
    names = sorted(path.name for path in photos.iterdir())
    for groups, count in (
        (dict.fromkeys(names, 1), 1),
        ({names[0]: 1, names[2]: 1}, 3),
        ({}, 4),
    ):
        folder = tmp_path / str(count)
        compare_sift(
            folder,
            photos,
            names,
            [],
            max_size=200,
            camera="auto",
            groups=groups,
            mapping=MapOptions(),
        )
        with pycolmap.Database.open(folder / "database.db") as database:
            cameras = {i.name: i.camera_id for i in database.read_all_images()}
        assert len(set(cameras.values())) == count
        assert (cameras[names[0]] == cameras[names[2]]) == (count < 4)
    compare_sift(
        tmp_path / "known",
        photos,
        names,
        [],
        max_size=200,
        camera="PINHOLE:300,301,160,120",
        groups=dict.fromkeys(names, 1),
        mapping=MapOptions(),
    )
    with pycolmap.Database.open(tmp_path / "known" / "database.db") as database:
        (camera,) = database.read_all_cameras()
    assert camera.params.tolist() == [300, 301, 160, 120]


def test_no_model_is_an_empty_folder(tmp_path):
    """As of SIFT on photographs that it cannot match."""
    (tmp_path / "sparse" / "0").mkdir(parents=True)
    write_models([], tmp_path / "sparse")
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]
    assert not list((tmp_path / "sparse").iterdir())


def test_models_are_found_for_a_training(result):
    base, *_ = result
    expected = [(base / "model" / "sparse" / "0", base / "photos")]
    for folder in (base / "model", base / "model" / "sparse" / "0"):
        assert find_models(folder) == expected


def test_models_contained_in_a_larger_one_are_dropped():
    class Named:
        def __init__(self, *names):
            self.names = names

        def reg_image_ids(self):
            return list(range(len(self.names)))

        def image(self, index):
            return SimpleNamespace(name=self.names[index])

    whole, part, other = Named("a", "b", "c", "d"), Named("b", "c", "d"), Named("d", "e", "f")
    assert not_contained([whole, part, other]) == [whole, other]


def test_cameras_are_not_refined_if_the_focal_length_diverges(monkeypatch):
    model = photographed([500.0] * 6)
    refined = mapping._refined(model, 1)
    assert refined is not model
    assert refined.compute_mean_reprojection_error() < 0.5
    monkeypatch.setattr(mapping, "FOCAL_CHANGE", 1.0)  # any change is too large
    assert mapping._refined(model, 1) is model


class _Mapped:
    """A model of some images, as the mapper returns it."""

    def __init__(self, names: str, points: int, focal: float = 100.0):
        self.names, self.points = names, points
        camera = SimpleNamespace(width=100, height=80, mean_focal_length=lambda: focal)
        self.cameras = {1: camera}

    def num_reg_images(self) -> int:
        return len(self.names)

    def num_points3D(self) -> int:
        return self.points

    def compute_num_observations(self) -> int:
        return 3 * self.points

    def reg_image_ids(self) -> range:
        return range(len(self.names))

    def image(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(name=self.names[number], camera_id=1)


def test_missing_images_are_mapped_with_constant_cameras(tmp_path, monkeypatch):
    calls = []

    def mapped(*arguments, refine, adjusted_later):
        assert adjusted_later
        calls.append((arguments[3], refine))
        return [_Mapped("abcd", 9)] if not refine else [_Mapped("abc", 0), _Mapped("ab", 7)]

    monkeypatch.setattr(mapping, "_map_once", mapped)
    monkeypatch.setattr(mapping, "_refined", lambda model, threads: model)

    def models_of(names):
        paths = tmp_path / "x.db", tmp_path / "work"
        return mapping.map_images(*paths, images=list(names), adjusted_later=True)

    (model,) = models_of("abcd")
    assert model.names == "abcd"
    # the model without points does not count
    assert calls == [(0, True), (1, True), (0, False)]
    calls.clear()
    (model,) = models_of("ab")
    assert model.names == "ab"
    assert calls == [(0, True)]


def test_missing_images_are_mapped_from_another_start(tmp_path, monkeypatch):
    found = {0: [_Mapped("abc", 7)], 1: [_Mapped("abc", 9)]}

    def mapped(*arguments, refine, **_):
        return found[arguments[3]] if refine else []

    monkeypatch.setattr(mapping, "_map_once", mapped)

    def points() -> int:
        (model,) = mapping.map_images(tmp_path / "x.db", tmp_path / "work", images=list("abcd"))
        return model.points

    assert points() == 9  # as many images, more observations
    found[1] = [_Mapped("ab", 99)]
    assert points() == 7
    found[1] = []
    assert points() == 7
    found[1] = [_Mapped("abc", 9)]
    monkeypatch.setattr(mapping, "FEW_IMAGES", 3)
    assert points() == 7


@pytest.mark.parametrize(("names", "kept"), [("abc", "abc"), ("ab", "diverged")])
def test_images_are_mapped_again_if_a_focal_length_is_implausible(
    tmp_path, monkeypatch, names, kept
):
    def mapped(*_, refine, **__):
        return [_Mapped("abc", 9, 1e7)] if refine else [_Mapped(names, 7)]

    monkeypatch.setattr(mapping, "_map_once", mapped)
    monkeypatch.setattr(mapping, "_refined", lambda model, threads: model)
    (model,) = mapping.map_images(tmp_path / "x.db", tmp_path / "work", images=list("abc"))
    wrong = mapping.implausible_focal_lengths(model)
    if kept == "diverged":  # fewer images with constant cameras
        assert wrong == ["a", "b", "c"]
    else:
        assert wrong == []
        assert model.points == 7


def test_models_to_be_adjusted_later_have_as_many_images_and_points(result, tmp_path):
    database = result[0] / "model" / "database.db"
    options = mapping.MapOptions(threads=1)
    exact, coarse = (
        mapping.ModelStatistics.of(
            mapping.map_images(database, tmp_path / "work", options, adjusted_later=chosen)[0]
        )
        for chosen in (False, True)
    )
    assert coarse != exact  # fewer adjustments
    assert coarse.images == exact.images
    assert coarse.points == pytest.approx(exact.points, rel=0.03)
    assert coarse.error == pytest.approx(exact.error, rel=0.03)


def test_implausible_focal_lengths_are_a_warning(result, monkeypatch):
    base, *_ = result
    monkeypatch.setattr(mapping, "FOCAL_RANGE", (20.0, 30.0))
    _, out, _ = call(
        "-q", "reconstruct", base / "photos", "--output", base / "model", *FAST, "--json"
    )
    (warning,) = [w for w in json.loads(out)["warnings"] if "focal" in w]
    assert "--camera single" in warning


def test_robust_adjustment_resists_wrong_observations(result, capfd):
    import pycolmap

    folder = str(result[0] / "model" / "sparse" / "0")
    clean, wrong = pycolmap.Reconstruction(folder), pycolmap.Reconstruction(folder)
    rng = np.random.default_rng(0)
    shifted = 0
    for number in wrong.reg_image_ids():
        for point in wrong.image(number).points2D:
            if point.has_point3D() and rng.random() < 0.15:
                point.xy = point.xy + np.array([3.0, 1.0])  # all to one side, within 4 px
                shifted += 1
    assert shifted > 50

    def distances(model):  # between the cameras, relative to their sum
        images = [model.image(number) for number in sorted(model.reg_image_ids())]
        centers = np.array([image.projection_center() for image in images])
        found = np.linalg.norm(centers[:, None] - centers, axis=2)
        return found / found.sum()

    def error(model):
        return np.abs(distances(model) - distances(clean)).mean()

    plain, robust = pycolmap.Reconstruction(wrong), mapping.adjust_robustly(wrong)
    mapping._adjust(plain, pycolmap.BundleAdjustmentOptions())
    assert capfd.readouterr().err == ""
    assert error(robust) < 0.5 * error(plain)
    assert robust.num_reg_images() == clean.num_reg_images()
    lost = clean.compute_num_observations() - robust.compute_num_observations()
    assert 0.5 * shifted < lost < 2 * shifted
    assert wrong.compute_num_observations() == clean.compute_num_observations()  # not changed


def photographed(focal: list[float], cameras: int = 1, points: int = 150):
    """A model of images that were taken with the given focal lengths from positions around random
    points; the first images share a camera, the next as many another one, and so on.
    """
    import pycolmap

    rng = np.random.default_rng(0)
    xyz = rng.uniform(-1, 1, (points, 3))
    model = pycolmap.Reconstruction()
    number = [1 + k * cameras // len(focal) for k in range(len(focal))]
    for k in range(cameras):
        mean = np.mean([f for f, n in zip(focal, number, strict=True) if n == k + 1])
        shared = pycolmap.Camera(
            model="SIMPLE_RADIAL",
            width=640,
            height=480,
            params=[mean, 320, 240, 0],
            camera_id=k + 1,
        )
        model.add_camera_with_trivial_rig(shared)
    for k, f in enumerate(focal):
        angle = 2 * np.pi * k / len(focal)
        forward = np.array([np.cos(angle), 0.3 * np.sin(3 * angle), np.sin(angle)])
        forward /= -np.linalg.norm(forward)
        right = np.cross([0, 1, 0], forward) / np.linalg.norm(np.cross([0, 1, 0], forward))
        rotation = np.stack([right, np.cross(forward, right), forward])
        seen = xyz @ rotation.T + np.array([0, 0, 5])
        xy = f * seen[:, :2] / seen[:, 2:] + np.array([320, 240]) + rng.normal(0, 0.2, (points, 2))
        image = pycolmap.Image(name=f"{k}", camera_id=number[k], image_id=k + 1)
        image.points2D = [pycolmap.Point2D(p) for p in xy]
        pose = pycolmap.Rigid3d(pycolmap.Rotation3d(rotation), np.array([0, 0, 5.0]))
        model.add_image_with_trivial_frame(image, pose)
    for i, point in enumerate(xyz):
        elements = [pycolmap.TrackElement(k + 1, i) for k in range(len(focal))]
        model.add_point3D(point, pycolmap.Track(elements=elements), np.zeros(3, np.uint8))
    return model


def joined(near, far, shared: int):
    """A model of two others, the second 100 units away, whose points lack the coordinates of the
    first; its first image sees ``shared`` points of the first model.
    """
    import pycolmap

    model, images = pycolmap.Reconstruction(near), near.num_reg_images()
    moved = pycolmap.Sim3d(1.0, pycolmap.Rotation3d(), np.array([100.0, 0, 0]))
    other = pycolmap.Reconstruction(far)
    other.transform(moved)
    for number in sorted(other.reg_image_ids()):
        image = other.image(number)
        points = [point.xy for point in image.points2D]
        if number == 1:  # where it would see the points of the first model
            pose = image.cam_from_world()
            camera = other.camera(image.camera_id)
            seen = [
                camera.img_from_cam(pose * p.xyz) for p in list(near.points3D.values())[:shared]
            ]
            points += seen
        copy = pycolmap.Image(
            name=f"far {image.name}", camera_id=image.camera_id, image_id=number + images
        )
        copy.points2D = [pycolmap.Point2D(xy) for xy in points]
        model.add_image_with_trivial_frame(copy, image.cam_from_world())
    for point in other.points3D.values():
        elements = [
            pycolmap.TrackElement(e.image_id + images, e.point2D_idx) for e in point.track.elements
        ]
        model.add_point3D(point.xyz, pycolmap.Track(elements=elements), np.zeros(3, np.uint8))
    for i, number in enumerate(sorted(near.points3D)[:shared]):
        element = pycolmap.TrackElement(1 + images, len(other.image(1).points2D) + i)
        model.add_observation(number, element)
    return model


def test_a_model_falls_apart_where_nothing_connects_it():
    near, far = photographed([500.0] * 6), photographed([500.0] * 4, points=120)
    one = joined(near, far, 30)
    assert mapping.connected_parts(one) == [set(range(1, 11))]
    two = joined(near, far, 29)
    assert mapping.connected_parts(two) == [set(range(1, 7)), set(range(7, 11))]
    parts = mapping.adjusted_parts(two, 1)
    assert [model.num_reg_images() for model, _ in parts] == [6, 4]
    assert [after.num_points3D() for _, after in parts] == [150, 120]
    ((before, after),) = mapping.adjusted_parts(near, 1)
    assert before is near
    assert after.num_reg_images() == 6
    # no part has three images
    few = photographed([500.0] * 3, points=20)
    ((before, after),) = mapping.adjusted_parts(few, 1)
    assert before is few
    assert after.num_reg_images() == 3


def test_images_of_several_cameras_get_their_own(monkeypatch):
    focal = [500.0, 600.0] * 4

    def separated(model):
        """The result, None for the given cameras."""
        adjusted = mapping.adjust_robustly(model, 1)
        found = mapping.separate_cameras(model, adjusted, 1)
        return None if found is adjusted else found

    model = photographed(focal)
    assert len(model.cameras) == 1
    own = separated(model)
    found = [own.camera(own.image(k + 1).camera_id).mean_focal_length() for k in range(8)]
    np.testing.assert_allclose(found, focal, rtol=0.01)
    assert separated(own) is None
    with monkeypatch.context() as patched:  # no model has more observations
        patched.setattr(mapping, "SEPARATE_KEPT", 1.1)
        assert separated(model) is None
    same = photographed([550.0] * 8)
    assert separated(same) is None
    monkeypatch.setattr(mapping, "SEPARATE_SHARE", 2.0)
    assert separated(same) is None  # they hardly differ
    two = photographed([500.0] * 4 + [600.0] * 4, cameras=2)
    assert separated(two) is None  # nor do those of one camera of two


def test_images_of_several_cameras_are_a_warning(result, monkeypatch):
    base, *_ = result
    monkeypatch.setattr(mapping, "SEPARATE_SHARE", 10.0)  # always separate
    monkeypatch.setattr(mapping, "SEPARATE_FACTOR", 0.0)
    arguments = ("-q", "reconstruct", base / "photos", "--output", base / "own", *FAST, "--json")
    for _ in range(2):  # the second time, the stored model is read
        _, out, _ = call(*arguments)
        summary = json.loads(out)
        (text,) = [text for text in summary["warnings"] if "camera of its own" in text]
        assert "--camera per-image" in text
        assert summary["cameras"] == summary["registered"] == 5
    import pycolmap

    photo = min((base / "photos").iterdir())
    os.utime(photo)  # its camera is that of the others again, until the stored model is read
    assert json.loads(call(*arguments)[1])["cameras"] == 5
    # COLMAP continues with the model and the database, which have the same cameras
    model = pycolmap.Reconstruction(base / "own" / "sparse" / "0")
    database = base / "own" / "database.db"
    with quiet_colmap(pycolmap):
        found = pycolmap.triangulate_points(model, database, base / "photos", base / "continued")
    assert found.num_reg_images() == 5
    assert found.num_points3D() > 0.5 * model.num_points3D()
    with pycolmap.Database.open(database) as stored:
        for number in model.reg_image_ids():
            camera = stored.read_camera(model.image(number).camera_id)
            assert camera.params[0] == 1.2 * 320  # as before the model


def test_what_an_earlier_call_left(result, tmp_path, monkeypatch):
    """A damaged model is mapped again, a damaged summary ignored, and old results are named."""
    base, *_ = result
    output = tmp_path / "model"
    shutil.copytree(base / "model", output)
    (output / "sparse" / "0" / "images.bin").write_bytes(b"")
    (output / "summary.json").write_text('{"seconds": {"match": "x"}}')
    (output / "image_folder.txt").write_text("moved")
    (output / "dense").mkdir()
    arguments = ("reconstruct", base / "photos", "--output", output, *FAST)
    code, out, err = call(*arguments)
    assert code == 1, err
    assert "5 of 7 images" in out
    assert "dense is of an earlier model" in err
    shutil.copytree(base / "photos", tmp_path / "moved")
    call("reconstruct", tmp_path / "moved", "--output", output, *FAST)
    assert (output / "image_folder.txt").read_text().strip() == str(tmp_path / "moved")
    gray = tmp_path / "gray"
    gray.mkdir()
    for k in range(3):
        Image.new("RGB", SIZE, (128, 128, 120 + k)).save(gray / f"{k}.png")
    code, _, err = call("reconstruct", gray, "--output", output, *FAST)
    assert code == 2
    assert "sparse, model.ply, report.html, dense in" in err
    assert "are of an earlier call" in err


def test_names_that_are_not_utf8_are_failures(tmp_path):
    photos = shifted(tmp_path / os.fsdecode(b"caf\xe9"), 4)
    try:
        shutil.copy2(photos / "0_0.png", photos / os.fsdecode(b"\xe9.png"))
    except OSError:
        pytest.skip("the file system has Unicode names only")
    code, out, err = call("reconstruct", photos, "--output", tmp_path / "o", *FAST)
    assert code == 1
    assert "4 of 4 images" in out
    assert "not valid UTF-8" in err
    assert (tmp_path / "o" / "report.html").stat().st_size > 10_000
    assert find_models(tmp_path / "o")[0][1] == photos


def test_images_that_colmap_cannot_read_are_not_in_the_undistorted_model(tmp_path):
    import pycolmap

    photos = shifted(tmp_path / "photos", 5)
    Image.open(photos / "0_2.png").save(photos / "0_2.webp", lossless=True)
    (photos / "0_2.png").unlink()
    (tmp_path / "o" / "dense" / "images").mkdir(parents=True)
    (tmp_path / "o" / "dense" / "images" / "removed.png").write_bytes(b"of an earlier model")
    arguments = ("--undistort", "--compare", "sift")
    code, out, err = call("reconstruct", photos, "--output", tmp_path / "o", *FAST, *arguments)
    assert code == 1
    assert "5 of 5 images" in out
    assert "0_2.webp: COLMAP cannot read it" in err
    assert "COLMAP cannot read 1 images (0_2.webp, ...)" in err
    dense = tmp_path / "o" / "dense"
    model = pycolmap.Reconstruction(dense / "sparse")
    names = sorted(model.image(number).name for number in model.reg_image_ids())
    assert names == sorted(path.name for path in (dense / "images").iterdir())
    assert names == [f"0_{k}.png" for k in (0, 1, 3, 4)]


def test_sigterm_is_not_handled_by_the_logging_of_colmap():
    script = (
        "import signal\n"
        "def stop(*_): print('stopped'); raise SystemExit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "from tiepoints.formats.colmap import require_pycolmap; require_pycolmap()\n"
        "signal.raise_signal(signal.SIGTERM)\n"
    )
    assert run_python(script) == (143, "stopped\n", "")


def test_only_the_listed_pairs_are_mapped(result, tmp_path):
    """Also if others were matched before; a list may name a pair twice."""
    base, *_ = result
    names = sorted(path.name for path in (base / "photos").glob("[0-9]*"))
    listed = tmp_path / "pairs.txt"
    pairs = list(itertools.combinations(names[:4], 2))
    listed.write_text("".join(f"{a} {b}\n{b} {a}\n" for a, b in [*pairs, *pairs]))
    shutil.copytree(base / "model", tmp_path / "model")
    found = []
    for output in (tmp_path / "model", tmp_path / "new"):
        arguments = ("reconstruct", base / "photos", "--output", output, *FAST, "--json")
        code, out, _ = call("-q", *arguments, "--pairs", listed)
        assert code == 1  # the other photographs are not in the model
        summary = json.loads(out)
        assert (summary["images"], summary["registered"]) == (7, 4)
        assert summary["pairs"]["chosen"] == summary["pairs"]["verified"] == 6
        reasons = dict(summary["unregistered"])
        assert set(reasons) == {*names[4:], "gray.png", "other.png"}
        assert set(reasons.values()) == {f"{listed} has no pair of it"}
        found.append([summary["models"][0]["points"], summary["models"][0]["observations"]])
    assert found[0] == found[1]
    photos = tmp_path / "photos"
    shutil.copytree(base / "photos", photos)
    arguments = (
        "-q",
        "reconstruct",
        photos,
        "--output",
        tmp_path / "fewer",
        *FAST,
        "--pairs",
        listed,
    )
    assert call(*arguments)[0] == 1
    (photos / names[3]).unlink()
    code, _, err = call(*arguments)
    assert code in (1, 2)  # three views may not suffice for a model
    assert f"{names[3]}: is not among the images, but in 3 of the listed pairs" in err or code == 2
    with ColmapDatabase(tmp_path / "fewer" / "database.db") as database:
        verified = [pair for pair in database.pairs() if len(database.read_inliers(*pair))]
    assert all(names[3] not in pair for pair in verified)
    listed.write_text("left.png right.png\n")
    code, _, err = call(
        "reconstruct", base / "photos", "--output", tmp_path / "none", *FAST, "--pairs", listed
    )
    assert code == 2
    assert "lists no pair of the 7 images" in err
    assert "left.png" in err


def test_the_largest_model_decides_the_cameras_of_the_database(result, tmp_path, monkeypatch):
    """A smaller one may give some of its images cameras of their own."""
    import pycolmap

    from tiepoints.jobs import reconstruct as job

    base, *_ = result
    model = pycolmap.Reconstruction(base / "model" / "sparse" / "0")
    images = sorted(model.reg_image_ids())
    parts = [mapping._only(model, images[:4]), mapping._only(model, images[2:])]
    monkeypatch.setattr(job, "map_images", lambda *_, **__: parts)
    given = iter([None, 100])

    def adjusted(_, model, first_id):
        number = next(given)
        own = set(model.cameras)
        return [model if number is None else mapping.with_own_cameras(model, own, number)]

    monkeypatch.setattr(job._Reconstruction, "_adjusted", adjusted)
    output = tmp_path / "model"
    call("-q", "reconstruct", base / "photos", "--output", output, *FAST)
    largest, smaller = (pycolmap.Reconstruction(output / "sparse" / name) for name in "01")
    assert {*smaller.reg_image_ids()} & {*largest.reg_image_ids()}
    with ColmapDatabase(output / "database.db") as database:
        for number in largest.reg_image_ids():
            image = largest.image(number)
            assert database.read_camera(image.name).camera_id == image.camera_id


def test_shared_cameras_in_words():
    def text(camera: str, cameras: int) -> str:
        return Summary(images=9, registered=8, camera=camera, cameras=cameras).camera_text

    assert text("auto", 1) == text("single", 1) == "one for all images"
    assert text("auto", 8) == text("per-image", 8) == "one per image"
    assert text("auto", 2) == "2 for 8 images"
    assert text("PINHOLE:90,90,50,40", 1) == "PINHOLE:90,90,50,40"


def test_a_copy_with_own_cameras(result):
    import pycolmap

    model = pycolmap.Reconstruction(str(result[0] / "model" / "sparse" / "0"))
    own = mapping.with_own_cameras(model, set(model.cameras))
    assert len(own.cameras) == own.num_reg_images() == model.num_reg_images()
    assert own.num_points3D() == model.num_points3D()
    assert own.compute_num_observations() == model.compute_num_observations()
    assert own.compute_mean_reprojection_error() >= 0
    for number in model.reg_image_ids():
        np.testing.assert_allclose(
            own.image(number).projection_center(), model.image(number).projection_center()
        )


def test_robust_adjustment_of_a_point_behind_the_cameras(result):
    import pycolmap

    model = pycolmap.Reconstruction(str(result[0] / "model" / "sparse" / "0"))
    count = model.num_points3D()
    point = next(iter(model.points3D.values()))
    centers = [model.image(number).projection_center() for number in model.reg_image_ids()]
    point.xyz = 2 * np.mean(centers, axis=0) - point.xyz
    views = mapping.read_model(model).views.values()
    assert any(np.isnan(view.residual).any() for view in views)
    adjusted = mapping.adjust_robustly(model)
    assert adjusted is not model
    assert adjusted.num_points3D() > 0.9 * count


def test_robust_adjustment_keeps_a_model_that_it_would_spoil(result, monkeypatch):
    import pycolmap

    model = pycolmap.Reconstruction(str(result[0] / "model" / "sparse" / "0"))
    monkeypatch.setattr(mapping, "FOCAL_CHANGE", 1.0)  # any change is too large
    assert mapping.adjust_robustly(model) is model
    monkeypatch.undo()
    monkeypatch.setattr(mapping, "KEPT_RESIDUAL", 0.0)  # no observation is left
    assert mapping.adjust_robustly(model) is model


def test_images_that_see_few_points_are_left_out(result):
    import pycolmap

    base, *_ = result
    model = pycolmap.Reconstruction(base / "model" / "sparse" / "0")
    assert mapping.without_uncertain_images(model) is model
    assert mapping.is_certain(model)
    count = model.num_reg_images()
    last = model.image(max(model.reg_image_ids()))
    seen = [point.point3D_id for point in last.points2D if point.has_point3D()]
    for number, point in enumerate(last.points2D):
        if point.has_point3D() and point.point3D_id in seen[29:]:
            model.delete_observation(last.image_id, number)
    assert last.num_points3D < 30
    certain = mapping.without_uncertain_images(model)
    assert certain.num_reg_images() == count - 1
    assert last.image_id not in certain.reg_image_ids()
    assert model.num_reg_images() == count
    for image in list(model.reg_image_ids()):  # a model of uncertain images only
        for number, point in enumerate(model.image(image).points2D):
            if point.has_point3D() and number % 20:
                model.delete_observation(image, number)
    assert mapping.without_uncertain_images(model) is model
    assert not mapping.is_certain(model)


@pytest.mark.parametrize("certain", [True, False])
def test_models_of_a_few_points(result, tmp_path, monkeypatch, certain):
    """They are dropped beside others; the only one is kept, with a warning."""
    import pycolmap

    from tiepoints.jobs import reconstruct as job

    base, *_ = result
    model = pycolmap.Reconstruction(base / "model" / "sparse" / "0")
    few = pycolmap.Reconstruction(model)
    for number in list(few.points3D)[6:]:
        few.delete_point3D(number)
    monkeypatch.setattr(job, "map_images", lambda *_, **__: [model if certain else few, few])
    monkeypatch.setattr(job._Reconstruction, "_adjusted", lambda _, model, first_id: [model])
    arguments = (base / "photos", "--output", tmp_path / "model", *FAST, "--json")
    summary = json.loads(call("-q", "reconstruct", *arguments)[1])
    assert len(summary["models"]) == 1
    warnings = [text for text in summary["warnings"] if "only 6 points" in text]
    assert len(warnings) == (not certain)
