"""Systems to evaluate, by name: those of this package, OpenCV and other libraries, features on
disk, and content-free controls.

A system is a callable image -> ``Features``. ``system("sift+rootsift")`` creates one; ``SYSTEMS``
lists the names.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..describe import PatchDescriptor
from ..detect import PUBLISHED
from ..errors import DataError, WeightsError
from ..extract import build, build_descriptor, network_label
from ..formats.hdf5 import require_h5py
from ..formats.records import file_stamp, json_digest
from ..formats.store import exists, open_features
from ..image import ImageLike, load_image
from ..keypoints import detect_peaks
from ..models.classical import RawPatch
from ..names import (
    AFFINE_SHAPES,
    DESCRIPTORS,
    DETECTORS,
    EVALUATION_DESCRIPTOR,
    ORIENTATIONS,
)
from ..pyramid import DOWN_LEVELS, SCALE_STEP, UP_LEVELS, build_pyramid, level_budgets
from ..structs import Features, Keypoints
from ..weights import digest, load, load_graph
from .baselines.external import EXTERNAL_SYSTEMS, external_system, library_versions
from .baselines.opencv import OPENCV_SYSTEMS, opencv_detect

System: TypeAlias = Callable[[ImageLike], Features]

OURS = DETECTORS
#: Content-free controls: their keypoints do not depend on the image content, so their results are
#: the chance level of a metric.
CONTROLS = ("random", "lattice")
#: Networks of affine shapes.
AFFINE_NETWORKS = tuple(name for name in AFFINE_SHAPES if name != "none")
#: Allowed after an @ of a detector of ``OURS``: an extraction mode, orientation or affine shapes.
MODES = ("official", "all", "upright", "ti", *ORIENTATIONS, *AFFINE_NETWORKS)
#: Suffixes of files of features, and of these and weights files: a name with one is a path.
STORE_SUFFIXES = (".h5", ".hdf5", ".db")
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".npz", *STORE_SUFFIXES)
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
        extraction: further options of ``ExtractOptions`` for networks, such as ``down_levels``.
    """

    num_keypoints: int = 1000 * SPARE
    single_scale: bool = False
    device: str = "cpu"
    extraction: Mapping[str, Any] = field(default_factory=dict)


def system(name: str, options: Options | None = None) -> System:
    """Create the system ``name``: ``DETECTOR``, or ``DETECTOR+DESCRIPTOR`` to replace the
    detector's own descriptors.

    DESCRIPTOR is one of ``POINT_DESCRIPTORS`` or a weights file. DETECTOR is one of ``SYSTEMS``, a
    weights file (of this package or an official one), a folder of ``.kpt.npy``/``.dsc.npy`` files
    or an hloc ``.h5`` file. Networks take modes: ``NAME@official`` for the published extraction,
    ``NAME@all`` for several keypoints per location (one per scale), ``NAME@ti`` for a single scale,
    ``NAME@upright`` for patches that are not rotated, ``NAME@dominant`` and the other
    ``names.ORIENTATIONS`` for other angles, ``NAME@affnet`` and the other ``names.AFFINE_SHAPES``
    for affine shapes of patches; several as ``NAME@official@ti``. Controls take ``@ti``.
    Other detectors take ``@upright`` if a DESCRIPTOR follows: it gets the keypoints without their
    angles, those of one location and scale once.

    Raises:
        ValueError: unknown name, or a mode that the detector does not have.
        FileNotFoundError: no such file or folder.
        ImportError: a library is missing; the message names it.
    """
    options = options or Options()
    detector, _, descriptor = name.partition("+")
    if descriptor and descriptor not in POINT_DESCRIPTORS and not Path(descriptor).is_file():
        raise ValueError(
            f"descriptor must be {', '.join(POINT_DESCRIPTORS)} or a weights file, got "
            f"{descriptor!r} in {name!r}"
        )
    base, modes = split_modes(detector)
    kind = system_kind(base)
    if kind == "network":
        return _ours(base, modes, descriptor or EVALUATION_DESCRIPTOR, options)
    allowed = ("ti",) if kind == "control" else ("upright",)
    if not set(modes) <= set(allowed) or (modes == ("upright",) and descriptor in ("", "none")):
        raise ValueError(
            f"{name!r}: {base} takes only "
            + ("@ti" if kind == "control" else f"{base}@upright+DESCRIPTOR")
        )
    detect: System
    if kind == "control":
        detect = _control(base, replace(options, single_scale=options.single_scale or bool(modes)))
    elif kind == "opencv":
        detect = _opencv(base, options)
    elif kind == "external":
        detect = external_system(base, num_keypoints=options.num_keypoints, device=options.device)
    else:
        detect = from_disk(base)
    if modes and kind != "control":
        detect = _without_angles(detect)
    if descriptor == "none":
        return _without_descriptors(detect)
    return _with_patches(detect, descriptor, options) if descriptor else detect


