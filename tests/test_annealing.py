"""Annealing from what is known to the posterior: unbiased, covering, enclosing, and honest where it fails."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pyro
import pytest
import torch
from linear_gaussian import AFFINE, Truth, assert_fraction, assert_mean, assert_unit_scores, truth, vae_of
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyrovae import VAE, Estimate, encoders, likelihoods, log_marginal, priors
from pyrovae.estimators import (
    Adaptive,
    AnnealedImportanceSampling,
    Guide,
    ImportanceSampling,
    Linear,
    Prior,
    Proposal,
    Refined,
    Schedule,
    SequentialMonteCarlo,
    Sigmoid,
    Widened,
    bidirectional,
)
from pyrovae.estimators.moves import move
from pyrovae.estimators.schedules import TemperingPath
from pyrovae.estimators.targets import Target
from pyrovae.estimators.task import open_task

# Chance that a statistical test here fails with another seed although the library is right.
FAILURE_RATE = 1e-4

log_marginal = partial(log_marginal, progress=False)
bidirectional = partial(bidirectional, progress=False)
each = partial(pytest.mark.parametrize, ids=repr)


def data_plate(x: Tensor) -> pyro.plate:
    return pyro.plate("data", len(x), dim=-1)


@contextmanager
def target_of(vae: VAE, x: Tensor, start: Proposal) -> Iterator[Target]:
    method = AnnealedImportanceSampling(start=start)
    with open_task(vae.model, vae.guide, method, (x,), {}, 64e6, progress=False) as task:
        yield Target(task, start.single(task, "the test starts"))


# ---------------------------------------------------------------------------------------------- what the theory says


UNBIASED = [
    AnnealedImportanceSampling(2, 4),
    AnnealedImportanceSampling(1, 6, num_leapfrog=1, start=Guide(), schedule=Linear()),
    AnnealedImportanceSampling(1, 1, start=Guide()),
    AnnealedImportanceSampling(2, 4, start=Widened(1.5), acceptance=0.5),
    SequentialMonteCarlo(2, 4, kept=0.5),
    SequentialMonteCarlo(1, 6, start=Guide()),
]


@each("method", UNBIASED)
def test_the_estimate_of_p_is_unbiased(method):
    known = truth(2, 3, scale=1.0)
    vae, x = vae_of(known, widen=1.5, shift=0.5), known.marginal().sample().expand(3000, -1)
    estimate = log_marginal(vae.model, vae.guide, x, method=method)
    ratio = (estimate.value - known.marginal().log_prob(x)).exp()
    assert_mean(ratio, torch.tensor(1.0), FAILURE_RATE)
    assert 0.02 < ratio.std() < 1.5  # a test of the mean that can see a bias


@each(
    "method",
    [
        AnnealedImportanceSampling(100, 12),
        AnnealedImportanceSampling(100, 8, start=Guide(), schedule=Linear()),
        SequentialMonteCarlo(100, 6, num_leapfrog=1, start=Guide(), kept=0.5),
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_say(method):
    known = truth(2, 3)
    vae, x = vae_of(known, widen=1.5, shift=1.0), known.marginal().sample((1000,))
    estimate = log_marginal(vae.model, vae.guide, x, method=method)
    covered = ((estimate.value - known.marginal().log_prob(x)).abs() <= 1.96 * estimate.standard_error).sum().item()
    # The window is four standard errors of a share of 1,000 wide, to either side.
    assert 920 <= covered <= 980
    assert_fraction(covered, 1000, 0.95, FAILURE_RATE)


def copies(method: AnnealedImportanceSampling) -> Tensor:
    """Returns the errors of a method over many runs for one datum."""
    pyro.set_rng_seed(1)
    known = truth(4, 6, scale=0.3)
    vae, x = vae_of(known), known.marginal().sample().expand(600, -1)
    return log_marginal(vae.model, None, x, method=method).value - known.marginal().log_prob(x)


def assert_less(one: Tensor, other: Tensor, by: float) -> None:
    """Asserts that the mean of one is less than the other's by so many standard errors (or no more, if negative)."""
    error = math.sqrt(one.var() / len(one) + other.var() / len(other))
    assert (other.mean() - one.mean()).item() > by * error


