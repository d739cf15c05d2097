"""Photographs and reconstructions packed small for training on another machine, such as a rented
GPU without pycolmap.

    python examples/pack_training_data.py --output DATA.tar --images PHOTOS... \\
        --reconstructions SCENES... --held-out SCENES... [--max-side 480] [--quality 70]

SCENES: folders with a COLMAP model and its images each. The archive holds `photos/`, `scenes/NAME/`
and `held_out/NAME/`, the latter to validate on; `tiepoints train --reconstructions` reads them
without COLMAP. `examples/train_on_gpu.sh` trains on it.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
from pathlib import Path

from tiepoints.datasets.reconstructions import pack_scene, read_scenes
from tiepoints.datasets.synthetic import list_photos, read_photo, usable_photos
from tiepoints.errors import DataError


def pack_photos(folders: list[Path], output: Path, max_side: int, quality: int) -> int:
    """Reduced copies of all usable photographs; returns their number."""
    from PIL import Image

    output.mkdir(parents=True)
    photos, refused = usable_photos([photo for folder in folders for photo in list_photos(folder)])
    for line in refused:
        print(f"skipped: {line}")
    count = 0
    for photo in photos:
        try:
            Image.fromarray(read_photo(photo, max_side)).save(
                output / f"{count:05}.jpg", quality=quality
            )
            count += 1
        except DataError as error:
            print(f"skipped: {error}")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--reconstructions", type=Path, nargs="*", default=[])
    parser.add_argument("--held-out", type=Path, nargs="*", default=[])
    parser.add_argument("--max-side", type=int, default=480)
    parser.add_argument("--quality", type=int, default=70)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        count = pack_photos(args.images, folder / "photos", args.max_side, args.quality)
        for part, sources in (("scenes", args.reconstructions), ("held_out", args.held_out)):
            for source in sources:
                for number, scene in enumerate(read_scenes(source)):
                    pack_scene(
                        scene,
                        folder / part / f"{source.resolve().name}-{number}",
                        quality=args.quality,
                    )
        with tarfile.open(args.output, "w") as archive:
            archive.add(folder, arcname=".")
    size = args.output.stat().st_size / 1e6
    print(
        f"{count} photographs, {len(args.reconstructions)} + {len(args.held_out)} "
        f"reconstructions: {size:.0f} MB"
    )


if __name__ == "__main__":
    main()
