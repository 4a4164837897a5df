"""What regularizers add to a loss and to its gradient, against closed forms, quadratures, enumerations and loops."""

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pyro
import pytest
import scipy.special
import scipy.stats
import torch
from helpers import FAILURE_RATE
from linear_gaussian import AFFINE, assert_mean, diagonal_vae, gradients, repeat, set_affine
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from pyrovae import VAE, bounds, encoders, fit, likelihoods, priors
from pyrovae.nn import MLP
from pyrovae.regularizers import (
    Adversarial,
    Cost,
    DensityRatio,
    MaximumMeanDiscrepancy,
    Regularizer,
    Run,
    TotalCorrelation,
    gaussian_kernel,
    inverse_multiquadric_kernel,
)
from pyrovae.structures import HierarchicalVAE

REPEATS = 300
EPS = torch.finfo(torch.float64).eps
# Costs and losses here sum up to a thousand terms, most of them below 10, each the result of some ten operations.
ROUNDING = 1e4 * EPS
SMALL = partial(MLP, hidden=(4,))


def near(found: Tensor, expected: Tensor, size: float = 0.0) -> None:
    """Asserts equality but for rounding, relative to the largest entry, one, and the size of what was subtracted."""
    atol = ROUNDING * (1 + size + expected.detach().abs().amax().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def gradient_of(value: Tensor, module: nn.Module) -> Tensor | None:
    """Returns a gradient in all parameters as one vector, or None where there is none in any."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    if all(g is None for g in found):
        return None
    return torch.cat([(0 * p if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]).detach()


class Spy(Regularizer):
    """Keeps what a bound hands to its regularizers, and costs nothing."""

    def __init__(self):
        super().__init__(0.0)

    def __call__(self, run: Run) -> Cost:
        self.run = run
        return Cost(torch.zeros((), dtype=torch.float64))


class Pair(NamedTuple):
    """A Pyro model and guide."""

    model: Callable
    guide: Callable


def run_of(pair: VAE | Pair, *args: Tensor, k: int = 1) -> Run:
    """Returns the run that a bound hands to its regularizers."""
    bounds.ELBO(k, regularizers=[spy := Spy()]).terms(pair.model, pair.guide, *args)
    return spy.run


def quick_run_of(pair: VAE | Pair, *args: Tensor, k: int = 1) -> Run:
    """Returns such a run by Pyro alone, in a third of the time, for tests that need hundreds of them."""
    particles = pyro.plate("particles", k, dim=-2)
    with particles, poutine.trace() as guide:
        pair.guide(*args)
    with particles, poutine.trace() as model, poutine.replay(trace=guide.trace):
        pair.model(*args)
    return Run(model.trace, guide.trace, pair.model, pair.guide, args, {})


def latents_of(run: Run) -> Tensor:
    return run.guide_trace.nodes["z"]["value"]


def random_vae(latent_dim: int = 2, x_dim: int = 3) -> VAE:
    """Returns a linear VAE whose posteriors differ from datum to datum, in their means more than in their scales."""
    vae = diagonal_vae(latent_dim, x_dim)
    weight = torch.randn(2 * latent_dim, x_dim, dtype=torch.float64)
    weight[latent_dim:] *= 0.3
    set_affine(vae.encoder.network, weight, 0.5 * torch.randn(2 * latent_dim, dtype=torch.float64))
    return vae


def data_of(n: int, x_dim: int = 3) -> Tensor:
    return torch.randn(n, x_dim, dtype=torch.float64)


class Aggregate(NamedTuple):
    """A VAE whose aggregate posterior over data x ~ N(0, I) is normal: q(z | x) = N(A x + m, diag s^2)."""

    vae: VAE

    @property
    def parameters(self) -> list[Tensor]:
        (layer,) = self.vae.encoder.network.layers
        return [layer.weight, layer.bias]

    def flat(self, gradient: list[Tensor]) -> Tensor:
        """Returns a gradient in A, m and what s is made of, which is all that the closed forms below depend on."""
        weight, bias = gradient
        return torch.cat([weight[: len(bias) // 2].flatten(), bias])

    def normal(self) -> MultivariateNormal:
        weight, bias = self.parameters
        d = len(bias) // 2
        # The encoder's scale is softplus(raw + log(e - 1)) + 1e-6.
        scale = softplus(bias[d:] + math.log(math.e - 1)) + 1e-6
        return MultivariateNormal(bias[:d], weight[:d] @ weight[:d].T + torch.diag(scale.square()))

    def total_correlation(self) -> Tensor:
        covariance = self.normal().covariance_matrix
        return 0.5 * (covariance.diagonal().log().sum() - torch.logdet(covariance))


def aggregate(d: int = 2, mean: float = 0.5, spread: float = 0.7) -> Aggregate:
    vae = diagonal_vae(d, d)
    weight = torch.zeros(2 * d, d, dtype=torch.float64)
    weight[:d] = spread * torch.eye(d) + 0.5 * spread  # every two dimensions are correlated
    bias = torch.cat([torch.full((d,), mean, dtype=torch.float64), torch.linspace(-0.9, -0.3, d, dtype=torch.float64)])
    set_affine(vae.encoder.network, weight, bias)
    return Aggregate(vae)


# Total correlation.


def normal_density(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return torch.exp(-0.5 * ((z - loc) / scale) ** 2) / (scale * math.sqrt(2 * math.pi))


class Densities(NamedTuple):
    """Logarithms of estimates of the aggregate's densities, (particles, batch) and (particles, batch, dimensions)."""

    own: Tensor  # q(z | x) itself
    joint: Tensor
    marginals: Tensor


def naive_densities(loc: Tensor, scale: Tensor, z: Tensor, n: int, stratified: bool) -> Densities:
    """Estimates the densities at every latent one term at a time."""
    particles, batch, d = z.shape
    own, joint, marginals = [], [], []
    for k, i in itertools.product(range(particles), range(batch)):
        total, totals = 0.0, [0.0] * d
        for j in range(batch):
            share = 1 / (n * batch)
            if stratified:
                share = 1 / n if i == j else (n - 1) / n / (batch - 1)
            product = 1.0
            for c in range(d):
                density = normal_density(z[k, i, c], loc[j, c], scale[j, c])
                product = product * density
                totals[c] = totals[c] + share * density
            total = total + share * product
            if i == j:
                own.append(product.log())
        joint.append(total.log())
        marginals.append(torch.stack(totals).log())
    shape = (particles, batch)
    return Densities(
        torch.stack(own).view(shape), torch.stack(joint).view(shape), torch.stack(marginals).view(*shape, d)
    )


def naive_total_correlation(vae: VAE, x: Tensor, z: Tensor, n: int, stratified: bool) -> Tensor:
    q = vae.encoder(x).base_dist
    found = naive_densities(q.loc, q.scale, z, n, stratified)
    return (found.joint - found.marginals.sum(-1)).mean(0).sum()


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("particles", [1, 3])
def test_the_total_correlation_and_its_gradient_are_those_of_loops(stratified, particles):
    vae, x = random_vae(3), data_of(4)
    run = run_of(vae, x, k=particles)
    cost = TotalCorrelation(2.5, dataset_size=9, stratified=stratified)(run)
    expected = 2.5 * naive_total_correlation(vae, x, latents_of(run), 9, stratified)
    near(cost.value, expected)
    # Through the latents as well as through the densities.
    near(gradient_of(cost.value, vae), gradient_of(expected, vae))
    assert cost.aside == 0.0


def total_correlation_by_quadrature(loc: np.ndarray, scale: np.ndarray) -> float:
    """KL(q(z) || q(z_1) q(z_2)) of a mixture of normals by the trapezoidal rule.

    Its error falls faster than any power of the step: like exp(-2 pi^2 (scale / step)^2), here below 1e-300.
    """
    step = scale.min() / 6
    reach = 12 * scale.max()
    grids = [np.arange(loc[:, c].min() - reach, loc[:, c].max() + reach, step) for c in range(2)]
    each = [scipy.stats.norm(loc[:, [c]], scale[:, [c]]).pdf(grids[c]) for c in range(2)]
    joint = np.einsum("ni,nj->ij", *each) / len(loc)
    product = np.outer(*(q.mean(0) for q in each))
    return scipy.special.rel_entr(joint, product).sum() * step**2


def test_from_all_data_the_total_correlation_is_that_of_a_quadrature():
    # Posteriors along a line, across both dimensions.
    vae, x = diagonal_vae(2, 1), torch.linspace(-2, 2, 5, dtype=torch.float64).unsqueeze(1)
    set_affine(vae.encoder.network, torch.tensor([[1.0], [-0.8], [0.2], [-0.1]]), torch.tensor([0.3, 0.0, -1.0, -0.5]))
    q = vae.encoder(x).base_dist
    expected = total_correlation_by_quadrature(q.loc.detach().numpy(), q.scale.detach().numpy())
    assert expected > 0.2, "or there is little to be wrong about"
    bound = bounds.ELBO(num_particles=200, regularizers=[TotalCorrelation(3.0, dataset_size=5)])
    with torch.no_grad():
        found = repeat(lambda: bound.terms(vae.model, vae.guide, x).regularizers["TotalCorrelation"], 40)
    assert_mean(found, torch.tensor(3.0 * 5 * expected), FAILURE_RATE)


def test_the_stratified_density_is_unbiased_over_batches_and_the_weighted_one_is_not():
    # Of a latent of datum 0, over all batches of 3 that hold it. The loops here are those that the cost equals above.
    n, batch = 7, 3
    vae, x = random_vae(), data_of(n)
    q = vae.encoder(x).base_dist
    z = q.sample((4,))[:, :1]
    exact = torch.stack([normal_density(z, q.loc[j], q.scale[j]) for j in range(n)]).mean(0)  # of each dimension
    exact_joint = torch.stack([normal_density(z, q.loc[j], q.scale[j]).prod(-1) for j in range(n)]).mean(0)
    means = {}
    for stratified in (True, False):
        joint, marginals = [], []
        for others in itertools.combinations(range(1, n), batch - 1):
            rows = [0, *others]
            latents = torch.cat([z, z.new_zeros(4, batch - 1, 2)], dim=1)
            found = naive_densities(q.loc[rows], q.scale[rows], latents, n, stratified)
            joint.append(found.joint[:, :1].exp())
            marginals.append(found.marginals[:, :1].exp())
        means[stratified] = torch.stack(joint).mean(0), torch.stack(marginals).mean(0)
    near(means[True][0], exact_joint)
    near(means[True][1], exact)
    assert (means[False][0] < exact_joint).all()


def test_from_all_data_the_weighted_estimate_is_off_by_a_constant():
    vae, x = random_vae(3), data_of(6)
    run = run_of(vae, x, k=2)
    weighted, stratified = (TotalCorrelation(1.0, 6, stratified=s)(run).value for s in (False, True))
    near(weighted - stratified, 6 * (3 - 1) * torch.tensor(6.0, dtype=torch.float64).log())
    near(gradient_of(weighted, vae), gradient_of(stratified, vae))


def test_the_mean_logarithm_of_the_stratified_density_rises_with_the_batch():
    # Jensen's inequality, by enumeration of all batches with datum 0.
    n = 6
    vae, x = random_vae(), data_of(n)
    q = vae.encoder(x).base_dist
    z = q.sample((3,))[:, :1]
    means = []
    for batch in range(2, n + 1):
        found = [
            naive_densities(
                q.loc[[0, *others]], q.scale[[0, *others]], z.expand(3, batch, 2), n, stratified=True
            ).joint[:, 0]
            for others in itertools.combinations(range(1, n), batch - 1)
        ]
        means.append(torch.stack(found).mean(0))
    assert (torch.stack(means).diff(dim=0) > 0).all()


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("beta", [6.0, 0.25])
def test_with_the_elbo_it_is_the_beta_tcvae(beta, stratified):
    vae, x, n = random_vae(), data_of(4), 10
    regularizer = TotalCorrelation(beta - 1, n, stratified=stratified)
    # The divergence between index and code needs log q(z | x) at the draws, and so the ELBO not in closed form.
    bound = bounds.ELBO(2, closed_form=False, regularizers=[regularizer, spy := Spy()])
    terms = bound.terms(vae.model, vae.guide, x)
    z, q = latents_of(spy.run), vae.encoder(x).base_dist
    found = naive_densities(q.loc, q.scale, z, n, stratified)
    log_prior = normal_density(z, z.new_zeros(()), z.new_ones(())).log().sum(-1)
    (layer,) = vae.likelihood.network.layers
    scale = vae.likelihood.log_scale.exp()
    log_likelihood = normal_density(x, z @ layer.weight.T + layer.bias, scale).log().sum(-1)
    mutual_information = found.own - found.joint
    correlation = found.joint - found.marginals.sum(-1)
    dimension_wise = found.marginals.sum(-1) - log_prior
    expected = (-log_likelihood + mutual_information + beta * correlation + dimension_wise).mean(0).sum()
    near(terms.loss, expected)
    near(gradient_of(terms.loss, vae), gradient_of(expected, vae))
    near(terms.regularizers["TotalCorrelation"], (beta - 1) * correlation.mean(0).sum())
    near(terms.bound, (log_likelihood - mutual_information - correlation - dimension_wise).mean(0).sum())


def test_in_single_precision_it_rounds_to_single_precision():
    vae, x = random_vae(), data_of(5)
    run = run_of(vae, x, k=2)
    expected = TotalCorrelation(1.0, 50)(run).value
    pyro.set_rng_seed(0)
    single = copy.deepcopy(vae).float()
    site = run.guide_trace.nodes["z"]
    guide_trace = run.guide_trace.copy()
    guide_trace.nodes["z"] = {
        **site,
        "fn": single.encoder(x.float()).expand((2, 5)),
        "value": site["value"].float(),
    }
    found = TotalCorrelation(1.0, 50)(run._replace(guide_trace=guide_trace)).value
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e3 * torch.finfo(torch.float32).eps)


