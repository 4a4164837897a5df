"""Several processes, real ones by torchrun over gloo: they are to end where one process does, also if one is killed."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from bound_cases import BOUNDS, BoundCase
from linear_gaussian import assert_unit_scores, diagonal_vae, gradients, truth, vae_of
from pyro import distributions as dist
from pyro.infer import Trace_ELBO
from test_storage import assert_same
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyrovae import VAE, History, bounds, fit, log_marginal
from pyrovae.cli import main
from pyrovae.compilation import graph
from pyrovae.data import dynamic_binarization
from pyrovae.distributed import World, init_process_group
from pyrovae.encoders import DiagonalNormal
from pyrovae.estimators import AnnealedImportanceSampling, Estimate, ImportanceSampling
from pyrovae.likelihoods import Bernoulli, Normal
from pyrovae.nn import MLP
from pyrovae.priors import StandardNormal

ROUNDING = {"rtol": 1e-10, "atol": 1e-10}  # of sums in another order, in double precision
SMALL = partial(MLP, hidden=(8,))
SIZE, WIDTH = 44, 5  # data, in batches of 16 and a last one of 12


# Processes that work together. Their functions run in this module, of which each process has its own.


def torchrun(*argv: Any, size: int = 2, restarts: int = 0) -> subprocess.CompletedProcess:
    """Runs a module in several processes of torchrun, whatever becomes of it."""
    options = ["--standalone", "--nproc-per-node", size, "--max-restarts", restarts, "-m", "--"]
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, (*options, *argv))]
    started = subprocess.Popen(
        command,
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed = started.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        started.terminate()  # killed, it would leave the processes that hang behind
        pytest.fail(f"{argv} hangs: {started.communicate()[1]}")
    return subprocess.CompletedProcess(command, started.returncode, *printed)


def in_processes(function: Callable[[Path], None], folder: Path, **options: int) -> None:
    """Runs a function of this module in several processes, which must end well."""
    ended = torchrun("test_distributed", function.__name__, folder, **options)
    assert ended.returncode == 0, ended.stderr


def data(size: int = SIZE, width: int = WIDTH) -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def normal_vae(encoder: Callable | nn.Module = SMALL, decoder: Callable = SMALL, context_dim: int = 0) -> VAE:
    likelihood = Normal(2, WIDTH, decoder, context_dim=context_dim)
    return VAE(StandardNormal(2), likelihood, DiagonalNormal(WIDTH, 2, encoder, context_dim=context_dim)).double()


def train(pair: Any, x: Any, **options: Any) -> dict[str, Any]:
    """Trains a model and guide; returns what must not depend on the number of processes."""
    options = {"epochs": 2, "batch_size": 16, "optimizer": partial(SGD, lr=0.02), "progress": False} | options
    history = fit(pair.model, pair.guide, x, **options)
    buffers = dict(pair.named_buffers()) if isinstance(pair, nn.Module) else {}
    return {
        "history": [{k: v for k, v in record.items() if k != "seconds"} for record in history.records],
        "weights": [p.detach().clone() for p in pyro.get_param_store()._params.values()],
        "buffers": [b.clone() for b in buffers.values()],
        "random": torch.get_rng_state(),
    }


class Pair:
    """A Pyro model and guide written by hand."""

    def __init__(self, model: Callable, guide: Callable = lambda *args: None):
        self.model, self.guide = model, guide


def subsampled() -> Pair:
    """A plate that stands for as many data as there are, of which it holds a batch."""
    network = nn.Linear(WIDTH, 2).double()

    def model(x):
        loc = pyro.param("loc", torch.zeros(WIDTH, dtype=torch.float64))
        with pyro.plate("data", SIZE, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(loc + z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("network", network)
        with pyro.plate("data", SIZE, subsample=x):
            loc, scale = network(x).unbind(-1)
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    return Pair(model, guide)


def discrete() -> Pair:
    """A mixture of two, and a guide without an rsample: its gradient is a score function's."""
    network = nn.Linear(WIDTH, 1).double()

    def model(x):
        loc = pyro.param("loc", torch.linspace(-1, 1, 2 * WIDTH, dtype=torch.float64).reshape(2, WIDTH))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.3, dtype=torch.float64)))
            pyro.sample("x", dist.Normal(loc[z.long()], 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=network(x).squeeze(-1)))

    return Pair(model, guide)


