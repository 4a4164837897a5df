"""Series of different lengths whose loops end with the longest of a batch, and series without a plate."""

from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import pyrovae
from pyrovae.bounds import ELBO, FIVO, IWAE
from pyrovae.estimators import (
    AnnealedImportanceSampling,
    ImportanceSampling,
    ParticleFilter,
    UntilTrusted,
    log_predictive,
)

STAY, STEP, NOISE = 0.8, 0.7, 0.6


def covariance(steps: int) -> Tensor:
    """That of the data of a series of so many steps."""
    difference = torch.eye(steps).double() - STAY * torch.eye(steps).double().roll(1, 0).tril(-1)
    path = torch.linalg.inv(difference) * STEP
    return path @ path.T + NOISE**2 * torch.eye(steps).double()


def exact(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.stack(
        [
            torch.distributions.MultivariateNormal(torch.zeros(int(n)).double(), covariance(int(n))).log_prob(row[:n])
            for row, n in zip(x, lengths, strict=True)
        ]
    )


def draws(lengths: Tensor) -> Tensor:
    x = torch.zeros(len(lengths), int(lengths.max())).double()
    for row, n in zip(x, lengths.tolist(), strict=True):
        row[:n] = torch.distributions.MultivariateNormal(torch.zeros(n).double(), covariance(n)).sample()
    return x


class Walk(nn.Module):
    """A random walk with noise, of as many steps as the longest series of a batch has."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5).double())

    def model(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("walk", self)
        with pyro.plate("series", len(x)):
            z = torch.zeros(len(x)).double()
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z{t}", dist.Normal(STAY * z, STEP))
                    pyro.sample(f"x{t}", dist.Normal(z, NOISE), obs=x[:, t])

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("walk", self)
        with pyro.plate("series", len(x)):
            z = torch.zeros(len(x)).double()
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=t < lengths):
                    loc = (1 - self.gain) * STAY * z + self.gain * x[:, t]
                    z = pyro.sample(f"z{t}", dist.Normal(loc, 0.6))


LENGTHS = torch.tensor([2, 3, 6, 4, 5, 1])


def within(value: Tensor, error: Tensor, expected: Tensor, by: float = 4.0) -> None:
    assert ((value - expected).abs() < by * error).all()


@pytest.mark.parametrize("method", [ImportanceSampling(4000), ParticleFilter(64, 50)], ids=["importance", "filter"])
def test_short_series_before_long_ones_are_scored(method):
    walk, x = Walk(), draws(LENGTHS)
    estimate = pyrovae.log_marginal(walk.model, walk.guide, x, LENGTHS, method=method, progress=False)
    within(estimate.value, estimate.standard_error, exact(x, LENGTHS))


def test_steps_of_short_series_before_long_ones_are_scored():
    walk, x = Walk(), draws(LENGTHS)
    steps = log_predictive(walk.model, walk.guide, x, LENGTHS, method=ParticleFilter(64, 50))
    within(steps.value.sum(1), steps.standard_error.norm(dim=1), exact(x, LENGTHS))


@pytest.mark.parametrize("loss", [ELBO, partial(IWAE, 4), partial(FIVO, 4)], ids=["ELBO", "IWAE", "FIVO"])
def test_a_bound_takes_batches_with_other_sites(loss):
    """A bound that has seen other batches is one that has not, to the bit."""
    walk, x = Walk(), draws(LENGTHS)
    used = loss()
    for rows in ([0, 1], [2, 3], [4, 5], [1, 0], [2]):
        batch = x[rows], LENGTHS[rows]
        state = torch.get_rng_state()
        terms = used.terms(walk.model, walk.guide, *batch)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        new = loss().terms(walk.model, walk.guide, *batch)
        torch.testing.assert_close(terms.loss, new.loss, rtol=0, atol=0)
        assert terms.named.keys() == new.named.keys()
        assert torch.equal(torch.get_rng_state(), after)  # the inspection of the new sites draws no number


@pytest.mark.parametrize("loss", [Trace_ELBO, ELBO, partial(FIVO, 4)], ids=["Trace_ELBO", "ELBO", "FIVO"])
def test_it_trains_on_batches_of_different_lengths(loss):
    """The mean of an epoch, and of each of its parts, is that of its batches."""
    x, losses = draws(LENGTHS), []
    walk = Walk()
    fit = partial(pyrovae.fit, epochs=4, batch_size=2, progress=False)
    history = fit(walk.model, walk.guide, (x, LENGTHS), loss=loss(), optimizer=partial(torch.optim.SGD, lr=0.0))
    for _ in range(30):
        batch = torch.randperm(len(x))
        with torch.no_grad():
            losses += [loss().loss(walk.model, walk.guide, x[rows], LENGTHS[rows]) / 2 for rows in batch.view(3, 2)]
    expected = torch.tensor(losses)
    error = expected.std() * (1 / 12 + 1 / len(expected)) ** 0.5
    assert abs(sum(history["loss"]) / 4 - expected.mean()) < 4 * error
    for record in history.records:  # the parts that are sums over all latents
        if "reconstruction" in record and "kl" in record:
            assert record["loss"] == pytest.approx(record["kl"] - record["reconstruction"])


def test_killed_and_resumed_it_ends_on_the_same_bits(tmp_path):
    x = draws(LENGTHS)

    def run(epochs: int, name: str) -> tuple[Tensor, list]:
        walk = Walk()
        pyro.clear_param_store()
        if not (tmp_path / name).exists():
            pyro.set_rng_seed(1)
        history = pyrovae.fit(
            walk.model,
            walk.guide,
            (x, LENGTHS),
            loss=FIVO(4),
            epochs=epochs,
            batch_size=2,
            checkpoint=tmp_path / name,
            resume=True,
            progress=False,
        )
        return walk.gain.detach(), history["loss"]

    gain, losses = run(4, "whole")
    run(2, "parts")
    again, resumed = run(4, "parts")
    assert torch.equal(gain, again)
    assert losses == resumed


@pytest.mark.parametrize("loss", [ELBO, partial(IWAE, 4), partial(FIVO, 4)], ids=["ELBO", "IWAE", "FIVO"])
def test_sites_that_come_at_random_are_refused(loss):
    walk, x = Walk(), draws(LENGTHS)

    def length() -> Tensor:
        return LENGTHS[:2].clamp(max=1 + int(torch.randint(3, ())))

    def model(x: Tensor) -> None:
        walk.model(x, length())

    def guide(x: Tensor) -> None:
        walk.guide(x, length())

    bound = loss()
    with pytest.raises(ValueError, match="change from run to run|The guide"):
        for _ in range(20):
            bound.terms(model, guide, x[:2])


class Packed(Walk):
    """Takes data that were cut to the longest series, and these packed, as recurrent networks take them."""

    def guide(self, x: Tensor, lengths: Tensor, packed: PackedSequence) -> None:
        rows = pad_packed_sequence(packed, batch_first=True)[0].squeeze(-1)
        pyro.module("walk", self)
        with pyro.plate("series", len(x)):
            z = torch.zeros(len(x)).double()
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z{t}", dist.Normal((STAY * z + rows[:, t]) / 2, 0.6))

    def model(self, x: Tensor, lengths: Tensor, packed: PackedSequence) -> None:
        pyro.module("walk", self)
        with pyro.plate("series", len(x)):
            z = torch.zeros(len(x)).double()
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z{t}", dist.Normal(STAY * z, STEP))
                    pyro.sample(f"x{t}", dist.Normal(z, NOISE), obs=x[:, t])


@pytest.mark.parametrize("method", [ImportanceSampling(4000), ParticleFilter(64, 50)], ids=["importance", "filter"])
def test_packed_series_that_cannot_be_scored_apart_are_scored_together(method):
    lengths = LENGTHS.sort(descending=True).values
    walk, x = Packed(), draws(lengths)
    packed = pack_padded_sequence(x.unsqueeze(-1), lengths, batch_first=True)
    estimate = pyrovae.log_marginal(walk.model, walk.guide, x, lengths, packed, method=method, progress=False)
    within(estimate.value, estimate.standard_error, exact(x, lengths))


class Single(nn.Module):
    """One series, in no plate."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5).double())

    def model(self, x: Tensor) -> None:
        pyro.module("single", self)
        z = torch.zeros(()).double()
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z{t}", dist.Normal(STAY * z, STEP))
            pyro.sample(f"x{t}", dist.Normal(z, NOISE), obs=x[t])

    def guide(self, x: Tensor) -> None:
        pyro.module("single", self)
        z = torch.zeros(()).double()
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z{t}", dist.Normal((1 - self.gain) * STAY * z + self.gain * x[t], 0.6))


NO_PLATE = "model and guide have no plate, so that all that they are given is one datum"


@pytest.mark.parametrize(
    "method",
    [ImportanceSampling(4000), ParticleFilter(64, 50), UntilTrusted(), AnnealedImportanceSampling()],
    ids=["importance", "filter", "until trusted", "annealing"],
)
def test_a_series_without_a_plate_is_one_datum(method):
    single, x = Single(), draws(torch.tensor([9]))
    with pytest.warns(UserWarning, match=NO_PLATE):
        estimate = pyrovae.log_marginal(single.model, single.guide, x[0], method=method, progress=False)
    assert estimate.value.shape == (1,)
    within(estimate.value, estimate.standard_error, exact(x, torch.tensor([9])))
    assert "a datum" not in str(estimate)
    assert "nan" not in str(estimate)


def test_bounds_take_a_series_without_a_plate():
    single, x = Single(), draws(torch.tensor([9]))
    truth = exact(x, torch.tensor([9])).item()
    for bound in (IWAE(2000), FIVO(2000)):
        with pytest.warns(UserWarning, match=NO_PLATE):
            values = [-bound.loss(single.model, single.guide, x[0]) for _ in range(20)]
        values = torch.tensor(values)
        log_mean = values.logsumexp(0) - torch.tensor(20.0).log()  # the exponentials are unbiased
        assert abs(log_mean - truth) < 4 * (values - log_mean).exp().std() / 20**0.5


def test_training_does_not_shuffle_the_steps_of_a_series():
    single, x = Single(), draws(torch.tensor([12]))[0]
    for loss in (Trace_ELBO(), ELBO()):
        with pytest.raises(ValueError, match="a site for each row of the data and no plate.*batch_size=len"):
            pyrovae.fit(single.model, single.guide, x, loss=loss, batch_size=4, epochs=1, progress=False)
    history = pyrovae.fit(single.model, single.guide, x, batch_size=12, epochs=3, progress=False)
    assert len(history) == 3


def test_a_picture_of_forecasts_shows_quantiles_of_the_draws(tmp_path):
    x, draws = torch.randn(2, 8, 3), torch.randn(50, 2, 4, 3)
    figure = pyrovae.plots.forecasts(x, draws, draws[0], shares=(0.8,), path=tmp_path / "fan.png")
    assert len(figure.axes) == 6
    assert (tmp_path / "fan.png").stat().st_size > 1000
    ax = figure.axes[4]  # the second series, the second element
    past, median, came = (torch.as_tensor(line.get_ydata()) for line in ax.lines)
    torch.testing.assert_close(past, x[1, :, 1])
    torch.testing.assert_close(came, draws[0, 1, :, 1])
    torch.testing.assert_close(median, draws[:, 1, :, 1].double().median(0).values)
    corners = torch.as_tensor(ax.collections[0].get_paths()[0].vertices)
    for quantile in (0.1, 0.9):
        for step, value in enumerate(draws[:, 1, :, 1].double().quantile(quantile, dim=0)):
            assert (corners - torch.stack([torch.tensor(8.0 + step).double(), value])).norm(dim=1).min() < 1e-6


def test_series_of_numbers_have_a_panel_each():
    x, draws = torch.randn(3, 8), torch.randn(50, 3, 4)
    axes = pyrovae.plots.forecasts(x, draws).axes
    assert len(axes) == 3
    torch.testing.assert_close(torch.as_tensor(axes[2].lines[0].get_ydata()), x[2])
    assert len(axes[2].lines) == 2  # nothing came yet


@pytest.mark.parametrize(
    ("x", "draws", "match"),
    [
        ((2, 8), (50, 3, 4), "x and draws must have shapes"),
        ((2, 8), (50, 2, 4, 1), "x and draws must have shapes"),
        ((2, 8, 3), (50, 2, 4, 2), "x and draws must have shapes"),
    ],
)
def test_forecasts_of_other_shapes_are_refused(x, draws, match):
    with pytest.raises(ValueError, match=match):
        pyrovae.plots.forecasts(torch.randn(x), torch.randn(draws))
    with pytest.raises(ValueError, match="actual must have the shape"):
        pyrovae.plots.forecasts(torch.randn(2, 8), torch.randn(5, 2, 4), torch.randn(2, 3))
    with pytest.raises(ValueError, match="shares must be between 0 and 1"):
        pyrovae.plots.forecasts(torch.randn(2, 8), torch.randn(5, 2, 4), shares=(90,))


def test_a_picture_of_gaps_shows_quantiles_between_observed_steps(tmp_path):
    x, draws = torch.randn(2, 8, 3), torch.randn(50, 2, 8, 3)
    mask = torch.ones(2, 8).bool()
    mask[1, 3:5] = False
    figure = pyrovae.plots.imputations(x, mask, draws, x, shares=(0.8,), path=tmp_path / "gap.png")
    assert (tmp_path / "gap.png").stat().st_size > 1000
    assert len(figure.axes) == 6
    seen, median, hidden = (torch.as_tensor(line.get_ydata()) for line in figure.axes[4].lines)
    assert torch.equal(seen.isnan(), ~mask[1])
    torch.testing.assert_close(seen[mask[1]], x[1, mask[1], 1].double())
    inside = torch.arange(8).ge(2) & torch.arange(8).le(5)
    assert torch.equal(median.isnan(), ~inside)
    torch.testing.assert_close(median[[2, 5]], x[1, [2, 5], 1].double())
    torch.testing.assert_close(median[3:5], draws[:, 1, 3:5, 1].double().median(0).values)
    torch.testing.assert_close(hidden[inside], x[1, inside, 1].double())
    corners = torch.as_tensor(figure.axes[4].collections[0].get_paths()[0].vertices)
    for quantile in (0.1, 0.9):
        for step, value in enumerate(draws[:, 1, 3:5, 1].double().quantile(quantile, dim=0)):
            assert (corners - torch.stack([torch.tensor(3.0 + step).double(), value])).norm(dim=1).min() < 1e-6
    with pytest.raises(ValueError, match="x, mask and draws must have shapes"):
        pyrovae.plots.imputations(x, mask[:, :4], draws)
    with pytest.raises(ValueError, match="actual must have the shape of x"):
        pyrovae.plots.imputations(x, mask, draws, x[:, :4])