# Maximum mean discrepancy.


def naive_gaussian(a: Tensor, b: Tensor) -> Tensor:
    return math.e ** (-sum((s - t) ** 2 for s, t in zip(a, b, strict=True)) / len(a))


def naive_multiquadric(a: Tensor, b: Tensor) -> Tensor:
    square = sum((s - t) ** 2 for s, t in zip(a, b, strict=True))
    constants = [2 * len(a) * s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10)]
    return sum(c / (c + square) for c in constants)


KERNELS = [(gaussian_kernel, naive_gaussian), (inverse_multiquadric_kernel, naive_multiquadric)]
every_kernel = pytest.mark.parametrize("kernel, naive", KERNELS, ids=lambda k: k.__name__)


@every_kernel
def test_kernels_of_all_pairs_are_those_of_loops(kernel, naive):
    a, b = data_of(4), 2 * data_of(5)
    near(kernel(a, b), torch.stack([torch.stack([naive(s, t) for t in b]) for s in a]))


@every_kernel
@pytest.mark.parametrize("particles", [1, 3])
def test_the_discrepancy_and_its_gradient_are_those_of_loops(kernel, naive, particles):
    vae, x = random_vae(), data_of(4)
    run = run_of(vae, x, k=particles)
    pyro.set_rng_seed(5)
    cost = MaximumMeanDiscrepancy(2.0, kernel)(run)
    pyro.set_rng_seed(5)
    z, prior = latents_of(run), vae.prior().sample((particles, 4))
    total = 0.0
    for (k, i), (m, j) in itertools.product(itertools.product(range(particles), range(4)), repeat=2):
        if i != j:  # draws of one datum are not independent draws from the aggregate
            total = total + naive(z[k, i], z[m, j]) + naive(prior[k, i], prior[m, j]) - 2 * naive(z[k, i], prior[m, j])
    expected = 2.0 * 4 * total / (particles**2 * 4 * 3)
    near(cost.value, expected)
    near(gradient_of(cost.value, vae), gradient_of(expected, vae))
    assert cost.aside == 0.0


