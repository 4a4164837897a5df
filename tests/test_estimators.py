"""Estimators of log p(x) that draw from a proposal or go over all latents, against answers that are known otherwise."""

import itertools
import math
from functools import cache, partial

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from cases import SMALL
from helpers import FAILURE_RATE
from linear_gaussian import (
    AFFINE,
    Truth,
    assert_unit_scores,
    set_affine,
    truth,
    vae_of,
)
from pyro import distributions as dist
from pyro import poutine
from spaces import Space, line, product, simplex
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyrovae import VAE, Estimate, encoders, likelihoods, log_marginal, priors, structures
from pyrovae.bounds import ELBO, IWAE, StickingTheLanding
from pyrovae.estimators import (
    CUBO,
    AnnealedImportanceSampling,
    Enumeration,
    Estimator,
    Guide,
    ImportanceSampling,
    Linear,
    Mixed,
    Prior,
    Quadrature,
    Refined,
    SequentialMonteCarlo,
    Sigmoid,
    UntilTrusted,
    Widened,
)
from pyrovae.nn import MLP, OneHotInput

ROUNDING = 1e-9  # nats: sums of fewer than a million terms below 1,000, in double precision

log_marginal = partial(log_marginal, progress=False)
ANNEALED = [
    AnnealedImportanceSampling(64, 60),
    AnnealedImportanceSampling(64, 60, start=Guide(), schedule=Sigmoid()),
    SequentialMonteCarlo(64, 32),
]
CONTINUOUS = [
    ImportanceSampling(4000, Widened(1.3)),
    ImportanceSampling(4000, Mixed()),
    ImportanceSampling(4000, Mixed([Guide(), Widened(2.0), Prior()], [0.6, 0.3, 0.1])),
    ImportanceSampling(2000, Refined(60, 0.05)),
    *ANNEALED,
]
each = partial(pytest.mark.parametrize, ids=repr)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def data_plate(x: Tensor) -> pyro.plate:
    return pyro.plate("data", len(x), dim=-1)


def assert_agrees(estimate: Estimate, expected: Tensor) -> None:
    """Asserts that the errors of an estimate are as large as it says, and small."""
    assert estimate.standard_error.max() < 0.3  # the logarithm is about linear there
    assert_unit_scores((estimate.value - expected.detach()) / estimate.standard_error, FAILURE_RATE)


# ---------------------------------------------------------------------------------------------- continuous latents


@each("method", [*CONTINUOUS, Quadrature(4000)])
def test_a_linear_gaussian_model_has_its_closed_form(method):
    known = truth(2, 3)
    x = known.marginal().sample((40,))
    estimate = log_marginal(vae_of(known, widen=1.2).model, vae_of(known, widen=1.2).guide, x, method=method)
    if isinstance(method, Quadrature):
        torch.testing.assert_close(estimate.value, known.marginal().log_prob(x), rtol=0, atol=ROUNDING)
    else:
        assert_agrees(estimate, known.marginal().log_prob(x))
    assert estimate.trusted.all() and not estimate.remedy


FIFTY = [
    ImportanceSampling(2000, Widened(1.05)),
    ImportanceSampling(2000, Mixed()),
    # Gently: of 1,325 numbers that are nearly right, large steps would leave few so.
    ImportanceSampling(2000, Refined(40, 0.02, ELBO(8, gradient=StickingTheLanding()))),
    AnnealedImportanceSampling(100, 300),
    SequentialMonteCarlo(64, 32),
]


@each("method", FIFTY)
def test_so_has_one_of_50_dimensions(method):
    known = truth(50, 30)
    vae, x = vae_of(known, widen=1.05), known.marginal().sample((6,))
    assert_agrees(log_marginal(vae.model, vae.guide, x, method=method), known.marginal().log_prob(x))


