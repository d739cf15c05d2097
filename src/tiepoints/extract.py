"""Feature extraction: a detector and a descriptor that share one pyramid.

``build("keynet-light", "hardnet-light")`` returns an ``Extractor``; its ``extract`` takes a path,
PIL image, array or tensor, or several of them. ``ExtractOptions`` holds everything that determines
the result.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .backends import candidates, check_names, run_by
from .checkpoints import load_official
from .decode import image_size
from .describe import DenseDescriptor, PatchDescriptor
from .detect import DetectOptions, ScoreMapDetector
from .device import choose_device, float_precision, processor_features
from .image import ImageLike, Notices, Reading, ReadOptions, load_image, read_image, read_mask
from .memory import check_image, keep_freed, tile_pixels
from .models.classical import RootSIFT
from .models.spec import DenseSpec, DetectorSpec, PatchSpec, ShapeSpec, StackInput, spec_of
from .names import (
    AFFINE_SHAPES,
    DESCRIPTOR,
    DESCRIPTORS,
    DETECTOR,
    DETECTORS,
    ORIENTATIONS,
    PATCH_DESCRIPTORS,
)
from .orientation import DominantOrientation, NetOrientation, upright
from .patches import PATCH_SIZE
from .pyramid import DOWN_LEVELS, MIN_SIDE, UP_LEVELS, Pyramid, build_pyramid
from .regions import TILE_PIXELS
from .structs import Features, Keypoints
from .weights import NETWORKS, digest, int8_graph, load, load_graph, passed_gate, table

logger = logging.getLogger(__name__)
Detect: TypeAlias = Callable[..., list[Keypoints]]
Describe: TypeAlias = Callable[[Pyramid, Keypoints, int], Tensor]
MaskLike: TypeAlias = str | os.PathLike | Image.Image | np.ndarray | Tensor
#: Options in settings files of earlier versions -> their present name and value.
_RENAMED: dict[str, Callable[[Any], tuple[str, Any]]] = {
    "num_points": lambda value: ("num_keypoints", value),
    "precision": lambda value: ("precision", "auto" if value == "float" else value),
    "mode": lambda value: ("official", value == "official"),
    "scales": lambda value: ("per_scale", value == "all"),
}


@dataclass(frozen=True)
class ExtractOptions(ReadOptions, DetectOptions):
    """Everything that determines the features of an image.

    Attributes:
        detector: ``keynet``, ``keynet-light``, ``keynet-tiny``, ``rekd``, ``rekd-light``,
            ``sobelnet`` (embedded weights), a weights file (ours, or an official checkpoint), or a
            network image -> score map.
        descriptor: ``hardnet``, ``hardnet-light``, ``hardnet-context``, ``hynet``, ``sosnet``,
            ``desnet`` (embedded weights), ``rootsift``, a weights file, a network patches -> (N,D),
            a ``DesNet``, or ``none`` / None.
        orientation: source of the keypoint angles: ``none``, ``rekd``, ``rekd-light``, ``dominant``
            (gradient); None = the detector if it estimates them (REKD does), else 0.
        affine: network that estimates the affine shapes in which patches are sampled: a name of
            ``names.AFFINE_SHAPES``, a weights file or an ``AffNet``; ``none`` = squares.
        upright: describe patches without rotating them by the angles, as in REKD's published
            evaluation; ``desnet`` never uses angles.
        single_scale: no pyramid (the papers' TI mode) instead of the default levels (SI).
        precision: ``float32``; ``bfloat16`` for the convolutions of networks; ``int8`` for those
            of all networks of which there is an eight-bit graph; ``auto``: ``chosen_precision``,
            else the faster of ``float32`` and ``bfloat16``.
        backend: what runs the networks: ``torch``, ``onnxruntime``, ``openvino``, or ``auto``, the
            fastest of those that are installed and need no preparation (``backends.run_by``).
        max_size: images with a longer side are reduced to this many pixels before extraction;
            positions and scales are still those of the original image. None = no limit.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        memory: bytes that the process may need, at least about ``memory.MIN_MEMORY``: large images
            are processed in smaller parts; None = parts of ``regions.TILE_PIXELS``.

    The other attributes are those of ``DetectOptions`` and ``image.ReadOptions``.

    Raises:
        ValueError: an option is out of range or contradicts another.
    """

    detector: str | nn.Module = DETECTOR
    descriptor: str | nn.Module | None = DESCRIPTOR
    orientation: str | None = None
    affine: str | nn.Module = "none"
    upright: bool = False
    single_scale: bool = False
    precision: str = "auto"
    backend: str = "auto"
    max_size: int | None = None
    device: str = "auto"
    memory: int | None = None

    def __post_init__(self) -> None:
        DetectOptions.__post_init__(self)
        ReadOptions.__post_init__(self)
        if self.single_scale and (self.up_levels or self.down_levels):
            raise ValueError(
                f"single_scale excludes pyramid levels; got up_levels={self.up_levels}, "
                f"down_levels={self.down_levels}"
            )
        if self.orientation not in (None, *ORIENTATIONS):
            raise ValueError(
                f"orientation must be one of {', '.join(ORIENTATIONS)}, or None for the detector's "
                f"own; got {self.orientation!r}"
            )
        check_names(self.backend, self.precision)
        if self.max_size is not None and self.max_size < MIN_SIDE:
            raise ValueError(f"max_size must be at least {MIN_SIDE} pixels, got {self.max_size}")
        tile_pixels(self.memory)
        roles = {"detector": DETECTORS, "descriptor": DESCRIPTORS, "affine": AFFINE_SHAPES}
        for name, known in roles.items():
            value = getattr(self, name)
            if isinstance(value, str) and value not in known and not Path(value).is_file():
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, a weights file or a network; got "
                    f"{value!r}, which is no file"
                )

    @classmethod
    def of(cls, **options: Any) -> ExtractOptions:
        """Options by name.

        Raises:
            TypeError: an unknown name; the message suggests the most similar known one.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise TypeError(f"unknown option {name!r}; {hint}")
        return cls(**options)

    def to_json(self) -> dict[str, Any]:
        """The options as a JSON object, without ``device``, ``memory`` and ``backend``, which do
        not affect the result, and with the SHA-256 of the weights files (``digests``).

        Raises:
            ValueError: an option is a network in memory, which has no name to write.
        """
        content = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("device", "memory", "backend")
        }
        content["precision"] = recorded_precision(self.chosen_precision)
        content["per_scale"] = self.keeps_scales
        for name in ("detector", "descriptor", "affine"):
            if isinstance(content[name], nn.Module):
                raise ValueError(
                    f"the {name} is a network in memory; save it with tiepoints.weights.save and "
                    "name the file"
                )
        content["descriptor"] = content["descriptor"] or "none"
        return {**content, "digests": self._digests()}

    def _digests(self) -> dict[str, str]:
        """Role -> SHA-256 of its weights file, for the roles that have one."""
        roles = ("detector", "descriptor", "orientation", "affine")
        names = {role: getattr(self, role) for role in roles}
        int8 = self.chosen_precision == "int8"
        found = {
            role: digest(name, int8=int8) for role, name in names.items() if isinstance(name, str)
        }
        return {role: value for role, value in found.items() if value is not None}

    @property
    def keeps_scales(self) -> bool:
        """``per_scale``, where None is the choice of the network."""
        if self.per_scale is not None:
            return self.per_scale
        spec = detector_spec(self.detector)
        return spec is not None and spec.per_scale

    @property
    def chosen_precision(self) -> str:
        """``precision``, where ``auto`` is ``int8`` for a detector and a descriptor whose
        eight-bit networks passed the quality gate together (``weights.passed_gate``), if a backend
        for them is installed and the processor has units for them.
        """
        names = (self.detector, self.descriptor)
        if self.precision != "auto" or self.backend == "torch" or self.official:
            return self.precision
        if not all(isinstance(name, str) for name in names) or not passed_gate(*names):  # type: ignore[arg-type]
            return self.precision
        fast = processor_features()["vnni"] and choose_device(self.device).type == "cpu"
        return "int8" if fast and candidates("", self.backend, "int8") else self.precision

    def _graph(self, role: str) -> Path | None:
        """The embedded eight-bit graph of a role, None without ``int8`` or if there is none."""
        name = getattr(self, role)
        int8 = self.chosen_precision == "int8" and isinstance(name, str)
        return int8_graph(name) if int8 else None

    def _check_int8(self) -> None:
        """Check that there is an eight-bit graph if one is asked for, and log what has none.

        Raises:
            ValueError: there is none.
        """
        if self.precision != "int8":
            return
        named = {
            role: value
            for role in ("detector", "descriptor")
            if (value := getattr(self, role)) not in (None, "none", "rootsift")
        }
        without = [
            network_label(value)
            for role, value in named.items()
            if self._graph(role) is None and Path(str(value)).suffix != ".onnx"
        ]
        if len(without) == len(named):
            raise ValueError(
                f"precision int8: there is no eight-bit graph of {' or '.join(without)}; make one "
                "with `tiepoints quantize` and name its file"
            )
        for label in without:
            logger.info("%s has no eight-bit graph and runs in float32", label)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ExtractOptions:
        """Options from the result of ``to_json``, also of earlier versions.

        Raises:
            TypeError, ValueError: unknown options, or values out of range.
        """
        options = dict(
            _RENAMED[name](value) if name in _RENAMED else (name, value)
            for name, value in content.items()
        )
        options.pop("digests", None)
        if weights := options.pop("weights", None):
            options["detector"] = weights
        return cls.of(**options)

    @property
    def described(self) -> bool:
        """Whether the features have descriptors."""
        return self.descriptor not in (None, "none")

    def resolved(self, spec: DetectorSpec) -> ExtractOptions:
        """The options with those of a detector's spec where they are None: levels, 0 with
        ``single_scale``, suppression window, border and ``per_scale``.
        """
        levels = (0, 0) if self.single_scale else (self.up_levels, self.down_levels)
        up, down = (
            default if level is None else level
            for level, default in zip(levels, (spec.up_levels, spec.down_levels), strict=True)
        )
        window, border = self.suppression(spec.nms_window, spec.border)
        # the published extraction has a square suppression window
        shape = self.nms_shape or ("square" if self.official else spec.nms_shape)
        return replace(
            self,
            single_scale=False,
            up_levels=up,
            down_levels=down,
            nms_window=window,
            border=border,
            nms_shape=shape,
            per_scale=spec.per_scale if self.per_scale is None else self.per_scale,
        )

    def build(self) -> Extractor:
        """Build the extractor, see ``build``.

        Raises:
            ValueError: the device is not available, or a network does not fit its role.
            WeightsError: a weights file is damaged or of an unknown type.
        """
        device = choose_device(self.device)
        if device.type == "cpu":
            keep_freed()
        self._check_int8()
        net = detector_network(self.detector)
        spec = spec_of(net)
        if not isinstance(spec, DetectorSpec | None):
            role = "affine" if isinstance(spec, ShapeSpec) else "descriptor"
            raise ValueError(f"a {type(net).__name__} detects no keypoints; use it as the {role}")
        known, spec = spec is not None, spec or DetectorSpec()
        options = self.resolved(spec)
        assert options.up_levels is not None
        assert options.down_levels is not None
        precision = "float32" if self.official else float_precision(self.chosen_precision, device)
        detect: Detect
        if self.official and spec.official is not None:
            detect = spec.official(net.to(device), options)
        else:
            graph = self._graph("detector")
            own = precision if known else "float32"  # of a network of the user
            detect = ScoreMapDetector(
                run_by(
                    net,
                    self.backend,
                    own if graph is None else "int8",
                    device=device,
                    graph=graph,
                ),
                options,
                device=device,
                scale_power=spec.scale_power,
                tile_pixels=tile_pixels(self.memory),
            )
        return Extractor(
            detect,
            build_descriptor(
                self.descriptor,
                device=device,
                precision=self.chosen_precision,
                backend=self.backend,
                affine=self.affine,
                # the published evaluation of REKD does not rotate patches
                upright=self.upright or (self.official and spec.angles),
                tile_pixels=tile_pixels(self.memory),
            ),
            orient=build_orientation(
                self.orientation,
                device,
                precision=precision,
                backend=self.backend,
                tile_pixels=tile_pixels(self.memory),
            ),
            up_levels=options.up_levels,
            down_levels=options.down_levels,
            max_size=self.max_size,
            device=device,
            options=self,
        )


