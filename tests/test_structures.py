"""Hierarchies, missing data and labels for some of the data, compared with linear-Gaussian models in closed form."""

import copy
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pyro
import pytest
import scipy.stats
import torch
from helpers import FAILURE_RATE
from linear_gaussian import (
    AFFINE,
    Truth,
    assert_mean,
    assert_unit_scores,
    bottom_up,
    hierarchy,
    ladder,
    posterior_of,
    repeat,
    set_likelihood,
    set_normal,
    truth,
)
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn
from torch.distributions import Categorical, MultivariateNormal
from torch.nn.functional import cross_entropy, one_hot

from pyrovae import VAE, data, encoders, fit, likelihoods, load, log_marginal, log_weights, priors, save
from pyrovae.inference.imputation import impute
from pyrovae.inference.structure import inspect
from pyrovae.nn import MLP, ConvNet, DeconvNet
from pyrovae.structures import ClassifierELBO, HierarchicalVAE, LadderVAE, MissingDataVAE, SemiSupervisedVAE

EPS = torch.finfo(torch.float64).eps
# Log weights here sum some 20 terms below 100 each, whose residuals, sums of a few products below 10, are divided by
# scales of at least 0.3: some 1e4 roundings of numbers of size one.
ROUNDING = 1e5 * EPS
SMALL = partial(MLP, hidden=(8,))


@pytest.mark.parametrize("make", [bottom_up, ladder])
def test_under_the_exact_posterior_every_weight_of_a_hierarchy_is_log_p(make):
    known = hierarchy()
    vae, p = make(known), known.of_z1().marginal()
    x = p.sample((20,))
    log_w = log_weights(vae.model, vae.guide, x, num_samples=30)
    torch.testing.assert_close(log_w, p.log_prob(x).expand(30, 20), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("make", [bottom_up, ladder])
def test_log_marginal_of_a_hierarchy_is_within_its_standard_error(make):
    known = hierarchy()
    vae, p = make(known, widen=1.2), known.of_z1().marginal()
    x = p.sample((100,))
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=2000, progress=False)
    assert estimate.standard_error.min() > 1e-3  # the guide is no longer exact
    assert_unit_scores((estimate.value - p.log_prob(x)) / estimate.standard_error, FAILURE_RATE)


@pytest.mark.parametrize("make", [bottom_up, ladder])
def test_samples_of_a_hierarchy_follow_its_marginal(make):
    known = hierarchy()
    p = known.of_z1().marginal()
    x = make(known).sample(4000)
    scores = torch.linalg.solve_triangular(p.scale_tril, (x - p.mean).T, upper=False)
    assert_unit_scores(scores, FAILURE_RATE)
    assert_mean(scores.T, torch.zeros(4), FAILURE_RATE)
    assert_mean(scores[0] * scores[3], torch.zeros(()), FAILURE_RATE)


def test_the_latents_of_a_ladder_are_the_product_of_what_data_and_level_above_say():
    vae = random_ladder().double()
    x = torch.randn(6, 4, dtype=torch.float64)
    with pyro.plate("particles", 5, dim=-2):
        q = poutine.trace(vae.guide).get_trace(x)
    above, node = q.nodes["z2"]["value"], q.nodes["z1"]["fn"]
    data_says, above_says = vae.encoders[0](vae.networks[0](x)), vae.conditionals[0](above)
    precision = 1 / data_says.variance + 1 / above_says.variance
    mean = (data_says.mean / data_says.variance + above_says.mean / above_says.variance) / precision
    torch.testing.assert_close(node.mean, mean, rtol=1e3 * EPS, atol=1e3 * EPS)
    torch.testing.assert_close(node.variance, 1 / precision, rtol=1e3 * EPS, atol=0)
    # A product of densities up to its normaliser: the difference of logarithms does not depend on z.
    z = torch.randn(7, 5, 6, 3, dtype=torch.float64)
    difference = data_says.log_prob(z) + above_says.log_prob(z) - node.log_prob(z)
    assert (difference - difference[0]).abs().max() < ROUNDING


def random_ladder() -> LadderVAE:
    return LadderVAE(
        prior=priors.StandardNormal(2),
        conditionals=[encoders.DiagonalNormal(2, 3, SMALL)],
        likelihood=likelihoods.Normal(3, 4, SMALL),
        networks=[MLP(4, 5), MLP(5, 6)],
        encoders=[encoders.DiagonalNormal(5, 3, SMALL), encoders.DiagonalNormal(6, 2, SMALL)],
    )


def test_a_ladder_names_the_level_and_the_part_that_is_no_diagonal_normal():
    vae = random_ladder()
    vae.encoders[0] = encoders.FullRankNormal(5, 3)
    with pytest.raises(TypeError, match=r"Level 1 .* encoders\[0\] returned MultivariateNormal"):
        vae.guide(torch.zeros(2, 4))
    vae = random_ladder()
    vae.conditionals[0] = likelihoods.Bernoulli(2, 3)
    with pytest.raises(TypeError, match=r"Level 1 .* conditionals\[0\] returned Bernoulli"):
        vae.guide(torch.zeros(2, 4))


