"""Pictures of how right a guide is: beside Markov chains, by ranks, and by importance weights."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pyrovae.plots.pictures import write

__all__ = ["calibration", "posterior_check", "reliability"]

_NUTS, _GUIDE = "C0", "C1"
_ROWS, _MARGINALS, _DOTS = 6, 3, 1000


def posterior_check(check, path: str | Path | None = None) -> Figure:
    """Draws a guide beside NUTS, a row a datum: a pair of latents, and the marginals that are furthest apart.

    The pair is the one whose correlation the guide misses most, with ellipses at two standard deviations. Of more
    than 6 data, the 6 that are worst.

    Args:
        check: a :class:`pyrovae.diagnostics.posteriors.PosteriorCheck`.
        path: where to write the picture.
    """
    batch, total = check.mean.shape
    data = sorted(check.discrepancy.argsort(descending=True)[:_ROWS].tolist())
    marginals = min(_MARGINALS, total)
    columns = marginals + (total > 1)
    figure = Figure(figsize=(max(3 * columns, 4.5), 2.6 * len(data) + 0.6), layout="constrained")
    rows = figure.subplots(len(data), columns, squeeze=False)
    guide_draws, draws = check.guide_draws.cpu().numpy(), check.draws.cpu().numpy()
    for axes, i in zip(rows, data, strict=True):
        title = f"datum {i}" + ("" if check.converged[i] else " (chains disagree)")
        if total > 1:
            _pair(axes[0], check, i, guide_draws[:, i], draws[:, i])
            axes[0].set_title(title, fontsize=9, fontweight="bold")
        worst = check.distance[i].argsort(descending=True)[:marginals].tolist()
        for ax, d in zip(axes[-marginals:], worst, strict=True):
            low, high = _range(guide_draws[:, i, d], draws[:, i, d])
            bins = np.linspace(low, high, 31)
            ax.hist(draws[:, i, d], bins, density=True, color=_NUTS, alpha=0.4)
            ax.hist(guide_draws[:, i, d], bins, density=True, color=_GUIDE, histtype="step", linewidth=1.3)
            shift, ratio = check.difference[i, d].item(), check.ratio[i, d].item()
            name = f"{title}, {check.names[d]}" if total == 1 else check.names[d]
            ax.set_title(f"{name}: shift {shift:+.2f} sd, ratio {ratio:.2f}", fontsize=9)
            ax.set_yticks([])
    handles = [
        figure.axes[0].plot([], [], "o", color=_NUTS, alpha=0.6, label="NUTS")[0],
        figure.axes[0].plot([], [], "o", color=_GUIDE, alpha=0.6, label="guide")[0],
    ]
    left_out = f"the {len(data)} worst of {batch} data" if batch > len(data) else None
    figure.legend(handles=handles, loc="outside upper center", ncols=2, title=left_out, frameon=False)
    return write(figure, path)


def calibration(calibrated, path: str | Path | None = None) -> Figure:
    """Draws histograms of ranks: of log p(x, z), and of up to 11 latents with the smallest p-values.

    Args:
        calibrated: a :class:`pyrovae.diagnostics.posteriors.Calibration`.
        path: where to write the picture.
    """
    n, total = calibrated.ranks.shape
    shown = [total - 1, *(i for i in calibrated.p_value.argsort().tolist() if i < total - 1)][:12]
    columns = min(4, len(shown))
    height = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(max(2.7 * columns, 5), 2.2 * height + 0.5), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).flatten()
    bins = next(bins for bins in (20, 10, 5) if n >= 10 * bins)
    edges = np.round(np.linspace(0, calibrated.num_draws + 1, bins + 1))
    share = np.diff(edges) / (calibrated.num_draws + 1)
    spread = 2.576 * np.sqrt((1 - share) / (n * share))
    ranks = calibrated.ranks.cpu().numpy()
    for ax, i in zip(axes, shown, strict=False):
        count, _ = np.histogram(ranks[:, i], edges)
        colour = "C3" if calibrated.uneven[i] else "C0"
        ax.stairs(count / (n * share), edges, fill=True, color=colour, alpha=0.7)
        for bound in (1 + spread, 1 - spread):
            ax.stairs(bound, edges, baseline=None, color="black", linestyle=":", linewidth=1)
        ax.axhline(1, color="black", linewidth=0.5)
        ax.set_ylim(0, max(2.0, 1.05 * (count / (n * share)).max()))
        ax.set_xlim(0, calibrated.num_draws + 1)
        ax.set_title(f"{calibrated.names[i]}: {calibrated.shapes[i]}", fontsize=9)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    figure.supxlabel(f"rank of the truth among {calibrated.num_draws} draws of the guide", fontsize=9)
    figure.supylabel("frequency, 1 if right", fontsize=9)
    left_out = f"; {total - len(shown)} with larger p are left out" if total > len(shown) else ""
    figure.suptitle(f"{n:,} data from the model; between the dotted lines: 99% of bars, if right{left_out}", fontsize=9)
    return write(figure, path)


def reliability(reliable, path: str | Path | None = None) -> Figure:
    """Draws a histogram of k-hat, beside the effective sample size of each datum against its k-hat.

    Args:
        reliable: a :class:`pyrovae.diagnostics.posteriors.Reliability`.
        path: where to write the picture.
    """
    low, high = -0.5, 1.5  # equal weights and lost data lie at infinity
    khat = reliable.khat.cpu().double().clamp(low, high).numpy()
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax in (left, right):
        ax.set_xticks(np.arange(low, high + 0.1, 0.5))
    names, colours = ("below 0.5, good", "0.5 to 0.7, usable", "above 0.7, not to be trusted"), ("C0", "C1", "C3")
    for start, stop, name, colour, count in zip(
        (low, 0.5, 0.7), (0.5, 0.7, high), names, colours, reliable.counts, strict=True
    ):
        bins = np.arange(round(start / 0.05), round(stop / 0.05) + 1) * 0.05
        inside = (khat >= start) & ((khat < stop) | (stop == high))
        left.hist(khat[inside], bins, color=colour, alpha=0.7, label=f"{name}: {count:,}")
        right.scatter(khat[inside], reliable.ess.cpu().numpy()[inside], s=8, color=colour, alpha=0.7, linewidths=0)
    left.set(xlabel="Pareto k-hat (the ends hold all beyond)", ylabel="data", xlim=(low, high))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    right.axhline(reliable.num_samples, color="grey", linewidth=0.5, linestyle="--")
    label = f"effective of {reliable.num_samples:,} samples"
    right.set(xlabel="Pareto k-hat", ylabel=label, yscale="log", xlim=(low - 0.05, high + 0.05))
    return write(figure, path)


def _pair(ax, check, i: int, guide_draws: np.ndarray, draws: np.ndarray) -> None:
    gap = check.correlation_difference[i].abs()
    a, b = sorted(divmod(int(gap.argmax()), len(gap)))
    if a == b:
        a, b = 0, 1
    step = max(1, len(draws) // _DOTS)
    angle = np.linspace(0, 2 * math.pi, 100)
    circle = 2 * np.stack([np.cos(angle), np.sin(angle)])
    for t, colour in ((draws, _NUTS), (guide_draws, _GUIDE)):
        ax.scatter(t[::step, a], t[::step, b], s=5, color=colour, alpha=0.25, linewidths=0)
        # The normal of the same mean and covariance, at two standard deviations; not by Cholesky, which may not exist.
        values, vectors = np.linalg.eigh(np.cov(t[:, a], t[:, b]))
        x, y = t[:, [a, b]].mean(0)[:, None] + vectors * np.sqrt(values.clip(0)) @ circle
        ax.plot(x, y, color=colour, linewidth=1.5)
    ax.set_xlim(*_range(guide_draws[:, a], draws[:, a]))
    ax.set_ylim(*_range(guide_draws[:, b], draws[:, b]))
    ax.set_xlabel(check.names[a], fontsize=9)
    ax.set_ylabel(check.names[b], fontsize=9)


def _range(*draws: np.ndarray) -> tuple[float, float]:
    """Returns a range that holds nearly all draws, so that a single one does not squeeze the others."""
    low = min(np.quantile(t, 0.001) for t in draws)
    high = max(np.quantile(t, 0.999) for t in draws)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin
