"""COLMAP's database, read with sqlite, by COLMAP and by this package; cameras; kills; a model of
real photographs.
"""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from test_formats import some
from test_hdf5 import hloc_matches
from tiepoints.errors import DataError
from tiepoints.extract import build
from tiepoints.formats.colmap import ColmapDatabase
from tiepoints.formats.hdf5 import FeatureFile, MatchFile
from tiepoints.matching import match
from tiepoints.structs import Features, Matches

pycolmap = pytest.importorskip("pycolmap")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def stereo():
    """Features of two real photographs."""
    left, right, _ = pytest.importorskip("skimage.data").stereo_motorcycle()
    return build("keynet", "rootsift", num_keypoints=600, device="cpu").extract([left, right])


def tables(path, query):
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


@pytest.mark.parametrize("n", [0, 1, 7])
def test_features_round_trip(tmp_path, n):
    features = some(n)
    with ColmapDatabase(tmp_path / "d.db", write=True) as database:
        database.write("sub/a.png", features)
        assert database.done("sub/a.png", described=True)
    with ColmapDatabase(tmp_path / "d.db") as database:
        assert database.names() == ["sub/a.png"]
        found = database.read("sub/a.png")
        with pytest.raises(DataError, match=r"no image 'b\.png'"):
            database.read("b.png")
    assert torch.allclose(
        found.xy, features.xy, atol=1e-5
    )  # up to rounding in float32 after adding and subtracting half a pixel
    assert torch.equal(found.scale, features.scale)
    assert torch.equal(found.angle, features.angle)
    assert found.image_size == (100, 80)
    if n:  # signed values, unlike COLMAP's SIFT
        assert found.descriptors.shape == (n, 128)
        cosine = (found.descriptors * features.descriptors).sum(dim=1)
        assert (cosine > (1 - features.descriptors.mean(dim=1).square() * 128).sqrt() - 1e-3).all()


def test_file_has_the_half_pixel_offset_and_all_columns(tmp_path):
    features = some(7)
    with ColmapDatabase(tmp_path / "d.db", write=True) as database:
        database.write("a.png", features)
    ((rows, columns, data),) = tables(tmp_path / "d.db", "SELECT rows, cols, data FROM keypoints")
    table = np.frombuffer(data, np.float32).reshape(rows, columns)
    assert table.shape == (7, 4)
    assert np.allclose(table[:, :2], features.xy.numpy() + 0.5, atol=1e-5)
    assert np.array_equal(table[:, 2], features.scale.numpy())
    assert np.array_equal(table[:, 3], features.angle.numpy())
    ((x, y, *_),) = [k.todict().values() for k in pycolmap.keypoints_from_matrix(table[:1].copy())]
    assert (x, y) == tuple(table[0, :2])


def test_hloc_import_of_our_files_equals_our_database(tmp_path, stereo):
    """hloc creates a database from features, matches and a list of pairs: it adds half a pixel,
    then COLMAP verifies.
    """
    h5py = pytest.importorskip("h5py")
    names, found = ("s/a.png", "b.png"), match(*stereo, ratio=0.95)
    with (
        FeatureFile(tmp_path / "f.h5", write=True) as file,
        MatchFile(tmp_path / "m.h5", write=True) as pairs,
    ):
        for name, features in zip(names, stereo, strict=True):
            file.write(name, features)
        pairs.write_matches(*names, found, len(stereo[0]))
    (tmp_path / "pairs.txt").write_text(" ".join(names) + "\n")
    with (
        pycolmap.Database.open(tmp_path / "theirs.db") as database,
        h5py.File(tmp_path / "f.h5") as file,
    ):
        for number, name in enumerate(names, 1):
            width, height = (int(v) for v in file[name]["image_size"])
            params = [1.2 * max(width, height), width / 2, height / 2, 0]
            camera = pycolmap.Camera(
                model="SIMPLE_RADIAL", width=width, height=height, params=params
            )
            database.write_image(pycolmap.Image(name=name, camera_id=database.write_camera(camera)))
            database.write_keypoints(number, np.array(file[name]["keypoints"]) + 0.5)
        database.write_matches(1, 2, hloc_matches(tmp_path / "m.h5", *names)[0].astype(np.uint32))
    options = pycolmap.TwoViewGeometryOptions()
    options.ransac.random_seed = 0
    pycolmap.verify_matches(tmp_path / "theirs.db", tmp_path / "pairs.txt", options)
    with ColmapDatabase(tmp_path / "ours.db", write=True) as database:
        for name, features in zip(names, stereo, strict=True):
            database.write(name, features)
        database.write_matches(*names, found)
        database.verify([names])
    with (
        ColmapDatabase(tmp_path / "ours.db") as ours,
        ColmapDatabase(tmp_path / "theirs.db") as theirs,
    ):
        for name in names:
            assert torch.allclose(ours.read(name).xy, theirs.read(name).xy, atol=1e-5)
        assert torch.equal(ours.read_matches(*names).index, theirs.read_matches(*names).index)
        kept = [
            {tuple(pair) for pair in database.read_inliers(*names).index.tolist()}
            for database in (ours, theirs)
        ]
    assert len(kept[0] & kept[1]) > 0.95 * len(kept[0] | kept[1]) > 40


