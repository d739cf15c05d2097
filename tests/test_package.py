"""The files of the package."""

import re
from pathlib import Path

import pytest

import tiepoints

DATA = sorted((Path(tiepoints.__file__).parent / "data").iterdir())
#: Absolute paths of files, which tell something about the machine that wrote them.
PATHS = re.compile(rb"/(?:home|root|tmp|work|usr|opt|Users)/[\w.-]")


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.name)
def test_weights_and_graphs_contain_no_paths(path):
    assert not PATHS.findall(path.read_bytes())
