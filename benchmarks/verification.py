"""COLMAP's verification of the pairs of a database with fewer random samples.

    python benchmarks/verification.py DATABASE.db ... [--trials 5000,2500,1000]

For each database of `tiepoints match` or `reconstruct` (`--camera single` for few cameras): seconds
of processor, inliers of the pairs with at least 40 inliers relative to those with COLMAP's 10,000
samples (mean and smallest ratio), and inliers of the other pairs. The databases are not changed.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tiepoints.formats.colmap import ColmapDatabase

DEFAULT_TRIALS = 10_000
#: Number of inliers of a pair with overlap.
MANY = 40


def verified(path: Path, trials: int) -> tuple[np.ndarray, float]:
    """Number of inliers of each pair, and seconds of processor."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.db"
        shutil.copy(path, copy)
        with ColmapDatabase(copy) as database:
            pairs = database.pairs()
            database.forget_geometry(pairs)
            started = time.process_time()
            database.verify(pairs, max_trials=trials)
            seconds = time.process_time() - started
            inliers = np.array([len(database.read_inliers(*pair)) for pair in pairs])
    return inliers, seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("databases", nargs="+", type=Path)
    parser.add_argument("--trials", default="5000,2500,1000", help="comma-separated")
    args = parser.parse_args(argv)
    print("| database | samples | s | pairs with overlap | inliers kept: mean, least | others |")
    print("|---|---:|---:|---:|---:|---:|")
    for path in args.databases:
        reference, _ = all_inliers = verified(path, DEFAULT_TRIALS)
        many = reference >= MANY
        for trials in (DEFAULT_TRIALS, *(int(t) for t in args.trials.split(","))):
            inliers, seconds = all_inliers if trials == DEFAULT_TRIALS else verified(path, trials)
            ratio = inliers[many] / reference[many]
            print(
                f"| {path.parent.name} | {trials:,} | {seconds:.1f} | {many.sum()} | "
                f"{ratio.mean():.4f}, {ratio.min():.3f} | {inliers[~many].sum():,} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
