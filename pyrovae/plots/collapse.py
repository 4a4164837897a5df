"""Pictures of how much the latents are used."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyrovae.diagnostics.base import names_of
from pyrovae.plots.pictures import write

_NAMED = 24  # dimensions whose names there is room for


def collapse(found: Any, path: str | Path | None = None) -> Figure:
    """Draws the KL divergence of each dimension, and aggregate posterior and prior where the means vary most.

    Without divergences by dimension, the variances of the posterior means take their place.

    Args:
        found: what :func:`pyrovae.diagnostics.collapse` returned.
        path: where to write the picture.
    """
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = names_of(found.columns)
    kl, variance, active = (t.cpu().numpy() for t in (found.kl_by_dimension, found.variance, found.active))
    by_kl = bool(np.isfinite(kl).all())
    height = kl if by_kl else np.clip(variance, 1e-6, None)
    order = np.argsort(-height, kind="stable")
    place = np.arange(len(order))
    for which, colour, label in ((active, "C0", "active"), (~active, "C7", "inactive")):
        chosen = which[order]
        if chosen.any():
            left.bar(place[chosen], height[order][chosen], color=colour, label=f"{label}: {chosen.sum()}")
    if by_kl:
        left.set_ylabel("KL divergence (nats a datum)")
    else:
        left.set(ylabel="variance of the posterior mean over the data", yscale="log")
        left.axhline(0.01, color="black", linewidth=0.8, linestyle="--", label="0.01")
    if len(order) <= _NAMED:
        left.set_xticks(place, [names[i] for i in order], rotation=90 if len(order) > 8 else 0)
    left.set(xlabel="dimension, sorted", title=f"{active.sum()} of {len(active)} dimensions are active")
    left.legend()

    posterior, prior = found.posterior.cpu().numpy(), found.prior.cpu().numpy()
    top = np.argsort(-variance, kind="stable")[:2]
    whole = all(np.array_equal(t, t.round()) for t in (posterior[:, top], prior[:, top]))
    if whole or len(top) < 2:
        i = top[0]
        both = np.concatenate([posterior[:, i], prior[:, i]])
        bins = np.arange(both.min() - 0.5, both.max() + 1) if whole else np.linspace(both.min(), both.max(), 41)
        share = [np.full(len(t), 1 / len(t)) for t in (prior, posterior)]
        right.hist(prior[:, i], bins, weights=share[0], color="C7", alpha=0.6, label="prior")
        right.hist(posterior[:, i], bins, weights=share[1], histtype="step", color="C0", linewidth=1.5, label="q(z)")
        right.set(xlabel=names[i], ylabel="share of the draws")
        if whole:
            right.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        for t, colour, label in ((prior, "C7", "prior"), (posterior, "C0", "q(z)")):
            right.scatter(*t[:, top].T, s=10, color=colour, alpha=0.5, linewidths=0, label=label)
        right.set(xlabel=names[top[0]], ylabel=names[top[1]], aspect="equal")
    right.set_title(f"KL(q(z) || p(z)): {_between(found.aggregate_kl_lower, found.aggregate_kl)}")
    right.legend()
    return write(figure, path)


def collapse_history(records: list[dict[str, Any]], path: str | Path | None = None) -> Figure:
    """Draws the records of a :class:`pyrovae.diagnostics.CollapseMonitor` by epoch.

    Args:
        records: one dict a look, with "epoch", "kl", "active_units" and "mutual_information".
        path: where to write the picture.

    Raises:
        ValueError: when there are no records.
    """
    if not records:
        raise ValueError("records is empty: the monitor has seen no epoch. Train first, or make its every smaller.")
    figure = Figure(figsize=(10, 4), layout="constrained")
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
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    return write(figure, path)


def _between(low: float, high: float) -> str:
    return f"{high:.2f} nats" if high - low < 0.01 else f"{low:.2f} to {high:.2f} nats"
