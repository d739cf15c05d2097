"""Downloading, checking and unpacking HPatches."""

from __future__ import annotations

import hashlib
import logging
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import DataError
from .homography import HPATCHES_FOLDER, read_sequence

HPATCHES_SEQUENCES = 116
HPATCHES_MIRRORS = (
    "https://huggingface.co/datasets/vbalnt/hpatches/resolve/main/hpatches-sequences-release.zip",
    "https://cvg-data.inf.ethz.ch/hpatches/hpatches-sequences-release.tar.gz",
    "http://icvl.ee.ic.ac.uk/vbalnt/hpatches/hpatches-sequences-release.tar.gz",
)


logger = logging.getLogger(__name__)


def fetch_hpatches(
    to: str | Path,
    *,
    mirrors: Iterable[str] = HPATCHES_MIRRORS,
    sha256: str | None = None,
) -> Path:
    """Download, check and unpack the HPatches sequences (1.3 GB) below ``to``.

    A complete folder is only checked. The archive's checksum is logged, and compared with
    ``sha256`` if given; the result must contain 116 sequences of six images and five homographies
    each.

    Returns:
        the folder of sequences.

    Raises:
        DataError: no mirror could be reached (the message explains the offline installation), the
            checksum differs, or sequences are missing.
    """
    to = Path(to)
    folder = to / HPATCHES_FOLDER
    if folder.is_dir() and not _hpatches_problems(folder):
        logger.info("%s: complete, nothing to download", folder)
        return folder
    to.mkdir(parents=True, exist_ok=True)
    failures = []
    archive: Path | None = None
    for url in mirrors:
        target = to / url.rsplit("/", 1)[-1]
        part = target.with_name(target.name + ".part")
        logger.info("downloading %s", url)
        try:
            digest = _download(url, part)
        except (urllib.error.URLError, OSError, ValueError) as error:
            failures.append(f"{url}: {error}")
            continue
        if sha256 is not None and digest != sha256.lower():
            failures.append(f"{url}: sha256 is {digest}, expected {sha256}")
            part.unlink(missing_ok=True)
            continue
        logger.info("sha256 %s", digest)
        part.replace(target)
        archive = target
        break
    if archive is None:
        raise DataError(
            "HPatches could not be downloaded:\n  "
            + "\n  ".join(failures)
            + f"\nOffline: download {HPATCHES_FOLDER}.zip or .tar.gz on another "
            f"machine from one of these addresses, unpack it so that {folder}/v_wall/1.ppm "
            "exists, and run this command again to check it"
        )
    unpack(archive, to)
    archive.unlink()
    problems = _hpatches_problems(folder)
    if problems:
        raise DataError(f"{folder} is not complete: {'; '.join(problems[:5])}")
    return folder


def _download(url: str, part: Path) -> str:
    """Download ``url`` to ``part`` and return its SHA-256; on an error, ``part`` is removed."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=30) as response, part.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            # without a terminal, no bar
            with tqdm(total=total or None, unit="B", unit_scale=True, disable=None) as bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def unpack(archive: Path, to: Path) -> None:
    """Unpack a .zip or .tar.gz archive below ``to``.

    Raises:
        DataError: not an archive, or a member lies outside of ``to``.
    """
    inside = to.resolve()
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as content:
                for name in content.namelist():
                    if not (inside / name).resolve().is_relative_to(inside):
                        raise DataError(
                            f"{archive}: member {name!r} would be written outside of {to}"
                        )
                content.extractall(to)
        else:
            with tarfile.open(archive) as content:
                content.extractall(to, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(
            f"{archive}: cannot be unpacked ({error}); delete it and download it again"
        ) from error


def _hpatches_problems(folder: Path) -> list[str]:
    if not folder.is_dir():
        return [f"no folder {folder}"]
    names = [f for f in sorted(folder.iterdir()) if f.is_dir() and f.name.startswith(("v_", "i_"))]
    problems = (
        []
        if len(names) == HPATCHES_SEQUENCES
        else [f"{len(names)} sequences, {HPATCHES_SEQUENCES} expected"]
    )
    for sequence in names:
        try:
            if len(read_sequence(sequence)) != 5:
                problems.append(f"{sequence.name}: not six images")
        except DataError as error:
            problems.append(str(error))
    return problems
