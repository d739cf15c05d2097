"""Published checkpoints into our networks, key by key; and our networks back under the published names.

What is recognised, by content and never by name or ending (specification 1.6 to 1.8 and 7):

* the official PyTorch Key.Net: a torch file holding ``{"state_dict": ...}``, or the bare state dict as kornia keeps it;
* the official TensorFlow Key.Net: its variables in an ``.npz``, kernels (kh, kw, in, out);
* the Key.Net retrained by the REKD authors: a torch file holding ``{"learner": ..., "last_layer_learner": ...}``;
* HardNet (``HardNet++.pth``, ``checkpoint_liberty_with_aug.pth``, ...): ``{"epoch": ..., "state_dict": ...}`` or the bare state dict
  with ``features.0.weight``; SOSNet (``sosnet-32x32-liberty.pth``, ...): ``layers.1.weight``; HyNet (``HyNet_LIB.pth``, ...):
  ``layer1.0.weight``. kornia's networks of these names have the same keys. Our networks take patches in [0,1] and bring them to
  the range the published weights saw; docs/patchdata.md says what kornia does instead.

A tensor that is missing, unexpected, wrongly shaped, not real-valued or not finite is an error: nothing is guessed and
nothing is left at its initial value in silence. Files are read as data only; no object in them is ever unpickled.
"""

from __future__ import annotations

import inspect
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .descriptors.patchnets import HardNet, HyNet, SOSNet
from .detectors.keynet import DEFAULT_SCALE_FACTOR, KeyNet
from .detectors.keynet_legacy import NUM_BLOCKS, LegacyKeyNet
from .errors import WeightsError

HWIO_TO_OIHW = (3, 2, 0, 1)  # TensorFlow kernels (kh, kw, in, out) to PyTorch (out, in, kh, kw)
TENSORFLOW_PREFIX = "model_deep_detector_"
ACCEPTED = (
    "the official PyTorch Key.Net (.pth), the official TensorFlow Key.Net (.npz), REKD's keyNet.pt, "
    "and the official HardNet, SOSNet and HyNet (.pth)"
)
#: Places of the seven convolutions in HardNet's published ``features``; batch normalisation follows each. SOSNet's ``layers`` begin
#: with an instance normalisation, so everything is one later.
HARDNET_CONVOLUTIONS = (0, 3, 6, 9, 12, 15, 19)
SHOWN_PROBLEMS = 4  # a file for another network has dozens; the first few say enough
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def load_official(path: str | os.PathLike[str], *, restore_statistics: bool = False) -> nn.Module:
    """The network in a published checkpoint, on the CPU, float32, in eval mode.

    Args:
        path: the file; see the top of this module for what is recognised.
        restore_statistics: for the TensorFlow file alone. The published extraction restored the trainable variables
            alone, so its batch normalisation ran with mean 0 and variance 1, and so does the default here. True
            loads the stored statistics, as training meant it: other scores, about two thirds of the same keypoints.
            PyTorch files always bring their statistics along.

    Returns:
        ``KeyNet`` (official PyTorch) or ``LegacyKeyNet`` (TensorFlow and REKD): image (B,1,H,W) in [0,1] -> score map; ``HardNet``,
        ``SOSNet`` or ``HyNet``: patches (N,1,P,P) in [0,1] -> descriptors (N,128).

    Raises:
        FileNotFoundError: nothing lies at ``path``.
        WeightsError: the file cannot be read, holds something else, or differs from the published layout.
    """
    path = Path(path)
    content = _read(path)
    file = str(path)
    if any(str(key).startswith(TENSORFLOW_PREFIX) for key in content):
        return keynet_from_tensorflow(content, file, restore_statistics=restore_statistics)
    if "learner" in content or "last_layer_learner" in content:
        return keynet_from_rekd(content, file)
    state = content.get("state_dict", content)
    if isinstance(state, Mapping) and any(str(k).startswith(("feature_extractor.", "last_conv.")) for k in state):
        return keynet_from_pytorch(state, file)
    if isinstance(state, Mapping) and any(str(k).startswith(("features.", "layers.", "layer1.")) for k in state):
        return descriptor_from_pytorch(state, file)
    found = ", ".join(repr(str(key)) for key in list(content)[:3]) or "nothing"
    raise WeightsError(f"{file}: not a checkpoint known here. Accepted: {ACCEPTED}. Found at its top level: {found}")


