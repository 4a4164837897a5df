"""Posterior checks, calibration and reliability, on models whose posterior is known."""

import json
import math
from dataclasses import replace
from functools import cache, partial

import pyro
import pytest
import scipy.stats
import torch
from linear_gaussian import Truth, assert_fraction, assert_mean, repeat, truth, vae_of
from matplotlib.figure import Figure
from pyro import distributions as dist

from pyrovae import VAE, encoders, likelihoods, log_marginal, nn, priors, structures
from pyrovae.diagnostics import Reliability, calibration, posterior_check, reliability
from pyrovae.diagnostics.calibration import _holm, _polynomials

QUICK = {"num_data": 1, "num_samples": 100, "warmup_steps": 40, "progress": False}
LONGER = {"num_data": 1, "num_samples": 200, "warmup_steps": 60, "progress": False}


def known() -> Truth:
    return truth(latent_dim=2, x_dim=3, scale=1.0)


def widths(diagnosis) -> int:
    return max(map(len, str(diagnosis).splitlines()))


def draw_and_sum_up(diagnosis) -> dict:
    """Asserts what every diagnosis must do, and returns its summary as JSON gives it back."""
    assert isinstance(diagnosis.plot(), Figure)
    assert widths(diagnosis) <= 80
    assert "\n" not in diagnosis.verdict
    assert str(diagnosis).replace("\n", " ").endswith(diagnosis.verdict)
    return json.loads(json.dumps(diagnosis.summary(), allow_nan=False))


@cache
def exact_check():
    """A check of the exact posterior, with the truth and the data; chains take long, so that tests share it."""
    pyro.set_rng_seed(0)
    # Latents that hang together a little, so that short chains do.
    weight = torch.tensor([[1.0, 0.3], [0.0, 1.0], [0.5, -0.5]]).double()
    model = Truth(weight, torch.randn(3).double(), scale=1.0)
    x, vae = model.marginal().sample((3,)), vae_of(model)
    return model, x, posterior_check(vae.model, vae.guide, x, **{**QUICK, "num_data": 2, "num_samples": 150})


def test_nuts_and_guide_agree_with_the_exact_posterior():
    model, x, check = exact_check()
    p = model.posterior(x[:2])
    assert bool(check.converged.all())
    # z-scores by the effective sample size of the chains; draws of the guide are independent. Four of each.
    bound = scipy.stats.norm.isf(1e-4 / 8)
    assert ((check.mean - p.mean) / p.stddev * check.ess.sqrt()).abs().max() < bound
    assert ((check.guide_mean - p.mean) / p.stddev * math.sqrt(300)).abs().max() < bound
    assert (check.difference.abs() / (1 / check.ess + 1 / 300).sqrt()).max() < bound
    # The log of a standard deviation of n normal draws has a standard error of sqrt(1 / 2n); squares mix slower than
    # the latents themselves, by no more than the half of the draws here.
    assert (check.ratio.log().abs() / (1 / check.ess.clamp(max=150) / 2 + 1 / 600).sqrt()).max() < bound
    assert bool((check.discrepancy < 0.3).all()) and bool((check.distance >= check.difference.abs() - 1e-9).all())
    assert check.verdict.startswith("The guide is right as far as NUTS shows: these draws show shifts above 0.")


def test_distances_are_those_of_scipy():
    _, _, check = exact_check()
    for d in range(2):
        q, p = check.guide_draws[:, 1, d], check.draws[:, 1, d]
        expected = scipy.stats.wasserstein_distance(q, p) / p.std().item()
        assert check.distance[1, d].item() == pytest.approx(expected)
    expected = torch.corrcoef(check.guide_draws[:, 0].T) - torch.corrcoef(check.draws[:, 0].T)
    torch.testing.assert_close(check.correlation_difference[0], expected)


def test_posterior_check_prints_draws_and_sums_up():
    _, _, check = exact_check()
    summary = draw_and_sum_up(check)
    assert summary["num_converged"] == 2 and summary["narrow"] == summary["wide"] == summary["shifted"] == 0
    assert [row["converged"] for row in summary["data"]] == [True, True]
    assert check.draws.shape == check.guide_draws.shape == (300, 2, 2)
    assert check.names == ("z[0]", "z[1]")


