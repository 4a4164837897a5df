"""Data with NaN: programs that fill it in train and are scored; all others are refused by name."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyrovae import VAE, encoders, fit, likelihoods, log_marginal, priors
from pyrovae.diagnostics import gaps
from pyrovae.estimators import AnnealedImportanceSampling, UntilTrusted

DIM, LATENT = 3, 2


class Own(nn.Module):
    """A program of a user's own: a factor analysis whose model masks what is missing, and whose guide is told of it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(2 * DIM, 2 * LATENT), nn.Linear(LATENT, DIM)

    def model(self, x: Tensor) -> None:
        pyro.module("own", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), LATENT), 1.0).to_event(1))
            p = dist.Normal(self.decoder(z), 1.0)
            pyro.sample("x", p.mask(~x.isnan()).to_event(1), obs=x.nan_to_num())

    def guide(self, x: Tensor) -> None:
        pyro.module("own", self)
        loc, scale = self.encoder(torch.cat([x.nan_to_num(), x.isnan().float()], dim=-1)).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    def forgetful_model(self, x: Tensor) -> None:
        """Masks what is missing, but observes NaN there, which is in the gradient."""
        pyro.module("own", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), LATENT), 1.0).to_event(1))
            with poutine.mask(mask=~x.isnan().any(-1)):
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def log_p(self, x: Tensor) -> Tensor:
        w, b, found = self.decoder.weight.detach().double(), self.decoder.bias.detach().double(), []
        for row in x.double():
            at = ~row.isnan()
            covariance = torch.eye(int(at.sum()), dtype=torch.float64) + w[at] @ w[at].T
            found.append(
                dist.MultivariateNormal(b[at], covariance).log_prob(row[at]) if at.any() else row.new_zeros(())
            )
        return torch.stack(found)


@pytest.fixture
def own() -> Own:
    pyro.set_rng_seed(0)
    return Own()


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, DIM, generator=generator)
    x[torch.rand(60, DIM, generator=generator) < 0.3] = math.nan
    return x


@pytest.mark.parametrize("kind", ["tensor", "array", "loader"])
def test_a_program_that_fills_nan_in_is_trained_and_scored(kind, own, x):
    data = {"tensor": x, "array": x.double().numpy(), "loader": DataLoader(TensorDataset(x), 20)}[kind]
    history = fit(own.model, own.guide, data, epochs=30, batch_size=20, validation=data, progress=False)
    assert np.isfinite([*history["loss"], *history["validation"]]).all()
    given = x if kind == "loader" else data
    for method in (None, UntilTrusted(), AnnealedImportanceSampling()):
        options = {"num_samples": 2000} if method is None else {"method": method}
        found = log_marginal(own.model, own.guide, given, progress=False, **options)
        error = (found.value.double() - own.log_p(x)).mean()
        assert abs(error) < 4 * found.standard_error.square().sum().sqrt() / len(x) + 1e-6


def test_diagnostics_take_what_a_program_fills_in(own, x):
    assert gaps(own.model, own.guide, x[:20], progress=False).test.estimate.value.isfinite().all()


def test_a_transform_may_fill_in(x):
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, DIM), encoders.DiagonalNormal(DIM, 2))
    losses = [
        fit(vae.model, vae.guide, given, epochs=1, transform=torch.nan_to_num, progress=False)["loss"]
        for given in (x, DataLoader(TensorDataset(x), 20))
    ]
    assert np.isfinite(losses).all()
    with pytest.raises(ValueError, match=r"data holds NaN or infinity in \d+ of 60 rows"):
        fit(vae.model, vae.guide, x, epochs=1, progress=False)


def test_nan_that_only_a_mask_hides_is_refused(own, x):
    with pytest.raises(ValueError, match="data holds NaN or infinity .* or fill the missing values"):
        fit(own.forgetful_model, own.guide, x, epochs=1, progress=False)
    with pytest.raises(ValueError, match="argument 1 holds NaN or infinity"):
        log_marginal(own.forgetful_model, own.guide, x, progress=False)


@pytest.mark.parametrize("kind", ["tensor", "array", "loader"])
def test_infinity_is_refused_all_the_same(kind, own, x):
    x[50, 1] = math.inf
    data = {"tensor": x, "array": x.double().numpy(), "loader": DataLoader(TensorDataset(x), 20)}[kind]
    with pytest.raises(ValueError, match="data holds NaN or infinity"):
        fit(own.model, own.guide, data, epochs=2, progress=False)


def test_a_single_row_with_nan_is_enough_to_ask(own, x):
    x = x.nan_to_num()
    x[59, 0] = math.nan
    fit(own.model, own.guide, x, epochs=1, progress=False)
    with pytest.raises(ValueError, match="data holds NaN or infinity in 1 of 60 rows, the first of them row 59"):
        fit(own.forgetful_model, lambda x: own.guide(x.sum() + x), x, epochs=1, progress=False)
