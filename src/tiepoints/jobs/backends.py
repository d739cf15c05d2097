"""What can run the networks on this computer, and how fast."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import nn

from ..backends import EXTRAS, installed, run_by
from ..device import processor_features
from ..errors import WeightsError, first_line
from ..models.patchnets import PATCH_SIZE
from ..models.spec import PatchSpec, ShapeSpec, spec_of
from ..names import BACKENDS, PRECISIONS
from ..weights import int8_graph, load, table

#: The network that is timed by default.
NETWORK = "desnet"
#: Height and width of the image, and number of patches, on which networks are timed.
SIZE, PATCHES = (480, 640), 256
#: Seconds of the whole timing.
SECONDS = 2.0


@dataclass
class BackendsReport:
    """Backends of this computer.

    Attributes:
        backends: name -> version of the installed ones.
        missing: name -> command that installs it.
        processor: feature -> whether the processor has it.
        threads: number of threads of the networks.
        network, input: what was timed: the network, and the shape of its input.
        milliseconds: backend and precision, such as ``torch float32`` -> time of the network.
        failed: backend and precision -> why it cannot run the network.
    """

    backends: dict[str, str]
    missing: dict[str, str]
    processor: dict[str, bool]
    threads: int
    network: str
    input: tuple[int, ...]
    milliseconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def describe_backends(network: str = NETWORK, seconds: float = SECONDS) -> BackendsReport:
    """List the installed backends and measure each with each precision for about ``seconds``
    altogether, in turn; the first measurement also exports the network.

    Args:
        network: name of an embedded network.

    Raises:
        ValueError: there is no such network.
        WeightsError: its file is missing or damaged.
    """
    if network not in table():
        raise ValueError(f"network must be one of {', '.join(table())}; got {network!r}")
    found = installed()
    spec = spec_of(load(network))
    shape = (1, 1, *SIZE)
    if isinstance(spec, PatchSpec | ShapeSpec):
        channels = len(spec.reach) if isinstance(spec, PatchSpec) else 1
        shape = (PATCHES, channels, PATCH_SIZE, PATCH_SIZE)
    report = BackendsReport(
        backends=found,
        missing={
            name: f"pip install 'tiepoints[{extra}]'"
            for name, extra in EXTRAS.items()
            if name not in found
        },
        processor=processor_features(),
        threads=torch.get_num_threads(),
        network=network,
        input=shape,
    )
    networks = {
        f"{backend} {precision}": _by_backend(backend, precision, report)
        for backend in BACKENDS
        for precision in PRECISIONS
        if backend in found and precision != "auto"
    }
    given = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    runs = {name: net for name, net in networks.items() if net is not None}
    with torch.inference_mode():
        for net in runs.values():
            net(given)  # the first call prepares
        ends = time.monotonic() + seconds
        while True:
            for name, net in runs.items():
                started = time.perf_counter()
                net(given)
                spent = 1000 * (time.perf_counter() - started)
                report.milliseconds[name] = min(spent, report.milliseconds.get(name, spent))
            if time.monotonic() > ends:
                return report


def _by_backend(backend: str, precision: str, report: BackendsReport) -> nn.Module | None:
    """The network for a backend and precision; None, with the reason in ``report``, without."""
    if (backend, precision) in (("torch", "int8"), ("onnxruntime", "bfloat16")):
        return None
    graph = int8_graph(report.network) if precision == "int8" else None
    try:
        return run_by(load(report.network), backend, precision, graph=graph)
    except (ImportError, ValueError, WeightsError, OSError) as error:
        report.failed[f"{backend} {precision}"] = first_line(error)
        return None
