"""Tables, charts and pictures to one HTML page and one Markdown text that say the same; knows
nothing of what is measured.

The page needs no network, no file and no script: pictures and charts lie in it, its one script only
sorts columns. A system is one of three roles, kept apart in every table: ``real``, ``control``
(never looked at the image) and ``published`` (printed in a paper).
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from importlib import resources
from typing import Protocol

from jinja2 import Environment, Template

Cell = float | int | str | None


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _template() -> Template:
    return Environment(autoescape=True).from_string(_asset("page.html"))


ROLES = ("real", "control", "published")
CONTROL_HEAD = "Controls: points that never looked at the image"
ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """One column: its label, a heading it shares with its neighbours, decimals (None = text) and
    which way is better (1, -1, 0).
    """

    label: str
    group: str = ""
    digits: int | None = 1
    better: int = 0

    @property
    def full(self) -> str:
        """Heading and label in one."""
        return f"{self.group} {self.label}".strip()

    def show(self, value: Cell) -> str:
        """A value as printed; texts are printed as they are."""
        if value is None:
            return ABSENT
        if isinstance(value, str) or self.digits is None:
            return str(value)
        value = round(value, self.digits) + 0.0  # no minus before a zero
        return f"{value:,.{self.digits}f}" if abs(value) >= 10_000 else f"{value:.{self.digits}f}"


@dataclass(frozen=True)
class Row:
    """One line of a table: a name, one cell a column, and a role."""

    name: str
    cells: list[Cell]
    role: str = "real"


@dataclass(frozen=True)
class Table:
    """Rows under columns; the best value of a column among the real rows is printed in bold.

    Attributes:
        published_head: source of the rows of role ``published``.
        corner: heading of the names.
    """

    caption: str
    columns: list[Column]
    rows: list[Row]
    published_head: str = ""
    corner: str = "system"
    note: str = ""

    def trimmed(self) -> Table | None:
        """Without the columns that no row of ours fills and the rows of ours that fill none; None
        where nothing is left.
        """
        measured = [row for row in self.rows if row.role != "published"]
        kept = [
            k for k in range(len(self.columns)) if any(row.cells[k] is not None for row in measured)
        ]
        rows = [Row(row.name, [row.cells[k] for k in kept], row.role) for row in self.rows]
        rows = [row for row in rows if any(cell is not None for cell in row.cells)]
        if not any(row.role != "published" for row in rows):
            return None
        return Table(
            self.caption,
            [self.columns[k] for k in kept],
            rows,
            self.published_head,
            self.corner,
            self.note,
        )

    def best(self, k: int) -> str | None:
        """The best value of column ``k`` among real rows as printed, so that equal looks are marked
        alike; None where all look equal.
        """
        column = self.columns[k]
        values = [row.cells[k] for row in self.rows if row.role == "real"]
        numbers = [value for value in values if isinstance(value, int | float)]
        if not column.better or len({column.show(number) for number in numbers}) < 2:
            return None
        return column.show(max(numbers) if column.better > 0 else min(numbers))

    def _printed(self, row: Row, bests: list[str | None]) -> list[tuple[str, bool]]:
        """The cells of a row as text, and whether each is the best of its column."""
        texts = [column.show(cell) for column, cell in zip(self.columns, row.cells, strict=True)]
        return [
            (text, row.role == "real" and isinstance(cell, int | float) and text == best)
            for text, cell, best in zip(texts, row.cells, bests, strict=True)
        ]

    def html(self) -> str:
        """A ``figure`` whose table scrolls inside its own box."""
        e = html.escape
        grouped = any(column.group for column in self.columns)
        rowspan = " rowspan=2" if grouped else ""
        top, below = (
            [f'<th scope="col" class="name"{rowspan}>{e(self.corner)}</th>'],
            [],
        )
        k = 0
        while k < len(self.columns):
            column = self.columns[k]
            span = 1
            while (
                column.group
                and k + span < len(self.columns)
                and self.columns[k + span].group == column.group
            ):
                span += 1
            if column.group:
                top.append(
                    f'<th scope="colgroup" colspan="{span}" class="group">{e(column.group)}</th>'
                )
                for j in range(span):
                    edge = " edge" if not j else ""
                    one = self.columns[k + j]
                    below.append(
                        f'<th scope="col" class="key{edge}" data-c="{k + j + 1}" '
                        f'data-b="{one.better}">{e(one.label)}</th>'
                    )
            else:
                rows = " rowspan=2" if grouped else ""
                text = "" if column.digits is not None else " text"
                top.append(
                    f'<th scope="col" class="key edge{text}"{rows} data-c="{k + 1}" '
                    f'data-b="{column.better}">{e(column.label)}</th>'
                )
            k += span
        head = f"<tr>{''.join(top)}</tr>" + (f"<tr>{''.join(below)}</tr>" if below else "")
        starts = [
            not c.group or not k or self.columns[k - 1].group != c.group
            for k, c in enumerate(self.columns)
        ]
        bests = [self.best(k) for k in range(len(self.columns))]
        bodies = []
        for role in ROLES:
            rows_of_role = [row for row in self.rows if row.role == role]
            if not rows_of_role:
                continue
            heading = {
                "control": CONTROL_HEAD,
                "published": f"Published: {self.published_head}",
            }.get(role, "")
            lines = []
            if heading:
                lines.append(
                    '<tr class="head"><th scope="rowgroup" '
                    f'colspan="{len(self.columns) + 1}"><span>{e(heading)}</span></th></tr>'
                )
            for row in rows_of_role:
                cells = []
                for (text, marked), column, value, start in zip(
                    self._printed(row, bests), self.columns, row.cells, starts, strict=True
                ):
                    kind = " ".join(
                        ["text"] * (column.digits is None)
                        + ["edge"] * start
                        + ["absent"] * (value is None)
                    )
                    sort = f' data-v="{float(value):.9g}"' if isinstance(value, int | float) else ""
                    inside = f"<b>{e(text)}</b>" if marked else e(text)
                    cells.append(f"<td{f' class={kind!r}' if kind else ''}{sort}>{inside}</td>")
                tag = {
                    "control": " <small>control</small>",
                    "published": " <small>published</small>",
                }.get(role, "")
                lines.append(f'<tr><th scope="row">{e(row.name)}{tag}</th>{"".join(cells)}</tr>')
            bodies.append(f'<tbody class="{role}">{"".join(lines)}</tbody>')
        note = f'<p class="note">{e(self.note)}</p>' if self.note else ""
        return (
            f'<figure class="table"><figcaption>{e(self.caption)}</figcaption>'
            '<div class="scroll" tabindex="0" role="region" '
            f'aria-label="{e(self.caption)}"><table class="sortable">'
            f"<thead>{head}</thead>{''.join(bodies)}</table></div>{note}</figure>"
        )

    def markdown(self) -> str:
        """A pipe table; controls and published rows say so in their names."""
        lines = [f"**{escape_markdown(self.caption)}**", ""]
        lines.append(
            "| "
            + " | ".join(
                escape_markdown(text) for text in [self.corner, *(c.full for c in self.columns)]
            )
            + " |"
        )
        lines.append(
            "|"
            + "|".join(["---", *("---" if c.digits is None else "---:" for c in self.columns)])
            + "|"
        )
        bests = [self.best(k) for k in range(len(self.columns))]
        for role in ROLES:
            for row in (row for row in self.rows if row.role == role):
                name = escape_markdown(row.name)
                if role != "real":
                    name = f"*{name}* ({role})"
                cells = [
                    f"**{escape_markdown(t)}**" if marked else escape_markdown(t)
                    for t, marked in self._printed(row, bests)
                ]
                lines.append("| " + " | ".join([name, *cells]) + " |")
        if any(row.role == "published" for row in self.rows):
            lines += ["", f"Published: {escape_markdown(self.published_head)}."]
        if self.note:
            lines += ["", escape_markdown(self.note)]
        return "\n".join(lines)


def escape_markdown(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is, also inside a table."""
    text = html.escape(text, quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(text.split()))


