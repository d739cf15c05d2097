"""Matching of images from rotated cameras: one relative rotation per pair instead of an angle per
keypoint.

Upright patches are the most distinctive, but they only match if both cameras had about the same
orientation. So a pair is first matched upright and verified. If too few matches agree beyond
chance, the strongest keypoints of b are described at several rotations, and the one with most
verified matches is selected. Then, and if the verified upright matches are rotated, the rotation is
computed from the matches and all keypoints of b are described again with patches rotated by its
nearest multiple of ``ROTATION_STEP``. The result with more verified matches is kept. Positions
never change, so match indices stay valid for stored keypoints. Most pairs of a folder have nothing
in common and need the search, and the images of a flight or a turntable are rotated to many others,
so both kinds of descriptors are cached for the next pairs of that image.
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
from .image import ImageLike
from .matching import match
from .pyramid import Pyramid
from .structs import Features, Matches

#: Number of verified matches from which on a pair needs no search.
MIN_SUPPORT = 15
#: Number of matches verified by the first geometry from which the second is not estimated.
ENOUGH_SUPPORT = 30
#: Number of keypoints of b in the search (the strongest), and of rotations of the full circle,
#: including 0.
SEARCH_KEYPOINTS = 300
SEARCH_STEPS = 8
#: Number of rotations of the search, those with most matches, whose matches are verified.
VERIFIED_STEPS = 2
#: Smallest rotation in radians at which keypoints are described again, and the step to which
#: rotations are rounded: patches match at rotations that differ by less than half of it, and pairs
#: of an image share its descriptors.
MIN_ROTATION, ROTATION_STEP = math.radians(10), math.radians(15)
#: Geometries that verify matches, and the largest error of a match in pixels: a homography is
#: verified by fewer matches than a fundamental matrix.
GEOMETRIES = {"fundamental": 2.0, "homography": 4.0}
#: Number of images whose pyramids, and whose search descriptors (half precision, about 0.5 MiB
#: each), are cached; number of rotated descriptions of all keypoints (half precision, 0.5 MiB for
#: 2048 keypoints) that are cached.
PYRAMIDS, SEARCHES, DESCRIPTIONS = 2, 256, 128
#: Largest number of samples of an estimate.
ITERATIONS = 2000


@dataclass(frozen=True)
class Oriented:
    """Matches of a pair.

    Attributes:
        matches: indices into the given keypoints.
        b: features of the second image, with other angles and descriptors if described again.
        rotation: of the patches of b in radians, from +x towards +y; 0 = as given.
    """

    matches: Matches
    b: Features
    rotation: float = 0.0


def can_reorient(extractor: Extractor) -> bool:
    """Whether an extractor describes upright patches; only these can be described at another
    rotation.
    """
    if not isinstance(extractor, Extractor):  # a user's callable
        return False
    return (
        isinstance(extractor.describe, PatchDescriptor)
        and not extractor.describe.upright
        and extractor.orient is None
    )


class PairMatcher:
    """Matches pairs of images with any relative rotation of their cameras.

    Args:
        extractor: the extractor of the features.
        matcher: matches two ``Features``, such as ``matching.match`` with its options.

    Raises:
        ValueError: the extractor does not describe upright patches (``can_reorient``).
    """

    def __init__(
        self, extractor: Extractor, matcher: Callable[[Features, Features], Matches] = match
    ):
        if not can_reorient(extractor):
            raise ValueError(
                "only patches without angles can be described at other rotations; match these "
                "features directly"
            )
        self.extractor, self.matcher = extractor, matcher
        self._pyramids: OrderedDict[str, Pyramid] = OrderedDict()
        self._searches: OrderedDict[str, list[Features]] = OrderedDict()
        self._descriptions: OrderedDict[tuple[str, int], Features] = OrderedDict()

    def __call__(
        self, a: Features, b: Features, image_b: ImageLike, key: str | None = None
    ) -> Oriented:
        """Match ``a`` with ``b``, which is described at another rotation if that verifies more
        matches.

        Args:
            image_b: the image of ``b``, read only if needed.
            key: cache key of the image for the next pairs; None = no caching.
        """
        best = Oriented(self.matcher(a, b), b)
        if bool(a.angle.any()) or bool(b.angle.any()):
            return best  # the features have angles
        support, rotation = _support(a, best)
        if support < MIN_SUPPORT:
            search_support, search_rotation = self._search(a, b, image_b, key)
            if search_support > support:
                rotation = search_rotation
        for _ in range(2):  # the rotation is more exact after describing again
            if _difference(rotation, best.rotation) < MIN_ROTATION:
                break
            rotated = self._match_rotated(a, b, image_b, key, round(rotation / ROTATION_STEP))
            # the support is 0 if chance explains the matches, so nothing is replaced then
            rotated_support, rotation = _support(a, rotated)
            if rotated_support <= support:
                break
            best, support = rotated, rotated_support
        return best

    def _match_rotated(
        self, a: Features, b: Features, image_b: ImageLike, key: str | None, step: int
    ) -> Oriented:
        """Match with b described at a multiple of ``ROTATION_STEP``."""
        rotation = step * ROTATION_STEP
        cached = None if key is None else self._descriptions.get((key, step))
        if cached is None or len(cached) != len(b):
            described = self._describe(b, image_b, key, rotation)
            assert described.descriptors is not None
            cached = replace(described, descriptors=described.descriptors.half())
        if key is not None:
            _cache(self._descriptions, (key, step), cached, DESCRIPTIONS)
        return Oriented(self.matcher(a, cached), cached, rotation)

    def _search(
        self, a: Features, b: Features, image_b: ImageLike, key: str | None
    ) -> tuple[int, float]:
        """Largest number of verified matches of the strongest keypoints of b over the rotations,
        and the rotation computed from these matches.
        """
        candidates = [
            Oriented(self.matcher(a, rotated), rotated)
            for rotated in self._rotated(b, image_b, key)
        ]
        candidates.sort(key=lambda oriented: len(oriented.matches), reverse=True)
        verified = candidates[:VERIFIED_STEPS]
        return max((_support(a, oriented) for oriented in verified), default=(0, 0.0))

    def _rotated(self, b: Features, image_b: ImageLike, key: str | None) -> list[Features]:
        """The strongest keypoints of b, described at each rotation of the search except 0."""
        results = None if key is None else self._searches.get(key)
        if results is None:
            strongest = b[b.score.argsort(descending=True, stable=True)[:SEARCH_KEYPOINTS]]
            results = []
            for step in range(1, SEARCH_STEPS):
                rotation = 2 * math.pi * step / SEARCH_STEPS
                rotated = self._describe(strongest, image_b, key, rotation)
                assert rotated.descriptors is not None
                results.append(replace(rotated, descriptors=rotated.descriptors.half()))
        if key is not None:
            _cache(self._searches, key, results, SEARCHES)
        return results

    def _describe(
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
            pyramid = self.extractor.pyramid(self.extractor.read(image).pixels)
        if key is not None:
            _cache(self._pyramids, key, pyramid, PYRAMIDS)
        return pyramid


def _cache(cache: OrderedDict, key: object, value: object, size: int) -> None:
    """Store a value and drop the least recently used ones beyond ``size``."""
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > size:
        cache.popitem(last=False)


def _difference(a: float, b: float) -> float:
    """Angle between two rotations in radians, 0..pi."""
    return abs((a - b + math.pi) % (2 * math.pi) - math.pi)


def _support(a: Features, oriented: Oriented) -> tuple[int, float]:
    """Largest number of matches that agree with one geometry beyond chance, 0 if none do; and the
    rotation from a to b of these matches in radians.
    """
    xy_a, xy_b = oriented.matches.positions(a, oriented.b)
    best = (0, 0.0)
    for geometry, threshold in GEOMETRIES.items():
        # inliers count even if the estimate is not ok: the matches of a plane agree, but leave the
        # fundamental matrix undetermined
        inliers = estimate(
            xy_a, xy_b, geometry, threshold=threshold, max_iterations=ITERATIONS
        ).inliers
        if int(inliers.sum()) > best[0]:
            best = int(inliers.sum()), similarity_angle(xy_a[inliers], xy_b[inliers])
        if best[0] >= ENOUGH_SUPPORT:
            break
    return best


def similarity_angle(xy_a: Tensor, xy_b: Tensor) -> float:
    """Rotation in radians, -pi..pi, of the least-squares similarity from points (N,2) to (N,2)."""
    a, b = (xy.double() - xy.double().mean(dim=0) for xy in (xy_a, xy_b))
    return math.atan2(float((a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()), float((a * b).sum()))
