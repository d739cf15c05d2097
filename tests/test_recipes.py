"""Recipes: settings of each network in training; descriptors trained from photographs and from
published patches.
"""

import csv
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from tiepoints import build, load
from tiepoints.datasets.candidates import CandidatePairs, candidate_pairs
from tiepoints.datasets.pairs import write_pairs
from tiepoints.datasets.synthetic import PairDataset, PairSettings, list_photos
from tiepoints.errors import DataError, WeightsError
from tiepoints.keypoints import local_maxima
from tiepoints.models.desnet import DesNet
from tiepoints.models.keynet import KeyNet
from tiepoints.models.patchnets import (
    PARTS,
    SHARES,
    HardNet,
    HardNetContext,
    HardNetLight,
    HyNet,
    SOSNet,
    parts_of,
    unit,
)
from tiepoints.models.rekd import REKD
from tiepoints.models.sobelnet import SobelNet
from tiepoints.training import loop, recipes
from tiepoints.training.loop import RunOptions
from tiepoints.training.losses import hardnet_loss
from tiepoints.training.recipes import TrainData
from tiepoints.training.recipes.common import load_partial_state_dict
from tiepoints.training.recipes.descriptors import (
    candidate_loss,
    context_loss,
    descriptor_loss,
    open_patches,
    taught_loss,
)
from tiepoints.training.recipes.detectors import floored_tiny, local_max_weight
from tiepoints.weights import save


def test_tiny_in_training_scores_constant_images_zero() -> None:
    torch.manual_seed(1)
    net, plain = floored_tiny(), KeyNet.tiny()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    images = torch.rand(4, 1, 40, 40)
    for _ in range(5):
        optimiser.zero_grad()
        (net(images) - 1).square().mean().backward()
        optimiser.step()
    plain.load_state_dict(net.state_dict())
    net.eval(), plain.eval()
    with torch.no_grad():
        assert net(images).max() > 0.01
        torch.testing.assert_close(net(images), plain(images))
        assert plain(torch.full((1, 1, 20, 20), 0.4)).abs().max() == 0


