"""Export the ONNX files of a release: pipelines in float32 and eight bits, with a pyramid and
without, and for COLMAP. ``make export`` runs it.

    python benchmarks/export_files.py --output build/export

Also writes ``files.json`` and ``SHA256SUMS`` (`sha256sum --check SHA256SUMS`). Takes half an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from tiepoints import ExtractOptions
from tiepoints.export import Exported, export_pipeline
from tiepoints.files import atomic_path, write_json

#: Systems: detector and descriptor.
SYSTEMS = (("sobelnet", "desnet"), ("keynet", "hardnet-light"))


def variants() -> dict[str, tuple[dict[str, Any], str]]:
    """Name of each file without suffix -> options of its pipeline, and its form."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for detector, descriptor in SYSTEMS:
        system = {"detector": detector, "descriptor": descriptor}
        for scales, single in (("", False), ("-1scale", True)):
            for bits, precision in (("", "float32"), ("-int8", "int8")):
                options = {**system, "single_scale": single, "precision": precision}
                found[f"{detector}-{descriptor}{scales}{bits}"] = options, "pipeline"
        found[f"{detector}-{descriptor}-colmap"] = {**system, "precision": "float32"}, "colmap"
    return found


def row(result: Exported) -> dict[str, Any]:
    """What the list says of a file."""
    path = Path(result.path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {**dataclasses.asdict(result), "path": path.name, "sha256": digest}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    parser.add_argument("--only", nargs="*", choices=variants(), help="these files, without suffix")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (options, form) in variants().items():
        if arguments.only and name not in arguments.only:
            continue
        path = arguments.output / f"{name}.onnx"
        rows.append(row(export_pipeline(ExtractOptions.of(**options), path, form=form)))
        print(f"{path}: {rows[-1]['size'] / 1e6:.2f} MB, sha256 {rows[-1]['sha256'][:16]}")
    write_json(arguments.output / "files.json", rows)
    with atomic_path(arguments.output / "SHA256SUMS") as tmp_path:
        tmp_path.write_text("".join(f"{row['sha256']}  {row['path']}\n" for row in rows))


if __name__ == "__main__":
    main()