def expected_kernel(a: MultivariateNormal, b: MultivariateNormal) -> Tensor:
    """E exp(-|u|^2 / d) for u = a - b of mean m and covariance V: det(I + 2V/d)^(-1/2) exp(-m'(dI + 2V)^-1 m)."""
    covariance, mean = a.covariance_matrix + b.covariance_matrix, a.mean - b.mean
    d = len(mean)
    eye = torch.eye(d, dtype=torch.float64)
    return (-0.5 * torch.logdet(eye + 2 * covariance / d)).exp() * (
        -mean @ torch.linalg.solve(d * eye + 2 * covariance, mean)
    ).exp()


def expected_discrepancy(q: MultivariateNormal) -> Tensor:
    p = MultivariateNormal(torch.zeros_like(q.mean), torch.eye(len(q.mean), dtype=torch.float64))
    return expected_kernel(q, q) + expected_kernel(p, p) - 2 * expected_kernel(q, p)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("spread", [0.0, 0.7], ids=["one posterior for all data", "one posterior a datum"])
def test_the_mean_discrepancy_and_gradient_are_in_closed_form(spread, particles):
    known, batch = aggregate(3, mean=0.4, spread=spread), 5
    regularizer = MaximumMeanDiscrepancy(7.0)

    def draw() -> Tensor:
        # Each repetition has new data, because the estimate is of the aggregate over all data.
        value = regularizer(quick_run_of(known.vae, data_of(batch), k=particles)).value
        return torch.cat([value[None], known.flat(torch.autograd.grad(value, known.parameters))])

    value = 7.0 * batch * expected_discrepancy(known.normal())
    expected = torch.cat([value[None], known.flat(torch.autograd.grad(value, known.parameters))])
    assert_mean(repeat(draw, REPEATS), expected, FAILURE_RATE)


