"""Training of AffNet on pairs of patches from oblique views.

The network sees the central half of each patch. The patch is then sampled in the frame of its
shape, and a trained descriptor, which does not change, describes it. The loss is that of the
descriptors. Patches are larger than those of descriptors, so that the frames stay inside.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...datasets.patch_pairs import PatchPairs, PatchSettings, peak_detector
from ...datasets.reconstructions import TrackScene
from ...datasets.synthetic import PRESETS
from ...datasets.tracks import Mixture, TrackPatches
from ...detect import PUBLISHED, DetectOptions, ScoreMapDetector
from ...models.affnet import AffNet
from ...models.spec import fused
from ...patches import HALF_SIDE, PATCH_SIZE, crop_patches
from ...pyramid import build_pyramid
from ...weights import load, weights_checksum
from ..loop import FitResult, Task
from ..losses import hard_negative_constant_loss
from ..presets import SHAPE_RECIPES
from ..validation import (
    MATCHING_KEYPOINTS,
    MATCHING_PAIRS,
    MATCHING_SIZE,
    VALIDATION_SEED,
    matching_checks,
    matching_score,
)
from .common import (
    TrainData,
    TrainJob,
    choose,
    fit_and_save,
    init_record,
    initialized,
    with_schedule,
)
from .descriptors import (
    TRACK_KEYPOINTS,
    TRACK_SHARE,
    VIEWS_PER_PHOTO,
    data_identity,
    device_batches,
    load_init,
    patch_descriptor,
    posed_check,
    with_whole_batches,
)

logger = logging.getLogger(__name__)
#: Side of the patches relative to those of descriptors, and with it their settings. They are not
#: rotated by multiples of 90 degrees, because vertical lines of both views must stay vertical.
FACTOR = 2
PATCHES = PatchSettings(size=FACTOR * PATCH_SIZE, half_side=FACTOR * HALF_SIDE, symmetric=0.0)
#: Pairs of views for training and validation (``synthetic.PRESETS``).
VIEWS = "tilted"
#: Patches of a validation that are described at a time.
CHUNK = 1024


def shape_loss(
    network: nn.Module, descriptor: nn.Module, patches: Tensor, penalty: float = 0.0
) -> tuple[Tensor, dict[str, float]]:
    """Loss HardNegC of the descriptors of patches in the frames of their shapes, plus a penalty on
    elongated shapes.

    Args:
        network: patches (M,1,32,32) -> shapes (M,2,2).
        descriptor: patches (M,1,32,32) -> (M,D), not trained.
        patches: (2N,1,S,S) of N points, S at least 32: the N of one view, then those of the other.
        penalty: weight of the mean of ``elongation``.
    """
    shapes = network(crop_patches(patches, PATCH_SIZE)).float()
    vectors = descriptor(crop_patches(patches, PATCH_SIZE, shapes)).float()
    value, metrics = hard_negative_constant_loss(*vectors.chunk(2))
    mean_elongation = elongation(shapes).mean()
    value = value + penalty * mean_elongation
    return value, {**metrics, "loss": value.item(), "elongation": mean_elongation.item()}


def elongation(shapes: Tensor) -> Tensor:
    """``(s - 1 / s)^2`` (N,) of shapes (N,2,2) of determinant 1 with singular values s, 1 / s."""
    return shapes.square().sum(dim=(1, 2)) - 2


def train_shapes(job: TrainJob) -> FitResult:
    """Train ``affnet``; see ``train``.

    The validation score is that of the descriptors (``train_patches``) on oblique views of held-out
    photographs, with patches in the frames of their shapes.
    """
    recipe = choose(SHAPE_RECIPES, job.preset)
    data, fit = job.data, with_schedule(recipe.fit, job.schedule)
    training, held_out = data.photographs()
    scenes = data.scenes(held_out)
    trained = patch_descriptor(job.options.get("descriptor", recipe.descriptor), "descriptor")
    descriptor = fused(trained).requires_grad_(False)
    if job.options.get("on_device"):
        views_per_batch = {"views_per_batch": fit.batch_size}
        make_batches = device_batches(job, fit, training, scenes, PRESETS[VIEWS], PATCHES)
        fit, job = with_whole_batches(fit, job)
    else:
        views_per_batch = {}
        make_batches = _batches(training, scenes, fit.seed)
    make_batches(1)[0]  # raises for photographs without texture before the training starts

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        both = torch.cat([batch[key].flatten(0, 1) for key in ("anchor", "positive")])
        return shape_loss(network, descriptor.to(both.device), both, recipe.penalty)

    validate = shape_validation(data, held_out, descriptor)
    net = initialized(AffNet, fit.seed)
    load_init(net, job.init)
    identity: dict[str, Any] = {
        "model": job.name,
        "preset": job.preset,
        "descriptor": weights_checksum(trained),
        **views_per_batch,
        **init_record(job.init),
        **data_identity(data, [*training, *held_out]),
    }
    task = Task(make_batches, loss, validate, "matching", identity)
    return fit_and_save(net, task, fit, job, make_network=AffNet, half=True)


def _batches(photos: list[Path], scenes: list[TrackScene], seed: int) -> Callable[[int], Dataset]:
    """Length -> training data."""
    net = fused(load("keynet-tiny"))

    def make_batches(length: int) -> Dataset:
        warps = PatchPairs(
            *(photos, peak_detector(net), PATCHES), views=PRESETS[VIEWS], seed=seed, length=length
        )
        if not scenes:
            return warps
        detect = peak_detector(net, TRACK_KEYPOINTS)
        tracks = TrackPatches(scenes, detect, PATCHES, seed=seed, length=length)
        return Mixture(warps, tracks, TRACK_SHARE, seed=seed)

    return make_batches


def shaped(
    network: nn.Module | None,
    descriptor: nn.Module,
    device: torch.device | str = "cpu",
) -> Callable[[Tensor], Tensor]:
    """Function (N,1,S,S) -> (N,D) that describes patches of ``PATCHES`` in the frames of the shapes
    that a network gives them; None: as squares.
    """
    descriptor = descriptor.to(device)

    @torch.inference_mode()
    def describe(patches: Tensor) -> Tensor:
        vectors = []
        for part in patches.split(CHUNK):
            part = part.to(device)
            shapes = None if network is None else network(crop_patches(part, PATCH_SIZE)).float()
            vectors.append(descriptor(crop_patches(part, PATCH_SIZE, shapes)).cpu())
        return torch.cat(vectors)

    return describe


def shape_validation(
    data: TrainData, held_out: list[Path], descriptor: nn.Module
) -> Callable[[nn.Module], float]:
    """Validation on held-out photographs and, if given, reconstructions; the score of patches
    without shapes is logged.
    """
    detector = ScoreMapDetector(
        fused(load("keynet")), DetectOptions(num_keypoints=MATCHING_KEYPOINTS, **PUBLISHED)
    )
    size = {"patch_size": PATCHES.size, "half_side": PATCHES.half_side}
    checks = matching_checks(
        held_out,
        lambda image: detector(build_pyramid(image))[0],
        views=dataclasses.replace(PRESETS[VIEWS], size=MATCHING_SIZE),
        seed=VALIDATION_SEED,
        count=min(MATCHING_PAIRS, VIEWS_PER_PHOTO * len(held_out)),
        **size,  # type: ignore[arg-type]
    )
    posed = posed_check(data)

    def score(describe: Callable[[Tensor], Tensor]) -> float:
        found = matching_score(describe, checks)
        return found if posed is None else (found + posed.patches(describe, **size)) / 2  # type: ignore[arg-type]

    logger.info("matching without shapes: %.3f", score(shaped(None, descriptor)))

    def validate(network: nn.Module) -> float:
        return score(shaped(network, descriptor, next(network.parameters()).device))

    return validate
