"""Distributions that neither torch nor Pyro has, each a Pyro distribution like any other."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn

__all__ = [
    "BatchScaleNormal",
    "Beta",
    "Blocks",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Gamma",
    "IndependentBernoulli",
    "MaskedElements",
    "Multinomial",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "center",
    "grid",
    "mask_elements",
    "open_unit_interval",
]


def center(p: dist.TorchDistribution) -> Tensor:
    """Returns the mean of a distribution, or its mode where it has no finite mean (classes, heavy tails).

    >>> center(dist.Categorical(torch.tensor([0.1, 0.2, 0.7])))
    tensor(2.)
    """
    mean = p.mean
    return mean if bool(torch.isfinite(mean).all()) else torch.where(torch.isfinite(mean), mean, p.mode.to(mean.dtype))


class Stacked(dist.TorchDistribution):
    r"""Distributions of one shape as one, with a dimension for them in front of the plates'.

    .. math:: p(x_1, \dots, x_K) = \prod_k p_k(x_k)

    Args:
        parts: the distributions.
        depth: how many dimensions of plates come after theirs.

    >>> p = Stacked([dist.Normal(torch.zeros(5), 1.0), dist.Normal(torch.ones(5), 1.0)], depth=1)
    >>> p.log_prob(torch.tensor([[0.0], [1.0]])).shape
    torch.Size([2, 5])
    """

    arg_constraints = {}

    def __init__(self, parts: Sequence[dist.TorchDistribution], depth: int):
        self.parts = tuple(parts)
        own = torch.broadcast_shapes(*(part.batch_shape for part in self.parts))
        shape = torch.Size((len(self.parts), *(1,) * (depth - len(own)), *own))
        super().__init__(shape, self.parts[0].event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return all(part.has_rsample for part in self.parts)

    @property
    def support(self) -> constraints.Constraint:
        return self.parts[0].support

    @property
    def mean(self) -> Tensor:
        return self._stack([part.mean for part in self.parts], self.event_shape)

    @property
    def mode(self) -> Tensor:
        return self._stack([part.mode for part in self.parts], self.event_shape)

    @property
    def variance(self) -> Tensor:
        return self._stack([part.variance for part in self.parts], self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        event = self.event_shape
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + event))
        each = value.unbind(value.dim() - len(event) - len(self.batch_shape))
        return self._stack([part.log_prob(x) for part, x in zip(self.parts, each, strict=True)], torch.Size(), value)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self._draw("rsample", torch.Size(sample_shape))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        with torch.no_grad():
            return self._draw("sample", torch.Size(sample_shape))

    def _draw(self, how: str, sample_shape: torch.Size) -> Tensor:
        own = sample_shape + self.batch_shape[1:] + self.event_shape
        drawn = [getattr(part, how)(sample_shape) for part in self.parts]
        lead = len(self.event_shape) + len(self.batch_shape) - 1
        apart = [x.reshape(sample_shape + (1,) * (len(own) - x.dim()) + x.shape[len(sample_shape) :]) for x in drawn]
        return torch.stack([x.expand(own) for x in apart], dim=-lead - 1)

    def _stack(self, each: list[Tensor], event: torch.Size, value: Tensor | None = None) -> Tensor:
        outer = torch.Size() if value is None else value.shape[: value.dim() - len(self.batch_shape + self.event_shape)]
        own = outer + self.batch_shape[1:] + event
        return torch.stack([x.expand(own) for x in each], dim=len(outer))


class IndependentBernoulli(dist.Independent):
    r"""``Bernoulli(logits=...).to_event(n)`` with a log-probability several times as fast, to the same rounding.

    .. math:: \log p(x) = \sum_d \left(x_d l_d - \max(l_d, 0)\right)
        - \sum_g \log \prod_{d \in g} \left(1 + e^{-|l_d|}\right)

    One logarithm serves a group g of up to 64 dimensions: every factor is in (1, 2], so the product cannot overflow.

    Args:
        base_distribution: a Bernoulli distribution.
        reinterpreted_batch_ndims: how many of its batch dimensions are event dimensions.

    >>> logits, x = torch.tensor([[-2.0, 0.5, 3.0]]), torch.tensor([0.0, 1.0, 1.0])
    >>> IndependentBernoulli(dist.Bernoulli(logits=logits), 1).log_prob(x)
    tensor([-0.6496])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        event_dims = self.reinterpreted_batch_ndims
        if event_dims == 0:
            return super().log_prob(value)
        if self._validate_args:
            self.base_dist._validate_sample(value)
        logits = self.base_dist.logits
        logits, value = torch.broadcast_tensors(logits, value.to(logits.dtype))
        return _BernoulliLogProb.apply(logits.flatten(-event_dims), value.flatten(-event_dims))


