"""The page ``web/``, which matches two photographs in a browser, on this computer."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
import tomllib
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..errors import DataError, first_line
from ..files import atomic_path

logger = logging.getLogger(__name__)
PAGE = Path(__file__).parents[1] / "web"
#: ``weights.DATA``, whose module imports torch.
DATA = Path(__file__).parents[1] / "data"
#: ONNX Runtime for browsers, of the npm registry (MIT license), and the SHA-512 of its package.
RUNTIME = "onnxruntime-web-1.30.0"
RUNTIME_URL = f"https://registry.npmjs.org/onnxruntime-web/-/{RUNTIME}.tgz"
RUNTIME_SHA512 = (
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
#: Files of the runtime that the page loads.
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".jpg": "image/jpeg",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
}


@dataclass(frozen=True)
class _Content:
    """A file, or bytes, with its media type."""

    source: Path | bytes
    kind: str

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def cache_folder() -> Path:
    """Where the runtime is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tiepoints"


def missing_files(folder: Path) -> list[str]:
    """Names of ONNX Runtime's files that a folder does not have."""
    return [name for name in RUNTIME_FILES if not (folder / name).is_file()]


def find_runtime(folder: Path | None = None, *, url: str = RUNTIME_URL) -> Path:
    """The folder with ONNX Runtime's files; without ``folder`` they are downloaded once (33 MB).

    Raises:
        DataError: ``folder`` does not have them, or they could not be downloaded; the message
            explains how to get them.
    """
    target = folder or cache_folder() / RUNTIME
    missing = missing_files(target)
    if not missing:
        return target
    if folder is not None:
        raise DataError(
            f"{folder} does not contain {missing[0]}; it must be the folder dist of the npm "
            f"package {RUNTIME}"
        )
    logger.info("downloading %s", url)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            package = response.read()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{url} could not be downloaded ({first_line(error)}); download it on another computer "
            "(or with `npm pack`), unpack it, and give its folder dist as --runtime"
        ) from error
    found = base64.b64encode(hashlib.sha512(package).digest()).decode()
    if found != RUNTIME_SHA512:
        raise DataError(f"{url} has another checksum than expected; try again, or use --runtime")
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for name in RUNTIME_FILES:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None
            with atomic_path(target / name) as tmp_path:
                tmp_path.write_bytes(member.read())
    return target


def _entries() -> list[dict[str, str]]:
    """Entries of the embedded pipelines."""
    return list(tomllib.loads((DATA / "index.toml").read_text()).get("graphs", {}).values())


def embedded_graphs() -> list[Path]:
    """Exported pipelines that are part of the package."""
    return [DATA / entry["file"] for entry in _entries()]


def site(graphs: Iterable[Path], runtime: Path) -> dict[str, _Content]:
    """Path in the address -> content of everything that is served.

    Args:
        graphs: exported pipelines (``.onnx``) with the inputs ``image`` and ``max_keypoints``.
        runtime: folder of ``find_runtime``.

    Raises:
        DataError: no graphs, two of one name, or one that is not a file.
    """
    files = {f"/{path.relative_to(PAGE).as_posix()}": path for path in PAGE.rglob("*.*")}
    files |= {f"/runtime/{name}": runtime / name for name in RUNTIME_FILES}
    labels = {entry["file"]: entry["label"] for entry in _entries()}
    listed = []
    for path in graphs:
        address = f"/graphs/{path.name}"
        if path.suffix != ".onnx" or not path.is_file():
            raise DataError(f"{path} is no .onnx file")
        if address in files:
            raise DataError(f"two graphs are named {path.name}; rename one")
        files[address] = path
        listed.append({"name": labels.get(path.name, path.stem), "path": address[1:]})
    if not listed:
        raise DataError("no graph to serve; give an exported pipeline with --graph FILE.onnx")
    found = {address: _Content(path, TYPES[path.suffix]) for address, path in files.items()}
    found["/"] = found["/index.html"]
    found["/graphs.json"] = _Content(json.dumps(listed).encode(), TYPES[".json"])
    return found


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of known addresses."""

    contents: dict[str, _Content]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        content = self.contents.get(self.path.partition("?")[0])
        if content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content.kind)
        self.send_header("Content-Length", str(content.size))
        self.send_header("Cache-Control", "no-cache")
        # without these, browsers give WebAssembly one thread only
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()
        if not body:
            return
        if isinstance(content.source, bytes):
            self.wfile.write(content.source)
        else:
            with content.source.open("rb") as file:
                shutil.copyfileobj(file, self.wfile)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def make_server(contents: dict[str, _Content], port: int) -> ThreadingHTTPServer:
    """A server of ``site``, for this computer only; port 0 chooses a free one.

    Raises:
        OSError: the port is in use.
    """
    handler = type("Handler", (_Handler,), {"contents": contents})
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise OSError(
            f"port {port} cannot be used ({error.strerror}); choose another with --port"
        ) from error


def export_site(contents: dict[str, _Content], folder: Path) -> None:
    """Write the page and all that it loads to a folder for any web server.

    Raises:
        OSError: the folder cannot be written.
    """
    for address, content in contents.items():
        if address == "/":
            continue
        path = folder / address.removeprefix("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as tmp_path:
            if isinstance(content.source, bytes):
                tmp_path.write_bytes(content.source)
            else:
                shutil.copyfile(content.source, tmp_path)
