"""One function per published model: its data, loss and schedule, and the presets the command line offers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..descriptors.desnet import DesNet, sample
from ..descriptors.patchnets import HardNet, HyNet, PatchNet, SOSNet
from ..detectors.keynet import KeyNet
from ..detectors.rekd import REKD, histogram_angle
from ..detectors.sobelnet import SobelNet
from ..errors import DataError, WeightsError
from ..evaluation.anchoring import percentiles
from ..evaluation.bias import constant_offset
from ..evaluation.metrics import orientation_errors, repeated_points
from ..extract import DenseDescriptor, ExtractSettings, ScoreMapDetector, build, score_maps
from ..image import load_image
from ..keypoints import NMS_WINDOW, detect_peaks, round_max_filter
from ..matching import match
from ..orientation import angle_at
from ..patches import extract_patches
from ..pyramid import build_pyramid
from ..structs import Features
from ..weights import load, save, weights_checksum
from .candidates import CandidatePairs
from .loop import FitResult, FitSettings, Loss, fit
from .losses import (
    BORDER,
    beside_structure,
    circle_loss,
    gaussian_loss,
    hardnet_loss,
    hynet_loss,
    msip_loss,
    orientation_loss,
    sosnet_loss,
)
from .pairs import PairFile
from .patchdata import PatchPairs, matching_checks, matching_score, mean_of_known, peaks_of, rightly_matched
from .patchsets import PatchBatches, PatchSet, open_hpatches, open_phototour
from .shapes import WithShapes
from .synthetic import PRESETS, PairDataset, list_photos, split_photos, usable_photos
from .tracks import Mixture, TrackCrops, TrackPatches, TrackScene, correct_share, posed_pairs, read_scenes

#: A folder of images, or several.
Folders: TypeAlias = str | Path | Sequence[str | Path]

#: Validation: seed of the pairs of held-out photographs, how many points of each are compared, and in degrees what turn is right.
VALIDATION_SEED = 7
VALIDATION_POINTS = 150
TURNED_POINTS = 75  # about half of the maxima of a smaller view
RIGHT_TURN = 15.0


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained.

    Attributes:
        pairs: name of the pair preset (``synthetic.PRESETS``).
        fit: schedule (``loop.FitSettings``).
        kind: what places points: ``msip`` or ``gaussian``.
        loss: options of ``losses.msip_loss``, or of ``losses.gaussian_loss``.
        structure: of the network (``KeyNet``).
        beside: weight of ``losses.beside_structure``, with ``msip``.
        anchored: pairs have anchors (``shapes.WithShapes``). Gaussian loss: only peaks on structure count (``losses.anchor_weight``).
        shapes, pull: of ``shapes.WithShapes``, where ``anchored``.
        balance: weight of the orientation loss, where there is one (REKD: 100).
        checks, check_pairs, check_size: validation: pair preset, number and side of pairs of held-out photographs.
    """

    pairs: str = "default"
    fit: FitSettings = field(default_factory=FitSettings)
    kind: str = "msip"
    loss: dict[str, Any] = field(default_factory=lambda: {"visibility": "half", "factor": 500.0})
    structure: float = 0.0
    beside: float = 0.0
    anchored: bool = False
    shapes: float = 0.0
    pull: float = 0.0
    balance: float = 0.0
    checks: str = "default"
    check_pairs: int = 60
    check_size: int = 320


#: Key.Net on structure: M-SIP, scores times the fourth root of corner strength, a price on peaks beside structure (docs/training.md).
_ON_STRUCTURE = Recipe(
    pairs="layers", fit=FitSettings(learning_rate=1.5e-3, average=0.98, validate_every=50), structure=0.25, beside=150.0, anchored=True,
    checks="layers",
)  # fmt: skip
RECIPES: dict[str, Recipe] = {
    "default": _ON_STRUCTURE,
    # Keypoints on the very corner, by SobelNet's loss and drawn shapes; fewer repeat (docs/diary.md).
    "corners": Recipe(
        pairs="layers", fit=FitSettings(learning_rate=5e-3, validate_every=50), kind="gaussian", loss={}, anchored=True, shapes=0.2,
        pull=1.0, checks="layers",
    ),
    "msip": Recipe(),
    # Paper 5.3 (batch 32, Adam 1e-3 halved after 30 of 45 epochs of 9,000 pairs, here a cosine); loss of its TensorFlow code.
    "paper": Recipe(
        pairs="keynet-paper",
        fit=FitSettings(steps=12_700, batch_size=32, learning_rate=1e-3, clip=0.0, average=0.0, validate_every=500),
        loss={"weighting": "softmax", "visibility": "any", "empty": "ignore"},
    ),
    # A look at whether one's own images train at all.
    "quick": dataclasses.replace(_ON_STRUCTURE, fit=dataclasses.replace(_ON_STRUCTURE.fit, learning_rate=3e-3, steps=150)),
}
#: Tiny-Key.Net lies on structure by Key.Net's published loss already; it has few parameters and takes larger steps.
_TINY = Recipe(fit=FitSettings(learning_rate=2e-2))
TINY_RECIPES: dict[str, Recipe] = {
    "default": _TINY,
    "msip": _TINY,
    "paper": RECIPES["paper"],
    "quick": dataclasses.replace(_TINY, fit=dataclasses.replace(_TINY.fit, steps=300, validate_every=100)),
}
#: SobelNet's paper says no schedule; ``default`` is its Gaussian loss, ``msip`` Key.Net's for comparison.
SOBELNET_RECIPES: dict[str, Recipe] = {
    "default": Recipe(fit=FitSettings(learning_rate=5e-3, validate_every=25), kind="gaussian", loss={}),
    "msip": Recipe(fit=FitSettings(validate_every=25)),
    "quick": Recipe(fit=FitSettings(learning_rate=5e-3, steps=150, validate_every=50), kind="gaussian", loss={}),
}


