"""A user's program, for the type checker: what the public interface returns. It is read, never run.

``assert_type`` fails the check where a result has another type, ``Any`` for example.
"""

from pathlib import Path

from pyro import distributions as dist
from torch import Tensor, nn
from typing_extensions import assert_type

import pyrovae
from pyrovae import VAE, bounds, data, encoders, estimators, fit, likelihoods, log_marginal, priors


def train_and_score(directory: Path) -> None:
    splits = data.load("digits")
    vae = VAE(priors.StandardNormal(8), likelihoods.Bernoulli(8, (1, 8, 8)), encoders.DiagonalNormal((1, 8, 8), 8))
    history = fit(vae.model, vae.guide, splits.train.x, loss=bounds.IWAE(num_particles=5), epochs=1)
    assert_type(history, pyrovae.History)
    estimate = log_marginal(
        vae.model, vae.guide, splits.test.x, method=estimators.ImportanceSampling(), num_samples=100
    )
    assert_type(estimate, pyrovae.Estimate)
    assert_type(pyrovae.log_weights(vae.model, vae.guide, splits.test.x, num_samples=3), Tensor)
    pyrovae.save(vae, directory / "weights.safetensors")
    assert_type(pyrovae.load(vae, directory / "weights.safetensors"), nn.Module)


def use(vae: VAE, x: Tensor) -> None:
    assert_type(vae.encode(x), dist.TorchDistribution)
    assert_type(vae.decode(x), dist.TorchDistribution)
    assert_type(vae.sample(3), Tensor)
    assert_type(vae.reconstruct(x), Tensor)
