"""Size and speed of detectors: table 4 and section 6.4 of the Key.Net paper."""

from __future__ import annotations

import time

import torch

from ..extract import detector_network
from ..models.spec import fused
from .systems import split_modes, system_kind

#: Side in pixels of the image of section 6.4.
TIMED_SIDE = 600


def num_parameters(detector: str) -> int | None:
    """Number of learnable parameters of a detector: a name of ours, or a weights file (ours or an
    official checkpoint), perhaps with modes ``@...``; None for other systems.

    Raises:
        ValueError, FileNotFoundError: as ``systems.system_kind``.
        WeightsError: a weights file cannot be read.
    """
    base = split_modes(detector)[0]
    if system_kind(base) != "network":
        return None
    return sum(p.numel() for p in detector_network(base).parameters() if p.requires_grad)


def seconds_per_image(
    detector: str, *, side: int = TIMED_SIDE, repeat: int = 5, device: str = "cpu"
) -> float:
    """Seconds that the network of a detector takes for the score map of a gray image of ``side`` x
    ``side`` pixels, as in the paper: the smallest of ``repeat`` runs after a first one.

    Args:
        detector: as in ``num_parameters``.
    """
    net = fused(detector_network(split_modes(detector)[0]).eval()).to(device)
    image = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    cuda = image.device.type == "cuda"
    seconds = []
    with torch.inference_mode():
        for _ in range(repeat + 1):
            started = time.perf_counter()
            net(image)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
