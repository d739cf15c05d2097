"""Detectors of other libraries as baselines: those of kornia, and SuperPoint of transformers.

``external_system("disk")`` is a callable image -> ``Features``. The library is installed by the
user, and downloads and caches its own weights (check their licenses: SuperPoint's are for research
only); ``model=`` takes an existing network. Detectors for color images get color images.

To add one, write a function ``(network, num_keypoints) -> find`` like those below and enter it in
``_SYSTEMS``: ``network(library, class, load)`` returns the user's network or the loaded one;
``find(image)`` maps an image (1,3,H,W) RGB in [0,1] to ``Keypoints`` and descriptors in any order
and number, and converts positions to our convention (center of the first pixel at 0).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...errors import WeightsError
from ...filters import to_gray
from ...formats.interop import from_laf
from ...image import ImageLike, load_image, read_rgb
from ...structs import Features, Keypoints

#: DISK needs more than 16 pixels; images with a shorter side are padded to this by replication.
MIN_SIDE = 32
#: SuperPoint ignores incomplete cells of this size at the border.
SUPERPOINT_CELL = 8
#: Library -> module of its classes, and how to install it. kornia has ALIKED and XFeat since 0.8.3;
#: transformers before 4.47 returned SuperPoint's positions in pixels instead of relative ones.
LIBRARIES = {
    "kornia": ("kornia.feature", "pip install 'kornia>=0.8.3'"),
    "transformers": ("transformers", "pip install 'transformers>=4.47'"),
}

Network: TypeAlias = Callable[[str, str, Callable[[Any], nn.Module]], Any]
Find: TypeAlias = Callable[[Tensor], tuple[Keypoints, Tensor]]


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries of ``LIBRARIES``."""
    found = {}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def external_system(
    name: str, *, num_keypoints: int = 1000, model: nn.Module | None = None, device: str = "cpu"
) -> Callable[[ImageLike], Features]:
    """Create a detector of another library with its own descriptors.

    Args:
        name: one of ``EXTERNAL_SYSTEMS``.
        num_keypoints: maximum number of keypoints per image.
        model: a network of the library, instead of its pretrained one; it is set to evaluation mode
            and moved to ``device``.
        device: device of the network. The features are on the CPU.

    Returns:
        image -> ``Features``, strongest first, with descriptors (N,D) float32 of unit length. Scale
        is 1 and angle 0 if the detector does not estimate them.

    Raises:
        ValueError: unknown name, or ``num_keypoints`` below 1.
        ImportError: the library is missing, or too old to have the detector.
        WeightsError: the library cannot download the pretrained weights.
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
            keypoints, descriptors = find(padded.to(device))
        keypoints, descriptors = keypoints.to("cpu"), F.normalize(descriptors.cpu().float(), dim=1)
        xy, score = keypoints.xy, keypoints.score
        inside = ((xy >= -0.5) & (xy <= xy.new_tensor([w, h]) - 0.5)).all(dim=1).nonzero()[:, 0]
        order = inside[score[inside].argsort(descending=True, stable=True)][:num_keypoints]
        return Features(keypoints[order], descriptors[order], (w, h))

    return system


def load_rgb(source: ImageLike) -> Tensor:
    """Load anything ``load_image`` accepts as RGB (1,3,H,W) float32 in [0,1]; gray images are
    repeated in the channels. Raises the errors of ``load_image``.
    """
    if isinstance(source, str | os.PathLike):
        return read_rgb(source)
    if isinstance(source, Image.Image) and _has_color(source):
        source = np.asarray(source.convert("RGB"))
    if isinstance(source, np.ndarray) and source.ndim == 3 and source.shape[2] in (3, 4):
        return torch.cat([load_image(source[..., c]) for c in range(3)], dim=1)
    if isinstance(source, Tensor) and source.ndim in (3, 4) and source.shape[-3] in (3, 4):
        return torch.cat([load_image(source[..., c, :, :]) for c in range(3)], dim=1)
    return load_image(source).expand(-1, 3, -1, -1)


def _has_color(photo: Image.Image) -> bool:
    return photo.mode in ("P", "PA") or len(photo.getbands()) > 2


def _load(name: str, library: str, kind: str, load: Callable[[Any], nn.Module]) -> nn.Module:
    module, remedy = LIBRARIES[library]
    try:
        network_class = getattr(importlib.import_module(module), kind, None)
    except ImportError as error:
        raise ImportError(f"{name} needs {library}: {remedy}") from error
    if network_class is None:
        raise ImportError(
            f"{name} needs a newer {library}, the one installed has no {kind}: {remedy}"
        )
    try:
        return load(network_class)
    except (OSError, RuntimeError) as error:  # failed downloads of transformers and kornia
        raise WeightsError(
            f"{library} could not load its weights of {name}. Load them once with a network "
            f"connection, {library} caches them (error of {library}: {error})"
        ) from error


def _upright(xy: Tensor, score: Tensor) -> Keypoints:
    """Keypoints of a detector without scales and angles."""
    xy, score = xy.float(), score.float()
    return Keypoints(xy, torch.ones_like(score), torch.zeros_like(score), score)


# ---- kornia


def _disk(network: Network, num_keypoints: int) -> Find:
    """DISK (Tyszkiewicz, Fua, Trulls 2020), weights "depth". Integer pixels, our convention."""
    disk = network("kornia", "DISK", lambda kind: kind.from_pretrained("depth"))

    def find(image: Tensor) -> tuple[Keypoints, Tensor]:
        found = disk(image, n=num_keypoints, pad_if_not_divisible=True)[0]
        return _upright(found.keypoints, found.detection_scores), found.descriptors

    return find


def _aliked(network: Network, num_keypoints: int) -> Find:
    """ALIKED (Zhao et al. 2023), n16: the strongest maxima without a threshold. Subpixel, our
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
    """DeDoDe (Edstedt et al. 2024), detector L-C4-v2 and descriptor B; without non-maximum
    suppression.
    """
    dedode = network(
        "kornia",
        "DeDoDe",
        lambda kind: kind.from_pretrained("L-C4-v2", "B-upright", amp_dtype=torch.float32),
    )

    def find(image: Tensor) -> tuple[Keypoints, Tensor]:
        xy, score, descriptors = dedode(image, n=num_keypoints)
        # in DeDoDe the corner of the first pixel is at 0
        return _upright(xy[0] - 0.5, score[0]), descriptors[0]

    return find


