"""Every bound on a VAE whose log p(x) and posterior are known, and what a bound is as a part of Pyro and of fit."""

import copy
import inspect
import itertools
import math
import pickle
from functools import partial

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from bound_cases import BOUNDS, BY_NAME
from helpers import FAILURE_RATE
from linear_gaussian import (
    AFFINE,
    assert_mean,
    bottom_up,
    diagonal_vae,
    elbo_of,
    gradients,
    hierarchy,
    ladder,
    repeat,
    truth,
    vae_of,
)
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae import VAE, bounds, encoders, fit, likelihoods, log_weights, priors, storage
from pyrovae.bounds.kl import kl_in_closed_form
from pyrovae.distributions import Flattened, HypersphericalUniform, LogisticNormal, VonMisesFisher
from pyrovae.nn import MLP, OneHotInput
from pyrovae.regularizers import MaximumMeanDiscrepancy
from pyrovae.structures import HierarchicalVAE, MissingDataVAE, SemiSupervisedVAE

EPS = torch.finfo(torch.float64).eps
# Log weights here sum some ten terms below 100, whose residuals are divided by scales of at least 0.3.
ROUNDING = 1e5 * EPS
SMALL = partial(MLP, hidden=(8,))
READS_CLASSES = partial(OneHotInput, num_classes=2, network=SMALL)

every_bound = pytest.mark.parametrize("case", BOUNDS, ids=lambda case: case.name)


def value_of(bound: bounds.Bound, log_w: Tensor) -> Tensor:
    """Returns the value of a bound for log weights."""
    return bound.reduce_model(log_w).value


def normal_of(vae: VAE, x: Tensor) -> torch.distributions.MultivariateNormal:
    q = vae.encoder(x)
    return torch.distributions.MultivariateNormal(q.loc.detach(), scale_tril=q.scale_tril.detach())


def test_every_public_bound_is_in_the_registry():
    public = {
        cls
        for name in bounds.__all__
        if inspect.isclass(cls := getattr(bounds, name))
        and issubclass(cls, bounds.Bound)
        and not inspect.isabstract(cls)
    }
    assert public == {type(case.build(2)) for case in BOUNDS}


# What the bounds are.


@every_bound
@pytest.mark.parametrize("latent_dim", [2, 10])
def test_under_the_exact_posterior_every_bound_is_log_p(case, latent_dim):
    # Each weight is p(x), and so is every mean of them, whatever its power or temperature.
    known = truth(latent_dim, 2 * latent_dim)
    vae = vae_of(known)
    x = known.marginal().sample((8,))
    # A KL divergence in closed form leaves the noise of the reconstruction.
    bound = case.build(4) if case.name != "ELBO" else bounds.ELBO(4, closed_form=False)
    found = bound.terms(vae.model, vae.guide, x).bound
    exact = known.marginal().log_prob(x).sum()
    assert abs(found - exact) < 8 * (latent_dim + 1) * ROUNDING


@every_bound
def test_the_derivatives_of_a_bound_are_those_of_autograd(case):
    bound = case.build(4)
    log_w = 3 * torch.randn(4, dtype=torch.float64)
    for reduce in (bound.reduce, bound.reduce_model):
        found = reduce(log_w)
        first = torch.autograd.functional.jacobian(lambda t: reduce(t).value, log_w)
        second = torch.autograd.functional.hessian(lambda t: reduce(t).value, log_w).diagonal()
        torch.testing.assert_close(found.first, first, rtol=0, atol=1e3 * EPS)  # of sums of numbers near one
        torch.testing.assert_close(found.second, second, rtol=0, atol=1e4 * EPS)
        # Adding to all log weights adds the same to the bound.
        assert abs(found.first.sum() - 1) < 100 * EPS


@every_bound
def test_a_bound_reduces_each_datum_by_itself(case):
    bound = case.build(4)
    log_w = torch.randn(4, 5, 3, dtype=torch.float64)
    together = bound.reduce(log_w)
    for i, j in itertools.product(range(5), range(3)):
        alone = bound.reduce(log_w[:, i, j])
        torch.testing.assert_close(alone.value, together.value[i, j], rtol=0, atol=10 * EPS)
        torch.testing.assert_close(alone.first, together.first[:, i, j], rtol=0, atol=10 * EPS)


@pytest.mark.parametrize("case", [case for case in BOUNDS if case.kind == "lower"], ids=lambda case: case.name)
def test_lower_bounds_are_below_log_p(case):
    known = truth(2, 3)
    vae = vae_of(known, widen=1.4, shift=0.7)
    x = known.marginal().sample((6,))
    bound = case.build(4)
    with torch.no_grad():
        found = repeat(lambda: bound.terms(vae.model, vae.guide, x).bound, 100)
    gap = known.marginal().log_prob(x).sum() - found
    # Not only below on average: by more than noise, as the guide is not the posterior.
    assert scipy.stats.ttest_1samp(gap, 0.0, alternative="greater").pvalue < FAILURE_RATE


@pytest.mark.parametrize("name", ["CUBO", "CUBO-DReG", "Renyi-minus-1"])
def test_upper_bounds_are_above_log_p(name):
    # In the limit, where a bound of power s is log p(x) + log E[(w / p(x))^s] / s; from as many particles as make its
    # bias small, the estimate is above log p(x) too.
    known = truth(2, 3)
    vae = vae_of(known, widen=1.4, shift=0.7)
    x = known.marginal().sample((6,))
    exact = known.marginal().log_prob(x).sum()
    limit = exact + (known.log_chernoff(x, normal_of(vae, x), 2.0) / 2).sum()
    assert limit > exact + 0.5
    with torch.no_grad():
        found = repeat(lambda: BY_NAME[name].build(2000).terms(vae.model, vae.guide, x).bound, 30)
    assert scipy.stats.ttest_1samp(found - exact, 0.0, alternative="greater").pvalue < FAILURE_RATE


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0, -0.5])
def test_powers_of_weights_have_the_means_of_the_closed_form(power):
    # Renyi bounds with alpha = 1 - s and CUBO with n = s are log E[w^s] / s in the limit: exp(s bound) is unbiased.
    known = truth(2, 3)
    vae = vae_of(known, widen=1.4, shift=0.3)
    x = known.marginal().sample((3,))
    exact = known.marginal().log_prob(x)
    bound = bounds.CUBO(50, n=power) if power > 1 else bounds.Renyi(50, alpha=1 - power)
    with torch.no_grad():
        log_w = log_weights(vae.model, vae.guide, x, num_samples=50 * 400).unflatten(0, (400, 50)).transpose(0, 1)
    found = (power * (value_of(bound, log_w) - exact)).exp()
    assert_mean(found, known.log_chernoff(x, normal_of(vae, x), power).exp(), FAILURE_RATE)