class _BernoulliLogProb(torch.autograd.Function):
    """The sum over the last dimension, with its derivatives x - sigmoid(l) by l and l by x instead of a product's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, x: Tensor) -> Tensor:
        size = logits.shape[-1]
        group = max(n for n in range(1, 65) if size % n == 0)
        factors = logits.abs().neg_().exp_().add_(1).unflatten(-1, (group, -1))
        return (x * logits).sub_(logits.relu()).sum(-1) - factors.prod(-2).log_().sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits, x = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        by_logits = grad * (x - logits.sigmoid()) if ctx.needs_input_grad[0] else None
        return by_logits, grad * logits if ctx.needs_input_grad[1] else None


# ------------------------------------------------------------------------------------------- spaces of observations


class _OpenUnitInterval(type(constraints.unit_interval)):
    """The numbers above 0 and below 1."""

    def __init__(self):
        super().__init__(0.0, 1.0)

    def check(self, value: Tensor) -> Tensor:
        return (value > 0) & (value < 1)

    def __repr__(self) -> str:
        return "the open interval (0, 1)"


open_unit_interval = _OpenUnitInterval()


class grid(constraints.Constraint):  # lower case, as constraints with arguments are in torch
    """The numbers ``k / (levels - 1)`` for k from 0 to ``levels - 1``, to a hundredth of a level."""

    is_discrete = True

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        level = value * (self.levels - 1)
        return ((level - level.round()).abs() < 0.01) & (level > -0.01) & (level < self.levels - 0.99)

    def __repr__(self) -> str:
        return f"grid(levels={self.levels})"


# -------------------------------------------------------------------------------------- distributions of one number


class Categorical(dist.Categorical):
    """Pyro's categorical distribution with floating-point samples, as data are for the networks that take them.

    >>> Categorical(logits=torch.tensor([0.0, 100.0])).sample()
    tensor(1.)
    """

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, torch's own default
        return super().sample(sample_shape).to(self.logits.dtype)


class ContinuousBernoulli(dist.ContinuousBernoulli):
    r"""Torch's continuous Bernoulli distribution, computed from its logits so that it is right for all of them.

    .. math:: p(x) = \frac{l}{e^l - 1} e^{l x}, \qquad 0 \le x \le 1

    Torch goes through the probability: its density is wrong where that rounds to 0 or 1 (logits beyond 16 in single
    precision), and it loses digits and most of the gradient's where that is near one half.

    Args:
        logits: :math:`l`, any real number.

    References:
        The Continuous Bernoulli: Fixing a Pervasive Error in Variational Autoencoders, G. Loaiza-Ganem and J. P.
        Cunningham, 2019, https://arxiv.org/abs/1907.06845.

    >>> ContinuousBernoulli(logits=torch.tensor([-50.0, 0.0, 50.0])).log_prob(torch.tensor(0.5))
    tensor([-21.0880,   0.0000, -21.0880])
    """

    # The series of log(sinh(l/2) / (l/2)) in powers of l^2, Bernoulli numbers by factorials.
    _SERIES = (1 / 24, -1 / 2880, 1 / 181440, -1 / 9676800, 1 / 479001600, -691 / 15692092416000)
    _SMALL = 0.4

    def _magnitude(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns |l|, where it is small, and |l| with 1 put there."""
        size = self.logits.abs()
        small = size < self._SMALL
        return size, small, torch.where(small, torch.ones_like(size), size)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        size, small, large = self._magnitude()
        square = self.logits.square().clamp_max(1)  # beyond, the series is not used and must not overflow
        near = sum(c * square**n for n, c in enumerate(self._SERIES, 1))
        far = torch.log(-torch.expm1(-large) / large)
        from_the_mode = torch.where(self.logits < 0, value, 1 - value)
        return torch.where(small, (value - 0.5) * self.logits - near, -from_the_mode * size - far)

    @property
    def mean(self) -> Tensor:
        _, small, large = self._magnitude()
        near = sum(2 * n * c * self.logits.clamp(-1, 1) ** (2 * n - 1) for n, c in enumerate(self._SERIES, 1))
        far = 1 / large + torch.exp(-large) / torch.expm1(-large)  # for negative logits; the others mirror them
        return torch.where(small, 0.5 + near, torch.where(self.logits < 0, far, 1 - far))

    @property
    def variance(self) -> Tensor:
        _, small, large = self._magnitude()
        square = self.logits.square().clamp_max(1)
        near = sum(2 * n * (2 * n - 1) * c * square ** (n - 1) for n, c in enumerate(self._SERIES, 1))
        far = large**-2 - torch.exp(-large) / torch.expm1(-large).square()
        return torch.where(small, near, far)

    def cdf(self, value: Tensor) -> Tensor:
        value, size = value.clamp(0, 1), self.logits.abs().clamp_min(1e-20)
        from_zero = torch.expm1(-size * torch.where(self.logits < 0, value, 1 - value)) / torch.expm1(-size)
        return torch.where(self.logits < 0, from_zero, 1 - from_zero)

    def icdf(self, value: Tensor) -> Tensor:
        size = self.logits.abs().clamp_min(1e-20)
        tail = torch.where(self.logits < 0, value, 1 - value)
        from_zero = (torch.log1p(tail * torch.expm1(-size)) / -size).clamp(0, 1)
        return torch.where(self.logits < 0, from_zero, 1 - from_zero)

    def entropy(self) -> Tensor:
        return -self.log_prob(self.mean)  # log p is linear in x


