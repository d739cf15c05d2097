"""Reconstructions as training data: a textured plane seen by known cameras, written as a COLMAP
model and read again.
"""

import logging
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from tiepoints.datasets.crop_sampler import CropSampler
from tiepoints.datasets.patch_pairs import PatchSettings
from tiepoints.datasets.patch_sampler import PatchSampler
from tiepoints.datasets.reconstructions import (
    ImageCache,
    TrackSettings,
    find_models,
    pack_scene,
    read_scene,
    read_scenes,
)
from tiepoints.datasets.synthetic import PairSettings, find_photos, unreadable_log
from tiepoints.datasets.tracks import (
    Mixture,
    TrackCrops,
    TrackPatches,
    _draw_item,
    correct_share,
    onto_keypoints,
    reconstruction_pairs,
)
from tiepoints.errors import DataError
from tiepoints.filters import gaussian_blur
from tiepoints.geometry import warp_image, warp_points
from tiepoints.training.loop import RunOptions
from tiepoints.training.recipes import TrainData, train
from tiepoints.training.recipes.descriptors import candidate_loss
from tiepoints.training.validation import PosedCheck
from tiepoints.weights import load

pycolmap = pytest.importorskip("pycolmap")

WIDTH, HEIGHT, FOCAL = 320, 240, 300.0
#: Roll in degrees, tilt in degrees, height above the plane and position over it, for each camera.
CAMERAS = [
    (0, 0, 3.0, (0, 0)),
    (40, 4, 3.0, (0.2, 0)),
    (90, 0, 2.2, (-0.2, 0.1)),
    (-150, 6, 4.0, (0.1, 0.3)),
]
PIXELS = 200.0  # pixels of the texture per world unit
CLEAN = TrackSettings(angles=(0.5, 60.0), detected=0.0, rotation=0.0, photometric=PairSettings())


