"""Features equal the stored outputs: a change of the code must not change them."""

import numpy as np
import pytest

from record_outputs import CASES, FILE, features


@pytest.mark.parametrize("name", CASES)
def test_features_equal_the_stored_ones(name):
    """Equal up to rounding on another processor."""
    with np.load(FILE) as content:
        stored = {key: content[key] for key in content.files if key.startswith(f"{name}.")}
    found = {f"{name}.{key}": array for key, array in features(name).items()}
    assert found.keys() == stored.keys()
    for key, array in found.items():
        assert array.shape == stored[key].shape
        np.testing.assert_allclose(array, stored[key], rtol=1e-3, atol=2e-3)
