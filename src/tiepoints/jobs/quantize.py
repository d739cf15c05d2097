"""Eight-bit networks: static quantization of the costly part of a network, calibrated on
photographs.
"""

from __future__ import annotations

import io
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..backends import GraphStack, example_input, export_network, input_of, sampled
from ..datasets.synthetic import find_photos
from ..errors import DataError
from ..extract import Extractor, build, load_file
from ..files import require
from ..image import load_image
from ..models.spec import DetectorSpec, ShapeSpec, StackInput, fused, spec_of
from ..names import NUM_KEYPOINTS
from ..onnx_conversion import remove_descriptions
from ..progress import track
from ..weights import load, save_graph, table, weights_checksum

logger = logging.getLogger(__name__)
CALIBRATIONS = ("minmax", "percentile", "entropy")
#: Number of photographs; every HELD_OUT-th measures the fidelity, the others calibrate.
PHOTOS = 48
HELD_OUT = 4
#: Longest side in pixels of the photographs, and most keypoints of each that are described.
MAX_SIZE = 480
KEYPOINTS = 128
#: Side in pixels of the maps, and number of patches, on which a graph is calibrated at a time.
MAP_SIDE = 128
BATCH = 64
#: Percentage of the values of an activation within its range, with ``percentile``: of networks of
#: maps and of patches (chosen on held-out photographs).
PERCENTILE, PATCH_PERCENTILE = 99.999, 99.997


@dataclass
class QuantizeReport:
    """Result of a quantization.

    Attributes:
        network: class of the network.
        output, size: the file and its number of bytes.
        calibrated, held_out: number of photographs.
        measure: ``cosine`` of descriptors or ``correlation`` of score maps with those of float32.
        mean, worst: of the measure on the held-out photographs: over descriptors the mean and the
            first percentile, over score maps the mean and the minimum.
        seconds: duration.
    """

    network: str
    output: str
    size: int
    calibrated: int
    held_out: int
    measure: str
    mean: float
    worst: float
    seconds: float


class _Recorder(nn.Module):
    """A costly part that keeps its inputs."""

    def __init__(self, stack: nn.Module):
        super().__init__()
        self.stack, self.input = stack, input_of(stack)
        self.inputs: list[Tensor] = []

    def forward(self, maps: Tensor) -> Tensor:
        self.inputs.append(maps.detach().float().contiguous())
        return self.stack(maps)


class _Scaled(nn.Module):
    """A costly part whose input channels are brought to one range, because they share one
    quantization step; the first filters take the inverse factors.
    """

    def __init__(self, stack: nn.Module, inputs: Sequence[Tensor]):
        super().__init__()
        self.stack, self.input = stack, input_of(stack)
        largest = torch.stack([x.abs().flatten(2).quantile(0.999, dim=2)[0] for x in inputs])
        scale = 1 / largest.amax(dim=0).clamp(min=1e-6)
        first = next(m for m in stack.modules() if isinstance(m, nn.Conv2d))
        with torch.no_grad():
            first.weight /= scale.view(1, -1, 1, 1)
        self.register_buffer("scale", scale.view(1, -1, 1, 1))

    scale: Tensor

    def forward(self, maps: Tensor) -> Tensor:
        return self.stack(maps * self.scale)


