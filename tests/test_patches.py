"""Patches: compared with a warp of the whole image and with kornia, at the border, in batches,
gradients, memory.
"""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tiepoints.patches import HALF_SIDE, extract_patches
from tiepoints.pyramid import CONTEXT_SIDE, Pyramid, build_pyramid
from tiepoints.structs import Keypoints


def smooth_image(h: int = 240, w: int = 320, seed: int = 0, wave: float = 60.0):
    """Waves of at least ``wave / sqrt(2)`` pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    image = np.full((h, w), 0.5)
    for _ in range(6):
        fx, fy = rng.uniform(-1, 1, 2) / wave
        image += 0.08 * np.sin(2 * np.pi * (fx * x + fy * y) + rng.uniform(0, 6))
    return torch.from_numpy(image).float()[None, None]


def points(xy, scale, angle=0.0):
    xy = torch.as_tensor(xy, dtype=torch.float32)
    n = len(xy)
    return Keypoints(
        xy, torch.full((n,), float(scale)), torch.full((n,), float(angle)), torch.ones(n)
    )


def brute_force(image, keypoints, size=32):
    """Each sample separately, from the image itself, in double precision."""
    pixels = image[0, 0].double().numpy()
    h, w = pixels.shape
    out = np.zeros((len(keypoints), size, size))
    for n in range(len(keypoints)):
        x0, y0 = keypoints.xy[n].tolist()
        scale, angle = float(keypoints.scale[n]), float(keypoints.angle[n])
        for row in range(size):
            for column in range(size):
                u, v = (HALF_SIDE * scale * ((2 * k + 1) / size - 1) for k in (column, row))
                x = min(max(x0 + u * np.cos(angle) - v * np.sin(angle), 0), w - 1)
                y = min(max(y0 + u * np.sin(angle) + v * np.cos(angle), 0), h - 1)
                i, j = min(int(x), w - 2), min(int(y), h - 2)
                a, b = x - i, y - j
                out[n, row, column] = (
                    np.array([1 - b, b]) @ pixels[j : j + 2, i : i + 2] @ np.array([1 - a, a])
                )
    return torch.from_numpy(out).float()[:, None]


@pytest.mark.parametrize("scale", [0.72, 1.0, 1.3, 2.0, 3.7])
@pytest.mark.parametrize("angle", [0.0, 0.7, -2.5])
def test_equals_a_warp_of_the_whole_image(scale, angle):
    image = smooth_image(
        300, 340, wave=100 * max(1.0, scale)
    )  # hardly blurred at the level of this scale
    keypoints = points([[170, 150], [150.3, 141.8], [160.6, 160.2]], scale, angle)
    found = extract_patches(build_pyramid(image), keypoints)
    torch.testing.assert_close(found, brute_force(image, keypoints), atol=0.01, rtol=0)
    only = Pyramid(build_pyramid(image, up=0, down=0).levels, 0)
    torch.testing.assert_close(
        extract_patches(only, keypoints), brute_force(image, keypoints), atol=1e-4, rtol=0
    )


def test_surroundings_have_half_the_resolution():
    image = smooth_image(600, 700, wave=300)
    keypoints = points([[350, 300], [320.3, 281.8], [360.6, 310.2]], 1.5, 0.4)
    near, wide = extract_patches(build_pyramid(image), keypoints, reach=(1.0, 3.0)).unbind(dim=1)
    torch.testing.assert_close(near, extract_patches(build_pyramid(image), keypoints)[:, 0])
    assert torch.equal(wide[:, ::2, ::2], wide[:, 1::2, 1::2])
    expected = brute_force(image, replace(keypoints, scale=3 * keypoints.scale), size=16)[:, 0]
    torch.testing.assert_close(wide[:, ::2, ::2], expected, atol=0.02, rtol=0)
    pyramid = build_pyramid(image)
    (whole,) = extract_patches(pyramid, [keypoints], reach=(3.0,), halved=False)
    expected = brute_force(image, replace(keypoints, scale=3 * keypoints.scale))
    torch.testing.assert_close(whole, expected, atol=0.02, rtol=0)


def test_surroundings_are_not_aliased():
    """They are sampled from coarser levels than the detector's."""
    image = torch.zeros(1, 1, 400, 400)
    image[..., ::2] = 1
    pyramid = build_pyramid(image, up=0, down=0)
    wide = extract_patches(pyramid, points([[200, 200]], 1.0), reach=(8.0,))
    assert wide.std() < 0.02
    scales = [level.scale for level in pyramid.with_coarser(8.4).levels]
    assert len(scales) == 7
    assert max(scales) == pytest.approx(8, rel=0.05)
    assert min(pyramid.with_coarser(1e6).levels[-1].size) > CONTEXT_SIDE