def test_missing_libraries_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    with pytest.raises(ImportError, match=r"tiepoints\[colmap\]"):
        ColmapDatabase(tmp_path / "d.db", write=True)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"tiepoints\[hdf5\]"):
        FeatureFile(tmp_path / "f.h5", write=True)
    assert not list(tmp_path.iterdir())


def test_colmap_matches_our_rootsift_equally(tmp_path, stereo):
    a, b = stereo
    with ColmapDatabase(tmp_path / "d.db", write=True) as database:
        for name, features in (("a.png", a), ("b.png", b)):
            database.write(name, features)
        again = database.read("a.png").descriptors
    assert ((again * a.descriptors).sum(dim=1) > 0.999).all()  # uint8
    pycolmap.match_exhaustive(tmp_path / "d.db")
    ours = {tuple(pair) for pair in match(a, b, ratio=0.8).index.tolist()}
    with ColmapDatabase(tmp_path / "d.db") as database:
        theirs = {tuple(pair) for pair in database.read_matches("a.png", "b.png").index.tolist()}
        assert len(database.read_inliers("a.png", "b.png")) > 40
    assert len(ours & theirs) > 0.9 * max(len(ours), len(theirs)) > 50


def colmap_matches(path):
    """Matches of the first pair by COLMAP's exhaustive matcher, which may abort its process."""
    code = "import sys, pycolmap; pycolmap.match_exhaustive(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with ColmapDatabase(path) as database:
        return {tuple(pair) for pair in database.read_matches(*database.names()).index.tolist()}


@pytest.mark.parametrize("dimension", [128, 64])
def test_colmap_matches_signed_descriptors_as_we_do(tmp_path, dimension):
    rng = torch.Generator().manual_seed(0)
    a, b = some(400, dimension), some(401, dimension)
    noise = torch.randn(300, dimension, generator=rng) * 0.8 / dimension**0.5
    b.descriptors[:300] = torch.nn.functional.normalize(a.descriptors[:300] + noise, dim=1)
    path = tmp_path / "d.db"
    with ColmapDatabase(path, write=True) as database:
        database.write("a.png", a)
        database.write("b.png", b)
        read = [database.read(name) for name in ("a.png", "b.png")]
    ours = {tuple(pair) for pair in match(a, b, ratio=0.8).index.tolist()}
    assert len(ours & {(i, i) for i in range(300)}) > 200
    theirs = colmap_matches(path)
    assert len(ours & theirs) > 0.95 * len(ours | theirs)
    again = {tuple(pair) for pair in match(*read, ratio=0.8).index.tolist()}
    assert len(ours & again) > 0.97 * len(ours | again)
    for found, features in zip(read, (a, b), strict=True):
        assert found.descriptors.shape == features.descriptors.shape


def test_descriptors_that_colmap_cannot_match_are_kept_with_a_warning(tmp_path, caplog):
    features = some(7, 256)
    with ColmapDatabase(tmp_path / "d.db", write=True) as database:
        for name in ("a.png", "b.png"):
            database.write(name, features)
        assert torch.equal(database.read("a.png").descriptors, features.descriptors)
    assert [r.message.count("descriptors of dimension 256") for r in caplog.records] == [1]


