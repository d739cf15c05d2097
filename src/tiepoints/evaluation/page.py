"""Tables, charts and pictures to one HTML page and one Markdown text that say the same; knows nothing of what is measured.

The page needs no network, no file and no script: pictures and charts lie in it, its one script only sorts columns. A system is one
of three roles, kept apart in every table: ``real``, ``control`` (never looked at the image) and ``published`` (printed in a paper).
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import Protocol

from .figures import STYLE as CHART_STYLE

Cell = float | int | str | None

ROLES = ("real", "control", "published")
CONTROL_HEAD = "Controls: points that never looked at the image"
ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """One column: its label, a heading it shares with its neighbours, decimals (None = text) and which way is better (1, -1, 0)."""

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
        """Without the columns that no row of ours fills and the rows of ours that fill none; None where nothing is left."""
        measured = [row for row in self.rows if row.role != "published"]
        kept = [k for k in range(len(self.columns)) if any(row.cells[k] is not None for row in measured)]
        rows = [Row(row.name, [row.cells[k] for k in kept], row.role) for row in self.rows]
        rows = [row for row in rows if any(cell is not None for cell in row.cells)]
        if not any(row.role != "published" for row in rows):
            return None
        return Table(self.caption, [self.columns[k] for k in kept], rows, self.published_head, self.corner, self.note)

    def best(self, k: int) -> str | None:
        """The best value of column ``k`` among real rows as printed, so that equal looks are marked alike; None where all look equal."""
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
        top, below = [f'<th scope="col" class="name"{" rowspan=2" if grouped else ""}>{e(self.corner)}</th>'], []
        k = 0
        while k < len(self.columns):
            column = self.columns[k]
            span = 1
            while column.group and k + span < len(self.columns) and self.columns[k + span].group == column.group:
                span += 1
            if column.group:
                top.append(f'<th scope="colgroup" colspan="{span}" class="group">{e(column.group)}</th>')
                for j in range(span):
                    edge = " edge" if not j else ""
                    one = self.columns[k + j]
                    below.append(f'<th scope="col" class="key{edge}" data-c="{k + j + 1}" data-b="{one.better}">{e(one.label)}</th>')
            else:
                rows = " rowspan=2" if grouped else ""
                text = "" if column.digits is not None else " text"
                top.append(f'<th scope="col" class="key edge{text}"{rows} data-c="{k + 1}" data-b="{column.better}">{e(column.label)}</th>')
            k += span
        head = f"<tr>{''.join(top)}</tr>" + (f"<tr>{''.join(below)}</tr>" if below else "")
        starts = [not c.group or not k or self.columns[k - 1].group != c.group for k, c in enumerate(self.columns)]
        bests = [self.best(k) for k in range(len(self.columns))]
        bodies = []
        for role in ROLES:
            rows_of_role = [row for row in self.rows if row.role == role]
            if not rows_of_role:
                continue
            heading = {"control": CONTROL_HEAD, "published": f"Published: {self.published_head}"}.get(role, "")
            lines = []
            if heading:
                lines.append(f'<tr class="head"><th scope="rowgroup" colspan="{len(self.columns) + 1}"><span>{e(heading)}</span></th></tr>')
            for row in rows_of_role:
                cells = []
                for (text, marked), column, value, start in zip(
                    self._printed(row, bests), self.columns, row.cells, starts, strict=True
                ):
                    kind = " ".join(["text"] * (column.digits is None) + ["edge"] * start + ["absent"] * (value is None))
                    sort = f' data-v="{float(value):.9g}"' if isinstance(value, int | float) else ""
                    inside = f"<b>{e(text)}</b>" if marked else e(text)
                    cells.append(f"<td{f' class={kind!r}' if kind else ''}{sort}>{inside}</td>")
                tag = {"control": " <small>control</small>", "published": " <small>published</small>"}.get(role, "")
                lines.append(f'<tr><th scope="row">{e(row.name)}{tag}</th>{"".join(cells)}</tr>')
            bodies.append(f'<tbody class="{role}">{"".join(lines)}</tbody>')
        note = f'<p class="note">{e(self.note)}</p>' if self.note else ""
        return (
            f'<figure class="table"><figcaption>{e(self.caption)}</figcaption>'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{e(self.caption)}"><table class="sortable">'
            f"<thead>{head}</thead>{''.join(bodies)}</table></div>{note}</figure>"
        )

    def markdown(self) -> str:
        """A pipe table; controls and published rows say so in their names."""
        lines = [f"**{escape_markdown(self.caption)}**", ""]
        lines.append("| " + " | ".join(escape_markdown(text) for text in [self.corner, *(c.full for c in self.columns)]) + " |")
        lines.append("|" + "|".join(["---", *("---" if c.digits is None else "---:" for c in self.columns)]) + "|")
        bests = [self.best(k) for k in range(len(self.columns))]
        for role in ROLES:
            for row in (row for row in self.rows if row.role == role):
                name = escape_markdown(row.name)
                if role != "real":
                    name = f"*{name}* ({role})"
                cells = [f"**{escape_markdown(t)}**" if marked else escape_markdown(t) for t, marked in self._printed(row, bests)]
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
        return "<dl>" + "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in self.terms) + "</dl>"

    def markdown(self) -> str:
        return "\n".join(f"- **{escape_markdown(term)}**: {escape_markdown(text)}" for term, text in self.terms)


@dataclass(frozen=True)
class Charts:
    """SVG charts with one legend; the first ``shown`` at once, the others unfolded. The numbers stand in tables, all that Markdown has."""

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
        out += f"<details><summary>The numbers</summary>{''.join(table.html() for table in self.numbers)}</details>"
        return f'<div class="charts">{out}</div>'

    def markdown(self) -> str:
        return "\n\n".join(table.markdown() for table in self.numbers)


@dataclass(frozen=True)
class Picture:
    """Images side by side under one caption: (address, alternative text). ``wide`` ones are not cut up on a narrow screen but scroll."""

    caption: str
    images: list[tuple[str, str]]
    wide: bool = False

    def html(self) -> str:
        tags = "".join(f'<img src="{address}" alt="{html.escape(alt)}" loading="lazy">' for address, alt in self.images)
        kind, extra = ("scroll wide", ' tabindex="0" role="region" aria-label="wide picture"') if self.wide else ("beside", "")
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
        lead: sentences of the box at the top.
    """

    title: str
    facts: list[tuple[str, str]]
    lead: list[str]
    sections: list[Section] = field(default_factory=list)

    def html(self) -> str:
        """One file that a browser shows without a network; the policy in its head forbids anything else."""
        e = html.escape
        anchors = [re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") for section in self.sections]
        facts = "".join(f"<div><dt>{e(name)}</dt><dd>{e(value)}</dd></div>" for name, value in self.facts)
        lead = "".join(f"<p>{e(text)}</p>" for text in self.lead)
        lead = f'<aside class="lead" aria-label="Read this first">{lead}</aside>' if lead else ""
        links = "".join(f'<a href="#{a}">{e(s.title)}</a>' for a, s in zip(anchors, self.sections, strict=True))
        body = "".join(
            f'<section id="{a}"><h2>{e(s.title)}</h2>{"".join(block.html() for block in s.blocks)}</section>'
            for a, s in zip(anchors, self.sections, strict=True)
        )
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'\">"
            '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
            f"<title>{e(self.title)}</title><style>{STYLE}{CHART_STYLE}</style></head><body><main>"
            f'<header><h1>{e(self.title)}</h1><dl class="facts">{facts}</dl></header>'
            f'{lead}<nav aria-label="Sections">{links}</nav>{body}</main><script>{SCRIPT}</script></body></html>\n'
        )

    def markdown(self) -> str:
        """The same without charts and pictures."""
        parts = [f"# {escape_markdown(self.title)}"]
        parts.append("\n".join(f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in self.facts))
        parts += ["\n>\n".join(f"> {escape_markdown(text)}" for text in self.lead)] * bool(self.lead)
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