def test_rotation_follows_the_angle_convention():
    """A bright half plane to the right of the keypoint: with an angle of 90 degrees (towards +y) it
    is at the top of the patch.
    """
    image = torch.zeros(1, 1, 100, 100)
    image[..., 50:] = 1
    at = [[49.5, 50]]
    upright = extract_patches(build_pyramid(image, up=0, down=0), points(at, 1.0))[0, 0]
    rotated = extract_patches(build_pyramid(image, up=0, down=0), points(at, 1.0, np.pi / 2))[0, 0]
    assert upright[:, 17:].min() == 1
    assert upright[:, :15].max() == 0
    # the +x axis of the patch points down in the image, +y to the left: the right half is at
    # negative v of the patch
    assert rotated[:15].min() > 0.99
    assert rotated[17:].max() < 0.01


def test_border_is_replicated():
    image = smooth_image(60, 80)
    patch = extract_patches(build_pyramid(image, up=0, down=0), points([[0, 0]], 1.0))[0, 0]
    assert torch.all(patch[:16, :16] == image[0, 0, 0, 0])
    far = extract_patches(build_pyramid(image), points([[-500, 900]], 1.0))[0, 0]
    torch.testing.assert_close(far, image[0, 0, -1, 0].expand(32, 32), atol=1e-5, rtol=0)


def test_empty_single_many_and_batches():
    images = torch.cat([smooth_image(seed=1), smooth_image(seed=2)])
    pyramid = build_pyramid(images)
    assert extract_patches(pyramid, Keypoints.empty()).shape == (0, 1, 32, 32)
    some, other = points([[50, 60], [100, 90]], 1.5, 0.3), points([[200, 100]], 2.0)
    both = extract_patches(pyramid, [some, other])
    assert [len(patches) for patches in both] == [2, 1]
    alone = build_pyramid(images[1:])
    torch.testing.assert_close(both[1], extract_patches(alone, other))
    many = points(torch.rand(5000, 2) * 200, 1.0)
    first = extract_patches(pyramid, many)
    torch.testing.assert_close(first[4321:4322], extract_patches(pyramid, many[4321:4322]))
    with pytest.raises(ValueError, match="1 sets of keypoints for a batch of 2"):
        extract_patches(pyramid, [some])
    assert extract_patches(pyramid, some, size=20, half_side=10).shape == (2, 1, 20, 20)


def test_gradients_of_image_and_points():
    image = smooth_image().requires_grad_()
    xy = torch.tensor([[100.2, 80.7]], requires_grad=True)
    scale, angle = torch.tensor([1.2], requires_grad=True), torch.tensor([0.4], requires_grad=True)
    patch = extract_patches(build_pyramid(image), Keypoints(xy, scale, angle, torch.ones(1)))
    pull = torch.linspace(-1, 1, 1024).view(1, 1, 32, 32)
    (patch * pull).sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (image, xy, scale, angle))
    with torch.no_grad():
        step = 0.05
        moved = [
            (
                extract_patches(
                    build_pyramid(image),
                    Keypoints(xy + torch.tensor([[d, 0.0]]), scale, angle, torch.ones(1)),
                )
                * pull
            ).sum()
            for d in (step, -step)
        ]
    assert float(xy.grad[0, 0]) == pytest.approx(float(moved[0] - moved[1]) / (2 * step), rel=0.05)


def test_equals_kornia_where_conventions_agree():
    """kornia 0.9 also has half-pixel sampling; the columns of a frame are the axes of the patch."""
    kornia = pytest.importorskip("kornia.feature")
    if not hasattr(kornia.laf, "_sample_patches"):
        pytest.skip("kornia before 0.9 is half a pixel off")
    image = smooth_image()
    keypoints = points([[160, 120], [110.4, 99.6], [2, 3]], 1.0, 0.6)
    frames = torch.zeros(1, 3, 2, 3)
    cos, sin = keypoints.angle.cos(), keypoints.angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    frames[0, :, :, :2] = HALF_SIDE * rotation
    frames[0, :, :, 2] = keypoints.xy
    theirs = kornia.extract_patches_simple(image, frames, 32)[0]
    ours = extract_patches(build_pyramid(image, up=0, down=0), keypoints)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_of_twenty_thousand_patches():
    code = """
import pathlib, torch
from tiepoints.patches import extract_patches
from tiepoints.pyramid import build_pyramid
from tiepoints.structs import Keypoints
n = 20_000
image = torch.rand(1, 1, 1200, 1600)
points = Keypoints(
    torch.rand(n, 2) * 1000, 0.7 + 5 * torch.rand(n), torch.rand(n) * 6, torch.ones(n)
)
patches = extract_patches(build_pyramid(image), points)
assert patches.shape == (n, 1, 32, 32)
# not getrusage, whose value a process inherits from the one that starts it
status = pathlib.Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak = int(done.stdout) / 1024**2
    assert peak < 1.5, f"{peak:.2f} GiB"
