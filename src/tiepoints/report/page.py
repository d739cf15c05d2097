"""Render tables, charts and images as an HTML page and as Markdown, independent of the metrics.

The page is self-contained: images and charts are inline, and its script only sorts columns. Tables
separate three roles of systems: ``real``, ``control`` (independent of the image content) and
``published`` (values from a paper).
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
CONTROL_HEAD = "Controls: keypoints independent of the image content"
MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        label: heading of the column.
        group: common heading of neighboring columns.
        digits: number of decimals; None for text.
        better: 1 if higher is better, -1 if lower is better, else 0.
    """

    label: str
    group: str = ""
    digits: int | None = 1
    better: int = 0

    @property
    def full(self) -> str:
        """Group and label."""
        return f"{self.group} {self.label}".strip()

    def show(self, value: Cell) -> str:
        """Format a value; strings are unchanged."""
        if value is None:
            return MISSING
        if isinstance(value, str) or self.digits is None:
            return str(value)
        value = round(value, self.digits) + 0.0  # avoid -0
        return f"{value:,.{self.digits}f}" if abs(value) >= 10_000 else f"{value:.{self.digits}f}"


@dataclass(frozen=True)
class Row:
    """A row of a table: name, one cell per column, and role."""

    name: str
    cells: list[Cell]
    role: str = "real"