def test_more_temperatures_have_less_variance():
    squares = [(e - e.mean()).square() for e in (copies(AnnealedImportanceSampling(4, t)) for t in (8, 24, 72))]
    assert_less(squares[1], squares[0], by=4)
    assert_less(squares[2], squares[1], by=4)


def test_temperatures_fitted_to_a_datum_are_no_worse_than_equal_ones():
    errors = [copies(AnnealedImportanceSampling(4, 24, schedule=s)) for s in (Adaptive(), Linear())]
    assert_less(*(e.square() for e in errors), by=4)  # they are better here: the posterior is narrow


# ------------------------------------------------------------------------------------------- better than the guide


def test_annealing_finds_what_a_bad_guide_does_not():
    known = truth(2, 3)
    vae, x = vae_of(known, shift=5.0), known.marginal().sample((60,))
    expected = known.marginal().log_prob(x)

    def score(method) -> Estimate:
        return log_marginal(vae.model, vae.guide, x, method=method)

    bad = score(ImportanceSampling(1000))
    assert ((expected - bad.value) > 3 * bad.standard_error).float().mean() > 0.9
    assert (bad.khat > 0.7).float().mean() > 0.9
    assert bad.remedy == "Score them by method=UntilTrusted()."
    assert "not to be trusted: 6" in str(bad) or "not to be trusted: 5" in str(bad)

    good = score(AnnealedImportanceSampling())
    assert_unit_scores((good.value - expected) / good.standard_error, FAILURE_RATE)
    assert good.trusted.all() and good.standard_error.max() < 0.2
    assert "moves accepted" in str(good) and not good.remedy

    refined = score(ImportanceSampling(1000, Refined()))
    assert (refined.khat < 0.7).float().mean() > 0.9
    assert (refined.value - expected).abs().mean() < 0.1 * (bad.value - expected).abs().mean()


# ---------------------------------------------------------------------------------------------------- from both sides


@pytest.mark.parametrize("start", [Prior(), Guide()], ids=repr)
def test_bidirectional_encloses_the_truth_ever_more_tightly(start):
    known = truth(2, 3)
    vae, x = vae_of(known, widen=1.5, shift=2.0), torch.zeros(400, 3, dtype=torch.float64)
    gaps = []
    for num_temperatures in (4, 16, 64):
        bracket = bidirectional(
            vae.model, vae.guide, x, method=AnnealedImportanceSampling(2, num_temperatures, start=start)
        )
        expected = known.marginal().log_prob(bracket.args[0])
        assert_less(bracket.lower.value - expected, torch.zeros(400), by=-4)
        assert_less(expected - bracket.upper.value, torch.zeros(400), by=-4)
        gaps.append(bracket.gap)
    assert_less(gaps[1], gaps[0], by=2)
    assert_less(gaps[2], gaps[1], by=2)
    assert f"a gap of {gaps[2].mean().item():.3f}" in str(bracket)
    # The data are the model's: their mean and covariance are those of p(x).
    drawn = bracket.args[0]
    assert_mean(drawn, known.marginal().mean, FAILURE_RATE)


def test_the_way_back_is_unbiased_for_one_over_p():
    known = truth(2, 3, scale=1.0)
    vae, x = vae_of(known), torch.zeros(3000, 3, dtype=torch.float64)
    bracket = bidirectional(vae.model, None, x, method=AnnealedImportanceSampling(2, 10))
    ratio = (known.marginal().log_prob(bracket.args[0]) - bracket.upper.value).exp()
    assert_mean(ratio, torch.tensor(1.0), FAILURE_RATE)
    assert 0.02 < ratio.std() < 1.5