def test_one_level_is_a_vae():
    parts = priors.StandardNormal(2), likelihoods.Normal(2, 4, SMALL), encoders.DiagonalNormal(4, 2, SMALL)
    one, vae = HierarchicalVAE(parts[0], [], parts[1], [parts[2]]), VAE(*parts)
    x, found = torch.randn(5, 4), []
    for v in (one, vae):
        pyro.set_rng_seed(3)
        found.append((log_weights(v.model, v.guide, x, num_samples=6), v.sample(7), v.reconstruct(x)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def three_levels(**changes) -> HierarchicalVAE:
    parts = {
        "prior": priors.StandardNormal(2),
        "conditionals": [likelihoods.Normal(3, 4, SMALL), encoders.DiagonalNormal(2, 3, SMALL)],
        "likelihood": likelihoods.Normal(4, (2, 3), SMALL),
        "encoders": [encoders.DiagonalNormal(*sizes, SMALL) for sizes in (((2, 3), 4), (4, 3), (3, 2))],
    }
    return HierarchicalVAE(**parts | changes)


def test_levels_are_listed_from_the_data_upwards():
    vae = three_levels()
    trace = poutine.trace(vae.model).get_trace(torch.zeros(5, 2, 3))
    assert {name: tuple(trace.nodes[name]["value"].shape) for name in ("z3", "z2", "z1", "x")} == {
        "z3": (5, 2),
        "z2": (5, 3),
        "z1": (5, 4),
        "x": (5, 2, 3),
    }
    assert vae.sample(6).shape == (6, 2, 3)
    assert vae.reconstruct(torch.zeros(5, 2, 3)).shape == (5, 2, 3)


class Dirichlet(encoders.Encoder):
    support = torch.distributions.constraints.simplex

    def forward(self, x, context=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: three_levels(encoders=[]), "encoders is empty"),
        (lambda: three_levels(conditionals=[]), "3 encoders make 3 levels, which need 2 conditionals, got 0"),
        (lambda: three_levels(prior=priors.StandardNormal(3)), r"shape of z3: .*prior is built for \(3,\)"),
        (
            lambda: three_levels(likelihood=likelihoods.Normal(5, (2, 3))),
            r"shape of z1: likelihood is built for \(5,\)",
        ),
        (lambda: three_levels(likelihood=likelihoods.Normal(4, 6)), r"shape of x: likelihood is built for \(6,\)"),
        (
            lambda: three_levels(conditionals=[encoders.DiagonalNormal(2, 3), likelihoods.Normal(3, 4)]),
            r"shape of z1: .*conditionals\[0\] is built for \(3,\)",
        ),
        (
            lambda: three_levels(encoders=[encoders.DiagonalNormal(*s) for s in (((2, 3), 4), (4, 2), (3, 2))]),
            r"shape of z2: .*encoders\[1\] is built for \(2,\)",
        ),
        (
            lambda: three_levels(
                encoders=[
                    encoders.DiagonalNormal((2, 3), 4),
                    encoders.DiagonalNormal(4, 3),
                    Dirichlet(3, 2, num_params=2),
                ]
            ),
            r"agree on support: prior has .*Real.*encoders\[2\] has Simplex",
        ),
        (
            lambda: LadderVAE(
                priors.StandardNormal(2), [], likelihoods.Normal(2, 4), [], [encoders.DiagonalNormal(4, 2)]
            ),
            "1 levels, which need 1 networks, got 0",
        ),
        (
            lambda: LadderVAE(
                priors.StandardNormal(2), [], likelihoods.Normal(2, 4), [MLP(4, 5)], [encoders.DiagonalNormal(4, 2)]
            ),
            r"shape of d1: networks\[0\] is built for \(5,\), encoders\[0\] is built for \(4,\)",
        ),
        (
            lambda: LadderVAE(
                priors.StandardNormal(2), [], likelihoods.Normal(2, 4), [MLP(3, 5)], [encoders.DiagonalNormal(5, 2)]
            ),
            r"shape of x: likelihood is built for \(4,\), networks\[0\] is built for \(3,\)",
        ),
    ],
)
def test_levels_that_do_not_meet_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_context_reaches_the_parts_that_were_built_for_one():
    vae = LadderVAE(
        prior=priors.StandardNormal(2),
        conditionals=[encoders.DiagonalNormal(2, 3, SMALL, context_dim=2)],
        likelihood=likelihoods.Normal(3, 4, SMALL),
        networks=[MLP(4, 5, context_dim=2), nn.Linear(5, 6)],
        encoders=[encoders.DiagonalNormal(5, 3, SMALL), encoders.DiagonalNormal(6, 2, SMALL)],
    )
    x, context = torch.randn(5, 4), torch.randn(5, 2)
    found = []
    for c in (context, context, -context):
        pyro.set_rng_seed(0)
        found.append(log_weights(vae.model, vae.guide, x, c, num_samples=3))
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().min() > 0
    assert vae.sample(6, context).shape == (6, 5, 4)
    assert vae.reconstruct(x, context).shape == (5, 4)
    with pytest.raises(ValueError, match="context has 4 rows but x has 5"):
        vae.model(x, context[:4])
    with pytest.raises(ValueError, match="no part takes one"):
        random_ladder().model(x, context)


# ------------------------------------------------------------------------------------------------- missing data


class ExactEncoder(nn.Module):
    """The posterior of a linear-Gaussian model given the observed elements, with wider scales and shifted means."""

    def __init__(self, known: Truth, widen: float = 1.0, shift: float = 0.0):
        super().__init__()
        self.known, self.widen, self.shift, self.context_dim = known, widen, shift, 0

    def forward(self, both: Tensor, context: None = None):
        x, mask = both.unbind(1)
        weight = self.known.weight * mask.unsqueeze(-1) / self.known.scale**2  # (batch, x_dim, latent_dim)
        precision = torch.eye(weight.shape[-1], dtype=torch.float64) + weight.mT @ self.known.weight
        covariance = torch.linalg.inv(precision)
        mean = (covariance @ weight.mT @ (x - self.known.bias).unsqueeze(-1)).squeeze(-1)
        mean = mean + self.shift * covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        return pyro.distributions.MultivariateNormal(mean, self.widen**2 * covariance)


