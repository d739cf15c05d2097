"""The page that matches two photographs in a browser: its server, and the page in Chromium."""

import base64
import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

import tiepoints
from browser import CHROMIUM, Browser
from helpers import call, texture
from tiepoints.errors import DataError
from tiepoints.estimation import estimate
from tiepoints.jobs import serve
from tiepoints.names import MATCH_MAX_SIZE

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
STATE = "document.body?.dataset.state"
FINISHED = f"['done', 'error'].includes({STATE})"
STATUS = "document.getElementById('status').textContent"

#: Stands in for ONNX Runtime: keypoints on a grid, whose descriptors are 3 x 3 pixels around them.
FAKE_RUNTIME = """
export const env = { wasm: {} };
export class Tensor {
  constructor(type, data, dims) { Object.assign(this, { type, data, dims }); }
}
const run = async ({ image, max_keypoints }) => {
  const [h, w] = image.dims.slice(2), xy = [], rows = [];
  for (let y = 8; y < h - 8; y += 8) for (let x = 8; x < w - 8; x += 8) {
    if (xy.length / 2 >= Number(max_keypoints.data[0])) break;
    let row = [];
    for (let j = -6; j < 7; j += 2) for (let i = -6; i < 7; i += 2) {
      row.push(image.data[(y + j) * w + x + i]);
    }
    const mean = row.reduce((a, b) => a + b) / row.length;
    row = row.map((v) => v - mean);
    const norm = Math.hypot(...row) || 1;
    xy.push(x, y);
    rows.push(...row.map((v) => v / norm));
  }
  return {
    keypoints: new Tensor("float32", Float32Array.from(xy), [xy.length / 2, 2]),
    scales: new Tensor("float32", new Float32Array(xy.length / 2).fill(1), [xy.length / 2]),
    descriptors: new Tensor("float32", Float32Array.from(rows), [xy.length / 2, 49]),
  };
};
export const InferenceSession = { create: async () => ({ run }) };
"""


@pytest.fixture
def runtime(tmp_path) -> Path:
    folder = tmp_path / "runtime"
    folder.mkdir()
    for name in serve.RUNTIME_FILES:
        (folder / name).write_text("// nothing\n")
    (folder / serve.RUNTIME_FILES[0]).write_text(FAKE_RUNTIME)
    return folder


@pytest.fixture
def address(runtime, tmp_path):
    """Address of a running server with two graphs."""
    graphs = [tmp_path / f"{name}.onnx" for name in ("one", "two")]
    for path in graphs:
        path.write_bytes(path.stem.encode())
    yield from running(graphs, runtime)


