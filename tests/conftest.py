"""Fixtures of all tests: folders of the reference outputs and the data, if they exist."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[1].parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    if "s" not in config.option.reportchars:  # print why tests were skipped
        config.option.reportchars += "s"


def pytest_runtest_teardown() -> None:
    """Remove the handler of SIGCHLD that torch's loaders install: in runs of all tests, a process
    with it has crashed (SIGSEGV) at the delivery of that signal, for a reason that is not known.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _folder(name: str, holds: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no {holds} next to the repository (../shared/{name})")
    return folder


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Outputs and checkpoints of the official implementations."""
    return _folder("reference", "reference outputs")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Photographs and image pairs."""
    return _folder("data", "image data")


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are forked: they need not import torch, and know what a test has patched."""
    from tiepoints import processes

    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    monkeypatch.setattr(processes, "START_METHOD", "fork")
