"""Inference of networks by ONNX Runtime and OpenVINO.

A backend replaces the costly part of a fused network, its ``stack`` (``models.spec.StackInput``),
or a whole network without one. The part is exported as an ONNX graph, once: graphs are kept in the
user's cache folder under the checksum of their weights. A graph is compared with the network in
PyTorch on generated inputs of two sizes before it is used.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .errors import WeightsError, first_line
from .files import atomic_path, require
from .models.spec import StackInput, fused
from .names import BACKENDS, PRECISIONS

logger = logging.getLogger(__name__)
#: Backend other than PyTorch -> extra that installs it.
EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}
#: Height and width of the generated maps, and numbers of patches, of the comparison with PyTorch.
CHECK_SIZES = ((64, 96), (41, 57))
CHECK_COUNTS = (4, 7)
#: Largest difference from PyTorch, as a fraction of the largest value.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
#: Smallest cosine between the outputs of an eight-bit graph and of PyTorch.
INT8_COSINE = 0.9
#: Key of the description of a network in the metadata of its eight-bit graph.
METADATA = "tiepoints"
#: Version of the exported graphs: one more when the costly part of a network changes.
GRAPH_VERSION = 1

Run = Callable[[np.ndarray], np.ndarray]


def check_names(backend: str, precision: str) -> None:
    """Check the names of a backend and a precision, and whether they fit each other.

    Raises:
        ValueError: an unknown name, or a backend without this precision.
    """
    for what, name, known in (
        ("backend", backend, BACKENDS),
        ("precision", precision, PRECISIONS),
    ):
        if name not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}; got {name!r}")
    if (backend, precision) == ("torch", "int8"):
        raise ValueError(
            "backend torch has no precision int8; use backend onnxruntime, openvino or auto"
        )
    if (backend, precision) == ("onnxruntime", "bfloat16"):
        raise ValueError(
            "backend onnxruntime has no precision bfloat16; use backend torch, openvino or auto"
        )


def installed() -> dict[str, str]:
    """Name -> version of the installed backends, without importing them."""
    found = {"torch": str(torch.__version__)}
    for name in EXTRAS:
        if importlib.util.find_spec(name) is not None:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "unknown"
    return found


# ---- graphs


def input_of(net: nn.Module) -> StackInput:
    """The input of the costly part of a network; of a user's network, a gray image."""
    return getattr(net, "input", StackInput())


