"""Training of score-map networks: Key.Net, Tiny-Key.Net, SobelNet and REKD."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...datasets.pairs import PairFile, write_pairs
from ...datasets.shapes import WithShapes
from ...datasets.synthetic import PRESETS, PairDataset, PairSettings
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
from ..losses import (
    BORDER,
    WINDOWS,
    gaussian_loss,
    msip_loss,
    off_structure,
    orientation_loss,
    paper_msip_loss,
)
from ..presets import (
    LIGHT_RECIPES,
    MODELS,
    RECIPES,
    REKD_RECIPES,
    REKD_SIZES,
    SOBELNET_RECIPES,
    TINY_RECIPES,
    Recipe,
)
from ..validation import VALIDATION_SEED, oriented_score, paper_score, validation_score
from .common import (
    TrainJob,
    both_views,
    choose,
    companion,
    data_record,
    fit_and_save,
    init_record,
    initialized,
    plain,
    with_schedule,
)
from .options import keynet_arguments, with_options

logger = logging.getLogger(__name__)
#: Number of validation pairs that are kept in memory.
MEMORY_PAIRS = 200
#: Number of validation pairs from which the localization bias is measured.
BIAS_PAIRS = 20
#: Options that change the training pairs.
_PAIR_OPTIONS = ("patch_size", "max_angle", "num_training_data")


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


def _without_offsets(net: nn.Module) -> None:
    """Set the mean and the biases of ``floored_tiny`` to 0, which others of its weights may have:
    ``UncenteredNorm`` ignores them, but the ordinary norm of the written network would not.
    """
    block = cast(nn.Sequential, cast(KeyNet, net).blocks[0])
    norm = cast(nn.BatchNorm2d, block[1])
    with torch.no_grad():
        for values in (norm.running_mean, norm.bias, cast(nn.Conv2d, block[0]).bias):
            if values is not None:
                values.zero_()


def train_score_map(name: str, job: TrainJob) -> FitResult:
    """Train ``keynet``, ``keynet-light``, ``keynet-tiny`` or ``sobelnet``; see ``train``."""
    recipes = {
        **{"keynet": RECIPES, "keynet-light": LIGHT_RECIPES},
        **{"keynet-tiny": TINY_RECIPES, "sobelnet": SOBELNET_RECIPES},
    }
    recipe = with_options(choose(recipes[name], job.preset), job.preset, job.options)

    def make_network() -> KeyNet | SobelNet:
        # a zero map minimizes the Gaussian loss, and ReLU would have no gradient there
        if name in ("keynet", "keynet-light"):
            score = "softplus" if recipe.kind == "gaussian" else "relu"
            arguments = keynet_arguments(job.options)
            make = cast(Callable[..., KeyNet], MODELS[name])
            return make(score=score, structure=recipe.structure, **arguments)
        return MODELS[name]()

    start = None if job.init is None else load(job.init)
    if name == "keynet-light" and isinstance(start, KeyNet):
        start = start.one_level()

    def make_trained() -> nn.Module:
        floored = name == "keynet-tiny" and job.preset != "paper"
        net = floored_tiny() if floored else make_network()
        if start is not None:
            own, other = (
                {key: value.shape for key, value in n.state_dict().items()} for n in (net, start)
            )
            if own != other:
                raise WeightsError(
                    f"weights {job.init} have other layers than {name} with these options; start "
                    "from weights of the same network"
                )
            net.load_state_dict(start.state_dict())
            if floored:
                _without_offsets(net)
        return net

    return _train(
        job,
        recipe,
        make_trained=make_trained,
        make_network=make_network,
        loss=_score_map_loss(recipe),
        score=paper_score if recipe.score == "paper" else validation_score,
        identity={"model": name, "preset": job.preset, **init_record(job.init)},
    )


def _score_map_loss(recipe: Recipe) -> Loss:
    """M-SIP of the published code or of the paper, optionally with a penalty on peaks off
    structure, or the Gaussian loss.
    """

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        score_a, score_b = network(both_views(batch)).float().chunk(2)
        masks: dict[str, Any] = {key: batch[key] for key in ("mask_a", "mask_b")}
        if recipe.kind == "gaussian":
            keys = ("anchor_a", "anchor_b", "target_a", "target_b")
            anchors: dict[str, Any] = {key: batch[key] for key in keys if key in batch}
            return gaussian_loss(score_a, score_b, batch["H_ab"], **recipe.loss, **masks, **anchors)
        msip = paper_msip_loss if recipe.kind == "paper" else msip_loss
        total, metrics = msip(score_a, score_b, batch["H_ab"], **recipe.loss, **masks)
        if recipe.structure_penalty and "anchor_a" in batch:
            off_a = off_structure(score_a, batch["anchor_a"], batch["mask_a"])
            off_b = off_structure(score_b, batch["anchor_b"], batch["mask_b"])
            off = (off_a + off_b) / 2
            total = total + recipe.structure_penalty * off
            metrics = {**metrics, "loss": total.item(), "off_structure": off.item()}
        return total, metrics

    return loss


def train_oriented(name: str, job: TrainJob) -> FitResult:
    """Train ``rekd`` or ``rekd-light``; see ``train``.

    The number of orientations is that of the network ``name`` by default, the other settings are
    those of the initial weights, or of ``name``.
    """
    init = job.init
    recipe = with_options(choose(REKD_RECIPES, job.preset), job.preset, job.options)
    group_size, dims = job.options.get("group_size"), job.options.get("dims")
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
    new = {"dims": dims or REKD_SIZES[name]["dims"], "variant": recipe.variant}
    settings = {**(new if start is None else start.settings), "group": group}

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
        weight, border = batch["mask_a"], 0
        if recipe.peaks_only:
            weight, border = weight * local_max_weight(score_a.detach()), BORDER
        orientation, orientation_metrics = orientation_loss(
            histogram_a, histogram_b, batch["H_ab"], mask_a=weight, border=border
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
    score: Callable[[nn.Module, Iterable[dict[str, Tensor]]], float],
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
    settings = with_schedule(recipe.fit, job.schedule)
    training, held_out = job.data.photographs()
    pairs = _training_pairs(job, recipe, training, settings.seed)

    def make_batches(length: int) -> Dataset:
        dataset: PairDataset | PairFile
        if pairs is None:
            dataset = PairDataset(training, _views(recipe), seed=settings.seed, length=length)
        else:
            dataset = PairFile(pairs, length=length, seed=settings.seed)
        if not recipe.anchored:
            return dataset
        return WithShapes(dataset, recipe.shapes, pull=recipe.pull, seed=settings.seed)

    make_batches(1)[0]  # raises for photographs without texture before the training starts
    held_out_pairs = _validation_pairs(job, recipe, held_out)

    def measure_bias(best: Any) -> None:
        images = (pair["image_a"][None] for pair in islice(held_out_pairs, BIAS_PAIRS))
        best.offset = constant_offset(score_maps(fused(best)), images)

    task = Task(
        make_batches,
        loss,
        lambda network: score(network, held_out_pairs),
        identity={**identity, **_data_identity(job, [*training, *held_out])},
    )
    result = fit_and_save(
        initialized(make_trained, settings.seed),
        task,
        settings,
        job,
        make_network=make_network,
        prepare=measure_bias,
    )
    if result.best <= 0:
        few = result.steps <= settings.warmup
        logger.warning(
            "the validation score of the network is 0; %s",
            f"{result.steps} steps are too few: train longer"
            if few
            else "train again with another --seed or a lower --learning-rate",
        )
    return result


def _data_identity(job: TrainJob, photos: list[Path]) -> dict[str, Any]:
    """What must not change between a training and its resume: data, and options of the network."""
    data = job.data
    identity: dict[str, Any] = {
        "photos": len(photos),
        "pairs": Path(data.pairs or "").name,  # only the name, so that the file may be moved
        "files": data_record(photos, data.pairs, data.validation_pairs),
    }
    if data.validation_pairs is not None:
        identity["validation_pairs"] = Path(data.validation_pairs).name
    if job.options:  # of trainings without options, checkpoints of earlier versions lack it
        identity["options"] = {key: plain(key, value) for key, value in job.options.items()}
    return identity


def _views(recipe: Recipe) -> PairSettings:
    """How the training pairs are drawn.

    Raises:
        ValueError: they are smaller than a window of the loss.
    """
    views = dataclasses.replace(PRESETS[recipe.pairs], **recipe.views)
    largest = max(recipe.loss.get("windows", WINDOWS))
    if recipe.kind != "gaussian" and views.size < largest:
        raise ValueError(
            f"pairs of {views.size} px are smaller than a window of {largest} px; give a larger "
            "patch size or smaller windows"
        )
    return views


def _training_pairs(
    job: TrainJob, recipe: Recipe, photos: list[Path], seed: int
) -> str | Path | None:
    """File of the training pairs; None if pairs are drawn in every step.

    Raises:
        ValueError: the pairs of a given file cannot be changed by options.
    """
    if job.data.pairs is not None:
        changed = [key for key in _PAIR_OPTIONS if key in job.options]
        if changed:
            raise ValueError(
                f"{changed[0]} does not apply to the training pairs of a file; omit one of both"
            )
        return job.data.pairs
    if not recipe.num_pairs:
        return None
    views = _views(recipe)
    return _written(job, "training", photos, views, recipe.num_pairs, seed, recipe.pairs)


def _written(
    job: TrainJob,
    name: str,
    photos: list[Path],
    views: PairSettings,
    count: int,
    seed: int,
    preset: str,
) -> Path:
    """File of pairs next to the weights, written unless it contains them already."""
    path = companion(job.output, "pairs") / f"{name}.safetensors"
    write_pairs(
        *(path, photos, views, count),
        seed=seed,
        workers=job.run.workers,
        preset=preset,
        progress=job.run.progress,
        keep=True,
    )
    return path


def _validation_pairs(
    job: TrainJob, recipe: Recipe, photos: list[Path]
) -> Iterable[dict[str, Tensor]]:
    """Pairs for validation; more than ``MEMORY_PAIRS`` are read from a file."""
    if job.data.validation_pairs is not None:
        return PairFile(job.data.validation_pairs)
    changes = {key: value for key, value in recipe.views.items() if key == "rotation"}
    views = dataclasses.replace(PRESETS[recipe.checks], size=recipe.check_size, **changes)
    if recipe.check_pairs > MEMORY_PAIRS:
        return PairFile(
            _written(
                *(job, "validation", photos, views),
                *(recipe.check_pairs, VALIDATION_SEED, recipe.checks),
            )
        )
    checks = PairDataset(photos, views, seed=VALIDATION_SEED, length=recipe.check_pairs)
    return [checks[i] for i in range(len(checks))]