def test_faults_of_a_guide_are_named():
    widen, shift = torch.tensor([1.0, 0.5, 2.0, 1.0]).double(), torch.tensor([0.0, 0.0, 0.0, 1.0]).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):  # the posterior is N(x / 2, 1 / 2)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift * math.sqrt(0.5), widen * math.sqrt(0.5)).to_event(1))

    check = posterior_check(model, guide, torch.randn(1, 4).double(), **LONGER)
    bound, ess = scipy.stats.norm.isf(1e-4 / 8), check.ess.clamp(max=200)
    assert ((check.difference - shift).abs() / (1 / ess + widen**2 / 400 + shift**2 / ess / 2).sqrt()).max() < bound
    assert ((check.ratio / widen).log().abs() / (1 / ess / 2 + 1 / 800).sqrt()).max() < bound
    assert "too narrow in 25% of the dimensions (encoders.FullRankNormal" in check.verdict
    assert "too wide in 25% of the dimensions (train the encoder longer" in check.verdict
    assert "shifted in 25% of the dimensions (a larger encoder network" in check.verdict
    summary = draw_and_sum_up(check)
    assert summary["narrow"] == summary["wide"] == summary["shifted"] == 0.25
    assert summary["data"][0]["worst"] == "z[3]"


def test_a_guide_in_one_of_two_modes_is_not_called_right():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(torch.full((len(x),), -5.0), 0.5))
            pyro.sample("x", dist.Normal(z.square(), 2.0), obs=x)

    def guide(x):  # the smaller of the modes at -5 and 5; 1% of draws of the prior have the energy to get there
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sqrt(), 0.2))

    check = posterior_check(model, guide, torch.full((3,), 25.0), **QUICK)
    assert not bool(check.converged.any()) and check.rhat.item() > 5
    summary = draw_and_sum_up(check)
    assert summary["num_converged"] == 0 and summary["distance"] is None
    assert "cannot be judged" in check.verdict and "several modes" in check.verdict
    assert "*0" in str(check) and "not to be trusted, R-hat" in str(check)


def test_data_whose_chains_did_not_settle_are_left_out():
    _, _, check = exact_check()
    rhat = check.rhat.clone()
    rhat[0] = 1.2
    ratio = check.ratio.clone()
    ratio[0] = 5.0
    doubtful = replace(check, rhat=rhat, ratio=ratio)
    assert doubtful.converged.tolist() == [False, True] and doubtful.summary()["wide"] == 0
    assert "The guide is right as far as NUTS shows" in doubtful.verdict and "1 of 2 data left out" in doubtful.verdict


