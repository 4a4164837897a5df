"""log p(x_a | x_b): against closed forms, grids and sums, with error bars that cover; and what has no such density."""

import math
from functools import partial

import pyro
import pytest
import torch
from linear_gaussian import AFFINE, Truth, assert_fraction, assert_unit_scores, set_likelihood, truth, vae_of
from pyro import distributions as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyrovae import VAE, distributions, encoders, likelihoods, log_marginal, priors
from pyrovae.estimators import (
    CUBO,
    AnnealedImportanceSampling,
    Enumeration,
    Guide,
    Laplace,
    Mixed,
    Prior,
    Quadrature,
    Refined,
    compare,
    log_conditional,
)
from pyrovae.nn import OneHotInput
from pyrovae.structures import MissingDataVAE

FAILURE_RATE = 1e-4
ERRORS = 5  # standard errors


def conditional(pair, *args, **keywords):
    return log_conditional(pair.model, pair.guide, *args, progress=False, **keywords)


def exact(known: Truth, x, given):
    """Returns log p(x_a | x_b) by two normal densities, for a mask of each datum."""
    p, values = known.marginal(), []
    for row, mask in zip(x, given.expand(x.shape), strict=True):
        whole, part = (
            dist.MultivariateNormal(p.mean[m], p.covariance_matrix[m][:, m]).log_prob(row[m]) if m.any() else 0.0
            for m in (torch.ones_like(mask), mask)
        )
        values.append(whole - part)
    return torch.stack(values)


PROPOSALS = [None, Mixed([Guide(), Prior()]), Laplace(), Refined(num_steps=10)]


@pytest.mark.parametrize("proposal", PROPOSALS, ids=str)
def test_values_and_errors_agree_with_the_closed_form(proposal):
    known = truth(2, 5, scale=1.0)
    vae, x = vae_of(known, widen=1.3), known.marginal().sample((200,))
    given = torch.tensor([True, False, False, True, True])
    found = conditional(vae, x, given=given, num_samples=1000, proposal=proposal)
    scores = (found.value - exact(known, x, given)) / found.standard_error
    assert_unit_scores(scores, FAILURE_RATE)
    assert_fraction(int((scores.abs() < 1.96).sum()), 200, 0.95, FAILURE_RATE)


def test_each_datum_may_have_a_mask_of_its_own():
    known = truth(2, 5, scale=1.0)
    vae, x = vae_of(known, widen=1.3), known.marginal().sample((20,))
    given = torch.rand(20, 5) < 0.5
    given[0], given[1] = True, False
    for found in (
        conditional(vae, x, given=given, max_memory=2e4, proposal=Mixed(), num_samples=400),
        conditional(vae, DataLoader(TensorDataset(x), batch_size=7), given=given, proposal=Mixed()),
    ):
        assert found.value[0] == 0 and found.standard_error[0] < 1e-7  # the same weights, but for rounding
        scores = ((found.value - exact(known, x, given)) / found.standard_error)[1:]
        assert_unit_scores(scores, FAILURE_RATE)


def test_common_draws_cancel_noise():
    known = truth(2, 5, scale=1.0)
    vae, x = vae_of(known, widen=2.0), known.marginal().sample((50,))
    found = conditional(vae, x, given=torch.tensor([True, True, True, True, False]), proposal=Guide())
    independent = (found.diagnostics["joint_error"].square() + found.diagnostics["given_error"].square()).sqrt()
    assert (found.standard_error < 0.6 * independent).all()


def test_the_errors_are_the_spread_over_repetitions():
    known = truth(2, 4, scale=1.0)
    vae, x = vae_of(known, widen=1.5), known.marginal().sample((1,)).expand(400, 4).contiguous()
    found = conditional(vae, x, given=torch.tensor([True, False, False, False]), num_samples=500)
    spread = found.value.std().item()
    # The standard deviation of 400 normal draws is within 1 / sqrt(800) of the true one, relatively.
    assert abs(found.standard_error.mean().item() / spread - 1) < ERRORS / math.sqrt(800)


