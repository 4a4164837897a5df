r"""Estimators of the gradient of a bound, from draws of the guide.

A bound is :math:`\mathrm{E}_{z_1, \dots, z_K \sim q}\, f(\ell)`, a function of log weights
:math:`\ell_k = \log p(x, z_k) - \log q(z_k \mid x)`. Its gradient has three parts: that of :math:`\log p` at fixed
latents, that of :math:`\log q` at fixed latents, and that through the latents. An estimator gives each part a
coefficient per particle.
"""

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyrovae.recorded import NumbersChecked

if TYPE_CHECKING:
    from pyrovae.bounds.base import Bound

_CHUNK = 2**22  # log weights that leave_one_out replaces at once


class Coefficients(NamedTuple):
    r"""The coefficients of the parts of a gradient, each of shape ``(num_particles, batch)``, or None for zero.

    Args:
        model: of :math:`\nabla \log p(x, z_k)` at fixed latents.
        guide: of :math:`\nabla \log q(z_k \mid x)` at fixed latents.
        path: of :math:`\frac{\partial \ell_k}{\partial z_k} \nabla z_k`, through the latents that have an rsample.
    """

    model: Tensor | None = None
    guide: Tensor | None = None
    path: Tensor | None = None


class Gradient(NumbersChecked, ABC):
    r"""Base of the estimators of a bound's gradient.

    Args:
        single_backward: whether all parts have the coefficient :math:`\partial f / \partial \ell_k`, so that one
            backward pass through the log weights computes them.
        reparameterized: whether all latents must have an rsample.
        score_functions: whether latents without an rsample get score functions with leave-one-out baselines.
    """

    single_backward: bool = False
    reparameterized: bool = False
    score_functions: bool = False

    @abstractmethod
    def coefficients(self, bound: "Bound", log_w: Tensor) -> Coefficients:
        """Returns the coefficients for log weights of shape ``(num_particles, batch)``.

        Args:
            bound: the bound; its `reduce` is f for the guide's parameters, its `reduce_model` f for the model's.
            log_w: log weights, detached.
        """

    def check(self, bound: "Bound") -> None:
        """Raises a ValueError if this estimator is not valid for a bound."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Reparameterized(Gradient):
    r"""Plain reparameterisation; for latents without an rsample the score function, with leave-one-out baselines.

    .. math:: \sum_k \frac{\partial f}{\partial \ell_k} \nabla \ell_k(z_k(\phi)), \qquad
        \text{and } \sum_k (f(\ell) - f(\ell^{-k})) \nabla \log q(z_k \mid x) \text{ for the others}

    where :math:`\ell^{-k}` has the mean of the other log weights in place of the k-th. Unbiased. With the
    importance-weighted bound of discrete latents it is VIMCO, with the ELBO it is REINFORCE with leave-one-out
    baselines; both need at least two particles. A straight-through distribution, such as that of
    ``encoders.OneHotCategorical``, has an rsample with a biased gradient, which is kept: ``encoders.Categorical`` has
    an unbiased one.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114; Variational
        Inference for Monte Carlo Objectives, A. Mnih and D. J. Rezende, 2016, https://arxiv.org/abs/1602.06725; Buy 4
        REINFORCE Samples, Get a Baseline for Free!, W. Kool, H. van Hoof and M. Welling, 2019,
        https://openreview.net/forum?id=r1lgTGL5DE.

    >>> Reparameterized()
    Reparameterized()
    """

    single_backward = True
    score_functions = True

    def coefficients(self, bound: "Bound", log_w: Tensor) -> Coefficients:
        model, guide = bound.reduce_model(log_w).first, bound.reduce(log_w).first
        return Coefficients(model, -guide, guide)


class DoublyReparameterized(Gradient):
    r"""Doubly reparameterised gradients (DReG), without the score function of the guide and its noise.

    .. math:: \sum_k \left(\frac{\partial f}{\partial \ell_k} - \frac{\partial^2 f}{\partial \ell_k^2}\right)
        \frac{\partial \ell_k}{\partial z_k} \nabla_\phi z_k

    for the guide's parameters, which for the importance-weighted bound is :math:`\sum_k \bar w_k^2 \,(\partial \ell_k /
    \partial z_k) \nabla_\phi z_k`, and for the ELBO sticking the landing. The model's parameters get the plain
    gradient; parameters of both, such as a VampPrior's, get the sum. Unbiased, with a signal-to-noise ratio that grows
    with the number of particles; zero variance for the guide at the exact posterior.

    References:
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, G. Tucker, D. Lawson, S. Gu and
        C. J. Maddison, 2019, https://arxiv.org/abs/1810.04152; Generalized Doubly Reparameterized Gradient Estimators,
        M. Bauer and A. Mnih, 2021, https://arxiv.org/abs/2101.11046.

    >>> DoublyReparameterized()
    DoublyReparameterized()
    """

    reparameterized = True

    def coefficients(self, bound: "Bound", log_w: Tensor) -> Coefficients:
        reduced = bound.reduce(log_w)
        return Coefficients(model=bound.reduce_model(log_w).first, path=reduced.first - reduced.second)

    def check(self, bound: "Bound") -> None:
        if not bound.smooth:
            raise ValueError(
                f"DoublyReparameterized gradients are biased for this {type(bound).__name__}, which is not a smooth "
                "function of the log weights (a maximum has a kink, a penalty takes estimates). Take "
                "gradient=Reparameterized()."
            )


class StickingTheLanding(Gradient):
    r"""Sticking the landing: the ELBO's gradient without the score function of the guide, whose mean is zero.

    .. math:: \frac{1}{K} \sum_k \frac{\partial \ell_k}{\partial z_k} \nabla_\phi z_k

    for the guide's parameters. Unbiased, with zero variance at the exact posterior. It needs a bound that is linear in
    the log weights, as only the ELBO is; for the others :class:`DoublyReparameterized` does the same without bias.

    References:
        Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference, G. Roeder, Y. Wu and
        D. Duvenaud, 2017, https://arxiv.org/abs/1703.09194.

    >>> StickingTheLanding()
    StickingTheLanding()
    """

    reparameterized = True

    def coefficients(self, bound: "Bound", log_w: Tensor) -> Coefficients:
        first = bound.reduce(log_w).first
        return Coefficients(model=first, path=first)

    def check(self, bound: "Bound") -> None:
        if not bound.linear:
            instead = "DoublyReparameterized()" if bound.smooth else "Reparameterized()"
            raise ValueError(
                f"StickingTheLanding is biased for this {type(bound).__name__}, which is not linear in the log "
                f"weights: the mean of the score function that it drops is not zero. Take gradient={instead}, or the "
                "plain ELBO."
            )


class Covariance(Gradient):
    r"""The gradient of the thermodynamic objective by covariances; latents need no rsample.

    .. math:: \nabla\, \mathrm{E}_{\pi_\beta} \ell = \mathrm{E}_{\pi_\beta} \nabla \ell
        + \mathrm{Cov}_{\pi_\beta}\big(\nabla(\beta \log p + (1 - \beta) \log q),\; \ell\big)

    at fixed latents, with means under :math:`\pi_\beta \propto q^{1-\beta} p^\beta` by self-normalised weights:
    consistent, not unbiased. For :class:`TVO` only.

    References:
        The Thermodynamic Variational Objective, V. Masrani, T. A. Le and F. Wood, 2019,
        https://arxiv.org/abs/1907.00031.

    >>> Covariance()
    Covariance()
    """

    def coefficients(self, bound: Any, log_w: Tensor) -> Coefficients:  # of the bounds, only the TVO has an influence
        return Coefficients(model=bound.reduce_model(log_w).first, guide=bound.influence(log_w))

    def check(self, bound: "Bound") -> None:
        if not hasattr(bound, "influence"):
            raise ValueError(
                f"Covariance gradients are for the TVO, not for {type(bound).__name__}. Take "
                "gradient=Reparameterized()."
            )
        if bound.num_particles < 2:
            raise ValueError("Covariance gradients need num_particles of at least 2, got 1.")


def leave_one_out(bound: "Bound", log_w: Tensor) -> Tensor:
    """Returns f(log_w) minus f with each log weight replaced by the mean of the others, in the shape of `log_w`."""
    k = len(log_w)
    if bound.linear:
        return (log_w - log_w.mean(0)) / (k - 1)
    size = max(1, _CHUNK // log_w.numel())
    # The mean of the log weights is the geometric mean of the weights, as in VIMCO. It leaves out weights of zero;
    # where all others are zero, any number is a valid baseline.
    baselines = []
    for rows in torch.arange(k, device=log_w.device).split(size):
        replaced = torch.arange(k, device=log_w.device).unsqueeze(1) == rows
        replaced = replaced.reshape(k, len(rows), *[1] * (log_w.dim() - 1))
        weights = log_w.unsqueeze(1).expand(k, len(rows), *log_w.shape[1:])
        counted = ~replaced & (weights > -math.inf)
        others = weights.masked_fill(~counted, 0.0).sum(0) / counted.sum(0)
        baseline = bound.reduce(torch.where(replaced, others, weights)).value
        baselines.append(baseline.masked_fill(~counted.any(0), 0.0))
    return bound.reduce(log_w).value - torch.cat(baselines)


class DetachedDraws(Messenger):
    """A Pyro handler that detaches each latent from its draw, to differentiate with respect to the latent alone.

    Args:
        with_gradients: whether the detached latents require gradients.
    """

    def __init__(self, with_gradients: bool):
        super().__init__()
        self.with_gradients = with_gradients
        # A site comes once for each particle where particles are drawn one by one.
        self.draws: list[Tensor] = []  # with their graphs
        self.latents: list[Tensor] = []  # the same values, detached

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["is_observed"] or isinstance(msg["fn"], _Subsample):
            return
        draw = msg["value"]
        msg["value"] = draw.detach()
        if self.with_gradients and draw.requires_grad:
            self.draws.append(draw)
            self.latents.append(msg["value"].requires_grad_())

    def backpropagate(self, value: Tensor | float) -> Tensor | float:
        """Returns a number whose gradient is that of a value through the draws of the latents, and no other way."""
        if not self.latents or not isinstance(value, Tensor) or not value.requires_grad:
            return 0.0
        gradients = list(torch.autograd.grad(value, self.latents, retain_graph=True, allow_unused=True))
        total = value.new_zeros(())
        # A latent is drawn given those before it, and so its gradient goes on to theirs.
        for i in reversed(range(len(self.latents))):
            if gradients[i] is None:
                continue
            if i > 0:
                earlier = torch.autograd.grad(
                    self.draws[i], self.latents[:i], gradients[i], retain_graph=True, allow_unused=True
                )
                for j, gradient in enumerate(earlier):
                    if gradient is not None:
                        gradients[j] = gradient if gradients[j] is None else gradients[j] + gradient
            total = total + (gradients[i] * self.draws[i]).sum()
        return total


def dot(coefficient: Tensor | None, t: Tensor) -> Tensor | float:
    """Returns the sum of products, zero where a coefficient is 0 even if the other factor is infinite there.

    A coefficient of None is zero everywhere.
    """
    if coefficient is None:
        return 0.0
    return (coefficient * t.masked_fill(coefficient == 0, 0.0)).sum()
