"""How much the latents hold: against closed forms, enumeration, quadrature and formulas written out by hand."""

import json
import math
import sys
from functools import partial

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from linear_gaussian import AFFINE, assert_mean, diagonal_vae, set_affine, truth, vae_of
from pyro import distributions as dist
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

import pyrovae
from pyrovae import VAE, bounds, encoders, likelihoods, priors, structures
from pyrovae.diagnostics import Collapse, CollapseMonitor, collapse
from pyrovae.nn import OneHotInput
from pyrovae.plots import collapse_history

FAILURE_RATE = 1e-4  # chance that a statistical test fails with another seed although the library is right
MODULE = sys.modules["pyrovae.diagnostics.collapse"]  # the package has the function in its place
SCORE = scipy.stats.norm.isf(FAILURE_RATE / 2)


def normal_vae(slope: float, scale: float) -> VAE:
    """One latent and one element, q(z | x) = N(slope x, scale^2), in double precision."""
    vae = VAE(
        priors.StandardNormal(1), likelihoods.Normal(1, 1, AFFINE), encoders.DiagonalNormal(1, 1, AFFINE)
    ).double()
    raw = math.log(math.expm1(scale - 1e-6)) - math.log(math.e - 1)
    set_affine(vae.encoder.network, torch.tensor([[slope], [0.0]]), torch.tensor([0.0, raw]))
    return vae


def look(vae, *args, **options) -> Collapse:
    return collapse(vae.model, vae.guide, *args, progress=False, **options)


def test_divergences_of_each_dimension_are_those_of_normals():
    vae, x = diagonal_vae(3, 4), torch.randn(50, 4).double()
    found = look(vae, x)
    with torch.no_grad():
        q = vae.encode(x)
    each = kl_divergence(Normal(q.mean, q.stddev), Normal(torch.zeros(3).double(), 1.0))
    torch.testing.assert_close(found.kl, each.sum(1))
    torch.testing.assert_close(found.kl_by_dimension, each.mean(0))
    torch.testing.assert_close(found.variance, q.mean.var(0))
    assert found.kl_error < 1e-12 and found.variance_error.max() < 1e-12
    assert found.columns == {"z": slice(0, 3)} and found.active_units == int((q.mean.var(0) > 0.01).sum())


def test_a_full_covariance_has_a_divergence_but_none_by_dimension():
    vae, x = vae_of(truth(3, 4)), torch.randn(50, 4).double()
    found = look(vae, x)
    with torch.no_grad():
        q = vae.encode(x)
    prior = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    torch.testing.assert_close(found.kl, kl_divergence(MultivariateNormal(q.mean, q.covariance_matrix), prior))
    assert found.kl_by_dimension.isnan().all() and found.summary()["kl_by_dimension"] == [None] * 3
    torch.testing.assert_close(found.variance, q.mean.var(0))


def test_the_variance_of_posterior_means_is_that_of_their_projection():
    """Means W x of x ~ N(0, I): the variance over N data is |W_d|^2 times a chi-square over its N - 1 degrees."""
    n = 400
    vae, x = diagonal_vae(2, 4), torch.randn(n, 4).double()
    weight = torch.tensor([[0.3, -0.2, 0.1, 0.5], [0.02, 0.0, 0.03, -0.01]]).double()  # 0.39 and 0.0014
    set_affine(vae.encoder.network, torch.cat([weight, torch.zeros(2, 4)]), torch.zeros(4))
    found = look(vae, x)
    scores = (n - 1) * found.variance / weight.square().sum(1)
    low, high = scipy.stats.chi2(n - 1).interval(1 - FAILURE_RATE / 2)
    assert ((low < scores) & (scores < high)).all()
    assert found.active.tolist() == [True, False] and found.active_units == 1