def missing_vae(known: Truth, widen: float = 1.0, shift: float = 0.0) -> MissingDataVAE:
    x_dim, latent_dim = known.weight.shape
    likelihood = likelihoods.Normal(latent_dim, x_dim, AFFINE)
    vae = MissingDataVAE(priors.StandardNormal(latent_dim), likelihood, ExactEncoder(known, widen, shift)).double()
    set_likelihood(likelihood, known.weight, known.bias, known.scale)
    return vae


def observed_part(known: Truth, mask: Tensor) -> MultivariateNormal:
    p = known.marginal()
    return MultivariateNormal(p.mean[mask], p.covariance_matrix[mask][:, mask])


def conditional_of(known: Truth, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and covariance of the missing elements of one datum given the observed ones."""
    p = known.marginal()
    gain = p.covariance_matrix[~mask][:, mask] @ torch.linalg.inv(p.covariance_matrix[mask][:, mask])
    mean = p.mean[~mask] + gain @ (x[mask] - p.mean[mask])
    return mean, p.covariance_matrix[~mask][:, ~mask] - gain @ p.covariance_matrix[mask][:, ~mask]


def random_masks(n: int, x_dim: int) -> Tensor:
    mask = torch.rand(n, x_dim) < 0.5
    mask[torch.arange(n), torch.randint(x_dim, (n,))] = True
    return mask


def test_weights_with_missing_data_are_the_log_density_of_what_was_observed():
    known = truth(2, 5)
    vae, x, mask = missing_vae(known), known.marginal().sample((40,)), random_masks(40, 5)
    expected = torch.stack([observed_part(known, m).log_prob(row[m]) for row, m in zip(x, mask, strict=True)])
    log_w = log_weights(vae.model, vae.guide, x, mask, num_samples=10)
    torch.testing.assert_close(log_w, expected.expand(10, 40), rtol=0, atol=ROUNDING)
    vae = missing_vae(known, widen=1.2)
    estimate = log_marginal(vae.model, vae.guide, x, mask, num_samples=2000, progress=False)
    assert_unit_scores((estimate.value - expected) / estimate.standard_error, FAILURE_RATE)


@pytest.mark.parametrize("samples_at_once", [1000, 130])
def test_imputation_gives_the_conditional_mean(samples_at_once, monkeypatch):
    known = truth(2, 5)
    vae, x, mask = missing_vae(known, widen=1.3, shift=0.5), known.marginal().sample((6,)), random_masks(6, 5)
    monkeypatch.setattr(sys.modules[impute.__module__], "_CHUNK", samples_at_once * x.numel())
    found = repeat(lambda: vae.impute(x, mask, num_samples=1000).mean, 50)
    expected = x.clone()
    for row, m, out in zip(x, mask, expected, strict=True):
        out[~m] = conditional_of(known, row, m)[0]
    # Self-normalised weights have a bias of about 1 / num_samples, a fifth of the error of the mean over 50 runs.
    assert_mean(found, expected, FAILURE_RATE)


@pytest.mark.parametrize("samples_at_once", [1000, 64])
def test_draws_of_an_imputation_have_the_conditional_distribution(samples_at_once, monkeypatch):
    known, n = truth(2, 5), 2000
    x, mask = known.marginal().sample((1,)).expand(n, 5), torch.tensor([True, False, True, True, False]).expand(n, 5)
    monkeypatch.setattr(sys.modules[impute.__module__], "_CHUNK", samples_at_once * x.numel())
    found = missing_vae(known, widen=1.3, shift=0.5).impute(x, mask, num_samples=300)
    assert torch.equal(found.draws[0][mask], x[mask])
    mean, covariance = conditional_of(known, x[0], mask[0])
    deviations = (found.draws[0][~mask].view(n, 2) - mean).T
    scores = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), deviations, upper=False)
    assert_unit_scores(scores, FAILURE_RATE)
    assert_mean(scores.T, torch.zeros(2), FAILURE_RATE)
    assert_mean(scores[0] * scores[1], torch.zeros(()), FAILURE_RATE)
    assert found.ess.max() < 250  # the guide is a worse proposal than the posterior


def test_chunks_of_an_imputation_change_nothing_but_the_order_of_draws(monkeypatch):
    known = truth(2, 5)
    x, mask = known.marginal().sample((6,)), random_masks(6, 5)
    vae = missing_vae(known)
    for samples_at_once in (1000, 7):
        monkeypatch.setattr(sys.modules[impute.__module__], "_CHUNK", samples_at_once * x.numel())
        found = vae.impute(x, mask, num_samples=100, num_draws=3)
        assert found.draws.shape == (3, 6, 5)
        # Under the exact posterior weights are equal, up to rounding.
        torch.testing.assert_close(found.ess, torch.full((6,), 100.0, dtype=torch.float64), rtol=1e-9, atol=0)


def test_draws_of_one_datum_come_from_all_chunks(monkeypatch):
    known = truth(2, 5)
    x, mask = known.marginal().sample((1,)), torch.tensor([[True, False, True, True, False]])
    monkeypatch.setattr(sys.modules[impute.__module__], "_CHUNK", 50 * x.numel())
    found = missing_vae(known, widen=1.3, shift=0.5).impute(x, mask, num_samples=20_000, num_draws=2000)
    mean, covariance = conditional_of(known, x[0], mask[0])
    # 2,000 draws of some 14,000 effective samples are close to independent: an eighth more variance of their mean.
    deviations = (found.draws[:, 0][:, ~mask[0]] - mean).T
    scores = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), deviations, upper=False)
    assert_mean(scores.T / math.sqrt(1 + 2000 / found.ess.item()), torch.zeros(2), FAILURE_RATE)


def test_impute_takes_any_pair_and_sites_in_other_plates():
    normal = pyro.distributions.Normal

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(()), 1.0))
            with pyro.plate("parts", 3, dim=-2):
                part = pyro.sample("part", normal(z, 1.0))
                pyro.sample("y", normal(part, 0.5), obs=x.T)
            pyro.sample("x", normal(z.unsqueeze(-1).expand(*z.shape, 3), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(x.mean(-1), 1.0))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("part", normal(x.T, 1.0))

    x = torch.randn(4, 3)
    found = impute(model, guide, x, num_samples=50, num_draws=2)
    assert (found.mean.shape, found.draws.shape, found.ess.shape) == ((4, 3), (2, 4, 3), (4,))
    found = impute(model, guide, x, num_samples=50, num_draws=2, site="y")
    assert (found.mean.shape, found.draws.shape) == ((3, 4), (2, 3, 4))
    # part given y: a product of N(z, 1) and N(y, 1/4), so that the mean of y lies between z and y.
    pyro.set_rng_seed(1)
    many = impute(model, guide, x, num_samples=20_000, site="y").mean
    # Exactly: z has precision 1 + 3 (x) + 3 / 1.25 (y, through parts), all in favour of the sum of x.
    z = (x.sum(1) + x.sum(1) / 1.25) / (1 + 3 + 3 / 1.25)
    expected = (z + 4 * x.T) / 5
    spread = [impute(model, guide, x, num_samples=1000, site="y").mean for _ in range(20)]
    error = torch.stack(spread).std(0) / math.sqrt(20)
    bound = scipy.stats.t(19).isf(FAILURE_RATE / 2 / 12)
    assert ((many - expected).abs() < bound * error).all()


def test_impute_says_what_is_wrong():
    known = truth(2, 3)
    vae, x, mask = missing_vae(known), torch.zeros(4, 3, dtype=torch.float64), torch.ones(4, 3)
    with pytest.raises(ValueError, match='no observed site "y" to impute; it has x'):
        impute(vae.model, vae.guide, x, mask, site="y")
    with pytest.raises(ValueError, match='no observed site "z"'):
        impute(vae.model, vae.guide, x, mask, site="z")
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        impute(vae.model, vae.guide, x, mask, num_draws=0)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        impute(vae.model, vae.guide, x, mask, num_samples=0)

    def subsampled(x):
        with pyro.plate("data", 4, subsample_size=2):
            pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))

    def model(x):
        with pyro.plate("data", 4, subsample_size=2) as rows:
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x[rows])

    with pytest.raises(ValueError, match="drew 2 of 4 data"):
        impute(model, subsampled, torch.zeros(4))


@pytest.mark.parametrize("samples_at_once", [100, 7])
def test_impute_names_a_datum_whose_samples_have_no_weight(samples_at_once, monkeypatch):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)
            pyro.factor("impossible", torch.where(x > 0, -math.inf, torch.zeros_like(z)))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))

    x = torch.tensor([-1.0, 1.0])
    monkeypatch.setattr(sys.modules[impute.__module__], "_CHUNK", samples_at_once * x.numel())
    with pytest.raises(ValueError, match="all 100 samples of datum 1 have weight zero"):
        impute(model, guide, x, num_samples=100)
    assert impute(model, guide, x[:1], num_samples=100).mean.isfinite().all()


def random_missing_vae() -> MissingDataVAE:
    return MissingDataVAE(
        priors.StandardNormal(2), likelihoods.Normal(2, 4, SMALL), encoders.DiagonalNormal((2, 4), 2, SMALL)
    )


@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_what_stands_in_the_holes_changes_nothing_to_the_bit(garbage):
    vae, mask = random_missing_vae(), random_masks(6, 4)
    x = torch.randn(6, 4)
    found = []
    for filling in (0.0, garbage):
        filled = torch.where(mask, x, filling)
        vae.zero_grad()
        pyro.set_rng_seed(0)
        loss = Trace_ELBO().loss_and_grads(vae.model, vae.guide, filled, mask)
        gradients = [p.grad.clone() for p in vae.parameters()]
        imputed = vae.impute(filled, mask.float(), num_samples=5, num_draws=2)
        found.append([torch.tensor(loss), *gradients, *imputed])
    for ours, theirs in zip(*found, strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)


def test_a_reconstruction_with_holes_is_decoded_from_a_draw_given_what_was_observed():
    vae, x, mask = random_missing_vae(), torch.randn(6, 4), torch.arange(24).reshape(6, 4) % 3 > 0
    pyro.set_rng_seed(1)
    z = vae.encode(x, mask).sample()
    pyro.set_rng_seed(1)
    reconstructed = vae.reconstruct(torch.where(mask, x, torch.nan), mask)
    assert torch.equal(reconstructed, vae.decode(z).mean)


def test_nothing_missing_is_a_vae():
    vae = random_missing_vae()

    class Seen(nn.Module):
        def forward(self, x, context=None):
            return vae.encoder(torch.stack([x, torch.ones_like(x)], dim=1))

    plain, x, found = VAE(vae.prior, vae.likelihood, Seen()), torch.randn(5, 4), []
    for v, args in ((vae, (x, torch.ones_like(x))), (plain, (x,))):
        pyro.set_rng_seed(0)
        found.append(log_weights(v.model, v.guide, *args, num_samples=3))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_images_with_holes_go_through_convolutions():
    x, mask = data.split_missing(torch.where(torch.rand(5, 1, 8, 8) < 0.5, torch.nan, torch.rand(5, 1, 8, 8)))
    vae = MissingDataVAE(
        priors.StandardNormal(2),
        likelihoods.Normal(2, (1, 8, 8), network=partial(DeconvNet, channels=(4, 4))),
        encoders.DiagonalNormal((2, 8, 8), 2, network=partial(ConvNet, channels=(4, 4))),
    )
    assert vae.impute(x, mask, num_samples=5).mean.shape == x.shape
    assert vae.sample(3).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae, x: vae.model(x, torch.ones(6, 3)), r"mask has shape \(6, 3\) but x has \(6, 4\)"),
        (lambda vae, x: vae.guide(x, torch.full((6, 4), 0.5)), "mask must be boolean, or 0 .* and 1"),
        (lambda vae, x: vae.impute(x, torch.arange(6).ne(4).unsqueeze(1).expand(6, 4)), "in 1 of 6 rows, .* row 4"),
        (lambda vae, x: vae.model(x, torch.ones(6, 4), torch.zeros(6, 2)), "no part takes one"),
        (
            lambda vae, x: MissingDataVAE(vae.prior, vae.likelihood, encoders.DiagonalNormal(4, 2)),
            r"Build it for \(2, 4\), or for \(8,\), not for \(4,\)",
        ),
        (
            lambda vae, x: MissingDataVAE(priors.StandardNormal(3), vae.likelihood, vae.encoder),
            "agree on latent_dim: prior has 3",
        ),
        (lambda vae, x: fit(vae.model, vae.guide, (x / 0, torch.ones(6, 4)), batch_size=2), "split_missing"),
    ],
)
def test_masks_and_parts_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_missing_vae(), torch.zeros(6, 4))


def test_split_missing_fills_with_zeros_and_keeps_infinity():
    x = torch.tensor([[1.0, math.nan], [math.inf, -2.0]])
    filled, mask = data.split_missing(x)
    assert filled.tolist() == [[1.0, 0.0], [math.inf, -2.0]]
    assert mask.tolist() == [[True, False], [True, True]]
    assert torch.isnan(x[0, 1])  # the original is unchanged


# ----------------------------------------------------------------------------------------------- semi-supervised


PROBS = (0.5, 0.125, 0.375)  # exact in binary


class Mixture(NamedTuple):
    """x | y, z ~ N(W z + V_y + b, s^2 I): a mixture of Gaussians with one covariance."""

    known: Truth
    offsets: Tensor  # (x_dim, classes)

    def log_joint(self, x: Tensor) -> Tensor:
        """Returns log p(x, y) for every class, (batch, classes)."""
        log_p = self.known.marginal().log_prob(x.unsqueeze(1) - self.offsets.T)
        return log_p + torch.tensor(PROBS, dtype=torch.float64).log()

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        y = Categorical(torch.tensor(PROBS)).sample((n,))
        return self.known.marginal().sample((n,)) + self.offsets.T[y], y


def mixture() -> Mixture:
    return Mixture(truth(2, 4), torch.randn(4, 3, dtype=torch.float64))


def mixture_vae(model: Mixture) -> SemiSupervisedVAE:
    """Returns the VAE that is this mixture, with the exact q(z | x, y) and a random classifier."""
    known = model.known
    likelihood = likelihoods.Normal(2, 4, AFFINE, context_dim=3)
    encoder = encoders.FullRankNormal(4, 2, AFFINE, context_dim=3)
    vae = SemiSupervisedVAE(
        priors.StandardNormal(2), likelihood, encoder, AFFINE, num_classes=3, class_probs=PROBS
    ).double()
    set_likelihood(likelihood, torch.cat([known.weight, model.offsets], dim=1), known.bias, known.scale)
    slope, at_zero, covariance = posterior_of(known)
    set_normal(encoder, slope, at_zero, torch.linalg.cholesky(covariance), classes=-slope @ model.offsets)
    return vae


def partly(y: Tensor, every: int = 3) -> Tensor:
    """Returns labels with every third, for example, kept and the others unknown."""
    return torch.where(torch.arange(len(y)) % every == 0, y, -1)


def objective(model: Mixture, vae: SemiSupervisedVAE, x: Tensor, y: Tensor) -> Tensor:
    """Returns the objective of the paper, per datum: with the exact q(z | x, y), L(x, y) = log p(x, y)."""
    log_joint, log_q = model.log_joint(x), vae.classify(x).logits
    unlabelled = (log_q.exp() * (log_joint - log_q)).sum(1)
    return torch.where(y >= 0, log_joint.gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1), unlabelled)


@pytest.mark.parametrize("every", [1, 3, 1000])
@pytest.mark.parametrize("particles", [1, 4])
def test_the_enumerated_elbo_is_the_objective_of_m2(particles, every):
    model = mixture()
    vae = mixture_vae(model)
    x, y = model.sample(20)
    y = partly(y, every)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=particles, vectorize_particles=particles > 1)
    expected = -objective(model, vae, x, y).sum()
    found = elbo.differentiable_loss(vae.model, vae.guide, x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=20 * ROUNDING)
    # Its gradients by the classifier agree too. (Others have noise, because the posterior of z would change.)
    if every > 1:
        for ours, theirs in zip(
            torch.autograd.grad(found, list(vae.classifier.parameters())),
            torch.autograd.grad(expected, list(vae.classifier.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e3 * ROUNDING)


def test_weights_with_a_known_class_are_the_log_joint():
    model = mixture()
    vae = mixture_vae(model)
    x, y = model.sample(20)
    log_w = log_weights(vae.model, vae.guide, x, y, num_samples=10)
    expected = model.log_joint(x).gather(1, y.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(log_w, expected.expand(10, 20), rtol=0, atol=ROUNDING)


def test_weights_without_classes_estimate_log_p():
    model = mixture()
    vae = mixture_vae(model)
    x, y = model.sample(100)
    expected = model.log_joint(x).logsumexp(1)
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=5000, progress=False)
    # Three weights, one a class: the delta method holds once each class was drawn many times.
    often = vae.classify(x).probs.amin(1) > 0.02
    assert often.sum() > 50
    assert_unit_scores(((estimate.value - expected) / estimate.standard_error)[often], FAILURE_RATE)
    # With classes for some data, the score is log p(x, y) where the class is known and log p(x) elsewhere.
    y = partly(y)
    some = log_marginal(vae.model, vae.guide, x, y, num_samples=200, progress=False)
    joint = model.log_joint(x).gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(some.value[y >= 0], joint[y >= 0], rtol=0, atol=ROUNDING)
    assert (some.standard_error[y < 0] > 0).all()


def test_samples_are_those_of_the_mixture():
    model = mixture()
    vae, p = mixture_vae(model), model.known.marginal()
    x = vae.sample(2000, torch.tensor([2, 0, -1]))
    for i, y in enumerate((2, 0)):
        scores = torch.linalg.solve_triangular(p.scale_tril, (x[:, i] - p.mean - model.offsets[:, y]).T, upper=False)
        assert_unit_scores(scores, FAILURE_RATE)
        assert_mean(scores.T, torch.zeros(4), FAILURE_RATE)
    mean = p.mean + model.offsets @ torch.tensor(PROBS, dtype=torch.float64)
    for of_any in (x[:, 2], vae.sample(2000)):
        assert_mean(of_any, mean, FAILURE_RATE)


def test_reconstructions_are_of_the_known_class_or_of_one_drawn_given_x():
    vae, x = random_semi_supervised(), torch.zeros(3, 4)
    means = torch.stack([vae.likelihood(torch.zeros(2), torch.eye(3)[k]).mean for k in range(3)])
    point = pyro.distributions.Delta(torch.zeros(1, 2), event_dim=1)  # the mean is then that of the class
    vae.encoder.forward = lambda x, context=None: point.expand([len(x)])
    assert torch.allclose(vae.reconstruct(x, torch.arange(3)), means, atol=1e-6)
    drawn = vae.reconstruct(x[:1].expand(4000, 4))
    is_class = (drawn.unsqueeze(1) - means).abs().amax(2) < 1e-6
    assert bool((is_class.sum(1) == 1).all())
    assert_mean(is_class.double(), vae.classify(x[:1]).probs[0].double(), FAILURE_RATE)


def random_semi_supervised() -> SemiSupervisedVAE:
    likelihood, encoder = (
        likelihoods.Normal(2, 4, SMALL, context_dim=3),
        encoders.DiagonalNormal(4, 2, SMALL, context_dim=3),
    )
    return SemiSupervisedVAE(priors.StandardNormal(2), likelihood, encoder, SMALL, num_classes=3)


def test_the_classifier_loss_adds_the_weighted_cross_entropy():
    vae, x = random_semi_supervised(), torch.randn(12, 4)
    y = partly(torch.arange(12) % 3, every=2)
    known = y >= 0
    expected = 7.0 * cross_entropy(vae.classify(x[known]).logits, y[known], reduction="sum").item()

    def at(elbo, method: str, *args: Tensor) -> float:
        pyro.set_rng_seed(0)
        return torch.as_tensor(getattr(elbo, method)(vae.model, vae.guide, *args)).item()

    plain, ours = TraceEnum_ELBO(max_plate_nesting=1), ClassifierELBO(vae.classify, weight=7.0)
    for method in ("loss", "differentiable_loss", "loss_and_grads"):
        assert at(ours, method, x, y) - at(plain, method, x, y) == pytest.approx(expected, rel=1e-5)
        assert at(ours, method, x) == pytest.approx(at(plain, method, x), rel=1e-6)
    # The gradients of loss_and_grads and differentiable_loss are equal.
    vae.zero_grad()
    at(ours, "loss_and_grads", x, y)
    summed = [p.grad.clone() for p in vae.parameters()]
    vae.zero_grad()
    pyro.set_rng_seed(0)
    ours.differentiable_loss(vae.model, vae.guide, x, y).backward()
    for one, other in zip(summed, vae.parameters(), strict=True):
        assert torch.equal(one, other.grad)
        assert one.abs().max() > 0


def test_known_classes_alone_teach_the_classifier_by_their_cross_entropy_and_by_nothing_else():
    vae, x, y = random_semi_supervised(), torch.randn(12, 4), torch.arange(12) % 3
    for weight in (0.0, 2.0):
        vae.zero_grad()
        ClassifierELBO(vae.classify, weight=weight).loss_and_grads(vae.model, vae.guide, x, y)
        expected = weight * cross_entropy(vae.classifier(x), y, reduction="sum")
        for p, g in zip(
            vae.classifier.parameters(), torch.autograd.grad(expected, list(vae.classifier.parameters())), strict=True
        ):
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-5)


def clusters(n: int) -> tuple[Tensor, Tensor]:
    y = torch.randint(3, (n,))
    return 2.0 * one_hot(y, 4).float() + 0.5 * torch.randn(n, 4), y


def test_it_learns_to_classify_from_a_few_labels():
    x, y = clusters(200)
    vae = random_semi_supervised()
    loss = ClassifierELBO(vae.classify, weight=5.0)
    optimizer = partial(torch.optim.Adam, lr=0.03)
    fit(
        vae.model,
        vae.guide,
        (x, partly(y, 20)),
        loss=loss,
        optimizer=optimizer,
        epochs=15,
        batch_size=50,
        progress=False,
    )
    x_test, y_test = clusters(500)
    # Better than random guessing among three classes, with a chance of FAILURE_RATE to fail.
    assert vae.accuracy(x_test, y_test) * 500 > scipy.stats.binom(500, 0.45).isf(FAILURE_RATE)
    assert vae.training


def test_accuracy_counts_those_with_a_class():
    vae, x = random_semi_supervised(), torch.randn(30, 4)
    best = vae.classifier(x).argmax(1)
    y = torch.where(torch.arange(30) < 10, best, (best + 1) % 3)
    assert vae.accuracy(x, y) == pytest.approx(1 / 3)
    assert vae.accuracy(x, torch.where(torch.arange(30) < 20, y, -1)) == pytest.approx(1 / 2)
    with pytest.raises(ValueError, match="no known class"):
        vae.accuracy(x, torch.full((30,), -1))


def test_the_prior_may_depend_on_the_class():
    class Shifted(nn.Module):
        context_dim = 3

        def forward(self, context=None):
            return pyro.distributions.Normal(context[..., :2], 1.0).to_event(1)

    likelihood, encoder = likelihoods.Normal(2, 4, SMALL), encoders.DiagonalNormal(4, 2, SMALL)
    vae = SemiSupervisedVAE(Shifted(), likelihood, encoder, num_classes=3)
    x, y = torch.randn(6, 4), partly(torch.arange(6) % 3)
    assert log_weights(vae.model, vae.guide, x, y, num_samples=3).shape == (3, 6)
    assert TraceEnum_ELBO(max_plate_nesting=1).loss(vae.model, vae.guide, x, y) > 0
    assert vae.sample(5, y).shape == (5, 6, 4)
    assert vae.sample(5).shape == (5, 4)


def other(likelihood_dim: int = 3, encoder_dim: int = 3, **changes) -> SemiSupervisedVAE:
    likelihood = likelihoods.Normal(2, 4, context_dim=likelihood_dim)
    encoder = encoders.DiagonalNormal(4, 2, context_dim=encoder_dim)
    return SemiSupervisedVAE(priors.StandardNormal(2), likelihood, encoder, **{"num_classes": 3} | changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: other().model(x, torch.tensor([0, 3, 1, 0])), "classes from 0 to 2, or -1 .* holds 3 in row 1"),
        (lambda x: other().guide(x, torch.tensor([0, 1, 1, -2])), "holds -2 in row 3"),
        (lambda x: other().model(x, torch.tensor([0, 1])), "y has 2 rows but x has 4"),
        (lambda x: other().model(x, torch.zeros(4)), "one integer a datum"),
        (lambda x: other().model(x, torch.zeros(4, 3, dtype=torch.int64)), r"one integer a datum, shape \(4,\)"),
        (lambda x: other(likelihood_dim=4), "likelihood has context_dim=4. Build it with context_dim=3"),
        (lambda x: other(likelihood_dim=0), "do not depend on the class"),
        (lambda x: other(num_classes=1), "num_classes must be at least 2"),
        (lambda x: other(class_probs=(0.5, 0.5)), "class_probs must be 3 positive numbers"),
        (lambda x: other(class_probs=(0.5, 0.6, 0.1)), "class_probs must be 3 positive numbers"),
        (lambda x: other(class_probs=(1.0, 0.0, 0.0)), "class_probs must be 3 positive numbers"),
        (lambda x: ClassifierELBO(other().classify, weight=-1.0), "weight must be at least 0"),
    ],
)
def test_classes_and_parts_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 4))


# -------------------------------------------------------------------------------------------- what all have in common


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    arguments: Callable[[], tuple[Tensor, ...]]
    loss: Callable[[nn.Module], Trace_ELBO | TraceEnum_ELBO] = lambda vae: Trace_ELBO()


CASES = {
    "HierarchicalVAE": Case(three_levels, lambda: (torch.randn(60, 2, 3) + 2,)),
    "LadderVAE": Case(random_ladder, lambda: (torch.randn(60, 4) + 2,)),
    "MissingDataVAE": Case(random_missing_vae, lambda: (torch.randn(60, 4) + 2, random_masks(60, 4))),
    "SemiSupervisedVAE": Case(
        random_semi_supervised,
        lambda: (torch.randn(60, 4) + 2, partly(torch.arange(60) % 3)),
        lambda vae: ClassifierELBO(vae.classify, weight=1.0),
    ),
}
structures = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def state(vae: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in vae.parameters()]


@structures
def test_every_structure_fits_and_every_parameter_learns(case):
    vae, arguments = case.make(), case.arguments()
    assert inspect(vae.model, vae.guide, *arguments).problems == ()
    before = state(vae)
    options = {"loss": case.loss(vae), "epochs": 8, "batch_size": 20, "progress": False}
    history = fit(
        vae.model, vae.guide, arguments, **options, validation=arguments, optimizer=partial(torch.optim.Adam, lr=0.03)
    )
    assert history["validation"][-1] < history["validation"][0] - 1  # nats a datum; the data are two from zero
    assert all((a != b).any() for a, b in zip(before, state(vae), strict=True))


@structures
def test_every_structure_goes_into_stock_svi(case):
    vae, arguments = case.make(), case.arguments()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.03}), case.loss(vae))
    losses = [svi.step(*arguments) for _ in range(20)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 60  # by a nat a datum; the data are two from zero


@structures
def test_every_structure_is_saved_and_loaded(case, tmp_path):
    vae, again, arguments = case.make(), case.make(), case.arguments()
    save(vae, tmp_path / "vae.safetensors")
    load(again, tmp_path / "vae.safetensors")
    found = []
    for v in (vae, again):
        pyro.set_rng_seed(0)
        found.append(log_weights(v.model, v.guide, *arguments, num_samples=3))
    assert torch.equal(*found)


@structures
def test_a_copy_trains_on_its_own(case):
    vae, arguments = case.make(), case.arguments()
    options = {"epochs": 1, "batch_size": 20, "progress": False}
    fit(vae.model, vae.guide, arguments, loss=case.loss(vae), **options)
    twin = copy.deepcopy(vae)
    before = state(vae)
    fit(twin.model, twin.guide, arguments, loss=case.loss(twin), **options)
    assert all(torch.equal(a, b) for a, b in zip(before, state(vae), strict=True))
    assert all((a != b).any() for a, b in zip(before, state(twin), strict=True))


# ---------------------------------------------------------------------------- the mode that they run in, and the order


def moody(inputs: int, outputs: int) -> nn.Module:
    """A network that differs in training mode."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, outputs)
    )


