"""Helpers for all pictures: figures, axes, and images in a grid."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of a size in inches."""
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width, height), layout="constrained")


def write(figure: "Figure", path: str | Path | None) -> "Figure":
    """Writes a figure if a path is given; returns the figure."""
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def principal_plane(z: Tensor) -> tuple[Tensor, list[float]]:
    """Returns the two leading principal components of vectors, and their shares of the variance; 0 for one that is not.

    Args:
        z: the vectors, ``(n, dim)``.
    """
    center = z - z.mean(0)
    _, sizes, axes = torch.linalg.svd(center, full_matrices=False)
    shares = (sizes.square() / sizes.square().sum().clamp_min(1e-300)).tolist()
    plane = center @ axes[:2].T
    return torch.nn.functional.pad(plane, (0, 2 - plane.shape[1])), [*shares, 0.0][:2]


def shortened(name: str, width: int) -> str:
    """Returns a name, or its end after dots if it is longer than a number of characters.

    >>> shortened("runs/of/last/week", 12)
    '...last/week'
    """
    return name if len(name) <= width else f"...{name[3 - width :]}"


def integer_ticks(axis: "Axis") -> None:
    """Puts the ticks of an axis at integers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def add_legend_of_labels(ax: "Axes", dots: "PathCollection") -> None:
    """Adds a legend with an entry for each label, to the right of dots that are coloured by label."""
    handles, labels = dots.legend_elements(num=None)  # type: ignore[arg-type]  # None: an entry for each value
    ax.legend(handles, labels, title="label", loc="center left", bbox_to_anchor=(1, 0.5))


def are_images(x: Tensor) -> bool:
    """Whether data have the shape of grey or colour images, ``(n, 1 or 3, height, width)``."""
    return x.dim() == 4 and x.shape[1] in (1, 3)


def grid_of(x: Tensor, columns: int) -> Tensor:
    """Returns images in rows, clamped to 0 to 1, one white pixel between them, as ``(height, width, channels)``."""
    x = x.detach().cpu().float().clamp(0, 1)
    n, channels, height, width = x.shape
    rows = math.ceil(n / columns)
    grid = torch.ones(channels, rows * (height + 1) + 1, columns * (width + 1) + 1)
    for i in range(n):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        grid[:, top : top + height, left : left + width] = x[i]
    return grid.permute(1, 2, 0)


def show(ax: "Axes", grid: Tensor, **kwargs: Any) -> None:
    """Draws a grid of images on axes."""
    ax.imshow(grid.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest", **kwargs)


def draw_rows_of_images(panels: list[Tensor], labels: list[str], bars: list[int], title: str) -> "Figure":
    """Draws panels of rows of images.

    Args:
        panels: images, each of shape ``(rows, columns, channels, height, width)``.
        labels: one per row.
        bars: the columns after which a vertical line is drawn.
        title: above all.
    """
    count, columns, height, width = panels[0].shape[0], panels[0].shape[1], *panels[0].shape[-2:]
    across = min(14, max(6, 0.45 * columns * len(panels) + 1))
    down = (across - 1) / len(panels) * count * (height + 1) / (columns * (width + 1))
    figure = new_figure(across, down + 0.8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, rows in zip(axes, panels, strict=True):
        picture = grid_of(rows.flatten(0, 1), columns)
        # Grey lines: black and white ones would not be seen at the border of a binary image.
        picture[:: height + 1] = picture[:, :: width + 1] = 0.6
        show(ax, picture)
        for bar in bars:
            ax.axvline((bar + 1) * (width + 1), color="C3", linewidth=2)
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
    axes[0].set_yticks([(i + 0.5) * (height + 1) for i in range(count)], labels)
    axes[0].tick_params(length=0)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_grid_of_curves(rows: list[list[Tensor]], data: list[list[Tensor]], labels: list[str], title: str) -> "Figure":
    """Draws a grid of panels of curves, coloured from first to last, with data as dots.

    Args:
        rows: the curves of each panel, ``(steps, *x_shape)``.
        data: the data of each panel, ``(*x_shape)`` or ``(2, *x_shape)``.
        labels: one per row.
        title: above all.
    """
    import matplotlib

    figure = new_figure(min(14, 1 + 5 * len(rows[0])), 0.8 + 1.5 * len(rows))
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
        integer_ticks(ax.xaxis)
    figure.suptitle(title, fontsize=10)
    return figure
