"""OpenCV's detectors and our SURF: positions and scales of drawn blobs and corners, descriptors,
unusual images, missing libraries.
"""

import math
import sys

import numpy as np
import pytest
import torch

from tiepoints.evaluation.baselines import surf as surf_module
from tiepoints.evaluation.baselines.opencv import MIN_SIDE, OPENCV_SYSTEMS, opencv_detect
from tiepoints.evaluation.baselines.surf import hessian, surf
from tiepoints.evaluation.systems import Options, system

cv2 = pytest.importorskip("cv2")

BLOBS = ((60, 50, 3.0), (160, 60, 4.0), (90, 140, 5.0), (180, 150, 6.0))  # x, y, sigma
LENGTHS = {"sift": 128, "surf": 64, "kaze": 64, "akaze": 488, "orb": 256, "brisk": 512}


def blobs(size=(240, 200)) -> np.ndarray:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    image = np.full(x.shape, 40.0)
    for cx, cy, sigma in BLOBS:
        image += 160 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * sigma**2))
    return image.round().clip(0, 255).astype(np.uint8)


def squares() -> np.ndarray:
    image = np.full((200, 240), 40, np.uint8)
    image[60:101, 50:91] = 200  # corner pixels (50, 60) .. (90, 100)
    image[120:161, 140:201] = 220
    return cv2.GaussianBlur(
        image, (0, 0), 1.0
    )  # FAST detects nothing where neighbors have equal scores


CORNERS = ((50, 60), (90, 60), (50, 100), (90, 100), (140, 120), (200, 120), (140, 160), (200, 160))


