"""Discrete latents beside continuous ones: their values are summed over, and gradients move the others."""

import math
from itertools import product

import pyro
import pytest
import torch
from programs import TOPICS, lda, lda_truth
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

from pyrovae import log_marginal
from pyrovae.estimators import (
    Adapted,
    AnnealedImportanceSampling,
    Enumeration,
    Guide,
    ImportanceSampling,
    Laplace,
    Mixed,
    ParticleFilter,
    Prior,
    Quadrature,
    SequentialMonteCarlo,
    UntilTrusted,
    Widened,
    as_guide,
    bidirectional,
    log_conditional,
)

ROUNDING = 1e-6  # of sums of tens of terms in double precision, and of quadrature of smooth integrands
ERRORS = 5  # standard errors: one datum in a million by chance, were the weights' mean normal


def score(model, guide, x, method, **options):
    return log_marginal(model, guide, x, method=method, progress=False, **options)


class Mixture:
    """A sort y of three, z given y, and x = z W + b of the sort + noise: a mixture of three normal distributions."""

    def __init__(self, size=12, spread=3.0):
        self.probs = torch.tensor([0.2, 0.5, 0.3]).double()
        self.loc, self.scale = spread * torch.randn(3, 2).double(), 0.5 + torch.rand(3, 2).double()
        self.w, self.b = torch.randn(2, 4).double(), torch.randn(3, 4).double()
        self.x = self.marginal().sample((size,))

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(self.probs))
            z = pyro.sample("z", dist.Normal(self.loc[y], self.scale[y]).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w + self.b[y], 0.7).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(torch.ones(3).double()))
            pyro.sample("z", dist.Normal(torch.zeros(2).double(), 2.0).to_event(1))

    def without_class(self, x):
        """A guide for a model whose class is enumerated."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2).double(), 3.0).to_event(1))

    def marginal(self):
        covariance = self.w.T @ torch.diag_embed(self.scale.square()) @ self.w + 0.49 * torch.eye(4).double()
        parts = dist.MultivariateNormal(self.loc @ self.w + self.b, covariance)
        return dist.MixtureSameFamily(dist.Categorical(self.probs), parts)

    def truth(self):
        return self.marginal().log_prob(self.x)


def below(x):
    """The class depends on the real latent."""
    with pyro.plate("rows", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 1.0))
        y = pyro.sample("y", dist.Categorical(logits=torch.stack([z, -z, z.square()], dim=-1)))
        pyro.sample("x", dist.Normal((y - 1) * z.exp(), 0.5), obs=x)


def one_hot(x):
    """Classes as vectors, and heavy tails."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.OneHotCategorical(torch.tensor([0.3, 0.7]).double()))
        z = pyro.sample("z", dist.StudentT(5.0, torch.zeros(len(x)).double(), 1.0))
        pyro.sample("x", dist.Normal(y @ torch.tensor([1.0, -1.0]).double() + z**2, 0.7), obs=x)


def alone(x):
    """A model that draws cannot be scored at once for, because it counts the dimensions of its latents."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.3).double()))
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 1.0))
        assert z.dim() == y.dim() == 1
        pyro.sample("x", dist.Normal(z * (1 + y), 0.5), obs=x)


def several(x):
    """Three switches in a plate within each datum."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1).double(), 1.0))
        with pyro.plate("cells", 3, dim=-1):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor([0.2, 0.5, 0.6]).double()))
            pyro.sample("x", dist.Normal((2 * y - 1) * z, 0.5), obs=x)


VALUES = {
    below: {"y": torch.arange(3)},
    one_hot: {"y": torch.eye(2).double()},
    alone: {"y": torch.arange(2).double()},
    several: {"y": torch.tensor(list(product([0.0, 1.0], repeat=3))).double()},
}


def data_of(model):
    return torch.randn(6, 3).double() if model is several else 1.5 * torch.randn(6).double()


