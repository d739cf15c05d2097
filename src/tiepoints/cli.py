"""The command line: ``tiepoints extract | match | train | pairs | evaluate | report | data | weights | imc | live``.

Each command is a thin door to one function.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

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
    rekd = "rekd"
    rekd_light = "rekd-light"
    sobelnet = "sobelnet"


class Orientation(StrEnum):
    none = "none"
    rekd = "rekd"
    rekd_light = "rekd-light"
    dominant = "dominant"


class PairOrientation(StrEnum):
    auto = "auto"
    none = "none"
    rekd = "rekd"
    rekd_light = "rekd-light"
    dominant = "dominant"


class Format(StrEnum):
    npy = "npy"
    h5 = "h5"
    colmap = "colmap"


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
    msip = "msip"
    corners = "corners"


# Options that several commands share, worded once.
DetectorOption = Annotated[Detector, typer.Option()]
DescriptorOption = Annotated[
    str | None, typer.Option(help="Such as hardnet or rootsift; a weights file; none (default: that of tiepoints.build).")
]
OrientationOption = Annotated[
    Orientation | None,
    typer.Option(help="Angles of the points: of a network, or of the dominant gradient (default: REKD's own; others none)."),
]
PairOrientationOption = Annotated[
    PairOrientation,
    typer.Option(
        help="auto: keypoints without angles are matched upright, and where little verifies at the rotation of one image to the other; "
        "else as --orientation of extract."
    ),
]
UprightOption = Annotated[
    bool, typer.Option("--upright", help="Describe patches that are not turned by the angles, as REKD's tables (desnet never uses angles).")
]
SingleScaleOption = Annotated[bool, typer.Option("--single-scale", help="No pyramid (the papers' TI).")]
ModeOption = Annotated[Mode, typer.Option(help="official = the published extraction, faults included.")]
ScalesOption = Annotated[Scales, typer.Option(help="one = a place once; all = at each scale where it is found.")]
WeightsOption = Annotated[Path | None, typer.Option(help="Weights file, ours or an official checkpoint.")]
CameraOption = Annotated[
    str, typer.Option(help="COLMAP: auto (EXIF or a guess, an image), single (one for all) or MODEL:p1,p2,... (known).")
]


def _fail(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _descriptor(name: str | None) -> str:
    """The name given, or the default of ``build``, which is asked only when a command runs: it brings torch."""
    from .extract import DESCRIPTOR, DESCRIPTORS

    chosen = name or DESCRIPTOR
    if chosen not in DESCRIPTORS and not Path(chosen).is_file():
        _fail(f"--descriptor must be one of {', '.join(DESCRIPTORS)}, or a weights file; got {chosen!r}")
    return chosen


def _value(choice: StrEnum | None) -> str | None:
    return None if choice is None else choice.value


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
    root_images: Annotated[Path | None, typer.Option(help="Folder that listed paths start from, and names in h5 and colmap.")] = None,
    results_dir: Annotated[Path, typer.Option(help="Results go to RESULTS_DIR/METHOD_NAME/relative/path.")] = Path("extracted_features"),
    method_name: Annotated[str | None, typer.Option(help="Name of the results (default: DETECTOR-DESCRIPTOR).")] = None,
    form: Annotated[Format, typer.Option("--format", help="npy: two files an image; h5: hloc's file; colmap: a database.")] = Format.npy,
    num_points: Annotated[int, typer.Option("--num-points", "--num-kpts", min=1, help="Most points an image.")] = 5000,
    detector: DetectorOption = Detector.keynet,
    descriptor: DescriptorOption = None,
    orientation: OrientationOption = None,
    upright: UprightOption = False,
    single_scale: SingleScaleOption = False,
    mode: ModeOption = Mode.default,
    scales: ScalesOption = Scales.one,
    weights: WeightsOption = None,
    camera: CameraOption = "auto",
    half: Annotated[bool, typer.Option("--half", help="h5: descriptors as float16.")] = False,
    device: Annotated[str, typer.Option()] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Extract again what is done (colmap: begin anew).")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and write.")] = 2,
) -> None:
    """Write the features of images: files of numbers, an HDF5 file for hloc, or a COLMAP database (docs/formats.md)."""
    from .extract import build
    from .jobs import FORMATS, Report, check_settings, collect, extract_to_files, open_store, settings_place

    if not images and list_images is None:
        _fail("no images given; name images, folders or patterns, or use --list-images")
    chosen = _descriptor(descriptor)
    name = method_name or f"{detector}-{Path(chosen).stem}"
    if name in (".", "..") or "/" in name or "\\" in name:
        _fail(f"--method-name is the name of one folder, not a path; got {name!r}")
    folder = results_dir / name
    try:
        tasks, refused = collect(images or [], list_images, root_images, inside=form != Format.npy)
        extractor = build(
            _network(detector, weights), chosen, single_scale=single_scale, device=device, num_points=num_points, mode=mode.value,
            scales=scales.value, orientation=_value(orientation), upright=upright,
        )
        settings = {
            "detector": detector.value, "descriptor": chosen, "num_points": num_points, "mode": mode.value,
            "scales": scales.value, "single_scale": single_scale, "weights": None if weights is None else str(weights),
            **({} if orientation is None else {"orientation": orientation.value}), **({"upright": True} if upright else {}),
            **({"half": True} if half and form == Format.h5 else {}), **({"camera": camera} if form == Format.colmap else {}),
        }  # fmt: skip
        report, seconds = Report(), 0.0
        if tasks:
            store = open_store(form.value, folder, camera=camera, half=half)
            with store:
                check_settings(settings_place(store), settings, overwrite, store.clear, store.path)
                if overwrite and form == Format.colmap:
                    store.clear()
                started = time.monotonic()
                report = extract_to_files(
                    tasks, extractor, store, described=chosen != "none", overwrite=overwrite, workers=workers,
                    progress=sys.stderr.isatty(),
                )  # fmt: skip
            seconds = time.monotonic() - started
    except USER_ERRORS as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on from here", 130)
    report.failed = refused + report.failed
    typer.echo(
        f"{report.done} extracted ({report.points} points, {seconds:.1f} s), {report.skipped} done before, "
        f"{len(report.failed)} failed -> {folder / FORMATS[form.value]}"
    )
    for path, reason in report.failed:
        typer.echo(f"failed: {path}: {reason}", err=True)
    if report.failed:
        raise typer.Exit(1)


@app.command()
def match(
    images: Annotated[list[str] | None, typer.Argument(help="Two images; or folders, patterns and more images.")] = None,
    output: Annotated[Path | None, typer.Option(help="Two images: picture of the matches. Many: .h5 for hloc or .db of COLMAP.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="List of pairs, two names a line (default: all pairs).")] = None,
    sequential: Annotated[int | None, typer.Option(min=1, help="Each image with so many after it, in natural order of names.")] = None,
    features: Annotated[Path | None, typer.Option(help="Features made before: folder, .h5 or .db (default: extract now).")] = None,
    root_images: Annotated[Path | None, typer.Option(help="Folder that the names of many images start from.")] = None,
    num_points: Annotated[int, typer.Option(min=1)] = 2048,
    detector: DetectorOption = Detector.keynet,
    descriptor: DescriptorOption = None,
    orientation: PairOrientationOption = PairOrientation.auto,
    upright: UprightOption = False,
    rotation_tolerance: Annotated[
        float | None, typer.Option(min=0.1, max=180.0, help="Drop matches that turn otherwise than most by more degrees (REKD: 30).")
    ] = None,
    model: Annotated[
        Model | None, typer.Option(help="Geometry that right matches obey (default: fundamental; of many pairs none).")
    ] = None,
    ratio: Annotated[float, typer.Option(min=0.0, max=1.0, help="Largest ratio of nearest to second distance; 1 = off.")] = 0.95,
    threshold: Annotated[float, typer.Option(min=0.0, help="Largest error of an inlier in pixels.")] = 2.0,
    single_scale: SingleScaleOption = False,
    scales: ScalesOption = Scales.one,
    weights: WeightsOption = None,
    refine: Annotated[
        bool, typer.Option("--refine/--no-refine", help="Sub-pixel positions: of the matches of two images, of the tracks in a .db.")
    ] = True,
    camera: CameraOption = "auto",
    device: Annotated[str, typer.Option()] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Match again what is done already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Match two images, or many pairs into one file: mutual nearest neighbours, ratio test, robust geometry."""
    images = images or []
    chosen = _descriptor(descriptor)
    if chosen == "none":
        _fail("matching needs descriptors; --descriptor none has none")
    if pairs is not None and sequential is not None:
        _fail("give --pairs or --sequential, not both")
    to_file = output is not None and output.suffix in (".h5", ".hdf5", ".db")
    many = len(images) != 2 or any(Path(name).is_dir() for name in images)
    many = many or to_file or any(option is not None for option in (pairs, sequential, features))
    if many and not images and features is None:
        _fail("no images given; name two images, or folders, or give --features")
    options = {
        "detector": detector.value, "descriptor": chosen, "num_points": num_points, "single_scale": single_scale,
        "weights": None if weights is None else str(weights), **({} if scales == Scales.one else {"scales": scales.value}),
        **({} if orientation == "auto" else {"orientation": orientation.value}), **({"upright": True} if upright else {}),
    }  # fmt: skip
    auto = orientation == PairOrientation.auto
    rotation = None if rotation_tolerance is None else math.radians(rotation_tolerance)
    if not many:
        kind_of_two = model or Model.fundamental
        _match_two(images[0], images[1], output, options, device, kind_of_two, ratio, rotation, threshold, refine, auto, as_json)
        return
    if output is None or not to_file:
        came = "nothing" if output is None else output.name
        _fail(f"matches of many pairs need --output FILE.h5 (hloc) or FILE.db (COLMAP); got {came}")
    from .jobs import match_images

    kind = None if model is None else model.value
    try:
        report = match_images(
            images, output, pair_list=pairs, sequential=sequential, features=features, descriptor=descriptor, root=root_images,
            build=lambda: _extractor(options, device), extraction=options, camera=camera, ratio=ratio, rotation=rotation, kind=kind,
            threshold=threshold, refine=refine, auto_orientation=auto, overwrite=overwrite, progress=sys.stderr.isatty(),
        )  # fmt: skip
    except USER_ERRORS as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on from here", 130)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(report), "output": str(output)}))
    else:
        geometry = "" if report.verified is None else f", {report.verified} pairs with a geometry"
        typer.echo(
            f"{report.done} pairs matched ({report.matches} matches{geometry}), {report.skipped} done before, "
            f"{len(report.failed)} failed -> {output}"
        )
    for name, reason in report.failed:
        typer.echo(f"failed: {name}: {reason}", err=True)
    if report.failed:
        raise typer.Exit(1)


