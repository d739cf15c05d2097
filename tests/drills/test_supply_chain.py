"""Pinned versions and hashes belong together."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_pinned_package_but_torch_has_a_hash():
    pinned = (ROOT / "constraints.txt").read_text().split()
    text = (ROOT / "requirements" / "ci.txt").read_text()
    hashed = re.findall(r"^(\S+==\S+) \\\n    --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert hashed == [line for line in pinned if not line.startswith("torch==")]


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(name for key in extras for name in extras[key])]
    names = {re.split(r"[<>=\[ ]", line)[0].lower() for line in wanted}
    pinned = (ROOT / "constraints.txt").read_text().lower().split()
    # comparisons and clusters, which no command of the Makefile installs
    others = {"tiepoints", "ray", *extras["peers"]}
    assert names - {line.partition("==")[0] for line in pinned} == others


def test_project_files_name_no_registry():
    """Registries are a choice of the machine, not of the project."""
    files = [ROOT / name for name in ("Makefile", "constraints.txt", "requirements/ci.txt")]
    for path in [*files, *(ROOT / ".github").rglob("*.yml")]:
        assert not re.search(r"index-url|find-links|https?://", path.read_text()), path