def labelled() -> Pair:
    """Two parameters of one shape, each used only where there are data of its kind."""

    def model(x, y):
        locs = [pyro.param(f"loc {kind}", torch.zeros(WIDTH, dtype=torch.float64)) for kind in range(2)]
        loc = torch.zeros_like(x)
        for kind in range(2):
            if bool((y == kind).any()):
                loc = loc + locs[kind] * (y == kind).unsqueeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return Pair(model, lambda x, y: None)


SCENARIOS: dict[str, Callable[[], Any]] = {}


def scenario(function: Callable[[], Any]) -> Callable[[], Any]:
    SCENARIOS[function.__name__.replace("_", " ")] = function
    return function


@scenario
def pyros_own_loss():
    return train(normal_vae(), data(), loss=Trace_ELBO())


@scenario
def elbo():
    return train(normal_vae(), data(), loss=bounds.ELBO(beta=bounds.Linear(5)))


@scenario
def particles_and_validation():
    return train(normal_vae(), data(), loss=bounds.IWAE(3), validation=data(7))


@scenario
def a_last_batch_that_cannot_be_halved():
    return train(normal_vae(), data(35))


@scenario
def a_last_batch_smaller_than_the_processes():
    return train(normal_vae(), data(33), validation=data(1))


@scenario
def all_data_in_a_batch():
    return train(normal_vae(), data(), batch_size=SIZE)


@scenario
def discrete_latents():
    return train(discrete(), data(), loss=Trace_ELBO())


@scenario
def dropout_in_both_networks():
    network = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.3), nn.Linear(8, 4))
    return train(normal_vae(network, lambda *shapes: nn.Sequential(nn.Dropout(0.3), MLP(*shapes))), data())


@scenario
def dropout_of_channels():
    network = nn.Sequential(
        nn.Unflatten(-1, (WIDTH, 1, 1)), nn.Conv2d(WIDTH, 6, 1), nn.Dropout2d(), nn.Flatten(1), nn.Linear(6, 4)
    )
    return train(normal_vae(network), data())


@scenario
def a_transform_that_draws():
    vae = VAE(StandardNormal(2), Bernoulli(2, WIDTH, SMALL), DiagonalNormal(WIDTH, 2, SMALL)).double()
    return train(vae, data().sigmoid(), transform=dynamic_binarization)


@scenario
def clipping():
    return train(normal_vae(), data(), clip_norm=0.1)


@scenario
def a_learning_rate_schedule():
    return train(normal_vae(), data(), scheduler=partial(StepLR, step_size=1, gamma=0.5), epochs=3)


@scenario
def a_plate_for_more_data():
    return train(subsampled(), data())


@scenario
def a_plate_for_the_data_of_a_batch():
    return train(subsampled(), data(), batch_size=SIZE)


@scenario
def pairs():
    return train(normal_vae(context_dim=3), (data(), data(width=3)))


@scenario
def a_loader():
    return train(normal_vae(), DataLoader(TensorDataset(data()), batch_size=16, shuffle=True))


@scenario
def patience():
    # Weights that overshoot: the validation loss soon rises.
    found = train(normal_vae(), data(), validation=data(9), patience=1, epochs=20, optimizer=partial(SGD, lr=0.2))
    assert 1 < len(found["history"]) < 20
    return found


@scenario
def a_callback_that_stops():
    found = train(normal_vae(), data(), epochs=9, callbacks=[lambda history: len(history) == 2])
    assert len(found["history"]) == 2
    return found


@scenario
def a_callback_that_draws():
    return train(normal_vae(), data(), epochs=3, callbacks=[lambda history: torch.randn(len(history)) is None])


@scenario
def a_callback_that_changes_weights():
    vae = normal_vae()

    def halve(history: History) -> None:
        with torch.no_grad():
            next(vae.encoder.parameters()).mul_(0.5)

    return train(vae, data(), callbacks=[halve])


@scenario
def different_weights():
    torch.manual_seed(rank())
    return train(normal_vae(), data())