def conditional_pair(shift: float = 0.0) -> Pair:
    """Returns a prior that goes with the datum, and a guide that is the same, but for a shift."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(2 * x, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(2 * x + shift, 0.5).to_event(1))

    return Pair(model, guide)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("kernel", [gaussian_kernel, inverse_multiquadric_kernel])
def test_the_mean_discrepancy_is_zero_where_the_posterior_is_the_prior(kernel, particles):
    regularizer = MaximumMeanDiscrepancy(1.0, kernel)
    vae = diagonal_vae(2, 2)
    # The encoder's scale at raw = 0 is 1 + 1e-6: the difference is of the order of 1e-12, for it is of second order.
    set_affine(vae.encoder.network, torch.zeros(4, 2), torch.zeros(4))
    for pair in (vae, conditional_pair()):
        with torch.no_grad():
            found = repeat(lambda pair=pair: regularizer(quick_run_of(pair, data_of(3, 2), k=particles)).value, REPEATS)
        assert found.std() > 1e-3
        assert_mean(found, torch.zeros(()), FAILURE_RATE)


def test_the_mean_discrepancy_of_a_conditional_prior_is_that_of_the_aggregates():
    # Both normal, of covariance (4 + 1/4) I.
    q, p = (MultivariateNormal(m * torch.ones(2).double(), 4.25 * torch.eye(2).double()) for m in (1.5, 0.0))
    expected = 4 * (expected_kernel(q, q) + expected_kernel(p, p) - 2 * expected_kernel(q, p))
    pair, regularizer = conditional_pair(shift=1.5), MaximumMeanDiscrepancy(1.0)
    with torch.no_grad():
        found = repeat(lambda: regularizer(quick_run_of(pair, data_of(4, 2), k=2)).value, REPEATS)
    assert_mean(found, expected, FAILURE_RATE)


def test_with_the_elbo_it_is_infovae():
    alpha, weight = 0.3, 5.0
    vae, x = random_vae(), data_of(5)
    bound = bounds.ELBO(beta=1 - alpha, regularizers=[MaximumMeanDiscrepancy(alpha + weight - 1), spy := Spy()])
    pyro.set_rng_seed(1)
    terms = bound.terms(vae.model, vae.guide, x)
    pyro.set_rng_seed(1)
    z = vae.encoder(x).rsample((1,))
    prior = vae.prior().sample((1, 5))
    assert torch.equal(z, latents_of(spy.run)), "the prior is drawn from after the latents"
    pairs = [(i, j) for i, j in itertools.product(range(5), repeat=2) if i != j]
    discrepancy = sum(
        naive_gaussian(z[0, i], z[0, j])
        + naive_gaussian(prior[0, i], prior[0, j])
        - 2 * naive_gaussian(z[0, i], prior[0, j])
        for i, j in pairs
    ) / len(pairs)
    q = vae.encoder(x).base_dist
    kl = 0.5 * (q.scale.square() + q.loc.square() - 1 - 2 * q.scale.log()).sum()
    reconstruction = vae.decode(z).log_prob(x).sum()
    expected = -reconstruction + (1 - alpha) * kl + (alpha + weight - 1) * 5 * discrepancy
    near(terms.loss, expected)
    near(gradient_of(terms.loss, vae), gradient_of(expected, vae))


# The density ratio.


class Quadratic(nn.Module):
    """A discriminator that is linear in features 1, z1, z2, z1^2, z2^2 and z1 z2: normals are in its reach."""

    def __init__(self, theta: Tensor):
        super().__init__()
        self.theta = nn.Parameter(theta.detach().clone())

    def forward(self, z: Tensor) -> Tensor:
        return features(z) @ self.theta


def features(z: Tensor) -> Tensor:
    a, b = z.unbind(-1)
    return torch.stack([torch.ones_like(a), a, b, a * a, b * b, a * b], dim=-1)


def log_ratio_of(q: MultivariateNormal) -> Tensor:
    """Returns the coefficients of log q(z) / (q(z1) q(z2)) in the features."""
    mean, covariance = q.mean.detach(), q.covariance_matrix.detach()
    m = torch.linalg.inv(covariance) - torch.diag(1 / covariance.diagonal())
    determinants = covariance.diagonal().log().sum() - torch.logdet(covariance)
    constant = 0.5 * (determinants - mean @ m @ mean)
    return torch.stack([constant, *(m @ mean), -0.5 * m[0, 0], -0.5 * m[1, 1], -m[0, 1]])


@pytest.mark.parametrize("particles", [1, 3])
def test_by_the_exact_ratio_the_mean_cost_and_gradient_are_those_of_the_total_correlation(particles):
    # The gradient holds the ratio, as if it did not depend on the posterior; what this leaves out has mean zero.
    known, batch = aggregate(), 6
    regularizer = DensityRatio(Quadratic(log_ratio_of(known.normal())), weight=4.0)

    def draw() -> Tensor:
        value = regularizer(quick_run_of(known.vae, data_of(batch, 2), k=particles)).value
        return torch.cat([value[None], known.flat(torch.autograd.grad(value, known.parameters))])

    value = 4.0 * batch * known.total_correlation()
    assert value / 4 / batch > 0.1
    expected = torch.cat([value[None], known.flat(torch.autograd.grad(value, known.parameters))])
    assert_mean(repeat(draw, REPEATS), expected, FAILURE_RATE)


def on_a_grid(q: MultivariateNormal) -> tuple[Tensor, Tensor, Tensor]:
    """Returns points, and the weights of q(z) and of q(z1) q(z2) there, for integrals by the trapezoidal rule."""
    scale = q.covariance_matrix.diagonal().sqrt()
    # Densities are below 1e-16 at 10 standard deviations, and a step of a quarter is a sixth of the narrower direction.
    t = torch.arange(-10, 10.1, 0.25, dtype=torch.float64)
    z = q.mean + torch.cartesian_prod(t, t) * scale
    product = torch.distributions.Normal(q.mean, scale).log_prob(z).sum(-1)
    return tuple(t.detach() for t in (z, *(p.exp() * 0.25**2 * scale.prod() for p in (q.log_prob(z), product))))


def expected_entropy_gradient(q: MultivariateNormal, theta: Tensor, batch: int) -> Tensor:
    """Returns the mean gradient of the cross entropy, for each datum.

    Permutations leave one datum in a batch its two dimensions, on average, so that the product is mixed with the joint.
    """
    z, joint, product = on_a_grid(q)
    theta = theta.clone().requires_grad_()
    logits = features(z) @ theta
    fake = product * (1 - 1 / batch) + joint / batch
    (gradient,) = torch.autograd.grad((joint * softplus(-logits) + fake * softplus(logits)).sum(), theta)
    return gradient


@pytest.mark.parametrize("step", [0.0, 0.3], ids=["exact", "off"])
def test_the_mean_gradient_of_its_discriminator_is_that_of_a_quadrature(step):
    known, batch = aggregate(), 4
    theta = log_ratio_of(known.normal()) + step
    regularizer = DensityRatio(Quadratic(theta), weight=4.0)

    def draw() -> Tensor:
        aside = regularizer(quick_run_of(known.vae, data_of(batch, 2))).aside
        return torch.autograd.grad(aside, regularizer.discriminator.theta)[0]

    expected = batch * expected_entropy_gradient(known.normal(), theta, batch)
    assert_mean(repeat(draw, REPEATS), expected, FAILURE_RATE)


class Recorder(nn.Module):
    """A discriminator that keeps its inputs."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return self.network(x)