def pose(
    roll: float, tilt: float, height: float, at: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Camera above the plane z = 0, looking along +z: rotation and translation, world to camera."""
    roll, tilt = math.radians(roll), math.radians(tilt)
    about_z = np.array(
        [[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1]]
    )
    about_x = np.array(
        [[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)], [0, math.sin(tilt), math.cos(tilt)]]
    )
    rotation = about_x @ about_z
    return rotation, -rotation @ np.array([*at, -height])


def texture_to_image(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """Homography from pixels of the texture, whose center is the world's origin, to pixels of the
    image.
    """
    camera = np.array([[FOCAL, 0, WIDTH / 2 - 0.5], [0, FOCAL, HEIGHT / 2 - 0.5], [0, 0, 1]])
    to_world = np.array(
        [[1 / PIXELS, 0, -499.5 / PIXELS], [0, 1 / PIXELS, -499.5 / PIXELS], [0, 0, 1]]
    )
    return camera @ np.c_[rotation[:, :2], translation] @ to_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of a COLMAP model with images, and the homography of each image from the texture."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    (folder / "sparse").mkdir()
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(1, 1, 1000, 1000, generator=generator)
    texture = sum(gaussian_blur(noise - 0.5, sigma) * sigma for sigma in (2.0, 4.0, 8.0))
    texture = (0.5 + texture / (6 * texture.std())).clamp(0, 1)
    rng = np.random.default_rng(0)
    points = np.c_[rng.uniform(-1.6, 1.6, (900, 2)), np.zeros(900)]
    model = pycolmap.Reconstruction()
    # COLMAP's principal point is relative to the corner of the first pixel
    model.add_camera_with_trivial_rig(
        pycolmap.Camera(
            model="SIMPLE_PINHOLE",
            width=WIDTH,
            height=HEIGHT,
            params=[FOCAL, WIDTH / 2, HEIGHT / 2],
            camera_id=1,
        )
    )
    homographies, tracks = [], [[] for _ in points]
    for number, camera in enumerate(CAMERAS, start=1):
        rotation, translation = pose(*camera)
        H = texture_to_image(rotation, translation)
        homographies.append(torch.from_numpy(H))
        image = warp_image(texture, torch.from_numpy(H).float(), (HEIGHT, WIDTH))[0, 0]
        Image.fromarray((image * 255).round().byte().numpy()).save(
            folder / "images" / f"{number}.png"
        )
        xy = warp_points(
            torch.from_numpy(points[:, :2] * PIXELS + 499.5), torch.from_numpy(H)
        ).numpy()
        seen = ((xy >= 0) & (xy <= [WIDTH - 1, HEIGHT - 1])).all(axis=1).nonzero()[0]
        for index, point in enumerate(seen):
            tracks[point].append((number, index))
        entry = pycolmap.Image(
            name=f"{number}.png", keypoints=xy[seen] + 0.5, camera_id=1, image_id=number
        )
        model.add_image_with_trivial_frame(
            entry, pycolmap.Rigid3d(pycolmap.Rotation3d(rotation), translation)
        )
    for xyz, seen_by in zip(points, tracks, strict=True):
        if len(seen_by) >= 2:
            track = pycolmap.Track()
            for number, index in seen_by:
                track.add_element(number, index)
            model.add_point3D(xyz, track)
    model.update_point_3d_errors()
    model.write(str(folder / "sparse"))
    return folder, homographies


@pytest.fixture
def scene(world):
    return read_scene(world[0] / "sparse", world[0] / "images", CLEAN)


def nothing(image):
    return torch.zeros(0, 2)


def grid(image):
    axes = [torch.arange(10.0, side, 16) for side in (image.shape[-1], image.shape[-2])]
    return torch.cartesian_prod(*axes)


def test_shared_points_follow_the_homography_of_their_plane(world, scene):
    _, homographies = world
    assert len(scene.pairs) >= 4
    for a, b in scene.pairs:
        shared = scene.shared(a, b)
        H_ab = homographies[b] @ torch.linalg.inv(homographies[a])
        expected = warp_points(torch.from_numpy(shared.xy_a).double(), H_ab)
        assert np.abs(expected.numpy() - shared.xy_b).max() < 0.01  # sensitive to half a pixel
        step = 1e-3
        axes = [
            (
                warp_points(
                    torch.from_numpy(shared.xy_a).double() + step * torch.eye(2)[k].double(), H_ab
                )
                - expected
            )
            / step
            for k in (0, 1)
        ]
        angle = torch.atan2(axes[0][:, 1] - axes[1][:, 0], axes[0][:, 0] + axes[1][:, 1]).numpy()
        off = (shared.angle - angle + np.pi) % (2 * np.pi) - np.pi
        assert np.degrees(np.abs(off)).max() < 3
        area = torch.sqrt(
            (axes[0][:, 0] * axes[1][:, 1] - axes[0][:, 1] * axes[1][:, 0]).abs()
        ).numpy()
        assert (
            np.abs(np.log(shared.scale / area)).max() < 0.15
        )  # the plane is tilted relative to the camera by some degrees


def test_patches_of_a_track_are_similar_for_any_roll_and_distance(scene):
    settings = PatchSettings(
        per_view=24, position_sigma=0.0, scale_sigma=0.0, symmetric=0.0, scale=(0.75, 1.2)
    )
    items = TrackPatches([scene], nothing, settings, seed=1, length=6)
    for i in range(6):
        item = items[i]
        a, b = (item[key].flatten(1) for key in ("anchor", "positive"))
        a, b = ((x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True) for x in (a, b))
        correlation = (a * b).mean(dim=1)
        others = (a * b.roll(1, 0)).mean(dim=1)
        assert correlation.median() > 0.9
        assert others.median() < 0.4
    assert torch.equal(
        items[2]["positive"],
        TrackPatches([scene], nothing, settings, seed=1, length=6)[2]["positive"],
    )
    with pytest.raises(IndexError):
        items[6]


def test_keypoints_near_a_track_replace_it_in_both_images(world, scene):
    """The detector finds every texture point shifted by a known vector; patches are cut there, not
    at the 3D point.
    """
    _, homographies = world
    a, b = scene.pairs[0]
    shared = scene.shared(a, b)
    found_a = shared.xy_a + np.float32([2.0, -1.0])
    H_ab = homographies[b] @ torch.linalg.inv(homographies[a])
    found_b = warp_points(torch.from_numpy(found_a).double(), H_ab).float().numpy()
    settings = TrackSettings(detected=1.0)
    moved, onto = onto_keypoints(shared, found_a, found_b, settings, np.random.default_rng(0))
    nearest = np.linalg.norm((shared.xy_a + moved)[:, None] - found_a[None], axis=2).min(axis=1)
    assert (np.abs(moved).sum(axis=1) > 0).all()
    assert nearest.max() < 1e-3
    again = np.linalg.norm((shared.xy_b + onto)[:, None] - found_b[None], axis=2).min(axis=1)
    assert np.median(again) < 1e-3
    still, also = onto_keypoints(
        shared, found_a[:0], found_b[:0], settings, np.random.default_rng(0)
    )
    assert not still.any()
    assert not also.any()


def test_crops_show_their_tracks_at_their_positions(scene):
    views = PairSettings(size=128, rotation=20, scale=(0.8, 1.25))
    items = TrackCrops([scene], grid, views, seed=0, length=8, count=60)
    for i in range(8):
        item = items[i]
        positive, negative = item["positive"], item["negative"]
        known = (~item["xy_a"][:, 0].isnan(), ~item["xy_b"][:, 0].isnan())
        rows, columns = positive.nonzero(as_tuple=True)
        assert len(rows) >= 12
        assert not (positive & negative).any()
        assert negative[rows].any(dim=1).all()
        assert known[0][rows].all()
        assert known[1][columns].all()
        # the surroundings of a track are similar in both crops: mean gray values within a few
        # pixels agree
        smooth = [gaussian_blur(item[f"image_{side}"][None], 2.0)[0, 0] for side in "ab"]
        pixels = [xy.round().long() for xy in (item["xy_a"][rows], item["xy_b"][columns])]
        values = [image[at[:, 1], at[:, 0]] for image, at in zip(smooth, pixels, strict=True)]
        assert torch.corrcoef(torch.stack(values))[0, 1] > 0.8
        # candidates that are not tracks are negatives only of tracks
        loose = (~positive.any(dim=1)).nonzero()[:, 0]
        assert not negative[loose][:, (~positive.any(dim=0))].any()


def test_posed_pairs_distinguish_correct_and_incorrect_matches(scene):
    pairs = reconstruction_pairs([scene], 5, seed=0)
    assert len(pairs) == min(5, len(scene.pairs))
    for pair in pairs:
        a, b = (scene.images.index(path) for path in pair.images)
        shared = scene.shared(a, b)
        assert pair.errors(shared.xy_a, shared.xy_b).max() < 0.05
        # moved along the normal of the epipolar line by 4 px, so a little more than the threshold
        moved = np.median(
            [
                pair.errors(shared.xy_a, shared.xy_b + np.float32(4) * direction)
                for direction in np.eye(2, dtype=np.float32)
            ]
        )
        assert moved > 1
        index = torch.arange(len(shared))
        assert (
            correct_share(
                pair,
                torch.from_numpy(shared.xy_a),
                torch.from_numpy(shared.xy_b),
                torch.stack([index, index], 1),
            )
            == 1
        )
        assert (
            correct_share(
                pair, torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int64)
            )
            == 0
        )


def test_models_are_found_and_errors_are_named(world, tmp_path):
    folder, _ = world
    assert find_models(folder) == [(folder / "sparse", folder / "images")]
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_models(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no COLMAP model"):
        find_models(tmp_path)
    broken = tmp_path / "sparse"
    broken.mkdir()
    for name in ("cameras", "images", "points3D"):
        (broken / f"{name}.bin").write_bytes(b"\x07")
    with pytest.raises(DataError, match="not a readable COLMAP model"):
        find_models(tmp_path)
    for path in (folder / "sparse").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="put the photographs"):
        find_models(tmp_path)
    with pytest.raises(DataError, match="share enough"):
        read_scenes(folder, TrackSettings(min_shared=10_000))


def test_an_item_is_found_among_many_unusable_pairs(scene):
    """As in a sparse reconstruction: one pair of hundreds has enough tracks."""

    class Sparse:
        pairs = tuple((0, i) for i in range(1, 500))

    tried = []

    def extract(_, pair, rng):
        tried.append(frozenset(pair))
        return {"anchor": torch.zeros(1)} if 77 in pair else None

    for seed in range(3):
        rng = np.random.default_rng(seed)
        item = _draw_item([Sparse()], extract, rng, "tracks", unreadable_log())
        assert "anchor" in item
    tried.clear()
    with pytest.raises(DataError, match="no pair of images of the reconstructions had tracks"):
        _draw_item(
            [Sparse()], lambda _, pair, rng: tried.append(pair), rng, "tracks", unreadable_log()
        )
    assert len({frozenset(pair) for pair in tried}) == 499


def test_scenes_without_images(world):
    folder, _ = world
    (every,) = read_scenes(folder, CLEAN)
    held_out = every.images[1].resolve()
    (kept,) = read_scenes(folder, CLEAN, excluded={held_out})
    assert kept.pairs == [pair for pair in every.pairs if 1 not in pair]
    assert len(kept.pairs) < len(every.pairs)


def test_text_models_equal_binary_ones(world, tmp_path):
    folder, _ = world
    (tmp_path / "model").mkdir()
    pycolmap.Reconstruction(str(folder / "sparse")).write_text(str(tmp_path / "model"))
    (tmp_path / "images").symlink_to(folder / "images")
    ((model, images),) = find_models(tmp_path)
    text, binary = (
        read_scene(model, images, CLEAN),
        read_scene(folder / "sparse", folder / "images", CLEAN),
    )
    assert text.pairs == binary.pairs
    for one, two in ((text.shared(0, 1), binary.shared(0, 1)),):
        np.testing.assert_allclose(one.xy_a, two.xy_a, atol=1e-4)
        np.testing.assert_allclose(one.scale, two.scale, rtol=1e-6)


def test_patches_sampled_on_the_device_are_those_of_the_tracks(world, scene):
    settings = PatchSettings(
        per_view=24, position_sigma=0.0, scale_sigma=0.0, symmetric=0.0, scale=(0.75, 1.2)
    )
    sampler = PatchSampler(
        [scene.images[0]],
        [scene],
        grid,
        torch.device("cpu"),
        views=4,
        share=1.0,
        settings=settings,
        length=4,
    )
    for item in sampler:
        a, b = (item[key].flatten(1) for key in ("anchor", "positive"))
        a, b = ((x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True) for x in (a, b))
        assert (a * b).mean(dim=1).median() > 0.9
        assert (a * b.roll(1, 0)).mean(dim=1).median() < 0.4


def test_crops_sampled_on_the_device_are_those_of_the_tracks(scene):
    views = PairSettings(size=128, scale=(0.9, 1.1), rotation=10.0, color=0.0)
    sampler = CropSampler(
        *([scene.images[0]], [scene], load("sobelnet"), torch.device("cpu")),
        views=4,
        share=1.0,
        warps=views,
        count=60,
        length=3,
    )
    enough = 0
    for item in sampler:
        for i in range(4):
            positive, negative = item["positive"][i], item["negative"][i]
            rows, columns = positive.nonzero(as_tuple=True)
            assert torch.equal(rows, columns)  # tracks are first, in the same order
            assert not (positive & negative).any()
            known = [~item[f"xy_{side}"][i][:, 0].isnan() for side in "ab"]
            assert known[0][rows].all()
            assert known[1][columns].all()
            loose = (~positive.any(dim=1)).nonzero()[:, 0]
            assert not negative[loose][:, ~positive.any(dim=0)].any()
            if len(rows) < 12:
                continue
            enough += 1
            assert negative[rows][:, known[1]].any(dim=1).all()
            values = []
            for side in "ab":
                smooth = gaussian_blur(item[f"image_{side}"][i : i + 1], 2.0)[0, 0]
                at = item[f"xy_{side}"][i][rows].round().long()
                values.append(smooth[at[:, 1], at[:, 0]])
            assert torch.corrcoef(torch.stack(values))[0, 1] > 0.8
    assert enough >= 6


def test_scenes_without_readable_images_are_not_drawn_on_the_device(world, scene, tmp_path):
    gone = read_scene(world[0] / "sparse", world[0] / "images", CLEAN)
    gone.images = [tmp_path / path.name for path in gone.images]
    arguments = [scene.images[0]], [gone], grid, torch.device("cpu")
    sampler = PatchSampler(*arguments, views=2, share=1.0)
    assert sampler.tracks is None
    assert len(sampler[0]["anchor"]) > 2  # warps of the photograph


def test_packed_reconstruction_equals_the_model(world, scene, tmp_path, monkeypatch):
    pack_scene(scene, tmp_path / "packed")
    monkeypatch.setitem(sys.modules, "pycolmap", None)  # as without COLMAP
    (packed,) = read_scenes([tmp_path], CLEAN)
    assert packed.pairs == scene.pairs
    one, two = packed.shared(0, 1), scene.shared(0, 1)
    np.testing.assert_allclose(one.xy_b, two.xy_b)
    np.testing.assert_allclose(one.angle, two.angle)
    xy = np.array([[0.0, 0.0], [319.0, 239.0], [101.3, 57.9]])
    np.testing.assert_allclose(packed.cameras[0](xy), scene.cameras[0](xy), atol=1e-6)
    check = PosedCheck([packed], "keynet-tiny")
    assert check.patches(load("hardnet").fused()) > 0.1
    (tmp_path / "packed" / "tracks.npz").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match="pack it again"):
        read_scenes([tmp_path])


def test_image_cache_is_least_recently_used(world):
    paths = [world[0] / "images" / f"{number}.png" for number in (1, 2, 3)]
    looked_at = []

    def detect(image):
        looked_at.append(image)
        return torch.zeros(0, 2)

    cache = ImageCache(pixels=2 * WIDTH * HEIGHT)
    for path in (*paths[:2], paths[0]):
        cache.get(path, detect)
    assert len(looked_at) == 2
    cache.get(paths[2], detect)  # the second one is removed
    cache.get(paths[0], detect)
    assert len(looked_at) == 3
    cache.get(paths[1], detect)
    assert len(looked_at) == 4
    assert ImageCache(pixels=1).get(paths[0], detect)[0].image.shape == (
        1,
        1,
        HEIGHT,
        WIDTH,
    )  # at least one is kept


class Numbers(Dataset):
    def __init__(self, factor):
        self.factor = factor

    def __len__(self):
        return 2000

    def __getitem__(self, index):
        return {"x": torch.tensor(self.factor * (index + 1))}


def test_mixture_draws_by_index():
    mixture = Mixture(Numbers(1), Numbers(-1), 0.25, seed=5)
    values = torch.stack([mixture[i]["x"] for i in range(2000)])
    assert torch.equal(values.abs(), torch.arange(1, 2001))
    assert 0.2 < float((values < 0).float().mean()) < 0.3
    with pytest.raises(ValueError, match="share"):
        Mixture(Numbers(1), Numbers(-1), 1.5)


def test_descriptors_train_on_a_reconstruction(world, tmp_path, caplog):
    folder, _ = world
    caplog.set_level(logging.INFO, logger="tiepoints")
    options = {"steps": 2, "batch_size": 4, "validate_every": 1, "warmup": 0}
    options["run"] = RunOptions("cpu", workers=0, progress=False)
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        coarse.resize((400, 400), Image.Resampling.BICUBIC).save(photos / f"{i}.png")
    held_out = shutil.copytree(folder, tmp_path / "held out")
    data = TrainData(
        photos,
        validation=[held_out / "images"],
        reconstructions=[folder],
        validation_reconstructions=[held_out],
    )
    result = train("hardnet", data, tmp_path / "h.safetensors", **options)
    assert 0 < result.best <= 1
    assert "pairs of views" in caplog.text
    result = train("desnet", data, tmp_path / "d.safetensors", network={"width": 2}, **options)
    assert 0 < result.best <= 1
    assert load(tmp_path / "d.safetensors").settings == {"dim": 128, "width": 2}
    # images of the reconstructions for validation are not trained on
    shutil.copy(photos / "0.png", held_out / "images")
    mixed = TrainData([photos, held_out / "images"], validation_reconstructions=[held_out])
    training, validation = mixed.photographs()
    known = {path.resolve() for path in (held_out / "images").iterdir()}
    trained = {path.resolve() for path in training}
    assert {path.name for path in trained & known} <= {"0.png"}  # of no reconstruction
    assert len(training) + len(validation) < len(find_photos([photos, held_out / "images"]))
    assert "are of the reconstructions for validation and not trained on" in caplog.text
    (tmp_path / "empty").mkdir()
    for wrong, error, message in (
        (
            TrainData(folder / "images", validation=[photos], validation_reconstructions=[folder]),
            DataError,
            "all images are of the reconstructions for validation",
        ),
        (TrainData(photos, validation=[photos]), DataError, "disjoint"),
        (
            TrainData(photos, validation=[folder / "images"], reconstructions=[folder]),
            DataError,
            "for validation",
        ),
        (TrainData(photos, validation=[tmp_path / "empty"]), DataError, "no usable images in"),
        (
            TrainData(photos, reconstructions=[folder], validation_reconstructions=[folder]),
            DataError,
            "other reconstructions",
        ),
        (
            TrainData(photos, patches=tmp_path, reconstructions=[folder]),
            ValueError,
            "exclude each other",
        ),
    ):
        with pytest.raises(error, match=message):
            train("hardnet", wrong, tmp_path / "x.safetensors", **options)
    with pytest.raises(ValueError, match="width must be"):
        train("desnet", photos, tmp_path / "x.safetensors", network={"width": 0}, **options)
    with pytest.raises(ValueError, match="width is an option of desnet"):
        train("hardnet", photos, tmp_path / "x.safetensors", network={"width": 2}, **options)


def test_validation_on_a_reconstruction_prefers_distinctive_descriptors(world):
    scenes = read_scenes(world[0], CLEAN)
    check = PosedCheck(scenes, "keynet-tiny")
    generator = torch.Generator().manual_seed(0)
    by_chance = check.patches(
        lambda patches: torch.nn.functional.normalize(
            torch.rand(len(patches), 8, generator=generator), dim=1
        )
    )
    by_hardnet = check.patches(load("hardnet").fused())
    assert by_hardnet > 3 * by_chance


def test_candidate_loss_accepts_tracks(scene):
    views = PairSettings(size=128, rotation=0, scale=(1.0, 1.0))
    items = TrackCrops([scene], grid, views, seed=0, length=2, count=60)
    batch = torch.utils.data.default_collate([items[0], items[1]])
    loss, numbers = candidate_loss(load("desnet").train(), batch)
    assert numbers["rows"] >= 24
    loss.backward()