def mixture_vae() -> tuple[VAE, Tensor, Tensor]:
    """A linear model with a mixture of normals for a prior, data, and their log p(x): that of a mixture again."""
    known = truth(2, 3, scale=0.7)
    vae = VAE(priors.GaussianMixture(2, 3), likelihoods.Normal(2, 3, AFFINE, 0.7), vae_of(known, 1.5).encoder).double()
    set_affine(vae.likelihood.network, known.weight, known.bias)
    components = vae.prior()
    components.loc.data.mul_(2)
    covariance = known.weight @ torch.diag_embed(components.scale.square()) @ known.weight.T
    marginal = dist.MultivariateNormal(
        components.loc @ known.weight.T + known.bias, covariance + 0.49 * torch.eye(3, dtype=torch.float64)
    )
    x = vae.sample(30)
    return vae, x, (marginal.log_prob(x.unsqueeze(1)) + components.logits).logsumexp(-1).detach()


@each("method", [ImportanceSampling(4000, Mixed(shares=None)), *ANNEALED[:1], *ANNEALED[2:], Quadrature(4000)])
def test_a_mixture_of_normals_for_a_prior_has_its_closed_form(method):
    vae, x, expected = mixture_vae()
    estimate = log_marginal(vae.model, vae.guide, x, method=method)
    if isinstance(method, Quadrature):
        torch.testing.assert_close(estimate.value, expected, rtol=0, atol=1e-6)
        assert (estimate.standard_error < 1e-3).all()
    else:
        assert_agrees(estimate, expected)


