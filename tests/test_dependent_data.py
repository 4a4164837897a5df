"""Data that depend on each other have no weights of their own: they are refused, and trained as a whole."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.distributions.util import sum_rightmost
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyrovae import bounds, fit, log_marginal, log_weights

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(12, 2)


def pair(couple, after=None):
    """A linear VAE whose means go through a function of all rows, and what follows the plate."""
    scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def model(x):
        pyro.param("scale", scale)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = couple(z * scale, x)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
            if after == "factor":
                pyro.factor("penalty", -0.1 * z.square().sum())
            elif after == "factor of a row":
                pyro.factor("penalty", -0.1 * z.square().sum(-1))
        if after == "observed":
            pyro.sample("middle", dist.Normal(z[..., 0].median(), 0.1), obs=x.new_ones(()))
        elif after == "given":
            pyro.sample("middle", dist.Normal(x.new_zeros(()), 0.1), obs=x.new_ones(()))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.4 * x, 0.8).to_event(1))

    return model, guide


def alone(loc: Tensor, x: Tensor) -> Tensor:
    return loc


DEPENDENT = {
    "neighbours": (pair(lambda loc, x: loc + loc.roll(1, -2)), "x"),
    "a mean": (pair(lambda loc, x: loc - loc.mean(-2, keepdim=True)), "x"),
    "a softmax": (pair(lambda loc, x: loc.softmax(-2)), "x"),
    "a distribution of rows": (pair(lambda loc, x: loc.cumsum(-2)), "x"),
    "one by one": (pair(lambda loc, x: loc.reshape(len(x), 2).flip(0)), "x"),
    "a factor": (pair(alone, "factor"), "penalty"),
}

INDEPENDENT = {
    "alone": pair(alone),
    "a softmax of a row": pair(lambda loc, x: loc.softmax(-1)),
    "one by one": pair(lambda loc, x: loc.reshape(len(x), 2)),
    "random numbers of its own": pair(lambda loc, x: loc + torch.rand_like(loc)),
    "BatchNorm": pair(lambda loc, x: NORM(loc.flatten(0, -2)).reshape(loc.shape)),
    "a factor of a row": pair(alone, "factor of a row"),
    "a value that all share": pair(alone, "given"),
}
NORM = nn.BatchNorm1d(2, affine=False).double()


@pytest.mark.filterwarnings("ignore:samples are drawn one by one")
@pytest.mark.parametrize("name", DEPENDENT)
def test_data_that_depend_on_each_other_are_refused_where_weights_per_datum_are_needed(name):
    (model, guide), site = DEPENDENT[name]
    message = f'"{site}" of the model depends on the latents of other data. .* bounds.ELBO'
    with pytest.raises(ValueError, match=message):
        log_weights(model, guide, X, num_samples=3)
    with pytest.raises(ValueError, match=message):
        log_marginal(model, guide, X, num_samples=3)
    with pytest.raises(ValueError, match=message):
        bounds.IWAE(2).loss(model, guide, X)


@pytest.mark.filterwarnings("ignore:samples are drawn one by one")
@pytest.mark.parametrize("name", INDEPENDENT)
def test_data_that_do_not_depend_on_each_other_are_scored(name):
    model, guide = INDEPENDENT[name]
    assert log_weights(model, guide, X, num_samples=3).shape == (3, len(X))
    assert log_marginal(model, guide, X, num_samples=3, max_memory=1.0).value.shape == (len(X),)


def test_an_observed_site_outside_of_the_plate_that_depends_on_latents_is_refused():
    """It would be left out, as what all data share is."""
    model, guide = pair(alone, "observed")
    for score in (log_weights, log_marginal):
        with pytest.raises(ValueError, match='"middle" of the model is outside of the plate "data", and depends on'):
            score(model, guide, X, num_samples=3)


def test_data_that_depend_on_each_other_late_are_refused():
    """Only rows after those that are looked at first."""
    model, guide = pair(lambda loc, x: loc + loc.roll(1, -2) * (x > 0.5))
    log_marginal(model, guide, X[:8], num_samples=3)
    with pytest.raises(ValueError, match="depends on the latents of other data"):
        log_marginal(model, guide, X, num_samples=3)


@pytest.mark.parametrize("name", [name for name in DEPENDENT if name not in ("a factor", "one by one")])
def test_dependent_data_are_trained_as_a_whole(name):
    (model, guide), _ = DEPENDENT[name]
    torch.manual_seed(0)
    log_p = bounds.ELBO(4000).terms(model, guide, X).bound.item() / len(X)

    # The same by hand.
    z = 0.4 * X + 0.8 * torch.randn(4000, *X.shape, dtype=torch.float64)
    seen = {}
    with pyro.poutine.trace() as tracer, pyro.plate("draws", 4000, dim=-2), pyro.condition(data={"z": z}):
        model(X)
    seen = tracer.trace.nodes
    terms = sum(seen[site]["fn"].log_prob(seen[site]["value"]) for site in ("z", "x"))
    log_q = sum_rightmost(dist.Normal(0.4 * X, 0.8).log_prob(z), 1)
    each = (terms - log_q).sum(-1) / len(X)
    error = (2 * each.var() / 4000).sqrt().item()
    assert log_p == pytest.approx(each.mean().item(), abs=5 * error)

    history = fit(model, guide, X, loss=Trace_ELBO(), epochs=1, batch_size=len(X), progress=False)
    assert len(history["loss"]) == 1


def test_a_model_that_reads_other_data_is_refused():
    """Values would change with the number of data that fit into memory."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + x.mean(0), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match='site "x" of the model depends on which other data are scored with it'):
        log_marginal(model, pair(alone)[1], X, num_samples=3)