MODELS: dict[str, Callable[[], KeyNet | SobelNet]] = {"keynet": KeyNet, "keynet-tiny": KeyNet.tiny, "sobelnet": SobelNet}
#: The published size, and one that costs a ninth.
REKD_SIZES: dict[str, dict[str, Any]] = {"rekd": {"group": 36, "dims": (2, 2, 2)}, "rekd-light": {"group": 12, "dims": (2, 2, 2)}}
#: Its maps of all orientations are large: fewer and smaller pairs to validate on.
_OURS = Recipe(
    pairs="turns", fit=FitSettings(batch_size=4, learning_rate=3e-3, warmup=25, average=0.97, validate_every=50),
    loss={"visibility": "half", "factor": 100.0}, balance=600.0, checks="turns", check_pairs=30, check_size=256,
)  # fmt: skip
REKD_RECIPES: dict[str, Recipe] = {
    "default": _OURS,
    # Released code: 20 epochs of 9,000 pairs, Adam 1e-3, halved once after ten, decay 0.1 on everything; its cut angles are mended.
    "paper": dataclasses.replace(
        _OURS,
        pairs="rekd",
        balance=100.0,
        fit=FitSettings(
            steps=11_240, batch_size=16, learning_rate=1e-3, warmup=0, decay="step", final_rate=0.5, weight_decay=0.1, clip=0.0,
            average=0.0, validate_every=562,
        ),
        loss={"weighting": "minmax", "visibility": "any", "empty": "zero", "detach_max": False},
    ),
    "quick": dataclasses.replace(_OURS, fit=dataclasses.replace(_OURS.fit, steps=100)),
}  # fmt: skip


class UncentredNorm(nn.BatchNorm2d):
    """Batch normalisation that divides by the deviation and moves nothing; afterwards an ordinary one with mean and bias 0."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,C,H,W)."""
        assert self.running_var is not None
        if self.training:
            variance = maps.var(dim=(0, 2, 3), correction=0)
            with torch.no_grad():
                self.running_var.lerp_(variance.detach().to(self.running_var), self.momentum or 0.1)
        else:
            variance = self.running_var
        factor = self.weight * (variance + self.eps).rsqrt()
        return maps * factor.view(1, -1, 1, 1)


def floored_tiny() -> KeyNet:
    """Tiny-Key.Net that gives an image without content the score 0, whatever its filter learns.

    Its one ReLU is also its output. Left free, M-SIP moves the bias down until weak corners are cut off, where no point
    can be found. The state is that of ``KeyNet.tiny()``.
    """
    net = KeyNet.tiny()
    block = cast(nn.Sequential, net.blocks[0])
    block[1] = UncentredNorm(1)
    cast(nn.Conv2d, block[0]).bias.requires_grad_(False)  # type: ignore[union-attr]
    block[1].bias.requires_grad_(False)
    return net


def validation_score(net: nn.Module, pairs: list[dict[str, Tensor]]) -> float:
    """Mean 3 px mutual repeatability of a score-map network (in eval mode) on pairs of equal size, of keypoints on structure alone.

    A repeated keypoint counts if its pixels lie above the median of their images by ``filters.corner_strength``: what lies beside
    structure moves with a plane as well as a corner does, but not with a scene. Repeated keypoints are divided by
    ``VALIDATION_POINTS``, not by the keypoints found: a network must not gain by finding few.
    """
    scores = []
    device = next(net.parameters()).device
    for pair in pairs:
        both = torch.stack([pair["image_a"], pair["image_b"]]).to(device, memory_format=torch.channels_last)
        (xy_a, _), (xy_b, _) = detect_peaks(net(both).float().cpu(), 1000)
        size = tuple(pair["image_a"].shape[-2:])
        xy_a, xy_b = (xy[_pixels(pair[f"mask_{side}"][0], xy) > 0] for side, xy in (("a", xy_a), ("b", xy_b)))
        a, b = repeated_points(xy_a, xy_b, pair["H_ab"], size, size, num_points=VALIDATION_POINTS)  # type: ignore[arg-type]
        on_structure = torch.minimum(percentiles(pair["image_a"][None], xy_a[a]), percentiles(pair["image_b"][None], xy_b[b])) > 0.5
        scores.append(int(on_structure.sum()) / VALIDATION_POINTS)
    return float(np.mean(scores)) if scores else 0.0


def _pixels(image: Tensor, xy: Tensor) -> Tensor:
    """Values (N,) of an image (H,W) at the pixels nearest to points (N,2) inside it."""
    index = xy.round().long()
    return image[index[:, 1], index[:, 0]]