def test_each_dimension_of_each_particle_is_permuted_by_itself_and_evenly():
    batch, particles = 4, 2
    recorder = Recorder(nn.Linear(2, 1).double())
    regularizer, run = DensityRatio(recorder, 1.0), run_of(random_vae(), data_of(batch), k=particles)
    z = latents_of(run).detach()

    def permuted() -> Tensor:
        regularizer(run)
        real, fake = recorder.seen.pop().view(2, particles, batch, 2)
        assert torch.equal(real, z)
        assert torch.equal(fake.sort(dim=1).values, z.sort(dim=1).values)
        return fake

    fakes = torch.stack([permuted() for _ in range(1000)])
    places = z.mean(1, keepdim=True).expand_as(z)  # any datum's may come to any place
    assert_mean(fakes, places, FAILURE_RATE)
    # Orders of two dimensions, and of two particles, have nothing to do with each other.
    centred = fakes - z.mean(1, keepdim=True)
    for a, b in ((centred[:, 0, :, 0], centred[:, 0, :, 1]), (centred[:, 0, :, 0], centred[:, 1, :, 0])):
        assert_mean((a * b).mean(1), torch.zeros(()), FAILURE_RATE)


def cross_entropy(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    logits = discriminator(torch.cat([real, fake]).detach()).flatten()
    labels = (torch.arange(len(logits)) < len(real)).double()
    return binary_cross_entropy_with_logits(logits, labels, reduction="sum")


def test_the_guide_and_the_discriminator_of_a_density_ratio_have_gradients_of_their_own():
    vae, x = random_vae(), data_of(5)
    recorder = Recorder(SMALL(2, 1).double())
    bound = bounds.ELBO(regularizers=[DensityRatio(recorder, 3.0), spy := Spy()])
    pyro.set_rng_seed(2)
    terms = bound.terms(vae.model, vae.guide, x)
    pyro.set_rng_seed(2)
    plain = bounds.ELBO().terms(vae.model, vae.guide, x)
    real, fake = recorder.seen[-1].chunk(2)
    cost = 3.0 * recorder.network(latents_of(spy.run)).sum()
    near(terms.loss, plain.loss + cost)
    near(terms.regularizers["DensityRatio"], cost)
    near(gradient_of(terms.loss, vae), gradient_of(plain.loss, vae) + gradient_of(cost, vae))
    near(gradient_of(terms.loss, recorder), gradient_of(cross_entropy(recorder.network, real, fake), recorder.network))
    found = DensityRatio(recorder, 3.0)(run_of(vae, x))
    assert found.aside == 0, "what trains the discriminator is no part of the loss"
    assert gradient_of(found.value, recorder) is None
    assert gradient_of(found.aside, vae) is None


def test_fit_trains_a_discriminator_until_it_knows_the_total_correlation():
    known, batch = aggregate(), 512
    known.vae.requires_grad_(False)
    z, joint, _ = on_a_grid(known.normal())
    mean_features = joint @ features(z)

    def found() -> Tensor:
        regularizer = DensityRatio(Quadratic(torch.zeros(6, dtype=torch.float64)), weight=1.0)
        train(
            known.vae,
            data_of(12 * batch, 2),
            [regularizer],
            batch_size=batch,
            epochs=4,
            optimizer=partial(torch.optim.Adam, lr=0.3),
            scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.3),
        )
        return regularizer.discriminator.theta @ mean_features

    # What is no noise is the 1 / 512 of the permuted that is as it was, and the square of the error of theta: together
    # a hundredth of the total correlation, where the bound of the test is a third.
    assert_mean(repeat(found, 5), known.total_correlation(), FAILURE_RATE)


# The adversary.


def learned_vae() -> VAE:
    """Returns a linear VAE with a prior to be learned."""
    likelihood = likelihoods.Normal(2, 3, AFFINE)
    return VAE(priors.DiagonalNormal(2), likelihood, encoders.DiagonalNormal(3, 2, AFFINE)).double()


@pytest.mark.parametrize("particles", [1, 3])
def test_the_adversary_and_its_gradients_are_those_written_by_hand(particles):
    vae, x, discriminator = learned_vae(), data_of(5), SMALL(3, 1).double()
    run = run_of(vae, x, k=particles)
    pyro.set_rng_seed(4)
    cost = Adversarial(discriminator, 2.0)(run)
    pyro.set_rng_seed(4)
    (layer,) = vae.likelihood.network.layers
    p = vae.prior().base_dist
    sampled = (p.loc + p.scale * torch.randn(5, 2, dtype=torch.float64)) @ layer.weight.T + layer.bias
    reconstructed = latents_of(run)[0] @ layer.weight.T + layer.bias
    fake = torch.cat([reconstructed, sampled])
    expected = -2.0 * logsigmoid(discriminator(fake)).sum()
    near(cost.value, expected)
    for part in (vae.prior, vae.likelihood, vae.encoder):
        assert gradient_of(expected, part).abs().max() > 1e-3
        near(gradient_of(cost.value, part), gradient_of(expected, part))
    near(gradient_of(cost.aside, discriminator), gradient_of(cross_entropy(discriminator, x, fake), discriminator))
    assert cost.aside == 0, "what trains the discriminator is no part of the loss"
    assert gradient_of(cost.value, discriminator) is None
    assert gradient_of(cost.aside, vae) is None


def test_fit_teaches_the_adversary_to_tell_data_from_samples_and_reconstructions():
    vae = learned_vae().requires_grad_(False)
    n = 400

    def data() -> Tensor:
        return data_of(n) + 1.0  # noise about a point, where samples lie in a plane

    regularizer = Adversarial(nn.Linear(3, 1).double(), 1.0)
    train(vae, data(), [regularizer], batch_size=50, epochs=5, optimizer=partial(torch.optim.Adam, lr=0.05))
    x = data()
    for z in (vae.prior().sample((n,)), vae.encode(x).sample()):
        logits = regularizer.discriminator(torch.cat([x, vae.decode(z).mean])).flatten()
        right = int((logits[:n] > 0).sum() + (logits[n:] < 0).sum())
        # What a coin would get right but for the failure rate.
        assert right > scipy.stats.binom(2 * n, 0.5).isf(FAILURE_RATE)