def test_more_particles_tighten_the_importance_weighted_bound():
    # Groups of the same weights, so that differences are paired: one group of 64, two of 32, ..., 64 of one.
    known = truth(2, 3)
    vae = vae_of(known, widen=1.5, shift=1.0)
    x = known.marginal().sample((200,))
    with torch.no_grad():
        log_w = log_weights(vae.model, vae.guide, x, num_samples=64)
    values = [value_of(bounds.MIWAE(64, 64 // k), log_w) for k in (1, 2, 4, 8, 16, 32, 64)]
    for fewer, more in itertools.pairwise(values):
        assert scipy.stats.ttest_1samp(more - fewer, 0.0, alternative="greater").pvalue < FAILURE_RATE
    torch.testing.assert_close(values[-1], value_of(bounds.IWAE(64), log_w), rtol=0, atol=ROUNDING)


def test_renyi_bounds_fall_with_alpha_between_the_others():
    # A power mean grows with its power, weights for weights.
    log_w = 5 * torch.randn(7, 100, dtype=torch.float64)
    alphas = [-300.0, -10.0, -1.0, 0.0, 0.5, 0.99, 0.995, 1.0, 1.005, 1.01, 2.0, 10.0]
    values = [value_of(bounds.Renyi(7, alpha), log_w) for alpha in alphas]
    for higher, lower in itertools.pairwise(values):
        assert (higher > lower).all()
    torch.testing.assert_close(values[3], value_of(bounds.IWAE(7), log_w), rtol=0, atol=0)
    torch.testing.assert_close(values[7], value_of(bounds.ELBO(7), log_w), rtol=0, atol=0)
    # At alpha = 1 - s it is the mean plus s / 2 times the variance, to first order: between these two, within s of it.
    near = value_of(bounds.Renyi(7, 1 - 1e-9), log_w) - values[7]
    torch.testing.assert_close(near, 0.5e-9 * log_w.var(0, correction=0), rtol=0, atol=100 * EPS)
    # exp(s max) / K <= mean exp(s w) <= exp(s max): the limit is off by at most log K / s.
    largest = value_of(bounds.VRMax(7), log_w)
    assert (largest >= values[0]).all()
    assert (largest - values[0] <= math.log(7) / 301 + 100 * EPS).all()


def test_renyi_bounds_near_one_keep_single_precision():
    log_w = (100 + torch.randn(7, 100)).float()
    exact = value_of(bounds.Renyi(7, 1 - 1e-4), log_w.double())
    # The log weights themselves are rounded by 100 eps.
    assert (value_of(bounds.Renyi(7, 1 - 1e-4), log_w) - exact).abs().max() < 1e3 * torch.finfo(torch.float32).eps


def subnormal(t: Tensor) -> Tensor:
    return (t != 0) & (t.abs() < torch.finfo(t.dtype).tiny)


@pytest.mark.parametrize("bound", [bounds.IWAE(3), bounds.CIWAE(3, 0.0), bounds.ReweightedWakeSleep(3)], ids=repr)
def test_far_particles_make_no_subnormal_numbers(bound):
    # Weights of e^-100 are subnormal in single precision, with which many processors compute ten times more slowly.
    log_w = torch.tensor([[0.0], [-1.0], [-100.0]])
    assert subnormal(log_w.softmax(0)).sum() == 1
    coefficients = bound.coefficients(log_w)
    for found in filter(torch.is_tensor, (coefficients.model, coefficients.guide, coefficients.path)):
        assert not subnormal(found).any()
        assert found[2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_impossible_particles_count_as_nothing(dtype):
    log_w = torch.tensor([0.0, 1.0, -math.inf, -2e4], dtype=dtype)
    found = {p: value_of(bounds.Renyi(4, 1 - p), log_w).item() for p in (1.0, 0.5, 0.009)}
    for power, value in found.items():
        exact = math.log((1 + math.exp(power)) / 4) / power
        assert value == pytest.approx(exact, rel=1e3 * torch.finfo(dtype).eps)
    assert value_of(bounds.CIWAE(4, 0.0), log_w).item() == found[1.0]
    assert value_of(bounds.ELBO(4), log_w).item() == -math.inf


def test_the_thermodynamic_objective_lies_between_elbo_and_importance_weighted_bound():
    log_w = 3 * torch.randn(7, 100, dtype=torch.float64)
    low, high = value_of(bounds.ELBO(7), log_w), value_of(bounds.IWAE(7), log_w)
    torch.testing.assert_close(value_of(bounds.TVO(7, num_partitions=1), log_w), low, rtol=0, atol=100 * EPS)
    found = value_of(bounds.TVO(7, num_partitions=5), log_w)
    assert ((low < found) & (found < high)).all()
    # The mean of log weights at a temperature is the derivative of log-mean-exp by it, so that the sum is a lower
    # Riemann sum of what the importance-weighted bound is: of a growing function, off by less than a step's growth.
    fine = bounds.TVO(7, num_partitions=2000, beta_1=1e-4)
    growth = log_w.amax(0) - log_w.mean(0)
    gap = high - value_of(fine, log_w)
    assert ((gap > 0) & (gap < max(fine.lengths) * growth)).all()


def test_the_thermodynamic_objective_has_the_sum_of_the_closed_form():
    # E log w under the normal pi_beta, proportional to q^(1 - beta) p(z | x)^beta, by the derivative of the closed form
    # of log E_q[(w / p(x))^beta]; self-normalised weights have it in the limit, with a bias of order 1 / K.
    known = truth(2, 3)
    vae = vae_of(known, widen=1.2, shift=0.5)
    x = known.marginal().sample((1,))
    bound = bounds.TVO(20_000, num_partitions=4)
    exact = 0.0
    for beta, length in zip(bound.betas, bound.lengths, strict=True):
        step = 1e-5
        up, down = (known.log_chernoff(x, normal_of(vae, x), beta + h) for h in (step, -step))
        exact += length * (known.marginal().log_prob(x) + (up - down) / (2 * step))
    with torch.no_grad():
        found = repeat(lambda: bound.terms(vae.model, vae.guide, x).bound, 30)
    # The bias is that of some 20 variances over K, below a third of a standard error.
    assert_mean(found, exact.sum(), FAILURE_RATE)


def same_loss_and_gradient(vae: VAE, x: Tensor, first: bounds.Bound, second: bounds.Bound) -> None:
    """Asserts that two bounds are equal with the same noise."""
    found = []
    for bound in (first, second):
        pyro.set_rng_seed(1)
        loss = bound.differentiable_loss(vae.model, vae.guide, x)
        found.append((loss.detach(), gradients(loss, vae)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e4 * EPS, atol=ROUNDING)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (bounds.MIWAE(6, 1), bounds.IWAE(6)),
        (bounds.MIWAE(6, 6), bounds.ELBO(6, closed_form=False)),
        (bounds.PIWAE(6, 1), bounds.IWAE(6)),
        (bounds.PIWAE(6, 1, bounds.DoublyReparameterized()), bounds.IWAE(6, bounds.DoublyReparameterized())),
        (bounds.CIWAE(6, 0.0), bounds.IWAE(6)),
        (bounds.CIWAE(6, 1.0), bounds.ELBO(6, closed_form=False)),
        (bounds.Renyi(6, 0.0), bounds.IWAE(6)),
        (bounds.Renyi(6, 1.0), bounds.ELBO(6, closed_form=False)),
        (bounds.Renyi(6, 1.0, bounds.StickingTheLanding()), bounds.ELBO(6, gradient=bounds.StickingTheLanding())),
        (bounds.TVO(6, 1), bounds.ELBO(6, closed_form=False)),
        (bounds.IWAE(1), bounds.ELBO(closed_form=False)),
        (
            bounds.ELBO(6, gradient=bounds.DoublyReparameterized()),
            bounds.ELBO(6, gradient=bounds.StickingTheLanding()),
        ),
        (bounds.IWAE(1, bounds.DoublyReparameterized()), bounds.ELBO(gradient=bounds.StickingTheLanding())),
    ],
    ids=lambda bound: type(bound).__name__,
)
def test_end_points(first, second):
    same_loss_and_gradient(diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64), first, second)


def test_piwae_gives_the_model_one_gradient_and_the_guide_another():
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    found = {}
    for name, bound in {
        "PIWAE": bounds.PIWAE(6, 3),
        "IWAE": bounds.IWAE(6),
        "MIWAE": bounds.MIWAE(6, 3),
    }.items():
        pyro.set_rng_seed(1)
        loss = bound.differentiable_loss(vae.model, vae.guide, x)
        found[name] = [
            torch.autograd.grad(loss, list(part.parameters()), retain_graph=True)
            for part in (vae.likelihood, vae.encoder)
        ]
    for part, other in ((0, "IWAE"), (1, "MIWAE")):
        for a, b, c in zip(
            found["PIWAE"][part], found[other][part], found["MIWAE" if part == 0 else "IWAE"][part], strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)
            assert (a - c).abs().max() > 1e-3


# The ELBO.


@pytest.mark.parametrize("name", ["ELBO", "ELBO-draws", "ELBO-STL", "ELBO-DReG"])
@pytest.mark.parametrize("encoder", ["diagonal", "full rank"])
def test_the_elbo_has_the_mean_of_the_closed_form(name, encoder):
    vae = diagonal_vae(2, 3) if encoder == "diagonal" else vae_of(truth(2, 3), widen=1.4, shift=0.5)
    x = torch.randn(8, 3, dtype=torch.float64)
    bound = BY_NAME[name].build(20)
    with torch.no_grad():
        assert_mean(repeat(lambda: bound.terms(vae.model, vae.guide, x).bound, 50), elbo_of(vae, x).sum(), FAILURE_RATE)


def test_the_elbo_with_closed_forms_is_that_of_pyro():
    vae, x = diagonal_vae(2, 3), torch.randn(8, 3, dtype=torch.float64)
    losses = []
    for bound in (bounds.ELBO(), TraceMeanField_ELBO()):
        pyro.set_rng_seed(1)
        losses.append(bound.loss(vae.model, vae.guide, x))
    assert losses[0] == pytest.approx(losses[1], abs=ROUNDING)


def normal(scale: float = 1.0):
    return dist.Normal(torch.randn(3).double(), scale * torch.tensor([0.5, 1.0, 2.0]).double()).to_event(1)


def classes(event_dims: int):
    return dist.OneHotCategorical(logits=torch.randn(2, 3).double()).to_event(event_dims)


KL_PAIRS = {
    "full rank, diagonal": lambda: (
        dist.MultivariateNormal(
            torch.randn(3).double(), scale_tril=torch.tensor([[0.5, 0, 0], [1, 2, 0], [-1, 0.3, 0.7]]).double()
        ),
        normal(),
    ),
    "low rank, diagonal": lambda: (
        dist.LowRankMultivariateNormal(
            torch.randn(3).double(), torch.randn(3, 2).double(), torch.rand(3).double() + 0.1
        ),
        normal(),
    ),
    "diagonal": lambda: (normal(0.5), normal()),
    "one-hot": lambda: (Flattened(classes(1)), Flattened(classes(1))),
    "classes": lambda: tuple(dist.Categorical(logits=torch.randn(2, 3).double()).to_event(1) for _ in range(2)),
    "sphere": lambda: (
        VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]).double(), torch.tensor(5.0).double()),
        HypersphericalUniform(torch.empty(3).double()),
    ),
    "simplex": lambda: tuple(LogisticNormal(torch.randn(2).double(), torch.rand(2).double() + 0.5) for _ in range(2)),
}


