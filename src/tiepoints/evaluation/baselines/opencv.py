"""Classical detectors as baselines: OpenCV's (4.10 or newer, and 5), and SURF (``surf``).

``opencv_detect("sift", gray)`` returns keypoints and the detector's own descriptors. Parameters are
OpenCV's defaults, except for those in ``_DETECTORS``.

Notes on the detectors (equal in OpenCV 5.0.0 and 4.14.0; biases are half the mean displacement
between four Oxford images and their mirrored copies):

- Positions are OpenCV's, in our convention (center of the first pixel at 0), including its biases.
  **sift** is biased by 0.25 px to the right and down (not with ``enable_precise_upscale``, which is
  off by default); **harris-laplace** by 0.4 px, on a grid as coarse as the scale; **orb** scales
  the positions of a level without the half-pixel offset and is biased by up to 0.8 px to the left
  and up; **brisk** by 0.2 to 0.4 px to the left and up at coarse scales. The others are not biased,
  except **akaze** by 0.2 px in x at its coarsest scale.
- **mser**: OpenCV 5.0.0 drops nine of ten regions, the most stable ones (opencv issue 29652: it
  compares their variation with ``min_diversity``). With ``min_diversity`` 0 it finds exactly the
  regions of 4.14, which ignores that value for gray images, so this module always sets it. Regions
  have no ranking: all scores are 1 and the order is random, from ``seed`` and the image.
- **surf** is in OpenCV only if built with its non-free part, unlike all wheels; ours is always
  used, so that results are comparable.
- **kaze, akaze, brisk** are in the main module of OpenCV 4 and in contrib of 5; **harris-laplace**
  is in contrib of both.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...formats.interop import from_cv2
from ...structs import Keypoints
from .surf import surf

#: Images with a shorter side give no keypoints: BRISK and others raise below 6 px.
MIN_SIDE = 8
#: ORB distributes the number of keypoints over its levels, so at least this many are requested and
#: the strongest are kept.
ORB_POINTS = 5000
#: The response of Harris is of fourth order in contrast, that of Shi and Tomasi of second: this is
#: the square of the latter's threshold 0.01.
HARRIS_QUALITY = 1e-4


@dataclass(frozen=True)
class _Detector:
    """How to create a detector of OpenCV.

    Attributes:
        create: name of its ``..._create`` function.
        size: ``KeyPoint.size`` of a keypoint at the original resolution, which is our scale 1.
        options: keyword arguments that differ from OpenCV's defaults.
        descriptor: ``root`` (SIFT), ``real``, ``binary``, or empty if it has none.
        length: descriptor dimension.
    """

    create: str
    size: float
    options: dict[str, Any]
    descriptor: str = ""
    length: int = 0


#: Sizes from OpenCV's source code: twice sigma 1.6 of the first level (sift, kaze), times 1.5, the
#: width of the derivatives (akaze); three times the integration scale 1, as a diameter
#: (harris-laplace); 7 px circle (fast), 31 px patch (orb), ``basicSize_`` 12 (brisk), 3 px window
#: (shi-tomasi, harris); mser has no levels, so the disk of the minimum area of a region, 60 px, is
#: scale 1.
_DETECTORS = {
    "sift": _Detector("SIFT_create", 3.2, {}, "root", 128),
    "fast": _Detector("FastFeatureDetector_create", 7.0, {}),
    "mser": _Detector("MSER_create", 2 * (60 / np.pi) ** 0.5, {}),
    "harris-laplace": _Detector("HarrisLaplaceFeatureDetector_create", 6.0, {}),
    "kaze": _Detector("KAZE_create", 3.2, {}, "real", 64),
    "akaze": _Detector("AKAZE_create", 4.8, {}, "binary", 488),
    "orb": _Detector("ORB_create", 31.0, {"nfeatures": ORB_POINTS}, "binary", 256),
    "brisk": _Detector("BRISK_create", 12.0, {}, "binary", 512),
    "shi-tomasi": _Detector("GFTTDetector_create", 3.0, {"maxCorners": 0}),
    "harris": _Detector(
        "GFTTDetector_create",
        3.0,
        {"maxCorners": 0, "useHarrisDetector": True, "qualityLevel": HARRIS_QUALITY},
    ),
}

OPENCV_SYSTEMS: tuple[str, ...] = (
    "sift",
    "surf",
    "fast",
    "mser",
    "harris-laplace",
    "kaze",
    "akaze",
    "orb",
    "brisk",
    "shi-tomasi",
    "harris",
)


def opencv_detect(
    name: str,
    gray: NDArray[np.uint8],
    num_keypoints: int = 1000,
    seed: int = 0,
    *,
    describe: bool = True,
) -> tuple[Keypoints, Tensor | None]:
    """Detect the strongest keypoints with one detector, and describe them with its own descriptor.

    Args:
        name: one of ``OPENCV_SYSTEMS``.
        gray: (H,W) uint8. A constant image, or one with a side below ``MIN_SIDE``, has no
            keypoints.
        num_keypoints: maximum number; keypoints with equal responses keep the detector's order.
        seed: of the random order of ``mser``, whose regions have no ranking; ignored by others.
        describe: False skips descriptors.

    Returns:
        keypoints, strongest first, and descriptors (N,D) float32 of unit length: RootSIFT for
        ``sift``, real values for ``surf`` and ``kaze``, bits as +-1/sqrt(D) for ``akaze``, ``orb``
        and ``brisk``, so that the cosine is 1 - 2 * Hamming / D. None for the others, and without
        ``describe``.

    Raises:
        ValueError: unknown name, or an image of another type.
        ImportError: OpenCV, or the contrib part that the detector needs, is not installed.
    """
    if name not in OPENCV_SYSTEMS:
        raise ValueError(f"detector must be one of {', '.join(OPENCV_SYSTEMS)}; got {name!r}")
    if gray.ndim != 2 or gray.dtype != np.uint8:
        raise ValueError(f"gray must be (H,W) uint8, got {gray.shape} {gray.dtype}")
    if num_keypoints < 1:
        raise ValueError(f"num_keypoints must be at least 1, got {num_keypoints}")
    empty = min(gray.shape) < MIN_SIDE or gray.min() == gray.max()
    if name == "surf":
        return surf(
            torch.from_numpy(gray.copy()) / 255, 0 if empty else num_keypoints, describe=describe
        )
    spec = _DETECTORS[name]
    detector = _make(name, spec, num_keypoints)
    described = describe and bool(spec.descriptor)
    if empty:
        return Keypoints.empty(), torch.zeros(0, spec.length) if described else None
    found, values = _run(name, detector, np.ascontiguousarray(gray), described)
    response = np.array([p.response for p in found], dtype=np.float32)
    if name == "mser":
        generator = np.random.default_rng([seed, zlib.crc32(gray.tobytes())])
        order = generator.permutation(len(found))[:num_keypoints]
    else:
        order = np.argsort(-response, kind="stable")[:num_keypoints]
    keypoints = from_cv2([found[i] for i in order], size=spec.size)
    if name == "mser":
        keypoints = replace(keypoints, score=torch.ones(len(keypoints)))
    if not described:
        return keypoints, None
    if values is None or not len(found):
        return keypoints, torch.zeros(0, spec.length)
    return keypoints, _normalize(torch.from_numpy(values[order]), spec.descriptor)


def _make(name: str, spec: _Detector, num_keypoints: int) -> Any:
    """Create OpenCV's detector, from the module that has it in the installed version."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"{name} needs OpenCV: pip install 'tiepoints[opencv]'") from error
    for module in (cv2, getattr(cv2, "xfeatures2d", None)):
        create = getattr(module, spec.create, None)
        if create is not None:
            break
    else:
        raise ImportError(
            f"{name} is not in this OpenCV {cv2.__version__}, it needs the contrib build: pip "
            "uninstall the other opencv packages, then pip install 'tiepoints[opencv]'"
        )
    options = dict(spec.options)
    if name == "orb":
        options["nfeatures"] = max(options["nfeatures"], num_keypoints)
    detector = create(**options)
    if name == "mser":
        detector.setMinDiversity(0.0)  # see the docstring of this module
    return detector


def _run(
    name: str, detector: Any, gray: NDArray[np.uint8], described: bool
) -> tuple[list, NDArray | None]:
    """OpenCV's keypoints and raw descriptors. KAZE computes angles and BRISK drops keypoints only
    while describing: they always describe, so that keypoints do not depend on ``described``.
    """
    if described or name in ("kaze", "brisk"):
        found, values = detector.detectAndCompute(gray, None)
        return list(found), values
    return list(detector.detect(gray)), None


def _normalize(values: Tensor, kind: str) -> Tensor:
    """Convert raw descriptors (N,...) to (N,D) float32 of unit length."""
    if kind == "root":
        return F.normalize(values.float() + 1e-7, p=1, dim=1).sqrt()
    if kind == "real":
        # KAZE divides by zero in constant patches
        return F.normalize(values.float().nan_to_num(), dim=1)
    # (N,bytes,8)
    bits = values[:, :, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)) & 1
    signs = bits.flatten(1).float() * 2 - 1
    return signs / signs.shape[1] ** 0.5
