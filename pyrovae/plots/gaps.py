"""The picture of where nats are lost."""

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from pyrovae.plots.pictures import write

if TYPE_CHECKING:
    from pyrovae.diagnostics.gaps import Gaps


def gaps(found: "Gaps", path: str | Path | None = None) -> Figure:
    """Draws the gaps as bars from log p(x) down to the ELBO, and their spread over the data.

    Args:
        found: what :func:`pyrovae.diagnostics.gaps` returned.
        path: where to write the picture.
    """
    sides = {"test": found.test} if found.train is None else {"test": found.test, "train": found.train}
    figure = Figure(figsize=(9, 4), layout="constrained")
    bars, spread = figure.subplots(1, 2)
    for i, (name, losses) in enumerate(sides.items()):
        top, best, low = (t.mean().item() for t in (losses.estimate.value, losses.best, losses.elbo))
        for upper, lower, colour, label in ((top, best, "C0", "approximation"), (best, low, "C1", "amortisation")):
            bars.bar(i, upper - lower, bottom=lower, width=0.5, color=colour, label=label if i == 0 else None)
            bars.annotate(f"{upper - lower:.2f}", (i, (upper + lower) / 2), ha="center", va="center")
        bars.annotate(f"log p(x) {top:.2f}", (i, top), (0, 3), textcoords="offset points", ha="center", va="bottom")
        bars.annotate(f"ELBO {low:.2f}", (i, low), (0, -3), textcoords="offset points", ha="center", va="top")
        values = [losses.approximation.cpu().numpy(), losses.amortization.cpu().numpy()]
        boxes = spread.boxplot(
            values, positions=[i, i + len(sides) + 0.5], widths=0.6, showfliers=False, patch_artist=True, whis=(5, 95)
        )
        for box, colour in zip(boxes["boxes"], ("C0", "C1"), strict=True):
            box.set(facecolor=colour, alpha=0.6)
        for line in boxes["medians"]:
            line.set(color="black")
    n = len(sides)
    bars.set_xticks(range(n), list(sides))
    bars.use_sticky_edges = False  # room for what is written above and below
    bars.margins(y=0.15)
    bars.set(xlim=(-0.6, n - 0.4), ylabel="nats a datum", title="from log p(x) down to the ELBO")
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    spread.set_xticks([i + j * (n + 0.5) for j in range(2) for i in range(n)], list(sides) * 2)
    spread.axhline(0, color="grey", linewidth=0.5)
    spread.set(ylabel="nats", title="over data (quartiles, 5 and 95 %)")
    return write(figure, path)
