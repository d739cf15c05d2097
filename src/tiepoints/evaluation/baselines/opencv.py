"""Classical detectors as systems to compare with: OpenCV's (4.10 or newer, and 5), and SURF
(``detectors.surf``).

``opencv_detect("sift", gray)`` gives key points and the detector's own descriptors. Parameters are
OpenCV's defaults, except where ``_DETECTORS`` says so and why.

What to know of each (seen alike in OpenCV 5.0.0 and 4.14.0; offsets are half the mean mirror offset
of four Oxford images):
- Positions are OpenCV's, whose convention is ours (first pixel's centre at 0), with its errors.
  **sift** lies 0.25 px too far right and below (none with ``enable_precise_upscale``, which is off
  by default); **harris-laplace** 0.4 px, on a grid as coarse as the scale; **orb** multiplies the
  positions of a level without the half pixel and misses by up to 0.8 px left and above; **brisk**
  0.2 to 0.4 px left and above at coarse scales. The others have no offset; **akaze** 0.2 px in x at
  its coarsest scale alone.
- **mser**: OpenCV 5.0.0 drops nine regions of ten, the most stable ones (opencv issue 29652: it
  compares their variation with ``min_diversity``). With ``min_diversity`` 0 it finds exactly the
  regions of 4.14, which ignores that value for gray images, so this module always sets it. Regions
  have no strength: all scores are 1 and the order is a random one drawn from ``seed`` and the
  image.
- **surf** is in OpenCV only when built with its non-free part, which no wheel is; ours is used
  everywhere, so that results agree.
- **kaze, akaze, brisk** are in the main module of OpenCV 4 and in contrib of 5; **harris-laplace**
  is in contrib of both.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...formats.interop import from_cv2
from ...structs import Keypoints
from .surf import surf

#: Images with a shorter side have no points: BRISK and others refuse those below 6 px.
MIN_SIDE = 8
#: ORB takes the number of points as a budget per level, so it is given at least this many and the
#: strongest are kept.
ORB_POINTS = 5000
#: Harris' measure is of fourth order in contrast where Shi and Tomasi's is of second: the square of
#: its threshold 0.01.
HARRIS_QUALITY = 1e-4


@dataclass(frozen=True)
class _Detector:
    """How OpenCV makes a detector.

    Attributes:
        maker: name of its ``..._create``.
        size: ``KeyPoint.size`` of a point found at the original resolution, which is our scale 1.
        options: keyword arguments that differ from OpenCV's defaults.
        descriptor: ``root`` (SIFT), ``real``, ``binary``, or empty where it has none of its own.
        length: numbers of a descriptor.
    """

    maker: str
    size: float
    options: dict[str, Any]
    descriptor: str = ""
    length: int = 0


#: OpenCV's sources give the sizes: twice sigma 1.6 of the first level (sift, kaze), that times 1.5,
#: the width of the derivatives (akaze); three times the integration scale, as a diameter, at
#: integration scale 1 (harris-laplace); 7 px circle (fast), 31 px patch (orb), ``basicSize_`` 12
#: (brisk), 3 px window (shi-tomasi, harris); mser's regions know no level, so the disc of the least
#: area accepted, 60 px, counts as scale 1.
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
    """The strongest points of one detector, and its own descriptors.

    Args:
        name: one of ``OPENCV_SYSTEMS``.
        gray: (H,W) uint8. An image of one value, or with a side below ``MIN_SIDE``, has no points.
        num_keypoints: at most so many; equal responses keep the detector's order.
        seed: of the random order of ``mser``, whose regions have no strength; the other detectors
            ignore it.
        describe: false saves the time of descriptors.

    Returns:
        key points, strongest first, and descriptors (N,D) float32 of unit length: RootSIFT for
        ``sift``, numbers for ``surf`` and ``kaze``, bits as +-1/sqrt(D) for ``akaze``, ``orb`` and
        ``brisk``, so that the cosine is 1 - 2 * Hamming / D. None for the others, and without
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
    points = from_cv2([found[i] for i in order], size=spec.size)
    if name == "mser":
        points = Keypoints(points.xy, points.scale, points.angle, torch.ones(len(points)))
    if not described:
        return points, None
    if values is None or not len(found):
        return points, torch.zeros(0, spec.length)
    return points, _unit(torch.from_numpy(values[order]), spec.descriptor)


def _make(name: str, spec: _Detector, num_keypoints: int) -> Any:
    """OpenCV's detector from where this version keeps it."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"{name} needs OpenCV: pip install 'tiepoints[opencv]'") from error
    for module in (cv2, getattr(cv2, "xfeatures2d", None)):
        maker = getattr(module, spec.maker, None)
        if maker is not None:
            break
    else:
        raise ImportError(
            f"{name} is not in this OpenCV {cv2.__version__}, it needs the contrib build: pip "
            "uninstall the other opencv "
            "packages, then pip install 'tiepoints[opencv]'"
        )
    options = dict(spec.options)
    if name == "orb":
        options["nfeatures"] = max(options["nfeatures"], num_keypoints)
    detector = maker(**options)
    if name == "mser":
        detector.setMinDiversity(0.0)  # see the file's docstring
    return detector


def _run(
    name: str, detector: Any, gray: NDArray[np.uint8], described: bool
) -> tuple[list, NDArray | None]:
    """OpenCV's points and raw descriptors. KAZE turns and BRISK drops points only while describing:
    they always describe, so that the points do not depend on ``described``.
    """
    if described or name in ("kaze", "brisk"):
        found, values = detector.detectAndCompute(gray, None)
        return list(found), values
    return list(detector.detect(gray)), None


def _unit(values: Tensor, kind: str) -> Tensor:
    """Raw descriptors (N,...) to (N,D) float32 of unit length."""
    if kind == "root":
        return F.normalize(values.float() + 1e-7, p=1, dim=1).sqrt()
    if kind == "real":
        return F.normalize(
            values.float().nan_to_num(), dim=1
        )  # KAZE divides by zero where a patch is flat
    bits = (
        values[:, :, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)) & 1
    )  # (N,bytes,8)
    signs = bits.flatten(1).float() * 2 - 1
    return signs / signs.shape[1] ** 0.5
