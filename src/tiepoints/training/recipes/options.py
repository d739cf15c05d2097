"""Options of networks: which network has which, and how they change network and recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..losses import WINDOW_WEIGHTS, WINDOWS
from ..presets import CODE_LOSS, DESCRIPTORS, MODELS, REKD_SIZES, PatchRecipe, Recipe

DETECTORS = (*MODELS, *REKD_SIZES)
#: Options of networks, and the networks that have them.
NETWORK_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("filters", "blocks", "levels", "kernel", "handcrafted"), ("keynet",)),
    "loss": ("keynet", "keynet-tiny"),
    **dict.fromkeys(("windows", "window_weights", "base"), DETECTORS),
    **dict.fromkeys(("patch_size", "max_angle"), DETECTORS),
    "num_training_data": (*DETECTORS, *DESCRIPTORS),
    "teacher": tuple(DESCRIPTORS),
    "on_device": (*DESCRIPTORS, "desnet", "affnet"),
    **dict.fromkeys(("group_size", "dims", "orientation_balance"), tuple(REKD_SIZES)),
    **dict.fromkeys(("detector", "dim", "width"), ("desnet",)),
    "descriptor": ("affnet",),
}
#: Option -> argument of ``KeyNet``.
KEYNET_ARGUMENTS = {
    "filters": "num_filters",
    "blocks": "num_blocks",
    "levels": "num_levels",
    "kernel": "kernel_size",
    "handcrafted": "handcrafted",
}


def check_options(name: str, options: dict[str, Any]) -> None:
    """Check that a network has these options.

    Raises:
        ValueError: it does not; the message names the networks that do.
    """
    for option in options:
        networks = NETWORK_OPTIONS.get(option, ())
        if name not in networks:
            raise ValueError(f"{option} is an option of {' and '.join(networks) or 'no network'}")


def keynet_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``KeyNet`` for the options of a network."""
    return {KEYNET_ARGUMENTS[key]: options[key] for key in KEYNET_ARGUMENTS if key in options}


def with_options(recipe: Recipe, preset: str, options: dict[str, Any]) -> Recipe:
    """Change the loss and the pairs of a recipe.

    Args:
        recipe: of the preset.
        preset: its name, for messages.
        options: of the network; those that change only the network are ignored.

    Raises:
        ValueError: an option does not suit the loss of the preset, or is out of range.
    """
    recipe = _with_loss(recipe, preset, options)
    given = [key for key in ("windows", "window_weights", "base") if key in options]
    if given and recipe.kind == "gaussian":
        raise ValueError(
            f"{given[0]} is an option of the M-SIP loss, and preset {preset} uses the Gaussian "
            "loss; use another preset, such as msip"
        )
    loss = dict(recipe.loss)
    if "windows" in options or "window_weights" in options:
        windows = tuple(options.get("windows", WINDOWS))
        loss["windows"] = windows
        loss["weights"] = msip_weights(windows, options.get("window_weights"))
    if "base" in options:
        loss["base"] = options["base"]
        if not loss["base"] > 1:
            raise ValueError(f"base must be above 1, got {loss['base']}")
    views = dict(recipe.views)
    if "patch_size" in options:
        views["size"] = options["patch_size"]
    if "max_angle" in options:
        views["rotation"] = float(options["max_angle"])
        if not 0 <= views["rotation"] <= 180:
            raise ValueError(f"max_angle must lie in 0..180 degrees, got {options['max_angle']}")
    return dataclasses.replace(
        recipe,
        loss=loss,
        views=views,
        num_pairs=options.get("num_training_data", recipe.num_pairs),
        balance=options.get("orientation_balance", recipe.balance),
    )


def with_patch_options(recipe: PatchRecipe, options: dict[str, Any]) -> PatchRecipe:
    """Change the data and the teacher of the recipe of a patch descriptor.

    Raises:
        ValueError: options that exclude each other.
    """
    on_device = bool(options.get("on_device", recipe.on_device))
    if on_device and "num_training_data" in options:
        raise ValueError(
            "on_device draws new patches in every step; give it or num_training_data, not both"
        )
    teacher = options.get("teacher", recipe.teacher)
    return dataclasses.replace(
        recipe,
        teacher=None if teacher == "none" else teacher,
        num_views=options.get("num_training_data", 0 if on_device else recipe.num_views),
        on_device=on_device,
    )


def _with_loss(recipe: Recipe, preset: str, options: dict[str, Any]) -> Recipe:
    """The recipe with the paper's M-SIP loss or that of the published code."""
    loss = options.get("loss")
    if loss is None:
        return recipe
    if loss not in ("paper", "code"):
        raise ValueError(f"loss must be paper or code, got {loss!r}")
    if preset not in ("paper", "msip"):
        raise ValueError(f"loss is an option of presets paper and msip, not of {preset}")
    if loss == "paper":
        return dataclasses.replace(recipe, kind="paper", loss={})
    return dataclasses.replace(recipe, kind="msip", loss=dict(CODE_LOSS))


def msip_weights(windows: Sequence[int], weights: Sequence[float] | None) -> tuple[float, ...]:
    """Weights of M-SIP windows; default: those of the paper for its window sizes.

    Raises:
        ValueError: windows that are no positive integers or repeated, sizes without a published
            weight, or another number of weights.
    """
    if not windows or min(windows) < 2 or len(set(windows)) < len(windows):
        raise ValueError(f"windows must be different sizes from 2 pixels up, got {windows}")
    if weights is not None:
        if len(weights) != len(windows):
            raise ValueError(f"{len(windows)} windows but {len(weights)} window_weights")
        return tuple(float(weight) for weight in weights)
    published = dict(zip(WINDOWS, WINDOW_WEIGHTS, strict=True))
    unknown = [window for window in windows if window not in published]
    if unknown:
        raise ValueError(
            f"the paper has no weight for windows of {unknown[0]} px (only for "
            f"{', '.join(map(str, WINDOWS))}); give window_weights"
        )
    return tuple(published[window] for window in windows)
