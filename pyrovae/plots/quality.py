"""Pictures of the quality of samples."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from pyrovae.plots.pictures import are_images, grid_of, write

__all__ = ["quality"]


def quality(found, path: str | Path | None = None) -> Figure:
    """Draws features of data and samples in a plane, precision and recall beside their floor, and some of both.

    Args:
        found: a :class:`pyrovae.diagnostics.Quality`.
        path: where to write the picture.
    """
    images = are_images(found.data)
    figure = Figure(figsize=(14 if images else 10, 4.6), layout="constrained")
    axes = figure.subplots(1, 4 if images else 2, width_ratios=[1.2, 0.8, 1, 1] if images else [1.2, 0.8])
    plane, bars = axes[:2]
    center = found.real.mean(0)
    _, _, principal = torch.linalg.svd(found.real - center, full_matrices=False)
    for x, name, colour in ((found.real, "data", "C0"), (found.generated, "samples", "C1")):
        at = ((x - center) @ principal[:2].T).cpu()
        if at.shape[1] == 1:
            plane.hist(at[:, 0].numpy(), bins=30, alpha=0.6, color=colour, label=name)
        else:
            plane.scatter(*at.T.numpy(), s=8, linewidths=0, alpha=0.6, color=colour, label=name)
    second = "number" if found.real.shape[1] == 1 else "second principal component"
    plane.set(xlabel="first principal component", ylabel=second, title=found.features)
    plane.legend()

    for i, (name, scores) in enumerate((("samples", found.model), ("data, the floor", found.floor))):
        colour = ("C1", "C0")[i]
        heights = bars.bar([i * 0.4 - 0.2, 1 + i * 0.4 - 0.2], scores[:2], width=0.4, color=colour, label=name)
        bars.bar_label(heights, fmt="%.2f", padding=2)
    bars.set_xticks([0, 1], ["precision", "recall"])
    bars.set(ylim=(0, 1.25), ylabel=f"share ({found.size:,} beside {found.size:,})")
    bars.set_title(f"Fréchet distance {found.model.frechet:.3g}, floor {found.floor.frechet:.3g}", fontsize="medium")
    bars.legend(loc="upper center", ncols=2, fontsize="small")

    if images:
        low, high = found.data.min(), found.data.max()
        for ax, x, name in zip(axes[2:], (found.data, found.samples), ("data", "samples"), strict=True):
            shown = (x - low) / (high - low).clamp_min(1e-12)  # the range of the data for both
            ax.imshow(grid_of(shown, 6).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_axis_off()
            ax.set_title(name)
    return write(figure, path)
