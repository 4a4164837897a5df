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
        return _sum_steps(steps, value, self.active)


class RecurrentChain(dist.TorchDistribution):
    r"""A sequence of real vectors. Each depends on a memory of those before it.

    .. math:: p(z_1, \dots, z_T) = \prod_{t=1}^T p(z_t \mid h_{t-1}), \qquad h_t = f(h_{t-1}, z_t)

    All steps of a given value are scored in one call of either function. A sequence may end early, as a
    :class:`MarkovChain`.

    Args:
        start: the memory before the first step, :math:`h_0`, shape ``(*batch, width)``.
        conditional: ``conditional(h, steps)`` returns the distributions of some steps, for their memories h, of shape
            ``(*batch, len(steps), width)``; `steps` is a slice of the steps, counted from 0.
        advance: ``advance(h, z, steps)`` returns the memories after each of some steps, ``(*batch, len(steps),
            width)``, for that before the first of them, ``(*batch, width)``, and z, ``(*batch, len(steps), dim)``.
        num_steps: the number of steps :math:`T`.
        active: which steps are not after the end, shape ``(*batch, num_steps)``; None for all.

    >>> chain = RecurrentChain(
    ...     torch.zeros(5, 2),
    ...     lambda h, steps: dist.Normal(h, 0.1).to_event(1),
    ...     lambda h, z, steps: h.unsqueeze(-2) + z.cumsum(-2),
    ...     10,
    ... )
    >>> chain.rsample().shape, chain.log_prob(torch.zeros(5, 10, 2)).shape
    (torch.Size([5, 10, 2]), torch.Size([5]))
    """

    arg_constraints = {}
    support = constraints.independent(constraints.real, 2)

    def __init__(
        self,
        start: Tensor,
        conditional: Callable[[Tensor, slice], dist.TorchDistribution],
        advance: Callable[[Tensor, Tensor, slice], Tensor],
        num_steps: int,
        active: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        self.start, self.conditional, self.advance = start, conditional, advance
        self.num_steps, self.active = num_steps, active
        self.first = conditional(start.unsqueeze(-2), slice(0, 1))
        self.has_rsample = self.first.has_rsample
        # The last value, with its memories and, where it was drawn, the distributions of its steps.
        self._known: dict[str, Any] = {}
        event_shape = torch.Size((num_steps, *self.first.event_shape))
        super().__init__(start.shape[:-1], event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "RecurrentChain":
        start = self.start.expand(*batch_shape, -1)
        made = RecurrentChain(start, self.conditional, self.advance, self.num_steps, self.active, False)
        made._known = self._known
        return keep_checks(self, made)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        before, h, each, memories, steps = self.first, self.start, [], [], []
        z = before.rsample(sample_shape)
        h = h.expand(*z.shape[:-2], -1)
        noise = None if self.active is None else torch.randn_like(z.expand(*z.shape[:-2], self.num_steps, -1))
        for t in range(self.num_steps):
            here = slice(t, t + 1)
            if t > 0:
                h = self.advance(h, z, slice(t - 1, t)).squeeze(-2)
                before = self.conditional(h.unsqueeze(-2), here)
                z = before.rsample()
            if self.active is not None and noise is not None:
                z = torch.where(self.active[..., here, None], z, noise[..., here, :])
            each.append(before)
            memories.append(h)
            steps.append(z)
        drawn = torch.cat(steps, dim=-2)
        self._known.update(value=drawn, memories=torch.stack(memories, dim=-2), steps=each)
        return drawn

    def memories(self, value: Tensor) -> Tensor:
        """Returns the memories before each step of a value, ``(*batch, num_steps, width)``."""
        if self._known.get("value") is not value:
            h = self.start.expand(*value.shape[:-2], -1)
            memories = h.unsqueeze(-2)
            if self.num_steps > 1:
                later = self.advance(h, value[..., :-1, :], slice(0, self.num_steps - 1))
                memories = torch.cat([memories, later], dim=-2)
            self._known.clear()
            self._known.update(value=value, memories=memories)
        return self._known["memories"]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        h = self.memories(value)
        if "steps" in self._known:
            parts = zip(self._known["steps"], value.unsqueeze(-2).unbind(-3), strict=True)
            steps = torch.cat(torch.broadcast_tensors(*(step.log_prob(z) for step, z in parts)), dim=-1)
        else:
            steps = self.conditional(h, slice(0, self.num_steps)).log_prob(value)
        return _sum_steps(steps, value, self.active)


def _sum_steps(steps: Tensor, value: Tensor, active: Tensor | None) -> Tensor:
    """Returns the sum of the log-densities of steps, where those after the end are standard normal."""
    if active is not None:
        ended = dist.Normal(torch.zeros_like(value), 1.0, validate_args=False).log_prob(value).sum(-1)
        steps = torch.where(active, steps, ended)
    return steps.sum(-1)
