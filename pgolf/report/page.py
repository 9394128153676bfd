"""Parts of an HTML page that needs no other file: its frame and style, tables, and figures as SVG.

The page is well-formed XML without scripts, links or fonts from elsewhere. It follows the reader's choice of
a light or a dark screen, and so do the figures: matplotlib draws them in black on nothing, and black becomes
the colour of the page's text. Figures need matplotlib (`pip install 'pgolf[plot]'`).
"""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLORS = ("#3b82c4", "#d1603d", "#4f9a4c", "#9a68b8", "#c98a1b", "#2a9d9a", "#8a8a8a", "#c0618f")
"""Colours of curves, which can be told apart on white and on black."""
INK, INK_DARK = "#222222", "#dcdfe4"
STYLE = f"""
:root {{ color-scheme: light dark; --ink: {INK}; --paper: #ffffff; --head: #f2f4f7; --line: #cccccc }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: {INK_DARK}; --paper: #14171c; --head: #20252d; --line: #434a55 }} .warn {{ color: #ff8d85 }}
}}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1.5em auto; max-width: 80em; padding: 0 1em;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere }}
.wide {{ overflow-x: auto; margin: 0.5em 0 1.5em }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }}
th, td {{ border: 1px solid var(--line); padding: 0.25em 0.6em; text-align: left; vertical-align: top }}
th {{ background: var(--head) }} img {{ max-width: 100% }} .warn {{ font-weight: 600 }}
.figures {{ display: grid; gap: 0 2em; grid-template-columns: repeat(auto-fit, minmax(min(100%,26em),1fr)) }}
.figures p {{ margin: 0.5em 0 }} .figures img {{ width: 100% }} summary {{ cursor: pointer; margin: 1em 0 }}
@media (prefers-color-scheme: light) {{ .warn {{ color: #a02020 }} }}
"""


@dataclass(frozen=True)
class Table:
    """A titled table of text, for Markdown and for HTML."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def words(text: str) -> str:
    """Return text for the page: letters that XML cannot hold become a question mark."""
    return html.escape("".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text))


def page(title: str, body: Sequence[str]) -> str:
    """Return the whole page: its heading is the title, then follow the parts of `body`, which are XHTML."""
    named = words(title)
    phone = '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
    head = f'<head><meta charset="utf-8"/>{phone}<title>{named}</title><style>{STYLE}</style></head>'
    start = '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en">'
    return "\n".join([start, head, "<body>", f"<h1>{named}</h1>", *body, "</body>", "</html>", ""])


def table(content: Table) -> str:
    """Return a table with its title as a heading; on a narrow screen it scrolls by itself."""
    heading = f"<h2>{words(content.title)}</h2>" if content.title else ""
    head = "".join(f"<th>{words(c)}</th>" for c in content.head)
    rows = ["<tr>" + "".join(f"<td>{words(c)}</td>" for c in row) + "</tr>" for row in content.rows]
    top = [f"<tr>{head}</tr>"] if head else []
    return "\n".join([heading, '<div class="wide"><table>', *top, *rows, "</table></div>"])


def folded(title: str, body: Sequence[str]) -> str:
    """Return parts that the page shows when its reader unfolds them."""
    return "\n".join([f"<details><summary>{words(title)}</summary>", *body, "</details>"])


def figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure (inches) outside of pyplot, so that no global state is left behind, and its axes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="tight")
    FigureCanvasSVG(made)
    axes = made.subplots()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return made, axes


def image(drawn: Any, text: str) -> str:
    """Return a figure as an img element, with `text` for readers who do not see it."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser draws the letters
        drawn.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    dark = f"@media(prefers-color-scheme:dark){{svg{{color:{INK_DARK}}}}}"
    rules = f"svg{{color:{INK};fill:currentColor}}{dark}"
    svg = buffer.getvalue().decode().replace("#000000", "currentColor")
    svg = svg.replace("<defs>", f"<style>{rules}</style><defs>", 1)
    data = base64.b64encode(svg.encode()).decode()
    return f'<p><img alt="{words(text)}" src="data:image/svg+xml;base64,{data}"/></p>'
