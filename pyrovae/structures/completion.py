"""Repair: parts of a datum that a mask hides, drawn given the parts that are seen."""

import math
from typing import Any, NamedTuple

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyrovae.arguments import as_tensors
from pyrovae.distributions import center
from pyrovae.distributions.spaces import innermost
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.sites import in_support, independent_elements
from pyrovae.parts import call, check_context, sample_prior
from pyrovae.rows import number_type
from pyrovae.vae import VAE

_CHUNK = 2**23  # elements of data, times chains, that are worked on at once
_WARM = 0.5  # share of the steps before the mean is taken


class Repair(NamedTuple):
    r"""Hidden elements of data, drawn given the elements that are seen.

    Args:
        mean: :math:`\mathrm{E}[x \mid x_{\mathrm{seen}}]`, shape ``(batch, *x_shape)``, with the seen elements of x.
        draws: draws of :math:`p(x \mid x_{\mathrm{seen}})`, shape ``(num_draws, batch, *x_shape)``, with these too.
        acceptance: share of the proposals that each datum's chains accepted in their second half, shape ``(batch,)``;
            near 0, the chains hardly moved, and the draws are unreliable.
    """

    mean: Tensor
    draws: Tensor
    acceptance: Tensor


@torch.no_grad()
def repair(
    vae: VAE,
    x: Any,
    mask: Any,
    context: Any = None,
    *,
    num_draws: int = 8,
    num_steps: int = 300,
) -> Repair:
    r"""Draws the hidden elements of data given the seen ones, by a VAE that was trained on whole data.

    .. math:: z' \sim q(z \mid x_{\mathrm{seen}}, x_{\mathrm{hidden}}), \quad \text{taken with probability}\;
        \min\!\left(1, \frac{p(x, z')\, q(z \mid x)}{p(x, z)\, q(z' \mid x)}\right), \qquad
        x_{\mathrm{hidden}} \sim p(x_{\mathrm{hidden}} \mid z)

    Each draw is the end of a Markov chain of its own, Metropolis within Gibbs. For real latents, every second proposal
    is a random step from z instead, as wide as :math:`q(z \mid x)` over the root of its dimensions. The stationary
    distribution is :math:`p(x_{\mathrm{hidden}}, z \mid x_{\mathrm{seen}})`. The chains begin at draws from the prior,
    and take every proposal in the first tenth of the steps. The mean is over the second half of the steps of all
    chains. For a :class:`~pyrovae.structures.MissingDataVAE`, which is trained on data with holes, use its ``impute``.

    Args:
        vae: the VAE; its likelihood must have independent elements given z.
        x: data, shape ``(batch, *x_shape)``; hidden elements may hold any value, NaN too.
        mask: True where x is seen; broadcast to the shape of x.
        context: shape ``(batch, context_dim)``, or None.
        num_draws: draws per datum, at least 1.
        num_steps: steps of each chain, at least 10.

    Returns:
        A :class:`Repair`. Its mean is a mean of modes where :math:`p(x \mid z)` has no mean (classes).

    Raises:
        TypeError: when `vae` is not a VAE.
        ValueError: when a number is out of range, the mask does not fit the data, seen elements are not finite or
            outside the support of the likelihood, or the elements of the likelihood are not independent.

    References:
        Leveraging the Exact Likelihood of Deep Latent Variable Models, P.-A. Mattei and J. Frellsen, 2018,
        https://arxiv.org/abs/1802.04826.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> repaired = repair(vae, torch.zeros(5, 3), torch.tensor([True, True, False]), num_draws=4)
    >>> repaired.mean.shape, repaired.draws.shape, repaired.acceptance.shape
    (torch.Size([5, 3]), torch.Size([4, 5, 3]), torch.Size([5]))
    """
    if not isinstance(vae, VAE):
        raise TypeError(f"vae must be a pyrovae.VAE, got {type(vae).__name__}.")
    for name, value, least in (("num_draws", num_draws, 1), ("num_steps", num_steps, 10)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    (x,), named = as_tensors((x,), {"mask": mask, "context": context}, number_type(vae))
    mask, context = named["mask"], named["context"]
    mask = torch.as_tensor(mask, device=x.device)
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask must be boolean, or 0 where x is hidden and 1 where it is seen.")
    try:
        mask = mask.bool().expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, which does not broadcast to that of x, {tuple(x.shape)}."
        ) from None
    check_context(context, x, vae.prior, vae.likelihood, vae.encoder)
    x = torch.where(mask, x, 0)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or infinity where the mask says that it is seen. Hide these elements too.")
    size = max(1, _CHUNK // (num_draws * max(1, x[0].numel())))
    contexts = [None] * len(x) if context is None else context.split(size)
    with evaluation_mode():
        parts = [_repair(vae, *part, num_draws, num_steps) for part in zip(x.split(size), mask.split(size), contexts)]
    return Repair(
        torch.cat([part.mean for part in parts]),
        torch.cat([part.draws for part in parts], dim=1),
        torch.cat([part.acceptance for part in parts]),
    )


def _repair(vae: VAE, x: Tensor, mask: Tensor, context: Tensor | None, num_draws: int, num_steps: int) -> Repair:
    def chains(t: Tensor) -> Tensor:
        return t.repeat(num_draws, *[1] * (t.dim() - 1))

    size, x, seen = len(x), chains(x), chains(mask)
    context = None if context is None else chains(context)
    prior = call(vae.prior, context=context)
    z = sample_prior(vae.prior, len(x), context) if context is None else prior.sample()
    likelihood = vae.decode(z, context)
    if independent_elements(likelihood) is None:
        raise ValueError(
            f"the elements of {type(vae.likelihood).__name__} are not independent given z, so that hidden ones cannot "
            "be drawn alone. Take a likelihood with independent elements."
        )
    x = torch.where(seen, x, likelihood.sample())
    inside = in_support(likelihood, x)
    if not bool(inside.all()):
        raise ValueError(
            f"x is outside the support of {type(vae.likelihood).__name__} where it is seen, in "
            f"{int((~inside).sum()) // num_draws} of {size} rows. Preprocess it as for training."
        )
    total, accepted, counted = torch.zeros_like(x), torch.zeros(len(x), device=x.device), 0
    for step in range(num_steps):
        q = vae.encode(x, context)
        width = _width(q) if step % 2 and step >= num_steps // 10 else None
        # Where the encoder misses the posterior, steps from z of its width move on; they are symmetric given x.
        proposed = q.sample() if width is None else z + width * torch.randn_like(z)
        new = vae.decode(proposed, context)
        log_ratio = prior.log_prob(proposed) + new.log_prob(x) - prior.log_prob(z) - likelihood.log_prob(x)
        if width is None:
            log_ratio = log_ratio + q.log_prob(z) - q.log_prob(proposed)
        takes = torch.rand_like(accepted).log() < log_ratio
        if step < num_steps // 10:
            takes = torch.ones_like(takes)
        z = torch.where(takes.unsqueeze(-1), proposed, z)
        likelihood = vae.decode(z, context)
        x = torch.where(seen, x, likelihood.sample())
        if step >= _WARM * num_steps:
            total, accepted, counted = total + center(likelihood), accepted + takes, counted + 1
    draws = x.unflatten(0, (num_draws, size))
    mean = (total / counted).unflatten(0, (num_draws, size)).mean(0)
    return Repair(
        torch.where(mask, draws[0], mean), draws, (accepted / counted).unflatten(0, (num_draws, size)).mean(0)
    )


def _width(q: Any) -> Tensor | None:
    """Returns the widths of random steps for real latents; None for others, and where they are not known."""
    if innermost(q.support) is not constraints.real and q.support is not constraints.real_vector:
        return None
    try:
        return q.stddev / math.sqrt(q.event_shape[-1])
    except NotImplementedError:
        return None
