"""Estimators of the gradients of bounds: against quadrature, enumeration and closed forms, and against each other."""

import itertools
import math
from functools import partial

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from bound_cases import BOUNDS, BY_NAME
from helpers import FAILURE_RATE
from linear_gaussian import assert_mean, bottom_up, diagonal_vae, gradients, hierarchy, ladder, repeat, truth, vae_of
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyrovae import VAE, bounds, encoders, likelihoods, priors
from pyrovae.bounds import Coefficients, DoublyReparameterized
from pyrovae.bounds.gradients import leave_one_out
from pyrovae.nn import MLP, OneHotInput
from pyrovae.structures import DenseHierarchicalVAE, HierarchicalVAE, LadderVAE, SemiSupervisedVAE

EPS = torch.finfo(torch.float64).eps
ROUNDING = 1e5 * EPS  # as in test_bounds.py
SMALL = partial(MLP, hidden=(6,))

UNBIASED = [case for case in BOUNDS if case.unbiased and case.name != "VRMax"]
DOUBLY = [case for case in UNBIASED if case.reparameterized]


def gradient_of(bound: bounds.Bound, vae: torch.nn.Module, *args: Tensor) -> Tensor:
    return gradients(bound.differentiable_loss(vae.model, vae.guide, *args), vae)


def assert_same_mean(first: Tensor, second: Tensor) -> None:
    """Asserts that two samples ``(times, size)`` may have one mean: Welch's t test per entry, Bonferroni-corrected."""
    same = (first.std(0) == 0) & (second.std(0) == 0)
    assert torch.equal(first[0, same], second[0, same])
    p = scipy.stats.ttest_ind(first[:, ~same], second[:, ~same], equal_var=False).pvalue
    assert p.min() > FAILURE_RATE / len(p)


# Continuous latents.


@pytest.mark.parametrize("case", UNBIASED, ids=lambda case: case.name)
def test_gradients_have_the_mean_of_quadrature(case):
    # Two particles of one dimension: the bound is an integral over two standard normals, by Gauss-Hermite quadrature,
    # and its gradient is autograd's of that sum.
    vae, x = diagonal_vae(1, 3), torch.randn(4, 3, dtype=torch.float64)
    bound = case.build(2)
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    q = vae.encoder(x)
    z = q.mean + q.stddev * nodes.reshape(-1, 1, 1)  # (nodes, batch, 1)
    log_w = vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x) - q.log_prob(z)
    pairs = torch.stack(torch.broadcast_tensors(log_w.unsqueeze(0), log_w.unsqueeze(1)))
    value = torch.einsum("i,j,ijb->", weights, weights, bound.reduce(pairs).value)
    exact = gradients(-value, vae)
    assert_mean(repeat(lambda: gradient_of(bound, vae, x.repeat(100, 1)) / 100, 40), exact, FAILURE_RATE)


def flow_vae(encoder: type) -> VAE:
    q = encoder(3, 2, SMALL, num_transforms=1, num_features=3)
    return VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), q).double()


def vamp_vae() -> VAE:
    q = encoders.DiagonalNormal(3, 2, SMALL)
    return VAE(priors.VampPrior(q, 3, bounds=None), likelihoods.Normal(2, 3, SMALL), q).double()


def conditionals() -> dict:
    return {
        "prior": priors.StandardNormal(2),
        "conditionals": [encoders.DiagonalNormal(2, 2, SMALL)],
        "likelihood": likelihoods.Normal(2, 3, SMALL),
    }


def hierarchical_vae() -> HierarchicalVAE:
    qs = [encoders.DiagonalNormal(3, 2, SMALL), encoders.DiagonalNormal(2, 2, SMALL)]
    return HierarchicalVAE(**conditionals(), encoders=qs).double()


def ladder_vae() -> LadderVAE:
    qs, networks = [encoders.DiagonalNormal(4, 2, SMALL) for _ in range(2)], [MLP(3, 4, ()), MLP(4, 4, ())]
    return LadderVAE(**conditionals(), networks=networks, encoders=qs).double()


