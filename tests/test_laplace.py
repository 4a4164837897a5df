"""Laplace's approximation as a proposal: exact where posteriors are normal, right where quadrature tells."""

import math
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

from pyrovae import VAE, encoders, likelihoods, log_marginal, priors
from pyrovae.estimators import (
    AnnealedImportanceSampling,
    Enumeration,
    Guide,
    ImportanceSampling,
    Laplace,
    Mixed,
    Quadrature,
    newton,
)
from pyrovae.estimators.task import open_task
from pyrovae.nn import MLP

ROUNDING = 1e-6  # of sums of tens of terms in double precision, under a Newton step from afar
QUADRATURE = 1e-3  # nats: four times the change of the quadrature from 10,000 points to 40,000
ERRORS = 5  # standard errors: one test in a million fails by chance, were the weights' mean normal


def score(model, guide, x, proposal=None, num_samples=2000, method=None):
    method = ImportanceSampling(num_samples, proposal or Laplace()) if method is None else method
    return log_marginal(model, guide, x, method=method, progress=False)


class Linear:
    """x = W (a, b) + noise, with b below a, and an encoder that knows nothing."""

    def __init__(self):
        self.w = torch.randn(3, 5).double()
        self.x = torch.randn(7, 3).double() @ self.w + 0.5 * torch.randn(7, 5).double()

    def model(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a.sum(-1), 1.0))
            mean = torch.cat([a, b.unsqueeze(-1)], dim=-1) @ self.w
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(torch.zeros(len(x), 2).double(), 1.0).to_event(1))
            pyro.sample("b", dist.Normal(torch.zeros(len(x)).double(), 1.0))

    def truth(self):
        mix = torch.eye(3).double()
        mix[2, :2] = 1
        covariance = self.w.T @ mix @ mix.T @ self.w + 0.25 * torch.eye(5).double()
        return dist.MultivariateNormal(torch.zeros(5).double(), covariance).log_prob(self.x)


@pytest.mark.parametrize("memory", [64e6, 1.0], ids=["at once", "row by row"])
def test_weights_are_constant_under_a_normal_posterior(memory):
    pair = Linear()
    method = ImportanceSampling(50, Laplace(scale=1.0))
    found = log_marginal(pair.model, pair.guide, pair.x, method=method, max_memory=memory, progress=False)
    torch.testing.assert_close(found.value, pair.truth(), rtol=0, atol=ROUNDING)
    assert found.standard_error.max() < ROUNDING


def test_no_datum_is_fitted_alone():
    pair = Linear()
    sizes = []

    def model(x):
        sizes.append(len(x))
        pair.model(x)

    method = ImportanceSampling(50, Laplace(scale=1.0))
    log_marginal(model, pair.guide, pair.x, method=method, max_memory=1.0, progress=False)
    assert min(sizes) == 2  # some models squeeze a single row away


@pytest.mark.parametrize(
    "proposal",
    [Laplace(), Laplace(degrees=10.0), Laplace(num_starts=3), Mixed([Laplace(), Guide()])],
    ids=["pilots", "Student t", "starts", "mixed"],
)
def test_scores_are_right_under_every_proposal(proposal):
    pair = Linear()
    found = score(pair.model, pair.guide, pair.x, proposal)
    assert ((found.value - pair.truth()).abs() < ERRORS * found.standard_error).all()
    assert found.trusted.all()


class Wide:
    """More latents than an exact curvature is computed for, of unequal spread, and few numbers in a datum."""

    def __init__(self, latents=500, numbers=30, data=6):
        self.w = torch.randn(latents, numbers).double() / 5
        self.spread = 0.5 + torch.rand(latents).double()
        z = self.spread * torch.randn(data, latents).double()
        self.x = z @ self.w + 0.5 * torch.randn(data, numbers).double()

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), len(self.w)).double(), self.spread).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), len(self.w)).double(), 1.0).to_event(1))

    def truth(self):
        covariance = (self.w.T * self.spread.square()) @ self.w + 0.25 * torch.eye(len(self.w.T)).double()
        return dist.MultivariateNormal(torch.zeros(len(covariance)).double(), covariance).log_prob(self.x)


