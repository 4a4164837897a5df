"""The likelihoods against closed forms, scipy, quadrature and enumeration; test_parts.py tests properties of all."""

import itertools
import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from cases import cases
from torch import Tensor, nn

import pyrovae
from pyrovae import VAE, distributions, likelihoods, priors
from pyrovae.distributions import mask_elements
from pyrovae.distributions.counts import log_rising
from pyrovae.encoders import DiagonalNormal
from pyrovae.inference.messages import check_observed
from pyrovae.inference.weights import log_weights
from pyrovae.likelihoods import Bernoulli, Categorical, Mixed, Normal, OptimalNormal, bits_per_dim
from pyrovae.nn import MLP, DeconvNet

EPS = torch.finfo(torch.float64).eps
SINGLE = torch.finfo(torch.float32).eps
AFFINE = partial(MLP, hidden=())


class Given(nn.Module):
    """A decoder that returns a constant for any z."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.output.expand(*z.shape[:-1], *self.output.shape)


def given(cls, x_shape, output: Tensor, **arguments) -> dist.TorchDistribution:
    """Returns the distribution of a likelihood whose decoder returns `output`, in double precision."""
    return cls(1, x_shape, Given(output.double()), **arguments).double()(torch.zeros(1, dtype=torch.float64))


def close(ours: Tensor, truth, digits: float = 1e-12) -> None:
    truth = torch.as_tensor(np.asarray(truth))
    torch.testing.assert_close(ours.detach().double(), truth.expand(ours.shape), rtol=digits, atol=digits)


# ------------------------------------------------------------------------------------------------ against scipy


RAW = torch.tensor([-1.3, 0.0, 0.4, 2.1], dtype=torch.float64)
# Initial values are rounded to single precision when a part is built; these values are exact in it.
POSITIVE, COUNTS = torch.tensor([0.2, 1.0, 3.7, 0.01]).double(), torch.tensor([0.0, 1.0, 4.0, 12.0]).double()


def test_laplace_is_scipys():
    p = given(likelihoods.Laplace, 4, RAW, scale=1.0)
    close(p.log_prob(POSITIVE), scipy.stats.laplace(RAW.numpy(), 1.0).logpdf(POSITIVE.numpy()).sum())


def test_student_t_is_scipys():
    p = given(likelihoods.StudentT, 4, RAW, df=1.0)
    close(p.log_prob(POSITIVE), scipy.stats.t(1.0, RAW.numpy()).logpdf(POSITIVE.numpy()).sum())


@pytest.mark.parametrize("df", [0.3, 2.0, 30.0, 99.9, 100.1, 1e4, 1e12])
def test_student_t_keeps_its_digits_for_any_degrees_of_freedom(df):
    x, df = torch.linspace(-5, 5, 11), torch.tensor(df)
    truth = truth_of_t(df.item(), x.double())
    close(distributions.StudentT(df).log_prob(x), truth, 50 * SINGLE)
    close(distributions.StudentT(df.double()).log_prob(x.double()), truth, 1e-11)


def truth_of_t(df: float, x: Tensor) -> Tensor:
    """Returns the log-density, with its constant by quadrature of (1 + x^2/df)^(-(df+1)/2) over the real line."""

    def integrand(u: float) -> float:  # x = sinh(u)
        return math.exp(-(df + 1) / 2 * math.log1p(math.sinh(u) ** 2 / df)) * math.cosh(u)

    points = [0.5, 1, 2, 4, 8, 16, 32, 64]
    integral, _ = scipy.integrate.quad(integrand, 0, 350, points=points, limit=2000, epsabs=0, epsrel=1e-13)
    return -(df + 1) / 2 * torch.log1p(x**2 / df) - math.log(2 * integral)


def test_log_normal_is_scipys():
    p = given(likelihoods.LogNormal, 4, RAW, scale=1.0)
    close(p.log_prob(POSITIVE), scipy.stats.lognorm(1.0, scale=RAW.exp().numpy()).logpdf(POSITIVE.numpy()).sum())


@pytest.mark.parametrize("learn", [False, True])
def test_gamma_is_scipys_with_the_stated_mean(learn):
    p = given(likelihoods.Gamma, 4, RAW, concentration=1.0, learn_concentration=learn)
    close(p.log_prob(POSITIVE), scipy.stats.expon(scale=RAW.exp().numpy()).logpdf(POSITIVE.numpy()).sum())
    part = likelihoods.Gamma(1, 4, Given(RAW), concentration=1.0, learn_concentration=learn).double()
    part.log_concentration.data.fill_(math.log(2.5))
    p = part(torch.zeros(1))
    close(p.log_prob(POSITIVE), scipy.stats.gamma(2.5, scale=RAW.exp().numpy() / 2.5).logpdf(POSITIVE.numpy()).sum())
    close(p.mean, RAW.exp())
    assert isinstance(part.log_concentration, nn.Parameter) == learn


def test_gamma_with_concentration_one_is_the_itakura_saito_divergence():
    power, mean = POSITIVE, RAW.exp()
    divergence = (power / mean - (power / mean).log() - 1).sum()
    close(-given(likelihoods.Gamma, 4, RAW).log_prob(power), divergence + (power.log() + 1).sum())


def test_beta_is_scipys_with_the_stated_mean_and_starts_uniform():
    raw = torch.stack([RAW, torch.tensor([-3.0, 0.0, 1.0, 5.0])])
    x = torch.tensor([0.01, 0.3, 0.5, 0.999], dtype=torch.float64)
    p = given(likelihoods.Beta, 4, raw)
    concentration = torch.nn.functional.softplus(raw[1].double() + math.log(math.expm1(2))) + 1e-6
    mean = RAW.sigmoid()
    truth = scipy.stats.beta((mean * concentration).numpy(), ((1 - mean) * concentration).numpy()).logpdf(x.numpy())
    close(p.log_prob(x), truth.sum(), 1e-11)
    close(p.mean, mean)
    uniform = given(likelihoods.Beta, 4, torch.zeros(2, 4))
    close(uniform.log_prob(x), 0.0, 1e-5)  # up to the floor of 1e-6 of the concentration


@pytest.mark.parametrize("logit", [-60.0, -20.0, 20.0, 60.0, 1e9])
def test_beta_samples_are_inside_whatever_the_parameters(logit):
    part = likelihoods.Beta(1, 1, Given(torch.tensor([[logit], [-1.0]])))
    p = part(torch.zeros(1000, 1))
    x = p.sample()
    assert p.support.check(x).all()
    log_prob = p.log_prob(x).sum()
    log_prob.backward()
    assert torch.isfinite(log_prob)
    assert torch.isfinite(part.network.output.grad).all()


def test_poisson_is_scipys():
    p = given(likelihoods.Poisson, 4, RAW)
    close(p.log_prob(COUNTS), scipy.stats.poisson(RAW.exp().numpy()).logpmf(COUNTS.numpy()).sum())


def negative_binomial(mean: Tensor, theta: float):
    return scipy.stats.nbinom(theta, theta / (theta + mean.numpy()))


@pytest.mark.parametrize("theta", [0.25, 1.0, 64.0])
def test_negative_binomial_is_scipys_with_the_stated_moments(theta):
    p = given(likelihoods.NegativeBinomial, 4, RAW, inverse_dispersion=theta)
    # log theta is stored in single precision: its rounding times the derivative, below 10 theta.
    close(p.log_prob(COUNTS), negative_binomial(RAW.exp(), theta).logpmf(COUNTS.numpy()).sum(), SINGLE * 50 * theta)
    close(p.mean, RAW.exp())
    close(p.variance, RAW.exp() + RAW.exp().square() / theta, 10 * SINGLE)


@pytest.mark.parametrize("theta", [1e-3, 1.0, 49.0, 51.0, 1e3, 1e5, 1e7, 1e9])
def test_negative_binomial_sums_to_one_in_single_precision_for_any_dispersion(theta):
    theta, mean = torch.tensor(theta), torch.tensor(5.0)
    p = distributions.NegativeBinomial(theta, logits=mean.log() - theta.log())
    total = p.log_prob(torch.arange(100000.0)).double().exp().sum().item()
    # Each log-probability has an error of some eps times its largest term, x log(theta) < 1000 where the mass is.
    assert abs(total - 1) < 1000 * SINGLE
    if theta >= 1e5:  # Poisson, up to a term of order x^2 / theta
        x = torch.arange(15.0)
        close(p.log_prob(x).exp(), dist.Poisson(5.0).log_prob(x).double().exp(), 1000 * SINGLE + 40 / theta.item())


def large_counts(mean: float) -> tuple[Tensor, Tensor]:
    """Returns logarithms of 100 means near `mean`, and counts of them, both in single precision."""
    log_mean = (mean * torch.linspace(0.8, 1.2, 100)).log()
    return log_mean, torch.poisson(log_mean.exp())


def keeps_its_digits(p: dist.TorchDistribution, x: Tensor, log_mean: Tensor, truth: np.ndarray, slope: Tensor) -> None:
    """Asserts that log-probabilities and their derivatives by `log_mean` are exact up to rounding."""
    log_prob = p.log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), log_mean)
    # Half an eps of rounding, and double precision's of terms that are below 1e9.
    close(log_prob, truth, SINGLE)
    torch.testing.assert_close(gradient, slope.float(), rtol=SINGLE, atol=1e9 * EPS)
    if log_prob.dim():
        assert abs(p.to_event(1).log_prob(x).item() - truth.sum()) < 1e-3


@pytest.mark.parametrize("mean", [1e5, 1e6])
def test_poisson_keeps_its_digits_at_large_counts(mean):
    log_mean, x = large_counts(mean)
    log_mean.requires_grad_()
    exact, k = log_mean.detach().double(), x.double()
    truth = (k * exact - exact.exp()).numpy() - scipy.special.gammaln(1 + k.numpy())
    keeps_its_digits(distributions.Poisson(log_mean), x, log_mean, truth, k - exact.exp())
    with torch.no_grad():
        whole = likelihoods.Poisson(1, 100, Given(exact.float()))(torch.zeros(1))
        assert abs(whole.log_prob(x).item() - truth.sum()) < 1e-3


@pytest.mark.parametrize("theta", [0.5, 1e4, 1e6])
@pytest.mark.parametrize("mean", [1e5, 1e6])
def test_negative_binomials_keep_their_digits_at_large_counts(mean, theta):
    log_mean, x = large_counts(mean)
    log_mean.requires_grad_()
    exact, k = log_mean.detach().double(), x.double()
    mu, n = exact.exp().numpy(), k.numpy()
    ratio = scipy.special.gammaln(n + theta) - scipy.special.gammaln(theta) - scipy.special.gammaln(1 + n)
    truth = ratio + theta * np.log(theta / (theta + mu)) + n * np.log(mu / (theta + mu))
    slope = theta * (k - exact.exp()) / (theta + exact.exp())
    keeps_its_digits(distributions.NegativeBinomial(torch.tensor(theta), log_mean=log_mean), x, log_mean, truth, slope)
    gate = torch.zeros(())  # a count is replaced by zero with probability one half
    inflated = distributions.ZeroInflatedNegativeBinomial(torch.tensor(theta), None, gate, log_mean=log_mean)
    keeps_its_digits(inflated.expand((100,)), x, log_mean, truth - math.log(2), slope)


@pytest.mark.parametrize("mean", [1e5, 1e6])
def test_the_multinomial_keeps_its_digits_at_large_counts(mean):
    logits, x = large_counts(mean)
    logits.requires_grad_()
    exact, k = logits.detach().double(), x.double()
    n = k.sum()
    truth = scipy.special.gammaln(1 + n.numpy()) - scipy.special.gammaln(1 + k.numpy()).sum()
    truth = truth + (k * exact.log_softmax(-1)).sum().numpy()
    keeps_its_digits(distributions.Multinomial(1, logits), x, logits, truth, k - n * exact.softmax(-1))


def test_a_negative_binomial_takes_its_logits_or_its_mean():
    theta, log_mean = torch.tensor(2.0), torch.tensor([0.3, -1.0])
    p = distributions.NegativeBinomial(theta, log_mean=log_mean)
    torch.testing.assert_close(p.mean, log_mean.exp())
    for arguments in ({}, {"logits": log_mean, "log_mean": log_mean}):
        with pytest.raises(ValueError, match="either logits or log_mean"):
            distributions.NegativeBinomial(theta, **arguments)


def test_the_log_of_a_rising_factorial_is_right_on_both_sides_of_the_switch():
    a = torch.tensor([0.5, 1.0, 49.99, 50.01, 1e3, 1e8], dtype=torch.float64)
    for b in (0, 1, 2, 7, 40):  # Gamma(a + b) / Gamma(a) is a product
        truth = sum(((a + i).log() for i in range(b)), torch.zeros_like(a))
        # Below the switch it is the difference of numbers of up to 330, each to a few eps.
        close(log_rising(a, torch.tensor(float(b)).double()), truth, 2000 * EPS)
    half, a = log_rising(a[:5], torch.tensor(0.5).double()), a[:5].numpy()
    close(half, scipy.special.gammaln(a + 0.5) - scipy.special.gammaln(a), 6000 * 4 * EPS)


@pytest.mark.parametrize("gate", [-3.0, 0.0, 2.0])
def test_zero_inflated_negative_binomial_is_the_formula_and_pyros(gate):
    raw = torch.stack([RAW, torch.full((4,), gate)])
    p = given(likelihoods.ZeroInflatedNegativeBinomial, 4, raw, inverse_dispersion=2.0)
    lost = 1 / (1 + math.exp(-gate))
    counted = negative_binomial(RAW.exp(), 2.0).pmf(COUNTS.numpy())
    close(p.log_prob(COUNTS), np.log(lost * (COUNTS.numpy() == 0) + (1 - lost) * counted).sum(), 50 * SINGLE)
    theta = p.base_dist.counts.total_count.detach()
    pyros = dist.ZeroInflatedNegativeBinomial(theta, logits=RAW - theta.log(), gate_logits=raw[1].double())
    close(p.log_prob(COUNTS), pyros.log_prob(COUNTS).sum())
    close(p.mean, pyros.mean)
    close(p.variance, pyros.variance, 1e-11)


@pytest.mark.parametrize("gate", [-1000.0, -20.0, 20.0, 1000.0])
def test_zero_inflation_has_finite_gradients_however_sure_the_gate(gate):
    gate = torch.tensor(gate, requires_grad=True)
    p = distributions.ZeroInflatedNegativeBinomial(torch.tensor(2.0), torch.tensor(0.3), gate)
    p.sample((3,))  # which must not change what log_prob computes
    log_prob = p.expand((2,)).log_prob(torch.tensor([0.0, 3.0]))
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(gate.grad)


# ----------------------------------------------------------------------------------------------- library size

COUNT_LIKELIHOODS = [
    likelihoods.Poisson,
    likelihoods.NegativeBinomial,
    likelihoods.ZeroInflatedNegativeBinomial,
]


@pytest.mark.parametrize("x_shape", [4, (2, 3)], ids=str)
@pytest.mark.parametrize("cls", COUNT_LIKELIHOODS)
def test_the_library_size_is_the_sum_of_the_means(cls, x_shape):
    part = cls(2, x_shape, library=True, context_dim=3)
    size = torch.tensor([1.0, 50.0, 4000.0])
    context = torch.cat([torch.randn(3, 2), size.log().unsqueeze(-1)], -1)
    p = part(torch.randn(5, 3, 2), context)
    assert p.batch_shape == (5, 3)
    base = p.base_dist
    mean = base.counts.mean if isinstance(base, distributions.ZeroInflatedNegativeBinomial) else base.mean
    close(mean.flatten(2).sum(-1) / size, 1.0, 100 * SINGLE)


@pytest.mark.parametrize("cls", COUNT_LIKELIHOODS)
def test_a_library_size_needs_a_context(cls):
    with pytest.raises(ValueError, match="library=True.*context_dim=1"):
        cls(2, 4, library=True)


@pytest.mark.parametrize("raw", [-1000.0, -80.0, 80.0, 1000.0])
@pytest.mark.parametrize("cls", [*COUNT_LIKELIHOODS, likelihoods.Gamma])
def test_an_extreme_network_output_gives_a_finite_log_probability(cls, raw):
    output = torch.full((2, 3) if cls is likelihoods.ZeroInflatedNegativeBinomial else (3,), raw)
    part = cls(1, 3, Given(output))
    log_prob = part(torch.zeros(1)).log_prob(torch.tensor([1.0, 2.0, 30.0]))
    log_prob.backward()
    assert torch.isfinite(log_prob)
    assert torch.isfinite(part.network.output.grad).all()


# ---------------------------------------------------------------------------------------- continuous Bernoulli

LOGITS = [0.0, 1e-12, -1e-6, 1e-3, -0.02, 0.1, -0.399, 0.399, 0.401, -0.401, 1.0, -3.0, 15.0, -17.0, 50.0, -50.0, 300.0]


def quadrature(f, logit: float) -> float:
    """Integrates f(x) exp(l x - max(l, 0)) over [0, 1] in double precision."""
    scale = 1 / max(1, abs(logit))
    points = [s for k in (1, 3, 10, 40) if 0 < (s := (k * scale if logit < 0 else 1 - k * scale)) < 1]

    def integrand(x: float) -> float:
        return f(x) * math.exp(logit * x - max(logit, 0))

    return scipy.integrate.quad(integrand, 0, 1, points=points, epsabs=0, epsrel=1e-13, limit=200)[0]


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_is_right_at_every_logit_with_its_gradient_and_moments(logit):
    normaliser = quadrature(lambda x: 1.0, logit)
    mean = quadrature(lambda x: x, logit) / normaliser
    variance = quadrature(lambda x: (x - mean) ** 2, logit) / normaliser
    x = torch.tensor([0.0, 1e-3, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    truth = logit * x - max(logit, 0) - math.log(normaliser)
    for dtype, digits in ((torch.float64, 1e-12), (torch.float32, 8 * SINGLE)):
        logits = torch.full((6,), logit, dtype=dtype, requires_grad=True)
        p = distributions.ContinuousBernoulli(logits=logits)
        log_prob = p.log_prob(x.to(dtype))
        (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
        close(log_prob, truth, digits * (1 + abs(logit)))
        close(gradient, x - mean, 100 * digits)  # 1/0.4^2 digits are lost between the series and the closed form
        close(p.mean, mean, 100 * digits)
        close(p.variance, variance, 1000 * digits)
        close(p.entropy(), math.log(normaliser) + max(logit, 0) - logit * mean, 100 * digits * (1 + abs(logit)))


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_samples_by_the_inverse_of_its_distribution_function(logit):
    p = distributions.ContinuousBernoulli(logits=torch.tensor(logit, dtype=torch.float64))
    u = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    close(p.cdf(p.icdf(u)), u, 1e-9)
    normaliser = quadrature(lambda x: 1.0, logit)
    x = p.icdf(torch.tensor(0.3).double()).item()
    below = scipy.integrate.quad(lambda t: math.exp(logit * t - max(logit, 0)), 0, x, epsabs=0, epsrel=1e-12)[0]
    assert below / normaliser == pytest.approx(0.3, rel=1e-6)
    draws = distributions.ContinuousBernoulli(logits=torch.full((20000,), logit)).sample()
    assert ((draws >= 0) & (draws <= 1)).all()
    error = p.variance.sqrt().item() / math.sqrt(20000)
    assert abs(draws.double().mean().item() - p.mean.item()) < scipy.stats.norm.isf(0.5e-4) * error


# ----------------------------------------------------------------------------------------- the optimal scale


def test_in_training_the_optimal_scale_is_the_one_with_the_largest_likelihood():
    part = OptimalNormal(2, (2, 3)).double()
    z, x = torch.randn(4, 5, 2, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    p = part(z)
    total = p.log_prob(x).sum()
    scales = torch.linspace(0.3, 3.0, 20001, dtype=torch.float64)
    loc = p.mean.detach()
    square = (x - loc).square().sum()
    others = -loc.numel() / 2 * (2 * math.pi * scales.square()).log() - square / (2 * scales.square())
    best = scales[others.argmax()]
    assert (total >= others).all()
    # The maximum is flat: a step of h in the scale loses n h^2 / s^2 at most.
    assert total - others.max() < loc.numel() * (2.7 / 20000 / best) ** 2
    close(part.variance.sqrt(), math.sqrt(square / loc.numel()))


def test_the_gradient_of_the_optimal_scale_is_that_of_the_closed_form():
    loc = torch.randn(7, 3, dtype=torch.float64)
    part = OptimalNormal(1, (7, 3), Given(loc)).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    part(torch.zeros(1)).log_prob(x).backward()
    # The total is -n/2 (log(2 pi v) + 1), v the mean square: its derivative by loc is (x - loc) / v.
    close(part.network.output.grad, (x - loc) / (x - loc).square().mean())
    # The term of one datum depends on v too: -d/2 log v - s/(2 v), where s is its own sum of squares.
    part = OptimalNormal(1, 3, nn.Linear(1, 3)).double()
    z = torch.randn(7, 1, dtype=torch.float64)
    part(z).log_prob(x)[0].backward()
    residual = x - part.network(z).detach()
    v, own = residual.square().mean(), residual[0].square().sum()
    by_v = -3 / (2 * v) + own / (2 * v**2)
    by_loc = by_v * -2 * residual / residual.numel()
    by_loc[0] += residual[0] / v
    close(part.network.bias.grad, by_loc.sum(0))


def test_the_first_batch_sets_the_scale_and_later_ones_are_averaged():
    part = OptimalNormal(1, 2, Given(torch.zeros(2)), momentum=0.25)
    z, seen = torch.zeros(3, 1), []
    for size in (2.0, 1.0, 3.0, 5.0, 4.0, 1.0):
        part(z).log_prob(torch.full((3, 2), size))
        seen.append(part.variance.item())
    expected, average = [], 0.0
    for n, square in enumerate((4, 1, 9, 25, 16, 1), 1):
        weight = max(0.25, 1 / n)
        average += weight * (square - average)
        expected.append(average)
    assert seen == pytest.approx(expected, rel=1e-6)
    assert seen[0] == 4


def test_in_evaluation_the_optimal_normal_is_a_normal_that_no_batch_changes():
    part = OptimalNormal(2, 3)
    z, x = torch.randn(8, 2), 2 * torch.randn(8, 3)
    part(z).log_prob(x)
    part.eval()
    before = part.variance.clone()
    together = part(z).log_prob(x)
    assert torch.equal(part.variance, before)
    alone = torch.cat([part(z[i : i + 1]).log_prob(x[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(alone, together)
    torch.testing.assert_close(together, dist.Normal(part.network(z), before.sqrt()).log_prob(x).sum(-1))
    assert set(dict(part.named_buffers())) == {"variance", "num_batches"}  # so that they are saved


def test_the_optimal_normal_is_scored_in_evaluation_mode():
    vae = VAE(priors.StandardNormal(1), OptimalNormal(1, 3), DiagonalNormal(3, 1))
    x = torch.randn(4, 3)
    vae.likelihood(torch.zeros(4, 1)).log_prob(x)
    before = vae.likelihood.variance.clone()
    vae.eval()
    log_weights(vae.model, vae.guide, x, num_samples=3)
    assert torch.equal(vae.likelihood.variance, before)


@pytest.mark.parametrize("momentum", [0.0, -1.0, 1.5, math.nan])
def test_the_optimal_normal_refuses_a_bad_momentum(momentum):
    with pytest.raises(ValueError, match="momentum must be above 0"):
        OptimalNormal(1, 2, momentum=momentum)


# ----------------------------------------------------------------------------------- classes and multinomials


def test_categorical_is_the_softmax_of_its_first_dimension():
    logits = torch.randn(4, 2, 3, dtype=torch.float64)
    p = given(Categorical, (2, 3), logits, num_classes=4)
    x = torch.randint(4, (2, 3))
    truth = sum(logits[:, i, j].log_softmax(0)[x[i, j]] for i in range(2) for j in range(3))
    close(p.log_prob(x), truth)
    close(p.log_prob(x.float()), truth)
    assert torch.equal(distributions.center(p), logits.argmax(0).double())
    assert p.sample().dtype == torch.float64


def test_categorical_decodes_by_convolutions():
    part = Categorical(2, (1, 4, 4), DeconvNet, num_classes=5)
    p = part(torch.randn(3, 7, 2))
    assert (p.batch_shape, p.event_shape) == ((3, 7), (1, 4, 4))
    assert p.log_prob(p.sample()).shape == (3, 7)


def test_multinomial_is_scipys_for_each_datums_own_total():
    logits = torch.randn(2, 2, dtype=torch.float64)
    p = given(likelihoods.Multinomial, (2, 2), logits, total_count=9)
    x = torch.tensor([[[3, 0], [2, 4]], [[0, 0], [0, 0]], [[1, 0], [0, 0]], [[100, 7], [3, 40]]]).double()
    probs = logits.flatten().softmax(0).numpy()
    truth = [scipy.stats.multinomial(int(c.sum()), probs).logpmf(c.flatten().numpy()) for c in x]
    close(p.log_prob(x), truth, 1e-11)
    close(p.mean.flatten(), 9 * probs)
    close(p.variance.flatten(), 9 * probs * (1 - probs))
    assert (p.sample((5,)).sum((-1, -2)) == 9).all()


@pytest.mark.parametrize("total", [0, 1, 5])
def test_multinomial_sums_to_one_over_the_counts_of_any_total(total):
    p = given(likelihoods.Multinomial, 3, torch.tensor([0.3, -2.0, 1.0]), total_count=2)
    counts = [c for c in itertools.product(range(total + 1), repeat=3) if sum(c) == total]
    assert abs(p.log_prob(torch.tensor(counts).double()).exp().sum().item() - 1) < 200 * EPS


# ---------------------------------------------------------------------------------------- discretised logistics


def test_discretized_logistic_is_the_difference_of_distribution_functions():
    p = given(likelihoods.DiscretizedLogistic, 3, torch.tensor([[-0.2, 0.0, 0.3], [-3.0, -1.0, 0.5]]), levels=5)
    loc, scale = np.array([0.3, 0.5, 0.8]), np.exp([-3.0, -1.0, 0.5])
    logistic = scipy.stats.logistic(loc, scale)
    for k in range(5):
        low = logistic.cdf((k - 0.5) / 4) if k > 0 else 0
        high = logistic.cdf((k + 0.5) / 4) if k < 4 else 1
        # the locations are in single precision in the test's own tensor
        close(p.base_dist.log_prob(torch.full((3,), k / 4).double()), np.log(high - low), 1e-5)


@pytest.mark.parametrize("log_scale", [-1000.0, -30.0, -12.0, -5.5, 0.0, 10.0, 1000.0])
@pytest.mark.parametrize("loc", [-1e4, -1.0, -0.5, -0.498, 0.1, 0.5, 3.0, 1e4])
def test_discretized_logistic_sums_to_one_with_finite_gradients_however_extreme(loc, log_scale):
    x = torch.arange(256) / 255
    part = likelihoods.DiscretizedLogistic(1, 1, Given(torch.tensor([[loc], [log_scale]])))
    log_prob = part(torch.zeros(256, 1)).log_prob(x.unsqueeze(-1))
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(part.network.output.grad).all()
    # With scale s, the edge of a bin has an error of eps (1 + |loc|) / s standard units, the same in both adjacent
    # bins. The error exceeds the mass only for bins in the tails. In double precision the sum is exact.
    p = given(likelihoods.DiscretizedLogistic, 1, torch.tensor([[loc], [log_scale]]))
    total = p.log_prob((torch.arange(256).double() / 255).unsqueeze(-1)).exp().sum().item()
    step = math.exp(-max(-20, min(20, log_scale)))
    assert abs(total - 1) < 256 * EPS * (10 + (1 + abs(loc)) * min(step, 1e9))


@pytest.mark.parametrize(("loc", "log_scale"), [(-0.1, -5.0), (0.3, -2.0), (0.0, 0.0)])
def test_discretized_logistic_sums_to_one_in_single_precision(loc, log_scale):
    part = likelihoods.DiscretizedLogistic(1, 1, Given(torch.tensor([[loc], [log_scale]])))
    total = part(torch.zeros(256, 1)).log_prob((torch.arange(256) / 255).unsqueeze(-1)).double().exp().sum().item()
    assert abs(total - 1) < 20 * SINGLE * math.exp(-log_scale)


def test_discretized_moments_are_sums_over_the_levels():
    levels = torch.arange(9).double() / 8
    logistic = given(likelihoods.DiscretizedLogistic, 3, torch.tensor([[-0.7, 0.0, 0.3], [-3.0, -1.0, 0.5]]), levels=9)
    raw = torch.randn(6, 3)
    mixture = given(likelihoods.DiscretizedLogisticMixture, 3, raw, levels=9, num_components=2)
    for p in (logistic, mixture):
        probabilities = p.base_dist.log_prob(levels.unsqueeze(-1)).exp()
        mean = (levels.unsqueeze(-1) * probabilities).sum(0)
        close(p.mean, mean.detach())
        close(p.variance, ((levels.unsqueeze(-1) - mean).square() * probabilities).sum(0).detach())


def test_discretized_logistic_mixture_is_the_mixture_of_its_components():
    raw = torch.randn(9, 2)
    x = torch.tensor([3 / 7, 1.0]).double()
    logits, loc, log_scale = raw.double().chunk(3)
    parts = [given(likelihoods.DiscretizedLogistic, 2, torch.stack([loc[k], log_scale[k]]), levels=8) for k in range(3)]
    bins = torch.stack([p.base_dist.log_prob(x).exp() for p in parts])
    truth = (logits.softmax(0) * bins).sum(0).log().sum()
    p = given(likelihoods.DiscretizedLogisticMixture, 2, raw, num_components=3, levels=8)
    close(p.log_prob(x), truth.detach())


# -------------------------------------------------------------------------------------------------------- mixed


def blocks() -> list:
    return [(Normal, 3), (partial(Categorical, num_classes=5), 1), (Bernoulli, 4), (likelihoods.Poisson, 1)]


@pytest.mark.parametrize("context_dim", [0, 2])
def test_mixed_is_the_sum_of_its_parts(context_dim):
    part = Mixed(2, 9, blocks(), context_dim)
    z, context = torch.randn(6, 5, 2), torch.randn(5, context_dim) if context_dim else None
    p = part(z, context)
    assert (p.batch_shape, p.event_shape) == ((6, 5), (9,))
    x = p.sample()
    parts = [block(z, context) for block in part.blocks]
    columns = x.split([3, 1, 4, 1], -1)
    torch.testing.assert_close(p.log_prob(x), sum(q.log_prob(c) for q, c in zip(parts, columns, strict=True)))
    assert torch.equal(p.mean, torch.cat([distributions.center(q) for q in parts], -1))
    assert p.support.check(x).all()
    assert p.expand((2, 6, 5)).log_prob(x).shape == (2, 6, 5)


def test_mixed_refuses_columns_that_do_not_add_up():
    for x_shape in (8, (9, 1)):
        with pytest.raises(ValueError, match=r"x_shape must be \(9,\)"):
            Mixed(2, x_shape, blocks())
    with pytest.raises(ValueError, match="x_shape must be"):
        Mixed(2, 1, [])


def test_mixed_names_the_columns_that_are_outside():
    part = Mixed(2, 9, blocks())
    z = torch.zeros(4, 2)
    good = part(z).sample()
    check_observed("x", part(z), good)
    for column, value, message in [
        (3, 5.0, "column 3 is outside the support of Categorical.*0 to 4.*num_classes"),
        (6, 0.5, "columns 4 to 7 is outside the support of Bernoulli.*Binarise"),
        (8, -1.0, "column 8 is outside the support of Poisson.*raw counts"),
    ]:
        x = good.clone()
        x[2, column] = value
        with pytest.raises(ValueError, match=f'site "x", {message}') as error:
            check_observed("x", part(z), x)
        assert "row 2 of the batch" in str(error.value)


# ---------------------------------------------------------------------------------------------------- start_at

STARTS = {  # 200 data, and whether the initial mean is that of the data up to rounding
    "Bernoulli": (lambda: (torch.rand(200, 2, 3) < 0.3).float(), {}),
    "ContinuousBernoulli": (lambda: torch.rand(200, 2, 3) ** 3, {}),
    "Normal": (lambda: torch.randn(200, 2, 3) + 2, {}),
    "OptimalNormal": (lambda: torch.randn(200, 2, 3) + 2, {}),
    "Laplace": (lambda: torch.randn(200, 2, 3) + 2, {}),
    "StudentT": (lambda: torch.randn(200, 2, 3) + 2, {}),
    "LogNormal": (lambda: torch.rand(200, 2, 3) + 0.1, {"scale": 0.4}),
    "Gamma": (lambda: torch.rand(200, 2, 3) + 0.1, {"concentration": 3.0}),
    "Beta": (lambda: torch.rand(200, 2, 3) * 0.8 + 0.1, {}),
    "Poisson": (lambda: torch.poisson(torch.full((200, 2, 3), 3.0)), {}),
    "NegativeBinomial": (lambda: torch.poisson(torch.full((200, 2, 3), 3.0)), {}),
    "ZeroInflatedNegativeBinomial": (lambda: torch.poisson(torch.full((200, 2, 3), 3.0)), {}),
    "Multinomial": (
        lambda: dist.Multinomial(6, torch.ones(6)).sample((200,)).unflatten(-1, (2, 3)),
        {"total_count": 6},
    ),
    "DiscretizedLogistic": (lambda: (torch.randn(200, 2, 3) * 8 + 128).round() / 255, {}),
    "DiscretizedLogisticMixture": (lambda: (torch.randn(200, 2, 3) * 8 + 128).round() / 255, {}),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_likelihood_starts_at_the_mean_of_the_data(name):
    make, arguments = STARTS[name]
    x = make()
    part = getattr(likelihoods, name)(2, (2, 3), AFFINE, **arguments)
    assert part.start_at(x) is part
    # At z = 0 only the bias remains. The discretised ones have tails outside the grid, here far below the rounding.
    mean = part(torch.zeros(2)).mean
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-4, atol=1e-5)


def test_every_likelihood_is_started_by_a_test():
    public = {case.cls.__name__ for case in cases("likelihood")}
    # The last three are in test_cells.py, test_autoregressive.py and test_pixels.py.
    elsewhere = {"Categorical", "Mixed", "SigmoidBelief", "Tabular", "Autoregressive", "PixelCNN"}
    assert public == {*STARTS, *elsewhere}


def test_a_sigmoid_belief_network_starts_as_independent_bits_of_the_mean_of_the_data():
    x = (torch.rand(200, 2, 3) < 0.3).float()
    part = likelihoods.SigmoidBelief(2, (2, 3), AFFINE).start_at(x)
    expected = dist.Bernoulli(x.mean(0)).to_event(2).log_prob(x)
    torch.testing.assert_close(part(torch.zeros(2)).log_prob(x), expected)


@torch.no_grad()
def test_an_element_of_a_sigmoid_belief_network_depends_on_those_before_it():
    p = distributions.SigmoidBelief(torch.randn(4, 2, 2).double(), torch.randn(4, 4).double().triu(1), event_dim=2)
    for i, x in enumerate(torch.cartesian_prod(*[torch.arange(2.0).double()] * 4)):
        logits = p.logits.flatten(1)[i % 4]
        terms = []
        for d in range(4):  # as the equation says
            on = 1 / (1 + math.exp(-(logits[d] + sum(x[j] * p.weight[j, d] for j in range(d)))))
            terms.append(math.log(on if x[d] else 1 - on))
        assert p.log_prob(x.view(2, 2))[i % 4].item() == pytest.approx(sum(terms), abs=1e-12)
    greedy = p.greedy().flatten(1)
    for d in range(4):
        logits = p.logits.flatten(1)[:, d] + greedy[:, :d] @ p.weight[:d, d]
        assert torch.equal(greedy[:, d] == 1, logits > 0)


def test_categorical_starts_at_the_frequencies_of_the_classes():
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 1.0], [0.0, 2.0]])
    probs = Categorical(2, 2, AFFINE, num_classes=3).start_at(x)(torch.zeros(2)).base_dist.probs
    close(probs, np.array([[3.5, 0.5, 1.5], [0.5, 3.5, 1.5]]) / 5.5, 10 * SINGLE)


def test_mixed_starts_each_block():
    x = torch.cat([torch.randn(50, 3) + 5, torch.full((50, 1), 2.0), torch.ones(50, 4), torch.full((50, 1), 7.0)], -1)
    affine = [(partial(block, network=AFFINE), size) for block, size in blocks()]
    mean = Mixed(2, 9, affine).start_at(x)(torch.zeros(2)).mean
    torch.testing.assert_close(mean[:3], x[:, :3].mean(0))
    torch.testing.assert_close(mean[3:], torch.tensor([2.0, *[1 - 0.5 / 50] * 4, 7.0]))


def test_constant_data_start_at_something_finite():
    for name in ("Bernoulli", "ContinuousBernoulli", "Poisson", "Categorical", "DiscretizedLogistic", "Multinomial"):
        part = getattr(likelihoods, name)(2, 3).start_at(torch.zeros(5, 3))
        assert torch.isfinite(part(torch.zeros(2)).log_prob(torch.zeros(3)))


def test_starting_needs_data_of_the_right_shape_and_a_bias():
    with pytest.raises(ValueError, match=r"x must have shape \(size, 3\), got \(5, 4\)"):
        Normal(2, 3).start_at(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"x must have shape \(size, 3\), got \(0, 3\)"):
        Normal(2, 3).start_at(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="Linear"):
        Normal(2, 3, nn.Linear(2, 3, bias=False)).start_at(torch.zeros(5, 3))


# ------------------------------------------------------------------------------------------------ bits per dim


def test_bits_per_dim_by_hand():
    # A uniform probability over 256 levels is 8 bits a dimension, as a mass or as a density of 1 on bins of 1/256.
    close(bits_per_dim(torch.tensor(-12 * math.log(256.0)).double(), (3, 2, 2)), 8.0, 1e-6)
    close(bits_per_dim(torch.zeros(2).double(), (3, 2, 2), bin_width=1 / 256), 8.0)
    close(bits_per_dim(torch.tensor(-10.0).double(), 5, 0.5), (10 - 5 * math.log(0.5)) / (5 * math.log(2)))
    for width in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="bin_width"):
            bits_per_dim(torch.zeros(1), 3, width)


# ------------------------------------------------------------------------------------------------------- masks

DEPENDENT = (
    likelihoods.Autoregressive,
    likelihoods.PixelCNN,
    likelihoods.SigmoidBelief,
    likelihoods.Multinomial,
    Mixed,
)
FACTORISED = [case for case in cases("likelihood") if case.cls not in DEPENDENT]


def observed_part(case) -> tuple[nn.Module, dist.TorchDistribution, Tensor, Tensor]:
    part = case.build().double()
    z = torch.randn(3, 5, 2, dtype=torch.float64)
    context = torch.randn(5, case.context_dim, dtype=torch.float64) if case.context_dim else None
    p = part(z, context)
    x = p.sample()[0].double()
    mask = torch.rand(x.shape) < 0.6
    mask[0], mask[1] = True, False
    return part, p, x, mask


@pytest.mark.parametrize("hole", [math.nan, math.inf, -7.3])
@pytest.mark.parametrize("case", FACTORISED, ids=lambda case: case.name)
def test_a_mask_leaves_the_terms_of_the_observed_elements(case, hole):
    part, p, x, mask = observed_part(case)
    base = p
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    terms = torch.where(mask, base.log_prob(x), 0.0).flatten(2).sum(-1)
    x_with_holes = torch.where(mask, x, hole)
    masked = mask_elements(p, mask)
    assert (masked.batch_shape, masked.event_shape) == (p.batch_shape, p.event_shape)
    assert masked.support.check(x_with_holes).all()
    log_prob = masked.log_prob(x_with_holes)
    # Sums of a few terms, computed in another order; the fast Bernoulli by another formula.
    torch.testing.assert_close(log_prob, terms, rtol=1e-12, atol=1e-12)
    assert (log_prob[:, 1] == 0).all()
    gradients = torch.autograd.grad(log_prob.sum(), list(part.parameters()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)
    torch.testing.assert_close(distributions.center(masked), distributions.center(p), equal_nan=True)
    assert masked.sample((2,)).shape == (2, *p.batch_shape, *p.event_shape)
    check_observed("x", masked, x_with_holes)
    wider = masked.expand((2, *p.batch_shape))
    torch.testing.assert_close(wider.log_prob(x_with_holes), log_prob.expand(2, -1, -1))


def test_a_mask_of_everything_changes_nothing_and_of_nothing_leaves_zero():
    for case in cases("likelihood"):
        # Their elements depend on one another.
        if issubclass(case.cls, (likelihoods.Autoregressive, likelihoods.SigmoidBelief)):
            continue
        _, p, x, _ = observed_part(case)
        all_of_it = torch.ones(p.event_shape, dtype=torch.bool)
        torch.testing.assert_close(mask_elements(p, all_of_it).log_prob(x), p.log_prob(x), rtol=1e-12, atol=1e-12)
        assert mask_elements(p, ~all_of_it).log_prob(x).abs().max() < 1e-12


def test_a_mask_checks_the_support_of_the_observed_elements_alone():
    p = Bernoulli(2, 3)(torch.zeros(4, 2))
    mask = torch.tensor([True, False, True])
    x = torch.tensor([[1.0, 9.0, 0.0]]).repeat(4, 1)
    masked = mask_elements(p, mask)
    assert masked.support.check(x).all()
    x[2, 0] = 0.5
    assert masked.support.check(x).tolist() == [True, True, False, True]
    with pytest.raises(
        ValueError, match="Bernoulli.*ranges from 0 to 1, and the first datum outside is row 2 of the batch.*Binarise"
    ):
        check_observed("x", masked, x)


def test_the_optimal_scale_of_masked_data_is_that_of_the_observed():
    part = OptimalNormal(1, 3, Given(torch.zeros(3))).double()
    x = torch.tensor([[1.0, math.nan, 2.0], [math.nan, math.nan, 3.0]]).double()
    log_prob = mask_elements(part(torch.zeros(2, 1)), ~x.isnan()).log_prob(x)
    variance = (1 + 4 + 9) / 3
    assert part.variance.item() == pytest.approx(variance)
    truth = scipy.stats.norm(0, math.sqrt(variance)).logpdf
    close(log_prob, [truth(1.0) + truth(2.0), truth(3.0)])


def test_masked_multinomial_counts_are_multinomial_given_their_sum():
    logits = torch.tensor([0.3, -1.0, 0.7, 2.0])
    p = given(likelihoods.Multinomial, 4, logits)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False], [False, True, False, False]])
    x = torch.tensor([[2, math.nan, 0, 5], [1, 2, math.nan, math.nan], [math.nan, 4, -1, math.nan]]).double()
    log_prob = mask_elements(p, mask).log_prob(x)
    for i in range(3):
        counts, probs = x[i][mask[i]].numpy(), logits.double()[mask[i]].softmax(0).numpy()
        close(log_prob[i], scipy.stats.multinomial(int(counts.sum()), probs).logpmf(counts), 1e-11)
    # The conditional by enumeration: of all counts of one total, those with these observed over those with their sum.
    every = torch.tensor([c for c in itertools.product(range(6), repeat=4) if sum(c) == 5]).double()
    probability = p.log_prob(every).exp()
    same_sum = every[:, [0, 2, 3]].sum(-1) == 3
    same = (every[:, [0, 2, 3]] == torch.tensor([1.0, 2.0, 0.0])).all(-1)
    observed = mask_elements(p, mask[0]).log_prob(torch.tensor([1.0, math.nan, 2.0, 0.0]).double())
    close(observed, (probability[same].sum() / probability[same_sum].sum()).log().detach(), 1e-11)


def test_masked_multinomial_has_finite_gradients():
    logits = torch.randn(4, requires_grad=True)
    p = distributions.Multinomial(3, logits)
    x = torch.tensor([[1.0, math.nan, 2.0, math.nan], [math.nan] * 4])
    log_prob = mask_elements(p, ~x.isnan()).log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    assert log_prob[1] == 0
    truth = torch.zeros(4)
    probs = logits.detach()[[0, 2]].softmax(0)
    truth[[0, 2]] = torch.tensor([1.0, 2.0]) - 3 * probs
    torch.testing.assert_close(gradient, truth)


def test_masked_blocks_mask_each_block():
    part = Mixed(2, 9, blocks()).double()
    p = part(torch.randn(3, 5, 2).double())
    x = p.sample()[0].double()
    mask = torch.rand(5, 9) < 0.5
    holes = torch.where(mask, x, math.nan)
    sizes = [3, 1, 4, 1]
    truth = sum(
        mask_elements(q, m).log_prob(v)
        for q, m, v in zip(p.blocks, mask.split(sizes, -1), holes.split(sizes, -1), strict=True)
    )
    masked = mask_elements(p, mask)
    torch.testing.assert_close(masked.log_prob(holes), truth)
    check_observed("x", masked, holes)
    gradients = torch.autograd.grad(masked.log_prob(holes).sum(), list(part.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)


def test_a_mask_may_have_more_leading_dimensions_than_the_distribution():
    p = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    mask = torch.rand(5, 3) < 0.5
    masked = mask_elements(p, mask)
    assert masked.batch_shape == (5,)
    close(masked.log_prob(torch.zeros(3)), -0.5 * math.log(2 * math.pi) * mask.sum(-1).numpy(), 1e-6)


def test_a_mask_that_does_not_fit_is_refused():
    p = dist.Normal(torch.zeros(4, 2, 3), 1.0).to_event(2)
    for shape in [(4,), (2, 4), (5, 2, 3), (2, 2, 2)]:
        with pytest.raises(ValueError, match=r"mask has shape .* events of shape \(2, 3\)"):
            mask_elements(p, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be boolean.*float32"):
        mask_elements(p, torch.ones(2, 3))
    with pytest.raises(TypeError, match="MultivariateNormal"):
        mask_elements(dist.MultivariateNormal(torch.zeros(3), torch.eye(3)), torch.ones(3, dtype=torch.bool))


# ------------------------------------------------------------------------------------- data outside the support


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("ContinuousBernoulli", 255.0, "ContinuousBernoulli.*0 to 255.*divide bytes by 255"),
        ("Beta", 1.0, r"Beta.*open interval \(0, 1\).*n - 1"),
        ("Beta", 0.0, "Beta.*open interval"),
        ("LogNormal", 0.0, "LogNormal.*Add a floor"),
        ("Gamma", 0.0, "Gamma.*Add a floor"),
        ("Gamma", -1.0, "Gamma.*likelihood of real numbers"),
        ("Poisson", 0.5, "Poisson.*raw counts"),
        ("Poisson", -1.0, "Poisson.*ranges from -1.*raw counts"),
        ("NegativeBinomial", 1.5, "NegativeBinomial.*raw counts"),
        ("ZeroInflatedNegativeBinomial", 1.5, "ZeroInflatedNegativeBinomial.*raw counts"),
        ("Multinomial", 1.5, "Multinomial.*raw counts"),
        ("Categorical", 256.0, "Categorical.*from 0 to 255.*num_classes"),
        ("Categorical", 1.5, "Categorical.*classes by integers from 0"),
        ("DiscretizedLogistic", 0.5, "DiscretizedLogistic.*levels=256.*divide bytes by 255"),
        ("DiscretizedLogistic", 255.0, "DiscretizedLogistic.*divide bytes by 255"),
        ("DiscretizedLogisticMixture", 0.5, "levels=256.*divide bytes by 255"),
    ],
)
def test_data_outside_the_support_are_refused_with_advice(name, bad, message):
    p = getattr(likelihoods, name)(2, 3)(torch.zeros(4, 2))
    good = (
        torch.full((4, 3), 0.4) if name in ("ContinuousBernoulli", "Beta", "LogNormal", "Gamma") else torch.ones(4, 3)
    )
    if name == "ContinuousBernoulli":
        good = torch.zeros(4, 3)
    check_observed("x", p, good)
    x = good.clone()
    x[1, 2] = bad
    with pytest.raises(ValueError, match=f'site "x" is outside the support of .*{message}'):
        check_observed("x", p, x)


@pytest.mark.parametrize("levels", [2, 256, 65536])
def test_the_grid_takes_data_rounded_to_it_in_single_precision(levels):
    on_grid = torch.arange(levels) / (levels - 1)
    assert distributions.grid(levels).check(on_grid).all()
    off = torch.tensor([-1 / (levels - 1), 0.5 / (levels - 1), levels / (levels - 1), math.nan])
    assert not distributions.grid(levels).check(off).any()


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("Normal", "scale"),
        ("Laplace", "scale"),
        ("StudentT", "scale"),
        ("StudentT", "df"),
        ("LogNormal", "scale"),
        ("Gamma", "concentration"),
        ("NegativeBinomial", "inverse_dispersion"),
        ("ZeroInflatedNegativeBinomial", "inverse_dispersion"),
    ],
)
def test_start_values_that_are_not_positive_are_refused(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be positive and finite"):
        getattr(likelihoods, name)(2, 3, **{argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("Categorical", "num_classes", 1),
        ("Multinomial", "total_count", 0),
        ("DiscretizedLogistic", "levels", 1),
        ("DiscretizedLogisticMixture", "levels", 1),
        ("DiscretizedLogisticMixture", "num_components", 0),
    ],
)
def test_numbers_that_are_too_small_are_refused(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be at least {value + 1}, got {value}"):
        getattr(likelihoods, name)(2, 3, **{argument: value})


@pytest.mark.parametrize("name", ["Laplace", "StudentT", "LogNormal"])
def test_scales_are_one_or_one_per_dimension(name):
    cls = getattr(likelihoods, name)
    assert cls(2, (2, 3)).log_scale.shape == ()
    part = cls(2, (2, 3), per_dimension=True, scale=0.25)
    torch.testing.assert_close(part.log_scale, torch.full((2, 3), math.log(0.25)))


def test_a_mask_needs_a_number_inside_the_support():
    p = dist.Uniform(torch.full((3,), 5.0), 6.0).to_event(1)
    with pytest.raises(TypeError, match=r"puts 0, 1/2 or 1 in place of .*, but none of them is in Interval"):
        mask_elements(p, torch.zeros(3, dtype=torch.bool)).log_prob(torch.full((3,), 5.5))


def test_masked_likelihoods_train_in_pyro():
    part = Mixed(2, 9, blocks())
    holes = part(torch.zeros(6, 2)).sample()
    mask = torch.rand(6, 9) < 0.7
    holes[~mask] = math.nan

    def model():
        pyro.module("likelihood", part)
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", mask_elements(part(z), mask), obs=holes)

    def guide():
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Delta(torch.full((2,), 0.3)).to_event(1))

    loss = pyro.infer.Trace_ELBO(num_particles=3, vectorize_particles=True).differentiable_loss(model, guide)
    z = torch.full((6, 2), 0.3)
    truth = dist.Normal(0.0, 1.0).log_prob(z).sum() + mask_elements(part(z), mask).log_prob(holes).sum()
    torch.testing.assert_close(loss, -truth)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in part.parameters())


def test_negative_counts_of_a_multinomial_are_refused_where_they_are():
    parts = priors.StandardNormal(2), likelihoods.Multinomial(2, 4), DiagonalNormal(4, 2)
    vae, x = VAE(*parts), torch.ones(20, 4)
    x[7, 2] = -3
    with pytest.raises(ValueError, match=r"Multinomial.*ranges from -3 to 1, and the first datum outside is row 7"):
        pyrovae.fit(vae.model, vae.guide, x, epochs=1, batch_size=5, progress=False)
