"""Time and memory of matching compared with other implementations, and the number of correct
matches needed for a verified estimate.

    python benchmarks/matching.py --out benchmarks/results/matching.json [--most 50000] [--draws 20]

Each measurement of memory runs in a separate process with one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from common import machine
from tiepoints.estimation import estimate
from tiepoints.geometry import warp_points
from tiepoints.matching import match
from tiepoints.structs import Features, Keypoints

RATIO = 0.9


def features(descriptors: torch.Tensor) -> Features:
    n = len(descriptors)
    points = Keypoints(torch.zeros(n, 2), torch.ones(n), torch.zeros(n), torch.ones(n))
    return Features(points, torch.nn.functional.normalize(descriptors, dim=1), (10, 10))


def whole_matrix(a: torch.Tensor, b: torch.Tensor) -> int:
    """Mutual nearest neighbors and the ratio test in both directions, in the simplest form."""
    distance = (2 - 2 * (a.float() @ b.float().T)).clamp(min=0).sqrt()
    a_to_b, b_to_a = distance.topk(2, dim=1, largest=False), distance.topk(2, dim=0, largest=False)
    index = a_to_b.indices[:, 0]
    mutual = b_to_a.indices[0][index] == torch.arange(len(a))
    unique_a = a_to_b.values[:, 0] <= RATIO * a_to_b.values[:, 1]
    unique_b = b_to_a.values[0] <= RATIO * b_to_a.values[1]
    return int((mutual & unique_a & unique_b[index]).sum())


def with_kornia(a: torch.Tensor, b: torch.Tensor) -> int:
    from kornia.feature import match_smnn

    return len(match_smnn(a, b, RATIO)[1])


METHODS = {
    "tiepoints": lambda a, b: len(match(features(a), features(b), ratio=RATIO)),
    "tiepoints bfloat16": lambda a, b: len(
        match(features(a.bfloat16()), features(b.bfloat16()), ratio=RATIO)
    ),
    "whole matrix": whole_matrix,
    "kornia match_smnn": with_kornia,
}


def measure(method: str, n: int) -> dict:
    """Processor time and peak memory in addition to the descriptors; run in a new process."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    a = torch.nn.functional.normalize(torch.randn(n, 128, generator=rng), dim=1)
    b = torch.nn.functional.normalize(a + 0.05 * torch.randn(n, 128, generator=rng), dim=1)[
        torch.randperm(n, generator=rng)
    ]
    METHODS[method](a[:200], b[:200])  # imports, warm-up
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = METHODS[method](a, b)
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"way": method, "points": n, "matches": found, "seconds": seconds}
    return row | {"peak MiB": peak / 1024, "more than before MiB": (peak - before) / 1024}


def trusted(draws: int) -> list[dict]:
    """Fraction of random sets of 100 matches with some correct ones (noise of 0.5 px in both
    images) whose estimate is verified.
    """
    K = torch.tensor([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]], dtype=torch.float64)
    H = torch.tensor(
        [[1.1, 0.1, 20.0], [-0.05, 0.95, 10.0], [1e-4, -5e-5, 1.0]], dtype=torch.float64
    )
    rows = []
    for kind in ("homography", "fundamental", "pose"):
        for correct in (0, 8, 10, 12, 15, 20, 25, 30, 40):
            ok = 0
            for seed in range(draws):
                rng = torch.Generator().manual_seed(seed)
                a, b = (
                    torch.rand(100, 2, generator=rng, dtype=torch.float64)
                    * torch.tensor([640, 480])
                    for _ in range(2)
                )
                if kind == "homography":
                    b[:correct] = warp_points(a, H)[:correct]
                else:
                    depth = 4 + 5 * torch.rand(100, 1, generator=rng, dtype=torch.float64)
                    projected = (
                        torch.cat([a, torch.ones_like(depth)], 1) @ torch.linalg.inv(K).T * depth
                        + torch.tensor([1.0, 0.1, 0.2])
                    ) @ K.T
                    b[:correct] = (projected[:, :2] / projected[:, 2:])[:correct]
                a, b = (
                    xy + 0.5 * torch.randn(100, 2, generator=rng, dtype=torch.float64)
                    for xy in (a, b)
                )
                K_ab = {"K_a": K, "K_b": K} if kind == "pose" else {}
                ok += estimate(a, b, kind, threshold=2.0, seed=seed, **K_ab).ok
            rows.append({"kind": kind, "right of 100": correct, "ok": ok / draws})
            print(rows[-1], flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--most", type=int, default=50_000, help="keypoints per image of the largest pair"
    )
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    rows = []
    for n, methods in (
        (10_000, list(METHODS)),
        (arguments.most, ["tiepoints", "tiepoints bfloat16"]),
    ):
        for method in methods:
            done = subprocess.run(
                [sys.executable, __file__, "--one", method, str(n)],
                check=True,
                capture_output=True,
                text=True,
            )
            rows.append(json.loads(done.stdout))
            print(rows[-1], flush=True)
    content = {
        "machine": machine(),
        "threads": 1,
        "matching": rows,
        "trusted": trusted(arguments.draws),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
