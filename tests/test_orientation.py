"""Keypoint angles: they rotate with the image for all orientations; descriptors are rotated or
upright.
"""

import math

import pytest
import torch

from tiepoints import build, match
from tiepoints.evaluation.sweeps import rotated, sweep
from tiepoints.evaluation.systems import Options, system
from tiepoints.filters import gaussian_blur
from tiepoints.metrics.repeatability import orientation_errors, repeated_points
from tiepoints.models.rekd import REKD
from tiepoints.orientation import DominantOrientation, angle_at, dominant_angle
from tiepoints.pyramid import build_pyramid
from tiepoints.structs import Keypoints


def scene(height: int = 120, width: int = 150) -> torch.Tensor:
    image = gaussian_blur(
        torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(5)), 2.0
    )
    return (image - image.min()) / (image.max() - image.min())


@pytest.mark.parametrize("degrees", [0, 30, 137, 250])
def test_dominant_angle_of_a_ramp(degrees):
    axis = torch.arange(32) - 15.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = math.radians(degrees)
    ramp = (x * math.cos(angle) + y * math.sin(angle))[None, None]
    off = (math.degrees(dominant_angle(ramp).item()) - degrees + 180) % 360 - 180
    assert abs(off) < 1
    assert dominant_angle(torch.full((1, 1, 32, 32), 0.5)).item() == 0


def test_angle_at_uses_the_nearest_pixel_inside():
    angles = torch.arange(12.0).view(3, 4)
    xy = torch.tensor([[0.4, 0.6], [3.4, 2.4], [9.0, -2.0]])
    assert angle_at(angles, xy).tolist() == [4.0, 11.0, 3.0]


@pytest.mark.parametrize("orientation", ["dominant", "rekd-light", "rekd"])
@pytest.mark.parametrize("degrees", [90, 40])
def test_keynet_keypoint_angles_rotate_with_the_image(orientation, degrees):
    image = scene()
    moved, H = rotated(image, degrees)
    extract = build(
        "keynet", None, orientation=orientation, num_keypoints=200, device="cpu"
    ).extract
    a, b = extract(image), extract(moved)
    i, j = repeated_points(a.xy, b.xy, H, image.shape[-2:], moved.shape[-2:])
    assert len(i) > 15
    errors = orientation_errors(a.xy[i], a.angle[i], b.angle[j], H)
    assert errors.median() < (5 if degrees == 90 else 30)  # noise has few corners; chance is 90
    plain = build("keynet", None, num_keypoints=200, device="cpu").extract(image)
    assert not plain.angle.any()
    assert torch.equal(plain.xy, a.xy)  # the points are the same


def test_patches_rotate_with_the_angles_unless_upright():
    image = scene()
    moved, H = rotated(image, 90)
    right = {}
    for name, options in {"rotated": {}, "upright": {"upright": True}}.items():
        extract = build(
            "keynet", "rootsift", orientation="dominant", num_keypoints=200, device="cpu", **options
        ).extract
        a, b = extract(image), extract(moved)
        found = match(a, b).index
        mapped = torch.cat([a.xy[found[:, 0]].double(), torch.ones(len(found), 1)], dim=1) @ H.T
        right[name] = int(((mapped[:, :2] - b.xy[found[:, 1]]).norm(dim=1) < 3).sum())
        assert a.angle.any()
    assert right["rotated"] > 3 * right["upright"]


def test_rekd_estimates_angles_unless_orientation_is_none():
    torch.manual_seed(0)
    net = REKD(group=8).eval()
    own = build(net, None, single_scale=True, num_keypoints=50, device="cpu").extract(scene())
    none = build(
        net, None, orientation="none", single_scale=True, num_keypoints=50, device="cpu"
    ).extract(scene())
    assert own.angle.any()
    assert not none.angle.any()
    assert torch.equal(own.xy, none.xy)


def test_batches_and_no_keypoints():
    image = torch.cat([scene(), scene().flip(-1)])
    pyramid = build_pyramid(image)
    points = Keypoints(
        torch.tensor([[60.0, 50.0], [30.0, 80.0]]),
        torch.tensor([1.0, 3.0]),
        torch.zeros(2),
        torch.ones(2),
    )
    orient = DominantOrientation()
    assert not torch.allclose(orient(pyramid, points, 0), orient(pyramid, points, 1))
    assert orient(pyramid, points[:0], 0).shape == (0,)
    with pytest.raises(ValueError, match="orientation must be one of"):
        build("keynet", None, orientation="north")


def test_sweeps_measure_orientation_errors_with_interpolated_pixels():
    rotated_rows = sweep(
        system("keynet@dominant+none", Options(200, True)),
        scene(),
        "rotation",
        (0, 90, 40),
        shift=0.5,
    )
    assert [row["value"] for row in rotated_rows] == [0, 90, 40]
    for row in rotated_rows:
        assert row["metrics"]["turn.median"] < 20
        assert 0.4 < row["metrics"]["turn.right"] <= 1
        assert row["metrics"]["mutual.rep@3"] < 1
    plain = sweep(system("keynet+none", Options(200, True)), scene(), "rotation", (0,))[0][
        "metrics"
    ]
    assert plain["mutual.rep@3"] == 1
    assert "turn.median" not in plain
    with pytest.raises(ValueError, match="mode after @"):
        system("keynet@north+none")
