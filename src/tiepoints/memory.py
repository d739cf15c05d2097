"""Memory of extraction: the size of the parts in which images are processed, and the number of
images in memory at a time.
"""

from __future__ import annotations

import ctypes
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from .errors import DataError
from .regions import TILE_PIXELS

#: Bytes of the process without an image: Python, torch, the networks.
BASE = 340 << 20
#: Bytes per pixel of an 8-bit image while it is read and while its features are extracted, and per
#: pixel of a part while it is processed (``benchmarks/memory.py``). Decoded images of wider types
#: need more: 28 for float64 RGB.
IMAGE_BYTES = 9
TILE_BYTES = 200
#: Smallest and largest number of pixels of a part: smaller ones would mostly consist of their
#: margins.
MIN_TILE_PIXELS = 250_000
#: Smallest limit: for an image of a million pixels.
MIN_MEMORY = BASE + TILE_BYTES * MIN_TILE_PIXELS + IMAGE_BYTES * 1_000_000
#: Without a limit, images with together as many pixels as this are in memory at a time.
AHEAD_PIXELS = 40_000_000
#: Bytes that ``keep_freed`` keeps at most, and of the largest block; glibc allows no larger one.
KEPT, KEPT_BLOCK = 256 << 20, 32 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``2G``, ``1.5GiB``, ``800M``.

    Raises:
        ValueError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?\s*", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"a size is a number with a unit such as 2G or 800M; got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def tile_pixels(memory: int | None) -> int:
    """Pixels of the parts in which images are processed, so that a third of the memory beyond
    ``BASE`` is left to the images.

    Raises:
        ValueError: ``memory`` (bytes) is too little for any image.
    """
    if memory is None:
        return TILE_PIXELS
    if memory < MIN_MEMORY:
        raise ValueError(
            f"memory must be at least {MIN_MEMORY >> 20} MiB, of which Python and torch need "
            f"{BASE >> 20}; got {memory >> 20} MiB"
        )
    return min(TILE_PIXELS, max(MIN_TILE_PIXELS, int((memory - BASE) * 2 / 3 / TILE_BYTES)))


def image_pixels(memory: int | None) -> int:
    """Pixels that all images in memory may have together."""
    if memory is None:
        return AHEAD_PIXELS
    return (memory - BASE - TILE_BYTES * tile_pixels(memory)) // IMAGE_BYTES


def check_image(name: str, size: tuple[int, int], memory: int | None) -> None:
    """Check that an image of ``size`` = (width, height) can be processed within ``memory`` bytes.

    Raises:
        DataError: it cannot; the message says how much it needs.
    """
    pixels = size[0] * size[1]
    if memory is None or pixels <= image_pixels(memory):
        return
    needed = BASE + TILE_BYTES * tile_pixels(memory) + IMAGE_BYTES * pixels
    raise DataError(
        f"{name}: {size[0]} x {size[1]} pixels need about {needed >> 20} MiB of memory, over the "
        f"limit of {memory >> 20} MiB; raise the limit or reduce the image"
    )


def worker_memory(memory: int, workers: int) -> int:
    """Bytes of each of several worker processes; the process that starts them needs ``BASE``.

    Raises:
        ValueError: it is too little for any image.
    """
    share = (memory - BASE) // workers
    if share < MIN_MEMORY:
        fit = max(1, (memory - BASE) // MIN_MEMORY)
        raise ValueError(
            f"{memory >> 20} MiB of memory are too little for {workers} workers, of which each "
            f"needs at least {MIN_MEMORY >> 20} MiB; use --workers {fit}, or raise the limit"
        )
    return share


def workers_that_fit(memory: int | None, pixels: int) -> int:
    """Number of worker processes with parts as large as those of a single process, for images of
    ``pixels``, of which each worker holds two; 0 if none fits.

    Args:
        memory: bytes that may be used; None = those available now.
    """
    free = available_memory() if memory is None else memory
    tile = TILE_BYTES * tile_pixels(memory)
    need = BASE + max(3 * tile // 2, tile + 2 * IMAGE_BYTES * pixels)
    return max(0, (free - BASE) // need)


def available_memory() -> int:
    """Bytes of memory that are free for processes on this computer and in its control group
    (containers); a large number if the system does not say.
    """
    found = [sys.maxsize]
    with suppress(OSError, AttributeError, ValueError):
        text = Path("/proc/meminfo").read_text()
        found.append(int(re.search(r"MemAvailable:\s*(\d+) kB", text)[1]) << 10)  # type: ignore[index]
    with suppress(OSError, ValueError):  # "max" without a limit
        limit, used = (
            int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current")
        )
        found.append(max(0, limit - used))
    return min(found)


_keeps_large = False


@cache
def _glibc(name: str) -> Any:
    """A function of glibc, None elsewhere."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def keep_freed(*, large_blocks: bool = False) -> None:
    """Keep freed memory in this process for the next image or training step. Otherwise glibc
    returns it to the system, and new pages, which the system clears, take up to a third of the
    time of small networks.

    Args:
        large_blocks: also blocks above ``KEPT_BLOCK``, and more than ``KEPT`` in total; later calls
            without it change nothing.
    """
    global _keeps_large
    if _keeps_large or (mallopt := _glibc("mallopt")) is None:
        return
    _keeps_large = large_blocks
    # glibc's malloc.h: M_TRIM_THRESHOLD -1, M_MMAP_THRESHOLD -3, M_MMAP_MAX -4
    mallopt(-1, 2**31 - 1 if large_blocks else KEPT)
    if large_blocks:
        mallopt(-4, 0)
    else:
        mallopt(-3, KEPT_BLOCK)


def release_freed() -> None:
    """Return freed memory to the system, which glibc does only for the largest blocks: the parts of
    a large image would leave several times the memory that one of them needs.
    """
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)
