"""Export of networks and of whole pipelines as ONNX files for images of any size.

A file is written only if ONNX Runtime computes with it what torch computes, for images of three
sizes. Needs the extra ``onnx``.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import DataError
from .extract import ExtractOptions, detector_network, load_file
from .files import atomic_path, require
from .formats.records import program_version
from .graphs import LEAST_SIDE, MAX_SIDE, PipelineGraph, network_graph
from .models.patchnets import PATCH_SIZE
from .models.spec import DetectorSpec, PatchSpec, spec_of
from .names import DESCRIPTORS, DETECTORS
from .weights import load, table, weights_checksum

FORMS = ("network", "pipeline")
OPSET = 18
#: Sizes (height, width) of the images with which an exported file is checked, and the number of
#: keypoints asked for: of an odd size, a small one, and more keypoints than there are.
CHECKS = (((97, 131), 20), ((48, 50), 50), ((160, 224), 5000))
#: Numbers of patches with which a patch network is checked.
PATCH_CHECKS = (1, 2, 65)
#: Largest differences: of the maps and descriptors of a network, relative to the largest value; of
#: most positions in pixels; of any position; of descriptors; and the fraction of keypoints that
#: must be found by both.
MAP_TOLERANCE = 1e-4
POSITION_TOLERANCE, POSITION_LIMIT = 1e-3, 2e-2
DESCRIPTOR_TOLERANCE = 1e-3
COMMON = 0.99
#: Tensors of at least this many bytes are stored in half precision if that is exact.
HALF_BYTES = 4096

COORDINATES = "x right, y down, in pixels of the image; the center of the top left pixel is (0, 0)"


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Attributes:
        path: the file.
        form: of ``FORMS``.
        size: in bytes.
        difference: largest difference of a map, or in pixels of a position, from torch.
    """

    path: str
    form: str
    size: int
    difference: float


def export_network(name: str, output: Path) -> Exported:
    """Export a network: an image network (B,1,H,W) -> map, or a patch network (N,1,32,32) ->
    (N,128).

    Args:
        name: of an embedded network, or a weights file.
        output: the file to write.

    Raises:
        ValueError: a network of this type cannot be exported, or the name of the file.
        WeightsError, ImportError, DataError: as ``export_pipeline``.
    """
    _check_output(output)
    net = _network(name)
    graph = network_graph(net).eval()
    patches = isinstance(spec_of(net), PatchSpec)
    dim = torch.export.Dim
    if patches:
        example, shapes = torch.rand(2, 1, PATCH_SIZE, PATCH_SIZE), {0: dim("n", min=1)}
        names, images = ("patches", "descriptors"), [_patches(count) for count in PATCH_CHECKS]
    else:
        example = torch.rand(2, 1, 97, 131)
        shapes = {0: dim("b", min=1), **_sides()}
        output_name = "scores" if isinstance(spec_of(net), DetectorSpec) else "descriptor_map"
        names, images = ("image", output_name), [_picture(size) for size, _ in CHECKS]
    model = _translate(graph, (example,), [shapes], [names[0]], [names[1]])
    describe(model, form="network", networks={"network": (name, net)}, input=names[0])
    session = _session(model)
    difference = 0.0
    with torch.inference_mode():
        for image in images:
            expected = net(image).numpy()
            found = session.run(None, {names[0]: image.numpy()})[0]
            scale = max(float(np.abs(expected).max()), 1e-9)
            difference = max(difference, float(np.abs(found - expected).max()) / scale)
    if not difference <= MAP_TOLERANCE:
        raise DataError(
            f"{name}: the exported network differs from torch by {difference:.2g} of its largest "
            "value, so it was not written"
        )
    return _write(model, output, "network", difference)


