"""The fixture ``drill``, and the table of counts at the end."""

from __future__ import annotations

import pytest
from drilling import FULL, Drill, write_photos

DONE: list[Drill] = []


@pytest.fixture
def drill(request: pytest.FixtureRequest) -> Drill:
    """Counts of the test's runs; their failures fail the test."""
    current = Drill(request.node.name.removeprefix("test_").replace("_", " "))
    DONE.append(current)
    return current


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    done = yield
    current = pyfuncitem.funcargs.get("drill")
    if current is not None:
        assert current.runs, "the drill has done nothing"
        assert not current.failures, "\n".join(current.failures)
    return done


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("images") / "photos", 5)


def pytest_terminal_summary(terminalreporter) -> None:
    if FULL and DONE:
        terminalreporter.write_line(f"{'drill':72s} {'runs':>6s} {'failures':>8s}")
        for done in DONE:
            line = f"{done.name:72s} {done.runs:6d} {len(done.failures):8d}"
            terminalreporter.write_line(line)
