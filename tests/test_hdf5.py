"""hloc's files: round trips, reading and writing by hloc, and kills at any moment."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from test_formats import some
from tiepoints.errors import DataError
from tiepoints.extract import build
from tiepoints.formats import hdf5
from tiepoints.formats.hdf5 import FeatureFile, MatchFile, pair_name, read_pairs
from tiepoints.matching import match
from tiepoints.structs import Features, Keypoints, Matches

h5py = pytest.importorskip("h5py")


def same(a, b) -> None:
    for name in ("xy", "scale", "angle", "score", "descriptors"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.image_size == b.image_size


# hloc's use of its files, reimplemented from the documented layout, with which ours must
# agree with.


def hloc_names(path):
    found = set()
    with h5py.File(path, "r") as file:
        file.visititems(
            lambda _, item: (
                found.add(item.parent.name.strip("/")) if isinstance(item, h5py.Dataset) else None
            )
        )
    return found


def hloc_matcher_input(path, name):
    """Every data set of an image as a float tensor, and an empty image of its size."""
    with h5py.File(path, "r") as file:
        tensors = {
            key: torch.from_numpy(np.array(item)).float() for key, item in file[name].items()
        }
        width, height = (int(v) for v in file[name]["image_size"])
    return tensors, torch.empty(1, height, width)


def hloc_matches(path, a, b):
    with h5py.File(path, "r") as file:
        a_to_b, b_to_a = (
            "/".join(n.replace("/", "-") for n in (a, b)),
            "/".join(n.replace("/", "-") for n in (b, a)),
        )
        swapped = a_to_b not in file
        partner, score = (
            np.array(file[b_to_a if swapped else a_to_b][k])
            for k in ("matches0", "matching_scores0")
        )
    (own,) = np.where(partner != -1)
    table = np.stack([own, partner[own]], axis=1)
    return (table[:, ::-1] if swapped else table), score[own]


@pytest.mark.parametrize("n", [0, 1, 7])
def test_features_round_trip(tmp_path, n):
    with FeatureFile(tmp_path / "f.h5", write=True) as file:
        file.write("sub/a.png", some(n))
        assert file.done("sub/a.png", described=True)
        same(file.read("sub/a.png"), some(n))  # of the journal
    assert [p.name for p in tmp_path.iterdir()] == ["f.h5"]
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.names() == ["sub/a.png"]
        assert file.done("sub/a.png", described=True)
        assert not file.done("b.png", described=False)
        same(file.read("sub/a.png"), some(n))
        with pytest.raises(DataError, match=r"no features of 'b\.png'"):
            file.read("b.png")


def test_hloc_reads_our_files(tmp_path):
    features = some(7)
    with FeatureFile(tmp_path / "f.h5", write=True) as file:
        file.write("sub/a.png", features)
        file.write("b.png", some(5))
    assert hloc_names(tmp_path / "f.h5") == {"sub/a.png", "b.png"}
    tensors, image = hloc_matcher_input(tmp_path / "f.h5", "sub/a.png")
    assert image.shape == (1, 80, 100)
    assert torch.equal(
        tensors["keypoints"], features.xy
    )  # hloc's files have no half-pixel offset either
    assert torch.equal(tensors["descriptors"], features.descriptors.T)
    assert torch.equal(tensors["scores"], features.score)
    with h5py.File(tmp_path / "f.h5") as file:
        points = file["sub/a.png"]["keypoints"]
        assert points.dtype == np.float32
        assert points.attrs["uncertainty"] == 1.0
        assert file["sub/a.png"]["descriptors"].shape == (128, 7)


def test_we_read_hloc_files(tmp_path):
    """Half precision throughout, no scales, no angles."""
    features = some(7)
    with h5py.File(tmp_path / "f.h5", "a", libver="latest") as file:
        group = file.create_group("sub/a.png")
        for key, value in (
            ("keypoints", features.xy),
            ("descriptors", features.descriptors.T),
            ("scores", features.score),
        ):
            group.create_dataset(key, data=value.numpy().astype(np.float16))
        group.create_dataset("image_size", data=np.array([100, 80]))
        file.create_group("g.png").create_dataset("global_descriptor", data=np.zeros(4))
    with FeatureFile(tmp_path / "f.h5") as file:
        found = file.read("sub/a.png")
        assert (found.xy - features.xy).abs().max() < 0.05
        assert (found.descriptors - features.descriptors).abs().max() < 1e-3
        assert found.xy.dtype == found.descriptors.dtype == torch.float32
        assert found.image_size == (100, 80)
        assert found.scale.tolist() == [1.0] * 7
        with pytest.raises(DataError, match="keypoints"):
            file.read("g.png")


def test_angles_of_a_file_are_degrees_as_adalam_needs(tmp_path):
    """hloc's AdaLAM matcher passes keypoints, ``oris`` and ``scales`` of the file to kornia's."""
    adalam = pytest.importorskip("kornia.feature.adalam.adalam")
    generator = torch.Generator().manual_seed(0)
    xy = 20 + 200 * torch.rand(200, 2, generator=generator)
    angle = 6.28 * torch.rand(200, generator=generator)
    descriptors = torch.nn.functional.normalize(torch.randn(200, 128, generator=generator), dim=1)
    turned = (torch.arange(200) < 60) * (0.8 + 4.6 * torch.rand(200, generator=generator))
    with FeatureFile(tmp_path / "f.h5", write=True) as file:
        for name, direction in (("a.png", angle), ("b.png", (angle + turned).remainder(6.2831853))):
            points = Keypoints(xy, torch.ones(200), direction, angle)
            file.write(name, Features(points, descriptors, (240, 240)))
    a, b = (hloc_matcher_input(tmp_path / "f.h5", name)[0] for name in ("a.png", "b.png"))
    assert a["oris"].tolist() == pytest.approx(np.degrees(angle.numpy()).tolist(), abs=1e-4)
    config = {"orientation_difference_threshold": 30, "device": torch.device("cpu")}
    index = adalam.AdalamFilter({**adalam.get_adalam_default_config(), **config}).match_and_filter(
        *(f["keypoints"] for f in (a, b)),
        *(f["descriptors"].T for f in (a, b)),
        *((240, 240), (240, 240)),
        *(f["oris"] for f in (a, b)),
        *(f["scales"] for f in (a, b)),
    )
    kept = set(index[:, 0].tolist())
    assert set(range(60, 200)) <= kept
    # in radians, no difference would exceed 30
    assert len(kept & set(range(60))) < 20


@pytest.mark.parametrize("scale", [1.0, 180 / np.pi])
def test_angles_without_a_unit_are_hlocs_or_of_an_earlier_version(tmp_path, scale):
    features = some(7)
    with FeatureFile(tmp_path / "f.h5", write=True) as file:
        file.write("a.png", features)
        same(file.read("a.png"), features)
    with h5py.File(tmp_path / "f.h5", "a") as file:
        del file["a.png"]["oris"]
        file["a.png"]["oris"] = (features.angle * scale).numpy()
    with FeatureFile(tmp_path / "f.h5", write=True) as file:
        torch.testing.assert_close(file.read("a.png").angle, features.angle)
        file.write("b.png", features)
    with FeatureFile(tmp_path / "f.h5") as file:
        torch.testing.assert_close(file.read("a.png").angle, features.angle)
        same(file.read("b.png"), features)


def test_half_precision_affects_only_descriptors(tmp_path):
    with FeatureFile(tmp_path / "f.h5", write=True, half=True) as file:
        file.write("a.png", some(7))
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["a.png"]["descriptors"].dtype == np.float16
        assert file["a.png"]["keypoints"].dtype == np.float32
    with FeatureFile(tmp_path / "f.h5") as file:
        assert torch.equal(file.read("a.png").xy, some(7).xy)


def test_matches_of_real_images_round_trip_and_in_hloc(tmp_path):
    data = pytest.importorskip("skimage.data")
    left, right, _ = data.stereo_motorcycle()
    a, b = build("keynet", "rootsift", num_keypoints=300, device="cpu").extract([left, right])
    found = match(a, b, ratio=0.95)
    assert len(found) > 50
    with MatchFile(tmp_path / "m.h5", write=True) as file:
        file.write_matches("s/a.png", "b.png", found, len(a))
        file.write_matches(
            "e/a.png", "b.png", Matches(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0)), 0
        )
    assert hloc_names(tmp_path / "m.h5") == {"s-a.png/b.png", "e-a.png/b.png"}
    with MatchFile(tmp_path / "m.h5") as file:
        assert file.has_matches("b.png", "s/a.png")
        assert not file.has_matches("b.png", "a.png")
        again, reverse = (
            file.read_matches("s/a.png", "b.png"),
            file.read_matches("b.png", "s/a.png"),
        )
        assert len(file.read_matches("e/a.png", "b.png")) == 0
        with pytest.raises(DataError, match="no matches"):
            file.read_matches("b.png", "a.png")
    assert torch.equal(again.index, found.index)
    assert torch.equal(again.score, found.score)
    assert (reverse.index[1:, 0] >= reverse.index[:-1, 0]).all()
    assert {(j, i) for i, j in reverse.index.tolist()} == {(i, j) for i, j in found.index.tolist()}
    with MatchFile(tmp_path / "m.h5", write=True) as file:  # in place of both orders
        file.write_matches("b.png", "e/a.png", Matches(torch.zeros(1, 2).long(), torch.ones(1)), 1)
    with MatchFile(tmp_path / "m.h5") as file:
        assert len(file.read_matches("e/a.png", "b.png")) == 1
        assert len(file.read_matches("b.png", "e/a.png")) == 1
    assert hloc_names(tmp_path / "m.h5") == {"s-a.png/b.png", "b.png/e-a.png"}
    for names in (("s/a.png", "b.png"), ("b.png", "s/a.png")):
        table, score = hloc_matches(tmp_path / "m.h5", *names)
        ours = found.index if names[0] == "s/a.png" else found.index.flip(1)
        assert table.tolist() == ours.tolist()
        assert score.tolist() == found.score.tolist()


def test_matches_must_be_one_to_one(tmp_path):
    double = Matches(torch.tensor([[1, 2], [1, 3]]), torch.ones(2))
    with MatchFile(tmp_path / "m.h5", write=True) as file:
        with pytest.raises(ValueError, match="mutual"):
            file.write_matches("a", "b", double, 5)
        with pytest.raises(ValueError, match="one match"):
            file.write_matches("a", "b", Matches(torch.tensor([[5, 2]]), torch.ones(1)), 5)
    assert not list(tmp_path.iterdir())  # no file remains
    assert pair_name("x/a.png", "b.png") == "x-a.png/b.png"


def test_new_entries_are_appended_and_existing_ones_replaced(tmp_path):
    path = tmp_path / "f.h5"
    for names, n in ((("a", "b"), 3), (("c", "b"), 6)):
        with FeatureFile(path, write=True) as file:
            for name in names:
                file.write(name, some(n))
    with FeatureFile(path) as file:
        assert [len(file.read(name)) for name in ("a", "b", "c")] == [3, 6, 6]
        with pytest.raises(ValueError, match="reading"):
            file.write("d", some(1))
    with FeatureFile(path, write=True) as file:
        file.clear()
        assert file.names() == []
    assert not path.exists()


def test_second_writer_raises_and_readers_see_the_journal(tmp_path):
    with FeatureFile(tmp_path / "f.h5", write=True) as file:
        file.write("a", some(3))
        with (
            pytest.raises(DataError, match="another run"),
            FeatureFile(tmp_path / "f.h5", write=True),
        ):
            pass
        with FeatureFile(tmp_path / "f.h5") as reader:
            same(reader.read("a"), some(3))
    with FeatureFile(tmp_path / "f.h5") as reader:
        same(reader.read("a"), some(3))


def test_truncated_journal_gives_all_complete_records(tmp_path):
    """A kill during a write leaves the file up to some byte."""
    path, journal = tmp_path / "f.h5", tmp_path / "f.h5.journal"
    file = FeatureFile(path, write=True)
    ends = []
    for i in range(3):
        file.write(f"{i}", some(i + 2, d=4))
        ends.append(journal.stat().st_size)
    whole = journal.read_bytes()
    file.clear()
    file.close()
    for size in [*range(ends[0], len(whole), 7), *ends]:
        journal.write_bytes(whole[:size])
        with FeatureFile(path, write=True) as file:
            count = sum(end <= size for end in ends)
            assert file.names() == [f"{i}" for i in range(count)]
            file.write("new", some(1, d=4))  # after the last complete record
        with FeatureFile(path) as file:
            assert file.names() == [*(f"{i}" for i in range(count)), "new"]
            for i in range(count):
                same(file.read(f"{i}"), some(i + 2, d=4))
        path.unlink()


def test_disk_errors_keep_file_and_journal(tmp_path, monkeypatch):
    path = tmp_path / "f.h5"
    with FeatureFile(path, write=True) as file:
        file.write("a", some(3))
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hdf5.shutil, "copyfile", full)
        with pytest.raises(OSError, match="nothing is lost"), FeatureFile(path, write=True) as file:
            file.write("b", some(4))
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.h5", "f.h5.journal"]
    with FeatureFile(path, write=True):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.h5"]
    with FeatureFile(path) as file:
        same(file.read("b"), some(4))


#: Child processes write and are killed at random moments, in writes and merges; each
#: reports finished writes by a pipe.
KILLS = """
import os, random, signal, sys, time
import torch
from tiepoints.formats.hdf5 import FeatureFile
from tiepoints.structs import Features, Keypoints

