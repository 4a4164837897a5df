"""A page of HTML that needs nothing but itself: no network, no other files; light and dark, wide and narrow."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 360, 64, 40  # of a chart
# Okabe and Ito's colours, which are told apart also without seeing red or green.
_COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#b8a900",
    "#8c6bb1",
    "#7f7f7f",
    "#a65628",
)
_TILE = 48  # pixels of a picture under the pointer

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --faint: #6a737d; --line: #d0d7de; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --faint: #8b949e; --line: #30363d; --card: #161b22; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); } h3 { margin-bottom: .4rem; }
.cards { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); }
.card { padding: .6rem .8rem; border-radius: .5rem; background: var(--card); }
.card b { display: block; font-size: 1.25rem; } .card span, .faint { color: var(--faint); font-size: .9rem; }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .3rem; }
pre { overflow-x: auto; padding: .7rem; border-radius: .5rem; background: var(--card); font-size: .85rem; }
.chart { width: 100%; max-width: 50rem; height: auto; } .chart text { fill: var(--faint); font-size: 12px; }
.chart .axis { stroke: var(--line); fill: none; } .chart polyline { fill: none; stroke-width: 1.8; }
.chart circle:hover { stroke: var(--ink); stroke-width: 2; }
@media (max-width: 30rem) { .chart text { font-size: 19px; } td, th { padding: .2rem .3rem; } }
.key { display: inline-block; margin-right: 1rem; } .key i { display: inline-block; width: .8rem; height: .8rem;
  border-radius: 50%; margin-right: .3rem; vertical-align: -.1rem; }
#tip { position: fixed; display: none; padding: .4rem .6rem; border-radius: .4rem; background: var(--ink);
  color: var(--paper); font-size: .85rem; pointer-events: none; white-space: pre-line; max-width: 20rem; z-index: 1; }
#tip div { width: 48px; height: 48px; image-rendering: pixelated; }
"""

_SCRIPT = """
const tip = document.getElementById("tip");
function show(target, x, y) {
  tip.textContent = target.dataset.tip;
  const chart = target.closest("[data-sheet]");
  if (chart && target.dataset.tile) {
    const picture = document.createElement("div"), columns = +chart.dataset.columns, i = +target.dataset.tile;
    picture.style.backgroundImage = `url(${chart.dataset.sheet})`;
    picture.style.backgroundPosition = `${-48 * (i % columns)}px ${-48 * Math.floor(i / columns)}px`;
    tip.append(picture);
  }
  tip.style.display = "block";
  tip.style.left = Math.max(0, Math.min(x + 12, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.max(0, Math.min(y + 12, innerHeight - tip.offsetHeight - 8)) + "px";
}
for (const event of ["pointermove", "pointerdown"]) addEventListener(event, e => {
  const target = e.target.closest ? e.target.closest("[data-tip]") : null;
  if (target) show(target, e.clientX, e.clientY); else tip.style.display = "none";
});
"""


def page(title: str, sections: Sequence[str]) -> str:
    """Returns a whole page; the browser is not allowed to load anything."""
    rules = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="pyrovae"><meta http-equiv="Content-Security-Policy" content="{rules}">\n'
        f"<style>{_STYLE}</style></head><body>\n<h1>{text(title)}</h1>\n"
        + "\n".join(sections)
        + f'\n<div id="tip"></div><script>{_SCRIPT}</script></body></html>\n'
    )


def text(value: object) -> str:
    """Returns a value as text that HTML does not read."""
    return html.escape(str(value))


