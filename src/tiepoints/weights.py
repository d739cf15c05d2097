"""Trained weights by name: ``load("keynet")`` returns the trained network.

``data/index.toml`` has class, settings, file, checksum and license of each; files are safetensors.
``save`` writes the same format, with the network's settings in the header, and ``load`` also reads
such files by path.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .backends import METADATA, StoredGraph, input_of
from .detect import response_floor
from .errors import WeightsError, first_line
from .files import LFS_POINTER, atomic_path, is_lfs_pointer, require
from .models.affnet import AffNet
from .models.desnet import DesNet
from .models.keynet import KeyNet
from .models.keynet_legacy import LegacyKeyNet
from .models.patchnets import HardNet, HardNetContext, HardNetLight, HyNet, SOSNet
from .models.rekd import REKD
from .models.sobelnet import SobelNet
from .models.spec import DetectorSpec, fused, spec_of

DATA = Path(__file__).parent / "data"
NETWORKS: dict[str, type[nn.Module]] = {
    n.__name__: n
    for n in (
        *(KeyNet, LegacyKeyNet, REKD, SobelNet),
        *(HardNet, HardNetLight, HardNetContext, HyNet, SOSNet, DesNet, AffNet),
    )
}

#: Largest header of a weights file in bytes.
MAX_HEADER = 2**22
#: Largest number in the settings of a network.
MAX_SETTING = 1024
#: A network whose settings are at most this many times the default is built without a check of its
#: size.
LARGE_FACTOR = 4
#: Names of floating point types in safetensors files.
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


def table() -> dict[str, dict[str, Any]]:
    """Name -> entry of every embedded network in ``data/index.toml``."""
    index = tomllib.loads((DATA / "index.toml").read_text())
    return {name: entry for name, entry in index.items() if "network" in entry}


def file_checksum(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def int8_graph(name: str) -> Path | None:
    """The eight-bit graph of an embedded network, None if there is none."""
    entry = table().get(name, {}).get("int8")
    return None if entry is None else DATA / entry["file"]


def passed_gate(detector: str, descriptor: str) -> bool:
    """Whether the eight-bit networks of a detector and a descriptor together lost less than the
    quality gate allows (``passed`` in the detector's entry; benchmarks/quantized.py).
    """
    return descriptor in table().get(detector, {}).get("int8", {}).get("passed", ())


def digest(name: str, *, int8: bool = False) -> str | None:
    """SHA-256 of the weights file of a network, given by the name of an embedded one or by path;
    None for what has no weights, such as ``rootsift``.

    With ``int8`` it is that of the eight-bit graph of an embedded network that has one.

    Files are read again only if their size or time of modification has changed.
    """
    if entry := table().get(name):
        return (entry.get("int8", entry) if int8 else entry)["sha256"]
    path = Path(name)
    if not path.is_file():
        return None
    status = path.stat()
    return _digest(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    return file_checksum(path)


def weights_checksum(net: nn.Module) -> str:
    """SHA-256 of all tensors of a network in hexadecimal, independent of file and device."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save(
    net: nn.Module, path: str | Path, metadata: dict[str, Any] | None = None, *, half: bool = False
) -> None:
    """Write a network's weights with its class, settings and ``metadata`` as one safetensors file
    (atomically).

    With ``half`` the filters are stored in half precision; ``load`` returns float32 in any case.
    """
    path = Path(path)

    def stored(value: Tensor) -> Tensor:
        value = value.detach().cpu().contiguous()
        return value.half() if half and value.ndim == 4 else value

    header = {
        "network": type(net).__name__,
        "settings": json.dumps(net.settings),
        "offset": json.dumps(getattr(net, "offset", (0.0, 0.0))),
        "floor": json.dumps(_measured_floor(net)),
        "facts": json.dumps(metadata or {}, default=str),
    }
    try:
        with atomic_path(path) as tmp_path:
            # not by safetensors' save_file, whose files only their owner may read
            tmp_path.write_bytes(
                to_bytes({k: stored(v) for k, v in net.state_dict().items()}, metadata=header)
            )
    except OSError as error:
        raise OSError(f"weights {path} could not be written ({error})") from error


def _measured_floor(net: nn.Module) -> float | None:
    """The response of a detector to a constant image; None for a descriptor."""
    if not isinstance(spec_of(net), DetectorSpec):
        return None
    return response_floor(fused(copy.deepcopy(net).cpu().eval()))