def test_many_latents_have_a_curvature_of_low_rank(monkeypatch):
    pair, exact = Wide(), newton._positive
    with monkeypatch.context() as patch:
        patch.setattr(newton, "_positive", None)  # all second derivatives are never computed
        found = score(pair.model, pair.guide, pair.x, Laplace(scale=1.0), num_samples=50)
        torch.testing.assert_close(found.value, pair.truth(), rtol=0, atol=ROUNDING)
        assert found.standard_error.max() < ROUNDING
        found = score(pair.model, pair.guide, pair.x)
        assert ((found.value - pair.truth()).abs() < ERRORS * found.standard_error).all()
        assert found.trusted.all()
    # As many numbers as latents: the rank is not low.
    pair, used = Wide(310, 310, 2), []
    monkeypatch.setattr(newton, "_positive", lambda hessian: used.append(len(hessian)) or exact(hessian))
    found = score(pair.model, pair.guide, pair.x, Laplace(scale=1.0, num_starts=1), num_samples=50)
    torch.testing.assert_close(found.value, pair.truth(), rtol=0, atol=ROUNDING)
    assert used


def test_second_derivatives_are_few(monkeypatch):
    smooth = partial(MLP, hidden=(20,), activation=nn.Tanh)
    likelihood = likelihoods.Bernoulli(4, 30, smooth)
    vae = VAE(priors.StandardNormal(4), likelihood, encoders.DiagonalNormal(30, 4)).double()
    for p in vae.likelihood.parameters():
        nn.init.normal_(p, std=0.7)
    x, starts = vae.sample(20), 3
    with open_task(vae.model, vae.guide, ImportanceSampling(1), (x,), {}, 64e6, progress=False) as task:
        u = torch.randn(starts, 20, 4).double()
        counts = []
        exact = newton.derivatives
        monkeypatch.setattr(newton, "derivatives", lambda target, u: counts.append(u.shape[1]) or exact(target, u))
        ends = newton.climb(task, u, 50)
        gradient, curvature = exact(newton.joint_of(task), ends.u)
    assert (gradient * curvature.solve(gradient, torch.zeros(starts, 20).double())).sum(-1).max() < 1e-5
    assert sum(counts) <= 4 * 20  # of the data, for all starts; by damped Newton steps alone, ten and more


def test_quasi_newton_updates_satisfy_the_secant_equation():
    a = torch.randn(5, 3, 3).double()
    inverse = a @ a.mT + torch.eye(3)
    step, change = torch.randn(2, 5, 3).double()
    change[::2] = change[::2] * (step * change).sum(-1, keepdim=True).sign()[::2]
    is_concave = (step * change).sum(-1) > 0
    found = newton._corrected(inverse, step, change)
    torch.testing.assert_close((found @ change.unsqueeze(-1)).squeeze(-1)[is_concave], step[is_concave])
    assert (torch.linalg.eigvalsh(found) > 0).all()
    torch.testing.assert_close(found[~is_concave], inverse[~is_concave], rtol=0, atol=0)


def test_annealing_starts_from_it():
    pair = Linear()
    method = AnnealedImportanceSampling(num_samples=8, num_temperatures=5, start=Laplace(scale=1.0))
    found = score(pair.model, pair.guide, pair.x, method=method)
    torch.testing.assert_close(found.value, pair.truth(), rtol=0, atol=ROUNDING)


def test_a_nonlinear_decoder_is_that_of_quadrature():
    vae = VAE(priors.StandardNormal(2), likelihoods.Bernoulli(2, 12), encoders.DiagonalNormal(12, 2)).double()
    for p in vae.likelihood.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.bernoulli(torch.full((10, 12), 0.5)).double()
    truth = score(vae.model, vae.guide, x, method=Quadrature(10_000)).value
    found = score(vae.model, vae.guide, x, Laplace(num_starts=4), num_samples=5000)
    off = (found.value - truth).abs() > ERRORS * found.standard_error + QUADRATURE
    assert not (off & found.trusted).any()
    assert found.trusted.sum() >= 8


def positive(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.full((len(x),), 3.0).double(), 2.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def rough(x):
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.LogNormal(torch.zeros(len(x)).double(), 1.0))


def test_positive_latents_have_their_closed_form():
    x = torch.arange(6).double()
    truth = dist.GammaPoisson(torch.tensor(3.0).double(), 2.0).log_prob(x)
    found = score(positive, rough, x, num_samples=4000)
    assert ((found.value - truth).abs() < ERRORS * found.standard_error).all()
    assert found.trusted.all()


def words(x):
    with pyro.plate("data", len(x), dim=-2):
        common = pyro.sample("common", dist.Normal(torch.zeros(len(x), 1).double(), 1.0))
        with pyro.plate("words", x.shape[1], dim=-1):
            own = pyro.sample("own", dist.Normal(common, torch.ones(x.shape).double()))
            pyro.sample("x", dist.Normal(own, 0.5), obs=x)


