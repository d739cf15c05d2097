"""Pairs of images with a relative rotation: one rotation per pair."""

import json
import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tiepoints
from tiepoints.auto_orientation import (
    MIN_SUPPORT,
    PLENTY_SUPPORT,
    Oriented,
    PairMatcher,
    can_reorient,
    geometric_support,
)
from tiepoints.cli import app
from tiepoints.deformation import UNDEFORMED, Deformation
from tiepoints.describe import DenseDescriptor, PatchDescriptor
from tiepoints.formats.hdf5 import MatchFile
from tiepoints.geometry import warp_image, warp_points
from tiepoints.structs import Features, Keypoints, Matches

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
def test_rotated_photograph_is_matched_with_its_rotation(photo, extractor, degrees):
    H = rotation_about(degrees, 256)
    rotated = warp_image(photo[None, None], H[None].float())[0, 0]
    a, b = extractor.extract(photo), extractor.extract(rotated)
    plain = Oriented(tiepoints.match(a, b), b)
    found = PairMatcher(extractor)(a, b, rotated)
    off = (math.degrees(found.patches.rotation) - degrees + 180) % 360 - 180
    assert abs(off) < 5
    assert correct(found, a, H) > 60
    assert correct(found, a, H) > 1.5 * correct(plain, a, H)
    assert torch.equal(found.b.xy, b.xy)


@pytest.mark.parametrize("max_size", [None, 300])
def test_rotated_and_oblique_photographs_are_matched_by_a_dense_network(max_size):
    options = {} if max_size is None else {"max_size": max_size}
    dense = tiepoints.build("sobelnet", "desnet", num_keypoints=800, device="cpu", **options)
    image, oblique, H = squeezed_pair(2.5)
    for degrees in (0.0, 90.0, -150.0):
        turn = rotation_about(degrees, 448)
        rotated = warp_image(oblique[None, None], turn[None].float(), padding="border")[0, 0]
        a, b = dense.extract([image, rotated])
        plain = Oriented(tiepoints.match(a, b), b)
        found = PairMatcher(dense)(a, b, rotated)
        assert correct(found, a, turn @ H) > 45
        assert correct(found, a, turn @ H) > 1.4 * correct(plain, a, turn @ H)
        assert torch.equal(found.b.xy, b.xy)


def test_a_dense_network_describes_an_image_once_for_a_rotation(photo, monkeypatch):
    dense = tiepoints.build("sobelnet", "desnet", num_keypoints=600, device="cpu")
    turn = rotation_about(95, 256)
    rotated = warp_image(photo[None, None], turn[None].float(), padding="border")[0, 0]
    a, b = dense.extract([photo, rotated])
    seen = []
    describe = DenseDescriptor.describe_deformed

    def counted(self, pyramid, keypoints, deformation):
        seen.append((len(keypoints), round(math.degrees(deformation.rotation))))
        return describe(self, pyramid, keypoints, deformation)

    monkeypatch.setattr(DenseDescriptor, "describe_deformed", counted)
    matcher = PairMatcher(dense)
    found = matcher(a, b, rotated, "b")
    # all keypoints at each rotation of the search, one of which is that of the pair
    assert sorted(seen) == [(len(b), 45 * step) for step in range(1, 8)]
    assert round(math.degrees(found.patches.rotation)) == 90
    assert found.support > 100
    assert matcher(a, b, rotated, "b").support == found.support
    assert len(seen) == 7


def test_upright_pair_is_unchanged_without_reading_images(photo, extractor):
    shifted = photo.roll((3, 5), dims=(0, 1))
    a, b = extractor.extract(photo), extractor.extract(shifted)

    class Unread:
        def __array__(self):
            raise AssertionError("the image was read")

    found = PairMatcher(extractor)(a, b, Unread())
    plain = tiepoints.match(a, b)
    assert found.b is b
    assert found.patches.rotation == 0
    assert torch.equal(found.matches.index, plain.index)


def test_few_keypoints_or_measured_angles_disable_reorientation(photo, extractor):
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
    assert matcher(angles, a, photo).patches.rotation == 0