def texture(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = sum(np.kron(rng.random((192 // s, 256 // s)), np.ones((s, s))) for s in (4, 8, 16, 32))
    return cv2.GaussianBlur((image / image.max() * 255).astype(np.uint8), (0, 0), 1.0)


@pytest.mark.parametrize("name", OPENCV_SYSTEMS)
def test_shapes_order_and_unit_descriptors(name):
    gray = texture()
    points, rows = opencv_detect(name, gray, 60)
    assert 10 < len(points) <= 60
    assert points.xy.dtype == points.scale.dtype == torch.float32
    assert (points.score.diff() <= 0).all()
    assert (points.scale > 0).all()
    assert ((points.angle >= 0) & (points.angle <= 2 * math.pi)).all()
    assert ((points.xy >= -0.5) & (points.xy <= torch.tensor([255.5, 191.5]))).all()
    if name in LENGTHS:
        assert rows.shape == (len(points), LENGTHS[name])
        assert rows.dtype == torch.float32
        assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
    else:
        assert rows is None
    bare, none = opencv_detect(name, gray, 60, describe=False)
    assert none is None
    assert torch.equal(bare.xy, points.xy)
    stronger = opencv_detect(name, gray, 20)[0]
    assert torch.equal(stronger.xy, points.xy[:20])


@pytest.mark.parametrize(
    ("name", "shift"), [("sift", 0.25), ("surf", 0.0), ("mser", 0.0), ("kaze", 0.0)]
)
def test_blobs_are_detected_at_their_positions(name, shift):
    points = opencv_detect(name, blobs(), 500)[0]
    for x, y, _ in BLOBS:
        offset = points.xy - torch.tensor([x, y])
        nearest = offset[offset.norm(dim=1).argmin()]
        assert torch.allclose(nearest, torch.tensor([shift, shift]), atol=0.1), (x, y, nearest)


@pytest.mark.parametrize("name", ["fast", "shi-tomasi", "harris", "orb"])
def test_corners_are_detected_at_their_positions(name):
    points = opencv_detect(name, squares(), 500)[0]
    distance = torch.cdist(torch.tensor(CORNERS, dtype=torch.float32), points.xy).amin(dim=1)
    assert (distance <= 1.5).all(), distance


def test_cosine_of_binary_descriptors_orders_as_hamming_distance():
    gray = texture(1)
    rows = opencv_detect("orb", gray, 50)[1]
    orb = cv2.ORB_create(nfeatures=5000)
    found, packed = orb.detectAndCompute(gray, None)
    order = np.argsort([-p.response for p in found], kind="stable")[:50]
    bits = np.unpackbits(packed[order], axis=1).astype(int)
    hamming = np.abs(bits[:, None] - bits[None]).sum(axis=-1)
    assert torch.allclose(rows @ rows.T, torch.from_numpy(1 - 2 * hamming / 256).float(), atol=1e-5)


def test_mser_order_is_random_but_repeatable():
    gray = texture()
    first, again, other = (opencv_detect("mser", gray, 15, seed)[0].xy for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", OPENCV_SYSTEMS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (MIN_SIDE, MIN_SIDE), (9, 31), (64, 64)])
def test_tiny_and_constant_images(name, shape):
    for gray in (
        np.full(shape, 90, np.uint8),
        np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
    ):
        points, rows = opencv_detect(name, gray, 50)
        assert len(points) == 0 or (min(shape) >= MIN_SIDE and gray.min() < gray.max())
        if name in LENGTHS:
            assert rows.shape == (len(points), LENGTHS[name])


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match=r"sift.*got 'nonsense'"):
        opencv_detect("nonsense", texture())
    with pytest.raises(ValueError, match="uint8"):
        opencv_detect("sift", texture().astype(np.float32))
    with pytest.raises(ValueError, match="num_keypoints"):
        opencv_detect("sift", texture(), 0)


def test_missing_opencv_and_missing_contrib_name_the_extra(monkeypatch):
    monkeypatch.delattr(cv2, "xfeatures2d", raising=False)
    with pytest.raises(ImportError, match=r"contrib.*tiepoints\[opencv\]"):
        opencv_detect("harris-laplace", texture())
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"pip install 'tiepoints\[opencv\]'"):
        system("sift")
    assert len(opencv_detect("surf", texture())[0])  # does not need OpenCV


def test_as_a_system_of_the_evaluation():
    found = system("akaze", Options(num_keypoints=30))(texture())
    assert found.image_size == (256, 192)
    assert found.descriptors.shape == (len(found), 488)
    assert system("fast+rootsift", Options(num_keypoints=30))(texture()).descriptors.shape == (
        30,
        128,
    )


# ---- SURF


def test_surf_scale_is_that_of_the_blob():
    points = surf(torch.from_numpy(blobs()) / 255, 50)[0]
    for x, y, sigma in BLOBS:
        index = (points.xy - torch.tensor([x, y])).norm(dim=1).argmin()
        # box filters respond at slightly finer scales than the Gaussians they approximate
        assert float(points.scale[index]) * surf_module.SIGMA == pytest.approx(sigma, rel=0.35)


def test_surf_hessian_is_the_sum_over_boxes():
    image = torch.rand(30, 34, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    integral = torch.nn.functional.pad(image, (1, 0, 1, 0)).cumsum(dim=0).cumsum(dim=1)
    kernel = torch.zeros(3, 9, 9, dtype=torch.float64)
    kernel[0, 2:7] = torch.tensor([1, 1, 1, -2, -2, -2, 1, 1, 1])  # xx
    kernel[1] = kernel[0].T  # yy
    kernel[2, 1:4, 1:4] = kernel[2, 5:8, 5:8] = 1  # xy
    kernel[2, 1:4, 5:8] = kernel[2, 5:8, 1:4] = -1
    xx, yy, xy = torch.nn.functional.conv2d(image[None, None], kernel[:, None])[0] / 81
    expected = torch.zeros_like(image)
    expected[4:-4, 4:-4] = xx * yy - (0.9 * xy) ** 2
    assert torch.allclose(hessian(integral, 9, 1), expected)
    assert torch.allclose(hessian(integral, 9, 2), expected[::2, ::2])


def test_surf_rotates_with_the_image():
    gray = (
        torch.from_numpy(texture())[:185, :249] / 255
    )  # after rotation, samples of coarse octaves are at the same pixels
    a, rows_a = surf(gray, 40)
    b, rows_b = surf(
        torch.rot90(gray, -1), 40
    )  # rotation by 90 degrees clockwise: (x, y) -> (h - 1 - y, x)
    rotated = torch.stack([gray.shape[0] - 1 - a.xy[:, 1], a.xy[:, 0]], dim=1)
    distance, index = torch.cdist(rotated, b.xy).min(dim=1)
    same = distance < 0.01
    assert same.sum() >= 30
    difference = (b.angle[index] - a.angle - math.pi / 2 + math.pi).remainder(2 * math.pi) - math.pi
    assert float(difference[same].abs().median()) < 0.01
    assert float((rows_a * rows_b[index]).sum(dim=1)[same].median()) > 0.99


def test_surf_is_gain_and_offset_invariant_except_for_the_threshold():
    gray = torch.from_numpy(texture()) / 255
    a, rows_a = surf(gray, 40)
    b, rows_b = surf(0.5 * gray + 0.2, 40, threshold=surf_module.THRESHOLD / 4)
    assert torch.allclose(a.xy, b.xy, atol=1e-4)
    assert torch.allclose(rows_a, rows_b, atol=1e-4)