def oriented_score(net: nn.Module, pairs: list[dict[str, Tensor]]) -> float:
    """As ``validation_score`` for a network with orientation: repeated points whose turn is right within 15 degrees."""
    scores = []
    device = next(net.parameters()).device
    for pair in pairs:
        both = torch.stack([pair["image_a"], pair["image_b"]]).to(device, memory_format=torch.channels_last)
        score, histogram = net(both)
        angle = histogram_angle(histogram.float()).cpu()
        (xy_a, _), (xy_b, _) = detect_peaks(score.float().cpu(), 1000, shape="round")
        size = tuple(pair["image_a"].shape[-2:])
        a, b = repeated_points(xy_a, xy_b, pair["H_ab"], size, size, num_points=TURNED_POINTS)  # type: ignore[arg-type]
        angle_a, angle_b = angle_at(angle[0, 0], xy_a[a]), angle_at(angle[1, 0], xy_b[b])
        right = orientation_errors(xy_a[a], angle_a, angle_b, pair["H_ab"]) <= RIGHT_TURN
        scores.append(int(right.sum()) / TURNED_POINTS)
    return float(np.mean(scores)) if scores else 0.0


def _place(out: str | Path) -> Path:
    """Where the weights go.

    Raises:
        FileNotFoundError: its folder is not there.
    """
    out = Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent} to write {out.name} into")
    return out


def _given(overrides: dict[str, Any]) -> dict[str, Any]:
    """What the caller chose himself; minutes count only where the preset's steps do not."""
    given = {k: v for k, v in overrides.items() if v is not None}
    if given.get("minutes") is not None and "steps" not in given:
        given["steps"] = 0
    return given


def _photographs(
    images: Folders, validation: Folders | None, say: Callable[[str], None]
) -> tuple[list[Path], list[Path]]:
    """Photographs to train on and to validate on: those of ``validation``, or a tenth of ``images``. What cannot be used is named."""

    def usable(folders: Folders) -> list[Path]:
        given = [folders] if isinstance(folders, str | Path) else list(folders)
        photos, refused = usable_photos([photo for folder in given for photo in list_photos(folder)])
        for line in refused[:10]:
            say(f"left out: {line}")
        if len(refused) > 10:
            say(f"left out: {len(refused) - 10} more images")
        return photos

    if validation:
        training, held_out = usable(images), usable(validation)
        if not training or not held_out:
            raise DataError(f"no usable images in {images if not training else validation}")
        both = {path.resolve() for path in training} & {path.resolve() for path in held_out}
        if both:
            raise DataError(f"{min(both)} is among the images to train on and to validate on; give disjoint folders")
    else:
        training, held_out = split_photos(usable(images))
    say(f"{len(training)} photographs to train on, {len(held_out)} to validate on")
    return training, held_out