def quantize(
    weights: str,
    images: Sequence[Path],
    output: Path,
    *,
    photos: int = PHOTOS,
    calibration: str = "percentile",
    progress: bool = True,
) -> QuantizeReport:
    """Write a network with eight-bit filters and activations as an ONNX file, which is a weights
    file for ``detector`` or ``descriptor``.

    Args:
        weights: name of an embedded network, a weights file or an official checkpoint.
        images: folders of photographs like those that will be processed.
        output: the file to write, ``.onnx``.
        photos: number of photographs, one in ``HELD_OUT`` of which measures the fidelity.
        calibration: how the ranges of the activations are chosen (``CALIBRATIONS``).

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        ValueError: an argument is out of range, or the network has no costly part.
        DataError: too few photographs.
        WeightsError, FileNotFoundError: the weights or images cannot be read.
    """
    started = time.monotonic()
    if calibration not in CALIBRATIONS:
        raise ValueError(
            f"calibration must be one of {', '.join(CALIBRATIONS)}; got {calibration!r}"
        )
    if output.suffix != ".onnx":
        raise ValueError(f"the output is an ONNX file, NAME.onnx; got {output}")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, extra="onnx", purpose="quantization")
    net = load(weights) if weights in table() else load_file(weights)
    quick = fused(net)
    if isinstance(getattr(quick, "stack", None), GraphStack | None) or quick is net:
        raise ValueError(f"a {type(net).__name__} has no part that can be quantized")
    usable = find_photos(images)
    if len(usable) < HELD_OUT:
        raise DataError(f"at least {HELD_OUT} usable photographs are needed, got {len(usable)}")
    chosen = [
        usable[i] for i in np.linspace(0, len(usable) - 1, min(photos, len(usable)), dtype=int)
    ]
    held_out = chosen[HELD_OUT - 1 :: HELD_OUT]
    training = [path for path in chosen if path not in held_out]
    inputs = _recorded(net, training, progress=progress)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "int8.onnx"
        _quantize_stack(quick.stack, inputs, graph, calibration)  # type: ignore[arg-type]
        facts = {
            "weights_sha256": weights_checksum(net),
            "calibration": calibration,
            "photographs": len(training),
        }
        given = input_of(cast(nn.Module, quick.stack))
        stack = GraphStack(graph.read_bytes(), given, "onnxruntime", "int8")
        sample = [round(value, 5) for value in sampled(stack(example_input(given))).tolist()]
        save_graph(net, graph, output, sample, facts)
    measure, values = fidelity(net, str(output), held_out, progress=progress)
    worst = np.quantile(values, 0.01) if measure == "cosine" else values.min()
    return QuantizeReport(
        network=type(net).__name__,
        output=str(output),
        size=output.stat().st_size,
        calibrated=len(training),
        held_out=len(held_out),
        measure=measure,
        mean=float(values.mean()),
        worst=float(worst),
        seconds=time.monotonic() - started,
    )


def _extractor(net: nn.Module | str, network: nn.Module, num_keypoints: int) -> Extractor:
    """An extractor with a network as its detector or its descriptor, whichever it is."""
    spec = spec_of(network)
    if isinstance(spec, ShapeSpec):
        raise ValueError(f"a {type(network).__name__} has no eight-bit graph; it runs in float32")
    roles: tuple[Any, Any] = (net, None) if isinstance(spec, DetectorSpec) else ("keynet", net)
    backend = "auto" if isinstance(net, str) else "torch"
    return build(
        *roles,
        num_keypoints=num_keypoints,
        max_size=MAX_SIZE,
        precision="float32",
        backend=backend,
        device="cpu",
    )


def _recorded(net: nn.Module, photos: list[Path], *, progress: bool) -> list[Tensor]:
    """Inputs of a network's costly part during the extraction of photographs, cut to
    ``MAP_SIDE``.
    """
    quick = fused(net)
    recorder = _Recorder(cast(nn.Module, quick.stack))
    quick.stack = recorder
    extractor = _extractor(quick, net, KEYPOINTS)
    rng = np.random.default_rng(0)
    kept: list[Tensor] = []
    for path in track(photos, unit="image", label="record", enabled=progress):
        extractor.extract(path)
        if recorder.input.side is None:
            kept += [
                _cut(maps, recorder.input, rng)
                for maps in recorder.inputs
                if min(maps.shape[-2:]) >= MAP_SIDE
            ]
        else:
            kept += recorder.inputs
        recorder.inputs.clear()
    if recorder.input.side is not None and kept:  # of equal number, as the library needs it
        kept = [part for part in torch.cat(kept).split(BATCH) if len(part) == BATCH]
    if not kept:
        raise DataError(
            "the photographs have too few keypoints, or are too small, for a calibration"
        )
    return kept


def _cut(maps: Tensor, given: StackInput, rng: np.random.Generator) -> Tensor:
    """A random part of maps, ``MAP_SIDE`` on each side."""
    top, left = (
        int(rng.integers(0, side - MAP_SIDE + 1)) // given.step * given.step
        for side in maps.shape[-2:]
    )
    return maps[:1, :, top : top + MAP_SIDE, left : left + MAP_SIDE].clone()


