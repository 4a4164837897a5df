"""Distributions of sequences, whose steps are scored in one pass and drawn one after the other."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from pyrovae.distributions.discrete import Categorical
from pyrovae.distributions.elements import center
from pyrovae.distributions.spaces import ShapeLike, keep_checks, support_of


class Decoder(Protocol):
    """What :class:`Autoregressive` needs of a network: one pass for scores, and single steps for draws."""

    out_shape: tuple[int, ...]

    def steps_of(self, x: Tensor) -> Tensor: ...

    def data_of(self, steps: Tensor) -> Tensor: ...

    def score(self, condition: Tensor, x: Tensor | None, read: Tensor | None = None) -> Tensor: ...

    def start(self, condition: Tensor) -> Any: ...

    def next_features(self, state: Any, x: Tensor | None) -> tuple[Tensor, Any]: ...


class Autoregressive(dist.TorchDistribution):
    r"""Sequences whose steps depend on the steps before, or images, whose steps are pixels.

    .. math:: p(x) = \prod_{t=1}^T p(x_t \mid h_t), \qquad h_t = \mathrm{decoder}_t(c, x_1, \dots, x_{t-1})

    All steps are scored in one pass of the decoder. Draws are made step by step, from the state of the decoder. With
    `end`, the class that ends a sequence, every step after it is `end` too with probability one, so that sequences of
    different lengths are padded with it, and the distribution over padded sequences is normalised. The decoder says
    which elements of a datum are a step, and in which order the steps come.

    It has neither mean nor mode that could be computed; :meth:`greedy` is what takes their place in reconstructions.

    Args:
        decoder: the network, one of :class:`pyrovae.nn.SequenceDecoder`.
        output: returns the distribution of a step, events of shape ``step_shape``, of the features of the step.
        condition: c, shape ``(*batch, width)``.
        event_shape: shape of a datum; of a sequence ``(T, *step_shape)``, or ``(T,)`` for steps of shape ``(1,)``.
        end: the class that ends a sequence; None if all steps are free.
        dropout: probability that the decoder does not read a step when it scores.

    References:
        Generating Sentences from a Continuous Space, S. R. Bowman et al., 2016, https://arxiv.org/abs/1511.06349.

    >>> from pyrovae import likelihoods
    >>> p = likelihoods.Autoregressive(2, 5, num_classes=3, end=0)(torch.zeros(4, 2))
    >>> p.log_prob(torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0])).shape
    torch.Size([4])
    >>> p.support.check(torch.tensor([1.0, 2.0, 0.0, 1.0, 0.0]))  # something follows the end
    tensor(False)
    """

    arg_constraints = {"condition": constraints.real_vector}

    def __init__(
        self,
        decoder: Decoder,
        output: Callable[[Tensor], dist.TorchDistribution],
        condition: Tensor,
        event_shape: tuple[int, ...],
        end: int | None = None,
        dropout: float = 0.0,
        validate_args: bool | None = None,
    ):
        self.decoder, self.output, self.condition = decoder, output, condition
        self.end, self.dropout = end, dropout
        super().__init__(condition.shape[:-1], torch.Size(event_shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        with torch.no_grad():
            step = self.output(self.condition.new_zeros(1, self.decoder.out_shape[1]))
        return _Sequences(support_of(step), self.decoder.steps_of, len(self.event_shape), self.end)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "Autoregressive":
        new = self._get_checked_instance(Autoregressive, _instance)
        condition = self.condition.expand(*batch_shape, self.condition.shape[-1])
        Autoregressive.__init__(
            new, self.decoder, self.output, condition, self.event_shape, self.end, self.dropout, validate_args=False
        )
        return keep_checks(self, new)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.log_prob_of_steps(value).sum(-1)

    def log_prob_of_steps(self, value: Tensor) -> Tensor:
        r"""Returns :math:`\log p(x_t \mid x_1, \dots, x_{t-1})` of each step, ``(*batch, T)``, 0 after the end."""
        read = None
        if self.dropout:
            leading = torch.broadcast_shapes(self.batch_shape, value.shape[: value.dim() - len(self.event_shape)])
            read = torch.rand(*leading, self.decoder.out_shape[0], device=value.device) >= self.dropout
        steps = self.output(self.decoder.score(self.condition, value, read))
        log_prob = steps.log_prob(self.decoder.steps_of(value))
        if self.end is None:
            return log_prob
        over = has_ended(value, self.end)
        impossible = over & (value != self.end)
        return torch.where(over, torch.where(impossible, -math.inf, 0.0).to(log_prob.dtype), log_prob)

    @torch.no_grad()
    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        return self.generate(lambda step: step.sample(), sample_shape)

    @torch.no_grad()
    def greedy(self) -> Tensor:
        """Returns the sequences whose every step is the most probable one, or the mean, after the steps before.

        A greedy sequence need not be the most probable one.
        """
        return self.generate(center)

    @torch.no_grad()
    def generate(
        self, choose: Callable[[dist.TorchDistribution], Tensor], sample_shape: ShapeLike = torch.Size()
    ) -> Tensor:
        """Returns sequences that are made step by step by a rule.

        Args:
            choose: returns a step of each sequence, given the distribution of the step.
            sample_shape: leading dimensions of the result.

        Returns:
            Shape ``(*sample_shape, *batch, *event)``.
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        width = self.condition.shape[-1]
        condition = self.condition.expand(*shape, width).reshape(shape.numel(), width)
        state, previous, steps = self.decoder.start(condition), None, []
        over = torch.zeros(len(condition), 1, dtype=torch.bool, device=condition.device)
        for _ in range(self.decoder.out_shape[0]):
            features, state = self.decoder.next_features(state, previous)
            previous = choose(self.output(features))
            if self.end is not None:
                previous = torch.where(over, self.end, previous)
                over = over | (previous == self.end)
            steps.append(previous)
        return self.decoder.data_of(torch.stack(steps, dim=1)).reshape(shape + self.event_shape)