class Block(Protocol):
    """A part of a section."""

    def html(self) -> str: ...

    def markdown(self) -> str: ...


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text."""

    text: str

    def html(self) -> str:
        return f"<p>{html.escape(self.text)}</p>"

    def markdown(self) -> str:
        return escape_markdown(self.text)


@dataclass(frozen=True)
class Definitions:
    """Terms and what they mean."""

    terms: list[tuple[str, str]]

    def html(self) -> str:
        return (
            "<dl>"
            + "".join(
                f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>"
                for term, text in self.terms
            )
            + "</dl>"
        )

    def markdown(self) -> str:
        return "\n".join(
            f"- **{escape_markdown(term)}**: {escape_markdown(text)}" for term, text in self.terms
        )


@dataclass(frozen=True)
class Charts:
    """SVG charts with one legend; the first ``shown`` at once, the others unfolded. The numbers
    stand in tables, all that Markdown has.
    """

    charts: list[str]
    legend: str
    numbers: list[Table]
    shown: int = 12

    def html(self) -> str:
        def grid(charts: list[str]) -> str:
            return f'<div class="grid">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>'

        out = self.legend + grid(self.charts[: self.shown])
        if rest := self.charts[self.shown :]:
            out += f"<details><summary>{len(rest)} more charts</summary>{grid(rest)}</details>"
        numbers = "".join(table.html() for table in self.numbers)
        out += f"<details><summary>The numbers</summary>{numbers}</details>"
        return f'<div class="charts">{out}</div>'

    def markdown(self) -> str:
        return "\n\n".join(table.markdown() for table in self.numbers)


@dataclass(frozen=True)
class Picture:
    """Images side by side under one caption: (address, alternative text). ``wide`` ones are not cut
    up on a narrow screen but scroll.
    """

    caption: str
    images: list[tuple[str, str]]
    wide: bool = False

    def html(self) -> str:
        tags = "".join(
            f'<img src="{address}" alt="{html.escape(alt)}" loading="lazy">'
            for address, alt in self.images
        )
        kind, extra = (
            ("scroll wide", ' tabindex="0" role="region" aria-label="wide picture"')
            if self.wide
            else ("beside", "")
        )
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>"
        return f'<figure class="picture">{caption}<div class="{kind}"{extra}>{tags}</div></figure>'

    def markdown(self) -> str:
        return f"- {escape_markdown(self.caption)}"


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str

    def html(self) -> str:
        return f"<h3>{html.escape(self.text)}</h3>"

    def markdown(self) -> str:
        return f"### {escape_markdown(self.text)}"


@dataclass(frozen=True)
class Section:
    """A titled run of blocks."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Page:
    """The whole report.

    Attributes:
        facts: (name, value) of the header.
        summary: sentences of the box at the top.
    """

    title: str
    facts: list[tuple[str, str]]
    summary: list[str]
    sections: list[Section] = field(default_factory=list)

    def html(self) -> str:
        """One file that a browser shows without a network; the policy in its head forbids anything
        else.
        """
        sections = [
            {
                "anchor": re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-"),
                "title": section.title,
                "body": "".join(block.html() for block in section.blocks),
            }
            for section in self.sections
        ]
        return _template().render(
            title=self.title,
            facts=self.facts,
            summary=self.summary,
            sections=sections,
            style=_asset("style.css") + _asset("charts.css"),
            script=_asset("sort.js"),
        )

    def markdown(self) -> str:
        """The same without charts and pictures."""
        parts = [f"# {escape_markdown(self.title)}"]
        parts.append(
            "\n".join(
                f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in self.facts
            )
        )
        parts += ["\n>\n".join(f"> {escape_markdown(text)}" for text in self.summary)] * bool(
            self.summary
        )
        for section in self.sections:
            parts += [f"## {escape_markdown(section.title)}", _joined(section.blocks)]
        return "\n\n".join(parts) + "\n"


def _joined(blocks: list[Block]) -> str:
    """Blocks as Markdown apart by an empty line, captions of pictures as one list."""
    out = ""
    listed = False
    for block in blocks:
        item = isinstance(block, Picture)
        out += ("\n" if item and listed else "\n\n" if out else "") + block.markdown()
        listed = item
    return out