def by_conditions(model, x, points):
    """Returns log p(x), as a sum over the model conditioned on each combination of values."""
    parts = []
    for value in VALUES[model]["y"]:
        shape = (len(x), *value.shape) if value.dim() else (len(x),)
        given = poutine.condition(model, {"y": value.expand(shape)})
        parts.append(score(given, None, x, Quadrature(points)).value)
    return torch.stack(parts).logsumexp(0)


@pytest.mark.filterwarnings("ignore:samples are drawn one by one")  # of the model called alone
@pytest.mark.parametrize("model", VALUES)
def test_sum_is_that_over_the_model_given_each_value(model):
    x = data_of(model)[:2] if model is alone else data_of(model)
    points, num_samples = (101, 100) if model is alone else (40_000, 4000)  # one by one is slow
    truth = by_conditions(model, x, points)
    torch.testing.assert_close(score(model, None, x, Quadrature(points)).value, truth, rtol=0, atol=ROUNDING)
    guide = poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])
    found = score(model, guide, x, ImportanceSampling(num_samples, Laplace(degrees=4.0)))
    assert not found.khat.isnan().any()  # weights of a real latent alone tell
    assert ((found.value - truth)[found.trusted].abs() < ERRORS * found.standard_error[found.trusted]).all()
    assert found.trusted.any()


@pytest.mark.parametrize(
    "method",
    [
        ImportanceSampling(4000, Laplace()),
        AnnealedImportanceSampling(16, 60, start=Laplace()),
        UntilTrusted(),
    ],
)
def test_mixture_of_normal_distributions_is_scored_as_it_is(method):
    known = Mixture()
    found = score(known.model, known.guide, known.x, method)
    assert found.trusted.float().mean() > 0.8
    off = (found.value - known.truth())[found.trusted]
    assert (off.abs() < ERRORS * found.standard_error[found.trusted]).all()


def test_stages_of_both_kinds_of_latents_sum_and_say_so():
    known = Mixture()
    found = score(known.model, known.guide, known.x, UntilTrusted())
    assert "ImportanceSampling from Laplace" in str(found)
    assert found.trusted.all()


def test_compiled_scores_are_those_that_are_not():
    known = Mixture(size=4)
    values = []
    for compile in (False, True):
        pyro.set_rng_seed(3)
        values.append(score(known.model, known.guide, known.x, ImportanceSampling(500, Laplace()), compile=compile))
    torch.testing.assert_close(values[0].value, values[1].value, rtol=0, atol=ROUNDING)


def test_annealing_forwards_and_backwards_encloses_the_truth():
    known = Mixture()
    bracket = bidirectional(
        known.model, known.guide, known.x, method=AnnealedImportanceSampling(16, 100, start=Laplace()), progress=False
    )
    known.x = bracket.args[0]
    truth = known.truth()
    assert (bracket.lower.value < truth + ERRORS * bracket.lower.standard_error).all()
    assert (bracket.upper.value > truth - ERRORS * bracket.upper.standard_error).all()