def dense_vae() -> DenseHierarchicalVAE:
    qs = [encoders.DiagonalNormal(3, 2, SMALL, context_dim=2), encoders.DiagonalNormal(3, 2, SMALL)]
    likelihood = likelihoods.Normal(4, 3, SMALL)
    return DenseHierarchicalVAE(**conditionals() | {"likelihood": likelihood}, encoders=qs).double()


PAIRS = {
    "spline flow": partial(flow_vae, encoders.NeuralSplineFlow),
    "inverse autoregressive flow": partial(flow_vae, encoders.InverseAutoregressiveFlow),
    "mixture": lambda: VAE(
        priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), encoders.GaussianMixture(3, 2, SMALL, 2)
    ).double(),
    "two levels, upwards": hierarchical_vae,
    "two levels, from the top": ladder_vae,
    "two levels, both seen": dense_vae,
    "VampPrior": vamp_vae,
}
PLAIN = {"IWAE-DReG": bounds.IWAE(4), "ELBO-STL": bounds.ELBO(4, closed_form=False), "MIWAE-DReG": bounds.MIWAE(4, 2)}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("pair", PAIRS)
def test_unbiased_gradients_have_the_mean_of_plain_ones(pair, name):
    vae = PAIRS[pair]()
    x = torch.randn(4, 3, dtype=torch.float64).repeat(50, 1)
    assert_same_mean(
        repeat(lambda: gradient_of(BY_NAME[name].build(4), vae, x), 25),
        repeat(lambda: gradient_of(PLAIN[name], vae, x), 25),
    )


class Single(DoublyReparameterized):
    """Sticking the landing for importance weights: biased, because the score function that it drops has a mean."""

    def coefficients(self, bound, log_w: Tensor) -> Coefficients:
        first = bound.reduce(log_w).first
        return Coefficients(model=first, path=first)


def test_the_tests_of_gradients_would_tell():
    vae = diagonal_vae(2, 3)
    x = torch.randn(4, 3, dtype=torch.float64).repeat(50, 1)
    with pytest.raises(AssertionError):
        assert_same_mean(
            repeat(lambda: gradient_of(bounds.IWAE(4, Single()), vae, x), 40),
            repeat(lambda: gradient_of(bounds.IWAE(4), vae, x), 40),
        )


def test_stratified_or_not_a_flow_is_scored_apart_from_its_cache():
    # A flow scores its own draw from a cache, with the graph of the draw; a detached latent must be scored without it.
    vae, x = flow_vae(encoders.InverseAutoregressiveFlow), torch.randn(5, 3, dtype=torch.float64)
    found = []
    for bound in (bounds.ELBO(gradient=bounds.StickingTheLanding()), bounds.ELBO()):
        pyro.set_rng_seed(1)
        found.append(bound.differentiable_loss(vae.model, vae.guide, x).item())
    assert found[0] == pytest.approx(found[1], abs=1e-9)  # of an inverse by iteration


@pytest.mark.parametrize("case", [case for case in BOUNDS if case.reparameterized], ids=lambda case: case.name)
def test_at_the_exact_posterior_the_guide_has_no_gradient(case):
    known = truth(2, 3)
    vae = vae_of(known)
    x = known.marginal().sample((8,))
    loss = case.build(4).differentiable_loss(vae.model, vae.guide, x)
    for gradient in torch.autograd.grad(loss, list(vae.encoder.parameters())):
        # A derivative of log weights by z is a difference of numbers near 10 / scale, times weights and inputs near 10.
        assert gradient.abs().max() < 100 * ROUNDING
    pyro.set_rng_seed(1)
    plain = bounds.IWAE(4).differentiable_loss(vae.model, vae.guide, x)
    assert max(g.abs().max() for g in torch.autograd.grad(plain, list(vae.encoder.parameters()))) > 0.01