def train_detector(
    model: str,
    images: Folders,
    out: str | Path,
    *,
    preset: str = "default",
    pairs: str | Path | None = None,
    init: str | Path | None = None,
    validation: Folders | None = None,
    device: str = "auto",
    devices: int = 1,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
    **overrides: Any,
) -> FitResult:
    """Train ``keynet``, ``keynet-tiny`` or ``sobelnet`` on a folder of images and write the weights that validated best to ``out``.

    A tenth of the photographs is held out for validation, always the same one. Beside ``out`` stand
    ``<out>.checkpoint`` (to resume from) and ``<out>.log/`` (CSV and TensorBoard).

    Args:
        images: a folder of photographs, searched to the bottom, or several.
        validation: folders of other photographs to validate on instead of a tenth of ``images``.
        preset: a key of ``RECIPES`` (keynet), ``TINY_RECIPES`` or ``SOBELNET_RECIPES``.
        pairs: file of ``tiepoints pairs`` to train on instead of pairs made on the fly.
        init: weights to start from (a name or a file), of a network with the same layers.
        overrides: fields of ``FitSettings``; ``None`` leaves the preset's value.

    Raises:
        FileNotFoundError, DataError: no folder, or fewer than two usable images.
        ValueError: unknown model or preset.
        WeightsError: ``init`` names no weights, or those of another network.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; got {model!r}")
    recipe = _recipe({"keynet": RECIPES, "keynet-tiny": TINY_RECIPES, "sobelnet": SOBELNET_RECIPES}[model], preset)
    given = _given(overrides)

    def make() -> KeyNet | SobelNet:
        # of the Gaussian loss a map of zeros is a perfect answer, which ReLU does not leave again
        if model == "keynet":
            return KeyNet(score="softplus" if recipe.kind == "gaussian" else "relu", structure=recipe.structure)
        return MODELS[model]()

    start = None if init is None else load(init)

    def begin() -> nn.Module:
        net = floored_tiny() if model == "keynet-tiny" and preset != "paper" else make()
        if start is not None:
            mine, theirs = ({key: value.shape for key, value in n.state_dict().items()} for n in (net, start))
            if mine != theirs:
                raise WeightsError(f"weights {init} have other layers than {model}; start from weights of its own kind")
            net.load_state_dict(start.state_dict())
        return net

    if pairs is not None and recipe.anchored:
        say("pairs of a file have no anchors: every repeated peak counts")

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        score_a, score_b = network(_both_views(batch)).float().chunk(2)
        masks: dict[str, Any] = {key: batch[key] for key in ("mask_a", "mask_b")}
        if recipe.kind == "gaussian":
            anchors: dict[str, Any] = {key: batch[key] for key in ("anchor_a", "anchor_b", "target_a", "target_b") if key in batch}
            return gaussian_loss(score_a, score_b, batch["H_ab"], **recipe.loss, **masks, **anchors)
        total, numbers = msip_loss(score_a, score_b, batch["H_ab"], **recipe.loss, **masks)
        if recipe.beside and "anchor_a" in batch:
            sides = ((score_a, "a"), (score_b, "b"))
            each = [beside_structure(score, batch[f"anchor_{side}"], batch[f"mask_{side}"]) for score, side in sides]
            beside = (each[0] + each[1]) / 2
            total = total + recipe.beside * beside
            numbers = {**numbers, "loss": total.item(), "beside": beside.item()}
        return total, numbers

    return _train_score_map(
        images, out, dataclasses.replace(recipe, fit=dataclasses.replace(recipe.fit, **given)),
        begin, make, loss, validation_score,
        told={"model": model, "preset": preset, "init": Path(init or "").name}, pairs=pairs, validation=validation, device=device,
        devices=devices, resume=resume, progress=progress, say=say,
    )  # fmt: skip


def train_rekd(
    model: str,
    images: Folders,
    out: str | Path,
    *,
    group_size: int | None = None,
    dims: tuple[int, int, int] | None = None,
    init: str | Path | None = None,
    preset: str = "default",
    pairs: str | Path | None = None,
    validation: Folders | None = None,
    device: str = "auto",
    devices: int = 1,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
    **overrides: Any,
) -> FitResult:
    """Train ``rekd`` or ``rekd-light``; arguments, files and guarantees as ``train_detector``.

    Args:
        group_size, dims: of the network; default the model's own (``REKD_SIZES``).
        init: weights to start from (a name or a file); of another group size they are interpolated (``REKD.regrouped``).
        preset: ``default``, ``paper`` or ``quick`` (``REKD_RECIPES``).

    Raises:
        FileNotFoundError, DataError: no folder, or fewer than two usable images.
        ValueError: unknown model or preset, an impossible size, or pairs that are mirrored (``orientation_loss``).
        WeightsError: ``init`` names no weights, or those of another network.
    """
    if model not in REKD_SIZES:
        raise ValueError(f"model must be one of {', '.join(REKD_SIZES)}; got {model!r}")
    recipe = _recipe(REKD_RECIPES, preset)
    group = REKD_SIZES[model]["group"] if group_size is None else group_size
    start = None if init is None else load(init)
    if start is not None and not isinstance(start, REKD):
        raise WeightsError(f"weights {init} are a {type(start).__name__}; this training starts from a REKD")
    if start is not None and dims is not None and list(dims) != start.settings["dims"]:
        raise WeightsError(f"weights {init} have dims {start.settings['dims']}, not {list(dims)}; leave --dims out or start from others")
    # what is not asked for stays as in the weights to start from: an imported network goes on as it was published
    settings = {"dims": REKD_SIZES[model]["dims"] if dims is None else dims} if start is None else start.settings
    settings = {**settings, "group": group}

    def fresh() -> REKD:
        return REKD(**settings)

    def begin() -> REKD:
        if start is None:
            return fresh()
        say(f"starting from {init}, {start.group} orientations")
        return (start if start.group == group else start.regrouped(group)).train()

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        scores, histograms = network(_both_views(batch))
        score_a, score_b = scores.float().chunk(2)
        place, numbers = msip_loss(score_a, score_b, batch["H_ab"], mask_a=batch["mask_a"], mask_b=batch["mask_b"], **recipe.loss)
        histogram_a, histogram_b = histograms.float().chunk(2)
        seen = batch["mask_a"] * peakedness(score_a.detach())
        turn, more = orientation_loss(histogram_a, histogram_b, batch["H_ab"], mask_a=seen, border=BORDER)
        total = place + recipe.balance * turn
        return total, {**numbers, "loss": total.item(), "place": place.item(), "orientation": turn.item(), "agree": more["agree"]}

    told = {"model": model, "preset": preset, "group": group, "dims": list(settings["dims"]), "init": Path(init or "").name}
    return _train_score_map(
        images, out, dataclasses.replace(recipe, fit=dataclasses.replace(recipe.fit, **_given(overrides))),
        begin, fresh, loss, oriented_score,
        told=told, pairs=pairs, validation=validation, device=device, devices=devices, resume=resume, progress=progress, say=say,
    )  # fmt: skip


def peakedness(score: Tensor) -> Tensor:
    """How near the pixels of a score map (B,1,H,W) come to being key points: (score / largest score around)^4, 0..1.

    The orientation loss counts pixels by it: what a histogram says where no key point can be does not matter.
    """
    return (score / round_max_filter(score, NMS_WINDOW).clamp(min=1e-9)) ** 4


def _recipe(recipes: dict[str, Recipe], preset: str) -> Recipe:
    if preset not in recipes:
        raise ValueError(f"preset must be one of {', '.join(recipes)}; got {preset!r}")
    return recipes[preset]


def _both_views(batch: dict[str, Tensor]) -> Tensor:
    """Both images of every pair, (2B,1,S,S), those of a first."""
    return torch.cat([batch["image_a"], batch["image_b"]]).contiguous(memory_format=torch.channels_last)


def _train_score_map(
    images: Folders,
    out: str | Path,
    recipe: Recipe,
    begin: Callable[[], nn.Module],
    fresh: Callable[[], nn.Module],
    loss: Loss,
    score: Callable[[nn.Module, list[dict[str, Tensor]]], float],
    *,
    told: dict[str, Any],
    pairs: str | Path | None,
    validation: Folders | None,
    device: str,
    devices: int,
    resume: bool,
    progress: bool,
    say: Callable[[str], None],
) -> FitResult:
    """Pairs of photographs, validation, files: what the training of every score-map network shares.

    Args:
        begin, fresh: make the network that is trained, and the one that is written.
        loss, score: of a batch, and of the held-out pairs.
        told: what identifies the training beside its schedule.
    """
    out = _place(out)
    schedule = recipe.fit
    training, held_out = _photographs(images, validation, say)

    def make_batches(length: int) -> Dataset:
        if pairs is not None:
            return PairFile(pairs, length=length, seed=schedule.seed)
        dataset = PairDataset(training, PRESETS[recipe.pairs], seed=schedule.seed, length=length)
        return WithShapes(dataset, recipe.shapes, pull=recipe.pull, seed=schedule.seed) if recipe.anchored else dataset

    make_batches(1)[0]  # a folder without any texture is found out before the training starts
    views = dataclasses.replace(PRESETS[recipe.checks], size=recipe.check_size)
    checks = PairDataset(held_out, views, seed=VALIDATION_SEED, length=recipe.check_pairs)
    held_out_pairs = [checks[i] for i in range(len(checks))]

    with torch.random.fork_rng():
        torch.manual_seed(schedule.seed)
        net = begin()
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def keep(state: dict[str, Tensor], facts: dict[str, Any]) -> None:
        best: Any = fresh()
        best.load_state_dict(state)
        finder = best.eval().fused() if isinstance(best, REKD | SobelNet) else best.eval()
        best.offset = constant_offset(score_maps(finder), (pair["image_a"][None] for pair in held_out_pairs))
        save(best, out, {**told, "schedule": asdict(schedule), **facts})

    result = fit(
        net,
        make_batches,
        loss,
        lambda network: score(network, held_out_pairs),
        schedule,
        out.with_name(out.name + ".checkpoint"),
        log_dir=out.with_name(out.name + ".log"),
        resume=resume,
        device=device,
        devices=devices,
        progress=progress,
        # Which photographs took part is part of the training's identity: resuming on others would silently mix two.
        extra={**told, "photos": len(training) + len(held_out), "pairs": str(pairs or "")},
        on_best=keep,
    )
    if result.best <= 0:
        say("the network scores nothing on the held-out photographs; train again with another --seed or a lower --learning-rate")
    return result


@dataclass(frozen=True)
class PatchRecipe:
    """How a patch descriptor is trained.

    Attributes:
        fit: schedule; ``batch_size`` counts views of ``PatchSettings.per_view`` pairs each, of ``PatchBatches`` whole batches.
        dropout: of the network, before its last convolution.
        pairs, augment: of ``PatchBatches``, where published patches are trained on.
    """

    fit: FitSettings
    dropout: float = 0.1
    pairs: int = 1024
    augment: str = "fliprot"


DESCRIPTORS: dict[str, type[PatchNet]] = {"hardnet": HardNet, "hynet": HyNet, "sosnet": SOSNet}
#: Eight views of 48 pairs a step: 384 pairs, each with 47 negatives of its own view.
PATCH_FIT = FitSettings(batch_size=8, learning_rate=2e-3, warmup=30, clip=0.0, average=0.99, validate_every=100)
#: One item is a whole batch of published patches. HardNet: 10 epochs of 5 million pairs, SGD from 10 (sic) along a line to 0.
_HARDNET = FitSettings(
    steps=48_830, batch_size=1, optimiser="sgd", learning_rate=10.0, warmup=0, decay="linear", final_rate=0.0, weight_decay=1e-4,
    clip=0.0, average=0.0, validate_every=2_000,
)  # fmt: skip
#: 200 epochs of Liberty, Adam at a constant rate. SOSNet's authors published no training; HyNet's repository has its loss.
_HYNET = FitSettings(
    steps=88_000, batch_size=1, learning_rate=1e-2, warmup=0, final_rate=1.0, weight_decay=0.0, clip=0.0, average=0.0, validate_every=2_000
)
PATCH_RECIPES: dict[str, dict[str, PatchRecipe]] = {
    "default": dict.fromkeys(DESCRIPTORS, PatchRecipe(PATCH_FIT)),
    "quick": dict.fromkeys(DESCRIPTORS, PatchRecipe(dataclasses.replace(PATCH_FIT, steps=100, validate_every=50))),
    "paper": {
        "hardnet": PatchRecipe(_HARDNET, dropout=0.3),
        "hynet": PatchRecipe(_HYNET, dropout=0.3, pairs=512, augment="turns"),
        "sosnet": PatchRecipe(_HYNET, dropout=0.1, pairs=512, augment="turns"),
    },
}
#: Validation: pairs of views of held-out photographs, their side, and points looked for in each.
MATCHING_PAIRS = 24
MATCHING_SIZE = 320
MATCHING_POINTS = 200
#: Share of the pairs that come from reconstructions, where some are given, and keypoints looked for in each of their images.
TRACK_SHARE = 0.5
TRACK_KEYPOINTS = 1500
#: Validation on reconstructions: pairs of views and keypoints of each image.
POSED_PAIRS = 24
POSED_POINTS = 500
#: Few photographs give no more than this many pairs of views each.
VIEWS_PER_PHOTO = 4


def descriptor_loss(model: str, net: nn.Module, anchor: Tensor, positive: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The published loss of ``model`` on patches (N,1,P,P) of N places, both views passed through the net at once."""
    both = torch.cat([anchor, positive])
    if model == "hynet":
        return hynet_loss(*net(both, raw=True).float().chunk(2))
    return (sosnet_loss if model == "sosnet" else hardnet_loss)(*net(both).float().chunk(2))


