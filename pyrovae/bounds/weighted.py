r"""Bounds that are functions of importance weights per datum."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrovae.bounds.base import ImportanceBound
from pyrovae.bounds.gradients import Coefficients, DoublyReparameterized, Gradient
from pyrovae.bounds.reductions import Reduced, mean_of_groups, normalized, power_mean, tempered, thermodynamic_sum
from pyrovae.inference.running import traced
from pyrovae.inference.simulation import simulate
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import annotate_plates, log_prob_of, per_datum
from pyrovae.regularizers import Regularizer, Run


class IWAE(ImportanceBound):
    r"""The importance-weighted bound, which tightens with every particle.

    .. math:: \mathrm{E}_{z_1, \dots, z_K \sim q} \log \frac{1}{K} \sum_{k=1}^K w_k \;\le\; \log p(x), \qquad
        w_k = \frac{p(x, z_k)}{q(z_k \mid x)}

    With many particles the signal-to-noise ratio of the encoder's plain gradient falls: take
    ``gradient=DoublyReparameterized()``. On discrete latents the default gradient is VIMCO.

    Args:
        num_particles: :math:`K`, at least 1; the ELBO at 1.
        gradient: the estimator of the gradient.
        chunk_size: particles that the model runs on at once; None for all.
        regularizers: terms added to the loss.

    Raises:
        ValueError: when an argument is out of range.

    References:
        Importance Weighted Autoencoders, Y. Burda, R. Grosse and R. Salakhutdinov, 2016,
        https://arxiv.org/abs/1509.00519; Tighter Variational Bounds are Not Necessarily Better, T. Rainforth et al.,
        2018, https://arxiv.org/abs/1802.04537.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> IWAE(num_particles=8).terms(vae.model, vae.guide, torch.zeros(5, 3)).loss.requires_grad
    True
    """

    def reduce(self, log_w: Tensor) -> Reduced:
        return power_mean(log_w, 1.0)


class _Grouped(ImportanceBound):
    """A bound whose guide is trained by the mean of the importance-weighted bounds of groups of particles."""

    def __init__(
        self,
        num_particles: int,
        num_groups: int,
        gradient: Gradient | None = None,
        chunk_size: int | None = None,
        regularizers: Sequence[Regularizer] = (),
    ):
        super().__init__(num_particles, gradient, chunk_size, regularizers)
        if not (isinstance(num_groups, int) and num_groups >= 1) or num_particles % num_groups:
            raise ValueError(f"num_groups must divide num_particles={num_particles}, got {num_groups}.")
        self.num_groups = num_groups

    def reduce(self, log_w: Tensor) -> Reduced:
        return mean_of_groups(log_w, self.num_groups)


class MIWAE(_Grouped):
    r"""A mean of importance-weighted bounds, each of a group of the particles.

    .. math:: \frac{1}{M} \sum_{m=1}^M \log \frac{M}{K} \sum_{k \in G_m} w_k \;\le\; \log p(x)
        \quad \text{in expectation}

    Args:
        num_particles: :math:`K`, in all groups together.
        num_groups: :math:`M`, a divisor of `num_particles`: the importance-weighted bound at 1, the ELBO at
            `num_particles`.
        gradient: the estimator of the gradient.
        chunk_size: particles that the model runs on at once; None for all.
        regularizers: terms added to the loss.

    Raises:
        ValueError: when an argument is out of range, or `num_groups` does not divide `num_particles`.

    References:
        Tighter Variational Bounds are Not Necessarily Better, T. Rainforth, A. R. Kosiorek, T. A. Le, C. J. Maddison,
        M. Igl, F. Wood and Y. W. Teh, 2018, https://arxiv.org/abs/1802.04537.

    >>> MIWAE(num_particles=8, num_groups=2).reduce(torch.zeros(8, 5)).value
    tensor([0., 0., 0., 0., 0.])
    """


class PIWAE(_Grouped):
    r"""The importance-weighted bound for the model, a mean of those of groups for the guide.

    The model's parameters get the gradient of :class:`IWAE` with all particles, the guide's that of :class:`MIWAE`,
    which has a better signal-to-noise ratio. The reported bound is that of :class:`IWAE`.

    Args:
        num_particles: :math:`K`, in all groups together.
        num_groups: number of groups for the guide's gradient, a divisor of `num_particles`; :class:`IWAE` at 1.
        gradient: the estimator of the gradient.
        chunk_size: particles that the model runs on at once; None for all.
        regularizers: terms added to the loss.

    Raises:
        ValueError: when an argument is out of range, or `num_groups` does not divide `num_particles`.

    References:
        Tighter Variational Bounds are Not Necessarily Better, T. Rainforth, A. R. Kosiorek, T. A. Le, C. J. Maddison,
        M. Igl, F. Wood and Y. W. Teh, 2018, https://arxiv.org/abs/1802.04537.

    >>> PIWAE(num_particles=8, num_groups=8).reduce_model(torch.zeros(8, 5)).first[0, 0]
    tensor(0.1250)
    """

    def reduce_model(self, log_w: Tensor) -> Reduced:
        return power_mean(log_w, 1.0)


class CIWAE(ImportanceBound):
    r"""A convex combination of the ELBO and the importance-weighted bound of the same particles.

    .. math:: \beta\, \frac{1}{K} \sum_k \log w_k + (1 - \beta) \log \frac{1}{K} \sum_k w_k \;\le\; \log p(x)
        \quad \text{in expectation}

    Args:
        num_particles: :math:`K`, at least 1.
        beta: :math:`\beta`, from 0 (the importance-weighted bound) to 1 (the ELBO).
        gradient: the estimator of the gradient.
        chunk_size: particles that the model runs on at once; None for all.
        regularizers: terms added to the loss.

    Raises:
        ValueError: when an argument is out of range.

    References:
        Tighter Variational Bounds are Not Necessarily Better, T. Rainforth, A. R. Kosiorek, T. A. Le, C. J. Maddison,
        M. Igl, F. Wood and Y. W. Teh, 2018, https://arxiv.org/abs/1802.04537.

    >>> CIWAE(num_particles=2, beta=1.0).reduce(torch.tensor([0.0, 2.0])).value
    tensor(1.)
    """

    def __init__(
        self,
        num_particles: int,
        beta: float = 0.5,
        gradient: Gradient | None = None,
        chunk_size: int | None = None,
        regularizers: Sequence[Regularizer] = (),
    ):
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be from 0 to 1, got {beta}.")
        self.beta = beta
        super().__init__(num_particles, gradient, chunk_size, regularizers)

    def reduce(self, log_w: Tensor) -> Reduced:
        return power_mean(log_w, 0.0).scaled(self.beta).plus(power_mean(log_w, 1.0).scaled(1 - self.beta))


class Renyi(ImportanceBound):
    r"""The Rényi bound, by its estimate from K particles.

    .. math:: \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_{k=1}^K w_k^{1 - \alpha}

    For :math:`\alpha \ge 0` it is a lower bound on :math:`\log p(x)` in expectation, at any K: the importance-weighted
    bound at 0, the ELBO at 1. For :math:`\alpha < 0` it is an upper bound in the limit of many particles only; with few
    particles it is neither. It decreases in :math:`\alpha`.

    Args:
        num_particles: :math:`K`, at least 1.
        alpha: :math:`\alpha`, any finite number.
        gradient: the estimator of the gradient.
        chunk_size: particles that the model runs on at once; None for all.
        regularizers: terms added to the loss.

    Raises:
        ValueError: when an argument is out of range.

    References:
        Rényi Divergence Variational Inference, Y. Li and R. E. Turner, 2016, https://arxiv.org/abs/1602.02311.

    >>> Renyi(num_particles=2, alpha=1.0).reduce(torch.tensor([0.0, 2.0])).value
    tensor(1.)
    """

    def __init__(
        self,
        num_particles: int,
        alpha: float,
        gradient: Gradient | None = None,
        chunk_size: int | None = None,
        regularizers: Sequence[Regularizer] = (),
    ):
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be a finite number, got {alpha}. VRMax is the limit of minus infinity.")
        self.alpha, self.linear = alpha, alpha == 1
        super().__init__(num_particles, gradient, chunk_size, regularizers)

    def reduce(self, log_w: Tensor) -> Reduced:
        return power_mean(log_w, 1 - self.alpha)


class VRMax(ImportanceBound):
    r"""The largest log weight of K particles: the estimate of the Rényi bound at minus infinity, which is not a bound.

    .. math:: \max_k \log w_k \;\ge\; \log \frac{1}{K} \sum_k w_k

    Only the particle with the largest weight has a gradient.

    Args:
        num_particles: :math:`K`, at least 1.
        chunk_size: particles that the model runs on at once; None for all.
        regularizers: terms added to the loss.

    Raises:
        ValueError: when an argument is out of range.

    References:
        Rényi Divergence Variational Inference, Y. Li and R. E. Turner, 2016, https://arxiv.org/abs/1602.02311.

    >>> VRMax(num_particles=2).reduce(torch.tensor([0.0, 2.0])).value
    tensor(2.)
    """

    smooth = False

    def __init__(self, num_particles: int, chunk_size: int | None = None, regularizers: Sequence[Regularizer] = ()):
        super().__init__(num_particles, None, chunk_size, regularizers)

    def reduce(self, log_w: Tensor) -> Reduced:
        return power_mean(log_w, math.inf)


class CUBO(ImportanceBound):
    r"""The chi upper bound. Minimising it fits the guide to the model's posterior; it does not train the model.

    .. math:: \log p(x) \;\le\; \frac{1}{n} \log \mathrm{E}_{q(z \mid x)} w^n \;\approx\;
        \frac{1}{n} \log \frac{1}{K} \sum_{k=1}^K w_k^n

    The estimate of the bound is biased downwards: use many particles. A guide fitted by it covers the posterior, as a
    proposal for importance sampling should. The gradient,
    :math:`\frac{1 - n}{n} \sum_k \bar w_k \nabla \log q(z_k \mid x)` with :math:`\bar w_k \propto w_k^n`, is that of
    the bound, not that of the estimate, whose infimum over q is minus infinity. It is consistent in K.

    Args:
        num_particles: :math:`K`, at least 2, or 1 if doubly reparameterised.
        n: :math:`n`, above 1.
        gradient: ``DoublyReparameterized()`` for :math:`(1 - n) \sum_k \bar w_k (\partial \log w_k / \partial z_k)
            \nabla z_k`, which has the same limit and less noise, and needs latents with an rsample; or None.
        chunk_size: particles that the model runs on at once; None for all.
        regularizers: terms added to the loss.

    Raises:
        ValueError: when an argument is out of range.

    References:
        Variational Inference via chi Upper Bound Minimization, A. B. Dieng, D. Tran, R. Ranganath, J. Paisley and
        D. M. Blei, 2017, https://arxiv.org/abs/1611.00328.

    >>> CUBO(num_particles=2).reduce(torch.zeros(2)).value
    tensor(0.)
    """

    is_upper = True

    def __init__(
        self,
        num_particles: int,
        n: float = 2.0,
        gradient: DoublyReparameterized | None = None,
        chunk_size: int | None = None,
        regularizers: Sequence[Regularizer] = (),
    ):
        if not 1 < n < math.inf:
            raise ValueError(f"n must be above 1 and finite, got {n}. At 1 the bound is log p(x) for any guide.")
        if not (gradient is None or isinstance(gradient, DoublyReparameterized)):
            raise ValueError(
                f"gradient of CUBO must be None, for its own, or DoublyReparameterized(), got {gradient!r}."
            )
        if gradient is None and num_particles == 1:
            raise ValueError("CUBO needs num_particles of at least 2: the gradient of a single particle is only noise.")
        self.n = n
        super().__init__(num_particles, gradient, chunk_size, regularizers)

    def reduce(self, log_w: Tensor) -> Reduced:
        return power_mean(log_w, self.n)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = normalized(self.n * log_w)
        if self.gradient.reparameterized:
            return Coefficients(path=(self.n - 1) * w)
        return Coefficients(guide=(self.n - 1) / self.n * w)


class TVO(ImportanceBound):
    r"""The thermodynamic variational objective: a lower Riemann sum of an integral that is log p(x).

    .. math:: \sum_{i=1}^P (\beta_i - \beta_{i-1})\, \mathrm{E}_{\pi_{\beta_{i-1}}} \log w \;\le\;
        \int_0^1 \mathrm{E}_{\pi_\beta} \log w \, d\beta = \log p(x), \qquad \pi_\beta \propto q^{1-\beta} p^\beta

    with the means estimated by self-normalised weights of K particles, so that it is below the importance-weighted
    bound of the same particles. The inverse temperatures are 0 and, from :math:`\beta_1` to 1, evenly spaced in their
    logarithm. With one partition it is the ELBO.

    Args:
        num_particles: :math:`K`, at least 1.
        num_partitions: :math:`P`, at least 1.
        beta_1: the first inverse temperature above 0, between 0 and 1.
        gradient: the estimator of the gradient; ``Covariance()`` is the paper's, which needs no rsample.
        chunk_size: particles that the model runs on at once; None for all.
        regularizers: terms added to the loss.

    Raises:
        ValueError: when an argument is out of range.

    References:
        The Thermodynamic Variational Objective, V. Masrani, T. A. Le and F. Wood, 2019,
        https://arxiv.org/abs/1907.00031.

    >>> TVO(num_particles=2, num_partitions=1).reduce(torch.tensor([0.0, 2.0])).value
    tensor(1.)
    """

    def __init__(
        self,
        num_particles: int,
        num_partitions: int = 5,
        beta_1: float = 0.025,
        gradient: Gradient | None = None,
        chunk_size: int | None = None,
        regularizers: Sequence[Regularizer] = (),
    ):
        if not (isinstance(num_partitions, int) and num_partitions >= 1):
            raise ValueError(f"num_partitions must be an integer of at least 1, got {num_partitions}.")
        if not 0 < beta_1 < 1:
            raise ValueError(f"beta_1 must be between 0 and 1, got {beta_1}.")
        ends = (
            [beta_1 ** (1 - i / (num_partitions - 1)) for i in range(num_partitions)] if num_partitions > 1 else [1.0]
        )
        self.num_partitions, self.beta_1 = num_partitions, beta_1
        self.betas = (0.0, *ends[:-1])
        self.lengths = tuple(end - beta for beta, end in zip(self.betas, ends, strict=True))
        super().__init__(num_particles, gradient, chunk_size, regularizers)

    def reduce(self, log_w: Tensor) -> Reduced:
        return thermodynamic_sum(log_w, self.betas, self.lengths)

    def influence(self, log_w: Tensor) -> Tensor:
        r"""Returns coefficients of :math:`\nabla \log q(z_k \mid x)` in the gradient of the sum, not its estimate."""
        total = torch.zeros_like(log_w)
        for beta, length in zip(self.betas, self.lengths, strict=True):
            w, _, excess = tempered(log_w, beta)
            total = total + length * w * ((1 - beta) * excess - 1)
        return total


class ReweightedWakeSleep(ImportanceBound):
    r"""Reweighted wake-sleep: trains the model by the importance-weighted bound, the guide by the model's posterior.

    .. math:: \text{model: } \sum_k \bar w_k \nabla \log p(x, z_k), \qquad
        \text{guide: } \alpha \sum_k \bar w_k \nabla \log q(z_k \mid x)
        + \gamma\, \mathrm{E}_{p(x', z')} \nabla \log q(z' \mid x'), \qquad \bar w_k = \frac{w_k}{\sum_j w_j}

    with weights per datum. Neither gradient needs an rsample, so that latents may be discrete. The reported bound is
    that of :class:`IWAE`. The sleep phase draws as many data from the model as there are in the batch; it needs a model
    that observes its arguments unchanged.

    Args:
        num_particles: :math:`K`, at least 2, or 1 for the sleep phase alone.
        wake: weight :math:`\alpha` of the guide's wake phase, at least 0.
        sleep: weight :math:`\gamma` of the guide's sleep phase, at least 0.
        chunk_size: particles that the model runs on at once; None for all.
        regularizers: terms added to the loss.

    Raises:
        ValueError: when an argument is out of range; or, in the sleep phase, when a site observes none of the
            arguments.

    References:
        Reweighted Wake-Sleep, J. Bornschein and Y. Bengio, 2015, https://arxiv.org/abs/1406.2751; Revisiting Reweighted
        Wake-Sleep for Models with Stochastic Control Flow, T. A. Le, A. R. Kosiorek, N. Siddharth, Y. W. Teh and
        F. Wood, 2019, https://arxiv.org/abs/1805.10469.

    >>> ReweightedWakeSleep(num_particles=10, wake=0.5, sleep=0.5).num_particles
    10
    """

    def __init__(
        self,
        num_particles: int,
        wake: float = 1.0,
        sleep: float = 0.0,
        chunk_size: int | None = None,
        regularizers: Sequence[Regularizer] = (),
    ):
        for name, value in (("wake", wake), ("sleep", sleep)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}.")
        if wake == sleep == 0:
            raise ValueError(
                "wake and sleep are both 0, so that the guide would not be trained. Make one of them positive."
            )
        if wake > 0 and num_particles == 1:
            raise ValueError(
                "The wake phase needs num_particles of at least 2: the guide's gradient of a single particle is only "
                "noise."
            )
        self.wake, self.sleep = wake, sleep
        super().__init__(num_particles, None, chunk_size, regularizers)

    def reduce(self, log_w: Tensor) -> Reduced:
        return power_mean(log_w, 1.0)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        w = normalized(log_w)
        return Coefficients(model=w, guide=self.wake * w)

    def extra_surrogate(self, run: Run, structure: SiteStructure, scale: float | Tensor) -> Tensor | float:
        if self.sleep == 0:
            return 0.0
        drawn, args, kwargs = simulate(run.model, structure, *run.args, **run.kwargs)
        sites = sample_sites(annotate_plates(traced(run.guide, drawn, *args, **kwargs), structure))
        log_q = torch.as_tensor(sum((per_datum(s, log_prob_of(s).unsqueeze(0)) for s in sites.values()), 0.0))
        return self.sleep * (log_q * scale).sum()