def test_only_keypoints_without_angles_can_be_reoriented(extractor):
    assert can_reorient(extractor)
    assert can_reorient(tiepoints.build("keynet-tiny", "desnet", device="cpu"))
    rotated = {"descriptor": "hardnet", "orientation": "dominant"}
    for options in (rotated, {"descriptor": "hardnet", "upright": True}):
        other = tiepoints.build("keynet-tiny", device="cpu", **options)
        assert not can_reorient(other)
        with pytest.raises(ValueError, match="only keypoints without angles"):
            PairMatcher(other)
    assert not can_reorient(lambda image: None)


def test_match_estimates_the_rotation_of_two_images_and_of_a_folder(photo, tmp_path):
    rotated = torch.rot90(photo)
    folder = tmp_path / "images"
    folder.mkdir()
    for name, image in (("a.png", photo), ("b.png", rotated)):
        Image.fromarray((image * 255).round().byte().numpy()).save(folder / name)
    arguments = [
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
        given = [
            "match",
            str(folder),
            "--output",
            str(out),
            "--orientation",
            orientation,
            *arguments,
        ]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
        with MatchFile(out) as stored:
            counts[orientation] = stored.read_matches("a.png", "b.png")
        both = [str(folder / "a.png"), str(folder / "b.png")]
        two = CliRunner().invoke(
            app, ["match", *both, "--json", "--orientation", orientation, *arguments]
        )
        counts[orientation, "inliers"] = json.loads(two.stdout)["inliers"]
    assert counts["auto", "inliers"] > 100
    assert counts["auto", "inliers"] > 3 * counts["none", "inliers"]
    # rotation by 90 degrees: (x, y) -> (y, 255 - x)
    extractor = tiepoints.build(
        "keynet-tiny", "hardnet", num_keypoints=400, single_scale=True, device="cpu"
    )
    a, b = (extractor.extract(folder / name).xy for name in ("a.png", "b.png"))
    truth = torch.stack([a[:, 1], 255 - a[:, 0]], dim=1)
    for orientation, least, most in (("auto", 100, 400), ("none", 0, 30)):
        index = counts[orientation].index
        assert least <= int(((truth[index[:, 0]] - b[index[:, 1]]).norm(dim=1) < 3).sum()) <= most


@pytest.mark.parametrize(("kept", "support"), [(14, 12), (24, 12), (25, 0), (80, 0)])
def test_matches_that_agree_with_their_neighbors_must_agree_with_the_geometry(kept, support):
    """12 of 150 matches agree beyond chance, which incorrect neighbors may do, too."""
    generator = torch.Generator().manual_seed(0)
    xy_a, xy_b = (
        torch.rand(150, 2, generator=generator) * torch.tensor([600.0, 400.0]) for _ in range(2)
    )
    xy_b[:12] = xy_a[:12] + torch.tensor([20.0, 5.0])
    a, b = (
        Features(
            Keypoints(xy, torch.ones(150), torch.zeros(150), torch.ones(150)), None, (600, 400)
        )
        for xy in (xy_a, xy_b)
    )
    found = Matches(torch.arange(150)[:, None].expand(-1, 2), torch.ones(150))
    count, _, share = geometric_support(a, b, found[torch.arange(150) < kept], found)
    assert count == support
    assert share == pytest.approx(12 / kept if support else 0)


def test_other_rotations_are_searched_unless_the_geometry_is_sure(photo, extractor, monkeypatch):
    """Symmetric structure agrees with its own rotation, in a part of the matches."""
    a = extractor.extract(photo)
    half = Deformation(math.pi)
    turned = Oriented(tiepoints.match(a, a), a, support=20, measured=half, share=0.9)
    searched = []

    def search(*arguments):
        searched.append(arguments)
        return turned

    for support, share, found in ((46, 0.2, True), (46, 0.5, False), (14, 0.9, True)):
        matcher = PairMatcher(extractor)
        upright = Oriented(tiepoints.match(a, a), a, support=support, share=share)
        described = Oriented(turned.matches, a, patches=half, support=300, share=0.9)
        monkeypatch.setattr(
            matcher, "verified", lambda *one, up=upright, d=described: d if one[2:] else up
        )
        monkeypatch.setattr(matcher, "_search", search)
        searched.clear()
        result = matcher(a, a, photo)
        assert bool(searched) == found
        assert (result is described) == found


def test_unrelated_images_stay_upright_and_are_searched_once(photo, extractor, monkeypatch):
    others = [
        torch.from_numpy(skimage_data.coins()[k : k + 256, k : k + 256].copy()).float() / 255
        for k in (0, 40)
    ]
    a, (b, c) = extractor.extract(photo), extractor.extract(others)
    calls = []

    class CountingDescriptor(PatchDescriptor):
        def describe_deformed(self, *args):
            calls.append(args)
            return super().describe_deformed(*args)

    describe = CountingDescriptor(extractor.describe.net, extractor.describe.half_side)
    levels = {"up_levels": extractor.up_levels, "down_levels": extractor.down_levels}
    matcher = PairMatcher(tiepoints.Extractor(extractor.detect, describe, **levels))

    def calls_of(image_b, features_b, key) -> int:
        before = len(calls)
        oriented = matcher(a, features_b, image_b, key)
        assert oriented.patches == UNDEFORMED
        assert torch.equal(oriented.matches.index, tiepoints.match(a, features_b).index)
        return len(calls) - before

    once = calls_of(others[0], b, "b")
    assert once > 0
    assert calls_of(others[0], b, "b") == 0
    monkeypatch.setattr(
        "tiepoints.auto_orientation.SEARCHES", 7
    )  # the least recently used is removed
    assert calls_of(others[1], c, "c") == once
    assert calls_of(others[1], c, "c") == 0
    assert calls_of(others[0], b, "b") == once


def squeezed_pair(factor, size=448):
    """A photograph, and itself seen obliquely: narrower by ``factor``; with the homography."""
    image = torch.from_numpy(skimage_data.camera()[:size, :size].copy()).float() / 255
    smooth = torch.nn.functional.interpolate(
        image[None, None], size=(size, round(size / factor)), mode="bilinear", antialias=True
    )[0, 0]
    wide = torch.full((size, size), 0.5)
    wide[:, : smooth.shape[1]] = smooth
    ratio = smooth.shape[1] / size
    H = torch.eye(3, dtype=torch.float64)
    H[0, 0], H[0, 2] = ratio, (ratio - 1) / 2
    return image, wide, H


@pytest.mark.parametrize(("factor", "gain"), [(3.0, 1.25), (5.0, 2.0)])
def test_oblique_views_are_matched_with_their_tilt(factor, gain):
    image, oblique, H = squeezed_pair(factor)
    extractor = tiepoints.build("keynet-tiny", "hardnet", num_keypoints=1000, device="cpu")
    a, b = extractor.extract([image, oblique])
    found = PairMatcher(extractor)(a, b, oblique)
    assert found.patches.tilt == pytest.approx(factor, rel=0.25)
    assert correct(found, a, H) > gain * correct(Oriented(tiepoints.match(a, b), b), a, H)
    assert torch.equal(found.b.xy, b.xy)


def test_a_tilt_is_not_measured_for_descriptors_with_affine_shapes():
    image, oblique, _ = squeezed_pair(3.0)
    shaped = tiepoints.build(
        "keynet-tiny", "hardnet", num_keypoints=500, device="cpu", affine="affnet"
    )
    a, b = shaped.extract([image, oblique])
    found = PairMatcher(shaped)(a, b, oblique)
    assert found.support > 30
    assert found.measured.tilt > 2
    assert found.b is b


@pytest.mark.parametrize(
    ("degrees", "tilt", "few", "many"),
    [
        (5, 1.2, False, False),
        (15, 1.2, True, False),
        (-15, 1.4, True, True),
        (0, 1.4, True, True),
        (-30, 1.0, True, True),
    ],
)
def test_small_rotations_add_few_to_many_matches(extractor, degrees, tilt, few, many):
    matcher = PairMatcher(extractor)
    change = Deformation(math.radians(degrees), tilt)
    assert matcher._is_large(change, MIN_SUPPORT) == few
    assert matcher._is_large(change, PLENTY_SUPPORT) == many
