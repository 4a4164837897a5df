"""How results show themselves in notebooks: tables, text and pictures as HTML."""

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from typing import Any


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of cells that are text.

    >>> table(["epoch"], [["1"]])
    '<table><tr><th>epoch</th></tr><tr><td>1</td></tr></table>'
    """
    lines = [_line("th", names), *(_line("td", row) for row in rows)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def preformatted(text: str) -> str:
    """Returns text whose lines stay as they are."""
    return f"<pre>{html.escape(text)}</pre>"


def picture(figure: Any) -> str:
    """Returns a matplotlib figure as a picture."""
    file = BytesIO()
    figure.savefig(file, dpi=80, format="png")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" style="max-width: 100%; background: white">'


def _line(tag: str, cells: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