@pytest.mark.parametrize("pair", KL_PAIRS.values(), ids=KL_PAIRS.keys())
def test_closed_forms_of_kl_divergences(pair):
    q, p = pair()
    z = q.sample((20_000,))
    assert_mean(q.log_prob(z) - p.log_prob(z), kl_in_closed_form(q, p), FAILURE_RATE)


def same_as_pyro(model, guide, *args, num_particles: int = 1, absolute: float = ROUNDING, **kwargs) -> None:
    losses = []
    for bound in (bounds.ELBO(num_particles, **kwargs), Trace_ELBO(num_particles, vectorize_particles=True)):
        bound.loss(model, guide, *args)  # looks at the pair, and guesses its plates
        pyro.set_rng_seed(1)
        losses.append(bound.loss(model, guide, *args))
    assert losses[0] == pytest.approx(losses[1], abs=absolute)


def test_points_keep_their_density():
    # An automatic guide of positive latents is a point made from a normal, with the density of the change of variables.
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(3).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3).double(), scale).to_event(1), obs=x)

    x = torch.randn(5, 3, dtype=torch.float64)
    guide = AutoNormal(model)
    guide(x)
    same_as_pyro(model, guide, x)


def test_hidden_elements_have_no_part_in_closed_forms():
    mask = torch.tensor([True, False, True, True, False])
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior().expand((len(x),)).mask(mask))
            pyro.sample("x", vae.likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.encoder(x).mask(mask))

    def unmasked(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.encoder(x))

    same_as_pyro(model, guide, x, closed_form=False)
    # What plays no part in the model has no part in q, though nothing masks it there.
    for bound in (bounds.ELBO(), bounds.ELBO(closed_form=False), bounds.IWAE(4)):
        losses = []
        for q in (guide, unmasked):
            pyro.set_rng_seed(0)
            losses.append(bound.loss(model, q, x))
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("closed_form", [True, False])
def test_binary_latents_have_a_closed_form(closed_form):
    logits = torch.randn(3, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.3).double()).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    x = torch.randn(4, 3, dtype=torch.float64)
    p = logits.sigmoid()
    kl = (p * (p / 0.3).log() + (1 - p) * ((1 - p) / 0.7).log()).sum()
    misfit = p * (x - 1).square() + (1 - p) * x.square()
    exact = -(0.5 * misfit + 0.5 * math.log(2 * math.pi)).sum() - 4 * kl
    with torch.no_grad():
        found = repeat(lambda: bounds.ELBO(50, closed_form=closed_form).terms(model, guide, x).bound, 50)
    assert_mean(found, exact, FAILURE_RATE)


def test_where_there_is_no_closed_form_draws_serve():
    vae = VAE(priors.FlowPrior(2), likelihoods.Normal(2, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL)).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    # The closed form for the mixture is none: the same losses as Pyro's, from the same noise.
    losses = []
    for bound in (bounds.ELBO(), Trace_ELBO()):
        pyro.set_rng_seed(1)
        losses.append(bound.loss(vae.model, vae.guide, x))
    assert losses[0] == pytest.approx(losses[1], abs=20 * ROUNDING)


@pytest.mark.parametrize("make", [bottom_up, ladder])
@pytest.mark.parametrize("closed_form", [True, False])
def test_the_elbo_of_a_hierarchy_under_the_exact_posterior_is_log_p(make, closed_form):
    known = hierarchy()
    vae, p = make(known), known.of_z1().marginal()
    x = p.sample((10,))
    bound = bounds.ELBO(200, closed_form=closed_form)
    with torch.no_grad():
        found = repeat(lambda: bound.terms(vae.model, vae.guide, x).bound, 40)
    assert_mean(found, p.log_prob(x).sum(), FAILURE_RATE)
    if not closed_form:
        assert found.std() < ROUNDING * 200  # every weight is p(x)


def test_pyro_has_the_elbo_of_a_guide_in_another_order_wrong():
    # Where z1 is inferred before z2, KL(q(z1 | x) || p(z1 | z2)) is no part of the ELBO, although both are normals.
    vae = HierarchicalVAE(
        prior=priors.StandardNormal(2),
        conditionals=[likelihoods.Normal(2, 3, AFFINE, scale=0.7)],
        likelihood=likelihoods.Normal(3, 4, AFFINE),
        encoders=[encoders.DiagonalNormal(4, 3, AFFINE), encoders.DiagonalNormal(3, 2, AFFINE)],
    ).double()
    # So that the levels depend on each other, by their means.
    vae.conditionals[0].network.layers[0].weight.data.mul_(2)
    vae.encoders[1].network.layers[0].weight.data[:2].mul_(2)
    x = torch.randn(10, 4, dtype=torch.float64)
    pyros = TraceMeanField_ELBO(200, vectorize_particles=True)
    with torch.no_grad(), pytest.warns(UserWarning, match="mean field restriction"):
        wrong = repeat(lambda: torch.tensor(pyros.loss(vae.model, vae.guide, x)), 20)
    ours = repeat(lambda: torch.tensor(bounds.ELBO(200).loss(vae.model, vae.guide, x)), 20)
    draws = repeat(lambda: torch.tensor(Trace_ELBO(200, vectorize_particles=True).loss(vae.model, vae.guide, x)), 20)
    assert scipy.stats.ttest_ind(ours, draws, equal_var=False).pvalue > FAILURE_RATE
    assert scipy.stats.ttest_ind(wrong, draws, equal_var=False).pvalue < FAILURE_RATE


def test_the_gradient_of_the_elbo_of_a_hierarchy_does_not_depend_on_closed_forms():
    vae = bottom_up(hierarchy(), widen=1.5)
    x = torch.randn(10, 4, dtype=torch.float64).repeat(20, 1)
    found = [
        repeat(lambda bound=bound: gradients(bound.differentiable_loss(vae.model, vae.guide, x), vae), 60)
        for bound in (bounds.ELBO(), bounds.ELBO(closed_form=False), bounds.ELBO(gradient=bounds.StickingTheLanding()))
    ]
    for other in found[1:]:
        assert scipy.stats.ttest_ind(found[0], other, equal_var=False).pvalue.min() > FAILURE_RATE / other.shape[1]


@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
@pytest.mark.parametrize("gradient", [None, bounds.StickingTheLanding()], ids=["plain", "STL"])
def test_beta_weighs_the_kl_divergence(beta, gradient):
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    pyro.set_rng_seed(1)
    terms = bounds.ELBO(3, beta=beta, gradient=gradient).terms(vae.model, vae.guide, x)
    assert terms.loss.item() == pytest.approx((beta * terms.kl["z"] - terms.reconstruction).item(), abs=ROUNDING)
    assert terms.bound.item() == pytest.approx((terms.reconstruction - terms.kl["z"]).item(), abs=ROUNDING)
    # The gradient is that of the weighted sum: of the closed form, by the mean over repeats.
    q = vae.encoder(x)
    kl = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1).expand((5,)))
    exact = gradients((beta - 1) * kl.sum() - elbo_of(vae, x).sum(), vae)
    bound = bounds.ELBO(20, beta=beta, gradient=gradient)
    assert_mean(
        repeat(lambda: gradients(bound.differentiable_loss(vae.model, vae.guide, x), vae), 50), exact, FAILURE_RATE
    )


def kl_per_dimension(vae: VAE, x: Tensor) -> Tensor:
    q = vae.encoder(x).base_dist
    return 0.5 * (q.loc.square() + q.scale.square() - 1) - q.scale.log()