def test_latents_with_a_constrained_support_and_a_scaled_loss():
    # Beta-Bernoulli, whose posterior is Beta(1 + k, 1 + n - k); the scale of a loss does not belong to it.
    def model(x):
        with pyro.poutine.scale(scale=10.0), pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Beta(torch.ones(len(x)), 1.0))
            pyro.sample("x", dist.Binomial(10, rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Beta(1 + x, 11 - x))

    check = posterior_check(model, guide, torch.tensor([3.0]), **QUICK)
    bound, ess, p = scipy.stats.norm.isf(1e-4 / 4), check.ess.clamp(max=100).item(), scipy.stats.beta(4, 8)
    assert check.names == ("rate",) and bool(((check.draws > 0) & (check.draws < 1)).all())
    assert abs(check.mean.item() - p.mean()) / p.std() * math.sqrt(ess) < bound
    assert abs(math.log(check.std.item() / p.std())) * math.sqrt(2 * ess) < bound
    assert check.plot().axes  # a single latent has no pair


def hierarchical() -> structures.HierarchicalVAE:
    return structures.HierarchicalVAE(
        prior=priors.StandardNormal(1),
        conditionals=[likelihoods.Normal(1, 2)],
        likelihood=likelihoods.Normal(2, 3),
        encoders=[encoders.DiagonalNormal(3, 2), encoders.DiagonalNormal(2, 1)],
    ).double()


def test_a_hierarchy_and_its_chains():
    vae = hierarchical()
    x = torch.randn(60, 3).double()
    state = {name: t.clone() for name, t in vae.state_dict().items()}
    check = posterior_check(vae.model, vae.guide, x, **{**QUICK, "warmup_steps": 20})
    assert check.names == ("z1[0]", "z1[1]", "z2") and check.ratio.shape == (1, 3)
    assert vae.training and all(p.grad is None for p in vae.parameters())
    assert all(torch.equal(t, state[name]) for name, t in vae.state_dict().items())
    ranks = calibration(vae.model, vae.guide, x, progress=False)
    assert ranks.names == ("z1[0]", "z1[1]", "z2", "log p(x, z)") and ranks.ranks.shape == (60, 4)


def test_ranks_of_an_exact_guide_are_uniform():
    """p-values, at 2 x 2 latents and log p(x, z) each, fall below 5% and 20% as often as they should."""
    p_values, means, means_of_squares = [], [], []
    for _ in range(60):
        model = known()
        vae = vae_of(model)
        done = calibration(vae.model, vae.guide, model.marginal().sample((100,)), progress=False)
        p_values.append(done.p_value[[0, 2]])  # a latent, and the density
        means.append(done.ranks.double().mean(0) / 99)
        means_of_squares.append((done.ranks.double() / 99).square().mean(0))
    for level in (0.05, 0.2):
        for p in torch.stack(p_values).T:
            assert_fraction(int((p < level).sum()), 60, level, 1e-4)
    assert_mean(torch.stack(means), torch.full((3,), 0.5), 1e-4)
    assert_mean(torch.stack(means_of_squares), torch.full((3,), (2 * 99 + 1) / (6 * 99)), 1e-4)


@pytest.mark.parametrize(
    "fault, latent, density",
    [
        ({"widen": 0.6}, "too narrow", "draws too probable"),
        ({"widen": 1.7}, "too wide", "draws too improbable"),
        ({"shift": 0.7}, "too high", "draws too improbable"),
        ({"shift": -0.7}, "too low", "draws too improbable"),
    ],
)
def test_the_shape_of_ranks_names_the_fault(fault, latent, density):
    model = known()
    vae = vae_of(model, **fault)
    done = calibration(vae.model, vae.guide, model.marginal().sample((200,)), num_rounds=2, progress=False)
    assert done.shapes == (latent, latent, density) and bool(done.uneven.all())
    assert f"{latent} (2)" in done.verdict and f"{density} (1)" in done.verdict
    assert "drawn from the model itself (not in your data)" in done.verdict
    summary = draw_and_sum_up(done)
    assert summary["num_ranks"] == 400 and summary["num_uneven"] == 3
    assert summary["quantities"]["z[0]"]["shape"] == latent


def test_only_the_density_sees_a_guide_that_ignores_the_data():
    model = known()
    vae = vae_of(model)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))

    done = calibration(vae.model, guide, model.marginal().sample((300,)), num_rounds=3, progress=False)
    assert done.shapes[2] == "draws too improbable" and done.adjusted_p_value[2] < 1e-6
    assert bool((done.adjusted_p_value[:2] > 1e-4).all())


def mixture(stay: float):
    """Returns a model of a class and two numbers given a shift, and a guide that keeps the true odds to a power."""

    def model(x, context):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.3, 0.2]).expand(len(x), 3)))
            pyro.sample("x", dist.Normal((z + context).unsqueeze(-1).expand(*z.shape, 2), 1.0).to_event(1), obs=x)

    def guide(x, context):
        means = torch.arange(3) + context.unsqueeze(-1)
        log_p = torch.tensor([0.5, 0.3, 0.2]).log() - (x.unsqueeze(-1) - means.unsqueeze(-2)).square().sum(-2) / 2
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=stay * log_p))

    return model, guide


def test_discrete_latents_with_a_context():
    x, context = torch.zeros(400, 2), torch.randn(400)
    model, guide = mixture(stay=1.0)
    ranks = repeat(lambda: calibration(model, guide, x, context, progress=False).ranks.double().mean(0) / 99, 20)
    assert_mean(ranks, torch.full((2,), 0.5), 1e-4)  # ties would pull them down
    exact = calibration(model, guide, x, context=context, progress=False)
    assert exact.names == ("z", "log p(x, z)") and bool((exact.adjusted_p_value > 1e-4).all())
    model, guide = mixture(stay=0.3)
    assert calibration(model, guide, x, context, num_rounds=3, progress=False).shapes[1] == "draws too improbable"
    with pytest.raises(ValueError, match='latent site "z" is discrete, but NUTS'):
        posterior_check(model, guide, x, context, **QUICK)