def test_tiny_trains_from_weights_with_offsets(photos, tmp_path) -> None:
    """The written network is that which was trained, which has no offsets."""
    start = KeyNet.tiny()
    block = start.blocks[0]
    block[1].running_mean.fill_(0.2)
    block[1].bias.data.fill_(0.1)
    save(start, tmp_path / "start.safetensors")
    train(
        "keynet-tiny",
        photos,
        tmp_path / "t.safetensors",
        init=tmp_path / "start.safetensors",
        steps=1,
        num_training_data=4,
    )
    net = load(tmp_path / "t.safetensors")
    with torch.no_grad():
        assert net(torch.full((1, 1, 20, 20), 0.4)).abs().max() == 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (36, 44, 3), dtype=np.uint8))
        coarse.resize((330, 270), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """A PhotoTour set of one mosaic: 64 points of four patches each, brighter or darker."""
    folder = tmp_path_factory.mktemp("tours") / "liberty"
    folder.mkdir()
    rng = np.random.default_rng(1)
    tiles = []
    for _ in range(64):
        coarse = Image.fromarray(rng.integers(60, 196, (8, 8), dtype=np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        tiles += [np.asarray(coarse).astype(float) + offset for offset in (-40, -10, 10, 40)]
    mosaic = np.stack(tiles).reshape(16, 16, 64, 64).transpose(0, 2, 1, 3).reshape(1024, 1024)
    Image.fromarray(mosaic.clip(0, 255).astype(np.uint8)).save(folder / "patches0000.bmp")
    (folder / "info.txt").write_text("".join(f"{i // 4} 0\n" for i in range(256)))
    return folder


@contextmanager
def broken_off(monkeypatch, step):
    """A training started in this context is stopped before ``step``, as by a kill."""

    class Killed(Exception):
        pass

    original = loop.learning_rate_at

    def rate(at, total, settings):
        if at == step:
            raise Killed
        return original(at, total, settings)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate_at", rate)
        with pytest.raises(Killed):
            yield


def train(name, photos, out, **options):
    """``recipes.train`` with few steps and without output, with options as keyword arguments."""
    options = {"steps": 2, "batch_size": 2, "validate_every": 2, **options}

    def taken(*names):
        return {key: options.pop(key) for key in names if key in options}

    run = RunOptions("cpu", progress=False, workers=0, **taken("resume", "save_every"))
    data = TrainData(
        photos, **taken("pairs", "patches", "reconstructions", "validation_reconstructions")
    )
    network = taken(
        "group_size", "dims", "detector", "dim", "width", "teacher", "num_training_data"
    )
    return recipes.train(name, data, out, run=run, network=network, **options)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("hardnet", HardNet),
        ("hardnet-context", HardNetContext),
        ("hynet", HyNet),
        ("sosnet", SOSNet),
    ],
)
def test_each_descriptor_trains_and_its_file_can_be_used(model, kind, photos, tmp_path):
    out = tmp_path / f"{model}.safetensors"
    result = train(model, photos, out)
    assert result.steps == 2
    assert 0 < result.best <= 1
    assert out.stat().st_size < 3_000_000  # half precision
    net = load(out)
    assert type(net) is kind
    assert all(value.dtype == torch.float32 for value in net.parameters())
    features = build("keynet-tiny", str(out), num_keypoints=50, device="cpu").extract(
        photos / "0.png"
    )
    assert features.descriptors.shape == (len(features), 128)
    with open(out.with_name(out.name + ".log") / "log.csv") as file:
        assert float(list(csv.DictReader(file))[-1]["matching"]) == pytest.approx(
            result.best, abs=1e-4
        )


def test_resumed_training_ends_at_the_same_weights(photos, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    train("hardnet", photos, whole, steps=4)

    with broken_off(monkeypatch, 3):
        train("hardnet", photos, broken, steps=4, save_every=0.0)
    train("hardnet", photos, broken, steps=4, resume=True)
    one, two = load(whole).state_dict(), load(broken).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_training_on_published_patches(photos, tour, tmp_path):
    assert len(open_patches(tour)) == len(open_patches(tour.parent)) == 1
    out = tmp_path / "tour.safetensors"
    with pytest.raises(DataError, match="64 points"):  # a published batch holds 1,024
        train("hardnet", photos, out, patches=tour)
    with pytest.raises(ValueError, match="published patches"):
        train("hardnet", photos, out, preset="paper")
    with pytest.raises(ValueError, match="hardnet-context sees the surroundings of patches"):
        train("hardnet-context", photos, out, patches=tour)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train("hardnet", photos, out, patches="nowhere")


def test_hynet_loss_depends_on_lengths():
    """Its regularization needs descriptors before normalization: scaling the last layer of one
    branch must change the loss.
    """
    torch.manual_seed(0)
    net = HyNet().train()
    both = torch.rand(12, 1, 32, 32)
    assert "drift" in descriptor_loss("hynet", net, both)[1]
    assert "second" in descriptor_loss("sosnet", SOSNet().train(), both)[1]


@pytest.mark.parametrize(("name", "kind"), [("hardnet-light", HardNetLight), ("hynet", HyNet)])
def test_loss_with_a_teacher(name, kind):
    """At the teacher's descriptors only the loss of the network remains; elsewhere, the mean
    squared distance is added.
    """
    torch.manual_seed(0)
    net, both = kind(dropout=0.0).train(), torch.rand(12, 1, 32, 32)
    alone = descriptor_loss(name, net, both)[0]
    own = net(both).detach()
    torch.testing.assert_close(taught_loss(name, net, both, own, 5.0)[0], alone)
    value, metrics = taught_loss(name, net, both, -own, 5.0)
    assert metrics["distance"] == pytest.approx(4, abs=1e-4)  # opposite unit vectors
    torch.testing.assert_close(value, alone + 20, atol=1e-3, rtol=0)


def test_loss_with_surroundings():
    sizes = zip(SHARES, PARTS, strict=True)
    vectors = torch.cat([s**0.5 * unit(torch.randn(8, d)) for s, d in sizes], dim=1)
    same = parts_of(vectors)
    alone = hardnet_loss(*vectors.chunk(2))[0]
    torch.testing.assert_close(context_loss(vectors, same, 5.0)[0], alone)
    # cosines of opposite vectors are the same; of constant ones all 1
    torch.testing.assert_close(context_loss(vectors, [-part for part in same], 5.0)[0], alone)
    constant = [torch.ones(8, 1) for _ in same]
    expected = torch.stack([(part @ part.T - 1).square().mean() for part in same]).mean()
    value, metrics = context_loss(vectors, constant, 5.0)
    torch.testing.assert_close(value, alone + 5 * expected)
    assert metrics["difference"] == pytest.approx(float(expected))


def test_training_with_a_teacher_uses_stored_patches(photos, tmp_path, monkeypatch):
    out = tmp_path / "light.safetensors"
    options = {"num_training_data": 3, "batch_size": 2, "validate_every": 2}
    train("hardnet-light", photos, out, steps=4, **options)
    assert isinstance(load(out), HardNetLight)
    folder = tmp_path / "light.safetensors.pairs"
    patches, targets = (np.load(folder / f"{name}.npy") for name in ("patches", "targets"))
    assert patches.shape == (3, 2, 48, 1, 32, 32)
    expected = load("hardnet")(torch.from_numpy(patches[1, 1]).float() / 255)
    found = torch.from_numpy(targets[1, 1]).float()
    assert (found * expected).sum(dim=1).min() > 0.999  # bfloat16 on some processors
    # a resumed training reads the same files and ends at the same weights
    broken = tmp_path / "broken.safetensors"
    with broken_off(monkeypatch, 3):
        train("hardnet-light", photos, broken, steps=4, save_every=0.0, **options)
    before = [p.stat().st_mtime_ns for p in (broken.parent / f"{broken.name}.pairs").iterdir()]
    train("hardnet-light", photos, broken, steps=4, resume=True, **options)
    after = [p.stat().st_mtime_ns for p in (broken.parent / f"{broken.name}.pairs").iterdir()]
    assert before == after
    one, two = load(out).state_dict(), load(broken).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(WeightsError, match="teacher was"):
        train("hardnet-light", photos, broken, steps=4, resume=True, teacher="sosnet", **options)
    with pytest.raises(ValueError, match="teacher must be a patch descriptor; keynet"):
        train("hardnet-light", photos, tmp_path / "no.safetensors", teacher="keynet", **options)
    with pytest.raises(ValueError, match=r"teacher must not see .* as hardnet-context does"):
        train("hardnet-light", photos, tmp_path / "no.safetensors", teacher="hardnet-context")
    for teacher in ("hardnet", "none"):
        with pytest.raises(ValueError, match="takes the layers of its teacher"):
            train("hardnet-context", photos, tmp_path / "no.safetensors", teacher=teacher)
    with pytest.raises(ValueError, match="hardnet-light has no preset paper"):
        train("hardnet-light", photos, tmp_path / "no.safetensors", preset="paper")


def test_initial_weights(tmp_path):
    hardnet, sosnet, hynet = HardNet(), SOSNet(), HyNet()
    assert load_partial_state_dict(sosnet, hardnet, "x") == len(hardnet.state_dict())
    assert torch.equal(sosnet.convolutions[3].weight, hardnet.convolutions[3].weight)
    assert load_partial_state_dict(hynet, hardnet, "x") == 7  # only the filters
    with pytest.raises(WeightsError, match="no layer in common"):
        load_partial_state_dict(hardnet, KeyNet(), "keynet")


def test_invalid_descriptors_are_named(photos, tmp_path):
    with pytest.raises(ValueError, match="network must be one of keynet"):
        train("softnet", photos, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="preset must be"):
        train("hardnet", photos, tmp_path / "x.safetensors", preset="fast")
    with pytest.raises(ValueError, match=r"descriptor must be one of hardnet.*'surf'"):
        build("keynet-tiny", "surf")
    save(KeyNet(), tmp_path / "detector.safetensors")
    with pytest.raises(ValueError, match="has no descriptors"):
        build("keynet-tiny", str(tmp_path / "detector.safetensors"))
    with pytest.raises(ValueError, match="precision must be"):
        build("keynet-tiny", "rootsift", precision="half")


REKD_TINY = {
    "dims": (1, 1, 1),
    "batch_size": 2,
    "validate_every": 2,
}


def test_rekd_trains_resumes_and_initializes_another_group(photos, tmp_path, monkeypatch):
    whole = train(
        "rekd-light", photos, tmp_path / "whole.safetensors", group_size=4, steps=4, **REKD_TINY
    )
    assert whole.steps == 4
    with (tmp_path / "whole.safetensors.log" / "log.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    assert {"orientation", "agree", "location"} <= set(row)

    part = {"group_size": 4, "steps": 4, "save_every": 0.0, **REKD_TINY}
    with broken_off(monkeypatch, 2):
        train("rekd-light", photos, tmp_path / "part.safetensors", **part)
    train("rekd-light", photos, tmp_path / "part.safetensors", resume=True, **part)
    one, other = (load(tmp_path / f"{name}.safetensors") for name in ("whole", "part"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert isinstance(one, REKD)
    assert one.settings["dims"] == [1, 1, 1]

    init = {"init": tmp_path / "whole.safetensors", "steps": 1, **REKD_TINY}
    train("rekd", photos, tmp_path / "large.safetensors", group_size=8, **init)
    assert load(tmp_path / "large.safetensors").settings["group"] == 8
    with pytest.raises(WeightsError, match="dims"):
        train("rekd", photos, tmp_path / "no.safetensors", **{**init, "dims": (2, 2, 2)})
    with pytest.raises(WeightsError, match="KeyNet"):
        train("rekd", photos, tmp_path / "no.safetensors", **{**init, "init": "keynet"})
    features = build(one, "none", single_scale=True, num_keypoints=20, device="cpu").extract(
        photos / "0.png"
    )
    assert len(features) > 0


def test_rekd_training_on_one_pair_converges():
    """Thirty steps reduce both losses, with the same curve for the same seed."""
    from tiepoints.training.losses import msip_loss, orientation_loss

    rng = torch.Generator().manual_seed(0)
    image = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 100, 100, generator=rng), 5, 1)
    image = (image - image.min()) / (image.max() - image.min())
    both = torch.cat([image, image.rot90(1, (-2, -1))])
    H = torch.tensor([[[0.0, 1, 0], [-1, 0, 95], [0, 0, 1]]])  # counterclockwise
    curves = []
    for _ in range(2):
        torch.manual_seed(3)
        net = REKD(group=4, dims=(1, 1, 1))
        with torch.no_grad():
            net.orientation.coefficients.mul_(0.1)  # start with a uniform histogram
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        curve = []
        for _ in range(30):
            score, histogram = net(both)
            detection = msip_loss(score[:1], score[1:], H, windows=(8,), weights=(1.0,))[0]
            orientation = orientation_loss(histogram[:1], histogram[1:], H, border=4)[0]
            optimizer.zero_grad()
            (detection + 100 * orientation).backward()
            optimizer.step()
            curve.append((detection.item(), orientation.item()))
        curves.append(curve)
    assert curves[0] == curves[1]
    first, last = (np.mean(part, axis=0) for part in (curves[0][:3], curves[0][-3:]))
    assert (last < 0.9 * first).all()


def test_orientation_loss_is_evaluated_at_keypoints():
    score = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    weight = local_max_weight(score)
    assert weight.max() == 1
    assert (weight == 1).sum() == local_maxima(score, shape="round").sum()
    assert weight.mean() < 0.5


def test_rekd_keeps_the_settings_of_initial_weights(photos, tmp_path):
    published = REKD(group=4, dims=(1, 1, 1), variant="published", input_range=1.0).eval()
    save(published, tmp_path / "start.safetensors")
    options = {**REKD_TINY, "dims": None, "init": tmp_path / "start.safetensors", "steps": 1}
    train("rekd", photos, tmp_path / "more.safetensors", group_size=8, **options)
    assert load(tmp_path / "more.safetensors").settings == {**published.settings, "group": 8}


def test_rekd_rejects_mirrored_pairs(photos, tmp_path):
    settings = PairSettings(size=96, mirror=0.5, rotation=20, scale=(1, 1))
    write_pairs(tmp_path / "pairs.safetensors", list_photos(photos), settings, 8, seed=0)
    with pytest.raises(ValueError, match="mirrored"):
        train(
            "rekd",
            photos,
            tmp_path / "no.safetensors",
            group_size=4,
            pairs=tmp_path / "pairs.safetensors",
            steps=4,
            **REKD_TINY,
        )


DETECTOR_TINY = {"steps": 2, "batch_size": 2, "validate_every": 2}


def test_sobelnet_trains_with_both_losses(photos, tmp_path):
    seen = {}
    for preset in ("default", "msip"):
        out = tmp_path / f"{preset}.safetensors"
        result = train("sobelnet", photos, out, preset=preset, **DETECTOR_TINY)
        assert isinstance(load(out), SobelNet)
        assert result.best > 0
        with open(out.with_name(out.name + ".log") / "log.csv") as file:
            seen[preset] = next(csv.DictReader(file))
    assert {"shape", "alone"} <= seen["default"].keys()
    assert "loss_8" in seen["msip"]
    features = build(
        load(tmp_path / "default.safetensors"), None, num_keypoints=40, device="cpu"
    ).extract(photos / "0.png")
    assert len(features) == 40


def test_candidates_are_visible_in_both_views(photos):
    def everywhere(view):
        axis = torch.arange(4.0, view.shape[-1], 8)
        return torch.cartesian_prod(axis, axis)

    views = PairSettings(size=96, rotation=40, min_overlap=0.2)
    items = CandidatePairs(list_photos(photos), everywhere, views, seed=5, length=6, count=120)
    pairs = PairDataset(list_photos(photos), views, seed=5, length=6)
    fewer = 0
    for i in range(6):
        item, pair = items[i], pairs[i]
        assert torch.equal(item["image_a"], pair["image_a"])
        for side in ("a", "b"):
            xy = item[f"xy_{side}"]
            known = xy[~xy.isnan().any(dim=1)]
            assert xy.shape == (120, 2)
            fewer += len(known) < 120
            assert (pair[f"mask_{side}"][0, known[:, 1].long(), known[:, 0].long()] > 0).all()
    assert fewer > 0


def test_candidate_loss_is_lowest_for_correct_pairs():
    """A network whose map distinguishes pixels by their content: correct pairs have smaller
    distances, and a lower loss.
    """
    torch.manual_seed(0)
    image = torch.nn.functional.interpolate(
        torch.rand(2, 1, 24, 24), scale_factor=8, mode="bicubic"
    )
    xy = torch.rand(2, 30, 2) * 120 + 36
    xy[1, 20:] = float("nan")
    same, other = (
        torch.stack(each)
        for each in zip(*(candidate_pairs(one, one, torch.eye(3)) for one in xy), strict=True)
    )
    batch = {
        "image_a": image,
        "image_b": image,
        "xy_a": xy,
        "xy_b": xy,
        "positive": same,
        "negative": other,
    }
    net = DesNet().eval()
    same, numbers = candidate_loss(net, batch)
    assert numbers["rows"] == 50
    assert numbers["positive"] == pytest.approx(1, abs=1e-5)
    wrong, _ = candidate_loss(net, {**batch, "image_b": image.flip(0)})
    assert wrong > same


def test_desnet_trains_resumes_and_its_file_can_be_used(photos, tmp_path, monkeypatch):
    options = {
        **DETECTOR_TINY,
        "detector": "keynet-tiny",
        "dim": 64,
        "steps": 3,
        "validate_every": 1,
    }
    whole = train("desnet", photos, tmp_path / "whole.safetensors", **options)
    assert 0 < whole.best <= 1

    part = {**options, "save_every": 0.0}
    with broken_off(monkeypatch, 2):
        train("desnet", photos, tmp_path / "part.safetensors", **part)
    again = train("desnet", photos, tmp_path / "part.safetensors", resume=True, **part)
    assert again.best == whole.best
    one, two = (
        load(tmp_path / "whole.safetensors").state_dict(),
        load(tmp_path / "part.safetensors").state_dict(),
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    features = build(
        "keynet-tiny", str(tmp_path / "whole.safetensors"), num_keypoints=40, device="cpu"
    ).extract(photos / "0.png")
    assert features.descriptors.shape == (len(features), 64)
    with pytest.raises(ValueError, match="candidates are found by"):
        train("desnet", photos, tmp_path / "x.safetensors", **{**options, "detector": "hardnet"})


def test_light_detector_starts_from_one_with_several_levels(photos, tmp_path):
    output = tmp_path / "light.safetensors"
    options = {**DETECTOR_TINY, "learning_rate": 0.0}
    train("keynet-light", photos, output, init="keynet", **options)
    trained, merged = load(output), load("keynet").one_level()
    assert trained.num_levels == 1
    assert trained.settings["structure"] == 0.25
    assert torch.allclose(trained.last.weight, merged.last.weight)


def test_detector_starts_from_initial_weights(photos, tmp_path):
    """A learning rate of zero: the result equals the initial weights, with the structure of the
    recipe.
    """
    torch.manual_seed(5)
    first = KeyNet()
    save(first, tmp_path / "first.safetensors", {})
    still = {"init": tmp_path / "first.safetensors", "learning_rate": 1e-30, "average": 0.0}
    train("keynet", photos, tmp_path / "next.safetensors", **still, **DETECTOR_TINY)
    found = load(tmp_path / "next.safetensors")
    assert found.settings["structure"] == 0.25
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, dict(first.named_parameters())[name])
    with pytest.raises(WeightsError, match="other layers"):
        train("keynet", photos, tmp_path / "x.safetensors", init="keynet-tiny", **DETECTOR_TINY)
