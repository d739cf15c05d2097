"""Extractors from trained weights: by names, from a file or folder, or of a Hugging Face
repository; descriptions and model cards of weights.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from .errors import WeightsError, first_line
from .extract import Extractor, build, load_file
from .models.patchnets import DIMENSION, PATCH_SIZE
from .models.spec import DenseSpec, DetectorSpec, PatchSpec, ShapeSpec, spec_of
from .names import AFFINE_SHAPES, DESCRIPTORS, DETECTORS
from .weights import DATA, file_checksum, load, metadata_of, read_graph, table

#: OWNER/NAME of a Hugging Face repository.
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: Option of a network -> what it is.
_KINDS = {
    "detector": "a detector of keypoints",
    "descriptor": "a descriptor",
    "affine": "a network of affine shapes",
}


def from_pretrained(
    source: str | Path, *, revision: str | None = None, **options: Any
) -> Extractor:
    """Build an extractor from trained weights.

    Args:
        source: ``keynet-hardnet`` or one of its names alone (``names.DETECTORS``,
            ``names.DESCRIPTORS`` and ``names.AFFINE_SHAPES``); a weights file; a folder with a
            weights file of a detector, of a descriptor, of affine shapes, or one of each; or such a
            repository of Hugging Face, ``OWNER/NAME``, which is downloaded once.
        revision: branch, tag or commit of the repository.
        options: see ``ExtractOptions``. A detector or descriptor that ``source`` does not have is
            the default one, or that of the option.

    Raises:
        WeightsError: no such names, file, folder or repository; no weights in it, or damaged ones.
        ImportError: ``huggingface_hub``, for a repository, is not installed.
        TypeError, ValueError: an unknown option, one out of range, or one that ``source`` decides.
    """
    networks = _embedded(str(source))
    if not networks:
        path = Path(source)
        if not str(source) or not path.exists():
            path = _downloaded(str(source), revision)
        networks = _of_folder(path) if path.is_dir() else _of_files([path], path)
    if known := sorted(networks.keys() & options.keys()):
        raise ValueError(f"{source} has a {known[0]}; omit {known[0]}={options[known[0]]!r}")
    return build(**networks, **options)


def _embedded(name: str) -> dict[str, str]:
    """Detector and descriptor of ``DETECTOR-DESCRIPTOR`` (or with +, as systems of an evaluation),
    or one of these, or a network of affine shapes; empty if it is not such a name.
    """
    if name in AFFINE_SHAPES and name != "none":
        return {"affine": name}
    described = [descriptor for descriptor in DESCRIPTORS if descriptor != "none"]
    for detector in DETECTORS:
        if name == detector:
            return {"detector": detector}
        rest = name.removeprefix(detector)
        if rest != name and rest[0] in "-+" and rest[1:] in described:
            return {"detector": detector, "descriptor": rest[1:]}
    return {"descriptor": name} if name in described else {}


def _of_folder(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} contains no .safetensors file")
    return _of_files(files, folder)


def _of_files(files: list[Path], source: Path) -> dict[str, str]:
    """Role -> path of weights files, by the networks in them."""
    networks: dict[str, str] = {}
    for path in files:
        role = _role(spec_of(load_file(str(path))))
        if role in networks:
            raise WeightsError(
                f"{source} contains several {role}s, {Path(networks[role]).name} and {path.name}; "
                "name the file"
            )
        networks[role] = str(path)
    return networks


def _role(spec: Any) -> str:
    """The option of ``ExtractOptions`` that takes a network with this spec."""
    known = {DetectorSpec: "detector", ShapeSpec: "affine"}
    return known.get(type(spec), "descriptor")


def _downloaded(name: str, revision: str | None) -> Path:
    """Local copy of the weights files of a Hugging Face repository."""
    if not REPOSITORY.fullmatch(name):
        raise WeightsError(
            f"no weights {name!r}: give DETECTOR-DESCRIPTOR (such as keynet-hardnet) of the "
            f"detectors {', '.join(DETECTORS)} and descriptors {', '.join(DESCRIPTORS[:-1])}; a "
            "file or folder; or OWNER/NAME of a Hugging Face repository"
        )
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            f"{name} is no local file or folder, and a repository of Hugging Face needs "
            f"huggingface_hub: pip install huggingface_hub ({error})"
        ) from error
    try:
        return Path(
            hub.snapshot_download(name, revision=revision, allow_patterns=["*.safetensors"])
        )
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{name} is no local file or folder, and could not be downloaded from Hugging Face "
            f"({first_line(error)})"
        ) from error


def describe(name: str) -> dict[str, Any]:
    """File, checksum, network, settings, number of parameters, metadata of the training and, of
    embedded weights, license and recipe.

    Args:
        name: embedded weights, a weights file or an official checkpoint.

    Raises:
        WeightsError, FileNotFoundError: no such weights, or damaged ones.
    """
    known = table()
    ours = name in known or Path(name).suffix == ".safetensors"
    # of a name that is no file, ``load`` lists the known ones
    net = load(name) if ours or not Path(name).exists() else load_file(name)
    path = DATA / known[name]["file"] if name in known else Path(name)
    content = {
        "file": path.name,
        "sha256": file_checksum(path),
        "network": type(net).__name__,
        "settings": getattr(net, "settings", {}),
        "parameters": sum(p.numel() for p in net.parameters()),
        "facts": metadata_of(path) if ours else {},
    }
    if path.suffix == ".onnx":
        stored = read_graph(path)
        content |= {key: stored[key] for key in ("network", "settings", "facts")}
        del content["parameters"]
    if name in known:
        content |= {key: known[name][key] for key in ("licence", "recipe")}
    return content


def card(name: str) -> str:
    """A model card in Markdown, with the header that Hugging Face reads.

    Args:
        name: as in ``describe``. The license of files that are not embedded is not known, and left
            out.

    Raises:
        WeightsError, FileNotFoundError: as ``describe``.
    """
    content = describe(name)
    embedded = name in table()
    title = name if embedded else Path(name).stem
    spec = spec_of(load_file(name) if not embedded else load(name))
    role = _role(spec)
    header = ["library_name: tiepoints", "tags: [image-matching, local-features]"]
    if role == "detector":
        header.append("pipeline_tag: keypoint-detection")
    if embedded:
        header.insert(0, f"license: {content['licence'].lower()}")
    rows = {
        "file": content["file"],
        "SHA-256": content["sha256"],
        "parameters": content["parameters"],
        **{f"setting `{key}`": value for key, value in content["settings"].items()},
    }
    source = name if embedded else f"OWNER/{title}"
    parts = [
        "---\n" + "\n".join(header) + "\n---",
        f"# {title}",
        f"{content['network']}, {_KINDS[role]} of the Python package `tiepoints`. "
        f"{_interface(spec, content)}",
        f'```python\nimport tiepoints\n\nextractor = tiepoints.from_pretrained("{source}")\n'
        'features = extractor.extract("photo.jpg")\n```',
        "Positions are in pixels of the image, the center of its first pixel at (0, 0). A "
        + (
            "descriptor of the package describes the keypoints."
            if role == "detector"
            else "detector of the package finds the keypoints."
        ),
        _table(rows),
    ]
    if training := _training(content["facts"]):
        parts += ["## Training", _table(training)]
    if embedded:
        parts.append(f"Data, commands and measurements: `{content['recipe']}` of the project.")
    return "\n\n".join(parts) + "\n"


def _interface(spec: Any, content: dict[str, Any]) -> str:
    """What a network takes and returns, in a sentence."""
    if isinstance(spec, DetectorSpec):
        angles = " and a map of orientations" if spec.angles else ""
        return f"Gray image in [0, 1] to a score map of its size{angles}."
    if isinstance(spec, PatchSpec):
        size = f"{PATCH_SIZE} x {PATCH_SIZE}"
        several = ""
        if len(spec.reach) > 1:
            sides = ", ".join(f"{reach:g}" for reach in spec.reach)
            several = f", {len(spec.reach)} of each keypoint with {sides} times the usual side,"
        return f"Gray patches of {size} px{several} to unit descriptors of dimension {DIMENSION}."
    if isinstance(spec, ShapeSpec):
        size = f"{PATCH_SIZE} x {PATCH_SIZE}"
        return f"Gray patches of {size} px to affine shapes, matrices (2,2) of determinant 1."
    if isinstance(spec, DenseSpec):
        dim = content["settings"]["dim"]
        return f"Gray image in [0, 1] to a map of unit descriptors of dimension {dim}."
    return ""


def _training(facts: dict[str, Any]) -> dict[str, Any]:
    """Rows about the training from the metadata of a weights file, without paths."""
    schedule = facts.get("schedule")
    rows = {key: value for key, value in facts.items() if key != "schedule" and value != ""}
    if isinstance(schedule, dict):
        if "optimiser" in schedule:  # of earlier files
            schedule = {"optimizer": schedule["optimiser"], **schedule}
        names = ("steps", "batch_size", "optimizer", "learning_rate", "weight_decay", "seed")
        rows |= {key: schedule[key] for key in names if key in schedule}
    return {
        key: Path(value).name if isinstance(value, str) and value.startswith("/") else value
        for key, value in rows.items()
    }


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
