"""Pictures of data, latents and training."""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["latent_space", "learning_curve", "reconstructions", "samples"]


def samples(x: Tensor, path: str | Path | None = None, title: str = "") -> Figure:
    """Draws samples: images in a grid, anything else as one curve each.

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


def reconstructions(x: Tensor, reconstructed: Tensor, path: str | Path | None = None) -> Figure:
    """Draws data above their reconstructions, or as curves where they are no images.

    Args:
        x: data, shape ``(n, *x_shape)``.
        reconstructed: their reconstructions, of the same shape.
        path: where to write the picture.

    >>> reconstructions(torch.rand(5, 1, 8, 8), torch.rand(5, 1, 8, 8)).axes[0].get_images()[0].get_array().shape
    (19, 46)
    """
    if not are_images(x):
        return _curves([(x, "data"), (reconstructed, "reconstruction")], path, "")
    return _picture(grid_of(torch.cat([x, reconstructed]), len(x)), path, "data above, reconstructions below")


def latent_space(z: Tensor, labels: Tensor | None = None, path: str | Path | None = None) -> Figure:
    """Draws latents in the plane of their two leading principal components, beside circles of the standard normal.

    Args:
        z: one latent a datum, shape ``(n, latent_dim)``.
        labels: classes to colour by, shape ``(n,)``.
        path: where to write the picture.

    >>> latent_space(torch.randn(50, 3)).axes[0].get_xlabel()
    'first principal component'
    """
    z = z.detach().cpu().float()
    center = z - z.mean(0)
    if z.shape[1] > 2:
        _, _, axes = torch.linalg.svd(center, full_matrices=False)
        z, names = center @ axes[:2].T, ("first principal component", "second principal component")
    else:
        z, names = torch.cat([z, torch.zeros(len(z), 2 - z.shape[1])], dim=1), ("$z_1$", "$z_2$")
    figure = Figure(figsize=(6, 5), layout="constrained")
    ax = figure.subplots()
    x, y, colours = z[:, 0].numpy(), z[:, 1].numpy(), None if labels is None else labels.cpu().numpy()
    dots = ax.scatter(x, y, c=colours, s=8, cmap="tab10" if labels is not None else None, linewidths=0)
    if labels is not None:
        ax.legend(*dots.legend_elements(num=None), title="label", loc="center left", bbox_to_anchor=(1, 0.5))
    angle = np.linspace(0, 2 * math.pi, 200)
    for radius in (1, 2):
        ax.plot(radius * np.cos(angle), radius * np.sin(angle), color="grey", linewidth=0.5, linestyle="--")
    title = "a draw of q(z | x) for each datum (circles: radius 1 and 2)"
    ax.set(xlabel=names[0], ylabel=names[1], aspect="equal", title=title)
    return write(figure, path)


def learning_curve(history, path: str | Path | None = None) -> Figure:
    """Draws the losses of a :class:`pyrovae.History` by epoch.

    Args:
        history: what :func:`pyrovae.fit` returned.
        path: where to write the picture.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    curves = [name for name in ("loss", "validation") if any(name in record for record in history.records)]
    for name in curves:
        ax.plot(history["epoch"], history[name], label={"loss": "training"}.get(name, name))
    if "validation" in curves:
        ax.axvline(history.best_epoch, color="grey", linewidth=0.5, linestyle="--", label="lowest validation loss")
    # The first epochs would squeeze all others into a line: show from where the loss has come most of the way.
    values = torch.tensor([history[name] for name in curves], dtype=torch.float64).flatten()
    if len(history) > 10:
        low, high = values.min().item(), values.quantile(0.95).item()
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    ax.set(xlabel="epoch", ylabel="loss (nats a datum)")
    ax.legend()
    return write(figure, path)


def are_images(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[1] in (1, 3)


def grid_of(x: Tensor, columns: int) -> Tensor:
    """Returns images side by side in rows, a pixel of white between them, as (height, width, channels)."""
    x = x.detach().cpu().float().clamp(0, 1)
    n, channels, height, width = x.shape
    rows = math.ceil(n / columns)
    grid = torch.ones(channels, rows * (height + 1) + 1, columns * (width + 1) + 1)
    for i in range(n):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        grid[:, top : top + height, left : left + width] = x[i]
    return grid.permute(1, 2, 0)


def _picture(grid: Tensor, path: str | Path | None, title: str) -> Figure:
    height, width = grid.shape[:2]
    figure = Figure(figsize=(8, 8 * height / width + 0.4), layout="constrained")
    ax = figure.subplots()
    ax.imshow(grid.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title)
    return write(figure, path)


def _curves(groups: list[tuple[Tensor, str]], path: str | Path | None, title: str) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    ax = figure.subplots()
    for i, (x, name) in enumerate(groups):
        lines = ax.plot(x.detach().cpu().flatten(1).T.numpy(), color=f"C{i}", linewidth=0.7, alpha=0.6)
        lines[0].set_label(name)
    ax.set(xlabel="dimension", ylabel="value", title=title)
    ax.legend()
    return write(figure, path)


def write(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