class Beta(dist.Beta):
    """Torch's beta distribution with its support as the density has it, open: at 0 and at 1 it may be infinite.

    >>> Beta(2.0, 0.5).support.check(torch.tensor([0.0, 0.5, 1.0]))
    tensor([False,  True, False])
    """

    support = open_unit_interval

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, torch's own default
        x = super().rsample(sample_shape)
        info = torch.finfo(x.dtype)
        return x.clamp(info.tiny, 1 - info.eps / 2)  # rounding may put a draw on the boundary


class Gamma(dist.Gamma):
    """Torch's gamma distribution with 0 outside its support: there it is 0 or infinite, but for a concentration of 1.

    >>> Gamma(1.0, 1.0).support.check(torch.tensor([0.0, 0.5]))
    tensor([False,  True])
    """

    support = constraints.positive


class StudentT(dist.StudentT):
    """Torch's Student t distribution, whose log-density keeps its digits for many degrees of freedom.

    >>> StudentT(torch.tensor(1e8)).log_prob(torch.tensor(0.0))  # the normal distribution's
    tensor(-0.9189)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        half, z = self.df / 2, (value - self.loc) / self.scale
        constant = _log_rising(half, torch.full_like(half, 0.5)) - 0.5 * (math.pi * self.df).log() - self.scale.log()
        return constant - (half + 0.5) * torch.log1p(z.square() / self.df)


class Poisson(dist.Poisson):
    r"""Torch's Poisson distribution by the logarithm of its rate, which keeps its digits at large counts.

    .. math:: \log p(x) = x \log \mu - \mu - \log x!

    whose terms are some :math:`\mu \log \mu` large and nearly cancel: they are formed in double precision.

    Args:
        log_rate: :math:`\log \mu`, any real number.

    >>> Poisson(torch.tensor(1e6).log()).log_prob(torch.tensor(1e6))  # -log(2 pi 1e6) / 2
    tensor(-7.8267)
    """

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None):
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance=None) -> dist.TorchDistribution:
        return Poisson(self.log_rate.expand(batch_shape), False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_rate, x = self.log_rate.double(), value.double()
        return (x * log_rate - log_rate.exp() - torch.lgamma(1 + x)).to(self.log_rate.dtype)


class NegativeBinomial(dist.NegativeBinomial):
    r"""Torch's negative binomial distribution, whose log-probability keeps its digits.

    Torch's loses them at large counts, and as it tends to a Poisson's. Here terms that nearly cancel are formed in
    double precision.

    Args:
        total_count: :math:`\theta`.
        logits: :math:`\log \mu - \log \theta` for a mean of :math:`\mu`.
        log_mean: :math:`\log \mu` instead, which keeps what rounding takes from the difference.

    >>> p = NegativeBinomial(torch.tensor(1e7), logits=torch.tensor(2e-7).log())  # a Poisson's with rate 2
    >>> p.log_prob(torch.arange(30.0)).exp().sum()
    tensor(1.0000)
    """

    def __init__(
        self,
        total_count: Tensor,
        logits: Tensor | None = None,
        *,
        log_mean: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        if (logits is None) == (log_mean is None):
            raise ValueError("Give either logits or log_mean, not both.")
        self.log_mean, self._theta = log_mean, total_count  # as given: what many logits share is computed once
        logits = log_mean - total_count.log() if logits is None else logits
        super().__init__(total_count, logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance=None) -> dist.TorchDistribution:
        if self.log_mean is not None:
            return NegativeBinomial(self._theta, log_mean=self.log_mean.expand(batch_shape), validate_args=False)
        return NegativeBinomial(self._theta, self.logits.expand(batch_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        theta, x = self._theta.double(), value.double()
        logits = self.logits.double() if self.log_mean is None else self.log_mean.double() - theta.log()
        trials = x * logits + (theta + x) * nn.functional.logsigmoid(-logits)
        return (trials + _log_rising(theta, x) - torch.lgamma(1 + x)).to(self.logits.dtype)


class ZeroInflatedNegativeBinomial(dist.TorchDistribution):
    r"""A negative binomial count that is lost, and reads zero, with some probability.

    .. math:: p(x) = \pi [x = 0] + (1 - \pi)\, \mathrm{NB}(x), \qquad \pi = \sigma(g)

    Pyro's computes another formula once it has been sampled from, one that fails where the gate rounds to 0 or 1, and
    can then not be expanded.

    Args:
        total_count: of :class:`NegativeBinomial`.
        logits: of :class:`NegativeBinomial`.
        gate_logits: g.
        log_mean: of :class:`NegativeBinomial`, instead of its `logits`, which are None then.

    >>> p = ZeroInflatedNegativeBinomial(torch.tensor(1.0), torch.tensor(0.0), torch.tensor([0.0, 100.0]))
    >>> p.log_prob(torch.tensor(0.0)).exp(), p.log_prob(torch.tensor(1.0))
    (tensor([0.7500, 1.0000]), tensor([  -2.0794, -101.3863]))
    """

    arg_constraints: ClassVar = {"gate_logits": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(
        self,
        total_count: Tensor,
        logits: Tensor | None,
        gate_logits: Tensor,
        *,
        log_mean: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        counts = NegativeBinomial(total_count, logits, log_mean=log_mean, validate_args=validate_args)
        shape = torch.broadcast_shapes(counts.batch_shape, gate_logits.shape)
        self.counts = counts if counts.batch_shape == shape else counts.expand(shape)
        self.gate_logits = gate_logits.expand(shape)
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance=None) -> dist.TorchDistribution:
        new = self._get_checked_instance(ZeroInflatedNegativeBinomial, _instance)
        new.counts, new.gate_logits = self.counts.expand(batch_shape), self.gate_logits.expand(batch_shape)
        super(ZeroInflatedNegativeBinomial, new).__init__(torch.Size(batch_shape), validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        lost, kept = nn.functional.logsigmoid(self.gate_logits), nn.functional.logsigmoid(-self.gate_logits)
        counted = kept + self.counts.log_prob(value)
        return torch.where(value == 0, torch.logaddexp(lost, counted), counted)

    @property
    def mean(self) -> Tensor:
        return (-self.gate_logits).sigmoid() * self.counts.mean

    @property
    def variance(self) -> Tensor:
        square = self.counts.variance + self.counts.mean.square()
        return (-self.gate_logits).sigmoid() * square - self.mean.square()

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, torch's own default
        x = self.counts.sample(sample_shape)
        return torch.where(torch.bernoulli(self.gate_logits.sigmoid().expand(x.shape)) == 1, 0.0, x)


def _log_rising(a: Tensor, b: Tensor) -> Tensor:
    r"""Returns :math:`\log \Gamma(a + b) - \log \Gamma(a)`, a difference that has no digits left if a is large."""
    b, large = b.to(a.dtype), a > 50

    def series(y: Tensor) -> Tensor:  # Stirling's
        return (1 / 12 - (1 / 360 - 1 / 1260 / y.square()) / y.square()) / y

    far = torch.where(large, a, torch.full_like(a, 50.0))
    stirling = (far - 0.5) * torch.log1p(b / far) + b * (far + b).log() - b + series(far + b) - series(far)
    near = torch.where(large, torch.ones_like(a), a)
    return torch.where(large, stirling, torch.lgamma(near + b) - torch.lgamma(near))


class DiscretizedLogistic(dist.TorchDistribution):
    r"""A logistic distribution rounded to a grid; the first and last levels take the tails.

    .. math:: P\left(\tfrac{k}{L - 1}\right) = \sigma(b_k) - \sigma(a_k)
        = \sigma(b_k)\, \sigma(-a_k) \left(1 - e^{a_k - b_k}\right), \qquad
        a_k, b_k = \left(\tfrac{k \mp 1/2}{L - 1} - \mu\right) / s, \quad a_0 = -\infty, \; b_{L-1} = \infty

    The product is exact for any location and scale: no difference of nearly equal numbers, no floor.

    Args:
        loc: :math:`\mu`, on the scale of the data.
        scale: :math:`s`, positive.
        levels: :math:`L`, the number of grid points from 0 to 1.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow, D. P. Kingma et al., 2016,
        https://arxiv.org/abs/1606.04934.

    >>> p = DiscretizedLogistic(torch.tensor(0.3), torch.tensor(0.1), levels=4)
    >>> p.log_prob(torch.tensor([0, 1 / 3, 2 / 3, 1])).exp()
    tensor([0.2086, 0.6722, 0.1144, 0.0048])
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, loc: Tensor, scale: Tensor, levels: int = 256, validate_args: bool | None = None):
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        return grid(self.levels)

    def expand(self, batch_shape: torch.Size, _instance=None) -> dist.TorchDistribution:
        return DiscretizedLogistic(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels, False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        steps = self.levels - 1
        level = (value * steps).round()
        below = ((level - 0.5) / steps - self.loc) / self.scale
        above = ((level + 0.5) / steps - self.loc) / self.scale
        zero = torch.zeros_like(above)
        first, last = level <= 0, level >= steps
        upper = torch.where(last, zero, nn.functional.logsigmoid(above))
        lower = torch.where(first, zero, nn.functional.logsigmoid(-below))
        width = torch.log(-torch.expm1(-1 / (steps * self.scale)))
        return upper + lower + torch.where(first | last, zero, width)

    def _tails(self) -> Iterator[tuple[int, Tensor]]:
        """Yields each level k from 1 on, and the probability that the level is k or above."""
        steps = self.levels - 1
        for k in range(1, self.levels):  # one level at a time: all at once would take `levels` times the memory
            yield k, torch.sigmoid((self.loc - (k - 0.5) / steps) / self.scale)

    @property
    def mean(self) -> Tensor:
        return sum(tail for _, tail in self._tails()) / (self.levels - 1)

    @property
    def variance(self) -> Tensor:
        square = sum((2 * k - 1) * tail for k, tail in self._tails()) / (self.levels - 1) ** 2
        return (square - self.mean.square()).clamp_min(0)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, torch's own default
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        u = u.clamp_min(torch.finfo(u.dtype).tiny)
        steps = self.levels - 1
        return ((self.loc + self.scale * (u.log() - torch.log1p(-u))) * steps).round().clamp(0, steps) / steps


class BatchScaleNormal(dist.Normal):
    r"""A normal distribution whose log-probability, while learning, takes the best single scale for what it is given.

    .. math:: \sigma^2 = \frac{1}{N} \sum_{i=1}^N (x_i - \mu_i)^2

    over all N numbers: particles, data and dimensions. The sum of the log-probabilities is then the largest that one
    scale can give, and each depends on all the numbers. When it is not learning it is a normal distribution.

    Args:
        loc: :math:`\mu`.
        scale: the scale for samples, and for log-probabilities when not learning.
        learn: called with each :math:`\sigma^2`, detached; None when not learning.
        observed: which numbers count, of a shape that broadcasts with `loc`; None for all.

    >>> found = []
    >>> p = BatchScaleNormal(torch.zeros(2), torch.ones(()), found.append)
    >>> p.log_prob(torch.tensor([1.0, 7.0])).sum(), found
    (tensor(-6.0568), [tensor(25.)])
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        learn: Callable[[Tensor], None] | None = None,
        observed: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        self.learn, self.observed = learn, observed
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance=None) -> dist.TorchDistribution:
        return BatchScaleNormal(
            self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.learn, self.observed, False
        )

    def log_prob(self, value: Tensor) -> Tensor:
        if self.learn is None:
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        square = (value - self.loc).square()
        if self.observed is None:
            variance = square.mean()
        else:
            observed = self.observed.expand(square.shape)
            variance = torch.where(observed, square, 0.0).sum() / observed.sum().clamp_min(1)
        variance = variance.clamp_min(1e-12)  # a perfect fit has no finite density
        self.learn(variance.detach())
        return -0.5 * (square / variance + variance.log() + math.log(2 * math.pi))


# ---------------------------------------------------------------------------------- distributions of several numbers


class Multinomial(dist.TorchDistribution):
    r"""Counts given their total, which is each datum's own.

    .. math:: \log p(x \mid n) = \log \frac{n!}{\prod_d x_d!} + \sum_d x_d \log \pi_d, \qquad n = \sum_d x_d, \quad
        \pi = \mathrm{softmax}(l)

    Torch's wants one total for all data. Here the log-probability takes the total from what it is given, so that it
    sums to one over all counts of any one total.

    Args:
        total_count: the total of samples and of the mean.
        logits: :math:`l`, normalised or not.
        event_dim: how many of the last dimensions of the logits are one datum.
        observed: which dimensions count, of a shape that broadcasts with the logits; None for all.

    >>> p = Multinomial(10, torch.zeros(3))
    >>> p.log_prob(torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])).exp()
    tensor([0.1111, 0.2222])
    """

    arg_constraints: ClassVar = {}

    def __init__(
        self,
        total_count: int,
        logits: Tensor,
        event_dim: int = 1,
        observed: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        self.total_count, self.observed = total_count, observed
        self.logits = logits
        cut = logits.dim() - event_dim
        super().__init__(logits.shape[:cut], logits.shape[cut:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True)
    def support(self):
        return constraints.independent(constraints.nonnegative_integer, len(self.event_shape))

    def expand(self, batch_shape: torch.Size, _instance=None) -> dist.TorchDistribution:
        logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape)
        return Multinomial(self.total_count, logits, len(self.event_shape), self.observed, False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # In double precision: terms of some n log n nearly cancel, and a rounded normaliser counts n times.
        x, logits = value.double(), self.logits.double()
        normaliser = logits
        if self.observed is not None:
            # Not minus infinity: where nothing is observed, the normaliser counts zero times.
            normaliser = logits.masked_fill(~self.observed.expand(logits.shape), -1e300)
            x, logits = torch.where(self.observed, x, 0.0), torch.where(self.observed, logits, 0.0)
        count = len(self.event_shape)
        x, logits, normaliser = (t.flatten(t.dim() - count) for t in (x, logits, normaliser))
        n, products = x.sum(-1), (x * logits - torch.lgamma(1 + x)).sum(-1)
        return (torch.lgamma(1 + n) - n * normaliser.logsumexp(-1) + products).to(self.logits.dtype)

    def _probs(self) -> Tensor:
        return self.logits.flatten(len(self.batch_shape)).softmax(-1).reshape(self.logits.shape)

    @property
    def mean(self) -> Tensor:
        return self.total_count * self._probs()

    @property
    def variance(self) -> Tensor:
        probs = self._probs()
        return self.total_count * probs * (1 - probs)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, torch's own default
        counts = dist.Multinomial(self.total_count, logits=self.logits.flatten(len(self.batch_shape)))
        return counts.sample(sample_shape).unflatten(-1, self.event_shape)


class Blocks(dist.TorchDistribution):
    r"""Independent distributions of vectors, side by side in one vector.

    .. math:: p(x) = \prod_b p_b(x_b), \qquad x = [x_1, \dots, x_B]

    Its mean is the :func:`center` of each block: the mode for classes.

    Args:
        blocks: the distributions, each of events with one dimension.

    >>> p = Blocks([dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.Bernoulli(torch.full((1,), 0.9)).to_event(1)])
    >>> p.event_shape, p.mean
    (torch.Size([3]), tensor([0.0000, 0.0000, 0.9000]))
    """

    arg_constraints: ClassVar = {}

    def __init__(self, blocks: Sequence[dist.TorchDistribution], validate_args: bool | None = None):
        batch_shape = torch.broadcast_shapes(*(p.batch_shape for p in blocks))
        self.blocks = [p if p.batch_shape == batch_shape else p.expand(batch_shape) for p in blocks]
        self.sizes = [p.event_shape[0] for p in blocks]
        super().__init__(batch_shape, torch.Size([sum(self.sizes)]), validate_args=validate_args)

    @constraints.dependent_property(event_dim=1)
    def support(self):
        return _OfBlocks(self)

    def expand(self, batch_shape: torch.Size, _instance=None) -> dist.TorchDistribution:
        return Blocks([p.expand(batch_shape) for p in self.blocks], False)

    def split(self, x: Tensor) -> list[tuple[dist.TorchDistribution, Tensor, slice]]:
        """Returns each block, its part of x, and which columns they are."""
        ends = list(itertools.accumulate(self.sizes))
        columns = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        return [(p, x[..., here], here) for p, here in zip(self.blocks, columns, strict=True)]

    def log_prob(self, value: Tensor) -> Tensor:
        return sum(p.log_prob(x) for p, x, _ in self.split(value))

    @property
    def mean(self) -> Tensor:
        return torch.cat([center(p) for p in self.blocks], dim=-1)

    @property
    def variance(self) -> Tensor:
        return torch.cat([p.variance for p in self.blocks], dim=-1)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, torch's own default
        return torch.cat([p.sample(sample_shape) for p in self.blocks], dim=-1)


class _OfBlocks(constraints.Constraint):
    """Each block's columns in its own space."""

    event_dim = 1

    def __init__(self, p: Blocks):
        super().__init__()
        self.p = p
        self.is_discrete = all(block.support.is_discrete for block in p.blocks)

    def check(self, value: Tensor) -> Tensor:
        return torch.stack([p.support.check(x) for p, x, _ in self.p.split(value)]).all(0)

    def __repr__(self) -> str:
        return f"blocks({', '.join(repr(block.support) for block in self.p.blocks)})"