def _quantize_stack(stack: nn.Module, inputs: list[Tensor], path: Path, calibration: str) -> None:
    """Export a costly part and quantize its convolutions, per channel, and their sums."""
    from onnxruntime import quantization as q

    percentile = PERCENTILE if input_of(stack).side is None else PATCH_PERCENTILE
    # patches have one range already
    scaled = input_of(stack).side is None and inputs[0].shape[1] > 1
    part: nn.Module = _Scaled(stack, inputs) if scaled else stack
    exported, prepared = path.with_suffix(".float.onnx"), path.with_suffix(".prepared.onnx")
    export_network(part, exported)
    q.quant_pre_process(str(exported), str(prepared), skip_symbolic_shape=True)
    method = {
        "minmax": q.CalibrationMethod.MinMax,
        "percentile": q.CalibrationMethod.Percentile,
        "entropy": q.CalibrationMethod.Entropy,
    }[calibration]
    with redirect_stdout(io.StringIO()):  # it prints what it does
        q.quantize_static(
            str(prepared),
            str(path),
            _Reader(prepared, inputs),
            quant_format=q.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Add"],
            nodes_to_exclude=_constant_sums(prepared),
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            calibrate_method=method,
            extra_options=None if calibration != "percentile" else {"CalibPercentile": percentile},
        )
    _quantize_after_relu(path)


def _quantize_after_relu(path: Path) -> None:
    """Remove the quantization between convolutions and their ReLU, which would waste half of the
    steps on negative values.
    """
    import onnx

    model = onnx.load(str(path))
    nodes = model.graph.node
    producer = {name: node for node in nodes for name in node.output}
    for node in list(nodes):
        after = producer.get(node.input[0]) if node.op_type == "Relu" else None
        if after is None or after.op_type != "DequantizeLinear":
            continue
        before = producer[after.input[0]]
        node.input[0] = before.input[0]
        nodes.remove(after)
        nodes.remove(before)
    remove_descriptions(model)
    onnx.save(model, str(path))


def _constant_sums(path: Path) -> list[str]:
    """Names of the additions of a constant in a graph, which are not between maps."""
    import onnx

    graph = onnx.load(str(path)).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [
        node.name for node in graph.node if node.op_type == "Add" and constants & set(node.input)
    ]


class _Reader:
    """The inputs for the calibration, as the library reads them."""

    def __init__(self, graph: Path, inputs: list[Tensor]):
        import onnx

        name = onnx.load(str(graph)).graph.input[0].name
        self._inputs: Iterator[dict[str, np.ndarray]] = iter([{name: x.numpy()} for x in inputs])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input by name, None after the last one."""
        return next(self._inputs, None)


def fidelity(
    net: nn.Module, path: str, photos: list[Path], *, progress: bool = True
) -> tuple[str, np.ndarray]:
    """Likeness of the results of an eight-bit network and of its network in float32: cosines of
    descriptors at the same keypoints, or correlations of the score maps of photographs.
    """
    exact, quick = (_extractor(one, net, NUM_KEYPOINTS) for one in (net, path))
    values: list[np.ndarray] = []
    detects = isinstance(spec_of(net), DetectorSpec)
    for photo in track(photos, unit="image", label="compare", enabled=progress):
        pyramid = exact.pyramid(load_image(photo))
        if detects:
            with torch.inference_mode():
                maps = [_score_map(one, pyramid.image).flatten() for one in (exact, quick)]
            values.append(torch.corrcoef(torch.stack(maps))[:1, 1].numpy())
            continue
        keypoints = exact.detect(pyramid)[0]
        a, b = (one.describe(pyramid, keypoints, 0) for one in (exact, quick))  # type: ignore[misc]
        values.append((a * b).sum(dim=1).numpy())
    return ("correlation" if detects else "cosine"), np.concatenate(values)


def _score_map(extractor: Extractor, image: Tensor) -> Tensor:
    output = extractor.detect.net(image)  # type: ignore[attr-defined]
    return output if isinstance(output, Tensor) else output[0]