def numbers_of_trials(x, total, with_z):
    """A number of successes is hidden, whose range belongs to the row."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Binomial(total, torch.tensor(0.4).double()))
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 1.0)) if with_z else 0.0
        pyro.sample("x", dist.Normal(y + z, 0.5), obs=x)


@pytest.mark.parametrize(("with_z", "method"), [(False, Enumeration()), (True, Quadrature())])
def test_values_that_differ_between_rows_are_refused(with_z, method):
    x = torch.tensor([1.0, 2.0, 4.5, 0.3]).double()
    same, other = torch.full((4,), 3.0).double(), torch.tensor([3.0, 3.0, 5.0, 3.0]).double()
    found = log_marginal(numbers_of_trials, None, x, same, with_z, method=method, progress=False)
    width = (0.25 + with_z) ** 0.5
    normal = dist.Normal(torch.arange(4).double(), width).log_prob(x.unsqueeze(-1))
    truth = (normal + dist.Binomial(3, torch.tensor(0.4).double()).log_prob(torch.arange(4).double())).logsumexp(-1)
    torch.testing.assert_close(found.value, truth, rtol=0, atol=ROUNDING)
    with pytest.raises(ValueError, match='the latents at site "y" can take are not the same for all data'):
        log_marginal(numbers_of_trials, None, x, other, with_z, method=method, progress=False)


def test_classes_that_are_masked_count_for_nothing():
    def model(x, labels):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=labels < 0):
                y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7]).double()))
            y = torch.where(labels < 0, y, labels)
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 1.0))
            pyro.sample("x", dist.Normal(y + z, 0.5), obs=x)

    x, labels = torch.randn(4).double(), torch.tensor([-1, 0, 1, -1])
    found = log_marginal(model, None, x, labels, method=Quadrature(), progress=False)
    each = dist.Normal(torch.arange(2).double(), 1.25**0.5).log_prob(x.unsqueeze(-1))
    unknown = (each + torch.tensor([0.3, 0.7]).double().log()).logsumexp(-1)
    truth = torch.where(labels < 0, unknown, each.gather(1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(found.value, truth, rtol=0, atol=ROUNDING)


def test_very_many_combinations_are_not_summed():
    def model(x, classes):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(classes).double()))
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 1.0))
            pyro.sample("x", dist.Normal(y + z, 0.5), obs=x)

    x = torch.randn(3).double()
    truth = dist.Normal(torch.arange(100).double(), 1.25**0.5).log_prob(x.unsqueeze(-1)).logsumexp(-1) - math.log(100)
    found = log_marginal(model, None, x, 100, method=Quadrature(), progress=False)  # eliminated
    torch.testing.assert_close(found.value, truth, rtol=0, atol=ROUNDING)
    with pytest.raises(ValueError, match="too many combinations of values to sum over"):
        log_marginal(model, None, x, 5000, method=Quadrature(), progress=False)


def assert_near(found, truth, taken):
    """Asserts that some of the estimates are near the truth, by the errors that they state."""
    assert taken.float().mean() > 0.6
    assert ((found.value - truth)[taken].abs() < ERRORS * found.standard_error[taken]).all()


@pytest.mark.parametrize(
    "method",
    [
        ImportanceSampling(10_000),
        ImportanceSampling(10_000, Prior()),
        ImportanceSampling(10_000, Mixed([Laplace(), Guide(), Prior()])),
        ImportanceSampling(2000, Adapted()),
        AnnealedImportanceSampling(16, 60),
        AnnealedImportanceSampling(16, 60, start=Guide()),
        SequentialMonteCarlo(8, 32),
        UntilTrusted(),
    ],
    ids=str,
)
@pytest.mark.parametrize("compile", [False, "auto"])
def test_classes_that_the_guide_lacks_are_summed(method, compile):
    known = Mixture(size=6, spread=0.5)
    found = score(config_enumerate(known.model), known.without_class, known.x, method, compile=compile)
    # Without a guide classes are drawn, and k-hat says nothing.
    assert_near(found, known.truth(), found.trusted | (found.ess > 100))


STEPS = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]]).double()


def chain(x, lengths=None):
    """A hidden Markov model as Pyro's users write it."""
    with pyro.plate("sequences", len(x), dim=-1):
        y = 0
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=True if lengths is None else t < lengths):
                y = pyro.sample(f"y{t}", dist.Categorical(STEPS[y]), infer={"enumerate": "parallel"})
                pyro.sample(f"x{t}", dist.Normal(2.0 * y, 1.0), obs=x[:, t])


def of_chain(x):
    """Its density, by Pyro's recursion over time."""
    normal = dist.Normal(2.0 * torch.arange(3).double(), 1.0)
    initial = torch.tensor([1.0, 0.0, 0.0]).double()  # a state before the first, which moves to it
    return dist.DiscreteHMM(initial.log(), STEPS.log(), normal).log_prob(x)


def nothing(x, lengths=None):
    pass