def guess(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("common", dist.Normal(torch.zeros(len(x), 1).double(), 1.0))
        with pyro.plate("words", x.shape[1], dim=-1):
            pyro.sample("own", dist.Normal(torch.zeros(x.shape).double(), 1.0))


def test_plates_within_a_datum():
    x = torch.randn(5, 4).double()
    covariance = torch.ones(4, 4).double() + 1.25 * torch.eye(4).double()
    truth = dist.MultivariateNormal(torch.zeros(4).double(), covariance).log_prob(x)
    found = score(words, guess, x, Laplace(scale=1.0), num_samples=50)
    torch.testing.assert_close(found.value, truth, rtol=0, atol=ROUNDING)


def two_sides(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 3.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.1), obs=x)


def one_side(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.5))


TWO_SIDES = torch.tensor([2.0, 3.0, 2.5]).double()


def truth_of_two_sides(x):
    return math.log(2) + dist.Normal(torch.zeros(1).double(), math.sqrt(9.01)).log_prob(x)


@pytest.mark.parametrize(
    "method",
    [
        ImportanceSampling(4000, Laplace()),
        ImportanceSampling(4000, Laplace(degrees=8.0)),
        ImportanceSampling(4000, Laplace(scale=1.1)),
        ImportanceSampling(4000, Mixed([Laplace(), Guide()])),
        AnnealedImportanceSampling(200, 20, start=Laplace()),
    ],
    ids=["normal", "Student t", "given scale", "mixed", "annealing"],
)
def test_two_modes_are_found_though_the_guide_knows_one(method):
    found = score(two_sides, one_side, TWO_SIDES, method=method)
    truth = truth_of_two_sides(TWO_SIDES)
    assert ((found.value - truth).abs() < ERRORS * found.standard_error + ROUNDING).all()
    assert (found.standard_error < 0.2).all()
    # Hamiltonian moves that suit the spread of both modes are too long for either: the value is right, not its trust.
    assert found.trusted.all() or isinstance(method, AnnealedImportanceSampling)


def test_a_single_start_finds_one_mode():
    found = score(two_sides, one_side, TWO_SIDES, Laplace(num_starts=1), num_samples=4000)
    # Half the mass is out of reach: k-hat cannot tell, and the value is log 2 too low.
    missed = torch.full((3,), math.log(2)).double()
    torch.testing.assert_close(truth_of_two_sides(TWO_SIDES) - found.value, missed, rtol=0, atol=0.02)


def both_sides(x):
    with pyro.plate("data", len(x)):
        sides = dist.Categorical(torch.ones(len(x), 2).double())
        means = torch.stack([x, -x], dim=-1)
        pyro.sample("z", dist.MixtureSameFamily(sides, dist.Normal(means, 0.15 * torch.ones_like(means))))


@pytest.mark.parametrize("guide", [both_sides, one_side], ids=["by the guide", "by the prior"])
def test_a_mode_that_the_guide_or_the_prior_knows_is_not_missed_in_silence(guide):
    # With 20,000 draws, a tenth of them from the guide, or from the prior, see a mode of half the mass.
    found = score(two_sides, guide, TWO_SIDES, Laplace(num_starts=1), num_samples=20_000)
    assert not found.trusted.any()
    assert found.diagnostics["missed"].all()
    assert "modes are missed: the guide or the prior found more of p(x) for 3 data" in str(found)
    right = score(two_sides, guide, TWO_SIDES, num_samples=20_000)
    assert right.trusted.all()
    assert not right.diagnostics["missed"].any()


def test_a_comparison_with_the_guide_and_the_prior_changes_no_other_result():
    pyro.set_rng_seed(1)
    state = torch.get_rng_state()
    found = score(two_sides, one_side, TWO_SIDES, num_samples=100)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Laplace, "finds_modes", False)
        alone = score(two_sides, one_side, TWO_SIDES, num_samples=100)
    assert torch.equal(found.value, alone.value)
    assert torch.equal(after, torch.get_rng_state())


def corners(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros(len(x), 2).double(), 2.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.5 * a[..., 0], 1.0))
        mean = torch.stack([a[..., 0].square(), a[..., 1].square(), a[..., 0] * b], dim=-1)
        pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)


def nowhere(x):
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Normal(torch.ones(len(x), 2).double(), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(torch.ones(len(x)).double(), 1.0))