def recorded_precision(precision: str) -> str:
    """The precision in settings: ``int8``, or ``float``, whose features agree up to rounding."""
    return "int8" if precision == "int8" else "float"


class Extractor:
    """Extracts features of images: a detector and, optionally, a descriptor share one pyramid.

    Args:
        detect: (pyramid, masks) -> keypoints of each image of the batch.
        describe: (pyramid, keypoints, index) -> (N,D), or None.
        orient: (pyramid, keypoints, index) -> angles (N,) that replace the detector's, or None.
        up_levels, down_levels: enlarged and reduced levels of the pyramid.
        max_size: larger images are reduced to this length of their longer side.
        device: where images are processed.
        options: the options it was built from, None if it was not built by ``ExtractOptions``.
    """

    def __init__(
        self,
        detect: Detect,
        describe: Describe | None = None,
        *,
        orient: Describe | None = None,
        up_levels: int = UP_LEVELS,
        down_levels: int = DOWN_LEVELS,
        max_size: int | None = None,
        device: torch.device | str = "cpu",
        options: ExtractOptions | None = None,
    ):
        self.detect, self.describe, self.orient = detect, describe, orient
        self.up_levels, self.down_levels, self.device = up_levels, down_levels, torch.device(device)
        self.max_size, self.options = max_size, options
        self.notices = Notices()

    def pyramid(self, batch: Tensor) -> Pyramid:
        """The pyramid of images (B,1,H,W) from which their features are extracted."""
        return build_pyramid(
            batch.to(self.device), up=self.up_levels, down=self.down_levels, max_size=self.max_size
        )

    def __repr__(self) -> str:
        levels = f"{self.up_levels + 1 + self.down_levels} levels, {self.device}"
        if self.options is None:
            return f"Extractor({levels})"
        names = [
            value if isinstance(value, str) else type(value).__name__
            for value in (self.options.detector, self.options.descriptor or "none")
        ]
        return (
            f"Extractor({names[0]} + {names[1]}, {self.options.num_keypoints} keypoints, {levels})"
        )

    @overload
    def extract(  # type: ignore[overload-overlap]
        self, image: ImageLike, mask: MaskLike | None = None
    ) -> Features: ...

    @overload
    def extract(
        self, image: Iterable[ImageLike], mask: Iterable[MaskLike | None] | None = None
    ) -> list[Features]: ...

    def extract(self, image, mask=None):
        """Extract the features of an image, or a list of features of several images of any sizes.

        Args:
            image: path, PIL image, array or tensor (see ``image.load_image``); or a list, tuple or
                generator of these, or a tensor (B,C,H,W) with B > 1.
            mask: path, PIL image, array or tensor (H,W), non-zero where keypoints may lie; for
                several images, one mask or None for each.

        Returns:
            ``Features`` in pixels of the original image, strongest first (``official``: level by
            level), on the CPU.

        Raises:
            FileNotFoundError, DataError, ValueError: an image or mask cannot be used.
        """
        batch = isinstance(image, Tensor) and image.ndim == 4 and len(image) != 1
        if isinstance(image, str | os.PathLike | Image.Image | np.ndarray | Tensor) and not batch:
            reading = self.read(image)
            self.notices.add(image, reading)
            self.notices.log(rotations=False)
            return self.extract_tensor(reading.pixels, [self.combine(reading, mask)])[0]
        images = list(image)
        masks = [None] * len(images) if mask is None else list(mask)
        if len(masks) != len(images):
            raise ValueError(f"{len(images)} images but {len(masks)} masks")
        return [self.extract(one, m) for one, m in zip(images, masks, strict=True)]

    def read(self, image: ImageLike) -> Reading:
        """Read an image with its mask by the options of the extractor, with ``official`` by the
        published conversion to gray (``whole_levels``); errors as ``extract``.
        """
        memory = None if self.options is None else self.options.memory
        if memory is not None and isinstance(image, str | os.PathLike):
            check_image(str(image), image_size(image), memory)
        official = self.options is not None and self.options.official
        return read_image(image, self.options, whole_levels=official)

    @staticmethod
    def combine(reading: Reading, mask: MaskLike | None) -> Tensor | None:
        """The mask (H,W) bool of an image that has been read, restricted by another."""
        given = as_mask(mask, (reading.pixels.shape[-2], reading.pixels.shape[-1]))
        own = reading.mask
        return own if given is None else given if own is None else own & given.to(own.device)

    def extract_tensor(
        self, batch: Tensor, masks: Iterable[MaskLike | None] | None = None
    ) -> list[Features]:
        """Extract the features of each image of a batch (B,1,H,W), float32 gray in [0,1]."""
        h, w = batch.shape[-2:]
        given = [None] * len(batch) if masks is None else list(masks)
        checked = [as_mask(mask, (h, w)) for mask in given]
        pyramid = self.pyramid(batch)
        features = []
        for index, keypoints in enumerate(self.detect(pyramid, checked)):
            if self.orient is not None:
                keypoints = replace(keypoints, angle=self.orient(pyramid, keypoints, index))
            descriptors = (
                None if self.describe is None else self.describe(pyramid, keypoints, index).cpu()
            )
            features.append(Features(keypoints.to("cpu"), descriptors, (w, h)))
        return features