def example_input(inputs: StackInput, number: int = 0) -> Tensor:
    """A generated input, noise and edges; ``number`` 0 or 1 selects its size."""
    if inputs.side is None:
        h, w = (-(-side // inputs.step) * inputs.step for side in CHECK_SIZES[number])
        shape = (1, inputs.channels, h, w)
    else:
        shape = (CHECK_COUNTS[number], inputs.channels, inputs.side, inputs.side)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(number))
    smooth = nn.functional.avg_pool2d(noise, 9, stride=1, padding=4)
    return 0.2 * noise + 0.8 * (smooth > smooth.mean())


def export_network(net: nn.Module, path: Path, inputs: StackInput | None = None) -> None:
    """Write a network from one tensor to one tensor as an ONNX graph (atomically), whose number of
    patches, or height and width, are not fixed.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        RuntimeError: the network cannot be exported.
    """
    for module in ("onnx", "onnxscript"):
        require(module, extra="onnx", purpose="the export of a network")
    inputs = input_of(net) if inputs is None else inputs
    axes = (2, 3) if inputs.side is None else (0,)
    shapes = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    try:
        with _silent_export(), torch.inference_mode(False):
            program: Any = torch.onnx.export(
                net.eval(), (example_input(inputs),), dynamo=True, dynamic_shapes=(shapes,)
            )
    except Exception as error:  # of many types, some of them private
        raise RuntimeError(
            f"a {type(net).__name__} cannot be exported as an ONNX graph ({first_line(error)})"
        ) from error
    with atomic_path(path) as tmp_path:
        program.save(str(tmp_path))


@contextlib.contextmanager
def _silent_export() -> Iterator[None]:
    """Without what the exporter prints and logs about itself."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def cache_folder() -> Path:
    """The folder of exported graphs: ``tiepoints/graphs`` in the user's cache folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return folder / "tiepoints" / "graphs"


def cached_graph(net: nn.Module) -> Path:
    """Path of the graph of a network or its costly part, which may not exist yet."""
    digest = hashlib.sha256(f"{GRAPH_VERSION} {torch.__version__} {net}".encode())
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return cache_folder() / f"{digest.hexdigest()[:32]}.onnx"


def _exported(net: nn.Module, inputs: StackInput, *, again: bool = False) -> bytes:
    """The graph of a network: from the cache, or exported, with ``again`` in any case."""
    path = cached_graph(net)
    if path.is_file() and not again:
        return path.read_bytes()
    try:
        export_network(net, path, inputs)
    except OSError as error:  # a folder that cannot be written
        logger.debug("the graph of a %s is not kept: %s", type(net).__name__, error)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.onnx"
            export_network(net, path, inputs)
            return path.read_bytes()
    return path.read_bytes()


# ---- sessions


def open_graph(graph: bytes, backend: str, precision: str, *, reuse: bool = True) -> Run:
    """A graph as a function from array to array, with as many threads as PyTorch has now.

    Args:
        reuse: keep the memory of a call for the next one; not for maps, which have many sizes.

    Raises:
        ImportError: the backend is not installed; the message names the extra.
        RuntimeError: the backend cannot read the graph.
    """
    library = require(backend, extra=EXTRAS[backend], purpose=f"backend {backend}")
    threads = torch.get_num_threads()
    try:
        if backend == "onnxruntime":
            return _onnxruntime(library, graph, threads, reuse)
        return _openvino(library, graph, threads, precision)
    except Exception as error:  # the libraries' own types
        raise RuntimeError(f"{backend} cannot read the graph ({first_line(error)})") from error


def _onnxruntime(library: Any, graph: bytes, threads: int, reuse: bool) -> Run:
    options = library.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = options.enable_mem_pattern = reuse
    # waiting threads would take the processor from PyTorch's
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = library.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})[0]


def _openvino(library: Any, graph: bytes, threads: int, precision: str) -> Run:
    core = library.Core()
    hint = "bf16" if precision == "bfloat16" else "f32"
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": hint,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.compile_model(core.read_model(graph), "CPU", settings)
    return lambda array: model([array])[0]


class GraphStack(nn.Module):
    """A costly part that a backend runs: (B,C,H,W) -> (B,D,h,w), or patches -> (N,D)."""

    def __init__(self, graph: bytes, inputs: StackInput, backend: str, precision: str):
        super().__init__()
        self.graph, self.input, self.backend, self.precision = graph, inputs, backend, precision
        self.run: Run = open_graph(graph, backend, precision, reuse=inputs.side is not None)

    def __reduce__(self) -> tuple[Any, ...]:  # sessions cannot be copied
        return type(self), (self.graph, self.input, self.backend, self.precision)

    def extra_repr(self) -> str:
        return f"{self.backend}, {self.precision}"

    def forward(self, maps: Tensor) -> Tensor:
        array = maps.detach().float().contiguous().numpy()
        if self.input.side is not None:
            return torch.from_numpy(self.run(array))
        # images one by one: graphs have a batch of one
        parts = [torch.from_numpy(self.run(array[i : i + 1])) for i in range(len(array))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class StoredGraph(nn.Module):
    """An eight-bit graph of a weights file, in place of the costly part of its network.

    Args:
        path: the ONNX file.
        inputs: input of the graph.
        sample: values of its output for ``example_input``, see ``sampled``.
    """

    def __init__(self, path: Path, inputs: StackInput, sample: list[float]):
        super().__init__()
        self.path, self.input, self.sample = path, inputs, sample
        self._opened: GraphStack | None = None

    def open(self, backend: str = "auto") -> GraphStack:
        """The graph run by a backend.

        Raises:
            ImportError: the backend, or with ``auto`` any, is not installed.
            ValueError: PyTorch, which runs no graphs.
            WeightsError: the backend cannot read the graph, or its output is not the stored one.
        """
        check_names(backend, "int8")
        names = candidates("", backend, "int8")
        if not names:
            require("onnxruntime", extra="onnx", purpose="an eight-bit network")
        try:
            stack = GraphStack(self.path.read_bytes(), self.input, names[0], "int8")
            found = sampled(stack(example_input(self.input)))
        except RuntimeError as error:
            raise WeightsError(f"{self.path}: {error}; quantize the network again") from error
        if not (likeness := cosine(found, torch.tensor(self.sample))) >= INT8_COSINE:
            raise WeightsError(
                f"{self.path}: with {names[0]}, its output has the cosine {likeness:.3f} to the "
                "stored one; quantize the network again"
            )
        return stack

    def forward(self, maps: Tensor) -> Tensor:
        if self._opened is None:
            self._opened = self.open()
        return self._opened(maps)


def sampled(output: Tensor, count: int = 256) -> Tensor:
    """Some values of an output, evenly spaced, to be stored with a graph."""
    flat = output.flatten()
    return flat[torch.linspace(0, len(flat) - 1, count).long()]


def cosine(found: Tensor, expected: Tensor) -> float:
    """Cosine between two outputs; -1 for other shapes."""
    if found.shape != expected.shape:
        return -1.0
    return float(nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0))


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest value; infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-12)


