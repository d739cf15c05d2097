"""Training of descriptors: HardNet, HyNet and SOSNet on patches, DesNet on keypoint candidates."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...datasets.candidates import CandidatePairs
from ...datasets.patch_pairs import PatchPairs, peak_detector
from ...datasets.patch_sets import PatchBatches, PatchSet, open_hpatches, open_phototour
from ...datasets.reconstructions import read_scenes
from ...datasets.synthetic import PRESETS
from ...datasets.tracks import Mixture, TrackCrops, TrackPatches
from ...detect import DetectOptions, ScoreMapDetector
from ...models.desnet import DesNet, sample
from ...models.spec import DetectorSpec, fused, spec_of
from ...pyramid import build_pyramid
from ...weights import load, weights_checksum
from ..loop import FitResult, RunOptions, Task
from ..losses import circle_loss, hardnet_loss, hynet_loss, sosnet_loss
from ..presets import DESCRIPTORS, DESNET_RECIPES, PATCH_RECIPES
from ..validation import (
    MATCHING_KEYPOINTS,
    MATCHING_PAIRS,
    MATCHING_SIZE,
    VALIDATION_SEED,
    PosedCheck,
    correctly_matched,
    matching_checks,
    matching_score,
    mean_of_known,
)
from .common import (
    TrainData,
    as_folders,
    both_views,
    choose,
    fit_and_save,
    initialized,
    load_partial_state_dict,
    with_schedule,
)

logger = logging.getLogger(__name__)
#: Share of the pairs that come from reconstructions, where some are given, and keypoints detected
#: in each of their images.
TRACK_SHARE = 0.5
TRACK_KEYPOINTS = 1500
#: Few photographs give no more than this many pairs of views each.
VIEWS_PER_PHOTO = 4
#: Side of the suppression of candidates: denser than at extraction, because near ones teach most.
CANDIDATE_WINDOW = 9
CANDIDATE_POOL = 400


def descriptor_loss(
    name: str, net: nn.Module, anchor: Tensor, positive: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The published loss of a descriptor on patches (N,1,P,P) of N points, both views passed
    through the net at once.
    """
    both = torch.cat([anchor, positive])
    if name == "hynet":
        return hynet_loss(*net(both, raw=True).float().chunk(2))
    return (sosnet_loss if name == "sosnet" else hardnet_loss)(*net(both).float().chunk(2))


def open_patches(folder: str | Path) -> list[PatchSet]:
    """Published patches of a folder: a PhotoTour set, a folder of such sets, or HPatches'
    sequences.

    Raises:
        FileNotFoundError, DataError: see ``patch_sets``.
    """
    folder = Path(folder)
    if (folder / "info.txt").is_file():
        return [open_phototour(folder)]
    tours = sorted(path.parent for path in folder.glob("*/info.txt"))
    return [open_phototour(tour) for tour in tours] if tours else open_hpatches(folder)