def keynet_from_pytorch(state: Mapping[str, Any], file: str = "checkpoint") -> KeyNet:
    """Variant A from the official (and kornia's) state dict; ``file`` names the source in errors.

    Raises:
        WeightsError: a tensor is missing, unexpected or unusable.
    """
    net = KeyNet()
    _copy_into(net, state, _official_names(), file)
    return net.eval()


def keynet_from_tensorflow(
    variables: Mapping[str, Any], file: str = "checkpoint", *, restore_statistics: bool = False
) -> LegacyKeyNet:
    """Variant B from TensorFlow variables (arrays); arguments and errors as in ``load_official``.

    The moving statistics must be there, and are checked, even where they are not used.
    """
    net = LegacyKeyNet.tensorflow()
    names: dict[str, str] = {}
    statistics: set[str] = set()
    layers = [(f"blocks.{i}", f"conv_{i + 1}", f"batch_{i + 1}") for i in range(NUM_BLOCKS)]
    convolutions = [(f"{ours}.0", conv) for ours, conv, _ in layers] + [("last", "conv_last_layer")]
    norms = [(f"{ours}.1", norm) for ours, _, norm in layers] + [("last_norm", "batch_final")]
    for ours, theirs in convolutions:
        names[f"{TENSORFLOW_PREFIX}{theirs}/kernel"] = f"{ours}.weight"
        names[f"{TENSORFLOW_PREFIX}{theirs}/bias"] = f"{ours}.bias"
    for ours, theirs in norms:
        names[f"{TENSORFLOW_PREFIX}{theirs}/gamma"] = f"{ours}.weight"
        names[f"{TENSORFLOW_PREFIX}{theirs}/beta"] = f"{ours}.bias"
        names[f"{TENSORFLOW_PREFIX}{theirs}/moving_mean"] = f"{ours}.running_mean"
        names[f"{TENSORFLOW_PREFIX}{theirs}/moving_variance"] = f"{ours}.running_var"
        statistics |= {f"{ours}.running_mean", f"{ours}.running_var"}
    # TensorFlow does not count batches; our counter plays no part in eval mode and stays 0.
    _copy_into(net, variables, names, file, kernel_axes=HWIO_TO_OIHW, leave=set() if restore_statistics else statistics)
    return net.eval()


def keynet_from_rekd(content: Mapping[str, Any], file: str = "checkpoint") -> LegacyKeyNet:
    """Variant C from the two nested state dicts of REKD's ``keyNet.pt``; ``file`` names the source in errors.

    Raises:
        WeightsError: a tensor is missing, unexpected or unusable.
    """
    flat = {}
    for group, entries in content.items():
        if isinstance(entries, Mapping):
            flat.update({f"{group}.{key}": value for key, value in entries.items()})
        else:
            flat[str(group)] = entries
    names: dict[str, str] = {}
    for i in range(NUM_BLOCKS):
        names |= {f"learner.conv_{i}.{kind}": f"blocks.{i}.0.{kind}" for kind in ("weight", "bias")}
        names |= {f"learner.bn_{i}.{kind}": f"blocks.{i}.1.{kind}" for kind in NORM_TENSORS}
    names |= {f"last_layer_learner.bn_last.{kind}": f"last_norm.{kind}" for kind in NORM_TENSORS}
    names |= {f"last_layer_learner.conv_last.{kind}": f"last.{kind}" for kind in ("weight", "bias")}
    net = LegacyKeyNet.rekd_port()
    _copy_into(net, flat, names, file)
    return net.eval()