def test_categorical_parts():
    likelihood = likelihoods.Bernoulli(1, 4, partial(nn.OneHotInput, num_classes=3))
    vae = VAE(priors.Categorical(1, num_classes=3), likelihood, encoders.Categorical(4, 1, num_classes=3))
    done = calibration(vae.model, vae.guide, torch.zeros(60, 4), progress=False)
    assert done.ranks.shape == (60, 2) and int(done.ranks.max()) <= 99 and int(done.ranks.min()) >= 0


def test_sites_in_other_plates_and_a_correlation_that_no_marginal_shows():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(x)).double(), 1.0))
            with pyro.plate("views", 2, dim=-2):
                b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b.sum(-2, keepdim=b.dim() > 2), 1.0), obs=x)

    # Jointly normal: x ~ N(0, 1 + 2 + 4), so a | x ~ N(2x / 7, 3 / 7), and b given a and x as below.
    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(2 * x / 7, math.sqrt(3 / 7)))
            with pyro.plate("views", 2, dim=-2):
                # What x - 2a, of variance 3, says of each; but apart from the other: wrong, in their correlation only.
                pyro.sample("b", dist.Normal(a + (x - 2 * a) / 3, math.sqrt(2 / 3)))

    x = torch.randn(150).double()
    done = calibration(model, guide, x, num_rounds=8, progress=False)
    assert done.names == ("a", "b[0]", "b[1]", "log p(x, z)")
    assert bool((done.adjusted_p_value[:3] > 1e-4).all()) and done.shapes[3] == "draws too improbable"
    check = posterior_check(model, guide, x[:1], **LONGER)
    bound, ess = scipy.stats.norm.isf(1e-4 / 14), check.ess.clamp(max=200)
    mean, std = torch.stack([2 * x[0], 3 * x[0], 3 * x[0]]) / 7, torch.tensor([3 / 7, 5 / 7, 5 / 7]).sqrt()
    for found, count in ((check.mean[0], ess[0]), (check.guide_mean[0], 400)):
        assert ((found - mean) / std * count**0.5).abs().max() < bound
    for found, count in ((check.std[0], ess[0]), (check.guide_std[0], 400)):
        assert ((found / std).log() * (2 * count) ** 0.5).abs().max() < bound
    # The correlation of both b is -2/5, under the guide 1/15; an estimate has a standard error of (1 - r^2) / sqrt(n).
    error = math.sqrt((21 / 25) ** 2 / ess.min().item() + 1 / 400)
    assert abs(check.correlation_difference[0, 1, 2].item() - 7 / 15) < bound * error
    assert "without the correlations of 1 of 1 data" in check.verdict and "FullRankNormal" in check.verdict
    assert "too" not in check.verdict


def test_polynomials_are_orthonormal_and_holm_is_that_of_the_definition():
    p = _polynomials(99, 4)
    torch.testing.assert_close(p.T @ p / 100, torch.eye(4).double())
    torch.testing.assert_close(p.mean(0), torch.zeros(4).double())
    assert bool((p[-1] > 0).all()) and bool((p[1:, 0] > p[:-1, 0]).all()) and p[50, 1] < 0 < p[0, 1]
    # By hand: 0.01 * 4, 0.02 * 3, 0.03 * 2 raised to that before, 0.9 * 1.
    torch.testing.assert_close(_holm(torch.tensor([0.9, 0.02, 0.01, 0.03])), torch.tensor([0.9, 0.06, 0.04, 0.06]))


def test_p_values_are_those_of_scipy():
    model = known()
    vae = vae_of(model)
    done = calibration(vae.model, vae.guide, model.marginal().sample((80,)), num_draws=19, progress=False)
    legendre = _polynomials(19, 4).numpy()[done.ranks.numpy()].sum(0) / math.sqrt(80)
    expected = scipy.stats.chi2(4).sf((legendre**2).sum(-1))
    torch.testing.assert_close(done.p_value, torch.from_numpy(expected))


