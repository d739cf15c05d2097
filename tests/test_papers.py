"""Tables of the papers on a miniature of HPatches made of Oxford images: systems of one scale and
of many in one run, options of the published codes, systems that cannot be run, features of others.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import call
from tiepoints.checkpoints import load_official
from tiepoints.detect import PUBLISHED
from tiepoints.evaluation.complexity import num_parameters, seconds_per_image
from tiepoints.evaluation.pair import homography_metrics
from tiepoints.evaluation.results import read_rows, read_run, stored_features
from tiepoints.evaluation.systems import Options, split_modes, system
from tiepoints.evaluation.systems import scales as scales_of
from tiepoints.extract import build
from tiepoints.image import load_image, read_image
from tiepoints.matching import filter_by_rotation
from tiepoints.models.keynet_legacy import LegacyKeyNet
from tiepoints.models.rekd import REKD
from tiepoints.models.rekd_official import published_angle, whole_bins
from tiepoints.pyramid import build_pyramid
from tiepoints.structs import Features, Keypoints, Matches

WIDTH = 240


@pytest.fixture(scope="module")
def hpatches(data_dir, tmp_path_factory) -> Path:
    """``v_graf`` and ``i_leuven`` with two images each, ``*.ppm`` and ``H_1_2``."""
    root = tmp_path_factory.mktemp("hpatches")
    for name, kind in (("graf", "v"), ("leuven", "i")):
        folder, source = root / f"{kind}_{name}", data_dir / "oxford" / name
        folder.mkdir()
        sizes = []
        for k in (1, 2):
            photo = Image.open(source / f"{k}.png").convert("RGB")
            size = (WIDTH, round(WIDTH * photo.height / photo.width))
            photo.resize(size, Image.Resampling.LANCZOS).save(folder / f"{k}.ppm")
            sizes.append((photo.width / size[0], photo.height / size[1]))
        H = np.loadtxt(next(source.glob("H*1*2*")))
        to_original, to_small = np.eye(3), np.eye(3)
        for i in range(2):  # half-pixel exact
            to_original[i, [i, 2]] = sizes[0][i], (sizes[0][i] - 1) / 2
            to_small[i, [i, 2]] = 1 / sizes[1][i], (1 / sizes[1][i] - 1) / 2
        np.savetxt(folder / "H_1_2", to_small @ H @ to_original)
    return root


def table_rows(markdown: str, caption: str) -> dict[str, list[str]]:
    """Rows of a table of ``report.md``: name -> cells."""
    lines = markdown.split(f"**{caption}**")[1].strip().split("\n\n")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return {cells[0].strip("*"): [cell.strip("* ") for cell in cells[1:]] for cells in rows}


def test_one_run_has_both_kinds_of_detectors(hpatches, tmp_path):
    pytest.importorskip("cv2")
    systems = "sift,fast,keynet-tiny,keynet-tiny@ti,random@ti,sift@upright+hardnet"
    arguments = ["--num-keypoints", 100, "--protocol", "keynet", "--output", tmp_path / "run"]
    arguments += ["--systems", systems, "--pyramid-levels", 2, "--nms-size", 9]
    code, out, err = call("evaluate", hpatches, *arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == 12
    run = read_run(tmp_path / "run")
    ranges = {(row.system, row.sequence): row.metrics["s_range"] for row in run.rows}
    # one enlarged and two reduced levels, continuous scales
    assert 2 < ranges["keynet-tiny", "v_graf"] <= 4.5
    assert ranges["keynet-tiny@ti", "v_graf"] == ranges["random@ti", "v_graf"] == 1
    code, _, err = call("evaluate", hpatches, *arguments[:-3], 3, *arguments[-2:])
    assert code == 2
    assert "extraction = {'down_levels': 2, 'nms_window': 9}" in err
    code, _, err = call("report", tmp_path / "run", "--pictures", 0)
    assert code == 0, err
    markdown = (tmp_path / "run" / "report.md").read_text()
    second = table_rows(markdown, "Table 2")
    assert second["SIFT-SI: sift"][1] == "43.1"
    assert float(second["Tiny-Key.Net-SI: keynet-tiny"][0]) > 20
    assert "Key.Net-SI* (published)" in second
    assert "SIFT-SI: sift@upright+hardnet" not in second
    third = table_rows(markdown, "Table 3")
    assert third["SIFT + HardNet: sift@upright+hardnet"][1::2] == ["21.7", "23.9"]
    assert float(third["Tiny-Key.Net + HardNet: keynet-tiny"][0]) > 5


def test_a_missing_file_or_library_fails_its_row_only(hpatches, tmp_path, monkeypatch):
    gone = tmp_path / "lfnet"
    arguments = ["--systems", f"random,superpoint,lf-net={gone}", "--num-keypoints", 50]
    arguments += ["--protocol", "keynet", "--output", tmp_path / "run"]
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    code, out, err = call("evaluate", hpatches, *arguments, "--json")
    assert code == 1
    report = json.loads(out)
    assert (report["rows"], report["failed"]) == (2, 0)
    assert set(report["not_run"]) == {"superpoint", "lf-net"}
    assert "pip install 'transformers" in report["not_run"]["superpoint"]
    assert f"no weights file or stored features at {gone}" in err
    call("report", tmp_path / "run", "--pictures", 0)
    assert "superpoint was not run: superpoint needs" in (tmp_path / "run/report.md").read_text()
    # once its features are there, the same command adds the row
    code, *_ = call("extract", hpatches, "--output", gone, "--detector", "keynet-tiny")
    assert code == 0
    code, out, _ = call("evaluate", hpatches, *arguments, "--json")
    assert code == 1
    assert set(json.loads(out)["not_run"]) == {"superpoint"}
    assert set(read_run(tmp_path / "run").metadata["unavailable"]) == {"superpoint"}
    assert all(row["ok"] for row in read_rows(tmp_path / "run" / "rows" / "lf-net.jsonl"))
    # no system at all, and a typing error, are errors
    only = ["--systems", "superpoint", "--output", tmp_path / "other"]
    assert call("evaluate", hpatches, *only)[0] == 2
    code, _, err = call(
        "evaluate", hpatches, "--systems", "random,sitf", "--output", tmp_path / "x"
    )
    assert code == 2
    assert "unknown system 'sitf'" in err


def test_orientation_is_discarded(hpatches, tmp_path):
    pytest.importorskip("cv2")
    image = hpatches / "v_graf" / "1.ppm"
    options = Options(num_keypoints=2000)
    rotated = system("sift+hardnet", options)(image)
    upright = system("sift@upright+hardnet", options)(image)
    assert rotated.angle.any()
    assert not upright.angle.any()
    points = {tuple(p) for p in torch.cat([rotated.xy, rotated.scale[:, None]], 1).tolist()}
    assert len(upright) == len(points) < len(rotated)
    assert (upright.score.diff() <= 0).all()
    # stored features: the folder's angles are not used either
    call("extract", image, "--output", tmp_path / "f", "--detector", "keynet-tiny", "--orientation",
         "dominant", "--num-keypoints", 100)  # fmt: skip
    stored = system(f"{tmp_path / 'f'}@upright+hardnet", options)(image)
    assert system(str(tmp_path / "f"), options)(image).angle.any()
    assert not stored.angle.any()
    plain = build("keynet-tiny", "hardnet", num_keypoints=100, device="cpu").extract(image)
    similarity = (stored.descriptors * plain.descriptors).sum(dim=1)
    assert similarity.median() > 0.999
    for name in ("sift@upright", "sift@ti", "random@upright", f"{tmp_path / 'f'}@upright"):
        with pytest.raises(ValueError, match="takes only"):
            system(name, options)


def test_modes_of_a_name():
    assert split_modes("keynet@official@ti") == ("keynet", ("official", "ti"))
    assert scales_of("keynet@ti+hardnet", single_scale=False) == "TI"
    assert scales_of("keynet", single_scale=False) == "SI"
    assert scales_of("sift", single_scale=True) == ""
    options = Options(extraction={"down_levels": 2, "up_levels": 0})
    found = system("lattice", options)(torch.rand(1, 1, 200, 200)).scale.unique()
    assert found.tolist() == pytest.approx([1, 2**0.5, 2])
    with pytest.raises(ValueError, match="got 'T'"):
        split_modes("keynet@T")


def test_systems_have_the_published_suppression(hpatches):
    image = load_image(hpatches / "i_leuven" / "1.ppm")
    options = {"num_keypoints": 400, "per_scale": False, "device": "cpu"}
    published = system("sobelnet", Options(num_keypoints=400))(image)
    expected = build("sobelnet", None, **options, **PUBLISHED).extract(image)
    assert torch.equal(published.xy, expected.xy)
    # the benchmark of peers extracts as `tiepoints extract` does
    extraction = dict.fromkeys(PUBLISHED)
    default = system("sobelnet", Options(num_keypoints=400, extraction=extraction))(image)
    assert torch.equal(default.xy, build("sobelnet", None, **options).extract(image).xy)
    assert len(default) > len(published)


def test_regions_without_a_score_are_all_kept(hpatches):
    """MSER: ten random picks, of all regions of the common area."""
    pytest.importorskip("cv2")
    images = [hpatches / "i_leuven" / f"{k}.ppm" for k in (1, 2)]
    few = [system("mser", Options(num_keypoints=5))(image) for image in images]
    assert min(len(features) for features in few) > 40
    assert all(features.score.unique().numel() == 1 for features in few)
    H = torch.from_numpy(np.loadtxt(hpatches / "i_leuven" / "H_1_2"))
    pick, whole = (
        homography_metrics(*few, H, num_keypoints=n, protocols=("keynet",)) for n in (20, 4000)
    )
    assert pick["keynet.points"] == 20
    # a random fifth of both images repeats less than all of them
    assert 0 < pick["keynet.rep_L"] < whole["keynet.rep_L"]


def test_levels_of_the_paper(hpatches):
    """Seven levels a factor sqrt(2) apart: largest over smallest scale is 8."""
    image = torch.rand(1, 1, 400, 420, generator=torch.Generator().manual_seed(0))
    found = build(
        "keynet-tiny", None, official=True, down_levels=5, num_keypoints=1500, device="cpu"
    ).extract(image)
    assert found.scale.max() / found.scale.min() == pytest.approx(8, rel=1e-5)


def test_cut_ratio_removes_weak_keypoints(hpatches):
    image = hpatches / "v_graf" / "1.ppm"
    common = {"single_scale": True, "device": "cpu", "num_keypoints": 500}
    for detector in ("sobelnet", "keynet-tiny"):
        found = build(detector, None, **common).extract(image)
        cut = build(detector, None, cut_ratio=0.2, **common).extract(image)
        limit = 0.2 * found.score.max()
        assert 0 < len(cut) < len(found)
        assert len(cut) == pytest.approx(int((found.score >= limit).sum()), abs=2)
    with pytest.raises(ValueError, match="cut_ratio must lie in"):
        build("sobelnet", None, cut_ratio=1.0)


def test_cut_ratio_of_the_tensorflow_extraction():
    """Of each level, the keypoints from the fraction of its largest score on remain."""
    torch.manual_seed(0)
    net = LegacyKeyNet.tensorflow().eval()  # random weights
    image = torch.rand(1, 1, 160, 200, generator=torch.Generator().manual_seed(1))
    options = {"official": True, "num_keypoints": 3000, "up_levels": 1, "down_levels": 2}
    found = build(net, None, device="cpu", **options).extract(image)
    cut = build(net, None, device="cpu", cut_ratio=0.7, **options).extract(image)
    scales = found.scale.unique()
    assert len(scales) == 4
    for scale in scales:
        score = found.score[found.scale == scale]
        kept = score[score >= 0.7 * score.max()]
        assert 0 < len(kept) < len(score)
        assert torch.equal(cut.score[cut.scale == scale], kept)


def test_parameters_of_any_weights_file(reference_dir):
    folder = reference_dir / "checkpoints"
    assert num_parameters("keynet@ti") == 5873
    assert num_parameters("keynet-tiny") == 253
    assert num_parameters(f"{folder / 'keynet_pytorch.pth'}@official") == 5873
    assert num_parameters(str(folder / "tf_keynet_weights.npz")) == 5921
    assert num_parameters("sift") is None
    code, out, err = call("weights", "show", folder / "keynet_pytorch.pth")
    assert code == 0, err
    assert json.loads(out)["parameters"] == 5873
    assert 0 < seconds_per_image("keynet-tiny", side=64, repeat=1) < 10


def test_gray_levels_are_those_of_opencv():
    cv2 = pytest.importorskip("cv2")
    rgb = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    expected = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    for source in (rgb, Image.fromarray(rgb)):
        found = read_image(source, whole_levels=True).pixels[0, 0] * 255
        np.testing.assert_array_equal(found.round().numpy(), expected)
    gray = read_image(expected, whole_levels=True).pixels[0, 0] * 255
    np.testing.assert_array_equal(gray.round().numpy(), expected)


def test_options_of_the_published_codes(hpatches, tmp_path):
    image = hpatches / "v_graf" / "1.ppm"
    arguments = ["extract", image, "--official", "--descriptor", "none", "--output", tmp_path / "f"]
    arguments += ["--detector", "keynet-tiny", "--upsampled-levels", 0, "--nms-size", 31]
    assert call(*arguments, "--pyramid-levels", 1)[0] == 0
    (file,) = (tmp_path / "f").rglob("*.kpt.npy")
    table = np.load(file)
    scales = np.unique(table[:, 2])
    assert scales == pytest.approx([1, 2**0.5])
    for scale in scales:
        xy = torch.from_numpy(table[table[:, 2] == scale, :2] / scale)
        distance = torch.cdist(xy, xy, p=torch.inf)  # the window is a square
        assert distance.fill_diagonal_(100).min() > 15
    code, _, err = call(*arguments, "--pyramid-levels", 2)
    assert code == 2
    assert "down_levels: 1 before, 2 now" in err
    for wrong, message in (
        (["--nms-size", 8], "nms_window must be odd"),
        (["--single-scale", "--pyramid-levels", 2], "single_scale excludes pyramid levels"),
    ):
        code, _, err = call("evaluate", hpatches, "--systems", "random", *wrong)
        assert code == 2
        assert message in err


# ---- REKD's orientation as published


def reference_filter(o1: np.ndarray, o2: np.ndarray, threshold: float = 30.0) -> np.ndarray:
    """Indices of the matches that the published filter keeps; angles in degrees, counter-clockwise,
    of each match.
    """
    difference = np.mod(o2 - o1, 360)
    rounded = list(np.round(difference))
    dominant = max(dict.fromkeys(rounded), key=rounded.count)  # the first of equal counts
    distance = np.abs(np.mod(difference - dominant + 180, 360) - 180)
    return np.flatnonzero(distance <= threshold)


def test_published_orientation_filter():
    rng = np.random.default_rng(0)
    for trial in range(20):
        o1, o2 = (10.0 * rng.integers(0, 36, 40 + trial) for _ in range(2))
        o2[: 5 * (trial % 4)] = np.mod(o1[: 5 * (trial % 4)] + 350, 360)
        features = [
            Features(
                Keypoints(
                    torch.zeros(len(o), 2),
                    torch.ones(len(o)),
                    torch.deg2rad(torch.from_numpy(-o)).remainder(2 * np.pi).float(),
                    torch.ones(len(o)),
                ),
                None,
                (1, 1),
            )
            for o in (o1, o2)
        ]
        index = torch.arange(len(o1))[:, None].expand(-1, 2)
        kept = filter_by_rotation(*features, Matches(index, torch.ones(len(o1))))
        np.testing.assert_array_equal(kept.index[:, 0].numpy(), reference_filter(o1, o2))


def test_published_orientation_is_read_from_the_unscaled_level():
    torch.manual_seed(0)
    net = REKD(group=8, dims=(1, 1, 1), variant="published", input_range=1.0).eval()
    with torch.no_grad():
        net.score.bias.fill_(1.0)  # type: ignore[union-attr]
    image = torch.rand(1, 1, 90, 110)
    options = {"official": True, "num_keypoints": 60, "up_levels": 1, "down_levels": 1}
    found = build(net, None, device="cpu", **options).extract(image)
    assert len(found) == 60
    assert (found.score.diff() <= 0).all()  # sorted, unlike the PyTorch code's
    assert found.scale.unique().numel() == 3
    with torch.inference_mode():
        histogram = net(image / image.max())[1][0]
    bins = histogram.argmax(dim=0)
    for (x, y), angle in zip(found.xy.tolist(), found.angle.tolist(), strict=True):
        value = int(bins[round(y - 1), round(x - 1)])  # -1: the last row or column
        difference = (np.degrees(-angle) - 45 * value + 180) % 360 - 180
        assert abs(difference) < 1e-3
    patches = build(net, "hardnet", device="cpu", **options).extract(image)
    upright = build(net, "hardnet", device="cpu", upright=True, **options).extract(image)
    assert torch.equal(patches.descriptors, upright.descriptors)  # published: not rotated


def test_published_budgets_of_rekd():
    net = REKD(group=4, dims=(1, 1, 1)).eval()
    options = {"official": True, "num_keypoints": 1500, "device": "cpu"}
    detect = build(net, None, **options).detect
    assert detect._budgets() == [753, 377, 189, 95, 48, 24, 12, 6]


def test_published_reading_wraps_at_the_border():
    angles = torch.arange(12.0).reshape(3, 4)
    xy = torch.tensor([[0.0, 0.0], [2.0, 1.0], [0.4, 2.0], [3.0, 2.5]])
    # (-1,-1), (1,0), (-0.6 -> -1, 1), (2, 1.5 -> 2: half to even)
    assert published_angle(angles, xy).tolist() == [11.0, 1.0, 7.0, 10.0]
    assert torch.allclose(whole_bins(torch.tensor([0.1, 3.0, 6.2]), 4) / (np.pi / 2),
                          torch.tensor([0.0, 2.0, 0.0]))  # fmt: skip


def test_max_size_of_the_tensorflow_extraction(reference_dir):
    """Positions and scales are those of the original image."""
    net = load_official(reference_dir / "checkpoints" / "tf_keynet_weights.npz")
    image = torch.rand(1, 1, 160, 200, generator=torch.Generator().manual_seed(1))
    options = {"official": True, "num_keypoints": 50, "up_levels": 0, "down_levels": 1}
    reduced = build_pyramid(image, up=0, down=0, max_size=100).image
    small = build(net, None, device="cpu", **options).extract(reduced.clamp(0, 1))
    found = build(net, None, device="cpu", max_size=100, **options).extract(image)
    assert torch.allclose(found.xy, 2 * small.xy)
    assert torch.allclose(found.scale, 2 * small.scale)


def test_stored_features_of_a_merged_run_are_found(hpatches, tmp_path):
    arguments = ["--protocol", "mutual", "--num-keypoints", 40]
    for name in ("random", "lattice"):
        call("evaluate", hpatches, "--systems", name, *arguments, "--output", tmp_path / name)
    code, _, err = call(
        "report", tmp_path / "random", tmp_path / "lattice", "--output", tmp_path / "both"
    )
    assert code == 0, err
    run = read_run(tmp_path / "lattice")
    assert stored_features(run.rows[0], run.rows[0].image_a) is not None
    markdown = (tmp_path / "both" / "report.md").read_text()
    assert "*random* (control)" in markdown
    assert "*lattice* (control)" in markdown


# ---- features of methods that do not run here


def stand_in(method: str, folder: Path, name: str, xy: np.ndarray, rng) -> np.ndarray:
    """Write keypoints as the method's published code does; returns the expected table x, y, scale,
    score, strongest first.
    """
    from scipy.io import savemat

    n, stem = len(xy), folder / Path(name).with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    score, level = rng.permutation(n) + 1.0, 2.0 ** rng.integers(0, 3, n)
    described = rng.normal(size=(n, 128))
    if method == "tilde":
        table = np.stack([*(xy.T + 1), 0 * score, 0 * score, score, np.full(n, 10.0)])
        savemat(f"{stem}.mat", {"keypts": table})
        level = np.ones(n)
    elif method == "dnet":
        frames = np.stack([*(xy.T + 1), 3 * level])
        savemat(f"{stem}.mat", {"frames": frames, "peakScores": score[None]})
    elif method == "tcdet":
        zero = 0 * score
        feature = np.stack([3 * level, zero, xy[:, 0] + 1, zero, 3 * level, xy[:, 1] + 1], axis=1)
        savemat(f"{stem}.mat", {"feature": feature, "score": score[:, None]})
    elif method == "lift":
        import h5py

        rows = np.zeros((n, 13))
        rows[:, :5] = np.column_stack([xy, 1.6 * level, np.full(n, 30.0), score])
        text = "\n".join(" ".join(map(str, row)) + " " for row in rows)
        Path(f"{stem}_kp.txt").write_text(f"13\n{n}\n{text}\n")
        with h5py.File(f"{stem}_desc.h5", "w") as file:
            file["keypoints"], file["descriptors"] = rows, described
    elif method == "lf-net":
        np.savez(f"{folder / name}.npz", kpts=xy, descs=described, scales=level,
                 oris=np.full(n, 0.5), size=np.array([1, 1]))  # fmt: skip
        score = np.ones(n)
    else:
        np.savez(f"{stem}.npz", pts=np.stack([*xy.T, score]), desc=described.T)
        level = np.ones(n)
    expected = np.column_stack([xy, level, score])
    return expected[np.argsort(-score, kind="stable")]


def test_features_of_tilde_on_its_webcams(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import foreign_features
    from test_eval_sets import webcam_scene

    frames = sorted(webcam_scene(tmp_path / "webcams" / "mexico").iterdir())
    rng = np.random.default_rng(0)
    xy = rng.permutation(60 * 80)[:40]
    xy = np.stack([xy % 60 + 10.0, xy // 60 + 10.0], axis=1)
    for frame in frames:  # the same keypoints in all frames of the fixed camera
        stand_in("tilde", tmp_path / "theirs", f"mexico/{frame.name}", xy, rng)
    out, run = tmp_path / "ours", tmp_path / "run"
    assert not foreign_features.convert("tilde", tmp_path / "theirs", out, tmp_path / "webcams")
    arguments = ["--systems", f"tilde={out}", "--protocol", "rekd,mutual", "--output", run]
    code, _, err = call("evaluate", tmp_path / "webcams", *arguments)
    assert code == 0, err
    rows = read_rows(run / "rows" / "tilde.jsonl")
    assert len(rows) == len(frames) * (len(frames) - 1) / 2
    assert all(row["metrics"]["rekd.repeatability@5"] == 1 for row in rows)


@pytest.mark.parametrize("method", ["tilde", "dnet", "tcdet", "lift", "lf-net", "superpoint"])
def test_features_of_other_methods(hpatches, tmp_path, monkeypatch, method):
    if method == "lift":
        pytest.importorskip("h5py")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import foreign_features

    rng = np.random.default_rng(0)
    expected = {}
    for name in ("v_graf/1.ppm", "v_graf/2.ppm", "i_leuven/1.ppm", "i_leuven/2.ppm"):
        xy = rng.integers(20, 140, (60, 2)).astype(float)
        expected[name] = stand_in(method, tmp_path / "theirs", name, xy, rng)
    out = tmp_path / "ours"
    assert not foreign_features.convert(method, tmp_path / "theirs", out, hpatches)
    for name, table in expected.items():
        stored = np.load(out / f"{name}.kpt.npy")
        np.testing.assert_allclose(stored[:, :4], table, rtol=1e-6)
        # degrees, counter-clockwise
        if method == "lift":
            np.testing.assert_allclose(stored[:, 4], 330, atol=1e-3)
        if method == "lf-net":
            np.testing.assert_allclose(stored[:, 4], 360 - np.degrees(0.5), atol=1e-3)
    described = method in ("lift", "lf-net", "superpoint")
    systems = f"{method}={out}" + (f",{method}-u={out}@upright+hardnet" if method == "lift" else "")
    arguments = ["--systems", systems, "--protocol", "keynet", "--output", tmp_path / "run"]
    code, _, err = call("evaluate", hpatches, *arguments, "--num-keypoints", 50)
    assert code == 0, err
    call("report", tmp_path / "run", "--pictures", 0)
    markdown = (tmp_path / "run" / "report.md").read_text()
    rows = list(table_rows(markdown, "Table 2"))
    paper = {"tilde": "TILDE-TI", "dnet": "DNet-SI", "tcdet": "TCDET-SI", "lift": "LIFT-SI",
             "lf-net": "LF-Net-SI", "superpoint": "SuperPoint-TI"}[method]  # fmt: skip
    assert f"{paper}: {method}" in rows
    if described:
        third = table_rows(markdown, "Table 3")
        assert f"{paper.rpartition('-')[0]}: {method}" in third
        if method == "lift":
            assert "LIFT + HardNet: lift-u" in third
    missing = tmp_path / "theirs" / "v_graf"
    for file in missing.iterdir():
        file.unlink()
    failed = foreign_features.convert(method, tmp_path / "theirs", tmp_path / "again", hpatches)
    assert [line.split(":")[0] for line in failed] == ["v_graf/1.ppm", "v_graf/2.ppm"]


def test_unusable_features_of_other_methods_are_listed(tmp_path, monkeypatch, capsys):
    """Damaged files, files of another version, positions that are not numbers or outside."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import foreign_features

    images, theirs = tmp_path / "images", tmp_path / "theirs"
    (images / ".thumbnails").mkdir(parents=True)
    Image.new("L", (64, 48)).save(images / ".thumbnails" / "hidden.png")
    rng = np.random.default_rng(0)
    reasons = {
        "empty": "is damaged",
        "v7.3": "NotImplementedError",
        "nan": "from [nan, nan] to [nan, nan]",
        "outside": "from [3.0, 4.0] to [64.5, 8.0], but the image has (64, 48) pixels",
    }
    for name in ("good", *reasons):
        Image.new("L", (64, 48)).save(images / f"{name}.png")
        xy = np.array([[3.0, 4.0], [{"nan": np.nan, "outside": 64.5}.get(name, 60.0), 8.0]])
        xy[:, 1] += np.nan if name == "nan" else 0
        stand_in("tilde", theirs, f"{name}.png", xy, rng)
    (theirs / "empty.mat").write_bytes(b"")
    version = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    (theirs / "v7.3.mat").write_bytes(version + bytes(512))
    arguments = ["tilde", theirs, tmp_path / "ours", "--images", images]
    with pytest.raises(SystemExit) as ended:
        foreign_features.main([str(argument) for argument in arguments])
    assert ended.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(reasons)
    for name, reason in reasons.items():
        assert any(line.startswith(f"failed: {name}.png: ") and reason in line for line in lines)
    assert len(np.load(tmp_path / "ours" / "good.png.kpt.npy")) == 2
    # the same for archives of NumPy
    (theirs / "good.npz").write_bytes(b"")
    (theirs / "nan.npz").write_bytes(b"PK\x03\x04" + bytes(60))
    failed = foreign_features.convert("superpoint", theirs, tmp_path / "other", images)
    assert any(line.startswith("good.png: EOFError") for line in failed)
    assert any(line.startswith("nan.png: BadZipFile") for line in failed)
