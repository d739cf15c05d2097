"""The reference of the command line, written from the commands themselves."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tiepoints.cli import app

METAVARS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


def walk_commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(full name, command) of every command that does something."""
    if hasattr(command, "commands"):
        for part, sub in command.commands.items():
            yield from walk_commands(sub, f"{name} {part}")
    else:
        yield name, command


def metavar(annotation: Any) -> str:
    """What an option of this type takes; nothing for a switch."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return metavar(next(part for part in inner if part is not type(None)))
    if origin is typing.Literal:
        return "|".join(map(str, inner))
    if origin is tuple:
        return " ".join(map(metavar, inner))
    if origin is list:
        return metavar(inner[0])
    return METAVARS.get(annotation, "")


def as_text(text: str | None) -> str:
    """Help text as one paragraph of Markdown, with options as code."""
    line = " ".join((text or "").split()).replace("*", "\\*").replace("<", "&lt;")
    return re.sub(r"(?<![\w-])(--[a-z][a-z-]*)", r"`\1`", line) or "&nbsp;"


def _option(parameter: Any, annotation: Any) -> str:
    value = f" {metavar(annotation)}".rstrip()
    names = ", ".join(f"`{name}{value}`" for name in parameter.opts)
    names += "".join(f", `{name}`" for name in parameter.secondary_opts)
    notes = ["required"] * parameter.required
    default = parameter.default
    if not callable(default) and default not in (None, False, (), [], ""):
        notes.append(f"default: `{parameter.opts[0] if default is True else default}`")
    if parameter.multiple:
        notes.append("repeatable")
    return f"{names}\n: {as_text(parameter.help)}" + (f" ({'; '.join(notes)})" * bool(notes)) + "\n"


def commands_as_markdown() -> str:
    """One section per command: usage, what it does, arguments and options."""
    lines: list[str] = []
    for name, command in walk_commands(typer.main.get_command(app), "tiepoints"):
        hints = typing.get_type_hints(inspect.unwrap(command.callback))
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name in hints]
        usage = [name, *(p.name.upper() + "..." * (p.nargs == -1) for p in arguments)]
        usage += [f"{p.opts[0]} {metavar(hints[p.name])}" for p in options if p.required]
        lines += [f"## {name}", "", f"```text\n{' '.join(usage)} [OPTIONS]\n```", ""]
        lines += [as_text(command.help), ""]
        lines += [f"`{p.name.upper()}`\n: {as_text(p.help)}\n" for p in arguments]
        lines += [_option(p, hints[p.name]) for p in options]
    return "\n".join(lines)