class Curved:
    """Two latents, a bent mean of three elements; p(x) and its parts by a grid."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2).double(), 1.2).to_event(1))

    def mean(self, z):
        return torch.stack([z[..., 0], z[..., 1] + z[..., 0].square(), (2 * z[..., 1]).sin()], dim=-1)

    def truth(self, x, mask):
        line = torch.linspace(-7, 7, 561).double()
        z = torch.cartesian_prod(line, line)
        log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + 2 * math.log(14 / 560)
        each = dist.Normal(self.mean(z), 0.5).log_prob(x.unsqueeze(1))
        whole, part = (each[..., m].sum(-1) + log_prior for m in (slice(None), mask))
        return whole.logsumexp(1) - part.logsumexp(1)


def test_values_agree_with_a_grid():
    pair, mask = Curved(), torch.tensor([False, True, False])
    x = pair.mean(torch.randn(8, 2).double()) + 0.5 * torch.randn(8, 3).double()
    expected = pair.truth(x, mask)
    found = conditional(pair, x, given=mask, num_samples=4000)
    assert ((found.value - expected).abs() < ERRORS * found.standard_error)[found.trusted].all()
    assert found.trusted.sum() >= 6
    by_grid = conditional(pair, x, given=mask, method=Quadrature(2500))
    # The error of a quadrature is its change when the points are halved.
    assert ((by_grid.value - expected).abs() <= by_grid.standard_error + 1e-6).all()
    annealed = conditional(pair, x, given=mask, method=AnnealedImportanceSampling(num_samples=8, num_temperatures=30))
    scores = ((annealed.value - expected) / annealed.standard_error)[annealed.trusted]
    assert (scores.abs() < ERRORS).all() and len(scores) >= 6


def test_the_chain_rule_holds():
    known = truth(2, 4, scale=1.0)
    vae, x = vae_of(known, widen=1.3), known.marginal().sample((40,))
    first, both = torch.tensor([True, False, False, False]), torch.tensor([True, True, True, False])
    last = conditional(vae, x, given=both)
    # p(x_2, x_3 | x_1) is that of a model which masks the last element.
    masked = MissingDataVAE(vae.prior, vae.likelihood, WideEncoder(4)).double()
    middle = log_conditional(masked.model, masked.guide, x, both.expand(40, 4), given=first, progress=False)
    alone = middle.diagnostics["log_given"], middle.diagnostics["given_error"]
    total = last.value + middle.value + alone[0]
    p_x = log_marginal(vae.model, vae.guide, x, progress=False)
    # A value and its condition come from the same draws: their errors add up at most.
    error = (last.standard_error.square() + (middle.standard_error + alone[1]).square() + p_x.standard_error**2).sqrt()
    assert ((total - p_x.value).abs() < ERRORS * error).all()
    assert ((total - known.marginal().log_prob(x)).abs() < ERRORS * error).all()


class WideEncoder(encoders.Encoder):
    """Draws from a normal distribution wider than any posterior, and keeps the masks that it sees."""

    def __init__(self, columns, latent_dim=2):
        nn.Module.__init__(self)
        self.latent_dim, self.x_shape, self.context_dim, self.seen = latent_dim, (2, columns), 0, []

    def forward(self, x, context=None):
        self.seen.append(x[:, 1].bool())
        return dist.Normal(torch.zeros(len(x), self.latent_dim, dtype=x.dtype), 1.1).to_event(1)


def test_missing_elements_are_in_neither_part_and_the_guide_runs_at_what_is_given():
    known = truth(2, 5, scale=1.0)
    likelihood = likelihoods.Normal(2, 5, AFFINE)
    set_likelihood(likelihood.double(), known.weight, known.bias, known.scale)
    vae = MissingDataVAE(priors.StandardNormal(2), likelihood, WideEncoder(5)).double()
    x, mask = known.marginal().sample((50,)), torch.rand(50, 5) < 0.7
    mask[:, 0] = True
    given = torch.tensor([True, True, False, False, True])
    p = known.marginal()
    expected = []
    for row, m in zip(x, mask, strict=True):
        densities = [
            dist.MultivariateNormal(p.mean[s], p.covariance_matrix[s][:, s]).log_prob(row[s]) for s in (m, m & given)
        ]
        expected.append(densities[0] - densities[1])
    for proposal in (None, Guide()):
        vae.encoder.seen.clear()
        found = conditional(vae, x, mask, given=given, proposal=proposal)
        assert_unit_scores(
            ((found.value - torch.stack(expected)) / found.standard_error)[mask[:, 2] | mask[:, 3]], FAILURE_RATE
        )
        assert any(seen.shape == mask.shape and (seen == (mask & given)).all() for seen in vae.encoder.seen)
    # A datum of which nothing is given keeps its mask for the encoder, which refuses an empty one.
    rows = given.expand(50, 5).clone()
    rows[3] = False
    found = conditional(vae, x, mask, given=rows)
    assert abs(found.value[3] - found.diagnostics["log_joint"][3]) < ERRORS * found.standard_error[3]


def test_blocks_of_a_table():
    blocks = [
        (likelihoods.Normal, 2),
        (lambda d, n: likelihoods.Categorical(d, n, num_classes=3), 1),
        (likelihoods.Bernoulli, 2),
    ]
    vae = VAE(priors.StandardNormal(1), likelihoods.Mixed(1, 5, blocks), encoders.DiagonalNormal(5, 1)).double()
    x = vae.sample(10).detach().double()
    z = torch.linspace(-9, 9, 2001).double().unsqueeze(-1)
    normal, classes, binary = (block.base_dist for block in vae.decode(z).blocks)
    each = torch.cat(
        [p.log_prob(x[:, None, s]) for p, s in ((normal, slice(2)), (classes, slice(2, 3)), (binary, slice(3, 5)))],
        dim=-1,
    )
    log_prior = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + math.log(18 / 2000)
    for given in ([True, False, False, False, True], [False, False, True, False, False]):
        found = conditional(vae, x, given=torch.tensor(given))
        expected = (each.sum(-1) + log_prior).logsumexp(1) - (
            each[..., torch.tensor(given)].sum(-1) + log_prior
        ).logsumexp(1)
        assert ((found.value - expected).abs() < ERRORS * found.standard_error + 1e-9).all()
        assert found.trusted.all()


class TwoSites:
    """x and y given z, both normal; y is one vector of dependent elements."""

    factor = torch.tensor([[1.0, 0.0], [0.8, 0.6]]).double()

    def model(self, x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample(
                "y", dist.MultivariateNormal(z.unsqueeze(-1).expand(*z.shape, 2), scale_tril=self.factor), obs=y
            )

    def guide(self, x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 1.0))

    def joint(self):
        noise = torch.block_diag(torch.ones(1, 1).double(), self.factor @ self.factor.T)
        return dist.MultivariateNormal(torch.zeros(3).double(), torch.ones(3, 3).double() + noise)


@pytest.mark.parametrize("given", ["y", ["y"], {"y": True, "x": False}, {"y": torch.ones(2).bool()}], ids=str)
def test_a_whole_site_may_be_given_whatever_its_distribution(given):
    pair = TwoSites()
    both = pair.joint().sample((100,))
    x, y = both[:, 0].contiguous(), both[:, 1:].contiguous()
    found = conditional(pair, x, y, given=given)
    p_y = dist.MultivariateNormal(torch.zeros(2).double(), pair.joint().covariance_matrix[1:, 1:])
    expected = pair.joint().log_prob(both) - p_y.log_prob(y)
    assert_unit_scores((found.value - expected) / found.standard_error, FAILURE_RATE)


def test_elements_may_lie_in_a_plate():
    known = truth(1, 3, scale=1.0)

    class Pair:
        def model(self, x):
            with pyro.plate("data", x.shape[1], dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
                with pyro.plate("elements", 3, dim=-2):
                    mean = known.weight * z.unsqueeze(-2) + known.bias.unsqueeze(-1) if z.dim() == 1 else None
                    mean = known.weight * z + known.bias.unsqueeze(-1) if mean is None else mean
                    pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", x.shape[1], dim=-1):
                pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))

    class ByRows(Pair):
        def model(self, x):
            super().model(x.T)

        def guide(self, x):
            super().guide(x.T)

    x, given = known.marginal().sample((60,)), torch.tensor([True, False, True])
    found = conditional(ByRows(), x, given=given)
    assert_unit_scores((found.value - exact(known, x, given)) / found.standard_error, FAILURE_RATE)


def test_discrete_latents_are_summed_over():
    likelihood = likelihoods.Bernoulli(1, 6, network=partial(OneHotInput, num_classes=4))
    vae = VAE(priors.Categorical(1, 4), likelihood, encoders.Categorical(6, 1, num_classes=4)).double()
    x, given = vae.sample(20).double(), torch.arange(6) < 2
    each = vae.decode(torch.arange(4).double().unsqueeze(-1)).base_dist.log_prob(x.unsqueeze(1))
    expected = each.sum(-1).logsumexp(1) - each[..., :2].sum(-1).logsumexp(1)  # the prior is uniform
    found = conditional(vae, x, given=given, method=Enumeration())
    assert torch.allclose(found.value, expected) and found.trusted.all()
    drawn = conditional(vae, x, given=given)
    assert not drawn.trusted.any() and "Take method=Enumeration()" in str(drawn)
    assert ((drawn.value - expected).abs() < ERRORS * drawn.standard_error).all()


def test_a_guide_too_narrow_for_a_small_part_is_not_trusted():
    known = truth(3, 20, scale=0.3)
    vae, x = vae_of(known), known.marginal().sample((40,))
    given = torch.arange(20) < 1
    narrow = conditional(vae, x, given=given, proposal=Guide())
    assert narrow.trusted.sum() <= 4
    assert "not to be trusted" in str(narrow) and "AnnealedImportanceSampling" in str(narrow)
    found = conditional(vae, x, given=given)
    assert found.trusted.all()
    assert str(found).startswith("log p(x_a | x_b) = ")
    assert_unit_scores((found.value - exact(known, x, given)) / found.standard_error, FAILURE_RATE)


def test_a_conditional_is_not_compared_with_a_marginal():
    known = truth(2, 3, scale=1.0)
    vae, x = vae_of(known, widen=1.3), known.marginal().sample((5,))
    found = conditional(vae, x, given=torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match=r"first estimates log p\(x_a \| x_b\) and second log p\(x\)"):
        compare(found, log_marginal(vae.model, vae.guide, x, progress=False))


class Autoregressive(Curved):
    """Each element's mean is the element before."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=-1)
            pyro.sample("x", dist.Normal(self.mean(z) + before, 0.5).to_event(1), obs=x)


