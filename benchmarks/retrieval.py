"""Share of truly overlapping image pairs among the proposed ones, of COLMAP models.

    python benchmarks/retrieval.py MODEL_FOLDER ... --work build/retrieval \\
        [--descriptors hardnet,desnet] --out FILE.json
    python benchmarks/retrieval.py --train PHOTO_FOLDER ... --work build/retrieval \\
        --descriptors desnet --save desnet.vocabulary

Model folders are those of ``find_models``; all of them are one set of images. Two images
overlap if they share at least 20 3D points. A pair is proposed if one image is among the k most
similar ones of the other; ``recall`` is the share of the overlapping pairs that are proposed. As
images may overlap with more than k others, ``bounded`` is the mean over the images of the number of
overlapping ones among the k most similar, divided by the largest number possible. Compared with the
vocabulary of the package and the order by matches: without this order, a vocabulary trained on the
images themselves, a bag of words (tf-idf of the same words), and random images.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import machine
from tiepoints.datasets.reconstructions import find_models
from tiepoints.extract import ExtractOptions
from tiepoints.files import write_json
from tiepoints.formats.colmap import require_pycolmap
from tiepoints.formats.hdf5 import FeatureFile
from tiepoints.jobs.extract import extract_images
from tiepoints.names import DETECTOR
from tiepoints.retrieval import (
    CANDIDATES,
    Vocabulary,
    center,
    load_vocabulary,
    most_similar,
    order_by_matches,
    strongest,
    train_vocabulary,
)
from tiepoints.weights import digest

#: Shared 3D points from which two images overlap.
SHARED_POINTS = 20
COUNTS = (5, 10, 20)
#: Detector of each descriptor, as in ``reconstruct``.
DETECTORS = {"desnet": "sobelnet"}


def extract(folder: Path, work: Path, descriptor: str) -> Path:
    """Extract a folder of images to ``work``; returns the file of the features."""
    options = ExtractOptions(
        detector=DETECTORS.get(descriptor, DETECTOR),
        descriptor=descriptor,
        num_keypoints=1024,
        max_size=640,
    )
    name = folder.parent.name if folder.name == "images" else folder.name
    output = work / descriptor / name
    extract_images([str(folder)], output, options, format="h5", half=True, progress=False)
    return output / "features.h5"


def read(path: Path) -> dict[str, Tensor]:
    """Image -> local descriptors."""
    with FeatureFile(path) as store:
        found = {name: store.read(name).descriptors for name in store.names()}
    return {name: value for name, value in found.items() if value is not None}


def shared_points(folder: Path) -> dict[frozenset[str], int]:
    """Pairs of images of a model -> number of 3D points that they share."""
    model = require_pycolmap().Reconstruction(find_models(folder)[0][0])
    shared: Counter[frozenset[int]] = Counter()
    for point in model.points3D.values():
        images = {element.image_id for element in point.track.elements}
        shared.update(map(frozenset, combinations(sorted(images), 2)))
    names = {image: model.image(image).name for image in model.reg_image_ids()}
    return {
        frozenset(f"{folder.name}/{names[image]}" for image in pair): count
        for pair, count in shared.items()
    }


def bag_of_words(vocabulary: Vocabulary, images: list[Tensor]) -> Tensor:
    """tf-idf of the words of each image, of unit length."""
    words = len(vocabulary.words)
    histograms = torch.stack(
        [torch.bincount(vocabulary.assign(image)[1], minlength=words).float() for image in images]
    )
    inverse = (len(images) / (histograms > 0).sum(dim=0).clamp(min=1)).log()
    return torch.nn.functional.normalize(histograms * inverse, dim=1)


def _table(vocabulary: Vocabulary, images: list[Tensor]) -> Tensor:
    return center(torch.stack([vocabulary.describe(image) for image in images]))


def nearest(table: Tensor, images: list[Tensor] | None = None) -> Tensor:
    """Most similar images (N,K) of each, ordered by matches if their descriptors are given."""
    own = torch.arange(len(table))
    found = most_similar(table, table, CANDIDATES, torch.stack([own, own + 1], dim=1))
    if images is None:
        return found
    return order_by_matches(found, own, torch.stack([strongest(image) for image in images]))


def measure(folders: list[Path], work: Path, descriptor: str) -> list[dict[str, Any]]:
    """Recall of each method on all folders together."""
    names: list[str] = []
    images: list[Tensor] = []
    shared: dict[frozenset[str], int] = {}
    for folder in folders:
        images_folder = find_models(folder)[0][1]
        for name, local in read(extract(images_folder, work, descriptor)).items():
            names.append(f"{folder.name}/{name}")
            images.append(local)
        shared |= shared_points(folder)
    true = {pair for pair, count in shared.items() if count >= SHARED_POINTS}
    packaged = load_vocabulary(digest(descriptor))
    own = train_vocabulary(images)
    generator = torch.Generator().manual_seed(0)
    words = packaged or own
    index = {name: i for i, name in enumerate(names)}
    partners: dict[int, set[int]] = {}
    for pair in true:
        i, j = (index[name] for name in pair)
        partners.setdefault(i, set()).add(j)
        partners.setdefault(j, set()).add(i)
    table = _table(words, images)
    kind = "VLAD" if packaged else "VLAD, own vocabulary"
    rankings = {
        f"{kind}, by matches": nearest(table, images),
        kind: nearest(table),
        "bag of words": nearest(bag_of_words(words, images)),
        "random": nearest(torch.randn(len(images), 64, generator=generator)),
        "number of shared points": _by_shared_points(names, shared),
    }
    if packaged:
        rankings["VLAD, own vocabulary"] = nearest(_table(own, images))
    return [
        {
            "descriptor": descriptor,
            "method": method,
            "k": count,
            "images": len(images),
            "overlapping": len(true),
            **recalls(found[:, :count].tolist(), partners, len(true), count),
        }
        for method, found in rankings.items()
        for count in COUNTS
    ]


def recalls(
    found: list[list[int]], partners: dict[int, set[int]], overlapping: int, count: int
) -> dict[str, float]:
    """Number of proposed pairs, ``recall`` and ``bounded``."""
    proposed = {frozenset((i, j)) for i, row in enumerate(found) for j in row if j >= 0}
    correct = sum(j in partners.get(i, ()) for i, j in map(sorted, proposed))
    bounded = [
        len(others & set(found[i])) / min(count, len(others)) for i, others in partners.items()
    ]
    return {
        "proposed": len(proposed),
        "recall": correct / overlapping,
        "bounded": sum(bounded) / len(bounded),
    }


def _by_shared_points(names: list[str], shared: dict[frozenset[str], int]) -> Tensor:
    """Images (N,N-1) ordered by the number of shared points, which the models know."""
    index = {name: i for i, name in enumerate(names)}
    similarity = torch.zeros(len(names), len(names))
    for pair, count in shared.items():
        i, j = (index[name] for name in pair)
        similarity[i, j] = similarity[j, i] = count
    return similarity.fill_diagonal_(-1).argsort(dim=1, descending=True)[:, :-1]


def train(folders: list[Path], work: Path, descriptor: str, path: Path) -> None:
    """Train a vocabulary on the images of folders."""
    parts: list[Tensor] = []
    for folder in folders:
        parts += read(extract(folder, work, descriptor)).values()
    weights = digest(descriptor)
    assert weights is not None
    train_vocabulary(parts).save(path, weights)
    print(f"{len(parts)} images -> {path}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="folders of models")
    parser.add_argument("--train", nargs="+", type=Path, help="folders of photographs")
    parser.add_argument("--descriptors", default="hardnet,desnet", help="comma-separated")
    parser.add_argument("--work", type=Path, required=True, help="folder of the features")
    parser.add_argument("--save", type=Path, help="file of the vocabulary to train")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    descriptors = args.descriptors.split(",")
    if args.train:
        train(args.train, args.work, descriptors[0], args.save)
        return
    rows = [row for name in descriptors for row in measure(args.folders, args.work, name)]
    for row in rows:
        print(
            f"{row['descriptor']:8} {row['method']:22} k {row['k']:3} recall {row['recall']:.3f} "
            f"bounded {row['bounded']:.3f}"
        )
    folders = [folder.name for folder in args.folders]
    write_json(args.out, {"folders": folders, "rows": rows, "machine": machine()})


if __name__ == "__main__":
    main()
