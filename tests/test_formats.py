"""Files and types of other libraries: round trips."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import texture
from tiepoints.errors import DataError
from tiepoints.formats import interop
from tiepoints.formats.npy import read_features, write_features
from tiepoints.models.classical import RootSIFT
from tiepoints.plot import draw_keypoints, draw_matches
from tiepoints.structs import Estimate, Features, Keypoints, Matches, PaddedFeatures


def some(n: int = 7, d: int = 128) -> Features:
    generator = torch.Generator().manual_seed(n)
    points = Keypoints(
        100 * torch.rand(n, 2, generator=generator),
        0.5 + torch.rand(n, generator=generator),
        6 * torch.rand(n, generator=generator),
        torch.rand(n, generator=generator),
    )
    return Features(
        points,
        torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1),
        (100, 80),
    )


@pytest.mark.parametrize("n", [0, 1, 7])
def test_npy_round_trip(tmp_path, n):
    features = some(n)
    write_features(tmp_path / "a.png", features)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png.dsc.npy", "a.png.kpt.npy"]
    assert np.load(tmp_path / "a.png.kpt.npy").shape == (n, 5 if n else 4)
    again = read_features(tmp_path / "a.png", (100, 80))
    torch.testing.assert_close(again.angle, features.angle, atol=1e-5, rtol=0)
    upright = dataclasses.replace(
        features, keypoints=dataclasses.replace(features.keypoints, angle=torch.zeros(n))
    )
    write_features(tmp_path / "a.png", upright)
    assert np.load(tmp_path / "a.png.kpt.npy").shape == (n, 4)  # as in Key.Net's files
    assert torch.equal(again.xy, features.xy)
    assert torch.equal(again.scale, features.scale)
    assert torch.equal(again.score, features.score)
    assert torch.equal(again.descriptors, features.descriptors)


def test_npy_reads_rekd_angles_and_names_damaged_files(tmp_path):
    np.save(tmp_path / "b.kpt.npy", np.array([[1.0, 2, 3, 4, 90]]))
    angle = float(read_features(tmp_path / "b").angle)
    assert angle == pytest.approx(
        1.5 * math.pi
    )  # 90 degrees counterclockwise are 270 degrees clockwise
    with pytest.raises(FileNotFoundError, match="extract"):
        read_features(tmp_path / "c")
    (tmp_path / "d.kpt.npy").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"d\.kpt\.npy"):
        read_features(tmp_path / "d")
    np.save(tmp_path / "e.kpt.npy", np.zeros((3, 7)))
    with pytest.raises(DataError, match="expected"):
        read_features(tmp_path / "e")


@pytest.mark.parametrize("n", [0, 7])
def test_cv2_round_trip(n):
    pytest.importorskip("cv2")
    points = some(n).keypoints
    again = interop.from_cv2(interop.to_cv2(points))
    for name in ("xy", "scale", "angle", "score"):
        assert torch.allclose(getattr(again, name), getattr(points, name), atol=1e-4)


@pytest.mark.parametrize("name", ["ORB", "SIFT", "AKAZE", "KAZE", "BRISK"])
def test_opencv_describes_converted_keypoints_equally(name):
    cv2 = pytest.importorskip("cv2")
    gray = np.asarray(texture(0, (320, 240)).convert("L"))
    method = getattr(cv2, name + "_create", None) or getattr(cv2.xfeatures2d, name + "_create")
    method = method()
    points = method.detect(gray)
    assert len(points) > 50
    if name in ("ORB", "SIFT"):
        assert len({point.octave for point in points}) > 2
    kept, expected = method.compute(gray, points)
    features = Features(interop.from_cv2(points), None, (320, 240))
    again, found = method.compute(gray, interop.to_cv2(features[:].to("cpu").keypoints))
    assert np.array_equal(found, expected)
    for name in ("pt", "size", "angle", "response", "octave", "class_id"):
        assert [getattr(p, name) for p in again] == [getattr(p, name) for p in kept]


def test_replaced_angles_and_other_keypoints_are_converted_to_cv2():
    cv2 = pytest.importorskip("cv2")
    points = interop.from_cv2([cv2.KeyPoint(1, 2, 5, -1, 0.5, 3, 7), cv2.KeyPoint(2, 3, 5, 250)])
    assert points.angle.tolist() == pytest.approx([0, math.radians(250)])
    turned = dataclasses.replace(points, angle=points.angle + torch.tensor([0.0, 0.1]))
    a, b = interop.to_cv2(turned)
    assert (a.angle, a.octave, a.class_id) == (-1, 3, 7)
    assert b.angle == pytest.approx(250 + math.degrees(0.1), abs=1e-4)
    assert (b.octave, b.class_id) == (0, -1)
    assert interop.to_cv2(points[1:])[0].angle == 250
    (c,) = interop.to_cv2(some(1).keypoints)
    assert (c.octave, c.class_id) == (0, -1)
    with pytest.raises(ValueError, match="octave"):
        dataclasses.replace(points, octave=torch.zeros(3))


@pytest.mark.parametrize("n", [0, 7])
def test_lightglue_and_laf_round_trip(n):
    features = some(n)
    again = interop.from_lightglue(interop.to_lightglue(features))
    assert torch.equal(again.xy, features.xy)
    assert torch.equal(again.descriptors, features.descriptors)
    assert again.image_size == (100, 80)
    points = features.keypoints
    converted = interop.from_laf(interop.to_laf(points), points.score)
    for name in ("xy", "scale", "angle", "score"):
        assert torch.allclose(getattr(converted, name), getattr(points, name), atol=1e-4)


def test_kornia_extracts_the_same_patch():
    kornia = pytest.importorskip("kornia")
    from tiepoints.patches import extract_patches
    from tiepoints.pyramid import build_pyramid

    y, x = torch.meshgrid(torch.arange(120.0), torch.arange(160.0), indexing="ij")
    image = (0.5 + 0.25 * torch.sin(x / 9) + 0.25 * torch.cos(y / 11))[None, None]
    points = Keypoints(
        torch.tensor([[80.0, 60.0]]), torch.ones(1), torch.tensor([0.7]), torch.ones(1)
    )
    ours = extract_patches(build_pyramid(image), points)
    theirs = kornia.feature.extract_patches_from_pyramid(image, interop.to_laf(points), PS=32)[0]
    assert (ours - theirs).abs().max() < 0.05  # kornia's half-pixel shift remains
    mirrored = Keypoints(points.xy, points.scale, -points.angle, points.score)
    assert (extract_patches(build_pyramid(image), mirrored) - theirs).abs().max() > 0.1


def test_structs_reject_invalid_shapes_and_pad():
    with pytest.raises(ValueError, match="xy"):
        Keypoints(torch.zeros(3, 3), torch.zeros(3), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="scale"):
        Keypoints(torch.zeros(3, 2), torch.zeros(2), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="descriptors"):
        Features(some(3).keypoints, torch.zeros(2, 128), (1, 1))
    with pytest.raises(ValueError, match="index"):
        Matches(torch.zeros(3), torch.zeros(3))
    padded = PaddedFeatures.pad([some(3), some(0), some(5)])
    assert padded.xy.shape == (3, 5, 2)
    assert padded.valid.sum(dim=1).tolist() == [3, 0, 5]
    assert not padded.xy[0, 3:].any()
    assert PaddedFeatures.pad([some(3), some(5)], length=4).valid.sum(dim=1).tolist() == [3, 4]
    assert (
        Estimate("homography", None, torch.zeros(0, dtype=torch.bool), False, "why").reason == "why"
    )
    assert len(Keypoints.concatenate([])) == 0


def test_rootsift_has_unit_length_and_is_gain_invariant():
    net = RootSIFT()
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(5, 1, 32, 32, generator=generator)
    out = net(patches)
    assert out.shape == (5, 128)
    assert torch.allclose(out.norm(dim=1), torch.ones(5), atol=1e-5)
    assert torch.allclose(net(0.5 * patches + 0.2), out, atol=1e-3)
    flat = net(torch.full((2, 1, 32, 32), 0.3))
    assert torch.isfinite(flat).all()
    assert torch.allclose(flat.norm(dim=1), torch.ones(2), atol=1e-5)
    assert net(torch.zeros(0, 1, 32, 32)).shape == (0, 128)
    with pytest.raises(ValueError, match="patches"):
        net(torch.zeros(1, 1, 31, 32))


def test_rootsift_votes_at_the_gradient():
    """A vertical edge in the right half: all votes are along +x, in the right cells."""
    patch = torch.zeros(1, 1, 32, 32)
    patch[..., 24:] = 1
    votes = RootSIFT()(patch).reshape(4, 4, 8)
    assert votes[..., 0].sum() > 0.9 * votes.sum()
    assert votes[:, 2:, 0].sum() > 0.9 * votes[..., 0].sum()


def test_drawings_show_keypoints_and_matches(tmp_path):
    image = torch.rand(1, 1, 80, 100)
    xy = torch.tensor([[10.0, 20.0], [90.0, 70.0]])
    out = draw_matches(
        image,
        image[..., :60, :],
        xy,
        xy.clamp(max=50),
        torch.tensor([True, False]),
        path=tmp_path / "m.png",
    )
    assert (tmp_path / "m.png").stat().st_size > 500
    assert out.size == (208, 106)
    gray = np.asarray(out).astype(int)
    colored = np.ptp(gray, axis=2) > 60
    assert colored[26:].sum() > 50  # only the line of the inlier is colored
    assert colored[26 + 60 :].sum() == 0  # the end of the outlier
    shown = draw_matches(
        image, image, xy, xy, correct=torch.tensor([True, False]), width=50, caption=""
    )
    assert shown.size == (108, 40)
    same = draw_matches(
        *[image] * 2, *[xy.tolist()] * 2, correct=[True, False], width=50, caption=""
    )
    assert np.array_equal(np.asarray(same), np.asarray(shown))
    with pytest.raises(ValueError, match=r"as many; got \[2, 2, 3\]"):
        draw_matches(image, image, xy, xy, [True, False, True])
    with pytest.raises(ValueError, match="finite"):
        draw_matches(image, image, xy, xy * math.nan)
    for keypoints in (some(3), some(3).keypoints, some(3).xy):
        assert draw_keypoints(image, keypoints, path=tmp_path / "k.png").size == (100, 80)


def test_drawings_keep_the_colors_of_all_input_types(tmp_path):
    colors = np.zeros((40, 60, 3), np.uint8)
    colors[..., 0] = 200
    Image.fromarray(colors).save(tmp_path / "c.png")
    tensor = torch.from_numpy(colors).permute(2, 0, 1)
    for image in (
        colors,
        Image.fromarray(colors),
        tmp_path / "c.png",
        tensor,
        tensor.float()[None] / 255,
    ):
        drawn = np.asarray(draw_keypoints(image, torch.zeros(0, 2)))
        assert (drawn == colors).all()
