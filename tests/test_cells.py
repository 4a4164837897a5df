"""Distributions of the cells of a table: normalised in own units, whatever scale, rounding, bounds and spikes."""

import math

import numpy as np
import pytest
import torch

from pyrovae.distributions import Classes, Columns, LogisticCells, Numbers, RoundedLogisticCells, Scales, mask_elements
from pyrovae.likelihoods import Tabular

M = 3

DENSITIES = {
    "real": Numbers(5.0, 2.0),
    "far real": Numbers(1e6, 2.0),
    "positive": Numbers(3.0, 1.5, shift=0.0),
    "positive with zeros": Numbers(3.0, 0.5, shift=0.0, spikes=(0.0, 20.0)),
    "bounded": Numbers(2.0, 1.0, low=0.0, high=5.0),
    "from zero": Numbers(1.5, 1.0, low=0.0),
    "from one on": Numbers(2.0, 0.5, low=1.0, spikes=(-9.0,)),
    "bounded with ends": Numbers(2.0, 1.0, low=0.0, high=5.0, spikes=(0.0, 5.0)),
}
ROUNDED = {
    "age": Numbers(38.0, 13.0, step=1.0),
    "cents around an origin": Numbers(0.0, 0.5, step=0.01, offset=0.004),
    "far integers": Numbers(1e6, 2.0, step=1.0),
    "hours": Numbers(40.0, 5.0, step=1.0, spikes=(40.0, 60.5)),
    "price": Numbers(1.0, 0.8, shift=0.0, step=0.5, low=0.5),
    "gain": Numbers(3.0, 0.3, shift=0.0, step=1.0, low=1.0, spikes=(0.0, 999.0)),
    "hours from zero": Numbers(20.0, 10.0, step=1.0, low=0.0, spikes=(40.0,)),
    "degrees, or -999": Numbers(20.0, 5.0, step=0.1, low=0.0, spikes=(-999.0,)),
    "stars": Numbers(3.0, 1.0, step=0.5, low=0.0, high=5.0),
    "count": Numbers(1.5, 0.8, shift=1.0, step=1.0, low=0.0, high=2.0**24 - 1),
}


def cells(column, rows=4, seed=0):
    """Random mixtures for one column, one a row."""
    torch.manual_seed(seed)
    kind = LogisticCells if column.step is None else RoundedLogisticCells
    scales = Scales([column])
    shape = (rows, 1, M)
    logits = torch.randn(rows, 1, M + scales.num_spikes)
    return kind(logits, torch.randn(shape), 0.5 * torch.randn(shape) - 1, scales)


def grid(column, rows):
    """All points of the grid that have a probability above 1e-7."""
    low = column.low if math.isfinite(column.low) else column.loc - 60 * column.scale
    high = min(column.high, column.loc + 60 * column.scale)
    if column.shift is not None:
        high = min(column.high, 200_000.0)
    k = np.arange(math.ceil((low - column.offset) / column.step), math.floor((high - column.offset) / column.step) + 1)
    x = torch.tensor(column.offset + k * column.step, dtype=torch.float32)
    extra = [s for s in column.spikes if not bool(((x - s).abs() < 1e-6).any())]
    return torch.cat([x, torch.tensor(extra)]).view(-1, 1, 1).expand(-1, rows, 1)


def density_integral(p, column, function=lambda x: torch.ones_like(x)):
    """The integral of function times the density, and the probabilities of spikes, in own units."""
    if column.shift is not None:  # in steps of log x
        end = min(column.loc + 60 * column.scale, 85)
        line = torch.linspace(column.loc - 60 * column.scale, end, 100_001, dtype=torch.float64)
        x, step = line.exp().float(), line[1] - line[0]
        weight = x.double() * step
    else:
        low = column.low if math.isfinite(column.low) else column.loc - 100 * column.scale
        high = column.high if math.isfinite(column.high) else column.loc + 100 * column.scale
        n = 100_000
        step = (high - low) / n
        x = (torch.arange(n).double() + 0.5).mul(step).add(low)
        x, weight = x.to(torch.float64 if abs(column.loc) > 1e5 else torch.float32), torch.full((n,), step).double()
    keep = ~torch.isin(x, torch.tensor(column.spikes, dtype=x.dtype))
    x, weight = x[keep], weight[keep]
    density = p.log_prob(x.view(-1, 1, 1)).double().exp()[..., 0]
    total = (density * (weight * function(x.double())).unsqueeze(-1)).sum(0)
    for spike in column.spikes:
        total = total + p.log_prob(torch.tensor([[spike]])).double().exp()[:, 0] * function(torch.tensor(spike))
    return total


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_in_own_units_integrate_to_one(name):
    column = DENSITIES[name]
    assert density_integral(cells(column), column).sub(1).abs().max() < 1e-4


