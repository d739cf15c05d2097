"""Batches through the whole pipeline on a GPU against the CPU, without kornia: images per second of
a batch of images of the same size, the time of each stage, and the copies to the host in each.

Copies to the host make the GPU wait. They are counted by PyTorch's dispatcher: ``.cpu()``,
``.item()``, ``bool()``, ``nonzero`` and masks as indices, whose number of results the host needs.

    python benchmarks/gpu.py [--device cuda] [--systems keynet+hardnet,sobelnet+desnet]
        [--batch 1,8] [--size 640x480] [--repeat 5] [--no-cpu] [--out FILE.json]

``--device cpu`` runs everywhere; it counts these operations of all tensors, also of those that are
on the CPU with a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common import machine
from tiepoints.extract import Extractor, build

POINTS = 2048
#: Operations after which the host waits for a GPU.
WAITS = {
    "aten._local_scalar_dense": "item or bool",
    "aten.item": "item or bool",
    "aten.nonzero": "nonzero",
    "aten.masked_select": "nonzero",
    "aten.is_nonzero": "item or bool",
    "aten.equal": "item or bool",
}


class HostCopies(TorchDispatchMode):
    """Counts operations that copy from ``device`` to the host."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device).type
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        name = str(function.overloadpacket)
        first = arguments[0] if arguments else None
        if not isinstance(first, Tensor) or first.device.type != self.device:
            return function(*arguments, **(named or {}))
        if name in WAITS:
            self.found[WAITS[name]] += 1
        elif name == "aten.index" and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in arguments[1]
        ):
            self.found["nonzero"] += 1
        elif name == "aten._to_copy" and self.device != "cpu":
            self.found["copy"] += str((named or {}).get("device", "")) == "cpu"
        return function(*arguments, **(named or {}))


def images(batch: int, size: tuple[int, int], device: str) -> Tensor:
    """Blurred noise (B,1,H,W) with structure at several scales."""
    width, height = size
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(batch, 1, height, width)
    for scale in (2, 6, 18):
        noise = torch.rand(batch, 1, height // scale + 2, width // scale + 2, generator=generator)
        total += torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")
    return (total / 3).clamp(0, 1).to(device)


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def stages(extractor: Extractor, batch: Tensor) -> dict[str, Callable[[], Any]]:
    """The stages of a batch, to be called in this order."""
    kept: dict[str, Any] = {}

    def pyramid() -> None:
        kept["pyramid"] = extractor.pyramid(batch)

    def detect() -> None:
        kept["keypoints"] = extractor.detect(kept["pyramid"])

    def describe() -> None:
        assert extractor.describe is not None
        kept["descriptors"] = [
            extractor.describe(kept["pyramid"], keypoints, i)
            for i, keypoints in enumerate(kept["keypoints"])
        ]

    return {"pyramid": pyramid, "detection": detect, "description": describe}


def measure(
    system: str, device: str, batch: int, size: tuple[int, int], repeat: int
) -> dict[str, Any]:
    """Images per second, milliseconds of each stage per image, and copies to the host per stage."""
    detector, _, descriptor = system.partition("+")
    extractor = build(detector, descriptor, num_keypoints=POINTS, device=device)
    pixels = images(batch, size, device)
    calls = stages(extractor, pixels)
    copies: dict[str, dict[str, int]] = {}
    for name, call in calls.items():  # also the warm-up
        with HostCopies(device) as counter:
            call()
        copies[name] = dict(counter.found)
    times: dict[str, list[float]] = {name: [] for name in calls}
    whole: list[float] = []
    for _ in range(repeat):
        for name, call in calls.items():
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            times[name].append(1000 * (time.perf_counter() - started) / batch)
        started = time.perf_counter()
        extractor.extract_tensor(pixels)
        synchronize(device)
        whole.append(time.perf_counter() - started)
    return {
        "system": system,
        "device": device,
        "batch": batch,
        "images_per_second": batch / statistics.median(whole),
        "milliseconds": {name: statistics.median(values) for name, values in times.items()},
        "copies_to_host": copies,
        "copies_per_image": sum(sum(found.values()) for found in copies.values()) / batch,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--systems", default="keynet+hardnet,keynet+desnet,sobelnet+desnet")
    parser.add_argument("--batch", default="1,8", help="sizes of batches")
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--no-cpu", action="store_true", help="without the CPU for comparison")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    width, height = map(int, args.size.split("x"))
    rows = []
    for system in args.systems.split(","):
        settings = [(args.device, int(batch)) for batch in args.batch.split(",")]
        if not args.no_cpu and args.device != "cpu":
            settings.append(("cpu", 1))
        for device, batch in settings:
            row = measure(system, device, batch, (width, height), args.repeat)
            rows.append(row)
            parts = ", ".join(f"{name} {ms:.1f} ms" for name, ms in row["milliseconds"].items())
            print(
                f"{system} on {device}, batch {batch}: {row['images_per_second']:.2f} images/s; "
                f"{parts}; {row['copies_per_image']:.0f} copies to the host per image "
                f"{row['copies_to_host']}"
            )
    if args.out:
        device = args.device
        gpu = torch.cuda.get_device_name() if device.startswith("cuda") else device
        content = {"machine": {**machine(), "device": gpu}, "size": [width, height], "rows": rows}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