def test_rows_that_depend_on_the_row_before_are_refused():
    """Each chunk would begin anew, as if the row before were zero."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            pyro.sample("x", dist.Normal(z + before, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match='site "x" of the model depends on which other data are scored with it'):
        log_marginal(model, pair(alone)[1], X, num_samples=3)


@pytest.mark.parametrize("name", [name for name in DEPENDENT if name != "a factor"])
def test_training_on_parts_of_dependent_data_warns(name):
    (model, guide), site = DEPENDENT[name]
    with pytest.warns(UserWarning, match=f'"{site}" is that of a batch as a whole, and not of its rows'):
        fit(model, guide, X, epochs=1, batch_size=6, progress=False)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_training_on_parts_of_other_data_does_not(name):
    model, guide = INDEPENDENT[name]
    fit(model, guide, X, epochs=1, batch_size=6, progress=False)


@pytest.mark.parametrize("couple", [lambda z: z, lambda z: z.cumsum(0)], ids=["rows", "steps"])
def test_without_plates_rows_are_told_from_steps(couple, recwarn):
    """A program with all of a batch in one event trains on parts as well as one with a plate, if its rows are data."""
    scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def model(x):
        pyro.param("scale", scale)
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(couple(z * scale), 1.0).to_event(2), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.4 * x, 0.8).to_event(2))

    fit(model, guide, X, loss=Trace_ELBO(), epochs=1, batch_size=6, progress=False)
    assert any("as a whole" in str(w.message) for w in recwarn) == bool(couple(torch.ones(2))[1] == 2)


def test_a_guide_may_read_other_data():
    """Any guide is a proposal: that of a datum may depend on other data."""
    model, _ = pair(alone)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.35 * x + 0.05 * x.mean(0), 0.8).to_event(1))

    estimate = log_marginal(model, guide, X, num_samples=2000, max_memory=1e4)
    truth = dist.Normal(0.0, (1 + 0.7**2) ** 0.5).log_prob(X).sum(-1)
    assert ((estimate.value - truth) / estimate.standard_error).abs().max() < 5
