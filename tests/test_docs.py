"""Commands, code, options and links in the documentation agree with the package."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import tiepoints
from tiepoints.cli import app
from tiepoints.jobs.reconstruct import ReconstructOptions

ROOT = Path(__file__).resolve().parents[1]
#: The diary and the changelog are records with names that may have changed since.
RECORDS = {ROOT / "docs" / "diary.md", ROOT / "CHANGELOG.md"}
PAGES = sorted(
    {*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"}
)
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", flags=re.S | re.M)
#: Programs in the documentation that are not checked.
OTHERS = {"colmap", "mkdir", "cd", "git", "cmake", "extract"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    return [
        "\n".join(line.removeprefix(indent) for line in body.splitlines())
        for indent, language, body in BLOCK.findall(page.read_text(encoding="utf-8"))
        if language in languages
    ]


def shell_lines(page: Path) -> list[str]:
    """Commands in the shell blocks of a page, continued lines joined."""
    text = "\n".join(blocks(page, "sh", "bash", "console")).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
    return [line for line in lines if shlex.split(line, comments=True)]


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        yield path, command
        for part, sub in getattr(command, "commands", {}).items():
            yield from walk(sub, (*path, part))

    yield from walk(typer.main.get_command(app), ())


COMMANDS = dict(commands())


def options_of(command: Any) -> set[str]:
    return {option for p in command.params for option in (*p.opts, *p.secondary_opts)}


def parse_tiepoints(arguments: list[str]) -> None:
    """Parse the arguments of ``tiepoints`` as the program would, without running it."""
    while arguments[0].startswith("-"):
        assert arguments[0] in options_of(COMMANDS[()]), f"no option {arguments[0]}"
        arguments = arguments[1:]
    path: tuple[str, ...] = ()
    while arguments and (*path, arguments[0]) in COMMANDS:
        path, arguments = (*path, arguments[0]), arguments[1:]
    assert path, f"no command {arguments[0]}"
    assert not hasattr(COMMANDS[path], "commands"), f"tiepoints {' '.join(path)} needs a command"
    if "--help" not in arguments:
        COMMANDS[path].make_context(" ".join(path), list(arguments))


def check_python(arguments: list[str]) -> None:
    """The script exists and has the options, or the module does."""
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), f"no module {arguments[1]}"
        return
    script = ROOT / arguments[0]
    assert script.is_file(), f"no script {arguments[0]}"
    text = script.read_text()
    for word in arguments[1:]:
        assert not word.startswith("--") or f'"{word}"' in text, f"no option {word}"


def check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for inside in re.findall(r"\[([^]]+)\]", " ".join(arguments)):
        unknown = set(inside.split(",")) - set(extras)
        assert not unknown, f"no extra {', '.join(sorted(unknown))}"


def check_make(arguments: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in arguments:
        target, variable, _ = word.partition("=")
        known = rf"^{target} \?=" if variable else rf"^{target}:"
        assert re.search(known, text, flags=re.M), f"make does not know {word}"


def check_sh(arguments: list[str]) -> None:
    assert (ROOT / arguments[0]).is_file(), f"no script {arguments[0]}"


CHECKS = {
    "tiepoints": parse_tiepoints,
    "python": check_python,
    "python3": check_python,
    "pip": check_pip,
    "make": check_make,
    "sh": check_sh,
}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_shell_lines_are_accepted_by_the_programs(page):
    for line in shell_lines(page):
        program, *arguments = shlex.split(line, comments=True)
        program = Path(program).name
        if program in OTHERS:
            continue
        assert program in CHECKS, f"{line}: unknown program {program}"
        try:
            CHECKS[program](arguments)
        except Exception as error:  # of the command line too: their type depends on typer's version
            message = getattr(error, "format_message", lambda error=error: str(error))()
            pytest.fail(f"{line}: {message}")


def known_options() -> set[str]:
    """Options of all commands, examples and benchmarks."""
    found = {option for command in COMMANDS.values() for option in options_of(command)}
    for folder in ("examples", "benchmarks"):
        for script in (ROOT / folder).glob("*.py"):
            found |= set(re.findall(r'"(--[a-z][a-z-]*)"', script.read_text()))
    # typer's own, and those of the programs that the pages talk about
    return found | {"--help", "--install-completion", "--image_path", "--check"}


@pytest.mark.parametrize("page", [p for p in PAGES if p not in RECORDS], ids=name)
def test_options_in_the_text_exist(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    spans = re.findall(r"`([^`\n]+)`", text)
    options = {o for span in spans for o in re.findall(r"(?<!\S)--[a-z][a-z0-9_-]*", span)}
    assert not options - known_options()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_code_uses_existing_names(page):
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        found: dict[str, Any] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tiepoints"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                    found[alias.asname or alias.name] = getattr(module, alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tiepoints":
                assert node.attr in tiepoints.__all__, f"tiepoints has no {node.attr}"
                found[f"tiepoints.{node.attr}"] = getattr(tiepoints, node.attr)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in found:
                check_call(node, found[ast.unparse(node.func)])


def check_call(node: ast.Call, function: Any) -> None:
    if function is tiepoints.build:  # takes the fields of ExtractOptions
        function = tiepoints.ExtractOptions
    elif function is tiepoints.reconstruct:
        fields = dataclasses.fields(ReconstructOptions)
        known = {*inspect.signature(function).parameters, *(field.name for field in fields)}
        assert {keyword.arg for keyword in node.keywords} <= known
        return
    elif function is tiepoints.train:
        return
    parameters = dict(inspect.signature(function).parameters)
    if function is tiepoints.from_pretrained:
        parameters |= inspect.signature(tiepoints.ExtractOptions).parameters
    for keyword in node.keywords:
        assert keyword.arg in parameters, f"{ast.unparse(node.func)} takes no {keyword.arg}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_pages_named_in_the_code_exist():
    sources = [p for f in ("src", "benchmarks", "examples") for p in (ROOT / f).rglob("*.py")]
    sources += [ROOT / "pyproject.toml", ROOT / "src" / "tiepoints" / "data" / "index.toml"]
    for source in sources:
        for page in re.findall(r"\bdocs/[\w/-]+\.(?:md|png)", source.read_text()):
            assert (ROOT / page).is_file(), f"{name(source)} names {page}"


def test_every_page_is_in_the_navigation():
    listed = {ROOT / "docs" / "index.md"}
    for page in (ROOT / "docs").rglob("*.md"):
        for body in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), flags=re.S):
            entries = [line.strip() for line in body.splitlines()]
            entries = [line for line in entries if line and not line.startswith(":")]
            listed |= {(page.parent / f"{entry}.md").resolve() for entry in entries}
    assert listed == set((ROOT / "docs").rglob("*.md"))


def test_the_reference_names_all_commands():

    commands = typer.main.get_command(app).commands
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    table = text[: text.index("**Exit codes.**")]
    assert {name for name in commands if f"`{name}`" not in table} == set()
    listed = set(re.split(r"[,\s]+", re.search(r"`--json`\s*\((.*?)\)", text, re.S)[1]))
    with_json = {
        name
        for name, command in commands.items()
        if any("--json" in option.opts for option in command.params)
    }
    assert listed == with_json


def test_layers_of_the_architecture_page_are_those_of_the_contract():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    (contract,) = tool["importlinter"]["contracts"]
    page = (ROOT / "docs" / "architecture.md").read_text().partition("## Layers")[2]
    shown = re.search(r"```text\n(.*?)```", page, flags=re.S).group(1)
    assert re.sub(r"\n\s+", " ", shown).strip().splitlines() == contract["layers"]


SHORT = sorted({*(ROOT / "examples").glob("*.py")} - {ROOT / "examples" / "pack_training_data.py"})


@pytest.mark.parametrize("script", SHORT, ids=name)
def test_examples_are_short_and_import_only_public_names(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 40
    pages = (ROOT / "docs" / "reference" / "api").glob("*.md")
    documented = "\n".join(page.read_text() for page in pages)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tiepoints"):
            assert f"automodule:: {node.module}\n" in documented, node.module
            assert not [a.name for a in node.names if a.name.startswith("_")]