def as_mask(mask: MaskLike | None, size: tuple[int, int]) -> Tensor | None:
    """Mask (H,W) bool, true where keypoints may lie, from a path, PIL image, array or tensor.

    Raises:
        FileNotFoundError: no file at the path.
        ValueError: the mask and its image differ in size.
    """
    if mask is None:
        return None
    if isinstance(mask, str | os.PathLike):
        tensor = read_mask(mask)
    elif isinstance(mask, Image.Image):
        tensor = load_image(mask)[0, 0]
    else:
        tensor = torch.as_tensor(
            np.ascontiguousarray(mask) if isinstance(mask, np.ndarray) else mask
        )
    shape = tuple(tensor.shape)
    if shape != tuple(size):
        rotated = "; that of the image rotated by its EXIF?" if shape == tuple(size)[::-1] else ""
        raise ValueError(f"mask must be (H,W) = {size} like its image, got {shape}{rotated}")
    return tensor != 0


def detector_network(detector: str | nn.Module) -> nn.Module:
    """The network of a detector: by name, from a weights file or official checkpoint, or as it is.

    Raises:
        WeightsError, FileNotFoundError: the file cannot be read.
    """
    if not isinstance(detector, str):
        return detector.eval()
    return load_file(detector) if detector not in DETECTORS else load(detector)