def moody_hierarchy() -> HierarchicalVAE:
    return HierarchicalVAE(
        priors.StandardNormal(2),
        [encoders.DiagonalNormal(2, 3, moody(2, 6))],
        likelihoods.Normal(3, 4, moody(3, 4)),
        [encoders.DiagonalNormal(4, 3, moody(4, 6)), encoders.DiagonalNormal(3, 2, moody(3, 4))],
    )


def moody_ladder() -> LadderVAE:
    return LadderVAE(
        priors.StandardNormal(2),
        [encoders.DiagonalNormal(2, 3, moody(2, 6))],
        likelihoods.Normal(3, 4, moody(3, 4)),
        [moody(4, 6), moody(6, 5)],
        [encoders.DiagonalNormal(6, 3, SMALL), encoders.DiagonalNormal(5, 2, SMALL)],
    )


def moody_missing() -> MissingDataVAE:
    likelihood, encoder = likelihoods.Normal(2, 4, moody(2, 4)), encoders.DiagonalNormal((2, 4), 2, moody(8, 4))
    return MissingDataVAE(priors.StandardNormal(2), likelihood, encoder)


def moody_semi_supervised() -> SemiSupervisedVAE:
    likelihood, encoder = likelihoods.Normal(2, 4, SMALL, context_dim=3), encoders.DiagonalNormal(4, 2, moody(4, 4))
    return SemiSupervisedVAE(priors.StandardNormal(2), likelihood, encoder, moody(4, 3), num_classes=3)