def test_whole_numbers_and_images_go_to_the_adversary_as_the_means_do():
    vae = VAE(
        priors.StandardNormal(2),
        likelihoods.Bernoulli(2, (1, 4, 4), SMALL),
        encoders.DiagonalNormal((1, 4, 4), 2, SMALL),
    )
    x = (torch.rand(6, 1, 4, 4) < 0.5).float()
    recorder = Recorder(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)))
    Adversarial(recorder, 1.0)(run_of(vae, x, k=2))
    fake, both = recorder.seen
    assert torch.equal(both, torch.cat([x, fake]))
    assert fake.shape == (12, 1, 4, 4)
    assert (fake > 0).all() and (fake < 1).all(), "probabilities, not draws"


# In training.


def regularizers_for(n: int) -> list[Regularizer]:
    """Returns one of each, for data of three dimensions."""
    return [
        TotalCorrelation(2.0, n),
        MaximumMeanDiscrepancy(3.0),
        DensityRatio(SMALL(2, 1).double(), 4.0),
        Adversarial(SMALL(3, 1).double(), 5.0),
    ]


NAMES = ["TotalCorrelation", "MaximumMeanDiscrepancy", "DensityRatio", "Adversarial"]
every_regularizer = pytest.mark.parametrize("i", range(4), ids=NAMES)


def train(vae: VAE | Pair, x: Tensor, regularizers: list[Regularizer], **options):
    return fit(vae.model, vae.guide, x, loss=bounds.ELBO(regularizers=regularizers), progress=False, **options)


def modules_of(vae: VAE, regularizers: list[Regularizer]) -> nn.ModuleList:
    """Returns a VAE and the discriminators, which are trained together."""
    return nn.ModuleList([vae, *(r.discriminator for r in regularizers if hasattr(r, "discriminator"))])


@every_regularizer
def test_a_step_of_svi_goes_down_the_gradient_of_the_loss(i):
    vae, x = learned_vae(), data_of(6)
    regularizers = [regularizers_for(20)[i]]
    everything = modules_of(vae, regularizers)
    bound = bounds.ELBO(2, regularizers=regularizers)
    pyro.set_rng_seed(1)
    loss = bound.differentiable_loss(vae.model, vae.guide, x)
    step = 0.01 * gradient_of(loss, everything)
    assert all(
        (part.abs() > 0).any() for part in step.split([sum(p.numel() for p in m.parameters()) for m in everything])
    )
    before = nn.utils.parameters_to_vector(everything.parameters()).detach()
    svi = SVI(vae.model, vae.guide, pyro.optim.SGD({"lr": 0.01}), bound)
    pyro.set_rng_seed(1)
    near(torch.tensor(svi.step(x), dtype=torch.float64), loss.detach())
    near(nn.utils.parameters_to_vector(everything.parameters()).detach(), before - step)


def test_a_history_holds_each_regularizer_by_the_name_of_its_class():
    vae = learned_vae()
    regularizers = regularizers_for(40)
    before = copy.deepcopy(modules_of(vae, regularizers).state_dict())
    history = train(vae, data_of(40), regularizers, batch_size=10, epochs=3, validation=data_of(10))
    for k, record in enumerate(history.records):
        near(torch.tensor(record["loss"]), torch.tensor(-record["bound"] + sum(record[name] for name in NAMES)))
        assert record["epoch"] == k + 1
    for name, value in modules_of(vae, regularizers).state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} was not trained"


def resumable(seed: int, epochs: int, callbacks=(), **options) -> dict[str, Tensor]:
    """Trains with all regularizers and a discriminator that has statistics, and returns all weights."""
    pyro.set_rng_seed(seed)
    vae = learned_vae()
    regularizers = regularizers_for(40)
    width = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1)).double()
    regularizers[3] = Adversarial(width, 1.0)
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    train(vae, x, regularizers, batch_size=16, epochs=epochs, callbacks=callbacks, **options)
    return modules_of(vae, regularizers).state_dict()


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = resumable(3, 4)
    stop = [lambda history: len(history) == 2]
    half = resumable(3, 4, callbacks=stop, checkpoint=tmp_path / "run")
    # Other weights and other noise to begin with: all that counts is in the checkpoint.
    resumed = resumable(99, 4, checkpoint=tmp_path / "run", resume=True)
    assert any(not torch.equal(half[name], whole[name]) for name in whole)
    for name in whole:
        assert torch.equal(resumed[name], whole[name]), name


def test_a_loss_without_gradients_has_the_same_value_and_makes_the_parameters_known():
    vae, x = learned_vae(), data_of(6)
    regularizers = regularizers_for(20)
    bound = bounds.ELBO(2, regularizers=regularizers)
    pyro.set_rng_seed(1)
    value = bound.loss(vae.model, vae.guide, x)
    known = {id(p.unconstrained()) for p in pyro.get_param_store().values()}
    assert known == {id(p) for p in modules_of(vae, regularizers).parameters()}
    pyro.set_rng_seed(1)
    with_gradients = bound.differentiable_loss(vae.model, vae.guide, x)
    near(with_gradients.detach(), torch.tensor(value, dtype=torch.float64))


def test_a_copy_trains_a_discriminator_of_its_own():
    vae, x = random_vae(), data_of(8)
    one = DensityRatio(SMALL(2, 1).double(), 1.0)
    train(vae, x, [one], batch_size=8, epochs=1)
    other = copy.deepcopy(one)
    before = nn.utils.parameters_to_vector(one.discriminator.parameters()).detach()
    train(vae, x, [other], batch_size=8, epochs=1)
    assert torch.equal(nn.utils.parameters_to_vector(one.discriminator.parameters()), before)
    assert not torch.equal(nn.utils.parameters_to_vector(other.discriminator.parameters()), before)


def test_what_is_frozen_in_a_discriminator_stays_as_it_is():
    vae, x = random_vae(), data_of(8)
    network = SMALL(2, 1).double()
    first, *_ = network.parameters()
    first.requires_grad_(False)
    before = [p.clone() for p in network.parameters()]
    train(
        vae, x, [DensityRatio(network, 1.0)], batch_size=8, epochs=1
    )  # and Pyro does not warn, which would be an error here
    same = [torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True)]
    assert same == [True, *[False] * (len(before) - 1)]


# In other bounds, and plates.

LEAVES = {
    "IWAE": lambda k, **kw: bounds.IWAE(k, **kw),
    "IWAE-DReG": lambda k, **kw: bounds.IWAE(k, bounds.DoublyReparameterized(), **kw),
    "PIWAE": lambda k, **kw: bounds.PIWAE(k, 2, **kw),
    "PIWAE-DReG": lambda k, **kw: bounds.PIWAE(k, 2, bounds.DoublyReparameterized(), **kw),
    "ELBO-STL": lambda k, **kw: bounds.ELBO(k, gradient=bounds.StickingTheLanding(), **kw),
    "CUBO-DReG": lambda k, **kw: bounds.CUBO(k, gradient=bounds.DoublyReparameterized(), **kw),
}