def running(graphs, runtime):
    server = serve.make_server(serve.site(graphs, runtime), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


def fetch(address):
    with urllib.request.urlopen(address) as response:
        return response.read(), response.headers


# ---- server


def test_page_runtime_and_graphs_are_served(address):
    content, headers = fetch(address)
    assert b"<title>tiepoints" in content
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert json.loads(fetch(f"{address}graphs.json")[0]) == [
        {"name": "one", "path": "graphs/one.onnx"},
        {"name": "two", "path": "graphs/two.onnx"},
    ]
    assert fetch(f"{address}graphs/two.onnx?x=1")[0] == b"two"
    content, headers = fetch(f"{address}runtime/{serve.RUNTIME_FILES[1]}")
    assert headers["Content-Type"].startswith("text/javascript")
    assert fetch(f"{address}runtime/{serve.RUNTIME_FILES[2]}")[1]["Content-Type"] == (
        "application/wasm"
    )
    request = urllib.request.Request(f"{address}app.js", method="HEAD")
    with urllib.request.urlopen(request) as response:
        assert int(response.headers["Content-Length"]) > 1000
        assert response.read() == b""


@pytest.mark.parametrize(
    "path", ["nothing.js", "../pyproject.toml", "..%2f..%2fweights.py", "graphs/"]
)
def test_other_files_are_not_served(address, path):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(address + path)


def test_offline_list_names_what_is_served(address):
    text = fetch(f"{address}offline.js")[0].decode()
    names = text.partition("FILES = [")[2].partition("]")[0]
    listed = {part.strip().strip('"') for part in names.split(",") if part.strip()}
    assert listed >= {f"runtime/{name}" for name in serve.RUNTIME_FILES} | {"app.js", "worker.js"}
    for name in listed:
        assert fetch(address + name.removeprefix("./"))[0]


def test_graphs_that_cannot_be_served(runtime, tmp_path):
    for graphs, message in (
        ([], "no graph to serve"),
        ([tmp_path / "none.onnx"], "none.onnx is no .onnx file"),
        ([Path(__file__)], "is no .onnx file"),
    ):
        with pytest.raises(DataError, match=message):
            serve.site(graphs, runtime)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.onnx").touch()
    with pytest.raises(DataError, match=r"two graphs are named x\.onnx"):
        serve.site([tmp_path / "a" / "x.onnx", tmp_path / "b" / "x.onnx"], runtime)


def test_command_writes_the_page_to_a_folder(runtime, tmp_path):
    (tmp_path / "g.onnx").write_bytes(b"graph")
    arguments = ["serve", "--runtime", runtime, "--graph"]
    code, out, _ = call(*arguments, tmp_path / "g.onnx", "--output", tmp_path / "site")
    assert (code, out) == (0, f"page -> {tmp_path / 'site' / 'index.html'}\n")
    assert (tmp_path / "site" / "graphs" / "g.onnx").read_bytes() == b"graph"
    assert (tmp_path / "site" / "runtime" / serve.RUNTIME_FILES[2]).is_file()
    assert json.loads((tmp_path / "site" / "graphs.json").read_text())[0]["name"] == "g"
    code, _, error = call(*arguments, tmp_path / "none.onnx")
    assert code == 2
    assert "is no .onnx file" in error
    code, _, error = call("serve", "--runtime", tmp_path, "--graph", tmp_path / "g.onnx")
    assert code == 2
    assert "must be the folder dist of the npm package onnxruntime-web" in error


def test_used_port_is_named(address, runtime, tmp_path):
    port = address.rpartition(":")[2].strip("/")
    arguments = ["--runtime", runtime, "--graph", tmp_path / "one.onnx", "--no-browser"]
    code, _, error = call("serve", "--port", port, *arguments)
    assert code == 2
    assert f"port {port} cannot be used" in error


def test_server_ends_by_signal(runtime, tmp_path):
    (tmp_path / "g.onnx").write_bytes(b"graph")
    arguments = ["--graph", tmp_path / "g.onnx", "--runtime", runtime, "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tiepoints", "serve", *arguments, "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background of a shell ignores SIGINT, and so do its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    line = process.stdout.readline()
    assert line.endswith("(stop with Ctrl-C)\n")
    assert fetch(f"{line.split()[0]}graphs/g.onnx")[0] == b"graph"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")


def test_runtime_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    package = io.BytesIO()
    with tarfile.open(fileobj=package, mode="w:gz") as archive:
        for name in serve.RUNTIME_FILES:
            data = name.encode()
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (tmp_path / "package.tgz").write_bytes(package.getvalue())
    url = (tmp_path / "package.tgz").as_uri()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="another checksum"):
        serve.find_runtime(url=url)
    assert not (tmp_path / "cache").exists()
    digest = base64.b64encode(hashlib.sha512(package.getvalue()).digest()).decode()
    monkeypatch.setattr(serve, "RUNTIME_SHA512", digest)
    folder = serve.find_runtime(url=url)
    assert sorted(path.name for path in folder.iterdir()) == sorted(serve.RUNTIME_FILES)
    assert (folder / serve.RUNTIME_FILES[2]).read_bytes() == serve.RUNTIME_FILES[2].encode()
    (tmp_path / "package.tgz").unlink()
    assert serve.find_runtime(url=url) == folder
    (folder / serve.RUNTIME_FILES[0]).unlink()
    with pytest.raises(DataError, match=r"could not be downloaded .* --runtime"):
        serve.find_runtime(url=url)


# ---- page


@needs_chromium
def test_page_matches_images_and_reports_broken_ones(address, tmp_path):
    image = texture(0, (400, 300))
    image.crop((0, 0, 320, 240)).save(tmp_path / "a.png")
    image.crop((16, 8, 336, 248)).save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nonsense")
    with Browser(tmp_path / "profile") as browser:
        browser.open(address)
        browser.wait(f"{STATE} == 'ready'")
        assert browser.run("[...document.getElementById('graph').options].map(o => o.text)") == [
            "one",
            "two",
        ]
        browser.choose_file("[data-index='0'] input", tmp_path / "broken.png")
        browser.wait(f"{STATE} == 'error'")
        assert "broken.png is not an image that this browser can read" in browser.run(STATUS)
        assert browser.run("document.getElementById('run').disabled")
        browser.choose_file("[data-index='0'] input", tmp_path / "a.png")
        browser.choose_file("[data-index='1'] input", tmp_path / "b.png")
        browser.wait("!document.getElementById('run').disabled")
        browser.run("document.getElementById('run').click()")
        browser.wait(FINISHED)
        result = downloaded(browser)
        assert result["keypoints"] == [1024, 1024]
        shift = np.array([np.subtract(m["a"], m["b"]) for m in result["matches"] if m["inlier"]])
        assert len(shift) > 500
        assert (shift == [16, 8]).all(axis=1).mean() > 0.99
        assert [image["name"] for image in result["images"]] == ["a.png", "b.png"]
        assert set(result["milliseconds"]) >= {"features of image 1", "matching", "geometry"}
        assert "inliers" in browser.run("document.getElementById('canvas').ariaLabel")
        colors = browser.run(
            "(() => { const c = document.getElementById('canvas'); const d = c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data; return new Set(d).size })()"
        )
        assert colors > 50


def downloaded(browser) -> dict:
    """The content of the file of matches."""
    return json.loads(
        browser.run(
            "new Promise((resolve) => {"
            "  const create = URL.createObjectURL;"
            "  URL.createObjectURL = (blob) => { blob.text().then(resolve); return create(blob); };"
            "  document.getElementById('download').click();"
            "  URL.createObjectURL = create;"
            "})"
        )
    )


@needs_chromium
def test_matching_and_geometry_agree_with_ours(address, tmp_path):
    """Three-dimensional points in two views, with outliers and noise."""
    rng = np.random.default_rng(0)
    points = rng.uniform([-2, -1.5, 4], [2, 1.5, 8], (300, 3))
    angle = 0.1
    rotation = np.array(
        [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    )
    moved = points @ rotation.T + [0.5, 0.1, 0.2]
    a, b = (500 * p[:, :2] / p[:, 2:] + [320, 240] for p in (points, moved))
    b = b + rng.normal(0, 0.3, b.shape)
    b[200:] = rng.uniform([0, 0], [640, 480], (100, 2))
    descriptors = rng.normal(size=(2, 300, 32)).astype(np.float32)
    descriptors[1] = 0.2 * descriptors[1] + descriptors[0]
    descriptors /= np.linalg.norm(descriptors, axis=2, keepdims=True)
    script = (
        "import('./match.js').then(({ mutualMatches, fundamental }) => {"
        f" const [a, b] = {json.dumps([d.ravel().tolist() for d in descriptors])};"
        f" const points = {json.dumps(np.hstack([a, b]).tolist())};"
        " return [mutualMatches(a, b, 32), fundamental(points, 2)] })"
    )
    with Browser(tmp_path / "profile") as browser:
        browser.open(address)
        browser.wait(f"{STATE} == 'ready'")
        matches, found = browser.run(script)
        few = browser.run(
            "import('./match.js').then(m => [m.mutualMatches([], [], 32),"
            " m.fundamental([[1, 2, 3, 4]], 2)])"
        )
    from tiepoints.matching import match
    from tiepoints.structs import Features, Keypoints

    ones = torch.ones(300)
    features = [
        Features(Keypoints(torch.zeros(300, 2), ones, ones, ones), torch.from_numpy(d), (640, 480))
        for d in descriptors
    ]
    ours = match(*features).index.tolist()
    assert [[m["a"], m["b"]] for m in matches] == ours
    assert len(ours) > 250
    expected = estimate(torch.from_numpy(a), torch.from_numpy(b), "fundamental", threshold=2.0)
    inliers = np.array(found["inliers"])
    assert inliers[:200].mean() > 0.95
    assert (inliers == expected.inliers.numpy()).mean() > 0.93
    matrix = np.array(found["matrix"]).reshape(3, 3)
    ends = [np.hstack([p[:200], np.ones((200, 1))]) for p in (a, b)]
    lines = ends[0] @ matrix.T
    distance = np.abs((ends[1] * lines).sum(1)) / np.linalg.norm(lines[:, :2], axis=1)
    assert np.median(distance) < 1
    assert few[0] == []
    assert few[1]["matrix"] is None


def run_in_node(folder: Path, name: str, expression: str):
    """Value of a JavaScript expression with the function ``name`` of match.js."""
    # without a package.json, a module is a file that ends in .mjs
    module = folder / "match.mjs"
    module.write_text((Path(serve.__file__).parents[1] / "web" / "match.js").read_text())
    script = (
        f"import {{ {name} }} from {json.dumps(module.as_uri())};"
        f" console.log(JSON.stringify({expression}));"
    )
    command = ["node", "--input-type=module", "-e", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_constants_are_those_of_the_package():
    """Two languages have them, so they could become different."""
    from tiepoints import matching, names, verification

    folder = Path(serve.__file__).parents[1] / "web"
    found = {
        name: float(value)
        for script in ("match.js", "worker.js")
        for name, value in re.findall(r"\b([A-Z_]+) = ([\d.e-]+)", (folder / script).read_text())
    }
    sample, solutions = verification.SAMPLES["fundamental"]
    expected = {"SAMPLE": sample, "SOLUTIONS": solutions, "MIN_NEIGHBORS": names.MIN_NEIGHBORS}
    shared = (
        *("NEIGHBORS", "NEIGHBOR_DISTANCE", "POSITION_ERROR", "MAX_DEVIATION", "MAX_SCALE_CHANGE"),
        *("ROTATION_BINS", "LINEAR_STEPS", "PRIOR_NEIGHBORS"),
    )
    expected |= {name: getattr(matching, name) for name in shared}
    expected |= {name: getattr(verification, name) for name in ("FALSE_ALARMS", "RANDOM_PAIRS")}
    expected |= {"THRESHOLD": tiepoints.MatchOptions().threshold}
    assert found == {**expected, "MAX_SIZE": MATCH_MAX_SIZE}


@needs_node
def test_noise_leaves_as_many_inliers_as_in_python(tmp_path):
    """A few samples free of outliers find fewer."""
    rng = np.random.default_rng(0)
    world = rng.uniform([-2, -1.5, 4], [2, 1.5, 8], (300, 3))
    a, b = (
        500 * p[:, :2] / p[:, 2:] + [320, 240] for p in (world, world + np.array([0.5, 0.1, 0.2]))
    )
    points = np.hstack([a, b]) + rng.normal(0, 0.5, (300, 4))
    points[250:] = rng.uniform(0, 480, (50, 4))
    options = [f"fundamental({json.dumps(points.tolist())}, 2, {{ seed: {i} }})" for i in range(5)]
    found = run_in_node(tmp_path, "fundamental", f"[{', '.join(options)}]")
    xy = torch.from_numpy(points)
    ours = int(estimate(xy[:, :2], xy[:, 2:], "fundamental", threshold=2.0).inliers.sum())
    assert min(sum(each["inliers"]) for each in found) > 0.98 * ours > 200


@needs_node
def test_a_shifted_image_has_inliers(tmp_path):
    """Many fundamental matrices fit it exactly, so that seven points leave more than two free."""
    points = [[x, y, x + 16.0, y + 8.0] for x in range(0, 200, 20) for y in range(0, 100, 20)]
    found = run_in_node(tmp_path, "fundamental", f"fundamental({json.dumps(points)}, 2)")
    assert all(found["inliers"])
    assert np.linalg.matrix_rank(np.reshape(found["matrix"], (3, 3)), tol=1e-9) == 2


@needs_node
def test_chance_is_measured_as_in_python(tmp_path):
    from tiepoints.verification import Correspondences, beyond_chance

    rng = np.random.default_rng(1)
    matrix = np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]])  # a translation along x
    sets = []
    for count in (0, 12, 20, 25, 30, 40, 150):  # correct ones of 200
        points = rng.uniform(0, 600, (200, 4))
        points[:count, 3] = points[:count, 1] + rng.normal(0, 0.5, count)
        sets.append(points)
    sets.append(np.repeat(sets[-1][:8], 20, axis=0))  # eight places
    given = ", ".join(json.dumps(points.tolist()) for points in sets)
    rows = json.dumps(matrix.ravel().tolist())
    found = run_in_node(
        tmp_path, "beyondChance", f"[{given}].map((points) => beyondChance(points, {rows}, 2))"
    )
    expected = []
    for points in sets:
        a, b = torch.from_numpy(points[:, :2]), torch.from_numpy(points[:, 2:])
        matches = Correspondences("fundamental", a, b, None, 2.0)
        agreeing = beyond_chance(matches, torch.from_numpy(matrix).double())
        expected.append(bool(agreeing.any()))
    assert found == expected
    assert 3 <= sum(expected) <= 4
    assert not expected[-1]