X = torch.linspace(-1, 1, 40).reshape(10, 4)
VERBS = {
    "a hierarchy's decode": (moody_hierarchy, lambda vae: vae.decode(X[:, :3]).mean),
    "a hierarchy's sample": (moody_hierarchy, lambda vae: vae.sample(10)),
    "a hierarchy's reconstruct": (moody_hierarchy, lambda vae: vae.reconstruct(X)),
    "a ladder's reconstruct": (moody_ladder, lambda vae: vae.reconstruct(X)),
    "encode with holes": (moody_missing, lambda vae: vae.encode(X, 0.0 * X[:, :1] - 2 < X).mean),
    "reconstruct with holes": (moody_missing, lambda vae: vae.reconstruct(X, 0.0 * X[:, :1] - 2 < X)),
    "sample of data with holes": (moody_missing, lambda vae: vae.sample(10)),
    "classify": (moody_semi_supervised, lambda vae: vae.classify(X).probs),
    "accuracy": (moody_semi_supervised, lambda vae: torch.tensor(vae.accuracy(X, torch.arange(10) % 3))),
    "reconstruct of a class": (moody_semi_supervised, lambda vae: vae.reconstruct(X, partly(torch.arange(10) % 3))),
    "sample of a class": (moody_semi_supervised, lambda vae: vae.sample(10)),
}


