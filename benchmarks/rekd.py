"""REKD: matching by its protocol with and without the orientation filter, and the time of the network.

Protocol (spec 6.4): the strongest 1000 points of each image on many scales, mutual nearest neighbours; repeatability one way, many to
one, within 3 px; MMA: matches within 3 and 5 px in image k. A star: matches that turn otherwise than most by more than 30 degrees
are dropped. Patches are turned by the points' angles; ``@upright`` describes them as the paper did. Stops and goes on like
`tiepoints evaluate`.

    python benchmarks/rekd.py OXFORD --work DIR [--systems ...] [--speed] [--out rekd.json] [--table rekd.md]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from common import machine
from tiepoints.detectors.equivariant import GroupConv, LiftingConv
from tiepoints.evaluation.datasets import homography_sequences
from tiepoints.evaluation.metrics import mean
from tiepoints.evaluation.page import Cell, Column, Row, Table
from tiepoints.evaluation.results import PairRow, read_run
from tiepoints.evaluation.run import RunSettings, evaluate
from tiepoints.weights import load

SYSTEMS = (
    "rekd+hardnet,rekd@upright+hardnet,rekd-light+hardnet,keynet+hardnet,keynet@rekd+hardnet,keynet@rekd-light+hardnet,"
    "keynet@dominant+hardnet,sift+hardnet,sift"
)
MEASURES = {
    "repeatability": "rekd.repeatability", "MMA@3": "rekd.mma@3", "MMA@5": "rekd.mma@5", "matches": "rekd.matches",
    "MMA@3*": "rekd*.mma@3", "MMA@5*": "rekd*.mma@5", "matches*": "rekd*.matches",
}  # fmt: skip
ROUNDS = 5


def figures(rows: list[PairRow]) -> dict[str, Any]:
    found: dict[str, Any] = {name: mean(row.value(metric) for row in rows) for name, metric in MEASURES.items()}
    for sequence in dict.fromkeys(row.sequence for row in rows):
        for name in ("MMA@3", "MMA@3*"):
            found[f"{name} {sequence}"] = mean(row.value(MEASURES[name]) for row in rows if row.sequence == sequence)
    return found


def table(content: dict[str, Any]) -> str:
    names = list(next(iter(content.values())))
    counts = {"matches", "matches*"}
    columns = [Column(name, "number" if name in counts else "%", 0 if name in counts else 1, 1) for name in names]
    rows = []
    for system, found in content.items():
        cells: list[Cell] = [found[n] if n in counts or found[n] is None else 100 * found[n] for n in names]
        rows.append(Row(system, cells))
    return Table("REKD's protocol", columns, rows).markdown()


def unexported(net: Any, image: torch.Tensor) -> torch.Tensor:
    """The network as it trains, in eval mode: filters made anew from their coefficients, normalisation on its own."""
    return net(image)[0]


def speed() -> dict[str, Any]:
    """Seconds of one 640 x 480 image, one scale, one thread, float32; the quickest of some rounds, taken in turn."""
    torch.set_num_threads(1)
    image = torch.rand(1, 1, 480, 640, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name in ("rekd", "rekd-light"):
            net: Any = load(name)
            fused = net.fused()
            runs = {"unexported": lambda n=net: unexported(n, image), "exported": lambda f=fused: f(image)}
            times: dict[str, float] = dict.fromkeys(runs, float("inf"))
            for _ in range(ROUNDS):
                for key, run in runs.items():
                    began = time.perf_counter()
                    run()
                    times[key] = min(times[key], time.perf_counter() - began)
            found[name] = {**times, "ratio": times["unexported"] / times["exported"]}
            found[name]["filters"] = _making_filters(net)
        score, _ = net(image)
        found["difference"] = float((score - fused(image)[0]).abs().max() / score.max())
    found["light is faster by"] = found["rekd"]["exported"] / found["rekd-light"]["exported"]
    return found


def _making_filters(net: Any) -> float:
    """Seconds to make the filters from their coefficients once."""
    began = time.perf_counter()
    for layer in net.modules():
        if isinstance(layer, LiftingConv | GroupConv):
            F.relu(layer.filters())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--work", type=Path, help="features and rows of the runs")
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    content: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    content["machine"] = machine()
    if args.folder is not None:
        if args.work is None:
            parser.error("an evaluation needs --work DIR")
        settings = RunSettings(tuple(args.systems.split(",")), num_points=1000, mode="si", protocols=("rekd",))
        done = read_run(evaluate(homography_sequences(args.folder), settings, args.work, workers=args.workers, progress=True))
        content["homography"] = {s: figures([row for row in done.rows if row.system == s and row.ok]) for s in done.systems}
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
