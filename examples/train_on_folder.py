"""Train a detector on a folder of photographs, then compare it with the shipped one.

    python examples/train_on_folder.py photos/ --output mine.safetensors --minutes 40

Run again after an interruption, it resumes. Needs: pip install 'tiepoints[train]'.
"""

import argparse
import logging
from pathlib import Path

import tiepoints
from tiepoints.evaluation.compare import compare_systems
from tiepoints.training.loop import RunOptions
from tiepoints.training.recipes import TrainData

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("images", help="folder of photographs, searched recursively")
parser.add_argument("--output", type=Path, default=Path("mine.safetensors"))
parser.add_argument("--network", default="keynet", help="keynet, keynet-tiny or sobelnet")
parser.add_argument("--minutes", type=float)
parser.add_argument("--steps", type=int, help="instead of minutes")
args = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(message)s")

data = TrainData(args.images)
result = tiepoints.train(
    args.network,
    data,
    args.output,
    run=RunOptions(resume=True),
    minutes=args.minutes,
    steps=args.steps,
)
print(f"{result.steps} steps, best validation {result.best:.3f} at step {result.best_step}")
_, held_out = data.photographs()
if len(held_out) > 1:
    print(compare_systems(args.network, str(args.output), held_out).table())
