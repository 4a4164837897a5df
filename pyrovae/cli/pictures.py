"""Pictures of a run: samples, reconstructions, latents and the learning curve."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.cli.common import MEANS, data_to_score
from pyrovae.cli.labels import arguments_of, draw
from pyrovae.structures import SequenceVAE
from pyrovae.training import History

_NUM_SEQUENCES = 4
_LEAST_FEATURES = 8  # of a sequence that is drawn as a picture


def pictures_of(name: str, vae: Any, splits: datasets.Splits, history: History) -> dict[str, Callable[[Path], Any]]:
    """Returns functions that draw the pictures of a run to a path, by the names of the files.

    Args:
        name: of the run, which each picture bears.
        vae: the trained VAE.
        splits: its data, whose test part is drawn.
        history: of its training.
    """
    from pyrovae import plots  # matplotlib is slow to import

    device = next(vae.parameters()).device
    part, few = (data_to_score(splits, "test", "grey", size, device) for size in (1000, 10))
    drawn: dict[str, Callable[[], Any]] = {}
    if isinstance(vae, SequenceVAE):
        few = data_to_score(splits, "test", "grey", _NUM_SEQUENCES, device)
        drawn |= _of_sequences(vae, few, splits.time_series)
    elif splits.schema is None and splits.vocabulary is None:
        drawn["samples.png"] = lambda: plots.samples(draw(vae, 100, mean=True), title=MEANS)
        if hasattr(vae, "reconstruct"):
            title = f"test data 0 to {len(few.x) - 1} above, reconstructions below"
            drawn["reconstructions.png"] = lambda: plots.reconstructions(
                few.x, vae.reconstruct(*arguments_of(vae, few)), title=title
            )

    def latent_space() -> Any:
        z, are_means = latents_of(vae, part, splits.schema)
        return plots.latent_space(z, part.labels, title="means of q(z | x)" if are_means else "a draw of q(z | x) each")

    drawn["latent_space.png"] = latent_space
    drawn["learning_curve.png"] = lambda: plots.learning_curve(history)
    return {file: partial(_draw, function, name) for file, function in drawn.items()}


def _of_sequences(
    vae: SequenceVAE, part: datasets.Split, time_series: datasets.TimeSeries | None
) -> dict[str, Callable[[], Any]]:
    """Returns functions that draw sequences of a VAE, and the first of its data with their reconstructions."""
    from pyrovae import plots

    args = arguments_of(vae, part)

    def reconstructions() -> Any:
        again = vae.reconstruct(*args).masked_fill(part.x.isnan(), torch.nan)
        if is_drawn_as_curves(part.x):
            return draw_curves(part.x, again, time_series, "test data and reconstructions")
        above, below = as_pictures(torch.cat([part.x, again])).chunk(2)
        return plots.reconstructions(above, below, title="test data above, reconstructions below")

    def samples() -> Any:
        x = vae.sample(4 * _NUM_SEQUENCES, part.x.shape[1])
        if is_drawn_as_curves(x):
            return draw_curves(x[:_NUM_SEQUENCES], None, time_series, "sequences from p(x)")
        return plots.samples(as_pictures(x), title="sequences from p(x), time to the right")

    return {"samples.png": samples, "reconstructions.png": reconstructions}


def draw_curves(
    x: Tensor,
    again: Tensor | None,
    time_series: datasets.TimeSeries | None,
    title: str,
    path: Path | None = None,
) -> Any:
    """Draws sequences, beside their reconstructions if there are any; those of a table in its units."""
    from pyrovae import plots

    if time_series is None:
        return plots.sequences(x, again, title=title, path=path)
    title += ", changes from row to row" if time_series.growth else ""
    again = None if again is None else torch.from_numpy(time_series.levels(again))
    values = torch.from_numpy(time_series.levels(x))
    return plots.sequences(values, again, names=time_series.names, title=title, path=path)


def is_drawn_as_curves(x: Tensor) -> bool:
    """Returns whether sequences ``(size, time, ...)`` have too few features for a picture of each."""
    return x[0, 0].numel() < _LEAST_FEATURES


def as_pictures(x: Tensor) -> Tensor:
    """Returns sequences as pictures of values from 0 to 1, with time to the right and the first feature at the bottom.

    Features at the bottom and at the top that never change, such as keys that nobody plays, are cut off, and so are the
    steps after the longest sequence.

    Args:
        x: sequences of several features, ``(size, time, ...)``, with NaN where there is no step. Those of few features
            are returned as they are, to be drawn as curves.
    """
    if is_drawn_as_curves(x):
        return x
    x = x.flatten(2)
    is_seen = ~x.isnan().any(-1)
    x = x[:, : int(is_seen.any(0).nonzero().amax()) + 1]
    seen = x[is_seen[:, : x.shape[1]]]
    changing = (seen != seen[:1]).any(0).nonzero().flatten().tolist() or [0, x.shape[2] - 1]
    x = x[..., changing[0] : changing[-1] + 1]
    low, high = np.nanquantile(x.cpu().numpy(), (0.02, 0.995))
    return ((x - low) / max(high - low, 1e-6)).clamp(0, 1).nan_to_num(0).mT.flip(-2).unsqueeze(1)


@torch.no_grad()
def _draw(function: Callable[[], Any], name: str, path: Path) -> None:
    from pyrovae.plots.drawing import write

    figure = function()
    figure.supxlabel(name, x=0.99, ha="right", fontsize=7, color="grey")
    write(figure, path)


@torch.no_grad()
def latents_of(vae: Any, part: datasets.Split, schema: datasets.Schema | None = None) -> tuple[Tensor, bool]:
    """Returns the mean of q(z | x) for each datum, a draw where it has no mean, and whether it has one.

    Args:
        vae: the VAE, of whose latents those next to the data are taken.
        part: the data.
        schema: the columns of a table; None for other data.
    """
    args = arguments_of(vae, part, schema)
    trace = poutine.trace(vae.guide).get_trace(*args)
    site = trace.nodes[name_of_latents(trace)]
    if isinstance(vae, SequenceVAE):
        return mean_over_steps(site["value"], args[1]), False
    try:
        return site["fn"].mean.float(), True
    except (NotImplementedError, AttributeError):  # a flow, a class
        return site["value"].float(), False


def name_of_latents(trace: Any) -> str:
    """Returns the name of the latents next to the data, in a trace of a guide."""
    return "z" if "z" in trace.nodes else "z1"


def mean_over_steps(z: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of the latents ``(size, time, latent_dim)`` of sequences over the observed steps."""
    seen = mask.unsqueeze(-1)
    return (z.float() * seen).sum(1) / seen.sum(1)
