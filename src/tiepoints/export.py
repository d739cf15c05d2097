"""Export of networks and of whole pipelines as ONNX files for images of any size.

A file is written only if ONNX Runtime computes with it what torch computes, for images of three
sizes (``export_checks``). Needs the extra ``onnx``.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .backends import run_by
from .detect import response_floor
from .errors import DataError
from .export_checks import (
    CHECKS,
    COLMAP_STEP,
    INT8_LIMITS,
    LIMITS,
    MIN_SCORE,
    PATCH_CHECKS,
    Runner,
    check_pipeline,
    checked,
    fidelity_of,
    map_cosine,
    map_difference,
    patches,
    picture,
    session_of,
)
from .extract import ExtractOptions, load_file
from .files import atomic_path, require
from .formats.records import program_version
from .graphs import LEAST_SIDE, MAX_SIDE, ColmapGraph, PipelineGraph, network_graph
from .models.patchnets import PATCH_SIZE
from .models.spec import DetectorSpec, PatchSpec, ShapeSpec, spec_of
from .names import AFFINE_SHAPES, DESCRIPTORS, DETECTORS
from .onnx_conversion import OPSETS, convert
from .weights import (
    file_checksum,
    int8_graph,
    load,
    load_beside_graph,
    load_graph,
    table,
    weights_checksum,
)

logger = logging.getLogger(__name__)
FORMS = ("network", "pipeline", "colmap")
#: ``coordinates`` in the metadata.
COORDINATES = "x right, y down, in pixels of the image; the center of the top left pixel is (0, 0)"
COLMAP_COORDINATES = (
    "x right, y down; the centers of the outermost pixels of the image are at -1 and 1"
)


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Attributes:
        path: the file.
        form: of ``FORMS``.
        size: in bytes.
        difference: largest difference from torch of a map, relative to its largest value, or of a
            position in pixels; with eight-bit networks from theirs in the package.
        fidelity: with eight-bit networks of the package, how near the results are to those in
            float32: of a network ``cosine``, of a pipeline ``keypoints``, the fraction of those in
            float32 that are found within a pixel, and the mean ``cosine`` of their descriptors.
    """

    path: str
    form: str
    size: int
    difference: float
    fidelity: dict[str, float] | None = None


def export_network(
    name: str, output: Path, *, int8: bool = False, opset: int = OPSETS[0]
) -> Exported:
    """Export a network: an image network (B,1,H,W) -> map, or a patch network (N,C,32,32) ->
    (N,128).

    Args:
        name: of an embedded network, or a weights file.
        output: the file to write.
        int8: with the eight-bit graph of its costly part; B is 1 then.
        opset: version of the ONNX operator set, in ``OPSETS``.

    Raises:
        ValueError: a network of this type cannot be exported, it has no eight-bit graph, or the
            name of the file.
        WeightsError, ImportError, DataError: as ``export_pipeline``.
    """
    _check_output(output, opset, int8=int8)
    part = _part(name, int8=int8)
    spec = spec_of(part.net)
    if isinstance(spec, ShapeSpec):
        raise ValueError(f"{name}: affine shapes cannot be exported")
    if int8 and part.int8 is None:
        raise ValueError(_no_int8(name))
    graph = network_graph(part.net, part.int8).eval()
    dim = torch.export.Dim
    if isinstance(spec, PatchSpec):
        channels = len(spec.reach)
        example, shapes = torch.rand(2, channels, PATCH_SIZE, PATCH_SIZE), {0: dim("n", min=1)}
        names = ("patches", "descriptors")
        images = [patches(count, channels) for count in PATCH_CHECKS]
    else:
        example = torch.rand(1 if int8 else 2, 1, 97, 131)
        shapes = _sides() if int8 else {0: dim("b", min=1), **_sides()}
        output_name = "scores" if isinstance(spec, DetectorSpec) else "descriptor_map"
        names, images = ("image", output_name), [picture(size) for size, _ in CHECKS]
    model = convert(graph, (example,), [shapes], [names[0]], [names[1]], opset=opset)
    describe(model, form="network", parts={"network": part}, input=names[0])
    session = session_of(model)
    found = [session.run(None, {names[0]: image.numpy()})[0] for image in images]
    difference = map_difference(part.reference(), images, found)
    limits = INT8_LIMITS if int8 else LIMITS
    if not difference <= limits.maps:
        raise DataError(
            f"{name}: the exported network differs from {limits.reference} by {difference:.2g} of "
            "its largest value, so it was not written"
        )
    fidelity = None
    if part.exact is not None:
        fidelity = checked({"cosine": map_cosine(part.exact, images, found)})
    return _write(model, output, "network", difference, fidelity)