def open_patches(folder: str | Path) -> list[PatchSet]:
    """Published patches of a folder: a PhotoTour set, a folder of such sets, or HPatches' sequences.

    Raises:
        FileNotFoundError, DataError: see ``patchsets``.
    """
    folder = Path(folder)
    if (folder / "info.txt").is_file():
        return [open_phototour(folder)]
    tours = sorted(path.parent for path in folder.glob("*/info.txt"))
    return [open_phototour(tour) for tour in tours] if tours else open_hpatches(folder)


def train_descriptor(
    model: str,
    images: Folders,
    out: str | Path,
    *,
    preset: str = "default",
    patches: str | Path | None = None,
    reconstructions: Folders | None = None,
    validation_reconstructions: Folders | None = None,
    init: str | Path | None = None,
    validation: Folders | None = None,
    device: str = "auto",
    devices: int = 1,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
    **overrides: Any,
) -> FitResult:
    """Train ``hardnet``, ``hynet`` or ``sosnet`` on a folder of images and write the weights that validated best to ``out``.

    Arguments, files and guarantees as ``train_detector``. Validation: the part of repeated Key.Net points of held-out views that
    mutual nearest descriptors match rightly.

    Args:
        preset: ``default``, ``quick``, or ``paper``: the published schedule, on published patches alone.
        patches: folder of PhotoTour or HPatches patches to train on; ``images`` then serve to validate.
        reconstructions: folders of COLMAP models with their images (``tracks.find_models``), whose tracks are half of the pairs.
        validation_reconstructions: the same to validate on: the validation is then the mean of the one of held-out photographs and
            of the share of keypoints that are matched in agreement with the models' cameras (``tracks.correct_share``).
        init: weights to start from (a name or a file): those of the same layers are taken over.

    Raises:
        FileNotFoundError, DataError: no folder, or fewer than two usable images.
        ValueError: unknown model or preset.
        WeightsError: ``init`` names no weights, or weights without such layers.
    """
    if model not in DESCRIPTORS:
        raise ValueError(f"model must be one of {', '.join(DESCRIPTORS)}; got {model!r}")
    if preset not in PATCH_RECIPES:
        raise ValueError(f"preset must be one of {', '.join(PATCH_RECIPES)}; got {preset!r}")
    if patches is not None and reconstructions:
        raise ValueError("published patches and reconstructions exclude each other; give --patches or --reconstructions")
    if preset == "paper" and patches is None:
        raise ValueError("the paper preset trains on published patches; name a folder of PhotoTour or HPatches patches")
    out = _place(out)
    recipe = PATCH_RECIPES[preset][model]
    if patches is not None and preset != "paper":
        recipe = dataclasses.replace(recipe, fit=dataclasses.replace(recipe.fit, batch_size=1))
    schedule = dataclasses.replace(recipe.fit, **_given(overrides))
    training, held_out = _photographs(images, validation, say)
    sets = None if patches is None else open_patches(patches)
    finder = load("keynet-tiny").fused()  # type: ignore[operator]

    scenes = read_scenes(reconstructions, log=say) if reconstructions else []
    views = PRESETS["patches-upright" if scenes else "patches"]

    def make_batches(length: int) -> Dataset:
        if sets is not None:
            return PatchBatches(sets, batch=recipe.pairs, length=length, seed=schedule.seed, augment=recipe.augment)
        warps = PatchPairs(training, peaks_of(finder), views=views, seed=schedule.seed, length=length)
        if not scenes:
            return warps
        tracks = TrackPatches(scenes, peaks_of(finder, TRACK_KEYPOINTS), seed=schedule.seed, length=length)
        return Mixture(warps, tracks, TRACK_SHARE, seed=schedule.seed)

    make_batches(1)[0]  # a folder without any texture is found out before the training starts
    detector = ScoreMapDetector(load("keynet").fused(), ExtractSettings(num_points=MATCHING_POINTS))  # type: ignore[operator]
    checks = matching_checks(
        held_out,
        lambda image: detector(build_pyramid(image))[0],
        views=dataclasses.replace(views, size=MATCHING_SIZE),
        seed=VALIDATION_SEED,
        count=min(MATCHING_PAIRS, VIEWS_PER_PHOTO * len(held_out)),
    )
    posed = PosedCheck(read_scenes(validation_reconstructions, log=say)) if validation_reconstructions else None
    with torch.random.fork_rng():
        torch.manual_seed(schedule.seed)
        net = DESCRIPTORS[model](dropout=recipe.dropout)
    if init is not None:
        say(f"{take_over(net, load(init), str(init))} tensors taken over from {init}")
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        anchor, positive = (batch[k].flatten(0, 1).contiguous(memory_format=torch.channels_last) for k in ("anchor", "positive"))
        return descriptor_loss(model, network, anchor, positive)

    def validate(network: nn.Module) -> float:
        where = next(network.parameters()).device

        def describe(patches: Tensor) -> Tensor:
            return torch.cat([network(part.to(where)).float().cpu() for part in patches.split(1024)])

        score = matching_score(describe, checks)
        return score if posed is None else (score + posed.patches(describe)) / 2

    told = {"model": model, "preset": preset, "patches": str(patches or ""), "init": Path(init or "").name}
    if scenes:
        told["reconstructions"] = _names(reconstructions)
    return _fit_descriptor(
        net, make_batches, loss, validate, lambda: DESCRIPTORS[model](dropout=recipe.dropout), schedule, out,
        told=told, photos=len(training) + len(held_out), resume=resume, device=device, devices=devices, progress=progress,
    )  # fmt: skip


