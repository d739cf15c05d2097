"""Data classes of the package, and their coordinate convention.

**Coordinates.** x points right, y down, in pixels of the original image as stored; the center of
the first pixel is (0, 0), so an image of width w spans -0.5 .. w - 0.5. Resizing maps ``(x + 0.5) *
s - 0.5``. ``scale`` is in pixels: 1 for a keypoint detected at the original resolution, 2 for one
at half of it. ``angle`` is in radians from +x towards +y (clockwise in the image). ``H_ab`` maps
points of a to points of b. Positions are float32, never half precision.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .files import atomic_path


def _check(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


@dataclass(frozen=True)
class Keypoints:
    """N keypoints of one image; N may be 0.

    Attributes:
        xy: (N,2) float32, pixels of the original image.
        scale: (N,) float32, pixels of the original image; 1 for the original resolution.
        angle: (N,) float32, radians; zeros if the detector estimates none.
        score: (N,) float32, strongest first; comparable only within one detector (networks:
            response weighted by the scale of the level).
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

    def __repr__(self) -> str:
        return f"Keypoints({len(self)})"

    def __getitem__(self, index: Tensor | slice) -> Keypoints:
        """The keypoints selected by a slice, indices or a mask."""
        return Keypoints(self.xy[index], self.scale[index], self.angle[index], self.score[index])

    def to(self, device: str | torch.device) -> Keypoints:
        """A copy on ``device``."""
        return Keypoints(*(t.to(device) for t in (self.xy, self.scale, self.angle, self.score)))

    @classmethod
    def empty(cls, device: str | torch.device = "cpu") -> Keypoints:
        """No keypoints."""
        none = torch.zeros(0, device=device)
        return cls(torch.zeros(0, 2, device=device), none, none, none)

    @classmethod
    def concatenate(cls, parts: list[Keypoints]) -> Keypoints:
        """All keypoints of ``parts`` in their order."""
        if not parts:
            return cls.empty()
        return cls(
            *(torch.cat([getattr(p, n) for p in parts]) for n in ("xy", "scale", "angle", "score"))
        )


@dataclass(frozen=True)
class Features:
    """Keypoints of one image with their descriptors.

    Attributes:
        keypoints: N keypoints.
        descriptors: (N,D) float32, unit length; ``None`` without a descriptor.
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

    def __repr__(self) -> str:
        described = "no descriptors"
        if self.descriptors is not None:
            described = f"descriptors of dimension {self.descriptors.shape[1]}"
        width, height = self.image_size
        return f"Features({len(self)} keypoints, {described}, image {width} x {height})"

    def to(self, device: str | torch.device) -> Features:
        """A copy on ``device``."""
        descriptors = None if self.descriptors is None else self.descriptors.to(device)
        return Features(self.keypoints.to(device), descriptors, self.image_size)

    def numpy(self) -> dict[str, np.ndarray]:
        """The columns as arrays: ``xy``, ``scale``, ``angle``, ``score``, ``image_size`` and, where
        there are some, ``descriptors``.
        """
        names = ("xy", "scale", "angle", "score")
        arrays = {name: getattr(self.keypoints, name).cpu().numpy() for name in names}
        arrays["image_size"] = np.array(self.image_size)
        if self.descriptors is not None:
            arrays["descriptors"] = self.descriptors.cpu().numpy()
        return arrays

    def save(self, path: str | os.PathLike) -> None:
        """Write the columns of ``numpy`` to an ``.npz`` file, atomically."""
        arrays: dict[str, Any] = self.numpy()
        with atomic_path(Path(path)) as tmp_path, tmp_path.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Features:
        """Features that ``save`` wrote.

        Raises:
            FileNotFoundError: no such file.
            DataError: the file is damaged or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                columns = [torch.from_numpy(content[n]) for n in ("xy", "scale", "angle", "score")]
                descriptors = None
                if "descriptors" in content:
                    descriptors = torch.from_numpy(content["descriptors"])
                width, height = (int(value) for value in content["image_size"])
            return cls(Keypoints(*columns), descriptors, (width, height))
        except FileNotFoundError:
            raise
        except Exception as error:  # NumPy and zipfile raise various types for damaged files
            raise DataError(
                f"{path} holds no features written by Features.save, or is damaged; extract the "
                "image again"
            ) from error

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
        """The features selected by a slice, indices or a mask."""
        descriptors = None if self.descriptors is None else self.descriptors[index]
        return replace(self, keypoints=self.keypoints[index], descriptors=descriptors)


@dataclass(frozen=True)
class PaddedFeatures:
    """Features of B images as batched tensors, padded with zeros to equal length N.

    Attributes:
        xy, scale, angle, score: (B,N,2), (B,N), (B,N) and (B,N), see ``Keypoints``.
        descriptors: (B,N,D), or None.
        valid: (B,N) bool, false for padding.
        image_size: (width, height) of each image.
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
        """Stack ``features``, padded to the longest of them, or truncated and padded to
        ``length``.
        """
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
    """K matches between the keypoints of two images.

    Attributes:
        index: (K,2) int64, keypoint of a and keypoint of b.
        score: (K,) float32 in [0,1], 1 = most certain (the cosine of the descriptors, or the
            confidence of a learned matcher).
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

    def __repr__(self) -> str:
        refined = ", refined" if self.xy_a is not None else ""
        return f"Matches({len(self)}{refined})"

    def __getitem__(self, selected: Tensor) -> Matches:
        """The matches selected by indices or a mask."""
        columns = (self.index, self.score, self.xy_a, self.xy_b)
        return Matches(*(None if column is None else column[selected] for column in columns))  # type: ignore[arg-type]

    def positions(self, a: Features, b: Features) -> tuple[Tensor, Tensor]:
        """Positions (K,2) of the matches in both images: the sub-pixel ones if available, else
        those of the keypoints.
        """
        xy_a = a.xy[self.index[:, 0].to(a.xy.device)] if self.xy_a is None else self.xy_a
        xy_b = b.xy[self.index[:, 1].to(b.xy.device)] if self.xy_b is None else self.xy_b
        return xy_a, xy_b


@dataclass(frozen=True)
class Estimate:
    """A geometric model estimated from matches; failure is a value.

    Attributes:
        geometry: ``homography``, ``fundamental``, ``essential`` or ``pose``.
        model: (3,3) float64, a pose is (3,4) [R | t] with |t| = 1; None if ``ok`` is false.
        inliers: (K,) bool, the matches that agree with the model. If ``ok`` is false, all are
            false, unless the matches agree with more than one model (as points of a plane do with
            fundamental matrices).
        ok: whether the model can be trusted.
        reason: why not; empty if ``ok``.
    """

    geometry: str
    model: Tensor | None
    inliers: Tensor
    ok: bool
    reason: str = ""

    def __repr__(self) -> str:
        count = f"{int(self.inliers.sum())} of {len(self.inliers)} inliers"
        return f"Estimate({self.geometry}, {count}{'' if self.ok else f', not ok: {self.reason}'})"
