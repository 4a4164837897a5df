"""Pictures of sharpness."""

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pyrovae.plots.pictures import are_images, grid_of, write

__all__ = ["sharpness"]

_NAMES = {
    "data": "data",
    "reconstructions": "reconstructions",
    "means": "samples: means of p(x | z)",
    "draws": "samples: draws of p(x | z)",
}


def sharpness(found, path: str | Path | None = None) -> Figure:
    """Draws spectra, what is lost of them, how sharp each kind of picture is, and some of each.

    Args:
        found: a :class:`pyrovae.diagnostics.Sharpness`.
        path: where to write the picture.
    """
    images = are_images(found.examples["data"])
    figure = Figure(figsize=(11, 5.4 if images else 6.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 0.65 if images else 1))
    spectrum, lost, sharp = above.subplots(1, 3)
    frequency = found.frequency.cpu().numpy()
    spectrum.plot(frequency, found.power.cpu().numpy(), marker="o", markersize=3, label="data about their mean")
    spectrum.plot(frequency, found.error.cpu().numpy(), marker="o", markersize=3, label="x less decoded mean")
    white = found.error.sum() * found.share
    spectrum.plot(frequency, white.cpu().numpy(), color="grey", linewidth=0.8, linestyle="--", label="white noise")
    spectrum.set(xlabel="cycles per pixel", ylabel="power per element in the band", yscale="log", title="spectra")
    spectrum.legend(fontsize="small")
    lost.plot(frequency, found.lost.cpu().numpy(), marker="o", markersize=3, color="C1")
    lost.axhline(1, color="grey", linewidth=0.5, linestyle="--")
    lost.set(
        xlabel="cycles per pixel", ylabel="error / power of the data", title="share lost (1: no better than the mean)"
    )
    lost.set_ylim(0, 1.5)  # beyond, how much worse than the mean datum tells nothing of blur

    names = list(found.laplacian)
    values = [found.laplacian[name].cpu() for name in names]
    sharp.barh(
        range(len(names)),
        [v.mean().item() for v in values],
        xerr=[2 * v.std().item() / math.sqrt(len(v)) for v in values],
        color=["C0", "C1", "C2", "C2"],
        capsize=3,
    )
    sharp.set_yticks(range(len(names)), [_NAMES[name].replace(": ", ":\n") for name in names])
    sharp.invert_yaxis()
    sharp.set(xlabel="variance of the Laplacian (± 2 errors)", title="sharpness")

    # Pictures are clamped to [0, 1]: bring the range of the data there, and all others by the same map.
    low, high = found.examples["data"].min(), found.examples["data"].max()
    shown = {name: (x.cpu() - low.cpu()) / (high - low).clamp_min(1e-12).cpu() for name, x in found.examples.items()}
    values = torch.cat([x.flatten() for x in found.examples.values()])
    limits = values.min().item(), values.max().item()
    for ax, name in zip(below.subplots(2, 2).flat, names, strict=True):
        if images:
            ax.imshow(grid_of(shown[name], len(shown[name])).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            ax.set_axis_off()
        else:
            x = found.examples[name].cpu()
            x = x[:, 0] if x.dim() == 3 else x.flatten(1)
            ax.plot(x.T.numpy(), linewidth=0.7, alpha=0.7, color=f"C{names.index(name)}")
            ax.set(xlabel="pixel", ylim=limits)
        ax.set_title(_NAMES[name], fontsize="small")
    return write(figure, path)
