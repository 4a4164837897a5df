"""Pictures of series and their forecasts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrovae.plots.drawing import new_figure, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["forecasts"]

_MOST_PANELS = 12


def forecasts(
    x: Tensor,
    draws: Tensor,
    actual: Tensor | None = None,
    shares: Sequence[float] = (0.5, 0.9),
    path: str | Path | None = None,
) -> "Figure":
    """Draws series, and the draws of what comes next as a fan: the median, and bands that hold a share of the draws.

    A panel shows an element of a series; the first 12 are drawn.

    Args:
        x: series, ``(batch, time)`` or ``(batch, time, elements)``.
        draws: of the steps after them, ``(num_samples, batch, steps)`` or ``(num_samples, batch, steps, elements)``,
            such as those of :meth:`pyrovae.structures.StateSpaceVAE.forecast`.
        actual: what came, ``(batch, steps)`` or ``(batch, steps, elements)``.
        shares: the shares of the draws that the bands hold, between 0 and 1.
        path: where to write the picture.

    Raises:
        ValueError: when the shapes do not fit each other, or a share is not between 0 and 1.

    >>> figure = forecasts(torch.randn(2, 30), torch.randn(100, 2, 10))
    >>> len(figure.axes)
    2
    """
    if draws.dim() != x.dim() + 1 or draws.shape[1:2] + draws.shape[3:] != x.shape[:1] + x.shape[2:] or x.dim() > 3:
        raise ValueError(
            f"x and draws must have shapes (batch, time, ...) and (num_samples, batch, steps, ...), got "
            f"{tuple(x.shape)} and {tuple(draws.shape)}."
        )
    if actual is not None and actual.shape != draws.shape[1:]:
        raise ValueError(f"actual must have the shape of a draw, {tuple(draws.shape[1:])}, got {tuple(actual.shape)}.")
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares must be between 0 and 1, got {list(shares)}.")
    past = x.detach().cpu().reshape(*x.shape[:2], -1)
    coming = draws.detach().cpu().double().reshape(*draws.shape[:3], -1)
    came = None if actual is None else actual.detach().cpu().reshape(*actual.shape[:2], -1)
    panels = [(i, d) for i in range(past.shape[0]) for d in range(past.shape[2])][:_MOST_PANELS]
    figure = new_figure(8, 1.8 * len(panels) + 0.4)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    before, after = torch.arange(past.shape[1]), past.shape[1] + torch.arange(coming.shape[2])
    for ax, (i, d) in zip(axes, panels, strict=True):
        fan = coming[:, i, :, d]
        ax.plot(before, past[i, :, d], color="C0", linewidth=1)
        for share in sorted(shares, reverse=True):
            low, high = fan.quantile((1 - share) / 2, dim=0), fan.quantile((1 + share) / 2, dim=0)
            ax.fill_between(after, low, high, color="C1", alpha=0.25, linewidth=0, label=f"{share:.0%} of the draws")
        ax.plot(after, fan.median(0).values, color="C1", linewidth=1, label="median")
        if came is not None:
            ax.plot(after, came[i, :, d], color="C0", linewidth=1, linestyle=":", label="what came")
        ax.set_ylabel(f"series {i + 1}" + (f", {d + 1}" if past.shape[2] > 1 else ""))
    axes[0].legend(loc="upper left", fontsize="small")
    axes[-1].set_xlabel("step")
    return write(figure, path)
