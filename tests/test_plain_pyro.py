"""Models and guides written by hand, with nothing of ours: they get the same training and the same log p(x).

Their guides have heavier tails than the posteriors and are never narrow, so that importance weights are bounded and
their errors hold.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pyro
import pytest
import torch
from helpers import FAILURE_RATE
from linear_gaussian import assert_fraction, assert_unit_scores
from pyro import distributions as dist
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from pyrovae import fit, log_marginal, log_weights


class Written(NamedTuple):
    """A pair, the width of its latent, data that its model could have made, and log p(x | z) apart from Pyro."""

    model: Callable
    guide: Callable
    latent_dim: int
    x: Tensor
    log_likelihood: Callable[[Tensor, Tensor], Tensor]


def counts() -> Written:
    """Five counts a datum with a rate each that one latent drives; double precision; two networks in plain closures."""
    slope, offset = torch.linspace(-1.0, 1.0, 5).double(), torch.tensor(0.5).double()
    decoder, encoder = nn.Linear(1, 5).double(), nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(decoder(z).exp()).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x.log1p()).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(6.0, loc, 0.5 + log_scale.exp()).to_event(1))

    def log_likelihood(z: Tensor, x: Tensor) -> Tensor:
        log_rate = z @ decoder.weight.T + decoder.bias
        return (x * log_rate - log_rate.exp() - torch.lgamma(x + 1)).sum(-1)

    z = torch.randn(256, 1).double()
    return Written(model, guide, 1, torch.poisson((z * slope + offset).exp()), log_likelihood)


class Switches(PyroModule):
    """Six switches that two latents throw, one after the other: the second latent's prior and guide see the first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("zero", torch.tensor(0.0))
        self.drift = nn.Linear(1, 1)
        self.decode = nn.Linear(2, 6)
        self.encode = nn.Linear(6, 8)
        self.first, self.second = nn.Linear(8, 2), nn.Linear(9, 2)

    @pyro_method
    def model(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(self.zero, 1.0))
            b = pyro.sample("b", dist.Normal(self.drift(a.unsqueeze(-1)).squeeze(-1), 0.7))
            logits = self.decode(torch.stack([a, b], dim=-1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    @pyro_method
    def guide(self, x):
        h = torch.tanh(self.encode(x))
        with pyro.plate("data", len(x)):
            loc, log_scale = self.first(h).unbind(-1)
            a = pyro.sample("a", dist.StudentT(6.0, loc, 0.5 + log_scale.exp()))
            # Samples are in front of the data, so that labels are expanded to their shape.
            h = torch.cat([h.expand(*a.shape, 8), a.unsqueeze(-1)], dim=-1)
            loc, log_scale = self.second(h).unbind(-1)
            pyro.sample("b", dist.StudentT(6.0, loc, 0.5 + log_scale.exp()))


def switches() -> Written:
    module = Switches().double()
    x = torch.bernoulli((3 * torch.randn(256, 2) @ torch.randn(2, 6)).sigmoid()).double()

    def log_likelihood(z: Tensor, x: Tensor) -> Tensor:
        """With the second latent given in units of its prior, so that the prior of both is the standard normal."""
        a = z[..., :1]
        b = module.drift(a) + 0.7 * z[..., 1:]
        logits = module.decode(torch.cat([a, b], dim=-1))
        return (x * logits - nn.functional.softplus(logits)).sum(-1)

    return Written(module.model, module.guide, 2, x, log_likelihood)


PAIRS = {"one latent": counts, "two latents": switches}


@torch.no_grad()
def quadrature(written: Written, x: Tensor, points: int) -> Tensor:
    """log p(x) by the trapezoid rule on [-9, 9], beyond which the standard normal holds less than 1e-18."""
    grid = torch.linspace(-9.0, 9.0, points, dtype=torch.float64)
    z = torch.cartesian_prod(*[grid] * written.latent_dim).reshape(-1, written.latent_dim)
    log_prior = -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)
    log_cell = written.latent_dim * (grid[1] - grid[0]).log()
    return torch.stack([(log_prior + written.log_likelihood(z, row)).logsumexp(0) + log_cell for row in x])


@pytest.fixture(scope="module", params=PAIRS)
def written(request) -> Written:
    """A pair after some training, so that the guide is a fair proposal."""
    pyro.set_rng_seed(0)
    pair = PAIRS[request.param]()
    before = quadrature(pair, pair.x[:64], points=121).mean()
    optimizer = partial(torch.optim.Adam, lr=0.02)
    history = fit(pair.model, pair.guide, pair.x, epochs=30, batch_size=64, optimizer=optimizer, progress=False)
    assert len(history) == 30
    assert quadrature(pair, pair.x[:64], points=121).mean() > before, "the model has become more likely, exactly"
    return pair


def test_log_marginal_is_the_integral(written):
    x = written.x[:128]
    exact = quadrature(written, x, points=241)
    # The trapezoid rule converges so fast here that twice the step must give the same to nine digits.
    assert quadrature(written, x, points=121).numpy() == pytest.approx(exact.numpy(), rel=1e-9)
    estimate = log_marginal(written.model, written.guide, x, num_samples=2000, progress=False)
    trusted = estimate.khat < 0.7  # for the others, unlikely data, the estimate itself says that it cannot be trusted
    assert trusted.sum() > 100, "the guide is a fair proposal"
    scores = ((estimate.value - exact) / estimate.standard_error)[trusted]
    # As many scores beyond two standard errors as the normal distribution has, and a sum of squares as the chi-square
    # distribution has it: errors neither too small nor too large.
    assert_fraction(int((scores.abs() > 2).sum()), len(scores), math.erfc(2 / math.sqrt(2)), FAILURE_RATE)
    assert_unit_scores(scores, FAILURE_RATE)


def test_the_mean_of_the_log_weights_is_the_elbo(written):
    """Against Pyro's own: both are means of independent draws, so they differ by no more than their errors allow."""
    x = written.x[:64]
    with torch.no_grad():
        log_w = log_weights(written.model, written.guide, x, num_samples=2000)
        assert log_w.shape == (2000, 64)
        pyros = torch.tensor([-Trace_ELBO().loss(written.model, written.guide, x) for _ in range(100)])
    ours = log_w.sum(1)
    error = math.hypot(ours.std() / math.sqrt(2000), pyros.std() / math.sqrt(100))
    assert abs(ours.mean() - pyros.mean()) < 4 * error  # fails by chance once in 16,000


@torch.no_grad()
def test_bounds_from_the_weights_are_in_order(written):
    """ELBO < importance-weighted bound of 8 < log p(x), each gap by five of its standard errors."""
    x = written.x[:64]
    log_w = log_weights(written.model, written.guide, x, num_samples=8000)
    elbo = log_w.sum(1)
    weighted = (log_w.reshape(1000, 8, 64).logsumexp(1) - math.log(8)).sum(1)
    exact = quadrature(written, x, points=241).sum()
    assert weighted.mean() - elbo.mean() > 5 * math.hypot(
        weighted.std() / math.sqrt(1000), elbo.std() / math.sqrt(8000)
    )
    assert exact - weighted.mean() > 5 * weighted.std() / math.sqrt(1000)
