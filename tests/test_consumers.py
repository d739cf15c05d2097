"""Exported files in the programs of others: ONNX Runtime from C++, OpenVINO, and OpenCV."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import texture
from tiepoints.lite import DATA, Extractor, graphs
from tiepoints.weights import load

EXAMPLE = Path(__file__).parents[1] / "examples" / "cpp"
PIPELINE = DATA / graphs()["sobelnet+desnet"]["file"]
#: Folder with include/onnxruntime_cxx_api.h and lib/libonnxruntime.so.
RUNTIME = os.environ.get("ONNXRUNTIME_DIR")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The example, compiled."""
    if RUNTIME is None or not shutil.which("cmake"):
        pytest.skip("needs CMake, and a release of ONNX Runtime in ONNXRUNTIME_DIR")
    build = tmp_path_factory.mktemp("cpp")
    options = [f"-DONNXRUNTIME_DIR={RUNTIME}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"]
    for command in (
        ["cmake", "-S", EXAMPLE, "-B", build, *options],
        ["cmake", "--build", build],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "extract"


def test_the_program_in_c_gives_the_features_of_lite(program, tmp_path):
    """Of a color and of a gray image, with a comment in its header."""
    image = texture(0, (230, 170)).convert("RGB")
    image.save(tmp_path / "a.ppm")
    image.convert("L").save(tmp_path / "b.pgm")
    content = (tmp_path / "b.pgm").read_bytes()
    (tmp_path / "b.pgm").write_bytes(content.replace(b"P5\n", b"P5\n# a comment\n", 1))
    extractor = Extractor(PIPELINE, num_keypoints=300, max_size=None)
    for name in ("a.ppm", "b.pgm"):
        command = [program, PIPELINE, tmp_path / name, "300"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = np.array([line.split() for line in out.splitlines()], float)
        expected = extractor.extract(tmp_path / name)
        assert len(expected) > 100
        np.testing.assert_allclose(found[:, :2], expected.keypoints, atol=1e-3)
        np.testing.assert_allclose(found[:, 2], expected.scales, atol=1e-3)
        np.testing.assert_allclose(found[:, 3], expected.scores, rtol=1e-4)
        np.testing.assert_allclose(found[:, 4:], expected.descriptors, atol=1e-4)


@pytest.mark.parametrize(
    ("content", "count", "message"),
    [
        (None, "9", "no file"),
        (b"\xff\xd8\xff", "9", "is no binary PGM or PPM file"),
        (b"P5 8 40 255\n" + bytes(320), "9", "has 8 x 40 pixels; sides must be 16"),
        (b"P5 40 40 65535\n" + bytes(3200), "9", "has more than 8 bits"),
        (b"P6 40 40 255\n" + bytes(99), "9", "has fewer pixels than its header says"),
        (b"P5 40", "9", "its header ends early"),
        (b"P5 40 40 255\n" + bytes(1600), "0", "MAX_KEYPOINTS must be at least 1"),
    ],
)
def test_the_program_in_c_refuses_invalid_input(program, tmp_path, content, count, message):
    path = tmp_path / "image.pgm"
    if content is not None:
        path.write_bytes(content)
    done = subprocess.run([program, PIPELINE, path, count], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_openvino_runs_a_pipeline():
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    model = core.compile_model(core.read_model(PIPELINE), "CPU", settings)
    # the weakest of more keypoints have scores of 1e-5 of the largest: rounding moves them
    extractor = Extractor(PIPELINE, num_keypoints=60)
    for size in ((200, 150), (161, 183)):
        image = np.asarray(texture(1, size).convert("L"), np.float32) / 255
        result = model({"image": image[None, None], "max_keypoints": np.array([60])})
        xy, scales, _, descriptors = (result[output] for output in model.outputs)
        expected = extractor.extract_gray(image)
        a, b = np.c_[expected.keypoints, expected.scales], np.c_[xy, scales]
        distance = np.abs(a[:, None] - b[None]).max(axis=2)
        common = distance.min(axis=1) < 1e-2
        assert len(a) == len(b) == 60
        assert common.mean() > 0.97
        near = distance.argmin(axis=1)[common]
        cosines = (descriptors[near] * expected.descriptors[common]).sum(axis=1)
        assert cosines.min() > 0.999


def test_opencv_runs_a_network(tmp_path):
    cv2 = pytest.importorskip("cv2")
    pytest.importorskip("onnxruntime")
    export = pytest.importorskip("tiepoints.export")
    net = load("hardnet-light")
    export.export_network("hardnet-light", tmp_path / "net.onnx")
    graph = cv2.dnn.readNetFromONNX(str(tmp_path / "net.onnx"))
    for count in (7, 3):
        patches = export.patches(count)
        graph.setInput(patches.numpy())
        with torch.inference_mode():
            np.testing.assert_allclose(graph.forward(), net(patches).numpy(), atol=1e-4)
