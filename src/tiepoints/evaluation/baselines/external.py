"""Detectors of other libraries as systems to compare with: those of kornia, and SuperPoint of
transformers.

``external_system("disk")`` is a callable image -> ``Features``. The library is the user's own
installation, and fetches and keeps its own weights (mind their authors' licences: SuperPoint's are
for research only); ``model=`` takes a network that is already there. Detectors made for colour get
colour.

To add one, write a function ``(network, num_keypoints) -> find`` like those below and enter it in
``_SYSTEMS``: ``network(library, class, load)`` gives the user's network or the loaded one;
``find(image)`` turns an image (1,3,H,W) RGB in [0,1] into ``Keypoints`` and descriptors in any
order and of any length, and converts positions where the library's are not ours (first pixel's
centre at 0). ``external_system`` does the rest.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...errors import WeightsError
from ...filters import to_gray
from ...formats.interop import from_laf
from ...image import ImageLike, load_image
from ...structs import Features, Keypoints

#: DISK needs more than 16 pixels; images with a shorter side are continued to this by their border
#: pixels.
MIN_SIDE = 32
#: SuperPoint ignores what is left over of cells of so many pixels.
SUPERPOINT_CELL = 8
#: Where the classes of a library are, and how to get it. kornia has ALIKED and XFeat since 0.8.3;
#: before 4.47 transformers gave SuperPoint's positions in pixels instead of parts of the image.
LIBRARIES = {
    "kornia": ("kornia.feature", "pip install 'kornia>=0.8.3'"),
    "transformers": ("transformers", "pip install 'transformers>=4.47'"),
}


Network: TypeAlias = Callable[[str, str, Callable[[Any], nn.Module]], Any]
Find: TypeAlias = Callable[[Tensor], tuple[Keypoints, Tensor]]


def external_system(
    name: str, *, num_keypoints: int = 1000, model: nn.Module | None = None, device: str = "cpu"
) -> Callable[[ImageLike], Features]:
    """A detector of another library with its own descriptors.

    Args:
        name: one of ``EXTERNAL_SYSTEMS``.
        num_keypoints: at most so many points.
        model: the library's network, instead of its trained one; it is put in evaluation mode and
            on ``device``.
        device: where the network runs. The features are on the CPU.

    Returns:
        image -> ``Features``, strongest first, with descriptors (N,D) float32 of unit length. Scale
        is 1 and angle 0 where the detector gives none.

    Raises:
        ValueError: unknown name, or ``num_keypoints`` below 1.
        ImportError: the library is missing, or too old to have the detector.
        WeightsError: the library cannot get the trained weights.
    """
    if name not in _SYSTEMS:
        raise ValueError(f"detector must be one of {', '.join(EXTERNAL_SYSTEMS)}; got {name!r}")
    if num_keypoints < 1:
        raise ValueError(f"num_keypoints must be at least 1, got {num_keypoints}")

    def network(library: str, kind: str, load: Callable[[Any], nn.Module]) -> nn.Module:
        return (_load(name, library, kind, load) if model is None else model).eval().to(device)

    find = _SYSTEMS[name](network, num_keypoints)

    def system(source: ImageLike) -> Features:
        image = load_rgb(source)
        h, w = image.shape[-2:]
        padded = F.pad(image, (0, max(0, MIN_SIDE - w), 0, max(0, MIN_SIDE - h)), mode="replicate")
        with torch.no_grad():
            points, descriptors = find(padded.to(device))
        points, descriptors = points.to("cpu"), F.normalize(descriptors.cpu().float(), dim=1)
        inside = (
            ((points.xy >= -0.5) & (points.xy <= points.xy.new_tensor([w, h]) - 0.5))
            .all(dim=1)
            .nonzero()[:, 0]
        )
        order = inside[points.score[inside].argsort(descending=True, stable=True)][:num_keypoints]
        return Features(points[order], descriptors[order], (w, h))

    return system


def load_rgb(source: ImageLike) -> Tensor:
    """(1,3,H,W) float32 in [0,1] of anything that ``load_image`` takes, with its errors; a gray
    image three times.
    """
    if isinstance(source, str | os.PathLike):
        gray = load_image(source)  # whatever is wrong with the file is said there
        with Image.open(Path(source)) as photo:
            return load_rgb(photo) if _has_colour(photo) else gray.expand(-1, 3, -1, -1)
    if isinstance(source, Image.Image) and _has_colour(source):
        source = np.asarray(source.convert("RGB"))
    if isinstance(source, np.ndarray) and source.ndim == 3 and source.shape[2] in (3, 4):
        return torch.cat([load_image(source[..., c]) for c in range(3)], dim=1)
    if isinstance(source, Tensor) and source.ndim in (3, 4) and source.shape[-3] in (3, 4):
        return torch.cat([load_image(source[..., c, :, :]) for c in range(3)], dim=1)
    return load_image(source).expand(-1, 3, -1, -1)


def _has_colour(photo: Image.Image) -> bool:
    return photo.mode in ("P", "PA") or len(photo.getbands()) > 2


def _load(name: str, library: str, kind: str, load: Callable[[Any], nn.Module]) -> nn.Module:
    module, remedy = LIBRARIES[library]
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except ImportError as error:
        raise ImportError(f"{name} needs {library}: {remedy}") from error
    if found is None:
        raise ImportError(
            f"{name} needs a newer {library}, the one installed has no {kind}: {remedy}"
        )
    try:
        return load(found)
    except (
        OSError,
        RuntimeError,
    ) as error:  # what transformers and kornia raise when nothing can be fetched
        raise WeightsError(
            f"{library} could not get its weights of {name}. Load them once where there is a "
            f"network, {library} keeps them "
            f"({library} says: {error})"
        ) from error


def _upright(xy: Tensor, score: Tensor) -> Keypoints:
    """Points of a detector that knows neither scale nor angle."""
    xy, score = xy.float(), score.float()
    return Keypoints(xy, torch.ones_like(score), torch.zeros_like(score), score)


# ---- kornia


def _disk(network: Network, num_keypoints: int) -> Find:
    """DISK (Tyszkiewicz, Fua, Trulls 2020), weights "depth". Whole pixels, our convention."""
    disk = network("kornia", "DISK", lambda kind: kind.from_pretrained("depth"))

    def find(image: Tensor) -> tuple[Keypoints, Tensor]:
        found = disk(image, n=num_keypoints, pad_if_not_divisible=True)[0]
        return _upright(found.keypoints, found.detection_scores), found.descriptors

    return find


def _aliked(network: Network, num_keypoints: int) -> Find:
    """ALIKED (Zhao et al. 2023), n16: the strongest maxima without a threshold. Sub-pixel, our
    convention.
    """
    aliked = network(
        "kornia",
        "ALIKED",
        lambda kind: kind.from_pretrained(
            "aliked-n16", max_num_keypoints=num_keypoints, detection_threshold=0
        ),
    )

    def find(image: Tensor) -> tuple[Keypoints, Tensor]:
        found = aliked(image)[0]
        return _upright(found.keypoints, found.keypoint_scores), found.descriptors

    return find


def _dedode(network: Network, num_keypoints: int) -> Find:
    """DeDoDe (Edstedt et al. 2024), detector L-C4-v2 and descriptor B; no suppression of
    neighbours.
    """
    dedode = network(
        "kornia",
        "DeDoDe",
        lambda kind: kind.from_pretrained("L-C4-v2", "B-upright", amp_dtype=torch.float32),
    )

    def find(image: Tensor) -> tuple[Keypoints, Tensor]:
        xy, score, descriptors = dedode(image, n=num_keypoints)
        # DeDoDe puts the corner of the first pixel at 0, its centre at half a pixel
        return _upright(xy[0] - 0.5, score[0]), descriptors[0]

    return find


def _xfeat(network: Network, num_keypoints: int) -> Find:
    """XFeat (Potje et al. 2024), sparse. Runs on the image resized to multiples of 32."""
    xfeat = network("kornia", "XFeat", lambda kind: kind.from_pretrained())

    def find(image: Tensor) -> tuple[Keypoints, Tensor]:
        found = xfeat.detectAndCompute(image, top_k=num_keypoints)[0]
        # XFeat multiplies positions by the ratio of the sizes and forgets the half pixel of the
        # resizing law
        ratio = found["keypoints"].new_tensor(
            [side / max(32, side // 32 * 32) for side in (image.shape[-1], image.shape[-2])]
        )
        return _upright(found["keypoints"] + (ratio - 1) / 2, found["scores"]), found["descriptors"]

    return find


def _keynet(kind: str) -> Callable[[Network, int], Find]:
    """kornia's Key.Net (Barroso-Laguna et al. 2019) with orientation and HardNet, and with AffNet's
    shape where ``kind`` has it.
    """

    def make(network: Network, num_keypoints: int) -> Find:
        local = network("kornia", kind, lambda kind: kind(num_features=num_keypoints))

        def find(image: Tensor) -> tuple[Keypoints, Tensor]:
            lafs, responses, descriptors = local(to_gray(image))
            filled = lafs[0].flatten(1).any(dim=1)  # kornia fills up with frames of zeros
            points = from_laf(
                lafs[:, filled], responses[0, filled], local.detector.mr_size * local.scaling_coef
            )
            # positions of a level are multiplied by its ratio, here ``scale``, without the half
            # pixel of the resizing law
            return Keypoints(
                points.xy + (points.scale[:, None] - 1) / 2,
                points.scale,
                points.angle,
                points.score,
            ), descriptors[0, filled]

        return find

    return make


# ---- transformers


def _superpoint(network: Network, num_keypoints: int) -> Find:
    """SuperPoint (DeTone, Malisiewicz, Rabinovich 2018). Whole pixels; positions come as parts of
    width and height.
    """
    superpoint = network(
        "transformers",
        "SuperPointForKeypointDetection",
        lambda kind: kind.from_pretrained("magic-leap-community/superpoint"),
    )

    def find(image: Tensor) -> tuple[Keypoints, Tensor]:
        h, w = image.shape[-2:]
        whole = F.pad(
            to_gray(image), (0, -w % SUPERPOINT_CELL, 0, -h % SUPERPOINT_CELL), mode="replicate"
        ).expand(-1, 3, -1, -1)
        found = superpoint(whole)
        size = found.keypoints.new_tensor([whole.shape[-1], whole.shape[-2]])
        return _upright((found.keypoints[0] * size).round(), found.scores[0]), found.descriptors[0]

    return find


_SYSTEMS: dict[str, Callable[[Network, int], Find]] = {
    "disk": _disk,
    "aliked": _aliked,
    "dedode": _dedode,
    "xfeat": _xfeat,
    "kornia-keynet-hardnet": _keynet("KeyNetHardNet"),
    "kornia-keynet-affnet-hardnet": _keynet("KeyNetAffNetHardNet"),
    "superpoint": _superpoint,
}
EXTERNAL_SYSTEMS: tuple[str, ...] = tuple(_SYSTEMS)
