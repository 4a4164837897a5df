"""Comparisons of two models: error bars that cover what they should, and what is refused."""

import math
import re
from dataclasses import replace

import pytest
import scipy.stats
import torch
from linear_gaussian import assert_fraction, truth, vae_of
from torch.utils.data import DataLoader, TensorDataset

from pyrovae import log_marginal, plots
from pyrovae.estimators import CUBO, ImportanceSampling, compare, compare_all

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
        "6 data are too few to say which is better for others\n"
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


@pytest.mark.parametrize("at_once", [True, False])
def test_other_data_are_told(at_once):
    known = truth(2, 4)
    x = known.marginal().sample((6,))
    found, other = score(known, x), x.clone()
    other[2:4] = x[[3, 2]]

    def again(data):
        loader = DataLoader(TensorDataset(data), batch_size=3)
        return score(known, data.unflatten(1, (2, 2)).flatten(1).float() if at_once else loader)

    compare(found, again(x))
    with pytest.warns(UserWarning, match="other numbers for 2 of 6 data, at row 2 first"):
        compare(found, again(other))


def estimates_of(*values):
    known = truth(2, 4)
    found = score(known, known.marginal().sample((len(values[0]),)), 50)
    return [replace(found, value=v, standard_error=torch.full_like(v, 0.1), khat=torch.zeros_like(v)) for v in values]


@pytest.mark.parametrize(("shift", "size"), [(0.1, 12), (0.3, 40), (-0.4, 200), (9.0, 15)])
def test_the_probability_is_that_of_the_t_test(shift, size):
    differences = torch.randn(size).double() + shift
    found = compare(*estimates_of(differences, torch.zeros(size).double()))
    expected = scipy.stats.ttest_1samp(differences.numpy(), 0.0, alternative="greater").pvalue
    assert found.probability == pytest.approx(1 - expected, abs=1e-6)
    better = "a" if found.difference > 0 else "b"
    verdict = found._replace(names=("a", "b")).verdict
    sure = max(expected, 1 - expected)
    clear = f"{better} is better by {abs(found.difference):.3f} nats a datum, with a probability of "
    assert verdict.startswith(clear if sure >= 0.975 else f"not clear which is better: {better} is with a")


def test_the_better_model_is_found_as_often_as_the_probability_says():
    known, other = truth(2, 4), truth(2, 4)
    other = known._replace(scale=1.08 * known.scale)
    groups, size = 300, 30
    x = known.marginal().sample((groups * size,))
    first, second = score(known, x), score(other, x)
    divergence = torch.distributions.kl_divergence(known.marginal(), other.marginal()).item()
    levels = []
    for i in range(groups):
        group = slice(i * size, (i + 1) * size)
        found = compare(rows(first, group), rows(second, group))
        # What the difference is measured against is the true one, so that the probability is uniform.
        levels.append(found._replace(difference=found.difference - divergence).probability)
    inside = sum(0.025 < level < 0.975 for level in levels)
    assert_fraction(inside, groups, 0.95, FAILURE_RATE)


def test_several_models_are_ranked_in_eighty_columns():
    low, high = torch.randn(20).double() - 100000, torch.randn(20).double()
    names = ["a", "b" * 60, "c"]
    ranking = compare_all(dict(zip(names, estimates_of(low, high, high - 0.5), strict=True)))
    assert list(ranking.estimates) == [names[1], "c", "a"]
    assert [pair.names for pair in ranking.pairs] == [(names[1], "c"), (names[1], "a"), ("c", "a")]
    text = str(ranking)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.splitlines()[1].startswith(f" 1. ...{'b' * 25}  ")
    assert [len(line.split()) for line in text.splitlines()[:4]] == [6, 6, 6, 6] and len(
        re.findall("over 99.9 %", text)
    ) == 3
    with pytest.raises(ValueError, match="at least two models, got 1"):
        compare_all({"a": ranking.estimates["a"]})
    with pytest.raises(ValueError, match="a has 20 data and b 10"):
        compare_all({"a": ranking.estimates["a"], "b": rows(ranking.estimates["c"], slice(10))})


def test_the_picture_shows_values_and_differences(tmp_path):
    first, second = estimates_of(torch.arange(20.0).double(), torch.arange(20.0).double() - 1)
    first = replace(first, khat=torch.tensor([0.0] * 19 + [1.0]))
    found = compare(first, second, names=("one", "two"))
    figure = found.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    left, right = figure.axes
    trusted, untrusted = (dots.get_offsets() for dots in left.collections)
    assert len(trusted) == 19 and untrusted.tolist() == [[18.0, 19.0]]
    assert sum(bar.get_height() for bar in right.patches if bar.get_height() != 1) == 20
    assert left.get_xlabel() == "log p(x) of two (nats)" and right.get_xlabel() == "one less two (nats)"
    assert len(compare_all({"a": first, "b": second, "c": second}).plot().axes) == 6
    with pytest.raises(ValueError, match="pairs is empty"):
        plots.comparisons([])
