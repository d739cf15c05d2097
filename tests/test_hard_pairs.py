"""Two images that hardly match, described again in other ways."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import tiepoints
from helpers import call
from test_auto_orientation import squeezed_pair
from tiepoints import hard_pairs
from tiepoints.deformation import UNDEFORMED
from tiepoints.geometry import warp_points
from tiepoints.jobs.match import MatchOptions, match_two

skimage_data = pytest.importorskip("skimage.data")

#: Position in the second image minus that in the first one, of ``shifted_pair``.
SHIFT = torch.tensor([-12.0, 7.0])


def extraction(detector="keynet-tiny", **options):
    return tiepoints.ExtractOptions.of(
        detector=detector, num_keypoints=1000, precision="float32", device="cpu", **options
    )


def camera():
    return torch.from_numpy(skimage_data.camera().copy()).float() / 255


def shifted_pair():
    image = camera()
    return image, image.roll((7, -12), (0, 1))


def right(result, expected=None) -> int:
    """Number of matches within 3 px of where they should be."""
    expected = result.xy_a + SHIFT if expected is None else expected
    return int(((result.xy_b - expected).norm(dim=1) < 3).sum())


def test_oblique_views_are_matched_in_affine_shapes():
    image, oblique, H = squeezed_pair(6.0)
    plain, again = (
        match_two(image, oblique, extraction(), MatchOptions(retry=retry, refine=False))
        for retry in (False, True)
    )
    counts = [
        right(result, warp_points(result.xy_a.double(), H).float()) for result in (plain, again)
    ]
    assert counts[1] > 25
    assert counts[1] > 2 * counts[0]


def test_places_that_have_changed_are_matched_by_their_surroundings():
    generator = torch.Generator().manual_seed(0)

    def changed(image):
        blobs = torch.randn(1, 1, 128, 128, generator=generator)
        pattern = torch.nn.functional.interpolate(blobs, size=(512, 512), mode="bicubic")[0, 0]
        return (image + 0.3 * pattern).clamp(0, 1)

    pair = [changed(image) for image in shifted_pair()]
    plain, again = (
        match_two(*pair, extraction(), MatchOptions(retry=retry, refine=False))
        for retry in (False, True)
    )
    assert (plain.described, again.described) == ("as given", "surroundings")
    assert right(again) > 1.2 * right(plain)
    assert torch.equal(again.a.xy, plain.a.xy)
    # a descriptor that sees the surroundings anyway is not replaced by itself
    given = match_two(*pair, extraction(descriptor="hardnet-context"), MatchOptions(refine=False))
    assert given.described == "as given"


@pytest.mark.parametrize("detector", ["keynet-tiny", "sobelnet"])
def test_the_negative_of_a_photograph_is_matched(detector, tmp_path):
    left, other, _ = skimage_data.stereo_motorcycle()
    a, b = (torch.from_numpy(image).float().mean(2)[:, :600] / 255 for image in (left, other))
    descriptor = "desnet" if detector == "sobelnet" else "hardnet-light"
    options = extraction(detector, descriptor=descriptor)
    plain = match_two(a, 1 - b, options, MatchOptions(retry=False))
    assert not plain.estimate.ok
    again = match_two(a, 1 - b, options)
    assert (again.described, again.estimate.ok) == ("negative", True)
    usual = match_two(a, b, options)
    assert len(again.matches) > 0.9 * len(usual.matches)
    # refined in the negative as in the photograph
    assert torch.equal(again.image_b, 1 - usual.image_b)
    inliers = int(again.estimate.inliers.sum())
    assert inliers > 0.9 * int(usual.estimate.inliers.sum())


def test_masks_hold_for_the_negative():
    a, b = shifted_pair()
    mask = torch.zeros(512, 512, dtype=torch.bool)
    mask[100:400, 100:400] = True
    result = match_two(a, 1 - b, extraction("keynet-light"), masks=(None, mask))
    assert result.described == "negative"
    # keypoints of coarse levels lie within a few pixels
    assert result.b.xy.min() > 96
    assert result.b.xy.max() < 404


def test_pairs_that_match_are_not_described_again(monkeypatch):
    for name in ("_shaped", "_with_surroundings", "_negative"):
        monkeypatch.setattr(hard_pairs, name, None)
    result = match_two(*shifted_pair(), extraction())
    assert result.described == "as given"
    assert len(result.matches) > 100


def test_unrelated_images_do_not_match_in_any_way():
    one = camera()[::2, ::2]
    other = torch.from_numpy(skimage_data.coins()[:256, :256].copy()).float() / 255
    options = tiepoints.ExtractOptions.of(detector="keynet-tiny", num_keypoints=500)
    result = match_two(one, other, options)
    assert not result.estimate.ok
    assert result.described == "as given"


def test_matches_that_chance_explains_have_no_geometry(monkeypatch):
    monkeypatch.setattr(
        "tiepoints.auto_orientation.geometric_support", lambda *_: (0, UNDEFORMED, 0.0)
    )
    pair = shifted_pair()
    options = MatchOptions(geometry="homography", retry=False)
    result = match_two(*pair, extraction(), options)
    assert len(result.matches) > 100
    assert not result.estimate.ok
    assert not result.estimate.inliers.any()
    assert "no more than chance explains" in result.estimate.reason
    # without the filter, the estimate itself is the test
    assert match_two(*pair, extraction(), replace(options, min_neighbors=0)).estimate.ok


def test_pairs_of_a_folder_that_chance_explains_have_no_matches(tmp_path):
    pytest.importorskip("h5py")
    for name, image in (("a", skimage_data.camera()), ("b", skimage_data.coins())):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    counts = []
    for number in (0, 1):
        output = tmp_path / f"{number}.h5"
        arguments = ("--detector", "keynet-tiny", "--min-neighbors", number, "--output", output)
        code, out, err = call("match", tmp_path, *arguments)
        assert code == 0, err
        counts.append(int(out.partition("(")[2].split()[0].replace(",", "")))
    assert counts[0] > 50
    assert counts[1] == 0


def test_the_command_says_how_a_pair_was_described(tmp_path):
    a, b = shifted_pair()
    names = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for name, image in zip(names, (a, 1 - b), strict=True):
        Image.fromarray((image * 255).round().byte().numpy()).save(name)
    arguments = ["match", *names, "--num-keypoints", "500"]
    code, out, err = call(*arguments)
    assert code == 0, err
    assert "described  negative" in out
    code, out, _ = call(*arguments, "--no-retry", "--json")
    assert json.loads(out)["described"] == "as given"
