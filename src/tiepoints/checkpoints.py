"""Load published checkpoints into the networks of this package, and export networks under the
published names.

Checkpoints are recognized by content, never by file name (specification 1.6 to 1.8 and 7):

* the official PyTorch Key.Net: a torch file with ``{"state_dict": ...}``, or the bare state dict as
  kornia stores it;
* the official TensorFlow Key.Net: its variables in an ``.npz``, kernels (kh, kw, in, out);
* the Key.Net retrained by the REKD authors: a torch file with ``{"learner": ...,
  "last_layer_learner": ...}``;
* REKD itself (``best_model.pt``): the bare state dict of an e2cnn network, with
  ``ori_learner.0...`` among its keys;
* HardNet (``HardNet++.pth``, ``checkpoint_liberty_with_aug.pth``, ...): ``{"epoch": ...,
  "state_dict": ...}`` or the bare state dict with ``features.0.weight``; SOSNet
  (``sosnet-32x32-liberty.pth``, ...): ``layers.1.weight``; HyNet (``HyNet_LIB.pth``, ...):
  ``layer1.0.weight``. kornia's networks of these names have the same keys. Ours take patches in
  [0,1] and scale them to the range of the published training; docs/patchdata.md says what kornia
  does instead.

A tensor that is missing, unexpected, of another shape, not real or not finite is an error: no value
is guessed or silently left at its initialization. Files are read as data only; no object is ever
unpickled.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import WeightsError
from .files import LFS_POINTER, is_lfs_pointer
from .models.equivariant import GroupConv, LiftingConv, polar_basis
from .models.keynet import DEFAULT_SCALE_FACTOR, KeyNet
from .models.keynet_legacy import NUM_BLOCKS, LegacyKeyNet
from .models.patchnets import HardNet, HardNetLight, HyNet, SOSNet
from .models.rekd import KERNEL_SIZE, REKD

HWIO_TO_OIHW = (3, 2, 0, 1)  # TensorFlow kernels (kh, kw, in, out) to PyTorch (out, in, kh, kw)
TENSORFLOW_PREFIX = "model_deep_detector_"
ACCEPTED = (
    "the official PyTorch Key.Net (.pth), the official TensorFlow Key.Net (.npz), REKD's "
    "keyNet.pt and best_model.pt, "
    "and the official HardNet, SOSNet and HyNet (.pth)"
)
#: Indices of the seven convolutions in HardNet's published ``features``, each followed by batch
#: normalization. SOSNet's ``layers`` begin with an instance normalization: its are one larger.
HARDNET_CONVOLUTIONS = (0, 3, 6, 9, 12, 15, 19)
MAX_CHECKPOINT = 2**29  # bytes; published ones have at most 20 MB
SHOWN_PROBLEMS = 4  # a file for another network has dozens
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
REKD_PREFIXES = ("ori_learner.", "last_layer_learner.")
#: Rounding error accepted in a filter, relative to its largest value. e2cnn's float32 filters have
#: 1e-6; a filter rotated in the wrong direction has about 1.
FILTER_TOLERANCE = 1e-4
NO_FILTERS = "neither filters nor coefficients with their basis"
WITHOUT_BASIS = (
    "Coefficients alone cannot be read: the order of their basis cannot be verified, and e2cnn and "
    "escnn order it differently under the same names. Save the network's state dict after eval(), "
    "which stores the filters"
)


def load_official(
    path: str | os.PathLike[str], *, restore_statistics: bool = False, input_range: float = 1.0
) -> nn.Module:
    """Load the network of a published checkpoint, on the CPU, float32, in eval mode.

    Args:
        path: the file; the docstring of this module lists what is recognized.
        restore_statistics: for the TensorFlow file only. The published extraction restored only the
            trainable variables, so its batch normalization ran with mean 0 and variance 1; this is
            the default. True loads the stored statistics of training: the scores differ, and about
            two thirds of the keypoints are the same. Statistics of PyTorch files are always loaded.
        input_range: for REKD's ``best_model.pt`` only: the gray value of a white pixel inside the
            network. Published training used 0 to 255, the published extraction [0,1]; the numbers
            of the paper are those of the extraction, which is the default. The contrast is divided
            by 1 + its deviation, so it is several times weaker with [0,1] than in training; with
            255 the keypoints differ.

    Returns:
        ``KeyNet`` (official PyTorch) or ``LegacyKeyNet`` (TensorFlow and REKD's ``keyNet.pt``):
        image (B,1,H,W) in [0,1] -> score map; ``REKD``: the same image -> score map and histograms;
        ``HardNet``, ``SOSNet`` or ``HyNet``: patches (N,1,P,P) in [0,1] -> descriptors (N,128).

    Raises:
        FileNotFoundError: no file at ``path``.
        WeightsError: the file cannot be read, is no known checkpoint, or differs from the published
            layout.
        ValueError: ``input_range`` is not positive.
    """
    path = Path(path)
    content = _read(path)
    file = str(path)
    if any(str(key).startswith(TENSORFLOW_PREFIX) for key in content):
        return keynet_from_tensorflow(content, file, restore_statistics=restore_statistics)
    if "learner" in content or "last_layer_learner" in content:
        return keynet_from_rekd(content, file)
    state = content.get("state_dict", content)
    if isinstance(state, Mapping) and any(
        str(k).removeprefix("module.").startswith(REKD_PREFIXES) for k in state
    ):
        return rekd_from_e2cnn(state, file, input_range=input_range)
    if isinstance(state, Mapping) and any(
        str(k).startswith(("feature_extractor.", "last_conv.")) for k in state
    ):
        return keynet_from_pytorch(state, file)
    if isinstance(state, Mapping) and any(
        str(k).startswith(("features.", "layers.", "layer1.")) for k in state
    ):
        return descriptor_from_pytorch(state, file)
    found = ", ".join(repr(str(key)) for key in list(content)[:3]) or "nothing"
    raise WeightsError(
        f"{file}: not a known checkpoint. Accepted: {ACCEPTED}. Found at its top level: {found}"
    )


def keynet_from_pytorch(state: Mapping[str, Any], file: str = "checkpoint") -> KeyNet:
    """Variant A from the official (and kornia's) state dict; ``file`` is its name in errors.

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

    The moving statistics are required and checked even if they are not used.
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
    # TensorFlow does not count batches; our counter has no effect in eval mode and stays 0.
    _copy_into(
        net,
        variables,
        names,
        file,
        kernel_axes=HWIO_TO_OIHW,
        ignore=set() if restore_statistics else statistics,
    )
    return net.eval()


def keynet_from_rekd(content: Mapping[str, Any], file: str = "checkpoint") -> LegacyKeyNet:
    """Variant C from the two nested state dicts of REKD's ``keyNet.pt``; ``file`` is its name in
    errors.

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


def rekd_from_e2cnn(
    state: Mapping[str, Any], file: str = "checkpoint", *, input_range: float = 1.0
) -> REKD:
    """REKD from the state dict of e2cnn's network, with sizes from the shapes; arguments as in
    ``load_official``.

    The order of the basis filters to which the coefficients in the file belong depends on the
    library that wrote it, so the coefficients are never copied. Instead, our coefficients are
    fitted to the ordinary filters, which are stored or computed from coefficients and basis; a
    residual is an error.

    Raises:
        WeightsError: a tensor is missing, unexpected or unusable, filters are inconsistent or not
            rotated copies of each other.
        ValueError: ``input_range`` is not positive.
    """
    names = [str(key) for key in state]
    prefix = "module." if all(name.startswith("module.") for name in names) else ""
    rest = {
        name.removeprefix(prefix): value for name, value in zip(names, state.values(), strict=True)
    }
    group, dims, levels = _rekd_sizes(rest, file)
    filters = _e2cnn_filters(rest, group, dims, file)
    net = REKD(
        group=group, dims=dims, num_levels=levels, variant="published", input_range=input_range
    )
    for (layer, target), conv in zip(
        filters.items(), [*net.trunk.convs, net.orientation], strict=True
    ):
        assert isinstance(conv, LiftingConv | GroupConv)
        residual, largest = _fit(conv, target), float(target.abs().max())
        if residual > FILTER_TOLERANCE * largest:
            raise WeightsError(
                f"{file}: the filters of {layer}.0 are not one filter rotated to {group} "
                f"orientations: the residual of the best fit is {residual:.2g}, with filter values "
                f"up to {largest:.2g} (allowed: {FILTER_TOLERANCE * largest:.2g})"
            )
    ours = {
        f"block{i + 1}.1.batch_norm_[{group}].{kind}": f"trunk.norms.{i}.norm.{kind}"
        for i in range(3)
        for kind in NORM_TENSORS
    }
    ours |= {f"last_layer_learner.0.{kind}": f"score_norm.{kind}" for kind in NORM_TENSORS}
    ours |= {f"last_layer_learner.1.{kind}": f"score.{kind}" for kind in ("weight", "bias")}
    _copy_into(net, rest, ours, file)
    return net.eval()


def _rekd_sizes(state: Mapping[str, Any], file: str) -> tuple[int, tuple[int, int, int], int]:
    """Orientations, fields of the three layers and levels of an e2cnn state dict."""
    matches = [
        re.fullmatch(r"block1\.1\.batch_norm_\[([1-9]\d{0,3})\]\.weight", name) for name in state
    ]
    groups = {match[1] for match in matches if match}
    group = groups.pop() if len(groups) == 1 else "N"
    widths, problems = [], []
    for name in (
        *(f"block{i}.1.batch_norm_[{group}].weight" for i in (1, 2, 3)),
        "last_layer_learner.0.weight",
    ):
        value = state.get(name)
        if isinstance(value, Tensor) and value.ndim == 1 and len(value):
            widths.append(len(value))
        else:
            found = (
                "nothing"
                if value is None
                else f"{tuple(value.shape)}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            problems.append(f"{name}: expected one value per field, found {found}")
    if not problems and widths[3] % widths[2]:
        problems.append(
            f"last_layer_learner.0.weight: expected a multiple of {widths[2]} fields, found "
            f"{widths[3]}"
        )
    _raise_problems(problems, file, "REKD")
    return int(group), (widths[0], widths[1], widths[2]), widths[3] // widths[2]


def _e2cnn_filters(
    rest: dict[str, Any], group: int, dims: tuple[int, int, int], file: str
) -> dict[str, Tensor]:
    """Layer -> its ordinary filters; removes from ``rest`` what it reads.

    Raises:
        WeightsError: filters are missing, unusable or inconsistent.
    """
    problems: list[str] = []
    filters = {}
    layers = [
        ("block1", 1, dims[0]),
        ("block2", *dims[:2]),
        ("block3", *dims[1:]),
        ("ori_learner", dims[2], 1),
    ]
    bases = {name: value for name, value in rest.items() if "._basisexpansion." in name}
    for layer, fields_in, fields_out in layers:
        found = _e2cnn_filter(rest, bases, f"{layer}.0", group, fields_in, fields_out, problems)
        if found is not None:
            filters[layer] = found
    # channel indices, which follow from the sizes and only e2cnn needs
    indices = [f"block{i}.1.indices_{group}" for i in (1, 2, 3)] + [
        f"gpool.{side}_indices_{group}" for side in ("in", "out")
    ]
    problems += [
        problem
        for name in indices
        if name in rest
        for problem in _tensor_problem(name, rest.pop(name), (2,), torch.int64)
    ]
    advice = WITHOUT_BASIS if any(NO_FILTERS in problem for problem in problems) else ""
    _raise_problems(problems, file, "REKD", advice)
    return filters


def _e2cnn_filter(
    rest: dict[str, Any],
    bases: Mapping[str, Any],
    layer: str,
    group: int,
    fields_in: int,
    fields_out: int,
    problems: list[str],
) -> Tensor | None:
    """The ordinary filters (out, in, k, k) of an e2cnn convolution; None after adding to
    ``problems``. Removes from ``rest`` what it reads.
    """
    lifting, k = layer.startswith("block1"), 1 if layer.startswith("ori") else KERNEL_SIZE
    wide_in = 1 if lifting else group
    count = polar_basis(k, [0.0]).shape[1] * wide_in
    kind = "('irrep_0', 'regular')" if lifting else "('regular', 'regular')"
    basis_name = f"{layer}._basisexpansion.block_expansion_{kind}.sampled_basis"
    expected = {
        f"{layer}.filter": (fields_out * group, fields_in * wide_in, k, k),
        f"{layer}.weights": (fields_out * fields_in * count,),
        basis_name: (count, group, wide_in, k * k),
    }
    tensors = {name: rest.pop(name, None) for name in expected}
    if tensors[basis_name] is None and layer == "block3.0":  # the two layers share one basis
        tensors[basis_name] = bases.get(basis_name.replace("block3", "block2"))
    found = {name: value for name, value in tensors.items() if value is not None}
    invalid = [
        line
        for name, value in found.items()
        for line in _tensor_problem(name, value, expected[name], torch.float32)
    ]
    if invalid:
        problems += invalid
        return None
    stored, weights, basis = (
        None if value is None else value.double() for value in tensors.values()
    )
    if weights is None or basis is None:
        if stored is None:
            problems.append(
                f"{layer}: {NO_FILTERS} ({layer}.filter; {layer}.weights with its sampled_basis)"
            )
        return stored
    computed = (weights.view(-1, count) @ basis.flatten(1)).view(
        fields_out, fields_in, group, wide_in, k, k
    )
    computed = computed.transpose(1, 2).reshape(expected[f"{layer}.filter"])
    if stored is None:
        return computed
    difference, largest = float((computed - stored).abs().max()), float(stored.abs().max())
    if difference > FILTER_TOLERANCE * largest:
        problems.append(
            f"{layer}.filter: differs by up to {difference:.2g}, with values up to {largest:.2g}, "
            "from weights times sampled_basis; the file is inconsistent"
        )
        return None
    return stored


@torch.no_grad()
def _fit(conv: LiftingConv | GroupConv, filters: Tensor) -> float:
    """Fit the coefficients of ``conv`` to ordinary ``filters``; returns the largest residual.

    Every pair of fields, and in a group convolution every difference h of orientations, is a
    separate least-squares problem with the same matrix: the pixels of all N rotated filters by the
    basis.
    """
    n, k = conv.group, conv.kernel_size
    basis = conv.basis.double()  # (g,K,y,x)
    inverse = torch.linalg.pinv(basis.permute(0, 2, 3, 1).flatten(0, 2)).view(-1, n, k, k)
    fields_out, fields_in = conv.coefficients.shape[:2]
    target = (
        filters.double().view(fields_out, n, fields_in, -1, k, k).transpose(1, 2)
    )  # (o,i,g,g + h,y,x)
    if isinstance(conv, GroupConv):
        target = target[
            :, :, torch.arange(n)[None], (torch.arange(n)[None] + torch.arange(n)[:, None]) % n
        ]  # (o,i,h,g,y,x)
    else:
        target = target.transpose(2, 3)
    conv.coefficients.copy_(torch.einsum("oihgyx,kgyx->oihk", target, inverse))
    return float((conv.filters().double() - filters).abs().max())


def descriptor_from_pytorch(
    state: Mapping[str, Any], file: str = "checkpoint"
) -> HardNet | SOSNet | HyNet:
    """A patch descriptor from its official (and kornia's) state dict; ``file`` is its name in
    errors.

    Batch counters may be absent, as in files older than PyTorch 0.4.1.

    Raises:
        WeightsError: a tensor is missing, unexpected or unusable, or the file is of a related
            network that is not supported.
    """
    keys = {str(key) for key in state}
    related = _related_network(state)
    if related is not None:
        raise WeightsError(
            f"{file}: {related}, which is another network and not supported. Accepted: {ACCEPTED}"
        )
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
    """Name of an unsupported network whose keys resemble those of HardNet, SOSNet or HyNet; None
    for any other.
    """
    if any(str(key).startswith("descr.") for key in state):
        return "TFeat (two convolutions and a linear layer)"
    if "components" in state or "features.22.weight" in state:
        return "HardNet8 (eight convolutions and a projection to principal components)"
    if "features.0.bias" in state or "features.1.weight" in state:
        return (
            "HardNetPS or similar (convolutions with biases, batch normalization with parameters)"
        )
    if "layers.0.weight" in state:
        return "a network with other layers under SOSNet's names"
    return None


def _descriptor_names(net: nn.Module) -> dict[str, str]:
    """Official name -> our name, for all tensors of a patch descriptor."""
    names: dict[str, str] = {}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    if isinstance(net, HyNet):
        response = ("weight", "bias", "eps")
        names |= {f"layer1.0.{kind}": f"norms.0.{kind}" for kind in response} | {
            "layer1.1.tau": "activations.0.tau"
        }
        for i in range(6):
            first = 0 if i else 2  # the first layer begins with the normalization of the patch
            names |= {
                f"layer{i + 1}.{first}.{kind}": f"convolutions.{i}.{kind}"
                for kind in ("weight", "bias")
            }
            names |= {
                f"layer{i + 1}.{first + 1}.{kind}": f"norms.{i + 1}.{kind}" for kind in response
            }
            names[f"layer{i + 1}.{first + 2}.tau"] = f"activations.{i + 1}.tau"
        names["layer7.1.weight"] = "convolutions.6.weight"
        return names | {f"layer7.2.{kind}": f"last_norm.{kind}" for kind in statistics}
    theirs, shift = ("layers", 1) if isinstance(net, SOSNet) else ("features", 0)
    for i, index in enumerate(HARDNET_CONVOLUTIONS):
        names[f"{theirs}.{index + shift}.weight"] = f"convolutions.{i}.weight"
        names |= {
            f"{theirs}.{index + shift + 1}.{kind}": f"norms.{i}.{kind}" for kind in statistics
        }
    return names


def to_official_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """Copies of a network's tensors, on the CPU, under the official names, which the official code
    and kornia load.

    Use: ``kornia.feature.KeyNet(pretrained=False).load_state_dict(to_official_state_dict(net))``;
    likewise ``HardNet``, ``SOSNet`` and ``HyNet``. The last two take patches in 0..255 there.

    Raises:
        ValueError: ``net`` is none of these, is fused, or is a ``KeyNet`` with settings that the
            official code does not have.
    """
    if isinstance(net, HardNet | HyNet) and not isinstance(net, HardNetLight):
        names, state = _descriptor_names(net), net.state_dict()
        if set(names.values()) != set(state):
            raise ValueError(
                f"this {type(net).__name__} is changed; use the network as it was trained"
            )
        return {theirs: state[ours].detach().cpu().clone() for theirs, ours in names.items()}
    if not isinstance(net, KeyNet):
        raise ValueError(
            f"expected a KeyNet, HardNet, SOSNet or HyNet as it was trained, got a "
            f"{type(net).__name__}, which has no official PyTorch names"
        )
    for name, parameter in inspect.signature(KeyNet).parameters.items():
        default, value = parameter.default, net.settings[name]
        if name == "scale_factor":
            default, value = DEFAULT_SCALE_FACTOR, net.scale_factor
        if value != default:
            raise ValueError(
                f"the official Key.Net has {name}={default!r}, this network {value!r}: it cannot "
                "be exported under the official names"
            )
    state = net.state_dict()
    return {
        theirs: state[ours].detach().cpu().clone() for theirs, ours in _official_names().items()
    }


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
    # opened here first, because the readers below would hide missing permissions
    with path.open("rb") as stream:
        start = stream.read(64)
    if not start:
        raise WeightsError(f"{path}: the file is empty")
    if is_lfs_pointer(start):
        raise WeightsError(f"{path} {LFS_POINTER}")
    try:
        _check_archive(path)
        content = (
            _read_npz(path)
            if _is_npz(path)
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except WeightsError:
        raise
    except Exception as error:  # damaged files make the two readers raise almost any type
        raise WeightsError(
            f"{path}: cannot be read as weights ({type(error).__name__}); damaged, or neither a "
            f"torch nor an .npz file of plain tensors. Accepted: {ACCEPTED}"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path}: holds a {type(content).__name__}, expected a dictionary. Accepted: {ACCEPTED}"
        )
    _check_storage(content, path)
    return dict(content)


def _check_archive(path: Path) -> None:
    """Raise for a zip archive that needs more memory than any published checkpoint."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MAX_CHECKPOINT:
            raise WeightsError(
                f"{path}: {size / 1e6:.0f} MB of tensors, at most {MAX_CHECKPOINT / 1e6:.0f} MB"
            )


def _check_storage(content: Mapping[Any, Any], path: Path) -> None:
    """Raise for tensors that repeat few stored values: any use would allocate their whole size."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            _check_storage(value, path)
        elif isinstance(value, Tensor):
            stored = value.untyped_storage().nbytes() if value.layout == torch.strided else 0
            if value.numel() * value.element_size() > stored:
                raise WeightsError(
                    f"{path}: {key} of shape {tuple(value.shape)} is larger than its data; the "
                    "file is damaged"
                )


def _is_npz(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    return bool(members) and all(member.endswith(".npy") for member in members)


def _read_npz(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                _check_npy_size(file, member, path)
    with np.load(path, allow_pickle=False) as content:
        return {key: content[key] for key in content.files}


def _check_npy_size(file: Any, member: zipfile.ZipInfo, path: Path) -> None:
    """Raise if the header of an array asks for more bytes than are stored."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise WeightsError(f"{path}: {member.filename} of shape {shape} is larger than its data")


def _copy_into(
    net: nn.Module,
    source: Mapping[str, Any],
    names: Mapping[str, str],
    file: str,
    *,
    kernel_axes: tuple[int, ...] | None = None,
    ignore: set[str] | frozenset[str] = frozenset(),
    optional: set[str] | frozenset[str] = frozenset(),
) -> None:
    """Copy the tensors of ``source`` into ``net`` by ``names`` (theirs -> ours), complete in both
    directions.

    Args:
        kernel_axes: permutes four-dimensional tensors into our order.
        ignore: our names that are checked, but not copied.
        optional: our names that may be absent and then keep their initial value.
    """
    state = net.state_dict()
    problems = []
    for theirs, ours in names.items():
        expected = tuple(state[ours].shape)
        axes = kernel_axes if kernel_axes is not None and len(expected) == 4 else None
        if axes is not None:  # the shape in the file's order of axes
            expected = tuple(expected[axes.index(axis)] for axis in range(4))
        if theirs not in source:
            if ours in optional:
                continue
            problems.append(f"{theirs}: expected shape {expected}, found nothing")
            continue
        value = source[theirs]
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        invalid = _tensor_problem(theirs, value, expected, state[ours].dtype)
        problems += invalid
        if not invalid and ours not in ignore:
            state[ours] = value if axes is None else value.permute(axes)
    problems += [f"{key}: not expected, found in the file" for key in source if key not in names]
    _raise_problems(problems, file, type(net).__name__)
    net.load_state_dict(state)  # copies, casts to float32


def _tensor_problem(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    """Problems of a tensor of a file, at most one line; of the type, only floating point or integer
    matters.
    """
    if not isinstance(value, Tensor):
        found = f"{value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
        return [f"{name}: expected shape {shape}, found a {found}"]
    if tuple(value.shape) != shape:
        return [f"{name}: expected shape {shape}, found {tuple(value.shape)}"]
    if value.is_floating_point() != dtype.is_floating_point:
        return [f"{name}: expected {dtype}, found {value.dtype}"]
    if not torch.isfinite(value).all():
        return [f"{name}: expected finite values, found NaN or infinity"]
    return []


def _raise_problems(problems: list[str], file: str, network: str, advice: str = "") -> None:
    """Raise ``problems``, if any, as one ``WeightsError`` that ends with ``advice``."""
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        lines = problems[:SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise WeightsError(
            f"{file}: does not fit {network}:\n  "
            + "\n  ".join(lines)
            + (f"\n{advice}" if advice else "")
        )