def test_reliability_is_that_of_the_weights():
    model = known()
    vae = vae_of(model, shift=2.0, widen=0.7)
    x = model.marginal().sample((40,))
    pyro.set_rng_seed(1)
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=300, progress=False)
    pyro.set_rng_seed(1)
    found = reliability(vae.model, vae.guide, x, num_samples=300, progress=False)
    assert torch.equal(found.khat, estimate.khat) and torch.equal(found.ess, estimate.ess)
    assert sum(found.counts) == 40 and found.counts[2] == int((estimate.khat > 0.7).sum()) > 2
    assert "misses mass of the posterior" in found.verdict and "IWAE" in found.verdict
    summary = draw_and_sum_up(found)
    assert summary["worst"][0]["datum"] == int(estimate.khat.argmax())
    assert summary["untrusted"] == found.counts[2]


def test_an_exact_guide_is_reliable():
    model = known()
    vae = vae_of(model)
    found = reliability(vae.model, vae.guide, model.marginal().sample((30,)), num_samples=100, progress=False)
    assert found.counts == (30, 0, 0) and bool((found.ess > 99.9).all())
    assert found.verdict.startswith("The guide is a good proposal")
    assert draw_and_sum_up(found)["worst"][0]["khat"] is None  # minus infinity


def test_counts_of_reliability():
    khat = torch.tensor([-math.inf, 0.49, 0.5, 0.7, 0.71, math.inf, math.nan])
    assert Reliability(khat, torch.ones(7), 100).counts == (2, 2, 3)


def test_random_state_is_the_callers():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    x, runs = torch.randn(60), []
    for _ in range(2):
        pyro.set_rng_seed(3)
        ranks = calibration(model, guide, x, progress=False).ranks
        runs.append((ranks, posterior_check(model, guide, x, **QUICK).draws, torch.rand(())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "diagnostic, options, message",
    [
        (posterior_check, {"num_data": 0}, "num_data must be at least 1, got 0"),
        (posterior_check, {"num_samples": 99}, "num_samples must be at least 100, got 99"),
        (posterior_check, {"warmup_steps": 0}, "warmup_steps must be at least 1, got 0"),
        (posterior_check, {"num_chains": 1}, "num_chains must be at least 2, got 1"),
        (calibration, {"num_draws": 18}, "num_draws must be at least 19, got 18"),
        (calibration, {"num_rounds": 0}, "num_rounds must be at least 1, got 0"),
        (
            calibration,
            {"num_rounds": 2},
            "at least 50 simulated data, got 20 data in num_rounds=2. Set num_rounds to 3",
        ),
        (reliability, {"num_samples": 20}, "num_samples must be at least 21, got 20"),
    ],
)
def test_arguments_out_of_range(diagnostic, options, message):
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    with pytest.raises(ValueError, match=message):
        diagnostic(vae.model, vae.guide, torch.zeros(20, 3), **options)


@pytest.mark.parametrize("diagnostic", [posterior_check, calibration, reliability])
def test_no_data(diagnostic):
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    with pytest.raises(ValueError, match="at least 1 data, got 0"):
        diagnostic(vae.model, vae.guide, torch.zeros(0, 3))


def test_what_has_no_posterior_per_datum_or_is_no_place_for_nuts():
    x = torch.zeros(60, 3)
    point = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.Delta(3, 2))
    for diagnostic in (posterior_check, calibration):
        with pytest.raises(ValueError, match='posterior of a datum is undefined: site "z" of the guide is a point'):
            diagnostic(point.model, point.guide, x, progress=False)
    sphere = VAE(priors.HypersphericalUniform(3), likelihoods.Normal(3, 3), encoders.VonMisesFisher(3, 3))
    with pytest.raises(ValueError, match='latent site "z" of a HypersphericalUniform .* without a bijection from'):
        posterior_check(sphere.model, sphere.guide, x, **QUICK)
    assert calibration(sphere.model, sphere.guide, x, progress=False).ranks.shape == (60, 4)

    def nowhere(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(True), obs=x)
            pyro.factor("never", torch.full_like(z, -math.inf))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="none of 100 draws of the guide has a finite log p"):
        posterior_check(nowhere, guide, torch.zeros(1), **QUICK)
