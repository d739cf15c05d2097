"""Extraction with an exported pipeline in ONNX Runtime, without torch.

``Extractor("sobelnet+desnet").extract("photo.jpg")`` gives the features of
``tiepoints.build("sobelnet", "desnet")`` up to rounding. Needs numpy, pillow and onnxruntime only
(docs/how-to/lite.md).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import DataError, first_line
from .files import (
    LFS_POINTER,
    Lock,
    Task,
    collect,
    is_disk_full,
    is_lfs_pointer,
    write_json,
)
from .formats.arrays import clear_arrays, feature_paths, write_arrays
from .formats.records import (
    RecordLog,
    file_stamp,
    read_settings,
    with_program,
    without_information,
)
from .names import EXTRACT_NUM_KEYPOINTS, LITE_GRAPH, MATCH_MAX_SIZE
from .progress import Progress
from .reading import Notices, ReadOptions, read_gray

logger = logging.getLogger(__name__)

DATA = Path(__file__).parent / "data"
#: Shortest side of an image that a pipeline takes; smaller ones have no keypoints.
LEAST_SIDE = 16
INPUTS = ("image", "max_keypoints")
OUTPUTS = ("keypoints", "scales", "scores", "descriptors")


@dataclass(frozen=True)
class Features:
    """Features of an image, N rows each, strongest first.

    Attributes:
        keypoints: (N,2) x, y in pixels of the image; the center of the first one is (0, 0).
        scales, scores: (N,).
        descriptors: (N,D) of unit length, or None.
        image_size: (width, height).
    """

    keypoints: np.ndarray
    scales: np.ndarray
    scores: np.ndarray
    descriptors: np.ndarray | None
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)


def graphs() -> dict[str, dict[str, Any]]:
    """Name -> entry of every embedded pipeline in ``data/index.toml``."""
    return tomllib.loads((DATA / "index.toml").read_text()).get("graphs", {})


class Extractor:
    """Extracts features of images with a pipeline that ``tiepoints export`` has written.

    Args:
        graph: name of an embedded pipeline, or an ONNX file.
        num_keypoints: maximum number of keypoints per image.
        max_size: images with a longer side are reduced to this many pixels; positions and scales
            are still those of the original image. None = no limit; the memory grows with the
            image, about 400 bytes per pixel.
        read: how images are read.
        threads: of ONNX Runtime; None = one per core.

    Raises:
        FileNotFoundError: no file of that name.
        DataError: the file is damaged, or no pipeline.
        ValueError: an argument is out of range.
        ImportError: onnxruntime is missing.
    """

    def __init__(
        self,
        graph: str | os.PathLike = LITE_GRAPH,
        *,
        num_keypoints: int = EXTRACT_NUM_KEYPOINTS,
        max_size: int | None = MATCH_MAX_SIZE,
        read: ReadOptions | None = None,
        threads: int | None = None,
    ):
        if num_keypoints < 1:
            raise ValueError(f"num_keypoints must be at least 1, got {num_keypoints}")
        if max_size is not None and max_size < LEAST_SIDE:
            raise ValueError(f"max_size must be at least {LEAST_SIDE} pixels, got {max_size}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.num_keypoints, self.max_size = num_keypoints, max_size
        self.read = read or ReadOptions()
        self.path, content = _read_graph(graph)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.session = _session(self.path, content, threads)
        metadata = self.session.get_modelmeta().custom_metadata_map
        #: Metadata of the file: networks, licences, options.
        self.metadata: dict[str, str] = {
            key.removeprefix("tiepoints."): value for key, value in metadata.items()
        }
        self.outputs = [output.name for output in self.session.get_outputs()]
        inputs = tuple(one.name for one in self.session.get_inputs())
        if inputs != INPUTS or tuple(self.outputs) not in (OUTPUTS, OUTPUTS[:3]):
            raise DataError(
                f"{self.path} is no pipeline (inputs {', '.join(inputs)}); write one with: "
                "tiepoints export --form pipeline"
            )

    def extract(self, image: str | os.PathLike | Image.Image | np.ndarray) -> Features:
        """Extract the features of an image.

        Keypoints on pixels without content are removed (``reading``), so there may be fewer.

        Args:
            image: path, PIL image, or array (H,W), (H,W,3) RGB or (H,W,4).

        Raises:
            FileNotFoundError, DataError, ValueError: the image cannot be used.
        """
        found = read_gray(image, self.read)
        return self.extract_gray(found.pixels, found.mask)

    def extract_gray(self, gray: np.ndarray, mask: np.ndarray | None = None) -> Features:
        """Extract the features of a gray image (H,W) float32 in [0,1], with keypoints only where
        ``mask`` (H,W) bool is true.
        """
        h, w = gray.shape
        small = _reduced(gray, self.max_size)
        if min(small.shape) < LEAST_SIDE:
            return self._empty((w, h))
        feeds = {
            "image": np.ascontiguousarray(small[None, None]),
            "max_keypoints": np.array([self.num_keypoints], np.int64),
        }
        xy, scales, scores, *rest = self.session.run(None, feeds)
        ratio = np.array([w / small.shape[1], h / small.shape[0]])
        if small.shape != gray.shape:
            xy = ((xy + 0.5) * ratio - 0.5).astype(np.float32)
            scales = (scales * np.sqrt(ratio.prod())).astype(np.float32)
        features = Features(xy, scales, scores, rest[0] if rest else None, (w, h))
        return features if mask is None else _inside(features, mask)

    def _empty(self, size: tuple[int, int]) -> Features:
        zeros = np.zeros(0, np.float32)
        described = None
        if len(self.outputs) == len(OUTPUTS):
            described = np.zeros((0, self.session.get_outputs()[3].shape[1]), np.float32)
        return Features(np.zeros((0, 2), np.float32), zeros, zeros, described, size)

    def settings(self) -> dict[str, Any]:
        """The options of the features for the record of a results folder, as those of
        ``tiepoints extract``.
        """
        options = json.loads(self.metadata.get("options", "{}"))
        chosen = {"num_keypoints": self.num_keypoints, "max_size": self.max_size}
        return {**options, **chosen, **asdict(self.read)}


def _read_graph(graph: str | os.PathLike) -> tuple[Path, bytes]:
    entry = graphs().get(str(graph))
    path = DATA / entry["file"] if entry else Path(graph)
    if not path.is_file():
        raise FileNotFoundError(
            f"no pipeline named {str(graph)!r}; known names are {', '.join(graphs())}, or give an "
            ".onnx file written by: tiepoints export"
        )
    content = path.read_bytes()
    if is_lfs_pointer(content[:64]):
        raise DataError(f"{path} {LFS_POINTER}")
    if entry and hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise DataError(f"{path} differs from its checksum; reinstall the package")
    return path, content


def _session(path: Path, content: bytes, threads: int | None) -> Any:
    try:
        import onnxruntime as runtime
    except ImportError as error:  # the extra would install torch
        raise ImportError(
            f"extraction without torch needs onnxruntime: pip install onnxruntime ({error})"
        ) from error
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    options.intra_op_num_threads = threads or 0
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    # its exceptions have no common base class
    except Exception as error:
        raise DataError(
            f"{path} is no ONNX file that ONNX Runtime can read ({first_line(error)}); write it "
            "again with: tiepoints export"
        ) from error


def _reduced(gray: np.ndarray, max_size: int | None) -> np.ndarray:
    """An image whose longer side is at most ``max_size``, bilinear with anti-aliasing."""
    h, w = gray.shape
    longest = max(h, w)
    if max_size is None or longest <= max_size:
        return gray
    size = max(1, round(w * max_size / longest)), max(1, round(h * max_size / longest))
    return np.asarray(Image.fromarray(gray).resize(size, Image.Resampling.BILINEAR))


def _inside(features: Features, mask: np.ndarray) -> Features:
    """The features on pixels where a mask is true."""
    x, y = np.rint(features.keypoints).astype(np.intp).T
    kept = mask[y.clip(0, mask.shape[0] - 1), x.clip(0, mask.shape[1] - 1)]
    described = None if features.descriptors is None else features.descriptors[kept]
    return replace(
        features,
        keypoints=features.keypoints[kept],
        scales=features.scales[kept],
        scores=features.scores[kept],
        descriptors=described,
    )


# ---- many images


@dataclass
class LiteReport:
    """Result of ``extract_files``.

    Attributes:
        done, skipped: number of images extracted, and of those with stored features.
        keypoints: number of keypoints of the images extracted.
        seconds: duration of the extraction.
        failed: (image, reason).
        ignored: number of files in the given folders that are not images.
        output: folder of the features.
    """

    done: int = 0
    skipped: int = 0
    keypoints: int = 0
    seconds: float = 0.0
    failed: list[tuple[str, str]] = field(default_factory=list)
    ignored: int = 0
    output: str = ""


def extract_files(
    images: Iterable[str],
    output: Path,
    extractor: Extractor,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> LiteReport:
    """Extract images to the files of ``tiepoints extract --format npy``; run again, it resumes.

    Args:
        images: files, folders and patterns (``files.collect``).
        output: folder of the features.
        overwrite: extract images with stored features again.
        progress: whether to show the progress.

    Raises:
        DataError: the folder has features of other settings.
        OSError: the features cannot be written.
    """
    started = time.monotonic()
    found = collect(images)
    report = LiteReport(ignored=found.skipped, output=str(output), failed=list(found.refused))
    notices = Notices()
    output.mkdir(parents=True, exist_ok=True)
    with Lock(output, shared=True), RecordLog(output / "images.jsonl") as log:
        _check_settings(output, extractor.settings(), log, overwrite)
        bar = Progress(len(found.tasks), unit="image", label="extract", enabled=progress)
        with bar:
            for task in found.tasks:
                try:
                    _extract_file(task, output, extractor, log, report, notices, overwrite)
                except (OSError, DataError, ValueError, RuntimeError, MemoryError) as error:
                    if is_disk_full(error):
                        raise
                    report.failed.append((str(task.path), first_line(error)))
                bar.update()
    notices.log()
    report.seconds = time.monotonic() - started
    return report


def _check_settings(
    output: Path, settings: dict[str, Any], log: RecordLog, overwrite: bool
) -> None:
    """Compare the settings with those of a folder that has features, and write them."""
    path = output / "settings.json"
    before = read_settings(path)
    settings = json.loads(json.dumps(settings))
    if before is None or without_information(before) != settings:
        if next(output.rglob("*.kpt.npy"), None) is not None:
            if not overwrite:
                raise DataError(
                    f"{output} has features of other settings; use another folder, or replace them "
                    "with --overwrite"
                )
            log.clear()
            clear_arrays(output)
        write_json(path, with_program(settings))


def _extract_file(
    task: Task,
    output: Path,
    extractor: Extractor,
    log: RecordLog,
    report: LiteReport,
    notices: Notices,
    overwrite: bool,
) -> None:
    name, base = str(task.relative), output / task.relative
    stamp = file_stamp(task.path)
    source = None if stamp is None else {"size": stamp[0], "mtime_ns": stamp[1]}
    record = log.get(name)
    if (
        not overwrite
        and feature_paths(base)[0].is_file()
        and record is not None
        and (source is None or all(record.get(key) == value for key, value in source.items()))
    ):
        report.skipped += 1
        return
    reading = read_gray(task.source, extractor.read)
    notices.add(task.relative, reading)
    features = extractor.extract_gray(reading.pixels, reading.mask)
    columns = [features.keypoints, features.scales[:, None], features.scores[:, None]]
    base.parent.mkdir(parents=True, exist_ok=True)
    digest = write_arrays(base, np.concatenate(columns, axis=1), features.descriptors)
    log.put(name, **(source or {}), features=digest)
    report.done += 1
    report.keypoints += len(features)
