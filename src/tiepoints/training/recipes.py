"""One function per published model: its data, loss and schedule, and the presets the command line offers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..detectors.keynet import KeyNet
from ..evaluation.bias import constant_offset
from ..evaluation.metrics import mutual_matches
from ..keypoints import detect_peaks
from ..weights import save
from .loop import FitResult, FitSettings, fit
from .losses import msip_loss
from .pairs import PairFile
from .synthetic import PRESETS, PairDataset, list_photos, split_photos, usable_photos

#: Validation: pairs of held-out photographs, their side and seed, and how many points of each are compared.
VALIDATION_PAIRS = 60
VALIDATION_SIZE = 320
VALIDATION_SEED = 7
VALIDATION_POINTS = 150


@dataclass(frozen=True)
class Recipe:
    """How a Key.Net is trained.

    Attributes:
        pairs: name of the pair preset (``synthetic.PRESETS``).
        fit: schedule (``loop.FitSettings``).
        loss: options of ``losses.msip_loss``.
    """

    pairs: str = "default"
    fit: FitSettings = field(default_factory=FitSettings)
    loss: dict[str, Any] = field(default_factory=lambda: {"visibility": "half", "factor": 500.0})


RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    # Paper 5.3 (batch 32, Adam 1e-3 halved after 30 of 45 epochs of 9,000 pairs, here a cosine); loss of its TensorFlow code.
    "paper": Recipe(
        pairs="keynet-paper",
        fit=FitSettings(steps=12_700, batch_size=32, learning_rate=1e-3, clip=0.0, average=0.0, validate_every=500),
        loss={"weighting": "softmax", "visibility": "any", "empty": "ignore"},
    ),
    # A look at whether one's own images train at all.
    "quick": Recipe(fit=FitSettings(steps=300, validate_every=100)),
}
#: Tiny-Key.Net has few parameters and takes larger steps.
TINY_LEARNING_RATE = 2e-2
MODELS: dict[str, Callable[[], KeyNet]] = {"keynet": KeyNet, "keynet-tiny": KeyNet.tiny}


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
    """Mean 3 px mutual repeatability of a score-map network (in eval mode) on pairs of equal size.

    Matches are divided by ``VALIDATION_POINTS``, not by the points found: a net must not gain by finding few.
    """
    scores = []
    device = next(net.parameters()).device
    for pair in pairs:
        both = torch.stack([pair["image_a"], pair["image_b"]]).to(device, memory_format=torch.channels_last)
        (xy_a, _), (xy_b, _) = detect_peaks(net(both).float().cpu(), 1000)
        size = tuple(pair["image_a"].shape[-2:])
        matches, _, _ = mutual_matches(xy_a, xy_b, pair["H_ab"], size, size, num_points=VALIDATION_POINTS)  # type: ignore[arg-type]
        scores.append(matches / VALIDATION_POINTS)
    return float(np.mean(scores)) if scores else 0.0


def train_keynet(
    model: str,
    images: str | Path,
    out: str | Path,
    *,
    preset: str = "default",
    pairs: str | Path | None = None,
    device: str = "auto",
    devices: int = 1,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
    **overrides: Any,
) -> FitResult:
    """Train ``keynet`` or ``keynet-tiny`` on a folder of images and write the weights that validated best to ``out``.

    A tenth of the photographs is held out for validation, always the same one. Beside ``out`` stand
    ``<out>.checkpoint`` (to resume from) and ``<out>.log/`` (CSV and TensorBoard).

    Args:
        preset: ``default``, ``paper`` or ``quick`` (``RECIPES``).
        pairs: file of ``tiepoints pairs`` to train on instead of pairs made on the fly.
        overrides: fields of ``FitSettings``; ``None`` leaves the preset's value.

    Raises:
        FileNotFoundError, DataError: no folder, or fewer than two usable images.
        ValueError: unknown model or preset.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; got {model!r}")
    if preset not in RECIPES:
        raise ValueError(f"preset must be one of {', '.join(RECIPES)}; got {preset!r}")
    out = Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent} to write {out.name} into")
    recipe = RECIPES[preset]
    given = {k: v for k, v in overrides.items() if v is not None}
    if given.get("minutes") is not None and "steps" not in given:
        given["steps"] = 0
    if model == "keynet-tiny" and "learning_rate" not in given:
        given["learning_rate"] = TINY_LEARNING_RATE if preset != "paper" else recipe.fit.learning_rate
    schedule = dataclasses.replace(recipe.fit, **given)
    pair_settings = PRESETS[recipe.pairs]

    photos, refused = usable_photos(list_photos(images))
    for line in refused[:10]:
        say(f"left out: {line}")
    if len(refused) > 10:
        say(f"left out: {len(refused) - 10} more images")
    training, held_out = split_photos(photos)
    say(f"{len(training)} photographs to train on, {len(held_out)} to validate on")

    def make_batches(length: int) -> Dataset:
        if pairs is not None:
            return PairFile(pairs, length=length, seed=schedule.seed)
        return PairDataset(training, pair_settings, seed=schedule.seed, length=length)

    make_batches(1)[0]  # a folder without any texture is found out before the training starts
    checks = PairDataset(
        held_out,
        dataclasses.replace(PRESETS["default"], size=VALIDATION_SIZE),
        seed=VALIDATION_SEED,
        length=VALIDATION_PAIRS,
    )
    validation = [checks[i] for i in range(len(checks))]

    with torch.random.fork_rng():
        torch.manual_seed(schedule.seed)
        net = floored_tiny() if model == "keynet-tiny" and preset != "paper" else MODELS[model]()
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        n = len(batch["image_a"])
        both = torch.cat([batch["image_a"], batch["image_b"]]).contiguous(memory_format=torch.channels_last)
        scores = network(both).float()
        return msip_loss(
            scores[:n], scores[n:], batch["H_ab"], mask_a=batch["mask_a"], mask_b=batch["mask_b"], **recipe.loss
        )

    def keep(state: dict[str, Tensor], facts: dict[str, Any]) -> None:
        best = MODELS[model]()
        best.load_state_dict(state)
        best.offset = constant_offset(best.eval(), (pair["image_a"][None] for pair in validation))
        save(best, out, {"model": model, "preset": preset, "schedule": asdict(schedule), **facts})

    # Which photographs took part is part of the training's identity: resuming on others would silently mix two.
    extra = {"model": model, "preset": preset, "photos": len(photos), "pairs": str(pairs or "")}
    result = fit(
        net,
        make_batches,
        loss,
        lambda network: validation_score(network, validation),
        schedule,
        out.with_name(out.name + ".checkpoint"),
        log_dir=out.with_name(out.name + ".log"),
        resume=resume,
        device=device,
        devices=devices,
        progress=progress,
        extra=extra,
        on_best=keep,
    )
    if result.best <= 0:
        say("the network scores nothing on the held-out photographs; train again with another --seed or a lower --learning-rate")
    return result
