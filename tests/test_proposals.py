"""What latents are drawn from, for importance sampling: proposals, their mixtures, smoothed weights, tuned guides."""

import math
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from cases import SMALL, Case, cases, inputs
from helpers import FAILURE_RATE
from linear_gaussian import AFFINE, assert_fraction, assert_mean, elbo_of, set_affine, truth, vae_of
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

from pyrovae import VAE, Estimate, encoders, likelihoods, log_marginal, log_weights, priors
from pyrovae.bounds import ELBO, IWAE, StickingTheLanding
from pyrovae.estimators import Guide, ImportanceSampling, Mixed, Prior, Refined, Widened, refine
from pyrovae.estimators.weighted import WeightSums, apportion
from pyrovae.nn import OneHotInput

ROUNDING = 1e-9  # nats: sums of fewer than a million terms below 1,000, in double precision

log_marginal = partial(log_marginal, progress=False)
each = partial(pytest.mark.parametrize, ids=repr)


def data_plate(x: Tensor) -> pyro.plate:
    return pyro.plate("data", len(x), dim=-1)


# --------------------------------------------------------------------------------------------- what the theory says


UNBIASED = [Guide(), Widened(1.3), Mixed(), Mixed([Guide(), Widened(1.5), Prior()], [0.5, 0.3, 0.2]), Refined(20)]


@each("proposal", UNBIASED)
def test_the_estimate_of_p_is_unbiased_whatever_is_drawn_from(proposal):
    known = truth(2, 3)
    vae, x = vae_of(known, widen=1.5, shift=0.5), known.marginal().sample().expand(2000, -1)
    estimate = log_marginal(vae.model, vae.guide, x, method=ImportanceSampling(8, proposal))
    ratio = (estimate.value - known.marginal().log_prob(x)).exp()
    assert_mean(ratio, torch.tensor(1.0), FAILURE_RATE)
    assert 0.01 < ratio.std() < 1.5


@each("proposal", [Guide(), Widened(1.2), Mixed(), Refined(20)])
def test_intervals_cover_the_truth_as_often_as_they_say(proposal):
    known = truth(2, 3)
    vae, x = vae_of(known, widen=1.4), known.marginal().sample((1000,))
    estimate = log_marginal(vae.model, vae.guide, x, method=ImportanceSampling(500, proposal))
    covered = ((estimate.value - known.marginal().log_prob(x)).abs() <= 1.96 * estimate.standard_error).sum().item()
    # The window is four standard errors of a share of 1,000 wide, to either side.
    assert 920 <= covered <= 980
    assert_fraction(covered, 1000, 0.95, FAILURE_RATE)


class Recorded:
    """Keeps the latents that a VAE's model scores, the last ones last."""

    def __init__(self, vae: VAE):
        self.vae, self.z = vae, []

    def model(self, x: Tensor) -> None:
        with poutine.trace() as tracer:
            self.vae.model(x)
        self.z.append(tracer.trace.nodes["z"]["value"])


def test_mixtures_weigh_draws_against_the_density_of_the_whole():
    known = truth(2, 3)
    vae, x = vae_of(known, shift=1.0), known.marginal().sample((7,))
    recorded = Recorded(vae)
    method = ImportanceSampling(101, Mixed([Guide(), Prior()], [3.0, 1.0]))
    estimate = log_marginal(recorded.model, vae.guide, x, method=method)
    z = torch.cat([next(z for z in reversed(recorded.z) if z.shape[:2] == (n, 7)) for n in (76, 25)])
    prior, likelihood = vae.prior().log_prob(z), vae.decode(z).log_prob(x)
    mixture = torch.logaddexp(math.log(76 / 101) + vae.encode(x).log_prob(z), math.log(25 / 101) + prior)
    log_w = prior + likelihood - mixture
    torch.testing.assert_close(estimate.value, log_w.logsumexp(0) - math.log(101), rtol=0, atol=ROUNDING)
    assert (log_w <= math.log(101 / 25) + likelihood + ROUNDING).all()
    largest = -1.5 * math.log(2 * math.pi * known.scale**2)  # of p(x | z)
    assert (estimate.value <= math.log(101 / 25) + largest).all()


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [(10, [0.9, 0.1], [9, 1]), (1, [0.9, 0.1], [1, 0]), (7, [1, 1, 1], [3, 2, 2]), (5, [0.5, 0.3, 0.2], [3, 1, 1])],
)
def test_apportion_make_whole_numbers_that_add_up(total, shares, counts):
    assert sorted(apportion(total, shares), reverse=True) == counts
    assert all(abs(n - total * s / sum(shares)) < 1 for n, s in zip(apportion(total, shares), shares, strict=True))