@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize(
    ("group_size", "groups"), [(1, [[0], [1], [2]]), (2, [[0, 1], [2]]), (3, [[0, 1, 2]]), (None, [[0, 1, 2]])]
)
def test_free_bits(group_size, groups, closed_form):
    vae, x = diagonal_vae(3, 4), torch.randn(50, 4, dtype=torch.float64)
    kl = kl_per_dimension(vae, x)
    by_group = torch.stack([kl[:, group].sum(-1).mean() for group in groups])
    # Between the groups, so that some are free and some are not; and above all of one.
    nats = (
        (by_group.min() + 0.3 * (by_group.max() - by_group.min())).item() if len(groups) > 1 else 0.5 * by_group.item()
    )
    penalty = len(x) * by_group.clamp_min(nats).sum()
    bound = bounds.ELBO(200, penalty=bounds.FreeBits(nats, group_size), closed_form=closed_form)
    found = repeat(lambda: bound.terms(vae.model, vae.guide, x).loss, 30)
    more = repeat(lambda: bounds.ELBO(200).terms(vae.model, vae.guide, x).reconstruction, 30)
    if closed_form or len(groups) == 1:  # a maximum of noisy numbers is biased, but where it is far from the threshold
        assert scipy.stats.ttest_ind(found, penalty.item() - more, equal_var=False).pvalue > FAILURE_RATE
    # The bound that is reported knows nothing of the penalty.
    terms = bound.terms(vae.model, vae.guide, x)
    assert terms.bound.item() == pytest.approx((terms.reconstruction - terms.kl["z"]).item(), abs=50 * ROUNDING)
    if closed_form:
        # What is free has no gradient, and what is not has its own: in the encoder's scales, of a decoder that is deaf.
        deaf = diagonal_vae(3, 4, decoder_weight=0.0)
        kl = kl_per_dimension(deaf, x)
        by_group = torch.stack([kl[:, group].sum(-1).mean() for group in groups])
        loss = bounds.ELBO(penalty=bounds.FreeBits(nats, group_size)).differentiable_loss(deaf.model, deaf.guide, x)
        exact = len(x) * by_group.clamp_min(nats).sum()
        ours, theirs = (torch.autograd.grad(t, list(deaf.encoder.parameters())) for t in (loss, exact))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=50 * ROUNDING)


@pytest.mark.parametrize("sign", [-1, 1])
def test_capacity(sign):
    vae, x = diagonal_vae(2, 3), torch.randn(50, 3, dtype=torch.float64)
    target = kl_per_dimension(vae, x).sum(-1).mean().item() + 0.3 * sign
    pyro.set_rng_seed(1)
    loss = bounds.ELBO(beta=7.0, penalty=bounds.Capacity(target)).differentiable_loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(1)
    plain = bounds.ELBO(beta=0.0).differentiable_loss(vae.model, vae.guide, x)
    exact = plain + 7.0 * len(x) * (kl_per_dimension(vae, x).sum(-1).mean() - target).abs()
    torch.testing.assert_close(loss, exact, rtol=0, atol=50 * ROUNDING)
    torch.testing.assert_close(gradients(loss, vae), gradients(exact, vae), rtol=0, atol=50 * ROUNDING)


def test_free_bits_of_classes_and_numbers_count_as_one_dimension():
    vae = SemiSupervisedVAE(
        prior=priors.StandardNormal(2),
        likelihood=likelihoods.Normal(2, 3, SMALL, context_dim=2),
        encoder=encoders.DiagonalNormal(3, 2, SMALL, context_dim=2),
        classifier=SMALL,
        num_classes=2,
    ).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    q = vae.classify(x)
    kl = (q.probs * (q.logits - math.log(0.5))).sum(-1)
    with torch.no_grad():
        terms = bounds.ELBO(2, penalty=bounds.FreeBits(5.0)).terms(vae.model, vae.guide, x)
    # Far below the threshold, each dimension costs just that: two of z, one of y.
    assert terms.loss.item() == pytest.approx((20 * 3 * 5.0 - terms.reconstruction).item(), abs=20 * ROUNDING)
    assert terms.kl["y"].item() == pytest.approx(kl.sum().item(), abs=20 * ROUNDING)


def test_schedules():
    linear = bounds.Linear(steps=4, start=1.0, end=3.0)
    assert [linear(step) for step in range(6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    cyclical = bounds.Cyclical(period=4, end=2.0)
    assert [cyclical(step) for step in range(6)] == [0.0, 1.0, 2.0, 2.0, 0.0, 1.0]
    assert linear(None) == 3.0
    assert cyclical(None) == 2.0


def test_a_warm_up_starts_at_exactly_zero_and_goes_on_with_every_step():
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    bound = bounds.ELBO(beta=bounds.Linear(steps=4))
    for step in range(6):
        terms = bound.terms(vae.model, vae.guide, x)
        expected = min(step / 4, 1.0) * terms.kl["z"] - terms.reconstruction
        assert terms.loss.item() == pytest.approx(expected.item(), abs=ROUNDING)
        # Evaluation takes the end, and is no step.
        pyro.set_rng_seed(1)
        evaluated = bound.loss(vae.model, vae.guide, x)
        pyro.set_rng_seed(1)
        assert evaluated == bounds.ELBO().loss(vae.model, vae.guide, x)


# Scales, masks, plates.


def plated(vae: VAE, data: Tensor, subsample_size: int | None = None):
    """A hand-written pair of a VAE's parts, whose data plate draws a subsample."""

    def model():
        with pyro.plate("data", len(data), subsample_size=subsample_size) as rows:
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.likelihood(z), obs=data[rows])

    def guide():
        with pyro.plate("data", len(data), subsample_size=subsample_size) as rows:
            pyro.sample("z", vae.encoder(data[rows]))

    return model, guide


# Those that scale and weigh in ways of their own; the others take long, and have their own command.
SUBSAMPLED = ["ELBO", "IWAE", "IWAE-DReG", "TVO", "ReweightedWakeSleep"]
SUBSAMPLED += [pytest.param(name, marks=pytest.mark.slow) for name in ("ELBO-STL", "PIWAE", "Renyi-half", "CUBO")]


@pytest.mark.parametrize("name", SUBSAMPLED)
def test_over_subsamples_the_mean_of_loss_and_gradient_is_that_of_all(name):
    known = truth(2, 3)
    vae = vae_of(known, widen=1.3)
    data = known.marginal().sample((6,))
    bound = BY_NAME[name].build(4)

    def draws(subsample_size: int | None) -> Tensor:
        model, guide = plated(vae, data, subsample_size)

        def draw() -> Tensor:
            loss = bound.differentiable_loss(model, guide)
            return torch.cat([loss.detach().reshape(1), gradients(loss, vae)])

        return repeat(draw, 120)

    p = scipy.stats.ttest_ind(draws(3), draws(None), equal_var=False).pvalue
    p = p[~torch.isnan(torch.as_tensor(p)).numpy()]  # no gradient, no variance
    assert p.min() > FAILURE_RATE / len(p)


def test_pyro_has_the_importance_weighted_bound_of_a_subsample_wrong():
    # The test above would tell: with N/B inside the logarithm the bound is another one.
    known = truth(2, 3)
    vae = vae_of(known, widen=1.6, shift=0.7)
    data = known.marginal().sample((6,))
    renyi = RenyiELBO(alpha=0, num_particles=4, vectorize_particles=True)
    model, guide = plated(vae, data, 2)
    right = repeat(lambda: torch.tensor(bounds.IWAE(4).loss(model, guide)), 400)
    wrong = repeat(lambda: torch.tensor(renyi.loss(model, guide)), 400)
    assert scipy.stats.ttest_ind(wrong, right, equal_var=False).pvalue < FAILURE_RATE


@every_bound
def test_a_scale_of_all_scales_loss_and_gradient(case):
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0]).double()
    bound, found = case.build(4), {}
    for name, scale in {"none": None, "half": 0.5, "each": weights}.items():
        model, guide = (f if scale is None else poutine.scale(f, scale=scale) for f in (vae.model, vae.guide))
        pyro.set_rng_seed(1)
        loss = bound.differentiable_loss(model, guide, x)
        found[name] = loss.detach(), gradients(loss, vae)
    if case.name != "ReweightedWakeSleep-sleep":  # whose sleep phase scores data of its own
        for a, b in zip(found["half"], found["none"], strict=True):
            torch.testing.assert_close(a, 0.5 * b, rtol=0, atol=ROUNDING)
    assert abs(found["each"][0] - found["none"][0]) > 1e-3


