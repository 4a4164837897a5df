"""The ground truth: every estimate and every bound against a VAE whose log p(x) and posterior are known exactly."""

import math

import pytest
import scipy.stats
import torch
from helpers import FAILURE_RATE
from linear_gaussian import (
    assert_fraction,
    assert_mean,
    assert_unit_scores,
    diagonal_vae,
    elbo_of,
    gradients,
    repeat,
    truth,
    vae_of,
)
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyrovae import log_marginal, log_weights

EPS = torch.finfo(torch.float64).eps
DIMS = [(2, 3), (10, 20)]

dims = pytest.mark.parametrize(("latent_dim", "x_dim"), DIMS)


def rounding(x_dim: int, latent_dim: int, scale: float, dtype: torch.dtype = torch.float64) -> float:
    """How far rounding may move a log weight of a linear-Gaussian VAE.

    The log weight sums x_dim + 2 latent_dim squares; each is below 50 (a draw beyond 10 standard deviations), and its
    residual comes of a sum of latent_dim + 1 products below 10, whose rounding the division by the scale enlarges.
    """
    terms = x_dim + 2 * latent_dim
    return torch.finfo(dtype).eps * terms * (50 + 10 * (10 / scale) * (latent_dim + 1))


@dims
def test_the_reference_agrees_with_itself(latent_dim, x_dim):
    # p(x) = p(x, z) / p(z | x) at any z: the closed forms of the marginal and the posterior belong together, and the
    # VAE built from them has the exact posterior.
    known = truth(latent_dim, x_dim)
    vae = vae_of(known)
    x = known.marginal().sample((5,))
    z = torch.randn(5, latent_dim, dtype=torch.float64)
    joint = vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x)
    bound = rounding(x_dim, latent_dim, known.scale) * (1 + z.square().sum().item())
    torch.testing.assert_close(joint - known.posterior(x).log_prob(z), known.marginal().log_prob(x), rtol=0, atol=bound)
    q, p = vae.encoder(x), known.posterior(x)
    torch.testing.assert_close(q.mean, p.mean, rtol=0, atol=1e3 * EPS)  # of about 1, from sums of 20 terms twice over
    torch.testing.assert_close(q.covariance_matrix, p.covariance_matrix.expand(5, -1, -1), rtol=0, atol=1e3 * EPS)


@dims
def test_weights_of_the_exact_posterior_are_constant(latent_dim, x_dim):
    known = truth(latent_dim, x_dim)
    vae = vae_of(known)
    x = known.marginal().sample((6,))
    with torch.no_grad():
        log_w = log_weights(vae.model, vae.guide, x, num_samples=200)
    error = (log_w - known.marginal().log_prob(x)).abs().max().item()
    assert error < rounding(x_dim, latent_dim, known.scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("num_samples", [100, 1000])
@dims
def test_log_marginal_with_the_exact_posterior_is_exact(latent_dim, x_dim, num_samples, dtype):
    known = truth(latent_dim, x_dim)
    vae = vae_of(known).to(dtype)
    x = known.marginal().sample((20,))
    estimate = log_marginal(vae.model, vae.guide, x.to(dtype), num_samples=num_samples, progress=False)
    # In float32 the weights and the data are rounded too, a relative change of eps as any other operation's.
    bound = rounding(x_dim, latent_dim, known.scale, dtype)
    assert (estimate.value.double() - known.marginal().log_prob(x)).abs().max() < bound
    # Weights with a relative spread of at most r have K / ess - 1 < r^2, and a standard error below r / sqrt(K - 1);
    # r^2 itself comes of sums, whose logarithms (below 200) are kept in double precision.
    square = bound**2 + 8 * EPS * 200
    assert (1 - estimate.ess.double() / num_samples).abs().max() < square + torch.finfo(dtype).eps
    assert estimate.standard_error.max() < math.sqrt(square / (num_samples - 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@dims
def test_khat_trusts_the_exact_posterior(latent_dim, x_dim, dtype):
    # The weights differ by rounding alone, in few distinct values: no tail, and nothing that must not be trusted.
    known = truth(latent_dim, x_dim)
    vae = vae_of(known).to(dtype)
    x = known.marginal().sample((20,)).to(dtype)
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=1000, progress=False)
    assert (estimate.khat <= 0.7).all()


@pytest.mark.parametrize(("widen", "shift"), [(1.3, 0.0), (1.5, 0.5)])
@dims
def test_log_marginal_is_within_its_standard_error(latent_dim, x_dim, widen, shift):
    known = truth(latent_dim, x_dim)
    vae = vae_of(known, widen, shift)
    x = known.marginal().sample((40,))
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=4000, progress=False)
    # The delta method holds to first order in the standard error, which is small here; the guide is heavy-tailed.
    assert estimate.standard_error.max() < 0.1
    assert (estimate.khat < 0.7).all()
    assert_unit_scores((estimate.value - known.marginal().log_prob(x)) / estimate.standard_error, FAILURE_RATE)


@dims
def test_the_standard_error_is_calibrated(latent_dim, x_dim):
    known = truth(latent_dim, x_dim)
    vae = vae_of(known, widen=1.3)
    x = known.marginal().sample((300,))
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=1000, progress=False)
    inside = (estimate.value - known.marginal().log_prob(x)).abs() < 1.96 * estimate.standard_error
    assert_fraction(int(inside.sum()), len(x), 0.95, FAILURE_RATE)


def test_the_mean_weight_is_unbiased():
    known = truth(2, 3)
    vae = vae_of(known, widen=1.5, shift=0.5)
    x = known.marginal().sample((4,))
    with torch.no_grad():
        log_w = log_weights(vae.model, vae.guide, x, num_samples=5000)
    assert_mean((log_w - known.marginal().log_prob(x)).exp(), torch.ones(4), FAILURE_RATE)