torch.set_num_threads(1)

def features(i):
    g = torch.Generator().manual_seed(i)
    n = 200 + 40 * (i % 50)
    points = Keypoints(*(torch.rand(n, *s, generator=g) for s in ((2,), (), (), ())))
    return Features(points, torch.rand(n, 64, generator=g), (9, 9))

path, rounds = sys.argv[1], int(sys.argv[2])
chance = random.Random(0)
finished, killed = set(), 0
for cycle in range(rounds):
    end, start = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(end)
            for part in range(100):
                with FeatureFile(path, write=True) as file:
                    for i in range(chance.randrange(1, 6)):
                        name = f"sub{cycle}/{part}-{i}.png"
                        file.write(name, features(hash((cycle, part, i)) % 1000))
                        os.write(start, f"{name} {hash((cycle, part, i)) % 1000}\\n".encode())
        finally:
            os._exit(7)
    os.close(start)
    with os.fdopen(end) as pipe:
        # on a busy machine a child may need longer to start than the time it is given
        lines = [pipe.readline()] if cycle % 3 != 1 else []
        time.sleep(chance.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        finished |= {tuple(line.split()) for line in (*lines, *pipe) if line.endswith("\\n")}
    with FeatureFile(path) as file:
        stored = set(file.names())
        assert {name for name, _ in finished} <= stored, "finished images are lost"
        for name, i in list(finished)[-20:]:
            assert torch.equal(file.read(name).descriptors, features(int(i)).descriptors), name
with FeatureFile(path, write=True) as file:
    pass
print(len(finished), killed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_finished_writes_survive_kills(tmp_path):
    path = tmp_path / "f.h5"
    done = subprocess.run(
        [sys.executable, "-c", KILLS, path, "25"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
    )
    assert done.returncode == 0, done.stderr
    finished, killed = (int(word) for word in done.stdout.split())
    assert killed == 25
    assert finished >= 17  # one of each cycle that waits for its first write
    assert len(hloc_names(path)) >= finished  # complete for hloc too, once merged
    assert [p.name for p in tmp_path.iterdir()] == ["f.h5"]


def test_files_of_other_formats_raise(tmp_path):
    path = Path(tmp_path / "f.h5")
    with pytest.raises(FileNotFoundError, match=r"f\.h5"):
        FeatureFile(path)
    path.write_bytes(b"nonsense")
    for write in (False, True):
        with pytest.raises(DataError, match=r"f\.h5 is not an HDF5 file or is damaged"):
            FeatureFile(path, write=write)
    path.unlink()
    with h5py.File(path, "w") as file:
        file["a/keypoints"] = np.zeros((3, 3, 1))
        file["b/keypoints"] = np.zeros((3, 2))
        file["b/descriptors"] = np.zeros((3, 128))
        file["c/keypoints"] = np.zeros((3, 2))
        file["c/scores"] = np.zeros(4)
    with FeatureFile(path) as file:
        for name, message in (
            ("a", "keypoints of a"),
            ("b", r"descriptors of b must be \(D,3\)"),
            ("c", "scores of c"),
        ):
            with pytest.raises(DataError, match=message):
                file.read(name)


def test_lists_of_pairs(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("\ufeffa.png  s/b.png\n\n# remark\nmy photo.png\tc.png\r\n", encoding="utf-8")
    assert list(read_pairs(path)) == [("a.png", "s/b.png"), ("my photo.png", "c.png")]
    path.write_text("a b\nmy photo.png c.png\n")
    with pytest.raises(DataError, match="line 2"):
        list(read_pairs(path))
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="not a text file"):
        list(read_pairs(path))
    with pytest.raises(FileNotFoundError, match="list of pairs"):
        list(read_pairs(tmp_path / "none.txt"))
