"""Training of descriptors: HardNet, HyNet and SOSNet on patches, DesNet on keypoint candidates."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...datasets.candidates import CANDIDATE_POOL, CANDIDATE_WINDOW, CandidatePairs
from ...datasets.crop_sampler import CropSampler
from ...datasets.patch_pairs import PatchPairs, PatchSettings, peak_detector
from ...datasets.patch_sampler import PatchSampler
from ...datasets.patch_sets import PatchBatches, PatchSet, open_hpatches, open_phototour
from ...datasets.reconstructions import TrackScene
from ...datasets.stored_patches import TARGETS, StoredPatches, write_patches, write_targets
from ...datasets.synthetic import PRESETS, PairSettings
from ...datasets.tracks import Mixture, TrackCrops, TrackPatches
from ...describe import DESCRIBE_CHUNK
from ...detect import PUBLISHED, DetectOptions, ScoreMapDetector
from ...device import choose_device, fast_bfloat16
from ...models.desnet import DesNet, sample, sample_batch
from ...models.patchnets import HardNetContext, HardNetLight, PatchNet, parts_of, unit
from ...models.spec import DetectorSpec, fused, spec_of
from ...pyramid import build_pyramid
from ...weights import load, weights_checksum
from ..loop import FitResult, FitSettings, Task
from ..losses import circle_loss, hardnet_loss, hynet_loss, sosnet_loss
from ..presets import DESCRIPTORS, DESNET_RECIPES, PATCH_RECIPES, PatchRecipe
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
    TrainJob,
    as_folders,
    both_views,
    choose,
    companion,
    data_record,
    fit_and_save,
    init_record,
    initialized,
    load_partial_state_dict,
    with_schedule,
)
from .options import with_patch_options

logger = logging.getLogger(__name__)
#: With reconstructions: fraction of the pairs that come from them, and keypoints per image.
TRACK_SHARE = 0.5
TRACK_KEYPOINTS = 1500
#: Maximum number of pairs of views per photograph in validation.
VIEWS_PER_PHOTO = 4


def descriptor_loss(name: str, net: nn.Module, both: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Published loss of a descriptor on patches (2N,1,P,P) of N points: the N of one view, then
    those of the other.
    """
    if name == "hynet":
        return hynet_loss(*net(both, raw=True).float().chunk(2))
    return (sosnet_loss if name == "sosnet" else hardnet_loss)(*net(both).float().chunk(2))


