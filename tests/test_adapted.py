"""Proposals adapted by their own weights, and proposals as guides: against quadrature and exact posteriors."""

import math
from functools import partial

import pyro
import pytest
import torch
from linear_gaussian import assert_mean, truth, vae_of
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO

from pyrovae import VAE, bounds, encoders, likelihoods, log_marginal, log_weights, priors
from pyrovae.estimators import (
    Adapted,
    Guide,
    ImportanceSampling,
    Laplace,
    Mixed,
    Prior,
    Quadrature,
    Refined,
    as_guide,
)
from pyrovae.nn import OneHotInput

FAILURE_RATE = 1e-4
ERRORS = 5  # standard errors


class Banana:
    """x = log b + a^2 + noise, so that the posterior of (a, log b) is bent, with one mode for x below 1/2."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            b = pyro.sample("b", dist.LogNormal(torch.zeros(()).double(), 0.7))
            pyro.sample("x", dist.Normal(b.log() + 2 * a.square().sum(-1), 0.4), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(torch.zeros(len(x), 1).double(), 1.0).to_event(1))
            pyro.sample("b", dist.LogNormal(torch.zeros(len(x)).double(), 0.7))


def score(pair, x, method):
    return log_marginal(pair.model, pair.guide, x, method=method, progress=False)


@pytest.mark.parametrize("degrees", [math.inf, 6.0])
@pytest.mark.parametrize("memory", [64e6, 1e5], ids=["at once", "in chunks"])
def test_values_agree_with_quadrature_on_a_bent_posterior(degrees, memory):
    pair, x = Banana(), torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.2]).double()
    exact = score(pair, x, Quadrature(10_000)).value
    method = ImportanceSampling(2000, Adapted(degrees=degrees, num_draws=400))
    found = log_marginal(pair.model, pair.guide, x, method=method, max_memory=memory, progress=False)
    assert ((found.value - exact).abs() < ERRORS * found.standard_error)[found.trusted].all()
    laplace = score(pair, x, ImportanceSampling(2000, Laplace(degrees=degrees)))
    assert found.ess.mean() > laplace.ess.mean()


def test_weights_are_unbiased():
    pair, x = Banana(), torch.full((2000,), 0.2).double()
    exact = score(pair, x[:2], Quadrature(10_000)).value[0]
    found = score(pair, x, ImportanceSampling(5, Adapted(num_rounds=2, num_draws=20)))
    assert_mean((found.value - exact).exp(), torch.ones(()), FAILURE_RATE)


def test_a_normal_posterior_is_found_from_afar():
    known = truth(3, 6)
    vae, x = vae_of(known, widen=3.0, shift=2.0), known.marginal().sample((10,))
    rough = score(vae, x, ImportanceSampling(500, Guide()))
    found = score(vae, x, ImportanceSampling(500, Adapted(Guide(), num_rounds=6)))
    assert found.ess.min() > 250 > rough.ess.max()
    assert ((found.value - known.marginal().log_prob(x)).abs() < ERRORS * found.standard_error).all()


def test_data_without_a_finite_weight_keep_a_valid_proposal():
    class Narrow(Banana):
        def model(self, x):
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
                b = pyro.sample("b", dist.LogNormal(torch.zeros(()).double(), 0.7))
                pyro.factor("hole", b - math.inf)
                pyro.sample("x", dist.Normal(a.sum(-1), 1.0), obs=x)

    found = score(Narrow(), torch.zeros(3).double(), ImportanceSampling(50, Adapted(Guide(), num_draws=20)))
    assert (found.value == -math.inf).all() and not found.trusted.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rounds": 0}, "num_rounds must be at least 1"),
        ({"num_draws": 1}, "num_draws must be at least 2"),
        ({"degrees": 2.0}, "degrees must be above 2"),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Adapted(**arguments)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(TypeError, match="proposal must be a proposal"):
        Adapted("Laplace")
    x = torch.ones(3).double()
    with pytest.raises(ValueError, match="Adapted begins from one proposal, but Mixed"):
        score(Banana(), x, ImportanceSampling(10, Adapted(Mixed())))
    likelihood = likelihoods.Bernoulli(1, 4, network=partial(OneHotInput, num_classes=3))
    classes = VAE(priors.Categorical(1, 3), likelihood, encoders.Categorical(4, 1, num_classes=3))
    with pytest.raises(ValueError, match="discrete"):
        score(classes, torch.zeros(3, 4), ImportanceSampling(10, Adapted(Guide())))


def test_the_exact_posterior_as_a_guide_has_no_gap_in_any_bound():
    known = truth(2, 4)
    vae, x = vae_of(known, shift=1.0), known.marginal().sample((7,))
    exact = known.marginal().log_prob(x).sum().item()
    made = as_guide(vae.model, vae.guide, x, proposal=Laplace(scale=1.0))
    losses = [bounds.IWAE(1), bounds.IWAE(4), Trace_ELBO(), Trace_ELBO(2)]
    losses.append(Trace_ELBO(5, vectorize_particles=True, max_plate_nesting=1))
    for loss in losses:
        assert abs(loss.loss(vae.model, made, x) + exact) < 1e-6 * abs(exact)
    assert bounds.IWAE(4).loss(vae.model, vae.guide, x) + exact > 0.5


@pytest.mark.parametrize("proposal", [None, Adapted(num_draws=200), Refined(num_steps=5), Guide(), Prior()], ids=str)
def test_weights_of_the_guide_are_those_of_the_proposal(proposal):
    pair, x = Banana(), torch.tensor([-1.0, 0.0, 0.2]).double()
    made = as_guide(pair.model, pair.guide, x, proposal=proposal)
    mean = log_weights(pair.model, made, x, num_samples=4000).logsumexp(0) - math.log(4000)
    found = log_marginal(pair.model, made, x, num_samples=4000, progress=False)
    exact = score(pair, x, Quadrature(10_000)).value
    for value in (mean, found.value):
        assert ((value - exact).abs() < 1.5 * ERRORS * found.standard_error)[found.trusted].all()
    assert found.trusted.any()


def test_a_model_trains_under_it():
    known = truth(2, 4)
    vae, x = vae_of(known), known.marginal().sample((20,))
    made = as_guide(vae.model, vae.guide, x)
    vae.likelihood.log_scale.data += 1.0
    svi = SVI(vae.model, made, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert vae.likelihood.log_scale.item() < math.log(known.scale) + 0.6


def test_other_data_and_other_plates_are_refused():
    pair, x = Banana(), torch.ones(4).double()
    made = as_guide(pair.model, pair.guide, x)
    with pytest.raises(ValueError, match="the guide was made for 4 data and called with 3"):
        Trace_ELBO().loss(pair.model, made, x[:3])
    with pytest.raises(ValueError, match="as_guide makes a guide from one proposal, but Mixed"):
        as_guide(pair.model, pair.guide, x, proposal=Mixed())
    with pytest.raises(TypeError, match="proposal must be a proposal"):
        as_guide(pair.model, pair.guide, x, proposal=pair.guide)

    class Subsampled(Banana):
        def model(self, x):
            with pyro.plate("data", 100, subsample=torch.arange(len(x))):
                a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
                pyro.sample("x", dist.Normal(a, 0.4), obs=x)

        def guide(self, x):
            with pyro.plate("data", 100, subsample=torch.arange(len(x))):
                pyro.sample("a", dist.Normal(torch.zeros(len(x)).double(), 1.0))

    with pytest.raises(ValueError, match="the plate of the data holds 100, of which the model takes 4"):
        as_guide(Subsampled().model, Subsampled().guide, x)