@scenario
def different_frozen_weights():
    torch.manual_seed(rank())
    vae = normal_vae()
    vae.encoder.requires_grad_(False)
    found = train(vae, data())
    return found | {"weights": [p.detach() for p in vae.parameters()]}


@scenario
def weights_that_only_some_data_use():
    y = torch.arange(16) // 8  # the first process has those of kind 0, the second those of kind 1
    return train(labelled(), DataLoader(TensorDataset(data(16), y), batch_size=16))


@scenario
def batch_norm_with_the_same_statistics_for_all():
    """They are those of shares, not those of one process; but all are to go on with the same."""
    network = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    train(normal_vae(network), data())
    means = init_process_group().all_gather(network[1].running_mean)
    return {"spread": max((means[0] - mean).abs().max().item() for mean in means)}


@scenario
def numpys_order():
    """An order of the data that is not torch's, nor the same in all processes."""
    order = np.random.default_rng(rank())
    return train(normal_vae(), DataLoader(TensorDataset(data()), batch_size=11, sampler=Drawn(order)))


@scenario
def a_graph():
    with without_inductor():
        return train(normal_vae(), data(35), loss=bounds.IWAE(3), validation=data(7), compile=True, epochs=3)


@scenario
def a_graph_of_pyros_own_loss():
    with without_inductor():
        return train(normal_vae(), data(), compile=True)


@scenario
def a_loader_that_shares_out_itself():
    """Refused, or all data used once an epoch."""
    seen, vae = [], normal_vae()
    sampler = DistributedSampler(range(SIZE), init_process_group().size, init_process_group().rank, shuffle=False)

    def model(x):
        seen.extend(x.flatten().tolist())
        return vae.model(x)

    with contextlib.suppress(ValueError):
        train(Pair(model, vae.guide), DataLoader(TensorDataset(data()), batch_size=11, sampler=sampler), epochs=1)
        assert {*chain.from_iterable(init_process_group().all_gather(seen))} >= {*data().flatten().tolist()}
    return {}


@scenario
def data_outside_the_support():
    vae = VAE(StandardNormal(2), Bernoulli(2, WIDTH, SMALL), DiagonalNormal(WIDTH, 2, SMALL)).double()
    return train(vae, data())


@scenario
def a_callback_that_raises():
    def fail(history: History) -> None:
        raise KeyError("of the callback")

    return train(normal_vae(), data(), callbacks=[fail])


@scenario
def a_checkpoint_in_the_way():
    return train(normal_vae(), data(), checkpoint=__file__)


def rank() -> int:
    return init_process_group().rank


class Drawn:
    """A sampler of indices by a generator of NumPy's."""

    def __init__(self, order: np.random.Generator):
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.permutation(SIZE).tolist())

    def __len__(self) -> int:
        return SIZE


@contextlib.contextmanager
def without_inductor() -> Iterator[None]:
    """Runs graphs as they were traced."""
    compile_module, graph.compile_module = graph.compile_module, lambda module: module
    try:
        yield
    finally:
        graph.compile_module = compile_module