@pytest.mark.parametrize("name", ["ELBO-STL", "IWAE-DReG"])
@pytest.mark.parametrize("make", [bottom_up, ladder])
def test_at_the_exact_posterior_of_a_hierarchy_the_guide_has_no_gradient(make, name):
    known = hierarchy()
    vae = make(known)
    x = known.of_z1().marginal().sample((8,))
    loss = BY_NAME[name].build(4).differentiable_loss(vae.model, vae.guide, x)
    # The ladder's guide has the conditional p(z1 | z2) of the model in it, which has a gradient as a part of the model.
    for gradient in torch.autograd.grad(loss, list(vae.encoders.parameters())):
        assert gradient.abs().max() < 1e3 * ROUNDING


def signal_to_noise(gradient, num_particles: int, size: int, at: tuple[float, float]) -> tuple[float, float, Tensor]:
    """Returns mean, its error, and the draws of the gradient by a guide's location, of a model of two normals in 1-D.

    p(z) = N(0, 1), p(x | z) = N(z, 1), x = 1: the posterior is N(1/2, 1/2). Each datum has its own location, so that
    one run gives as many independent draws of the gradient as there are data.
    """
    loc = torch.full((size,), at[0]).double().requires_grad_()
    x = torch.ones(size).double()

    def model(x):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(loc, at[1]))

    bound = bounds.IWAE(num_particles, gradient)
    (draws,) = torch.autograd.grad(bound.differentiable_loss(model, guide, x), loc)
    return draws.mean().item(), draws.std().item() / math.sqrt(size), draws


def test_the_signal_of_the_plain_gradient_drowns_and_that_of_dreg_does_not():
    # Rainforth et al.: with K particles the signal-to-noise ratio of the plain gradient of the guide falls as K^(-1/2);
    # Tucker et al.: that of DReG grows as K^(1/2). The mean, one for both, is taken from DReG, where it is far more
    # precise. The guide is near the posterior, where the rates begin early.
    particles = [1, 3, 10, 30, 100, 300, 1000]
    at, size = (0.55, 0.75), 2000
    plain, doubly, errors_plain, errors_doubly = [], [], [], []
    for k in particles:
        mean, error, draws = signal_to_noise(DoublyReparameterized(), k, size, at)
        _, _, noisy = signal_to_noise(None, k, size, at)

        # The relative error of a standard deviation, from the fourth moment, and that of the mean.
        def relative(d: Tensor) -> float:
            z = (d - d.mean()) / d.std()
            return math.sqrt(((z**4).mean().item() - 1) / (4 * size))

        doubly.append(math.log(abs(mean) / draws.std().item()))
        plain.append(math.log(abs(mean) / noisy.std().item()))
        errors_doubly.append(math.hypot(error / mean, relative(draws)))
        errors_plain.append(math.hypot(error / mean, relative(noisy)))
    for logs, errors, expected in ((plain, errors_plain, -0.5), (doubly, errors_doubly, 0.5)):
        slope, error = slope_of([math.log(k) for k in particles], logs, errors)
        low, high = slope - 3 * error, slope + 3 * error
        assert expected - 0.05 < low < high < expected + 0.05


class GroupedForTheGuide(bounds.ImportanceBound):
    """PIWAE with two groups, written as a user would."""

    def reduce(self, log_w: Tensor) -> bounds.Reduced:
        return bounds.MIWAE(self.num_particles, 2).reduce(log_w)

    def reduce_model(self, log_w: Tensor) -> bounds.Reduced:
        return bounds.power_mean(log_w, 1.0)


def test_a_bound_with_two_functions_trains_model_and_guide_by_one_each():
    known = truth(2, 3)
    vae, x = vae_of(known, widen=1.4), known.marginal().sample((5,))
    found = []
    for bound in (GroupedForTheGuide(4), bounds.PIWAE(4, 2), bounds.IWAE(4)):
        pyro.set_rng_seed(0)
        found.append(gradient_of(bound, vae, x))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])  # so that one function for both would show


