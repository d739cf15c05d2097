"""Training of networks image -> score map: Key.Net, Tiny-Key.Net, SobelNet and REKD."""

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
from ..loop import FitResult, Loss, RunOptions, Task
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
from .common import TrainData, both_views, choose, fit_and_save, initialized, with_schedule

logger = logging.getLogger(__name__)


class UncentredNorm(nn.BatchNorm2d):
    """Batch normalisation that divides by the deviation and does not centre; afterwards an ordinary
    one with mean and bias 0.
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
    """Tiny-Key.Net that gives an image without content the score 0, whatever its filter learns.

    Its one ReLU is also its output. Left free, M-SIP moves the bias down until weak corners are cut
    off, where no keypoint can be found. The state is that of ``KeyNet.tiny()``.
    """
    net = KeyNet.tiny()
    block = cast(nn.Sequential, net.blocks[0])
    block[1] = UncentredNorm(1)
    cast(nn.Conv2d, block[0]).bias.requires_grad_(False)  # type: ignore[union-attr]
    block[1].bias.requires_grad_(False)
    return net


def train_score_map(
    name: str,
    data: TrainData,
    output: Path,
    preset: str,
    init: str | Path | None,
    run: RunOptions,
    schedule: dict[str, Any],
) -> FitResult:
    """Train ``keynet``, ``keynet-tiny`` or ``sobelnet``; see ``train``."""
    recipes = {"keynet": RECIPES, "keynet-tiny": TINY_RECIPES, "sobelnet": SOBELNET_RECIPES}
    recipe = choose(recipes[name], preset)

    def make_network() -> KeyNet | SobelNet:
        # a map of zeros is a perfect answer to the Gaussian loss, which ReLU does not leave again
        if name == "keynet":
            score = "softplus" if recipe.kind == "gaussian" else "relu"
            return KeyNet(score=score, structure=recipe.structure)
        return MODELS[name]()

    start = None if init is None else load(init)

    def make_trained() -> nn.Module:
        net = floored_tiny() if name == "keynet-tiny" and preset != "paper" else make_network()
        if start is not None:
            own, other = (
                {key: value.shape for key, value in n.state_dict().items()} for n in (net, start)
            )
            if own != other:
                raise WeightsError(
                    f"weights {init} have other layers than {name}; start from weights of its own "
                    "kind"
                )
            net.load_state_dict(start.state_dict())
        return net

    if data.pairs is not None and recipe.anchored:
        logger.warning("pairs of a file have no anchors: every repeated peak counts")
    return _train(
        data,
        output,
        dataclasses.replace(recipe, fit=with_schedule(recipe.fit, schedule)),
        run,
        make_trained=make_trained,
        make_network=make_network,
        loss=_score_map_loss(recipe),
        score=validation_score,
        identity={"model": name, "preset": preset, "init": Path(init or "").name},
    )


def _score_map_loss(recipe: Recipe) -> Loss:
    """M-SIP or the Gaussian loss on both views, with the penalty on peaks that are not on
    structure.
    """

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        score_a, score_b = network(both_views(batch)).float().chunk(2)
        masks: dict[str, Any] = {key: batch[key] for key in ("mask_a", "mask_b")}
        if recipe.kind == "gaussian":
            keys = ("anchor_a", "anchor_b", "target_a", "target_b")
            anchors: dict[str, Any] = {key: batch[key] for key in keys if key in batch}
            return gaussian_loss(score_a, score_b, batch["H_ab"], **recipe.loss, **masks, **anchors)
        total, numbers = msip_loss(score_a, score_b, batch["H_ab"], **recipe.loss, **masks)
        if recipe.structure_penalty and "anchor_a" in batch:
            each = [
                off_structure(score, batch[f"anchor_{side}"], batch[f"mask_{side}"])
                for score, side in ((score_a, "a"), (score_b, "b"))
            ]
            off = (each[0] + each[1]) / 2
            total = total + recipe.structure_penalty * off
            numbers = {**numbers, "loss": total.item(), "off_structure": off.item()}
        return total, numbers

    return loss


def train_oriented(
    name: str,
    data: TrainData,
    output: Path,
    preset: str,
    init: str | Path | None,
    run: RunOptions,
    schedule: dict[str, Any],
    *,
    group_size: int | None = None,
    dims: tuple[int, int, int] | None = None,
) -> FitResult:
    """Train ``rekd`` or ``rekd-light``; see ``train``."""
    recipe = choose(REKD_RECIPES, preset)
    group = REKD_SIZES[name]["group"] if group_size is None else group_size
    start = None if init is None else load(init)
    if start is not None and not isinstance(start, REKD):
        raise WeightsError(
            f"weights {init} are a {type(start).__name__}; this training starts from a REKD"
        )
    if start is not None and dims is not None and list(dims) != start.settings["dims"]:
        raise WeightsError(
            f"weights {init} have dims {start.settings['dims']}, not {list(dims)}; leave --dims "
            "out or start from others"
        )
    # what is not asked for stays as in the weights to start from: an imported network continues as
    # it was published
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
        "preset": preset,
        "group": group,
        "dims": list(settings["dims"]),
        "init": Path(init or "").name,
    }
    return _train(
        data,
        output,
        dataclasses.replace(recipe, fit=with_schedule(recipe.fit, schedule)),
        run,
        make_trained=make_trained,
        make_network=make_network,
        loss=_oriented_loss(recipe),
        score=oriented_score,
        identity=identity,
    )


def _oriented_loss(recipe: Recipe) -> Loss:
    """M-SIP and the orientation loss on both views."""

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        scores, histograms = network(both_views(batch))
        score_a, score_b = scores.float().chunk(2)
        masks: dict[str, Any] = {key: batch[key] for key in ("mask_a", "mask_b")}
        location, numbers = msip_loss(score_a, score_b, batch["H_ab"], **recipe.loss, **masks)
        histogram_a, histogram_b = histograms.float().chunk(2)
        weight = batch["mask_a"] * local_max_weight(score_a.detach())
        orientation, more = orientation_loss(
            histogram_a, histogram_b, batch["H_ab"], mask_a=weight, border=BORDER
        )
        total = location + recipe.balance * orientation
        return total, {
            **numbers,
            "loss": total.item(),
            "location": location.item(),
            "orientation": orientation.item(),
            "agree": more["agree"],
        }

    return loss


def local_max_weight(score: Tensor) -> Tensor:
    """How near the pixels of a score map (B,1,H,W) are to being keypoints: (score / largest score
    around)^4, 0..1.

    The orientation loss counts pixels by it: what a histogram says where no keypoint can be does
    not matter.
    """
    return (score / round_max_filter(score, NMS_WINDOW).clamp(min=1e-9)) ** 4


def _train(
    data: TrainData,
    output: Path,
    recipe: Recipe,
    run: RunOptions,
    *,
    make_trained: Callable[[], nn.Module],
    make_network: Callable[[], nn.Module],
    loss: Loss,
    score: Callable[[nn.Module, list[dict[str, Tensor]]], float],
    identity: dict[str, Any],
) -> FitResult:
    """Pairs of photographs, validation and files, which all score-map networks share.

    Args:
        make_trained, make_network: make the network that is trained, and the one that is written.
        loss, score: of a batch, and of the held-out pairs.
        identity: of the training, besides its schedule.
    """
    settings = recipe.fit
    training, held_out = data.photographs()

    def make_batches(length: int) -> Dataset:
        if data.pairs is not None:
            return PairFile(data.pairs, length=length, seed=settings.seed)
        dataset = PairDataset(training, PRESETS[recipe.pairs], seed=settings.seed, length=length)
        if not recipe.anchored:
            return dataset
        return WithShapes(dataset, recipe.shapes, pull=recipe.pull, seed=settings.seed)

    make_batches(1)[0]  # a folder without any texture is found out before the training starts
    views = dataclasses.replace(PRESETS[recipe.checks], size=recipe.check_size)
    checks = PairDataset(held_out, views, seed=VALIDATION_SEED, length=recipe.check_pairs)
    held_out_pairs = [checks[i] for i in range(len(checks))]

    def measure_bias(best: Any) -> None:
        images = (pair["image_a"][None] for pair in held_out_pairs)
        best.offset = constant_offset(score_maps(fused(best)), images)

    task = Task(
        make_batches,
        loss,
        lambda network: score(network, held_out_pairs),
        # Which photographs took part is part of the training's identity: resuming on others would
        # silently mix two.
        identity={
            **identity,
            "photos": len(training) + len(held_out),
            "pairs": str(data.pairs or ""),
        },
    )
    result = fit_and_save(
        initialized(make_trained, settings.seed),
        task,
        settings,
        output,
        run,
        make_network=make_network,
        prepare=measure_bias,
    )
    if result.best <= 0:
        logger.warning(
            "the network scores nothing on the held-out photographs; train again with another "
            "--seed or a lower --learning-rate"
        )
    return result