def run_scenarios(folder: Path) -> None:
    """Writes what each scenario came to in this process."""
    found = {}
    for name, function in SCENARIOS.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        found[name] = outcome(function)
    torch.save({"found": found, "estimates": estimates()}, folder / f"{rank()}.pt")


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes came to."""
    folder = tmp_path_factory.mktemp("scenarios")
    in_processes(run_scenarios, folder)
    return [torch.load(folder / f"{i}.pt") for i in range(2)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_end_where_one_does(name, ended):
    alone = outcome(SCENARIOS[name])
    first, second = (each["found"][name] for each in ended)
    if isinstance(alone, str):
        assert first == second == alone
    elif name == "numpys order":
        assert first == second and "gives different batches in different processes" in first
    else:
        assert not isinstance(first, str), first
        torch.testing.assert_close(first, alone, **ROUNDING)
        assert_same(first, second)


# log p(x), the data shared out.


def estimates() -> dict[str, Any]:
    """Returns estimates of log p(x) and the random state that they leave behind; a failure by its message."""
    torch.manual_seed(0)
    known = truth(2, 3)
    vae = vae_of(known, widen=1.5)
    x = known.marginal().sample((7,))

    class Mine(ImportanceSampling):
        """An estimator that cannot be pickled, being made inside a function."""

    torch.manual_seed(rank())
    return {
        "odd": _plain(log_marginal(vae.model, vae.guide, x, num_samples=400, progress=False)),
        "one": _plain(log_marginal(vae.model, vae.guide, x[:1], num_samples=400, progress=False)),
        "alike": _plain(log_marginal(vae.model, vae.guide, x[:1].expand(6, -1), num_samples=400, progress=False)),
        "annealed": _plain(
            log_marginal(
                vae.model,
                vae.guide,
                x,
                method=AnnealedImportanceSampling(num_samples=16, num_temperatures=20),
                progress=False,
            )
        ),
        "local": outcome(lambda: _plain(log_marginal(vae.model, vae.guide, x, method=Mine(400), progress=False))),
        "truth": known.marginal().log_prob(x),
    }


def _plain(estimate: Estimate) -> dict[str, Tensor]:
    tensors = {name: value for name, value in vars(estimate).items() if isinstance(value, Tensor)}
    return tensors | estimate.diagnostics | {"trusted": estimate.trusted}


def scores(estimate: dict[str, Tensor], exact: Tensor) -> Tensor:
    return (estimate["value"] - exact) / estimate["standard_error"]


@pytest.mark.parametrize("name", ["odd", "annealed", "local"])
def test_estimates_of_all_data_come_in_order_to_all(name, ended):
    first, second = (each["estimates"] for each in ended)
    assert not isinstance(first[name], str), first[name]
    assert_same(first[name], second[name])
    assert_unit_scores(scores(first[name], first["truth"]), failure_rate=1e-6)
    assert scores(first[name], first["truth"].roll(1)).square().sum() > 100  # another order would not pass


def test_there_may_be_fewer_data_than_processes(ended):
    first, second = (each["estimates"] for each in ended)
    assert_same(first["one"], second["one"])
    assert_unit_scores(scores(first["one"], first["truth"][:1]), failure_rate=1e-6)


def test_shares_of_an_estimate_have_noise_of_their_own(ended):
    values = ended[0]["estimates"]["alike"]["value"]
    assert len(values.unique()) == len(values)


# Noise of a shard.

DRAWS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "randn": torch.randn,
    "rand": torch.rand,
    "randint": lambda shape: torch.randint(1000, shape),
    "randn_like": lambda shape: torch.randn_like(torch.empty(shape)),
    "rand_like": lambda shape: torch.rand_like(torch.empty(shape)),
    "randint_like": lambda shape: torch.randint_like(torch.empty(shape), 1000),
    "randn of out": lambda shape: torch.randn(shape, out=torch.empty(shape)),
    "normal_": lambda shape: torch.empty(shape).normal_(),
    "uniform_": lambda shape: torch.empty(shape).uniform_(),
    "exponential_": lambda shape: torch.empty(shape).exponential_(),
    "cauchy_": lambda shape: torch.empty(shape).cauchy_(),
    "log_normal_": lambda shape: torch.empty(shape).log_normal_(),
    "geometric_": lambda shape: torch.empty(shape).geometric_(0.1),
    "bernoulli_": lambda shape: torch.empty(shape).bernoulli_(0.4),
    "bernoulli_ of probabilities": lambda shape: torch.empty(shape).bernoulli_(torch.full(shape, 0.4)),
    "bernoulli": lambda shape: torch.bernoulli(torch.full(shape, 0.4)),
    "normal": lambda shape: torch.normal(torch.zeros(shape), torch.ones(shape)),
    "normal of one scale": lambda shape: torch.normal(torch.zeros(shape), 2.0),
    "dropout": lambda shape: dropout(torch.ones(shape), 0.4),
    "Normal": lambda shape: dist.Normal(torch.zeros(shape), 1.0).rsample(),
    "Normal, expanded": lambda shape: dist.Normal(torch.zeros(shape[-1:]), 1.0).expand(shape).rsample(),
    "Laplace": lambda shape: dist.Laplace(torch.zeros(shape), 1.0).rsample(),
    "Bernoulli": lambda shape: dist.Bernoulli(torch.full(shape, 0.4)).sample(),
    "Categorical": lambda shape: dist.Categorical(torch.ones(*shape, 5)).sample(),
}
# The place of the data, and the shape of noise for so many of them.
LAYOUTS: dict[str, tuple[int, Callable[[int], tuple[int, ...]]]] = {
    "data": (0, lambda n: (n,)),
    "particles": (1, lambda n: (6, n)),
    "vectors": (0, lambda n: (n, 13)),
    "as many dimensions as data of a share": (0, lambda n: (n, 4)),
    "images": (0, lambda n: (n, 3, 11, 13)),
    "particles of vectors": (1, lambda n: (6, n, 13)),
    "as many particles as data of a share": (1, lambda n: (4, n, 13)),
    "particles of particles": (2, lambda n: (2, 6, n, 13)),
}


def shared(function: Callable[[int], Tensor], total: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what a function of the number of data gives to each process, and the random states that it leaves."""
    found, states = [], []
    for shard in (World(i, size).share(total) for i in range(size)):
        torch.manual_seed(3)
        with shard.noise():
            found.append(function(shard.count))
        states.append(torch.get_rng_state())
    return found, states


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DRAWS)
def test_shares_of_noise_are_put_together_what_one_process_draws(name, layout):
    place, shape = LAYOUTS[layout]
    if name == "Categorical" and place != len(shape(1)) - 1:
        pytest.skip("torch draws it with all batch dimensions in one, where the data are not told from the others")
    for total, size in ((8, 2), (7, 2), (10, 3)):
        found, states = shared(lambda n: DRAWS[name](shape(n)), total, size)
        torch.manual_seed(3)
        whole = DRAWS[name](shape(total))
        assert_same(torch.cat(found, place), whole)
        for state in states:
            assert state.equal(torch.get_rng_state())


