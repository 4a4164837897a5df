"""Our models and guides under Pyro's own tools, as any user of Pyro would call them."""

import copy
from functools import partial

import pyro
import pytest
import scipy.stats
import torch
from linear_gaussian import assert_mean, diagonal_vae, elbo_of, gradients, repeat, truth, vae_of
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyrovae import VAE, log_weights
from pyrovae.encoders import DiagonalNormal, FullRankNormal
from pyrovae.likelihoods import Bernoulli, Normal
from pyrovae.nn import MLP
from pyrovae.priors import StandardNormal

# Chance that a statistical test here fails with another seed although the library is right.
FAILURE_RATE = 1e-4

# Nothing is enumerated in a VAE, and TraceEnum_ELBO warns of it unless strict_enumeration_warning is False.
TraceEnum_ELBO = partial(TraceEnum_ELBO, strict_enumeration_warning=False, max_plate_nesting=1)

AGREEING = {"Trace": Trace_ELBO, "TraceGraph": TraceGraph_ELBO, "TraceEnum": TraceEnum_ELBO, "Renyi": RenyiELBO}
BOUNDS = {**AGREEING, "TraceMeanField": TraceMeanField_ELBO}
SMALL = partial(MLP, hidden=(16,))


def binary_data(n: int, context: bool = False) -> tuple[Tensor, ...]:
    """Rows of nine pixels that are one of three stripes, each pixel flipped one time in ten; and which stripe."""
    labels = torch.arange(n) % 3
    x = torch.eye(3)[labels].repeat_interleave(3, dim=-1)
    flipped = torch.rand_like(x) < 0.1
    x = torch.where(flipped, 1 - x, x)
    return (x, torch.eye(3)[labels]) if context else (x,)


def binary_vae(context_dim: int = 0) -> VAE:
    likelihood = Bernoulli(2, 9, SMALL, context_dim=context_dim)
    return VAE(StandardNormal(2), likelihood, DiagonalNormal(9, 2, SMALL, context_dim=context_dim))


def train(vae: VAE, elbo, *args: Tensor, steps: int = 30) -> None:
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(steps):
        svi.step(*args)


def assert_trains(vae: VAE, elbo, *args: Tensor, steps: int = 30) -> None:
    """Trains a VAE, and asserts that the loss, taken ten times, is lower after than before (t test)."""
    before = repeat(lambda: torch.tensor(elbo.loss(vae.model, vae.guide, *args)), 10)
    train(vae, elbo, *args, steps=steps)
    after = repeat(lambda: torch.tensor(elbo.loss(vae.model, vae.guide, *args)), 10)
    assert scipy.stats.ttest_ind(after, before, alternative="less").pvalue < FAILURE_RATE


@pytest.mark.parametrize("elbo", BOUNDS.values(), ids=BOUNDS.keys())
def test_svi_lowers_the_loss(elbo):
    assert_trains(binary_vae(), elbo(num_particles=2), *binary_data(60))


@pytest.mark.parametrize("elbo", AGREEING.values(), ids=AGREEING.keys())
@pytest.mark.parametrize("vectorized", [False, True], ids=["loop", "vectorized"])
def test_bounds_of_pyro_with_the_exact_posterior_are_log_marginal(elbo, vectorized):
    # Each weight is p(x): so is every bound, whatever its particles and however it runs them.
    known = truth(2, 3)
    vae = vae_of(known)
    x = known.marginal().sample((5,))
    loss = elbo(num_particles=3, vectorize_particles=vectorized).loss(vae.model, vae.guide, x)
    assert abs(-loss - known.marginal().log_prob(x).sum().item()) < 1e-9  # thousands of roundings of numbers below 1000


@pytest.mark.parametrize("elbo", [TraceGraph_ELBO, TraceEnum_ELBO], ids=["TraceGraph", "TraceEnum"])
def test_gradients_of_other_bounds_have_the_mean_of_the_closed_form(elbo):
    vae = diagonal_vae(2, 3)
    x = torch.randn(8, 3, dtype=torch.float64)
    loss = elbo(20, vectorize_particles=True, max_plate_nesting=1)

    def gradient() -> Tensor:
        vae.zero_grad()
        loss.loss_and_grads(vae.model, vae.guide, x)
        return -torch.cat([p.grad.flatten() for p in vae.parameters()])

    assert_mean(repeat(gradient, 40), gradients(elbo_of(vae, x).sum(), vae), FAILURE_RATE)


def test_renyi_elbo_with_alpha_0_is_the_log_mean_of_our_weights():
    # A plate that is not subsampled: there Pyro's bound and our weights say the same.
    vae = diagonal_vae(2, 3)
    x = torch.randn(8, 3, dtype=torch.float64)
    loss = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True)
    with torch.no_grad():
        theirs = repeat(lambda: -loss.loss(vae.model, vae.guide, x), 200)
        log_w = log_weights(vae.model, vae.guide, x, num_samples=5 * 200).unflatten(0, (200, 5))
    ours = (log_w.logsumexp(1) - torch.tensor(5.0).log()).sum(-1)
    assert scipy.stats.ttest_ind(ours, theirs, equal_var=False).pvalue > FAILURE_RATE
    # The test would tell: the ELBO, the same weights without the logarithm of the mean, is another number.
    assert scipy.stats.ttest_ind(log_w.mean(1).sum(-1), theirs, equal_var=False).pvalue < FAILURE_RATE


