"""Exported networks and pipelines: their numbers in ONNX Runtime are those of torch."""

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import tiepoints
from helpers import call, texture
from tiepoints import export_checks
from tiepoints.backends import cosine
from tiepoints.extract import ExtractOptions
from tiepoints.graphs import (
    LEAST_SIDE,
    MAX_SIDE,
    DesNetGraph,
    KeyNetGraph,
    PipelineGraph,
    SobelNetGraph,
    enlarged,
    keynet_factor,
    network_graph,
    reduced,
    sobelnet_side,
    times,
)
from tiepoints.lite import Extractor
from tiepoints.models.keynet import KeyNet, pyramid_level_size
from tiepoints.models.sobelnet import SobelNet, level_size
from tiepoints.names import PATCH_DESCRIPTORS
from tiepoints.pyramid import SCALE_STEP
from tiepoints.weights import DATA, int8_graph, load, save, weights_checksum

export = pytest.importorskip("tiepoints.export")


#: A file as `tiepoints quantize` writes it.
INT8_FILE = int8_graph("desnet")


def picture(size: tuple[int, int]) -> torch.Tensor:
    return export.picture(size)


@pytest.mark.parametrize("factor", [1.1, 1.2, 1.3, 1.5, 2.0])
def test_level_sizes_of_keynet_are_those_of_the_network(factor):
    fraction = keynet_factor(factor)
    for side in range(1, 3000):
        assert times(side, fraction) == int(side // factor)
    assert pyramid_level_size(100, 131, 1.2) == tuple(
        times(n, keynet_factor(1.2)) for n in (100, 131)
    )


def test_level_sizes_are_those_of_the_pyramid_and_of_sobelnet():
    for side in range(1, MAX_SIDE + 1):
        for level in (1, 2):
            assert enlarged(side, level) == int(side * SCALE_STEP**level)
        assert reduced(side) == max(int(side // SCALE_STEP), LEAST_SIDE)
    for side in range(1, 2 * MAX_SIDE + 1):
        for level in (1, 2):
            assert sobelnet_side(side, level) == level_size(side, side, level)[0]


@pytest.mark.parametrize(
    ("net", "kind"),
    [
        (load("sobelnet"), SobelNetGraph),
        (load("keynet"), KeyNetGraph),
        (load("keynet-tiny"), KeyNetGraph),
        (KeyNet(handcrafted="first", score="softplus", structure=0.5).eval(), KeyNetGraph),
        (load("desnet"), DesNetGraph),
    ],
)
def test_modules_for_export_compute_the_maps_of_their_networks(net, kind):
    graph = network_graph(net).eval()
    assert isinstance(graph, kind)
    with torch.inference_mode():
        for size in ((64, 80), (61, 83)):
            expected = net(picture(size))
            scale = float(expected.abs().max())
            torch.testing.assert_close(
                graph(picture(size)) / scale, expected / scale, atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("name", PATCH_DESCRIPTORS)
def test_modules_for_export_describe_patches_as_their_networks(name):
    net = load(name)
    patches = export.patches(5, len(net.spec.reach))
    with torch.inference_mode():
        torch.testing.assert_close(
            network_graph(net).eval()(patches), net(patches), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("options", "count", "least"),
    [
        ({"detector": "sobelnet", "descriptor": "desnet"}, 120, 120),
        ({"detector": "keynet", "descriptor": "hardnet"}, 60, 60),
        ({"detector": "keynet-light", "descriptor": "hardnet-context"}, 60, 60),
        ({"detector": "keynet", "descriptor": "none", "single_scale": True}, 2000, 100),
        ({"detector": "sobelnet", "descriptor": "none", "per_scale": True}, 200, 200),
        ({"detector": "sobelnet", "descriptor": "none", "nms_window": 5, "border": 3}, 300, 300),
    ],
)
def test_the_module_of_a_pipeline_finds_the_features_of_extraction(options, count, least):
    check_pipeline(options, count, least, picture((201, 260)))


def test_surroundings_of_keypoints_in_small_images():
    """From levels that are too small for the detector, and none of a few pixels."""
    options = {"detector": "keynet-light", "descriptor": "hardnet-context"}
    for size in ((64, 80), (50, 300)):
        check_pipeline(options, 40, 10, picture(size))


def check_pipeline(options, count, least, image):
    chosen = ExtractOptions(**options, num_keypoints=count, device="cpu", precision="float32")
    expected = chosen.build().extract_tensor(image)[0]
    assert len(expected) >= least
    graph = export.pipeline_graph(chosen)
    with torch.inference_mode():
        xy, scales, scores, *rest = graph(image, torch.tensor([count]))
    torch.testing.assert_close(xy, expected.xy, atol=1e-3, rtol=0)
    torch.testing.assert_close(scales, expected.scale, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores, expected.score, atol=1e-4, rtol=1e-4)
    assert bool(rest) == chosen.described
    if rest:
        torch.testing.assert_close(rest[0], expected.descriptors, atol=1e-4, rtol=0)


def test_plateaus_and_color():
    """One keypoint per plateau; RGB is converted to gray by the weights of the readers."""
    image = torch.zeros(1, 1, 90, 90)
    image[..., 40:44, 40:44] = 1
    chosen = ExtractOptions(
        detector="sobelnet", descriptor="none", device="cpu", precision="float32"
    )
    expected = chosen.build().extract_tensor(image)[0]
    graph: PipelineGraph = export.pipeline_graph(chosen)
    with torch.inference_mode():
        for given in (image, image.repeat(1, 3, 1, 1)):
            xy = graph(given, torch.tensor([100]))[0]
            torch.testing.assert_close(xy, expected.xy, atol=1e-3, rtol=0)


def test_export_of_a_network(tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = SobelNet().eval()
    save(net, tmp_path / "mine.safetensors")
    path = tmp_path / "mine.onnx"
    code, out, _ = call("export", tmp_path / "mine.safetensors", "--output", path, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["form"] == "network"
    assert report["size"] == path.stat().st_size
    assert report["difference"] < 1e-4
    model = onnx.load(path)
    found = {item.key: item.value for item in model.metadata_props}
    assert found["tiepoints.network"] == "mine.safetensors"
    assert found["tiepoints.network_weights"] == weights_checksum(net)
    assert found["tiepoints.coordinates"].startswith("x right, y down")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ((16, 90), (123, 75)):
        image = picture(size)
        with torch.inference_mode():
            expected = net(image).numpy()
        np.testing.assert_allclose(
            session.run(None, {"image": image.numpy()})[0], expected, atol=1e-5
        )


def negation() -> Any:
    """A model that is no translation of any network."""
    onnx = pytest.importorskip("onnx")
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", 1, "h", "w"])
        for name in ("image", "scores")
    ]
    node = onnx.helper.make_node("Neg", ["image"], ["scores"])
    graph = onnx.helper.make_graph([node], "negation", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)


def test_a_wrong_network_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "convert", lambda *_, **__: negation())
    code, _, err = call("export", "keynet-tiny", "--output", tmp_path / "x.onnx")
    assert (code, "differs from torch" in err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_the_check_of_a_pipeline_compares_with_torch():
    pytest.importorskip("onnxruntime")
    run = export.Runner(Extractor().session, "pipeline")
    options = ExtractOptions(detector="sobelnet", descriptor="desnet", precision="float32")
    assert export.check_pipeline(run, options) < 1e-3
    with pytest.raises(export.DataError, match="it was not written"):
        export.check_pipeline(run, replace(options, single_scale=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--form", "network"], "requires the name of a network"),
        (["sobelnet", "--form", "pipeline"], "takes --detector and --descriptor"),
        (["rekd"], "cannot be exported"),
        (["nothing"], "nothing"),
        (["--detector", "rekd"], "cannot be exported"),
        (["--detector", "rekd-light", "--descriptor", "none"], "cannot be exported"),
        (["--descriptor", "rootsift"], "rootsift cannot be exported"),
        (["--nms-size", 4], "nms_window must be odd"),
        (["--form", "tensorrt"], "'tensorrt' is not one of"),
        (["sobelnet", "--form", "colmap"], "--form colmap takes --detector and --descriptor"),
        (["--form", "colmap", "--descriptor", "none"], "the form colmap needs a descriptor"),
        (["sobelnet", "--opset", 17], "opset 17 is too old"),
        (["sobelnet", "--opset", 40], "opset must be 18 to 21"),
        (["hynet", "--int8"], "no eight-bit graph of hynet; make one with `tiepoints quantize`"),
        (["--detector", "keynet-tiny", "--descriptor", "hynet", "--int8"], "keynet-tiny or hynet"),
        ([INT8_FILE], "has weights of eight bits; export it with --int8"),
    ],
)
def test_wrong_arguments_of_export(tmp_path, arguments, message):
    pytest.importorskip("onnx")
    code, _, err = call("export", *arguments, "--output", tmp_path / "x.onnx")
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


def test_the_output_must_be_an_onnx_file(tmp_path):
    code, _, err = call("export", "sobelnet", "--output", tmp_path / "x.bin")
    assert (code, "must end in .onnx" in err) == (2, True)
    arguments = ("export", "desnet", "--detector", "sobelnet", "--output", tmp_path / "x.onnx")
    code, _, err = call(*arguments)
    assert (code, "--detector is an option of a pipeline" in err) == (2, True)
    code, _, err = call("export", "affnet", "--output", tmp_path / "x.onnx")
    assert (code, "affnet: affine shapes cannot be exported" in err) == (2, True)


def test_an_unknown_form_and_an_older_torch(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    options = ExtractOptions(detector="sobelnet", descriptor="desnet", precision="int8")
    with pytest.raises(ValueError, match="form must be one of pipeline, colmap; got 'network'"):
        export.export_pipeline(options, tmp_path / "x.onnx", form="network")
    monkeypatch.delattr(torch.onnx, "ops")
    with pytest.raises(ImportError, match=r"needs torch 2\.8"):
        export.export_pipeline(options, tmp_path / "x.onnx")


@pytest.mark.parametrize("module", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = call("export", "sobelnet", "--output", tmp_path / "x.onnx")
    assert (code, f"needs {module}: pip install 'tiepoints[onnx]'" in err) == (2, True)


# ---- COLMAP


def as_colmap(session: Any, pixels: np.ndarray, count: int, min_score: float = 0.2) -> Any:
    """Positions and descriptors of an image (H,W,3) uint8 as COLMAP takes them from a file for its
    ALIKED extractor; its pixels have their corners at whole numbers.
    """
    h, w = pixels.shape[:2]
    image = (pixels / np.float32(255)).transpose(2, 0, 1)
    image = np.pad(image, ((0, 0), (0, -h % 32), (0, -w % 32)), mode="edge")[None]
    feeds = {
        "image": image,
        "max_keypoints": np.array(count),
        "min_score": np.array(min_score, np.float32),
    }
    keypoints, descriptors, scores = session.run(None, feeds)
    assert keypoints.shape == (1, scores.shape[1], 2)
    assert descriptors.shape == (1, scores.shape[1], 128)
    assert ((scores >= min_score) & (scores <= 1)).all()
    assert (np.diff(scores) <= 0).all()
    xy = (keypoints[0] + 1) * [0.5 * (image.shape[3] - 1), 0.5 * (image.shape[2] - 1)] + 0.5
    inside = ((xy >= 0) & (xy < [w, h])).all(axis=1)
    return xy[inside], descriptors[0][inside]


def test_a_file_for_colmap_gives_the_features_of_extract(tmp_path):
    """In eight bits, so that one export shows both."""
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "colmap.onnx"
    options = ["--detector", "sobelnet", "--descriptor", "desnet", "--single-scale", "--int8"]
    code, out, _ = call("export", "--form", "colmap", *options, "--output", path, "--json")
    report = json.loads(out)
    assert (code, report["form"]) == (0, "colmap")
    assert report["fidelity"]["keypoints"] > 0.95
    assert report["fidelity"]["cosine"] > 0.99
    assert path.stat().st_size < 0.72e6 < (DATA / "desnet.safetensors").stat().st_size
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    # what COLMAP compares: names, order, ranks and fixed sizes
    shapes = {one.name: one.shape for one in (*session.get_inputs(), *session.get_outputs())}
    assert list(shapes) == [
        *("image", "max_keypoints", "min_score"),
        *("keypoints", "descriptors", "scores"),
    ]
    assert shapes["image"][1] == 3
    assert shapes["max_keypoints"] == shapes["min_score"] == []
    assert [shapes["keypoints"][i] for i in (0, 2)] == [1, 2]
    assert [shapes["descriptors"][i] for i in (0, 2)] == [1, 128]
    types = [one.type for one in session.get_inputs()]
    assert types == ["tensor(float)", "tensor(int64)", "tensor(float)"]
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["tiepoints.coordinates"].endswith("are at -1 and 1")
    assert "multiples of 32" in metadata["tiepoints.preprocessing"]
    assert metadata["tiepoints.detector_bits"] == metadata["tiepoints.descriptor_bits"] == "8"
    assert json.loads(metadata["tiepoints.options"])["precision"] == "int8"
    chosen = {"single_scale": True, "precision": "int8", "backend": "onnxruntime"}
    extractor = tiepoints.build("sobelnet", "desnet", num_keypoints=200, **chosen)
    for size, limit in (((256, 320), 1e-2), ((250, 301), 0.5)):
        image = texture(0, (size[1], size[0])).convert("RGB")
        expected = extractor.extract(image)
        xy, descriptors = as_colmap(session, np.asarray(image), 200)
        distance = np.abs(expected.keypoints.xy.numpy()[:, None] + 0.5 - xy[None]).max(axis=2)
        common = distance.min(axis=1) < limit
        assert len(expected) > 100
        assert common.mean() >= 0.95, size
        if limit > 1e-2:  # with the repeated border, levels inside the network have other sizes
            continue
        found = descriptors[distance.argmin(axis=1)][common]
        wanted = expected.descriptors.numpy()[common]
        assert (found * wanted).sum(axis=1).min() > 0.999
    assert len(as_colmap(session, np.zeros((40, 70, 3), np.uint8), 50)[0]) == 0


# ---- eight bits


def test_an_eight_bit_network_of_a_file(tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "desnet.onnx"
    code, out, _ = call("export", INT8_FILE, "--int8", "--output", path)
    assert code == 0
    assert out.startswith("network, 0.65 MB")
    model = onnx.load(path)
    assert "QuantizeLinear" in {node.op_type for node in model.graph.node}
    assert all(node.domain == "" for node in model.graph.node)
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used
    onnx.checker.check_model(model)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    image = picture((70, 91))
    with torch.inference_mode():
        expected = load("desnet")(image)
    found = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
    assert cosine(found, expected) > 0.99


def test_networks_that_eight_bits_spoil_are_refused():
    fidelity = {"keypoints": 0.95, "cosine": 0.99}
    assert export_checks.checked(fidelity) == fidelity
    with pytest.raises(export.DataError, match=r"keypoints 0\.850, .*export without --int8"):
        export_checks.checked(fidelity | {"keypoints": 0.85})


def test_a_later_operator_set(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "x.onnx"
    assert call("export", "hardnet-light", "--opset", 21, "--output", path)[0] == 0
    assert [entry.version for entry in onnx.load(path).opset_import] == [21]


@pytest.mark.filterwarnings("ignore")
def test_tracing_a_network_of_several_sizes_is_refused():
    """The trace would be silently wrong for images of other sizes."""
    with pytest.raises(RuntimeError, match="tiepoints export"):
        torch.jit.trace(load("keynet"), torch.rand(1, 1, 64, 64))
