"""Encoders against closed forms, scipy, and exact derivatives."""

import math
import subprocess
import sys

import pytest
import scipy.special
import scipy.stats
import torch
from cases import SMALL, cases, inputs
from helpers import FAILURE_RATE
from linear_gaussian import assert_mean, repeat
from pyro import distributions as dist
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyrovae import VAE, distributions, encoders, fit, likelihoods, log_marginal, log_weights, priors
from pyrovae.distributions import LogisticNormal, ReparameterizedMixture, StratifiedCategorical, VonMisesFisher, log_0f1

EPS = torch.finfo(torch.float64).eps


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------- von Mises-Fisher

KAPPAS = double(1e-8, 0.01, 0.5, 3.0, 17.0, 29.9, 30.1, 60.0, 400.0, 1e4)


def unit(*shape: int) -> Tensor:
    return nn.functional.normalize(torch.randn(shape, dtype=torch.float64), dim=-1)


def mean_height(m: int, kappa: Tensor) -> Tensor:
    """Returns the mean of mu . z, a ratio of Bessel functions, by scipy."""
    return torch.from_numpy(scipy.special.ive(m / 2, kappa.numpy()) / scipy.special.ive(m / 2 - 1, kappa.numpy()))


def test_von_mises_fisher_in_three_dimensions_is_the_closed_form():
    loc, z = unit(9, 10, 3), unit(9, 10, 3)
    kappa = KAPPAS[1:]
    log_prob = VonMisesFisher(loc, kappa.unsqueeze(-1)).log_prob(z)
    # log kappa / (4 pi sinh kappa)
    log_sinh = kappa + torch.log1p(-(-2 * kappa).exp()) - math.log(2)
    expected = kappa.unsqueeze(-1) * (loc * z).sum(-1) + (kappa.log() - log_sinh - math.log(4 * math.pi)).unsqueeze(-1)
    # Terms as large as kappa, and the asymptotic expansion's error.
    assert ((log_prob - expected).abs() <= 20 * EPS * (1 + kappa.unsqueeze(-1)) + 2e-8).all()


@pytest.mark.parametrize("m", [2, 3, 5, 20])
def test_von_mises_fisher_equals_scipys(m):
    loc, z = unit(m), unit(50, m)
    for kappa in KAPPAS[2:].tolist():
        expected = scipy.stats.vonmises_fisher(loc.numpy(), kappa).logpdf(z.numpy())
        if not math.isfinite(expected[0]):
            continue
        log_prob = VonMisesFisher(loc, double(kappa)[0]).log_prob(z)
        # Scipy's normaliser loses digits in the logarithm of a small Bessel function.
        assert (log_prob - torch.from_numpy(expected)).abs().max() <= 2e-8 + 100 * EPS * (1 + kappa)


@pytest.mark.parametrize("m", [2, 3, 5, 20, 100])
def test_the_normaliser_is_a_bessel_function(m):
    b = m / 2
    bessel = torch.from_numpy(scipy.special.ive(b - 1, KAPPAS.numpy()))
    there = bessel > 1e-290  # scipy underflows below
    assert there.sum() >= 6
    log_bessel = log_0f1(b, KAPPAS) - math.lgamma(b) + (b - 1) * (KAPPAS / 2).log() - KAPPAS
    error = (log_bessel - bessel.log()).abs()[there]
    size = 1 + KAPPAS + (b - 1) * KAPPAS.log().abs() + math.lgamma(b)
    assert (error <= 2e-8 + 50 * EPS * size[there]).all()


@pytest.mark.parametrize("m", [2, 3, 5, 20, 100])
def test_the_normaliser_where_kappa_is_small(m):
    # 1 + kappa^2 / (2 m) + ..., and the next term is below kappa^4.
    kappa = double(0.0, 1e-20, 1e-4, 1e-3)
    assert (
        (log_0f1(m / 2, kappa) - kappa.square() / (2 * m)).abs() <= kappa**4 + 4 * EPS * (1 + math.lgamma(m / 2))
    ).all()
    at_zero = double(0.0).requires_grad_()
    log_0f1(m / 2, at_zero).sum().backward()
    assert at_zero.grad.abs().max() <= 1e-12


