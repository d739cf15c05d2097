"""Pairs of images taken with rotated cameras: one relative rotation for the pair instead of an
angle for each keypoint.

Upright patches tell places apart best, but they match only where both cameras were held about
alike. So a pair is first matched upright and verified. Where no geometry beyond chance is found,
the strongest keypoints of b are described at several rotations, and the one with most verified
matches is taken; then, and wherever the verified matches themselves are rotated, the exact rotation
is read off them and all keypoints of b are described again with their patches rotated by it. What
verifies more is kept. Positions never change, so indices of matches stay valid for stored
keypoints. Most pairs of a folder show nothing in common and need the search, so what it describes
is kept for the next pairs of that image.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .describe import PatchDescriptor
from .estimation import estimate
from .extract import Extractor
from .image import ImageLike, load_image
from .matching import match
from .pyramid import Pyramid, build_pyramid
from .structs import Features, Matches

#: Matches that agree beyond chance, from which on a pair needs no search.
ENOUGH = 15
#: Strongest keypoints of b that the search describes, and the rotations into which it divides the
#: circle, upright included.
SEARCH_KEYPOINTS = 300
SEARCH_STEPS = 8
#: Smallest rotation in radians for which it pays to describe again.
MIN_ROTATION = math.radians(10)
#: Geometries that verify, and the largest error of a match in pixels: few matches show a plane
#: before they show an epipolar geometry.
GEOMETRIES = {"fundamental": 2.0, "homography": 4.0}
#: Images whose pyramids are kept in memory, and those whose descriptors of the search are (half
#: precision, some 0.5 MiB each).
PYRAMIDS, SEARCHES = 2, 256
#: Samples that an estimate draws at most.
ITERATIONS = 2000


@dataclass(frozen=True)
class Oriented:
    """Matches of a pair.

    Attributes:
        matches: indices into the keypoints as they were given.
        b: features of the second image as matched: other angles and descriptors where it was
            described again.
        rotation: of the patches of b in radians, from +x towards +y; 0 = as given.
    """

    matches: Matches
    b: Features
    rotation: float = 0.0


def can_reorient(extractor: Extractor) -> bool:
    """Whether an extractor describes upright patches, which alone can be described at other
    rotations.
    """
    if not isinstance(extractor, Extractor):  # any callable can extract
        return False
    return (
        isinstance(extractor.describe, PatchDescriptor)
        and not extractor.describe.upright
        and extractor.orient is None
    )


class PairMatcher:
    """Matches pairs of images whatever the relative rotation of their cameras.

    Args:
        extractor: what the features were extracted with.
        matcher: pairs two features, such as ``matching.match`` with its options.

    Raises:
        ValueError: the extractor describes no upright patches (``can_reorient``).
    """

    def __init__(
        self, extractor: Extractor, matcher: Callable[[Features, Features], Matches] = match
    ):
        if not can_reorient(extractor):
            raise ValueError(
                "only patches without angles can be described at other rotations; match these "
                "features as they are"
            )
        self.extractor, self.matcher = extractor, matcher
        self._pyramids: OrderedDict[str, Pyramid] = OrderedDict()
        self._searches: OrderedDict[str, list[Features]] = OrderedDict()

    def __call__(
        self, a: Features, b: Features, image_b: ImageLike, key: str | None = None
    ) -> Oriented:
        """Match ``a`` with ``b``, described again at another rotation where that verifies more.

        Args:
            image_b: the image of ``b``, read only where it is needed.
            key: a name under which its pyramid may be kept for the next pairs.
        """
        best = Oriented(self.matcher(a, b), b)
        if bool(a.angle.any()) or bool(b.angle.any()):
            return best  # angles were measured
        support, rotation = _support(a, best)
        if support < ENOUGH:
            found, rotated = self._search(a, b, image_b, key)
            if found > support:
                rotation = rotated
        for _ in range(2):  # what is described anew shows the rotation more exactly
            if abs(rotation - best.rotation) < MIN_ROTATION:
                break
            again = self._described(b, image_b, key, rotation)
            other = Oriented(self.matcher(a, again), again, rotation)
            more, rotation = _support(
                a, other
            )  # 0 where chance explains them: then nothing is replaced
            if more <= support:
                break
            best, support = other, more
        return best

    def _search(
        self, a: Features, b: Features, image_b: ImageLike, key: str | None
    ) -> tuple[int, float]:
        """Most verified matches of the strongest keypoints of b at any of the rotations, and the
        rotation that they show.
        """
        tried = [
            Oriented(self.matcher(a, again), again) for again in self._rotated(b, image_b, key)
        ]
        return max((_support(a, oriented) for oriented in tried), default=(0, 0.0))

    def _rotated(self, b: Features, image_b: ImageLike, key: str | None) -> list[Features]:
        """The strongest keypoints of b as the search describes them, at each rotation but
        upright.
        """
        found = None if key is None else self._searches.get(key)
        if found is None:
            few = b[b.score.argsort(descending=True, stable=True)[:SEARCH_KEYPOINTS]]
            found = []
            for step in range(1, SEARCH_STEPS):
                again = self._described(few, image_b, key, 2 * math.pi * step / SEARCH_STEPS)
                assert again.descriptors is not None
                found.append(replace(again, descriptors=again.descriptors.half()))
        if key is not None:
            _keep(self._searches, key, found, SEARCHES)
        return found

    def _described(
        self, features: Features, image: ImageLike, key: str | None, rotation: float
    ) -> Features:
        keypoints = replace(features.keypoints, angle=torch.full_like(features.angle, rotation))
        assert self.extractor.describe is not None
        descriptors = self.extractor.describe(
            self._pyramid(image, key), keypoints.to(self.extractor.device), 0
        ).cpu()
        return Features(keypoints, descriptors, features.image_size)

    def _pyramid(self, image: ImageLike, key: str | None) -> Pyramid:
        pyramid = None if key is None else self._pyramids.get(key)
        if pyramid is None:
            extractor = self.extractor
            pyramid = build_pyramid(
                load_image(image).to(extractor.device),
                up=extractor.up_levels,
                down=extractor.down_levels,
            )
        if key is not None:
            _keep(self._pyramids, key, pyramid, PYRAMIDS)
        return pyramid


def _keep(kept: OrderedDict, key: str, value: object, most: int) -> None:
    """Put a value last, and drop those used longest ago beyond ``most``."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


def _support(a: Features, oriented: Oriented) -> tuple[int, float]:
    """Matches that agree with one geometry beyond chance, 0 where none does; and the rotation from
    a to b that they show, in radians.
    """
    xy_a, xy_b = oriented.matches.positions(a, oriented.b)
    best = (0, 0.0)
    for kind, threshold in GEOMETRIES.items():
        # a plane leaves the fundamental matrix open, but its matches agree and are given as inliers
        agree = estimate(xy_a, xy_b, kind, threshold=threshold, max_iterations=ITERATIONS).inliers
        if int(agree.sum()) > best[0]:
            best = int(agree.sum()), similarity_angle(xy_a[agree], xy_b[agree])
    return best


def similarity_angle(xy_a: Tensor, xy_b: Tensor) -> float:
    """Rotation in radians, -pi..pi, of the similarity that maps points (N,2) nearest to (N,2)."""
    a, b = (xy.double() - xy.double().mean(dim=0) for xy in (xy_a, xy_b))
    return math.atan2(float((a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()), float((a * b).sum()))