def export_pipeline(options: ExtractOptions, output: Path) -> Exported:
    """Export a detector and descriptor with pyramid, selection and sub-pixel positions as one file
    (``graphs.PipelineGraph``).

    Args:
        options: detector, descriptor, levels and detector options of the pipeline; the number of
            keypoints is an input of the file.
        output: the file to write.

    Raises:
        ValueError: an option that cannot be exported, or the name of the file.
        WeightsError: a weights file is damaged.
        ImportError: the extra ``onnx`` is missing.
        DataError: the exported file does not compute what torch computes.
    """
    _check_output(output)
    graph = pipeline_graph(options)
    names = ["keypoints", "scales", "scores", "descriptors"][: 4 if options.described else 3]
    dim = torch.export.Dim
    model = _translate(
        graph,
        (torch.rand(1, 3, 97, 131), torch.tensor([20])),
        [{1: dim("channels", min=2, max=3), **_sides()}, {}],
        ["image", "max_keypoints"],
        names,
    )
    name_count(model)
    networks: dict[str, Any] = {"detector": options.detector}
    if options.described:
        networks["descriptor"] = options.descriptor
    found = {role: (str(name), _network(name)) for role, name in networks.items()}
    describe(model, form="pipeline", networks=found, input="image", options=options)
    difference = _check_pipeline(_session(model), options)
    return _write(model, output, "pipeline", difference)


def pipeline_graph(options: ExtractOptions) -> PipelineGraph:
    """The module of a pipeline.

    Raises:
        ValueError: an option that cannot be exported.
    """
    if options.orientation not in (None, "none"):
        raise ValueError("orientations cannot be exported; keypoints are upright in the graph")
    if options.max_size is not None:
        raise ValueError("max_size cannot be exported; reduce the image before")
    net = detector_network(options.detector)
    spec = spec_of(net)
    if not isinstance(spec, DetectorSpec):
        raise ValueError(f"{options.detector} detects no keypoints; use it as the descriptor")
    descriptor: nn.Module | None = None
    if options.described:
        if options.descriptor == "rootsift":
            raise ValueError("rootsift cannot be exported; use the descriptor of a network")
        descriptor = _network(options.descriptor)
        if isinstance(spec_of(descriptor), DetectorSpec):
            raise ValueError(f"{options.descriptor} has no descriptors; use it as the detector")
    levels = (0, 0) if options.single_scale else (options.up_levels, options.down_levels)
    defaults = spec.up_levels, spec.down_levels
    up, down = (d if n is None else n for n, d in zip(levels, defaults, strict=True))
    shape = options.nms_shape or spec.nms_shape
    chosen = replace(options, single_scale=False, up_levels=up, down_levels=down, nms_shape=shape)
    return PipelineGraph(net, descriptor, chosen).eval()


def name_count(model: Any) -> None:
    """Name the number of keypoints in the shapes of the outputs of a pipeline."""
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[0].dim_param = "count"


def describe(
    model: Any,
    *,
    form: str,
    networks: dict[str, tuple[str, nn.Module]],
    input: str,
    options: ExtractOptions | None = None,
) -> None:
    """Add what users and programs must know of a model to its metadata."""

    known = table()
    entries: dict[str, Any] = {
        "form": form,
        "coordinates": COORDINATES,
        "version": program_version(),
    }
    entries["preprocessing"] = {
        "image": "float32 in [0,1], gray (1,1,H,W) by BT.601 weights, or in pipelines RGB "
        "(1,3,H,W); no normalization",
        "patches": f"float32 gray in [0,1], {PATCH_SIZE} x {PATCH_SIZE} samples",
    }[input]
    if input == "image":
        entries["sides"] = f"{LEAST_SIDE} to {MAX_SIDE} pixels"
    for role, (name, net) in networks.items():
        entry = known.get(name, {})
        entries[role] = name if entry else Path(name).name
        entries[f"{role}_licence"] = entry.get("licence", "that of the weights file")
        entries[f"{role}_weights"] = weights_checksum(net)
    if options is not None:
        content = options.to_json()
        content.pop("num_keypoints")
        entries["options"] = json.dumps(content)
    model.producer_name, model.producer_version = "tiepoints", program_version()
    for key, value in entries.items():
        model.metadata_props.add(key=f"tiepoints.{key}", value=str(value))


# ---- translation


def _check_output(output: Path) -> None:
    if output.suffix != ".onnx":
        raise ValueError(f"the output must end in .onnx, got {output}")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, extra="onnx", purpose="the export")


def _network(name: Any) -> nn.Module:
    if isinstance(name, nn.Module):
        return name.eval()
    return load(name) if name in (*DETECTORS, *DESCRIPTORS) else load_file(name)


def _sides() -> dict[int, Any]:
    dim = torch.export.Dim
    return {i: dim(name, min=LEAST_SIDE, max=MAX_SIDE) for i, name in ((2, "h"), (3, "w"))}