def test_four_modes_of_two_sites_are_those_of_quadrature():
    x = torch.tensor([[4.0, 3.0, 2.0], [5.0, 6.0, 1.0], [0.1, 4.0, 0.0]]).double()  # the last: two long ridges
    found = score(corners, nowhere, x, num_samples=20_000)
    truth = score(corners, nowhere, x, method=Quadrature(1_000_000)).value
    off = (found.value - truth).abs() > ERRORS * found.standard_error + QUADRATURE
    assert not (off & found.trusted).any()
    assert found.trusted[:2].all()


def test_other_data_of_a_part_get_more_starts():
    # Of 40 data, a single start from the prior would miss the second mode of half of them.
    x = 1.5 + torch.rand(40).double()
    found = score(two_sides, one_side, x, num_samples=1000)
    low = found.value < truth_of_two_sides(x) - 0.5
    assert low.sum() <= 3  # each is missed by chance one time in 2^7: four or more of 40 one time in 3,000


def runaway(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.StudentT(torch.ones(len(x)).double()))
        pyro.sample("x", dist.Normal(0.0, (-0.5 * z.square()).exp()), obs=x)


def wide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 1.0))


def test_an_unbounded_density_is_not_trusted():
    # At x = 0 the density rises without end in z: the integral over z does not exist.
    found = score(runaway, wide, torch.zeros(3).double())
    assert not found.trusted.any()


def coin(x):
    with pyro.plate("data", len(x)):
        side = pyro.sample("side", dist.Bernoulli(torch.full((len(x),), 0.3)))
        pyro.sample("x", dist.Normal(side, 1.0), obs=x)


def toss(x):
    with pyro.plate("data", len(x)):
        pyro.sample("side", dist.Bernoulli(torch.full((len(x),), 0.5)))


def heavy_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Cauchy(torch.zeros(len(x)).double(), 1.0))
        pyro.sample("x", dist.StudentT(3.0, z, 1.0), obs=x)


def heavy_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 2.0))


def test_modes_far_out_are_found_under_heavy_tails():
    """One mode at zero and one at x, of equal heights, and nearly no mass between them."""
    x = torch.tensor([100.0, -1000.0, 3.0, 0.0]).double()
    t = torch.linspace(-17, 17, 200_001).double()  # z = sinh(t), to 12 million
    log_f = dist.Cauchy(0.0, 1.0).log_prob(t.sinh()) + dist.StudentT(3.0, t.sinh().unsqueeze(-1), 1.0).log_prob(x).T
    exact = (log_f + t.cosh().log()).logsumexp(-1) + math.log(t[1] - t[0])
    guide = score(heavy_model, heavy_guide, x, Guide())
    assert (guide.value - exact)[0] < -4  # its draws miss the mode at 100
    # Weights of a normal under heavy tails have infinite variance: those of Cauchy's tails are bounded.
    found = score(heavy_model, heavy_guide, x, Laplace(degrees=1.0), 20_000)
    error = (found.value - exact).abs()
    assert found.trusted.all()
    assert (error < ERRORS * found.standard_error).all(), error / found.standard_error
    assert (found.standard_error < 0.05).all()


def test_discrete_latents_are_refused():
    x = torch.zeros(2)
    assert score(coin, toss, x, method=Enumeration()).value.isfinite().all()
    with pytest.raises(ValueError, match=r"discrete, and gradients cannot move them"):
        score(coin, toss, x)


@pytest.mark.parametrize("name", ["num_starts", "num_steps", "num_pilots", "scale", "degrees"])
def test_arguments_are_checked(name):
    with pytest.raises(ValueError, match=name):
        Laplace(**{name: 0})


@pytest.mark.parametrize("x", [torch.full((40,), 5.0), torch.linspace(3.0, 5.0, 60)], ids=["equal", "different"])
def test_modes_of_some_data_are_found_for_all(x):
    x = x.double()

    def model(x):  # one of two latents is seen, and the prior seldom comes near the second mode
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.tensor(2.0).double(), 1.0))
            b = pyro.sample("b", dist.Normal(torch.tensor(-1.0).double(), 2.0))
            seen = dist.Normal(torch.stack([a, b], dim=-1), 0.1)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6]).double()), seen), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(torch.tensor(2.0).double(), 1.0))
            pyro.sample("b", dist.Normal(torch.tensor(-1.0).double(), 2.0))

    each = [math.log(p) + dist.Normal(loc, var**0.5).log_prob(x) for p, loc, var in ((0.4, 2, 1.01), (0.6, -1, 4.01))]
    found = score(model, guide, x, num_samples=4000)
    assert found.trusted.float().mean() > 0.9
    off = found.value - torch.stack(each).logsumexp(0)
    assert (off.abs() < ERRORS * found.standard_error)[found.trusted].all()