# ---------------------------------------------------------------------------------------------- elements left out


def mask_elements(p: dist.TorchDistribution, mask: Tensor) -> dist.TorchDistribution:
    r"""Returns the distribution of the observed elements of a datum: the others are left out, whatever stands there.

    .. math:: \log p(x_o) = \sum_{d \in o} \log p(x_d)

    for distributions whose elements are independent; for :class:`Multinomial` the distribution of the observed counts
    given their sum. The elements left out may be NaN or outside the support, and get no gradient. Samples and the mean
    are the whole distribution's.

    Args:
        p: a distribution of independent elements (``.to_event(n)`` of one without event dimensions), a
            :class:`Multinomial`, or :class:`Blocks` of them.
        mask: what is observed, boolean; broadcasts with ``p.batch_shape + p.event_shape``.

    Raises:
        ValueError: when the mask is not boolean, or its shape does not fit the distribution's.
        TypeError: when the elements of `p` cannot be told apart.

    >>> p = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    >>> mask_elements(p, torch.tensor([True, False, False])).log_prob(torch.tensor([0.0, torch.nan, 9.0]))
    tensor(-0.9189)
    """
    whole = p.batch_shape + p.event_shape
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, True where an element is observed, got {mask.dtype}.")
    try:
        shape = torch.broadcast_shapes(mask.shape, whole)
    except RuntimeError:
        shape = None
    cut = None if shape is None else len(shape) - len(p.event_shape)
    if shape is None or shape[cut:] != p.event_shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, which does not broadcast with {tuple(p.batch_shape)} distributions "
            f"of events of shape {tuple(p.event_shape)}. Give one boolean an element: (..., *{tuple(p.event_shape)})."
        )
    if shape != whole:
        p = p.expand(shape[:cut])
    mask = mask.expand(shape)
    if isinstance(p, Blocks):
        return Blocks([mask_elements(block, here) for block, here, _ in p.split(mask)])
    if isinstance(p, Multinomial):
        return MaskedElements(p, Multinomial(p.total_count, p.logits, len(p.event_shape), mask), mask)
    elements = p
    while isinstance(elements, torch.distributions.Independent):
        elements = elements.base_dist
    if elements.event_shape or elements.batch_shape != shape or isinstance(elements, MaskedElements):
        raise TypeError(
            f"mask_elements cannot take {type(elements).__name__} apart: its elements are not declared independent. "
            "Use a distribution without event dimensions and .to_event(n)."
        )
    if isinstance(elements, BatchScaleNormal):
        elements = BatchScaleNormal(elements.loc, elements.scale, elements.learn, mask)
    return MaskedElements(p, elements, mask)


