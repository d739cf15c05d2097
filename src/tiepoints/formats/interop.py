"""Conversion of keypoints and features to and from OpenCV, kornia and LightGlue."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..files import require
from ..structs import Features, Keypoints

#: Diameter in pixels of an OpenCV keypoint of scale 1, and half side of a kornia frame of scale 1
#: (Key.Net's patches).
CV2_SIZE = 12.0
LAF_HALF_SIDE = 22.0


@dataclass(frozen=True)
class CV2Keypoints(Keypoints):
    """Keypoints of OpenCV with what its descriptors need besides, so that ``to_cv2`` restores them.

    Attributes:
        diameter: (N,) float32, ``size`` of OpenCV.
        degrees: (N,) float32, the angles as OpenCV stores them, -1 if undefined.
        octave, class_id: (N,) int32, see ``cv2.KeyPoint``.
    """

    diameter: Tensor
    degrees: Tensor
    octave: Tensor
    class_id: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("diameter", "degrees", "octave", "class_id"):
            if len(getattr(self, name)) != len(self):
                raise ValueError(f"{name} must have one value per keypoint ({len(self)})")

    def _map(self, function: Callable[[Tensor], Tensor]) -> CV2Keypoints:
        return CV2Keypoints(*(function(getattr(self, field.name)) for field in fields(self)))

    def __getitem__(self, index: Tensor | slice) -> CV2Keypoints:
        """The keypoints selected by a slice, indices or a mask."""
        return self._map(lambda column: column[index])

    def to(self, device: str | torch.device) -> CV2Keypoints:
        """A copy on ``device``."""
        return self._map(lambda column: column.to(device))


def to_cv2(keypoints: Keypoints, size: float = CV2_SIZE) -> list:
    """Convert keypoints to a list of ``cv2.KeyPoint``.

    The diameter is ``size * scale``, the angle is in degrees (of the same direction), the response
    is the score. Keypoints of ``from_cv2`` keep their octave and class, and their bits of diameter
    and angle unless these were replaced; those of others have octave 0 and class -1.
    """
    cv2 = _cv2()
    diameter = size * keypoints.scale.double()
    degrees = torch.rad2deg(keypoints.angle.double()).remainder(360)
    octave = torch.zeros(len(keypoints), dtype=torch.int32)
    class_id = octave - 1
    if isinstance(keypoints, CV2Keypoints):
        octave, class_id = keypoints.octave, keypoints.class_id
        same = _scale(keypoints.diameter, size) == keypoints.scale
        diameter = torch.where(same, keypoints.diameter.double(), diameter)
        same = _radians(keypoints.degrees) == keypoints.angle
        degrees = torch.where(same, keypoints.degrees.double(), degrees)
    rows = zip(
        keypoints.xy.tolist(),
        diameter.tolist(),
        degrees.tolist(),
        keypoints.score.tolist(),
        octave.tolist(),
        class_id.tolist(),
        strict=True,
    )
    return [cv2.KeyPoint(x, y, *row) for (x, y), *row in rows]


def from_cv2(points: list, size: float = CV2_SIZE) -> CV2Keypoints:
    """Convert a list of ``cv2.KeyPoint``; an undefined angle (-1) becomes 0.

    OpenCV describes the keypoints that ``to_cv2`` makes of the result as those given: with octave,
    class and undefined angles.
    """
    diameter = torch.tensor([p.size for p in points], dtype=torch.float32)
    degrees = torch.tensor([p.angle for p in points], dtype=torch.float32)
    return CV2Keypoints(
        torch.tensor([p.pt for p in points], dtype=torch.float32).reshape(-1, 2),
        _scale(diameter, size),
        _radians(degrees),
        torch.tensor([p.response for p in points], dtype=torch.float32),
        diameter,
        degrees,
        torch.tensor([p.octave for p in points], dtype=torch.int32),
        torch.tensor([p.class_id for p in points], dtype=torch.int32),
    )


def _scale(diameter: Tensor, size: float) -> Tensor:
    """Scale in float32 of OpenCV's diameters."""
    return (diameter.double() / size).float()


def _radians(degrees: Tensor) -> Tensor:
    """Radians in float32 of OpenCV's angles; 0 for undefined ones."""
    return torch.deg2rad(degrees.double().clamp(min=0)).float()


def _cv2() -> Any:
    return require("cv2", extra="opencv", purpose="the conversion of OpenCV's keypoints")


def to_laf(keypoints: Keypoints, half_side: float = LAF_HALF_SIDE) -> Tensor:
    """Convert keypoints to kornia's local affine frames (1,N,2,3).

    The columns are the half axes of a patch to the right and down, and its center. kornia's angles
    have the opposite direction, but frames are matrices in pixels, so that kornia extracts patches
    of the same rotation.
    """
    cos, sin = keypoints.angle.cos(), keypoints.angle.sin()
    radius = half_side * keypoints.scale
    frame = torch.stack(
        [torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=-2
    )  # (N,2,2)
    return torch.cat([frame * radius[:, None, None], keypoints.xy[:, :, None]], dim=-1)[None]


def from_laf(
    lafs: Tensor, score: Tensor | None = None, half_side: float = LAF_HALF_SIDE
) -> Keypoints:
    """Convert kornia's frames (1,N,2,3); an affine frame becomes the similarity with the same area
    and direction of the first axis.

    Raises:
        ValueError: another shape.
    """
    if lafs.ndim != 4 or len(lafs) != 1 or lafs.shape[2:] != (2, 3):
        raise ValueError(f"frames must be (1,N,2,3), got {tuple(lafs.shape)}")
    frame = lafs[0, :, :, :2]
    angle = torch.atan2(frame[:, 1, 0], frame[:, 0, 0])
    scale = (
        frame[:, 0, 0] * frame[:, 1, 1] - frame[:, 0, 1] * frame[:, 1, 0]
    ).abs().sqrt() / half_side
    score = torch.ones_like(angle) if score is None else score.reshape(-1)
    return Keypoints(lafs[0, :, :, 2].clone(), scale, angle.remainder(2 * math.pi), score)


def to_lightglue(features: Features) -> dict[str, Tensor]:
    """Convert features to LightGlue's dictionary of one image.

    Keys: ``keypoints`` (1,N,2), ``keypoint_scores``, ``descriptors`` (1,N,D), ``scales``, ``oris``
    (radians), ``image_size`` (1,2) as width, height.
    """
    content = {
        "keypoints": features.xy[None],
        "keypoint_scores": features.score[None],
        "scales": features.scale[None],
        "oris": features.angle[None],
        "image_size": torch.tensor([features.image_size], dtype=torch.float32),
    }
    if features.descriptors is not None:
        content["descriptors"] = features.descriptors[None]
    return content


def from_lightglue(content: dict[str, Any]) -> Features:
    """Convert LightGlue's dictionary of one image; missing scales and scores become 1, missing
    angles 0.
    """
    xy = content["keypoints"][0].float()

    def column(name: str, default: float) -> Tensor:
        value = content.get(name)
        return torch.full((len(xy),), default) if value is None else value[0].float()

    size = content.get("image_size")
    width, height = (0, 0) if size is None else (int(v) for v in size.reshape(-1)[:2])
    descriptors = content.get("descriptors")
    keypoints = Keypoints(
        xy, column("scales", 1.0), column("oris", 0.0), column("keypoint_scores", 1.0)
    )
    return Features(
        keypoints, None if descriptors is None else descriptors[0].float(), (width, height)
    )