def export_pipeline(
    options: ExtractOptions, output: Path, *, form: str = "pipeline", opset: int = OPSETS[0]
) -> Exported:
    """Export a detector and descriptor with pyramid, selection and sub-pixel positions as one
    file.

    Args:
        options: detector, descriptor, levels and detector options of the pipeline; the number of
            keypoints is an input of the file. With the precision ``int8``, the networks that have
            an eight-bit graph compute with it.
        output: the file to write.
        form: ``pipeline`` (``graphs.PipelineGraph``), or ``colmap`` (``graphs.ColmapGraph``).
        opset: version of the ONNX operator set, in ``OPSETS``.

    Raises:
        ValueError: an option that cannot be exported, or the name of the file.
        WeightsError: a weights file is damaged.
        ImportError: the extra ``onnx`` is missing.
        DataError: the exported file does not compute what torch computes.
    """
    _check_output(output, opset, int8=options.precision == "int8")
    if form not in FORMS[1:]:
        raise ValueError(f"form must be one of {', '.join(FORMS[1:])}; got {form!r}")
    if options.precision != "int8":  # the automatic precision may be int8
        options = replace(options, precision="float32")
    pipeline, parts = _pipeline(options)
    names = ["keypoints", "scales", "scores", "descriptors"][: 4 if options.described else 3]
    dim = torch.export.Dim
    if form == "colmap":
        if not options.described:
            raise ValueError("the form colmap needs a descriptor")
        model = convert(
            ColmapGraph(pipeline).eval(),
            (torch.rand(1, 3, 96, 128), torch.tensor(20), torch.tensor(MIN_SCORE)),
            [_sides(), {}, {}],
            ["image", "max_keypoints", "min_score"],
            ["keypoints", "descriptors", "scores"],
            opset=opset,
        )
    else:
        model = convert(
            pipeline,
            (torch.rand(1, 3, 97, 131), torch.tensor([20])),
            [{1: dim("channels", min=2, max=3), **_sides()}, {}],
            ["image", "max_keypoints"],
            names,
            opset=opset,
        )
    name_count(model, axis=int(form == "colmap"))
    describe(model, form=form, parts=parts, input="image", options=options)
    run = Runner(session_of(model), form)
    difference = check_pipeline(run, options)
    files = [part.name for part in parts.values() if _is_graph_file(part.name)]
    fidelity = fidelity_of(run, options) if options.precision == "int8" and not files else None
    return _write(model, output, form, difference, fidelity)


def pipeline_graph(options: ExtractOptions) -> PipelineGraph:
    """The module of a pipeline.

    Raises:
        ValueError: an option that cannot be exported.
    """
    return _pipeline(options)[0]


def _pipeline(options: ExtractOptions) -> tuple[PipelineGraph, dict[str, _Part]]:
    """The module of a pipeline, and its networks by role."""
    if options.orientation not in (None, "none"):
        raise ValueError("orientations cannot be exported; keypoints are upright in the graph")
    if options.affine != "none":
        raise ValueError("affine shapes cannot be exported; use affine none")
    if options.max_size is not None:
        raise ValueError("max_size cannot be exported; reduce the image before")
    int8 = options.precision == "int8"
    parts = {"detector": _part(options.detector, int8=int8)}
    spec = spec_of(parts["detector"].net)
    if not isinstance(spec, DetectorSpec):
        raise ValueError(f"{options.detector} detects no keypoints; use it as the descriptor")
    if options.described:
        if options.descriptor == "rootsift":
            raise ValueError("rootsift cannot be exported; use the descriptor of a network")
        parts["descriptor"] = _part(options.descriptor, int8=int8)
        described_by = spec_of(parts["descriptor"].net)
        if isinstance(described_by, DetectorSpec | ShapeSpec):
            role = "detector" if isinstance(described_by, DetectorSpec) else "affine"
            raise ValueError(f"{options.descriptor} has no descriptors; use it as the {role}")
    without = [part.name for part in parts.values() if part.int8 is None]
    if int8 and len(without) == len(parts):
        raise ValueError(_no_int8(" or ".join(without)))
    for name in without if int8 else ():
        logger.warning("%s has no eight-bit graph and stays in float32", name)
    if parts["detector"].int8 is not None:  # another one than in float32
        parts["detector"].net.floor = response_floor(parts["detector"].reference())  # type: ignore[assignment]
    descriptor = parts.get("descriptor")
    graph = PipelineGraph(
        parts["detector"].net,
        None if descriptor is None else descriptor.net,
        options.resolved(spec),
        (parts["detector"].int8, None if descriptor is None else descriptor.int8),
    )
    return graph.eval(), parts


def name_count(model: Any, axis: int = 0) -> None:
    """Name the number of keypoints in the shapes of the outputs of a pipeline."""
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[axis].dim_param = "count"


