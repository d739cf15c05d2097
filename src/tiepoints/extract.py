"""Image to features: detector and descriptor on one shared pyramid.

``build("keynet", "hardnet")`` gives an ``Extractor``; its ``extract`` takes a path, PIL image, array, tensor or a list.
A score-map network becomes a detector here: levels, budget of points a level, merge (spec section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .descriptors.classical import RootSIFT
from .descriptors.desnet import DesNet, FusedDesNet, sample
from .descriptors.patchnets import PatchNet
from .detectors.keynet import KeyNet
from .detectors.keynet_legacy import LegacyDetector, LegacyKeyNet
from .detectors.rekd import REKD
from .detectors.sobelnet import SobelNet
from .geometry import sample_at
from .image import ImageLike, load_image
from .keypoints import BORDER, NMS_SHAPES, NMS_WINDOW, clear_border, local_maxima, refine, strongest
from .orientation import DominantOrientation, NetOrientation, angle_at
from .patches import HALF_SIDE, extract_patches
from .pyramid import DOWN_LEVELS, SCALE_STEP, UP_LEVELS, Level, Pyramid, as_batch, build_pyramid, level_budgets
from .structs import Features, Keypoints, PaddedFeatures
from .weights import load

#: Published default number of points (spec 2.1, PyTorch).
NUM_POINTS = 5000
MODES = ("default", "official")
SCALES = ("one", "all")
DETECTORS = ("keynet", "keynet-tiny", "rekd", "rekd-light", "sobelnet")
#: Where the angle of a point comes from; REKD's detectors measure it themselves.
ORIENTATIONS = ("none", "rekd", "rekd-light", "dominant")
PATCH_NETS = ("hardnet", "hynet", "sosnet")
DESCRIPTORS = (*PATCH_NETS, "desnet", "rootsift", "none")
#: Levels of REKD's published extraction.
REKD_UP_LEVELS, REKD_DOWN_LEVELS = 2, 5
#: Its scores are of normalised contrast, which does not fall from level to level; chosen on warped held-out photographs.
REKD_SCALE_POWER = 0.5
#: A dense network sees far more than a patch: finer levels serve it better (chosen on warped held-out photographs).
DENSE_SCALE = 0.71
#: What is taken where nobody chooses.
DETECTOR, DESCRIPTOR = "keynet", "hardnet"
PRECISIONS = ("auto", "float32", "bfloat16")
#: Two points of different levels are the same one when nearer than this, in pixels of the finer level.
DUPLICATE_DISTANCE = 3.0
#: Duplicates and masks cost points, so each level offers this much more than its budget.
SPARE = 2.0
#: Rows of distances between points held at a time.
BLOCK = 2048
#: Patches described at a time: their maps stay in a processor's cache, and memory is bounded.
DESCRIBE_CHUNK = 256


@dataclass(frozen=True)
class ExtractSettings:
    """How points are taken from score maps.

    Attributes:
        num_points: largest number of points an image.
        mode: ``default``, or ``official`` for the published extraction with its faults (docs/models.md).
        up_levels, down_levels: enlarged and reduced pyramid levels, both 0 for a single scale; None = as published for the
            network: 1 and 4, REKD's 2 and 5.
        nms_window: odd side of the suppression in pixels of the level.
        nms_shape: ``square`` as published, or ``round``; None = round for REKD, whose points should not depend on the image's turn.
        border: pixels of each level without points.
        scales: ``one`` keeps a place once, on the level where it is strongest, with a continuous scale; ``all`` keeps it on
            every level that finds it, with the level's scale: the same corner several times, for matching across large
            changes of scale. ``official`` mode always does the latter.
        threshold: least response, before it is weighted by area; the network's response to a flat image is always excluded in
            ``default`` mode.
    """

    num_points: int = NUM_POINTS
    mode: str = "default"
    up_levels: int | None = None
    down_levels: int | None = None
    nms_window: int = NMS_WINDOW
    nms_shape: str | None = None
    border: int = BORDER
    scales: str = "one"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        if self.scales not in SCALES:
            raise ValueError(f"scales must be one of {', '.join(SCALES)}; got {self.scales!r}")
        if self.num_points < 1:
            raise ValueError(f"num_points must be at least 1, got {self.num_points}")
        if self.nms_window < 1 or self.nms_window % 2 == 0:
            raise ValueError(f"nms_window must be odd and positive, got {self.nms_window}")
        if self.nms_shape not in (None, *NMS_SHAPES):
            raise ValueError(f"nms_shape must be one of {', '.join(NMS_SHAPES)}, or None for the network's; got {self.nms_shape!r}")
        if min(self.up_levels or 0, self.down_levels or 0, self.border) < 0:
            raise ValueError("up_levels, down_levels and border must not be negative")


def score_maps(net: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """A network's score map alone: of one that gives an angle map too, the first of both."""

    def scores(image: Tensor) -> Tensor:
        found = net(image)
        return found if isinstance(found, Tensor) else found[0]

    return scores


