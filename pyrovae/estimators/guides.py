"""as_guide: a proposal for some data as a Pyro guide, for bounds and losses."""

from collections.abc import Callable
from typing import Any

import torch

from pyrovae.arguments import count_data
from pyrovae.estimators.laplace import Laplace
from pyrovae.estimators.proposals import Proposal
from pyrovae.estimators.task import open_task
from pyrovae.estimators.weighted import ImportanceSampling
from pyrovae.inference.structure import inspect


@torch.no_grad()
def as_guide(
    model: Callable,
    guide: Callable | None,
    *args: Any,
    proposal: Proposal | None = None,
    max_memory: float = 64e6,
    **kwargs: Any,
) -> Callable:
    r"""Returns a proposal as a Pyro guide for exactly these data, in this order.

    Bounds and losses can then be evaluated at it, such as ``bounds.IWAE(50).loss(model, made, x)``, and a model trained
    by it. Its distributions are fixed: gradients of a loss are those of the model. Estimators, which work through data
    in chunks, take the proposal itself.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide, from which the proposal is made; may be None for one that does not use it.
        *args: positional arguments of both, as :func:`~pyrovae.log_marginal` takes them.
        proposal: a proposal of one component; :class:`~pyrovae.estimators.Laplace` by default.
        max_memory: budget for intermediate results, in bytes.
        **kwargs: keyword arguments of both.

    Raises:
        TypeError: when `proposal` is not a proposal.
        ValueError: when the proposal is a mixture; when the plate of the data is subsampled; when the proposal does not
            support the latents; when the guide that is returned is called with another number of data.

    >>> import pyro
    >>> import pyrovae
    >>> from pyrovae import bounds, encoders, likelihoods, priors
    >>> pyro.set_rng_seed(0)
    >>> likelihood = likelihoods.Normal(2, 3, scale=0.1)
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihood, encoders.DiagonalNormal(3, 2))
    >>> x = torch.randn(5, 3)
    >>> fitted = as_guide(vae.model, vae.guide, x)
    >>> bounds.IWAE(50).loss(vae.model, fitted, x) < bounds.IWAE(50).loss(vae.model, vae.guide, x)
    True
    """
    proposal = Laplace() if proposal is None else proposal
    method = ImportanceSampling(1, proposal)
    with open_task(model, guide, method, args, kwargs, max_memory, progress=False) as task:
        task.check_not_summed("as_guide")
        full_size = inspect(model, task.guide, *task.args, **task.kwargs).data_size
        if full_size is not None and full_size != task.size:
            raise ValueError(
                f"the plate of the data holds {full_size:,}, of which the model takes {task.size:,}: a loss would "
                "scale the model alone. Give all data, to a model whose plate has their number."
            )
        return _OfTheseData(proposal.single(task, "as_guide makes a guide").guide, task.size)


class _OfTheseData:
    """A guide for a fixed number of data."""

    def __init__(self, guide: Callable, size: int):
        self.guide, self.size = guide, size
        self.draws_directly = getattr(guide, "draws_directly", False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        size = count_data(args, kwargs)
        if size != self.size:
            raise ValueError(
                f"the guide was made for {self.size:,} data and called with {size:,}. Call it with the same data, all "
                "at once; where data are taken in chunks, give the estimator the proposal instead."
            )
        return self.guide(*args, **kwargs)
