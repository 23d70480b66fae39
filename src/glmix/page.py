"""HTML pages that hold all they show, in one style: they open from disk, without a network."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from glmix.files import written_whole

STYLE = """:root{color-scheme:light dark}body{font:15px system-ui;margin:2rem auto;max-width:72rem;padding:0 1rem}
img{max-width:100%;background:#fff}table{border-collapse:collapse;font-size:13px}td,th{padding:.2rem .6rem;text-align:right}
div{overflow-x:auto}"""


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page of such parts as the functions below make."""
    title = html.escape(title)
    with written_whole(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>\n')
        file.write(f"<style>{STYLE}</style><h1>{title}</h1>\n")
        file.writelines(f"{part}\n" for part in parts)
        file.write("</html>\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls by itself where it is wide."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div><table><tr>{head}</tr>{body}</table></div>"


def image(path: Path, about: str) -> str:
    """A PNG file, held in the page."""
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{content}" alt="{html.escape(about)}">'


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def listing(text: str) -> str:
    """Text as it is."""
    return f"<pre>{html.escape(text)}</pre>"
