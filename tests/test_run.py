"""Runs: rows of any callable, stored results, interrupted and failing runs, sweeps and bias."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tiepoints.cli import app
from tiepoints.datasets.homography import homography_sequences
from tiepoints.datasets.posed import posed_pairs
from tiepoints.errors import DataError
from tiepoints.evaluation import run as module
from tiepoints.evaluation.pair import homography_metrics
from tiepoints.evaluation.results import load_features, read_rows, save_features
from tiepoints.evaluation.run import RunSettings, evaluate, run
from tiepoints.evaluation.sweeps import bias, sweep
from tiepoints.evaluation.systems import Options, as_features, from_disk, system
from tiepoints.formats.npy import write_features
from tiepoints.image import load_image
from tiepoints.keypoints import detect_peaks
from tiepoints.structs import Features, Keypoints

SHIFT = 6


@pytest.fixture
def dataset(tmp_path):
    """Two sequences of three images; images 2 and 3 are image 1 shifted by SHIFT and 2 SHIFT pixels
    to the left.
    """
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for name in ("v_one", "i_two"):
        folder = root / name
        folder.mkdir(parents=True)
        coarse = rng.integers(0, 255, (24, 36), dtype=np.uint8)
        smooth = (
            np.asarray(Image.fromarray(coarse).resize((288, 192), Image.Resampling.BICUBIC)) * 0.9
        )
        wide = (smooth + rng.uniform(0, 25, smooth.shape)).astype(
            np.uint8
        )  # noise: no two pixels of a peak are equal
        for k in (1, 2, 3):
            left = SHIFT * (k - 1)
            Image.fromarray(wide[:, left : left + 240]).save(folder / f"{k}.png")
            if k > 1:
                np.savetxt(folder / f"H_1_{k}", [[1, 0, -left], [0, 1, 0], [0, 0, 1]])
    return root


def corners(source):
    """A detector without weights: (N,4) x, y, scale, score."""
    image = load_image(source)
    x, y = (image - image.roll(2, dims=d) for d in (-1, -2))
    response = (
        (x * y).abs().roll((-1, -1), dims=(-2, -1))
    )  # of the pixels around a point, so that it mirrors
    xy, score = detect_peaks(response, 300, window=5, border=4, subpixel=False)[0]
    return torch.cat([xy, torch.ones(len(xy), 1), score[:, None]], dim=1)


def test_library_use_with_any_callable(dataset):
    rows = run(homography_sequences(dataset).pairs, corners, protocols=("keynet", "mutual", "rekd"))
    assert [(r["sequence"], r["kind"], r["pair"]) for r in rows] == [
        ("i_two", "illum", "1-2"),
        ("i_two", "illum", "1-3"),
        ("v_one", "view", "1-2"),
        ("v_one", "view", "1-3"),
    ]
    for row in rows:
        assert row["ok"]
        assert row["seconds"] > 0
        # equal pixels: all keypoints are repeated except for those removed by the limit of 300 near
        # the border
        assert row["metrics"]["mutual.rep@1"] > 0.85
        assert row["metrics"]["mutual.err@1"] < 0.05
        assert row["metrics"]["keynet.rep_L"] >= row["metrics"]["mutual.rep@3"] - 1e-9
        assert "keynet.mma@3" not in row["metrics"]  # no descriptors, no matches


def test_rotated_keypoints_have_the_chance_level(dataset):
    pair = homography_sequences(dataset).pairs[0]
    a, b = (as_features(corners(p), (240, 192)) for p in (pair.image_a, pair.image_b))
    numbers = homography_metrics(a, b, pair.H_ab)
    rotated = Features(
        Keypoints(torch.tensor([239.0, 191]) - b.xy, b.scale, b.keypoints.angle, b.score),
        None,
        b.image_size,
    )
    chance = homography_metrics(a, rotated, pair.H_ab)["mutual.rep@3"]
    assert numbers["chance.rep@3"] == pytest.approx(
        (numbers["mutual.rep@3"] - chance) / (1 - chance)
    )


def test_failed_pair_is_a_row_with_a_reason(dataset):
    def broken(source):
        if str(source).endswith("3.png"):
            raise RuntimeError("no luck with three")
        return corners(source)

    rows = run(homography_sequences(dataset).pairs, broken, protocols=("mutual",))
    assert [r["ok"] for r in rows] == [True, False, True, False]
    assert rows[1]["metrics"] == {}
    assert "no luck with three" in rows[1]["reason"]


def test_no_keypoints_are_not_a_failure(dataset):
    rows = run(homography_sequences(dataset).pairs[:1], lambda _: torch.zeros(0, 2))
    assert rows[0]["ok"]
    assert rows[0]["metrics"]["mutual.rep@3"] == 0
    assert rows[0]["metrics"]["keynet.err_SL"] is None


def test_equal_scores_are_averaged_over_random_selections(dataset):
    pair = homography_sequences(dataset).pairs[0]
    xy = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([239.0, 191])
    same = Features(
        Keypoints(xy, torch.ones(400), torch.zeros(400), torch.ones(400)), None, (240, 192)
    )
    found = homography_metrics(same, same, torch.eye(3), num_keypoints=100, protocols=("mutual",))
    ordered = Features(
        Keypoints(xy, torch.ones(400), torch.zeros(400), torch.linspace(1, 0, 400)),
        None,
        (240, 192),
    )
    assert (
        homography_metrics(
            ordered, ordered, torch.eye(3), num_keypoints=100, protocols=("mutual",)
        )["mutual.rep@1"]
        == 1
    )
    assert 0.1 < found["mutual.rep@1"] < 0.6  # two random hundreds of some 300 share a third
    assert pair is not None


def test_invalid_arguments_raise(dataset):
    with pytest.raises(ValueError, match="nonsense"):
        run(homography_sequences(dataset).pairs, corners, protocols=("nonsense",))
    with pytest.raises(ValueError, match="num_keypoints must be at least 1"):
        RunSettings(("keynet",), num_keypoints=0)
    with pytest.raises(ValueError, match="unknown system 'sitf'"):
        system("sitf")
    with pytest.raises(ValueError, match="official, all, upright"):
        system("keynet@nonsense")
    row = run(homography_sequences(dataset).pairs[:1], lambda _: torch.zeros(3, 7))[0]
    assert not row["ok"]
    assert "(N,2..4)" in row["reason"]


def settings(**changes):
    return RunSettings(("random", "lattice"), **{"protocols": ("keynet", "mutual"), **changes})


def test_interrupted_run_resumes(dataset, tmp_path, monkeypatch):
    out, data = tmp_path / "out", homography_sequences(dataset)
    evaluate(data, settings(), out)
    first = {name: (out / "rows" / f"{name}.jsonl").read_text() for name in ("random", "lattice")}
    assert all(len(text.splitlines()) == 4 for text in first.values())
    # a kill during the last line
    cut = out / "rows" / "random.jsonl"
    cut.write_text(first["random"][:-40])
    evaluate(data, settings(), out)
    lines = cut.read_text().splitlines()
    # rows have their durations: complete rows have not been measured again
    assert lines[:3] == first["random"].splitlines()[:3]
    assert [row["metrics"] for row in read_rows(cut)] == [
        json.loads(line)["metrics"] for line in first["random"].splitlines()
    ]
    before = cut.read_text()
    evaluate(data, settings(), out)
    assert cut.read_text() == before


def test_kill_between_pairs_keeps_earlier_rows(dataset, tmp_path, monkeypatch):
    out, data = tmp_path / "out", homography_sequences(dataset)

    def killed(source):
        if Path(source).parts[-2:] == ("i_two", "3.png"):
            raise KeyboardInterrupt
        return corners(source)

    with monkeypatch.context() as patched:
        patched.setattr(module, "system", lambda *_: killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(data, settings(), out)
    assert [(r["sequence"], r["pair"]) for r in read_rows(out / "rows" / "random.jsonl")] == [
        ("i_two", "1-2")
    ]
    monkeypatch.setattr(module, "system", lambda *_: corners)
    evaluate(data, settings(), out)
    assert len((out / "rows" / "random.jsonl").read_text().splitlines()) == 4  # no duplicate pairs


def test_kill_during_detection_leaves_no_incomplete_features(dataset, tmp_path, monkeypatch):
    out, data = tmp_path / "out", homography_sequences(dataset)

    def killed(source):
        if str(source).endswith("3.png"):
            raise KeyboardInterrupt
        return corners(source)

    monkeypatch.setattr(module, "system", lambda *_: killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(data, settings(), out)
    assert sorted(p.name for p in (out / "features" / "random").rglob("*")) == [
        "1.npz",
        "2.npz",
        "i_two",
    ]
    assert len(read_rows(out / "rows" / "random.jsonl")) == 1


def test_results_of_other_settings_raise(dataset, tmp_path):
    out, data = tmp_path / "out", homography_sequences(dataset)
    evaluate(data, settings(), out)
    with pytest.raises(DataError, match="num_points = 1000"):
        evaluate(data, settings(num_keypoints=50), out)
    with pytest.raises(DataError, match="mode = si"):
        evaluate(data, settings(single_scale=True), out)


def test_labels_name_rows_and_files(dataset, tmp_path):
    evaluate(
        homography_sequences(dataset),
        RunSettings(("chance=random",), protocols=("mutual",)),
        tmp_path / "out",
    )
    assert {row["system"] for row in read_rows(tmp_path / "out" / "rows" / "chance.jsonl")} == {
        "chance"
    }
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["systems"] == facts["controls"] == ["chance"]
    assert facts["made_by"] == {"chance": "random"}


def test_label_belongs_to_one_system(dataset, tmp_path):
    data, out = homography_sequences(dataset), tmp_path / "out"

    def named(*systems):
        return RunSettings(systems, protocols=("mutual",))

    evaluate(data, named("chance=random"), out)
    with pytest.raises(
        DataError, match="holds results of random called chance; give lattice another name"
    ):
        evaluate(data, named("chance=lattice"), out)
    with pytest.raises(DataError, match="holds results of random called chance"):
        evaluate(data, named("chance/=random"), out)  # the same file
    evaluate(data, named("other=lattice"), out)
    evaluate(data, named("chance=random"), out)  # from the first run, not in the second
    assert json.loads((out / "run.json").read_text())["made_by"] == {
        "chance": "random",
        "other": "lattice",
    }


def test_a_system_that_can_be_run_later_is_not_unavailable(dataset, tmp_path):
    data, out = homography_sequences(dataset), tmp_path / "out"
    stored = tmp_path / "stored"
    wanted = RunSettings(("random", f"own={stored}"), protocols=("mutual",))
    evaluate(data, wanted, out)
    before = json.loads((out / "run.json").read_text())
    assert list(before["unavailable"]) == ["own"]
    assert list(before["records"]) == ["random"]
    for path in {path for pair in data.pairs for path in (pair.image_a, pair.image_b)}:
        table = corners(path)
        zeros = torch.zeros(len(table))
        points = Keypoints(table[:, :2].contiguous(), table[:, 2], zeros, table[:, 3])
        (stored / path.parent.name).mkdir(parents=True, exist_ok=True)
        write_features(stored / path.parent.name / path.name, Features(points, None, (240, 192)))
    evaluate(data, wanted, out)
    after = json.loads((out / "run.json").read_text())
    assert after["unavailable"] == {}
    assert set(after["records"]) == set(after["systems"]) == {"random", "own"}
    assert all(row["ok"] for row in read_rows(out / "rows" / "own.jsonl"))
    # as before if only others are requested
    evaluate(data, RunSettings(("lattice",), protocols=("mutual",)), out)
    assert json.loads((out / "run.json").read_text())["unavailable"] == {}


def test_stored_features_have_no_value_range(dataset, tmp_path):
    stored = tmp_path / "stored"
    stored.mkdir()
    for name in (str(stored), f"own={stored}", f"own={stored}@upright+hardnet"):
        assert RunSettings((name,)).value_range == "type"
        with pytest.raises(ValueError, match=r"value range is that of their extraction.*stored"):
            RunSettings(("random", name), value_range="auto")
    assert RunSettings(("random",), value_range="auto").value_range == "auto"
    given = ["evaluate", dataset, "--systems", "random", "--features", stored]
    arguments = [*given, "--value-range", "auto", "--output", tmp_path / "out"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 2
    assert "the value range is that of their extraction" in done.stderr
    assert not (tmp_path / "out").exists()


def test_two_systems_with_the_same_file_raise():
    for systems in (
        ("one/net.safetensors", "two/net.safetensors"),
        ("sift", "sift=orb"),
        ("a/b=sift", "a-b=orb"),
        ("sift", "sift"),
    ):
        with pytest.raises(ValueError, match=r"two systems called .*; name one LABEL=NAME"):
            RunSettings(systems)
    assert RunSettings(("one/net.safetensors", "second=two/net.safetensors"))


def test_features_of_posed_pairs_are_stored(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    rng, images = np.random.default_rng(0), tmp_path / "set" / "images"
    numbers = "100 0 60 0 100 40 0 0 1 " * 2 + "1 0 0 1 0 1 0 0 0 0 1 0 0 0 0 1"
    lines = []
    for scene in ("first", "second"):  # the same file names in both
        folder = images / scene / "color"
        folder.mkdir(parents=True)
        for name in ("1.png", "2.png"):
            Image.fromarray(rng.integers(0, 255, (80, 120), dtype=np.uint8)).save(folder / name)
        lines += [
            f"{scene}/color/1.png {scene}/color/2.png {quarter_turns} 0 {numbers}"
            for quarter_turns in (0, 1)
        ]
    (tmp_path / "set" / "pairs_with_gt.txt").write_text("\n".join(lines) + "\n")
    data = posed_pairs(tmp_path / "set")
    seen = []

    def detect(image):
        seen.append(tuple(image.shape[-2:]))
        table = corners(image)
        described = torch.nn.functional.normalize(
            torch.rand(len(table), 8, generator=torch.Generator().manual_seed(0)), dim=1
        )
        points = Keypoints(
            table[:, :2].contiguous(), table[:, 2], torch.zeros(len(table)), table[:, 3]
        )
        return Features(points, described, (image.shape[-1], image.shape[-2]))

    monkeypatch.setattr(module, "system", lambda *_: detect)
    chosen = RunSettings(("orb",), resize=(60,))
    out = evaluate(data, chosen, tmp_path / "out")
    rows = read_rows(out / "rows" / "orb.jsonl")
    assert [r["ok"] for r in rows] == [True] * 4, rows[0]["reason"]
    # image 1 upright and rotated, image 2: three per scene for any number of pairs
    assert sorted(seen) == [(40, 60)] * 4 + [(60, 40)] * 2
    stored = sorted(p.stem for p in (out / "features" / "orb" / "set").glob("*.npz"))
    assert len(stored) == 6
    assert sum(name.startswith("second-color-1") for name in stored) == 2
    assert sum(name.endswith("-turned1") for name in stored) == 2
    (out / "rows" / "orb.jsonl").unlink()
    seen.clear()
    evaluate(data, chosen, out)
    assert not seen
    assert [r["metrics"] for r in read_rows(out / "rows" / "orb.jsonl")] == [
        r["metrics"] for r in rows
    ]


def test_number_of_workers_does_not_change_rows(dataset, tmp_path):
    data = homography_sequences(dataset)
    for name, workers in (("one", 1), ("two", 2)):
        evaluate(data, settings(extras=("bias",)), tmp_path / name, workers=workers)
    for part in ("rows/random.jsonl", "rows/lattice.jsonl", "bias/random.jsonl"):
        # one line each, none missing or duplicated
        assert (
            len({len((tmp_path / name / part).read_text().splitlines()) for name in ("one", "two")})
            == 1
        )
        one, two = (
            sorted(
                (
                    r["sequence"] if "sequence" in r else r["image"],
                    r.get("pair", r["kind"]),
                    json.dumps(r["metrics"]),
                )
                for r in rows
            )
            for rows in (read_rows(tmp_path / "one" / part), read_rows(tmp_path / "two" / part))
        )
        assert one == two
        assert one


def test_stored_features_round_trip(tmp_path):
    points = Keypoints(torch.rand(5, 2) * 50, torch.rand(5), torch.rand(5), torch.rand(5))
    described = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    path = tmp_path / "a" / "1.npz"
    save_features(path, Features(points, described, (64, 48)), 0.25)
    found, seconds = load_features(path)
    assert torch.equal(found.xy, points.xy)
    assert torch.equal(found.scale, points.scale)
    assert found.image_size == (64, 48)
    assert torch.allclose(found.descriptors, described, atol=1e-3)
    assert seconds == 0.25
    path.write_bytes(path.read_bytes()[:100])
    assert load_features(path) is None
    assert load_features(tmp_path / "none.npz") is None


def test_external_features_in_both_formats(dataset, tmp_path):
    h5py = pytest.importorskip("h5py")
    data = homography_sequences(dataset)
    folder, file = tmp_path / "npy", tmp_path / "features.h5"
    for path in {p for pair in data.pairs for p in (pair.image_a, pair.image_b)}:
        table = corners(path)
        n = len(table)
        points = Keypoints(table[:, :2].contiguous(), table[:, 2], torch.zeros(n), table[:, 3])
        described = torch.nn.functional.normalize(
            torch.randn(n, 16, generator=torch.Generator().manual_seed(1)), dim=1
        )
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        features = Features(points, described, (240, 192))
        write_features(folder / path.parent.name / path.name, features)
        with h5py.File(file, "a") as content:
            group = content.create_group(f"{path.parent.name}/{path.name}")
            group["keypoints"], group["scores"], group["descriptors"] = (
                table[:, :2].numpy(),
                table[:, 3].numpy(),
                described.numpy().T,
            )
    expected = [
        r["metrics"]["mutual.rep@2"] for r in run(data.pairs, corners, protocols=("mutual",))
    ]
    for path in (folder, file):
        rows = run(data.pairs, from_disk(path), protocols=("mutual", "rekd"))
        assert [r["metrics"]["mutual.rep@2"] for r in rows] == expected
        assert all(r["metrics"]["rekd.matches"] > 0 for r in rows)
    Image.new("L", (64, 64)).save(tmp_path / "other.png")
    with pytest.raises(DataError, match=r"no features of .*other\.png"):
        from_disk(folder)(tmp_path / "other.png")


@pytest.mark.parametrize("kind", ["rotation", "scale"])
def test_sweeps_use_the_correct_homography(dataset, kind):
    image = dataset / "v_one" / "1.png"
    values = (0, 90, 180, 30) if kind == "rotation" else (1.0, 0.71)
    rows = sweep(system("keynet+none", Options(1500, True)), image, kind, values, num_keypoints=200)
    found = [r["metrics"]["mutual.rep@3"] for r in rows]
    assert found[0] == 1
    assert all(v > 0.5 for v in found)
    if kind == "rotation":
        assert rows[1]["metrics"]["mutual.err@3"] < 1.0


def test_bias_is_twice_the_offset_of_a_detector(dataset):
    image = dataset / "v_one" / "1.png"
    straight = {r["kind"]: r["metrics"] for r in bias(corners, image)}
    assert straight["anchoring"]["median"] > 0.7
    assert straight["anchoring"]["below_half"] < 0.3
    assert all(
        abs(straight[k][d]) < 0.01 for k in straight if k != "anchoring" for d in ("dx", "dy")
    )

    def shifted(source):
        table = corners(source)
        return torch.cat([table[:, :2] + torch.tensor([0.5, -0.25]), table[:, 2:]], dim=1)

    found = {r["kind"]: r["metrics"] for r in bias(shifted, image)}
    assert found["mirror_x"]["dx"] == pytest.approx(1.0)
    assert found["mirror_x"]["dy"] == pytest.approx(0)
    assert found["mirror_y"]["dy"] == pytest.approx(-0.5)
    assert (found["rotation_180"]["dx"], found["rotation_180"]["dy"]) == (
        pytest.approx(1.0),
        pytest.approx(-0.5),
    )


def test_controls_are_independent_of_the_image_and_at_chance_level(dataset):
    for name in ("random", "lattice"):
        detect = system(name, Options(1000, True))
        image = dataset / "v_one" / "1.png"
        a, again, other = detect(image), detect(image), detect(dataset / "v_one" / "2.png")
        assert torch.equal(a.xy, again.xy)  # reproducible
        assert len(a) != len(other) or not torch.allclose(a.xy, other.xy)
    rows = run(
        homography_sequences(dataset).pairs,
        system("random", Options(5000, True)),
        protocols=("mutual",),
    )
    assert abs(np.mean([r["metrics"]["chance.rep@3"] for r in rows])) < 0.15


def test_command_line_from_folder_to_report(dataset, tmp_path):
    out = tmp_path / "out"
    runner = CliRunner()
    arguments = [
        "evaluate",
        str(dataset),
        "--systems",
        "keynet-tiny,random",
        "--num-keypoints",
        "100",
        "--output",
        str(out),
        "--extras",
        "bias",
    ]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "8 rows, 0 of them failed" in done.output
    made = runner.invoke(app, ["report", str(out), "--pictures", "1"])
    assert made.exit_code == 0, made.output
    assert "keynet-tiny" in (out / "report.md").read_text()
    (dataset / "v_one" / "3.png").write_bytes(b"not an image")
    failing = runner.invoke(app, [*arguments[:-4], "--output", str(tmp_path / "other")])
    assert failing.exit_code == 1
    assert "v_one" in failing.output
    nowhere = tmp_path / "nowhere"
    assert (
        runner.invoke(
            app, ["evaluate", str(dataset), "--systems", "nonsense", "--output", str(nowhere)]
        ).exit_code
        == 2
    )
    assert not nowhere.exists()
