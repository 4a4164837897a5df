"""The estimator in stages: exact answers, the stage that each datum needs, no bias, honest errors, budgets and order."""

import math
import time
from dataclasses import replace

import pyro
import pytest
import torch
from linear_gaussian import assert_fraction, assert_mean, truth, vae_of
from pyro import distributions as dist
from torch.utils.data import DataLoader, TensorDataset

from pyrovae import VAE, encoders, likelihoods, log_marginal, priors
from pyrovae.estimators import (
    CUBO,
    AnnealedImportanceSampling,
    Enumeration,
    Estimator,
    ImportanceSampling,
    Laplace,
    Prior,
    Quadrature,
    UntilTrusted,
)

ROUNDING = 1e-6  # of sums of tens of terms in double precision, under a Newton step from afar
ERRORS = 5  # standard errors: one test in a million fails by chance, were the weights' mean normal
FAILURE_RATE = 1e-6


def score(model, guide, *args, method=None, **kwargs):
    return log_marginal(model, guide, *args, method=method or UntilTrusted(), progress=False, **kwargs)


def test_an_exact_guide_serves_all_data():
    known = truth(3, 5)
    vae, x = vae_of(known), known.marginal().sample((9,))
    found = score(vae.model, vae.guide, x)
    torch.testing.assert_close(found.value, known.marginal().log_prob(x), rtol=0, atol=ROUNDING)
    assert (found.diagnostics["stage"] == 1).all()
    assert found.trusted.all()
    assert found.remedy == ""


def test_laplace_serves_where_the_guide_is_far_off():
    known = truth(3, 5)
    vae, x = vae_of(known, shift=4.0), known.marginal().sample((9,))
    found = score(vae.model, vae.guide, x)
    error = (found.value - known.marginal().log_prob(x)).abs()
    assert (error < ERRORS * found.standard_error + ROUNDING).all()
    assert (found.diagnostics["stage"] == 3).all()
    assert found.trusted.all()
    assert "ImportanceSampling from Laplace 9\nnot to be trusted: 0 of 9 data" in str(found)


class Sorts:
    """Data of three sorts, by the sign of their last column: the guide is right, is wrong, or no proposal is right.

    The latent z is N(0, 3^2), and the first column is z + N(0, 0.2^2), or |z| + N(0, 0.2^2) where the last is 2. Then
    the posterior has two separate modes.
    """

    EASY, HARD, IMPOSSIBLE = range(3)

    def __init__(self, sort):
        self.sort = torch.as_tensor(sort)
        self.x = torch.stack([torch.rand(len(self.sort)).double() + 2, self.sort.double()], dim=-1)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 3.0))
            mean = torch.where(x[:, 1] == self.IMPOSSIBLE, z.abs(), z)
            pyro.sample("x", dist.Normal(mean, 0.2), obs=x[:, 0])

    def guide(self, x):
        with pyro.plate("data", len(x)):
            easy, hard = x[:, 1] == self.EASY, x[:, 1] == self.HARD
            # Where there are two modes, it finds both, but is too wide for a small error.
            mean = torch.where(easy, x[:, 0], torch.where(hard, x[:, 0] - 1, torch.zeros(len(x)).double()))
            scale = torch.where(easy | hard, torch.full_like(mean, 0.22), torch.full_like(mean, 2.5))
            pyro.sample("z", dist.Normal(mean, scale))

    def truth(self):
        one_side = dist.Normal(torch.zeros(1).double(), math.sqrt(9.04)).log_prob(self.x[:, 0])
        return one_side + math.log(2) * (self.sort == self.IMPOSSIBLE)


def test_each_datum_goes_to_the_stage_that_it_needs():
    data = Sorts([0, 1, 2] * 20)
    found = score(data.model, data.guide, data.x, method=UntilTrusted())
    stage = found.diagnostics["stage"]
    assert (stage[data.sort == data.EASY] == 1).all()
    assert (stage[data.sort != data.EASY] == 3).all()
    # Laplace's approximation sees one of two modes, and its weights look perfect.
    hopeless = data.sort == data.IMPOSSIBLE
    assert (found.khat[hopeless] < 0.7).all()
    assert (found.trusted | hopeless).all()
    error = (found.value - data.truth()).abs()
    assert (error < ERRORS * found.standard_error)[~hopeless].all()
    torch.testing.assert_close(error[hopeless], torch.full((20,), math.log(2)).double(), rtol=0, atol=0.02)
    assert not found.trusted[hopeless].any()
    assert found.remedy == "Give it stages with more samples or temperatures."
