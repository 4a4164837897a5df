"""Distributions of real numbers, positive ones and those between 0 and 1."""

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from pyrovae.distributions.counts import log_rising
from pyrovae.distributions.spaces import ShapeLike, keep_checks, open_unit_interval


class ContinuousBernoulli(dist.ContinuousBernoulli):
    r"""Torch's continuous Bernoulli distribution, computed from the logits and accurate for all of them.

    .. math:: p(x) = \frac{l}{e^l - 1} e^{l x}, \qquad 0 \le x \le 1

    Torch computes with the probability. Its density is wrong where the probability rounds to 0 or 1 (logits beyond 16
    in single precision), and it loses digits, most of all the gradient's, where the probability is near one half.

    Args:
        logits: :math:`l`, any real number.

    References:
        The Continuous Bernoulli: Fixing a Pervasive Error in Variational Autoencoders, G. Loaiza-Ganem and J. P.
        Cunningham, 2019, https://arxiv.org/abs/1907.06845.

    >>> ContinuousBernoulli(logits=torch.tensor([-50.0, 0.0, 50.0])).log_prob(torch.tensor(0.5))
    tensor([-21.0880,   0.0000, -21.0880])
    """

    # The series of log(sinh(l/2) / (l/2)) in powers of l^2: Bernoulli numbers divided by factorials.
    _SERIES = (1 / 24, -1 / 2880, 1 / 181440, -1 / 9676800, 1 / 479001600, -691 / 15692092416000)
    _SMALL = 0.4

    def _magnitude(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns |l|, a mask of where it is small, and |l| with 1 in place of the small ones."""
        size = self.logits.abs()
        small = size < self._SMALL
        return size, small, torch.where(small, torch.ones_like(size), size)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        size, small, large = self._magnitude()
        square = self.logits.square().clamp_max(1)  # the series is not used for larger ones, but must not overflow
        near = sum(c * square**n for n, c in enumerate(self._SERIES, 1))
        far = torch.log(-torch.expm1(-large) / large)
        from_the_mode = torch.where(self.logits < 0, value, 1 - value)
        return torch.where(small, (value - 0.5) * self.logits - near, -from_the_mode * size - far)

    @property
    def mean(self) -> Tensor:
        _, small, large = self._magnitude()
        near = sum(2 * n * c * self.logits.clamp(-1, 1) ** (2 * n - 1) for n, c in enumerate(self._SERIES, 1))
        far = 1 / large + torch.exp(-large) / torch.expm1(-large)  # for negative logits; positive ones mirror them
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
    r"""Torch's beta distribution on the open interval (0, 1), because its density may be infinite at 0 and at 1.

    .. math:: p(x) = \frac{\Gamma(\alpha + \beta)}{\Gamma(\alpha)\, \Gamma(\beta)}\, x^{\alpha - 1} (1 - x)^{\beta - 1},
        \qquad 0 < x < 1

    Args:
        concentration1: :math:`\alpha`, positive.
        concentration0: :math:`\beta`, positive.

    >>> Beta(2.0, 0.5).support.check(torch.tensor([0.0, 0.5, 1.0]))
    tensor([False,  True, False])
    """

    support = open_unit_interval

    def rsample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        x = super().rsample(sample_shape)
        info = torch.finfo(x.dtype)
        return x.clamp(info.tiny, 1 - info.eps / 2)  # rounding may move a draw to the boundary


class Gamma(dist.Gamma):
    r"""Torch's gamma distribution without 0 in its support.

    .. math:: p(x) = \frac{\beta^\alpha}{\Gamma(\alpha)}\, x^{\alpha - 1} e^{-\beta x}, \qquad x > 0

    At 0 the density is 0 or infinite unless the concentration is 1.

    Args:
        concentration: :math:`\alpha`, positive.
        rate: :math:`\beta`, positive.

    >>> Gamma(1.0, 1.0).support.check(torch.tensor([0.0, 0.5]))
    tensor([False,  True])
    """

    support = constraints.positive  # type: ignore[assignment]  # torch infers a type from its >= 0


class StudentT(dist.StudentT):
    r"""Torch's Student t distribution, with a log-density that stays accurate for many degrees of freedom.

    .. math:: p(x) = \frac{\Gamma((\nu + 1) / 2)}{\Gamma(\nu / 2) \sqrt{\pi \nu}\, \sigma}
        \left(1 + \frac{(x - \mu)^2}{\nu \sigma^2}\right)^{-(\nu + 1) / 2}

    Args:
        df: degrees of freedom :math:`\nu`, positive.
        loc: :math:`\mu`.
        scale: :math:`\sigma`, positive.

    >>> StudentT(torch.tensor(1e8)).log_prob(torch.tensor(0.0))  # the normal distribution's
    tensor(-0.9189)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        half, z = self.df / 2, (value - self.loc) / self.scale
        constant = log_rising(half, torch.full_like(half, 0.5)) - 0.5 * (math.pi * self.df).log() - self.scale.log()
        return constant - (half + 0.5) * torch.log1p(z.square() / self.df)


class BatchScaleNormal(dist.Normal):
    r"""A normal distribution whose log-probability, while learning, uses the best single scale for its argument.

    .. math:: \sigma^2 = \frac{1}{N} \sum_{i=1}^N (x_i - \mu_i)^2

    The mean is over all N numbers: particles, data and dimensions. The sum of the log-probabilities is then the largest
    that one scale can give, and each of them depends on all the numbers. When not learning, it is a plain normal.

    Args:
        loc: :math:`\mu`.
        scale: the scale for samples, and for log-probabilities when not learning.
        learn: called with each :math:`\sigma^2`, detached; None when not learning.
        observed: a mask of the numbers that count, which broadcasts with `loc`; None for all.

    References:
        Simple and Effective VAE Training with Calibrated Decoders, O. Rybkin, K. Daniilidis and S. Levine, 2021,
        https://arxiv.org/abs/2006.13202.

    >>> variances = []
    >>> p = BatchScaleNormal(torch.zeros(2), torch.ones(()), variances.append)
    >>> p.log_prob(torch.tensor([1.0, 7.0])).sum(), variances
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

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "BatchScaleNormal":
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return keep_checks(self, BatchScaleNormal(loc, scale, self.learn, self.observed, False))

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
