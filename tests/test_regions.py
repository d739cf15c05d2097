"""Images in parts: boxes, sources computed on demand, and features that do not depend on parts."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tiepoints import DataError, build, pyramid, regions
from tiepoints.describe import DenseDescriptor
from tiepoints.detect import DetectOptions, ScoreMapDetector
from tiepoints.extract import ExtractOptions
from tiepoints.filters import binomial_blur, resize
from tiepoints.image import load_image
from tiepoints.memory import BASE, image_pixels, parse_size, tile_pixels
from tiepoints.models.rekd import REKD
from tiepoints.models.spec import fused
from tiepoints.orientation import NetOrientation
from tiepoints.pyramid import build_pyramid
from tiepoints.regions import Box, Filtered, InMemory, Resized, in_memory, resize_box, source_box
from tiepoints.weights import load

HEIGHT, WIDTH = 237, 318
#: Pixels of a part, so that the levels have several.
SMALL = 12_000


def picture() -> np.ndarray:
    """(H,W) float32: boxes and noise."""
    rng = np.random.default_rng(3)
    canvas = np.full((HEIGHT, WIDTH), 0.5, np.float32)
    for _ in range(120):
        x, y = rng.integers(0, WIDTH - 8), rng.integers(0, HEIGHT - 8)
        w, h = rng.integers(5, 40), rng.integers(5, 40)
        canvas[y : y + h, x : x + w] = rng.random()
    return np.clip(canvas + rng.normal(0, 0.01, canvas.shape), 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return load_image(picture())


def boxes(size: tuple[int, int]) -> list[Box]:
    h, w = size
    found = [
        Box(0, h // 2, 0, w // 3),
        Box(h // 3, h - 9, w // 4, w - 31),
        Box(max(0, h - 20), h, 0, w),
    ]
    return [box for box in found if min(box.size) > 0]


def test_a_box_is_divided_without_gaps_or_overlap():
    for size in ((1, 1), (30, 4000), (4000, 30), (701, 913)):
        for pixels in (1, 500, 10_000, 10**9):
            count = torch.zeros(size)
            for box in Box.whole(size).split(pixels, 16):
                box.crop(count, Box.whole(size)).add_(1)
            assert bool((count == 1).all())


def test_parts_have_about_the_pixels_asked_for_and_are_not_narrow():
    for size in ((6000, 20_000), (500, 40_000), (40_000, 500)):
        parts = Box.whole(size).split(2_000_000)
        assert max(b.size[0] * b.size[1] for b in parts) < 3_000_000
        assert min(min(b.size) for b in parts) >= 400
    assert Box.whole((1000, 2000)).split(2_000_000) == [Box.whole((1000, 2000))]


def test_boxes_stop_at_the_edge_of_the_image():
    box = Box(3, 10, 90, 100)
    assert box.grow(5, (12, 101)) == Box(0, 12, 85, 101)
    assert box.align(8, (12, 101)) == Box(0, 12, 88, 101)
    assert Box(0, 8, 0, 8).shrink(5).size == (0, 0)
    assert box.intersection(Box(5, 6, 0, 95)) == Box(5, 6, 90, 95)
    assert box.intersection(Box(20, 30, 0, 95)).size[0] == 0
    assert box.union(Box(5, 20, 0, 95)) == Box(3, 20, 0, 100)


def test_points_outside_the_image_belong_to_the_nearest_pixel():
    xy = torch.tensor([[-0.4, 5.0], [9.4, 9.4], [4.99, 4.99], [5.0, 5.0]])
    assert Box(0, 5, 0, 5).points(xy, (10, 10)).tolist() == [2]
    assert Box(5, 10, 5, 10).points(xy, (10, 10)).tolist() == [1, 3]
    assert Box(5, 10, 0, 5).points(xy, (10, 10)).tolist() == [0]


@pytest.mark.parametrize("size", [(100, 131), (400, 500), (237, 318), (1, 1), (3, 900)])
def test_a_resized_box_equals_the_resized_image(image: torch.Tensor, size: tuple[int, int]):
    expected = resize(image.double(), size)
    for box in boxes(size):
        inner = source_box(box, size, (HEIGHT, WIDTH))
        part = resize_box(
            inner.crop(image, Box.whole((HEIGHT, WIDTH))), inner, (HEIGHT, WIDTH), box, size
        )
        torch.testing.assert_close(part.double(), box.crop(expected, Box.whole(size)))


def test_resizing_with_aligned_corners_equals_torch(image: torch.Tensor):
    size = (100, 131)
    expected = torch.nn.functional.interpolate(
        image.double(), size=size, mode="bilinear", align_corners=True
    )
    source = Resized(InMemory(image), size, align_corners=True)
    for box in boxes(size):
        torch.testing.assert_close(
            source.read(box).double(), box.crop(expected, Box.whole(size)), atol=1e-6, rtol=0
        )


def test_sources_equal_the_whole_computation(image: torch.Tensor):
    size = (150, 200)
    expected = resize(binomial_blur(binomial_blur(image).double()), size)
    source = Resized(Filtered(InMemory(image), binomial_blur, 2), size, blur=True)
    assert len(Box.whole(size).split(SMALL)) > 1
    torch.testing.assert_close(
        in_memory(source, SMALL).pixels.double(), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["keynet", "keynet-tiny", "sobelnet", "rekd-light", "published"])
def test_a_part_of_a_network_equals_its_whole_output(image: torch.Tensor, name: str):
    if name == "published":
        torch.manual_seed(0)
        net = fused(REKD(group=8, variant="published").eval())
    else:
        net = fused(load(name))
    source = InMemory(torch.cat([image, image.flip(-1)]))
    whole = net.part(source, Box.whole(source.size))
    for box in boxes(source.size):
        part = net.part(source, box)
        if isinstance(part, torch.Tensor):
            part, all_maps = (part,), (whole,)
        else:
            all_maps = whole
        expected = box.crop(all_maps[0], Box.whole(source.size))
        torch.testing.assert_close(part[0], expected, rtol=1e-3, atol=2e-5 * float(expected.max()))
        if len(part) == 2:
            off = part[1] - box.crop(all_maps[1], Box.whole(source.size))
            turn = torch.remainder(off + torch.pi, 2 * torch.pi) - torch.pi
            assert float(turn.abs().quantile(0.99)) < 1e-3


OPTIONS = {
    "default": {},
    "per scale": {"per_scale": True},
    "official": {"official": True},
    "no suppression": {"nms_window": 1, "border": 0},
    "cut": {"cut_ratio": 0.3},
}


#: REKD once, because it is slow; the selection is the same code.
CASES = [("rekd-light", "default", False)] + [
    (name, options, masked)
    for name in ("keynet", "sobelnet")
    for options in OPTIONS
    for masked in (False, True)
]


@pytest.mark.parametrize(("name", "options", "masked"), CASES)
def test_keypoints_do_not_depend_on_parts(image, monkeypatch, name, options, masked):
    mask = None
    if masked:
        mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
        mask[40:200, 60:251] = True
    chosen = DetectOptions(num_keypoints=150, **OPTIONS[options])
    net = fused(load(name))
    scale_power = net.spec.scale_power
    whole = ScoreMapDetector(net, chosen, scale_power=scale_power)
    parts = ScoreMapDetector(net, chosen, scale_power=scale_power, tile_pixels=SMALL)
    expected = whole(build_pyramid(image), [mask])[0]
    monkeypatch.setattr(pyramid, "TILE_PIXELS", SMALL)
    monkeypatch.setattr(regions, "MIN_ROWS", 64)
    levels = build_pyramid(image)
    assert not isinstance(levels.levels[0].source, InMemory)
    found = parts(levels, [mask])[0]
    assert len(found) == len(expected) > 15
    rows_a, rows_b = (_sorted_rows(keypoints) for keypoints in (found, expected))
    np.testing.assert_allclose(rows_a, rows_b, atol=2e-3, rtol=1e-3)


def _sorted_rows(keypoints) -> np.ndarray:
    """(N,4) x, y, scale, score, in the order of rounded positions and scales."""
    rows = torch.stack([*keypoints.xy.unbind(1), keypoints.scale, keypoints.score], dim=1).numpy()
    return rows[np.lexsort(rows[:, :3].round(1).T)]


def test_a_plateau_across_parts_gives_its_first_pixel():
    class Plateau(torch.nn.Module):
        floor = 0.0

        def part(self, source, box):
            return source.read(box)

        def forward(self, image):
            return image

    score_map = torch.zeros(1, 1, 120, 160)
    score_map[..., 50:70, 70:90] = 1.0  # on the corner of four parts
    options = DetectOptions(num_keypoints=50, nms_window=5, border=0)
    levels = build_pyramid(score_map, up=0, down=0)
    whole = ScoreMapDetector(Plateau(), options)(levels)[0]
    parts = ScoreMapDetector(Plateau(), options, tile_pixels=4800)(levels)[0]
    np.testing.assert_array_equal(_sorted_rows(whole), _sorted_rows(parts))
    assert len(parts) == 1
    assert float((parts.xy[0] - torch.tensor([70.0, 50.0])).abs().max()) <= 0.5  # sub-pixel


def test_patches_and_descriptors_do_not_depend_on_parts(image, monkeypatch):
    extractor = build("keynet", "rootsift", num_keypoints=120, orientation="dominant")
    dense = build("keynet", "desnet", precision="float32").describe
    assert isinstance(dense, DenseDescriptor)
    angles = NetOrientation(fused(load("rekd-light")))
    expected = extractor.extract(image)
    levels = build_pyramid(image)
    keypoints = expected.keypoints
    expected_dense, expected_angles = dense(levels, keypoints, 0), angles(levels, keypoints, 0)
    monkeypatch.setattr(pyramid, "TILE_PIXELS", SMALL)
    monkeypatch.setattr(regions, "MIN_ROWS", 64)
    levels = build_pyramid(image)
    assert extractor.describe is not None
    torch.testing.assert_close(
        extractor.describe(levels, keypoints, 0), expected.descriptors, atol=1e-4, rtol=0
    )
    parts = DenseDescriptor(dense.net, dense.dim, tile_pixels=SMALL)
    torch.testing.assert_close(parts(levels, keypoints, 0), expected_dense, atol=1e-4, rtol=0)
    found = NetOrientation(angles.net, tile_pixels=SMALL)(levels, keypoints, 0)
    turn = torch.remainder(found - expected_angles + torch.pi, 2 * torch.pi) - torch.pi
    assert float(turn.abs().quantile(0.95)) < 1e-3


def test_reduced_images_have_positions_of_the_original(image: torch.Tensor):
    """An enlarged copy, reduced by ``max_size``, has the keypoints of the image."""
    large = resize(image, (3 * HEIGHT, 3 * WIDTH))
    options = {"num_keypoints": 100}
    plain = build("keynet", "rootsift", **options).extract(image)
    reduced = build("keynet", "rootsift", max_size=WIDTH, **options).extract(large)
    assert reduced.image_size == (3 * WIDTH, 3 * HEIGHT)
    position = (plain.xy + 0.5) * 3 - 0.5
    distance = torch.cdist(reduced.xy, position)
    assert float((distance.min(dim=0).values < 1.5).float().mean()) > 0.6
    nearest = distance.argmin(dim=1)
    close = distance.min(dim=1).values < 1.5
    ratio = reduced.scale[close] / plain.scale[nearest[close]]
    assert float(ratio.median()) == pytest.approx(3.0, abs=0.1)


def test_smaller_images_are_not_reduced(image: torch.Tensor):
    plain = build("sobelnet", "none", num_keypoints=60).extract(image)
    limited = build("sobelnet", "none", num_keypoints=60, max_size=WIDTH).extract(image)
    assert torch.equal(plain.xy, limited.xy)


def test_masks_apply_to_reduced_images(image: torch.Tensor):
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[:, : WIDTH // 2] = 1
    found = build("sobelnet", "none", num_keypoints=60, max_size=200).extract(image, mask)
    assert len(found) > 10
    assert float(found.xy[:, 0].max()) < WIDTH // 2 + 2


@pytest.mark.parametrize(
    ("text", "size"), [("2G", 2 << 30), ("1.5GiB", 3 << 29), ("800 m", 800 << 20), ("1000", 1000)]
)
def test_sizes_have_units(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "2X", "-1G", "2 GB G"])
def test_other_sizes_are_errors(text: str):
    with pytest.raises(ValueError, match="2G or 800M"):
        parse_size(text)


def test_parts_and_images_follow_from_the_memory():
    assert tile_pixels(None) == regions.TILE_PIXELS == tile_pixels(8 << 30)
    assert tile_pixels(600 << 20) < tile_pixels(700 << 20) < regions.TILE_PIXELS
    assert image_pixels(1 << 30) < image_pixels(2 << 30)
    with pytest.raises(ValueError, match="at least"):
        ExtractOptions(memory=BASE)
    with pytest.raises(ValueError, match="max_size"):
        ExtractOptions(max_size=3)


def test_freed_memory_is_kept():
    """Maps that are computed again and again do not ask the system for new pages."""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("glibc only")
    script = (
        "import resource, sys, numpy as np\n"
        "from tiepoints.memory import keep_freed\n"
        "if sys.argv[1:]: keep_freed(large_blocks=sys.argv[1] == 'large')\n"
        "for size in (2_000_000, 12_000_000):\n"
        "    np.ones(size)\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(8): np.ones(size), np.ones(size)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    faults = {}
    for kept in ("", "small", "large"):
        command = [sys.executable, "-c", script, *([kept] if kept else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        faults[kept] = [int(line) for line in done.stdout.split()]
    # blocks of 16 MB, then of 96 MB
    assert faults["small"][0] < faults[""][0] / 2
    assert faults["small"][1] > faults[""][1] / 2
    assert max(faults["large"]) < min(faults[""]) / 2


def test_memory_does_not_change_the_settings_of_results():
    options = ExtractOptions(memory=1 << 30)
    assert options.to_json() == replace(options, memory=None).to_json()
    assert ExtractOptions(max_size=800).to_json()["max_size"] == 800


def test_few_large_images_are_in_memory_at_a_time(tmp_path, monkeypatch):
    """With a limit of the pixels of two images, a third is read after the first is extracted."""
    from tiepoints.extract import Extractor
    from tiepoints.jobs import extract as job
    from tiepoints.jobs import images as job_images

    for i in range(6):
        Image.fromarray((picture() * 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
    lock, alive, most = threading.Lock(), [0], [0]
    read, extract = Extractor.read, Extractor.extract_tensor

    def counted_read(extractor, source):
        with lock:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        return read(extractor, source)

    def counted_extract(extractor, batch, masks):
        time.sleep(0.05)  # the threads that read are faster
        features = extract(extractor, batch, masks)
        with lock:
            alive[0] -= 1
        return features

    monkeypatch.setattr(Extractor, "read", counted_read)
    monkeypatch.setattr(Extractor, "extract_tensor", counted_extract)
    monkeypatch.setattr(job_images, "image_pixels", lambda memory: 2 * HEIGHT * WIDTH)
    options = ExtractOptions(
        detector="sobelnet", descriptor="none", num_keypoints=10, single_scale=True
    )
    report = job.extract_images([str(tmp_path)], tmp_path / "out", options)
    assert (report.done, report.failed) == (6, [])
    assert most[0] == 2


def test_images_that_need_more_memory_are_refused_by_name(tmp_path):
    path = tmp_path / "large.png"
    Image.new("L", (9000, 9000)).save(path)
    extractor = ExtractOptions(detector="sobelnet", descriptor="none", memory=600 << 20).build()
    with pytest.raises(DataError, match=r"large.png: 9000 x 9000 .* MiB .* raise the limit"):
        extractor.extract(path)