def descriptor_from_pytorch(state: Mapping[str, Any], file: str = "checkpoint") -> HardNet | SOSNet | HyNet:
    """A patch descriptor from its official (and kornia's) state dict; ``file`` names the source in errors.

    Counters of batches may be absent, as they are in files older than PyTorch 0.4.1.

    Raises:
        WeightsError: a tensor is missing, unexpected or unusable, or the file is of a network that is related only.
    """
    keys = {str(key) for key in state}
    stranger = _related_network(state)
    if stranger is not None:
        raise WeightsError(f"{file}: {stranger}, which is another network and not supported. Accepted: {ACCEPTED}")
    net: HardNet | SOSNet | HyNet
    if any(key.startswith("features.") for key in keys):
        net = HardNet()
    elif any(key.startswith("layers.") for key in keys):
        net = SOSNet()
    else:
        net = HyNet()
    names = _descriptor_names(net)
    counters = {ours for ours in names.values() if ours.endswith("num_batches_tracked")}
    _copy_into(net, state, names, file, optional=counters)
    return net.eval()


def _related_network(state: Mapping[str, Any]) -> str | None:
    """What a state dict with keys like HardNet's, SOSNet's or HyNet's holds instead, where that is known."""
    if any(str(key).startswith("descr.") for key in state):
        return "TFeat (two convolutions and a linear layer)"
    if "components" in state or "features.22.weight" in state:
        return "HardNet8 (eight convolutions and a projection to principal components)"
    if "features.0.bias" in state or "features.1.weight" in state:
        return "HardNetPS or alike (convolutions with biases, batch normalisation with parameters)"
    if "layers.0.weight" in state:
        return "a network with other layers under SOSNet's names"
    return None


def _descriptor_names(net: nn.Module) -> dict[str, str]:
    """Official name -> our name, for all tensors of a patch descriptor."""
    names: dict[str, str] = {}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    if isinstance(net, HyNet):
        response = ("weight", "bias", "eps")
        names |= {f"layer1.0.{kind}": f"norms.0.{kind}" for kind in response} | {"layer1.1.tau": "activations.0.tau"}
        for i in range(6):
            first = 0 if i else 2  # the first layer begins with the normalisation of the patch
            names |= {f"layer{i + 1}.{first}.{kind}": f"convolutions.{i}.{kind}" for kind in ("weight", "bias")}
            names |= {f"layer{i + 1}.{first + 1}.{kind}": f"norms.{i + 1}.{kind}" for kind in response}
            names[f"layer{i + 1}.{first + 2}.tau"] = f"activations.{i + 1}.tau"
        names["layer7.1.weight"] = "convolutions.6.weight"
        return names | {f"layer7.2.{kind}": f"last_norm.{kind}" for kind in statistics}
    theirs, shift = ("layers", 1) if isinstance(net, SOSNet) else ("features", 0)
    for i, place in enumerate(HARDNET_CONVOLUTIONS):
        names[f"{theirs}.{place + shift}.weight"] = f"convolutions.{i}.weight"
        names |= {f"{theirs}.{place + shift + 1}.{kind}": f"norms.{i}.{kind}" for kind in statistics}
    return names


def to_official_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """Copies of our tensors, on the CPU, under the official names, so that the official code and kornia load them.

    Use: ``kornia.feature.KeyNet(pretrained=False).load_state_dict(to_official_state_dict(net))``; likewise ``HardNet``, ``SOSNet`` and
    ``HyNet``. The last two take patches in 0..255 there.

    Raises:
        ValueError: ``net`` is none of these, a ``KeyNet`` with settings of its own (the official code has no other), or fused.
    """
    if isinstance(net, HardNet | HyNet):
        names, state = _descriptor_names(net), net.state_dict()
        if set(names.values()) != set(state):
            raise ValueError(f"this {type(net).__name__} is fused or changed; rename the network as it was trained")
        return {theirs: state[ours].detach().cpu().clone() for theirs, ours in names.items()}
    if not isinstance(net, KeyNet):
        raise ValueError(
            f"expected a KeyNet, HardNet, SOSNet or HyNet, got {type(net).__name__}; only variant A of Key.Net has official PyTorch names"
        )
    for name, parameter in inspect.signature(KeyNet).parameters.items():
        default, value = parameter.default, net.settings[name]
        if name == "scale_factor":
            default, value = DEFAULT_SCALE_FACTOR, net.scale_factor
        if value != default:
            raise ValueError(f"the official Key.Net has {name}={default!r}, this net {value!r}: it cannot be renamed")
    state = net.state_dict()
    return {theirs: state[ours].detach().cpu().clone() for theirs, ours in _official_names().items()}