def _names(folders: Folders | None) -> str:
    """Names of folders for the facts in a weights file: their paths say nothing elsewhere."""
    return ",".join(Path(folder).name for folder in ([folders] if isinstance(folders, str | Path) else folders or []))


class PosedCheck:
    """Validation on pairs of views of reconstructions: how many keypoints descriptors match in agreement with the cameras."""

    def __init__(self, scenes: list[TrackScene], detector: str | nn.Module = "keynet"):
        self.pairs = posed_pairs(scenes, POSED_PAIRS, VALIDATION_SEED)
        extractor = build(detector, None, num_points=POSED_POINTS, up_levels=0, device="cpu")
        paths = dict.fromkeys(path for pair in self.pairs for path in pair.images)
        self.images = {path: load_image(path) for path in paths}
        self.keypoints = {path: extractor.extract(image).keypoints for path, image in self.images.items()}

    def patches(self, describe: Callable[[Tensor], Tensor]) -> float:
        """Mean ``tracks.correct_share`` of a network of patches."""
        described = {
            path: describe(extract_patches(build_pyramid(image), self.keypoints[path])) for path, image in self.images.items()
        }
        return self._score(described)

    def dense(self, describe: Callable[[Tensor], Tensor], dim: int) -> float:
        """Mean ``tracks.correct_share`` of a network image (1,1,H,W) -> map (1,dim,h,w), both on the CPU."""
        descriptor = DenseDescriptor(describe, dim)
        described = {path: descriptor(build_pyramid(image), self.keypoints[path], 0) for path, image in self.images.items()}
        return self._score(described)

    def _score(self, described: dict[Path, Tensor]) -> float:
        shares = []
        for pair in self.pairs:
            a, b = (Features(self.keypoints[path], described[path], (1, 1)) for path in pair.images)
            shares.append(correct_share(pair, a.xy, b.xy, match(a, b).index))
        return float(np.mean(shares))


