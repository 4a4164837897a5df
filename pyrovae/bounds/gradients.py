r"""Estimators of the gradient of a bound, from draws of the guide.

A bound is :math:`\mathrm{E}_{z_1, \dots, z_K \sim q}\, f(\ell)`, a function of log weights
:math:`\ell_k = \log p(x, z_k) - \log q(z_k \mid x)`. Its gradient has three parts: what moves :math:`\log p` at latents
that are held, what moves :math:`\log q` at latents that are held, and what moves the latents. An estimator is a
coefficient a particle for each of them.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 2**22  # log weights that leave_one_out works on at once


class Coefficients(NamedTuple):
    r"""The coefficients of the parts of a gradient, each of shape ``(num_particles, batch)`` or None for nothing.

    Args:
        model: of :math:`\nabla \log p(x, z_k)` at held latents.
        guide: of :math:`\nabla \log q(z_k \mid x)` at held latents.
        path: of :math:`\frac{\partial \ell_k}{\partial z_k} \nabla z_k`, through the latents that have an rsample.
    """

    model: Tensor | None = None
    guide: Tensor | None = None
    path: Tensor | None = None


class Gradient(ABC):
    r"""Base of the estimators of a bound's gradient.

    Args:
        whole: whether all parts have the coefficient :math:`\partial f / \partial \ell_k`, so that one backward pass
            through the log weights gives them.
        reparameterized: whether all latents must have an rsample.
        scored: whether latents without one have score functions with leave-one-out baselines.
    """

    whole: bool = False
    reparameterized: bool = False
    scored: bool = False

    @abstractmethod
    def coefficients(self, bound, log_w: Tensor) -> Coefficients:
        """Returns the coefficients for log weights of shape ``(num_particles, batch)``.

        Args:
            bound: the bound, with `reduce`, its f for the guide's parameters, and `reduce_model`, for the model's.
            log_w: log weights, detached.
        """

    def check(self, bound) -> None:
        """Raises a ValueError if this is no estimator of a bound's gradient."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Reparameterized(Gradient):
    r"""Plain reparameterisation; for latents without an rsample the score function, with leave-one-out baselines.

    .. math:: \sum_k \frac{\partial f}{\partial \ell_k} \nabla \ell_k(z_k(\phi)), \qquad
        \text{and } \sum_k (f(\ell) - f(\ell^{-k})) \nabla \log q(z_k \mid x) \text{ for the others}

    where :math:`\ell^{-k}` has the mean of the other log weights in place of the k-th. Unbiased. With the
    importance-weighted bound of discrete latents it is VIMCO, with the ELBO REINFORCE leave-one-out; both need at least
    two particles. A straight-through distribution, ``encoders.OneHotCategorical``'s, claims to have an rsample and keeps
    its biased gradient: take ``encoders.Categorical`` for these.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114; Variational
        Inference for Monte Carlo Objectives, A. Mnih and D. J. Rezende, 2016, https://arxiv.org/abs/1602.06725; Buy 4
        REINFORCE Samples, Get a Baseline for Free!, W. Kool, H. van Hoof and M. Welling, 2019,
        https://openreview.net/forum?id=r1lgTGL5DE.

    >>> Reparameterized()
    Reparameterized()
    """

    whole = True
    scored = True

    def coefficients(self, bound, log_w: Tensor) -> Coefficients:
        model, guide = bound.reduce_model(log_w).first, bound.reduce(log_w).first
        return Coefficients(model, -guide, guide)


class DoublyReparameterized(Gradient):
    r"""Doubly reparameterised gradients (DReG): no score function of the guide, whose noise drowns the signal.

    .. math:: \sum_k \left(\frac{\partial f}{\partial \ell_k} - \frac{\partial^2 f}{\partial \ell_k^2}\right)
        \frac{\partial \ell_k}{\partial z_k} \nabla_\phi z_k

    for the guide's parameters, which for the importance-weighted bound is :math:`\sum_k \bar w_k^2 \,(\partial \ell_k /
    \partial z_k) \nabla_\phi z_k`, and for the ELBO sticking the landing. Those of the model have the plain gradient;
    parameters that are in both, a VampPrior's, have the sum. Unbiased, with a signal-to-noise ratio that grows with the
    number of particles; zero variance for the guide at the exact posterior.

    References:
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, G. Tucker, D. Lawson, S. Gu and
        C. J. Maddison, 2019, https://arxiv.org/abs/1810.04152; Generalized Doubly Reparameterized Gradient Estimators,
        M. Bauer and A. Mnih, 2021, https://arxiv.org/abs/2101.11046.

    >>> DoublyReparameterized()
    DoublyReparameterized()
    """

    reparameterized = True

    def coefficients(self, bound, log_w: Tensor) -> Coefficients:
        reduced = bound.reduce(log_w)
        return Coefficients(model=bound.reduce_model(log_w).first, path=reduced.first - reduced.second)

    def check(self, bound) -> None:
        if not bound.smooth:
            raise ValueError(
                f"DoublyReparameterized gradients are biased for this {type(bound).__name__}, which is no smooth function of "
                "the log weights (the largest has a kink, a penalty sees estimates). Take gradient=Reparameterized()."
            )


