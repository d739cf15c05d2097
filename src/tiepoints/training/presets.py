"""Presets of all trainings: data, loss and schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..models.keynet import KeyNet
from ..models.patchnets import HardNet, HardNetContext, HardNetLight, HyNet, PatchNet, SOSNet
from ..models.sobelnet import SobelNet
from .loop import FitSettings


@dataclass(frozen=True)
class Recipe:
    """Training of a detector.

    Attributes:
        pairs: name of the pair preset (``synthetic.PRESETS``).
        fit: schedule.
        views: fields of ``PairSettings`` that replace those of ``pairs``; ``rotation`` also of
            ``checks``.
        num_pairs: number of different training pairs, which are written to a file first; 0: new
            pairs in every step.
        kind: loss of the score map: ``msip``, ``paper`` or ``gaussian``.
        loss: options of ``losses.msip_loss``, ``losses.paper_msip_loss`` or
            ``losses.gaussian_loss``.
        structure: see ``KeyNet``.
        structure_penalty: weight of ``losses.off_structure``, with ``msip``.
        anchored: use ``shapes.WithShapes``; the Gaussian loss then weights peaks by
            ``structure.anchor_weight``.
        shapes, pull: ``share`` and ``pull`` of ``shapes.WithShapes``, if ``anchored``.
        balance: weight of the orientation loss (REKD: 100).
        peaks_only: weight the orientation loss by the closeness of the score to a local maximum.
        variant: of ``REKD``.
        score: validation score: ``structure`` (``validation.validation_score``) or ``paper``
            (``validation.paper_score``).
        checks, check_pairs, check_size: pair preset, number and side in pixels of the pairs for
            validation.
    """

    pairs: str = "default"
    fit: FitSettings = field(default_factory=FitSettings)
    views: dict[str, Any] = field(default_factory=dict)
    num_pairs: int = 0
    kind: str = "msip"
    loss: dict[str, Any] = field(default_factory=lambda: {"visibility": "half", "factor": 500.0})
    structure: float = 0.0
    structure_penalty: float = 0.0
    anchored: bool = False
    shapes: float = 0.0
    pull: float = 0.0
    balance: float = 0.0
    peaks_only: bool = True
    variant: str = "default"
    score: str = "structure"
    checks: str = "default"
    check_pairs: int = 60
    check_size: int = 320


#: Options of ``msip_loss`` in Key.Net's published TensorFlow code.
CODE_LOSS: dict[str, Any] = {"weighting": "softmax", "visibility": "any", "empty": "ignore"}
#: Training pairs of the Key.Net paper (5.1), its epochs, and the epoch of the lower learning rate
#: (5.3).
PAPER_PAIRS, PAPER_EPOCHS, PAPER_DECAY_EPOCH = 9000, 45, 30
#: Key.Net on structure: M-SIP, scores times the fourth root of corner strength, and a penalty on
#: peaks off structure (docs/training.md).
_ON_STRUCTURE = Recipe(
    pairs="layers",
    fit=FitSettings(learning_rate=1.5e-3, average=0.98, validate_every=50),
    structure=0.25,
    structure_penalty=150.0,
    anchored=True,
    checks="layers",
)
RECIPES: dict[str, Recipe] = {
    "default": _ON_STRUCTURE,
    # Smaller localization error at corners, with SobelNet's loss and synthetic shapes, but lower
    # repeatability (docs/diary.md).
    "corners": Recipe(
        pairs="layers",
        fit=FitSettings(learning_rate=5e-3, validate_every=50),
        kind="gaussian",
        loss={},
        anchored=True,
        shapes=0.2,
        pull=1.0,
        checks="layers",
    ),
    "msip": Recipe(),
    # Paper 5.1 and 5.3: 9,000 pairs for training and 3,000 for validation, written once; batches of
    # 32, Adam 1e-3, halved after 30 of 45 epochs; validation every third epoch, as in the code. The
    # loss is that of the code: with the paper's formula all scores become 0 (docs/training.md).
    "paper": Recipe(
        pairs="keynet-paper",
        num_pairs=PAPER_PAIRS,
        fit=FitSettings(
            steps=PAPER_EPOCHS * PAPER_PAIRS // 32,
            batch_size=32,
            learning_rate=1e-3,
            warmup=0,
            decay="step",
            decay_at=PAPER_DECAY_EPOCH / PAPER_EPOCHS,
            final_rate=0.5,
            clip=0.0,
            average=0.0,
            validate_every=3 * PAPER_PAIRS // 32,
        ),
        loss=CODE_LOSS,
        score="paper",
        checks="keynet-paper",
        check_pairs=3000,
        check_size=192,
    ),
    # Quick test whether a training works with the given images.
    "smoke": dataclasses.replace(
        _ON_STRUCTURE, fit=dataclasses.replace(_ON_STRUCTURE.fit, learning_rate=3e-3, steps=150)
    ),
}
#: Key.Net light starts from the weights of Key.Net, with a small learning rate.
LIGHT_RECIPES: dict[str, Recipe] = {
    "default": dataclasses.replace(
        _ON_STRUCTURE,
        fit=dataclasses.replace(_ON_STRUCTURE.fit, learning_rate=3e-4, validate_every=20),
    ),
    **{name: RECIPES[name] for name in ("msip", "smoke")},
}
#: Tiny-Key.Net's keypoints lie on structure with Key.Net's published loss alone; with its few
#: parameters it allows a larger learning rate.
_TINY = Recipe(fit=FitSettings(learning_rate=2e-2))
TINY_RECIPES: dict[str, Recipe] = {
    "default": _TINY,
    "msip": _TINY,
    "paper": RECIPES["paper"],
    "smoke": dataclasses.replace(
        _TINY, fit=dataclasses.replace(_TINY.fit, steps=300, validate_every=100)
    ),
}
#: SobelNet's paper gives no schedule. ``default`` uses its Gaussian loss, ``msip`` Key.Net's loss
#: for comparison.
SOBELNET_RECIPES: dict[str, Recipe] = {
    "default": Recipe(
        fit=FitSettings(learning_rate=5e-3, validate_every=25), kind="gaussian", loss={}
    ),
    "msip": Recipe(fit=FitSettings(validate_every=25)),
    "smoke": Recipe(
        fit=FitSettings(learning_rate=5e-3, steps=150, validate_every=50), kind="gaussian", loss={}
    ),
}

MODELS: dict[str, Callable[[], KeyNet | SobelNet]] = {
    "keynet": KeyNet,
    "keynet-light": KeyNet.light,
    "keynet-tiny": KeyNet.tiny,
    "sobelnet": SobelNet,
}
#: The published size, and one of a ninth of the cost.
REKD_SIZES: dict[str, dict[str, Any]] = {
    "rekd": {"group": 36, "dims": (2, 2, 2)},
    "rekd-light": {"group": 12, "dims": (2, 2, 2)},
}
#: Fewer and smaller pairs for validation, because REKD's feature maps of all orientations are
#: large.
_REKD = Recipe(
    pairs="turns",
    fit=FitSettings(batch_size=4, learning_rate=3e-3, warmup=25, average=0.97, validate_every=50),
    loss={"visibility": "half", "factor": 100.0},
    balance=600.0,
    checks="turns",
    check_pairs=30,
    check_size=256,
)
REKD_RECIPES: dict[str, Recipe] = {
    "default": _REKD,
    # Published code: 20 epochs of 9,000 pairs, Adam 1e-3, halved after ten epochs, weight decay 0.1
    # on all parameters, 101 larger pairs for validation; without its truncation of angles to whole
    # bins.
    "paper": dataclasses.replace(
        _REKD,
        pairs="rekd",
        num_pairs=9000,
        balance=100.0,
        peaks_only=False,
        variant="published",
        fit=FitSettings(
            steps=11_240,
            batch_size=16,
            learning_rate=1e-3,
            warmup=0,
            decay="step",
            final_rate=0.5,
            weight_decay=0.1,
            clip=0.0,
            average=0.0,
            validate_every=562,
        ),
        loss={"weighting": "minmax", "visibility": "any", "empty": "zero", "detach_max": False},
        checks="rekd",
        check_pairs=101,
        check_size=384,
    ),
    "smoke": dataclasses.replace(_REKD, fit=dataclasses.replace(_REKD.fit, steps=100)),
}


@dataclass(frozen=True)
class PatchRecipe:
    """Training of a patch descriptor.

    Attributes:
        fit: schedule; ``batch_size`` counts items: views with ``PatchSettings.per_view`` pairs
            each, or whole batches of ``PatchBatches``.
        dropout: of the network, before its last convolution.
        pairs, augment: ``batch`` and ``augment`` of ``PatchBatches``, for published patches.
        teacher: name or file of a trained network whose descriptors are approached; None: none.
        teacher_weight: weight of the squared distance to them in the loss, or, of
            ``hardnet-context``, of the squared differences of cosines.
        num_views: number of different pairs of views, whose patches are written to a file first;
            0: new ones in every step.
        on_device: draw the patches on the training device (``patch_sampler``).
    """

    fit: FitSettings
    dropout: float = 0.1
    pairs: int = 1024
    augment: str = "fliprot"
    teacher: str | None = None
    teacher_weight: float = 2.0
    num_views: int = 0
    on_device: bool = False


DESCRIPTORS: dict[str, type[PatchNet]] = {
    "hardnet": HardNet,
    "hardnet-light": HardNetLight,
    "hardnet-context": HardNetContext,
    "hynet": HyNet,
    "sosnet": SOSNet,
}
#: Eight views of 48 pairs per step: 384 pairs, each with 47 negatives from its own view.
PATCH_FIT = FitSettings(
    batch_size=8, learning_rate=2e-3, warmup=30, clip=0.0, average=0.99, validate_every=100
)
#: One item is a whole batch of published patches. HardNet: 10 epochs of 5 million pairs, SGD with a
#: learning rate that decreases linearly from 10 (as published) to 0.
_HARDNET = FitSettings(
    steps=48_830,
    batch_size=1,
    optimizer="sgd",
    learning_rate=10.0,
    warmup=0,
    decay="linear",
    final_rate=0.0,
    weight_decay=1e-4,
    clip=0.0,
    average=0.0,
    validate_every=2_000,
)
#: 200 epochs of Liberty, Adam with a constant learning rate. SOSNet's training code is not
#: published; HyNet's repository contains its loss.
_HYNET = FitSettings(
    steps=88_000,
    batch_size=1,
    learning_rate=1e-2,
    warmup=0,
    final_rate=1.0,
    weight_decay=0.0,
    clip=0.0,
    average=0.0,
    validate_every=2_000,
)
_SMOKE_FIT = dataclasses.replace(PATCH_FIT, steps=100, validate_every=50)
#: The light network learns HardNet's descriptors and its task together.
_LIGHT = PatchRecipe(
    dataclasses.replace(PATCH_FIT, batch_size=12, learning_rate=4e-3, validate_every=250),
    dropout=0.0,
    teacher="hardnet",
    num_views=3_000,
)
#: Its layers of the patch are those of the teacher.
_CONTEXT = PatchRecipe(PATCH_FIT, dropout=0.0, teacher="hardnet-light", teacher_weight=20.0)
PATCH_RECIPES: dict[str, dict[str, PatchRecipe]] = {
    "default": {
        **dict.fromkeys(DESCRIPTORS, PatchRecipe(PATCH_FIT)),
        "hardnet-light": _LIGHT,
        "hardnet-context": _CONTEXT,
    },
    "smoke": {
        **dict.fromkeys(DESCRIPTORS, PatchRecipe(_SMOKE_FIT)),
        "hardnet-light": dataclasses.replace(_LIGHT, fit=_SMOKE_FIT, num_views=0),
        "hardnet-context": dataclasses.replace(_CONTEXT, fit=_SMOKE_FIT),
    },
    "paper": {
        "hardnet": PatchRecipe(_HARDNET, dropout=0.3),
        "hynet": PatchRecipe(_HYNET, dropout=0.3, pairs=512, augment="turns"),
        "sosnet": PatchRecipe(_HYNET, dropout=0.1, pairs=512, augment="turns"),
    },
}


@dataclass(frozen=True)
class ShapeRecipe:
    """Training of affine shapes.

    Attributes:
        fit: schedule; ``batch_size`` counts items, as in ``PatchRecipe``.
        descriptor: name or file of the trained patch descriptor that describes the patches.
        penalty: weight of the mean elongation of the shapes.
    """

    fit: FitSettings
    descriptor: str = "hardnet-light"
    penalty: float = 0.01


_SHAPE_FIT = FitSettings(
    batch_size=8, learning_rate=3e-3, warmup=30, average=0.99, validate_every=100
)
SHAPE_RECIPES: dict[str, ShapeRecipe] = {
    "default": ShapeRecipe(_SHAPE_FIT),
    "smoke": ShapeRecipe(dataclasses.replace(_SHAPE_FIT, steps=100, validate_every=50)),
}

#: Presets of ``train_dense``; the paper gives no schedule.
DESNET_RECIPES: dict[str, FitSettings] = {
    "default": FitSettings(
        batch_size=8, learning_rate=3e-3, warmup=50, average=0.99, validate_every=100
    ),
    "smoke": FitSettings(
        batch_size=8, learning_rate=3e-3, warmup=50, average=0.99, steps=200, validate_every=100
    ),
}