def train_patches(
    name: str,
    data: TrainData,
    output: Path,
    preset: str,
    init: str | Path | None,
    run: RunOptions,
    schedule: dict[str, Any],
) -> FitResult:
    """Train ``hardnet``, ``hynet`` or ``sosnet``; see ``train``.

    Validation: the share of repeated Key.Net keypoints of held-out views that mutual nearest
    descriptors match correctly.
    """
    recipe = choose(PATCH_RECIPES, preset)[name]
    if data.patches is not None and data.reconstructions:
        raise ValueError(
            "published patches and reconstructions exclude each other; give --patches or "
            "--reconstructions"
        )
    if preset == "paper" and data.patches is None:
        raise ValueError(
            "the paper preset trains on published patches; name a folder of PhotoTour or HPatches "
            "patches"
        )
    if data.patches is not None and preset != "paper":
        recipe = dataclasses.replace(recipe, fit=dataclasses.replace(recipe.fit, batch_size=1))
    settings = with_schedule(recipe.fit, schedule)
    training, held_out = data.photographs()
    sets = None if data.patches is None else open_patches(data.patches)
    finder = fused(load("keynet-tiny"))
    scenes = read_scenes(data.reconstructions) if data.reconstructions else []
    views = PRESETS["patches-upright" if scenes else "patches"]

    def make_batches(length: int) -> Dataset:
        seed = settings.seed
        if sets is not None:
            return PatchBatches(
                sets, batch=recipe.pairs, length=length, seed=seed, augment=recipe.augment
            )
        warps = PatchPairs(training, peak_detector(finder), views=views, seed=seed, length=length)
        if not scenes:
            return warps
        detect = peak_detector(finder, TRACK_KEYPOINTS)
        tracks = TrackPatches(scenes, detect, seed=seed, length=length)
        return Mixture(warps, tracks, TRACK_SHARE, seed=seed)

    make_batches(1)[0]  # a folder without any texture is found out before the training starts
    detector = ScoreMapDetector(
        fused(load("keynet")), DetectOptions(num_keypoints=MATCHING_KEYPOINTS)
    )
    checks = matching_checks(
        held_out,
        lambda image: detector(build_pyramid(image))[0],
        views=dataclasses.replace(views, size=MATCHING_SIZE),
        seed=VALIDATION_SEED,
        count=min(MATCHING_PAIRS, VIEWS_PER_PHOTO * len(held_out)),
    )
    posed = _posed_check(data)

    def make_network() -> nn.Module:
        return DESCRIPTORS[name](dropout=recipe.dropout)

    net = initialized(make_network, settings.seed)
    _start_from(net, init)

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        anchor, positive = (
            batch[k].flatten(0, 1).contiguous(memory_format=torch.channels_last)
            for k in ("anchor", "positive")
        )
        return descriptor_loss(name, network, anchor, positive)

    def validate(network: nn.Module) -> float:
        device = next(network.parameters()).device

        def describe(patches: Tensor) -> Tensor:
            parts = patches.split(1024)
            return torch.cat([network(part.to(device)).float().cpu() for part in parts])

        score = matching_score(describe, checks)
        return score if posed is None else (score + posed.patches(describe)) / 2

    identity = {
        "model": name,
        "preset": preset,
        "patches": str(data.patches or ""),
        "init": Path(init or "").name,
        **_identity_of(data, len(training) + len(held_out)),
    }
    task = Task(make_batches, loss, validate, "matching", identity)
    return fit_and_save(net, task, settings, output, run, make_network=make_network, half=True)


def _posed_check(data: TrainData, detector: str | nn.Module = "keynet") -> PosedCheck | None:
    if not data.validation_reconstructions:
        return None
    return PosedCheck(read_scenes(data.validation_reconstructions), detector)


def _start_from(net: nn.Module, init: str | Path | None) -> None:
    if init is not None:
        count = load_partial_state_dict(net, load(init), str(init))
        logger.info("%d tensors loaded from %s", count, init)


def _identity_of(data: TrainData, photos: int) -> dict[str, Any]:
    """What identifies the data: names of folders, because their paths say nothing elsewhere."""
    identity: dict[str, Any] = {"photos": photos}
    if data.reconstructions:
        names = (folder.name for folder in as_folders(data.reconstructions))
        identity["reconstructions"] = ",".join(names)
    return identity


