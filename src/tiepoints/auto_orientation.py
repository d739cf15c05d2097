"""Matching of images from rotated or oblique cameras, one relative rotation and tilt per pair
instead of an angle and a shape per keypoint.

Upright square patches are the most distinctive, but they only match if both cameras had about the
same orientation. So a pair is first matched upright and verified. If too few matches agree beyond
chance, the strongest keypoints of b are described at several rotations, and the one with most
verified matches is selected. Then, and if the verified matches are rotated or tilted, their
deformation is measured (``measure_deformation``) and all keypoints of b are described again with
patches deformed by it, in steps. The result with more verified matches is kept. Positions
never change, so match indices stay valid for stored keypoints. Most pairs of a folder have nothing
in common and need the search, and the images of a flight or a turntable are rotated to many others,
so both kinds of descriptors are cached for the next pairs of that image. The search is omitted if
other pairs show that both images are upright (``KnownRotations``).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch

from .deformation import UNDEFORMED, Deformation, measure_deformation
from .describe import DenseDescriptor, PatchDescriptor
from .estimation import estimate
from .extract import Extractor
from .image import ImageLike
from .matching import Matcher, filter_by_neighbors, match
from .names import MIN_NEIGHBORS
from .pyramid import Pyramid
from .structs import Features, Matches
from .verification import FALSE_ALARMS, Correspondences, beyond_chance

#: Number of verified matches from which on a pair needs no search.
MIN_SUPPORT = 15
#: A correct geometry explains most of the matches that agree with their neighbors. If it explains
#: less than this share of them, its matches must exceed chance by far, and a search may find more
#: (docs/diary.md): incorrect matches agree with each other, too, in repeated and symmetric
#: structure, and where many keypoints share their surroundings.
SURE_SHARE = 0.5
#: Largest expected number of geometries that chance supports as well, of such a geometry.
UNSURE_ALARMS = 1e-24
#: Number of matches verified by the first geometry from which the second is not estimated.
ENOUGH_SUPPORT = 30
#: Number of keypoints of b in the search (the strongest), and of rotations of the full circle,
#: including 0.
SEARCH_KEYPOINTS = 300
SEARCH_STEPS = 8
SEARCH_STEP = 2 * math.pi / SEARCH_STEPS
#: Number of rotations of the search, those with most matches that agree with their neighbors, whose
#: matches are verified.
VERIFIED_STEPS = 2
#: Smallest rotation in radians, and smallest tilt, at which keypoints are described again; and the
#: same of a dense network, which processes the whole image for it and has learned larger ones.
MIN_ROTATION, MIN_TILT = math.radians(10), 1.3
DENSE_ROTATION, DENSE_TILT = SEARCH_STEP / 2, 1.6
#: With at least this number of verified matches, smaller rotations than ``DENSE_ROTATION`` add few.
PLENTY_SUPPORT = 200
#: Geometries that verify matches, and the largest error of a match in pixels: a homography is
#: verified by fewer matches than a fundamental matrix.
GEOMETRIES = {"fundamental": 2.0, "homography": 4.0}
#: Number of images whose pyramids are cached; number of rotated descriptions (half precision) of
#: the strongest keypoints (75 KiB each), and of all of them (0.5 MiB for 2048 keypoints).
PYRAMIDS, SEARCHES, DESCRIPTIONS = 2, 2048, 128
#: Largest number of pairs in a chain that predicts a rotation (``KnownRotations``): errors add up;
#: and of images among which it is searched.
MAX_CHAIN, MAX_REACHED = 8, 1000
#: Smallest and largest number of samples of an estimate.
MIN_ITERATIONS, ITERATIONS = 100, 2000


@dataclass(frozen=True)
class Oriented:
    """Matches of a pair.

    Attributes:
        matches: indices into the given keypoints, of those that agree with their neighbors.
        b: features of the second image, with other angles and descriptors if described again.
        patches: deformation of the patches of b; by default they are as given.
        support: number of matches, also of those that do not agree with their neighbors, that
            agree with one geometry beyond chance.
        measured: the deformation from a to b by these matches; none without any.
        share: fraction of ``matches`` that agree with that geometry.
    """

    matches: Matches
    b: Features
    patches: Deformation = UNDEFORMED
    support: int = 0
    measured: Deformation = UNDEFORMED
    share: float = 0.0

    @property
    def sure(self) -> bool:
        """Whether the geometry explains most matches, enough of them that no search is needed."""
        return self.support >= MIN_SUPPORT and self.share >= SURE_SHARE

    @property
    def rank(self) -> tuple[bool, int]:
        """The larger, the better the rotation."""
        return self.sure, self.support


def can_reorient(extractor: Extractor | None) -> bool:
    """Whether an extractor describes keypoints upright, by patches or a dense network; only then
    they can be described at another rotation.
    """
    if not isinstance(extractor, Extractor):  # none, or a user's callable
        return False
    describe = extractor.describe
    upright = isinstance(describe, PatchDescriptor) and not describe.upright
    return (upright or isinstance(describe, DenseDescriptor)) and extractor.orient is None


def has_angles(*features: Features) -> bool:
    """Whether any keypoint has an angle, so that its patch is not upright."""
    return any(bool(one.angle.any()) for one in features)


class PairMatcher:
    """Matches pairs of images with any relative rotation of their cameras.

    Args:
        extractor: the extractor of the features.
        matcher: matches two ``Features``, such as ``matching.match`` with its options.
        min_neighbors: see ``matching.filter_by_neighbors``; 0 = all matches.

    Raises:
        ValueError: the extractor does not describe keypoints upright (``can_reorient``).
    """

    def __init__(
        self,
        extractor: Extractor,
        matcher: Matcher = match,
        min_neighbors: int = 0,
    ):
        if not can_reorient(extractor):
            raise ValueError(
                "only keypoints without angles can be described at other rotations; match these "
                "features directly"
            )
        self.extractor, self.matcher, self.min_neighbors = extractor, matcher, min_neighbors
        describe = extractor.describe
        self._dense = isinstance(describe, DenseDescriptor)
        self._shaped = isinstance(describe, PatchDescriptor) and describe.shape_net is not None
        self._pyramids: OrderedDict[str, Pyramid] = OrderedDict()
        self._searches: OrderedDict[tuple[str, int], Features] = OrderedDict()
        self._descriptions: OrderedDict[tuple[str, Deformation], Features] = OrderedDict()

    def __call__(
        self,
        a: Features,
        b: Features,
        image_b: ImageLike,
        key: str | None = None,
        predicted: float | None = None,
    ) -> Oriented:
        """Match ``a`` with ``b``, which is described at another rotation if that verifies more
        matches.

        Args:
            image_b: the image of ``b``, read only if needed.
            key: cache key of the image for the next pairs; None = no caching.
            predicted: about the rotation from a to b in radians, if known: only the rotations next
                to it are searched.
        """
        best = self.match_near(a, b, image_b, key)
        if best.sure or has_angles(a, b):
            return best
        found = self._search(a, b, image_b, key, _steps_near(predicted))
        if found is None or found.rank <= best.rank:
            return best
        return self.match_deformed(best, found.measured, a, image_b, key)

    def match_near(
        self, a: Features, b: Features, image_b: ImageLike, key: str | None = None
    ) -> Oriented:
        """The same without the search: ``b`` is only described again if the matches as given show
        how; parameters as above.
        """
        best = self.verified(a, b)
        if has_angles(a, b):
            return best
        return self.match_deformed(best, best.measured, a, image_b, key)

    def match_deformed(
        self,
        best: Oriented,
        measured: Deformation,
        a: Features,
        image_b: ImageLike,
        key: str | None = None,
    ) -> Oriented:
        """``best``, or matches with b described in patches of a measured deformation, if more of
        them are verified; parameters as above.
        """
        for _ in range(2):  # the measurement is more exact after describing again
            if self._shaped:  # the network of the shapes replaces the tilt
                measured = Deformation(measured.rotation)
            if not self._is_large(measured.after(best.patches), best.support):
                break
            deformed = self._described(a, best.b, image_b, key, self._rounded(measured))
            # the support is 0 if chance explains the matches, so nothing is replaced then
            if deformed.support <= best.support:
                break
            best, measured = deformed, deformed.measured
        return best

    def verified(self, a: Features, b: Features, patches: Deformation = UNDEFORMED) -> Oriented:
        """Match with b, whose patches have this deformation, and verify the matches."""
        return match_verified(a, b, self.matcher, self.min_neighbors, patches)

    def _is_large(self, change: Deformation, support: int) -> bool:
        """Whether a deformation is worth describing keypoints again."""
        few = support < PLENTY_SUPPORT and not self._dense
        rotation = MIN_ROTATION if few else DENSE_ROTATION
        tilt = DENSE_TILT if self._dense else MIN_TILT
        return abs(change.rotation) >= rotation or change.tilt >= tilt

    def _rounded(self, measured: Deformation) -> Deformation:
        """A deformation in steps; of a dense network, rotations in those of the search, for which
        the image is described anyway.
        """
        if self._dense and measured.tilt < DENSE_TILT:
            step = round(measured.rotation / SEARCH_STEP) % SEARCH_STEPS
            return Deformation(step * SEARCH_STEP)
        return measured.rounded()

    def _described(
        self, a: Features, b: Features, image_b: ImageLike, key: str | None, patches: Deformation
    ) -> Oriented:
        """Match with b described in patches of a rounded deformation."""
        return self.verified(a, self._features(b, image_b, key, patches), patches)

    def _features(
        self, b: Features, image_b: ImageLike, key: str | None, patches: Deformation
    ) -> Features:
        """b described in patches of a rounded deformation."""
        cached = None if key is None else self._descriptions.get((key, patches))
        if cached is None or len(cached) != len(b):
            described = self._describe(b, image_b, key, patches)
            assert described.descriptors is not None
            cached = replace(described, descriptors=described.descriptors.half())
        if key is not None:
            _cache(self._descriptions, (key, patches), cached, DESCRIPTIONS)
        return cached

    def _search(
        self, a: Features, b: Features, image_b: ImageLike, key: str | None, steps: list[int]
    ) -> Oriented | None:
        """Matches of the strongest keypoints of b, at the rotation with most verified ones."""
        candidates = []
        for step in steps:
            rotated = self._rotated(b, image_b, key, step)
            found = self.matcher(a, rotated)
            kept = filter_by_neighbors(a, rotated, found, self.min_neighbors)
            # nearest neighbors alone are about as many at each rotation
            agreeing = kept
            if not self.min_neighbors:
                agreeing = filter_by_neighbors(a, rotated, found, MIN_NEIGHBORS)
            candidates.append((len(agreeing), rotated, kept, found))
        candidates.sort(key=lambda candidate: candidate[0], reverse=True)
        verified = [
            Oriented(kept, rotated, UNDEFORMED, *geometric_support(a, rotated, kept, found))
            for _, rotated, kept, found in candidates[:VERIFIED_STEPS]
        ]
        return max(verified, key=lambda found: (*found.rank, found.measured.rotation), default=None)

    def _rotated(self, b: Features, image_b: ImageLike, key: str | None, step: int) -> Features:
        """The strongest keypoints of b, described at a rotation of the search."""
        result = None if key is None else self._searches.get((key, step))
        if result is None:
            strongest = b.score.argsort(descending=True, stable=True)[:SEARCH_KEYPOINTS]
            rotation = Deformation(step * SEARCH_STEP)
            if self._dense:  # all keypoints take no longer
                result = self._features(b, image_b, key, rotation)[strongest]
            else:
                described = self._describe(b[strongest], image_b, key, rotation)
                assert described.descriptors is not None
                result = replace(described, descriptors=described.descriptors.half())
        if key is not None:
            _cache(self._searches, (key, step), result, SEARCHES)
        return result

    def _describe(
        self, features: Features, image: ImageLike, key: str | None, patches: Deformation
    ) -> Features:
        angle = torch.full_like(features.angle, patches.rotation)
        keypoints = replace(features.keypoints, angle=angle)
        describe = self.extractor.describe
        assert isinstance(describe, PatchDescriptor | DenseDescriptor)
        descriptors = describe.describe_deformed(
            self._pyramid(image, key), keypoints.to(self.extractor.device), patches
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


def match_verified(
    a: Features,
    b: Features,
    matcher: Matcher = match,
    min_neighbors: int = 0,
    patches: Deformation = UNDEFORMED,
) -> Oriented:
    """Match, filter and verify features as they are; arguments as of ``PairMatcher``.

    Args:
        patches: deformation in which b was described.
    """
    found = matcher(a, b)
    kept = filter_by_neighbors(a, b, found, min_neighbors)
    return Oriented(kept, b, patches, *geometric_support(a, b, kept, found))


def geometric_support(
    a: Features, b: Features, kept: Matches, found: Matches
) -> tuple[int, Deformation, float]:
    """Largest number of matches ``found`` that agree with one geometry beyond chance, 0 if none do;
    the deformation from a to b by these matches; and the fraction of ``kept`` that agrees.

    The geometry is that of the matches ``kept``. As incorrect matches may agree with their
    neighbors, these do not tell what chance explains.
    """
    kept_a, kept_b = kept.positions(a, b)
    xy_a, xy_b = found.positions(a, b)
    best = (0, UNDEFORMED, 0.0)
    for geometry, threshold in GEOMETRIES.items():
        # inliers count even if the estimate is not ok: the matches of a plane agree, but leave the
        # fundamental matrix undetermined
        model = estimate(
            *(kept_a, kept_b, geometry),
            threshold=threshold,
            min_iterations=MIN_ITERATIONS,
            max_iterations=ITERATIONS,
            verify=False,
        ).model
        if model is None:
            continue
        agreeing = Correspondences(geometry, kept_a.double(), kept_b.double(), None, threshold)
        share = float(agreeing.fits(model).double().mean())
        matches = Correspondences(geometry, xy_a.double(), xy_b.double(), None, threshold)
        alarms = FALSE_ALARMS if share >= SURE_SHARE else UNSURE_ALARMS
        inliers = beyond_chance(matches, model, alarms)
        if int(inliers.sum()) > best[0]:
            best = int(inliers.sum()), measure_deformation(xy_a[inliers], xy_b[inliers]), share
        if best[0] >= ENOUGH_SUPPORT:
            break
    return best


class KnownRotations:
    """Rotations between images, of the pairs matched before.

    The rotation of a pair is about the sum of those along a chain of pairs that connects its
    images. Where it is small, matching keypoints as they are would have found it, so that no search
    is needed; elsewhere only the rotations next to it are searched. Most pairs of a folder that are
    searched do not overlap.
    """

    def __init__(self) -> None:
        self._rotations: dict[str, dict[str, float]] = {}

    def add(self, a: str, b: str, rotation: float, support: int) -> None:
        """Add the measured rotation of a pair with enough verified matches."""
        if support >= ENOUGH_SUPPORT:
            self._rotations.setdefault(a, {})[b] = rotation
            self._rotations.setdefault(b, {})[a] = -rotation

    def predict(self, a: str, b: str) -> float | None:
        """The rotation from a to b in radians by a shortest chain of at most ``MAX_CHAIN`` pairs;
        None if there is none.
        """
        reached = {a: 0.0}
        ends = [a]
        for _ in range(MAX_CHAIN):
            following = []
            for name in ends:
                for other, rotation in self._rotations.get(name, {}).items():
                    if other not in reached:
                        reached[other] = reached[name] + rotation
                        following.append(other)
            if b in reached:
                return reached[b]
            if len(reached) > MAX_REACHED:
                break
            ends = following
        return None


def is_upright(rotation: float | None) -> bool:
    """Whether a rotation is known, and smaller than half a step of the search."""
    return rotation is not None and _difference(rotation, 0.0) < SEARCH_STEP / 2


def _steps_near(rotation: float | None) -> list[int]:
    """Steps of the search next to a rotation, without 0; all if it is not known."""
    if rotation is None:
        return list(range(1, SEARCH_STEPS))
    lower = math.floor(rotation / SEARCH_STEP)
    return [step % SEARCH_STEPS for step in (lower, lower + 1) if step % SEARCH_STEPS]