def widened_by_hand(p: dist.TorchDistribution, scale: float, z: Tensor) -> Tensor:
    return p.log_prob(p.mean + (z - p.mean) / scale) - z.shape[-1] * math.log(scale)


def test_widening_moves_draws_away_from_the_mean_and_knows_its_density():
    known = truth(2, 3)
    vae, x = vae_of(known), known.marginal().sample((5,))
    recorded = Recorded(vae)
    estimate = log_marginal(recorded.model, vae.guide, x, method=ImportanceSampling(4000, Widened(1.7)))
    z, q = recorded.z[-1], vae.encode(x)
    assert_mean((z - q.mean).square(), 1.7**2 * q.variance, FAILURE_RATE)
    log_w = vae.prior().log_prob(z) + vae.decode(z).log_prob(x) - widened_by_hand(q, 1.7, z)
    torch.testing.assert_close(estimate.value, log_w.logsumexp(0) - math.log(4000), rtol=0, atol=ROUNDING)


# -------------------------------------------------------------------------------------------------- Pareto smoothing


def psis(w: np.ndarray) -> tuple[float, float]:
    """Returns the mean of smoothed weights and k-hat, one column at a time, as Vehtari et al. write it down."""
    size = len(w)
    tail = math.ceil(min(0.2 * size, 3 * math.sqrt(size)))
    order = np.argsort(w)
    threshold = w[order[-tail - 1]]
    x = np.sort(w[order[-tail:]] - threshold)
    m = 30 + int(math.sqrt(tail))
    j = np.arange(1, m + 1)
    theta = 1 / x[-1] + (1 - np.sqrt(m / (j - 0.5))) / (3 * x[int(tail / 4 + 0.5) - 1])
    k = np.array([np.mean(np.log(1 - t * x)) for t in theta])
    profile = tail * (np.log(-theta / k) - k - 1)
    share = np.array([1 / np.sum(np.exp(profile - p)) for p in profile])
    best = np.sum(theta * share)
    k = np.mean(np.log(1 - best * x))
    sigma, khat = -k / best, (tail * k + 10 * 0.5) / (tail + 10)
    probabilities = (np.arange(1, tail + 1) - 0.5) / tail
    smooth = w.copy()
    smooth[order[-tail:]] = np.minimum(threshold + sigma / khat * ((1 - probabilities) ** -khat - 1), w.max())
    return smooth.mean(), khat


def smoothed(log_w: Tensor, smooth: bool = True) -> Estimate:
    sums = WeightSums(len(log_w))
    for part in log_w.split(300):
        sums.add(part)
    return sums.estimate(ImportanceSampling(len(log_w)), smooth)


@pytest.mark.parametrize("k", [0.2, 0.6, 1.1])
def test_pareto_smoothing_is_that_of_the_paper(k):
    log_w = -k * torch.rand(1000, 4, dtype=torch.float64).log() - 700.0
    estimate = smoothed(log_w)
    for datum in range(4):
        mean, khat = psis((log_w[:, datum] + 700).exp().numpy())
        assert estimate.value[datum].item() == pytest.approx(math.log(mean) - 700, abs=ROUNDING)
        assert estimate.khat[datum].item() == pytest.approx(khat, abs=ROUNDING)


def test_pareto_smoothing_lowers_the_error_of_heavy_tails():
    log_w = -0.6 * torch.rand(1000, 1000, dtype=torch.float64).log()
    raw, smooth = ((smoothed(log_w, s).value + math.log(0.4)).abs() for s in (False, True))  # the mean is 1 / 0.4
    gain = raw - smooth
    assert gain.mean() > 4 * gain.std() / math.sqrt(len(gain))


# ------------------------------------------------------------------------------------------------------------- refine


ENCODERS = [case for case in cases("encoder") if case.density]


def fitting(case: Case) -> VAE:
    q = case.build()
    integers = case.cls is encoders.Categorical
    network = partial(OneHotInput, num_classes=q.num_classes, network=SMALL) if integers else SMALL
    p = next(
        p
        for p in (c.build() for c in cases("prior", context=False) if c.cls is not priors.VampPrior)
        if (p.latent_dim, repr(p.support)) == (q.latent_dim, repr(q.support))
    )
    return VAE(p, likelihoods.Normal(q.latent_dim, q.x_shape, network, scale=0.5), q).eval()


