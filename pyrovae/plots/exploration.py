"""Pictures of the latent space."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyrovae.diagnostics.base import names_of
from pyrovae.plots.pictures import are_images, grid_of, write

_PANELS = 3  # data from which traversals are drawn, at most


def traversals(found: Any, path: str | Path | None = None) -> Figure:
    """Draws what each dimension does to the first data, a row a dimension: the datum, and what is decoded.

    Args:
        found: what :func:`pyrovae.diagnostics.traversals` returned.
        path: where to write the picture.
    """
    count = min(len(found.data), _PANELS)
    order = found.change.argsort(descending=True).tolist()
    labels = [f"{found.names[i]}\n±{found.change[i].item():.2g}" for i in order]
    title = "from the lowest to the highest value of a dimension (±: root mean square change)"
    if not are_images(found.data):
        rows = [[found.decoded[n, i] for n in range(count)] for i in order]
        data = [[found.data[n]] * len(order) for n in range(count)]
        return _curves(rows, [list(row) for row in zip(*data, strict=True)], labels, title, path)
    panels = [
        torch.cat([found.data[n].expand(len(order), 1, *found.data.shape[1:]), found.decoded[n, order]], dim=1)
        for n in range(count)
    ]
    return _rows_of_images(panels, labels, [0], title, path)


def interpolations(found: Any, path: str | Path | None = None) -> Figure:
    """Draws what lies between data, a row a pair: the data at both ends, and what is decoded in between.

    Args:
        found: what :func:`pyrovae.diagnostics.interpolations` returned.
        path: where to write the picture.
    """
    labels = [f"{a} to {b}" for a, b in found.pairs]
    title = f"data at both ends, and decoded along {'arcs' if found.spherical else 'lines'} between their latents"
    if not are_images(found.ends[:, 0]):
        return _curves([[decoded] for decoded in found.decoded], [[ends] for ends in found.ends], labels, title, path)
    rows = torch.cat([found.ends[:, :1], found.decoded, found.ends[:, 1:]], dim=1)
    return _rows_of_images([rows], labels, [0, rows.shape[1] - 2], title, path)


def latent_map(found: Any, path: str | Path | None = None) -> Figure:
    """Draws the latents of the data in a plane, and beside it the decoded plane where there is one of images.

    Args:
        found: what :func:`pyrovae.diagnostics.latent_map` returned.
        path: where to write the picture.
    """
    decoded = found.decoded is not None and are_images(found.decoded.flatten(0, 1))
    figure = Figure(figsize=(11 if decoded else 6, 5), layout="constrained")
    axes = figure.subplots(1, 2 if decoded else 1, squeeze=False)[0]
    ax, z = axes[0], found.coordinates.cpu().numpy()
    labels = None if found.labels is None else found.labels.cpu().numpy()
    dots = ax.scatter(z[:, 0], z[:, 1], c=labels, s=8, cmap=None if labels is None else "tab10", linewidths=0)
    if labels is not None:
        ax.legend(*dots.legend_elements(num=None), title="label", loc="center left", bbox_to_anchor=(1, 0.5))
    if found.latents.shape[1] <= 2:
        names = [*names_of(found.columns), ""][:2]
    else:
        names = [
            f"{which} principal component ({share:.0%})"
            for which, share in zip(("first", "second"), found.explained, strict=True)
        ]
    ax.set(xlabel=names[0], ylabel=names[1], aspect="equal", title="means of q(z | x)")
    if decoded:
        grid = grid_of(found.decoded.flatten(0, 1), found.decoded.shape[1]).squeeze(-1).numpy()
        half = [(line[1] - line[0]).item() / 2 for line in found.grid]
        (left, right), (bottom, top) = (
            (line[0].item() - h, line[-1].item() + h) for line, h in zip(found.grid, half, strict=True)
        )
        axes[1].imshow(
            grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=(left, right, bottom, top), aspect="auto"
        )
        axes[1].set(xlabel=names[0], ylabel=names[1], title="means of p(x | z) over the plane")
    return write(figure, path)


def _rows_of_images(
    panels: list[Tensor], labels: list[str], bars: list[int], title: str, path: str | Path | None
) -> Figure:
    """Draws panels of rows of images, ``(rows, columns, channels, height, width)``, with a line after some columns."""
    count, columns, height, width = panels[0].shape[0], panels[0].shape[1], *panels[0].shape[-2:]
    across = min(14, max(6, 0.45 * columns * len(panels) + 1))
    down = (across - 1) / len(panels) * count * (height + 1) / (columns * (width + 1))
    figure = Figure(figsize=(across, down + 0.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, rows in zip(axes, panels, strict=True):
        picture = grid_of(rows.flatten(0, 1), columns)
        picture[:: height + 1] = picture[:, :: width + 1] = 0.6  # neither black nor white: binary images end there
        ax.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for bar in bars:
            ax.axvline((bar + 1) * (width + 1), color="C3", linewidth=2)
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
    axes[0].set_yticks([(i + 0.5) * (height + 1) for i in range(count)], labels)
    axes[0].tick_params(length=0)
    figure.suptitle(title, fontsize=10)
    return write(figure, path)


def _curves(
    rows: list[list[Tensor]], data: list[list[Tensor]], labels: list[str], title: str, path: str | Path | None
) -> Figure:
    """Draws a grid of panels of curves, ``(steps, *x_shape)``, coloured from first to last, with data as dots."""
    figure = Figure(figsize=(min(14, 1 + 5 * len(rows[0])), 0.8 + 1.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False, sharex=True, sharey=True)
    for i, row in enumerate(rows):
        for j, decoded in enumerate(row):
            curves = decoded.cpu().flatten(1).numpy()
            x = data[i][j].cpu().reshape(-1, curves.shape[1]).numpy()
            colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
            for curve, colour in zip(curves, colours, strict=True):
                axes[i, j].plot(curve, color=colour, linewidth=0.9, marker="." if len(curve) < 8 else None)
            ends = colours[[0, -1]] if len(x) == 2 else ["black"]
            for points, colour in zip(x, ends, strict=True):
                axes[i, j].plot(points, ".", color=colour, markersize=4)
        axes[i, 0].set_ylabel(labels[i])
    for ax in axes[-1]:
        ax.set_xlabel("element of the data (dots: data)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize=10)
    return write(figure, path)