def slope_of(x: list[float], y: list[float], errors: list[float]) -> tuple[float, float]:
    """Returns the slope of a weighted least-squares line, and its standard error from those of the points."""
    weights = 1 / np.square(errors)
    x, y = np.asarray(x), np.asarray(y)
    center = (weights * x).sum() / weights.sum()
    spread = (weights * (x - center) ** 2).sum()
    return (weights * (x - center) * y).sum() / spread, 1 / math.sqrt(spread)


# Gradients of limits in many particles.


def test_the_gradient_of_the_chi_bound_has_the_limit_of_the_closed_form():
    known = truth(2, 3)
    vae = vae_of(known, widen=1.3, shift=0.3)
    x = known.marginal().sample((3,))
    q = vae.encoder(x)
    limit = known.log_chernoff(x, MultivariateNormal(q.loc, scale_tril=q.scale_tril), 2.0).sum() / 2
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(limit, list(vae.encoder.parameters()))])
    for name in ("CUBO", "CUBO-DReG"):
        bound = BY_NAME[name].build(2000)

        def draw(bound=bound) -> Tensor:
            loss = bound.differentiable_loss(vae.model, vae.guide, x)
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(vae.encoder.parameters()))])

        # Self-normalised weights have a bias of order 1 / K, a small part of the error of 30 times K particles.
        assert_mean(repeat(draw, 30), exact, FAILURE_RATE)


@pytest.mark.parametrize("name", ["TVO", "TVO-DReG", "TVO-covariance"])
def test_the_gradient_of_the_thermodynamic_objective_has_the_limit_of_the_closed_form(name):
    known = truth(2, 3)
    vae = vae_of(known, widen=1.3, shift=0.3)
    x = known.marginal().sample((3,))
    bound = BY_NAME[name].build(2000)
    q = vae.encoder(x)
    q = MultivariateNormal(q.loc, scale_tril=q.scale_tril)
    total = 0.0
    for beta, length in zip(bound.betas, bound.lengths, strict=True):
        beta = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
        # E log w under pi_beta, less log p(x), is the derivative of log E_q[(w / p(x))^beta].
        (mean,) = torch.autograd.grad(known.log_chernoff(x, q, beta).sum(), beta, create_graph=True)
        total = total + length * mean
    parameters = list(vae.encoder.parameters())
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(-total, parameters)])

    def draw() -> Tensor:
        loss = bound.differentiable_loss(vae.model, vae.guide, x)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    assert_mean(repeat(draw, 30), exact, FAILURE_RATE)


# Discrete latents.


CLASSES, PIXELS = 3, 3


def discrete_vae() -> VAE:
    """Two latents of three classes, so that there are nine values, and three pixels with eight."""
    reads = partial(OneHotInput, num_classes=CLASSES, network=SMALL)
    return VAE(
        priors.Categorical(2, CLASSES),
        likelihoods.Bernoulli(2, PIXELS, reads),
        encoders.Categorical(PIXELS, 2, SMALL, num_classes=CLASSES),
    ).double()


def all_latents() -> Tensor:
    return torch.tensor(list(itertools.product(range(CLASSES), repeat=2)))


def joint_table(vae: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log p(x, z) and log q(z | x) of all nine latents, each ``(9, batch)``, apart from Pyro's traces."""
    z = all_latents().unsqueeze(1).expand(-1, len(x), -1)
    return vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x), vae.encoder(x).log_prob(z)


DISCRETE = [case for case in UNBIASED if not case.reparameterized]


