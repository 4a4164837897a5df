"""Writes the results of a benchmark into the README.md of this folder, with the machine that they are from."""

import os
import platform
import re
import statistics
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

README = Path(__file__).with_name("README.md")
HEADING = "# Benchmarks\n\nEach section below is written by the script that it names.\n"


def machine(device: str = "cpu", packages: Sequence[str] = ("torch", "pyro-ppl", "pythae")) -> str:
    """Returns one line about the machine (with its GPU if that was measured), the versions and the date."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    processor = models[0] if models else platform.processor()
    return (
        f"{gpu}{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}, "
        f"Python {platform.python_version()}, {versions}, {date.today()}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def quartiles(values: Sequence[float], digits: int) -> str:
    """Returns the median of some values and the quartiles around it; a single value as it is."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, middle, high = (f"{q:.{digits}f}" for q in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{middle} ({low} to {high})"


def put(name: str, text: str, page: str) -> str:
    """Returns a page with a text between its markers ``<!-- name -->`` and ``<!-- /name -->``, or at its end."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in page:
        page = f"{page.rstrip()}\n\n{start}\n{end}\n"
    before, rest = page.split(start, 1)
    after = rest.split(end, 1)[1]
    return f"{before}{start}\n{text.strip()}\n{end}{after}"


def write(name: str, text: str) -> None:
    """Puts a text into the README."""
    README.write_text(put(name, text, README.read_text() if README.exists() else HEADING))
