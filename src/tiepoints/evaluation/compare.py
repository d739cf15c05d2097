"""Compare two systems on warped copies of given images, with confidence intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..datasets.synthetic import PRESETS, Pair, PairDataset, PairSettings
from ..device import choose_device
from ..errors import DataError
from ..geometry import warp_points
from ..matching import match
from ..metrics.repeatability import localization
from ..models.spec import DetectorSpec, ShapeSpec, spec_of
from ..names import PATCH_DESCRIPTORS
from ..progress import track
from ..weights import load
from .systems import Options, System, system, system_label

#: Pairs of views of each image.
VIEWS = 3
#: A keypoint or match is correct within this many pixels.
DISTANCE = 3.0
#: Bootstrap samples of the images for a confidence interval of 95 %.
RESAMPLINGS = 2000
#: Measure -> unit, and whether larger is better.
MEASURES = {
    "repeatability": ("%", True),
    "correct matches": ("", True),
    "localization error": ("px", False),
}


@dataclass(frozen=True)
class CompareSettings:
    """Settings of a comparison.

    Attributes:
        photos: number of images, sampled evenly from those given.
        num_keypoints: number of keypoints compared per view.
        size: side of the views in pixels.
        seed: seed of the warps.
        device: device of the networks.
    """

    photos: int = 30
    num_keypoints: int = 500
    size: int = 480
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class Measure:
    """One measure of both systems.

    Attributes:
        a, b: means over the images.
        difference: mean of b - a.
        low, high: confidence interval (95 %) of the difference.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Attributes:
        a, b: names of the systems.
        photos: number of images.
        measures: name (``MEASURES``) -> values; without ``correct matches`` for a system without
            descriptors.
    """

    a: str
    b: str
    photos: int
    measures: dict[str, Measure]

    def verdict(self, name: str) -> str:
        """Name of the better system in a measure, if the interval of the difference excludes 0."""
        measure, larger = self.measures[name], MEASURES[name][1]
        if measure.low <= 0 <= measure.high:
            return "no difference shown"
        return self.b if (measure.difference > 0) == larger else self.a

    def to_json(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        measures = {
            name: {**dataclasses.asdict(measure), "better": self.verdict(name)}
            for name, measure in self.measures.items()
        }
        return {"a": self.a, "b": self.b, "photos": self.photos, "measures": measures}

    def table(self) -> str:
        """A text table with one line per measure."""
        names = [system_label(name) for name in (self.a, self.b)]
        widths = [max(8, len(name)) for name in names]
        title = f"{self.photos} images"
        lines = [
            f"{title:18s} {names[0]:>{widths[0]}}  {names[1]:>{widths[1]}}  "
            f"{'difference (95 % interval)':28s} better"
        ]
        for name, m in self.measures.items():
            unit = MEASURES[name][0]
            better = self.verdict(name)
            better = dict(zip((self.a, self.b), names, strict=True)).get(better, better)
            interval = f"{m.difference:+.2f} ({m.low:+.2f} .. {m.high:+.2f}) {unit}"
            lines.append(
                f"{name:18s} {m.a:{widths[0]}.2f}  {m.b:{widths[1]}.2f}  {interval:28s} {better}"
            )
        return "\n".join(lines)


def compare_systems(
    a: str,
    b: str,
    images: Sequence[Path],
    settings: CompareSettings | None = None,
    *,
    progress: bool = False,
) -> Comparison:
    """Compare two systems on warped copies of images.

    Args:
        a, b: names as ``systems.system`` takes them: ``keynet``, ``sift``, ``keynet+desnet``, a
            weights file ...
        images: image files.

    Raises:
        ValueError: an unknown system, or fewer than two images.
        DataError: fewer than two images have texture.
    """
    settings = settings or CompareSettings()
    if len(images) < 2:
        raise ValueError(
            f"a comparison needs at least two images, got {len(images)}; those with a side below "
            f"{settings.size // 2} px, half of --size, are not used"
        )
    device = str(choose_device(settings.device))
    options = Options(num_keypoints=2 * settings.num_keypoints, device=device)
    systems = [system(name, options) for name in (a, b)]
    count = min(len(images), settings.photos)
    chosen = [images[index] for index in np.linspace(0, len(images) - 1, count, dtype=int)]
    views = _views(settings.size)
    rows: list[list[dict[str, float]]] = []
    for number, path in enumerate(track(chosen, unit="image", label="compare", enabled=progress)):
        dataset = PairDataset([path], views, seed=settings.seed, length=VIEWS * len(chosen))
        try:  # the warps of each image are its own
            pairs = [dataset.pair(VIEWS * number + view) for view in range(VIEWS)]
        except DataError:
            continue  # no texture
        measured = [
            [_measure(detect, pair, settings.num_keypoints) for detect in systems] for pair in pairs
        ]
        rows.append([_mean(list(of_system)) for of_system in zip(*measured, strict=True)])
    if len(rows) < 2:
        raise DataError(
            f"{len(rows)} of {len(images)} images have texture in views of {settings.size} px, and "
            "two are needed; give more images or a smaller --size"
        )
    found = {name: _interval(rows, name) for name in MEASURES}
    return Comparison(a, b, len(rows), {k: v for k, v in found.items() if v is not None})


def _views(size: int) -> PairSettings:
    """How the views are drawn: as of cameras that are nearly level, as ``match`` estimates the
    rotation of a pair before it describes the keypoints; of one plane, which the homography needs.
    """
    return dataclasses.replace(PRESETS["patches-upright"], size=size, layers=0.0)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each measure over the views of an image that have it."""
    names = {name for row in rows for name in row}
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _measure(detect: System, pair: Pair, num_keypoints: int) -> dict[str, float]:
    """The measures of a system on one pair of views."""
    a, b = detect(pair.image_a), detect(pair.image_b)
    H = torch.from_numpy(pair.H_ab)
    sizes = [image.shape[:2] for image in (pair.image_a, pair.image_b)]
    local = localization(a.xy, b.xy, H, *sizes, num_keypoints=num_keypoints, thresholds=(DISTANCE,))
    found = {"repeatability": 100 * (local[f"rep@{DISTANCE:g}"] or 0.0)}
    error = local[f"err@{DISTANCE:g}"]
    if error is not None:
        found["localization error"] = error
    if a.descriptors is not None and b.descriptors is not None:
        first, second = a[:num_keypoints], b[:num_keypoints]
        index = match(first, second).index
        distance = warp_points(first.xy[index[:, 0]].double(), H) - second.xy[index[:, 1]].double()
        found["correct matches"] = float((distance.norm(dim=1) <= DISTANCE).sum())
    return found


