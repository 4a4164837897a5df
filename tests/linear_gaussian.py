"""Linear-Gaussian VAEs, with log p(x), posteriors and bounds in closed form, for tests that need exact values.

With p(z) = N(0, I) and p(x | z) = N(W z + b, s^2 I),

    p(x) = N(b, W W^T + s^2 I),   p(z | x) = N(m(x), S),   S = (I + W^T W / s^2)^-1,   m(x) = S W^T (x - b) / s^2.

All of it is computed here, apart from the library, in double precision.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from pyrovae import VAE, encoders, likelihoods, priors
from pyrovae.encoders import DiagonalNormal, FullRankNormal
from pyrovae.likelihoods import Normal
from pyrovae.nn import MLP
from pyrovae.priors import StandardNormal
from pyrovae.structures import HierarchicalVAE, LadderVAE

AFFINE = partial(MLP, hidden=())


class Truth(NamedTuple):
    """The generative parameters, with W of shape (x_dim, latent_dim), and the closed forms."""

    weight: Tensor
    bias: Tensor
    scale: float

    def marginal(self) -> MultivariateNormal:
        noise = self.scale**2 * torch.eye(len(self.bias), dtype=torch.float64)
        return MultivariateNormal(self.bias, self.weight @ self.weight.T + noise)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        precision = torch.eye(self.weight.shape[1], dtype=torch.float64) + self.weight.T @ self.weight / self.scale**2
        covariance = torch.linalg.inv(precision)
        return MultivariateNormal((x - self.bias) @ self.weight @ covariance / self.scale**2, covariance)

    def elbo(self, x: Tensor, q: MultivariateNormal) -> Tensor:
        return self.marginal().log_prob(x) - kl_divergence(q, self.posterior(x))

    def log_chernoff(self, x: Tensor, q: MultivariateNormal, power: float) -> Tensor:
        r"""Returns the logarithm of the integral of p(z | x)^s q(z)^(1 - s), which is the mean of (w / p(x))^s."""
        total = torch.zeros(len(x), dtype=torch.float64)
        precision, linear = 0.0, 0.0
        for s, d in ((power, self.posterior(x)), (1 - power, q)):
            at = (d.precision_matrix @ d.mean.unsqueeze(-1)).squeeze(-1)
            precision, linear = precision + s * d.precision_matrix, linear + s * at
            constant = torch.logdet(d.precision_matrix) - len(self.weight.T) * math.log(2 * math.pi)
            total = total + 0.5 * s * (constant - (at * d.mean).sum(-1))
        # The integral of exp(-z'Az/2 + b'z), which is finite if A is positive definite.
        assert (torch.linalg.eigvalsh(precision) > 0).all()
        square = (linear * torch.linalg.solve(precision, linear)).sum(-1)
        return total + 0.5 * (square - torch.logdet(precision) + len(self.weight.T) * math.log(2 * math.pi))


def truth(latent_dim: int, x_dim: int, scale: float = 0.5) -> Truth:
    weight = torch.randn(x_dim, latent_dim, dtype=torch.float64) / math.sqrt(latent_dim)
    return Truth(weight, torch.randn(x_dim, dtype=torch.float64), scale)


def vae_of(known: Truth, widen: float = 1.0, shift: float = 0.0) -> VAE:
    """Returns the VAE with these parameters, in double precision, whose encoder is the exact posterior.

    With `widen` the encoder's standard deviations are that many times too large: a worse proposal with heavier tails,
    whose weights are bounded. With `shift` its mean is off by so many posterior standard deviations.
    """
    x_dim, latent_dim = known.weight.shape
    likelihood = Normal(latent_dim, x_dim, AFFINE)
    vae = VAE(StandardNormal(latent_dim), likelihood, FullRankNormal(x_dim, latent_dim, AFFINE)).double()
    at_zero = known.posterior(torch.zeros(x_dim, dtype=torch.float64))
    slope = torch.autograd.functional.jacobian(lambda x: known.posterior(x).mean, torch.zeros_like(known.bias))
    factor = widen * at_zero.scale_tril
    set_affine(likelihood.network, known.weight, known.bias)
    likelihood.log_scale.data.fill_(math.log(known.scale))
    below = torch.tril_indices(latent_dim, latent_dim, offset=-1)
    # The encoder's diagonal is softplus(raw + log(e - 1)) + 1e-6.
    raw = torch.log(torch.expm1(factor.diagonal() - 1e-6)) - math.log(math.e - 1)
    bias = torch.cat([at_zero.mean + shift * at_zero.stddev, raw, factor[below[0], below[1]]])
    weight = torch.zeros(len(bias), x_dim, dtype=torch.float64)
    weight[:latent_dim] = slope
    set_affine(vae.encoder.network, weight, bias)
    return vae


def diagonal_vae(latent_dim: int, x_dim: int, decoder_weight: float = 1.0) -> VAE:
    """Returns an untrained linear VAE with a diagonal encoder, for :func:`elbo_of`, its decoder scaled."""
    likelihood = Normal(latent_dim, x_dim, AFFINE, scale=0.7)
    vae = VAE(StandardNormal(latent_dim), likelihood, DiagonalNormal(x_dim, latent_dim, AFFINE)).double()
    likelihood.network.layers[0].weight.data.mul_(decoder_weight)
    return vae


def set_affine(network: MLP, weight: Tensor, bias: Tensor) -> None:
    (layer,) = network.layers
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)


def elbo_of(vae: VAE, x: Tensor) -> Tensor:
    r"""Returns the ELBO of a linear-Gaussian VAE in closed form, ``(batch,)``, differentiable in all its parameters.

    E_q[log N(x; W z + b, s^2)] = -D/2 log(2 pi s^2) - (|x - W m - b|^2 + tr(W S W^T)) / (2 s^2), less KL(q || p(z)).
    """
    (layer,) = vae.likelihood.network.layers
    q = vae.encoder(x)
    mean = q.mean
    covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else torch.diag_embed(q.variance)
    log_variance = 2 * vae.likelihood.log_scale
    misfit = (x - mean @ layer.weight.T - layer.bias).square().sum(-1)
    spread = torch.einsum("di,bij,dj->b", layer.weight, covariance, layer.weight)
    constant = -x.shape[-1] / 2 * (math.log(2 * math.pi) + log_variance)
    expected = constant - (misfit + spread) / (2 * log_variance.exp())
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return expected - 0.5 * (trace + mean.square().sum(-1) - mean.shape[-1] - torch.logdet(covariance))


def gradients(value: Tensor, vae: VAE) -> Tensor:
    """Returns the gradient in all trainable parameters of a VAE as one vector, zero where there is none."""
    parameters = [p for p in vae.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def repeat(estimate: Callable[[], Tensor], times: int) -> Tensor:
    return torch.stack([torch.as_tensor(estimate()).detach().double() for _ in range(times)])


def assert_mean(draws: Tensor, expected: Tensor, failure_rate: float) -> None:
    """Asserts that independent draws ``(times, *shape)`` have this mean: a t test per entry, Bonferroni over entries.

    An entry that does not vary must hit its expectation up to rounding.
    """
    times, draws = len(draws), draws.reshape(len(draws), -1)
    deviation = (draws.mean(0) - expected.detach().double().reshape(-1)).abs()
    error = draws.std(0) / math.sqrt(times)
    bound = scipy.stats.t(times - 1).isf(failure_rate / 2 / draws.shape[1])
    floor = 1e-12 * (1 + draws.abs().amax(0))  # thousands of double-precision roundings of sums
    worst = (deviation / (bound * error + floor)).max().item()
    assert worst < 1, f"a mean is {worst * bound:.1f} standard errors from the truth, more than {bound:.1f}"


def assert_fraction(successes: int, total: int, probability: float, failure_rate: float) -> None:
    """Asserts that a number of successes agrees with a binomial distribution, by a test of this failure rate."""
    low, high = scipy.stats.binom(total, probability).interval(1 - failure_rate)
    assert low <= successes <= high, f"{successes} of {total}, expected {low:.0f} to {high:.0f}"


def assert_unit_scores(scores: Tensor, failure_rate: float) -> None:
    """Asserts that the sum of squares of z-scores agrees with a chi-square distribution."""
    low, high = scipy.stats.chi2(scores.numel()).interval(1 - failure_rate)
    total = np.square(scores.numpy()).sum()
    assert low <= total <= high, f"the sum of z^2 is {total:.1f}, expected {low:.1f} to {high:.1f}"


def set_normal(
    encoder: nn.Module, slope: Tensor, at_zero: Tensor, factor: Tensor, classes: Tensor | None = None
) -> None:
    """Sets the weights of an affine normal encoder to N(at_zero + slope x + classes y, factor factor^T)."""
    raw = torch.log(torch.expm1(factor.diagonal() - 1e-6)) - math.log(math.e - 1)
    below = torch.tril_indices(len(factor), len(factor), offset=-1)
    lower = factor[below[0], below[1]] if isinstance(encoder, encoders.FullRankNormal) else factor.new_zeros(0)
    bias = torch.cat([at_zero, raw, lower])
    slope = slope if classes is None else torch.cat([slope, classes], dim=1)
    set_affine(encoder.network, torch.cat([slope, slope.new_zeros(len(bias) - len(slope), slope.shape[1])]), bias)


def set_likelihood(part: nn.Module, weight: Tensor, bias: Tensor, scale: float) -> None:
    set_affine(part.network, weight, bias)
    part.log_scale.data.fill_(math.log(scale))


class Gaussian(NamedTuple):
    """A linear-Gaussian model, x | z ~ N(weight z + bias, noise) for z ~ N(mean, covariance), and its closed forms."""

    mean: Tensor
    covariance: Tensor
    weight: Tensor
    bias: Tensor
    noise: Tensor

    def marginal(self) -> MultivariateNormal:
        return MultivariateNormal(
            self.weight @ self.mean + self.bias, self.weight @ self.covariance @ self.weight.T + self.noise
        )

    def posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the slope in x, the mean at x = 0 and the covariance of z given x."""
        gain = self.covariance @ self.weight.T @ torch.linalg.inv(self.marginal().covariance_matrix)
        return gain, self.mean - gain @ self.marginal().mean, self.covariance - gain @ self.weight @ self.covariance