def test_bidirectional_puts_its_data_in_their_place_whatever_the_call():
    vae = VAE(
        priors.StandardNormal(1),
        likelihoods.Normal(1, 2, AFFINE, 0.5, context_dim=1),
        encoders.DiagonalNormal(2, 1, AFFINE, context_dim=1),
    ).double()
    layer = vae.likelihood.network.layers[0]
    context = torch.linspace(-20, 20, 12, dtype=torch.float64).unsqueeze(1)
    method = AnnealedImportanceSampling(8, 8)
    x = torch.full((12, 2), 7.0, dtype=torch.float64)
    by_name = bidirectional(vae.model, vae.guide, x=x, context=context, method=method, max_memory=1e4)
    by_place = bidirectional(vae.model, vae.guide, x, context, method=method)
    assert by_name.args == () and by_name.kwargs["context"] is context and by_place.args[1] is context
    for bracket, drawn in ((by_name, by_name.kwargs["x"]), (by_place, by_place.args[0])):
        assert drawn.shape == (12, 2) and (drawn != 7.0).all()
        mean = context @ layer.weight[:, 1:].T + layer.bias
        spread = layer.weight[:, :1] @ layer.weight[:, :1].T + 0.25 * torch.eye(2, dtype=torch.float64)
        expected = MultivariateNormal(mean, spread).log_prob(drawn).detach()
        assert (bracket.lower.value - 8 * bracket.lower.standard_error < expected).all()
        assert ((bracket.upper.value - expected).abs() < 3).all()  # contexts that are mixed up are off by far more


def test_bidirectional_refuses_what_it_cannot_hand_back():
    def model(x):
        with data_plate(x):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0)), 1.0), obs=2 * x)

    with pytest.raises(ValueError, match='at site "x" cannot replace an argument: .* Observe the argument itself'):
        bidirectional(model, None, torch.zeros(3))
    with pytest.raises(TypeError, match="method must be an AnnealedImportanceSampling, got SequentialMonteCarlo"):
        bidirectional(model, None, torch.zeros(3), method=SequentialMonteCarlo())


# -------------------------------------------------------------------------------------------------------- temperatures


@each("schedule", [Linear(), Sigmoid(), Sigmoid(1.0), Adaptive()])
@pytest.mark.parametrize("num_temperatures", [1, 2, 50])
def test_temperatures_rise_from_0_to_1(schedule, num_temperatures):
    speeds = torch.tensor([[9.0, 1.0], [3.0, 1.0], [1.0, 1.0]])
    path = TemperingPath(torch.tensor([[0.0, 0.0], [0.2, 0.5], [1.0, 1.0]]), speeds, speeds.unsqueeze(-1), speeds)
    betas = schedule.betas(num_temperatures, path)
    assert len(betas) == num_temperatures + 1
    assert (betas[0] == 0).all() and (betas[-1] == 1).all() and (betas.diff(dim=0) > 0).all()


def test_temperatures_are_those_of_their_formulas():
    path = TemperingPath(*[torch.zeros(2, 1)] * 4)
    t = torch.arange(11) / 10
    torch.testing.assert_close(Linear().betas(10, path)[:, 0], t)
    by_hand = [1 / (1 + math.exp(-3.0 * (2 * i / 10 - 1))) for i in range(11)]
    expected = torch.tensor([(b - by_hand[0]) / (by_hand[-1] - by_hand[0]) for b in by_hand])
    torch.testing.assert_close(Sigmoid(3.0).betas(10, path)[:, 0], expected)
    # With a speed of 9 on the first fifth and of 1 after it, a tenth of equal steps apart, 9/13 of them are there.
    betas = torch.tensor([[0.0], [0.2 - 1e-6], [0.2 + 1e-6], [1.0]])
    path = TemperingPath(betas, betas, betas, torch.tensor([[9.0], [9.0], [1.0], [1.0]]))
    share = (1.8 / 2.6 + 0.02) / 1.1
    assert (Adaptive().betas(1000, path) < 0.2).sum().item() == pytest.approx(1000 * share, abs=2)


