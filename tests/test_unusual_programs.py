"""Programs with constructions of Pyro that are seldom seen: trained as by Pyro, scored as in closed form."""

import math

import pyro
import pytest
import torch
from linear_gaussian import assert_unit_scores
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from pyrovae import Arguments, bounds, diagnostics, fit, log_marginal, log_weights
from pyrovae.estimators import ImportanceSampling, Laplace, UntilTrusted, log_conditional


def test_a_plate_without_a_size_is_scored_by_every_estimator():
    pyro.set_rng_seed(0)
    weight = torch.randn(3, 2)

    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    x = torch.randn(10, 3)
    covariance = weight @ weight.T + 0.25 * torch.eye(3)
    truth = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    for method in (UntilTrusted(), ImportanceSampling(500, Laplace())):
        found = log_marginal(model, guide, x, method=method, progress=False)
        assert_unit_scores((found.value - truth) / found.standard_error.clamp(min=1e-4), 1e-6)
    first = torch.tensor([True, False, False])
    given = log_conditional(model, guide, x, given=first, progress=False)
    expected = truth - dist.Normal(0.0, covariance[0, 0].sqrt()).log_prob(x[:, 0])
    assert_unit_scores((given.value - expected) / given.standard_error.clamp(min=1e-4), 1e-6)


@pytest.mark.parametrize("enumerated", [True, False])
def test_masked_mixtures(enumerated):
    x = torch.cat([torch.zeros(4), torch.rand(6, generator=torch.Generator().manual_seed(0)) + 0.1])

    @config_enumerate
    def model(x):
        rate = pyro.param("rate", torch.tensor([0.5, 2.0]))
        with pyro.plate("data", len(x)):
            if enumerated:
                y = pyro.sample("y", dist.Categorical(torch.tensor([0.4, 0.6])))
                rates = Vindex(rate)[..., y]
            else:
                rates = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
            p = dist.MaskedMixture(x == 0, dist.Gamma(2.0, rates), dist.Delta(torch.tensor(0.0)))
            pyro.sample("x", p, obs=x)

    def guide(x):
        if not enumerated:
            loc = pyro.param("loc", torch.zeros(()))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.LogNormal(loc.expand(len(x)), 1.0))

    loss = TraceEnum_ELBO(max_plate_nesting=1) if enumerated else Trace_ELBO()
    pyro.set_rng_seed(0)
    expected = loss.loss(model, guide, x) / len(x)
    if enumerated:
        assert fit(model, guide, x, loss=loss, epochs=1, progress=False)["loss"] == pytest.approx([expected], rel=1e-5)
    found = log_marginal(model, guide, x, num_samples=2000, progress=False)
    if enumerated:
        assert -found.value.mean().item() == pytest.approx(loss.loss(model, guide, x) / len(x), rel=1e-5)
        return
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    prior = dist.Normal(0.0, 1.0).log_prob(z) + math.log(24 / 20_000)
    truth = torch.stack([(prior + dist.Gamma(2.0, z.exp()).log_prob(v)).logsumexp(0) for v in x[4:].double()])
    assert (found.value[:4] == 0).all()
    assert_unit_scores((found.value[4:] - truth) / found.standard_error[4:], 1e-6)


def test_hidden_markov_models_of_any_length():
    step = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    layer = nn.Linear(6, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            loc = torch.stack([z - 1, z + 1], -1).unsqueeze(-2)
            pyro.sample("x", dist.DiscreteHMM(torch.zeros(2), step, dist.Normal(loc, 1.0)), obs=x)

    def guide(x):
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            loc, log_scale = layer(x).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    x = torch.randn(10, 6)
    pyro.set_rng_seed(0)
    history = fit(model, guide, x, epochs=2, batch_size=10, progress=False)
    assert history["loss"][1] < 100
    found = log_marginal(model, guide, x, method=UntilTrusted(), progress=False)
    grid = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    loc = torch.stack([grid - 1, grid + 1], -1)[:, None, None]
    p = dist.DiscreteHMM(torch.zeros(2).double(), step.double(), dist.Normal(loc, 1.0))
    prior = dist.Normal(0.0, 1.0).log_prob(grid).unsqueeze(1) + math.log(0.01)
    truth = (p.log_prob(x.double().unsqueeze(0)) + prior).logsumexp(0)
    assert (found.value - truth).abs().max() < 1e-3 + 5 * found.standard_error.max()
    with pytest.raises(ValueError, match="site 'x'|site \"x\""):  # by Pyro
        fit(lambda x: fixed(x, step), lambda x: fixed_guide(x), x, epochs=1, progress=False)


def fixed(x: Tensor, step: Tensor) -> None:
    """A model of four steps."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        loc = torch.stack([z - 1, z + 1], -1).unsqueeze(-2) * torch.ones(4, 1)
        pyro.sample("x", dist.DiscreteHMM(torch.zeros(2), step, dist.Normal(loc, 1.0)), obs=x)


def fixed_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())).expand(len(x)), 1.0))


def test_a_scale_of_one_may_be_a_tensor():
    def model(x, beta=1.0):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, beta=1.0):
        with pyro.plate("data", len(x)), poutine.scale(scale=beta):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    x, losses = torch.randn(10), []
    for beta in (1.0, torch.tensor(1.0)):
        pyro.set_rng_seed(0)
        losses.append(bounds.IWAE(5).loss(model, guide, x, beta))
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="is scaled by"):
        bounds.IWAE(5).loss(model, guide, x, torch.tensor(0.5))


def test_arguments_are_taken_by_scores_and_diagnostics():
    layer = nn.Linear(3, 4)

    def model(*, x, shift=0.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) + shift, torch.ones(3)).to_event(1), obs=x)

    def guide(*, x, shift=0.0):
        loc, log_scale = layer(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    x = torch.randn(20, 3)
    for call in (
        lambda *args, **kwargs: log_weights(model, guide, *args, num_samples=3, **kwargs),
        lambda *args, **kwargs: diagnostics.collapse(model, guide, *args, progress=False, **kwargs).numbers(),
        lambda *args, **kwargs: diagnostics.reliability(model, guide, *args, progress=False, **kwargs).khat,
        lambda *args, **kwargs: diagnostics.quality(model, guide, *args, progress=False, **kwargs).numbers(),
    ):
        found = []
        for args, kwargs in (((), {"x": x}), ((Arguments(x=x),), {})):
            pyro.set_rng_seed(0)
            found.append(call(*args, **kwargs))
        assert str(found[0]) == str(found[1])


def test_automatic_guides_of_all_data_are_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, guide = torch.randn(6), AutoDiagonalNormal(model)
    guide(x)
    with pytest.raises(ValueError, match="such as AutoDiagonalNormal, have none: take AutoNormal"):
        log_marginal(model, guide, x, progress=False)
