"""Hierarchies of which every part sees all levels above it, compared with linear-Gaussian models in closed form."""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import pyro
import pytest
import torch
from helpers import FAILURE_RATE
from linear_gaussian import AFFINE, Gaussian, assert_mean, assert_unit_scores, set_likelihood, set_normal
from pyro import poutine
from torch import Tensor, nn

from pyrovae import VAE, encoders, likelihoods, log_marginal, log_weights, priors
from pyrovae.estimators import Quadrature
from pyrovae.nn import MLP
from pyrovae.structures import DenseHierarchicalVAE, DenseHierarchy

EPS = torch.finfo(torch.float64).eps
# Log weights sum some 20 terms below 100 each, whose residuals, sums of a few products below 10, are divided by scales
# of at least 0.3: some 1e4 roundings of numbers of size one.
ROUNDING = 1e5 * EPS
SMALL = partial(MLP, hidden=(8,))
SCALE = 0.6  # of every conditional
X_DIM = 4


class Known(NamedTuple):
    """A linear-Gaussian model: levels of `dims` latents, and the affine map to each from all levels above it."""

    dims: tuple[int, ...]
    weights: list[Tensor]  # of x, then of the levels from the first to the one below the top
    biases: list[Tensor]

    def latents(self) -> tuple[Tensor, Tensor]:
        """Returns mean and covariance of all latents, side by side from the first level to the top."""
        d = self.dims[-1]
        mean, covariance = torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
        for weight, bias in zip(reversed(self.weights[1:]), reversed(self.biases[1:]), strict=True):
            noise, cross = SCALE**2 * torch.eye(len(bias), dtype=torch.float64), weight @ covariance
            top = torch.cat([cross @ weight.T + noise, cross], dim=1)
            covariance = torch.cat([top, torch.cat([cross.T, covariance], dim=1)])
            mean = torch.cat([weight @ mean + bias, mean])
        return mean, covariance

    def whole(self) -> Gaussian:
        noise = SCALE**2 * torch.eye(X_DIM, dtype=torch.float64)
        return Gaussian(*self.latents(), self.weights[0], self.biases[0], noise)

    def vae(self, widen: float = 1.0) -> DenseHierarchicalVAE:
        """Returns the model, with its exact posterior as the guide, made `widen` times as wide."""
        starts = [sum(self.dims[:level]) for level in range(len(self.dims) + 1)]
        total = starts[-1]
        *conditionals, likelihood = (
            likelihoods.Normal(weight.shape[1], len(weight), AFFINE).double()
            for weight in [*self.weights[1:], self.weights[0]]
        )
        for part, weight, bias in zip([likelihood, *conditionals], self.weights, self.biases, strict=True):
            set_likelihood(part, weight, bias, SCALE)
        slope, at_zero, covariance = self.whole().posterior()
        qs = []
        for low, high in pairwise(starts):
            q = encoders.FullRankNormal(X_DIM, high - low, AFFINE, context_dim=total - high).double()
            own, above = slice(low, high), slice(high, total)
            # The conditional of a normal: the regression of a level on those above it.
            regression = torch.linalg.solve(covariance[above, above], covariance[above, own]).T
            remaining = covariance[own, own] - regression @ covariance[above, own]
            set_normal(
                q,
                slope[own] - regression @ slope[above],
                at_zero[own] - regression @ at_zero[above],
                widen * torch.linalg.cholesky(remaining),
                regression if high < total else None,
            )
            qs.append(q)
        return DenseHierarchicalVAE(priors.StandardNormal(self.dims[-1]), conditionals, likelihood, qs).double()


def known(*dims: int) -> Known:
    above = [sum(dims), *(sum(dims[level:]) for level in range(1, len(dims)))]
    outputs = [X_DIM, *dims[:-1]]
    weights = [torch.randn(n, m, dtype=torch.float64) for n, m in zip(outputs, above, strict=True)]
    return Known(dims, weights, [torch.randn(n, dtype=torch.float64) for n in outputs])


LEVELS = pytest.mark.parametrize("dims", [(3, 2), (2, 1, 2)], ids=["two levels", "three levels"])


@LEVELS
def test_under_the_exact_posterior_every_weight_is_log_p(dims):
    truth = known(*dims)
    vae, p = truth.vae(), truth.whole().marginal()
    x = p.sample((20,))
    log_w = log_weights(vae.model, vae.guide, x, num_samples=30)
    torch.testing.assert_close(log_w, p.log_prob(x).expand(30, 20), rtol=0, atol=ROUNDING)


@LEVELS
def test_log_marginal_is_within_its_standard_error(dims):
    truth = known(*dims)
    vae, p = truth.vae(widen=1.2), truth.whole().marginal()
    x = p.sample((100,))
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=2000, progress=False)
    assert estimate.standard_error.min() > 1e-3  # the guide is no longer exact
    assert_unit_scores((estimate.value - p.log_prob(x)) / estimate.standard_error, FAILURE_RATE)


def test_quadrature_gives_log_p_of_the_model_alone():
    truth = known(1, 1)
    p = truth.whole().marginal()
    x = p.sample((20,))
    exact = log_marginal(truth.vae().model, None, x, method=Quadrature(10_000), progress=False)
    assert ((exact.value - p.log_prob(x)).abs() <= exact.standard_error + 1e-6).all()


@LEVELS
def test_samples_follow_the_marginal(dims):
    truth = known(*dims)
    p, x = truth.whole().marginal(), truth.vae().sample(4000)
    scores = torch.linalg.solve_triangular(p.scale_tril, (x - p.mean).T, upper=False)
    assert_unit_scores(scores, FAILURE_RATE)
    assert_mean(scores.T, torch.zeros(4), FAILURE_RATE)
    assert_mean(scores[0] * scores[3], torch.zeros(()), FAILURE_RATE)