@dataclass(frozen=True)
class Table:
    """A table; the best value of each column among the rows of role ``real`` is bold.

    Attributes:
        published_head: source of the rows of role ``published``.
        corner: heading of the first column, the names.
    """

    caption: str
    columns: list[Column]
    rows: list[Row]
    published_head: str = ""
    corner: str = "system"
    note: str = ""

    def trimmed(self) -> Table | None:
        """Remove columns without values in rows that are not published, and empty rows; None if
        nothing is left.
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
        """The best value of column ``k`` among rows of role ``real``, formatted, so that values
        equal after rounding are all bold; None if all are equal.
        """
        column = self.columns[k]
        values = [row.cells[k] for row in self.rows if row.role == "real"]
        numbers = [value for value in values if isinstance(value, int | float)]
        if not column.better or len({column.show(number) for number in numbers}) < 2:
            return None
        return column.show(max(numbers) if column.better > 0 else min(numbers))

    def _format(self, row: Row, bests: list[str | None]) -> list[tuple[str, bool]]:
        """The formatted cells of a row, and whether each is the best of its column."""
        texts = [column.show(cell) for column, cell in zip(self.columns, row.cells, strict=True)]
        return [
            (text, row.role == "real" and isinstance(cell, int | float) and text == best)
            for text, cell, best in zip(texts, row.cells, bests, strict=True)
        ]

    def html(self) -> str:
        """A ``figure`` with a horizontally scrollable table."""
        bests = [self.best(k) for k in range(len(self.columns))]
        bodies = "".join(self._body(role, bests) for role in ROLES)
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        caption = html.escape(self.caption)
        return (
            f'<figure class="table"><figcaption>{caption}</figcaption>'
            '<div class="scroll" tabindex="0" role="region" '
            f'aria-label="{caption}"><table class="sortable">'
            f"<thead>{self._head()}</thead>{bodies}</table></div>{note}</figure>"
        )

    def _starts_group(self, k: int) -> bool:
        """Whether column ``k`` has no group or is the first of its group."""
        group = self.columns[k].group
        return not group or not k or self.columns[k - 1].group != group

    def _head(self) -> str:
        """One or two header rows; groups span their columns in the upper one."""
        e = html.escape
        rowspan = " rowspan=2" if any(column.group for column in self.columns) else ""
        upper = [f'<th scope="col" class="name"{rowspan}>{e(self.corner)}</th>']
        lower = []
        for k, column in enumerate(self.columns):
            key = f'data-c="{k + 1}" data-b="{column.better}">{e(column.label)}</th>'
            if not column.group:
                text = "" if column.digits is not None else " text"
                upper.append(f'<th scope="col" class="key edge{text}"{rowspan} {key}')
                continue
            if self._starts_group(k):
                span = 1
                while k + span < len(self.columns) and not self._starts_group(k + span):
                    span += 1
                upper.append(
                    f'<th scope="colgroup" colspan="{span}" class="group">{e(column.group)}</th>'
                )
            edge = " edge" if self._starts_group(k) else ""
            lower.append(f'<th scope="col" class="key{edge}" {key}')
        head = f"<tr>{''.join(upper)}</tr>"
        return head + (f"<tr>{''.join(lower)}</tr>" if lower else "")

    def _body(self, role: str, bests: list[str | None]) -> str:
        """The ``tbody`` of the rows of a role; empty without rows."""
        e = html.escape
        rows = [row for row in self.rows if row.role == role]
        if not rows:
            return ""
        heading = {"control": CONTROL_HEAD, "published": f"Published: {self.published_head}"}
        lines = []
        if role in heading:
            lines.append(
                '<tr class="head"><th scope="rowgroup" '
                f'colspan="{len(self.columns) + 1}"><span>{e(heading[role])}</span></th></tr>'
            )
        tag = "" if role == "real" else f" <small>{role}</small>"
        for row in rows:
            cells = []
            for k, (text, bold) in enumerate(self._format(row, bests)):
                value = row.cells[k]
                kind = " ".join(
                    ["text"] * (self.columns[k].digits is None)
                    + ["edge"] * self._starts_group(k)
                    + ["absent"] * (value is None)
                )
                sort = f' data-v="{float(value):.9g}"' if isinstance(value, int | float) else ""
                content = f"<b>{e(text)}</b>" if bold else e(text)
                cells.append(f"<td{f' class={kind!r}' if kind else ''}{sort}>{content}</td>")
            lines.append(f'<tr><th scope="row">{e(row.name)}{tag}</th>{"".join(cells)}</tr>')
        return f'<tbody class="{role}">{"".join(lines)}</tbody>'

    def markdown(self) -> str:
        """A pipe table; names of controls and published rows include their role."""
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
                    f"**{escape_markdown(text)}**" if bold else escape_markdown(text)
                    for text, bold in self._format(row, bests)
                ]
                lines.append("| " + " | ".join([name, *cells]) + " |")
        if any(row.role == "published" for row in self.rows):
            lines += ["", f"Published: {escape_markdown(self.published_head)}."]
        if self.note:
            lines += ["", escape_markdown(self.note)]
        return "\n".join(lines)


def escape_markdown(text: str) -> str:
    """Escape text for Markdown, including HTML, also inside a table."""
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
    """Terms with their definitions."""

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
    """SVG charts with a common legend; those after the first ``shown`` are collapsed. Values are in
    ``tables``, which alone are in Markdown.
    """

    charts: list[str]
    legend: str
    tables: list[Table]
    shown: int = 12

    def html(self) -> str:
        def grid(charts: list[str]) -> str:
            return f'<div class="grid">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>'

        out = self.legend + grid(self.charts[: self.shown])
        if rest := self.charts[self.shown :]:
            out += f"<details><summary>{len(rest)} more charts</summary>{grid(rest)}</details>"
        tables = "".join(table.html() for table in self.tables)
        out += f"<details><summary>Values</summary>{tables}</details>"
        return f'<div class="charts">{out}</div>'

    def markdown(self) -> str:
        return "\n\n".join(table.markdown() for table in self.tables)


@dataclass(frozen=True)
class ImageRow:
    """Images side by side with a caption, as (address, alternative text). ``wide`` ones scroll on a
    narrow screen instead of wrapping.
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
            ("scroll wide", ' tabindex="0" role="region" aria-label="wide image"')
            if self.wide
            else ("side-by-side", "")
        )
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>"
        return f'<figure class="images">{caption}<div class="{kind}"{extra}>{tags}</div></figure>'

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
    """A section with a title."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        metadata: (name, value) of the header.
        summary: paragraphs of the box at the top.
        assets: names of further scripts (``NAME.js``) and styles (``NAME.css``) in ``assets``.
    """

    title: str
    metadata: list[tuple[str, str]]
    summary: list[str]
    sections: list[Section] = field(default_factory=list)
    assets: tuple[str, ...] = ()

    def html(self) -> str:
        """A self-contained HTML file; its content security policy forbids external resources."""
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
            metadata=self.metadata,
            summary=self.summary,
            sections=sections,
            style="".join(_asset(f"{name}.css") for name in ("style", "charts", *self.assets)),
            script="".join(_asset(f"{name}.js") for name in ("sort", *self.assets)),
        )

    def markdown(self) -> str:
        """The report as Markdown, without charts and images."""
        parts = [f"# {escape_markdown(self.title)}"]
        parts.append(
            "\n".join(
                f"- {escape_markdown(name)}: {escape_markdown(value)}"
                for name, value in self.metadata
            )
        )
        parts += ["\n>\n".join(f"> {escape_markdown(text)}" for text in self.summary)] * bool(
            self.summary
        )
        for section in self.sections:
            parts += [f"## {escape_markdown(section.title)}", _joined(section.blocks)]
        return "\n\n".join(parts) + "\n"


def _joined(blocks: list[Block]) -> str:
    """Markdown of blocks separated by empty lines, with consecutive image captions as a list."""
    out = ""
    in_list = False
    for block in blocks:
        is_item = isinstance(block, ImageRow)
        out += ("\n" if is_item and in_list else "\n\n" if out else "") + block.markdown()
        in_list = is_item
    return out
