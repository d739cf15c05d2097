"""Every import goes down the floors that docs/conventions.md lists, and the list has every file."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "tiepoints"
DOCUMENT = "docs/conventions.md"
#: Doors of the package itself: they may import anything and nothing imports them.
EXEMPT = {"__init__", "__main__"}


@dataclass(frozen=True)
class Floor:
    """A module's floor, and the line of the document that says so."""

    number: int
    line: int


def read_floors(text: str) -> dict[str, list[Floor]]:
    """Module -> its places in the list below the heading ``Floors``; an item may go on in indented lines."""
    floors: dict[str, list[Floor]] = {}
    inside, number = False, None
    for line, words in enumerate(text.splitlines(), 1):
        if words.startswith("#"):
            inside, number = words.strip("# ").lower() == "floors", None
        item = re.fullmatch(r"- (\d+):(.*)", words)
        if not inside or not (item or (number is not None and words.startswith("  "))):
            number = None
            continue
        if item:
            number, words = int(item[1]), item[2]
        for name in words.split():
            floors.setdefault(name, []).append(Floor(number, line))
    return floors


def modules(package: Path) -> dict[str, Path]:
    """Name without the package (``training.loop``) -> file, but for ``EXEMPT`` and the ``__init__`` of packages inside."""
    names = {path: path.relative_to(package).with_suffix("").parts for path in sorted(package.rglob("*.py"))}
    return {".".join(parts): path for path, parts in names.items() if parts[-1] != "__init__" and ".".join(parts) not in EXEMPT}


def imports(name: str, source: str, known: set[str], package: str) -> dict[str, int]:
    """What a module imports of the package, wherever in it -> line; the package itself is ``""``."""
    found: dict[str, int] = {}
    inside = [package, *name.split(".")]

    def add(full: list[str], line: int) -> None:
        if full[:1] != [package]:
            return
        # of "formats.npy.read_features" the longest part that is a module; a package alone brings only its empty __init__
        for end in range(len(full), 1, -1):
            if ".".join(full[1:end]) in known:
                found.setdefault(".".join(full[1:end]), line)
                return
        if len(full) <= 2 and not any(other.startswith(f"{'.'.join(full[1:])}.") for other in known):
            found.setdefault("", line)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name.split("."), node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: -node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                add([*base, alias.name], node.lineno)
    return found


def problems(package: Path, text: str) -> list[str]:
    """What to change, a line each; empty where all is well."""
    listed, files = read_floors(text), modules(package)
    used = {name: imports(name, path.read_text(), set(files), package.name) for name, path in files.items()}
    lines: dict[int, int] = {}
    for places in listed.values():
        for floor in places:
            lines.setdefault(floor.number, floor.line)
    floor_of = {name: places[0].number for name, places in listed.items()}

    def lowest(name: str) -> int:
        return 1 + max((floor_of.get(other, 0) for other in used[name] if other), default=-1)

    def where(number: int) -> str:
        return f"line {lines[number]} of {DOCUMENT} (floor {number})" if number in lines else f"a new line '- {number}:' of {DOCUMENT}"

    found = []
    for name, places in listed.items():
        if name not in files:
            found.append(f"{name}: no such file; take it out of line {places[0].line} of {DOCUMENT}")
        elif len(places) > 1:
            found.append(f"{name}: listed in lines {' and '.join(str(p.line) for p in places)} of {DOCUMENT}; leave one")
    for name in files:
        if name not in listed:
            found.append(f"{name}: not listed; add it to {where(lowest(name))} or to a higher floor")
            continue
        for other, line in used[name].items():
            at = f"{name} (floor {floor_of[name]}), line {line}, imports"
            if not other:
                found.append(f"{at} the package itself: import the module that defines the name")
            elif other in floor_of and floor_of[other] >= floor_of[name]:
                here = listed[name][0].line
                found.append(
                    f"{at} {other} (floor {floor_of[other]}): move {name} from line {here} to {where(lowest(name))}, or drop the import"
                )
    for path in sorted(package.rglob("__init__.py")):
        if path.parent != package and path.read_text().strip():
            found.append(f"{path.relative_to(package)}: must be empty, it would run before every module beside it")
    return found


def test_every_import_goes_down():
    found = problems(PACKAGE, (ROOT / DOCUMENT).read_text())
    assert not found, "\n" + "\n".join(found)


TEXT = "# Laws\n- 7: nothing\n\n## Floors\n\nWords.\n\n- 0: ground\n- 1:\n  rooms.bed\n- 2: roof\n\n## Other\n\n- 0: roof\n"
FILES = {"ground": "import os\n", "rooms/__init__": "", "rooms/bed": "from ..ground import x\n", "roof": "from .rooms import bed\n"}


@pytest.fixture
def said(tmp_path):
    """What is said of a package of three files, some of them replaced, and a list."""

    def write(changes: dict[str, str], text: str = TEXT) -> list[str]:
        for name, source in {**FILES, **changes}.items():
            path = tmp_path / "house" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return problems(tmp_path / "house", text)

    return write


def test_a_list_that_fits_is_silent(said):
    assert read_floors(TEXT) == {"ground": [Floor(0, 8)], "rooms.bed": [Floor(1, 10)], "roof": [Floor(2, 11)]}
    assert said({"__init__": "from .roof import x\n", "__main__": "import house.ground\n"}) == []


def test_an_import_upward_is_said_with_its_line_even_inside_a_function(said):
    assert said({"ground": "def late():\n    from house.rooms.bed import y\n"}) == [
        "ground (floor 0), line 2, imports rooms.bed (floor 1): "
        f"move ground from line 8 to line 11 of {DOCUMENT} (floor 2), or drop the import"
    ]
    assert "line 1, imports the package itself" in said({"ground": "from . import anything\n"})[0]


def test_a_new_file_is_told_its_line(said):
    assert said({"attic": "from .rooms.bed import x\nimport house.ground\n", "tower": "from . import roof\n"}) == [
        f"attic: not listed; add it to line 11 of {DOCUMENT} (floor 2) or to a higher floor",
        f"tower: not listed; add it to a new line '- 3:' of {DOCUMENT} or to a higher floor",
    ]


def test_names_without_files_names_twice_and_packages_with_content(said):
    assert said({"rooms/__init__": "x = 1\n"}, TEXT.replace("- 0: ground", "- 0: ground cellar ground")) == [
        f"ground: listed in lines 8 and 8 of {DOCUMENT}; leave one",
        f"cellar: no such file; take it out of line 8 of {DOCUMENT}",
        "rooms/__init__.py: must be empty, it would run before every module beside it",
    ]