def detector_spec(detector: str | nn.Module) -> DetectorSpec | None:
    """The spec of a detector, None for a network without one.

    Raises:
        WeightsError, FileNotFoundError: the file cannot be read.
    """
    kind: Any = detector
    if isinstance(detector, str):
        if detector in DETECTORS:
            kind = NETWORKS[table()[detector]["network"]]
        else:
            status = Path(detector).stat()
            kind = _network_class(detector, status.st_size, status.st_mtime_ns)
    spec = spec_of(kind)
    return spec if isinstance(spec, DetectorSpec) else None


def load_file(path: str) -> nn.Module:
    """The network of a weights file, ours, one with an eight-bit graph, or an official
    checkpoint.
    """
    suffix = Path(path).suffix
    if suffix == ".onnx":
        return load_graph(Path(path))
    return load(path) if suffix == ".safetensors" else load_official(Path(path))


def network_label(name: str | nn.Module | None) -> str:
    """Name of a detector or descriptor in captions, tables and names of folders.

    That of a weights file follows from what it contains: the type of its network, in lower case
    (``sobelnet``), followed by the name of the file without suffix unless that is the same
    (``sobelnet.mine`` for ``mine.safetensors``). Other names are returned unchanged.

    Raises:
        WeightsError: a weights file is damaged or of an unknown type.
    """
    if name is None:
        return "none"
    if isinstance(name, nn.Module):
        return type(name).__name__.lower()
    path = Path(name)
    if name in (*DETECTORS, *DESCRIPTORS) or not path.is_file():
        return name
    status = path.stat()
    kind = _network_type(name, status.st_size, status.st_mtime_ns)
    return kind if path.stem == kind else f"{kind}.{path.stem}"