@needs_node
def test_neighbors_agree_as_in_python(tmp_path):
    """A rotated, oblique view with incorrect matches and keypoints of several scales."""
    from tiepoints.matching import filter_by_neighbors
    from tiepoints.structs import Features, Keypoints, Matches

    rng = np.random.default_rng(0)
    count = 300
    a, scale_a = rng.uniform(0, 600, (count, 2)), rng.choice([1.0, 1.4, 2.0, 4.0], count)
    linear = np.array([[0.9, 0.5], [-0.3, 0.7]])
    b = a @ linear.T + [100, 200] + rng.normal(0, 1, a.shape)
    scale_b = scale_a * rng.choice([0.7, 1.0], count)
    b[200:] = rng.uniform(0, 600, (100, 2))
    sides = ((a, scale_a), (b, scale_b))
    keypoints = [{"xy": xy.tolist(), "scales": scale.tolist()} for xy, scale in sides]
    indices = json.dumps([{"a": i, "b": i} for i in range(count)])
    given = ", ".join(map(json.dumps, keypoints))
    two, five, none = (
        [match["a"] for match in run_in_node(tmp_path, "agreeingMatches", expression)]
        for expression in (
            f"agreeingMatches({indices}, {given}, 2)",
            f"agreeingMatches({indices}, {given}, 5)",
            f"agreeingMatches([], {given}, 2)",
        )
    )
    features = [
        Features(
            Keypoints(
                torch.from_numpy(xy).float(),
                torch.from_numpy(scale).float(),
                torch.zeros(count),
                torch.ones(count),
            ),
            torch.ones(count, 2),
            (600, 600),
        )
        for xy, scale in sides
    ]
    matches = Matches(torch.arange(count)[:, None].expand(count, 2), torch.ones(count))
    for minimum, kept in ((2, two), (5, five)):
        ours = filter_by_neighbors(*features, matches, minimum).index[:, 0].tolist()
        assert len(set(ours) ^ set(kept)) <= 1  # in double precision
        assert len([i for i in kept if i < 200]) > 150
    assert len(five) < len(two) < 250
    assert none == []


