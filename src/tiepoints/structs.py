"""The results that travel through the package, and the coordinate law they obey.

**Coordinates.** x points right, y down, in pixels of the original image as stored; the centre of
the first pixel is (0, 0), so an image of width w spans -0.5 .. w - 0.5. Resizing maps ``(x + 0.5) *
s - 0.5``. ``scale`` is in pixels: 1 for a point found at the original resolution, 2 for one found
at half of it. ``angle`` is in radians from +x towards +y (clockwise as seen). ``H_ab`` maps points
of a to points of b. Points are float32, never half precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def _check(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


@dataclass(frozen=True)
class Keypoints:
    """N points of one image; N may be 0.

    Attributes:
        xy: (N,2) float32, pixels of the original image.
        scale: (N,) float32, pixels of the original image; 1 stands for one pixel of an image at its
            original resolution.
        angle: (N,) float32, radians; zeros where the detector gives none.
        score: (N,) float32, strongest first; comparable only within one detector (networks:
            response times squared scale of the level).
    """

    xy: Tensor
    scale: Tensor
    angle: Tensor
    score: Tensor

    def __post_init__(self) -> None:
        if self.xy.ndim != 2 or self.xy.shape[1] != 2:
            raise ValueError(f"xy must be (N,2), got {tuple(self.xy.shape)}")
        for name in ("scale", "angle", "score"):
            _check(name, getattr(self, name), (len(self.xy),))

    def __len__(self) -> int:
        return len(self.xy)

    def __getitem__(self, index: Tensor | slice) -> Keypoints:
        """The points selected by a slice, an index or a mask."""
        return Keypoints(self.xy[index], self.scale[index], self.angle[index], self.score[index])

    def to(self, device: str | torch.device) -> Keypoints:
        """A copy on ``device``."""
        return Keypoints(*(t.to(device) for t in (self.xy, self.scale, self.angle, self.score)))

    @classmethod
    def empty(cls, device: str | torch.device = "cpu") -> Keypoints:
        """No points."""
        none = torch.zeros(0, device=device)
        return cls(torch.zeros(0, 2, device=device), none, none, none)

    @classmethod
    def concatenate(cls, parts: list[Keypoints]) -> Keypoints:
        """All points of ``parts`` in their order."""
        if not parts:
            return cls.empty()
        return cls(
            *(torch.cat([getattr(p, n) for p in parts]) for n in ("xy", "scale", "angle", "score"))
        )


@dataclass(frozen=True)
class Features:
    """Key points of one image with their descriptors.

    Attributes:
        keypoints: N points.
        descriptors: (N,D) float32, unit length; ``None`` where none were asked for.
        image_size: (width, height) of the original image.
    """

    keypoints: Keypoints
    descriptors: Tensor | None
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        d = self.descriptors
        if d is not None and (d.ndim != 2 or len(d) != len(self.keypoints)):
            raise ValueError(
                f"descriptors must be (N,D) with N = {len(self.keypoints)}, got {tuple(d.shape)}"
            )

    def __len__(self) -> int:
        return len(self.keypoints)

    @property
    def xy(self) -> Tensor:
        """(N,2), see ``Keypoints``."""
        return self.keypoints.xy

    @property
    def scale(self) -> Tensor:
        """(N,), see ``Keypoints``."""
        return self.keypoints.scale

    @property
    def angle(self) -> Tensor:
        """(N,), see ``Keypoints``."""
        return self.keypoints.angle

    @property
    def score(self) -> Tensor:
        """(N,), see ``Keypoints``."""
        return self.keypoints.score

    def __getitem__(self, index: Tensor | slice) -> Features:
        """The features selected by a slice, an index or a mask."""
        descriptors = None if self.descriptors is None else self.descriptors[index]
        return replace(self, keypoints=self.keypoints[index], descriptors=descriptors)


@dataclass(frozen=True)
class PaddedFeatures:
    """Features of B images in tensors of equal length N, for code that wants batches.

    Attributes:
        xy (B,N,2), scale (B,N), angle (B,N), score (B,N), descriptors (B,N,D) or None: zeros where
        there is no point. valid: (B,N) bool, which entries are points. image_size: (width, height)
        of each image.
    """

    xy: Tensor
    scale: Tensor
    angle: Tensor
    score: Tensor
    descriptors: Tensor | None
    valid: Tensor
    image_size: list[tuple[int, int]]

    @classmethod
    def pad(cls, features: list[Features], length: int | None = None) -> PaddedFeatures:
        """Stack ``features``, padded to the longest of them or cut and padded to ``length``."""
        length = max((len(f) for f in features), default=0) if length is None else length
        features = [f[:length] for f in features]

        def stack(parts: list[Tensor]) -> Tensor:
            out = parts[0].new_zeros(len(parts), length, *parts[0].shape[1:])
            for row, part in zip(out, parts, strict=True):
                row[: len(part)] = part
            return out

        if not features:
            raise ValueError("no features to pad: give at least one image")
        described = [f.descriptors for f in features if f.descriptors is not None]
        return cls(
            xy=stack([f.xy for f in features]),
            scale=stack([f.scale for f in features]),
            angle=stack([f.angle for f in features]),
            score=stack([f.score for f in features]),
            descriptors=stack(described) if len(described) == len(features) else None,
            valid=stack(
                [torch.ones(len(f), dtype=torch.bool, device=f.xy.device) for f in features]
            ),
            image_size=[f.image_size for f in features],
        )


@dataclass(frozen=True)
class Matches:
    """K pairs of points.

    Attributes:
        index: (K,2) int64, point of a and point of b.
        score: (K,) float32 in [0,1], 1 = surest (the cosine of the descriptors, or what a learned
            matcher gives).
        xy_a, xy_b: (K,2) float32 sub-pixel positions of the matches (``refine.refine_matches``);
            None = those of the keypoints.
    """

    index: Tensor
    score: Tensor
    xy_a: Tensor | None = None
    xy_b: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index.ndim != 2 or self.index.shape[1] != 2:
            raise ValueError(f"index must be (K,2), got {tuple(self.index.shape)}")
        _check("score", self.score, (len(self.index),))
        for name, xy in (("xy_a", self.xy_a), ("xy_b", self.xy_b)):
            if xy is not None:
                _check(name, xy, (len(self.index), 2))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, chosen: Tensor) -> Matches:
        """The matches at ``chosen``, indices or a mask."""
        columns = (self.index, self.score, self.xy_a, self.xy_b)
        return Matches(*(None if column is None else column[chosen] for column in columns))  # type: ignore[arg-type]

    def positions(self, a: Features, b: Features) -> tuple[Tensor, Tensor]:
        """Positions (K,2) of the matches in both images: the sub-pixel ones where there are some,
        else those of the keypoints.
        """
        xy_a = a.xy[self.index[:, 0].to(a.xy.device)] if self.xy_a is None else self.xy_a
        xy_b = b.xy[self.index[:, 1].to(b.xy.device)] if self.xy_b is None else self.xy_b
        return xy_a, xy_b


@dataclass(frozen=True)
class Estimate:
    """A geometric model estimated from matches; failure is a value.

    Attributes:
        geometry: ``homography``, ``fundamental``, ``essential`` or ``pose``.
        model: (3,3) float64, of a pose (3,4) [R | t] with |t| = 1; None where ``ok`` is false.
        inliers: (K,) bool over the matches given: which agree. Where ``ok`` is false none, unless
            they agree on more than one model (a plane has no one fundamental matrix).
        ok: whether there is a model to trust.
        reason: why not, in words; empty where ``ok``.
    """

    geometry: str
    model: Tensor | None
    inliers: Tensor
    ok: bool
    reason: str = ""