@pytest.mark.parametrize("size", [3, 40])  # all combinations, or one step after the other
@pytest.mark.parametrize("compile", [False, "auto"])
def test_a_chain_of_states_has_an_exact_sum(size, compile):
    x = 3 * torch.rand(5, size).double()
    found = log_marginal(chain, nothing, x, compile=compile, progress=False)
    assert (found.standard_error == 0).all() and found.trusted.all()
    torch.testing.assert_close(found.value, of_chain(x), rtol=0, atol=ROUNDING)


def test_steps_that_are_masked_count_for_nothing():
    x, lengths = 3 * torch.rand(4, 20).double(), torch.tensor([20, 1, 7, 12])
    found = log_marginal(chain, nothing, x, lengths, progress=False)
    truth = torch.stack([of_chain(row[:n]) for row, n in zip(x, lengths, strict=True)])
    torch.testing.assert_close(found.value, truth, rtol=0, atol=ROUNDING)


def test_enumeration_eliminates_what_a_guide_draws():
    def guide(x):
        with pyro.plate("sequences", len(x), dim=-1):
            for t in range(x.shape[1]):
                pyro.sample(f"y{t}", dist.Categorical(torch.ones(3).double()))

    x = 3 * torch.rand(4, 30).double()
    for method in (Enumeration(), UntilTrusted()):
        found = score(chain, guide, x, method)
        torch.testing.assert_close(found.value, of_chain(x), rtol=0, atol=ROUNDING)


