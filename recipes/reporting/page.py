"""A Markdown report as one HTML file that needs nothing else: style and pictures inside, a table of contents."""

import base64
import html
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

STYLE = """
:root { color-scheme: light dark; --edge: #8886; --soft: #8881; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 74rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--edge); }
nav { background: var(--soft); border-radius: .5rem; padding: .6rem 1rem; }
nav ul { list-style: none; margin: 0; padding: 0; columns: 16rem; }
nav li.sub { padding-left: 1.2rem; font-size: .92em; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--edge); white-space: nowrap; text-align: left; }
thead th { border-bottom-width: 2px; white-space: normal; vertical-align: bottom; }
tbody tr:hover { background: var(--soft); }
img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
pre { overflow-x: auto; background: var(--soft); padding: .7rem; border-radius: .4rem; } code { font-size: .88em; }
@media (max-width: 40rem) { body { font-size: 15px; padding: .6rem; } }
"""


def to_html(text: str, title: str, folder: Path) -> str:
    """The page of a Markdown text.

    Args:
        text: the report; its pictures are named relative to folder.
        title: the page's title.
        folder: where the pictures lie.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    contents = number_headings(tokens)
    embed_pictures(tokens, folder)
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    entries = "\n".join(
        f'<li{" class=sub" if level > 2 else ""}><a href="#{anchor}">{html.escape(name)}</a></li>'
        for level, anchor, name in contents
    )
    head, _, rest = body.partition("</h1>")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head><body>\n{head}</h1>\n<nav><ul>\n{entries}\n</ul></nav>\n{rest}</body></html>\n"
    )


def number_headings(tokens: Sequence[Token]) -> list[tuple[int, str, str]]:
    """Give each heading below the title an id; returns (level, id, text) for the table of contents."""
    contents: list[tuple[int, str, str]] = []
    for token, inline in pairwise(tokens):
        if token.type == "heading_open" and token.tag != "h1":
            anchor = f"s{len(contents) + 1}-{re.sub('[^a-z0-9]+', '-', inline.content.lower()).strip('-')}"
            token.attrSet("id", anchor)
            contents.append((int(token.tag[1]), anchor, inline.content))
    return contents


def embed_pictures(tokens: Sequence[Token], folder: Path) -> None:
    """Put each picture's bytes in the place of its name."""
    children: list[Any] = [child for token in tokens for child in token.children or ()]
    for image in (child for child in children if child.type == "image"):
        data = base64.b64encode((folder / image.attrGet("src")).read_bytes()).decode("ascii")
        image.attrSet("src", f"data:image/png;base64,{data}")