def over(space: Space, vae: VAE, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Returns log p(x) by a sum over a space of latents, one datum at a time."""
    prior = vae.prior().log_prob(space.points) + space.log_weights

    def one(row: Tensor, context: Tensor | None) -> Tensor:
        likelihood = [
            vae.decode(z, None if context is None else context.expand(len(z), -1)).log_prob(row)
            for z in space.points.split(50_000)
        ]
        return (prior + torch.cat(likelihood)).logsumexp(0)

    with torch.no_grad():
        return torch.stack(
            [one(*pair) for pair in zip(x, [None] * len(x) if context is None else context, strict=True)]
        )


def nonlinear(activation: type[nn.Module], latent_dim: int = 2, context_dim: int = 0) -> VAE:
    network = partial(MLP, hidden=(8,), activation=activation)
    likelihood = likelihoods.Normal(latent_dim, 3, network, scale=0.2, context_dim=context_dim)
    for p in likelihood.network.parameters():
        p.data.mul_(2)
    q = encoders.DiagonalNormal(3, latent_dim, AFFINE, context_dim=context_dim)
    return VAE(priors.StandardNormal(latent_dim), likelihood, q).double()


def grid(latent_dim: int, step: float) -> Space:
    """Equal steps from -7 to 7: the midpoint rule, coarse but for itself."""
    points = torch.arange(-7 + step / 2, 7, step, dtype=torch.float64)
    return product(*[Space(points, torch.full_like(points, math.log(step)))] * latent_dim)


@cache
def curved() -> tuple[VAE, Tensor, Tensor]:
    """A model with a tanh decoder, data, and their log p(x)."""
    vae = nonlinear(nn.Tanh)
    x = vae.sample(20)
    return vae, x, over(grid(2, 0.04), vae, x)


@each("method", [ImportanceSampling(4000, Refined(60)), *ANNEALED, Quadrature()])
def test_a_nonlinear_decoder_agrees_with_an_independent_quadrature(method):
    vae, x, expected = curved()
    estimate = log_marginal(vae.model, vae.guide, x, method=method)
    if isinstance(method, Quadrature):
        torch.testing.assert_close(estimate.value, expected, rtol=0, atol=1e-6)
    else:
        trusted = estimate.trusted
        assert trusted.float().mean() > 0.5
        assert_unit_scores(((estimate.value - expected) / estimate.standard_error)[trusted], FAILURE_RATE)


def test_quadrature_says_how_far_kinks_lead_it_astray():
    vae = nonlinear(nn.ReLU)
    x = vae.sample(8)
    estimate = log_marginal(vae.model, None, x, method=Quadrature())
    error = (estimate.value - over(grid(2, 0.02), vae, x)).abs()
    assert error.mean() < estimate.standard_error.mean()  # of one datum, either may be small by chance
    assert estimate.standard_error.max() < 0.01
    assert estimate.trusted.all()


@each("latent_dim", [1, 2, 3])
def test_quadrature_finds_a_posterior_that_is_narrow_and_far_away(latent_dim):
    # A thousandth of the prior's width, 5 of its standard deviations off; correlated, so that no axis follows it.
    left, _, right = torch.linalg.svd(doubles(4, latent_dim), full_matrices=False)
    known = Truth(left * torch.linspace(1, 0.5, latent_dim) @ right, doubles(4), 1e-3)
    vae, x = vae_of(known), known.bias + 5 * doubles(5, latent_dim).sign() @ known.weight.T
    estimate = log_marginal(vae.model, None, x, method=Quadrature())
    assert known.posterior(x).stddev.max() < 3e-3
    torch.testing.assert_close(estimate.value, known.marginal().log_prob(x), rtol=1e-7, atol=1e-4)
    assert estimate.trusted.all()


def test_quadrature_does_not_vouch_for_a_posterior_that_it_does_not_reach():
    known = Truth(truth(2, 4).weight, doubles(4), 1e-3)
    vae, x = vae_of(known), known.bias + 50 * doubles(5, 2).sign() @ known.weight.T
    estimate = log_marginal(vae.model, None, x, method=Quadrature())
    assert ((estimate.value - known.marginal().log_prob(x)).abs() > 1e3).all()
    assert not estimate.trusted.any()


class Squares:
    """Data that are squares of the latents: each dimension has two modes, and the dimensions are independent."""

    def __init__(self, scale: float):
        self.scale = scale

    def model(self, x: Tensor) -> None:
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.square(), self.scale).to_event(1), obs=x)

    def log_prob(self, x: Tensor) -> Tensor:
        z = np.linspace(-6, 6, 240_001)

        def one(value: float) -> float:
            log = scipy.stats.norm.logpdf(z) + scipy.stats.norm.logpdf(value, z**2, self.scale)
            return np.logaddexp.reduce(log) + math.log(z[1] - z[0])

        return torch.tensor([[one(value) for value in row] for row in x.tolist()], dtype=torch.float64).sum(1)


@pytest.mark.parametrize(("latent_dim", "scale"), [(1, 0.3), (1, 3e-3), (2, 0.3), (3, 0.5)])
def test_quadrature_finds_all_modes(latent_dim, scale):
    made, x = Squares(scale), 0.3 + 2 * torch.rand(6, latent_dim, dtype=torch.float64)
    estimate = log_marginal(made.model, None, x, method=Quadrature())
    error = (estimate.value - made.log_prob(x)).abs()
    assert (error <= estimate.standard_error + ROUNDING).all()
    assert error.max() < 1e-2


@pytest.mark.parametrize(("latent_dim", "scale"), [(2, 3e-3), (3, 0.03), (3, 3e-3)])
def test_quadrature_does_not_vouch_for_modes_that_its_grid_cannot_resolve(latent_dim, scale):
    # Taking one of the modes for all would be off by log 2 a dimension.
    made, x = Squares(scale), 0.3 + 2 * torch.rand(6, latent_dim, dtype=torch.float64)
    estimate = log_marginal(made.model, None, x, method=Quadrature())
    off = (estimate.value - made.log_prob(x)).abs() > 0.1
    assert off.any()
    assert not (off & estimate.trusted).any()
    assert "Take more points" in str(estimate)


@each("build", [partial(priors.LogisticNormal, 3), partial(priors.Dirichlet, 3, 2.0)], ids=["normal", "Dirichlet"])
@each("method", [ImportanceSampling(4000, Mixed()), *ANNEALED[:1], *ANNEALED[2:], Quadrature()])
def test_latents_on_a_simplex_agree_with_a_quadrature_there(build, method):
    q = encoders.LogisticNormal(3, 3, AFFINE)
    vae = VAE(build(), likelihoods.Normal(3, 3, AFFINE, scale=0.3), q).double()
    x = vae.sample(20)
    expected, estimate = over(simplex(3, 1 / 32), vae, x), log_marginal(vae.model, vae.guide, x, method=method)
    if isinstance(method, Quadrature):
        torch.testing.assert_close(estimate.value, expected, rtol=0, atol=1e-6)
    else:
        assert_agrees(estimate, expected)


@cache
def hierarchy() -> tuple[structures.HierarchicalVAE, Tensor, Tensor]:
    """A model of two levels, data, and their log p(x)."""
    tanh = partial(MLP, hidden=(6,), activation=nn.Tanh)
    vae = structures.HierarchicalVAE(
        prior=priors.StandardNormal(1),
        conditionals=[encoders.DiagonalNormal(1, 1, tanh)],
        likelihood=likelihoods.Normal(1, 4, tanh, scale=0.5),
        encoders=[encoders.DiagonalNormal(4, 1, tanh), encoders.DiagonalNormal(1, 1, tanh)],
    ).double()
    x = vae.sample(20)
    exact = log_marginal(vae.model, None, x, method=Quadrature(10_000))
    assert exact.standard_error.max() < 1e-3
    return vae, x, exact.value


@each(
    "method",
    [
        ImportanceSampling(20_000, Mixed()),
        ImportanceSampling(4000, Widened(1.2)),
        ImportanceSampling(4000, Refined(40)),
        ImportanceSampling(4000, Mixed([Widened(1.2), Prior()])),
        *ANNEALED,
    ],
)
def test_a_hierarchy_agrees_with_its_quadrature(method):
    vae, x, expected = hierarchy()
    assert_agrees(log_marginal(vae.model, vae.guide, x, method=method), expected)


def test_an_inner_plate_of_continuous_latents_is_gone_over():
    # Two latents a datum in a plate, each seen once, around one that they share: normal, of three dimensions.
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("parts", 2, dim=-2):
                y = pyro.sample("y", dist.Normal(z, 0.5))
                pyro.sample("x", dist.Normal(y, 0.3), obs=x.T)

    covariance = torch.ones(2, 2, dtype=torch.float64) + (0.25 + 0.09) * torch.eye(2, dtype=torch.float64)
    expected = (p := dist.MultivariateNormal(covariance.new_zeros(2), covariance)).log_prob(x := p.sample((20,)))
    exact = log_marginal(model, None, x, method=Quadrature())
    torch.testing.assert_close(exact.value, expected, rtol=0, atol=1e-6)
    for method in (ANNEALED[0], ANNEALED[2]):
        assert_agrees(log_marginal(model, None, x, method=method), expected)


def test_contexts_reach_every_method():
    vae, context = nonlinear(nn.Tanh, 1, context_dim=2), doubles(15, 2)
    x = vae.sample(1, context)[0]
    expected = over(product(line(0.0, 1.0, 1 / 32)), vae, x, context)
    for method in (
        Quadrature(2000),
        ImportanceSampling(4000, Mixed()),
        ImportanceSampling(4000, Mixed([Refined(60), Prior()], [0.7, 0.3])),  # a narrow guide alone has heavy tails
        ANNEALED[0],
    ):
        by_name = log_marginal(vae.model, vae.guide, x, context=context, method=method, max_memory=1e6)
        if isinstance(method, Quadrature):
            torch.testing.assert_close(by_name.value, expected, rtol=0, atol=1e-5)
        else:
            assert_agrees(by_name, expected)


# ------------------------------------------------------------------------------------------------ discrete latents


def categorical_vae(context_dim: int = 0) -> VAE:
    network = partial(OneHotInput, num_classes=3, network=SMALL)
    likelihood = likelihoods.Bernoulli(2, 4, network, context_dim=context_dim)
    q = encoders.Categorical(4, 2, SMALL, num_classes=3, context_dim=context_dim)
    return VAE(priors.Categorical(2, 3), likelihood, q).double()


def one_hot_vae() -> VAE:
    q = encoders.OneHotCategorical(4, 6, SMALL, num_classes=3)
    return VAE(priors.OneHotCategorical(6, 3), likelihoods.Bernoulli(6, 4, SMALL), q).double()


def brute_force(vae: VAE, x: Tensor, values: list[Tensor], context: Tensor | None = None) -> Tensor:
    total = torch.zeros(len(x), dtype=torch.float64)
    for z in values:
        log = vae.prior().log_prob(z) + vae.decode(z.expand(len(x), -1), context).log_prob(x)
        total = total + log.exp()
    return total.log().detach()


@pytest.mark.parametrize("max_memory", [2e3, 64e6])
@pytest.mark.parametrize("kind", ["integers", "one-hot", "context"])
def test_enumeration_is_the_sum_over_all_values(kind, max_memory):
    vae = one_hot_vae() if kind == "one-hot" else categorical_vae(2 * (kind == "context"))
    pairs = list(itertools.product(range(3), repeat=2))
    values = [torch.tensor(pair) for pair in pairs]
    if kind == "one-hot":
        values = [torch.cat([torch.eye(3, dtype=torch.float64)[i] for i in pair]) for pair in pairs]
    x, context = (doubles(30, 4) > 0).double(), doubles(30, 2) if kind == "context" else None
    estimate = log_marginal(vae.model, None, x, context, method=Enumeration(9), max_memory=max_memory)
    torch.testing.assert_close(estimate.value, brute_force(vae, x, values, context), rtol=0, atol=ROUNDING)
    assert (estimate.num_samples, estimate.standard_error.max(), estimate.trusted.all()) == (9, 0, True)
    assert estimate.ess.isnan().all() and "exact" in str(estimate)
    sampled = log_marginal(vae.model, vae.guide, x, context, method=ImportanceSampling(2000, Mixed()))
    assert_unit_scores((sampled.value - estimate.value) / sampled.standard_error, FAILURE_RATE)


def test_enumeration_goes_over_sites_that_depend_on_each_other_and_plates():
    shares = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    table = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.25, 0.75]], dtype=torch.float64)
    means = torch.tensor([[0.0, 2.0], [-1.0, 1.0], [3.0, -2.0]], dtype=torch.float64)

    def model(x):  # x: (batch, 2)
        with data_plate(x):
            a = pyro.sample("a", dist.Categorical(shares))
            with pyro.plate("parts", 2, dim=-2):
                b = pyro.sample("b", dist.Categorical(table[a]))
                pyro.sample("x", dist.Normal(means[a, b], 0.7), obs=x.T)

    def log_prob(row: list[float]) -> float:
        total = 0.0
        for a, *bs in itertools.product(range(3), range(2), range(2)):
            p = shares[a].item()
            for b, value in zip(bs, row, strict=True):
                p *= table[a, b].item() * scipy.stats.norm.pdf(value, means[a, b].item(), 0.7)
            total += p
        return math.log(total)

    x = doubles(12, 2)
    estimate = log_marginal(model, None, x, method=Enumeration())
    assert estimate.num_samples == 12
    torch.testing.assert_close(
        estimate.value, torch.tensor([log_prob(r) for r in x.tolist()]).double(), rtol=0, atol=1e-6
    )


@each("order", [2.0, 3.0])
def test_cubo_is_its_closed_form_and_above_the_truth(order):
    known = truth(2, 3)
    vae, x = vae_of(known, widen=1.3), known.marginal().sample((50,))
    estimate = log_marginal(vae.model, vae.guide, x, method=CUBO(20_000, order))
    q = vae.encoder(x)
    q = torch.distributions.MultivariateNormal(q.mean.detach(), q.covariance_matrix.detach())
    expected = known.marginal().log_prob(x) + known.log_chernoff(x, q, order) / order
    assert_agrees(estimate, expected)
    assert ((expected - known.marginal().log_prob(x)) > 0.05).all()
    assert (estimate.value > known.marginal().log_prob(x)).all()
    assert "log p(x) <= " in str(estimate)


# -------------------------------------------------------------------------------- any method: memory, precision, state


EVERY = [
    ImportanceSampling(200, Mixed([Guide(), Widened(1.2), Prior()])),
    ImportanceSampling(200, Refined(5)),
    CUBO(200),
    AnnealedImportanceSampling(8, 5),
    SequentialMonteCarlo(8, 4),
    Quadrature(100),
]


@each("method", EVERY)
def test_data_may_come_in_any_chunks(method):
    known = truth(1, 2)
    vae, x = vae_of(known, widen=1.2), known.marginal().sample((12,))
    tight, roomy = (log_marginal(vae.model, vae.guide, x, method=method, max_memory=m) for m in (2e3, 64e6))
    assert tight.value.shape == tight.standard_error.shape == tight.trusted.shape == (12,)
    if isinstance(method, Quadrature):
        torch.testing.assert_close(tight.value, roomy.value, rtol=0, atol=1e-4)  # of boxes that depend on draws
    else:
        error = (tight.standard_error.square() + roomy.standard_error.square()).sqrt()
        assert ((tight.value - roomy.value).abs() < 8 * error).all()  # t of few chains has wide tails
    for name, values in tight.diagnostics.items():
        assert values.shape == (12,), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each("method", EVERY)
def test_estimates_have_the_precision_of_the_model(method, dtype):
    vae = nonlinear(nn.Tanh, 1).to(dtype)
    estimate = log_marginal(vae.model, vae.guide, vae.sample(4), method=method)
    columns = (estimate.value, estimate.standard_error, estimate.ess, estimate.khat)
    assert {t.dtype for t in columns} == {dtype} and estimate.value.isfinite().all()


class Moody(nn.Module):
    """A network with modules that behave differently in training, one of them left in evaluation mode."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.drop, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.out = nn.Linear(width, out)

    def forward(self, x):
        return self.out(self.drop(self.frozen(x)))


@each("method", EVERY)
def test_a_model_is_left_as_it_was(method):
    likelihood = likelihoods.Normal(1, 3, Moody(1, 3))
    vae = VAE(priors.StandardNormal(1), likelihood, encoders.DiagonalNormal(3, 1, Moody(3, 2)))
    for p in vae.parameters():
        p.grad = torch.full_like(p, 3.0)
    modes = {name: module.training for name, module in vae.named_modules()}
    state, x = {name: t.clone() for name, t in vae.state_dict().items()}, torch.randn(5, 3)

    def score() -> Estimate:
        pyro.set_rng_seed(3)
        return log_marginal(vae.model, vae.guide, x, method=method)

    estimate = score()
    assert not estimate.value.requires_grad
    assert {name: module.training for name, module in vae.named_modules()} == modes
    assert all(torch.equal(t, state[name]) for name, t in vae.state_dict().items())
    assert all((p.grad == 3.0).all() and p.requires_grad for p in vae.parameters())
    assert torch.equal(estimate.value, score().value)  # all chance is from the global generator
    vae.eval()
    assert torch.equal(estimate.value, score().value)  # nothing was dropped


# ----------------------------------------------------------------------------------------------------- what is refused


def outside(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with data_plate(x):
        pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape), obs=x)


