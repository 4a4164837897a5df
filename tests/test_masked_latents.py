"""Latents that a model masks, and a guide does not: they play no part, in bounds, scores, filters and training."""

import math

import pyro
import pytest
import torch
from linear_gaussian import assert_unit_scores
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyrovae import bounds, fit, log_marginal, log_weights
from pyrovae.estimators import (
    AnnealedImportanceSampling,
    ImportanceSampling,
    ParticleFilter,
    UntilTrusted,
    log_predictive,
)

STEPS, NOISE, KEPT = 4, 0.7, 0.8
LENGTHS = torch.tensor([4, 3, 2, 1, 4, 3, 2, 1])
MASK = torch.arange(STEPS) < LENGTHS.unsqueeze(1)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(len(LENGTHS), STEPS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model(x: Tensor, mask: Tensor) -> None:
    z = x.new_zeros(len(x))
    with pyro.plate("data", len(x)):
        for t in range(STEPS):
            with poutine.mask(mask=mask[:, t]):
                z = pyro.sample(f"z{t}", dist.Normal(KEPT * z, 1.0))
                pyro.sample(f"x{t}", dist.Normal(z, NOISE), obs=x[:, t])


def unmasked_guide(x: Tensor, mask: Tensor) -> None:
    """Draws all steps, near the data; the padding of `x` is far away."""
    z, variance = x.new_zeros(len(x)), 1 / (1 + 1 / NOISE**2)
    with pyro.plate("data", len(x)):
        for t in range(STEPS):
            loc = variance * (KEPT * z + x[:, t] / NOISE**2)
            z = pyro.sample(f"z{t}", dist.Normal(loc, (1.3 * variance) ** 0.5))


def masked_guide(x: Tensor, mask: Tensor) -> None:
    z, variance = x.new_zeros(len(x)), 1 / (1 + 1 / NOISE**2)
    with pyro.plate("data", len(x)):
        for t in range(STEPS):
            loc = variance * (KEPT * z + x[:, t] / NOISE**2)
            with poutine.mask(mask=mask[:, t]):
                z = pyro.sample(f"z{t}", dist.Normal(loc, (1.3 * variance) ** 0.5))


def log_p_of(row: Tensor, length: int) -> Tensor:
    powers = torch.arange(length, dtype=row.dtype)
    mix = (KEPT ** (powers.unsqueeze(1) - powers)).tril()
    covariance = mix @ mix.T + NOISE**2 * torch.eye(length, dtype=row.dtype)
    return dist.MultivariateNormal(row.new_zeros(length), covariance).log_prob(row[:length])


def log_p(x: Tensor) -> Tensor:
    return torch.stack([log_p_of(row, length) for row, length in zip(x, LENGTHS.tolist(), strict=True)])


@pytest.mark.parametrize(
    "method",
    [
        ImportanceSampling(2000),
        ParticleFilter(200),
        UntilTrusted(),
        AnnealedImportanceSampling(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_scores_are_those_of_the_model(method, x):
    pyro.set_rng_seed(0)
    found = log_marginal(model, unmasked_guide, x, MASK, method=method, progress=False)
    assert found.trusted.all()
    assert_unit_scores((found.value - log_p(x)) / found.standard_error.clamp(min=1e-6), 1e-6)


def test_predictive_densities_add_up_to_log_p(x):
    pyro.set_rng_seed(0)
    found = log_predictive(model, unmasked_guide, x, MASK, method=ParticleFilter(400, 50))
    error = found.standard_error.square().sum(1).sqrt()
    assert_unit_scores((found.value.sum(1) - log_p(x)) / error, 1e-6)


@pytest.mark.parametrize(
    "bound",
    [
        bounds.ELBO(3),
        bounds.ELBO(3, closed_form=False),
        bounds.IWAE(6),
        bounds.IWAE(6, chunk_size=2),
        bounds.IWAE(6, gradient=bounds.DoublyReparameterized()),
        bounds.MIWAE(6, 3),
        bounds.TVO(6),
        bounds.CUBO(6),
        bounds.FIVO(6),
    ],
    ids=repr,
)
def test_bounds_are_those_of_a_guide_that_is_masked_alike(bound, x):
    losses = []
    for guide in (masked_guide, unmasked_guide):
        pyro.set_rng_seed(0)
        losses.append(bound.loss(model, guide, x, MASK))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_weights_are_those_of_a_guide_that_is_masked_alike(x):
    weights = []
    for guide in (masked_guide, unmasked_guide):
        pyro.set_rng_seed(0)
        weights.append(log_weights(model, guide, x, MASK, num_samples=50))
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)


def test_a_mask_of_the_guide_alone_hides_nothing(x):
    def whole(x: Tensor, mask: Tensor) -> None:
        model(x, torch.ones_like(mask))

    pyro.set_rng_seed(0)
    expected = log_weights(whole, unmasked_guide, x, MASK, num_samples=20)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(log_weights(whole, masked_guide, x, MASK, num_samples=20), expected)


def test_partly_observed_sites_of_pyro():
    x, seen = torch.randn(12, 2, dtype=torch.float64), torch.rand(12, 2) < 0.6

    def partly(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            for j in range(2):
                pyro.sample(f"x{j}", dist.Normal(z, NOISE), obs=x[:, j], obs_mask=seen[:, j])

    def exact(x: Tensor, seen: Tensor) -> None:
        precision = 1 + seen.sum(1).double() / NOISE**2
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal((x * seen).sum(1) / NOISE**2 / precision, precision.rsqrt()))
            for j in range(2):
                pyro.sample(f"x{j}_unobserved", dist.Normal(z, NOISE))

    truth = torch.stack(
        [
            dist.MultivariateNormal(
                torch.zeros(int(s.sum())).double(), 1 + NOISE**2 * torch.eye(int(s.sum())).double()
            ).log_prob(row[s])
            if s.any()
            else row.new_zeros(())
            for row, s in zip(x, seen, strict=True)
        ]
    )
    for bound in (bounds.ELBO(2, closed_form=False), bounds.IWAE(4)):
        assert -bound.loss(partly, exact, x, seen) == pytest.approx(truth.sum().item(), rel=1e-9)
    weights = log_weights(partly, exact, x, seen, num_samples=5)
    torch.testing.assert_close(weights, truth.expand(5, -1))


def test_a_mask_inside_of_a_distribution_must_be_in_both(x):
    keep = torch.tensor([True, False])

    def inside(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = dist.Normal(torch.zeros(len(x), 2).double(), 1.0)
            z = pyro.sample("z", p.mask(keep).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :1] * torch.ones(4).double(), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2).double(), 1.0).to_event(1))

    for call in (
        lambda: bounds.IWAE(3).loss(inside, guide, x),
        lambda: log_weights(inside, guide, x, num_samples=3),
        lambda: bounds.ELBO().loss(inside, guide, x),
        lambda: log_marginal(inside, guide, x, method=ParticleFilter(4, 5), progress=False),
    ):
        with pytest.raises(ValueError, match='site "z" is masked inside of its distribution'):
            call()
    found = log_marginal(inside, guide, x, num_samples=4000, progress=False)
    p = dist.MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double() + 1)
    assert_unit_scores((found.value - p.log_prob(x)) / found.standard_error, 1e-6)