@pytest.mark.parametrize("case", DISCRETE, ids=lambda case: case.name)
def test_gradients_of_discrete_latents_have_the_mean_of_enumeration(case):
    # VIMCO, REINFORCE leave-one-out and their like: over all 81 pairs of particles.
    vae = discrete_vae()
    x = torch.bernoulli(torch.full((4, PIXELS), 0.5)).double()
    bound = case.build(2)
    log_p, log_q = joint_table(vae, x)
    log_w = log_p - log_q
    pairs = torch.stack(torch.broadcast_tensors(log_w.unsqueeze(0), log_w.unsqueeze(1)))
    probability = (log_q.unsqueeze(0) + log_q.unsqueeze(1)).exp()
    exact = gradients(-(probability * bound.reduce(pairs).value).sum(), vae)
    assert_mean(repeat(lambda: gradient_of(bound, vae, x.repeat(100, 1)) / 100, 60), exact, FAILURE_RATE)


@pytest.mark.parametrize(("wake", "sleep"), [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_reweighted_wake_sleep_has_the_mean_of_enumeration(wake, sleep):
    vae = discrete_vae()
    x = torch.bernoulli(torch.full((4, PIXELS), 0.5)).double()
    log_p, log_q = joint_table(vae, x)
    log_w = (log_p - log_q).detach()
    pairs = torch.stack(torch.broadcast_tensors(log_w.unsqueeze(0), log_w.unsqueeze(1)))
    probability = (log_q.unsqueeze(0) + log_q.unsqueeze(1)).exp().detach()
    shares = probability * pairs.softmax(0)  # of the first and of the second of two particles
    # Entry [i, j] holds the pair (log_w[j], log_w[i]): the first particle's share belongs to latent j.
    of_each = shares[0].sum(0) + shares[1].sum(1)
    every_x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=PIXELS)), dtype=torch.float64)
    dreamt_p, dreamt_q = joint_table(vae, every_x)
    dream = len(x) * (dreamt_p.exp().detach() * dreamt_q).sum()
    exact = gradients(-(of_each * (log_p + wake * log_q)).sum() - sleep * dream, vae)
    bound = bounds.ReweightedWakeSleep(2, wake, sleep)
    assert_mean(repeat(lambda: gradient_of(bound, vae, x.repeat(100, 1)) / 100, 60), exact, FAILURE_RATE)


@pytest.mark.parametrize("name", ["ELBO", "ELBO-draws", "IWAE"])
def test_a_class_and_a_normal_latent_have_the_mean_of_enumeration_and_quadrature(name):
    # The class by leave-one-out score functions, the normal latent below it by its path. Quadrature wants no kinks.
    smooth = partial(MLP, hidden=(6,), activation=torch.nn.Tanh)
    vae = SemiSupervisedVAE(
        prior=priors.StandardNormal(1),
        likelihood=likelihoods.Normal(1, 3, smooth, context_dim=2),
        encoder=encoders.DiagonalNormal(3, 1, smooth, context_dim=2),
        classifier=smooth,
        num_classes=2,
    ).double()
    x = torch.randn(3, 3, dtype=torch.float64)
    bound = BY_NAME[name].build(2)
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    log_w, probability = [], []
    for y in range(2):
        context = torch.eye(2, dtype=torch.float64)[y].expand(3, 2)
        q = vae.encoder(x, context)
        z = q.mean + q.stddev * nodes.reshape(-1, 1, 1)
        log_q_y = vae.classify(x).logits.log_softmax(-1)[:, y]
        log_p = math.log(0.5) + vae.prior().log_prob(z) + vae.likelihood(z, context.expand(len(z), 3, 2)).log_prob(x)
        log_w.append(log_p - q.log_prob(z) - log_q_y)
        probability.append(weights.unsqueeze(1) * log_q_y.exp())
    log_w, probability = torch.cat(log_w), torch.cat(probability)
    pairs = torch.stack(torch.broadcast_tensors(log_w.unsqueeze(0), log_w.unsqueeze(1)))
    value = (probability.unsqueeze(0) * probability.unsqueeze(1) * bound.reduce(pairs).value).sum()
    exact = gradients(-value, vae)
    assert_mean(repeat(lambda: gradient_of(bound, vae, x.repeat(100, 1)) / 100, 60), exact, FAILURE_RATE)