def test_particles_and_data_may_be_in_one_dimension():
    for total, size in ((8, 2), (7, 2), (10, 3)):
        found, states = shared(lambda n: torch.randn(3 * n, 13), total, size)
        torch.manual_seed(3)
        whole = torch.randn(3 * total, 13)
        assert_same(torch.cat([x.unflatten(0, (3, -1)) for x in found], 1), whole.unflatten(0, (3, -1)))
        for state in states:
            assert state.equal(torch.get_rng_state())


def test_noise_that_is_not_of_data_is_the_same_for_all():
    (first, second), (state, other) = shared(lambda n: torch.randn(5, 13), 12, 2)
    assert_same(first, second)
    assert state.equal(other)


# What is drawn by rejection, which takes more or fewer numbers by what they are, or where the data cannot be told from
# another dimension, is right in distribution: the cumulative probabilities of such draws for so many data.
OTHERS: dict[str, Callable[[int], np.ndarray]] = {
    "Gamma": lambda n: scipy.stats.gamma(0.7).cdf(dist.Gamma(torch.full((n, 50), 0.7), 1.0).rsample()),
    "Beta": lambda n: scipy.stats.beta(0.7, 2).cdf(dist.Beta(torch.full((n, 50), 0.7), 2.0).rsample()),
    "Dirichlet": lambda n: scipy.stats.beta(0.7, 1.4).cdf(
        dist.Dirichlet(torch.full((n, 50, 3), 0.7)).rsample()[..., 0]
    ),
    "two dimensions of the data's size": lambda n: scipy.stats.norm.cdf(torch.randn(n, 3, n, 2)),
    "one that is a multiple of it": lambda n: scipy.stats.norm.cdf(torch.randn(3, 2 * n, 2)),
    "flattened": lambda n: scipy.stats.norm.cdf(torch.randn(n * 50)),
}


