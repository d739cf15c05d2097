"""Ablations of the Key.Net paper at a small budget: M-SIP windows and handcrafted filters (figure
5), levels and base (table 1).

All networks are trained on the same pairs in the same order and differ from the paper's in one
choice. Two metrics on held-out photographs: ``ours`` is the validation metric of training (mutual
repeatability within 3 px of 150 keypoints), ``paper`` the published one (location only, overlap
0.6, top 25). Rows are written one by one; an interrupted run resumes.

    python benchmarks/ablations.py PHOTOS --out ablations.json [--steps 200] [--batch-size 4] \\
        [--size 160] [--only NAME]
    python benchmarks/ablations.py --table seed0.json seed1.json
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import machine
from tiepoints.datasets.pairs import PairFile, write_pairs
from tiepoints.datasets.synthetic import (
    PRESETS,
    PairDataset,
    list_photos,
    split_photos,
    usable_photos,
)
from tiepoints.files import write_json
from tiepoints.geometry import warp_points
from tiepoints.keypoints import detect_peaks
from tiepoints.metrics.repeatability import keynet_points, keynet_repeatability, mutual_matches
from tiepoints.models.keynet import KeyNet
from tiepoints.training.loop import FitSettings, RunOptions, Task, Trainer
from tiepoints.training.losses import WINDOW_WEIGHTS, WINDOWS, msip_loss
from tiepoints.training.presets import RECIPES
from tiepoints.training.validation import VALIDATION_KEYPOINTS, VALIDATION_SEED, validation_score

PAPER_POINTS = 25
#: Maximum number of seeds of a row: a short training may end with a score map of zeros and is then
#: repeated with another seed.
SEEDS = 4
RECIPE = RECIPES["msip"]
FULL = "M-SIP 8 16 24 32 40"


def variants() -> dict[str, dict[str, Any]]:
    """Row -> part of the paper, options of the network and of the loss, and the published
    repeatability (%) or None.

    The check marks of figure 5 (left) are missing in the text of the paper; the order of its rows
    is assumed to be: adding windows from the smallest, then from the largest, then all. Its right
    half and table 1b are plots.
    """
    rows: dict[str, dict[str, Any]] = {}

    def add(
        name: str,
        part: str,
        published: float | None = None,
        net: dict | None = None,
        loss: dict | None = None,
    ) -> None:
        rows[name] = {"part": part, "published": published, "net": net or {}, "loss": loss or {}}

    add(FULL, "figure 5, left", 79.1)
    for sides, published in (((0, 1), 70.5), ((0, 2), 74.6), ((0, 3), 76.8), ((0, 4), 77.6)):
        windows, weights = WINDOWS[slice(*sides)], WINDOW_WEIGHTS[slice(*sides)]
        add(
            "M-SIP " + " ".join(map(str, windows)),
            "figure 5, left",
            published,
            loss={"windows": windows, "weights": weights},
        )
    for first, published in ((4, 65.7), (3, 71.4), (2, 73.2), (1, 74.9)):
        windows, weights = WINDOWS[first:], WINDOW_WEIGHTS[first:]
        add(
            "M-SIP " + " ".join(map(str, windows)),
            "figure 5, left",
            published,
            loss={"windows": windows, "weights": weights},
        )
    for blocks in (1, 2, 3):
        for handcrafted in ("both", "first", "second", "none"):
            if (blocks, handcrafted) != (3, "both"):
                net = {"num_blocks": blocks, "handcrafted": handcrafted}
                add(f"filters {handcrafted}, {blocks} blocks", "figure 5, right", net=net)
    for levels, published in ((1, 72.5), (2, None), (4, None), (5, 79.5)):
        add(f"levels {levels}", "table 1a", published, net={"num_levels": levels})
    for base in (2.0, 5.0, 10.0):
        add(f"base {base:g}", "table 1b", loss={"base": base})
    return rows


def scores(net: torch.nn.Module, pairs: list[dict[str, Tensor]]) -> dict[str, float]:
    """Both metrics, averaged over the pairs."""
    ours, paper = [], []
    for pair in pairs:
        (xy_a, _), (xy_b, _) = detect_peaks(
            net(torch.stack([pair["image_a"], pair["image_b"]])), 1000
        )
        h, w = pair["image_a"].shape[-2:]
        found = mutual_matches(
            xy_a, xy_b, pair["H_ab"], (h, w), (h, w), num_keypoints=VALIDATION_KEYPOINTS
        )[0]
        ours.append(found / VALIDATION_KEYPOINTS)
        a, b = keynet_points(xy_a, xy_b, pair["H_ab"], (h, w), (h, w), num_keypoints=PAPER_POINTS)
        in_a = warp_points(xy_b[b].double(), torch.linalg.inv(pair["H_ab"].double()))
        scale_a, scale_b = torch.ones(len(a)), torch.ones(len(b))
        paper.append(float(keynet_repeatability(xy_a[a], scale_a, in_a, scale_b)["rep_L"] or 0.0))
    return {"ours": sum(ours) / len(ours), "paper": sum(paper) / len(paper)}


def train(
    row: dict[str, Any],
    pairs: Path,
    validation: list[dict[str, Tensor]],
    settings: FitSettings,
    seed: int,
) -> dict[str, float]:
    torch.manual_seed(seed)
    net = KeyNet(**row["net"]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(network, batch):
        n = len(batch["image_a"])
        images = torch.cat([batch["image_a"], batch["image_b"]]).contiguous(
            memory_format=torch.channels_last
        )
        scores = network(images).float()
        options = {**RECIPE.loss, **row["loss"]}
        return msip_loss(
            scores[:n],
            scores[n:],
            batch["H_ab"],
            mask_a=batch["mask_a"],
            mask_b=batch["mask_b"],
            **options,
        )

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        task = Task(
            lambda length: PairFile(pairs, length=length, seed=seed),
            loss,
            lambda n: validation_score(n, validation[:1]),
        )
        options = RunOptions("cpu", progress=False, workers=0, save_every=math.inf)
        Trainer(net, task, settings, Path(scratch) / "checkpoint", options).fit()
    seconds = time.perf_counter() - started
    fused = net.eval().fused()
    with torch.inference_mode():
        return {**scores(fused, validation), "seconds": round(seconds, 1)}


def markdown(contents: list[dict[str, Any]]) -> str:
    """Table of results files of different seeds: means, with the values of each seed."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in variants()}
    for content in contents:
        for row in content["rows"]:
            rows[row["name"]].append(row)
    lines = [
        "| part | choice | parameters | ours % | paper's measure % | published % |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        if not found:
            continue
        cells = [found[0]["part"], name, f"{found[0]['parameters']:,}"]
        for key in ("ours", "paper"):
            values = [100 * row[key] for row in found]
            per_seed = f" ({', '.join(f'{v:.1f}' for v in values)})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.1f}{per_seed}")
        cells.append("" if found[0]["published"] is None else f"{found[0]['published']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument(
        "--table",
        type=Path,
        nargs="+",
        help="only print the table of results files of different seeds",
    )
    args = parser.parse_args()
    if args.table:
        print(markdown([json.loads(path.read_text()) for path in args.table]))
    elif args.photos is None or args.out is None:
        parser.error("PHOTOS and --out are required (or --table FILE)")
    else:
        run(args, parser)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Train and measure the rows that the results file lacks."""
    torch.set_num_threads(args.threads)
    settings = FitSettings(
        steps=args.steps,
        batch_size=args.batch_size,
        validate_every=args.steps,
        average=0.98,
        seed=args.seed,
    )
    budget = {k: getattr(args, k) for k in ("steps", "batch_size", "size", "seed", "threads")}
    content: dict[str, Any] = {"machine": machine(), "budget": budget, "rows": []}
    if args.out.is_file():
        content = json.loads(args.out.read_text())
        if content["budget"] != budget:
            parser.error(f"{args.out} was made with {content['budget']}; use another --out")
    training, held_out = split_photos(usable_photos(list_photos(args.photos))[0])
    checks = PairDataset(
        held_out,
        replace(PRESETS["default"], size=RECIPE.check_size),
        seed=VALIDATION_SEED,
        length=RECIPE.check_pairs,
    )
    validation = [checks[i] for i in range(len(checks))]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = Path(scratch) / "pairs.safetensors"
        view = replace(PRESETS["default"], size=args.size)
        write_pairs(pairs, training, view, args.steps * args.batch_size, seed=args.seed)
        done = {row["name"] for row in content["rows"]}
        for name, row in variants().items():
            if name in done or (args.only and args.only not in name):
                continue
            for seed in range(args.seed, args.seed + SEEDS):
                found = train(row, pairs, validation, settings, seed)
                if found["paper"] > 0:
                    break  # a score map of zeros has no gradient
            metadata = {
                "part": row["part"],
                "published": row["published"],
                "parameters": sum(p.numel() for p in KeyNet(**row["net"]).parameters()),
                "seed": seed,
            }
            content["rows"].append({"name": name, **metadata, **found})
            write_json(args.out, content)
            print(
                f"{name:28} ours {found['ours']:.3f}  paper's {found['paper']:.3f}  "
                f"{found['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
