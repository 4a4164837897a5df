"""What is trusted is right: stated errors against true ones, over the priors and likelihoods of the catalogue."""

import math
from functools import partial

import pytest
import torch
from cases import CASES, Z
from torch import nn

from pyrovae import VAE, encoders, likelihoods, log_marginal, priors
from pyrovae.estimators import Quadrature, UntilTrusted
from pyrovae.nn import MLP

NUM_DATA = 24
WITHIN = 1.3  # true errors over stated ones, root mean square over a model's data
QUADRATURE = 1e-3  # nats: differences below are those of quadrature
SMALL = partial(MLP, hidden=(8,))


def _models():
    """Yields names, and what builds priors and likelihoods of two real latents, each of the catalogue once."""
    for case in CASES:
        if case.context_dim or not case.density:
            continue
        if case.kind == "prior":
            is_real = getattr(case.build().support, "base_constraint", None) is torch.distributions.constraints.real
            # Exemplars leave out the datum's own, and Gaussian processes have a value for each datum.
            if is_real and case.name not in ("ExemplarPrior", "GaussianProcess"):
                yield case.name, case.build, partial(likelihoods.Bernoulli, Z, 4, SMALL)
        elif case.kind == "likelihood":
            yield case.name, partial(priors.StandardNormal, Z), case.build


MODELS = {name: (prior, likelihood) for name, prior, likelihood in _models()}  # functions: a test builds with its seed


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_stated_errors_are_true_wherever_trusted(name):
    torch.manual_seed(0)
    prior, likelihood = (build() for build in MODELS[name])
    vae = VAE(prior, likelihood, encoders.DiagonalNormal(likelihood.x_shape, Z, SMALL)).double().eval()
    for p in vae.likelihood.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.7)  # posteriors that are far from normal
    x = vae.sample(NUM_DATA)
    truth = log_marginal(vae.model, None, x, method=Quadrature(40_000), progress=False)
    found = log_marginal(vae.model, vae.guide, x, method=UntilTrusted(), progress=False)
    if (found.diagnostics["unseen"] > 0).any():  # it says that modes are missed, and so they are
        assert not found.trusted.any()
        assert (found.value - truth.value)[truth.trusted].median() < -0.05
        return
    known = truth.trusted & found.trusted
    assert known.sum() >= NUM_DATA / 2
    off = ((found.value - truth.value).abs() - QUADRATURE).clamp(min=0)
    z = (off / found.standard_error.clamp(min=1e-9))[known]
    # Were the errors exactly as stated, the mean square of n would pass WITHIN^2 by chance as chi-square tells.
    noise = 3 * math.sqrt(2 / len(z))
    assert z.square().mean().sqrt() <= WITHIN * math.sqrt(1 + noise), z