class Added(NamedTuple):
    """What regularizers add to a loss and to its gradient, and how large the loss and its gradient are."""

    loss: Tensor
    gradient: Tensor
    size: float


def added(make: Callable, pair: VAE | Pair, x: Tensor, regularizers: list[Regularizer], over: nn.Module, **kw) -> Added:
    """Takes losses with and without regularizers at the same draws, which are the same in every call."""
    found = []
    for chosen in ([], regularizers):
        pyro.set_rng_seed(6)
        loss = make(4, regularizers=chosen, **kw).differentiable_loss(pair.model, pair.guide, x)
        found.append((loss.detach(), gradient_of(loss, over)))
    (loss, gradient), (loss_with, gradient_with) = found
    size = max(t.abs().max().item() for t in (loss, gradient))
    return Added(loss_with - loss, gradient_with - gradient, size)


def near_added(found: Added, loss: Tensor, gradient: Tensor) -> None:
    assert gradient.abs().max() > 1e-3, "or there is nothing to compare"
    near(found.loss, loss, found.size)
    near(found.gradient, gradient, found.size)


@every_regularizer
@pytest.mark.parametrize("make", LEAVES.values(), ids=LEAVES)
def test_what_a_regularizer_adds_to_a_gradient_is_the_same_in_every_bound(make, i):
    vae, x = learned_vae(), data_of(5)
    regularizers = [regularizers_for(20)[i]]
    over = modules_of(vae, regularizers)
    expected = added(bounds.ELBO, vae, x, regularizers, over)
    near_added(added(make, vae, x, regularizers, over), expected.loss, expected.gradient)


@every_regularizer
@pytest.mark.parametrize("make", [bounds.ELBO, *LEAVES.values()], ids=["ELBO", *LEAVES])
def test_in_chunks_a_regularizer_is_given_the_first(make, i):
    vae, x = learned_vae(), data_of(5)
    regularizers = [regularizers_for(20)[i]]
    over = modules_of(vae, regularizers)
    found = added(make, vae, x, regularizers, over, chunk_size=2)
    # The first two of four particles, whose latents keep their graphs under the ELBO; the spy draws no noise.
    spy = Spy()
    bound = bounds.ELBO(4, chunk_size=2, regularizers=[spy])
    bound.loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(6)
    bound.terms(vae.model, vae.guide, x)
    assert latents_of(spy.run).shape == (2, 5, 2)
    pyro.set_rng_seed(6)
    assert torch.equal(latents_of(spy.run), latents_of(run_of(vae, x, k=4))[:2])
    pyro.set_rng_seed(6)
    bound.terms(vae.model, vae.guide, x)
    cost = regularizers[0](spy.run)
    near_added(found, cost.value.detach(), gradient_of(cost.value + cost.aside, over))


def test_the_gradient_of_a_lower_latent_goes_on_to_those_above():
    small = partial(MLP, hidden=(5,))
    vae = HierarchicalVAE(
        priors.StandardNormal(2),
        [likelihoods.Normal(2, 2, small)],
        likelihoods.Normal(2, 3, small),
        [encoders.DiagonalNormal(3, 2, small), encoders.DiagonalNormal(2, 2, small)],
    ).double()
    x = data_of(5)
    for site in ("z1", "z2"):
        for regularizer in (TotalCorrelation(2.0, 20, site=site), MaximumMeanDiscrepancy(3.0, site=site)):
            expected = added(bounds.ELBO, vae, x, [regularizer], vae.encoders)
            found = added(LEAVES["IWAE-DReG"], vae, x, [regularizer], vae.encoders)
            near_added(found, expected.loss, expected.gradient)


def in_a_plate_of(vae: VAE, total: int) -> Pair:
    """Returns a VAE whose batches stand for so many data."""

    def model(x):
        vae.register()
        with pyro.plate("data", total, subsample=x):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.decode(z), obs=x)

    def guide(x):
        vae.register()
        with pyro.plate("data", total, subsample=x):
            pyro.sample("z", vae.encode(x))

    return Pair(model, guide)


@every_regularizer
@pytest.mark.parametrize("make", [bounds.ELBO, LEAVES["IWAE-DReG"]], ids=["ELBO", "IWAE-DReG"])
def test_a_batch_that_stands_for_more_data_weighs_as_much(make, i):
    vae, x = learned_vae(), data_of(5)
    regularizers = [regularizers_for(40)[i]]
    over = modules_of(vae, regularizers)
    once = added(make, vae, x, regularizers, over)
    near_added(added(make, in_a_plate_of(vae, 40), x, regularizers, over), 8 * once.loss, 8 * once.gradient)
    pyro.set_rng_seed(6)
    pair = in_a_plate_of(vae, 40)
    terms = make(4, regularizers=regularizers).terms(pair.model, pair.guide, x)
    near(terms.regularizers[NAMES[i]], 8 * once.loss, once.size)


# What is refused.


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(weight):
    makers = [
        lambda: TotalCorrelation(weight, 10),
        lambda: MaximumMeanDiscrepancy(weight),
        lambda: DensityRatio(nn.Linear(2, 1), weight),
        lambda: Adversarial(nn.Linear(3, 1), weight),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=f"weight must be finite, got {weight}"):
            make()


def test_a_discriminator_that_is_no_module_is_refused():
    for cls in (DensityRatio, Adversarial):
        with pytest.raises(TypeError, match="discriminator must be a module, got <class .*Linear"):
            cls(nn.Linear, 1.0)


@pytest.mark.parametrize("size", [1, 0, -3, math.nan])
def test_a_data_set_of_one_is_refused(size):
    with pytest.raises(ValueError, match=f"dataset_size must be at least 2, got {size}"):
        TotalCorrelation(1.0, size)


def full_rank_vae() -> VAE:
    return VAE(
        priors.StandardNormal(2), likelihoods.Normal(2, 3, AFFINE), encoders.FullRankNormal(3, 2, AFFINE)
    ).double()


