"""Data drawn from a model in the place of the arguments that it observes, of which a site may observe a part."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import Tensor

from pyrovae.diagnostics import calibration
from pyrovae.estimators import AnnealedImportanceSampling, bidirectional
from pyrovae.inference.simulation import simulate
from pyrovae.inference.structure import inspect


def guide(x, *_):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))


def latent(x: Tensor) -> Tensor:
    return pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))


def steps(x):
    """A loop over time that observes a step of the argument at a time."""
    with pyro.plate("data", len(x)):
        z = latent(x)
        for t in range(x.shape[1]):
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5 + t), obs=x[:, t])


def flattened(x):
    """Pyro's tutorial: pictures are flattened where they are observed."""
    with pyro.plate("data", len(x)):
        z = latent(x)
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * x.new_ones(4), 0.7).to_event(1), obs=x.reshape(len(x), 4))


def columns(x):
    """A column is not observed, and stays."""
    with pyro.plate("data", len(x)):
        z = latent(x)
        pyro.sample("a", dist.Normal(z + x[:, 3], 0.5), obs=x[:, 0])
        pyro.sample("b", dist.Normal(z.unsqueeze(-1) * x.new_ones(2), 0.5).to_event(1), obs=x[:, 1:3])


DATA = torch.full((12, 4), 7.0, dtype=torch.float64)


def drawn_from(model, *args):
    structure = inspect(model, guide, *args)
    pyro.set_rng_seed(1)
    trace, args, _ = simulate(model, structure, *args)
    return trace, args


@pytest.mark.parametrize("data", [DATA, DATA.T.contiguous().T, torch.full((20, 6), 7.0).double()[4:16, 1:5]])
def test_parts_of_an_argument_are_replaced(data):
    trace, (x,) = drawn_from(steps, data)
    assert (data == 7).all(), "what was given stays as it is"
    assert torch.equal(x, torch.stack([trace.nodes[f"x_{t}"]["value"] for t in range(4)], dim=1))
    trace, (x,) = drawn_from(columns, data)
    expected = [trace.nodes["a"]["value"].unsqueeze(1), trace.nodes["b"]["value"], data[:, 3:]]
    assert torch.equal(x, torch.cat(expected, dim=1))


def test_a_view_of_all_of_an_argument_is_replaced():
    pictures = DATA.reshape(12, 2, 2)
    trace, (x,) = drawn_from(flattened, pictures)
    assert torch.equal(x, trace.nodes["x"]["value"].reshape(12, 2, 2))


def test_steps_are_calibrated():
    """The posterior is known: its guide is calibrated, and one that is too narrow is not."""
    precision = 1 + sum((0.5 + t) ** -2 for t in range(4))

    def posterior(width):
        def normal(x):
            mean = sum(x[:, t] * (0.5 + t) ** -2 for t in range(4)) / precision
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(mean, width * precision**-0.5))

        return normal

    pyro.set_rng_seed(0)
    right = calibration(steps, posterior(1.0), DATA, num_rounds=40, progress=False)
    narrow = calibration(steps, posterior(0.5), DATA, num_rounds=40, progress=False)
    assert right.adjusted_p_value.min() > 1e-3
    assert narrow.adjusted_p_value.min() < 1e-6


def test_values_that_all_data_share_are_kept():
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(latent(x), scale), obs=x)

    def whole_guide(x):
        pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
        guide(x)

    value = torch.tensor(0.5, dtype=torch.float64)
    pair = [pyro.condition(part, data={"scale": value}) for part in (model, whole_guide)]
    trace, _, _ = simulate(pair[0], inspect(*pair, DATA[:, 0]), DATA[:, 0])
    assert trace.nodes["scale"]["value"] is value
    calibration(*pair, DATA[:, 0], num_rounds=5, progress=False)


def test_a_model_that_reads_what_it_observes_is_refused():
    """Drawn data would not come from the model: what it reads is of the data before."""

    def reads_the_past(x):
        with pyro.plate("data", len(x)):
            z = latent(x)
            for t in range(1, x.shape[1]):
                pyro.sample(f"x_{t}", dist.Normal(z + x[:, t - 1], 1.0), obs=x[:, t])

    def reads_a_sum(x):
        with pyro.plate("data", len(x)):
            z = latent(x)
            pyro.sample("x", dist.Normal((z * x.sum(-1)).unsqueeze(-1) * x.new_ones(4), 1.0).to_event(1), obs=x)

    method = AnnealedImportanceSampling(4, 4)
    for model in (reads_the_past, reads_a_sum):
        with pytest.raises(ValueError, match="it reads data that it observes, so that site"):
            calibration(model, guide, DATA, num_rounds=5, progress=False)
        with pytest.raises(ValueError, match="it reads data that it observes, so that site"):
            bidirectional(model, guide, DATA, method=method, progress=False)

    def given_a_sum(x, total):
        with pyro.plate("data", len(x)):
            z = latent(x)
            pyro.sample("x", dist.Normal((z * total).unsqueeze(-1) * x.new_ones(4), 1.0).to_event(1), obs=x)

    calibration(given_a_sum, guide, DATA, DATA.sum(-1), num_rounds=5, progress=False)


def test_what_no_drawn_data_can_replace_is_refused():
    def twice(x):
        with pyro.plate("data", len(x)):
            z = latent(x)
            pyro.sample("a", dist.Normal(z, 1.0), obs=x[:, 0])
            pyro.sample("b", dist.Normal(z.unsqueeze(-1) * x.new_ones(4), 1.0).to_event(1), obs=x)

    def factor(x):
        with pyro.plate("data", len(x)):
            pyro.factor("a", dist.Normal(latent(x), 1.0).log_prob(x[:, 0]))

    for model, why in ((twice, "another site observes the same"), (factor, "the site is a factor")):
        with pytest.raises(ValueError, match=why):
            drawn_from(model, DATA)
