"""Pairs of views drawn on the training device: candidates, labels, and the training on them."""

import dataclasses

import pytest
import torch

from helpers import write_photos
from tiepoints.datasets.candidates import NEGATIVE_DISTANCE
from tiepoints.datasets.crop_sampler import CropSampler
from tiepoints.datasets.synthetic import PRESETS, PairSettings, list_photos
from tiepoints.filters import gaussian_blur
from tiepoints.training.loop import RunOptions
from tiepoints.training.recipes import TrainData, train
from tiepoints.weights import load

CPU = torch.device("cpu")
#: Geometry without changes in light.
WARPS = PairSettings(
    size=128, scale=(0.7, 1.4), rotation=60.0, skew=0.3, perspective=0.3, jitter=9.0, color=0.0
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return list_photos(write_photos(tmp_path_factory.mktemp("photos")))


def sampler(photos, warps=WARPS, **options):
    settings = {"views": 4, "count": 60, "length": 3, **options}
    return CropSampler(photos, [], load("sobelnet"), CPU, warps=warps, **settings)


def correlation(item, i):
    """Of the mean gray values around the candidates of positive pairs."""
    rows, columns = item["positive"][i].nonzero(as_tuple=True)
    values = []
    for side, index in (("a", rows), ("b", columns)):
        smooth = gaussian_blur(item[f"image_{side}"][i : i + 1], 1.5)[0, 0]
        at = item[f"xy_{side}"][i][index].round().long()
        values.append(smooth[at[:, 1], at[:, 0]])
    return float(torch.corrcoef(torch.stack(values))[0, 1])


def test_positive_candidates_show_the_same_location(photos):
    found = []
    for item in sampler(photos):
        assert item["image_a"].shape == (4, 1, 128, 128)
        assert item["xy_b"].shape == (4, 60, 2)
        for i in range(4):
            assert not (item["positive"][i] & item["negative"][i]).any()
            if item["positive"][i].sum() >= 10:
                found.append(correlation(item, i))
    assert len(found) >= 6
    assert min(found) > 0.8


def test_without_changes_both_views_and_their_candidates_are_equal(photos):
    still = PairSettings(size=96, scale=(1.0, 1.0), rotation=0.0, skew=0.0, color=0.0)
    item = sampler(photos, still)[0]
    assert torch.allclose(item["image_a"], item["image_b"], atol=1 / 254)
    a, b = item["xy_a"].nan_to_num(-1), item["xy_b"].nan_to_num(-1)
    assert torch.allclose(a, b, atol=0.1)
    known = ~item["xy_a"][..., 0].isnan()
    assert known.sum() > 20
    assert torch.equal(item["positive"].diagonal(dim1=1, dim2=2), known)
    distance = torch.cdist(item["xy_a"], item["xy_a"])
    assert item["negative"][distance > NEGATIVE_DISTANCE + 0.1].all()
    assert not item["negative"][distance < NEGATIVE_DISTANCE - 0.1].any()


def test_covered_locations_are_no_candidates(photos):
    covered = dataclasses.replace(WARPS, layers=1.0, rotation=0.0, perspective=0.0, skew=0.0)
    plain = dataclasses.replace(covered, layers=0.0)
    found = []
    for warps in (covered, plain):
        items = list(sampler(photos, warps, seed=2))
        found.append(sum(int(item["positive"].sum()) for item in items))
        scores = [correlation(item, i) for item in items for i in range(4)]
        assert min(s for s in scores if s == s) > 0.6  # NaN: too few
    assert 0 < found[0] < found[1]


def test_a_batch_depends_only_on_seed_and_index(photos):
    one, two = (sampler(photos, PRESETS["dense-upright"], views=2, length=9) for _ in range(2))
    assert torch.equal(one[5]["image_b"], two.with_length(6)[5]["image_b"])
    assert not torch.equal(one[5]["image_a"], one[4]["image_a"])
    with pytest.raises(IndexError, match="batch 6 of 6"):
        two.with_length(6)[6]


def test_training_draws_on_the_device(tmp_path, photos):
    output = tmp_path / "mine.safetensors"
    result = train(
        "desnet",
        TrainData(images=photos[0].parent),
        output,
        run=RunOptions(device="cpu", progress=False),
        network={"on_device": True, "dim": 64},
        steps=2,
        batch_size=2,
        validate_every=2,
    )
    assert result.steps == 2
    assert load(output).dim == 64
