"""Trained weights by name: ``load("keynet")`` returns the trained network.

``data/index.toml`` has class, settings, file, checksum and license of each; files are safetensors.
``save`` writes the same format, with the network's settings in the header, and ``load`` also reads
such files by path.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .detect import response_floor
from .errors import WeightsError
from .files import atomic_path
from .models.desnet import DesNet
from .models.keynet import KeyNet
from .models.keynet_legacy import LegacyKeyNet
from .models.patchnets import HardNet, HyNet, SOSNet
from .models.rekd import REKD
from .models.sobelnet import SobelNet
from .models.spec import DetectorSpec, fused, spec_of

DATA = Path(__file__).parent / "data"
NETWORKS: dict[str, type[nn.Module]] = {
    n.__name__: n for n in (KeyNet, LegacyKeyNet, REKD, SobelNet, HardNet, HyNet, SOSNet, DesNet)
}


def table() -> dict[str, dict[str, Any]]:
    """Name -> entry of every embedded network in ``data/index.toml``."""
    return tomllib.loads((DATA / "index.toml").read_text())


def file_checksum(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest(name: str) -> str | None:
    """SHA-256 of the weights file of a network, given by the name of an embedded one or by path;
    None for what has no weights, such as ``rootsift``.

    Files are read again only if their size or time of modification has changed.
    """
    if entry := table().get(name):
        return entry["sha256"]
    path = Path(name)
    if not path.is_file():
        return None
    status = path.stat()
    return _digest(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    return file_checksum(path)


def weights_checksum(net: nn.Module) -> str:
    """SHA-256 of all tensors of a network in hexadecimal, independent of file and device."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save(
    net: nn.Module, path: str | Path, metadata: dict[str, Any] | None = None, *, half: bool = False
) -> None:
    """Write a network's weights with its class, settings and ``metadata`` as one safetensors file
    (atomically).

    With ``half`` the filters are stored in half precision; ``load`` returns float32 in any case.
    """
    path = Path(path)

    def stored(value: Tensor) -> Tensor:
        value = value.detach().cpu().contiguous()
        return value.half() if half and value.ndim == 4 else value

    header = {
        "network": type(net).__name__,
        "settings": json.dumps(net.settings),
        "offset": json.dumps(getattr(net, "offset", (0.0, 0.0))),
        "floor": json.dumps(_measured_floor(net)),
        "facts": json.dumps(metadata or {}, default=str),
    }
    try:
        with atomic_path(path) as tmp_path:
            # not by safetensors' save_file, whose files only their owner may read
            tmp_path.write_bytes(
                to_bytes({k: stored(v) for k, v in net.state_dict().items()}, metadata=header)
            )
    except OSError as error:
        raise OSError(f"weights {path} could not be written ({error})") from error


def _measured_floor(net: nn.Module) -> float | None:
    """The response of a detector to a constant image; None for a descriptor."""
    if not isinstance(spec_of(net), DetectorSpec):
        return None
    return response_floor(fused(copy.deepcopy(net).cpu().eval()))


def load(name: str | Path) -> nn.Module:
    """Load an embedded network by name, or a weights file written by ``save``, in eval mode.

    Raises:
        WeightsError: no such name or file, or the file is damaged or does not fit its network.
    """
    entry = table().get(str(name))
    path = DATA / entry["file"] if entry else Path(name)
    if not path.is_file():
        raise WeightsError(
            f"no weights named {str(name)!r}; known names are {', '.join(table())}, or give a "
            ".safetensors file"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is no readable safetensors file ({error}); official checkpoints are "
            "converted by `tiepoints weights import`"
        ) from error
    if header.get("network") not in NETWORKS:
        raise WeightsError(
            f"{path} names no known network in its header ({header.get('network')!r}); was it "
            "written by tiepoints?"
        )
    net = NETWORKS[header["network"]](**json.loads(header["settings"]))
    try:
        net.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise WeightsError(
            f"{path} does not fit a {header['network']} with the settings in its header: {error}"
        ) from error
    if hasattr(net, "floor"):
        net.floor = json.loads(header.get("floor", "null"))
    if hasattr(net, "offset"):
        net.offset = tuple(json.loads(header.get("offset", "[0.0, 0.0]")))  # type: ignore[assignment]
    return net.eval()


def metadata_of(path: Path) -> dict[str, Any]:
    """The ``metadata`` with which ``save`` wrote a weights file."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("facts", "{}"))


def verify(name: str) -> None:
    """Check an embedded file against its checksum and load it.

    Raises:
        WeightsError: the file is missing, changed or does not load.
    """
    entry = table().get(name)
    if entry is None:
        raise WeightsError(f"no weights named {name!r}; known names are {', '.join(table())}")
    path = DATA / entry["file"]
    if not path.is_file():
        raise WeightsError(f"{path} is missing; reinstall the package")
    if file_checksum(path) != entry["sha256"]:
        raise WeightsError(f"{path} differs from its checksum; reinstall the package")
    load(name)