def switches(x):
    """A switch for each of many numbers of a datum."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1).double(), 1.0))
        with pyro.plate("cells", x.shape[1], dim=-1):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.4).double()), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal((2 * y - 1) * z, 0.5), obs=x)


def test_many_switches_in_a_plate_are_eliminated():
    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1).double(), 1.5))

    x, z = torch.randn(6, 30).double(), torch.linspace(-8, 8, 8001).double()
    each = [math.log(p) + dist.Normal(sign * z, 0.5).log_prob(x.unsqueeze(-1)) for p, sign in ((0.4, 1), (0.6, -1))]
    log_f = torch.stack(each).logsumexp(0).sum(1) + dist.Normal(0.0, 1.0).log_prob(z)
    truth = log_f.logsumexp(-1) + math.log(16 / 8000)
    found = score(switches, guide, x, Quadrature(2001))
    torch.testing.assert_close(found.value, truth, rtol=0, atol=ROUNDING)
    found = score(switches, guide, x, UntilTrusted())
    torch.testing.assert_close(found.value, truth, rtol=0, atol=ROUNDING)
    assert found.trusted.all()


def growing(x):
    """A memory of all states before: every step depends on all of them."""
    with pyro.plate("sequences", len(x), dim=-1):
        memory = torch.zeros(len(x)).double()
        for t in range(x.shape[1]):
            y = pyro.sample(f"y{t}", dist.Bernoulli(torch.sigmoid(memory)), infer={"enumerate": "parallel"})
            memory = 0.5 * memory + y
            pyro.sample(f"x{t}", dist.Normal(memory, 1.0), obs=x[:, t])


def reversed_values(x):
    """A model that runs on all values at once, and then takes each for another."""
    with pyro.plate("data", len(x), dim=-2), pyro.plate("cells", x.shape[1], dim=-1):
        y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.4).double()), infer={"enumerate": "parallel"})
        y = 1 - y if y.shape[-1] == 1 else y
        pyro.sample("x", dist.Normal(y, 0.5), obs=x)


def by_hand(x):
    """A model that looks at single values."""
    with pyro.plate("data", len(x), dim=-2), pyro.plate("cells", x.shape[1], dim=-1):
        y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.4).double()), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(y.reshape(x.shape), 0.5), obs=x)


@pytest.mark.filterwarnings("ignore:samples are drawn one by one")
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (growing, r'"[xy]1[123]" depends on [0-9,]* combinations of them'),
        (reversed_values, "gives other log-probabilities where it runs on all of their values at once"),
        (by_hand, "does not run on all of their values at once"),
    ],
)
def test_models_without_elimination_are_refused(model, reason):
    with pytest.raises(ValueError, match=reason):
        log_marginal(model, nothing, torch.rand(4, 20).double(), progress=False)


def test_automatic_guides_without_the_class_are_scored():
    known = Mixture()
    model = config_enumerate(known.model)
    guide = AutoNormal(poutine.block(model, hide=["y"]))
    svi = SVI(model, guide, Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1))
    for _ in range(150):
        svi.step(known.x)
    found = score(model, guide, known.x, ImportanceSampling(5000))
    assert_near(found, known.truth(), found.trusted)
    elbo = -TraceEnum_ELBO(max_plate_nesting=1, num_particles=500, vectorize_particles=True).loss(model, guide, known.x)
    assert elbo < found.value.sum().item()


def test_what_draws_all_latents_refuses_those_that_the_guide_lacks():
    known = Mixture(size=4)
    model = config_enumerate(known.model)
    for method in (ParticleFilter(4, 8), Widened()):
        method = ImportanceSampling(10, method) if isinstance(method, Widened) else method
        with pytest.raises(ValueError, match='"y"'):
            score(model, known.without_class, known.x, method)
    given = torch.tensor([True, False, True, False])
    with pytest.raises(ValueError, match='log_conditional draws all latents, and the guide lacks "y"'):
        log_conditional(model, known.without_class, known.x, given=given, progress=False)
    with pytest.raises(ValueError, match='as_guide draws all latents, and the guide lacks "y"'):
        as_guide(model, known.without_class, known.x)
    with pytest.raises(ValueError, match='The guide misses the latent site "y".*sum over it, by infer='):
        score(known.model, known.without_class, known.x, ImportanceSampling(10))


def test_topics_of_words_are_eliminated_in_the_model_of_pyros_example():
    trained = lda()
    model = poutine.condition(trained.model, data=TOPICS)
    docs, guide = trained.data[0], trained.module.guide_of_documents
    truth = lda_truth(docs)
    found = score(model, guide, docs, Quadrature(4001))
    torch.testing.assert_close(found.value, truth, rtol=0, atol=ROUNDING)
    found = score(model, guide, docs, ImportanceSampling(1000, Laplace(degrees=4.0)))
    assert_near(found, truth, found.trusted)


class Switched:
    """A switch says which of two latents is seen: ridges that cross, with most of the mass near two points."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.4).double()))
            a = pyro.sample("a", dist.Normal(torch.tensor(2.0).double(), 1.0))
            b = pyro.sample("b", dist.Normal(torch.tensor(-1.0).double(), 2.0))
            pyro.sample("x", dist.Normal(torch.where(y > 0, a, b), 0.1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(torch.tensor(0.5).double()))
            pyro.sample("a", dist.Normal(torch.tensor(2.0).double(), 1.0))
            pyro.sample("b", dist.Normal(torch.tensor(-1.0).double(), 2.0))

    def truth(self, x):
        first = math.log(0.4) + dist.Normal(2.0, 1.01**0.5).log_prob(x)
        return torch.logaddexp(first, math.log(0.6) + dist.Normal(-1.0, 4.01**0.5).log_prob(x))


class Present:
    """An object is there or not: a narrow posterior, or that of the prior, which is wide."""

    def __init__(self, dim):
        self.dim = dim

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.5).double()))
            z = pyro.sample("z", dist.Normal(torch.zeros(self.dim).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(y.unsqueeze(-1) * z, 0.1).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(torch.tensor(0.5).double()))
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    def truth(self, x):
        each = [math.log(0.5) + dist.Normal(0.0, scale).log_prob(x).sum(-1) for scale in (0.1, 1.01**0.5)]
        return torch.stack(each).logsumexp(0)


@pytest.mark.parametrize(
    ("known", "x"),
    [
        (Switched(), torch.linspace(3.0, 5.0, 12).double()),
        (Present(1), torch.tensor([0.25, 0.3]).double().repeat(6).unsqueeze(-1)),
        (Present(3), torch.tensor([0.3, 0.1, 0.2]).double().repeat(12, 1)),
    ],
    ids=["switched", "present", "present, three dimensions"],
)
@pytest.mark.parametrize("method", [UntilTrusted(), ImportanceSampling(4000, Laplace()), Quadrature()], ids=str)
def test_each_class_has_its_modes_and_its_grid(known, x, method):
    found = score(known.model, known.guide, x, method)
    allowed = ERRORS * found.standard_error + ROUNDING
    assert found.trusted.float().mean() > 0.6
    assert ((found.value - known.truth(x)).abs() < allowed)[found.trusted].all()


MASKED = torch.tensor([True, False, True, False, True]).repeat(3)


def with_mask(x, mask, w=None):
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 0.3), obs=x)
        pyro.sample("w", dist.Normal(torch.zeros(len(x)).double(), 1.0), obs=x if w is None else w)