def _official_names() -> dict[str, str]:
    """Official PyTorch name -> our name, for all tensors of variant A."""
    names: dict[str, str] = {}
    for i in range(NUM_BLOCKS):
        prefix = f"feature_extractor.lb_block.conv{i}"
        names |= {f"{prefix}.0.{kind}": f"blocks.{i}.0.{kind}" for kind in ("weight", "bias")}
        names |= {f"{prefix}.1.{kind}": f"blocks.{i}.1.{kind}" for kind in NORM_TENSORS}
    return names | {f"last_conv.0.{kind}": f"last.{kind}" for kind in ("weight", "bias")}


def _read(path: Path) -> dict[str, Any]:
    """Top-level dictionary of a torch or .npz file."""
    if not path.exists():
        raise FileNotFoundError(f"no weights file at {path}")
    if not path.is_file():
        raise WeightsError(f"{path}: a folder or device, not a weights file")
    with path.open("rb") as stream:  # a file we may not read says so itself, before the readers below hide it
        if not stream.read(1):
            raise WeightsError(f"{path}: the file is empty")
    try:
        content = _read_npz(path) if _is_npz(path) else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the two readers raise nearly every type there is
        raise WeightsError(
            f"{path}: cannot be read as weights ({type(error).__name__}); damaged, or neither a torch nor an .npz file "
            f"of plain tensors. Accepted: {ACCEPTED}"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, expected a dictionary. Accepted: {ACCEPTED}")
    return dict(content)


def _is_npz(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    return bool(members) and all(member.endswith(".npy") for member in members)


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def _copy_into(
    net: nn.Module,
    source: Mapping[str, Any],
    names: Mapping[str, str],
    file: str,
    *,
    kernel_axes: tuple[int, ...] | None = None,
    leave: set[str] | frozenset[str] = frozenset(),
    optional: set[str] | frozenset[str] = frozenset(),
) -> None:
    """Fill ``net`` from ``source`` by ``names`` (theirs -> ours), both ways complete.

    ``kernel_axes`` permutes four-dimensional tensors into our order; our names in ``leave`` are checked, not copied, those in
    ``optional`` may be absent and then keep their initial value.
    """
    state = net.state_dict()
    problems = []
    for theirs, ours in names.items():
        expected = tuple(state[ours].shape)
        axes = kernel_axes if kernel_axes is not None and len(expected) == 4 else None
        if axes is not None:  # what the file should say, in its own order of axes
            expected = tuple(expected[axes.index(axis)] for axis in range(4))
        what = f"expected shape {expected}"
        if theirs not in source:
            if ours in optional:
                continue
            problems.append(f"{theirs}: {what}, found nothing")
            continue
        value = source[theirs]
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        if not isinstance(value, Tensor):
            found = f"{value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
            problems.append(f"{theirs}: {what}, found a {found}")
        elif tuple(value.shape) != expected:
            problems.append(f"{theirs}: {what}, found {tuple(value.shape)}")
        elif value.is_floating_point() != state[ours].is_floating_point():
            problems.append(f"{theirs}: expected {state[ours].dtype}, found {value.dtype}")
        elif not torch.isfinite(value).all():
            problems.append(f"{theirs}: expected finite numbers, found NaN or infinity")
        elif ours not in leave:
            state[ours] = value if axes is None else value.permute(axes)
    problems += [f"{key}: not expected, found in the file" for key in source if key not in names]
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        lines = problems[:SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise WeightsError(f"{file}: does not fit {type(net).__name__}:\n  " + "\n  ".join(lines))
    net.load_state_dict(state)  # copies, casts to float32
