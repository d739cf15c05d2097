"""Checks of exported ONNX files: their numbers in ONNX Runtime are those of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .backends import cosine
from .errors import DataError
from .extract import ExtractOptions
from .gray import LUMA
from .models.patchnets import PATCH_SIZE

#: Sizes (height, width) of the images with which an exported file is checked, and the number of
#: keypoints asked for: of an odd size, a small one, and more keypoints than there are.
CHECKS = (((97, 131), 20), ((48, 50), 50), ((160, 224), 5000))
#: Numbers of patches with which a patch network is checked.
PATCH_CHECKS = (1, 2, 65)
#: COLMAP repeats the pixels at the right and lower border up to multiples of this side.
COLMAP_STEP = 32
#: Value of ``min_score`` with which a file for COLMAP is checked.
MIN_SCORE = 0.2


@dataclass(frozen=True)
class _Limits:
    """Largest differences of an exported file from what it must compute.

    Attributes:
        reference: what computes that, for messages.
        maps: of the output of a network, relative to the largest value.
        position, largest: of most positions in pixels, and of any.
        descriptors: of descriptors.
        common: fraction of keypoints that must be found by both.
    """

    reference: str
    maps: float
    position: float
    largest: float
    descriptors: float
    common: float


LIMITS = _Limits("torch", 1e-4, 1e-3, 2e-2, 1e-3, 0.99)
#: Values near the limit between two steps of eight bits are rounded to either.
INT8_LIMITS = _Limits("the eight-bit network of the package", 5e-2, 5e-2, 1.0, 0.1, 0.95)
#: Least fidelity of an eight-bit file (``checked``).
LEAST_FIDELITY = 0.9


def session_of(model: Any) -> Any:
    """ONNX Runtime's session of a model, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def picture(size: tuple[int, int]) -> Tensor:
    """A smooth random image (1,1,H,W) with corners."""
    rng = np.random.default_rng(size[0])
    coarse = torch.from_numpy(rng.random((1, 1, size[0] // 6, size[1] // 6), dtype=np.float32))
    smooth = nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    blocks = nn.functional.interpolate(coarse.flip(-1), size=size, mode="nearest")
    return (0.6 * smooth + 0.4 * blocks).clamp(0, 1)


def patches(count: int, channels: int = 1) -> Tensor:
    """Parts (N,C,32,32) of different pictures."""
    pictures = [picture((PATCH_SIZE + i, PATCH_SIZE + 3)) for i in range(count * channels)]
    parts = torch.cat([picture[..., :PATCH_SIZE, :PATCH_SIZE] for picture in pictures])
    return parts.view(count, channels, PATCH_SIZE, PATCH_SIZE)


def map_difference(net: nn.Module, images: list[Tensor], found: list[np.ndarray]) -> float:
    """Largest difference from the output of a network, relative to its largest value."""
    largest = 0.0
    with torch.inference_mode():
        for image, output in zip(images, found, strict=True):
            expected = net(image).numpy()
            scale = max(float(np.abs(expected).max()), 1e-9)
            largest = max(largest, float(np.abs(output - expected).max()) / scale)
    return largest


def map_cosine(net: nn.Module, images: list[Tensor], found: list[np.ndarray]) -> float:
    """Smallest cosine to the output of a network for one of the images."""
    with torch.inference_mode():
        return min(
            cosine(torch.from_numpy(output), net(image))
            for image, output in zip(images, found, strict=True)
        )


@dataclass(frozen=True)
class Runner:
    """An exported pipeline as its users run it.

    Attributes:
        session: of ONNX Runtime.
        form: of the file.
    """

    session: Any
    form: str

    def image(self, size: tuple[int, int]) -> Tensor:
        """The image (1,1,H,W) or (1,3,H,W) with which the file is checked."""
        if self.form != "colmap":
            return picture(size)
        color = torch.cat([picture(size), *picture(size).flip(2, 3).split(1)], dim=1)
        image = torch.cat([color, picture(size).flip(3)], dim=1)
        below, right = (-side % COLMAP_STEP for side in size)
        return nn.functional.pad(image, (0, right, 0, below), mode="replicate")

    def __call__(self, image: Tensor, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Positions (K,2), or positions and scales (K,3), and descriptors."""
        if self.form != "colmap":
            feeds = {"image": image.numpy(), "max_keypoints": np.array([count])}
            xy, scale, _, *descriptors = self.session.run(None, feeds)
            return np.c_[xy, scale], descriptors[0] if descriptors else None
        feeds = {
            "image": image.numpy(),
            "max_keypoints": np.array(count),
            "min_score": np.array(MIN_SCORE, np.float32),
        }
        keypoints, descriptors, scores = self.session.run(None, feeds)
        if scores.size and not MIN_SCORE <= scores.min() <= scores.max() <= 1:
            raise DataError(f"the exported scores are not in [{MIN_SCORE}, 1]; it was not written")
        sides = np.array([image.shape[-1] - 1, image.shape[-2] - 1])
        return (keypoints[0] + 1) / 2 * sides, descriptors[0]


def _expected(
    run: Runner, image: Tensor, options: ExtractOptions, count: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """What an exported pipeline must compute."""
    gray = image
    if image.shape[1] == 3:
        gray = (image * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    backend = "onnxruntime" if options.precision == "int8" else "torch"
    exact = replace(options, num_keypoints=count, device="cpu", backend=backend)
    found = exact.build().extract_tensor(gray)[0]
    columns = found.xy if run.form == "colmap" else torch.column_stack([found.xy, found.scale])
    described = None if found.descriptors is None else found.descriptors.numpy()
    return columns.numpy(), described


def _nearest(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of (N,C) the nearest of (M,C): index, and largest difference of a column."""
    if not len(b):
        return np.zeros(len(a), int), np.full(len(a), np.inf)
    difference = np.abs(a[:, None] - b[None]).max(axis=2)
    return difference.argmin(axis=1), difference.min(axis=1)


def check_pipeline(run: Runner, options: ExtractOptions) -> float:
    """Largest difference in pixels of a position from torch.

    Raises:
        DataError: the features differ.
    """
    limits = INT8_LIMITS if options.precision == "int8" else LIMITS
    largest = 0.0
    for size, count in CHECKS:
        image = run.image(size)
        a, wanted = _expected(run, image, options, count)
        b, descriptors = run(image, count)
        if not len(a) and len(b):
            raise DataError(
                f"the exported pipeline finds {len(b)} keypoints, {limits.reference} none"
            )
        if not len(a):
            continue
        index, distance = _nearest(a, b)
        common = distance < limits.largest
        exact_share = (distance < limits.position).mean()
        fewer = len(b) < limits.common * len(a) or len(a) < limits.common * len(b)
        if fewer or min(common.mean(), exact_share) < limits.common:
            raise DataError(
                f"the exported pipeline finds {len(b)} keypoints in an image of {size[1]} x "
                f"{size[0]} pixels, {common.mean():.1%} of the {len(a)} of {limits.reference}; it "
                "was not written"
            )
        largest = max(largest, float(distance[common].max()))
        if descriptors is not None and wanted is not None:
            off = float(np.abs(wanted[common] - descriptors[index[common]]).max())
            if not off <= limits.descriptors:
                raise DataError(
                    f"the descriptors of the exported pipeline differ by {off:.2g} from those of "
                    f"{limits.reference}; it was not written"
                )
    return largest


def fidelity_of(run: Runner, options: ExtractOptions) -> dict[str, float]:
    """Likeness of an exported eight-bit pipeline to the networks in float32.

    Raises:
        DataError: it is too low.
    """
    found, cosines = [], []
    for size, count in CHECKS:
        image = run.image(size)
        a, wanted = _expected(run, image, replace(options, precision="float32"), count)
        b, descriptors = run(image, count)
        index, distance = _nearest(a[:, :2], b[:, :2])
        common = distance < 1
        found.append(common)
        if descriptors is not None and wanted is not None:
            cosines.append((wanted[common] * descriptors[index[common]]).sum(axis=1))
    measures = {"keypoints": float(np.concatenate(found).mean())}
    if cosines:
        measures["cosine"] = float(np.concatenate(cosines).mean())
    return checked(measures)


def checked(fidelity: dict[str, float]) -> dict[str, float]:
    """The fidelity of an eight-bit file (``export.Exported``).

    Raises:
        DataError: it is too low.
    """
    for measure, value in fidelity.items():
        if not value >= LEAST_FIDELITY:
            raise DataError(
                f"the eight-bit networks are too far from those in float32 ({measure} {value:.3f}, "
                f"at least {LEAST_FIDELITY}); nothing was written; export without --int8"
            )
    return fidelity
