"""Systems to evaluate, by name: those of this package, OpenCV and other libraries, features on
disk, and content-free controls.

A system is a callable image -> ``Features``. ``system("sift+rootsift")`` creates one; ``SYSTEMS``
lists the names.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..describe import PatchDescriptor
from ..errors import DataError
from ..extract import build, build_descriptor, network_label
from ..formats.hdf5 import require_h5py
from ..formats.records import file_stamp, json_digest
from ..formats.store import open_features
from ..image import ImageLike, load_image
from ..keypoints import detect_peaks
from ..models.classical import RawPatch
from ..names import DESCRIPTOR, DESCRIPTORS, DETECTORS, ORIENTATIONS
from ..pyramid import SCALE_STEP, build_pyramid, level_budgets
from ..structs import Features, Keypoints
from ..weights import digest, load
from .baselines.external import EXTERNAL_SYSTEMS, external_system, library_versions
from .baselines.opencv import OPENCV_SYSTEMS, opencv_detect

System: TypeAlias = Callable[[ImageLike], Features]

OURS = DETECTORS
#: Content-free controls: their keypoints do not depend on the image content, so their results are
#: the chance level of a metric.
CONTROLS = ("random", "lattice")
#: Allowed after the @ of a detector of ``OURS``: an extraction mode, or an orientation.
MODES = ("", "official", "all", "upright", *ORIENTATIONS)
#: Allowed after the plus sign of a system's name.
POINT_DESCRIPTORS = (*DESCRIPTORS, "raw")
SYSTEMS = OURS + OPENCV_SYSTEMS + EXTERNAL_SYSTEMS + CONTROLS
#: Keypoints extracted per keypoint compared: protocols restrict keypoints to the common area
#: before they select the strongest.
SPARE = 5
REKD_SPARE = 1.5


@dataclass(frozen=True)
class Options:
    """Options of every system.

    Attributes:
        num_keypoints: maximum number of keypoints per image.
        single_scale: without a scale pyramid (the papers' TI), for detectors that support it.
        device: device of the networks.
    """

    num_keypoints: int = 1000 * SPARE
    single_scale: bool = False
    device: str = "cpu"


def system(name: str, options: Options | None = None) -> System:
    """Create the system ``name``: ``DETECTOR``, or ``DETECTOR+DESCRIPTOR`` to replace the
    detector's own descriptors.

    DESCRIPTOR is one of ``POINT_DESCRIPTORS`` or a weights file. DETECTOR is one of ``SYSTEMS``, a
    weights file (of this package or an official one), a folder of ``.kpt.npy``/``.dsc.npy`` files
    or an hloc ``.h5`` file. Networks take a mode: ``NAME@official`` for the published extraction,
    ``NAME@all`` for several keypoints per location (one per scale), ``NAME@upright`` for patches
    that are not rotated, ``NAME@dominant`` and the other ``names.ORIENTATIONS`` for other angles.

    Raises:
        ValueError: unknown name.
        ImportError: a library is missing; the message names it.
    """
    options = options or Options()
    detector, _, descriptor = name.partition("+")
    if descriptor and descriptor not in POINT_DESCRIPTORS and not Path(descriptor).is_file():
        raise ValueError(
            f"descriptor must be {', '.join(POINT_DESCRIPTORS)} or a weights file, got "
            f"{descriptor!r} in {name!r}"
        )
    detect: System
    if detector in CONTROLS:
        detect = _control(detector, options)
    elif detector in OPENCV_SYSTEMS:
        detect = _opencv(detector, options)
    elif detector in EXTERNAL_SYSTEMS:
        detect = external_system(
            detector, num_keypoints=options.num_keypoints, device=options.device
        )
    elif _is_ours(detector):
        return _ours(detector, descriptor or DESCRIPTOR, options)
    elif Path(detector).exists():
        detect = from_disk(detector)
    else:
        raise ValueError(
            f"unknown system {detector!r}: neither {', '.join(SYSTEMS)}, nor a file or folder"
        )
    if descriptor == "none":
        return _without_descriptors(detect)
    return _with_patches(detect, descriptor, options) if descriptor else detect


def _is_ours(detector: str) -> bool:
    """Whether a detector, without its descriptor, is a network: embedded, or a weights file."""
    name = detector.partition("@")[0]
    return name in OURS or (Path(name).is_file() and not detector.endswith((".h5", ".hdf5")))


def system_label(name: str) -> str:
    """The name of a system in tables: of weights files by their content (``network_label``), of
    stored features the last part of the path.

    Raises:
        WeightsError: a weights file is damaged or of an unknown type.
    """
    detector, plus, descriptor = name.partition("+")
    if _is_ours(detector):
        network, at, mode = detector.partition("@")
        detector = f"{network_label(network)}{at}{mode}"
    else:
        detector = detector.rstrip("/").rsplit("/", 1)[-1]
    return f"{detector}{plus}{network_label(descriptor)}"


def system_record(name: str) -> dict[str, Any]:
    """What determines the features of a system in addition to its name and options: SHA-256 of its
    weights, version of the library, or size and modification time of stored features.
    """
    detector, _, descriptor = name.partition("+")
    record: dict[str, Any] = {"system": name}
    if _is_ours(detector):
        record["detector"] = digest(detector.partition("@")[0])
        record["orientation"] = digest(detector.partition("@")[2])
        descriptor = descriptor or DESCRIPTOR
    elif detector in OPENCV_SYSTEMS:
        record["opencv"] = import_module("cv2").__version__
    elif detector in EXTERNAL_SYSTEMS:
        record["libraries"] = library_versions()
    elif Path(detector).is_dir():
        files = sorted(path for path in Path(detector).rglob("*") if path.suffix in (".npy", ".h5"))
        stamps = [[str(path.relative_to(detector)), file_stamp(path)] for path in files]
        record["features"] = json_digest(stamps)
    elif detector not in CONTROLS:
        record["features"] = file_stamp(Path(detector))
    if descriptor:
        record["descriptor"] = digest(descriptor)
    return {key: value for key, value in record.items() if value is not None}


def _ours(name: str, descriptor: str, options: Options) -> System:
    detector, _, mode = name.partition("@")
    if mode not in MODES:
        raise ValueError(
            f"the mode after @ must be one of {', '.join(MODES[1:])}; got {mode!r} in {name!r}"
        )
    choices: dict[str, dict[str, Any]] = {
        "official": {"official": True},
        "all": {"per_scale": True},
        "upright": {"upright": True},
    }
    choice = choices.get(mode, {})
    if mode in ORIENTATIONS:
        choice = {"orientation": mode}
    extract = build(
        detector,
        _network(descriptor),
        single_scale=options.single_scale,
        device=options.device,
        num_keypoints=options.num_keypoints,
        **choice,
    ).extract
    # the published extraction returns keypoints level by level
    return lambda image: _strongest_first(extract(image))


def _network(descriptor: str) -> str | nn.Module:
    """The argument of ``build`` for a descriptor of an evaluation: a name, or a network."""
    if descriptor in DESCRIPTORS:
        return descriptor
    return RawPatch() if descriptor == "raw" else load(descriptor)


def patch_network(
    descriptor: str, device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """Load a patch descriptor (of ``POINT_DESCRIPTORS``, or a weights file) as a network patches
    (N,1,32,32) in [0,1] -> (N,D).

    Raises:
        ValueError: unknown name, or ``none``.
    """
    names = [name for name in POINT_DESCRIPTORS if name not in ("none", "desnet")]
    descriptor_stage = (
        build_descriptor(_network(descriptor), device=device)
        if descriptor in names or Path(descriptor).is_file()
        else None
    )
    if not isinstance(descriptor_stage, PatchDescriptor):
        raise ValueError(
            f"descriptor must be {', '.join(names)} or a weights file of a patch descriptor, got "
            f"{descriptor!r}"
        )
    return descriptor_stage.net


def _sized(image: Tensor, keypoints: Keypoints, descriptors: Tensor | None = None) -> Features:
    return Features(keypoints, descriptors, (image.shape[-1], image.shape[-2]))


def _opencv(name: str, options: Options) -> System:
    # raises for a missing library before the first image
    opencv_detect(name, torch.zeros(1, 1, dtype=torch.uint8).numpy())

    def run(source: ImageLike) -> Features:
        image = load_image(source)
        gray = (image[0, 0] * 255).round().to(torch.uint8).numpy()
        # MSER regions have equal scores: the evaluation averages over random selections of them
        keypoints, descriptors = opencv_detect(name, gray, options.num_keypoints)
        return _sized(image, keypoints, descriptors)

    return run


def _with_patches(detect: System, descriptor: str, options: Options) -> System:
    describe = build_descriptor(_network(descriptor), device=options.device)
    assert describe is not None

    def run(source: ImageLike) -> Features:
        features = detect(source)
        pyramid = build_pyramid(load_image(source).to(options.device))
        keypoints = features.keypoints.to(options.device)
        return replace(features, descriptors=describe(pyramid, keypoints, 0).cpu())

    return run


def _without_descriptors(detect: System) -> System:
    def run(source: ImageLike) -> Features:
        return replace(detect(source), descriptors=None)

    return run


def as_features(found: Any, size: tuple[int, int]) -> Features:
    """Convert the output of a system on an image of ``size`` (width, height) to ``Features``.

    The output is ``Features``, ``Keypoints``, or an array or tensor (N,2), (N,3) with scale or
    (N,4) with scale and score, strongest first.
    """
    if isinstance(found, Features):
        return found
    if isinstance(found, Keypoints):
        return Features(found, None, size)
    table = torch.as_tensor(np.asarray(found) if not isinstance(found, Tensor) else found).float()
    if table.ndim != 2 or not 2 <= table.shape[1] <= 4:
        raise ValueError(
            "a system must return Features, Keypoints or an array (N,2..4); got shape "
            f"{tuple(table.shape)}"
        )
    n = len(table)
    scale = table[:, 2] if table.shape[1] > 2 else torch.ones(n)
    score = table[:, 3] if table.shape[1] > 3 else torch.linspace(1, 0.5, n)
    return Features(Keypoints(table[:, :2].contiguous(), scale, torch.zeros(n), score), None, size)


# ---- controls


def _seed(image: Tensor) -> int:
    """A reproducible seed from the pixels of an image."""
    return zlib.crc32((image[0, 0] * 255).to(torch.uint8).numpy().tobytes())


def _control(name: str, options: Options) -> System:
    """Uniformly random keypoints, or a randomly rotated and shifted square lattice; both with
    random scores.

    Random keypoints pass the same 15 x 15 non-maximum suppression as those of a network. Unless
    single-scale, their scales are distributed as by Key.Net's budgets per level.
    """

    def run(source: ImageLike) -> Features:
        image = load_image(source)
        h, w = image.shape[-2:]
        rng = torch.Generator().manual_seed(_seed(image))
        if name == "random":
            scores = torch.zeros(h * w)
            pixels = torch.randperm(h * w, generator=rng)[: min(options.num_keypoints, h * w)]
            scores[pixels] = torch.rand(len(pixels), generator=rng) + 1e-6
            xy = detect_peaks(scores.view(1, 1, h, w), options.num_keypoints, subpixel=False)[0][0]
        else:
            xy = _lattice(h, w, rng)
        scale = torch.ones(len(xy))
        if not options.single_scale:
            budgets = torch.tensor(level_budgets(10_000, 1, 6), dtype=torch.float32)
            level = (
                torch.multinomial(budgets, len(xy), replacement=True, generator=rng)
                if len(xy)
                else torch.zeros(0)
            )
            scale = SCALE_STEP ** (level.float() - 1)
        score = torch.rand(len(xy), generator=rng)
        order = score.argsort(descending=True)
        return _sized(image, Keypoints(xy[order], scale[order], torch.zeros(len(xy)), score[order]))

    return run


def _lattice(h: int, w: int, rng: torch.Generator, nodes: int = 1000) -> Tensor:
    step = math.sqrt(h * w / nodes)
    angle, px, py = (float(v) for v in torch.rand(3, generator=rng))
    angle *= math.pi / 2
    half = math.ceil(math.hypot(h, w) / step) + 1
    i = torch.arange(-half, half + 1, dtype=torch.float32)
    u, v = torch.meshgrid((i + px) * step, (i + py) * step, indexing="ij")
    x = u * math.cos(angle) - v * math.sin(angle) + w / 2
    y = u * math.sin(angle) + v * math.cos(angle) + h / 2
    xy = torch.stack([x.reshape(-1), y.reshape(-1)], dim=-1)
    inside = (xy >= 0).all(dim=1) & (xy[:, 0] <= w - 1) & (xy[:, 1] <= h - 1)
    return xy[inside]


# ---- features on disk


def from_disk(path: str | Path) -> System:
    """System of stored features: a folder of ``NAME.kpt.npy``/``NAME.dsc.npy`` that mirrors the
    images' paths, or an hloc HDF5 file (or only its journal).

    An image is looked up by the longest suffix of its path that exists (``graf/1.png`` before
    ``1.png``).

    Raises (when called):
        DataError: no features are stored for the image, or it was not given as a path.
    """
    path = Path(path)
    if not path.is_dir():
        require_h5py()  # a missing library is reported before the first image

    def run(source: ImageLike) -> Features:
        if not isinstance(source, str | Path):
            raise DataError(f"features of {path} belong to image files; give paths")
        image = load_image(source)
        parts = Path(source).parts
        names = ["/".join(parts[i:]).lstrip("/") for i in range(len(parts))]
        with open_features(path) as store:
            name = next((name for name in names if name in store), None)
            if name is None:
                raise DataError(
                    f"{path} holds no features of {source}: looked for {', '.join(names[-3:])}"
                )
            features = store.read(name)
        return _strongest_first(replace(features, image_size=(image.shape[-1], image.shape[-2])))

    return run


def _strongest_first(features: Features) -> Features:
    descriptors = features.descriptors
    if descriptors is not None:
        features = replace(features, descriptors=F.normalize(descriptors.float(), dim=1))
    return features[features.score.argsort(descending=True, stable=True)]
