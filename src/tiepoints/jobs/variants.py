"""Variants of Key.Net (section 6.1 of the paper): trained on the same pairs, measured on the same
validation pairs.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..datasets.pairs import PairFile, write_pairs
from ..datasets.synthetic import PRESETS
from ..errors import WeightsError
from ..files import write_json
from ..formats.records import read_settings, without_information
from ..models.spec import fused
from ..report import published
from ..training.loop import FitResult, RunOptions
from ..training.losses import WINDOWS
from ..training.recipes import TrainData, train
from ..training.recipes.common import companion
from ..training.validation import VALIDATION_SEED, paper_score, validation_score
from ..weights import load

logger = logging.getLogger(__name__)
#: Maximum number of seeds per variant: a short training may end with a score map of zeros.
SEEDS = 4


@dataclass(frozen=True)
class Variant:
    """A variant of Key.Net.

    Attributes:
        name: in tables.
        options: of the network, see ``training.recipes.options``.
        published: repeatability (%) in the paper, if it can be read there.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    published: float | None = None

    @property
    def slug(self) -> str:
        """File name: options that differ from Key.Net's."""
        parts = []
        for key, value in sorted(self.options.items()):
            values = value if isinstance(value, tuple) else (value,)
            parts.append("-".join([key, *(v if isinstance(v, str) else f"{v:g}" for v in values)]))
        return "_".join(parts) or "full"


@dataclass(frozen=True)
class Budget:
    """Data and schedule of all variants.

    Attributes:
        preset: of the training.
        pairs: preset of the pairs.
        size: side of the pairs in pixels.
        training, validation: number of pairs.
        schedule: fields of ``FitSettings`` that replace those of the preset.
    """

    preset: str
    pairs: str
    size: int
    training: int
    validation: int
    schedule: dict[str, Any] = field(default_factory=dict)


#: ``paper``: section 5 of the paper. ``quick``: the published code's form of the loss with our
#: schedule, a few minutes per variant on a CPU; another seed moves a row by up to 17 points.
BUDGETS = {
    "quick": Budget(
        "msip",
        "keynet-paper",
        192,
        800,
        60,
        {"steps": 200, "batch_size": 4, "validate_every": 200, "average": 0.98},
    ),
    "paper": Budget("paper", "keynet-paper", 192, 9000, 3000),
}


def window_variants(windows: Sequence[tuple[int, ...]] | None = None) -> list[Variant]:
    """Figure 5 (left): sets of M-SIP windows; default: those of the figure."""
    return [
        Variant(
            "M-SIP " + " ".join(map(str, sides)),
            {} if sides == WINDOWS else {"windows": sides},
            published.FIGURE_5_WINDOWS[sides],
        )
        for sides in windows or published.FIGURE_5_WINDOWS
    ]


def filter_variants() -> list[Variant]:
    """Figure 5 (right): handcrafted filters and number of learned blocks."""
    default = {"blocks": 3, "handcrafted": "both"}
    return [
        Variant(
            f"{handcrafted} handcrafted, {blocks} blocks",
            {
                key: value
                for key, value in (("blocks", blocks), ("handcrafted", handcrafted))
                if value != default[key]
            },
        )
        for blocks in published.FIGURE_5_BLOCKS
        for handcrafted in published.FIGURE_5_HANDCRAFTED
    ]


def level_variants() -> list[Variant]:
    """Table 1a: pyramid levels inside the network."""
    return [
        Variant(
            f"{levels} level" + "s" * (levels > 1), {} if levels == 3 else {"levels": levels}, value
        )
        for levels, value in published.TABLE_1A.items()
    ]


def base_variants() -> list[Variant]:
    """Table 1b: base of the spatial softmax."""
    return [
        Variant("base e") if base == math.e else Variant(f"base {base:g}", {"base": base})
        for base in published.TABLE_1B
    ]


class VariantTrainer:
    """Trains and measures variants in a work folder, which keeps pairs, weights and results.

    Args:
        images: folder of photographs.
        work: the folder; what it contains is not computed again.
        budget: see ``Budget``.
        run: see ``RunOptions``; interrupted trainings are always resumed.

    Raises:
        FileNotFoundError, DataError: no usable photographs.
    """

    def __init__(self, images: Path, work: Path, budget: Budget, run: RunOptions):
        self.images, self.work, self.budget = images, work, budget
        self.run = replace(run, resume=True)
        work.mkdir(parents=True, exist_ok=True)
        training, self.held_out = TrainData(images).photographs()
        views = replace(PRESETS[budget.pairs], size=budget.size)
        sets = {
            "training": (training, budget.training, 0),
            "validation": (self.held_out, budget.validation, VALIDATION_SEED),
        }
        self.pairs = {name: work / f"{name}-pairs.safetensors" for name in sets}
        for name, (photos, count, seed) in sets.items():
            write_pairs(
                *(self.pairs[name], photos, views, count),
                seed=seed,
                workers=run.workers,
                preset=budget.pairs,
                progress=run.progress,
                keep=True,
            )

    def row(self, variant: Variant, network: str = "keynet") -> dict[str, Any]:
        """Train a variant unless its result is in the work folder.

        Returns:
            name, published and our repeatability (``paper``: the paper's measure,
            ``on_structure``: ``validation_score``, both in %), parameters, seed, steps, seconds and
            weights file.
        """
        path = self.work / f"{network}-{variant.slug}.json"
        settings = {
            "budget": asdict(self.budget),
            "options": variant.options,
            "pairs": {
                name: without_information(PairFile(path).info) for name, path in self.pairs.items()
            },
        }
        settings = json.loads(json.dumps(settings))
        row = read_settings(path) or {}
        if row.get("settings") != settings:
            row = {**self._measured(variant, network), "settings": settings}
            write_json(path, row)
        measured = {key: value for key, value in row.items() if key != "settings"}
        measured["weights"] = str(self.work / measured["weights"])
        return {"name": variant.name, "published": variant.published, **measured}

    def _measured(self, variant: Variant, network: str) -> dict[str, Any]:
        for seed in range(SEEDS):
            output = self.work / f"{network}-{variant.slug}-seed{seed}.safetensors"
            logger.info("training %s, %s, seed %d", network, variant.name, seed)
            try:
                result = self._train(network, variant, output, seed)
            # of another budget, damaged, or weights without a checkpoint
            except (WeightsError, FileExistsError) as error:
                logger.warning("%s; this row starts over", error)
                for path in (output, companion(output, "checkpoint")):
                    path.unlink(missing_ok=True)
                result = self._train(network, variant, output, seed)
            net = load(output)
            run = fused(net)
            with torch.inference_mode():
                paper = paper_score(run, PairFile(self.pairs["validation"]))
                own = validation_score(run, PairFile(self.pairs["validation"]))
            if paper > 0:
                break
        return {
            "paper": 100 * paper,
            "on_structure": 100 * own,
            "parameters": sum(p.numel() for p in net.parameters()),
            "seed": seed,
            "steps": result.steps,
            "seconds": result.rows[-1]["seconds"] if result.rows else None,
            "weights": output.name,
        }

    def _train(self, network: str, variant: Variant, output: Path, seed: int) -> FitResult:
        data = TrainData(
            self.images, pairs=self.pairs["training"], validation_pairs=self.pairs["validation"]
        )
        return train(
            network,
            data,
            output,
            preset=self.budget.preset,
            run=self.run,
            network=variant.options,
            seed=seed,
            **self.budget.schedule,
        )