def response_floor(net: Callable[[Tensor], Tensor], device: torch.device | str = "cpu") -> float:
    """The score a network gives to an image without content, away from the border."""
    with torch.inference_mode():
        return float(score_maps(net)(torch.full((1, 1, 65, 65), 0.5, device=device))[0, 0, 32, 32])


class ScoreMapDetector:
    """A network image -> score map as a detector: pyramid -> key points of every image of the batch.

    Args:
        net: (B,1,H,W) in [0,1] -> (B,1,H,W) >= 0, or that and an angle map (B,1,H,W) in radians, which gives the points' angles.
        settings: see ``ExtractSettings``.
        device: where the floor of the network's response is measured.
        scale_power: scores of different levels are compared times the level's scale to this power.
    """

    def __init__(
        self, net: Callable[[Tensor], Any], settings: ExtractSettings, device: torch.device | str = "cpu", *, scale_power: float = 2.0
    ):
        self.net, self.settings, self.scale_power = net, settings, scale_power
        self.offset = getattr(net, "offset", (0.0, 0.0))
        self.floor = floor = response_floor(net, device) if settings.mode == "default" else 0.0
        # float noise lifts some pixels of a flat area a little above the floor
        self.threshold = max(settings.threshold, floor * (1 + 1e-3) + 1e-6 if settings.mode == "default" else 0.0)

    def __call__(self, pyramid: Pyramid, masks: Sequence[Tensor | None] | None = None) -> list[Keypoints]:
        """Points of each image; ``masks`` (H,W) bool, true where points may lie."""
        with torch.inference_mode():
            found = [self.net(level.image) for level in pyramid.levels]
        maps = [one if isinstance(one, Tensor) else one[0] for one in found]
        angles = None if isinstance(found[0], Tensor) else [one[1] for one in found]
        masks = [None] * len(pyramid.image) if masks is None else masks
        select = self._official if self.settings.mode == "official" else self._default
        return [
            select(pyramid, [m[i, 0] for m in maps], masks[i], None if angles is None else [a[i, 0] for a in angles])
            for i in range(len(pyramid.image))
        ]

    def _official(self, pyramid: Pyramid, maps: list[Tensor], mask: Tensor | None, angles: list[Tensor] | None) -> Keypoints:
        """The published selection: border cleared first, plateaus kept, whole pixels, no half-pixel term; angles of the level."""
        s = self.settings
        budgets = level_budgets(s.num_points, pyramid.original, len(maps))
        parts: list[Keypoints] = []
        asked = taken = 0
        for i, (level, score_map, budget) in enumerate(zip(pyramid.levels, maps, budgets, strict=True)):
            asked += budget
            inner = clear_border(score_map[None, None], s.border)
            found = local_maxima(inner, s.nms_window, self.threshold, unique=False)[0, 0]
            found &= _level_mask(mask, level, found)
            xy, score = strongest(inner[0, 0], found, max(0, asked - taken))
            taken += len(xy)
            ratio = xy.new_tensor([level.ratio_x, level.ratio_y], dtype=torch.float64)
            scale = torch.full_like(score, level.nominal_scale)
            angle = torch.zeros_like(score) if angles is None else angle_at(angles[i], xy)
            parts.append(Keypoints((xy * ratio).float(), scale, angle, score))
        return Keypoints.concatenate(parts)

    def _default(self, pyramid: Pyramid, maps: list[Tensor], mask: Tensor | None, angles: list[Tensor] | None) -> Keypoints:
        """Exact mapping, sub-pixel positions, one point a plateau, no duplicates across levels, strongest first."""
        s = self.settings
        budgets = level_budgets(s.num_points, pyramid.original, len(maps))
        spare = SPARE if len(maps) > 1 else 1.0
        parts: list[Keypoints] = []
        for i, (level, score_map, budget) in enumerate(zip(pyramid.levels, maps, budgets, strict=True)):
            found = local_maxima(score_map[None, None], s.nms_window, self.threshold, shape=s.nms_shape or "square")
            found = (clear_border(found.to(score_map.dtype), s.border) > 0)[0, 0]
            found &= _level_mask(mask, level, found)
            xy, score = strongest(score_map, found, int(spare * budget) + s.num_points - sum(budgets) + 1)
            refined = refine(score_map, xy)
            position = level.to_original(refined - refined.new_tensor(self.offset))
            scale = torch.full_like(score, level.scale)
            if s.scales == "one":
                scale = scale * self._persistence(pyramid, maps, i, position)
            angle = torch.zeros_like(score) if angles is None else angle_at(angles[i], refined)
            parts.append(Keypoints(position, scale, angle, score))
        rank = torch.cat([torch.arange(len(p)) for p in parts])  # place within its level
        level_of = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])
        points = Keypoints.concatenate(parts)
        kept = torch.ones(len(points), dtype=torch.bool)
        if s.scales == "one":
            kept = ~_duplicates(points, level_of.to(points.xy.device), [level.scale for level in pyramid.levels])
        # A coarse point stands for a larger area: without this weight the finest level would outnumber all others.
        area = torch.tensor([level.scale**self.scale_power for level in pyramid.levels])[level_of].to(points.score)
        points = replace(points, score=points.score * area)
        chosen = _within_budgets(level_of, kept.cpu(), budgets, s.num_points, rank, points.score.cpu())
        points = points[chosen.to(points.xy.device)]
        order = points.score.argsort(descending=True, stable=True)
        return points[order]

    def _persistence(self, pyramid: Pyramid, maps: list[Tensor], index: int, position: Tensor) -> Tensor:
        """Factors (N,) >= 1 from the scale of level ``index`` to that of each of its points (N,2).

        A corner answers alike on all levels up to the one where its surroundings interfere, and that one moves with the scale of
        the image where the strongest level hardly does (docs/diary.md). Each coarser level counts by the square root of its score
        there relative to the point's own.
        """
        own = None
        reach = torch.zeros(len(position), device=position.device)
        for level, score_map in zip(pyramid.levels[index:], maps[index:], strict=True):
            at = level.from_original(position) + position.new_tensor(self.offset)
            value = (sample_at(score_map[None, None], at[None], padding="border")[0, 0] - self.floor).clamp(min=0)
            if own is None:
                own = value.clamp(min=1e-9)
            else:
                reach = reach + (value / own).clamp(max=1).sqrt()
        return SCALE_STEP**reach


