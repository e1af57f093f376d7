"""A page of text, tables and pictures, set as Markdown or as one HTML file that holds its pictures.

Not here: what a page says.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from foedus.report.tables import shown


class Heading(NamedTuple):
    """A heading, of level 1 to 6."""

    level: int
    text: str


class Text(NamedTuple):
    """A paragraph; `code` stands between backticks."""

    text: str


class Rows(NamedTuple):
    """A table: rows of column → value, all with the same columns."""

    rows: Sequence[Mapping[str, Any]]


class Picture(NamedTuple):
    """A picture: its path within the page's folder, and what it shows."""

    path: str
    caption: str


Block = Heading | Text | Rows | Picture


def as_markdown(blocks: Sequence[Block]) -> str:
    """The page as Markdown.

    Example:
        >>> print(as_markdown([Heading(2, "Who"), Text("Nobody."), Rows([{"a": 1, "b": 0.5}])]))
        ## Who
        <BLANKLINE>
        Nobody.
        <BLANKLINE>
        | a | b |
        | --- | --- |
        | 1 | 0.5 |
        <BLANKLINE>
    """
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Rows(rows):
            names = list(rows[0]) if rows else []
            lines = [names, ["---"] * len(names), *([shown(row[n]) for n in names] for row in rows)]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        case Picture(path, caption):
            return f"![{caption}]({path.replace(' ', '%20')})"


def as_html(blocks: Sequence[Block], title: str, folder: Path) -> str:
    """The page as one HTML file; pictures are read from the folder and put into it.

    Args:
        blocks: of the page.
        title: of the window.
        folder: where pictures lie.

    Example:
        >>> "<h2>A &lt; B</h2>" in as_html([Heading(2, "A < B")], "page", Path("."))
        True
    """
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n{body}\n</html>\n"
    )


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#22262b}"
    "table{border-collapse:collapse}td,th{padding:.3rem .8rem;border-bottom:1px solid #ccc;text-align:left}"
    "img{max-width:100%}code{background:#f1f2f4;padding:0 .2em}"
)


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return "<p>" + re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text)) + "</p>"
        case Rows(rows):
            names = list(rows[0]) if rows else []
            head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
            lines = ("".join(f"<td>{html.escape(shown(row[n]))}</td>" for n in names) for row in rows)
            return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
        case Picture(path, caption):
            packed = base64.b64encode((folder / path).read_bytes()).decode()
            return f'<p><img alt="{html.escape(caption)}" src="data:image/png;base64,{packed}"></p>'