class _Recorder(nn.Module):
    """A costly part that keeps its last input."""

    def __init__(self, stack: nn.Module):
        super().__init__()
        self.stack = stack
        self.last = torch.empty(0)

    def forward(self, maps: Tensor) -> Tensor:
        self.last = maps.clone()
        return self.stack(maps)


def natural_input(net: nn.Module) -> Tensor:
    """The input of the costly part of a fused network for a generated image or patches: an
    eight-bit graph is right only in the range of values that it was made for.
    """
    stack = cast(nn.Module, net.stack)
    given = input_of(stack)
    image = example_input(StackInput(side=given.side))
    recorder = _Recorder(stack)
    net.stack = recorder
    with torch.inference_mode():
        net(nn.functional.avg_pool2d(image, 3, stride=1, padding=1))
    net.stack = stack
    return recorder.last


def check(stack: GraphStack, net: nn.Module, examples: list[Tensor]) -> str:
    """Compare a graph with its network in PyTorch: why it must not be used, or an empty text."""
    for example in examples:
        with torch.inference_mode():
            try:
                found, expected = stack(example), net(example.clone()).float()
            except Exception as error:  # the libraries' own types
                return first_line(error)
        if stack.precision == "int8":
            if not (likeness := cosine(found, expected)) >= INT8_COSINE:
                return f"its output has the cosine {likeness:.3f} to PyTorch's"
        elif not (off := difference(found, expected)) <= TOLERANCE[stack.precision]:
            return f"its output differs from PyTorch's by {off:.1e}"
    return ""


# ---- choice

#: Class of a fused network -> precision -> backends faster than PyTorch, the fastest first
#: (docs/how-to/backends.md); others run in PyTorch unless a backend is named.
FASTER: dict[str, dict[str, tuple[str, ...]]] = {
    "FusedPatchNet": {
        "float32": ("onnxruntime", "openvino"),
        "bfloat16": ("openvino",),
    },
}
#: Backends of eight-bit networks, the fastest first.
INT8_BACKENDS = ("openvino", "onnxruntime")


def candidates(network: str, backend: str, precision: str) -> list[str]:
    """Backends other than PyTorch that may run a class of fused networks, the preferred one first;
    with ``auto`` only installed ones.
    """
    if backend != "auto":
        return [] if backend == "torch" else [backend]
    order = INT8_BACKENDS if precision == "int8" else FASTER.get(network, {}).get(precision, ())
    return [name for name in order if importlib.util.find_spec(name) is not None]