class Regression(TwoSites):
    """The mean of x is that of y."""

    def model(self, x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            y = pyro.sample("y", dist.Normal(z.unsqueeze(-1), torch.ones(2).double()).to_event(1), obs=y)
            pyro.sample("x", dist.Normal(y.sum(-1), 1.0), obs=x)


class Computed(Curved):
    def model(self, x):
        super().model(2 * x)


def test_what_depends_on_the_rest_is_refused():
    x = torch.randn(5, 3).double()
    first, last = torch.arange(3) < 1, torch.arange(3) > 1
    with pytest.raises(ValueError, match='the density at site "x" depends on data that are not given'):
        conditional(Autoregressive(), x, given=last)
    with pytest.raises(ValueError, match='the density at site "x" depends on data that are not given'):
        conditional(Autoregressive(), x[:1], given=last)
    conditional(Autoregressive(), x, given=first)  # what comes first depends on nothing
    with pytest.raises(ValueError, match='the density at site "x" depends on data that are not given'):
        conditional(Regression(), x[:, 0], x[:, 1:], given="x")
    conditional(Regression(), x[:, 0], x[:, 1:], given="y")
    with pytest.raises(ValueError, match='values that site "x" observes are not one of the arguments'):
        conditional(Computed(), x, given=first)


def test_dependent_elements_are_refused():
    y = torch.randn(5, 2).double()
    with pytest.raises(ValueError, match='elements at site "y" are not independent given the latents .MultivariateN'):
        conditional(TwoSites(), y[:, 0], y, given={"y": torch.tensor([True, False])})

    class Counts:
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", distributions.Multinomial(x.sum(-1), z), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(ValueError, match="Multinomial"):
        conditional(Counts(), torch.ones(4, 3), given=torch.tensor([True, False, False]))


def test_bad_arguments_are_refused():
    known = truth(2, 3, scale=1.0)
    vae, x = vae_of(known), known.marginal().sample((5,))
    mask = torch.tensor([True, False, False])
    for given, message in [
        (torch.zeros(3).bool(), "given holds nothing"),
        (torch.ones(3).bool(), "given holds everything"),
        ("y", "given names the site 'y', but the model observes \"x\""),
        ("x", "given holds everything"),
        (torch.tensor([1, 0, 0]), 'given must be boolean for site "x"'),
        (mask[:2], r"given has shape \(2,\) for site \"x\", whose data have shape \(3,\)"),
        (mask.expand(4, 3), "given has 4 rows"),
        (mask.expand(6, 3), "given has 6 rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            conditional(vae, x, given=given)
    with pytest.raises(ValueError, match="given is one mask, but the model observes"):
        conditional(TwoSites(), x[:, 0], x[:, 1:], given=mask)
    with pytest.raises(ValueError, match="CUBO.* is an upper bound"):
        conditional(vae, x, given=mask, method=CUBO())
    with pytest.raises(ValueError, match="give them to Enumeration itself"):
        conditional(vae, x, given=mask, method=Enumeration(), num_samples=5)
    with pytest.raises(TypeError, match="proposal must be a proposal"):
        conditional(vae, x, given=mask, proposal=vae.guide)
    with pytest.raises(TypeError, match="method must be an estimator"):
        conditional(vae, x, given=mask, method=Guide())
