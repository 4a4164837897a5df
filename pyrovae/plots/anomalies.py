"""Pictures of what is unusual."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from pyrovae.plots.pictures import are_images, grid_of, write

__all__ = ["anomalies"]

_UNITS = {"likelihood": "-log p(x), nats", "complexity": "bits beyond zlib's", "typicality": "nats from the reference"}
_NUM_SHOWN = 12


def anomalies(found, path: str | Path | None = None) -> Figure:
    """Draws how each score is distributed, how well it tells other data, and the most and least likely data.

    Args:
        found: a :class:`pyrovae.diagnostics.Anomalies`.
        path: where to write the picture.
    """
    images, several = are_images(found.x), found.other is not None
    columns = len(found.scores) + several
    figure = Figure(figsize=(3.6 * columns, 3.4 + 2 * images), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3.4, 2)) if images else (figure, None)
    axes = above.subplots(1, columns, squeeze=False)[0]
    for i, (ax, (name, values)) in enumerate(zip(axes, found.scores.items(), strict=False)):
        sets = [(values, "data")] + ([(found.other.scores[name], "other data")] if several else [])
        finite = [(v[v.isfinite()].cpu(), label) for v, label in sets]
        edges = torch.histogram(torch.cat([v for v, _ in finite]), 40).bin_edges.numpy()
        for v, label in finite:
            ax.hist(v.numpy(), bins=edges, density=True, alpha=0.6, label=label)
        ax.set(xlabel=_UNITS[name], ylabel="density" if i == 0 else "", title=name)
        ax.set_yticks([])
    if several:
        axes[0].legend(fontsize="small")
        roc = axes[-1]
        for name, area in found.auroc.items():
            roc.plot(*_curve(found.scores[name], found.other.scores[name]), label=f"{name}, {area.value:.2f}")
        roc.plot([0, 1], [0, 1], color="grey", linewidth=0.5, linestyle="--")
        roc.set(xlabel="share of data taken for others", ylabel="share of others found", title="ROC, area below")
        roc.set(aspect="equal")
        roc.legend(fontsize="small", loc="lower right")
    if images:
        low, high = found.x.min(), found.x.max()
        order = found.most_unusual(len(found.x))
        rows = [("least likely of the data", order[:_NUM_SHOWN]), ("most likely", order.flip(0)[:_NUM_SHOWN])]
        for ax, (title, chosen) in zip(below.subplots(2, 1), rows, strict=True):
            shown = (found.x[chosen.to(found.x.device)] - low) / (high - low).clamp_min(1e-12)
            ax.imshow(
                grid_of(shown, len(shown)).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
            )
            ax.set_axis_off()
            ax.set_title(title, fontsize="medium")
    return write(figure, path)


def _curve(usual: torch.Tensor, unusual: torch.Tensor) -> tuple:
    """Returns the shares of both sets above each threshold, from none to all."""
    cuts = torch.cat([usual, unusual]).unique().flip(0)
    shares = [(scores.sort().values, len(scores)) for scores in (usual, unusual)]
    points = [1 - torch.searchsorted(ordered, cuts).double() / n for ordered, n in shares]
    return tuple(torch.cat([p.new_zeros(1), p]).cpu().numpy() for p in points)