def test_a_scale_a_datum_weighs_the_data():
    vae, x = diagonal_vae(2, 3), torch.randn(2, 3, dtype=torch.float64)
    first_only = torch.tensor([2.0, 1e-30]).double()
    model, guide = (poutine.scale(f, scale=first_only) for f in (vae.model, vae.guide))
    with torch.no_grad():
        found = repeat(lambda: bounds.IWAE(4).terms(model, guide, x).loss, 200)
        alone = repeat(lambda: 2 * bounds.IWAE(4).terms(vae.model, vae.guide, x[:1]).loss, 200)
    assert scipy.stats.ttest_ind(found, alone, equal_var=False).pvalue > FAILURE_RATE


def annealed(vae: VAE, beta: float):
    """The usual way to anneal in Pyro: a scale on the latent of model and guide alone."""

    def model(x):
        pyro.module("anneal", vae)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=beta):
            pyro.sample("z", vae.encoder(x))

    return model, guide


@pytest.mark.parametrize("closed_form", [True, False])
def test_a_scale_of_one_site_weighs_it_in_the_elbo(closed_form):
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    model, guide = annealed(vae, 0.25)
    found = []
    for bound, f, g in (
        (bounds.ELBO(closed_form=closed_form), model, guide),
        (bounds.ELBO(closed_form=closed_form, beta=0.25), vae.model, vae.guide),
    ):
        pyro.set_rng_seed(1)
        loss = bound.differentiable_loss(f, g, x)
        found.append((loss.detach(), gradients(loss, vae)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)


def test_a_scale_on_one_side_alone_is_that_of_pyro():
    # TraceMeanField_ELBO leaves it out without a word.
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    model, _ = annealed(vae, 0.25)
    losses = []
    for bound in (bounds.ELBO(), Trace_ELBO()):
        pyro.set_rng_seed(1)
        losses.append(bound.loss(model, vae.guide, x))
    assert losses[0] == pytest.approx(losses[1], abs=ROUNDING)


@pytest.mark.parametrize("num_particles", [1, 3, 1000])
def test_a_tensor_of_scales_in_nested_plates_is_that_of_pyro(num_particles):
    weights = torch.tensor([[1.0], [2.0], [0.5]]).double()

    def model(x):
        with pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))
            with pyro.plate("inner", 3, dim=-2), poutine.scale(scale=weights):
                y = pyro.sample("y", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.2).double(), 0.7))
            with pyro.plate("inner", 3, dim=-2), poutine.scale(scale=weights):
                pyro.sample("y", dist.Normal(0.5 * z, 1.2))

    x = torch.randn(3, 4, dtype=torch.float64)
    same_as_pyro(model, guide, x, num_particles=num_particles, closed_form=False)
    closed, draws = (
        repeat(lambda c=c: torch.tensor(bounds.ELBO(100, closed_form=c).loss(model, guide, x)), 50)
        for c in (True, False)
    )
    assert scipy.stats.ttest_ind(closed, draws, equal_var=False).pvalue > FAILURE_RATE


def test_a_tensor_of_scales_has_no_place_in_a_penalty():
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    model, guide = (poutine.scale(f, scale=torch.rand(5).double()) for f in (vae.model, vae.guide))
    with pytest.raises(ValueError, match=r'site "z" is scaled by a tensor.*FreeBits'):
        bounds.ELBO(penalty=bounds.FreeBits(0.1)).loss(model, guide, x)


def test_a_scale_of_one_site_has_no_place_inside_a_logarithm():
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    model, guide = annealed(vae, 0.25)
    with pytest.raises(ValueError, match=r'site "x" of the model by 1\.0.*IWAE.*ELBO\(beta'):
        bounds.IWAE(3).loss(model, guide, x)


@every_bound
def test_masks_are_inside(case):
    # The last two data are masked in model and guide: nothing is left of them, and each of their weights is one.
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    kept = torch.tensor([True, True, True, False, False])
    model, guide = (poutine.mask(f, mask=kept) for f in (vae.model, vae.guide))
    bound = case.build(4)
    pyro.set_rng_seed(1)
    terms = bound.terms(model, guide, x)
    if case.name == "ReweightedWakeSleep-sleep":
        return
    moved = x.clone()
    moved[3:] += 100
    pyro.set_rng_seed(1)
    same = bound.terms(model, guide, moved)
    torch.testing.assert_close(terms.loss, same.loss, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(gradients(terms.loss, vae), gradients(same.loss, vae), rtol=0, atol=ROUNDING)
    with torch.no_grad():
        found = repeat(lambda: bound.terms(model, guide, x).loss, 60)
        without = repeat(lambda: bound.terms(vae.model, vae.guide, x[:3]).loss, 60)
    assert scipy.stats.ttest_ind(found, without, equal_var=False).pvalue > FAILURE_RATE


def test_missing_data_have_no_part():
    vae = MissingDataVAE(
        priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), encoders.DiagonalNormal((2, 3), 2, SMALL)
    )
    vae = vae.double()
    x, mask = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3) < 0.7
    mask[:, 0] = True
    values = []
    for filling in (0.0, 7.0):
        pyro.set_rng_seed(1)
        values.append(bounds.IWAE(4).loss(vae.model, vae.guide, torch.where(mask, x, filling), mask))
    assert values[0] == values[1]
    pyro.set_rng_seed(1)
    log_w = log_weights(vae.model, vae.guide, x, mask, num_samples=4)
    assert -values[0] == pytest.approx((log_w.logsumexp(0) - math.log(4)).sum().item(), abs=ROUNDING)


def with_global_latent(vae: VAE):
    """A latent that all data share, outside the plate, and one a datum whose prior it shifts; guided at random."""

    def model(x):
        pyro.module("global", vae)
        shift = pyro.sample("shift", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, torch.ones(2).double()).to_event(1))
            pyro.sample("x", vae.likelihood(z), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.full((2,), 0.3).double())
        pyro.sample("shift", dist.Normal(loc, torch.tensor(0.5).double()).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.encoder(x))

    return model, guide


@pytest.mark.parametrize("gradient", [None, bounds.StickingTheLanding()], ids=["plain", "STL"])
@pytest.mark.parametrize("closed_form", [True, False])
def test_latents_outside_the_data_plate_are_fine_for_the_elbo(gradient, closed_form):
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    model, guide = with_global_latent(vae)
    pyro.set_rng_seed(1)
    guide(x)  # makes its parameter
    loc = pyro.get_param_store()._params["loc"]
    found = {}
    for name, bound in {
        "ours": bounds.ELBO(10, gradient=gradient, closed_form=closed_form),
        "Pyro's": TraceGraph_ELBO(10, vectorize_particles=True),
    }.items():

        def draw(bound=bound) -> Tensor:
            for p in [*vae.parameters(), loc]:
                p.grad = None
            loss = bound.loss_and_grads(model, guide, x)
            grads = [p.grad for p in [*vae.parameters(), loc] if p.grad is not None]
            return torch.cat([torch.as_tensor(loss, dtype=torch.float64).reshape(1), *(g.flatten() for g in grads)])

        found[name] = repeat(draw, 100)
    p = scipy.stats.ttest_ind(*found.values(), equal_var=False).pvalue
    assert p.min() > FAILURE_RATE / len(p)


# Chunks.


@pytest.mark.parametrize("case", [case for case in BOUNDS if "FIVO" not in case.name], ids=lambda case: case.name)
def test_chunks_of_particles_change_nothing(case):
    vae, x = diagonal_vae(4, 5), torch.randn(16, 5, dtype=torch.float64)
    seen = []
    hook = vae.likelihood.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    found = []
    for bound in (case.build(8), case.build(8, chunk_size=4)):
        vae.likelihood(torch.zeros(2, 4, dtype=torch.float64))
        bound.loss(vae.model, vae.guide, x)  # looks at the pair
        seen.clear()
        pyro.set_rng_seed(1)
        loss = bound.differentiable_loss(vae.model, vae.guide, x)
        pyro.set_rng_seed(2)  # what comes between forward and backward must not matter
        found.append((loss.detach(), gradients(loss, vae)))
    hook.remove()
    assert {4} <= set(seen) <= {4, 16}  # particles, or the data that the sleep phase draws; never 8
    if case.name == "ReweightedWakeSleep-sleep":
        return  # its dreams differ
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e4 * EPS, atol=16 * ROUNDING)


@pytest.mark.parametrize("chunk_size", [1, 3, 8])
def test_chunks_are_of_the_same_subsample_and_run_the_guide_once(chunk_size):
    known = truth(2, 3)
    vae = vae_of(known, widen=1.3)
    model, guide = plated(vae, known.marginal().sample((12,)), 4)
    runs = []
    vae.encoder.register_forward_hook(lambda *_: runs.append(1))
    found = []
    for bound in (bounds.IWAE(8), bounds.IWAE(8, chunk_size=chunk_size)):
        bound.loss(model, guide)
        runs.clear()
        pyro.set_rng_seed(1)
        loss = bound.differentiable_loss(model, guide)
        found.append((loss.detach(), gradients(loss, vae)))
        assert len(runs) == 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e4 * EPS, atol=16 * ROUNDING)