@lru_cache
def _network_class(path: str, size: int, mtime_ns: int) -> type[nn.Module]:
    return type(load_file(path))


def _network_type(path: str, size: int, mtime_ns: int) -> str:
    name = _network_class(path, size, mtime_ns).__name__
    return name.lower().removeprefix("legacy").removeprefix("fused")


def build_descriptor(
    descriptor: str | nn.Module | None,
    *,
    device: torch.device | str = "cpu",
    precision: str = "auto",
    backend: str = "auto",
    affine: str | nn.Module = "none",
    upright: bool = False,
    tile_pixels: int = TILE_PIXELS,
) -> PatchDescriptor | DenseDescriptor | None:
    """A descriptor by name or from a network; arguments as in ``ExtractOptions`` and
    ``DenseDescriptor``.

    Raises:
        ValueError: a network does not fit its role, or affine shapes without a patch descriptor.
        WeightsError: a weights file is damaged or of an unknown type.
    """
    device = torch.device(device)
    chosen = float_precision(precision, device)
    if descriptor is None or descriptor == "none":
        _check_patches(affine, "without a descriptor there are none")
        return None
    shape_net = build_shapes(affine, device, precision=chosen, backend=backend)
    if descriptor == "rootsift":
        return PatchDescriptor(RootSIFT().to(device), upright=upright, shape_net=shape_net)
    graph = None
    if isinstance(descriptor, str):
        graph = int8_graph(descriptor) if precision == "int8" else None
        net = load_file(descriptor) if Path(descriptor).suffix == ".onnx" else load(descriptor)
    else:
        net = descriptor.eval()
    spec = spec_of(net)
    if isinstance(spec, DetectorSpec | ShapeSpec):
        role = "detector" if isinstance(spec, DetectorSpec) else "affine"
        raise ValueError(f"a {type(net).__name__} has no descriptors; use it as the {role}")
    if isinstance(spec, DenseSpec):
        _check_patches(affine, f"a {type(net).__name__} describes the whole image")
    if not isinstance(spec, DenseSpec | PatchSpec):  # a network of the user
        chosen = "float32"
    reach = spec.reach if isinstance(spec, PatchSpec) else (1.0,)
    run = run_by(
        net,
        backend,
        chosen if graph is None else "int8",
        device=device,
        graph=graph,
        inputs=StackInput(
            channels=len(reach), side=None if isinstance(spec, DenseSpec) else PATCH_SIZE
        ),
    )
    if isinstance(spec, DenseSpec):
        return DenseDescriptor(run, net.dim, tile_pixels=tile_pixels)  # type: ignore[arg-type]
    return PatchDescriptor(run, reach=reach, upright=upright, shape_net=shape_net)