def _xfeat(network: Network, num_keypoints: int) -> Find:
    """XFeat (Potje et al. 2024), sparse. Runs on the image resized to multiples of 32."""
    xfeat = network("kornia", "XFeat", lambda kind: kind.from_pretrained())

    def find(image: Tensor) -> tuple[Keypoints, Tensor]:
        found = xfeat.detectAndCompute(image, top_k=num_keypoints)[0]
        # XFeat multiplies positions by the ratio of the sizes, without the half-pixel offset of
        # resizing
        ratio = found["keypoints"].new_tensor(
            [side / max(32, side // 32 * 32) for side in (image.shape[-1], image.shape[-2])]
        )
        return _upright(found["keypoints"] + (ratio - 1) / 2, found["scores"]), found["descriptors"]

    return find


def _keynet(kind: str) -> Callable[[Network, int], Find]:
    """kornia's Key.Net (Barroso-Laguna et al. 2019) with orientation and HardNet, with AffNet's
    shape depending on ``kind``.
    """

    def make(network: Network, num_keypoints: int) -> Find:
        local = network("kornia", kind, lambda kind: kind(num_features=num_keypoints))

        def find(image: Tensor) -> tuple[Keypoints, Tensor]:
            lafs, responses, descriptors = local(to_gray(image))
            filled = lafs[0].flatten(1).any(dim=1)  # kornia pads with zero frames
            keypoints = from_laf(
                lafs[:, filled], responses[0, filled], local.detector.mr_size * local.scaling_coef
            )
            # kornia multiplies positions of a level by its ratio, here ``scale``, without the
            # half-pixel offset of resizing
            xy = keypoints.xy + (keypoints.scale[:, None] - 1) / 2
            return replace(keypoints, xy=xy), descriptors[0, filled]

        return find

    return make


# ---- transformers


def _superpoint(network: Network, num_keypoints: int) -> Find:
    """SuperPoint (DeTone, Malisiewicz, Rabinovich 2018). Integer pixels; the network
    returns positions relative to width and height.
    """
    superpoint = network(
        "transformers",
        "SuperPointForKeypointDetection",
        lambda kind: kind.from_pretrained("magic-leap-community/superpoint"),
    )

    def find(image: Tensor) -> tuple[Keypoints, Tensor]:
        h, w = image.shape[-2:]
        padded = F.pad(
            to_gray(image), (0, -w % SUPERPOINT_CELL, 0, -h % SUPERPOINT_CELL), mode="replicate"
        ).expand(-1, 3, -1, -1)
        found = superpoint(padded)
        size = found.keypoints.new_tensor([padded.shape[-1], padded.shape[-2]])
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