def masked_guide(x, mask, w=None):
    with pyro.plate("data", len(x)), poutine.mask(mask=mask):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 1.0))


def mask_inside(x, mask, w=None):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 1.0).mask(mask))


def unmasked_guide(x, mask, w=None):
    masked_guide(x, True)


@pytest.mark.parametrize(
    "method",
    [
        ImportanceSampling(2000),
        ImportanceSampling(2000, Laplace()),
        ImportanceSampling(2000, Adapted()),
        ImportanceSampling(2000, Mixed([Laplace(), Guide(), Prior()])),
        AnnealedImportanceSampling(16, 40),
        AnnealedImportanceSampling(16, 40, start=Guide()),
        AnnealedImportanceSampling(16, 40, start=Laplace()),
        UntilTrusted(),
    ],
    ids=str,
)
@pytest.mark.parametrize("guide", [masked_guide, mask_inside, unmasked_guide])
def test_latents_that_are_masked_for_some_data_count_for_nothing(method, guide):
    x = torch.linspace(-2, 2, 15).double()
    normal = dist.Normal(torch.zeros(15).double(), 1.09**0.5).log_prob(x)
    truth = torch.where(MASKED, normal, 0.0) + dist.Normal(torch.zeros(15).double(), 1.0).log_prob(x)
    found = log_marginal(with_mask, guide, x, MASKED, method=method, progress=False)
    assert found.trusted.all()
    assert ((found.value - truth).abs() < ERRORS * found.standard_error + ROUNDING).all()


def test_parts_of_masked_data_are_scored_given_others():
    x, w = torch.linspace(-2, 2, 15).double(), torch.randn(15).double()
    found = log_conditional(with_mask, unmasked_guide, x, MASKED, w, given="w", progress=False)
    truth = torch.where(MASKED, dist.Normal(torch.zeros(15).double(), 1.09**0.5).log_prob(x), 0.0)
    assert ((found.value - truth).abs() < ERRORS * found.standard_error + ROUNDING).all()


def test_a_grid_that_misses_a_ridge_is_not_trusted():
    def model(x):  # the switch summed out by hand, so that the grid is one for both ridges
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.tensor(0.0).double(), 1.0))
            b = pyro.sample("b", dist.Normal(torch.tensor(0.0).double(), 10.0))
            seen = dist.Normal(torch.stack([a, b], dim=-1), 0.1)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2).double()), seen), obs=x)

    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0]).double()
    each = [dist.Normal(0.0, (scale**2 + 0.01) ** 0.5).log_prob(x) - math.log(2) for scale in (1, 10)]
    truth = torch.stack(each).logsumexp(0)
    coarse, fine = (score(model, None, x, Quadrature(n)) for n in (1600, 1_000_000))
    assert ((coarse.value - truth).abs() > 0.3).any()
    assert ((coarse.value - truth).abs() < 0.1)[coarse.trusted].all()
    assert fine.trusted.all() and ((fine.value - truth).abs() < 0.02).all()