@pytest.mark.parametrize("m", [2, 3, 5, 20, 100])
def test_the_derivative_of_the_normaliser_is_the_mean_height(m):
    kappa = KAPPAS[2:].clone().requires_grad_()
    (derivative,) = torch.autograd.grad(log_0f1(m / 2, kappa).sum(), kappa)
    expected = mean_height(m, KAPPAS[2:])
    there = expected.isfinite()
    # scipy's Bessel functions are good to some 1e-13; the asymptotic expansion and its derivative to 1e-8.
    assert ((derivative - expected).abs()[there] <= 1e-8).all()
    loc = unit(m)
    mean = VonMisesFisher(loc, KAPPAS[2:]).mean
    assert ((mean - expected.unsqueeze(-1) * loc).abs()[there] <= 1e-8).all()


@pytest.mark.parametrize("kappa", [0.0, 0.5, 5.0, 80.0, 2000.0])
@pytest.mark.parametrize("m", [2, 3, 5, 20, 100])
@torch.no_grad()
def test_heights_of_draws_have_the_moments_of_von_mises_fisher(m, kappa):
    loc, n = unit(m), 20000
    z = VonMisesFisher(loc, double(kappa)[0]).sample((n,))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(n, dtype=torch.float64), rtol=0, atol=10 * EPS)
    height = z @ loc
    first = mean_height(m, double(kappa))[0].item() if kappa else 0.0
    second = 1 - (m - 1) * first / kappa if kappa else 1 / m
    assert_mean(torch.stack([height, height.square()], -1), double(first, second), FAILURE_RATE)
    # A direction across the mean is as likely as its opposite.
    across = nn.functional.normalize(torch.eye(m, dtype=torch.float64)[0] - loc[0] * loc, dim=-1)
    assert_mean(z @ across, double(0.0), FAILURE_RATE)


@pytest.mark.parametrize("kappa", [0.3, 5.0, 80.0, 2000.0])
@pytest.mark.parametrize("m", [2, 3, 5, 20, 100])
def test_the_gradient_by_the_concentration_is_that_of_the_expectation(m, kappa):
    n = 20000
    loc, kappas = unit(m), torch.full((n,), kappa, dtype=torch.float64, requires_grad=True)
    height = VonMisesFisher(loc, kappas).rsample() @ loc
    # With A the ratio of Bessel functions, E w = A and E w^2 = 1 - (m - 1) A / kappa; A' = 1 - A^2 - (m - 1) A / kappa.
    a = mean_height(m, double(kappa))[0].item()
    slope = 1 - a * a - (m - 1) * a / kappa
    (first,) = torch.autograd.grad(height.sum(), kappas, retain_graph=True)
    (second,) = torch.autograd.grad(height.square().sum(), kappas)
    expected = double(slope, (m - 1) * (a / kappa**2 - slope / kappa))
    assert_mean(torch.stack([first, second], -1), expected, FAILURE_RATE)


@pytest.mark.parametrize("kappa", [0.3, 5.0, 80.0])
@pytest.mark.parametrize("m", [2, 3, 20])
def test_the_gradient_by_the_mean_direction_is_that_of_the_expectation(m, kappa):
    n = 20000
    v = 2 * unit(m)
    raw, a = v.expand(n, m).clone().requires_grad_(), torch.randn(m, dtype=torch.float64)
    z = VonMisesFisher(nn.functional.normalize(raw, dim=-1), double(kappa)[0]).rsample()
    (gradient,) = torch.autograd.grad((z @ a).sum(), raw)
    mu, ratio = v / 2, mean_height(m, double(kappa))[0]
    assert_mean(gradient, ratio * (a - (a @ mu) * mu) / 2, FAILURE_RATE)


def test_the_derivative_of_a_height_is_that_of_its_quantile():
    # Where the height at a given probability is known: m = 3, F(w) = (e^(kw) - e^-k) / (e^k - e^-k).
    kappa, n = 4.0, 1000
    kappas, loc = torch.full((n,), kappa, dtype=torch.float64, requires_grad=True), unit(3)
    height = VonMisesFisher(loc, kappas).rsample() @ loc
    (slope,) = torch.autograd.grad(height.sum(), kappas)
    w = height.detach()
    probability = ((kappa * w).exp() - math.exp(-kappa)) / (2 * math.sinh(kappa))

    def quantile(k: Tensor) -> Tensor:
        return ((-k).exp() + 2 * probability * k.sinh()).log() / k

    k = torch.full((n,), kappa, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(quantile(k).sum(), k)
    # The quadrature is exact to rounding; the quantile near -1 is a logarithm of a small difference.
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("m", [2, 3, 20])
def test_von_mises_fisher_in_single_precision_stays_on_the_sphere_with_finite_gradients(m):
    loc = nn.functional.normalize(torch.randn(200, m), dim=-1).requires_grad_()
    kappa = torch.logspace(-6, 6, 200).requires_grad_()
    p = VonMisesFisher(loc, kappa)
    z = p.rsample((50,))
    assert z.dtype == torch.float32
    assert p.support.check(z).all()
    log_prob = p.log_prob(z)
    assert log_prob.isfinite().all()
    (log_prob.sum() + (z * torch.randn_like(z)).sum()).backward()
    assert loc.grad.isfinite().all()
    assert kappa.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------------------- flows

FLOWS = [encoders.InverseAutoregressiveFlow, encoders.NeuralSplineFlow]


def flow_of(cls: type, d: int = 3) -> encoders.Encoder:
    encoder = cls(4, d, SMALL, num_transforms=2, num_features=4).double()
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.3 * torch.randn_like(p) / math.sqrt(p.shape[-1] if p.dim() > 1 else 1))
    return encoder


