"""The diagnosis of the steps of sequences, against a linear-Gaussian chain whose densities are known."""

import json
import math

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyrovae import VAE, encoders, likelihoods, priors
from pyrovae.diagnostics import steps
from pyrovae.estimators import ParticleFilter, Prior
from pyrovae.inference.weights import log_weights

A, Q, R, S = 0.8, 1.0, 0.6, 0.7  # z_t = A z_{t-1} + Q e, x_t = z_t + R e; the guide's z_t is x_t / 2 + S e
LENGTH = 7


def model(x, mask):
    z = torch.zeros(len(x))
    with pyro.plate("data", len(x)):
        for t in range(LENGTH):
            z = pyro.sample(f"z{t}", dist.Normal(A * z, Q))
            pyro.sample(f"x{t}", dist.Normal(z, R).mask(mask[:, t]), obs=x[:, t])


def guide(x, mask):
    with pyro.plate("data", len(x)):
        for t in range(LENGTH):
            pyro.sample(f"z{t}", dist.Normal(0.5 * x[:, t], S))


@pytest.fixture
def data():
    torch.manual_seed(0)
    x, mask = torch.randn(6, LENGTH).double() * 1.5, torch.ones(6, LENGTH, dtype=torch.bool)
    mask[2, 4:], mask[3, 2] = False, False
    return x, mask


def kalman(x, mask):
    """Returns log p(x_t | x_1, ..., x_{t-1}), 0 where x_t is missing."""
    found = torch.zeros_like(x)
    for i in range(len(x)):
        mean, variance = 0.0, 0.0
        for t in range(x.shape[1]):
            mean, variance = A * mean, A**2 * variance + Q**2
            if not mask[i, t]:
                continue
            total = variance + R**2
            found[i, t] = dist.Normal(mean, math.sqrt(total)).log_prob(x[i, t])
            gain = variance / total
            mean, variance = mean + gain * (x[i, t].item() - mean), (1 - gain) * variance
    return found


def test_log_densities_of_steps_are_those_of_the_kalman_filter(data):
    x, mask = data
    found = steps(model, guide, x, mask, method=ParticleFilter(200, 100, Prior()), num_samples=2, progress=False)
    expected = kalman(x, mask)
    assert torch.equal(found.observed, mask)
    assert ((found.predictive - expected).abs() <= 4.5 * found.standard_error).all()  # 0 where a step is missing
    assert found.standard_error.max() < 0.2


def test_terms_of_the_elbo_are_those_in_closed_form(data):
    x, mask = data
    n = 20_000
    found = steps(model, guide, x, mask, method=ParticleFilter(4, 10), num_samples=n, progress=False)
    m = 0.5 * x
    before = torch.cat([torch.zeros(len(x), 1), m[:, :-1]], 1)
    spread = torch.tensor([0.0, *[A**2 * S**2] * (LENGTH - 1)])  # of the mean of z_t, by that of z_{t-1}
    reconstruction = dist.Normal(m, R).log_prob(x) - S**2 / (2 * R**2)
    kl = math.log(Q / S) - 0.5 + ((m - A * before).square() + S**2 + spread) / (2 * Q**2)
    # Both are quadratic in normal draws: their variances follow from (a + b e)^2, 4 a^2 b^2 + 2 b^4.
    a, b = (x - m) / R, S / R
    error = (4 * a**2 * b**2 + 2 * b**4).sqrt() / 2 / math.sqrt(n)
    assert ((found.reconstruction - torch.where(mask, reconstruction, 0.0)).abs() <= 4.5 * error).all()
    a, b = (m - A * before) / Q, (S**2 + spread).sqrt() / Q
    error = ((4 * a**2 * b**2 + 2 * b**4).sqrt() / 2 + 1 / math.sqrt(2)) / math.sqrt(n)  # that of log q is 1/2 e^2
    assert ((found.kl - kl).abs() <= 4.5 * error).all()
    torch.testing.assert_close(found.elbo, found.reconstruction - found.kl)


def test_means_are_those_of_whole_sequences(data):
    """At a missing step the guide differs from the prior, which costs nats."""
    x, mask = data
    found = steps(model, guide, x, mask, method=ParticleFilter(4, 10), num_samples=5000, progress=False)
    log_w = log_weights(model, guide, x, mask, num_samples=5000)
    error = math.hypot(*[(log_w.sum(1).std() / math.sqrt(5000)).item()] * 2) / mask.sum().item()
    assert found.numbers()["elbo"] == pytest.approx(log_w.mean(0).sum().item() / mask.sum().item(), abs=4.5 * error)
    assert found.kl[~mask].min() > 0.05
    assert found.gap[0] == pytest.approx((found.predictive - found.elbo).sum().item() / mask.sum().item())


def test_a_guide_that_is_the_prior_is_said_to_tell_nothing(data):
    def prior(x, mask):
        z = torch.zeros(len(x))
        with pyro.plate("data", len(x)):
            for t in range(LENGTH):
                z = pyro.sample(f"z{t}", dist.Normal(A * z, Q))

    found = steps(model, prior, *data, progress=False)
    assert found.kl.abs().max() < 1e-6
    assert "The latents are not used" in found.verdict


def test_a_gap_and_rough_filters_are_told(data):
    found = steps(model, guide, *data, method=ParticleFilter(20, 200), num_samples=200, progress=False)
    gap, error = found.gap
    assert gap > 0.1 > 2 * error or error > 0.05
    assert f"{gap:.2f} nats a step lie between log p(x) and the ELBO" in found.verdict
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert "of 38 steps of 6 sequences" in lines[0]
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["num_steps"] == 38
    assert len(summary["by_step"]["kl"]) == LENGTH

    def beside(x, mask):
        with pyro.plate("data", len(x)):
            for t in range(LENGTH):
                pyro.sample(f"z{t}", dist.Normal(x[:, t] + 3, S))

    rough = steps(model, beside, *data, method=ParticleFilter(2, 3), progress=False)
    assert "Filters of 3 particles cannot tell log p(x)" in rough.verdict
    assert "num_particles=30" in rough.verdict


def test_a_model_without_steps_is_refused():
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    with pytest.raises(ValueError, match="has no steps"):
        steps(vae.model, vae.guide, torch.zeros(5, 3), progress=False)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        steps(model, guide, torch.zeros(5, LENGTH), torch.ones(5, LENGTH).bool(), num_samples=0)
