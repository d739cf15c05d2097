"""Tables and figures of the Key.Net paper: trains what they need, evaluates, and shows our values
next to the published ones.

Tables 1a, 1b and figures 3 and 5 train variants of Key.Net on photographs (``variants``); tables 2
and 3 evaluate systems on homography sequences, table 4 counts parameters and measures times. A work
folder keeps everything, so that an interrupted run resumes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from ..datasets.homography import homography_sequences
from ..detect import score_maps
from ..evaluation.complexity import TIMED_SIDE, num_parameters, seconds_per_image
from ..evaluation.results import Rows, read_run
from ..evaluation.run import RunSettings, evaluate
from ..files import write_json, write_text
from ..image import load_image
from ..keypoints import detect_peaks
from ..models.spec import fused
from ..plot import draw_keypoints
from ..report import published
from ..report.page import Cell, Column, Row, Table
from ..report.papers import TABLE_2_COLUMNS
from ..training.loop import RunOptions
from ..training.losses import WINDOWS
from ..weights import load
from .variants import (
    BUDGETS,
    Variant,
    VariantTrainer,
    base_variants,
    filter_variants,
    level_variants,
    window_variants,
)

T = TypeVar("T")
#: Parts of the paper that can be reproduced, and whether they need photographs to train on.
PARTS = {
    "table 1a": True,
    "table 1b": True,
    "table 2": False,
    "table 3": False,
    "table 4": False,
    "figure 3": True,
    "figure 5": True,
}
#: Row of table 2 -> system; the suffix SI or TI is the mode.
TABLE_2_SYSTEMS = {
    "SIFT-SI": "sift",
    "SURF-SI": "surf",
    "FAST-TI": "fast",
    "MSER-SI": "mser",
    "Harris-Laplace-SI": "harris-laplace",
    "KAZE-SI": "kaze",
    "AKAZE-SI": "akaze",
    "SuperPoint-TI": "superpoint",
    "Tiny-Key.Net-SI": "keynet-tiny",
    "Key.Net-TI": "keynet@ti",
    "Key.Net-SI": "keynet",
}
#: Row of table 3 -> system; the paper discards orientations.
TABLE_3_SYSTEMS = {
    "MSER + HardNet": "mser@upright+hardnet",
    "SIFT + HardNet": "sift@upright+hardnet",
    "Harris-Laplace + HardNet": "harris-laplace@upright+hardnet",
    "AKAZE + HardNet": "akaze@upright+hardnet",
    "SuperPoint + HardNet": "superpoint+hardnet",
    "SuperPoint": "superpoint",
    "Tiny-Key.Net + HardNet": "keynet-tiny+hardnet",
    "Key.Net + HardNet": "keynet+hardnet",
}
#: Row of table 4 -> network.
TABLE_4_NETWORKS = {"Tiny-Key.Net": "keynet-tiny", "Key.Net": "keynet"}
#: Reduced pyramid levels whose range of scales is the nearest to that of table 2 (docs/papers.md).
DOWN_LEVELS = 5
PAPER_SPLITS = ("view", "illum")
SPLIT_NAMES = {
    **{"view": "viewpoint", "illum": "illumination"},
    **{"other": "other sequences", "all": "all sequences"},
}
QUICK_NOTE = "With the quick budget, another seed moves a row by up to 17 points."
#: Keypoints and maximum width in pixels of a picture of figure 3.
FIGURE_KEYPOINTS, FIGURE_WIDTH = 100, 360


@dataclass(frozen=True)
class ReproduceOptions:
    """What to reproduce, and from which data.

    Attributes:
        part: one of ``PARTS``.
        work: folder for pairs, weights, features and results.
        images: photographs to train on; for tables 2 to 4 the networks are trained on them first,
            instead of using the shipped weights.
        data: homography sequences in HPatches' layout, for tables 2 and 3; for figure 3 its first
            image is drawn.
        budget: ``quick`` or ``paper`` (``variants.BUDGETS``).
        only: rows whose names contain this text; empty: all.
        features: ``ROW=FOLDER``: features on disk for rows whose method cannot run here.
        num_keypoints: keypoints compared per image in tables 2 and 3.
        device, workers: of trainings and evaluations.
        progress: show progress.

    Raises:
        ValueError: an unknown part or budget, or missing data.
    """

    part: str
    work: Path
    images: Path | None = None
    data: Path | None = None
    budget: str = "quick"
    only: str = ""
    features: tuple[str, ...] = ()
    num_keypoints: int = 1000
    device: str = "auto"
    workers: int = 1
    progress: bool = False

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"the part must be one of {', '.join(PARTS)}; got {self.part!r}")
        if self.budget not in BUDGETS:
            raise ValueError(f"the budget must be one of {', '.join(BUDGETS)}; got {self.budget!r}")
        if PARTS[self.part] and self.images is None:
            raise ValueError(f"{self.part} trains networks; give a folder of photographs (images)")
        if self.part in ("table 2", "table 3") and self.data is None:
            raise ValueError(
                f"{self.part} is measured on homography sequences; give a folder in HPatches' "
                "layout (data)"
            )

    @property
    def weights(self) -> str:
        """Whose weights are measured: the ``shipped`` ones, or those of a training budget."""
        return "shipped" if self.images is None else self.budget


@dataclass(frozen=True)
class Reproduced:
    """Result of ``reproduce``.

    Attributes:
        content: rows and settings, JSON values.
        tables: our values and the published ones.
        files: written files.
        skipped: messages about rows, sequences and pairs without results.
    """

    content: dict[str, Any]
    tables: list[Table]
    files: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """All tables as Markdown."""
        return "\n\n".join(table.markdown() for table in self.tables) + "\n"


def reproduce(options: ReproduceOptions) -> Reproduced:
    """Reproduce a table or a figure; writes ``<part>-<weights>.json`` and ``.md`` (figure 3: also
    ``.png``) into the work folder, where the weights are ``shipped``, ``quick`` or ``paper``.

    Raises:
        ValueError: no row has the name, or an argument is unusable.
        FileNotFoundError, DataError: data that cannot be read.
        ImportError: Lightning Fabric is missing.
    """
    options.work.mkdir(parents=True, exist_ok=True)
    run = {
        "table 1a": lambda: _trained(options, level_variants()),
        "table 1b": lambda: _trained(options, base_variants()),
        "figure 5": lambda: _trained(options, [*window_variants(), *filter_variants()]),
        "figure 3": lambda: _figure_3(options),
        "table 2": lambda: _table_2(options),
        "table 3": lambda: _table_3(options),
        "table 4": lambda: _table_4(options),
    }[options.part]
    result = run()
    stem = options.work / f"{options.part.replace(' ', '-')}-{options.weights}"
    content = {"part": options.part, "budget": options.budget, **result.content}
    content["skipped"] = result.skipped
    json_path, text_path = (stem.with_name(stem.name + suffix) for suffix in (".json", ".md"))
    write_json(json_path, content)
    write_text(text_path, result.markdown())
    return replace(result, content=content, files=[json_path, text_path, *result.files])


def _selected(names: Sequence[str], only: str) -> list[str]:
    """The names that contain ``only``.

    Raises:
        ValueError: none does.
    """
    found = [name for name in names if only.lower() in name.lower()]
    if not found:
        raise ValueError(f"no row contains {only!r}; rows are {', '.join(names)}")
    return found


# ---- trained variants


def _trainer(options: ReproduceOptions) -> VariantTrainer:
    assert options.images is not None
    run = RunOptions(options.device, progress=options.progress, workers=options.workers)
    work = options.work / f"variants-{options.budget}"
    return VariantTrainer(options.images, work, BUDGETS[options.budget], run)


def _trained(options: ReproduceOptions, variants: list[Variant]) -> Reproduced:
    """Train and measure variants of Key.Net."""
    names = _selected([variant.name for variant in variants], options.only)
    trainer = _trainer(options)
    rows = [trainer.row(variant) for variant in variants if variant.name in names]
    return Reproduced({"rows": rows}, [variant_table(options, rows)])


def variant_table(options: ReproduceOptions, rows: list[dict[str, Any]]) -> Table:
    """Our repeatability of variants next to the published one."""
    columns = [
        Column("ours", "repeatability %", 1, 1),
        Column("published", "repeatability %", 1),
        Column("parameters", "", 0),
        Column("steps", "", 0),
    ]
    keys = ("paper", "published", "parameters", "steps")
    return Table(
        f"Key.Net, {options.part}, budget {options.budget}",
        columns,
        [Row(row["name"], [row[key] for key in keys]) for row in rows],
        corner="variant",
        note="Ours and published: the 25 strongest keypoints, location only, on validation pairs "
        "of our and of ImageNet's photographs." + f" {QUICK_NOTE}" * (options.budget == "quick"),
    )


def _figure_3(options: ReproduceOptions) -> Reproduced:
    """Keypoints and score maps of networks that were trained with more and more windows."""
    nested = [WINDOWS[: count + 1] for count in range(len(WINDOWS))]
    variants = window_variants(nested)
    names = _selected([variant.name for variant in variants], options.only)
    sequences = None if options.data is None else homography_sequences(options.data)
    trainer = _trainer(options)
    rows = [trainer.row(variant) for variant in variants if variant.name in names]
    # the first photograph for validation, unless there are other data
    image = load_image(trainer.held_out[0] if sequences is None else sequences.pairs[0].image_a)
    columns = []
    for row in rows:
        net = fused(load(row["weights"]))
        with torch.inference_mode():
            score = score_maps(net)(image)
        xy = detect_peaks(score, FIGURE_KEYPOINTS)[0][0]
        picture = draw_keypoints(image, xy, radius=3.0, width=FIGURE_WIDTH)
        columns.append(np.concatenate([np.asarray(picture), _as_gray(score, picture.size)]))
    path = options.work / f"figure-3-{options.budget}.png"
    Image.fromarray(np.concatenate(columns, axis=1)).save(path)
    return Reproduced({"rows": rows, "image": path.name}, [variant_table(options, rows)], [path])


def _as_gray(score: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """A score map (1,1,H,W) as RGB (h,w,3) uint8 of ``size`` (w,h), dark where scores are high."""
    values = score[0, 0]
    high = values.flatten().kthvalue(int(0.999 * values.numel())).values
    scaled = (values / high.clamp(min=1e-12)).clamp(0, 1)  # an untrained map may hold zeros only
    gray = (255 * (1 - scaled.sqrt())).round().byte().numpy()
    return np.asarray(Image.fromarray(gray).resize(size).convert("RGB"))


# ---- systems on homography sequences


def _systems(options: ReproduceOptions, table: dict[str, str]) -> dict[str, str]:
    """Systems of the selected rows of a table; networks are trained if photographs are given."""
    given = dict(entry.partition("=")[::2] for entry in options.features)
    names = _selected(list({**table, **given}), options.only)
    systems = {}
    for row in names:
        base = re.split("[@+]", table.get(row, ""))[0]
        network = base if row in given else _network(options, base)
        systems[row] = given.get(row, network + table.get(row, "").removeprefix(base))
    return systems


def _network(options: ReproduceOptions, name: str) -> str:
    """A detector; Key.Net and Tiny-Key.Net are trained first on given photographs."""
    if options.images is None or name not in TABLE_4_NETWORKS.values():
        return name
    return _trainer(options).row(Variant("M-SIP, all"), name)["weights"]


def _evaluated(
    options: ReproduceOptions, table: dict[str, str], folder: str
) -> tuple[Rows, list[str], list[str]]:
    """Results of the selected rows of a table: the results, the names of the rows that could be
    run, and messages about rows, sequences and pairs without results.
    """
    assert options.data is not None
    dataset = homography_sequences(options.data)  # raises before networks are trained
    systems = _systems(options, table)
    settings = RunSettings(
        tuple(f"{row}={name}" for row, name in systems.items()),
        num_keypoints=options.num_keypoints,
        protocols=("keynet",),
        device=options.device,
        extraction={"down_levels": DOWN_LEVELS},
    )
    work = options.work / f"{folder}-{options.weights}"
    evaluate(dataset, settings, work, workers=options.workers, progress=options.progress)
    run = read_run(work)
    unavailable = run.metadata.get("unavailable", {})
    skipped = list(map(str, dataset.problems))
    skipped += [f"{row}: {unavailable[row]}" for row in systems if row in unavailable]
    for row in systems:
        failed = [pair.reason for pair in run.rows if pair.system == row and not pair.ok]
        if failed:
            skipped.append(f"{row}: {len(failed)} pairs failed, such as {failed[0]}")
    return Rows(run), [row for row in systems if row not in unavailable], skipped


def printed(table: Mapping[str, tuple[T, T]], row: str, split: str) -> T | None:
    """The published entry of a row (viewpoint, illumination); None if the paper has none."""
    if row not in table or split not in PAPER_SPLITS:
        return None
    return table[row][PAPER_SPLITS.index(split)]


def _splits(rows: Rows) -> list[str]:
    """Viewpoint and illumination, as in the paper; of sequences of neither kind, all."""
    return [split for split in rows.splits if split != "all"] or rows.splits


def _table_2(options: ReproduceOptions) -> Reproduced:
    """Repeatability of detectors with and without a scale pyramid."""
    rows, names, skipped = _evaluated(options, TABLE_2_SYSTEMS, "table-2")
    columns = [
        Column(side, label, digits)
        for _, label, _, digits in TABLE_2_COLUMNS
        for side in ("ours", "published")
    ]
    content: list[dict[str, Any]] = []
    tables = []
    for split in _splits(rows):
        lines = []
        for row in names:
            theirs = printed(published.TABLE_2, row, split)
            values: list[Cell] = []
            for metric, _, factor, _ in TABLE_2_COLUMNS:
                values.append(rows.mean(split, row, metric, factor))
                values.append(getattr(theirs, metric.rpartition(".")[2], None))
            lines.append(Row(row, values))
            content.append(_as_json(row, split, columns, values))
        caption = f"Key.Net, table 2, {SPLIT_NAMES.get(split, split)}"
        note = f"Repeatability % and overlap error. {_note(skipped)}"
        tables.append(Table(caption, columns, lines, corner="detector", note=note))
    return Reproduced({"rows": content}, tables, skipped=skipped)


def _table_3(options: ReproduceOptions) -> Reproduced:
    """Matching score of detectors with descriptors."""
    rows, names, skipped = _evaluated(options, TABLE_3_SYSTEMS, "table-3")
    splits = _splits(rows)
    columns = [
        Column(side, f"matching score %, {SPLIT_NAMES.get(split, split)}", 1)
        for split in splits
        for side in ("ours", "published")
    ]
    lines, content = [], []
    for row in names:
        values: list[Cell] = []
        for split in splits:
            values.append(rows.mean(split, row, "keynet.score@5", 100.0))
            values.append(printed(published.TABLE_3, row, split))
        lines.append(Row(row, values))
        content.append(_as_json(row, None, columns, values))
    table = Table("Key.Net, table 3", columns, lines, note=_note(skipped))
    return Reproduced({"rows": content}, [table], skipped=skipped)


def _as_json(
    row: str, split: str | None, columns: list[Column], values: list[Cell]
) -> dict[str, Any]:
    """A row of a table as a JSON object."""
    cells = {column.full: value for column, value in zip(columns, values, strict=True)}
    return {"name": row, **({} if split is None else {"split": split}), **cells}


def _note(missing: list[str]) -> str:
    return f"Skipped: {'; '.join(missing)}." if missing else ""


def _table_4(options: ReproduceOptions) -> Reproduced:
    """Number of parameters, and time per image."""
    columns = [
        *(Column(side, "parameters", 0) for side in ("ours", "published")),
        *(Column(side, f"ms, {TIMED_SIDE} x {TIMED_SIDE}", 1) for side in ("ours", "published")),
    ]
    names = _selected(list(published.TABLE_4), options.only)
    lines, content = [], []
    for row in names:
        values: list[Cell] = [None, published.TABLE_4[row], None, None]
        if row in TABLE_4_NETWORKS:
            network = _network(options, TABLE_4_NETWORKS[row])
            values[0] = num_parameters(network)
            values[2] = 1000 * seconds_per_image(network, side=TIMED_SIDE)
        if row in published.SECONDS_600:
            values[3] = 1000 * published.SECONDS_600[row]
        lines.append(Row(row, values))
        content.append(_as_json(row, None, columns, values))
    note = "Ours: one image on the CPU of this machine; published: GTX 1080 Ti."
    return Reproduced({"rows": content}, [Table("Key.Net, table 4", columns, lines, note=note)])
