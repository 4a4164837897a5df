"""Pictures of a run: samples, reconstructions, latents and the learning curve."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.cli.common import MEANS, data_to_score
from pyrovae.cli.labels import arguments_of, draw
from pyrovae.training import History


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
    if splits.schema is None and splits.vocabulary is None:
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
    sites = poutine.trace(vae.guide).get_trace(*arguments_of(vae, part, schema)).nodes
    site = sites["z" if "z" in sites else "z1"]
    try:
        return site["fn"].mean.float(), True
    except (NotImplementedError, AttributeError):  # a flow, a class
        return site["value"].float(), False
