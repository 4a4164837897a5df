r"""Functions of the log weights of a datum's particles, each with its derivatives."""

import math
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
        """Returns the function times a number; nothing of it where that is zero, be it infinite."""
        return Reduced(*(torch.zeros_like(t) if factor == 0 else factor * t for t in self))

    def plus(self, other: "Reduced") -> "Reduced":
        """Returns the sum of two functions."""
        return Reduced(*(a + b for a, b in zip(self, other, strict=True)))


def power_mean(log_w: Tensor, power: float) -> Reduced:
    r"""Returns the logarithm of the power mean of weights, over the first dimension.

    .. math:: f(\ell) = \frac{1}{s} \log \frac{1}{K} \sum_k e^{s \ell_k}

    which is the mean of :math:`\ell` at s = 0, log-mean-exp at 1 and the largest at infinity. At the last, f has a kink
    where two are the largest, which `second` leaves out.

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
        # Near zero, what is divided by the power must not have been rounded against one.
        mean = log_w.mean(0)
        exponent = power * (log_w - mean)
        precise = mean + torch.expm1(exponent).mean(0).log1p() / power
        value = torch.where(exponent.abs().amax(0) < 1, precise, value)
    first = (power * log_w).softmax(0)
    return Reduced(value, first, power * first * (1 - first))


def mean_of_groups(log_w: Tensor, num_groups: int) -> Reduced:
    r"""Returns the mean over groups of the log-mean-exp within each, of groups of one size.

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
    total = None
    for beta, length in zip(betas, lengths, strict=True):
        w, mean, excess = tempered(log_w, beta)
        first = w * (1 + beta * excess)
        second = beta * w * ((1 - w) * (1 + beta * excess) + 1 - first)
        part = Reduced(mean, first, second).scaled(length)
        total = part if total is None else total.plus(part)
    return total


def tempered(log_w: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns self-normalised weights to a power, the mean of the log weights under them, and what each exceeds it by."""
    w = (beta * log_w).softmax(0)
    finite = log_w.masked_fill(w == 0, 0.0)  # a weight of zero has no part in a mean, but 0 times infinity is none
    mean = (w * finite).sum(0)
    return w, mean, finite - mean
