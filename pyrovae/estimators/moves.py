r"""Moves of annealed chains: Hamiltonian dynamics, sweeps, resampling, and the choice of the next temperature."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.estimators.gibbs import sweep
from pyrovae.estimators.targets import Densities, Target

_DIVERGED = 1000.0  # energy error in nats beyond which a move counts as divergent, as in Stan


class Moved(NamedTuple):
    """Latents after a move, their densities, the acceptance probability, and whether Hamiltonian dynamics diverged."""

    u: Tensor
    at: Densities
    acceptance: Tensor
    diverged: Tensor


def move(
    target: Target, u: Tensor, at: Densities, beta: Tensor, step: Tensor, scale: Tensor, num_leapfrog: int
) -> Moved:
    r"""Moves continuous latents by Hamiltonian dynamics, then discrete ones one by one; :math:`f_\beta` is invariant.

    Without continuous latents, the acceptance probability is NaN.

    Args:
        target: the densities.
        u: the chains, ``(chains, batch, dim)``.
        at: the densities at u.
        beta: temperatures, ``(batch,)``.
        step: step sizes, ``(batch,)``.
        scale: standard deviations of u, ``(batch, dim)``, which scale the steps.
        num_leapfrog: leapfrog steps.
    """
    if target.has_gradients:
        moved = _hamiltonian(target, u, at, beta, step, scale, num_leapfrog)
    else:
        moved = Moved(u, at, torch.full_like(at.rise, math.nan), torch.zeros_like(at.rise, dtype=torch.bool))
    u, at = sweep(target, moved.u, moved.at, beta, scale)
    return moved._replace(u=u, at=at)


def _hamiltonian(
    target: Target, u: Tensor, at: Densities, beta: Tensor, step: Tensor, scale: Tensor, num_leapfrog: int
) -> Moved:
    """Moves chains by Hamiltonian dynamics with a Metropolis test; on spheres along great circles.

    References:
        Geodesic Monte Carlo on Embedded Manifolds, S. Byrne and M. Girolami, 2013, https://arxiv.org/abs/1301.6064.
    """
    # Random lengths: trajectories of a fixed length may be periodic.
    size = step.unsqueeze(-1) * scale * torch.empty_like(u[..., :1]).uniform_(0.8, 1.2)
    temperature = beta.unsqueeze(-1)

    def push(at: Densities, u: Tensor, momentum: Tensor, share: float) -> Tensor:
        gradient = target.tangent(u, at.start_gradient + temperature * at.rise_gradient)
        return momentum + share * size * gradient

    def energy(at: Densities, momentum: Tensor) -> Tensor:
        return 0.5 * momentum.square().sum(-1) - at.start - beta * at.rise

    momentum = target.tangent(u, torch.randn_like(u))
    moved, there = u, at
    pushed = push(at, u, momentum, 0.5)
    for i in range(num_leapfrog):
        moved, pushed = target.flow(moved, pushed, size)
        there = target(moved)
        pushed = push(there, moved, pushed, 1.0 if i < num_leapfrog - 1 else 0.5)
    error = energy(there, pushed) - energy(at, momentum)
    error = torch.where(error.isnan(), math.inf, error)
    acceptance = (-error).exp().clamp(max=1.0)
    accepted = torch.rand_like(acceptance) < acceptance
    at = Densities(*(torch.where(_like(accepted, old), new, old) for new, old in zip(there, at, strict=True)))
    return Moved(torch.where(_like(accepted, u), moved, u), at, acceptance, error > _DIVERGED)


def _like(chains: Tensor, t: Tensor) -> Tensor:
    return chains.unsqueeze(-1) if t.dim() > chains.dim() else chains


def next_temperature(beta: Tensor, rise: Tensor, kept: float) -> tuple[Tensor, Tensor]:
    """Returns the temperature up to which weights keep a share of their effective sample size, and the log weights.

    By bisection; temperatures rise by at least 0.001, so that they reach 1.

    Args:
        beta: temperatures, ``(batch,)``.
        rise: log-density of the posterior minus that of the start, ``(chains, batch)``.
        kept: share of the effective sample size.
    """
    rise = rise.double()

    def share(step: Tensor) -> Tensor:
        log_w = step * rise
        return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp() / len(rise)

    low, high = torch.zeros_like(rise[0]), 1 - beta.double()
    whole = share(high) >= kept
    for _ in range(30):
        middle = 0.5 * (low + high)
        enough = share(middle) >= kept
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    step = torch.where(whole, 1 - beta.double(), torch.minimum(low.clamp(min=1e-3), 1 - beta.double()))
    after = torch.where(whole, torch.ones_like(beta), (beta + step).to(beta).clamp(max=1.0))
    return after, step * rise


def resample(
    u: Tensor, at: Densities, log_w: Tensor, log_z: Tensor, always: bool = False
) -> tuple[Tensor, Densities, Tensor, Tensor]:
    """Resamples chains systematically by their log weights, for each run and datum with a low effective sample size.

    Args:
        u: the chains, ``(runs * particles, batch, dim)``.
        at: the densities at u.
        log_w: log weights, ``(runs, particles, batch)``.
        log_z: log normalising constants so far, ``(runs, batch)``.
        always: whether to resample whatever the effective sample size.

    Returns:
        The chains, their densities, the log weights, 0 where resampled, and `log_z` plus their mean weight.
    """
    runs, n, batch = log_w.shape
    total = log_w.logsumexp(1)
    ess = (2 * total - (2 * log_w).logsumexp(1)).exp()
    needed = total > -math.inf
    if not always:
        needed = needed & (ess < 0.5 * n)
    cumulated = (log_w - total.unsqueeze(1)).exp().cumsum(1).movedim(1, -1).contiguous()
    positions = torch.rand(runs, batch, 1, dtype=log_w.dtype, device=log_w.device) + torch.arange(
        n, device=log_w.device
    )
    chosen = torch.searchsorted(cumulated, positions / n).clamp(max=n - 1).movedim(-1, 1)
    unchanged = torch.arange(n, device=log_w.device).view(1, n, 1)
    chosen = torch.where(needed.unsqueeze(1), chosen, unchanged)

    def take(t: Tensor) -> Tensor:
        index = chosen if t.dim() == 2 else chosen.unsqueeze(-1).expand(-1, -1, -1, t.shape[-1])
        return t.unflatten(0, (runs, n)).gather(1, index).flatten(0, 1)

    log_z = torch.where(needed, log_z + total - math.log(n), log_z)
    return take(u), Densities(*map(take, at)), torch.where(needed.unsqueeze(1), 0.0, log_w), log_z