def test_temperatures_that_do_not_rise_from_0_to_1_are_refused():
    class Falling(Schedule):
        def betas(self, num_temperatures, pilot):
            return torch.linspace(1, 0, num_temperatures + 1).unsqueeze(-1)

    vae = vae_of(truth(1, 2))
    with pytest.raises(ValueError, match=r"temperatures of Falling\(\) must rise from 0 to 1"):
        method = AnnealedImportanceSampling(2, 3, schedule=Falling())
        log_marginal(vae.model, None, torch.zeros(2, 2, dtype=torch.float64), method=method)


# ------------------------------------------------------------------------------------------------ moves and densities


def between(known: Truth, vae: VAE, x: Tensor, start: Proposal, beta: float) -> MultivariateNormal:
    """Returns q(z)^(1 - beta) p(x, z)^beta of a linear-Gaussian model, normalised."""
    if isinstance(start, Prior):  # p(z) p(x | z)^beta: the posterior with more noise
        eye = torch.eye(known.weight.shape[1], dtype=torch.float64)
        precision = eye + beta * known.weight.T @ known.weight / known.scale**2
        linear = beta * (x - known.bias) @ known.weight / known.scale**2
    else:
        with torch.no_grad():
            q, posterior = vae.encoder(x), known.posterior(x)
        precision = (1 - beta) * q.precision_matrix + beta * posterior.precision_matrix
        linear = sum(
            share * (p.precision_matrix @ p.mean.unsqueeze(-1)).squeeze(-1)
            for share, p in ((1 - beta, q), (beta, posterior))
        )
    return MultivariateNormal(
        torch.linalg.solve(precision, linear.unsqueeze(-1)).squeeze(-1), precision_matrix=precision
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@each("start", [Prior(), Guide()])
def test_moves_leave_the_density_as_it_is(start, beta):
    known = truth(2, 3)
    vae, x = vae_of(known, widen=1.5, shift=1.0), known.marginal().sample((3,))
    with target_of(vae, x, start) as target:
        p = between(known, vae, x, start, beta)
        first = u = p.sample((20_000,))
        at, temperature = target(u), torch.full((3,), beta, dtype=torch.float64)
        # Of the narrowest direction's standard deviation; at twice it steps would grow without end.
        narrowest = torch.linalg.eigvalsh(p.covariance_matrix)[..., :1].sqrt().expand(3, 2)
        step = torch.tensor([1.2, 1.4, 1.6], dtype=torch.float64)
        for _ in range(2):
            moved = move(target, u, at, temperature, step, narrowest, num_leapfrog=2)
            u, at = moved.u, moved.at
    assert 0.3 < moved.acceptance.mean() < 0.95  # so that a rule that accepts wrongly would show
    assert ((u != first).any(-1)).float().mean() > 0.5
    assert_mean(u, p.mean, FAILURE_RATE)
    deviation = u - p.mean
    assert_mean(deviation.unsqueeze(-1) * deviation.unsqueeze(-2), p.covariance_matrix.expand(3, 2, 2), FAILURE_RATE)
    again = target(u)  # what moves carry along is what there is at the latents
    for name, values in again._asdict().items():
        torch.testing.assert_close(getattr(at, name), values, rtol=1e-9, atol=1e-9)


@each("start", [Prior(), Guide()])
def test_densities_and_gradients_are_the_closed_forms(start):
    known = truth(2, 3)
    vae, x = vae_of(known, widen=1.5, shift=1.0), known.marginal().sample((4,))
    u = torch.randn(5, 4, 2, dtype=torch.float64)
    with target_of(vae, x, start) as target, torch.no_grad():
        at = target(u)
        p_z, p_x = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double()), vae.decode(u)
        q = p_z if isinstance(start, Prior) else vae.encoder(x)
        joint = p_z.log_prob(u) + p_x.log_prob(x)
        torch.testing.assert_close(at.start, q.log_prob(u))
        torch.testing.assert_close(at.rise, joint - q.log_prob(u))
        torch.testing.assert_close(target.log_joint(u), joint)
    of_q = -(q.precision_matrix @ (u - q.mean).unsqueeze(-1)).squeeze(-1)
    of_joint = -u + (x - u @ known.weight.T - known.bias) @ known.weight / known.scale**2
    torch.testing.assert_close(at.start_gradient, of_q)
    torch.testing.assert_close(at.rise_gradient, of_joint - of_q)


