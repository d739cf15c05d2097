"""Features travel: to arrays, files and devices; short representations."""

import numpy as np
import pytest
import torch

from tiepoints.errors import DataError
from tiepoints.structs import Estimate, Features, Keypoints, Matches


@pytest.fixture
def features() -> Features:
    rng = torch.Generator().manual_seed(0)
    columns = (torch.rand(5, *shape, generator=rng) for shape in ((2,), (), (), ()))
    return Features(Keypoints(*columns), torch.rand(5, 16, generator=rng), (64, 48))


@pytest.mark.parametrize("described", [True, False])
def test_features_are_the_same_after_saving_and_loading(features, described, tmp_path):
    if not described:
        features = Features(features.keypoints, None, features.image_size)
    features.save(tmp_path / "deep" / "f.npz")
    again = Features.load(tmp_path / "deep" / "f.npz")
    assert again.image_size == (64, 48)
    for name, array in features.numpy().items():
        np.testing.assert_array_equal(again.numpy()[name], array)
    assert (again.descriptors is not None) == described
    assert torch.equal(features.to("cpu").xy, features.xy)


def test_files_that_hold_no_features_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Features.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no features")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("text.npz", "other.npz", "array.npy"):
        with pytest.raises(DataError, match="no features written by"):
            Features.load(tmp_path / name)


def test_representations_are_short(features):
    assert repr(features) == "Features(5 keypoints, descriptors of dimension 16, image 64 x 48)"
    assert repr(features.keypoints) == "Keypoints(5)"
    matches = Matches(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3))
    assert repr(matches) == "Matches(3)"
    inliers = torch.tensor([True, False, True])
    estimate = Estimate("homography", torch.eye(3), inliers, True)
    assert repr(estimate) == "Estimate(homography, 2 of 3 inliers)"