def _extractor(options: dict, device: str):
    """The extractor of the options of ``match``."""
    from .extract import build

    words = {key: value for key, value in options.items() if key not in ("detector", "weights")}
    weights = options["weights"]
    return build(_network(options["detector"], None if weights is None else Path(weights)), device=device, **words)


def _match_two(
    a: str,
    b: str,
    output: Path | None,
    options: dict,
    device: str,
    model: Model,
    ratio: float,
    rotation: float | None,
    threshold: float,
    refine: bool,
    auto: bool,
    as_json: bool,
) -> None:
    from functools import partial

    from .auto_orientation import PairMatcher, can_reorient
    from .estimation import estimate
    from .image import load_image
    from .matching import match as match_features
    from .refine import refine_matches

    try:
        extractor = _extractor(options, device)
        image_a, image_b = load_image(a), load_image(b)
        features_a, features_b = extractor.extract(image_a), extractor.extract(image_b)
        matcher = partial(match_features, ratio=None if ratio >= 1 else ratio, rotation_tolerance=rotation)
        if auto and can_reorient(extractor):
            oriented = PairMatcher(extractor, matcher)(features_a, features_b, image_b)
            found, features_b = oriented.matches, oriented.b
        else:
            found = matcher(features_a, features_b)
        if refine:
            found = refine_matches(features_a, features_b, found, (image_a, image_b))
        xy_a, xy_b = found.positions(features_a, features_b)
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


