"""Extract the images of a folder into one HDF5 file, as hloc reads it, and read the file again.

    python examples/extract_folder.py photos/ --output features

Run again, it resumes. Needs h5py: pip install 'tiepoints[hdf5]'.
"""

import argparse
from pathlib import Path

import tiepoints
from tiepoints.formats.store import open_features
from tiepoints.jobs.extract import extract_images

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("images", help="folder of photographs")
parser.add_argument("--output", type=Path, default=Path("features"))
parser.add_argument("--num-keypoints", type=int, default=2048)
args = parser.parse_args()

options = tiepoints.ExtractOptions(
    detector="keynet", descriptor="hardnet-light", num_keypoints=args.num_keypoints
)
report = extract_images([args.images], args.output, options, format="h5")
print(f"{report.done} extracted, {report.skipped} done before")
for image, reason in report.failed:
    print(f"failed: {image}: {reason}")

with open_features(args.output / "features.h5") as store:
    for name in store.names():
        features = store.read(name)
        print(f"{name}: {len(features)} keypoints, descriptors {tuple(features.descriptors.shape)}")