def _fit_descriptor(
    net: nn.Module,
    make_batches: Callable[[int], Dataset],
    loss: Loss,
    validate: Callable[[nn.Module], float],
    fresh: Callable[[], nn.Module],
    schedule: FitSettings,
    out: Path,
    *,
    told: dict[str, Any],
    photos: int,
    resume: bool,
    device: str,
    devices: int,
    progress: bool,
) -> FitResult:
    """``fit`` with a descriptor's files; ``fresh`` makes the network that is written, ``told`` and ``photos`` identify the training."""

    def keep(state: dict[str, Tensor], facts: dict[str, Any]) -> None:
        best = fresh()
        best.load_state_dict(state)
        save(best, out, {**told, "schedule": asdict(schedule), **facts}, half=True)

    return fit(
        net,
        make_batches,
        loss,
        validate,
        schedule,
        out.with_name(out.name + ".checkpoint"),
        log_dir=out.with_name(out.name + ".log"),
        resume=resume,
        device=device,
        devices=devices,
        progress=progress,
        score_name="matching",
        extra={**told, "photos": photos},
        on_best=keep,
    )


def take_over(net: nn.Module, source: nn.Module, name: str) -> int:
    """Copy every tensor of ``source`` that ``net`` has by the same name and shape; returns their number.

    Raises:
        WeightsError: there is none.
    """
    mine, theirs = net.state_dict(), source.state_dict()
    common = {k: v for k, v in theirs.items() if k in mine and mine[k].shape == v.shape}
    if not common:
        raise WeightsError(f"weights {name} have no layer in common with a {type(net).__name__}; start from weights of its own kind")
    net.load_state_dict({**mine, **common})
    return len(common)


#: Presets of ``train_desnet``; the paper says no schedule.
DESNET_RECIPES: dict[str, FitSettings] = {
    "default": FitSettings(batch_size=8, learning_rate=3e-3, warmup=50, average=0.99, validate_every=100),
    "quick": FitSettings(batch_size=8, learning_rate=3e-3, warmup=50, average=0.99, steps=200, validate_every=100),
}
#: Side of the suppression of candidates: denser than at extraction, because near ones teach most.
CANDIDATE_WINDOW = 9
CANDIDATE_POOL = 400