@pytest.mark.parametrize("case", ENCODERS, ids=lambda case: case.name)
def test_refining_raises_the_bound_of_every_encoder_and_trains_nothing(case):
    vae = fitting(case)
    x, *rest = inputs(case, vae.encoder, 6)
    arguments = (3 * x, *rest)  # far from what an encoder that has learned nothing makes of it
    for p in vae.parameters():
        p.grad = torch.full_like(p, 3.0)
    state = {name: t.clone() for name, t in vae.state_dict().items()}
    # Dependent draws have gradients for the ELBO only, and so have straight-through ones.
    linear = case.name.endswith("stratified") or case.cls is encoders.OneHotCategorical
    bound = ELBO(8) if linear else IWAE(8)
    refined = refine(vae.model, vae.guide, *arguments, bound=bound, num_steps=80)
    assert all(torch.equal(t, state[name]) for name, t in vae.state_dict().items())
    assert all((p.grad == 3.0).all() for p in vae.parameters())

    def bounds(guide) -> Tensor:
        log_w = log_weights(vae.model, guide, *arguments, num_samples=8 * 400).detach()
        log_w = log_w.unflatten(0, (400, 8))
        return (log_w.mean(1) if linear else log_w.logsumexp(1) - math.log(8)).mean(-1)  # over the data

    before, after = bounds(vae.guide), bounds(refined)
    assert after.mean() - before.mean() > 3 * math.sqrt((before.var() + after.var()) / 400)


def test_refining_by_the_elbo_finds_the_posterior_where_the_family_holds_it():
    # Sticking the landing, the gradient has no variance at the posterior: what is left is what Adam has still to go,
    # below a hundredth of a standard deviation after 400 steps.
    known = truth(2, 3)
    vae, x = vae_of(known, widen=2.0, shift=1.0), known.marginal().sample((6,))
    bound = ELBO(4, gradient=StickingTheLanding())
    refined = refine(vae.model, vae.guide, x, bound=bound, num_steps=400)
    q, posterior = poutine.trace(refined).get_trace(x).nodes["z"]["fn"], known.posterior(x)
    assert ((q.mean - posterior.mean) / posterior.stddev).abs().max() < 0.01
    off = (q.covariance_matrix - posterior.covariance_matrix) / posterior.variance.unsqueeze(-1)
    assert off.abs().max() < 0.02
    assert log_weights(vae.model, refined, x, num_samples=100).std(0).max() < 0.03
    assert bound.steps == 0  # it is not in training


def test_refining_by_the_elbo_finds_the_best_normal_of_independent_dimensions():
    # Its means are the posterior's, its variances one over the precision's diagonal. The ELBO is flat there to first
    # order: the noise of a rate that falls to zero leaves less than a hundredth of a nat.
    known = truth(2, 3)
    likelihood, q = likelihoods.Normal(2, 3, AFFINE, scale=known.scale), encoders.DiagonalNormal(3, 2, AFFINE)
    vae, x = VAE(priors.StandardNormal(2), likelihood, q).double(), known.marginal().sample((6,))
    set_affine(likelihood.network, known.weight, known.bias)
    refined = refine(vae.model, vae.guide, x, bound=ELBO(16), num_steps=400)
    found, posterior = poutine.trace(refined).get_trace(x).nodes["z"]["fn"], known.posterior(x)
    best = posterior.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt().expand(6, 2)
    assert ((found.mean - posterior.mean) / best).abs().max() < 0.1
    assert (found.stddev / best).log().abs().max() < 0.1
    loss = known.elbo(x, dist.MultivariateNormal(posterior.mean, torch.diag_embed(best.square()))) - known.elbo(
        x, dist.MultivariateNormal(found.mean, torch.diag_embed(found.variance))
    )
    assert ((loss > -ROUNDING) & (loss < 0.01)).all()
    assert (
        elbo_of(vae, x) < known.elbo(x, dist.MultivariateNormal(found.mean, torch.diag_embed(found.variance)))
    ).all()


def test_refining_can_change_nothing_of_a_guide_without_parameters():
    def model(x):
        with data_plate(x):
            pyro.sample("x", dist.Normal(pyro.sample("z", FixedNormal()), 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", FixedNormal())

    with pytest.raises(ValueError, match="no parameters that can be tuned"):
        refine(model, guide, torch.zeros(3))


class FixedNormal(dist.TorchDistribution):
    """A standard normal that takes no argument."""

    arg_constraints, support, has_rsample = {}, dist.constraints.real, True

    def __init__(self, batch_shape: torch.Size = torch.Size()):
        super().__init__(batch_shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return FixedNormal(torch.Size(batch_shape))

    def rsample(self, sample_shape=torch.Size()):
        return torch.randn(self._extended_shape(sample_shape))

    def log_prob(self, value):
        return dist.Normal(0.0, 1.0).log_prob(value).expand(torch.broadcast_shapes(value.shape, self.batch_shape))