def draws_only(centre, width):
    """A pair whose posterior states no mean: a normal, sent through a transform that changes nothing."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            unchanged = dist.transforms.AffineTransform(0.0, 1.0, event_dim=1)
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(centre(x), width).to_event(1), unchanged))

    return model, guide


def test_draws_instead_of_means_have_their_own_variance_taken_off():
    x = torch.randn(100, 2).double()
    model, guide = draws_only(lambda x: x * torch.tensor([0.5, 0.0]).double(), 0.8)
    found = [collapse(model, guide, x, num_draws=5, progress=False) for _ in range(60)]
    variance = torch.stack([f.variance for f in found])
    assert_mean(variance, torch.stack([0.25 * x[:, 0].var(), torch.tensor(0.0)]), FAILURE_RATE)
    # The errors they state are those that they have: a ratio of variances of 59 degrees of freedom.
    stated = torch.stack([f.variance_error for f in found]).square().mean(0)
    low, high = scipy.stats.chi2(59).interval(1 - FAILURE_RATE / 2)
    ratio = 59 * variance.var(0) / stated
    assert ((low < ratio) & (ratio < high)).all()
    each = torch.stack([f.kl.mean() for f in found])
    q = Normal(x * torch.tensor([0.5, 0.0]).double(), 0.8)
    exact = kl_divergence(q, Normal(torch.zeros(2).double(), 1.0)).sum(1).mean()
    assert_mean(each, exact, FAILURE_RATE)
    assert found[0].kl_by_dimension.isnan().all()


def quadrature(vae: VAE, x: torch.Tensor) -> tuple[float, float]:
    """I(x; z) and KL(q(z) || p(z)) of some data, by the trapezoid rule in one dimension."""
    grid = torch.linspace(-12, 12, 4001).double()
    with torch.no_grad():
        q = vae.encode(x)
    log_q = Normal(q.mean, q.stddev).log_prob(grid)
    log_mixture = log_q.logsumexp(0) - math.log(len(x))
    information = torch.trapezoid(log_q.exp() * (log_q - log_mixture), grid).mean()
    log_p = Normal(torch.tensor(0.0).double(), 1.0).log_prob(grid)
    return information.item(), torch.trapezoid(log_mixture.exp() * (log_mixture - log_p), grid).item()


@pytest.mark.parametrize("scale", [0.1, 0.6])
def test_information_and_the_hole_are_the_integrals(scale, monkeypatch):
    vae, x = normal_vae(0.8, scale), torch.randn(40, 1).double() + 1
    information, hole = quadrature(vae, x)
    with monkeypatch.context() as few:
        few.setattr(MODULE, "_PAIRS", 1000)  # several chunks each way
        found = look(vae, x, num_draws=50)
    assert abs(found.mutual_information - information) < SCORE * found.mutual_information_error
    assert abs(found.aggregate_kl - hole) < SCORE * found.aggregate_kl_error
    # The same identity as in the docstring, to rounding.
    assert found.kl.mean().item() == pytest.approx(found.mutual_information + found.aggregate_kl, abs=1e-12)
    # And the errors they state are those that they have.
    scores = [(look(vae, x).mutual_information - information) for _ in range(60)]
    error = look(vae, x).mutual_information_error
    low, high = scipy.stats.chi2(60).interval(1 - FAILURE_RATE)
    assert low < np.square(scores).sum() / error**2 < high


def test_chunks_change_nothing(monkeypatch):
    vae, x = diagonal_vae(2, 4), torch.randn(30, 4).double()
    pyro.set_rng_seed(1)
    whole = look(vae, x, num_draws=3)
    monkeypatch.setattr(MODULE, "_PAIRS", 70)
    pyro.set_rng_seed(1)
    parts = look(vae, x, num_draws=3)
    assert parts.mutual_information == pytest.approx(whole.mutual_information, abs=1e-12)
    assert parts.mutual_information_upper == pytest.approx(whole.mutual_information_upper, abs=1e-12)
    monkeypatch.setattr(MODULE, "_ROWS", 21)
    torch.testing.assert_close(look(vae, x, num_draws=3).kl, whole.kl)


def test_well_separated_data_have_log_n_nats_and_equal_data_none():
    vae = normal_vae(1.0, 0.01)
    apart = look(vae, 10 * torch.arange(7).reshape(7, 1).double())
    assert apart.mutual_information == pytest.approx(math.log(7), abs=1e-9) and apart.ceiling == math.log(7)
    assert apart.mutual_information_upper > 1000
    equal = look(vae, torch.ones(7, 1).double())
    assert equal.mutual_information == pytest.approx(0, abs=1e-9)
    assert equal.mutual_information_upper == pytest.approx(0, abs=1e-9)


def test_both_estimates_bound_the_information_of_the_distribution():
    """x ~ N(0, 1), q = N(a x, s^2): I(x; z) = log(1 + a^2 / s^2) / 2, and q(z) = N(0, a^2 + s^2)."""
    slope, scale = 0.9, 0.3
    vae = normal_vae(slope, scale)
    exact = 0.5 * math.log1p(slope**2 / scale**2)
    found = [look(vae, torch.randn(60, 1).double(), num_draws=2) for _ in range(100)]
    below = torch.tensor([f.mutual_information for f in found])
    above = torch.tensor([f.mutual_information_upper for f in found])
    error = SCORE * below.std() / 10, SCORE * above.std() / 10
    assert below.mean() - error[0] < exact < above.mean() + error[1]
    assert above.mean() - below.mean() < 0.2  # so that the bounds say something
    many = look(vae, torch.randn(3000, 1).double(), num_draws=2)
    # Of 3000 data they are nearly the same; what is left is the data's spread, of an entropy and a mean log-density.
    assert many.mutual_information_upper - many.mutual_information < 0.01
    assert abs(many.mutual_information - exact) < SCORE / math.sqrt(3000) + 0.01


def test_a_hierarchy_is_taken_as_a_whole():
    """Against all pairs written out: q(z1, z2 | x) is normal, as everything is linear."""
    vae = structures.HierarchicalVAE(
        prior=priors.StandardNormal(1),
        conditionals=[likelihoods.Normal(1, 2, AFFINE, scale=0.9)],
        likelihood=likelihoods.Normal(2, 3, AFFINE),
        encoders=[encoders.DiagonalNormal(3, 2, AFFINE), encoders.DiagonalNormal(2, 1, AFFINE)],
    ).double()
    set_affine(
        vae.encoders[0].network, torch.cat([torch.randn(2, 3), torch.zeros(2, 3)]), torch.tensor([0.1, 0, -1, 0])
    )
    set_affine(vae.encoders[1].network, torch.tensor([[0.7, -0.4], [0.0, 0.0]]), torch.tensor([0.2, -0.5]))
    x = torch.randn(30, 3).double()
    found = look(vae, x, num_draws=60)
    with torch.no_grad():
        q1, slope = vae.encoders[0](x), torch.tensor([[0.7, -0.4]]).double()
        at = vae.encoders[1](q1.mean)
        cov1 = torch.diag_embed(q1.variance)
        cross = cov1 @ slope.T
        cov2 = slope @ cross + torch.diag_embed(at.variance)
        covariance = torch.cat([torch.cat([cov1, cross], -1), torch.cat([cross.mT, cov2], -1)], -2)
        q = MultivariateNormal(torch.cat([q1.mean, at.mean], -1), covariance)
        mixture = MixtureSameFamily(Categorical(torch.ones(30).double()), q)
        z = q.sample((4000,))
        information = (q.log_prob(z) - mixture.log_prob(z)).mean(1)
        log_p = Normal(0.0, 1.0).log_prob(z[..., 2]) + vae.conditionals[0](z[..., 2:]).log_prob(z[..., :2])
        kl = (q.log_prob(z) - log_p).mean(1)
        kl2 = kl_divergence(vae.encoders[1](z[..., :2]).base_dist, Normal(torch.tensor(0.0).double(), 1.0)).mean((1, 2))

    def agree(value, error, draws):
        assert abs(value - draws.mean()) < SCORE * math.hypot(error, draws.std() / math.sqrt(len(draws)))

    agree(found.mutual_information, found.mutual_information_error, information)
    agree(found.kl.mean(), found.kl_error, kl)
    agree(found.kl_by_site["z2"].mean(), found.kl_error, kl2)
    assert found.columns == {"z1": slice(0, 2), "z2": slice(2, 3)}
    torch.testing.assert_close(found.kl_by_dimension[2], found.kl_by_site["z2"].mean())
    exact = torch.cat([q1.mean, at.mean], -1).var(0)
    assert ((found.variance - exact).abs() <= SCORE * found.variance_error + 1e-9).all()
    assert "all" in str(found) and "z2" in str(found)


def two_sites(probs, shift):
    """By hand: a class, and in a plate of their own two numbers, whose posterior is around x times `shift`."""

    def model(x, context):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.3, 0.2]).double()))
            with pyro.plate("two", 2):
                a = pyro.sample("a", dist.Normal(torch.tensor(0.0).double(), 1.0))
            pyro.sample("x", dist.Normal(a.sum(-2, keepdim=True) + y, 1.0), obs=x)

    def guide(x, context):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(probs(x, context)))
            with pyro.plate("two", 2):
                pyro.sample("a", dist.Normal(torch.stack([shift * x, -shift * x]), 0.5))

    return model, guide


def test_classes_are_counted_by_their_shares_and_the_information_is_the_sum():
    def probs(x, context):
        return torch.stack([x, context, torch.zeros_like(x)], dim=-1).softmax(-1)

    model, guide = two_sites(probs, 0.0)
    x, context = torch.randn(20).double(), torch.randn(20).double()
    found = collapse(model, guide, x, context=context, num_draws=200, progress=False)
    q = probs(x, context)
    information = (q * (q.log() - q.mean(0).log())).sum(1).mean().item()
    assert abs(found.mutual_information - information) < SCORE * found.mutual_information_error
    assert found.columns == {"y": slice(0, 1), "a": slice(1, 3)}
    y_kl = (q * (q / torch.tensor([0.5, 0.3, 0.2]).double()).log()).sum(1)
    a_kl = kl_divergence(Normal(torch.tensor(0.0).double(), 0.5), Normal(torch.tensor(0.0).double(), 1.0))
    torch.testing.assert_close(found.kl_by_site["y"], y_kl)
    torch.testing.assert_close(found.kl_by_site["a"], 2 * a_kl.expand(20))
    torch.testing.assert_close(found.kl_by_dimension, torch.stack([y_kl.mean(), a_kl, a_kl]))
    torch.testing.assert_close(found.variance, torch.stack([q.var(0).sum(), *2 * [torch.tensor(0.0).double()]]))
    assert found.active.tolist() == [True, False, False]
    assert found.prior.shape == found.posterior.shape == (20, 3)


def test_categorical_parts():
    reader = partial(OneHotInput, num_classes=3)
    vae = VAE(priors.Categorical(4, 3), likelihoods.Bernoulli(4, 6, reader), encoders.Categorical(6, 4, num_classes=3))
    x = torch.bernoulli(torch.full((20, 6), 0.5))
    found = look(vae, x, num_draws=100)
    with torch.no_grad():
        q = vae.encode(x).base_dist.probs  # (20, 4, 3), and all 81 latents
        every = torch.cartesian_prod(*[torch.arange(3)] * 4)
        joint = q[:, torch.arange(4), every].prod(-1).double()
        information = (joint * (joint.log() - joint.mean(0).log())).sum(1).mean().item()
    assert abs(found.mutual_information - information) < SCORE * found.mutual_information_error
    torch.testing.assert_close(found.variance, q.var(0).sum(-1).double())
    assert found.plot().axes[1].get_xlabel().startswith("z[")


def test_a_learned_prior_counts_and_draws_from_it_are_shown():
    """A prior of two components where the aggregate posterior has them: no hole; the standard normal has one."""
    x = torch.cat([torch.full((200, 1), -4.0), torch.full((200, 1), 4.0)]).double()
    vae = normal_vae(1.0, 0.5)
    hole = look(vae, x)
    # Two normals so far apart: log 2 nats of information, and the hole is the rest.
    exact = kl_divergence(Normal(torch.tensor(4.0), 0.5), Normal(torch.tensor(0.0), 1.0)).item() - math.log(2)
    assert hole.aggregate_kl == pytest.approx(exact, abs=1e-5) and hole.aggregate_kl_lower == pytest.approx(
        exact, abs=0.01
    )
    assert "hole" in hole.verdict and "VampPrior" in hole.verdict

    class Two(torch.nn.Module):
        def forward(self, context=None):
            two = dist.Normal(torch.tensor([[-4.0], [4.0]]).double(), 0.5).to_event(1)
            return dist.MixtureSameFamily(dist.Categorical(torch.ones(2).double()), two)

    vae.prior = Two()
    fits = look(vae, x)
    assert abs(fits.aggregate_kl) < SCORE * fits.aggregate_kl_error + 1e-9
    assert "hole" not in fits.verdict and fits.verdict.startswith("Healthy: 1 of 1 dimensions is active, and the prior")
    assert fits.kl_by_dimension.isnan().all()
    assert set(fits.prior.sign().unique().tolist()) == {-1.0, 1.0} and 3 < fits.prior.abs().mean() < 5


@pytest.mark.parametrize(
    "slope, scale, spread, said",
    [
        (
            0.0,
            1.0,
            1.0,
            "Collapsed: the latents hold 0.000 nats about the data, and none of 1 dimensions is active: warm up",
        ),
        (0.9, 0.4, 1.0, "Healthy: 1 of 1 dimensions is active, and the prior is within"),
        (1.0, 1e-4, 1.0, "Whether the prior fits is unknown: from 30 data"),
    ],
)
def test_verdicts(slope, scale, spread, said):
    x = spread * torch.from_numpy(scipy.stats.norm.ppf((np.arange(30) + 0.5) / 30)).reshape(30, 1)
    found = look(normal_vae(slope, scale), x)
    assert said in found.verdict
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80 and " ".join(str(found).split()).endswith(" ".join(found.verdict.split()))
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["mutual_information"] == found.mutual_information and summary["active_units"] == found.active_units


def test_idle_dimensions_and_sites_are_named():
    vae = diagonal_vae(5, 4)
    weight = torch.zeros(10, 4)
    weight[0] = torch.tensor([0.9, 0, 0, 0])
    set_affine(vae.encoder.network, weight, torch.zeros(10))
    assert "Only 1 of 5 dimensions is active" in look(vae, torch.randn(50, 4).double()).verdict
    model, guide = two_sites(lambda x, _: torch.tensor([0.5, 0.3, 0.2]).double().expand(len(x), 3), 1.0)
    x = torch.randn(50).double()
    assert 'Site "y" (0.000 nats) adds nothing' in collapse(model, guide, x, None, progress=False).verdict


def test_what_cannot_be_looked_at_is_refused():
    vae, x = diagonal_vae(2, 4), torch.randn(10, 4).double()
    with pytest.raises(ValueError, match="num_draws must be at least 2, got 1"):
        look(vae, x, num_draws=1)
    with pytest.raises(ValueError, match="collapse needs at least 2 data, got 1"):
        look(vae, x[:1])
    with pytest.raises(ValueError, match="argument 1 has 10 rows but context has 9"):
        collapse(vae.model, vae.guide, x, context=torch.zeros(9, 1), progress=False)

    def outside(x):
        z = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0).expand([4]).to_event(1), obs=x)

    with pytest.raises(ValueError, match='site "w" of the model is outside the plate "data"'):
        collapse(outside, lambda x: pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0)), x, progress=False)

    def masked(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x[:, 0] > 0):
            pyro.sample("z", dist.Normal(torch.zeros(4).double(), 1.0).to_event(1))

    with pytest.raises(ValueError, match='site "z" is masked'):
        collapse(masked, masked, x, progress=False)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def planar(x):
        with pyro.plate("data", len(x)):
            flow = dist.transforms.Planar(4).double()
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(x, 1.0).to_event(1), flow))

    with pytest.raises(ValueError, match='site "z" must be scored by the posteriors of all data, but'):
        collapse(model, planar, x, progress=False)


def test_a_random_subsample_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))

    with pytest.raises(ValueError, match='The plate "data" drew 2 of 10 data'):
        collapse(model, guide, torch.randn(10).double(), progress=False)


def train(x, epochs, callbacks, **options):
    pyro.set_rng_seed(3)
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    loss = bounds.ELBO()
    history = pyrovae.fit(
        vae.model,
        vae.guide,
        x,
        loss=loss,
        batch_size=50,
        epochs=epochs,
        callbacks=[f(vae) for f in callbacks],
        progress=False,
        **options,
    )
    return vae, history


def test_the_monitor_leaves_training_as_it_is_to_the_bit_and_writes_into_the_history():
    x, held_out = torch.randn(100, 3), torch.randn(40, 3)
    monitors = []

    def monitor(vae):
        monitors.append(CollapseMonitor(vae.model, vae.guide, held_out, every=2))
        return monitors[-1]

    watched, history = train(x, 5, [monitor])
    alone, _ = train(x, 5, [])
    for a, b in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)
    (records,) = [m.records for m in monitors]
    assert [r["epoch"] for r in records] == [2, 4]
    assert history["active_units"] == [None, records[0]["active_units"], None, records[1]["active_units"], None]
    assert "mutual_information" not in str(history)  # a table leaves out what few of its rows would hold
    last = train(x, 4, [])[0]
    assert last.training  # as it was
    pyro.set_rng_seed(0)
    found = collapse(last.model, last.guide, held_out, num_draws=2, progress=False)
    assert records[1]["kl"] == pytest.approx(found.kl.mean().item(), rel=1e-6)
    assert records[1]["mutual_information"] == pytest.approx(
        found.mutual_information, rel=1e-6
    )  # the seed of its noise


def test_the_monitor_of_a_resumed_run_knows_the_epochs_before(tmp_path):
    x = torch.randn(100, 3)
    monitors = []

    def monitor(vae):
        monitors.append(CollapseMonitor(vae.model, vae.guide, x[:40]))
        return monitors[-1]

    train(x, 2, [monitor], checkpoint=tmp_path / "half")
    _, resumed = train(x, 4, [monitor], checkpoint=tmp_path / "half", resume=True)
    _, whole = train(x, 4, [monitor])
    assert monitors[1].records == monitors[2].records and len(monitors[1].records) == 4
    assert resumed["mutual_information"] == whole["mutual_information"]


def test_the_monitor_refuses_what_it_cannot_do():
    vae, x = diagonal_vae(2, 4), torch.randn(10, 4).double()
    for options, message in (
        ({"every": 0}, "every must be at least 1"),
        ({"num_draws": 1}, "num_draws must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            CollapseMonitor(vae.model, vae.guide, x, **options)
    with pytest.raises(ValueError, match="CollapseMonitor needs at least 2 data"):
        CollapseMonitor(vae.model, vae.guide, x[:1])
    with pytest.raises(ValueError, match="records is empty"):
        CollapseMonitor(vae.model, vae.guide, x).plot()


def test_the_pictures_show_the_numbers(tmp_path):
    vae, x = diagonal_vae(3, 4), torch.randn(50, 4).double()
    found = look(vae, x)
    figure = found.plot(tmp_path / "collapse.png")
    heights = sorted((bar.get_height() for bar in figure.axes[0].patches), reverse=True)
    np.testing.assert_allclose(heights, found.kl_by_dimension.sort(descending=True).values)
    top = found.variance.argsort(descending=True)[:2]
    prior, posterior = (np.asarray(dots.get_offsets()) for dots in figure.axes[1].collections)
    np.testing.assert_allclose(posterior, found.posterior[:, top])
    np.testing.assert_allclose(prior, found.prior[:, top])
    assert (tmp_path / "collapse.png").read_bytes().startswith(b"\x89PNG")
    by_variance = look(vae_of(truth(3, 4)), x)
    heights = [bar.get_height() for bar in by_variance.plot().axes[0].patches]
    np.testing.assert_allclose(sorted(heights), by_variance.variance.sort().values)
    records = [{"epoch": i, "kl": 2.0 + i, "active_units": i, "mutual_information": 1.0 + i} for i in range(1, 5)]
    figure = collapse_history(records)
    np.testing.assert_allclose([line.get_ydata() for line in figure.axes[0].lines], [[3, 4, 5, 6], [2, 3, 4, 5]])
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), [1, 2, 3, 4])
