"""The README's Python runs as printed, and the examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_readme_code_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert blocks
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("True")


def test_readme_links_and_tree_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / name).exists(), name
    tree = re.search(r"```\nsrc/tiepoints/\n(.*?)```", text, flags=re.S)
    assert tree
    for name in re.findall(r"\b(\w+\.py)\b", tree.group(1)):
        assert list((ROOT / "src").rglob(name)), name


def test_stereo_demo_finds_right_matches(tmp_path):
    pytest.importorskip("skimage")
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "examples" / "stereo_demo.py",
            "--output",
            tmp_path,
            "--num-keypoints",
            "500",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    share = float(re.search(r"2 px\s+\d+ \(([\d.]+) %\)", done.stdout).group(1))
    assert share > 60
    assert (tmp_path / "matches.png").stat().st_size > 10_000