def counts(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Poisson(torch.tensor(2.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def four(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def two(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def switches(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Bernoulli(torch.full((20,), 0.5)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def nested(x):
    with data_plate(x):
        top = pyro.sample("top", dist.LogNormal(torch.tensor(0.0), 1.0))
        z = pyro.sample("z", dist.Uniform(0.0, top))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def sphere(x):
    with data_plate(x):
        z = pyro.sample("z", priors.HypersphericalUniform(3)())
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def masked(x, p=None):
    with data_plate(x):
        with poutine.mask(mask=x > 0):
            z = pyro.sample("z", p or dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(torch.where(x > 0, z, 0.0), 1.0), obs=x)


X = torch.tensor([-1.0, 0.5, 2.0])
AIS, SMC = AnnealedImportanceSampling(4, 4), SequentialMonteCarlo(4, 4)
REFUSED = [
    (Quadrature(), switches, 'the latents at site "z" are discrete.*Take estimators.Enumeration'),
    (Quadrature(), sphere, 'site "z" have a support .Sphere.* Take AnnealedImportanceSampling'),
    (AIS, nested, 'support of the latents at site "z" .* depends on other latents'),
    (Quadrature(), nested, 'support of the latents at site "z" .* depends on other latents'),
    (AIS, outside, 'site "z" of the model is outside the plate "data"'),
    (Quadrature(), outside, 'site "z" of the model is outside the plate "data"'),
    (Enumeration(), outside, 'site "z" of the model is outside the plate "data"'),
    (ImportanceSampling(), four, "ImportanceSampling needs a guide, got None"),
    (ImportanceSampling(proposal=Mixed()), four, "ImportanceSampling needs a guide, got None"),
    (AnnealedImportanceSampling(start=Refined()), four, "AnnealedImportanceSampling needs a guide, got None"),
    (AnnealedImportanceSampling(start=Mixed([Prior(), Prior()])), four, "Sampling starts from one proposal"),
    (Quadrature(), four, "up to 3 latent dimensions, got 4. Take AnnealedImportanceSampling"),
    (Quadrature(24), two, "num_samples must be at least 25, 5 points for each of 2 latent dimensions; got 24"),
    (Enumeration(), four, r"Enumeration is for discrete latents, and \['z'\] are not"),
    (Enumeration(), counts, 'site "z" .Poisson. have no values that can be listed'),
    (Enumeration(), switches, "1,048,576 combinations of values, more than num_samples=1,000,000"),
    (Enumeration(), partial(masked, p=dist.Bernoulli(torch.tensor(0.5))), 'site "z" are masked for some data'),
]  # fmt: skip


@pytest.mark.parametrize(("method", "model", "match"), REFUSED)
def test_models_that_a_method_is_not_for_are_refused(method, model, match):
    with pytest.raises(ValueError, match=match):
        log_marginal(model, None, X, method=method)


def test_models_without_a_guide_are_scored_by_what_needs_none():
    methods = [
        ImportanceSampling(4000, Prior()),
        AnnealedImportanceSampling(64, 20),
        SequentialMonteCarlo(64, 16),
        Quadrature(900),
    ]
    for method in methods:
        assert_agrees_roughly(log_marginal(two, None, X, method=method), dist.Normal(0.0, math.sqrt(3)).log_prob(X))


def assert_agrees_roughly(estimate: Estimate, expected: Tensor) -> None:
    # Five standard errors, and single precision.
    assert ((estimate.value - expected).abs() < 5 * estimate.standard_error + 1e-4).all(), estimate.method


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: ImportanceSampling(0), ValueError, "num_samples must be at least 1, got 0"),
        (lambda: ImportanceSampling(10.0), ValueError, "num_samples must be an integer of at least 1, got 10.0"),
        (lambda: AnnealedImportanceSampling(True), ValueError, "num_samples must be an integer"),
        (lambda: AnnealedImportanceSampling(num_temperatures=0), ValueError, "num_temperatures must be at least 1"),
        (lambda: AnnealedImportanceSampling(num_leapfrog=0), ValueError, "num_leapfrog must be at least 1, got 0"),
        (lambda: AnnealedImportanceSampling(acceptance=0), ValueError, "acceptance must be positive .* at most 0.99"),
        (lambda: AnnealedImportanceSampling(acceptance=2), ValueError, "acceptance must be positive .* at most 0.99"),
        (lambda: AnnealedImportanceSampling(schedule="linear"), TypeError, "schedule must be a schedule .*linear"),
        (lambda: AnnealedImportanceSampling(schedule=Linear), TypeError, "schedule must be a schedule such as"),
        (lambda: AnnealedImportanceSampling(start="prior"), TypeError, "start must be a proposal .*got 'prior'"),
        (lambda: SequentialMonteCarlo(num_particles=1), ValueError, "num_particles must be at least 2, got 1"),
        (lambda: SequentialMonteCarlo(kept=1.0), ValueError, "kept must be positive and finite and at most 0.999"),
        (lambda: Sigmoid(0.0), ValueError, "rate must be positive"),
        (lambda: Quadrature(0), ValueError, "num_samples must be at least 1, got 0"),
        (lambda: CUBO(order=1.0), ValueError, "order must be above 1, got 1.0"),
        (lambda: CUBO(proposal=Guide), TypeError, "proposal must be a proposal such as"),
        (lambda: ImportanceSampling(proposal="wide"), TypeError, "proposal must be a proposal such as .*got 'wide'"),
        (lambda: Widened(0.0), ValueError, "scale must be positive and finite, got 0.0"),
        (lambda: Mixed([Guide()], [0.5, 0.5]), ValueError, "shares must hold one number per proposal, got 2 for 1"),
        (lambda: Mixed([Guide(), Prior()], [1.0, 0.0]), ValueError, "shares must be positive"),
        (lambda: Mixed([Guide, Prior]), TypeError, "proposals must be proposals such as .*got <class"),
        (lambda: Refined(0), ValueError, "num_steps must be at least 1, got 0"),
        (lambda: Refined(learning_rate=math.inf), ValueError, "learning_rate must be positive and finite, got inf"),
        (lambda: Refined(bound=IWAE), TypeError, "bound must be one of pyrovae.bounds"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_by_the_argument(build, error, match):
    with pytest.raises(error, match=match):
        build()


@pytest.mark.parametrize(
    "make", [lambda n: ImportanceSampling(n(30)), lambda n: SequentialMonteCarlo(n(3), num_particles=n(4))]
)
def test_numpys_integers_are_integers(make):
    estimates = []
    for integer in (int, np.int64):
        pyro.set_rng_seed(0)
        vae = VAE(priors.StandardNormal(1), likelihoods.Normal(1, 3), encoders.DiagonalNormal(3, 1))
        estimates.append(log_marginal(vae.model, vae.guide, torch.zeros(5, 3), method=make(integer)).value)
    assert torch.equal(*estimates)


def test_the_method_is_an_estimator_with_a_number_of_its_own():
    with pytest.raises(TypeError, match="method must be an estimator such as .*got 'ais'"):
        log_marginal(two, None, X, method="ais")
    with pytest.raises(ValueError, match="num_samples=10 and method=Quadrature.* were both given"):
        log_marginal(two, None, X, method=Quadrature(), num_samples=10)


def test_what_lives_on_a_simplex_cannot_be_widened():
    vae = VAE(priors.LogisticNormal(3), likelihoods.Normal(3, 3), encoders.LogisticNormal(3, 3))
    with pytest.raises(ValueError, match=r'site "z" have the support .* Take estimators.Refined'):
        log_marginal(vae.model, vae.guide, torch.zeros(2, 3), method=ImportanceSampling(proposal=Widened()))


@pytest.mark.parametrize("build", [one_hot_vae, lambda: nonlinear(nn.Tanh).double()], ids=["discrete", "continuous"])
def test_data_that_are_not_to_be_trusted_have_a_remedy_that_will_take_them(build):
    vae = build()
    x = (vae.sample(3) > 0).double() * (1 if vae.likelihood.x_shape == (4,) else 30)
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=5)  # too few for a k-hat
    assert not estimate.trusted.any()
    name = estimate.remedy.removeprefix("Score them by method=").partition("(")[0]
    method: Estimator = {"Enumeration": Enumeration(), "UntilTrusted": UntilTrusted()}[name]
    assert log_marginal(vae.model, vae.guide, x, method=method).value.isfinite().all()


def test_latents_on_a_sphere_are_sent_to_annealing():
    vae = VAE(priors.HypersphericalUniform(3), likelihoods.Normal(3, 20, SMALL), encoders.VonMisesFisher(20, 3, SMALL))
    vae.likelihood.log_scale.data.fill_(-4.0)  # a posterior far narrower than the guide's
    estimate = log_marginal(vae.model, vae.guide, torch.randn(5, 20), num_samples=100, progress=False)
    assert not estimate.trusted.all()
    assert estimate.remedy == "Score them by method=UntilTrusted()."


@each(
    "method",
    [None, CUBO(), AnnealedImportanceSampling(), Quadrature(), Enumeration(), UntilTrusted(), ImportanceSampling(9)],
)
@pytest.mark.parametrize("loaded", [False, True], ids=["tensor", "loader"])
def test_a_model_without_latents_has_its_exact_value(method, loaded):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.randn(6)
    data = DataLoader(TensorDataset(x), batch_size=4) if loaded else x
    found = log_marginal(model, lambda x: None, data, method=method, progress=False)
    torch.testing.assert_close(found.value, dist.Normal(0.0, 1.0).log_prob(x), rtol=0, atol=0)
    assert found.trusted.all()
    assert found.standard_error.tolist() == [0.0] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_that_quadrature_states_include_rounding(dtype):
    known = truth(1, 5)
    vae, x = vae_of(known), known.marginal().sample((20,))
    vae, x = vae.to(dtype), x.to(dtype)
    found = log_marginal(vae.model, None, x, method=Quadrature(1001), progress=False)
    error = (found.value.double() - known.marginal().log_prob(x.double())).abs()
    assert (error <= found.standard_error).all(), error / found.standard_error
    assert (found.standard_error < 1e4 * torch.finfo(dtype).eps).all()