def cards(entries: Mapping[str, str]) -> str:
    """Returns boxes of a value, with what it is below."""
    boxes = (
        f'<div class="card"><b>{text(value)}</b><span>{text(name)}</span></div>' for name, value in entries.items()
    )
    return f'<div class="cards">{"".join(boxes)}</div>'


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table, in which numbers are at the right."""
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(names))]

    def line(tag: str, cells: Sequence[object]) -> str:
        classes = [' class="number"' if is_number else "" for is_number in numeric]
        return "".join(f"<{tag}{c}>{text(_cell(cell))}</{tag}>" for c, cell in zip(classes, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{line("th", names)}</tr>{body}</table></div>'


def details(title: str, content: str) -> str:
    """Returns content that is shown when its title is clicked."""
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def picture(path: Path, title: str) -> str:
    """Returns a .png file as a part of the page."""
    return f'<img alt="{text(title)}" src="{_data_url(path.read_bytes())}">'


def line_chart(x: Sequence[float], curves: Mapping[str, Sequence[float]], x_name: str, y_name: str) -> str:
    """Returns curves over common values of x, which say their numbers under the pointer.

    Args:
        x: at least one value, in order.
        curves: by name, as many values as `x` has; those that are not finite are left out.
        x_name: of the horizontal axis.
        y_name: of the vertical axis.
    """
    drawn = {
        name: [(a, b) for a, b in zip(x, ys, strict=True) if b is not None and math.isfinite(b)]
        for name, ys in curves.items()
    }
    values = np.array([b for points in drawn.values() for _, b in points])
    if not len(values):
        return '<p class="faint">no finite numbers</p>'
    # The first epochs would flatten the rest.
    highest = float(np.quantile(values, 0.95)) if len(x) > 10 else float(values.max())
    at = _Scale((min(x), max(x)), (float(values.min()), highest))
    lines, dots = [], []
    for colour, (name, points) in zip(_cycled(len(drawn)), drawn.items(), strict=True):
        path = " ".join(f"{at.x(a):.1f},{at.y(b):.1f}" for a, b in points)
        lines.append(f'<polyline points="{path}" stroke="{colour}"/>')
        for a, b in points[:: max(1, len(points) // 200)]:
            tip = text(f"{name}\n{x_name} {a:g}: {b:.4f}")
            dots.append(f'<circle cx="{at.x(a):.1f}" cy="{at.y(b):.1f}" r="5" fill-opacity="0" data-tip="{tip}"/>')
    left, top, width, height = _LEFT, 10, _WIDTH - _LEFT - 10, _HEIGHT - _BOTTOM - 10
    inside = f'x="{left}" y="{top}" width="{width}" height="{height}" viewBox="{left} {top} {width} {height}"'
    marks = [f"<svg {inside}>", *lines, *dots, "</svg>"]  # which shows nothing of what is outside of it
    return _chart(at, "".join(marks), x_name, y_name, "", is_counted=True) + _key(list(drawn))


def scatter(
    z: Tensor, labels: Sequence[str] | None, tips: Sequence[str], tiles: Tensor | None, names: Sequence[str]
) -> str:
    """Returns points in the plane, each with a text, and with a picture if there are any, under the pointer.

    Args:
        z: shape ``(n, 2)``.
        labels: classes to colour by; None for one colour.
        tips: a text for each point.
        tiles: a picture for each point, shape ``(n, 1 or 3, height, width)``, from 0 to 1.
        names: of both axes.
    """
    classes = sorted(set(labels)) if labels is not None else []
    colours = dict(zip(classes, _cycled(len(classes)), strict=True))
    low, high = z.min(0).values.tolist(), z.max(0).values.tolist()
    at = _Scale((low[0], high[0]), (low[1], high[1]))
    marks = []
    for i, (a, b) in enumerate(z.tolist()):
        colour = _COLOURS[0] if labels is None else colours[labels[i]]
        tile = "" if tiles is None else f' data-tile="{i}"'
        marks.append(
            f'<circle cx="{at.x(a):.1f}" cy="{at.y(b):.1f}" r="4" fill="{colour}" fill-opacity=".75" '
            f'data-tip="{text(tips[i])}"{tile}/>'
        )
    sheet = ""
    if tiles is not None:
        columns = math.ceil(math.sqrt(len(tiles)))
        sheet = f' data-columns="{columns}" data-sheet="{_data_url(_sheet(tiles, columns))}"'
    return _chart(at, "".join(marks), names[0], names[1], sheet) + _key(classes)


class _Scale:
    """From numbers to the places of a chart.

    Args:
        x: smallest and largest value of x.
        y: those of y.
    """

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self.x_range, self.y_range = (_wider(*r) for r in (x, y))

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - 10)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return 10 + (high - value) / (high - low) * (_HEIGHT - _BOTTOM - 10)


def _wider(low: float, high: float) -> tuple[float, float]:
    margin = 0.04 * (high - low) or max(abs(low), 1.0) * 0.1
    return low - margin, high + margin


def _chart(at: _Scale, marks: str, x_name: str, y_name: str, attributes: str, is_counted: bool = False) -> str:
    right, bottom = _WIDTH - 10, _HEIGHT - _BOTTOM
    lines = [f'<path class="axis" d="M{_LEFT} 10V{bottom}H{right}"/>']
    for tick in _ticks(*at.x_range, least=1.0 if is_counted else 0.0):
        lines.append(f'<text x="{at.x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in _ticks(*at.y_range):
        lines.append(f'<path class="axis" d="M{_LEFT} {at.y(tick):.1f}H{right}" stroke-dasharray="2 4"/>')
        lines.append(f'<text x="{_LEFT - 6}" y="{at.y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle = (10 + bottom) / 2
    lines.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{text(x_name)}</text>')
    lines.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{text(y_name)}</text>'
    )
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"{attributes}>{"".join(lines)}{marks}</svg>'


def _ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Returns some four to eight round numbers in a range; fewer where they would be closer than the least distance."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next((factor for factor in (5, 2) if (high - low) / (step * factor) >= 4), 1)
    step = max(step, least)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _key(names: Sequence[str]) -> str:
    entries = zip(_cycled(len(names)), names, strict=True)
    marks = (f'<span class="key"><i style="background:{colour}"></i>{text(name)}</span>' for colour, name in entries)
    return f"<div>{''.join(marks)}</div>"


def _cycled(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _sheet(tiles: Tensor, columns: int) -> bytes:
    """Returns pictures side by side, as a .png file."""
    from PIL import Image

    small = torch.nn.functional.interpolate(tiles.float().clamp(0, 1), (_TILE, _TILE), mode="nearest")
    rows = math.ceil(len(small) / columns)
    sheet = torch.zeros(rows * columns, *small.shape[1:])
    sheet[: len(small)] = small
    sheet = sheet.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).reshape(rows * _TILE, columns * _TILE, -1)
    file = BytesIO()
    Image.fromarray((sheet * 255).round().byte().squeeze(-1).numpy()).save(file, "png", optimize=True)
    return file.getvalue()


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _cell(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