def candidate_loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Circle loss of a dense descriptor on a batch of ``CandidatePairs``, from both sides; other
    pairs' candidates are negatives.
    """
    maps = network(both_views(batch)).float()
    count = len(batch["xy_a"])
    known_a, known_b = (~batch[key][..., 0].isnan() for key in ("xy_a", "xy_b"))  # (B,N)
    a, b = (
        torch.cat(
            [
                sample(maps[start + i : start + i + 1], xy[known[i]])
                for i, xy in enumerate(batch[key])
            ]
        )
        for start, key, known in ((0, "xy_a", known_a), (count, "xy_b", known_b))
    )
    sides = list(zip(known_a, known_b, strict=True))
    chosen = [rows[:, None] & columns[None] for rows, columns in sides]
    shape = [(int(rows.sum()), int(columns.sum())) for rows, columns in sides]
    positive, within = (
        torch.block_diag(
            *(each[c].view(n) for each, c, n in zip(tables, chosen, shape, strict=True))
        )
        for tables in (batch["positive"], ~batch["negative"])
    )
    negative = ~within  # also across pairs: another photograph shows another point
    similarity = a @ b.T
    forward, numbers = circle_loss(similarity, positive, negative)
    backward, more = circle_loss(similarity.T, positive.T, negative.T)
    loss = (forward + backward) / 2
    means = {key: (numbers[key] + more[key]) / 2 for key in ("positive", "negative", "rows")}
    return loss, {"loss": loss.item(), **means}


def train_dense(
    data: TrainData,
    output: Path,
    preset: str,
    init: str | Path | None,
    run: RunOptions,
    schedule: dict[str, Any],
    *,
    detector: str | Path = "sobelnet",
    dim: int = 128,
    width: int = 1,
) -> FitResult:
    """Train ``desnet`` on the keypoint candidates of a detector; see ``train``.

    Validation: the share of repeated keypoints of held-out views that mutual nearest descriptors
    match correctly.

    Args:
        detector: weights (a name or a file) of a network image -> score map, which finds the
            candidates.
        dim: descriptor dimension, 128 or 64.
        width: factor of the network's channels.
    """
    settings = with_schedule(choose(DESNET_RECIPES, preset), schedule)
    finder = load(detector)
    spec = spec_of(finder)
    if not isinstance(spec, DetectorSpec) or spec.angles:
        raise ValueError(
            f"{detector} holds a {type(finder).__name__}; candidates are found by keynet, "
            "keynet-tiny or sobelnet"
        )
    training, held_out = data.photographs()
    detect = peak_detector(fused(finder), CANDIDATE_POOL, window=CANDIDATE_WINDOW)
    scenes = read_scenes(data.reconstructions) if data.reconstructions else []
    views = PRESETS["dense-upright" if scenes else "dense"]

    def make_batches(length: int) -> Dataset:
        warps = CandidatePairs(training, detect, views, seed=settings.seed, length=length)
        if not scenes:
            return warps
        crops = TrackCrops(scenes, detect, views, seed=settings.seed, length=length)
        return Mixture(warps, crops, TRACK_SHARE, seed=settings.seed)

    make_batches(1)[0]  # a folder without any texture is found out before the training starts
    count = min(MATCHING_PAIRS, VIEWS_PER_PHOTO * len(held_out))
    checks = CandidatePairs(
        held_out,
        peak_detector(fused(finder)),
        dataclasses.replace(views, size=MATCHING_SIZE),
        seed=VALIDATION_SEED,
        length=count,
        count=MATCHING_KEYPOINTS,
    )
    held_out_pairs = [{**checks[i], "H_ab": checks.homography(i)} for i in range(count)]
    posed = _posed_check(data, finder)

    def make_network() -> nn.Module:
        return DesNet(dim=dim, width=width)

    net = initialized(make_network, settings.seed)
    _start_from(net, init)

    def validate(network: nn.Module) -> float:
        device = next(network.parameters()).device

        def describe(images: Tensor) -> Tensor:
            return network(images.to(device)).float().cpu()

        scores = []
        for pair in held_out_pairs:
            xy_a, xy_b = (pair[key][~pair[key][:, 0].isnan()] for key in ("xy_a", "xy_b"))
            maps = describe(torch.stack([pair["image_a"], pair["image_b"]]))
            a, b = sample(maps[:1], xy_a), sample(maps[1:], xy_b)
            scores.append(correctly_matched(a, b, xy_a, xy_b, pair["H_ab"]))
        score = mean_of_known(scores)
        return score if posed is None else (score + posed.dense(describe, dim)) / 2

    identity = {
        "model": "desnet",
        "preset": preset,
        # the detector's weights, not its name: retrained in between, it would give other candidates
        "detector": weights_checksum(finder),
        "dim": dim,
        "width": width,
        "init": Path(init or "").name,
        **_identity_of(data, len(training) + len(held_out)),
    }
    task = Task(make_batches, candidate_loss, validate, "matching", identity)
    return fit_and_save(net, task, settings, output, run, make_network=make_network, half=True)