def _check_patches(affine: str | nn.Module, reason: str) -> None:
    """Refuse affine shapes.

    Raises:
        ValueError: there are some.
    """
    if affine != "none":
        raise ValueError(
            f"affine shapes are those of patches, and {reason}; use a patch descriptor "
            f"({', '.join(PATCH_DESCRIPTORS)}, rootsift), or affine none"
        )


def build_shapes(
    affine: str | nn.Module,
    device: torch.device | str = "cpu",
    *,
    precision: str = "float32",
    backend: str = "auto",
) -> nn.Module | None:
    """A network patches (N,1,P,P) -> affine shapes (N,2,2) by name, from a weights file, or as it
    is; None for ``none``.

    Raises:
        ValueError: another network.
        WeightsError: the file is damaged.
    """
    if affine == "none":
        return None
    net = load(affine) if isinstance(affine, str) else affine.eval()
    if not isinstance(spec_of(net), ShapeSpec):
        raise ValueError(f"a {type(net).__name__} estimates no affine shapes; give an AffNet")
    return run_by(net, backend, precision, device=device)


def build_orientation(
    orientation: str | None,
    device: torch.device | str = "cpu",
    *,
    precision: str = "float32",
    backend: str = "auto",
    tile_pixels: int = TILE_PIXELS,
) -> Describe | None:
    """An orientation estimator by name (``names.ORIENTATIONS``); None keeps the detector's
    angles.
    """
    if orientation is None:
        return None
    if orientation == "none":
        return upright
    if orientation == "dominant":
        return DominantOrientation()
    net = run_by(load(orientation), backend, precision, device=device)
    return NetOrientation(net, tile_pixels=tile_pixels)  # type: ignore[arg-type]


def build(
    detector: str | nn.Module = DETECTOR,
    descriptor: str | nn.Module | None = DESCRIPTOR,
    **options: Any,
) -> Extractor:
    """Build an extractor by names: ``build("keynet-light", "hardnet", num_keypoints=2000)``.

    On a CPU, the process keeps up to 256 MiB of freed memory from then on (``memory.keep_freed``),
    which saves a tenth to a fifth of the time of each image.

    Args:
        detector, descriptor, options: see ``ExtractOptions``.

    Raises:
        TypeError: an unknown option; the message suggests the most similar known one.
        ValueError: an unknown name or an option out of range.
    """
    return ExtractOptions.of(detector=detector, descriptor=descriptor, **options).build()
