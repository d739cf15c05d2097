"""The README is short, and its code, commands and demo run."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiepoints.cli import app
from tiepoints.training import presets

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Options that make the README's commands fast: fewer steps, smaller views.
QUICK = {
    "extract": ["--num-keypoints", "100"],
    "match": ["--num-keypoints", "200"],
    "train": ["--steps", "1", "--preset", "smoke", "--seed", "1", "--workers", "0", "--no-compare"],
    "reconstruct": ["--quality", "fast"],
    "compare": ["--photos", "2", "--size", "160", "--num-keypoints", "100"],
}


def test_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200
    tables = re.findall(r"(?:^\|.*\n)+", README, flags=re.M)
    assert len(tables) == 1
    assert tables[0].count("\n") - 2 <= 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which the README's Python was run."""
    pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("readme")
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.S))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    (folder / "output.txt").write_text(done.stdout)
    return folder


def test_readme_code_runs(folder):
    lines = (folder / "output.txt").read_text().splitlines()
    matches, inliers = (int(line.split()[0]) for line in lines[:2])
    assert matches > 500
    assert inliers > 0.8 * matches
    assert lines[-1].endswith("True")
    assert (folder / "matches.png").stat().st_size > 10_000


def test_readme_commands_run(folder, monkeypatch):
    from PIL import Image

    pytest.importorskip("h5py")
    pytest.importorskip("pycolmap")
    pytest.importorskip("lightning")
    (folder / "photos").mkdir()
    for side in ("left", "right"):
        photo = Image.open(folder / f"{side}.png").resize((296, 200))
        photo.save(folder / f"{side}.png")
        photo.save(folder / "photos" / f"{side}.png")
    photo.rotate(5, expand=True).save(folder / "photos" / "turned.jpg")
    smoke = dataclasses.replace(presets.RECIPES["smoke"], check_pairs=2, check_size=128)
    monkeypatch.setitem(presets.RECIPES, "smoke", smoke)
    monkeypatch.chdir(folder)
    section = README.partition("## Six commands")[2]
    lines = re.search(r"```sh\n(.*?)```", section, flags=re.S).group(1).splitlines()
    assert len(lines) == 6
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "tiepoints"
        if "--minutes" in arguments:
            at = arguments.index("--minutes")
            del arguments[at : at + 2]
        done = CliRunner().invoke(app, [*arguments, *QUICK[arguments[0]]])
        if arguments[0] == "reconstruct":  # three small photographs do not make a model
            assert done.exit_code == 2, done.output
            assert "no model: " in done.output
            assert Path("reconstruction/database.db").is_file()
        else:
            assert done.exit_code == 0, f"{line}\n{done.output}"
    for result in ("features/features.h5", "model/database.db", "mine.safetensors"):
        assert Path(result).is_file()
    assert list(Path("model/pairs").glob("*.jpg"))
    assert "repeatability" in done.output


def test_stereo_demo_finds_correct_matches(tmp_path):
    pytest.importorskip("skimage")
    script = ROOT / "examples" / "stereo_demo.py"
    done = subprocess.run(
        [sys.executable, script, "--output", tmp_path, "--num-keypoints", "500"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    share = float(re.search(r"2 px\s+\d+ \(([\d.]+) %\)", done.stdout).group(1))
    assert share > 60
    assert (tmp_path / "matches.png").stat().st_size > 10_000
