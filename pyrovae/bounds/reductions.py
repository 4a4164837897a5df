r"""Functions of the log weights of a datum's particles, each with its derivatives."""

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor


class Reduced(NamedTuple):
    r"""A function f of log weights :math:`\ell_1, \dots, \ell_K`, for many data at once.

    Args:
        value: :math:`f(\ell)`, shape ``(*rest,)`` for log weights of shape ``(K, *rest)``.
        first: :math:`\partial f / \partial \ell_k`, shape ``(K, *rest)``.
        second: :math:`\partial^2 f / \partial \ell_k^2`, of the same shape.
    """

    value: Tensor
    first: Tensor
    second: Tensor

    def scaled(self, factor: float) -> "Reduced":
        """Returns the function times a number; zero where the factor is 0, even if the function is infinite there."""
        return Reduced(*(torch.zeros_like(t) if factor == 0 else factor * t for t in self))

    def plus(self, other: "Reduced") -> "Reduced":
        """Returns the sum of two functions."""
        return Reduced(*(a + b for a, b in zip(self, other, strict=True)))


def power_mean(log_w: Tensor, power: float) -> Reduced:
    r"""Returns the logarithm of the power mean of weights, over the first dimension.

    .. math:: f(\ell) = \frac{1}{s} \log \frac{1}{K} \sum_k e^{s \ell_k}

    which is the mean of :math:`\ell` at s = 0, log-mean-exp at 1 and the maximum at infinity. The maximum has a kink
    where two log weights are equal, which `second` leaves out.

    >>> power_mean(torch.tensor([0.0, 2.0]), 0.0).value
    tensor(1.)
    """
    k = len(log_w)
    if power == 0:
        return Reduced(log_w.mean(0), torch.full_like(log_w, 1 / k), torch.zeros_like(log_w))
    if power == math.inf:
        largest = log_w.max(0)
        first = torch.zeros_like(log_w).scatter_(0, largest.indices.unsqueeze(0), 1.0)
        return Reduced(largest.values, first, torch.zeros_like(log_w))
    value = ((power * log_w).logsumexp(0) - math.log(k)) / power
    if abs(power) < 1e-2:
        # Near zero the general formula divides a rounding error of size eps by the power; expm1 and log1p avoid it.
        mean = log_w.mean(0)
        exponent = power * (log_w - mean)
        precise = mean + torch.expm1(exponent).mean(0).log1p() / power
        value = torch.where(exponent.abs().amax(0) < 1, precise, value)
    first = normalized(power * log_w)
    return Reduced(value, first, power * first * (1 - first))


def mean_of_groups(log_w: Tensor, num_groups: int) -> Reduced:
    r"""Returns the mean over groups of equal size of the log-mean-exp within each group.

    >>> mean_of_groups(torch.tensor([0.0, 0.0, 2.0, 2.0]), 2).value
    tensor(1.)
    """
    value, first, second = power_mean(log_w.unflatten(0, (num_groups, -1)).transpose(0, 1), 1.0)

    def ungroup(t: Tensor) -> Tensor:
        return t.transpose(0, 1).flatten(0, 1) / num_groups

    return Reduced(value.mean(0), ungroup(first), ungroup(second))


def thermodynamic_sum(log_w: Tensor, betas: tuple[float, ...], lengths: tuple[float, ...]) -> Reduced:
    r"""Returns a sum of self-normalised means of log weights at inverse temperatures.

    .. math:: f(\ell) = \sum_i \Delta_i\, m_i, \qquad m_i = \sum_k \bar w_{ik} \ell_k, \qquad
        \bar w_{ik} = \frac{e^{\beta_i \ell_k}}{\sum_j e^{\beta_i \ell_j}}

    >>> thermodynamic_sum(torch.tensor([0.0, 2.0]), (0.0,), (1.0,)).value
    tensor(1.)
    """

    def mean_at(beta: float) -> Reduced:
        w, mean, excess = tempered(log_w, beta)
        first = w * (1 + beta * excess)
        second = beta * w * ((1 - w) * (1 + beta * excess) + 1 - first)
        return Reduced(mean, first, second)

    terms = (mean_at(beta).scaled(length) for beta, length in zip(betas, lengths, strict=True))
    return reduce(Reduced.plus, terms)


def normalized(log_w: Tensor) -> Tensor:
    """Returns the weights of particles, divided by their sum over the first dimension.

    A weight whose square is too small for the type's normal numbers is zero. Its share of a gradient is lost in the
    rounding of the others', but many processors are ten times slower at numbers as small as those it would make.
    """
    w = log_w.softmax(0)
    return w.masked_fill(w < torch.finfo(w.dtype).tiny ** 0.5, 0.0)


def tempered(log_w: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns self-normalised weights to a power, the log weights' mean under them, and the log weights minus it."""
    w = normalized(beta * log_w)
    finite = log_w.masked_fill(w == 0, 0.0)  # 0 times minus infinity would be NaN
    mean = (w * finite).sum(0)
    return w, mean, finite - mean