def _level_mask(mask: Tensor | None, level: Level, like: Tensor) -> Tensor:
    """``mask`` of the original image at a level: (h,w) bool."""
    if mask is None:
        return torch.ones_like(like)
    resized = F.interpolate(mask[None, None].float(), size=like.shape, mode="nearest-exact")
    return resized[0, 0].to(like.device) > 0


def _duplicates(points: Keypoints, level_of: Tensor, scales: list[float]) -> Tensor:
    """Points (N,) bool near a stronger one of any other level; ``scales`` of the levels, finest first."""
    drop = torch.zeros(len(points), dtype=torch.bool, device=points.xy.device)
    for fine, scale in enumerate(scales):
        a, b = (level_of == fine).nonzero()[:, 0], (level_of > fine).nonzero()[:, 0]
        if not len(a) or not len(b):
            continue
        for part in b.split(BLOCK):  # blocks bound the memory
            near_b, near_a = (torch.cdist(points.xy[part], points.xy[a]) < DUPLICATE_DISTANCE * scale).nonzero(as_tuple=True)
            stronger = points.score[part[near_b]] > points.score[a[near_a]]
            drop[a[near_a[stronger]]] = True
            drop[part[near_b[~stronger]]] = True
    return drop


def _within_budgets(
    level_of: Tensor, kept: Tensor, budgets: list[int], count: int, rank: Tensor, score: Tensor
) -> Tensor:
    """Indices of at most ``count`` points: each level's budget, what it leaves passed on, the rest by score."""
    chosen: list[Tensor] = []
    asked = taken = 0
    for level, budget in enumerate(budgets):
        asked += budget
        mine = ((level_of == level) & kept).nonzero()[:, 0][: max(0, asked - taken)]
        taken += len(mine)
        chosen.append(mine)
    index = torch.cat(chosen)
    rest = kept.clone()
    rest[index] = False
    spare = rest.nonzero()[:, 0]
    fill = spare[score[spare].argsort(descending=True, stable=True)[: count - len(index)]]
    return torch.cat([index, fill])