def test_leave_one_out_baselines_quieten_the_score_function():
    # With the bound itself as the signal the variance is many times as large; with weights all alike there is none.
    bound, log_w = bounds.IWAE(8), torch.randn(8, 1000, dtype=torch.float64) - 30
    signal = leave_one_out(bound, log_w)
    assert signal.square().mean() < 0.01 * bound.reduce(log_w).value.square().mean()
    assert leave_one_out(bound, torch.full((8, 3), -30.0)).abs().max() < 1e-5
    each = []
    for k in range(8):
        others = torch.cat([log_w[:k], log_w[k + 1 :]])
        replaced = torch.cat([others, others.mean(0, keepdim=True)])
        each.append(log_w.logsumexp(0) - replaced.logsumexp(0))
    torch.testing.assert_close(signal, torch.stack(each), rtol=0, atol=1e3 * EPS)
    # Of a linear function it has a short form.
    linear = leave_one_out(bounds.ELBO(8), log_w)
    others = (log_w.sum(0) - log_w) / 7
    torch.testing.assert_close(linear, (log_w - others) / 8, rtol=0, atol=1e3 * EPS)


def test_baselines_count_no_particle_that_is_impossible():
    log_w = torch.tensor([[0.0, 1.0, 3.0], [-math.inf, 0.0, -math.inf], [-math.inf, -math.inf, 2.0]]).double()
    signal = leave_one_out(bounds.IWAE(3), log_w)
    assert torch.isfinite(signal).all()
    # Without the only particle that is possible there is no baseline; without an impossible one it is the others' mean.
    values = bounds.IWAE(3).reduce(log_w).value
    assert signal[0, 0] == values[0]
    alone = bounds.IWAE(3).reduce(torch.tensor([3.0, 2.5, 2.0]).double()).value
    torch.testing.assert_close(signal[1, 2], values[2] - alone, rtol=0, atol=10 * EPS)


def outside_pair():
    """Local binary latents whose sum is observed outside the plate, and a shared binary latent drawn first."""
    logits = torch.tensor([0.3, -0.5]).double().requires_grad_()
    shared = torch.tensor(0.4).double().requires_grad_()

    def model(x):
        g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.3).double()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.6).double()))
            pyro.sample("x", dist.Normal(z + g, 1.0), obs=x)
        pyro.sample("sum", dist.Normal(2.0 * z.sum(-1, keepdim=True), 1.0), obs=torch.tensor(3.0).double())

    def guide(x):
        pyro.sample("g", dist.Bernoulli(logits=shared))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    return model, guide, [logits, shared]


@pytest.mark.parametrize("closed_form", [True, False])
def test_what_belongs_to_no_datum_is_heard_by_all(closed_form):
    model, guide, parameters = outside_pair()
    x = torch.tensor([0.5, -1.0]).double()
    # All eight values of the shared latent and the two local ones.
    values = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3))).double()
    g, z = values[:, 0], values[:, 1:]
    logits, shared = parameters
    log_q = dist.Bernoulli(logits=shared).log_prob(g) + dist.Bernoulli(logits=logits).log_prob(z).sum(-1)
    log_p = dist.Bernoulli(torch.tensor(0.3).double()).log_prob(g)
    log_p = log_p + dist.Bernoulli(torch.tensor(0.6).double()).log_prob(z).sum(-1)
    log_p = log_p + dist.Normal(z + g.unsqueeze(-1), 1.0).log_prob(x).sum(-1)
    log_p = log_p + dist.Normal(2 * z.sum(-1), 1.0).log_prob(torch.tensor(3.0).double())
    exact = -(log_q.exp() * (log_p - log_q)).sum()
    expected = torch.cat([exact.reshape(1), *(t.reshape(-1) for t in torch.autograd.grad(exact, parameters))])
    bound = bounds.ELBO(200, closed_form=closed_form)

    def draw() -> Tensor:
        terms = bound.terms(model, guide, x)
        found = torch.autograd.grad(terms.loss, parameters)
        assert terms.bound == pytest.approx(-terms.loss.item(), abs=ROUNDING)
        assert terms.bound == pytest.approx((terms.reconstruction - sum(terms.kl.values())).item(), abs=ROUNDING)
        return torch.cat([terms.loss.detach().reshape(1), *(t.reshape(-1) for t in found)])

    assert_mean(repeat(draw, 100), expected, FAILURE_RATE)


