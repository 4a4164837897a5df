"""Paths of states given whole sequences, drawn backward through the particles of a filter."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro import distributions as dist
from torch import Tensor

from pyrovae.inference.messages import warn

_FEW = 10  # particles that hold a distribution
_CHUNK = 2**22  # numbers of the pairs of states that are compared at once


class Smoothed(NamedTuple):
    r"""Draws of the states of sequences given all of their data.

    Args:
        states: equally weighted paths, ``(num_samples, batch, time, latent_dim)``; means and quantiles over the first
            dimension are those of :math:`p(z_t \mid x_1, \dots, x_T)`.
        ess: effective number of particles that hold the states of a step, ``(batch, time)``, between 1 and the number
            of particles; where it is small, the states are unreliable. It does not see what the guide misses: where a
            :class:`pyrovae.estimators.ParticleFilter` is not trusted, the states are not to be trusted either.
    """

    states: Tensor
    ess: Tensor

    def warn_of_few(self, num_particles: int) -> None:
        """Warns where few particles hold the states of a step."""
        few = self.ess < _FEW
        if bool(few.any()):
            row, step = few.nonzero()[0].tolist()
            warn(
                f"fewer than {_FEW} effective particles hold the states of {int(few.sum()):,} of {few.numel():,} "
                f"steps, first of step {step} of sequence {row}: their draws are unreliable. Take more particles: "
                f"num_particles={10 * num_particles}."
            )


def draw_backward(
    particles: list[Tensor],
    log_w: list[Tensor],
    transition: Callable[[Tensor, int], dist.TorchDistribution],
    active: Tensor,
    num_samples: int,
) -> Smoothed:
    """Draws paths of states backward through the particles of a filter, and forward after the end of a sequence.

    Args:
        particles: those of each step, ``(num_particles, batch, latent_dim)``.
        log_w: their log weights given the data so far, ``(num_particles, batch)``.
        transition: ``transition(z, t)`` returns the distribution of the state of step t given that before.
        active: which steps are not after the end, ``(batch, time)``.
        num_samples: the number of paths.
    """
    num_particles, batch, dim = particles[0].shape
    chunk = max(1, _CHUNK // (num_particles * batch * dim))
    path: list[Tensor] = []  # from the last step to the first
    sizes: list[Tensor] = []
    for t in reversed(range(len(particles))):
        filtered, mean_w, drawn = log_w[t].unsqueeze(0), torch.zeros_like(log_w[t]), []
        later = transition(particles[t], t + 1) if path else None
        for start in range(0, num_samples, chunk):
            count = min(chunk, num_samples - start)
            logits = filtered.expand(count, -1, -1)
            if later is not None:
                onward = later.log_prob(path[-1][start : start + count].unsqueeze(1))
                logits = torch.where(active[:, t + 1], logits + onward, logits)
            choice = dist.Categorical(logits=logits.transpose(1, 2))
            index = choice.sample().unsqueeze(-1).expand(-1, -1, dim)
            drawn.append(particles[t].gather(0, index))
            mean_w = mean_w + choice.probs.sum(0).T / num_samples
        path.append(torch.cat(drawn))
        sizes.append(1 / mean_w.square().sum(0))
    path.reverse()
    sizes.reverse()
    for t in range(1, len(path)):
        if not bool(active[:, t].all()):
            ended = ~active[:, t]
            path[t] = torch.where(ended.unsqueeze(-1), transition(path[t - 1], t).sample(), path[t])
            sizes[t] = torch.where(ended, sizes[t - 1], sizes[t])
    return Smoothed(torch.stack(path, dim=-2), torch.stack(sizes, dim=-1))
