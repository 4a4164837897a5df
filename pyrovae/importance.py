r"""Importance weights of any Pyro model and guide.

The one place where :math:`\log p(x, z) - \log q(z \mid x)` is formed.
"""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyrovae.checks import Structure, check_all_observed, inspect, sample_sites

__all__ = ["log_weights"]


def log_weights(model: Callable, guide: Callable, *args: Any, num_samples: int, **kwargs: Any) -> Tensor:
    r"""Draws log importance weights, per datum, for any model and guide; differentiable.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad z_{kn} \sim q(z \mid x_n)

    The mean of the weights is an unbiased estimate of :math:`p(x_n)`. Everything per datum must stand in a plate named
    "data" at dimension -1. Factors that only scale a loss (``poutine.scale``, the N/B of a subsampled data plate) are
    left out, masks are applied. The guide runs once, for all samples together.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: what both are called with.
        num_samples: number of draws per datum, at least 1.
        **kwargs: what both are called with.

    Returns:
        Log weights in nats, shape ``(num_samples, batch)``.

    Raises:
        ValueError: when `num_samples` is below 1, model and guide do not fit each other or the data, or a site lies
            outside the data plate, so that weights per datum are undefined. The message names the site.

    References:
        Importance Weighted Autoencoders, Y. Burda, R. Grosse and R. Salakhutdinov, 2016,
        https://arxiv.org/abs/1509.00519.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> log_weights(vae.model, vae.guide, torch.zeros(5, 3), num_samples=10).shape
    torch.Size([10, 5])
    """
    structure = inspect_weights(model, guide, *args, num_samples=num_samples, **kwargs)
    trace, log_q = draw(guide, structure, num_samples, *args, **kwargs)
    return log_joint(model, trace, structure, num_samples, *args, **kwargs) - log_q


def inspect_weights(model: Callable, guide: Callable, *args: Any, num_samples: int, **kwargs: Any) -> Structure:
    """Returns the structure of a model and a guide, or raises because weights per datum are undefined."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    structure = inspect(model, guide, *args, **kwargs)
    if structure.problems:
        raise ValueError(
            f"Importance weights per datum are undefined: {'; '.join(structure.problems)}. Put everything that belongs "
            'to a datum under pyro.plate("data", len(x), dim=-1), in the model and in the guide.'
        )
    return structure


def draw(
    guide: Callable, structure: Structure, num_samples: int, *args: Any, **kwargs: Any
) -> tuple[poutine.Trace, Tensor]:
    r"""Runs the guide once for `num_samples` draws; returns its trace and :math:`\log q`, ``(num_samples, batch)``."""
    with _samples(structure, num_samples), poutine.trace() as tracer:
        guide(*args, **kwargs)
    return tracer.trace, _log_prob_per_datum(tracer.trace)


def log_joint(
    model: Callable,
    draws: poutine.Trace,
    structure: Structure,
    num_samples: int,
    *args: Any,
    check_data: bool = False,
    **kwargs: Any,
) -> Tensor:
    r"""Returns :math:`\log p(x, z)` at the latents of a guide's trace of `num_samples` draws, in the same shape."""
    # Handlers as contexts, not wrappers: a wrapped model could not take an argument of the name "context".
    with _samples(structure, num_samples), poutine.trace() as tracer, poutine.replay(trace=draws):
        model(*args, **kwargs)
    if check_data:
        check_all_observed(tracer.trace)
    return _log_prob_per_datum(tracer.trace)


def _samples(structure: Structure, num_samples: int) -> pyro.plate:
    return pyro.plate("_num_samples", num_samples, dim=-1 - structure.max_plate_nesting)


def _log_prob_per_datum(trace: poutine.Trace) -> Tensor:
    # Unscaled, for N/B and training weights belong outside the log; summed over all but samples and data.
    total = 0.0
    for site in sample_sites(trace).values():
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        log_prob = scale_and_mask(log_prob, mask=site["mask"])
        total = total + (log_prob.flatten(1, -2).sum(1) if log_prob.dim() > 2 else log_prob)
    return total