class MaskedElements(dist.TorchDistribution):
    """What :func:`mask_elements` returns: `base_dist` for samples, `observed` for the log-probability."""

    arg_constraints: ClassVar = {}

    def __init__(self, base_dist: dist.TorchDistribution, observed: dist.TorchDistribution, mask: Tensor):
        self.base_dist, self.observed, self.mask_of_elements = base_dist, observed, mask
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.base_dist.has_rsample

    @constraints.dependent_property
    def support(self):
        return _OfObserved(self)

    def expand(self, batch_shape: torch.Size, _instance=None) -> dist.TorchDistribution:
        mask = self.mask_of_elements.expand(torch.Size(batch_shape) + self.event_shape)
        return mask_elements(self.base_dist.expand(batch_shape), mask)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.observed.log_prob(torch.where(self.mask_of_elements, value, self._filler(value.dtype)))
        if self.observed.event_shape:
            return log_prob
        log_prob = torch.where(self.mask_of_elements, log_prob, 0.0)
        return log_prob.flatten(log_prob.dim() - len(self.event_shape)).sum(-1) if self.event_shape else log_prob

    def _filler(self, dtype: torch.dtype) -> float:
        """A number inside the support for the places of elements left out: outside, gradients may be NaN."""
        elements = self.support.elements
        for number in (0.5, 1.0, 0.0):
            if bool(elements.check(torch.tensor(number).to(dtype)).all()):
                return number
        raise TypeError(f"mask_elements knows no number for what is left out: neither 0, 1/2 nor 1 is in {elements}.")

    @property
    def mean(self) -> Tensor:
        return self.base_dist.mean

    @property
    def mode(self) -> Tensor:
        return self.base_dist.mode

    @property
    def variance(self) -> Tensor:
        return self.base_dist.variance

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, torch's own default
        return self.base_dist.sample(sample_shape)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, torch's own default
        return self.base_dist.rsample(sample_shape)


class _OfObserved(constraints.Constraint):
    """The observed elements in the support of their distribution, the others anywhere."""

    def __init__(self, p: MaskedElements):
        super().__init__()
        support = p.observed.support
        self.elements = getattr(support, "base_constraint", support)
        self.mask, self.event_dim, self.is_discrete = p.mask_of_elements, len(p.event_shape), support.is_discrete

    def check(self, value: Tensor) -> Tensor:
        inside = self.elements.check(value) | ~self.mask
        return inside.flatten(inside.dim() - self.event_dim).all(-1) if self.event_dim else inside

    def __repr__(self) -> str:
        return f"observed({self.elements!r})"