class Hierarchy(NamedTuple):
    """Two levels, z2 (2) -> z1 (3) -> x (4); the columns of the lower weight are orthogonal."""

    upper: Truth
    lower: Truth

    def of_z1(self) -> Gaussian:
        """Returns the model of x given z1, where z1 follows its marginal."""
        p = self.upper.marginal()
        noise = self.lower.scale**2 * torch.eye(4, dtype=torch.float64)
        return Gaussian(p.mean, p.covariance_matrix, self.lower.weight, self.lower.bias, noise)

    def of_z2(self) -> Gaussian:
        """Returns the model of x given z2."""
        eye = torch.eye(2, dtype=torch.float64)
        weight, bias = self.lower.weight @ self.upper.weight, self.lower.weight @ self.upper.bias + self.lower.bias
        noise = self.of_z1().noise + self.upper.scale**2 * self.lower.weight @ self.lower.weight.T
        return Gaussian(torch.zeros(2, dtype=torch.float64), eye, weight, bias, noise)

    def generative_parts(self) -> dict:
        conditional, likelihood = likelihoods.Normal(2, 3, AFFINE), likelihoods.Normal(3, 4, AFFINE)
        set_likelihood(conditional.double(), self.upper.weight, self.upper.bias, self.upper.scale)
        set_likelihood(likelihood.double(), self.lower.weight, self.lower.bias, self.lower.scale)
        return {"prior": priors.StandardNormal(2), "conditionals": [conditional], "likelihood": likelihood}


