"""Time of all metrics of a pair with 1,000 keypoints on one thread, from the stored features of
`tiepoints evaluate`.

    python benchmarks/metrics_speed.py RESULTS [--system keynet] [--repeat 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tiepoints.evaluation.pair import homography_metrics
from tiepoints.evaluation.results import read_run, stored_features


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--system", default="keynet")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    run = read_run(args.results)
    milliseconds, detection = [], []
    for row in run.rows:
        if row.system != args.system or row.H_ab is None:
            continue
        a, b = (stored_features(row, image) for image in (row.image_a, row.image_b))
        if a is None or b is None:
            continue
        H, times = torch.tensor(row.H_ab, dtype=torch.float64), []
        for _ in range(args.repeat):
            started = time.perf_counter()
            homography_metrics(a, b, H, num_keypoints=run.metadata["num_points"])
            times.append((time.perf_counter() - started) * 1000)
        milliseconds.append(min(times))
        detection.append(row.seconds or 0.0)
    print(
        f"{len(milliseconds)} pairs: median {statistics.median(milliseconds):.0f} ms, worst "
        f"{max(milliseconds):.0f} ms per pair; "
        f"detection {1000 * statistics.mean(detection):.0f} ms per image"
    )


if __name__ == "__main__":
    main()
