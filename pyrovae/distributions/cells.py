"""Distributions of the cells of a table: columns of numbers, each on its own scale, and columns of classes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad, softplus

from pyrovae.distributions.elements import center
from pyrovae.distributions.spaces import ShapeLike, keep_checks, support_of

# Of log s, relative to the column. A density cannot run away on a few repeated values.
_MIN_LOG_SCALE, _MAX_LOG_SCALE = -7.0, 2.0


@dataclass(frozen=True)
class Classes:
    """What a distribution must know of a column of classes, which are numbered from 0.

    Args:
        num_classes: how many there are, at least 2.
        is_ordered: whether their order means something.
    """

    num_classes: int
    is_ordered: bool = False


@dataclass(frozen=True)
class Numbers:
    r"""What a distribution must know of a column of numbers, in the units of the data.

    .. math:: u = \frac{g(x) - \mathrm{loc}}{\mathrm{scale}}, \qquad g(x) = x \;\text{or}\; \log(x + \mathrm{shift})

    Args:
        loc: location of g(x).
        scale: scale of g(x), positive.
        shift: the shift in the logarithm; None if g is the identity.
        step: the data are rounded to a grid of this step, and have probabilities; None for data with a density.
        offset: a point of the grid.
        low: the lowest value, a point of the grid if there is one; minus infinity for none. A logarithm has its own.
        high: the highest value, likewise; infinity for none. Without a lowest value only numbers with a step have one.
        spikes: single values that have probabilities of their own.
        cycles: length, and place of 0 in it, of each period (such as a week) that an encoder should see.
    """

    loc: float
    scale: float
    shift: float | None = None
    step: float | None = None
    offset: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    spikes: tuple[float, ...] = ()
    cycles: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not (0 < self.scale < math.inf and self.low < self.high and (self.step is None or self.step > 0)):
            raise ValueError(f"scale and step must be positive, and low below high, got {self}.")
        if self.step is None and math.isfinite(self.high) and not math.isfinite(self.low):
            raise ValueError(f"low must be finite where high is, for numbers without a step; got {self}.")


class Scales(nn.Module):
    """The scales of several columns as tensors, in double precision, because data may be 1e6 +- 1.

    Args:
        columns: the columns: all with a step, or all without.

    >>> Scales([Numbers(1e6, 2.0), Numbers(0.0, 1.0, shift=1.0)]).standardize(torch.tensor([1e6 + 3, 0.0]))
    tensor([1.5000, 0.0000])
    """

    loc: Tensor
    scale: Tensor
    shift: Tensor
    is_log: Tensor
    step: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor
    spikes: Tensor
    is_bounded: Tensor
    low_loc: Tensor
    high_loc: Tensor
    min_log_scale: Tensor
    max_log_scale: Tensor
    typical: Tensor  # a number of each column that a component may give

    def __init__(self, columns: Sequence[Numbers]):
        super().__init__()
        self.columns, self.is_rounded = tuple(columns), columns[0].step is not None
        if any((c.step is not None) != self.is_rounded for c in columns):
            raise ValueError("columns must all have a step, or none of them.")
        self.has_log = any(c.shift is not None for c in columns)
        self.num_spikes = max(len(c.spikes) for c in columns)

        def keep(name: str, values: Sequence, dtype: torch.dtype = torch.float64) -> None:
            # Not among the weights: the schema of a run holds these numbers.
            self.register_buffer(name, torch.tensor(values, dtype=dtype), persistent=False)

        for name in ("loc", "scale", "offset", "low", "high"):
            keep(name, [getattr(c, name) for c in columns])
        keep("shift", [c.shift or 0.0 for c in columns])
        keep("step", [c.step or 1.0 for c in columns])
        keep("is_log", [c.shift is not None for c in columns], torch.bool)
        spikes = [c.spikes + (math.nan,) * (self.num_spikes - len(c.spikes)) for c in columns]  # NaN equals no value
        keep("spikes", spikes, torch.float32)
        # Components are at most as far out as the bounds; then a bound never cuts off nearly all.
        bounded = [c.shift is None and math.isfinite(c.low) for c in columns]
        keep("is_bounded", bounded, torch.bool)
        self.has_bounds = any(bounded)
        ends = [
            ((c.low - c.loc) / c.scale, min((c.high - c.loc) / c.scale, 1e4)) if is_bounded else (-1e4, 1e4)
            for c, is_bounded in zip(columns, bounded, strict=True)
        ]
        keep("low_loc", [low for low, _ in ends], torch.float32)
        keep("high_loc", [high for _, high in ends], torch.float32)
        # exp(scale * s * noise) has a mean for scale * s below 1.
        widest = [_MAX_LOG_SCALE if c.shift is None else min(_MAX_LOG_SCALE, math.log(0.9 / c.scale)) for c in columns]
        keep("max_log_scale", widest, torch.float32)
        keep("min_log_scale", [min(_MIN_LOG_SCALE, w - 1) for w in widest], torch.float32)
        typical = self.place(self.invert(torch.zeros(len(columns))))
        self.register_buffer("typical", typical.float(), persistent=False)

    def standardize(self, x: Tensor) -> Tensor:
        """Returns u in the precision of x, computed in double precision; minus infinity below a logarithm."""
        g = x.double()
        if self.has_log:
            g = torch.where(self.is_log, torch.where(self.is_log, g + self.shift, 1.0).clamp_min(0).log(), g)
        return ((g - self.loc) / self.scale).to(x.dtype)

    def invert(self, u: Tensor) -> Tensor:
        """Returns the x of u, in double precision."""
        g = u.double() * self.scale + self.loc
        return torch.where(self.is_log, g.clamp_max(85.0).exp() - self.shift, g) if self.has_log else g

    def place(self, x: Tensor) -> Tensor:
        """Returns x (in double precision) in the range, and on the grid if there is one."""
        if self.is_rounded:
            x = ((x - self.offset) / self.step).round() * self.step + self.offset
        elif self.has_log:
            x = torch.where(self.is_log, x.maximum(1e-37 - self.shift), x)
        return x.maximum(self.low).minimum(self.high)

    def in_range(self, x: Tensor) -> Tensor:
        """Returns which numbers are in the range, and on the grid if there is one."""
        x = x.double()
        if not self.is_rounded:
            inside = (x >= self.low) & (x <= self.high)
            return (inside & (~self.is_log | (x + self.shift > 0)) if self.has_log else inside) & x.isfinite()
        level = (x - self.offset) / self.step
        # A hundredth of a step, and what single precision rounds away.
        on_grid = (level - level.round()).abs() <= 0.01 + 2e-7 * x.abs() / self.step
        return on_grid & (x > self.low - self.step / 2) & (x < self.high + self.step / 2) & x.isfinite()

    def is_spike(self, x: Tensor) -> Tensor:
        """Returns which numbers are a spike of their column, shape ``(*x.shape, num_spikes)``."""
        return x.unsqueeze(-1) == self.spikes

    def __len__(self) -> int:
        return len(self.columns)


class _Cells(dist.TorchDistribution, ABC):
    """Base of the mixtures of logistic distributions and of single values, for numbers in columns.

    Args:
        logits: of the weights of M components and of the spikes, shape ``(*batch, M + num_spikes)``; the last dimension
            of `batch` are the columns.
        loc: locations of the components in u, shape ``(*batch, M)``.
        log_scale: logarithms of their scales in u, shape ``(*batch, M)``; clamped to the range in which the components
            have means and bounded densities.
        scales: the columns.
    """

    arg_constraints = {}

    def __init__(
        self, logits: Tensor, loc: Tensor, log_scale: Tensor, scales: Scales, validate_args: bool | None = None
    ):
        self.logits, self.scales, self.num_components = logits, scales, loc.shape[-1]
        c = scales
        self.loc = loc.maximum(c.low_loc.unsqueeze(-1)).minimum(c.high_loc.unsqueeze(-1)) if c.has_bounds else loc
        self.log_scale = log_scale.maximum(c.min_log_scale.unsqueeze(-1)).minimum(c.max_log_scale.unsqueeze(-1))
        super().__init__(loc.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "_Cells":
        logits, loc, log_scale = (t.expand(*batch_shape, t.shape[-1]) for t in (self.logits, self.loc, self.log_scale))
        return keep_checks(self, type(self)(logits, loc, log_scale, self.scales, False))

    @constraints.dependent_property(event_dim=0)
    def support(self) -> constraints.Constraint:
        return _NumbersConstraint(self.scales)

    @property
    def log_weights(self) -> Tensor:
        """The logarithms of the weights, those of spikes last."""
        if not self.scales.num_spikes:
            return self.logits.log_softmax(-1)
        unused = pad(self.scales.spikes.isnan(), (self.num_components, 0))
        return self.logits.masked_fill(unused, -math.inf).log_softmax(-1)

    @abstractmethod
    def log_components(self, x: Tensor) -> Tensor:
        """Returns the logarithms of the density or probability of x by component, finite also where x has none."""

    @abstractmethod
    def _has_components(self, x: Tensor, is_spike: Tensor) -> Tensor:
        """Returns where components have a density or probability."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if not self.scales.num_spikes:
            return (self.log_components(value) + self.log_weights).logsumexp(-1)
        is_spike = self.scales.is_spike(value)
        applies = self._has_components(value, is_spike.any(-1))
        inside = torch.where(applies, value, self.scales.typical.to(value.dtype))  # elsewhere gradients would be NaN
        parts = torch.where(applies.unsqueeze(-1), self.log_components(inside), -math.inf)
        single = torch.zeros((), dtype=parts.dtype, device=parts.device).masked_fill(~is_spike, -math.inf)
        parts = torch.cat([parts, single.expand(*parts.shape[:-1], -1)], dim=-1)
        return (parts + self.log_weights).logsumexp(-1)

    @torch.no_grad()
    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        shape, m = self._extended_shape(sample_shape), self.num_components
        weights = self.log_weights.exp()
        choice = torch.multinomial(weights.expand(*shape, -1).reshape(-1, weights.shape[-1]), 1).reshape(*shape, 1)
        component = choice.clamp_max(m - 1)
        loc = self.loc.expand(*shape, m).gather(-1, component).squeeze(-1).double()
        s = self.log_scale.expand(*shape, m).gather(-1, component).squeeze(-1).double().exp()
        x = self.scales.place(self._draw(loc, s)).to(self.loc.dtype)
        if not self.scales.num_spikes:
            return x
        spikes = self.scales.spikes.expand(*shape, -1).to(x.dtype)
        return torch.where(choice.squeeze(-1) < m, x, spikes.gather(-1, (choice - m).clamp_min(0)).squeeze(-1))

    def _draw(self, loc: Tensor, s: Tensor) -> Tensor:
        """Returns a draw of components, before rounding."""
        u = torch.rand_like(loc).clamp(1e-15, 1 - 1e-15)
        return self.scales.invert(loc + s * (u.log() - torch.log1p(-u)))

    @property
    def mean(self) -> Tensor:
        """The mean; of rounded data, that before rounding."""
        weights, m = self.log_weights.exp(), self.num_components
        mean = (weights[..., :m] * self._means().to(weights.dtype)).sum(-1)
        return mean + (weights[..., m:] * self.scales.spikes.nan_to_num()).sum(-1) if self.scales.num_spikes else mean

    def _means(self) -> Tensor:
        """Returns the means of the components, of rounded data before rounding, in double precision."""
        c, s = self.scales, self.log_scale.double().exp()
        loc, scale = self.loc.double() * c.scale.unsqueeze(-1) + c.loc.unsqueeze(-1), s * c.scale.unsqueeze(-1)
        if not c.has_log:
            return loc
        spread = torch.where(c.is_log.unsqueeze(-1), math.pi * scale, 1.0)
        mean = loc.clamp_max(85.0).exp() * spread / spread.sin() - c.shift.unsqueeze(-1)
        return torch.where(c.is_log.unsqueeze(-1), mean.maximum(c.low.unsqueeze(-1)), loc)

    def _ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns bounds relative to the components, (bound - loc) / s, and a mask of the bounded columns."""
        c, s = self.scales, self.log_scale.exp()
        bounded = c.is_bounded.unsqueeze(-1)
        # Where there is no bound, any number, so that gradients stay finite.
        low = torch.where(bounded, c.low_loc.unsqueeze(-1) - self.loc, -1.0)
        high = torch.where(bounded, c.high_loc.unsqueeze(-1) - self.loc, 1.0)
        return low / s, high / s, bounded


class LogisticCells(_Cells):
    r"""Numbers with a density, in columns: mixtures of logistic distributions and of single values.

    .. math:: p(x) = \sum_{m=1}^M \pi_m\, \frac{1}{s_m} h\left(\frac{u - \mu_m}{s_m}\right) \left|\frac{du}{dx}\right|
        + \sum_{j} \pi_{M+j}\, [x = a_j], \qquad h(y) = \sigma(y)\, \sigma(-y)

    The density is in the units of the data, with the Jacobian of their scale; it is of all numbers but the spikes
    :math:`a_j`, which alone have probabilities. At bounds the components are truncated.

    Args:
        logits: of the weights of the M components, then of the spikes, shape ``(*batch, M + num_spikes)``; the last
            dimension of `batch` are the columns.
        loc: :math:`\mu`, relative to the column, shape ``(*batch, M)``.
        log_scale: :math:`\log s`, relative to the column, shape ``(*batch, M)``; clamped to the range in which the
            components have means and bounded densities.
        scales: the columns, without steps.

    >>> scales = Scales([Numbers(loc=100.0, scale=10.0, spikes=(0.0,))])
    >>> p = LogisticCells(torch.zeros(1, 3), torch.zeros(1, 2), torch.zeros(1, 2), scales)
    >>> p.log_prob(torch.tensor([0.0])), p.log_prob(torch.tensor([100.0]))  # log(1/3), log(2/3 / 4 / 10)
    (tensor([-1.0986]), tensor([-4.0943]))
    """

    def log_components(self, x: Tensor) -> Tensor:
        c = self.scales
        y = (c.standardize(x).unsqueeze(-1) - self.loc) * (-self.log_scale).exp()
        g = logsigmoid(y) + logsigmoid(-y) - self.log_scale
        if c.has_bounds:
            a, b, bounded = self._ends()
            g = g - torch.where(bounded, logsigmoid(b) + logsigmoid(-a) + torch.log(-torch.expm1(a - b)), 0.0)
        jacobian = -c.scale.log()
        if c.has_log:
            jacobian = jacobian - torch.where(c.is_log, torch.where(c.is_log, x + c.shift, 1.0).log(), 0.0)
        return g + jacobian.to(g.dtype).unsqueeze(-1)

    def _has_components(self, x: Tensor, is_spike: Tensor) -> Tensor:
        return ~is_spike

    def _draw(self, loc: Tensor, s: Tensor) -> Tensor:
        c = self.scales
        if not c.has_bounds:
            return super()._draw(loc, s)
        low = torch.where(c.is_bounded, ((c.low_loc - loc) / s).sigmoid(), 0.0)
        high = torch.where(c.is_bounded, ((c.high_loc - loc) / s).sigmoid(), 1.0)
        u = (low + (high - low) * torch.rand_like(loc)).clamp(1e-15, 1 - 1e-15)
        return c.invert(loc + s * (u.log() - torch.log1p(-u)))

    def _means(self) -> Tensor:
        if not self.scales.has_bounds:
            return super()._means()
        # By parts: the integral of u dF from a to b is b F(b) - a F(a) less that of F, which is softplus.
        a, b, bounded = (t.double() if t.is_floating_point() else t for t in self._ends())
        share = b.sigmoid() - a.sigmoid()
        y = (b * b.sigmoid() - a * a.sigmoid() - softplus(b) + softplus(a)) / share
        u = self.loc.double() + self.log_scale.double().exp() * y
        return torch.where(
            bounded, u * self.scales.scale.unsqueeze(-1) + self.scales.loc.unsqueeze(-1), super()._means()
        )


class RoundedLogisticCells(_Cells):
    r"""Rounded numbers in columns, such as ages, prices in cents or counts, with probabilities.

    .. math:: P(x) = \sum_{m=1}^M \pi_m \left[\sigma\left(\tfrac{u(x + \delta/2) - \mu_m}{s_m}\right) -
        \sigma\left(\tfrac{u(x - \delta/2) - \mu_m}{s_m}\right)\right] + \sum_{j} \pi_{M+j}\, [x = a_j]

    The lowest and the highest point of the grid of step :math:`\delta`, if there are, have the tails. The difference is
    computed as a product, without cancellation.

    Args:
        logits: of the weights of the M components, then of the spikes, shape ``(*batch, M + num_spikes)``; the last
            dimension of `batch` are the columns.
        loc: :math:`\mu`, relative to the column, shape ``(*batch, M)``.
        log_scale: :math:`\log s`, relative to the column, shape ``(*batch, M)``; clamped to a wide range.
        scales: the columns, with steps.

    References:
        PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications,
        T. Salimans, A. Karpathy, X. Chen and D. P. Kingma, 2017, https://arxiv.org/abs/1701.05517 (for pixels).

    >>> scales = Scales([Numbers(loc=1.0, scale=1.0, shift=1.0, step=1.0, low=0.0)])  # counts
    >>> p = RoundedLogisticCells(torch.zeros(1, 2), torch.tensor([[-0.5, 0.5]]), torch.zeros(1, 2), scales)
    >>> p.log_prob(torch.arange(100_000.0).unsqueeze(-1)).exp().sum()
    tensor(1.0000)
    """

    def log_components(self, x: Tensor) -> Tensor:
        c, exact = self.scales, x.double()
        exact = ((exact - c.offset) / c.step).round() * c.step + c.offset  # undoes rounding to single precision
        first, last = exact <= c.low + c.step / 4, exact >= c.high - c.step / 4
        # Where the interval has no lower end, any number: it is not used.
        below = c.standardize(torch.where(first, exact, exact - c.step / 2))
        above = c.standardize(torch.where(last, exact, exact + c.step / 2))
        width = ((above - below).to(self.loc.dtype)).unsqueeze(-1) * (-self.log_scale).exp()
        below, above = below.to(self.loc.dtype).unsqueeze(-1), above.to(self.loc.dtype).unsqueeze(-1)
        inverse = (-self.log_scale).exp()
        upper = logsigmoid((above - self.loc) * inverse)
        lower = logsigmoid((self.loc - below) * inverse)
        first, last = first.unsqueeze(-1), last.unsqueeze(-1)
        inner = torch.where(first | last, 0.0, torch.log(-torch.expm1(-width.clamp_min(1e-30))))
        return torch.where(last, 0.0, upper) + torch.where(first, 0.0, lower) + inner

    def _has_components(self, x: Tensor, is_spike: Tensor) -> Tensor:
        return self.scales.in_range(x)

    def _means(self) -> Tensor:
        if not self.scales.has_bounds:
            return super()._means()
        # The mean of what is clamped to the bounds is a and the integral of 1 - F from a to b.
        a, b, bounded = (t.double() if t.is_floating_point() else t for t in self._ends())
        u = self.scales.low_loc.unsqueeze(-1) + self.log_scale.double().exp() * (softplus(-a) - softplus(-b))
        return torch.where(
            bounded, u * self.scales.scale.unsqueeze(-1) + self.scales.loc.unsqueeze(-1), super()._means()
        )


class _NumbersConstraint(constraints.Constraint):
    """Each number is in the range of its column, on its grid if there is one, or one of its spikes."""

    def __init__(self, scales: Scales):
        super().__init__()
        self.scales, self.is_discrete = scales, scales.is_rounded

    def check(self, value: Tensor) -> Tensor:
        inside = self.scales.in_range(value)
        return inside | self.scales.is_spike(value).any(-1) if self.scales.num_spikes else inside

    def __repr__(self) -> str:
        return f"columns({', '.join(map(repr, self.scales.columns))})"


class Columns(dist.TorchDistribution):
    r"""The cells of a row, with distributions of different kinds for its columns; independent elements, not one event.

    .. math:: p(x) = \prod_d p_{b(d)}(x_d)

    Its mean has the mode for classes.

    Args:
        parts: distributions whose last batch dimension are some of the columns.
        index: for each part the numbers of its columns; together all from 0 on, each once.
        inverse: the place of each column in the parts concatenated.

    >>> p = Columns([dist.Normal(torch.zeros(1), 1.0), dist.Bernoulli(torch.full((2,), 0.9))], [[1], [0, 2]])
    >>> p.mean
    tensor([0.9000, 0.0000, 0.9000])
    """

    arg_constraints = {}

    def __init__(
        self,
        parts: Sequence[dist.TorchDistribution],
        index: Sequence[Sequence[int] | Tensor],
        inverse: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        self.parts = list(parts)
        self.index = [torch.as_tensor(i) for i in index]
        self.inverse = torch.cat(self.index).argsort() if inverse is None else inverse
        leading = torch.broadcast_shapes(*(p.batch_shape[:-1] for p in parts))
        self.parts = [p if p.batch_shape[:-1] == leading else p.expand(leading + p.batch_shape[-1:]) for p in parts]
        super().__init__(leading + torch.Size([sum(map(len, self.index))]), validate_args=validate_args)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "Columns":
        leading = torch.Size(batch_shape)[:-1]
        parts = [p.expand(leading + p.batch_shape[-1:]) for p in self.parts]
        return keep_checks(self, Columns(parts, self.index, self.inverse, False))

    @constraints.dependent_property(event_dim=0)
    def support(self) -> constraints.Constraint:
        return _ColumnsConstraint(self)

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """Returns values of the parts, columns in the last dimension, as one tensor in the order of the columns."""
        return torch.cat(list(values), dim=-1).index_select(-1, self.inverse)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.join([p.log_prob(value[..., i]) for p, i in zip(self.parts, self.index, strict=True)])

    @torch.no_grad()
    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        return self.join([p.sample(sample_shape) for p in self.parts])

    @property
    def mean(self) -> Tensor:
        return self.join([center(p) for p in self.parts])

    @property
    def filler(self) -> Tensor:
        """A number in the support of each column, to stand for cells left out."""
        fillers = []
        for p, index in zip(self.parts, self.index, strict=True):
            here = p.scales.typical if isinstance(p, _Cells) else torch.zeros(len(index), device=self.inverse.device)
            fillers.append(here)
        return self.join(fillers)


class _ColumnsConstraint(constraints.Constraint):
    """The numbers of each part are in its support."""

    def __init__(self, p: Columns):
        super().__init__()
        self.p, self.supports = p, [support_of(part) for part in p.parts]
        self.is_discrete = all(support.is_discrete for support in self.supports)

    def check(self, value: Tensor) -> Tensor:
        value = value.expand(torch.broadcast_shapes(value.shape, self.p.batch_shape[-1:]))
        return self.p.join([s.check(value[..., i]) for s, i in zip(self.supports, self.p.index, strict=True)])

    def __repr__(self) -> str:
        return f"columns({', '.join(map(repr, self.supports))})"