def describe(
    model: Any,
    *,
    form: str,
    parts: dict[str, _Part],
    input: str,
    options: ExtractOptions | None = None,
) -> None:
    """Add what users and programs must know of a model to its metadata."""
    known = table()
    entries: dict[str, Any] = {
        "form": form,
        "coordinates": COLMAP_COORDINATES if form == "colmap" else COORDINATES,
        "version": program_version(),
    }
    image = "gray (1,1,H,W) by BT.601 weights, or in pipelines RGB (1,3,H,W)"
    if form == "colmap":
        image = f"RGB (1,3,H,W), sides multiples of {COLMAP_STEP}"
    entries["preprocessing"] = {
        "image": f"float32 in [0,1], {image}; no normalization",
        "patches": f"float32 gray in [0,1], {PATCH_SIZE} x {PATCH_SIZE} samples",
    }[input]
    if input == "image":
        entries["sides"] = f"{LEAST_SIDE} to {MAX_SIDE} pixels"
    for role, part in parts.items():
        entry = known.get(part.name, {})
        entries[role] = part.name if entry else Path(part.name).name
        entries[f"{role}_licence"] = entry.get("licence", "that of the weights file")
        entries[f"{role}_weights"] = part.checksum
        entries[f"{role}_bits"] = 32 if part.int8 is None else 8
    if options is not None:
        content = options.to_json()
        content.pop("num_keypoints")
        entries["options"] = json.dumps(content)
    model.producer_name, model.producer_version = "tiepoints", program_version()
    for key, value in entries.items():
        model.metadata_props.add(key=f"tiepoints.{key}", value=str(value))


# ---- parts


@dataclass(frozen=True)
class _Part:
    """A network of an exported file.

    Attributes:
        name: of an embedded network, or its file.
        net: not fused; of an eight-bit file without the weights of its costly part.
        int8: the eight-bit graph that replaces its costly part.
    """

    name: str
    net: nn.Module
    int8: Path | None

    def reference(self) -> nn.Module:
        """What the exported network must compute."""
        if self.int8 is None:
            return self.net
        net = load_graph(self.int8) if _is_graph_file(self.name) else self.net
        return run_by(net, "onnxruntime", "int8", graph=self.int8)

    @property
    def exact(self) -> nn.Module | None:
        """The network in float32 of an eight-bit one, None for others."""
        return None if self.int8 is None or _is_graph_file(self.name) else self.net

    @property
    def checksum(self) -> str:
        """SHA-256 of the tensors, or of the file of the eight-bit graph."""
        return weights_checksum(self.net) if self.int8 is None else file_checksum(self.int8)


def _is_graph_file(name: str) -> bool:
    """Whether a name is that of a file with an eight-bit graph."""
    return Path(name).suffix == ".onnx"


def _part(name: Any, *, int8: bool) -> _Part:
    if isinstance(name, nn.Module):
        return _Part(type(name).__name__, name.eval(), None)
    if _is_graph_file(name):
        if not int8:
            raise ValueError(f"{name} has weights of eight bits; export it with --int8")
        net = load_beside_graph(Path(name))
        return _Part(name, net, Path(name))
    known = (*DETECTORS, *DESCRIPTORS, *AFFINE_SHAPES)
    net = load(name) if name in known else load_file(name)
    return _Part(name, net, int8_graph(name) if int8 else None)


def _no_int8(name: str) -> str:
    return (
        f"there is no eight-bit graph of {name}; make one with `tiepoints quantize`, and name its "
        "file with --int8"
    )


def _check_output(output: Path, opset: int, *, int8: bool) -> None:
    if output.suffix != ".onnx":
        raise ValueError(f"the output must end in .onnx, got {output}")
    first, last = OPSETS
    if opset < first:
        raise ValueError(
            f"opset {opset} is too old: the graphs need operators of {first}; use --opset {first} "
            f"to {last}"
        )
    if opset > last:
        raise ValueError(f"opset must be {first} to {last}, got {opset}")
    if int8 and not hasattr(torch.onnx, "ops"):
        raise ImportError(
            "the export with eight bits needs torch 2.8 or later: pip install -U torch"
        )
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, extra="onnx", purpose="the export")


def _sides() -> dict[int, Any]:
    dim = torch.export.Dim
    return {i: dim(name, min=LEAST_SIDE, max=MAX_SIDE) for i, name in ((2, "h"), (3, "w"))}


def _write(
    model: Any,
    output: Path,
    form: str,
    difference: float,
    fidelity: dict[str, float] | None,
) -> Exported:
    if fidelity is not None:
        rounded = {key: round(value, 4) for key, value in fidelity.items()}
        model.metadata_props.add(key="tiepoints.int8_fidelity", value=json.dumps(rounded))
    content = model.SerializeToString()
    with atomic_path(output) as tmp_path:
        tmp_path.write_bytes(content)
    return Exported(str(output), form, len(content), difference, fidelity)