class PatchDescriptor:
    """A network of patches (N,1,P,P) -> (N,D) as a descriptor of points.

    Patches are turned by the points' angles; with ``upright`` they are not, as in REKD's published evaluation.
    """

    def __init__(self, net: Callable[[Tensor], Tensor], half_side: float = HALF_SIDE, *, upright: bool = False):
        self.net, self.half_side, self.upright = net, half_side, upright

    def __call__(self, pyramid: Pyramid, keypoints: Keypoints, index: int) -> Tensor:
        """Descriptors (N,D) of the points of image ``index`` of the batch."""
        if self.upright:
            keypoints = replace(keypoints, angle=torch.zeros_like(keypoints.angle))
        with torch.inference_mode():
            patches = extract_patches(pyramid, keypoints, index=index, half_side=self.half_side)
            return torch.cat([self.net(part) for part in patches.split(DESCRIBE_CHUNK)])


class DenseDescriptor:
    """Network image -> map (``desnet.DesNet``) as a descriptor: points are read at the level nearest to ``DENSE_SCALE`` times their scale.

    The points' angles do not matter: what a turn changes, the network has to know.
    """

    def __init__(self, net: Callable[[Tensor], Tensor], dim: int):
        self.net, self.dim = net, dim

    def __call__(self, pyramid: Pyramid, keypoints: Keypoints, index: int) -> Tensor:
        """Descriptors (N,D) of the points of image ``index`` of the batch."""
        scales = torch.tensor([level.scale for level in pyramid.levels], device=keypoints.scale.device)
        nearest = ((DENSE_SCALE * keypoints.scale).clamp(min=1e-6).log()[:, None] - scales.log()).abs().argmin(dim=1)
        out = torch.zeros(len(keypoints), self.dim, device=keypoints.xy.device)
        with torch.inference_mode():
            for i, level in enumerate(pyramid.levels):
                mine = (nearest == i).nonzero()[:, 0]
                if len(mine):
                    found = self.net(level.image[index : index + 1])
                    out[mine] = sample(found, level.from_original(keypoints.xy[mine]))
        return out


