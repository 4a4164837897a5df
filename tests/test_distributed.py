"""Several processes, started by torchrun over gloo, end with the same result as one, even if one of them is killed."""

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
import torch
from helpers import assert_same
from linear_gaussian import assert_unit_scores, truth, vae_of
from pyro import distributions as dist
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyrovae import VAE, History, bounds, fit, log_marginal
from pyrovae.cli import main
from pyrovae.compilation import tracing
from pyrovae.data import dynamic_binarization
from pyrovae.distributed import GradientSum, init_process_group
from pyrovae.encoders import DiagonalNormal
from pyrovae.estimators import AnnealedImportanceSampling, Estimate, ImportanceSampling
from pyrovae.likelihoods import Bernoulli, Normal
from pyrovae.nn import MLP
from pyrovae.priors import StandardNormal
from pyrovae.training.trainer import Trainer

ROUNDING = {"rtol": 1e-10, "atol": 1e-10}  # of sums in another order, in double precision
SMALL = partial(MLP, hidden=(8,))
SIZE, WIDTH = 44, 5  # data, in batches of 16 and a last one of 12


# Processes that work together. Each imports this module and runs one of its functions.


def torchrun(*argv: Any, size: int = 2, restarts: int = 0) -> subprocess.CompletedProcess:
    """Runs a module in several processes by torchrun; it may fail."""
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
        started.terminate()  # a kill would leave its child processes
        pytest.fail(f"{argv} hangs: {started.communicate()[1]}")
    return subprocess.CompletedProcess(command, started.returncode, *printed)


def in_processes(function: Callable[[Path], None], folder: Path, **options: int) -> None:
    """Runs a function of this module in several processes, which must succeed."""
    ended = torchrun("test_distributed", function.__name__, folder, **options)
    assert ended.returncode == 0, ended.stderr


def data(size: int = SIZE, width: int = WIDTH) -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def normal_vae(encoder: Callable | nn.Module = SMALL, decoder: Callable = SMALL, context_dim: int = 0) -> VAE:
    likelihood = Normal(2, WIDTH, decoder, context_dim=context_dim)
    return VAE(StandardNormal(2), likelihood, DiagonalNormal(WIDTH, 2, encoder, context_dim=context_dim)).double()


def train(pair: Any, x: Any, **options: Any) -> dict[str, Any]:
    """Trains a model and guide; returns everything that must not depend on the number of processes."""
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
    """A plate for all data that holds a batch of them."""
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
def micro_batches():
    return train(normal_vae(), data(35), loss=bounds.ELBO(beta=bounds.Linear(5)), micro_batch_size=5)


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
def weights_that_are_made_where_some_data_use_them():
    y = torch.arange(16) // 8

    def model(x, y):
        loc = torch.zeros_like(x)
        for kind in y.unique().tolist():
            mean = pyro.param(f"loc {kind}", torch.zeros(WIDTH, dtype=torch.float64))
            loc = torch.where((y == kind).unsqueeze(-1), mean, loc)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    loader = DataLoader(TensorDataset(data(16), y), batch_size=16)
    return train(Pair(model, lambda x, y: None), loader, validation=(data(7), torch.arange(7) % 2))


@scenario
def what_all_data_share():
    zeros = torch.zeros(WIDTH, dtype=torch.float64)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(zeros, 0.1).to_event(1))
        pyro.factor("prior", -mean.abs().sum())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x):
        loc, scale = pyro.param("loc", zeros), pyro.param("scale", zeros + 1, constraint=dist.constraints.positive)
        pyro.sample("mean", dist.Normal(loc, scale).to_event(1))

    return train(Pair(model, guide), data(32), validation=data(7))  # five draws are no multiple of any share


@scenario
def batch_norm_with_the_same_statistics_for_all():
    """Statistics of shards differ from those of a whole batch, but all processes must have the same."""
    network = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    train(normal_vae(network), data())
    means = init_process_group().all_gather(network[1].running_mean)
    return {"spread": max((means[0] - mean).abs().max().item() for mean in means)}


