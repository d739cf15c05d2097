"""Validation of trainings: repeatability of warped pairs, matches of warped and real pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets.reconstructions import TrackScene
from ..datasets.synthetic import PairDataset, PairSettings, unreadable_log
from ..datasets.tracks import correct_share, reconstruction_pairs
from ..describe import DenseDescriptor
from ..detect import PUBLISHED
from ..errors import DataError
from ..extract import build
from ..geometry import distances, warp_points
from ..image import load_image
from ..keypoints import detect_peaks
from ..matching import match
from ..metrics.anchoring import percentiles
from ..metrics.repeatability import (
    keynet_points,
    keynet_repeatability,
    orientation_errors,
    repeated_points,
)
from ..models.rekd import histogram_angle
from ..orientation import angle_at
from ..patches import HALF_SIDE, PATCH_SIZE, extract_patches
from ..pyramid import build_pyramid
from ..structs import Features, Keypoints


@dataclass(frozen=True)
class MatchingCheck:
    """Keypoints and patches of two views, detected independently, and their homography.

    Attributes:
        xy_a, xy_b: (N,2), (M,2) keypoints.
        patches_a, patches_b: (N,1,P,P), (M,1,P,P).
        H_ab: (3,3) float64.
    """

    xy_a: Tensor
    xy_b: Tensor
    patches_a: Tensor
    patches_b: Tensor
    H_ab: Tensor


def value_at_points(image: Tensor, xy: Tensor) -> Tensor:
    """Values (N,) of an image (H,W) at the nearest pixels of points (N,2) inside it."""
    index = xy.round().long()
    return image[index[:, 1], index[:, 0]]


def matching_checks(
    photos: Sequence[Path],
    detect: Callable[[Tensor], Keypoints],
    *,
    views: PairSettings,
    seed: int,
    count: int,
    patch_size: int = PATCH_SIZE,
    half_side: float = HALF_SIDE,
    reach: Sequence[float] = (1.0,),
) -> list[MatchingCheck]:
    """Draw ``count`` pairs of views and detect keypoints in each.

    Args:
        photos, views, seed: see ``PairDataset``.
        detect: image (1,1,S,S) -> keypoints.
        count: number of pairs.
        patch_size, half_side, reach: of the patches, see ``extract_patches``.
    """
    pairs = PairDataset(photos, views, seed=seed, length=count)
    checks = []
    for index in range(count):
        pair = pairs.pair(index)
        xy, patches = [], []
        for view in (pair.image_a, pair.image_b):
            image = torch.from_numpy(view.copy()).float()[None, None] / 255
            keypoints = detect(image)
            xy.append(keypoints.xy)
            pyramid = build_pyramid(image)
            patches.append(
                extract_patches(
                    pyramid, keypoints, size=patch_size, half_side=half_side, reach=reach
                )
            )
        H_ab = torch.from_numpy(pair.H_ab)
        checks.append(MatchingCheck(xy[0], xy[1], patches[0], patches[1], H_ab))
    return checks


def matching_score(describe: Callable[[Tensor], Tensor], checks: Sequence[MatchingCheck]) -> float:
    """Mean of ``correctly_matched`` over the checks, for a descriptor of patches."""
    scores = [
        correctly_matched(describe(c.patches_a), describe(c.patches_b), c.xy_a, c.xy_b, c.H_ab)
        for c in checks
    ]
    return mean_of_known(scores)


def mean_of_known(scores: Sequence[float | None]) -> float:
    """Mean of the scores that are not None; 0 if there are none."""
    valid = [score for score in scores if score is not None]
    return math.fsum(valid) / len(valid) if valid else 0.0


def correctly_matched(
    a: Tensor, b: Tensor, xy_a: Tensor, xy_b: Tensor, H_ab: Tensor, *, reach: float = 3.0
) -> float | None:
    """Fraction of the repeated keypoints that are matched correctly by mutual nearest neighbors.

    Args:
        a, b: descriptors (N,D), (M,D).
        xy_a, xy_b: keypoints (N,2), (M,2).
        H_ab: homography (3,3).
        reach: maximum distance of repeated keypoints and correct matches in pixels.

    Returns:
        0..1; None without repeated keypoints.
    """
    near = distances(warp_points(xy_a.double(), H_ab).float(), xy_b) <= reach
    repeated = min(int(near.any(dim=1).sum()), int(near.any(dim=0).sum()))
    if not repeated:
        return None
    similarity = a @ b.T
    forward, backward = similarity.argmax(dim=1), similarity.argmax(dim=0)
    mutual = backward[forward] == torch.arange(len(forward))
    return float((mutual & near[torch.arange(len(forward)), forward]).sum()) / repeated


#: Seed of the pairs of held-out photographs.
VALIDATION_SEED = 7
#: Number of keypoints per view, without and with orientation (smaller views).
VALIDATION_KEYPOINTS = 150
ROTATED_KEYPOINTS = 75
#: Maximum error of a correct orientation in degrees.
ROTATION_TOLERANCE = 15.0


def validation_score(net: nn.Module, pairs: Iterable[dict[str, Tensor]]) -> float:
    """Mean 3 px mutual repeatability of a score-map network (in eval mode), of keypoints on
    structure.

    A repeated keypoint counts if both its pixels lie above the median of their images by
    ``filters.corner_strength``: keypoints off structure repeat on planes, but not in scenes with
    depth. The number of repeated keypoints is divided by ``VALIDATION_KEYPOINTS``, not by the
    number of detected keypoints, so that few keypoints are no advantage.

    Args:
        net: gray images (2,1,S,S) -> score maps (2,1,S,S).
        pairs: items of ``PairDataset``.
    """
    scores = []
    for pair, xy_a, xy_b, size in _peaks(net, pairs):
        xy_a, xy_b = (
            xy[value_at_points(pair[f"mask_{side}"][0], xy) > 0]
            for side, xy in (("a", xy_a), ("b", xy_b))
        )
        a, b = repeated_points(
            xy_a, xy_b, pair["H_ab"], size, size, num_keypoints=VALIDATION_KEYPOINTS
        )
        structure_a = percentiles(pair["image_a"][None], xy_a[a])
        structure_b = percentiles(pair["image_b"][None], xy_b[b])
        on_structure = torch.minimum(structure_a, structure_b) > 0.5
        scores.append(int(on_structure.sum()) / VALIDATION_KEYPOINTS)
    return float(np.mean(scores)) if scores else 0.0


def _peaks(
    net: nn.Module, pairs: Iterable[dict[str, Tensor]]
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor, tuple[int, int]]]:
    """Each pair with the keypoints (N,2) of both views, strongest first, and their (height,
    width).
    """
    device = next(net.parameters()).device
    for pair in pairs:
        both = torch.stack([pair["image_a"], pair["image_b"]]).to(
            device, memory_format=torch.channels_last
        )
        (xy_a, _), (xy_b, _) = detect_peaks(net(both).float().cpu(), 1000)
        h, w = pair["image_a"].shape[-2:]
        yield pair, xy_a, xy_b, (int(h), int(w))


#: Number of keypoints per view in the validation of Key.Net's published code.
PAPER_KEYPOINTS = 25


def paper_score(net: nn.Module, pairs: Iterable[dict[str, Tensor]]) -> float:
    """Mean repeatability of the Key.Net paper's validation set: the 25 strongest keypoints of the
    common area of each view, location only, an overlap of at least 60 %.

    Arguments as in ``validation_score``.
    """
    scores = []
    for pair, xy_a, xy_b, size in _peaks(net, pairs):
        H_ab = pair["H_ab"].double()
        a, b = keynet_points(xy_a, xy_b, H_ab, size, size, num_keypoints=PAPER_KEYPOINTS)
        b_in_a = warp_points(xy_b[b].double(), torch.linalg.inv(H_ab))
        ones = torch.ones(max(len(a), len(b)))
        found = keynet_repeatability(xy_a[a], ones[: len(a)], b_in_a, ones[: len(b)])
        scores.append(found["rep_L"] or 0.0)
    return float(np.mean(scores)) if scores else 0.0


def oriented_score(net: nn.Module, pairs: Iterable[dict[str, Tensor]]) -> float:
    """Mean 3 px mutual repeatability of a network with orientation, of keypoints whose relative
    orientation is correct.

    Arguments as in ``validation_score``, but the network also returns orientation histograms, and
    corner strength is not required.
    """
    scores = []
    device = next(net.parameters()).device
    for pair in pairs:
        both = torch.stack([pair["image_a"], pair["image_b"]]).to(
            device, memory_format=torch.channels_last
        )
        score, histogram = net(both)
        angle = histogram_angle(histogram.float()).cpu()
        (xy_a, _), (xy_b, _) = detect_peaks(score.float().cpu(), 1000, shape="round")
        h, w = pair["image_a"].shape[-2:]
        size = (int(h), int(w))
        a, b = repeated_points(
            xy_a, xy_b, pair["H_ab"], size, size, num_keypoints=ROTATED_KEYPOINTS
        )
        angle_a, angle_b = angle_at(angle[0, 0], xy_a[a]), angle_at(angle[1, 0], xy_b[b])
        errors = orientation_errors(xy_a[a], angle_a, angle_b, pair["H_ab"])
        scores.append(int((errors <= ROTATION_TOLERANCE).sum()) / ROTATED_KEYPOINTS)
    return float(np.mean(scores)) if scores else 0.0


#: Validation of descriptors: number of pairs of held-out photographs, their side in pixels, and
#: keypoints per view.
MATCHING_PAIRS = 24
MATCHING_SIZE = 320
MATCHING_KEYPOINTS = 200

#: Validation on reconstructions: number of pairs, and keypoints per image.
POSED_PAIRS = 24
POSED_KEYPOINTS = 500


class PosedCheck:
    """Validation of descriptors on pairs of images of reconstructions, with their epipolar
    geometry.

    Args:
        scenes: reconstructions to draw the pairs from.
        detector: of the keypoints.
    """

    def __init__(self, scenes: list[TrackScene], detector: str | nn.Module = "keynet"):
        self.pairs = reconstruction_pairs(scenes, POSED_PAIRS, VALIDATION_SEED)
        extractor = build(
            detector,
            None,
            num_keypoints=POSED_KEYPOINTS,
            up_levels=0,
            per_scale=False,
            device="cpu",
            **PUBLISHED,
        )
        self.images: dict[Path, Tensor] = {}
        for path in dict.fromkeys(path for pair in self.pairs for path in pair.images):
            try:
                self.images[path] = load_image(path)
            except Exception as error:  # decoders raise various types for damaged files
                unreadable_log().add(path, error)
        self.pairs = [pair for pair in self.pairs if set(pair.images) <= self.images.keys()]
        if not self.pairs:
            raise DataError("no image pair of the validation reconstructions can be read")
        self.keypoints = {
            path: extractor.extract(image).keypoints for path, image in self.images.items()
        }

    def patches(
        self,
        describe: Callable[[Tensor], Tensor],
        *,
        patch_size: int = PATCH_SIZE,
        half_side: float = HALF_SIDE,
        reach: Sequence[float] = (1.0,),
    ) -> float:
        """Mean of ``tracks.correct_share`` for a descriptor of patches; arguments as
        ``matching_checks``.
        """
        described = {}
        for path, image in self.images.items():
            patches = extract_patches(
                *(build_pyramid(image), self.keypoints[path]),
                size=patch_size,
                half_side=half_side,
                reach=reach,
            )
            described[path] = describe(patches)
        return self._score(described)

    def dense(self, describe: Callable[[Tensor], Tensor], dim: int) -> float:
        """Mean of ``tracks.correct_share`` for a dense descriptor.

        Args:
            describe: image (1,1,H,W) -> map (1,dim,h,w), both on the CPU.
            dim: descriptor dimension.
        """
        descriptor = DenseDescriptor(describe, dim)
        described = {
            path: descriptor(build_pyramid(image), self.keypoints[path], 0)
            for path, image in self.images.items()
        }
        return self._score(described)

    def _score(self, described: dict[Path, Tensor]) -> float:
        shares = []
        for pair in self.pairs:
            a, b = (Features(self.keypoints[path], described[path], (1, 1)) for path in pair.images)
            shares.append(correct_share(pair, a.xy, b.xy, match(a, b).index))
        return float(np.mean(shares))