def simplex_vae(prior) -> VAE:
    q = encoders.LogisticNormal(3, 3, AFFINE)
    return VAE(prior, likelihoods.Normal(3, 3, AFFINE, scale=0.3), q).double()


@each("start", [Prior(), Guide()])
def test_the_density_of_a_simplex_in_real_numbers_has_mass_one_and_its_gradient(start):
    vae, x = simplex_vae(priors.Dirichlet(3, 2.0)), torch.randn(2, 3, dtype=torch.float64)
    line = torch.linspace(-25, 25, 301, dtype=torch.float64)
    points = torch.cartesian_prod(line, line).unsqueeze(1).expand(-1, 2, -1)
    with target_of(vae, x, start) as target:
        assert target.dim == 2
        mass = target(points).start.exp().sum(0) * (line[1] - line[0]) ** 2
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)
        u = target.draw(6)
        at, step = target(u), 1e-5
        for d in range(2):
            shift = step * torch.eye(2, dtype=torch.float64)[d]
            up, down = target(u + shift), target(u - shift)
            torch.testing.assert_close(
                at.start_gradient[..., d], (up.start - down.start) / (2 * step), rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(
                at.rise_gradient[..., d], (up.rise - down.rise) / (2 * step), rtol=1e-5, atol=1e-5
            )


def test_latents_of_any_shape_are_packed_and_unpacked_alike():
    def model(x):
        with data_plate(x):
            a = pyro.sample("a", dist.LogNormal(x.new_zeros(2), 1.0).to_event(1))
            with pyro.plate("parts", 3, dim=-2):
                b = pyro.sample("b", dist.Dirichlet(x.new_ones(3)))
                pyro.sample("x", dist.Normal(a.sum(-1) + b[..., 0], 1.0), obs=x.T)

    x = torch.randn(5, 3, dtype=torch.float64)
    with open_task(model, None, AnnealedImportanceSampling(), (x,), {}, 64e6, progress=False) as task:
        target = Target(task, Prior().single(task, "the test starts"))
        trace, _ = task.draw(7)
        prior, likelihood = task.score(trace, 7)
        u = target.pack(trace)
        assert u.shape == (7, 5, 2 + 3 * 2) == (7, 5, target.dim)
        # Densities in u are those of the latents times the volume of the maps, alike in both terms of the target.
        torch.testing.assert_close(target(u).rise, likelihood)
        a, b = trace.nodes["a"]["value"], trace.nodes["b"]["value"]
        simplex = (b.log().sum(-1) + 0.5 * math.log(3)).sum(1)
        torch.testing.assert_close(target(u).start, prior + a.log().sum(-1).squeeze(1) + simplex)


# ------------------------------------------------------------------------------------------------------- where it fails


class Forced(AnnealedImportanceSampling):
    """Takes steps that are far too long."""

    def _pilot(self, target, task):
        path = super()._pilot(target, task)
        longer = torch.tensor([1.0, 1.0, 300.0], dtype=torch.float64)
        return path._replace(step_sizes=path.step_sizes * longer)


def test_chains_that_diverge_are_counted_and_not_trusted():
    known = truth(2, 3, scale=0.1)
    vae, x = vae_of(known), known.marginal().sample((3,))
    estimate = log_marginal(vae.model, None, x, method=Forced(32, 150))
    diverged = estimate.diagnostics["diverged"]
    assert (diverged[:2] == 0).all() and diverged[2] > 0.9
    assert estimate.trusted.tolist() == [True, True, False]
    assert f"diverged: {diverged.mean().item():.1%} of moves, for 1 of 3 data" in str(estimate)
    assert "moves fail): 1 of 3 data. Take more temperatures, or UntilTrusted()." in str(estimate)


@each("method", [AnnealedImportanceSampling(64, 40), SequentialMonteCarlo(64, 16)])
def test_latents_that_cannot_have_made_the_data_do_no_harm(method):
    # Half of what the prior draws is impossible, and one of the data takes longer than the other.
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.3), obs=x)
            pyro.factor("positive", torch.where(z > 0, 0.0, -math.inf))

    x, normal = torch.tensor([0.3, 3.0], dtype=torch.float64), torch.distributions.Normal(0.0, 1.0)
    inside = normal.cdf(x / math.sqrt(1.09) / 0.3)  # the posterior is that of a normal with mean x / 1.09
    expected = torch.distributions.Normal(0.0, math.sqrt(1.09)).log_prob(x) + inside.log()
    estimate = log_marginal(model, None, x, method=method)
    assert ((estimate.value - expected).abs() < 4 * estimate.standard_error).all()
    with open_task(model, None, method, (x,), {}, 64e6, progress=False) as task:
        path = method._pilot(Target(task, Prior().single(task, "the test starts")), task)
    assert path.speeds[0].max() < 1000  # not that of an impossible draw


