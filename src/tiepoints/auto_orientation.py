"""Pairs of images taken with rotated cameras: one relative rotation for the pair instead of an angle for each keypoint.

Upright patches tell places apart best, but they match only where both cameras were held about alike. So a pair is first matched upright
and verified. Where little agrees with a geometry, the strongest keypoints of b are described at several rotations, and the one with most
verified matches is taken; then, and wherever the verified matches themselves are rotated, the exact rotation is read off them and all
keypoints of b are described again with their patches rotated by it. What verifies more is kept. Positions never change, so indices of
matches stay valid for stored keypoints.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .estimation import estimate
from .extract import Extractor, PatchDescriptor
from .image import ImageLike, load_image
from .matching import match
from .pyramid import Pyramid, build_pyramid
from .structs import Features, Matches

#: Verified matches, and their share of all, from which on a pair needs no search.
ENOUGH = 60
ENOUGH_SHARE = 0.35
#: Keypoints that the search looks at in each image, and the rotations that it tries besides upright.
SEARCH_POINTS = 500
SEARCH_STEPS = 8
#: Smallest rotation in radians for which it pays to describe again.
MIN_ROTATION = math.radians(10)
#: Largest error of a verified match in pixels.
THRESHOLD = 2.0
#: Images whose pyramids are kept in memory.
PYRAMIDS = 2


@dataclass(frozen=True)
class Oriented:
    """Matches of a pair.

    Attributes:
        matches: indices into the keypoints as they were given.
        b: features of the second image as matched: other angles and descriptors where it was described again.
        rotation: of the patches of b in radians, from +x towards +y; 0 = as given.
    """

    matches: Matches
    b: Features
    rotation: float = 0.0


def can_reorient(extractor: Extractor) -> bool:
    """Whether an extractor describes upright patches, which alone can be described at other rotations."""
    if not isinstance(extractor, Extractor):  # any callable can extract
        return False
    return isinstance(extractor.describe, PatchDescriptor) and not extractor.describe.upright and extractor.orient is None


class PairMatcher:
    """Matches pairs of images whatever the relative rotation of their cameras.

    Args:
        extractor: what the features were extracted with.
        matcher: pairs two features, such as ``matching.match`` with its options.

    Raises:
        ValueError: the extractor describes no upright patches (``can_reorient``).
    """

    def __init__(self, extractor: Extractor, matcher: Callable[[Features, Features], Matches] = match):
        if not can_reorient(extractor):
            raise ValueError("only patches without angles can be described at other rotations; match these features as they are")
        self.extractor, self.matcher = extractor, matcher
        self._pyramids: OrderedDict[str, Pyramid] = OrderedDict()

    def __call__(self, a: Features, b: Features, image_b: ImageLike, key: str | None = None) -> Oriented:
        """Match ``a`` with ``b``, described again at another rotation where that verifies more.

        Args:
            image_b: the image of ``b``, read only where it is needed.
            key: a name under which its pyramid may be kept for the next pairs.
        """
        best = Oriented(self.matcher(a, b), b)
        if bool(a.angle.any()) or bool(b.angle.any()):
            return best  # angles were measured
        support, rotation = _support(a, best)
        if support < max(ENOUGH, ENOUGH_SHARE * len(best.matches)):
            found, turned = self._search(a, b, image_b, key)
            if found > _support(_strongest(a), Oriented(self.matcher(_strongest(a), _strongest(b)), _strongest(b)))[0]:
                rotation = turned
        for _ in range(2):  # what is described anew shows the rotation more exactly
            if abs(rotation - best.rotation) < MIN_ROTATION:
                break
            again = self._described(b, image_b, key, rotation)
            other = Oriented(self.matcher(a, again), again, rotation)
            more, rotation = _support(a, other)
            if more <= support:
                break
            best, support = other, more
        return best

    def _search(self, a: Features, b: Features, image_b: ImageLike, key: str | None) -> tuple[int, float]:
        """Most verified matches of the strongest keypoints at any of the rotations, and the rotation read off them."""
        few_a, few_b = _strongest(a), _strongest(b)
        best = (0, 0.0)
        for step in range(1, SEARCH_STEPS):
            angle = 2 * math.pi * step / SEARCH_STEPS
            angle -= 2 * math.pi * (angle > math.pi)
            again = self._described(few_b, image_b, key, angle)
            best = max(best, _support(few_a, Oriented(self.matcher(few_a, again), again, angle)))
        return best

    def _described(self, features: Features, image: ImageLike, key: str | None, rotation: float) -> Features:
        keypoints = replace(features.keypoints, angle=torch.full_like(features.angle, rotation))
        assert self.extractor.describe is not None
        descriptors = self.extractor.describe(self._pyramid(image, key), keypoints.to(self.extractor.device), 0).cpu()
        return Features(keypoints, descriptors, features.image_size)

    def _pyramid(self, image: ImageLike, key: str | None) -> Pyramid:
        if key is not None and key in self._pyramids:
            return self._pyramids[key]
        extractor = self.extractor
        pyramid = build_pyramid(load_image(image).to(extractor.device), up=extractor.up_levels, down=extractor.down_levels)
        if key is not None:
            self._pyramids[key] = pyramid
            while len(self._pyramids) > PYRAMIDS:
                self._pyramids.popitem(last=False)
        return pyramid


def _strongest(features: Features) -> Features:
    return features[features.score.argsort(descending=True, stable=True)[:SEARCH_POINTS]]


def _support(a: Features, oriented: Oriented) -> tuple[int, float]:
    """Matches that agree with one fundamental matrix, and the rotation from a to b that they show, in radians."""
    xy_a, xy_b = oriented.matches.positions(a, oriented.b)
    result = estimate(xy_a, xy_b, "fundamental", threshold=THRESHOLD, judge=False)
    if not result.ok:
        return 0, 0.0
    return int(result.inliers.sum()), similarity_angle(xy_a[result.inliers], xy_b[result.inliers])


def similarity_angle(xy_a: Tensor, xy_b: Tensor) -> float:
    """Rotation in radians, -pi..pi, of the similarity that maps points (N,2) nearest to (N,2)."""
    a, b = (xy.double() - xy.double().mean(dim=0) for xy in (xy_a, xy_b))
    return math.atan2(float((a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()), float((a * b).sum()))