def taught_loss(
    name: str, net: nn.Module, both: Tensor, targets: Tensor, weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Published loss of a descriptor, plus the mean squared distance to the unit descriptors
    ``targets`` (2N,D) of a teacher, times ``weight``.
    """
    raw = net(both, raw=True).float()
    vectors = unit(raw)
    if name == "hynet":
        value, metrics = hynet_loss(*raw.chunk(2))
    else:
        value, metrics = (sosnet_loss if name == "sosnet" else hardnet_loss)(*vectors.chunk(2))
    distance = (vectors - targets).square().sum(dim=1).mean()
    value = value + weight * distance
    return value, {**metrics, "loss": value.item(), "distance": distance.item()}


def context_loss(
    vectors: Tensor, taught: Sequence[Tensor], weight: float
) -> tuple[Tensor, dict[str, float]]:
    """HardNet's loss of the descriptors (2N,128) of a ``HardNetContext``, plus ``weight`` times the
    mean squared difference of the cosines of all pairs of patches from those of a teacher's
    descriptors ``taught``, (2N,D) for each patch of a keypoint.
    """
    value, metrics = hardnet_loss(*vectors.chunk(2))
    differences = [
        (part @ part.T - given @ given.T).square().mean()
        for part, given in zip(parts_of(vectors), taught, strict=True)
    ]
    difference = torch.stack(differences).mean()
    value = value + weight * difference
    return value, {**metrics, "loss": value.item(), "difference": difference.item()}


def _for_inference(net: nn.Module, device: torch.device) -> nn.Module:
    """A patch descriptor for inference on a device."""
    half = fast_bfloat16(device)
    return net.fused(torch.bfloat16 if half else torch.float32).to(device)  # type: ignore[operator]


@torch.inference_mode()
def described(net: nn.Module, patches: Tensor) -> Tensor:
    """Descriptors (N,D) of patches (N,1,P,P), some at a time."""
    return torch.cat([net(part) for part in patches.split(DESCRIBE_CHUNK)])


def open_patches(folder: str | Path) -> list[PatchSet]:
    """Open the published patches of a folder: a PhotoTour set, a folder of such sets, or HPatches.

    Raises:
        FileNotFoundError, DataError: see ``patch_sets``.
    """
    folder = Path(folder)
    if (folder / "info.txt").is_file():
        return [open_phototour(folder)]
    tours = sorted(path.parent for path in folder.glob("*/info.txt"))
    return [open_phototour(tour) for tour in tours] if tours else open_hpatches(folder)


def train_patches(name: str, job: TrainJob) -> FitResult:
    """Train a patch descriptor (``presets.DESCRIPTORS``); see ``train``.

    The validation score is the fraction of the repeated Key.Net keypoints of held-out pairs that
    mutual nearest neighbors match correctly.
    """
    data, recipe = job.data, _patch_recipe(name, job)
    training, held_out = data.photographs()
    scenes = data.scenes(held_out)
    views = PRESETS["patches-upright" if scenes else "patches"]
    reach = DESCRIPTORS[name].spec.reach
    teacher = None if recipe.teacher is None else patch_descriptor(recipe.teacher, "teacher")
    if len(reach) > 1 and not isinstance(teacher, HardNetLight):
        raise ValueError(
            f"{name} takes the layers of its teacher, a HardNetLight such as hardnet-light; "
            f"{recipe.teacher} is none"
        )
    fit = recipe.fit
    patches = PatchSettings(reach=reach)
    if recipe.on_device:
        make_batches = device_batches(job, fit, training, scenes, views, patches)
        fit, job = with_whole_batches(fit, job)
    else:
        make_batches = _patch_batches(data, recipe, training, scenes, views, patches)
    make_batches(1)[0]  # raises for photographs without texture before the training starts
    if recipe.num_views:
        made_from = [
            *(recipe.fit.seed, data_identity(data, training), data_identity(data, held_out)),
            *(dataclasses.asdict(views), dataclasses.asdict(patches)),
        ]
        # descriptors of the surroundings are not stored
        stored = teacher if len(reach) == 1 else None
        make_batches = _stored_batches(job, recipe, make_batches, made_from, stored)

    def make_network() -> nn.Module:
        return DESCRIPTORS[name](dropout=recipe.dropout)

    taught_by: nn.Module | None = None  # the teacher on the training device

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        both = torch.cat([batch[key].flatten(0, 1) for key in ("anchor", "positive")])
        both = both.contiguous(memory_format=torch.channels_last)
        if len(reach) > 1:
            nonlocal taught_by
            assert teacher is not None
            taught_by = taught_by or _for_inference(teacher, both.device)
            taught = [described(taught_by, patches) for patches in both.split(1, dim=1)]
            return context_loss(network(both).float(), taught, recipe.teacher_weight)
        if teacher is None:
            return descriptor_loss(name, network, both)
        if TARGETS[0] in batch:
            targets = torch.cat([batch[key].flatten(0, 1) for key in TARGETS]).float()
        else:
            targets = described(teacher.to(both.device), both)
        return taught_loss(name, network, both, targets, recipe.teacher_weight)

    validate = patch_validation(data, held_out, views, reach)

    def make_started() -> nn.Module:
        net = make_network()
        if isinstance(net, HardNetContext) and isinstance(teacher, HardNetLight):
            net.start_from(teacher)
        return net

    net = initialized(make_started, recipe.fit.seed)
    load_init(net, job.init)
    identity = {
        "model": name,
        "preset": job.preset,
        "patches": Path(data.patches or "").name,
        **({} if teacher is None else {"teacher": weights_checksum(teacher)}),
        **({"views": recipe.num_views} if recipe.num_views else {}),
        **({"views_per_batch": recipe.fit.batch_size} if recipe.on_device else {}),
        **init_record(job.init),
        **data_identity(data, [*training, *held_out]),
    }
    task = Task(make_batches, loss, validate, "matching", identity)
    return fit_and_save(net, task, fit, job, make_network=make_network, half=True)


def _patch_recipe(name: str, job: TrainJob) -> PatchRecipe:
    """Recipe of the preset for the data of the job.

    Raises:
        ValueError: the preset or the data do not fit together.
    """
    recipes = choose(PATCH_RECIPES, job.preset)
    if name not in recipes:
        raise ValueError(f"{name} has no preset {job.preset}; it is not in a paper")
    recipe = recipes[name]
    if job.data.patches is not None and job.data.reconstructions:
        raise ValueError(
            "published patches and reconstructions exclude each other; give --patches or "
            "--reconstructions"
        )
    if job.preset == "paper" and job.data.patches is None:
        raise ValueError(
            "the paper preset trains on published patches; give a folder of PhotoTour or HPatches "
            "patches"
        )
    fit = recipe.fit
    if job.data.patches is not None and job.preset != "paper":
        fit = dataclasses.replace(fit, batch_size=1)
    recipe = with_patch_options(recipe, job.options)
    if job.data.patches is not None and len(DESCRIPTORS[name].spec.reach) > 1:
        raise ValueError(
            f"{name} sees the surroundings of patches, which published patches lack; give "
            "photographs or reconstructions instead of --patches"
        )
    if recipe.on_device and job.data.patches is not None:
        raise ValueError("on_device draws patches of photographs; give it or --patches, not both")
    if recipe.num_views and job.data.patches is not None:
        recipe = dataclasses.replace(recipe, num_views=0)  # they are in files already
    return dataclasses.replace(recipe, fit=with_schedule(fit, job.schedule))


def patch_descriptor(name: str, role: str) -> PatchNet:
    """The network of a patch descriptor that sees no surroundings, for inference.

    Args:
        name: of embedded weights or a file.
        role: what it is used as, for the message.

    Raises:
        ValueError: another network.
    """
    net = load(name)
    if not isinstance(net, PatchNet):
        raise ValueError(
            f"the {role} must be a patch descriptor; {name} contains a {type(net).__name__}"
        )
    if len(net.spec.reach) > 1:
        raise ValueError(f"the {role} must not see the surroundings of patches, as {name} does")
    return net.requires_grad_(False)


def _stored_batches(
    job: TrainJob,
    recipe: PatchRecipe,
    make_batches: Callable[[int], Dataset],
    made_from: list[Any],
    teacher: nn.Module | None,
) -> Callable[[int], Dataset]:
    """Length -> training data from a file with the patches of ``recipe.num_views`` pairs of views,
    which is written next to the weights unless it exists.
    """
    path = companion(job.output, "pairs") / "patches.npy"
    write_patches(
        path,
        make_batches(recipe.num_views),
        identity=made_from,
        workers=job.run.workers,
        progress=job.run.progress,
    )
    targets = None if teacher is None else path.with_name("targets.npy")
    if teacher is not None and targets is not None:
        net = _for_inference(teacher, torch.device("cpu"))
        write_targets(
            *(targets, path, lambda patches: described(net, patches)),
            identity=[made_from, weights_checksum(teacher)],
            progress=job.run.progress,
        )

    def stored(length: int) -> Dataset:
        return StoredPatches(path, targets, seed=recipe.fit.seed, length=length)

    return stored


def _patch_batches(
    data: TrainData,
    recipe: PatchRecipe,
    photos: list[Path],
    scenes: list[TrackScene],
    views: PairSettings,
    patches: PatchSettings,
) -> Callable[[int], Dataset]:
    """Length -> training data of a patch descriptor."""
    seed = recipe.fit.seed
    sets = None if data.patches is None else open_patches(data.patches)
    net = fused(load("keynet-tiny"))

    def make_batches(length: int) -> Dataset:
        if sets is not None:
            return PatchBatches(
                sets, batch=recipe.pairs, length=length, seed=seed, augment=recipe.augment
            )
        warps = PatchPairs(
            photos, peak_detector(net), patches, views=views, seed=seed, length=length
        )
        if not scenes:
            return warps
        detect = peak_detector(net, TRACK_KEYPOINTS)
        tracks = TrackPatches(scenes, detect, patches, seed=seed, length=length)
        return Mixture(warps, tracks, TRACK_SHARE, seed=seed)

    return make_batches


def training_device(job: TrainJob) -> torch.device:
    """The device that data are drawn on.

    Raises:
        ValueError: several devices.
    """
    if job.run.devices > 1:
        raise ValueError("data are drawn on one device; give --on-device or --devices, not both")
    return choose_device(job.run.device)


def device_batches(
    job: TrainJob,
    fit: FitSettings,
    photos: list[Path],
    scenes: list[TrackScene],
    views: PairSettings,
    patches: PatchSettings | None = None,
) -> Callable[[int], Dataset]:
    """Length -> batches of patches of ``fit.batch_size`` pairs of views that are drawn on the
    training device.

    Raises:
        ValueError: several devices.
    """
    device = training_device(job)
    net = load("keynet-tiny").to(device)
    sampler = PatchSampler(
        photos,
        scenes,
        peak_detector(net, TRACK_KEYPOINTS),
        device,
        views=fit.batch_size,
        share=TRACK_SHARE,
        settings=patches,
        warps=views,
        seed=fit.seed,
        threads=max(1, job.run.workers),
    )
    return sampler.with_length


def with_whole_batches(fit: FitSettings, job: TrainJob) -> tuple[FitSettings, TrainJob]:
    """Schedule and job for ``device_batches``, of which an item is a whole batch on the device."""
    run = dataclasses.replace(job.run, workers=0)
    return dataclasses.replace(fit, batch_size=1), dataclasses.replace(job, run=run)


def patch_validation(
    data: TrainData, held_out: list[Path], views: PairSettings, reach: Sequence[float]
) -> Callable[[nn.Module], float]:
    """Validation of a patch descriptor, whose patches have this ``reach``, on held-out photographs
    and, if given, reconstructions.
    """
    detector = ScoreMapDetector(
        fused(load("keynet")), DetectOptions(num_keypoints=MATCHING_KEYPOINTS, **PUBLISHED)
    )
    checks = matching_checks(
        held_out,
        lambda image: detector(build_pyramid(image))[0],
        views=dataclasses.replace(views, size=MATCHING_SIZE),
        seed=VALIDATION_SEED,
        count=min(MATCHING_PAIRS, VIEWS_PER_PHOTO * len(held_out)),
        reach=reach,
    )
    posed = posed_check(data)

    def validate(network: nn.Module) -> float:
        device = next(network.parameters()).device

        def describe(patches: Tensor) -> Tensor:
            batches = patches.split(1024)
            return torch.cat([network(batch.to(device)).float().cpu() for batch in batches])

        score = matching_score(describe, checks)
        return score if posed is None else (score + posed.patches(describe, reach=reach)) / 2

    return validate


def posed_check(data: TrainData, detector: str | nn.Module = "keynet") -> PosedCheck | None:
    """Validation on the reconstructions of the data, None without any."""
    if not data.validation_reconstructions:
        return None
    return PosedCheck(data.validation_scenes, detector)


def load_init(net: nn.Module, init: str | Path | None) -> None:
    """Initialize a network with the matching layers of other weights."""
    if init is not None:
        count = load_partial_state_dict(net, load(init), str(init))
        logger.info("%d tensors loaded from %s", count, init)


def data_identity(data: TrainData, photos: list[Path]) -> dict[str, Any]:
    """Identity of the data in the checkpoint: names of folders, so that they may be moved."""
    sources = [data.patches, *as_folders(data.reconstructions)]
    sources += as_folders(data.validation_reconstructions)
    identity: dict[str, Any] = {"photos": len(photos), "files": data_record(photos, *sources)}
    if data.reconstructions:
        names = (folder.name for folder in as_folders(data.reconstructions))
        identity["reconstructions"] = ",".join(names)
    return identity


def candidate_loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Circle loss of a dense descriptor on a batch of ``CandidatePairs``, mean of both directions.

    Candidates of other pairs in the batch are negatives.
    """
    maps = network(both_views(batch)).float()
    valid = [~batch[key][..., 0].isnan() for key in ("xy_a", "xy_b")]  # (B,N)
    xy = torch.cat([batch["xy_a"], batch["xy_b"]])
    a, b = (
        vectors[mask]
        for vectors, mask in zip(sample_batch(maps, xy.nan_to_num()).chunk(2), valid, strict=True)
    )
    rows, columns = (mask.flatten() for mask in valid)
    positive, not_negative = (
        torch.block_diag(*table)[rows][:, columns]
        for table in (batch["positive"], ~batch["negative"])
    )
    negative = ~not_negative  # candidates of different photographs are negatives
    similarity = a @ b.T
    forward, metrics = circle_loss(similarity, positive, negative)
    backward, backward_metrics = circle_loss(similarity.T, positive.T, negative.T)
    loss = (forward + backward) / 2
    keys = ("positive", "negative", "rows")
    means = {key: (metrics[key] + backward_metrics[key]) / 2 for key in keys}
    return loss, {"loss": loss.item(), **means}


def train_dense(
    job: TrainJob,
    *,
    detector: str | Path = "sobelnet",
    dim: int = 128,
    width: int = 1,
    on_device: bool = False,
) -> FitResult:
    """Train ``desnet`` on the keypoint candidates of a detector; see ``train``.

    The validation score is the fraction of the repeated keypoints of held-out pairs that mutual
    nearest neighbors match correctly.

    Args:
        job: data, files and options.
        detector: weights (a name or a file) of a score-map network, which detects the candidates.
        dim: descriptor dimension, 128 or 64.
        width: factor of the number of channels.
        on_device: draw the views on the training device (``crop_sampler``).
    """
    data, settings = job.data, with_schedule(choose(DESNET_RECIPES, job.preset), job.schedule)
    candidate_net = load(detector)
    spec = spec_of(candidate_net)
    if not isinstance(spec, DetectorSpec) or spec.angles:
        raise ValueError(
            f"{detector} contains a {type(candidate_net).__name__}; candidates are found by "
            "keynet, keynet-light, keynet-tiny or sobelnet"
        )
    training, held_out = data.photographs()
    detect = peak_detector(fused(candidate_net), CANDIDATE_POOL, window=CANDIDATE_WINDOW)
    scenes = data.scenes(held_out)
    views = PRESETS["dense-upright" if scenes else "dense"]

    def make_batches(length: int) -> Dataset:
        warps = CandidatePairs(training, detect, views, seed=settings.seed, length=length)
        if not scenes:
            return warps
        crops = TrackCrops(scenes, detect, views, seed=settings.seed, length=length)
        return Mixture(warps, crops, TRACK_SHARE, seed=settings.seed)

    loss = candidate_loss
    if on_device:
        device = training_device(job)
        sampler = CropSampler(
            *(training, scenes, load(detector).to(device), device),
            views=settings.batch_size,
            share=TRACK_SHARE,
            warps=views,
            seed=settings.seed,
            threads=max(1, job.run.workers),
        )
        make_batches = sampler.with_length
        settings, job = with_whole_batches(settings, job)

        def loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
            return candidate_loss(network, {key: batch[key].flatten(0, 1) for key in batch})

    make_batches(1)[0]  # raises for photographs without texture before the training starts

    def make_network() -> nn.Module:
        return DesNet(dim=dim, width=width)

    validate = dense_validation(data, held_out, views, candidate_net, dim)
    net = initialized(make_network, settings.seed)
    load_init(net, job.init)
    identity = {
        "model": "desnet",
        "preset": job.preset,
        # a checksum, because a detector of the same name may have been trained again
        "detector": weights_checksum(candidate_net),
        "dim": dim,
        "width": width,
        **({"views_per_batch": sampler.views} if on_device else {}),
        **init_record(job.init),
        **data_identity(data, [*training, *held_out]),
    }
    task = Task(make_batches, loss, validate, "matching", identity)
    return fit_and_save(net, task, settings, job, make_network=make_network, half=True)


def dense_validation(
    data: TrainData, held_out: list[Path], views: PairSettings, detector: nn.Module, dim: int
) -> Callable[[nn.Module], float]:
    """Validation of a dense descriptor on held-out photographs and, if given, reconstructions."""
    count = min(MATCHING_PAIRS, VIEWS_PER_PHOTO * len(held_out))
    candidates = CandidatePairs(
        held_out,
        peak_detector(fused(detector)),
        dataclasses.replace(views, size=MATCHING_SIZE),
        seed=VALIDATION_SEED,
        length=count,
        count=MATCHING_KEYPOINTS,
    )
    pairs = [{**candidates[i], "H_ab": candidates.homography(i)} for i in range(count)]
    posed = posed_check(data, detector)

    def validate(network: nn.Module) -> float:
        device = next(network.parameters()).device

        def describe(images: Tensor) -> Tensor:
            return network(images.to(device)).float().cpu()

        scores = []
        for pair in pairs:
            xy_a, xy_b = (pair[key][~pair[key][:, 0].isnan()] for key in ("xy_a", "xy_b"))
            maps = describe(torch.stack([pair["image_a"], pair["image_b"]]))
            a, b = sample(maps[:1], xy_a), sample(maps[1:], xy_b)
            scores.append(correctly_matched(a, b, xy_a, xy_b, pair["H_ab"]))
        score = mean_of_known(scores)
        return score if posed is None else (score + posed.dense(describe, dim)) / 2

    return validate
