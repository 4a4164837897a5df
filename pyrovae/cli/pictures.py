"""Pictures of a run: samples, reconstructions, latents and the learning curve."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.cli.common import MEANS, data_to_score
from pyrovae.cli.labels import arguments_of, draw
from pyrovae.training import History


def pictures_of(vae: Any, splits: datasets.Splits, history: History) -> dict[str, Callable[[Path], Any]]:
    """Returns functions that draw the pictures of a run to a path, by the names of the files.

    Args:
        vae: the trained VAE.
        splits: its data, whose test part is drawn.
        history: of its training.
    """
    from pyrovae import plots  # matplotlib is slow to import

    device = next(vae.parameters()).device
    part, few = (data_to_score(splits, "test", "grey", size, device) for size in (1000, 10))
    pictures: dict[str, Callable[[Path], Any]] = {}
    are_pictures = splits.schema is None and splits.vocabulary is None
    if are_pictures:
        pictures["samples.png"] = lambda path: plots.samples(draw(vae, 100, mean=True), path, MEANS)
    if are_pictures and hasattr(vae, "reconstruct"):
        pictures["reconstructions.png"] = lambda path: plots.reconstructions(
            few.x, vae.reconstruct(*arguments_of(vae, few)), path
        )
    pictures["latent_space.png"] = lambda path: plots.latent_space(
        latents_of(vae, part, splits.schema), part.labels, path
    )
    pictures["learning_curve.png"] = lambda path: plots.learning_curve(history, path)
    return {name: torch.no_grad()(draw_to) for name, draw_to in pictures.items()}


@torch.no_grad()
def latents_of(vae: Any, part: datasets.Split, schema: datasets.Schema | None = None, mean: bool = False) -> Tensor:
    """Returns the latents next to the data, one for each datum, shape ``(n, latent_dim)``.

    Args:
        vae: the VAE.
        part: the data.
        schema: the columns of a table; None for other data.
        mean: take the mean of q(z | x), where it has one, in place of a draw.
    """
    sites = poutine.trace(vae.guide).get_trace(*arguments_of(vae, part, schema)).nodes
    site = sites["z" if "z" in sites else "z1"]
    if mean:
        try:
            return site["fn"].mean.float()
        except (NotImplementedError, AttributeError):  # a flow, a class
            pass
    return site["value"].float()
