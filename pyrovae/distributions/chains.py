"""Distributions of sequences of states."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from pyrovae.distributions.spaces import keep_checks

Transition = Callable[[Tensor, slice], dist.TorchDistribution]


class MarkovChain(dist.TorchDistribution):
    r"""A Markov chain of real vectors; all steps are scored in one call.

    .. math:: p(z_1, \dots, z_T) = p(z_1) \prod_{t=2}^T p(z_t \mid z_{t-1})

    A chain may end early: the steps after its end are standard normal, whatever came before. They cancel in a ratio of
    two chains with the same end.

    Args:
        initial: :math:`p(z_1)`, with events of shape ``(dim,)``.
        transition: ``transition(z, steps)`` returns the distributions of some steps given those before, for z of shape
            ``(*batch, len(steps), dim)``; `steps` is a slice of the steps, counted from 0.
        num_steps: the number of steps :math:`T`.
        active: which steps are not after the end, shape ``(*batch, num_steps)``; None for all.

    >>> walk = MarkovChain(
    ...     dist.Normal(torch.zeros(5, 2), 1.0).to_event(1), lambda z, steps: dist.Normal(z, 0.1).to_event(1), 10
    ... )
    >>> walk.rsample().shape, walk.log_prob(torch.zeros(5, 10, 2)).shape
    (torch.Size([5, 10, 2]), torch.Size([5]))
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)

    def __init__(
        self,
        initial: dist.TorchDistribution,
        transition: Transition,
        num_steps: int,
        active: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        self.initial, self.transition, self.num_steps, self.active = initial, transition, num_steps, active
        self.has_rsample = initial.has_rsample
        self._drawn: tuple[Tensor | None, list[dist.TorchDistribution]] = (None, [])
        super().__init__(
            initial.batch_shape, torch.Size((num_steps, *initial.event_shape)), validate_args=validate_args
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MarkovChain":
        initial = self.initial.expand(batch_shape)
        return keep_checks(self, MarkovChain(initial, self.transition, self.num_steps, self.active, False))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        before, z, each = self.initial, self.initial.rsample(sample_shape), []
        # In place of the steps after the end. One call for all, so that their number does not matter.
        shape = self._extended_shape(sample_shape)
        noise = None if self.active is None else torch.randn(shape, dtype=z.dtype, device=z.device).unbind(-2)
        steps = []
        for t in range(self.num_steps):
            if t > 0:
                before = self.transition(z.unsqueeze(-2), slice(t, t + 1))
                z = before.rsample().squeeze(-2)
            each.append(before)
            if self.active is not None and noise is not None:
                z = torch.where(self.active[..., t, None], z, noise[t])
            steps.append(z)
        drawn = torch.stack(steps, dim=-2)
        # The steps as they were drawn score this value without calling the transition again.
        self._drawn = (drawn, each)
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        drawn, each = self._drawn
        if value is drawn:
            terms = [each[0].log_prob(value[..., 0, :])]
            values = value.unsqueeze(-2).unbind(-3)
            terms += [step.log_prob(z).squeeze(-1) for step, z in zip(each[1:], values[1:], strict=True)]
            steps = torch.stack(torch.broadcast_tensors(*terms), dim=-1)
        else:
            steps = self.initial.log_prob(value[..., 0, :]).unsqueeze(-1)
            if self.num_steps > 1:
                later = self.transition(value[..., :-1, :], slice(1, self.num_steps)).log_prob(value[..., 1:, :])
                steps = torch.cat([steps.expand(*later.shape[:-1], 1), later], dim=-1)
        if self.active is not None:
            ended = dist.Normal(torch.zeros_like(value), 1.0, validate_args=False).log_prob(value).sum(-1)
            steps = torch.where(self.active, steps, ended)
        return steps.sum(-1)