def test_chunks_bring_back_the_noise_of_the_model():
    # Dropout in the decoder: the second run of a chunk must drop what the first did. The gradient is that of autograd
    # through the same network with the same drops, by finite differences.
    vae = VAE(
        priors.StandardNormal(2),
        likelihoods.Normal(2, 3, torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 3))),
        encoders.DiagonalNormal(3, 2, SMALL),
    ).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    bound = bounds.IWAE(4, chunk_size=2)
    weight = vae.likelihood.network[1].weight
    bound.loss(vae.model, vae.guide, x)

    def loss() -> Tensor:
        pyro.set_rng_seed(1)
        return bound.differentiable_loss(vae.model, vae.guide, x)

    (gradient,) = torch.autograd.grad(loss(), weight)
    step = 1e-6
    with torch.no_grad():
        weight[0, 0] += step
    up = loss().item()
    with torch.no_grad():
        weight[0, 0] -= 2 * step
    down = loss().item()
    # A third derivative of below 1e4, and rounding of 1e-13 over the step.
    assert gradient[0, 0].item() == pytest.approx((up - down) / (2 * step), abs=1e-6)


# Bounds as a part of Pyro and of fit.


@pytest.mark.parametrize("case", {type(case.build(2)): case for case in BOUNDS}.values(), ids=lambda case: case.name)
def test_every_bound_trains_in_svi(case):
    known = truth(2, 3)
    vae = vae_of(known, widen=1.4, shift=1.0)
    x = known.marginal().sample((50,))
    bound = case.build(8)
    before = copy.deepcopy(vae.state_dict())
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), bound)
    # Where the bound is an upper bound in the limit, or none, its training may raise or lower the ELBO.
    judge = bound if case.kind != "lower" and not case.name.startswith("CUBO") else bounds.ELBO(20)

    def losses() -> Tensor:
        return repeat(lambda: torch.tensor(judge.loss(vae.model, vae.guide, x)), 20)

    start = losses()
    for _ in range(60):
        assert isinstance(svi.step(x), float)
    # The guide started off the posterior: whatever the bound, it must have come nearer.
    assert scipy.stats.ttest_ind(losses(), start, equal_var=False, alternative="less").pvalue < FAILURE_RATE
    moved = {name for name, t in vae.state_dict().items() if not torch.equal(t, before[name])}
    assert ("likelihood.log_scale" in moved) == (not case.name.startswith("CUBO"))
    assert "encoder.network.layers.0.weight" in moved


@every_bound
def test_losses_agree_in_all_forms(case):
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    bound = case.build(4)
    bound.loss(vae.model, vae.guide, x)
    found = []
    for loss_of in (bound.loss, bound.differentiable_loss, bound.loss_and_grads, bound(vae.model, vae.guide)):
        vae.zero_grad()
        pyro.set_rng_seed(1)
        loss = loss_of(x) if loss_of.__class__.__name__ == "ELBOModule" else loss_of(vae.model, vae.guide, x)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
        grads = [None if p.grad is None else p.grad.clone() for p in vae.parameters()]
        found.append((float(loss.detach() if isinstance(loss, Tensor) else loss), grads))
    assert len({value for value, _ in found}) == 1
    assert all(grad is None for grad in found[0][1])
    for _, grads in found[2:]:
        for a, b in zip(grads, found[1][1], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@every_bound
def test_terms_say_what_a_loss_is_made_of(case):
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    bound = case.build(4)
    pyro.set_rng_seed(1)
    terms = bound.terms(vae.model, vae.guide, x)
    assert not any(t.requires_grad for t in (terms.bound, terms.reconstruction, terms.kl["z"]))
    assert terms.loss.item() == pytest.approx((1 if bound.is_upper else -1) * terms.bound.item(), abs=ROUNDING)
    pyro.set_rng_seed(1)
    log_w = log_weights(vae.model, vae.guide, x, num_samples=4)
    if case.name != "ELBO":
        assert terms.bound.item() == pytest.approx(value_of(bound, log_w).sum().item(), abs=ROUNDING)
        assert (terms.reconstruction - terms.kl["z"]).item() == pytest.approx(log_w.mean(0).sum().item(), abs=ROUNDING)


def test_fit_logs_the_terms_of_its_bound():
    known = hierarchy()
    vae = bottom_up(known, widen=1.3)
    x = known.of_z1().marginal().sample((40,))
    records = fit(vae.model, vae.guide, x, loss=bounds.IWAE(4), epochs=2, batch_size=16, progress=False).records
    for record in records:
        assert record["bound"] == pytest.approx(-record["loss"], abs=ROUNDING)
        elbo = record["reconstruction"] - record["kl z1"] - record["kl z2"]
        assert elbo < record["bound"]  # of the same weights
    # Per datum: of this size, and not 16 or 40 times as large.
    exact = known.of_z1().marginal().log_prob(x).mean().item()
    assert exact - 3 < records[0]["bound"] < exact + 3
    history = fit(vae.model, vae.guide, x, epochs=1, batch_size=16, progress=False)
    assert "bound" not in history.records[0]


@pytest.mark.filterwarnings("ignore:the schedule of ELBO")
def test_a_warm_up_is_resumed_to_the_bit(tmp_path):
    x = torch.randn(40, 3)

    def run(epochs: int, name: str, resume: bool = False) -> dict[str, Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL))
        loss = bounds.ELBO(beta=bounds.Linear(steps=9), penalty=bounds.Capacity(bounds.Linear(steps=9, end=2.0)))
        fit(
            vae.model,
            vae.guide,
            x,
            loss=loss,
            epochs=epochs,
            batch_size=20,
            checkpoint=tmp_path / name,
            resume=resume,
            progress=False,
        )
        assert loss.steps == 2 * epochs
        return vae.state_dict()

    whole = run(6, "whole")
    run(2, "parts")
    resumed = run(6, "parts", resume=True)
    assert all(torch.equal(resumed[name], t) for name, t in whole.items())


@pytest.mark.filterwarnings("ignore:the schedule of ELBO")
def test_validation_during_a_warm_up_takes_its_end():
    x = torch.randn(40, 3)
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL))
    frozen = partial(torch.optim.SGD, lr=0.0)
    loss = bounds.ELBO(beta=bounds.Linear(steps=100, start=0.0, end=50.0))
    history = fit(
        vae.model, vae.guide, x, loss=loss, epochs=3, batch_size=20, optimizer=frozen, validation=x, progress=False
    )
    assert len(set(history["validation"])) == 1
    assert history["loss"][0] < history["loss"][2] < history["validation"][0]


@every_bound
def test_a_loss_and_its_gradient_are_one_graph(case):
    # Traced into tensor operations alone, which fails where a number is fetched from a tensor, so that a GPU would be
    # waited for; and the graph gives what the loss gives.
    vae, x = diagonal_vae(2, 3), torch.randn(5, 3, dtype=torch.float64)
    bound = case.build(4)
    bound.loss(vae.model, vae.guide, x)  # the first call looks at the pair

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        with pyro.validation_enabled(False):
            loss = bound.differentiable_loss(vae.model, vae.guide, x)
        return loss.detach(), gradients(loss, vae)

    graph, found = make_fx(step)(x), []
    for f in (step, graph):
        pyro.set_rng_seed(1)
        found.append(f(x))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)


def test_one_bound_serves_several_pairs_and_is_copied():
    bound = bounds.IWAE(4)
    for latent_dim in (2, 3):
        vae, x = diagonal_vae(latent_dim, 4), torch.randn(5, 4, dtype=torch.float64)
        pyro.set_rng_seed(1)
        loss = bound.loss(vae.model, vae.guide, x)
        for other in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
            pyro.set_rng_seed(1)
            assert other.loss(vae.model, vae.guide, x) == loss


def test_a_model_with_other_plates_for_other_data_is_looked_at_anew():
    def model(x):
        with pyro.plate("data", x.shape[-1], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))
            if x.dim() == 1:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            else:
                with pyro.plate("inner", len(x), dim=-2):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[-1], dim=-1):
            pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))

    bound = bounds.IWAE(3)
    for x in (torch.randn(4).double(), torch.randn(2, 4).double(), torch.randn(4).double()):
        pyro.set_rng_seed(1)
        loss = bound.loss(model, guide, x)
        pyro.set_rng_seed(1)
        assert loss == bounds.IWAE(3).loss(model, guide, x)


