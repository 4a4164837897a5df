"""Distributions of counts, whose log-probabilities keep their digits at large counts."""

from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyrovae.distributions.spaces import ShapeLike, keep_checks


class Poisson(dist.Poisson):
    r"""Torch's Poisson distribution from the logarithm of its rate, accurate at large counts.

    .. math:: \log p(x) = x \log \mu - \mu - \log x!

    The terms are about :math:`\mu \log \mu` large and nearly cancel. They are computed in double precision.

    Args:
        log_rate: :math:`\log \mu`, any real number.

    >>> Poisson(torch.tensor(1e6).log()).log_prob(torch.tensor(1e6))  # -log(2 pi 1e6) / 2
    tensor(-7.8267)
    """

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None):
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=validate_args)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "Poisson":
        return keep_checks(self, Poisson(self.log_rate.expand(batch_shape), False))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_rate, x = self.log_rate.double(), value.double()
        return (x * log_rate - log_rate.exp() - torch.lgamma(1 + x)).to(self.log_rate.dtype)


class NegativeBinomial(dist.NegativeBinomial):
    r"""Torch's negative binomial distribution, accurate at large counts and near the Poisson limit.

    .. math:: p(x) = \frac{\Gamma(\theta + x)}{\Gamma(\theta)\, x!} \left(\frac{\theta}{\theta + \mu}\right)^\theta
        \left(\frac{\mu}{\theta + \mu}\right)^x

    Terms that nearly cancel are computed in double precision.

    Args:
        total_count: :math:`\theta`.
        logits: :math:`\log \mu - \log \theta` for a mean of :math:`\mu`.
        log_mean: :math:`\log \mu` in place of `logits`: more accurate, because the difference is not rounded.

    Raises:
        ValueError: when both or neither of `logits` and `log_mean` are given.

    References:
        Deep Generative Modeling for Single-Cell Transcriptomics, R. Lopez, J. Regier, M. B. Cole, M. I. Jordan and
        N. Yosef, 2018, https://doi.org/10.1038/s41592-018-0229-2.

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
        # Not broadcast: a total count that many logits share is computed with once.
        self.log_mean, self._theta = log_mean, total_count
        if log_mean is not None:
            logits = log_mean - total_count.log()
        super().__init__(total_count, logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "NegativeBinomial":
        name, value = ("logits", self.logits) if self.log_mean is None else ("log_mean", self.log_mean)
        new = NegativeBinomial(self._theta, **{name: value.expand(batch_shape)}, validate_args=False)
        return keep_checks(self, new)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        theta, x = self._theta.double(), value.double()
        logits = self.logits.double() if self.log_mean is None else self.log_mean.double() - theta.log()
        trials = x * logits + (theta + x) * logsigmoid(-logits)
        return (trials + log_rising(theta, x) - torch.lgamma(1 + x)).to(self.logits.dtype)


class ZeroInflatedNegativeBinomial(dist.TorchDistribution):
    r"""A negative binomial count that is replaced by zero with some probability.

    .. math:: p(x) = \pi [x = 0] + (1 - \pi)\, \mathrm{NB}(x), \qquad \pi = \sigma(g)

    Pyro's distribution of this name changes its formula once it has been sampled from: the second one fails where the
    gate rounds to 0 or 1, and cannot be expanded.

    Args:
        total_count: :math:`\theta` of the :class:`NegativeBinomial`.
        logits: logits of the :class:`NegativeBinomial`, or None with `log_mean`.
        gate_logits: g.
        log_mean: :math:`\log \mu` of the :class:`NegativeBinomial`, in place of `logits`.

    References:
        Deep Generative Modeling for Single-Cell Transcriptomics, R. Lopez, J. Regier, M. B. Cole, M. I. Jordan and
        N. Yosef, 2018, https://doi.org/10.1038/s41592-018-0229-2.

    >>> p = ZeroInflatedNegativeBinomial(torch.tensor(1.0), torch.tensor(0.0), torch.tensor([0.0, 100.0]))
    >>> p.log_prob(torch.tensor(0.0)).exp(), p.log_prob(torch.tensor(1.0))
    (tensor([0.7500, 1.0000]), tensor([  -2.0794, -101.3863]))
    """

    arg_constraints = {"gate_logits": constraints.real}
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

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "ZeroInflatedNegativeBinomial":
        new = self._get_checked_instance(ZeroInflatedNegativeBinomial, _instance)
        new.counts, new.gate_logits = self.counts.expand(batch_shape), self.gate_logits.expand(batch_shape)
        super(ZeroInflatedNegativeBinomial, new).__init__(torch.Size(batch_shape), validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        lost, kept = logsigmoid(self.gate_logits), logsigmoid(-self.gate_logits)
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
    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        x = self.counts.sample(sample_shape)
        return torch.where(torch.bernoulli(self.gate_logits.sigmoid().expand(x.shape)) == 1, 0.0, x)


class Multinomial(dist.TorchDistribution):
    r"""Counts given their total, which may differ from datum to datum.

    .. math:: \log p(x \mid n) = \log \frac{n!}{\prod_d x_d!} + \sum_d x_d \log \pi_d, \qquad n = \sum_d x_d, \quad
        \pi = \mathrm{softmax}(l)

    Torch's distribution has one total for all data. Here the log-probability takes the total of its argument, so that
    the probabilities of all counts with the same total sum to one.

    Args:
        total_count: the total of samples and of the mean.
        logits: :math:`l`, normalised or not.
        event_dim: how many of the last dimensions of the logits are one datum.
        observed: a mask of the dimensions that count, which broadcasts with the logits; None for all.

    References:
        Variational Autoencoders for Collaborative Filtering, D. Liang, R. G. Krishnan, M. D. Hoffman and T. Jebara,
        2018, https://arxiv.org/abs/1802.05814.

    >>> p = Multinomial(10, torch.zeros(3))
    >>> p.log_prob(torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])).exp()
    tensor([0.1111, 0.2222])
    """

    arg_constraints = {}

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
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.nonnegative_integer, len(self.event_shape))

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "Multinomial":
        logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape)
        return keep_checks(self, Multinomial(self.total_count, logits, len(self.event_shape), self.observed, False))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # In double precision: terms of about n log n nearly cancel, and an error of the normaliser counts n times.
        x, logits = value.double(), self.logits.double()
        normaliser = logits
        if self.observed is not None:
            # Not minus infinity: where nothing is observed, n = 0 multiplies the normaliser, and 0 * inf is NaN.
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
    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        counts = dist.Multinomial(self.total_count, logits=self.logits.flatten(len(self.batch_shape)))
        return counts.sample(sample_shape).unflatten(-1, self.event_shape)


def log_rising(a: Tensor, b: Tensor) -> Tensor:
    r"""Returns :math:`\log \Gamma(a + b) - \log \Gamma(a)`; the plain difference has no digits left for a large a.

    .. math:: \log \Gamma(a) = \left(a - \tfrac12\right) \log a - a + \tfrac12 \log 2 \pi + \frac{1}{12 a}
        - \frac{1}{360 a^3} + \frac{1}{1260 a^5} - \dots

    References:
        NIST Handbook of Mathematical Functions, F. W. J. Olver et al., 2010, https://dlmf.nist.gov/5.11.

    >>> log_rising(torch.tensor(1e8), torch.tensor(2.0))  # log(1e8 (1e8 + 1))
    tensor(36.8414)
    """
    b, large = b.to(a.dtype), a > 50

    def series(y: Tensor) -> Tensor:  # the terms of Stirling's series in powers of 1 / y
        return (1 / 12 - (1 / 360 - 1 / 1260 / y.square()) / y.square()) / y

    far = torch.where(large, a, torch.full_like(a, 50.0))
    stirling = (far - 0.5) * torch.log1p(b / far) + b * (far + b).log() - b + series(far + b) - series(far)
    near = torch.where(large, torch.ones_like(a), a)
    return torch.where(large, stirling, torch.lgamma(near + b) - torch.lgamma(near))