@pytest.mark.parametrize("kind", VERBS)
def test_what_users_call_runs_in_evaluation_mode(kind):
    make, verb = VERBS[kind]
    vae = make()
    state = {name: t.clone() for name, t in vae.state_dict().items()}
    pyro.set_rng_seed(3)
    out = verb(vae)
    assert all(module.training for module in vae.modules())
    assert all(torch.equal(t, state[name]) for name, t in vae.state_dict().items())
    pyro.set_rng_seed(3)
    assert torch.equal(out, verb(vae.eval()))


@pytest.mark.parametrize("step", ["fit", "SVI", "loss_and_grads"])
def test_the_classifier_learns_in_training_mode(step):
    vae, seen = moody_semi_supervised(), []
    vae.classifier.register_forward_pre_hook(lambda network, _: seen.append(network.training))
    y, loss = partly(torch.arange(10) % 3), ClassifierELBO(vae.classify, weight=1.0)
    if step == "fit":
        fit(vae.model, vae.guide, (X, y), loss=loss, epochs=1, batch_size=10, progress=False)
        assert seen[-2:] == [True, True]  # once for the ELBO, once for the cross entropy
        return
    if step == "SVI":
        SVI(vae.model, vae.guide, pyro.optim.SGD({"lr": 0.0}), loss).step(X, y)
    else:
        loss.loss_and_grads(vae.model, vae.guide, X, y)
    assert seen == [True, True]


def test_parts_of_a_hierarchy_in_another_order_are_named():
    q = [encoders.DiagonalNormal(4, 3), encoders.DiagonalNormal(3, 2)]
    p, above, x = priors.StandardNormal(2), encoders.DiagonalNormal(2, 3), likelihoods.Normal(3, 4)
    with pytest.raises(
        TypeError, match=r"prior must have .* takes \(context=None\), but that of Normal takes other arguments"
    ):
        HierarchicalVAE(x, [above], p, q)
    with pytest.raises(TypeError, match=r"conditionals\[0\] must .*\(z, context=None\), but that of StandardNormal"):
        HierarchicalVAE(p, [p], x, q)
    with pytest.raises(TypeError, match=r"encoders\[1\] must .*\(x, context=None\), but that of StandardNormal"):
        HierarchicalVAE(p, [above], x, [q[0], p])