def test_a_datum_that_is_there_before_another_is_not_moved_by_an_impossible_draw():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Uniform(z - 2, z + 2, validate_args=False), obs=x)

    x, normal = torch.tensor([0.0, 4.0], dtype=torch.float64), torch.distributions.Normal(0.0, 1.0)
    expected = ((normal.cdf(x + 2) - normal.cdf(x - 2)) / 4).log()
    estimate = log_marginal(model, None, x, method=SequentialMonteCarlo(64, 32))
    assert ((estimate.value - expected).abs() < 4 * estimate.standard_error)[0]
    assert estimate.value.isfinite().all()


@pytest.mark.parametrize("right_first", [True, False])
def test_data_that_need_no_move_go_together_with_data_that_do(right_first):
    known = truth(2, 3)
    vae, x = vae_of(known), known.marginal().sample((4,))
    off = torch.tensor([0.0, 0.0, 4.0, 4.0] if right_first else [4.0, 4.0, 0.0, 0.0], dtype=torch.float64)

    def model(x, off):
        vae.model(x)

    def guide(x, off):
        with data_plate(x):
            q = vae.encode(x)
            loc = q.mean + off.unsqueeze(-1) * q.stddev
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=q.scale_tril))

    method = SequentialMonteCarlo(32, 16, start=Guide())
    estimate = log_marginal(model, guide, x, off, method=method, max_memory=1.0)  # each datum by itself
    assert torch.equal(estimate.diagnostics["acceptance"].isnan(), off == 0)
    assert estimate.trusted.all() and "moves accepted" in str(estimate)
    assert ((estimate.value - known.marginal().log_prob(x)).abs() < 5 * estimate.standard_error + 1e-6).all()


def test_a_single_temperature_is_importance_sampling_and_says_nothing_of_moves():
    known = truth(1, 2)
    vae, x = vae_of(known, widen=1.5), known.marginal().sample((5,))
    estimate = log_marginal(vae.model, vae.guide, x, method=AnnealedImportanceSampling(500, 1, start=Guide()))
    assert_unit_scores((estimate.value - known.marginal().log_prob(x)) / estimate.standard_error, FAILURE_RATE)
    assert estimate.trusted.all() and "moves accepted" not in str(estimate)
