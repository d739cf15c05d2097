"""Choice of the device and the precision of networks."""

from __future__ import annotations

import torch

from .errors import first_line
from .names import PRECISIONS


def choose_device(name: str = "auto") -> torch.device:
    """The device of a name: ``auto`` is CUDA, else Apple's MPS, else the CPU; others are torch's.

    Raises:
        ValueError: the device is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used ({first_line(error)}); try auto or cpu"
        ) from error


#: Features of processors that decide how fast networks are.
FEATURES = ("avx2", "avx512", "vnni", "avx512_bf16", "amx_tile")


def processor_features() -> dict[str, bool]:
    """Feature -> whether the processor has it, as far as PyTorch tells."""
    return {name: bool(getattr(torch.cpu, f"_is_{name}_supported", bool)()) for name in FEATURES}


def fast_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` supports bfloat16 natively: a GPU, or a CPU with AVX-512 BF16 or AMX.

    Other CPUs emulate it, many times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = processor_features()
    return device.type == "cpu" and (features["avx512_bf16"] or features["amx_tile"])


def float_precision(name: str, device: torch.device) -> str:
    """The precision of networks that have no eight-bit graph: ``bfloat16`` or ``float32``.

    ``auto`` is bfloat16 if the device supports it natively (``fast_bfloat16``).

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {name!r}")
    half = fast_bfloat16(device) if name == "auto" else name == "bfloat16"
    return "bfloat16" if half else "float32"  # also of what int8 leaves
