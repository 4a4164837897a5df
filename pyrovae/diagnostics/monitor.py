"""A callback of training that watches the use of the latents."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyrovae import plots
from pyrovae.arguments import cuda_devices, tensors_of
from pyrovae.diagnostics.base import check_at_least, in_memory
from pyrovae.diagnostics.collapse import collapse
from pyrovae.training import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CollapseMonitor"]


class CollapseMonitor:
    """A callback of :func:`pyrovae.fit` that runs :func:`collapse` every few epochs.

    It adds "kl", "active_units" and "mutual_information" of its data to the last record of the history, so that they
    are written and kept in checkpoints with it. The noise is the same each time, and the random state of training is
    restored: a run ends with bitwise the same weights with or without it. A few hundred data take about the time of a
    training step.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        *args: arguments of both, on the device of their parameters: validation data, for example.
        every: epochs between runs, at least 1.
        num_draws: draws of the latents per datum, at least 2.
        **kwargs: as `args`.

    Raises:
        ValueError: when `every` is below 1 or `num_draws` below 2, or there are fewer than 2 data.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> x = torch.randn(50, 3)
    >>> monitor = CollapseMonitor(vae.model, vae.guide, x, every=2)
    >>> history = pyrovae.fit(vae.model, vae.guide, x, batch_size=50, epochs=4, callbacks=[monitor], progress=False)
    >>> [record["epoch"] for record in monitor.records]
    [2, 4]
    """

    def __init__(self, model: Callable, guide: Callable, *args: Any, every: int = 1, num_draws: int = 2, **kwargs: Any):
        check_at_least("every", every, 1)
        check_at_least("num_draws", num_draws, 2)
        self.args, self.kwargs, _ = in_memory(2, "CollapseMonitor", model, args, kwargs)
        self.model, self.guide = model, guide
        self.every, self.num_draws = every, num_draws
        self.records: list[dict[str, Any]] = []  # "epoch" and the numbers of each run, also of those before a resume

    def __call__(self, history: History) -> None:
        last = history.records[-1]
        if last["epoch"] % self.every == 0:
            devices = cuda_devices(tensors_of(self.args, self.kwargs))
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                result = collapse(
                    self.model, self.guide, *self.args, num_draws=self.num_draws, progress=False, **self.kwargs
                )
            last["kl"] = result.kl.mean().item()
            last["active_units"] = result.active_units
            last["mutual_information"] = result.mutual_information
        names = ("epoch", "kl", "active_units", "mutual_information")
        self.records = [{k: r[k] for k in names} for r in history.records if "mutual_information" in r]

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draws the records by epoch; returns the matplotlib figure, and writes it if a path is given."""
        return plots.collapse_history(self.records, path)