@contextmanager
def _without_messages() -> Iterator[None]:
    """Context manager without the messages of the exporter, which concern its developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _translate(
    module: nn.Module,
    example: tuple[Tensor, ...],
    shapes: list[dict[int, Any]],
    inputs: list[str],
    outputs: list[str],
) -> Any:
    """The model (``onnx.ModelProto``) of a module."""
    from onnxscript import opset18 as op

    def sort(self, stable: bool = True, dim: int = -1, descending: bool = False):
        # ``TopK`` of all keeps the order of equal values
        count: Any = op.Reshape(op.Size(self), op.Constant(value_ints=[1]))  # type: ignore[arg-type]
        return op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)

    with _without_messages(), torch.no_grad():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            dynamic_shapes=tuple(shapes),
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.sort.stable: sort},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _remove_descriptions(model)
    _store_half(model)
    return model


def _remove_descriptions(model: Any) -> None:
    """Remove what the exporter writes about the source code of each node."""
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for item in (*model.graph.node, *model.graph.input, *model.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    for item in model.graph.initializer:
        item.doc_string = ""
        del item.metadata_props[:]


def _store_half(model: Any) -> None:
    """Store large tensors in half precision where that is exact, as the weights files are."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.nbytes < HALF_BYTES or not (half.astype(np.float32) == values).all():
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
        casts.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


# ---- checks


def _session(model: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _picture(size: tuple[int, int]) -> Tensor:
    """A smooth random image (1,1,H,W) with corners."""
    rng = np.random.default_rng(size[0])
    coarse = torch.from_numpy(rng.random((1, 1, size[0] // 6, size[1] // 6), dtype=np.float32))
    smooth = nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    blocks = nn.functional.interpolate(coarse.flip(-1), size=size, mode="nearest")
    return (0.6 * smooth + 0.4 * blocks).clamp(0, 1)


def _patches(count: int) -> Tensor:
    pictures = [_picture((PATCH_SIZE + i, PATCH_SIZE + 3)) for i in range(count)]
    return torch.cat([picture[..., :PATCH_SIZE, :PATCH_SIZE] for picture in pictures])


def _check_pipeline(session: Any, options: ExtractOptions) -> float:
    """Largest difference in pixels of a position from torch.

    Raises:
        DataError: the features differ.
    """
    largest = 0.0
    for size, count in CHECKS:
        image = _picture(size)
        exact = replace(options, num_keypoints=count, device="cpu", precision="float32")
        expected = exact.build().extract_tensor(image)[0]
        feeds = {"image": image.numpy(), "max_keypoints": np.array([count])}
        xy, scale, _, *descriptors = session.run(None, feeds)
        if not len(expected):
            if len(xy):
                raise DataError(f"the exported pipeline finds {len(xy)} keypoints, torch none")
            continue
        a = np.c_[expected.xy.numpy(), expected.scale.numpy()]
        b = np.c_[xy, scale]
        nearest = np.abs(a[:, None] - b[None]).max(axis=2) if len(b) else np.full((len(a), 1), 9.0)
        index, distance = nearest.argmin(axis=1), nearest.min(axis=1)
        common = distance < POSITION_LIMIT
        exact_share = (distance < POSITION_TOLERANCE).mean()
        if len(a) != len(b) or min(common.mean(), exact_share) < COMMON:
            raise DataError(
                f"the exported pipeline finds {len(b)} keypoints in an image of {size[1]} x "
                f"{size[0]} pixels, {common.mean():.1%} of the {len(a)} of torch; it was not "
                "written"
            )
        largest = max(largest, float(distance[common].max()))
        if descriptors and expected.descriptors is not None:
            wanted = expected.descriptors.numpy()[common]
            off = float(np.abs(wanted - descriptors[0][index[common]]).max())
            if not off <= DESCRIPTOR_TOLERANCE:
                raise DataError(
                    f"the descriptors of the exported pipeline differ by {off:.2g} from those of "
                    "torch; it was not written"
                )
    return largest


def _write(model: Any, output: Path, form: str, difference: float) -> Exported:
    content = model.SerializeToString()
    with atomic_path(output) as tmp_path:
        tmp_path.write_bytes(content)
    return Exported(str(output), form, len(content), difference)
