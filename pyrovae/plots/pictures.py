"""Pictures of samples, reconstructions and latents."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyrovae.plots.drawing import (
    add_legend_of_labels,
    are_images,
    draw_rows_of_images,
    grid_of,
    new_figure,
    principal_plane,
    show,
    write,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["latent_space", "reconstructions", "repairs", "samples"]


def samples(x: Tensor, path: str | Path | None = None, title: str = "") -> "Figure":
    """Draws samples: images in a grid, other data as one curve per sample.

    Args:
        x: shape ``(n, channels, height, width)`` with values from 0 to 1, or ``(n, *x_shape)``.
        path: where to write the picture.
        title: above the picture.

    >>> samples(torch.rand(9, 1, 8, 8)).axes[0].get_images()[0].get_array().shape
    (28, 28)
    """
    if not are_images(x):
        return _curves([(x, "sample")], path, title)
    return _picture(grid_of(x, math.ceil(math.sqrt(len(x)))), path, title)


def reconstructions(
    x: Tensor, reconstructed: Tensor, path: str | Path | None = None, title: str = "data above, reconstructions below"
) -> "Figure":
    """Draws data above their reconstructions, or as curves if they are not images.

    Args:
        x: data, shape ``(n, *x_shape)``.
        reconstructed: their reconstructions, of the same shape.
        path: where to write the picture.
        title: above the picture.

    >>> reconstructions(torch.rand(5, 1, 8, 8), torch.rand(5, 1, 8, 8)).axes[0].get_images()[0].get_array().shape
    (19, 46)
    """
    if not are_images(x):
        return _curves([(x, "data"), (reconstructed, "reconstruction")], path, title)
    return _picture(grid_of(torch.cat([x, reconstructed]), len(x)), path, title)


def repairs(
    x: Tensor, mask: Tensor, mean: Tensor, draws: Tensor, path: str | Path | None = None, title: str = ""
) -> "Figure":
    """Draws images, what is seen of them, several draws of the whole, and their mean: a column for each image.

    Args:
        x: images, shape ``(n, channels, height, width)`` with values from 0 to 1.
        mask: True where they are seen, of the same shape.
        mean: the mean of the draws, of the same shape.
        draws: shape ``(num_draws, n, channels, height, width)``.
        path: where to write the picture.
        title: above the picture.

    >>> x, mask = torch.rand(5, 1, 8, 8), torch.arange(8) < 4
    >>> len(repairs(x, mask.expand(x.shape), x, x.expand(3, -1, -1, -1, -1)).axes[0].get_yticklabels())
    6
    """
    seen = torch.where(mask, x, 0.5)
    rows = torch.stack([x, seen, *draws, mean])
    labels = ["original", "seen", *["draw"] * len(draws), "mean"]
    return write(draw_rows_of_images([rows], labels, [], title), path)


def latent_space(
    z: Tensor, labels: Tensor | None = None, path: str | Path | None = None, title: str = "a latent for each datum"
) -> "Figure":
    """Draws latents in the plane of their two leading principal components, with circles of radius 1 and 2.

    Args:
        z: one latent per datum, shape ``(n, latent_dim)``.
        labels: classes to colour by, shape ``(n,)``.
        path: where to write the picture.
        title: above the picture.

    >>> latent_space(torch.randn(50, 3)).axes[0].get_xlabel()
    'first principal component'
    """
    z = z.detach().cpu().float()
    if z.shape[1] > 2:
        (z, _), names = principal_plane(z), ("first principal component", "second principal component")
    else:
        z, names = torch.cat([z, torch.zeros(len(z), 2 - z.shape[1])], dim=1), ("$z_1$", "$z_2$")
    figure = new_figure(6, 5)
    ax = figure.subplots()
    x, y, colours = z[:, 0].numpy(), z[:, 1].numpy(), None if labels is None else labels.cpu().numpy()
    dots = ax.scatter(x, y, c=colours, s=8, cmap="tab10" if labels is not None else None, linewidths=0)
    if labels is not None:
        add_legend_of_labels(ax, dots)
    angle = np.linspace(0, 2 * math.pi, 200)
    for radius in (1, 2):
        ax.plot(radius * np.cos(angle), radius * np.sin(angle), color="grey", linewidth=0.5, linestyle="--")
    ax.set(xlabel=names[0], ylabel=names[1], aspect="equal", title=f"{title} (circles: radius 1 and 2)")
    return write(figure, path)


def _picture(grid: Tensor, path: str | Path | None, title: str) -> "Figure":
    height, width = grid.shape[:2]
    figure = new_figure(8, 8 * height / width + 0.4)
    ax = figure.subplots()
    show(ax, grid)
    ax.set_axis_off()
    ax.set_title(title)
    return write(figure, path)


def _curves(groups: list[tuple[Tensor, str]], path: str | Path | None, title: str) -> "Figure":
    figure = new_figure(8, 4)
    ax = figure.subplots()
    for i, (x, name) in enumerate(groups):
        lines = ax.plot(x.detach().cpu().flatten(1).T.numpy(), color=f"C{i}", linewidth=0.7, alpha=0.6)
        lines[0].set_label(name)
    ax.set(xlabel="dimension", ylabel="value", title=title)
    ax.legend()
    return write(figure, path)
