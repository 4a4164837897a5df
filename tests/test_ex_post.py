"""Priors fitted after training, compared with closed forms of linear-Gaussian models."""

import copy
import math
from functools import partial

import pyro
import pytest
import torch
from helpers import assert_same
from linear_gaussian import truth, vae_of
from pyro import poutine
from torch import Tensor

from pyrovae import (
    VAE,
    bounds,
    data,
    encoders,
    fit,
    fit_prior,
    likelihoods,
    load,
    log_marginal,
    log_weights,
    priors,
    save,
    structures,
)
from pyrovae.estimators import ImportanceSampling
from pyrovae.nn import MLP

SMALL = partial(MLP, hidden=(8,))
quick = partial(fit_prior, progress=False)


def small_vae(**changes) -> VAE:
    parts = {
        "prior": priors.StandardNormal(2),
        "likelihood": likelihoods.Normal(2, 3, SMALL),
        "encoder": encoders.DiagonalNormal(3, 2, SMALL),
    }
    return VAE(**parts | changes)


def test_a_normal_prior_takes_the_moments_of_the_aggregate_posterior():
    """Of independent normals the optimum has the mean and variances of q(z), the mean of all q(z | x_n)."""
    known = truth(2, 4)
    vae, x = vae_of(known), 1.5 * known.marginal().sample((200,)) + 1.0  # not data of the model
    q = vae.encode(x)
    mean, variance = q.mean.mean(0), q.variance.mean(0) + q.mean.var(0, correction=0)
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=400)
    options = {"epochs": 400, "batch_size": 200, "optimizer": partial(torch.optim.Adam, lr=0.05), "scheduler": schedule}
    p = quick(vae, x, priors.DiagonalNormal(2).double(), **options).prior()
    # A gradient sees one draw of z for each datum: of 200 draws, the mean has a standard error of sd(q) / sqrt(200),
    # and the variance, of data that stay, one below that of 200 free normal draws. The fit averages over epochs.
    assert ((p.mean - mean).abs() < 4 * (q.variance.mean(0) / 200).sqrt()).all()
    assert ((p.variance / variance - 1).abs() < 4 * math.sqrt(2 / 200)).all()


def test_the_bound_rises_by_the_change_of_log_p_of_z():
    vae, x = small_vae(), torch.randn(60, 3)
    fit(vae.model, vae.guide, x, epochs=3, progress=False)
    before = {name: t.clone() for name, t in vae.state_dict().items()}
    prior = priors.GaussianMixture(2, 3)
    start = copy.deepcopy(prior.state_dict())
    made = quick(vae, x, prior, epochs=40, batch_size=20, optimizer=partial(torch.optim.Adam, lr=0.03))
    assert_same(dict(vae.state_dict()), before)
    assert_same(dict(prior.state_dict()), dict(start))
    for part in ("likelihood", "encoder"):
        assert_same(dict(getattr(made, part).state_dict()), dict(getattr(vae, part).state_dict()))
    assert all(p.requires_grad for p in made.parameters())

    found = []
    for v in (vae, made):
        pyro.set_rng_seed(0)
        found.append(log_weights(v.model, v.guide, x, num_samples=200))
    pyro.set_rng_seed(0)
    z = poutine.trace(vae.guide)
    with torch.no_grad(), pyro.plate("samples", 200, dim=-2):
        z = z.get_trace(x).nodes["z"]["value"]
        change = made.prior().log_prob(z) - vae.prior().log_prob(z)
    # Sums of some ten terms of size ten, in single precision.
    torch.testing.assert_close(found[1] - found[0], change, rtol=0, atol=1e3 * torch.finfo(torch.float32).eps)
    assert change.mean() > 0, "a mixture holds the standard normal, and the draws are of the data that it was fitted to"


def test_the_pseudo_inputs_of_a_vamp_prior_move_and_its_encoder_stays():
    vae, x = small_vae(), torch.randn(60, 3)
    prior = priors.VampPrior(vae.encoder, 5, bounds=None)
    made = quick(vae, x, prior, epochs=3, batch_size=20)
    assert made.prior.encoder is made.encoder
    assert_same(dict(made.encoder.state_dict()), dict(vae.encoder.state_dict()))
    assert not torch.equal(made.prior.raw_inputs, prior.raw_inputs)


def test_contexts_transforms_and_validation_are_those_of_fit():
    vae = small_vae(encoder=encoders.DiagonalNormal(3, 2, SMALL, context_dim=4))
    x, context, seen = torch.randn(60, 3), torch.randn(60, 4), []

    def transform(x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(x))
        return x + 1.0, context

    prior = priors.GaussianMixture(2, 3, SMALL, context_dim=4)
    options = {"validation": (x[:10], context[:10]), "patience": 2, "epochs": 3, "batch_size": 20}
    made = quick(vae, (x, context), prior, transform=transform, **options)
    assert seen and made.prior.context_dim == 4
    assert made.sample(5, context[:2]).shape == (5, 2, 3)


def test_a_fitted_prior_is_saved_with_its_vae(tmp_path):
    made = quick(small_vae(), torch.randn(60, 3), priors.GaussianMixture(2, 3), epochs=1)
    save(made, tmp_path / "made.safetensors")
    again = load(tmp_path / "made.safetensors")
    assert_same(dict(again.state_dict()), dict(made.state_dict()))


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "takes no loss", lambda x: quick(small_vae(), x, priors.GaussianMixture(2), loss=bounds.ELBO())),
        (ValueError, "prior has no parameters to fit", lambda x: quick(small_vae(), x, priors.StandardNormal(2))),
        (ValueError, "must agree on latent_dim", lambda x: quick(small_vae(), x, priors.GaussianMixture(3))),
        (TypeError, "vae must be a VAE of one level", lambda x: quick(two_levels(), x, priors.GaussianMixture(2))),
    ],
)
def test_what_cannot_be_fitted_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.randn(20, 3))


def two_levels() -> structures.HierarchicalVAE:
    qs = [encoders.DiagonalNormal(3, 2, SMALL), encoders.DiagonalNormal(2, 2, SMALL)]
    conditionals = [encoders.DiagonalNormal(2, 2, SMALL)]
    return structures.HierarchicalVAE(priors.StandardNormal(2), conditionals, likelihoods.Normal(2, 3, SMALL), qs)


@pytest.mark.slow
@pytest.mark.parametrize("prior", [partial(priors.FullRankGaussianMixture, num_components=5), priors.FlowPrior])
def test_on_digits_log_p_of_test_data_rises(prior):
    splits = data.load("digits")
    x, held_out = splits.train.x, splits.validation.x
    test = data.static_binarization(splits.test.x)
    vae = VAE(priors.StandardNormal(8), likelihoods.Bernoulli(8, (1, 8, 8)), encoders.DiagonalNormal((1, 8, 8), 8))
    options = {"transform": data.dynamic_binarization, "validation": held_out, "progress": False}
    fit(vae.model, vae.guide, x, epochs=300, patience=30, **options)
    made = fit_prior(vae, x, prior(8), epochs=300, patience=20, **options)
    old, new = (
        log_marginal(v.model, v.guide, test, method=ImportanceSampling(2000), progress=False).value.double()
        for v in (vae, made)
    )
    gain = new - old
    assert gain.mean() > 2 * gain.std() / math.sqrt(len(gain))