@pytest.mark.parametrize("total", [400, 401])
@pytest.mark.parametrize("name", OTHERS)
def test_other_noise_is_right_in_distribution_and_independent(name, total):
    (first, second), _ = shared(lambda n: torch.as_tensor(OTHERS[name](n)), total, 2)
    for found, n in ((first, total // 2), (second, total - total // 2)):
        assert found.shape == torch.as_tensor(OTHERS[name](n)).shape
        assert scipy.stats.kstest(found.flatten(), "uniform").pvalue > 1e-6
    length = min(first.numel(), second.numel())
    assert scipy.stats.spearmanr(first.flatten()[:length], second.flatten()[:length]).pvalue > 1e-6


def test_noise_that_is_not_of_data_keeps_its_shape():
    """Weights of a Bayesian network, of which one dimension is that of a batch."""
    found, _ = shared(lambda n: torch.randn(400, 128), 128, 2)
    assert [x.shape for x in found] == 2 * [(400, 128)]


def test_there_may_be_as_many_categories_as_data_of_a_share():
    for total in (7, 8):
        found, _ = shared(lambda n: dist.Categorical(torch.ones(6, n, total // 2)).sample(), total, 2)
        assert [x.shape[0] for x in found] == [6, 6]
        assert max(x.max() for x in found) < total // 2


def test_a_simplex_may_have_as_many_corners_as_there_are_data_of_a_share():
    found, _ = shared(lambda n: dist.Dirichlet(torch.ones(2, 4)).sample(), 8, 2)
    for x in found:
        torch.testing.assert_close(x.sum(-1), torch.ones(2))


def test_random_slopes_have_their_gradient():
    def slopes(n: int) -> Tensor:
        x = torch.full((n, 13), -2.0, requires_grad=True)
        y = nn.RReLU()(x + 0)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        return torch.stack([gradient, y.detach() / -2], 1)

    found, _ = shared(slopes, 8, 2)
    for gradient, slope in (x.unbind(1) for x in found):
        torch.testing.assert_close(gradient, slope)
        assert ((gradient > 1 / 8) & (gradient < 1 / 3)).all() and gradient.std() > 0


def test_order_is_of_the_data_of_a_share():
    """What permutes the data that a model is given must hold their indices."""
    found, _ = shared(torch.randperm, 8, 2)
    for order in found:
        assert order.sort().values.tolist() == [0, 1, 2, 3]


def test_attention_without_dropout_is_no_noise():
    """Its kernel may draw, says torch; widened by mistake along the sequence, it would weigh some elements twice."""
    x = torch.randn(8, 2, 4, 6)
    wanted = scaled_dot_product_attention(x, x, x)
    for shard in (World(i, 2).share(8) for i in range(2)):
        ((mine,), _) = shard.rows((x,), {})
        with shard.noise():
            found = scaled_dot_product_attention(mine, mine, mine)
        torch.testing.assert_close(found, shard.rows((wanted,), {})[0][0])


def loss_and_gradient(bound: Any, vae: VAE, x: Tensor) -> Tensor:
    loss = bound.differentiable_loss(vae.model, vae.guide, x)
    return torch.cat([loss.detach().reshape(1), gradients(loss, vae)])


LOSSES = [*BOUNDS, BoundCase("Trace_ELBO", lambda k: Trace_ELBO(k, vectorize_particles=True, max_plate_nesting=1))]


@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
def test_every_loss_is_the_sum_of_those_of_shares(case):
    vae, x = diagonal_vae(2, WIDTH), data(7)
    for size in (2, 3):
        torch.manual_seed(3)
        wanted = loss_and_gradient(case.build(6), vae, x)
        found = 0.0
        for shard in (World(i, size).share(len(x)) for i in range(size)):
            torch.manual_seed(3)
            with shard.noise():
                found = found + loss_and_gradient(case.build(6), vae, *shard.rows((x,), {})[0])
        torch.testing.assert_close(found, wanted, **ROUNDING)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 16])
def test_shares_are_all_data_once(total, size):
    shares = [World(i, size).share(total) for i in range(size)]
    assert math.isclose(sum(shard.weight for shard in shares), 1.0)
    rows = [shard.rows((torch.arange(total),), {})[0][0].tolist() for shard in shares]
    if total < size:  # all have all
        assert rows == size * [[*range(total)]]
    else:
        assert [*chain.from_iterable(rows)] == [*range(total)]
        assert all(math.isclose(shard.weight, shard.count / total) and shard.count for shard in shares)


# Processes that are killed, or fail.


class Recorded:
    """A callback that notes the life and the epoch, and leaves time for a checkpoint to be written."""

    def __init__(self, folder: Path):
        self.file, self.life = folder / "epochs", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def __call__(self, history: History) -> None:
        with open(self.file, "a") as file:
            file.write(f"{self.life} {len(history)}\n")
        time.sleep(0.3)


def train_with_checkpoint(folder: Path, killed: bool = False, epochs: int = 5) -> dict[str, Any]:
    """Trains and goes on from a checkpoint; in its first life the second process kills itself amid the fourth epoch."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = normal_vae(nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.3), nn.Linear(8, 4)))

    def model(x):
        if killed and vae.training and (folder / "epochs").exists() and torch.is_grad_enabled():
            done = (folder / "epochs").read_text().split("\n")[:-1]
            if rank() == 1 and done[-1] == "0 3" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
        return vae.model(x)

    return train(
        Pair(model, vae.guide),
        data(35),
        loss=bounds.ELBO(beta=bounds.Linear(12)),
        epochs=epochs,
        validation=data(7),
        callbacks=[Recorded(folder)] if killed else [],
        checkpoint=folder / "checkpoint",
        resume=True,
    )


def train_and_be_killed(folder: Path) -> None:
    torch.save(train_with_checkpoint(folder, killed=True), folder / f"{rank()}.pt")


def go_on_for_two_epochs(folder: Path) -> None:
    torch.save(train_with_checkpoint(folder, epochs=7), folder / f"{rank()}.pt")


@pytest.fixture(scope="module")
def survived(tmp_path_factory) -> Path:
    """Where processes of which one was killed wrote their checkpoint and what they came to."""
    folder = tmp_path_factory.mktemp("survived")
    in_processes(train_and_be_killed, folder, restarts=1)
    return folder


def test_a_run_goes_on_after_a_process_was_killed_and_ends_as_if_none_had_been(survived, tmp_path):
    lives = [line.split() for line in (survived / "epochs").read_text().splitlines()]
    assert [epoch for life, epoch in lives if life == "0"] == ["1", "2", "3"]
    again = [int(epoch) for life, epoch in lives if life == "1"]
    assert 1 < again[0] <= 4 and again == [*range(again[0], 6)]  # from a checkpoint, not from the start
    first, second = (torch.load(survived / f"{i}.pt") for i in range(2))
    assert_same(first, second)
    torch.testing.assert_close(first, train_with_checkpoint(tmp_path), **ROUNDING)


def test_one_process_goes_on_from_the_checkpoint_of_two(survived, tmp_path):
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed" / "checkpoint").write_bytes((survived / "checkpoint").read_bytes())
    found = train_with_checkpoint(tmp_path / "resumed", epochs=7)
    torch.testing.assert_close(found, train_with_checkpoint(tmp_path / "whole", epochs=7), **ROUNDING)


@pytest.mark.slow
def test_three_processes_go_on_from_the_checkpoint_of_two(survived, tmp_path):
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed" / "checkpoint").write_bytes((survived / "checkpoint").read_bytes())
    in_processes(go_on_for_two_epochs, tmp_path / "resumed", size=3)
    whole = train_with_checkpoint(tmp_path / "whole", epochs=7)
    for i in range(3):
        torch.testing.assert_close(torch.load(tmp_path / "resumed" / f"{i}.pt"), whole, **ROUNDING)


def fail_in_one_process(folder: Path) -> None:
    vae = normal_vae()
    rows = iter(range(1000))

    def model(x):
        if rank() == 1 and next(rows) == 8:
            (folder / "failed").write_text(str(time.time()))
            x = x * math.nan
        return vae.model(x)

    train(Pair(model, vae.guide), data(), epochs=50)


def test_an_error_in_one_process_ends_all_within_seconds(tmp_path):
    ended = torchrun("test_distributed", "fail_in_one_process", tmp_path)
    assert time.time() - float((tmp_path / "failed").read_text()) < 30
    assert ended.returncode != 0
    assert 'The data at site "x" is outside the support of Normal' in ended.stderr


def score_in_a_callback(folder: Path) -> None:
    vae = normal_vae()

    def score(history: History) -> None:
        estimate = log_marginal(vae.model, vae.guide, data(7), num_samples=50, progress=False)
        history.records[-1]["test"] = estimate.value.mean().item()

    found = train(vae, data(), callbacks=[score])
    if rank() == 0:
        torch.save(found, folder / "0.pt")


@pytest.mark.slow
def test_a_callback_may_score(tmp_path):
    """It runs in the first process alone."""
    in_processes(score_in_a_callback, tmp_path)
    found = torch.load(tmp_path / "0.pt")
    assert all(math.isfinite(record["test"]) for record in found["history"])


def compile_for_real(folder: Path) -> None:
    pyro.set_rng_seed(0)
    torch.save(train(normal_vae(), data(), loss=bounds.IWAE(3), compile=True), folder / f"{rank()}.pt")


@pytest.mark.slow
def test_two_processes_with_graphs_by_inductor_end_where_one_does_without(tmp_path):
    in_processes(compile_for_real, tmp_path)
    pyro.set_rng_seed(0)
    alone = train(normal_vae(), data(), loss=bounds.IWAE(3))
    for i in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{i}.pt"), alone, **ROUNDING)


# The command line.

SHORT = ["--epochs", "3", "--num-samples", "50"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path, str]:
    """The run directories of two processes and of one, and what the two printed."""
    folder = tmp_path_factory.mktemp("runs")
    ended = torchrun("pyrovae", "train", "--run", folder / "two", *SHORT)
    assert ended.returncode == 0, ended.stderr
    main(["train", "--run", str(folder / "one"), *SHORT])
    return folder / "two", folder / "one", ended.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(run: Path, other: Path) -> None:
    """Asserts that two runs have the same losses, in single precision, and a test log p(x) within standard errors."""
    (*epochs, result), (*others, beside) = metrics(run), metrics(other)
    assert [{**record, "seconds": 0} for record in epochs] == [
        pytest.approx({**record, "seconds": 0}, rel=1e-4) for record in others
    ]
    error = math.hypot(result["standard_error"], beside["standard_error"])
    assert abs(result["log_marginal"] - beside["log_marginal"]) < 5 * error


@pytest.mark.slow
def test_two_processes_train_one_run(runs):
    two, one, printed = runs
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    assert (two / "config.yaml").read_text() == (one / "config.yaml").read_text()
    assert_same_training(two, one)
    for line in ("run directory:", "test: log p(x)", "preprocessing:"):
        assert printed.count(line) == 1


@pytest.mark.slow
def test_two_processes_evaluate_data_in_order(runs, tmp_path):
    two = runs[0]
    argv = ["evaluate", str(two), "--num-data", "21", "--num-samples", "2000", "--output"]
    ended = torchrun("pyrovae", *argv, tmp_path / "two.csv")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("test: log p(x)") == 1
    main([*argv, str(tmp_path / "one.csv")])
    found, alone = (np.genfromtxt(tmp_path / name, delimiter=",", names=True) for name in ("two.csv", "one.csv"))
    assert found["datum"].tolist() == [*range(21)]
    error = np.hypot(found["standard_error"], alone["standard_error"])
    assert_unit_scores(torch.as_tensor((found["value"] - alone["value"]) / error), failure_rate=1e-6)


def train_and_be_killed_in_the_command(folder: Path) -> None:
    """Trains by the command line; in its first life the second process is killed amid the third epoch."""
    if rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        metrics_file, step = folder / "run" / "metrics.jsonl", SGD.step

        def die(*args: Any, **kwargs: Any) -> Any:
            if metrics_file.exists() and len(metrics_file.read_text().splitlines()) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        SGD.step = die
    main(["train", "--run", str(folder / "run"), *SHORT, "--optimizer", "SGD", "--optimizer.lr", "0.001"])


@pytest.mark.slow
def test_the_command_goes_on_after_a_process_was_killed(tmp_path):
    in_processes(train_and_be_killed_in_the_command, tmp_path, restarts=1)
    main(["train", "--run", str(tmp_path / "one"), *SHORT, "--optimizer", "SGD", "--optimizer.lr", "0.001"])
    assert_same_training(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
def test_a_command_that_is_not_for_several_processes_runs_in_the_first(runs, tmp_path):
    argv = ["--num-data", "30", "--nuts-samples", "0", "--output", tmp_path / "looks"]
    ended = torchrun("pyrovae", "diagnose", runs[0], *argv)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("== in short") == 1


@pytest.mark.slow
def test_the_command_refuses_bad_input_in_all_processes(tmp_path):
    ended = torchrun("pyrovae", "train", "--run", tmp_path / "run", "--num-samples", "0")
    assert ended.returncode != 0
    assert "pyrovae: error: num_samples must be at least 1, got 0." in ended.stderr
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