def test_a_shared_latent_that_is_drawn_after_local_classes_is_refused():
    logits = torch.zeros(2).double().requires_grad_()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.6).double()))
        pyro.sample("g", dist.Normal(z.sum(-1, keepdim=True), 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits))
        pyro.sample("g", dist.Normal(torch.tensor(0.0).double(), 1.0))

    with pytest.raises(ValueError, match=r'outside the data plate is drawn after site "z".*first'):
        bounds.ELBO(2).differentiable_loss(model, guide, torch.zeros(2))


def test_the_sleep_phase_dreams_of_a_subsampled_plate():
    # The plate hands out the rows it was given; a dream's rows are those that were dreamt.
    vae = discrete_vae()
    x = torch.bernoulli(torch.full((4, PIXELS), 0.5)).double()

    def model(x):
        with pyro.plate("data", 8, subsample=x) as rows:
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.likelihood(z), obs=rows)

    def guide(x):
        with pyro.plate("data", 8, subsample=x) as rows:
            pyro.sample("z", vae.encoder(rows))

    every_x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=PIXELS)), dtype=torch.float64)
    dreamt_p, dreamt_q = joint_table(vae, every_x)
    exact = -8 * (dreamt_p.exp().detach() * dreamt_q).sum()
    parameters = list(vae.encoder.parameters())
    exact = torch.cat([t.flatten() for t in torch.autograd.grad(exact, parameters)])
    bound = bounds.ReweightedWakeSleep(2, wake=0.0, sleep=1.0)

    def draw() -> Tensor:
        loss = bound.differentiable_loss(model, guide, x)
        return torch.cat([t.flatten() for t in torch.autograd.grad(loss, parameters)])

    # Plain pairs, with x as it is observed: the model observes the plate's rows, which are the argument itself.
    assert_mean(repeat(draw, 400), exact, FAILURE_RATE)


def test_stratified_particles_are_for_the_elbo_alone():
    q = encoders.GaussianMixture(3, 2, SMALL, 2, stratified=True)
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), q).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    for bound in (bounds.IWAE(4), bounds.IWAE(4, DoublyReparameterized()), bounds.PIWAE(4, 2)):
        with pytest.raises(ValueError, match=r'site "z" of the guide are stratified.*bounds\.ELBO'):
            bound.differentiable_loss(vae.model, vae.guide, x)
    vae.encoder.stratified = False
    plain = repeat(lambda: gradient_of(bounds.ELBO(4), vae, x.repeat(50, 1)), 40)
    vae.encoder.stratified = True
    assert_same_mean(repeat(lambda: gradient_of(bounds.ELBO(4), vae, x.repeat(50, 1)), 40), plain)


def test_an_impossible_particle_does_no_harm():
    # Two of four latents cannot give the data: their log weight is minus infinity, and their weight zero.
    chances = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(4).double()))
            pyro.sample("x", dist.Categorical(logits=chances.log()[z]), obs=x)

    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits))

    x = torch.ones(400, dtype=torch.long)  # z = 1 or 2
    loss = bounds.ReweightedWakeSleep(20).differentiable_loss(model, guide, x)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(gradient).all()
    assert (gradient[[1, 2]] < 0).all()
    assert (gradient[[0, 3]] > 0).all()