def test_an_elbo_of_pyro_says_that_it_is_no_bound(x):
    scale = torch.nn.Parameter(torch.tensor(0.5))

    def guide(x: Tensor, mask: Tensor) -> None:
        pyro.param("scale", scale)
        with pyro.plate("data", len(x)):
            for t in range(STEPS):
                pyro.sample(f"z{t}", dist.Normal(x[:, t], scale.exp()))

    with pytest.warns(UserWarning, match="is masked in the model and not in the guide.*Trace_ELBO is no bound"):
        fit(model, guide, (x.float(), MASK), epochs=1, loss=Trace_ELBO(), progress=False)
    history = fit(model, guide, (x.float(), MASK), epochs=3, loss=bounds.ELBO(), progress=False)
    assert math.isfinite(history["loss"][-1])


def test_chunks_of_data_have_their_own_masks(x):
    """Graphs of the score are shared by chunks of data, whose masks differ."""
    x, mask = x.repeat(40, 1), MASK.repeat(40, 1)
    mask[160:] = mask[160:].flip(0)
    pyro.set_rng_seed(0)
    few = log_marginal(model, unmasked_guide, x, mask, num_samples=500, max_memory=2e5, progress=False)
    lengths = mask.sum(1)
    for length in range(1, STEPS + 1):
        of = lengths == length
        truth = torch.stack([log_p_of(row, length) for row in x[of]])
        assert_unit_scores((few.value[of] - truth) / few.standard_error[of], 1e-6)