def candidate_loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Circle loss of a dense descriptor on a batch of ``CandidatePairs``, from both sides; other pairs' candidates are negatives."""
    maps = network(_both_views(batch)).float()
    count = len(batch["xy_a"])
    known_a, known_b = (~batch[key][..., 0].isnan() for key in ("xy_a", "xy_b"))  # (B,N)
    a, b = (
        torch.cat([sample(maps[start + i : start + i + 1], xy[known[i]]) for i, xy in enumerate(batch[key])])
        for start, key, known in ((0, "xy_a", known_a), (count, "xy_b", known_b))
    )
    chosen = [(rows[:, None] & columns[None]) for rows, columns in zip(known_a, known_b, strict=True)]
    shape = [(int(rows.sum()), int(columns.sum())) for rows, columns in zip(known_a, known_b, strict=True)]
    positive, within = (
        torch.block_diag(*(each[c].view(n) for each, c, n in zip(tables, chosen, shape, strict=True)))
        for tables in (batch["positive"], ~batch["negative"])
    )
    negative = ~within  # also across pairs: another photograph shows another place
    similarity = a @ b.T
    ahead, numbers = circle_loss(similarity, positive, negative)
    back, more = circle_loss(similarity.T, positive.T, negative.T)
    loss = (ahead + back) / 2
    return loss, {"loss": loss.item(), **{key: (numbers[key] + more[key]) / 2 for key in ("positive", "negative", "rows")}}


def train_desnet(
    images: Folders,
    out: str | Path,
    *,
    detector: str | Path = "sobelnet",
    dim: int = 128,
    width: int = 1,
    reconstructions: Folders | None = None,
    validation_reconstructions: Folders | None = None,
    init: str | Path | None = None,
    validation: Folders | None = None,
    preset: str = "default",
    device: str = "auto",
    devices: int = 1,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
    **overrides: Any,
) -> FitResult:
    """Train ``desnet`` on the key point candidates of a detector in a folder of images; arguments and files as ``train_detector``.

    Validation: the part of repeated points of held-out views that mutual nearest descriptors match rightly.

    Args:
        detector: weights (a name or a file) of a network image -> score map, which finds the candidates.
        dim: descriptor dimension, 128 or 64.
        width: factor of the network's channels.
        reconstructions, validation_reconstructions: see ``train_descriptor``.
        init: weights to start from (a name or a file).
        preset: ``default`` or ``quick`` (``DESNET_RECIPES``).

    Raises:
        FileNotFoundError, DataError: no folder, or fewer than two usable images.
        ValueError: unknown preset, or a detector that gives no score map alone.
        WeightsError: no such weights, or ``init`` without layers in common.
    """
    if preset not in DESNET_RECIPES:
        raise ValueError(f"preset must be one of {', '.join(DESNET_RECIPES)}; got {preset!r}")
    finder = load(detector)
    if not isinstance(finder, KeyNet | SobelNet):
        raise ValueError(f"{detector} holds a {type(finder).__name__}; candidates are found by keynet, keynet-tiny or sobelnet")
    out = _place(out)
    schedule = dataclasses.replace(DESNET_RECIPES[preset], **_given(overrides))
    training, held_out = _photographs(images, validation, say)
    find = peaks_of(finder.fused(), CANDIDATE_POOL, window=CANDIDATE_WINDOW)

    scenes = read_scenes(reconstructions, log=say) if reconstructions else []
    preset_views = PRESETS["dense-upright" if scenes else "dense"]

    def make_batches(length: int) -> Dataset:
        warps = CandidatePairs(training, find, preset_views, seed=schedule.seed, length=length)
        if not scenes:
            return warps
        return Mixture(warps, TrackCrops(scenes, find, preset_views, seed=schedule.seed, length=length), TRACK_SHARE, seed=schedule.seed)

    make_batches(1)[0]  # a folder without any texture is found out before the training starts
    views = dataclasses.replace(preset_views, size=MATCHING_SIZE)
    count = min(MATCHING_PAIRS, VIEWS_PER_PHOTO * len(held_out))
    checks = CandidatePairs(held_out, peaks_of(finder.fused()), views, seed=VALIDATION_SEED, length=count, count=MATCHING_POINTS)
    held_out_pairs = [{**checks[i], "H_ab": checks.homography(i)} for i in range(count)]
    posed = PosedCheck(read_scenes(validation_reconstructions, log=say), finder) if validation_reconstructions else None
    with torch.random.fork_rng():
        torch.manual_seed(schedule.seed)
        net = DesNet(dim=dim, width=width)
    if init is not None:
        say(f"{take_over(net, load(init), str(init))} tensors taken over from {init}")
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def validate(network: nn.Module) -> float:
        where = next(network.parameters()).device

        def describe(images: Tensor) -> Tensor:
            return network(images.to(where)).float().cpu()

        scores = []
        for pair in held_out_pairs:
            xy_a, xy_b = (pair[key][~pair[key][:, 0].isnan()] for key in ("xy_a", "xy_b"))
            maps = describe(torch.stack([pair["image_a"], pair["image_b"]]))
            scores.append(rightly_matched(sample(maps[:1], xy_a), sample(maps[1:], xy_b), xy_a, xy_b, pair["H_ab"]))
        score = mean_of_known(scores)
        return score if posed is None else (score + posed.dense(describe, dim)) / 2

    # the detector's weights, not its name: retrained in between, it would give other candidates
    told = {
        "model": "desnet", "preset": preset, "detector": weights_checksum(finder), "dim": dim, "width": width,
        "init": Path(init or "").name,
    }  # fmt: skip
    if scenes:
        told["reconstructions"] = _names(reconstructions)
    return _fit_descriptor(
        net, make_batches, candidate_loss, validate, lambda: DesNet(dim=dim, width=width), schedule, out,
        told=told, photos=len(training) + len(held_out), resume=resume, device=device, devices=devices, progress=progress,
    )  # fmt: skip
