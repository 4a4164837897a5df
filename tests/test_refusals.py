"""Arguments that once ended in an error of torch or Pyro: they work, or one line names the argument."""

import math
import zipfile

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceTailAdaptive_ELBO
from pyro.optim import Adam
from torch.optim import lr_scheduler

from pyrovae import VAE, data, distributions, encoders, fit, likelihoods, log_marginal, priors
from pyrovae.estimators import ImportanceSampling

x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def make_vae(prior=priors.StandardNormal):
    return VAE(prior(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))


@pytest.mark.parametrize("compile", ["auto", False])
@pytest.mark.parametrize("prior", [priors.GaussianMixture, priors.FullRankGaussianMixture, priors.TiedGaussianMixture])
def test_mixtures_train_by_trace_graph_elbo_as_by_trace_elbo(prior, compile):
    losses = []  # both have the same gradient where all latents are reparameterised
    for loss in (TraceGraph_ELBO(), Trace_ELBO()):
        pyro.set_rng_seed(1)
        vae = make_vae(prior)
        history = fit(vae.model, vae.guide, x, loss=loss, epochs=3, batch_size=20, compile=compile, progress=False)
        losses.append(history["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("prior", [priors.GaussianMixture, priors.FullRankGaussianMixture, priors.TiedGaussianMixture])
def test_trace_graph_elbo_has_the_gradient_of_trace_elbo(prior):
    vae, gradients = make_vae(prior), []
    for loss in (TraceGraph_ELBO(), Trace_ELBO()):
        pyro.set_rng_seed(1)
        vae.zero_grad()
        loss.loss_and_grads(vae.model, vae.guide, x)
        gradients.append([p.grad for p in vae.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 5
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_mixture_under_stock_svi():
    vae = make_vae(priors.GaussianMixture)
    assert math.isfinite(SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), TraceGraph_ELBO()).step(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": TraceTailAdaptive_ELBO()}, ValueError, "vectorize_particles=True"),
        ({"optimizer": lambda p: torch.optim.SparseAdam(list(p))}, TypeError, "other than LBFGS and SparseAdam"),
        ({"scheduler": lambda o: lr_scheduler.StepLR(o, 0)}, ValueError, "scheduler: StepLR divides"),
        ({"scheduler": lambda o: lr_scheduler.CosineAnnealingLR(o, 0)}, ValueError, "scheduler: CosineAnnealingLR"),
        ({"device": ""}, ValueError, "device must be .* got ''"),
        ({"device": "gpu"}, ValueError, "device must be .* got 'gpu'"),
        ({"device": 3.5}, ValueError, r"device must be .* got 3\.5"),
        ({"clip_norm": "a"}, ValueError, "clip_norm must be positive, got 'a'"),
    ],
    ids=range(8),
)
def test_training_refuses_in_a_line(arguments, error, message):
    vae = make_vae()
    with pytest.raises(error, match=message) as raised:
        fit(vae.model, vae.guide, x, epochs=2, batch_size=20, progress=False, **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("max_memory", [math.inf, math.nan, 0, -1, "a", None])
def test_memory_must_be_a_number_of_bytes(max_memory):
    vae = make_vae()
    with pytest.raises(ValueError, match="max_memory must be a positive number of bytes"):
        log_marginal(vae.model, vae.guide, x, method=ImportanceSampling(10), max_memory=max_memory, progress=False)


@pytest.mark.parametrize("num_samples", [-1, "a", 2.5, True])
def test_the_number_of_samples_is_named(num_samples):
    with pytest.raises(ValueError, match="num_samples must be"):
        make_vae().sample(num_samples)


def test_one_datum_is_not_taken_for_its_elements():
    decoder = torch.nn.Linear(2, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r'site "x" has shape \(3,\), all of which is one datum .* x\[None\]'):
        log_marginal(model, guide, x[0], num_samples=10, progress=False)
    assert len(log_marginal(model, guide, x[:1], num_samples=10, progress=False).value) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_data_of_another_precision_score_as_their_values_in_single_precision(dtype):
    vae = make_vae()
    values = []
    for t in (x.to(dtype), x.to(dtype).float()):
        torch.manual_seed(0)
        values.append(log_marginal(vae.model, vae.guide, t, method=ImportanceSampling(20), progress=False).value)
    assert values[0].equal(values[1])


@pytest.mark.parametrize("make", [priors.GaussianMixture, priors.StudentT, priors.FlowPrior])
@pytest.mark.parametrize("latent_dim", ["3", 2.5, 0, None])
def test_latent_dim_is_named(make, latent_dim):
    with pytest.raises(ValueError, match="latent_dim must be"):
        make(latent_dim)


def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((40_000, 1000)))
    assert (tmp_path / "bomb.npz").stat().st_size < 1e6
    monkeypatch.setattr("pyrovae.data.matrices._MAX_UNPACKED", 1e8)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # nothing is unpacked
    with pytest.raises(ValueError, match=r"bomb\.npz.*would unpack to 0\.3 GB"):
        data.load(tmp_path / "bomb.npz")


def test_a_large_file_that_is_small_when_packed_is_read(tmp_path):
    np.savez_compressed(tmp_path / "zeros.npz", x=np.eye(1000, 50, dtype=np.float32))
    assert data.load(tmp_path / "zeros.npz").train.x.shape == (800, 50)


VALUES_OUTSIDE = {
    "Poisson": (distributions.Poisson(torch.zeros(2)), -1.0),
    "NegativeBinomial": (distributions.NegativeBinomial(torch.ones(2), torch.zeros(2)), 0.5),
    "ZeroInflatedNegativeBinomial": (
        distributions.ZeroInflatedNegativeBinomial(torch.ones(2), torch.zeros(2), torch.zeros(2)),
        -1.0,
    ),
    "DiscretizedLogistic": (distributions.DiscretizedLogistic(torch.zeros(2), torch.ones(2)), 1.5),
    "BatchScaleNormal": (distributions.BatchScaleNormal(torch.zeros(2), torch.ones(()), print), math.nan),
    "LogisticCells": (
        distributions.LogisticCells(
            *torch.zeros(3, 2, 1), distributions.Scales([distributions.Numbers(1, 1, low=0)] * 2)
        ),
        -1.0,
    ),
    "VonMisesFisher": (distributions.VonMisesFisher(torch.tensor([[1.0, 0.0]]), torch.ones(1)), 0.5),
}


@pytest.mark.parametrize("name", VALUES_OUTSIDE)
def test_an_expanded_distribution_refuses_what_the_distribution_refuses(name):
    """A plate expands what stands in it: without its checks, a value outside the support had a density all the same."""
    p, outside = VALUES_OUTSIDE[name]
    value = torch.full(p.batch_shape + p.event_shape, outside)
    expanded = p.expand((3, *p.batch_shape))
    for q in (p, expanded, expanded.expand((4, *expanded.batch_shape))):
        with pytest.raises(ValueError, match="support"):
            q.log_prob(value)
    p._validate_args = False
    assert not p.expand((3, *p.batch_shape))._validate_args