def _interval(rows: list[list[dict[str, float]]], name: str) -> Measure | None:
    """Means and the bootstrap interval of the difference; None if a system lacks the measure."""
    values = np.array([[one[name] for one in row] for row in rows if all(name in o for o in row)])
    if len(values) < 2:
        return None
    difference = values[:, 1] - values[:, 0]
    rng = np.random.default_rng(0)
    samples = rng.integers(0, len(difference), (RESAMPLINGS, len(difference)))
    low, high = np.percentile(difference[samples].mean(axis=1), [2.5, 97.5])
    mean_a, mean_b = values.mean(axis=0)
    return Measure(float(mean_a), float(mean_b), float(difference.mean()), float(low), float(high))


def compare_trained(
    name: str, weights: Path, images: Sequence[Path], *, progress: bool = False
) -> Comparison | None:
    """Compare newly trained weights of a network with the shipped weights of the same name on
    held-out images; None if there are too few images, or for affine shapes, whose training already
    measured the matches without them.
    """
    spec = spec_of(load(weights))
    if len(images) < 2 or isinstance(spec, ShapeSpec):
        return None
    detects = isinstance(spec, DetectorSpec)
    detector = "keynet" if name in PATCH_DESCRIPTORS else "sobelnet"
    names = (name, str(weights)) if detects else (f"{detector}+{name}", f"{detector}+{weights}")
    settings = CompareSettings(photos=20, size=320)
    try:
        return compare_systems(*names, images, settings, progress=progress)
    except DataError:
        return None
