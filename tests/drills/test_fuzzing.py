"""Damaged and hostile files: images, stores of features and weights.

A child process with bounded memory reads files that hypothesis mutates. Allowed are success and the
documented errors; not allowed are other exceptions, crashes, hangs, large allocations and writes.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drilling import FULL, number, run, texture, write_photos
from PIL import Image

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
pytest.importorskip("h5py")

#: Seconds for one file, and bytes that reading small files may add to the process. A decoder may
#: allocate the pixels that a header promises, up to Pillow's own limit.
TIME_LIMIT = 20
MEMORY = 3 << 30
#: File with the file that is read and its changes.
LAST = "last.json"
#: Values at the limits of the types of headers.
EXTREME = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x8000000000000000]


def mutations() -> Any:
    """Lists of changes (kind, position in [0, 1) or in the header, value)."""
    place = st.one_of(st.integers(0, 120), st.floats(0, 1, exclude_max=True))
    changes = st.tuples(
        st.sampled_from(("flip", "byte", "number", "delete", "repeat", "truncate")),
        place,
        st.one_of(st.sampled_from(EXTREME), st.integers(0, 255)),
    )
    return st.lists(changes, max_size=6)


def mutate(data: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    content = bytearray(data)
    for kind, place, value in changes:
        if not content:
            break
        at = place if isinstance(place, int) else int(place * len(content))
        at = min(at, len(content) - 1)
        if kind == "flip":
            content[at] ^= 1 << value % 8
        elif kind == "byte":
            content[at] = value & 0xFF
        elif kind == "number":  # widths, lengths and offsets, in both orders of bytes
            order = "little" if value % 2 else "big"
            size = 8 if value > 0xFFFFFFFF else 4 if value > 0xFFFF else 2
            content[at : at + size] = value.to_bytes(size, order)
        elif kind == "delete":
            del content[at : at + 1 + value % 64]
        elif kind == "repeat":
            content[at:at] = content[at : at + 1 + value % 64]
        else:
            del content[at:]
    return bytes(content)


# ---- the child process


class Outside(BaseException):
    """A file outside the folder was written."""


class Hang(BaseException):
    """Reading took longer than ``TIME_LIMIT``; not an ``Exception``, which readers may handle."""


#: Audit events of changes in the file system -> the arguments that are changed paths.
CHANGES = {
    **dict.fromkeys(("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"), (0,)),
    **{"os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,)},
}


def changed_paths(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """Paths that an audit event creates, changes or removes."""
    places = CHANGES.get(event, ())
    if event == "open":
        mode, flags = arguments[1:3]
        if isinstance(mode, str):
            writing = any(letter in mode for letter in "wax+")
        else:  # os.open
            writing = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        places = (0,) * writing
    paths = [arguments[place] for place in places]
    return [os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike)]


def _guard(folder: Path) -> None:
    """Forbid writes outside of ``folder``, and bound memory and time."""
    os.chdir(folder)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        for path in changed_paths(event, arguments):
            # relative paths begin at the folder, or at an open folder below it
            inside = not path.startswith("/") or f"{path}/".startswith(f"{folder}/")
            if path != os.devnull and (not inside or ".." in path.split("/")):
                raise Outside(f"{event} {path}")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, _timeout)


def _timeout(number: int, frame: Any) -> None:
    raise Hang(f"still reading after {TIME_LIMIT} s")


def _fuzz(kind: str, folder: Path, count: int, pipe: Any) -> None:
    """Read ``count`` mutated files of a kind; sends (number of runs, failures)."""
    import torch  # noqa: F401  its memory is not that of reading

    corpus, read = KINDS[kind](folder)
    read(corpus[0][0], corpus[0][1])  # imports and caches
    _guard(folder)
    hypothesis.configuration.set_hypothesis_home_dir(folder / "hypothesis")
    runs = 0
    failures: dict[str, str] = {}  # the first of each type and origin

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=not FULL,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(st.integers(0, len(corpus) - 1), mutations())
    def try_file(index: int, changes: list[Any]) -> None:
        nonlocal runs
        runs += 1
        name, data = corpus[index]
        example = json.dumps([name, changes])
        (folder / LAST).write_text(example)  # there after a crash
        signal.alarm(TIME_LIMIT)
        try:
            read(name, mutate(data, changes))
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            origin = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
            failures.setdefault(f"{type(error)} {frame.lineno}", f"{example}: {origin}")
        finally:
            signal.alarm(0)

    try_file()
    pipe.send((runs, list(failures.values())))


def fuzz(kind: str, folder: Path, count: int) -> tuple[int, list[str]]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_fuzz, args=(kind, folder, count, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(60 + 2 * count):  # a decoder that does not return to Python
            return 1, [f"no end at {(folder / LAST).read_text()}"]
        return ours.recv()
    except EOFError:
        process.join(5)
        return 1, [f"the process ended with {process.exitcode} at {(folder / LAST).read_text()}"]
    finally:
        process.kill()


# ---- kinds of files


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def images(folder: Path) -> tuple[list[tuple[str, bytes]], Callable[[str, bytes], None]]:
    from tiepoints.errors import DataError
    from tiepoints.image import ReadOptions, load_image, read_image

    gray = texture(size=(48, 40))
    color = Image.merge("RGB", [texture(seed, (48, 40)) for seed in range(3)])
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    decimal = Image.fromarray(np.asarray(gray).astype(np.float32))
    alpha = color.copy()
    alpha.putalpha(gray)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    corpus = [
        ("a.jpg", encode(color, "JPEG", exif=exif)),
        ("b.jpg", encode(gray, "JPEG", progressive=True)),
        ("a.png", encode(alpha, "PNG")),
        ("b.png", encode(deep, "PNG")),
        ("c.png", encode(color.quantize(16), "PNG")),
        ("a.tif", encode(color, "TIFF")),
        ("b.tif", encode(deep, "TIFF", compression="tiff_lzw")),
        ("c.tif", encode(decimal, "TIFF")),
        ("d.tif", encode(gray, "TIFF", compression="tiff_deflate")),
        ("e.tif", encode(color, "TIFF", save_all=True, append_images=[color])),
        ("f.tif", encode(color, "TIFF", compression="jpeg")),
        ("a.webp", encode(color, "WEBP", lossless=True)),
        ("a.pgm", encode(gray, "PPM")),
        ("a.ppm", encode(color, "PPM")),
        ("a.gif", encode(gray, "GIF", save_all=True, append_images=[gray])),
        ("a.bmp", encode(color, "BMP")),
    ]

    def read(name: str, data: bytes) -> None:
        path = folder / name
        path.write_bytes(data)
        try:
            image = load_image(path)
            assert image.shape[:2] == (1, 1) or image.shape[:2] == (1, 3), image.shape
            read_image(path, ReadOptions(value_range="auto", mask_value=0))
        except (DataError, ValueError, FileNotFoundError):
            pass

    return corpus, read


def stores(folder: Path) -> tuple[list[tuple[str, bytes]], Callable[[str, bytes], None]]:
    import torch

    from tiepoints.errors import DataError
    from tiepoints.formats.hdf5 import FeatureFile
    from tiepoints.formats.store import open_features
    from tiepoints.structs import Features, Keypoints

    def features(count: int) -> Features:
        values = torch.rand(4, count, generator=torch.Generator().manual_seed(count))
        points = Keypoints(values[:2].T.contiguous() * 40, values[2] + 1, values[3], values[3])
        return Features(points, torch.eye(count, 128), (48, 40))

    def fill(store: Any) -> None:
        for count in (3, 5):
            store.write(f"sub/{count}.png", features(count), None)

    from tiepoints.formats.store import create_features

    source = folder / "source"
    for form in ("npy", "h5", "colmap"):
        with create_features(form, source / form) as store:
            fill(store)
    journal = FeatureFile(source / "journal" / "features.h5", write=True)
    fill(journal)
    journaled = (source / "journal" / "features.h5.journal").read_bytes()
    journal.close()
    corpus = [("journal/features.h5.journal", journaled)]
    for form in ("npy", "h5", "colmap"):
        for path in sorted((source / form).rglob("*.*")):
            if path.is_file():
                corpus.append((f"{form}/{path.relative_to(source / form)}", path.read_bytes()))

    def read(name: str, data: bytes) -> None:
        form = name.partition("/")[0]
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        if form == "journal":
            work.mkdir()
        else:
            shutil.copytree(source / form, work)
        (work / name.partition("/")[2]).write_bytes(data)
        for step in (_read_store, _write_store):
            with suppress(DataError, ValueError, OSError):
                step(work, form)

    def _read_store(work: Path, form: str) -> None:
        with open_features(work) as store:
            for name in store.names():
                if store.done(name, described=True):
                    found = store.read(name)
                    assert len(found.xy) == len(found.scale), name

    def _write_store(work: Path, form: str) -> None:
        with create_features("h5" if form == "journal" else form, work) as store:
            store.done("new.png", described=True)
            store.write("new.png", features(4), None)

    return corpus, read


def settings(folder: Path) -> tuple[list[tuple[str, bytes]], Callable[[str, bytes], None]]:
    """Records of settings: any JSON, and damaged text."""
    from tiepoints.errors import DataError
    from tiepoints.extract import ExtractOptions
    from tiepoints.formats.store import create_features
    from tiepoints.jobs.extract import check_store

    made = ExtractOptions().to_json()
    replaced = [{**made, key: value} for key in made for value in (None, [], "x", -1, {"a": 1})]
    values = [made, [], None, 1, "text", {}, {"features": made}, *replaced]
    corpus = [("settings.json", json.dumps(value).encode()) for value in values]

    def read(name: str, data: bytes) -> None:
        (folder / "npy").mkdir(exist_ok=True)
        (folder / "npy" / name).write_bytes(data)
        with suppress(DataError), create_features("npy", folder / "npy") as store:
            check_store(store, made, False)

    return corpus, read


def hostile_weights(data: bytes) -> Iterator[bytes]:
    """Files in the safetensors format with another header, or with tensors that are not numbers."""
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    values = [None, "", "[]", "null", "1", "{}", '{"x": 1}', '{"filters": 200000}', "nothing"]
    for key in header["__metadata__"]:
        for value in values:
            metadata = {k: v for k, v in header["__metadata__"].items() if k != key}
            metadata |= {} if value is None else {key: value}
            yield _safetensors({**header, "__metadata__": metadata}, tensors)
    settings = json.loads(header["__metadata__"]["settings"])
    for key in settings:
        for value in (200_000, 10**12, -1, 0, "x", None, [1]):
            changed = {**header["__metadata__"], "settings": json.dumps({**settings, key: value})}
            yield _safetensors({**header, "__metadata__": changed}, tensors)
    yield _safetensors(header, np.full(len(tensors) // 4, np.nan, np.float32).tobytes())


def _safetensors(header: dict[str, Any], tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def weights(folder: Path) -> tuple[list[tuple[str, bytes]], Callable[[str, bytes], None]]:
    import torch

    from tiepoints.checkpoints import load_official
    from tiepoints.errors import DataError, WeightsError
    from tiepoints.weights import DATA, load

    corpus = [
        (path.name, path.read_bytes())
        for path in sorted(DATA.glob("*.safetensors"))
        if path.stat().st_size < 200_000
    ]
    corpus += [
        (f"hostile{i}.safetensors", data) for i, data in enumerate(hostile_weights(corpus[0][1]))
    ]
    file = io.BytesIO()
    torch.save(load("keynet-tiny").state_dict(), file)
    corpus += [("official.pth", file.getvalue()), ("official.pt", b"version https://git-lfs\n")]

    def read(name: str, data: bytes) -> None:
        path = folder / name
        path.write_bytes(data)
        for function in (load, load_official):
            try:
                net = function(path)
                assert all(torch.isfinite(value).all() for value in net.state_dict().values())
            except (DataError, WeightsError, ValueError, FileNotFoundError):
                pass

    return corpus, read


KINDS = {"images": images, "stores": stores, "settings": settings, "weights": weights}
#: Numbers of files in the test suite and in ``make drills``.
COUNTS = {"images": (150, 2000), "stores": (40, 300), "settings": (60, 300), "weights": (60, 400)}


LINUX = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="bounds memory as Linux does"
)


def _forbidden(folder: Path, pipe: Any) -> None:
    """Sends the names of the writes outside of ``folder`` that the guard does not notice."""
    outside, inside = folder.with_name(folder.name + "-other"), folder / "a"
    outside.write_text("")
    inside.write_text("")
    _guard(folder)
    attempts: dict[str, Callable[[], Any]] = {
        "open": lambda: open(outside, "r+"),  # noqa: SIM115
        "os.open": lambda: os.open(outside, os.O_WRONLY),
        "bytes": lambda: os.remove(os.fsencode(outside)),
        "parent": lambda: open("../x", "w"),  # noqa: SIM115
        "rename": lambda: os.rename(inside, outside),
        "replace": lambda: os.replace(outside, inside),
        "link": lambda: os.link(inside, folder.with_name("link")),
        "symlink": lambda: os.symlink(inside, folder.with_name("link")),
        "mkdir": lambda: os.mkdir(folder.with_name("new")),
    }
    unnoticed = []
    for name, attempt in attempts.items():
        with suppress(Outside):
            attempt()
            unnoticed.append(name)
    os.replace(inside, folder / "b..c")
    os.close(os.open(folder / "d", os.O_WRONLY | os.O_CREAT))
    os.close(os.open(outside, os.O_RDONLY))
    signal.alarm(1)
    with suppress(Hang):
        with suppress(Exception):
            time.sleep(5)
        unnoticed.append("a hang")
    pipe.send(unnoticed)


@LINUX
def test_the_guard_notices_writes_and_hangs(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_forbidden, args=(folder, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == []
    process.join(10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "folder-other"]


@LINUX
@pytest.mark.parametrize("kind", KINDS)
def test_mutated(kind, tmp_path, drill):
    drill.runs, drill.failures = fuzz(kind, tmp_path, number(*COUNTS[kind]))


def test_folder_of_mutated_images_by_the_command(tmp_path, drill):
    """Broken images are listed as failed, the others extracted, whatever a decoder raises."""
    photos = write_photos(tmp_path / "photos", 3)
    corpus, _ = images(tmp_path)
    moments = np.random.default_rng(1)
    for index in range(number(16, 160)):
        name, data = corpus[index % len(corpus)]
        changes = [("truncate", float(moments.uniform(0.1, 0.9)), 0)] if index % 2 else []
        changes += [("flip", float(moments.uniform(0, 1)), index)] * 3
        (photos / f"{index}-{name}").write_bytes(mutate(data, changes))
    with drill.run("extract"):
        arguments = ["extract", photos, "--output", "out", "--num-keypoints", 20]
        output = run([*arguments, "--single-scale"], tmp_path / "run", codes=(1,))
        found = {path.name for path in (tmp_path / "run" / "out").rglob("*.kpt.npy")}
        assert {f"p{i}.png.kpt.npy" for i in range(3)} <= found, output
        assert output.count("failed: ") + len(found) == len(list(photos.iterdir())), output
