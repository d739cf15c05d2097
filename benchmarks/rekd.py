"""REKD: matching by its protocol with and without the filter by rotation, and the time of the
network.

Protocol: the strongest 1000 keypoints of each image at multiple scales, mutual nearest neighbors;
repeatability in one direction, many to one, within 3 px; MMA: fraction of matches within 3 and 5 px
in image k. With a star, matches whose rotation differs from the dominant one by more than 30
degrees are removed. Patches are rotated by the keypoints' angles; ``@upright`` describes them
upright, as the paper. An interrupted run resumes, as `tiepoints evaluate` does.

    python benchmarks/rekd.py OXFORD --work DIR [--systems ...] [--speed] [--out rekd.json] \\
        [--table rekd.md]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import machine
from tiepoints.datasets.homography import homography_sequences
from tiepoints.evaluation.results import PairRow, read_run
from tiepoints.evaluation.run import RunSettings, evaluate
from tiepoints.kernels.winograd import WinogradConv, pack
from tiepoints.metrics.geometry import mean
from tiepoints.models.rekd import REKD
from tiepoints.report.page import Cell, Column, Row, Table
from tiepoints.weights import load

SYSTEMS = (
    "rekd+hardnet,rekd@upright+hardnet,rekd-light+hardnet,keynet+hardnet,keynet@rekd+hardnet,keynet@rekd-light+hardnet,"
    "keynet@dominant+hardnet,sift+hardnet,sift"
)
MEASURES = {
    "repeatability": "rekd.repeatability",
    "MMA@3": "rekd.mma@3",
    "MMA@5": "rekd.mma@5",
    "matches": "rekd.matches",
    "MMA@3*": "rekd*.mma@3",
    "MMA@5*": "rekd*.mma@5",
    "matches*": "rekd*.matches",
}
ROUNDS = 5


def summarize(rows: list[PairRow]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: mean(row.value(metric) for row in rows) for name, metric in MEASURES.items()
    }
    for sequence in dict.fromkeys(row.sequence for row in rows):
        for name in ("MMA@3", "MMA@3*"):
            found[f"{name} {sequence}"] = mean(
                row.value(MEASURES[name]) for row in rows if row.sequence == sequence
            )
    return found


def table(content: dict[str, Any]) -> str:
    names = list(next(iter(content.values())))
    counts = {"matches", "matches*"}
    columns = [
        Column(name, "number" if name in counts else "%", 0 if name in counts else 1, 1)
        for name in names
    ]
    rows = []
    for system, found in content.items():
        cells: list[Cell] = [
            found[n] if n in counts or found[n] is None else 100 * found[n] for n in names
        ]
        rows.append(Row(system, cells))
    return Table("REKD's protocol", columns, rows).markdown()


def fastest(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Minimum time in seconds over some rounds, in which the runs alternate."""
    times = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for key, run in runs.items():
            started = time.perf_counter()
            run()
            times[key] = min(times[key], time.perf_counter() - started)
    return times


def speed() -> dict[str, Any]:
    """Seconds for a 640 x 480 image, single scale, one thread, float32. Unexported: the network as
    trained, with filters computed from their coefficients.
    """
    torch.set_num_threads(1)
    image = torch.rand(1, 1, 480, 640, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name in ("rekd", "rekd-light"):
            net: Any = load(name)
            fused = net.fused()
            times = fastest(
                {"unexported": lambda n=net: n(image), "exported": lambda f=fused: f(image)}
            )
            found[name] = {**times, "ratio": times["unexported"] / times["exported"]}
            found[name]["difference"] = float(
                (net(image)[0] - fused(image)[0]).abs().max() / net(image)[0].max()
            )
        found["light is faster by"] = found["rekd"]["exported"] / found["rekd-light"]["exported"]
        single_level: Any = REKD(group=36, num_levels=1).eval()
        exported = single_level.fused()
        runs = {"ours, exported": lambda: exported(image)}
        escnn = escnn_trunk()
        if escnn is not None:
            runs["escnn"] = lambda: escnn(image)
        found["one level"] = fastest(runs)
        found["72 to 72 channels, 5 x 5"] = fastest(one_convolution())
    return found


def escnn_trunk() -> Callable[[Tensor], Any] | None:
    """REKD's trunk on one level in escnn; None if that is not installed."""
    try:
        from escnn import gspaces, nn
    except ImportError:
        return None
    space = gspaces.rot2dOnR2(N=36)
    types = [nn.FieldType(space, [space.trivial_repr])] + [
        nn.FieldType(space, 2 * [space.regular_repr])
    ] * 3
    layers: list[Any] = []
    for a, b in pairwise(types):
        layers += [
            nn.R2Conv(a, b, kernel_size=5, padding=2, bias=False),
            nn.InnerBatchNorm(b),
            nn.ReLU(b),
        ]
    trunk = nn.SequentialModule(*layers).eval()
    orientation = nn.R2Conv(
        types[-1], nn.FieldType(space, [space.regular_repr]), kernel_size=1, bias=False
    ).eval()
    pool = nn.GroupPooling(types[-1])

    def run(image: Tensor) -> Any:
        maps = trunk(nn.GeometricTensor(image, types[0]))
        return pool(maps), orientation(maps)

    return run


def one_convolution() -> dict[str, Callable[[], Any]]:
    """The inner layer of the published size, in torch and by Winograd's algorithm."""
    conv = torch.nn.Conv2d(72, 72, 5, padding=2).to(memory_format=torch.channels_last)
    maps = torch.rand(1, 72, 480, 640).contiguous(memory_format=torch.channels_last)
    winograd, packed = WinogradConv(conv.weight, conv.bias), pack(maps[0].permute(1, 2, 0))  # type: ignore[arg-type]
    return {"library": lambda: F.relu_(conv(maps)), "Winograd": lambda: winograd(packed, 480, 640)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--work", type=Path, help="folder for features and rows")
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args(argv)
    content: dict[str, Any] = (
        json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    )
    content["machine"] = machine()
    if args.folder is not None:
        if args.work is None:
            parser.error("an evaluation requires --work DIR")
        settings = RunSettings(
            tuple(args.systems.split(",")), num_keypoints=1000, protocols=("rekd",)
        )
        results = read_run(
            evaluate(
                homography_sequences(args.folder),
                settings,
                args.work,
                workers=args.workers,
                progress=True,
            )
        )
        content["homography"] = {
            s: summarize([row for row in results.rows if row.system == s and row.ok])
            for s in results.systems
        }
        text = table(content["homography"])
        if args.table:
            args.table.write_text(text + "\n")
        print(text)
    if args.speed:
        content["speed"] = speed()
        print(json.dumps(content["speed"], indent=1))
    if args.out:
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