@pytest.mark.parametrize("name", ROUNDED)
def test_probabilities_of_all_points_sum_to_one(name):
    column = ROUNDED[name]
    p = cells(column)
    x = grid(column, 4)
    total = p.log_prob(x).double().exp().sum(0)[:, 0]
    # What is above the grid: the upper tail of a logistic distribution.
    beyond = 0.0
    if column.high > 1e5 and column.shift is not None:
        last = (math.log(200_000.5 + column.shift) - column.loc) / column.scale
        weights = p.log_weights.exp()[:, 0, :M]
        beyond = (weights * torch.sigmoid((p.loc[:, 0] - last) / p.log_scale[:, 0].exp())).sum(-1)
    assert (total + beyond - 1).abs().max() < 1e-4


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_is_that_of_the_standardised_number_with_the_jacobian_of_its_scale(name):
    column = DENSITIES[name]
    p = cells(column)
    x = torch.tensor([[2.25]]) if column.loc < 10 else torch.tensor([[1e6 + 2.5]])
    g = x.item() if column.shift is None else math.log(x.item() + column.shift)
    u = (g - column.loc) / column.scale
    s, loc = p.log_scale[:, 0].double().exp().numpy(), p.loc[:, 0].double().numpy()
    weights = p.logits[:, 0].double().softmax(-1).numpy()
    cdf = lambda v: 1 / (1 + np.exp(-(v - loc) / s))  # noqa: E731
    density = np.exp(-(u - loc) / s) / s / (1 + np.exp(-(u - loc) / s)) ** 2
    if math.isfinite(column.low) and column.shift is None:
        density /= cdf((column.high - column.loc) / column.scale) - cdf((column.low - column.loc) / column.scale)
    jacobian = 1 / column.scale if column.shift is None else 1 / (column.scale * (x.item() + column.shift))
    expected = np.log((weights[:, :M] * density).sum(-1) * jacobian)
    np.testing.assert_allclose(p.log_prob(x)[:, 0].numpy(), expected, rtol=2e-5)


@pytest.mark.parametrize("name", ROUNDED)
def test_a_rounded_number_has_the_probability_of_its_interval(name):
    column = ROUNDED[name]
    p = cells(column)
    k = round((column.loc if column.shift is None else math.exp(column.loc)) / column.step) + 1
    x = column.offset + k * column.step
    g = (lambda v: v) if column.shift is None else (lambda v: np.log(v + column.shift))
    s, loc = p.log_scale[:, 0].double().exp().numpy(), p.loc[:, 0].double().numpy()
    cdf = lambda v: 1 / (1 + np.exp(-((g(v) - column.loc) / column.scale - loc) / s))  # noqa: E731
    parts = cdf(x + column.step / 2) - cdf(x - column.step / 2)
    weights = p.logits[:, 0].double().softmax(-1).numpy()
    probability = (weights[:, :M] * parts).sum(-1) + sum(
        weights[:, M + j] for j, spike in enumerate(column.spikes) if spike == x
    )
    np.testing.assert_allclose(p.log_prob(torch.tensor([[x]]))[:, 0].numpy(), np.log(probability), rtol=1e-4)


@pytest.mark.parametrize("name", DENSITIES | ROUNDED)
def test_samples_have_the_mean_and_the_probabilities_that_are_stated(name):
    column = (DENSITIES | ROUNDED)[name]
    p = cells(column, rows=1)
    torch.manual_seed(1)
    n = 40_000
    x = p.sample((n,))[:, 0, 0]
    assert bool(p.support.check(x.unsqueeze(-1)).all())
    for value in {*column.spikes, *x[:3].tolist()} if column.step is not None else column.spikes:
        share, probability = (x == value).float().mean().item(), p.log_prob(torch.tensor([[value]])).exp().item()
        assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / n) + 1e-6
    # The share below the median of the sample, by the integral or the sum of the density.
    cut = x.quantile(0.3).item() + (0.25 * column.step if column.step else 0.0)
    below = lambda v: (torch.as_tensor(v) < cut).double()  # noqa: E731
    if column.step is None:
        share = density_integral(p, column, below).item()
    else:
        points = grid(column, 1)
        share = (p.log_prob(points).double().exp() * below(points)).sum().item()
    assert abs((x < cut).double().mean().item() - share) < 5 * math.sqrt(share * (1 - share) / n) + 2e-4


@pytest.mark.parametrize("name", ["real", "positive with zeros", "bounded", "from zero", "bounded with ends"])
def test_means_are_those_of_the_density(name):
    column = DENSITIES[name]
    p = cells(column)
    expected = density_integral(p, column, lambda x: torch.as_tensor(x).double())
    torch.testing.assert_close(p.mean[:, 0].double(), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["age", "cents around an origin", "hours from zero", "stars"])
