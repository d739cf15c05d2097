"""Matching by several processes: equal results, workers that end, and searches left out."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import texture
from tiepoints import ExtractOptions, processes
from tiepoints.auto_orientation import (
    ENOUGH_SUPPORT,
    KnownRotations,
    PairMatcher,
    _steps_near,
    is_upright,
)
from tiepoints.formats.colmap import ColmapDatabase
from tiepoints.formats.hdf5 import MatchFile
from tiepoints.jobs import pair_workers
from tiepoints.jobs.match import MatchOptions, match_images
from tiepoints.jobs.pair_workers import PairOutcome, PairRunner, PairWork
from tiepoints.structs import Features, Keypoints, Matches

pytest.importorskip("h5py")
OPTIONS = ExtractOptions(
    detector="sobelnet",
    descriptor="hardnet-light",
    num_keypoints=120,
    single_scale=True,
    backend="torch",  # forked processes cannot use the threads of other backends
)
#: Photographs of one scene: shifted, then turned by 90 degrees; the last shows another scene.
NAMES = ["0.png", "1.png", "2.png", "turned.png", "unrelated.png"]
PAIRS = list(combinations(NAMES, 2))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    scene = texture(0, (300, 220))
    for i, name in enumerate(NAMES[:3]):
        scene.crop((20 * i, 10 * i, 20 * i + 240, 10 * i + 180)).save(folder / name)
    view = scene.crop((30, 20, 270, 200)).transpose(Image.Transpose.ROTATE_90)
    view.save(folder / "turned.png")
    texture(9, (240, 180)).save(folder / "unrelated.png")
    return folder


def run(photos: Path, output: Path, workers: int | None = 2, **options):
    options = {"progress": False, "root": photos, **options}
    return match_images([str(photos)], output, OPTIONS, workers=workers, **options)


def contents(path: Path) -> bytes:
    return path.read_bytes()


# ---- results


@pytest.mark.parametrize("name", ["m.h5", "m.db"])
def test_matches_do_not_depend_on_the_number_of_workers(photos, tmp_path, forked, name):
    if name == "m.db":
        pytest.importorskip("pycolmap")
    reports = []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        reports.append(run(photos, tmp_path / str(workers) / name, workers))
    assert reports[0] == reports[1]
    assert reports[0].done == len(PAIRS)
    assert contents(tmp_path / "1" / name) == contents(tmp_path / "2" / name)
    with (MatchFile if name == "m.h5" else ColmapDatabase)(tmp_path / "2" / name) as store:
        counts = {pair: len(store.read_matches(*pair)) for pair in PAIRS}
    assert min(counts[pair] for pair in combinations(NAMES[:3], 2)) > 40
    assert min(counts[name, "turned.png"] for name in NAMES[:3]) > 40  # found by the search


def test_geometry_is_estimated_by_the_workers(photos, tmp_path, forked):
    options = MatchOptions(geometry="homography")
    reports = []
    for workers in (1, 2):
        reports.append(run(photos, tmp_path / f"{workers}.h5", workers, options=options))
    assert reports[0] == reports[1]
    assert reports[0].verified == 6  # all but those of the unrelated photograph


def test_command_with_started_workers(photos, tmp_path):
    """The usual start of processes, and stored features without images."""
    run(photos, tmp_path / "one.h5", 1, options=MatchOptions(auto_orientation=False))
    features = tmp_path / "one.features.h5"
    output = tmp_path / "two.h5"
    command = [sys.executable, "-m", "tiepoints", "-q", "match", "--features", features]
    command += ["--output", output, "--workers", "2"]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert f"{len(PAIRS)} pairs matched" in ended.stdout
    with MatchFile(tmp_path / "one.h5") as one, MatchFile(output) as two:
        for pair in PAIRS:
            assert torch.equal(one.read_matches(*pair).index, two.read_matches(*pair).index)


def test_workers_start_when_the_pairs_take_long(photos, tmp_path, forked, monkeypatch):
    started = []
    start = processes.WorkerPool.start
    monkeypatch.setattr(processes.WorkerPool, "start", lambda pool: started.append(start(pool)))
    monkeypatch.setattr("tiepoints.jobs.workers.usable_cores", lambda: 2)
    run(photos, tmp_path / "a.h5", None)
    assert started == []
    monkeypatch.setattr(pair_workers, "WORTH_SECONDS", -1.0)
    run(photos, tmp_path / "b.h5", None)
    assert started
    assert contents(tmp_path / "a.h5") == contents(tmp_path / "b.h5")


# ---- workers that end, interruptions


@pytest.mark.parametrize("way", ["killed", "raises"])
def test_pairs_that_end_their_worker_are_reported_and_resumed(
    photos, tmp_path, forked, monkeypatch, way
):
    near = PairMatcher.match_near

    def fatal(matcher, a, b, image_b, key=None):
        if key == "2.png" and way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if key == "2.png":
            raise RuntimeError("out of memory")
        return near(matcher, a, b, image_b, key)

    monkeypatch.setattr(PairMatcher, "match_near", fatal)
    report = run(photos, tmp_path / "m.h5")
    assert report.done == len(PAIRS) - 2
    assert sorted(name for name, _ in report.failed) == ["0.png 2.png", "1.png 2.png"]
    how = "SIGKILL" if way == "killed" else "exit code 1"
    assert f"the process that matched it ended ({how})" in report.failed[0][1]
    monkeypatch.setattr(PairMatcher, "match_near", near)
    report = run(photos, tmp_path / "m.h5")
    assert (report.skipped, report.done, report.failed) == (len(PAIRS) - 2, 2, [])


def test_interrupted_matching_resumes(photos, tmp_path, forked, monkeypatch):
    write, written = MatchFile.write_matches, []

    def interrupted(store, *arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments[:2])
        write(store, *arguments)

    monkeypatch.setattr(MatchFile, "write_matches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "m.h5")
    assert not multiprocessing.active_children()
    monkeypatch.setattr(MatchFile, "write_matches", write)
    report = run(photos, tmp_path / "m.h5")
    assert (report.skipped, report.done) == (2, len(PAIRS) - 2)


# ---- searches for rotations


class Weak(PairWork):
    """Counts the searches; the rotation of a pair is the difference of its names in degrees."""

    def __init__(self, supported):
        super().__init__(MatchOptions())
        self.supported, self.searched = supported, {}

    def match(self, pair, block):
        if pair in block.search:
            self.searched[pair] = block.search[pair]
        support = ENOUGH_SUPPORT if pair in self.supported else 0
        weak = pair not in block.search and not support
        rotation = math.radians(int(pair[1]) - int(pair[0]))
        matches = Matches(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0))
        return PairOutcome(matches, 0, support=support, rotation=rotation, weak=weak)


def test_only_pairs_with_an_unknown_or_large_rotation_are_searched():
    empty = Features(Keypoints(torch.zeros(0, 2), *[torch.zeros(0)] * 3), torch.zeros(0, 4), (9, 9))
    work = Weak({("0", "10"), ("10", "20"), ("20", "90")})
    pairs = list(combinations(["0", "10", "20", "90", "5"], 2))
    with PairRunner(work, lambda name: empty) as runner:
        found = [pair for pair, _ in runner.run(pairs)]
    assert sorted(found) == sorted(pairs)
    upright = [pair for pair in pairs if pair in work.supported or pair == ("0", "20")]
    assert set(work.searched) == set(pairs) - set(upright)
    assert work.searched["0", "90"] == pytest.approx(math.radians(90))  # a sum along a chain
    assert work.searched["0", "5"] is None


def test_known_rotations_are_summed_along_the_shortest_chain():
    known = KnownRotations()
    known.add("a", "b", 0.3, ENOUGH_SUPPORT)
    known.add("c", "b", 0.5, ENOUGH_SUPPORT)
    known.add("c", "d", 0.1, ENOUGH_SUPPORT - 1)  # too few matches
    assert known.predict("a", "c") == pytest.approx(-0.2)
    assert known.predict("c", "a") == pytest.approx(0.2)
    assert known.predict("a", "d") is None
    chain = KnownRotations()
    for i in range(20):
        chain.add(str(i), str(i + 1), 0.0, ENOUGH_SUPPORT)
    assert chain.predict("0", "8") == 0
    assert chain.predict("0", "9") is None


@pytest.mark.parametrize(
    ("degrees", "upright", "steps"),
    [
        (None, False, [1, 2, 3, 4, 5, 6, 7]),
        (20, True, [1]),
        (-25, False, [7]),
        (100, False, [2, 3]),
        (-100, False, [5, 6]),
        (380, True, [1]),
    ],
)
def test_rotations_that_are_searched(degrees, upright, steps):
    rotation = None if degrees is None else math.radians(degrees)
    assert is_upright(rotation) == upright
    assert _steps_near(rotation) == steps
