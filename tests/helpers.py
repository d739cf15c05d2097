"""Shared by the tests: textured photographs, and commands in this process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from tiepoints.cli import app


def texture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A color image of ``size`` (width, height) of smooth random texture."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (size[1] // 7, size[0] // 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_photos(folder: Path, count: int = 4, size: tuple[int, int] = (330, 270)) -> Path:
    """Write ``count`` photographs ``0.png``, ``1.png``, ... to a folder, which is returned."""
    for i in range(count):
        texture(i, size).save(folder / f"{i}.png")
    return folder


def run_python(script: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr
