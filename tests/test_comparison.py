"""Comparisons of two models: error bars that cover what they should, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from linear_gaussian import assert_fraction, truth, vae_of

from pyrovae import log_marginal
from pyrovae.estimators import CUBO, ImportanceSampling, compare

FAILURE_RATE = 1e-4


def score(known, x, num_samples=100, method=None):
    vae = vae_of(known, widen=1.3)
    method = ImportanceSampling(num_samples) if method is None else method
    return log_marginal(vae.model, vae.guide, x, method=method, progress=False)


def rows(estimate, taken):
    columns = {name: getattr(estimate, name)[taken] for name in ("value", "standard_error", "ess", "khat")}
    return replace(estimate, **columns)


def test_both_errors_cover_the_truth():
    data_of, other = truth(2, 4), truth(2, 4)
    groups, size = 300, 40
    x = data_of.marginal().sample((groups * size,))
    exact = data_of.marginal().log_prob(x) - other.marginal().log_prob(x)
    first, second = score(data_of, x), score(other, x)
    # The mean over all data from the model is the Kullback-Leibler divergence.
    everywhere = torch.distributions.kl_divergence(data_of.marginal(), other.marginal()).item()
    of_samples = of_data = 0
    for i in range(groups):
        group = slice(i * size, (i + 1) * size)
        found = compare(rows(first, group), rows(second, group))
        of_samples += abs(found.difference - exact[group].mean().item()) < 1.96 * found.sampling_error
        # 2.02 is the 97.5 % quantile of Student's t distribution with 39 degrees of freedom.
        of_data += abs(found.difference - everywhere) < 2.02 * found.data_error
    assert_fraction(of_samples, groups, 0.95, FAILURE_RATE)
    assert_fraction(of_data, groups, 0.95, FAILURE_RATE)


def test_pairing_makes_the_error_smaller():
    known = truth(2, 4)
    x = known.marginal().sample((500,))
    first = score(known, x, 1000)
    found = compare(first, score(known._replace(scale=0.55), x, 1000))
    assert found.data_error < 0.3 * first.value.std().item() / math.sqrt(500)


def test_it_prints_both_errors_and_what_is_not_trusted():
    known = truth(2, 4)
    x = known.marginal().sample((6,))
    first = score(known, x, 50)
    first = replace(first, value=torch.zeros(6), standard_error=torch.full((6,), 0.3))
    second = replace(first, value=torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -2.0]), khat=torch.tensor([0.0] * 5 + [0.9]))
    first = replace(first, khat=torch.zeros(6))
    assert str(compare(first, second)) == (
        "log p(x) of the first less the second: -0.500 nats a datum (standard error: 0.173 from samples, 0.500 from "
        "6 data); the first is higher for 1\n"
        "not to be trusted in one or both, so that the errors may be too small: 1 data"
    )


def test_a_single_datum_has_no_error_from_data():
    found = score(truth(2, 4), torch.zeros(1, 4).double())
    assert math.isnan(compare(found, found).data_error)


def test_what_cannot_be_compared_is_refused():
    known = truth(2, 4)
    x = known.marginal().sample((6,))
    found = score(known, x)
    with pytest.raises(ValueError, match="first has 6 data and second 5: give estimates of the same data"):
        compare(found, rows(found, slice(5)))
    with pytest.raises(ValueError, match=r"second is an upper bound of log p\(x\), by CUBO"):
        compare(found, score(known, x, method=CUBO(100)))
    value = found.value.clone()
    value[3] = -math.inf
    with pytest.raises(ValueError, match=r"of second is -inf for 1 data, at row 3 of the data"):
        compare(found, replace(found, value=value))
