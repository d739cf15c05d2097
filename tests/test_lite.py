"""Extraction without torch: the embedded pipeline, its command, and imports."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import tiepoints
from helpers import call, texture, write_photos
from tiepoints.errors import DataError
from tiepoints.formats.npy import read_features
from tiepoints.image import load_image
from tiepoints.lite import DATA, Extractor, graphs
from tiepoints.reading import ReadOptions, read_gray
from tiepoints.weights import table

pytest.importorskip("onnxruntime")

#: Runs the command line, or Python code, where torch cannot be imported.
WITHOUT_TORCH = """
import sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Hook())
"""


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = WITHOUT_TORCH + "from tiepoints.cli import main\nmain()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor(num_keypoints=300, max_size=None)


@pytest.mark.parametrize("size", [(330, 270), (131, 97), (61, 52)])
def test_features_are_those_of_torch(extractor, size):
    image = texture(3, size)
    expected = tiepoints.build(
        "sobelnet", "desnet", num_keypoints=300, device="cpu", precision="float32"
    ).extract(image)
    found = extractor.extract(image)
    assert found.image_size == expected.image_size == size
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(found.keypoints, expected.xy, atol=2e-3)
    np.testing.assert_allclose(found.scales, expected.scale, rtol=1e-3)
    np.testing.assert_allclose(found.scores, expected.score, rtol=1e-3)
    np.testing.assert_allclose(found.descriptors, expected.descriptors, atol=1e-4)


@pytest.mark.parametrize("size", [(10, 200), (16, 16), (1, 1), (60, 60)])
def test_images_without_keypoints(extractor, size):
    found = extractor.extract(Image.new("L", size, 128))
    assert len(found) == 0
    assert found.keypoints.shape == (0, 2)
    assert found.descriptors is not None
    assert found.descriptors.shape == (0, 128)


def test_large_images_are_reduced_and_positions_are_those_of_the_original():
    image = texture(1, (400, 300))
    expected = tiepoints.build(
        "sobelnet", "desnet", num_keypoints=50, max_size=200, device="cpu", precision="float32"
    ).extract(image)
    found = Extractor(num_keypoints=50, max_size=200).extract(image)
    assert found.keypoints.max() > 250
    np.testing.assert_allclose(found.keypoints, expected.xy, atol=4e-3)
    np.testing.assert_allclose(found.scales, expected.scale, rtol=1e-3)


def test_gray_values_are_those_of_the_tensors(tmp_path):
    photo = texture(2, (90, 70))
    photo.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[274] = 6
    photo.save(tmp_path / "b.jpg", exif=exif)
    Image.fromarray(np.arange(4900, dtype=np.uint16).reshape(70, 70)).save(tmp_path / "c.png")
    for name in ("a.png", "b.jpg", "c.png"):
        found = read_gray(tmp_path / name).pixels
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, load_image(tmp_path / name)[0, 0].numpy())
    upright = read_gray(tmp_path / "b.jpg", ReadOptions(exif_orientation="apply")).pixels
    assert upright.shape == (90, 70)


def test_transparent_pixels_have_no_keypoints(extractor):
    image = texture(5, (200, 160)).convert("RGBA")
    alpha = np.full((160, 200), 255, np.uint8)
    alpha[:, :100] = 0
    image.putalpha(Image.fromarray(alpha))
    found = extractor.extract(image)
    assert len(found) > 10
    assert found.keypoints[:, 0].min() > 105
    assert len(found.descriptors) == len(found.scales) == len(found)


def test_files_are_those_of_extract_and_the_command_resumes(tmp_path):
    photos = write_photos(tmp_path, 2, (160, 130))
    output = tmp_path / "features"
    names = [photos / "0.png", photos / "1.png"]
    done = without_torch("lite", *names, "--output", output, "--num-keypoints", 40, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["done"], report["keypoints"]) == (2, 80)
    base = output / "0.png"
    features = read_features(base)
    expected = Extractor(num_keypoints=40).extract(photos / "0.png")
    np.testing.assert_array_equal(features.xy, expected.keypoints)
    np.testing.assert_array_equal(features.descriptors, expected.descriptors)
    again = call("lite", *names, "--output", output, "--num-keypoints", 40, "--json")
    assert (again[0], json.loads(again[1])["skipped"]) == (0, 2)
    code, _, err = call("lite", *names, "--output", output, "--num-keypoints", 30)
    assert code == 2
    assert "features of other settings" in err
    code, out, _ = call("lite", names[0], "--output", output, "--num-keypoints", 30, "--overwrite")
    assert (code, "1 extracted (30 keypoints" in out) == (0, True)
    assert not (output / "1.png.kpt.npy").exists()
    # the record is that of extract
    code, out, _ = call("info", output, "--json")
    assert code == 0
    assert json.loads(out)["record"]["detector"] == "sobelnet"


def test_a_damaged_image_fails_and_the_others_are_extracted(tmp_path):
    photos = write_photos(tmp_path, 1, (160, 130))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nonsense")
    code, out, err = call("lite", photos, "--output", tmp_path / "out", "--json")
    assert (code, json.loads(out)["done"]) == (1, 1)
    assert "broken.png" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_keypoints": 0}, "num_keypoints"),
        ({"max_size": 3}, "max_size"),
        ({"threads": 0}, "threads"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Extractor(**options)


def test_damaged_and_other_graphs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"known names are sobelnet\+desnet"):
        Extractor(tmp_path / "missing.onnx")
    content = (DATA / graphs()["sobelnet+desnet"]["file"]).read_bytes()
    for name, data in (("empty", b""), ("cut", content[: len(content) // 2]), ("text", b"hello")):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"{name}.onnx is no ONNX file"):
            Extractor(path)
    onnx = pytest.importorskip("onnx")
    one = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1])
    two = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Neg", ["image"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [one], [two])
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(DataError, match="is no pipeline"):
        Extractor(tmp_path / "other.onnx")


def test_a_changed_embedded_graph_is_refused(tmp_path, monkeypatch):
    for path in ("index.toml", graphs()["sobelnet+desnet"]["file"]):
        (tmp_path / path).write_bytes((DATA / path).read_bytes())
    monkeypatch.setattr("tiepoints.lite.DATA", tmp_path)
    Extractor()
    with open(tmp_path / graphs()["sobelnet+desnet"]["file"], "ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match="differs from its checksum"):
        Extractor()


def test_commands_without_torch(tmp_path):
    done = without_torch("--help")
    assert done.returncode == 0
    assert "lite" in done.stdout
    photos = write_photos(tmp_path, 1, (80, 70))
    done = without_torch("extract", photos, "--output", tmp_path / "x")
    assert done.returncode == 2
    assert done.stderr == "error: this command needs torch: pip install torch\n"


def test_metadata_of_the_embedded_graph(extractor):
    entry = graphs()["sobelnet+desnet"]
    assert extractor.sha256 == entry["sha256"]
    assert extractor.metadata["form"] == "pipeline"
    assert extractor.metadata["detector"] == "sobelnet"
    assert extractor.metadata["descriptor_licence"] == entry["licence"]
    digests = json.loads(extractor.metadata["options"])["digests"]
    assert digests["detector"] == table()["sobelnet"]["sha256"]


def test_the_graph_takes_color(extractor):
    """RGB is converted to gray by the weights of the readers."""
    color = np.asarray(texture(4, (120, 100)))
    expected = extractor.extract(color)
    image = np.ascontiguousarray(color.transpose(2, 0, 1)[None], np.float32) / np.float32(255)
    feeds = {"image": image, "max_keypoints": np.array([300])}
    found = extractor.session.run(None, feeds)
    np.testing.assert_allclose(found[0], expected.keypoints, atol=2e-3)
    np.testing.assert_allclose(found[3], expected.descriptors, atol=1e-3)
