"""Training of score-map networks: Key.Net, Tiny-Key.Net, SobelNet and REKD."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...datasets.pairs import PairFile
from ...datasets.shapes import WithShapes
from ...datasets.synthetic import PRESETS, PairDataset
from ...detect import score_maps
from ...errors import WeightsError
from ...keypoints import NMS_WINDOW, round_max_filter
from ...metrics.bias import constant_offset
from ...models.keynet import KeyNet
from ...models.rekd import REKD
from ...models.sobelnet import SobelNet
from ...models.spec import fused
from ...weights import load
from ..loop import FitResult, Loss, Task
from ..losses import BORDER, gaussian_loss, msip_loss, off_structure, orientation_loss
from ..presets import (
    MODELS,
    RECIPES,
    REKD_RECIPES,
    REKD_SIZES,
    SOBELNET_RECIPES,
    TINY_RECIPES,
    Recipe,
)
from ..validation import VALIDATION_SEED, oriented_score, validation_score
from .common import (
    TrainData,
    TrainJob,
    both_views,
    choose,
    data_record,
    fit_and_save,
    init_record,
    initialized,
    with_schedule,
)

logger = logging.getLogger(__name__)


class UncenteredNorm(nn.BatchNorm2d):
    """Batch normalization that divides by the standard deviation without subtracting the mean.

    After training it is equivalent to an ordinary one with mean and bias 0.
    """

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
    """Tiny-Key.Net whose score of a constant image is always 0.

    Its only ReLU is its output. With a free bias, M-SIP lowers the bias until weak corners have
    score 0, where no keypoint can be detected. The state dict is that of ``KeyNet.tiny()``.
    """
    net = KeyNet.tiny()
    block = cast(nn.Sequential, net.blocks[0])
    block[1] = UncenteredNorm(1)
    cast(nn.Conv2d, block[0]).bias.requires_grad_(False)  # type: ignore[union-attr]
    block[1].bias.requires_grad_(False)
    return net


def train_score_map(name: str, job: TrainJob) -> FitResult:
    """Train ``keynet``, ``keynet-tiny`` or ``sobelnet``; see ``train``."""
    recipes = {"keynet": RECIPES, "keynet-tiny": TINY_RECIPES, "sobelnet": SOBELNET_RECIPES}
    recipe = choose(recipes[name], job.preset)

    def make_network() -> KeyNet | SobelNet:
        # a zero map minimizes the Gaussian loss, and ReLU would have no gradient there
        if name == "keynet":
            score = "softplus" if recipe.kind == "gaussian" else "relu"
            return KeyNet(score=score, structure=recipe.structure)
        return MODELS[name]()

    start = None if job.init is None else load(job.init)

    def make_trained() -> nn.Module:
        floored = name == "keynet-tiny" and job.preset != "paper"
        net = floored_tiny() if floored else make_network()
        if start is not None:
            own, other = (
                {key: value.shape for key, value in n.state_dict().items()} for n in (net, start)
            )
            if own != other:
                raise WeightsError(
                    f"weights {job.init} have other layers than {name}; start from weights of the "
                    "same network"
                )
            net.load_state_dict(start.state_dict())
        return net

    if job.data.pairs is not None and recipe.anchored:
        logger.warning("pairs of a file have no structure weights: all repeated peaks count")
    return _train(
        job,
        recipe,
        make_trained=make_trained,
        make_network=make_network,
        loss=_score_map_loss(recipe),
        score=validation_score,
        identity={"model": name, "preset": job.preset, **init_record(job.init)},
    )


def _score_map_loss(recipe: Recipe) -> Loss:
    """M-SIP, optionally with a penalty on peaks off structure, or the Gaussian loss."""

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        score_a, score_b = network(both_views(batch)).float().chunk(2)
        masks: dict[str, Any] = {key: batch[key] for key in ("mask_a", "mask_b")}
        if recipe.kind == "gaussian":
            keys = ("anchor_a", "anchor_b", "target_a", "target_b")
            anchors: dict[str, Any] = {key: batch[key] for key in keys if key in batch}
            return gaussian_loss(score_a, score_b, batch["H_ab"], **recipe.loss, **masks, **anchors)
        total, metrics = msip_loss(score_a, score_b, batch["H_ab"], **recipe.loss, **masks)
        if recipe.structure_penalty and "anchor_a" in batch:
            off_a = off_structure(score_a, batch["anchor_a"], batch["mask_a"])
            off_b = off_structure(score_b, batch["anchor_b"], batch["mask_b"])
            off = (off_a + off_b) / 2
            total = total + recipe.structure_penalty * off
            metrics = {**metrics, "loss": total.item(), "off_structure": off.item()}
        return total, metrics

    return loss


def train_oriented(
    name: str,
    job: TrainJob,
    *,
    group_size: int | None = None,
    dims: tuple[int, int, int] | None = None,
) -> FitResult:
    """Train ``rekd`` or ``rekd-light``; see ``train``.

    Args:
        name: of the network.
        job: data, files and options.
        group_size: number of orientations; default: that of the network ``name``.
        dims: channels of each layer; default: those of the initial weights, or of ``name``.
    """
    init, recipe = job.init, choose(REKD_RECIPES, job.preset)
    group = REKD_SIZES[name]["group"] if group_size is None else group_size
    start = None if init is None else load(init)
    if start is not None and not isinstance(start, REKD):
        raise WeightsError(
            f"weights {init} are a {type(start).__name__}; this training starts from a REKD"
        )
    if start is not None and dims is not None and list(dims) != start.settings["dims"]:
        raise WeightsError(
            f"weights {init} have dims {start.settings['dims']}, not {list(dims)}; omit --dims or "
            "start from other weights"
        )
    # other settings are those of the initial weights, for example of an imported published network
    settings = {"dims": dims or REKD_SIZES[name]["dims"]} if start is None else start.settings
    settings = {**settings, "group": group}

    def make_network() -> REKD:
        return REKD(**settings)

    def make_trained() -> REKD:
        if start is None:
            return make_network()
        logger.info("starting from %s, %d orientations", init, start.group)
        return (start if start.group == group else start.regrouped(group)).train()

    identity = {
        "model": name,
        "preset": job.preset,
        "group": group,
        "dims": list(settings["dims"]),
        **init_record(init),
    }
    return _train(
        job,
        recipe,
        make_trained=make_trained,
        make_network=make_network,
        loss=_oriented_loss(recipe),
        score=oriented_score,
        identity=identity,
    )


def _oriented_loss(recipe: Recipe) -> Loss:
    """M-SIP and the orientation loss."""

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        scores, histograms = network(both_views(batch))
        score_a, score_b = scores.float().chunk(2)
        masks: dict[str, Any] = {key: batch[key] for key in ("mask_a", "mask_b")}
        location, metrics = msip_loss(score_a, score_b, batch["H_ab"], **recipe.loss, **masks)
        histogram_a, histogram_b = histograms.float().chunk(2)
        weight = batch["mask_a"] * local_max_weight(score_a.detach())
        orientation, orientation_metrics = orientation_loss(
            histogram_a, histogram_b, batch["H_ab"], mask_a=weight, border=BORDER
        )
        total = location + recipe.balance * orientation
        return total, {
            **metrics,
            "loss": total.item(),
            "location": location.item(),
            "orientation": orientation.item(),
            "agree": orientation_metrics["agree"],
        }

    return loss


def local_max_weight(score: Tensor) -> Tensor:
    """Weights of the orientation loss: (score / local maximum)^4 of a score map (B,1,H,W), 0..1.

    The orientation is relevant only where keypoints may be detected.
    """
    return (score / round_max_filter(score, NMS_WINDOW).clamp(min=1e-9)) ** 4


def _train(
    job: TrainJob,
    recipe: Recipe,
    *,
    make_trained: Callable[[], nn.Module],
    make_network: Callable[[], nn.Module],
    loss: Loss,
    score: Callable[[nn.Module, list[dict[str, Tensor]]], float],
    identity: dict[str, Any],
) -> FitResult:
    """Train a score-map network on pairs of photographs.

    Args:
        job: data, files and options.
        recipe: pairs, schedule and validation.
        make_trained, make_network: create the network that is trained, and the one that is written.
        loss: of a batch.
        score: validation score of a network on the held-out pairs.
        identity: of the training, without schedule and data.
    """
    data, settings = job.data, with_schedule(recipe.fit, job.schedule)
    training, held_out = data.photographs()

    def make_batches(length: int) -> Dataset:
        return _pairs(recipe, data, training, settings.seed, length)

    make_batches(1)[0]  # raises for photographs without texture before the training starts
    views = dataclasses.replace(PRESETS[recipe.checks], size=recipe.check_size)
    checks = PairDataset(held_out, views, seed=VALIDATION_SEED, length=recipe.check_pairs)
    held_out_pairs = [checks[i] for i in range(len(checks))]

    def measure_bias(best: Any) -> None:
        images = (pair["image_a"][None] for pair in held_out_pairs)
        best.offset = constant_offset(score_maps(fused(best)), images)

    # resuming with other photographs must raise an error
    photos = {
        "photos": len(training) + len(held_out),
        "pairs": str(data.pairs or ""),
        "files": data_record([*training, *held_out], data.pairs),
    }
    task = Task(
        make_batches,
        loss,
        lambda network: score(network, held_out_pairs),
        identity={**identity, **photos},
    )
    result = fit_and_save(
        initialized(make_trained, settings.seed),
        task,
        settings,
        job.output,
        job.run,
        make_network=make_network,
        prepare=measure_bias,
    )
    if result.best <= 0:
        logger.warning(
            "the validation score of the network is 0; train again with another --seed or a lower "
            "--learning-rate"
        )
    return result


def _pairs(recipe: Recipe, data: TrainData, photos: list[Path], seed: int, length: int) -> Dataset:
    """Training pairs of a file or of photographs."""
    if data.pairs is not None:
        return PairFile(data.pairs, length=length, seed=seed)
    dataset = PairDataset(photos, PRESETS[recipe.pairs], seed=seed, length=length)
    if not recipe.anchored:
        return dataset
    return WithShapes(dataset, recipe.shapes, pull=recipe.pull, seed=seed)
