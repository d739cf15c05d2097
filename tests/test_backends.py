"""Backends agree with PyTorch, are verified before use, and leave the rest of the package
unchanged.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import call, texture, write_photos
from tiepoints import backends
from tiepoints.backends import GraphStack, cached_graph, run_by
from tiepoints.device import float_precision, processor_features
from tiepoints.errors import WeightsError
from tiepoints.extract import ExtractOptions, build, network_label
from tiepoints.jobs.backends import describe_backends
from tiepoints.jobs.quantize import quantize
from tiepoints.models.spec import fused
from tiepoints.regions import Box, InMemory
from tiepoints.weights import int8_graph, load, table, verify

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
LIBRARIES = ("onnxruntime", "openvino")
INT8 = [name for name, entry in table().items() if "int8" in entry]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(shared_cache, monkeypatch) -> Path:
    """A cache folder of these tests, in which graphs are exported once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache))
    return shared_cache


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Blur(nn.Module):
    """A user's detector: a convolution, and one that cannot be exported."""

    def __init__(self, *, exportable: bool = True):
        super().__init__()
        self.conv, self.exportable = nn.Conv2d(1, 1, 3, padding=1), exportable
        self.floor = 0.0

    def forward(self, image: Tensor) -> Tensor:
        if not self.exportable and image.sum() > 0:  # depends on the values
            image = 2 * image
        return self.conv(image).relu()


def image(size: tuple[int, int] = (117, 93)) -> Tensor:
    gray = np.asarray(texture(3, (size[1], size[0])).convert("L"), np.float32) / 255
    return torch.from_numpy(gray)[None, None]


