"""Pairs whose cameras were rotated against each other: one rotation for the pair."""

import json
import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tiepoints
from tiepoints.auto_orientation import Oriented, PairMatcher, can_reorient, similarity_angle
from tiepoints.cli import app
from tiepoints.formats.hdf5 import MatchFile
from tiepoints.geometry import warp_image, warp_points
from tiepoints.structs import Keypoints

skimage_data = pytest.importorskip("skimage.data")


def rotation_about(degrees: float, size: int) -> torch.Tensor:
    c, s, m = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), (size - 1) / 2
    return torch.tensor(
        [[c, -s, m - c * m + s * m], [s, c, m - s * m - c * m], [0, 0, 1]], dtype=torch.float64
    )


@pytest.fixture(scope="module")
def photo():
    image = torch.from_numpy(skimage_data.camera()[::2, ::2].copy()).float() / 255
    return image[:256, :256]


@pytest.fixture(scope="module")
def extractor():
    return tiepoints.build(
        "keynet-tiny", "hardnet", num_keypoints=400, device="cpu", single_scale=True
    )


def correct(oriented: Oriented, a, H) -> int:
    xy_a, xy_b = oriented.matches.positions(a, oriented.b)
    return int(((warp_points(xy_a.double(), H).float() - xy_b).norm(dim=1) < 3).sum())


@pytest.mark.parametrize("degrees", [90.0, 180.0, -60.0])
def test_a_rotated_photograph_is_matched_at_its_rotation(photo, extractor, degrees):
    H = rotation_about(degrees, 256)
    turned = warp_image(photo[None, None], H[None].float())[0, 0]
    a, b = extractor.extract(photo), extractor.extract(turned)
    plain = Oriented(tiepoints.match(a, b), b)
    found = PairMatcher(extractor)(a, b, turned)
    off = (math.degrees(found.rotation) - degrees + 180) % 360 - 180
    assert abs(off) < 5
    assert correct(found, a, H) > 60
    assert correct(found, a, H) > 1.5 * correct(plain, a, H)
    assert torch.equal(found.b.xy, b.xy)


def test_an_upright_pair_stays_as_it_is_and_reads_no_image(photo, extractor):
    shifted = photo.roll((3, 5), dims=(0, 1))
    a, b = extractor.extract(photo), extractor.extract(shifted)

    class Unread:
        def __array__(self):
            raise AssertionError("the image was read")

    found = PairMatcher(extractor)(a, b, Unread())
    plain = tiepoints.match(a, b)
    assert found.b is b
    assert found.rotation == 0
    assert torch.equal(found.matches.index, plain.index)


def test_few_keypoints_and_measured_angles_are_matched_as_they_are(photo, extractor):
    a = extractor.extract(photo)
    none, few = a[torch.zeros(0, dtype=torch.int64)], a[torch.arange(3)]
    matcher = PairMatcher(extractor)
    assert len(matcher(none, a, photo).matches) == 0
    assert len(matcher(a, none, photo).matches) == 0
    assert torch.equal(
        matcher(few, few, photo).matches.index, torch.arange(3)[:, None].expand(3, 2)
    )
    angles = tiepoints.Features(
        Keypoints(a.xy, a.scale, torch.ones_like(a.angle), a.score), a.descriptors, a.image_size
    )
    assert matcher(angles, a, photo).rotation == 0


def test_only_upright_patches_can_be_described_at_another_rotation(extractor):
    assert can_reorient(extractor)
    rotated = {"descriptor": "hardnet", "orientation": "dominant"}
    for words in ({"descriptor": "desnet"}, rotated, {"descriptor": "hardnet", "upright": True}):
        other = tiepoints.build("keynet-tiny", device="cpu", **words)
        assert not can_reorient(other)
        with pytest.raises(ValueError, match="only patches"):
            PairMatcher(other)
    assert not can_reorient(lambda image: None)


def test_the_angle_of_a_similarity():
    xy = torch.rand(20, 2) * 100
    for degrees in (0.0, 45.0, 170.0, -120.0):
        assert math.degrees(
            similarity_angle(xy, warp_points(xy.double(), rotation_about(degrees, 50)))
        ) == pytest.approx(degrees, abs=1e-3)


def test_match_finds_the_rotation_of_two_images_and_of_a_folder(photo, tmp_path):
    turned = torch.rot90(photo)
    folder = tmp_path / "images"
    folder.mkdir()
    for name, image in (("a.png", photo), ("b.png", turned)):
        Image.fromarray((image * 255).round().byte().numpy()).save(folder / name)
    words = [
        "--detector",
        "keynet-tiny",
        "--descriptor",
        "hardnet",
        "--num-keypoints",
        "400",
        "--single-scale",
    ]
    counts = {}
    for orientation in ("auto", "none"):
        out = tmp_path / f"{orientation}.h5"
        given = ["match", str(folder), "--output", str(out), "--orientation", orientation, *words]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
        with MatchFile(out) as stored:
            counts[orientation] = stored.read_matches("a.png", "b.png")
        both = [str(folder / "a.png"), str(folder / "b.png")]
        two = CliRunner().invoke(
            app, ["match", *both, "--json", "--orientation", orientation, *words]
        )
        counts[orientation, "inliers"] = json.loads(two.stdout)["inliers"]
    assert counts["auto", "inliers"] > 100
    assert counts["auto", "inliers"] > 3 * counts["none", "inliers"]
    # a is rotated by a quarter clockwise about the image: (x, y) -> (y, 255 - x)
    extractor = tiepoints.build(
        "keynet-tiny", "hardnet", num_keypoints=400, single_scale=True, device="cpu"
    )
    a, b = (extractor.extract(folder / name).xy for name in ("a.png", "b.png"))
    truth = torch.stack([a[:, 1], 255 - a[:, 0]], dim=1)
    for orientation, least, most in (("auto", 100, 400), ("none", 0, 30)):
        index = counts[orientation].index
        assert least <= int(((truth[index[:, 0]] - b[index[:, 1]]).norm(dim=1) < 3).sum()) <= most


def test_images_with_nothing_in_common_stay_upright_and_are_searched_once_each(
    photo, extractor, monkeypatch
):
    others = [
        torch.from_numpy(skimage_data.coins()[k : k + 256, k : k + 256].copy()).float() / 255
        for k in (0, 40)
    ]
    a, (b, c) = extractor.extract(photo), extractor.extract(others)
    matcher = PairMatcher(extractor)
    described = []
    describe = matcher._described
    monkeypatch.setattr(
        matcher, "_described", lambda *given: described.append(given[2]) or describe(*given)
    )
    first = matcher(a, b, others[0], "b")
    assert first.rotation == 0
    assert torch.equal(first.matches.index, tiepoints.match(a, b).index)
    once = len(described)
    assert once > 0
    again = matcher(a, b, others[0], "b")
    assert len(described) == once
    assert torch.equal(again.matches.index, first.matches.index)
    monkeypatch.setattr("tiepoints.auto_orientation.SEARCHES", 1)  # what was used longest ago goes
    matcher(a, c, others[1], "c")
    assert list(matcher._searches) == ["c"]
    matcher(a, b, others[0], "b")
    assert described.count("b") == 2 * once
