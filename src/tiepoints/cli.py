"""The command line: ``tiepoints extract | match | train | pairs | evaluate | report | data | weights``.

Each command is a thin door to one function.
"""

from __future__ import annotations

import json
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .errors import DataError, WeightsError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Tie points: find, match, train.")
weights_app = typer.Typer(no_args_is_help=True, help="Trained weights: list, show, import, verify.")
app.add_typer(weights_app, name="weights")
data_app = typer.Typer(no_args_is_help=True, help="Data sets: fetch and check.")
app.add_typer(data_app, name="data")

#: What a user can mend; anything else is our fault and shows its trace.
USER_ERRORS = (ValueError, FileNotFoundError, ImportError, DataError, WeightsError, OSError)


class Detector(StrEnum):
    keynet = "keynet"
    keynet_tiny = "keynet-tiny"


class Descriptor(StrEnum):
    rootsift = "rootsift"
    none = "none"


class Mode(StrEnum):
    default = "default"
    official = "official"


class Scales(StrEnum):
    one = "one"
    all = "all"


class Model(StrEnum):
    homography = "homography"
    fundamental = "fundamental"


class Preset(StrEnum):
    default = "default"
    paper = "paper"
    quick = "quick"


def _fail(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _network(detector: str, weights: Path | None):
    """A detector's name, or the network in a weights file of ours or of the original authors."""
    if weights is None:
        return detector
    if weights.suffix == ".safetensors":
        from .weights import load

        return load(weights)
    from .importers import load_official

    return load_official(weights)


@app.command()
def extract(
    images: Annotated[list[str] | None, typer.Argument(help="Images, folders or patterns.")] = None,
    list_images: Annotated[Path | None, typer.Option(help="Text file with one image path a line.")] = None,
    root_images: Annotated[Path | None, typer.Option(help="Folder that the listed paths start from.")] = None,
    results_dir: Annotated[Path, typer.Option(help="Results go to RESULTS_DIR/METHOD_NAME/relative/path.")] = Path("extracted_features"),
    method_name: Annotated[str | None, typer.Option(help="Name of the results [default: DETECTOR-DESCRIPTOR].")] = None,
    num_points: Annotated[int, typer.Option("--num-points", "--num-kpts", min=1, help="Most points an image.")] = 5000,
    detector: Annotated[Detector, typer.Option()] = Detector.keynet,
    descriptor: Annotated[Descriptor, typer.Option()] = Descriptor.rootsift,
    single_scale: Annotated[bool, typer.Option("--single-scale", help="No pyramid (the papers' TI).")] = False,
    mode: Annotated[Mode, typer.Option(help="official = the published extraction, faults included.")] = Mode.default,
    scales: Annotated[Scales, typer.Option(help="one = a place once; all = at each scale where it is found.")] = Scales.one,
    weights: Annotated[Path | None, typer.Option(help="Weights file, ours or an official checkpoint.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Extract again what is done already.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and write.")] = 2,
) -> None:
    """Write NAME.kpt.npy (N x 4: x, y, scale, score) and NAME.dsc.npy (N x 128) for each image."""
    from .extract import build
    from .jobs import check_settings, collect, extract_to_files

    if not images and list_images is None:
        _fail("no images given; name images, folders or patterns, or use --list-images")
    name = method_name or f"{detector}-{descriptor}"
    if name in (".", "..") or "/" in name or "\\" in name:
        _fail(f"--method-name is the name of one folder, not a path; got {name!r}")
    try:
        tasks, refused = collect(images or [], list_images, root_images)
        extractor = build(
            _network(detector, weights), descriptor, single_scale=single_scale, device=device, num_points=num_points, mode=mode.value,
            scales=scales.value,
        )
        settings = {
            "detector": detector.value, "descriptor": descriptor.value, "num_points": num_points, "mode": mode.value,
            "scales": scales.value, "single_scale": single_scale, "weights": None if weights is None else str(weights),
        }  # fmt: skip
        if tasks:
            check_settings(results_dir / name, settings, overwrite)
    except USER_ERRORS as error:
        _fail(str(error))
    started = time.monotonic()
    report = extract_to_files(
        tasks, extractor, results_dir / name, described=descriptor != Descriptor.none, overwrite=overwrite, workers=workers,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    report.failed = refused + report.failed
    seconds = time.monotonic() - started
    typer.echo(
        f"{report.done} extracted ({report.points} points, {seconds:.1f} s), {report.skipped} done before, "
        f"{len(report.failed)} failed -> {results_dir / name}"
    )
    for path, reason in report.failed:
        typer.echo(f"failed: {path}: {reason}", err=True)
    if report.failed:
        raise typer.Exit(1)


@app.command()
def match(
    a: Annotated[str, typer.Argument(help="First image.")],
    b: Annotated[str, typer.Argument(help="Second image.")],
    output: Annotated[Path | None, typer.Option(help="Picture of the matches.")] = None,
    num_points: Annotated[int, typer.Option(min=1)] = 2048,
    detector: Annotated[Detector, typer.Option()] = Detector.keynet,
    model: Annotated[Model, typer.Option(help="Geometry that right matches obey.")] = Model.fundamental,
    ratio: Annotated[float, typer.Option(min=0.0, max=1.0, help="Largest ratio of nearest to second distance; 1 = off.")] = 0.95,
    threshold: Annotated[float, typer.Option(min=0.0, help="Largest error of an inlier in pixels.")] = 2.0,
    single_scale: Annotated[bool, typer.Option("--single-scale")] = False,
    weights: Annotated[Path | None, typer.Option()] = None,
    device: Annotated[str, typer.Option()] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Match two images: mutual nearest neighbours, ratio test, robust geometry."""
    from .estimation import estimate
    from .extract import build
    from .image import load_image
    from .matching import match as match_features

    try:
        extractor = build(_network(detector, weights), "rootsift", single_scale=single_scale, device=device, num_points=num_points)
        image_a, image_b = load_image(a), load_image(b)
        features_a, features_b = extractor.extract(image_a), extractor.extract(image_b)
        found = match_features(features_a, features_b, ratio=None if ratio >= 1 else ratio)
        xy_a, xy_b = features_a.xy[found.index[:, 0]], features_b.xy[found.index[:, 1]]
        result = estimate(xy_a, xy_b, model.value, threshold=threshold)
        if output is not None:
            from .plot import draw_matches

            output.parent.mkdir(parents=True, exist_ok=True)
            draw_matches(image_a, image_b, xy_a, xy_b, result.inliers, path=output)
    except USER_ERRORS as error:
        _fail(str(error))
    if as_json:
        content = {
            "points": [len(features_a), len(features_b)], "matches": len(found), "inliers": int(result.inliers.sum()),
            "model": model.value, "ok": result.ok, "reason": result.reason,
            "matrix": None if result.model is None else result.model.tolist(),
            "xy_a": xy_a.tolist(), "xy_b": xy_b.tolist(), "inlier": result.inliers.tolist(), "score": found.score.tolist(),
        }  # fmt: skip
        typer.echo(json.dumps(content))
        return
    typer.echo(f"points   {len(features_a)} and {len(features_b)}")
    typer.echo(f"matches  {len(found)}")
    typer.echo(f"inliers  {int(result.inliers.sum())} of a {model}" if result.ok else f"no {model}: {result.reason}")
    if output is not None:
        typer.echo(f"picture  {output}")


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="keynet or keynet-tiny.")],
    images: Annotated[Path, typer.Option(help="Folder of photographs, searched to the bottom.")],
    out: Annotated[Path, typer.Option(help="Weights file to write (.safetensors).")],
    preset: Annotated[Preset, typer.Option()] = Preset.default,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Time to train for.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train for, instead of minutes.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that make pairs.")] = None,
    precision: Annotated[str | None, typer.Option(help="32-true or bf16-mixed.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Pairs written by `tiepoints pairs`.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    devices: Annotated[int, typer.Option(min=1)] = 1,
    validate_every: Annotated[int | None, typer.Option(min=1)] = None,
    save_every: Annotated[float | None, typer.Option(min=0.0, help="Seconds between checkpoints [default: 60].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT.checkpoint.")] = False,
) -> None:
    """Train a detector on any folder of images; no labels needed."""
    from .training.recipes import train_keynet

    if steps is not None and minutes is not None:
        _fail("give --steps or --minutes, not both")
    try:
        result = train_keynet(
            model, images, out, preset=preset.value, pairs=pairs, device=device, devices=devices, resume=resume,
            say=lambda line: typer.echo(line, err=True), minutes=minutes, steps=steps, batch_size=batch_size,
            learning_rate=learning_rate, seed=seed, workers=workers, precision=precision, validate_every=validate_every,
            save_every=save_every,
        )  # fmt: skip
    except (*USER_ERRORS, RuntimeError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail(f"stopped; go on with --resume ({out}.checkpoint)", 130)
    typer.echo(
        f"{result.steps} steps, repeatability {result.best:.3f} on held-out photographs at step {result.best_step} -> {out}"
    )


@app.command()
def pairs(
    images: Annotated[Path, typer.Option(help="Folder of photographs.")],
    out: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    count: Annotated[int, typer.Option(min=1)] = 12_000,
    preset: Annotated[str, typer.Option(help="keynet-paper, keynet-code, rekd or default.")] = "default",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[int | None, typer.Option(min=16, help="Side of the windows.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or all of the photographs.")] = "train",
    workers: Annotated[int, typer.Option(min=0)] = 2,
    preview: Annotated[Path | None, typer.Option(help="Picture of the first pairs.")] = None,
) -> None:
    """Write training pairs once, for trainings that can be compared."""
    import dataclasses

    from .training.pairs import PairFile, write_pairs
    from .training.pairs import preview as draw
    from .training.synthetic import PRESETS, list_photos, split_photos, usable_photos

    if preset not in PRESETS:
        _fail(f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    if split not in ("train", "validation", "all"):
        _fail(f"--split must be train, validation or all; got {split!r}")
    try:
        photos, refused = usable_photos(list_photos(images))
        for line in refused:
            typer.echo(f"left out: {line}", err=True)
        if split != "all":
            photos = split_photos(photos)[split == "validation"]
        settings = PRESETS[preset] if size is None else dataclasses.replace(PRESETS[preset], size=size)
        write_pairs(out, photos, settings, count, seed=seed, workers=workers, preset=preset)
        if preview is not None:
            draw(PairFile(out)).save(preview)
    except USER_ERRORS as error:
        _fail(str(error))
    typer.echo(f"{count} pairs of {len(photos)} photographs -> {out}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


@app.command()
def evaluate(
    dataset: Annotated[Path, typer.Argument(help="Folder of homography sequences (HPatches or Oxford layout), or a list of posed pairs.")],
    systems: Annotated[str, typer.Option(help="Names with commas between: keynet,sift,fast+rootsift,FILE,LABEL=FILE,random,lattice ...")],
    protocol: Annotated[str, typer.Option(help="Some of keynet,rekd,mutual,homography,pose.")] = "keynet,rekd,mutual,homography,pose",
    extras: Annotated[str, typer.Option(help="Some of rotation,scale,bias, on the first image of each sequence.")] = "",
    num_points: Annotated[int, typer.Option(min=1, help="Points compared.")] = 1000,
    mode: Annotated[str, typer.Option(help="ti = one scale, si = pyramid.")] = "ti",
    split: Annotated[str, typer.Option(help="full, view, illum, d2net, view_test, illum_test, or FILE.json[:KEY].")] = "full",
    out: Annotated[Path | None, typer.Option(help="Results folder [default: evaluation/DATASET-MODE].")] = None,
    features: Annotated[list[Path] | None, typer.Option(help="Features on disk (folder of .kpt.npy or hloc .h5); may be repeated.")] = None,
    resize: Annotated[str | None, typer.Option(help="Posed pairs: W,H or the longest side, as in the papers.")] = None,
    device: Annotated[str, typer.Option()] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Processes; each works on one sequence of one system.")] = 1,
) -> None:
    """Measure systems on pairs with known geometry; run again to go on, then `tiepoints report OUT`."""
    from .evaluation.datasets import homography_sequences, posed_pairs
    from .evaluation.results import read_rows
    from .evaluation.run import RunSettings
    from .evaluation.run import evaluate as run

    try:
        posed = dataset.is_file() or (dataset / "pairs_with_gt.txt").is_file()
        found = posed_pairs(dataset) if posed else homography_sequences(dataset, split)
        if resize is not None and not all(part.isdigit() and int(part) > 0 for part in resize.split(",")):
            raise ValueError(f"--resize is SIDE or W,H in pixels, got {resize!r}")
        settings = RunSettings(
            systems=_words(systems) + tuple(str(f) for f in features or []), num_points=num_points, mode=mode,
            protocols=_words(protocol), extras=_words(extras), device=device,
            resize=tuple(int(part) for part in resize.split(",")) if resize else None,
        )  # fmt: skip
        if not settings.systems:
            raise ValueError("no systems given; name some with --systems")
        folder = out or Path("evaluation") / f"{found.name}-{mode}"
        run(
            found, settings, folder, workers=workers, progress=sys.stderr.isatty(),
            say=lambda line: typer.echo(line, err=True), versions=_versions(),
        )  # fmt: skip
    except USER_ERRORS as error:
        _fail(str(error))
    rows = [row for place in sorted((folder / "rows").glob("*.jsonl")) for row in read_rows(place)]
    failed = sum(not row["ok"] for row in rows)
    typer.echo(f"{len(rows)} rows, {failed} of them failed -> {folder}; tables and pictures: tiepoints report {folder}")
    if failed:
        raise typer.Exit(1)


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "processor": platform.processor() or platform.machine()}
    for name in ("tiepoints", "torch", "poselib", "opencv-contrib-python-headless", "kornia"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Results of `tiepoints evaluate`; several are compared.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the report [default: the first results folder].")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Pairs shown as pictures.")] = 4,
    pair: Annotated[list[str] | None, typer.Option(help="SEQUENCE:PAIR to show instead, such as graf:1-4; may be repeated.")] = None,
    systems: Annotated[str, typer.Option(help="Systems in the pictures [default: the first and the best of the others].")] = "",
) -> None:
    """One self-contained HTML page and a Markdown table from evaluation results."""
    from .evaluation.report import write_report

    try:
        written = write_report(folders, out, pictures=pictures, pairs=pair or (), only=_words(systems))
    except USER_ERRORS as error:
        _fail(str(error))
    typer.echo(f"report  {written.html}")
    typer.echo(f"table   {written.markdown}")


@data_app.command("hpatches")
def data_hpatches(
    to: Annotated[Path, typer.Option(help="Folder to put hpatches-sequences-release into (1.3 GB).")],
    mirror: Annotated[list[str] | None, typer.Option(help="Address to try instead of the known ones; may be repeated.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Checksum the archive must have.")] = None,
) -> None:
    """Fetch and check the HPatches sequences."""
    from .evaluation.datasets import HPATCHES_MIRRORS, fetch_hpatches

    try:
        folder = fetch_hpatches(to, mirrors=mirror or HPATCHES_MIRRORS, sha256=sha256, say=lambda line: typer.echo(line, err=True))
    except USER_ERRORS as error:
        _fail(str(error))
    typer.echo(f"116 sequences -> {folder}")


@weights_app.command("list")
def weights_list() -> None:
    """Names of the embedded weights."""
    from .weights import DATA, load, table

    for name, entry in table().items():
        count = sum(p.numel() for p in load(name).parameters())
        typer.echo(f"{name:14s} {entry['network']:8s} {count:6d} parameters  {(DATA / entry['file']).stat().st_size} bytes")


@weights_app.command("show")
def weights_show(name: str) -> None:
    """Settings, origin and checksum of embedded weights or of a weights file."""
    from .weights import DATA, facts, file_checksum, load, table

    try:
        net = load(name)
        path = DATA / table()[name]["file"] if name in table() else Path(name)
        content = {
            "file": path.name, "sha256": file_checksum(path), "network": type(net).__name__, "settings": net.settings,
            "parameters": sum(p.numel() for p in net.parameters()), "facts": facts(path),
            **({"licence": table()[name]["licence"], "recipe": table()[name]["recipe"]} if name in table() else {}),
        }  # fmt: skip
    except USER_ERRORS as error:
        _fail(str(error))
    typer.echo(json.dumps(content, indent=1))


@weights_app.command("import")
def weights_import(
    checkpoint: Annotated[Path, typer.Argument(help="Official checkpoint: Key.Net PyTorch, kornia, TensorFlow (.npz), REKD's keyNet.pt.")],
    out: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    restore_statistics: Annotated[bool, typer.Option("--restore-statistics", help="TensorFlow: the true batch statistics.")] = False,
) -> None:
    """Convert an official checkpoint into a weights file for --weights."""
    from .importers import load_official
    from .weights import save

    try:
        net = load_official(checkpoint, restore_statistics=restore_statistics)
        save(net, out, {"imported_from": checkpoint.name})
    except USER_ERRORS as error:
        _fail(str(error))
    typer.echo(f"{type(net).__name__} -> {out}")


@weights_app.command("verify")
def weights_verify(names: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Check embedded weights against their checksums and load them; all of them without a name."""
    from .weights import table
    from .weights import verify as check

    failed = False
    for name in names or list(table()):
        try:
            check(name)
            typer.echo(f"{name}: good")
        except WeightsError as error:
            failed = True
            typer.echo(f"{name}: {error}", err=True)
    if failed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the ``tiepoints`` command."""
    app()
