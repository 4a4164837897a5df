"""The gaps between log p(x) and the bound, against closed forms."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import AFFINE, Truth, diagonal_vae, elbo_of, truth, vae_of

from pyrovae import VAE, encoders, likelihoods, priors, structures
from pyrovae.diagnostics import gaps
from pyrovae.estimators import Enumeration, ImportanceSampling, Quadrature


def known_of(vae: VAE) -> Truth:
    (layer,) = vae.likelihood.network.layers
    return Truth(layer.weight.detach(), layer.bias.detach(), vae.likelihood.log_scale.exp().item())


def assert_within(values, expected, errors, sigmas=4.5):
    assert ((values - expected).abs() <= sigmas * errors + 1e-6).all(), ((values - expected) / errors).abs().max()


def test_gaps_of_a_diagonal_encoder_are_those_in_closed_form():
    vae = diagonal_vae(3, 6, decoder_weight=3.0)
    known = known_of(vae)
    x = known.marginal().sample((20,))
    found = gaps(vae.model, vae.guide, x, method=Quadrature(30_000), num_samples=2000, progress=False).test
    log_p = known.marginal().log_prob(x)
    # The best diagonal q has the posterior's mean and the inverse of the diagonal of its precision P: its KL divergence
    # to the posterior is (sum_i log P_ii - log det P) / 2.
    precision = known.posterior(x).precision_matrix[0]
    approximation = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    elbo = elbo_of(vae, x).detach()
    assert approximation > 0.05 and (log_p - approximation - elbo).min() > 0.05  # there is something to find
    assert_within(found.estimate.value, log_p, 1e-6)
    assert_within(found.elbo, elbo, found.elbo_error)
    # The ELBO of what was found is below the best, by no more than steps that end at a rate of zero leave.
    assert_within(found.approximation, approximation, found.best_error)
    assert_within(found.amortization, log_p - approximation - elbo, torch.hypot(found.best_error, found.elbo_error))
    torch.testing.assert_close(found.approximation + found.amortization, found.inference)


def test_an_exact_guide_loses_nothing_and_a_shifted_one_by_amortisation():
    known = truth(2, 5)
    x = known.marginal().sample((30,))
    exact, shifted = vae_of(known), vae_of(known, shift=2.0)
    right = gaps(exact.model, exact.guide, x, method=Quadrature(), num_steps=50, progress=False)
    assert right.test.inference.abs().max() < 1e-6 and "Little is lost" in right.verdict
    wrong = gaps(shifted.model, shifted.guide, x, method=Quadrature(), num_samples=2000, progress=False)
    # KL of the shift by 2 standard deviations of each latent: the mean's part of that of two normals.
    posterior = known.posterior(x)
    delta = 2.0 * posterior.stddev[0]
    lost = 0.5 * delta @ posterior.precision_matrix[0] @ delta
    assert_within(wrong.test.amortization, lost, torch.hypot(wrong.test.best_error, wrong.test.elbo_error) + 1e-3)
    assert_within(wrong.test.approximation, 0.0, wrong.test.best_error + 1e-3)
    assert "Most is lost by amortisation" in wrong.verdict


def test_a_model_that_knows_the_training_data_better_loses_by_generalisation():
    known = truth(2, 5)
    vae = vae_of(known)
    x = known.marginal().sample((200,))
    found = gaps(vae.model, vae.guide, 3 * x, train=x, method=ImportanceSampling(50), num_steps=1, progress=False)
    expected = (known.marginal().log_prob(x) - known.marginal().log_prob(3 * x)).mean()
    torch.testing.assert_close(found.generalization, expected)
    assert "Most is lost by generalisation" in found.verdict
    # Between halves of the same, what remains is chance.
    same = gaps(
        vae.model, vae.guide, x[:100], train=x[100:], method=ImportanceSampling(50), num_steps=1, progress=False
    )
    assert "generalisation" not in same.verdict


def test_gaps_of_discrete_latents_and_of_hierarchies():
    prior, encoder = priors.OneHotCategorical(6, 3), encoders.OneHotCategorical(4, 6, num_classes=3)
    vae = VAE(prior, likelihoods.Bernoulli(6, 4), encoder)
    x = torch.bernoulli(torch.full((5, 4), 0.5))
    found = gaps(vae.model, vae.guide, x, num_steps=200, num_samples=2000, progress=False).test
    assert isinstance(found.estimate.method, Enumeration)
    # The posterior of two independent classes is in the family but for their dependence.
    assert (found.approximation > -4 * found.best_error).all() and (found.amortization > -4 * found.elbo_error).all()
    assert found.amortization.mean() > 0

    hierarchy = structures.HierarchicalVAE(
        priors.StandardNormal(1),
        [encoders.DiagonalNormal(1, 2)],
        likelihoods.Normal(2, 4, AFFINE),
        [encoders.DiagonalNormal(4, 2), encoders.DiagonalNormal(2, 1)],
    )
    x = torch.randn(4, 4)
    found = gaps(hierarchy.model, hierarchy.guide, x, method=Quadrature(60_000), num_samples=2000, progress=False).test
    assert (found.approximation > -4 * found.best_error).all()
    assert (found.amortization > 4 * torch.hypot(found.best_error, found.elbo_error)).any()


def test_gaps_of_a_pair_by_hand_leave_its_parameters_alone():
    network = torch.nn.Linear(1, 2)

    def model(x, offset):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b + offset, 0.5), obs=x)

    def guide(x, offset):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            loc, raw = network(x.unsqueeze(-1)).unbind(-1)
            a = pyro.sample("a", dist.Normal(loc, 1.0))
            pyro.sample("b", dist.Normal(a + raw, 1.0))

    x, before = torch.randn(10), [p.clone() for p in network.parameters()]
    found = gaps(model, guide, x, torch.full((10,), 0.3), method=Quadrature(), num_samples=1000, progress=False).test
    truth = dist.Normal(0.3, math.sqrt(2.25)).log_prob(x)
    assert_within(found.estimate.value, truth, 1e-5)
    assert (found.approximation > -4 * found.best_error).all()
    for p, b in zip(network.parameters(), before, strict=True):
        assert p.grad is None and p.equal(b)


def test_gaps_print_a_table_draw_themselves_and_refuse_what_they_cannot_do(tmp_path):
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    x = torch.randn(5, 3)
    found = gaps(vae.model, vae.guide, x, train=(x[:4],), method=ImportanceSampling(50), num_steps=3, progress=False)
    text = str(found)
    assert "test (5 data)" in text and "train (4 data)" in text and max(map(len, text.splitlines())) <= 80
    found.plot(tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["train"]["num_data"] == 4 and summary["verdict"] == found.verdict
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        gaps(vae.model, vae.guide, x, num_samples=1)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        gaps(vae.model, vae.guide, x, num_steps=0, method=ImportanceSampling(10), progress=False)