class StickingTheLanding(Gradient):
    r"""Sticking the landing: the ELBO's gradient without the score function of the guide, whose mean is zero.

    .. math:: \frac{1}{K} \sum_k \frac{\partial \ell_k}{\partial z_k} \nabla_\phi z_k

    for the guide's parameters. Unbiased, with no variance at the exact posterior. Of the bounds, only the ELBO is
    linear in the log weights, as this asks for; for the others :class:`DoublyReparameterized` does the same without bias.

    References:
        Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference, G. Roeder, Y. Wu and
        D. Duvenaud, 2017, https://arxiv.org/abs/1703.09194.

    >>> StickingTheLanding()
    StickingTheLanding()
    """

    reparameterized = True

    def coefficients(self, bound, log_w: Tensor) -> Coefficients:
        first = bound.reduce(log_w).first
        return Coefficients(model=first, path=first)

    def check(self, bound) -> None:
        if not bound.linear:
            instead = "DoublyReparameterized()" if bound.smooth else "Reparameterized()"
            raise ValueError(
                f"StickingTheLanding is biased for this {type(bound).__name__}, which is not linear in the log weights: the "
                f"score function that it drops has a mean other than zero. Take gradient={instead}, or the plain ELBO."
            )


class Covariance(Gradient):
    r"""The gradient of the thermodynamic objective by covariances; latents need no rsample.

    .. math:: \nabla\, \mathrm{E}_{\pi_\beta} \ell = \mathrm{E}_{\pi_\beta} \nabla \ell
        + \mathrm{Cov}_{\pi_\beta}\big(\nabla(\beta \log p + (1 - \beta) \log q),\; \ell\big)

    at held latents, with means under :math:`\pi_\beta \propto q^{1-\beta} p^\beta` by self-normalised weights, so that
    it is consistent, not unbiased. Of :class:`TVO` only.

    References:
        The Thermodynamic Variational Objective, V. Masrani, T. A. Le and F. Wood, 2019,
        https://arxiv.org/abs/1907.00031.

    >>> Covariance()
    Covariance()
    """

    def coefficients(self, bound, log_w: Tensor) -> Coefficients:
        return Coefficients(model=bound.reduce_model(log_w).first, guide=bound.influence(log_w))

    def check(self, bound) -> None:
        if not hasattr(bound, "influence"):
            raise ValueError(f"Covariance gradients are those of the TVO, not of {type(bound).__name__}.")
        if bound.num_particles < 2:
            raise ValueError("Covariance gradients need num_particles of at least 2, got 1.")


def leave_one_out(bound, log_w: Tensor) -> Tensor:
    """Returns f(log_w) less f with each particle's weight replaced by what the others say, shape of `log_w`."""
    k = len(log_w)
    if bound.linear:
        return (log_w - log_w.mean(0)) / (k - 1)
    size = max(1, _CHUNK // log_w.numel())
    # As a linear function does not care, the replacement is the mean: the geometric mean of the weights. What is
    # impossible has no part in it, and where all others are, any number is as good a baseline.
    without = []
    for rows in torch.arange(k, device=log_w.device).split(size):
        own = torch.arange(k, device=log_w.device).unsqueeze(1) == rows
        own = own.reshape(k, len(rows), *[1] * (log_w.dim() - 1))
        weights = log_w.unsqueeze(1).expand(k, len(rows), *log_w.shape[1:])
        counted = ~own & (weights > -math.inf)
        others = weights.masked_fill(~counted, 0.0).sum(0) / counted.sum(0)
        baseline = bound.reduce(torch.where(own, others, weights)).value
        without.append(baseline.masked_fill(~counted.any(0), 0.0))
    return bound.reduce(log_w).value - torch.cat(without)