@pytest.mark.parametrize("cls", FLOWS, ids=lambda cls: cls.__name__)
def test_flows_score_by_the_change_of_variables(cls):
    encoder = flow_of(cls)
    q = encoder(torch.randn(4, dtype=torch.float64))
    base = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
    transform = q.flow(q.features).transform.inv

    def forward(noise: Tensor) -> Tensor:
        return q.loc + q.scale * transform(noise)

    for noise in torch.randn(20, 3, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(forward, noise)
        expected = base.log_prob(noise) - torch.linalg.slogdet(jacobian).logabsdet
        z = forward(noise).detach()
        # The inverse of some 100 operations, each with a slope of at most some 100.
        torch.testing.assert_close(q.log_prob(z), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cls", FLOWS, ids=lambda cls: cls.__name__)
def test_flows_score_what_they_drew_as_anything_else(cls):
    encoder = flow_of(cls)
    q = encoder(torch.randn(6, 4, dtype=torch.float64))
    z = q.rsample((5,))
    cached, recomputed = q.log_prob(z), q.log_prob(z.clone())
    torch.testing.assert_close(cached, recomputed, rtol=0, atol=1e-9)
    # The derivative by the encoder's parameters through the draw is the same for both ways to compute the density.
    wanted = [p for p in encoder.parameters() if p.requires_grad]
    weight = torch.randn(5, 6, dtype=torch.float64)
    ours = torch.autograd.grad((cached * weight).sum(), wanted, retain_graph=True)
    theirs = torch.autograd.grad((recomputed * weight).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("cls", FLOWS, ids=lambda cls: cls.__name__)
def test_flows_keep_no_score_of_a_draw_without_gradients(cls):
    encoder = flow_of(cls)
    q = encoder(torch.randn(6, 4, dtype=torch.float64))
    z = q.sample()
    log_prob = q.log_prob(z)
    assert log_prob.requires_grad
    (gradient,) = torch.autograd.grad(log_prob.sum(), list(encoder.network.parameters())[-1])
    assert gradient.ne(0).any()


@pytest.mark.parametrize("cls", FLOWS, ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_a_flow_at_its_start_is_near_the_standard_normal(cls):
    q = cls(4, 2, SMALL)(torch.zeros(4))
    z = q.sample((4000,))
    assert z.mean(0).abs().max() < 1
    assert 0.5 < z.std(0).min() <= z.std(0).max() < 2


def test_building_a_flow_changes_no_setting_of_the_process():
    code = """
import sys
import torch
import pyrovae
base = torch.distributions.Distribution
before = base._validate_args, base.__dict__["arg_constraints"]
assert before[0] and "zuko" not in sys.modules, "importing pyrovae imports zuko, or arguments are not validated"
q = pyrovae.encoders.NeuralSplineFlow(4, 2)(torch.zeros(3, 4))
assert "zuko" in sys.modules
pyrovae.encoders.InverseAutoregressiveFlow(4, 2)(torch.zeros(3, 4)).rsample()
pyrovae.priors.FlowPrior(2)().log_prob(q.rsample())
assert (base._validate_args, base.__dict__["arg_constraints"]) == before
for build in (torch.distributions.Normal, __import__("pyro").distributions.Normal):
    try:
        build(0.0, -1.0)
    except ValueError:
        continue
    raise SystemExit("a negative scale was accepted")
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr


# --------------------------------------------------------------------------------------------------- normals, mixtures


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_low_rank_normal_is_the_normal_with_that_covariance(rank):
    d = 4
    encoder = encoders.LowRankNormal(3, d, SMALL, rank=rank).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        q, params = encoder(x), encoder.network(x)
        scale = nn.functional.softplus(params[:, d : 2 * d] + math.log(math.e - 1)) + 1e-6
        factor = params[:, 2 * d :].reshape(6, d, rank)
        covariance = torch.diag_embed(scale.square()) + factor @ factor.mT
        expected = torch.distributions.MultivariateNormal(params[:, :d], covariance)
        z = 2 * torch.randn(7, 6, d, dtype=torch.float64)
        torch.testing.assert_close(q.covariance_matrix, covariance, rtol=0, atol=100 * EPS)
        # Inverses of covariances with a condition below 100 or so.
        torch.testing.assert_close(q.log_prob(z), expected.log_prob(z), rtol=0, atol=1e5 * EPS)


def full_rank(tilt: float) -> tuple[list[Tensor], dist.TorchDistribution]:
    """Returns leaves, and a normal with conditional standard deviations `tilt` times smaller than marginal ones."""
    factor = torch.tensor([[1.0, 0.0, 0.0], [3.0, 1 / tilt, 0.0], [-2.0, 1.0, 1 / tilt]]).expand(6, 3, 3)
    leaves = [(5 * torch.randn(6, 3)).requires_grad_(), factor.clone().requires_grad_()]
    return leaves, distributions.MultivariateNormal(leaves[0], scale_tril=leaves[1].tril())


def low_rank(tilt: float) -> tuple[list[Tensor], dist.TorchDistribution]:
    factor = torch.tensor([[1.0, -0.5], [0.5, 2.0], [2.0, 1.0]]).expand(6, 3, 2)
    leaves = [5 * torch.randn(6, 3), factor.clone(), torch.tensor([1.0, 2.0, 0.5]) / tilt**2]
    leaves = [t.requires_grad_() for t in leaves]
    return leaves, distributions.LowRankMultivariateNormal(*leaves)


def in_double(q: dist.TorchDistribution, leaves: list[Tensor]) -> tuple[list[Tensor], dist.TorchDistribution]:
    """Returns the same normal by torch, with its own leaves in double precision."""
    leaves = [t.detach().double().requires_grad_() for t in leaves]
    if isinstance(q, dist.MultivariateNormal):
        return leaves, torch.distributions.MultivariateNormal(leaves[0], scale_tril=leaves[1].tril())
    return leaves, torch.distributions.LowRankMultivariateNormal(*leaves)


@pytest.mark.parametrize("tilt", [1.0, 1e3, 1e5])
@pytest.mark.parametrize("normal", [full_rank, low_rank])
def test_the_density_of_a_draw_is_that_of_its_noise(normal, tilt):
    leaves, q = normal(tilt)
    q = q.expand((4, 6))
    exact_leaves, exact = in_double(q, leaves)
    torch.manual_seed(1)
    z = q.rsample()
    # The same draw without rounding.
    torch.manual_seed(1)
    if normal is full_rank:
        exact_z = exact_leaves[0] + (exact_leaves[1].tril() @ torch.randn(4, 6, 3).double().unsqueeze(-1)).squeeze(-1)
    else:
        exact_z = (exact_leaves[1] @ torch.randn(4, 6, 2).double().unsqueeze(-1)).squeeze(-1) + exact_leaves[0]
        exact_z = exact_z + exact_leaves[2].sqrt() * torch.randn(4, 6, 3).double()
    log_q, truth = q.log_prob(z), exact.log_prob(exact_z)
    # Logarithms of scales and squares of noise, in single precision; Woodbury's formula, in double, loses tilt^2.
    digits = 100 * torch.finfo(torch.float32).eps + 1e3 * tilt**2 * EPS
    torch.testing.assert_close(log_q.double(), truth, rtol=digits, atol=digits)
    held = z.detach().clone().requires_grad_()
    torch.testing.assert_close(q.log_prob(held).double(), truth, rtol=digits, atol=digits)

    def same_gradients(ours: Tensor, theirs: Tensor, by: list[Tensor], theirs_by: list[Tensor]) -> None:
        found = torch.autograd.grad(ours.sum(), by, retain_graph=True, allow_unused=True, materialize_grads=True)
        right = torch.autograd.grad(theirs.sum(), theirs_by, retain_graph=True)
        for a, b in zip(found, right, strict=True):
            # Torch's own errors grow with the condition once more: terms along and across the narrow direction cancel.
            torch.testing.assert_close(a.double(), b, rtol=digits, atol=digits * max(1.0, b.abs().max().item()) * 10)

    # With latents fixed: the score function, and the path of sticking the landing. Through the draw: the total.
    exact_held = exact_z.detach().requires_grad_()
    same_gradients(q.log_prob(held), exact.log_prob(exact_held), [held, *leaves], [exact_held, *exact_leaves])
    with torch.no_grad():  # a draw without a graph is fixed too
        torch.manual_seed(1)
        drawn = q.rsample()
    same_gradients(q.log_prob(drawn), exact.log_prob(exact_held), leaves, exact_leaves)
    if tilt < 1e4:  # beyond, torch's reference cancels
        torch.manual_seed(1)
        same_gradients(q.log_prob(q.rsample()), truth, leaves[1:], exact_leaves[1:])


@pytest.mark.parametrize("tilt", [1.0, 1e3])
@pytest.mark.parametrize("normal", [full_rank, low_rank])
@pytest.mark.parametrize("shape", [(3,), (6, 3), (5, 6, 3), (2, 5, 6, 3)])
def test_any_other_value_has_its_own_density(normal, tilt, shape):
    leaves, q = normal(tilt)
    _, exact = in_double(q, leaves)
    with torch.no_grad():
        z = 2 * torch.randn(shape)
        truth = exact.log_prob(z.double())
        digits = torch.finfo(torch.float32).eps + 1e3 * tilt**2 * EPS
        torch.testing.assert_close(q.log_prob(z).double(), truth, rtol=digits, atol=digits)
        if len(shape) > 2:
            q.rsample(shape[:-2])  # of the same shape, but not the same
            torch.testing.assert_close(q.log_prob(z).double(), truth, rtol=digits, atol=digits)


@pytest.mark.parametrize("normal", [full_rank, low_rank])
def test_correlated_normals_have_torchs_entropy_and_divergence(normal):
    leaves, q = normal(10.0)
    _, exact = in_double(q, leaves)
    # Torch's sums of traces of inverses in single precision, at a condition of 1e3.
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(q.entropy().double(), exact.entropy(), **close)
    p = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
    kl = torch.distributions.kl_divergence
    truth = kl(exact, torch.distributions.MultivariateNormal(double(0, 0, 0), torch.eye(3).double()))
    torch.testing.assert_close(kl(q, p).double(), truth, **close)


@pytest.mark.parametrize("encoder", [encoders.FullRankNormal, encoders.LowRankNormal])
@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_columns_on_a_large_scale_are_learned(encoder, scale):
    x = scale * torch.randn(256, 3) @ torch.randn(3, 10) + torch.randn(256, 10)
    vae = VAE(priors.StandardNormal(3), likelihoods.Normal(3, 10, SMALL), encoder(10, 3, SMALL))
    losses = fit(vae.model, vae.guide, x, epochs=30, progress=False)["loss"]
    # No loss is below that of the normal with the moments of the data, which no model here reaches so soon.
    best = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0)).log_prob(x).mean()
    assert -best < min(losses) and losses[-1] < losses[0] < math.inf
    estimate = log_marginal(vae.model, vae.guide, x[:50], progress=False)
    assert estimate.value.mean() < best


def mixture(n: int, stratified: bool = False) -> tuple[ReparameterizedMixture, list[Tensor]]:
    """Returns n copies of one mixture of three normals in two dimensions, and their parameters."""
    loc = double(-1.0, 0.5, 1.5, 1.0, 0.3, -2.0).view(3, 2).expand(n, 3, 2).clone().requires_grad_()
    scale = double(0.5, 1.0, 0.8, 0.3, 1.2, 0.6).view(3, 2).expand(n, 3, 2).clone().requires_grad_()
    logits = double(0.2, -0.5, 0.4).expand(n, 3).clone().requires_grad_()
    categorical = StratifiedCategorical if stratified else dist.Categorical
    q = ReparameterizedMixture(categorical(logits=logits), dist.Normal(loc, scale).to_event(1))
    return q, [logits, loc, scale]


def moments(logits: Tensor, loc: Tensor, scale: Tensor) -> dict[str, Tensor]:
    weight = logits.softmax(-1).unsqueeze(-1)
    return {
        "mean": (weight * loc).sum(-2).sum(-1),
        "square": (weight * (loc.square() + scale.square())).sum(-2)[..., 0],
        "product": (weight.squeeze(-1) * loc.prod(-1)).sum(-1),
    }


FUNCTIONS = {"mean": lambda z: z.sum(-1), "square": lambda z: z[..., 0].square(), "product": lambda z: z.prod(-1)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_mixtures_gradient_is_that_of_the_expectation(name):
    q, params = mixture(20000)
    found = torch.autograd.grad(FUNCTIONS[name](q.rsample()).sum(), params)
    one = [p[:1].detach().requires_grad_() for p in params]
    expected = torch.autograd.grad(moments(*one)[name].sum(), one, allow_unused=True)
    expected = [torch.zeros_like(p) if g is None else g for p, g in zip(one, expected, strict=True)]
    draws = torch.cat([g.flatten(1) for g in found], -1)
    assert_mean(draws, torch.cat([g.flatten(1) for g in expected], -1)[0], FAILURE_RATE)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_stratified_draws_have_the_same_expectations_and_gradients(name):
    groups, particles = 4000, 8
    q, params = mixture(groups, stratified=True)
    values = FUNCTIONS[name](q.rsample((particles,))).mean(0)
    found = torch.autograd.grad(values.sum(), params)
    one = [p[:1].detach().requires_grad_() for p in params]
    value = moments(*one)[name]
    expected = torch.autograd.grad(value.sum(), one, allow_unused=True)
    expected = [torch.zeros_like(p) if g is None else g for p, g in zip(one, expected, strict=True)]
    draws = torch.cat([values.detach()[:, None], *(g.flatten(1) for g in found)], -1)
    truth = torch.cat([value.detach()[:, None], *(g.flatten(1) for g in expected)], -1)[0]
    assert_mean(draws, truth, FAILURE_RATE)
    if name == "mean":  # most of its variance is between components
        independent = FUNCTIONS[name](mixture(groups)[0].rsample((particles,))).mean(0)
        assert values.var() < 0.7 * independent.var()


@pytest.mark.parametrize("how", ["sample_shape", "expand"])
@torch.no_grad()
def test_stratified_draws_take_each_class_its_share(how):
    probs = double(0.1, 0.25, 0.05, 0.6).expand(50, 4)
    p = StratifiedCategorical(probs)
    draws = p.sample((40,)) if how == "sample_shape" else p.expand((40, 50)).sample()
    assert draws.shape == (40, 50)
    counts = nn.functional.one_hot(draws, 4).sum(0)
    # An interval of probability cuts at most two of the 40 strata.
    assert ((counts - 40 * probs).abs() < 2).all()
    assert (draws[:, 0] != draws[:, 1]).any()  # different data have different draws
    single = p.sample((1,)).squeeze(0) if how == "sample_shape" else p.expand((1, 50)).sample().squeeze(0)
    assert single.shape == (50,)


@torch.no_grad()
def test_each_stratified_draw_alone_has_the_distribution():
    probs = double(0.1, 0.25, 0.05, 0.6)
    draws = StratifiedCategorical(probs.expand(20000, 4)).sample((3,))
    for draw in draws:
        p_value = scipy.stats.chisquare(draw.bincount(minlength=4), 20000 * probs).pvalue
        assert p_value > FAILURE_RATE / 3


@torch.no_grad()
def test_the_mixture_posterior_is_the_mixture_of_its_parameters():
    encoder = encoders.GaussianMixture(4, 2, SMALL, num_components=3).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    q, params = encoder(x), encoder.network(x)
    loc, raw = params[:, 3:].reshape(6, 2, 3, 2).unbind(1)
    scale = nn.functional.softplus(raw + math.log(math.e - 1)) + 1e-6
    z = 2 * torch.randn(20, 6, 2, dtype=torch.float64)
    terms = dist.Normal(loc, scale).log_prob(z.unsqueeze(-2)).sum(-1) + params[:, :3].log_softmax(-1)
    torch.testing.assert_close(q.log_prob(z), terms.logsumexp(-1), rtol=0, atol=1e3 * EPS)
    weight = params[:, :3].softmax(-1).unsqueeze(-1)
    torch.testing.assert_close(q.mean, (weight * loc).sum(1), rtol=0, atol=100 * EPS)
    second = (weight * (loc.square() + scale.square())).sum(1)
    torch.testing.assert_close(q.variance, second - q.mean.square(), rtol=0, atol=100 * EPS)


def test_gradients_of_mixtures_far_apart_are_finite():
    loc = (100 * torch.randn(20, 5, 8)).requires_grad_()
    logits = torch.randn(20, 5, requires_grad=True)
    scale = (1e-3 + torch.rand(20, 5, 8)).requires_grad_()
    q = ReparameterizedMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))
    q.rsample((100,)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (loc, scale, logits))


# -------------------------------------------------------------------------------------- the simplex and one-hot vectors


def test_the_logistic_normal_of_two_is_the_logit_normal():
    p = LogisticNormal(double(0.4), double(1.3))
    z = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    expected = scipy.stats.norm(0.4, 1.3).logpdf(scipy.special.logit(z.numpy())) - torch.log(z * (1 - z)).numpy()
    log_prob = p.log_prob(torch.stack([z, 1 - z], -1))
    torch.testing.assert_close(log_prob, torch.from_numpy(expected), rtol=0, atol=1e3 * EPS)


@torch.no_grad()
def test_the_logistic_normal_treats_its_parts_alike():
    # A stick-breaking distribution treats the first and the second coordinate differently.
    loc, scale = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    z = LogisticNormal(loc, scale).sample((20,))
    order = torch.tensor([2, 0, 1])
    swapped = LogisticNormal(loc[order], scale[order]).log_prob(z[:, [2, 0, 1, 3]])
    torch.testing.assert_close(LogisticNormal(loc, scale).log_prob(z), swapped, rtol=0, atol=1e3 * EPS)


def test_the_logistic_normal_is_reparameterised_as_the_softmax_of_a_normal():
    loc, scale = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.rand(5, 3, dtype=torch.float64) + 0.5
    torch.manual_seed(1)
    z = LogisticNormal(loc, scale).rsample()
    torch.manual_seed(1)
    y = dist.Normal(loc, scale).rsample()
    expected = torch.cat([y, torch.zeros(5, 1, dtype=torch.float64)], -1).softmax(-1)
    assert torch.equal(z, expected)


def test_straight_through_draws_are_one_hot_with_the_gradient_of_the_probabilities():
    encoder = encoders.OneHotCategorical(4, 6, SMALL, num_classes=3).double()
    x, a = torch.randn(500, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    q = encoder(x)
    z = q.rsample()
    blocks = z.unflatten(-1, (2, 3))
    # The straight-through draw adds and subtracts a probability, which rounds.
    assert ((blocks - blocks.round()).abs() <= 2 * EPS).all()
    assert torch.equal(blocks.round().sum(-1), torch.ones(500, 2, dtype=torch.float64))
    assert q.support.check(q.sample()).all()
    weight = list(encoder.network.parameters())[-1]
    (found,) = torch.autograd.grad((z @ a).sum(), weight, retain_graph=True)
    probs = encoder.network(x).unflatten(-1, (2, 3)).softmax(-1).flatten(-2)
    (expected,) = torch.autograd.grad((probs @ a).sum(), weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=500 * 100 * EPS)


def test_a_straight_through_draw_scores_as_its_one_hot_vector():
    encoder = encoders.OneHotCategorical(4, 6, SMALL, num_classes=3)
    q = encoder(torch.randn(50, 4))
    z = q.rsample()
    log_prob = q.log_prob(z)
    expected = q.log_prob(z.detach().round())
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_largest_entry_of_a_relaxed_vector_has_the_class_probabilities():
    encoder = encoders.RelaxedOneHotCategorical(4, 3, SMALL, temperature=0.7)
    x = torch.randn(4)
    q, probs = encoder(x), encoder.network(x).double().softmax(-1)
    counts = q.sample((10000,)).argmax(-1).bincount(minlength=3)
    assert scipy.stats.chisquare(counts, 10000 * probs / probs.sum()).pvalue > FAILURE_RATE


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@torch.no_grad()
def test_the_relaxed_density_is_the_concrete_one(temperature):
    encoder = encoders.RelaxedOneHotCategorical(4, 6, SMALL, num_classes=3, temperature=temperature).double()
    x = torch.randn(4, dtype=torch.float64)
    q, tau = encoder(x), encoder.temperature.double()
    z = q.sample((20,))
    logits = encoder.network(x).unflatten(-1, (2, 3))
    log_z = z.unflatten(-1, (2, 3)).log()
    # (K - 1)! tau^(K-1) prod_k pi_k z_k^(-tau-1) / (sum_k pi_k z_k^-tau)^K
    scores = logits - tau * log_z
    each = math.log(2) + 2 * tau.log() + (scores - log_z).sum(-1) - 3 * scores.logsumexp(-1)
    # Logarithms of entries as small as 1e-30, times small factors.
    torch.testing.assert_close(q.log_prob(z), each.sum(-1), rtol=0, atol=1e4 * EPS)


def test_low_temperatures_give_nearly_one_hot_vectors_with_finite_densities():
    q = encoders.RelaxedOneHotCategorical(4, 6, SMALL, num_classes=3, temperature=0.01)(torch.randn(5000, 4))
    z = q.rsample()
    assert q.support.check(z).all()  # with a tolerance of some roundings of a sum
    assert (z.unflatten(-1, (2, 3)).amax(-1) > 0.99).float().mean() > 0.9
    log_prob = q.log_prob(z)
    assert log_prob.isfinite().all()
    log_prob.sum().backward()


@torch.no_grad()
def test_classes_are_integers_with_the_products_of_their_probabilities():
    encoder = encoders.Categorical(4, 3, SMALL, num_classes=5).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    q = encoder(x)
    z = q.sample((7,))
    assert z.dtype == torch.int64
    logits = encoder.network(x).unflatten(-1, (3, 5)).log_softmax(-1).expand(7, 6, 3, 5)
    expected = logits.gather(-1, z.unsqueeze(-1)).squeeze(-1).sum(-1)
    torch.testing.assert_close(q.log_prob(z), expected, rtol=0, atol=100 * EPS)


def test_the_gradient_of_classes_is_that_of_the_enumerated_elbo():
    encoder = encoders.Categorical(4, 1, SMALL, num_classes=3)
    prior = priors.Categorical(1, 3)
    # The class selects a mean: the network is a table.
    table = nn.Embedding(3, 4)
    likelihood = likelihoods.Normal(1, 4, network=nn.Sequential(table, nn.Flatten(-2)), learn_scale=False)
    vae = VAE(prior, likelihood, encoder).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    wanted = [*vae.parameters()]
    wanted = [p for p in wanted if p.requires_grad]
    z = torch.arange(3).view(3, 1, 1).expand(3, 2, 1)
    log_q = encoder(x).log_prob(z)
    elbo = (log_q.exp() * (prior().log_prob(z) + likelihood(z).log_prob(x) - log_q)).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(elbo, wanted)])
    estimator = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)

    def draw() -> Tensor:
        loss = estimator.differentiable_loss(vae.model, vae.guide, x)
        return torch.cat([-g.flatten() for g in torch.autograd.grad(loss, wanted)])

    assert_mean(repeat(draw, 150), expected, FAILURE_RATE)


def test_a_point_is_where_the_network_says_and_has_no_density():
    encoder = encoders.Delta(4, 2, SMALL)
    x = torch.randn(5, 4)
    assert torch.equal(encoder(x).rsample(), encoder.network(x))
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 4, SMALL), encoder)
    z = encoder.network(x)
    expected = -(vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x)).sum()
    torch.testing.assert_close(Trace_ELBO().differentiable_loss(vae.model, vae.guide, x), expected)
    for refuse in (
        lambda: log_marginal(vae.model, vae.guide, x),
        lambda: log_weights(vae.model, vae.guide, x, num_samples=3),
    ):
        with pytest.raises(ValueError, match='site "z" of the guide'):
            refuse()


# ------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("case", cases("encoder"), ids=lambda case: case.name)
@torch.no_grad()
def test_encoders_give_each_datum_its_own_distribution(case):
    encoder = case.build().double().eval()
    arguments = inputs(case, encoder, 5)
    q = encoder(*arguments)
    if not case.density:
        assert torch.unique(q.sample(), dim=0).shape[0] == 5
        return
    z = q.sample((4,))
    together = q.log_prob(z.clone())
    alone = [encoder(*(a[i : i + 1] for a in arguments)).log_prob(z[:, i : i + 1])[:, 0] for i in range(5)]
    torch.testing.assert_close(together, torch.stack(alone, 1), rtol=0, atol=1e-9)
    other = encoder(*(a.flip(0) for a in arguments)).log_prob(z.clone())
    assert ((other - together).abs() > 1e-9).any(0).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: encoders.LowRankNormal(4, 2, rank=0), "rank must be at least 1, got 0"),
        (lambda: encoders.GaussianMixture(4, 2, num_components=0), "num_components must be at least 1, got 0"),
        (
            lambda: encoders.InverseAutoregressiveFlow(4, 2, num_transforms=0),
            "num_transforms must be at least 1, got 0",
        ),
        (lambda: encoders.NeuralSplineFlow(4, 2, num_features=0), "num_features must be at least 1, got 0"),
        (lambda: encoders.VonMisesFisher(4, 1), "latent_dim must be at least 2 for latents on a sphere, got 1"),
        (lambda: encoders.LogisticNormal(4, 1), "latent_dim must be at least 2 for latents on a simplex, got 1"),
        (lambda: encoders.Categorical(4, 2, num_classes=1), "num_classes must be at least 2, got 1"),
        (lambda: encoders.OneHotCategorical(4, 6, num_classes=4), "num_classes"),
        (lambda: encoders.RelaxedOneHotCategorical(4, 6, temperature=-1.0), "temperature must be positive and finite"),
    ],
)
def test_what_cannot_be_built_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()
