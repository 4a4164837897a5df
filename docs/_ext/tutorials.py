"""Runs the notebooks in docs/tutorials/, and makes a page of each: its text, its code, what it printed and showed.

The notebooks are kept without output. They run here as in Jupyter, cell by cell in one namespace, without a kernel: a
cell shows what it printed, and its last expression.
"""

import ast
import base64
import contextlib
import html
import io
import json
import os
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

FOLDER = Path(__file__).parents[1] / "tutorials"


def cells(notebook: Path) -> list[tuple[str, str]]:
    """Returns the kind, "markdown" or "code", and the source of each cell."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook.read_text())["cells"]]


def run(notebook: Path) -> list[tuple[str, str, str]]:
    """Runs a notebook; returns each cell's kind, source and output in HTML."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    return [
        (kind, source, _output(source, notebook.name, namespace) if kind == "code" else "")
        for kind, source in cells(notebook)
    ]


def _output(source: str, name: str, namespace: dict[str, Any]) -> str:
    """Runs a cell; returns what it printed and the value of its last expression, in HTML."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):  # where bars are drawn
        exec(compile(tree, name, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    text = printed.getvalue()
    shown = f"<pre>{html.escape(text)}</pre>" if text else ""
    if isinstance(value, Figure):
        picture = io.BytesIO()
        value.savefig(picture, format="png", dpi=100)
        return (
            f'{shown}<img alt="picture" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"/>'
        )
    if value is None or source.rstrip().endswith(";"):
        return shown
    as_html = getattr(value, "_repr_html_", None)
    return shown + (as_html() if as_html is not None else f"<pre>{html.escape(repr(value))}</pre>")


def page(notebook: Path) -> str:
    """Returns a page in Markdown."""
    began = time.perf_counter()
    parts = []
    for kind, source, output in run(notebook):
        parts.append(source if kind == "markdown" else f"```python\n{source}\n```")
        if output:
            parts.append(f'```{{raw}} html\n<div class="shown">{output}</div>\n```')
    seconds = time.perf_counter() - began
    where = f"This page is the notebook `docs/tutorials/{notebook.name}`, which ran in {seconds:.0f} seconds."
    return "\n\n".join([*parts, where]) + "\n"


def make(app: Any) -> None:
    """Writes the pages."""
    os.environ.setdefault("MPLBACKEND", "agg")
    for notebook in sorted(FOLDER.glob("*.ipynb")):
        notebook.with_suffix(".md").write_text(page(notebook))


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", make)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