def test_a_checkpoint_from_before_bounds_is_resumed(tmp_path):
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL))
    run = partial(
        fit, vae.model, vae.guide, torch.randn(20, 3), batch_size=10, checkpoint=tmp_path / "c", progress=False
    )
    run(epochs=1)
    state = storage.read_checkpoint(tmp_path / "c")
    del state["loss"], state["kinds"]["loss"]
    storage.write_checkpoint(tmp_path / "c", state)
    assert len(run(epochs=3, resume=True)) == 3


# Bad input.


def x_of(size: int = 5) -> Tensor:
    return torch.randn(size, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: bounds.IWAE(0), "num_particles must be an integer of at least 1, got 0"),
        (lambda: bounds.IWAE(2.5), "num_particles must be an integer"),
        (lambda: bounds.IWAE(True), "num_particles must be an integer of at least 1, got True"),
        (lambda: bounds.IWAE(4, chunk_size=0), "chunk_size must be an integer of at least 1, got 0"),
        (lambda: bounds.ELBO(beta=-1.0), "beta must be at least 0 and finite, got -1.0"),
        (lambda: bounds.ELBO(beta=math.nan), "beta must be at least 0 and finite, got nan"),
        (lambda: bounds.CIWAE(4, beta=1.5), "beta must be from 0 to 1, got 1.5"),
        (lambda: bounds.Renyi(4, alpha=math.nan), "alpha must be a finite number, got nan"),
        (lambda: bounds.Renyi(4, alpha=-math.inf), "VRMax is the limit"),
        (lambda: bounds.CUBO(4, n=1.0), "n must be above 1 and finite, got 1.0"),
        (lambda: bounds.MIWAE(6, 4), "num_groups must divide num_particles=6, got 4"),
        (lambda: bounds.PIWAE(6, 0), "num_groups must divide num_particles=6, got 0"),
        (lambda: bounds.TVO(4, num_partitions=0), "num_partitions must be an integer of at least 1, got 0"),
        (lambda: bounds.TVO(4, beta_1=1.0), "beta_1 must be between 0 and 1, got 1.0"),
        (lambda: bounds.ReweightedWakeSleep(4, wake=-1.0), "wake must be at least 0"),
        (lambda: bounds.ReweightedWakeSleep(4, wake=0.0), "wake and sleep are both 0"),
        (lambda: bounds.Linear(steps=0), "steps must be at least 1, got 0"),
        (lambda: bounds.Linear(steps=10, end=-1.0), "end must be at least 0"),
        (lambda: bounds.Linear(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: bounds.Linear(), "give steps or epochs, one of them"),
        (lambda: bounds.Linear(4, epochs=4), "give steps or epochs, one of them"),
        (lambda: bounds.Linear(epochs=4)(3), r"Linear\(epochs=4\) counts epochs, .* give steps instead"),
        (lambda: bounds.Cyclical(period=0), "period must be at least 1, got 0"),
        (lambda: bounds.Cyclical(period=10, ramp=0.0), "ramp must be above 0"),
        (lambda: bounds.FreeBits(-0.1), "nats must be at least 0"),
        (lambda: bounds.FreeBits(0.1, group_size=0), "group_size must be an integer of at least 1"),
        (lambda: bounds.Capacity(math.inf), "nats must be at least 0 and finite"),
        (lambda: bounds.ReweightedWakeSleep(1), "wake phase needs num_particles of at least 2"),
        (lambda: bounds.CUBO(4, gradient=bounds.StickingTheLanding()), "gradient of CUBO must be None"),
        (lambda: bounds.CUBO(1), "CUBO needs num_particles of at least 2"),
        (lambda: bounds.TVO(1, gradient=bounds.Covariance()), "Covariance gradients need num_particles of at least 2"),
        (lambda: bounds.MIWAE(8, 2.0), "num_groups must divide num_particles=8, got 2.0"),
        (lambda: bounds.TVO(4, 2.5), "num_partitions must be an integer of at least 1, got 2.5"),
        (lambda: bounds.FreeBits(0.1, group_size=1.5), "group_size must be an integer of at least 1"),
        (
            lambda: bounds.ELBO(penalty=bounds.FreeBits(0.1), gradient=bounds.StickingTheLanding()),
            r"ELBO.*Reparameterized\(\)",
        ),
        (
            lambda: bounds.ELBO(penalty=bounds.FreeBits(0.1), gradient=bounds.DoublyReparameterized()),
            "a penalty takes estimates",
        ),
        (lambda: bounds.IWAE(4, bounds.StickingTheLanding()), "biased for this IWAE.*DoublyReparameterized"),
        (lambda: bounds.Renyi(4, 0.5, bounds.StickingTheLanding()), "biased for this Renyi"),
        (lambda: bounds.IWAE(4, bounds.Covariance()), "for the TVO, not for IWAE"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: bounds.IWAE(4, gradient="DReG"), "gradient must be an estimator"),
        (
            lambda: bounds.ELBO(beta=bounds.Linear),
            "beta must be a number, or an instance of a schedule",
        ),
        (lambda: bounds.FreeBits("0.1"), "nats must be a number"),
        (lambda: bounds.ELBO(penalty=0.5), "penalty must be an instance of Penalty"),
        (lambda: bounds.ELBO(penalty=bounds.FreeBits), "penalty must be an instance of Penalty"),
        (lambda: bounds.ELBO(regularizers=MaximumMeanDiscrepancy(1.0)), "regularizers must be a list"),
        (lambda: bounds.ELBO(regularizers=[MaximumMeanDiscrepancy]), "regularizers must be a list"),
    ],
)
def test_parts_must_be_built(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_numpys_integers_are_integers():
    vae, x = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2)), torch.randn(20, 3)
    losses = []
    for integer in (int, np.int64):
        pyro.set_rng_seed(0)
        losses.append(bounds.IWAE(integer(4), chunk_size=integer(2)).loss(vae.model, vae.guide, x))
    assert losses[0] == losses[1]


def test_a_loss_must_be_built():
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL))
    for loss in (bounds.IWAE, "IWAE", bounds.DoublyReparameterized()):
        with pytest.raises(TypeError, match="loss must be an ELBO object"):
            fit(vae.model, vae.guide, torch.randn(20, 3), batch_size=10, loss=loss, progress=False)
    with pytest.raises(ValueError, match=r"num_particles must be an integer of at least 1, got a method\.$"):
        bounds.IWAE(vae.model)


def test_a_warm_up_that_training_cuts_short_is_warned_of():
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL))
    x = torch.randn(20, 3)
    run = partial(fit, vae.model, vae.guide, x, batch_size=10, progress=False, validation=x)
    with pytest.warns(UserWarning, match=r"takes 100 steps, which are 50 epochs.*epochs=2"):
        run(loss=bounds.ELBO(beta=bounds.Linear(100)), epochs=2)
    with pytest.warns(UserWarning, match=r"takes 6 steps, which are 3 epochs.*patience=2"):
        run(loss=bounds.ELBO(penalty=bounds.Capacity(bounds.Cyclical(6))), epochs=4, patience=2)
    run(loss=bounds.ELBO(beta=bounds.Linear(6)), epochs=3, patience=3)


def test_a_warm_up_in_epochs_is_that_in_their_steps():
    found = []
    for beta in (bounds.Linear(6), bounds.Linear(epochs=3)):
        pyro.set_rng_seed(0)
        vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL))
        x, loss = torch.randn(20, 3), bounds.ELBO(beta=beta)
        found.append(fit(vae.model, vae.guide, x, batch_size=10, loss=loss, epochs=4, progress=False)["loss"])
    assert found[0] == found[1]
    with pytest.warns(UserWarning, match=r"takes 6 steps, which are 3 epochs.*epochs=2"):
        fit(vae.model, vae.guide, x, batch_size=10, loss=loss, epochs=2, progress=False)


def test_every_run_starts_its_schedules_anew():
    x, loss = torch.randn(20, 3), bounds.ELBO(beta=bounds.Linear(4))
    for _ in range(2):
        vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL))
        history = fit(vae.model, vae.guide, x, batch_size=10, loss=loss, epochs=2, progress=False)
        assert loss.steps == 4
        first = history.records[0]
        assert first["loss"] == pytest.approx(first["kl z"] / 8 - first["reconstruction"], rel=0.2)  # beta 0, then 1/4


class Scalar(bounds.ImportanceBound):
    def reduce(self, log_w: Tensor) -> bounds.Reduced:
        return bounds.Reduced(log_w.mean(), torch.ones_like(log_w), torch.zeros_like(log_w))