@needs_chromium
def test_page_works_with_the_keyboard_and_offline(runtime, tmp_path):
    """After the first visit, without the server; keys only."""
    (tmp_path / "one.onnx").write_bytes(b"one")
    server = serve.make_server(serve.site([tmp_path / "one.onnx"], runtime), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Browser(tmp_path / "profile", (400, 800)) as browser:
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        browser.wait(f"{STATE} == 'ready'")
        browser.run("navigator.serviceWorker.ready.then(() => true)")
        server.shutdown()
        server.server_close()
        # otherwise the state waited for would be that of the old page
        browser.run("document.body.dataset.state = 'left'; location.reload()")
        browser.wait(f"{STATE} == 'ready'")
        focused = "document.activeElement?.id || document.activeElement?.type"
        reached = []
        for _ in range(12):
            browser.press("Tab")
            reached.append(browser.run(focused))
            if reached[-1] == "count":
                browser.press("ArrowRight")
            if reached[-1] == "example":
                break
        # the button to match is disabled without images
        assert reached == ["file", "file", "graph", "count", "show-keypoints", "example"]
        browser.press("Enter")
        browser.wait(FINISHED)
        assert browser.run(STATE) == "done", browser.run(STATUS)
        assert browser.run("document.getElementById('count-shown').textContent") == "1280"
        assert downloaded(browser)["keypoints"] == [1280, 1280]
        # nothing is wider than a phone
        assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")


@needs_chromium
@pytest.mark.parametrize("path", serve.embedded_graphs(), ids=lambda path: path.stem)
def test_stereo_pair_as_in_python(tmp_path, path):
    """With ONNX Runtime for browsers, if it is on this computer."""
    runtime = serve.cache_folder() / serve.RUNTIME
    if serve.missing_files(runtime):
        pytest.skip("needs ONNX Runtime for browsers in the cache: run `tiepoints serve` once")
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    import tiepoints

    left, right, disparity = data.stereo_motorcycle()
    for name, pixels in (("a.png", left), ("b.png", right)):
        Image.fromarray(pixels).save(tmp_path / name)

    def share(a, b) -> float:
        a, b = np.asarray(a), np.asarray(b)
        x, y = np.round(a).astype(int).T
        true = disparity[y.clip(0, len(left) - 1), x.clip(0, left.shape[1] - 1)]
        known = np.isfinite(true) & (true > 0)
        difference = np.hypot(a[:, 0] - b[:, 0] - true, a[:, 1] - b[:, 1])
        return float((difference[known] <= 2).mean())

    int8 = {"single_scale": True, "precision": "int8"} if "int8" in path.stem else {}
    options = tiepoints.ExtractOptions.of(
        detector=path.stem.split("-")[0],
        descriptor="desnet",
        num_keypoints=1024,
        device="cpu",
        **int8,
    )
    names = [str(tmp_path / name) for name in ("a.png", "b.png")]
    same = tiepoints.MatchOptions(refine=False, retry=False)
    ours = tiepoints.match_two(*names, options, same)
    expected = share(ours.xy_a[ours.estimate.inliers], ours.xy_b[ours.estimate.inliers])
    for address in running([path], runtime):
        with Browser(tmp_path / "profile") as browser:
            browser.open(address)
            browser.wait(f"{STATE} == 'ready'")
            for index, name in enumerate(names):
                browser.choose_file(f"[data-index='{index}'] input", Path(name))
            browser.wait("!document.getElementById('run').disabled")
            browser.run("document.getElementById('run').click()")
            browser.wait(FINISHED, 120)
            assert browser.run(STATE) == "done", browser.run(STATUS)
            found = [m for m in downloaded(browser)["matches"] if m["inlier"]]
    found_share = share([m["a"] for m in found], [m["b"] for m in found])
    assert abs(found_share - expected) <= 0.02
    assert len(found) > 0.9 * int(ours.estimate.inliers.sum()) > 100
