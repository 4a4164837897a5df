"""Pictures of two models' values for the same data."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyrovae.plots.drawing import new_figure, shortened, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyrovae.estimators import Comparison

__all__ = ["comparisons"]


def comparisons(pairs: "Sequence[Comparison]", path: str | Path | None = None) -> "Figure":
    """Draws pairs of models, a row each: both values of each datum, and a histogram of the differences.

    Args:
        pairs: results of :func:`pyrovae.estimators.compare`.
        path: where to write the picture.

    Raises:
        ValueError: when there is no pair.
    """
    if not pairs:
        raise ValueError("pairs is empty: give at least one result of estimators.compare.")
    figure = new_figure(10, 4.2 * len(pairs))
    for row, pair in zip(figure.subplots(len(pairs), 2, squeeze=False), pairs, strict=True):
        (left, right), (first, second) = row, (shortened(name, 26) for name in pair.names)
        trusted = pair.trusted.cpu()
        for shown, color, label in ((trusted, "C0", "trusted"), (~trusted, "C1", "not to be trusted in one or both")):
            if bool(shown.any()):
                left.scatter(
                    pair.second.cpu()[shown], pair.first.cpu()[shown], s=8, alpha=0.6, color=color, label=label
                )
        left.axline((pair.second.mean().item(),) * 2, slope=1, color="grey", linewidth=0.5)
        left.set(xlabel=f"{pair.quantity} of {second} (nats)", ylabel=f"{pair.quantity} of {first} (nats)")
        left.set_aspect("equal", adjustable="datalim")
        left.legend()
        right.hist(pair.differences.cpu().numpy(), bins=40, color="C2")
        right.axvline(0.0, color="grey", linewidth=0.5)
        error = 0.0 if pair.data_error != pair.data_error else pair.data_error
        right.axvspan(pair.difference - 2 * error, pair.difference + 2 * error, color="black", alpha=0.2)
        right.axvline(pair.difference, color="black", linewidth=1, label="mean, and two standard errors from data")
        right.set(xlabel=f"{first} less {second} (nats)", ylabel="data")
        right.margins(y=0.2)  # room for the legend
        right.legend()
    return write(figure, path)
