"""Sphinx configuration: `make docs` builds the site into build/docs without any download."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from tiepoints.jobs import serve

sys.path.insert(0, str(Path(__file__).parent))

project = "tiepoints"
author = "tiepoints developers"
copyright = "tiepoints developers"
version = release = installed_version("tiepoints")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# top-level names are described twice, at their place too: either target will do
suppress_warnings = ["ref.python"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

#: Pages with wide tables take the whole width.
WIDE_PAGES = ["index", "diary", "evaluation", "models", "papers", "weights"]
WIDE_PAGES += [f"results/{path.stem}" for path in Path(__file__).parent.glob("results/*.md")]

html_theme = "pydata_sphinx_theme"
html_title = "tiepoints"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "navigation_depth": 3,
    "secondary_sidebar_items": {"**": ["page-toc"], **{page: [] for page in WIDE_PAGES}},
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"diary": [], "index": []}

#: ONNX Runtime for browsers: the site has the page that matches photographs only where it has been
#: downloaded before, by `tiepoints serve`.
MATCH_RUNTIME = serve.cache_folder() / serve.RUNTIME

#: What is left alone in docstrings: literals, references and words in bold.
_MARKUP = re.compile(r"``.*?``|`[^`]+`_?|(?<![\w*])\*\*(?=\S)[^*\n]+\*\*", flags=re.S)


def _escaped_mark(found: re.Match[str]) -> str:
    """A bar or star escaped; the star of a list item stays."""
    return "\\" + found[1] if found[1] else found[0]


def _escape(text: str) -> str:
    """Escape what would be other markup, such as the bars of abs(t), and quote options."""

    def escaped(plain: str) -> str:
        plain = re.sub(r"^ *\* |([|*])", _escaped_mark, plain, flags=re.M)
        return re.sub(r"(?<![\w-])(--[a-z][a-z-]*)", r"``\1``", plain)

    parts, end = [], 0
    for markup in _MARKUP.finditer(text):
        parts += [escaped(text[end : markup.start()]), markup.group()]
        end = markup.end()
    return "".join([*parts, escaped(text[end:])])


def _unindent(lines: list[str]) -> list[str]:
    """Wrapped lines with another indentation than their paragraph, put in line with it."""
    out: list[str] = []
    section = ""
    for line in lines:
        text = line.strip()
        if text in ("Args:", "Attributes:", "Returns:", "Raises:"):
            section = text
        elif section == "Returns:" and text:
            line = "    " + text
        elif not section and text and out and out[-1].strip():
            bullet = out[-1].lstrip().startswith(("- ", "* ")) or out[-1].startswith(" ")
            if not bullet and not out[-1].rstrip().endswith(":"):
                line = text
        out.append(line)
    return out


def plain_docstring(app, what, name, obj, options, lines) -> None:
    """Docstrings are plain text with ``literals``: escape the rest before it is parsed."""
    lines[:] = _escape("\n".join(_unindent(lines))).split("\n")


def skip_constants(app, what, name, obj, skip, options) -> bool | None:
    """Leave constants of modules out: they belong to the explanation of the code."""
    return True if what == "module" and not callable(obj) else None


def insert_commands(app, docname, source) -> None:
    """Fill the reference of the command line from the commands themselves."""
    if docname == "reference/cli":
        from cli_reference import commands_as_markdown

        source[0] = source[0].replace("<!-- commands -->", commands_as_markdown())


def write_match_page(app, error) -> None:
    """Write the page that matches two photographs next to the pages of the site."""
    if error is None and app.builder.format == "html":
        contents = serve.site(serve.embedded_graphs(), MATCH_RUNTIME)
        serve.export_site(contents, Path(app.outdir) / "match")


def setup(app) -> None:
    """Register the hooks; napoleon's docstring hook runs after the escaping."""
    app.connect("autodoc-skip-member", skip_constants)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)
    app.connect("source-read", insert_commands)
    if not serve.missing_files(MATCH_RUNTIME):
        app.tags.add("match")
        app.connect("build-finished", write_match_page)