def has_ended(x: Tensor, end: int) -> Tensor:
    """Returns for each step of sequences ``(*leading, T)`` whether one before it is the end."""
    ends = (x == end).cumsum(-1)
    return torch.cat([torch.zeros_like(ends[..., :1]), ends[..., :-1]], dim=-1) > 0


class _Sequences(constraints.Constraint):
    """Sequences of steps in a support; nothing but the end follows the end."""

    def __init__(
        self, step: constraints.Constraint, steps_of: Callable[[Tensor], Tensor], event_dim: int, end: int | None
    ):
        super().__init__()
        self.step, self.steps_of, self.end = step, steps_of, end
        self.event_dim, self.is_discrete = event_dim, step.is_discrete

    def check(self, value: Tensor) -> Tensor:
        inside = self.step.check(self.steps_of(value)).all(-1)
        if self.end is None:
            return inside
        return inside & ~(has_ended(value, self.end) & (value != self.end)).any(-1)

    def __repr__(self) -> str:
        end = "" if self.end is None else f", then only {self.end} after {self.end}"
        return f"sequences({self.step!r}{end})"


def sharpen(p: dist.TorchDistribution, temperature: float = 1.0, top_p: float = 1.0) -> dist.TorchDistribution:
    r"""Returns classes with the improbable ones made rarer or left out, for text that reads better than draws do.

    .. math:: p_\tau(x = k) \propto p(x = k)^{1 / \tau}, \qquad k \in \mathrm{nucleus}

    The nucleus is the smallest set of the most probable classes whose probabilities at this temperature add up to at
    least `top_p`. A sequence of such steps is no draw from the model:
    ``p.generate(lambda step: sharpen(step, 0.8, 0.9).sample())`` makes one of an :class:`Autoregressive`.

    Args:
        p: the distribution of classes, with any event dimensions.
        temperature: :math:`\tau`, positive; below 1 the most probable classes become more frequent.
        top_p: share of the probability that is kept, above 0 and up to 1.

    Raises:
        ValueError: when a number is out of its range.
        TypeError: when `p` is no distribution of classes.

    References:
        The Curious Case of Neural Text Degeneration, A. Holtzman, J. Buys, L. Du, M. Forbes and Y. Choi, 2020,
        https://arxiv.org/abs/1904.09751.

    >>> p = Categorical(probs=torch.tensor([0.5, 0.3, 0.15, 0.05]))
    >>> sharpen(p, top_p=0.7).probs
    tensor([0.6250, 0.3750, 0.0000, 0.0000])
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}.")
    elements = p
    while isinstance(elements, torch.distributions.Independent):
        elements = elements.base_dist
    if not isinstance(elements, torch.distributions.Categorical):
        raise TypeError(f"temperature and top_p are for classes, but p is a {type(elements).__name__}. Draw from it.")
    logits = (elements.logits / temperature).log_softmax(-1)
    if top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # the probability of more probable classes
        logits = logits.masked_fill((before >= top_p).gather(-1, places.argsort(-1)), -math.inf)
    return Categorical(logits=logits).to_event(len(p.event_shape))