def test_means_of_rounded_numbers_are_within_half_a_step(name):
    column = ROUNDED[name]
    p, x = cells(column), grid(column, 4)
    expected = (p.log_prob(x).double().exp() * x.double()).sum(0)
    assert (p.mean - expected).abs().max() < 0.5 * column.step


def test_gradients_are_finite_at_every_value_of_the_support():
    for column in (DENSITIES | ROUNDED).values():
        scales = Scales([column])
        tensors = [
            torch.full((1, k), v, requires_grad=True) for k, v in ((M + scales.num_spikes, 0.3), (M, 5.0), (M, -9.0))
        ]
        kind = LogisticCells if column.step is None else RoundedLogisticCells
        p = kind(*tensors, scales)
        values = [*column.spikes, p.scales.typical.item(), *(v for v in (column.low, column.high) if math.isfinite(v))]
        values = [v for v in values if bool(p.support.check(torch.tensor([v])).all())]
        for value in [*values, *p.sample((20,)).flatten().tolist()]:
            log_prob = p.log_prob(torch.tensor([value])).sum()
            assert math.isfinite(log_prob.item()), (column, value)
            for gradient in torch.autograd.grad(log_prob, tensors, retain_graph=True):
                assert bool(gradient.isfinite().all()), (column, value)


def test_values_outside_a_column_are_refused():
    for name, bad in (
        ("positive", 0.0),
        ("bounded", 5.01),
        ("from zero", -0.01),
        ("age", 38.5),
        ("hours from zero", -1.0),
        ("count", -1.0),
        ("gain", 0.5),
        ("stars", 5.5),
    ):
        p = cells((DENSITIES | ROUNDED)[name])
        assert not bool(p.support.check(torch.tensor([bad])).any()), name
        with pytest.raises(ValueError, match="within the support"):
            type(p)(p.logits, p.loc, p.log_scale, p.scales, validate_args=True).log_prob(torch.tensor([bad]))


ROW = [DENSITIES["positive with zeros"], Classes(3), ROUNDED["age"], Classes(2), Classes(3), DENSITIES["bounded"]]


def test_a_row_is_the_product_of_its_cells_and_missing_cells_add_nothing():
    torch.manual_seed(0)
    likelihood = Tabular(2, ROW, num_components=M)
    p = likelihood(torch.randn(7, 2))
    x = p.sample()
    assert x.shape == (7, 6) and p.event_shape == (6,) and bool(p.support.check(x).all())
    each = p.base_dist.log_prob(x)
    torch.testing.assert_close(p.log_prob(x), each.sum(-1))
    mask = torch.tensor([True, True, False, True, False, True]).expand(7, 6)
    holes = torch.where(mask, x, torch.nan)
    torch.testing.assert_close(mask_elements(p, mask).log_prob(holes), each[:, [0, 1, 3, 5]].sum(-1))
    # Each column as alone.
    index = likelihood.index0.tolist()
    assert isinstance(p.base_dist, Columns)
    torch.testing.assert_close(each[:, index], p.base_dist.parts[0].log_prob(x[:, index]))


def test_probabilities_of_classes_sum_to_one_and_follow_their_column():
    likelihood = Tabular(1, [Classes(4), Classes(2), Classes(4)])
    p = likelihood(torch.zeros(1, 1)).base_dist
    rows = torch.cartesian_prod(torch.arange(4.0), torch.arange(2.0), torch.arange(4.0))
    assert p.log_prob(rows).sum(-1).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_likelihood_started_at_data_has_about_their_distribution():
    torch.manual_seed(0)
    target = Tabular(1, ROW, num_components=M)
    x = target(torch.zeros(4000, 1)).sample()
    x[torch.rand_like(x) < 0.2] = torch.nan
    likelihood = Tabular(1, ROW, num_components=6).start_at(x)
    p = likelihood(torch.zeros(4000, 1))
    drawn = p.sample()
    for d, cell in enumerate(ROW):
        seen = x[:, d][~x[:, d].isnan()]
        if isinstance(cell, Classes):
            shares = torch.stack([(seen == k).float().mean() for k in range(cell.num_classes)])
            start = torch.stack([(drawn[:, d] == k).float().mean() for k in range(cell.num_classes)])
            assert (shares - start).abs().max() < 5 * math.sqrt(0.25 / 3000 + 0.25 / 4000)
        else:  # the cumulative distribution at the quartiles; the mixture is only fitted roughly
            cuts = seen.quantile(torch.tensor([0.25, 0.5, 0.75]))
            here = (seen.unsqueeze(-1) <= cuts).float().mean(0)
            assert ((drawn[:, d : d + 1] <= cuts).float().mean(0) - here).abs().max() < 0.1
