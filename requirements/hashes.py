"""Write requirements/ci.txt: the packages of constraints.txt with the hashes of their files.

    python requirements/hashes.py

The hashes are those of the files that pip selects for this Python and platform (CI: 3.11, Linux,
x86-64); nothing is installed. torch is excluded, because its builds, and so their hashes, differ
between registries.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Packages whose hashes differ between registries.
EXCLUDED = ("torch==",)
#: Python, system and machine of CI, whose files have the hashes.
PLATFORM = ("3.11", "Linux", "x86_64")
HEAD = """\
# Written by requirements/hashes.py from constraints.txt: every package but torch, with its hash.
# pip install --require-hashes --no-deps -r requirements/ci.txt
"""


def requirements() -> list[str]:
    """Lines of constraints.txt that are not excluded."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return [line for line in lines if not line.startswith(EXCLUDED)]


def resolve(lines: list[str]) -> list[dict[str, Any]]:
    """The files that pip would install."""
    with tempfile.TemporaryDirectory() as folder:
        listed, report = Path(folder) / "list.txt", Path(folder) / "report.json"
        listed.write_text("\n".join(lines))
        options = ["--dry-run", "--no-deps", "--ignore-installed", "--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", *options]
        subprocess.run([*command, "--report", str(report), "-r", str(listed)], check=True)
        return json.loads(report.read_text())["install"]


def main() -> None:
    here = (".".join(map(str, sys.version_info[:2])), platform.system(), platform.machine())
    if here != PLATFORM:
        sys.exit(
            f"error: the hashes are those of the files for Python {' '.join(PLATFORM)}; this is "
            f"Python {' '.join(here)}, for which pip selects others"
        )
    wanted = requirements()
    found = {
        item["metadata"]["name"].lower().replace("_", "-"): item["download_info"]["archive_info"]
        for item in resolve(wanted)
    }
    lines = [
        f"{line} \\\n    --hash=sha256:{found[name.lower().replace('_', '-')]['hashes']['sha256']}"
        for line in wanted
        for name in [line.partition("==")[0]]
    ]
    (ROOT / "requirements" / "ci.txt").write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