def test_more_samples_shrink_the_error_at_the_rate_of_monte_carlo():
    # The spread of 300 estimates falls as 1/sqrt(K): 10 times the samples, a tenth of its square. The ratio of two
    # variances of normal estimates follows the F distribution.
    known = truth(2, 3)
    vae = vae_of(known, widen=1.5)
    x = known.marginal().sample((1,)).expand(300, -1)
    few, many = (log_marginal(vae.model, vae.guide, x, num_samples=k, progress=False).value for k in (100, 1000))
    ratio = (few.var() / many.var()).item() / 10
    low, high = scipy.stats.f(299, 299).interval(1 - FAILURE_RATE)
    assert low < ratio < high


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@dims
def test_elbo_is_log_marginal_minus_kl_to_the_posterior(latent_dim, x_dim, elbo):
    known = truth(latent_dim, x_dim)
    vae = vae_of(known, widen=1.4, shift=0.5)
    x = known.marginal().sample((8,))
    q = vae.encoder(x)
    gap = kl_divergence(torch.distributions.MultivariateNormal(q.loc, scale_tril=q.scale_tril), known.posterior(x))
    expected = (known.marginal().log_prob(x) - gap).sum()
    loss = elbo(num_particles=100, vectorize_particles=True)
    assert_mean(repeat(lambda: -loss.loss(vae.model, vae.guide, x), 40), expected, FAILURE_RATE)
    # The same number from the parameters of the VAE: the closed form that the gradients below are compared with.
    torch.testing.assert_close(
        elbo_of(vae, x).sum(), expected, rtol=0, atol=8 * rounding(x_dim, latent_dim, known.scale)
    )


@dims
def test_one_particle_of_trace_elbo_with_the_exact_posterior_is_log_marginal(latent_dim, x_dim):
    known = truth(latent_dim, x_dim)
    vae = vae_of(known)
    x = known.marginal().sample((8,))
    loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    assert abs(-loss - known.marginal().log_prob(x).sum().item()) < 8 * rounding(x_dim, latent_dim, known.scale)


@dims
def test_analytic_elbo_and_its_gradient_are_exact(latent_dim, x_dim):
    # A decoder that ignores z leaves no noise in the expected log-likelihood; TraceMeanField_ELBO takes the KL in
    # closed form. So one evaluation is exact, and so is its gradient in all but the decoder's weight.
    vae = diagonal_vae(latent_dim, x_dim, decoder_weight=0.0)
    x = torch.randn(8, x_dim, dtype=torch.float64)
    loss = TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, x)
    exact = elbo_of(vae, x).sum()
    bound = 8 * rounding(x_dim, latent_dim, 0.7)
    torch.testing.assert_close(-loss, exact, rtol=0, atol=bound)
    ours, theirs = gradients(-loss, vae), gradients(exact, vae)
    names = [name for name, p in vae.named_parameters() if p.requires_grad for _ in range(p.numel())]
    free_of_noise = torch.tensor([name != "likelihood.network.layers.0.weight" for name in names])
    torch.testing.assert_close(ours[free_of_noise], theirs[free_of_noise], rtol=0, atol=bound)
    assert theirs[free_of_noise].abs().max() > 1  # there is a gradient to compare


def losses(vae, x):
    """Noisy ELBOs of 20 particles by name, each differentiable."""
    return {
        "Trace_ELBO": lambda: -Trace_ELBO(20, vectorize_particles=True).differentiable_loss(vae.model, vae.guide, x),
        "TraceMeanField_ELBO": lambda: (
            -TraceMeanField_ELBO(20, vectorize_particles=True).differentiable_loss(vae.model, vae.guide, x)
        ),
        "log_weights": lambda: log_weights(vae.model, vae.guide, x, num_samples=20).mean(0).sum(),
    }


@pytest.mark.parametrize("name", ["Trace_ELBO", "TraceMeanField_ELBO", "log_weights"])
@pytest.mark.parametrize("encoder", ["diagonal", "full rank"])
def test_gradients_of_the_elbo_have_the_mean_of_the_closed_form(name, encoder):
    vae = diagonal_vae(2, 3) if encoder == "diagonal" else vae_of(truth(2, 3), widen=1.4, shift=0.5)
    x = torch.randn(8, 3, dtype=torch.float64)
    loss = losses(vae, x)[name]
    exact = gradients(elbo_of(vae, x).sum(), vae)
    assert (exact != 0).sum() > 20
    assert_mean(repeat(lambda: gradients(loss(), vae), 40), exact, FAILURE_RATE)


def test_the_gradient_of_log_weights_is_the_gradient_of_log_marginal_under_the_exact_posterior():
    # d/dtheta log p(x) = E_{p(z|x)}[d/dtheta log p(x, z)] (Fisher's identity): weights drawn from the exact posterior.
    known = truth(2, 3)
    vae = vae_of(known)
    x = known.marginal().sample((8,))
    weight, bias = known.weight.clone().requires_grad_(), known.bias.clone().requires_grad_()
    exact = torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(
                known._replace(weight=weight, bias=bias).marginal().log_prob(x).sum(), (weight, bias)
            )
        ]
    )
    (layer,) = vae.likelihood.network.layers

    def estimate():
        total = log_weights(vae.model, vae.guide, x, num_samples=20).mean(0).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, (layer.weight, layer.bias))])

    assert_mean(repeat(estimate, 40), exact, FAILURE_RATE)