# ---- results


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("name", ["keynet", "sobelnet", "desnet", "hynet"])
def test_backends_agree_with_torch_at_any_size(name, backend):
    net = load(name)
    quick, plain = run_by(net, backend), fused(net)
    assert quick.stack.backend == backend
    sizes = [(1, 1), (3, 2)] if name == "hynet" else [(64, 64), (61, 83)]
    for size in sizes:
        shape = (size[0], 1, 32, 32) if name == "hynet" else (2, 1, *size)
        given = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.testing.assert_close(quick(given), plain(given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_parts_of_a_map_equal_the_whole_map(backend):
    net = run_by(load("sobelnet"), backend)
    source = InMemory(image((157, 141)))
    box = Box(31, 88, 40, 101)
    whole = Box.whole(source.size)
    part = net.part(source, box)
    torch.testing.assert_close(part, box.crop(net.part(source, whole), whole), rtol=1e-4, atol=1e-6)


def test_features_do_not_depend_on_the_backend():
    found = [
        build("sobelnet", "desnet", num_keypoints=60, backend=name, precision="float32").extract(
            image()[0, 0].numpy()
        )
        for name in ("torch", *LIBRARIES)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other.xy, found[0].xy, rtol=0, atol=1e-2)
        torch.testing.assert_close(other.descriptors, found[0].descriptors, rtol=0, atol=1e-4)


def test_a_network_of_the_user_is_run_whole():
    net = Blur().eval()
    quick = run_by(net, "onnxruntime")
    assert isinstance(quick.stack, GraphStack)
    assert quick.floor == 0.0
    torch.testing.assert_close(quick(image()), net(image()).detach(), rtol=1e-4, atol=1e-5)


def test_a_network_that_cannot_be_exported(caplog):
    net = Blur(exportable=False).eval()
    assert run_by(net, "auto") is net
    with pytest.raises(ValueError, match=r"onnxruntime cannot run a Blur: .*exported"):
        run_by(net, "onnxruntime")


def test_extractors_can_be_copied_to_other_processes():
    extractor = build("sobelnet", None, num_keypoints=20, backend="onnxruntime")
    again = pickle.loads(pickle.dumps(extractor))
    gray = image()[0, 0].numpy()
    assert torch.equal(again.extract(gray).xy, extractor.extract(gray).xy)


# ---- choice


def test_auto_never_exports(empty_cache, monkeypatch):
    faster = {"FusedSobelNet": {"float32": ("onnxruntime",)}}
    monkeypatch.setattr(backends, "FASTER", faster)
    assert not isinstance(run_by(load("sobelnet"), "auto").stack, GraphStack)
    assert not empty_cache.exists()
    run_by(load("sobelnet"), "onnxruntime")
    assert run_by(load("sobelnet"), "auto").stack.backend == "onnxruntime"


def test_auto_takes_bfloat16_where_processors_compute_it():
    features = processor_features()
    native = features["avx512_bf16"] or features["amx_tile"]
    assert float_precision("auto", torch.device("cpu")) == ("bfloat16" if native else "float32")
    expected = torch.bfloat16 if native else torch.float32
    extractor = build("keynet-tiny", "desnet", backend="torch")
    assert extractor.describe.net.dtype == expected
    assert extractor.detect.net.plain[0].weight.dtype == expected
    official = build("keynet", "desnet", official=True, backend="torch")
    assert official.detect.net.plain[0].weight.dtype == torch.float32


@pytest.mark.parametrize("detector", ["keynet", "keynet-tiny", "sobelnet", "rekd-light"])
@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_detectors_in_bfloat16_find_the_same_keypoints(detector, backend):
    options = {"num_keypoints": 60, "single_scale": True, "device": "cpu"}
    gray = image((93, 127))[0, 0].numpy()
    exact = build(detector, None, precision="float32", backend="torch", **options).extract(gray)
    half = build(detector, None, precision="bfloat16", backend=backend, **options).extract(gray)
    near = (torch.cdist(half.xy, exact.xy) < 0.5).any(dim=1).float().mean()
    assert near > 0.95
    assert not torch.equal(half.xy, exact.xy)


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_backend_names_its_extra(name, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install 'tiepoints\[{extra}\]'"):
        run_by(load("sobelnet"), name)


def test_names_that_do_not_fit():
    with pytest.raises(ValueError, match="backend must be one of auto, torch"):
        ExtractOptions(backend="tensorrt")
    with pytest.raises(ValueError, match="torch has no precision int8"):
        ExtractOptions(backend="torch", precision="int8")
    with pytest.raises(ValueError, match="onnxruntime has no precision bfloat16"):
        ExtractOptions(backend="onnxruntime", precision="bfloat16")
    with pytest.raises(ValueError, match="need device cpu"):
        run_by(load("sobelnet"), "openvino", device="meta")
    with pytest.raises(ValueError, match="no eight-bit graph of keynet-tiny"):
        build("keynet-tiny", "rootsift", precision="int8")


# ---- the cache


def test_a_damaged_graph_is_exported_again(empty_cache):
    stack = fused(load("sobelnet")).stack
    path = cached_graph(stack)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    assert run_by(load("sobelnet"), "onnxruntime").stack.backend == "onnxruntime"
    assert path.stat().st_size > 1000


def test_a_graph_of_other_weights_is_exported_again(empty_cache):
    other = load("sobelnet")
    with torch.no_grad():
        other.blocks[0][0].weight.mul_(1.5)
    path, wrong = cached_graph(fused(load("sobelnet")).stack), cached_graph(fused(other).stack)
    assert path != wrong
    run_by(other, "onnxruntime")
    os.replace(wrong, path)
    quick, plain = run_by(load("sobelnet"), "onnxruntime"), fused(load("sobelnet"))
    torch.testing.assert_close(quick(image()), plain(image()), rtol=1e-4, atol=1e-6)


def test_a_graph_that_computes_something_else_is_not_used(monkeypatch, caplog):
    run = GraphStack.forward
    monkeypatch.setattr(GraphStack, "forward", lambda self, maps: 1.01 * run(self, maps))
    with caplog.at_level(logging.WARNING, "tiepoints"):
        net = run_by(load("sobelnet"), "onnxruntime")
    assert not isinstance(net.stack, GraphStack)
    assert "differs from PyTorch's by 1.0e-02" in caplog.text


def test_an_eight_bit_graph_that_computes_something_else_is_an_error(monkeypatch):
    run = GraphStack.forward
    monkeypatch.setattr(GraphStack, "forward", lambda self, maps: -run(self, maps))
    graph = int8_graph("sobelnet")
    with pytest.raises(WeightsError, match=r"cannot be used with onnxruntime: .*cosine -"):
        run_by(load("sobelnet"), "auto", "int8", graph=graph)
    with pytest.raises(WeightsError, match=r"with openvino, its output has the cosine -"):
        build(str(graph), None)


def test_without_a_cache_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run_by(load("sobelnet"), "openvino").stack.backend == "openvino"


def test_sessions_have_the_threads_of_torch(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen = {}

    def session(graph, options, providers):
        seen["threads"] = options.intra_op_num_threads
        return SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="x")])

    options = SimpleNamespace(add_session_config_entry=lambda *entry: None)
    fake = SimpleNamespace(SessionOptions=lambda: options, InferenceSession=session)
    core = SimpleNamespace(
        read_model=lambda graph: None,
        compile_model=lambda model, device, settings: seen.update(settings),
    )
    for name, library in (("onnxruntime", fake), ("openvino", SimpleNamespace(Core=lambda: core))):
        monkeypatch.setitem(sys.modules, name, library)
        backends.open_graph(b"", name, "bfloat16")
    assert seen["threads"] == seen["INFERENCE_NUM_THREADS"] == 3
    assert seen["INFERENCE_PRECISION_HINT"] == "bf16"


# ---- eight bits


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("name", INT8)
def test_embedded_graphs_are_close_to_their_networks(name, backend):
    verify(name)
    net = load(name)
    quick = run_by(net, backend, "int8", graph=int8_graph(name))
    assert quick.stack.precision == "int8"
    plain = fused(net)
    with torch.inference_mode():
        if quick.stack.input.side:
            views = image((160, 160)).unfold(2, 32, 32).unfold(3, 32, 32)
            patches = views.reshape(-1, 1, 32, 32)
            likeness = (quick(patches) * plain(patches)).sum(dim=1)
            assert likeness.min() > 0.97
            assert likeness.mean() > 0.99
        else:
            maps = torch.stack([net(image((120, 152))).flatten() for net in (quick, plain)])
            assert torch.corrcoef(maps)[0, 1] > 0.99


def test_eight_bit_features_are_another_result(tmp_path):
    photos = write_photos(tmp_path, 1, (160, 130))
    common = ("extract", photos / "0.png", "--detector", "sobelnet", "--descriptor", "desnet")
    common += ("--output", tmp_path / "out", "--num-keypoints", 30, "--json")
    code, out, _ = call(*common, "--backend", "torch")
    assert (code, json.loads(out)["done"]) == (0, 1)
    code, out, _ = call(*common, "--backend", "onnxruntime", "--precision", "float32")
    assert (code, json.loads(out)["skipped"]) == (0, 1)
    code, _, err = call(*common, "--precision", "int8")
    assert code == 2
    assert "precision: float before, int8 now" in err


@pytest.mark.parametrize("backend", LIBRARIES)
def test_quantized_weights_are_a_weights_file(tmp_path, backend):
    photos = write_photos(tmp_path, 4)
    output = tmp_path / "mine.onnx"
    report = quantize("sobelnet", [photos], output, photos=4, calibration="minmax", progress=False)
    assert (report.network, report.calibrated, report.held_out) == ("SobelNet", 3, 1)
    assert report.measure == "correlation"
    assert 0.99 < report.worst <= report.mean < 1
    assert network_label(str(output)) == "sobelnet.mine"
    gray = image()[0, 0].numpy()
    found = build(str(output), "rootsift", num_keypoints=40, backend=backend).extract(gray)
    exact = build("sobelnet", "rootsift", num_keypoints=40, backend="torch").extract(gray)
    near = (torch.cdist(found.xy, exact.xy) < 0.5).any(dim=1).float().mean()
    assert near > 0.8
    code, out, _ = call("weights", "show", output)
    shown = json.loads(out)
    assert code == 0
    assert shown["network"] == "SobelNet"
    assert shown["facts"]["photographs"] == 3
    code, out, _ = call("info", output, "--json")
    assert (code, json.loads(out)["record"]["network"]) == (0, "SobelNet")
    with pytest.raises(ValueError, match="no precision int8"):
        build(str(output), None, backend="torch")


def test_files_that_are_no_eight_bit_networks(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"text")
    with pytest.raises(WeightsError, match="no eight-bit network written by"):
        build(str(tmp_path / "x.onnx"), None)
    with pytest.raises(ValueError, match="the output is an ONNX file"):
        quantize("sobelnet", [tmp_path], tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="calibration must be one of"):
        quantize("sobelnet", [tmp_path], tmp_path / "x.onnx", calibration="mean")


def test_the_command_lists_backends_and_times(monkeypatch):
    quick = partial(describe_backends, seconds=0.0)
    monkeypatch.setattr("tiepoints.jobs.backends.describe_backends", quick)
    code, out, _ = call("backends", "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found["backends"]) == {"torch", *LIBRARIES}
    assert found["processor"] == processor_features()
    assert found["milliseconds"]["torch float32"] > 0
    assert not found["failed"]
    assert (found["network"], found["input"]) == ("desnet", [1, 1, 480, 640])
    monkeypatch.setattr("tiepoints.jobs.backends.PATCHES", 3)
    code, out, _ = call("backends", "--network", "hardnet-light")
    assert code == 0
    assert "hardnet-light, 3 patches of 32 x 32 pixels" in out
    assert call("backends", "--network", "hardnet-context")[0] == 0
    code, _, err = call("backends", "--network", "hardest")
    assert code == 2
    assert "network must be one of keynet" in err


def test_auto_takes_eight_bits_only_of_systems_that_passed_the_gate(monkeypatch):
    monkeypatch.setattr("tiepoints.extract.processor_features", lambda: {"vnni": True})
    passed = {("sobelnet", "desnet")}
    monkeypatch.setattr("tiepoints.extract.passed_gate", lambda *names: names in passed)
    options = ExtractOptions(detector="sobelnet", descriptor="desnet", device="cpu")
    assert options.chosen_precision == "int8"
    assert options.to_json()["precision"] == "int8"
    other = replace(options, detector="keynet")
    assert other.to_json()["precision"] == "float"
    for change in ({"backend": "torch"}, {"precision": "float32"}, {"official": True}):
        assert replace(options, **change).chosen_precision != "int8"
    monkeypatch.setattr("tiepoints.extract.processor_features", lambda: {"vnni": False})
    assert options.chosen_precision == "auto"