class Extractor:
    """Features of images: a detector and, optionally, a descriptor that share one pyramid.

    Args:
        detect: (pyramid, masks) -> key points of each image of the batch.
        describe: (pyramid, keypoints, index) -> (N,D), or None.
        orient: (pyramid, keypoints, index) -> angles (N,) in place of the detector's, or None.
        up_levels, down_levels: of the pyramid.
        device: where images are moved.
    """

    def __init__(
        self,
        detect: Callable[..., list[Keypoints]],
        describe: Callable[[Pyramid, Keypoints, int], Tensor] | None = None,
        *,
        orient: Callable[[Pyramid, Keypoints, int], Tensor] | None = None,
        up_levels: int = UP_LEVELS,
        down_levels: int = DOWN_LEVELS,
        device: torch.device | str = "cpu",
    ):
        self.detect, self.describe, self.orient = detect, describe, orient
        self.up_levels, self.down_levels, self.device = up_levels, down_levels, torch.device(device)

    @overload
    def extract(self, image: list[ImageLike], mask: list | None = None) -> list[Features]: ...

    @overload
    def extract(self, image: ImageLike, mask: np.ndarray | Tensor | None = None) -> Features: ...

    def extract(self, image, mask=None):
        """Features of an image, or a list of them for a list of images of any sizes.

        Args:
            image: path, PIL image, array or tensor (see ``image.load_image``), or a list of these.
            mask: (H,W), non-zero where points may lie; for a list of images a list of masks or Nones.

        Returns:
            ``Features`` in pixels of the original image, strongest first (``official`` mode: level by level), on the CPU.
        """
        if isinstance(image, list):
            masks = [None] * len(image) if mask is None else list(mask)
            if len(masks) != len(image):
                raise ValueError(f"{len(image)} images but {len(masks)} masks")
            return [self.extract(one, m) for one, m in zip(image, masks, strict=True)]
        return self._run(load_image(image), [mask])[0]

    def extract_batch(self, images: list[ImageLike], masks: list | None = None) -> PaddedFeatures:
        """Features of images of equal size at once, padded, with a ``valid`` mask (see ``PaddedFeatures``)."""
        if not images:
            raise ValueError("no images given")
        batch = as_batch([load_image(image) for image in images])
        return PaddedFeatures.pad(self._run(batch, masks or [None] * len(images)))

    def _run(self, batch: Tensor, masks: list) -> list[Features]:
        h, w = batch.shape[-2:]
        pyramid = build_pyramid(batch.to(self.device), up=self.up_levels, down=self.down_levels)
        checked = [_as_mask(mask, (h, w)) for mask in masks]
        found = self.detect(pyramid, checked)
        features = []
        for index, keypoints in enumerate(found):
            if self.orient is not None:
                keypoints = replace(keypoints, angle=self.orient(pyramid, keypoints, index))
            descriptors = None if self.describe is None else self.describe(pyramid, keypoints, index).cpu()
            features.append(Features(keypoints.to("cpu"), descriptors, (w, h)))
        return features


def _as_mask(mask: np.ndarray | Tensor | None, size: tuple[int, int]) -> Tensor | None:
    if mask is None:
        return None
    tensor = torch.as_tensor(np.ascontiguousarray(mask) if isinstance(mask, np.ndarray) else mask)
    if tuple(tensor.shape) != size:
        raise ValueError(f"mask must be (H,W) = {size} like its image, got {tuple(tensor.shape)}")
    return tensor != 0


def choose_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA, then Apple's MPS, then the CPU; other names are torch's.

    Raises:
        ValueError: the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try auto or cpu") from error