def hierarchy() -> Hierarchy:
    lower = truth(3, 4)
    return Hierarchy(truth(2, 3, scale=0.6), lower._replace(weight=torch.linalg.qr(lower.weight).Q * 1.5))


def bottom_up(known: Hierarchy, widen: float = 1.0) -> HierarchicalVAE:
    """Returns the model with its exact posterior p(z1 | x) p(z2 | z1) as the guide, made `widen` times as wide."""
    first, second = encoders.FullRankNormal(4, 3, AFFINE).double(), encoders.FullRankNormal(3, 2, AFFINE).double()
    for encoder, (slope, at_zero, covariance) in (
        (first, known.of_z1().posterior()),
        (second, posterior_of(known.upper)),
    ):
        set_normal(encoder, slope, at_zero, widen * torch.linalg.cholesky(covariance))
    return HierarchicalVAE(**known.generative_parts(), encoders=[first, second]).double()


def posterior_of(known: Truth) -> tuple[Tensor, Tensor, Tensor]:
    latent, x = known.weight.shape[::-1]
    eye, noise = torch.eye(latent, dtype=torch.float64), known.scale**2 * torch.eye(x, dtype=torch.float64)
    return Gaussian(torch.zeros(latent, dtype=torch.float64), eye, known.weight, known.bias, noise).posterior()


def ladder(known: Hierarchy, widen: float = 1.0) -> LadderVAE:
    """Returns the model with its exact posterior p(z2 | x) p(z1 | z2, x) as the guide, its top `widen` times as wide.

    The lower weight has orthogonal columns, so p(x | z1) as a function of z1 is a diagonal normal, whose product with
    p(z1 | z2) the ladder takes.
    """
    first, second = encoders.DiagonalNormal(4, 3, AFFINE).double(), encoders.FullRankNormal(4, 2, AFFINE).double()
    pseudoinverse = torch.linalg.pinv(known.lower.weight)
    covariance = known.lower.scale**2 * torch.linalg.inv(known.lower.weight.T @ known.lower.weight)
    set_normal(first, pseudoinverse, -pseudoinverse @ known.lower.bias, covariance.diagonal().sqrt().diag())
    slope, at_zero, covariance = known.of_z2().posterior()
    set_normal(second, slope, at_zero, widen * torch.linalg.cholesky(covariance))
    networks = [nn.Identity(), nn.Identity()]
    return LadderVAE(**known.generative_parts(), networks=networks, encoders=[first, second]).double()