def test_sums_of_factors_that_disagree_do_not_underflow():
    logits = torch.tensor([[0.0, -1.6, -math.inf], [-math.inf, 0.0, -1.6], [-math.inf, -math.inf, 0.0]])

    def model(x):  # from left to right, with a step that fits the first state alone
        with pyro.plate("series", len(x)):
            y = torch.tensor(0)
            for t in pyro.markov(range(x.shape[1])):
                y = pyro.sample(f"y{t}", dist.Categorical(logits=logits[y]), infer={"enumerate": "parallel"})
                pyro.sample(f"x{t}", dist.Normal(1.0 * y, 0.1), obs=x[:, t])

    x = torch.linspace(0, 2, 20).round().expand(3, -1) + 0.1 * torch.randn(3, 20)
    x[1:, 15] = torch.tensor([0.0, -1.0])
    found = log_marginal(model, nothing, x, progress=False)
    x, steps, states = x.double(), dist.Categorical(logits=logits.double()).logits, torch.arange(3).double()
    forward = steps[0] + dist.Normal(states, 0.1).log_prob(x[:, :1])
    for t in range(1, 20):
        forward = (forward.unsqueeze(-1) + steps).logsumexp(1) + dist.Normal(states, 0.1).log_prob(x[:, t, None])
    truth = forward.logsumexp(-1)
    assert truth.min() < -150
    torch.testing.assert_close(found.value.double(), truth, rtol=1e-6, atol=0)


def test_a_class_that_many_cells_share_is_eliminated():
    mean, probs = torch.tensor([-2.0, 0.0, 2.5]).double(), torch.tensor([0.2, 0.5, 0.3]).double()

    def model(x):
        with pyro.plate("rows", len(x), dim=-2):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3).double()), infer={"enumerate": "parallel"})
            with pyro.plate("cells", x.shape[1], dim=-1):
                k = pyro.sample("k", dist.Categorical(probs), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(mean[k] + 3 * b, 0.7), obs=x)

    x = 3 * torch.randn(6, 20).double()
    found = log_marginal(model, nothing, x, progress=False)
    cells = [probs.log() + dist.Normal(mean + 3 * b, 0.7).log_prob(x.unsqueeze(-1)) for b in (0, 1)]
    each = [math.log(p) + cell.logsumexp(-1).sum(-1) for p, cell in zip((0.7, 0.3), cells, strict=True)]
    torch.testing.assert_close(found.value, torch.stack(each).logsumexp(0), rtol=0, atol=ROUNDING)


def test_a_series_in_a_plate_of_one_is_one_datum():
    def model(x):
        with pyro.plate("data", 1):
            y = torch.tensor(0)
            for t in pyro.markov(range(len(x))):
                y = pyro.sample(f"y{t}", dist.Categorical(STEPS[y]), infer={"enumerate": "parallel"})
                pyro.sample(f"x{t}", dist.Normal(2.0 * y, 1.0), obs=x[t])

    x = 3 * torch.rand(15).double()
    found = log_marginal(model, nothing, x, progress=False)
    torch.testing.assert_close(found.value, of_chain(x.unsqueeze(0)), rtol=0, atol=ROUNDING)


def test_sums_over_too_many_that_depend_on_each_other_are_refused(monkeypatch):
    monkeypatch.setattr("pyrovae.inference.elimination._MOST_NUMBERS", 100)
    with pytest.raises(ValueError, match="a sum over one of them has 144 numbers, since too many depend on each other"):
        log_marginal(chain, nothing, torch.rand(4, 20).double(), progress=False)


@pytest.mark.filterwarnings("ignore:model and guide have no plate")
def test_a_series_without_a_plate_is_one_datum():
    def model(x):
        y = torch.tensor(0)
        for t in pyro.markov(range(len(x))):
            y = pyro.sample(f"y{t}", dist.Categorical(STEPS[y]), infer={"enumerate": "parallel"})
            pyro.sample(f"x{t}", dist.Normal(2.0 * y, 1.0), obs=x[t])

    x = 3 * torch.rand(15).double()
    found = log_marginal(model, nothing, x, progress=False)
    torch.testing.assert_close(found.value, of_chain(x.unsqueeze(0)), rtol=0, atol=ROUNDING)