def test_a_bound_of_ones_own_must_keep_the_data_apart():
    vae, x = diagonal_vae(2, 3), x_of()
    with pytest.raises(ValueError, match=r"Scalar\.reduce returned a value of shape \(\).*\(4, 5\)"):
        Scalar(4).loss(vae.model, vae.guide, x)


def assert_one_by_one_is_right(model, guide, x):
    """Losses and gradients of a pair whose particles are drawn one by one, against sums written by hand.

    The guide's only parameter is "loc", which shifts "z". Plain gradients go through the latents; the doubly
    reparameterised one of the guide is sum_k w_k^2 d log w_k / d z_k, q's own parameters held fixed.
    """
    iwae, dreg = partial(bounds.IWAE, 4), partial(bounds.IWAE, 4, gradient=bounds.DoublyReparameterized())
    for build in (partial(bounds.ELBO, 4), iwae, dreg):
        bound = build()
        with pytest.warns(UserWarning, match="drawn one by one"):
            bound.loss(model, guide, x)
        names, params = zip(*pyro.get_param_store().named_parameters(), strict=True)
        pyro.set_rng_seed(0)
        loss = bound.differentiable_loss(model, guide, x)
        found = dict(zip(names, torch.autograd.grad(loss, params), strict=True))

        pyro.set_rng_seed(0)
        log_w, latents = [], []
        for _ in range(4):
            drawn = poutine.trace(guide).get_trace(x)
            z = drawn.nodes["z"]["value"]
            if build is dreg:
                with torch.no_grad(), torch.random.fork_rng():
                    fixed = poutine.trace(guide).get_trace(x).nodes["z"]["fn"]
                log_q = fixed.log_prob(z)
            else:
                log_q = drawn.nodes["z"]["fn"].log_prob(z)
            scored = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x)
            log_p = [scored.nodes[name]["fn"].log_prob(scored.nodes[name]["value"]) for name in ("z", "x")]
            log_w.append(log_p[0] + (log_p[1].sum(0) if log_p[1].dim() > 1 else log_p[1]) - log_q)
            latents.append(z)
        log_w = torch.stack(log_w)
        value = log_w.mean(0) if isinstance(bound, bounds.ELBO) else log_w.logsumexp(0) - math.log(4)
        wanted = dict(zip(names, torch.autograd.grad(-value.sum(), params, retain_graph=True), strict=True))
        if build is dreg:
            w = log_w.detach().softmax(0)
            by_latent = torch.autograd.grad((w.square() * log_w).sum(), latents, retain_graph=True)
            wanted["loc"] = -sum((g * z).sum() for g, z in zip(by_latent, latents, strict=True))
            wanted["loc"] = torch.autograd.grad(wanted["loc"], pyro.param("loc").unconstrained())[0]
        torch.testing.assert_close(loss, -value.sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_particles_that_go_astray_are_drawn_one_by_one():
    # A second plate adds a dimension of size 1 next to the particles, which the decoder moves to the wrong position.
    layer = torch.nn.Linear(2, 6)

    def model(x):
        pyro.module("layer", layer)
        data = pyro.plate("data", len(x), dim=-1)
        with data:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("pixels", 6, dim=-2), data:
            pyro.sample("x", dist.Bernoulli(logits=layer(z).transpose(-1, -2)), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    assert_one_by_one_is_right(model, guide, torch.bernoulli(torch.full((5, 6), 0.5)))


def test_a_network_that_takes_no_particles_draws_them_one_by_one():
    layer = torch.nn.Linear(6, 4)

    def model(x):
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(layer(z.reshape(len(x), -1)), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2, 3)), 1.0).to_event(2))

    assert_one_by_one_is_right(model, guide, torch.randn(5, 4))


def test_code_that_names_a_dimension_draws_particles_one_by_one():
    # With particles in front, dimension 1 is that of the data.
    network = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Softmax(dim=1))

    def model(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Multinomial(20, network(z)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    assert_one_by_one_is_right(model, guide, dist.Multinomial(20, torch.full((5, 4), 0.25)).sample())


IMPORTANCE = [case for case in BOUNDS if not case.name.startswith("ELBO")]


@pytest.mark.parametrize("case", IMPORTANCE, ids=lambda case: case.name)
def test_weights_of_a_latent_outside_the_plate_are_refused(case):
    model, guide = with_global_latent(diagonal_vae(2, 3))
    with pytest.raises(ValueError, match=r'site "shift" of the model is outside the plate "data".*bounds\.ELBO'):
        case.build(4).loss(model, guide, x_of())


@pytest.mark.parametrize("case", [case for case in BOUNDS if case.reparameterized], ids=lambda case: case.name)
@pytest.mark.parametrize("encoder", [encoders.Categorical, encoders.OneHotCategorical])
def test_latents_that_cannot_be_differentiated_are_refused(case, encoder):
    prior = priors.Categorical(2, 2) if encoder is encoders.Categorical else priors.OneHotCategorical(2)
    vae = VAE(prior, likelihoods.Normal(2, 3, READS_CLASSES), encoder(3, 2, SMALL))
    with pytest.raises(ValueError, match=r'site "z" of the guide.*ReweightedWakeSleep.*Reparameterized\(\)'):
        case.build(4).differentiable_loss(vae.model, vae.guide, torch.randn(5, 3))


def test_one_particle_has_no_baseline():
    vae = VAE(priors.Categorical(2, 2), likelihoods.Normal(2, 3, READS_CLASSES), encoders.Categorical(3, 2, SMALL))
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r'site "z" of the guide is a Categorical.*num_particles of at least 2'):
        bounds.ELBO().differentiable_loss(vae.model, vae.guide, x)
    with pytest.raises(ValueError, match=r"num_particles of at least 2"):
        bounds.PIWAE(1, 1).differentiable_loss(vae.model, vae.guide, x)
    assert math.isfinite(bounds.ELBO().loss(vae.model, vae.guide, x))  # evaluation needs none


def test_enumerated_sites_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)

    def guide(x):
        pass

    for bound in (bounds.ELBO(2), bounds.IWAE(2)):
        with pytest.raises(ValueError, match=r'site "k" of the model is enumerated.*TraceEnum_ELBO'):
            bound.loss(model, guide, torch.randn(5))


@pytest.mark.parametrize(
    ("every", "match"),
    [(2, r'change from run to run \("more"\).*poutine\.mask'), (1, 'guide misses the latent site "more"')],
)
def test_sites_that_come_and_go_are_refused(every, match):
    calls = itertools.count()

    def model(x, extra=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if (call := next(calls)) > 4 and call % every == 0:
                z = pyro.sample("more", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, extra=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    bound, x = bounds.IWAE(2), torch.randn(5)
    with pytest.raises(ValueError, match=match):
        for _ in range(10):
            bound.loss(model, guide, x)


def test_the_sleep_phase_needs_the_data_as_an_argument():
    vae = diagonal_vae(2, 3)

    def model(x):
        vae.model(2 * x)

    def guide(x):
        vae.guide(2 * x)

    with pytest.raises(ValueError, match=r'site "x".*not one of the arguments'):
        bounds.ReweightedWakeSleep(2, sleep=1.0).differentiable_loss(model, guide, x_of())
    bounds.ReweightedWakeSleep(2).differentiable_loss(model, guide, x_of())


def test_a_guide_that_scores_only_what_it_drew_is_told_apart():
    flow = dist.transforms.Planar(2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(x, torch.ones(2)).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match=r'site "z".*apart from their draw.*Reparameterized\(\)'):
        bounds.IWAE(3, bounds.DoublyReparameterized()).differentiable_loss(model, guide, x)
    assert bounds.IWAE(3).differentiable_loss(model, guide, x).requires_grad


def test_free_bits_of_each_dimension_need_independent_ones():
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), encoders.FullRankNormal(3, 2, SMALL))
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r'site "z".*group_size=None'):
        bounds.ELBO(penalty=bounds.FreeBits(0.1)).loss(vae.model, vae.guide, x)
    assert math.isfinite(bounds.ELBO(penalty=bounds.FreeBits(0.1, group_size=None)).loss(vae.model, vae.guide, x))


def test_a_checkpoint_of_another_bound_is_refused(tmp_path):
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL))
    run = partial(
        fit, vae.model, vae.guide, torch.randn(20, 3), batch_size=10, checkpoint=tmp_path / "c", progress=False
    )
    run(epochs=1, loss=bounds.ELBO())
    with pytest.raises(ValueError, match=r"loss is IWAE\(num_particles=2.*, but the checkpoint was written with ELBO"):
        run(epochs=2, loss=bounds.IWAE(2), resume=True)
    with pytest.raises(ValueError, match=r"written with ELBO\("):
        run(epochs=2, loss=bounds.ELBO(2), resume=True)