def fast_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` computes in bfloat16: a GPU, or a processor with AVX-512 BF16 or AMX; others emulate it, many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(
        getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")
    )


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device computes it faster than float32, which many processors only emulate.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {name!r}")
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    return torch.bfloat16 if fast_bfloat16(device) else torch.float32


def describer(
    descriptor: str | nn.Module | None, *, device: torch.device | str = "cpu", precision: str = "auto", upright: bool = False
) -> PatchDescriptor | DenseDescriptor | None:
    """A descriptor of points by name, or around a ``DesNet`` or a network patches -> (N,D); arguments as ``build``."""
    device = torch.device(device)
    dtype = choose_precision(precision, device)
    if descriptor is None or descriptor == "none":
        return None
    if descriptor == "rootsift":
        return PatchDescriptor(RootSIFT().to(device), upright=upright)
    if isinstance(descriptor, str):
        if descriptor not in DESCRIPTORS and not Path(descriptor).is_file():
            raise ValueError(f"descriptor must be one of {', '.join(DESCRIPTORS)}, a weights file or a network; got {descriptor!r}")
        net = load(descriptor)
    else:
        net = descriptor.eval()
    if isinstance(net, KeyNet | LegacyKeyNet | REKD | SobelNet):
        raise ValueError(f"a {type(net).__name__} describes no points; give it as the detector")
    if isinstance(net, DesNet | FusedDesNet):
        return DenseDescriptor((net.fused(dtype) if isinstance(net, DesNet) else net).to(device), net.dim)
    return PatchDescriptor(net.fused(dtype).to(device) if isinstance(net, PatchNet) else net.to(device), upright=upright)


def orienter(orientation: str | None, device: torch.device | str = "cpu") -> Callable[[Pyramid, Keypoints, int], Tensor] | None:
    """What gives points their angles, by name (``ORIENTATIONS``); None leaves the detector's.

    Raises:
        ValueError: an unknown name.
    """
    if orientation is None:
        return None
    if orientation not in ORIENTATIONS:
        raise ValueError(f"orientation must be one of {', '.join(ORIENTATIONS)}, or None for the detector's own; got {orientation!r}")
    if orientation == "none":
        return lambda pyramid, keypoints, index: torch.zeros_like(keypoints.angle)
    if orientation == "dominant":
        return DominantOrientation()
    return NetOrientation(load(orientation).fused().to(device))  # type: ignore[operator]


def build(
    detector: str | nn.Module = DETECTOR,
    descriptor: str | nn.Module | None = DESCRIPTOR,
    *,
    single_scale: bool = False,
    device: str = "auto",
    precision: str = "auto",
    orientation: str | None = None,
    upright: bool = False,
    settings: ExtractSettings | None = None,
    **options,
) -> Extractor:
    """An extractor by names: ``build("keynet", "hardnet", num_points=2000)``.

    Args:
        detector: ``keynet``, ``keynet-tiny``, ``rekd``, ``rekd-light``, ``sobelnet`` (embedded weights), or a network image -> score map.
        descriptor: ``hardnet``, ``hynet``, ``sosnet``, ``desnet`` (embedded weights), ``rootsift``, a weights file of ours, a
            ``DesNet``, a network patches -> (N,D), or ``none`` / None.
        single_scale: no pyramid (the papers' TI mode) instead of the default levels (SI).
        device: ``auto``, ``cpu``, ``cuda``, ...
        precision: of the descriptor's convolutions: ``float32``, ``bfloat16``, or ``auto`` (the faster of the two).
        orientation: where the points' angles come from: ``none``, ``rekd``, ``rekd-light``, ``dominant`` (gradient); default: from
            the detector if it measures them (REKD's), else all 0.
        upright: describe patches that are not turned by the angles; ``desnet`` never uses them.
        settings, options: ``ExtractSettings``, or its fields.

    Raises:
        ValueError: an unknown name or option value.
    """
    if isinstance(detector, str) and detector not in DETECTORS:
        raise ValueError(f"detector must be one of {', '.join(DETECTORS)} or a network; got {detector!r}")
    chosen = replace(settings or ExtractSettings(), **options)
    if single_scale:
        chosen = replace(chosen, up_levels=0, down_levels=0)
    where = choose_device(device)
    describe = describer(descriptor, device=where, precision=precision, upright=upright)
    orient = orienter(orientation, where)
    net = load(detector) if isinstance(detector, str) else detector.eval()
    if isinstance(net, PatchNet | DesNet):
        raise ValueError(f"a {type(net).__name__} finds no points; give it as the descriptor")
    if isinstance(net, REKD) and chosen.nms_shape is None and chosen.mode == "default":
        chosen = replace(chosen, nms_shape="round")
    up, down = (REKD_UP_LEVELS, REKD_DOWN_LEVELS) if isinstance(net, REKD) else (UP_LEVELS, DOWN_LEVELS)
    up, down = (default if given is None else given for given, default in ((chosen.up_levels, up), (chosen.down_levels, down)))
    runner = (net.fused() if isinstance(net, KeyNet | REKD | SobelNet) else net).to(where)
    detect: Callable[..., list[Keypoints]]
    if isinstance(net, LegacyKeyNet) and chosen.mode == "official":
        detect = LegacyDetector(
            net.to(where),
            num_points=chosen.num_points,
            up_levels=up,
            down_levels=down,
            nms_window=chosen.nms_window,
            border=chosen.border,
            threshold=chosen.threshold,
        )
    else:
        detect = ScoreMapDetector(runner, chosen, where, scale_power=REKD_SCALE_POWER if isinstance(net, REKD) else 2.0)
    return Extractor(detect, describe, orient=orient, up_levels=up, down_levels=down, device=where)