def test_descriptors_of_earlier_versions_and_sift_are_read(tmp_path):
    features = some(7)
    with ColmapDatabase(tmp_path / "d.db", write=True) as database:
        for name in ("float.png", "sift.png"):
            database.write(name, Features(features.keypoints, None, (100, 80)))
    stored = pycolmap.FeatureDescriptors()
    sift = np.random.default_rng(0).exponential(40, (7, 128)).clip(0, 255).astype(np.uint8)
    with pycolmap.Database.open(tmp_path / "d.db") as database:
        stored.data = features.descriptors.numpy().view(np.uint8)
        stored.type = pycolmap.FeatureExtractorType.UNDEFINED
        database.write_descriptors(1, stored)
        stored.data, stored.type = sift, pycolmap.FeatureExtractorType.SIFT
        database.write_descriptors(2, stored)
    with ColmapDatabase(tmp_path / "d.db") as database:
        assert torch.equal(database.read("float.png").descriptors, features.descriptors)
        expected = torch.nn.functional.normalize(torch.from_numpy(sift).float(), dim=1)
        torch.testing.assert_close(database.read("sift.png").descriptors, expected)


def test_matches_in_both_orders_are_verified(tmp_path, stereo):
    a, b = stereo
    found = match(a, b, ratio=0.95)
    with ColmapDatabase(tmp_path / "d.db", write=True) as database:
        for name, features in (("a.png", a), ("b.png", b), ("c.png", b[:0])):
            database.write(name, features)
        database.write_matches("b.png", "a.png", Matches(found.index.flip(1), found.score))
        database.write_matches("a.png", "c.png", Matches(found.index[:0], found.score[:0]))
        assert torch.equal(database.read_matches("a.png", "b.png").index, found.index)
        assert not database.has_matches("b.png", "c.png")
        assert not database.has_matches("b.png", "nothing.png")
        pairs = [("b.png", "a.png"), ("a.png", "c.png")]
        assert database.verify(pairs) == 1
        inliers = database.read_inliers("a.png", "b.png")
        assert 40 < len(inliers) <= len(found)
        assert {tuple(p) for p in inliers.index.tolist()} <= {
            tuple(p) for p in found.index.tolist()
        }
        # the pair is rectified: verified matches are on the same row
        assert (a.xy[inliers.index[:, 0], 1] - b.xy[inliers.index[:, 1], 1]).abs().max() < 8
        assert len(database.read_inliers("a.png", "c.png")) == 0
        # verified again among some of the matches
        database.forget_geometry(pairs[:1])
        some_inliers = inliers.index.flip(1)[:30]  # in the order of the names given
        assert database.verify(pairs, among={pairs[0]: some_inliers}) == 1
        kept = database.read_inliers(*pairs[0]).index.tolist()
        assert 20 < len(kept) <= 30
        assert {tuple(p) for p in kept} <= {tuple(p) for p in some_inliers.tolist()}
        with pytest.raises(DataError, match="already"):
            database.write("a.png", a)
        database.clear_matches()
        assert not database.has_matches("a.png", "b.png")
        assert database.done("a.png", described=True)
        database.clear()
        assert database.names() == []