def system_label(name: str) -> str:
    """The name of a system in tables: of weights files by their content (``network_label``), of
    stored features the last part of the path; also of files that cannot be read.
    """
    detector, plus, descriptor = name.partition("+")
    base, modes = split_modes(detector)
    network = base in OURS or (Path(base).is_file() and system_kind(base) == "network")
    try:
        base = network_label(base) if network else _last_part(base)
        described = network_label(descriptor)
    except WeightsError:
        base, described = _last_part(base), _last_part(descriptor)
    return f"{base}{''.join(f'@{mode}' for mode in modes)}{plus}{described}"


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def system_record(name: str) -> dict[str, Any]:
    """What determines the features of a system in addition to its name and options: SHA-256 of its
    weights, version of the library, or size and modification time of stored features.
    """
    detector, _, descriptor = name.partition("+")
    base, modes = split_modes(detector)
    kind, path = system_kind(base), Path(base)
    record: dict[str, Any] = {"system": name}
    if kind == "network":
        record["detector"] = digest(base)
        record["orientation"] = next((digest(m) for m in modes if m in ORIENTATIONS), None)
        record["affine"] = next((digest(m) for m in modes if m in AFFINE_NETWORKS), None)
        descriptor = descriptor or EVALUATION_DESCRIPTOR
    elif kind == "opencv":
        record["opencv"] = import_module("cv2").__version__
    elif kind == "external":
        record["libraries"] = library_versions()
    elif kind == "stored" and path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        stamps = [[str(p.relative_to(path)), file_stamp(p)] for p in files]
        record["features"] = json_digest(stamps)
    elif kind == "stored":
        journal = path.with_name(path.name + ".journal")
        record["features"] = json_digest([file_stamp(path), file_stamp(journal)])
    if descriptor:
        record["descriptor"] = digest(descriptor)
    return {key: value for key, value in record.items() if value is not None}


def system_kind(base: str) -> str:
    """What a detector without modes is: ``network``, ``control``, ``opencv``, ``external`` or
    ``stored`` (features on disk).

    Raises:
        ValueError, FileNotFoundError: as ``system``.
    """
    names = {"network": OURS, "control": CONTROLS, "opencv": OPENCV_SYSTEMS}
    for kind, known in {**names, "external": EXTERNAL_SYSTEMS}.items():
        if base in known:
            return kind
    path = Path(base)
    if path.is_dir() or (path.suffix in STORE_SUFFIXES and exists(path)):
        return "stored"
    if path.is_file():
        return "network"
    if "/" in base or path.suffix in FILE_SUFFIXES:
        raise FileNotFoundError(f"no weights file or stored features at {base}")
    raise ValueError(f"unknown system {base!r}: neither {', '.join(SYSTEMS)}, nor a file or folder")


def split_modes(detector: str) -> tuple[str, tuple[str, ...]]:
    """``NAME@MODE@MODE`` as NAME and modes; a path may contain an @.

    Raises:
        ValueError: an unknown mode.
    """
    base, modes = detector, list[str]()
    while "@" in base and not Path(base).exists():
        base, _, mode = base.rpartition("@")
        if mode not in MODES:
            raise ValueError(
                f"the mode after @ must be one of {', '.join(MODES)}; got {mode!r} in {detector!r}"
            )
        modes.insert(0, mode)
    return base, tuple(modes)


