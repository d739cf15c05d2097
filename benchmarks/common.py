"""Functions shared by the benchmarks: networks by name, sequences of a folder, machine metadata."""

from __future__ import annotations

import datetime
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tiepoints.checkpoints import load_official
from tiepoints.detect import response_floor
from tiepoints.image import load_image
from tiepoints.jobs.mapping import MapOptions, ModelStatistics, map_images
from tiepoints.models.spec import fused
from tiepoints.training.recipes import TrainData
from tiepoints.weights import load

SEQUENCES = ("graf", "boat", "bikes", "leuven")


def load_network(system: str):
    """Load a network by embedded name or weights file (of this package or official) for inference;
    returns it and its score threshold.
    """
    path = Path(system)
    net = load_official(path) if path.is_file() and path.suffix != ".safetensors" else load(system)
    run = fused(net)
    return run, response_floor(run) * 1.001 + 1e-6


def sequence_images(folder: Path, first: int = 4) -> list[Path]:
    """The first images of each sequence of an Oxford folder."""
    return [folder / s / f"{k}.png" for s in SEQUENCES for k in range(1, first + 1)]


def held_out_photos(folder: Path) -> list[Path]:
    """The photographs of a folder that trainings hold out."""
    return TrainData(folder).photographs(log=False)[1]


def homography(folder: Path, sequence: str, k: int) -> torch.Tensor:
    """Homography (3,3) from image 1 to image k."""
    return torch.from_numpy(np.loadtxt(folder / sequence / f"H_1_{k}"))


def machine() -> dict[str, str]:
    """Versions, processor and date, to store with results."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def vga_image(file: Path | None) -> torch.Tensor:
    """A gray image (1,1,480,640) from a file, by default scikit-image's motorcycle."""
    if file is None:
        import skimage.data

        image = Image.fromarray(skimage.data.stereo_motorcycle()[0])
    else:
        image = Image.open(file)
    return load_image(image.convert("L").resize((640, 480), Image.Resampling.LANCZOS))


def largest_model(database: Path, work: Path, seed: int) -> dict[str, Any]:
    """Statistics of the largest model of COLMAP's mapper with one seed and one thread; ``work`` is
    a temporary folder.
    """
    models = map_images(database, work, MapOptions(seed=seed, threads=1))
    empty = ModelStatistics(0, 0, 0, 0.0, 0.0)
    content = asdict(ModelStatistics.of(models[0]) if models else empty)
    return {"models": len(models), "registered": content.pop("images"), **content, "seed": seed}
