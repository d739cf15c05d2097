"""Two images that hardly match: described again in other ways, of which the one with most verified
matches is kept.

- *Affine shapes* (``models.affnet``) fit patches of surfaces that are seen from very different
  directions.
- *Surroundings* (``patchnets.HardNetContext``) tell places apart that look alike, and resemble each
  other more than a patch does if light, season or details have changed.
- *The negative* of the second image resembles the first one if bright and dark are exchanged, as
  between a thermal camera and a photograph.

Most pairs of a folder that do not match do not overlap, so this is for two images only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from .auto_orientation import Oriented, PairMatcher, has_angles
from .describe import PatchDescriptor
from .device import float_precision
from .extract import Describe, ExtractOptions, Extractor, build_descriptor, build_shapes
from .structs import Features

#: Number of verified matches from which on two images are not described again: obliquely seen,
#: they often have some (docs/diary.md).
RETRY_SUPPORT = 60
#: Networks of the affine shapes, and of the descriptor with surroundings.
SHAPES, SURROUNDINGS = "affnet", "hardnet-context"


@dataclass(frozen=True)
class View:
    """An image and its features.

    Attributes:
        features: see ``structs.Features``.
        pixels: (1,1,H,W) gray in [0,1].
        mask: (H,W) bool, True where keypoints may lie; None = everywhere.
    """

    features: Features
    pixels: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Attempt:
    """Matches of two images that were described in one way.

    Attributes:
        a: features of the first image.
        found: matches, and the features of the second image.
        pixels_b: (1,1,H,W) in which the keypoints of the second image were described.
        way: ``as given``, ``affine shapes``, ``surroundings`` or ``negative``.
    """

    a: Features
    found: Oriented
    pixels_b: Tensor
    way: str = "as given"


def match_again(matcher: PairMatcher, a: View, b: View, found: Oriented) -> Attempt:
    """Match two images in other ways if they hardly match.

    Args:
        matcher: of the pair.
        a, b: the images, with the features that were matched.
        found: the matches of these features.

    Returns:
        the way with most verified matches; the one given if no other has more.
    """
    best = Attempt(a.features, found, b.pixels)
    if found.support >= RETRY_SUPPORT or has_angles(a.features, b.features):
        return best
    describe = matcher.extractor.describe
    if isinstance(describe, PatchDescriptor):
        if describe.shape_net is None:
            best = _best(best, *_shaped(matcher, a, b, found))
        if best.found.support < RETRY_SUPPORT and len(describe.reach) == 1:
            matcher = _with_surroundings(matcher)
            a, b = (_described(matcher.extractor, view) for view in (a, b))
            found = matcher.match_near(a.features, b.features, b.pixels)
            best = _best(best, Attempt(a.features, found, b.pixels, "surroundings"))
    if best.found.support < RETRY_SUPPORT:
        best = _best(best, _negative(matcher, a, b))
    return best


def _best(*attempts: Attempt) -> Attempt:
    """The attempt with most verified matches, the first of them."""
    return max(attempts, key=lambda attempt: attempt.found.support)


def _shaped(matcher: PairMatcher, a: View, b: View, found: Oriented) -> Iterator[Attempt]:
    """In affine shapes; then, as given, in patches of the deformation that these matches show."""
    extractor, describe = matcher.extractor, matcher.extractor.describe
    assert isinstance(describe, PatchDescriptor)
    backend = _options(extractor).backend
    shape_net = build_shapes(
        SHAPES, extractor.device, precision=_precision(extractor), backend=backend
    )
    describe = PatchDescriptor(
        describe.net, describe.half_side, reach=describe.reach, shape_net=shape_net
    )
    shaped = _with(extractor, describe)
    one, other = (_described(shaped, view).features for view in (a, b))
    result = matcher.verified(one, other)
    yield Attempt(one, result, b.pixels, "affine shapes")
    if result.support > found.support:
        deformed = matcher.match_deformed(found, result.measured, a.features, b.pixels)
        yield Attempt(a.features, deformed, b.pixels)


def _negative(matcher: PairMatcher, a: View, b: View) -> Attempt:
    """With the keypoints of the negative of the second image."""
    pixels = 1 - b.pixels
    negative = matcher.extractor.extract_tensor(pixels, [b.mask])[0]
    found = matcher.match_near(a.features, negative, pixels)
    return Attempt(a.features, found, pixels, "negative")


def _with_surroundings(matcher: PairMatcher) -> PairMatcher:
    """A matcher whose descriptor sees the surroundings of keypoints."""
    extractor, options = matcher.extractor, _options(matcher.extractor)
    describe = build_descriptor(
        SURROUNDINGS,
        device=extractor.device,
        precision=_precision(extractor),
        backend=options.backend,
        affine=options.affine,
    )
    return PairMatcher(_with(extractor, describe), matcher.matcher, matcher.min_neighbors)


def _with(extractor: Extractor, describe: Describe | None) -> Extractor:
    """An extractor of the same keypoints with another descriptor."""
    other = copy.copy(extractor)
    other.describe = describe
    return other


def _described(extractor: Extractor, view: View) -> View:
    """The same keypoints, described by this extractor."""
    features = view.features
    assert extractor.describe is not None
    descriptors = extractor.describe(
        extractor.pyramid(view.pixels), features.keypoints.to(extractor.device), 0
    ).cpu()
    return replace(view, features=replace(features, descriptors=descriptors))


def _options(extractor: Extractor) -> ExtractOptions:
    return extractor.options or ExtractOptions()


def _precision(extractor: Extractor) -> str:
    """Precision of further networks: there are no graphs of eight bits of these."""
    return float_precision(_options(extractor).chosen_precision, extractor.device)
