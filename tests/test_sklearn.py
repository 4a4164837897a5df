"""The estimator of scikit-learn: its contract, and log p(x) in the units of the data."""

import numpy as np
import pyro
import pytest
import torch
from scipy import integrate
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

from pyrovae import log_marginal
from pyrovae.sklearn import VariationalAutoencoder

FAST = {"max_iter": 3, "n_samples": 5, "hidden": (8,), "random_state": 0}


def test_it_keeps_the_contract_of_scikit_learn():
    check_estimator(VariationalAutoencoder(**FAST), on_skip=None)  # it skips a check of arrays on a GPU


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    x = np.random.RandomState(0).randn(300, 1)
    return np.concatenate([1000 + 30 * x, 0.01 * x**2, 7 + 0 * x], axis=1)


@pytest.fixture(scope="module")
def fitted(rows) -> VariationalAutoencoder:
    return VariationalAutoencoder(2, max_iter=20, n_samples=2000, random_state=0).fit(rows)


def test_scores_are_densities_in_the_units_of_the_columns():
    """The density of one column integrates to one, which it would not without the Jacobian of the scaling."""
    x = 1000 + 30 * np.random.RandomState(0).randn(200, 1)
    vae = VariationalAutoencoder(1, max_iter=10, n_samples=50, random_state=0).fit(x)
    grid, totals = np.linspace(400, 1600, 601)[:, None], []
    for seed in range(12):  # each integral is an unbiased estimate of 1, because a weight is unbiased at each x
        vae._seed = seed
        totals.append(integrate.trapezoid(np.exp(vae.score_samples(grid)), grid[:, 0]))
    assert abs(np.mean(totals) - 1) < 5 * np.std(totals, ddof=1) / np.sqrt(12) < 0.1


def test_scores_are_those_of_log_marginal(fitted, rows):
    scaled = torch.from_numpy((rows[:50] - fitted.mean_) / fitted.scale_)
    estimate = log_marginal(fitted.vae_.model, fitted.vae_.guide, scaled, num_samples=2000, progress=False)
    expected = estimate.value.numpy() - np.log(fitted.scale_).sum()
    found = fitted.score_samples(rows[:50])
    # Two independent estimates of the same numbers; the errors of one are known.
    z = (found - expected) / (np.sqrt(2) * estimate.standard_error.numpy() + 1e-9)
    assert np.abs(z).max() < 6 and fitted.scale_[2] == 1
    assert fitted.score(rows[:50]) == pytest.approx(found.mean())


def test_there_and_back_is_a_reconstruction(fitted, rows):
    z = fitted.transform(rows)
    x = fitted.inverse_transform(z)
    assert z.shape == (300, 2) and x.shape == rows.shape and z.dtype == x.dtype == np.float64
    assert ((x - rows) ** 2).mean(0)[0] < rows.var(0)[0]
    with torch.no_grad():
        again = fitted.vae_.decode(torch.from_numpy(z)).mean.numpy() * fitted.scale_ + fitted.mean_
    assert np.allclose(x, again)
    with pytest.raises(ValueError, match=r"latents of shape \(rows, 2\)"):
        fitted.inverse_transform(rows)


def test_samples_have_the_units_of_the_columns_and_a_seed(fitted, rows):
    x = fitted.sample(2000, random_state=1)
    assert np.array_equal(x, fitted.sample(2000, random_state=1)) and not np.array_equal(x, fitted.sample(2000))
    assert abs(x[:, 0].mean() - 1000) < 15 and 10 < x[:, 0].std() < 90
    with pytest.raises(ValueError, match="n_samples"):
        fitted.sample(0)


def test_a_fit_leaves_nothing_behind(rows):
    store, state = len(pyro.get_param_store()), torch.get_rng_state()
    vae = clone(VariationalAutoencoder(**FAST)).fit(rows)
    vae.score_samples(rows)
    assert len(pyro.get_param_store()) == store and torch.get_rng_state().equal(state)


def test_pipelines_and_searches_take_it():
    x = load_wine().data
    steps = make_pipeline(FunctionTransformer(np.log1p, feature_names_out="one-to-one"), VariationalAutoencoder(**FAST))
    search = GridSearchCV(steps, {"variationalautoencoder__n_components": [1, 2]}, cv=2, error_score="raise").fit(x)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.score_samples(x).shape == (178,)
    names = search.best_estimator_.get_feature_names_out()
    assert names[0] == "variationalautoencoder0"


@pytest.mark.parametrize(
    "name, value", [("n_components", 0), ("max_iter", 0), ("n_samples", 0), ("validation_fraction", 1.0)]
)
def test_parameters_out_of_range_are_named(name, value, rows):
    with pytest.raises(ValueError, match=name):
        VariationalAutoencoder(**{**FAST, name: value}).fit(rows)


@pytest.mark.parametrize("method", ["transform", "inverse_transform", "score_samples", "score"])
def test_an_estimator_that_is_not_fitted_says_so(method, rows):
    with pytest.raises(NotFittedError, match="fit"):
        getattr(VariationalAutoencoder(**FAST), method)(rows)