def test_cameras(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated, which COLMAP ignores too
    exif.get_ifd(0x8769)[0xA405] = 28  # focal length on 35 mm film
    photo.save(tmp_path / "exif.jpg", exif=exif)
    photo.save(tmp_path / "plain.webp")
    with ColmapDatabase(tmp_path / "auto.db", write=True) as database:
        database.write("exif.jpg", some(3), tmp_path / "exif.jpg")
        database.write("plain.webp", some(3), tmp_path / "plain.webp")
    rows = tables(
        tmp_path / "auto.db", "SELECT width, height, params, prior_focal_length FROM cameras"
    )
    assert [row[:2] for row in rows] == [(100, 80)] * 2
    focal = [np.frombuffer(row[2])[0] for row in rows]
    assert 70 < focal[0] < 85
    assert focal[1] == 120
    assert [row[3] for row in rows] == [1, 0]
    assert tables(tmp_path / "auto.db", "SELECT COUNT(*) FROM frames") == [(2,)]

    # cameras shared by images with the same key, also if the database is opened again
    shared = {"a.png": "one", "b.png": "one", "c.png": "other"}
    path = tmp_path / "shared.db"
    for names in ("a.png", "d.png"), ("b.png", "c.png", "e.png"):
        with ColmapDatabase(path, shared=shared, write=True) as database:
            for name in names:
                database.write(name, some(3))
    pairs = tables(path, "SELECT name, camera_id FROM images")
    cameras = dict(pairs)
    assert cameras["a.png"] == cameras["b.png"]
    assert len(set(cameras.values())) == 4
    assert tables(path, "SELECT COUNT(*), COUNT(DISTINCT rig_id) FROM frames") == [(5, 4)]
    with ColmapDatabase(
        tmp_path / "each.db", camera="per-image", shared=shared, write=True
    ) as each:
        for name in shared:
            each.write(name, some(3))
    assert tables(tmp_path / "each.db", "SELECT COUNT(*) FROM cameras") == [(3,)]

    with ColmapDatabase(tmp_path / "far.db", camera="PINHOLE:90,91,300,40", write=True) as database:
        image = some(3)
        with pytest.raises(DataError, match=r"principal point .* \(300, 40\), lies outside"):
            database.write("a.png", image)

    for camera, params in (("single", [120, 50, 40, 0]), ("PINHOLE:90,91,50,40", [90, 91, 50, 40])):
        path = tmp_path / f"{camera[:3]}.db"
        for again in range(2):  # second iteration: in a database that has the camera
            with ColmapDatabase(path, camera=camera, write=True) as database:
                database.write(f"{again}.webp", some(3))
                other = Features(some(3).keypoints, None, (50, 80))
                with pytest.raises(DataError, match="50 x 80 but the one camera of all images"):
                    database.write("other.png", other)
                assert "other.png" not in database
        ((model, data, known),) = tables(
            path, "SELECT model, params, prior_focal_length FROM cameras"
        )
        assert np.frombuffer(data).tolist() == params
        assert (model, known) == ((1, 1) if camera != "single" else (2, 0))
        assert tables(path, "SELECT COUNT(*), COUNT(DISTINCT rig_id) FROM frames") == [(2, 1)]


@pytest.mark.parametrize(
    "camera", ["pinhole", "PINHOLE", "PINHOLE:1,2", "NOTHING:1,2,3,4", "PINHOLE:a,b,c,d"]
)
def test_invalid_cameras_raise(tmp_path, camera):
    with pytest.raises(ValueError, match=r"auto, per-image, single or MODEL|has the parameters"):
        ColmapDatabase(tmp_path / "d.db", camera=camera, write=True)


def test_files_that_are_not_colmap_databases_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="no database"):
        ColmapDatabase(tmp_path / "none.db")
    (tmp_path / "d.db").write_bytes(b"nonsense, and more of it " * 100)
    with pytest.raises(DataError, match="not a COLMAP database"):
        ColmapDatabase(tmp_path / "d.db")
    with (
        ColmapDatabase(tmp_path / "e.db", write=True) as database,
        pytest.raises(DataError, match="size of the image"),
    ):
        database.write("a.png", Features(some(3).keypoints, None, (0, 0)))


#: As in test_hdf5.py: child processes write and are killed, and report finished writes by a pipe.
KILLS = """
import os, random, signal, sys, time
import torch
from tiepoints.formats.colmap import ColmapDatabase, from_sift, require_pycolmap, to_sift
from tiepoints.structs import Features, Keypoints, Matches

require_pycolmap()  # its import may take longer than a child lives
torch.set_num_threads(1)
path, rounds = sys.argv[1], int(sys.argv[2])
chance = random.Random(0)
finished, killed = set(), 0

def features(i):
    g = torch.Generator().manual_seed(i)
    n = 200 + 40 * (i % 50)
    points = Keypoints(*(torch.rand(n, *s, generator=g) for s in ((2,), (), (), ())))
    return Features(points, torch.rand(n, 128, generator=g) - 0.5, (9, 9))

for cycle in range(rounds):
    end, start = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(end)
            with ColmapDatabase(path, write=True) as database:
                for i in range(1000):
                    database.write(f"{cycle}-{i}.png", features(i))
                    os.write(start, f"{cycle}-{i}.png {i}\\n".encode())
        finally:
            os._exit(7)
    os.close(start)
    time.sleep(chance.uniform(0.05, 0.3))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    with os.fdopen(end) as pipe:
        finished |= {tuple(line.split()) for line in pipe if line.endswith("\\n")}
    if not finished:  # a slow machine
        continue
    with ColmapDatabase(path) as database:
        stored = database.names()
        assert {name for name, _ in finished} <= set(stored), "finished images are lost"
        assert all(database.done(name, described=True) for name in stored), "half an image"
        for name, i in list(finished)[-20:]:
            expected = from_sift(to_sift(features(int(i)).descriptors.numpy()))
            assert torch.equal(database.read(name).descriptors, torch.from_numpy(expected)), name
print(len(finished), killed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_finished_writes_survive_kills(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path / "d.db", "12"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    finished, killed = (int(word) for word in done.stdout.split())
    assert killed == 12
    assert finished > 20
    assert tables(tmp_path / "d.db", "PRAGMA integrity_check") == [("ok",)]
