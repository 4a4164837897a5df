"""Pictures of training: losses, and the use of the latents, by epoch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyrovae.plots.drawing import integer_ticks, new_figure, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyrovae.training import History

__all__ = ["collapse_history", "learning_curve"]


def learning_curve(history: "History", path: str | Path | None = None) -> "Figure":
    """Draws the losses of a :class:`pyrovae.History` by epoch.

    Args:
        history: what :func:`pyrovae.fit` returned.
        path: where to write the picture.
    """
    figure = new_figure(6, 4)
    ax = figure.subplots()
    curves = [name for name in ("loss", "validation") if any(name in record for record in history.records)]
    for name in curves:
        ax.plot(history["epoch"], history[name], label={"loss": "training"}.get(name, name))
    if history.best_epoch is not None:
        ax.axvline(history.best_epoch, color="grey", linewidth=0.5, linestyle="--", label="lowest validation loss")
    # The large losses of the first epochs would flatten the rest: leave out the largest twentieth.
    values = torch.tensor([history[name] for name in curves], dtype=torch.float64).flatten()
    if len(history) > 10:
        low, high = values.min().item(), values.quantile(0.95).item()
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    ax.set(xlabel="epoch", ylabel="loss (nats a datum)")
    ax.legend()
    return write(figure, path)


def collapse_history(records: list[dict[str, Any]], path: str | Path | None = None) -> "Figure":
    """Draws the records of a :class:`pyrovae.diagnostics.CollapseMonitor` by epoch.

    Args:
        records: one dict per record, with "epoch", "kl", "active_units" and "mutual_information".
        path: where to write the picture.

    Raises:
        ValueError: when there are no records.
    """
    if not records:
        raise ValueError("records is empty: the monitor has seen no epoch. Train first, or set a smaller every.")
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    epoch = [record["epoch"] for record in records]
    marker = "o" if len(records) < 30 else None
    for name, label in (("kl", "KL divergence"), ("mutual_information", "I(x; z), at most log N")):
        left.plot(epoch, [record[name] for record in records], marker=marker, markersize=3, label=label)
    left.set(xlabel="epoch", ylabel="nats a datum", ylim=(0, None))
    left.legend()
    right.plot(epoch, [record["active_units"] for record in records], marker=marker, markersize=3, color="C2")
    right.set(xlabel="epoch", ylabel="active dimensions")
    right.set_ylim(0, max(record["active_units"] for record in records) + 1)
    for ax in (left, right):
        integer_ticks(ax.xaxis)
    integer_ticks(right.yaxis)
    return write(figure, path)
