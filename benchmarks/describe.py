"""Time to describe 2,048 patches on one thread with HardNet, ours and kornia's with the same
weights, and the accuracy of bfloat16.

bfloat16 is slower than float32 on processors that emulate it. Its accuracy is measured with weights
and feature maps rounded to bfloat16 between float32 convolutions, which is equivalent on every
processor.

    python benchmarks/describe.py [--oxford FOLDER] [--weights hardnet] [--repeat 3] \\
        [--out describe.json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from common import SEQUENCES, homography, machine
from tiepoints.describe import PatchDescriptor, chunk_size
from tiepoints.extract import build
from tiepoints.image import load_image
from tiepoints.matching import match
from tiepoints.metrics.matching import match_errors
from tiepoints.models.patchnets import HardNet, PatchNet
from tiepoints.pyramid import build_pyramid
from tiepoints.structs import Features
from tiepoints.weights import load

PATCHES = 2048
NUM_KEYPOINTS = 2000


def kornia_twin(net: PatchNet) -> torch.nn.Module:
    """kornia's HardNet with our weights."""
    from kornia.feature import HardNet as KorniaHardNet

    other = KorniaHardNet(pretrained=False).eval()
    renamed = {}
    for k in range(7):
        index = 3 * k if k < 6 else 19
        renamed[f"features.{index}.weight"] = net.state_dict()[f"convolutions.{k}.weight"]
        for part in ("running_mean", "running_var"):
            renamed[f"features.{index + 1}.{part}"] = net.state_dict()[f"norms.{k}.{part}"]
    other.load_state_dict(renamed, strict=False)
    return other


def rounded(net: PatchNet) -> PatchNet:
    """The fused network with weights and feature maps rounded to bfloat16."""
    copy = net.fused()
    for layer in copy.convolutions:
        for parameter in layer.parameters():
            parameter.data = parameter.data.bfloat16().float()
        layer.register_forward_pre_hook(lambda _, maps: (maps[0].bfloat16().float(),))
        layer.register_forward_hook(lambda _, __, out: out.bfloat16().float())
    return copy


def milliseconds(describe, patches: torch.Tensor, repeat: int) -> float:
    """Minimum time of ``repeat`` runs after a warm-up."""
    times = []
    with torch.inference_mode():
        for _ in range(repeat + 1):
            start = time.perf_counter()
            describe(patches)
            times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


def accuracy(oxford: Path, nets: dict[str, torch.nn.Module]) -> dict[str, float]:
    """MMA@3 in % of each network on the same Key.Net keypoints, mean over all pairs 1-k."""
    detector = build("keynet", "none", device="cpu", num_keypoints=NUM_KEYPOINTS)
    describers = {name: PatchDescriptor(net) for name, net in nets.items()}
    scores: dict[str, list[float]] = {name: [] for name in nets}
    for sequence in SEQUENCES:
        features: dict[str, list[Features]] = {name: [] for name in nets}
        for k in range(1, 7):
            image = load_image(oxford / sequence / f"{k}.png")
            found, pyramid = detector.extract(image), build_pyramid(image)
            for name, describe in describers.items():
                features[name].append(
                    Features(
                        found.keypoints, describe(pyramid, found.keypoints, 0), found.image_size
                    )
                )
        for name, (first, *others) in features.items():
            for k, other in enumerate(others, start=2):
                errors = match_errors(
                    first.xy, other.xy, homography(oxford, sequence, k), match(first, other).index
                )
                scores[name].append(float((errors <= 3).double().mean()) if len(errors) else 0.0)
    return {name: 100 * sum(values) / len(values) for name, values in scores.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--oxford", type=Path)
    parser.add_argument("--weights", default="hardnet", help="name, file, or 'random'")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    net = HardNet().eval() if args.weights == "random" else load(args.weights)
    assert isinstance(net, PatchNet)
    patches = torch.rand(PATCHES, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def chunked(module: torch.nn.Module):
        return lambda patches: torch.cat(
            [module(part) for part in patches.split(chunk_size(patches.device))]
        )

    times = {"kornia float32": milliseconds(kornia_twin(net), patches, args.repeat)}
    times["ours float32"] = milliseconds(chunked(net.fused()), patches, args.repeat)
    # a part of the patches, as emulated bfloat16 takes minutes
    times["ours bfloat16"] = 8 * milliseconds(
        chunked(net.fused(torch.bfloat16)), patches[: PATCHES // 8], 1
    )
    kornia = times["kornia float32"]
    content = {
        "machine": machine(),
        "patches": PATCHES,
        "milliseconds": times,
        "times faster than kornia": {name: kornia / value for name, value in times.items()},
    }
    for name, value in times.items():
        print(f"{name:16} {value:8.0f} ms  {kornia / value:5.2f} times kornia's speed")
    if args.oxford:
        content["MMA@3 %"] = accuracy(
            args.oxford, {"float32": net.fused(), "bfloat16": rounded(net)}
        )
        print(
            "MMA@3 %:",
            ", ".join(f"{name} {value:.2f}" for name, value in content["MMA@3 %"].items()),
        )
    if args.out:
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