def load(name: str | Path) -> nn.Module:
    """Load an embedded network by name, or a weights file written by ``save``, in eval mode.

    Raises:
        WeightsError: no such name or file, or the file is damaged or does not fit its network.
    """
    entry = table().get(str(name))
    path = DATA / entry["file"] if entry else Path(name)
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; give a .safetensors file")
    if not path.is_file():
        raise WeightsError(
            f"no weights named {str(name)!r}; known names are {', '.join(table())}, or give a "
            ".safetensors file"
        )
    with _open(path) as (file, header):
        network, settings = _described_network(path, header)
        if not _is_small(path, network, settings):
            with torch.device("meta"):  # which allocates no memory, but takes seconds to import
                _check_shapes(path, file, _build(path, network, settings))
        net = _build(path, network, settings)
        _check_shapes(path, file, net)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise WeightsError(f"{path}: {key} contains NaN or infinity; restore or retrain it")
    net.load_state_dict(tensors, strict=True)
    if hasattr(net, "floor"):
        floor = header.get("floor", "null")
        net.floor = None if floor == "null" else _numbers(path, header, "floor", 1)[0]  # type: ignore[assignment]
    if hasattr(net, "offset") and "offset" in header:
        net.offset = _numbers(path, header, "offset", 2)  # type: ignore[assignment]
    return net.eval()


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a safetensors file and read the text part of its header.

    Raises:
        WeightsError: the file is damaged or of another format.
    """
    with open(path, "rb") as stream:
        start = stream.read(64)
    length = int.from_bytes(start[:8], "little")
    if is_lfs_pointer(start):
        raise WeightsError(f"{path} {LFS_POINTER}")
    if length > MAX_HEADER <= path.stat().st_size - 8:
        raise WeightsError(
            f"{path}: a header of {length} bytes is not one of weights (at most {MAX_HEADER})"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            yield file, header
    except (SafetensorError, OSError) as error:
        reason = "the file is empty" if not start else first_line(error)
        raise WeightsError(
            f"{path} is no readable safetensors file ({reason}); official checkpoints are "
            "converted by `tiepoints weights import`"
        ) from error


def _described_network(path: Path, header: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Class name and settings of the network that a header names."""
    network = header.get("network")
    if network not in NETWORKS:
        raise WeightsError(
            f"{path} names no known network in its header ({repr(network)[:80]}); was it "
            "written by tiepoints?"
        )
    settings = _header_json(path, header, "settings")
    known = inspect.signature(NETWORKS[network]).parameters
    if not isinstance(settings, dict) or not settings.keys() <= known.keys():
        raise WeightsError(
            f"{path}: the settings in its header are not those of a {network} "
            f"({', '.join(known)}); it is damaged or of another version"
        )
    return network, settings


def _is_small(path: Path, network: str, settings: dict[str, Any]) -> bool:
    """Whether all numbers in the settings are near those of the default network.

    Raises:
        WeightsError: a number is above ``MAX_SETTING``.
    """
    small = True
    for key, value in settings.items():
        default = inspect.signature(NETWORKS[network]).parameters[key].default
        values = value if isinstance(value, list) else [value]
        usual = default if isinstance(default, tuple) else [default] * len(values)
        for found, number in zip_longest(values, usual):
            if isinstance(found, int | float):
                if not abs(found) <= MAX_SETTING:
                    raise WeightsError(
                        f"{path}: {key} in its header is {repr(value)[:80]}; it is damaged "
                        f"(at most {MAX_SETTING})"
                    )
                limit = LARGE_FACTOR * max(1, number if isinstance(number, int | float) else 1)
                small &= abs(found) <= limit
    return small


def _build(path: Path, network: str, settings: dict[str, Any]) -> nn.Module:
    try:
        return NETWORKS[network](**settings)
    except Exception as error:  # any, as the settings have any types
        raise WeightsError(
            f"{path}: no {network} with the settings in its header ({first_line(error)}); it is "
            "damaged or of another version"
        ) from error


def _check_shapes(path: Path, file: Any, net: nn.Module) -> None:
    """Compare the tensors of an open file with those of its network.

    Raises:
        WeightsError: they differ; the message names the first ones.
    """
    network, expected = type(net).__name__, net.state_dict()
    stored = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    problems = [f"{key} is missing" for key in expected if key not in stored]
    problems += [f"{key} is not expected" for key in stored if key not in expected]
    for key in expected.keys() & stored.keys():
        shape, kind = tuple(stored[key].get_shape()), stored[key].get_dtype()
        if shape != tuple(expected[key].shape):
            problems.append(f"{key} has shape {shape}, expected {tuple(expected[key].shape)}")
        elif (kind in FLOAT_TYPES) != expected[key].is_floating_point():
            problems.append(f"{key} has type {kind}, expected {expected[key].dtype}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise WeightsError(
            f"{path} does not fit a {network} with the settings in its header: "
            f"{'; '.join(sorted(problems)[:4])}{more}"
        )


def _numbers(path: Path, header: dict[str, str], key: str, count: int) -> tuple[float, ...]:
    """The ``count`` finite numbers that a header has under a key."""
    value = _header_json(path, header, key)
    try:
        numbers = tuple(float(v) for v in (value if isinstance(value, list) else [value]))
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise WeightsError(f"{path}: {key} in its header must be {count} numbers; it is damaged")
    return numbers


def _header_json(path: Path, header: dict[str, str], key: str) -> Any:
    try:
        return json.loads(header[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path}: its header has no readable {key} ({type(error).__name__}); was it written by "
            "tiepoints?"
        ) from error


