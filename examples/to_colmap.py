"""Photographs to a 3D model: extract, match and verify all pairs, then COLMAP's incremental mapper.

    python examples/to_colmap.py photos/ --output model

The folder gets ``database.db`` for any COLMAP tool and the model as COLMAP's binary files. Run
again, it resumes. Needs pycolmap: pip install 'tiepoints[colmap]'.
"""

import argparse
import sys
from pathlib import Path

import tiepoints
from tiepoints.jobs.match import match_images
from tiepoints.jobs.reconstruct import reconstruct

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("images", help="folder of photographs")
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--num-keypoints", type=int, default=2048)
parser.add_argument("--camera", default="auto", help="auto, single or MODEL:p1,p2,...")
parser.add_argument("--seed", type=int, default=0, help="of the mapper's first pair")
parser.add_argument("--threads", type=int, default=-1, help="of the mapper; 1 repeats exactly")
args = parser.parse_args()

database = args.output / "database.db"
try:
    options = tiepoints.ExtractOptions(num_keypoints=args.num_keypoints, max_size=1600)
    report = match_images([args.images], database, options, camera=args.camera)
except (ValueError, FileNotFoundError, ImportError, tiepoints.DataError) as error:
    sys.exit(f"error: {error}")
for name, reason in report.failed:
    print(f"failed: {name}: {reason}", file=sys.stderr)
print(f"{report.done} pairs matched, {report.skipped} done before, {report.matches} matches")
folder = args.output / "sparse"
model = reconstruct(
    database, args.images, folder, seed=args.seed, threads=args.threads, progress=True
)
print(f"{model.registered} images, {model.points} 3D points -> {model.folder}")
print(f"track length {model.track_length:.2f}, reprojection error {model.error:.2f} px")