def run_by(
    net: nn.Module,
    backend: str = "auto",
    precision: str = "float32",
    *,
    device: torch.device | str = "cpu",
    graph: Path | None = None,
    inputs: StackInput | None = None,
) -> nn.Module:
    """The fast form of a network for inference, run by a backend.

    Args:
        net: not fused.
        device: other devices than the CPU run networks in PyTorch.
        backend: ``auto`` takes one faster than PyTorch if it is installed and the network's graph
            has been exported before, because an export takes seconds; a named one exports it.
        precision: ``float32``, ``bfloat16`` or, with ``graph``, ``int8``.
        graph: the eight-bit graph of the network's costly part.
        inputs: input of a network without a costly part of its own; default: a gray image.

    Raises:
        ImportError: the named backend, or with ``int8`` any, is not installed.
        ValueError: the named backend cannot run the network, or not on this device; there is no
            eight-bit graph.
        WeightsError: no backend computes the eight-bit graph right.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    quick = fused(net)
    stack = getattr(quick, "stack", None)
    stored = isinstance(stack, StoredGraph)
    if torch.device(device).type != "cpu":
        if backend not in ("auto", "torch") or precision == "int8" or stored:
            raise ValueError(
                f"backends other than torch, and precision int8, need device cpu; got {device}"
            )
        return fused(net, dtype).to(device)
    if isinstance(stack, GraphStack):
        return quick
    if isinstance(stack, StoredGraph):
        opened = copy.deepcopy(quick)
        opened.stack = stack.open(backend)
        return _without_floor(opened)
    if precision == "int8":
        return _int8(quick, backend, graph)
    if stack is None and hasattr(quick, "part") and backend in EXTRAS:
        raise ValueError(
            f"backend {backend} cannot run a {type(net).__name__}: it computes parts itself"
        )
    whole = quick if stack is None else stack
    given = inputs if stack is None and inputs is not None else input_of(whole)
    for name in candidates(type(quick).__name__, backend, precision):
        try:
            found = _float_stack(whole, name, precision, given, export=backend != "auto")
        except RuntimeError as error:
            message = f"backend {name} cannot run a {type(net).__name__}: {error}"
            if backend != "auto":
                raise ValueError(message) from error
            logger.debug("%s", message)
            continue
        if found is not None:
            target = _Whole(quick) if stack is None else quick
            target.stack = found
            return target
    return quick if dtype == torch.float32 else fused(net, dtype)


def _int8(net: nn.Module, backend: str, graph: Path | None) -> nn.Module:
    """A fused network with its eight-bit graph; arguments and errors as ``run_by``."""
    if graph is None:
        raise ValueError(
            f"there is no eight-bit graph of a {type(net).__name__.removeprefix('Fused')}; make "
            "one with `tiepoints quantize`"
        )
    names = candidates("", backend, "int8")
    if not names:
        require("onnxruntime", extra="onnx", purpose="precision int8")
    part, problem = cast(nn.Module, net.stack), ""
    for name in names:
        try:
            stack = GraphStack(graph.read_bytes(), input_of(part), name, "int8")
            problem = check(stack, part, [natural_input(net)])
        except RuntimeError as error:
            problem = str(error)
        if not problem:
            net.stack = stack
            return _without_floor(net)
    raise WeightsError(f"{graph} cannot be used with {names[-1]}: {problem}")


def _without_floor(net: nn.Module) -> nn.Module:
    """The network without its stored response to a constant image, which is another one in eight
    bits, so that the detector measures it.
    """
    if hasattr(net, "floor"):
        net.floor = None  # type: ignore[assignment]
    return net


class _Whole(nn.Module):
    """A network without a costly part of its own, with all of it as that part."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.stack = net
        for name in ("floor", "offset", "ratio", "spec", "dim"):
            if hasattr(net, name):
                setattr(self, name, getattr(net, name))

    def forward(self, maps: Tensor) -> Tensor:
        """The output of the network."""
        return self.stack(maps)


def _float_stack(
    net: nn.Module, backend: str, precision: str, inputs: StackInput, *, export: bool
) -> GraphStack | None:
    """A network as a graph from the cache; exported if it is missing, with ``export``, or damaged;
    None if it is missing otherwise, or computes something else.

    Raises:
        ImportError: the backend is not installed.
        RuntimeError: the network cannot be exported, or the backend cannot read its graph.
    """
    require(backend, extra=EXTRAS[backend], purpose=f"backend {backend}")
    examples = [example_input(inputs, number) for number in range(len(CHECK_SIZES))]
    if cached_graph(net).is_file():
        with contextlib.suppress(RuntimeError):
            stack = GraphStack(_exported(net, inputs), inputs, backend, precision)
            if not check(stack, net, examples):
                return stack
    elif not export:
        return None
    graph = _exported(net, inputs, again=True)
    stack = GraphStack(graph, inputs, backend, precision)
    if not (problem := check(stack, net, examples)):
        return stack
    kind = type(net).__name__.removeprefix("_")
    logger.warning("backend %s is not used for a %s: %s", backend, kind, problem)
    return None
