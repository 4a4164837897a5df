"""Makes a page of each script in examples/: its docstring, what it printed, its pictures, and its code.

The scripts run when the site is built, as a reader would run them. A page is kept until the script, its arguments or
the library's code change.
"""

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sphinx.errors import ExtensionError
from sphinx.util import logging

ROOT = Path(__file__).parents[2]
logger = logging.getLogger(__name__)

PAGE = """\
<!-- {key} -->
# {title}

{docstring}

## Output

{how} It took {seconds:.0f} seconds.

```text
{output}
```

{pictures}

## Code

```{{literalinclude}} ../../examples/{name}.py
:language: python
:lines: {first}-
```
"""

INDEX = """\
# Gallery

The scripts in `examples/`, each with what it prints and draws. They ran when these pages were built.

{items}

```{{toctree}}
:hidden:

{names}
```
"""


def fingerprint(script: Path, arguments: list[str]) -> str:
    """Returns a hash of all that a script's output depends on here: the script, its arguments, the library."""
    hashed = hashlib.sha256(" ".join(arguments).encode())
    for path in (script, Path(__file__), *sorted((ROOT / "pyrovae").rglob("*.py"))):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def title_of(docstring: str) -> str:
    """Returns the first line of a script's docstring as far as its colon."""
    return docstring.splitlines()[0].partition(":")[0].rstrip(".")


def run(script: Path, arguments: list[str], page: Path) -> None:
    """Runs a script in an empty directory and writes its page, with its pictures beside it."""
    key = fingerprint(script, arguments)
    if page.exists() and page.read_text().startswith(f"<!-- {key} -->"):
        return
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(script), *arguments]
        ended = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise ExtensionError(f"examples/{script.name} failed:\n{ended.stderr}")
        pictures = sorted(Path(directory).glob("*.png"))
        for picture in pictures:
            shutil.copy(picture, page.parent)
    docstring = ast.get_docstring(tree := ast.parse(script.read_text()))
    if arguments:
        how = f"From `python examples/{script.name} {' '.join(arguments)}`: the shortest run, far from trained."
    else:
        how = f"From `python examples/{script.name}`, in full."
    page.write_text(
        PAGE.format(
            key=key,
            name=script.stem,
            title=title_of(docstring),
            docstring=docstring,
            how=how,
            seconds=time.perf_counter() - started,
            output=ended.stdout.strip(),
            pictures="\n".join(f"![{picture.stem}]({picture.name})" for picture in pictures),
            first=tree.body[0].end_lineno + 2,
        )
    )


def make(app) -> None:
    """Writes the pages of all examples and their index."""
    scripts = sorted((ROOT / "examples").glob("*.py"))
    gallery = Path(app.srcdir) / "gallery"
    gallery.mkdir(exist_ok=True)
    names = {script.stem for script in scripts}
    for page in gallery.glob("*.md"):
        if page.stem not in names:
            page.unlink()
    with ThreadPoolExecutor(2) as pool:
        smoke = app.config.gallery_smoke
        jobs = [
            pool.submit(run, script, ["--smoke"] if script.stem in smoke else [], gallery / f"{script.stem}.md")
            for script in scripts
        ]
        for job in jobs:
            job.result()
    items = [
        f"- [{script.stem}]({script.stem}.md): {script.read_text().split(chr(10), 1)[0].strip(chr(34))}"
        for script in scripts
    ]
    (gallery / "index.md").write_text(INDEX.format(items="\n".join(items), names="\n".join(sorted(names))))


def setup(app):
    app.add_config_value("gallery_smoke", [], "env")
    app.connect("builder-inited", make)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
