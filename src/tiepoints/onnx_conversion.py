"""Conversion of the modules of ``graphs`` to ONNX models."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .graphs import INT8_DOMAIN
from .names import EXPORT_OPSET

#: Versions of the operator set: below the first there is no resizing of the kind that the levels
#: need, above the last ONNX Runtime 1.20 reads no file.
OPSETS = (EXPORT_OPSET, 21)
#: Tensors of at least this many bytes are stored in half precision if that is exact.
HALF_BYTES = 4096


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


def convert(
    module: nn.Module,
    example: tuple[Tensor, ...],
    shapes: list[dict[int, Any]],
    inputs: list[str],
    outputs: list[str],
    *,
    opset: int = OPSETS[0],
) -> Any:
    """The model (``onnx.ModelProto``) of a module of ``graphs``.

    Args:
        module: in eval mode.
        example: its inputs.
        shapes: of each input, dimension -> ``torch.export.Dim`` of those of any size.
        inputs, outputs: their names.
        opset: version of the operator set, in ``OPSETS``.
    """
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
            opset_version=opset,
            custom_translation_table={torch.ops.aten.sort.stable: sort},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    remove_descriptions(model)
    _store_half(model)
    _insert_int8(model)
    return model


def remove_descriptions(model: Any) -> None:
    """Remove what exporters write about the source code of each node, with paths of files."""
    model.doc_string = model.graph.doc_string = ""
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


def _insert_int8(model: Any) -> None:
    """Replace the nodes of ``graphs.Int8Part`` by their eight-bit graphs, whose weights are stored
    once.
    """
    import onnx

    nodes: list[Any] = []
    loaded: dict[str, Any] = {}
    for node in model.graph.node:
        if node.domain != INT8_DOMAIN:
            nodes.append(node)
            continue
        path = node.attribute[0].s.decode()
        if path not in loaded:
            graph = loaded[path] = onnx.load(path).graph
            used = {name for part in graph.node for name in part.input}
            for tensor in graph.initializer:
                if tensor.name not in used:
                    continue
                added = model.graph.initializer.add()
                added.CopyFrom(tensor)
                added.name = _shared_name(path, tensor.name)
                added.doc_string = ""
        nodes += _copied(loaded[path], path, node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    others = [entry for entry in model.opset_import if entry.domain == INT8_DOMAIN]
    for entry in others:
        model.opset_import.remove(entry)


def _shared_name(path: str, name: str) -> str:
    return f"{Path(path).stem}/{name}"


def _copied(graph: Any, path: str, place: Any) -> list[Any]:
    """The nodes of an eight-bit graph with the input and output of the node that they replace."""
    import onnx

    names = {"": "", graph.input[0].name: place.input[0], graph.output[0].name: place.output[0]}
    names |= {tensor.name: _shared_name(path, tensor.name) for tensor in graph.initializer}
    copies = []
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.metadata_props[:]
        copy.doc_string, copy.name = "", f"{place.output[0]}/{node.name}"
        for ends in (copy.input, copy.output):
            ends[:] = [names.get(name, f"{place.output[0]}/{name}") for name in ends]
        copies.append(copy)
    return copies
