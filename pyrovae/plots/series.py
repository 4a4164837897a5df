"""Pictures of series and their forecasts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrovae.plots.drawing import new_figure, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["forecasts", "imputations"]

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
            such as those of :meth:`pyrovae.structures.SequenceVAE.forecast`.
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
    _check_shares(shares)
    past = x.detach().cpu().reshape(*x.shape[:2], -1)
    coming = draws.detach().cpu().double().reshape(*draws.shape[:3], -1)
    came = None if actual is None else actual.detach().cpu().reshape(*actual.shape[:2], -1)
    figure, panels = _new_panels(past)
    before, after = torch.arange(past.shape[1]), past.shape[1] + torch.arange(coming.shape[2])
    for ax, i, d in panels:
        fan = coming[:, i, :, d]
        ax.plot(before, past[i, :, d], color="C0", linewidth=1, marker=".", markersize=3)  # seen between gaps too
        _draw_fan(ax, after, fan, shares)
        if came is not None:
            ax.plot(after, came[i, :, d], color="C0", linewidth=1, linestyle=":", label="what came")
    figure.axes[0].legend(loc="best", fontsize="small")
    return write(figure, path)


def imputations(
    x: Tensor,
    mask: Tensor,
    draws: Tensor,
    actual: Tensor | None = None,
    shares: Sequence[float] = (0.5, 0.9),
    path: str | Path | None = None,
) -> "Figure":
    """Draws series with gaps, and the draws of the steps in the gaps as fans, which begin and end at observed steps.

    A panel shows an element of a series; the first 12 are drawn.

    Args:
        x: series, ``(batch, time)`` or ``(batch, time, elements)``.
        mask: their observed steps, ``(batch, time)``.
        draws: of all steps, ``(num_draws, batch, time)`` or ``(num_draws, batch, time, elements)``, such as those of
            :meth:`pyrovae.structures.StateSpaceVAE.impute`; only those in the gaps are shown.
        actual: the values in the gaps, shaped like x.
        shares: the shares of the draws that the bands hold, between 0 and 1.
        path: where to write the picture.

    Raises:
        ValueError: when the shapes do not fit each other, or a share is not between 0 and 1.

    >>> mask = torch.arange(30).lt(10) | torch.arange(30).ge(20)
    >>> figure = imputations(torch.randn(2, 30), mask.expand(2, 30), torch.randn(100, 2, 30))
    >>> len(figure.axes)
    2
    """
    if x.dim() not in (2, 3) or mask.shape != x.shape[:2] or draws.shape[1:] != x.shape:
        raise ValueError(
            f"x, mask and draws must have shapes (batch, time, ...), (batch, time) and (num_draws, batch, time, ...), "
            f"got {tuple(x.shape)}, {tuple(mask.shape)} and {tuple(draws.shape)}."
        )
    if actual is not None and actual.shape != x.shape:
        raise ValueError(f"actual must have the shape of x, {tuple(x.shape)}, got {tuple(actual.shape)}.")
    _check_shares(shares)
    seen = mask.detach().cpu().bool().unsqueeze(-1)
    values = x.detach().cpu().double().reshape(*x.shape[:2], -1)
    fans = torch.where(seen, values, draws.detach().cpu().double().reshape(*draws.shape[:3], -1))
    came = None if actual is None else actual.detach().cpu().double().reshape(*actual.shape[:2], -1)
    figure, panels = _new_panels(values)
    time = torch.arange(values.shape[1])
    for ax, i, d in panels:
        hidden = ~seen[i, :, 0]
        ax.plot(time, torch.where(hidden, torch.nan, values[i, :, d]), color="C0", linewidth=1, marker=".")
        beside = hidden.clone()  # a gap and the observed steps at its ends
        beside[1:] |= hidden[:-1]
        beside[:-1] |= hidden[1:]
        _draw_fan(ax, time, torch.where(beside, fans[:, i, :, d], torch.nan), shares)
        if came is not None:
            shown = torch.where(beside, torch.where(hidden, came[i, :, d], values[i, :, d]), torch.nan)
            ax.plot(time, shown, color="C0", linewidth=1, linestyle=":", label="what was hidden")
    figure.axes[0].legend(loc="best", fontsize="small")
    return write(figure, path)


def sequences(
    x: Tensor,
    reconstructed: Tensor | None = None,
    names: Sequence[str] = (),
    title: str = "",
    path: str | Path | None = None,
) -> "Figure":
    """Draws sequences of few elements as curves over their steps, beside their reconstructions if there are any.

    A panel shows an element of a sequence; the first 12 are drawn. NaN leaves a gap.

    Args:
        x: sequences, ``(batch, time)`` or ``(batch, time, elements)``.
        reconstructed: of the same shape.
        names: of the elements; their numbers by default.
        title: of the picture.
        path: where to write the picture.

    Raises:
        ValueError: when the shapes do not fit each other.

    >>> figure = sequences(torch.randn(2, 30, 3), names=["a", "b", "c"])
    >>> len(figure.axes)
    6
    """
    if x.dim() not in (2, 3) or reconstructed is not None and reconstructed.shape != x.shape:
        other = None if reconstructed is None else tuple(reconstructed.shape)
        raise ValueError(
            f"x and reconstructed must have the same shape (batch, time, ...), got {tuple(x.shape)} and {other}."
        )
    values = x.detach().cpu().reshape(*x.shape[:2], -1)
    again = None if reconstructed is None else reconstructed.detach().cpu().reshape(values.shape)
    figure, panels = _new_panels(values, names)
    for ax, i, d in panels:
        ax.plot(values[i, :, d], color="C0", linewidth=1, marker=".", markersize=3, label="data")
        if again is not None:
            ax.plot(again[i, :, d], color="C1", linewidth=1, label="reconstruction")
    if again is not None:
        figure.axes[0].legend(loc="best", fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return write(figure, path)


def _check_shares(shares: Sequence[float]) -> None:
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares must be between 0 and 1, got {list(shares)}.")


def _draw_fan(ax: "Axes", time: Tensor, draws: Tensor, shares: Sequence[float]) -> None:
    """Draws the median and bands of draws, ``(num_draws, steps)``; nothing where they are NaN."""
    for share in sorted(shares, reverse=True):
        low, high = draws.quantile((1 - share) / 2, dim=0), draws.quantile((1 + share) / 2, dim=0)
        ax.fill_between(time, low, high, color="C1", alpha=0.25, linewidth=0, label=f"{share:.0%} of the draws")
    ax.plot(time, draws.median(0).values, color="C1", linewidth=1, label="median")


def _new_panels(values: Tensor, names: Sequence[str] = ()) -> "tuple[Figure, list[tuple[Axes, int, int]]]":
    """Returns a figure with a panel for each element of series ``(batch, time, elements)``, with their indices."""
    names = names or [str(d + 1) for d in range(values.shape[2])]
    shown = [(i, d) for i in range(values.shape[0]) for d in range(values.shape[2])][:_MOST_PANELS]
    figure = new_figure(8, 1.8 * len(shown) + 0.4)
    axes = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (i, d) in zip(axes, shown, strict=True):
        ax.set_ylabel(f"series {i + 1}" + (f", {names[d]}" if values.shape[2] > 1 else ""))
    axes[-1].set_xlabel("step")
    return figure, [(ax, i, d) for ax, (i, d) in zip(axes, shown, strict=True)]
