"""Exported networks and pipelines: their numbers in ONNX Runtime are those of torch."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from helpers import call
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
from tiepoints.pyramid import SCALE_STEP
from tiepoints.weights import load, save, weights_checksum

export = pytest.importorskip("tiepoints.export")


def picture(size: tuple[int, int]) -> torch.Tensor:
    return export._picture(size)


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


@pytest.mark.parametrize("name", ["hardnet", "sosnet", "hynet"])
def test_modules_for_export_describe_patches_as_their_networks(name):
    net, patches = load(name), export._patches(5)
    with torch.inference_mode():
        torch.testing.assert_close(
            network_graph(net).eval()(patches), net(patches), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("options", "count", "least"),
    [
        ({"detector": "sobelnet", "descriptor": "desnet"}, 120, 120),
        ({"detector": "keynet", "descriptor": "hardnet"}, 60, 60),
        ({"detector": "keynet", "descriptor": "none", "single_scale": True}, 2000, 100),
        ({"detector": "sobelnet", "descriptor": "none", "per_scale": True}, 200, 200),
        ({"detector": "sobelnet", "descriptor": "none", "nms_window": 5, "border": 3}, 300, 300),
    ],
)
def test_the_module_of_a_pipeline_finds_the_features_of_extraction(options, count, least):
    image = picture((201, 260))
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
    chosen = ExtractOptions(detector="sobelnet", descriptor="none", device="cpu")
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
    monkeypatch.setattr(export, "_translate", lambda *_: negation())
    code, _, err = call("export", "keynet-tiny", "--output", tmp_path / "x.onnx")
    assert (code, "differs from torch" in err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_the_check_of_a_pipeline_compares_with_torch():
    pytest.importorskip("onnxruntime")
    session = Extractor().session
    options = ExtractOptions(detector="sobelnet", descriptor="desnet")
    assert export._check_pipeline(session, options) < 1e-3
    with pytest.raises(export.DataError, match="it was not written"):
        export._check_pipeline(session, replace(options, single_scale=True))


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


@pytest.mark.filterwarnings("ignore")
def test_tracing_a_network_of_several_sizes_is_refused():
    """The trace would be silently wrong for images of other sizes."""
    with pytest.raises(RuntimeError, match="tiepoints export"):
        torch.jit.trace(load("keynet"), torch.rand(1, 1, 64, 64))