def test_two_vaes_in_one_process_both_train():
    first, second = binary_vae(), binary_vae()
    x = binary_data(60)
    states = [copy.deepcopy(vae.state_dict()) for vae in (first, second)]
    assert first.name != second.name
    assert_trains(first, Trace_ELBO(), *x)
    untouched = second.state_dict()
    assert all(torch.equal(untouched[name], t) for name, t in states[1].items())
    assert_trains(second, Trace_ELBO(), *x)
    for vae, before in zip((first, second), states, strict=True):
        assert not any(torch.equal(vae.state_dict()[name], t) for name, t in before.items())


def test_a_conditional_vae_trains_and_uses_its_context():
    x, context = binary_data(90, context=True)
    vae = binary_vae(context_dim=3)
    assert_trains(vae, Trace_ELBO(), x, context, steps=150)
    # Samples for a label have its stripe: those pixels are on nine times in ten in the data, the others one in ten.
    stripes = vae.sample(100, torch.eye(3)).mean(0).unflatten(-1, (3, 3)).mean(-1)
    assert torch.equal(stripes.argmax(-1), torch.arange(3))


def test_gradients_reach_all_parameters_through_svi():
    vae = VAE(StandardNormal(2), Normal(2, 9, SMALL), FullRankNormal(9, 2, SMALL))
    before = copy.deepcopy(vae.state_dict())
    train(vae, Trace_ELBO(), *binary_data(30), steps=1)
    assert not any(torch.equal(vae.state_dict()[name], t) for name, t in before.items())


def test_a_poutine_scale_is_heard():
    vae = diagonal_vae(2, 3)
    x = torch.randn(8, 3, dtype=torch.float64)
    losses = []
    for scale in (1.0, 0.25):
        pyro.set_rng_seed(1)
        pair = (poutine.scale(vae.model, scale=scale), poutine.scale(vae.guide, scale=scale))
        losses.append(Trace_ELBO().loss(*pair, x))
    assert losses[1] == pytest.approx(0.25 * losses[0], rel=1e-12)  # a factor of a power of two, rounding of sums


def test_predictive_draws_from_the_prior_and_from_the_posterior():
    known = truth(2, 3)
    vae = vae_of(known)
    x = known.marginal().sample((4,))
    # Without the guide, and with the data taken away, x comes from the marginal.
    unobserved = poutine.uncondition(vae.model)
    prior = Predictive(unobserved, num_samples=2000, return_sites=("z", "x"), parallel=True)(x)
    assert (prior["z"].shape, prior["x"].shape) == ((2000, 4, 2), (2000, 4, 3))
    marginal = known.marginal()
    assert_mean(prior["x"], marginal.mean.expand(4, 3), FAILURE_RATE)
    assert_mean((prior["x"] - marginal.mean).square(), marginal.variance.expand(4, 3), FAILURE_RATE)
    # With the guide, z comes from the posterior of each datum, and x from the model at that z.
    posterior = Predictive(unobserved, guide=vae.guide, num_samples=2000, return_sites=("z", "x"), parallel=True)(x)
    exact = known.posterior(x)
    assert_mean(posterior["z"], exact.mean, FAILURE_RATE)
    assert_mean((posterior["z"] - exact.mean).square(), exact.variance.expand(4, 2), FAILURE_RATE)
    assert_mean(posterior["x"], exact.mean @ known.weight.T + known.bias, FAILURE_RATE)


def test_predictive_runs_one_draw_at_a_time_too():
    vae = vae_of(truth(2, 3))
    x = torch.randn(4, 3, dtype=torch.float64)
    draws = Predictive(vae.model, guide=vae.guide, num_samples=5)(x)
    assert draws["z"].shape == (5, 4, 2)
    assert torch.equal(draws["x"], x.expand(5, 4, 3))  # observed: the data themselves


def test_render_model_draws_the_plate_and_its_sites():
    vae = binary_vae()
    source = str(pyro.render_model(vae.model, model_args=binary_data(6), render_distributions=True))
    for text in ("cluster_data", "z -> x", "x ~ Bernoulli", "z ~ Normal"):
        assert text in source


def test_nuts_finds_the_exact_posterior_of_the_latents():
    known = truth(2, 3, scale=1.0)
    vae = vae_of(known)
    x = known.marginal().sample((3,))
    mcmc = MCMC(NUTS(vae.model), num_samples=300, warmup_steps=60, disable_progbar=True)
    mcmc.run(x)
    z = mcmc.get_samples()["z"]
    assert z.shape == (300, 3, 2)
    exact = known.posterior(x)
    # The draws are dependent: their mean's error is the posterior's deviation over the root of their effective number.
    ess = effective_sample_size(z.unsqueeze(0), chain_dim=0, sample_dim=1)
    scores = (z.mean(0) - exact.mean) / (exact.stddev / ess.sqrt())
    assert scores.abs().max() < scipy.stats.norm.isf(FAILURE_RATE / 2 / scores.numel())


def test_a_hand_written_encoder_is_a_part():
    class Unit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Linear(9, 2)

        def forward(self, x, context=None):
            return dist.Normal(self.loc(x), 1.0).to_event(1)

    vae = VAE(StandardNormal(2), Bernoulli(2, 9, SMALL), Unit())
    assert_trains(vae, TraceMeanField_ELBO(), *binary_data(60))
