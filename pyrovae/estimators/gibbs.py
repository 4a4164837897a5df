r"""Moves of discrete latents: one after the other is drawn given all others."""

import torch
from torch import Tensor

from pyrovae.estimators.targets import Densities, Discrete, Target

_MAX_VISITS = 64  # discrete latents of a datum that one sweep moves
_LARGEST, _SMALLEST = 2.4, 0.1  # lengths of the steps of counts, in standard deviations


def sweep(target: Target, u: Tensor, at: Densities, beta: Tensor, scale: Tensor) -> tuple[Tensor, Densities]:
    r"""Moves discrete latents, in random order, which leaves :math:`f_\beta` invariant.

    A latent with few values is drawn from the values other than its own, by their probabilities given all other
    latents, and a Metropolis test follows: this changes it more often than Gibbs sampling does. A count takes a step of
    random length up or down, reflected at its bounds, with a Metropolis test. The order is the same for all chains;
    given it, they are independent.

    Args:
        target: the densities.
        u: the chains, ``(chains, batch, dim)``.
        at: the densities at u.
        beta: temperatures, ``(batch,)``.
        scale: standard deviations of u, ``(batch, dim)``.

    References:
        Peskun's Theorem and a Modified Discrete-State Gibbs Sampler, J. S. Liu, 1996,
        https://doi.org/10.1093/biomet/83.3.681.
    """
    discrete = target.discrete
    if discrete is None:
        return u, at
    start, rise = at.start, at.rise
    for i in torch.randperm(len(discrete.sizes))[:_MAX_VISITS].tolist():
        column = discrete.places[i]
        others = _others(discrete, i, u[..., column], scale[:, column])
        proposed = u.expand(len(others), *u.shape).clone()
        proposed[..., column] = others
        values = [t.unflatten(0, others.shape[:2]) for t in target.values(proposed.flatten(0, 1))]
        log_f, log_here = _tempered(values[0], values[1], beta), _tempered(start, rise, beta)
        chosen = torch.zeros_like(log_here, dtype=torch.long)
        if len(others) > 1:  # by the Gumbel trick
            chosen = (log_f - torch.empty_like(log_f).exponential_().log()).argmax(0)
        index = chosen.unsqueeze(0)
        # A chain in one of the other states would draw from all but that one.
        back = log_f.scatter(0, index, log_here.unsqueeze(0)).logsumexp(0)
        accepted = torch.rand_like(log_here).log() < log_f.logsumexp(0) - back  # false for NaN
        start, rise = (
            torch.where(accepted, new.gather(0, index)[0], old) for new, old in zip(values, (start, rise), strict=True)
        )
        u = u.clone()
        u[..., column] = torch.where(accepted, others.gather(0, index)[0], u[..., column])
    return u, target(u) if target.has_gradients else at._replace(start=start, rise=rise)


def _others(discrete: Discrete, i: int, here: Tensor, scale: Tensor) -> Tensor:
    """Returns the values that a latent may move to, ``(values, chains, batch)``."""
    size = discrete.sizes[i]
    if size:
        return (here + torch.arange(1, size, dtype=here.dtype, device=here.device)[:, None, None]) % size
    low, high = discrete.low[:, i].to(here.dtype), discrete.high[:, i].to(here.dtype)
    # Lengths of all orders up to the best one for a normal distribution: other latents may leave little room.
    length = _SMALLEST * (_LARGEST / _SMALLEST) ** torch.rand_like(here) * scale * torch.randn_like(here).abs()
    step = length.round().clamp(min=1) * (2 * torch.randint_like(here, 2) - 1)
    return reflected(here + step, low, high).unsqueeze(0)


def reflected(moved: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns integers inside bounds, reflected half a step beyond them, so that steps there and back are as likely."""
    up, down = moved - low, high - moved
    from_low = low + torch.where(up < 0, -1 - up, up)
    from_high = high - torch.where(down < 0, -1 - down, down)
    size = high - low + 1
    around = up.remainder(2 * size)
    between = low + torch.where(around < size, around, 2 * size - 1 - around)
    inside = torch.where(low.isfinite(), from_low, torch.where(high.isfinite(), from_high, moved))
    return torch.where(size.isfinite(), between, inside)


def _tempered(start: Tensor, rise: Tensor, beta: Tensor) -> Tensor:
    """Returns log f at some temperatures; minus infinity where it is undefined, because neither density is positive."""
    log_f = start + torch.where(beta == 0, 0.0, beta * rise)
    return torch.where(log_f.isnan(), -torch.inf, log_f)