def test_one_level_is_a_vae():
    parts = priors.StandardNormal(2), likelihoods.Normal(2, 4, SMALL), encoders.DiagonalNormal(4, 2, SMALL)
    one, vae = DenseHierarchicalVAE(parts[0], [], parts[1], [parts[2]]), VAE(*parts)
    x, found = torch.randn(5, 4), []
    for v in (one, vae):
        pyro.set_rng_seed(3)
        found.append((log_weights(v.model, v.guide, x, num_samples=6), v.sample(7), v.reconstruct(x)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def two_levels(**changes) -> DenseHierarchicalVAE:
    parts = {
        "prior": priors.StandardNormal(2),
        "conditionals": [encoders.DiagonalNormal(2, 3, SMALL)],
        "likelihood": likelihoods.Normal(5, (2, 3), SMALL),
        "encoders": [
            encoders.DiagonalNormal((2, 3), 3, SMALL, context_dim=2),
            encoders.DiagonalNormal((2, 3), 2, SMALL),
        ],
    }
    return DenseHierarchicalVAE(**parts | changes)


def test_every_part_sees_all_levels_above_it():
    vae, x = two_levels(), torch.randn(5, 2, 3)
    with pyro.plate("particles", 4, dim=-2):
        q = poutine.trace(vae.guide).get_trace(x)
        p = poutine.trace(poutine.replay(vae.model, q)).get_trace(x)
    z1, z2 = (q.nodes[name]["value"] for name in ("z1", "z2"))
    assert z1.shape == (4, 5, 3) and z2.shape == (4, 5, 2)
    assert torch.equal(q.nodes["z1"]["fn"].mean, vae.encoders[0](x, z2).mean)
    assert torch.equal(p.nodes["z1"]["fn"].mean, vae.conditionals[0](z2).mean)
    assert torch.equal(p.nodes["x"]["fn"].mean, vae.likelihood(torch.cat([z1, z2], -1)).mean)


def test_a_context_reaches_the_parts_that_were_built_for_one():
    qs = [encoders.DiagonalNormal((2, 3), 3, SMALL, context_dim=2 + 4), encoders.DiagonalNormal((2, 3), 2, SMALL)]
    vae, x, context = two_levels(encoders=qs), torch.randn(5, 2, 3), torch.randn(5, 4)
    q = poutine.trace(vae.guide).get_trace(x, context)
    seen = torch.cat([q.nodes["z2"]["value"], context], -1)
    assert torch.equal(q.nodes["z1"]["fn"].mean, qs[0](x, seen).mean)
    assert vae.reconstruct(x, context).shape == x.shape
    with pytest.raises(ValueError, match="no part takes one"):
        two_levels().guide(x, context)
    conditional = two_levels(likelihood=likelihoods.Normal(5, (2, 3), SMALL, context_dim=4))
    assert conditional.sample(7, context).shape == (7, 5, 2, 3)
    assert conditional.reconstruct(x, context).shape == x.shape


def test_a_vamp_prior_is_of_the_top_level():
    qs = two_levels().encoders
    vae = two_levels(prior=priors.VampPrior(qs[1], 7), encoders=list(qs))
    assert vae.prior.pseudo_inputs().shape == (7, 2, 3)
    assert log_weights(vae.model, vae.guide, torch.rand(5, 2, 3), num_samples=3).isfinite().all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"likelihood": likelihoods.Normal(3, (2, 3))}, r"likelihood is built for \(3,\), .* z1, z2 .* Build it for 5"),
        (
            {"conditionals": [encoders.DiagonalNormal(3, 3)]},
            r"shape of z2: .*conditionals\[0\] is built for \(3,\)",
        ),
        (
            {"encoders": [encoders.DiagonalNormal((2, 3), 3), encoders.DiagonalNormal((2, 3), 2)]},
            r"encoders\[0\] has context_dim=0, .* z2 as its context, .* context_dim=2",
        ),
        (
            {"encoders": [encoders.DiagonalNormal((2, 3), 3, context_dim=2), encoders.DiagonalNormal(3, 2)]},
            "agree on the shape of x",
        ),
        ({"prior": priors.StandardNormal(3)}, "agree on the shape of z2"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        two_levels(**changes)


def test_modules_of_the_users_own_take_all_that_is_above_them():
    class Own(nn.Module):
        def __init__(self, seen: int):
            super().__init__()
            self.network = nn.Linear(seen, 2)

        def forward(self, x, context=None):
            h = x if context is None else torch.cat([x.expand(*context.shape[:-1], -1), context], -1)
            return pyro.distributions.Normal(self.network(h), 1.0).to_event(1)

    vae = DenseHierarchicalVAE(priors.StandardNormal(2), [Own(2)], Own(4), [Own(4), Own(2)])
    assert log_weights(vae.model, vae.guide, torch.randn(5, 2), num_samples=3).shape == (3, 5)


def test_the_command_line_builds_encoders_of_the_levels_above_and_of_labels():
    encoder = partial(encoders.DiagonalNormal, context_dim=10)
    vae = DenseHierarchy([4, 2]).build((1, 8, 8), 16, priors.StandardNormal, likelihoods.Bernoulli, encoder)
    assert [q.context_dim for q in vae.encoders] == [16, 12, 10] and vae.context_dim == 10
    parts = priors.StandardNormal, likelihoods.Bernoulli, encoders.DiagonalNormal
    assert DenseHierarchy([4, 2]).build((1, 8, 8), 16, *parts).context_dim == 0