def scales(name: str, single_scale: bool) -> str:
    """How a system of a run detects scales: ``TI`` or ``SI`` as the run or its mode ``@ti`` says;
    empty for detectors with one way (OpenCV's, stored features ...), which no option changes.
    """
    base, modes = split_modes(name.partition("+")[0])
    try:
        kind = system_kind(base)
    except FileNotFoundError:  # moved since
        stored = Path(base).suffix in ("", *STORE_SUFFIXES)
        kind = "stored" if stored else "network"
    if kind not in ("network", "control"):
        return ""
    return "TI" if single_scale or "ti" in modes else "SI"


def _ours(detector: str, modes: tuple[str, ...], descriptor: str, options: Options) -> System:
    choices: dict[str, dict[str, Any]] = {
        "official": {"official": True},
        "all": {"per_scale": True},
        "upright": {"upright": True},
        "ti": {"single_scale": True},
    }
    choice = {"single_scale": options.single_scale, "per_scale": False, **PUBLISHED}
    for mode in modes:
        kind = "affine" if mode in AFFINE_NETWORKS else "orientation"
        choice |= choices.get(mode, {kind: mode})
    extraction = dict(options.extraction)
    if choice["single_scale"]:
        extraction = {k: v for k, v in extraction.items() if not k.endswith("_levels")}
    extract = build(
        detector,
        _network(descriptor),
        device=options.device,
        num_keypoints=options.num_keypoints,
        **(choice | extraction),
    ).extract
    # the published extraction returns keypoints level by level
    return lambda image: _strongest_first(extract(image))


def _network(descriptor: str) -> str | nn.Module:
    """The argument of ``build`` for a descriptor of an evaluation: a name, or a network."""
    if descriptor in DESCRIPTORS:
        return descriptor
    if Path(descriptor).suffix == ".onnx":
        return load_graph(Path(descriptor))
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
    if len(descriptor_stage.reach) > 1:
        raise ValueError(
            f"{descriptor} sees the surroundings of patches, which published patches lack; "
            "evaluate it on images"
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
        # MSER regions have equal scores: the evaluation averages over random selections of all
        limit = sys.maxsize if name == "mser" else options.num_keypoints
        keypoints, descriptors = opencv_detect(name, gray, limit)
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


def _without_angles(detect: System) -> System:
    """The keypoints of a system with angles of 0; those that differed in the angle alone once."""

    def run(source: ImageLike) -> Features:
        features = detect(source)
        points = torch.cat([features.xy, features.scale[:, None]], dim=1)
        _, which = points.unique(dim=0, return_inverse=True)
        order = torch.arange(len(points))
        first = torch.full((len(points),), len(points)).scatter_reduce(0, which, order, "amin")
        keypoints = features.keypoints[first[first < len(points)].sort().values]
        keypoints = replace(keypoints, angle=torch.zeros_like(keypoints.angle))
        return Features(keypoints, None, features.image_size)

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
            up = options.extraction.get("up_levels", UP_LEVELS)
            down = options.extraction.get("down_levels", DOWN_LEVELS)
            budgets = torch.tensor(level_budgets(10_000, up, up + 1 + down), dtype=torch.float32)
            level = (
                torch.multinomial(budgets, len(xy), replacement=True, generator=rng)
                if len(xy)
                else torch.zeros(0)
            )
            scale = SCALE_STEP ** (level.float() - up)
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
    images' paths, an hloc HDF5 file (or only its journal), or a COLMAP database.

    An image is looked up by the longest suffix of its path that exists (``graf/1.png`` before
    ``1.png``).

    Raises (when called):
        DataError: no features are stored for the image, or it was not given as a path.
    """
    path = Path(path)
    if path.suffix in (".h5", ".hdf5"):
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
