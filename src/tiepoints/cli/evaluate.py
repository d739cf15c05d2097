"""``tiepoints compare | evaluate | evaluate-patches | report | data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..names import EVALUATION_NUM_KEYPOINTS
from .common import (
    CutRatioOption,
    DeviceOption,
    JsonOption,
    NmsSizeOption,
    PyramidLevelsOption,
    SingleScaleOption,
    UpsampledLevelsOption,
    ValueRangeOption,
    fail,
    print_json,
    progress_wanted,
    published_options,
    split_names,
    user_errors,
)

data_app = typer.Typer(no_args_is_help=True, help="Data sets: download and check.")


def compare(
    a: Annotated[str, typer.Argument(help="A system: keynet, sift, keynet+desnet, FILE ...")],
    b: Annotated[str, typer.Argument(help="Another system.")],
    images: Annotated[Path, typer.Option(help="Folder of images.")],
    photos: Annotated[int, typer.Option(min=2, help="Number of images.")] = 30,
    num_keypoints: Annotated[int, typer.Option(min=1, help="Keypoints compared per image.")] = 500,
    size: Annotated[int, typer.Option(min=128, help="Side of the views in pixels.")] = 480,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare two systems on warped copies of your images, with confidence intervals."""
    from ..datasets.synthetic import find_photos
    from ..evaluation.compare import CompareSettings, compare_systems

    with user_errors():
        settings = CompareSettings(photos, num_keypoints, size, seed, device)
        usable = find_photos([images], min_side=size // 2)
        result = compare_systems(a, b, usable, settings, progress=progress_wanted())
    if as_json:
        print_json(result.to_json())
    else:
        typer.echo(result.table())


def evaluate(
    context: typer.Context,
    dataset: Annotated[
        Path,
        typer.Argument(
            help="Folder of homography sequences (HPatches or Oxford layout), EVD, TILDE's "
            "webcams, WxBS or Strecha's scenes, detected by content; or a list of posed pairs."
        ),
    ],
    systems: Annotated[
        str,
        typer.Option(
            help="Comma-separated names: keynet,keynet@ti,sift@upright+hardnet,FILE,LABEL=FILE,"
            "random,lattice ..."
        ),
    ],
    protocol: Annotated[
        str, typer.Option(help="Some of keynet,rekd,mutual,homography,pose.")
    ] = "keynet,rekd,mutual,homography,pose",
    extras: Annotated[
        str,
        typer.Option(help="Some of rotation,scale,bias, on the first image of each sequence."),
    ] = "",
    num_keypoints: Annotated[
        int, typer.Option(min=1, help="Keypoints compared per image (1000 in the papers).")
    ] = EVALUATION_NUM_KEYPOINTS,
    single_scale: SingleScaleOption = False,
    split: Annotated[
        str,
        typer.Option(help="full, view, illum, d2net, view_test, illum_test, or FILE.json[:KEY]."),
    ] = "full",
    output: Annotated[
        Path | None, typer.Option(help="Results folder (default: evaluation/DATASET-ti or -si).")
    ] = None,
    features: Annotated[
        list[Path] | None,
        typer.Option(help="Stored features (folder of .kpt.npy or hloc .h5); repeatable."),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="Posed pairs: resize to W,H or to a longest side."),
    ] = None,
    value_range: ValueRangeOption = "type",
    pyramid_levels: PyramidLevelsOption = None,
    upsampled_levels: UpsampledLevelsOption = None,
    nms_size: NmsSizeOption = None,
    cut_ratio: CutRatioOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "cpu",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes; each works on one sequence of one system.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Evaluate systems on image pairs with known geometry; run again, it resumes. The command
    report shows the results.
    """
    from ..datasets.benchmark import open_dataset
    from ..evaluation.results import read_metadata, read_rows
    from ..evaluation.run import RunSettings, label
    from ..evaluation.run import evaluate as run
    from ..memory import keep_freed

    keep_freed()
    with user_errors():
        opened = open_dataset(dataset, split)
        if resize is not None and not all(p.isdigit() and int(p) > 0 for p in resize.split(",")):
            raise ValueError(f"--resize must be SIDE or W,H in pixels, got {resize!r}")
        settings = RunSettings(
            systems=split_names(systems) + tuple(_stored(f) for f in features or []),
            num_keypoints=num_keypoints,
            single_scale=single_scale,
            protocols=split_names(protocol),
            extras=split_names(extras),
            device=device,
            resize=tuple(int(part) for part in resize.split(",")) if resize else None,
            value_range=value_range,
            extraction=published_options(context),
        )
        if not settings.systems:
            raise ValueError("no systems given; use --systems")
        folder = output or Path("evaluation") / f"{opened.name}-{'ti' if single_scale else 'si'}"
        run(
            opened,
            settings,
            folder,
            workers=workers,
            progress=progress_wanted(),
            versions=_versions(),
        )
    rows = [row for path in sorted((folder / "rows").glob("*.jsonl")) for row in read_rows(path)]
    failed = sum(not row["ok"] for row in rows)
    unread, unavailable = len(opened.problems), read_metadata(folder)["unavailable"]
    requested = {label(name) for name in settings.systems}
    not_run = {name: reason for name, reason in unavailable.items() if name in requested}
    if as_json:
        counts = {"rows": len(rows), "failed": failed, "unread": unread}
        print_json({**counts, "not_run": not_run, "output": str(folder)})
    else:
        typer.echo(
            f"{len(rows)} rows, {failed} of them failed, {len(not_run)} systems not run -> "
            f"{folder}; tables and charts: tiepoints report {folder}"
        )
    if failed or unread or not_run:
        raise typer.Exit(1)


def _stored(features: Path) -> str:
    """The name of stored features as a system: with a slash, it is always a path."""
    return f"{features.parent}/{features.name}"


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
    }
    for name in ("tiepoints", "torch", "poselib", "opencv-contrib-python-headless", "kornia"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def evaluate_patches(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A PhotoTour set (or a folder of sets), or the HPatches folder of sequences."
        ),
    ],
    descriptors: Annotated[
        str, typer.Option(help="Comma-separated names (also rootsift, raw) or weights files.")
    ] = "hardnet,rootsift",
    test_pairs: Annotated[
        str, typer.Option(help="PhotoTour: file of test pairs in the set.")
    ] = "m50_100000_100000_0.txt",
    tasks: Annotated[
        Path | None,
        typer.Option(
            help="HPatches: folder of the benchmark's task files (default: drawn at random)."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="HPatches: full, view, illum, or one of splits.json.")
    ] = "full",
    output: Annotated[Path | None, typer.Option(help="JSON file of all results.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Evaluate patch descriptors: FPR95 on PhotoTour; verification, matching and retrieval on
    HPatches.
    """
    from ..device import choose_device
    from ..evaluation.patch_tasks import evaluate_patches as run
    from ..evaluation.systems import patch_network
    from ..files import write_json
    from ..formats.records import record_path, with_program
    from ..weights import digest

    if not folder.is_dir():
        fail(f"no folder {folder}; expected PhotoTour's (info.txt) or HPatches' (v_wall, ...)")
    has_info = (folder / "info.txt").is_file() or any(folder.glob("*/info.txt"))
    kind = "phototour" if has_info else "hpatches"
    found = {}
    with user_errors():
        chosen = choose_device(device)
        nets = {name: patch_network(name, chosen) for name in descriptors.split(",")}
        for name, net in nets.items():
            found[name] = run(
                net, folder, kind, pairs=test_pairs, tasks=tasks, split=split, device=chosen
            )
            typer.echo(f"{name}: {json.dumps(found[name])}")
        if output is not None:
            write_json(output, found)
            record: dict[str, object] = {"kind": kind, "folder": str(folder), "split": split}
            record["test_pairs"] = test_pairs
            record |= {"tasks": tasks, "systems": {name: digest(name) for name in found}}
            write_json(record_path(output, "settings.json"), with_program(record))


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Results of `tiepoints evaluate`; several of the same images are merged."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report (default: the first results folder).")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="Number of pairs whose images are shown.")
    ] = 4,
    pair: Annotated[
        list[str] | None,
        typer.Option(help="SEQUENCE:PAIR to show instead, such as graf:1-4; repeatable."),
    ] = None,
    systems: Annotated[
        str,
        typer.Option(
            help="Systems whose images are shown (default: the first and the best of the others)."
        ),
    ] = "",
) -> None:
    """Write a self-contained HTML page and a Markdown file of evaluation results."""
    from ..report.report import write_report

    with user_errors():
        written = write_report(
            folders, output, pictures=pictures, pairs=pair or (), only=split_names(systems)
        )
    typer.echo(f"report  {written.html}")
    typer.echo(f"table   {written.markdown}")


@data_app.command("hpatches")
def data_hpatches(
    output: Annotated[
        Path, typer.Option(help="Folder that will contain hpatches-sequences-release (1.3 GB).")
    ],
    mirror: Annotated[
        list[str] | None,
        typer.Option(help="URL to use instead of the default ones; repeatable."),
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="Expected checksum of the archive.")] = None,
) -> None:
    """Download and check the HPatches sequences."""
    from ..datasets.download import HPATCHES_MIRRORS, fetch_hpatches

    with user_errors():
        folder = fetch_hpatches(output, mirrors=mirror or HPATCHES_MIRRORS, sha256=sha256)
    typer.echo(f"116 sequences -> {folder}")