def save_graph(
    net: nn.Module, graph: Path, path: Path, sample: list[float], metadata: dict[str, Any]
) -> None:
    """Write the eight-bit graph of a network's costly part, with what ``load_graph`` needs to
    build the rest (atomically).

    Args:
        net: not fused.
        graph: the ONNX file.
        sample: output of the graph, see ``backends.StoredGraph``.

    Raises:
        ImportError: onnx is not installed.
    """
    onnx = require("onnx", extra="onnx", purpose="eight-bit networks")
    model = onnx.load(str(graph))
    rest = {name: net.state_dict()[name].tolist() for name in _outside_stack(net)}
    content = {
        "network": type(net).__name__,
        "settings": net.settings,
        "offset": getattr(net, "offset", (0.0, 0.0)),
        "floor": getattr(net, "floor", None),
        "facts": metadata,
        "sample": sample,
        "tensors": rest,
    }
    onnx.helper.set_model_props(model, {METADATA: json.dumps(content, default=str)})
    with atomic_path(path) as tmp_path:
        onnx.save(model, str(tmp_path))


def _outside_stack(net: nn.Module) -> list[str]:
    """Names of the tensors of a network that are used outside its costly part."""
    if isinstance(net, KeyNet | SobelNet):  # all: the last columns of odd widths are computed there
        return list(net.state_dict())
    if isinstance(net, REKD):
        return [name for name in net.state_dict() if name.startswith("score")]
    return []


def read_graph(path: Path) -> dict[str, Any]:
    """The description that ``save_graph`` wrote with an eight-bit graph.

    Raises:
        WeightsError: the file is damaged or not one of ours.
    """
    if not path.is_file():
        raise WeightsError(f"no weights file {path}")
    onnx = require("onnx", extra="onnx", purpose="a weights file .onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
        found = {entry.key: entry.value for entry in model.metadata_props}
        content = json.loads(found[METADATA])
        if content["network"] not in NETWORKS:
            raise ValueError(f"its network is {content['network']!r}")
        return content
    except Exception as error:  # protobuf's own types
        raise WeightsError(
            f"{path} is no eight-bit network written by `tiepoints quantize` ({first_line(error)})"
        ) from error


def load_graph(path: Path) -> nn.Module:
    """Load an eight-bit network written by ``save_graph``, in its fast form for inference.

    Raises:
        WeightsError: the file is damaged or not one of ours.
    """
    net, sample = _beside_stack(path)
    quick = fused(net)
    stack = cast(nn.Module, quick.stack)
    quick.stack = StoredGraph(path, input_of(stack), sample)
    return quick


def load_beside_graph(path: Path) -> nn.Module:
    """The network of a file written by ``save_graph`` without the weights of its costly part, for
    what computes that part with the graph of the file.

    Raises:
        WeightsError: the file is damaged or not one of ours.
    """
    return _beside_stack(path)[0]


def _beside_stack(path: Path) -> tuple[nn.Module, list[float]]:
    """The network of ``load_beside_graph``, and a sample of the graph's output."""
    content = read_graph(path)
    net = _build(path, content["network"], content["settings"])
    try:
        tensors = {name: torch.tensor(value) for name, value in content["tensors"].items()}
        if tensors.keys() != set(_outside_stack(net)):
            raise ValueError("its tensors are not those of its network")
        net.load_state_dict(tensors, strict=False)
        if hasattr(net, "floor"):
            net.floor = content["floor"]
            net.offset = tuple(content["offset"])  # type: ignore[assignment]
        return net.eval(), [float(value) for value in content["sample"]]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} is damaged ({first_line(error)}); quantize it again") from error


def metadata_of(path: Path) -> dict[str, Any]:
    """The ``metadata`` with which ``save`` wrote a weights file.

    Raises:
        WeightsError: the file is damaged.
    """
    with _open(path) as (_, header):
        facts = _header_json(path, {"facts": "{}", **header}, "facts")
    if not isinstance(facts, dict):
        raise WeightsError(f"{path}: the facts in its header are not a JSON object; it is damaged")
    return facts


def verify(name: str) -> None:
    """Check an embedded file against its checksum and load it.

    Raises:
        WeightsError: the file is missing, changed or does not load.
    """
    entry = table().get(name)
    if entry is None:
        raise WeightsError(f"no weights named {name!r}; known names are {', '.join(table())}")
    path = DATA / entry["file"]
    if not path.is_file():
        raise WeightsError(f"{path} is missing; reinstall the package")
    if file_checksum(path) != entry["sha256"]:
        raise WeightsError(f"{path} differs from its checksum; reinstall the package")
    load(name)
    if (graph := int8_graph(name)) is not None:
        if not graph.is_file():
            raise WeightsError(f"{graph} is missing; reinstall the package")
        if file_checksum(graph) != entry["int8"]["sha256"]:
            raise WeightsError(f"{graph} differs from its checksum; reinstall the package")