@scenario
def numpys_order():
    """An order of the data that is not from torch's generator, and differs between processes."""
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
def a_loader_that_shards_itself():
    """fit refuses it, or uses all data once an epoch."""
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
    """Runs traced graphs without the compiler."""
    compile_module, tracing.compile_module = tracing.compile_module, lambda module: module
    try:
        yield
    finally:
        tracing.compile_module = compile_module


def refused(folder: Path) -> None:
    """Writes what is refused in several processes alone."""

    def local(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(WIDTH, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def differs(x):
        loc = pyro.param(f"loc of {rank()}", torch.zeros(WIDTH, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    cases = {
        "rows": lambda: train(Pair(local, AutoNormal(local)), data(), batch_size=SIZE),
        "names": lambda: train(Pair(differs), data()),
        "jit": lambda: train(normal_vae(), data(), loss=JitTrace_ELBO()),
    }
    found = {}
    for name, function in cases.items():
        pyro.clear_param_store()
        found[name] = outcome(function)
    torch.save(found, folder / f"{rank()}.pt")


def test_what_cannot_be_shared_out_is_refused_by_all_processes(tmp_path):
    in_processes(refused, tmp_path)
    for process in range(2):
        found = torch.load(tmp_path / f"{process}.pt")
        assert "run on a batch of 44 data, but not on the 22 of them that this process takes" in found["rows"]
        assert "as those of AutoNormal" in found["rows"]
        assert f"other parameters in another process than the 1 that it uses here, loc of {process}" in found["names"]
        assert "JitTrace_ELBO is traced once" in found["jit"]


def run_scenarios(folder: Path) -> None:
    """Writes the outcome of each scenario in this process."""
    GradientSum.__init__.__defaults__ = (64,)  # bytes a bucket: small networks have several
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
    """The outcomes in each of two processes."""
    folder = tmp_path_factory.mktemp("scenarios")
    in_processes(run_scenarios, folder)
    return [torch.load(folder / f"{i}.pt") for i in range(2)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_have_the_result_of_one(name, ended):
    expected = outcome(SCENARIOS[name])
    first, second = (each["found"][name] for each in ended)
    if isinstance(expected, str):
        assert first == second == expected
    elif name == "numpys order":
        assert first == second and "gives different batches in different processes" in first
    else:
        assert not isinstance(first, str), first
        torch.testing.assert_close(first, expected, **ROUNDING)
        assert_same(first, second)


# Sums of gradients.


def sum_gradients(folder: Path) -> None:
    """Writes sums of gradients, of which each process has some, in another order."""
    params = [torch.zeros(3), torch.zeros(2, 2, dtype=torch.double), torch.zeros(()), torch.zeros(5), torch.zeros(7)]
    mine = [(4, 0, 1, 3), (1, 3, 4)][rank()]
    found = {}
    for size in (1, 24, 2**20):
        gradients = GradientSum(params, size)
        for _ in range(2):
            for i in mine:
                gradients.add(params[i], torch.full_like(params[i], 10.0 ** (rank() + i)))
            gradients.add(torch.zeros(3), torch.ones(3))  # of what is not trained
            sums, counts = gradients.sums()
        found[size] = sums, counts, len(gradients.buckets)
    torch.save(found, folder / f"{rank()}.pt")


def test_gradients_are_summed_in_buckets_of_any_size(tmp_path):
    in_processes(sum_gradients, tmp_path)
    expected = [1.0, 110.0, 0.0, 11_000.0, 110_000.0]
    for process in range(2):
        found = torch.load(tmp_path / f"{process}.pt")
        assert [buckets for *_, buckets in found.values()] == [5, 4, 3]  # one type a bucket
        for sums, counts, _ in found.values():
            assert [x.shape for x in sums] == [(3,), (2, 2), (), (5,), (7,)]
            assert [x.unique().tolist() for x in sums] == [[total] for total in expected]
            assert counts.tolist() == [1, 2, 0, 2, 2]


def count_gradients_sent_early(folder: Path) -> None:
    """Writes how many buckets had been sent when all gradients were there, at each step."""
    GradientSum.__init__.__defaults__ = (64,)
    update, sent = Trainer._update, []

    def counted(self: Trainer) -> None:
        sent.append((len(self.gradient_sum.sent), len(self.gradient_sum.buckets)))
        update(self)

    Trainer._update = counted
    found = {}
    for compile in (False, "auto"):
        pyro.clear_param_store()
        sent.clear()
        train(normal_vae(), data(64), epochs=3, compile=compile)
        found[compile] = list(sent)
    torch.save(found, folder / f"{rank()}.pt")


def test_gradients_are_sent_while_later_ones_are_computed(tmp_path):
    in_processes(count_gradients_sent_early, tmp_path)
    found = torch.load(tmp_path / "0.pt")
    assert found[False] == [(6, 7)] * 12, "all but the last"
    # The fourth step traces; a graph that is compared at its calls 1, 2, 4 and 8, steps 4, 5, 7 and 11, may be refused.
    assert [sent for sent, _ in found["auto"]] == [6, 6, 6, 0, 0, 6, 0, 6, 6, 6, 0, 6]


# log p(x) of sharded data.


def estimates() -> dict[str, Any]:
    """Returns estimates of log p(x); of one that failed, the message."""
    torch.manual_seed(0)
    known = truth(2, 3)
    vae = vae_of(known, widen=1.5)
    x = known.marginal().sample((7,))

    class Mine(ImportanceSampling):
        """An estimator that cannot be pickled, because its class is local."""

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
def test_all_processes_have_the_estimates_of_all_data_in_order(name, ended):
    first, second = (each["estimates"] for each in ended)
    assert not isinstance(first[name], str), first[name]
    assert_same(first[name], second[name])
    assert_unit_scores(scores(first[name], first["truth"]), failure_rate=1e-6)
    assert scores(first[name], first["truth"].roll(1)).square().sum() > 100  # another order would fail


def test_there_may_be_fewer_data_than_processes(ended):
    first, second = (each["estimates"] for each in ended)
    assert_same(first["one"], second["one"])
    assert_unit_scores(scores(first["one"], first["truth"][:1]), failure_rate=1e-6)


def test_shards_of_an_estimate_have_different_noise(ended):
    values = ended[0]["estimates"]["alike"]["value"]
    assert len(values.unique()) == len(values)


# Processes that are killed or fail.


class Recorded:
    """A callback that records the number of restarts and the epoch, and leaves time to write a checkpoint."""

    def __init__(self, folder: Path):
        self.file, self.life = folder / "epochs", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def __call__(self, history: History) -> None:
        with open(self.file, "a") as file:
            file.write(f"{self.life} {len(history)}\n")
        time.sleep(0.3)


def train_with_checkpoint(folder: Path, killed: bool = False, epochs: int = 5) -> dict[str, Any]:
    """Trains, or resumes from a checkpoint; before any restart, rank 1 kills itself in the fourth epoch."""
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


def resume_for_two_epochs(folder: Path) -> None:
    torch.save(train_with_checkpoint(folder, epochs=7), folder / f"{rank()}.pt")


@pytest.fixture(scope="module")
def survived(tmp_path_factory) -> Path:
    """The folder of a run in which one process was killed: its checkpoint and its results."""
    folder = tmp_path_factory.mktemp("survived")
    in_processes(train_and_be_killed, folder, restarts=1)
    return folder


def test_a_run_in_which_a_process_is_killed_has_the_result_of_one_without(survived, tmp_path):
    lives = [line.split() for line in (survived / "epochs").read_text().splitlines()]
    assert [epoch for life, epoch in lives if life == "0"] == ["1", "2", "3"]
    again = [int(epoch) for life, epoch in lives if life == "1"]
    assert 1 < again[0] <= 4 and again == [*range(again[0], 6)]  # from a checkpoint, not from the start
    first, second = (torch.load(survived / f"{i}.pt") for i in range(2))
    assert_same(first, second)
    torch.testing.assert_close(first, train_with_checkpoint(tmp_path), **ROUNDING)


def test_one_process_resumes_the_checkpoint_of_two(survived, tmp_path):
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed" / "checkpoint").write_bytes((survived / "checkpoint").read_bytes())
    found = train_with_checkpoint(tmp_path / "resumed", epochs=7)
    torch.testing.assert_close(found, train_with_checkpoint(tmp_path / "whole", epochs=7), **ROUNDING)


@pytest.mark.slow
def test_three_processes_resume_the_checkpoint_of_two(survived, tmp_path):
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed" / "checkpoint").write_bytes((survived / "checkpoint").read_bytes())
    in_processes(resume_for_two_epochs, tmp_path / "resumed", size=3)
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
    """Only rank 0 runs it."""
    in_processes(score_in_a_callback, tmp_path)
    found = torch.load(tmp_path / "0.pt")
    assert all(math.isfinite(record["test"]) for record in found["history"])


def compile_for_real(folder: Path) -> None:
    pyro.set_rng_seed(0)
    torch.save(train(normal_vae(), data(), loss=bounds.IWAE(3), compile=True), folder / f"{rank()}.pt")


@pytest.mark.slow
def test_two_compiled_processes_have_the_result_of_an_eager_one(tmp_path):
    in_processes(compile_for_real, tmp_path)
    pyro.set_rng_seed(0)
    expected = train(normal_vae(), data(), loss=bounds.IWAE(3))
    for i in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{i}.pt"), expected, **ROUNDING)


# The command line.

SHORT = ["--epochs", "3", "--num-samples", "50"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path, str]:
    """The run directories of two processes and of one, and the output of the two."""
    folder = tmp_path_factory.mktemp("runs")
    ended = torchrun("pyrovae", "train", "--run", folder / "two", *SHORT)
    assert ended.returncode == 0, ended.stderr
    main(["train", "--run", str(folder / "one"), *SHORT])
    return folder / "two", folder / "one", ended.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(run: Path, other: Path) -> None:
    """Asserts that two runs have the same losses, in single precision, and a test log p(x) within standard errors."""
    (*epochs, result), (*other_epochs, other_result) = metrics(run), metrics(other)
    assert [{**record, "seconds": 0} for record in epochs] == [
        pytest.approx({**record, "seconds": 0}, rel=1e-4) for record in other_epochs
    ]
    error = math.hypot(result["standard_error"], other_result["standard_error"])
    assert abs(result["log_marginal"] - other_result["log_marginal"]) < 5 * error


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
    found, expected = (np.genfromtxt(tmp_path / name, delimiter=",", names=True) for name in ("two.csv", "one.csv"))
    assert found["datum"].tolist() == [*range(21)]
    error = np.hypot(found["standard_error"], expected["standard_error"])
    assert_unit_scores(torch.as_tensor((found["value"] - expected["value"]) / error), failure_rate=1e-6)


def train_and_be_killed_in_the_command(folder: Path) -> None:
    """Trains by the command line; before any restart, rank 1 is killed in the third epoch."""
    if rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        metrics_file, step = folder / "run" / "metrics.jsonl", SGD.step

        def die(*args: Any, **kwargs: Any) -> Any:
            if metrics_file.exists() and len(metrics_file.read_text().splitlines()) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        SGD.step = die
    main(["train", "--run", str(folder / "run"), *SHORT, "--optimizer", "SGD", "--optimizer.lr", "0.001"])


@pytest.mark.slow
def test_the_command_continues_after_a_process_was_killed(tmp_path):
    in_processes(train_and_be_killed_in_the_command, tmp_path, restarts=1)
    main(["train", "--run", str(tmp_path / "one"), *SHORT, "--optimizer", "SGD", "--optimizer.lr", "0.001"])
    assert_same_training(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
def test_a_command_for_one_process_runs_in_rank_0(runs, tmp_path):
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