def scalar_pair() -> Pair:
    """Returns a model and a guide of a number for each datum, which is no vector."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 3), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 1.0))

    return Pair(model, guide)


WIDE, TWO = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()
REFUSED = {
    "no such latent": (random_vae, 4, TotalCorrelation(1.0, 9, site="y"), 'guide has no site "y" .*; it has z'),
    "no such latent, MMD": (random_vae, 4, MaximumMeanDiscrepancy(1.0, site="y"), 'guide has no site "y" .*; it has z'),
    "no such latent, ratio": (random_vae, 4, DensityRatio(TWO, 1.0, site="y"), 'guide has no site "y" .*; it has z'),
    "no such data": (random_vae, 4, Adversarial(WIDE, 1.0, site="y"), 'model has no site "y" .*; it has z, x'),
    "dependent dimensions": (
        full_rank_vae,
        4,
        TotalCorrelation(1.0, 9),
        'independent dimensions at site "z", got a MultivariateNormal. DensityRatio needs only draws',
    ),
    "scalars": (scalar_pair, 4, TotalCorrelation(1.0, 9), 'independent dimensions at site "z", got a Normal'),
    "scalars, MMD": (scalar_pair, 4, MaximumMeanDiscrepancy(1.0), r'vectors, but site "z" has events of shape \(\)'),
    "scalars, ratio": (scalar_pair, 4, DensityRatio(TWO, 1.0), r'vectors, but site "z" has events of shape \(\)'),
    "fewer data than a batch": (random_vae, 4, TotalCorrelation(1.0, 3), "batch of 4 data, more than dataset_size=3"),
    "two logits": (random_vae, 4, DensityRatio(TWO, 1.0), r"one logit for each of 12 inputs, got shape \(12, 2\)"),
    "two logits, adversary": (
        random_vae,
        4,
        Adversarial(WIDE, 1.0),
        r"one logit for each of 8 inputs, got shape \(8, 2\)",
    ),
}


@pytest.mark.parametrize(
    "regularizer", [TotalCorrelation(1.0, 9), MaximumMeanDiscrepancy(1.0)], ids=lambda r: type(r).__name__
)
def test_a_batch_of_one_adds_nothing(regularizer):
    # The last batch of an epoch may be one.
    vae, x = random_vae(), data_of(1)
    losses = []
    for bound in (bounds.ELBO(3), bounds.ELBO(3, regularizers=[regularizer])):
        pyro.set_rng_seed(1)
        loss = bound.differentiable_loss(vae.model, vae.guide, x)
        losses.append((loss.item(), gradients(loss, vae)))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])


def test_the_total_correlation_of_classes_alike_for_all_data_is_zero():
    # Integer latents: the logarithms of shares must not be rounded to integers.
    logits = torch.randn(4, 3, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.ones(4, 3).double()).to_event(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits).to_event(1))

    with torch.no_grad():
        terms = bounds.ELBO(3, regularizers=[TotalCorrelation(1.0, 50)]).terms(model, guide, data_of(6))
    assert abs(terms.regularizers["TotalCorrelation"].item()) < 100 * ROUNDING


def test_two_of_one_class_both_count_and_are_numbered():
    vae, x = random_vae(), data_of(5)
    costs = []
    for weights in ((100.0,), (1.0,), (100.0, 1.0)):
        bound = bounds.ELBO(3, regularizers=[MaximumMeanDiscrepancy(weight) for weight in weights])
        pyro.set_rng_seed(1)
        terms = bound.terms(vae.model, vae.guide, x)
        costs.append(terms.loss.item() + terms.bound.item())
        names = list(terms.regularizers)
    assert names == ["MaximumMeanDiscrepancy", "MaximumMeanDiscrepancy 2"]
    # The second makes new draws from the prior, so that the sum is that of the first alone plus a similar one.
    assert costs[2] - costs[0] == pytest.approx(terms.regularizers[names[1]].item(), abs=1e-9)
    assert abs(terms.regularizers[names[1]].item()) > 1e-6


@pytest.mark.parametrize(
    "bound", [bounds.ReweightedWakeSleep, bounds.CUBO, partial(bounds.TVO, gradient=bounds.Covariance())]
)
def test_bounds_that_hold_the_latents_let_the_regularizer_move_them(bound):
    vae, x, found = random_vae(), data_of(5), []
    regularizer = TotalCorrelation(3.0, 9)
    for with_it, without in (
        (bound(3, regularizers=[regularizer]), bound(3)),
        (bounds.ELBO(3, regularizers=[regularizer]), bounds.ELBO(3)),
    ):
        each = []
        for b in (with_it, without):
            pyro.set_rng_seed(1)
            each.append(gradients(b.differentiable_loss(vae.model, vae.guide, x), vae))
        found.append(each[0] - each[1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)  # differences of gradients below 1e3
    assert found[1].abs().max() > 1e-4


def test_a_learned_prior_follows_the_discrepancy():
    encoder = encoders.DiagonalNormal(3, 2, AFFINE)
    vae = VAE(priors.DiagonalNormal(2), likelihoods.Normal(2, 3, AFFINE), encoder).double()
    bound = bounds.ELBO(beta=0.0, regularizers=[MaximumMeanDiscrepancy(1.0)])
    x = data_of(40)
    with torch.no_grad():
        vae.prior.params[:2] = 3.0  # far off
    loss = bound.differentiable_loss(vae.model, vae.guide, x)
    (gradient,) = torch.autograd.grad(loss, vae.prior.params)
    assert (gradient[:2] > 0).all()  # downhill is back to the latents


def test_the_gradient_of_a_discriminator_does_not_grow_with_the_particles():
    vae, x = random_vae(), data_of(6)
    discriminator = torch.nn.Linear(vae.encoder.latent_dim, 1).double()
    means = []
    for k in (1, 8):
        bound = bounds.ELBO(k, regularizers=[DensityRatio(discriminator, 1.0)])

        def draw(bound=bound) -> Tensor:
            loss = bound.differentiable_loss(vae.model, vae.guide, x)
            return torch.autograd.grad(loss, discriminator.bias)[0]

        means.append(repeat(draw, 200))
    assert scipy.stats.ttest_ind(*means, equal_var=False).pvalue.min() > FAILURE_RATE


@pytest.mark.parametrize("make, n, regularizer, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_name(make, n, regularizer, message):
    pair = make()
    with pytest.raises(ValueError, match=message):
        bounds.ELBO(3, regularizers=[regularizer]).terms(pair.model, pair.guide, data_of(n))