STYLE = """
:root{--bg:#fff;--ink:#1b2430;--soft:#596474;--line:#d6dce4;--panel:#f3f5f8;--accent:#0b5cad;--lead:#fff7e3;--edge:#c77c02;
color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){
:root{--bg:#13171d;--ink:#e7ebf1;--soft:#a2adbb;--line:#343c47;--panel:#1c222a;--accent:#7db8f2;--lead:#2a2313;--edge:#e0a030}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;line-height:1.2;margin:.4rem 0 .8rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:2px solid var(--line)}
h3{font-size:1.05rem;margin:1.6rem 0 .3rem;overflow-wrap:anywhere}
p{margin:.5rem 0;max-width:75ch}
small{font-size:.72em;color:var(--soft);font-weight:400;white-space:nowrap}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,240px),1fr));gap:.5rem 1.4rem;margin:0;font-size:.9rem}
.facts dt{color:var(--soft);font-size:.82rem}.facts dd{margin:0;overflow-wrap:anywhere}
.lead{background:var(--lead);border-left:5px solid var(--edge);border-radius:4px;padding:.5rem 1rem;margin:1.2rem 0}
.lead p:first-child{font-weight:600}.lead p{max-width:none}
nav{display:flex;flex-wrap:wrap;gap:.4rem;font-size:.88rem;margin-top:1rem}
nav a{color:var(--accent);text-decoration:none;border:1px solid var(--line);border-radius:1rem;padding:.15rem .7rem}
nav a:hover{background:var(--panel)}
a:focus-visible,button:focus-visible,.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:1px}
figure{margin:1rem 0}figcaption{font-weight:600;font-size:.92rem;margin-bottom:.35rem}
.note{color:var(--soft);font-size:.85rem}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.82rem;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .5rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
td.text,thead th.text{text-align:left}td.text{white-space:normal;min-width:5rem;overflow-wrap:anywhere}
td.absent{color:var(--line)}
thead th{background:var(--panel);font-weight:600;vertical-align:bottom;white-space:normal}
thead th.group{text-align:center;border-left:1px solid var(--line)}
th.edge,td.edge{border-left:1px solid var(--line)}
th[scope=row],th.name{position:sticky;left:0;z-index:1;text-align:left;background:var(--bg);font-weight:500;
border-right:1px solid var(--line)}
th.name{background:var(--panel)}
tr.head th{text-align:left;background:var(--panel);color:var(--soft);font-size:.92em;font-weight:600}
tr.head span{position:sticky;left:.5rem;white-space:normal}
tbody.control td,tbody.control th[scope=row]{background:var(--panel);font-style:italic}
tbody.control td:not(.absent),tbody.control th[scope=row]{color:var(--soft)}
tbody.published td:not(.absent),tbody.published th[scope=row]{color:var(--soft)}
td b{font-weight:750}
table button{all:unset;cursor:pointer;font:inherit}
th[aria-sort] button::after{content:" \\25BE";color:var(--accent)}th[aria-sort=ascending] button::after{content:" \\25B4"}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1rem}
.grid>div{min-width:0}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--accent)}
.picture img{display:block;max-width:100%;height:auto;border-radius:4px}
.beside{display:flex;flex-wrap:wrap;gap:6px;align-items:flex-start}
.beside img{flex:1 1 300px;min-width:0;width:100%;max-width:600px}
.wide{border:0}.wide img{width:100%;max-width:1206px}
dt{font-weight:600}dd{margin:0 0 .5rem;max-width:80ch}
@media screen and (max-width:640px){
th[scope=row]{white-space:normal;overflow-wrap:anywhere;min-width:6.5rem;max-width:38vw}
main{padding:.7rem}.wide img{width:640px;max-width:none}th,td{padding:.3rem .42rem}h1{font-size:1.35rem}}
@media print{
@page{size:A4 landscape;margin:11mm}
body{font-size:10pt}main{max-width:none;padding:0}nav,summary{display:none}
.scroll{overflow:visible;border:0}table{font-size:7.6pt}th,td{padding:1.2pt 3pt}
th[scope=row],th.name,tr.head span{position:static}
thead{display:table-header-group}tr,.charts,.grid>div,.picture{break-inside:avoid}h2,h3,figcaption,section>p{break-after:avoid}
.grid{grid-template-columns:repeat(3,1fr)}.picture{display:inline-block;width:49%;vertical-align:top;margin:.4rem .5% .4rem 0}
.picture figcaption{font-size:8pt}
.beside{flex-wrap:nowrap}.beside img{flex:1 1 45%;max-width:49%}.wide img{width:100%}
.lead,thead th,.control td,.control th,tr.head th{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""

#: Sorts the rows of each body by the clicked column, best first; rows without a value stay last.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable"))
  for (const head of table.querySelectorAll("th[data-c]")) {
    const button = document.createElement("button");
    button.type = "button"; button.title = "sort"; button.append(...head.childNodes); head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort"), first = head.dataset.b === "-1" ? "ascending" : "descending";
      const order = now ? (now === "ascending" ? "descending" : "ascending") : first;
      for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const key = row => { const cell = row.cells[head.dataset.c]; return parseFloat(cell.dataset.v ?? cell.textContent); };
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter(row => !row.classList.contains("head"));
        rows.sort((a, b) => {
          const x = key(a), y = key(b);
          if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
          return order === "ascending" ? x - y : y - x;
        });
        body.append(...rows);
      }
    });
  }
"""
