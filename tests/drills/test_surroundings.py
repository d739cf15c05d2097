"""Other surroundings than usual: a second process on the same results, strict interpreters, bare
environments.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from drilling import (
    FULL,
    Command,
    assert_equal_content,
    commands,
    content,
    number,
    run,
    temporary_files,
    write_photos,
)

pytest.importorskip("h5py")
FEW = ("--num-keypoints", 60)
TARGETS = commands(60, steps=8, validate_every=8)


@pytest.mark.parametrize(
    "name", [n for n in TARGETS if FULL or n in ("extract colmap", "match h5")]
)
def test_two_processes_with_one_target(name, photos, tmp_path, drill):
    """Both succeed, or one is refused with the reason; in the end the results are complete."""
    pytest.importorskip("pycolmap")
    large = write_photos(tmp_path / "large", 4, (400, 360)) if name == "train" else photos
    arguments = [{"PHOTOS": photos, "LARGE": large}.get(word, word) for word in TARGETS[name]]
    run(arguments, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    for index in range(number(1, 6 if name == "train" else 20)):
        with drill.run(f"pair {index}"):
            folder = tmp_path / f"both{index}"
            logs = [tmp_path / f"{index}-{i}.log" for i in range(2)]
            both = [Command(arguments, folder, log=log) for log in logs]
            codes = [command.wait() for command in both]
            output = "\n---\n".join(command.output() for command in both)
            assert 0 in codes, f"{codes}: {output[-2000:]}"
            assert set(codes) <= {0, 2}, f"{codes}: {output[-2000:]}"
            assert "Traceback" not in output, output[-3000:]
            assert 2 not in codes or "another" in output, output
            run(arguments, folder)
            assert not temporary_files(folder), temporary_files(folder)
            assert_equal_content(content(folder), expected)


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def bare(**variables: str) -> dict[str, str]:
    """Only what finds the package and the libraries."""
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


#: Name -> (options of Python, environment). Names of images are ASCII where Python decodes no
#: others (PYTHONUTF8=0 with locale C).
SURROUNDINGS = {
    "warnings are errors": (["-W", "error"], environment()),
    "no assertions": (["-OO"], environment()),
    "locale C": ([], environment(LC_ALL="C")),
    "ASCII": ([], environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")),
    "no home": ([], bare()),
    "no terminal": ([], environment(TERM="dumb", COLUMNS="0")),
    "all": (["-W", "error", "-OO"], bare(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")),
}


@pytest.mark.parametrize("name", [name for name in SURROUNDINGS if FULL or name == "all"])
def test_surroundings(name, photos, tmp_path, drill):
    """Extraction and matching, from a working folder where nothing may be written."""
    options, variables = SURROUNDINGS[name]
    letter = "b" if "PYTHONUTF8" in variables else "\N{GREEK SMALL LETTER BETA}"
    named = tmp_path / f"{letter} {letter}"
    named.mkdir()
    for path in sorted(photos.iterdir())[:3]:
        named.joinpath(f"{letter} {path.name}").write_bytes(path.read_bytes())
    here = tmp_path / "here"
    here.mkdir(mode=0o500)
    for arguments in (
        ["extract", named, "--output", tmp_path / "out", *FEW],
        ["extract", named, "--output", tmp_path / "out", "--format", "h5", *FEW],
        ["match", named, "--output", tmp_path / "m.h5", *FEW],
        ["match", *sorted(named.iterdir())[:2], "--output", tmp_path / "m.png", *FEW],
    )[:: 1 if FULL else 3]:
        with drill.run(f"{arguments[0]} {arguments[-3]}"):
            words = [sys.executable, *options, "-m", "tiepoints", *map(str, arguments)]
            done = subprocess.run(
                words, cwd=here, env=variables, capture_output=True, stdin=subprocess.DEVNULL
            )
            error = done.stderr.decode(errors="replace")
            assert done.returncode == 0, error[-3000:]
            assert "Warning" not in error, error
            assert done.stdout
            assert not list(here.iterdir())
