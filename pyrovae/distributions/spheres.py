"""Distributions on the unit sphere."""

import math
from typing import Any

import numpy as np
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import register_kl
from torch.nn.functional import normalize

from pyrovae.distributions.spaces import ShapeLike, keep_checks


class HypersphericalUniform(dist.TorchDistribution):
    r"""The uniform distribution on the unit sphere in m dimensions.

    .. math:: p(z) = \frac{\Gamma(m / 2)}{2 \pi^{m / 2}}, \qquad \lVert z \rVert = 1

    Args:
        like: a tensor of shape ``(m,)`` with the dimension, device and dtype of the draws.
        batch_shape: the batch shape.

    >>> HypersphericalUniform(torch.empty(3)).log_prob(torch.tensor([0.0, 0.0, 1.0]))  # the area is 4 pi
    tensor(-2.5310)
    """

    arg_constraints = {}
    support = constraints.sphere

    def __init__(self, like: Tensor, batch_shape: ShapeLike = torch.Size()):
        self.like = like
        super().__init__(torch.Size(batch_shape), like.shape)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "HypersphericalUniform":
        return HypersphericalUniform(self.like, batch_shape)

    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        return normalize(self.like.new_empty(self._extended_shape(sample_shape)).normal_(), dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.like.new_full(shape, -_log_area(self.event_shape[0]))

    @property
    def mean(self) -> Tensor:
        return self.like.new_zeros(self.batch_shape + self.event_shape)


class VonMisesFisher(dist.TorchDistribution):
    r"""The von Mises-Fisher distribution on the unit sphere in any dimension m of at least 2, reparameterised.

    .. math:: p(z) = \frac{\exp(\kappa\, \mu^\top z)}{A_m\; {}_0F_1(; m/2; \kappa^2/4)}, \qquad
        A_m = \frac{2 \pi^{m/2}}{\Gamma(m/2)}

    This is the usual form with a Bessel function, written without a division by zero at :math:`\kappa = 0`. The height
    :math:`w = \mu^\top z` is drawn by Wood's rejection sampling. Its derivative by :math:`\kappa` is
    :math:`-\partial_\kappa F(w; \kappa) / f(w; \kappa)`, computed by quadrature. These gradients are unbiased; those
    through the accepted proposal alone, as in Davidson et al., are not.

    Args:
        loc: mean direction :math:`\mu`, of unit length, shape ``(*batch, m)``.
        concentration: :math:`\kappa \ge 0`, shape ``(*batch,)``.

    References:
        Hyperspherical Variational Auto-Encoders, T. R. Davidson, L. Falorsi, N. De Cao, T. Kipf and J. M. Tomczak,
        2018, https://arxiv.org/abs/1804.00891; Simulation of the von Mises Fisher Distribution, A. T. A. Wood, 1994,
        https://doi.org/10.1080/03610919408813161; Implicit Reparameterization Gradients, M. Figurnov, S. Mohamed and
        A. Mnih, 2018, https://arxiv.org/abs/1805.08498.

    >>> p = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(5.0))
    >>> p.log_prob(torch.tensor([0.0, 0.0, 1.0]))  # log(kappa / (2 pi (1 - exp(-2 kappa))))
    tensor(-0.2284)
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.nonnegative}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor, validate_args: bool | None = None):
        if loc.shape[-1] < 2:
            raise ValueError(f"loc must be vectors of at least 2 dimensions, got shape {tuple(loc.shape)}.")
        batch_shape = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        self.loc = loc.expand(*batch_shape, loc.shape[-1])
        self.concentration = concentration.expand(batch_shape)
        super().__init__(batch_shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "VonMisesFisher":
        batch_shape = torch.Size(batch_shape)
        loc, concentration = self.loc.expand(batch_shape + self.event_shape), self.concentration.expand(batch_shape)
        return keep_checks(self, VonMisesFisher(loc, concentration, validate_args=False))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        m = self.event_shape[0]
        return self.concentration * (self.loc * value).sum(-1) - log_0f1(m / 2, self.concentration) - _log_area(m)

    @property
    def mean(self) -> Tensor:
        return self._mean_height().unsqueeze(-1) * self.loc

    def _mean_height(self) -> Tensor:
        m, kappa = self.event_shape[0], self.concentration
        return kappa / m * (log_0f1(m / 2 + 1, kappa) - log_0f1(m / 2, kappa)).exp()

    def rsample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        kappa = self.concentration.expand(shape[:-1]).double()
        with torch.no_grad():
            height = _vmf_heights(kappa, shape[-1])
        if self.concentration.requires_grad and torch.is_grad_enabled():
            slope = _vmf_slopes(height, kappa.detach(), self._mean_height().detach().double(), shape[-1])
            height = height + slope * (kappa - kappa.detach())
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        # A uniform direction in the tangent plane at the mean, differentiable in the mean.
        tangent = normalize(noise - (noise * self.loc).sum(-1, keepdim=True) * self.loc, dim=-1)
        radius = (1 - height.square()).clamp_min(torch.finfo(height.dtype).tiny).sqrt()
        height, radius = height.to(noise.dtype).unsqueeze(-1), radius.to(noise.dtype).unsqueeze(-1)
        return normalize(height * self.loc + radius * tangent, dim=-1)  # of length one up to rounding


@register_kl(VonMisesFisher, HypersphericalUniform)
def _kl_von_mises_fisher_uniform(q: VonMisesFisher, p: HypersphericalUniform) -> Tensor:
    return q.concentration * q._mean_height() - log_0f1(q.event_shape[0] / 2, q.concentration)


def log_0f1(b: float, kappa: Tensor) -> Tensor:
    r"""Returns :math:`\log {}_0F_1(; b; \kappa^2 / 4)` for b of at least 1, differentiable, in the precision of kappa.

    .. math:: {}_0F_1(; b; \kappa^2/4) = \sum_{j \ge 0} \frac{(\kappa^2/4)^j}{j!\, (b)_j}
        = \Gamma(b) \left(\frac{2}{\kappa}\right)^{b - 1} I_{b - 1}(\kappa)

    Up to :math:`\kappa = 30` the series is summed. Above, the uniform asymptotic expansion of the Bessel function I in
    powers of :math:`1 / \sqrt{(b-1)^2 + \kappa^2}` is used, with an error below 2e-8.

    References:
        NIST Handbook of Mathematical Functions, F. W. J. Olver et al., 2010, https://dlmf.nist.gov/10.41.

    >>> log_0f1(1.5, torch.tensor(2.0))  # log(sinh(2) / 2)
    tensor(0.5952)
    """
    dtype, kappa, order = kappa.dtype, kappa.double(), b - 1
    small, large = kappa.clamp(1e-70, 30), kappa.clamp_min(30)
    # The largest term is at j < 15, the last below e^-200.
    j = torch.arange(100, dtype=torch.float64, device=kappa.device)
    terms = 2 * j * (small / 2).log().unsqueeze(-1) - torch.lgamma(j + 1) - torch.lgamma(j + b) + math.lgamma(b)
    series = terms.logsumexp(-1)
    r = (large.square() + order**2).sqrt()
    q = order**2 / r.square()
    expansion = (
        1
        + (3 - 5 * q) / (24 * r)
        + (81 - 462 * q + 385 * q**2) / (1152 * r**2)
        + (30375 - 369603 * q + 765765 * q**2 - 425425 * q**3) / (414720 * r**3)
        + (4465125 - 94121676 * q + 349922430 * q**2 - 446185740 * q**3 + 185910725 * q**4) / (39813120 * r**4)
    )
    log_bessel = r + order * (large / (order + r)).log() - 0.5 * (2 * math.pi * r).log() + expansion.log()
    asymptotic = log_bessel - order * (large / 2).log() + math.lgamma(b)
    return torch.where(kappa > 30, asymptotic, series).to(dtype)


def _log_area(m: int) -> float:
    return math.log(2) + m / 2 * math.log(math.pi) - math.lgamma(m / 2)


def _vmf_heights(kappa: Tensor, m: int) -> Tensor:
    """Draws heights with density proportional to exp(kappa w) (1 - w^2)^((m - 3) / 2), by Wood's rejection sampling."""
    b = (m - 1) / (2 * kappa + (4 * kappa.square() + (m - 1) ** 2).sqrt())
    x = (1 - b) / (1 + b)
    # log(1 - x^2) without cancellation.
    c = kappa * x + (m - 1) * (4 * b / (1 + b).square()).log()
    half = torch.full_like(kappa, (m - 1) / 2)
    height, todo = torch.zeros_like(kappa), torch.ones_like(kappa, dtype=torch.bool)
    while bool(todo.any()):
        beta = torch.distributions.Beta(half, half, validate_args=False).sample()
        w = (1 - (1 + b) * beta) / (1 - (1 - b) * beta)
        accepted = kappa * w + (m - 1) * (1 - x * w).log() - c >= torch.rand_like(kappa).log()
        height = torch.where(todo & accepted, w, height)
        todo = todo & ~accepted
    return height


@torch.no_grad()
def _vmf_slopes(height: Tensor, kappa: Tensor, mean: Tensor, m: int) -> Tensor:
    r"""Returns the derivative of a height by kappa, with its cumulative probability F fixed.

    With :math:`t = \cos\theta`, :math:`\partial_\kappa F(w) = \int_{t < w} (t - \mathrm{E}\, t) f(t)\, dt`. The
    integrand has one sign on each side of the mean and integrates to zero over both. Therefore the integral goes over
    the side of w that does not contain the mean, where nothing cancels, up to twelve standard deviations.
    """
    nodes, weights = (torch.from_numpy(a).to(height) for a in np.polynomial.legendre.leggauss(48))
    angle = height.clamp(-1, 1).acos()
    reach = 12 / torch.maximum(kappa, torch.full_like(kappa, m - 2)).clamp_min(1e-2).sqrt()
    below = height < mean
    far = torch.where(below, (angle + reach).clamp_max(math.pi), (angle - reach).clamp_min(0))
    half = (far - angle).unsqueeze(-1) / 2
    theta = angle.unsqueeze(-1) + half * (nodes + 1)
    t, w = theta.cos(), height.unsqueeze(-1)
    sines = theta.sin().clamp_min(1e-300).log() - angle.sin().clamp_min(1e-300).log().unsqueeze(-1)
    ratio = (kappa.unsqueeze(-1) * (t - w) + (m - 2) * sines).exp()
    integral = (weights * half * (t - mean.unsqueeze(-1)) * ratio).sum(-1)
    # Below the mean: minus the integral from the angle to pi. Above: the same for the other side, where half < 0.
    return -integral * angle.sin()
