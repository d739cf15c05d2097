"""Features of a synthetic image by every kind of system, stored in ``data/outputs.npz``.

``python tests/record_outputs.py`` writes them again after a change of the shipped weights;
``test_outputs.py`` checks that changes of the code do not change them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiepoints import build
from tiepoints.detect import PUBLISHED
from tiepoints.names import DESCRIPTOR, DETECTOR

FILE = Path(__file__).parent / "data" / "outputs.npz"
#: Name -> detector, descriptor, options.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "keynet_hardnet": ("keynet", "hardnet", {"per_scale": False, **PUBLISHED}),
    "tiny_hynet_single": ("keynet-tiny", "hynet", {"single_scale": True, **PUBLISHED}),
    "sobelnet_desnet": ("sobelnet", "desnet", PUBLISHED),
    "rekd_light_sosnet": ("rekd-light", "sosnet", PUBLISHED),
    "keynet_rootsift": (
        *("keynet", "rootsift"),
        {"per_scale": True, "orientation": "dominant", **PUBLISHED},
    ),
    "keynet_official": ("keynet", "none", {"official": True}),
    "default": (DETECTOR, DESCRIPTOR, {}),
}
#: Number of descriptor columns stored.
COLUMNS = 8


def image() -> np.ndarray:
    """(144,192) float32: overlapping boxes and noise."""
    rng = np.random.default_rng(7)
    canvas = np.full((144, 192), 0.5, np.float32)
    for _ in range(40):
        x, y = rng.integers(0, 170), rng.integers(0, 125)
        w, h = rng.integers(6, 40), rng.integers(6, 30)
        canvas[y : y + h, x : x + w] = rng.random()
    return np.clip(canvas + rng.normal(0, 0.01, canvas.shape), 0, 1).astype(np.float32)


def features(name: str) -> dict[str, np.ndarray]:
    """Keypoints (N,5) x, y, scale, angle, score, and the first columns of the descriptors."""
    detector, descriptor, options = CASES[name]
    extractor = build(
        detector, descriptor, num_keypoints=40, precision="float32", device="cpu", **options
    )
    found = extractor.extract(image())
    columns = (found.scale, found.angle, found.score)
    keypoints = torch.cat([found.xy, *(column[:, None] for column in columns)], dim=1)
    arrays = {"keypoints": keypoints.numpy()}
    if found.descriptors is not None:
        arrays["descriptors"] = found.descriptors[:, :COLUMNS].numpy()
    return arrays


def main() -> None:
    """Write the file."""
    arrays = {f"{name}.{key}": a for name in CASES for key, a in features(name).items()}
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
