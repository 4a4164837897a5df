"""Annealing of latents that are no real numbers: unit vectors, points of a simplex, discrete ones, and mixtures."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import pyro
import pytest
import scipy.stats
import torch
from cases import Case, cases
from linear_gaussian import assert_mean, assert_unit_scores
from pyro import distributions as dist
from spaces import interval, simplex, space_of, sphere
from torch import Tensor

from pyrovae import log_marginal
from pyrovae.distributions import Beta, HypersphericalUniform, VonMisesFisher, blocks_of
from pyrovae.distributions.bijections import LogRatio, bijection
from pyrovae.estimators import (
    AnnealedImportanceSampling,
    Enumeration,
    Guide,
    ImportanceSampling,
    Laplace,
    Prior,
    SequentialMonteCarlo,
    UntilTrusted,
    bidirectional,
)
from pyrovae.estimators.gibbs import reflected
from pyrovae.estimators.moves import move
from pyrovae.estimators.targets import Target
from pyrovae.estimators.task import open_task

FAILURE_RATE = 1e-5  # chance that a statistical test here fails with another seed although the library is right
ERRORS = 5  # standard errors of log p(x) from tens of chains
DOUBLE = torch.float64
AIS, SMC = AnnealedImportanceSampling, SequentialMonteCarlo

log_marginal = partial(log_marginal, progress=False)


def plate(x: Tensor) -> pyro.plate:
    return pyro.plate("data", len(x), dim=-1)


@contextmanager
def target_of(model: Callable, guide: Callable | None, x: Tensor):
    start = Prior() if guide is None else Guide()
    with open_task(model, guide, AIS(start=start), (x,), {}, 64e6, progress=False) as task:
        yield Target(task, start.single(task, "the test starts"), real=False)


# ---------------------------------------------------------------------------------------------------------- the models


class Known(NamedTuple):
    """A model, a guide, data, and their log p(x)."""

    model: Callable
    guide: Callable
    x: Tensor
    log_p: Tensor


def directions(size: int, likelihood: float = 2.0) -> Known:
    """x = (z, w) + noise with z on a sphere, so that its posterior is von Mises-Fisher, and w a real number."""
    loc = torch.eye(size, dtype=DOUBLE)[0]
    scale = torch.tensor([likelihood**-0.5] * size + [0.5], dtype=DOUBLE)

    def model(x):
        with plate(x):
            z = pyro.sample("z", VonMisesFisher(loc.expand(len(x), -1), torch.full((len(x),), 1.5, dtype=DOUBLE)))
            w = pyro.sample("w", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(torch.cat([z, w.unsqueeze(-1)], dim=-1), scale).to_event(1), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("z", VonMisesFisher(-loc.expand(len(x), -1), torch.full((len(x),), 0.5, dtype=DOUBLE)))
            pyro.sample("w", dist.Normal(x[:, -1], 1.0))

    x = torch.randn(4, size + 1, dtype=DOUBLE)
    # p(z) p(x | z) is exp(k'z) but for constants: the ratio of two constants of von Mises-Fisher distributions.
    natural = 1.5 * loc + likelihood * x[:, :-1]
    posterior, prior = vmf(natural), vmf(1.5 * loc)
    log_p = dist.Normal(loc, likelihood**-0.5).to_event(1).log_prob(x[:, :-1]) + prior.log_prob(loc)
    log_p = log_p - posterior.log_prob(loc) + dist.Normal(0.0, math.sqrt(1.25)).log_prob(x[:, -1])
    return Known(model, guide, x, log_p)


def vmf(natural: Tensor) -> VonMisesFisher:
    kappa = natural.norm(dim=-1)
    return VonMisesFisher(natural / kappa.unsqueeze(-1), kappa)


WEIGHT = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)


def bits() -> Known:
    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Bernoulli(torch.full((len(x), 8), 0.3, dtype=DOUBLE)).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHT, 0.7).to_event(1), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("z", dist.Bernoulli(torch.full((len(x), 8), 0.6, dtype=DOUBLE)).to_event(1))

    x = torch.randn(4, 5, dtype=DOUBLE)
    return Known(model, guide, x, log_marginal(model, None, x, method=Enumeration()).value)


def analysers() -> Known:
    """A mixture of factor analysers: a class and two real factors."""
    generator = torch.Generator().manual_seed(2)
    mean = 1.5 * torch.randn(4, 5, generator=generator, dtype=DOUBLE)
    loading = torch.randn(4, 5, 2, generator=generator, dtype=DOUBLE)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=DOUBLE)

    def model(x):
        with plate(x):
            c = pyro.sample("c", dist.Categorical(weights.expand(len(x), -1)))
            y = pyro.sample("y", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            center = mean[c] + (loading[c] @ y.unsqueeze(-1)).squeeze(-1)
            pyro.sample("x", dist.Normal(center, 0.7).to_event(1), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("c", dist.Categorical(torch.full((len(x), 4), 0.25, dtype=DOUBLE)))
            pyro.sample("y", dist.Normal(x.new_zeros(len(x), 2), 1.2).to_event(1))

    x = torch.randn(4, 5, dtype=DOUBLE)
    covariance = loading @ loading.mT + 0.49 * torch.eye(5, dtype=DOUBLE)
    parts = dist.MultivariateNormal(mean, covariance).log_prob(x.unsqueeze(1)) + weights.log()
    return Known(model, guide, x, parts.logsumexp(-1))


def counts() -> Known:
    """A count with infinitely many values, one with bounds, and a real number: x = n + m + w + noise."""

    def model(x):
        with plate(x):
            n = pyro.sample("n", dist.Poisson(torch.full((len(x),), 6.0, dtype=DOUBLE)))
            m = pyro.sample("m", dist.Binomial(100, torch.full((len(x),), 0.02, dtype=DOUBLE)))
            w = pyro.sample("w", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(n - m + w, 1.0), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("n", dist.Poisson(torch.full((len(x),), 8.0, dtype=DOUBLE)))
            pyro.sample("m", dist.Binomial(100, torch.full((len(x),), 0.04, dtype=DOUBLE)))
            pyro.sample("w", dist.Normal(x.new_zeros(len(x)), 1.5))

    x = torch.tensor([-3.0, 2.0, 5.0, 12.0], dtype=DOUBLE)
    n, m = torch.arange(80.0, dtype=DOUBLE), torch.arange(101.0, dtype=DOUBLE).unsqueeze(-1)
    joint = dist.Poisson(6.0).log_prob(n) + dist.Binomial(100, torch.tensor(0.02, dtype=DOUBLE)).log_prob(m)
    parts = joint.unsqueeze(-1) + dist.Normal((n - m).unsqueeze(-1), math.sqrt(2.0)).log_prob(x)
    return Known(model, guide, x, parts.flatten(0, 1).logsumexp(0))


KNOWN = {
    "circle": partial(directions, 2),
    "sphere": partial(directions, 3),
    "sphere-in-8": partial(directions, 8),
    "bits": bits,
    "analysers": analysers,
    "counts": counts,
}


# ---------------------------------------------------------------------------------------------- what comes out is right


STARTED = AIS(2, 8, start=Guide(), acceptance=0.6)
UNBIASED = [*((name, STARTED) for name in KNOWN), ("sphere", AIS(2, 8)), ("bits", AIS(2, 8))]
UNBIASED += [(name, SMC(2, 6, kept=0.6)) for name in ("sphere-in-8", "analysers", "counts")]


@pytest.mark.parametrize(("name", "method"), UNBIASED, ids=repr)
def test_the_estimate_of_p_is_unbiased(name, method):
    known = KNOWN[name]()
    x = known.x[1].expand(800, *known.x.shape[1:])
    found = log_marginal(known.model, known.guide, x, method=method)
    ratio = (found.value - known.log_p[1]).exp()
    assert_mean(ratio, torch.ones(()), FAILURE_RATE)
    assert 0.02 < ratio.std() < 2.5  # a test of the mean that can see a bias


@pytest.mark.parametrize("name", KNOWN)
def test_values_are_right_and_trusted(name):
    known = KNOWN[name]()
    for method in (AIS(32, 80), AIS(32, 80, start=Guide())):
        found = log_marginal(known.model, known.guide, known.x, method=method)
        assert_unit_scores((found.value - known.log_p) / found.standard_error, FAILURE_RATE)
        assert found.trusted.all()
        assert found.standard_error.max() < 0.35
        assert ("drawn anew" in str(found)) == (name in ("bits", "analysers", "counts"))
        assert ("moves accepted" in str(found)) == (name != "bits")


@pytest.mark.parametrize("name", ["sphere", "analysers"])
def test_bidirectional_encloses_the_truth(name):
    known = KNOWN[name]()
    x = known.x[0].expand(100, -1).contiguous()
    bracket = bidirectional(known.model, None, x, method=AIS(4, 12), progress=False)
    exact = log_marginal(known.model, None, bracket.args[0], method=AIS(32, 100)).value
    for gap in (exact - bracket.lower.value, bracket.upper.value - exact):
        assert gap.mean() > -4 * gap.std() / 10
    assert bracket.gap.mean() < 1.0


# ---------------------------------------------------------------------------------------------------- moves, one by one


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_moves_on_a_sphere_leave_the_density_as_it_is(size, beta):
    known = directions(size)
    with target_of(known.model, None, known.x) as target:
        p = vmf(1.5 * torch.eye(size, dtype=DOUBLE)[0] + beta * 2.0 * known.x[:, :-1])
        precision = 1 + 4 * beta
        w = dist.Normal(4 * beta * known.x[:, -1:] / precision, torch.tensor(precision**-0.5, dtype=DOUBLE))
        first = u = torch.cat([p.sample((15_000,)), w.sample((15_000,))], dim=-1)
        at, temperature = target(u), torch.full((4,), beta, dtype=DOUBLE)
        step, scale = torch.full((4,), 0.9, dtype=DOUBLE), target.variance(u).sqrt()
        assert (scale[:, :size] == scale[:, :1]).all()
        for _ in range(2):
            moved = move(target, u, at, temperature, step, scale, num_leapfrog=2)
            u, at = moved.u, moved.at
        again = target(u)
    assert 0.3 < moved.acceptance.mean() < 0.97  # so that a rule that accepts wrongly would show
    assert (u != first).any(-1).float().mean() > 0.5
    torch.testing.assert_close(u[..., :size].norm(dim=-1), torch.ones_like(u[..., 0]))
    assert_mean(u, torch.cat([p.mean, w.mean], dim=-1), FAILURE_RATE)
    height = (u[..., :size] * p.loc).sum(-1)
    assert_mean(height.square(), second_moment(size, p.concentration), FAILURE_RATE)
    for name, values in again._asdict().items():
        torch.testing.assert_close(getattr(at, name), values, rtol=1e-9, atol=1e-9)


def second_moment(size: int, kappa: Tensor) -> Tensor:
    """Returns the mean of the squared height under a von Mises-Fisher distribution, by quadrature."""
    t = torch.linspace(0, math.pi, 20_001, dtype=DOUBLE).unsqueeze(-1)
    weights = (kappa * t.cos()).exp() * t.sin() ** (size - 2)
    return (weights * t.cos().square()).sum(0) / weights.sum(0)


def coupled(x):
    """Three discrete latents of different kinds, with probabilities that can be listed."""
    with plate(x):
        a = pyro.sample("a", dist.Bernoulli(torch.full((len(x),), 0.4, dtype=DOUBLE)))
        logits = torch.tensor([0.0, 0.5, -1.0], dtype=DOUBLE).expand(len(x), -1)
        b = pyro.sample("b", dist.OneHotCategorical(logits=logits))
        c = pyro.sample("c", dist.Poisson(1 + a + b @ torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE)))
        pyro.sample("x", dist.Normal(c + 2 * a - b[..., 2], 1.0), obs=x)


def table(target: Target, beta: float) -> tuple[Tensor, Tensor]:
    """Returns all states, with counts up to 25, and their probabilities at a temperature, ``(states, batch)``."""
    states = torch.cartesian_prod(*[torch.arange(n, dtype=DOUBLE) for n in (2, 3, 26)])
    start, rise = target.values(states.unsqueeze(1).expand(-1, 2, -1))
    return states, (start + beta * rise).softmax(0)


@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("start", ["exact", "one state"])
def test_sweeps_leave_discrete_densities_as_they_are_and_reach_them(start, beta):
    x = torch.tensor([0.5, 4.0], dtype=DOUBLE)
    with target_of(coupled, None, x) as target:
        assert target.discrete.sizes == [2, 3, 0] and not target.has_gradients
        states, probabilities = table(target, beta)
        if start == "exact":
            first = states[torch.multinomial(probabilities.T, 6000, replacement=True).T]
        else:
            first = states[:1].unsqueeze(1).expand(6000, 2, -1)
        u, at, temperature = first, target(first), torch.full((2,), beta, dtype=DOUBLE)
        scale = torch.ones(2, 3, dtype=DOUBLE)
        for _ in range(1 if start == "exact" else 25):
            u, at = (moved := move(target, u, at, temperature, temperature, scale, num_leapfrog=1)).u, moved.at
        again = target(u)
    assert ((u != first).to(DOUBLE).mean(0) > 0.03).all()
    torch.testing.assert_close(at.start + at.rise, again.start + again.rise)
    for i in range(2):
        number = (u[:, i] @ torch.tensor([78.0, 26.0, 1.0], dtype=DOUBLE)).long()
        assert_frequencies(number.bincount(minlength=156), probabilities[:, i])


def assert_frequencies(frequencies: Tensor, probabilities: Tensor) -> None:
    """Asserts that frequencies agree with probabilities by a chi-square test; rare values are taken together."""
    total = frequencies.sum()
    common = total * probabilities > 10
    seen = torch.cat([frequencies[common], frequencies[~common].sum(0, keepdim=True)])
    expected = total * torch.cat([probabilities[common], probabilities[~common].sum(0, keepdim=True)])
    statistic = ((seen - expected).square() / expected.clamp(min=1e-3)).sum().item()
    assert scipy.stats.chi2(len(seen) - 1).sf(statistic) > FAILURE_RATE


@pytest.mark.parametrize(("low", "high"), [(0, 4), (0, math.inf), (-math.inf, 4), (-math.inf, math.inf), (2, 2)])
def test_reflected_steps_go_back_as_often_as_they_go(low, high):
    states = torch.arange(max(low, -20), min(high, 20) + 1, dtype=DOUBLE)
    low, high = torch.tensor(low, dtype=DOUBLE), torch.tensor(high, dtype=DOUBLE)
    ends = torch.stack([reflected(states + step, low, high) for step in range(-13, 14)])
    assert ((ends >= low) & (ends <= high)).all()
    ways = (ends.unsqueeze(-1) == states).sum(0)
    assert torch.equal(ways, ways.T) and ways.sum() > 0


# --------------------------------------------------------------------------------------------------- simplexes, circles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_points_of_a_simplex_keep_their_density(dtype):
    p = dist.Dirichlet(torch.full((4,), 0.1, dtype=dtype))
    y = p.sample((2000,))
    assert y.min() < 1e-12
    again = LogRatio()(LogRatio().inv(y))
    eps = torch.finfo(dtype).eps
    # A logarithm of up to 90 (or 700), rounded a few times.
    torch.testing.assert_close(again.log(), y.log(), rtol=0, atol=20 * y.log().abs().max().item() * eps)
    torch.testing.assert_close(p.log_prob(again), p.log_prob(y), rtol=0, atol=100 * y.log().abs().max().item() * eps)


def test_the_jacobian_of_a_log_ratio_is_the_determinant():
    x = torch.randn(4, dtype=DOUBLE)
    jacobian = torch.autograd.functional.jacobian(lambda x: LogRatio()(x)[:-1], x)
    y = LogRatio()(x)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, LogRatio().log_abs_det_jacobian(x, y))
    torch.testing.assert_close(LogRatio().inv(y), x)
    assert LogRatio() == LogRatio() and len({LogRatio(), LogRatio()}) == 1


def test_the_support_of_flattened_events_has_a_bijection():
    space = bijection(blocks_of(dist.constraints.simplex, (3, 4)))
    x = torch.randn(7, 9, dtype=DOUBLE)
    y = space(x)
    torch.testing.assert_close(y.unflatten(-1, (3, 4)), LogRatio()(x.unflatten(-1, (3, 3))))
    torch.testing.assert_close(space.inv(y), x)
    assert space.log_abs_det_jacobian(x, y).shape == (7,)


@pytest.mark.parametrize("concentration", [0.3, 1.0, 3.0])
def test_points_of_a_simplex_against_quadrature(concentration):
    weight = 2 * torch.randn(3, 4, dtype=DOUBLE)
    prior = dist.Dirichlet(torch.full((3,), concentration, dtype=DOUBLE))

    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Dirichlet(torch.full((len(x), 3), concentration, dtype=DOUBLE)))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight).to_event(1), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("z", dist.Dirichlet(torch.ones(len(x), 3, dtype=DOUBLE)))

    x = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=DOUBLE)
    space = simplex(3, 1 / 16)
    parts = dist.Bernoulli(logits=space.points @ weight).to_event(1).log_prob(x.unsqueeze(1))
    known = (parts + prior.log_prob(space.points) + space.log_weights).logsumexp(-1)
    for method in (AIS(32, 40), AIS(32, 40, start=Guide()), SMC(24, 8), ImportanceSampling(2000, Laplace(degrees=5.0))):
        found = log_marginal(model, guide, x, method=method)
        assert ((found.value - known).abs() < ERRORS * found.standard_error).all()


def test_points_of_a_sphere_against_quadrature():
    """Unit vectors in two plates, uniform and of a projected normal distribution, with a binary likelihood."""
    weight = 3 * torch.randn(3, 4, dtype=DOUBLE)
    loc = torch.tensor([0.5, -1.0, 0.2], dtype=DOUBLE)

    def model(x):
        with plate(x):
            with pyro.plate("parts", 2, dim=-2):
                z = pyro.sample("z", HypersphericalUniform(torch.empty(3, dtype=DOUBLE)))
            y = pyro.sample("y", dist.ProjectedNormal(loc.expand(len(x), -1)))
            parts = [z[..., :1, :, :], z[..., 1:, :, :], y.unsqueeze(-3) if y.dim() < z.dim() else y]
            logits = torch.cat(parts, dim=-1).unflatten(-1, (3, 3)) @ weight
            logits = logits.flatten(-2)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    x = torch.bernoulli(torch.full((3, 12), 0.5, dtype=DOUBLE))
    space = sphere(3)
    log_p = torch.zeros(3, dtype=DOUBLE)
    for i, prior in enumerate([HypersphericalUniform(loc)] * 2 + [dist.ProjectedNormal(loc)]):
        likelihood = dist.Bernoulli(logits=space.points @ weight).to_event(1)
        parts = likelihood.log_prob(x[:, 4 * i : 4 * i + 4].unsqueeze(1))
        log_p += (parts + prior.log_prob(space.points) + space.log_weights).logsumexp(-1)
    found = log_marginal(model, None, x, method=AIS(32, 60))
    assert found.trusted.all()
    assert ((found.value - log_p).abs() < ERRORS * found.standard_error).all()


def test_angles_stay_in_the_circle():
    """Torch states all real numbers as the support of a von Mises distribution; its density has mass one on a turn."""

    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.VonMises(x.new_zeros(len(x)), x.new_ones(len(x))))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)  # of no period

    x = torch.tensor([0.5, 9.0], dtype=DOUBLE)  # the second pulls out of the circle
    z = torch.linspace(-math.pi, math.pi, 20_001, dtype=DOUBLE)
    log_f = dist.VonMises(torch.zeros((), dtype=DOUBLE), 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x[:, None])
    known = torch.trapezoid(log_f.exp(), z).log()
    found = log_marginal(model, None, x, method=AIS(64, 100))
    assert ((found.value - known).abs() < ERRORS * found.standard_error).all()


def test_shares_between_zero_and_one():
    """The Beta distribution of this library excludes both ends, by a support that torch has no bijection to."""

    def model(x):
        with plate(x):
            z = pyro.sample("z", Beta(x.new_full((len(x),), 0.5), x.new_full((len(x),), 2.0)))
            pyro.sample("x", dist.Normal(z, 0.2), obs=x)

    x = torch.tensor([0.1, 0.9], dtype=DOUBLE)
    space = interval(1 / 16)
    prior = Beta(torch.tensor(0.5, dtype=DOUBLE), torch.tensor(2.0, dtype=DOUBLE)).log_prob(space.points)
    parts = dist.Normal(space.points, 0.2).log_prob(x.unsqueeze(-1)) + prior + space.log_weights
    found = log_marginal(model, None, x, method=AIS(32, 40))
    assert ((found.value - parts.logsumexp(-1)).abs() < ERRORS * found.standard_error).all()


# ------------------------------------------------------------------------------------------------------ layouts, chunks


def test_latents_of_all_kinds_are_packed_and_unpacked_alike():
    def model(x):
        with plate(x):
            with pyro.plate("parts", 3, dim=-2):
                hot = pyro.sample("hot", dist.OneHotCategorical(x.new_ones(4)))
                way = pyro.sample("way", HypersphericalUniform(x.new_empty(2)))
            many = pyro.sample("many", dist.Categorical(x.new_ones(2, 5)).to_event(1))
            real = pyro.sample("real", dist.LogNormal(x.new_zeros(2), 1.0).to_event(1))
            count = pyro.sample("count", dist.Poisson(x.new_full((2,), 3.0)).to_event(1))
            center = (hot[..., :1, :, 1] - hot[..., 2:, :, 0] + way[..., 1:2, :, 0]) * many[..., 0]
            pyro.sample("x", dist.Normal(center + many[..., 1] - real.sum(-1) + count[..., 1], 1.0), obs=x)

    x = torch.randn(5, dtype=DOUBLE)
    with open_task(model, None, AIS(), (x,), {}, 64e6, progress=False) as task:
        target = Target(task, Prior().single(task, "the test starts"), real=False)
        trace, _ = task.draw(7)
        prior, likelihood = task.score(trace, 7)
        u = target.pack(trace)
        assert u.shape == (7, 5, 3 + 3 * 2 + 2 + 2 + 2) == (7, 5, target.dim)
        assert target.discrete.sizes == [4] * 3 + [5] * 2 + [0] * 2
        at = target(u)
        torch.testing.assert_close(at.rise, likelihood)
        log_real = trace.nodes["real"]["value"].log().sum(-1).squeeze(1)
        torch.testing.assert_close(at.start, prior + log_real)
        assert (at.rise_gradient[..., target.discrete.columns] == 0).all()
        unpacked, _ = target._unpack(u)
        for site in target.sites:
            old, new = (t.nodes[site.name]["value"] for t in (trace, unpacked))
            torch.testing.assert_close(new, old.expand_as(new))
    found = log_marginal(model, None, x, method=AIS(64, 60))
    other = log_marginal(model, None, x, method=ImportanceSampling(40_000, Prior()))
    error = (found.standard_error.square() + other.standard_error.square()).sqrt()
    assert ((found.value - other.value).abs() < ERRORS * error).all()


@pytest.mark.parametrize("name", ["bits", "sphere"])
def test_little_memory_changes_neither_value_nor_trust(name):
    known = KNOWN[name]()
    found = log_marginal(known.model, None, known.x[:2], method=AIS(12, 30), max_memory=1.0)  # chain by chain
    assert ((found.value - known.log_p[:2]).abs() < ERRORS * found.standard_error).all()
    assert found.trusted.all()


def test_networks_that_take_one_draw_at_a_time():
    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((len(x), 3), 0.3)).to_event(1))
            pyro.sample("x", dist.Normal(z.view(len(x), -1).sum(-1), 0.5), obs=x)

    x = torch.tensor([0.5, 2.0], dtype=DOUBLE)
    z = torch.cartesian_prod(*[torch.arange(2, dtype=DOUBLE)] * 3)
    prior = dist.Bernoulli(torch.tensor(0.3, dtype=DOUBLE)).log_prob(z).sum(-1)
    known = (prior + dist.Normal(z.sum(-1), 0.5).log_prob(x[:, None])).logsumexp(-1)
    with pytest.warns(UserWarning, match="one by one"):
        found = log_marginal(model, None, x, method=AIS(16, 6))
    assert ((found.value - known).abs() < ERRORS * found.standard_error).all()


@pytest.mark.parametrize("name", ["analysers", "sphere"])
def test_compiled_graphs_give_the_same_numbers(name, traced, at_once):
    known = KNOWN[name]()
    found = []
    for compiled in (False, True):
        pyro.set_rng_seed(1)
        found.append(
            log_marginal(known.model, known.guide, known.x, method=AIS(8, 10, start=Guide()), compile=compiled)
        )
    torch.testing.assert_close(found[1].value, found[0].value)
    assert traced.runs > 0


# ------------------------------------------------------------------------------------------------------ what is trusted


def tied(strength: float) -> Callable:
    """Two bits that nearly always agree, so that neither can change alone."""

    def model(x):
        with plate(x):
            a = pyro.sample("a", dist.Bernoulli(torch.full((len(x),), 0.5, dtype=DOUBLE)))
            b = pyro.sample("b", dist.Bernoulli(logits=strength * (2 * a - 1)))
            pyro.sample("x", dist.Normal(a + b, 2.0), obs=x)

    return model


@pytest.mark.parametrize(("strength", "trusted"), [(1.0, True), (30.0, False)])
def test_chains_that_cannot_move_are_not_trusted(strength, trusted):
    x = torch.tensor([0.5, 1.5], dtype=DOUBLE)
    found = log_marginal(tied(strength), None, x, method=AIS(32, 40))
    assert found.ess.min() > 16  # the weights look good
    assert (found.trusted == trusted).all()
    if not trusted:
        assert found.diagnostics["renewals"].max() < 0.1
        assert "drawn anew 0 times (least: 0.0)" in str(found)


def test_a_latent_with_one_likely_value_does_not_cost_trust():
    def model(x):
        with plate(x):
            rare = pyro.sample("rare", dist.Bernoulli(torch.full((len(x),), 1e-9, dtype=DOUBLE)))
            z = pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.5, dtype=DOUBLE)))
            pyro.sample("x", dist.Normal(z + rare, 1.0), obs=x)

    x = torch.tensor([0.5, 1.5], dtype=DOUBLE)
    found = log_marginal(model, None, x, method=AIS(32, 40))
    assert found.trusted.all()
    known = log_marginal(model, None, x, method=Enumeration()).value
    assert ((found.value - known).abs() < ERRORS * found.standard_error).all()


def test_importance_sampling_of_discrete_latents_by_one_temperature_is_not_trusted():
    known = bits()
    found = log_marginal(known.model, None, known.x, method=AIS(500, 1))
    assert not found.trusted.any()


def test_values_that_the_guide_never_draws_are_found():
    """Importance sampling with an overconfident guide sees nothing wrong; annealing from it does."""

    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Bernoulli(torch.full((len(x), 14), 0.5, dtype=DOUBLE)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("z", dist.Bernoulli(torch.full((len(x), 14), 1e-9, dtype=DOUBLE)).to_event(1))

    x = torch.tensor([6.0, 8.0], dtype=DOUBLE)
    known = log_marginal(model, None, x, method=Enumeration()).value
    naive = log_marginal(model, guide, x, method=ImportanceSampling(2000))
    assert (naive.value < known - 5).all() and (naive.standard_error < 1e-6).all()
    found = log_marginal(model, guide, x, method=UntilTrusted())
    assert found.trusted.all()
    assert ((found.value - known).abs() < ERRORS * found.standard_error).all()


# -------------------------------------------------------------------------------------------- all priors of the library


@pytest.mark.parametrize("case", cases("prior"), ids=lambda case: case.name)
def test_every_prior_is_scored_in_stages(case: Case):
    prior = case.build().double().eval()
    weight = 0.7 * torch.randn(prior.latent_dim, 3, dtype=DOUBLE)

    def model(x, *context):
        pyro.module("prior", prior)
        with plate(x):
            z = pyro.sample("z", prior(*context))
            pyro.sample("x", dist.Normal(z.to(DOUBLE) @ weight, 0.6).to_event(1), obs=x)

    def guide(x, *context):
        with plate(x):
            pyro.sample("z", prior(*context))

    x = torch.randn(2, 3, dtype=DOUBLE)
    context = (torch.rand(2, case.context_dim, dtype=DOUBLE),) if case.context_dim else ()
    known = []
    with torch.no_grad():
        for i in range(2):
            p = prior(*[c[i] for c in context])
            space = case.space(p) if case.space else space_of(p, case.step)
            likelihood = dist.Normal(space.points.to(DOUBLE) @ weight, 0.6).to_event(1)
            known.append((likelihood.log_prob(x[i]) + space.probabilities(p).log()).logsumexp(0))
    found = log_marginal(model, guide, x, *context, method=UntilTrusted(target=0.2))
    error = (found.value - torch.stack(known)).abs()
    assert (error < ERRORS * found.standard_error + 2 * case.accuracy).all()


# ------------------------------------------------------------------------------------------------------ what is refused


def nested(x):
    with plate(x):
        n = pyro.sample("n", dist.Poisson(x.new_full((), 3.0)))
        pyro.sample("z", dist.Binomial(n + 1, x.new_full((), 0.5)))
        pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)


def one_number(x):
    with plate(x):
        z = pyro.sample("z", HypersphericalUniform(x.new_empty(1)))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


def multinomial(x):
    with plate(x):
        z = pyro.sample("z", dist.Multinomial(4, x.new_ones(3)))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nested, 'support of the latents at site "z" .* depends on other latents'),
        (one_number, 'site "z" are unit vectors of one number, 1 or -1. Draw them from a Bernoulli'),
        (multinomial, 'discrete latents at site "z" .* neither integers nor have values that can be listed'),
    ],
)
def test_latents_without_moves_are_refused(model, match):
    x = torch.randn(3, dtype=DOUBLE)
    with pytest.raises(ValueError, match=match):
        log_marginal(model, None, x, method=AIS(4, 4))


def test_laplace_takes_real_numbers_alone():
    known = directions(3)
    with pytest.raises(ValueError, match='site "z" have a support .* Take AnnealedImportanceSampling'):
        log_marginal(known.model, known.guide, known.x, method=ImportanceSampling(10, Laplace()))


def test_guides_that_draw_other_values_are_refused():
    def guide(x):
        with plate(x):
            pyro.sample("z", dist.Poisson(torch.full((len(x), 8), 9.0, dtype=DOUBLE)).to_event(1))

    known = bits()
    with pytest.raises(ValueError, match="no values of the model's distribution|support"):
        log_marginal(known.model, guide, known.x, method=AIS(4, 4, start=Guide()))