def keep_memory() -> None:
    """Let the C library keep freed memory: handing it back each step and zeroing it anew costs a third of a training's time."""
    import ctypes

    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc's malloc.h: M_MMAP_MAX -4, M_TRIM_THRESHOLD -1
            libc.mallopt(-4, 0)
            libc.mallopt(-1, 2**31 - 1)


@app.command()
def train(
    model: Annotated[
        str, typer.Argument(help="Detectors keynet, keynet-tiny, rekd, rekd-light, sobelnet; descriptors hardnet, hynet, sosnet, desnet.")
    ],
    images: Annotated[
        list[Path], typer.Option(help="Folder of photographs, searched to the bottom; repeatable. A tenth is held out to validate on.")
    ],
    out: Annotated[Path, typer.Option(help="Weights file to write (.safetensors).")],
    preset: Annotated[
        Preset, typer.Option(help="paper: the published schedule; msip: Key.Net's published loss; corners: Key.Net on the very corner.")
    ] = Preset.default,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Time to train for.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train for, instead of minutes.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that make pairs.")] = None,
    precision: Annotated[str | None, typer.Option(help="32-true, bf16-mixed, or auto: the latter where the device computes it.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Detectors: pairs written by `tiepoints pairs`.")] = None,
    patches: Annotated[
        Path | None, typer.Option(help="Descriptors: folder of PhotoTour or HPatches patches to train on instead of --images.")
    ] = None,
    reconstructions: Annotated[
        list[Path] | None, typer.Option(help="Descriptors: folder of COLMAP models with their images to train on too; repeatable.")
    ] = None,
    validation_reconstructions: Annotated[
        list[Path] | None, typer.Option(help="Descriptors: folder of COLMAP models to validate on too; repeatable.")
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="desnet: detector whose candidates it learns, a name or a weights file (default: sobelnet).")
    ] = None,
    dim: Annotated[int | None, typer.Option(help="desnet: descriptor dimension, 128 (default) or 64.")] = None,
    width: Annotated[int | None, typer.Option(help="desnet: factor of its channels, 1 (default) to 4.")] = None,
    init: Annotated[str | None, typer.Option(help="Weights to start from, a name or a file.")] = None,
    validation: Annotated[
        list[Path] | None, typer.Option(help="Folder of photographs to validate on, instead of a tenth of --images; repeatable.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(min=1, help="REKD: number of orientations (default: 36, light 12).")] = None,
    dims: Annotated[tuple[int, int, int] | None, typer.Option(help="REKD: fields of its three layers (default: 2 2 2).")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    devices: Annotated[int, typer.Option(min=1)] = 1,
    validate_every: Annotated[int | None, typer.Option(min=1)] = None,
    save_every: Annotated[float | None, typer.Option(min=0.0, help="Seconds between checkpoints (default: 60).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT.checkpoint.")] = False,
) -> None:
    """Train a detector or a descriptor on any folder of images; no labels needed."""
    from .training.recipes import DESCRIPTORS, MODELS, REKD_SIZES, train_descriptor, train_desnet, train_detector, train_rekd

    keep_memory()
    if steps is not None and minutes is not None:
        _fail("give --steps or --minutes, not both")
    options: dict[str, Any] = {
        "preset": preset.value, "device": device, "devices": devices, "resume": resume, "say": lambda line: typer.echo(line, err=True),
        "minutes": minutes, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
        "workers": workers, "precision": precision, "validation": validation, "validate_every": validate_every, "save_every": save_every,
    }  # fmt: skip
    known = (*MODELS, *REKD_SIZES, *DESCRIPTORS, "desnet")
    if model not in known:
        _fail(f"the model must be one of {', '.join(known)}; got {model!r}")
    described = model == "desnet" or model in DESCRIPTORS
    if described and pairs is not None:
        _fail("--pairs is for detectors; a descriptor trains on --images" + ", or on --patches" * (model in DESCRIPTORS))
    if model not in DESCRIPTORS and patches is not None:
        _fail("--patches is for descriptors (hardnet, hynet, sosnet)")
    if model not in REKD_SIZES and (group_size is not None or dims is not None):
        _fail("--group-size and --dims are for rekd and rekd-light")
    if model != "desnet" and (detector is not None or dim is not None or width is not None):
        _fail("--detector, --dim and --width are for desnet")
    try:
        if described:
            options |= {"reconstructions": reconstructions, "validation_reconstructions": validation_reconstructions}
        elif reconstructions or validation_reconstructions:
            _fail("--reconstructions and --validation-reconstructions are for descriptors")
        if model == "desnet":
            given = {"detector": detector, "dim": dim, "width": width}
            chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
            result = train_desnet(images, out, init=init, **chosen, **options)
        elif model in DESCRIPTORS:
            result = train_descriptor(model, images, out, patches=patches, init=init, **options)
        elif model in REKD_SIZES:
            result = train_rekd(model, images, out, pairs=pairs, init=init, group_size=group_size, dims=dims, **options)
        else:
            result = train_detector(model, images, out, pairs=pairs, init=init, **options)
    except (*USER_ERRORS, RuntimeError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail(f"stopped; go on with --resume ({out}.checkpoint)", 130)
    measure = "matching score" if described else "repeatability" + " with the right turn" * (model in REKD_SIZES)
    typer.echo(
        f"{result.steps} steps, {measure} {result.best:.3f} on held-out photographs at step {result.best_step} -> {out}"
    )


@app.command()
def pairs(
    images: Annotated[Path, typer.Option(help="Folder of photographs.")],
    out: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    count: Annotated[int, typer.Option(min=1)] = 12_000,
    preset: Annotated[str, typer.Option(help="keynet-paper, keynet-code, rekd, turns, patches, dense or default.")] = "default",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[int | None, typer.Option(min=16, help="Side of the windows.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or all of the photographs.")] = "train",
    workers: Annotated[int, typer.Option(min=0)] = 2,
    preview: Annotated[Path | None, typer.Option(help="Picture of the first pairs.")] = None,
) -> None:
    """Write training pairs once, for trainings that can be compared."""
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
def evaluate_patches(
    folder: Annotated[Path, typer.Argument(help="A PhotoTour set (or a folder of them), or HPatches' folder of sequences.")],
    descriptors: Annotated[str, typer.Option(help="Names (also rootsift, raw) or weights files, commas between.")] = "hardnet,rootsift",
    pairs: Annotated[str, typer.Option(help="PhotoTour: file of test pairs in the set.")] = "m50_100000_100000_0.txt",
    tasks: Annotated[Path | None, typer.Option(help="HPatches: folder of the benchmark's task files (default: drawn).")] = None,
    split: Annotated[str, typer.Option(help="HPatches: full, view, illum, or one of splits.json.")] = "full",
    out: Annotated[Path | None, typer.Option(help="JSON file of all numbers.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Published measures of patch descriptors: FPR95 on PhotoTour; verification, matching, retrieval on HPatches."""
    from .evaluation.patchtasks import evaluate_patches as run
    from .evaluation.systems import patch_network
    from .extract import choose_device

    kind = "phototour" if (folder / "info.txt").is_file() or any(folder.glob("*/info.txt")) else "hpatches"
    found = {}
    try:
        where = choose_device(device)
        nets = {name: patch_network(name, where) for name in descriptors.split(",")}
        for name, net in nets.items():
            found[name] = run(net, folder, kind, pairs=pairs, tasks=tasks, split=split, device=where)
            typer.echo(f"{name}: {json.dumps(found[name])}")
        if out is not None:
            out.write_text(json.dumps(found, indent=1) + "\n")
    except USER_ERRORS as error:
        _fail(str(error))


@app.command()
def evaluate(
    dataset: Annotated[
        Path,
        typer.Argument(
            help="Folder of homography sequences (HPatches or Oxford layout), EVD, TILDE's webcams, WxBS or Strecha's scenes, recognised "
            "by content; or a list of posed pairs."
        ),
    ],
    systems: Annotated[str, typer.Option(help="Names with commas between: keynet,sift,fast+rootsift,FILE,LABEL=FILE,random,lattice ...")],
    protocol: Annotated[str, typer.Option(help="Some of keynet,rekd,mutual,homography,pose.")] = "keynet,rekd,mutual,homography,pose",
    extras: Annotated[str, typer.Option(help="Some of rotation,scale,bias, on the first image of each sequence.")] = "",
    num_points: Annotated[int, typer.Option(min=1, help="Points compared.")] = 1000,
    mode: Annotated[str, typer.Option(help="ti = one scale, si = pyramid.")] = "ti",
    split: Annotated[str, typer.Option(help="full, view, illum, d2net, view_test, illum_test, or FILE.json[:KEY].")] = "full",
    out: Annotated[Path | None, typer.Option(help="Results folder (default: evaluation/DATASET-MODE).")] = None,
    features: Annotated[list[Path] | None, typer.Option(help="Features on disk (folder of .kpt.npy or hloc .h5); may be repeated.")] = None,
    resize: Annotated[str | None, typer.Option(help="Posed pairs: W,H or the longest side, as in the papers.")] = None,
    device: Annotated[str, typer.Option()] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Processes; each works on one sequence of one system.")] = 1,
) -> None:
    """Measure systems on pairs with known geometry; run again to go on, then `tiepoints report OUT`."""
    from .evaluation.datasets import open_dataset
    from .evaluation.results import read_rows
    from .evaluation.run import RunSettings
    from .evaluation.run import evaluate as run

    try:
        found = open_dataset(dataset, split)
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
    out: Annotated[Path | None, typer.Option(help="Folder of the report (default: the first results folder).")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Pairs shown as pictures.")] = 4,
    pair: Annotated[list[str] | None, typer.Option(help="SEQUENCE:PAIR to show instead, such as graf:1-4; may be repeated.")] = None,
    systems: Annotated[str, typer.Option(help="Systems in the pictures (default: the first and the best of the others).")] = "",
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
    checkpoint: Annotated[
        Path, typer.Argument(help="Official checkpoint: Key.Net (PyTorch, kornia, TensorFlow .npz, REKD's), REKD, HardNet, SOSNet, HyNet.")
    ],
    out: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    restore_statistics: Annotated[bool, typer.Option("--restore-statistics", help="TensorFlow: the true batch statistics.")] = False,
    input_range: Annotated[float, typer.Option(help="REKD: white inside the network; 1 as its extraction, 255 as its training.")] = 1.0,
) -> None:
    """Convert an official checkpoint into a weights file for --weights or --descriptor."""
    from .importers import load_official
    from .weights import save

    try:
        net = load_official(checkpoint, restore_statistics=restore_statistics, input_range=input_range)
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


@app.command()
def imc(
    images: Annotated[Path, typer.Argument(help="Folder of the benchmark's images: DATASET/SEQUENCE/*.jpg, or in set_100/images below.")],
    out: Annotated[Path, typer.Option(help="Folder of the submission.")],
    label: Annotated[str, typer.Option(help="Its name: lower case letters, digits, '-' and '.'.")],
    num_points: Annotated[int, typer.Option(min=1, help="Most points an image; the categories are 2048 and 8000.")] = 2048,
    detector: DetectorOption = Detector.keynet,
    descriptor: DescriptorOption = None,
    orientation: OrientationOption = None,
    upright: UprightOption = False,
    single_scale: SingleScaleOption = False,
    mode: ModeOption = Mode.default,
    scales: ScalesOption = Scales.one,
    weights: WeightsOption = None,
    matches: Annotated[bool, typer.Option("--matches", help="Add our own matches, verified by a fundamental matrix.")] = False,
    ratio: Annotated[float, typer.Option(min=0.1, max=1.0, help="Largest ratio of nearest to second distance; 1 = off.")] = 0.95,
    threshold: Annotated[float, typer.Option(min=0.0, help="Largest error of an inlier in pixels.")] = 0.5,
    device: Annotated[str, typer.Option()] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Extract and match again what is done.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and write.")] = 2,
) -> None:
    """Write a submission to the Image Matching Challenge 2021 and check it (docs/formats.md)."""
    from .formats.imc import slug
    from .submission import export_imc

    chosen = _descriptor(descriptor)
    if chosen == "none":
        _fail("a submission needs descriptors; --descriptor none has none")
    options = {
        "detector": detector.value, "descriptor": chosen, "num_points": num_points, "mode": mode.value, "scales": scales.value,
        "single_scale": single_scale, "weights": None if weights is None else str(weights),
        **({} if orientation is None else {"orientation": orientation.value}), **({"upright": True} if upright else {}),
    }  # fmt: skip
    try:
        result = export_imc(
            images, out, label, build=lambda: _extractor(options, device), extraction=options,
            keypoint=detector.value if weights is None else slug(weights.stem), descriptor=slug(Path(chosen).stem),
            num_points=num_points, matches=matches, ratio=ratio, threshold=threshold, overwrite=overwrite, workers=workers,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
    except USER_ERRORS as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on from here", 130)
    matched = result.matched
    pairs_done = "" if matched is None else f"; {matched.done} pairs matched ({matched.matches} matches), {matched.skipped} done before"
    typer.echo(
        f"{result.extracted.done} extracted ({result.extracted.points} points), {result.extracted.skipped} done before{pairs_done}; "
        f"{len(result.failed)} failed -> {result.sequences} sequences in {out}"
    )
    for name, reason in result.failed:
        typer.echo(f"failed: {name}: {reason}", err=True)
    for violation in result.violations:
        typer.echo(f"refused by the challenge: {violation}", err=True)
    if result.failed or result.violations:
        raise typer.Exit(1)


@app.command()
def live(
    source: Annotated[list[str], typer.Argument(help="Video file, folder of images, pattern, or number of a camera (the first is 0).")],
    output: Annotated[Path | None, typer.Option(help="Video to write (.mp4 or .avi) instead of showing a window.")] = None,
    num_points: Annotated[int, typer.Option(min=1, help="Most points a frame.")] = 500,
    detector: DetectorOption = Detector.sobelnet,
    descriptor: Annotated[str, typer.Option(help="As for extract; the default is the fast one.")] = "desnet",
    orientation: OrientationOption = None,
    upright: UprightOption = False,
    multi_scale: Annotated[bool, typer.Option("--multi-scale", help="Search a pyramid of scales: slower, follows zoom better.")] = False,
    weights: WeightsOption = None,
    ratio: Annotated[float, typer.Option(min=0.01, max=1.0, help="Largest ratio of nearest to second distance; 1 = off.")] = 0.9,
    max_motion: Annotated[float, typer.Option(min=0.001, help="Farthest motion from frame to frame, part of the image's diagonal.")] = 0.2,
    patience: Annotated[int, typer.Option(min=0, help="Frames that a track may miss before it ends.")] = 1,
    tail: Annotated[int, typer.Option(min=1, help="Last positions of each track that are drawn.")] = 12,
    every: Annotated[int, typer.Option(min=1, help="Work on every so manieth frame.")] = 1,
    max_frames: Annotated[int | None, typer.Option(min=1, help="End after so many frames.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Follow points through a video, a sequence or a camera: shown in a window, or written as a video (docs/live.md)."""
    from contextlib import closing

    from .live import Tracker, VideoFile, VideoFrames, Window, open_source
    from .live import live as run

    chosen = _descriptor(descriptor)
    if chosen == "none":
        _fail("tracking needs descriptors; --descriptor none has none")
    if output is not None and len(source) == 1 and output.exists() and Path(source[0]).exists() and output.samefile(source[0]):
        _fail(f"--output {output} is the source itself; name another file")
    options = {
        "detector": detector.value, "descriptor": chosen, "num_points": num_points, "single_scale": not multi_scale,
        "weights": None if weights is None else str(weights), "orientation": _value(orientation), "upright": upright,
    }  # fmt: skip
    try:
        tracker = Tracker(ratio=None if ratio >= 1 else ratio, max_motion=max_motion, patience=patience, history=tail)
        with closing(open_source(source, every)) as frames:
            camera = isinstance(frames, VideoFrames) and frames.camera
            screen = Window(None if camera else frames.rate) if output is None else VideoFile(output, frames.rate, live=camera)
            with closing(screen):
                progress = output is not None and sys.stderr.isatty()
                summary = run(
                    frames, _extractor(options, device), screen, tracker=tracker, max_frames=max_frames, progress=progress
                )  # fmt: skip
    except USER_ERRORS as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped before the first frame", 130)
    written = output if summary.frames else None
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(summary), "output": None if written is None else str(written)}))
    else:
        ended = " (stopped)" if summary.stopped else ""
        typer.echo(f"frames   {summary.frames} in {summary.seconds:.1f} s{ended}, {summary.frames_per_second:.1f} a second")
        typer.echo(f"points   {summary.points:.0f} a frame")
        typer.echo(f"tracks   {summary.tracks}, length {summary.median_length:g} (median), {summary.mean_length:.1f} (mean) frames")
        if written is not None:
            typer.echo(f"video    {written}")
    for name, reason in summary.skipped:
        typer.echo(f"skipped: {name}: {reason}", err=True)
    if summary.failure:
        _fail(summary.failure)


def main() -> None:
    """Entry point of the ``tiepoints`` command."""
    app()
